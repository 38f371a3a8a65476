"""Parameters and multiply-adds of whole models, against counts by hand."""

import pytest
import torch
from torch import Tensor, nn

import blockprune as bp
from blockprune import export


class Network(nn.Module):
    """A convolution, a Linear that is used twice, and a product of activations, which has no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.conv(x).mean((2, 3))  # [n, 8]
        hidden = self.fc(self.fc(pooled))
        return hidden @ hidden.mT


def masks() -> dict[str, bp.BlockMask]:
    kernel = torch.zeros(2, 1, 1, 1).bool()
    kernel[0] = True  # half of the convolution
    square = torch.tensor([[True, True], [True, False]])  # three quarters of the Linear
    return {
        "conv.weight": bp.BlockMask(kernel, bp.BlockGrid((8, 4, 3, 3), (4, 4))),
        "fc.weight": bp.BlockMask(square, bp.BlockGrid((8, 8), (4, 4))),
    }


@pytest.mark.parametrize("kind", ["masked", "exported", "dense"])
def test_the_counts_are_those_by_hand(kind: str) -> None:
    n, side = 5, 6
    model: nn.Module = Network() if kind == "dense" else bp.apply_masks(Network(), masks())
    if kind == "exported":
        model = export.block_sparse(model, backend="torch")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    size = export.count_model(model, inputs=torch.randn(n, 4, side, side))
    conv, linear, product = n * side * side * 8 * 36, 2 * n * 64, n * n * 8
    kept = (0, 0) if kind == "dense" else (144, 16)
    saved = (0, 0) if kind == "dense" else (conv // 2, linear // 4)
    assert size.parameters == 8 * 36 + 8 + 64 + 8
    assert size.parameters_kept == size.parameters - sum(kept)
    assert size.multiply_adds == conv + linear + product
    assert size.multiply_adds_kept == size.multiply_adds - sum(saved)
    assert size.sparsity == pytest.approx(sum(kept) / size.parameters)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_inputs_only_parameters_are_counted() -> None:
    size = export.count_model(nn.Linear(3, 2))
    assert (size.parameters, size.parameters_kept, size.multiply_adds) == (8, 8, None)
    assert "multiply-adds" not in repr(size)


def test_buffers_and_modes_of_the_model_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    export.count_model(model, inputs=torch.randn(3, 4))
    assert model.training
    assert int(model[1].num_batches_tracked) == 0
