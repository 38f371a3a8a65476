"""The size of a whole model with its masks: parameters and multiply-adds, dense and kept."""

from typing import Any

import attrs
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blockprune.core.masks import summary
from blockprune.core.table import Rows, Table
from blockprune.export.conversion import dense
from blockprune.model.apply import read_masks
from blockprune.model.running import Forward, default_forward, preserve_state


@attrs.frozen(repr=False)
class ModelSize(Table):
    """Parameters and multiply-adds of a model, dense and kept; it prints in a terminal and renders in a notebook.

    Example:
        >>> from blockprune import export
        >>> export.ModelSize(parameters=1000, parameters_kept=600)
                    dense  kept  sparsity
        parameters  1,000   600     40.0%
    """

    parameters: int
    parameters_kept: int
    multiply_adds: int | None = None  # of one call; None without inputs
    multiply_adds_kept: int | None = None

    @property
    def sparsity(self) -> float:
        """The pruned share of all parameters, those without a mask included."""
        return 1 - self.parameters_kept / max(1, self.parameters)

    def table(self) -> Rows:
        counts = {"parameters": (self.parameters, self.parameters_kept)}
        if self.multiply_adds is not None and self.multiply_adds_kept is not None:
            counts["multiply-adds"] = self.multiply_adds, self.multiply_adds_kept
        rows = [(name, f"{total:,}", f"{kept:,}", f"{1 - kept / max(1, total):.1%}") for name, (total, kept) in counts.items()]
        return [("", "dense", "kept", "sparsity"), *rows]


def count_model(model: nn.Module, *, inputs: Any = None, forward: Forward = default_forward) -> ModelSize:
    """Count the parameters of a masked or exported model and, given inputs, the multiply-adds of one call; `summary` counts masks alone.

    A masked Linear or convolution takes the kept share of its multiply-adds. `torch.utils.flop_counter` counts them all; it does not know
    every operation, and element-wise ones count as none.

    Args:
        model: with or without masks; it is not changed.
        inputs: one batch for ``forward``; without it, multiply-adds are not counted.
        forward: (model, batch) -> output, as in `Calibration`.

    Example:
        >>> from blockprune import export
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((4, 8), (4, 4)))
        >>> model = bp.apply_masks(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)), {"0.weight": mask})
        >>> export.count_model(model, inputs=torch.ones(10, 8))
                       dense  kept  sparsity
        parameters        56    40     28.6%
        multiply-adds    480   320     33.3%
    """
    plain, masks = dense(model), read_masks(model)
    pruned = {row.name: row.elements - row.elements_kept for row in summary(masks).rows}
    parameters = sum(p.numel() for p in plain.parameters())
    size = ModelSize(parameters, parameters - sum(pruned.values()))
    if inputs is None:
        return size
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), preserve_state(plain), counter:
        forward(plain, inputs)
    by_module = {name: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()}
    total, saved, root = by_module.get("Global", 0), 0.0, type(plain).__name__
    for name, row in {row.name: row for row in summary(masks).rows}.items():
        layer = name.rpartition(".")[0]
        if isinstance(plain.get_submodule(layer), (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            saved += row.sparsity * by_module.get(f"{root}.{layer}" if layer else root, 0)
    return attrs.evolve(size, multiply_adds=total, multiply_adds_kept=round(total - saved))
