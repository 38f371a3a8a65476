"""How the kept blocks of a matrix are stored: ordinary tensors that a state dict can hold, the same for everything that multiplies them."""

from collections.abc import Iterator
from itertools import pairwise

import attrs
import torch
from torch import Tensor

from blockprune.blocks import BlockGrid

__all__ = ["BlockSparse", "bands", "check", "pack", "reorder", "unpack"]

_TALLEST, _WIDEST = {True: 16, False: 128}, 64  # larger blocks are stored as several: what is multiplied together stays close
_CHUNK = 1 << 22  # elements that are moved at a time


@attrs.frozen(eq=False)
class BlockSparse:
    """A matrix of which only some blocks are kept.

    It is cut into bands of ``block[0]`` rows (the last may be lower), and a band into blocks of ``block[1]`` columns (the last may be
    narrower), which is 1 or even. A band's kept columns, in order, are a dense matrix with the band's rows. CPUs want it stored two columns
    at a time, ``[columns / 2, rows, 2]``, and an odd last column as ``[rows]``; GPUs, not paired, as ``[columns, rows]``.

    Args:
        values: the kept weights, band after band, one number each.
        crow: int64 ``[bands + 1]``: where each band's kept blocks start in ``col``.
        col: int32, the column of blocks that each kept block is in; rising within a band.
        shape: of the matrix.
        block: as stored, which need not be that which was pruned: `pack` chooses it.
        paired: two columns at a time.

    Example:
        >>> from blockprune import storage
        >>> x = storage.BlockSparse(torch.tensor([1., 2., 3.]), torch.tensor([0, 0, 3]), torch.tensor([0, 2, 3]).int(), (2, 4), (1, 1))
        >>> storage.unpack(x)
        tensor([[0., 0., 0., 0.],
                [1., 0., 2., 3.]])
    """

    values: Tensor
    crow: Tensor
    col: Tensor
    shape: tuple[int, int]
    block: tuple[int, int]
    paired: bool = True


def pack(weight: Tensor, keep: Tensor, grid: BlockGrid, *, paired: bool = True) -> BlockSparse:
    """The blocks of ``weight [rows, cols]`` that ``keep [*grid.size]`` keeps.

    Example:
        >>> from blockprune import storage
        >>> keep = torch.tensor([[True, False], [False, True]])
        >>> sparse = storage.pack(torch.arange(16.).view(4, 4), keep, bp.BlockGrid((4, 4), (2, 2)))
        >>> sparse.values
        tensor([ 0.,  1.,  4.,  5., 10., 11., 14., 15.])
        >>> sparse.crow, sparse.col
        (tensor([0, 1, 2]), tensor([0, 1], dtype=torch.int32))
    """
    if len(grid.shape) != 2 or tuple(weight.shape) != grid.shape or tuple(keep.shape) != grid.size:
        raise ValueError(f"weight {tuple(weight.shape)} and keep {tuple(keep.shape)} must be those of a matrix's grid, not of {grid}")
    shape = (grid.shape[0], grid.shape[1])
    block = _divided(grid.block[0], shape[0], _TALLEST[paired], 1), _divided(grid.block[1], shape[1], _WIDEST, 2)
    for axis in (0, 1):
        stored = torch.arange(-(-shape[axis] // block[axis]), device=keep.device)
        keep = keep.index_select(axis, stored * block[axis] // grid.block[axis])
    crow = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    sparse = BlockSparse(weight.new_empty(0), crow, keep.nonzero()[:, 1].int(), shape, block, paired)
    packed = []
    for rows, band, column, first in _columns(sparse):
        kept = weight[rows].detach().unflatten(0, (-1, _height(sparse, rows)))[band, :, column]  # [columns, height]
        if paired:
            pairs = torch.stack((kept[first], kept[first + 1]), dim=-1)  # [pairs, height, 2]
            kept[first], kept[first + 1] = pairs.flatten(1).chunk(2, dim=1)
        packed.append(kept.flatten())
    return attrs.evolve(sparse, values=torch.cat(packed))


def reorder(sparse: BlockSparse, *, paired: bool) -> BlockSparse:
    """The same matrix in the other order; bands that keep the same columns are one in the order of GPUs.

    Example:
        >>> from blockprune import storage
        >>> sparse = storage.pack(torch.arange(64.).view(32, 2), torch.ones(1, 1).bool(), bp.BlockGrid((32, 2), (32, 2)))
        >>> sparse.block, storage.reorder(sparse, paired=False).block
        ((16, 2), (32, 2))
    """
    if sparse.paired == paired:
        return sparse
    (rows, cols), (height, width) = sparse.shape, sparse.block
    keep = sparse.col.new_zeros(len(sparse.crow) - 1, -(-cols // width), dtype=torch.bool)
    keep[torch.repeat_interleave(sparse.crow.diff()), sparse.col[: int(sparse.crow[-1])].long()] = True
    most = 1 if paired else max(1, min(rows, _TALLEST[False]) // height)
    together = next(together for together in range(most, 0, -1) if _alike(keep, together))
    return pack(unpack(sparse), keep[::together], BlockGrid(sparse.shape, (together * height, min(width, cols))), paired=paired)


def unpack(sparse: BlockSparse) -> Tensor:
    """The dense matrix, zero where nothing is kept.

    Example:
        >>> from blockprune import storage
        >>> weight, grid = torch.arange(15.).view(3, 5), bp.BlockGrid((3, 5), (2, 5))
        >>> storage.unpack(storage.pack(weight, torch.tensor([[True], [False]]), grid))
        tensor([[0., 1., 2., 3., 4.],
                [5., 6., 7., 8., 9.],
                [0., 0., 0., 0., 0.]])
    """
    dense, start = sparse.values.new_zeros(sparse.shape), 0
    for rows, band, column, first in _columns(sparse):
        height = _height(sparse, rows)
        kept = sparse.values[start : start + len(band) * height].view(-1, height).clone()
        start += kept.numel()
        if sparse.paired:
            pairs = torch.cat((kept[first], kept[first + 1]), dim=1).unflatten(1, (height, 2))
            kept[first], kept[first + 1] = pairs.unbind(-1)
        dense[rows].unflatten(0, (-1, height))[band, :, column] = kept
    return dense


def bands(sparse: BlockSparse) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of each band its rows, its kept columns, and its weights ``[columns, rows]``: ``y[:, rows] = x[:, columns] @ weights``.

    Example:
        >>> from blockprune import storage
        >>> keep = torch.tensor([[True, False], [False, True]])
        >>> sparse = storage.pack(torch.arange(16.).view(4, 4), keep, bp.BlockGrid((4, 4), (2, 2)))
        >>> rows, columns, weights = list(storage.bands(sparse))[1]
        >>> rows, columns, weights
        (slice(2, 4, None), tensor([2, 3]), tensor([[10., 14.],
                [11., 15.]]))
    """
    (rows, cols), (height, width), start = sparse.shape, sparse.block, 0
    bounds = sparse.crow.tolist()
    for b, (begin, end) in enumerate(pairwise(bounds)):
        here = slice(b * height, min(rows, (b + 1) * height))
        high = here.stop - here.start
        columns = (sparse.col[begin:end].long()[:, None] * width + torch.arange(width, device=sparse.col.device)).flatten()
        if cols % width:
            columns = columns[columns < cols]
        stored = sparse.values[start : start + len(columns) * high]
        start += len(stored)
        even = len(columns) // 2 * 2 if sparse.paired else 0
        pairs = stored[: even * high].view(-1, high, 2).transpose(1, 2).reshape(even, high)
        rest = stored[even * high :].view(-1, high)
        yield here, columns, pairs if not len(rest) else torch.cat((pairs, rest)) if even else rest


def check(sparse: BlockSparse) -> None:
    """Raise unless the tensors fit each other and every index is in range: what multiplies them does not look again.

    Raises:
        ValueError: they do not; it says which, and how.

    Example:
        >>> from blockprune import storage
        >>> storage.check(storage.pack(torch.ones(4, 4), torch.ones(2, 2).bool(), bp.BlockGrid((4, 4), (2, 2))))
    """
    (rows, cols), (height, width) = sparse.shape, sparse.block
    values, crow, col = sparse.values, sparse.crow, sparse.col

    def wrong(what: str) -> ValueError:
        return ValueError(f"a block-sparse weight of shape {sparse.shape} in blocks {sparse.block}: {what}; it is not what was exported")

    if min(rows, cols, height, width) < 1 or (width > 1 and width % 2) or height > rows or width > cols + cols % 2:
        raise wrong("shape and block must be positive, the block no larger than the shape, its width 1 or even")
    if not values.is_floating_point() or len({x.device for x in (values, crow, col)}) > 1 or values.is_meta:
        raise wrong(f"values are {values.dtype} on {values.device}, crow is on {crow.device}, col on {col.device}: floating, on one device")
    for name, x, dtype in (("crow", crow, torch.int64), ("col", col, torch.int32), ("values", values, values.dtype)):
        if x.dim() != 1 or x.dtype != dtype or not x.is_contiguous():
            raise wrong(f"{name} is {x.dtype} of shape {tuple(x.shape)}, and must be contiguous, {dtype}, with one axis")
    down, across = -(-rows // height), -(-cols // width)
    if len(crow) != down + 1:
        raise wrong(f"crow has {len(crow)} entries and must have {down + 1}")
    if int(crow[0]) != 0 or int(crow[-1]) != len(col) or bool((crow[1:] < crow[:-1]).any()):
        raise wrong(f"crow must rise from 0 to the number of kept blocks, {len(col)}; it goes from {int(crow[0])} to {int(crow[-1])}")
    if len(col) and not 0 <= int(col.min()) <= int(col.max()) < across:
        raise wrong(f"col must be from 0 to {across - 1}; it is from {int(col.min())} to {int(col.max())}")
    starts = torch.zeros(len(col) + 1, dtype=torch.bool, device=col.device)
    starts[crow] = True
    if len(col) and not bool((starts[1:-1] | (col.diff() > 0)).all()):
        raise wrong("col must rise within each band")
    blocks = crow.diff()
    ragged = torch.zeros_like(blocks)
    ragged[blocks > 0] = (col[crow[1:][blocks > 0] - 1] == across - 1).long()
    heights = torch.full_like(blocks, height)
    heights[-1] = rows - (down - 1) * height
    kept = int((heights * (blocks * width - ragged * (across * width - cols))).sum())
    if len(values) != kept:
        raise wrong(f"values has {len(values)} numbers and must have {kept}")


def _divided(block: int, axis: int, most: int, step: int) -> int:
    """The size in which a block is stored along an axis: a divisor of its own, or any where one block takes the whole axis."""
    if step == 2 and block > 1 and block % 2 and block < axis:
        return 1
    if block == axis > 1:
        return min(most, -(-block // step) * step)
    fits = [size for size in range(step, most + 1, step) if block % size == 0]
    return block if block <= most or not fits or fits[-1] < 8 else fits[-1]


def _alike(keep: Tensor, together: int) -> bool:
    """Whether so many bands each, from the first, keep the same columns."""
    return all(torch.equal(keep[i::together], keep[::together][: len(keep[i::together])]) for i in range(1, together))


def _height(sparse: BlockSparse, rows: slice) -> int:
    return min(sparse.block[0], int(rows.stop) - int(rows.start))


def _columns(sparse: BlockSparse) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Bands of one height, some at a time: their rows; of each kept column its band among them and its number; which start a pair."""
    (rows, cols), (height, width) = sparse.shape, sparse.block
    device, step = sparse.col.device, max(1, _CHUNK // (height * cols)) * height
    edges = [*range(0, rows - rows % height, step), rows - rows % height, rows]
    bounds = sparse.crow.tolist()
    for top, bottom in pairwise(edges):
        if top == bottom:
            continue
        b, e = top // height, -(-bottom // height)
        count = sparse.crow[b + 1 : e + 1] - sparse.crow[b:e]
        band = torch.repeat_interleave(count).repeat_interleave(width)
        column = (sparse.col[bounds[b] : bounds[e]].long()[:, None] * width + torch.arange(width, device=device)).flatten()
        inside = column < cols
        band, column = band[inside], column[inside]
        count = torch.bincount(band, minlength=e - b)
        place = torch.arange(len(band), device=device) - (count.cumsum(0) - count)[band]
        yield slice(top, bottom), band, column, ((place % 2 == 0) & (place + 1 < count[band])).nonzero().flatten()
