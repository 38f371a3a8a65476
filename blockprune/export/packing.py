"""The stored blocks of a layer: from its weight and mask, in its type or in int8, and from a state dict; and its mask from them."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from blockprune.core.grid import BlockGrid, expand
from blockprune.core.types import BlockMask
from blockprune.export import triton_launch
from blockprune.export.format import BlockSparse, kept_blocks, pack, validate
from blockprune.export.quantization import quantize_weight


def read_state(values: Tensor, crow: Tensor, col: Tensor, layout: Tensor, scale: Tensor | None = None) -> BlockSparse:
    """The weight that the tensors of a state dict hold.

    Raises:
        ValueError: they do not hold a valid weight.

    Example:
        >>> from blockprune.export.packing import read_state
        >>> read_state(torch.ones(2), torch.tensor([0, 1]), torch.tensor([0]).int(), torch.tensor([2, 4, 2, 1, 1])).shape
        (2, 4)
    """
    if layout.ndim != 1 or len(layout) < 5 or len(layout) == 6 or layout.dtype != torch.int64 or layout.is_meta:
        kind = f"{layout.dtype} of shape {tuple(layout.shape)} on {layout.device}"
        raise ValueError(f"layout is {kind} and must be 5 numbers of int64, or more with the shape of a pruned block")
    rows, columns, height, width, *pruned_block, paired = layout.tolist()
    if paired not in (0, 1):
        raise ValueError(f"layout is {layout.tolist()}: it must end in 1 (CPU layout) or 0 (GPU layout); it is not what was exported")
    if pruned_block and not (min(pruned_block) >= 1 and pruned_block[0] <= rows and max(pruned_block[1:]) <= columns):
        raise ValueError(
            f"layout is {layout.tolist()}: pruned blocks {tuple(pruned_block)} do not fit {rows} x {columns}; it is not what was exported"
        )
    weight = BlockSparse(values, crow, col, (rows, columns), (height, width), bool(paired), scale, tuple(pruned_block) or None)
    validate(weight)
    return weight


def layout_numbers(weight: BlockSparse) -> list[int]:
    """What `read_state` reads as ``layout``.

    Example:
        >>> from blockprune.export.packing import layout_numbers, pack_weight
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((4, 64), (4, 32)))
        >>> layout_numbers(pack_weight(torch.ones(4, 64), mask))
        [4, 64, 4, 32, 4, 32, 1]
    """
    return [*weight.shape, *weight.block, *(weight.pruned_block or ()), int(weight.paired)]


def kept_mask(weight: BlockSparse, shape: Sequence[int]) -> BlockMask:
    """Which elements of a dense weight are stored, in its pruned blocks; in those of the storage if the pruned ones are not known.

    Stored blocks of a convolution that are not whole kernels become blocks of one tap.

    Args:
        weight: the kept blocks.
        shape: of the dense weight, ``[rows, ...]``; the columns of the matrix are all axes but the first.

    Example:
        >>> from blockprune.export.packing import kept_mask, pack_weight
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((64, 64), (64, 32)))
        >>> weight = pack_weight(torch.ones(64, 64), mask)
        >>> weight.block, kept_mask(weight, (64, 64)) == mask
        ((16, 32), True)
    """
    keep, (height, width), axes = kept_blocks(weight), weight.block, shape[1:]
    if (mask := _pruned_mask(weight, keep, shape)) is not None:
        return mask
    columns, taps = weight.shape[1], weight.shape[1] // axes[0]
    if (width := min(width, columns)) % taps == 0:
        return BlockMask(keep.reshape(*keep.shape, *[1] * (len(axes) - 1)), BlockGrid(shape, (height, width // taps)))
    keep = expand(keep, BlockGrid((len(keep), columns), (1, width)))  # [block rows, columns]
    return BlockMask(keep.view(len(keep), *axes), BlockGrid(shape, (height, *[1] * len(axes))))


def _pruned_mask(weight: BlockSparse, keep: Tensor, shape: Sequence[int]) -> BlockMask | None:
    """The mask in pruned blocks; None if they are not known, or if one of them is stored in part, because indices were changed."""
    (rows, *axes), block = shape, weight.pruned_block
    if block is None or len(block) != len(shape) or any(b > s for b, s in zip(block, shape, strict=True)):
        return None
    grid, (height, width) = BlockGrid(shape, block), weight.block
    numbers = torch.arange(grid.blocks // grid.size[0], device=keep.device).view(1, *grid.size[1:])
    pruned = expand(numbers, BlockGrid((1, *axes), (1, *block[1:]))).flatten()  # the pruned block of each column
    columns = torch.arange(weight.shape[1], device=keep.device)
    first = torch.full_like(numbers.flatten(), len(columns)).scatter_reduce(0, pruned, columns, "amin")  # column of each pruned block
    of_pruned = keep[torch.arange(grid.size[0], device=keep.device) * block[0] // height][:, first // width]
    # between two starts, rows keep the same columns and columns are kept in the same rows
    starts = torch.arange(rows, device=keep.device)
    starts = starts[(starts % height == 0) | (starts % block[0] == 0)]
    columns = columns[torch.cat((columns[:1] == 0, (pruned.diff() != 0) | (columns[1:] % width == 0)))]
    is_whole = torch.equal(keep[starts // height][:, columns // width], of_pruned[starts // block[0]][:, pruned[columns]])
    return BlockMask(of_pruned.view(grid.size), grid) if is_whole else None


def pack_weight(weight: Tensor, mask: BlockMask) -> BlockSparse:
    """The kept blocks of a weight with two or more axes, as a matrix whose columns are all axes but the first.

    Blocks that are not a rectangle of that matrix, such as single taps of a kernel, are stored as blocks of one column.

    Args:
        weight: dense, ``[rows, ...]``; on its device the result is stored, in the layout of that device.
        mask: which blocks are kept.

    Example:
        >>> from blockprune.export import pack_weight
        >>> mask = bp.BlockMask(torch.tensor([True, False]).view(2, 1, 1, 1), bp.BlockGrid((4, 3, 2, 2), (2,)))
        >>> pack_weight(torch.ones(4, 3, 2, 2), mask).shape
        (4, 12)
    """
    (rows, *axes), (height, *sides), keep = mask.grid.shape, mask.grid.block, mask.keep.to(weight.device)
    matrix, paired = weight.detach().flatten(1), not triton_launch.uses_gpu_layout(weight.device)
    if sides[1:] == axes[1:]:  # a block takes whole kernels
        grid = BlockGrid((rows, matrix.shape[1]), (height, sides[0] * (matrix.shape[1] // axes[0])))
        keep = keep.reshape(grid.size)
    else:
        grid = BlockGrid((rows, matrix.shape[1]), (height, 1))
        keep = expand(keep, BlockGrid((len(keep), *axes), (1, *sides))).flatten(1)  # [block rows, columns]
    return attrs.evolve(pack(matrix, keep, grid, paired=paired), pruned_block=mask.grid.block)


def pack_int8(weight: Tensor, mask: BlockMask | None = None) -> BlockSparse:
    """The kept blocks of a Linear's weight ``[rows, columns]`` in int8, with a scale for each row; without a mask, the whole weight.

    Raises:
        ValueError: a kept weight that is not finite.

    Example:
        >>> from blockprune.export.packing import pack_int8
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((1, 4), (1, 2)))
        >>> sparse = pack_int8(torch.tensor([[1.0, -2.0, 9.0, 9.0]]), mask)
        >>> sparse.values, sparse.scale * 127
        (tensor([  64, -127], dtype=torch.int8), tensor([2.]))
    """
    if mask is None:
        mask = BlockMask(torch.ones(1, 1, dtype=torch.bool, device="cpu"), BlockGrid(weight.shape, weight.shape))
    numbers, scale = quantize_weight(torch.where(expand(mask.keep, mask.grid).to(weight.device), weight, 0))
    return attrs.evolve(pack_weight(numbers, mask), scale=scale)
