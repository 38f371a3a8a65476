"""The divergence of logits, a few rows at a time, is its formula: values, gradients, and gradients of gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockprune.repair import divergence


def formula(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    return (p * (p.log() - q.log())).nan_to_num(nan=0.0).sum(-1)


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(5, 7), (3, 4, 6), (1, 1), (0, 3), (2, 0, 3), (13, 2)]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    chunk=st.sampled_from([1, 12, 40]),
)
def test_values_and_gradients_are_those_of_the_formula(seed: int, shape: tuple[int, ...], temperature: float, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher, outer = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3))
    if shape[-1] > 1:
        teacher[..., :1].masked_fill_(teacher[..., 1:2] > 0.5, -torch.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "CPU_CHUNK", chunk)
        results = []
        for function in (divergence.of_logits, formula):
            x = student.clone().requires_grad_()
            value = function(x, teacher, temperature)
            (value * outer[..., 0]).sum().backward()
            results.append((value, x.grad))
    torch.testing.assert_close(results[0], results[1])


def formula_of_top_k(student: torch.Tensor, teacher: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.topk(top_k, -1).indices, True)
    rest = [x.masked_fill(chosen, 0).sum(-1) for x in (q, p)]
    return (chosen * p * (p.log() - q.log())).sum(-1) + rest[1] * (rest[1].log() - rest[0].log())


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(5, 7), (3, 4, 6), (0, 3), (13, 3)]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.integers(1, 2),
    chunk=st.sampled_from([1, 12, 40]),
)
def test_the_most_likely_classes_are_those_of_the_formula(
    seed: int, shape: tuple[int, ...], temperature: float, top_k: int, chunk: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher, outer = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3))
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "CPU_CHUNK", chunk)
        for function in (divergence.of_logits, formula_of_top_k):
            x = student.clone().requires_grad_()
            value = function(x, teacher, temperature, top_k)
            (value * outer[..., 0]).sum().backward()
            results.append((value, x.grad))
    torch.testing.assert_close(results[0], results[1])


def test_the_most_likely_classes_under_function_transforms() -> None:
    student, teacher = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)
    batched = torch.func.vmap(torch.func.grad(lambda x, y: divergence.of_logits(x, y, 2.0, 2).sum()))(student, teacher)
    plain = student.clone().requires_grad_()
    formula_of_top_k(plain, teacher, 2.0, 2).sum().backward()
    torch.testing.assert_close(batched, plain.grad)


def test_a_gradient_has_a_gradient() -> None:
    student, teacher = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: divergence.of_logits(x, teacher, 2.0), student)
    assert torch.autograd.gradcheck(lambda x: divergence.of_logits(x, teacher, 2.0), student)


def test_a_teacher_that_learns_has_a_gradient() -> None:
    student, teacher = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, y: divergence.of_logits(x, y, 1.0), (student, teacher))


def test_function_transforms() -> None:
    student, teacher = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    loss = lambda x, y: divergence.of_logits(x, y, 1.0).mean()  # noqa: E731
    expected = torch.stack(
        [torch.autograd.functional.jacobian(lambda x, y=y: loss(x, y), x) for x, y in zip(student, teacher, strict=True)]
    )
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(student, teacher), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    student, teacher = (3 * torch.randn(4, 50)).to(dtype).requires_grad_(), (3 * torch.randn(4, 50)).to(dtype)
    value = divergence.of_logits(student, teacher, 1.0)
    assert value.dtype == torch.float32
    value.sum().backward()
    exact = student.detach().double().requires_grad_()
    formula(exact, teacher.double(), 1.0).sum().backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(value.double(), formula(exact, teacher.double(), 1.0), rtol=1e-4, atol=1e-5)


def test_a_temperature_that_is_learned_has_its_gradient() -> None:
    student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: divergence.of_logits(student, teacher, t), temperature)


def test_logits_of_one_sample() -> None:
    student, teacher = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: divergence.of_logits(x, teacher, 1.0), student)


def test_gradients_in_bfloat16_have_no_common_error() -> None:
    student, teacher = (torch.randn(3, 1000).bfloat16().requires_grad_(needed) for needed in (True, False))
    exact = student.detach().double().requires_grad_()
    divergence.of_logits(student, teacher, 1.0).mean().backward()
    formula(exact, teacher.double(), 1.0).mean().backward()
    assert student.grad is not None
    assert exact.grad is not None
    slope = (student.grad.double() * exact.grad).sum() / exact.grad.square().sum()
    assert abs(slope.item() - 1) < 1e-3
