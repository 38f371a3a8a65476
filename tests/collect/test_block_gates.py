"""Gates: samples lie along axis 0; attention has second derivatives; SynFlow leaves out the loss; NaN under masks stays there."""

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from strategies import normal
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune as bp
from blockprune import collect, statistics

Pair = namedtuple("Pair", ["loss", "score"])


@dataclasses.dataclass
class Result:
    loss: Tensor
    hidden: Tensor


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, dtype=torch.float64)
        with torch.no_grad():
            self.fc.weight.copy_(normal((4, 4), 3))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.fc(x) * scale  # type: ignore[no-any-return]


def gates(model: nn.Module, statistic: statistics.Statistic, batches: Any, **options: Any) -> Tensor:
    options.setdefault("loss", lambda output, batch: output.square().mean())
    data = collect.with_statistics(model, where=bp.linears((2, 2)), statistics=[statistic], batches=batches, **options)
    return next(iter(data.values())).stats[statistic.name]


@pytest.mark.parametrize("per_sample", ["vmap", "loop"])
def test_a_number_without_axes_is_the_same_for_all_samples(per_sample: str) -> None:
    model, x, scale = Scaled(), normal((5, 4), 0), torch.tensor(3.0, dtype=torch.float64)
    got = gates(model, statistics.gate_fisher, [{"x": x, "scale": scale}], per_sample=per_sample)
    samples = []
    for row in x:  # the slow twin: the derivative of each gate of each sample by hand
        ones = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
        weight = model.fc.weight.detach() * ones.repeat_interleave(2, 0).repeat_interleave(2, 1)
        loss = ((row[None] @ weight.T + model.fc.bias.detach()) * 3).square().mean()
        samples.append(torch.autograd.grad(loss, ones)[0].square())
    torch.testing.assert_close(got, torch.stack(samples).mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("per_sample", ["vmap", "loop"])
@pytest.mark.parametrize("form", ["mapping", "tuple"])
def test_tensors_that_differ_in_length_are_named(per_sample: str, form: str) -> None:
    x, scale = normal((4, 4), 0), torch.ones(8, 1)
    batch: Any = {"x": x, "scale": scale} if form == "mapping" else ((x, scale), torch.zeros(()))
    named = r"\['x'\] has 4, \['scale'\] has 8" if form == "mapping" else r"\[0\]\[0\] has 4, \[0\]\[1\] has 8"
    with pytest.raises(ValueError, match=f"samples along axis 0 of every tensor .* differ in length: {named}; put the samples first"):
        gates(Scaled(), statistics.gate_grad, [batch], per_sample=per_sample)


def test_a_batch_without_samples_says_what_is_needed() -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="its tensors have no axes"):
        gates(model, statistics.gate_grad, [torch.ones(())], forward=lambda model, batch: model(torch.ones(1, 4) * batch))


@pytest.mark.parametrize("per_sample", ["vmap", "loop"])
@pytest.mark.parametrize("statistic", [statistics.gate_fisher, statistics.gate_grad])
def test_a_batch_without_rows_adds_nothing(per_sample: str, statistic: statistics.Statistic) -> None:
    model, x = nn.Linear(4, 2), normal((3, 4), 0).float()
    options: Any = {"per_sample": per_sample}
    whole = gates(model, statistic, [x], **options)
    assert torch.equal(gates(model, statistic, [x, x[:0]], **options), whole)
    assert torch.equal(gates(model, statistic, [x[:0], x], **options), whole)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v)


class SlowAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return (q @ k.mT / 2).softmax(-1) @ v


@pytest.mark.parametrize("statistic", [statistics.gate_hessian_grad, statistics.gate_hessian_diagonal(probes=2)])
def test_attention_has_second_derivatives(statistic: statistics.Statistic) -> None:
    fast, slow = Attention(), SlowAttention()
    slow.load_state_dict(fast.state_dict())
    x = normal((2, 5, 8), 0).float()
    torch.testing.assert_close(gates(fast, statistic, [x]), gates(slow, statistic, [x]), rtol=1e-4, atol=1e-6)


class WithLoss(nn.Linear):
    """Returns its output in several forms, beside a loss."""

    def __init__(self, form: str) -> None:
        super().__init__(4, 4)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        loss = 100 * y.square().mean()
        forms = {
            "tensor": y,
            "tuple": (loss, y),
            "output first": (y, y.exp()),
            "logits": {"loss": loss, "hidden": y.exp(), "logits": y},
            "hidden": {"loss": loss, "last_hidden_state": y, "attention": y.exp()},
            "other": {"loss": loss, "out": [y[..., :2], y[..., 2:]], "index": y.argmax(-1)},
            "dataclass": Result(loss, y),
            "named tuple": Pair(loss, y),
            "nothing": {"loss": loss},
        }
        return forms[self.form]


@pytest.mark.parametrize("form", ["tuple", "output first", "logits", "hidden", "other", "dataclass", "named tuple"])
def test_synflow_sums_the_output_and_not_the_loss(form: str) -> None:
    model, plain = WithLoss(form), WithLoss("tensor")
    plain.load_state_dict(model.state_dict())
    x = normal((3, 4), 0).float()
    torch.testing.assert_close(gates(model, statistics.gate_flow, [x]), gates(plain, statistics.gate_flow, [x]))


def test_synflow_without_an_output_names_the_remedy() -> None:
    with pytest.raises(TypeError, match="without a floating-point tensor that has axes; give forward="):
        gates(WithLoss("nothing"), statistics.gate_flow, [torch.ones(2, 4)])


@pytest.mark.parametrize("per_sample", ["vmap", "loop"])
@pytest.mark.parametrize("statistic", [statistics.gate_fisher, statistics.gate_hessian_grad, statistics.gate_flow])
def test_nan_under_pruned_blocks_reaches_no_gate(statistic: statistics.Statistic, per_sample: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), normal((3, 4), 0).float()
    mask = bp.BlockMask(torch.tensor([[True, False], [True, True]]), bp.BlockGrid((4, 4), (2, 2)))
    masked = bp.apply_masks(model, {"0.weight": mask})
    options: Any = {"per_sample": per_sample, "lazy": True}
    expected = gates(masked, statistic, [x], **options)
    with torch.no_grad():
        masked[0].parametrizations.weight.original[:2, 2:] = torch.nan  # type: ignore[index, union-attr]
    assert torch.equal(gates(masked, statistic, [x], **options), expected)
    assert expected[0, 1] == 0


def test_nan_under_pruned_blocks_is_told_from_nan_in_weights() -> None:
    mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
    masked = bp.apply_masks(nn.Linear(4, 2), {"weight": mask})
    original = masked.parametrizations.weight.original  # type: ignore[union-attr]
    with torch.no_grad():
        original[:, 2:] = torch.nan
    with pytest.raises(ValueError, match=r"weight \(2, 4\): its pruned blocks hold NaN or inf, .*masked=True"):
        collect.weights(masked, where=bp.linears((2, 2)))
    assert collect.weights(masked, where=bp.linears((2, 2)), masked=True)["weight"].weight.isfinite().all()
    with torch.no_grad():
        original[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the weight .* NaN or inf values"):
        collect.weights(masked, where=bp.linears((2, 2)))


@pytest.mark.parametrize("statistic", [bp.statistics.gate_fisher, bp.statistics.weight_grad, bp.statistics.gate_hessian_diagonal()])
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, batch: float(output.detach().sum()), "one number, but loss.* gave float"),
        (lambda output, batch: complex(output.detach().sum()), "one number, but loss.* gave complex"),
        (lambda output, batch: output.detach().sum().numpy(), "one number, but loss.* gave (ndarray|float32)"),
        (lambda output, batch: output.sum() * 1j, r"a real number, but loss.* gave torch\.complex64"),
    ],
)
def test_a_loss_that_is_no_real_tensor_is_named(loss: Any, message: str, statistic: Any) -> None:
    with pytest.raises(ValueError, match=f"statistics {statistic.name} need a loss that is {message}"):
        bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[statistic], batches=[torch.ones(3, 4)], loss=loss)
