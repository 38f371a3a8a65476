"""Masked models inside torch: copies, checkpoints, optimizers, compilers, other parametrizations, other libraries."""

import contextlib
import copy
import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch._dynamo
import torch.distributed.checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize

import blockprune as bp
from blockprune.model.parameters import parameter_refs

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

Blocks = dict[str, tuple[int, ...]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Operations on tensors this small take longer on two threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def masks_of(model: nn.Module, blocks: Blocks, seed: int = 0) -> dict[str, bp.BlockMask]:
    """Random masks that prune half of the blocks."""
    rng, masks = torch.Generator().manual_seed(seed), {}
    for name, block in blocks.items():
        grid = bp.BlockGrid(parameter_refs(model)[name][0].masked.shape, block)
        masks[name] = bp.BlockMask((torch.randperm(grid.blocks, generator=rng) % 2 == 0).view(grid.size), grid)
    return masks


def zeroed(plain: nn.Module, masks: bp.Masks) -> nn.Module:
    """The slow reference: a plain copy into which the zeros are written."""
    model = copy.deepcopy(plain)
    for name, mask in masks.items():
        weight = model.get_parameter(name).data
        weight.copy_(reference.masked(weight, mask.keep, mask.grid))
    return model


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else all(map(equal, a, b)) if isinstance(a, tuple) else a == b


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


MLP_BLOCKS: Blocks = {"0.weight": (4, 2), "2.weight": (1, 3), "2.bias": (2,)}


class ScaledLinear(nn.Linear):
    """A subclass of Linear with another attribute."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class SharedModule(nn.Module):
    """One module that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(6, 6)
        self.layers = nn.Sequential(shared, nn.ReLU(), shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TiedLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        sizes = (self.attention.kdim, self.attention.vdim)
        return self.attention(x, *(x[..., :size] for size in sizes))[0]


class OwnParameters(nn.Module):
    """Parameters of the model itself, in a list and in a dictionary; one of them has two names in the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.same = self.scale
        self.steps = nn.ParameterList([torch.randn(6, 6), torch.randn(6, 6)])
        self.ends = nn.ParameterDict({"first": torch.randn(6, 6), "last": torch.randn(6, 4)})

    def forward(self, x: Tensor) -> Tensor:
        x = (x * self.scale) @ self.ends["first"] * self.same
        for step in self.steps:
            x = x @ step
        return x @ self.ends["last"]


TIED = {
    "two Linears": (TiedLinears, "a.weight", "b.weight"),
    "embedding and head": (TiedHead, "embed.weight", "head.weight"),
    "a module used twice": (SharedModule, "layers.0.weight", "layers.2.weight"),
}
MODELS: dict[str, tuple[Callable[[], nn.Module], Blocks, tuple[int, ...] | Tensor]] = {
    "mlp": (MLP, MLP_BLOCKS, (3, 6)),
    "a Linear": (lambda: nn.Linear(6, 4), {"weight": (4, 4), "bias": (3,)}, (3, 6)),
    "a subclass": (lambda: nn.Sequential(ScaledLinear(6, 4)), {"0.weight": (2, 4)}, (3, 6)),
    "a bilinear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 2)), {"1.weight": (1, 4)}, (3, 2, 3)),
    "own parameters": (OwnParameters, {"scale": (4,), "steps.1": (2, 2), "ends.last": (3, 1)}, (3, 6)),
    "a module used twice": (SharedModule, {"layers.0.weight": (2, 2), "layers.0.bias": (2,)}, (3, 6)),
    "tied Linears": (TiedLinears, {"a.weight": (2, 2), "b.bias": (2,)}, (3, 6)),
    "tied head": (TiedHead, {"embed.weight": (2, 3)}, torch.tensor([[0, 3, 6]])),
    "embedding": (lambda: nn.Embedding(7, 6, padding_idx=2), {"weight": (1,)}, torch.tensor([[0, 2, 6]])),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 6), {"weight": (2, 2)}, torch.tensor([[0, 2, 6]])),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), {"weight": (2, 1), "bias": (3,)}, (2, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding_mode="circular", padding=1), {"weight": (2, 2)}, (2, 3, 5, 5)),
    "conv2d, channels last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), {"weight": (2, 2, 1, 3)}, (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), {"weight": (1, -1, 2)}, (1, 2, 3, 3, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), {"weight": (2, 4)}, (2, 4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(3, 4, 3), {"weight": (-1, 1)}, (2, 3, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 4, 2), {"weight": (1, 3)}, (1, 2, 3, 3, 3)),
    "lstm": (lambda: nn.LSTM(4, 6, num_layers=2), {"weight_ih_l0": (4, 2), "weight_hh_l1": (6,), "bias_ih_l0": (5,)}, (5, 2, 4)),
    "gru": (lambda: nn.GRU(4, 6, bidirectional=True), {"weight_hh_l0_reverse": (2, 2), "weight_ih_l0": (3, 4)}, (5, 2, 4)),
    "lstm with projections": (lambda: nn.LSTM(4, 6, proj_size=2), {"weight_hr_l0": (2, 3), "weight_ih_l0": (4, 4)}, (5, 2, 4)),
    "attention": (Attention, {"attention.in_proj_weight": (4, 4), "attention.out_proj.weight": (3, 3)}, (2, 5, 8)),
    "attention, three projections": (
        lambda: Attention(kdim=4, vdim=6, add_bias_kv=True),
        {"attention.k_proj_weight": (4, 2), "attention.v_proj_weight": (3,), "attention.in_proj_bias": (8,)},
        (2, 5, 8),
    ),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        {"self_attn.in_proj_weight": (4, 4), "self_attn.out_proj.weight": (4, 4), "linear1.weight": (8, 4), "linear2.weight": (4, 8)},
        (2, 5, 8),
    ),
}
SEQUENCES = ["lstm", "gru", "lstm with projections"]
every_model = pytest.mark.parametrize("kind", MODELS)
mlp_and_sequences = pytest.mark.parametrize("kind", ["mlp", *SEQUENCES, "attention", "tied head"])


def made(kind: str) -> tuple[nn.Module, nn.Module, dict[str, bp.BlockMask], Tensor]:
    """A plain model, the same masked, the masks and an input."""
    build, blocks, size = MODELS[kind]
    plain = build()
    masks = masks_of(plain, blocks)
    return plain, bp.apply_masks(copy.deepcopy(plain), masks), masks, size if isinstance(size, Tensor) else torch.randn(size)


def total(output: Any) -> Tensor:
    """A loss whose gradient is not zero for any element of the output."""
    output = output[0] if isinstance(output, tuple) else output
    return (output * torch.arange(1, output.numel() + 1).view(output.shape)).sum().sin() + output.pow(2).sum()


# Every layer ----------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_outputs_are_those_of_zeros_written_by_hand(kind: str, training: bool) -> None:
    plain, model, masks, x = made(kind)
    model.train(training)
    expected = zeroed(plain, masks).train(training)
    assert bp.read_masks(model) == masks
    torch.testing.assert_close(model(x), expected(x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected(x))


@every_model
def test_gradients_are_those_by_hand_and_exactly_zero_where_pruned(kind: str) -> None:
    plain, model, masks, x = made(kind)
    expected = zeroed(plain, masks)
    for m in (model, expected):
        total(m(x)).backward()
    for name, refs in parameter_refs(model).items():
        want, got = expected.get_parameter(name).grad, refs[0].stored.grad
        if name in masks:
            want = reference.masked(want, masks[name].keep, masks[name].grid)
            assert got[~reference.expand(masks[name].keep, masks[name].grid)].count_nonzero() == 0, name
            assert got.count_nonzero() > 0, name
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


@every_model
def test_finalized_models_are_plain_and_equal(kind: str) -> None:
    plain, model, masks, x = made(kind)
    final = bp.finalize(model)
    assert [type(m) for m in final.modules()] == [type(m) for m in plain.modules()]
    assert list(final.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in final.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert equal(final(x), model(x))
    assert equal(pickle.loads(pickle.dumps(final))(x), final(x))
    assert equal(copy.deepcopy(bp.finalize(model))(x), final(x))  # before its first call, too
    assert equal(bp.finalize(final)(x), final(x))
    zeroed(plain, masks).load_state_dict(final.state_dict())


@every_model
def test_removing_the_masks_restores_the_plain_model(kind: str) -> None:
    plain, model, _, x = made(kind)
    model(x)
    bp.apply_masks(model, {})
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert equal(model(x), plain(x))
    assert equal(copy.deepcopy(model)(x), plain(x))
    assert equal(pickle.loads(pickle.dumps(model))(x), plain(x))


@every_model
def test_functional_call_runs_a_model_with_other_masks(kind: str) -> None:
    plain, model, masks, x = made(kind)
    same_blocks = masks_of(plain, MODELS[kind][1], seed=1)
    coarse = masks_of(plain, dict.fromkeys(masks, (1,)), seed=2)
    for replacement in (masks, same_blocks, coarse):
        want = zeroed(plain, replacement)(x)
        for m in (plain, model):
            for tie_weights in (True, False)[kind == "a module used twice" :]:  # with True, torch leaves its tensors in such a module
                got = functional_call(m, bp.masked_parameters(m, replacement), (x,), tie_weights=tie_weights)
                torch.testing.assert_close(got, want)
    assert all(type(p) is nn.Parameter for p in plain.parameters())
    assert bp.read_masks(model) == masks


@every_model
def test_new_masks_act_at_once(kind: str) -> None:
    plain, model, _, x = made(kind)
    for seed, block in ((1, None), (2, (1,)), (3, None)):
        masks = masks_of(plain, MODELS[kind][1] if block is None else dict.fromkeys(MODELS[kind][1], block), seed)
        torch.testing.assert_close(bp.apply_masks(model, masks)(x), zeroed(plain, masks)(x))


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_change_of_dtype_keeps_masks_bool(kind: str, dtype: torch.dtype) -> None:
    plain, model, masks, x = made(kind)
    x = x.to(dtype) if x.is_floating_point() else x
    assert model.to(dtype) is model
    assert bp.read_masks(model) == masks
    state = {name: v.dtype for name, v in model.state_dict().items() if not name.endswith("_extra_state")}
    assert state == {name: torch.bool if name.endswith("keep") else dtype for name in state}
    got, want = model(x), zeroed(plain.to(dtype), masks)(x)
    torch.testing.assert_close(got, want)
    total(got).backward()
    assert all(p.grad.dtype == dtype for p in model.parameters())


# Copies ---------------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
def test_changing_a_copy_does_not_change_the_original(kind: str, called: bool) -> None:
    _, model, masks, x = made(kind)
    want = model(x)
    if called:
        total(model(x)).backward()
    keys = list(model.state_dict())
    copies = [copy.deepcopy(model) for _ in range(4)]
    copies.append(copy.deepcopy(copies[0]))
    assert all(equal(c(x), want) and bp.read_masks(c) == masks for c in copies)
    flipped = {name: bp.BlockMask(~mask.keep, mask.grid) for name, mask in masks.items()}
    bp.apply_masks(copies[0], {})
    bp.finalize(copies[1])
    bp.apply_masks(copies[2], flipped)
    bp.apply_masks(copies[3], masks_of(copies[0], dict.fromkeys(masks, (1,))))
    for p in copies[4].parameters():
        p.data.zero_()
    assert bp.read_masks(copies[0]) == {}
    assert bp.read_masks(copies[2]) == flipped
    assert bp.read_masks(model) == masks
    assert list(model.state_dict()) == keys
    assert equal(model(x), want)
    assert equal(copy.deepcopy(model)(x), want)
    bp.apply_masks(model, {})  # and changing the original does not change a copy
    assert bp.read_masks(copies[2]) == flipped
    copies[2](x)


def test_copies_share_what_the_original_shares() -> None:
    model = copy.deepcopy(made("a module used twice")[1])
    assert model.layers[0] is model.layers[2]
    model = copy.deepcopy(made("tied head")[1])
    assert model.embed.parametrizations.weight.original is model.head.parametrizations.weight.original
    model = made("a Linear")[1]
    model.itself = [model]
    assert (again := copy.deepcopy(model)).itself[0] is again


def test_a_moving_average_of_a_masked_model() -> None:
    _, model, masks, x = made("mlp")
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)  # the first one copies
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.data += 1
    average.update_parameters(model)
    for old, p, q in zip(before, model.parameters(), average.module.parameters(), strict=True):
        torch.testing.assert_close(q, (old + p) / 2)
    assert bp.read_masks(average.module) == masks
    assert equal(bp.finalize(average.module)(x), average(x))
    bp.apply_masks(average.module, {})
    assert bp.read_masks(model) == masks


# Checkpoints ----------------------------------------------------------------------------------------------------------------


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """The state saved to a file and loaded as data only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def nested(model: nn.Module) -> nn.Module:
    return nn.ModuleDict({"body": nn.Sequential(model)})


@every_model
@pytest.mark.parametrize("wrap", [lambda m: m, nested], ids=["root", "nested"])
def test_a_plain_checkpoint_loads_under_the_masks(kind: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, model, masks, x = made(kind)
    for p in model.parameters():
        p.data.fill_(7)
    state = saved(wrap(plain).state_dict())
    keys = list(state)
    result = wrap(model).load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert list(state) == keys  # the caller's mapping does not change
    assert bp.read_masks(model) == masks
    assert equal(model(x), zeroed(plain, masks)(x))


@every_model
@pytest.mark.parametrize("wrap", [lambda m: m, nested], ids=["root", "nested"])
def test_a_masked_checkpoint_brings_weights_and_masks(kind: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, model, masks, x = made(kind)
    loaded = bp.apply_masks(MODELS[kind][0](), masks_of(plain, MODELS[kind][1], seed=1))
    wrap(loaded).load_state_dict(saved(wrap(model).state_dict()))
    assert bp.read_masks(loaded) == masks
    assert equal(loaded(x), model(x))
    assert [name for name in model.state_dict() if name.endswith("keep")]


def test_a_masked_checkpoint_without_its_masks_keeps_those_of_the_model() -> None:
    plain, model, masks, x = made("mlp")
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("keep")}
    loaded = bp.apply_masks(MLP(), masks)
    loaded.load_state_dict(state)
    assert bp.read_masks(loaded) == masks
    assert equal(loaded(x), zeroed(plain, masks)(x))


def test_an_incomplete_or_foreign_checkpoint_is_still_an_error() -> None:
    plain, model, masks, _ = made("mlp")
    state = plain.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.parametrizations\.weight\.original"):
        model.load_state_dict({name: value for name, value in state.items() if name != "0.weight"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*9\.weight"):
        model.load_state_dict({**state, "9.weight": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, "0.weight": torch.ones(2, 2)})
    assert model.load_state_dict({"2.bias": torch.ones(4)}, strict=False).unexpected_keys == []
    assert torch.equal(model[2].parametrizations.bias.original, torch.ones(4))
    assert bp.read_masks(model) == masks


def test_a_plain_checkpoint_loads_after_the_masks_are_removed() -> None:
    plain, model, _, x = made("mlp")
    bp.apply_masks(model, {"2.bias": masks_of(plain, {"2.bias": (2,)})["2.bias"]})
    bp.apply_masks(model, {}).load_state_dict(plain.state_dict())
    assert equal(model(x), plain(x))


def test_pickling_a_masked_model_raises_torchs_own_error() -> None:
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(made("mlp")[1])


# The meta device ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "attention", "lstm", "conv2d"])
@pytest.mark.parametrize("load", ["plain, assign", "masked, assign", "plain, to_empty", "masked, to_empty"])
def test_masks_of_a_model_on_the_meta_device_apply_to_the_weights_it_loads(kind: str, load: str) -> None:
    plain, model, masks, x = made(kind)
    with torch.device("meta"):
        empty = MODELS[kind][0]()
    bp.apply_masks(empty, masks)
    assert all(p.is_meta for p in empty.parameters())
    assert bp.read_masks(empty) == masks
    if "empty" in load:
        empty = empty.to_empty(device="cpu")
    state = plain.state_dict() if "plain" in load else model.state_dict()
    empty.load_state_dict(saved(state), assign="assign" in load)
    assert bp.read_masks(empty) == masks
    assert equal(empty(x), zeroed(plain, masks)(x))
    assert not any(t.is_meta for t in (*empty.parameters(), *empty.buffers()))


def test_a_model_on_the_meta_device_computes_shapes_and_finalizes() -> None:
    plain, _, masks, x = made("mlp")
    empty = bp.apply_masks(copy.deepcopy(plain), masks).to("meta")
    assert bp.read_masks(empty) == masks
    assert empty(x.to("meta")).shape == (3, 4)
    assert [p.shape for p in bp.finalize(empty).parameters()] == [p.shape for p in plain.parameters()]


# Optimizers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made_first", [True, False], ids=["optimizer first", "masks first"])
@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1)],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize("kind", ["mlp", "lstm", "tied head", "attention"])
def test_training_under_masks(kind: str, optimizer: Callable[..., torch.optim.Optimizer], made_first: bool) -> None:
    plain, _, masks, x = made(kind)
    model = copy.deepcopy(plain)
    opt = optimizer(model.parameters()) if made_first else None
    model(x)
    bp.apply_masks(model, masks)
    opt = opt or optimizer(model.parameters())
    start = {name: refs[0].stored.detach().clone() for name, refs in parameter_refs(model).items()}
    losses = []
    for step in range(6):
        if step == 3:  # the masks may change at any step
            masks = masks_of(plain, MODELS[kind][1], seed=1)
            bp.apply_masks(model, masks)
        opt.zero_grad()
        output = model(x)
        loss = (output[0] if isinstance(output, tuple) else output).pow(2).mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
        for name, mask in masks.items():
            pruned = ~reference.expand(mask.keep, mask.grid)
            ref = parameter_refs(model)[name][0]
            assert ref.stored.grad[pruned].count_nonzero() == 0
            assert ref.masked[pruned].count_nonzero() == 0
    optimized = {id(p) for group in opt.param_groups for p in group["params"]}
    assert optimized == {id(refs[0].stored) for refs in parameter_refs(model).values()} == {id(p) for p in model.parameters()}
    assert all(not torch.equal(refs[0].stored, start[name]) for name, refs in parameter_refs(model).items())
    assert losses[2] < losses[0]
    final = bp.finalize(model)
    assert all((final.get_parameter(name)[~reference.expand(m.keep, m.grid)] == 0).all() for name, m in masks.items())
    assert equal(final(x), model(x))


def test_a_frozen_parameter_stays_frozen() -> None:
    plain, _, masks, x = made("mlp")
    plain[0].weight.requires_grad_(False)
    model = bp.apply_masks(copy.deepcopy(plain), masks)
    model(x).sum().backward()
    assert model[0].parametrizations.weight.original.grad is None
    for m in (bp.finalize(model), copy.deepcopy(model), bp.apply_masks(model, {})):
        assert {name: refs[0].stored.requires_grad for name, refs in parameter_refs(m).items()} == {
            name: name != "0.weight" for name in parameter_refs(m)
        }


# Tied weights ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "first", "second"), TIED.values(), ids=TIED)
def test_either_name_masks_all_users_of_a_tied_tensor(kind: type[nn.Module], first: str, second: str) -> None:
    plain = kind()
    mask = masks_of(plain, {first: (2, 3)})[first]
    for name in (first, second):
        model = bp.apply_masks(copy.deepcopy(plain), {name: mask})
        assert bp.read_masks(model) == {first: mask}
        refs = parameter_refs(model)[first]
        assert {ref.name for ref in refs} == {first, second}
        assert torch.equal(refs[0].masked, zeroed(plain, {first: mask}).get_parameter(first))
        assert torch.equal(refs[0].masked, refs[1].masked)
        for m in (bp.finalize(model), bp.apply_masks(model, {})):
            assert m.get_parameter(first) is m.get_parameter(second)
            assert len(list(m.parameters())) == len(list(plain.parameters()))


# Compilers ------------------------------------------------------------------------------------------------------------------


def assert_compiled_once(backend: str, kinds: list[str]) -> None:
    """Compiled models follow their masks, forward and backward, without being compiled again."""
    for kind in kinds:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        plain, model, _, x = made(kind)
        fast = torch.compile(model, fullgraph=True, backend=backend)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(3):
                masks = masks_of(plain, MODELS[kind][1], seed)
                bp.apply_masks(model, masks)
                expected = zeroed(plain, masks)
                got, want = fast(x), expected(x)
                torch.testing.assert_close(got, want)
                model.zero_grad()
                total(got).backward()
                total(want).backward()
                for name, mask in masks.items():
                    want_grad = reference.masked(expected.get_parameter(name).grad, mask.keep, mask.grid)
                    torch.testing.assert_close(parameter_refs(model)[name][0].stored.grad, want_grad)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_compiled_models_follow_their_masks() -> None:
    assert_compiled_once("aot_eager", ["mlp", "conv2d", "tied head", "attention"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # inductor itself uses it
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_models_compiled_by_inductor_follow_their_masks() -> None:
    assert_compiled_once("inductor", ["a Linear"])


def test_a_compiled_functional_call_runs_a_model_with_other_masks() -> None:
    torch._dynamo.reset()
    plain = MLP()
    call, x = torch.compile(lambda values, x: functional_call(plain, values, (x,)), fullgraph=True, backend="aot_eager"), torch.randn(3, 6)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            masks = masks_of(plain, MLP_BLOCKS, seed)
            torch.testing.assert_close(call(bp.masked_parameters(plain, masks), x), zeroed(plain, masks)(x))


@pytest.mark.parametrize("kind", ["mlp", "conv2d", "attention"])
def test_exported_programs_carry_their_masks(kind: str) -> None:
    plain, model, masks, x = made(kind)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), zeroed(plain, masks)(x))
    assert sum(name.endswith("keep") for name in program.state_dict) == len(masks)
    final = torch.export.export(bp.finalize(model), (x,))
    assert list(final.state_dict) == list(plain.state_dict())


# torch.func -----------------------------------------------------------------------------------------------------------------


def test_functional_call_replaces_the_stored_weight() -> None:
    plain, model, masks, x = made("mlp")
    donor = MLP()
    values = {name.replace("parametrizations.", "").replace(".original", ""): name for name, _ in model.named_parameters()}
    got = functional_call(model, {stored: donor.get_parameter(name) for name, stored in values.items()}, (x,))
    assert equal(got, zeroed(donor, masks)(x))
    assert equal(model(x), zeroed(plain, masks)(x))


@pytest.mark.parametrize("kind", ["mlp", "conv2d", "tied head"])
def test_gradients_for_each_sample_by_vmap(kind: str) -> None:
    model, batch = made(kind)[1].double(), torch.stack([made(kind)[3] for _ in range(3)])
    batch = batch.double() if batch.is_floating_point() else batch
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return total(functional_call(model, (p, buffers), (x,)))

    got = vmap(grad(loss), (None, 0))(parameters, batch)
    for i, x in enumerate(batch):
        want = torch.autograd.grad(total(model(x)), list(parameters.values()))
        for name, value in zip(parameters, want, strict=True):
            torch.testing.assert_close(got[name][i], value)


def test_an_ensemble_of_masked_models_by_vmap() -> None:
    models = [bp.apply_masks(MLP(), masks_of(MLP(), MLP_BLOCKS, seed)) for seed in range(3)]
    x = torch.randn(5, 6)
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    got = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([model(x) for model in models]))


# Other modes of torch -------------------------------------------------------------------------------------------------------


def test_masks_from_inference_mode_train_and_change_outside() -> None:
    plain, _, masks, x = made("mlp")
    model = copy.deepcopy(plain)
    with torch.inference_mode():
        bp.apply_masks(model, masks)
        assert equal(model(x), zeroed(plain, masks)(x))
        inside = {name: bp.BlockMask(~mask.keep, mask.grid) for name, mask in masks.items()}
    model(x).sum().backward()
    bp.apply_masks(model, inside)(x).sum().backward()
    assert bp.read_masks(model) == inside
    with torch.inference_mode():
        bp.apply_masks(model, masks)
    assert equal(bp.finalize(model)(x), zeroed(plain, masks)(x))


def test_a_model_that_lives_in_inference_mode() -> None:
    with torch.inference_mode():
        plain = MLP()
        masks, x = masks_of(plain, MLP_BLOCKS), torch.randn(3, 6)
        for weights in ({}, {"0.weight": torch.ones(8, 6), "2.bias": torch.ones(4)}):
            plain.load_state_dict(weights, strict=False)
            model = bp.apply_masks(copy.deepcopy(plain), masks, weights)
            for m in (model, copy.deepcopy(model), bp.finalize(model)):
                assert equal(m(x), zeroed(plain, masks)(x))
            assert bp.read_masks(bp.apply_masks(model, {})) == {}


def test_finalize_makes_trainable_parameters_in_any_mode() -> None:
    _, model, _, x = made("mlp")
    with torch.no_grad():
        final = bp.finalize(model)
    final(x).sum().backward()
    assert all(p.grad is not None for p in final.parameters())


def test_autocast_and_cached_reads() -> None:
    plain, model, masks, x = made("mlp")
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(model(x), zeroed(plain, masks)(x))
    with parametrize.cached():
        assert model[0].weight is model[0].weight
        assert equal(model(x), zeroed(plain, masks)(x))


# Other parametrizations ------------------------------------------------------------------------------------------------------

PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
every_parametrization = pytest.mark.parametrize("parametrization", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)


def parametrized(
    parametrization: Callable[..., nn.Module], *, training: bool = False
) -> tuple[nn.Module, nn.Module, dict[str, bp.BlockMask], Tensor]:
    """A model with another parametrization, the same model with masks as well, the masks and an input."""
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), parametrization(nn.Linear(4, 6)))
    masks = masks_of(model.eval(), {"0.weight": (2, 2), "2.weight": (2, 2), "2.bias": (3,)})
    return model.train(training), bp.apply_masks(copy.deepcopy(model.train(training)), masks), masks, torch.randn(3, 6)


@every_parametrization
def test_masks_apply_to_the_result_of_another_parametrization(parametrization: Callable[..., nn.Module]) -> None:
    model, masked, masks, x = parametrized(parametrization)
    want = reference.masked(model[2].weight, masks["2.weight"].keep, masks["2.weight"].grid)
    assert torch.equal(masked[2].weight, want)
    assert bp.read_masks(masked) == masks
    assert list(parameter_refs(masked)) == list(parameter_refs(model))
    assert bp.read_masks(copy.deepcopy(masked)) == masks
    total(masked(x)).backward()
    assert all(p.grad is not None for p in masked.parameters())
    assert equal(copy.deepcopy(masked)(x), masked(x))
    masked.load_state_dict(saved(model.state_dict()))  # a checkpoint from before the masks
    assert torch.equal(masked[2].weight, want)
    flipped = {name: bp.BlockMask(~mask.keep, mask.grid) for name, mask in masks.items()}
    bp.apply_masks(masked, flipped)
    assert torch.equal(masked[2].weight, model[2].weight - want)
    bp.apply_masks(masked, masks_of(model, {"2.weight": (1,)}))
    assert len(masked[2].parametrizations.weight) == 2


@every_parametrization
def test_removing_masks_leaves_another_parametrization(parametrization: Callable[..., nn.Module]) -> None:
    model, masked, masks, x = parametrized(parametrization)
    bp.apply_masks(masked, {})
    assert list(masked.state_dict()) == list(model.state_dict())
    assert [name for name, _ in masked.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert equal(masked(x), model(x))
    assert equal(copy.deepcopy(masked)(x), model(x))
    masked.load_state_dict(model.state_dict())
    bp.apply_masks(masked, masks).load_state_dict(model.state_dict())
    bp.apply_masks(copy.deepcopy(masked), {})
    assert bp.read_masks(masked) == masks
    bp.apply_masks(masked, {})
    parametrize.remove_parametrizations(masked[2], "weight")
    assert type(masked[2]) is nn.Linear
    assert torch.equal(masked[2].weight, model[2].weight)


@every_parametrization
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_finalize_computes_the_plain_weights_of_both(parametrization: Callable[..., nn.Module], frozen: bool) -> None:
    _, masked, masks, x = parametrized(parametrization)
    masked.requires_grad_(not frozen)
    before = masked.state_dict()
    with torch.no_grad():
        final = bp.finalize(masked)
    assert [type(m) for m in final] == [nn.Linear, nn.ReLU, nn.Linear]
    assert set(final.state_dict()) == {name for name, _ in final.named_parameters()} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(p.requires_grad != frozen and p.is_leaf for p in final.parameters())
    assert final[2].weight[~reference.expand(masks["2.weight"].keep, masks["2.weight"].grid)].count_nonzero() == 0
    assert equal(final(x), masked(x))
    assert equal(copy.deepcopy(final)(x), masked(x))
    assert bp.read_masks(masked) == masks
    assert all(torch.equal(value, masked.state_dict()[name]) for name, value in before.items())


@every_parametrization
def test_copies_that_torch_makes_of_a_parametrized_model_do_not_share_masks(parametrization: Callable[..., nn.Module]) -> None:
    model, _, masks, x = parametrized(parametrization)
    copied, want = copy.deepcopy(model), model(x)  # torch's own copy, so both modules have the same class
    bp.apply_masks(copied, masks)
    assert equal(model(x), want)
    assert type(model[2].bias) is nn.Parameter
    bp.apply_masks(model, masks)
    bp.apply_masks(copied, {})
    assert bp.read_masks(model) == masks
    assert equal(copied(x), want)
    assert equal(copy.deepcopy(model)(x), bp.finalize(model)(x))
    assert equal(copy.deepcopy(copied)(x), want)


@every_parametrization
def test_our_calls_do_not_evaluate_another_parametrization_that_changes_its_buffers(parametrization: Callable[..., nn.Module]) -> None:
    """In training mode, reading a weight with a spectral norm changes the norm's buffers; our calls must not do that."""
    model, masked, masks, _ = parametrized(parametrization, training=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for m in (model, masked):
        bp.collect.weights(m, where=bp.linears((2, 2)))
        bp.collect.weights(m, where=bp.linears((2, 2)), masked=True)
    assert all(torch.equal(value, before[name]) for name, value in masked.state_dict().items() if name in before)
    bp.masked_parameters(model, {"0.weight": masks["0.weight"]})
    bp.finalize(model)
    grid = bp.BlockGrid((3, 3), (1,))
    for bad in ({"2.weight": bp.BlockMask(torch.ones(grid.size, dtype=torch.bool), grid)}, {"2.wieght": masks["2.weight"]}):
        with pytest.raises((ValueError, KeyError), match=r"2\.w"):
            bp.apply_masks(model, bad)
    bp.apply_masks(model, masks)
    after = model.state_dict()
    assert all(
        torch.equal(value, after[name.replace("2.bias", "2.parametrizations.bias.original")])
        for name, value in before.items()
        if name in after
    )


def _loss(output: Tensor, batch: Tensor) -> Tensor:
    return output.square().mean()


ALL_STATISTICS = [
    *(bp.statistics.input_sq, bp.statistics.input_mean, bp.statistics.input_gram, bp.statistics.bias),
    *(bp.statistics.output_sq, bp.statistics.output_grad_sq, bp.statistics.output_grad_gram),
]
NORMED = bp.named("*.weight", (4, 4))
OTHERS = bp.named("2.weight", (4, 4))
CALIBRATION = bp.Calibration([torch.randn(6, 8)], loss=_loss, progress=False)
NAN = bp.Calibration([torch.full((6, 8), torch.nan)], loss=_loss, progress=False)
AXIS = bp.UnitPermutation(torch.arange(8), rows=("0.weight", "0.bias"), columns=("2.weight",))
LOOKS: dict[str, Callable[[nn.Module], object]] = {
    **{
        f"{statistic.name} of {name}": lambda m, s=statistic, c=calibration: bp.collect.with_statistics(
            m, where=NORMED, statistics=[s], calibration=c
        )
        for statistic in ALL_STATISTICS
        for name, calibration in (("numbers", CALIBRATION), ("NaN", NAN))
    },
    "gates": lambda m: bp.collect.with_statistics(m, where=OTHERS, statistics=[bp.statistics.gate_fisher], calibration=CALIBRATION),
    "weights": lambda m: bp.collect.weights(m, where=NORMED),
    "units": lambda m: bp.collect.weights(m, where=bp.units([AXIS])),
    "movement": lambda m: bp.collect.movement(m, where=NORMED),
    "gradients": lambda m: bp.collect.gradients(m, where=NORMED),
    "find_axes": lambda m: bp.find_axes(m, torch.randn(6, 8), progress=False),
    "cluster_units": lambda m: bp.recipes.cluster_units(m, OTHERS, CALIBRATION),
    "cluster_units of a computed weight": lambda m: bp.recipes.cluster_units(m, NORMED, CALIBRATION),
    **{
        f"{recipe.__name__}{' of a computed weight' if where is NORMED else ''}": lambda m, r=recipe, w=where: r(w, CALIBRATION)(m, 0.5)
        for recipe in (bp.recipes.obs, bp.recipes.sparsegpt, bp.recipes.wanda)
        for where in (OTHERS, NORMED)
    },
    "magnitude": lambda m: bp.recipes.magnitude(NORMED)(m, 0.5),
}


RAISING = {name for name in LOOKS if name.endswith(("of NaN", "computed weight")) or name in ("movement", "gradients")}
RAISING -= {"bias of NaN", "wanda of a computed weight", "cluster_units of a computed weight"}


@pytest.mark.parametrize("name", LOOKS)
def test_looking_at_a_model_with_a_spectral_norm_leaves_its_buffers(name: str) -> None:
    """In training mode each read of such a weight changes the vectors of the norm; nothing that collects does, also where it raises."""
    norm = parametrizations.spectral_norm
    model = nn.Sequential(norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), norm(nn.Linear(8, 4))).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((ValueError, NotImplementedError)) if name in RAISING else contextlib.nullcontext():
        LOOKS[name](model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


@every_parametrization
def test_a_weight_that_another_parametrization_computes_cannot_be_replaced(parametrization: Callable[..., nn.Module]) -> None:
    model, masked, masks, x = parametrized(parametrization)
    for m in (model, masked):
        want = m(x)
        with pytest.raises(ValueError, match=r"2\.weight.*parametrization"):
            bp.apply_masks(m, {}, {"2.weight": torch.ones(6, 4)})
        assert equal(m(x), want)
    with pytest.raises(ValueError, match=r"2\.weight.*apply_masks on a copy"):
        bp.masked_parameters(model, {"2.weight": masks["2.weight"]})
    assert equal(functional_call(masked, bp.masked_parameters(masked, masks), (x,)), masked(x))


def test_a_parametrization_that_is_added_after_the_masks_does_not_hide_them() -> None:
    model = nn.Linear(4, 6)
    masks, new_masks = masks_of(model, {"weight": (2, 2)}), masks_of(model, {"weight": (2, 2)}, seed=1)
    assert masks != new_masks
    bp.apply_masks(model, masks)
    parametrizations.spectral_norm(model).eval()
    assert bp.read_masks(model) == masks
    bp.apply_masks(model, new_masks)
    assert bp.read_masks(model) == new_masks
    assert sum(type(p).__name__ == "MaskBlocks" for p in model.parametrizations.weight) == 1
    keep = reference.expand(new_masks["weight"].keep, new_masks["weight"].grid)
    assert torch.equal(model.weight != 0, keep)
    assert list(bp.finalize(model).state_dict()) == ["weight", "bias"]
    assert (bp.apply_masks(model, {}).weight != 0).all()


# Several processes ----------------------------------------------------------------------------------------------------------


def _replica(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))  # each rank has its own weights until DDP sends those of rank 0
    bp.apply_masks(model, masks_of(model, {"0.weight": (2, 2), "1.bias": (2,)}, seed=rank))
    replica = nn.parallel.DistributedDataParallel(model)
    x, results = torch.randn(3, 6), {}
    for step in range(2):
        replica.zero_grad()
        total(replica(x)).backward()
        results[step] = {
            "x": x,
            "masks": {name: mask.keep for name, mask in bp.read_masks(model).items()},
            "weights": {name: refs[0].stored.detach().clone() for name, refs in parameter_refs(model).items()},
            "grads": {name: refs[0].stored.grad.clone() for name, refs in parameter_refs(model).items()},
        }
        bp.apply_masks(model, masks_of(model, {"0.weight": (2, 2), "1.bias": (2,)}, seed=5))
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # freeing DDP's reducer may hang: it holds the GIL while it joins a gloo thread that needs the GIL


@pytest.mark.slow
def test_ddp_agrees_on_masks_and_gradients(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_replica, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    plain = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    blocks: Blocks = {"0.weight": (2, 2), "1.bias": (2,)}
    assert not torch.equal(ranks[0][0]["x"], ranks[1][0]["x"])
    for step, seed in ((0, 0), (1, 5)):
        masks = masks_of(plain, blocks, seed)  # in the first step all ranks use the masks of rank 0
        plain.load_state_dict(ranks[0][step]["weights"])
        model = bp.apply_masks(copy.deepcopy(plain), masks)
        sum(total(model(rank[step]["x"])) / 2 for rank in ranks).backward()
        for rank in ranks:
            assert all(torch.equal(rank[step]["masks"][name], mask.keep) for name, mask in masks.items())
            for name, refs in parameter_refs(model).items():
                torch.testing.assert_close(rank[step]["grads"][name], refs[0].stored.grad)


def _shard(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    results = {}
    model = _sharded(seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(rank))
    total(model(x)).backward()
    optimizer.step()
    results["loaded"] = str(model.load_state_dict(model.state_dict()))
    state, optimizer_state = get_state_dict(model, optimizer)
    torch.distributed.checkpoint.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=f"{folder}/checkpoint")

    resumed = _sharded(seed=1)
    resumed_optimizer = torch.optim.AdamW(resumed.parameters())
    state, optimizer_state = get_state_dict(resumed, resumed_optimizer)
    torch.distributed.checkpoint.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(resumed, resumed_optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    full = StateDictOptions(full_state_dict=True)
    results["saved"], results["resumed"] = (copy.deepcopy(get_model_state_dict(m, options=full)) for m in (model, resumed))
    results["outputs"] = model(x).detach(), resumed(x).detach()

    bp.apply_masks(resumed, {})
    results["unmasked"] = resumed(x).detach()
    bp.apply_masks(resumed, masks_of(_two_layers(), {"0.weight": (4, 4), "2.weight": (4, 4)}, seed=7))
    results["updated"] = resumed(x).detach()
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def _sharded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = _two_layers()
    bp.apply_masks(model, masks_of(model, {"0.weight": (4, 4), "2.weight": (4, 4)}, seed=seed))
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


@pytest.mark.slow
def test_a_checkpoint_of_a_sharded_masked_model_can_be_resumed(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_shard, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["loaded"] == "<All keys matched successfully>"
    assert first["saved"].keys() == first["resumed"].keys() == bp.load_masked(_two_layers(), first["saved"]).state_dict().keys()
    assert [name for name in first["saved"] if not torch.equal(first["saved"][name], first["resumed"][name])] == []
    for rank in (first, second):
        assert torch.equal(*rank["outputs"])
    single = bp.load_masked(_two_layers(), first["resumed"])
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(single(x), first["outputs"][0])
    torch.testing.assert_close(bp.apply_masks(copy.deepcopy(single), {})(x), first["unmasked"])
    bp.apply_masks(single, masks_of(single, {"0.weight": (4, 4), "2.weight": (4, 4)}, seed=7))
    torch.testing.assert_close(single(x), first["updated"])


# transformers ---------------------------------------------------------------------------------------------------------------

TINY = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers and what it imports
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("config", "model"), [("LlamaConfig", "LlamaForCausalLM"), ("BertConfig", "BertForMaskedLM")], ids=["llama", "bert"]
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_finalized_transformer_is_saved_and_loaded(config: str, model: str, tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, model)
    plain = kind(getattr(transformers, config)(**TINY, tie_word_embeddings=tied)).eval()
    blocks: Blocks = {name: (min(4, len(p)), 4) for name, p in plain.named_parameters() if p.ndim == 2}
    masks, ids = masks_of(plain, blocks), torch.randint(31, (2, 5))
    masked = bp.apply_masks(copy.deepcopy(plain), masks)
    want = masked(ids).logits
    torch.testing.assert_close(want, zeroed(plain, masks)(ids).logits)
    final = bp.finalize(masked)
    assert list(final.state_dict()) == list(plain.state_dict())
    final.save_pretrained(tmp_path)
    loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(loaded.eval()(ids).logits, want)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), final.parameters(), strict=True))
    again = bp.apply_masks(loaded, masks)
    torch.testing.assert_close(again(ids).logits, want)
    assert kind.from_pretrained(tmp_path).state_dict().keys() == plain.state_dict().keys()
