"""Gates on blocks: what they multiply, what their penalty means, and that nothing of them stays on a model."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import grids, normal, seeds
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import blockprune as bp
from blockprune import gates
from blockprune.core.sharded_tensor import is_sharded, whole
from blockprune.model.gate_kinds import Gate

WHERE = bp.linears((2, 2))
KINDS: dict[str, Callable[[], Gate]] = {"hard_concrete": gates.hard_concrete, "soft_movement": gates.soft_movement}
each = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


class Net(nn.Module):
    """Linears with and without a bias, a convolution, a tied weight and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.last = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.alias = self.twice
        self.last.weight = self.first.weight
        self.conv = nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.alias(self.twice(self.first(x)).relu()).relu())
        return x + self.conv(x[:, None]).mean()


X = normal((5, 6), 3).float()


def set_logits(model: nn.Module, seed: int = 0) -> None:
    """Logits of both signs, so that some gates are open and some closed."""
    with torch.no_grad():
        for number, logits in enumerate(gates.parameters(model)):
            logits.copy_(4 * normal(tuple(logits.shape), seed + number))


def traces(model: nn.Module) -> list[Any]:
    """All that gates could leave on a model besides values."""
    modules = [
        (n, type(m), m.training, list(m._parameters), list(m._buffers), list(m._modules), sorted(vars(m))) for n, m in model.named_modules()
    ]
    return [*modules, [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()], list(model.state_dict())]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before, state = traces(model), copy.deepcopy(model.state_dict())
    yield
    assert traces(model) == before
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


# What gates compute.


@given(grids(), seeds, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@settings(max_examples=40)
def test_a_weight_is_multiplied_block_by_block(grid: bp.BlockGrid, seed: int, dtype: torch.dtype) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(normal(grid.shape, seed).to(dtype))

    model = One()
    dense = model.weight.detach().clone()
    gates.add(model, where=bp.named("weight", grid.block), gate=Gate(lambda logits, _: logits, torch.sigmoid))
    set_logits(model, seed)
    factors = gates.scores(model)["weight"].value  # in at least float32, also for a bfloat16 weight
    assert torch.equal(model.weight, (dense * reference.expand(factors, grid)).to(dtype))


@each
def test_gates_change_the_output_as_their_weights_do_and_both_get_gradients(make: Any) -> None:
    model = gates.add(Net(), where=WHERE, gate=make())
    set_logits(model)
    assert [n for n, _ in model.named_parameters() if n.endswith("logits")] == [
        f"{owner}.parametrizations.weight.0.logits" for owner in ("first", "twice")
    ]
    model(X).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert gates.parameters(model)[0].grad.any()


def test_the_gradient_of_a_movement_gate_is_weight_times_gradient_also_where_it_is_closed() -> None:
    model = nn.Linear(6, 4, bias=False)
    weight = model.weight.detach().clone()
    gates.add(model, where=WHERE, gate=gates.soft_movement())
    set_logits(model)
    (logits,) = gates.parameters(model)
    is_open = logits.detach().sigmoid() > 0.5
    assert is_open.any()
    assert not is_open.all()
    used = (weight * bp.expand(is_open, bp.BlockGrid((4, 6), (2, 2)))).requires_grad_()
    (X @ used.T).square().sum().backward()
    model(X).square().sum().backward()
    assert used.grad is not None
    expected = reference.pool((weight * used.grad), bp.BlockGrid((4, 6), (2, 2)))
    torch.testing.assert_close(logits.grad, expected)


def test_hard_concrete_gates_are_open_as_often_as_their_probability_says() -> None:
    gate = gates.hard_concrete()
    logits = torch.tensor([-3.0, -1.0, 0.0, 2.0])
    torch.manual_seed(0)
    drawn = gate.value(logits.repeat(20000, 1), True)
    assert drawn.min() == 0
    assert drawn.max() == 1
    torch.testing.assert_close((drawn > 0).float().mean(0), gate.open_probability(logits), atol=0.015, rtol=0)
    torch.manual_seed(1)
    first = gate.value(logits, True)
    torch.manual_seed(1)
    assert torch.equal(gate.value(logits, True), first)  # the state of the generator is all that a resumed run needs
    assert torch.equal(gate.value(logits, False), (logits.sigmoid() * 1.2 - 0.1).clamp(0, 1))


@each
def test_open_probabilities_rise_with_the_logits_and_reach_both_ends(make: Any) -> None:
    probability = make().open_probability(torch.linspace(-30, 30, 301))
    assert (probability.diff() >= 0).all()
    assert probability[0] < 1e-6
    assert probability[-1] > 1 - 1e-6


# Penalties.


def test_the_expected_sparsity_counts_elements_or_costs() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 1))
    gates.add(model, where=WHERE_OR_ROWS)
    set_logits(model)
    grids_of = {name: score.grid for name, score in gates.scores(model).items()}
    closed = {name: 1 - gates.hard_concrete().open_probability(s.value) for name, s in gates.scores(model).items()}
    removed = {name: (closed[name] * reference.block_elements(grid)).sum() for name, grid in grids_of.items()}
    torch.testing.assert_close(gates.expected_sparsity(model), (removed["0.weight"] + removed["1.weight"]) / 30)
    by_cost = gates.expected_sparsity(model, costs={"0.*": 3.0, "*": 1.0})
    torch.testing.assert_close(by_cost, 0.75 * removed["0.weight"] / 25 + 0.25 * removed["1.weight"] / 5)
    torch.testing.assert_close(gates.penalty(model, sparsity=0.9), (gates.expected_sparsity(model) - 0.9).abs())
    assert torch.autograd.grad(gates.penalty(model, sparsity=0.9), gates.parameters(model))[0].any()


WHERE_OR_ROWS = bp.first_of(bp.named("1.weight", (1, 2)), WHERE)


@pytest.mark.parametrize("target", [0.5, 0.8])
@pytest.mark.parametrize(("make", "tolerance"), [(gates.hard_concrete, 0.001), (gates.soft_movement, 0.03)])  # its gates close at once
def test_the_penalty_meets_its_target(make: Any, tolerance: float, target: float) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(128, 16), torch.randn(128, 16)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    gates.add(model, where=WHERE, gate=make())
    with torch.no_grad():
        for logits in gates.parameters(model):
            logits.add_(0.1 * torch.randn(logits.shape))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 500)  # the last steps open or close single gates
    for _ in range(500):
        optimizer.zero_grad()
        ((model(x) - y).square().mean() + 10 * gates.penalty(model, sparsity=target)).backward()
        optimizer.step()
        schedule.step()
    assert abs(gates.expected_sparsity(model).item() - target) < tolerance
    masks = bp.allocate.per_model(gates.scores(model), target)
    assert bp.sparsity(masks) == pytest.approx(target, abs=0.01)
    gates.remove(model)
    bp.apply_masks(model, masks)
    assert bp.sparsity(bp.read_masks(model)) == bp.sparsity(masks)


def test_gates_open_for_planted_blocks() -> None:
    torch.manual_seed(0)
    solution = torch.zeros(8, 16)
    solution[:2, :2], solution[4:6, 8:10] = 1.5, -1.5
    x = torch.randn(256, 16)
    model = gates.add(nn.Linear(16, 8, bias=False), where=WHERE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        ((model(x) - x @ solution.T).square().mean() + gates.penalty(model, sparsity=30 / 32)).backward()
        optimizer.step()
    keep = bp.allocate.per_layer(gates.scores(model), 30 / 32)["weight"].keep
    assert keep.nonzero().tolist() == [[0, 0], [2, 4]]


# Gates that open n of every m blocks.


@given(seed=seeds, n_and_m=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4)]), axis=st.sampled_from([0, 1, -1]), training=st.booleans())
def test_n_of_every_m_gates_are_open(seed: int, n_and_m: tuple[int, int], axis: int, training: bool) -> None:
    n, m = n_and_m
    logits = normal((2 * m, 3 * m), seed)
    gate = gates.n_of_m(n, m, axis=axis)
    for factors in (gate.value(logits, training), gate.open_probability(logits)):
        banks = factors.movedim(axis, -1).unflatten(-1, (-1, m))
        torch.testing.assert_close(banks.sum(-1), torch.full_like(banks[..., 0], n))
        assert 0 <= factors.min() <= factors.max() <= 1 + 1e-6
    likeliest = gate.value(logits, False) == 1
    score = bp.BlockScore(logits, bp.BlockGrid(tuple(logits.shape), (1, 1)))
    assert torch.equal(likeliest, bp.allocate.n_of_m({"w": score}, 1 - n / m, m=m, axis=axis % 2)["w"].keep)


def test_probabilities_of_choices_are_those_of_draws() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    gate = gates.n_of_m(2, 4, temperature=0.01)  # so low that a draw is a choice
    drawn = gate.value(logits.expand(20_000, 4), True)
    torch.testing.assert_close(drawn.mean(0), gate.open_probability(logits)[0], atol=0.015, rtol=0)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    weights = {pair: math.exp(logits[0, pair[0]] + logits[0, pair[1]]) for pair in pairs}
    expected = [sum(w for pair, w in weights.items() if i in pair) / sum(weights.values()) for i in range(4)]
    torch.testing.assert_close(gate.open_probability(logits)[0], torch.tensor(expected))


def test_learned_choices_lose_less_than_those_of_the_largest_weights() -> None:
    """Inputs that are nearly equal: a layer needs only some of them, and their weights' sizes do not tell which."""
    torch.manual_seed(0)
    shared, own = torch.randn(256, 2), torch.randn(256, 8)
    x = torch.cat([shared[:, [0, 0, 1, 1]] + 0.1 * own[:, :4], own[:, 4:]], 1)  # of the first four inputs, one of each pair says all
    dense = nn.Linear(8, 16, bias=False)
    with torch.no_grad():
        dense.weight[:, :2], dense.weight[:, 2:4] = 1 + 0.1 * torch.rand(16, 2), 0.6 + 0.1 * torch.rand(16, 2)
    target = dense(x).detach()
    by_size = bp.recipes.magnitude(bp.linears((1, 1)), allocate=partial(bp.allocate.n_of_m, m=4))(dense, 0.5).masks
    gated = gates.add(copy.deepcopy(dense), where=bp.linears((1, 1)), gate=gates.n_of_m(2, 4), initial=0.0)
    optimizer = torch.optim.Adam([{"params": gates.parameters(gated), "lr": 0.1}, {"params": [dense_of(gated)], "lr": 0.01}])
    for _ in range(300):
        optimizer.zero_grad()
        (gated(x) - target).square().mean().backward()
        optimizer.step()
    learned = bp.allocate.n_of_m(gates.scores(gated), 0.5, m=4)
    errors = [least_squares_error(x, target, masks["weight"].keep) for masks in (learned, by_size)]
    assert errors[0] < 0.5 * errors[1]


def dense_of(model: nn.Linear) -> Tensor:
    stored: Tensor = model.parametrizations.weight.original  # type: ignore[union-attr, assignment]
    return stored


def least_squares_error(x: Tensor, target: Tensor, keep: Tensor) -> float:
    """The error of the best weights in the kept places."""
    outputs = [x[:, row] @ torch.linalg.lstsq(x[:, row], y[:, None]).solution for row, y in zip(keep, target.T, strict=True)]
    return float((torch.cat(outputs, 1) - target).square().mean())


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (2.0, 4), (5, 4)])
def test_n_of_m_refuses_numbers_that_do_not_fit(n: Any, m: int) -> None:
    with pytest.raises(ValueError, match="0 < n < m"):
        gates.n_of_m(n, m)


def test_n_of_m_refuses_more_choices_than_can_be_computed() -> None:
    with pytest.raises(ValueError, match="12,870 choices"):
        gates.n_of_m(8, 16)


def test_blocks_that_n_of_m_does_not_divide_are_an_error() -> None:
    model = gates.add(nn.Linear(6, 4), where=bp.linears((1, 1)), gate=gates.n_of_m(2, 4))
    with pytest.raises(ValueError, match=r"\(4, 6\).*groups of m=4"):
        model(torch.ones(1, 6))


# Nothing stays.


@each
@pytest.mark.parametrize("training", [True, False])
def test_removing_gates_leaves_no_trace_but_the_folded_values(make: Any, training: bool) -> None:
    model = Net().train(training)
    before, stored = traces(model), dict(model.named_parameters())
    gates.add(model, where=WHERE, gate=make())
    set_logits(model)
    outputs = copy.deepcopy(model).eval()(X)
    assert gates.remove(model) is model
    assert traces(model) == before
    assert all(p is stored[n] for n, p in model.named_parameters())
    torch.testing.assert_close(model.eval()(X), outputs)


def test_removing_gates_without_folding_restores_the_stored_values() -> None:
    model = Net()
    with unchanged(model):
        gates.add(model, where=WHERE)
        set_logits(model)
        gates.remove(model, fold=False)


@each
def test_copies_of_a_gated_model_do_not_share_anything(make: Any) -> None:
    model = gates.add(Net(), where=WHERE, gate=make()).eval()
    set_logits(model)
    outputs, replica = model(X), copy.deepcopy(model)
    gates.remove(replica)
    assert torch.equal(model(X), outputs)
    torch.testing.assert_close(replica(X), outputs)
    again = gates.add(Net(), where=WHERE, gate=make()).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), outputs)


@pytest.mark.parametrize("masks_first", [True, False])
@pytest.mark.parametrize("gates_last", [True, False])
def test_masks_and_gates_come_and_go_in_any_order(masks_first: bool, gates_last: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    before, dense = traces(model), copy.deepcopy(model)
    masks = bp.recipes.magnitude(WHERE)(model, 0.5).masks
    steps: list[Callable[[], Any]] = [lambda: bp.apply_masks(model, masks), lambda: gates.add(model, where=WHERE)]
    for step in steps if masks_first else reversed(steps):
        step()
    set_logits(model)
    assert bp.read_masks(model) == masks
    model.eval()
    outputs, plain = model(X), bp.finalize(model)
    torch.testing.assert_close(plain(X), outputs)
    factors = {name: gates.hard_concrete().value(score.value, False) for name, score in gates.scores(model).items()}
    for name, mask in masks.items():
        expected = dense.get_parameter(name) * bp.expand(factors[name] * mask.keep, mask.grid)
        torch.testing.assert_close(plain.get_parameter(name), expected)
    if gates_last:
        gates.remove(bp.apply_masks(model, {}))
    else:
        gates.remove(model)
        torch.testing.assert_close(model(X), outputs)
        bp.apply_masks(model, {})
    assert traces(model.train()) == before


def test_optimizers_and_half_precision_and_autocast() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model.first.weight.detach().clone()
    gates.add(model, where=WHERE)
    optimizer.add_param_group({"params": gates.parameters(model), "lr": 1.0})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.first.weight.dtype == torch.float32
        model(X).float().square().sum().backward()
    optimizer.step()
    assert not torch.equal(gates.remove(model, fold=False).first.weight, weight)
    half = gates.add(Net().bfloat16(), where=WHERE)
    assert half.first.weight.dtype == torch.bfloat16
    assert half.bfloat16()(X.bfloat16()).dtype == torch.bfloat16


@given(grids(), seeds, st.sampled_from([torch.float16, torch.bfloat16]))
@settings(max_examples=30)
def test_gates_of_half_precision_have_the_gradients_of_float32(grid: bp.BlockGrid, seed: int, dtype: torch.dtype) -> None:
    """Products of weights and gradients, and sums of them, that half precision would round to 0 or to infinity."""
    model = nn.Module()
    model.weight = nn.Parameter((1e-4 * normal(grid.shape, seed)).to(dtype))
    gates.add(model, where=bp.named("weight", grid.block), gate=Gate(lambda logits, _: logits, torch.sigmoid), initial=1.0)
    (logits,) = gates.parameters(model)
    grad = (1e-4 * normal(grid.shape, seed + 1)).to(dtype)
    model.weight.backward(grad)
    exact = dense_of(model).detach().double() * grad.double()
    torch.testing.assert_close(logits.grad, reference.pool(exact, grid).float(), rtol=1e-4, atol=1e-12)
    assert logits.grad is not None
    assert logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_stay_in_float32_when_a_model_is_converted_to_half_precision(dtype: torch.dtype) -> None:
    model = gates.add(Net(), where=WHERE)  # with a tied weight, whose modules have one tensor of logits
    set_logits(model)
    before = [logits.detach().clone() for logits in gates.parameters(model)]
    factors = gates.hard_concrete().value(before[0], False)
    replica = copy.deepcopy(model.to(dtype)).eval()
    for converted in (model.eval(), replica):
        assert all(torch.equal(logits, was) for logits, was in zip(gates.parameters(converted), before, strict=True))
        assert converted.first.parametrizations.weight[0].logits is converted.last.parametrizations.weight[0].logits
        stored = dense_of(converted.first)
        expected = stored.float() * bp.expand(factors, bp.BlockGrid((6, 6), (2, 2)))
        assert converted.first.weight.dtype == stored.dtype == dtype
        assert torch.equal(converted.first.weight, expected.to(dtype))
    assert gates.parameters(model.double())[0].dtype == torch.float64
    assert all(logits.is_meta for logits in gates.parameters(replica.to("meta")))


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*:DeprecationWarning")
def test_scripting_a_gated_model_names_remove() -> None:
    with pytest.raises(RuntimeError, match=r"torch.jit.script .* gates of a weight \(6, 4\).*bp.gates.remove\(model\)"):
        torch.jit.script(gates.add(nn.Sequential(nn.Linear(4, 6)), where=WHERE))


@pytest.mark.slow
def test_gates_compile() -> None:
    model = gates.add(nn.Linear(6, 4), where=WHERE, gate=gates.soft_movement())
    set_logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))


# Models that fully_shard has sharded; tests/test_parallel.py trains them in two processes.


def gated(make: Callable[[], Gate], masked: bool) -> Any:
    torch.manual_seed(0)
    model, where = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)), bp.linears((4, 2))
    if masked:
        bp.apply_masks(model, bp.recipes.magnitude(where)(model, 0.3).masks)
    gates.add(model, where=where, gate=make())
    set_logits(model)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("parts", [(0, 2), (0,), ()])  # the layers that are sharded apart; the model as a whole has the others
@pytest.mark.parametrize("make", [*KINDS.values(), partial(gates.n_of_m, 1, 2, axis=0)])
def test_gates_of_a_sharded_model_are_those_of_the_plain_model(make: Any, parts: tuple[int, ...], masked: bool) -> None:
    model, twin = gated(make, masked), gated(make, masked)
    for part in parts:
        fully_shard(model[part])
    fully_shard(model)
    x, costs = torch.randn(4, 8), {"0.weight": 1.0, "2.weight": 3.0}
    where = bp.linears((4, 2))
    for _ in range(2):
        for net in (model, twin):
            net.zero_grad()
            torch.manual_seed(1)
            penalty = gates.penalty(net, sparsity=0.9) + bp.regularizers.group_lasso(net, where=where)  # of whole and of sharded logits
            (net(x).square().mean() + penalty).backward()
            (gates.expected_sparsity(net, costs=costs) - 0.3).square().backward()
        torch.testing.assert_close(gradients(model), gradients(twin))
        with torch.no_grad():
            net(x)  # whole copies stay after it
        assert all(map(is_sharded, gates.parameters(model)))
    scores, expected = gates.scores(model), gates.scores(twin)
    assert scores == expected
    masks = bp.allocate.per_model(scores, 0.5)
    assert bp.regrow(masks, drop=scores, grow=scores, fraction=0.2) == bp.regrow(masks, drop=expected, grow=expected, fraction=0.2)
    assert bp.collect.weights(model, where=where) == bp.collect.weights(twin, where=where)
    with pytest.raises(ValueError, match=r"gates cannot be added to a model that fully_shard .* change the model first"):
        gates.add(model, where=where)
    with pytest.raises(ValueError, match=r"gates cannot be removed .* bp\.allocate\.per_model\(bp\.gates\.scores\(model\), sparsity\)\)"):
        gates.remove(model)
    state = bp.distributed.full_state_dict(bp.apply_masks(model, masks))
    removed = bp.finalize(bp.apply_masks(gates.remove(twin), masks))
    torch.testing.assert_close(state, dict(removed.state_dict()))


# Bad input.


@pytest.mark.parametrize(
    "call", [gates.remove, gates.parameters, gates.scores, gates.expected_sparsity, lambda m: gates.penalty(m, sparsity=0.5)]
)
def test_a_model_without_gates_is_an_error_that_says_how_to_add_them(call: Any) -> None:
    with pytest.raises(ValueError, match=r"Net has no gates; add them with bp\.gates\.add"):
        call(Net())


def test_bad_options_are_errors_and_change_nothing() -> None:
    model = Net()
    with unchanged(model):
        for initial in (math.nan, math.inf, "1", True):
            with pytest.raises(ValueError if isinstance(initial, float) else TypeError, match="initial="):
                gates.add(model, where=WHERE, initial=initial)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="gate is a function; give a Gate"):
            gates.add(model, where=WHERE, gate=lambda x: x)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="matches no parameter"):
            gates.add(model, where=bp.batchnorms())
    gates.add(model, where=bp.including(WHERE, "twice.*"))
    with unchanged(model):
        with pytest.raises(ValueError, match=r"twice\.weight \(6, 6\): this parameter has gates already"):
            gates.add(model, where=WHERE)
        for sparsity in (-0.1, 1.1, math.nan, "1"):
            with pytest.raises(ValueError if isinstance(sparsity, float) else TypeError, match="sparsity="):
                gates.penalty(model, sparsity=sparsity)  # type: ignore[arg-type]
        for costs in ({"*": -1.0}, {"*": 0.0}, {"*": math.inf}):
            with pytest.raises(ValueError, match=r"costs[=\[]"):
                gates.expected_sparsity(model, costs=costs)
        with pytest.raises(KeyError, match=r"costs has a key 'first\.weight' that matches no parameter"):
            gates.expected_sparsity(model, costs={"first.weight": 1.0})


def test_gates_on_a_computed_weight_are_removed_without_folding_alone() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    gates.add(model, where=WHERE)
    with pytest.raises(ValueError, match=r"weight \(4, 4\): _WeightNorm also computes this weight"):
        gates.remove(model)
    plain = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert list(gates.remove(model, fold=False).state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"low": 0.0}, {"high": 1.0}, {"temperature": math.nan}])
def test_hard_concrete_refuses_intervals_that_do_not_extend_beyond_0_and_1(options: Any) -> None:
    with pytest.raises(ValueError, match="temperature="):
        gates.hard_concrete(**options)
    with pytest.raises(ValueError, match="threshold="):
        gates.soft_movement(threshold=1.0)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_a_gated_rnn_can_be_copied_after_a_forward_with_gradients(make: Any) -> None:
    rnn, x = make(4, 4), normal((3, 2, 4), 0).float()
    gates.add(rnn, where=lambda name, _: (2, 2) if "weight" in name else None)
    rnn(x)[0].sum().backward()
    rnn.eval()
    replica = copy.deepcopy(copy.deepcopy(rnn))
    assert torch.equal(replica(x)[0], rnn(x)[0])
    with torch.no_grad():
        for p in replica.parameters():
            p.mul_(2)
    assert not torch.equal(replica(x)[0], rnn(x)[0])
    assert type(gates.remove(replica)) is make
    assert torch.equal(copy.deepcopy(rnn)(x)[0], rnn(x)[0])


@pytest.mark.parametrize("first", ["gates", "masks"])
def test_a_gated_rnn_can_be_copied_with_and_without_masks(first: str) -> None:
    where = bp.named("weight_hh_l0", (2, 2))
    rnn, x = nn.LSTM(4, 4), normal((3, 2, 4), 0).float()
    masks = bp.recipes.magnitude(where)(rnn, 0.5).masks
    bp.apply_masks(rnn, {} if first == "gates" else masks)
    gates.add(rnn, where=where).eval()
    for changed in (masks, {}):
        bp.apply_masks(rnn, changed)
        rnn(x)[0].sum().backward()
        assert torch.equal(copy.deepcopy(rnn)(x)[0], rnn(x)[0])


def test_an_embedding_with_sparse_gradients_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True))
    with pytest.raises(TypeError, match=r"0\.weight: the parameter \(8, 4\) has sparse gradients.*sparse=False"):
        gates.add(model, where=bp.named("0.weight", (2, 2)))
    assert type(model[0]) is nn.Embedding


NO_GATES: dict[str, tuple[Any, type[Exception], str]] = {
    "None": (lambda logits: None, TypeError, r"returned NoneType; it must return a dense floating-point tensor of shape \(2, 4\)"),
    "a float": (lambda logits: 1.0, TypeError, "returned float"),
    "complex": (lambda logits: logits * 1j, TypeError, "returned torch.complex64"),
    "integers": (torch.Tensor.long, TypeError, "returned torch.int64"),
    "one number": (lambda logits: logits.sigmoid().mean(), ValueError, r"returned a tensor of shape \(\) for logits of shape \(2, 4\)"),
    "transposed": (lambda logits: logits.sigmoid().T, ValueError, r"returned a tensor of shape \(4, 2\) for logits of shape \(2, 4\)"),
    "a row": (lambda logits: logits.sigmoid()[:1], ValueError, r"returned a tensor of shape \(1, 4\) for logits of shape \(2, 4\)"),
}


@pytest.mark.parametrize("kind", NO_GATES)
def test_a_function_that_returns_no_gate_for_each_block_is_named(kind: str) -> None:
    function, error, message = NO_GATES[kind]
    model = gates.add(nn.Linear(8, 4), where=WHERE, gate=Gate(lambda logits, _: function(logits), torch.sigmoid))
    with pytest.raises(error, match=f"gate.value {message}"):
        model(torch.ones(1, 8))
    model = gates.add(nn.Linear(8, 4), where=WHERE, gate=Gate(lambda logits, _: logits, function))
    model(torch.ones(1, 8))
    with pytest.raises(error, match=f"gate.open_probability {message}"):
        gates.expected_sparsity(model)


@pytest.mark.parametrize("probability", [lambda x: x * torch.nan, lambda x: x.sigmoid() + 0.5, lambda x: x.sigmoid() - 1])
def test_probabilities_are_from_0_to_1(probability: Any) -> None:
    model = gates.add(nn.Linear(8, 4), where=WHERE, gate=Gate(lambda logits, _: logits, probability))
    with pytest.raises(ValueError, match=r"weight: gate.open_probability returned numbers from .*; each must be from 0 to 1"):
        gates.penalty(model, sparsity=0.5)


def test_gates_are_drawn_for_each_sample_under_vmap() -> None:
    model, x = gates.add(nn.Linear(8, 4), where=WHERE).train(), torch.ones(5, 8)
    assert torch.func.vmap(model, randomness="different")(x).shape == (5, 4)
