"""The stored blocks of a layer: from its weight and mask, in the type of the weight or in int8, and from the tensors of a state dict."""

import attrs
import torch
from torch import Tensor

from blockprune.core.grid import BlockGrid, expand
from blockprune.core.types import BlockMask
from blockprune.export import triton_launch
from blockprune.export.format import BlockSparse, pack, validate
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
    if layout.shape != (5,) or layout.dtype != torch.int64 or layout.is_meta:
        raise ValueError(f"layout is {layout.dtype} of shape {tuple(layout.shape)} on {layout.device} and must be 5 numbers of int64")
    rows, columns, height, width, paired = layout.tolist()
    if paired not in (0, 1):
        raise ValueError(f"layout is {layout.tolist()}: it must end in 1 (CPU layout) or 0 (GPU layout); it is not what was exported")
    weight = BlockSparse(values, crow, col, (rows, columns), (height, width), bool(paired), scale)
    validate(weight)
    return weight


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
        taps = matrix.shape[1] // axes[0]
        grid = BlockGrid((rows, matrix.shape[1]), (height, sides[0] * taps))
        return pack(matrix, keep.reshape(grid.size), grid, paired=paired)
    keep_columns = expand(keep, BlockGrid((len(keep), *axes), (1, *sides))).flatten(1)  # [block rows, columns]
    return pack(matrix, keep_columns, BlockGrid((rows, matrix.shape[1]), (height, 1)), paired=paired)


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
        mask = BlockMask(torch.ones(1, 1, dtype=torch.bool), BlockGrid(weight.shape, weight.shape))
    numbers, scale = quantize_weight(torch.where(expand(mask.keep, mask.grid).to(weight.device), weight, 0))
    return attrs.evolve(pack_weight(numbers, mask), scale=scale)
