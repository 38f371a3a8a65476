"""Repaired weights are the least squares that they claim to be, row by row and from scratch; and biases by hand."""

import gc
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import reference
import torch
from hessian_cases import (
    EITHER,
    EVERY,
    GRAM,
    KINDS,
    check_removals,
    close,
    collected,
    in_turns,
    linears,
    loops,
    made,
    param,
    underdetermined,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds, shares_memory
from torch import Tensor, nn

import blockprune as bp
from blockprune import collect, metric, reconstruct, statistics
from blockprune.core.types import BlockMask, Param
from blockprune.repair import closed_form

ABSORBING = (GRAM, statistics.input_mean, statistics.bias)


def random_mask(p: Param, seed: int, share: float = 0.5, block: Any = None) -> BlockMask:
    grid = p.grid if block is None else bp.BlockGrid(p.grid.shape, block)
    return BlockMask(torch.rand(grid.size, generator=torch.Generator().manual_seed(seed)) >= share, grid)


def elementwise(mask: BlockMask) -> Tensor:
    return reference.expand(mask.keep, mask.grid)


def error(p: Param, weight: Tensor, damping: float) -> float:
    """What least squares minimizes: the layer's error, and the ridge."""
    rows, v, all_hessians = p.weight.double().flatten(1), weight.double().flatten(1), reference.hessians(p, damping)
    share = len(rows) // len(all_hessians)
    return sum(reference.error_of(rows[g * share : (g + 1) * share], v[g * share : (g + 1) * share], h) for g, h in enumerate(all_hessians))


# Least squares.


@given(linears(), seeds, st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([0, 500, 1 << 29]))
def test_least_squares_solves_each_row_alone_on_what_it_keeps(p: Param, seed: int, share: float, damping: float, memory: int) -> None:
    mask = random_mask(p, seed, share)
    got = reconstruct.least_squares({"w": p}, {"w": mask}, damping=damping, memory=memory)
    assert list(got) == ["w"]
    close(got["w"], reference.least_squares(p, elementwise(mask), damping), atol=1e-8)
    assert (got["w"][~elementwise(mask)] == 0).all()


@given(linears(), seeds, st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.integers(1, 5))
def test_bands_that_ranks_share_have_the_weights_of_all_bands(p: Param, seed: int, share: float, ranks: int) -> None:
    masks = {"w": random_mask(p, seed, share)}
    found, expected = (reconstruct.least_squares({"w": p}, masks, **options)["w"] for options in ({"share": in_turns(ranks)}, {}))
    close(found, expected, atol=1e-9)


@given(linears(), st.data())
def test_least_squares_takes_masks_of_any_blocks(p: Param, data: st.DataObject) -> None:
    """Of another grid than the data's, from another metric, or the union of two grids, which is of single elements."""
    rows, k = p.grid.shape
    block = (data.draw(st.integers(1, rows)), data.draw(st.integers(1, k)))
    other = attrs.evolve(p, grid=bp.BlockGrid(p.grid.shape, block))
    mask = bp.allocate.per_layer(metric.l1({"w": other}), data.draw(st.floats(0, 1)))["w"]
    union = BlockMask(elementwise(mask) | elementwise(random_mask(p, 3)), bp.BlockGrid(p.grid.shape, (1, 1)))
    for masks in (mask, union):
        got = reconstruct.least_squares({"w": p}, {"w": masks})["w"]
        close(got, reference.least_squares(p, elementwise(masks), 0.01), atol=1e-8)


@EVERY
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_least_squares_of_every_kind_of_layer_and_blocks_that_span_groups(kind: str, block: tuple[int, ...], share: float) -> None:
    _, _, name, data = collected(kind, block)
    p = data[name]
    for seed, spanning in enumerate((None, (5 if kind in ("linear", "conv2d", "grouped") else 4, 1))):
        mask = random_mask(p, seed, share, spanning)
        got = reconstruct.least_squares(data, {name: mask})[name]
        close(got, reference.least_squares(p, elementwise(mask), 0.01), atol=1e-8)


@pytest.mark.filterwarnings("ignore:.* a row is a single block")  # as in some of the drawn layers
@EITHER
@given(linears(), st.floats(0, 1), st.sampled_from([0.01, 1.0]))
def test_on_its_own_masks_it_gives_the_weights_that_obs_ends_with(compiled: bool, p: Param, sparsity: float, damping: float) -> None:
    with loops(compiled):
        scores = metric.obs({"w": p}, damping=damping)
    masks = bp.allocate.per_row(scores, sparsity)
    got = reconstruct.least_squares({"w": p}, masks, damping=damping)["w"]
    (hessian,) = reference.hessians(p, damping)
    for i, band in enumerate(reference.bands(p)):
        order = [j for j in scores["w"].value[i].argsort().tolist() if not masks["w"].keep[i, j]]
        close(got[band.at], reference.obs_weights(p.weight[band.at], hessian, band.blocks, order), atol=1e-7)


@pytest.mark.filterwarnings("ignore:.* a row is a single block")  # as in some of the drawn layers
@EVERY
def test_the_scores_of_pruned_blocks_bound_the_error_that_is_left(kind: str, block: tuple[int, ...]) -> None:
    _, _, name, data = collected(kind, block)
    p, scores = data[name], metric.obs(data)
    masks = bp.allocate.per_row(scores, 0.5)
    left = error(p, reconstruct.least_squares(data, masks)[name], 0.01)
    added = (scores[name].value * reference.block_elements(p.grid))[~masks[name].keep].sum()
    assert left <= added * (1 + 1e-9)
    if not p.grid.ragged:  # scores that had to be lifted, to rise along the order, are all that can part them
        assert left >= 0.4 * added


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_all_kept_is_the_weight_to_the_bit_and_all_pruned_is_zero(dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(6, 5).to(dtype)
    data = collect.with_statistics(model, where=bp.linears((2, 2)), statistics=ABSORBING, batches=[normal((40, 6), 0) + 1])
    p = data["weight"]
    kept, none = (BlockMask(torch.full(p.grid.size, keep), p.grid) for keep in (True, False))
    got = reconstruct.least_squares(data, {"weight": kept})
    assert torch.equal(got["weight"], model.weight)
    assert torch.equal(got["bias"], model.bias)
    assert got["weight"].dtype == got["bias"].dtype == dtype
    got = reconstruct.least_squares(data, {"weight": none})
    assert (got["weight"] == 0).all()
    mean = model(normal((40, 6), 0).to(dtype) + 1).double().mean(0)
    close(got["bias"], mean, rtol=0, atol={torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 0.02))


@given(linears(), seeds)
def test_rows_that_keep_all_are_untouched_beside_others(p: Param, seed: int) -> None:
    mask = random_mask(p, seed)
    keep = mask.keep.clone()
    keep[0] = True
    got = reconstruct.least_squares({"w": p}, {"w": BlockMask(keep, p.grid)})["w"]
    assert torch.equal(got[: p.grid.block[0]], p.weight[: p.grid.block[0]])


# Its laws.


@given(linears(), seeds, st.sampled_from([1e-6, 0.01, 1.0]))
def test_it_is_never_worse_than_zeroing_nor_than_fewer_kept(p: Param, seed: int, damping: float) -> None:
    mask, other = random_mask(p, seed), random_mask(p, seed + 1)
    both = BlockMask(mask.keep & other.keep, p.grid)
    more, fewer = (reconstruct.least_squares({"w": p}, {"w": m}, damping=damping)["w"] for m in (mask, both))
    slack = 1e-9 * error(p, torch.zeros_like(p.weight), damping) + 1e-12
    assert error(p, more, damping) <= error(p, reference.masked(p.weight, mask.keep, p.grid), damping) + slack
    assert error(p, more, damping) <= error(p, fewer, damping) + slack


@pytest.mark.parametrize(("kind", "block"), [(kind, block) for kind in KINDS if kind != "in_proj" for block in KINDS[kind][2]])
@pytest.mark.parametrize("absorbing", [False, True])
def test_the_layer_itself_errs_less_than_with_plain_masks(kind: str, block: tuple[int, ...], absorbing: bool) -> None:
    model, x, name, data = collected(kind, block, *(ABSORBING if absorbing else (GRAM,)))
    masks = {name: random_mask(data[name], 0, 0.4)}
    weights = reconstruct.least_squares(data, masks, damping=1e-9)
    assert set(weights) == ({name, "bias"} if absorbing else {name})
    y = model(x).detach()
    plain = (bp.apply_masks(model, masks)(x) - y).square().mean()
    repaired = (bp.apply_masks(model, masks, weights)(x) - y).square().mean()
    keep = elementwise(masks[name]).flatten(1)
    if (keep.any(1) & ~keep.all(1)).any():  # something is left to make up for something
        assert repaired < plain
    else:
        assert repaired <= plain * (1 + 1e-9)
    if not absorbing:  # and as much as the quadratic says
        got = (model(x) - y).square().movedim(1, -1).sum(-1).mean()
        close(got.detach(), error(data[name], weights[name], 0.0), atol=1e-7)


# With a bias.


@pytest.mark.parametrize("groups", [1, 2])
def test_with_a_mean_and_a_bias_it_is_least_squares_with_an_intercept(groups: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = nn.Conv1d(6, 4, 1, groups=groups).double()
    x = normal((10, 6, 5), 0) @ normal((5, 5), 1) + 2
    data = collect.with_statistics(layer, where=bp.convs((1, 1)), statistics=ABSORBING, batches=[x[:3], x[3:]])
    mask = random_mask(data["weight"], 4)
    got = reconstruct.least_squares(data, {"weight": mask}, damping=1e-10)
    flat, y = x.movedim(1, -1).flatten(0, 1), layer(x).movedim(1, -1).flatten(0, 1).detach()
    for r in range(4):
        seen = flat.chunk(groups, 1)[r * groups // 4]
        kept = mask.keep[r, :, 0].nonzero().flatten()
        design = torch.cat([seen[:, kept], torch.ones(len(seen), 1).double()], 1)
        solution = torch.linalg.lstsq(design, y[:, r : r + 1]).solution.flatten()
        close(got["weight"][r, kept, 0], solution[:-1], rtol=1e-6, atol=1e-7)
        close(got["bias"][r], solution[-1], rtol=1e-6, atol=1e-7)


@given(linears(), seeds, st.sampled_from([0.01, 1.0]))
def test_inputs_count_from_their_mean_and_the_bias_keeps_the_mean_of_the_output(p: Param, seed: int, damping: float) -> None:
    rows, k = p.grid.shape
    x, mask = normal((3 * k + 2, k), seed) + 1, random_mask(p, seed)
    p = param(p.weight, x, p.grid.block, input_mean=x.mean(0)[None], bias=normal((rows,), seed))
    got = reconstruct.least_squares({"fc.weight": p}, {"fc.weight": mask}, damping=damping)
    assert list(got) == ["fc.weight", "fc.bias"]
    close(got["fc.weight"], reference.least_squares(p, elementwise(mask), damping), atol=1e-8)
    close((x @ got["fc.weight"].mT + got["fc.bias"]).mean(0), (x @ p.weight.mT + p.stats["bias"]).mean(0))


@EITHER
def test_optimal_brain_surgeon_of_data_with_a_bias_counts_inputs_from_their_mean_too(compiled: bool) -> None:
    _, _, name, data = collected("linear", (2, 3), *ABSORBING)
    x = made("linear")[1]
    centered = {name: param(data[name].weight, x - x.mean(0), (2, 3))}
    with loops(compiled):
        close(metric.obs(data)[name].value, metric.obs(centered)[name].value)


@pytest.mark.parametrize("stats", [(GRAM, statistics.bias), (GRAM, statistics.input_mean)])
def test_a_mean_or_a_bias_alone_changes_nothing(stats: Any) -> None:
    _, _, name, data = collected("linear", (2, 3), *stats)
    masks = {name: random_mask(data[name], 0)}
    got = reconstruct.least_squares(data, masks)
    assert list(got) == [name]
    assert torch.equal(got[name], reconstruct.least_squares(collected("linear", (2, 3))[-1], masks)[name])


def test_a_layer_without_a_bias_is_repaired_in_its_weight_alone() -> None:
    model = nn.Linear(4, 3, bias=False).double()
    data = collect.with_statistics(model, where=bp.linears((1, 1)), statistics=ABSORBING, batches=[normal((20, 4), 0) + 1])
    mask = random_mask(data["weight"], 0)
    got = reconstruct.least_squares(data, {"weight": mask})
    assert list(got) == ["weight"]
    close(got["weight"], reference.least_squares(data["weight"], elementwise(mask), 0.01))


@EITHER
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("absorbing", [False, True])
def test_towards_another_output_it_is_least_squares_and_obs_counts_from_the_best_without_masks(
    absorbing: bool, stream: bool, compiled: bool
) -> None:
    """`input_cross`: the weight should give on x what it gave on the target's inputs; `residual_cross`: and what the stream lacks."""
    target = normal((60, 6), 0) @ normal((6, 6), 1) + 1
    x, weight, before = target + 0.3 * normal((60, 6), 2) + 0.5, normal((4, 6), 3), normal((4,), 4)
    ahead = stream * (normal((60, 4), 5) + x[:, :4])
    wide = torch.cat([x, torch.ones(60, 1).double()], 1) / 60
    cross = {"input_cross": (target.mT @ wide)[None], "residual_cross": ahead.mT @ wide if stream else x.new_empty(0)}
    p = param(weight, x, (2, 2), **cross, **({"input_mean": x.mean(0)[None], "bias": before} if absorbing else {}))
    for mask in (random_mask(p, 0), BlockMask(torch.ones(p.grid.size, dtype=torch.bool), p.grid)):
        got = reconstruct.least_squares({"weight": p}, {"weight": mask}, damping=1e-11)
        for r in range(4):
            kept = elementwise(mask)[r].nonzero().flatten()
            design = torch.cat([x[:, kept], torch.ones(60, int(absorbing)).double()], 1)
            solution = torch.linalg.lstsq(design, (target @ weight[r] + ahead[:, r] + absorbing * before[r])[:, None]).solution.flatten()
            close(got["weight"][r, kept], solution[: len(kept)], rtol=1e-6, atol=1e-7)
            if absorbing:
                close(got["bias"][r], solution[-1], rtol=1e-6, atol=1e-7)
    with loops(compiled):
        score = metric.obs({"weight": p}, damping=0.01)["weight"]
    best = reconstruct.least_squares({"weight": p}, {"weight": mask}, damping=0.01)["weight"]
    check_removals(attrs.evolve(p, weight=best, stats={k: v for k, v in p.stats.items() if k not in cross}), score, 0.01)


def test_in_proj_is_repaired_with_its_bias_group_by_group() -> None:
    model, x, name, data = collected("in_proj", (2, 2), *ABSORBING)
    mask = random_mask(data[name], 0)
    got = reconstruct.least_squares(data, {name: mask}, damping=1e-10)
    close(got[name], reference.least_squares(data[name], elementwise(mask), 1e-10), rtol=1e-5, atol=1e-6)
    inputs = [q.flatten(0, 1) for q in (x, x + 1, x.square())]
    attention: Any = model.attention
    for i, (w, b) in enumerate(zip(got[name].chunk(3), got["attention.in_proj_bias"].chunk(3), strict=True)):
        before = inputs[i] @ attention.in_proj_weight.chunk(3)[i].mT + attention.in_proj_bias.chunk(3)[i]
        close((inputs[i] @ w.mT + b).mean(0), before.mean(0).detach())
    bp.apply_masks(model, {name: mask}, got)


# bias.


@pytest.mark.parametrize(
    ("kind", "block"), [("linear", (2, 3)), ("conv1d", (2, 1)), ("conv2d", (1, 2, 1)), ("grouped", (4, 1)), ("in_proj", (5, 3))]
)
def test_bias_is_the_bias_and_what_pruned_inputs_gave_on_average(kind: str, block: tuple[int, ...]) -> None:
    model, _, name, data = collected(kind, block, *ABSORBING)
    p, mask = data[name], random_mask(data[name], 1)
    ((bias_name, got),) = reconstruct.bias(data, {name: mask}).items()
    assert bias_name == ("attention.in_proj_bias" if kind == "in_proj" else "bias")
    before, mean = model.get_parameter(bias_name), p.stats["input_mean"].expand(p.grid.shape)
    for r in range(len(p.weight)):
        pruned = ~elementwise(mask)[r]
        close(got[r], (before[r] + (p.weight[r][pruned] * mean[r][pruned]).sum()).detach())
    bp.apply_masks(model, {name: mask}, {bias_name: got})
    assert torch.equal(model.get_parameter(bias_name), got)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "grouped"])
def test_bias_keeps_the_mean_of_the_output(kind: str) -> None:
    model, x, name, data = collected(kind, (2, 1), *ABSORBING)
    masks, y = {name: random_mask(data[name], 1)}, model(x).detach()
    bp.apply_masks(model, masks, reconstruct.bias(data, masks))
    close(model(x).movedim(1, -1).flatten(0, -2).mean(0).detach(), y.movedim(1, -1).flatten(0, -2).mean(0))


def test_a_layer_without_a_bias_cannot_take_one_and_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    data = collect.with_statistics(model, where=bp.linears((1, 1)), statistics=ABSORBING, batches=[torch.ones(2, 4)])
    with pytest.raises(ValueError, match=r"0\.weight \(3, 4\): its layer has no bias to repair; use least_squares"):
        reconstruct.bias(data, {"0.weight": random_mask(data["0.weight"], 0)})


def test_both_repair_a_whole_model_that_apply_masks_takes() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    x = normal((50, 6), 0)
    data = collect.with_statistics(model, where=bp.linears((2, 2)), statistics=ABSORBING, batches=[x])
    masks = bp.allocate.per_model(metric.obs(data), 0.5)
    for repair in (reconstruct.least_squares, reconstruct.bias):
        weights = repair(data, masks)
        bp.apply_masks(model, masks, weights)
        assert bp.read_masks(model) == masks
        for name, value in weights.items():
            stored = model.get_parameter(name.replace(".weight", ".parametrizations.weight.original"))
            assert torch.equal(stored, value)
    assert reconstruct.none(data, masks) == {}


# Numerics.


@pytest.mark.filterwarnings("ignore:.*singular")
@given(st.integers(1, 8), st.integers(2, 16), seeds, st.sampled_from([0.0, 1e-13, 1e-10, 1e-8, 1e-7, 1e-6, 1e-4]), st.booleans())
def test_any_condition_gives_finite_weights_that_are_no_worse_than_zeroing(n: int, k: int, seed: int, damping: float, double: bool) -> None:
    p = underdetermined(n, k, seed, torch.float64 if double else torch.float32, block=(2, 1))
    mask = random_mask(p, seed)
    got = reconstruct.least_squares({"w": p}, {"w": mask}, damping=damping)["w"]
    assert got.isfinite().all()
    assert (got[~elementwise(mask)] == 0).all()
    assert got.dtype == p.weight.dtype
    plain = reference.masked(p.weight, mask.keep, p.grid)
    used = bp.conditioning({"w": p}, damping=damping).rows["w"][4]
    whole = error(p, torch.zeros_like(p.weight), used)
    assert error(p, got, used) <= error(p, plain, used) + (1e-9 if double else 1e-3) * whole


@given(st.integers(1, 4), st.integers(8, 12), seeds)
def test_a_singular_hessian_without_damping_warns_with_the_name_and_what_was_used(n: int, k: int, seed: int) -> None:
    p = underdetermined(n, k, seed, torch.float32)
    with pytest.warns(UserWarning, match=rf"fc\.weight \(4, {k}\): H is singular in float32 with damping=0; 0\.0001 was used"):
        reconstruct.least_squares({"fc.weight": p}, {"fc.weight": random_mask(p, seed)}, damping=0)


def test_dead_inputs_keep_their_weights_and_the_others_are_as_without_them() -> None:
    x = normal((30, 8), 0)
    x[:, 4:6] = 0
    p = param(normal((4, 8), 1), x, (2, 2))
    mask = BlockMask(torch.tensor([[True, False, True, True], [False, True, True, True]]), p.grid)
    got = reconstruct.least_squares({"w": p}, {"w": mask})["w"]
    assert got.isfinite().all()
    close(got[:, 4:6], p.weight[:, 4:6])


def test_inputs_that_are_all_zero_or_nan_are_an_error_with_the_name() -> None:
    p = param(torch.ones(2, 3), torch.zeros(4, 3), (1, 1))
    with pytest.raises(ValueError, match=r"fc\.weight \(2, 3\): its inputs are all zero"):
        reconstruct.least_squares({"fc.weight": p}, {"fc.weight": random_mask(p, 0)})
    for bad in (float("nan"), float("inf")):
        gram = torch.eye(3)
        gram[0, 1] = bad
        q = attrs.evolve(p, stats={"input_gram": gram[None]})
        with pytest.raises(ValueError, match=r"fc\.weight \(2, 3\): its input_gram has NaN or inf"):
            reconstruct.least_squares({"fc.weight": q}, {"fc.weight": random_mask(p, 0)})


def test_float32_is_close_to_float64_on_well_conditioned_data() -> None:
    single = param(normal((6, 24), 0).float(), normal((200, 24), 1).float(), (2, 2))
    double = param(normal((6, 24), 0), normal((200, 24), 1), (2, 2))
    got, expected = (reconstruct.least_squares({"w": p}, {"w": random_mask(p, 0)})["w"] for p in (single, double))
    assert got.dtype == torch.float32
    close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_have_half_weights_that_are_the_rounded_float32_ones(dtype: torch.dtype) -> None:
    model = nn.Linear(8, 4).to(dtype)
    data = collect.with_statistics(model, where=bp.linears((2, 2)), statistics=ABSORBING, batches=[normal((64, 8), 0) + 1])
    masks = {"weight": random_mask(data["weight"], 0)}
    got = reconstruct.least_squares(data, masks)
    wide_stats = {**data["weight"].stats, "bias": data["weight"].stats["bias"].float()}
    expected = reconstruct.least_squares({"weight": Param(data["weight"].weight.float(), data["weight"].grid, wide_stats)}, masks)
    for name, value in got.items():
        assert value.dtype == dtype
        assert torch.equal(value, expected[name].to(dtype))
    assert reconstruct.bias(data, masks)["bias"].dtype == dtype
    bp.apply_masks(model, masks, got)


# Bad input, and purity.


@pytest.mark.parametrize(
    ("repair", "missing"), [(reconstruct.least_squares, "input_gram"), (reconstruct.bias, "input_mean"), (reconstruct.bias, "bias")]
)
def test_a_missing_statistic_is_named_with_code_that_collects_it(repair: Callable[..., Any], missing: str) -> None:
    model = nn.Linear(4, 2)
    others = [s for s in ABSORBING if s.name != missing]
    data = collect.with_statistics(model, where=bp.linears((1, 1)), statistics=others, batches=[torch.ones(2, 4)])
    masks = {"weight": random_mask(data["weight"], 0)}
    with pytest.raises(ValueError) as caught:
        repair(data, masks)
    for part in (
        "weight (2, 4)",
        f"reconstruct.{repair.__name__}",
        repr(missing),
        str(sorted(s.name for s in others)),
        f"statistics.{missing}]",
    ):
        assert part in str(caught.value), part
    with pytest.raises(ValueError, match="the data has none"):
        repair(collect.weights(model, where=bp.linears((1, 1))), masks)


@pytest.mark.parametrize("repair", [reconstruct.least_squares, reconstruct.bias])
def test_masks_of_another_shape_or_an_unknown_parameter_are_errors(repair: Callable[..., Any]) -> None:
    data = collected("linear", (1, 1), *ABSORBING)[-1]
    mask = random_mask(data["weight"], 0)
    with pytest.raises(KeyError, match=r"'fc.weight', for which nothing was collected; the data has 'weight'"):
        repair(data, {"fc.weight": mask})
    wrong = BlockMask(torch.ones(7, 5, dtype=torch.bool), bp.BlockGrid((7, 5), (1, 1)))
    with pytest.raises(ValueError, match=r"weight: the weight \(5, 7\) has a mask for shape \(7, 5\)"):
        repair(data, {"weight": wrong})


@pytest.mark.parametrize("damping", [-0.1, -1e-9, float("nan")])
def test_a_damping_below_zero_is_an_error(damping: float) -> None:
    data = collected("linear", (1, 1))[-1]
    with pytest.raises(ValueError, match=f"damping={damping}"):
        reconstruct.least_squares(data, {"weight": random_mask(data["weight"], 0)}, damping=damping)


def test_a_weight_that_is_a_view_or_trained_is_repaired_as_a_plain_one() -> None:
    x = normal((20, 6), 1) + 1
    p = param(normal((4, 6), 0), x, (2, 2), input_mean=x.mean(0)[None], bias=torch.ones(4).double())
    view, trained = p.weight.mT.contiguous().mT, nn.Parameter(p.weight.clone())
    for repair in (reconstruct.least_squares, reconstruct.bias):
        expected = repair({"w.weight": p}, {"w.weight": random_mask(p, 0)})
        for weight in (view, trained):
            got = repair({"w.weight": attrs.evolve(p, weight=weight)}, {"w.weight": random_mask(p, 0)})
            for name, value in got.items():
                close(value, expected[name])
                assert not value.requires_grad


def test_masks_of_some_parameters_repair_those_alone() -> None:
    data = {"a.weight": collected("linear", (1, 1))[-1]["weight"], "b.weight": underdetermined(2, 4, 0, torch.float32)}
    assert list(reconstruct.least_squares(data, {"a.weight": random_mask(data["a.weight"], 0)})) == ["a.weight"]
    assert reconstruct.least_squares(data, {}) == {}
    assert reconstruct.bias({}, {}) == {}


@EVERY
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_nothing_is_written_to_and_results_share_no_memory(kind: str, block: tuple[int, ...], share: float) -> None:
    _, _, name, data = collected(kind, block, *ABSORBING)
    p, masks = data[name], {name: random_mask(data[name], 0, share)}
    given_tensors = [p.weight, *p.stats.values(), masks[name].keep]
    before = [t.clone() for t in given_tensors]
    for repair in (reconstruct.least_squares, reconstruct.bias):
        for value in repair(data, masks).values():
            assert not shares_memory(value, *given_tensors)
            assert not value.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(given_tensors, before, strict=True))


@given(st.data())
def test_sparsegpt_update_is_the_optimum_of_the_columns_to_the_right(draw: st.DataObject) -> None:
    """Going left to right, the columns right of each pruned one are refitted with everything left of them fixed."""
    seed, block = draw.draw(st.integers(0, 99)), draw.draw(st.sampled_from([(1, 1), (2, 3), (4, 2)]))
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(4, 7, generator=generator).double(), torch.randn(30, 7, generator=generator).double()
    grid = bp.BlockGrid((4, 7), block)
    keep = torch.rand(grid.size, generator=generator) > 0.4
    data = {"w": bp.Param(weight, grid, {"input_gram": (x.mT @ x / 30)[None]})}
    step = draw.draw(st.sampled_from([1, 3, 128]))
    found = bp.reconstruct.sparsegpt(data, {"w": bp.BlockMask(keep, grid)}, damping=0.01, columns_per_step=step)["w"]
    h = x.mT @ x / 30
    h = h + 0.01 * h.diagonal().diag()
    gone = ~bp.expand(keep, grid)
    for r in range(4):
        w = weight[r].clone()
        for c in range(7):
            if gone[r, c]:
                right = slice(c + 1, None)
                w[right] += torch.linalg.solve(h[right, right], h[right, c]) * w[c]
                w[c] = 0
        torch.testing.assert_close(found[r], w)


def test_least_squares_is_never_worse_than_sparsegpt() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(12, 8).double(), (torch.randn(64, 12) @ torch.randn(12, 12)).double()
    data = bp.collect.with_statistics(model, where=bp.linears((2, 3)), statistics=[bp.statistics.input_gram], batches=[x])
    masks = bp.allocate.per_layer(bp.metric.sparsegpt(data, sparsity=0.5), 0.5)
    both = [repair(data, masks, damping=1e-9)["weight"] for repair in (bp.reconstruct.sparsegpt, bp.reconstruct.least_squares)]
    greedy, best = (((w - model.weight) @ x.mT).square().sum() for w in both)
    assert best < greedy


@pytest.mark.parametrize("columns", [0, -1])
def test_sparsegpt_takes_at_least_one_column_at_a_time(columns: int) -> None:
    model, x = nn.Linear(8, 4), torch.randn(32, 8)
    data = bp.collect.with_statistics(model, where=bp.linears((2, 2)), statistics=[bp.statistics.input_gram], batches=[x])
    masks = bp.allocate.per_layer(bp.metric.l1(data), 0.5)
    with pytest.raises(ValueError, match=f"columns_per_step={columns} must be an integer, at least 1"):
        bp.reconstruct.sparsegpt(data, masks, columns_per_step=columns)
    with pytest.raises(ValueError, match=f"columns_per_step={columns} must be an integer, at least 1"):
        bp.metric.sparsegpt(data, sparsity=0.5, columns_per_step=columns)


@pytest.mark.parametrize("kept", [1, 15])
def test_the_systems_are_solved_beside_one_matrix_of_all_inputs(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hessian or its inverse: a layer of 16,384 inputs has 1 GiB of float32 in each matrix of this size."""
    k = 16
    p = Param(normal((4, k), 0), bp.BlockGrid((4, k), (4, 1)), stats={"input_gram": torch.eye(k)[None]})
    mask = BlockMask(torch.arange(k)[None] < kept, p.grid)
    matrices: list[int] = []
    solve_bands = closed_form._solve_bands

    def count_matrices(*args: Any) -> Tensor:
        gc.collect()
        tensors = (value for value in gc.get_objects() if type(value) is Tensor)
        own = {value.untyped_storage().data_ptr() for value in tensors if tuple(value.shape[-2:]) == (k, k)}
        matrices.append(len(own - {p.stats["input_gram"].untyped_storage().data_ptr()}))
        return solve_bands(*args)

    monkeypatch.setattr(closed_form, "_solve_bands", count_matrices)
    reconstruct.least_squares({"w": p}, {"w": mask})
    assert matrices == [1]
