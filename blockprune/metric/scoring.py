"""What the metrics share."""

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from blockprune.core.grid import BlockGrid, block_elements, pool
from blockprune.core.precision import double, float32_if_in_range, is_in_range
from blockprune.core.types import BlockScore, Data, Param, Scores, check_data


def score_parameters(data: Data, score: Callable[[Param], Tensor]) -> Scores:
    """The scores ``score(param)``, for metrics that score each parameter independently of the others.

    Where float32 overflows or underflows, the score is computed in float64, and stays in float64 if float32 cannot hold it.

    Raises:
        TypeError: something else than data, such as a model.
    """
    check_data(data)
    with torch.no_grad():
        return {name: BlockScore(_in_range(attrs.evolve(p, weight=p.weight), score), p.grid) for name, p in data.items()}


def _in_range(p: Param, score: Callable[[Param], Tensor]) -> Tensor:
    value = score(p)
    if value.dtype == torch.float64 or (is_in_range(value) and not _vanishes(p, value)):
        return value
    in_double = attrs.evolve(p, weight=double(p.weight), stats={name: double(x) for name, x in p.stats.items()})
    return float32_if_in_range(score(in_double))


def _vanishes(p: Param, value: Tensor) -> bool:
    """Whether the score of a block is 0 although its weights are not."""
    return not value.all() and bool((pool(p.weight, p.grid, reduce="max", elementwise=torch.abs) * (value == 0)).any())


def per_element(total: Tensor, grid: BlockGrid) -> Tensor:
    """The totals of blocks ``[*size]`` divided by their numbers of elements: scores are per element, because a sparsity counts elements."""
    return total / block_elements(grid, device=total.device)
