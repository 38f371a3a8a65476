"""The third stage: scores and a sparsity -> masks.

One idea: rank blocks within a group and drop the lowest until the group's budget of *elements* is met. A group is a
parameter (`per_layer`), the whole model (`global_`), a row of blocks (`per_row`), a tile of blocks (`per_bank`), or m
consecutive blocks (`n_of_m`). Everything else is how the budget is spread
(distribute.py: `uniform`, `erk`, `owl`, `lagrangian`, `loss_weighted`).

Rounding is one rule in one place, ranking.py: what is removed is the closest reachable to the budget, and masks nest.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import attrs
import torch
from torch import Tensor

from blockprune.blocks import BlockGrid, block_elements, tiles, untile
from blockprune.distribute import check_fraction, clamps, erk, lagrangian, loss_weighted, owl, uniform
from blockprune.names import key_for, lookup, matches, near
from blockprune.ranking import drop_lowest, falls, together
from blockprune.types import BlockMask, Distribute, Masks, Scores, Sparsity

__all__ = ["erk", "global_", "lagrangian", "loss_weighted", "n_of_m", "owl", "per_bank", "per_layer", "per_row", "uniform"]

N = TypeVar("N", int, float)
Coupled = Iterable[Iterable[str]]  # groups of parameter names or patterns
MaxSparsity = float | Mapping[str, float] | None
MinKeep = int | Mapping[str, int]


def per_layer(
    scores: Scores,
    sparsity: Sparsity,
    *,
    distribute: Distribute = uniform,
    max_sparsity: MaxSparsity = None,
    min_keep: MinKeep = 0,
    coupled: Coupled = (),
) -> Masks:
    """Drop the lowest blocks of each parameter.

    Args:
        scores: one number a block.
        sparsity: fraction of elements to remove, 0 to 1; or a mapping by parameter name or glob pattern (the name itself wins,
            then the first pattern that fits; a parameter that no key fits keeps all).
        distribute: how one sparsity is spread over the parameters: `uniform`, `erk` or your own.
        max_sparsity: no parameter loses more than this fraction; a number or a mapping by name or pattern.
        min_keep: blocks that every parameter keeps at least; a number or a mapping.
        coupled: groups of names or patterns that share one mask: their scores are added up, and they fall together.

    Raises:
        ValueError: a sparsity outside [0, 1] or NaN, NaN scores, groups that cannot share a mask.
        TypeError: a sparsity that is neither a number nor a mapping.
        KeyError: a key or pattern that fits no parameter.

    Example:
        >>> score = bp.BlockScore(torch.tensor([[1.0, 4.0], [3.0, 2.0]]), bp.BlockGrid((4, 4), (2, 2)))
        >>> bp.allocate.per_layer({"w": score}, 0.5)["w"].keep
        tensor([[False,  True],
                [ True, False]])
    """
    return _per_bank(scores, sparsity, (), distribute, max_sparsity, min_keep, coupled)


def per_row(
    scores: Scores,
    sparsity: Sparsity,
    *,
    distribute: Distribute = uniform,
    max_sparsity: MaxSparsity = None,
    min_keep: MinKeep = 0,
    coupled: Coupled = (),
) -> Masks:
    """Drop the lowest blocks of each row of blocks, so that all rows are equally sparse; options as in `per_layer`.

    Example:
        >>> score = bp.BlockScore(torch.tensor([[1.0, 4.0], [3.0, 2.0]]), bp.BlockGrid((4, 4), (2, 2)))
        >>> bp.allocate.per_row({"w": score}, 0.5)["w"].keep
        tensor([[False,  True],
                [ True, False]])
    """
    return _per_bank(scores, sparsity, (1,), distribute, max_sparsity, min_keep, coupled)


def per_bank(
    scores: Scores,
    sparsity: Sparsity,
    *,
    bank: Sequence[int],
    distribute: Distribute = uniform,
    max_sparsity: MaxSparsity = None,
    min_keep: MinKeep = 0,
    coupled: Coupled = (),
) -> Masks:
    """Drop the lowest blocks of each bank, a tile of blocks, so that work is balanced (Cao et al., FPGA 2019, 10.1145/3289602.3293898).

    ``bank`` counts blocks along the leading axes, in the notation of a block: ``(1, 8)`` is 8 blocks of one row, -1 a whole axis.
    Other options as in `per_layer`.

    Example:
        >>> score = bp.BlockScore(torch.tensor([[1.0, 2.0, 8.0, 9.0]]), bp.BlockGrid((1, 4), (1, 1)))
        >>> bp.allocate.per_bank({"w": score}, 0.5, bank=(1, 2))["w"].keep
        tensor([[False,  True, False,  True]])
    """
    return _per_bank(scores, sparsity, tuple(bank), distribute, max_sparsity, min_keep, coupled)


def n_of_m(scores: Scores, sparsity: Sparsity, *, m: int, axis: int = 1, coupled: Coupled = ()) -> Masks:
    """Keep the n best of every m consecutive blocks along an axis, n = (1 - sparsity) m (2:4 is m=4 at 0.5; Mishra et al. 2104.08378).

    Args:
        scores: one number a block.
        sparsity: as in `per_layer`; it must keep a whole number of every m blocks.
        m: blocks in a group; it must divide the blocks along the axis.
        axis: 1 is the input axis of a Linear.
        coupled: as in `per_layer`.

    Raises:
        ValueError: m that does not divide the axis, or a sparsity that keeps a fraction of a block.

    Example:
        >>> score = bp.BlockScore(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), bp.BlockGrid((1, 4), (1, 1)))
        >>> bp.allocate.n_of_m({"w": score}, 0.5, m=4)["w"].keep
        tensor([[False,  True,  True, False]])
    """
    if not isinstance(m, int) or isinstance(m, bool) or m < 1:
        raise ValueError(f"m={m!r} must be a whole number of blocks, at least 1")
    units = _units(scores, coupled)
    wanted = _spread(scores, sparsity, uniform)
    for unit in units:
        blocks, s = unit.value.shape, unit.share(wanted)
        if not -unit.value.ndim <= axis < unit.value.ndim:
            raise ValueError(f"{unit.names[0]}: axis={axis} does not exist in {tuple(blocks)} blocks; use 0 to {len(blocks) - 1}")
        if blocks[axis] % m:
            raise ValueError(
                f"{unit.names[0]}: m={m} does not divide the {blocks[axis]} blocks along axis {axis} of {tuple(blocks)}; choose a divisor"
            )
        if not math.isclose(n := (1 - s) * m, round(n), abs_tol=1e-6):
            raise ValueError(
                f"{unit.names[0]}: n_of_m(m={m}) keeps a whole number of every {m} blocks, but sparsity={s:g} would keep {n:g}; "
                f"use a multiple of {1 / m:g}"
            )
    keep = {}
    for unit in units:
        bank = [1] * unit.value.ndim
        bank[axis] = m
        counted = attrs.evolve(
            unit, elements=unit.elements.new_ones(()).expand(unit.value.shape), weights=(unit.value.numel(),), names=unit.names[:1]
        )
        keep[unit] = ~_drop_in_banks(counted, round(unit.share(wanted) * m) / m, bank)
    return _masks(scores, keep)


def global_(
    scores: Scores, sparsity: Sparsity, *, max_sparsity: MaxSparsity = None, min_keep: MinKeep | None = None, coupled: Coupled = ()
) -> Masks:
    """Drop the lowest blocks of the whole model, so that scores decide how much each parameter loses.

    By default no parameter loses more than 90 % or its last block as long as the others can still give: an emptied layer cuts
    the network. That default yields only when the sparsity cannot be met otherwise; a clamp that you give never does, and
    the result is then the closest the clamps allow.

    Args:
        scores: one number a block, comparable between parameters.
        sparsity: fraction of all elements to remove; or a mapping by name or pattern, in which the parameters that share a key
            are ranked together (a parameter that no key fits keeps all).
        max_sparsity: no parameter loses more than this fraction; a number or a mapping by name or pattern; 1 unclamps.
        min_keep: blocks that every parameter keeps at least; a number or a mapping; 0 unclamps.
        coupled: as in `per_layer`.

    Raises:
        ValueError, TypeError, KeyError: as `per_layer`.

    Example:
        >>> grid = bp.BlockGrid((4,), (1,))
        >>> low, high = bp.BlockScore(torch.tensor([1.0, 2.0, 3.0, 4.0]), grid), bp.BlockScore(torch.tensor([5.0, 6.0, 7.0, 8.0]), grid)
        >>> masks = bp.allocate.global_({"low": low, "high": high}, 0.5)
        >>> masks["low"].keep.tolist(), masks["high"].keep.tolist()
        ([False, False, False, True], [False, True, True, True])
    """
    units = _units(together(scores), coupled)
    _check_sparsity(sparsity)
    pool_of = {name: "" if not isinstance(sparsity, Mapping) else key_for(sparsity, name) for name in scores}
    wanted = _spread(scores, sparsity, uniform)
    given = clamps(scores, max_sparsity, 0 if min_keep is None else min_keep)
    default = clamps(scores, 0.9 if max_sparsity is None else None, 1 if min_keep is None else 0)
    pools: dict[str | None, list[_Unit]] = {}
    for unit in units:
        if len({pool_of[name] for name in unit.names}) > 1:
            raise ValueError(f"coupled parameters {unit.names} have different sparsities; give them one key")
        pools.setdefault(pool_of[unit.names[0]], []).append(unit)
    keep: dict[_Unit, Tensor] = {}
    for members in pools.values():
        value = torch.cat([unit.value.flatten() for unit in members])
        elements = _cat([unit.elements.flatten() for unit in members])
        fixed, clamped = (torch.cat([_clamped(unit, *clamps).flatten() for unit in members]) for clamps in (given, default))
        budget = sum(unit.share(wanted) * unit.total for unit in members)
        drop = torch.zeros_like(clamped)
        pruned = value == -math.inf  # falls first, clamp or no clamp
        free = pruned | ~(clamped | fixed)
        drop[free] = drop_lowest(value[free], _take(elements, free), budget)
        if (left := budget - int(_take(elements, free).sum())) > 0:
            yields = clamped & ~(free | fixed)
            drop[yields] = drop_lowest(value[yields], _take(elements, yields), left)
        for unit, part in zip(members, drop.split([unit.value.numel() for unit in members]), strict=True):
            keep[unit] = ~part.view(unit.value.shape)
    return _masks(scores, keep)


@attrs.frozen(eq=False)
class _Unit:
    """Parameters that share one mask, almost always a single one."""

    names: tuple[str, ...]
    value: Tensor  # [*size] score, of the first parameter's size
    elements: Tensor  # [*size] elements that fall with a block
    weights: tuple[int, ...]  # elements of each parameter

    @property
    def total(self) -> int:
        return sum(self.weights)

    def share(self, wanted: Mapping[str, float]) -> float:
        """The unit's sparsity: the mean of its parameters', weighted by their elements."""
        return sum(wanted[name] * w for name, w in zip(self.names, self.weights, strict=True)) / self.total


def _units(scores: Scores, coupled: Coupled) -> list[_Unit]:
    for name, score in scores.items():
        if not score.value.is_floating_point():
            raise TypeError(f"{name}: scores {tuple(score.value.shape)} are {score.value.dtype}; they must be floating point")
        if score.value.amin().isnan():
            raise ValueError(
                f"{name}: {int(score.value.isnan().sum())} of the scores {tuple(score.value.shape)} are NaN and have no rank; "
                "look at the metric"
            )
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in scores}
    for group in coupled:
        if isinstance(group, str):
            raise TypeError(f"coupled holds groups of names, and {group!r} is no group; write coupled=[({group!r}, ...)]")
        patterns = tuple(group)
        names = tuple(name for name in scores if any(name == p or matches(p, name) for p in patterns))
        for p in patterns:
            if not any(name == p or matches(p, name) for name in names):
                raise KeyError(f"coupled has {p!r}, which fits no parameter{near(str(p), scores)}")
        for name in names:
            if len(groups[name]) > 1:
                raise ValueError(f"coupled has {name!r} in two groups; a parameter has one mask")
            groups[name] = names
    return [_unit(scores, names) for names in dict.fromkeys(groups.values())]


def _unit(scores: Scores, names: tuple[str, ...]) -> _Unit:
    first, *others = (scores[name] for name in names)
    wide = functools.reduce(torch.promote_types, (scores[name].value.dtype for name in names), torch.float32)
    value = first.value.to(wide)
    elements = block_elements(first.grid, device=value.device)
    for name, other in zip(names[1:], others, strict=True):
        if _axes(other.grid.size) != _axes(first.grid.size):
            raise ValueError(
                f"coupled parameters share one mask, but {names[0]} has {first.grid.size} blocks and {name} {other.grid.size}; "
                "choose blocks so that they agree"
            )
        share = other.value.to(value).reshape(value.shape)
        value = torch.where((value == -math.inf) | (share == -math.inf), -math.inf, value + share)  # pruned in one is pruned in all
        elements = elements + block_elements(other.grid, device=value.device).reshape(value.shape)
    return _Unit(names, value, elements, tuple(scores[name].grid.elements for name in names))


def _axes(size: Sequence[int]) -> tuple[int, ...]:
    """Rows of one layer may share a mask with columns of another: axes of one block do not count."""
    return tuple(n for n in size if n > 1)


def _per_bank(  # noqa: PLR0917 (the options of three public functions, in their order)
    scores: Scores,
    sparsity: Sparsity,
    bank: Sequence[int],
    distribute: Distribute,
    max_sparsity: MaxSparsity,
    min_keep: MinKeep,
    coupled: Coupled,
) -> Masks:
    units = _units(scores, coupled)
    wanted = _spread(scores, sparsity, distribute)
    caps, least = clamps(scores, max_sparsity, min_keep)
    keep: dict[_Unit, Tensor] = {}
    for unit in units:
        drop = _drop_in_banks(unit, unit.share(wanted), bank)
        if max_sparsity is not None:
            drop &= _drop_in_banks(unit, min(caps[name] for name in unit.names), bank, down=True)
        if any(least[name] for name in unit.names):
            drop &= ~_clamped(unit, dict.fromkeys(unit.names, 1.0), least)
        keep[unit] = ~drop
    return _masks(scores, keep)


def _masks(scores: Scores, keep: Mapping[_Unit, Tensor]) -> Masks:
    found = {name: _alive(unit, part) for unit, part in keep.items() for name in unit.names}
    return {name: BlockMask(found[name].reshape(score.grid.size).to(score.value.device), score.grid) for name, score in scores.items()}


def _alive(unit: _Unit, keep: Tensor) -> Tensor:
    """Without the blocks whose score says that they are pruned already; memory of its own for each of several parameters."""
    if unit.value.amin() == -math.inf:
        return keep & (unit.value != -math.inf)
    return keep if len(unit.names) == 1 else keep.clone()


def _spread(scores: Scores, sparsity: Sparsity, distribute: Distribute) -> dict[str, float]:
    """One sparsity for each parameter."""
    _check_sparsity(sparsity)
    if isinstance(sparsity, Mapping):
        if distribute is not uniform:
            raise ValueError("sparsity as a mapping already says what each parameter loses; give one number for `distribute` to spread")
        return lookup(sparsity, scores, what="sparsity", default=0.0)
    spread = distribute(scores, float(sparsity))
    for name in scores:
        if name not in spread:
            raise KeyError(f"distribute gives no sparsity for {name!r}; it must give one for each parameter")
        check_fraction(f"the sparsity that distribute gives {name}", spread[name])
    return dict(spread)


def _check_sparsity(sparsity: Sparsity) -> None:
    for key, s in sparsity.items() if isinstance(sparsity, Mapping) else [("", sparsity)]:
        check_fraction(f"sparsity[{key!r}]" if key else "sparsity", s)


def _clamped(unit: _Unit, caps: Mapping[str, float], least: Mapping[str, int]) -> Tensor:
    """The blocks ``[*size]`` that the clamps keep: the highest of the unit."""
    value, elements = unit.value.flatten(), unit.elements.flatten()
    drop = drop_lowest(value, elements, min(caps[name] for name in unit.names) * unit.total, down=True)
    if most := max(least[name] for name in unit.names):
        drop &= drop_lowest(value, elements.new_ones(()).expand(elements.shape), value.numel() - most)
    return ~drop.view(unit.value.shape)


def _drop_in_banks(unit: _Unit, sparsity: float, bank: Sequence[int], *, down: bool = False) -> Tensor:
    """Drop the lowest blocks ``[*size]`` of every bank."""
    try:
        grid = BlockGrid(tuple(unit.value.shape), bank)
    except (ValueError, TypeError) as error:
        raise type(error)(
            f"{unit.names[0]}: bank={tuple(bank)}, a tile of blocks, does not fit {tuple(unit.value.shape)} blocks: {error}"
        ) from None
    if grid.blocks == 1:
        elements = unit.elements.flatten()
        return drop_lowest(unit.value.flatten(), elements, sparsity * unit.total, down=down).view(unit.value.shape)
    value = tiles(unit.value, grid, fill=math.inf)  # [banks, blocks of a bank]; fillers rank last and weigh nothing
    elements = tiles(unit.elements, grid, fill=0)
    order = value.argsort(dim=1, stable=True)
    fallen = falls(elements.gather(1, order), sparsity * elements.sum(1, keepdim=True).double(), down=down)
    return untile(torch.empty_like(fallen).scatter_(1, order, fallen), grid)


def _cat(elements: list[Tensor]) -> Tensor:
    """``torch.cat``, but a view of one number when all blocks of all parameters are alike."""
    firsts = [e[:1] for e in elements]
    alike = all(e.stride(0) == 0 for e in elements) and all(torch.equal(f, firsts[0]) for f in firsts)
    return firsts[0].expand(sum(map(len, elements))) if alike else torch.cat(elements)


def _take(elements: Tensor, chosen: Tensor) -> Tensor:
    return elements[: int(chosen.sum())] if elements.stride(0) == 0 else elements[chosen]
