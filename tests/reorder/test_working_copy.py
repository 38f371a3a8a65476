"""A working copy computes what a copy in float64 computes, but stores its layers' weights in float32; its values can be exchanged."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune as bp
from blockprune.model.calibration import default_forward
from blockprune.reorder import working_copy
from blockprune.reorder.working_copy import WorkingCopy

TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Tied(nn.Module):
    """A language model whose head is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(x)))


class ReadsElsewhere(Tied):
    """It multiplies by the embedding's weight without a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(self.embedding(x)), self.embedding.weight)


class Scaled(nn.Linear):
    """A Linear that does more than its class."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + self.weight.sum()


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3, bias=False)), torch.randn(4, 5)),
    "tied": (Tied, TOKENS),
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3), nn.Flatten()), torch.randn(2, 3, 6, 6)),
    "a subclass": (lambda: nn.Sequential(Scaled(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 5)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8)),
    "a recurrent layer": (lambda: nn.Sequential(nn.Linear(5, 8), nn.RNN(8, 4)), torch.randn(4, 5)),
    "a weight without its layer": (ReadsElsewhere, TOKENS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_working_copy_computes_what_a_float64_copy_computes(name: str, dtype: torch.dtype) -> None:
    make, x = MODELS[name]
    model = make().to(dtype).eval()
    before = copy.deepcopy(model.state_dict())
    got = WorkingCopy.of(model, x, default_forward).run()
    double = copy.deepcopy(model).double()
    expected = double(x.double() if x.is_floating_point() else x)
    for y, z in zip(got, expected if isinstance(expected, tuple) else [expected], strict=True):
        torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@torch.no_grad()
def test_weights_of_called_layers_are_stored_in_float32_and_all_others_in_float64() -> None:
    def dtypes(name: str) -> dict[str, torch.dtype]:
        make, x = MODELS[name]
        return {key: p.dtype for key, p in WorkingCopy.of(make(), x, default_forward).model.named_parameters()}

    narrow, wide = torch.float32, torch.float64
    assert dtypes("mlp") == {"0.weight": narrow, "0.bias": wide, "1.weight": wide, "1.bias": wide, "3.weight": narrow}
    assert dtypes("tied") == {"embedding.weight": narrow, "norm.weight": wide, "norm.bias": wide}
    assert set(dtypes("a weight without its layer").values()) == {wide}  # it is needed in float64 where no layer runs
    assert dtypes("attention")["self_attn.out_proj.weight"] == wide  # torch's attention never calls this layer
    assert dtypes("attention")["linear1.weight"] == narrow


@torch.no_grad()
def test_a_large_linear_is_converted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_copy, "LINEAR_ELEMENTS", 12)
    linear, x = nn.Linear(5, 7), torch.randn(3, 5)
    (y,) = WorkingCopy.of(linear, x, default_forward).run()
    torch.testing.assert_close(y, copy.deepcopy(linear).double()(x.double()), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_values_are_exchanged_and_come_back_to_the_bit() -> None:
    copied = WorkingCopy.of(MODELS["mlp"][0](), MODELS["mlp"][1], default_forward)

    def values() -> list[Tensor]:
        return [t.clone() for t in copied.model.state_dict().values()]

    own = values()
    copied.set_values("varied")
    varied = values()
    copied.set_values("varied parameters")
    copied.set_values("own")
    assert all(map(torch.equal, values(), own))
    assert not any(torch.equal(a, b) for a, b in zip(own, varied, strict=True) if a.is_floating_point())
    copied.set_values("varied")
    assert all(map(torch.equal, values(), varied))


@given(seed=st.integers(0, 2**20), fails=st.booleans())
@torch.no_grad()
def test_units_are_reordered_inside_alone(seed: int, fails: bool) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    plan = [
        bp.UnitPermutation(torch.randperm(6), rows=("0.weight", "0.bias"), columns=("2.weight",)),
        bp.UnitPermutation(torch.randperm(6), rows=("2.weight", "2.bias"), columns=("4.weight",)),
    ]
    copied = WorkingCopy.of(model, torch.randn(2, 3), default_forward)
    before, inside = copied.run(), bp.permute(model, plan).state_dict()
    try:
        with copied.permuted(plan):
            assert all(torch.equal(t.float(), inside[key]) for key, t in copied.model.state_dict().items())
            if fails:
                raise InterruptedError
    except InterruptedError:
        pass
    assert all(map(torch.equal, copied.run(), before))
    assert all(torch.equal(t.float(), model.state_dict()[key]) for key, t in copied.model.state_dict().items())
