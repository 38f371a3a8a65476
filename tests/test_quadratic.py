"""The damped Hessian and its table against numpy."""

import contextlib
import warnings
from typing import Any
from unittest import mock

import attrs
import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds
from test_obs import GRAM, close, collected, linears, param, wide
from torch import nn

import blockprune as bp
from blockprune import collect, metric, reconstruct, statistics
from blockprune.quadratic import quadratic, room
from blockprune.types import Param


@given(linears(), st.sampled_from([1e-6, 0.01, 1.0]))
def test_the_hessian_is_the_gram_and_a_share_of_its_diagonal(p: Param, damping: float) -> None:
    q = quadratic("w", p, damping=damping)
    expected = reference.hessians(p, damping)
    close(q.hessian, expected)
    close(q.inverse @ expected, torch.eye(p.grid.shape[1]).double()[None], atol=1e-6)
    close(q.goal, p.weight @ expected)
    assert torch.equal(q.best[0], p.weight)
    assert q.damping == damping


@given(linears(), seeds)
def test_the_goal_is_where_the_quadratic_is_least(p: Param, seed: int) -> None:
    """With another target (`input_cross`, `stream_cross`) the best weights solve the damped least squares towards it."""
    outputs, k = p.grid.shape
    x, target, ahead = normal((4 * k, k), seed), normal((4 * k, k), seed + 1), normal((4 * k, outputs), seed + 2)
    design = torch.cat([x, torch.ones(len(x), 1).double()], 1) / len(x)
    stats = {"input_gram": (x.mT @ x / len(x))[None], "input_cross": (target.mT @ design)[None], "stream_cross": ahead.mT @ design}
    q = quadratic("w", attrs.evolve(p, stats=stats), damping=0.1)
    ridge = (0.1 * stats["input_gram"][0].diagonal()).diag().sqrt()
    design = torch.cat([x / len(x) ** 0.5, ridge])
    aim = torch.cat([(target @ p.weight.mT + ahead) / len(x) ** 0.5, ridge @ p.weight.mT])
    close(q.best[0], torch.linalg.lstsq(design, aim).solution.mT, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*singular")
@given(st.integers(1, 20), st.integers(1, 8), seeds, st.integers(0, 3), st.sampled_from([1e-3, 0.01, 1.0]))
def test_conditioning_is_numpys_rank_and_condition(n: int, k: int, seed: int, dead: int, damping: float) -> None:
    x = normal((n, k), seed)
    x[:, : min(dead, k - 1)] = 0
    p = param(normal((3, k), seed), x, (1, 1))
    inputs, rank, unused, condition, used = bp.conditioning({"w": p}, damping=damping).rows["w"]
    gram = p.stats["input_gram"][0].numpy()
    assert (inputs, unused, used) == (k, min(dead, k - 1), damping)
    assert rank == np.linalg.matrix_rank(gram, hermitian=True) == min(n, k - unused)
    assert condition == pytest.approx(np.linalg.cond(reference.hessians(p, damping)[0].numpy()), rel=1e-6)


def test_conditioning_shows_the_worst_group_and_every_parameter() -> None:
    data = {**collected("grouped", (3, 1))[-1], "fc.weight": collected("linear", (1, 1))[-1]["weight"]}
    gram = data["weight"].stats["input_gram"].clone()
    gram[1, :3] = gram[1, :, :3] = 0
    data["weight"] = attrs.evolve(data["weight"], stats={"input_gram": gram})
    table = bp.conditioning(data)
    k = gram.shape[-1]
    assert list(table.rows) == ["weight", "fc.weight"]
    assert table.rows["weight"][:3] == (k, k - 3, 3)
    worst = max(np.linalg.cond(h.numpy()) for h in reference.hessians(data["weight"], 0.01))
    assert table.rows["weight"][3] == pytest.approx(worst)
    lines = repr(table).splitlines()
    assert [line.split()[0] for line in lines] == ["parameter", "weight", "fc.weight"]
    assert all(cell in table._repr_html_() for cell in (">parameter</th>", ">fc.weight</td>", ">0.01</td>"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conditioning_shows_the_damping_that_was_needed(dtype: torch.dtype) -> None:
    p = wide(3, 8, 0, dtype)
    with pytest.warns(UserWarning, match=rf"fc\.weight \(4, 8\): H is singular in {str(dtype)[6:]} with damping=0; 0\.0001 was used"):
        table = bp.conditioning({"fc.weight": p}, damping=0)
    assert table.rows["fc.weight"][:3] == (8, 3, 0)
    assert table.rows["fc.weight"][4] == pytest.approx(1e-4)


@given(st.integers(2, 64), seeds, st.sampled_from([torch.float32, torch.float64]))
def test_a_singular_hessian_never_passes_for_a_definite_one_by_rounding(k: int, seed: int, dtype: torch.dtype) -> None:
    p = wide(max(1, k // 2), k, seed, dtype)
    with pytest.warns(UserWarning, match="singular"):
        q = quadratic("w", p, damping=0.0)
    assert q.inverse.isfinite().all()


@given(st.integers(1, 64), seeds)
def test_the_usual_damping_never_warns(k: int, seed: int) -> None:
    """Also where a few inputs, all alike, outweigh the others by far."""
    x = normal((max(1, k // 3), k), seed).float()
    x[:, : max(1, k // 8)] = 100 * x[:, :1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quadratic("w", param(torch.ones(2, k), x, (1, 1)), damping=0.01)


def test_an_input_that_does_not_vary_is_held_above_rounding() -> None:
    """Where a bias absorbs the mean, what is left of a constant input is rounding of its power."""
    stats = {"input_gram": torch.diag(torch.tensor([1e6, 1.0]))[None], "input_mean": torch.tensor([[1000.0, 0]]), "bias": torch.zeros(3)}
    p = attrs.evolve(param(torch.ones(3, 2), torch.ones(1, 2), (1, 1)), stats=stats)
    close(quadratic("w", p, damping=0.01).hessian[0], torch.tensor([0.01 * 1e-5 * 1e6, 1.01]).diag(), rtol=1e-6)
    close(reference.hessians(p, 0.01)[0], torch.tensor([0.01 * 1e-5 * 1e6, 1.01]).diag(), rtol=1e-6)


def test_groups_of_dead_inputs_are_damped_as_the_others() -> None:
    p = collected("grouped", (3, 1))[-1]["weight"]
    gram = p.stats["input_gram"].clone()
    gram[0] = 0
    q = quadratic("w", attrs.evolve(p, stats={"input_gram": gram}), damping=0.1)
    close(q.hessian[0], 0.1 * gram[1].diagonal().min() * torch.eye(gram.shape[-1]))


def test_conditioning_without_its_statistic_says_so() -> None:
    data = collect.weights(nn.Linear(4, 2), where=bp.linears((1, 1)))
    with pytest.raises(ValueError, match=r"weight \(2, 4\): conditioning needs the statistic 'input_gram'; the data has none"):
        bp.conditioning(data)


@pytest.mark.parametrize("damping", [-1.0, float("nan")])
def test_a_damping_below_zero_is_an_error(damping: float) -> None:
    with pytest.raises(ValueError, match=f"damping={damping}"):
        bp.conditioning(collected("linear", (1, 1))[-1], damping=damping)


@pytest.mark.parametrize(("scale", "dtype"), [(1e-6, torch.float32), (1e6, torch.float32), (1e-30, torch.float64), (1e30, torch.float64)])
def test_the_scale_of_inputs_does_not_matter(scale: float, dtype: torch.dtype) -> None:
    weight, x = normal((4, 6), 0).to(dtype), normal((30, 6), 1).to(dtype)
    one, other = (bp.metric.obs({"w": param(weight, x * s, (2, 2))})["w"].value.double() for s in (1.0, scale))
    close(other / scale**2, one, rtol=1e-4)


@given(seeds, st.sampled_from([0.01, 0.2, 1.0]))
def test_the_unit_of_each_input_does_not_matter(seed: int, damping: float) -> None:
    """A massive activation among small ones neither holds the others nor lets them go: only what an input does to the outputs counts."""
    weight, x, unit = normal((4, 6), seed), normal((30, 6), seed + 1), 10.0 ** torch.arange(-3, 3).double()
    plain, other = {"w": param(weight, x, (2, 2))}, {"w": param(weight / unit, x * unit, (2, 2))}
    close(metric.obs(other, damping=damping)["w"].value, metric.obs(plain, damping=damping)["w"].value)
    masks = bp.allocate.per_row(metric.obs(plain, damping=damping), 0.34)
    got, expected = (reconstruct.least_squares(data, masks, damping=damping)["w"] for data in (other, plain))
    close(got * unit, expected)


def test_nothing_is_written_to() -> None:
    model = nn.Linear(6, 4).double()
    stats: list[Any] = [GRAM, statistics.input_mean, statistics.bias]
    p = collect.with_statistics(model, where=bp.linears((2, 2)), statistics=stats, batches=[normal((20, 6), 0) + 1])["weight"]
    before = {name: value.clone() for name, value in p.stats.items()}
    bp.conditioning({"weight": p})
    q = quadratic("weight", p, damping=0.1)
    assert q.means is not None
    close(q.means[0], (p.weight @ (normal((20, 6), 0) + 1).mean(0))[None])
    close(q.means[1], (normal((20, 6), 0) + 1).mean(0)[None])
    assert all(torch.equal(p.stats[name], value) for name, value in before.items())


def test_what_torch_holds_in_reserve_counts_as_free_on_a_gpu() -> None:
    gpu, found = torch.device("cuda", 0), {"mem_get_info": (8, 90), "memory_reserved": 40, "memory_allocated": 28}
    with contextlib.ExitStack() as stack:
        for name, value in found.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=value))
        assert room(gpu, None) == (8 + 40 - 28) // 4
        assert room(gpu, 3) == 3
