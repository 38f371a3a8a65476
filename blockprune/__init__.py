"""blockprune: prune neural networks in blocks and make the result really faster.

    collect(model) -> data -> metric -> scores -> allocate -> masks -> apply_masks(model, masks)

See ARCHITECTURE.md for which file holds which idea.
"""

from blockprune import allocate, collect, distributed, metric, schedule, statistics
from blockprune.apply import apply_masks, finalize, masked_parameters, read_masks
from blockprune.blocks import BlockGrid, block_elements, expand, pool
from blockprune.maskfile import load_masks, save_masks
from blockprune.masks import agreement, difference, intersect, restrict, sparsity, summary, union
from blockprune.pipeline import Pipeline
from blockprune.sensitivity import Sensitivity, sensitivity
from blockprune.types import BlockMask, BlockScore, Data, Masks, Param, Scores, Sparsity, Weights, Where
from blockprune.where import convs, excluding, first_of, linears, named

__version__ = "0.1.0"

__all__ = [
    "BlockGrid",
    "BlockMask",
    "BlockScore",
    "Data",
    "Masks",
    "Param",
    "Pipeline",
    "Scores",
    "Sensitivity",
    "Sparsity",
    "Weights",
    "Where",
    "agreement",
    "allocate",
    "apply_masks",
    "block_elements",
    "collect",
    "convs",
    "difference",
    "distributed",
    "excluding",
    "expand",
    "finalize",
    "first_of",
    "intersect",
    "linears",
    "load_masks",
    "masked_parameters",
    "metric",
    "named",
    "pool",
    "read_masks",
    "restrict",
    "save_masks",
    "schedule",
    "sensitivity",
    "sparsity",
    "statistics",
    "summary",
    "union",
]
