"""blockprune: prune neural networks in blocks and make the result really faster.

    collect(model) -> data -> metric -> scores -> allocate -> masks -> apply_masks(model, masks)

| folder       | what it holds                                                                                 |
|--------------|-----------------------------------------------------------------------------------------------|
| `core`       | block geometry, the values that flow between stages, `Pipeline`, masks as values and files    |
| `model`      | parameters, their masks and gates, which to prune (`linears`, ...), how a model is run         |
| `statistics` | what can be collected from data                                                               |
| `collect`    | stage 1: model -> data                                                                        |
| `metric`     | stage 2: data -> scores                                                                       |
| `allocate`   | stage 3: scores, sparsity -> masks; budgets across layers; schedules                          |
| `repair`     | stage 4: data, masks -> weights; whole models layer by layer, or by distillation              |
| `reorder`    | the order of hidden units, so that unimportant ones share blocks                              |
| `analysis`   | sensitivity, cost against error, sweeps of recipes, pictures                                  |
| `export`     | models that store and run only the kept blocks; benchmarks against the fastest dense models   |
| `hf`         | Hugging Face: `from_pretrained`, `Trainer`, peft; only `import blockprune.hf` imports it      |
| `native`     | the optional compiled loops                                                                   |
| `examples`   | real models and texts to try things out on                                                    |
| `recipes.py` | ready-made compositions of the above                                                          |
"""

from blockprune import allocate, collect, examples, export, metric, recipes, statistics
from blockprune.allocate import budgets, schedule
from blockprune.allocate.regrowth import regrow
from blockprune.analysis import pictures
from blockprune.analysis.hessian_conditioning import Conditioning, conditioning
from blockprune.analysis.layer_sensitivity import Sensitivity, sensitivity
from blockprune.analysis.pareto_curve import Pareto, pareto
from blockprune.analysis.recipe_sweep import Sweep, SweepRow, sweep
from blockprune.collect import distributed
from blockprune.core.grid import BlockGrid, block_elements, expand, pool
from blockprune.core.mask_file import load_masks, save_masks
from blockprune.core.masks import agreement, difference, intersect, restrict, sparsity, summary, union
from blockprune.core.pipeline import Pipeline, requires
from blockprune.core.types import BlockMask, BlockScore, Data, Masks, Param, Scores, Sparsity, Weights, Where
from blockprune.core.unit_permutation import UnitPermutation
from blockprune.model import gates, regularizers
from blockprune.model.apply import apply_masks, finalize, masked_parameters
from blockprune.model.calibration import Calibration
from blockprune.model.checkpoint import load_masked, masks_from_zeros
from blockprune.model.hf_linears import as_linears, from_linears
from blockprune.model.mask_reading import read_masks
from blockprune.model.optimizer_state import reset_state, zero_new_blocks
from blockprune.model.selection import (
    batchnorms,
    convs,
    excluding,
    first_of,
    including,
    linears,
    named,
    norms_and_biases,
    units,
    with_block,
)
from blockprune.reorder.clustering import cluster
from blockprune.reorder.hidden_axes import find_axes
from blockprune.reorder.permutation import permute, sort_units
from blockprune.repair import closed_form as reconstruct
from blockprune.repair import losses
from blockprune.repair.distillation import DistillState, distill
from blockprune.repair.layer_by_layer import PruningResult, sequential
from blockprune.repair.layer_finetuning import finetune_layer
from blockprune.repair.optimizers import muon
from blockprune.repair.repair_file import load_repair, save_repair

__version__ = "0.1.0"

__all__ = [
    "BlockGrid",
    "BlockMask",
    "BlockScore",
    "Calibration",
    "Conditioning",
    "Data",
    "DistillState",
    "Masks",
    "Param",
    "Pareto",
    "Pipeline",
    "PruningResult",
    "Scores",
    "Sensitivity",
    "Sparsity",
    "Sweep",
    "SweepRow",
    "UnitPermutation",
    "Weights",
    "Where",
    "agreement",
    "allocate",
    "apply_masks",
    "as_linears",
    "batchnorms",
    "block_elements",
    "budgets",
    "cluster",
    "collect",
    "conditioning",
    "convs",
    "difference",
    "distill",
    "distributed",
    "examples",
    "excluding",
    "expand",
    "export",
    "finalize",
    "find_axes",
    "finetune_layer",
    "first_of",
    "from_linears",
    "gates",
    "including",
    "intersect",
    "linears",
    "load_masked",
    "load_masks",
    "load_repair",
    "losses",
    "masked_parameters",
    "masks_from_zeros",
    "metric",
    "muon",
    "named",
    "norms_and_biases",
    "pareto",
    "permute",
    "pictures",
    "pool",
    "read_masks",
    "recipes",
    "reconstruct",
    "regrow",
    "regularizers",
    "requires",
    "reset_state",
    "restrict",
    "save_masks",
    "save_repair",
    "schedule",
    "sensitivity",
    "sequential",
    "sort_units",
    "sparsity",
    "statistics",
    "summary",
    "sweep",
    "union",
    "units",
    "with_block",
    "zero_new_blocks",
]
