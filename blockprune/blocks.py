"""Block geometry: the only file that knows how a parameter is cut into blocks."""

import math
import operator
from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

from blockprune import native

BlockShape = Sequence[int]

CHUNK_ELEMENTS = 1 << 18  # `pool` works through so many elements at a time, so that its temporaries stay in the L2 cache


@attrs.frozen(init=False)
class BlockGrid:
    """A parameter's shape cut into blocks; the last block of an axis may be smaller (ragged) and counts at its true size.

    ``block`` names leading axes; an axis that is not named, or is -1, is taken whole.

    Args:
        shape: the parameter's shape, any rank from 1.
        block: elements of a block along each leading axis, each 1 <= block[i] <= shape[i], or -1.

    Raises:
        ValueError: a block with too many axes, a zero, or larger than its axis; a shape without axes or elements.
        TypeError: a shape or block that is not a sequence of integers.

    Example:
        >>> bp.BlockGrid((10, 8), (4, 4)).size          # ragged: the last row of blocks is 2 high
        (3, 2)
        >>> bp.BlockGrid((64, 3, 7, 7), (1,)).block     # one filter of a convolution
        (1, 3, 7, 7)
        >>> bp.BlockGrid((6, 8), (-1, 1)).size          # input columns
        (1, 8)
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]

    def __init__(self, shape: Sequence[int], block: BlockShape) -> None:
        sizes, named = integers("shape", shape), integers("block", block)
        fix = "a block names leading axes with 1 <= block[i] <= shape[i]; -1 or leaving an axis out takes it whole"
        if not sizes or 0 in sizes or min(sizes) < 0:
            raise ValueError(f"shape={sizes} has no elements to cut into blocks; give at least one axis and no empty one")
        if len(named) > len(sizes):
            raise ValueError(f"block={named} names {len(named)} axes but shape={sizes} has {len(sizes)}; {fix}")
        for axis, (b, s) in enumerate(zip(named, sizes, strict=False)):
            if b == 0 or b < -1 or b > s:
                raise ValueError(f"block={named} does not fit shape={sizes}: axis {axis} has {s} elements, the block {b}; {fix}")
        whole = named + (-1,) * (len(sizes) - len(named))
        self.__attrs_init__(sizes, tuple(s if b == -1 else b for b, s in zip(whole, sizes, strict=True)))

    @property
    def size(self) -> tuple[int, ...]:
        """Blocks along each axis, the ragged one included."""
        return tuple(-(-s // b) for s, b in zip(self.shape, self.block, strict=True))

    @property
    def blocks(self) -> int:
        """Blocks in all."""
        return math.prod(self.size)

    @property
    def elements(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def ragged(self) -> bool:
        """Whether some axis does not divide into whole blocks."""
        return any(s % b for s, b in zip(self.shape, self.block, strict=True))


def integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """A tuple of integers, or a TypeError that names the argument."""
    try:
        if isinstance(values, (str, bytes, Tensor)) or any(isinstance(v, bool) for v in values):
            raise TypeError
        return tuple(operator.index(v) for v in values)
    except TypeError:
        given = f"{type(values).__name__} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)
        raise TypeError(f"{name}={given} must be a sequence of integers, such as (4, 4)") from None


def block_elements(grid: BlockGrid, *, device: torch.device | str | None = None) -> Tensor:
    """Elements of every block, ragged ones at their true number: int64 ``[*grid.size]``.

    A grid without ragged edges gives a view of one number.

    Example:
        >>> bp.block_elements(bp.BlockGrid((5, 4), (2, 2)))
        tensor([[4, 4],
                [4, 4],
                [2, 2]])
    """
    out = torch.ones((1,) * len(grid.shape), dtype=torch.int64, device=device)
    for axis, (s, b, n) in enumerate(zip(grid.shape, grid.block, grid.size, strict=True)):
        if s % b:
            along = torch.full((n,), b, dtype=torch.int64, device=device)
            along[-1] = s - (n - 1) * b
        else:
            along = torch.tensor([b], device=device)
        out = out * along.view([-1 if a == axis else 1 for a in range(len(grid.shape))])
    return out.expand(grid.size)


def expand(keep: Tensor, grid: BlockGrid) -> Tensor:
    """Each block's value repeated over its elements: ``[*grid.size]`` -> ``[*grid.shape]``, any dtype.

    Raises:
        ValueError: ``keep`` is not of the grid's size.

    Example:
        >>> bp.expand(torch.tensor([[True, False]]), bp.BlockGrid((2, 3), (2, 2)))
        tensor([[ True,  True, False],
                [ True,  True, False]])
    """
    _check_size("keep", keep, grid.size, grid)
    for axis, (s, b, n) in enumerate(zip(grid.shape, grid.block, grid.size, strict=True)):
        if n == 1:
            keep = keep.expand(*keep.shape[:axis], s, *keep.shape[axis + 1 :])
        elif b > 1:
            keep = keep.repeat_interleave(b, dim=axis).narrow(axis, 0, s)
    return keep


def pool(x: Tensor, grid: BlockGrid, *, reduce: str = "sum", each: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """One number a block: ``[*grid.shape]`` -> ``[*grid.size]``; ragged blocks reduce over the elements they have.

    Half types accumulate in float32 and come back as float32; bool and integers are summed as int64.

    Args:
        x: of the grid's shape.
        grid: the blocks.
        reduce: ``"sum"``, ``"mean"``, ``"amax"`` (or ``"max"``), ``"amin"`` (or ``"min"``).
        each: an elementwise function applied first, such as ``torch.abs``; it runs on cache-sized pieces of ``x``.

    Raises:
        ValueError: ``x`` is not of the grid's shape, or ``reduce`` is not one of the above.

    Example:
        >>> bp.pool(torch.tensor([[1., -2., 3.], [0., 4., -5.]]), bp.BlockGrid((2, 3), (2, 2)), each=torch.abs)
        tensor([[7., 8.]])
        >>> bp.pool(torch.arange(5.), bp.BlockGrid((5,), (2,)), reduce="mean")
        tensor([0.5000, 2.5000, 4.0000])
    """
    _check_size("x", x, grid.shape, grid)
    if reduce == "mean":
        total = pool(x, grid, reduce="sum", each=each)
        total = total if total.is_floating_point() or total.is_complex() else total.to(torch.get_default_dtype())
        return total.div_(block_elements(grid, device=x.device) if grid.ragged else math.prod(grid.block))
    if reduce not in _REDUCERS:
        raise ValueError(f'reduce={reduce!r} is not a reduction; use "sum", "mean", "amax" (or "max") or "amin" (or "min")')
    if reduce == "sum" and (matrix := _as_matrix(grid)) is not None:
        shape, block = matrix
        if (fast := native.pool_sum(x, shape, block, each)) is not None:
            return fast.view(grid.size)
    combine, wide = _REDUCERS[reduce], _accumulator(x.dtype, reduce)

    def reduced(rows: Tensor, block: tuple[int, ...]) -> Tensor:
        return _reduce(each(rows.to(wide)) if each else rows.to(wide), block, combine)

    out: Tensor | None = None
    tall, chunk = grid.block[0], max(1, CHUNK_ELEMENTS // x[0].numel())  # rows of a block, rows of a chunk
    step = max(tall, chunk // tall * tall)
    for at, rows in zip(range(0, len(x), step), x.split(step), strict=True):
        if tall <= chunk:
            part = reduced(rows, grid.block)
        else:  # a block is taller than a chunk: reduce its pieces, then those
            part = combine(torch.cat([reduced(piece, (len(piece), *grid.block[1:])) for piece in rows.split(chunk)]), 0, True)
        out = part.new_empty(grid.size) if out is None else out
        out[at // tall : at // tall + len(part)] = part
    assert out is not None
    return out


def tiles(x: Tensor, grid: BlockGrid, *, fill: float) -> Tensor:
    """The elements of each block as a row: ``[*grid.shape]`` -> ``[grid.blocks, elements of a whole block]``, ragged ones filled up.

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
    """The inverse of `tiles`: ``[grid.blocks, elements of a whole block]`` -> ``[*grid.shape]``."""
    rank = len(grid.shape)
    order = [axis for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for axis in pair]
    padded = rows.reshape(*grid.size, *grid.block).permute(order).reshape([n * b for n, b in zip(grid.size, grid.block, strict=True)])
    return padded[tuple(slice(s) for s in grid.shape)]


Reducer = Callable[..., Tensor]  # (x, axis, keepdim) -> Tensor
_REDUCERS: dict[str, Reducer] = {"sum": torch.sum, "amax": torch.amax, "max": torch.amax, "amin": torch.amin, "min": torch.amin}


def _reduce(x: Tensor, block: tuple[int, ...], reducer: Reducer) -> Tensor:
    """Reduce axis after axis: sum, max and min are separable, and each pass leaves `b` times less to read."""
    size = [-(-s // b) for s, b in zip(x.shape, block, strict=True)]
    named = len(block)
    while named > 1 and block[named - 1] == x.shape[named - 1]:  # whole trailing axes reduce as one
        named -= 1
    if named < len(block):
        x = reducer(x.flatten(named), -1, True)
    for axis, b in enumerate(block[:named]):
        if b > 1:
            whole = x.shape[axis] // b * b
            parts = [_reduce_axis(x.narrow(axis, 0, whole), axis, b, reducer)] if whole else []
            if whole < x.shape[axis]:
                parts.append(reducer(x.narrow(axis, whole, x.shape[axis] - whole), axis, True))
            x = torch.cat(parts, axis) if len(parts) > 1 else parts[0]
    return x.reshape(size)


def _reduce_axis(x: Tensor, axis: int, b: int, reducer: Reducer) -> Tensor:
    """``[..., n * b, ...]`` -> ``[..., n, ...]``; torch reduces a few neighbours slowly, so narrow blocks add up their slices."""
    if reducer is not torch.sum or not x.is_floating_point() or b >= 16:
        neighbours: Tensor = x.unflatten(axis, (-1, b))
        return reducer(neighbours, axis + 1, False)
    first, second, *rest = x.unflatten(axis, (-1, b)).unbind(axis + 1)
    out: Tensor = first + second
    for piece in rest:
        out += piece
    return out


def _as_matrix(grid: BlockGrid) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The grid as one of a matrix ``(rows, cols), block``, if at most its two leading axes are cut."""
    named = max((axis + 1 for axis, n in enumerate(grid.size) if n > 1), default=0)
    if named > 2:
        return None
    rest = math.prod(grid.shape[2:])
    if len(grid.shape) == 1:
        return (1, grid.shape[0]), (1, grid.block[0])
    return (grid.shape[0], grid.shape[1] * rest), (grid.block[0], grid.block[1] * rest)


def _accumulator(dtype: torch.dtype, reduce: str) -> torch.dtype:
    if reduce == "sum" and not dtype.is_floating_point and not dtype.is_complex:
        return torch.int64
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _check_size(name: str, x: Tensor, size: tuple[int, ...], grid: BlockGrid) -> None:
    if tuple(x.shape) != size:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but {grid} needs {size}")
