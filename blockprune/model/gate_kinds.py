"""Kinds of gates: the factor of a block, and the probability that it is not 0, as functions of trainable logits."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import attrs
import torch
from torch import Tensor

from blockprune.core.arguments import check_integer, check_number

__all__ = ["Gate", "hard_concrete", "n_of_m", "soft_movement"]

MOST_CHOICES = 1000  # of n of m blocks


@attrs.frozen
class Gate:
    """A kind of gate: two functions of its logits.

    Args:
        value: (logits, training) -> the factors of the blocks, of the shape of the logits; differentiable. It is called whenever a weight
            is read.
        open_probability: logits -> the probability that a factor is not 0, 0 to 1; differentiable and rising.

    Example:
        >>> scale = bp.gates.Gate(lambda logits, training: logits.sigmoid(), torch.sigmoid)
        >>> model = bp.gates.add(nn.Linear(4, 2), where=bp.linears((2, 2)), gate=scale, initial=0.0)
        >>> bp.gates.expected_sparsity(model).item()
        0.5
    """

    value: Callable[[Tensor, bool], Tensor]
    open_probability: Callable[[Tensor], Tensor]


def hard_concrete(*, temperature: float = 2 / 3, low: float = -0.1, high: float = 1.1) -> Gate:
    """Random gates in [0, 1] that are exactly 0 or 1 with some probability, for L0 regularisation.

    Source: hard concrete gates, Louizos et al. 1712.01312, eq. 10 to 13.

    In training a gate is drawn from torch's global generator whenever the weight is read; in evaluation mode it is its typical value.

    Args:
        temperature: beta of the paper, above 0.
        low, high: the interval to which gates are stretched before they are clipped to [0, 1], gamma and zeta of the paper.

    Raises:
        ValueError: a temperature that is not positive, an interval that does not extend beyond [0, 1], or NaN or inf.
        TypeError: something else than a number.

    Example:
        >>> gate = bp.gates.hard_concrete()
        >>> gate.value(torch.tensor([-5.0, 0.0, 5.0]), False), gate.open_probability(torch.tensor([-5.0, 0.0, 5.0]))
        (tensor([0.0000, 0.5000, 1.0000]), tensor([0.0323, 0.8318, 0.9986]))
    """
    temperature, low, high = (check_number(*named) for named in {"temperature": temperature, "low": low, "high": high}.items())
    if not temperature > 0 or not low < 0 or not high > 1:
        raise ValueError(f"temperature={temperature} must be above 0, low={low} below 0 and high={high} above 1")
    value = partial(_hard_concrete, temperature=temperature, low=low, high=high)
    return Gate(value, partial(_hard_concrete_is_open, shift=temperature * math.log(-low / high)))


def _hard_concrete(logits: Tensor, training: bool, *, temperature: float, low: float, high: float) -> Tensor:
    if training:
        u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        logits = (u.log() - (-u).log1p() + logits) / temperature
    return (logits.sigmoid() * (high - low) + low).clamp(0, 1)


def _hard_concrete_is_open(logits: Tensor, *, shift: float) -> Tensor:
    return (logits - shift).sigmoid()


def soft_movement(*, threshold: float = 0.5) -> Gate:
    """Gates that are 1 where ``sigmoid(logit)`` exceeds a threshold, else 0 (soft movement pruning, Sanh et al. 2005.07683, section 4).

    The gradient of a factor passes to its logit unchanged, ``sum over the block of w dL/dw``, also where the gate is closed: blocks come
    back that training would move away from zero. The open probability is exactly 0 or 1 and has the gradient of ``sigmoid(logit)``.

    Args:
        threshold: above 0 and below 1.

    Raises:
        ValueError: a threshold outside of that.
        TypeError: something else than a number.

    Example:
        >>> bp.gates.soft_movement().value(torch.tensor([-1.0, 1.0]), True)
        tensor([0., 1.])
    """
    threshold = check_number("threshold", threshold)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} must be above 0 and below 1")
    return Gate(partial(_step, threshold=threshold), partial(_sigmoid_step, threshold=threshold))


def _step(logits: Tensor, training: bool, *, threshold: float) -> Tensor:
    return (logits.sigmoid() > threshold).to(logits.dtype) + (logits - logits.detach())


def _sigmoid_step(logits: Tensor, *, threshold: float) -> Tensor:
    soft = logits.sigmoid()
    return (soft > threshold).to(logits.dtype) + (soft - soft.detach())


def n_of_m(n: int = 2, m: int = 4, *, axis: int = 1, temperature: float = 1.0) -> Gate:
    """Random gates of which n of every m consecutive blocks are open, for learned N:M sparsity.

    Source: MaskLLM, Fang et al. 2409.17481, eq. 6 to 8, with a logit for each block instead of each choice of n blocks.

    A choice of n of m blocks has a probability proportional to ``exp(sum of its logits)``. In training a choice is drawn by the Gumbel
    softmax from torch's global generator whenever the weight is read: factors are between 0 and 1, and nearer to these the lower the
    temperature is. In evaluation mode it is the likeliest choice, which `allocate.n_of_m` makes of the scores, too (of equal
    logits it may take others). The sparsity is always ``1 - n / m``, so these gates need no penalty.

    Args:
        n: how many blocks of every m are open.
        m: consecutive blocks; it must divide the number of blocks along the axis.
        axis: 1 is the input axis of a Linear.
        temperature: tau of the paper, above 0.

    Raises:
        ValueError: n that is not above 0 and below m, more than 1,000 choices, a temperature that is not positive and finite; and, when a
            weight is read, m that does not divide its blocks, or an axis that it does not have.
        TypeError: an axis that is no integer, a temperature that is no number.

    Example:
        >>> gate = bp.gates.n_of_m(2, 4)
        >>> gate.value(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), False)
        tensor([[0., 1., 1., 0.]])
        >>> model = bp.gates.add(nn.Linear(8, 4), where=bp.linears((1, 1)), gate=gate)
        >>> bp.gates.expected_sparsity(model).item()
        0.5
    """
    try:
        n, m = check_integer("n", n, lowest=1), check_integer("m", m, lowest=n + 1)
    except (TypeError, ValueError):
        raise ValueError(f"n={n!r} and m={m!r} must be whole numbers with 0 < n < m, such as n=2 and m=4") from None
    if (choices := math.comb(m, n)) > MOST_CHOICES:
        raise ValueError(
            f"n={n}, m={m} have {choices:,} choices, and every read computes all; take at most {MOST_CHOICES:,}, such as 2 of 4"
        )
    axis = check_integer("axis", axis, "an integer, an axis of the blocks")
    temperature = check_number("temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    return Gate(partial(_choice, temperature=temperature, n=n, m=m, axis=axis), partial(_choice_is_open, n=n, m=m, axis=axis))


def _choice(logits: Tensor, training: bool, *, temperature: float, n: int, m: int, axis: int) -> Tensor:
    banks = _banks(logits, m, axis)
    if not training:
        return _unbank(torch.zeros_like(banks).scatter(-1, banks.topk(n, -1).indices, 1.0), logits, axis)
    choices = _choices(n, m, logits)
    gumbel = -torch.empty(*banks.shape[:-1], len(choices), device=logits.device).exponential_().log()  # float16 would draw exact zeros
    return _unbank(((banks @ choices.mT + gumbel) / temperature).softmax(-1) @ choices, logits, axis)


def _choice_is_open(logits: Tensor, *, n: int, m: int, axis: int) -> Tensor:
    choices = _choices(n, m, logits)
    return _unbank((_banks(logits, m, axis) @ choices.mT).softmax(-1) @ choices, logits, axis)


def _choices(n: int, m: int, like: Tensor) -> Tensor:
    """Which blocks each choice of n of m opens, ``[choices, m]`` of zeros and ones."""
    return torch.tensor([[float(i in choice) for i in range(m)] for choice in itertools.combinations(range(m), n)], device="cpu").to(like)


def _banks(logits: Tensor, m: int, axis: int) -> Tensor:
    """Every m consecutive logits along an axis, ``[..., m]``."""
    if not -logits.ndim <= axis < logits.ndim or logits.shape[axis] % m:
        raise ValueError(
            f"logits {tuple(logits.shape)}: axis={axis} does not have groups of m={m} blocks; choose another m or axis, or leave this "
            "parameter out of where"
        )
    moved = logits.movedim(axis, -1)
    return moved.reshape(*moved.shape[:-1], -1, m)


def _unbank(banks: Tensor, logits: Tensor, axis: int) -> Tensor:
    return banks.flatten(-2).movedim(-1, axis).reshape(logits.shape)
