"""Which hidden units share blocks: an order that leaves the most blocks with little to lose, found from what each element is worth."""

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from blockprune.blocks import BlockGrid, BlockShape, block_elements, pool
from blockprune.names import near
from blockprune.permute import Shuffle
from blockprune.ranking import together
from blockprune.types import BlockScore, Scores

SWEEPS = 30  # times that pairs are exchanged between two looks at what units would add to blocks, at most
FEW = 8  # partners of a unit that are looked at closely
FIRST = 8  # times the blocks: pairs of these that are looked at first
SHORT = 512  # pairs of which there is no need to look at some first
CHUNK = {"cpu": 1 << 20}  # numbers of one temporary: so many stay in caches


def cluster(
    scores: Scores, plan: Sequence[Shuffle], *, block: BlockShape, sparsity: float = 0.25, rounds: int = 6, progress: bool = True
) -> list[Shuffle]:
    """Better orders for a plan of `permute`: units that matter in the same places share blocks, and weak ones leave whole blocks empty.

    A block of score I costs ``I / (1 + I / L)``, nearly I where that is small and at most L, the score of the last block that goes at this
    sparsity: what is lost if it goes or stays. Units start in the order of their sums and change places pairwise as long as that lowers
    the cost. Axes are taken in the order of the plan, each in the blocks that those before it left.

    Args:
        scores: of single elements (blocks of ``(1, 1)``) that add up, such as ``metric.obs(data, max_sparsity=0)`` weighed by output
            gradients: what dropping one adds to the loss.
        plan: the axes; `Shuffle(torch.arange(units), rows=..., columns=...)` names one. Their orders are not used; an axis without scores
            keeps its own.
        block: the blocks in which the weights will be pruned, two axes.
        sparsity: share of the elements that will go.
        rounds: looks at the blocks, at most; after the last there may be pairs left that would gain.
        progress: show a bar on a terminal.

    Raises:
        KeyError: a plan of which no axis has scores.
        ValueError: scores of larger blocks or not finite, a block that is not two positive numbers, units that do not divide an axis.

    Example:
        >>> from blockprune.permute import Shuffle
        >>> value = torch.tensor([[8.0, 9, 0, 0], [0, 0, 7, 9], [6, 9, 0, 0], [0, 0, 8, 7]])
        >>> scores = {"up": bp.BlockScore(value, bp.BlockGrid((4, 4), (1, 1)))}
        >>> (found,) = bp.cluster(scores, [Shuffle(torch.arange(4), rows=["up"])], block=(2, 2), sparsity=0.5)
        >>> value[found.order]
        tensor([[0., 0., 7., 9.],
                [0., 0., 8., 7.],
                [6., 9., 0., 0.],
                [8., 9., 0., 0.]])
    """
    tall, wide = _block(block)
    named = {name: scores[name] for shuffle in plan for name in (*shuffle.rows, *shuffle.columns) if name in scores}
    values = {name: _matrix(name, score) for name, score in together(named).items()}
    if plan and not values:
        wanted = [name for shuffle in plan for name in (*shuffle.rows, *shuffle.columns)]
        raise KeyError(f"cluster has no scores for any of {wanted[:6]}{near(wanted[0] if wanted else '', scores)}")
    level = _level(values, (tall, wide), sparsity)
    found: list[Shuffle] = []
    with torch.no_grad():
        for shuffle in tqdm(plan, desc="cluster", disable=None if progress else True, leave=False):
            parts: dict[int, list[Tensor]] = {}  # by units of a block: what the blocks across hold of each unit, [units, blocks]
            for axis, names in enumerate((shuffle.rows, shuffle.columns)):
                for name in names:
                    if name in values:
                        group, part = _part(name, values[name], shuffle, axis, (tall, wide))
                        parts.setdefault(group, []).append(part / (level * tall * wide))
            if not parts:
                found.append(shuffle)
                continue
            order = _order({group: torch.cat(of, 1) for group, of in parts.items()}, shuffle.within, rounds)
            found.append(attrs.evolve(shuffle, order=order))
            for axis, names in enumerate((shuffle.rows, shuffle.columns)):
                for name in set(names) & values.keys():
                    at = found[-1].along(name).to(values[name].device)
                    values[name] = values[name].unflatten(axis, (len(at), -1)).index_select(axis, at).flatten(axis, axis + 1)
    return found


def _block(block: BlockShape) -> tuple[int, int]:
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"block={tuple(block)} must be two positive numbers, the rows and the inputs of a block, such as (16, 16)")
    return block[0], block[1]


def _matrix(name: str, score: BlockScore) -> Tensor:
    """The scores of single elements, ``[outputs, inputs]``, float32."""
    value, grid = score.value, score.grid
    if grid.block[:2] != (1, 1) or len(grid.shape) < 2:
        raise ValueError(f"{name}: cluster looks at single elements, but the scores are of {grid}; collect with blocks of (1, 1)")
    if not value.isfinite().all():
        raise ValueError(f"{name}: the scores of {grid} have NaN or infinite values, which do not add up; cluster before `restrict`")
    return value.detach().reshape(grid.size[0], -1).float().clamp_min(0)


def _level(values: Mapping[str, Tensor], block: tuple[int, int], sparsity: float) -> float:
    """The mean score of an element in the last block that goes."""
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be above 0 and below 1: the share of the elements that will go")
    means = []
    for value in values.values():
        grid = BlockGrid(value.shape, [min(b, s) for b, s in zip(block, value.shape, strict=True)])
        means.append((pool(value, grid) / block_elements(grid, device=value.device)).flatten())
    if not means:
        return 1.0
    every = torch.cat(means).sort().values
    level = float(every[round(sparsity * (len(every) - 1))])
    return level or float(every[every > 0].min() if every.any() else 1)  # zeros go first, and at no cost


def _part(name: str, value: Tensor, shuffle: Shuffle, axis: int, block: tuple[int, int]) -> tuple[int, Tensor]:
    """Units of a block along the axis, and each unit's sums over the blocks across, copies side by side: ``[units, blocks]``."""
    x = value if axis == 0 else value.mT  # [along, across]
    along, across = x.shape
    units, copies = len(shuffle.order), shuffle.copies.get(name, 1)
    if along % (units * copies):
        raise ValueError(
            f"{name}: axis {axis} of {tuple(value.shape)} has {along} entries, not {copies} times {units} equal units; mend the plan"
        )
    entries = along // (units * copies)
    sums = F.pad(x, (0, -across % block[1 - axis])).unflatten(1, (-1, block[1 - axis])).sum(2)  # [along, blocks]
    sums = sums.view(shuffle.within, copies, units // shuffle.within, entries, -1).movedim(
        1, 3
    )  # [groups, units of one, entries, copies, blocks]
    pieces = -(-entries // block[axis])  # of a unit that is taller than a block
    sums = F.pad(sums.flatten(3), (0, 0, 0, pieces * block[axis] - entries if pieces > 1 else 0))
    sums = sums.unflatten(2, (pieces, -1)).sum(3)  # [groups, units, pieces, copies * blocks]
    return max(1, block[axis] // entries), sums.reshape(units, -1)


def _order(parts: Mapping[int, Tensor], within: int, rounds: int) -> Tensor:
    """``parts[g]`` [units, blocks across]: what blocks of g units would hold of each, in units of the level; on the CPU."""
    total = torch.stack([part.sum(1).cpu() for part in parts.values()]).sum(0)
    size = (units := len(total)) // within
    place = torch.empty(units, dtype=torch.long)  # of each unit, on the CPU as the loop over exchanges is
    place[(total.view(within, size).argsort(dim=1, stable=True) + torch.arange(0, units, size)[:, None]).flatten()] = torch.arange(units)
    parts = {group: part for group, part in parts.items() if group > 1}  # alone in its block a unit costs the same everywhere
    for _ in range(rounds if parts else 0):
        if not _exchange(parts, place, size):
            break
    return place.argsort()


def _few(like: Tensor, width: int) -> int:
    """Rows of so many numbers for one temporary."""
    return max(1, CHUNK.get(like.device.type, 1 << 24) // width)


def _saturated(held: Tensor) -> Tensor:
    return held / (1 + held)


def _held(part: Tensor, place: Tensor, group: int) -> Tensor:
    """What each block holds, ``[blocks along, blocks across]``; added up in one order, on a GPU too."""
    in_order: Tensor = F.pad(part[place.argsort()], (0, 0, 0, -len(part) % group))
    return in_order.view(-1, group, part.shape[1]).sum(1)


def _adds(part: Tensor, place: Tensor, group: int) -> Tensor:
    """What each unit adds to the cost of each block, in exchange for an average unit of it: ``[units, blocks along]``."""
    block = place // group
    held, of = _held(part, place, group), block.bincount()
    without = held * (1 - 1 / of)[:, None]
    some = part.split(_few(part, part.shape[1]))
    adds = torch.stack([torch.cat([(_saturated(one + x) - _saturated(one)).sum(1) for x in some]) for one in without], 1)
    own = (_saturated(held[block]) - _saturated((held[block] - part).clamp_min(0))).sum(1)
    return adds.scatter_(1, block[:, None], own[:, None])


def _exchange(parts: Mapping[int, Tensor], place: Tensor, size: int) -> bool:
    """Exchange units pairwise, in place; whether any was. No exchange raises the cost: each is worked out, and no two touch one block."""
    (device,), exchanged = {part.device for part in parts.values()}, False
    adds = {group: _adds(part, place.to(device), group) for group, part in parts.items()}
    short = max(SHORT, FIRST * -(-len(place) // min(parts)))
    for _ in range(SWEEPS):
        there = place.to(device)
        pairs = _promising(adds, there, size)
        held = {group: _held(part, there, group) for group, part in parts.items()}
        at, taken, seen = place.tolist(), set[tuple[int, int]](), set[int]()
        for some in (pairs[:short],) if exchanged else (pairs[:short], pairs[short:]):  # the others only where nothing else is left
            once, which = (some.amin(1) * len(place) + some.amax(1)).unique(return_inverse=True)  # most promise each other
            both = torch.stack([once // len(place), once % len(place)], 1)
            gain = torch.stack([_gain(part, held[group], there // group, both) for group, part in parts.items()]).sum(0)[which]
            order = gain.argsort(descending=True, stable=True)
            for unit, partner in some[order[gain[order] > 0]].tolist():
                blocks = {(group, at[one] // group) for group in parts for one in (unit, partner)}
                if unit not in seen and not blocks & taken:
                    taken |= blocks
                    place[unit], place[partner] = at[partner], at[unit]
                seen.add(unit)  # with its best partner or none
            if taken:
                break
        if not taken:
            break
        exchanged = True
    return exchanged


def _promising(adds: Mapping[int, Tensor], place: Tensor, size: int) -> Tensor:
    """For each unit those with which an exchange promises most, the best of all first: ``[pairs, 2]``."""
    moves = {group: add - add.gather(1, (place // group)[:, None]) for group, add in adds.items()}  # [units, blocks] of going there
    found, promise = [], []
    for rows in torch.arange(len(place), device=place.device).split(_few(place, len(place))):
        change = torch.stack([move[rows][:, place // g] + move[:, place[rows] // g].mT for g, move in moves.items()]).sum(0)
        beside = torch.stack([place[rows][:, None] // g == place // g for g in moves]).all(0)
        change[beside | (place[rows][:, None] // size != place // size)] = torch.inf  # [rows, units]
        least = change.topk(min(FEW, len(place)), dim=1, largest=False)
        found.append(torch.stack([rows[:, None].expand_as(least.indices), least.indices], 2).flatten(0, 1))
        promise.append(least.values.flatten())
    best, order = torch.cat(promise).sort(stable=True)
    return torch.cat(found)[order[best.isfinite()]]


def _gain(part: Tensor, held: Tensor, block: Tensor, pairs: Tensor) -> Tensor:
    """What the cost falls by when two units change places, ``[pairs]``."""
    gain = [part.new_zeros(0)]
    for one, other in (some.unbind(1) for some in pairs.split(_few(part, part.shape[1]))):
        here, there, change = held[block[one]], held[block[other]], part[other] - part[one]  # [pairs, blocks across]
        before = _saturated(here) + _saturated(there)
        after = _saturated((here + change).clamp_min(0)) + _saturated((there - change).clamp_min(0))
        gain.append(torch.where(block[one] == block[other], 0, (before - after).sum(1)))
    return torch.cat(gain)
