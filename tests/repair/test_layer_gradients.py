"""What is collected a layer at a time, from the last to the first, is what one pass over the whole model gives, to the bit."""

import contextlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune as bp
from blockprune import collect, statistics
from blockprune.repair.layer_gradients import collect_layer_by_layer

LOOK = partial(collect.with_statistics, statistics=[statistics.input_gram, statistics.output_grad_gram, statistics.output_grad_sq])
LAYERS = [f"layers.{i}" for i in range(3)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(self.up(y) * self.gate(y).sigmoid())


class Model(nn.Module):
    """``skip`` lets the head see the first layer's output, too."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.layers, self.head, self.skip = nn.ModuleList(Block() for _ in range(3)), nn.Linear(8, 4), skip

    def forward(self, x: Tensor) -> Tensor:
        first = None
        for layer in self.layers:
            x = layer(x)
            first = x if first is None else first
        return self.head(x + first if self.skip else x)


def model(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**options)


def calibration(dtype: torch.dtype = torch.float32) -> bp.Calibration:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(5, 6, 8, generator=generator).to(dtype) for _ in range(3)]
    return bp.Calibration(inputs, loss=lambda output, batch: output.float().square().mean(), progress=False)


def by_layer(network: nn.Module, where: bp.Where, run: bp.Calibration) -> list[bp.Data]:
    parts: list[bp.Data] = []
    load = lambda layer: contextlib.nullcontext()  # noqa: E731
    collect_layer_by_layer(network, LOOK, where, run, layers=LAYERS, receive=parts.append, load=load)
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_one_pass_over_the_whole_model(dtype: torch.dtype) -> None:
    network, where = model().to(dtype), bp.including(bp.linears((4, 4)), "layers.*")
    expected = LOOK(network, where=where, calibration=calibration(dtype))
    parts = by_layer(network, where, calibration(dtype))
    assert [{name.split(".")[1] for name in data} for data in parts] == [{"2"}, {"1"}, {"0"}]
    found = {name: p for data in parts for name, p in data.items()}
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        assert torch.equal(found[name].weight, p.weight)
        for key, value in p.stats.items():
            assert torch.equal(found[name].stats[key], value), (name, key)
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_a_loss_that_depends_on_more_than_the_last_layer_is_refused() -> None:
    where = bp.including(bp.linears((4, 4)), "layers.*")
    with pytest.raises(NotImplementedError, match=r"more than the hidden states of the last layer, 'layers.2'; .*budget=None"):
        by_layer(model(skip=True), where, calibration())
