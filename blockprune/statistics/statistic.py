"""What a statistic is: three pure functions, the tensors that they receive, and the sums that they keep."""

import importlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, cast

import attrs
import torch
from torch import Tensor

from blockprune import native
from blockprune.core.precision import at_least_float32
from blockprune.core.types import Param
from blockprune.model.inputs import input_axis
from blockprune.model.parameters import ParameterRef

Sums = Mapping[str, Tensor]  # in float32 or float64; they add up over batches, and by convention "n" is the count to divide by


@attrs.frozen(eq=False)
class Call:
    """One call of a layer, with all batch and position axes flattened into rows.

    Args:
        inputs: the activations that the weight multiplies, one ``[n, k]`` matrix for each group of output rows. Output rows of one group
            multiply the same inputs: a grouped convolution has as many groups as torch says, attention's ``in_proj_weight`` has three
            (query, key and value), and every other layer has one. Statistics of gradients are given none.
        output: what the layer returned, ``[n, outputs]``.
        weights: how much each row counts, ``[n]``, 0 for padding tokens; None counts every row once.
        output_grad: the gradient of the loss with respect to ``output``, ``[n, outputs]``.
        name: the parameter's name.
        batch: the batch that the model runs on.
        index: how many calls of this layer came before in the same forward.
        shared: results that were computed from these inputs, for other layers that are called with the same ones.

    Example:
        >>> bp.statistics.Call([torch.ones(3, 2)], torch.zeros(3, 4), None).output.shape
        torch.Size([3, 4])
    """

    inputs: list[Tensor]
    output: Tensor
    weights: Tensor | None
    output_grad: Tensor | None = None
    name: str = ""
    batch: Any = None
    index: int = 0
    shared: dict[Any, Any] | None = None


@attrs.frozen(eq=False)
class GateDerivatives:
    """Derivatives of one batch's loss with respect to the gates of one parameter.

    A gate is a factor on the weights of one block. Derivatives are taken where all gates are 1.

    Args:
        per_sample: () -> the gradient of each sample's loss, ``[samples, *size]``.
        hessian_grad: () -> the Hessian of the batch's loss times its gradient, ``[*size]``.
        curvature: (probes, seed) -> ``v * (H v)`` of random signs v, ``[probes, *size]``; the signs are the same in every batch.
        flow: () -> the gradient of the summed output of the network of ``|weights|`` on an input of ones, ``[*size]``.
        called: () -> whether the forward called the layer, once a derivative was computed.
        reached: () -> whether a gradient of the loss reaches the gates; if not, their derivatives are 0.

    Example:
        >>> steepest = bp.statistics.Statistic(
        ...     "largest_slope", source="gates", init=lambda ref, param: {"sum": torch.zeros(param.grid.size), "n": torch.zeros(())},
        ...     update=lambda sums, gates: {"sum": sums["sum"] + gates.per_sample().abs().amax(0), "n": sums["n"] + 1},
        ...     compute=lambda sums, ref, param: sums["sum"] / sums["n"])
    """

    per_sample: Callable[[], Tensor]
    hessian_grad: Callable[[], Tensor]
    curvature: Callable[[int, int], Tensor]
    flow: Callable[[], Tensor]
    called: Callable[[], bool] = lambda: True
    reached: Callable[[], bool] = lambda: True


Source = Literal["inputs", "output", "output_grad", "weight_grad", "gates"]


@attrs.frozen(repr=False)
class Statistic:
    """A quantity of each chosen parameter that is added up over batches.

    Args:
        name: its key in ``Param.stats``.
        source: where its numbers come from, which decides what ``update`` is given. "inputs", "output" and "output_grad": a `Call`.
            "weight_grad": the gradient of the batch's loss with respect to the weight, or None if the batch does not use the weight.
            "gates": `GateDerivatives`.
        init: (ref, param) -> sums of zeros in their full shapes.
        update: (sums, what ``source`` gives) -> new sums.
        compute: (sums, ref, param) -> the statistic.
        shared: ``update`` and ``compute`` depend on the sums, inputs and row weights alone. Then layers that are always called with the
            same inputs, such as those of queries, keys and values, share one tensor.
        code: the code that makes it, if it has options, for messages and for printing a `Pipeline`; by default its name.
        made_by: the function and its arguments that make it again in another process, where it has options and is pickled. A statistic
            that is a variable of a module, by its own name, is pickled by that name.

    Example:
        >>> count = bp.statistics.Statistic(
        ...     "calls", source="inputs", init=lambda ref, param: {"n": torch.zeros(())},
        ...     update=lambda sums, call: {"n": sums["n"] + 1}, compute=lambda sums, ref, param: sums["n"])
        >>> data = bp.collect.with_statistics(nn.Linear(2, 2), where=bp.linears((1,)), statistics=[count], batches=[torch.ones(3, 2)])
        >>> data["weight"].stats["calls"]
        tensor(1.)
    """

    name: str
    source: Source
    init: Callable[[ParameterRef, Param], Sums]
    update: Callable[[Sums, Any], Sums]
    compute: Callable[[Sums, ParameterRef, Param], Tensor]
    shared: bool = attrs.field(default=False, kw_only=True)
    code: str | None = attrs.field(default=None, kw_only=True)
    made_by: tuple[Callable[..., "Statistic"], tuple[Any, ...]] | None = attrs.field(default=None, kw_only=True, eq=False)

    def __reduce__(self) -> Any:
        module = getattr(self.update, "__module__", None) or ""
        if getattr(sys.modules.get(module), self.name, None) is self:
            return _by_name, (module, self.name)
        return self.made_by or (partial(Statistic, **{field.name: getattr(self, field.name) for field in attrs.fields(Statistic)}), ())

    def __repr__(self) -> str:
        return self.code or self.name


def _by_name(module: str, name: str) -> Statistic:
    statistic: Statistic = getattr(importlib.import_module(module), name)
    return statistic


def check_statistics(statistics: Any) -> None:
    """Raise unless these are statistics, each with a name of its own.

    Raises:
        TypeError: something else, such as the name of a statistic, or a function that returns one and was not called.
        ValueError: none, or two of the same name.

    Example:
        >>> from blockprune.statistics.statistic import check_statistics
        >>> check_statistics([bp.statistics.input_sq])
    """
    for statistic in [statistics] if isinstance(statistics, (str, Statistic)) or not isinstance(statistics, Iterable) else statistics:
        if isinstance(statistic, str):
            raise TypeError(f"statistics has {statistic!r}, a name; give the statistic itself: [bp.statistics.{statistic}]")
        if not isinstance(statistic, Statistic):
            name = getattr(statistic, "__name__", type(statistic).__name__)
            remedy = f"call it: {name}()" if callable(statistic) else "give some of bp.statistics, such as [bp.statistics.input_sq]"
            raise TypeError(f"statistics has {name}, which is no Statistic; {remedy}")
    if isinstance(statistics, Statistic):
        raise TypeError(f"statistics={statistics!r} is one statistic; give a list: [{statistics!r}]")
    names = [statistic.name for statistic in statistics]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"statistics={names} must hold at least one statistic, and no two of the same name")


def zeros(*size: int, like: Param) -> Tensor:
    """Zeros to add to, in at least float32, on the weight's device."""
    return torch.zeros(size, dtype=torch.promote_types(like.stored.dtype, torch.float32), device=like.stored.device)


def input_groups(ref: ParameterRef, param: Param) -> tuple[int, int]:
    """The number of groups of output rows that multiply the same inputs (see `Call`), and the input features of each group."""
    shape = param.grid.shape
    if input_axis(ref) == 0:
        groups: int = getattr(ref.owner, "groups", 1)
        return groups, shape[0] // groups
    if ref.attr == "in_proj_weight":
        return 3, shape[1]
    return getattr(ref.owner, "groups", 1), math.prod(shape[1:])


def zero_input_counts(ref: ParameterRef, param: Param, ndim: int) -> Tensor:
    """A row count of 0; three of them in ``ndim`` axes for attention's ``in_proj_weight``, as queries and keys may differ in number."""
    return zeros(*([3] + [1] * (ndim - 1) if ref.attr == "in_proj_weight" else []), like=param)


def row_weights(call: Call, x: Tensor) -> Tensor | None:
    """How much each row of ``x`` counts.

    None counts every row once, also where the weights belong to rows of another number: those of keys say nothing about queries.
    """
    return call.weights.to(at_least_float32(x)) if call.weights is not None and len(call.weights) == len(x) else None


def weighted_sum(call: Call, x: Tensor) -> Tensor:
    """[n, k] -> [k]: the weighted sum over rows."""
    weights = row_weights(call, x)
    return at_least_float32(x).sum(0) if weights is None else weights @ at_least_float32(x)


def column_sums(call: Call, x: Tensor, contribution: Callable[[Tensor], Tensor]) -> Tensor:
    """[n, k] -> [k]: the weighted sum of ``contribution(x)`` over rows, in a compiled loop where there is one for it."""
    if len(x) and row_weights(call, x) is None:
        compiled = native.pool_sum(x, (len(x), x.shape[1]), (len(x), 1), contribution)
        if compiled is not None:
            return compiled[0]
    return weighted_sum(call, contribution(at_least_float32(x)))


def _count_rows(call: Call, x: Tensor) -> float | Tensor:
    weights = row_weights(call, x)
    return float(len(x)) if weights is None else weights.sum()


def count_output_rows(call: Call, like: Tensor) -> Tensor:
    """The number of output rows, or the sum of their weights."""
    return torch.as_tensor(_count_rows(call, call.output), dtype=like.dtype, device=like.device)


def count_input_rows(call: Call, like: Tensor) -> Tensor:
    """The number of input rows, in the shape of `zero_input_counts`; a transposed convolution has other numbers of inputs and outputs."""
    counts = [torch.as_tensor(_count_rows(call, x), dtype=like.dtype, device=like.device) for x in call.inputs]
    return torch.stack(counts).view(like.shape) if like.ndim else counts[0]


def shared_by_layers(call: Call, key: str, work: Callable[[Tensor], Tensor]) -> Tensor:
    """``work(inputs)`` of each group of inputs, stacked; computed once for all layers that are called with the same inputs."""
    if call.shared is None or key not in call.shared:
        result = torch.stack([work(x) for x in call.inputs])
        if call.shared is None:
            return result
        call.shared[key] = result
    return cast(Tensor, call.shared[key])
