"""The fold adds up, in any order and any splitting, and leaves the model as it was, whatever happens."""

import contextlib
import copy
import re
import warnings
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import blockprune as bp
from blockprune import collect, statistics
from blockprune.core.types import Data
from blockprune.model.running import disable_attention_fastpath
from blockprune.statistics import Statistic

TILES = bp.linears((2, 2))
BY_ROW = [
    statistics.input_sq,
    statistics.input_mean,
    statistics.input_gram,
    statistics.output_sq,
    statistics.output_mean,
    statistics.mean_activation,
    statistics.apoz,
]
BY_SAMPLE = [statistics.gate_grad, statistics.gate_fisher]
BY_BATCH = [
    statistics.weight_grad,
    statistics.weight_grad_sq,
    statistics.output_grad_sq,
    statistics.gate_hessian_grad,
    statistics.gate_hessian_diagonal(probes=2),
    statistics.gate_flow,
]
ALL = BY_ROW + BY_SAMPLE + BY_BATCH


class Net(nn.Module):
    """Two Linears with a batch norm and a dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.drop(self.norm(self.a(x)))))


def net(dtype: torch.dtype = torch.float64) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(dtype)


def half(model: nn.Module) -> bp.Masks:
    return bp.allocate.per_layer(bp.metric.l1(collect.weights(model, where=TILES)), 0.5)


def each(stats: Sequence[Statistic]) -> list[Any]:
    """Parameters by name."""
    return [pytest.param(s, id=s.name) for s in stats]


def loss(output: Tensor, batch: Any) -> Tensor:
    """A mean over samples, so that one big batch and its samples agree."""
    return (output.square() + output.exp()).sum(-1).mean()


def seen(model: nn.Module, batches: Any, stats: Sequence[Statistic] = (*BY_ROW, *BY_SAMPLE), **options: Any) -> Data:
    return collect.with_statistics(model, **{"where": TILES, "loss": loss, **options}, statistics=stats, batches=batches)


def assert_same(a: Data, b: Data, **tolerance: float) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name].weight, b[name].weight)
        assert a[name].stats.keys() == b[name].stats.keys()
        for key in a[name].stats:
            torch.testing.assert_close(a[name].stats[key], b[name].stats[key], msg=lambda m, at=(name, key): f"{at}: {m}", **tolerance)


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a fold might disturb."""
    return {
        "values": {k: v.tolist() for k, v in model.state_dict().items()},
        "identity": {k: id(v) for k, v in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]},
        "versions": {k: v._version for k, v in [*model.named_parameters(), *model.named_buffers()]},
        "flags": {k: v.requires_grad for k, v in model.named_parameters()},
        "grad": {k: (id(v.grad), None if v.grad is None else v.grad.tolist()) for k, v in model.named_parameters()},
        "modules": {k: (type(m), m.training, sorted(vars(m))) for k, m in model.named_modules()},
        "hooks": {
            (k, kind): list(getattr(m, kind))
            for k, m in model.named_modules()
            for kind in vars(m)
            if kind.endswith(("_hooks", "_with_kwargs", "_always_called"))
        },
        "rng": torch.get_rng_state().tolist(),
        "mode": torch.is_grad_enabled(),
    }


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = everything(model)
    yield
    assert everything(model) == before


# Splitting and merging.


@settings(max_examples=15)
@given(seeds, st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from([1, 3, 8]))
def test_any_splitting_into_batches_is_one_big_batch(seed: int, sizes: list[int], chunk: int) -> None:
    model, x = net(), normal((sum(sizes), 3), seed)
    assert_same(seen(model, x.split(sizes), chunk_size=chunk), seen(model, [x]))


@settings(max_examples=10)
@given(seeds, st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(any))
def test_merged_folds_in_any_order_are_one_fold_even_where_some_saw_no_batch(seed: int, counts: list[int]) -> None:
    model, batches = net(), list(normal((sum(counts), 2, 3), seed))
    options = {"where": TILES, "statistics": [*BY_ROW, *BY_SAMPLE, statistics.weight_grad, statistics.gate_hessian_grad], "loss": loss}
    split = iter(batches)
    folds = [collect.fold(model, batches=[next(split) for _ in range(count)], **options) for count in counts]
    left, right = folds[0], folds[-1]
    for other in folds[1:]:
        left = collect.merge(left, other)
    for other in folds[-2::-1]:
        right = collect.merge(right, other)
    whole = collect.compute(collect.fold(model, batches=batches, **options))
    assert_same(collect.compute(left), whole)
    assert_same(collect.compute(right), whole)


def test_merge_writes_into_neither_fold_nor_does_finish() -> None:
    options = {"where": TILES, "statistics": ALL, "loss": loss}
    a, b = (collect.fold(net(), batches=[normal((2, 3), i)], **options) for i in (1, 2))
    before = copy.deepcopy(a.sums), copy.deepcopy(b.sums)
    collect.merge(a, b)
    collect.compute(a)
    for fold, sums in zip((a, b), before, strict=True):
        assert all(torch.equal(fold.sums[key][k], v) for key, s in sums.items() for k, v in s.items())


@settings(max_examples=10)
@given(seeds, st.integers(1, 3))
def test_equal_batches_average_their_gradients(seed: int, count: int) -> None:
    x = normal((count * 2, 3), seed)
    assert_same(seen(net(), x.split(2), [statistics.weight_grad]), seen(net(), [x], [statistics.weight_grad]))


def test_several_statistics_in_one_pass_equal_each_alone_and_share_a_forward() -> None:
    model, batches = net(), list(normal((2, 3, 3), 0))
    together = seen(model, batches, ALL)
    for s in ALL:
        for name, p in seen(model, batches, [s]).items():
            torch.testing.assert_close(p.stats[s.name], together[name].stats[s.name])
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    seen(model, batches, [*BY_ROW, statistics.weight_grad, statistics.output_grad_sq])
    handle.remove()
    assert len(calls) == len(batches)


@given(seeds)
@settings(max_examples=5)
def test_a_fold_repeats_itself(seed: int) -> None:
    x = [normal((3, 3), seed)]
    assert_same(seen(net(), x, ALL), seen(net(), x, ALL), rtol=0, atol=0)


# The model afterwards.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("per_sample", ["vmap", "loop"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_model_is_as_before(training: bool, per_sample: str, masked: bool) -> None:
    model = net().train(training)
    if masked:
        bp.apply_masks(model, half(model))
    model.norm.eval()
    model.a.bias.requires_grad_(False)
    model.b.register_forward_hook(lambda module, args, output: None)
    model.a.register_forward_pre_hook(lambda module, args: None)
    if training:
        model(normal((3, 3), 1)).sum().backward()
    model.norm.train(training)
    with unchanged(model):
        seen(model, [normal((4, 3), 0)], ALL, per_sample=per_sample)


@pytest.mark.parametrize("s", [statistics.input_sq, statistics.weight_grad], ids=lambda s: s.name)
def test_a_buffer_that_the_forward_writes_to_is_put_back(s: Statistic) -> None:
    class Counts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = Counts().double()
    seen(model, [normal((2, 3), 0)], [s])
    assert model.calls == 0


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["batches", "forward", "loss", "update"])
def test_the_model_is_as_before_also_when_something_raises(error: type[BaseException], where: str) -> None:
    model = net()
    model(normal((3, 3), 1)).sum().backward()
    model.b.requires_grad_(False)
    count = [0]

    def fails(at: str) -> None:
        count[0] += at == where
        if at == where and count[0] == 2:
            torch.rand(3)
            raise error

    def batches() -> Iterator[Tensor]:
        for i in range(3):
            fails("batches")
            yield normal((2, 3), i)

    def forward(call: Callable[..., Any], batch: Any) -> Any:
        output = call(batch)
        fails("forward")
        return output

    def failing_loss(output: Any, batch: Any) -> Tensor:
        fails("loss")
        return loss(output, batch)

    def update(sums: Any, call: Any) -> Any:
        fails("update")
        return sums

    odd = Statistic("odd", "inputs", lambda ref, p: {"n": torch.ones(())}, update, lambda sums, ref, p: sums["n"])
    with unchanged(model), pytest.raises(error):
        seen(model, batches(), [odd, *BY_ROW, statistics.weight_grad, statistics.gate_grad], forward=forward, loss=failing_loss)


def test_the_model_is_as_before_when_a_layer_itself_raises() -> None:
    model = net()
    with unchanged(model), pytest.raises(RuntimeError):
        seen(model, [normal((2, 3), 0), normal((2, 5), 0)], ALL)


def test_dropout_and_batch_norm_are_in_evaluation_mode() -> None:
    x = [normal((3, 3), 0)]
    assert_same(seen(net().train(), x, ALL), seen(net().eval(), x, ALL), rtol=0, atol=0)


@pytest.mark.parametrize("s", each(ALL))
def test_a_fold_under_no_grad_gives_the_same(s: Statistic) -> None:
    model, x = net(), [normal((3, 3), 0)]
    expected = seen(model, x, [s])
    with torch.no_grad(), unchanged(model):
        assert_same(seen(model, x, [s]), expected)


@pytest.mark.parametrize("s", each(ALL))
def test_a_frozen_model_gives_the_same(s: Statistic) -> None:
    x = [normal((3, 3), 0)]
    frozen = net().requires_grad_(False)
    with unchanged(frozen):
        assert_same(seen(frozen, x, [s]), seen(net(), x, [s]))


def test_a_lazy_fold_gives_the_same() -> None:
    x = [normal((3, 3), 0)]
    assert_same(seen(net(), x, ALL, lazy=True), seen(net(), x, ALL))


# Batches of every form.

Pair = namedtuple("Pair", ["x", "y"])


class Named(nn.Module):
    """A model in the manner of Hugging Face: keywords in, a mapping with a loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        out = self.net(x)
        return {"logits": out} if y is None else {"loss": nn.functional.cross_entropy(out, y), "logits": out}


@pytest.mark.parametrize("form", ["tuple", "list", "namedtuple", "nested tuple", "generator", "iterator"])
def test_batches_of_every_form_give_the_same(form: str) -> None:
    model, x, y = net(), normal((2, 3, 3), 0), torch.tensor([[0, 1, 1], [1, 0, 0]])
    both = list(zip(x, y, strict=True))
    batches: Any = {
        "tuple": both,
        "list": [list(b) for b in both],
        "namedtuple": [Pair(*b) for b in both],
        "nested tuple": [((a,), b) for a, b in both],
        "generator": (b for b in both),
        "iterator": iter(both),
    }[form]

    def cross(output: Tensor, batch: Any) -> Tensor:
        assert form != "namedtuple" or isinstance(batch, Pair)
        return nn.functional.cross_entropy(output, batch[1])

    plain = seen(model, both, loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1]))
    whole = {"forward": lambda model, batch: model(batch.x)} if form == "namedtuple" else {}  # a named tuple is one argument
    assert_same(seen(model, batches, loss=cross, **whole), plain)


@pytest.mark.parametrize("form", [dict, UserDict])
@pytest.mark.parametrize("per_sample", ["vmap", "loop"])
def test_mappings_are_spread_as_keywords_and_the_models_own_loss_is_used(form: type, per_sample: str) -> None:
    model, x, y = Named(), normal((2, 3, 3), 0), torch.tensor([[0, 1, 1], [1, 0, 0]])
    got = seen(model, [form(x=a, y=b) for a, b in zip(x, y, strict=True)], loss=None, per_sample=per_sample)
    expected = seen(model.net, list(zip(x, y, strict=True)), loss=lambda out, batch: nn.functional.cross_entropy(out, batch[1]))
    for name, p in expected.items():
        for key, value in p.stats.items():
            torch.testing.assert_close(got[f"net.{name}"].stats[key], value)


def test_mappings_without_a_batch_axis_in_some_values_fold_too() -> None:
    class Flagged(Named):
        def forward(self, x: Tensor, y: Tensor | None = None, twice: bool = False, extra: Any = None) -> dict[str, Tensor]:
            return super().forward(x * 2 if twice else x, y)

    model, x, y = Flagged(), normal((3, 3), 0), torch.tensor([0, 1, 1])
    got = seen(model, [{"x": x, "y": y, "twice": True, "extra": None}], loss=None)
    assert_same(got, seen(model, [{"x": x * 2, "y": y}], loss=None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_takes_float32_inputs_and_sums_in_float32(dtype: torch.dtype) -> None:
    model, x = net(dtype).eval(), normal((64, 3), 0).to(dtype)
    data = seen(model, [x.float()], ALL)
    assert all(v.dtype == torch.float32 and v.isfinite().all() for p in data.values() for v in p.stats.values())
    torch.testing.assert_close(data["a.weight"].stats["input_sq"][0], x.float().square().mean(0))
    torch.testing.assert_close(data["a.weight"].stats["input_gram"][0], x.float().T @ x.float() / 64)
    torch.testing.assert_close(data["a.weight"].stats["output_sq"][:, 0], model.a(x).detach().float().square().mean(0))


def test_float64_inputs_of_a_float32_model_and_integer_targets_are_fitted() -> None:
    model = net(torch.float32)
    x, y = normal((4, 3), 0), torch.tensor([0, 1, 1, 0])
    cross = lambda out, batch: nn.functional.cross_entropy(out, batch[1])  # noqa: E731
    assert_same(seen(model, [(x, y)], ALL, loss=cross), seen(model, [(x.float(), y)], ALL, loss=cross))


# Models of every form.


def test_a_masked_model_runs_masked_and_keeps_its_names() -> None:
    model = net()
    masks = half(model)
    really = copy.deepcopy(model)
    bp.finalize(bp.apply_masks(really, masks))
    bp.apply_masks(model, masks)
    x = [normal((3, 3), 0)]
    got, expected = seen(model, x, ALL), seen(really, x, ALL)
    for name, p in expected.items():
        keep = masks[name].keep
        for key, value in p.stats.items():
            if not key.startswith("weight_grad"):
                torch.testing.assert_close(got[name].stats[key], value, msg=f"{name} {key}")
        assert (got[name].stats["weight_grad"][~bp.expand(keep, masks[name].grid)] == 0).all()
        assert (got[name].stats["gate_fisher"][~keep] == 0).all()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


class Tied(nn.Module):
    """The same, as two modules of one weight."""

    def __init__(self, twice: Twice) -> None:
        super().__init__()
        self.fc, self.second = twice.fc, nn.Linear(4, 4).double()
        self.second.weight, self.second.bias = self.fc.weight, self.fc.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.fc(x)))


def test_a_module_called_twice_adds_up() -> None:
    model, x = Twice(), normal((3, 4), 0)
    rows = torch.cat([x, torch.tanh(model.fc(x))]).detach()
    p = seen(model, [x])["fc.weight"]
    torch.testing.assert_close(p.stats["input_sq"][0], rows.square().mean(0))
    torch.testing.assert_close(p.stats["input_gram"][0], rows.T @ rows / 6)
    torch.testing.assert_close(p.stats["output_sq"][:, 0], model.fc(rows).detach().square().mean(0))


@pytest.mark.parametrize(
    "s",
    each(ALL),
)
def test_tied_parameters_see_all_their_users(s: Statistic) -> None:
    twice, x = Twice(), [normal((3, 4), 0)]
    assert_same(seen(Tied(twice), x, [s]), seen(twice, x, [s]))


@pytest.mark.parametrize(
    "s",
    each([statistics.output_sq, statistics.output_mean, statistics.output_grad_sq]),
)
def test_an_inplace_relu_behind_a_layer_changes_nothing(s: Statistic) -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=inplace), nn.Linear(4, 2)).double() for inplace in (True, False)]
    models[0].load_state_dict(models[1].state_dict())
    for shape in ((5, 3), (2, 5, 3)):  # with more axes, the output is a view
        x = [normal(shape, 0)]
        assert_same(seen(models[0], x, [s]), seen(models[1], x, [s]))


class Residual(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.fc, self.inplace = nn.Linear(4, 4).double(), inplace

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.fc(x).detach()
        return x.add_(y) if self.inplace else x + y


@pytest.mark.parametrize(
    "s",
    each([statistics.input_sq, statistics.input_gram]),
)
def test_an_input_written_to_after_the_layer_changes_nothing(s: Statistic) -> None:
    models = [Residual(inplace) for inplace in (True, False)]
    models[0].load_state_dict(models[1].state_dict())
    x = [normal((5, 4), 0)]
    assert_same(seen(models[0], x, [s]), seen(models[1], x, [s]))


class Branches(nn.Module):
    """Layers that follow each other, one that stands apart, one that is called twice, one that only some batches reach."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.apart, self.some = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(3, 4), nn.Linear(4, 4)
        self.prompt = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu_(self.b(self.a(torch.cat([x, self.prompt]))))) + self.apart(torch.cat([x, self.prompt]))
        return self.some(y) if len(x) > 1 else y


@pytest.mark.parametrize("where", [TILES, bp.named("some.weight", (2, 2))])
@pytest.mark.parametrize("trained", [True, False])
def test_gradients_of_outputs_alone_are_those_beside_gradients_of_weights(trained: bool, where: bp.Where) -> None:
    model = Branches().double().requires_grad_(trained)
    x = [normal((n, 3), n) for n in (4, 1, 2)]
    x[1].requires_grad_()
    alone = seen(model, x, [statistics.output_grad_sq], where=where)
    beside = seen(model, x, [statistics.output_grad_sq, statistics.weight_grad], where=where)
    for name, p in alone.items():
        torch.testing.assert_close(p.stats["output_grad_sq"], beside[name].stats["output_grad_sq"], rtol=0, atol=0)


def test_gradients_of_outputs_alone_cost_none_of_weights() -> None:
    class Costly(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return weight * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            spent.append(1)
            return grad

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, Costly.apply(self.weight), self.bias)

    spent: list[int] = []
    model, x = nn.Sequential(Layer(3, 4), nn.Tanh(), Layer(4, 2)).double(), [normal((5, 3), 0)]
    seen(model, x, [statistics.output_grad_sq])
    assert not spent
    seen(model, x, [statistics.output_grad_sq, statistics.weight_grad])
    assert len(spent) == 2


@pytest.mark.parametrize("s", each([statistics.input_sq, statistics.output_grad_sq]))
def test_a_padded_encoder_is_looked_at_without_its_fast_path(s: Statistic) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2).double()
    padding = torch.tensor([[False, False, False], [False, False, True]])
    options = {"forward": lambda m, b: m(b, src_key_padding_mask=padding)[~padding], "where": bp.named("*linear?.weight", (2, 2))}
    found = seen(model, [normal((2, 3, 4), 0)], [s], **options)
    with disable_attention_fastpath():
        assert_same(found, seen(model, [normal((2, 3, 4), 0)], [s], **options))


class Checkpointed(nn.Module):
    """Forgets what is in its body and calls it again in the backward."""

    def __init__(self, body: nn.Module, forgets: bool) -> None:
        super().__init__()
        self.body, self.forgets = body, forgets

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.forgets else self.body(x)


BODIES = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)),
    "convolution": lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 2, 2)),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("stats", [[statistics.output_grad_sq], [statistics.input_sq, statistics.output_grad_sq, statistics.weight_grad]])
def test_checkpoints_change_nothing(kind: str, stats: list[Statistic]) -> None:
    body = BODIES[kind]().double()
    x = [normal((3, 2, 4), 0), normal((5, 2, 4), 1)]
    rule = bp.named("*linear?.weight", (2, 2)) if kind == "attention" else bp.first_of(bp.linears((2, 2)), bp.convs((1, 1)))
    if len(stats) > 1 and kind == "attention":
        rule = bp.first_of(rule, bp.named("*out_proj.weight", (2, 2)))
        stats = stats[:1] + stats[2:]
    first, second = (
        collect.fold(Checkpointed(body, forgets), where=rule, statistics=stats, batches=x, loss=lambda y, _: y.exp().sum()).sums
        for forgets in (True, False)
    )
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("s", each(ALL))
def test_a_module_under_two_names_counts_each_of_its_calls_once(s: Statistic) -> None:
    class Once(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    layer, x = nn.Linear(3, 3).double(), [normal((4, 3), 0), normal((2, 3), 1)]
    twice = collect.fold(nn.Sequential(layer, layer), where=TILES, statistics=[s], batches=x, loss=loss)
    once = collect.fold(Once(layer), where=TILES, statistics=[s], batches=x, loss=loss)
    torch.testing.assert_close(twice.sums["0.weight", s.name], once.sums["layer.weight", s.name])


def test_batches_are_not_written_to() -> None:
    x = normal((5, 3), 0)
    before, version = x.clone(), x._version
    seen(net(), [x], ALL)
    assert torch.equal(x, before)
    assert x._version == version


# Padding.


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.fc(self.embed(input_ids))))


@settings(max_examples=10)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.booleans())
def test_padding_masks_weigh_tokens_as_if_padding_were_not_there(lengths: list[int], left: bool) -> None:
    model = Tokens().double()
    ids = [torch.randint(5, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]
    long = max(lengths)
    padded, mask = torch.full((len(ids), long), 4), torch.zeros(len(ids), long, dtype=torch.long)
    for i, row in enumerate(ids):
        at = slice(long - len(row), long) if left else slice(0, len(row))
        padded[i, at], mask[i, at] = row, 1
    options: dict[str, Any] = {"where": bp.first_of(TILES, bp.named("embed.weight", (2, 2)))}
    stats = [s for s in BY_ROW if s.name != "input_gram"]
    got = seen(model, [{"input_ids": padded, "attention_mask": mask}], stats, **options)
    expected = seen(model, [{"input_ids": row[None]} for row in ids], stats, **options)
    assert_same(got, expected)
    assert_same(
        seen(model, [{"input_ids": padded, "attention_mask": mask}], [statistics.input_gram]),
        seen(model, [{"input_ids": r[None]} for r in ids], [statistics.input_gram]),
    )
    own = seen(model, [padded], stats, **options, token_weights=lambda batch: mask)
    assert_same(own, expected)


@pytest.mark.parametrize(
    ("batch_first", "length"),
    [(True, 3), (True, 2), (False, 3), pytest.param(False, 2)],
)
def test_padding_is_weighed_in_attention_of_either_layout(batch_first: bool, length: int) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, batch_first=batch_first)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            return self.attend(x, x, x, key_padding_mask=attention_mask == 0)[0]

    model, x = Attends().double(), normal((2, length, 4), 0)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, -1] = 0  # not symmetric
    where = bp.first_of(bp.named("*.in_proj_weight", (2, 2)), TILES)
    stats = [statistics.input_sq, statistics.input_gram]
    got = seen(model, [{"x": x, "attention_mask": mask}], stats, where=where)
    alone = [{"x": x[i : i + 1, :n], "attention_mask": mask[i : i + 1, :n]} for i, n in enumerate((length - 1, length))]
    assert_same(got, seen(model, alone, stats, where=where))


def test_padding_is_weighed_where_tokens_are_flattened() -> None:
    class Flat(Tokens):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.head(torch.tanh(self.fc(self.embed(input_ids).flatten(0, 1))))

    model, ids = Flat().double(), torch.tensor([[0, 1, 4], [2, 4, 4]])
    mask = (ids != 4).long()
    got = seen(model, [{"input_ids": ids, "attention_mask": mask}], BY_ROW)
    assert_same(got, seen(model, [{"input_ids": ids[mask == 1][:, None]}], BY_ROW))


class Heads(Tokens):
    """Works on each head of each token; its axes are in the given order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.own = order, nn.Linear(2, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids).unflatten(-1, (-1, 2))  # [batch, positions, heads, 2]
        x = {"batch first": x, "transposed": x.transpose(0, 1), "flat": x.flatten(0, 1)}[self.order]
        return self.own(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("order", ["batch first", "transposed", "flat"])
def test_padding_is_weighed_where_tokens_have_heads(order: str) -> None:
    model, ids = Heads(order).double(), torch.tensor([[0, 1, 4], [2, 4, 4]])
    options: dict[str, Any] = {"where": bp.named("own.weight", (2, 2))}
    got = seen(model, [{"input_ids": ids, "attention_mask": (ids != 4).long()}], BY_ROW, **options)
    assert_same(got, seen(model, [{"input_ids": row[row != 4][None]} for row in ids], BY_ROW, **options))


class Prepended(Tokens):
    """Puts a row before the tokens of each sample, and ends with that row alone."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        x = self.fc(torch.cat((x.mean(1, keepdim=True), x), 1))
        return self.head(torch.tanh(x[:, 0]))  # type: ignore[no-any-return]


def test_rows_in_an_unknown_order_are_warned_of_once_if_there_is_padding() -> None:
    model, ids = Prepended().double(), torch.tensor([[0, 1, 4], [2, 4, 4]])
    batch = {"input_ids": ids, "attention_mask": (ids != 4).long()}
    with pytest.warns(UserWarning, match="token_weights") as caught:
        seen(model, [batch, batch], BY_ROW)
    assert len(caught) == 1
    says = str(caught[0].message)
    assert says.startswith("fc.weight: its rows (2, 4) are not those of the token weights (2, 3)")
    assert "give token_weights=" in says
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        seen(model, [full], BY_ROW)
        seen(model, [batch], BY_ROW, token_weights=lambda batch: None)
        own = seen(model, [batch], BY_ROW, token_weights=lambda batch: F.pad(batch["attention_mask"], (1, 0), value=1))
    assert own["fc.weight"].stats.keys() == {s.name for s in BY_ROW}


# Errors.


def says(error: BaseException, *parts: str) -> None:
    for part in parts:
        assert part in str(error), (part, str(error))


@pytest.mark.parametrize("s", each([s for s in ALL if s.name != "gate_flow"]))
def test_a_nan_names_the_layer_the_statistic_and_the_batch(s: Statistic) -> None:
    model = net()
    good, bad = normal((2, 3), 0), normal((2, 3), 0)
    bad[0, 0] = float("nan")
    with unchanged(model), pytest.raises(ValueError) as caught:
        seen(model, [good, bad], [s])
    layer = "b.weight (2, 4)" if str(caught.value).startswith("b") and s.name == "output_grad_sq" else "a.weight (4, 3)"  # backward
    says(caught.value, layer, s.name, "batch 1")


def test_an_infinite_gradient_names_the_layer_and_the_batch() -> None:
    model = net()
    with unchanged(model), pytest.raises(ValueError) as caught:
        seen(model, list(normal((2, 2, 3), 0)), [statistics.weight_grad], loss=lambda out, batch: out.sum() * float("inf"))
    says(caught.value, "a.weight (4, 3)", "weight_grad", "batch 0")


class Idle(Net):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(4, 4)


@pytest.mark.parametrize("s", each(ALL))
def test_a_layer_that_the_forward_never_calls_is_named(s: Statistic) -> None:
    model = Idle().double()
    with unchanged(model), pytest.raises(ValueError) as caught:
        seen(model, [normal((2, 3), 0)], [s])
    says(caught.value, "idle.weight (4, 4)", "never calls", s.name, "excluding")
    seen(model, [normal((2, 3), 0)], [s], where=bp.excluding(TILES, "idle.*"))  # the remedy


@pytest.mark.parametrize("batches", [[], (), iter(()), (x for x in [])], ids=["list", "tuple", "iterator", "generator"])
@pytest.mark.parametrize("stats", [[statistics.input_sq], [statistics.gate_grad], ALL], ids=["layer", "gates", "all"])
def test_no_batches_are_an_error(batches: Any, stats: list[Statistic]) -> None:
    model = net()
    with unchanged(model), pytest.raises(ValueError, match="batches is empty"):
        seen(model, batches, stats)


@pytest.mark.parametrize(
    "batches", [torch.ones(2, 3), {"x": torch.ones(2, 3)}, UserDict(x=torch.ones(2, 3))], ids=["tensor", "dict", "user dict"]
)
def test_one_batch_instead_of_batches_is_an_error_with_the_remedy(batches: Any) -> None:
    model = net()
    with unchanged(model), pytest.raises(TypeError) as caught:
        seen(model, batches)
    says(caught.value, f"batches is one {type(batches).__name__}", "[batch]")


def test_batches_that_are_no_iterable_are_an_error() -> None:
    model = net()
    with unchanged(model), pytest.raises(TypeError, match=r"batches.*int.*iterable"):
        seen(model, 3)


@pytest.mark.parametrize("batch", ["text", 3, None, object()], ids=["str", "int", "None", "object"])
def test_a_batch_of_a_wrong_type_names_its_number_and_type(batch: Any) -> None:
    model = net()
    with unchanged(model), pytest.raises(TypeError) as caught:
        seen(model, [normal((2, 3), 0), batch])
    says(caught.value, "batch 1", type(batch).__name__)


LOSSES: dict[str, tuple[Any, list[str]]] = {
    "vector": (lambda out, batch: out, ["shape", "mean or sum"]),
    "float": (lambda out, batch: 1.0, ["float", "mean or sum"]),
    "detached": (lambda out, batch: out.detach().sum(), ["gradient", "detached"]),
    "constant": (lambda out, batch: torch.ones(()), ["gradient", "detached"]),
    "missing": (None, ["give Calibration(batches, loss=", "Tensor", "has no loss"]),
}


@pytest.mark.parametrize(
    ("s", "kind"),
    [
        pytest.param(
            s,
            k,
            id=f"{s.name}-{k}",
        )
        for s in (statistics.weight_grad, statistics.output_grad_sq, *BY_SAMPLE, statistics.gate_hessian_grad)
        for k in LOSSES
    ],
)
def test_a_loss_that_cannot_be_used_says_why(s: Statistic, kind: str) -> None:
    model = net()
    with unchanged(model), pytest.raises(ValueError) as caught:
        seen(model, [normal((2, 3), 0)], [s], loss=LOSSES[kind][0])
    says(caught.value, s.name, "loss", *LOSSES[kind][1])


class Looks(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if x.sum().item() > 0 else 1.0)


def test_an_operation_that_vmap_cannot_run_names_the_remedy() -> None:
    model, x = Looks().double(), [normal((4, 3), 0)]
    with unchanged(model), pytest.raises(RuntimeError) as caught:
        seen(model, x, BY_SAMPLE)
    says(caught.value, "item", "per_sample='loop'")
    seen(model, x, BY_SAMPLE, per_sample="loop")


def test_an_unknown_way_of_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"per_sample='both' must be 'vmap' or 'loop'"):
        seen(net(), [normal((2, 3), 0)], per_sample="both")


@pytest.mark.parametrize("call", [collect.with_statistics, collect.fold], ids=lambda f: f.__name__)
def test_a_calibration_is_given_as_a_value_or_by_its_fields_and_not_both(call: Callable[..., Any]) -> None:
    model, batches = net(), [normal((2, 3), 0)]
    calibration = bp.Calibration(batches, loss=loss)
    options: dict[str, Any] = {"where": TILES, "statistics": [statistics.weight_grad]}
    for extra in ({"batches": batches}, {"loss": loss}, {"progress": False}):
        with unchanged(model), pytest.raises(TypeError) as caught:
            call(model, **options, calibration=calibration, **extra)
        says(caught.value, *extra, "calibration", "both", "attrs.evolve(calibration")
    with unchanged(model), pytest.raises(TypeError, match=r"calibration=bp\.Calibration\(batches, \.\.\.\).*batches="):
        call(model, **options)
    results = [call(model, **options, calibration=calibration), call(model, **options, batches=batches, loss=loss)]
    assert_same(*(r if call is collect.with_statistics else collect.compute(r) for r in results), rtol=0, atol=0)


@pytest.mark.parametrize("stats", [[], [statistics.input_sq, statistics.input_sq]], ids=["none", "twice"])
def test_no_statistics_or_two_of_one_name_are_an_error(stats: list[Statistic]) -> None:
    with pytest.raises(ValueError, match="must hold at least one statistic, and no two of the same name"):
        seen(net(), [normal((2, 3), 0)], stats)


@pytest.mark.parametrize(
    ("stats", "says"),
    [
        ([statistics.gate_hessian_diagonal], r"gate_hessian_diagonal, which is no Statistic; call it: gate_hessian_diagonal\(\)"),
        (["input_sq"], r"'input_sq', a name; give the statistic itself: \[bp\.statistics\.input_sq\]"),
        ("input_sq", r"give the statistic itself: \[bp\.statistics\.input_sq\]"),
        (statistics.input_sq, r"is one statistic; give a list: \[input_sq\]"),
        ([1], r"int, which is no Statistic; give some of bp\.statistics"),
    ],
)
def test_what_is_no_statistic_is_named(stats: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        collect.with_statistics(net(), where=TILES, statistics=stats, batches=[normal((2, 3), 0)])
    collector = partial(collect.with_statistics, where=TILES, statistics=stats, batches=[normal((2, 3), 0)])
    if isinstance(stats, list):
        with pytest.raises(TypeError, match=says):
            bp.Pipeline(collector, bp.metric.wanda, bp.allocate.per_row).scores(net())


def test_only_folds_of_the_same_merge() -> None:
    options: dict[str, Any] = {"statistics": [statistics.input_sq], "batches": [normal((2, 3), 0)]}
    a, b = collect.fold(net(), where=TILES, **options), collect.fold(net(), where=bp.excluding(TILES, "b.*"), **options)
    with pytest.raises(ValueError, match=re.escape("b.weight")):
        collect.merge(a, b)


def test_recurrent_weights_say_that_their_input_cannot_be_seen_and_what_can() -> None:
    model = nn.LSTM(3, 4, batch_first=True).double()
    where = bp.named("weight_*", (2, 2))
    options: dict[str, Any] = {"where": where, "loss": lambda out, batch: out[0].square().mean()}
    with unchanged(model), pytest.raises(NotImplementedError) as caught:
        seen(model, [normal((2, 5, 3), 0)], [statistics.input_sq], **options)
    says(caught.value, "weight_ih_l0", "LSTM", "gate_grad", "excluding")
