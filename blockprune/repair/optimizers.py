"""Optimizers for `distill`, and a limit for their gradients."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockprune.core.arguments import check_number
from blockprune.core.precision import at_least_float32, multiplies_bfloat16

__all__ = ["Muon", "limit_gradients", "muon", "newton_schulz"]

LONGEST = 16  # times the shorter side: a longer matrix is the table of an embedding


def muon(parameters: Iterable[Tensor], *, lr: float = 1e-3, weight_decay: float = 0.0) -> list[Optimizer]:
    """Muon for matrices, and AdamW for all other parameters (https://kellerjordan.github.io/posts/muon/).

    Muon makes the singular values of each update nearly equal; it often needs fewer tokens than AdamW alone. It takes the parameters with
    two axes of which the longer is at most 16 times the shorter. A longer one is taken for the table of an embedding, for which Muon is
    not meant; most low-rank factors are as long. The values of block-sparse layers have one axis, so AdamW trains them. Muon's updates have
    the size of AdamW's (Liu et al. 2502.16982, section 2.2), so that both can have one learning rate. On a CPU that has no instructions
    for bfloat16, Muon computes in float32, which is faster there.

    Args:
        parameters: those to train.
        lr: the learning rate of both.
        weight_decay: of both, as a share of the learning rate.

    Raises:
        ValueError: none of the parameters is for Muon; a number that is negative or not finite.
        TypeError: groups of parameters, or names with them.

    Example:
        >>> [type(optimizer).__name__ for optimizer in bp.muon(nn.Linear(8, 4).parameters())]
        ['Muon', 'AdamW']
    """
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters has the type {type(parameters).__name__}; give tensors, such as model.parameters()")
    lr = check_number("lr", lr, "a finite number from 0 on", lowest=0)
    weight_decay = check_number("weight_decay", weight_decay, "a finite number from 0 on", lowest=0)
    parameters = list(parameters)
    if other := [type(p).__name__ for p in parameters if not isinstance(p, Tensor)]:
        raise TypeError(f"parameters holds a {other[0]}; give tensors, such as model.parameters(), without names and not in groups")
    matrices, others = ([p for p in parameters if _is_for_muon(p) == wanted] for wanted in (True, False))
    if not matrices:
        raise ValueError(
            f"parameters has no matrix for Muon, two axes of which the longer is at most {LONGEST} times the shorter, among "
            f"{len(parameters)}; give torch.optim.AdamW"
        )
    optimizers: list[Optimizer] = [Muon(matrices, lr, weight_decay)]
    return [*optimizers, torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay)] if others else optimizers


def limit_gradients(parameters: Sequence[Tensor], largest: float | None) -> bool:
    """Scale gradients in place, so that their norm is at most this, or leave them for None; whether all are finite.

    It is `torch.nn.utils.clip_grad_norm_`, also for the sparse gradients of ``nn.Embedding(sparse=True)``.

    Example:
        >>> from blockprune.repair.optimizers import limit_gradients
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> limit_gradients([weight], 1.0), weight.grad
        (True, tensor([0.6000, 0.8000]))
    """
    sparse = [p for p in parameters if p.grad is not None and p.grad.is_sparse]
    if largest is not None and not sparse:
        return bool(nn.utils.clip_grad_norm_(parameters, largest).isfinite())
    for p in sparse:
        p.grad = p.grad.coalesce()  # type: ignore[union-attr]  # a row that has several entries has the norm of their sum
    values = [p.grad.values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None]
    if largest is None:
        finite = [x.isfinite().all() for x in values]
        return not finite or bool(torch.stack([x.to(finite[0].device) for x in finite]).all())
    norm = nn.utils.get_total_norm(values)
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for x in values:
        x.mul_(factor.to(x.device))
    return bool(norm.isfinite())


def _is_for_muon(parameter: Tensor) -> bool:
    return parameter.ndim == 2 and max(parameter.shape) <= LONGEST * min(parameter.shape)


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with updates of AdamW's size; on a CPU without instructions for bfloat16 they are computed in float32.

    Example:
        >>> from blockprune.repair.optimizers import Muon
        >>> weight = nn.Parameter(torch.zeros(2, 3))
        >>> weight.grad = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.1, 0.0]])
        >>> Muon([weight], lr=0.1, weight_decay=0.0).step()
        >>> bool((weight.diagonal() < -0.02).all())  # both directions are about as long: 0.1 * 0.2 * 3 ** 0.5
        True
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change the parameters by their gradients; returns what the closure returns."""
        devices = {p.device for group in self.param_groups for p in group["params"]}
        if all(map(multiplies_bfloat16, devices)):
            return super().step(closure)  # type: ignore[no-untyped-call]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
        update = newton_schulz(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """A matrix with the same singular vectors whose singular values are nearly 1 (https://kellerjordan.github.io/posts/muon/).

    Example:
        >>> from blockprune.repair.optimizers import newton_schulz
        >>> values = torch.linalg.svdvals(newton_schulz(torch.randn(4, 6), (3.4445, -4.7750, 2.0315), 5, 1e-7))
        >>> bool((values > 0.4).all() and (values < 1.3).all())
        True
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = at_least_float32(matrix.T if is_tall else matrix)
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
