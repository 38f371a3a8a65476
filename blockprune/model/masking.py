"""The arithmetic of a mask: zeros in the pruned blocks of a weight (`mask_blocks`), and gradients that reach them (`straight_through`)."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.core._compat import is_legacy_batched
from blockprune.core.grid import BlockGrid, expand
from blockprune.core.sharded_tensor import is_sharded, sharded_mask

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def mask_blocks(weight: Tensor, keep: Tensor, grid: BlockGrid) -> Tensor:
    """The weight with zeros in its pruned blocks: ``[*grid.shape]``, same dtype, differentiable. Pruned values may be NaN or inf.

    Of a DTensor each rank masks its own shard; a partial sum is summed up first.

    Example:
        >>> mask_blocks(torch.tensor([[1.0, float("nan")]]), torch.tensor([[True, False]]), bp.BlockGrid((1, 2), (1, 1)))
        tensor([[1., 0.]])
    """
    if is_sharded(weight):
        weight = _summed(weight)
        return torch.where(sharded_mask(keep, grid, weight), weight, 0)
    is_plain_cpu_tensor = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu"
    if not is_plain_cpu_tensor or torch.compiler.is_compiling():
        shape, mask = broadcastable(keep, grid)
        return torch.where(mask, weight.reshape(shape), 0).reshape(weight.shape)
    # torch.where is not vectorized on a CPU; a bitwise AND with all ones or all zeros gives the same bits in half the time
    shape, bits = broadcastable(keep.to(_INTEGER_OF_SIZE[weight.dtype.itemsize]).neg_(), grid)
    masked: Tensor = _AndBits.apply(weight.reshape(shape), bits)  # type: ignore[no-untyped-call]
    return masked.reshape(weight.shape)


@contextlib.contextmanager
def zeros_in_pruned_blocks(masked: Sequence[tuple[Tensor, Tensor, BlockGrid]]) -> Iterator[None]:
    """Write zeros into the pruned blocks of weights; they get their values back if the code inside raises an error.

    Args:
        masked: weights ``[*grid.shape]``, which blocks they keep ``[*grid.size]``, and their blocks.

    Example:
        >>> from blockprune.model.masking import zeros_in_pruned_blocks
        >>> weight = torch.ones(1, 2)
        >>> with zeros_in_pruned_blocks([(weight, torch.tensor([[True, False]]), bp.BlockGrid((1, 2), (1, 1)))]):
        ...     pass
        >>> weight
        tensor([[1., 0.]])
    """
    former: list[tuple[Tensor, Tensor, BlockGrid, Tensor]] = []  # the last are the values in pruned blocks
    with torch.no_grad():
        try:
            for weight, mask, grid in masked:
                keep = mask.to(weight.device, copy=True)
                former.append((weight, keep, grid, weight[~expand(keep, grid)]))
                weight[~expand(keep, grid)] = 0
            yield
        except BaseException:
            for weight, keep, grid, values in reversed(former):
                weight[~expand(keep, grid)] = values
            raise


def _summed(x: Any) -> Any:
    """A DTensor of which no rank holds a partial sum."""
    from torch.distributed.tensor import Replicate  # noqa: PLC0415 (slow, and there is a DTensor already)

    placements = [Replicate() if p.is_partial() else p for p in x.placements]
    return x if placements == list(x.placements) else x.redistribute(placements=placements)


def straight_through(weight: Tensor, keep: Tensor, reached: Tensor, grid: BlockGrid, *, decay: float) -> Tensor:
    """`mask_blocks`, whose gradient also passes to the pruned blocks of ``reached``, plus ``decay`` times the values of those blocks.

    Source: SR-STE, Zhou et al. 2102.04010; without a decay it is the straight-through estimator of Bengio et al. 1308.3432.

    Args:
        weight: ``[*grid.shape]``.
        keep: ``[*grid.size]`` bool, True = kept.
        reached: ``[*grid.size]`` bool, True = the gradient passes; it passes to kept blocks in any case.
        grid: the blocks.
        decay: what is multiplied with the pruned values and added to their gradient.

    Example:
        >>> from blockprune.model.masking import straight_through
        >>> w, keep, reached = torch.ones(1, 2, requires_grad=True), torch.tensor([[True, False]]), torch.tensor([[True, True]])
        >>> straight_through(w, keep, reached, bp.BlockGrid((1, 2), (1, 1)), decay=0.5).sum().backward()
        >>> w.grad
        tensor([[1.0000, 1.5000]])
    """
    function = _CompiledStraightThrough if torch.compiler.is_compiling() else _StraightThrough
    # copies, because the mask may change before the backward
    masked: Tensor = function.apply(weight, keep.clone(), reached.clone(), grid, decay)  # type: ignore[no-untyped-call]
    return masked


class _CompiledStraightThrough(torch.autograd.Function):
    """`mask_blocks`, with another gradient; compiled code accepts no function with a jvp."""

    @staticmethod
    def forward(weight: Tensor, keep: Tensor, reached: Tensor, grid: BlockGrid, decay: float) -> Tensor:
        return mask_blocks(weight, keep, grid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, BlockGrid, float], output: Tensor) -> None:
        weight, keep, reached, ctx.grid, ctx.decay = inputs
        ctx.save_for_backward(keep, reached, *([weight] if ctx.decay else []))
        ctx.save_for_forward(keep, reached)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        keep, reached, *weight = ctx.saved_tensors
        passed = _masked(grad, keep | reached, ctx.grid)
        if weight:
            passed = passed + ctx.decay * _masked(weight[0], reached & ~keep, ctx.grid)
        return passed, None, None, None, None


class _StraightThrough(_CompiledStraightThrough):
    """The same for `torch.func` and forward-mode differentiation, too."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        keep, reached = ctx.saved_tensors[:2]
        return _masked(tangent, keep | reached, ctx.grid)


def _masked(x: Tensor, keep: Tensor, grid: BlockGrid) -> Tensor:
    """`mask_blocks`, also of the batched tensors of ``torch.autograd.grad(is_grads_batched=True)``."""
    if not torch.compiler.is_compiling() and is_legacy_batched(x):
        return torch.where(expand(keep, grid), x, 0)
    return mask_blocks(x, keep, grid)


def broadcastable(keep: Tensor, grid: BlockGrid) -> tuple[list[int], Tensor]:
    """A shape to view the weight in, and the values of the blocks so that they broadcast to it; they repeat along short contiguous runs.

    Example:
        >>> from blockprune.model.masking import broadcastable
        >>> broadcastable(torch.tensor([[1, 2]]), bp.BlockGrid((2, 4), (2, 2)))
        ([1, 2, 4], tensor([[[1, 1, 2, 2]]]))
    """
    if grid.ragged:
        return list(grid.shape), expand(keep, grid)
    axes = list(zip(grid.size, grid.block, strict=True))
    last = [0, *[axis for axis, n in enumerate(grid.size) if n > 1]][-1]  # the last axis that is divided into blocks
    run = math.prod(grid.block[last:])  # elements of a block that are contiguous in memory
    shape = [*(length for n, b in axes[:last] for length in (n, b)), grid.size[last], run]  # [n0, b0, n1, b1, ..., n, run]
    keep = keep.reshape([*(length for n, _ in axes[:last] for length in (n, 1)), grid.size[last], 1])
    if run < 64:
        keep = keep.expand(*keep.shape[:-1], run).flatten(-2)
        shape = [*shape[:-2], shape[-2] * run]
    return shape, keep


class _AndBits(torch.autograd.Function):
    """``weight & bits`` with broadcasting: a linear map, so backward and jvp apply the same map."""

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
    if is_legacy_batched(x):  # torch.autograd.grad(is_grads_batched=True) has no rule for `view`
        return torch.where(bits != 0, x, 0)
    masked: Tensor = _AndBits.apply(x, bits)  # type: ignore[no-untyped-call]
    return masked
