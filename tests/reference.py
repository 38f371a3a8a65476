"""Law 7: a slow, obvious twin of every fast path. Loops and definitions only; nothing here is clever."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from blockprune import BlockGrid, Masks, Param, Scores, UnitPermutation
from blockprune.core.types import BlockMask
from blockprune.native.spmm import Window

HALF = (torch.float16, torch.bfloat16)
ELEMENTWISE: dict[str, Callable[[Tensor], Tensor] | None] = {"none": None, "abs": torch.abs, "square": torch.square, "negate": torch.neg}
REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "mean": lambda values: values.sum() / values.numel(),
    "max": torch.max,
    "amax": torch.max,
    "min": torch.min,
    "amin": torch.min,
}


# Geometry.


def cells(grid: BlockGrid) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Each block's index, and the part of the parameter that it is."""
    for index in itertools.product(*map(range, grid.size)):
        yield index, tuple(slice(i * b, min((i + 1) * b, s)) for i, b, s in zip(index, grid.block, grid.shape, strict=True))


def pool(x: Tensor, grid: BlockGrid, *, reduce: str = "sum", elementwise: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    wide = x.float() if x.dtype in HALF else x
    values = elementwise(wide) if elementwise else wide
    return torch.stack([REDUCE[reduce](values[at]) for _, at in cells(grid)]).view(grid.size)


def expand(keep: Tensor, grid: BlockGrid) -> Tensor:
    out = torch.empty(grid.shape, dtype=keep.dtype)
    for index, at in cells(grid):
        out[at] = keep[index]
    return out


def block_elements(grid: BlockGrid) -> Tensor:
    return torch.tensor([math.prod(s.stop - s.start for s in at) for _, at in cells(grid)]).view(grid.size)


def masked(weight: Tensor, keep: Tensor, grid: BlockGrid) -> Tensor:
    out = weight.clone()
    for index, at in cells(grid):
        if not keep[index]:
            out[at] = 0
    return out


# Metrics: a benefit per element, in float64.


def lp(p: Param, power: float) -> Tensor:
    def norm(values: Tensor) -> Tensor:
        return values.max() if power == math.inf else (values**power).mean() ** (1 / power)

    return torch.stack([norm(p.weight[at].double().abs()) for _, at in cells(p.grid)]).view(p.grid.size)


def fpgm(p: Param) -> Tensor:
    rows = p.weight.double().flatten(1)
    others = max(1, len(rows) - 1)
    far = torch.tensor([sum(float((a - b).norm()) for b in rows) / others / math.sqrt(rows.shape[1]) for a in rows])
    return torch.stack([far[at[0]].mean() for _, at in cells(p.grid)]).view(p.grid.size)


def lamp(p: Param) -> Tensor:
    square = [(float((w := p.weight[at].double() ** 2).mean()), w.numel()) for _, at in cells(p.grid)]
    order = sorted(range(len(square)), key=lambda i: (square[i][0], i))
    share = [0.0] * len(square)
    for rank, i in enumerate(order):
        rest = sum(square[j][0] * square[j][1] for j in order[rank:])
        share[i] = square[i][0] / rest if rest else 0.0
    return torch.tensor(share).view(p.grid.size)


# Dynamic sparsity.


def regrow(keep: Tensor, drop: Tensor, grow: Tensor, grid: BlockGrid, *, fraction: float, sparsity: float | None = None) -> Tensor:
    """Blocks leave in ascending order of `drop` and come back in descending order of `grow`, while that brings the total closer."""
    sizes = block_elements(grid).flatten().tolist()
    kept = keep.flatten().tolist()
    falls, rises = drop.double().flatten().tolist(), grow.double().flatten().tolist()
    candidates = [i for i, k in enumerate(kept) if not k and rises[i] != -math.inf]
    present, room = sum(n for n, k in zip(sizes, kept, strict=True) if k), sum(sizes[i] for i in candidates)
    wanted = present if sparsity is None else (1 - sparsity) * grid.elements
    surplus, limit = max(0.0, present - wanted), room + present - wanted
    new, dropped = list(kept), 0
    for i in sorted((i for i, k in enumerate(kept) if k), key=lambda i: falls[i]):
        middle, end = dropped + sizes[i] / 2, dropped + sizes[i]
        if not (middle < surplus or (middle < fraction * present + surplus and end <= limit + 1e-6)):
            break
        new[i], dropped = False, dropped + sizes[i]
    grown = 0
    for i in sorted(candidates, key=lambda i: -rises[i]):
        if not 2 * (grown + sizes[i]) - sizes[i] < 2 * (wanted - present + dropped):
            break
        new[i], grown = True, grown + sizes[i]
    return torch.tensor(new).view(grid.size)


# Budgets by shape.


def erk(shapes: Mapping[str, Sequence[int]], sparsity: float) -> dict[str, float]:
    """Densities ``min(1, scale * sum(shape) / prod(shape))``; the scale that spends the budget is found by halving."""
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    budget = (1 - sparsity) * sum(map(math.prod, shapes.values()))

    def kept(scale: float) -> float:
        return sum(min(1.0, scale * raw[name]) * math.prod(shape) for name, shape in shapes.items())

    low, high = 0.0, max(1 / r for r in raw.values())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) < budget else (low, middle)
    return {name: 1 - min(1.0, high * r) for name, r in raw.items()}


# Allocation.


def order_of(value: Sequence[float]) -> list[int]:
    """The order of pruning: by score, then by position."""
    return sorted(range(len(value)), key=lambda i: (value[i], i))


def prune_lowest(value: Sequence[float], elements: Sequence[int], budget: float) -> set[int]:
    """Prune one block after the other as long as that brings the removed total closer to the budget."""
    pruned: set[int] = set()
    removed, aim = 0, Fraction(budget)
    for i in order_of(value):
        if abs(removed + elements[i] - aim) >= abs(removed - aim):
            break
        pruned.add(i)
        removed += elements[i]
    return pruned


def prune_within(value: Sequence[float], elements: Sequence[int], budget: float) -> set[int]:
    """Prune one block after the other as long as the budget is not exceeded."""
    pruned: set[int] = set()
    removed = 0
    for i in order_of(value):
        removed += elements[i]
        if removed > budget + 1e-6:
            break
        pruned.add(i)
    return pruned


@attrs.frozen
class Unit:
    """Parameters that share one mask: scores and elements added up."""

    names: tuple[str, ...]
    size: tuple[int, ...]
    value: list[float]
    elements: list[int]

    @property
    def total(self) -> int:
        return sum(self.elements)


def units(scores: Scores, coupled: Sequence[Sequence[str]] = ()) -> list[Unit]:
    found: dict[tuple[str, ...], Unit] = {}
    for name in scores:
        group = next((g for g in coupled if name in g), (name,))
        names = tuple(n for n in scores if n in group)
        values = zip(*(scores[n].value.flatten().tolist() for n in names), strict=True)
        elements = zip(*(block_elements(scores[n].grid).flatten().tolist() for n in names), strict=True)
        found[names] = Unit(names, scores[names[0]].grid.size, [sum(v) for v in values], [sum(e) for e in elements])
    return list(found.values())


def masks_of(scores: Scores, pruned_of: Mapping[str, set[int]], all_units: Sequence[Unit]) -> dict[str, BlockMask]:
    masks = {}
    for unit in all_units:
        pruned = pruned_of[unit.names[0]] | {i for i, v in enumerate(unit.value) if v == -math.inf}
        for name in unit.names:
            keep = torch.tensor([i not in pruned for i in range(len(unit.value))]).view(scores[name].grid.size)
            masks[name] = BlockMask(keep, scores[name].grid)
    return {name: masks[name] for name in scores}


def per_bank(
    scores: Scores,
    sparsity: float,
    *,
    bank: Sequence[int] = (),
    max_sparsity: float | None = None,
    min_keep: int = 0,
    coupled: Sequence[Sequence[str]] = (),
) -> Masks:
    """`per_layer` is the bank ``()``, `per_row` the bank ``(1,)``."""
    pruned_of = {}
    for unit in units(scores, coupled):
        sides = [s if i >= len(bank) or bank[i] == -1 else bank[i] for i, s in enumerate(unit.size)]
        banks: dict[tuple[int, ...], list[int]] = {}
        for i, index in enumerate(itertools.product(*map(range, unit.size))):
            banks.setdefault(tuple(at // side for at, side in zip(index, sides, strict=True)), []).append(i)
        pruned: set[int] = set()
        for members in banks.values():
            value, elements = [unit.value[i] for i in members], [unit.elements[i] for i in members]
            here = prune_lowest(value, elements, sparsity * sum(elements))
            if max_sparsity is not None:
                here &= prune_within(value, elements, max_sparsity * sum(elements))
            pruned |= {members[i] for i in here}
        pruned_of[unit.names[0]] = pruned - set(order_of(unit.value)[max(0, len(unit.value) - min_keep) :])
    return masks_of(scores, pruned_of, units(scores, coupled))


def parts_along(axis: UnitPermutation, name: str, length: int) -> list[int]:
    """The unit of each entry along the axis of a tensor, or its group if there are several, written out by groups, copies and units."""
    copies, in_group = axis.copies.get(name, 1), len(axis.order) // axis.groups
    entries = length // (len(axis.order) * copies)
    along = [(g, g * in_group + u) for g in range(axis.groups) for _ in range(copies) for u in range(in_group) for _ in range(entries)]
    return [g if axis.groups > 1 else unit for g, unit in along]


def per_axis(scores: Scores, sparsity: float, axes: Sequence[UnitPermutation]) -> Masks:
    """`per_layer` with hidden axes: for each, every element of every parameter adds its block's score to its unit's mean."""
    value = {name: expand(score.value, score.grid) for name, score in scores.items()}
    keep = {name: torch.ones(score.grid.shape, dtype=torch.bool) for name, score in scores.items()}
    for axis in axes:
        of_part: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
        for name, x in value.items():
            for role, names in enumerate((axis.rows, axis.columns)):
                if name in names:
                    along = parts_along(axis, name, x.shape[role])
                    for index in itertools.product(*map(range, x.shape)):
                        of_part.setdefault(along[index[role]], []).append((name, index))
        parts = sorted(of_part)
        scored = [[v for name, index in of_part[part] if (v := float(value[name][index])) != -math.inf] for part in parts]
        means, elements = [sum(v) / len(v) if v else -math.inf for v in scored], [len(of_part[part]) for part in parts]
        for part in prune_lowest(means, elements, sparsity * sum(elements)):
            for name, index in of_part[parts[part]]:
                keep[name][index] = False
    return {
        name: BlockMask(
            torch.tensor([bool(keep[name][c].all()) for _, c in cells(s.grid)]).view(s.grid.size) & (s.value != -math.inf), s.grid
        )
        for name, s in scores.items()
    }


def per_columns(scores: Scores, sparsity: float, *, columns: int) -> Masks:
    """Ranges of columns of the weight as a matrix ``[outputs, inputs]``, each in whole blocks and over all rows."""
    pruned_of = {}
    for unit in units(scores):
        grid = scores[unit.names[0]].grid
        across = math.prod(grid.size[1:])
        width = max(1, columns // math.prod(grid.block[1:]))
        ranges: dict[int, list[int]] = {}
        for i in range(len(unit.value)):
            ranges.setdefault(i % across // width, []).append(i)
        pruned: set[int] = set()
        for members in ranges.values():
            elements = [unit.elements[i] for i in members]
            pruned |= {members[i] for i in prune_lowest([unit.value[i] for i in members], elements, sparsity * sum(elements))}
        pruned_of[unit.names[0]] = pruned
    return masks_of(scores, pruned_of, units(scores))


def n_of_m(scores: Scores, sparsity: float, *, m: int, axis: int = 1, coupled: Sequence[Sequence[str]] = ()) -> Masks:
    pruned_of = {}
    for unit in units(scores, coupled):
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, index in enumerate(itertools.product(*map(range, unit.size))):
            groups.setdefault((*index[:axis], index[axis] // m, *index[axis + 1 :]), []).append(i)
        lowest = [[members[j] for j in order_of([unit.value[i] for i in members])] for members in groups.values()]
        pruned_of[unit.names[0]] = {i for members in lowest for i in members[: round(sparsity * m)]}
    return masks_of(scores, pruned_of, units(scores, coupled))


def per_model(
    scores: Scores,
    sparsity: float,
    *,
    max_sparsity: float | None = None,
    min_keep: int | None = None,
    coupled: Sequence[Sequence[str]] = (),
) -> Masks:
    """Both limits are the caller's, or both are the defaults, which can be exceeded."""
    blocks = [(unit, i) for unit in units(scores, coupled) for i in range(len(unit.value))]
    kept_by_limits = set()
    for unit in units(scores, coupled):
        prunable = prune_within(unit.value, unit.elements, (0.9 if max_sparsity is None else max_sparsity) * unit.total)
        prunable -= set(order_of(unit.value)[max(0, len(unit.value) - (1 if min_keep is None else min_keep)) :])
        kept_by_limits |= {(unit.names, i) for i, v in enumerate(unit.value) if i not in prunable and v != -math.inf}
    budget = sum(sparsity * unit.total for unit in units(scores, coupled))
    pruned_of: dict[str, set[int]] = {unit.names[0]: set() for unit in units(scores, coupled)}
    for turn in (False, True) if max_sparsity is None and min_keep is None else (False,):
        here = [(unit, i) for unit, i in blocks if ((unit.names, i) in kept_by_limits) == turn]
        elements = [unit.elements[i] for unit, i in here]
        pruned = prune_lowest([unit.value[i] for unit, i in here], elements, budget)
        for unit, i in (here[j] for j in pruned):
            pruned_of[unit.names[0]].add(i)
        budget -= sum(elements)
        if budget <= 0:
            break
    return masks_of(scores, pruned_of, units(scores, coupled))


def closest(value: Sequence[float], elements: Sequence[int], budget: float) -> float:
    """The smallest distance to the budget that any number of the lowest blocks reaches (law 2)."""
    sums = itertools.accumulate((elements[i] for i in order_of(value)), initial=0)
    return min(abs(s - budget) for s in sums)


# Budgets across parameters.


def owl(scores: Scores, sparsity: float, *, m: float = 5.0, lam: float = 0.08, key: Callable[[str], str] = str) -> dict[str, float]:
    """Outlier ratios scaled to [0, 2 lam] and shifted; the shift that spends the budget is found by halving."""
    ratio, low, high = {}, {}, {}
    for name in scores:
        blocks = [block for other in scores if key(other) == key(name) for block in _valued(scores, other)]
        whole = sum(e for _, e in blocks)
        mean = sum(max(v, 0.0) * e for v, e in blocks) / whole
        ratio[name] = sum(e for v, e in blocks if v > m * mean) / whole
        pruned = sum(e for v, e in _valued(scores, name) if v == -math.inf) / scores[name].grid.elements
        low[name] = max(0.0, sparsity - lam, pruned)
        high[name] = max(low[name], min(1.0, sparsity + lam))
    span = max(ratio.values()) - min(ratio.values())
    scaled = {name: (r - min(ratio.values())) / span * 2 * lam if span else 0.0 for name, r in ratio.items()}
    budget = sparsity * sum(score.grid.elements for score in scores.values())

    def spread(shift: float) -> dict[str, float]:
        return {name: min(max(shift - scaled[name], low[name]), high[name]) for name in scores}

    few, many = -4.0, 4.0
    for _ in range(200):
        middle = (few + many) / 2
        spent = sum(s * scores[name].grid.elements for name, s in spread(middle).items())
        few, many = (middle, many) if spent < budget else (few, middle)
    return spread(many)


def _valued(scores: Scores, name: str) -> list[tuple[float, int]]:
    """Each block's score and elements."""
    return list(zip(scores[name].value.flatten().tolist(), block_elements(scores[name].grid).flatten().tolist(), strict=True))


@attrs.frozen
class Priced:
    """A block of the model: its place, its error per cost, what it adds to the error, its elements and its cost."""

    name: str
    index: int
    rank: float
    error: float
    elements: int
    cost: float


def priced_blocks(scores: Scores, *, cost: Mapping[str, float] | None = None, relative: bool = False) -> list[Priced]:
    """All blocks of the model in the order of pruning."""
    found = []
    for name in scores:
        total = sum(v * e for v, e in _valued(scores, name) if abs(v) != math.inf) if relative else 1.0
        each = cost[name] if cost else 1.0
        for i, (v, e) in enumerate(_valued(scores, name)):
            found.append(Priced(name, i, v / (total or 1.0) / each, 0.0 if v == -math.inf else v * e, e, e * each))
    return [found[i] for i in order_of([block.rank for block in found])]


def lagrangian(
    scores: Scores,
    sparsity: float,
    *,
    cost: Mapping[str, float] | None = None,
    relative: bool = True,
    max_sparsity: float = 0.9,
    min_keep: int = 0,
) -> dict[str, float] | None:
    """Blocks are pruned one after the other as long as that brings the removed cost closer; None if the limits do not allow enough."""
    order = priced_blocks(scores, cost=cost, relative=relative)
    total = sum(block.cost for block in order)
    prunable, reachable = set(), 0.0
    for name in scores:
        own = [block for block in order if block.name == name]
        removed = pruned = spare = 0
        for place, block in enumerate(own):
            removed += block.elements
            last_ones = place >= len(own) - min_keep
            pruned += block.elements * (block.rank == -math.inf)
            spare += block.elements * (not last_ones)
            if block.rank == -math.inf or (not last_ones and removed <= max_sparsity * scores[name].grid.elements + 1e-6):
                prunable.add((name, block.index))
        reachable += max(pruned, min(max_sparsity * scores[name].grid.elements, spare)) * own[0].cost / own[0].elements
    if sparsity * total > reachable * (1 + 1e-9):
        return None
    gone, done = dict.fromkeys(scores, 0), 0.0
    for block in order:
        if (block.name, block.index) in prunable:
            if block.rank != -math.inf and 2 * done + block.cost >= 2 * sparsity * total:
                break
            gone[block.name] += block.elements
            done += block.cost
    return {name: gone[name] / score.grid.elements for name, score in scores.items()}


def pareto(scores: Scores, *, cost: Mapping[str, float] | None = None) -> list[tuple[float, float, float]]:
    """Sparsity, kept cost and error before the first and after each block that is pruned; those of score -inf are pruned before."""
    order = priced_blocks(scores, cost=cost)
    elements, kept = sum(block.elements for block in order), sum(block.cost for block in order)
    removed, error, points = 0, 0.0, []
    for block in order:
        if block.rank != -math.inf:
            points.append((removed / elements, kept, error))
        removed, kept, error = removed + block.elements, kept - block.cost, error + block.error
    return [*points, (1.0, kept, error)]


# Optimal Brain Surgeon and least squares: every error and every inverse from scratch, in float64.


@attrs.frozen
class Band:
    """A row of blocks: its rows of the weight, the group of inputs that they see, and the input features of each of its blocks."""

    at: slice
    group: int
    blocks: list[list[int]]


def bands(p: Param) -> list[Band]:
    groups = len(p.stats["input_gram"])
    found: list[Band] = []
    for index, at in cells(p.grid):
        touched = torch.zeros(p.grid.shape[1:], dtype=torch.bool)
        touched[at[1:]] = True
        if index[0] == len(found):
            found.append(Band(at[0], at[0].start * groups // p.grid.shape[0], []))
        found[-1].blocks.append(touched.flatten().nonzero().flatten().tolist())
    return found


def hessians(p: Param, damping: float) -> Tensor:
    """[groups, k, k]"""
    grams, held = [], []
    for group, given in enumerate(p.stats["input_gram"].double()):
        gram = given.clone()
        if "input_mean" in p.stats and p.stats["bias"].numel():
            row = group * p.grid.shape[0] // len(p.stats["input_gram"])
            mean = p.stats["input_mean"].double().expand(p.grid.shape)[row].flatten()
            gram -= torch.outer(mean, mean)
        grams.append(gram)
        held += [max(float(gram[i, i]), 1e-5 * float(given[i, i])) for i in range(len(gram))]
    least = min(h for h in held if h > 0)  # dead inputs are held as the least of the others
    ridge = torch.tensor([h if h > 0 else least for h in held], dtype=torch.float64).view(len(grams), -1)
    return torch.stack(grams) + damping * torch.diag_embed(ridge)


def best_on(rows: Tensor, hessian: Tensor, kept: Sequence[int], gain: Tensor | None = None) -> Tensor:
    """The V, zero but in the kept inputs, of least ``tr(gain (W - V) H (W - V)^T)``: one least-squares problem for all rows."""
    right = torch.linalg.cholesky(hessian)  # H = right right^T
    left = torch.eye(len(rows)).double() if gain is None else _root(gain)
    v = torch.zeros_like(rows)
    if len(kept):
        design = (left[:, None, :, None] * right[kept].mT[None, :, None, :]).reshape(rows.numel(), -1)  # of left V right, row after row
        aim = (left @ rows @ right).flatten()[:, None]
        v[:, kept] = torch.linalg.lstsq(design, aim, driver="gelsd").solution.view(len(rows), -1)
    return v


def _root(gain: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gain)
    return vectors @ values.clamp_min(0).sqrt().diag() @ vectors.mT


def error_of(rows: Tensor, v: Tensor, hessian: Tensor, gain: Tensor | None = None) -> float:
    e = (rows - v) @ hessian @ (rows - v).mT
    return float((e if gain is None else gain @ e).trace())


def removals(
    rows: Tensor, hessian: Tensor, blocks: Sequence[Sequence[int]], gone: Sequence[int], gain: Tensor | None = None
) -> list[float]:
    """The total error when, beside those that are gone, each block goes (those that are gone: inf)."""
    found = []
    for j in range(len(blocks)):
        lost = {i for b in (*gone, j) for i in blocks[b]}
        kept = [i for i in range(rows.shape[1]) if i not in lost]
        found.append(math.inf if j in gone else error_of(rows, best_on(rows, hessian, kept, gain), hessian, gain))
    return found


def obs_weights(rows: Tensor, hessian: Tensor, blocks: Sequence[Sequence[int]], order: Sequence[int]) -> Tensor:
    """``W -= W_B ([H^-1]_BB)^-1 [H^-1]_B:`` for each block of the order, H^-1 of what is left anew each time."""
    rows, left = rows.clone(), list(range(rows.shape[1]))
    for j in order:
        inverse = torch.linalg.inv(hessian[left][:, left])
        at = [left.index(i) for i in blocks[j]]
        rows[:, left] -= rows[:, blocks[j]] @ torch.linalg.inv(inverse[at][:, at]) @ inverse[at]
        rows[:, blocks[j]] = 0
        left = [i for i in left if i not in blocks[j]]
    return rows


def least_squares(p: Param, keep: Tensor, damping: float) -> Tensor:
    """Each row alone, on the inputs that ``keep [*shape]`` keeps of it."""
    rows, kept = p.weight.double().flatten(1), keep.flatten(1)
    all_hessians = hessians(p, damping)
    out = [
        best_on(rows[r][None], all_hessians[r * len(all_hessians) // len(rows)], kept[r].nonzero().flatten().tolist())
        for r in range(len(rows))
    ]
    return torch.cat(out).view(p.grid.shape)


def sparsegpt(p: Param, sparsity: float, columns_per_step: int, damping: float) -> Tensor:
    """Steps of columns from left to right; every inverse is of the Hessian of the columns from there on, computed from scratch."""
    weight, value = p.weight.double().flatten(1).clone(), torch.zeros(p.grid.size).double().flatten(1)
    elements, every, all_hessians = block_elements(p.grid).flatten(1), bands(p), hessians(p, damping)
    width = max(len(block) for block in every[0].blocks)
    step, count = max(1, columns_per_step // width), len(every[0].blocks)

    def inverse_from(band: Band, j: int) -> tuple[Tensor, list[int]]:
        right = [i for block in band.blocks[j:] for i in block]
        return torch.linalg.inv(all_hessians[band.group][right][:, right]), right

    for first in range(0, count, step):
        chosen = range(first, min(count, first + step))
        for b, band in enumerate(every):
            for j in chosen:
                inverse, _ = inverse_from(band, j)
                n, w = len(band.blocks[j]), weight[band.at][:, band.blocks[j]]
                value[b, j] = (w @ torch.linalg.inv(inverse[:n, :n]) @ w.mT).trace() / elements[b, j]
        ranked = sorted((float(value[b, j]), b, j) for b in range(len(every)) for j in chosen)
        falls = {(b, j) for _, b, j in ranked[: round(sparsity * len(ranked))]}
        for j in chosen:
            for b, band in enumerate(every):
                if (b, j) in falls:
                    inverse, right = inverse_from(band, j)
                    n, rows = len(band.blocks[j]), weight[band.at]
                    rows[:, right] -= rows[:, band.blocks[j]] @ torch.linalg.inv(inverse[:n, :n]) @ inverse[:n]
    return value.view(p.grid.size)


# Block-sparse weights.


def stored(weight: Tensor, keep: Tensor, block: tuple[int, int], paired: bool) -> tuple[list[float], list[int], list[int]]:
    """Values, crow and col of the elements that ``keep [rows, cols]`` keeps, in such blocks, two columns at a time or one."""
    (rows, cols), (height, width) = weight.shape, block
    values: list[float] = []
    crow, col = [0], []
    for top in range(0, rows, height):
        band = range(top, min(rows, top + height))
        blocks = [j for j in range(-(-cols // width)) if keep[top, j * width]]
        columns = [c for j in blocks for c in range(j * width, min(cols, (j + 1) * width))]
        step = 2 if paired else 1
        for start in range(0, len(columns), step):
            values += [float(weight[r, c]) for r in band for c in columns[start : start + step]]
        col += blocks
        crow.append(len(col))
    return values, crow, col


def sparse_linear(x: Tensor, weight: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
    """Each output from the inputs that its row keeps, in float64: what is pruned is not read."""
    rows = [x.double()[..., keep[r]] @ weight[r, keep[r]].double() for r in range(len(weight))]
    return torch.stack(rows, dim=-1) + (0 if bias is None else bias.double())


def input_grad(grad: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """The gradient of each input from the outputs whose rows keep it, in float64."""
    columns = [grad.double()[..., keep[:, c]] @ weight[keep[:, c], c].double() for c in range(weight.shape[1])]
    return torch.stack(columns, dim=-1)


def values_grad(grad: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    """The gradient of each kept weight, in float64 at its place in the dense matrix: all others are zero."""
    out = torch.zeros(keep.shape, dtype=torch.float64)
    for row, column in keep.nonzero().tolist():
        out[row, column] = grad.double().flatten(0, -2)[:, row] @ x.double().flatten(0, -2)[:, column]
    return out


def sparse_conv2d(x: Tensor, weight: Tensor, keep: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """Each output from the patch of the image that lies under the kernel, as `sparse_linear`: ``[n, filters, rows, columns]``."""
    padded, (rows, columns) = F.pad(x.double(), list(window.padding)), window.out_size(x)
    (down, right), (dy, dx), (high, wide) = window.stride, window.dilation, window.kernel_size
    out = x.new_zeros(len(x), len(weight), rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            top, left = i * down, j * right
            patch = padded[:, :, top : top + dy * (high - 1) + 1 : dy, left : left + dx * (wide - 1) + 1 : dx]
            out[:, :, i, j] = sparse_linear(patch.flatten(1), weight.flatten(1), keep.flatten(1), bias)
    return out


# int8.


def int8_numbers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row: whole numbers of at most 127, and the scale that makes them the weight."""
    numbers, scales = [], []
    for row in weight.detach().float():
        scale = row.abs().max() / 127
        scales.append(scale if scale > 0 else torch.tensor(1.0))
        numbers.append([max(-127, min(127, round(w))) for w in (row / scales[-1]).tolist()])
    return torch.tensor(numbers), torch.stack(scales)


def int8_linear(x: Tensor, numbers: Tensor, keep: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Each row of ``x [n, cols]`` as whole numbers, their exact sums with those that each row of ``numbers`` keeps, then the scales."""
    kept, out = torch.where(keep, numbers.long(), 0), torch.empty(len(x), len(numbers))
    for i, row in enumerate(x.float()):
        largest = row.abs().max()
        if not largest.isfinite():
            out[i] = torch.nan
            continue
        inverse = torch.tensor(127.0) / largest if largest >= 1e-36 else torch.tensor(0.0)
        whole = torch.tensor([round(number) for number in (row * inverse).tolist()])
        out[i] = (kept * whole).sum(1).float() * (largest / 127 * scale)
    return out if bias is None else out + bias.float()


class Int8Linear(nn.Module):
    """A Linear in int8. Its gradient is that of the product with the weight that the numbers stand for."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.numbers, self.scale = int8_numbers(layer.weight)
        self.bias, self.dtype = copy.deepcopy(layer.bias), layer.weight.dtype

    @property
    def weight(self) -> Tensor:
        return (self.numbers * self.scale[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        flat, everything = x.reshape(-1, x.shape[-1]), torch.ones_like(self.numbers).bool()
        exact = flat.double() @ (self.numbers.double() * self.scale[:, None]).mT + (0 if self.bias is None else self.bias.double())
        rounded = int8_linear(flat.detach(), self.numbers, everything, self.scale, self.bias)
        return (exact + (rounded - exact).detach()).to(x.dtype).view(*x.shape[:-1], len(self.scale))


def int8_model(model: nn.Module) -> nn.Module:
    """A masked model whose masked Linears compute in int8."""
    if parametrize.type_before_parametrizations(model) is nn.Linear:
        return Int8Linear(model)
    model = copy.deepcopy(model)
    for name, child in model.named_children():
        setattr(model, name, int8_model(child))
    return model
