"""What is collected a layer at a time, from the last to the first, is what one pass over the whole model gives, to the bit."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
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
Add = Callable[[Tensor, Tensor], Tensor]


def into_its_input(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def into_the_output(x: Tensor, y: Tensor) -> Tensor:
    y += x
    return y


def twice(x: Tensor, y: Tensor) -> Tensor:
    return x.mul_(0.5).add_(y)


class Block(nn.Module):
    """A norm keeps its input for its gradient; a block that overwrites that input has none."""

    def __init__(self, add: Add = torch.add, has_norm: bool = True) -> None:
        super().__init__()
        norm = nn.LayerNorm(8) if has_norm else nn.Identity()
        self.norm, self.up, self.gate, self.down, self.add = norm, nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8), add

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.add(x, self.down(self.up(y) * self.gate(y).sigmoid()))


class Model(nn.Module):
    """``skip`` lets the head see the first layer's output, too."""

    def __init__(self, skip: bool = False, **options: Any) -> None:
        super().__init__()
        self.layers, self.head, self.skip = nn.ModuleList(Block(**options) for _ in range(3)), nn.Linear(8, 4), skip

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
    check_one_pass(model().to(dtype), dtype)


@pytest.mark.parametrize("add", [into_its_input, into_the_output, twice], ids=lambda add: add.__name__)
def test_residual_additions_in_place_change_nothing(add: Add) -> None:
    """Also not the batches, which the first layer is given."""
    network = model(add=add, has_norm=False)
    check_one_pass(network)
    usual = model(has_norm=False)
    usual.load_state_dict(network.state_dict())
    if add is not twice:
        where = bp.including(bp.linears((4, 4)), "layers.*")
        found, expected = (LOOK(m, where=where, calibration=calibration()) for m in (network, usual))
        for name, p in expected.items():
            torch.testing.assert_close(found[name].stats, p.stats)


def test_a_layer_that_overwrites_what_its_gradient_needs_is_named() -> None:
    network = model(add=into_its_input)
    with pytest.raises(RuntimeError, match=r"layer 'layers.2' overwrites a tensor .* write x = x \+ y in place of x \+= y, .*budget=None"):
        by_layer(network, bp.including(bp.linears((4, 4)), "layers.*"), calibration())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def check_one_pass(network: Model, dtype: torch.dtype = torch.float32) -> None:
    where, run = bp.including(bp.linears((4, 4)), "layers.*"), calibration(dtype)
    expected = LOOK(network, where=where, calibration=run)
    parts = by_layer(network, where, run)
    assert all(torch.equal(a, b) for a, b in zip(run.batches, calibration(dtype).batches, strict=True))
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


class Shuffling:
    """Batches in another order on each pass; ``first`` is the first one in all of them."""

    def __init__(self, batches: Iterable[Any], first: Any = None) -> None:
        self.batches, self.first = list(batches), first

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.batches)).tolist()
        return iter([*([] if self.first is None else [self.first]), *(self.batches[i] for i in order)])


@pytest.mark.parametrize("has_first", [False, True], ids=["all", "all but the first"])
@pytest.mark.parametrize("seed", range(3))
def test_batches_in_another_order_on_each_pass_are_those_of_one_pass(seed: int, has_first: bool) -> None:
    """Each batch has labels of its own, so that its loss needs the hidden states of this batch."""
    network, where = model(), bp.including(bp.linears((4, 4)), "layers.*")
    pairs = [(torch.randn(5, 6, 8), torch.randn(5, 6, 4)) for _ in range(4)]
    loader = Shuffling(pairs[1:], pairs[0]) if has_first else Shuffling(pairs)
    run = bp.Calibration(loader, loss=lambda output, batch: (output - batch[1]).square().mean(), progress=False)
    torch.manual_seed(seed)
    expected = LOOK(network, where=where, calibration=run)
    torch.manual_seed(seed)
    for data in by_layer(network, where, run):
        for name, p in data.items():
            for key, value in p.stats.items():
                assert torch.equal(value, expected[name].stats[key]), (name, key)
