"""The part that all workers share: the JSON-lines protocol, the model, and the measurement.

Importing this module reserves the real stdout for the protocol: from then on, whatever a library prints goes to stderr.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

SPARSITY = 0.5

_PROTOCOL = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

Setup = Callable[[nn.Module, tuple[int, int]], Any]
Compute = Callable[[Any], Sequence[Tensor]]


def build_model(layers: int, width: int, seed: int) -> nn.Sequential:
    """Return ``layers`` square float32 Linear layers without bias, initialised by torch's default under ``seed``."""
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def _return_freed_memory() -> None:
    """Give freed memory back to the system, so that a baseline does not contain the memory of an earlier run."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def warm_memory(wanted: int) -> None:
    """Touch and free up to ``wanted`` bytes.

    A virtual machine may return freed memory to its host, and the next process that uses it waits until it is fetched again, which can
    take longer than the run itself. So every run starts with memory that was in use a moment ago.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.empty(min(wanted, free // 2), dtype=torch.uint8)[::4096] = 0


def _status_kib(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no field {field}; this benchmark needs Linux")
    return int(match.group(1))


class PeakMemory:
    """Peak resident memory inside the ``with`` block, above what was resident at its start.

    It is exact where the kernel lets a process reset its high-water mark; otherwise it is sampled every 2 ms.
    """

    extra_mib: float = 0.0

    def __enter__(self) -> Self:
        _return_freed_memory()
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._start = self._peak = _status_kib("VmRSS")
        if self._sampler is not None:
            self._sampler.start()
        return self

    def _sample(self) -> None:
        page_kib = os.sysconf("SC_PAGE_SIZE") // 1024
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, int(Path("/proc/self/statm").read_text().split()[1]) * page_kib)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._sampler is None:
            self._peak = _status_kib("VmHWM")
        else:
            self._sampler.join()
            self._peak = max(self._peak, _status_kib("VmRSS"))
        self.extra_mib = max(0, self._peak - self._start) / 1024


def achieved_sparsity(masks: Sequence[Tensor]) -> float:
    """The share of zeros."""
    return 1.0 - sum(int(mask.count_nonzero()) for mask in masks) / sum(mask.numel() for mask in masks)


def prune_once(setup: Setup, compute: Compute, model: nn.Module, block: tuple[int, int]) -> dict[str, float]:
    """Set a library up on ``model``, let it compute its masks, and return its seconds, its memory and the sparsity of its masks."""
    warm_memory(5 * sum(p.numel() * p.element_size() for p in model.parameters()))  # no library's peak is above that
    with PeakMemory() as memory:
        start = time.perf_counter()
        state = setup(model, block)
        ready = time.perf_counter()
        masks = compute(state)
        end = time.perf_counter()
    sparsity = achieved_sparsity(masks)
    return {"seconds": end - ready, "seconds_setup": ready - start, "extra_peak_mib": round(memory.extra_mib, 1), "sparsity": sparsity}


def send(message: dict[str, Any]) -> None:
    """Write one line of the protocol."""
    print(json.dumps(message), file=_PROTOCOL, flush=True)


def serve(name: str, setup: Setup, compute: Compute) -> None:
    """Answer requests until stdin ends: first one line of configuration, then one line for each run.

    The model is built anew for every run, outside the measured part, and nothing else refers to it: a library that frees or replaces the
    weights is not charged for a second copy, and no run depends on an earlier one.
    """
    config = json.loads(sys.stdin.readline())
    layers, width, seed = int(config.get("layers", 12)), int(config.get("width", 4096)), int(config.get("seed", 0))
    rows, columns = config["block"]
    block = (int(rows), int(columns))
    torch.set_num_threads(int(config.get("threads", 1)))

    def run(layers: int, width: int) -> dict[str, Any]:
        try:
            return dict(prune_once(setup, compute, build_model(layers, width, seed), block))
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:  # an answer, not a crash
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}

    run(1, 2 * math.lcm(*block))  # what a library loads on its first use belongs to no run
    send({"ready": True, "name": name, "torch": torch.__version__.split("+")[0]})
    for line in sys.stdin:
        if line.strip() and json.loads(line).get("run"):
            send(run(layers, width))
