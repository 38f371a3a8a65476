"""Collecting reads a model and leaves it alone; what it returns lives a life of its own."""

import copy
from functools import partial

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, shares_memory
from torch import Tensor, nn

import blockprune as bp
from blockprune import collect


def model_of(weight: Tensor) -> nn.Module:
    """A model with one parameter, ``fc.weight``, and one that is fine, ``ok.weight``."""
    fc = nn.Module()
    fc.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return nn.ModuleDict({"ok": nn.Linear(2, 2), "fc": fc})


def snapshot(model: nn.Module) -> dict[str, dict]:
    """Everything about a model that a stage might change."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "identity": {name: id(value) for name, value in model.named_parameters()},
        "flags": {name: (value.requires_grad, value.grad) for name, value in model.named_parameters()},
        "modules": {name: (type(module), module.training) for name, module in model.named_modules()},
        "versions": {name: value._version for name, value in model.named_parameters()},
    }


def equal(a: dict[str, dict], b: dict[str, dict]) -> bool:
    same = all(torch.equal(value, b["values"][name]) for name, value in a["values"].items())
    return same and {**a, "values": list(a["values"])} == {**b, "values": list(b["values"])}


ANY = bp.named("*.weight", (2,))
TILES = bp.named("fc.weight", (2, 2))


@given(st.tuples(st.integers(2, 6), st.integers(2, 6)), dtypes, st.booleans())
def test_collected_weights_are_equal_and_share_no_memory(shape: tuple[int, int], dtype: torch.dtype, lazy: bool) -> None:
    model = model_of(torch.randn(shape, dtype=dtype))
    before = snapshot(model)
    data = collect.weights(model, where=ANY, lazy=lazy)
    assert equal(snapshot(model), before)
    assert list(data) == ["ok.weight", "fc.weight"]
    assert data["fc.weight"].grid == bp.BlockGrid(shape, (2,))
    seen = data["fc.weight"].weight
    assert seen.dtype == dtype
    assert not seen.requires_grad
    assert torch.equal(seen, model.fc.weight)
    frozen = seen.clone()
    with torch.no_grad():
        model.fc.weight.fill_(7)
    assert torch.equal(seen, frozen)  # the model's change is not seen
    seen.fill_(3)
    assert model.fc.weight.eq(7).all()  # nor is the data's by the model
    assert lazy or not shares_memory(seen, model.fc.weight)


def test_of_a_masked_parameter_the_dense_weight_is_read_or_on_request_the_masked_one() -> None:
    model = nn.Linear(4, 4)
    dense = model.weight.detach().clone()
    mask = bp.BlockMask(torch.tensor([[True, False], [False, True]]), bp.BlockGrid((4, 4), (2, 2)))
    bp.apply_masks(model, {"weight": mask})
    where = bp.linears((1, 2))
    assert torch.equal(collect.weights(model, where=where)["weight"].weight, dense)
    assert torch.equal(collect.weights(model, where=where, masked=True)["weight"].weight, dense.where(bp.expand(mask.keep, mask.grid), 0))
    assert bp.read_masks(model) == {"weight": mask}


def test_behind_a_weight_norm_the_weight_is_what_the_model_uses() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    used = model.weight.detach().clone()
    assert torch.equal(collect.weights(model, where=bp.linears((2, 2)))["weight"].weight, used)


def bad(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.ones(4, 6, dtype=dtype)
    weight[1, 2] = value
    return weight


@pytest.mark.parametrize(
    ("weight", "error", "says"),
    [
        (bad(float("nan")), ValueError, ["1 NaN or inf", "excluding"]),
        (bad(float("inf")), ValueError, ["1 NaN or inf", "repair"]),
        (bad(-float("inf"), torch.bfloat16), ValueError, ["1 NaN or inf"]),
        (bad(float("nan"), torch.float16), ValueError, ["1 NaN or inf"]),
        (torch.ones(4, 6, dtype=torch.int64), TypeError, ["torch.int64", "excluding"]),
        (torch.ones(4, 6, dtype=torch.bool), TypeError, ["torch.bool", "convert"]),
        (torch.ones(4, 6, dtype=torch.complex64), TypeError, ["torch.complex64", "floating point"]),
        (torch.ones(4, 6).to_sparse(), TypeError, ["sparse", ".to_dense()"]),
        (torch.ones(4, 6, device="meta"), ValueError, ["meta device", "load the weights"]),
    ],
)
def test_a_weight_without_a_rank_is_an_error_naming_it_and_changes_nothing(weight: Tensor, error: type[Exception], says: list[str]) -> None:
    model = model_of(weight)
    before = [(name, id(value), value._version) for name, value in model.named_parameters()]
    with pytest.raises(error) as caught:
        collect.weights(model, where=ANY)
    assert not [part for part in ["fc.weight", "(4, 6)", *says] if part not in str(caught.value)]
    assert [(name, id(value), value._version) for name, value in model.named_parameters()] == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_finite_weights_whose_sum_overflows_are_fine(dtype: torch.dtype) -> None:
    weight = torch.full((8, 8), torch.finfo(dtype).max, dtype=dtype)
    assert torch.equal(collect.weights(model_of(weight), where=TILES)["fc.weight"].weight, weight)


def convnet() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)
    )
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.weight)
    return model


def test_batchnorm_scales_are_those_behind_each_convolution_along_its_output_channels() -> None:
    model = convnet()
    before = snapshot(model)
    where = bp.first_of(bp.named("0.weight", (1,)), bp.named("3.weight", (-1, 1)))
    data = collect.batchnorm_scales(model, where=where)
    assert equal(snapshot(model), before)
    assert data["0.weight"].stats["batchnorm_scale"].shape == (4, 1, 1, 1)
    assert data["3.weight"].stats["batchnorm_scale"].shape == (1, 6, 1, 1)
    assert torch.equal(data["0.weight"].stats["batchnorm_scale"].flatten(), model[1].weight)
    assert not shares_memory(data["0.weight"].stats["batchnorm_scale"], *model.parameters())
    named = collect.batchnorm_scales(model, where=where, pairs={"0.weight": "1.weight", "3.weight": "4.weight"})
    assert all(torch.equal(named[name].stats["batchnorm_scale"], data[name].stats["batchnorm_scale"]) for name in data)


def test_a_masked_convolution_and_batch_norm_are_paired_as_before() -> None:
    model = convnet()
    where = bp.first_of(bp.named("0.weight", (1,)), bp.named("3.weight", (-1, 1)))
    prune = bp.Pipeline(partial(collect.batchnorm_scales, where=where), bp.metric.batchnorm_scale, bp.allocate.per_model)
    once, later = prune(model, 0.25), prune(model, 0.5)
    bp.apply_masks(model, {**once, "1.weight": bp.BlockMask(torch.ones(4, dtype=torch.bool), bp.BlockGrid((4,), (1,)))})
    assert prune(model, 0.5) == later  # network slimming in steps


@pytest.mark.parametrize(
    ("where", "pairs", "error", "says"),
    [
        (bp.convs((1,)), None, ValueError, ["5.weight", "(2, 6, 1, 1)", "no batch norm", "pairs="]),
        (bp.named("0.weight", (1,)), {"0.weight": "4.weight"}, ValueError, ["0.weight", "(4, 3, 3, 3)", "4.weight", "(6,)"]),
        (bp.named("0.weight", (1,)), {"0.weight": "bn.weight"}, KeyError, ["pairs names 'bn.weight'", "not a parameter"]),
    ],
)
def test_a_convolution_without_its_batch_norm_is_an_error(where: bp.Where, pairs: dict | None, error: type[Exception], says: list) -> None:
    with pytest.raises(error) as caught:
        collect.batchnorm_scales(convnet(), where=where, pairs=pairs)
    assert not [part for part in says if part not in str(caught.value)]


@given(st.integers(0, 3))
def test_a_failed_collect_leaves_a_masked_model_as_it_was(seed: int) -> None:
    model = model_of(torch.randn(4, 6))
    keep = torch.rand((2, 3), generator=torch.Generator().manual_seed(seed)) < 0.5
    bp.apply_masks(model, {"fc.weight": bp.BlockMask(keep, bp.BlockGrid((4, 6), (2, 2)))})
    with torch.no_grad():
        model.ok.weight[0, 0] = float("inf")
    before, masks = copy.deepcopy(model.state_dict()), bp.read_masks(model)
    with pytest.raises(ValueError, match=r"ok\.weight"):
        collect.weights(model, where=ANY)
    assert bp.read_masks(model) == masks
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_memory_that_is_not_torchs_own_is_copied_when_lazy() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    mapped = numpy.ones((4, 4), dtype=numpy.float32)
    layer.weight = torch.nn.Parameter(torch.from_numpy(mapped))
    data = bp.collect.weights(layer, where=bp.linears((2, 2)), lazy=True)
    mapped[:] = 7
    assert torch.equal(data["weight"].weight, torch.ones(4, 4))
