"""blockprune: prune neural networks in blocks and make the result really faster.

    collect(model) -> data -> metric -> scores -> allocate -> masks -> apply_masks(model, masks)

See ARCHITECTURE.md for which file holds which idea.
"""

from blockprune import allocate, collect, distribute, distributed, export, metric, reconstruct, schedule, statistics
from blockprune.apply import apply_masks, finalize, masked_parameters, read_masks
from blockprune.as_linears import as_linears, from_linears
from blockprune.axes import find_axes
from blockprune.blocks import BlockGrid, block_elements, expand, pool
from blockprune.blockwise import blockwise
from blockprune.cluster import cluster
from blockprune.maskfile import load_masks, save_masks
from blockprune.masks import agreement, difference, intersect, restrict, sparsity, summary, union
from blockprune.pareto import Pareto, pareto
from blockprune.permute import Shuffle, permute, weakest_first
from blockprune.pipeline import Pipeline
from blockprune.quadratic import Conditioning, conditioning
from blockprune.sensitivity import Sensitivity, sensitivity
from blockprune.sequential import Repaired, sequential
from blockprune.types import BlockMask, BlockScore, Data, Masks, Param, Scores, Sparsity, Weights, Where
from blockprune.where import convs, excluding, first_of, including, linears, named

__version__ = "0.1.0"

__all__ = [
    "BlockGrid",
    "BlockMask",
    "BlockScore",
    "Conditioning",
    "Data",
    "Masks",
    "Param",
    "Pareto",
    "Pipeline",
    "Repaired",
    "Scores",
    "Sensitivity",
    "Shuffle",
    "Sparsity",
    "Weights",
    "Where",
    "agreement",
    "allocate",
    "apply_masks",
    "as_linears",
    "block_elements",
    "blockwise",
    "cluster",
    "collect",
    "conditioning",
    "convs",
    "difference",
    "distribute",
    "distributed",
    "excluding",
    "expand",
    "export",
    "finalize",
    "find_axes",
    "first_of",
    "from_linears",
    "including",
    "intersect",
    "linears",
    "load_masks",
    "masked_parameters",
    "metric",
    "named",
    "pareto",
    "permute",
    "pool",
    "read_masks",
    "reconstruct",
    "restrict",
    "save_masks",
    "schedule",
    "sensitivity",
    "sequential",
    "sparsity",
    "statistics",
    "summary",
    "union",
    "weakest_first",
]
