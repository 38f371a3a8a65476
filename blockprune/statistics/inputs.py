"""Of a layer's inputs: their moments, the layer's bias, and how they compare with those of the dense layer."""

import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from blockprune.layers import along_weight, input_axis
from blockprune.names import Slot
from blockprune.statistics.triples import (
    Call,
    Statistic,
    Sums,
    column_sums,
    features,
    input_count,
    input_rows,
    once,
    output_rows,
    row_weights,
    wide,
    zeros,
)
from blockprune.types import Param

WIDE = 1024  # inputs from which on half of a symmetric product is worth leaving out


def _per_feature(name: str, contribution: Callable[[Tensor], Tensor]) -> Statistic:
    def init(slot: Slot, param: Param) -> Sums:
        return {"sum": zeros(*features(slot, param), like=param), "n": input_count(slot, param, 2)}

    def update(sums: Sums, call: Call) -> Sums:
        batch = once(call, name, lambda x: column_sums(call, x, contribution))  # [groups, k]
        return {"sum": sums["sum"] + batch, "n": sums["n"] + input_rows(call, sums["n"])}

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
    groups, k = features(slot, param)
    return {"sum": zeros(groups, k, k, like=param), "n": input_count(slot, param, 3)}


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


def _gram_update(sums: Sums, call: Call) -> Sums:
    batch = once(call, "products", lambda x: _product(wide(x), row_weights(call, x)))
    return {"sum": sums["sum"] + batch, "n": sums["n"] + input_rows(call, sums["n"])}


input_gram = Statistic("input_gram", "inputs", _gram_init, _gram_update, lambda sums, slot, param: sums["sum"] / sums["n"])
"""X^T X / n, ``[groups, k, k]`` over the flattened input features (channels * taps of a convolution): the layer's Hessian."""


def _layer_bias(slot: Slot, param: Param) -> Tensor:
    found = getattr(slot.owner, slot.attr.removesuffix("weight") + "bias", None)
    return found.detach().clone() if isinstance(found, Tensor) else param.weight.new_empty(0)


def _bias_init(slot: Slot, param: Param) -> Sums:
    if input_axis(slot) == 0:
        raise NotImplementedError(f"{slot.name}: bias is of layers whose outputs lie along axis 0; leave this one out with `excluding`")
    return {}


bias = Statistic("bias", "inputs", _bias_init, lambda sums, call: sums, lambda sums, slot, param: _layer_bias(slot, param))
"""The layer's bias as it is, empty where there is none: with ``input_mean``, what `reconstruct` needs to repair it."""


def input_cross(dense: Mapping[str, list[list[Tensor]]]) -> Statistic:
    """X^T (Y, 1) / n, ``[groups, k, k + 1]``: X the inputs that the dense layer gets, Y those that this one gets.

    With it `reconstruct.least_squares` and `metric.obs` aim at the dense layer's outputs on dense inputs; `sequential` collects it.

    Args:
        dense: by parameter name, for each call of its layer to come, the dense rows ``[n, k]`` of each group; used up.

    Example:
        >>> bp.statistics.input_cross({"weight": [[torch.ones(3, 4)]]}).name
        'input_cross'
    """

    def init(slot: Slot, param: Param) -> Sums:
        zeros = _gram_init(slot, param)
        return {**zeros, "sum": F.pad(zeros["sum"], (0, 1))}

    def update(sums: Sums, call: Call) -> Sums:
        given = dense[call.name].pop(0) if dense[call.name] else []
        if [len(x) for x in given] != [len(y) for y in call.inputs]:
            raise ValueError(
                f"{call.name}: the dense layer is given {sum(map(len, given))} rows and the pruned one {sum(map(len, call.inputs))}, "
                "which cannot be compared (a router of tokens?); use target='pruned'"
            )
        found = torch.stack([wide(x).mT @ _and_one(call, y) for x, y in zip(given, call.inputs, strict=True)])
        return {"sum": sums["sum"] + found, "n": sums["n"] + input_rows(call, sums["n"])}

    return Statistic("input_cross", "inputs", init, update, lambda sums, slot, param: sums["sum"] / sums["n"])


def stream_cross(ahead: Mapping[str, list[Tensor]], *, names: Collection[str]) -> Statistic:
    """E^T (Y, 1) / n, ``[outputs, k + 1]``: E what the dense residual stream is ahead of this one's where the layer's output joins it.

    With it the layer's output makes up for errors of those before, too. Empty for layers whose output joins no stream.

    Args:
        ahead: by parameter name, for each call of its layer to come, ``[n, outputs]``; used up.
        names: parameters whose output joins a stream.

    Example:
        >>> bp.statistics.stream_cross({}, names=[]).name
        'stream_cross'
    """

    def init(slot: Slot, param: Param) -> Sums:
        outputs, *inputs = param.grid.shape
        return {"sum": zeros(outputs, math.prod(inputs) + 1, like=param), "n": zeros(like=param)} if slot.name in names else {}

    def update(sums: Sums, call: Call) -> Sums:
        if not sums:
            return sums
        x = _and_one(call, call.inputs[0])
        found = wide(ahead[call.name].pop(0)).to(x.device).mT @ x  # a stream may come from another device
        return {"sum": sums["sum"] + found, "n": sums["n"] + output_rows(call, sums["n"])}

    def finalize(sums: Sums, slot: Slot, param: Param) -> Tensor:
        return sums["sum"] / sums["n"] if sums else param.weight.new_empty(0)

    return Statistic("stream_cross", "inputs", init, update, finalize)


def _and_one(call: Call, x: Tensor) -> Tensor:
    """[n, k] -> [n, k + 1]: each row, and 1, as often as it counts."""
    weights, x = row_weights(call, x), F.pad(wide(x), (0, 1), value=1.0)
    return x if weights is None else x * weights[:, None]
