"""The Kullback-Leibler divergence of two tensors of logits, in less time and memory than its formula takes for a large vocabulary."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blockprune.core._compat import forward_ad_is_active, functorch_is_active, is_tracing
from blockprune.core.precision import at_least_float32

__all__ = ["of_logits"]

CPU_CHUNK, GPU_CHUNK = 2**18, 2**26  # logits that are worked on together; those of a CPU, for each thread, fit its cache


def of_logits(student: Tensor, teacher: Tensor, temperature: float, top_k: int | None = None) -> Tensor:
    """``KL(softmax(teacher / T) || softmax(student / T))`` of logits ``[..., classes]``: numbers ``[...]``, in float32 or wider.

    With ``top_k`` it is that of k + 1 classes: the teacher's k most likely ones, and all others together.

    Until the backward pass both logits and the student's gradient are kept, in the student's dtype, where the formula keeps several tensors
    of their size in float32.
    """
    is_plain = torch.compiler.is_compiling() or functorch_is_active() or forward_ad_is_active() or is_tracing()
    if is_plain or teacher.requires_grad or isinstance(temperature, Tensor):
        return _formula(student, teacher, temperature, top_k)
    divergence: Tensor = _Divergence.apply(student, teacher, temperature, top_k)  # type: ignore[no-untyped-call]
    return divergence


def _formula(student: Tensor, teacher: Tensor, temperature: float, top_k: int | None) -> Tensor:
    q, p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    if top_k is not None:
        classes = p.detach().topk(top_k, -1).indices  # [..., k]
        q, p = _with_rest(q, classes), _with_rest(p, classes)
    return _of_log_probabilities(q, p)


def _with_rest(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    """The log-probabilities of some classes, and that of all others together: ``[..., k + 1]``.

    One minus the probabilities of the classes would be 0 in float32 where a model is confident, and would have no gradient.
    """
    lowest = torch.finfo(log_probabilities.dtype).min  # -inf would have a gradient of NaN where all others are -inf, too
    others = log_probabilities.scatter(-1, classes, lowest)
    return torch.cat([log_probabilities.gather(-1, classes), others.logsumexp(-1, keepdim=True)], -1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities in float32 or wider."""
    logits = at_least_float32(logits)
    return F.log_softmax(logits if temperature == 1 else logits / temperature, -1)


def _of_log_probabilities(student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence of log-probabilities ``[..., classes]``."""
    never = teacher == -torch.inf  # 0 * -inf would be NaN
    if functorch_is_active() or never.any():  # `vmap` has no `any` that Python can read
        student, teacher = student.masked_fill(never, 0), teacher.masked_fill(never, 0)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


class _Divergence(torch.autograd.Function):
    """The formula, a few rows at a time; the gradient of the student's logits is ``(softmax(student / T) - target) / T``.

    The target is ``softmax(teacher / T)``; with ``top_k`` the other classes share out what they have in the teacher as in the student.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, top_k: int | None) -> Tensor:
        rows, targets = (x.detach().reshape(-1, student.shape[-1]) for x in (student, teacher))
        kept = torch.float32 if rows.dtype == torch.float16 else rows.dtype  # float16 has no numbers below 6e-8
        gradient = torch.empty_like(rows, dtype=kept) if ctx.needs_input_grad[0] else None
        divergence = rows.new_empty(len(rows), dtype=at_least_float32(rows[:0]).dtype)
        for part in _parts(rows):
            q, p = _log_softmax(rows[part], temperature), _log_softmax(targets[part], temperature)
            if top_k is None:
                divergence[part] = _of_log_probabilities(q, p)
            else:
                classes = p.topk(top_k, -1).indices  # [rows, k]
                some_q, some_p = _with_rest(q, classes), _with_rest(p, classes)  # [rows, k + 1]
                divergence[part] = _of_log_probabilities(some_q, some_p)
                p = (q + (some_p - some_q)[:, -1:]).scatter_(-1, classes, some_p[:, :-1])
            if gradient is not None:
                gradient[part] = (q.exp_() - p.exp_()).div_(temperature)
        ctx.options = (temperature, top_k)
        ctx.save_for_backward(student, teacher, gradient)
        return divergence.view(student.shape[:-1])

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        student, teacher, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this gradient is wanted
            divergence = _formula(student, teacher, *ctx.options)
            return torch.autograd.grad(divergence, student, outer, create_graph=True)[0], None, None, None
        scaled = torch.empty_like(gradient, dtype=student.dtype)
        for part in _parts(gradient):
            scaled[part] = gradient[part] * outer.reshape(-1, 1)[part]  # in float32: rounded factors would change all numbers alike
        return scaled.view(student.shape), None, None, None


def _parts(rows: Tensor) -> Iterator[slice]:
    """A few consecutive rows at a time."""
    elements = CPU_CHUNK * torch.get_num_threads() if rows.device.type == "cpu" else GPU_CHUNK
    size = max(1, elements // max(1, rows.shape[-1]))
    return (slice(start, start + size) for start in range(0, len(rows), size))
