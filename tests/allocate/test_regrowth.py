"""`regrow`: the lowest kept blocks make room for the best pruned ones, and no parameter's budget changes."""

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import PALETTES, drawn, dtypes, grids, seeds, sparsities
from torch import Tensor, nn
from two_processes import RANKS, in_two_processes

import blockprune as bp

Case = tuple[bp.BlockMask, bp.BlockScore, bp.BlockScore]


@st.composite
def cases(draw: st.DrawFn, *, palettes: tuple[str, ...] = tuple(PALETTES)) -> Case:
    """A mask, and two scores full of ties for its blocks, ragged ones included."""
    grid = draw(grids())
    keep = torch.rand(grid.size, generator=torch.Generator().manual_seed(draw(seeds))) < draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
    picked = [drawn(PALETTES[draw(st.sampled_from(palettes))] + [-float("inf")], grid, draw(seeds), draw(dtypes)) for _ in range(2)]
    return bp.BlockMask(keep, grid), picked[0], picked[1]


def regrown(case: Case, fraction: float, **options: Any) -> Tensor:
    mask, drop, grow = case
    return bp.regrow({"w": mask}, drop={"w": drop}, grow={"w": grow}, fraction=fraction, **options)["w"].keep


def kept_elements(keep: Tensor, grid: bp.BlockGrid) -> int:
    return int(reference.block_elements(grid)[keep].sum())


@given(cases(), sparsities, st.one_of(st.none(), sparsities))
def test_regrow_is_its_slow_twin(case: Case, fraction: float, sparsity: float | None) -> None:
    mask, drop, grow = case
    expected = reference.regrow(mask.keep, drop.value, grow.value, mask.grid, fraction=fraction, sparsity=sparsity)
    assert torch.equal(regrown(case, fraction, sparsity=sparsity), expected)


@given(cases(), sparsities)
def test_the_budget_stays_to_the_block(case: Case, fraction: float) -> None:
    mask, _, grow = case
    new = regrown(case, fraction)
    came, went = new & ~mask.keep, mask.keep & ~new
    largest = int(reference.block_elements(mask.grid).max())
    before, after = kept_elements(mask.keep, mask.grid), kept_elements(new, mask.grid)
    assert 2 * abs(after - before) <= largest
    if not mask.grid.ragged:
        assert after == before
        room = int((~mask.keep & (grow.value != -torch.inf)).sum())
        assert int(came.sum()) == int(went.sum()) <= room
    assert not came[grow.value == -torch.inf].any()


@given(cases(), sparsities)
def test_what_falls_scores_no_higher_than_what_stays_and_what_comes_no_lower_than_what_does_not(case: Case, fraction: float) -> None:
    mask, drop, grow = case
    new = regrown(case, fraction)
    if (mask.keep & ~new).any() and (mask.keep & new).any():
        assert drop.value[mask.keep & ~new].max() <= drop.value[mask.keep & new].min()
    if (new & ~mask.keep).any() and (~new & ~mask.keep).any():
        assert grow.value[new & ~mask.keep].min() >= grow.value[~new & ~mask.keep].max()


@given(cases(), sparsities)
def test_nothing_happens_without_a_fraction_and_nothing_is_written(case: Case, fraction: float) -> None:
    mask, drop, grow = case
    before = mask.keep.clone(), drop.value.clone(), grow.value.clone()
    assert torch.equal(regrown(case, 0.0), mask.keep)
    new = regrown(case, fraction)
    new.logical_not_()  # the result is memory of its own
    assert all(torch.equal(a, b) for a, b in zip(before, (mask.keep, drop.value, grow.value), strict=True))


@given(cases(), sparsities, sparsities)
def test_a_sparsity_is_reached_to_half_a_block_where_blocks_may_grow(case: Case, fraction: float, sparsity: float) -> None:
    mask, drop, grow = case
    grow = bp.BlockScore(grow.value.nan_to_num(neginf=-1.0), grow.grid)
    new = regrown((mask, drop, grow), fraction, sparsity=sparsity)
    largest = int(reference.block_elements(mask.grid).max())
    assert 2 * abs(kept_elements(new, mask.grid) - (1 - sparsity) * mask.grid.elements) <= largest + 1e-6


def test_a_fixed_sparsity_keeps_ragged_masks_from_drifting() -> None:
    grid, generator = bp.BlockGrid((7, 7), (3, 3)), torch.Generator().manual_seed(0)
    masks = {"w": bp.BlockMask(torch.rand(grid.size, generator=generator) < 0.5, grid)}
    for _ in range(50):
        drop, grow = ({"w": bp.BlockScore(torch.rand(grid.size, generator=generator), grid)} for _ in range(2))
        masks = dict(bp.regrow(masks, drop=drop, grow=grow, fraction=0.4, sparsity=0.5))
    assert abs(kept_elements(masks["w"].keep, grid) - 24.5) <= 4.5


@given(cases(), sparsities, seeds)
def test_parameters_do_not_see_each_other(case: Case, fraction: float, seed: int) -> None:
    mask, drop, grow = case
    both = [{"a": x, "b": x} for x in (mask, drop, grow)]
    new = bp.regrow(both[0], drop=both[1], grow=both[2], fraction={"a": fraction, "*": 0.0})
    assert torch.equal(new["a"].keep, regrown(case, fraction))
    assert new["b"] == mask


GRID = bp.BlockGrid((4, 4), (2, 2))
MASK = {"w": bp.BlockMask(torch.eye(2).bool(), GRID)}
SCORE = {"w": bp.BlockScore(torch.ones(2, 2), GRID)}


@pytest.mark.parametrize("options", [{"fraction": 1.5}, {"fraction": -0.1}, {"fraction": float("nan")}, {"fraction": {"w": 2}}])
def test_a_fraction_outside_0_to_1_is_an_error(options: Any) -> None:
    with pytest.raises(ValueError, match=r"fraction.*must be"):
        bp.regrow(MASK, drop=SCORE, grow=SCORE, **options)
    with pytest.raises(ValueError, match=r"sparsity.*must be"):
        bp.regrow(MASK, drop=SCORE, grow=SCORE, fraction=0.5, sparsity=options["fraction"])


def test_a_fraction_that_is_no_number_is_an_error() -> None:
    with pytest.raises(TypeError, match="fraction='half'"):
        bp.regrow(MASK, drop=SCORE, grow=SCORE, fraction="half")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="fraction has a key 'v' that matches no parameter"):
        bp.regrow(MASK, drop=SCORE, grow=SCORE, fraction={"v": 0.5})


@pytest.mark.parametrize("what", ["drop", "grow"])
def test_scores_that_do_not_fit_the_masks_are_errors_that_name_the_parameter(what: str) -> None:
    def call(scores: Any) -> None:
        bp.regrow(MASK, **{"drop": SCORE, "grow": SCORE, what: scores}, fraction=0.5)

    with pytest.raises(KeyError, match=f"{what} has no scores of 'w'"):
        call({})
    with pytest.raises(KeyError, match=f"{what} has scores of 'v', which has no mask"):
        call(SCORE | {"v": SCORE["w"]})
    with pytest.raises(ValueError, match=re.escape(f"w: {what} has scores of")):
        call({"w": bp.BlockScore(torch.ones(4, 4), bp.BlockGrid((4, 4), (1, 1)))})
    with pytest.raises(ValueError, match=re.escape(f"w: 1 of the {what} scores (2, 2) are NaN")):
        call({"w": bp.BlockScore(torch.tensor([[1.0, torch.nan], [1, 1]]), GRID)})
    with pytest.raises(TypeError, match=rf"{what}\['w'\] is a Tensor, not a BlockScore"):
        call({"w": torch.ones(2, 2)})
    with pytest.raises(TypeError, match=r"masks\['w'\] is a Tensor, not a BlockMask"):
        bp.regrow({"w": MASK["w"].keep}, drop=SCORE, grow=SCORE, fraction=0.5)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=f"w: the {what} scores"):
        call({"w": bp.BlockScore(torch.ones(2, 2, dtype=torch.int64), GRID)})


# Dynamic sparsity as a composition: a researcher's own rule is two functions.

WHERE = bp.linears((2, 2))
Rule = Callable[[bp.Data], bp.Scores]


def planted(seed: int) -> tuple[nn.Linear, Tensor, Tensor, bp.Masks]:
    """A linear problem whose solution has weights in a few blocks, and a random mask that misses most of them."""
    generator = torch.Generator().manual_seed(seed)
    grid = bp.BlockGrid((8, 16), (2, 2))
    blocks = torch.zeros(grid.blocks, dtype=torch.bool)
    blocks[torch.randperm(grid.blocks, generator=generator)[:6]] = True
    solution = bp.expand(blocks.view(grid.size), grid) * torch.randn(8, 16, generator=generator)
    start = torch.zeros(grid.blocks, dtype=torch.bool)
    start[(~blocks).nonzero()[:, 0][torch.randperm(26, generator=generator)[:8]]] = True
    model = nn.Linear(16, 8, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.randn(256, 16, generator=generator)
    return model, x, x @ solution.T, {"weight": bp.BlockMask(start.view(grid.size), grid)}


def train(model: nn.Linear, x: Tensor, y: Tensor, masks: bp.Masks, *, drop: Rule, grow: Rule) -> float:
    """Dynamic sparsity in a plain loop, with any rule of two functions; returns the last loss."""
    bp.apply_masks(model, masks, straight_through=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fraction = partial(bp.schedule.cosine, initial=0.5, final=0.0, end=120)
    for step in range(160):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        if step % 10 == 9 and step < 120:
            before = bp.read_masks(model)
            data = bp.collect.gradients(model, where=WHERE)
            after = bp.regrow(before, drop=drop(data), grow=grow(data), fraction=fraction(step))
            bp.apply_masks(model, after, bp.zero_new_blocks(model, after), straight_through=True)
            bp.reset_state(optimizer, model, before, after)
        else:
            optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("seed", [0, 1])
def test_rigl_finds_planted_blocks_that_a_static_mask_misses(seed: int) -> None:
    model, x, y, masks = planted(seed)
    dynamic = train(model, x, y, masks, drop=bp.metric.l1, grow=bp.metric.gradient_magnitude)
    assert bp.sparsity(bp.read_masks(model)) == bp.sparsity(masks)
    model, x, y, masks = planted(seed)
    static = train(model, x, y, masks, drop=bp.metric.l1, grow=lambda data: bp.restrict(bp.metric.l1(data), bp.read_masks(model)))
    assert bp.read_masks(model) == masks
    assert dynamic < 0.01 * static


def test_set_grows_random_blocks() -> None:
    model, x, y, masks = planted(0)
    train(model, x, y, masks, drop=bp.metric.l1, grow=partial(bp.metric.random, generator=torch.Generator().manual_seed(0)))
    after = bp.read_masks(model)
    assert bp.sparsity(after) == bp.sparsity(masks)
    assert after != masks


def test_a_resumed_run_continues_bit_for_bit() -> None:
    """Masks, weights, optimizer and the step are all there is; no state hides in a function."""

    def steps(model: nn.Linear, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for step in numbers:
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
            before = bp.read_masks(model)
            data = bp.collect.gradients(model, where=WHERE)
            after = bp.regrow(before, drop=bp.metric.l1(data), grow=bp.metric.random(data, generator=step), fraction=0.3)
            bp.apply_masks(model, after, bp.zero_new_blocks(model, after), straight_through=True)
            bp.reset_state(optimizer, model, before, after)

    model, x, y, masks = planted(0)
    bp.apply_masks(model, masks, straight_through=True)
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer, range(4))
    again = nn.Linear(16, 8, bias=False)
    bp.load_masked(again, {name: value.clone() for name, value in model.state_dict().items()})
    bp.apply_masks(again, bp.read_masks(again), straight_through=True)
    resumed = torch.optim.AdamW(again.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, range(4, 8))
    steps(again, resumed, range(4, 8))
    assert bp.read_masks(model) == bp.read_masks(again)
    assert torch.equal(model.weight, again.weight)


def run_rank(index: int, _: str) -> tuple[Tensor, Tensor]:
    """RigL on a rank's own batches; gradients are averaged before they are scored."""
    model, x, y, masks = planted(0)
    wrapped = nn.parallel.DistributedDataParallel(bp.apply_masks(model, masks, straight_through=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        (wrapped(x[index::RANKS]) - y[index::RANKS]).square().mean().backward()
        optimizer.step()
        before, data = bp.read_masks(model), bp.collect.gradients(model, where=WHERE)
        after = bp.regrow(before, drop=bp.metric.l1(data), grow=bp.metric.gradient_magnitude(data), fraction=0.3)
        bp.apply_masks(model, after, bp.zero_new_blocks(model, after), straight_through=True)
        bp.reset_state(optimizer, model, before, after)
    return bp.read_masks(model)["weight"].keep, model.weight.detach().as_subclass(Tensor)


@pytest.mark.slow
def test_two_processes_choose_the_same_masks(tmp_path: Path) -> None:
    first, second = in_two_processes(run_rank, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], planted(0)[3]["weight"].keep)
