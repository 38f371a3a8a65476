"""Penalties over blocks, their proximal maps and ADMM: formulas written out, and the problems that the maps claim to solve."""

import copy
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import grids, normal, seeds
from torch import Tensor, nn

import blockprune as bp
from blockprune.model.regularizers import Admm, admm, admm_penalty, group_lasso, proximal_group_lasso

ratios = st.sampled_from([0.0, 0.3, 1.0])


class One(nn.Module):
    """A model with one weight of any shape."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


def rule(grid: bp.BlockGrid) -> bp.Where:
    return bp.named("weight", grid.block)


def written_out(weight: Tensor, grid: bp.BlockGrid, ratio: float = 0.0) -> Tensor:
    parts = [weight[at].flatten() for _, at in reference.cells(grid)]
    group = sum(((part.square().sum() * part.numel()).sqrt() for part in parts), torch.zeros((), dtype=weight.dtype))
    return (1 - ratio) * group + ratio * weight.abs().sum()


@given(grids(), seeds, ratios)
def test_the_penalty_and_its_gradient_are_the_formula(grid: bp.BlockGrid, seed: int, ratio: float) -> None:
    model = One(normal(grid.shape, seed))
    penalty = group_lasso(model, where=rule(grid), l1_ratio=ratio)
    penalty.backward()
    twin = model.weight.detach().clone().requires_grad_()
    expected = written_out(twin, grid, ratio)
    expected.backward()
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(model.weight.grad, twin.grad)


def test_blocks_of_zeros_and_pruned_blocks_have_no_gradient() -> None:
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight[:, :2] = 0
    group_lasso(model, where=bp.linears((2, 2))).backward()
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad != 0, torch.tensor([[False, False, True, True]] * 2))
    model = nn.Linear(4, 2, bias=False)
    mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
    bp.apply_masks(model, {"weight": mask})
    expected = written_out(bp.finalize(model).weight.detach(), mask.grid)
    penalty = group_lasso(model, where=bp.linears((2, 2)))
    torch.testing.assert_close(penalty.detach(), expected)
    penalty.backward()
    assert not model.parametrizations.weight.original.grad[:, 2:].any()


def test_it_adds_up_over_parameters_and_counts_a_tied_one_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    total = group_lasso(model, where=bp.linears((2, 2)))
    grid = bp.BlockGrid((4, 4), (2, 2))
    torch.testing.assert_close(total, written_out(model[0].weight, grid) + written_out(model[1].weight, grid))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(group_lasso(model, where=bp.linears((2, 2))), total)
    assert group_lasso(model.bfloat16(), where=bp.linears((2, 2))).dtype == torch.float32


def test_slimming_is_the_l1_norm_of_batch_norm_scales() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.0, 3.0]))
    assert group_lasso(model, where=bp.batchnorms()).item() == 6 + 2
    proximal_group_lasso(model, where=bp.batchnorms(), strength=1.0)
    assert model[1].weight.tolist() == pytest.approx([0.0, -1.0, 0.0, 2.0])
    pruned = bp.allocate.per_model(bp.metric.batchnorm_scale(bp.collect.weights(model, where=bp.batchnorms())), 0.5)
    assert pruned["1.weight"].keep.tolist() == [False, True, False, True]


@given(grids(rank=(1, 3), side=4), seeds, st.sampled_from([0.0, 0.1, 0.5, 2.0]), ratios)
@settings(max_examples=60)
def test_the_proximal_map_is_the_minimum_of_its_convex_problem(grid: bp.BlockGrid, seed: int, strength: float, ratio: float) -> None:
    """No small step in any of many directions lowers the objective; a local minimum of a convex function is the minimum."""
    weight = normal(grid.shape, seed)
    v = proximal_group_lasso(One(weight), where=rule(grid), strength=strength, l1_ratio=ratio).weight.detach()

    def objective(x: Tensor) -> float:
        return float((x - weight).square().sum() / 2 + strength * written_out(x, grid, ratio))

    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(grid.shape, generator=generator, dtype=torch.float64) for _ in range(20)]
    directions += [weight, -weight, weight - v, v - weight]
    assert all(objective(v + size * d) >= objective(v) - 1e-12 for d in directions for size in (1e-1, 1e-3, 1e-5))


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_the_proximal_map_agrees_with_a_numeric_minimiser(ratio: float) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    grid = bp.BlockGrid((2, 3), (2, 2))  # a ragged block
    for seed, strength in ((0, 0.2), (1, 0.5), (2, 1.0)):
        weight = normal(grid.shape, seed)
        v = proximal_group_lasso(One(weight), where=rule(grid), strength=strength, l1_ratio=ratio).weight.detach()

        def objective(x: Any, weight: Tensor = weight, strength: float = strength) -> float:
            t = torch.tensor(x, dtype=torch.float64).view(2, 3)
            return float((t - weight).square().sum() / 2 + strength * written_out(t, grid, ratio))

        start = weight.flatten().numpy()
        options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 20000, "maxfev": 20000, "adaptive": True}
        best = optimize.minimize(objective, start, method="Nelder-Mead", options=options)
        assert objective(v.flatten().numpy()) <= best.fun + 1e-9
        torch.testing.assert_close(torch.tensor(best.x).view(2, 3), v, atol=1e-3, rtol=0)


def test_blocks_become_exactly_zero_and_masks_can_be_read_off() -> None:
    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight[:4, :4] *= 0.01
    assert proximal_group_lasso(model, where=bp.linears((4, 4)), strength=0.02) is model
    assert bp.masks_from_zeros(model, where=bp.linears((4, 4)))["weight"].keep.tolist() == [[False, True], [True, True]]


def test_stored_values_of_pruned_blocks_stay_whatever_the_blocks_of_the_rule() -> None:
    model = nn.Linear(4, 4, bias=False)
    mask = bp.BlockMask(torch.tensor([[True, False], [False, True]]), bp.BlockGrid((4, 4), (2, 2)))
    dense = model.weight.detach().clone()
    bp.apply_masks(model, {"weight": mask})
    plain = proximal_group_lasso(bp.finalize(model), where=bp.linears((4, 1)), strength=0.01)
    proximal_group_lasso(model, where=bp.linears((4, 1)), strength=0.01)
    kept = bp.expand(mask.keep, mask.grid)
    torch.testing.assert_close(bp.finalize(model).weight, plain.weight)
    assert torch.equal(model.parametrizations.weight.original[~kept], dense[~kept])


def test_proximal_gradient_descent_solves_the_group_lasso() -> None:
    """On an orthonormal design the solution is known: the proximal map of the least-squares weights."""
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(32, 8, dtype=torch.float64)).Q
    y = torch.randn(32, 4, dtype=torch.float64)
    model, where = nn.Linear(8, 4, bias=False, dtype=torch.float64), bp.linears((2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        ((model(x) - y).square().sum() / 2).backward()
        optimizer.step()
        proximal_group_lasso(model, where=where, strength=0.5 * 0.8)
    expected = proximal_group_lasso(One(y.T @ x), where=bp.named("weight", (2, 2)), strength=0.8).weight
    torch.testing.assert_close(model.weight, expected)
    assert 0 < (model.weight == 0).sum() < 32


def largest(sparsity: float) -> Callable[[bp.Data], bp.Masks]:
    return lambda data: bp.allocate.per_layer(bp.metric.l2(data), sparsity)


def test_admm_projects_weights_and_duals_and_counts_their_difference() -> None:
    model, where = nn.Linear(6, 4), bp.linears((2, 2))
    before = copy.deepcopy(model)
    first = admm(model, where=where, prune=largest(0.5))
    assert first.masks == largest(0.5)(bp.collect.weights(model, where=where))
    second = admm(model, where=where, prune=largest(0.5), previous=first)
    for state, duals in ((first, torch.zeros(4, 6)), (second, first.duals["weight"])):
        total = model.weight.detach() + duals
        mask = state.masks["weight"]
        assert torch.equal(state.targets["weight"], reference.masked(total, mask.keep, mask.grid))
        assert torch.equal(state.duals["weight"], total - state.targets["weight"])
    gap = model.weight - second.targets["weight"] + second.duals["weight"]
    torch.testing.assert_close(admm_penalty(model, second, rho=0.3), 0.15 * gap.square().sum())
    assert torch.equal(model.weight, before.weight)


def test_admm_moves_the_weights_onto_their_projection() -> None:
    """Of ``1/2 ||W - A||^2`` the best weights with half of the blocks are A with the weakest blocks set to zero."""
    torch.manual_seed(0)
    target, where = torch.randn(4, 8), bp.linears((2, 2))
    model, state = nn.Linear(8, 4, bias=False), None
    with torch.no_grad():
        model.weight.copy_(target)  # a trained model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for step in range(600):
        if step % 15 == 0:
            state = admm(model, where=where, prune=largest(0.5), previous=state)
        optimizer.zero_grad()
        assert state is not None
        ((model.weight - target).square().sum() / 2 + admm_penalty(model, state, rho=1.5)).backward()
        optimizer.step()
    best = largest(0.5)({"weight": bp.Param(target, bp.BlockGrid((4, 8), (2, 2)))})["weight"]
    assert state is not None
    assert state.masks["weight"] == best
    torch.testing.assert_close(model.weight.detach(), reference.masked(target, best.keep, best.grid), atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "1"])
def test_strengths_and_ratios_outside_their_range_are_errors(value: Any) -> None:
    model, where = nn.Linear(4, 4), bp.linears((2, 2))
    before = model.weight.detach().clone()
    error = TypeError if isinstance(value, str) else ValueError
    with pytest.raises(error, match="strength="):
        proximal_group_lasso(model, where=where, strength=value)
    with pytest.raises(error, match="rho="):
        admm_penalty(model, admm(model, where=where, prune=largest(0.5)), rho=value)
    for call in (group_lasso, lambda *args, **options: proximal_group_lasso(*args, strength=1.0, **options)):
        with pytest.raises(error, match="l1_ratio="):
            call(model, where=where, l1_ratio=value)
    assert torch.equal(model.weight, before)


def test_a_weight_that_is_computed_is_named_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"1\.weight \(4, 4\): another parametrization computes this weight"):
        proximal_group_lasso(model, where=bp.linears((2, 2)), strength=1.0)
    assert torch.equal(model[0].weight, before)
    assert group_lasso(model, where=bp.linears((2, 2))).isfinite()  # a penalty only reads


def test_admm_says_which_parameter_does_not_fit() -> None:
    model, where = nn.Linear(4, 4), bp.linears((2, 2))
    state = admm(model, where=where, prune=largest(0.5))
    with pytest.raises(KeyError, match="prune returned no mask of 'weight'"):
        admm(model, where=where, prune=lambda data: {})
    with pytest.raises(ValueError, match="weight: prune returned a mask of BlockGrid"):
        admm(model, where=bp.linears((1, 1)), prune=lambda data: state.masks)
    with pytest.raises(KeyError, match="previous lacks 'weight'"):
        admm(model, where=where, prune=largest(0.5), previous=Admm({}, {}, {}))
    with pytest.raises(KeyError, match="state names 'other'"):
        admm_penalty(model, attrs.evolve(state, targets={"other": torch.zeros(4, 4)}), rho=1.0)
    with pytest.raises(ValueError, match=r"weight \(4, 4\): the state has the shape \(2, 2\)"):
        admm_penalty(model, attrs.evolve(state, targets={"weight": torch.zeros(2, 2)}), rho=1.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_an_error_and_nothing_is_written(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[0, 0] = value
    before = copy.deepcopy(model.state_dict())
    where = bp.linears((2, 2))
    with pytest.raises(ValueError, match=r"1\.weight \(4, 4\).*NaN or inf"):
        proximal_group_lasso(model, where=where, strength=0.1)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    keep = torch.tensor([[False, True], [True, True]])  # what a mask prunes may be anything
    bp.apply_masks(model, {"1.weight": bp.BlockMask(keep, bp.BlockGrid((4, 4), (2, 2)))})
    assert proximal_group_lasso(model, where=where, strength=0.1)[1].weight.isfinite().all()


def project(data: bp.Data) -> dict[str, bp.BlockMask]:
    return dict(bp.allocate.per_layer(bp.metric.l2(data), 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_duals_of_half_precision_weights_add_up_in_float32(dtype: torch.dtype) -> None:
    """The twin: the same projections of the same values in float64."""
    half = One(normal((4, 6), 0).to(dtype))
    wide = One(half.weight.detach().double())
    states: list[Admm | None] = [None, None]
    for _ in range(40):
        for i, model in enumerate((half, wide)):
            states[i] = admm(model, where=bp.named("weight", (2, 2)), prune=project, previous=states[i])
    found, expected = states
    assert found is not None
    assert expected is not None
    assert found.masks == expected.masks
    for name in ("targets", "duals"):
        values = getattr(found, name)["weight"]
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), getattr(expected, name)["weight"])


def test_admm_names_a_state_of_another_shape_and_a_prune_without_masks() -> None:
    model = One(torch.ones(2, 4))
    small = {"weight": torch.ones(1, 1)}
    with pytest.raises(ValueError, match=r"weight \(2, 4\): previous has a dual of shape \(1, 1\)"):
        admm(model, where=bp.named("weight", (1, 2)), prune=project, previous=Admm({}, small, small))
    with pytest.raises(ValueError, match=r"weight \(2, 4\): the state has the shape \(1, 1\)"):
        admm_penalty(model, Admm({}, {"weight": torch.ones(2, 4)}, small), rho=1.0)
    with pytest.raises(TypeError, match=r"the result of prune is a int.*prune must return the masks of an allocator"):
        admm(model, where=bp.named("weight", (1, 2)), prune=lambda data: 3)  # type: ignore[arg-type, return-value]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at it where a graph ends
def test_a_compiled_step_may_contain_penalties() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    where, x = bp.linears((4, 4)), torch.randn(5, 8)
    bp.apply_masks(model, bp.recipes.magnitude(bp.linears((2, 2)))(model, 0.3).masks)
    bp.gates.add(model, where=where, gate=bp.gates.soft_movement(), initial=0.1)
    twin, state = copy.deepcopy(model), admm(model, where=where, prune=project)

    def step(module: nn.Module) -> Tensor:
        penalty = group_lasso(module, where=where) + admm_penalty(module, state, rho=1.0) + bp.gates.penalty(module, sparsity=0.5)
        return module(x).square().mean() + penalty  # type: ignore[no-any-return]

    loss = torch.compile(step, backend="aot_eager")(model)
    loss.backward()
    expected = step(twin)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
