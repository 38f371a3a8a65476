"""What every metric shares: a score for each parameter, and the statistics it needs."""

from collections.abc import Callable

import torch
from torch import Tensor

from blockprune.blocks import BlockGrid, block_elements
from blockprune.types import BlockScore, Data, Param, Scores


def each(data: Data, score: Callable[[Param], Tensor]) -> Scores:
    """Score every parameter on its own."""
    with torch.no_grad():
        return {name: BlockScore(score(p), p.grid) for name, p in data.items()}


def needs(data: Data, *statistics: str, metric: str) -> None:
    """Raise unless every parameter has these statistics."""
    for name, p in data.items():
        for statistic in statistics:
            if statistic not in p.stats:
                code = {"gate_hvp": "gate_hvp()"}.get(statistic, statistic)
                remedy = f"collect.with_statistics(model, where=..., statistics=[statistics.{code}], batches=...)"
                if statistic == "movement":
                    remedy = "collect.movement(model, where=..., previous=...) after each backward"
                raise ValueError(
                    f"{name} {p.grid.shape}: metric.{metric} needs the statistic {statistic!r}; the data has {sorted(p.stats) or 'none'}; "
                    f"collect it: {remedy}"
                )


def per_element(total: Tensor, grid: BlockGrid) -> Tensor:
    """A block's total ``[*size]`` as a benefit per element, the price that a budget counts."""
    return total / block_elements(grid, device=total.device)
