"""Scores from weights alone."""

import math
from functools import partial

import torch
from torch import Tensor

from blockprune.core.arguments import check_number, check_seed
from blockprune.core.grid import block_elements, expand, pool
from blockprune.core.types import Data, Param, Scores, check_data, check_finite
from blockprune.metric.scoring import score_parameters


def l1(data: Data) -> Scores:
    """Mean of ``|w|`` over the block (magnitude pruning, Han et al. 1506.02626; of filters, Li et al. 1608.08710).

    Args:
        data: weights and their blocks, such as `collect.weights` returns.

    Example:
        >>> w = torch.tensor([[1.0, -3.0, 5.0]])
        >>> bp.metric.l1({"w": bp.Param(w, bp.BlockGrid((1, 3), (1, 2)))})["w"].value
        tensor([[2., 5.]])
    """
    return score_parameters(data, lambda p: pool(p.weight, p.grid, reduce="mean", elementwise=torch.abs))


def l2(data: Data) -> Scores:
    """Root mean square of ``w`` over the block.

    Args:
        data: weights and their blocks, such as `collect.weights` returns.

    Example:
        >>> w = torch.tensor([[3.0, 4.0]])
        >>> bp.metric.l2({"w": bp.Param(w, bp.BlockGrid((1, 2), (1, 2)))})["w"].value
        tensor([[3.5355]])
    """
    return score_parameters(data, lambda p: pool(p.weight, p.grid, reduce="mean", elementwise=torch.square).sqrt())


def lp(data: Data, *, p: float) -> Scores:
    """``(mean |w|^p)^(1/p)`` over the block; ``p=inf`` is the largest ``|w|``.

    Args:
        data: weights and their blocks, such as `collect.weights` returns.
        p: the power, above 0.

    Raises:
        ValueError: ``p`` is not above 0.

    Example:
        >>> w = torch.tensor([[3.0, -4.0]])
        >>> bp.metric.lp({"w": bp.Param(w, bp.BlockGrid((1, 2), (1, 2)))}, p=math.inf)["w"].value
        tensor([[4.]])
    """
    p = check_number("p", p, "a number above 0; use p=1 for l1, p=2 for l2, p=inf for the largest", above=0, finite=False)
    if p == math.inf:
        return score_parameters(data, lambda param: pool(param.weight, param.grid, reduce="amax", elementwise=torch.abs))
    return score_parameters(data, partial(_lp, p=p))


def _lp(param: Param, *, p: float) -> Tensor:
    largest = pool(param.weight, param.grid, reduce="max", elementwise=torch.abs)  # powers of ratios do not overflow
    ratio = param.weight.abs() / expand(largest, param.grid).clamp_min(torch.finfo(largest.dtype).tiny)
    return largest * pool(ratio**p, param.grid, reduce="mean") ** (1 / p)


def random(data: Data, *, generator: torch.Generator | int | None = None) -> Scores:
    """Uniform random scores in [0, 1): the baseline that a criterion must beat.

    Args:
        data: only its grids are used.
        generator: a seed, which gives the same scores at every call, or a ``torch.Generator``, which is advanced; None uses torch's global
            generator.

    Raises:
        ValueError: a weight with NaN or inf.

    Example:
        >>> data = {"w": bp.Param(torch.zeros(4, 4), bp.BlockGrid((4, 4), (2, 2)))}
        >>> bp.metric.random(data, generator=0)["w"] == bp.metric.random(data, generator=0)["w"]
        True
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        seed = check_seed("generator", generator, ", as a seed, a torch.Generator, or None")
        generator = torch.Generator().manual_seed(seed)
    device = generator.device if generator else None
    check_data(data)
    for name, p in data.items():
        check_finite(name, p.weight)  # the scores of other metrics would be NaN or inf, too
    return score_parameters(data, lambda p: torch.rand(p.grid.size, generator=generator, device=device).to(p.weight.device))


def fpgm(data: Data) -> Scores:
    """Mean distance of a row (filter) to all other rows, divided by the root of its length (FPGM, He et al. 1811.00250, eq. 4 to 6).

    Rows close to the geometric median can be replaced by the others and score low. A block of several rows scores their mean.

    Args:
        data: weights and their blocks, such as `collect.weights` returns.

    Raises:
        ValueError: blocks that are not whole rows.

    Example:
        >>> w = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
        >>> bp.metric.fpgm({"w": bp.Param(w, bp.BlockGrid((3, 2), (1,)))})["w"].value.argmin()     # the middle one
        tensor(1)
    """
    check_data(data)
    for name, p in data.items():
        if p.grid.block[1:] != p.grid.shape[1:]:
            raise ValueError(
                f"{name}: fpgm compares whole rows (filters), but block={p.grid.block} of shape={p.grid.shape} cuts them; use (1,)"
            )
    return score_parameters(
        data,
        lambda p: pool(
            _mean_distance(p.weight[..., None].flatten(1)).view(-1, *[1] * (p.weight.ndim - 1)).expand(p.weight.shape),
            p.grid,
            reduce="mean",
        ),
    )


def _mean_distance(rows: Tensor) -> Tensor:
    """[R, C] -> [R]: mean root-mean-square distance of each row to the others, in chunks of about a million distances to bound memory."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    rows = rows - rows.mean(0)  # distances stay the same, and `cdist` rounds less where it multiplies matrices
    chunks = rows.split(max(1, (1 << 20) // len(rows)))
    total = torch.cat([torch.cdist(chunk, rows).sum(1) for chunk in chunks])
    return total / (max(1, len(rows) - 1) * math.sqrt(rows.shape[1]))


def lamp(data: Data) -> Scores:
    """A block's sum of squares divided by that of all blocks of its parameter that rank no lower, per element.

    Source: LAMP, Lee et al. 2010.07611, eq. 3. Rank it over the whole model (`allocate.per_model`).

    Args:
        data: weights and their blocks, such as `collect.weights` returns.

    Example:
        >>> w = torch.tensor([[1.0, 2.0, 3.0]])
        >>> bp.metric.lamp({"w": bp.Param(w, bp.BlockGrid((1, 3), (1, 1)))})["w"].value       # 1/14, 4/13, 9/9
        tensor([[0.0714, 0.3077, 1.0000]])
    """
    return score_parameters(data, _lamp)


def _lamp(p: Param) -> Tensor:
    mean = pool(p.weight, p.grid, reduce="mean", elementwise=torch.square).flatten()  # [blocks]
    energy = mean.double() * block_elements(p.grid, device=mean.device).reshape(-1)
    order = mean.argsort(stable=True)
    rest = energy[order].flip(0).cumsum(0).flip(0)  # the energy of the block and of all that rank above it
    share = torch.empty_like(energy)
    share[order] = mean[order] / rest.clamp_min(torch.finfo(rest.dtype).tiny)
    return share.to(mean.dtype).view(p.grid.size)


def batchnorm_scale(data: Data) -> Scores:
    """``|gamma|`` of the batch norm that scales a filter's output (network slimming, Liu et al. 1708.06519).

    Needs the statistic ``batchnorm_scale`` of `collect.batchnorm_scales`; for a parameter of one axis (a batch norm's own weight) it uses
    the weight itself. A block of several filters scores their mean.

    Args:
        data: weights, their blocks and the statistic.

    Raises:
        ValueError: a parameter of more than one axis without the statistic, or blocks that are not whole filters.

    Example:
        >>> gamma = torch.tensor([0.5, -2.0])
        >>> bp.metric.batchnorm_scale({"bn.weight": bp.Param(gamma, bp.BlockGrid((2,), (1,)))})["bn.weight"].value
        tensor([0.5000, 2.0000])
    """
    check_data(data)
    for name, p in data.items():
        if p.weight.ndim > 1 and "batchnorm_scale" not in p.stats:
            raise ValueError(f"{name} {p.grid.shape} has no statistic 'batchnorm_scale'; collect with `collect.batchnorm_scales`")
        check_finite(name, p.weight)
        channels = p.stats.get("batchnorm_scale", p.weight).shape  # 1 along all axes but that of the output channels
        if any(n > 1 and channel == 1 for n, channel in zip(p.grid.size, channels, strict=True)):
            axis = next((axis for axis, n in enumerate(channels) if n > 1), 0)
            raise ValueError(
                f"{name}: batchnorm_scale ranks whole filters, but block={p.grid.block} of shape={p.grid.shape} cuts them; use "
                f"{(*[-1] * axis, 1)}"
            )
    return score_parameters(
        data, lambda p: pool(p.stats.get("batchnorm_scale", p.weight).expand(p.grid.shape), p.grid, reduce="mean", elementwise=torch.abs)
    )
