"""The budget of a recipe, from passes over the dense model that never load it whole."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blockprune.core.pipeline import as_code
from blockprune.core.tensor_file import read_tensors, write_tensors
from blockprune.core.types import BlockScore, Data, Param
from blockprune.hf.pruned_folder import is_sealed, write_sealed
from blockprune.model.selection import select
from blockprune.model.sharding import on_first_rank
from blockprune.recipes import LayerBudget
from blockprune.repair.hidden_states import Store
from blockprune.repair.layer_gradients import collect_layer_by_layer
from blockprune.repair.transformer_layers import LoadWeights

VERSION = "1"


def layer_budget(
    model: Any, budget: LayerBudget, sparsity: float, *, layers: Sequence[str], path: Path, load: LoadWeights, store: Store
) -> tuple[Mapping[str, float], Data]:
    """``budget(model, sparsity)``, with the weights and the statistics of one layer at a time; kept in a file for the next call.

    Its metric is called with the data of one layer at a time.

    Args:
        model: whose weights ``load`` provides.
        budget: of a recipe.
        sparsity: the fraction of all elements to remove.
        layers: names of the layers, in order.
        path: of the file.
        load, store: as in `collect_layer_by_layer`.

    Raises:
        ValueError: a collector that is not ``partial(collect.with_statistics, where=..., calibration=...)``; and what
            `collect_layer_by_layer` raises; a file that has been damaged.
    """
    options = budget.collect.keywords if isinstance(budget.collect, partial) else {}
    if not {"where", "calibration"} <= options.keys():
        raise ValueError(
            f"recipe.budget collects by {as_code(budget.collect)}, which needs the whole model; give partial(collect.with_statistics, "
            "where=..., statistics=..., calibration=...), or no budget: attrs.evolve(recipe, budget=None)"
        )
    grids = {name: grid for name, (_, grid) in select(model, options["where"]).items()}
    reduce = options["calibration"].reduce
    if not on_first_rank(lambda: is_sealed(path, path.parent), reduce):
        scores: dict[str, BlockScore] = {}
        kept: dict[str, torch.Tensor] = {}

        def receive(data: Data) -> None:
            scores.update(budget.metric(data))
            kept.update({f"{key} {name}": p.stats[key] for name, p in data.items() for key in budget.reuse if key in p.stats})

        collect_layer_by_layer(
            model, budget.collect, options["where"], options["calibration"], layers=layers, receive=receive, load=load, store=store
        )
        shares = budget.budget({name: scores[name] for name in grids}, sparsity)
        metadata = {"format": "blockprune.budget", "version": VERSION, "shares": json.dumps(dict(shares))}
        on_first_rank(lambda: write_sealed(path, path.parent, lambda: write_tensors(kept, path, metadata)), reduce)
    tensors, metadata = read_tensors(path, content="budget", version=VERSION)
    stats: dict[str, dict[str, torch.Tensor]] = {name: {} for name in grids}
    for key, tensor in tensors.items():
        statistic, _, name = key.partition(" ")
        stats[name][statistic] = tensor
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    no_weight = torch.zeros((), device=device)  # the layers' own data have the weights
    return json.loads(metadata["shares"]), {name: Param(no_weight.expand(grid.shape), grid, stats[name]) for name, grid in grids.items()}
