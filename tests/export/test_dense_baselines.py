"""Dense models in int8: of masked models, of single layers, and of layers that a new one cannot replace."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune as bp
from blockprune import export
from blockprune.export.dense_baselines import has_dynamic_int8

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
INT8 = [
    export.rowwise_int8,
    pytest.param(export.dynamic_int8, marks=pytest.mark.skipif(not has_dynamic_int8(), reason="this torch has no dynamic int8")),
]
BOTH_KINDS = pytest.mark.parametrize("int8", INT8)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


@BOTH_KINDS
def test_a_masked_model_becomes_int8_with_its_zeros(int8: Callable[[nn.Module], nn.Module]) -> None:
    model = mlp()
    bp.apply_masks(model, bp.recipes.magnitude(bp.linears((4, 4)))(model, 0.5).masks)
    expected = int8(bp.finalize(model))
    assert export.dense_baselines.is_int8(expected)
    assert torch.equal(int8(model)(X), expected(X))
    assert len(bp.read_masks(model)) == 2


@BOTH_KINDS
def test_a_single_linear_becomes_int8(int8: Callable[[nn.Module], nn.Module]) -> None:
    layer = nn.Linear(16, 8)
    result = int8(layer)
    assert export.dense_baselines.is_int8(result)
    assert not isinstance(result, nn.Sequential)
    torch.testing.assert_close(result(X), layer(X), atol=0.1, rtol=0.1)


@BOTH_KINDS
def test_a_weight_without_values_is_named(int8: Callable[[nn.Module], nn.Module]) -> None:
    model = mlp()
    model[2].to("meta")
    with pytest.raises(ValueError, match=r"2.weight \(8, 32\) is on the meta device and has no values"):
        int8(model)


def tripled(layer: Any) -> None:
    layer.forward = types.MethodType(lambda self, x: 3 * nn.Linear.forward(self, x), layer)


def hooked(layer: Any) -> None:
    def triple(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 3 * output

    layer.register_forward_hook(triple)


def hooked_with_kwargs(layer: Any) -> None:
    layer.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 3,), kwargs), with_kwargs=True)


CHANGES = [(hooked, "it has hooks"), (hooked_with_kwargs, "it has hooks"), (tripled, "its forward was replaced")]


@BOTH_KINDS
@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_a_linear_that_does_more_than_a_product_stays_as_it_is(
    change: Callable[[Any], None], reason: str, int8: Callable[[nn.Module], Any]
) -> None:
    model = mlp()
    change(model[0])
    with pytest.warns(UserWarning, match=rf"stay as they are \(0: {reason}\); 1 in all"):
        result = int8(model)
    assert type(result[0]) is nn.Linear
    assert export.dense_baselines.is_int8(result[2])
    torch.testing.assert_close(result(X), model(X), atol=0.1, rtol=0.1)


@BOTH_KINDS
def test_a_layer_with_hooks_stays_wherever_the_model_has_it(int8: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    hooked(model[0])
    model.append(model[0])
    with pytest.warns(UserWarning, match="1 in all"):
        result = int8(model)
    assert result[0] is result[2]
    assert [export.dense_baselines.is_int8(layer) for layer in result] == [False, True, False]
