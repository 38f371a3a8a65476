"""blockprune with data, measured like the other libraries: python ours_calibrated.py METHOD."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from _calibrated import serve, square_loss
from _worker import SPARSITY
from torch import Tensor, nn

import blockprune as bp
from blockprune import allocate, collect, metric, recipes, statistics


@bp.requires(statistics.input_sq)
def torchao_wanda(data: bp.Data) -> bp.Scores:
    """``|w|`` times the *squared* norm of its input: the rule of torchao, which ranks over the whole layer."""
    return {name: bp.BlockScore(p.weight.abs() * p.stats["input_sq"], p.grid) for name, p in data.items()}


def pipeline(block: tuple[int, ...], metric: Callable[[bp.Data], bp.Scores], calibration: bp.Calibration) -> recipes.OneShot:
    """Scores from data, ranked in each layer."""
    collector = partial(collect.with_statistics, where=bp.linears(block), calibration=calibration)
    return recipes.OneShot(bp.Pipeline(collector, metric, allocate.per_layer))


METHODS: dict[str, tuple[str, Callable[[bp.Calibration], recipes.OneShot]]] = {
    "Wanda": ("blockprune", lambda calibration: recipes.wanda(bp.linears((1, 1)), calibration)),
    "Wanda-torchao": ("blockprune, torchao's rule", partial(pipeline, (1, 1), torchao_wanda)),
    "Taylor": ("blockprune", partial(pipeline, (1,), metric.taylor)),
    "Taylor-squared": ("blockprune, squared as NNI", partial(pipeline, (1,), metric.taylor_squared)),
}


def main(method: str) -> None:
    name, make = METHODS[method]

    def prune(model: nn.Sequential, batches: list[Tensor]) -> list[Tensor]:
        recipe = make(bp.Calibration(batches, loss=square_loss, progress=False))
        return [mask.keep for mask in recipe(model, SPARSITY).masks.values()]

    serve(name, prune)


if __name__ == "__main__":
    main(sys.argv[1])
