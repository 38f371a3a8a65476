"""The values that flow between stages, and the signatures of the stages."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blockprune.core.arguments import check_tensor
from blockprune.core.grid import BlockGrid, BlockShape, check_grid
from blockprune.core.sharded_tensor import whole


def in_short(x: Any) -> str:
    """A tensor, or a mapping of tensors, in one line: the values of a few elements, else shape and type.

    Example:
        >>> from blockprune.core.types import in_short
        >>> in_short(torch.ones(2)), in_short({"w": torch.zeros(64, 64)})
        ('tensor([1., 1.])', "{'w': Tensor((64, 64), torch.float32)}")
    """
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{name!r}: {in_short(value)}" for name, value in x.items()) + "}"
    if isinstance(x, Tensor) and x.numel() <= 16:
        return " ".join(repr(x.detach()).split())
    return f"Tensor({tuple(x.shape)}, {x.dtype})" if isinstance(x, Tensor) else repr(x)


Share = Callable[[int, Callable[[slice], Sequence[Tensor]]], Sequence[Tensor]]  # (how many, solve) -> the solutions of all


def solve_all(count: int, solve: Callable[[slice], Sequence[Tensor]]) -> Sequence[Tensor]:
    """Solve all of many systems here; `distributed.share` solves some.

    Example:
        >>> from blockprune.core.types import solve_all
        >>> solve_all(3, lambda own: [torch.arange(3)[own] ** 2])
        [tensor([0, 1, 4])]
    """
    return solve(slice(0, count))


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or b.is_meta:
        return a is b  # no values to compare
    return torch.equal(a, b.to(a.device))


_by_value = attrs.cmp_using(eq=_equal)  # so that `mask == other_mask` is one bool and not a tensor


@attrs.frozen(unsafe_hash=False)
class Param:
    """The data of one parameter: its weight, its blocks, and the collected statistics by name.

    Args:
        weight: ``[*grid.shape]``; a DTensor is gathered when it is read.
        grid: the parameter's shape and its blocks.
        stats: statistics by name, in the shapes that `blockprune.statistics` documents.

    Raises:
        ValueError: ``weight`` of another shape.
        TypeError: no tensor, or no grid.

    Example:
        >>> bp.Param(torch.ones(4, 4), bp.BlockGrid((4, 4), (2, 2))).grid.size
        (2, 2)
    """

    stored: Tensor = attrs.field(alias="weight", eq=_by_value, repr=in_short)  # [*grid.shape], maybe a DTensor
    grid: BlockGrid
    stats: Mapping[str, Tensor] = attrs.field(factory=dict, eq=False, repr=in_short)

    def __attrs_post_init__(self) -> None:
        check_tensor("Param.weight", self.stored)
        check_grid(self.grid)
        if tuple(self.stored.shape) != self.grid.shape:
            raise ValueError(f"Param.weight has shape {tuple(self.stored.shape)}, but {self.grid} needs shape {self.grid.shape}")

    @property
    def weight(self) -> Tensor:
        """The weight, whole. A DTensor is gathered at each read, on all ranks, so that no more than one weight of a model is held whole."""
        return whole(self.stored)


@attrs.frozen(unsafe_hash=False)
class BlockScore:
    """One score per block of a parameter; blocks with low scores are pruned first.

    Args:
        value: floating-point numbers ``[*grid.size]``; a block with -inf is pruned at any sparsity.
        grid: the parameter's shape and its blocks.

    Raises:
        ValueError: ``value`` of another shape.
        TypeError: no tensor, or no grid.

    Example:
        >>> bp.BlockScore(torch.tensor([[1.0, 2.0]]), bp.BlockGrid((2, 4), (2, 2))).value.shape
        torch.Size([1, 2])
    """

    value: Tensor = attrs.field(eq=_by_value, repr=in_short)  # [*grid.size] floating
    grid: BlockGrid

    def __attrs_post_init__(self) -> None:
        _check_shape("BlockScore.value", self.value, self.grid)


@attrs.frozen(unsafe_hash=False)
class BlockMask:
    """Which blocks of a parameter are kept; two masks are equal if their grids and all their blocks are, on any device.

    Args:
        keep: for each block whether it is kept (True) or pruned (False), ``[*grid.size]``.
        grid: the parameter's shape and its blocks.

    Raises:
        ValueError: ``keep`` of another shape.
        TypeError: ``keep`` that is no tensor of bool, or no grid.

    Example:
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> mask == bp.BlockMask(mask.keep.clone(), mask.grid)
        True
    """

    keep: Tensor = attrs.field(eq=_by_value, repr=in_short)  # [*grid.size] bool
    grid: BlockGrid

    def __attrs_post_init__(self) -> None:
        _check_shape("BlockMask.keep", self.keep, self.grid)
        if self.keep.dtype != torch.bool:
            raise TypeError(f"BlockMask.keep must be bool (True = kept), not {self.keep.dtype}; use `keep.bool()` if 1 means kept")


def _check_shape(name: str, value: Tensor, grid: BlockGrid) -> None:
    check_tensor(name, value)
    check_grid(grid)
    if tuple(value.shape) != grid.size:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but {grid} has {grid.size} blocks")


Data = Mapping[str, Param]
Scores = Mapping[str, BlockScore]
Masks = Mapping[str, BlockMask]
Weights = Mapping[str, Tensor]
Sparsity = float | Mapping[str, float]  # the fraction of elements to prune; or such fractions by parameter name or glob pattern

Where = Callable[[str, nn.Module], BlockShape | None]  # (parameter name, its module) -> block, or None to leave it dense
Collect = Callable[[nn.Module], Data]
Metric = Callable[[Data], Scores]
Allocate = Callable[[Scores, Any], Masks]  # (scores, sparsity)
Reconstruct = Callable[[Data, Masks], Weights]
Budget = Callable[[Scores, float], Mapping[str, float]]  # (scores, total sparsity) -> the sparsity of each parameter
Schedule = Callable[[int], float]  # step -> sparsity


def check_prunable(name: str, weight: Tensor) -> None:
    """Check that a weight is a dense floating-point tensor with values.

    Raises:
        TypeError: a sparse, quantized or integer tensor.
        ValueError: a tensor on the meta device.
    """
    what = f"{name}: the weight {tuple(weight.shape)}"
    if weight.layout != torch.strided:
        raise TypeError(f"{what} is sparse ({weight.layout}); prune the dense weight, `.to_dense()`")
    if not weight.is_floating_point() or weight.is_quantized:
        raise TypeError(f"{what} is {weight.dtype}, but blocks are scored in floating point: leave it out with `excluding`, or convert it")
    if weight.device.type == "meta":
        raise ValueError(
            f"{what} is on the meta device, so it has no values; load the weights first, or if accelerate has offloaded them, prune "
            "the folder from which they were loaded: blockprune.hf.prune_checkpoint(source, destination, recipe, sparsity)"
        )


def check_finite(name: str, weight: Tensor) -> None:
    """Check that a weight has neither NaN nor inf.

    Raises:
        ValueError: it has; the message says how many.
    """
    if weight.sum().isfinite():  # one pass is enough for nearly all weights
        return
    chunks = weight.split(max(1, (1 << 20) // weight[0].numel()))
    if count := sum(int((~chunk.isfinite()).sum()) for chunk in chunks):
        raise ValueError(
            f"{name}: the weight {tuple(weight.shape)} has {count} NaN or inf values, which cannot be scored; "
            "repair it or leave it out with `excluding`"
        )


def masks_and_weights(result: Any, what: str) -> tuple[Masks, Weights]:
    """The masks and the new weights in what a pipeline or a recipe returned; ``what`` returned it, in an error message.

    Raises:
        TypeError: it is neither masks nor a result with ``masks`` and ``weights``.

    Example:
        >>> from blockprune.core.types import masks_and_weights
        >>> masks_and_weights({}, "the pipeline")
        ({}, {})
    """
    if isinstance(result, Mapping):
        return result, {}
    try:
        return result.masks, result.weights
    except AttributeError:
        kind = type(result).__name__
        raise TypeError(f"{what} returned a {kind}; it must return masks, or a result with .masks and .weights") from None


def check_masks(masks: Any, what: str = "masks", *, remedy: str = "give result.masks, or bp.read_masks(model)") -> None:
    """Raise unless these are masks by parameter name.

    Args:
        masks: whatever a user gave.
        what: the name of the argument.
        remedy: the end of the error message for something that is no mapping, such as the result of a recipe.

    Raises:
        TypeError: no mapping, or a value that is no `BlockMask`.

    Example:
        >>> from blockprune.core.types import check_masks
        >>> check_masks({"w": bp.BlockMask(torch.tensor([True, False]), bp.BlockGrid((4,), (2,)))})
    """
    _check_values(what, masks, BlockMask, remedy, "BlockMask(keep, grid)")


def check_scores(scores: Any, what: str = "scores", *, ranked: bool = True) -> None:
    """Raise unless these are scores by parameter name.

    Args:
        scores: whatever a user gave.
        what: the name of the argument.
        ranked: whether their values matter; otherwise only their shapes and devices do.

    Raises:
        TypeError: no mapping, such as a metric, a value that is no `BlockScore`, or a tensor that is sparse or of 8 bits.
        ValueError: a tensor on the meta device.

    Example:
        >>> from blockprune.core.types import check_scores
        >>> check_scores({"w": bp.BlockScore(torch.tensor([1.0, 2.0]), bp.BlockGrid((4,), (2,)))})
    """
    _check_values(
        what, scores, BlockScore, f"give the scores that a metric returns, such as {what}=bp.metric.l1(data)", "BlockScore(value, grid)"
    )
    for name, score in scores.items() if ranked else ():
        value = score.value
        what_value = f"{name}: {what} {tuple(value.shape)}"
        if value.layout != torch.strided:
            raise TypeError(f"{what_value} are sparse ({value.layout}) and cannot be ranked; give a dense tensor: score.value.to_dense()")
        if value.is_floating_point() and value.itemsize < 2:
            raise TypeError(f"{what_value} are {value.dtype}, which torch cannot rank; give score.value.float()")
        if value.is_meta:
            raise ValueError(f"{what_value} are on the meta device, so they have no values; load the weights first")


def check_data(data: Any) -> None:
    """Raise unless this is data by parameter name. The values of a mapping that reads them when they are asked for are not looked at.

    Raises:
        TypeError: no mapping, such as a model; or a dict with a value that is no `Param`, such as scores.

    Example:
        >>> from blockprune.core.types import check_data
        >>> check_data({"w": bp.Param(torch.ones(4), bp.BlockGrid((4,), (2,)))})
    """
    if not isinstance(data, Mapping) or isinstance(data, dict):
        _check_values("data", data, Param, "collect it from a model: data = bp.collect.weights(model, where=...)", "Param(weight, grid)")


def _check_values(what: str, values: Any, kind: type, remedy: str, constructor: str) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"{what} is a {type(values).__name__}, not a mapping from parameter names to {kind.__name__}; {remedy}")
    for name, value in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{what}[{name!r}] is a {type(value).__name__}, not a {kind.__name__}; build one: {constructor}")
