"""Hidden axes as coupled groups: a unit is pruned in everything that has it, by the mean score of its elements."""

import math
import re
from functools import partial
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import PALETTES, drawn, dyadic, seeds

import blockprune as bp
from blockprune.allocate import n_of_m, per_layer, per_model, per_row

FREE = partial(per_model, max_sparsity=1, min_keep=0)


def axis(units: int, **names: Any) -> bp.UnitPermutation:
    return bp.UnitPermutation(torch.arange(units), **names)


@st.composite
def chains(
    draw: st.DrawFn, *, palettes: tuple[str, ...] = ("ties", "signs", "many")
) -> tuple[dict[str, bp.BlockScore], list[bp.UnitPermutation]]:
    """Two hidden axes, in three weights of which the middle one has both, and a bias; units are runs of entries, in groups and copies."""
    groups, in_group, copies, entries, second = (draw(st.integers(1, 3)) for _ in range(5))
    units = groups * in_group
    first = axis(units, rows=("a.weight", "a.bias"), columns=("b.weight",), groups=groups, copies={"a.weight": copies, "a.bias": copies})
    shapes = {"a.weight": (units * copies * entries, 3), "a.bias": (units * copies,), "b.weight": (second, units * entries, 2)}
    shapes |= {"c.weight": (2, second), "other": (4, 2)}
    axes = [first, axis(second, rows=("b.weight",), columns=("c.weight",))]
    blocks: dict[str, tuple[int, ...]] = {"a.weight": (1,), "a.bias": (1,), "b.weight": (1, 1), "c.weight": (-1, 1), "other": (2,)}
    names = draw(st.sampled_from([[*shapes], ["a.weight", "b.weight"], ["c.weight", "b.weight", "other"]]))
    palette = [PALETTES[name] for name in palettes]
    return {
        name: drawn(draw(st.sampled_from(palette)), bp.BlockGrid(shapes[name], blocks[name]), draw(seeds), torch.float64) for name in names
    }, axes


@given(chains(), dyadic)
def test_the_masks_of_hidden_axes_are_those_of_the_twin(chain: Any, sparsity: float) -> None:
    scores, axes = chain
    on_axes = {name: score for name, score in scores.items() if name != "other"}
    masks = per_layer(scores, sparsity, coupled=axes)
    assert {name: mask for name, mask in masks.items() if name != "other"} == reference.per_axis(on_axes, sparsity, axes)
    assert [*masks] == [*scores]
    if "other" in scores:
        assert masks["other"] == per_layer({"other": scores["other"]}, sparsity)["other"]


@given(chains(), dyadic, dyadic)
def test_masks_of_hidden_axes_are_nested_and_a_block_pruned_before_stays_pruned(chain: Any, low: float, high: float) -> None:
    scores, axes = chain
    low, high = sorted((low, high))
    for allocate in (per_layer, FREE):
        light, heavy = (allocate(scores, sparsity, coupled=axes) for sparsity in (low, high))
        assert all((light[name].keep | ~heavy[name].keep).all() for name in scores)
        assert allocate(bp.restrict(scores, light), low, coupled=axes) == light or allocate is FREE
        again = allocate(bp.restrict(scores, light), high, coupled=axes)
        assert all((light[name].keep | ~again[name].keep).all() for name in scores)


@given(chains(), dyadic)
def test_of_a_model_the_units_with_the_lowest_means_go(chain: Any, sparsity: float) -> None:
    scores, axes = chain
    masks = FREE(scores, sparsity, coupled=axes)
    for hidden in axes:
        for name in scores:
            for tensor_axis in hidden.tensor_axes(name, len(scores[name].grid.shape)):
                keep = (
                    bp.expand(masks[name].keep, masks[name].grid).movedim(tensor_axis, 0).flatten(1)
                    if name != "a.bias"
                    else masks[name].keep[:, None]
                )
                parts = torch.tensor(reference.parts_along(hidden, name, len(keep)))
                kept = torch.zeros(hidden.parts, dtype=torch.bool).index_put((parts,), keep.any(1), accumulate=True)
                assert torch.equal(keep.any(1), kept[parts])  # all of a unit or nothing


def test_heads_are_pruned_as_a_whole_with_the_queries_that_share_them() -> None:
    values = axis(6, rows=("v",), columns=("o",), groups=2, copies={"o": 2})  # two heads of three channels, each for two query heads
    v = bp.BlockScore(torch.tensor([[9.0], [9], [9], [1], [1], [1]]), bp.BlockGrid((6, 4), (1,)))
    o = bp.BlockScore(torch.ones(1, 12), bp.BlockGrid((5, 12), (-1, 1)))
    masks = per_layer({"v": v, "o": o}, 0.5, coupled=[values])
    assert masks["v"].keep.flatten().tolist() == [True] * 3 + [False] * 3
    assert masks["o"].keep.flatten().tolist() == [True] * 6 + [False] * 6


def test_a_layer_that_reads_and_computes_the_same_units_loses_rows_and_columns() -> None:
    score = {"w": bp.BlockScore(torch.tensor([[5.0, 5, 1], [5, 5, 1], [1, 1, 1]]), bp.BlockGrid((3, 3), (1, 1)))}
    masks = per_layer(score, 1 / 3, coupled=[axis(3, rows=("w",), columns=("w",))])
    assert masks["w"].keep.int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]


def test_limits_and_sparsities_by_name_hold_for_units() -> None:
    grid = bp.BlockGrid((4, 2), (1,))
    scores = {name: bp.BlockScore(torch.arange(4.0)[:, None], grid) for name in ("attention.v", "mlp.up")}
    axes = [axis(4, rows=(name,)) for name in scores]
    masks = per_layer(scores, {"attention.*": 0.5, "*": 0}, coupled=axes)
    assert [int(mask.keep.sum()) for mask in masks.values()] == [2, 4]
    assert [int(m.keep.sum()) for m in per_layer(scores, 1.0, coupled=axes, min_keep=1).values()] == [1, 1]
    assert [int(m.keep.sum()) for m in per_model(scores, 1.0, coupled=axes, max_sparsity={"mlp.*": 0.25, "*": 0.5}).values()] == [2, 3]
    assert int(n_of_m(scores, 0.5, m=2, axis=0, coupled=axes)["mlp.up"].keep.sum()) == 2


def test_bad_axes_are_refused() -> None:
    up = bp.BlockScore(torch.arange(4.0)[:, None], bp.BlockGrid((4, 2), (1,)))
    tall = bp.BlockScore(torch.ones(2, 1), bp.BlockGrid((4, 2), (2,)))
    hidden = axis(4, rows=("up",))
    for match, error, scores, coupled in (
        ("a norm or a softmax joins", ValueError, {"up": up}, [axis(4, rows=("up",), removable=False)]),
        (r"up: \(4, 2\) is on two hidden axes along its axis 0", ValueError, {"up": up}, [hidden, axis(2, rows=("up",))]),
        ("'up' in a set and on a hidden axis", ValueError, {"up": up, "b": up}, [hidden, ("up", "b")]),
        ("none of their parameters has scores, such as ('up',)", KeyError, {"b": up}, [hidden]),
        ("join units of a hidden axis, of which each has 1", ValueError, {"up": tall}, [hidden]),
        ("axis of 4 entries does not divide into 3 equal runs", ValueError, {"up": up}, [axis(3, rows=("up",))]),
    ):
        with pytest.raises(error, match=match if "\\" in match else re.escape(match)):
            per_layer(scores, 0.5, coupled=coupled)
    with pytest.raises(ValueError, match="in no rows or banks; use per_layer or per_model"):
        per_row({"up": up}, 0.5, coupled=[hidden])


def test_the_score_of_a_unit_does_not_count_what_was_pruned_before() -> None:
    value = torch.tensor([[4.0, -math.inf], [3.0, 3.0], [-math.inf, -math.inf]])
    masks = per_layer({"w": bp.BlockScore(value, bp.BlockGrid((3, 2), (1, 1)))}, 2 / 3, coupled=[axis(3, rows=("w",))])
    assert masks["w"].keep.tolist() == [[True, False], [False, False], [False, False]]
