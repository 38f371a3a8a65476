"""Masks from zeros, and state dicts that carry their masks."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import blockprune as bp
from blockprune import export
from blockprune.export.sparse_layers import STATE_KEYS
from blockprune.model.checkpoint import exported_layers, keep_gradient_options


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 8, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x)))


def shared() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 7),
    "sequential": lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 6)),
    "conv": lambda: nn.Conv2d(3, 4, 3, groups=1),
    "tied": Tied,
    "shared": shared,
    "lstm": lambda: nn.LSTM(4, 3),
    "attention": lambda: nn.MultiheadAttention(8, 2),
}


@st.composite
def masked_models(draw: st.DrawFn) -> tuple[str, nn.Module]:
    """A model of one of the kinds with random masks on some of its parameters, and the kind."""
    kind = draw(st.sampled_from(sorted(MODELS)))
    model = MODELS[kind]()
    parameters = dict(model.named_parameters())
    masks = {}
    for name in draw(st.lists(st.sampled_from(sorted(parameters)), min_size=1, unique=True)):
        shape = tuple(parameters[name].shape)
        grid = bp.BlockGrid(shape, tuple(draw(st.integers(1, n)) for n in shape))
        keep = draw(st.lists(st.booleans(), min_size=grid.blocks, max_size=grid.blocks))
        masks[name] = bp.BlockMask(torch.tensor(keep).view(grid.size), grid)
    return kind, bp.apply_masks(model, masks)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@given(masked_models())
def test_a_masked_state_dict_loads_into_a_plain_model(drawn: tuple[str, nn.Module]) -> None:
    kind, model = drawn
    plain = MODELS[kind]()
    assert bp.load_masked(plain, model.state_dict()) is plain
    assert bp.read_masks(plain) == bp.read_masks(model)
    assert same(plain.state_dict(), model.state_dict())
    assert [type(module) for module in bp.finalize(plain).modules()] == [type(module) for module in bp.finalize(model).modules()]


@given(masked_models())
def test_a_masked_state_dict_survives_a_file(drawn: tuple[str, nn.Module]) -> None:
    kind, model = drawn
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # tied tensors have no shared memory in the file
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, f"{folder}/model.safetensors")
        plain = bp.load_masked(MODELS[kind](), load_file(f"{folder}/model.safetensors"))
    assert bp.read_masks(plain) == bp.read_masks(model)
    assert same(plain.state_dict(), model.state_dict())


@given(masked_models(), st.data())
def test_a_state_that_does_not_fit_changes_nothing(drawn: tuple[str, nn.Module], data: st.DataObject) -> None:
    kind, model = drawn
    state = dict(model.state_dict())
    name = data.draw(st.sampled_from(sorted(state)))
    change = data.draw(st.sampled_from(["missing", "unexpected", "shape", "blocks", "type"]))
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        state["other.weight"] = torch.ones(2)
    elif change == "shape":
        state[name] = torch.ones(*state[name].shape, 2, dtype=state[name].dtype)
    elif change == "blocks":
        state[next(key for key in state if key.endswith("_extra_state"))] = torch.tensor([9, 9, 9, 9, 9, 9])
    else:
        state[next(key for key in state if key.endswith("keep"))] = torch.ones(3)
    plain = MODELS[kind]()
    before = copy.deepcopy(plain.state_dict())
    try:
        bp.load_masked(plain, state)
    except ValueError:
        assert same(plain.state_dict(), before)
    else:  # what is missing is an alias of a tied tensor, or its mask, or a counter
        assert change == "missing"
        assert bp.read_masks(plain) == bp.read_masks(model)


def masked_linear(block: tuple[int, int] = (2, 2)) -> nn.Linear:
    grid = bp.BlockGrid((4, 4), block)
    return bp.apply_masks(nn.Linear(4, 4), {"weight": bp.BlockMask(torch.rand(grid.size) < 0.5, grid)})


def test_a_state_of_an_exported_or_of_a_wrapped_model_says_what_to_do() -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4))

    model = plain()
    bp.apply_masks(model, bp.recipes.magnitude(bp.linears((2, 2)))(model, 0.5).masks)
    with pytest.raises(ValueError, match=r"exported model: give it to export.load_state_dict\(model, state\)"):
        bp.load_masked(plain(), export.block_sparse(model, backend="torch").state_dict())
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."):
        for state in (model.state_dict(), plain().state_dict()):
            with pytest.raises(ValueError, match=rf"names begin with '{prefix}', of a wrapper; strip it"):
                bp.load_masked(plain(), {prefix + key: x for key, x in state.items()})
    for wrapper in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"):
        for state in (model.state_dict(), plain().state_dict()):
            with pytest.raises(ValueError, match=rf"its names have '{wrapper}\.', of a wrapper; strip it: {{key.replace"):
                bp.load_masked(plain(), {key.replace("0.", f"0.{wrapper}.", 1): x for key, x in state.items()})
    with pytest.raises(ValueError, match="give the state dict of a masked model of the same class"):
        bp.load_masked(plain(), {})


def test_a_buffer_of_the_model_called_layout_is_not_taken_for_an_exported_layer() -> None:
    model = masked_linear()
    model.register_buffer("layout", torch.zeros(2))
    model.register_buffer("values", torch.zeros(2))
    with pytest.raises(ValueError, match="has 'layout', which the model does not have; give the state dict of a masked model of the same"):
        bp.load_masked(nn.Linear(4, 4), model.state_dict())
    loaded = nn.Linear(4, 4)
    loaded.register_buffer("layout", torch.ones(2))
    loaded.register_buffer("values", torch.ones(2))
    bp.load_masked(loaded, model.state_dict())
    assert bp.read_masks(loaded) == bp.read_masks(model)
    assert torch.equal(loaded.layout, model.layout)


@pytest.mark.parametrize("layer", ["", "0"])
def test_the_exported_layers_of_a_state_are_those_with_all_of_its_tensors(layer: str) -> None:
    model = export.block_sparse(masked_linear() if not layer else nn.Sequential(masked_linear()), backend="torch")
    state = model.state_dict()
    assert exported_layers(state) == [layer]
    prefix = f"{layer}." if layer else ""
    for part in STATE_KEYS:
        assert exported_layers({key: x for key, x in state.items() if key != prefix + part}) == []


def test_a_state_of_other_blocks_is_refused() -> None:
    model, state = masked_linear((2, 2)), masked_linear((4, 1)).state_dict()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"weight: the state has a mask of blocks \(4, 1\), but the model has blocks \(2, 2\)"):
        bp.load_masked(model, state)
    assert same(model.state_dict(), before)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"blocks \(3, 4\), but the mask of this weight \(4, 4\) has blocks \(2, 4\)"):
        masked_linear((2, 4)).load_state_dict(masked_linear((3, 4)).state_dict())


def test_a_plain_state_leaves_the_masks_of_the_model() -> None:
    model, state = masked_linear(), nn.Linear(4, 4).state_dict()
    masks = bp.read_masks(model)
    bp.load_masked(model, state)
    assert bp.read_masks(model) == masks
    assert torch.equal(dict(model.named_parameters())["parametrizations.weight.original"], state["weight"])


def test_masks_beside_another_parametrization_come_back() -> None:
    grid = bp.BlockGrid((4, 4), (2, 2))
    masks = {"weight": bp.BlockMask(torch.eye(2).bool(), grid)}
    model = bp.apply_masks(parametrizations.weight_norm(nn.Linear(4, 4)), masks)
    again = bp.load_masked(parametrizations.weight_norm(nn.Linear(4, 4)), model.state_dict())
    assert bp.read_masks(again) == masks
    assert same(again.state_dict(), model.state_dict())


@given(masked_models())
def test_masks_from_zeros_are_the_masks_that_made_the_zeros(drawn: tuple[str, nn.Module]) -> None:
    _, model = drawn
    masks = bp.read_masks(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(10)  # so that no kept element is zero
    where = bp.first_of(*(bp.named(name, mask.grid.block) for name, mask in masks.items()))
    assert bp.masks_from_zeros(model, where=where) == masks
    assert bp.masks_from_zeros(bp.finalize(model), where=where) == masks


def test_masks_from_zeros_needs_values() -> None:
    with pytest.raises(ValueError, match=r"weight.* meta device"):
        bp.masks_from_zeros(nn.Linear(4, 4, device="meta"), where=bp.linears((2, 2)))
    with pytest.raises(ValueError, match="matches no parameter"):
        bp.masks_from_zeros(nn.Linear(4, 4), where=bp.convs((1,)))


def test_masks_from_zeros_treat_nan_as_a_value() -> None:
    layer = nn.Linear(4, 2)
    layer.weight.data.zero_()[0, 3] = float("nan")
    assert bp.masks_from_zeros(layer, where=bp.linears((1, 2)))["weight"].keep.tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize(
    ("model", "name"),
    [(nn.Sequential(nn.Linear(32, 32)), "0.weight"), (nn.Linear(32, 32), "weight"), (nn.Sequential(nn.Conv2d(32, 32, 3)), "0.weight")],
    ids=["linear", "root", "conv"],
)
def test_the_masks_of_an_exported_model_are_read(model: nn.Module, name: str) -> None:
    grid = bp.BlockGrid(tuple(model.get_parameter(name).shape), (16, 16))
    mask = bp.BlockMask(torch.eye(2).bool().view(grid.size) if len(grid.shape) == 2 else torch.rand(grid.size) < 0.5, grid)
    bp.apply_masks(model, {name: mask})
    fast = export.block_sparse(model, backend="torch")
    masks = bp.read_masks(fast)  # a convolution keeps its blocks in smaller pieces
    assert torch.equal(bp.expand(masks[name].keep, masks[name].grid), bp.expand(mask.keep, grid))
    assert bp.sparsity(masks) == bp.sparsity({name: mask})


transformers = pytest.importorskip("transformers")


def tiny_llama(**options: Any) -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **options)).eval()


def tiny_bert() -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()


def half(where: bp.Where) -> Callable[[nn.Module], bp.Masks]:
    return lambda model: bp.recipes.magnitude(where)(model, 0.5).masks


FAMILIES = {"llama": tiny_llama, "tied": lambda: tiny_llama(tie_word_embeddings=True), "bert": tiny_bert}


@pytest.mark.usefixtures("without_blockprune_hf")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_masked_hugging_face_model_loads_with_its_zeros(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    where = bp.including(bp.linears((4, 4)), "bert.*") if family == "bert" else bp.linears((4, 4))
    if family == "tied":
        where = bp.first_of(bp.named("model.embed_tokens.weight", (4, 4)), where)
    bp.apply_masks(model, half(where)(model))
    ids = torch.arange(6)[None]
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    loaded, zeroed = bp.finalize(plain).state_dict(), bp.finalize(model).state_dict()
    assert loaded.keys() == zeroed.keys()
    assert all(torch.equal(tensor, zeroed[name]) for name, tensor in loaded.items())
    close = {"atol": 1e-6, "rtol": 0}  # some matrix products round by where their operands lie in memory
    torch.testing.assert_close(plain(ids).logits, expected, **close)
    assert bp.read_masks(plain) in ({}, bp.read_masks(model))  # with masks if blockprune.hf was imported
    state = load_file(tmp_path / "model.safetensors")
    masked = bp.load_masked(FAMILIES[family](), state)
    assert bp.read_masks(masked) == bp.read_masks(model)
    torch.testing.assert_close(masked(ids).logits, expected, **close)
    for name, tensor in model.named_parameters():
        assert torch.equal(masked.get_parameter(name), tensor), name  # the dense values behind the zeros, too
    masked.load_state_dict(model.state_dict())  # strict
    assert bp.load_masked(copy.deepcopy(masked), model.state_dict()).state_dict().keys() == model.state_dict().keys()


def test_plain_weights_are_added_once_and_only_while_there_are_masks() -> None:
    model = tiny_bert()
    names = set(model.state_dict())
    masks = half(bp.including(bp.linears((4, 4)), "*.query.*"))(model)
    for _ in range(3):
        bp.apply_masks(model, masks)
    assert len(model._state_dict_hooks) == 1
    assert set(model.state_dict()) > names
    bp.apply_masks(model, {})
    assert set(model.state_dict()) == names


def trainer(model: Any, folder: Path, steps: int) -> Any:
    rows = [{"input_ids": torch.arange(i, i + 6), "labels": torch.tensor(i % 2)} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows)


@pytest.mark.slow
@pytest.mark.usefixtures("without_blockprune_hf")
def test_a_trainer_resumes_a_masked_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, fresh = tiny_bert(), tiny_bert()
    bp.apply_masks(model, half(bp.including(bp.linears((4, 4)), "bert.*"))(model))
    resumed = bp.apply_masks(copy.deepcopy(fresh), bp.read_masks(model))
    trainer(model, tmp_path / "a", 4).train()
    trainer(resumed, tmp_path / "b", 4).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(resumed.state_dict(), model.state_dict())

    plain = copy.deepcopy(fresh)  # no masks: it starts from the zeros, not from random weights
    trainer(plain, tmp_path / "c", 2)._load_from_checkpoint(str(tmp_path / "a" / "checkpoint-2"))
    loaded = bp.load_masked(copy.deepcopy(fresh), load_file(tmp_path / "a" / "checkpoint-2" / "model.safetensors"))
    assert same(plain.state_dict(), bp.finalize(loaded).state_dict())
    again = type(model).from_pretrained(tmp_path / "a" / "checkpoint-2")
    assert same(again.state_dict(), plain.state_dict())


def options_of(model: nn.Module) -> dict[str, tuple[Any, float]]:
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "pass_gradients")}
    return {name: (None if m.reached is None else m.reached.tolist(), m.decay) for name, m in modules.items()}


@pytest.mark.parametrize("kind", ["same masks", "more masks", "error"])
def test_loading_keeps_which_gradients_the_masks_let_pass(kind: str) -> None:
    """``straight_through`` and ``decay`` are options of the training loop, which no state has."""
    grid = bp.BlockGrid((6, 6), (3, 3))
    masks = {name: bp.BlockMask(torch.rand(grid.size) < 0.5, grid) for name in ("body.weight", "head.weight")}
    wider = {"body.weight": bp.BlockMask(masks["body.weight"].keep | torch.eye(2).bool(), grid)}

    def network() -> nn.Module:
        return nn.ModuleDict({"body": nn.Linear(6, 6), "head": nn.Linear(6, 6)})

    model, own = network(), {"body.weight": masks["body.weight"]}
    state = dict(bp.apply_masks(network(), own if kind == "same masks" else masks).state_dict())
    for straight_through in (True, wider):
        bp.apply_masks(model, own, straight_through=straight_through, decay=0.1)
        before, values = options_of(model), copy.deepcopy(model.state_dict())
        if kind == "error":
            with pytest.raises(ValueError, match=r"head\.bias: the state has the shape \(9,\)"):
                bp.load_masked(model, {**state, "head.bias": torch.zeros(9)})
            assert same(model.state_dict(), values)
        else:
            bp.load_masked(model, state)
            assert same(model.state_dict(), state)
        after = options_of(model)
        assert {name: after[name] for name in before} == before
        assert all(option == (None, 0.0) for name, option in after.items() if name not in before)


def test_the_options_of_a_mask_with_other_blocks_reach_the_same_elements() -> None:
    mask = bp.BlockMask(torch.zeros(2, 2).bool(), bp.BlockGrid((4, 4), (2, 2)))
    reached = bp.BlockMask(torch.tensor([[True, False], [False, False]]), mask.grid)
    model = bp.apply_masks(nn.Linear(4, 4), {"weight": mask}, straight_through={"weight": reached}, decay=0.5)
    with keep_gradient_options(model):
        bp.apply_masks(model, {"weight": bp.BlockMask(torch.zeros(4, 1).bool(), bp.BlockGrid((4, 4), (1, 4)))})
    assert options_of(model) == {"parametrizations.weight.0": ([[True], [True], [False], [False]], 0.5)}


@pytest.mark.parametrize("is_masked", [True, False])
def test_a_model_without_memory_is_refused(is_masked: bool) -> None:
    state = masked_linear().state_dict()
    model = (masked_linear() if is_masked else nn.Linear(4, 4)).to("meta")
    before = bp.read_masks(model)
    with pytest.raises(ValueError, match=r"\(4,\): the model has this tensor on the meta device.*model\.to_empty\(device='cpu'\)"):
        bp.load_masked(model, state)
    assert bp.read_masks(model) == before
    assert same(bp.load_masked(model.to_empty(device="cpu"), state).state_dict(), dict(state))


@pytest.mark.parametrize("first", ["optimizer", "masks"])
def test_training_goes_on_if_the_optimizer_is_made_on_the_same_side_of_masking(first: str) -> None:
    """A mask changes the order of a layer's parameters, by which torch's optimizers load their state."""
    masks = {"weight": bp.BlockMask(torch.tensor([True, False, True, True]), bp.BlockGrid((4,), (1,)))}
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

    def start(put_on: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.BatchNorm1d(4)
        if first == "masks":
            put_on(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return (model if first == "masks" else put_on(model)), optimizer

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: list[Tensor]) -> None:
        for x in inputs:
            optimizer.zero_grad()
            (model(x) - x.sin()).square().mean().backward()
            optimizer.step()

    model, optimizer = start(lambda plain: bp.apply_masks(plain, masks))
    train(model, optimizer, batches[:2])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, batches[2:])
    again, optimizer = start(lambda plain: bp.load_masked(plain, saved[0]))
    optimizer.load_state_dict(saved[1])
    train(again, optimizer, batches[2:])
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


class Scaled(nn.Linear):
    """Has an extra state that is no tensor, and refuses that of another scale."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(4, 4)
        self.scale, self.loaded = scale, 0

    def get_extra_state(self) -> dict[str, float]:
        return {"scale": self.scale}

    def set_extra_state(self, state: dict[str, float]) -> None:
        if state["scale"] != self.scale:
            raise OverflowError("another scale")
        self.loaded += 1


SCALED_MASK = bp.BlockMask(torch.eye(2).bool(), bp.BlockGrid((4, 4), (2, 2)))


def test_an_extra_state_need_not_be_a_tensor() -> None:
    state = bp.apply_masks(nn.Sequential(Scaled()), {"0.weight": SCALED_MASK}).state_dict()
    model = bp.load_masked(nn.Sequential(Scaled()), state)
    assert bp.read_masks(model) == {"0.weight": SCALED_MASK}
    assert model[0].loaded == 1


@pytest.mark.parametrize("before", [{}, {"0.weight": bp.BlockMask(~SCALED_MASK.keep, SCALED_MASK.grid)}], ids=["plain", "masked"])
def test_a_model_that_refuses_an_extra_state_is_as_before(before: dict[str, bp.BlockMask]) -> None:
    masks = {"0.weight": SCALED_MASK, "1.weight": SCALED_MASK}
    state = bp.apply_masks(nn.Sequential(nn.Linear(4, 4), Scaled(2.0)), masks).state_dict()
    model = bp.apply_masks(nn.Sequential(nn.Linear(4, 4), Scaled()), before)
    values, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    with pytest.raises(OverflowError, match="another scale"):
        bp.load_masked(model, state)
    assert bp.read_masks(model) == before
    assert all(parameters[name] is x and torch.equal(x, values[name]) for name, x in model.named_parameters())


@pytest.mark.parametrize(
    ("model", "change", "error", "text"),
    [
        (nn.Linear(4, 4), lambda state: "model.pt", TypeError, r"state has the type str; give what masked_model.state_dict\(\) returned"),
        (nn.Linear(4, 4), lambda state: {**state, "bias": [1.0] * 4}, TypeError, "bias: the state has a list, not a tensor"),
        (
            nn.Linear(4, 4),
            lambda state: {**state, "parametrizations.weight.0._extra_state": {"block": 2}},
            TypeError,
            "weight: the shape of the blocks in the state is a dict, not a tensor",
        ),
        (nn.LazyLinear(4), lambda state: state, ValueError, "weight: this weight of a lazy layer has no shape yet; run the model on one"),
        (
            nn.Linear(4, 4),
            lambda state: {**state, "bias": nn.LazyLinear(4).bias},
            ValueError,
            "bias: this weight of a lazy layer has no shape yet",
        ),
    ],
    ids=["path", "list", "block", "lazy model", "lazy state"],
)
def test_a_state_of_another_kind_is_refused(model: nn.Module, change: Callable[[Any], Any], error: type[Exception], text: str) -> None:
    state = bp.apply_masks(nn.Linear(4, 4), {"weight": SCALED_MASK}).state_dict()
    with pytest.raises(error, match=text):
        bp.load_masked(model, change(state))
    assert not bp.read_masks(model)
