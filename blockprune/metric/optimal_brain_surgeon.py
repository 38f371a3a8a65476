"""Optimal Brain Surgeon and SparseGPT in blocks: how much removing a block costs when the remaining weights are re-fitted.

A *band* is one row of blocks. All rows of the weight in a band have the same mask, so they share one inverse Hessian. Bands of a single row
give OBC, one band for the whole layer gives ZipLM.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from blockprune import native, statistics
from blockprune.core.arguments import check_counts, check_fraction, check_function, check_sparsity
from blockprune.core.grid import BlockGrid, block_elements, expand
from blockprune.core.hessian import LayerQuadratic, inverse_of_factor, layer_quadratic, upper_factor, workspace_bytes
from blockprune.core.patterns import resolve_by_name
from blockprune.core.pipeline import requires
from blockprune.core.precision import double, float32_if_in_range
from blockprune.core.progress import progress_bar
from blockprune.core.types import BlockScore, Data, Param, Scores, Share, Sparsity, solve_all

MAX_ROUNDING_ERROR = 0.01  # relative error of a score by rounding, above which the removals are computed in float64


@requires(statistics.input_gram)
def obs(
    data: Data,
    *,
    damping: float = 0.01,
    stop_at: float = 1.0,
    memory: int | None = None,
    progress: bool | None = None,
    share: Share = solve_all,
) -> Scores:
    """Optimal Brain Surgeon over blocks: how much each removal raises the layer's error, per element (OBC 2208.11580, ZipLM 2302.04089).

    Blocks are removed one at a time from each band (row of blocks), always the one whose removal raises the layer's error least after the
    remaining weights are re-fitted. That is the block B with the smallest ``s_B = tr(W_B ([H^-1]_BB)^-1 W_B^T)``. Its removal changes the
    weights to ``W - W_B ([H^-1]_BB)^-1 [H^-1]_B:`` and eliminates its rows and columns from H^-1. s_B is exactly what it adds to the error
    ``tr((W - V) H (W - V)^T)`` of the re-fitted weights V, where ``H = X^T X / n + damping * its diagonal``.

    The scores rise in the order of removal, so masks of increasing sparsity nest. On such a mask `reconstruct.least_squares` returns the
    re-fitted weights. The scores can be ranked per row of blocks, per layer, or over the whole model.

    Args:
        data: with the statistic ``input_gram``. If it has ``output_grad_gram`` too, or its diagonal ``output_grad_sq``, output errors are
            weighted by the loss's gradients (K-FAC 1503.05671; LLM Surgeon 2312.17244). Only then are scores of several layers comparable.
        damping: the share of H's diagonal that is added to it (Marquardt 1963).
        stop_at: stop in each band when this fraction of it is removed, which is faster. The blocks that remain get higher scores, in the
            order of what removing each of them next would add.
        memory: bytes for copies of H^-1, of which every band needs one; at least one copy is made. By default 16 MiB, on a GPU a quarter of
            the free memory. The compiled loop, on a CPU, makes one copy per thread instead.
        progress: show a progress bar; by default in a terminal and in a notebook.
        share: how the bands are divided among processes that all have the data, such as `blockprune.distributed.share`; by default this one
            takes all.

    Raises:
        ValueError: data without ``input_gram``, a Hessian that stays singular with a larger damping, or ``stop_at`` outside [0, 1].
        NotImplementedError: blocks that span groups of a grouped convolution.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(8, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.input_gram],
        ...                                   batches=[torch.randn(32, 8)])
        >>> masks = bp.allocate.per_row(bp.metric.obs(data), 0.5)
        >>> repaired = bp.reconstruct.least_squares(data, masks)
        >>> repaired["weight"].shape
        torch.Size([4, 8])
    """
    stop_at = check_fraction("stop_at", stop_at)
    check_function("share", share, "such as blockprune.distributed.share")
    scores: dict[str, BlockScore] = {}
    with torch.no_grad():
        for name, p in progress_bar(data.items(), "obs", progress):
            scores[name] = BlockScore(_obs(name, p, damping, stop_at, memory, progress, share), p.grid)
    return scores


def _obs(  # noqa: PLR0917
    name: str, p: Param, damping: float, stop_at: float, memory: int | None, progress: bool | None, share: Share
) -> Tensor:
    bands = _bands(name, p, damping)
    unit = _unit(bands.rows)
    rows, stop, memory = bands.rows / unit, _max_removals(p.grid, stop_at), workspace_bytes(bands.rows.device, memory)
    options: Any = {"width": bands.width, "stop": stop, "memory": memory, "progress": progress}

    def remove(rows: Tensor, inverse: Tensor, group: Tensor) -> Sequence[Tensor]:
        """The removals, and for each band whether they failed, of which other processes must know."""
        failed = torch.zeros_like(group)
        try:
            return *_remove_blocks(rows, inverse, group, **options), failed
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, though torch does not say so to mypy
            nothing = rows.new_zeros(len(rows), rows.shape[2] // bands.width)
            return nothing, nothing.long(), failed + 1

    def removals(rows: Tensor, inverse: Tensor) -> Sequence[Tensor]:
        return share(len(rows), lambda own: remove(rows[own], inverse, bands.group[own]))

    increases, order, failed = removals(rows, bands.inverse.to(rows.dtype))
    if failed.any():
        warnings.warn(
            f"{name} {p.grid.shape}: OBS lost precision in {str(rows.dtype)[6:]}, so its scores were computed again in float64",
            stacklevel=3,
        )
        increases, order, failed = removals(rows.double(), bands.inverse)
        if failed.any():
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"{name} {p.grid.shape}: rounding made the inverse Hessian indefinite in float64, too; give a larger damping"
            )
    elements = block_elements(p.grid, device=rows.device).reshape(increases.shape)
    score = torch.empty_like(increases).scatter_(1, order, increases).to(p.stats["input_gram"].dtype) / elements
    return _squared_unit(_rising(score, order), unit).view(p.grid.size)


def _unit(rows: Tensor) -> float:
    """A power of 2 by which weights are divided so that float32 holds their squares; 1 for weights of usual sizes."""
    largest = float(rows.abs().max())
    return 1.0 if not math.isfinite(largest) or largest == 0 or 1e-6 < largest < 1e6 else 2.0 ** min(127, round(math.log2(largest)))


def _squared_unit(score: Tensor, unit: float) -> Tensor:
    """Scores of weights in this unit, in float64 if float32 cannot hold them."""
    return score if unit == 1 else float32_if_in_range(double(score) * unit**2)


def _max_removals(grid: BlockGrid, stop_at: float) -> int:
    """The most blocks of a band that a mask of this sparsity can prune, in any order: as many as if the smallest ones were pruned."""
    elements = block_elements(grid)[0].flatten().sort().values.double()
    return int((elements.cumsum(0) - elements / 2 < stop_at * elements.sum()).sum())


def _rising(score: Tensor, order: Tensor) -> Tensor:
    """Scores ``[bands, C]``, raised where necessary so that they rise strictly along each band's order of removal, even where they tie."""
    steps, infinity = list(score.gather(1, order).unbind(1)), score.new_full((), torch.inf)
    for i in range(1, len(steps)):
        steps[i] = torch.maximum(steps[i], steps[i - 1].nextafter(infinity))
    return torch.empty_like(score).scatter_(1, order, torch.stack(steps, 1))


# A weight cut into bands.


@attrs.frozen(eq=False)
class _Bands:
    """A weight as bands of M rows and C blocks of N columns, the columns of each block side by side.

    Ragged blocks are padded with rows of zeros, and with columns of an additional input that correlates with no other.
    """

    rows: Tensor  # [bands, M, C * N], in the precision that the removals need
    inverse: Tensor  # [groups, C * N, C * N] H^-1 in float64, one for each group of output rows that multiply the same inputs
    group: Tensor  # [bands] index of the band's group
    width: int  # N


def _bands(name: str, p: Param, damping: float) -> _Bands:
    quadratic = layer_quadratic(name, p, damping=damping)
    columns = _block_columns(p.grid).to(p.weight.device)  # [C, N]
    flat = columns.flatten()
    rows, group = _band_rows(name, p.grid, quadratic)
    rows = F.pad(_weighted_by_gradients(rows, p), (0, 1))[..., flat]
    diagonal, factor = quadratic.hessian.diagonal(dim1=1, dim2=2).clone(), quadratic.cholesky
    del quadratic  # it holds as much as the inverse
    inverse = inverse_of_factor(factor)
    variance_inflation = inverse.diagonal(dim1=1, dim2=2) * diagonal  # large if inputs are collinear
    if variance_inflation.max() * torch.finfo(rows.dtype).eps > MAX_ROUNDING_ERROR:
        rows = rows.double()
    k = inverse.shape[-1]
    if len(flat) > k or bool((flat.diff() != 1).any()):  # ragged blocks, or blocks whose columns are not side by side
        inverse = F.pad(inverse, (0, 1, 0, 1))[:, flat][:, :, flat]
        inverse.diagonal(dim1=1, dim2=2)[:, flat == k] = 1
    return _Bands(rows, inverse, group, columns.shape[1])


def _block_columns(grid: BlockGrid) -> Tensor:
    """[C, N]: the flattened input features of each column of blocks; a ragged one is padded with k, the number of features."""
    across = BlockGrid(grid.shape[1:] or (1,), grid.block[1:] or (1,))
    block_of = expand(torch.arange(across.blocks, device="cpu").view(across.size), across).flatten()  # [k]
    order = block_of.argsort(stable=True)
    counts = block_of.bincount()
    position = torch.arange(len(order), device="cpu") - (counts.cumsum(0) - counts)[block_of[order]]
    columns = torch.full((across.blocks, int(counts.max())), len(order), device="cpu")
    columns[block_of[order], position] = order
    return columns


def _band_rows(name: str, grid: BlockGrid, quadratic: LayerQuadratic) -> tuple[Tensor, Tensor]:
    """The best weights without masks as ``[bands, M, k]``, padded with rows of zeros, and the index of each band's group ``[bands]``."""
    best = quadratic.best
    groups, rows, k = best.shape
    height = min(grid.block[0], groups * rows)
    if groups > 1 and rows % height:
        raise NotImplementedError(
            f"{name} {grid.shape}: blocks of {height} rows span groups of {rows} outputs, which multiply different inputs; "
            f"use a block height that divides {rows}"
        )
    padded = F.pad(best, (0, 0, 0, -rows % height)).view(groups, -1, height, k)
    group = torch.arange(groups, device=best.device)[:, None].expand(groups, padded.shape[1])
    return padded.flatten(0, 1), group.flatten()


def _weighted_by_gradients(rows: Tensor, p: Param) -> Tensor:
    """``G^1/2 W`` ``[bands, M, k]``: its squared error is that of W weighted by G, the Gram matrix of the loss's gradients in a band."""
    if "output_grad_gram" in p.stats:
        gram = p.stats["output_grad_gram"].to(rows)  # [bands, M, M]
        if rows.shape[1] == 1:
            return rows * gram.sqrt()
        values, vectors = torch.linalg.eigh(gram)
        root: Tensor = (vectors * values.clamp_min(0).sqrt()[:, None]).mT
        return root @ rows
    if "output_grad_sq" in p.stats:
        factor = p.stats["output_grad_sq"].to(rows).flatten().sqrt()
        return rows * F.pad(factor, (0, rows.shape[0] * rows.shape[1] - len(factor))).view(*rows.shape[:2], 1)
    return rows


# Optimal Brain Surgeon's removals.


def _remove_blocks(
    rows: Tensor, inverse: Tensor, group: Tensor, *, width: int, stop: int, memory: int, progress: bool | None
) -> tuple[Tensor, Tensor]:
    """The increase of the error by each removal and the removed block, ``[bands, C]`` in the order of removal.

    After ``stop`` removals the blocks that remain follow, in the order of the increase that removing each of them next would cause.

    Raises:
        torch.linalg.LinAlgError: rounding made an inverse indefinite.
    """
    if not len(rows):
        return rows.new_empty(0, rows.shape[2] // width), group.new_empty(0, rows.shape[2] // width)
    if (removals := native.obs_sweep(rows, inverse, group, width, stop)) is not None:
        return removals
    chunk = max(1, memory // (3 * inverse[0].numel() * inverse.itemsize))
    parts = [
        _remove_blocks_in_torch(rows[i : i + chunk], inverse[group[i : i + chunk]], width, stop)
        for i in progress_bar(range(0, len(rows), chunk), "bands", progress if len(rows) > chunk else False)
    ]
    increases, order = zip(*parts, strict=True)
    return torch.cat(increases), torch.cat(order)


def _remove_blocks_in_torch(rows: Tensor, inverse: Tensor, width: int, stop: int) -> tuple[Tensor, Tensor]:
    """`_remove_blocks` of a few bands, which have an inverse each: ``[bands, k, k]``."""
    bands, height, k = rows.shape
    count, band = k // width, torch.arange(bands, device=rows.device)
    inverse, rows = inverse.clone(), rows.clone()
    removed = torch.zeros(bands, count, dtype=torch.bool, device=rows.device)
    failed = torch.zeros((), dtype=torch.bool, device=rows.device)
    increases: list[Tensor] = []
    order: list[Tensor] = []
    for step in range(count):
        factors, indefinite = _diagonal_factors(inverse, removed, width)
        failed |= indefinite
        if failed.device.type == "cpu" and failed:  # on a GPU a check stalls the loop, so there is only the one at the end
            break
        whitened = torch.linalg.solve_triangular(factors, rows.view(bands, height, count, width).permute(0, 2, 3, 1), upper=False)
        increase = whitened.square().sum((2, 3)).masked_fill(removed, torch.inf)  # [bands, C]
        if step >= stop:
            remaining, blocks = increase.sort(dim=1, stable=True)
            increases.append(remaining[:, : count - step])
            order.append(blocks[:, : count - step])
            break
        least, block = increase.min(1)
        panel = inverse.view(bands, count, width, k)[band, block]  # [bands, N, k] rows of H^-1
        panel = torch.linalg.solve_triangular(factors[band, block], panel, upper=False)
        rows.baddbmm_(whitened[band, block].mT, panel, alpha=-1)  # W -= W_B ([H^-1]_BB)^-1 [H^-1]_B:
        inverse.baddbmm_(panel.mT, panel, alpha=-1)  # H^-1 -= [H^-1]_:B ([H^-1]_BB)^-1 [H^-1]_B:
        removed[band, block] = True
        increases.append(least[:, None])
        order.append(block[:, None])
    if failed:
        raise torch.linalg.LinAlgError(f"rounding made the inverse Hessian indefinite in {rows.dtype}")  # type: ignore[attr-defined]
    return torch.cat(increases, 1), torch.cat(order, 1)


def _diagonal_factors(inverse: Tensor, removed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors of the diagonal blocks of H^-1, ``[bands, C, N, N]``, and whether one is indefinite; removed ones give I."""
    bands, count = removed.shape
    diagonal = inverse.view(bands, count, width, count, width).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    eye = torch.eye(width, dtype=inverse.dtype, device=inverse.device)
    blocks = torch.where(removed[:, :, None, None], eye, diagonal)
    if width == 1:
        return blocks.sqrt(), ~(blocks > 0).all()
    factors, info = torch.linalg.cholesky_ex(blocks)
    return factors, info.any()


# SparseGPT.


@requires(statistics.input_gram)
def sparsegpt(data: Data, *, sparsity: Sparsity, columns_per_step: int = 128, damping: float = 0.01) -> Scores:
    """SparseGPT in blocks (Frantar & Alistarh 2301.00774): ``tr(W_B ([H^-1]_BB)^-1 W_B^T)`` per element, in one pass over the columns.

    The pass goes through the input columns from left to right. Each step scores the blocks of the next columns, removes the share
    ``sparsity`` of them with the lowest scores, and re-fits the columns to the right. H^-1 is the inverse for a block's own columns and
    those to the right. All rows use the same inverse, so this is cheaper than `obs`. The masks of the pass are those of
    ``allocate.per_columns(scores, sparsity, columns=columns_per_step)``, up to rounding.

    Args:
        data: with the statistic ``input_gram``; ``output_grad_sq`` and ``output_grad_gram`` are used as in `obs`.
        sparsity: the share of the blocks that each step removes; a number, or a mapping by name or pattern. A `Pipeline` passes on the
            sparsity that it is called with.
        columns_per_step: input columns in a step, rounded down to whole blocks (at least one).
        damping: the share of H's diagonal that is added to it.

    Raises:
        ValueError: data without ``input_gram``, a Hessian that stays singular with a larger damping, a sparsity outside [0, 1], or
            ``columns_per_step`` below 1.
        KeyError: a mapping of sparsities that does not match the parameters.
        NotImplementedError: blocks that span groups of a grouped convolution.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(8, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.input_gram],
        ...                                   batches=[torch.randn(32, 8)])
        >>> bp.allocate.per_layer(bp.metric.sparsegpt(data, sparsity=0.5), 0.5)["weight"].keep.shape
        torch.Size([2, 4])
    """
    (columns_per_step,) = check_counts(1, columns_per_step=columns_per_step)
    sparsity = check_sparsity(sparsity)
    shares = resolve_by_name(sparsity, data, what="sparsity") if isinstance(sparsity, Mapping) else dict.fromkeys(data, sparsity)
    scores: dict[str, BlockScore] = {}
    with torch.no_grad():
        for name, p in data.items():
            scores[name] = BlockScore(_sparsegpt(_bands(name, p, damping), p, shares[name], columns_per_step), p.grid)
    return scores


def _sparsegpt(bands: _Bands, p: Param, sparsity: float, columns_per_step: int) -> Tensor:
    unit = _unit(bands.rows)
    rows, group, width = bands.rows / unit, bands.group, bands.width
    count = rows.shape[2] // width
    # U of H^-1 = U^T U: for the Hessian of the columns from j on, the first block of its inverse is U_jj^T U_jj, its first rows U_jj^T U_j:
    upper = upper_factor(bands.inverse).to(rows.dtype)  # [groups, C * N, C * N]
    elements = block_elements(p.grid, device=rows.device).reshape(len(rows), count).to(rows)
    score = rows.new_empty(len(rows), count)
    step = max(1, columns_per_step // width)
    for first in range(0, count, step):
        last = min(count, first + step)
        spans = [slice(j * width, (j + 1) * width) for j in range(first, last)]
        corners = [upper[:, span, span][group] for span in spans]  # [bands, N, N] U_jj
        increase = [_solve_right(rows[..., span], corner).square().sum((1, 2)) for span, corner in zip(spans, corners, strict=True)]
        score[:, first:last] = torch.stack(increase, 1) / elements[:, first:last]
        removed = _lowest(score[:, first:last], sparsity)
        for span, corner, is_removed in zip(spans, corners, removed.unbind(1), strict=True):
            error = _solve_right(rows[..., span], corner) * is_removed[:, None, None]  # W_j U_jj^-1
            rows[..., span.start :] -= error @ upper[:, span, span.start :][group]
    return _squared_unit(score.to(p.stats["input_gram"].dtype), unit).view(p.grid.size)


def _solve_right(rows: Tensor, upper: Tensor) -> Tensor:
    """``rows upper^-1``."""
    solution: Tensor = torch.linalg.solve_triangular(upper, rows, upper=True, left=False)
    return solution


def _lowest(score: Tensor, share: float) -> Tensor:
    """Whether each score is among this share of the lowest ones, in the shape of the scores."""
    flat = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    flat[score.flatten().argsort(stable=True)[: round(share * score.numel())]] = True
    return flat.view(score.shape)
