"""The fourth stage, optional: (data, masks) -> weights, what is kept makes up for what is gone. Pure; give the result to `apply_masks`."""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from blockprune.blocks import expand
from blockprune.quadratic import quadratic, room
from blockprune.types import BlockMask, Data, Masks, Param

__all__ = ["bias", "least_squares", "none", "sparsegpt"]


def none(data: Data, masks: Masks) -> dict[str, Tensor]:
    """No repair: no new weights.

    Example:
        >>> bp.reconstruct.none({}, {})
        {}
    """
    return {}


def least_squares(
    data: Data, masks: Masks, *, damping: float = 0.01, memory: int | None = None, progress: bool = True
) -> dict[str, Tensor]:
    """The best kept weights: ``W_S = W H_:S (H_SS)^-1`` for the kept inputs S of each band of rows (exact minimum of the layer's error).

    ``H = X^T X / n + damping * its diagonal``; damping draws weights to what they were. With the statistics ``input_mean`` and ``bias``
    too, inputs count from their mean and the bias absorbs it. (The closed form behind Optimal Brain Surgeon, Hassibi & Stork 1992,
    for many weights at once; where few are pruned, from those: ``W - W_P ([H^-1]_PP)^-1 [H^-1]_P:``, the same weights.)

    Args:
        data: with the statistic ``input_gram``.
        masks: any blocks; rows that have the same mask are solved together.
        damping: share of H's diagonal that is added to it.
        memory: bytes for the systems that are solved at a time, at least one; by default 16 MiB, on a GPU a quarter of what is free.
        progress: show a bar on a terminal.

    Returns:
        Weights by parameter name, zero in pruned blocks; and biases by theirs where they were collected.

    Raises:
        KeyError: a mask of a parameter that the data has not.
        ValueError: data without ``input_gram``, a Hessian that no damping saves.

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
    _check(data, masks, "input_gram", what="least_squares")
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, mask in tqdm(masks.items(), desc="least squares", disable=None if progress else True, leave=False):
            found |= _least_squares(name, data[name], mask, damping, memory)
    return found


def _least_squares(name: str, p: Param, mask: BlockMask, damping: float, memory: int | None) -> dict[str, Tensor]:
    q, memory = quadratic(name, p, damping=damping), room(p.weight.device, memory)
    _, rows, k = q.rows.shape
    height = math.gcd(mask.grid.block[0], rows)  # rows that share a mask, and a Hessian
    keep = expand(mask.keep.to(p.weight.device), mask.grid).reshape(-1, height, k)[:, 0]  # [bands, k]
    kept, gone = keep.sum(1).double(), (~keep).sum(1).double()
    if 2 * gone.pow(3).sum() < kept.pow(3).sum():  # from what is gone, the smaller systems: in float64 twice as long a flop
        inverse = q.inverse
        best = q.goal.double() @ inverse if q.moved else q.rows.double()
        excess = _solve_all(inverse, ~keep, best.reshape(-1, height, k), memory)  # best_P ([H^-1]_PP)^-1
        weight = best - excess.reshape(best.shape) @ inverse
        weight = torch.where(keep[:, None], weight.reshape(-1, height, k), 0)
    else:
        weight = _solve_all(q.hessian, keep, q.goal.reshape(-1, height, k), memory)
        if not q.moved:
            weight[kept == k] = q.rows.reshape(-1, height, k)[kept == k]  # nothing is missing: the weight to the bit
    weight = weight.reshape(p.weight.shape)
    found = {name: weight.to(p.weight.dtype)}
    if q.means:
        wanted, given = q.means
        shift = (wanted - (weight.to(given).reshape(q.rows.shape) @ given[:, :, None])[:, :, 0]).flatten()
        found[_bias_of(name)] = (p.stats["bias"].to(shift) + shift).to(p.stats["bias"].dtype)
    return found


def _solve_all(matrix: Tensor, chosen: Tensor, goal: Tensor, memory: int) -> Tensor:
    """``goal_S (A_SS)^-1`` of each band ``[bands, height, k]``, S its chosen inputs ``[bands, k]``; zero elsewhere."""
    solved = torch.zeros_like(goal)
    group = torch.arange(len(matrix), device=chosen.device).repeat_interleave(len(chosen) // len(matrix))
    counts = chosen.sum(1)
    pending = counts.argsort(stable=True)  # systems of like size together
    pending = pending[counts[pending] > 0]
    while len(pending):
        most = int(counts[pending[-1]])
        first = max(0, len(pending) - max(1, memory // (2 * matrix.itemsize * most * most)))
        chunk, pending = pending[first:], pending[:first]
        solved[chunk] = _solve(matrix, group[chunk], chosen[chunk], goal[chunk], most)
    return solved


def _solve(matrix: Tensor, group: Tensor, chosen: Tensor, goal: Tensor, most: int) -> Tensor:
    """The same of some bands, whose S have at most ``most`` inputs."""
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]  # [b, s] S, filled up with others
    inside = chosen.gather(1, order)
    system = matrix[group[:, None, None], order[:, :, None], order[:, None, :]]  # [b, s, s]
    system = torch.where(inside[:, :, None] & inside[:, None, :], system, 0)
    system.diagonal(dim1=1, dim2=2)[~inside] = 1
    wanted = goal.gather(2, order[:, None].expand(-1, goal.shape[1], -1)) * inside[:, None]
    factor, info = torch.linalg.cholesky_ex(system)
    if info.any():  # A is definite in this precision and its submatrices are better conditioned: rounding only
        factor = torch.linalg.cholesky(system.double()).to(system.dtype)
    values = torch.cholesky_solve(wanted.mT, factor).mT
    return torch.zeros_like(goal).scatter_(2, order[:, None].expand(-1, goal.shape[1], -1), values)


def sparsegpt(data: Data, masks: Masks, *, damping: float = 0.01, group: int = 128) -> dict[str, Tensor]:
    """SparseGPT's update (Frantar & Alistarh 2301.00774, eq. 4): column after column, only those to the right make up for what is pruned.

    One inverse serves all rows, so it is cheaper than `least_squares`, whose error it never beats.

    Args:
        data: with the statistic ``input_gram``.
        masks: any blocks.
        damping: share of H's diagonal that is added to it.
        group: columns that are updated at a time.

    Raises:
        KeyError: a mask of a parameter that the data has not.
        ValueError: data without ``input_gram``, a Hessian that no damping saves.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(8, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.input_gram],
        ...                                   batches=[torch.randn(32, 8)])
        >>> masks = bp.allocate.per_row(bp.metric.sparsegpt(data, sparsity=0.5), 0.5)
        >>> bp.reconstruct.sparsegpt(data, masks)["weight"].shape
        torch.Size([4, 8])
    """
    _check(data, masks, "input_gram", what="sparsegpt")
    found = {}
    with torch.no_grad():
        for name, mask in masks.items():
            q = quadratic(name, data[name], damping=damping)
            upper = torch.linalg.cholesky(q.inverse, upper=True).to(q.rows.dtype)  # [groups, k, k]
            rows = q.best.clone()
            gone = ~expand(mask.keep.to(rows.device), mask.grid).reshape(rows.shape)
            k = rows.shape[-1]
            for first in range(0, k, group):
                last = min(k, first + group)
                errors = torch.zeros_like(rows[..., first:last])
                for c in range(first, last):
                    error = rows[..., c] * gone[..., c] / upper[:, c, c, None]  # [groups, rows]
                    rows[..., c:last] -= error[..., None] * upper[:, None, c, c:last]
                    errors[..., c - first] = error
                rows[..., last:] -= errors @ upper[:, first:last, last:]
            rows[gone] = 0
            found[name] = rows.reshape(data[name].weight.shape).to(data[name].weight.dtype)
    return found


def bias(data: Data, masks: Masks) -> dict[str, Tensor]:
    """Fold what pruned inputs gave on average into the bias: ``b + (W - W_masked) E[x]`` (FLAP, An et al. 2312.11983, eq. 5).

    Args:
        data: with the statistics ``input_mean`` and ``bias``.
        masks: any blocks.

    Returns:
        Biases by their own names, such as ``fc.bias``.

    Raises:
        KeyError: a mask of a parameter that the data has not.
        ValueError: data without the statistics, a layer without a bias.

    Example:
        >>> model, x = nn.Linear(4, 2), torch.ones(8, 4)
        >>> data = bp.collect.with_statistics(model, where=bp.linears((2, 2)), batches=[x],
        ...                                   statistics=[bp.statistics.input_mean, bp.statistics.bias])
        >>> masks, y = bp.allocate.per_row(bp.metric.l1(data), 0.5), model(x)
        >>> torch.allclose(bp.apply_masks(model, masks, bp.reconstruct.bias(data, masks))(x), y)
        True
    """
    _check(data, masks, "input_mean", "bias", what="bias")
    found = {}
    with torch.no_grad():
        for name, mask in masks.items():
            p = data[name]
            before = p.stats["bias"]
            if not before.numel():
                raise ValueError(
                    f"{name} {p.grid.shape}: its layer has no bias to fold into; use least_squares, or leave it out of the masks"
                )
            lost = torch.where(expand(mask.keep.to(p.weight.device), mask.grid), 0, p.weight) * p.stats["input_mean"]
            found[_bias_of(name)] = (before + lost.flatten(1).sum(1)).to(before.dtype)
    return found


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _check(data: Data, masks: Masks, *statistics: str, what: str) -> None:
    for name, mask in masks.items():
        if name not in data:
            raise KeyError(f"masks name {name!r}, of which nothing was collected; the data has {', '.join(map(repr, data)) or 'nothing'}")
        p = data[name]
        if mask.grid.shape != p.grid.shape:
            raise ValueError(f"{name}: the weight {p.grid.shape} has a mask for shape {mask.grid.shape}; make the masks from this data")
        for statistic in statistics:
            if statistic not in p.stats:
                code = f"collect.with_statistics(model, where=..., statistics=[statistics.{statistic}], batches=...)"
                raise ValueError(
                    f"{name} {p.grid.shape}: reconstruct.{what} needs the statistic {statistic!r}; the data has "
                    f"{sorted(p.stats) or 'none'}; collect it: {code}"
                )
