"""Parameters and multiply-adds of whole models, against counts by hand."""

from collections import UserDict
from typing import Any

import pytest
import torch
from test_export import MAY_STAY_DENSE
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


class Tied(nn.Module):
    """An embedding whose weight is that of the output layer, which is called twice by name, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.up = nn.ConvTranspose1d(16, 4, 3, stride=2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.up(self.head(input=self.embedding(tokens)).mT)  # type: ignore[no-any-return]


def test_tied_weights_and_transposed_convolutions_take_the_kept_share() -> None:
    half = torch.tensor([[True], [False]])
    of_kernel = bp.BlockMask(half[..., None], bp.BlockGrid((16, 4, 3), (8, 4, 3)))
    masks = {"embedding.weight": bp.BlockMask(half, bp.BlockGrid((16, 8), (8, 8))), "up.weight": of_kernel}
    size = export.count_model(bp.apply_masks(Tied(), masks), inputs=torch.randint(16, (5, 7)))
    head, up = 5 * 7 * 16 * 8, 5 * 7 * 16 * 4 * 3
    assert (size.multiply_adds, size.multiply_adds_kept) == (head + up, head // 2 + up // 2)


def test_a_forward_of_ones_own_and_masked_biases_count_a_layer_once() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)).eval(), torch.randn(10, 8)
    bp.apply_masks(model, bp.recipes.structured(bp.find_axes(model, x))(model, 0.75).masks)
    size = export.count_model(model, inputs=x, forward=lambda model, batch: model[3](model[2](model[1](model[0](batch)))))
    assert size == export.count_model(model, inputs=x)
    assert size.multiply_adds_kept == export.count_model(export.shrink(model, x).model, inputs=x).multiply_adds == 640


def test_without_inputs_only_parameters_are_counted() -> None:
    size = export.count_model(nn.Linear(3, 2))
    assert (size.parameters, size.parameters_kept, size.multiply_adds) == (8, 8, None)
    assert "multiply-adds" not in repr(size)


def test_buffers_and_modes_of_the_model_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    export.count_model(model, inputs=torch.randn(3, 4))
    assert model.training
    assert int(model[1].num_batches_tracked) == 0


def test_a_share_of_nothing_is_no_sparsity() -> None:
    size = export.count_model(nn.Embedding(4, 4), inputs=torch.ones(3, 2).long())  # which multiplies nothing
    assert (size.multiply_adds, size.multiply_adds_kept) == (0, 0)
    assert "100.0%" not in repr(size)
    assert export.count_model(nn.ReLU()).sparsity == 0


@pytest.mark.parametrize(
    ("layer", "x", "by_hand"),
    [
        (nn.LSTM(8, 16), torch.ones(5, 2, 8), 5 * 2 * 64 * (8 + 16)),
        (nn.GRU(8, 16), torch.ones(5, 2, 8), 5 * 2 * 48 * (8 + 16)),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.ones(1, 10, 16), 10 * 16 * (48 + 16 + 64) + 2 * 10 * 10 * 16),
    ],
)
@pytest.mark.parametrize("trains", [False, True])
def test_recurrent_layers_and_attention_count(layer: nn.Module, x: Tensor, by_hand: int, trains: bool) -> None:
    assert export.count_model(layer.train(trains), inputs=x).multiply_adds == by_hand
    assert torch.backends.mkldnn.enabled


class Writes(nn.Module):
    """A model that writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        result: Tensor = self.fc(x.mul_(scale))
        return result


@pytest.mark.filterwarnings("ignore:0 of 1 masked layers")
@pytest.mark.parametrize("kind", [dict, UserDict, tuple])
def test_no_function_changes_the_inputs(kind: Any) -> None:
    mask = bp.BlockMask(torch.eye(4).bool(), bp.BlockGrid((64, 64), (16, 16)))
    model = bp.apply_masks(Writes().eval(), {"fc.weight": mask})
    x, scale = torch.randn(8, 64), torch.tensor(2.0)
    inputs: Any = ((x, scale),) if kind is tuple else kind({"x": x, "scale": scale})
    before = x.clone()
    sparse = export.block_sparse(model, backend="torch")
    export.count_model(model, inputs=inputs)
    export.benchmark(model, sparse, inputs=inputs, rounds=1)
    export.choose(model, inputs=inputs, rounds=1)
    export.block_sparse(model, inputs=inputs, dtype="int8")
    export.recommend_blocks({"fc.weight": mask}, model=model, inputs=inputs, blocks=[(16, 16)], sparsities=[0.5], rounds=1)
    export.cost_table({"fc.weight": mask}, model=model, inputs=inputs, rounds=1)
    assert torch.equal(x, before)
    assert scale == 2


@MAY_STAY_DENSE
def test_choosing_layers_that_train_draws_no_random_numbers_of_torch() -> None:
    mask = bp.BlockMask(torch.eye(4).bool(), bp.BlockGrid((64, 64), (16, 16)))
    model = bp.apply_masks(nn.Linear(64, 64), {"weight": mask})
    state = torch.random.get_rng_state()
    export.choose(model, training=True, rounds=1)
    assert torch.equal(torch.random.get_rng_state(), state)
