"""The dense weight of an exported layer can be read like any tensor, and refuses changes, which would be lost."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune as bp
from blockprune import export
from blockprune.export.exported_weight import ExportedWeight


def exported(layer: nn.Module, **options: Any) -> Any:
    rule = bp.first_of(bp.linears((4, 4)), bp.convs((4,)))
    model = nn.Sequential(layer)
    bp.apply_masks(model, bp.recipes.magnitude(rule)(model, 0.5).masks)
    return export.block_sparse(model, backend="torch", **options)


MAKE: dict[str, Callable[[], Any]] = {
    "linear": lambda: exported(nn.Linear(8, 12)),
    "trainable": lambda: exported(nn.Linear(8, 12), trainable=True),
    "int8": lambda: exported(nn.Linear(8, 12), dtype="int8", max_error=float("inf")),
    "convolution": lambda: exported(nn.Conv2d(8, 12, 3)),
}
EVERY_KIND = pytest.mark.parametrize("kind", MAKE)


def assign_data(weight: Tensor) -> None:
    weight.data = torch.zeros_like(weight)


def set_item(weight: Tensor) -> None:
    weight[0] = 0


def multiply(weight: Tensor) -> None:
    weight *= 0


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda weight: weight.mul_(0),
    "zero_": lambda weight: weight.data.zero_(),
    "copy_": lambda weight: weight.detach().copy_(torch.zeros_like(weight)),
    "zeros_": nn.init.zeros_,
    "normal_": nn.init.kaiming_normal_,
    "__setitem__": set_item,
    "__imul__": multiply,
    ".data": assign_data,
}


@EVERY_KIND
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_refused(change: str, kind: str) -> None:
    model = MAKE[kind]()
    before = model[0].weight.detach().clone()
    remedy = "the masked model, and export that again" if kind == "int8" else r"layer\.values, or give export\.update the option weights="
    message = rf"would be lost, because the dense weight \(12, 8.* of layer 0 .*{remedy}.*a copy of your own: layer\.weight\.clone\(\)"
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        CHANGES[change](model[0].weight)
    assert torch.equal(model[0].weight, before)


def test_a_model_that_normalises_its_weight_in_its_forward_is_refused() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 12)

        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                self.fc.weight.div_(self.fc.weight.norm())
            return self.fc(x)

    with pytest.raises(RuntimeError, match=r"div_ would be lost, because the dense weight \(12, 8\) of layer 0.fc"):
        exported(Normalised())(torch.ones(2, 8))


@EVERY_KIND
def test_a_change_that_cannot_be_refused_is_reported(kind: str) -> None:
    layer = MAKE[kind]()[0]
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="a change through a view or an out argument is lost"):
        layer.weight[0].zero_()


@EVERY_KIND
def test_a_parameter_made_of_the_weight_is_trained_without_a_warning(kind: str) -> None:
    layer = MAKE[kind]()[0]
    weight, before = layer.weight, layer.weight.clone()
    trained = nn.Parameter(weight)
    trained.sum().backward()
    torch.optim.SGD([trained], lr=0.1).step()
    assert torch.equal(trained, before - 0.1)
    assert torch.equal(layer.weight, before)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del weight
    assert not caught


@EVERY_KIND
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_takes_a_copy_of_the_weight(kind: str, backend: str) -> None:
    weight = MAKE[kind]()[0].weight.detach().clone()
    product = torch.compile(lambda x, weight: x @ weight.flatten(1), backend=backend)
    torch.testing.assert_close(product(torch.ones(2, 12), weight), torch.ones(2, 12) @ weight.flatten(1))


@EVERY_KIND
def test_everything_else_gives_plain_tensors(kind: str) -> None:
    layer = MAKE[kind]()[0]
    weight = layer.weight
    plain = weight.as_subclass(Tensor)
    assert isinstance(weight, ExportedWeight)
    assert isinstance(weight, Tensor)
    for result in (weight + 0, weight.clone(), weight[0], weight.flatten(), copy.deepcopy(weight.detach()), weight.to(torch.float64)):
        assert type(result) is Tensor
    assert type(nn.Parameter(weight.detach())) is nn.Parameter
    assert torch.equal(copy.deepcopy(weight.detach()), plain)
    assert torch.equal(pickle.loads(pickle.dumps(weight.detach())), plain)
    buffer = io.BytesIO()
    torch.save(weight.detach(), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), plain)
    assert not weight.detach().numpy().flags.writeable
    with torch.inference_mode():
        assert torch.equal(layer.weight, plain)


def test_gradients_pass_through_the_weight_of_a_trainable_layer() -> None:
    layer, x = MAKE["trainable"]()[0], torch.randn(5, 8)
    (gradient,) = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).square().sum(), [layer.values])
    (expected,) = torch.autograd.grad(layer(x).square().sum(), [layer.values])
    torch.testing.assert_close(gradient, expected)
