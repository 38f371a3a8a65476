"""What layers are called with: NaN on the way is no other order of layers."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune as bp
from blockprune.core._compat import tree_leaves
from blockprune.repair.skipped_layers import are_equal
from blockprune.repair.transformer_layers import capture_layer_inputs, find_layers


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


@pytest.mark.parametrize("recipe", [bp.recipes.sparsegpt, bp.recipes.obs])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("number", [0, 1])
def test_nan_in_a_batch_is_named_with_its_layer_and_batch(recipe: Any, value: float, number: int) -> None:
    batches = [torch.ones(8, 4), torch.rand(8, 4)]
    batches[number][0, 0] = value
    calibration = bp.Calibration(batches, loss=lambda output, batch: output.square().mean(), progress=False)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=rf"0\.weight \(8, 4\): NaN or inf reached 'input_gram' in batch {number}; check that batch"):
        recipe(bp.linears((2, 2)), calibration)(model, 0.5)


@pytest.mark.parametrize("target", ["dense", "pruned"])
def test_nan_that_a_layer_makes_is_named_by_the_next_one(target: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), Root(), nn.Linear(8, 4))
    pipeline = bp.recipes.sparsegpt(bp.linears((2, 2)), bp.Calibration([])).pipeline
    with pytest.raises(ValueError, match=r"2\.weight \(4, 8\): NaN or inf reached 'input_gram' in batch 0; check that batch"):
        bp.sequential(model, pipeline, bp.reconstruct.none, [torch.randn(8, 4)], 0.5, target=target, progress=False)


def test_layers_that_do_not_follow_each_other_say_so_also_with_nan() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x) + x)

    model, x = Skipping(), torch.randn(2, 4)
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'layers\.1' is not given the output of the one before"):
        capture_layer_inputs(model, find_layers(model, None, []), lambda model, batch: model(batch), x)


class Padded(nn.Module):
    """Layers on tokens, behind a row of each sample or not; or on targets of another length."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.layers, self.kind = nn.Embedding(9, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), kind

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(labels if self.kind == "targets" else input_ids)
        x = {"prepended": torch.cat((x[:, :1], x), 1), "transposed": x.transpose(0, 1)}.get(self.kind, x)
        return self.layers(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["tokens", "prepended", "transposed", "targets"])
def test_hidden_states_in_an_unknown_order_are_warned_of_once_if_there_is_padding(kind: str) -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 0, 0]]), "attention_mask": mask, "labels": torch.ones(2, 5, dtype=torch.long)}
    recipe = bp.recipes.sparsegpt(bp.linears((2, 2)), bp.Calibration([batch], progress=False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe(Padded(kind), 0.5)
    found = [str(warning.message) for warning in caught]
    assert len(found) == (kind == "prepended"), found
    if found:
        assert found[0].startswith("the layers' rows (2, 4) are not those of the token weights (2, 3)")
        assert "give token_weights=" in found[0]


class Mixing(nn.Module):
    """A layer with another argument; it returns that, or something made from its hidden states, beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, e: Tensor | None = None, *, returned: str = "none") -> Any:
        y = self.fc(x) if e is None else self.fc(x) + self.other(e)
        beside = {"given": e, "computed": self.other(x), "input": x, "weights": self.other.weight.sum() * torch.ones(4)}
        return y if returned == "none" else (y, beside[returned])


class Chain(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers, self.kind = nn.ModuleList(Mixing() for _ in range(3)), kind

    def forward(self, x: Tensor) -> Tensor:
        x0 = x * 2
        if self.kind == "output":
            a = self.layers[0](x0, x0)
            return self.layers[2](self.layers[1](a, e=3 * a), x0)  # type: ignore[no-any-return]
        if self.kind == "position":
            a = self.layers[0](x0, x0)
            return self.layers[2](x=self.layers[1](x=a, e=x0), e=a.exp())  # type: ignore[no-any-return]
        if self.kind == "noise":
            return self.layers[2](self.layers[1](self.layers[0](x0, x0), torch.randn_like(x)), torch.randn_like(x))  # type: ignore[no-any-return]
        if self.kind == "static":
            return self.layers[2](self.layers[1](self.layers[0](x0, x0), x0 + x), e=x.exp())  # type: ignore[no-any-return]
        hidden, e = self.layers[0](x0, x, returned=self.kind)
        hidden, e = self.layers[1](hidden, e, returned="given")
        return self.layers[2](hidden, e)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "stale"),
    [
        ("output", {"layers.1"}),
        ("position", {"layers.2"}),
        ("computed", {"layers.1", "layers.2"}),
        ("static", set()),
        ("noise", set()),
        ("given", set()),
        ("input", set()),
        ("weights", set()),
    ],
)
def test_arguments_that_an_earlier_layer_computes_are_warned_of(kind: str, stale: set[str]) -> None:
    model, x = Chain(kind), torch.randn(5, 4)
    order = find_layers(model, None, [])
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        captured = capture_layer_inputs(model, order, lambda model, batch: model(batch), x, to_end=True)
    # the slow twin: arguments that differ where the first layer has other weights
    nn.init.normal_(model.layers[0].fc.weight)
    if kind != "weights":
        nn.init.normal_(model.layers[0].other.weight)
    torch.set_rng_state(state)
    again = capture_layer_inputs(model, order, lambda model, batch: model(batch), x, to_end=True) if not stale else None
    if again is None:
        with pytest.warns(UserWarning, match="earlier layers compute"):
            again = capture_layer_inputs(model, order, lambda model, batch: model(batch), x, to_end=True)
    leaves = {name: tree_leaves(captured.arguments[name][1:]) for name in captured.arguments}
    changed = {name for name in leaves if not are_equal(leaves[name], tree_leaves(again.arguments[name][1:]))}
    assert changed == stale
    assert len(caught) == bool(stale)
    if stale:
        assert f"layer {min(stale)!r} is given 'e', which earlier layers compute" in str(caught[0].message)
        assert ("(the same holds for 1 more)" in str(caught[0].message)) == (len(stale) == 2)


@pytest.mark.parametrize("recipe", [bp.recipes.wanda, bp.recipes.sparsegpt, bp.recipes.obs])
def test_a_batch_that_is_no_tensor_is_named(recipe: Any) -> None:
    model, batches = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [torch.ones(2, 4), torch.ones(2, 4).numpy()]
    with pytest.raises(TypeError, match="batch 1 is a ndarray; give tensors, tuples or mappings, or pass forward="):
        recipe(bp.linears((2, 2)), bp.Calibration(batches, loss=lambda output, _: output.sum()))(model, 0.5)
