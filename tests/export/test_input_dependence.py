"""Elements without a mark are the same for all inputs, whatever operations compute them."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn
from torch.nn import functional as F

from blockprune.export.input_dependence import InputDependence

# each takes the hidden units [4, 6, 8] of a layer with some empty rows, and inputs: booleans, integers and numbers [4, 6, 8]
OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "relu": lambda h, b, i, x: h.relu(),
    "inplace": lambda h, b, i, x: h.clone().mul_(2).relu_().add_(1),
    "threshold": lambda h, b, i, x: F.threshold(h, 0.1, 3.0),
    "masked_fill": lambda h, b, i, x: h.masked_fill(b, 1),
    "masked_fill_ of rows": lambda h, b, i, x: h.clone().masked_fill_(b[:, :, :1], 1),
    "where": lambda h, b, i, x: torch.where(b, h, 2 * h),
    "equal to a number": lambda h, b, i, x: h + (i == 2),
    "gate": lambda h, b, i, x: h * i,
    "product": lambda h, b, i, x: h * x,
    "sum over tokens": lambda h, b, i, x: h.sum(1, keepdim=True).expand_as(h) + x[:, :1, :1],
    "mean over tokens": lambda h, b, i, x: h.mean(1, keepdim=True).expand_as(h),
    "softmax": lambda h, b, i, x: h.softmax(-1),
    "layer norm": lambda h, b, i, x: F.layer_norm(h, (8,)),
    "cumsum": lambda h, b, i, x: h.cumsum(1),
    "flip": lambda h, b, i, x: h.flip(-1),
    "sort": lambda h, b, i, x: h.sort(-1).values,
    "roll": lambda h, b, i, x: h.roll(1, -1),
    "cat": lambda h, b, i, x: torch.cat([h[..., :4], x[..., :2], h[..., 4:6]], -1),
    "slices": lambda h, b, i, x: h[..., 2:].repeat(1, 1, 2)[..., :8],
    "written into zeros": lambda h, b, i, x: _written(h),
    "written by a view": lambda h, b, i, x: _written_by_view(h, x),
    "index by an input": lambda h, b, i, x: h.gather(-1, i),
    "rows by an input": lambda h, b, i, x: h[:, i[0, :, 0] % 6],
    "index_put": lambda h, b, i, x: h.clone().index_put((b,), torch.tensor(1.0)),
    "scatter": lambda h, b, i, x: h.scatter(-1, i, x),
    "attention": lambda h, b, i, x: F.scaled_dot_product_attention(x, x, h),
    "attention by hand": lambda h, b, i, x: (x @ x.mT).softmax(-1).expand(4, 6, 6) @ h,
    "attention with a mask": lambda h, b, i, x: F.scaled_dot_product_attention(x, x, h, attn_mask=b[..., :6] | torch.eye(6).bool()),
    "no average": lambda h, b, i, x: (x @ x.mT).softmax(-1).mT @ h,
    "product of matrices": lambda h, b, i, x: x[:, :, :6] @ h,
    "convolution": lambda h, b, i, x: F.conv1d(h.mT, torch.eye(8)[:, :, None].repeat(1, 1, 2), padding=1).mT[:, :6],
    "depthwise": lambda h, b, i, x: F.conv1d(h.mT, torch.ones(8, 1, 1), groups=8).mT,
    "pooling": lambda h, b, i, x: F.interpolate(F.max_pool1d(h.mT, 2), 6).mT,
    "batch norm": lambda h, b, i, x: F.batch_norm(h.mT, torch.zeros(8), torch.ones(8)).mT,
    "batch norm of the batch": lambda h, b, i, x: F.batch_norm(h.mT, None, None, training=True).mT,
    "padding": lambda h, b, i, x: F.pad(h, (1, 0), value=3.0)[..., :8],
    "branch": lambda h, b, i, x: h + 1 if b.all() else h,
    "item": lambda h, b, i, x: h * i.max().item(),
    "list": lambda h, b, i, x: h * torch.tensor(i.tolist()),
    "numpy": lambda h, b, i, x: h + torch.from_numpy(i.numpy() + 1),
    "full": lambda h, b, i, x: h + torch.full((8,), int(i.sum())),
    "as another type": lambda h, b, i, x: (h.view(torch.int32) ^ i.int()).view(torch.float32),
    "complex": lambda h, b, i, x: torch.view_as_real(torch.view_as_complex(_pairs(h)) * (1j * x[..., :4])).flatten(2),
    "random": lambda h, b, i, x: h + torch.rand(()),
    "random dropout": lambda h, b, i, x: F.dropout(h, 0.5),
    "embedding": lambda h, b, i, x: h * F.embedding(i[..., 0], torch.ones(8, 8)),
    "recurrent": lambda h, b, i, x: nn.GRU(8, 8, batch_first=True)(h)[0],
}


def _pairs(h: Tensor) -> Tensor:
    return h.contiguous().view(4, 6, 4, 2)


def _written(h: Tensor) -> Tensor:
    out = torch.zeros(h.shape)
    out[..., :4] = h[..., 4:]
    return out


def _written_by_view(h: Tensor, x: Tensor) -> Tensor:
    out = h.clone(memory_format=torch.contiguous_format)
    out.view(-1)[3:5].add_(x.view(-1)[3:5])
    return out


def hidden_layer(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(8, 8).requires_grad_(False)
    layer.weight[torch.rand(8) < 0.6] = 0
    layer.bias[torch.rand(8) < 0.3] = 0
    return layer


def some_inputs(size: int = 1) -> list[Tensor]:
    return [torch.rand(4, 6, 8) < 0.5, torch.randint(8, (4, 6, 8)), size * torch.randn(4, 6, 8)]


@given(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=3), seeds)
def test_elements_without_a_mark_are_the_same_for_all_inputs(names: list[str], seed: int) -> None:
    layer = hidden_layer(seed)

    def run(b: Tensor, i: Tensor, x: Tensor) -> Tensor:
        h = layer(x)
        for number, name in enumerate(names):
            torch.manual_seed(seed + number)
            h = OPERATIONS[name](h, b, i, x)
        return h

    if "branch" in names:  # `shrink` takes the other branch in another run
        return
    inputs = some_inputs()
    with torch.no_grad(), InputDependence(layer) as dependence:
        y = run(*inputs)
    unmarked = ~dependence.marks(y)
    assert unmarked.shape == y.shape
    for size in (1, 100):
        other = run(*some_inputs(size))
        assert torch.allclose(other[unmarked], y[unmarked], atol=1e-5)


KEEP_CONSTANTS = ["relu", "inplace", "threshold", "mean over tokens", "roll", "cat", "slices", "written into zeros", "attention"]
KEEP_CONSTANTS += ["attention by hand", "attention with a mask", "depthwise", "batch norm", "padding"]


@pytest.mark.parametrize("name", KEEP_CONSTANTS)
def test_constants_have_no_mark_behind_operations_of_single_units(name: str) -> None:
    layer, inputs = hidden_layer(1), some_inputs()
    with torch.no_grad(), InputDependence(layer) as dependence:
        y = OPERATIONS[name](layer(inputs[2]), *inputs)
    assert not dependence.marks(y).all()
    assert dependence.marks(y).any()


def test_a_parameter_that_no_operation_uses_is_not_used() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with torch.no_grad(), InputDependence(model) as dependence:
        model[0](torch.ones(1, 2))
    assert [dependence.uses(p) for p in model.parameters()] == [True, True, False, False]


def test_a_loop_that_would_not_end_with_another_truth_value_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockprune.export.input_dependence.MAX_READS", 50)

    def loop(x: Tensor) -> None:
        while (x > 3).any():
            x = x - 1

    x = torch.ones(2)
    with InputDependence(nn.Linear(2, 2), "bool", torch.ones_like), pytest.raises(RuntimeError, match="does not end"):
        loop(x)
