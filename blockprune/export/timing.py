"""Median times of calls that run interleaved, so that a change of the machine's speed affects all of them alike."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch


def median_seconds(calls: Mapping[Any, Callable[[], object]], *, rounds: int = 9) -> dict[Any, float]:
    """Median seconds of each call. After a warm-up, every round runs each call once.

    Args:
        calls: what to time, by name.
        rounds: how often each call is timed.

    Example:
        >>> from blockprune.export.timing import median_seconds
        >>> list(median_seconds({"add": lambda: torch.ones(2) + 1}, rounds=3))
        ['add']
    """
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def round_robin(calls: Iterable[Callable[[], object]]) -> Callable[[], object]:
    """A call that runs the next of several calls each time, and starts again after the last one.

    Example:
        >>> from blockprune.export.timing import round_robin
        >>> call = round_robin([lambda: 1, lambda: 2])
        >>> call(), call(), call()
        (1, 2, 1)
    """
    cycle = itertools.cycle(calls)

    def call() -> object:
        return next(cycle)()

    return call


def synchronized(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call; on an accelerator, it also waits until the device has finished.

    Example:
        >>> from blockprune.export.timing import synchronized
        >>> synchronized(lambda: 3, torch.device("cpu"))()
        3
    """
    if device.type == "cpu":
        return call

    def call_and_wait() -> object:
        result = call()
        torch.accelerator.synchronize()
        return result

    return call_and_wait


def cuda_graphed(call: Callable[[], object]) -> Callable[[], object]:
    """A call that replays the kernels of the given call as a CUDA graph, without the time that Python takes to launch them.

    Example:
        >>> from blockprune.export.timing import cuda_graphed
        >>> x = torch.ones(2, device="cuda") if torch.cuda.is_available() else None
        >>> replay = cuda_graphed(lambda: x + 1) if x is not None else None
    """
    call()  # compiles the kernels, which a capture cannot do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(keep_alive: Callable[[], object] = call) -> None:  # the graph reads tensors that only the call references
        graph.replay()

    return replay


def time_interleaved(
    calls: Mapping[Any, Sequence[Callable[[], object]]], device: torch.device, *, graph: bool = False, rounds: int = 9
) -> dict[Any, float]:
    """Median seconds of each variant. A variant is several calls on copies of its weights, so that caches hold none of them, as in a model.

    On a CPU, each round runs one copy of each variant, and the next round the next copy. On an accelerator, each round runs all copies and
    waits for the device once.

    Args:
        calls: the calls of each variant, by its name.
        device: where they run.
        graph: replay the calls as a CUDA graph.
        rounds: how often each variant is timed.

    Example:
        >>> from blockprune.export.timing import time_interleaved
        >>> list(time_interleaved({"add": [lambda: torch.ones(2) + 1, lambda: torch.ones(3) + 1]}, torch.device("cpu"), rounds=3))
        ['add']
    """
    if device.type == "cpu":
        return median_seconds({name: round_robin(copies) for name, copies in calls.items()}, rounds=rounds)
    all_copies = {name: partial(_run_all, copies) for name, copies in calls.items()}
    timed = {name: synchronized(cuda_graphed(call) if graph else call, device) for name, call in all_copies.items()}
    return {name: seconds / len(calls[name]) for name, seconds in median_seconds(timed, rounds=rounds).items()}


def cold_copies(nbytes: int, device: torch.device) -> int:
    """How many copies of a weight of ``nbytes`` bytes are needed so that the caches of a device do not hold them all.

    Example:
        >>> from blockprune.export.timing import cold_copies
        >>> cold_copies(1 << 20, torch.device("cpu")), cold_copies(1 << 30, torch.device("cuda"))
        (32, 2)
    """
    least, most, cache_bytes = (1, 32, 1 << 26) if device.type == "cpu" else (2, 512, 1 << 27)
    return max(least, min(most, cache_bytes // max(1, nbytes)))


def _run_all(calls: Iterable[Callable[[], object]]) -> None:
    for call in calls:
        call()
