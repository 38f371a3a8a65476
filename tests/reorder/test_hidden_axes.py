"""Hidden axes: the units of each can be reordered at will, the expected axes are found, and the model does not change."""

import contextlib
import copy
import dataclasses
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune as bp
from blockprune.core.unit_permutation import UnitPermutation


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def summary(axis: UnitPermutation) -> tuple[Any, ...]:
    return len(axis.order), set(axis.rows), set(axis.columns), axis.groups, dict(axis.copies)


def swapped(axis: UnitPermutation, i: int, j: int) -> UnitPermutation:
    order = axis.order.clone()
    order[[i, j]] = order[[j, i]]
    return attrs.evolve(axis, order=order)


def randomized(axes: Sequence[UnitPermutation]) -> list[UnitPermutation]:
    return [attrs.evolve(axis, order=torch.randperm(len(axis.order))) for axis in axes]


BETWEEN: dict[str, Callable[[int], nn.Module]] = {
    "ReLU": lambda n: nn.ReLU(),
    "GELU": lambda n: nn.GELU(),
    "dropout": lambda n: nn.Dropout(0.5),
    "batch norm": nn.BatchNorm1d,
    "layer norm": nn.LayerNorm,
    "PReLU": nn.PReLU,
    "softmax": lambda n: nn.Softmax(-1),
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 7), st.sampled_from(sorted(BETWEEN))), min_size=1, max_size=3), st.booleans())
def test_every_hidden_axis_of_a_chain_is_found_and_any_two_of_its_units_can_be_swapped(gaps: list[tuple[int, str]], bias: bool) -> None:
    torch.manual_seed(0)
    widths = [3, *(n for n, _ in gaps), 2]
    layers: list[nn.Module] = []
    for (a, b), (n, kind) in zip(itertools.pairwise(widths[:-1]), gaps, strict=True):
        layers += [nn.Linear(a, b, bias=bias), BETWEEN[kind](n)]
    model, x = nn.Sequential(*layers, nn.Linear(*widths[-2:])).double().eval(), torch.randn(4, 3).double()
    axes = bp.find_axes(model, x)
    expected = [{f"{i}.weight" for i in (first, first + 2)} for first in range(0, 2 * len(gaps), 2)]
    assert sorted(len(axis.order) for axis in axes) == sorted(n for n, _ in gaps)
    assert [
        {n for n in (*s.rows, *s.columns) if n.endswith("weight") and int(n[0]) % 2 == 0} for s in sorted(axes, key=lambda s: s.rows)
    ] == expected
    for axis in axes:
        for i, j in itertools.combinations(range(len(axis.order)), 2):  # every order is a sequence of swaps
            torch.testing.assert_close(bp.permute(model, [swapped(axis, i, j)])(x), model(x), atol=1e-5, rtol=1e-5)


class Residual(nn.Module):
    """A convolutional network with a residual stream of channels, which is flattened before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.one, self.inside, self.two = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.two(F.relu(self.inside(self.one(x))))
        return self.head(x.flatten(1))


def test_channels_between_convolutions_with_norms_and_a_stream_that_is_flattened() -> None:
    model = Residual().eval()
    norm = {f"norm.{x}" for x in ("weight", "bias", "running_mean", "running_var")}
    inside = {f"inside.{x}" for x in ("weight", "bias", "running_mean", "running_var")}
    axes = bp.find_axes(model, torch.randn(2, 2, 3, 3))
    assert [summary(axis) for axis in axes] == [
        (4, {"stem.weight", "stem.bias", "two.weight", "two.bias", *norm}, {"one.weight", "head.weight"}, 1, {}),
        (6, {"one.weight", *inside}, {"two.weight"}, 1, {}),
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers and what it imports
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kv", "tied", "normed"), [(4, True, True), (2, True, True), (1, False, True), (2, False, False)])
def test_a_llama_with_shared_values(kv: int, tied: bool, normed: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=kv, initializer_range=0.3, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).eval()
    if not normed:
        model.model.norm = nn.Identity()  # the head uses the stream's units one by one
    stream, *axes = bp.find_axes(model, torch.randint(31, (1, 5)))
    layers = [f"model.layers.{i}" for i in range(2)]
    norms = [f"{layer}.{norm}_layernorm.weight" for layer in layers for norm in ("input", "post_attention")]
    writers = [f"{layer}.{name}.weight" for layer in layers for name in ("self_attn.o_proj", "mlp.down_proj")]
    readers = [f"{layer}.self_attn.{x}_proj.weight" for layer in layers for x in "qkv"] + [
        f"{layer}.mlp.{x}_proj.weight" for layer in layers for x in ("gate", "up")
    ]
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    last = {"model.norm.weight"} if normed else set()
    assert summary(stream) == (32, {*writers, *norms, *last}, {*readers, *ends}, 1, {})
    values = [
        (8 * kv, {f"{layer}.self_attn.v_proj.weight"}, {out := f"{layer}.self_attn.o_proj.weight"}, kv, {out: 4 // kv} if kv < 4 else {})
        for layer in layers
    ]
    units = [
        (48, {f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"}, {f"{layer}.mlp.down_proj.weight"}, 1, {}) for layer in layers
    ]
    got = [summary(axis) for axis in axes]
    assert len(got) == 4
    assert all(want in got for want in values + units)


class Fused(nn.Module):
    """An MLP in which one Linear computes the hidden units and their gates, one piece after another, and a head that may be tied."""

    def __init__(self, pieces: int, tied: bool, bias: bool) -> None:
        super().__init__()
        self.pieces = pieces
        self.words, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.both, self.down = nn.Linear(8, 12 * pieces, bias=bias), nn.Linear(12, 8)
        self.dense, self.last, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 11)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        gate, *factors = self.both(self.norm(x)).chunk(self.pieces, dim=-1)
        hidden = torch.sigmoid(gate)
        for factor in factors:
            hidden = hidden * factor
        return self.head(self.last(torch.relu(self.dense(x + self.down(hidden)))))


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize(("tied", "bias"), [(True, True), (False, False)])
def test_a_gate_in_the_same_linear_and_a_head_tied_to_the_embedding(pieces: int, tied: bool, bias: bool) -> None:
    model, ids = Fused(pieces, tied, bias).eval(), torch.randint(11, (3, 5))
    axes = bp.find_axes(model, ids)
    producers = {"both.weight", "both.bias"} if bias else {"both.weight"}
    units = (12, producers, {"down.weight"}, 1, dict.fromkeys(producers, pieces) if pieces > 1 else {})
    norm, last = {"norm.weight", "norm.bias"}, {"dense.weight", "dense.bias", "last.weight", "last.bias"}
    stream = {"down.weight", "down.bias", *norm}, {"words.weight", "both.weight", "dense.weight"}
    if tied:
        streams = [(8, stream[0] | last, stream[1] | {"head.weight"}, 1, {})]
    else:
        streams = [(8, *stream, 1, {}), (8, last, {"head.weight"}, 1, {})]
    assert len(axes) == len(streams) + 1
    assert all(want in map(summary, axes) for want in [*streams, units])
    scores = bp.metric.l1(bp.collect.weights(model, where=bp.linears((1, 1))))
    permuted = bp.permute(model, bp.cluster(scores, axes, block=(2, 2)))
    assert not torch.equal(permuted.both.weight, model.both.weight)
    torch.testing.assert_close(permuted(ids), model(ids), atol=1e-5, rtol=1e-5)


class Outer(nn.Module):
    """An outer product: the inputs of the last layer can be reordered along either of its two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 6), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c((self.a(x).relu()[..., :, None] * self.b(x).relu()[..., None, :]).flatten(-2))


def test_if_an_axis_can_be_reordered_in_two_ways_only_the_first_is_returned() -> None:
    model, x = Outer().eval(), torch.randn(9, 3)
    axes = bp.find_axes(model, x)
    assert [summary(axis) for axis in axes] == [(4, {"a.weight", "a.bias"}, {"c.weight"}, 1, {})]
    torch.testing.assert_close(bp.permute(model, [swapped(axes[0], 0, 3)])(x), model(x), atol=1e-5, rtol=1e-5)


class Attention(nn.Module):
    """Attention whose queries and keys have another width than its values, or with one Linear for all three."""

    def __init__(self, wide: int, narrow: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.sizes, self.heads = (wide, wide, narrow), heads
        if fused:
            self.qkv = nn.Linear(8, sum(self.sizes))
        else:
            self.q, self.k, self.v = nn.Linear(8, wide), nn.Linear(8, wide), nn.Linear(8, narrow)
        self.o = nn.Linear(narrow, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split(self.sizes, -1) if hasattr(self, "qkv") else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("wide", "narrow"), [(16, 16), (128, 16), (256, 8)])
def test_queries_that_are_much_wider_than_values_are_not_pieces(wide: int, narrow: int) -> None:
    axes = bp.find_axes(Attention(wide, narrow, 2, fused=False).eval(), torch.randn(2, 5, 8))
    assert [summary(axis) for axis in axes] == [(narrow, {"v.weight", "v.bias"}, {"o.weight"}, 2, {})]


class Packed(nn.Module):
    """Attention with one Linear for queries, keys and values: a piece of each after the other, or those of each head together."""

    def __init__(self, width: int, heads: int, by_head: bool, fixed: bool = False) -> None:
        super().__init__()
        self.num_heads, self.by_head, self.fixed = heads, by_head, fixed
        self.head_dim, self.attn_dim = width // heads, width
        self.qkv, self.proj = nn.Linear(8, 3 * width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        sizes, order = ((self.num_heads, 3), (3, 0, 2, 1, 4)) if self.by_head else ((3, self.num_heads), (2, 0, 3, 1, 4))
        q, k, v = self.qkv(x).reshape(*x.shape[:2], *sizes, self.head_dim).permute(order).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(y.reshape(*x.shape[:2], x.shape[2] if self.fixed else self.attn_dim))


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(("width", "heads"), [(8, 2), (12, 3), (16, 4), (16, 8)])
def test_heads_of_queries_keys_and_values_in_one_linear_are_units(width: int, heads: int, by_head: bool) -> None:
    model, x = Packed(width, heads, by_head).double().eval(), torch.randn(2, 5, 8).double()
    axes = bp.find_axes(model, x)
    copies = {} if by_head else {"qkv.weight": 3, "qkv.bias": 3}
    assert [summary(axis) for axis in axes] == [(heads, {"qkv.weight", "qkv.bias"}, {"proj.weight"}, 1, copies)]
    torch.testing.assert_close(bp.permute(model, [swapped(axes[0], 0, heads - 1)])(x), model(x))


def test_queries_keys_and_values_in_one_linear_are_not_pieces_and_one_token_does_not_show_heads() -> None:
    assert bp.find_axes(Attention(8, 8, 2, fused=True).eval(), torch.randn(2, 1, 8)) == []
    axes = bp.find_axes(Attention(8, 8, 2, fused=True).eval(), torch.randn(2, 5, 8))
    assert [summary(axis)[0] for axis in axes] == [2]


def test_units_that_a_norm_or_a_softmax_joins_can_be_reordered_and_not_removed() -> None:
    for between, removable in {"ReLU": True, "batch norm": True, "layer norm": False, "softmax": False}.items():
        model = nn.Sequential(nn.Linear(3, 6), BETWEEN[between](6), nn.Linear(6, 2)).eval()
        assert [axis.removable for axis in bp.find_axes(model, torch.randn(4, 3))] == [removable], between


class Scaled(nn.Module):
    """A hidden axis that a parameter outside of layers shares, and one that only layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x) * self.scale))))


def test_a_parameter_outside_of_layers_is_permuted_too() -> None:
    model, x = Scaled(), torch.randn(4, 3)
    axes = bp.find_axes(model, x)
    assert [summary(axis) for axis in axes] == [
        (6, {"a.weight", "a.bias", "scale"}, {"b.weight"}, 1, {}),
        (6, {"b.weight", "b.bias"}, {"c.weight"}, 1, {}),
    ]
    torch.testing.assert_close(bp.permute(model, randomized(axes))(x), model(x))


class Tokens(nn.Module):
    """A residual stream that learned positions, a token, scales and a router share, along different axes of theirs."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = nn.Linear(3, 6), nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 2)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.scale, self.router = nn.Parameter(torch.rand(6)), nn.Parameter(torch.randn(2, 6))
        self.unrelated = nn.Parameter(torch.randn(6, 6))  # both axes have the length of the stream, but it does not share it
        self.unused = nn.Parameter(torch.randn(1, 6)) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), 1, 6), self.embed(x)], 1) + self.position
        x = x + self.scale * self.down(torch.relu(self.up(x)))
        share = (x @ self.router.mT).softmax(-1)[..., :1]
        return self.head(x * share) + self.unrelated.sum()


def test_a_stream_with_positions_tokens_scales_and_a_router() -> None:
    model, x = Tokens(), torch.randn(2, 4, 3)
    axes = bp.find_axes(model, x)
    assert [len(axis.order) for axis in axes] == [6, 9]
    assert {*axes[0].last} == {"token", "position"}
    assert "scale" in axes[0].rows
    assert "router" in axes[0].columns
    assert not {"unrelated"} & {*axes[0].rows, *axes[0].columns, *axes[0].last}
    torch.testing.assert_close(bp.permute(model, randomized(axes))(x), model(x))


def test_a_stream_is_left_out_if_an_unused_parameter_may_share_it() -> None:
    with pytest.warns(UserWarning, match="does not use unused, which may share the axis of 6 units"):
        axes = bp.find_axes(Tokens(unused=True), torch.randn(2, 4, 3))
    assert [len(axis.order) for axis in axes] == [9]


def test_a_hidden_axis_is_found_although_an_unused_parameter_has_its_length() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model.register_parameter("unused", nn.Parameter(torch.randn(8)))
    assert [len(axis.order) for axis in bp.find_axes(model, torch.randn(5, 4))] == [8]


class Scale(nn.Module):
    """A parameter that the enclosing module reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.factor, self.down = nn.Linear(4, 8), Scale(), nn.Linear(8, 4)
        self.gate = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.gate(x)) * self.down(torch.relu(self.up(x)) * self.factor.scale)


def test_scales_of_equal_length_are_permuted_with_their_own_blocks_and_a_gate_of_one_unit_is_a_consumer() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), Mlp(), Mlp(), nn.Linear(4, 2)), torch.randn(5, 3)
    axes = bp.find_axes(model, x)
    assert [len(axis.order) for axis in axes] == [4, 8, 8]
    assert [s.rows for s in axes[1:]] == [(f"{i}.up.weight", f"{i}.up.bias", f"{i}.factor.scale") for i in (1, 2)]
    assert {"1.gate.weight", "2.gate.weight"} <= {*axes[0].columns}
    torch.testing.assert_close(bp.permute(model, randomized(axes))(x), model(x))


class Router(nn.Linear):
    """A Linear that returns two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        best = super().forward(x).softmax(-1).topk(1)
        return best.values, best.indices


def test_a_linear_that_does_not_return_one_tensor_is_not_a_mixing_layer() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.router, self.head = nn.Linear(3, 6), Router(6, 4), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.embed(x))
            return self.head(x * self.router(x)[0])

    model, x = Routed(), torch.randn(5, 3)
    (axis,) = bp.find_axes(model, x)
    assert summary(axis) == (6, {"embed.weight", "embed.bias"}, {"router.weight", "head.weight"}, 1, {})
    torch.testing.assert_close(bp.permute(model, randomized([axis]))(x), model(x))


def test_a_norm_of_channels_on_axis_1() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight[:, None, None] * x / x.norm(dim=1, keepdim=True)

    model, x = nn.Sequential(nn.Conv2d(3, 6, 2), First(), nn.Conv2d(6, 2, 2)), torch.randn(2, 3, 8, 8)
    (axis,) = bp.find_axes(model, x)
    assert summary(axis) == (6, {"0.weight", "0.bias", "1.weight"}, {"2.weight"}, 1, {})


def test_packed_attention_does_not_prevent_other_axes() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 3))
    axes = [summary(axis) for axis in bp.find_axes(model, torch.randn(2, 5, 8))]
    assert axes == [(12, {"0.linear1.weight", "0.linear1.bias"}, {"0.linear2.weight"}, 1, {})]


class Positions(nn.Embedding):
    """An embedding whose forward has another signature, as in some models."""

    def forward(self, ids: Tensor, *, shift: int) -> Tensor:
        return super().forward(ids + shift)


class Placed(nn.Module):
    """Word and position embeddings, a norm, and a head that is called with a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 6), Positions(9, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(input=self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1]), shift=2)))


def test_layers_that_are_called_with_other_arguments() -> None:
    axes = bp.find_axes(Placed(), torch.randint(7, (2, 4)))
    assert [summary(axis) for axis in axes] == [(6, {"norm.weight", "norm.bias"}, {"words.weight", "places.weight", "head.weight"}, 1, {})]


class Routed(nn.Module):
    """Each input is routed to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.route = nn.Linear(3, 8), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inner(x))
        chosen = self.route(x).argmax(1)
        return torch.cat([expert(x[chosen == i]) for i, expert in enumerate(self.experts)])


def test_experts_that_get_other_inputs_when_the_router_changes() -> None:
    torch.manual_seed(2)
    model, x = Routed().eval(), torch.randn(16, 3)
    axes = bp.find_axes(model, x)
    units = [(5, {f"experts.{i}.0.weight", f"experts.{i}.0.bias"}, {f"experts.{i}.2.weight"}, 1, {}) for i in range(2)]
    assert all(want in [summary(axis) for axis in axes] for want in units)
    permuted = bp.permute(model, [attrs.evolve(s, order=s.order.flip(0)) for s in axes])
    torch.testing.assert_close(permuted(x), model(x), atol=1e-5, rtol=1e-5)


def test_the_model_and_the_state_of_the_random_numbers_do_not_change() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2)).train()
    before, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    bp.find_axes(model, torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(module.training and "forward" not in vars(module) and not module._forward_hooks for module in model.modules())


def test_a_model_without_hidden_units_has_no_axes() -> None:
    assert bp.find_axes(nn.Linear(3, 2), torch.randn(4, 3)) == []
    assert bp.find_axes(nn.ReLU(), torch.randn(4, 3)) == []


def test_a_model_that_cannot_run_in_float64() -> None:
    class Own(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())  # it cannot run in float64

    model = Own(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert len(bp.find_axes(model, torch.randn(4, 4))) == 1


@pytest.mark.parametrize(
    ("model", "example", "says"),
    [
        (
            bp.apply_masks(nn.Linear(2, 2), {"weight": bp.BlockMask(torch.ones(1, 1).bool(), bp.BlockGrid((2, 2), (2, 2)))}),
            torch.ones(1, 2),
            ["masked", "finalize"],
        ),
        (nn.Linear(3, 2), torch.ones(1, 4), ["cannot run the example", "forward"]),
    ],
)
def test_errors_say_what_to_do(model: nn.Module, example: Tensor, says: list[str]) -> None:
    with pytest.raises(ValueError, match=says[0]) as caught:
        bp.find_axes(model, example)
    assert all(part in str(caught.value) for part in says)


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["script", "trace", "part"])
def test_a_scripted_or_traced_model_is_refused_with_the_remedy(kind: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(5, 4)
    if kind == "part":
        model[2] = torch.jit.script(model[2])
    else:
        model = torch.jit.script(model) if kind == "script" else torch.jit.trace(model, x)
    with pytest.raises(ValueError, match=r"find_axes cannot trace the model; it is scripted or traced.*give the model before torch\.jit"):
        bp.find_axes(model, x)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("hook", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
def test_a_weight_that_an_old_hook_has_computed_is_named_with_the_remedy(hook: Callable[[nn.Module], nn.Module]) -> None:
    model, x = nn.Sequential(hook(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2)), torch.randn(5, 4)
    model(x)
    with pytest.raises(ValueError, match=r"0\.weight: a hook of the old weight_norm.*Remove the hook"):
        bp.find_axes(model, x)


def test_outputs_without_tensors() -> None:
    with pytest.raises(ValueError, match="no floating-point tensors to compare"):
        bp.find_axes(nn.Linear(3, 2), torch.ones(1, 3), forward=lambda model, x: model(x).tolist())


class Offset(nn.Module):
    """A hidden axis along which the model adds a tensor that is no parameter, so the axis must not be found."""

    def __init__(self, last: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.up, self.own, self.down, self.last = nn.Linear(4, 8), torch.randn(8), nn.Linear(8, 3), last

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.up(x) + self.own)
        return self.last(self.down(hidden), hidden)


@dataclasses.dataclass
class Record:
    hidden: Tensor


@pytest.mark.parametrize(
    "last",
    [
        lambda y, hidden: y.masked_fill(torch.tensor([False, False, True]), -1e9),
        lambda y, hidden: y.masked_fill(torch.tensor([False, False, True]), -torch.inf),
        lambda y, hidden: y + torch.tensor([1e6, 0, 0]),
        lambda y, hidden: {0: y, 1: y > 0},
    ],
    ids=["masked", "infinite", "one large output", "a mapping with integer keys and a boolean tensor"],
)
def test_a_large_output_does_not_hide_a_change_of_another(last: Callable[[Tensor, Tensor], Any]) -> None:
    assert bp.find_axes(Offset(last), torch.randn(5, 4)) == []
    model = Offset(last)
    model.own = torch.zeros(())
    assert len(bp.find_axes(model, torch.randn(5, 4))) == 1


def test_an_infinite_output_does_not_equal_a_finite_one() -> None:
    model = Offset(lambda y, hidden: torch.cat([y, y.masked_fill(hidden[:, :1] > 50, -torch.inf)], -1))
    model.own = torch.zeros(())
    with torch.no_grad():
        model.up.bias[0] = 100  # half of the outputs are infinite only if this unit is the first
    assert bp.find_axes(model, torch.randn(5, 4)) == []


def test_an_unused_layer_whose_values_are_checked_keeps_no_axis_out() -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.aux, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            assert self.aux(x).isfinite().all()
            return self.out(self.own(x))  # type: ignore[no-any-return]

    (axis,) = bp.find_axes(Checked(), torch.randn(8, 6))
    assert axis.rows == ("own.weight", "own.bias")


@pytest.mark.parametrize("scale", [0.0, 0, True])
def test_a_branch_that_the_example_multiplies_by_zero_keeps_its_axis_out(scale: float) -> None:
    """The scale of an adapter or of guidance: no output of the example shows that ``side`` has the axis, too."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.side, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.out(self.own(x) + scale * self.side(x))  # type: ignore[no-any-return]

    model, x = Adapted(), torch.randn(8, 6)
    run = lambda model, batch: model(*batch)  # noqa: E731
    if scale:
        (axis,) = bp.find_axes(model, (x, scale), forward=run)
        assert set(axis.rows) == {"own.weight", "own.bias", "side.weight", "side.bias"}
    else:
        with pytest.warns(UserWarning, match="the example does not use side, which may share the axis of 8 units"):
            assert bp.find_axes(model, (x, scale), forward=run) == []


@pytest.mark.parametrize("kind", ["attribute", "list", "dict in a tuple", "buffer"])
def test_tensors_in_attributes_are_noticed_as_buffers_are(kind: str) -> None:
    """The example multiplies by ones; a table of other numbers shows that the units are not alike."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, ones = nn.Linear(4, 8), nn.Linear(8, 3), torch.ones(8)
            if kind == "buffer":
                self.register_buffer("table", ones)
            else:
                self.table = {"list": [ones, torch.rand(8)], "dict in a tuple": (1, {0: ones}), "attribute": ones}[kind]

        def forward(self, x: Tensor) -> Tensor:
            table = {"list": lambda: self.table[0], "dict in a tuple": lambda: self.table[1][0]}.get(kind, lambda: self.table)()
            return self.down(torch.relu(self.up(x)) * table)  # type: ignore[no-any-return]

    model = Table()
    assert bp.find_axes(model, torch.randn(5, 4)) == []
    ones = {"list": lambda: model.table[0], "dict in a tuple": lambda: model.table[1][0]}.get(kind, lambda: model.table)()  # type: ignore
    assert torch.equal(ones, torch.ones(8))


def hold(module: nn.Module, kind: str, value: Tensor) -> None:
    """Give a module a tensor as a buffer, a parameter or an attribute."""
    if kind == "buffer":
        module.register_buffer("held", value)
    else:
        vars(module).pop("held", None)
        module.held = value if kind == "attribute" else nn.Parameter(value, requires_grad=False)


class Tasks(nn.Module):
    """A mask of the units for each task; that of the first task, or of all, changes nothing."""

    def __init__(self, kind: str, dtype: torch.dtype, units: int, *, used: bool = True) -> None:
        super().__init__()
        self.up, self.down, self.used = nn.Linear(6, units), nn.Linear(units, 3), used
        masks = torch.arange(3 * units).view(3, units) % 3 > 0
        masks[0] = True
        hold(self, kind, masks.to(dtype))

    def forward(self, x: Tensor, task: int) -> Tensor:
        hidden = self.up(x).relu()
        out: Tensor = self.down(hidden * self.held[task] if self.used or task else hidden)
        return out


def of_task(model: nn.Module, batch: Any) -> Tensor:
    out: Tensor = model(*batch)
    return out


@pytest.mark.parametrize("kind", ["buffer", "parameter", "attribute"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("units", [4, 8])
def test_masks_that_change_nothing_in_the_example_are_noticed_in_any_type(kind: str, dtype: torch.dtype, units: int) -> None:
    torch.manual_seed(0)
    model, x = Tasks(kind, dtype, units), torch.randn(5, 6)
    before = model.held.clone()
    axes = bp.find_axes(model, (x, 0), forward=of_task, progress=False)
    assert torch.equal(model.held, before)
    assert [axis.columns for axis in axes] == ([("down.weight", "held")] if kind == "parameter" else [])
    permuted = bp.permute(model, [attrs.evolve(axis, order=torch.randperm(units)) for axis in axes])
    for task in range(3):
        torch.testing.assert_close(of_task(permuted, (x, task)), of_task(model, (x, task)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_parameter_of_any_type_that_the_example_does_not_use_is_named(dtype: torch.dtype) -> None:
    model = Tasks("parameter", dtype, 8, used=False)
    with pytest.warns(UserWarning, match="the example does not use held, which may share the axis of 8 units"):
        assert bp.find_axes(model, (torch.randn(5, 6), 0), forward=of_task, progress=False) == []


class Attentive(nn.Module):
    """Attention with a causal mask, a table of relative positions and positions that are indices: none has the hidden units."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.position, self.bias = nn.Embedding(11, 8), nn.Embedding(6, 8), nn.Embedding(11, 1)
        self.v, self.o, self.up, self.down, self.head = (nn.Linear(a, b) for a, b in ((8, 6), (6, 8), (8, 12), (12, 8), (8, 3)))
        self.tables = nn.ModuleDict({"mask": nn.Module(), "relative": nn.Module(), "positions": nn.Module()})
        hold(self.tables["mask"], kind, torch.ones(6, 6).tril().bool())
        hold(self.tables["relative"], kind, torch.arange(6)[:, None] - torch.arange(6) + 5)
        hold(self.tables["positions"], kind, torch.arange(6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(self.tables["positions"].held)
        scores = x @ x.mT + self.bias(self.tables["relative"].held)[..., 0]
        x = x + self.o(scores.masked_fill(~self.tables["mask"].held, -torch.inf).softmax(-1) @ self.v(x))
        out: Tensor = self.head(x + self.down(self.up(x).relu()))
        return out


@pytest.mark.parametrize("kind", ["buffer", "parameter", "attribute"])
def test_tables_of_indices_and_masks_of_tokens_keep_no_axis_from_being_found(kind: str) -> None:
    torch.manual_seed(0)
    axes = bp.find_axes(Attentive(kind), torch.randint(11, (2, 6)), progress=False)
    assert [axis.columns for axis in axes] == [("o.weight",), ("down.weight",)]


def test_complex_outputs() -> None:
    model = Offset(lambda y, hidden: torch.complex(y, y.square()))
    model.own = torch.zeros(())
    assert len(bp.find_axes(model, torch.randn(5, 4))) == 1


def test_an_output_in_a_dataclass_is_compared() -> None:
    model = Offset(lambda y, hidden: (y, Record(hidden)))
    model.own = torch.zeros(())
    assert bp.find_axes(model, torch.randn(5, 4)) == []


@pytest.mark.parametrize("units", [2, 3, 4, 8])
def test_a_unit_that_the_model_treats_differently_is_always_noticed(units: int) -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([3 * x[:, :1], x[:, 1:]], 1)

    hidden = [layer for _ in range(6) for layer in (nn.Linear(units, units), nn.Tanh(), First())]
    assert bp.find_axes(nn.Sequential(nn.Linear(4, units), First(), *hidden, nn.Linear(units, 3)), torch.randn(5, 4)) == []


def test_a_forward_that_replaces_a_layers_forward_is_used() -> None:
    model, scale = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.arange(8.0) + 1
    model[0].forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) * scale.to(x), model[0])
    assert bp.find_axes(model, torch.randn(5, 4)) == []


def test_two_branches_with_one_norm_are_one_axis() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(4, 8), nn.Linear(4, 8), nn.LayerNorm(8)
            self.c, self.d = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.norm(self.a(x))) + self.d(self.norm(self.b(x)))

    model, x = Shared(), torch.randn(5, 4)
    nn.init.normal_(model.norm.weight)
    (axis,) = bp.find_axes(model, x)
    assert {"a.weight", "b.weight", "norm.weight"} <= {*axis.rows}
    torch.testing.assert_close(bp.permute(model, [attrs.evolve(axis, order=axis.order.flip(0))])(x), model(x))


def test_the_axes_of_layers_that_the_example_does_not_call_are_left_out() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.more, self.inner, self.down = nn.Linear(4, 8), nn.Linear(2, 8), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
            hidden = self.up(x) if more is None else self.up(x) + self.more(more)
            return self.down(torch.relu(self.inner(torch.relu(hidden))))

    model = Optional()
    with pytest.warns(UserWarning, match=r"does not use more, which may share the axis of 8 units of up\.weight"):
        (axis,) = bp.find_axes(model, torch.randn(5, 4))
    assert axis.columns == ("down.weight",)
    both = bp.find_axes(model, None, forward=lambda model, _: model(torch.ones(5, 4), torch.randn(5, 2)))
    assert [len(axis.order) for axis in both] == [8, 6]


def test_one_example_without_a_batch_axis_and_noise_in_evaluation() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(())

    model = nn.Sequential(nn.Linear(4, 8), Noise(), nn.ReLU(), nn.Linear(8, 3))
    assert len(bp.find_axes(model, torch.randn(4))) == 1


def test_the_random_numbers_of_gpus_are_not_seeded() -> None:
    with mock.patch("torch.cuda.manual_seed_all") as seeded:
        bp.find_axes(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 4))
    assert not seeded.called


def test_one_run_checks_many_unused_layers() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)
            self.unused = nn.ModuleList(nn.Linear(5, 5) for _ in range(32))

        def forward(self, x: Tensor) -> Tensor:
            runs.append(1)
            return self.down(torch.relu(self.up(x)))

    runs: list[int] = []
    assert len(bp.find_axes(Experts(), torch.randn(5, 4))) == 1
    assert len(runs) < 32


def test_channels_between_convolutions_with_an_instance_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), nn.Conv2d(6, 4, 3))
    nn.init.normal_(model[1].weight)
    (axis,) = bp.find_axes(model, torch.randn(2, 3, 8, 8))
    assert summary(axis) == (6, {"0.weight", "0.bias", "1.weight", "1.bias"}, {"3.weight"}, 1, {})


@pytest.mark.parametrize(("norm_groups", "groups"), [(1, 1), (2, 2), (6, 1)])
def test_channels_stay_in_the_groups_of_a_group_norm(norm_groups: int, groups: int) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(norm_groups, 6), nn.ReLU(), nn.Conv2d(6, 4, 3)), torch.randn(2, 3, 8, 8)
    (axis,) = bp.find_axes(model, x)
    assert summary(axis) == (6, {"0.weight", "0.bias", "1.weight", "1.bias"}, {"3.weight"}, groups, {})
    torch.testing.assert_close(bp.permute(model, [swapped(axis, 3, 5)])(x), model(x), atol=1e-5, rtol=1e-5)


def test_channels_between_transposed_convolutions() -> None:
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.ConvTranspose2d(5, 2, 2)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    first, second = bp.find_axes(model, x)
    assert summary(first) == (6, {"0.weight", "0.bias", "2.weight"}, set(), 1, {})
    norm = {f"3.{x}" for x in ("weight", "bias", "running_mean", "running_var")}
    assert summary(second) == (5, {"2.bias", *norm, "5.weight"}, {"2.weight"}, 1, {})
    torch.testing.assert_close(bp.permute(model, [swapped(first, 0, 4), swapped(second, 1, 3)])(x), model(x), atol=1e-5, rtol=1e-5)
    scores = bp.metric.l1(bp.collect.weights(model, where=bp.convs((1, 1))))
    torch.testing.assert_close(bp.permute(model, bp.cluster(scores, [first, second], block=(2, 2)))(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_stream_stays_in_the_groups_of_its_group_norms() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.up, self.down = (
                nn.Conv2d(3, 8, 1),
                nn.GroupNorm(2, 8),
                nn.Conv2d(8, 6, 3, padding=1),
                nn.Conv2d(6, 8, 1),
            )
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((x + self.down(F.silu(self.up(self.norm(x))))).mean((-2, -1)))

    model, x = Stream(), torch.randn(2, 3, 4, 4)
    stream, inside = bp.find_axes(model, x)
    rows = {f"{name}.{x}" for name in ("stem", "norm", "down") for x in ("weight", "bias")}
    assert summary(stream) == (8, rows, {"up.weight", "head.weight"}, 2, {})
    assert summary(inside) == (6, {"up.weight", "up.bias"}, {"down.weight"}, 1, {})
    torch.testing.assert_close(bp.permute(model, [swapped(stream, 4, 7)])(x), model(x), atol=1e-5, rtol=1e-5)


class Inverted(nn.Module):
    """An inverted residual block of MobileNetV2 (Sandler et al. 1801.04381), with a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm, self.project, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(F.relu(self.norm(F.relu(self.depthwise(self.expand(x))))))
        return self.head(x.mean((-2, -1)))


def test_channels_through_a_depthwise_convolution() -> None:
    model, x = Inverted().eval(), torch.randn(2, 3, 6, 6)
    axes = bp.find_axes(model, x)
    norm = {f"norm.{x}" for x in ("weight", "bias", "running_mean", "running_var")}
    assert [summary(axis) for axis in axes] == [
        (4, {"stem.weight", "stem.bias", "project.weight", "project.bias"}, {"expand.weight", "head.weight"}, 1, {}),
        (8, {"expand.weight", "depthwise.weight", *norm}, {"project.weight"}, 1, {}),
    ]
    for axis in axes:
        torch.testing.assert_close(bp.permute(model, [swapped(axis, 0, 3)])(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_stream_that_the_head_uses_without_a_norm() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)
            self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))
            self.ups, self.downs = (nn.ModuleList(nn.Linear(*size) for _ in range(2)) for size in ((6, 8), (8, 6)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
                x = x + down(torch.tanh(up(norm(x))))
            return self.head(x)

    axes = bp.find_axes(Stream(), torch.tensor([[1, 5, 3]]))
    assert [len(axis.order) for axis in axes] == [6, 8, 8]
    norms = {f"norms.{i}.{x}" for i in range(2) for x in ("weight", "bias")}
    assert set(axes[0].rows) == {*norms, *(f"downs.{i}.{x}" for i in range(2) for x in ("weight", "bias"))}
    assert set(axes[0].columns) == {"embed.weight", "ups.0.weight", "ups.1.weight", "head.weight"}


def test_models_without_values_or_that_cannot_be_copied() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="meta device"):
        bp.find_axes(copy.deepcopy(model).to("meta"), torch.randn(5, 4))
    model.last = model(torch.randn(5, 4))
    with pytest.raises(ValueError, match="cannot be copied"):
        bp.find_axes(model, torch.randn(5, 4))


class Neutral(nn.Module):
    """A hidden axis with an operation that the values of the example leave without effect."""

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.up, self.down, self.operation = nn.Linear(4, 8), nn.Linear(8, 3), operation
        shapes = {"multiply": (8,), "add": (1, 8), "row of a table": (4, 8), "square": (8, 8)}
        if operation in shapes:
            self.own = nn.Parameter(torch.zeros(shapes[operation]) if operation == "add" else torch.ones(shapes[operation]))
        if operation == "square":
            nn.init.eye_(self.own)
        if operation == "buffers":
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("scale", torch.ones(8))
        if operation == "gate":
            self.gate = nn.Linear(4, 8)
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor, label: Tensor, units: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        operations: dict[str, Callable[[], Tensor]] = {
            "none": lambda: hidden,
            "multiply": lambda: hidden * self.own,
            "add": lambda: hidden + self.own,
            "row of a table": lambda: hidden * self.own[label],
            "square": lambda: hidden @ self.own,
            "buffers": lambda: (hidden - self.mean) * self.scale,
            "gate": lambda: hidden * (1 + self.gate(x)),
            "input": lambda: hidden * units,
            "mask": lambda: hidden.masked_fill(units == 0, 0),
        }
        return self.down(operations[self.operation]())


OPERATIONS = ["none", "multiply", "add", "row of a table", "square", "buffers", "gate", "input", "mask"]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_axes_hold_for_all_values_also_where_those_of_the_example_have_no_effect(operation: str, dtype: torch.dtype) -> None:
    def run(model: nn.Module, batch: Any) -> Any:
        return model(*batch)

    model = Neutral(operation).eval()
    axes = bp.find_axes(model, (torch.randn(5, 4), torch.zeros(5, dtype=torch.int64), torch.ones(5, 8).to(dtype)), forward=run)
    assert len(axes) == (operation in ("none", "multiply", "add", "row of a table", "gate"))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.randn_like(tensor))
    permuted = bp.permute(model, randomized(axes))
    other = torch.randn(5, 4), torch.randint(4, (5,)), torch.randint(2, (5, 8)).to(dtype)
    torch.testing.assert_close(run(permuted, other), run(model, other), atol=1e-5, rtol=1e-5)


def test_an_axis_is_left_out_if_its_module_may_use_a_parameter_that_the_example_does_not() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.scale = nn.Linear(4, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor, scaled: bool = False) -> Tensor:
            hidden = self.up(x).relu()
            return self.down(hidden * self.scale if scaled else hidden)

    with pytest.warns(UserWarning, match=r"does not use scale, which may share the axis of 8 units of up\.weight"):
        assert bp.find_axes(Branch(), torch.randn(5, 4)) == []
    (axis,) = bp.find_axes(Branch(), torch.randn(5, 4), forward=lambda model, x: (model(x), model(x, True)))
    assert "scale" in axis.rows


def test_a_model_that_runs_with_its_own_values_only_is_traced_with_them_and_says_so() -> None:
    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.version = nn.Linear(4, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.version != 1:
                raise RuntimeError("another version")
            return self.down(self.up(x).relu())

    with pytest.warns(UserWarning, match="does not run with other values in its parameters"):
        assert len(bp.find_axes(Exact(), torch.randn(5, 4))) == 1


class Centered(nn.Module):
    """A residual stream with a large mean, which is taken off in float32, as norms of language models compute in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer, self.head = nn.Linear(4, 64), nn.Linear(64, 16), nn.Linear(16, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x) + 1000
        stream = stream + self.outer(F.relu(self.inner(self.centered(stream))))
        return self.head(self.centered(stream))  # type: ignore[no-any-return]

    def centered(self, x: Tensor) -> Tensor:
        return (x.float() - x.to(torch.float32).mean(-1, keepdim=True)).to(x.dtype)


def test_rounding_errors_of_casts_to_float32_hide_no_axis() -> None:
    axes = bp.find_axes(Centered().eval(), torch.randn(5, 4))
    assert [len(axis.order) for axis in axes] == [64, 16]


class ByType(nn.Module):
    """Numbers its units if they are in float32."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        return y * torch.arange(y.shape[-1]).to(y.dtype) if y.dtype == torch.float32 else y


class ByOverflow(nn.Module):
    """Numbers the units that half precision cannot hold."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.half()
        return torch.where(y.isinf(), torch.arange(y.shape[-1]).to(y.dtype), y).to(x.dtype)


@pytest.mark.parametrize("middle", [ByType(), ByOverflow()], ids=lambda module: type(module).__name__)
def test_models_that_compute_something_else_in_float64_are_traced_as_they_are(middle: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(8, 16), middle, nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight.mul_(1e5)
    assert bp.find_axes(model, torch.randn(32, 8)) == []


def test_other_threads_may_draw_random_numbers_meanwhile() -> None:
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3)), torch.randn(6, 16)
    expected, seeds_of_others = bp.find_axes(model, x), iter(range(10**6))

    def disturbed(draw: Any) -> Any:
        def drawn(*args: Any, **options: Any) -> Any:
            torch.default_generator.manual_seed(next(seeds_of_others))  # what another thread may do at any time
            return draw(*args, **options)

        return drawn

    with contextlib.ExitStack() as stack:
        for name in ("rand", "randn", "randint", "randperm"):
            stack.enter_context(mock.patch.object(torch, name, disturbed(getattr(torch, name))))
        found = bp.find_axes(model, x)
    assert [axis.rows for axis in found] == [axis.rows for axis in expected]
    assert len(found) == 2


def test_an_attribute_may_contain_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    model.history = []  # type: ignore[assignment]
    model.history.append(model.history)  # type: ignore[union-attr, arg-type, operator]
    assert len(bp.find_axes(model, torch.randn(3, 4))) == 1
