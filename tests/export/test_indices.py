"""The indices of exported layers: nothing averages or converts them by mistake, and changes are validated before a kernel reads them."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from strategies import Matrix, kept_matrices
from test_export import BOTH_BACKENDS, close, masked, random_masks
from test_export import exported as export_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import blockprune as bp
from blockprune import export
from blockprune.export import format as storage
from blockprune.export import triton_launch
from blockprune.export.packing import kept_mask

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def exported(backend: str = "torch", sparsity: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 1), nn.Flatten(), nn.Linear(128, 16))
    return export_model(masked(model, (4, 4), sparsity), backend)


def sparse_layers(model: nn.Module) -> Iterator[export.BlockSparseLinear]:
    return (module for module in model.modules() if isinstance(module, export.BlockSparseLinear))


def averaged_by_torch(model: nn.Module) -> nn.Module:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    for _ in range(20):
        average.update_parameters(model)
    return average


def averaged_by_swa(model: nn.Module) -> nn.Module:
    average = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn(), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    return average


def averaged_over_buffers(model: nn.Module) -> nn.Module:
    average = copy.deepcopy(model)
    for _ in range(20):
        for old, new in zip(average.buffers(), model.buffers(), strict=True):
            old.copy_(0.999 * old + 0.001 * new)
    return average


def averaged_over_the_state_dict(model: nn.Module) -> nn.Module:
    average = copy.deepcopy(model)
    for _ in range(20):
        for old, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            old.copy_(0.999 * old + 0.001 * new)
    return average


def averaged_in_double(model: nn.Module) -> nn.Module:
    average = copy.deepcopy(model).double()
    for old, new in zip([*average.parameters(), *average.buffers()], [*model.parameters(), *model.buffers()], strict=True):
        old.data = 0.3 * old.data + 0.7 * new.data.double()
    return average.float()


AVERAGES = [averaged_by_torch, averaged_by_swa, averaged_over_buffers, averaged_over_the_state_dict, averaged_in_double]


@BOTH_BACKENDS
@pytest.mark.parametrize("average", AVERAGES)
def test_a_moving_average_of_a_model_with_itself_is_the_model(backend: str, average: Callable[[nn.Module], nn.Module]) -> None:
    model = exported(backend)
    close(average(model)(X), model(X))


def test_a_state_dict_whose_indices_were_averaged_is_refused() -> None:
    model = exported()
    state = {key: 0.9 * value + 0.1 * value for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"0: layout is torch.float32"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half().float(),
        lambda m: m.bfloat16().float(),
        lambda m: m.double().float(),
        lambda m: m.to(torch.float16).to(torch.float32),
        lambda m: m.type(torch.float64).type(torch.float32),
        lambda m: m.share_memory(),
        lambda m: m.to("cpu", non_blocking=True),
        lambda m: m.cpu(),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "int8"])
def test_conversions_leave_indices_as_they_are(convert: Callable[[nn.Module], nn.Module], backend: str) -> None:
    model = exported(backend)
    before, y = model.state_dict(), model(X)
    converted = convert(copy.deepcopy(model))
    for layer, other in zip(sparse_layers(model), sparse_layers(converted), strict=True):
        for name in layer.constants:
            assert torch.equal(getattr(layer, name), getattr(other, name))
            assert getattr(layer, name).dtype == getattr(other, name).dtype
    assert list(converted.state_dict()) == list(before)
    close(converted(X), y, times=1e3)


@pytest.mark.parametrize("backend", ["torch", "int8"])
def test_indices_are_shared_with_other_processes_and_stay_through_the_meta_device(backend: str) -> None:
    model = exported(backend)
    assert all(layer.col.is_shared() and layer.values.is_shared() for layer in sparse_layers(copy.deepcopy(model).share_memory()))
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    assert [layer.block_mask() for layer in sparse_layers(empty)] == [layer.block_mask() for layer in sparse_layers(model)]
    for layer, other in zip(sparse_layers(empty), sparse_layers(model), strict=True):
        layer.values.copy_(other.values)
        if layer.scale is not None:
            layer.scale.copy_(other.scale)
    empty.load_state_dict({k: v for k, v in model.state_dict().items() if "bias" in k}, strict=False)
    close(empty(X), model(X))


# Indices that were written are validated before a kernel reads them.


def _write(name: str, index: Any, value: Any) -> Callable[[Any], object]:
    return lambda layer: getattr(layer, name).__setitem__(index, value)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a negative column": _write("col", 0, -(10**6)),
    "a large column": _write("col", -1, 2**30),
    "a large start": _write("crow", -1, 10**6),
    "a negative start": _write("crow", 1, -5),
    "unordered columns": lambda layer: layer.col.copy_(layer.col.flip(0).clone()),
    "an operator in place": lambda layer: layer.crow.mul_(2),
    "a view": lambda layer: layer.col.view(-1)[:2].fill_(99),
    "other columns": lambda layer: setattr(layer, "col", layer.col + 100),
    "fewer columns": lambda layer: setattr(layer, "col", layer.col[:-1]),
    "another type": lambda layer: setattr(layer, "crow", layer.crow.int()),
    "fewer values": lambda layer: setattr(layer, "values", layer.values[:-1]),
    "another shape": lambda layer: setattr(layer, "shape", (layer.shape[0] + 8, layer.shape[1])),
}


@BOTH_BACKENDS
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_change_that_makes_indices_invalid_is_an_error_that_names_the_layer(backend: str, change: str, position: int) -> None:
    model = exported(backend)
    model(X)
    CHANGES[change](model[position])
    for changed in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=rf"^{position}: a block-sparse weight of shape .* it is not what was exported"):
            changed(X)
        with pytest.raises(ValueError, match=rf"^{position}: "):
            _ = changed[position].weight
    with pytest.raises(ValueError, match=rf"^{position}: "), torch.inference_mode():
        model(X)
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match=rf"^{position}: "):
        model(x)


@BOTH_BACKENDS
def test_compiled_and_transformed_models_validate_too(backend: str) -> None:
    layer, x = exported(backend)[4], torch.randn(3, 128)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    program = torch.export.export(layer, (x,)).module()
    y = layer(x.clone().requires_grad_())
    before = layer.col[0].item()
    layer.col[0] = -(10**6)
    for run in (
        lambda: compiled(x),
        lambda: program(x),
        lambda: torch.vmap(layer)(x),
        lambda: torch.func.jacrev(layer)(x),
        lambda: y.sum().backward(),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"col must be from 0|modified by an inplace operation"):
            run()
    layer.col[0] = before
    close(compiled(x), layer(x))


def test_functional_calls_with_other_indices_validate_them() -> None:
    layer, x = exported()[4], torch.randn(3, 128)
    y = layer(x)
    close(torch.func.functional_call(layer, layer.state_dict(), x), y)
    with pytest.raises(ValueError, match=r"^4: .* col must be from 0"):
        torch.func.functional_call(layer, {"col": layer.col + 100}, x)
    with pytest.raises(ValueError, match=r"^4: .* values has"):
        torch.func.functional_call(layer, {"values": layer.values[:-1]}, x)
    assert torch.equal(layer(x), y)


def test_a_valid_change_takes_effect() -> None:
    mask = bp.BlockMask(torch.tensor([[True, False, False]]), bp.BlockGrid((4, 12), (4, 4)))
    layer, x = export.block_sparse(bp.apply_masks(nn.Linear(12, 4), {"weight": mask}), backend="torch"), torch.randn(3, 12)
    layer(x)
    before = layer.weight
    layer.col[0] = 2
    assert torch.equal(layer.weight, before.roll(8, 1))
    close(layer(x), nn.functional.linear(x, before.roll(8, 1), layer.bias))


@BOTH_BACKENDS
def test_indices_are_validated_once(backend: str) -> None:
    model = exported(backend)
    compiled = torch.compile(model[4], fullgraph=True, backend="aot_eager")
    flat, x = torch.randn(3, 128), X.clone().requires_grad_()
    compiled(flat)
    with mock.patch.object(storage, "validate", wraps=storage.validate) as validate:
        model(X), model(x).sum().backward(), compiled(flat)
        assert validate.call_count == 0
        duplicate = copy.deepcopy(model)
        duplicate(X), duplicate(X)
        assert validate.call_count == 3
    size = len(storage._validated)
    del model, duplicate, compiled
    torch._dynamo.reset()
    assert len(storage._validated) < size


def test_layers_made_or_copied_in_inference_mode_work_and_validate() -> None:
    with torch.inference_mode():
        model = exported()
        duplicate = copy.deepcopy(model)
        y = model(X)
    for made in (model, duplicate):
        assert not made[0].col.is_inference()
        with torch.no_grad():
            close(made(X), y)
            made[0].col[0] = -1
            with pytest.raises(ValueError, match="col must be from 0"):
                made(X)


@BOTH_BACKENDS
def test_values_that_were_moved_one_by_one_are_multiplied_with_indices_of_another_device(backend: str) -> None:
    layer = exported(backend)[4]
    assert layer.to("meta")(torch.empty(3, 128, device="meta")).shape == (3, 16)
    assert layer.crow.device.type == "cpu"


# Which blocks an exported layer holds


def kept(mask: bp.BlockMask) -> Tensor:
    return bp.expand(mask.keep, mask.grid)


@given(kept_matrices())
def test_the_mask_of_a_layer_is_that_of_the_model(matrix: Matrix) -> None:
    weight, keep, grid = matrix
    layer = nn.Linear(grid.shape[1], grid.shape[0], bias=False)
    model = bp.apply_masks(layer, {"weight": bp.BlockMask(keep, grid)}, {"weight": weight.float()})
    sparse = export.block_sparse(model, backend="torch")
    mask = sparse.block_mask()
    assert mask.grid.shape == grid.shape == tuple(sparse.weight.shape)
    assert torch.equal(kept(mask), bp.expand(keep, grid))
    assert mask == bp.BlockMask(keep, grid)


@pytest.mark.parametrize("block", [(4, 4), (4,), (-1, 2), (3, 1, 1), (1, 1, 2, 3), (2, 2, -1, 1), (8, 16, 1), (5, 3)])
@pytest.mark.parametrize("gpu_layout", [False, True])
def test_the_mask_of_a_convolution_is_that_of_the_model(block: tuple[int, ...], gpu_layout: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "uses_gpu_layout", lambda device: gpu_layout)
    conv = nn.Conv2d(16, 10, (2, 3))
    masks = random_masks(conv, bp.convs(block))
    sparse = export.block_sparse(bp.apply_masks(conv, masks), backend="torch")
    mask = sparse.block_mask()
    assert mask.grid.shape == tuple(sparse.weight.shape)
    assert torch.equal(kept(mask), kept(masks["weight"]))
    assert mask == masks["weight"]


BLOCKS = pytest.mark.parametrize("block", [(32, 32), (64, 64), (3, 3), (-1, 1), (1,), (5, 6), (96, 2)])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 384), nn.Unflatten(1, (96, 2, 2)), nn.Conv2d(96, 96, 2))


def in_blocks(block: tuple[int, ...]) -> tuple[nn.Module, dict[str, bp.BlockMask]]:
    model = network()
    masks = bp.recipes.magnitude(bp.first_of(bp.including(bp.linears(block), "0.*"), bp.convs(block)))(model, 0.5).masks
    return export.block_sparse(bp.apply_masks(model, masks), backend="torch", trainable=True), masks


@BLOCKS
@pytest.mark.parametrize("gpu_layout", [False, True])
def test_pruned_blocks_survive_every_copy(
    block: tuple[int, ...], gpu_layout: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sparse, masks = in_blocks(block)
    monkeypatch.setattr(triton_launch, "uses_gpu_layout", lambda device: gpu_layout)  # from here on, layers re-store their weight
    save_file(sparse.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    torch.save(sparse, tmp_path / "model.pt")
    again = in_blocks((1, 1))[0]
    again.load_state_dict(state)
    copies = {
        "deepcopy": copy.deepcopy(sparse),
        "to": copy.deepcopy(sparse).to(torch.float64),
        "pickle": torch.load(tmp_path / "model.pt", weights_only=False),
        "new model": export.load_state_dict(network(), state),
        "meta": export.load_state_dict(network().to("meta"), state),
        "layer": again,
    }
    for kind, model in copies.items():
        assert bp.read_masks(model) == masks, kind
        assert torch.equal(model[0].weight.float(), sparse[0].weight), kind
        assert bp.read_masks(export.load_state_dict(network(), model.state_dict())) == masks, kind


def test_a_weight_with_three_axes_is_read_back() -> None:
    mask = bp.BlockMask(torch.tensor([[[True], [False], [True]], [[False], [True], [True]]]), bp.BlockGrid((8, 6, 3), (4, 2)))
    layer = export.BlockSparseLinear(export.pack_weight(torch.randn(8, 6, 3), mask), None)
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)


@BLOCKS
def test_masks_learn_in_the_blocks_that_were_pruned(block: tuple[int, ...]) -> None:
    """The loop of the guide, and the way back to the masked model."""
    sparse, masks = in_blocks(block)
    where = bp.first_of(bp.including(bp.linears(block), "0.*"), bp.convs(block))
    data = bp.collect.weights(export.dense(sparse), where=where)
    after = bp.regrow(bp.read_masks(sparse), drop=bp.metric.l1(data), grow=bp.metric.random(data, generator=0), fraction=0.3)
    export.update(sparse, after, optimizer=None)
    assert bp.read_masks(sparse) == after != masks
    back = bp.apply_masks(export.dense(sparse), bp.read_masks(sparse))
    assert bp.read_masks(back) == after
    back.load_state_dict(bp.apply_masks(network(), masks).state_dict())
    whole = {name: bp.BlockGrid(mask.grid.shape, ()) for name, mask in masks.items()}
    other = {name: bp.BlockMask(torch.ones(grid.size).bool(), grid) for name, grid in whole.items()}
    export.update(sparse, other, optimizer=None)
    assert bp.read_masks(sparse) == other, "masks of other blocks"


def test_a_state_of_an_earlier_blockprune_has_the_stored_blocks() -> None:
    sparse, masks = in_blocks((32, 32))
    state = {key: torch.cat((x[:4], x[-1:])) if key.endswith("layout") else x for key, x in sparse.state_dict().items()}
    loaded = export.load_state_dict(network(), state)
    sparse.load_state_dict(state)
    for model in (loaded, sparse):
        assert bp.read_masks(model)["0.weight"].grid.block == (16, 32)
        assert all(torch.equal(kept(mask), kept(masks[name])) for name, mask in bp.read_masks(model).items())
        assert model.state_dict()["0.layout"].tolist() == [384, 64, 16, 32, 1]


def test_a_pruned_block_that_is_stored_in_part_is_none() -> None:
    """Indices that were changed say what is stored."""
    mask = bp.BlockMask(torch.ones(2, 1).bool(), bp.BlockGrid((64, 64), (32, 64)))
    whole = export.pack_weight(torch.ones(64, 64), mask)
    assert (whole.block, kept_mask(whole, (64, 64))) == ((16, 64), mask)
    part = attrs.evolve(whole, values=whole.values[16 * 64 :], crow=torch.tensor([0, 0, 1, 2, 3]), col=whole.col[1:])
    stored = bp.BlockMask(torch.tensor([[False], [True], [True], [True]]), bp.BlockGrid((64, 64), (16, 64)))
    assert kept_mask(part, (64, 64)) == stored
    layer = export.BlockSparseLinear(part, None)
    assert layer.block_mask() == stored
    assert torch.equal(layer.weight != 0, kept(stored))


@pytest.mark.parametrize("block", [(0, 4), (-1, 4), (4, 65), (385, 4)])
def test_a_state_whose_pruned_blocks_do_not_fit_is_refused(block: tuple[int, int]) -> None:
    sparse, masks = in_blocks((32, 32))
    state = sparse.state_dict()
    state["0.layout"] = torch.tensor([384, 64, 16, 32, *block, 1])
    with pytest.raises(ValueError, match=r"0: layout is .* do not fit 384 x 64"):
        export.load_state_dict(network(), state)
    with pytest.raises(RuntimeError, match=r"0: layout is .* do not fit 384 x 64"):
        sparse.load_state_dict(state)
    assert bp.read_masks(sparse) == masks
