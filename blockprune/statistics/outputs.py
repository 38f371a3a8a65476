"""Statistics of a layer's outputs, and of the loss's gradient with respect to them."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from blockprune.core.precision import at_least_float32
from blockprune.core.types import Param
from blockprune.model.hf_linears import is_transposed
from blockprune.model.inputs import input_axis
from blockprune.model.parameters import ParameterRef
from blockprune.statistics.statistic import Call, Statistic, Sums, count_output_rows, row_weights, weighted_sum, zeros


def _per_output(name: str, contribution: Callable[[Tensor], Tensor], of: Literal["output", "output_grad"] = "output") -> Statistic:
    """``contribution(output)`` of each output, mean over rows; of an output's gradient, the sum over rows."""

    def init(ref: ParameterRef, param: Param) -> Sums:
        if ref.attr != "weight":
            raise NotImplementedError(
                f"{ref.name} {param.grid.shape}: {name} needs a layer's `weight`, whose outputs are the layer's; those of {ref.attr!r} are "
                "not. Use a statistic of inputs or gates for it"
            )
        _check_layout(name, ref, param)
        return {"sum": zeros(_outputs(ref, param), like=param), "n": zeros(like=param)}

    def update(sums: Sums, call: Call) -> Sums:
        rows = call.output if of == "output" else call.output_grad
        assert rows is not None
        if rows.shape[1:] != sums["sum"].shape:
            raise _wrong_width(name, call, len(sums["sum"]), rows.shape[1])
        total = weighted_sum(call, contribution(at_least_float32(rows)))
        return {"sum": sums["sum"] + total, "n": sums["n"] + count_output_rows(call, sums["n"])}

    def compute(sums: Sums, ref: ParameterRef, param: Param) -> Tensor:
        value = sums["sum"] if of == "output_grad" else sums["sum"] / sums["n"]
        if input_axis(ref) == 1:
            return value.view(-1, *[1] * (len(param.grid.shape) - 1))
        value = value.view(getattr(ref.owner, "groups", 1), -1)  # [groups, outputs of a group], along axis 1 of the weight
        if len(value) > 1:
            value = value.repeat_interleave(param.grid.shape[0] // len(value), dim=0)
        return value.view(*value.shape, *[1] * (len(param.grid.shape) - 2))

    return Statistic(name, of, init, update, compute, made_by=(_per_output, (name, contribution, of)))


def _outputs(ref: ParameterRef, param: Param) -> int:
    """The layer's number of outputs."""
    return param.grid.shape[0] if input_axis(ref) == 1 else param.grid.shape[1] * getattr(ref.owner, "groups", 1)


def _check_layout(name: str, ref: ParameterRef, param: Param) -> None:
    if is_transposed(ref.owner):
        raise NotImplementedError(
            f"{ref.name} {param.grid.shape}: {name} cannot be collected from a Conv1D, whose weight is transposed; convert it to a Linear "
            "first: bp.as_linears(model)"
        )


def _wrong_width(name: str, call: Call, expected: int, width: int) -> ValueError:
    return ValueError(
        f"{call.name}: {name} expects {expected} outputs, as the weight's shape says, but the layer returned {width} for each row; leave "
        "the weight out with `excluding`"
    )


output_sq = _per_output("output_sq", torch.square)
"""The mean square of each output of the layer, ``[outputs, 1, ...]``."""

output_mean = _per_output("output_mean", lambda x: x)
"""The mean of each output of the layer, ``[outputs, 1, ...]``."""

output_grad_sq = _per_output("output_grad_sq", torch.square, of="output_grad")
"""The squared gradient of the loss with respect to each output, summed over rows, ``[outputs, 1, ...]``.

Divided by the number of rows it is the diagonal of K-FAC's matrix G (Martens & Grosse 1503.05671). The sum says how much a layer matters to
the loss: more for a convolution on a larger map (KFC, Grosse & Martens 1602.01407), or an expert that more tokens are routed to.
"""


def _grad_gram_init(ref: ParameterRef, param: Param) -> Sums:
    _check_layout("output_grad_gram", ref, param)
    if input_axis(ref) == 0 or ref.attr != "weight":
        raise NotImplementedError(
            f"{ref.name} {param.grid.shape}: output_grad_gram needs a layer's `weight` whose outputs lie along axis 0; use gate_fisher "
            "for this one"
        )
    bands, height = param.grid.size[0], param.grid.block[0]
    return {"sum": zeros(bands, height, height, like=param), "n": zeros(like=param)}


def _grad_gram_update(sums: Sums, call: Call) -> Sums:
    assert call.output_grad is not None
    bands, height, _ = sums["sum"].shape
    grad = at_least_float32(call.output_grad)  # [n, outputs]
    if -(-grad.shape[1] // height) != bands:
        raise _wrong_width("output_grad_gram", call, bands * height, grad.shape[1])
    grad = F.pad(grad, (0, bands * height - grad.shape[1])).unflatten(1, (bands, height)).movedim(1, 0)  # [bands, n, height]
    weights = row_weights(call, call.output)
    weighted = grad if weights is None else grad * weights[:, None]
    return {"sum": sums["sum"] + grad.mT @ weighted, "n": sums["n"] + count_output_rows(call, sums["n"])}


output_grad_gram = Statistic("output_grad_gram", "output_grad", _grad_gram_init, _grad_gram_update, lambda sums, ref, param: sums["sum"])
"""For each band (row of blocks) the Gram matrix of the loss's gradients with respect to its outputs, summed over rows, ``[bands, M, M]``.

Divided by the number of rows it is K-FAC's matrix G within a band (Martens & Grosse 1503.05671; LLM Surgeon 2312.17244). It is a sum for
the same reason as `output_grad_sq`.
"""


def activation(name: str, function: Callable[[Tensor], Tensor] = F.relu) -> Statistic:
    """The mean of ``function(output)`` of each output; with ReLU it is `mean_activation` (Molchanov et al. 1611.06440, eq. 4).

    Args:
        name: the statistic's name.
        function: elementwise, such as the activation function that follows the layer.

    Example:
        >>> bp.statistics.activation("mean_activation").name
        'mean_activation'
    """
    return _per_output(name, function)


mean_activation = activation("mean_activation")
"""The mean of each output after a ReLU (Molchanov et al. 1611.06440)."""

apoz = activation("apoz", lambda x: torch.where(x.isnan(), x, (x <= 0).to(x.dtype)))
"""The share of zeros of each output after a ReLU (average percentage of zeros, Hu et al. 1607.03250, eq. 1)."""
