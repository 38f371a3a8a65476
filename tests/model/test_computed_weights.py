"""Weights that are no parameters are named, with what computes them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import blockprune as bp

WHERE = bp.linears((4, 4))


class Halved(nn.Linear):
    """A property computes the weight."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.raw = nn.Parameter(self._parameters.pop("weight").data)  # type: ignore[union-attr]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.raw * 0.5

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.register_parameter("weight", value)  # type: ignore[arg-type]


class Other(Halved):
    """The property gives another parameter."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.raw


class Assigned(nn.Linear):
    """The forward assigns the weight."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.raw = nn.Parameter(self._parameters.pop("weight").data)  # type: ignore[union-attr]

    def forward(self, input: Tensor) -> Tensor:
        self.weight = self.raw * 2  # type: ignore[assignment]
        return super().forward(input)


class Fixed(nn.Linear):
    """The weight is a buffer."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        weight = self._parameters.pop("weight").data  # type: ignore[union-attr]
        self.register_buffer("weight", weight)


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a property": (Halved, "the property Halved.weight computes it. Make it an nn.Parameter"),
    "a property of another name": (Other, "the property Other.weight computes it. Make it an nn.Parameter"),
    "a forward": (Assigned, "code that assigns a tensor to the Assigned computes it. Make it an nn.Parameter"),
    "a buffer": (Fixed, "a buffer of the Fixed holds it. Make it an nn.Parameter, with requires_grad=False"),
    "an old hook": (
        lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
        "a hook of the old weight_norm, spectral_norm or torch.nn.utils.prune computes it. Remove the hook",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_message_says_what_computes_a_weight(name: str) -> None:
    make, message = CASES[name]
    model, x = nn.Sequential(make(), nn.Linear(8, 8)), torch.ones(2, 8)
    model(x)
    for where in (WHERE, bp.named("0.weight", (4, 4))):
        with pytest.raises(ValueError, match=rf"0.weight \(8, 8\): this weight is no parameter; {message}.*`excluding`"):
            bp.recipes.magnitude(where)(model, 0.5)
    assert list(bp.recipes.magnitude(bp.excluding(WHERE, "0.*"))(model, 0.5).masks) == ["1.weight"]


@pytest.mark.parametrize("make", [Halved, Other])
def test_a_model_with_such_a_property_is_copied(make: Callable[[], nn.Module]) -> None:
    model, x = nn.Sequential(make(), nn.Linear(8, 8)), torch.ones(2, 8)
    assert torch.equal(bp.finalize(model)(x), model(x))
    assert list(bp.collect.weights(model, where=bp.named("*.raw", (4, 4)))) == ["0.raw"]


def test_a_weight_that_a_forward_has_assigned_is_named_where_torch_cannot_copy_it() -> None:
    model = nn.Sequential(Assigned())
    model(torch.ones(2, 8))
    with pytest.raises(
        ValueError, match=r"0.weight: code that assigns a tensor to the Assigned computes this tensor, and torch cannot copy it"
    ):
        bp.finalize(model)
