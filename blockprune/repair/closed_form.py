"""The closed-form repairs, reconstruct(data, masks) -> weights: the kept weights make up for the pruned ones.

They are pure functions; give the weights that they return to `apply_masks`.
"""

import math

import torch
from torch import Tensor

from blockprune import statistics
from blockprune.core.arguments import check_counts, check_function
from blockprune.core.grid import expand
from blockprune.core.hessian import inverse_of_factor, layer_quadratic, upper_factor, workspace_bytes
from blockprune.core.pipeline import requires
from blockprune.core.progress import progress_bar
from blockprune.core.types import BlockMask, Data, Masks, Param, Share, solve_all

__all__ = ["bias", "least_squares", "none", "sparsegpt"]


def none(data: Data, masks: Masks) -> dict[str, Tensor]:
    """No repair: no new weights.

    Example:
        >>> bp.reconstruct.none({}, {})
        {}
    """
    return {}


@requires(statistics.input_gram)
def least_squares(
    data: Data,
    masks: Masks,
    *,
    damping: float = 0.01,
    memory: int | None = None,
    progress: bool | None = None,
    share: Share = solve_all,
) -> dict[str, Tensor]:
    """The kept weights with the smallest output error: ``W_S = W H_:S (H_SS)^-1`` for the kept inputs S of each row of blocks.

    ``H = X^T X / n + damping * its diagonal``; the damping draws weights towards their present values. If the data has ``input_mean`` and
    ``bias`` too, the bias is repaired along with the weights. This is the closed form of Optimal Brain Surgeon (Hassibi & Stork 1992) for
    many weights at once. Where few inputs are pruned, the same weights are computed from those: ``W - W_P ([H^-1]_PP)^-1 [H^-1]_P:``.

    Args:
        data: with the statistic ``input_gram``.
        masks: any blocks; rows with the same mask are solved together.
        damping: the share of H's diagonal that is added to it.
        memory: bytes for the linear systems that are solved at a time; at least one system is. The default is 16 MiB, and on a GPU a
            quarter of its free memory.
        progress: show a progress bar; by default in a terminal and in a notebook.
        share: how the rows of blocks are divided among processes that all have the data, such as `blockprune.distributed.share`; by default
            this one solves all.

    Returns:
        Weights by parameter name, zero in pruned blocks, and biases by theirs if they were collected.

    Raises:
        KeyError: a mask for a parameter that the data does not have.
        ValueError: data without ``input_gram``, a Hessian that stays singular with more damping.

    Example:
        >>> model, x = nn.Linear(8, 4), torch.randn(32, 8) @ torch.randn(8, 8)
        >>> data = bp.collect.with_statistics(model, where=bp.linears((2, 2)), statistics=[bp.statistics.input_gram], batches=[x])
        >>> masks = bp.allocate.per_row(bp.metric.obs(data), 0.5)
        >>> y = model(x)
        >>> plain = (bp.apply_masks(model, masks)(x) - y).square().mean()
        >>> weights = bp.reconstruct.least_squares(data, masks)
        >>> bool((bp.apply_masks(model, masks, weights)(x) - y).square().mean() < plain)
        True
    """
    _check_masks(data, masks)
    check_function("share", share, "such as blockprune.distributed.share")
    repaired: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, mask in progress_bar(masks.items(), "least squares", progress):
            repaired |= _least_squares(name, data[name], mask, damping, memory, share)
    return repaired


def _least_squares(  # noqa: PLR0917
    name: str, p: Param, mask: BlockMask, damping: float, memory: int | None, share: Share
) -> dict[str, Tensor]:
    q, memory = layer_quadratic(name, p, damping=damping), workspace_bytes(p.weight.device, memory)
    present, target_product, has_target, means = q.weight, q.target_product, q.has_target, q.means
    rows, k = present.shape[1:]
    height = math.gcd(mask.grid.block[0], rows)  # rows that share a mask and a Hessian
    keep = expand(mask.keep.to(p.weight.device), mask.grid).reshape(-1, height, k)[:, 0]  # [bands, k]
    kept, pruned = keep.sum(1).double(), (~keep).sum(1).double()
    if 2 * pruned.pow(3).sum() < kept.pow(3).sum():  # the systems of pruned inputs are smaller, but take float64: twice as long
        factor = q.cholesky
        del q  # with the Hessian; each of the two is as large as the inputs' Gram matrix
        inverse = inverse_of_factor(factor)
        best = target_product.double() @ inverse if has_target else present.double()
        correction = _solve_bands(inverse, ~keep, best.reshape(-1, height, k), memory, share)  # best_P ([H^-1]_PP)^-1
        weight = (best - correction.reshape(best.shape) @ inverse).reshape(-1, height, k)
        weight = torch.where(keep[:, None], weight, 0)
    else:
        hessian = q.hessian
        del q  # with the factor
        weight = _solve_bands(hessian, keep, target_product.reshape(-1, height, k), memory, share)
        if not has_target:  # where nothing is pruned, the weight to the bit
            weight[kept == k] = present.reshape(-1, height, k)[kept == k]
    weight = weight.reshape(p.weight.shape)
    repaired = {name: weight.to(p.weight.dtype)}
    if means:
        output_mean, input_mean = means
        present_mean = (weight.to(input_mean).reshape(present.shape) @ input_mean[:, :, None])[:, :, 0]
        shift = (output_mean - present_mean).flatten()
        repaired[_bias_name(name)] = (p.stats["bias"].to(shift) + shift).to(p.stats["bias"].dtype)
    return repaired


def _solve_bands(matrix: Tensor, chosen: Tensor, target: Tensor, memory: int, share: Share) -> Tensor:
    """``target_S (A_SS)^-1`` of each band, ``[bands, height, k]``, S the chosen inputs of the band, ``[bands, k]``; zero elsewhere."""
    group = torch.arange(len(matrix), device=chosen.device).repeat_interleave(len(chosen) // len(matrix))
    (solution,) = share(len(chosen), lambda own: [_solve_some_bands(matrix, group[own], chosen[own], target[own], memory)])
    return solution


def _solve_some_bands(matrix: Tensor, group: Tensor, chosen: Tensor, target: Tensor, memory: int) -> Tensor:
    """`_solve_bands` for some bands; ``group`` is the index of each band's matrix."""
    solution = torch.zeros_like(target)
    sizes = chosen.sum(1)
    pending = sizes.argsort(stable=True)  # systems of similar size are solved together
    pending = pending[sizes[pending] > 0]
    while len(pending):
        largest = int(sizes[pending[-1]])
        first = max(0, len(pending) - max(1, memory // (2 * matrix.itemsize * largest * largest)))
        chunk, pending = pending[first:], pending[:first]
        solution[chunk] = _solve_chunk(matrix, group[chunk], chosen[chunk], target[chunk], largest)
    return solution


def _solve_chunk(matrix: Tensor, group: Tensor, chosen: Tensor, target: Tensor, size: int) -> Tensor:
    """`_solve_bands` for some bands, each with at most ``size`` chosen inputs; smaller systems are padded with the identity."""
    index = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]  # [b, s] the chosen inputs, then others
    is_chosen = chosen.gather(1, index)
    system = matrix[group[:, None, None], index[:, :, None], index[:, None, :]]  # [b, s, s]
    system = torch.where(is_chosen[:, :, None] & is_chosen[:, None, :], system, 0)
    system.diagonal(dim1=1, dim2=2)[~is_chosen] = 1
    columns = index[:, None].expand(-1, target.shape[1], -1)  # [b, height, s]
    factor, info = torch.linalg.cholesky_ex(system)
    if info.any():  # A is positive definite in this precision and its submatrices are better conditioned: rounding only
        factor = torch.linalg.cholesky(system.double()).to(system.dtype)
    values = torch.cholesky_solve((target.gather(2, columns) * is_chosen[:, None]).mT, factor).mT
    return torch.zeros_like(target).scatter_(2, columns, values)


@requires(statistics.input_gram)
def sparsegpt(data: Data, masks: Masks, *, damping: float = 0.01, columns_per_step: int = 128) -> dict[str, Tensor]:
    """SparseGPT's update: column after column, the columns to the right make up for what is pruned (Frantar & Alistarh 2301.00774, eq. 4).

    All rows share one inverse Hessian, so it costs less than `least_squares`; its error is never smaller.

    Args:
        data: with the statistic ``input_gram``.
        masks: any blocks.
        damping: the share of H's diagonal that is added to it.
        columns_per_step: columns after which the columns to their right are updated, in one matrix product.

    Raises:
        KeyError: a mask for a parameter that the data does not have.
        ValueError: data without ``input_gram``, a Hessian that stays singular with more damping, ``columns_per_step`` below 1.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(8, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.input_gram],
        ...                                   batches=[torch.randn(32, 8)])
        >>> masks = bp.allocate.per_row(bp.metric.sparsegpt(data, sparsity=0.5), 0.5)
        >>> bp.reconstruct.sparsegpt(data, masks)["weight"].shape
        torch.Size([4, 8])
    """
    (columns_per_step,) = check_counts(1, columns_per_step=columns_per_step)
    _check_masks(data, masks)
    repaired: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, mask in masks.items():
            q = layer_quadratic(name, data[name], damping=damping)
            best, factor = q.best.clone(), q.cholesky
            del q  # it holds as much as the inverse
            upper = upper_factor(inverse_of_factor(factor)).to(best.dtype)  # [groups, k, k]
            pruned = ~expand(mask.keep.to(best.device), mask.grid).reshape(best.shape)  # [groups, rows, k]
            rows = _sparsegpt_update(best, pruned, upper, columns_per_step)
            repaired[name] = rows.reshape(data[name].weight.shape).to(data[name].weight.dtype)
    return repaired


def _sparsegpt_update(rows: Tensor, pruned: Tensor, upper: Tensor, step: int) -> Tensor:
    """The updated weights ``[groups, rows, k]``, written into ``rows``."""
    k = rows.shape[-1]
    for first in range(0, k, step):
        last = min(k, first + step)
        errors = torch.zeros_like(rows[..., first:last])
        for column in range(first, last):
            error = rows[..., column] * pruned[..., column] / upper[:, column, column, None]  # [groups, rows]
            rows[..., column:last] -= error[..., None] * upper[:, None, column, column:last]
            errors[..., column - first] = error
        rows[..., last:] -= errors @ upper[:, first:last, last:]
    rows[pruned] = 0
    return rows


@requires(statistics.input_mean, statistics.bias)
def bias(data: Data, masks: Masks) -> dict[str, Tensor]:
    """Add the mean contribution of the pruned weights to the bias: ``b + (W - W_masked) E[x]`` (FLAP, An et al. 2312.11983, eq. 5).

    Args:
        data: with the statistics ``input_mean`` and ``bias``.
        masks: any blocks.

    Returns:
        Biases by their own names, such as ``fc.bias``.

    Raises:
        KeyError: a mask for a parameter that the data does not have.
        ValueError: data without the statistics, a layer without a bias.

    Example:
        >>> model, x = nn.Linear(4, 2), torch.ones(8, 4)
        >>> data = bp.collect.with_statistics(model, where=bp.linears((2, 2)), batches=[x],
        ...                                   statistics=[bp.statistics.input_mean, bp.statistics.bias])
        >>> masks, y = bp.allocate.per_row(bp.metric.l1(data), 0.5), model(x)
        >>> torch.allclose(bp.apply_masks(model, masks, bp.reconstruct.bias(data, masks))(x), y)
        True
    """
    _check_masks(data, masks)
    repaired: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, mask in masks.items():
            p = data[name]
            if not p.stats["bias"].numel():
                raise ValueError(
                    f"{name} {p.grid.shape}: its layer has no bias to repair; use least_squares, or leave the parameter out of the masks"
                )
            pruned = torch.where(expand(mask.keep.to(p.weight.device), mask.grid), 0, p.weight)
            lost = (pruned * p.stats["input_mean"]).flatten(1).sum(1)  # [outputs]
            repaired[_bias_name(name)] = (p.stats["bias"] + lost).to(p.stats["bias"].dtype)
    return repaired


def _bias_name(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _check_masks(data: Data, masks: Masks) -> None:
    """Raise unless every mask is for a weight of the data."""
    for name, mask in masks.items():
        if name not in data:
            raise KeyError(f"masks has {name!r}, for which nothing was collected; the data has {', '.join(map(repr, data)) or 'nothing'}")
        if mask.grid.shape != data[name].grid.shape:
            raise ValueError(
                f"{name}: the weight {data[name].grid.shape} has a mask for shape {mask.grid.shape}; make the masks from this data"
            )
