"""`muon`: which parameters it takes, and its updates beside torch's and beside a twin in float64."""

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import blockprune as bp
from blockprune.core.precision import multiplies_bfloat16
from blockprune.repair import optimizers

shapes = st.sampled_from([(1, 1), (5, 5), (3, 20), (20, 3), (16, 1), (24, 16)])


def updated(optimizer: type[torch.optim.Optimizer] | None, weight: Tensor, gradients: list[Tensor], has_instructions: bool) -> Tensor:
    """The weight after a step with each gradient, by `bp.muon` where no optimizer is given."""
    parameter, idle = nn.Parameter(weight.clone()), nn.Parameter(torch.ones(2, 2))
    with patch.object(optimizers, "multiplies_bfloat16", lambda device: has_instructions):
        if optimizer:
            muon = optimizer([parameter, idle], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")  # type: ignore[call-arg]
        else:
            (muon,) = bp.muon([parameter, idle], lr=0.1, weight_decay=0.2)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            assert muon.step(lambda: 7) == 7  # type: ignore[arg-type, return-value, func-returns-value]
    assert torch.equal(idle, torch.ones(2, 2))
    return parameter.detach()


def twin(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """Muon with Nesterov's momentum as the post has it, in float64, number by number of the singular values."""
    weight, average = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        average = 0.95 * average + 0.05 * gradient.double()
        left, values, right = torch.linalg.svd(0.05 * gradient.double() + 0.95 * average, full_matrices=False)
        values = values / values.square().sum().sqrt()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        update = 0.2 * math.sqrt(max(weight.shape)) * (left * values) @ right
        weight = (1 - 0.1 * 0.2) * weight - 0.1 * update
    return weight


@given(shapes, st.integers(1, 4), st.integers(0, 100))
@settings(max_examples=40)
def test_updates_are_those_of_the_post_in_float32_and_those_of_torch_with_instructions(
    shape: tuple[int, int], steps: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, *gradients = torch.randn(steps + 1, *shape, generator=generator)
    torch.testing.assert_close(updated(None, weight, gradients, False).double(), twin(weight, gradients), atol=1e-4, rtol=1e-4)
    assert torch.equal(updated(None, weight, gradients, True), updated(torch.optim.Muon, weight, gradients, True))


def test_half_precision_weights_keep_their_type_and_zero_gradients_change_nothing() -> None:
    weight = torch.randn(4, 6).bfloat16()
    changed = updated(None, weight, [torch.randn(4, 6).bfloat16()], False)
    assert changed.dtype == torch.bfloat16
    assert not torch.equal(changed, weight)
    parameter = nn.Parameter(torch.randn(4, 6))
    before, parameter.grad = parameter.detach().clone(), torch.zeros(4, 6)
    with patch.object(optimizers, "multiplies_bfloat16", lambda device: False):
        bp.muon([parameter])[0].step()
    assert torch.equal(parameter, before)


def test_a_state_goes_from_one_precision_to_the_other() -> None:
    """A checkpoint of a machine with instructions is loaded on a machine without."""
    parameters = [nn.Parameter(torch.ones(4, 6)) for _ in range(2)]
    first, second = (bp.muon([p])[0] for p in parameters)
    parameters[0].grad = torch.randn(4, 6)
    first.step()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[parameters[1]]["momentum_buffer"], first.state[parameters[0]]["momentum_buffer"])


def test_which_processors_multiply_bfloat16() -> None:
    for capabilities, expected in (
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
    ):
        with patch.object(torch.cpu, "get_capabilities", lambda c=capabilities: c):
            assert multiplies_bfloat16("cpu") is expected
    with pytest.raises(RuntimeError):
        multiplies_bfloat16("no device")


@pytest.mark.parametrize("largest", [None, 0.5, 100.0])
def test_gradients_are_limited_as_torch_limits_dense_ones(largest: float | None) -> None:
    """The twin: `torch.nn.utils.clip_grad_norm_` of dense gradients; a row that is used twice counts once, with the sum."""
    dense, sparse = (nn.Embedding(5, 3, sparse=is_sparse) for is_sparse in (False, True))
    linear = [nn.Linear(3, 3), nn.Linear(3, 3)]
    for embedding, other in zip((dense, sparse), linear, strict=True):
        embedding.load_state_dict(dense.state_dict())
        other.load_state_dict(linear[0].state_dict())
        other(embedding(torch.tensor([1, 1, 4]))).square().sum().backward()
    if largest is not None:
        nn.utils.clip_grad_norm_([*dense.parameters(), *linear[0].parameters()], largest)
    assert optimizers.limit_gradients([*sparse.parameters(), *linear[1].parameters()], largest)
    assert sparse.weight.grad is not None
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)
    torch.testing.assert_close(linear[1].weight.grad, linear[0].weight.grad)
    sparse.weight.grad.values()[0] = torch.nan
    assert not optimizers.limit_gradients(list(sparse.parameters()), largest)
    assert optimizers.limit_gradients([nn.Parameter(torch.ones(2))], largest)


@pytest.mark.parametrize("wrong", [lambda m: m.named_parameters(), lambda m: [{"params": list(m.parameters())}]])
def test_muon_says_what_it_takes(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"parameters holds a (tuple|dict); give tensors, such as model\.parameters\(\)"):
        bp.muon(wrong(nn.Linear(4, 4)))
