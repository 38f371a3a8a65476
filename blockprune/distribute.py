"""How one sparsity is spread over the parameters: (scores, sparsity) -> a sparsity for each."""

import bisect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from blockprune.blocks import block_elements
from blockprune.names import key_for, lookup
from blockprune.ranking import drop_lowest, together
from blockprune.types import Scores

V = TypeVar("V", int, float)


def uniform(scores: Scores, sparsity: float) -> dict[str, float]:
    """Every parameter the same sparsity.

    Example:
        >>> bp.allocate.uniform({"a": bp.BlockScore(torch.ones(4), bp.BlockGrid((4,), (1,)))}, 0.5)
        {'a': 0.5}
    """
    return dict.fromkeys(scores, sparsity)


def erk(scores: Scores, sparsity: float) -> dict[str, float]:
    """Density proportional to (sum of the shape) / (product of the shape), at most 1: small layers stay denser (Evci et al. 1911.11134).

    Example:
        >>> small, large = bp.BlockGrid((8, 8), (1, 1)), bp.BlockGrid((64, 64), (1, 1))
        >>> out = bp.allocate.erk({"s": bp.BlockScore(torch.ones(8, 8), small), "l": bp.BlockScore(torch.ones(64, 64), large)}, 0.9)
        >>> round(out["s"], 3), round(out["l"], 3)
        (0.278, 0.91)
    """
    raw = {name: sum(s.grid.shape) / s.grid.elements for name, s in scores.items()}
    keep = (1 - sparsity) * sum(s.grid.elements for s in scores.values())
    full: set[str] = set()
    while True:  # a layer that would need more than all its weights is full; the others share what is left
        rest = [name for name in scores if name not in full]
        weight = sum(raw[name] * scores[name].grid.elements for name in rest)
        scale = (keep - sum(scores[name].grid.elements for name in full)) / weight if rest else 0.0
        over = {name for name in rest if scale * raw[name] > 1}
        if not over:
            return {name: 0.0 if name in full else 1 - scale * raw[name] for name in scores}
        full |= over


def owl(
    scores: Scores, sparsity: float, *, m: float = 5.0, lam: float = 0.08, groups: Callable[[str], str] | None = None
) -> dict[str, float]:
    """Outlier-weighed layerwise sparsity: parameters with more outliers stay denser, within ``lam`` of the asked (Yin et al. 2310.05175).

    A parameter's outlier ratio is the share of its elements in blocks that score above ``m`` times its mean score. The ratios are
    scaled to a span of 2 ``lam`` and shifted so that the mean by elements is ``sparsity``. What the shift takes out of sparsity ± ``lam``,
    out of [0, 1] or below the share that is pruned already (-inf) is clipped there, and the others make up for it: the mean stays
    exact unless more is pruned already. (The authors' code does not clip, so one layer among many may be up to 2 ``lam`` away.)

    Args:
        scores: finite and not negative, such as `metric.wanda`; pruned blocks count as 0.
        sparsity: fraction of all elements to remove, 0 to 1.
        m: what makes an outlier, in mean scores; 3, 5, 7 or 10 in the paper.
        lam: the farthest that a parameter may be from ``sparsity``.
        groups: (name) -> key; the parameters of one key share one ratio, as those of a transformer layer do in the paper. By
            default each is alone.

    Raises:
        ValueError: an option out of its range; scores that are negative, infinite or NaN.

    Example:
        >>> from blockprune.distribute import owl
        >>> grid = bp.BlockGrid((10,), (1,))
        >>> flat, spiky = torch.ones(10), torch.ones(10).index_fill(0, torch.tensor([3]), 100.0)
        >>> out = owl({"flat": bp.BlockScore(flat, grid), "spiky": bp.BlockScore(spiky, grid)}, 0.7)
        >>> round(out["flat"], 3), round(out["spiky"], 3)
        (0.78, 0.62)
    """
    check_fraction("sparsity", sparsity)
    if not m > 0 or not 0 <= lam <= 1:
        raise ValueError(f"owl needs m={m!r} above 0 (5 mean scores, say) and lam={lam!r} from 0 to 1 (0.08, say)")
    _check_ranks(scores)
    members: dict[str, list[str]] = {}
    for name in scores:
        members.setdefault(groups(name) if groups else name, []).append(name)
    ratio: dict[str, float] = {}
    for names in members.values():
        ratio |= dict.fromkeys(names, _outliers(scores, names, m))
    least, most = min(ratio.values(), default=0.0), max(ratio.values(), default=0.0)
    wish = {name: -2 * lam * (r - least) / (most - least) if most > least else 0.0 for name, r in ratio.items()}
    low = {name: max(0.0, sparsity - lam, _pruned(scores, name)) for name in scores}
    high = {name: max(low[name], min(1.0, sparsity + lam)) for name in scores}

    def spread(shift: float) -> dict[str, float]:
        return {name: min(max(wish[name] + shift, low[name]), high[name]) for name in scores}

    def spent(shift: float) -> float:
        return sum(s * scores[name].grid.elements for name, s in spread(shift).items())

    budget = sparsity * sum(s.grid.elements for s in scores.values())
    corners = sorted({bound[name] - wish[name] for bound in (low, high) for name in scores})  # between two of them, `spent` is a line
    after = bisect.bisect_left(corners, budget, key=spent)
    if after in {0, len(corners)}:
        return spread(corners[max(0, after - 1)]) if corners else {}
    left, right = corners[after - 1], corners[after]
    return spread(left + (right - left) * (budget - spent(left)) / (spent(right) - spent(left)))


def lagrangian(
    scores: Scores,
    sparsity: float,
    *,
    cost: Mapping[str, float] | None = None,
    relative: bool = True,
    max_sparsity: float | Mapping[str, float] = 0.9,
    min_keep: int | Mapping[str, int] = 0,
) -> dict[str, float]:
    """What each parameter loses when every block falls whose error per cost is below one multiplier, lambda, for the whole model.

    Lambda is set so that what is removed is the closest to ``sparsity`` of the whole *cost*; the result is in elements, and
    `allocate.per_layer` removes the same blocks. Where no bound holds and errors add up, no other blocks of that cost have a lower
    error (Everett 1963, 10.1287/opre.11.3.399). -inf blocks are pruned already: they count as removed, bound or no bound.

    Args:
        scores: error per element; times the block's elements it is what dropping the block adds to the error.
        sparsity: fraction of the cost to remove, 0 to 1.
        cost: what one element costs, by parameter name or pattern (the name itself wins, then the first pattern that fits; every
            parameter needs one): the rows it multiplies for multiply-adds, a measured time divided by the elements for time. 1 by
            default, which counts parameters.
        relative: divide each parameter's errors by their total, so that every parameter's error is a share of its own; False
            compares them as they are, which suits errors of one quantity, such as the loss.
        max_sparsity: no parameter loses more than this fraction; a number or a mapping by name or pattern.
        min_keep: blocks that every parameter keeps at least; a number or a mapping.

    Raises:
        ValueError: a sparsity that the bounds do not allow, a fraction outside [0, 1], a cost that is not positive, NaN scores, and,
            if relative, errors whose total is negative.
        KeyError: a key that fits no parameter, a parameter without a cost.

    Example:
        >>> from blockprune.distribute import lagrangian
        >>> grid = bp.BlockGrid((4,), (1,))
        >>> low, high = bp.BlockScore(torch.tensor([1.0, 2.0, 3.0, 4.0]), grid), bp.BlockScore(torch.tensor([5.0, 6.0, 7.0, 82.0]), grid)
        >>> lagrangian({"low": low, "high": high}, 0.5)
        {'low': 0.25, 'high': 0.75}
        >>> lagrangian({"low": low, "high": high}, 0.5, relative=False, max_sparsity=1)
        {'low': 1.0, 'high': 0.0}
        >>> masks = bp.allocate.per_layer({"low": low, "high": high}, 0.5, distribute=partial(lagrangian, cost={"low": 1, "high": 2}))
        >>> masks["low"].keep.tolist(), masks["high"].keep.tolist()
        ([True, True, True, True], [False, False, False, True])
    """
    check_fraction("sparsity", sparsity)
    caps, least = clamps(scores, max_sparsity, min_keep)
    if not scores:
        return {}
    rank, elements, price = priced(scores, cost=cost, relative=relative)
    blocks = [score.grid.blocks for score in scores.values()]
    pruned, total = rank == -math.inf, float(price.sum())
    free, reachable = [], 0.0  # the blocks that the bounds let fall; the cost that they let go of
    parts = zip(scores.items(), *(x.split(blocks) for x in (rank, elements, price, pruned)), strict=True)
    for (name, score), value, size, paid, gone in parts:
        cap = caps[name] * score.grid.elements
        spare = drop_lowest(value, size.new_ones(1).expand(len(value)), len(value) - least[name])  # all but min_keep
        free.append(gone | (spare & drop_lowest(value, size, cap, down=True)))
        reachable += max(int(size[gone].sum()), min(cap, int(size[spare].sum()))) * float(paid[0] / size[0])
    if sparsity * total > reachable * (1 + 1e-9):
        raise ValueError(
            f"sparsity={sparsity:g} cannot be met: max_sparsity={max_sparsity!r} and min_keep={min_keep!r} let go of at most "
            f"{reachable / total:.4g} of the cost; ask for that or less, or loosen the bounds (max_sparsity=1, min_keep=0)"
        )
    drop, may = pruned.clone(), torch.cat(free)
    drop[may] |= drop_lowest(rank[may], price[may], sparsity * total)
    fallen = (elements * drop).split(blocks)
    return {name: int(gone.sum()) / score.grid.elements for (name, score), gone in zip(scores.items(), fallen, strict=True)}


def loss_weighted(scores: Scores, sparsity: float, *, max_sparsity: float | Mapping[str, float] = 0.9) -> dict[str, float]:
    """What each parameter loses when all blocks of the model are ranked together: `lagrangian` of errors taken as they are.

    It suits scores of one quantity for all parameters: the loss, in `metric.obs` weighed by output gradients or in `metric.fisher`. The
    bound is there because an emptied layer cuts the network, which no sum of errors sees.

    Args:
        scores: comparable between parameters.
        sparsity: fraction of all elements to remove, 0 to 1.
        max_sparsity: no parameter loses more than this fraction; a number or a mapping by name or pattern.

    Raises:
        ValueError, KeyError: as `lagrangian`.

    Example:
        >>> from blockprune.distribute import loss_weighted
        >>> grid = bp.BlockGrid((4,), (1,))
        >>> low, high = bp.BlockScore(torch.tensor([1.0, 2.0, 3.0, 4.0]), grid), bp.BlockScore(torch.tensor([5.0, 6.0, 7.0, 8.0]), grid)
        >>> loss_weighted({"low": low, "high": high}, 0.5)
        {'low': 0.75, 'high': 0.25}
    """
    return lagrangian(scores, sparsity, relative=False, max_sparsity=max_sparsity)


def priced(scores: Scores, *, cost: Mapping[str, float] | None = None, relative: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Every block of the model, parameter after parameter: its error per cost, its elements, and its cost, ``[blocks]`` each.

    Options as in `lagrangian`. A pruned block (-inf) stays -inf and is in no total.

    Raises:
        ValueError, KeyError: as `lagrangian`.

    Example:
        >>> from blockprune.distribute import priced
        >>> score = bp.BlockScore(torch.tensor([1.0, 4.0]), bp.BlockGrid((3,), (2,)))
        >>> priced({"w": score}, cost={"w": 10})
        (tensor([0.1000, 0.4000], dtype=torch.float64), tensor([2, 1]), tensor([20., 10.], dtype=torch.float64))
    """
    _check_ranks(scores)
    each = dict.fromkeys(scores, 1.0) if cost is None else lookup(cost, scores, what="cost", default=1.0)
    ranks, sizes, prices = [], [], []
    for name, score in together(scores).items():
        if cost is not None and key_for(cost, name) is None:
            raise KeyError(f"cost has no key for {name}; name it, or end with a pattern for the rest, such as {{..., '*': 1.0}}")
        if isinstance(each[name], bool) or not isinstance(each[name], numbers.Real) or not 0 < each[name] < math.inf:
            raise ValueError(f"cost={each[name]!r} of {name} must be a positive number, what one element costs")
        value = score.value.flatten().double()  # [blocks]
        size = block_elements(score.grid, device=value.device).flatten()
        whole = float((value * size)[value.isfinite()].sum()) if relative else 1.0
        if whole < 0:
            raise ValueError(
                f"{name}: the errors {tuple(score.value.shape)} add up to {whole:g}, and there is no share of that; "
                "give scores that are errors, 0 or more, or relative=False"
            )
        ranks.append(value / (whole or 1.0) / each[name])
        sizes.append(size)
        prices.append(size.double() * each[name])
    return torch.cat(ranks), torch.cat(sizes), torch.cat(prices)


def _outliers(scores: Scores, names: list[str], m: float) -> float:
    """The share of elements in blocks that score above m times the mean (the paper's equation 1)."""
    for name in names:
        if bad := int((value := scores[name].value).isposinf().sum() + ((value < 0) & ~value.isneginf()).sum()):
            raise ValueError(
                f"{name}: owl compares scores with their mean, and {bad} of the scores {tuple(value.shape)} are negative or infinite; "
                "use a metric that gives neither, such as wanda"
            )
    scores = together({name: scores[name] for name in names})
    value = torch.cat([score.value.flatten().double().clamp_min(0) for score in scores.values()])  # pruned blocks are zeros
    elements = torch.cat([block_elements(scores[name].grid, device=value.device).flatten() for name in names])
    mean = float((value * elements).sum()) / int(elements.sum())
    return int(elements[value > m * mean].sum()) / int(elements.sum())


def _pruned(scores: Scores, name: str) -> float:
    """The share of a parameter that is pruned already."""
    value, grid = scores[name].value, scores[name].grid
    return int((block_elements(grid, device=value.device) * value.isneginf()).sum()) / grid.elements


def _check_ranks(scores: Scores) -> None:
    for name, score in scores.items():
        if bad := int(score.value.isnan().sum()):
            raise ValueError(f"{name}: {bad} of the scores {tuple(score.value.shape)} are NaN and have no rank; look at the metric")


def clamps(
    scores: Scores, max_sparsity: float | Mapping[str, float] | None, min_keep: int | Mapping[str, int]
) -> tuple[dict[str, float], dict[str, int]]:
    """The most that each parameter may lose and the blocks it keeps at least, from numbers or mappings by name or pattern.

    Raises:
        ValueError: a fraction outside [0, 1], a min_keep below 0.
        KeyError: a key that fits no parameter.

    Example:
        >>> from blockprune.distribute import clamps
        >>> clamps({"w": bp.BlockScore(torch.ones(4), bp.BlockGrid((4,), (1,)))}, None, 1)
        ({'w': 1.0}, {'w': 1})
    """
    caps, least = _by_name(scores, max_sparsity, "max_sparsity", 1.0), _by_name(scores, min_keep, "min_keep", 0)
    for name in scores:
        check_fraction(f"max_sparsity of {name}", caps[name])
        if isinstance(least[name], bool) or not isinstance(least[name], int) or least[name] < 0:
            raise ValueError(f"min_keep={least[name]!r} of {name} must be a number of blocks, 0 or more")
    return caps, least


def _by_name(scores: Scores, value: V | Mapping[str, V] | None, what: str, default: V) -> dict[str, V]:
    if isinstance(value, Mapping):
        return lookup(value, scores, what=what, default=default)
    return dict.fromkeys(scores, default if value is None else value)


def check_fraction(what: str, value: float) -> None:
    """Raise unless a value is a number from 0 to 1.

    Raises:
        TypeError, ValueError: anything else.

    Example:
        >>> from blockprune.distribute import check_fraction
        >>> check_fraction("sparsity", 0.5)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{what}={value!r} must be a number from 0 (keep all) to 1 (remove all), or a mapping of parameter names to numbers"
        )
    if not 0 <= value <= 1:
        raise ValueError(f"{what}={value!r} must be from 0 (keep all) to 1 (remove all); 50 % is 0.5")
