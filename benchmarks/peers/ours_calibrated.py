"""blockprune from data, behind the same protocol: python ours_calibrated.py METHOD."""

from __future__ import annotations

import sys
from functools import partial

from _calibrated import serve, square_loss
from _worker import SPARSITY
from torch import Tensor, nn

import blockprune as bp
from blockprune import allocate, collect, metric, statistics


def layer_wide(data: bp.Data) -> bp.Scores:
    """The weight times the norm *squared*: torchao's rule, ranked by `per_layer`."""
    return {name: bp.BlockScore(p.weight.abs() * p.stats["input_sq"], p.grid) for name, p in data.items()}


METHODS = {
    "Wanda": ("blockprune", (1, 1), statistics.input_sq, metric.wanda, allocate.per_row),
    "Wanda-torchao": ("blockprune, torchao's rule", (1, 1), statistics.input_sq, layer_wide, allocate.per_layer),
    "Taylor": ("blockprune", (1,), statistics.weight_grad, metric.taylor, allocate.per_layer),
    "Taylor-squared": (
        "blockprune, squared as NNI",
        (1,),
        statistics.weight_grad_sq,
        partial(metric.taylor, squared=True),
        allocate.per_layer,
    ),
}


def main(method: str) -> None:
    name, block, statistic, score, rank = METHODS[method]

    def prune(model: nn.Sequential, batches: list[Tensor]) -> list[Tensor]:
        collected = partial(
            collect.with_statistics, where=bp.linears(block), statistics=[statistic], batches=batches, loss=square_loss, progress=False
        )
        return [mask.keep for mask in bp.Pipeline(collected, score, rank)(model, SPARSITY).values()]

    serve(name, prune)


if __name__ == "__main__":
    main(sys.argv[1])
