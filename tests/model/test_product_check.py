"""Layers return the product of their inputs and weights, or statistics of inputs are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune as bp
from blockprune import collect, statistics


class WithAttribute(nn.Linear):
    scale = 3.0


class OwnProduct(nn.Linear):  # as Falcon's
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias


class Adapter(nn.Linear):
    """A low-rank term beside the weight's own, by parameters or by submodules (LoRA)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 2), nn.Linear(2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class FakeQuantized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * 4).round() / 4, self.bias)


class WritesInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        x.mul_(2)
        return output


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class Shifted(nn.Conv1d):
    """As many rows as torch's convolution returns, but of other inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 0)))[..., :-1]


class Reflecting(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (1, 1), mode="reflect"), self.weight, self.bias)


class Standardized(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2), keepdim=True), self.weight.std((1, 2), keepdim=True)
        return F.conv1d(x, (self.weight - mean) / std, self.bias)


class OtherProduct(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 2 * weight, bias)


class OtherCall(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)  # type: ignore[no-any-return]


def patched(change: Callable[[Tensor], Tensor]) -> nn.Module:
    layer = nn.Linear(4, 6)
    forward = layer.forward
    layer.forward = lambda x: change(forward(x))  # type: ignore[method-assign,assignment]
    return layer


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "attribute": lambda: WithAttribute(4, 6),
    "own product": lambda: OwnProduct(4, 6),
    "adapter": lambda: Adapter(4, 6),
    "harmless patch": lambda: patched(lambda y: y + 0),
}
WRONG: dict[str, Callable[[], nn.Module]] = {
    "activation": lambda: Activated(4, 6),
    "scaled input": lambda: Scaled(4, 6),
    "quantized": lambda: FakeQuantized(4, 6),
    "input written": lambda: WritesInput(4, 6),
    "own call": lambda: OtherCall(4, 6),
    "patch": lambda: patched(lambda y: 2 * y),
    "causal": lambda: Causal(2, 3, 3),
    "shifted": lambda: Shifted(2, 3, 3),
    "reflecting": lambda: Reflecting(2, 3, 3, padding=1),
    "standardized": lambda: Standardized(2, 3, 3),
    "product": lambda: OtherProduct(2, 3, 3),
}


def run(layer: nn.Module, seed: int, dtype: torch.dtype, stats: Any = (statistics.input_gram, statistics.output_sq)) -> Any:
    x = normal((5, 2, 8) if isinstance(layer, nn.Conv1d) else (64, 4), seed).to(dtype)
    model = nn.Sequential(layer.to(dtype))
    where = bp.named("0.weight", (1,))
    return collect.with_statistics(model, where=where, statistics=stats, batches=[x], loss=lambda y, _: y.square().sum())["0.weight"]


@pytest.mark.parametrize("kind", RIGHT)
@settings(max_examples=5)
@given(seed=seeds, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_layers_that_return_the_product_and_terms_of_their_own_work(kind: str, seed: int, dtype: torch.dtype) -> None:
    layer = RIGHT[kind]()
    if not isinstance(layer, Adapter):
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    param = run(layer, seed, dtype)
    if not isinstance(layer, Adapter):  # w G w^T is the mean of y^2
        w = param.weight.to(param.stats["input_gram"])
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close((w @ param.stats["input_gram"][0] * w).sum(1), param.stats["output_sq"][:, 0], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("statistic", [statistics.input_sq, statistics.output_grad_sq], ids=lambda s: s.name)
@settings(max_examples=3)
@given(seed=seeds, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_layers_that_return_something_else_are_refused_by_name(kind: str, statistic: Any, seed: int, dtype: torch.dtype) -> None:
    layer = WRONG[kind]()
    with pytest.raises(NotImplementedError, match=r"0.weight \(.*does not run the forward of torch's nn.*gate_fisher.*`excluding`"):
        run(layer, seed, dtype, [statistic])


def test_an_adapter_counts_the_calls_of_its_own_layers_once() -> None:
    model = nn.Sequential(Adapter(4, 6))
    fold = collect.fold(model, where=bp.linears((1,)), statistics=[statistics.input_sq], batches=[torch.ones(3, 4)])
    assert {float(sums["n"]) for sums in fold.sums.values()} == {3.0}


def test_a_forward_that_is_replaced_for_all_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))
    with pytest.raises(NotImplementedError, match=r"0.weight .*is replaced in this process \(by .*test_product_check.py\)"):
        run(nn.Linear(4, 6), 0, torch.float32)


def test_hooks_that_change_inputs_or_outputs_are_no_obstacle() -> None:
    layer, x = nn.Linear(4, 6, bias=False), torch.randn(8, 4)
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    layer.register_forward_hook(lambda module, args, output: 3 * output)
    model, where = nn.Sequential(layer), bp.linears((1,))
    stats = [statistics.input_sq, statistics.output_grad_sq]
    data = collect.with_statistics(model, where=where, statistics=stats, batches=[x], loss=lambda y, _: y.sum())["0.weight"]
    torch.testing.assert_close(data.stats["input_sq"][0], (2 * x).square().mean(0))
    torch.testing.assert_close(data.stats["output_grad_sq"][:, 0], torch.full((6,), 9.0 * 8))


def test_a_scaled_embedding_and_a_changed_attention_are_refused() -> None:
    class ScaledEmbedding(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 3 * super().forward(ids)

    class Attention(nn.MultiheadAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:  # type: ignore[override]
            return super().forward(2 * query, key, value, **options)

    class Attends(nn.Module):
        def __init__(self, kind: type[nn.MultiheadAttention]) -> None:
            super().__init__()
            self.attend = kind(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, x, x)[0]  # type: ignore[no-any-return]

    where, options = bp.named("*weight", (1,)), {"statistics": [statistics.input_sq]}
    with pytest.raises(NotImplementedError, match=r"weight .*ScaledEmbedding"):
        collect.with_statistics(ScaledEmbedding(5, 4), where=where, batches=[torch.tensor([[1, 2]])], **options)
    with pytest.raises(NotImplementedError, match=r"attend.in_proj_weight .*Attention"):
        collect.with_statistics(Attends(Attention), where=where, batches=[torch.randn(2, 3, 4)], **options)
    collect.with_statistics(Attends(nn.MultiheadAttention), where=where, batches=[torch.randn(2, 3, 4)], **options)
