"""What layers are called with: NaN on the way is no other order of layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune as bp
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
