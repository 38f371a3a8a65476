"""Each score times the block's elements is the loss change it stands for, found by really zeroing or by finite differences."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

import blockprune as bp
from blockprune import collect, metric, statistics
from blockprune.core.types import Data, Metric, Scores
from blockprune.statistics import Statistic

BLOCK = (2, 2)
Gates = dict[str, Tensor]


class Tiny(nn.Module):
    """5 -> 4 -> 3, smooth, with ragged blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def seeded(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().double()


def loss(output: Tensor, batch: Any) -> Tensor:
    return (output.square() + output.exp()).sum(-1).mean()


def collected(model: nn.Module, batches: Any, *stats: Statistic, block: Any = BLOCK) -> Data:
    where = bp.first_of(*[rule(block) for rule in rules(model)])
    return collect.with_statistics(model, where=where, statistics=stats, batches=batches, loss=loss)


def rules(model: nn.Module) -> list[Any]:
    kinds = {bp.linears: nn.Linear, bp.convs: nn.modules.conv._ConvNd}
    return [rule for rule, kind in kinds.items() if any(isinstance(m, kind) for m in model.modules())]


def close(got: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=atol)


def total(scores: Scores, name: str) -> Tensor:
    """Benefits per element as totals of blocks."""
    return scores[name].value * reference.block_elements(scores[name].grid)


def loss_at(model: nn.Module, data: Data, gates: Gates, x: Tensor) -> Tensor:
    """The loss with the weights of each block times its gate."""
    weights = {name: p.weight * reference.expand(gates[name], p.grid) for name, p in data.items()}
    return loss(functional_call(model, weights, (x,)), x)


def open_gates(data: Data) -> Gates:
    return {name: torch.ones(p.grid.size, dtype=torch.float64) for name, p in data.items()}


def moved(data: Data, name: str, index: Any, by: float) -> Gates:
    gates = open_gates(data)
    gates[name][index] += by
    return gates


def everywhere(data: Data, name: str, found: Callable[[Any], Any]) -> Tensor:
    """``found(index)`` of every block."""
    return torch.tensor([float(found(index)) for index, _ in reference.cells(data[name].grid)]).double().view(data[name].grid.size)


def slope(model: nn.Module, data: Data, name: str, index: Any, x: Tensor, *, step: float = 1e-5) -> Tensor:
    up, down = (loss_at(model, data, moved(data, name, index, by), x) for by in (step, -step))
    return ((up - down) / (2 * step)).detach()


# Layers.


def mean_error(layer: nn.Module, grid: bp.BlockGrid, x: Tensor) -> Tensor:
    """The layer's mean squared output error (summed over outputs) when each block alone is zeroed."""
    weight, found = layer.weight.detach(), []
    channels = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
    y = layer(x).movedim(channels, -1)
    for _, at in reference.cells(grid):
        without = weight.clone()
        without[at] = 0
        error = functional_call(layer, {"weight": without}, (x,)).movedim(channels, -1) - y
        found.append(error.square().sum(-1).mean().detach())
    return torch.stack(found).view(grid.size)


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), seeds)
def test_block_output_error_is_the_layers_error_when_the_block_is_zeroed(rows: int, columns: int, high: int, wide: int, seed: int) -> None:
    layer, x = seeded(lambda: nn.Linear(columns, rows)), normal((2, 3, columns), seed)
    block = (min(high, rows), min(wide, columns))
    data = collected(layer, [x[:1], x[1:]], statistics.input_gram, block=block)
    close(total(metric.block_output_error(data), "weight"), mean_error(layer, data["weight"].grid, x))


@pytest.mark.parametrize("block", [(1,), (2, 1), (1, 2, 1), (2, 2, 3, 1), (3, 1, 2, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_block_output_error_of_a_convolution_is_its_error_when_the_block_is_zeroed(block: tuple[int, ...], groups: int) -> None:
    layer = seeded(lambda: nn.Conv2d(4, 6, (3, 2), groups=groups, padding=1, stride=2))
    x = normal((2, 4, 4, 5), 0)
    data = collected(layer, [x], statistics.input_gram, block=block)
    close(total(metric.block_output_error(data), "weight"), mean_error(layer, data["weight"].grid, x))


def test_wanda_is_the_papers_formula_mean_over_the_block() -> None:
    model, x = seeded(Tiny), normal((6, 5), 0)
    data = collected(model, [x[:2], x[2:]], statistics.input_sq)
    inputs = {"a.weight": x, "b.weight": torch.tanh(model.a(x)).detach()}
    for name, score in metric.wanda(data).items():
        w = model.get_parameter(name).detach()
        expected = torch.zeros_like(w)
        for i, j in itertools.product(*map(range, w.shape)):
            expected[i, j] = w[i, j].abs() * inputs[name][:, j].norm() / math.sqrt(6)
        close(score.value, reference.pool(expected, score.grid, reduce="mean"))


def test_wanda_of_single_elements_orders_each_row_as_the_paper() -> None:
    model, x = seeded(lambda: nn.Linear(6, 4)), normal((5, 6), 0)
    data = collected(model, [x], statistics.input_sq, block=(1, 1))
    masks = bp.allocate.per_row(metric.wanda(data), 0.5)
    paper = model.weight.detach().abs() * x.norm(dim=0)
    lowest = paper.argsort(1)[:, :3]
    assert torch.equal(masks["weight"].keep, torch.ones(4, 6, dtype=torch.bool).scatter(1, lowest, False))


@pytest.mark.parametrize("name", ["apoz", "mean_activation"])
@pytest.mark.parametrize("block", [(1,), (2,), (2, 2)])
def test_activation_scores_are_means_behind_the_relu_over_the_blocks_rows(name: str, block: tuple[int, ...]) -> None:
    model, x = seeded(lambda: nn.Linear(4, 5)), normal((7, 4), 0)
    (score,) = getattr(metric, name)(collected(model, [x], getattr(statistics, name), block=block)).values()
    hidden = model(x).detach().relu()
    per_row = {"apoz": (hidden != 0).double().mean(0), "mean_activation": hidden.mean(0)}[name]  # the share that is not zero
    for index, at in reference.cells(score.grid):
        close(score.value[index], per_row[at[0]].mean())


def test_a_dead_row_scores_least_by_its_activations() -> None:
    model = seeded(lambda: nn.Linear(4, 3))
    with torch.no_grad():
        model.bias[1] = -100.0
    x = normal((20, 4), 0)
    for name in ("apoz", "mean_activation"):
        (score,) = getattr(metric, name)(collected(model, [x], getattr(statistics, name), block=(1,))).values()
        assert score.value.argmin() == 1
        assert score.value[1] == 0


# The loss, first order.


def test_taylor_and_gate_grad_are_the_derivative_of_the_loss_in_the_gate() -> None:
    model, x = seeded(Tiny), normal((6, 5), 0)
    data = collected(model, [x], statistics.weight_grad, statistics.gate_grad)
    for name, p in data.items():
        expected = everywhere(data, name, lambda index, name=name: slope(model, data, name, index, x))
        close(total(metric.taylor(data), name), expected.abs(), rtol=1e-6, atol=1e-8)
        close(p.stats["gate_grad"], expected, rtol=1e-6, atol=1e-8)


def test_taylor_is_the_loss_change_of_zeroing_a_block_of_a_loss_that_is_linear() -> None:
    model, x = seeded(lambda: nn.Linear(4, 4)), normal((6, 4), 0)
    data = collect.with_statistics(
        model, where=bp.linears(BLOCK), statistics=[statistics.weight_grad], batches=[x], loss=lambda out, batch: out.sum()
    )
    masks = {i: bp.BlockMask(torch.ones(2, 2, dtype=torch.bool), data["weight"].grid) for i in itertools.product(range(2), range(2))}
    got = total(metric.taylor(data), "weight")
    for index, mask in masks.items():
        mask.keep[index] = False
        without = functional_call(model, bp.masked_parameters(model, {"weight": mask}), (x,)).sum()
        close(got[index], (without - model(x).sum()).abs().detach())


def test_taylor_squared_is_the_mean_of_squared_weight_times_squared_gradient() -> None:
    model, batches = seeded(Tiny), list(normal((3, 2, 5), 0))
    data = collected(model, batches, statistics.weight_grad_sq)
    weights = {name: model.get_parameter(name) for name in data}
    grads = [torch.autograd.grad(loss(model(x), x), list(weights.values())) for x in batches]
    for i, (name, w) in enumerate(weights.items()):
        expected = w.detach() ** 2 * sum(g[i] ** 2 for g in grads) / 3
        close(metric.taylor_squared(data)[name].value, reference.pool(expected, data[name].grid, reduce="mean"))


def test_fisher_is_half_the_mean_of_each_samples_squared_derivative() -> None:
    model, x = seeded(Tiny), normal((4, 5), 0)
    data = collected(model, [x[:1], x[1:]], statistics.gate_fisher)
    for name in data:
        expected = everywhere(
            data, name, lambda index, name=name: sum(slope(model, data, name, index, row[None]) ** 2 for row in x) / len(x) / 2
        )
        close(total(metric.fisher(data), name), expected, rtol=1e-6, atol=1e-8)


def test_snip_is_the_share_of_the_derivatives_over_the_model() -> None:
    model, x = seeded(Tiny), normal((6, 5), 0)
    data = collected(model, [x[:2], x[2:]], statistics.gate_grad)
    found = {name: everywhere(data, name, lambda index, name=name: slope(model, data, name, index, x)).abs() for name in data}
    everything = sum(v.sum() for v in found.values())
    for name, expected in found.items():
        close(total(metric.snip(data), name), expected / everything, rtol=1e-6, atol=1e-8)
    assert sum(float(total(metric.snip(data), name).sum()) for name in data) == pytest.approx(1)


def test_snip_of_a_model_without_slope_is_zero() -> None:
    model, x = seeded(Tiny), normal((2, 5), 0)
    options: dict[str, Any] = {"where": bp.linears(BLOCK), "statistics": [statistics.gate_grad], "batches": [x]}
    scores = metric.snip(collect.with_statistics(model, **options, loss=lambda out, batch: (out * 0).sum()))
    assert all((s.value == 0).all() for s in scores.values())


# The loss, second order.


def second_difference(model: nn.Module, data: Data, name: str, index: Any, x: Tensor, *, step: float = 1e-3) -> Tensor:
    up, here, down = (loss_at(model, data, moved(data, name, index, by), x) for by in (step, 0.0, -step))
    return ((up - 2 * here + down) / step**2).detach()


def test_obd_is_half_the_second_difference_where_gates_do_not_meet() -> None:
    model, x = seeded(lambda: nn.Linear(5, 4)), normal((6, 5), 0)  # each row has outputs, and a term of the loss, of its own
    data = collected(model, [x[:3], x[3:]], statistics.gate_hessian_diagonal(), block=(1,))
    expected = everywhere(data, "weight", lambda index: second_difference(model, data, "weight", index, x) / 2)
    close(total(metric.obd(data), "weight"), expected, rtol=1e-5)


def test_obd_is_half_the_second_difference_within_the_spread_of_its_probes() -> None:
    model, x, probes = seeded(Tiny), normal((6, 5), 0), 300
    data = collected(model, [x], statistics.gate_hessian_diagonal(probes=probes))
    expected = torch.cat([everywhere(data, n, lambda i, n=n: second_difference(model, data, n, i, x) / 2).flatten() for n in data])
    got = torch.cat([total(metric.obd(data), name).flatten() for name in data])
    assert (got - expected).abs().max() < 0.25 * expected.abs().max()
    assert torch.corrcoef(torch.stack([got, expected]))[0, 1] > 0.95


def test_obd_of_a_quadratic_loss_at_its_minimum_is_the_loss_change_of_zeroing() -> None:
    model, x = seeded(lambda: nn.Linear(4, 3, bias=False)), normal((6, 4), 0)
    y = model(x).detach()
    data = collect.with_statistics(
        model,
        where=bp.linears((1,)),
        statistics=[statistics.gate_hessian_diagonal()],
        batches=[(x, y)],
        loss=lambda out, batch: (out - batch[1]).square().sum(-1).mean(),
    )
    close(total(metric.obd(data), "weight"), mean_error(model, data["weight"].grid, x))


def test_grasp_is_half_the_derivative_of_the_squared_gradient_norm_in_the_gate() -> None:
    model, x = seeded(Tiny), normal((6, 5), 0)
    data = collected(model, [x], statistics.gate_hessian_grad)

    def flow(gates: Gates) -> Tensor:
        gates = {name: g.requires_grad_() for name, g in gates.items()}
        return sum(g.square().sum() for g in torch.autograd.grad(loss_at(model, data, gates, x), list(gates.values())))

    for name in data:
        expected = everywhere(
            data, name, lambda i, name=name: (flow(moved(data, name, i, 1e-5)) - flow(moved(data, name, i, -1e-5))) / 4e-5
        )
        close(total(metric.grasp(data), name), expected, rtol=1e-5, atol=1e-7)


def test_synflow_is_the_flow_of_absolute_weights_on_ones_that_zeroing_the_block_takes() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))
    data = collected(model, [normal((2, 5), 0)], statistics.gate_flow)
    positive = {name: p.detach().abs() for name, p in model.named_parameters()}

    def flow(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, weights, (torch.ones(1, 5, dtype=torch.float64),)).sum()

    for name, p in data.items():  # R is linear in each gate, so zeroing a block takes exactly dR/dg
        for index, at in reference.cells(p.grid):
            without = positive[name].clone()
            without[at] = 0
            close(total(metric.synflow(data), name)[index], (flow(positive) - flow({**positive, name: without})).detach())


def test_synflow_conserves_flow_from_layer_to_layer() -> None:
    model = seeded(lambda: nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(3)]))
    scores = metric.synflow(collected(model, [normal((2, 4), 0)], statistics.gate_flow))
    first, *others = (total(scores, name).sum() for name in scores)
    for other in others:
        close(other, first)


def test_movement_adds_up_minus_weight_times_gradient_over_steps() -> None:
    model, data = seeded(Tiny), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = {name: torch.zeros_like(model.get_parameter(name)) for name in ("a.weight", "b.weight")}
    for i in range(4):
        optimizer.zero_grad()
        x = normal((3, 5), i)
        loss(model(x), x).backward()
        for name in expected:
            w = model.get_parameter(name)
            expected[name] -= w.detach() * w.grad
        before = None if data is None else {name: p.stats["movement"].clone() for name, p in data.items()}
        previous, data = data, collect.movement(model, where=bp.linears(BLOCK), previous=data)
        assert before is None or all(torch.equal(previous[name].stats["movement"], v) for name, v in before.items())
        optimizer.step()
    for name, score in metric.movement(data).items():
        close(score.value, reference.pool(expected[name], score.grid, reduce="mean"))


def test_movement_is_positive_where_training_moves_weights_away_from_zero() -> None:
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [1.0]]))
    (model(torch.ones(1, 1)) * torch.tensor([-1.0, 1.0])).sum().backward()  # a step makes the first grow and the second shrink
    (score,) = metric.movement(collect.movement(model, where=bp.linears((1,)))).values()
    assert score.value.flatten().tolist() == [1.0, -1.0]


def test_movement_of_a_parameter_that_some_steps_do_not_use_is_that_of_the_others() -> None:
    model, data, sums = seeded(Tiny), None, []
    for used in (["a"], ["b"], ["b"]):
        model.zero_grad()
        for name in used:
            getattr(model, name).weight.square().sum().backward()
        data = collect.movement(model, where=bp.linears(BLOCK), previous=data)
        sums.append({name: p.stats["movement"].clone() for name, p in data.items() if p.stats})
    assert [list(step) for step in sums] == [["a.weight"], ["a.weight", "b.weight"], ["a.weight", "b.weight"]]
    for name, times in (("a.weight", 1), ("b.weight", 2)):
        close(sums[-1][name], -2 * times * model.get_parameter(name).detach().square())
    assert set(metric.movement(data)) == {"a.weight", "b.weight"}


def test_movement_of_a_parameter_that_no_step_uses_is_an_error_that_names_it() -> None:
    model, data = seeded(Tiny), None
    for _ in range(2):
        model.a.weight.square().sum().backward()
        data = collect.movement(model, where=bp.linears(BLOCK), previous=data)
    with pytest.raises(ValueError, match=r"b\.weight .*'movement'.* no step gave this parameter a gradient.*excluding"):
        metric.movement(data)


def test_movement_names_what_cannot_have_a_gradient() -> None:
    model = seeded(Tiny)
    with pytest.raises(ValueError, match=r"no parameter has a gradient, such as 'a\.weight'; call `movement` after `backward`"):
        collect.movement(model, where=bp.linears(BLOCK))
    model(normal((3, 5), 0)).square().sum().backward()
    data = collect.movement(model, where=bp.excluding(bp.linears(BLOCK), "b.*"))
    with pytest.raises(KeyError, match=r"previous has no 'b\.weight'"):
        collect.movement(model, where=bp.linears(BLOCK), previous=data)
    model.b.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"b\.weight .* is frozen, so it never has a gradient; leave it out with `excluding`"):
        collect.movement(model, where=bp.linears(BLOCK))
    weight_norm(model.a)
    with pytest.raises(ValueError, match=r"a\.weight .* is computed by another parametrization"):
        collect.movement(model, where=bp.linears(BLOCK))


# All of them.

METRICS: dict[str, tuple[Metric, str]] = {
    "wanda": (metric.wanda, "input_sq"),
    "block_output_error": (metric.block_output_error, "input_gram"),
    "apoz": (metric.apoz, "apoz"),
    "mean_activation": (metric.mean_activation, "mean_activation"),
    "taylor": (metric.taylor, "weight_grad"),
    "taylor_squared": (metric.taylor_squared, "weight_grad_sq"),
    "gradient_magnitude": (metric.gradient_magnitude, "weight_grad"),
    "fisher": (metric.fisher, "gate_fisher"),
    "obd": (metric.obd, "gate_hessian_diagonal"),
    "snip": (metric.snip, "gate_grad"),
    "grasp": (metric.grasp, "gate_hessian_grad"),
    "synflow": (metric.synflow, "gate_flow"),
    "movement": (metric.movement, "movement"),
}


def needed(statistic: str) -> Statistic:
    found = getattr(statistics, statistic)
    return found() if statistic == "gate_hessian_diagonal" else found


@pytest.mark.parametrize("name", METRICS)
def test_a_missing_statistic_is_named_with_code_that_collects_it(name: str) -> None:
    model = seeded(Tiny)
    score, statistic = METRICS[name]
    data = collected(model, [normal((2, 5), 0)], statistics.output_mean)
    with pytest.raises(ValueError) as caught:
        score(data)
    remedy = "collect.movement(" if name == "movement" else f"statistics.{statistic}{'(' if name == 'obd' else ']'}"
    for part in ("a.weight (4, 5)", f"metric.{name}", repr(statistic), "['output_mean']", remedy):
        assert part in str(caught.value), part
    with pytest.raises(ValueError, match="the data has none"):
        score(collect.weights(model, where=bp.linears(BLOCK)))


@pytest.mark.parametrize("name", [n for n in METRICS if n != "movement"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_score_is_finite_in_float32_and_writes_into_nothing(name: str, dtype: torch.dtype) -> None:
    model = seeded(Tiny).to(dtype)
    score, statistic = METRICS[name]
    data = collected(model, [normal((4, 5), 0)], needed(statistic))
    before = {n: (p.weight.clone(), p.stats[statistic].clone()) for n, p in data.items()}
    scores = score(data)
    assert list(scores) == list(data)
    for n, s in scores.items():
        assert s.grid == data[n].grid
        assert s.value.dtype == torch.float32
        assert s.value.isfinite().all()
        assert torch.equal(data[n].weight, before[n][0])
        assert torch.equal(data[n].stats[statistic], before[n][1])


@pytest.mark.parametrize(
    "name", [n for n in METRICS if n not in ("apoz", "mean_activation", "movement", "obd", "grasp", "gradient_magnitude")]
)
def test_a_block_of_zeros_scores_zero_and_others_more(name: str) -> None:
    model = seeded(Tiny)
    with torch.no_grad():
        model.a.weight[:2, :2] = 0
    score, statistic = METRICS[name]
    value = score(collected(model, [normal((6, 5), 0)], needed(statistic)))["a.weight"].value
    assert value[0, 0] == 0
    assert (value.flatten()[1:] > 0).all()
