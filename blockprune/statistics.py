"""What can be learnt of a parameter from data, each a triple of pure functions: init, update, finalize.

Sums add up (over batches, folds and processes); only ``finalize`` divides. Write your own in a notebook cell: a `Statistic` is a value.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from blockprune import native
from blockprune.layers import along_weight, input_axis
from blockprune.names import Slot
from blockprune.types import Param

WIDE = 1024  # inputs from which on half of a symmetric product is worth leaving out
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


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _features(slot: Slot, param: Param) -> tuple[int, int]:
    """Groups of output rows, and input features of each."""
    shape = param.grid.shape
    if input_axis(slot) == 0:
        groups: int = getattr(slot.owner, "groups", 1)
        return groups, shape[0] // groups
    if slot.attr == "in_proj_weight":
        return 3, shape[1]
    return getattr(slot.owner, "groups", 1), param.weight[0].numel()


def _zeros(*size: int, like: Param) -> Tensor:
    return torch.zeros(size, dtype=torch.promote_types(like.weight.dtype, torch.float32), device=like.weight.device)


def _weights(call: Call, x: Tensor) -> Tensor | None:
    """How much each row of ``x`` counts; None = 1, also where the weights are of other rows (of keys, say, and these are queries)."""
    return call.weights.to(_wide(x)) if call.weights is not None and len(call.weights) == len(x) else None


def _total(call: Call, x: Tensor) -> Tensor:
    """[n, k] -> [k]: the weighted sum over rows."""
    weights = _weights(call, x)
    return _wide(x).sum(0) if weights is None else weights @ _wide(x)


def _column_sums(call: Call, x: Tensor, contribution: Callable[[Tensor], Tensor]) -> Tensor:
    """[n, k] -> [k]: the weighted sum of contributions over rows, in one pass where a compiled loop has it."""
    if len(x) and _weights(call, x) is None and (found := native.pool_sum(x, (len(x), x.shape[1]), (len(x), 1), contribution)) is not None:
        return found[0]
    return _total(call, contribution(_wide(x)))


def _counted(call: Call, x: Tensor) -> float | Tensor:
    weights = _weights(call, x)
    return float(len(x)) if weights is None else weights.sum()


def _rows(call: Call, like: Tensor) -> Tensor:
    return torch.as_tensor(_counted(call, call.output)).to(like)


def _input_rows(call: Call, like: Tensor) -> Tensor:
    """As many as inputs, not outputs (transposed convolutions); of attention's in_proj, those of query, key and value."""
    counts = [torch.as_tensor(_counted(call, x)).to(like) for x in call.inputs]
    return torch.stack(counts).view(like.shape) if like.ndim else counts[0]


def _input_count(slot: Slot, param: Param, ndim: int) -> Tensor:
    return _zeros(*([3] + [1] * (ndim - 1) if slot.attr == "in_proj_weight" else []), like=param)


def _per_feature(name: str, contribution: Callable[[Tensor], Tensor]) -> Statistic:
    def init(slot: Slot, param: Param) -> Sums:
        return {"sum": _zeros(*_features(slot, param), like=param), "n": _input_count(slot, param, 2)}

    def update(sums: Sums, call: Call) -> Sums:
        batch = _once(call, name, lambda x: _column_sums(call, x, contribution))  # [groups, k]
        return {"sum": sums["sum"] + batch, "n": sums["n"] + _input_rows(call, sums["n"])}

    def finalize(sums: Sums, slot: Slot, param: Param) -> Tensor:
        return along_weight(sums["sum"] / sums["n"], param.grid.shape, input_axis(slot))

    return Statistic(name, "inputs", init, update, finalize)


input_sq = _per_feature("input_sq", torch.square)
"""Mean square of each input feature, in a shape that broadcasts to the weight (Wanda's ||X||_2^2 / n, Sun et al. 2306.11695)."""

input_mean = _per_feature("input_mean", lambda x: x)
"""Mean of each input feature, in a shape that broadcasts to the weight."""


def _gram_init(slot: Slot, param: Param) -> Sums:
    if input_axis(slot) == 0:
        raise NotImplementedError(f"{slot.name}: input_gram is of weights whose input lies along axis 1; use input_sq for this one")
    groups, k = _features(slot, param)
    return {"sum": _zeros(groups, k, k, like=param), "n": _input_count(slot, param, 3)}


def _product(x: Tensor, weights: Tensor | None) -> Tensor:
    """[n, k] -> [k, k]; of a wide one only what lies on and above the diagonal is multiplied."""
    scaled = x if weights is None else x * weights[:, None]
    k = x.shape[1]
    if k < WIDE:
        return x.mT @ scaled
    found = x.new_empty(k, k)
    for i in range(0, k, panel := -(-k // 6)):
        torch.mm(x[:, i : i + panel].mT, scaled[:, i:], out=found[i : i + panel, i:])
        found[i + panel :, i : i + panel] = found[i : i + panel, i + panel :].mT
    return found


def _once(call: Call, name: str, work: Callable[[Tensor], Tensor]) -> Tensor:
    """What a statistic makes of each group of inputs, stacked: once for all layers that are given the same ones."""
    if call.known is None or name not in call.known:
        found = torch.stack([work(x) for x in call.inputs])
        if call.known is None:
            return found
        call.known[name] = found
    return call.known[name]


def _gram_update(sums: Sums, call: Call) -> Sums:
    batch = _once(call, "products", lambda x: _product(_wide(x), _weights(call, x)))
    return {"sum": sums["sum"] + batch, "n": sums["n"] + _input_rows(call, sums["n"])}


input_gram = Statistic("input_gram", "inputs", _gram_init, _gram_update, lambda sums, slot, param: sums["sum"] / sums["n"])
"""X^T X / n, ``[groups, k, k]`` over the flattened input features (channels * taps of a convolution): the layer's Hessian."""


def of_half(statistic: Statistic, half: Literal[0, 1], *, name: str = "") -> Statistic:
    """A statistic of the first or second half of each batch: `sequential` runs dense inputs in front of those of the repaired model.

    Raises:
        NotImplementedError: a statistic that needs gradients.

    Example:
        >>> bp.statistics.of_half(bp.statistics.input_mean, 0, name="target_mean").name
        'target_mean'
    """
    if statistic.sees not in ("inputs", "output"):
        raise NotImplementedError(f"{statistic.name} needs gradients, which halves of a batch do not have")
    return attrs.evolve(statistic, name=name or statistic.name, update=lambda sums, call: statistic.update(sums, _half(call, half)))


def _half(call: Call, half: int) -> Call:
    weights = None if call.weights is None else call.weights.chunk(2)[half]
    return Call([x.chunk(2)[half] for x in call.inputs], call.output.chunk(2)[half], weights)


def _cross_update(sums: Sums, call: Call) -> Sums:
    first = _half(call, 0)

    def cross(x: Tensor) -> Tensor:
        dense, repaired = _wide(x).chunk(2)
        weights = _weights(first, dense)
        return dense.mT @ (repaired if weights is None else repaired * weights[:, None])

    return {"sum": sums["sum"] + torch.stack([cross(x) for x in call.inputs]), "n": sums["n"] + _input_rows(first, sums["n"])}


input_cross = Statistic("input_cross", "inputs", _gram_init, _cross_update, lambda sums, slot, param: sums["sum"] / sums["n"])
"""X^T Y / n, ``[groups, k, k]``: X the first half of each batch, the inputs of the dense layer, Y the second, those of the repaired one.
With it `reconstruct.least_squares` and `metric.obs` aim at the dense layer's outputs on dense inputs."""


def _per_output(name: str, contribution: Callable[[Tensor], Tensor], of: Literal["output", "output_grad"] = "output") -> Statistic:
    def init(slot: Slot, param: Param) -> Sums:
        if slot.attr not in ("weight",):
            raise NotImplementedError(
                f"{slot.name}: {name} is of a layer's outputs, which are not those of {slot.attr!r}; use another statistic"
            )
        return {"sum": _zeros(_outputs(slot, param), like=param), "n": _zeros(like=param)}

    def update(sums: Sums, call: Call) -> Sums:
        seen = call.output if of == "output" else call.output_grad
        assert seen is not None
        return {"sum": sums["sum"] + _total(call, contribution(_wide(seen))), "n": sums["n"] + _rows(call, sums["n"])}

    def finalize(sums: Sums, slot: Slot, param: Param) -> Tensor:
        mean = sums["sum"] / sums["n"]
        if input_axis(slot) == 0:  # outputs lie along axis 1
            groups = getattr(slot.owner, "groups", 1)
            mean = mean.view(groups, -1) if groups == 1 else mean.view(groups, -1).repeat_interleave(param.grid.shape[0] // groups, dim=0)
            return mean.view(*mean.shape, *[1] * (param.weight.ndim - 2))
        return mean.view(-1, *[1] * (param.weight.ndim - 1))

    return Statistic(name, of, init, update, finalize)


def _outputs(slot: Slot, param: Param) -> int:
    return param.grid.shape[input_axis(slot) == 0] * (getattr(slot.owner, "groups", 1) if input_axis(slot) == 0 else 1)


output_sq = _per_output("output_sq", torch.square)
"""Mean square of each output of the layer, ``[outputs, 1, ...]``."""

output_mean = _per_output("output_mean", lambda x: x)
"""Mean of each output of the layer, ``[outputs, 1, ...]``."""

output_grad_sq = _per_output("output_grad_sq", torch.square, of="output_grad")
"""Mean square of the summed loss's gradient with respect to each output: the diagonal of K-FAC's G (Martens & Grosse 1503.05671)."""


def _grad_gram_init(slot: Slot, param: Param) -> Sums:
    if input_axis(slot) == 0 or slot.attr != "weight":
        raise NotImplementedError(f"{slot.name}: output_grad_gram is of outputs along axis 0 of a weight; use gate_fisher for this one")
    bands, height = param.grid.size[0], param.grid.block[0]
    return {"sum": _zeros(bands, height, height, like=param), "n": _zeros(like=param)}


def _grad_gram_update(sums: Sums, call: Call) -> Sums:
    assert call.output_grad is not None
    bands, height, _ = sums["sum"].shape
    g = _wide(call.output_grad)  # [n, outputs]
    g = F.pad(g, (0, bands * height - g.shape[1])).unflatten(1, (bands, height)).movedim(1, 0)  # [bands, n, height]
    weights = _weights(call, call.output)
    weighed = g if weights is None else g * weights[:, None]
    return {"sum": sums["sum"] + g.mT @ weighed, "n": sums["n"] + _rows(call, sums["n"])}


output_grad_gram = Statistic(
    "output_grad_gram", "output_grad", _grad_gram_init, _grad_gram_update, lambda sums, slot, param: sums["sum"] / sums["n"]
)
"""Second moments of the summed loss's gradient with respect to the outputs that share a row of blocks, ``[rows of blocks, M, M]``:
K-FAC's G within a band (Martens & Grosse 1503.05671; LLM Surgeon 2312.17244)."""


def _layer_bias(slot: Slot, param: Param) -> Tensor:
    found = getattr(slot.owner, slot.attr.removesuffix("weight") + "bias", None)
    return found.detach().clone() if isinstance(found, Tensor) else param.weight.new_empty(0)


def _bias_init(slot: Slot, param: Param) -> Sums:
    if input_axis(slot) == 0:
        raise NotImplementedError(f"{slot.name}: bias is of layers whose outputs lie along axis 0; leave this one out with `excluding`")
    return {}


bias = Statistic("bias", "inputs", _bias_init, lambda sums, call: sums, lambda sums, slot, param: _layer_bias(slot, param))
"""The layer's bias as it is, empty where there is none: with ``input_mean``, what `reconstruct` needs to repair it."""


def activation(name: str, function: Callable[[Tensor], Tensor] = F.relu) -> Statistic:
    """Mean of ``function(output)`` of each output, `mean_activation` with ReLU (Molchanov et al. 1611.06440, eq. 4).

    Example:
        >>> bp.statistics.activation("mean_activation").name
        'mean_activation'
    """
    return _per_output(name, function)


mean_activation = activation("mean_activation")
"""Mean of each output behind a ReLU (Molchanov et al. 1611.06440)."""

apoz = activation("apoz", lambda x: torch.where(x.isnan(), x, (x <= 0).to(x.dtype)))
"""Average percentage of zeros of each output behind a ReLU (Hu et al. 1607.03250, eq. 1)."""


def _of_weight(name: str, contribution: Callable[[Tensor], Tensor]) -> Statistic:
    def init(slot: Slot, param: Param) -> Sums:
        return {"sum": _zeros(*param.grid.shape, like=param), "n": _zeros(like=param), "reached": _zeros(like=param)}

    def update(sums: Sums, grad: Tensor | None) -> Sums:
        if grad is None:  # a batch that does not reach the weight counts, with a gradient of 0
            return {**sums, "n": sums["n"] + 1}
        return {"sum": sums["sum"] + contribution(_wide(grad)), "n": sums["n"] + 1, "reached": sums["reached"] + 1}

    return Statistic(name, "weight_grad", init, update, lambda sums, slot, param: sums["sum"] / sums["n"])


weight_grad = _of_weight("weight_grad", lambda grad: grad)
"""Mean over batches of the gradient of the batch's loss with respect to the weight (first-order Taylor)."""

weight_grad_sq = _of_weight("weight_grad_sq", torch.square)
"""Mean over batches of the squared gradient with respect to the weight."""


def _of_gates(name: str, contribution: Callable[[Gates], Tensor]) -> Statistic:
    """The mean of ``contribution(gates)`` ``[samples, *size]`` over samples."""

    def update(sums: Sums, gates: Gates) -> Sums:
        batch = _wide(contribution(gates))
        return {"sum": sums["sum"] + batch.sum(0), "n": sums["n"] + len(batch)}

    def init(slot: Slot, param: Param) -> Sums:
        return {"sum": _zeros(*param.grid.size, like=param), "n": _zeros(like=param)}

    return Statistic(name, "gates", init, update, lambda sums, slot, param: sums["sum"] / sums["n"])


gate_grad = _of_gates("gate_grad", lambda gates: gates.per_sample())
"""Mean over samples of dL/dgate: the first-order loss change of removing the block is its negative."""

gate_fisher = _of_gates("gate_fisher", lambda gates: gates.per_sample().square())
"""Mean over samples of (dL/dgate)^2: the diagonal of the empirical Fisher of the gates (Theis et al. 1801.05787)."""

gate_hg = _of_gates("gate_hg", lambda gates: gates.hg()[None])
"""Mean over batches of the Hessian of the gates times their gradient (GraSP, Wang et al. 2002.07376)."""

gate_flow = _of_gates("gate_flow", lambda gates: gates.flow()[None])
"""dR/dgate of R = the summed output of the network of |weights| on ones (SynFlow, Tanaka et al. 2006.05467, eq. 3)."""


def gate_hvp(*, probes: int = 1, seed: int = 0) -> Statistic:
    """Diagonal of the gates' Hessian by Hutchinson: the mean over batches and probes of v * (H v), v = +-1 (Bekas et al. 2007).

    Example:
        >>> bp.statistics.gate_hvp(probes=4).name
        'gate_hvp'
    """
    return _of_gates("gate_hvp", lambda gates: gates.curvature(probes, seed).mean(0, keepdim=True))
