"""Units that share blocks: whatever is exchanged, the cost falls; what was planted is found; the function stays the same."""

import importlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from test_permute import Attention, Gated, run
from torch import Tensor

import blockprune as bp
from blockprune.permute import Shuffle, permute

cluster: Any = importlib.import_module("blockprune.cluster")  # bp.cluster is the function


def scored(**values: Tensor) -> dict[str, bp.BlockScore]:
    return {name: bp.BlockScore(value, bp.BlockGrid(value.shape, (1, 1))) for name, value in values.items()}


def block_sums(value: Tensor, block: tuple[int, int]) -> list[tuple[float, int]]:
    """Each block's sum and elements, one after the other."""
    found = []
    for i in range(0, value.shape[0], block[0]):
        for j in range(0, value.shape[1], block[1]):
            piece = value[i : i + block[0], j : j + block[1]]
            found.append((float(piece.double().sum()), piece.numel()))
    return found


def cost(values: Mapping[str, Tensor], block: tuple[int, int], level: float) -> float:
    """What is lost if each block goes or stays, softly: I / (1 + I / L), L the level times the elements of a whole block."""
    limit = level * block[0] * block[1]
    return sum(held / (1 + held / limit) for value in values.values() for held, _ in block_sums(value, block))


def level_of(values: Mapping[str, Tensor], block: tuple[int, int], sparsity: float) -> float:
    means = sorted(held / elements for value in values.values() for held, elements in block_sums(value, block))
    return means[round(sparsity * (len(means) - 1))]


def moved(values: Mapping[str, Tensor], plan: Sequence[Shuffle]) -> dict[str, Tensor]:
    found = dict(values)
    for shuffle in plan:
        for name in shuffle.rows:
            found[name] = found[name][shuffle.along(name)]
        for name in shuffle.columns:
            found[name] = found[name][:, shuffle.along(name)]
    return found


@given(st.data(), seeds)
def test_the_cost_is_never_above_that_of_sorted_units(data: st.DataObject, seed: int) -> None:
    """Axis after axis, in whole and ragged blocks."""
    torch.manual_seed(seed)
    units, block = (
        data.draw(st.integers(2, 24)),
        data.draw(st.sampled_from([(2, 2), (4, 4), (2, 4), (3, 3), (4, 1), (1, 3), (3, 2), (2, 3), (4, 6)])),
    )
    values = {"up": torch.rand(units, 8) ** 4, "down": torch.rand(6, units) ** 4}
    plan = [Shuffle(torch.arange(units), rows=["up"], columns=["down"]), Shuffle(torch.arange(8), columns=["up"])]
    level = level_of(values, block, 0.25)
    found = bp.cluster(scored(**values), plan, block=block)
    total = values["up"].sum(1) + values["down"].sum(0)
    sorted_first = moved(values, [Shuffle(total.argsort(stable=True), rows=["up"], columns=["down"])])
    after_one = moved(values, found[:1])
    assert cost(after_one, block, level) <= cost(sorted_first, block, level) * (1 + 1e-5)
    columns = Shuffle(after_one["up"].sum(0).argsort(stable=True), columns=["up"])
    assert cost(moved(values, found), block, level) <= cost(moved(after_one, [columns]), block, level) * (1 + 1e-5)
    assert [(s.rows, s.columns) for s in found] == [(s.rows, s.columns) for s in plan]


@given(seeds, st.sampled_from([(2, 2), (3, 2), (4, 4), (6, 4)]), st.sampled_from([1, 7, 10_000]))
def test_what_is_looked_at_first_decides_nothing_about_the_end(seed: int, groups: tuple[int, int], short: int) -> None:
    """However few pairs are looked at first: no sweep raises the cost, and where nothing was exchanged no pair looked at would gain."""
    torch.manual_seed(seed)
    parts, place = {group: torch.rand(24, 5) ** 4 for group in groups}, torch.randperm(24)

    def total() -> float:
        held = torch.cat([part[place.argsort()].view(-1, group, 5).sum(1) for group, part in parts.items()])
        return float((held / (1 + held)).sum())

    before, ended = total(), False
    with mock.patch.multiple(cluster, SHORT=short, FIRST=0, FEW=24):
        for _ in range(60):
            ended = not cluster._exchange(parts, place, 24)
            assert total() <= before * (1 + 1e-6)
            before = total()
            if ended:
                break
    assert ended
    for a, b in itertools.combinations(range(24), 2):
        place[[a, b]] = place[[b, a]]
        assert total() >= before - 1e-5
        place[[a, b]] = place[[b, a]]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_planted_clusters_are_found(size: int) -> None:
    """Units of one kind matter in one place, the kinds lie mixed: sorting cannot tell them apart, as all sums are alike."""
    torch.manual_seed(0)
    kind = torch.arange(3).repeat(4 * size)[torch.randperm(12 * size)]
    value = 0.01 * torch.rand(12 * size, 3 * size)
    for unit, k in enumerate(kind.tolist()):
        value[unit, k * size : (k + 1) * size] += 1 + 0.1 * torch.rand(size)
    (found,) = bp.cluster(scored(w=value), [Shuffle(torch.arange(12 * size), rows=["w"])], block=(size, size), sparsity=0.5)
    sums = sorted(held / elements for held, elements in block_sums(value[found.order], (size, size)))
    assert sums[len(sums) * 2 // 3 - 1] < 0.05  # two of three places of each kind are empty


def test_it_is_the_best_order_of_a_few_units() -> None:
    """Against every order of six units in pairs."""
    best = 0
    for seed in range(10):
        torch.manual_seed(seed)
        values = {"w": torch.rand(6, 4) ** 3}
        level = level_of(values, (2, 2), 0.25)
        (found,) = bp.cluster(scored(**values), [Shuffle(torch.arange(6), rows=["w"])], block=(2, 2))
        costs = [cost({"w": values["w"][list(order)]}, (2, 2), level) for order in pairings(list(range(6)))]
        mine = cost({"w": values["w"][found.order]}, (2, 2), level)
        assert mine <= min(costs) * 1.02
        best += mine <= min(costs) * (1 + 1e-5)
    assert best >= 8  # exchanges of two may end beside the best


def pairings(units: list[int]) -> list[list[int]]:
    if not units:
        return [[]]
    first, *rest = units
    return [[first, other, *more] for i, other in enumerate(rest) for more in pairings(rest[:i] + rest[i + 1 :])]


def test_units_stay_in_their_groups_and_copies_move_along() -> None:
    """Channels of each value head, which three query heads share in the output projection."""
    torch.manual_seed(0)
    model, x = Attention(6, 2).double(), torch.randn(2, 5, 8).double()
    where = bp.first_of(bp.named("v.weight", (1, 1)), bp.named("o.weight", (1, 1)))
    scores = bp.metric.l2(bp.collect.weights(model, where=where))
    start = Shuffle(torch.arange(8), rows=("v.weight", "v.bias"), columns=("o.weight",), within=2, copies={"o.weight": 3})
    (found,) = bp.cluster(scores, [start], block=(2, 2))
    assert found.order[:4].max() < 4
    assert not torch.equal(found.order, start.order)
    torch.testing.assert_close(run(permute(model, [found]), (x,)), run(model, (x,)))
    same = permute(permute(model, [found]), [found.inverse])
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True))


def test_more_is_left_after_pruning_than_from_sorted_units() -> None:
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
    plan = [Shuffle(torch.arange(64), rows=rows, columns=columns)]
    by_sum = [bp.weakest_first(scores, units=64, rows=rows, columns=columns)]

    def kept(model: torch.nn.Module) -> float:
        data = bp.collect.weights(model, where=bp.linears((8, 8)))
        masks = bp.allocate.global_(bp.metric.l2(data), 0.5)
        final = bp.finalize(bp.apply_masks(model, masks))
        return sum(float(p.detach().square().sum()) for p in final.parameters() if p.ndim == 2)

    found = permute(model, bp.cluster(scores, plan, block=(8, 8), sparsity=0.5))
    x = torch.randn(3, 32)
    torch.testing.assert_close(run(found, (x,)), run(model, (x,)), atol=1e-5, rtol=1e-5)
    every = sum(float(p.detach().square().sum()) for p in model.parameters() if p.ndim == 2)
    assert kept(found) > 0.96 * every > kept(permute(model, by_sum))


ONE = Shuffle(torch.arange(4), rows=["w"])
MISTAKES = {
    "no scores": (KeyError, r"cluster has no scores for any of \['up'\]; near it", {"plan": [Shuffle(torch.arange(4), rows=["up"])]}),
    "large blocks": (
        ValueError,
        r"w: cluster looks at single elements, but the scores are of .*\(1, 1\)",
        {"scores": {"w": bp.BlockScore(torch.ones(2, 2), bp.BlockGrid((4, 4), (2, 2)))}},
    ),
    "NaN": (ValueError, r"w: the scores of .* have NaN", {"scores": scored(w=torch.full((4, 4), torch.nan))}),
    "block": (ValueError, r"block=\(4,\) must be two positive numbers", {"block": (4,)}),
    "units": (
        ValueError,
        r"w: axis 0 of \(4, 4\) has 4 entries, not 1 times 3 equal units",
        {"plan": [Shuffle(torch.arange(3), rows=["w"])]},
    ),
    "sparsity": (ValueError, r"sparsity=1 must be above 0 and below 1", {"sparsity": 1}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str) -> None:
    error, message, change = MISTAKES[mistake]
    given_ = {"scores": scored(w=torch.rand(4, 4)), "plan": [ONE], "block": (2, 2), **change}
    with pytest.raises(error, match=message):
        bp.cluster(given_.pop("scores"), given_.pop("plan"), **given_)


def test_nothing_is_written_to_and_zeros_are_fine() -> None:
    value = torch.rand(6, 6)
    scores, plan = scored(w=value.clone()), [Shuffle(torch.arange(6), rows=["w"], columns=[])]
    bp.cluster(scores, plan, block=(2, 2))
    assert torch.equal(scores["w"].value, value)
    assert torch.equal(plan[0].order, torch.arange(6))
    (found,) = bp.cluster(scored(w=torch.zeros(6, 6)), plan, block=(2, 2))
    assert sorted(found.order.tolist()) == list(range(6))


@given(st.data(), seeds)
def test_no_unit_leaves_its_group(data: st.DataObject, seed: int) -> None:
    """Also where a group is one block, or part of one, so that hardly any partner is left."""
    torch.manual_seed(seed)
    groups, size, block = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    units = groups * size
    values = {"up": torch.rand(units, 8) ** 4, "down": torch.rand(6, units) ** 4}
    plan = [Shuffle(torch.arange(units), rows=["up"], columns=["down"], within=groups)]
    (found,) = bp.cluster(scored(**values), plan, block=(block, block), sparsity=0.3)
    assert (found.order // size == torch.arange(units) // size).all()


def test_an_axis_without_scores_keeps_its_order() -> None:
    scores = scored(w=torch.rand(8, 8))
    one, other = Shuffle(torch.arange(8), rows=["w"]), Shuffle(torch.tensor([2, 0, 1]), rows=["conv"])
    assert bp.cluster(scores, [other, one, other], block=(2, 2)) == [other, *bp.cluster(scores, [one], block=(2, 2)), other]
    assert bp.cluster(scores, [], block=(2, 2)) == []


@given(st.integers(0, 100), st.sampled_from([1, 7, 40]))
def test_orders_do_not_depend_on_how_much_is_looked_at_at_a_time(seed: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = scored(up=torch.rand(24, 10, generator=generator), down=torch.rand(6, 24, generator=generator))
    plan = [Shuffle(torch.arange(24), rows=["up"], columns=["down"])]
    want = bp.cluster(scores, plan, block=(4, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cluster.CHUNK, "cpu", chunk)
        assert bp.cluster(scores, plan, block=(4, 4)) == want
