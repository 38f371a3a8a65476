"""Budgets: functions (scores, sparsity) -> a sparsity for each parameter, of the type `blockprune.core.types.Budget`.

A budget distributes one sparsity over the parameters; give it to an allocator as ``budget=``. Bind options with ``functools.partial``, or
write your own function.
"""

import bisect
import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from blockprune.allocate.ranking import prune_lowest, to_common_device
from blockprune.core.arguments import check_fraction, check_integer, check_number
from blockprune.core.grid import block_elements
from blockprune.core.patterns import resolve_by_name
from blockprune.core.types import Scores, check_scores

V = TypeVar("V", int, float)


def uniform(scores: Scores, sparsity: float) -> dict[str, float]:
    """The same sparsity for every parameter.

    Raises:
        ValueError, TypeError: a sparsity that is no number from 0 to 1.

    Example:
        >>> bp.budgets.uniform({"a": bp.BlockScore(torch.ones(4), bp.BlockGrid((4,), (1,)))}, 0.5)
        {'a': 0.5}
    """
    sparsity = check_fraction("sparsity", sparsity)
    return dict.fromkeys(scores, sparsity)


def erk(scores: Scores, sparsity: float) -> dict[str, float]:
    """Density proportional to (sum of the shape) / (product of the shape), at most 1: small layers stay denser (Evci et al. 1911.11134).

    Raises:
        ValueError, TypeError: a sparsity that is no number from 0 to 1; something else than scores.

    Example:
        >>> small, large = bp.BlockGrid((8, 8), (1, 1)), bp.BlockGrid((64, 64), (1, 1))
        >>> shares = bp.budgets.erk({"s": bp.BlockScore(torch.ones(8, 8), small), "l": bp.BlockScore(torch.ones(64, 64), large)}, 0.9)
        >>> round(shares["s"], 3), round(shares["l"], 3)
        (0.278, 0.91)
    """
    sparsity = check_fraction("sparsity", sparsity)
    check_scores(scores)
    elements = {name: score.grid.elements for name, score in scores.items()}
    raw = {name: sum(score.grid.shape) / elements[name] for name, score in scores.items()}
    keep = (1 - sparsity) * sum(elements.values())
    dense: set[str] = set()
    while True:  # a parameter whose density would exceed 1 stays dense, and the others share what remains
        sparse = [name for name in scores if name not in dense]
        scale = (keep - sum(elements[name] for name in dense)) / sum(raw[name] * elements[name] for name in sparse) if sparse else 0.0
        exceeding = {name for name in sparse if scale * raw[name] > 1}
        if not exceeding:
            return {name: 0.0 if name in dense else 1 - scale * raw[name] for name in scores}
        dense |= exceeding


def owl(
    scores: Scores, sparsity: float, *, m: float = 5.0, lam: float = 0.08, layer_of: Callable[[str], str] | None = None
) -> dict[str, float]:
    """Outlier-weighed layerwise sparsity: parameters with more outliers stay denser (Yin et al. 2310.05175).

    A parameter's outlier ratio is the share of its elements in blocks that score above ``m`` times its mean score. The ratios are scaled to
    a range of 2 ``lam`` and shifted until the mean sparsity by elements is ``sparsity``. A sparsity is clipped to ``sparsity`` +- ``lam``,
    to [0, 1], and to the share of the parameter that is pruned already (score -inf). The shift accounts for the clipping, so the mean stays
    exact unless more than ``sparsity`` is pruned already. (The authors' code does not clip, so that one layer among many may differ from
    ``sparsity`` by up to 2 ``lam``.)

    Args:
        scores: finite and not negative, such as those of `metric.wanda`; blocks that are pruned already count as 0.
        sparsity: the fraction of all elements to remove, 0 to 1.
        m: how many times the mean score an outlier has; 3, 5, 7 or 10 in the paper.
        lam: the largest difference between a parameter's sparsity and ``sparsity``.
        layer_of: (parameter name) -> layer. The parameters of a layer share one outlier ratio, as those of a transformer layer do in the
            paper. By default each parameter has its own.

    Raises:
        ValueError: an option outside its range; scores that are negative, infinite or NaN.
        TypeError: an option that is no number.

    Example:
        >>> from blockprune.allocate.budgets import owl
        >>> grid = bp.BlockGrid((10,), (1,))
        >>> flat, spiky = torch.ones(10), torch.ones(10).index_fill(0, torch.tensor([3]), 100.0)
        >>> shares = owl({"flat": bp.BlockScore(flat, grid), "spiky": bp.BlockScore(spiky, grid)}, 0.7)
        >>> round(shares["flat"], 3), round(shares["spiky"], 3)
        (0.78, 0.62)
    """
    sparsity = check_fraction("sparsity", sparsity)
    m, lam = check_number("m", m, finite=False), check_number("lam", lam, finite=False)
    if not m > 0 or not 0 <= lam <= 1:
        raise ValueError(f"owl needs m={m!r} above 0 (such as 5 times the mean score) and lam={lam!r} from 0 to 1 (such as 0.08)")
    _check_rankable(scores)
    members: dict[str, list[str]] = {}
    for name in scores:
        members.setdefault(layer_of(name) if layer_of else name, []).append(name)
    ratio: dict[str, float] = {}
    for names in members.values():
        ratio |= dict.fromkeys(names, _outlier_ratio(scores, names, m))
    least, most = min(ratio.values(), default=0.0), max(ratio.values(), default=0.0)
    unshifted = {name: -2 * lam * (r - least) / (most - least) if most > least else 0.0 for name, r in ratio.items()}
    low = {name: max(0.0, sparsity - lam, _pruned_share(scores, name)) for name in scores}
    high = {name: max(low[name], min(1.0, sparsity + lam)) for name in scores}
    return _shifted_to_mean(scores, sparsity, unshifted, low, high)


def _outlier_ratio(scores: Scores, names: list[str], m: float) -> float:
    """The share of elements in blocks that score above m times the mean (equation 1 of the paper)."""
    for name in names:
        value = scores[name].value
        if invalid := int(value.isposinf().sum() + ((value < 0) & ~value.isneginf()).sum()):
            raise ValueError(
                f"{name}: owl compares scores with their mean, and {invalid} of the scores {tuple(value.shape)} are negative or infinite; "
                "use a metric that gives neither, such as wanda"
            )
    scores = to_common_device({name: scores[name] for name in names})
    value = torch.cat([score.value.flatten().double().clamp_min(0) for score in scores.values()])  # blocks that are pruned already: 0
    elements = torch.cat([block_elements(scores[name].grid, device=value.device).flatten() for name in names])
    mean = float((value * elements).sum()) / int(elements.sum())
    return int(elements[value > m * mean].sum()) / int(elements.sum())


def _pruned_share(scores: Scores, name: str) -> float:
    """The share of a parameter's elements that is pruned already."""
    value, grid = scores[name].value, scores[name].grid
    return int((block_elements(grid, device=value.device) * value.isneginf()).sum()) / grid.elements


def _shifted_to_mean(
    scores: Scores, mean: float, unshifted: Mapping[str, float], low: Mapping[str, float], high: Mapping[str, float]
) -> dict[str, float]:
    """``unshifted`` plus one number, clipped to [low, high], so that the mean weighted by elements is ``mean``, or as close as possible."""

    def shifted(shift: float) -> dict[str, float]:
        return {name: min(max(unshifted[name] + shift, low[name]), high[name]) for name in scores}

    def removed(shift: float) -> float:
        return sum(s * scores[name].grid.elements for name, s in shifted(shift).items())

    to_remove = mean * sum(score.grid.elements for score in scores.values())
    corners = sorted({bound[name] - unshifted[name] for bound in (low, high) for name in scores})  # `removed` is linear between two corners
    after = bisect.bisect_left(corners, to_remove, key=removed)
    if after in {0, len(corners)}:
        return shifted(corners[max(0, after - 1)]) if corners else {}
    left, right = corners[after - 1], corners[after]
    return shifted(left + (right - left) * (to_remove - removed(left)) / (removed(right) - removed(left)))


def lagrangian(
    scores: Scores,
    sparsity: float,
    *,
    cost: Mapping[str, float] | None = None,
    relative: bool = True,
    max_sparsity: float | Mapping[str, float] = 0.9,
    min_keep: int | Mapping[str, int] = 0,
) -> dict[str, float]:
    """The sparsities that remove the least error for their cost (Everett 1963, 10.1287/opre.11.3.399).

    Blocks of all parameters are pruned in ascending order of their error per cost, until the share ``sparsity`` of the whole *cost* is
    removed, or the closest that whole blocks allow. The result says what share of each parameter's elements that is, and with it
    `allocate.per_layer` prunes the same blocks. Unless a limit applies, and if errors add up, no other blocks of the same cost have a lower
    error. Blocks that are pruned already (score -inf) count as removed, whatever the limits.

    Args:
        scores: error per element: multiplied by a block's elements, what pruning the block adds to the error.
        sparsity: the fraction of the cost to remove, 0 to 1.
        cost: the cost of one element, by parameter name or pattern, for every parameter; 1 by default, so that elements are counted. Give
            the rows that it multiplies to count multiplications, or a measured time divided by the elements.
        relative: divide the errors of each parameter by their total. False compares the errors as they are, which suits errors of one
            quantity, such as the loss.
        max_sparsity: no parameter loses more than this fraction; a number, or a mapping by name or pattern.
        min_keep: the number of blocks that every parameter keeps at least; a number, or a mapping by name or pattern.

    Raises:
        ValueError: a sparsity that the limits do not allow, a fraction outside [0, 1], a cost that is not positive, NaN scores, and,
            if relative, errors whose total is negative.
        KeyError: a name or pattern that matches no parameter, a parameter without a cost.

    Example:
        >>> from blockprune.allocate.budgets import lagrangian
        >>> grid = bp.BlockGrid((4,), (1,))
        >>> low, high = bp.BlockScore(torch.tensor([1.0, 2.0, 3.0, 4.0]), grid), bp.BlockScore(torch.tensor([5.0, 6.0, 7.0, 82.0]), grid)
        >>> lagrangian({"low": low, "high": high}, 0.5)
        {'low': 0.25, 'high': 0.75}
        >>> lagrangian({"low": low, "high": high}, 0.5, relative=False, max_sparsity=1)
        {'low': 1.0, 'high': 0.0}
        >>> masks = bp.allocate.per_layer({"low": low, "high": high}, 0.5, budget=partial(lagrangian, cost={"low": 1, "high": 2}))
        >>> masks["low"].keep.tolist(), masks["high"].keep.tolist()
        ([True, True, True, True], [False, False, False, True])
    """
    sparsity = check_fraction("sparsity", sparsity)
    check_scores(scores)
    caps, min_blocks = layer_limits(scores, max_sparsity, min_keep)
    if not scores:
        return {}
    blocks = [score.grid.blocks for score in scores.values()]
    error_per_cost, elements, costs = block_costs(scores, cost=cost, relative=relative)
    prunable, removable_cost = [], 0.0
    parts = zip(scores, *(x.split(blocks) for x in (error_per_cost, elements, costs)), strict=True)
    for name, error_part, elements_part, costs_part in parts:
        mask, most_elements = _prunable(error_part, elements_part, caps[name], min_blocks[name])
        prunable.append(mask)
        removable_cost += most_elements * float(costs_part[0] / elements_part[0])
    total = float(costs.sum())
    if sparsity * total > removable_cost * (1 + 1e-9):
        raise ValueError(
            f"sparsity={sparsity:g} cannot be met: max_sparsity={max_sparsity!r} and min_keep={min_keep!r} allow to remove at most "
            f"{removable_cost / total:.4g} of the cost; use a lower sparsity or looser limits (max_sparsity=1, min_keep=0)"
        )
    pruned, candidates = error_per_cost == -math.inf, torch.cat(prunable)
    pruned[candidates] |= prune_lowest(error_per_cost[candidates], costs[candidates], sparsity * total)
    removed = (elements * pruned).split(blocks)
    return {name: int(part.sum()) / score.grid.elements for (name, score), part in zip(scores.items(), removed, strict=True)}


def _prunable(score: Tensor, elements: Tensor, max_sparsity: float, min_keep: int) -> tuple[Tensor, float]:
    """The blocks of a parameter that the limits allow to prune, ``[blocks]``, and the most elements that they allow to remove.

    The second may be more than the elements of the first: a limit of 50 % counts in full, even if no whole blocks add up to it.
    """
    pruned_already, most = score == -math.inf, max_sparsity * int(elements.sum())
    beyond_min_keep = prune_lowest(score, elements.new_ones(1).expand(len(score)), len(score) - min_keep)
    prunable = pruned_already | (beyond_min_keep & prune_lowest(score, elements, most, round_down=True))
    return prunable, max(int(elements[pruned_already].sum()), min(most, int(elements[beyond_min_keep].sum())))


def loss_weighted(
    scores: Scores, sparsity: float, *, max_sparsity: float | Mapping[str, float] = 0.9, margin: float = 0.0
) -> dict[str, float]:
    """The share that each parameter loses when all blocks of the model are ranked together.

    It is `lagrangian` of errors as they are, for scores that are errors of one quantity in all parameters, such as the loss: `metric.obs`
    weighted by output gradients, or `metric.fisher`. The limit prevents empty layers, which cut the network; a sum of errors does not
    reflect that.

    Args:
        scores: comparable between parameters.
        sparsity: the fraction of all elements to remove, 0 to 1.
        max_sparsity: no parameter loses more than this fraction; a number, or a mapping by name or pattern.
        margin: if ``max_sparsity`` is a number below ``sparsity + margin``, this sum is the limit instead; 0 changes nothing.

    Raises:
        ValueError, KeyError: as `lagrangian`.

    Example:
        >>> from blockprune.allocate.budgets import loss_weighted
        >>> grid = bp.BlockGrid((4,), (1,))
        >>> low, high = bp.BlockScore(torch.tensor([1.0, 2.0, 3.0, 4.0]), grid), bp.BlockScore(torch.tensor([5.0, 6.0, 7.0, 8.0]), grid)
        >>> loss_weighted({"low": low, "high": high}, 0.5)
        {'low': 0.75, 'high': 0.25}
        >>> loss_weighted({"low": low, "high": high}, 0.5, max_sparsity=0.5, margin=0.25)
        {'low': 0.75, 'high': 0.25}
    """
    sparsity = check_fraction("sparsity", sparsity)
    if margin and not isinstance(max_sparsity, Mapping):
        max_sparsity = max(max_sparsity, min(1.0, sparsity + margin))
    return lagrangian(scores, sparsity, relative=False, max_sparsity=max_sparsity)


def block_costs(scores: Scores, *, cost: Mapping[str, float] | None = None, relative: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The error per cost, the elements and the cost of every block of the model, parameter after parameter, ``[blocks]`` each.

    Options as in `lagrangian`. The error of a block that is pruned already stays -inf and is part of no total.

    Raises:
        ValueError, KeyError: as `lagrangian`.

    Example:
        >>> from blockprune.allocate.budgets import block_costs
        >>> score = bp.BlockScore(torch.tensor([1.0, 4.0]), bp.BlockGrid((3,), (2,)))
        >>> block_costs({"w": score}, cost={"w": 10})
        (tensor([0.1000, 0.4000], dtype=torch.float64), tensor([2, 1]), tensor([20., 10.], dtype=torch.float64))
    """
    _check_rankable(scores)
    element_cost = dict.fromkeys(scores, 1.0) if cost is None else resolve_by_name(cost, scores, what="cost")
    errors_per_cost: list[Tensor] = []
    elements: list[Tensor] = []
    costs: list[Tensor] = []
    for name, score in to_common_device(scores).items():
        price = check_number(f"cost[{name!r}]", element_cost[name], "a positive number, the cost of one element", above=0)
        value = score.value.flatten().double()  # [blocks]
        size = block_elements(score.grid, device=value.device).flatten()
        total = float((value * size)[value.isfinite()].sum()) if relative else 1.0
        if total < 0:
            raise ValueError(
                f"{name}: the errors {tuple(score.value.shape)} add up to {total:g}, and a share of a negative total has no meaning; "
                "give scores that are errors, 0 or more, or relative=False"
            )
        errors_per_cost.append(value / (total or 1.0) / price)
        elements.append(size)
        costs.append(size.double() * price)
    return torch.cat(errors_per_cost), torch.cat(elements), torch.cat(costs)


def _check_rankable(scores: Scores) -> None:
    check_scores(scores)
    for name, score in scores.items():
        if nans := int(score.value.isnan().sum()):
            raise ValueError(f"{name}: {nans} of the scores {tuple(score.value.shape)} are NaN and cannot be ranked; check the metric")


def layer_limits(
    scores: Scores, max_sparsity: float | Mapping[str, float] | None, min_keep: int | Mapping[str, int]
) -> tuple[dict[str, float], dict[str, int]]:
    """The largest sparsity of each parameter and the number of blocks that it keeps at least, from numbers or mappings.

    A mapping is by name or pattern. A parameter that it does not name has no limit.

    Raises:
        ValueError: a fraction outside [0, 1], a min_keep below 0.
        KeyError: a name or pattern that matches no parameter.

    Example:
        >>> from blockprune.allocate.budgets import layer_limits
        >>> layer_limits({"w": bp.BlockScore(torch.ones(4), bp.BlockGrid((4,), (1,)))}, None, 1)
        ({'w': 1.0}, {'w': 1})
    """
    caps, min_blocks = _by_name(scores, max_sparsity, "max_sparsity", 1.0), _by_name(scores, min_keep, "min_keep", 0)
    for name in scores:
        caps[name] = check_fraction(f"max_sparsity of {name}", caps[name])
        try:
            min_blocks[name] = check_integer("min_keep", min_blocks[name], lowest=0)
        except (TypeError, ValueError):
            raise ValueError(f"min_keep={min_blocks[name]!r} of {name} must be a number of blocks, 0 or more") from None
    return caps, min_blocks


def _by_name(scores: Scores, value: V | Mapping[str, V] | None, what: str, default: V) -> dict[str, V]:
    if isinstance(value, Mapping):
        return resolve_by_name(value, scores, what=what, default=default)
    return dict.fromkeys(scores, default if value is None else value)
