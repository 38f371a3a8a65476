"""Budgets across parameters: equal to their twins, exact, nested, within their bounds, and the least error for the cost."""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import attrs
import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import dyadic, inf, scores, sparsities

import blockprune as bp
from blockprune.allocate import global_, per_layer
from blockprune.distribute import lagrangian, loss_weighted, owl, priced

ERRORS = ("constant", "zeros", "ties", "near")  # 0 or more, and finite
errors = scores(palettes=ERRORS)
some_pruned = scores(palettes=ERRORS, pruned=True)
caps, least = st.sampled_from([0.25, 0.5, 0.7, 0.9, 1.0]), st.integers(0, 3)
lams = st.sampled_from([0.0, 0.08, 0.3, 1.0])
ANY = {"owl": owl, "lagrangian": partial(lagrangian, max_sparsity=1), "loss_weighted": partial(loss_weighted, max_sparsity=1)}
every = pytest.mark.parametrize("distribute", ANY.values(), ids=ANY)


@st.composite
def costs(draw: st.DrawFn) -> dict[str, float]:
    """Dyadic, so that sums do not round."""
    return {name: draw(st.sampled_from([0.5, 1.0, 3.0, 8.0])) for name in ("a.weight", "b.weight", "c.weight")}


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    return {"cost": draw(costs()), "relative": draw(st.booleans()), "max_sparsity": draw(caps), "min_keep": draw(least)}


def score(values: list[float], block: int = 1) -> bp.BlockScore:
    return bp.BlockScore(torch.tensor(values), bp.BlockGrid((len(values) * block,), (block,)))


def elements(found: bp.Scores) -> int:
    return sum(s.grid.elements for s in found.values())


def mean(spread: Mapping[str, float], found: bp.Scores) -> float:
    return sum(spread[name] * s.grid.elements for name, s in found.items()) / elements(found)


def pruned(found: bp.Scores) -> dict[str, float]:
    """The share of each parameter that is pruned already."""
    return {name: int((bp.block_elements(s.grid) * s.value.isneginf()).sum()) / s.grid.elements for name, s in found.items()}


def only(cost: dict[str, float], found: bp.Scores) -> dict[str, float]:
    return {name: cost[name] for name in found}


# All of them.


@every
@given(found=errors, one=sparsities, two=sparsities)
def test_a_higher_sparsity_is_higher_everywhere_so_masks_nest(
    distribute: Callable[..., dict[str, float]], found: bp.Scores, one: float, two: float
) -> None:
    low, high = distribute(found, min(one, two)), distribute(found, max(one, two))
    assert all(low[name] <= high[name] + 1e-9 for name in found)


@every
@given(found=some_pruned, sparsity=sparsities)
def test_per_layer_removes_the_asked_within_a_block_a_parameter(
    distribute: Callable[..., dict[str, float]], found: bp.Scores, sparsity: float
) -> None:
    already = pruned(found)
    assume(mean(already, found) <= sparsity)
    removed = bp.sparsity(per_layer(found, sparsity, distribute=distribute)) * elements(found)
    assert abs(removed - sparsity * elements(found)) <= sum(int(bp.block_elements(s.grid).max()) for s in found.values())


@every
@given(found=some_pruned, sparsity=sparsities)
def test_every_parameter_gets_a_share_and_none_below_what_is_pruned_already(
    distribute: Callable[..., dict[str, float]], found: bp.Scores, sparsity: float
) -> None:
    spread, already = distribute(found, sparsity), pruned(found)
    assert list(spread) == list(found)
    assert all(already[name] <= s <= 1 for name, s in spread.items())


@every
def test_sparsity_0_and_1_are_nothing_and_everything_and_no_parameters_have_none(distribute: Callable[..., dict[str, float]]) -> None:
    found = {"a": score([1.0, 2.0, 30.0]), "b": score([1.0, 1.0], 4)}
    assert distribute(found, 0.0) == {"a": 0.0, "b": 0.0}
    assert distribute(found, 1.0) == {"a": 1.0, "b": 1.0}
    assert distribute({}, 0.5) == {}


@every
def test_a_single_parameter_gets_the_closest_to_the_asked(distribute: Callable[..., dict[str, float]]) -> None:
    assert distribute({"a": score([4.0, 1.0, 2.0, 30.0])}, 0.5) == pytest.approx({"a": 0.5})


@every
def test_a_distribution_does_not_write_into_scores(distribute: Callable[..., dict[str, float]]) -> None:
    found = {"a": score([1.0, -inf, 30.0]), "b": score([0.0, 1.0], 4)}
    before = {name: attrs.evolve(s, value=s.value.clone()) for name, s in found.items()}
    distribute(found, 0.75)
    assert found == before


# Outliers.


@given(some_pruned, sparsities, lams, st.sampled_from([1.0, 2.0, 5.0]), st.booleans())
def test_owl_equals_its_twin(found: bp.Scores, sparsity: float, lam: float, m: float, grouped: bool) -> None:
    key = {"a.weight": "one", "b.weight": "two", "c.weight": "one"}.__getitem__ if grouped else str
    twin = reference.owl(found, sparsity, m=m, lam=lam, key=key)
    assert owl(found, sparsity, m=m, lam=lam, groups=key) == pytest.approx(twin, abs=1e-9)


@given(errors, sparsities, lams)
def test_owl_spends_the_budget_stays_within_lam_and_keeps_more_where_outliers_are(found: bp.Scores, sparsity: float, lam: float) -> None:
    spread = owl(found, sparsity, lam=lam, m=1.5)
    assert mean(spread, found) == pytest.approx(sparsity, abs=1e-9)
    assert all(abs(s - sparsity) <= lam + 1e-9 for s in spread.values())
    outliers = {}
    for name, s in found.items():
        size = bp.block_elements(s.grid)
        outliers[name] = float(size[s.value.double() > 1.5 * (s.value.double() * size).sum() / s.grid.elements].sum()) / s.grid.elements
    for a, b in itertools.permutations(found, 2):
        assert outliers[a] <= outliers[b] or spread[a] <= spread[b] + 1e-9


def test_unclipped_owl_is_the_formula_of_the_authors() -> None:
    found = {str(k): score([100.0] * k + [1.0] * (1000 - k)) for k in (0, 10, 30, 40)}
    ratio = torch.tensor([0.0, 1.0, 3.0, 4.0])  # percent
    scaled = (ratio - ratio.min()) / (ratio.max() - ratio.min()) * 0.08 * 2
    density = scaled - scaled.mean() + (1 - 0.7)
    assert list(owl(found, 0.7).values()) == pytest.approx((1 - density).tolist())


def test_one_layer_of_outliers_among_many_is_held_within_lam_and_the_others_share_the_rest() -> None:
    found = {"spiky": score([100.0] + [1.0] * 99), **{f"flat{i}": score([1.0] * 100) for i in range(9)}}
    spread = owl(found, 0.7)
    assert spread["spiky"] == pytest.approx(0.62)
    assert spread["flat3"] == pytest.approx(0.7 + 0.08 / 9)


def test_grouped_parameters_share_the_outlier_ratio_of_their_scores_together() -> None:
    found = {"0.q": score([100.0] + [1.0] * 99), "0.k": score([1.0] * 100), "1.q": score([1.0] * 100), "1.k": score([1.0] * 100)}
    spread = owl(found, 0.5, groups=lambda name: name.split(".", maxsplit=1)[0])
    assert spread == pytest.approx({"0.q": 0.42, "0.k": 0.42, "1.q": 0.58, "1.k": 0.58})


# One multiplier for the model.


@given(some_pruned, dyadic, options())
def test_lagrangian_equals_its_twin(found: bp.Scores, sparsity: float, options: dict[str, Any]) -> None:
    options = options | {"cost": only(options["cost"], found)}
    twin = reference.lagrangian(found, sparsity, **options)
    if twin is None:
        with pytest.raises(ValueError, match="cannot be met"):
            lagrangian(found, sparsity, **options)
    else:
        assert lagrangian(found, sparsity, **options) == twin


@given(errors, dyadic, costs(), caps, least)
def test_the_bounds_are_kept(found: bp.Scores, sparsity: float, cost: dict[str, float], cap: float, least: int) -> None:
    try:
        spread = lagrangian(found, sparsity, cost=only(cost, found), max_sparsity=cap, min_keep=least)
    except ValueError:
        assert sparsity > cap or least
        return
    masks = per_layer(found, sparsity, distribute=lambda scores, s: spread)
    for name, mask in masks.items():
        assert spread[name] <= cap + 1e-9
        assert int(mask.keep.sum()) >= min(least, mask.grid.blocks)


@given(errors, dyadic, costs())
def test_what_per_layer_removes_costs_the_asked_to_half_a_block(found: bp.Scores, sparsity: float, cost: dict[str, float]) -> None:
    prune = partial(per_layer, distribute=partial(lagrangian, cost=only(cost, found), max_sparsity=1))
    sizes = {name: bp.block_elements(s.grid) * cost[name] for name, s in found.items()}
    removed = sum(float(sizes[name][~mask.keep].sum()) for name, mask in prune(found, sparsity).items())
    asked = sparsity * sum(float(size.sum()) for size in sizes.values())
    assert abs(removed - asked) <= max(float(size.max()) for size in sizes.values()) / 2


@given(scores(palettes=("many", "signs", "edges", "ties")), dyadic, caps)
def test_by_score_within_parameters_is_global(found: bp.Scores, sparsity: float, cap: float) -> None:
    assume(sparsity <= cap)
    assert per_layer(found, sparsity, distribute=partial(loss_weighted, max_sparsity=cap)) == global_(
        found, sparsity, max_sparsity=cap, min_keep=0
    )


@given(scores(palettes=("ties", "near"), rank=(1, 2), layers=2), dyadic, costs(), st.booleans())
def test_no_other_choice_of_blocks_that_costs_as_much_has_a_lower_error(
    found: bp.Scores, sparsity: float, cost: dict[str, float], relative: bool
) -> None:
    blocks = reference.falling(found, cost=only(cost, found), relative=relative)
    assume(len(blocks) <= 10)
    masks = per_layer(found, sparsity, distribute=partial(lagrangian, cost=only(cost, found), relative=relative, max_sparsity=1))
    chosen = [b for b in blocks if not masks[b.name].keep.flatten()[b.index]]
    paid, error = sum(b.cost for b in chosen), sum(b.rank * b.cost for b in chosen)
    for other in itertools.chain.from_iterable(itertools.combinations(blocks, n) for n in range(len(blocks) + 1)):
        assert sum(b.cost for b in other) < paid or sum(b.rank * b.cost for b in other) >= error - 1e-9


@given(errors, dyadic, costs(), st.sampled_from([2.0**-40, 2.0**20]), st.booleans())
def test_the_unit_of_cost_and_a_common_unit_of_error_do_not_matter(
    found: bp.Scores, sparsity: float, cost: dict[str, float], unit: float, relative: bool
) -> None:
    here = partial(lagrangian, relative=relative, max_sparsity=0.7)
    assume(sparsity <= 0.7)
    other = {name: attrs.evolve(s, value=s.value.double() * unit) for name, s in found.items()}
    assert here(found, sparsity, cost=only(cost, found)) == here(
        other, sparsity, cost={name: c * unit for name, c in only(cost, found).items()}
    )


@given(errors, dyadic)
def test_relative_errors_do_not_depend_on_the_scale_of_a_parameter(found: bp.Scores, sparsity: float) -> None:
    other = {name: attrs.evolve(s, value=s.value.double() * 4.0**i) for i, (name, s) in enumerate(found.items())}
    assert lagrangian(found, sparsity, max_sparsity=1) == lagrangian(other, sparsity, max_sparsity=1)


def test_a_dearer_parameter_loses_more_and_a_pattern_names_the_rest() -> None:
    found = {"a.w": score([1.0, 2.0, 3.0, 4.0]), "b.w": score([1.0, 2.0, 3.0, 4.0])}
    assert lagrangian(found, 0.5, cost={"b.*": 10, "*": 1}, max_sparsity=1) == {"a.w": 0.0, "b.w": 0.5}
    assert lagrangian(found, 0.5, cost={"*": 7}) == lagrangian(found, 0.5) == {"a.w": 0.5, "b.w": 0.5}


def test_bounds_are_by_name_too() -> None:
    found = {"a.w": score([1.0, 2.0, 3.0, 4.0]), "b.w": score([5.0, 6.0, 7.0, 8.0])}
    assert loss_weighted(found, 0.5, max_sparsity={"a.*": 0.25}) == {"a.w": 0.25, "b.w": 0.75}
    assert lagrangian(found, 0.5, relative=False, min_keep={"a.*": 2}) == {"a.w": 0.5, "b.w": 0.5}


def test_what_is_pruned_counts_towards_the_budget_and_is_in_no_total() -> None:
    found = {"a": score([-inf, -inf, 3.0, 1.0]), "b": score([1.0, 3.0, 3.0, 3.0])}
    assert lagrangian(found, 0.125) == {"a": 0.5, "b": 0.0}
    assert lagrangian(found, 0.375) == {"a": 0.5, "b": 0.25}  # 1 of 10 is less than 1 of 4
    assert lagrangian(found, 0.25, max_sparsity=0.25) == {"a": 0.5, "b": 0.0}


def test_infinite_errors_fall_last_and_are_in_no_total() -> None:
    assert lagrangian({"a": score([inf, 1.0, 3.0]), "b": score([2.0, 2.0, inf])}, 4 / 6) == pytest.approx({"a": 2 / 3, "b": 2 / 3})


def test_a_parameter_without_error_falls_first() -> None:
    assert lagrangian({"a": score([1.0, 2.0]), "b": score([0.0, 0.0])}, 0.5, max_sparsity=1) == {"a": 0.0, "b": 1.0}


def test_priced_is_error_per_cost_elements_and_cost() -> None:
    rank, size, price = priced({"a": score([1.0, 3.0]), "b": score([4.0, -inf], 2)}, cost={"a": 2, "b": 0.5}, relative=True)
    assert rank.tolist() == [0.125, 0.375, 1.0, -inf]  # totals 4 and 8
    assert (size.tolist(), price.tolist()) == ([1, 1, 2, 2], [2, 2, 1, 1])


# Bad input.

GOOD = {"fc.weight": score([1.0, 2.0, 3.0, 4.0])}


def bad(value: float) -> dict[str, bp.BlockScore]:
    return {"fc.weight": score([1.0, value, 3.0, 4.0])}


@every
@pytest.mark.parametrize(("sparsity", "error"), [(1.5, ValueError), (-0.1, ValueError), (float("nan"), ValueError), ("half", TypeError)])
def test_a_sparsity_that_is_none_says_so(distribute: Callable[..., dict[str, float]], sparsity: float, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"sparsity=.* must be .*from 0 .keep all. to 1"):
        distribute(GOOD, sparsity)


@every
def test_scores_without_a_rank_name_their_parameter_and_shape(distribute: Callable[..., dict[str, float]]) -> None:
    with pytest.raises(ValueError, match=r"fc.weight: 1 of the scores \(4,\) are NaN"):
        distribute(bad(float("nan")), 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: owl(GOOD, 0.5, m=0), ValueError, "m=0 above 0"),
        (lambda: owl(GOOD, 0.5, lam=-0.1), ValueError, "lam=-0.1 from 0 to 1"),
        (lambda: owl(bad(-1.0), 0.5), ValueError, r"fc.weight: .* 1 of the scores \(4,\) are negative or infinite"),
        (lambda: owl(bad(inf), 0.5), ValueError, r"fc.weight: .* 1 of the scores \(4,\) are negative or infinite"),
        (lambda: lagrangian(bad(-20.0), 0.5), ValueError, r"fc.weight: the errors \(4,\) add up to -12, .*relative=False"),
        (lambda: lagrangian(GOOD, 0.5, cost={"other": 1.0}), KeyError, "cost has a key 'other' that fits no parameter"),
        (lambda: lagrangian(GOOD | {"b": GOOD["fc.weight"]}, 0.5, cost={"b": 1.0}), KeyError, r"no key for fc.weight; .*'\*'"),
        (lambda: lagrangian(GOOD, 0.5, cost={"*": 0}), ValueError, "cost=0 of fc.weight must be a positive number"),
        (lambda: lagrangian(GOOD, 0.5, cost={"*": float("nan")}), ValueError, "cost=nan of fc.weight must be a positive number"),
        (lambda: lagrangian(GOOD, 0.5, max_sparsity=1.5), ValueError, "max_sparsity of fc.weight=1.5"),
        (lambda: lagrangian(GOOD, 0.5, min_keep=-1), ValueError, "min_keep=-1 of fc.weight"),
        (lambda: lagrangian(GOOD, 0.75, min_keep=2), ValueError, "sparsity=0.75 cannot be met: .* at most 0.5 of the cost"),
        (lambda: loss_weighted(GOOD, 0.95), ValueError, "sparsity=0.95 cannot be met: max_sparsity=0.9 .* at most 0.9 of the cost"),
    ],
)
def test_an_option_that_cannot_be_met_says_so(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
