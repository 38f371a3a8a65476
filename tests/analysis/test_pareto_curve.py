"""The curve of error against cost: points of one ranking, the same as the allocators', and what reads them off."""

import itertools
from collections.abc import Callable
from functools import partial

import matplotlib as mpl
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import inf, scores

import blockprune as bp
from blockprune.allocate.allocators import per_layer, per_model
from blockprune.allocate.budgets import lagrangian
from blockprune.analysis.pareto_curve import Pareto, pareto

exact = scores(palettes=("constant", "zeros", "ties", "signs"))
some_pruned = scores(palettes=("constant", "zeros", "ties", "signs"), pruned=True)
COST = {"a.weight": 4.0, "*": 0.5}


def error_of(masks: bp.Masks, found: bp.Scores) -> float:
    """The sum of score times elements over what is pruned, but for what was pruned already."""
    lost = {name: (s.value.double() * bp.block_elements(s.grid))[~masks[name].keep] for name, s in found.items()}
    return sum(float(x[~x.isneginf()].sum()) for x in lost.values())


@given(some_pruned, st.integers(2, 60))
def test_the_points_are_states_of_the_twin_evenly_spaced_from_end_to_end(found: bp.Scores, points: int) -> None:
    cost = {name: {"a.weight": 4.0}.get(name, 0.5) for name in found}
    curve, twin = pareto(found, cost=cost, points=points), reference.pareto(found, cost=cost)
    states = list(zip(curve.sparsities, curve.costs, curve.errors, strict=True))
    assert set(states) <= set(twin)
    assert (states[0], states[-1]) == (twin[0], twin[-1])
    assert list(curve.sparsities) == sorted(set(curve.sparsities))
    assert len(states) <= points
    begin, all_of = twin[0][0], [s for s, _, _ in twin]
    aims = {begin + (1 - begin) * i / (points - 1) for i in range(points)}
    assert set(curve.sparsities) == {min(s for s in all_of if s >= min(aim, 1.0) - 1e-9) for aim in aims}


@given(some_pruned)
def test_with_a_point_a_block_the_curve_is_the_whole_twin_where_blocks_are_alike(found: bp.Scores) -> None:
    alike = {name: bp.BlockScore(s.value.double(), bp.BlockGrid(s.grid.size, (1,) * len(s.grid.size))) for name, s in found.items()}
    twin = reference.pareto(alike)
    curve = pareto(alike, points=max(2, len(twin)))
    assert list(zip(curve.sparsities, curve.costs, curve.errors, strict=True)) == twin


@given(some_pruned)
def test_a_point_is_what_global_removes_at_its_sparsity(found: bp.Scores) -> None:
    curve, whole = pareto(found, points=7), sum(s.grid.elements for s in found.values())
    for sparsity, cost, error in zip(curve.sparsities, curve.costs, curve.errors, strict=True):
        masks = per_model(found, sparsity, max_sparsity=1, min_keep=0)
        assert bp.sparsity(masks) == pytest.approx(sparsity)
        assert whole - cost == pytest.approx(sparsity * whole)
        assert error_of(masks, found) == pytest.approx(error)


@given(exact)
def test_a_point_with_a_cost_is_what_lagrangian_removes_at_its_share_of_the_cost(found: bp.Scores) -> None:
    cost = {name: {"a.weight": 4.0}.get(name, 0.5) for name in found}
    curve = pareto(found, cost=cost, points=7)
    budget = partial(lagrangian, cost=cost, relative=False, max_sparsity=1)
    for sparsity, kept, error in zip(curve.sparsities, curve.costs, curve.errors, strict=True):
        masks = per_layer(found, 1 - kept / curve.costs[0], budget=budget)
        assert bp.sparsity(masks) == pytest.approx(sparsity)
        assert error_of(masks, found) == pytest.approx(error)


@given(scores(palettes=("ties", "near")))
def test_the_error_is_convex_in_the_cost(found: bp.Scores) -> None:
    curve = pareto(found, cost={name: {"a.weight": 4.0}.get(name, 0.5) for name in found})
    slopes = [(e2 - e1) / (c1 - c2) for (c1, e1), (c2, e2) in itertools.pairwise(zip(curve.costs, curve.errors, strict=True))]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(slopes))


@given(exact, st.integers(-40, 40), st.integers(0, 400))
def test_at_reads_the_curve(found: bp.Scores, error: int, cost: int) -> None:
    curve = pareto(found, points=9)
    states = list(zip(curve.sparsities, curve.costs, curve.errors, strict=True))
    assert curve.sparsity_for(cost=cost) == min(s for s, c, _ in states if c <= cost)
    if error >= min(curve.errors):
        assert curve.sparsity_for(error=error) == max(s for s, _, e in states if e <= error)
    else:
        with pytest.raises(ValueError, match="no point is as low; the lowest error"):
            curve.sparsity_for(error=error)


def test_infinite_errors_come_last() -> None:
    curve = pareto({"w": bp.BlockScore(torch.tensor([inf, 1.0, 2.0, inf]), bp.BlockGrid((4,), (1,)))})
    assert curve.errors == (0, 1, 3, inf, inf)
    assert curve.sparsity_for(error=1e9) == 0.5


def test_the_table_prints_renders_and_is_drawn() -> None:
    value = torch.arange(100.0)
    curve = pareto({"w": bp.BlockScore(value, bp.BlockGrid((400,), (4,)))}, points=101)
    lines = repr(curve).splitlines()
    assert len(lines) == 13
    assert (lines[0].split(), lines[1].split(), lines[-1].split()) == (
        ["sparsity", "kept", "weights", "predicted", "error"],
        ["0.0%", "400", "0"],
        ["100.0%", "0", "1.98e+04"],
    )
    assert len({len(line) for line in lines}) == 1
    assert curve._repr_html_().count("<tr>") == 13
    mpl.use("Agg")
    axis = curve.plot()
    assert axis.lines[0].get_ydata()[-1] == curve.errors[-1]
    assert curve.plot(axis) is axis
    assert len(axis.lines) == 2


def test_a_short_curve_prints_whole() -> None:
    assert len(repr(Pareto((0.0, 0.5, 1.0), (16.0, 8.0, 0.0), (0.0, 1.5, 9.0))).splitlines()) == 4
    assert len(repr(Pareto((1.0,), (0.0,), (0.0,))).splitlines()) == 2


def test_a_model_pruned_already_is_one_point() -> None:
    curve = pareto({"w": bp.BlockScore(torch.tensor([-inf, -inf]), bp.BlockGrid((4,), (2,)))})
    assert (curve.sparsities, curve.costs, curve.errors) == ((1.0,), (0.0,), (0.0,))


GOOD = {"fc.weight": bp.BlockScore(torch.arange(4.0), bp.BlockGrid((4,), (1,)))}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pareto(GOOD, points=1), "points=1 must be a whole number of 2 or more"),
        (lambda: pareto({}), "no scores to rank"),
        (lambda: pareto(GOOD, cost={"*": -1.0}), r"cost\['fc.weight'\]=-1.0 must be a positive number"),
        (lambda: pareto(GOOD).sparsity_for(), "needs exactly one of error= and cost="),
        (lambda: pareto(GOOD).sparsity_for(error=1.0, cost=1.0), "needs exactly one of error= and cost="),
        (lambda: pareto(GOOD).sparsity_for(cost=-1.0), "no point is as low; the lowest cost"),
    ],
)
def test_bad_input_says_what_would_do(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_limit_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match="error='1' must be a number"):
        pareto(GOOD).sparsity_for(error="1")  # type: ignore[arg-type]
