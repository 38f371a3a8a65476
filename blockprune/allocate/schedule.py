"""Schedules: step -> sparsity (or fraction), for a loop that prunes step by step. Bind the options with ``functools.partial``."""

import bisect
import math
from collections.abc import Mapping

from blockprune.core.arguments import check_number


def constant(step: int, *, value: float) -> float:
    """The same sparsity at every step.

    Example:
        >>> bp.schedule.constant(7, value=0.5)
        0.5
    """
    return value


def linear(step: int, *, final: float, end: int, begin: int = 0, initial: float = 0.0) -> float:
    """From ``initial`` at step ``begin`` to ``final`` at step ``end``, in equal increments; constant before and after.

    Raises:
        ValueError: ``begin`` after ``end``.

    Example:
        >>> [bp.schedule.linear(step, final=0.8, begin=100, end=300) for step in (0, 200, 1000)]
        [0.0, 0.4, 0.8]
    """
    t = _progress(step, begin, end, final=final, initial=initial)
    return initial + (final - initial) * t


def cubic(step: int, *, final: float, end: int, begin: int = 0, initial: float = 0.0) -> float:
    """As `linear`, but fast at first: ``final + (initial - final) (1 - t)^3`` (AGP, Zhu & Gupta 1710.01878, eq. 1).

    Raises:
        ValueError: ``begin`` after ``end``.

    Example:
        >>> [bp.schedule.cubic(step, final=0.8, begin=100, end=300) for step in (0, 200, 1000)]
        [0.0, 0.7000000000000001, 0.8]
    """
    t = _progress(step, begin, end, final=final, initial=initial)
    return final + (initial - final) * (1 - t) ** 3


def cosine(step: int, *, final: float, end: int, begin: int = 0, initial: float = 0.0) -> float:
    """As `linear`, but slow at both ends: ``final + (initial - final) (1 + cos(pi t)) / 2`` (RigL, Evci et al. 1911.11134, section 3).

    RigL's fraction of exchanged blocks falls from ``initial=0.3`` to ``final=0``.

    Raises:
        ValueError: ``begin`` after ``end``.

    Example:
        >>> [round(bp.schedule.cosine(step, initial=0.3, final=0.0, end=100), 3) for step in (0, 25, 50, 100)]
        [0.3, 0.256, 0.15, 0.0]
    """
    t = _progress(step, begin, end, final=final, initial=initial)
    return final + (initial - final) * (1 + math.cos(math.pi * t)) / 2


def exponential(step: int, *, final: float, end: int, begin: int = 0, initial: float = 0.0) -> float:
    """As `linear`, but every step prunes the same fraction of what the one before kept (lottery tickets, Frankle & Carbin 1803.03635).

    Raises:
        ValueError: ``begin`` after ``end``; ``initial`` or ``final`` of 1, which cannot be reached by fractions of what is kept.

    Example:
        >>> [round(bp.schedule.exponential(step, final=0.75, end=2), 3) for step in (0, 1, 2)]
        [0.0, 0.5, 0.75]
    """
    t = _progress(step, begin, end, final=final, initial=initial)
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

    Example:
        >>> [bp.schedule.steps(step, milestones={100: 0.5, 200: 0.8}) for step in (0, 150, 200)]
        [0.0, 0.5, 0.8]
    """
    reached = bisect.bisect_right(sorted(milestones), step)
    return milestones[sorted(milestones)[reached - 1]] if reached else initial


def _progress(step: int, begin: int, end: int, **sparsities: float) -> float:
    """0 until begin, 1 from end on."""
    for name, value in {"step": step, "begin": begin, "end": end, **sparsities}.items():
        check_number(name, value)
    if not begin <= end:
        raise ValueError(f"begin={begin} is after end={end}; give an end from {begin} on, or an earlier begin")
    return min(1.0, max(0.0, (step - begin) / (end - begin))) if end > begin else float(step >= end)
