"""Units that masks empty are removed, the outputs stay, and what is kept has a reason: for every kind of layer that couples units."""

import copy
import importlib.util
import pickle
import re
from collections import UserDict
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, scaled_dot_product_attention, silu

import blockprune as bp
from blockprune.export import ShrinkResult, shrink

ACTIVATIONS = [nn.ReLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Identity]


def rows(weight: Tensor, empty: list[int]) -> bp.BlockMask:
    keep = torch.ones(len(weight), *[1] * (weight.ndim - 1), dtype=torch.bool)
    keep[empty] = False
    return bp.BlockMask(keep, bp.BlockGrid(weight.shape, (1,)))


def columns(weight: Tensor, empty: list[int]) -> bp.BlockMask:
    keep = torch.ones(1, weight.shape[1], *[1] * (weight.ndim - 2), dtype=torch.bool)
    keep[:, empty] = False
    return bp.BlockMask(keep, bp.BlockGrid(weight.shape, (-1, 1)))


def masked(model: nn.Module, *, out: dict[str, list[int]] | None = None, into: dict[str, list[int]] | None = None) -> nn.Module:
    """The model in evaluation mode with these rows (`out`) and columns (`into`) of its layers' weights empty."""
    masks = {f"{name}.weight": rows(model.get_submodule(name).weight, empty) for name, empty in (out or {}).items()}
    for name, empty in (into or {}).items():
        mask, weight = columns(model.get_submodule(name).weight, empty), f"{name}.weight"
        if weight in masks:
            fine = bp.BlockGrid(mask.grid.shape, (1, 1))
            mask = bp.BlockMask((bp.expand(mask.keep, mask.grid) & bp.expand(masks[weight].keep, masks[weight].grid)), fine)
        masks[weight] = mask
    return bp.apply_masks(model, masks).eval()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def same(shrunk: ShrinkResult, model: nn.Module, *inputs: Any) -> bool:
    """Equal outputs, on inputs that `shrink` did not get."""
    with torch.no_grad():
        a, b = shrunk.model(*inputs), model(*inputs)
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()) + 1e-12)


def removed(shrunk: ShrinkResult) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(units.layer, units.side): units.indices for units in shrunk.removed}


def kept(shrunk: ShrinkResult) -> dict[tuple[str, str], str]:
    return {(units.layer, units.side): units.reason for units in shrunk.kept}


def mlp(activation: Callable[[], nn.Module] = nn.GELU, *, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 8, bias=bias), activation(), nn.Linear(8, 6, bias=bias), activation(), nn.Linear(6, 3, bias=bias)
    ).double()


class Residual(nn.Module):
    """A stream of channels, batch norm, and a head that reads flattened maps."""

    def __init__(self, *, padding: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.second, self.head = nn.Conv2d(12, 8, 3, padding=padding), nn.Linear(8 * 4, 5)
        self.crop = 1 - padding

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.second(self.norm(self.first(x)).relu())
        x = x[..., self.crop : x.shape[2] - self.crop, self.crop : x.shape[3] - self.crop] + y
        out: Tensor = self.head(adaptive_avg_pool2d(x, 2).flatten(1))
        return out


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)
        self.gate, self.up, self.down = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out: Tensor = self.head(x + self.down(silu(self.gate(y)) * self.up(y)))
        return out


class Attention(nn.Module):
    """Heads in four spellings: how many there are is in the views as -1 or as ``num_heads``, products are fused or not."""

    def __init__(self, heads: int, shared: int, *, counts: bool = False, fused: bool = True, fixed: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.q, self.k, self.v = nn.Linear(8, heads * 4), nn.Linear(8, shared * 4), nn.Linear(8, shared * 4)
        self.o, self.fused, self.repeat, self.width = nn.Linear(heads * 4, 8), fused, heads // shared, heads * 4 if fixed else -1
        if counts:
            self.num_heads, self.num_key_value_heads = heads, shared
        else:
            self.head_dim = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (self.split(layer(x), count) for layer, count in zip((self.q, self.k, self.v), self.counts(), strict=True))
        if self.fused:
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            if self.repeat > 1:
                k, v = (y[:, :, None].expand(-1, -1, self.repeat, -1, -1).reshape(len(y), -1, *y.shape[2:]) for y in (k, v))
            mixed = (q @ k.mT / 2).softmax(-1) @ v
        out: Tensor = self.head(x + self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], self.width)))
        return out

    def counts(self) -> tuple[int, int, int]:
        queries, keys = getattr(self, "num_heads", -1), getattr(self, "num_key_value_heads", -1)
        return queries, keys, keys

    def split(self, y: Tensor, heads: int) -> Tensor:
        size = 4 if heads == -1 else -1
        return y.view(*y.shape[:2], heads, size).transpose(1, 2)


lists = st.lists(st.integers(0, 63), max_size=6)


def below(size: int, indices: list[int]) -> list[int]:
    return sorted({i % size for i in indices})


@given(st.sampled_from(ACTIVATIONS), st.booleans(), st.tuples(lists, lists), st.tuples(lists, lists), seeds)
@example(nn.ReLU, False, ([2, 3, 4, 5, 7], []), ([0, 1, 6], []), 0)
def test_units_that_masks_empty_are_removed_from_an_mlp_and_the_outputs_stay(
    activation: type[nn.Module], bias: bool, out_of: tuple[list[int], list[int]], read: tuple[list[int], list[int]], seed: int
) -> None:
    torch.manual_seed(seed)
    out, into = {"0": below(8, out_of[0]), "2": below(6, out_of[1])}, {"2": below(8, read[0]), "4": below(6, read[1])}
    model = masked(mlp(activation, bias=bias), out=out, into=into)
    shrunk = shrink(model, torch.randn(5, 4, dtype=torch.float64))
    assert same(shrunk, model, torch.randn(7, 4, dtype=torch.float64))
    left = [8 - len({*out["0"], *into["2"]}), 6 - len({*out["2"], *into["4"]})]
    constant = not left[0]  # the one unit that stays, the first, is not read or constant: what is computed from it is constant, too
    assert shrunk.model[2].out_features == (1 if constant else max(1, left[1]))
    if min(left) > 0:
        assert shrunk.model[0].out_features == left[0]
        assert not [units for units in shrunk.kept if units.side == "outputs"]


@given(st.integers(1, 3), st.integers(1, 4), st.floats(0, 1), seeds)
def test_any_masks_leave_the_outputs_as_they_are(tall: int, wide: int, sparsity: float, seed: int) -> None:
    torch.manual_seed(seed)
    where = partial(bp.collect.weights, where=bp.linears((tall, wide)))
    prune = bp.Pipeline(where, bp.metric.random, bp.allocate.per_layer)
    model = mlp(nn.ReLU)
    bp.apply_masks(model, prune(model, sparsity))
    shrunk = shrink(model, torch.randn(5, 4, dtype=torch.float64))
    assert same(shrunk, model, torch.randn(7, 4, dtype=torch.float64))
    assert parameters(shrunk.model) <= parameters(bp.finalize(model))


@settings(max_examples=25)
@given(st.tuples(lists, lists, lists), st.booleans(), st.sampled_from([0, 1]), seeds)
def test_channels_are_removed_across_batch_norm_residuals_and_flatten(
    channels: tuple[list[int], list[int], list[int]], zero: bool, padding: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Residual(padding=padding).double().train()
    model(torch.randn(16, 3, 8, 8, dtype=torch.float64))  # batch norm learns statistics
    nn.init.normal_(model.norm.bias)
    if zero:
        for tensor in (model.stem.bias, model.second.bias):
            nn.init.zeros_(tensor)
    empty = {
        name: below(size, indices) for (name, size), indices in zip({"stem": 8, "first": 12, "second": 8}.items(), channels, strict=True)
    }
    model = masked(model, out=empty)
    shrunk = shrink(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert same(shrunk, model, torch.randn(3, 3, 8, 8, dtype=torch.float64))
    if zero:  # a channel of the stream goes where both that add to it are empty
        assert shrunk.model.stem.out_channels == max(1, 8 - len(set(empty["stem"]) & set(empty["second"])))
    if padding == 0:  # a constant reaches every position of the map alike
        assert shrunk.model.first.out_channels == max(1, 12 - len(empty["first"]))


def test_a_constant_under_zero_padding_stays_and_is_reported() -> None:
    model = Residual().double()
    nn.init.ones_(model.norm.bias)
    model = masked(model, out={"first": [3]})
    shrunk = shrink(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert not shrunk.removed
    assert kept(shrunk) == {("first", "outputs"): "it is constant, but second pads it with zeros"}


def test_a_hidden_unit_that_no_layer_reads_is_removed_whatever_its_weights() -> None:
    model = masked(mlp(), into={"4": [2, 5]})
    shrunk = shrink(model, torch.randn(5, 4, dtype=torch.float64))
    assert removed(shrunk) == {("2", "outputs"): (2, 5), ("4", "inputs"): (2, 5)}
    assert not shrunk.kept
    assert same(shrunk, model, torch.randn(5, 4, dtype=torch.float64))


def test_a_layer_without_a_bias_gets_one_for_a_constant() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3, bias=False)).double()
    model = masked(model, out={"0": [1]})
    shrunk = shrink(model, torch.randn(5, 4, dtype=torch.float64))
    assert shrunk.model[2].bias.dtype == torch.float64
    assert same(shrunk, model, torch.randn(5, 4, dtype=torch.float64))


def test_a_relu_that_is_zero_on_the_example_does_not_count_as_constant() -> None:
    model = mlp(nn.ReLU)
    nn.init.constant_(model[0].bias, -1e3)
    shrunk = shrink(masked(model, out={"2": [0]}), torch.randn(5, 4, dtype=torch.float64))
    assert shrunk.model[0].out_features == 8


class Scaled(nn.Module):
    """Hidden units times the model's input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x) * x)
        return out


def test_an_example_of_one_item_does_not_make_its_inputs_constant() -> None:
    model = masked(Scaled().double(), out={"a": [1]})
    shrunk = shrink(model, torch.ones(1, 1, dtype=torch.float64))
    assert kept(shrunk) == {("a", "outputs"): "b reads it"}


@pytest.mark.parametrize("side", ["out", "into"])
def test_gate_and_up_are_removed_together(side: str) -> None:
    model = masked(Gated().double(), **({"out": {"up": [1, 2], "gate": [5]}} if side == "out" else {"into": {"down": [1, 2, 5]}}))
    shrunk = shrink(model, torch.randn(2, 3, 6, dtype=torch.float64))
    gone = (1, 2, 5)
    assert removed(shrunk) == {("gate", "outputs"): gone, ("up", "outputs"): gone, ("down", "inputs"): gone}
    assert same(shrunk, model, torch.randn(4, 2, 6, dtype=torch.float64))


SPELLINGS = [{"fused": True}, {"fused": False}, {"fused": True, "counts": True}, {"fused": False, "counts": True}]


@pytest.mark.parametrize("side", ["values", "output"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (4, 1)])
def test_whole_heads_are_removed_and_with_shared_keys_all_their_queries(
    heads: int, shared: int, spelling: dict[str, bool], side: str
) -> None:
    torch.manual_seed(0)
    model, repeat = Attention(heads, shared, **spelling).double(), heads // shared
    if spelling.get("counts") and spelling["fused"]:
        model.repeat = 1
    of_keys, of_queries = tuple(range(4)), tuple(range(4 * repeat))
    also = 5 if shared > 1 else None  # of another head, which does not go
    if side == "values":
        model = masked(model, out={"v": [*of_keys, *([also] if also else [])]})
    else:
        model = masked(model, into={"o": [*of_queries, *([4 * repeat + 1] if also else [])]})
    shrunk = shrink(model, torch.randn(2, 5, 8, dtype=torch.float64))
    assert same(shrunk, model, torch.randn(3, 4, 8, dtype=torch.float64))
    if shared == 1:
        assert not shrunk.removed
        assert "a layer keeps at least one channel" in kept(shrunk).values()
        return
    assert removed(shrunk) == {
        ("q", "outputs"): of_queries,
        ("k", "outputs"): of_keys,
        ("v", "outputs"): of_keys,
        ("o", "inputs"): of_queries,
    }
    assert len(shrunk.kept) == 1
    if spelling.get("counts"):
        assert (shrunk.model.num_heads, shrunk.model.num_key_value_heads) == (heads - repeat, shared - 1)


def test_heads_whose_number_is_written_into_the_code_stay_and_are_reported() -> None:
    model = masked(Attention(4, 4, fused=False, fixed=True).double(), into={"o": [0, 1, 2, 3]})
    shrunk = shrink(model, torch.randn(2, 5, 8, dtype=torch.float64))
    assert not shrunk.removed
    assert "without it the model cannot run (RuntimeError: shape '[2, 5, 16]'" in kept(shrunk)["o", "inputs"]


class Normed(nn.Module):
    """Something that looks at all channels, and that Torch-Pruning takes for a function of each."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(4, 8, bias=False), nn.Linear(8, 3), mix

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.mix(self.a(x)))
        return out


def root_mean_square(x: Tensor) -> Tensor:
    return x * x.square().mean(-1, keepdim=True).rsqrt()


@pytest.mark.parametrize("mix", [root_mean_square, lambda x: x.softmax(-1), lambda x: x.flip(-1), lambda x: x.cumsum(-1)])
@pytest.mark.parametrize("side", ["out", "into"])
def test_where_the_graph_is_wrong_the_units_stay(mix: Callable[[Tensor], Tensor], side: str) -> None:
    torch.manual_seed(0)
    model = masked(Normed(mix).double(), **({"out": {"a": [2]}} if side == "out" else {"into": {"b": [2]}}))
    shrunk = shrink(model, torch.randn(5, 4, dtype=torch.float64))
    assert same(shrunk, model, torch.randn(7, 4, dtype=torch.float64))
    assert not shrunk.removed
    assert shrunk.kept


def test_a_group_that_fails_does_not_keep_the_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(mlp(), nn.Linear(3, 4).double(), Normed(root_mean_square).double(), nn.Linear(3, 5).double(), mlp2(5))
    model = masked(model, out={"0.0": [1], "2.a": [0, 1], "4.0": [2]})
    shrunk = shrink(model, torch.randn(5, 4, dtype=torch.float64))
    assert {name for name, side in removed(shrunk) if side == "outputs"} == {"0.0", "4.0"}
    assert kept(shrunk)["2.a", "outputs"].startswith("without it the outputs change")


def mlp2(size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, 6), nn.ReLU(), nn.Linear(6, 2)).double()


@pytest.mark.parametrize(
    ("model", "empty", "shape", "width"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
            {"0": [1], "1": [3]},
            (3, 6, 6),
            6,
        ),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2)), {"0": [1]}, (3, 6, 6), 8),
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.PReLU(8), nn.Conv1d(8, 4, 3)), {"0": [1, 7]}, (3, 9), 6),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3)), {"0": [1]}, (3, 6, 6), 8),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)), {"0": [1, 2]}, (3, 4, 4), 6),
    ],
    ids=["depthwise", "grouped", "conv1d", "group norm", "flatten"],
)
def test_convolutions(model: nn.Sequential, empty: dict[str, list[int]], shape: tuple[int, ...], width: int) -> None:
    model = masked(copy.deepcopy(model).double(), out=empty)
    shrunk = shrink(model, torch.randn(2, *shape, dtype=torch.float64))
    assert same(shrunk, model, torch.randn(3, *shape, dtype=torch.float64))
    assert shrunk.model[0].out_channels == width
    assert bool(shrunk.kept) == (width == 8)


def test_transposed_convolutions() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 3, bias=False), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3)).double()
    model = masked(model, into={"0": [2, 3]})  # its columns are its outputs
    shrunk = shrink(model, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert removed(shrunk) == {("0", "outputs"): (2, 3), ("2", "inputs"): (2, 3)}
    assert same(shrunk, model, torch.randn(2, 3, 5, 5, dtype=torch.float64))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = nn.Embedding(11, 6), nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        out: Tensor = self.head(x + self.down(self.up(x).relu()))
        return out


def test_tied_weights_stay_tied_and_whole() -> None:
    model = masked(Tied(), out={"up": [1], "down": [0]}, into={"embed": [0]})
    shrunk = shrink(model, torch.randint(11, (2, 5)))
    assert shrunk.model.head.weight is shrunk.model.embed.weight
    assert removed(shrunk) == {("up", "outputs"): (1,), ("down", "inputs"): (1,)}
    assert "tied" in kept(shrunk)["down", "outputs"]
    assert same(shrunk, model, torch.randint(11, (3, 4)))


def test_outputs_and_inputs_of_the_model_keep_their_shapes() -> None:
    model = masked(mlp(), out={"4": [1]}, into={"0": [2]})
    shrunk = shrink(model, torch.randn(5, 4, dtype=torch.float64))
    assert not shrunk.removed
    assert kept(shrunk) == {
        ("0", "inputs"): "no layer computes it: it is an input of the model",
        ("4", "outputs"): "it is an output of the model",
    }


def test_nothing_to_remove_is_the_same_model() -> None:
    model = masked(mlp(), out={"0": []})
    shrunk = shrink(model, torch.randn(5, 4, dtype=torch.float64))
    assert not shrunk.removed
    assert not shrunk.kept
    assert all(map(torch.equal, shrunk.model.state_dict().values(), bp.finalize(model).state_dict().values()))


def test_the_model_stays_as_it_is_and_the_result_is_plain() -> None:
    model = masked(mlp(nn.ReLU).float(), out={"0": [1, 2]}).train()
    model[2].weight.requires_grad_(False)
    before, state = bp.read_masks(model), copy.deepcopy(model.state_dict())
    shrunk = shrink(model, torch.randn(5, 4)).model
    assert bp.read_masks(model) == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert shrunk.training
    assert not shrunk[2].weight.requires_grad
    assert shrunk[0].weight.requires_grad
    assert [type(layer) for layer in shrunk] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert {p.dtype for p in shrunk.parameters()} == {torch.float32}
    assert not [module for module in shrunk.modules() if module._forward_hooks or module._forward_pre_hooks]
    x = torch.randn(3, 4)
    for twin in (copy.deepcopy(shrunk), pickle.loads(pickle.dumps(shrunk))):
        assert torch.equal(twin(x), shrunk(x))
    twin = copy.deepcopy(shrunk)
    twin.load_state_dict(shrunk.state_dict())


def test_the_random_state_stays_as_it_is() -> None:
    model, x = masked(mlp(), out={"0": [1]}), torch.randn(5, 4, dtype=torch.float64)
    before = torch.get_rng_state()
    shrink(model, x)
    assert torch.equal(before, torch.get_rng_state())


def test_half_precision_is_checked_in_double() -> None:
    model = masked(mlp(nn.ReLU).bfloat16(), out={"0": [1, 2]})
    shrunk = shrink(model, torch.randn(5, 4))
    assert {p.dtype for p in shrunk.model.parameters()} == {torch.bfloat16}
    assert shrunk.model[0].out_features == 6


def test_the_table_says_what_was_removed_and_what_was_kept() -> None:
    shrunk = shrink(masked(mlp(), out={"0": [1, 2], "4": [0]}), torch.randn(5, 4, dtype=torch.float64))
    assert [" ".join(line.split()) for line in repr(shrunk).splitlines()] == [
        "layer side units of what",
        "0 outputs 2 8 removed",
        "2 inputs 2 8 removed",
        "4 outputs 1 3 kept: it is an output of the model",
    ]
    assert ">removed</td>" in shrunk._repr_html_()


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="no masks"):
        shrink(mlp(), x)
    with pytest.raises(ValueError, match="cannot run the example"):
        shrink(masked(mlp(), out={"0": [1]}), torch.randn(5, 7))
    with pytest.raises(ValueError, match="no tensors"):
        shrink(masked(mlp(), out={"0": [1]}), x, forward=lambda model, _: "nothing")
    with pytest.raises(TypeError, match="a function"):
        shrink(shrink, x)  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape('pip install "blockprune[shrink]"')):
        shrink(masked(mlp(), out={"0": [1]}), x)


# Inputs of every type, in every container.


class Conditioned(nn.Module):
    """A condition that an input of any type switches off, as in classifier-free guidance."""

    def __init__(self, switch: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.inp, self.ctx, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 3)
        self.switch = switch

    def forward(self, x: Tensor, condition: Any) -> Tensor:
        out: Tensor = self.out(torch.cat([self.inp(x).relu(), self.switch(self.ctx(x).relu(), condition)], -1))
        return out


@attrs.frozen
class Condition:
    value: Tensor


SWITCHES: dict[str, tuple[Callable[[Tensor, Any], Tensor], Any, Any]] = {
    "bool": (lambda h, c: h.masked_fill(c, 0), torch.ones(5, 1).bool(), torch.zeros(5, 1).bool()),
    "bool in where": (lambda h, c: torch.where(c, h, 0.0), torch.zeros(5, 1).bool(), torch.ones(5, 1).bool()),
    "integer": (lambda h, c: h * c, torch.zeros(5, 1).int(), torch.ones(5, 1).int()),
    "one integer of many": (lambda h, c: h * (c == 977), torch.zeros(5, 1).long(), torch.full((5, 1), 977)),
    "byte": (lambda h, c: h * c, torch.zeros(5, 1).byte(), torch.ones(5, 1).byte()),
    "number beyond a threshold": (lambda h, c: h * (c > 1e6), torch.randn(5, 1), torch.full((5, 1), 1e7)),
    "complex": (lambda h, c: h * c.real, torch.zeros(5, 1, dtype=torch.complex64), torch.ones(5, 1, dtype=torch.complex64)),
    "object": (lambda h, c: h * c.value, Condition(torch.zeros(5, 1)), Condition(torch.ones(5, 1))),
    "list of objects": (lambda h, c: h * c[0].value, [Condition(torch.zeros(5, 1).int())], [Condition(torch.ones(5, 1).int())]),
    "item": (lambda h, c: h * c.max().item(), torch.zeros(5, 1), torch.ones(5, 1)),
    "tolist": (lambda h, c: h * torch.tensor(c.tolist()), torch.zeros(5, 1), torch.ones(5, 1)),
    "branch": (lambda h, c: h if c.any() else torch.zeros_like(h), torch.zeros(5, 1).bool(), torch.ones(5, 1).bool()),
    "index of rows": (lambda h, c: torch.cat([h, torch.zeros_like(h)])[c], torch.arange(5, 10), torch.arange(5)),
}


@pytest.mark.parametrize("kind", SWITCHES)
@pytest.mark.parametrize("keywords", [False, True])
def test_a_unit_that_an_input_of_any_type_switches_off_in_the_example_stays(kind: str, keywords: bool) -> None:
    torch.manual_seed(0)
    switch, off, on = SWITCHES[kind]
    model = masked(Conditioned(switch), out={"inp": [0, 1]})

    def run(model: nn.Module, batch: Any) -> Tensor:
        out: Tensor = model(**batch) if keywords else model(*batch)
        return out

    def batch(condition: Any) -> Any:
        x = torch.randn(5, 6)
        return UserDict(x=x, condition=condition) if keywords else (x, condition)

    shrunk = shrink(model, batch(off), forward=run)
    if kind == "branch":  # the example does not reach the layer
        assert ("ctx", "outputs") not in removed(shrunk)
    assert removed(shrunk)["inp", "outputs"] == (0, 1)
    for condition in (off, on):
        other = batch(condition)
        torch.testing.assert_close(run(shrunk.model, other), run(model, other), atol=1e-5, rtol=1e-5)


# Values that Python decides with, and that no operation shows.


def zero_beyond(h: Tensor, lengths: Any) -> Tensor:
    h = h.clone()
    for row, length in enumerate(lengths):
        h[row, length:] = 0
    return h


def repeated(h: Tensor, times: int) -> Tensor:
    for _ in range(times):
        h = h * 0.9
    return h


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
FULL, SHORT = torch.tensor([5, 5]), torch.tensor([5, 2])
READS: dict[str, tuple[Callable[[Tensor, Any], Tensor], Any, Any]] = {  # each with an example, and another batch
    "lengths by tolist": (lambda h, n: zero_beyond(h, n.tolist()), (X, FULL), (X, SHORT)),
    "lengths by numpy": (lambda h, n: zero_beyond(h, n.numpy()), (X, FULL), (X, SHORT)),
    "lengths by int": (lambda h, n: zero_beyond(h, [int(k) for k in n]), (X, FULL), (X, SHORT)),
    "lengths of a mask": (lambda h, n: zero_beyond(h, n.sum(1).tolist()), (X, torch.ones(2, 5).bool()), (X, torch.ones(2, 5).tril() > 0)),
    "lengths as a list": (zero_beyond, (X, [5, 5]), (X, [5, 2])),
    "shift": (lambda h, n: h.roll(int(n), -1), (X, torch.tensor(0)), (X, torch.tensor(3))),
    "rounds": (lambda h, n: repeated(h, n.item()), (X, torch.tensor(1)), (X, torch.tensor(2))),
    "columns": (lambda h, n: torch.cat([h[..., n:], h[..., :n]], -1), (X, torch.tensor(0)), (X, torch.tensor(3))),
    "pad": (lambda h, n: nn.functional.pad(h, (0, 0, int(n), 0)), (X, torch.tensor(0)), (X, torch.tensor(2))),
    "step": (lambda h, n: (h + n).tanh(), (X, 0), (X, 3)),
    "step in a dict": (lambda h, n: (h + n["step"]).tanh(), (X, {"step": 0}), (X, {"step": 3})),
    "divisor": (lambda h, n: h / n, (X, 1.0), (X, 3.0)),
    "rounds of an int": (repeated, (X, 1), (X, 0)),
    "pad to a multiple": (lambda h, n: nn.functional.pad(h, (0, 0, 0, -h.shape[1] % n)), (X, 5), (X[:, :4], 5)),
    "pad to an even length": (lambda h, n: nn.functional.pad(h, (0, 0, 0, -h.shape[1] % 2)), (X[:, :4], None), (X, None)),
    "length as a factor": (lambda h, n: h / h.shape[1] ** 0.5, (X, None), (X[:, :2], None)),
    "batch size as a factor": (lambda h, n: h / len(h), (X, None), (X[:1], None)),
}


class Between(nn.Module):
    """An operation between two layers."""

    def __init__(self, operation: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.i, self.o, self.operation = nn.Linear(6, 8), nn.Linear(8, 3), operation

    def forward(self, x: Tensor, other: Any) -> Tensor:
        out: Tensor = self.o(self.operation(self.i(x).sigmoid(), other))
        return out


def run_all(model: nn.Module, batch: Any) -> Tensor:
    out: Tensor = model(*batch)
    return out


@pytest.mark.parametrize("kind", READS)
def test_a_constant_that_python_changes_by_a_value_of_the_batch_stays(kind: str) -> None:
    torch.manual_seed(0)
    operation, batch, other = READS[kind]
    model = masked(Between(operation), out={"i": [0, 1, 2]})
    shrunk = shrink(model, batch, forward=run_all)
    for inputs in (batch, other):
        torch.testing.assert_close(run_all(shrunk.model, inputs), run_all(model, inputs), atol=1e-5, rtol=1e-5)
    assert ("i", "outputs") in kept(shrunk)


@pytest.mark.parametrize("kind", ["lengths as a list", "pad", "divisor", "pad to a multiple", "length as a factor"])
def test_zeros_that_python_does_not_change_are_removed(kind: str) -> None:
    operation, batch, other = READS[kind]
    model = Between(lambda h, n: operation(h - 0.5, n))
    nn.init.zeros_(model.i.bias)
    model = masked(model, out={"i": [0, 1, 2]})
    shrunk = shrink(model, batch, forward=run_all)
    assert removed(shrunk)["i", "outputs"] == (0, 1, 2)
    torch.testing.assert_close(run_all(shrunk.model, other), run_all(model, other), atol=1e-5, rtol=1e-5)


def test_constants_stay_behind_a_number_that_the_model_cannot_run_with_otherwise() -> None:
    model = Between(lambda h, n: h.view(*h.shape[:-1], int(n)))
    nn.init.constant_(model.i.bias[:1].data, -1e3)
    shrunk = shrink(masked(model, out={"i": [0, 1]}), (X, torch.tensor(8)), forward=run_all)
    assert not shrunk.removed
    assert ("i", "outputs") in kept(shrunk)


def test_there_is_a_warning_if_the_model_runs_with_no_other_number() -> None:
    model = masked(Between(lambda h, n: h.unflatten(1, (n, -1)).flatten(1, 2)), out={"i": [0, 1]})
    with pytest.warns(UserWarning, match=r"no other numbers than those of the example \(5\).*forward="):
        shrink(model, (X, 5), forward=run_all)
    shrunk = shrink(model, X, forward=lambda model, x: model(x, 5))
    assert removed(shrunk)["i", "outputs"] == (0, 1)


class Windows(nn.Module):
    """It notes the smallest length that it has met, as Swin does, and so runs longer inputs otherwise afterwards."""

    def __init__(self, length: Callable[[Tensor], int]) -> None:
        super().__init__()
        self.i, self.o, self.window, self.length = nn.Linear(6, 8), nn.Linear(8, 3), 4, length

    def forward(self, x: Tensor) -> Tensor:
        self.window = min(self.window, self.length(x))
        out: Tensor = self.o(self.i(x).tanh()[:, : self.window].cumsum(1))
        return out


@pytest.mark.parametrize("length", [lambda x: x.shape[1], lambda x: int(x.isfinite().sum() // 18)])
def test_other_sizes_and_numbers_leave_no_trace_in_the_model(length: Callable[[Tensor], int]) -> None:
    model, x = masked(Windows(length), into={"o": [0, 1]}), torch.randn(3, 4, 6)
    shrunk = shrink(model, x)
    assert removed(shrunk)["i", "outputs"] == (0, 1)
    assert shrunk.model.window == 4
    assert same(shrunk, model, x)


class Looped(nn.Module):
    """A layer that is called as often as an argument says."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, steps: int = 1) -> Tensor:
        h = self.i(x).relu()
        for _ in range(steps):
            h = self.a(h).relu()
        out: Tensor = self.o(h)
        return out


@pytest.mark.parametrize(("i", "a"), [([0, 1, 2], [0, 1, 2]), ([0, 1, 2], [4, 5]), ([3], [])])
@pytest.mark.parametrize("in_example", [True, False])
def test_a_layer_that_other_batches_call_more_often_or_not_at_all(i: list[int], a: list[int], in_example: bool) -> None:
    torch.manual_seed(0)
    model, x = masked(Looped(), out={"i": i, "a": a}), torch.randn(4, 6)
    if in_example:
        shrunk = shrink(model, (x, 1), forward=run_all)
    else:  # what the documentation says
        shrunk = shrink(model, x, forward=lambda model, x: [model(x, steps) for steps in (0, 1, 2)])
    for steps in (0, 1, 2, 5):
        torch.testing.assert_close(shrunk.model(x, steps), model(x, steps), atol=1e-5, rtol=1e-5)


class Filled(nn.Module):
    """A buffer of the hidden layer's width that the first forward fills."""

    def __init__(self, flag: bool, width: int) -> None:
        super().__init__()
        self.layers, self.flag, self.is_filled, self.width = mlp(nn.ReLU), flag, False, width
        self.register_buffer("table", None)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[0](x)
        if (self.flag and not self.is_filled) or self.table is None:
            self.table, self.is_filled = x.new_full((h.shape[self.width],), 2.0), True
        out: Tensor = self.layers[1:](h * (self.table if self.width else self.table[0]))
        return out


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("width", [0, -1])
def test_a_buffer_that_the_forward_fills_is_empty_again(flag: bool, width: int) -> None:
    model = masked(Filled(flag, width), out={"layers.0": [1, 2]}, into={"layers.2": [1, 2]})
    shrunk = shrink(model, torch.randn(5, 4, dtype=torch.float64))
    assert removed(shrunk)["layers.0", "outputs"] == (1, 2)
    assert shrunk.model.table is None
    assert model.table is None
    assert same(shrunk, model, torch.randn(7, 4, dtype=torch.float64))


def test_a_unit_that_depends_on_one_token_id_stays() -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(100, 6), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = self.up(self.embed(input_ids)).relu() + 3 * (input_ids == 99)[..., None] * (1 - attention_mask[..., None])
            out: Tensor = self.down(hidden)
            return out

    model = masked(Marked(), out={"up": [1]})
    example = UserDict(input_ids=torch.randint(99, (2, 7)), attention_mask=torch.ones(2, 7).long())
    shrunk = shrink(model, example)
    assert not shrunk.removed
    assert kept(shrunk) == {("up", "outputs"): "down reads it"}


# What the example does not use.


class Unused(nn.Module):
    """A hidden layer whose units something may read, or may be added to, that the example does not use."""

    def __init__(self, unused: nn.Module, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.unused, self.use = nn.Linear(6, 8), nn.Linear(8, 3), unused, use
        self.body = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 3))
        self.scale = nn.Parameter(torch.ones(1)) if not isinstance(unused, nn.Identity) else nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor, used: bool = False) -> Tensor:
        hidden = self.up(x).relu()
        if used:
            return self.use(self, hidden)
        out: Tensor = self.body(self.down(hidden))
        return out


UNUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "head": (lambda: nn.Linear(8, 2), lambda m, h: m.unused(h)),
    "norm": (lambda: nn.LayerNorm(8), lambda m, h: m.down(m.unused(h))),
    "batch norm without weights": (lambda: nn.BatchNorm1d(8, affine=False), lambda m, h: m.down(m.unused(h))),
    "another summand": (lambda: nn.Linear(1, 8), lambda m, h: m.down(h + m.unused(h.new_ones(5, 1)))),
    "reader of two": (lambda: nn.Linear(11, 2), lambda m, h: m.unused(torch.cat([h, h[:, :3]], 1))),
    "reader of a half": (lambda: nn.Linear(4, 2), lambda m, h: m.unused(h.chunk(2, 1)[0])),
    "bilinear": (lambda: nn.Bilinear(8, 8, 2), lambda m, h: m.unused(h, h)),
    "recurrent": (lambda: nn.GRU(8, 4), lambda m, h: m.unused(h)[0]),
    "nested": (lambda: nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(8, 2))), lambda m, h: m.unused(h)),
    "parameter": (nn.Identity, lambda m, h: m.down(h * m.scale)),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_units_that_something_may_read_which_the_example_does_not_use_stay(kind: str) -> None:
    build, use = UNUSED[kind]
    model = masked(Unused(build(), use), out={"up": [0, 1]})
    x = torch.randn(5, 6)
    shrunk = shrink(model, x)
    name = {"parameter": "scale", "nested": r"unused\.1\.0"}.get(kind, "unused")
    assert re.fullmatch(f"the example does not use {name}, which may read it; use it in forward=", kept(shrunk)["up", "outputs"])
    for used in (False, True):
        torch.testing.assert_close(shrunk.model(x, used), model(x, used))


def test_what_is_used_in_forward_can_be_read() -> None:
    model = masked(Unused(nn.Linear(8, 2), lambda m, h: m.unused(h)), out={"up": [0, 1]})
    x = torch.randn(5, 6)
    shrunk = shrink(model, x, forward=lambda m, x: (m(x), m(x, True), m.scale * 1))
    assert shrunk.model.unused.in_features == 6
    torch.testing.assert_close(shrunk.model(x, True), model(x, True))


def test_a_small_unused_layer_does_not_keep_wider_ones() -> None:
    model = Unused(nn.Linear(5, 3), lambda m, h: m.unused(h[:, :5]))
    assert removed(shrink(masked(model, out={"body.0": [1]}), torch.randn(5, 6)))["body.0", "outputs"] == (1,)


# What Torch-Pruning's graph cannot follow.


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.r, self.f, self.o = nn.Linear(7, 32), nn.LSTM(32, 16, batch_first=True), nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.f(self.r(self.i(x))[0][:, -1]).relu())
        return out


class Split(nn.Module):
    """A tensor that is split and joined with its parts, as in YOLO's C2f."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.f, self.o = nn.Linear(7, 16), nn.Linear(8, 8), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.i(x).chunk(2, -1))
        parts.append(self.f(parts[-1]).relu())
        out: Tensor = self.o(torch.cat(parts, -1))
        return out


class Encoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.layer = nn.Linear(7, 16), nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.f, self.o = nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.f(self.layer(self.i(x))).relu())
        return out


class Changing(nn.Module):
    """A parameter that the forward changes, which a run with gradients cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.o, self.steps = nn.Linear(7, 24), nn.Linear(24, 5), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        out: Tensor = self.o(self.f(x).relu())
        return out


@pytest.mark.parametrize("build", [Recurrent, Split, Encoded, Changing])
@torch.no_grad()
def test_units_that_the_graph_cannot_follow_stay_and_have_a_reason(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = masked(build(), out={"f": [0, 1]})
    state = copy.deepcopy(model.state_dict())
    shrunk = shrink(model, torch.randn(3, 5, 7))
    assert ("f", "outputs") in removed(shrunk) | kept(shrunk)
    assert same(shrunk, model, torch.randn(4, 6, 7))
    if build is not Changing:
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    else:
        assert kept(shrunk)["f", "outputs"].startswith("Torch-Pruning's graph cannot follow the model (RuntimeError: ")


@pytest.mark.parametrize("error", [IndexError, KeyError, ValueError, TypeError, RecursionError, AttributeError, AssertionError])
@pytest.mark.parametrize("where", ["build_dependency", "get_pruner_of_module"])
def test_any_error_of_the_graph_is_a_reason(error: type[Exception], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_pruning  # noqa: PLC0415 (an extra)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error("this operation")

    model = masked(mlp(), out={"0": [1]})
    monkeypatch.setattr(torch_pruning.DependencyGraph, where, fails)
    shrunk = shrink(model, torch.randn(5, 4, dtype=torch.float64))
    assert not shrunk.removed
    assert re.match(rf"Torch-Pruning's graph cannot follow .*\({error.__name__}: .*this operation", kept(shrunk)["0", "outputs"])


def logits(model: nn.Module, batch: Any) -> Tensor:
    out: Tensor = model(**batch, use_cache=False).logits
    return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_llama_loses_mlp_units_and_whole_groups_of_heads(attention: str, padded: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 (an extra)

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, attn_implementation=attention, **sizes))
    mlp, heads = "model.layers.{}.mlp", "model.layers.{}.self_attn"
    out = {f"{mlp.format(0)}.up_proj": [1, 2], f"{mlp.format(0)}.gate_proj": [3], f"{heads.format(1)}.v_proj": list(range(8, 16))}
    into = {f"{mlp.format(1)}.down_proj": [5, 6], f"{heads.format(2)}.o_proj": list(range(16))}
    model = masked(model, out=out, into=into)
    example = {"input_ids": torch.randint(64, (2, 9))} | ({"attention_mask": torch.ones(2, 9).tril(6).long()} if padded else {})
    shrunk = shrink(model, example, forward=logits, uniform=False)
    assert not shrunk.kept
    layers = shrunk.model.model.layers
    assert [layer.mlp.up_proj.out_features for layer in layers] == [45, 46, 48]
    assert [layer.self_attn.k_proj.out_features for layer in layers] == [16, 8, 8]
    assert [layer.self_attn.o_proj.in_features for layer in layers] == [32, 16, 16]
    other = {"input_ids": torch.randint(64, (3, 5))}
    with torch.no_grad():
        assert torch.allclose(logits(shrunk.model, other), logits(model, other), atol=1e-6)
        assert torch.equal(*[m.generate(**other, max_new_tokens=3, do_sample=False, pad_token_id=0) for m in (model, shrunk.model)])


@pytest.mark.slow
def test_minilm_loses_mlp_units_and_heads() -> None:
    from blockprune.examples import minilm  # noqa: PLC0415

    model, tokenizer = minilm.load()
    at = "encoder.layer.{}.{}"
    out = {at.format(i, "intermediate.dense"): list(range(i % 3, 1536, 3)) for i in range(6)}
    out |= {at.format(2, "attention.self.value"): list(range(32)), at.format(3, "attention.self.value"): list(range(5, 32))}
    model = masked(model, out=out, into={at.format(1, "attention.output.dense"): list(range(32, 96))})
    seen, unseen = (minilm.tokens(tokenizer, minilm.documents()[i : i + 2], longest=32) for i in (0, 2))
    shrunk = shrink(model, seen, uniform=False)
    assert {layer.intermediate.dense.out_features for layer in shrunk.model.encoder.layer} == {1024}
    assert [layer.attention.self.query.out_features for layer in shrunk.model.encoder.layer] == [384, 320, 352, 384, 384, 384]
    assert kept(shrunk) == {(at.format(3, "attention.self.value"), "outputs"): "a head is removed as a whole or not at all"}
    with torch.no_grad():
        a, b = (m(**unseen).last_hidden_state for m in (shrunk.model, model))
    assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()))
