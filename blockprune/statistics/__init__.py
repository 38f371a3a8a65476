"""Statistics: what can be collected about a parameter from data. Each is three pure functions: init, update and compute.

``update`` only adds to sums, so that sums of several batches, folds or processes can be added, too; ``compute`` divides. A `Statistic` is a
value, so you can write your own in a notebook cell.
"""

from blockprune.statistics.gradients import (
    gate_fisher,
    gate_flow,
    gate_grad,
    gate_hessian_diagonal,
    gate_hessian_grad,
    weight_grad,
    weight_grad_sq,
)
from blockprune.statistics.inputs import bias, input_cross, input_gram, input_mean, input_sq, residual_cross
from blockprune.statistics.outputs import activation, apoz, mean_activation, output_grad_gram, output_grad_sq, output_mean, output_sq
from blockprune.statistics.statistic import Call, GateDerivatives, Source, Statistic, Sums

__all__ = [
    "Call",
    "GateDerivatives",
    "Source",
    "Statistic",
    "Sums",
    "activation",
    "apoz",
    "bias",
    "gate_fisher",
    "gate_flow",
    "gate_grad",
    "gate_hessian_diagonal",
    "gate_hessian_grad",
    "input_cross",
    "input_gram",
    "input_mean",
    "input_sq",
    "mean_activation",
    "output_grad_gram",
    "output_grad_sq",
    "output_mean",
    "output_sq",
    "residual_cross",
    "weight_grad",
    "weight_grad_sq",
]
