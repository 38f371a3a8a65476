"""The triple that a statistic is, what it is given, and what sums share."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from blockprune import native
from blockprune.layers import input_axis
from blockprune.names import Slot
from blockprune.types import Param

Sums = Mapping[str, Tensor]  # float32 or wider; what is added up, and by convention "n", what to divide by


@attrs.frozen(eq=False)
class Call:
    """One call of a layer: the rows that multiply the weight and the output, flattened over batch and positions.

    ``inputs`` has one ``[n, k]`` matrix for each group of output rows (one but for grouped convolutions and attention's in_proj);
    ``weights`` is how much each row counts, None = 1 (padding masks).

    Example:
        >>> bp.statistics.Call([torch.ones(3, 2)], torch.zeros(3, 4), None).output.shape
        torch.Size([3, 4])
    """

    inputs: list[Tensor]
    output: Tensor  # [n, outputs]
    weights: Tensor | None  # [n]
    output_grad: Tensor | None = None  # [n, outputs], of the summed loss
    name: str = ""  # of the parameter
    known: dict[str, Tensor] | None = None  # what was worked out from these inputs, for layers that are given the same ones


@attrs.frozen(eq=False)
class Gates:
    """Derivatives of one batch's loss with respect to one gate a block (a factor on its weights, at 1), for one parameter.

    Example:
        >>> curved = bp.statistics.Statistic(
        ...     "largest_slope", sees="gates", init=lambda slot, param: {"sum": torch.zeros(param.grid.size), "n": torch.zeros(())},
        ...     update=lambda sums, gates: {"sum": sums["sum"] + gates.per_sample().abs().amax(0), "n": sums["n"] + 1},
        ...     finalize=lambda sums, slot, param: sums["sum"] / sums["n"])
    """

    per_sample: Callable[[], Tensor]  # [samples, *size] gradient of each sample's loss
    hg: Callable[[], Tensor]  # [*size] Hessian of the batch's loss times its gradient
    curvature: Callable[[int, int], Tensor]  # (probes, seed) -> [probes, *size] v * (H v), v = +-1, the same in every batch
    flow: Callable[[], Tensor]  # [*size] gradient of the summed output of the network of |weights| on ones
    called: Callable[[], bool] = lambda: True  # whether the forward reached the layer, once a derivative was taken


Sees = Literal["inputs", "output", "output_grad", "weight_grad", "gates"]


@attrs.frozen
class Statistic:
    """A sum folded over batches.

    Args:
        name: its key in ``Param.stats``.
        sees: what ``update`` is given: a `Call` ("inputs", "output", "output_grad"), the gradient of a batch's loss with respect to the
            weight or None ("weight_grad"), or `Gates` ("gates").
        init: (slot, param) -> zero sums, of full shape.
        update: (sums, seen) -> sums.
        finalize: (sums, slot, param) -> the statistic.

    Example:
        >>> count = bp.statistics.Statistic(
        ...     "calls", sees="inputs", init=lambda slot, param: {"n": torch.zeros(())},
        ...     update=lambda sums, call: {"n": sums["n"] + 1}, finalize=lambda sums, slot, param: sums["n"])
        >>> data = bp.collect.with_statistics(nn.Linear(2, 2), where=bp.linears((1,)), statistics=[count], batches=[torch.ones(3, 2)])
        >>> data["weight"].stats["calls"]
        tensor(1.)
    """

    name: str
    sees: Sees
    init: Callable[[Slot, Param], Sums]
    update: Callable[[Sums, Any], Sums]
    finalize: Callable[[Sums, Slot, Param], Tensor]


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def features(slot: Slot, param: Param) -> tuple[int, int]:
    """Groups of output rows, and input features of each."""
    shape = param.grid.shape
    if input_axis(slot) == 0:
        groups: int = getattr(slot.owner, "groups", 1)
        return groups, shape[0] // groups
    if slot.attr == "in_proj_weight":
        return 3, shape[1]
    return getattr(slot.owner, "groups", 1), param.weight[0].numel()


def zeros(*size: int, like: Param) -> Tensor:
    return torch.zeros(size, dtype=torch.promote_types(like.weight.dtype, torch.float32), device=like.weight.device)


def row_weights(call: Call, x: Tensor) -> Tensor | None:
    """How much each row of ``x`` counts; None = 1, also where the weights are of other rows (of keys, say, and these are queries)."""
    return call.weights.to(wide(x)) if call.weights is not None and len(call.weights) == len(x) else None


def total(call: Call, x: Tensor) -> Tensor:
    """[n, k] -> [k]: the weighted sum over rows."""
    weights = row_weights(call, x)
    return wide(x).sum(0) if weights is None else weights @ wide(x)


def column_sums(call: Call, x: Tensor, contribution: Callable[[Tensor], Tensor]) -> Tensor:
    """[n, k] -> [k]: the weighted sum of contributions over rows, in one pass where a compiled loop has it."""
    if (
        len(x)
        and row_weights(call, x) is None
        and (found := native.pool_sum(x, (len(x), x.shape[1]), (len(x), 1), contribution)) is not None
    ):
        return found[0]
    return total(call, contribution(wide(x)))


def _counted(call: Call, x: Tensor) -> float | Tensor:
    weights = row_weights(call, x)
    return float(len(x)) if weights is None else weights.sum()


def output_rows(call: Call, like: Tensor) -> Tensor:
    return torch.as_tensor(_counted(call, call.output)).to(like)


def input_rows(call: Call, like: Tensor) -> Tensor:
    """As many as inputs, not outputs (transposed convolutions); of attention's in_proj, those of query, key and value."""
    counts = [torch.as_tensor(_counted(call, x)).to(like) for x in call.inputs]
    return torch.stack(counts).view(like.shape) if like.ndim else counts[0]


def input_count(slot: Slot, param: Param, ndim: int) -> Tensor:
    return zeros(*([3] + [1] * (ndim - 1) if slot.attr == "in_proj_weight" else []), like=param)


def once(call: Call, name: str, work: Callable[[Tensor], Tensor]) -> Tensor:
    """What a statistic makes of each group of inputs, stacked: once for all layers that are given the same ones."""
    if call.known is None or name not in call.known:
        found = torch.stack([work(x) for x in call.inputs])
        if call.known is None:
            return found
        call.known[name] = found
    return call.known[name]
