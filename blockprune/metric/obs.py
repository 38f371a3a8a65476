"""Optimal Brain Surgeon over blocks: what each further block costs when all kept weights make up for what is gone.

The rows of a block share one mask, so they share one inverse Hessian: a *band* is a row of blocks. Within a band blocks are removed one at
a time, the least harmful first, and the weights that stay are moved to the best they can do (OBC is a band of one row, ZipLM one of all).
"""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from blockprune import native
from blockprune.blocks import BlockGrid, block_elements, expand
from blockprune.metric.scoring import needs
from blockprune.quadratic import Quadratic, quadratic, room
from blockprune.types import BlockScore, Data, Param, Scores

DIGITS = 0.01  # the relative error of a score, by rounding, from which on the sweep is done in float64


def obs(data: Data, *, damping: float = 0.01, max_sparsity: float = 1.0, memory: int | None = None, progress: bool = True) -> Scores:
    """Band-exact Optimal Brain Surgeon: what each further block adds to the layer's error, per element (OBC 2208.11580, ZipLM 2302.04089).

    In each band (row of blocks) the block of least ``s_B = tr(W_B ([H^-1]_BB)^-1 W_B^T)`` goes, ``W -= W_B ([H^-1]_BB)^-1 [H^-1]_B:``,
    H^-1 is downdated, and so on; s_B is the exact rise of ``tr((W - V) H (W - V)^T)``, H = X^T X / n + damping * its diagonal.
    The scores rise along the order of removal, so masks of any sparsity are prefixes of it and nest; `reconstruct.least_squares` on
    such a mask gives the weights that this ends with. Rank per row of blocks, per layer, or over the whole model.

    Args:
        data: with the statistic ``input_gram``. With ``output_grad_gram`` (or its diagonal, ``output_grad_sq``) errors of outputs are
            weighed by the loss's gradient with respect to them (K-FAC 1503.05671; LLM Surgeon 2312.17244): only then do layers compare.
        damping: share of H's diagonal that is added to it (Marquardt 1963).
        max_sparsity: stop when this share of a band is gone (faster); what is left ranks above, by what each block alone would add.
        memory: bytes for inverses, at least one band at a time; by default 16 MiB, on a GPU a quarter of what is free. The compiled loop
            on a CPU holds one a thread.
        progress: show a bar on a terminal.

    Raises:
        ValueError: data without ``input_gram``, a Hessian that no damping saves, max_sparsity outside [0, 1].
        NotImplementedError: blocks that span groups of a grouped convolution.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(8, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.input_gram],
        ...                                   batches=[torch.randn(32, 8)])
        >>> masks = bp.allocate.per_row(bp.metric.obs(data), 0.5)
        >>> repaired = bp.reconstruct.least_squares(data, masks)
        >>> repaired["weight"].shape
        torch.Size([4, 8])
    """
    needs(data, "input_gram", metric="obs")
    if not 0 <= max_sparsity <= 1:
        raise ValueError(f"max_sparsity={max_sparsity} must be between 0 and 1")
    bar = tqdm(data.items(), desc="obs", disable=None if progress else True, leave=False)
    with torch.no_grad():
        return {name: BlockScore(_obs(name, p, damping, max_sparsity, memory), p.grid) for name, p in bar}


def _obs(name: str, p: Param, damping: float, max_sparsity: float, memory: int | None) -> Tensor:
    rows, inverse, group, width = _prepared(name, p, damping)
    count = rows.shape[2] // width
    how = {"width": width, "stop": _stop(p.grid, max_sparsity), "memory": room(rows.device, memory)}
    try:
        errors, order = _sweep(rows, inverse.to(rows.dtype), group, **how)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, though torch does not say so to mypy
        warnings.warn(f"{name} {p.grid.shape}: OBS lost precision in {str(rows.dtype)[6:]} and was done again in float64", stacklevel=3)
        errors, order = _sweep(rows.double(), inverse, group, **how)
    elements = block_elements(p.grid, device=rows.device).reshape(-1, count)
    each = torch.empty_like(errors).scatter_(1, order, errors).to(p.stats["input_gram"].dtype) / elements
    return _rising(each, order).view(p.grid.size)


def _stop(grid: BlockGrid, max_sparsity: float) -> int:
    """The most blocks of a band that any order can lose by this sparsity, as `allocate` rounds: the smallest first."""
    elements = block_elements(grid)[0].flatten().sort().values.double()
    return int((elements.cumsum(0) - elements / 2 < max_sparsity * elements.sum()).sum())


def _prepared(name: str, p: Param, damping: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows ``[bands, M, C * N]`` in the precision that the sweep needs, H^-1 in float64 ``[groups, C * N, C * N]``, each band's group, and
    N: columns of blocks side by side, ragged ones filled up with inputs that nothing depends on.
    """
    q = quadratic(name, p, damping=damping)
    columns = _columns(p.grid).to(p.weight.device)  # [C, N]
    width, flat = columns.shape[1], columns.flatten()
    rows, group = _bands(name, p.grid, q)
    rows, inverse = F.pad(_weighed(rows, p), (0, 1))[..., flat], q.inverse
    inflation = inverse.diagonal(dim1=1, dim2=2) * q.hessian.diagonal(dim1=1, dim2=2)  # of an input's variance by those like it
    if inflation.max() * torch.finfo(rows.dtype).eps > DIGITS:
        rows = rows.double()
    inverse = F.pad(inverse, (0, 1, 0, 1))[:, flat][:, :, flat]
    inverse.diagonal(dim1=1, dim2=2)[:, flat == q.hessian.shape[-1]] = 1
    return rows, inverse, group, width


def _columns(grid: BlockGrid) -> Tensor:
    """[C, N]: the flattened input features of each column of blocks; ragged ones are filled up with the index k."""
    across = BlockGrid(grid.shape[1:] or (1,), grid.block[1:] or (1,))
    block_of = expand(torch.arange(across.blocks).view(across.size), across).flatten()  # [k]
    order = block_of.argsort(stable=True)
    counts = block_of.bincount()
    position = torch.arange(len(order)) - (counts.cumsum(0) - counts)[block_of[order]]
    columns = torch.full((across.blocks, int(counts.max())), len(order))
    columns[block_of[order], position] = order
    return columns


def _bands(name: str, grid: BlockGrid, q: Quadratic) -> tuple[Tensor, Tensor]:
    """The best weights without masks as ``[bands, M, k]``, filled up with zero rows, and the Hessian that each band has."""
    best = q.best
    groups, rows, k = best.shape
    height = min(grid.block[0], groups * rows)
    if groups > 1 and rows % height:
        raise NotImplementedError(
            f"{name} {grid.shape}: blocks of {height} rows span groups of {rows} outputs, which see other inputs; "
            f"use a height that divides {rows}"
        )
    padded = F.pad(best, (0, 0, 0, -rows % height)).view(groups, -1, height, k)
    group = torch.arange(groups, device=best.device)[:, None].expand(groups, padded.shape[1])
    return padded.flatten(0, 1), group.flatten()


def _weighed(rows: Tensor, p: Param) -> Tensor:
    """Rows whose plain squared error is the loss's: ``G^1/2 W``, G the outputs' gradients in the band."""
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


def _sweep(rows: Tensor, inverse: Tensor, group: Tensor, *, width: int, stop: int, memory: int) -> tuple[Tensor, Tensor]:
    """What each removal adds and its block, ``[bands, C]`` in the order of removal; those left at the end by what each would add."""
    if (found := native.obs_sweep(rows, inverse, group, width, stop)) is not None:
        return found
    chunk = max(1, memory // (3 * inverse[0].numel() * inverse.itemsize))
    parts = [
        _sweep_torch(rows[i : i + chunk], inverse[group[i : i + chunk]], width, stop)
        for i in tqdm(range(0, len(rows), chunk), desc="bands", disable=None if len(rows) > chunk else True, leave=False)
    ]
    errors, order = zip(*parts, strict=True)
    return torch.cat(errors), torch.cat(order)


def _sweep_torch(rows: Tensor, inverse: Tensor, width: int, stop: int) -> tuple[Tensor, Tensor]:
    bands, height, k = rows.shape
    count, b = k // width, torch.arange(len(rows), device=rows.device)
    inverse, rows = inverse.clone(), rows.clone()
    gone = torch.zeros(bands, count, dtype=torch.bool, device=rows.device)
    errors: list[Tensor] = []
    order: list[Tensor] = []
    eye, failed = torch.eye(width, dtype=rows.dtype, device=rows.device), torch.zeros((), dtype=torch.bool, device=rows.device)
    for step in range(count):
        diagonal = inverse.view(bands, count, width, count, width).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [bands, C, N, N]
        lower, bad = _roots(torch.where(gone[:, :, None, None], eye, diagonal))
        failed |= bad
        if failed.device.type == "cpu" and failed:  # a GPU would wait at each step, so it is asked at the end
            break
        moved = torch.linalg.solve_triangular(lower, rows.view(bands, height, count, width).permute(0, 2, 3, 1), upper=False)
        saliency = moved.square().sum((2, 3)).masked_fill(gone, torch.inf)  # [bands, C]
        if step >= stop:
            rest, which = saliency.sort(dim=1, stable=True)
            errors.append(rest[:, : count - step])
            order.append(which[:, : count - step])
            break
        least, j = saliency.min(1)
        panel = torch.linalg.solve_triangular(lower[b, j], inverse.view(bands, count, width, k)[b, j], upper=False)  # [bands, N, k]
        rows.baddbmm_(moved[b, j].mT, panel, alpha=-1)
        inverse.baddbmm_(panel.mT, panel, alpha=-1)
        gone[b, j] = True
        errors.append(least[:, None])
        order.append(j[:, None])
    if failed:
        raise torch.linalg.LinAlgError(f"the inverse lost positive definiteness in {rows.dtype}")  # type: ignore[attr-defined]
    return torch.cat(errors, 1), torch.cat(order, 1)


def _roots(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of ``[..., N, N]``, and whether any of them failed."""
    if blocks.shape[-1] == 1:
        return blocks.sqrt(), ~(blocks > 0).all()
    factors, info = torch.linalg.cholesky_ex(blocks)
    return factors, info.any()


def _rising(each: Tensor, order: Tensor) -> Tensor:
    """Scores ``[bands, C]`` made strictly rising along each band's order of removal, so that a tie cannot break it."""
    steps, infinity = list(each.gather(1, order).unbind(1)), each.new_full((), torch.inf)
    for i in range(1, len(steps)):
        steps[i] = torch.maximum(steps[i], steps[i - 1].nextafter(infinity))
    return torch.empty_like(each).scatter_(1, order, torch.stack(steps, 1))


def sparsegpt(data: Data, *, sparsity: float, group: int = 128, damping: float = 0.01) -> Scores:
    """SparseGPT in blocks (Frantar & Alistarh 2301.00774): ``tr(W_B ([H^-1]_BB)^-1 W_B^T)`` as its sweep sees it, per element.

    Columns are worked off in groups from left to right; in each the least ``sparsity`` of the blocks goes, and the columns to the right
    make up for it. The cheap alternative to `obs`: one inverse for all rows. Its own masks are those of
    ``allocate.per_bank(scores, sparsity, bank=(-1, group // N))``.

    Args:
        data: with the statistic ``input_gram``; ``output_grad_sq`` and ``output_grad_gram`` weigh as in `obs`.
        sparsity: share of each group that the sweep removes.
        group: columns in a group, rounded to whole blocks.
        damping: share of H's diagonal that is added to it.

    Raises:
        ValueError, NotImplementedError: as `obs`.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(8, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.input_gram],
        ...                                   batches=[torch.randn(32, 8)])
        >>> bp.allocate.per_layer(bp.metric.sparsegpt(data, sparsity=0.5), 0.5)["weight"].keep.shape
        torch.Size([2, 4])
    """
    needs(data, "input_gram", metric="sparsegpt")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity} must be between 0 and 1")
    with torch.no_grad():
        return {name: BlockScore(_sparsegpt(name, p, sparsity, group, damping), p.grid) for name, p in data.items()}


def _sparsegpt(name: str, p: Param, sparsity: float, group: int, damping: float) -> Tensor:
    rows, inverse, of, width = _prepared(name, p, damping)
    count = rows.shape[2] // width
    upper = torch.linalg.cholesky(inverse, upper=True).to(rows.dtype)  # [groups, k, k]; [H^-1]_jj of what is right of j is U_jj^T U_jj
    value = rows.new_empty(len(rows), count)
    elements = block_elements(p.grid, device=rows.device).reshape(len(rows), -1).to(rows)
    step = max(1, group // width)
    for first in range(0, count, step):
        chosen = range(first, last := min(count, first + step))
        corners = [upper[:, j * width : (j + 1) * width, j * width : (j + 1) * width][of] for j in chosen]  # [bands, N, N] each
        moved = [
            torch.linalg.solve_triangular(u, rows[..., j * width : (j + 1) * width], upper=True, left=False)
            for u, j in zip(corners, chosen, strict=True)
        ]
        here = torch.stack([m.square().sum((1, 2)) for m in moved], 1) / elements[:, first:last]
        value[:, first:last] = here
        falls = torch.zeros(here.numel(), dtype=torch.bool, device=rows.device)
        falls[here.flatten().argsort(stable=True)[: round(sparsity * here.numel())]] = True
        falls = falls.view(here.shape)
        for i, j in enumerate(chosen):
            at = slice(j * width, (j + 1) * width)
            error = torch.linalg.solve_triangular(corners[i], rows[..., at], upper=True, left=False) * falls[:, i, None, None]
            rows[..., j * width :] -= error @ upper[:, at, j * width :][of]
    return value.view(p.grid.size).to(p.stats["input_gram"].dtype)
