"""The second stage: one number a block, higher = keep.

Budgets count elements, so every score here is a *benefit per element*: a mean (or root mean square) over the elements
that the block has. A ragged block and a whole one, a 4x4 and a 16x16, then compete at the price they cost. Half types
are summed in float32.
"""

from blockprune.metric.activations import apoz, correlated, mean_activation, wanda
from blockprune.metric.gradients import fisher, grasp, movement, obd, snip, synflow, taylor
from blockprune.metric.magnitude import batchnorm_scale, fpgm, l1, l2, lamp, lp, random
from blockprune.metric.obs import obs, sparsegpt

__all__ = [
    "apoz",
    "batchnorm_scale",
    "correlated",
    "fisher",
    "fpgm",
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
    "wanda",
]
