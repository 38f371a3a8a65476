"""The second stage: metric(data) -> scores, one number per block; blocks with high scores are kept.

A sparsity counts elements, so every score is a *benefit per element*, such as a mean over the elements of the block. Blocks of different
sizes (ragged ones at the edge, or 4x4 and 16x16 in two layers) are then compared fairly. Half-precision weights are summed in float32.
"""

from blockprune.metric.activations import apoz, block_output_error, mean_activation, wanda
from blockprune.metric.gradients import fisher, gradient_magnitude, grasp, movement, obd, snip, synflow, taylor, taylor_squared
from blockprune.metric.magnitude import batchnorm_scale, fpgm, l1, l2, lamp, lp, random
from blockprune.metric.optimal_brain_surgeon import obs, sparsegpt

__all__ = [
    "apoz",
    "batchnorm_scale",
    "block_output_error",
    "fisher",
    "fpgm",
    "gradient_magnitude",
    "grasp",
    "l1",
    "l2",
    "lamp",
    "lp",
    "mean_activation",
    "movement",
    "obd",
    "obs",
    "random",
    "snip",
    "sparsegpt",
    "synflow",
    "taylor",
    "taylor_squared",
    "wanda",
]
