"""The part that the workers share whose libraries prune by data: an MLP, its batches, and the answers; `_worker` measures."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _worker import PeakMemory, achieved_sparsity, send, warm_memory
from torch import Tensor, nn

Prune = Callable[[nn.Sequential, list[Tensor]], Sequence[Tensor]]  # -> a mask for each Linear, in order; 0 where it is pruned


def build_model(layers: int, width: int, seed: int) -> nn.Sequential:
    """Return square float32 Linear layers without bias, with a ReLU between them."""
    torch.manual_seed(seed)
    modules = [module for _ in range(layers) for module in (nn.Linear(width, width, bias=False), nn.ReLU())]
    return nn.Sequential(*modules[:-1])


def build_batches(count: int, rows: int, width: int, seed: int) -> list[Tensor]:
    """Return normal noise in which each feature has a scale of its own, so that criteria that use data rank differently from magnitude."""
    generator = torch.Generator().manual_seed(seed + 1)
    scale = torch.rand(width, generator=generator) + 0.1
    return [torch.randn(rows, width, generator=generator) * scale for _ in range(count)]


def square_loss(output: Tensor, batch: Any = None) -> Tensor:
    """The loss of the methods that need gradients."""
    return output.square().mean()


def serve(name: str, prune: Prune) -> None:
    """Answer requests until stdin ends: first one line of configuration, then one line for each run.

    A run goes from a dense model to its masks, the forward (and backward) passes included, and builds its own model. It saves the masks in
    the folder ``masks`` of the configuration, if there is one.
    """
    config = json.loads(sys.stdin.readline())
    layers, width, seed = int(config["layers"]), int(config["width"]), int(config.get("seed", 0))
    count, rows = int(config["batches"]), int(config["rows"])
    torch.set_num_threads(int(config.get("threads", 1)))

    def run(layers: int, width: int, count: int) -> dict[str, Any]:
        model, batches = build_model(layers, width, seed), build_batches(count, rows, width, seed)
        warm_memory(8 * sum(p.numel() * p.element_size() for p in model.parameters()))
        try:
            with PeakMemory() as memory:
                start = time.perf_counter()
                masks = prune(model, batches)
                seconds = time.perf_counter() - start
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # an answer, not a crash
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}
        if folder := config.get("masks"):
            torch.save([mask.detach() != 0 for mask in masks], Path(folder) / f"{name}.pt")
        return {"seconds": seconds, "extra_peak_mib": round(memory.extra_mib, 1), "sparsity": achieved_sparsity(masks)}

    run(2, 64, 2)  # what a library loads on its first use belongs to no run
    send({"ready": True, "name": name, "torch": torch.__version__.split("+")[0]})
    for line in sys.stdin:
        if line.strip() and json.loads(line).get("run"):
            send(run(layers, width, count))
