"""Scores from what flows through the layers."""

import torch
from torch import Tensor

from blockprune.blocks import BlockGrid, expand, pool
from blockprune.metric.scoring import each, needs, per_element
from blockprune.types import Data, Param, Scores


def wanda(data: Data) -> Scores:
    """Mean over the block of ``|W_ij| ||X_j||_2 / sqrt(n)`` (Sun et al. 2306.11695, eq. 1); rank it per row of blocks, as the paper does.

    Needs the statistic ``input_sq``. The choice of `allocate.per_row` (the paper's comparison group) or another is the allocator's.

    Raises:
        ValueError: data without ``input_sq``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.input_sq],
        ...                                   batches=[torch.randn(8, 4)])
        >>> bp.allocate.per_row(bp.metric.wanda(data), 0.5)["weight"].keep.sum(1)
        tensor([1, 1])
    """
    needs(data, "input_sq", metric="wanda")
    return each(data, lambda p: pool(p.weight.abs() * p.stats["input_sq"].sqrt(), p.grid, reduce="mean"))


def correlated(data: Data) -> Scores:
    """``tr(W_B H_BB W_B^T)`` per element, H = X^T X / n: the layer's exact mean squared error when only this block is dropped.

    Needs the statistic ``input_gram``. (The group form of Optimal Brain Surgeon's quadratic, Hassibi & Stork 1992, without its update.)

    Raises:
        ValueError: data without ``input_gram``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.input_gram],
        ...                                   batches=[torch.randn(8, 4)])
        >>> bp.metric.correlated(data)["weight"].value.shape
        torch.Size([2, 2])
    """
    needs(data, "input_gram", metric="correlated")
    return each(data, _correlated)


def _correlated(p: Param) -> Tensor:
    gram = p.stats["input_gram"]  # [groups, k, k]
    across = BlockGrid(p.grid.shape[1:], p.grid.block[1:])
    block_of = expand(torch.arange(across.blocks, device=gram.device).view(across.size), across).flatten()  # [k] which block of columns
    inside = torch.where(block_of[:, None] == block_of, gram, 0)
    rows = p.weight.to(gram).reshape(len(gram), -1, gram.shape[-1])  # [groups, rows, k]
    error = (rows @ inside) * rows
    return per_element(pool(error.reshape(p.grid.shape), p.grid), p.grid)


def apoz(data: Data) -> Scores:
    """Share of an output's activations behind a ReLU that are not zero, mean over the block's rows (1 - APoZ, Hu et al. 1607.03250).

    Needs the statistic ``apoz``.

    Raises:
        ValueError: data without ``apoz``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((1,)), statistics=[bp.statistics.apoz],
        ...                                   batches=[torch.randn(8, 4)])
        >>> bp.metric.apoz(data)["weight"].value.shape
        torch.Size([4, 1])
    """
    needs(data, "apoz", metric="apoz")
    return each(data, lambda p: pool((1 - p.stats["apoz"]).expand(p.grid.shape), p.grid, reduce="mean"))


def mean_activation(data: Data) -> Scores:
    """Mean of an output behind a ReLU, mean over the block's rows (Molchanov et al. 1611.06440, eq. 4).

    Needs the statistic ``mean_activation``.

    Raises:
        ValueError: data without ``mean_activation``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((1,)), statistics=[bp.statistics.mean_activation],
        ...                                   batches=[torch.randn(8, 4)])
        >>> bp.metric.mean_activation(data)["weight"].value.shape
        torch.Size([4, 1])
    """
    needs(data, "mean_activation", metric="mean_activation")
    return each(data, lambda p: pool(p.stats["mean_activation"].expand(p.grid.shape), p.grid, reduce="mean"))
