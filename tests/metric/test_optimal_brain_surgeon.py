"""Optimal Brain Surgeon and SparseGPT equal their definitions, step by step and from scratch."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import attrs
import pytest
import reference
import torch
from hessian_cases import EITHER, EVERY, GRAM, check_removals, close, collected, in_turns, linears, loops, made, param, underdetermined
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import normal, seeds, shares_memory
from torch import Tensor, nn

import blockprune as bp
from blockprune import collect, metric, native, statistics
from blockprune.core.types import Param
from blockprune.metric import optimal_brain_surgeon
from blockprune.statistics import Statistic

SCORED: dict[str, Callable[..., Any]] = {
    "obs": metric.obs,
    "sparsegpt": lambda data, **options: metric.sparsegpt(data, sparsity=0.5, **options),
}
SCORES = pytest.mark.parametrize("score", SCORED.values(), ids=SCORED)


# Band-exact OBS.


@EITHER
@given(linears(), st.sampled_from([0.01, 0.1, 1.0]))
def test_each_removal_is_the_least_harmful_and_the_score_is_what_it_adds(compiled: bool, p: Param, damping: float) -> None:
    with loops(compiled):
        check_removals(p, metric.obs({"w": p}, damping=damping)["w"], damping)


@EITHER
@EVERY
def test_each_removal_is_the_least_harmful_in_every_kind_of_layer(kind: str, block: tuple[int, ...], compiled: bool) -> None:
    _, _, name, data = collected(kind, block)
    with loops(compiled):
        score = metric.obs(data)[name]
    bands = {"in_proj": 3, "grouped": 2, "depthwise": 3}.get(kind, 1)
    p = data[name]
    if p.grid.blocks > 40:  # a few bands of each group are enough
        tall = p.grid.block[0]
        keep = [i for g in range(bands) for i in range(g * len(p.weight) // bands, g * len(p.weight) // bands + tall)]
        p = Param(p.weight[keep], bp.BlockGrid((len(keep), *p.grid.shape[1:]), p.grid.block), p.stats)
        rows = [i // tall for i in keep[::tall]]
        score = bp.BlockScore(score.value[rows], p.grid)
    check_removals(p, score, 0.01)


@pytest.mark.parametrize("kind", ["grouped", "depthwise", "in_proj"])
@pytest.mark.parametrize("whole", [False, True])
def test_blocks_that_span_groups_are_refused_by_name(kind: str, whole: bool) -> None:
    _, _, name, data = collected(kind, (-1 if whole else {"grouped": 4, "depthwise": 3, "in_proj": 3}[kind], 1))
    p = data[name]
    for score in (metric.obs, lambda d: metric.sparsegpt(d, sparsity=0.5)):
        with pytest.raises(NotImplementedError) as caught:
            score(data)
        for part in (name, str(p.grid.shape), f"{p.grid.block[0]} rows", f"divides {len(p.weight) // len(p.stats['input_gram'])}"):
            assert part in str(caught.value), part


@EITHER
@given(linears(), st.integers(1, 5), st.sampled_from([0.5, 1.0]))
def test_bands_that_ranks_share_have_the_scores_of_all_bands(compiled: bool, p: Param, ranks: int, stop_at: float) -> None:
    with loops(compiled):
        found, expected = (metric.obs({"w": p}, stop_at=stop_at, **share)["w"].value for share in ({"share": in_turns(ranks)}, {}))
    close(found, expected, rtol=1e-9)


@given(linears(side=9), st.sampled_from([0, 1, 1000, 10_000, 1 << 30]), st.sampled_from([torch.float32, torch.float64]))
def test_the_compiled_loop_equals_torch_with_any_memory(p: Param, memory: int, dtype: torch.dtype) -> None:
    p = attrs.evolve(p, weight=p.weight.to(dtype), stats={"input_gram": p.stats["input_gram"].to(dtype)})
    found = {}
    for compiled in (True, False):
        with loops(compiled):
            found[compiled] = metric.obs({"w": p}, memory=memory, damping=0.1)["w"]
    scale = float(found[True].value.amax())
    ordered = [found[c].value.flatten(1).sort(1).values for c in (True, False)]  # ties may fall either way
    close(*ordered, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=(1e-5 if dtype == torch.float32 else 1e-9) * scale)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [(2, 1), (3, 2), (4, 4), (1, 5), (8, 16), (2, 7)])
def test_the_compiled_loop_equals_torch_where_its_rows_are_longer_than_vectors(
    block: tuple[int, int], dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    p = param(normal((8, 83), 0).to(dtype), normal((300, 83), 1).to(dtype), block)
    found = []
    for compiled, most in itertools.product((True, False), (1.0, 0.6)):
        with loops(compiled):
            found.append(metric.obs({"w": p}, damping=0.1, stop_at=most)["w"].value)
    for got, expected in ((found[0], found[2]), (found[1], found[3])):
        close(got, expected, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=0)
    if dtype == torch.float64 and block == (8, 16):
        check_removals(p, bp.BlockScore(found[0], p.grid), 0.1)


@pytest.mark.parametrize("block", [(1, 1), (5, 1), (1, 4), (3, 5), (4, 4), (2, 11), (16, 16), (2, 40)])
@settings(max_examples=4)
@given(inputs=st.integers(100, 210), most=st.sampled_from([0.3, 0.9, 1.0]), seed=seeds)
def test_the_compiled_loop_equals_torch_where_many_removals_wait_and_gaps_close(
    block: tuple[int, int], inputs: int, most: float, seed: int
) -> None:
    p = param(normal((2 * block[0], inputs), seed), normal((2 * inputs, inputs), seed + 1), block)
    found = []
    for compiled in (True, False):
        with loops(compiled):
            found.append(metric.obs({"w": p}, damping=0.1, stop_at=most)["w"].value)
    close(*found, rtol=1e-8, atol=0)


@SCORES
def test_a_weight_that_is_a_view_or_trained_scores_as_a_plain_one(score: Any) -> None:
    p = param(normal((4, 6), 0), normal((20, 6), 1), (2, 2))
    view = attrs.evolve(p, weight=p.weight.mT.contiguous().mT)
    trained = attrs.evolve(p, weight=nn.Parameter(p.weight.clone()))
    for other in (view, trained):
        got = score({"w": other})["w"].value
        close(got, score({"w": p})["w"].value)
        assert not got.requires_grad


def test_the_compiled_loop_takes_what_obs_gives_it() -> None:
    if native._library is None:
        pytest.skip(native.status)
    for kind, block in (("linear", (2, 3)), ("conv2d", (2, 2, 2, 2)), ("in_proj", (2, 3))):
        data = collected(kind, block)[-1]
        with mock.patch.object(native, "obs_sweep", wraps=native.obs_sweep) as called:
            metric.obs(data)
        (given, _) = called.call_args
        assert native.obs_sweep(*given) is not None


# Order.


def per_band(keep: Tensor) -> Tensor:
    return keep.flatten(1)


@pytest.mark.filterwarnings("ignore:.* a row is a single block")  # as in some of the drawn layers
@EITHER
@given(linears(), st.lists(st.floats(0, 1), min_size=2, max_size=4), st.sampled_from(["per_row", "per_layer", "per_model"]))
def test_masks_of_rising_sparsity_nest_and_are_prefixes_of_each_bands_order(
    compiled: bool, p: Param, sparsities: list[float], allocate: str
) -> None:
    with loops(compiled):
        scores = metric.obs({"w": p})
    order = scores["w"].value.flatten(1).argsort(1)
    before = torch.ones(p.grid.size, dtype=torch.bool)
    for sparsity in sorted(sparsities):
        keep = getattr(bp.allocate, allocate)(scores, sparsity)["w"].keep
        assert not (keep & ~before).any()
        in_order = per_band(keep).gather(1, order)
        assert torch.equal(in_order, in_order.sort(dim=1, stable=True).values), "pruned ones come first"
        before = keep


@EITHER
@pytest.mark.parametrize(("kind", "block"), [("linear", (2, 3)), ("linear", (1, 1)), ("conv2d", (2, 2, 2, 2)), ("conv1d", (1, 2, 2))])
def test_an_early_stop_gives_the_same_masks_up_to_that_sparsity(kind: str, block: tuple[int, ...], compiled: bool) -> None:
    data = collected(kind, block)[-1]
    with loops(compiled):
        scores = metric.obs(data)
        for most in (0.0, 0.2, 0.4, 0.5, 0.7, 1.0):
            stopped = metric.obs(data, stop_at=most)
            for sparsity in (0.0, most / 3, most / 2, most):
                assert bp.allocate.per_row(stopped, sparsity) == bp.allocate.per_row(scores, sparsity), (most, sparsity)


@pytest.mark.filterwarnings("ignore:.* a row is a single block")  # as in some of the drawn layers
@EITHER
@given(linears(), st.floats(0, 1), seeds)
def test_an_early_stop_of_any_layer_gives_the_same_masks_and_finite_rising_scores(compiled: bool, p: Param, most: float, seed: int) -> None:
    with loops(compiled):
        scores, stopped = metric.obs({"w": p}), metric.obs({"w": p}, stop_at=most)
    assert bp.allocate.per_row(stopped, most) == bp.allocate.per_row(scores, most)
    assert stopped["w"].value.isfinite().all()
    assert all(len(set(band)) == len(band) for band in stopped["w"].value.flatten(1).tolist())


def test_kernels_of_many_ragged_parts_stop_late_enough() -> None:
    layer = nn.Conv2d(1, 2, 5).double()  # 9 parts of a kernel: 4 of 4 taps, 4 of 2, 1 of 1
    with torch.no_grad():
        layer.weight.copy_(normal((2, 1, 5, 5), 0))
        layer.weight[..., 4] *= 0.01
        layer.weight[..., 4, :] *= 0.01
    data = collect.with_statistics(layer, where=bp.convs((1, 1, 2, 2)), statistics=[GRAM], batches=[normal((8, 1, 9, 9), 1)])
    scores = metric.obs(data)
    for i in range(26):
        assert bp.allocate.per_row(metric.obs(data, stop_at=i / 25), i / 25) == bp.allocate.per_row(scores, i / 25)


@EITHER
def test_what_an_early_stop_leaves_ranks_by_what_each_block_alone_would_add(compiled: bool) -> None:
    p = collected("linear", (2, 2))[-1]["weight"]
    with loops(compiled):
        score = metric.obs({"w": p}, stop_at=0.0)["w"]
    (hessian,) = reference.hessians(p, 0.01)
    for i, band in enumerate(reference.bands(p)):
        alone = reference.removals(p.weight.flatten(1)[band.at], hessian, band.blocks, [])
        assert score.value[i].argsort().tolist() == sorted(range(4), key=lambda j, alone=alone: alone[j])


# Weighed by the loss.


def loss(output: Tensor, batch: Any) -> Tensor:
    return (output.square() + output.exp()).sum(-1).mean()


@EITHER
@given(linears(), seeds)
def test_output_grad_sq_is_obs_of_rows_times_its_root(compiled: bool, p: Param, seed: int) -> None:
    g = normal((len(p.weight), 1), seed).square() + 0.1
    with loops(compiled):
        weighed = metric.obs({"w": attrs.evolve(p, stats={**p.stats, "output_grad_sq": g})})["w"]
        scaled = metric.obs({"w": attrs.evolve(p, weight=p.weight * g.sqrt())})["w"]
    close(weighed.value.flatten(1).sort(1).values, scaled.value.flatten(1).sort(1).values, atol=1e-9 * float(scaled.value.amax()) + 1e-12)


@EITHER
@pytest.mark.parametrize("stat", [statistics.output_grad_sq, statistics.output_grad_gram], ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("kind", "block"), [("linear", (2, 3)), ("linear", (1, 2)), ("linear", (-1, 2)), ("conv1d", (3, 2)), ("grouped", (3, 1))]
)
def test_weighed_by_the_loss_each_removal_is_the_least_harmful(kind: str, block: Any, stat: Statistic, compiled: bool) -> None:
    model, x = made(kind)
    data = collect.with_statistics(model, where=bp.named("weight", block), statistics=[GRAM, stat], batches=[x], loss=loss)
    with loops(compiled):
        check_removals(data["weight"], metric.obs(data)["weight"], 0.01)


def test_a_gram_of_gradients_without_full_rank_is_fine() -> None:
    p = collected("linear", (5, 2))[-1]["weight"]
    g = normal((1, 5), 0)
    weighed = attrs.evolve(p, stats={**p.stats, "output_grad_gram": (g.mT @ g)[None]})
    check_removals(weighed, metric.obs({"w": weighed})["w"], 0.01)
    alone = param(g @ p.weight, torch.ones(1, 7).double(), (1, 2))  # one output that is all of the loss
    alone = attrs.evolve(alone, stats={"input_gram": p.stats["input_gram"]})
    close(metric.obs({"w": weighed})["w"].value * 5, metric.obs({"w": alone})["w"].value)


class Weighed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("block", [(2, 2), (1, 1), (-1, 1), (3,)])
def test_output_grad_gram_is_the_moments_of_explicit_gradients_within_each_row_of_blocks(block: Any, tokens: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Weighed().double()
    batches: list[dict[str, Tensor]] = [{"x": normal((2, 4, 3), i)} for i in range(3)]
    if tokens:
        batches = [{**b, "attention_mask": (normal((2, 4), i) > 0).long()} for i, b in enumerate(batches)]
    stats = [statistics.output_grad_gram, statistics.output_grad_sq]
    data = collect.with_statistics(model, where=bp.linears(block), statistics=stats, batches=batches, loss=loss)
    for name, layer in {"a.weight": model.a, "b.weight": model.b}.items():
        grid = data[name].grid
        sums = torch.zeros(grid.shape[0], grid.shape[0]).double()
        for batch in batches:
            outputs: list[Tensor] = []
            handle = layer.register_forward_hook(lambda _module, _args, out, outputs=outputs: outputs.append(out))
            (g,) = torch.autograd.grad(loss(model(**batch), batch), outputs)
            handle.remove()
            for i, j in itertools.product(range(2), range(4)):
                weight = float(batch["attention_mask"][i, j]) if tokens else 1.0
                sums += weight * torch.outer(g[i, j], g[i, j])
        got, tall = data[name].stats["output_grad_gram"], grid.block[0]
        assert got.shape == (grid.size[0], tall, tall)
        for band in range(grid.size[0]):
            expected = torch.zeros(tall, tall).double()
            here = sums[band * tall : (band + 1) * tall, band * tall : (band + 1) * tall]
            expected[: len(here), : len(here)] = here  # rows beyond a ragged edge: 0
            close(got[band], expected, atol=1e-14)
        close(data[name].stats["output_grad_sq"].flatten(), sums.diagonal())


class Maps(nn.Module):
    """Two convolutions of the same weights, one on a map four times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Conv1d(2, 4, 1, bias=False), nn.Conv1d(2, 4, 1, bias=False)
        self.large.weight.data.copy_(self.small.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.small(x), self.large(x.repeat(1, 1, 4))], 2)


@pytest.mark.parametrize("stat", [statistics.output_grad_sq, statistics.output_grad_gram], ids=lambda s: s.name)
def test_a_layer_that_meets_more_rows_costs_as_much_more(stat: Statistic) -> None:
    """The loss adds up over positions, so what the same blocks cost does, too; an expert that few tokens choose costs little."""
    x = normal((5, 2, 3), 0)
    data = collect.with_statistics(
        Maps().double(), where=bp.convs((2, 1)), statistics=[GRAM, stat], batches=[x], loss=lambda y, _: y.square().sum()
    )
    scores = metric.obs(data)
    close(scores["large.weight"].value, 4 * scores["small.weight"].value)


@pytest.mark.parametrize("make", [lambda: nn.ConvTranspose1d(2, 3, 2), lambda: nn.Embedding(5, 3)])
def test_output_grad_gram_and_bias_of_what_has_outputs_along_axis_1_are_refused(make: Callable[[], nn.Module]) -> None:
    for stat in (statistics.output_grad_gram, statistics.bias):
        with pytest.raises(NotImplementedError, match=rf"weight \(.*\): {stat.name} needs a .*weight.* outputs lie along axis 0"):
            collect.with_statistics(make(), where=bp.named("weight", (1,)), statistics=[stat], batches=[torch.zeros(1, 2, 4)], loss=loss)


# SparseGPT.


@given(linears(), st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]), st.integers(1, 8))
def test_sparsegpt_is_the_papers_loop_with_every_inverse_anew(p: Param, sparsity: float, columns_per_step: int) -> None:
    p = attrs.evolve(p, weight=p.weight + 0.1 * normal(p.grid.shape, 77))  # no ties
    got = metric.sparsegpt({"w": p}, sparsity=sparsity, columns_per_step=columns_per_step, damping=0.1)["w"].value
    close(got, reference.sparsegpt(p, sparsity, columns_per_step, 0.1), atol=1e-9)


@EVERY
def test_sparsegpt_of_every_kind_of_layer(kind: str, block: tuple[int, ...]) -> None:
    _, _, name, data = collected(kind, block)
    got = metric.sparsegpt(data, sparsity=0.5, columns_per_step=4)[name].value
    close(got, reference.sparsegpt(data[name], 0.5, 4, 0.01), atol=1e-8)


def test_sparsegpts_own_masks_are_those_of_per_bank() -> None:
    p = param(normal((6, 12), 0), normal((40, 12), 1), (2, 2))
    scores = metric.sparsegpt({"w": p}, sparsity=0.5, columns_per_step=4)
    keep = bp.allocate.per_bank(scores, 0.5, bank=(-1, 2))["w"].keep
    assert keep.sum() == keep.numel() // 2
    assert (keep.unflatten(1, (3, 2)).sum((0, 2)) == 3).all()


@EVERY
def test_the_masks_of_sparsegpts_pass_are_those_of_per_columns(kind: str, block: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, name, data = collected(kind, block)
    if data[name].grid.ragged:
        pytest.skip("the pass counts blocks, per_columns elements")
    lowest, removed = optimal_brain_surgeon._lowest, []
    monkeypatch.setattr(optimal_brain_surgeon, "_lowest", lambda *args: removed.append(lowest(*args)) or removed[-1])
    for columns in (1, 3, 8, 100):
        removed.clear()
        scores = metric.sparsegpt(data, sparsity=0.4, columns_per_step=columns)  # 0.4 of no number is halfway between two numbers
        keep = bp.allocate.per_columns(scores, 0.4, columns=columns)[name].keep
        assert torch.equal(~keep.flatten(1), torch.cat(removed, 1)), columns


def test_sparsegpt_takes_a_sparsity_by_name_or_pattern() -> None:
    data = {n: param(normal((6, 12), i), normal((40, 12), 9), (2, 2)) for i, n in enumerate(("a.weight", "b.0.weight", "b.1.weight"))}
    by_name = {"b.*": 0.25, "b.1.weight": 0.5, "*": 0.75}
    scores = metric.sparsegpt(data, sparsity=by_name, columns_per_step=4)
    for name, share in (("a.weight", 0.75), ("b.0.weight", 0.25), ("b.1.weight", 0.5)):
        assert scores[name] == metric.sparsegpt({name: data[name]}, sparsity=share, columns_per_step=4)[name]
    assert scores["a.weight"] != metric.sparsegpt(data, sparsity=0.25, columns_per_step=4)["a.weight"]
    prune = bp.Pipeline(lambda model: data, partial(metric.sparsegpt, columns_per_step=4), bp.allocate.per_layer)
    assert prune.scores(nn.Linear(1, 1), by_name) == scores


@pytest.mark.parametrize(
    ("sparsity", "error", "says"),
    [
        ({"a.weight": 0.5}, KeyError, "sparsity has no key for 'b.weight'"),
        ({"a.weight": 0.5, "*": 1.5}, ValueError, r"sparsity\['\*'\]=1\.5 must be from 0"),
        ({"c.*": 0.5, "*": 0.5}, KeyError, r"sparsity has a key 'c\.\*' that matches no parameter"),
    ],
)
def test_a_mapping_of_sparsities_for_sparsegpt_names_every_parameter(sparsity: Any, error: type[Exception], says: str) -> None:
    data = dict.fromkeys(("a.weight", "b.weight"), param(normal((4, 6), 0), normal((20, 6), 1), (2, 2)))
    with pytest.raises(error, match=says):
        metric.sparsegpt(data, sparsity=sparsity)


# Numerics.


@SCORES
@given(st.integers(1, 4), st.integers(8, 12), seeds, st.sampled_from([torch.float32, torch.float64]))
def test_a_singular_hessian_without_damping_warns_with_the_name_and_what_was_used(
    score: Any, n: int, k: int, seed: int, dtype: torch.dtype
) -> None:
    with pytest.warns(UserWarning, match="damping") as caught:
        value = score({"fc.weight": underdetermined(n, k, seed, dtype)}, damping=0)["fc.weight"].value
    assert value.isfinite().all()
    text = str(caught[0].message)
    assert all(part in text for part in (f"fc.weight (4, {k})", f"singular in {str(dtype)[6:]}", "damping=0;", "0.0001 was used")), text


@EITHER
@pytest.mark.filterwarnings("ignore:.*(singular|lost precision)")
@example((3, 4), 229879, 0.0, False)  # definite in float32, not in float64
@given(st.tuples(st.integers(1, 8), st.integers(2, 16)), seeds, st.sampled_from([0.0, 1e-13, 1e-10, 1e-8, 1e-7, 1e-6, 1e-4]), st.booleans())
def test_any_condition_gives_finite_scores_that_rise_to_the_whole_error(
    compiled: bool, samples_and_inputs: tuple[int, int], seed: int, damping: float, double: bool
) -> None:
    p = underdetermined(*samples_and_inputs, seed, torch.float64 if double else torch.float32, block=(2, 1))
    with loops(compiled):
        score = metric.obs({"w": p}, damping=damping)["w"].value
        pruned = metric.sparsegpt({"w": p}, damping=damping, sparsity=0.5)["w"].value
    assert score.isfinite().all()
    assert pruned.isfinite().all()
    assert len({float(v) for v in score.flatten()}) > 1 or score.numel() <= 2, "not the identity's"
    rows, h = p.weight.double(), reference.hessians(p, damping)[0]
    whole = torch.stack([(rows[2 * i : 2 * i + 2] @ h @ rows[2 * i : 2 * i + 2].mT).trace() for i in range(2)])
    lost = (1e-6 if damping in (0.0, 1e-4) else 0.3) if double else 0.03  # a condition of 1 / eps leaves a digit
    assert (score.sum(1) * 2 >= whole * (1 - lost)).all(), "the increments, made to rise, add up to at least the error of nothing"


@EITHER
def test_dead_inputs_cost_nothing_and_fall_first(compiled: bool) -> None:
    x = normal((30, 8), 0)
    x[:, 4:6] = 0
    p = param(normal((4, 8), 1), x, (2, 2))
    with loops(compiled):
        value = metric.obs({"w": p}, damping=1e-4)["w"].value
    assert value.isfinite().all()
    assert value.argmin(1).tolist() == [2, 2]
    assert (value[:, 2] < 0.01 * value.sort(1).values[:, 1]).all(), "only damping holds them"


@SCORES
def test_inputs_that_are_all_zero_or_nan_are_an_error_with_the_name(score: Any) -> None:
    dead = param(torch.ones(2, 3), torch.zeros(4, 3), (1, 1))
    with pytest.raises(ValueError, match=r"fc\.weight \(2, 3\): its inputs are all zero.*excluding"):
        score({"fc.weight": dead})
    for at in ((0, 0), (0, 1)):
        gram = torch.eye(3)
        gram[at] = float("nan")
        with pytest.raises(ValueError, match=r"fc\.weight \(2, 3\): its input_gram has NaN or inf"):
            score({"fc.weight": attrs.evolve(dead, stats={"input_gram": gram[None]})})


def test_a_gram_that_no_damping_saves_is_an_error_with_the_name() -> None:
    p = attrs.evolve(
        param(torch.ones(2, 3), torch.ones(1, 3), (1, 1)), stats={"input_gram": torch.tensor([[[1.0, 9, 0], [9, 1, 0], [0, 0, 1]]])}
    )
    with pytest.raises(ValueError, match=r"w \(2, 3\): .* not positive definite with damping=0\.001, nor with 1;"):
        metric.obs({"w": p}, damping=0.001)


def test_a_group_of_dead_inputs_among_live_ones_is_scored() -> None:
    _, _, name, data = collected("grouped", (3, 1))
    gram = data[name].stats["input_gram"].clone()
    gram[0] = 0
    value = metric.obs({name: attrs.evolve(data[name], stats={"input_gram": gram})})[name].value
    assert value.isfinite().all()


@SCORES
@EITHER
def test_float32_is_close_to_float64_on_well_conditioned_data(compiled: bool, score: Any) -> None:
    single = param(normal((6, 24), 0).float(), normal((200, 24), 1).float(), (2, 2))
    double = param(normal((6, 24), 0), normal((200, 24), 1), (2, 2))
    with loops(compiled):
        got, expected = (score({"w": p})["w"].value for p in (single, double))
    assert got.dtype == torch.float32
    close(got, expected, rtol=1e-4, atol=1e-6)


@SCORES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_have_float32_scores(score: Any, dtype: torch.dtype) -> None:
    model = nn.Linear(8, 4).to(dtype)
    data = collect.with_statistics(model, where=bp.linears((2, 2)), statistics=[GRAM], batches=[normal((32, 8), 0)])
    value = score(data)["weight"].value
    assert value.dtype == torch.float32
    assert value.isfinite().all()


@SCORES
@pytest.mark.parametrize("damping", [1e-4, 3e-5])
def test_float32_is_close_to_float64_where_inputs_are_almost_alike(score: Any, damping: float) -> None:
    x = normal((500, 32), 1)
    x[:, 16:] = x[:, :16] + 3e-3 * x[:, 16:]
    x[:, :4] = 100 * x[:, :1]
    single = param(normal((8, 32), 0).float(), x.float(), (4, 4))
    double = attrs.evolve(single, weight=single.weight.double(), stats={"input_gram": single.stats["input_gram"].double()})
    got, expected = (score({"w": p}, damping=damping)["w"].value for p in (single, double))
    assert got.dtype == torch.float32
    close(got.sort(1).values, expected.sort(1).values, rtol=0.05, atol=0)


def test_lost_precision_is_done_again_in_float64_with_a_warning() -> None:
    p = param(normal((2, 6), 0).float(), normal((30, 6), 1).float(), (2, 2))
    expected = metric.obs({"w": p})["w"].value
    remove_blocks = optimal_brain_surgeon._remove_blocks

    def fails_in_float32(rows: Tensor, *args: Any, **options: Any) -> Any:
        if rows.dtype == torch.float32:
            raise torch.linalg.LinAlgError
        return remove_blocks(rows, *args, **options)

    with (
        mock.patch.object(optimal_brain_surgeon, "_remove_blocks", fails_in_float32),
        pytest.warns(UserWarning, match=r"w \(2, 6\): OBS lost precision in float32"),
    ):
        value = metric.obs({"w": p})["w"].value
    assert value.dtype == torch.float32
    close(value, expected, rtol=1e-4)


@EITHER
def test_an_inverse_that_is_not_definite_is_noticed_by_both_loops(compiled: bool) -> None:
    inverse = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64)
    options: dict[str, Any] = {"width": 1, "stop": 2, "memory": 1 << 20, "progress": False}
    with loops(compiled), pytest.raises(torch.linalg.LinAlgError):
        optimal_brain_surgeon._remove_blocks(torch.ones(1, 1, 2).double(), inverse, torch.zeros(1).long(), **options)


# Options, and purity.


@SCORES
def test_a_missing_statistic_is_named_with_code_that_collects_it(score: Any) -> None:
    data = collect.weights(nn.Linear(4, 2), where=bp.linears((1, 1)))
    name = "obs" if score is metric.obs else "sparsegpt"
    with pytest.raises(ValueError) as caught:
        score(data)
    for part in ("weight (2, 4)", f"metric.{name}", "'input_gram'", "the data has none", "statistics=[bp.statistics.input_gram]"):
        assert part in str(caught.value), part


@SCORES
@pytest.mark.parametrize("damping", [-0.1, -1e-9, float("nan")])
def test_a_damping_below_zero_is_an_error(score: Any, damping: float) -> None:
    with pytest.raises(ValueError, match=f"damping={damping}"):
        score(collected("linear", (1, 1))[-1], damping=damping)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_outside_0_to_1_are_errors(share: float) -> None:
    data = collected("linear", (1, 1))[-1]
    with pytest.raises(ValueError, match=f"stop_at={share} must be from 0"):
        metric.obs(data, stop_at=share)
    with pytest.raises(ValueError, match=f"sparsity={share} must be from 0"):
        metric.sparsegpt(data, sparsity=share)


@EITHER
@SCORES
@pytest.mark.parametrize("stat", [None, statistics.output_grad_sq, statistics.output_grad_gram])
@pytest.mark.parametrize("block", [(1, 1), (2, 3), (5, 7), (1, 7)])
def test_nothing_is_written_to_and_scores_share_no_memory(compiled: bool, score: Any, stat: Statistic | None, block: Any) -> None:
    model, x = made("linear")
    stats = [GRAM, *([stat] if stat else [])]
    data = collect.with_statistics(model, where=bp.linears(block), statistics=stats, batches=[x], loss=loss)
    p = data["weight"]
    before = [p.weight.clone(), *(s.clone() for s in p.stats.values())]
    with loops(compiled):
        value = score(data)["weight"].value
        again = score(data)["weight"].value
    assert torch.equal(value, again)
    assert all(torch.equal(a, b) for a, b in zip([p.weight, *p.stats.values()], before, strict=True))
    assert not shares_memory(value, p.weight, *p.stats.values())
    assert not value.requires_grad


@given(linears())
def test_scores_do_not_depend_on_the_scale_but_by_its_square(p: Param) -> None:
    scaled = attrs.evolve(p, weight=p.weight * 4)
    one, other = (metric.obs({"w": q})["w"].value for q in (p, scaled))
    close(other.flatten(1).sort(1).values, 16 * one.flatten(1).sort(1).values, atol=1e-300 + 1e-9 * float(one.abs().amax()))
    assert math.isfinite(float(one.sum()))


@pytest.mark.parametrize("largest", [2.3e38, 2.5e38, 3.4e38])
def test_the_largest_float32_weights_have_scores(largest: float) -> None:
    p = param(torch.tensor([[largest, 1e38]]), torch.eye(2) * 2**0.5, (1, 1))
    value = metric.obs({"w": p}, damping=1e-9)["w"].value.double()
    torch.testing.assert_close(value, p.weight.double().square(), rtol=1e-5, atol=0)
