"""Interleaved medians: the only way a ratio is measured here."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch


def medians(calls: Mapping[Any, Callable[[], object]], *, rounds: int = 9) -> dict[Any, float]:
    """Median seconds of each call, all run in turn, round after round, after a warm-up round.

    Args:
        calls: what to time, by name.
        rounds: how often each is called and timed.

    Example:
        >>> from blockprune.export.timing import medians
        >>> list(medians({"add": lambda: torch.ones(2) + 1}, rounds=3))
        ['add']
    """
    seen: dict[Any, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seen[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seen.items()}


def in_turn(calls: Iterable[Callable[[], object]]) -> Callable[[], object]:
    """One call that makes the next of several each time, for ever: each finds the caches full of the others' numbers.

    Example:
        >>> from blockprune.export.timing import in_turn
        >>> call = in_turn([lambda: 1, lambda: 2])
        >>> call(), call(), call()
        (1, 2, 1)
    """
    turns = itertools.cycle(calls)

    def call() -> object:
        return next(turns)()

    return call


def waited(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call, and on an accelerator its end.

    Example:
        >>> from blockprune.export.timing import waited
        >>> waited(lambda: 3, torch.device("cpu"))()
        3
    """
    if device.type == "cpu":
        return call

    def and_wait() -> object:
        out = call()
        torch.accelerator.synchronize()
        return out

    return and_wait


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, which launches its kernels again without Python in between.

    Example:
        >>> from blockprune.export.timing import captured
        >>> x = torch.ones(2, device="cuda") if torch.cuda.is_available() else None
        >>> again = captured(lambda: x + 1) if x is not None else None
    """
    call()  # compiles what it calls
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(of: Callable[[], object] = call) -> None:  # the graph reads what the call holds
        graph.replay()

    return replay


def by_turns(
    ways: Mapping[Any, Sequence[Callable[[], object]]], device: torch.device, *, graph: bool = False, rounds: int = 9
) -> dict[Any, float]:
    """Median seconds of a call of each way, of which there are several that read copies, so that caches hold none of them, as in a model.

    On a CPU the next call of a way takes its turn in each round; on an accelerator all of them, and the end is waited for once.

    Args:
        ways: calls, by name.
        device: where they run.
        graph: of a GPU, as a CUDA graph replays them.
        rounds: how often each way is timed.

    Example:
        >>> from blockprune.export.timing import by_turns
        >>> list(by_turns({"add": [lambda: torch.ones(2) + 1, lambda: torch.ones(3) + 1]}, torch.device("cpu"), rounds=3))
        ['add']
    """
    if device.type == "cpu":
        return medians({name: in_turn(calls) for name, calls in ways.items()}, rounds=rounds)
    rows = {name: partial(_each, calls) for name, calls in ways.items()}
    turns = {name: waited(captured(row) if graph else row, device) for name, row in rows.items()}
    return {name: seconds / len(ways[name]) for name, seconds in medians(turns, rounds=rounds).items()}


def copies(held: int, device: torch.device) -> int:
    """How many copies of so many bytes caches do not hold.

    Example:
        >>> from blockprune.export.timing import copies
        >>> copies(1 << 20, torch.device("cpu")), copies(1 << 30, torch.device("cuda"))
        (32, 2)
    """
    least, most, cache = (1, 32, 1 << 26) if device.type == "cpu" else (2, 512, 1 << 27)
    return max(least, min(most, cache // max(1, held)))


def _each(calls: Iterable[Callable[[], object]]) -> None:
    for call in calls:
        call()
