"""The first stage: collect(model) -> data, the weights that a rule chooses, with statistics from batches where they are needed."""

from blockprune.collect.accumulate import Fold, compute, merge
from blockprune.collect.from_batches import fold, with_statistics
from blockprune.collect.from_weights import batchnorm_scales, gradients, movement, weights

__all__ = ["Fold", "batchnorm_scales", "compute", "fold", "gradients", "merge", "movement", "weights", "with_statistics"]
