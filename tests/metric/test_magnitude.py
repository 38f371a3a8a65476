"""A score is a benefit per element: equal to its slow twin, and fair between blocks of any size."""

import copy
import math
from functools import partial

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import grids, integers, normal, params, seeds, shares_memory
from torch import Tensor, nn

import blockprune as bp
from blockprune import metric
from blockprune.core.types import Metric

NORMS = {
    "l1": metric.l1,
    "l2": metric.l2,
    "lp": partial(metric.lp, p=3),
    "half": partial(metric.lp, p=0.5),
    "max": partial(metric.lp, p=math.inf),
}
POWER = {"l1": 1, "l2": 2, "lp": 3, "half": 0.5, "max": math.inf}


def close(got: Tensor, expected: Tensor, weight: Tensor, *, atol: float = 0.0) -> None:
    """In float32 or wider, whatever the weight's dtype."""
    assert got.dtype == torch.promote_types(weight.dtype, torch.float32)
    torch.testing.assert_close(got.double(), expected.double(), rtol=2e-5, atol=atol)


def one(score: Metric, p: bp.Param) -> Tensor:
    (out,) = score({"w": p}).values()
    assert out.grid == p.grid
    return out.value


@pytest.mark.parametrize("norm", NORMS)
@given(p=params())
def test_norms_equal_their_twin(norm: str, p: bp.Param) -> None:
    close(one(NORMS[norm], p), reference.lp(p, POWER[norm]), p.weight)


@pytest.mark.parametrize("norm", NORMS)
@given(grid=grids(), value=st.floats(-100, 100, width=16))
def test_equal_elements_score_alike_in_blocks_of_every_size(norm: str, grid: bp.BlockGrid, value: float) -> None:
    score = one(NORMS[norm], bp.Param(torch.full(grid.shape, value), grid))
    torch.testing.assert_close(score, torch.full(grid.size, abs(value)))


@given(params(exact=True))
def test_lp_is_l1_at_1_and_l2_at_2(p: bp.Param) -> None:
    close(one(partial(metric.lp, p=1), p), one(metric.l1, p), p.weight)
    close(one(partial(metric.lp, p=2), p), one(metric.l2, p), p.weight)


def rows(draw: st.DrawFn, side: int) -> bp.Param:
    shape = draw(st.tuples(st.integers(1, side), st.integers(1, 6))) + draw(st.sampled_from([(), (2,), (3, 3)]))
    weight = draw(st.sampled_from([integers, normal]))(shape, draw(seeds))
    return bp.Param(
        weight.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))),
        bp.BlockGrid(shape, (draw(st.integers(1, shape[0])),)),
    )


@given(st.composite(rows)(40))
def test_fpgm_equals_its_twin(p: bp.Param) -> None:
    close(one(metric.fpgm, p), reference.fpgm(p), p.weight, atol=2e-3)  # torch.cdist multiplies matrices when there are many rows


def test_fpgm_in_chunks_equals_fpgm_at_once_and_replaceable_rows_score_low() -> None:
    p = bp.Param(normal((1500, 3), 0), bp.BlockGrid((1500, 3), (1,)))
    expected = torch.cdist(p.weight, p.weight).sum(1) / 1499 / math.sqrt(3)
    close(one(metric.fpgm, p), expected.view(-1, 1), p.weight, atol=1e-6)
    line = bp.Param(torch.tensor([[-9.0], [1.0], [0.0], [10.0], [-1.0]]), bp.BlockGrid((5, 1), (1,)))
    assert one(metric.fpgm, line).argmin() == 2
    flat = bp.Param(line.weight[:, 0], bp.BlockGrid((5,), (1,)))
    assert torch.equal(one(metric.fpgm, flat), one(metric.fpgm, line)[:, 0])


@given(params(exact=True))
def test_lamp_equals_its_twin(p: bp.Param) -> None:
    close(one(metric.lamp, p), reference.lamp(p), p.weight)


@given(params(exact=True))
def test_lamp_keeps_the_order_of_magnitudes_and_the_best_block_scores_its_share(p: bp.Param) -> None:
    magnitude, share = one(metric.l2, p).flatten(), one(metric.lamp, p).flatten()
    assert (share[magnitude.argsort(stable=True)].diff() >= 0).all() or p.grid.ragged
    last = int(magnitude.argsort(stable=True)[-1])
    expected = 1 / int(bp.block_elements(p.grid).flatten()[last]) if magnitude[last] > 0 else 0.0
    assert float(share[last]) == pytest.approx(expected)


@given(grids(), seeds)
def test_random_is_uniform_and_a_seed_or_generator_repeats_it(grid: bp.BlockGrid, seed: int) -> None:
    data = {"a": bp.Param(torch.zeros(grid.shape), grid), "b": bp.Param(torch.zeros(grid.shape), grid)}
    first = metric.random(data, generator=seed)
    assert first == metric.random(data, generator=seed)
    assert first == metric.random(data, generator=(rng := torch.Generator().manual_seed(seed)))
    assert first != metric.random(data, generator=rng)  # a generator is advanced
    assert all(((s.value >= 0) & (s.value < 1)).all() for s in first.values())
    assert not torch.equal(first["a"].value, first["b"].value)
    state = torch.get_rng_state()
    metric.random(data, generator=seed)
    assert torch.equal(torch.get_rng_state(), state)  # torch's global generator is left alone
    assert metric.random(data)["a"] != metric.random(data)["a"]


def test_batchnorm_scale_ranks_filters_by_gamma_whatever_the_axis() -> None:
    gamma = torch.tensor([0.5, -2.0, 1.0, -0.25])
    expected = torch.tensor([0.5, 2.0, 1.0, 0.25])
    conv = bp.Param(torch.randn(4, 3, 2, 2), bp.BlockGrid((4, 3, 2, 2), (1,)), {"batchnorm_scale": gamma.view(4, 1, 1, 1)})
    turned = bp.Param(torch.randn(3, 4, 2, 2), bp.BlockGrid((3, 4, 2, 2), (-1, 1)), {"batchnorm_scale": gamma.view(1, 4, 1, 1)})
    pairs = bp.Param(conv.weight, bp.BlockGrid((4, 3, 2, 2), (2,)), conv.stats)
    own = bp.Param(gamma, bp.BlockGrid((4,), (1,)))
    assert torch.equal(one(metric.batchnorm_scale, conv).flatten(), expected)
    assert torch.equal(one(metric.batchnorm_scale, turned).flatten(), expected)
    assert torch.equal(one(metric.batchnorm_scale, pairs).flatten(), torch.tensor([1.25, 0.625]))
    assert torch.equal(one(metric.batchnorm_scale, own), expected)


def scaled(block: tuple[int, ...], *, axis: int) -> bp.Param:
    """A convolution whose output channels, along this axis, have the factors 1 to 4."""
    scale = torch.arange(1.0, 5).view([4 if a == axis else 1 for a in range(3)])
    return bp.Param(torch.ones(4, 4, 2), bp.BlockGrid((4, 4, 2), block), {"batchnorm_scale": scale})


METRICS = {**NORMS, "lamp": metric.lamp, "fpgm": metric.fpgm, "random": metric.random}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("block", [(1,), (2,), (-1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_metric_writes_into_nothing_keeps_no_memory_and_is_finite(name: str, block: tuple, dtype: torch.dtype) -> None:
    weights = [torch.randn(5, 4).to(dtype), torch.zeros(5, 4, dtype=dtype), torch.randn(1, 1).to(dtype)]
    data = {str(i): bp.Param(w, bp.BlockGrid(w.shape, block[: 1 if w.shape[0] > 1 else 0])) for i, w in enumerate(weights)}
    before = copy.deepcopy(data)
    scores = METRICS[name](data)
    assert data == before
    assert list(scores) == list(data)
    assert all(s.value.isfinite().all() and s.value.dtype.itemsize >= 4 and not s.value.requires_grad for s in scores.values())
    assert not any(shares_memory(s.value, *weights) for s in scores.values())


@pytest.mark.parametrize("metric_", [metric.l1, metric.l2])
def test_a_score_of_single_elements_is_no_view_of_the_weight(metric_: Metric) -> None:
    weight = torch.rand(3, 3)
    score = one(metric_, bp.Param(weight, bp.BlockGrid((3, 3), (1, 1))))
    expected = score.clone()
    weight.zero_()
    assert torch.equal(score, expected)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (metric.fpgm, ["fc.weight", "whole rows", "block=(2, 2)", "(4, 6)", "(1,)"]),
        (metric.batchnorm_scale, ["fc.weight", "(4, 6)", "'batchnorm_scale'", "collect.batchnorm_scales"]),
        (lambda d: metric.batchnorm_scale({n: bp.Param(p.weight, p.grid, {"batchnorm_scale": torch.ones(4, 1)}) for n, p in d.items()}),
         ["fc.weight", "whole filters", "block=(2, 2)", "(4, 6)", "(1,)"]),
        (lambda d: metric.batchnorm_scale({"conv": scaled((-1, 1), axis=0)}), ["conv: ", "whole filters", "block=(4, 1, 2)", "use (1,)"]),
        (lambda d: metric.batchnorm_scale({"conv": scaled((1,), axis=1)}), ["conv: ", "whole filters", "block=(1, 4, 2)", "use (-1, 1)"]),
        (lambda d: metric.lp(d, p=0), ["p=0", "above 0", "p=1"]),
        (lambda d: metric.lp(d, p=-1.0), ["p=-1.0", "above 0"]),
        (lambda d: metric.lp(d, p=math.nan), ["p=nan", "above 0"]),
    ],
)  # fmt: skip
def test_a_metric_that_cannot_score_says_why(call: Metric, says: list[str]) -> None:
    data = {"fc.weight": bp.Param(torch.ones(4, 6), bp.BlockGrid((4, 6), (2, 2)))}
    before = copy.deepcopy(data)
    with pytest.raises(ValueError) as caught:
        call(data)
    assert not [part for part in says if part not in str(caught.value)]
    assert data == before


DATA_METRICS = {**METRICS, "batchnorm_scale": metric.batchnorm_scale, "wanda": metric.wanda, "obs": metric.obs, "fisher": metric.fisher}


@pytest.mark.parametrize("name", DATA_METRICS)
def test_a_metric_of_a_model_or_of_scores_says_that_it_takes_data(name: str) -> None:
    with pytest.raises(TypeError, match=r"data is a Linear, not a mapping from .*data = bp\.collect\.weights\(model, where="):
        DATA_METRICS[name](nn.Linear(4, 4))  # type: ignore[arg-type]
    scores = {"w": bp.BlockScore(torch.ones(4), bp.BlockGrid((4,), (1,)))}
    with pytest.raises(TypeError, match=r"data\['w'\] is a BlockScore, not a Param"):
        DATA_METRICS[name](scores)  # type: ignore[arg-type]
