"""Law 7: a slow, obvious twin of every fast path. Loops and definitions only; nothing here is clever."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction

import attrs
import torch
from torch import Tensor

from blockprune import BlockGrid, Masks, Param, Scores
from blockprune.types import BlockMask

HALF = (torch.float16, torch.bfloat16)
EACH: dict[str, Callable[[Tensor], Tensor] | None] = {"none": None, "abs": torch.abs, "square": torch.square, "negate": torch.neg}
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


def pool(x: Tensor, grid: BlockGrid, *, reduce: str = "sum", each: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    wide = x.float() if x.dtype in HALF else x
    values = each(wide) if each else wide
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


# Distributions.


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
    """The order of falling: by score, then by position."""
    return sorted(range(len(value)), key=lambda i: (value[i], i))


def drop_lowest(value: Sequence[float], elements: Sequence[int], budget: float) -> set[int]:
    """Drop one after the other as long as that brings what has fallen closer to the budget."""
    fallen: set[int] = set()
    removed, aim = 0, Fraction(budget)
    for i in order_of(value):
        if abs(removed + elements[i] - aim) >= abs(removed - aim):
            break
        fallen.add(i)
        removed += elements[i]
    return fallen


def drop_within(value: Sequence[float], elements: Sequence[int], budget: float) -> set[int]:
    """Drop one after the other as long as the budget is not passed."""
    fallen: set[int] = set()
    removed = 0
    for i in order_of(value):
        removed += elements[i]
        if removed > budget + 1e-6:
            break
        fallen.add(i)
    return fallen


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


def masks_of(scores: Scores, dropped: Mapping[str, set[int]], all_units: Sequence[Unit]) -> dict[str, BlockMask]:
    masks = {}
    for unit in all_units:
        fallen = dropped[unit.names[0]] | {i for i, v in enumerate(unit.value) if v == -math.inf}
        for name in unit.names:
            keep = torch.tensor([i not in fallen for i in range(len(unit.value))]).view(scores[name].grid.size)
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
    dropped = {}
    for unit in units(scores, coupled):
        sides = [s if i >= len(bank) or bank[i] == -1 else bank[i] for i, s in enumerate(unit.size)]
        banks: dict[tuple[int, ...], list[int]] = {}
        for i, index in enumerate(itertools.product(*map(range, unit.size))):
            banks.setdefault(tuple(at // side for at, side in zip(index, sides, strict=True)), []).append(i)
        fallen: set[int] = set()
        for members in banks.values():
            value, elements = [unit.value[i] for i in members], [unit.elements[i] for i in members]
            here = drop_lowest(value, elements, sparsity * sum(elements))
            if max_sparsity is not None:
                here &= drop_within(value, elements, max_sparsity * sum(elements))
            fallen |= {members[i] for i in here}
        dropped[unit.names[0]] = fallen - set(order_of(unit.value)[max(0, len(unit.value) - min_keep) :])
    return masks_of(scores, dropped, units(scores, coupled))


def n_of_m(scores: Scores, sparsity: float, *, m: int, axis: int = 1, coupled: Sequence[Sequence[str]] = ()) -> Masks:
    dropped = {}
    for unit in units(scores, coupled):
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, index in enumerate(itertools.product(*map(range, unit.size))):
            groups.setdefault((*index[:axis], index[axis] // m, *index[axis + 1 :]), []).append(i)
        lowest = [[members[j] for j in order_of([unit.value[i] for i in members])] for members in groups.values()]
        dropped[unit.names[0]] = {i for members in lowest for i in members[: round(sparsity * m)]}
    return masks_of(scores, dropped, units(scores, coupled))


def global_(
    scores: Scores,
    sparsity: float,
    *,
    max_sparsity: float | None = None,
    min_keep: int | None = None,
    coupled: Sequence[Sequence[str]] = (),
) -> Masks:
    """Clamps are both given, or both left to the default, which yields."""
    blocks = [(unit, i) for unit in units(scores, coupled) for i in range(len(unit.value))]
    clamped = set()
    for unit in units(scores, coupled):
        may_fall = drop_within(unit.value, unit.elements, (0.9 if max_sparsity is None else max_sparsity) * unit.total)
        may_fall -= set(order_of(unit.value)[max(0, len(unit.value) - (1 if min_keep is None else min_keep)) :])
        clamped |= {(unit.names, i) for i, v in enumerate(unit.value) if i not in may_fall and v != -math.inf}
    budget = sum(sparsity * unit.total for unit in units(scores, coupled))
    dropped: dict[str, set[int]] = {unit.names[0]: set() for unit in units(scores, coupled)}
    for turn in (False, True) if max_sparsity is None and min_keep is None else (False,):
        here = [(unit, i) for unit, i in blocks if ((unit.names, i) in clamped) == turn]
        elements = [unit.elements[i] for unit, i in here]
        fallen = drop_lowest([unit.value[i] for unit, i in here], elements, budget)
        for unit, i in (here[j] for j in fallen):
            dropped[unit.names[0]].add(i)
        budget -= sum(elements)
        if budget <= 0:
            break
    return masks_of(scores, dropped, units(scores, coupled))


def closest(value: Sequence[float], elements: Sequence[int], budget: float) -> float:
    """The smallest distance to the budget that any number of the lowest blocks reaches (law 2)."""
    sums = itertools.accumulate((elements[i] for i in order_of(value)), initial=0)
    return min(abs(s - budget) for s in sums)
