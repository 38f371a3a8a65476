"""The damped Hessian of a layer and its quadratic error against their definitions."""

import contextlib
import warnings
from typing import Any
from unittest import mock

import attrs
import pytest
import reference
import torch
from hessian_cases import GRAM, close, collected, linears, param, underdetermined
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import nn

import blockprune as bp
from blockprune import collect, metric, reconstruct, statistics
from blockprune.core.hessian import inverse_of_factor, layer_quadratic, upper_factor, workspace_bytes
from blockprune.core.types import Param


@given(linears(), st.sampled_from([1e-6, 0.01, 1.0]))
def test_the_hessian_is_the_gram_and_a_share_of_its_diagonal(p: Param, damping: float) -> None:
    q = layer_quadratic("w", p, damping=damping)
    expected = reference.hessians(p, damping)
    close(q.hessian, expected)
    close(inverse_of_factor(q.cholesky.clone()) @ expected, torch.eye(p.grid.shape[1]).double()[None], atol=1e-6)
    close(q.target_product, p.weight @ expected)
    assert torch.equal(q.best[0], p.weight)
    assert q.damping == damping


@given(linears(), seeds)
def test_the_best_weight_minimizes_the_damped_error(p: Param, seed: int) -> None:
    """With the target of `input_cross` and `residual_cross` the best weight solves the damped least-squares problem."""
    outputs, k = p.grid.shape
    x, target, residual = normal((4 * k, k), seed), normal((4 * k, k), seed + 1), normal((4 * k, outputs), seed + 2)
    design = torch.cat([x, torch.ones(len(x), 1).double()], 1) / len(x)
    stats = {"input_gram": (x.mT @ x / len(x))[None], "input_cross": (target.mT @ design)[None], "residual_cross": residual.mT @ design}
    q = layer_quadratic("w", attrs.evolve(p, stats=stats), damping=0.1)
    ridge = (0.1 * stats["input_gram"][0].diagonal()).diag().sqrt()
    design = torch.cat([x / len(x) ** 0.5, ridge])
    target_outputs = torch.cat([(target @ p.weight.mT + residual) / len(x) ** 0.5, ridge @ p.weight.mT])
    close(q.best[0], torch.linalg.lstsq(design, target_outputs).solution.mT, atol=1e-8)


@given(st.integers(2, 64), seeds, st.sampled_from([torch.float32, torch.float64]))
def test_a_singular_hessian_never_passes_for_a_definite_one_by_rounding(k: int, seed: int, dtype: torch.dtype) -> None:
    p = underdetermined(max(1, k // 2), k, seed, dtype)
    with pytest.warns(UserWarning, match="singular"):
        q = layer_quadratic("w", p, damping=0.0)
    assert inverse_of_factor(q.cholesky).isfinite().all()


@given(st.integers(1, 64), seeds)
def test_the_usual_damping_never_warns(k: int, seed: int) -> None:
    """Also if a few equal inputs are far larger than the rest."""
    x = normal((max(1, k // 3), k), seed).float()
    x[:, : max(1, k // 8)] = 100 * x[:, :1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_quadratic("w", param(torch.ones(2, k), x, (1, 1)), damping=0.01)


def test_a_constant_input_is_damped_by_a_share_of_its_mean_square() -> None:
    """If a bias compensates for the mean, the variance of a constant input is only rounding error."""
    stats = {"input_gram": torch.diag(torch.tensor([1e6, 1.0]))[None], "input_mean": torch.tensor([[1000.0, 0]]), "bias": torch.zeros(3)}
    p = attrs.evolve(param(torch.ones(3, 2), torch.ones(1, 2), (1, 1)), stats=stats)
    close(layer_quadratic("w", p, damping=0.01).hessian[0], torch.tensor([0.01 * 1e-5 * 1e6, 1.01]).diag(), rtol=1e-6)
    close(reference.hessians(p, 0.01)[0], torch.tensor([0.01 * 1e-5 * 1e6, 1.01]).diag(), rtol=1e-6)


def test_groups_of_dead_inputs_are_damped_as_the_others() -> None:
    p = collected("grouped", (3, 1))[-1]["weight"]
    gram = p.stats["input_gram"].clone()
    gram[0] = 0
    q = layer_quadratic("w", attrs.evolve(p, stats={"input_gram": gram}), damping=0.1)
    close(q.hessian[0], 0.1 * gram[1].diagonal().min() * torch.eye(gram.shape[-1]))


@pytest.mark.parametrize("damping", [-1.0, float("nan")])
def test_a_negative_damping_is_an_error(damping: float) -> None:
    with pytest.raises(ValueError, match=f"damping={damping} must be a number from 0 on"):
        layer_quadratic("w", collected("linear", (1, 1))[-1]["weight"], damping=damping)


@pytest.mark.parametrize(("scale", "dtype"), [(1e-6, torch.float32), (1e6, torch.float32), (1e-30, torch.float64), (1e30, torch.float64)])
def test_the_scale_of_inputs_does_not_matter(scale: float, dtype: torch.dtype) -> None:
    weight, x = normal((4, 6), 0).to(dtype), normal((30, 6), 1).to(dtype)
    unscaled, scaled = (bp.metric.obs({"w": param(weight, x * s, (2, 2))})["w"].value.double() for s in (1.0, scale))
    close(scaled / scale**2, unscaled, rtol=1e-4)


@given(seeds, st.sampled_from([0.01, 0.2, 1.0]))
def test_the_unit_of_each_input_does_not_matter(seed: int, damping: float) -> None:
    """A massive activation does not change the damping of small ones: only the effect of an input on the outputs counts."""
    weight, x, unit = normal((4, 6), seed), normal((30, 6), seed + 1), 10.0 ** torch.arange(-3, 3).double()
    plain, scaled = {"w": param(weight, x, (2, 2))}, {"w": param(weight / unit, x * unit, (2, 2))}
    close(metric.obs(scaled, damping=damping)["w"].value, metric.obs(plain, damping=damping)["w"].value)
    masks = bp.allocate.per_row(metric.obs(plain, damping=damping), 0.34)
    repaired, expected = (reconstruct.least_squares(data, masks, damping=damping)["w"] for data in (scaled, plain))
    close(repaired * unit, expected)


def test_nothing_is_written_to() -> None:
    model = nn.Linear(6, 4).double()
    stats: list[Any] = [GRAM, statistics.input_mean, statistics.bias]
    p = collect.with_statistics(model, where=bp.linears((2, 2)), statistics=stats, batches=[normal((20, 6), 0) + 1])["weight"]
    before = {name: value.clone() for name, value in p.stats.items()}
    bp.conditioning({"weight": p})
    q = layer_quadratic("weight", p, damping=0.1)
    assert q.means is not None
    close(q.means[0], (p.weight @ (normal((20, 6), 0) + 1).mean(0))[None])
    close(q.means[1], (normal((20, 6), 0) + 1).mean(0)[None])
    assert all(torch.equal(p.stats[name], value) for name, value in before.items())


@given(st.integers(1, 3), st.integers(1, 40), seeds)
def test_the_inverse_and_its_upper_factor_are_written_over_the_factor(groups: int, k: int, seed: int) -> None:
    x = normal((groups, 3 * k, k), seed)
    factor = torch.linalg.cholesky(x.mT @ x)
    inverse = inverse_of_factor(factor)
    expected = inverse.clone()
    close(expected @ (x.mT @ x), torch.eye(k).double().expand(groups, k, k), atol=1e-6)
    upper = upper_factor(inverse)
    close(upper.mT @ upper, expected)
    assert torch.equal(upper, upper.triu())
    assert upper.data_ptr() == inverse.data_ptr() == factor.data_ptr()


def test_torchs_cache_counts_as_free_memory_on_a_gpu() -> None:
    gpu, memory = torch.device("cuda", 0), {"mem_get_info": (8, 90), "memory_reserved": 40, "memory_allocated": 28}
    with contextlib.ExitStack() as stack:
        for name, value in memory.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=value))
        assert workspace_bytes(gpu, None) == (8 + 40 - 28) // 4
        assert workspace_bytes(gpu, 3) == 3
