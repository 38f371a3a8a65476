"""Scores from the activations of the layers."""

import torch
from torch import Tensor

from blockprune import statistics
from blockprune.core.grid import BlockGrid, expand, pool
from blockprune.core.pipeline import requires
from blockprune.core.types import Data, Param, Scores
from blockprune.metric.scoring import per_element, score_parameters


@requires(statistics.input_sq)
def wanda(data: Data) -> Scores:
    """Mean over the block of ``|W_ij| ||X_j||_2 / sqrt(n)`` (Sun et al. 2306.11695, eq. 1).

    Needs the statistic ``input_sq``. The paper compares weights within each output row: use `allocate.per_row`.

    Raises:
        ValueError: data without ``input_sq``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.input_sq],
        ...                                   batches=[torch.randn(8, 4)])
        >>> bp.allocate.per_row(bp.metric.wanda(data), 0.5)["weight"].keep.sum(1)
        tensor([1, 1])
    """
    return score_parameters(data, lambda p: pool(p.weight.abs() * p.stats["input_sq"].sqrt(), p.grid, reduce="mean"))


@requires(statistics.input_gram)
def block_output_error(data: Data) -> Scores:
    """``tr(W_B H_BB W_B^T)`` per element, where H = X^T X / n: the mean squared error of the layer's output when only this block is pruned.

    Needs the statistic ``input_gram``. This is the quadratic of Optimal Brain Surgeon (Hassibi & Stork 1992) for a block, without an update
    of the remaining weights; `metric.obs` includes it.

    Raises:
        ValueError: data without ``input_gram``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.input_gram],
        ...                                   batches=[torch.randn(8, 4)])
        >>> bp.metric.block_output_error(data)["weight"].value.shape
        torch.Size([2, 2])
    """
    return score_parameters(data, _output_error)


def _output_error(p: Param) -> Tensor:
    gram = p.stats["input_gram"]  # [groups, k, k]
    across = BlockGrid(p.grid.shape[1:], p.grid.block[1:])
    block_of = expand(
        torch.arange(across.blocks, device=gram.device).view(across.size), across
    ).flatten()  # [k] each input's column of blocks
    within_block = torch.where(block_of[:, None] == block_of, gram, 0)
    rows = p.weight.to(gram).reshape(len(gram), -1, gram.shape[-1])  # [groups, rows, k]
    error = (rows @ within_block) * rows
    return per_element(pool(error.reshape(p.grid.shape), p.grid), p.grid)


@requires(statistics.apoz)
def apoz(data: Data) -> Scores:
    """The share of an output's activations that are not zero after a ReLU, mean over the block's rows (1 - APoZ, Hu et al. 1607.03250).

    Needs the statistic ``apoz``.

    Raises:
        ValueError: data without ``apoz``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((1,)), statistics=[bp.statistics.apoz],
        ...                                   batches=[torch.randn(8, 4)])
        >>> bp.metric.apoz(data)["weight"].value.shape
        torch.Size([4, 1])
    """
    return score_parameters(data, lambda p: pool((1 - p.stats["apoz"]).expand(p.grid.shape), p.grid, reduce="mean"))


@requires(statistics.mean_activation)
def mean_activation(data: Data) -> Scores:
    """The mean of an output after a ReLU, mean over the block's rows (Molchanov et al. 1611.06440, eq. 4).

    Needs the statistic ``mean_activation``.

    Raises:
        ValueError: data without ``mean_activation``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((1,)), statistics=[bp.statistics.mean_activation],
        ...                                   batches=[torch.randn(8, 4)])
        >>> bp.metric.mean_activation(data)["weight"].value.shape
        torch.Size([4, 1])
    """
    return score_parameters(data, lambda p: pool(p.stats["mean_activation"].expand(p.grid.shape), p.grid, reduce="mean"))
