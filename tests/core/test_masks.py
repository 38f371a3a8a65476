"""Masks are sets of elements: their algebra, their sparsity and their summary. No result shares memory with an argument."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, grids, inf, masks, normal, scores, seeds, shares_memory
from torch import nn

import blockprune as bp
from blockprune.model.masking import mask_blocks

GRIDS = {"a": bp.BlockGrid((5, 4), (2, 3)), "b": bp.BlockGrid((3, 2, 2), (1,)), "c": bp.BlockGrid((7,), (3,))}
some = masks(like=GRIDS)


def kept(masks_: bp.Masks) -> set[tuple]:
    """The set of elements that masks keep."""
    return {(name, *at) for name, m in masks_.items() for at in reference.expand(m.keep, m.grid).nonzero().tolist()}


def everything(masks_: bp.Masks) -> set[tuple]:
    return {(name, *at) for name, m in masks_.items() for at in torch.ones(m.grid.shape).nonzero().tolist()}


@given(some, some)
def test_union_and_intersection_are_those_of_the_kept_elements(a: bp.Masks, b: bp.Masks) -> None:
    both, only = everything(a) & everything(b), (kept(a) - everything(b)) | (kept(b) - everything(a))
    assert kept(bp.union(a, b)) == (kept(a) | kept(b)) & both | only
    assert kept(bp.intersect(a, b)) == (kept(a) & kept(b)) | only
    assert list(bp.union(a, b)) == list(bp.intersect(a, b)) == list(dict.fromkeys([*a, *b]))


@given(some, some)
def test_difference_is_kept_by_the_first_and_pruned_by_the_second(a: bp.Masks, b: bp.Masks) -> None:
    assert kept(bp.difference(a, b)) == kept(a) & (everything(b) - kept(b))
    assert list(bp.difference(a, b)) == list(a)


@given(some, some, some)
def test_masks_form_a_lattice(a: bp.Masks, b: bp.Masks, c: bp.Masks) -> None:
    for combine in (bp.union, bp.intersect):
        assert combine(a, a) == combine(a, {}) == combine({}, a) == a
        assert combine(a, b) == combine(b, a)
        assert combine(combine(a, b), c) == combine(a, combine(b, c))
    same = {name: a[name] for name in a if name in b}
    assert bp.union(same, bp.intersect(same, {n: b[n] for n in same})) == same


@given(some, some)
def test_agreement_is_the_share_of_elements_treated_alike(a: bp.Masks, b: bp.Masks) -> None:
    every = everything(a) | everything(b)
    first, second = (every - (everything(m) - kept(m)) for m in (a, b))  # a parameter that one side does not have counts as kept
    alike = sum((e in first) == (e in second) for e in every) / len(every) if every else 1.0
    assert bp.agreement(a, b) == pytest.approx(alike)
    assert bp.agreement(a, b) == bp.agreement(b, a)
    assert bp.agreement(a, a) == 1


@given(masks())
def test_sparsity_counts_elements_not_blocks(masks_: bp.Masks) -> None:
    every = everything(masks_)
    assert bp.sparsity(masks_) == pytest.approx(1 - len(kept(masks_)) / len(every) if every else 0.0)


@given(st.data(), scores(pruned=True))
def test_restrict_puts_minus_infinity_under_pruned_blocks_and_nothing_else(data: st.DataObject, scores_: bp.Scores) -> None:
    over = data.draw(masks(like={n: s.grid for n, s in scores_.items()}, names=tuple(scores_)))
    restricted = bp.restrict(scores_, over)
    assert list(restricted) == list(scores_)
    for name, s in restricted.items():
        keep = over[name].keep if name in over else torch.ones(s.grid.size).bool()
        assert s.value.dtype == scores_[name].value.dtype
        assert torch.equal(s.value[keep], scores_[name].value[keep])
        assert s.value[~keep].eq(-inf).all()


@given(grids(), dtypes, seeds, st.sampled_from([float("nan"), inf, -inf]))
def test_nothing_leaks_from_under_a_pruned_block(grid: bp.BlockGrid, dtype: torch.dtype, seed: int, poison: float) -> None:
    keep = torch.rand(grid.size, generator=torch.Generator().manual_seed(seed)) < 0.5
    weight = normal(grid.shape, seed).to(dtype)
    poisoned = torch.where(reference.expand(keep, grid), weight, poison)
    for source in (weight, poisoned, poisoned.clone().requires_grad_()):
        got = mask_blocks(source, keep, grid)
        assert got.dtype == dtype
        assert torch.equal(got, reference.masked(weight, keep, grid))


@pytest.mark.parametrize("operation", [bp.union, bp.intersect, bp.difference, bp.agreement])
@given(a=some, b=some)
def test_the_algebra_writes_into_nothing_and_shares_no_memory(operation: Callable, a: bp.Masks, b: bp.Masks) -> None:
    before = copy.deepcopy((a, b))
    out = operation(a, b)
    assert (a, b) == before
    inputs = [m.keep for m in (*a.values(), *b.values())]
    assert isinstance(out, float) or not any(shares_memory(m.keep, *inputs) for m in out.values())


@given(st.data(), scores())
def test_restrict_writes_into_nothing_and_shares_no_memory(data: st.DataObject, scores_: bp.Scores) -> None:
    over = data.draw(masks(like={n: s.grid for n, s in scores_.items()}, names=tuple(scores_)))
    before = copy.deepcopy((scores_, over))
    restricted = bp.restrict(scores_, over)
    assert (scores_, over) == before
    assert not any(shares_memory(s.value, *(f.value for f in scores_.values())) for s in restricted.values())


def test_masks_are_equal_when_blocks_and_grid_are() -> None:
    grid, keep = bp.BlockGrid((4, 4), (2, 2)), torch.tensor([[True, False], [True, True]])
    mask = bp.BlockMask(keep, grid)
    assert mask == copy.deepcopy(mask) == bp.BlockMask(keep.t().contiguous().t(), grid)
    assert mask != bp.BlockMask(~keep, grid)
    assert mask != bp.BlockMask(keep, bp.BlockGrid((4, 3), (2, 2)))
    assert {"w": mask} != {"v": mask}


@pytest.mark.parametrize("operation", [bp.union, bp.intersect, bp.difference, bp.agreement])
def test_masks_of_other_blocks_do_not_combine(operation: Callable) -> None:
    first = {"fc.weight": bp.BlockMask(torch.ones(2, 2).bool(), bp.BlockGrid((4, 4), (2, 2)))}
    second = {"fc.weight": bp.BlockMask(torch.ones(2, 2).bool(), bp.BlockGrid((4, 3), (2, 2)))}
    before = copy.deepcopy((first, second))
    with pytest.raises(ValueError) as caught:
        operation(first, second)
    assert not [part for part in ("fc.weight", "different blocks", "(4, 4)", "(4, 3)", "one `where`") if part not in str(caught.value)]
    assert (first, second) == before


def test_restrict_refuses_scores_without_scores_or_of_other_blocks() -> None:
    scores_ = {"fc.weight": bp.BlockScore(torch.zeros(2, 2), bp.BlockGrid((4, 4), (2, 2)))}
    mask = bp.BlockMask(torch.ones(2, 2).bool(), bp.BlockGrid((4, 3), (2, 2)))
    with pytest.raises(KeyError, match=r"'fc\.wieght'.*no scores.*'fc\.weight'"):
        bp.restrict(scores_, {"fc.wieght": mask})
    with pytest.raises(ValueError, match=r"fc\.weight.*\(4, 4\).*\(4, 3\)"):
        bp.restrict(scores_, {"fc.weight": mask})


@given(masks())
def test_summary_counts_what_is_there(masks_: bp.Masks) -> None:
    table = bp.summary(masks_)
    assert [row.name for row in table.rows] == list(masks_)
    for row, mask in zip(table.rows, masks_.values(), strict=True):
        alone = {row.name: mask}
        assert (row.shape, row.block) == ("x".join(map(str, mask.grid.shape)), "x".join(map(str, mask.grid.block)))
        assert (row.blocks, row.kept) == (mask.keep.numel(), int(mask.keep.sum()))
        assert (row.elements, row.elements_kept) == (len(everything(alone)), len(kept(alone)))
        assert row.bytes == (row.blocks + 7) // 8
        assert row.sparsity == pytest.approx(bp.sparsity(alone))
    assert table.total.elements_kept == len(kept(masks_))
    assert table.total.bytes == sum(row.bytes for row in table.rows)
    assert table.total.sparsity == pytest.approx(bp.sparsity(masks_))


@given(masks())
def test_summary_prints_aligned_lines_and_renders_a_row_each(masks_: bp.Masks) -> None:
    lines = repr(bp.summary(masks_)).splitlines()
    assert len(lines) == len(masks_) + 4
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].startswith("total")
    html = bp.summary(masks_)._repr_html_()
    assert html.count("<tr>") == html.count("</tr>") == len(masks_) + 2


def test_summary_escapes_names_in_html() -> None:
    mask = bp.BlockMask(torch.ones(1).bool(), bp.BlockGrid((2,), (2,)))
    html = bp.summary({"<script>&": mask})._repr_html_()
    assert "&lt;script" in html
    assert "<script" not in html


MASK = bp.BlockMask(torch.tensor([True, False]), bp.BlockGrid((4,), (2,)))
RESULT: Any = bp.PruningResult({"w": MASK}, {})


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("masks", lambda: bp.sparsity(RESULT)),
        ("masks", lambda: bp.summary(RESULT)),
        ("masks", lambda: bp.restrict({}, RESULT)),
        ("masks", lambda: bp.save_masks(RESULT, "nowhere/masks")),
        ("masks", lambda: bp.pictures.masks(RESULT)),
        ("masks", lambda: bp.regrow(RESULT, drop={}, grow={}, fraction=0.5)),
        ("masks", lambda: bp.zero_new_blocks(nn.Linear(2, 2), RESULT)),
        ("masks", lambda: bp.masked_parameters(nn.Linear(2, 2), RESULT)),
        ("masks", lambda: bp.reconstruct.bias({}, RESULT)),
        *((name, lambda f=f, pair=pair: f(*pair))
          for f in (bp.union, bp.intersect, bp.difference, bp.agreement)
          for name, pair in (("a", (RESULT, {})), ("b", ({}, RESULT)))),
    ],
)  # fmt: skip
def test_a_result_where_masks_are_expected_is_an_error_with_the_masks_to_give(what: str, call: Callable[[], object]) -> None:
    with pytest.raises(TypeError) as caught:
        call()
    said = f"{what} is a PruningResult, not a mapping from parameter names to BlockMask; give result.masks, or bp.read_masks(model)"
    assert str(caught.value) == said


def test_a_summary_of_a_model_names_what_counts_the_whole_model() -> None:
    with pytest.raises(TypeError, match=r"masks is a Linear, .*; give bp.read_masks\(model\), .*: blockprune.export.count_model\(model\)"):
        bp.summary(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_tensors_where_masks_are_expected_are_an_error() -> None:
    with pytest.raises(TypeError, match=r"^masks\['w'\] is a Tensor, not a BlockMask; build one: BlockMask\(keep, grid\)$"):
        bp.sparsity({"w": MASK.keep})  # type: ignore[dict-item]


def test_apply_masks_says_what_to_give_of_a_result() -> None:
    with pytest.raises(
        TypeError, match=r"masks is a PruningResult, .*; for the result .* apply_masks\(model, result.masks, result.weights\)"
    ):
        bp.apply_masks(nn.Linear(2, 2), RESULT)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("scores", lambda given: bp.allocate.per_layer(given, 0.5)),
        ("scores", lambda given: bp.allocate.per_model(given, 0.5)),
        ("scores", lambda given: bp.allocate.per_columns(given, 0.5)),
        ("scores", lambda given: bp.budgets.lagrangian(given, 0.5)),
        ("scores", bp.pareto),
        ("scores", lambda given: bp.restrict(given, {})),
        ("drop", lambda given: bp.regrow({"w": MASK}, drop=given, grow={}, fraction=0.5)),
        ("grow", lambda given: bp.regrow({"w": MASK}, drop={"w": bp.BlockScore(torch.ones(2), MASK.grid)}, grow=given, fraction=0.5)),
    ],
)
def test_a_metric_or_data_where_scores_are_expected_is_an_error_with_the_scores_to_give(what: str, call: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError) as caught:
        call(bp.metric.l1)
    said = f"{what} is a function, not a mapping from parameter names to BlockScore; give the scores that a metric returns"
    assert str(caught.value) == f"{said}, such as {what}=bp.metric.l1(data)"
    with pytest.raises(TypeError, match=rf"^{what}\['w'\] is a Param, not a BlockScore; build one: BlockScore\(value, grid\)$"):
        call({"w": bp.Param(torch.ones(4), MASK.grid)})


@pytest.mark.parametrize("kind", [bp.BlockMask, bp.BlockScore, bp.Param])
@pytest.mark.parametrize(
    ("value", "grid", "text"),
    [
        ([True, False], bp.BlockGrid((2,), (1,)), r"(keep|value|weight) is a list, not a tensor; convert it: torch.as_tensor"),
        (torch.ones(2).bool().numpy(), bp.BlockGrid((2,), (1,)), r"(keep|value|weight) is a ndarray, not a tensor"),
        (torch.ones(2).bool(), (1,), r"grid=\(1,\) must be a BlockGrid"),
    ],
)
def test_a_value_of_something_else_than_a_tensor_and_a_grid_is_refused(kind: Any, value: Any, grid: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        kind(value, grid)


def test_the_weight_of_data_has_the_shape_of_its_grid() -> None:
    with pytest.raises(ValueError, match=r"Param.weight has shape \(4, 5\), but .* needs shape \(4, 4\)"):
        bp.Param(torch.ones(4, 5), bp.BlockGrid((4, 4), (2, 2)))


def test_masks_without_values_equal_themselves_alone() -> None:
    grid = bp.BlockGrid((2,), (1,))
    there = bp.BlockMask(torch.ones(2).bool(), grid)
    nowhere = bp.BlockMask(there.keep.to("meta"), grid)
    assert there != nowhere
    assert nowhere != there
    assert nowhere == nowhere  # noqa: PLR0124


def test_scores_that_cannot_hold_infinity_are_not_restricted() -> None:
    grid = bp.BlockGrid((2,), (1,))
    mask = {"w": bp.BlockMask(torch.tensor([True, False]), grid)}
    with pytest.raises(TypeError, match=r"w: scores \(2,\) are torch.int64 and cannot hold -inf; give .* score.value.float\(\)"):
        bp.restrict({"w": bp.BlockScore(torch.tensor([1, 2]), grid)}, mask)
