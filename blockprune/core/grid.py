"""Block geometry: how the elements of a parameter are divided into blocks. No other module computes this."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from blockprune import native
from blockprune.core.arguments import check_function, check_tensor

BlockShape = Sequence[int]

CHUNK_ELEMENTS = 1 << 18  # `pool` processes this many elements at a time, so that its temporaries stay in the L2 cache


@attrs.frozen(init=False)
class BlockGrid:
    """The shape of a parameter and the shape of its blocks.

    ``block`` gives the size of a block along the leading axes. A block spans the whole length of an axis that is -1 or left out. The last
    block of an axis may be smaller than the others (ragged); it counts with the elements that it has.

    Args:
        shape: the parameter's shape, with at least one axis.
        block: elements of a block along each leading axis: 1 <= block[i] <= shape[i], or -1.

    Raises:
        ValueError: the block has more axes than the shape, a zero, or is larger than its axis; the shape has no axes or no elements.
        TypeError: the shape or the block is not a sequence of integers.

    Example:
        >>> bp.BlockGrid((10, 8), (4, 4)).size          # ragged: the blocks of the last row are 2 high
        (3, 2)
        >>> bp.BlockGrid((64, 3, 7, 7), (1,)).block     # one filter of a convolution
        (1, 3, 7, 7)
        >>> bp.BlockGrid((6, 8), (-1, 1)).size          # input columns
        (1, 8)
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]

    def __init__(self, shape: Sequence[int], block: BlockShape) -> None:
        sizes, lengths = int_tuple("shape", shape), int_tuple("block", block)
        hint = "give 1 <= block[i] <= shape[i] for the leading axes; -1 or leaving an axis out spans the whole axis"
        if not sizes or min(sizes) <= 0:
            raise ValueError(f"shape={sizes} has no elements to divide into blocks; give at least one axis, and no axis of length 0")
        if len(lengths) > len(sizes):
            raise ValueError(f"block={lengths} has {len(lengths)} axes, but shape={sizes} has {len(sizes)}; {hint}")
        for axis, (b, s) in enumerate(zip(lengths, sizes, strict=False)):
            if b == 0 or b < -1 or b > s:
                raise ValueError(f"block={lengths} does not fit shape={sizes}: axis {axis} has {s} elements, but the block {b}; {hint}")
        lengths += (-1,) * (len(sizes) - len(lengths))
        self.__attrs_init__(sizes, tuple(s if b == -1 else b for b, s in zip(lengths, sizes, strict=True)))

    @property
    def size(self) -> tuple[int, ...]:
        """The number of blocks along each axis, including ragged ones."""
        return tuple(-(-s // b) for s, b in zip(self.shape, self.block, strict=True))

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return math.prod(self.size)

    @property
    def elements(self) -> int:
        """The number of elements of the parameter."""
        return math.prod(self.shape)

    @property
    def ragged(self) -> bool:
        """Whether the length of some axis is not a multiple of its block."""
        return any(s % b for s, b in zip(self.shape, self.block, strict=True))


def int_tuple(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """The values as a tuple of integers.

    Raises:
        TypeError: the argument of this name is not a sequence of integers.
    """
    try:
        if isinstance(values, (str, bytes, Tensor)) or any(isinstance(v, bool) for v in values):
            raise TypeError
        return tuple(operator.index(v) for v in values)
    except TypeError:
        text = f"{type(values).__name__} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)
        raise TypeError(f"{name}={text} must be a sequence of integers, such as (4, 4)") from None


def check_grid(grid: Any) -> None:
    """Raise unless these are blocks.

    Raises:
        TypeError: anything else, such as the shape of a block.

    Example:
        >>> from blockprune.core.grid import check_grid
        >>> check_grid(bp.BlockGrid((4, 4), (2, 2)))
    """
    if not isinstance(grid, BlockGrid):
        raise TypeError(f"grid={grid!r} must be a BlockGrid; build one: bp.BlockGrid(shape, block)")


def block_elements(grid: BlockGrid, *, device: torch.device | str = "cpu") -> Tensor:
    """The number of elements of each block: int64 ``[*grid.size]``.

    Without ragged blocks the result is an expanded view of a single number.

    Example:
        >>> bp.block_elements(bp.BlockGrid((5, 4), (2, 2)))
        tensor([[4, 4],
                [4, 4],
                [2, 2]])
    """
    check_grid(grid)
    rank = len(grid.shape)
    elements = torch.ones((1,) * rank, dtype=torch.int64, device=device)
    for axis, (s, b, n) in enumerate(zip(grid.shape, grid.block, grid.size, strict=True)):
        lengths = [b] * (n - 1) + [s % b] if s % b else [b]
        elements = elements * torch.tensor(lengths, device=device).view([-1 if a == axis else 1 for a in range(rank)])
    return elements.expand(grid.size)


def expand(keep: Tensor, grid: BlockGrid) -> Tensor:
    """Repeat the value of each block over the block's elements: ``[*grid.size]`` -> ``[*grid.shape]``, any dtype.

    Raises:
        ValueError: the shape of ``keep`` is not ``grid.size``.

    Example:
        >>> bp.expand(torch.tensor([[True, False]]), bp.BlockGrid((2, 3), (2, 2)))
        tensor([[ True,  True, False],
                [ True,  True, False]])
    """
    _check_shape("keep", keep, grid, "size")
    for axis, (s, b, n) in enumerate(zip(grid.shape, grid.block, grid.size, strict=True)):
        if n == 1:
            keep = keep.expand(*keep.shape[:axis], s, *keep.shape[axis + 1 :])
        elif b > 1:
            keep = keep.repeat_interleave(b, dim=axis).narrow(axis, 0, s)
    return keep


def pool(x: Tensor, grid: BlockGrid, *, reduce: str = "sum", elementwise: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Reduce each block to one number: ``[*grid.shape]`` -> ``[*grid.size]``; a ragged block reduces the elements that it has.

    Half-precision inputs are accumulated and returned in float32; the sums of bool and integer inputs are int64.

    Args:
        x: a tensor of shape ``grid.shape``.
        grid: the blocks.
        reduce: ``"sum"``, ``"mean"``, ``"amax"`` (or ``"max"``), ``"amin"`` (or ``"min"``).
        elementwise: a function that is applied to every element before the reduction, such as ``torch.abs``. It is called with parts of
            ``x`` that fit in the cache.

    Raises:
        ValueError: the shape of ``x`` is not ``grid.shape``, or ``reduce`` is none of the names above.

    Example:
        >>> bp.pool(torch.tensor([[1., -2., 3.], [0., 4., -5.]]), bp.BlockGrid((2, 3), (2, 2)), elementwise=torch.abs)
        tensor([[7., 8.]])
        >>> bp.pool(torch.arange(5.), bp.BlockGrid((5,), (2,)), reduce="mean")
        tensor([0.5000, 2.5000, 4.0000])
    """
    _check_shape("x", x, grid, "shape")
    check_function("elementwise", elementwise, "from a tensor to a tensor of the same shape, such as torch.abs", optional=True)
    if reduce == "mean":
        total = pool(x, grid, elementwise=elementwise)
        total = total if total.is_floating_point() or total.is_complex() else total.to(torch.get_default_dtype())
        return total.div_(block_elements(grid, device=x.device) if grid.ragged else math.prod(grid.block))
    if reduce not in _REDUCERS:
        raise ValueError(f'reduce={reduce!r} is not a reduction; use "sum", "mean", "amax" (or "max") or "amin" (or "min")')
    if reduce == "sum" and (matrix := _as_matrix(grid)) is not None:
        shape, block = matrix
        if (sums := native.pool_sum(x, shape, block, elementwise)) is not None:
            return sums.view(grid.size)
    return _pool_in_chunks(x, grid, reduce, elementwise)


def _pool_in_chunks(x: Tensor, grid: BlockGrid, reduce: str, elementwise: Callable[[Tensor], Tensor] | None) -> Tensor:
    reducer, dtype = _REDUCERS[reduce], _accumulator(x.dtype, reduce)

    def reduced(rows: Tensor, block: tuple[int, ...]) -> Tensor:
        rows = rows.to(dtype)
        return _reduce_blocks(elementwise(rows) if elementwise else rows, block, reducer)

    pooled: Tensor | None = None
    block_rows, chunk_rows = grid.block[0], max(1, CHUNK_ELEMENTS // x[0].numel())
    step = max(block_rows, chunk_rows // block_rows * block_rows)  # rows of whole blocks
    for start, rows in zip(range(0, len(x), step), x.split(step), strict=True):
        if block_rows <= chunk_rows:
            part = reduced(rows, grid.block)
        else:  # a block has more rows than a chunk: reduce it chunk by chunk, then combine the results
            part = reducer(torch.cat([reduced(chunk, (len(chunk), *grid.block[1:])) for chunk in rows.split(chunk_rows)]), 0, True)
        pooled = part.new_empty(grid.size) if pooled is None else pooled
        pooled[start // block_rows : start // block_rows + len(part)] = part
    assert pooled is not None  # a grid has at least one row
    return pooled


def tiles(x: Tensor, grid: BlockGrid, *, fill: float) -> Tensor:
    """The elements of each block as a row: ``[*grid.shape]`` -> ``[grid.blocks, math.prod(grid.block)]``; ``fill`` pads ragged blocks.

    Example:
        >>> tiles(torch.arange(6).view(2, 3), bp.BlockGrid((2, 3), (2, 2)), fill=-1)
        tensor([[ 0,  1,  3,  4],
                [ 2, -1,  5, -1]])
    """
    padded = x.new_full([n * b for n, b in zip(grid.size, grid.block, strict=True)], fill)
    padded[tuple(slice(s) for s in grid.shape)] = x
    rank = len(grid.shape)
    paired = padded.reshape([i for pair in zip(grid.size, grid.block, strict=True) for i in pair])  # [n0, b0, n1, b1, ...]
    return paired.permute(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)).reshape(grid.blocks, -1)


def untile(rows: Tensor, grid: BlockGrid) -> Tensor:
    """The inverse of `tiles`: ``[grid.blocks, math.prod(grid.block)]`` -> ``[*grid.shape]``; the padding is dropped."""
    rank = len(grid.shape)
    order = [axis for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for axis in pair]
    padded = rows.reshape(*grid.size, *grid.block).permute(order).reshape([n * b for n, b in zip(grid.size, grid.block, strict=True)])
    return padded[tuple(slice(s) for s in grid.shape)]


Reducer = Callable[..., Tensor]  # (x, axis, keepdim) -> Tensor
_REDUCERS: dict[str, Reducer] = {"sum": torch.sum, "amax": torch.amax, "max": torch.amax, "amin": torch.amin, "min": torch.amin}


def _reduce_blocks(x: Tensor, block: tuple[int, ...], reducer: Reducer) -> Tensor:
    """Reduce one axis after the other: sum, max and min are separable, and each pass divides the elements that are left by ``b``."""
    size = [-(-s // b) for s, b in zip(x.shape, block, strict=True)]
    axes = len(block)
    while axes > 1 and block[axes - 1] == x.shape[axes - 1]:  # trailing axes that a block spans are reduced in one pass
        axes -= 1
    if axes < len(block):
        x = reducer(x.flatten(axes), -1, True)
    for axis, b in enumerate(block[:axes]):
        if b > 1:
            whole = x.shape[axis] // b * b
            parts = [_reduce_axis(x.narrow(axis, 0, whole), axis, b, reducer)] if whole else []
            if whole < x.shape[axis]:
                parts.append(reducer(x.narrow(axis, whole, x.shape[axis] - whole), axis, True))
            x = torch.cat(parts, axis) if len(parts) > 1 else parts[0]
    return x.reshape(size)


def _reduce_axis(x: Tensor, axis: int, b: int, reducer: Reducer) -> Tensor:
    """``[..., n * b, ...]`` -> ``[..., n, ...]``; torch.sum over a short axis is slow, so narrow blocks add their slices instead."""
    blocks: Tensor = x.unflatten(axis, (-1, b))
    if reducer is not torch.sum or not x.is_floating_point() or b >= 16:
        return reducer(blocks, axis + 1, False)
    first, second, *others = blocks.unbind(axis + 1)
    total = first + second
    for values in others:
        total += values
    return total


def _as_matrix(grid: BlockGrid) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Shape and block of the same grid on a matrix, or None if more than its two leading axes are divided."""
    if any(n > 1 for n in grid.size[2:]):
        return None
    if len(grid.shape) == 1:
        return (1, grid.shape[0]), (1, grid.block[0])
    trailing = math.prod(grid.shape[2:])
    return (grid.shape[0], grid.shape[1] * trailing), (grid.block[0], grid.block[1] * trailing)


def _accumulator(dtype: torch.dtype, reduce: str) -> torch.dtype:
    if reduce == "sum" and not dtype.is_floating_point and not dtype.is_complex:
        return torch.int64
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _check_shape(name: str, x: Tensor, grid: BlockGrid, of_grid: str) -> None:
    check_tensor(name, x)
    check_grid(grid)
    shape = getattr(grid, of_grid)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but {grid} needs shape {shape}")
