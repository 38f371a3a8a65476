"""Interleaved medians: the only way a ratio is measured here."""

import statistics
import time
from collections.abc import Callable, Mapping


def medians(calls: Mapping[str, Callable[[], object]], *, rounds: int = 9, at_least: float = 0.0) -> dict[str, float]:
    """Median seconds of each call, all run in turn, round after round, after a warm-up round.

    Args:
        calls: what to time, by name.
        rounds: at least so many.
        at_least: go on until so many seconds have passed, at most 50 times as many rounds.

    Example:
        >>> from blockprune.export.timing import medians
        >>> list(medians({"add": lambda: torch.ones(2) + 1}, rounds=3))
        ['add']
    """
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    began, done = time.perf_counter(), 0
    while done < rounds or (done < 50 * rounds and time.perf_counter() - began < at_least):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seen[name].append(time.perf_counter() - start)
        done += 1
    return {name: statistics.median(times) for name, times in seen.items()}
