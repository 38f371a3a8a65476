"""Layers that no gradient reaches are named; checkpointing and operations of torch.autograd alone change nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import normal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import blockprune as bp
from blockprune import collect, statistics

GRADIENTS = [
    statistics.gate_grad,
    statistics.gate_fisher,
    statistics.gate_hessian_grad,
    statistics.gate_hessian_diagonal(),
    statistics.gate_flow,
    statistics.weight_grad,
    statistics.weight_grad_sq,
    statistics.output_grad_sq,
    statistics.output_grad_gram,
]


class Double(torch.autograd.Function):
    """Without ``setup_context``, which torch.func needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


class Model(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.body = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), body

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.body(self, x))  # type: ignore[no-any-return]


def without_gradient(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model.a(x)
    return model.b(x + y)  # type: ignore[no-any-return]


def unused(model: Any, x: Tensor) -> Tensor:
    model.a(x)
    return model.b(x)  # type: ignore[no-any-return]


def saved_on_cpu(model: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model.b(model.a(x).tanh())  # type: ignore[no-any-return]


UNREACHED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "detach": lambda m, x: m.b(x + m.a(x).detach()),
    "no_grad": without_gradient,
    "argmax": lambda m, x: m.b(x * m.a(x).argmax(-1, keepdim=True)),
    "unused": unused,
}
REACHED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "dead ReLU": lambda m, x: m.b(x) + (m.a(x) - 1e6).relu(),
    "checkpoint": lambda m, x: checkpoint(lambda x: m.b(m.a(x).tanh()), x, use_reentrant=False),
    "reentrant checkpoint": lambda m, x: checkpoint(lambda x: m.b(m.a(x).tanh()), x, use_reentrant=True),
    "saved on the CPU": saved_on_cpu,
    "own function": lambda m, x: m.b(Double.apply(m.a(x).tanh())),
}
PLAIN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "dead ReLU": lambda m, x: m.b(x) + 0 * m.a(x),
    "own function": lambda m, x: m.b(2 * m.a(x).tanh()),
    **dict.fromkeys(["checkpoint", "reentrant checkpoint", "saved on the CPU"], lambda m, x: m.b(m.a(x).tanh())),
}


def run(model: nn.Module, statistic: statistics.Statistic, per_sample: str = "loop") -> bp.Data:
    return collect.with_statistics(
        model,
        where=bp.linears((4, 4)),
        statistics=[statistic],
        batches=[(normal((6, 8), 0), torch.arange(6) % 4)],
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        per_sample=per_sample,
    )


@pytest.mark.parametrize("kind", UNREACHED)
@pytest.mark.parametrize("statistic", GRADIENTS, ids=lambda s: s.name)
@pytest.mark.parametrize("per_sample", ["vmap", "loop"])
def test_a_layer_that_no_gradient_reaches_is_named(kind: str, statistic: statistics.Statistic, per_sample: str) -> None:
    model = Model(UNREACHED[kind]).double()
    with pytest.raises(ValueError) as caught:
        run(model, statistic, per_sample)
    message = str(caught.value)
    assert message.startswith("a.weight (8, 8): no gradient of the loss reaches it, although the forward calls its Linear.")
    assert repr(statistic.name) in message
    assert "never calls" not in message


@pytest.mark.parametrize("kind", REACHED)
@pytest.mark.parametrize("statistic", GRADIENTS, ids=lambda s: s.name)
def test_a_gradient_of_zero_and_a_checkpointed_one_are_data(kind: str, statistic: statistics.Statistic) -> None:
    torch.manual_seed(0)
    model = Model(REACHED[kind]).double()
    plain = Model(PLAIN[kind]).double()
    plain.load_state_dict(model.state_dict())
    data = run(model, statistic)
    if not (kind == "dead ReLU" and statistic.name == "gate_flow"):  # of |weights| and ones, so that the ReLU is not dead
        for name, param in run(plain, statistic).items():
            torch.testing.assert_close(data[name].stats[statistic.name], param.stats[statistic.name])


class Stopped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize("statistic", GRADIENTS, ids=lambda s: s.name)
def test_a_function_without_a_gradient_lets_none_reach_a_layer(statistic: statistics.Statistic) -> None:
    model = Model(lambda m, x: m.b(Stopped.apply(m.a(x).tanh()))).double()
    with pytest.raises(ValueError, match=rf"^a.weight \(8, 8\): no gradient of the loss reaches it.* no data for '{statistic.name}'"):
        run(model, statistic)


@pytest.mark.parametrize("per_sample", ["vmap", "loop"])
@pytest.mark.parametrize("name", ["sign", "factor of 0"])
@pytest.mark.parametrize("statistic", [s for s in GRADIENTS if s.name != "gate_flow"], ids=lambda s: s.name)
def test_gradients_that_are_all_zero_are_named(statistic: statistics.Statistic, name: str, per_sample: str) -> None:
    model = Model(lambda m, x: m.b(x + (m.a(x).sign() if name == "sign" else 0 * m.a(x).tanh()))).double()
    with pytest.warns(UserWarning, match=rf"^a.weight \(8, 8\): all derivatives are exactly 0 \({statistic.name}\), so all blocks score 0"):
        run(model, statistic, per_sample)


class Checkpointed(torch.autograd.Function):
    """Checkpointing of another library, which differentiates with respect to parameters by itself."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.function, ctx.x, ctx.parameters = function, x.detach(), parameters
        with torch.no_grad():
            return function(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            return None, *torch.autograd.grad(ctx.function(x), (x, *ctx.parameters), grad)


@pytest.mark.parametrize("per_sample", ["vmap", "loop"])
def test_what_gates_cannot_be_differentiated_through_says_what_else_can_be_used(per_sample: str) -> None:
    model = Model(lambda m, x: m.b(Checkpointed.apply(m.a, x, *m.a.parameters()).tanh())).double()
    with pytest.raises(RuntimeError, match=r"gates of this model have no gradient: .* If an autograd.Function .*metric.wanda"):
        run(model, statistics.gate_fisher, per_sample)


class Assigning(nn.Linear):
    """A forward that assigns the memory of a buffer, at which vmap would end the process."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        self.mean.data = 0.9 * self.mean.data + 0.1 * output.mean(0)  # type: ignore[has-type]
        return output - self.mean


class Counting(nn.Linear):
    """A forward that changes a buffer in place, and multiplies with it."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input) * self.calls


@pytest.mark.parametrize("options", [{"per_sample": "vmap"}, {"per_sample": "vmap", "chunk_size": 2}, {"per_sample": "loop"}], ids=str)
def test_every_sample_begins_with_the_same_buffers(options: dict[str, Any]) -> None:
    model, plain = Counting().double(), nn.Linear(8, 4).double()
    plain.load_state_dict({name: p.data for name, p in model.named_parameters()})
    own: dict[str, Any] = {"where": bp.linears((4, 4)), "statistics": [statistics.gate_fisher], "batches": [normal((6, 8), 0)]}
    own |= {"loss": lambda output, batch: output.square().sum()}
    data, expected = (collect.with_statistics(m, **own, **options) for m in (model, plain))
    torch.testing.assert_close(data["weight"].stats["gate_fisher"], expected["weight"].stats["gate_fisher"])
    assert model.calls == 0


def test_a_buffer_with_two_names_stays_a_tensor_with_two_names() -> None:
    class Twice(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 4, dtype=torch.float64)
            self.register_buffer("first", torch.ones(4, dtype=torch.float64))
            self.register_buffer("second", self.first)

        def forward(self, input: Tensor) -> Tensor:
            assert self.first is self.second
            return super().forward(input) * self.second

    for per_sample in ("vmap", "loop"):
        run(Twice(), statistics.gate_fisher, per_sample)


def test_an_error_of_the_forward_itself_stays_as_it_is() -> None:
    model = Model(lambda m, x: m.b(m.a(x)) @ torch.ones(5, 5, dtype=x.dtype)).double()
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied"):
        run(model, statistics.gate_fisher, "loop")


@pytest.mark.parametrize("statistic", [statistics.weight_grad, statistics.gate_grad], ids=lambda s: s.name)
def test_a_layer_that_is_pruned_as_a_whole_has_gradients_of_zero_without_a_warning(
    statistic: statistics.Statistic, recwarn: pytest.WarningsRecorder
) -> None:
    model = Model(lambda m, x: m.b(x + m.a(x))).double()
    bp.apply_masks(model, {"a.weight": bp.BlockMask(torch.zeros(2, 2, dtype=torch.bool), bp.BlockGrid((8, 8), (4, 4)))})
    assert not run(model, statistic)["a.weight"].stats[statistic.name].any()
    assert not recwarn.list


def test_a_buffer_whose_memory_the_forward_assigns_is_refused_by_vmap_alone() -> None:
    model = Assigning().double()
    with pytest.raises(RuntimeError, match=r"vmap cannot run this model: .*\.data.*Pass per_sample='loop'"):
        run(model, statistics.gate_fisher, "vmap")
    assert run(model, statistics.gate_fisher, "loop")["weight"].stats["gate_fisher"].all()
    assert not model.mean.any()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_is_no_obstacle_for_vmap(use_reentrant: bool) -> None:
    model = Model(REACHED["reentrant checkpoint" if use_reentrant else "checkpoint"]).double()
    vmapped, looped = (run(model, statistics.gate_fisher, how)["a.weight"].stats["gate_fisher"] for how in ("vmap", "loop"))
    torch.testing.assert_close(vmapped, looped)


def test_a_frozen_model_has_gradients() -> None:
    model = Model(lambda m, x: m.b(m.a(x))).double()
    want = {s.name: run(model, s)["a.weight"].stats[s.name] for s in GRADIENTS}
    model.requires_grad_(False)
    for s in GRADIENTS:
        torch.testing.assert_close(run(model, s)["a.weight"].stats[s.name], want[s.name])


def test_folds_know_the_calls_and_gradients_of_all_parts() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.shape[1] > 1 else self.b(x)  # type: ignore[no-any-return]

    options: dict[str, Any] = {"where": bp.linears((2, 2)), "statistics": [statistics.gate_grad], "loss": lambda y, _: y.square().sum()}
    first, second = (collect.fold(Sometimes(), batches=[torch.ones(2, n, 4)], **options) for n in (1, 2))
    for fold, name in ((first, "a.weight"), (second, "b.weight")):
        with pytest.raises(ValueError, match=f"{name} .*: the forward never calls its Linear"):
            collect.compute(fold)
    assert collect.merge(first, second).counts == {"a.weight": (2, 1, 1), "b.weight": (2, 1, 1)}
    collect.compute(collect.merge(first, second))


def test_a_forward_may_use_the_model_itself() -> None:
    model = Model(lambda m, x: m.b(m.a(x)))
    options: dict[str, Any] = {"where": bp.linears((4, 4)), "statistics": [statistics.gate_grad], "batches": [torch.ones(2, 8)]}
    losses = {"loss": lambda y, _: y.square().sum()}
    want = collect.with_statistics(model, **options, **losses)["a.weight"].stats["gate_grad"]
    forward = lambda m, batch: m.c(m.body(m, batch))  # noqa: E731
    torch.testing.assert_close(collect.with_statistics(model, **options, **losses, forward=forward)["a.weight"].stats["gate_grad"], want)
