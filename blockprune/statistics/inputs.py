"""Statistics of a layer's inputs: their moments, the layer's bias, and products with the inputs of the dense layer."""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blockprune.core.precision import at_least_float32
from blockprune.core.types import Param
from blockprune.model.inputs import along_weight, input_axis
from blockprune.model.parameters import ParameterRef
from blockprune.statistics.statistic import (
    Call,
    Statistic,
    Sums,
    column_sums,
    count_input_rows,
    count_output_rows,
    input_groups,
    row_weights,
    shared_by_layers,
    zero_input_counts,
    zeros,
)

SYMMETRIC_FROM = 1024  # features from which on it is faster to compute only the upper half of a Gram matrix and to copy it
COMPARE_TWO_MODELS = "input_cross and residual_cross compare two models; leave them out of the statistics: target='dense' adds them"


def _per_feature(name: str, contribution: Callable[[Tensor], Tensor]) -> Statistic:
    """The mean of ``contribution(inputs)`` over rows, one number for each input feature."""

    def init(ref: ParameterRef, param: Param) -> Sums:
        return {"sum": zeros(*input_groups(ref, param), like=param), "n": zero_input_counts(ref, param, 2)}

    def update(sums: Sums, call: Call) -> Sums:
        totals = shared_by_layers(call, name, lambda x: column_sums(call, x, contribution))  # [groups, k]
        return {"sum": sums["sum"] + totals, "n": sums["n"] + count_input_rows(call, sums["n"])}

    def compute(sums: Sums, ref: ParameterRef, param: Param) -> Tensor:
        return along_weight(sums["sum"] / sums["n"], param.grid.shape, input_axis(ref))

    return Statistic(name, "inputs", init, update, compute)


input_sq = _per_feature("input_sq", torch.square)
"""The mean square of each input feature, in a shape that broadcasts to the weight: Wanda's ||X||_2^2 / n (Sun et al. 2306.11695)."""

input_mean = _per_feature("input_mean", lambda x: x)
"""The mean of each input feature, in a shape that broadcasts to the weight."""


def _gram_init(ref: ParameterRef, param: Param) -> Sums:
    if input_axis(ref) == 0:
        raise NotImplementedError(
            f"{ref.name} {param.grid.shape}: input_gram needs a weight whose inputs lie along axis 1, but the inputs of this one lie along "
            "axis 0; collect input_sq instead, or leave the weight out with `excluding`"
        )
    groups, k = input_groups(ref, param)
    return {"sum": zeros(groups, k, k, like=param), "n": zero_input_counts(ref, param, 3)}


def _gram(x: Tensor, weights: Tensor | None) -> Tensor:
    """[n, k] -> [k, k]: ``x^T diag(weights) x``. Of a large matrix only the panels on and above the diagonal are multiplied."""
    scaled = x if weights is None else x * weights[:, None]
    k = x.shape[1]
    if k < SYMMETRIC_FROM:
        return x.mT @ scaled
    gram = x.new_empty(k, k)
    for i in range(0, k, panel := -(-k // 6)):
        torch.mm(x[:, i : i + panel].mT, scaled[:, i:], out=gram[i : i + panel, i:])
        gram[i + panel :, i : i + panel] = gram[i : i + panel, i + panel :].mT
    return gram


def _gram_update(sums: Sums, call: Call) -> Sums:
    return _with_products(sums, call, [_gram(at_least_float32(x), row_weights(call, x)) for x in call.inputs])


def _with_products(sums: Sums, call: Call, products: list[Tensor]) -> Sums:
    """The sums with the product of each group of inputs; the memory of the products becomes that of the new sums, as these are large."""
    total = products[0][None] if len(products) == 1 else torch.stack(products)
    total = total.add_(sums["sum"]) if total.dtype == sums["sum"].dtype else sums["sum"] + total
    return {"sum": total, "n": sums["n"] + count_input_rows(call, sums["n"])}


input_gram = Statistic("input_gram", "inputs", _gram_init, _gram_update, lambda sums, ref, param: sums["sum"] / sums["n"], shared=True)
"""X^T X / n over the flattened input features (channels * kernel positions of a convolution), ``[groups, k, k]``.

This is the Hessian of the layer's squared output error, up to a factor. See `Call` for what a group is.
"""


def _layer_bias(ref: ParameterRef, param: Param) -> Tensor:
    value = getattr(ref.owner, ref.attr.removesuffix("weight") + "bias", None)
    return value.detach().clone() if isinstance(value, Tensor) else param.weight.new_empty(0)


def _bias_init(ref: ParameterRef, param: Param) -> Sums:
    if input_axis(ref) == 0:
        raise NotImplementedError(
            f"{ref.name} {param.grid.shape}: bias needs a weight whose outputs lie along axis 0, but the outputs of this one lie along "
            "axis 1; leave the weight out with `excluding`"
        )
    return {}


bias = Statistic("bias", "inputs", _bias_init, lambda sums, call: sums, lambda sums, ref, param: _layer_bias(ref, param))
"""The layer's bias, copied from the model; empty if the layer has none. With ``input_mean``, `reconstruct` can repair it."""


def _cross_init(ref: ParameterRef, param: Param) -> Sums:
    sums = _gram_init(ref, param)
    return {**sums, "sum": F.pad(sums["sum"], (0, 1))}


def _cross_update(sums: Sums, call: Call) -> Sums:
    calls = _of_two_models(call, "dense_inputs").get(call.name, [])
    dense = calls[call.index] if call.index < len(calls) else []
    if [len(x) for x in dense] != [len(y) for y in call.inputs]:
        raise ValueError(
            f"{call.name}: the dense layer has {sum(map(len, dense))} input rows and the pruned layer {sum(map(len, call.inputs))}, so "
            "they cannot be compared row by row (does a router choose the tokens?); use target='pruned'"
        )
    products = [at_least_float32(x).mT @ _append_ones(call, y) for x, y in zip(dense, call.inputs, strict=True)]
    return _with_products(sums, call, products)


input_cross = Statistic("input_cross", "inputs", _cross_init, _cross_update, lambda sums, ref, param: sums["sum"] / sums["n"])
"""X^T [Y, 1] / n, ``[groups, k, k + 1]``: X are the inputs of the dense layer, and Y those of the pruned layer for the same tokens.

If the data has it, `reconstruct.least_squares` and `metric.obs` aim at the outputs of the dense layer on its own inputs. `sequential`
collects it: its batches have an attribute ``dense_inputs``, which holds by parameter name and call the dense rows ``[n, k]`` of each group.
"""


def _of_two_models(call: Call, attribute: str) -> Any:
    """What a batch of `sequential` knows of the dense model."""
    if not hasattr(call.batch, attribute):
        raise ValueError(COMPARE_TWO_MODELS)
    return getattr(call.batch, attribute)


def residual_cross(names: Collection[str]) -> Statistic:
    """E^T [Y, 1] / n, ``[outputs, k + 1]``: E is the dense residual stream minus the pruned one, and Y are the pruned layer's inputs.

    Both streams are taken where the layer's output is added to them. If the data has it, a repair makes the layer's output compensate for
    the errors of the layers before it as well. It is empty for layers whose output is not added to a residual stream. `sequential` collects
    it: its batches have an attribute ``residual_error``, which holds E ``[n, outputs]`` by parameter name and call.

    Args:
        names: parameters whose output is added to a residual stream.

    Example:
        >>> bp.statistics.residual_cross([]).name
        'residual_cross'
    """

    def init(ref: ParameterRef, param: Param) -> Sums:
        outputs, *inputs = param.grid.shape
        return {"sum": zeros(outputs, math.prod(inputs) + 1, like=param), "n": zeros(like=param)} if ref.name in names else {}

    def update(sums: Sums, call: Call) -> Sums:
        if not sums:
            return sums
        x = _append_ones(call, call.inputs[0])
        error = at_least_float32(_of_two_models(call, "residual_error")[call.name][call.index])  # [n, outputs], on the device of the stream
        return {"sum": sums["sum"] + error.to(x.device).mT @ x, "n": sums["n"] + count_output_rows(call, sums["n"])}

    def compute(sums: Sums, ref: ParameterRef, param: Param) -> Tensor:
        return sums["sum"] / sums["n"] if sums else param.weight.new_empty(0)

    return Statistic("residual_cross", "inputs", init, update, compute, made_by=(residual_cross, (names,)))


def _append_ones(call: Call, x: Tensor) -> Tensor:
    """[n, k] -> [n, k + 1]: each row followed by a 1, times the row's weight."""
    weights, x = row_weights(call, x), F.pad(at_least_float32(x), (0, 1), value=1.0)
    return x if weights is None else x * weights[:, None]
