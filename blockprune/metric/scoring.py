"""What the metrics share."""

from collections.abc import Callable

import torch
from torch import Tensor

from blockprune.core.grid import BlockGrid, block_elements
from blockprune.core.types import BlockScore, Data, Param, Scores


def score_each(data: Data, score: Callable[[Param], Tensor]) -> Scores:
    """The scores ``score(param)``, for metrics that score each parameter independently of the others."""
    with torch.no_grad():
        return {name: BlockScore(score(p), p.grid) for name, p in data.items()}


def per_element(total: Tensor, grid: BlockGrid) -> Tensor:
    """The totals of blocks ``[*size]`` divided by their numbers of elements: scores are per element, because a sparsity counts elements."""
    return total / block_elements(grid, device=total.device)
