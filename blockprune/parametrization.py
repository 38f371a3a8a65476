"""`MaskBlocks`: the torch parametrization that zeroes pruned blocks whenever a weight is read."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.blocks import BlockGrid, expand

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MaskBlocks(nn.Module):
    """Reads a weight with its pruned blocks as zeros; the weight in storage stays dense.

    The mask is a buffer of one bool a block, so it is saved, moved and broadcast with the model, and updating it in
    place needs no recompile. NaN or inf under a pruned block reads as zero.

    Args:
        keep: ``[*grid.size]`` bool, True = kept; copied.
        grid: the blocks.
        order: the parameters of the plain owner in their order, which parametrizing loses.
    """

    keep: Tensor

    def __init__(self, keep: Tensor, grid: BlockGrid, *, order: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("keep", keep.clone())
        self.grid = grid
        self.order = order

    def forward(self, weight: Tensor) -> Tensor:
        return mask_blocks(weight, self.keep if self.keep.device == weight.device else self.keep.to(weight.device), self.grid)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MaskBlocks":
        """Follow the model to another device, but keep the bits: ``to_empty`` and the meta device would lose them."""
        device = fn(self.keep).device
        if device.type != "meta":
            self.keep = self.keep.to(device)
        return self

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to a masked parameter (``layer.weight = w``) stores the dense weight."""
        return weight

    def extra_repr(self) -> str:
        return f"shape={self.grid.shape}, block={self.grid.block}"


def mask_blocks(weight: Tensor, keep: Tensor, grid: BlockGrid) -> Tensor:
    """``weight`` where its block is kept and 0 elsewhere: ``[*grid.shape]``, same dtype, differentiable, whatever the pruned values are.

    Example:
        >>> mask_blocks(torch.tensor([[1.0, float("nan")]]), torch.tensor([[True, False]]), bp.BlockGrid((1, 2), (1, 1)))
        tensor([[1., 0.]])
    """
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu"
    if not plain or torch.compiler.is_compiling():
        shape, mask = _broadcastable(keep, grid)
        return torch.where(mask, weight.reshape(shape), 0).reshape(weight.shape)
    # torch.where has no vector code on a CPU; AND with all ones or all zeros gives the same bits in half the time
    shape, bits = _broadcastable(keep.to(_INTEGER[weight.dtype.itemsize]).neg_(), grid)
    masked: Tensor = _AndBits.apply(weight.reshape(shape), bits)  # type: ignore[no-untyped-call]
    return masked.reshape(weight.shape)


def _broadcastable(keep: Tensor, grid: BlockGrid) -> tuple[list[int], Tensor]:
    """A shape to view the weight in, and a mask that broadcasts to it and repeats only along short innermost blocks."""
    if grid.ragged:
        return list(grid.shape), expand(keep, grid)
    shape: list[int] = []  # [n0, b0, n1, b1, ...]
    mask: list[int] = []
    for n, b in zip(grid.size, grid.block, strict=True):
        shape += [n, b]
        mask += [n, 1]
    last = [0, *[axis for axis, n in enumerate(grid.size) if n > 1]][-1]
    inner = math.prod(grid.block[last:])  # elements in a row of the block that are neighbours in memory
    shape = [*shape[: 2 * last + 1], inner]
    keep = keep.reshape([*mask[: 2 * last + 1], 1])
    if inner < 64:
        keep = keep.expand(*keep.shape[:-1], inner).flatten(-2)
        shape = [*shape[:-2], shape[-2] * inner]
    return shape, keep


class _AndBits(torch.autograd.Function):
    """``weight & bits``, broadcast; a linear map, so its gradient and its tangent are the same map."""

    @staticmethod
    def forward(weight: Tensor, bits: Tensor) -> Tensor:
        return (weight.view(bits.dtype) & bits).view(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _and(grad, ctx.saved_tensors[0]), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _and(tangent, ctx.saved_tensors[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], weight: Tensor, bits: Tensor) -> tuple[Tensor, int]:
        batched = zip((weight, bits), in_dims, strict=True)
        weight, bits = (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in batched)
        return _AndBits.apply(weight, bits), 0  # type: ignore[no-untyped-call]


def _and(x: Tensor, bits: Tensor) -> Tensor:
    if torch._C._functorch.is_legacy_batchedtensor(x):  # torch.autograd.grad(is_grads_batched=True) has no rule for `view`
        return torch.where(bits != 0, x, 0)
    masked: Tensor = _AndBits.apply(x, bits)  # type: ignore[no-untyped-call]
    return masked
