"""blockprune, behind the same protocol and measured the same way as the peers."""

from __future__ import annotations

from functools import partial

from _worker import SPARSITY, serve
from torch import Tensor, nn

import blockprune as bp


def setup(model: nn.Module, block: tuple[int, int]) -> tuple[bp.Pipeline, nn.Module]:
    return bp.Pipeline(partial(bp.collect.weights, where=bp.linears(block)), bp.metric.l1, bp.allocate.per_layer), model


def compute(state: tuple[bp.Pipeline, nn.Module]) -> list[Tensor]:
    prune, model = state
    return [mask.keep for mask in prune(model, SPARSITY).values()]


if __name__ == "__main__":
    serve("blockprune", setup, compute)
