"""Each statistic equals its definition, computed in loops and float64."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import blockprune as bp
from blockprune import collect, statistics
from blockprune.statistics import Statistic, inputs

INPUTS = [statistics.input_sq, statistics.input_mean, statistics.input_gram]
BY_OUTPUT: dict[str, tuple[Statistic, Callable[[Tensor], Tensor]]] = {
    "output_sq": (statistics.output_sq, torch.square),
    "output_mean": (statistics.output_mean, lambda y: y),
    "apoz": (statistics.apoz, lambda y: (y <= 0).double()),
    "mean_activation": (statistics.mean_activation, lambda y: y.clamp(min=0)),
    "custom": (statistics.activation("custom", torch.exp), torch.exp),
}


def seen(model: nn.Module, batches: Any, *stats: Statistic, block: Any = (1,), pattern: str = "*weight", **options: Any) -> Any:
    data = collect.with_statistics(model, where=bp.named(pattern, block), statistics=stats, batches=batches, **options)
    return {name: p.stats for name, p in data.items()}


def only(model: nn.Module, batches: Any, *stats: Statistic, **options: Any) -> dict[str, Tensor]:
    (found,) = seen(model, batches, *stats, **options).values()
    return found


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-9, atol=1e-11)


def seeded(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().double()


# Inputs.


def check_inputs(got: dict[str, Tensor], groups: list[Tensor], weight: Tensor) -> None:
    """Groups of rows ``[n, k]``, each for its share of the weight's rows."""
    share = len(weight) // len(groups)
    for name, moment in {"input_sq": 2, "input_mean": 1}.items():
        full = got[name].expand_as(weight).flatten(1)
        for row in range(len(weight)):
            x = groups[row // share]
            close(full[row], torch.stack([sum(v**moment for v in x[:, j]) / len(x) for j in range(x.shape[1])]))
    grams = []
    for x in groups:
        gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        for row in x:
            gram += torch.outer(row, row)
        grams.append(gram / len(x))
    close(got["input_gram"], torch.stack(grams))


@settings(max_examples=10)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 4), seeds)
def test_inputs_of_a_linear_of_any_rank(leading: list[int], features: int, seed: int) -> None:
    model, x = seeded(lambda: nn.Linear(features, 3)), normal((*leading, features), seed)
    check_inputs(only(model, [x], *INPUTS), [x.reshape(-1, features)], model.weight)


@pytest.mark.parametrize("batched", [True, False])
def test_a_linear_given_by_keyword_and_subclassed_is_seen(batched: bool) -> None:
    class Mine(nn.Linear):
        pass

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = Mine(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    x = normal((4, 3) if batched else (1, 3), 0)
    model = seeded(Calls)
    check_inputs(only(model, [x], *INPUTS), [x], model.fc.weight)


def patches(conv: Any, x: Tensor) -> list[Tensor]:
    """What the taps of a convolution see, group by group, one output position after the other."""
    if isinstance(conv.padding, str):
        total = [d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in conv.padding]
    flat = [side for pair in reversed(sides) for side in pair]
    x = F.pad(x, flat) if conv.padding_mode == "zeros" else F.pad(x, flat, mode=conv.padding_mode)
    steps = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
    positions = [range(0, size - d * (k - 1), s) for size, k, s, d in steps]
    per_group = conv.in_channels // conv.groups
    found = []
    for group in range(conv.groups):
        rows = []
        for sample, at in itertools.product(x, itertools.product(*positions)):
            seen_here = []
            for channel in range(group * per_group, (group + 1) * per_group):
                for tap in itertools.product(*map(range, conv.kernel_size)):
                    where = tuple(a + t * d for a, t, d in zip(at, tap, conv.dilation, strict=True))
                    seen_here.append(sample[(channel, *where)])
            rows.append(torch.stack(seen_here))
        found.append(torch.stack(rows))
    return found


CONVS = [
    pytest.param(*case, id=f"{case[0].__name__}-" + "-".join(f"{k}={v}" for k, v in case[2].items()))
    for case in [
        (nn.Conv1d, (5,), {}),
        (nn.Conv1d, (6,), {"stride": 2, "padding": 1, "groups": 2}),
        (nn.Conv1d, (6,), {"padding": 2, "dilation": 2, "padding_mode": "circular"}),
        (nn.Conv1d, (6,), {"padding": "same"}),
        (nn.Conv2d, (4, 5), {"padding": (1, 0), "stride": (1, 2)}),
        (nn.Conv2d, (5, 4), {"padding": 1, "dilation": (2, 1), "groups": 4}),
        (nn.Conv2d, (4, 4), {"padding": 1, "padding_mode": "circular", "groups": 2}),
        (nn.Conv2d, (4, 4), {"padding": "same", "padding_mode": "reflect"}),
        (nn.Conv2d, (4, 4), {"padding": 1, "padding_mode": "replicate", "bias": False}),
        (nn.Conv3d, (3, 3, 4), {"stride": 2, "padding": (1, 1, 0), "groups": 2}),
        (nn.Conv3d, (3, 3, 3), {"padding": 1, "padding_mode": "circular"}),
    ]
]


@pytest.mark.parametrize(("kind", "size", "options"), CONVS)
def test_inputs_of_a_convolution(kind: Any, size: tuple[int, ...], options: dict[str, Any]) -> None:
    kernel = {1: (3,), 2: (3, 2), 3: (2, 1, 2)}[len(size)]
    conv = seeded(lambda: kind(4, 8, kernel, **options))
    x = normal((2, 4, *size), 0)
    groups = patches(conv, x)
    rows = torch.cat([w @ p.T for w, p in zip(conv.weight.flatten(1).chunk(conv.groups), groups, strict=True)])  # the twin is right
    bias = 0 if conv.bias is None else conv.bias[:, None]
    close((rows + bias).detach(), conv(x).detach().movedim(1, 0).flatten(1))
    check_inputs(only(conv, [x], *INPUTS), groups, conv.weight)


def test_inputs_and_outputs_of_an_unbatched_convolution() -> None:
    conv, x = seeded(lambda: nn.Conv2d(2, 3, 2)), normal((2, 4, 4), 0)
    check_inputs(only(conv, [x], *INPUTS), patches(conv, x[None]), conv.weight)
    close(only(conv, [x], statistics.output_sq)["output_sq"].flatten(), conv(x).detach().square().mean((1, 2)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kind", "size", "options"),
    [
        pytest.param(nn.ConvTranspose1d, (3,), {}),
        pytest.param(nn.ConvTranspose2d, (3, 2), {"stride": 2}),
        (nn.ConvTranspose1d, (3,), {"padding": 1}),  # as many outputs as inputs
        pytest.param(nn.ConvTranspose3d, (2, 2, 2), {}),
    ],
)
def test_inputs_of_a_transposed_convolution(kind: Any, size: tuple[int, ...], options: dict[str, Any], groups: int) -> None:
    conv = seeded(lambda: kind(4, 6, 3, groups=groups, **options))
    x = normal((2, 4, *size), 0)
    got = only(conv, [x], statistics.input_sq, statistics.input_mean)
    for channel in range(4):
        values = x[:, channel].flatten()
        close(
            got["input_sq"][channel].expand(conv.weight.shape[1:]), (sum(v**2 for v in values) / len(values)).expand(conv.weight.shape[1:])
        )
        close(got["input_mean"][channel].flatten()[0], sum(values) / len(values))


def test_input_gram_of_what_has_its_input_along_axis_0_says_what_to_use() -> None:
    for model, x in ((nn.ConvTranspose1d(2, 2, 1), normal((1, 2, 3), 0)), (nn.Embedding(3, 2), torch.tensor([1]))):
        with pytest.raises(NotImplementedError, match=r"weight \(.*\): input_gram needs .* collect input_sq"):
            seen(model, [x], statistics.input_gram)


@settings(max_examples=10)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=8), st.booleans())
def test_inputs_of_an_embedding_are_how_often_a_row_is_read(ids: list[int], two_d: bool) -> None:
    model = seeded(lambda: nn.Embedding(5, 3))
    x = torch.tensor([ids, ids[::-1]]) if two_d else torch.tensor(ids)
    got = only(model, [x], statistics.input_sq, statistics.input_mean)
    for row in range(5):
        for value in got.values():
            close(value.expand(5, 3)[row], torch.full((3,), ids.count(row) / len(ids), dtype=torch.float64))


# Attention.


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, **options)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attend(query, key, value, attn_mask=mask, need_weights=False)[0]


def before_projection(attend: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The heads' outputs side by side, sample by sample and token by token: ``[B, T, E]`` from batch-first inputs."""
    if attend.in_proj_weight is None:
        ws = [attend.q_proj_weight, attend.k_proj_weight, attend.v_proj_weight]
    else:
        ws = list(attend.in_proj_weight.chunk(3))
    bias = torch.zeros(12).double() if attend.in_proj_bias is None else attend.in_proj_bias
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), ws, bias.chunk(3), strict=True))
    out = torch.zeros(len(q), q.shape[1], 4, dtype=torch.float64)
    for b, t, head in itertools.product(range(len(q)), range(q.shape[1]), range(2)):
        at = slice(2 * head, 2 * head + 2)
        share = torch.stack([(q[b, t, at] @ k[b, s, at]) / math.sqrt(2) for s in range(k.shape[1])]).softmax(0)
        out[b, t, at] = sum(p * v[b, s, at] for s, p in enumerate(share))
    return out.detach()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_inputs_of_attention(batch_first: bool, bias: bool, masked: bool) -> None:
    model = seeded(lambda: Attends(batch_first=batch_first, bias=bias))
    x = [normal((2, 3, 4), i) for i in range(3)]
    plain = model.attend
    rows = before_projection(plain, *x).flatten(0, 1)
    weights = plain.in_proj_weight.detach().clone(), plain.out_proj.weight.detach().clone()
    y = (rows @ weights[1].T + (0 if plain.out_proj.bias is None else plain.out_proj.bias)).detach()
    batch = x if batch_first else [v.transpose(0, 1) for v in x]
    order = (lambda out: out) if batch_first else (lambda out: out.transpose(0, 1))
    close(order(model(*batch)).flatten(0, 1).detach(), y)  # the twin is right
    if masked:
        keep = torch.tensor([[True, False], [False, True]])
        bp.apply_masks(model, {"attend.out_proj.weight": bp.BlockMask(keep, bp.BlockGrid((4, 4), (2, 2)))})
        y = model(*batch).detach()
        y = order(y).flatten(0, 1)
    got = seen(model, [(batch,)], *INPUTS, pattern="*proj*weight")
    check_inputs(got["attend.in_proj_weight"], [v.flatten(0, 1) for v in x], weights[0])
    check_inputs(got["attend.out_proj.weight"], [rows], weights[1])
    got = seen(model, [(batch,)], statistics.output_sq, pattern="*out_proj.weight")
    close(got["attend.out_proj.weight"]["output_sq"].flatten(), y.square().mean(0))


def test_inputs_of_attention_with_keys_of_another_width() -> None:
    model = seeded(lambda: Attends(kdim=3, vdim=5, batch_first=True))
    x = normal((2, 3, 4), 0), normal((2, 3, 3), 1), normal((2, 3, 5), 2)
    got = seen(model, [(x,)], *INPUTS, pattern="*proj*weight")
    for name, v in zip("qkv", x, strict=True):
        check_inputs(got[f"attend.{name}_proj_weight"], [v.flatten(0, 1)], getattr(model.attend, f"{name}_proj_weight"))
    check_inputs(got["attend.out_proj.weight"], [before_projection(model.attend, *x).flatten(0, 1)], model.attend.out_proj.weight)


def test_inputs_of_cross_attention_with_more_keys_than_queries() -> None:
    model = seeded(lambda: Attends(batch_first=True))
    x = normal((2, 2, 4), 0), normal((2, 5, 4), 1), normal((2, 5, 4), 2)
    got = only(model, [(x,)], *INPUTS, pattern="*in_proj_weight")
    check_inputs(got, [v.flatten(0, 1) for v in x], model.attend.in_proj_weight)


def test_outputs_of_in_proj_are_refused_with_a_reason() -> None:
    model, x = seeded(lambda: Attends(batch_first=True)), [normal((2, 3, 4), i) for i in range(3)]
    with pytest.raises(NotImplementedError, match="in_proj_weight"):
        seen(model, [(x,)], statistics.output_sq, pattern="*in_proj_weight")


def test_every_linear_of_a_transformer_layer_is_seen_though_torch_has_a_fast_path_without_calls() -> None:
    layer = seeded(lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)).eval()
    x = normal((2, 3, 4), 0)
    got = seen(layer, [x], statistics.input_sq, block=(2, 2), pattern="*linear*.weight")
    hidden = layer.norm1(x + layer.self_attn(x, x, x)[0]).detach()
    close(got["linear1.weight"]["input_sq"].flatten(), hidden.square().mean((0, 1)))
    got = seen(layer, [x], statistics.input_sq, block=(2, 2), pattern="*out_proj.weight")
    close(got["self_attn.out_proj.weight"]["input_sq"].flatten(), before_projection(layer.self_attn, x, x, x).square().mean((0, 1)))


# Outputs.


@pytest.mark.parametrize("name", BY_OUTPUT)
@pytest.mark.parametrize(
    ("make", "shape", "axis"),
    [
        (lambda: nn.Linear(3, 4), (2, 3), -1),
        (lambda: nn.Linear(3, 4), (2, 2, 2, 3), -1),
        (lambda: nn.Conv1d(3, 4, 2), (2, 3, 4), 1),
        (lambda: nn.Conv2d(4, 6, 2, groups=2), (2, 4, 3, 3), 1),
        (lambda: nn.ConvTranspose2d(4, 3, 2, stride=2), (2, 4, 2, 2), 1),
    ],
    ids=["linear", "linear-4d", "conv1d", "conv2d", "transposed"],
)
def test_outputs(name: str, make: Any, shape: tuple[int, ...], axis: int) -> None:
    model, x = seeded(make), normal(shape, 0)
    s, function = BY_OUTPUT[name]
    got = only(model, [x], s)[name]
    y = model(x).detach().movedim(axis, -1).flatten(0, -2)
    expected = torch.stack([sum(function(v) for v in y[:, j]) / len(y) for j in range(y.shape[1])])
    along = 1 if isinstance(model, nn.ConvTranspose2d) else 0
    assert got.ndim == model.weight.ndim
    assert got.numel() == got.shape[along] == len(expected)
    close(got.flatten(), expected)


def test_outputs_of_a_grouped_transposed_convolution() -> None:
    model, x = seeded(lambda: nn.ConvTranspose1d(4, 6, 2, groups=2)), normal((2, 4, 3), 0)
    got = only(model, [x], statistics.output_sq)["output_sq"].expand(model.weight.shape)
    y = model(x).detach().square().mean((0, 2))
    for i, j in itertools.product(range(4), range(3)):
        close(got[i, j, 0], y[3 * (i // 2) + j])


def test_outputs_of_an_embedding_lie_along_its_second_axis() -> None:
    model, x = seeded(lambda: nn.Embedding(5, 3)), torch.tensor([[0, 3, 3]])
    close(only(model, [x], statistics.output_sq)["output_sq"], model(x).detach().square().mean(1))


@pytest.mark.parametrize("first", ["linear", pytest.param("conv")])
def test_output_grad_sq_is_the_gradient_of_the_loss_with_respect_to_each_output(first: str) -> None:
    layer = {"linear": lambda: nn.Linear(4, 3), "conv": lambda: nn.Conv1d(2, 3, 2)}[first]
    model = seeded(lambda: nn.Sequential(layer(), nn.Tanh(), nn.Flatten(), nn.Linear(6 if first == "linear" else 9, 2)))
    x = normal((4, 2, 4), 0)
    got = seen(model, [x], statistics.output_grad_sq, loss=lambda out, batch: out.exp().sum())
    hidden = model[0](x)
    out = model[1:](hidden)
    of_hidden, of_out = torch.autograd.grad(out.exp().sum(), [hidden, out])
    close(got["0.weight"]["output_grad_sq"].flatten(), of_hidden.square().sum((0, 1 if first == "linear" else 2)))
    close(got["3.weight"]["output_grad_sq"].flatten(), of_out.square().sum(0))


# Gradients of weights.


class Tiny(nn.Module):
    """3 -> 4 -> 2, smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def loss(output: Tensor, batch: Any) -> Tensor:
    return (output.square() * torch.tensor([1.0, 3.0], dtype=output.dtype) + output.exp()).sum(-1).mean()


BLOCK = (2, 2)


def gated_loss(model: nn.Module, gates: dict[str, Tensor], x: Tensor) -> Tensor:
    """The loss with each block's weights times its gate, block by block."""
    weights = {}
    for name, gate in gates.items():
        weight = model.get_parameter(name).detach()
        rows = []
        for i in range(weight.shape[0]):
            rows.append(torch.stack([weight[i, j] * gate[i // BLOCK[0], j // BLOCK[1]] for j in range(weight.shape[1])]))
        weights[name] = torch.stack(rows)
    return loss(functional_call(model, weights, (x,)), x)


def open_gates(model: nn.Module) -> dict[str, Tensor]:
    shapes = {name: p.shape for name, p in model.named_parameters() if p.ndim == 2}
    size = {name: [math.ceil(s / b) for s, b in zip(shape, BLOCK, strict=True)] for name, shape in shapes.items()}
    return {name: torch.ones(s, dtype=torch.float64, requires_grad=True) for name, s in size.items()}


def test_weight_grad_is_the_mean_of_the_batches_gradients() -> None:
    model, batches = seeded(Tiny), list(normal((3, 2, 3), 0))
    got = seen(model, batches, statistics.weight_grad, statistics.weight_grad_sq, loss=loss)
    grads = [torch.autograd.grad(loss(model(x), x), [model.a.weight, model.b.weight]) for x in batches]
    for i, name in enumerate(["a.weight", "b.weight"]):
        close(got[name]["weight_grad"], sum(g[i] for g in grads) / 3)
        close(got[name]["weight_grad_sq"], sum(g[i] ** 2 for g in grads) / 3)


def test_a_weight_that_a_batch_does_not_reach_has_gradient_zero_there() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.even, self.odd = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.even(x) if len(x) % 2 == 0 else self.odd(x)

    model, batches = seeded(Routed), [normal((2, 2), 0), normal((3, 2), 1)]
    got = seen(model, batches, statistics.weight_grad, loss=lambda out, batch: out.square().mean())
    (expected,) = torch.autograd.grad(model(batches[0]).square().mean(), model.even.weight)
    close(got["even.weight"]["weight_grad"], expected / 2)


# Gradients of gates.


@pytest.mark.parametrize("per_sample", ["vmap", "loop"])
@pytest.mark.parametrize("chunk_size", [1, 2, 8])
def test_gate_grad_and_gate_fisher_sample_by_sample(per_sample: str, chunk_size: int) -> None:
    model, x = seeded(Tiny), normal((5, 3), 0)
    options: dict[str, Any] = {"block": BLOCK, "loss": loss, "per_sample": per_sample, "chunk_size": chunk_size}
    got = seen(model, [x[:2], x[2:]], statistics.gate_grad, statistics.gate_fisher, **options)
    gates = open_gates(model)
    grads = [torch.autograd.grad(gated_loss(model, gates, row[None]), list(gates.values())) for row in x]
    for i, name in enumerate(gates):
        close(got[name]["gate_grad"], sum(g[i] for g in grads) / 5)
        close(got[name]["gate_fisher"], sum(g[i] ** 2 for g in grads) / 5)


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 2))


def embed_net() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def transformer() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 2))


MODELS = {
    "conv": (conv_net, normal((3, 2, 3, 3), 0), "[05].weight"),
    "embed": (embed_net, torch.tensor([[0, 1], [4, 4]]), "[02].weight"),
    "transformer": (transformer, normal((3, 3, 4), 0), "*[jr1]*weight"),  # in_proj, out_proj, linear1, linear2, norm1 and the head
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", MODELS)
def test_loop_equals_vmap(kind: str) -> None:
    make, x, pattern = MODELS[kind]
    model, stats = seeded(make), [statistics.gate_grad, statistics.gate_fisher]
    a, b = (seen(model, [x], *stats, pattern=pattern, block=(2,), loss=loss, per_sample=way) for way in ("vmap", "loop"))
    assert len(a) >= 2
    for name, key in itertools.product(a, ("gate_grad", "gate_fisher")):
        close(a[name][key], b[name][key])
        assert a[name][key].abs().max() > 0


def test_vmap_over_attention_does_not_warn() -> None:
    seen(seeded(transformer), [normal((3, 3, 4), 0)], statistics.gate_grad, pattern="1.weight", loss=loss)


def test_gates_of_recurrent_weights_can_be_seen_in_a_loop() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x)[0])

    model, x = seeded(Recurrent), normal((2, 3, 3), 0)
    got = seen(model, [x], statistics.gate_grad, pattern="cell.weight_*", block=(16,), loss=loss, per_sample="loop")
    weights = [model.cell.weight_ih_l0, model.cell.weight_hh_l0]
    for name, w, g in zip(("ih", "hh"), weights, torch.autograd.grad(loss(model(x), x), weights), strict=True):
        close(got[f"cell.weight_{name}_l0"]["gate_grad"], (w * g).sum().detach().view(1, 1))


def hessian(model: nn.Module, x: Tensor) -> tuple[list[str], Tensor, Tensor]:
    """Names (one a gate), gradient and Hessian of the loss in all gates."""
    gates = open_gates(model)
    grads = torch.autograd.grad(gated_loss(model, gates, x), list(gates.values()), create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = [torch.cat([r.flatten() for r in torch.autograd.grad(g, list(gates.values()), retain_graph=True)]) for g in flat]
    return [name for name, gate in gates.items() for _ in range(gate.numel())], flat.detach(), torch.stack(rows).detach()


def test_gate_hessian_diagonal_converges_to_the_diagonal_of_the_hessian() -> None:
    model, batches, probes = seeded(Tiny), list(normal((2, 4, 3), 0)), 400
    got = seen(model, batches, statistics.gate_hessian_diagonal(probes=probes, seed=1), block=BLOCK, loss=loss)
    exact = [hessian(model, x)[2] for x in batches]
    mean = torch.stack(exact).mean(0)
    estimate = torch.cat([got[name]["gate_hessian_diagonal"].flatten() for name in got])
    spread = (mean - mean.diag().diag()).square().sum(1).sqrt() / math.sqrt(probes)  # Var v_i (H v)_i = sum over j != i of H_ij^2
    assert ((estimate - mean.diag()).abs() <= 4 * spread).all()
    assert mean.diag().abs().max() > 10 * spread.max()


def test_gate_hessian_diagonal_of_one_probe_is_v_times_hv_with_signs_the_same_in_every_batch() -> None:
    model, x = seeded(Tiny), normal((4, 3), 0)
    h = hessian(model, x)[2]
    got = seen(model, [x, x], statistics.gate_hessian_diagonal(seed=5), block=BLOCK, loss=loss)
    estimate = torch.cat([got[name]["gate_hessian_diagonal"].flatten() for name in got])
    signs = [torch.tensor(v, dtype=torch.float64) for v in itertools.product([1.0, -1.0], repeat=len(h))]
    assert any(torch.allclose(v * (h @ v), estimate, rtol=1e-9) for v in signs)
    again, other = (seen(model, [x], statistics.gate_hessian_diagonal(seed=seed), block=BLOCK, loss=loss) for seed in (5, 6))
    close(again["a.weight"]["gate_hessian_diagonal"], got["a.weight"]["gate_hessian_diagonal"])
    assert not torch.equal(again["a.weight"]["gate_hessian_diagonal"], other["a.weight"]["gate_hessian_diagonal"])


@pytest.mark.parametrize("probes", [0, -1, 1.5, True])
def test_probes_are_a_whole_number_from_1(probes: Any) -> None:
    with pytest.raises(ValueError, match=f"probes={probes} must be a whole number"):
        statistics.gate_hessian_diagonal(probes=probes)


def test_gate_hg_is_the_hessian_times_the_gradient_of_each_batch() -> None:
    model, batches = seeded(Tiny), list(normal((2, 4, 3), 0))
    got = seen(model, batches, statistics.gate_hessian_grad, block=BLOCK, loss=loss)
    each = [h @ g for _, g, h in (hessian(model, x) for x in batches)]
    close(torch.cat([got[name]["gate_hessian_grad"].flatten() for name in got]), sum(each) / 2)


def test_gate_flow_is_the_share_of_the_paths_of_absolute_weights() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)))
    got = seen(model, list(normal((2, 3, 4), 0)), statistics.gate_flow, block=BLOCK)
    a, b = model[0].weight.detach().abs(), model[2].weight.detach().abs()
    first, second = torch.zeros(3, 2).double(), torch.zeros(1, 3).double()
    for i, h, o in itertools.product(range(4), range(6), range(2)):  # every path: input, hidden, output
        first[h // 2, i // 2] += a[h, i] * b[o, h]
        second[o // 2, h // 2] += a[h, i] * b[o, h]
    close(got["0.weight"]["gate_flow"], first)
    close(got["2.weight"]["gate_flow"], second)


# Weights behind the parametrization of another.


@pytest.mark.parametrize("s", [statistics.gate_grad, statistics.weight_grad], ids=lambda s: s.name)
def test_a_weight_behind_weight_norm_is_seen_or_refused(s: Statistic) -> None:
    plain, x = seeded(Tiny), normal((3, 3), 0)
    normed = seeded(Tiny)
    parametrizations.weight_norm(normed.a)
    try:
        got = seen(normed, [x], s, pattern="a.weight", block=BLOCK, loss=loss)
    except (NotImplementedError, ValueError, TypeError) as refused:
        assert "a.weight" in str(refused)  # noqa: PT017
    else:
        close(got["a.weight"][s.name], seen(plain, [x], s, pattern="a.weight", block=BLOCK, loss=loss)["a.weight"][s.name])


def test_a_linear_may_be_given_one_vector() -> None:
    model, x = nn.Linear(4, 2), torch.arange(4.0)
    seen = [statistics.input_sq, statistics.input_gram, statistics.output_sq, statistics.output_grad_sq, statistics.weight_grad]
    found = collect.with_statistics(model, where=bp.linears((1, 1)), statistics=seen, batches=[x], loss=lambda out, _: out.sum())
    wanted = collect.with_statistics(model, where=bp.linears((1, 1)), statistics=seen, batches=[x[None]], loss=lambda out, _: out.sum())
    for name, value in wanted["weight"].stats.items():
        torch.testing.assert_close(found["weight"].stats[name], value)


def test_padding_of_keys_counts_in_keys_and_not_in_queries() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, queries: Tensor, keys: Tensor, attention_mask: Tensor) -> Tensor:
            return self.attention(queries, keys, keys, key_padding_mask=attention_mask == 0, need_weights=False)[0]

    torch.manual_seed(0)
    model, queries, keys = Cross().eval(), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"queries": queries, "keys": keys, "attention_mask": mask}
    data = collect.with_statistics(
        model, where=bp.named("*weight", (4, 4)), statistics=[statistics.input_gram, statistics.input_sq], batches=[batch]
    )
    flat, real = queries.flatten(0, 1), keys[mask.bool()]
    wanted = torch.stack([flat.mT @ flat / len(flat), *[real.mT @ real / len(real)] * 2])
    torch.testing.assert_close(data["attention.in_proj_weight"].stats["input_gram"], wanted)
    before = torch.cat([model(queries[:1], keys[:1], mask[:1]), model(queries[1:], keys[1:, :3], mask[1:, :3])])
    torch.testing.assert_close(model(**batch), before)
    assert data["attention.out_proj.weight"].stats["input_gram"].shape == (1, 8, 8)


def test_layers_that_share_an_input_share_its_products_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x) + self.b(x)
            x = x.clone()
            return first + self.c(x.mul_(2))

    calls, gram = [], inputs._gram
    monkeypatch.setattr(inputs, "_gram", lambda x, weights: calls.append(1) or gram(x, weights))
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    data = collect.with_statistics(Fork(), where=bp.linears((2, 2)), statistics=[statistics.input_gram], batches=[x, 3 * x])
    wanted = 10 * x.mT @ x / 10
    for name, factor in (("a", 1), ("b", 1), ("c", 4)):
        torch.testing.assert_close(data[f"{name}.weight"].stats["input_gram"][0], factor * wanted)
    assert len(calls) == 4


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gram_matrix_of_many_features_is_computed_by_half_and_symmetric(weighted: bool) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(9, 1030).double(), torch.rand(9).double() if weighted else None
    gram = inputs._gram(x, weights)
    torch.testing.assert_close(gram, x.mT @ (x if weights is None else x * weights[:, None]))
    assert torch.equal(gram, gram.mT)


def test_a_statistic_of_ones_own_is_given_the_batch_the_number_of_the_call_and_the_parameters_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor, label: float) -> Tensor:
            return self.b(self.a(self.a(x)))

    calls: list[tuple[str, str, float, int]] = []

    def update(sums: statistics.Sums, call: statistics.Call) -> statistics.Sums:
        calls.append((own.name, call.name, call.batch["label"], call.index))
        assert call.batch["x"].dtype == torch.float64  # the batch is as the model is given it
        return {"sum": sums["sum"] + call.batch["label"] * 10**call.index, "n": sums["n"] + 1}

    own = Statistic(
        "own", "inputs", lambda ref, p: {"sum": torch.zeros(()), "n": torch.zeros(())}, update, lambda sums, ref, p: sums["sum"] / sums["n"]
    )
    batches = [{"x": torch.ones(2, 3), "label": label} for label in (1.0, 3.0)]
    data = seen(seeded(Twice), batches, own, pattern="[ab].weight")
    assert {name: float(stats["own"]) for name, stats in data.items()} == {"a.weight": (1 + 10 + 3 + 30) / 4, "b.weight": 2.0}
    order = [("a.weight", 0), ("a.weight", 1), ("b.weight", 0)]
    assert calls == [("own", name, label, index) for label in (1.0, 3.0) for name, index in order]


@pytest.mark.parametrize("source", ["output", "output_grad"])
def test_the_batch_and_the_number_of_the_call_reach_statistics_of_outputs_and_their_gradients(source: Any) -> None:
    calls: list[tuple[str, int]] = []

    def update(sums: statistics.Sums, call: statistics.Call) -> statistics.Sums:
        assert torch.equal(call.batch, x)
        calls.append((call.name, call.index))
        return {"n": sums["n"] + 1}

    layer = seeded(lambda: nn.Linear(3, 3))
    own = Statistic("own", source, lambda ref, p: {"n": torch.zeros(())}, update, lambda sums, ref, p: sums["n"])
    x = normal((2, 3), 0)
    seen(nn.Sequential(layer, layer), [x], own, pattern="0.weight", loss=lambda out, batch: out.sum())
    assert sorted(calls) == [("0.weight", 0), ("0.weight", 1)]


def test_statistics_that_compare_two_models_are_refused_for_batches_of_one() -> None:
    for compared in (statistics.input_cross, statistics.residual_cross(["weight"])):
        with pytest.raises(
            ValueError, match=r"input_cross and residual_cross compare two models; leave them out .* target='dense' adds them"
        ):
            only(nn.Linear(3, 3), [torch.ones(2, 3)], compared)


NAMED = {name: value for name in statistics.__all__ if isinstance(value := getattr(statistics, name), Statistic)}


@pytest.mark.parametrize("name", NAMED)
def test_a_statistic_goes_to_another_process_by_its_name(name: str) -> None:
    assert pickle.loads(pickle.dumps(NAMED[name])) is NAMED[name]
    assert copy.deepcopy(NAMED[name]) is NAMED[name]


def test_a_statistic_with_options_goes_to_another_process_with_these() -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    for made in (statistics.activation("hard", F.hardtanh), statistics.activation("mean_activation", torch.exp)):
        again = pickle.loads(pickle.dumps(made))
        assert torch.equal(only(model, [x], again)[made.name], only(model, [x], made)[made.name])
    curvature = statistics.gate_hessian_diagonal(probes=3, seed=2)
    assert repr(pickle.loads(pickle.dumps(curvature))) == repr(curvature) == "gate_hessian_diagonal(probes=3, seed=2)"
    assert pickle.loads(pickle.dumps(statistics.residual_cross(["a"]))).name == "residual_cross"


def _no_sums(ref: Any, param: Any) -> dict[str, Tensor]:
    return {}


def _same_sums(sums: Any, call: Any) -> Any:
    return sums


def _ones(sums: Any, ref: Any, param: Any) -> Tensor:
    return torch.ones(1)


def test_a_statistic_of_ones_own_is_pickled_by_its_functions() -> None:
    own = Statistic("own", "inputs", _no_sums, _same_sums, _ones, shared=True)
    assert pickle.loads(pickle.dumps(own)) == own
