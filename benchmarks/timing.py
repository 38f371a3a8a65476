"""Interleaved medians: the only way a ratio is measured here."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def medians(calls: Mapping[str, Callable[[], object]], *, rounds: int = 9) -> dict[str, float]:
    """Median seconds of each call, all run in turn, round after round, after one warm-up round."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seen[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seen.items()}


def machine() -> str:
    """The machine in words, to print above every table."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            fields = dict(line.split(":", 1) for line in info if ":" in line)
        model = " ".join(
            f"{key.strip()} {value.strip()}" for key, value in fields.items() if key.strip() in ("model name", "cpu family", "model")
        )
    except OSError:
        pass
    return f"{model}; {torch.get_num_threads()} threads by default; torch {torch.__version__}; Python {platform.python_version()}"
