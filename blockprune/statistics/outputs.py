"""Of a layer's outputs, and of the loss's gradient with respect to them."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from blockprune.as_linears import is_transposed
from blockprune.layers import input_axis
from blockprune.names import Slot
from blockprune.statistics.triples import Call, Statistic, Sums, output_rows, row_weights, total, wide, zeros
from blockprune.types import Param

_TURN = "{}: {} is not known of a Conv1D; turn it into a Linear, bp.as_linears(model)"
_OTHER = "{}: {} is of {} outputs by the weight's shape, but a row of what the layer gives has {}; leave it out with `excluding`"


def _per_output(name: str, contribution: Callable[[Tensor], Tensor], of: Literal["output", "output_grad"] = "output") -> Statistic:
    def init(slot: Slot, param: Param) -> Sums:
        if slot.attr not in ("weight",):
            raise NotImplementedError(
                f"{slot.name}: {name} is of a layer's outputs, which are not those of {slot.attr!r}; use another statistic"
            )
        if is_transposed(slot.owner):
            raise NotImplementedError(_TURN.format(slot.name, name))
        return {"sum": zeros(_outputs(slot, param), like=param), "n": zeros(like=param)}

    def update(sums: Sums, call: Call) -> Sums:
        seen = call.output if of == "output" else call.output_grad
        assert seen is not None
        if seen.shape[1:] != sums["sum"].shape:
            raise ValueError(_OTHER.format(call.name, name, len(sums["sum"]), seen.shape[1]))
        return {"sum": sums["sum"] + total(call, contribution(wide(seen))), "n": sums["n"] + output_rows(call, sums["n"])}

    def finalize(sums: Sums, slot: Slot, param: Param) -> Tensor:
        found = sums["sum"] if of == "output_grad" else sums["sum"] / sums["n"]
        if input_axis(slot) == 0:  # outputs lie along axis 1
            groups = getattr(slot.owner, "groups", 1)
            found = (
                found.view(groups, -1) if groups == 1 else found.view(groups, -1).repeat_interleave(param.grid.shape[0] // groups, dim=0)
            )
            return found.view(*found.shape, *[1] * (param.weight.ndim - 2))
        return found.view(-1, *[1] * (param.weight.ndim - 1))

    return Statistic(name, of, init, update, finalize)


def _outputs(slot: Slot, param: Param) -> int:
    return param.grid.shape[input_axis(slot) == 0] * (getattr(slot.owner, "groups", 1) if input_axis(slot) == 0 else 1)


output_sq = _per_output("output_sq", torch.square)
"""Mean square of each output of the layer, ``[outputs, 1, ...]``."""

output_mean = _per_output("output_mean", lambda x: x)
"""Mean of each output of the layer, ``[outputs, 1, ...]``."""

output_grad_sq = _per_output("output_grad_sq", torch.square, of="output_grad")
"""Square of the loss's gradient with respect to each output, summed over rows, ``[outputs, 1, ...]``: the diagonal of K-FAC's G (Martens &
Grosse 1503.05671) times the rows. A layer that meets more of them moves the loss more: a convolution on a larger map (KFC, Grosse
& Martens 1602.01407), an expert that more tokens choose."""


def _grad_gram_init(slot: Slot, param: Param) -> Sums:
    if is_transposed(slot.owner):
        raise NotImplementedError(_TURN.format(slot.name, "output_grad_gram"))
    if input_axis(slot) == 0 or slot.attr != "weight":
        raise NotImplementedError(f"{slot.name}: output_grad_gram is of outputs along axis 0 of a weight; use gate_fisher for this one")
    bands, height = param.grid.size[0], param.grid.block[0]
    return {"sum": zeros(bands, height, height, like=param), "n": zeros(like=param)}


def _grad_gram_update(sums: Sums, call: Call) -> Sums:
    assert call.output_grad is not None
    bands, height, _ = sums["sum"].shape
    g = wide(call.output_grad)  # [n, outputs]
    if -(-g.shape[1] // height) != bands:
        raise ValueError(_OTHER.format(call.name, "output_grad_gram", bands * height, g.shape[1]))
    g = F.pad(g, (0, bands * height - g.shape[1])).unflatten(1, (bands, height)).movedim(1, 0)  # [bands, n, height]
    weights = row_weights(call, call.output)
    weighed = g if weights is None else g * weights[:, None]
    return {"sum": sums["sum"] + g.mT @ weighed, "n": sums["n"] + output_rows(call, sums["n"])}


output_grad_gram = Statistic("output_grad_gram", "output_grad", _grad_gram_init, _grad_gram_update, lambda sums, slot, param: sums["sum"])
"""Products of the loss's gradients with respect to the outputs that share a row of blocks, summed over rows, ``[rows of blocks, M, M]``:
K-FAC's G within a band (Martens & Grosse 1503.05671; LLM Surgeon 2312.17244) times the rows, as `output_grad_sq`."""


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
