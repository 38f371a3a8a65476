"""Schedules: step -> sparsity (or fraction), for a loop that prunes step by step. Bind the options with ``functools.partial``.

What a schedule gives is from 0 to 1, and so are the numbers that it is made of.
"""

import bisect
import math
from collections.abc import Mapping
from typing import Any

from blockprune.core.arguments import check_fraction, check_number


def constant(step: int, *, value: float) -> float:
    """The same sparsity at every step.

    Raises:
        TypeError, ValueError: a value that is no number from 0 to 1.

    Example:
        >>> bp.schedule.constant(7, value=0.5)
        0.5
    """
    checked: float = _checked("value", value)
    return checked


def linear(step: int, *, final: float, end: int, begin: int = 0, initial: float = 0.0) -> float:
    """From ``initial`` at step ``begin`` to ``final`` at step ``end``, in equal increments; constant before and after.

    Raises:
        TypeError, ValueError: ``begin`` after ``end``, a step that is no number, a sparsity that is no number from 0 to 1.

    Example:
        >>> [bp.schedule.linear(step, final=0.8, begin=100, end=300) for step in (0, 200, 1000)]
        [0.0, 0.4, 0.8]
    """
    t, final, initial = _progress(step, begin, end, final, initial)
    return initial + (final - initial) * t


def cubic(step: int, *, final: float, end: int, begin: int = 0, initial: float = 0.0) -> float:
    """As `linear`, but fast at first: ``final + (initial - final) (1 - t)^3`` (AGP, Zhu & Gupta 1710.01878, eq. 1).

    Raises:
        TypeError, ValueError: ``begin`` after ``end``, a step that is no number, a sparsity that is no number from 0 to 1.

    Example:
        >>> [bp.schedule.cubic(step, final=0.8, begin=100, end=300) for step in (0, 200, 1000)]
        [0.0, 0.7000000000000001, 0.8]
    """
    t, final, initial = _progress(step, begin, end, final, initial)
    return final + (initial - final) * (1 - t) ** 3


def cosine(step: int, *, final: float, end: int, begin: int = 0, initial: float = 0.0) -> float:
    """As `linear`, but slow at both ends: ``final + (initial - final) (1 + cos(pi t)) / 2`` (RigL, Evci et al. 1911.11134, section 3).

    RigL's fraction of exchanged blocks falls from ``initial=0.3`` to ``final=0``.

    Raises:
        TypeError, ValueError: ``begin`` after ``end``, a step that is no number, a sparsity that is no number from 0 to 1.

    Example:
        >>> [round(bp.schedule.cosine(step, initial=0.3, final=0.0, end=100), 3) for step in (0, 25, 50, 100)]
        [0.3, 0.256, 0.15, 0.0]
    """
    t, final, initial = _progress(step, begin, end, final, initial)
    return final + (initial - final) * (1 + math.cos(math.pi * t)) / 2


def exponential(step: int, *, final: float, end: int, begin: int = 0, initial: float = 0.0) -> float:
    """As `linear`, but every step prunes the same fraction of what the one before kept (lottery tickets, Frankle & Carbin 1803.03635).

    Raises:
        TypeError, ValueError: as `linear`; ``initial`` or ``final`` of 1, which cannot be reached by fractions of what is kept.

    Example:
        >>> [round(bp.schedule.exponential(step, final=0.75, end=2), 3) for step in (0, 1, 2)]
        [0.0, 0.5, 0.75]
    """
    t, final, initial = _progress(step, begin, end, final, initial)
    if not (initial < 1 and final < 1):
        raise ValueError(
            f"initial={initial} and final={final} must be below 1, because each step keeps a fraction of the weights; use linear or cubic"
        )
    return float(1 - (1 - initial) ** (1 - t) * (1 - final) ** t)


def steps(step: int, *, milestones: Mapping[int, float], initial: float = 0.0) -> float:
    """Piecewise constant: the sparsity of the last milestone that is not after the step.

    Args:
        step: the current step.
        milestones: sparsities by the step from which they apply.
        initial: the sparsity before the first milestone.

    Raises:
        TypeError, ValueError: a step that is no number, a sparsity that is no number from 0 to 1.

    Example:
        >>> [bp.schedule.steps(step, milestones={100: 0.5, 200: 0.8}) for step in (0, 150, 200)]
        [0.0, 0.5, 0.8]
    """
    step = float(check_number("step", step, finite=False))  # type: ignore[assignment]
    if not isinstance(milestones, Mapping):
        raise TypeError(f"milestones={milestones!r} must be a mapping from steps to sparsities, such as {{100: 0.5, 200: 0.8}}")
    by_step = {
        float(check_number("a step of milestones", milestone)): _checked(f"milestones[{milestone}]", value)
        for milestone, value in milestones.items()
    }
    initial = _checked("initial", initial)
    reached = bisect.bisect_right(sorted(by_step), step)
    return by_step[sorted(by_step)[reached - 1]] if reached else initial


def _progress(step: int, begin: int, end: int, final: float, initial: float) -> tuple[float, float, float]:
    """0 until begin, 1 from end on; and the two sparsities as floats."""
    now, first, last = (
        float(check_number(name, value, finite=False)) for name, value in {"step": step, "begin": begin, "end": end}.items()
    )
    final, initial = check_fraction("final", final), check_fraction("initial", initial)
    if not first <= last:
        raise ValueError(f"begin={begin} is after end={end}; give an end from {begin} on, or an earlier begin")
    return min(1.0, max(0.0, (now - first) / (last - first))) if last > first else float(now >= last), final, initial


def _checked(name: str, share: Any) -> Any:
    """A fraction in floats; a sparsity that is not computed with may also be a mapping by parameter name."""
    if isinstance(share, Mapping):
        return {key: check_fraction(f"{name}[{key!r}]", x) for key, x in share.items()}
    return check_fraction(name, share)
