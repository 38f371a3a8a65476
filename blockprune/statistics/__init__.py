"""What can be learnt of a parameter from data, each a triple of pure functions: init, update, finalize.

Sums add up (over batches, folds and processes); only ``finalize`` divides. Write your own in a notebook cell: a `Statistic` is a value.
"""

from blockprune.statistics.gradients import gate_fisher, gate_flow, gate_grad, gate_hg, gate_hvp, weight_grad, weight_grad_sq
from blockprune.statistics.inputs import bias, input_cross, input_gram, input_mean, input_sq, stream_cross
from blockprune.statistics.outputs import activation, apoz, mean_activation, output_grad_gram, output_grad_sq, output_mean, output_sq
from blockprune.statistics.triples import Call, Gates, Sees, Statistic, Sums

__all__ = [
    "Call",
    "Gates",
    "Sees",
    "Statistic",
    "Sums",
    "activation",
    "apoz",
    "bias",
    "gate_fisher",
    "gate_flow",
    "gate_grad",
    "gate_hg",
    "gate_hvp",
    "input_cross",
    "input_gram",
    "input_mean",
    "input_sq",
    "mean_activation",
    "output_grad_gram",
    "output_grad_sq",
    "output_mean",
    "output_sq",
    "stream_cross",
    "weight_grad",
    "weight_grad_sq",
]
