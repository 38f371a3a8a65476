"""The values that flow between stages, and the signatures of the stages."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blockprune.blocks import BlockGrid, BlockShape

_same = attrs.cmp_using(eq=torch.equal)  # records compare by value: `masks == other` is one bool


@attrs.frozen(unsafe_hash=False)
class Param:
    """What was seen of one parameter: its weight, its blocks, and statistics by name (empty when none were collected).

    Example:
        >>> bp.Param(torch.ones(4, 4), bp.BlockGrid((4, 4), (2, 2))).grid.size
        (2, 2)
    """

    weight: Tensor = attrs.field(eq=_same)  # [*grid.shape]
    grid: BlockGrid
    stats: Mapping[str, Tensor] = attrs.field(factory=dict, eq=False)


@attrs.frozen(unsafe_hash=False)
class BlockScore:
    """One number a block, higher = keep; -inf marks a block that is pruned at any sparsity.

    Example:
        >>> bp.BlockScore(torch.tensor([[1.0, 2.0]]), bp.BlockGrid((2, 4), (2, 2))).value.shape
        torch.Size([1, 2])
    """

    value: Tensor = attrs.field(eq=_same)  # [*grid.size] floating
    grid: BlockGrid

    def __attrs_post_init__(self) -> None:
        _check("BlockScore.value", self.value, self.grid)


@attrs.frozen(unsafe_hash=False)
class BlockMask:
    """Which blocks are kept (True) and which are pruned (False); two masks are equal when grid and blocks are.

    Example:
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> mask == bp.BlockMask(mask.keep.clone(), mask.grid)
        True
    """

    keep: Tensor = attrs.field(eq=_same)  # [*grid.size] bool
    grid: BlockGrid

    def __attrs_post_init__(self) -> None:
        _check("BlockMask.keep", self.keep, self.grid)
        if self.keep.dtype != torch.bool:
            raise TypeError(f"BlockMask.keep must be bool (True = kept), not {self.keep.dtype}; use `keep.bool()` if 1 means kept")


def _check(name: str, value: Tensor, grid: BlockGrid) -> None:
    if tuple(value.shape) != grid.size:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but {grid} has {grid.size} blocks")


Data = Mapping[str, Param]
Scores = Mapping[str, BlockScore]
Masks = Mapping[str, BlockMask]
Weights = Mapping[str, Tensor]
Sparsity = float | Mapping[str, float]  # fraction of elements removed; a mapping is by parameter name or glob pattern

Where = Callable[[str, nn.Module], BlockShape | None]  # (parameter name, owner) -> block, or None to leave it out
Collect = Callable[[nn.Module], Data]
Metric = Callable[[Data], Scores]
Allocate = Callable[[Scores, Any], Masks]  # (scores, sparsity)
Reconstruct = Callable[[Data, Masks], Weights]
Distribute = Callable[[Scores, float], Mapping[str, float]]  # one sparsity for all -> one for each parameter
Schedule = Callable[[int], float]  # step -> sparsity


def check_kind(name: str, weight: Tensor) -> None:
    """Raise unless a weight is a dense floating tensor that holds numbers."""
    here = f"{name}: the weight {tuple(weight.shape)}"
    if weight.layout != torch.strided:
        raise TypeError(f"{here} is sparse ({weight.layout}); prune the dense weight, `.to_dense()`")
    if not weight.is_floating_point() or weight.is_quantized:
        raise TypeError(f"{here} is {weight.dtype}; blocks are scored in floating point: leave it out with `excluding`, or convert it")
    if weight.device.type == "meta":
        raise ValueError(f"{here} is on the meta device and has no numbers to look at; load the weights first")


def check_finite(name: str, weight: Tensor) -> None:
    """Raise if a weight has NaN or inf: one read, and a second only when something may be wrong."""
    if weight.sum().isfinite():
        return
    if bad := sum(int((~rows.isfinite()).sum()) for rows in weight.split(max(1, (1 << 20) // weight[0].numel()))):
        raise ValueError(
            f"{name}: the weight {tuple(weight.shape)} has {bad} NaN or inf values, which no score can rank; "
            "repair it or leave it out with `excluding`"
        )
