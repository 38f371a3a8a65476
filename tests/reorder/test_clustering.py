"""Clustered units: exchanges never raise the cost, planted clusters are recovered, and the model computes the same."""

import itertools
from collections.abc import Mapping, Sequence
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from test_permutation import Attention, Gated, run
from torch import Tensor

import blockprune as bp
from blockprune.core.unit_permutation import UnitPermutation
from blockprune.reorder import clustering
from blockprune.reorder.permutation import permute


def scored(**values: Tensor) -> dict[str, bp.BlockScore]:
    return {name: bp.BlockScore(value, bp.BlockGrid(value.shape, (1, 1))) for name, value in values.items()}


def block_sums(value: Tensor, block: tuple[int, int]) -> list[tuple[float, int]]:
    """The sum and the number of elements of each block."""
    sums = []
    for i in range(0, value.shape[0], block[0]):
        for j in range(0, value.shape[1], block[1]):
            piece = value[i : i + block[0], j : j + block[1]]
            sums.append((float(piece.double().sum()), piece.numel()))
    return sums


def cost(values: Mapping[str, Tensor], block: tuple[int, int], level: float) -> float:
    """The saturation cost: the sum of S / (1 + S / L) over blocks of score S, where L is the level times the elements of a whole block."""
    limit = level * block[0] * block[1]
    return sum(total / (1 + total / limit) for value in values.values() for total, _ in block_sums(value, block))


def level_of(values: Mapping[str, Tensor], block: tuple[int, int], sparsity: float) -> float:
    """The mean score of the last block that is pruned."""
    means = sorted(total / elements for value in values.values() for total, elements in block_sums(value, block))
    return means[round(sparsity * (len(means) - 1))]


def reordered(values: Mapping[str, Tensor], plan: Sequence[UnitPermutation]) -> dict[str, Tensor]:
    result = dict(values)
    for permutation in plan:
        for name in permutation.rows:
            result[name] = result[name][permutation.expand_order(name)]
        for name in permutation.columns:
            result[name] = result[name][:, permutation.expand_order(name)]
    return result


@given(st.data(), seeds)
def test_the_cost_is_never_above_that_of_sorted_units(data: st.DataObject, seed: int) -> None:
    """After each axis, in whole and ragged blocks."""
    torch.manual_seed(seed)
    units, block = (
        data.draw(st.integers(2, 24)),
        data.draw(st.sampled_from([(2, 2), (4, 4), (2, 4), (3, 3), (4, 1), (1, 3), (3, 2), (2, 3), (4, 6)])),
    )
    values = {"up": torch.rand(units, 8) ** 4, "down": torch.rand(6, units) ** 4}
    plan = [UnitPermutation(torch.arange(units), rows=["up"], columns=["down"]), UnitPermutation(torch.arange(8), columns=["up"])]
    level = level_of(values, block, 0.25)
    clustered = bp.cluster(scored(**values), plan, block=block)
    total = values["up"].sum(1) + values["down"].sum(0)
    sorted_first = reordered(values, [UnitPermutation(total.argsort(stable=True), rows=["up"], columns=["down"])])
    after_one = reordered(values, clustered[:1])
    assert cost(after_one, block, level) <= cost(sorted_first, block, level) * (1 + 1e-5)
    columns = UnitPermutation(after_one["up"].sum(0).argsort(stable=True), columns=["up"])
    assert cost(reordered(values, clustered), block, level) <= cost(reordered(after_one, [columns]), block, level) * (1 + 1e-5)
    assert [(s.rows, s.columns) for s in clustered] == [(s.rows, s.columns) for s in plan]


@given(seeds, st.sampled_from([(2, 2), (3, 2), (4, 4), (6, 4)]), st.sampled_from([1, 7, 10_000]))
def test_the_search_ends_only_where_no_exchange_of_any_pair_lowers_the_cost(seed: int, counts: tuple[int, int], first_pairs: int) -> None:
    """And no round raises the cost, however few pairs a sweep evaluates first."""
    torch.manual_seed(seed)
    unit_scores, position = {count: torch.rand(24, 5) ** 4 for count in counts}, torch.randperm(24)

    def total(position: Tensor) -> float:
        sums = torch.cat([scores[position.argsort()].view(-1, count, 5).sum(1) for count, scores in unit_scores.items()])
        return float((sums / (1 + sums)).sum())

    before, ended = total(position), False
    with mock.patch.multiple(clustering, MIN_FIRST_PAIRS=first_pairs, FIRST_PAIRS_PER_BLOCK=0, CANDIDATES_PER_UNIT=24):
        for _ in range(60):
            improved = clustering._search_round(unit_scores, position, 24)
            ended, position = torch.equal(improved, position), improved
            assert total(position) <= before * (1 + 1e-6)
            before = total(position)
            if ended:
                break
    assert ended
    for a, b in itertools.combinations(range(24), 2):
        exchanged = position.clone()
        exchanged[[a, b]] = position[[b, a]]
        assert total(exchanged) >= before - 1e-5


@pytest.mark.parametrize("size", [2, 4, 8])
def test_planted_clusters_are_recovered(size: int) -> None:
    """The units of a kind have high scores in the same columns. Kinds alternate at random, and sorting fails because all sums are alike."""
    torch.manual_seed(0)
    kind = torch.arange(3).repeat(4 * size)[torch.randperm(12 * size)]
    value = 0.01 * torch.rand(12 * size, 3 * size)
    for unit, k in enumerate(kind.tolist()):
        value[unit, k * size : (k + 1) * size] += 1 + 0.1 * torch.rand(size)
    (clustered,) = bp.cluster(scored(w=value), [UnitPermutation(torch.arange(12 * size), rows=["w"])], block=(size, size), sparsity=0.5)
    sums = sorted(total / elements for total, elements in block_sums(value[clustered.order], (size, size)))
    assert sums[len(sums) * 2 // 3 - 1] < 0.05  # each kind has low scores in two thirds of the columns


def test_the_order_of_a_few_units_is_the_best() -> None:
    """The cost is compared with that of every assignment of six units to pairs."""
    optimal = 0
    for seed in range(10):
        torch.manual_seed(seed)
        values = {"w": torch.rand(6, 4) ** 3}
        level = level_of(values, (2, 2), 0.25)
        (clustered,) = bp.cluster(scored(**values), [UnitPermutation(torch.arange(6), rows=["w"])], block=(2, 2))
        costs = [cost({"w": values["w"][list(order)]}, (2, 2), level) for order in pairings(list(range(6)))]
        actual = cost({"w": values["w"][clustered.order]}, (2, 2), level)
        assert actual <= min(costs) * 1.02
        optimal += actual <= min(costs) * (1 + 1e-5)
    assert optimal >= 8  # a search by exchanges of pairs may end in a local minimum


def pairings(units: list[int]) -> list[list[int]]:
    if not units:
        return [[]]
    first, *rest = units
    return [[first, partner, *more] for i, partner in enumerate(rest) for more in pairings(rest[:i] + rest[i + 1 :])]


def test_units_stay_in_their_groups_and_all_copies_are_permuted() -> None:
    """The units are the channels of the value heads; three query heads share each of them in the output projection."""
    torch.manual_seed(0)
    model, x = Attention(6, 2).double(), torch.randn(2, 5, 8).double()
    where = bp.first_of(bp.named("v.weight", (1, 1)), bp.named("o.weight", (1, 1)))
    scores = bp.metric.l2(bp.collect.weights(model, where=where))
    start = UnitPermutation(torch.arange(8), rows=("v.weight", "v.bias"), columns=("o.weight",), groups=2, copies={"o.weight": 3})
    (clustered,) = bp.cluster(scores, [start], block=(2, 2))
    assert clustered.order[:4].max() < 4
    assert not torch.equal(clustered.order, start.order)
    torch.testing.assert_close(run(permute(model, [clustered]), (x,)), run(model, (x,)))
    restored = permute(permute(model, [clustered]), [clustered.inverse])
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), model.parameters(), strict=True))


def test_clustered_units_leave_more_weight_after_pruning_than_sorted_units() -> None:
    torch.manual_seed(0)
    model = Gated()
    model.gate_proj, model.up_proj, model.down_proj = torch.nn.Linear(32, 64), torch.nn.Linear(32, 64, bias=False), torch.nn.Linear(64, 32)
    kind = torch.arange(4).repeat(16)[torch.randperm(64)]
    with torch.no_grad():
        for k in range(4):
            strong = torch.zeros(4).index_fill(0, torch.tensor([k, (k + 1) % 4]), 1).repeat_interleave(8) + 0.05
            model.gate_proj.weight[kind == k] *= strong
            model.up_proj.weight[kind == k] *= strong
            model.down_proj.weight[:, kind == k] *= strong[:, None]
    scores = bp.metric.l2(bp.collect.weights(model, where=bp.linears((1, 1))))
    scores = {name: bp.BlockScore(s.value.square(), s.grid) for name, s in scores.items()}
    rows, columns = ("gate_proj.weight", "gate_proj.bias", "up_proj.weight"), ("down_proj.weight",)
    plan = [UnitPermutation(torch.arange(64), rows=rows, columns=columns)]
    by_sum = [bp.sort_units(scores, units=64, rows=rows, columns=columns)]

    def kept(model: torch.nn.Module) -> float:
        data = bp.collect.weights(model, where=bp.linears((8, 8)))
        masks = bp.allocate.per_model(bp.metric.l2(data), 0.5)
        final = bp.finalize(bp.apply_masks(model, masks))
        return sum(float(p.detach().square().sum()) for p in final.parameters() if p.ndim == 2)

    clustered = permute(model, bp.cluster(scores, plan, block=(8, 8), sparsity=0.5))
    x = torch.randn(3, 32)
    torch.testing.assert_close(run(clustered, (x,)), run(model, (x,)), atol=1e-5, rtol=1e-5)
    total = sum(float(p.detach().square().sum()) for p in model.parameters() if p.ndim == 2)
    assert kept(clustered) > 0.96 * total > kept(permute(model, by_sum))


AXIS = UnitPermutation(torch.arange(4), rows=["w"])
MISTAKES = {
    "no scores": (
        KeyError,
        r"cluster has no scores for any of \['up'\]; the names are 'w'",
        {"plan": [UnitPermutation(torch.arange(4), rows=["up"])]},
    ),
    "large blocks": (
        ValueError,
        r"w: cluster needs scores of single elements, but the scores are of .*\(1, 1\)",
        {"scores": {"w": bp.BlockScore(torch.ones(2, 2), bp.BlockGrid((4, 4), (2, 2)))}},
    ),
    "NaN": (ValueError, r"w: the scores of .* have NaN", {"scores": scored(w=torch.full((4, 4), torch.nan))}),
    "block": (ValueError, r"block=\(4,\) must be two positive numbers", {"block": (4,)}),
    "units": (
        ValueError,
        r"w: axis 0 of \(4, 4\) has 4 entries, which do not divide into 1 times 3 equal units",
        {"plan": [UnitPermutation(torch.arange(3), rows=["w"])]},
    ),
    "sparsity": (ValueError, r"sparsity=1 must be above 0 and below 1", {"sparsity": 1}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_error_that_names_the_parameter(mistake: str) -> None:
    error, message, change = MISTAKES[mistake]
    arguments = {"scores": scored(w=torch.rand(4, 4)), "plan": [AXIS], "block": (2, 2), **change}
    with pytest.raises(error, match=message):
        bp.cluster(arguments.pop("scores"), arguments.pop("plan"), **arguments)


def test_the_arguments_do_not_change_and_zeros_are_valid_scores() -> None:
    value = torch.rand(6, 6)
    scores, plan = scored(w=value.clone()), [UnitPermutation(torch.arange(6), rows=["w"], columns=[])]
    bp.cluster(scores, plan, block=(2, 2))
    assert torch.equal(scores["w"].value, value)
    assert torch.equal(plan[0].order, torch.arange(6))
    (clustered,) = bp.cluster(scored(w=torch.zeros(6, 6)), plan, block=(2, 2))
    assert sorted(clustered.order.tolist()) == list(range(6))


@given(st.data(), seeds)
def test_no_unit_leaves_its_group(data: st.DataObject, seed: int) -> None:
    """Also where a group is one block or a part of one, so that a unit has few partners or none."""
    torch.manual_seed(seed)
    groups, size, block = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    units = groups * size
    values = {"up": torch.rand(units, 8) ** 4, "down": torch.rand(6, units) ** 4}
    plan = [UnitPermutation(torch.arange(units), rows=["up"], columns=["down"], groups=groups)]
    (clustered,) = bp.cluster(scored(**values), plan, block=(block, block), sparsity=0.3)
    assert (clustered.order // size == torch.arange(units) // size).all()


def test_an_axis_without_scores_keeps_its_order() -> None:
    scores = scored(w=torch.rand(8, 8))
    scored_axis, unscored = UnitPermutation(torch.arange(8), rows=["w"]), UnitPermutation(torch.tensor([2, 0, 1]), rows=["conv"])
    assert bp.cluster(scores, [unscored, scored_axis, unscored], block=(2, 2)) == [
        unscored,
        *bp.cluster(scores, [scored_axis], block=(2, 2)),
        unscored,
    ]
    assert bp.cluster(scores, [], block=(2, 2)) == []


@pytest.mark.slow
@given(st.integers(0, 100), st.sampled_from([1, 7, 40]))
def test_orders_do_not_depend_on_the_size_of_temporary_tensors(seed: int, elements: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = scored(up=torch.rand(24, 10, generator=generator), down=torch.rand(6, 24, generator=generator))
    plan = [UnitPermutation(torch.arange(24), rows=["up"], columns=["down"])]
    want = bp.cluster(scores, plan, block=(4, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clustering.TEMPORARY_ELEMENTS, "cpu", elements)
        assert bp.cluster(scores, plan, block=(4, 4)) == want
