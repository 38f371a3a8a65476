"""How the kept blocks of a matrix are stored: as ordinary tensors, which a state dict can hold and every kernel reads."""

import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from blockprune.core._compat import version_counter
from blockprune.core.grid import BlockGrid

# Larger blocks are stored as several, so that the numbers of one step of a kernel lie close together in memory.
_MAX_HEIGHT = {True: 16, False: 128}  # by ``paired``
_MAX_WIDTH = 64
_CHUNK_ELEMENTS = 1 << 22  # elements of the dense matrix that `pack` and `unpack` process at a time


@attrs.frozen(eq=False)
class BlockSparse:
    """A matrix of which only some blocks are kept, in a variant of the block compressed row (BSR) format.

    The matrix is cut into block rows of ``block[0]`` rows, and each block row into blocks of ``block[1]`` columns. The last block row and
    the last block of a row may be smaller. The width of a block is 1 or even. The kept columns of a block row, in order, form a dense
    matrix. The CPU layout (``paired``) stores that matrix two columns at a time, as ``[columns / 2, rows, 2]``, and an odd last column as
    ``[rows]``. The GPU layout stores it as ``[columns, rows]``.

    Args:
        values: the kept weights, block row after block row, ``[kept elements]``; of int8, they are multiples of ``scale``.
        crow: where the kept blocks of each block row start in ``col``, int64 ``[block rows + 1]``.
        col: the block column of each kept block, int32 ``[kept blocks]``, increasing within a block row.
        shape: rows and columns of the matrix.
        block: height and width of a stored block. `pack` chooses it; it need not be the pruned block.
        paired: whether the values are in the CPU layout.
        scale: of each row of a matrix of int8, float32 ``[rows]``; None for other types.
        pruned_block: of the dense weight, one number for each of its axes: the blocks in which its mask was given, which may be stored as
            several; None if they are not known.

    Example:
        >>> from blockprune.export.format import BlockSparse, unpack
        >>> values, crow, col = torch.tensor([1., 2., 3.]), torch.tensor([0, 0, 3]), torch.tensor([0, 2, 3]).int()
        >>> unpack(BlockSparse(values, crow, col, shape=(2, 4), block=(1, 1)))
        tensor([[0., 0., 0., 0.],
                [1., 0., 2., 3.]])
    """

    values: Tensor
    crow: Tensor
    col: Tensor
    shape: tuple[int, int]
    block: tuple[int, int]
    paired: bool = True
    scale: Tensor | None = None
    pruned_block: tuple[int, ...] | None = None


def pack(weight: Tensor, keep: Tensor, grid: BlockGrid, *, paired: bool = True) -> BlockSparse:
    """Store the blocks of ``weight [rows, columns]`` where ``keep [*grid.size]`` is True.

    Raises:
        ValueError: a weight or keep of another shape than the grid says, or a grid without exactly two axes.

    Example:
        >>> from blockprune.export.format import pack
        >>> keep = torch.tensor([[True, False], [False, True]])
        >>> sparse = pack(torch.arange(16.).view(4, 4), keep, bp.BlockGrid((4, 4), (2, 2)))
        >>> sparse.values
        tensor([ 0.,  1.,  4.,  5., 10., 11., 14., 15.])
        >>> sparse.crow, sparse.col
        (tensor([0, 1, 2]), tensor([0, 1], dtype=torch.int32))
    """
    if len(grid.shape) != 2 or tuple(weight.shape) != grid.shape or tuple(keep.shape) != grid.size:
        raise ValueError(f"weight {tuple(weight.shape)} and keep {tuple(keep.shape)} must be those of a matrix's grid, not of {grid}")
    shape = (grid.shape[0], grid.shape[1])
    height = _stored_size(grid.block[0], shape[0], _MAX_HEIGHT[paired], 1)
    width = _stored_size(grid.block[1], shape[1], _MAX_WIDTH, 2)
    for axis, size in enumerate((height, width)):  # the mask of the stored blocks
        first_element = torch.arange(-(-shape[axis] // size), device=keep.device) * size
        keep = keep.index_select(axis, first_element // grid.block[axis])
    crow = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    sparse = BlockSparse(weight.new_empty(0), crow, keep.nonzero()[:, 1].int(), shape, (height, width), paired)
    values = []
    for chunk in _chunks(sparse):
        kept = weight[chunk.rows].detach().unflatten(0, (-1, chunk.height))[chunk.block_row, :, chunk.column]  # [columns, height]
        if paired:
            first, second = chunk.pair_start, chunk.pair_start + 1
            pairs = torch.stack((kept[first], kept[second]), dim=-1)  # [pairs, height, 2]
            kept[first], kept[second] = pairs.flatten(1).chunk(2, dim=1)
        values.append(kept.flatten())
    return attrs.evolve(sparse, values=torch.cat(values))


def to_layout(sparse: BlockSparse, *, paired: bool) -> BlockSparse:
    """The same matrix in the CPU layout (``paired``) or in the GPU layout.

    In the GPU layout, consecutive block rows that keep the same columns become one.

    Example:
        >>> from blockprune.export.format import pack, to_layout
        >>> sparse = pack(torch.arange(64.).view(32, 2), torch.ones(1, 1).bool(), bp.BlockGrid((32, 2), (32, 2)))
        >>> sparse.block, to_layout(sparse, paired=False).block
        ((16, 2), (32, 2))
    """
    if sparse.paired == paired:
        return sparse
    (rows, columns), (height, width) = sparse.shape, sparse.block
    keep = kept_blocks(sparse)
    max_merged = 1 if paired else max(1, min(rows, _MAX_HEIGHT[False]) // height)
    merged = next(count for count in range(max_merged, 0, -1) if _can_merge(keep, count))
    grid = BlockGrid(sparse.shape, (merged * height, min(width, columns)))
    stored = pack(unpack(attrs.evolve(sparse, scale=None)), keep[::merged], grid, paired=paired)
    return attrs.evolve(stored, scale=sparse.scale, pruned_block=sparse.pruned_block)


def kept_blocks(sparse: BlockSparse) -> Tensor:
    """Which blocks are stored: bool ``[block rows, block columns]``.

    Example:
        >>> from blockprune.export.format import kept_blocks, pack
        >>> kept_blocks(pack(torch.ones(2, 4), torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2))))
        tensor([[ True, False]])
    """
    keep = sparse.col.new_zeros(len(sparse.crow) - 1, -(-sparse.shape[1] // sparse.block[1]), dtype=torch.bool)
    keep[torch.repeat_interleave(sparse.crow.diff()), sparse.col[: int(sparse.crow[-1])].long()] = True
    return keep


def unpack(sparse: BlockSparse) -> Tensor:
    """The dense matrix ``[rows, columns]``, zero where nothing is kept; of int8 values times their scale, in float32.

    Example:
        >>> from blockprune.export.format import pack, unpack
        >>> weight, grid = torch.arange(15.).view(3, 5), bp.BlockGrid((3, 5), (2, 5))
        >>> unpack(pack(weight, torch.tensor([[True], [False]]), grid))
        tensor([[0., 1., 2., 3., 4.],
                [5., 6., 7., 8., 9.],
                [0., 0., 0., 0., 0.]])
    """
    dense, start = sparse.values.new_zeros(sparse.shape), 0
    for chunk in _chunks(sparse):
        stop = start + len(chunk.column) * chunk.height
        kept = sparse.values[start:stop].view(-1, chunk.height).clone()  # [columns, height]
        start = stop
        if sparse.paired:
            first, second = chunk.pair_start, chunk.pair_start + 1
            pairs = torch.cat((kept[first], kept[second]), dim=1).unflatten(1, (chunk.height, 2))
            kept[first], kept[second] = pairs.unbind(-1)
        dense[chunk.rows].unflatten(0, (-1, chunk.height))[chunk.block_row, :, chunk.column] = kept
    return dense if sparse.scale is None else dense * sparse.scale[:, None]


def block_rows(sparse: BlockSparse) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The rows of each block row, its kept columns, and their weights ``[columns, rows]``: ``y[:, rows] = x[:, columns] @ weights``.

    Weights of int8 are as they are stored, without their scale.

    Example:
        >>> from blockprune.export.format import block_rows, pack
        >>> keep = torch.tensor([[True, False], [False, True]])
        >>> sparse = pack(torch.arange(16.).view(4, 4), keep, bp.BlockGrid((4, 4), (2, 2)))
        >>> rows, columns, weights = list(block_rows(sparse))[1]
        >>> rows, columns, weights
        (slice(2, 4, None), tensor([2, 3]), tensor([[10., 14.],
                [11., 15.]]))
    """
    height, start = sparse.block[0], 0
    for index, (begin, end) in enumerate(pairwise(sparse.crow.tolist())):
        rows = slice(index * height, min(sparse.shape[0], (index + 1) * height))
        row_count = rows.stop - rows.start
        columns = _column_numbers(sparse, begin, end).flatten()
        if sparse.shape[1] % sparse.block[1]:
            columns = columns[columns < sparse.shape[1]]
        stored = sparse.values[start : start + len(columns) * row_count]
        start += len(stored)
        paired_columns = len(columns) // 2 * 2 if sparse.paired else 0
        pairs = stored[: paired_columns * row_count].view(-1, row_count, 2).transpose(1, 2).reshape(paired_columns, row_count)
        unpaired = stored[paired_columns * row_count :].view(-1, row_count)
        yield rows, columns, pairs if not len(unpaired) else torch.cat((pairs, unpaired)) if paired_columns else unpaired


def validate(sparse: BlockSparse) -> None:
    """Check that the tensors fit each other and that every index is in range. The kernels rely on it and do not check again.

    Raises:
        ValueError: they do not; the message says which tensor, and how.

    Example:
        >>> from blockprune.export.format import pack, validate
        >>> validate(pack(torch.ones(4, 4), torch.ones(2, 2).bool(), bp.BlockGrid((4, 4), (2, 2))))
    """
    (rows, columns), (height, width) = sparse.shape, sparse.block
    values, crow, col = sparse.values, sparse.crow, sparse.col
    if min(rows, columns, height, width) < 1 or (width > 1 and width % 2) or height > rows or width > columns + columns % 2:
        raise _invalid(sparse, "shape and block must be positive, the block no larger than the shape, its width 1 or even")
    is_number = values.is_floating_point() or values.dtype == torch.int8
    if not is_number or len({x.device for x in (values, crow, col)}) > 1 or values.is_meta:
        devices = f"values are {values.dtype} on {values.device}, crow is on {crow.device} and col on {col.device}"
        raise _invalid(sparse, f"{devices}; values must be floating-point numbers or int8, and all three on one device that holds data")
    for name, x, dtype in (("crow", crow, torch.int64), ("col", col, torch.int32), ("values", values, values.dtype)):
        if x.dim() != 1 or x.dtype != dtype or not x.is_contiguous():
            raise _invalid(sparse, f"{name} is {x.dtype} of shape {tuple(x.shape)}, and must be contiguous, {dtype}, with one axis")
    _validate_indices(sparse)
    if len(values) != (expected := _kept_elements(sparse)):
        raise _invalid(sparse, f"values has {len(values)} numbers and must have {expected}")
    _validate_scale(sparse)
    if not any(x is not None and x.is_inference() for x in (crow, col, sparse.scale)):  # torch does not count writes to inference tensors
        key = id(col)
        _validated[key] = _Validated(weakref.ref(col, lambda _: _validated.pop(key, None)), crow, _index_state(sparse))


def ensure_valid(sparse: BlockSparse, name: str = "") -> None:
    """`validate` a weight whose indices were written or replaced since they were last validated, which torch's version counters tell.

    While a CUDA graph is captured, indices cannot be read and are not validated.

    Args:
        sparse: the weight.
        name: of the layer; the error message begins with it.

    Raises:
        ValueError: as `validate`.

    Example:
        >>> from blockprune.export.format import ensure_valid, pack
        >>> sparse = pack(torch.ones(4, 4), torch.ones(2, 2).bool(), bp.BlockGrid((4, 4), (2, 2)))
        >>> ensure_valid(sparse)
        >>> sparse.col[0] = -1
        >>> ensure_valid(sparse, "fc")
        Traceback (most recent call last):
        ValueError: fc: a block-sparse weight of shape (4, 4) in blocks (2, 2): col must be from 0 to 1; it is from -1 to 1; ...
    """
    entry = _validated.get(id(sparse.col))
    if entry and entry.col() is sparse.col and entry.crow is sparse.crow and entry.state == _index_state(sparse):
        return
    if sparse.col.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    try:
        validate(sparse)
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name else str(error)) from None


class _Validated(NamedTuple):
    """Indices that `validate` accepted."""

    col: "weakref.ref[Tensor]"
    crow: Tensor
    state: tuple[Any, ...]


_validated: dict[int, _Validated] = {}  # by the id of col, as long as it lives


def _index_state(sparse: BlockSparse) -> tuple[Any, ...]:
    """What changes when an index is written, or compared with another shape or other values."""
    crow, col, values, scale = sparse.crow, sparse.col, sparse.values, sparse.scale
    scales = None if scale is None else (version_counter(scale), scale.dtype, scale.shape)
    return version_counter(crow), version_counter(col), values.dtype, values.shape, sparse.shape, sparse.block, scales


def _validate_indices(sparse: BlockSparse) -> None:
    crow, col = sparse.crow, sparse.col
    block_row_count, block_column_count = (-(-size // block) for size, block in zip(sparse.shape, sparse.block, strict=True))
    if len(crow) != block_row_count + 1:
        raise _invalid(sparse, f"crow has {len(crow)} entries and must have {block_row_count + 1}")
    if int(crow[0]) != 0 or int(crow[-1]) != len(col) or bool((crow[1:] < crow[:-1]).any()):
        ends = f"it starts with {int(crow[0])} and ends with {int(crow[-1])}"
        raise _invalid(sparse, f"crow must rise from 0 to the number of kept blocks, {len(col)}; {ends}")
    if len(col) and not 0 <= int(col.min()) <= int(col.max()) < block_column_count:
        raise _invalid(sparse, f"col must be from 0 to {block_column_count - 1}; it is from {int(col.min())} to {int(col.max())}")
    starts_row = torch.zeros(len(col) + 1, dtype=torch.bool, device=col.device)
    starts_row[crow] = True
    if len(col) and not bool((starts_row[1:-1] | (col.diff() > 0)).all()):
        raise _invalid(sparse, "col must rise within each block row")


def _validate_scale(sparse: BlockSparse) -> None:
    values, scale, rows = sparse.values, sparse.scale, sparse.shape[0]
    if (scale is None) == (values.dtype == torch.int8):
        with_scale = "no scale" if scale is None else "a scale"
        raise _invalid(sparse, f"values are {values.dtype} with {with_scale}; int8 needs a scale of each row, and other types have none")
    if scale is None:
        return
    if scale.shape != (rows,) or scale.dtype != torch.float32 or scale.device != values.device or not scale.is_contiguous():
        problem = f"scale is {scale.dtype} of shape {tuple(scale.shape)} on {scale.device}"
        raise _invalid(sparse, f"{problem}, and must be contiguous, torch.float32 of shape ({rows},) on {values.device}")
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise _invalid(sparse, "scale must be finite and not negative")
    if len(values) and int(values.min()) < -127:
        raise _invalid(sparse, "values of int8 must be from -127 to 127")


def _invalid(sparse: BlockSparse, problem: str) -> ValueError:
    where = f"a block-sparse weight of shape {sparse.shape} in blocks {sparse.block}"
    return ValueError(f"{where}: {problem}; it is not what was exported")


def _kept_elements(sparse: BlockSparse) -> int:
    """The number of elements in all kept blocks, smaller ones at the lower and right edge included."""
    (rows, columns), (height, width) = sparse.shape, sparse.block
    block_column_count = -(-columns // width)
    blocks = sparse.crow.diff()
    ends_at_edge = torch.zeros_like(blocks)
    ends_at_edge[blocks > 0] = (sparse.col[sparse.crow[1:][blocks > 0] - 1] == block_column_count - 1).long()
    heights = torch.full_like(blocks, height)
    heights[-1] = rows - (len(blocks) - 1) * height
    return int((heights * (blocks * width - ends_at_edge * (block_column_count * width - columns))).sum())


def _stored_size(block: int, axis: int, limit: int, step: int) -> int:
    """The size at which a block is stored along an axis: a divisor of the block, or any size where one block takes the whole axis."""
    if step == 2 and block > 1 and block % 2 and block < axis:
        return 1
    if block == axis > 1:
        return min(limit, -(-block // step) * step)
    divisors = [size for size in range(step, limit + 1, step) if block % size == 0]
    return block if block <= limit or not divisors or divisors[-1] < 8 else divisors[-1]


def _can_merge(keep: Tensor, count: int) -> bool:
    """Whether each group of ``count`` consecutive block rows keeps the same columns; the last group may have fewer."""
    first = keep[::count]
    return all(torch.equal(keep[i::count], first[: len(keep[i::count])]) for i in range(1, count))


def _column_numbers(sparse: BlockSparse, begin: int, end: int) -> Tensor:
    """The columns of the kept blocks from ``begin`` to ``end``: ``[blocks, width]``; the last may lie beyond the matrix."""
    width = sparse.block[1]
    return sparse.col[begin:end].long()[:, None] * width + torch.arange(width, device=sparse.col.device)


@attrs.frozen(eq=False)
class _Chunk:
    """Several block rows of one height, and their kept columns."""

    rows: slice
    height: int
    block_row: Tensor  # of each kept column, counted from the first of the chunk: [columns]
    column: Tensor  # the number of each kept column in the matrix: [columns]
    pair_start: Tensor  # the kept columns that are the first of a pair: [pairs]


def _chunks(sparse: BlockSparse) -> Iterator[_Chunk]:
    """The block rows, some at a time, so that temporaries stay small."""
    (rows, columns), (height, width) = sparse.shape, sparse.block
    step = max(1, _CHUNK_ELEMENTS // (height * columns)) * height
    whole_rows = rows - rows % height
    bounds = sparse.crow.tolist()
    for top, bottom in pairwise([*range(0, whole_rows, step), whole_rows, rows]):
        if top == bottom:
            continue
        begin, end = top // height, -(-bottom // height)
        blocks = sparse.crow[begin + 1 : end + 1] - sparse.crow[begin:end]
        block_row = torch.repeat_interleave(blocks).repeat_interleave(width)
        column = _column_numbers(sparse, bounds[begin], bounds[end]).flatten()
        inside = column < columns
        block_row, column = block_row[inside], column[inside]
        count = torch.bincount(block_row, minlength=end - begin)  # kept columns of each block row
        position = torch.arange(len(block_row), device=column.device) - (count.cumsum(0) - count)[block_row]
        pair_start = ((position % 2 == 0) & (position + 1 < count[block_row])).nonzero().flatten()
        yield _Chunk(slice(top, bottom), min(height, bottom - top), block_row, column, pair_start)
