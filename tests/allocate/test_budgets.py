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
from strategies import dyadic, inf, sparsities
from strategies import scores as any_scores

import blockprune as bp
from blockprune.allocate.allocators import per_layer, per_model
from blockprune.allocate.budgets import block_costs, lagrangian, loss_weighted, owl

ERRORS = ("constant", "zeros", "ties", "near")  # 0 or more, and finite
errors = any_scores(palettes=ERRORS)
some_pruned = any_scores(palettes=ERRORS, pruned=True)
caps, least = st.sampled_from([0.25, 0.5, 0.7, 0.9, 1.0]), st.integers(0, 3)
lams = st.sampled_from([0.0, 0.08, 0.3, 1.0])
ANY = {"owl": owl, "lagrangian": partial(lagrangian, max_sparsity=1), "loss_weighted": partial(loss_weighted, max_sparsity=1)}
every = pytest.mark.parametrize("budget", ANY.values(), ids=ANY)


@st.composite
def costs(draw: st.DrawFn) -> dict[str, float]:
    """Dyadic, so that sums do not round."""
    return {name: draw(st.sampled_from([0.5, 1.0, 3.0, 8.0])) for name in ("a.weight", "b.weight", "c.weight")}


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    return {"cost": draw(costs()), "relative": draw(st.booleans()), "max_sparsity": draw(caps), "min_keep": draw(least)}


def score(values: list[float], block: int = 1) -> bp.BlockScore:
    return bp.BlockScore(torch.tensor(values), bp.BlockGrid((len(values) * block,), (block,)))


def elements(scores: bp.Scores) -> int:
    return sum(s.grid.elements for s in scores.values())


def mean(spread: Mapping[str, float], scores: bp.Scores) -> float:
    return sum(spread[name] * s.grid.elements for name, s in scores.items()) / elements(scores)


def pruned(scores: bp.Scores) -> dict[str, float]:
    """The share of each parameter that is pruned already."""
    return {name: int((bp.block_elements(s.grid) * s.value.isneginf()).sum()) / s.grid.elements for name, s in scores.items()}


def only(cost: dict[str, float], scores: bp.Scores) -> dict[str, float]:
    return {name: cost[name] for name in scores}


# All of them.


@every
@given(scores=errors, one=sparsities, two=sparsities)
def test_a_higher_sparsity_is_higher_everywhere_so_masks_nest(
    budget: Callable[..., dict[str, float]], scores: bp.Scores, one: float, two: float
) -> None:
    low, high = budget(scores, min(one, two)), budget(scores, max(one, two))
    assert all(low[name] <= high[name] + 1e-9 for name in scores)


@every
@given(scores=some_pruned, sparsity=sparsities)
def test_per_layer_removes_the_sparsity_up_to_a_block_of_each_parameter(
    budget: Callable[..., dict[str, float]], scores: bp.Scores, sparsity: float
) -> None:
    already = pruned(scores)
    assume(mean(already, scores) <= sparsity)
    removed = bp.sparsity(per_layer(scores, sparsity, budget=budget)) * elements(scores)
    assert abs(removed - sparsity * elements(scores)) <= sum(int(bp.block_elements(s.grid).max()) for s in scores.values())


@every
@given(scores=some_pruned, sparsity=sparsities)
def test_every_parameter_gets_a_sparsity_and_none_below_what_is_pruned_already(
    budget: Callable[..., dict[str, float]], scores: bp.Scores, sparsity: float
) -> None:
    spread, already = budget(scores, sparsity), pruned(scores)
    assert list(spread) == list(scores)
    assert all(already[name] <= s <= 1 for name, s in spread.items())


@every
def test_sparsity_0_and_1_are_nothing_and_everything_and_no_parameters_have_none(budget: Callable[..., dict[str, float]]) -> None:
    scores = {"a": score([1.0, 2.0, 30.0]), "b": score([1.0, 1.0], 4)}
    assert budget(scores, 0.0) == {"a": 0.0, "b": 0.0}
    assert budget(scores, 1.0) == {"a": 1.0, "b": 1.0}
    assert budget({}, 0.5) == {}


@every
def test_a_single_parameter_gets_the_closest_to_the_sparsity(budget: Callable[..., dict[str, float]]) -> None:
    assert budget({"a": score([4.0, 1.0, 2.0, 30.0])}, 0.5) == pytest.approx({"a": 0.5})


@every
def test_a_budget_does_not_write_into_scores(budget: Callable[..., dict[str, float]]) -> None:
    scores = {"a": score([1.0, -inf, 30.0]), "b": score([0.0, 1.0], 4)}
    before = {name: attrs.evolve(s, value=s.value.clone()) for name, s in scores.items()}
    budget(scores, 0.75)
    assert scores == before


# Outliers.


@given(some_pruned, sparsities, lams, st.sampled_from([1.0, 2.0, 5.0]), st.booleans())
def test_owl_equals_its_twin(scores: bp.Scores, sparsity: float, lam: float, m: float, in_layers: bool) -> None:
    key = {"a.weight": "one", "b.weight": "two", "c.weight": "one"}.__getitem__ if in_layers else str
    twin = reference.owl(scores, sparsity, m=m, lam=lam, key=key)
    assert owl(scores, sparsity, m=m, lam=lam, layer_of=key) == pytest.approx(twin, abs=1e-9)


@given(errors, sparsities, lams)
def test_owl_spends_the_budget_stays_within_lam_and_keeps_more_where_outliers_are(scores: bp.Scores, sparsity: float, lam: float) -> None:
    spread = owl(scores, sparsity, lam=lam, m=1.5)
    assert mean(spread, scores) == pytest.approx(sparsity, abs=1e-9)
    assert all(abs(s - sparsity) <= lam + 1e-9 for s in spread.values())
    outliers = {}
    for name, s in scores.items():
        size = bp.block_elements(s.grid)
        outliers[name] = float(size[s.value.double() > 1.5 * (s.value.double() * size).sum() / s.grid.elements].sum()) / s.grid.elements
    for a, b in itertools.permutations(scores, 2):
        assert outliers[a] <= outliers[b] or spread[a] <= spread[b] + 1e-9


def test_unclipped_owl_is_the_formula_of_the_authors() -> None:
    scores = {str(k): score([100.0] * k + [1.0] * (1000 - k)) for k in (0, 10, 30, 40)}
    ratio = torch.tensor([0.0, 1.0, 3.0, 4.0])  # percent
    scaled = (ratio - ratio.min()) / (ratio.max() - ratio.min()) * 0.08 * 2
    density = scaled - scaled.mean() + (1 - 0.7)
    assert list(owl(scores, 0.7).values()) == pytest.approx((1 - density).tolist())


def test_one_layer_of_outliers_among_many_stays_within_lam_and_the_others_share_the_rest() -> None:
    scores = {"spiky": score([100.0] + [1.0] * 99), **{f"flat{i}": score([1.0] * 100) for i in range(9)}}
    spread = owl(scores, 0.7)
    assert spread["spiky"] == pytest.approx(0.62)
    assert spread["flat3"] == pytest.approx(0.7 + 0.08 / 9)


def test_parameters_of_a_layer_share_the_outlier_ratio_of_all_their_scores() -> None:
    scores = {"0.q": score([100.0] + [1.0] * 99), "0.k": score([1.0] * 100), "1.q": score([1.0] * 100), "1.k": score([1.0] * 100)}
    spread = owl(scores, 0.5, layer_of=lambda name: name.split(".", maxsplit=1)[0])
    assert spread == pytest.approx({"0.q": 0.42, "0.k": 0.42, "1.q": 0.58, "1.k": 0.58})


# One multiplier for the model.


@given(some_pruned, dyadic, options())
def test_lagrangian_equals_its_twin(scores: bp.Scores, sparsity: float, options: dict[str, Any]) -> None:
    options = options | {"cost": only(options["cost"], scores)}
    twin = reference.lagrangian(scores, sparsity, **options)
    if twin is None:
        with pytest.raises(ValueError, match="cannot be met"):
            lagrangian(scores, sparsity, **options)
    else:
        assert lagrangian(scores, sparsity, **options) == twin


@given(errors, dyadic, costs(), caps, least)
def test_the_limits_are_kept(scores: bp.Scores, sparsity: float, cost: dict[str, float], cap: float, least: int) -> None:
    try:
        spread = lagrangian(scores, sparsity, cost=only(cost, scores), max_sparsity=cap, min_keep=least)
    except ValueError:
        assert sparsity > cap or least
        return
    masks = per_layer(scores, sparsity, budget=lambda scores, s: spread)
    for name, mask in masks.items():
        assert spread[name] <= cap + 1e-9
        assert int(mask.keep.sum()) >= min(least, mask.grid.blocks)


@given(errors, dyadic, costs())
def test_what_per_layer_removes_costs_the_sparsity_up_to_half_a_block(scores: bp.Scores, sparsity: float, cost: dict[str, float]) -> None:
    prune = partial(per_layer, budget=partial(lagrangian, cost=only(cost, scores), max_sparsity=1))
    sizes = {name: bp.block_elements(s.grid) * cost[name] for name, s in scores.items()}
    removed = sum(float(sizes[name][~mask.keep].sum()) for name, mask in prune(scores, sparsity).items())
    asked = sparsity * sum(float(size.sum()) for size in sizes.values())
    assert abs(removed - asked) <= max(float(size.max()) for size in sizes.values()) / 2


@given(any_scores(palettes=("many", "signs", "edges", "ties")), dyadic, caps)
def test_loss_weighted_within_parameters_is_per_model(scores: bp.Scores, sparsity: float, cap: float) -> None:
    assume(sparsity <= cap)
    assert per_layer(scores, sparsity, budget=partial(loss_weighted, max_sparsity=cap)) == per_model(
        scores, sparsity, max_sparsity=cap, min_keep=0
    )


@given(any_scores(palettes=("ties", "near"), rank=(1, 2), layers=2), dyadic, costs(), st.booleans())
def test_no_other_choice_of_blocks_that_costs_as_much_has_a_lower_error(
    scores: bp.Scores, sparsity: float, cost: dict[str, float], relative: bool
) -> None:
    blocks = reference.priced_blocks(scores, cost=only(cost, scores), relative=relative)
    assume(len(blocks) <= 10)
    masks = per_layer(scores, sparsity, budget=partial(lagrangian, cost=only(cost, scores), relative=relative, max_sparsity=1))
    chosen = [b for b in blocks if not masks[b.name].keep.flatten()[b.index]]
    paid, error = sum(b.cost for b in chosen), sum(b.rank * b.cost for b in chosen)
    for other in itertools.chain.from_iterable(itertools.combinations(blocks, n) for n in range(len(blocks) + 1)):
        assert sum(b.cost for b in other) < paid or sum(b.rank * b.cost for b in other) >= error - 1e-9


@given(errors, dyadic, costs(), st.sampled_from([2.0**-40, 2.0**20]), st.booleans())
def test_the_unit_of_cost_and_a_common_unit_of_error_do_not_matter(
    scores: bp.Scores, sparsity: float, cost: dict[str, float], unit: float, relative: bool
) -> None:
    lagrangian_ = partial(lagrangian, relative=relative, max_sparsity=0.7)
    assume(sparsity <= 0.7)
    other = {name: attrs.evolve(s, value=s.value.double() * unit) for name, s in scores.items()}
    assert lagrangian_(scores, sparsity, cost=only(cost, scores)) == lagrangian_(
        other, sparsity, cost={name: c * unit for name, c in only(cost, scores).items()}
    )


@given(errors, dyadic)
def test_relative_errors_do_not_depend_on_the_scale_of_a_parameter(scores: bp.Scores, sparsity: float) -> None:
    other = {name: attrs.evolve(s, value=s.value.double() * 4.0**i) for i, (name, s) in enumerate(scores.items())}
    assert lagrangian(scores, sparsity, max_sparsity=1) == lagrangian(other, sparsity, max_sparsity=1)


def test_a_parameter_of_higher_cost_loses_more_and_a_star_names_the_rest() -> None:
    scores = {"a.w": score([1.0, 2.0, 3.0, 4.0]), "b.w": score([1.0, 2.0, 3.0, 4.0])}
    assert lagrangian(scores, 0.5, cost={"b.*": 10, "*": 1}, max_sparsity=1) == {"a.w": 0.0, "b.w": 0.5}
    assert lagrangian(scores, 0.5, cost={"*": 7}) == lagrangian(scores, 0.5) == {"a.w": 0.5, "b.w": 0.5}


def test_the_margin_raises_a_limit_that_is_a_number_to_the_sparsity_plus_the_margin() -> None:
    scores = {"a": score([1.0, 2.0, 3.0, 4.0]), "b": score([5.0, 6.0, 7.0, 8.0])}
    assert loss_weighted(scores, 0.5, max_sparsity=0.5) == loss_weighted(scores, 0.5, max_sparsity=0.5, margin=0.0) == {"a": 0.5, "b": 0.5}
    assert loss_weighted(scores, 0.5, max_sparsity=0.5, margin=0.25) == {"a": 0.75, "b": 0.25}
    assert loss_weighted(scores, 0.5, max_sparsity=0.5, margin=0.75) == {"a": 1.0, "b": 0.0}  # no limit is above 1
    assert loss_weighted(scores, 0.25, max_sparsity=0.5, margin=0.125) == {"a": 0.5, "b": 0.0}  # 0.375 is below the limit
    assert loss_weighted(scores, 0.5, max_sparsity={"a": 0.5}, margin=0.25) == {"a": 0.5, "b": 0.5}  # a mapping says what it means
    with pytest.raises(ValueError, match=r"sparsity=0\.75 cannot be met: max_sparsity=0\.5"):
        loss_weighted(scores, 0.75, max_sparsity=0.5)
    assert loss_weighted(scores, 0.75, max_sparsity=0.5, margin=0.25) == {"a": 1.0, "b": 0.5}


@given(errors, dyadic, caps, st.sampled_from([0.0, 0.125, 0.5]))
def test_a_margin_is_the_limit_written_out(scores: bp.Scores, sparsity: float, cap: float, margin: float) -> None:
    limit = max(cap, min(1.0, sparsity + margin)) if margin else cap
    assume(sparsity <= limit)
    assert loss_weighted(scores, sparsity, max_sparsity=cap, margin=margin) == loss_weighted(scores, sparsity, max_sparsity=limit)


def test_limits_can_be_given_by_name() -> None:
    scores = {"a.w": score([1.0, 2.0, 3.0, 4.0]), "b.w": score([5.0, 6.0, 7.0, 8.0])}
    assert loss_weighted(scores, 0.5, max_sparsity={"a.*": 0.25}) == {"a.w": 0.25, "b.w": 0.75}
    assert lagrangian(scores, 0.5, relative=False, min_keep={"a.*": 2}) == {"a.w": 0.5, "b.w": 0.5}


def test_what_is_pruned_already_counts_as_removed_and_is_in_no_total() -> None:
    scores = {"a": score([-inf, -inf, 3.0, 1.0]), "b": score([1.0, 3.0, 3.0, 3.0])}
    assert lagrangian(scores, 0.125) == {"a": 0.5, "b": 0.0}
    assert lagrangian(scores, 0.375) == {"a": 0.5, "b": 0.25}  # 1 of 10 is less than 1 of 4
    assert lagrangian(scores, 0.25, max_sparsity=0.25) == {"a": 0.5, "b": 0.0}


def test_infinite_errors_are_pruned_last_and_are_in_no_total() -> None:
    assert lagrangian({"a": score([inf, 1.0, 3.0]), "b": score([2.0, 2.0, inf])}, 4 / 6) == pytest.approx({"a": 2 / 3, "b": 2 / 3})


def test_a_parameter_without_error_is_pruned_first() -> None:
    assert lagrangian({"a": score([1.0, 2.0]), "b": score([0.0, 0.0])}, 0.5, max_sparsity=1) == {"a": 0.0, "b": 1.0}


def test_block_costs_are_error_per_cost_elements_and_cost() -> None:
    rank, size, price = block_costs({"a": score([1.0, 3.0]), "b": score([4.0, -inf], 2)}, cost={"a": 2, "b": 0.5}, relative=True)
    assert rank.tolist() == [0.125, 0.375, 1.0, -inf]  # totals 4 and 8
    assert (size.tolist(), price.tolist()) == ([1, 1, 2, 2], [2, 2, 1, 1])


# Bad input.

GOOD = {"fc.weight": score([1.0, 2.0, 3.0, 4.0])}


def bad(value: float) -> dict[str, bp.BlockScore]:
    return {"fc.weight": score([1.0, value, 3.0, 4.0])}


@every
@pytest.mark.parametrize(("sparsity", "error"), [(1.5, ValueError), (-0.1, ValueError), (float("nan"), ValueError), ("half", TypeError)])
def test_the_error_for_an_invalid_sparsity_says_so(
    budget: Callable[..., dict[str, float]], sparsity: float, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"sparsity=.* must be .*from 0 .keep all. to 1"):
        budget(GOOD, sparsity)


@every
def test_the_error_for_scores_that_cannot_be_ranked_names_the_parameter_and_shape(budget: Callable[..., dict[str, float]]) -> None:
    with pytest.raises(ValueError, match=r"fc.weight: 1 of the scores \(4,\) are NaN"):
        budget(bad(float("nan")), 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: owl(GOOD, 0.5, m=0), ValueError, "m=0 above 0"),
        (lambda: owl(GOOD, 0.5, m="5"), TypeError, "m='5' must be a number"),  # type: ignore[arg-type]
        (lambda: owl(GOOD, 0.5, lam=-0.1), ValueError, "lam=-0.1 from 0 to 1"),
        (lambda: owl(bad(-1.0), 0.5), ValueError, r"fc.weight: .* 1 of the scores \(4,\) are negative or infinite"),
        (lambda: owl(bad(inf), 0.5), ValueError, r"fc.weight: .* 1 of the scores \(4,\) are negative or infinite"),
        (lambda: lagrangian(bad(-20.0), 0.5), ValueError, r"fc.weight: the errors \(4,\) add up to -12, .*relative=False"),
        (lambda: lagrangian(GOOD, 0.5, cost={"other": 1.0}), KeyError, "cost has a key 'other' that matches no parameter"),
        (lambda: lagrangian(GOOD | {"b": GOOD["fc.weight"]}, 0.5, cost={"b": 1.0}), KeyError, r"cost has no key for 'fc.weight'; .*'\*'"),
        (lambda: lagrangian(GOOD, 0.5, cost={"*": 0}), ValueError, r"cost\['fc.weight'\]=0 must be a positive number"),
        (lambda: lagrangian(GOOD, 0.5, cost={"*": float("nan")}), ValueError, r"cost\['fc.weight'\]=nan must be a positive number"),
        (lambda: lagrangian(GOOD, 0.5, max_sparsity=1.5), ValueError, "max_sparsity of fc.weight=1.5"),
        (lambda: lagrangian(GOOD, 0.5, min_keep=-1), ValueError, "min_keep=-1 of fc.weight"),
        (lambda: lagrangian(GOOD, 0.75, min_keep=2), ValueError, "sparsity=0.75 cannot be met: .* at most 0.5 of the cost"),
        (lambda: loss_weighted(GOOD, 0.95), ValueError, "sparsity=0.95 cannot be met: max_sparsity=0.9 .* at most 0.9 of the cost"),
    ],
)
def test_an_option_that_cannot_be_met_says_so(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("budget", [bp.budgets.uniform, bp.budgets.erk, *ANY.values()])
def test_a_percentage_is_no_fraction(budget: Any) -> None:
    scores = {"w": bp.BlockScore(torch.ones(4), bp.BlockGrid((4,), (1,)))}
    with pytest.raises(ValueError, match=r"sparsity=50 must be from 0 .*50 % is 0\.5"):
        budget(scores, 50)
    with pytest.raises(TypeError, match=r"sparsity='0\.5' must be a number"):
        budget(scores, "0.5")
