"""The third stage: scores and a sparsity -> masks.

All allocators prune the blocks with the lowest scores, until a share of the *elements* is removed. They differ in which blocks are compared
with each other. Such a set of blocks is called a bank:

    per_layer    all blocks of a parameter
    per_model    all blocks of the model
    per_row      the blocks of one row of blocks
    per_columns  the blocks of a range of input columns
    per_bank     a tile of blocks, of any size
    n_of_m       m consecutive blocks, of which the same number is pruned everywhere

budgets.py distributes one sparsity over the parameters, and ranking.py rounds a number of elements to whole blocks.
"""

import math
import warnings
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from blockprune.allocate.budgets import layer_limits, uniform
from blockprune.allocate.ranking import prune_lowest, select_pruned, to_common_device
from blockprune.allocate.shared_masks import Coupled, SharedMask, masks_of, shared_masks
from blockprune.core.arguments import check_counts, check_fraction, check_function, check_integer, check_sparsity
from blockprune.core.grid import BlockGrid, int_tuple, tiles, untile
from blockprune.core.patterns import matching_keys, resolve_by_name
from blockprune.core.types import Budget, Masks, Scores, Sparsity, check_scores

MaxSparsity = float | Mapping[str, float] | None
MinKeep = int | Mapping[str, int]


def per_layer(
    scores: Scores,
    sparsity: Sparsity,
    *,
    budget: Budget = uniform,
    max_sparsity: MaxSparsity = None,
    min_keep: MinKeep = 0,
    coupled: Coupled = (),
) -> Masks:
    """Prune the blocks with the lowest scores of each parameter.

    Args:
        scores: one number per block.
        sparsity: the fraction of the elements to remove, 0 to 1; or a mapping by parameter name or glob pattern, which must name every
            parameter. The name itself has priority, then the first pattern that matches, then "*".
        budget: how one sparsity is distributed over the parameters, such as `budgets.uniform`, `budgets.erk` or your own.
        max_sparsity: no parameter loses more than this fraction; a number, or a mapping by name or pattern.
        min_keep: the number of blocks that every parameter keeps at least; a number, or a mapping by name or pattern.
        coupled: sets of names or patterns. The parameters of a set share one mask, which is made from the sum of their scores. Or hidden
            axes, as `find_axes` returns them: a unit (or a head) is pruned in all weights, biases and norms that have it, by the mean
            score of its elements, and the sparsity is the share of the units. Choose their blocks with ``where=bp.units(axes)``.

    Raises:
        ValueError: a sparsity outside [0, 1] or NaN, NaN scores, parameters that cannot share a mask.
        TypeError: a sparsity that is neither a number nor a mapping; something else than scores, such as a metric.
        KeyError: a name or pattern that matches no parameter, a mapping of sparsities without a key for some parameter.

    Example:
        >>> score = bp.BlockScore(torch.tensor([[1.0, 4.0], [3.0, 2.0]]), bp.BlockGrid((4, 4), (2, 2)))
        >>> bp.allocate.per_layer({"w": score}, 0.5)["w"].keep
        tensor([[False,  True],
                [ True, False]])
    """
    return per_bank(scores, sparsity, bank=(), budget=budget, max_sparsity=max_sparsity, min_keep=min_keep, coupled=coupled)


def per_row(
    scores: Scores,
    sparsity: Sparsity,
    *,
    budget: Budget = uniform,
    max_sparsity: MaxSparsity = None,
    min_keep: MinKeep = 0,
    coupled: Coupled = (),
) -> Masks:
    """Prune the blocks with the lowest scores of each row of blocks, so that all rows are equally sparse.

    A row is pruned in whole blocks, so few blocks a row reach few sparsities: a row of two blocks 0, 50 or 100 %.

    Args:
        scores, sparsity, budget, max_sparsity, min_keep, coupled: as in `per_layer`.

    Raises:
        ValueError, TypeError, KeyError: as `per_layer`; hidden axes as ``coupled``.

    Example:
        >>> score = bp.BlockScore(torch.tensor([[1.0, 4.0], [3.0, 2.0]]), bp.BlockGrid((4, 4), (2, 2)))
        >>> bp.allocate.per_row({"w": score}, 0.5)["w"].keep
        tensor([[False,  True],
                [ True, False]])
    """
    return per_bank(scores, sparsity, bank=(1,), budget=budget, max_sparsity=max_sparsity, min_keep=min_keep, coupled=coupled)


def per_bank(
    scores: Scores,
    sparsity: Sparsity,
    *,
    bank: Sequence[int],
    budget: Budget = uniform,
    max_sparsity: MaxSparsity = None,
    min_keep: MinKeep = 0,
    coupled: Coupled = (),
) -> Masks:
    """Prune the blocks with the lowest scores of each bank, a tile of blocks, so that all tiles are equally sparse.

    Source: Cao et al., FPGA 2019, 10.1145/3289602.3293898.

    Args:
        scores, sparsity: as in `per_layer`.
        bank: blocks along each leading axis: ``(1, 8)`` is 8 blocks of one row. -1, or an axis that is left out, is taken whole: ``()`` is
            the whole parameter, as in `per_layer`.
        budget, max_sparsity, min_keep, coupled: as in `per_layer`.

    Raises:
        ValueError, TypeError, KeyError: as `per_layer`; a bank that is no sequence of integers or does not fit the blocks of a parameter.

    Example:
        >>> score = bp.BlockScore(torch.tensor([[1.0, 2.0, 8.0, 9.0]]), bp.BlockGrid((1, 4), (1, 1)))
        >>> bp.allocate.per_bank({"w": score}, 0.5, bank=(1, 2))["w"].keep
        tensor([[False,  True, False,  True]])
    """
    bank, all_shared = int_tuple("bank", bank), shared_masks(scores, coupled)
    if bank and (on_axis := next((shared for shared in all_shared if shared.axis), None)):
        raise ValueError(
            f"coupled has the hidden axis of {on_axis.names[0]}, whose units are in no rows or banks; use per_layer or per_model"
        )
    sparsities = _sparsity_by_parameter(scores, sparsity, budget)
    caps, min_blocks = layer_limits(scores, max_sparsity, min_keep)
    keep: dict[SharedMask, Tensor] = {}
    for shared in all_shared:
        wanted = shared.sparsity(sparsities)
        if bank == (1,) and 0 < wanted < 1 and shared.score[0].numel() == 1 < len(shared.score):
            warnings.warn(
                f"{shared.names[0]}: a row is a single block, which is pruned or kept as a whole: all of them where the sparsity is "
                "above 0.5, else none. Prune smaller blocks, or compare the blocks of the whole parameter (bp.allocate.per_layer)",
                stacklevel=2,
            )
        prune = _prune_in_banks(shared, wanted, bank)
        if max_sparsity is not None:
            prune &= _prune_in_banks(shared, min(caps[name] for name in shared.names), bank, round_down=True)
        if any(min_blocks[name] for name in shared.names):
            prune &= ~_kept_by(_Limits(dict.fromkeys(shared.names, 1.0), min_blocks), shared)
        keep[shared] = ~prune
    return masks_of(scores, keep)


def per_columns(scores: Scores, sparsity: Sparsity, *, columns: int = 128) -> Masks:
    """Prune the blocks with the lowest scores of each range of input columns, over all rows, as SparseGPT does.

    Args:
        scores: one number per block, of parameters with two axes or more.
        sparsity: as in `per_layer`.
        columns: input columns in a range, rounded down to whole blocks (at least one). The input columns of a convolution are its channels
            times its kernel positions.

    Raises:
        ValueError, TypeError, KeyError: as `per_layer`; a parameter with one axis, or columns below 1.

    Example:
        >>> score = bp.BlockScore(torch.tensor([[1.0, 2.0, 8.0, 9.0]]), bp.BlockGrid((1, 4), (1, 1)))
        >>> bp.allocate.per_columns({"w": score}, 0.5, columns=2)["w"].keep
        tensor([[False,  True, False,  True]])
    """
    (columns,) = check_counts(1, columns=columns)
    check_scores(scores)
    for name, score in scores.items():
        if len(score.grid.shape) < 2:
            raise ValueError(f"{name} {score.grid.shape} has no input columns; leave it out, or use per_layer")
    sparsities = _sparsity_by_parameter(scores, sparsity, uniform)
    keep: dict[SharedMask, Tensor] = {}
    for shared in shared_masks(scores, ()):
        grid = scores[shared.names[0]].grid
        width = min(math.prod(grid.size[1:]), max(1, columns // math.prod(grid.block[1:])))  # blocks of a range, in one row of blocks
        flat = attrs.evolve(shared, score=shared.score.flatten(1), elements=shared.elements.flatten(1))
        keep[shared] = ~_prune_in_banks(flat, shared.sparsity(sparsities), (-1, width)).view(grid.size)
    return masks_of(scores, keep)


def n_of_m(scores: Scores, sparsity: Sparsity, *, m: int, axis: int = 1, coupled: Coupled = ()) -> Masks:
    """Keep the n blocks with the highest scores of every m consecutive blocks along an axis, where n = (1 - sparsity) m.

    2:4 is m=4 at a sparsity of 0.5 (Mishra et al. 2104.08378).

    Args:
        scores: one number per block.
        sparsity: as in `per_layer`; it must keep a whole number of every m blocks.
        m: consecutive blocks of which n are kept; it must divide the number of blocks along the axis.
        axis: 1 is the input axis of a Linear.
        coupled: as in `per_layer`.

    Raises:
        ValueError, TypeError, KeyError: as `per_layer`; m that does not divide the axis, or a sparsity that keeps a fraction of a block.

    Example:
        >>> score = bp.BlockScore(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), bp.BlockGrid((1, 4), (1, 1)))
        >>> bp.allocate.n_of_m({"w": score}, 0.5, m=4)["w"].keep
        tensor([[False,  True,  True, False]])
    """
    (m,) = check_counts(1, meaning="a whole number of blocks, at least 1", m=m)
    axis = check_integer("axis", axis, "a whole number, such as 1 for the input axis of a Linear")
    all_shared = shared_masks(scores, coupled)
    sparsities = _sparsity_by_parameter(scores, sparsity, uniform)
    for shared in all_shared:
        _check_n_of_m(shared, shared.sparsity(sparsities), m, axis)
    keep: dict[SharedMask, Tensor] = {}
    for shared in all_shared:
        bank = [1] * shared.score.ndim
        bank[axis] = m
        ones = shared.elements.new_ones(()).expand(shared.score.shape)  # count blocks, not their elements, as ragged ones have fewer
        counted = attrs.evolve(shared, names=shared.names[:1], elements=ones, parameter_elements=(shared.score.numel(),))
        keep[shared] = ~_prune_in_banks(counted, round(shared.sparsity(sparsities) * m) / m, bank)
    return masks_of(scores, keep)


def _check_n_of_m(shared: SharedMask, sparsity: float, m: int, axis: int) -> None:
    name, blocks = shared.names[0], tuple(shared.score.shape)
    if not -len(blocks) <= axis < len(blocks):
        raise ValueError(f"{name}: axis={axis} does not exist in {blocks} blocks; use 0 to {len(blocks) - 1}")
    if blocks[axis] % m:
        raise ValueError(
            f"{name}: m={m} does not divide the {blocks[axis]} blocks along axis {axis} of {blocks}; choose a divisor, or "
            "leave this weight out with `excluding`"
        )
    if not math.isclose(n := (1 - sparsity) * m, round(n), abs_tol=1e-6):
        raise ValueError(
            f"{name}: n_of_m(m={m}) keeps a whole number of every {m} blocks, but sparsity={sparsity:g} would keep {n:g}; "
            f"use a multiple of {1 / m:g}"
        )


def per_model(
    scores: Scores, sparsity: Sparsity, *, max_sparsity: MaxSparsity = None, min_keep: MinKeep | None = None, coupled: Coupled = ()
) -> Masks:
    """Prune the blocks with the lowest scores of the whole model, so that the scores decide how much each parameter loses.

    By default no parameter loses more than 90 % or its last block as long as other parameters have blocks left to prune, because an empty
    layer cuts the network. These default limits are exceeded only if the sparsity cannot be reached otherwise. Limits that you give are
    never exceeded; the result is then the closest sparsity that they allow.

    Args:
        scores: one number per block, comparable between parameters.
        sparsity: the fraction of all elements to remove; or a mapping by name or pattern as in `per_layer`, in which the parameters that
            share a key are ranked together.
        max_sparsity: no parameter loses more than this fraction; a number, or a mapping by name or pattern; 1 is no limit.
        min_keep: the number of blocks that every parameter keeps at least; a number, or a mapping by name or pattern; 0 is no limit.
        coupled: as in `per_layer`.

    Raises:
        ValueError, TypeError, KeyError: as `per_layer`; coupled parameters with different sparsities.

    Example:
        >>> grid = bp.BlockGrid((4,), (1,))
        >>> low, high = bp.BlockScore(torch.tensor([1.0, 2.0, 3.0, 4.0]), grid), bp.BlockScore(torch.tensor([5.0, 6.0, 7.0, 8.0]), grid)
        >>> masks = bp.allocate.per_model({"low": low, "high": high}, 0.5)
        >>> masks["low"].keep.tolist(), masks["high"].keep.tolist()
        ([False, False, False, True], [False, True, True, True])
    """
    check_scores(scores)
    all_shared = shared_masks(to_common_device(scores), coupled)
    sparsities = _sparsity_by_parameter(scores, sparsity, uniform)
    hard = _Limits(*layer_limits(scores, max_sparsity, 0 if min_keep is None else min_keep))
    soft = _Limits(*layer_limits(scores, 0.9 if max_sparsity is None else None, 1 if min_keep is None else 0))
    key_of = matching_keys(sparsity, scores) if isinstance(sparsity, Mapping) else dict.fromkeys(scores, "*")
    by_key: dict[object, list[SharedMask]] = {}
    for shared in all_shared:
        keys = {key_of[name] for name in shared.names}
        if len(keys) > 1:
            raise ValueError(f"coupled parameters {shared.names} have different sparsities; give them one key")
        by_key.setdefault(keys.pop(), []).append(shared)
    keep: dict[SharedMask, Tensor] = {}
    for ranked_together in by_key.values():
        budget = sum(shared.sparsity(sparsities) * shared.total for shared in ranked_together)
        keep |= _rank_together(ranked_together, budget, hard, soft)
    return masks_of(scores, keep)


@attrs.frozen
class _Limits:
    """The most that parameters may lose, by name."""

    max_sparsity: Mapping[str, float]
    min_keep: Mapping[str, int]  # blocks


def _rank_together(all_shared: Sequence[SharedMask], budget: float, hard: _Limits, soft: _Limits) -> dict[SharedMask, Tensor]:
    """The blocks to keep ``[*size]``, if all blocks are compared with each other.

    Blocks are pruned up to the budget, a number of elements, or as far as the hard limits allow. Those that the soft limits keep are pruned
    after all others.
    """
    score = torch.cat([shared.score.flatten() for shared in all_shared])
    elements = _concatenated([shared.elements.flatten() for shared in all_shared])
    kept_hard, kept_soft = (torch.cat([_kept_by(limits, shared).flatten() for shared in all_shared]) for limits in (hard, soft))
    free = (score == -math.inf) | ~(kept_soft | kept_hard)  # limits do not keep blocks that are pruned already
    prune = torch.zeros_like(free)
    prune[free] = prune_lowest(score[free], _select(elements, free), budget)
    if (remaining := budget - int(_select(elements, free).sum())) > 0:
        last = kept_soft & ~(free | kept_hard)
        prune[last] = prune_lowest(score[last], _select(elements, last), remaining)
    parts = prune.split([shared.score.numel() for shared in all_shared])
    return {shared: ~part.view(shared.score.shape) for shared, part in zip(all_shared, parts, strict=True)}


def _concatenated(elements: Sequence[Tensor]) -> Tensor:
    """``torch.cat``; if all blocks of all parameters have the same size, a view of one number, for which `prune_lowest` is faster."""
    firsts = [e[:1] for e in elements]
    equal = all(e.stride(0) == 0 for e in elements) and all(torch.equal(first, firsts[0]) for first in firsts)
    return firsts[0].expand(sum(map(len, elements))) if equal else torch.cat([*elements])


def _select(elements: Tensor, mask: Tensor) -> Tensor:
    """``elements[mask]``; a view of one number stays one."""
    return elements[: int(mask.sum())] if elements.stride(0) == 0 else elements[mask]


def _sparsity_by_parameter(scores: Scores, sparsity: Sparsity, budget: Budget) -> dict[str, float]:
    """The sparsity of each parameter."""
    sparsity = check_sparsity(sparsity)
    if isinstance(sparsity, Mapping):
        if budget is not uniform:
            raise ValueError("sparsity as a mapping already gives each parameter its own; give one number for budget= to distribute")
        return resolve_by_name(sparsity, scores, what="sparsity")
    check_function("budget", budget, "(scores, sparsity) -> sparsities by parameter name, such as bp.budgets.lagrangian")
    given = budget(scores, sparsity)
    if not isinstance(given, Mapping):
        raise TypeError(f"budget returned a {type(given).__name__}; it must return a mapping from parameter names to sparsities")
    sparsities = dict(given)
    for name in scores:
        if name not in sparsities:
            raise KeyError(f"budget returned no sparsity for {name!r}; it must return one for every parameter")
        sparsities[name] = check_fraction(f"the sparsity that budget returned for {name}", sparsities[name])
    return sparsities


def _kept_by(limits: _Limits, shared: SharedMask) -> Tensor:
    """The blocks that the limits keep ``[*size]``: those with the highest scores."""
    score, elements = shared.score.flatten(), shared.elements.flatten()
    prunable = prune_lowest(score, elements, min(limits.max_sparsity[name] for name in shared.names) * shared.total, round_down=True)
    if min_keep := max(limits.min_keep[name] for name in shared.names):
        prunable &= prune_lowest(score, elements.new_ones(()).expand(elements.shape), score.numel() - min_keep)
    return ~prunable.view(shared.score.shape)


def _prune_in_banks(shared: SharedMask, sparsity: float, bank: Sequence[int], *, round_down: bool = False) -> Tensor:
    """The blocks with the lowest scores of every bank, a tile of blocks; ``[*size]``, True = pruned."""
    try:
        grid = BlockGrid(tuple(shared.score.shape), bank)
    except (ValueError, TypeError) as error:
        raise type(error)(
            f"{shared.names[0]}: bank={tuple(bank)}, a tile of blocks, does not fit {tuple(shared.score.shape)} blocks: {error}"
        ) from None
    if grid.blocks == 1:
        elements = shared.elements.flatten()
        return prune_lowest(shared.score.flatten(), elements, sparsity * shared.total, round_down=round_down).view(shared.score.shape)
    score = tiles(shared.score, grid, fill=math.inf)  # [banks, blocks of a bank]; the padding ranks last and has no elements
    elements = tiles(shared.elements, grid, fill=0)
    order = score.argsort(dim=1, stable=True)
    pruned = select_pruned(elements.gather(1, order), sparsity * elements.sum(1, keepdim=True).double(), round_down=round_down)
    return untile(torch.empty_like(pruned).scatter_(1, order, pruned), grid)
