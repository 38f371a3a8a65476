"""Laws 2, 3, 4, 7 and 8 of allocation: the closest reachable sparsity, nested, pure, equal to a sort written out."""

import copy
import math
import re
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from typing import Any
from unittest import mock

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import DTYPES, PALETTES, drawn, dtypes, dyadic, grids, inf, seeds, shares_memory, sparsities
from strategies import scores as any_scores
from torch import nn

import blockprune as bp
from blockprune.allocate import ranking
from blockprune.allocate.allocators import n_of_m, per_bank, per_columns, per_layer, per_model, per_row
from blockprune.allocate.budgets import erk, uniform
from blockprune.allocate.ranking import prune_lowest

ALLOCATORS: dict[str, Callable[..., bp.Masks]] = {
    "per_layer": per_layer,
    "erk": partial(per_layer, budget=erk),
    "capped": partial(per_layer, max_sparsity=0.7, min_keep=1),
    "per_row": per_row,
    "per_bank": partial(per_bank, bank=(-1, 1)),
    "per_columns": partial(per_columns, columns=3),
    "per_model": per_model,
    "free": partial(per_model, max_sparsity=1, min_keep=0),
    "limited": partial(per_model, max_sparsity=0.7, min_keep=2),
}
flat = any_scores(rank=(2, 4))  # of two axes or more, so that every allocator applies


pytestmark = pytest.mark.filterwarnings("ignore:.* a row is a single block")  # as in many of the drawn grids


def test_rows_of_a_single_block_are_named() -> None:
    model, x = nn.Sequential(nn.Linear(16, 32)), torch.randn(8, 16)
    for block in ((1,), (4, -1), (16, 16)):
        with pytest.warns(UserWarning, match=r"0\.weight: a row is a single block.*bp\.allocate\.per_layer"):
            masks = bp.recipes.wanda(bp.linears(block), [x])(model, 0.5).masks
        assert bp.sparsity(masks) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bp.sparsity(bp.recipes.wanda(bp.linears((1,)), [x], allocate=bp.allocate.per_layer)(model, 0.5).masks) == 0.5
        assert bp.sparsity(bp.recipes.wanda(bp.linears((8, 8)), [x])(model, 0.5).masks) == 0.5
        bp.recipes.wanda(bp.linears((1,)), [x])(model, 0.0)


def score(values: Any, block: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> bp.BlockScore:
    """Scores of blocks of so many elements (one, by default)."""
    value = torch.as_tensor(values, dtype=dtype)
    block = block or (1,) * value.ndim
    return bp.BlockScore(value, bp.BlockGrid([n * b for n, b in zip(value.shape, block, strict=True)], block))


def removed(masks: bp.Masks) -> int:
    return sum(int((bp.block_elements(m.grid) * ~m.keep).sum()) for m in masks.values())


def elements(scores: bp.Scores) -> int:
    return sum(s.grid.elements for s in scores.values())


def nested(sparser: bp.Masks, denser: bp.Masks) -> bool:
    return not any((sparser[name].keep & ~denser[name].keep).any() for name in denser)


# Law 7: equal to the twin, on ties, ragged edges, signed zeros, infinities, mixed dtypes and block sizes.


@given(any_scores(), sparsities)
def test_per_layer_equals_its_twin(scores: bp.Scores, sparsity: float) -> None:
    assert per_layer(scores, sparsity) == reference.per_bank(scores, sparsity)


@given(any_scores(pruned=True), sparsities)
def test_per_row_equals_its_twin(scores: bp.Scores, sparsity: float) -> None:
    assert per_row(scores, sparsity) == reference.per_bank(scores, sparsity, bank=(1,))


@given(any_scores(rank=(2, 4), pruned=True), sparsities, st.integers(1, 20))
def test_per_columns_equals_its_twin(scores: bp.Scores, sparsity: float, columns: int) -> None:
    assert per_columns(scores, sparsity, columns=columns) == reference.per_columns(scores, sparsity, columns=columns)


@given(any_scores(rank=(2, 2), pruned=True), sparsities, st.integers(1, 8))
def test_per_columns_of_matrices_is_per_bank_of_all_rows(scores: bp.Scores, sparsity: float, columns: int) -> None:
    for name, s in scores.items():
        width = min(s.grid.size[1], max(1, columns // s.grid.block[1]))  # blocks side by side
        mask = per_columns(scores, sparsity, columns=columns)[name]
        assert mask == per_bank({name: s}, sparsity, bank=(-1, width))[name]


@given(any_scores(rank=(2, 4), pruned=True), sparsities)
def test_per_columns_of_all_columns_is_per_layer(scores: bp.Scores, sparsity: float) -> None:
    assert per_columns(scores, sparsity, columns=10**6) == per_layer(scores, sparsity)


@given(st.data(), any_scores(layers=1, pruned=True), sparsities)
def test_per_bank_equals_its_twin(data: st.DataObject, scores: bp.Scores, sparsity: float) -> None:
    bank = [data.draw(st.sampled_from([-1, *range(1, n + 1)])) for n in scores["a.weight"].value.shape]
    bank = bank[: data.draw(st.integers(0, len(bank)))]
    assert per_bank(scores, sparsity, bank=bank) == reference.per_bank(scores, sparsity, bank=bank)


@given(any_scores(), sparsities, st.floats(0, 1), st.integers(0, 5), st.sampled_from([(), (1,), (-1,)]))
def test_limits_of_parameters_equal_their_twin(scores: bp.Scores, sparsity: float, cap: float, least: int, bank: tuple) -> None:
    got = per_bank(scores, sparsity, bank=bank, max_sparsity=cap, min_keep=least)
    assert got == reference.per_bank(scores, sparsity, bank=bank, max_sparsity=cap, min_keep=least)


@given(any_scores(), sparsities)
def test_per_model_equals_its_twin(scores: bp.Scores, sparsity: float) -> None:
    assert per_model(scores, sparsity) == reference.per_model(scores, sparsity)


@given(any_scores(pruned=True), sparsities)
def test_per_model_with_pruned_blocks_equals_its_twin(scores: bp.Scores, sparsity: float) -> None:
    assert per_model(scores, sparsity) == reference.per_model(scores, sparsity)


@given(any_scores(), sparsities, st.floats(0, 1), st.integers(0, 5))
def test_limits_of_per_model_equal_their_twin(scores: bp.Scores, sparsity: float, cap: float, least: int) -> None:
    got = per_model(scores, sparsity, max_sparsity=cap, min_keep=least)
    assert got == reference.per_model(scores, sparsity, max_sparsity=cap, min_keep=least)


@given(st.data(), grids(rank=(1, 3)), st.sampled_from(list(PALETTES)), dtypes, seeds)
def test_n_of_m_equals_its_twin(data: st.DataObject, grid: bp.BlockGrid, palette: str, dtype: torch.dtype, seed: int) -> None:
    axis = data.draw(st.integers(0, len(grid.shape) - 1))
    m = data.draw(st.sampled_from([d for d in range(1, grid.size[axis] + 1) if grid.size[axis] % d == 0]))
    n = data.draw(st.integers(0, m))
    scores = {"w": drawn(PALETTES[palette], grid, seed, dtype)}
    masks = n_of_m(scores, 1 - n / m, m=m, axis=axis)
    assert masks == reference.n_of_m(scores, 1 - n / m, m=m, axis=axis)
    assert (masks["w"].keep.movedim(axis, -1).unflatten(-1, (-1, m)).sum(-1) == n).all()
    assert n_of_m(scores, 1 - n / m, m=m, axis=axis - len(grid.shape)) == masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_scores_with_the_same_leading_bits_are_ranked_exactly(dtype: torch.dtype, share: float) -> None:
    eps = torch.finfo(dtype).eps
    values = (
        1 + torch.randperm(5_000, generator=torch.Generator().manual_seed(0)).to(dtype) * eps
    )  # far below the 16 bits that make a bucket
    keep = per_layer({"w": score(values, dtype=dtype)}, share)["w"].keep
    assert torch.equal(keep, values >= 1 + round(share * 5_000) * eps)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1), st.floats(0, 1))
def test_prune_lowest_is_a_stable_sort(values: list[float], share: float) -> None:
    value, count = torch.tensor(values), torch.ones(()).long().expand(len(values))
    expected = reference.prune_lowest(values, [1] * len(values), share * len(values))
    for few_blocks in (0, len(values)):  # counted by 16 bits, and by 8
        with mock.patch.object(ranking, "FEW_BLOCKS", few_blocks):
            assert set(prune_lowest(value, count, share * len(values)).nonzero().flatten().tolist()) == expected
            assert (
                set(prune_lowest(value.double(), count.clone().contiguous(), share * len(values)).nonzero().flatten().tolist()) == expected
            )


# Law 2: the closest reachable sparsity.


@given(any_scores(), sparsities)
def test_per_layer_removes_the_closest_reachable(scores: bp.Scores, sparsity: float) -> None:
    for name, mask in per_layer(scores, sparsity).items():
        value, sizes = scores[name].value.double().flatten().tolist(), bp.block_elements(mask.grid).flatten().tolist()
        budget = sparsity * mask.grid.elements
        assert abs(removed({name: mask}) - budget) == pytest.approx(reference.closest(value, sizes, budget), abs=1e-9)


@given(any_scores(), sparsities)
def test_per_model_of_equal_blocks_removes_the_sparsity_up_to_half_a_block(scores: bp.Scores, sparsity: float) -> None:
    scores = {name: score(s.value, dtype=s.value.dtype) for name, s in scores.items()}  # blocks of one element
    for name in ("per_model", "free"):
        masks = ALLOCATORS[name](scores, sparsity)
        assert abs(removed(masks) - sparsity * elements(scores)) <= 0.5 + 1e-9, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.25, 0.5, 0.6, 0.99999, 1.0])
def test_of_ten_thousand_equal_scores_the_first_ones_are_pruned_exactly_to_the_sparsity(dtype: torch.dtype, sparsity: float) -> None:
    scores = {"a": score(torch.full((6_000,), 0.3), dtype=dtype), "b": score(torch.full((4_000,), 0.3), dtype=dtype)}
    for masks, n in ((per_layer(scores, sparsity)["a"].keep, 6_000), (per_layer(scores, sparsity)["b"].keep, 4_000)):
        assert torch.equal(masks, torch.arange(n) >= round(sparsity * n))
    free = per_model(scores, sparsity, max_sparsity=1, min_keep=0)
    assert torch.equal(torch.cat([free["a"].keep, free["b"].keep]), torch.arange(10_000) >= round(sparsity * 10_000))
    assert removed(per_model(scores, sparsity)) == round(sparsity * 10_000)


@given(flat)
def test_sparsity_0_keeps_all_and_1_removes_all_that_no_limit_keeps(scores: bp.Scores) -> None:
    for name, allocator in ALLOCATORS.items():
        assert removed(allocator(scores, 0)) == removed(allocator(scores, 0.0)) == 0, name
        all_pruned = allocator(scores, 1)
        assert all_pruned == allocator(scores, 1.0), name
        if getattr(allocator, "keywords", {}).get("max_sparsity", 1) == 1:
            assert removed(all_pruned) == elements(scores), name


def test_no_parameters_give_no_masks() -> None:
    assert all(allocator({}, 0.5) == {} for allocator in ALLOCATORS.values())
    assert n_of_m({}, 0.5, m=4) == {}


# The order: what scores mean.


@given(any_scores(rank=(2, 4), palettes=("constant", "zeros", "ties", "signs", "many")), sparsities, dtypes)
def test_the_dtype_of_exact_scores_does_not_matter(scores: bp.Scores, sparsity: float, dtype: torch.dtype) -> None:
    converted = {n: bp.BlockScore(s.value.to(dtype), s.grid) for n, s in scores.items()}
    for name, allocator in ALLOCATORS.items():
        assert allocator(converted, sparsity) == allocator(scores, sparsity), name


@given(
    any_scores(rank=(2, 4), palettes=("signs", "ties")),
    sparsities,
    st.sampled_from([lambda v: 2 * v - 5, lambda v: v**3, torch.exp]),
)
def test_only_the_order_of_scores_matters(scores: bp.Scores, sparsity: float, move: Callable) -> None:
    moved = {n: bp.BlockScore(move(s.value.double()), s.grid) for n, s in scores.items()}
    for name, allocator in ALLOCATORS.items():
        assert allocator(moved, sparsity) == allocator(scores, sparsity), name


def test_minus_zero_equals_zero_negative_is_below_and_infinity_is_pruned_last() -> None:
    for dtype in DTYPES:
        zeros = {"w": score([[0.0, -0.0, 0.0, -0.0]], dtype=dtype)}
        mixed = {"w": score([[inf, -1.0, -3.0, 0.0]], dtype=dtype)}
        for allocator in (per_layer, per_row, partial(n_of_m, m=4)):
            assert allocator(zeros, 0.5)["w"].keep.tolist() == [[False, False, True, True]]
            assert allocator(mixed, 0.5)["w"].keep.tolist() == [[True, False, False, True]]
            assert allocator(mixed, 0.75)["w"].keep.tolist() == [[True, False, False, False]]


def test_the_memory_order_of_a_score_and_its_gradient_do_not_matter() -> None:
    value = torch.arange(12.0).view(3, 4)
    transposed = bp.BlockScore(value.clone().t().contiguous().t().requires_grad_() * 1, bp.BlockGrid((3, 4), (1, 1)))
    for allocator in ALLOCATORS.values():
        assert allocator({"w": transposed}, 0.4) == allocator({"w": score(value)}, 0.4)


@given(any_scores(layers=1), sparsities)
def test_for_a_model_of_one_parameter_all_allocators_of_whole_parameters_agree(scores: bp.Scores, sparsity: float) -> None:
    assert per_model(scores, sparsity, max_sparsity=1, min_keep=0) == per_layer(scores, sparsity) == per_bank(scores, sparsity, bank=(-1,))


def test_mixed_dtypes_and_block_sizes_are_ranked_by_score_and_counted_in_elements() -> None:
    big = score([[1.0, 4.0]], block=(8, 8), dtype=torch.bfloat16)  # 128 elements
    small = score([[2.0, 3.0, 5.0, 6.0]], block=(4, 8), dtype=torch.float64)  # 128 elements
    masks = per_model({"big": big, "small": small}, 0.5)
    assert masks["big"].keep.tolist() == [[False, True]]  # 64 at 1.0
    assert masks["small"].keep.tolist() == [[False, False, True, True]]  # then 32 at 2.0 and at 3.0
    assert removed(masks) == 128


# Law 3: nesting.


@given(flat, sparsities, sparsities)
def test_a_higher_sparsity_nests_in_a_lower(scores: bp.Scores, one: float, two: float) -> None:
    for name, allocator in ALLOCATORS.items():
        assert nested(allocator(scores, max(one, two)), allocator(scores, min(one, two))), name


@given(flat, seeds, sparsities, sparsities)
def test_what_restrict_prunes_stays_pruned_at_any_sparsity(scores: bp.Scores, other: int, one: float, two: float) -> None:
    again = {name: drawn(PALETTES["edges"], s.grid, other, s.value.dtype) for name, s in scores.items()}
    for name, allocator in ALLOCATORS.items():
        first = allocator(scores, one)
        restricted = bp.restrict(again, first)
        masks = {sparsity: allocator(restricted, sparsity) for sparsity in (one, two)}
        assert nested(masks[two], first), name
        assert nested(masks[max(one, two)], masks[min(one, two)]), name


@given(any_scores(), sparsities, sparsities)
def test_restricting_to_masks_of_the_same_scores_changes_nothing(scores: bp.Scores, one: float, two: float) -> None:
    low, high = sorted((one, two))
    for name in ("per_layer", "free", "per_model"):
        allocator = ALLOCATORS[name]
        assert allocator(bp.restrict(scores, allocator(scores, low)), high) == allocator(scores, high), name


def test_blocks_that_are_pruned_already_count_as_removed() -> None:
    dead, alive = score([-inf] * 10), score([float(i) for i in range(10)])
    for allocator in (per_model, partial(per_model, max_sparsity=1, min_keep=0)):
        masks = allocator({"dead": dead, "alive": alive}, 0.5)
        assert not masks["dead"].keep.any()
        assert masks["alive"].keep.all()  # half of all elements are pruned already
    assert not per_layer({"dead": dead}, 0.0)["dead"].keep.any()
    assert not n_of_m({"dead": score([[-inf] * 4])}, 0.5, m=4)["dead"].keep.any()


@given(st.data(), grids(rank=(2, 2)), seeds)
def test_n_of_m_nests(data: st.DataObject, grid: bp.BlockGrid, seed: int) -> None:
    m = grid.size[1]
    scores = {"w": drawn(PALETTES["ties"], grid, seed, torch.float32)}
    one, two = sorted((data.draw(st.integers(0, m)), data.draw(st.integers(0, m))))
    assert nested(n_of_m(scores, two / m, m=m), n_of_m(scores, one / m, m=m))


# Limits.


def test_by_default_per_model_keeps_a_tenth_and_a_block_of_each_parameter_while_others_can_be_pruned() -> None:
    low, high = score(torch.arange(40.0)), score(100 + torch.arange(60.0))
    masks = per_model({"low": low, "high": high}, 0.5)
    assert int(masks["low"].keep.sum()) == 4
    assert removed(masks) == 50
    few = per_model({"low": score([1.0, 2.0]), "high": high}, 0.5)
    assert int(few["low"].keep.sum()) == 1


def test_the_default_limits_are_exceeded_only_as_far_as_the_sparsity_needs() -> None:
    scores = {"low": score(torch.arange(40.0)), "high": score(100 + torch.arange(60.0))}
    assert {n: int(m.keep.sum()) for n, m in per_model(scores, 0.9).items()} == {"low": 4, "high": 6}
    assert {n: int(m.keep.sum()) for n, m in per_model(scores, 0.93).items()} == {"low": 1, "high": 6}
    assert removed(per_model(scores, 1.0)) == 100


def test_limits_of_the_caller_are_never_exceeded() -> None:
    scores = {"low": score(torch.arange(40.0)), "high": score(100 + torch.arange(60.0))}
    assert {n: int(m.keep.sum()) for n, m in per_model(scores, 1.0, max_sparsity=0.5, min_keep=0).items()} == {"low": 20, "high": 30}
    assert {n: int(m.keep.sum()) for n, m in per_model(scores, 1.0, max_sparsity=1, min_keep=3).items()} == {"low": 3, "high": 3}
    assert {n: int(m.keep.sum()) for n, m in per_model(scores, 0.3, max_sparsity={"low": 0.25}).items()} == {"low": 30, "high": 40}
    assert {n: int(m.keep.sum()) for n, m in per_model(scores, 1.0, max_sparsity={"h*": 0.5}, min_keep={"low": 7}).items()} == {
        "low": 7,
        "high": 30,
    }


@pytest.mark.parametrize("limit", [{"max_sparsity": 1}, {"min_keep": 0}], ids=str)
def test_a_default_limit_is_exceeded_even_when_the_caller_gives_the_other(limit: dict) -> None:
    scores = {"a": score([1.0, 2.0, 3.0, 4.0]), "b": score([5.0, 6.0, 7.0, 8.0])}
    assert removed(per_model(scores, 1.0, **limit)) == 8


def test_limits_hold_in_every_allocator_that_takes_them() -> None:
    scores = {"fc.weight": score(torch.rand(8, 10)), "head.weight": score(torch.rand(4, 10))}
    for allocator in (per_layer, per_row, partial(per_bank, bank=(2, 5)), per_model):
        masks = allocator(scores, 0.9, max_sparsity={"head.*": 0.4}, min_keep={"*": 1, "fc.weight": 20})
        assert bp.sparsity({"h": masks["head.weight"]}) == pytest.approx(0.4)
        assert int(masks["fc.weight"].keep.sum()) >= 20
    assert bool(per_layer(scores, 1.0, min_keep=1)["fc.weight"].keep.view(-1)[scores["fc.weight"].value.argmax()])  # the best is kept


# Sparsity by name or pattern, and budgets.


def test_a_mapping_gives_each_parameter_its_own_the_name_itself_before_patterns_and_these_before_the_star() -> None:
    scores = {name: score(torch.arange(100.0)) for name in ("a.0.weight", "a.1.weight", "b.weight")}
    wanted = {"*": 0.0, "a.*": 0.25, "a.1.weight": 0.75, "a.?.weight": 0.5}
    for allocator in (per_layer, per_model):
        assert {n: round(bp.sparsity({n: m}), 9) for n, m in allocator(scores, wanted).items()} == {
            "a.0.weight": 0.25, "a.1.weight": 0.75, "b.weight": 0.0}  # fmt: skip
    assert bp.sparsity({"b": per_layer(scores, {re.compile("^b"): 0.5, "*": 0.0})["b.weight"]}) == 0.5  # type: ignore[dict-item]


@given(any_scores(), dyadic)
def test_per_model_ranks_the_parameters_together_that_share_a_key_of_a_mapping(scores: bp.Scores, sparsity: float) -> None:
    scores = {**scores, "other": score(torch.arange(9.0))}
    sharing = {name: s for name, s in scores.items() if name != "other"}
    masks = per_model(scores, {"*.weight": sparsity, "other": 1 / 3})
    assert {name: masks[name] for name in sharing} == per_model(sharing, sparsity)
    assert masks["other"] == per_layer({"o": scores["other"]}, 1 / 3)["o"]


@given(flat, dyadic)
def test_a_mapping_of_one_pattern_is_one_number(scores: bp.Scores, sparsity: float) -> None:
    for allocator in (per_layer, per_row, per_model, partial(per_bank, bank=(-1, 1))):
        assert allocator(scores, {"*": sparsity}) == allocator(scores, sparsity)


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=5), st.floats(0, 1))
def test_erk_equals_its_twin_and_spends_the_whole_budget(shapes: list[list[int]], sparsity: float) -> None:
    grids_ = {str(i): bp.BlockGrid(shape, ()) for i, shape in enumerate(shapes)}
    scores = {name: bp.BlockScore(torch.zeros(grid.size), grid) for name, grid in grids_.items()}
    spread, expected = erk(scores, sparsity), reference.erk({name: grid.shape for name, grid in grids_.items()}, sparsity)
    assert all(0 <= s <= 1 for s in spread.values())
    assert spread == pytest.approx(expected, abs=1e-6)
    assert sum(s * grids_[name].elements for name, s in spread.items()) == pytest.approx(sparsity * elements(scores), abs=1e-6)
    assert uniform(scores, sparsity) == dict.fromkeys(scores, sparsity)


def test_a_budget_is_any_function_from_scores_and_sparsity_to_a_sparsity_for_each() -> None:
    scores = {"a": score(torch.arange(10.0)), "b": score(torch.arange(10.0))}
    masks = per_layer(scores, 0.5, budget=lambda scores, s: {name: s + (0.2 if name == "a" else -0.2) for name in scores})
    assert {n: bp.sparsity({n: m}) for n, m in masks.items()} == pytest.approx({"a": 0.7, "b": 0.3})


# Coupled parameters.


@given(st.data(), grids(rank=(1, 2)), sparsities)
def test_coupled_parameters_share_the_mask_of_their_summed_scores(data: st.DataObject, grid: bp.BlockGrid, sparsity: float) -> None:
    exact = ("constant", "zeros", "ties", "signs", "many")
    scores = {
        n: drawn(PALETTES[data.draw(st.sampled_from(exact))], grid, data.draw(seeds), data.draw(dtypes)) for n in ("q", "k", "v", "other")
    }
    summed = bp.BlockScore(sum(scores[n].value.double() for n in "qkv"), grid)
    for allocator in (per_layer, per_row):
        masks = allocator(scores, sparsity, coupled=[("v", "q", "k")])
        assert masks["q"] == masks["k"] == masks["v"] == allocator({"sum": summed}, sparsity)["sum"]
        assert masks["other"] == allocator({"o": scores["other"]}, sparsity)["o"]


@given(st.data(), grids(rank=(2, 2)), dyadic, st.sampled_from(["default", "given"]))
def test_coupled_groups_equal_their_twin(data: st.DataObject, grid: bp.BlockGrid, sparsity: float, limits: str) -> None:
    scores = {
        n: drawn(PALETTES[data.draw(st.sampled_from(["ties", "signs", "many"]))], grid, data.draw(seeds), torch.float64) for n in "abcd"
    }
    coupled = data.draw(st.sampled_from([[("a", "c")], [("d", "b"), ("a", "c")], [("a", "b", "c", "d")]]))
    options = {} if limits == "default" else {"max_sparsity": 0.6, "min_keep": 1}
    assert per_row(scores, sparsity, coupled=coupled) == reference.per_bank(scores, sparsity, bank=(1,), coupled=coupled)
    assert per_model(scores, sparsity, coupled=coupled, **options) == reference.per_model(scores, sparsity, coupled=coupled, **options)
    m = grid.size[1]
    share = data.draw(st.integers(0, m)) / m
    assert n_of_m(scores, share, m=m, coupled=coupled) == reference.n_of_m(scores, share, m=m, coupled=coupled)


@given(st.integers(1, 6), st.tuples(st.integers(1, 5), st.integers(1, 5)), dyadic, seeds)
def test_rows_of_one_layer_share_a_mask_with_columns_of_the_next(hidden: int, sides: tuple[int, int], sparsity: float, seed: int) -> None:
    up, down = bp.BlockGrid((hidden, sides[0]), (1,)), bp.BlockGrid((sides[1], hidden), (-1, 1))
    scores = {"up": drawn(PALETTES["ties"], up, seed, torch.float32), "down": drawn(PALETTES["signs"], down, seed + 1, torch.float32)}
    for allocator in (per_layer, partial(per_model, max_sparsity=1, min_keep=0)):
        masks = allocator(scores, sparsity, coupled=[("up", "down")])
        assert masks["up"].keep.flatten().tolist() == masks["down"].keep.flatten().tolist()
        assert masks["down"].keep.shape == (1, hidden)
        total = (scores["up"].value.flatten() + scores["down"].value.flatten()).tolist()
        budget = sparsity * (sides[0] + sides[1]) * hidden
        assert abs(removed(masks) - budget) == pytest.approx(reference.closest(total, [sum(sides)] * hidden, budget))


def test_groups_are_named_by_pattern_and_their_sparsity_is_the_mean_by_elements() -> None:
    scores = {name: score(torch.arange(12.0)) for name in ("blocks.0.q", "blocks.0.k", "blocks.1.q")}
    masks = per_layer(scores, {"*.q": 0.5, "*.k": 0.0}, coupled=[("blocks.0.*",)])
    assert {n: bp.sparsity({n: m}) for n, m in masks.items()} == {"blocks.0.q": 0.25, "blocks.0.k": 0.25, "blocks.1.q": 0.5}
    assert per_layer(scores, 0.5, coupled=[(re.compile(r"\.q$"),)])["blocks.1.q"] == per_layer(scores, 0.5)["blocks.1.q"]  # type: ignore[list-item]


def test_a_coupled_block_that_one_side_has_pruned_stays_pruned_however_much_the_other_wants_it() -> None:
    scores = {"a": score([[inf, 1.0, 2.0, 3.0]]), "b": score([[-inf, 1.0, 2.0, 3.0]])}
    for allocator in (per_layer, per_row, per_model, partial(n_of_m, m=4)):
        for sparsity in (0.0, 0.5):
            assert not allocator(scores, sparsity, coupled=[("a", "b")])["a"].keep[0, 0]


def test_coupled_scores_are_added_in_the_widest_of_their_dtypes() -> None:
    fine = score([1.0, 1.0 + 1e-12, 1.0], dtype=torch.float64)
    large = score([1e300, -1e300, 0.0], dtype=torch.float64)  # as float32 these are infinite, and -inf means pruned
    for other, kept in ((fine, [False, True, False]), (large, [True, False, False])):
        for order in ({"x": score([0.0] * 3), "y": other}, {"y": other, "x": score([0.0] * 3)}):
            assert per_layer(order, 2 / 3, coupled=[("x", "y")])["x"].keep.tolist() == kept
            assert removed(per_layer(order, 0.0, coupled=[("x", "y")])) == 0


# Law 4: purity.


@given(any_scores(rank=(2, 4), pruned=True), sparsities)
def test_an_allocator_writes_into_nothing_and_its_masks_own_their_memory(scores: bp.Scores, sparsity: float) -> None:
    before = copy.deepcopy(scores)
    for which, allocator in ALLOCATORS.items():
        masks = allocator(scores, sparsity)
        assert scores == before, which
        assert list(masks) == list(scores), which
        assert all(masks[name].grid == scores[name].grid for name in scores), which
        keeps = [mask.keep for mask in masks.values()]
        assert not any(shares_memory(keep, *(s.value for s in scores.values()), *keeps[:i]) for i, keep in enumerate(keeps)), which


def test_coupled_masks_own_their_memory_and_options_are_not_written_into() -> None:
    scores = {name: score(torch.rand(4, 4)) for name in "abc"}
    sparsity, cap, least, coupled = {"*": 0.5}, {"a": 0.5}, {"b": 1}, [["a", "b"]]
    options = copy.deepcopy((sparsity, cap, least, coupled))
    masks = per_model(scores, sparsity, max_sparsity=cap, min_keep=least, coupled=coupled)
    assert (sparsity, cap, least, coupled) == options
    assert not shares_memory(masks["a"].keep, masks["b"].keep)


# Bad input.

BAD = {"fc.weight": score(torch.rand(4, 6)), "head.weight": score(torch.rand(3, 4))}
PAIR = {"fc.weight": BAD["fc.weight"], "fc.b": BAD["fc.weight"]}
STAGES: dict[str, Callable[..., bp.Masks]] = {**ALLOCATORS, "n_of_m": partial(n_of_m, m=2)}


@pytest.mark.parametrize("allocator", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize(
    ("sparsity", "error", "says"),
    [
        (math.nan, ValueError, ["sparsity=nan", "from 0 (keep all) to 1 (remove all)"]),
        (-0.1, ValueError, ["sparsity=-0.1", "from 0"]),
        (1.5, ValueError, ["sparsity=1.5", "50 % is 0.5"]),
        (50, ValueError, ["sparsity=50", "50 % is 0.5"]),
        (inf, ValueError, ["sparsity=inf"]),
        ("0.5", TypeError, ["sparsity='0.5'", "number", "mapping of parameter names"]),
        (None, TypeError, ["sparsity=None", "number"]),
        (True, TypeError, ["sparsity=True"]),
        ([0.5], TypeError, ["sparsity=[0.5]"]),
        ({"fc.*": math.nan}, ValueError, ["sparsity['fc.*']=nan"]),
        ({"fc.*": 2}, ValueError, ["sparsity['fc.*']=2", "from 0"]),
        ({"fc.*": "half"}, TypeError, ["sparsity['fc.*']='half'"]),
        ({"fc.wieght": 0.5}, KeyError, ["sparsity has a key 'fc.wieght'", "matches no parameter", "'fc.weight'"]),
        ({"fc.*": 0.5, "conv.*": 0.5}, KeyError, ["'conv.*'", "matches no parameter"]),
        ({"fc.*": 0.5}, KeyError, ["sparsity has no key for 'head.weight'", "'*'", "all parameters that no other key matches"]),
        ({}, KeyError, ["sparsity has no key for 'fc.weight'", "'*'"]),
    ],
    ids=str,
)  # fmt: skip
def test_the_error_for_an_invalid_sparsity_says_what_was_given_and_what_would_do(
    allocator: Callable, sparsity: Any, error: type[Exception], says: list
) -> None:
    if isinstance(sparsity, Mapping) and getattr(allocator, "keywords", {}).get("budget") is erk:
        sparsity, error, says = {"*": 0.5}, ValueError, ["sparsity as a mapping", "budget="]
    before = copy.deepcopy(BAD)
    with pytest.raises(error) as caught:
        allocator(BAD, sparsity)
    assert not [part for part in says if part not in caught.value.args[0]]
    assert before == BAD


@pytest.mark.parametrize("allocator", STAGES.values(), ids=STAGES)
def test_the_error_for_scores_that_cannot_be_ranked_names_the_parameter_and_shape(allocator: Callable[..., bp.Masks]) -> None:
    for value, error, says in (
        (torch.full((4, 6), math.nan), ValueError, ["24 of the scores", "NaN", "metric"]),
        (torch.ones(4, 6).long(), TypeError, ["torch.int64", "floating point"]),
        (torch.ones(4, 6, dtype=torch.complex64), TypeError, ["torch.complex64", "floating point"]),
        (torch.ones(4, 6).to(torch.float8_e4m3fn), TypeError, ["torch.float8_e4m3fn", "score.value.float()"]),
    ):
        with pytest.raises(error) as caught:
            allocator({**BAD, "fc.weight": bp.BlockScore(value, bp.BlockGrid((4, 6), (1, 1)))}, 0.5)
        assert not [part for part in ("fc.weight", "(4, 6)", *says) if part not in str(caught.value)]


def raises(error: type[Exception], *says: str) -> Callable[[Callable[[], object]], None]:
    def check(call: Callable[[], object]) -> None:
        with pytest.raises(error) as caught:
            call()
        assert not [part for part in says if part not in str(caught.value.args[0])]

    return check


@pytest.mark.parametrize(
    ("expected", "call"),
    [
        (raises(ValueError, "fc.weight", "m=4 does not divide the 6 blocks", "(4, 6)", "divisor"), lambda: n_of_m(BAD, 0.5, m=4)),
        (raises(ValueError, "fc.weight", "n_of_m(m=2)", "sparsity=0.6", "keep 0.8", "multiple of 0.5"), lambda: n_of_m(BAD, 0.6, m=2)),
        (raises(ValueError, "head.weight", "sparsity=0.3"), lambda: n_of_m(BAD, {"head.weight": 0.3, "*": 0.0}, m=2)),
        (raises(ValueError, "fc.weight", "axis=2", "(4, 6)", "0 to 1"), lambda: n_of_m(BAD, 0.5, m=2, axis=2)),
        (raises(ValueError, "m=0", "whole number", "at least 1"), lambda: n_of_m(BAD, 0.5, m=0)),
        (raises(ValueError, "m=2.0", "whole number"), lambda: n_of_m(BAD, 0.5, m=2.0)),
        (raises(ValueError, "head.weight", "bank=(4,)", "(3, 4)"), lambda: per_bank(BAD, 0.5, bank=(4,))),
        (raises(TypeError, "axis='1'", "whole number"), lambda: n_of_m(BAD, 0.5, m=2, axis="1")),
        (raises(TypeError, "bank=2 must be a sequence of integers"), lambda: per_bank(BAD, 0.5, bank=2)),
        (raises(TypeError, "sparsity='0.5' must be a number", "or a mapping of parameter names"), lambda: per_layer(BAD, "0.5")),
        (raises(TypeError, "sparsity['*']='0.5' must be a number"), lambda: per_layer(BAD, {"*": "0.5"})),
        (raises(ValueError, "fc.weight", "bank=(0, 1)", "(4, 6)"), lambda: per_bank(BAD, 0.5, bank=(0, 1))),
        (raises(ValueError, "max_sparsity of fc.weight=1.5", "from 0"), lambda: per_model(BAD, 0.5, max_sparsity=1.5)),
        (raises(ValueError, "max_sparsity of fc.weight=nan"), lambda: per_layer(BAD, 0.5, max_sparsity=math.nan)),
        (raises(TypeError, "max_sparsity of head.weight='all'"), lambda: per_layer(BAD, 0.5, max_sparsity={"head.*": "all"})),
        (raises(KeyError, "max_sparsity has a key 'hed.*'"), lambda: per_model(BAD, 0.5, max_sparsity={"hed.*": 0.5})),
        (raises(ValueError, "min_keep=-1 of fc.weight", "0 or more"), lambda: per_model(BAD, 0.5, min_keep=-1)),
        (raises(ValueError, "min_keep=0.5 of fc.weight"), lambda: per_row(BAD, 0.5, min_keep=0.5)),
        (raises(KeyError, "min_keep has a key 'x'"), lambda: per_row(BAD, 0.5, min_keep={"x": 1})),
        (raises(ValueError, "budget", "fc.weight=1.2"), lambda: per_layer(BAD, 0.6, budget=lambda s, x: dict.fromkeys(s, 2 * x))),
        (raises(ValueError, "fc.weight has (4, 6) blocks", "head.weight (3, 4)"), lambda: per_layer(BAD, 0.5, coupled=[("*",)])),
        (raises(KeyError, "budget", "'fc.weight'", "every parameter"), lambda: per_layer(BAD, 0.6, budget=lambda s, x: {})),
        (raises(ValueError, "columns=0", "an integer, at least 1"), lambda: per_columns(BAD, 0.5, columns=0)),
        (raises(ValueError, "bias", "(4,)", "no input columns", "per_layer"), lambda: per_columns({"bias": score(torch.rand(4))}, 0.5)),
        (raises(TypeError, "coupled must hold sets of names", "'fc.weight'"), lambda: per_layer(BAD, 0.5, coupled=["fc.weight"])),
        (raises(ValueError, "'fc.weight' in two sets"), lambda: per_layer(PAIR, 0.5, coupled=[("fc.*",), ("fc.*",)])),
        (raises(KeyError, "coupled has 'fc.wieght'", "'fc.weight'"), lambda: per_layer(BAD, 0.5, coupled=[("fc.wieght", "head.weight")])),
        (raises(KeyError, "coupled has", "zzz", "matches no parameter"), lambda: per_layer(BAD, 0.5, coupled=[(re.compile("zzz"),)])),
        (raises(ValueError, "coupled", "'fc.weight', 'fc.b'", "one key"),
         lambda: per_model(PAIR, {"fc.b": 0.5, "fc.weight": 0.5}, coupled=[("fc.*",)])),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_met_says_so(expected: Callable, call: Callable[[], object]) -> None:
    before = copy.deepcopy(BAD)
    expected(call)
    assert before == BAD


@given(st.data(), grids(rank=(1, 2)))
def test_scores_and_masks_of_another_size_than_their_grid_are_refused(data: st.DataObject, grid: bp.BlockGrid) -> None:
    size = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    assume(size != grid.size)
    for make, value in ((bp.BlockScore, torch.zeros(size)), (bp.BlockMask, torch.ones(size).bool())):
        with pytest.raises(ValueError) as caught:
            make(value, grid)
        assert not [part for part in (f"{make.__name__}.", str(size), str(grid.size), str(grid.shape)) if part not in str(caught.value)]
    with pytest.raises(TypeError, match=r"BlockMask\.keep must be bool.*float32.*keep\.bool\(\)"):
        bp.BlockMask(torch.ones(grid.size), grid)


def test_mixed_patterns_in_one_plan_share_a_budget_by_cost() -> None:
    """Tiles in one Linear, whole columns in the other, chosen by `where`: one ranking, the sum of what is removed is what was asked."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(256, 16)
    where = bp.first_of(bp.named("0.weight", (4, 4)), bp.named("2.weight", (-1, 1)))
    data = bp.collect.with_statistics(
        model,
        where=where,
        statistics=[bp.statistics.input_gram, bp.statistics.output_grad_gram],
        batches=[x],
        loss=lambda output, batch: output.square().mean(),
    )
    assert data["0.weight"].grid.block == (4, 4)
    assert data["2.weight"].grid.block == (8, 1)
    scores = bp.metric.obs(data, progress=False)
    masks = bp.allocate.per_model(scores, 0.5)
    assert abs(bp.sparsity(masks) - 0.5) <= 16 / (16 * 32 + 32 * 8)
    weights = bp.reconstruct.least_squares(data, masks, progress=False)
    before = model(x).detach()
    after = bp.apply_masks(model, masks, weights)(x)
    assert (after - before).square().mean() < before.square().mean()
    cost = {"0.weight": 1.0, "2.weight": 4.0}
    shares = bp.budgets.lagrangian(scores, 0.5, cost=cost, relative=False)
    paid = sum(shares[name] * score.grid.elements * cost[name] for name, score in scores.items())
    total = sum(score.grid.elements * cost[name] for name, score in scores.items())
    assert abs(paid / total - 0.5) <= 32 / total


@pytest.mark.parametrize("given", [[0.5], 0.5, None])
def test_a_budget_that_returns_no_mapping_is_named(given: Any) -> None:
    scores = {"w": bp.BlockScore(torch.arange(4.0), bp.BlockGrid((4,), (1,)))}
    with pytest.raises(TypeError, match=f"budget returned a {type(given).__name__}; it must return a mapping"):
        bp.allocate.per_layer(scores, 0.5, budget=lambda scores, sparsity: given)
    kept = bp.allocate.per_layer(scores, 0.5, budget=lambda scores, sparsity: {"w": Fraction(1, 2)})["w"].keep
    assert kept.tolist() == [False, False, True, True]
