"""Put hidden units that matter for the same inputs and outputs into the same blocks, so that other blocks can be pruned at little cost.

The method is a local search: pairs of units exchange their positions as long as that lowers the saturation cost (see `cluster`).
"""

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockprune.allocate.ranking import to_common_device
from blockprune.core.arguments import check_counts, check_fraction
from blockprune.core.grid import BlockGrid, BlockShape, block_elements, int_tuple, pool
from blockprune.core.patterns import suggest
from blockprune.core.progress import progress_bar
from blockprune.core.types import BlockScore, Scores, Where
from blockprune.core.unit_permutation import UnitPermutation
from blockprune.model.selection import select

MAX_SWEEPS = 30  # in one round of the search
CANDIDATES_PER_UNIT = 8  # partners of a unit for which the gain of an exchange is computed
FIRST_PAIRS_PER_BLOCK = 8  # a sweep computes the gains of the most promising pairs first: this number for each block,
MIN_FIRST_PAIRS = 512  # and at least this number
TEMPORARY_ELEMENTS = {"cpu": 1 << 20}  # by device type; a temporary tensor of this size stays in the CPU's caches
DEFAULT_TEMPORARY_ELEMENTS = 1 << 24

UnitScores = Mapping[int, Tensor]  # units in a block -> the scores that each unit adds to the blocks across, [units, blocks across]


def cluster(
    scores: Scores,
    plan: Sequence[UnitPermutation],
    *,
    block: BlockShape,
    sparsity: float = 0.25,
    rounds: int = 6,
    progress: bool | None = None,
) -> list[UnitPermutation]:
    """Better orders for a plan of `permute`: units whose high scores are in the same places share blocks, and other blocks get low scores.

    The orders minimise the saturation cost: the sum of ``S / (1 + S / L)`` over all blocks, where ``S`` is the score of a block and ``L``
    the score of the last block that is pruned at this sparsity. A block with a low score costs nearly ``S``, which is lost when the block
    is pruned; a block with a high score is kept, and costs at most ``L``. The search starts with the units sorted by their scores and
    exchanges pairs of units as long as that lowers the cost. It takes the axes in the order of the plan, each with the earlier ones
    already reordered.

    Args:
        scores: of single elements (blocks of ``(1, 1)``) that add up, such as ``metric.obs(data, stop_at=0)`` with output gradients, which
            estimates how much the loss increases if an element is removed.
        plan: the axes, such as `find_axes` returns; `UnitPermutation(torch.arange(units), rows=..., columns=...)` names an axis. Their
            orders are not used, but an axis without scores keeps its order.
        block: the block shape in which the weights will be pruned, ``(rows, inputs)``.
        sparsity: the share of the elements that will be pruned.
        rounds: the search evaluates all candidate pairs at most this many times; after the last time, some exchanges may still lower the
            cost.
        progress: show a progress bar; by default in a terminal and in a notebook.

    Raises:
        KeyError: no axis of the plan has scores.
        ValueError: scores that are not finite or not of single elements, a block that is not two positive numbers, a number of units that
            does not divide an axis.

    Example:
        >>> value = torch.tensor([[8.0, 9, 0, 0], [0, 0, 7, 9], [6, 9, 0, 0], [0, 0, 8, 7]])
        >>> scores = {"up": bp.BlockScore(value, bp.BlockGrid((4, 4), (1, 1)))}
        >>> (clustered,) = bp.cluster(scores, [bp.UnitPermutation(torch.arange(4), rows=["up"])], block=(2, 2), sparsity=0.5)
        >>> value[clustered.order]
        tensor([[0., 0., 7., 9.],
                [0., 0., 8., 7.],
                [6., 9., 0., 0.],
                [8., 9., 0., 0.]])
    """
    block = checked_block(block)
    sparsity = check_fraction("sparsity", sparsity)
    (rounds,) = check_counts(0, rounds=rounds)
    names = [name for permutation in plan for name in (*permutation.rows, *permutation.columns)]
    values = {
        name: _score_matrix(name, score)
        for name, score in to_common_device({name: scores[name] for name in names if name in scores}).items()
    }
    if plan and not values:
        raise KeyError(f"cluster has no scores for any of {names[:6]}{suggest(names[0] if names else '', scores)}")
    del scores  # their memory is given back as the values are reordered, if the caller does not hold them
    limit = _saturation_limit(values, block, sparsity)
    clustered: list[UnitPermutation] = []
    with torch.no_grad():
        for permutation in progress_bar(plan, "cluster", progress):
            relative = {count: unit_scores / limit for count, unit_scores in _unit_scores(values, permutation, block).items()}
            order = _local_search(relative, permutation.groups, rounds) if relative else permutation.order
            clustered.append(attrs.evolve(permutation, order=order))
            values = _reordered(values, clustered[-1])
    return clustered


def checked_block(block: BlockShape) -> tuple[int, int]:
    """The block shape of `cluster`, checked.

    Raises:
        TypeError: no sequence of integers.
        ValueError: not two positive ones.

    Example:
        >>> from blockprune.reorder.clustering import checked_block
        >>> checked_block([16, 8])
        (16, 8)
    """
    block = int_tuple("block", block)
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"block={block} must be two positive numbers, the rows and the inputs of a block, such as (16, 16)")
    return block[0], block[1]


def common_block(model: nn.Module, where: Where) -> tuple[int, int]:
    """The block shape of a rule, along outputs and inputs; whole axes count as 64.

    Raises:
        ValueError: the rule has several.

    Example:
        >>> from blockprune.reorder.clustering import common_block
        >>> common_block(nn.Linear(128, 8), bp.linears((4, -1)))
        (4, 64)
    """
    grids = [grid for _, grid in select(model, where).values()]
    blocks = {tuple(min(64, b) if b == s else b for b, s in zip(grid.block[:2], grid.shape[:2], strict=True)) for grid in grids}
    if len(blocks) != 1 or len(next(iter(blocks))) != 2:
        raise ValueError(f"where gives blocks of several shapes, {sorted(blocks)}; say which to sort for: block=(16, 16)")
    height, width = blocks.pop()
    return height, width


def _score_matrix(name: str, score: BlockScore) -> Tensor:
    """The scores of single elements, float32 ``[outputs, inputs]``."""
    value, grid = score.value, score.grid
    if grid.block[:2] != (1, 1) or len(grid.shape) < 2:
        raise ValueError(f"{name}: cluster needs scores of single elements, but the scores are of {grid}; collect with blocks of (1, 1)")
    if not value.isfinite().all():
        raise ValueError(f"{name}: the scores of {grid} have NaN or infinite values, which do not add up; cluster before `restrict`")
    matrix = value.detach().reshape(grid.size[0], -1).float()
    return matrix if (matrix >= 0).all() else matrix.clamp_min(0)


def _saturation_limit(values: Mapping[str, Tensor], block: tuple[int, int], sparsity: float) -> float:
    """The score of a whole block whose elements have the mean score of the last block that is pruned."""
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity:g} must be above 0 and below 1: it is the share of the elements that will be pruned")
    means = []
    for value in values.values():
        grid = BlockGrid(value.shape, [min(b, s) for b, s in zip(block, value.shape, strict=True)])
        means.append((pool(value, grid) / block_elements(grid, device=value.device)).flatten())
    if not means:
        return 1.0
    ascending = torch.cat(means).sort().values
    level = float(ascending[round(sparsity * (len(ascending) - 1))])
    level = level or float(ascending[ascending > 0].min() if ascending.any() else 1)  # blocks of zeros are pruned first, and at no cost
    return level * block[0] * block[1]


def _unit_scores(values: Mapping[str, Tensor], permutation: UnitPermutation, block: tuple[int, int]) -> dict[int, Tensor]:
    """By the number of units in a block, what each unit adds to the scores of the blocks across its axis: ``[units, blocks across]``."""
    by_count: dict[int, list[Tensor]] = {}
    for axis, names in enumerate((permutation.rows, permutation.columns)):
        for name in names:
            if name in values:
                units_per_block, unit_scores = _unit_scores_of(name, values[name], permutation, axis, block)
                by_count.setdefault(units_per_block, []).append(unit_scores)
    return {units_per_block: torch.cat(parts, 1) for units_per_block, parts in by_count.items()}


def _unit_scores_of(name: str, value: Tensor, permutation: UnitPermutation, axis: int, block: tuple[int, int]) -> tuple[int, Tensor]:
    """For one tensor, the number of units in a block and the units' scores, ``[units, blocks across]``.

    The copies of a unit are further columns, and so are the pieces of a unit that is taller than a block.
    """
    x = value if axis == 0 else value.mT  # [along, across]
    along, across = x.shape
    units, groups, copies = len(permutation.order), permutation.groups, permutation.copies.get(name, 1)
    if along % (units * copies):
        raise ValueError(
            f"{name}: axis {axis} of {tuple(value.shape)} has {along} entries, which do not divide into {copies} times {units} "
            "equal units; correct the plan"
        )
    entries = along // (units * copies)
    sums = F.pad(x, (0, -across % block[1 - axis])).unflatten(1, (-1, block[1 - axis])).sum(2)  # [along, blocks across]
    sums = sums.view(groups, copies, units // groups, entries, -1).movedim(1, 3)  # [groups, units of a group, entries, copies, blocks]
    pieces = -(-entries // block[axis])  # of a unit, each in a block of its own
    sums = F.pad(sums.flatten(3), (0, 0, 0, pieces * block[axis] - entries if pieces > 1 else 0))
    sums = sums.unflatten(2, (pieces, -1)).sum(3)  # [groups, units of a group, pieces, copies * blocks]
    return max(1, block[axis] // entries), sums.reshape(units, -1)


def _reordered(values: Mapping[str, Tensor], permutation: UnitPermutation) -> dict[str, Tensor]:
    """The score matrices with the permutation applied."""
    reordered = dict(values)
    for axis, names in enumerate((permutation.rows, permutation.columns)):
        for name in set(names) & values.keys():
            value = reordered[name]
            order = permutation.expand_order(name).to(value.device)
            reordered[name] = value.unflatten(axis, (len(order), -1)).index_select(axis, order).flatten(axis, axis + 1)
    return reordered


def _local_search(unit_scores: UnitScores, groups: int, rounds: int) -> Tensor:
    """The order in which the search ends, on the CPU; the scores of the units are relative to the saturation limit."""
    total = torch.stack([scores.sum(1).cpu() for scores in unit_scores.values()]).sum(0)
    group_size = (units := len(total)) // groups
    starts = torch.arange(0, units, group_size, device="cpu")[:, None]
    order = (total.view(groups, group_size).argsort(dim=1, stable=True) + starts).flatten()
    position = order.argsort()  # [units], the position of each unit
    movable = {count: scores for count, scores in unit_scores.items() if count > 1}  # a unit that fills a block costs the same everywhere
    for _ in range(rounds if movable else 0):
        improved = _search_round(movable, position, group_size)
        if torch.equal(improved, position):
            break
        position = improved
    return position.argsort()


def _search_round(unit_scores: UnitScores, position: Tensor, group_size: int) -> Tensor:
    """The positions after a round of sweeps; they do not change if no exchange of a candidate pair lowers the cost.

    Insertion costs are slow to compute, so a round computes them once, and all of its sweeps choose their candidate pairs by them.
    """
    (device,) = {scores.device for scores in unit_scores.values()}
    costs = {count: _insertion_costs(scores, position.to(device), count) for count, scores in unit_scores.items()}
    first = max(MIN_FIRST_PAIRS, FIRST_PAIRS_PER_BLOCK * -(-len(position) // min(unit_scores)))
    for sweep in range(MAX_SWEEPS):
        pairs = _candidate_pairs(costs, position.to(device), group_size)
        exchanges = _best_exchanges(unit_scores, position, pairs[:first])
        if not exchanges and sweep == 0:  # the search ends only if none of the other candidates lowers the cost either
            exchanges = _best_exchanges(unit_scores, position, pairs[first:])
        if not exchanges:
            break
        units, partners = torch.tensor(exchanges, device="cpu").unbind(1)
        position = position.index_put((torch.cat([units, partners]),), position[torch.cat([partners, units])])
    return position


def _temporary_rows(like: Tensor, width: int) -> int:
    """The number of rows of this width in one temporary tensor."""
    return max(1, TEMPORARY_ELEMENTS.get(like.device.type, DEFAULT_TEMPORARY_ELEMENTS) // width)


def _saturation_cost(relative: Tensor) -> Tensor:
    """The cost of blocks, from their scores relative to the saturation limit."""
    return relative / (1 + relative)


def _block_scores(scores: Tensor, position: Tensor, units_per_block: int) -> Tensor:
    """The score of each block, ``[blocks along, blocks across]``; the order of the additions is fixed, on a GPU too."""
    in_order: Tensor = F.pad(scores[position.argsort()], (0, 0, 0, -len(scores) % units_per_block))
    return in_order.view(-1, units_per_block, scores.shape[1]).sum(1)


def _insertion_costs(scores: Tensor, position: Tensor, units_per_block: int) -> Tensor:
    """By how much the cost rises if a unit takes the place of an average unit of a block: ``[units, blocks along]``."""
    block = position // units_per_block
    block_scores, units = _block_scores(scores, position, units_per_block), block.bincount()
    remaining = block_scores * (1 - 1 / units.to(block_scores))[:, None]
    chunks = scores.split(_temporary_rows(scores, scores.shape[1]))
    costs = torch.stack(
        [torch.cat([(_saturation_cost(row + chunk) - _saturation_cost(row)).sum(1) for chunk in chunks]) for row in remaining], 1
    )
    without_unit = (block_scores[block] - scores).clamp_min(0)
    own_costs = (_saturation_cost(block_scores[block]) - _saturation_cost(without_unit)).sum(1)  # in the block where the unit is
    return costs.scatter_(1, block[:, None], own_costs[:, None])


def _candidate_pairs(insertion_costs: Mapping[int, Tensor], position: Tensor, group_size: int) -> Tensor:
    """For each unit, the partners for which the estimated change of the cost is lowest, in ascending order of it: ``[pairs, 2]``.

    The estimate is the sum of the changes if each of the two units is inserted into the block of its partner.
    """
    changes = {count: costs - costs.gather(1, (position // count)[:, None]) for count, costs in insertion_costs.items()}
    of_blocks = {count: change.mT.contiguous() for count, change in changes.items()}  # whose rows are read several times as fast as columns
    pairs, estimates = [], []
    for rows in torch.arange(len(position), device=position.device).split(_temporary_rows(position, len(position))):
        estimate = torch.stack(
            [
                change[rows].index_select(1, position // count) + of_blocks[count][position[rows] // count]
                for count, change in changes.items()
            ]
        ).sum(0)  # [rows, units]
        same_blocks = torch.stack([position[rows][:, None] // count == position // count for count in changes]).all(0)
        estimate[same_blocks | (position[rows][:, None] // group_size != position // group_size)] = torch.inf
        best = estimate.topk(min(CANDIDATES_PER_UNIT, len(position)), dim=1, largest=False)
        pairs.append(torch.stack([rows[:, None].expand_as(best.indices), best.indices], 2).flatten(0, 1))
        estimates.append(best.values.flatten())
    ascending, order = torch.cat(estimates).sort(stable=True)
    return torch.cat(pairs)[order[ascending.isfinite()]]


def _best_exchanges(unit_scores: UnitScores, position: Tensor, pairs: Tensor) -> list[tuple[int, int]]:
    """Pairs whose exchange lowers the cost, chosen in descending order of their gains.

    A unit exchanges with its best partner or not at all. No two of the pairs touch the same block, so the gains add up.
    """
    gains = _exchange_gains(unit_scores, position.to(pairs.device), pairs)
    descending = gains.argsort(descending=True, stable=True)
    positions, exchanges = position.tolist(), []
    touched, decided = set[tuple[int, int]](), set[int]()
    for unit, partner in pairs[descending[gains[descending] > 0]].tolist():
        blocks = {(count, positions[either] // count) for count in unit_scores for either in (unit, partner)}
        if unit not in decided and not blocks & touched:
            touched |= blocks
            exchanges.append((unit, partner))
        decided.add(unit)
    return exchanges


def _exchange_gains(unit_scores: UnitScores, position: Tensor, pairs: Tensor) -> Tensor:
    """By how much the cost falls if the units of each pair exchange their positions, ``[pairs]``."""
    units = len(position)
    distinct, index = (pairs.amin(1) * units + pairs.amax(1)).unique(return_inverse=True)  # most pairs occur in both directions
    distinct_pairs = torch.stack([distinct // units, distinct % units], 1)
    gains = [
        _exchange_gains_of(scores, _block_scores(scores, position, count), position // count, distinct_pairs)
        for count, scores in unit_scores.items()
    ]
    return torch.stack(gains).sum(0)[index]


def _exchange_gains_of(scores: Tensor, block_scores: Tensor, block: Tensor, pairs: Tensor) -> Tensor:
    """The gains in the weights whose blocks hold the same number of units; ``block`` is the block of each unit."""
    gains = [scores.new_zeros(0)]
    for unit, partner in (chunk.unbind(1) for chunk in pairs.split(_temporary_rows(scores, scores.shape[1]))):
        ours, theirs = block_scores[block[unit]], block_scores[block[partner]]  # [pairs, blocks across]
        change = scores[partner] - scores[unit]
        before = _saturation_cost(ours) + _saturation_cost(theirs)
        after = _saturation_cost((ours + change).clamp_min(0)) + _saturation_cost((theirs - change).clamp_min(0))
        gains.append(torch.where(block[unit] == block[partner], 0, (before - after).sum(1)))
    return torch.cat(gains)
