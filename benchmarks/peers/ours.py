"""blockprune's magnitude recipe, measured like the other libraries."""

from __future__ import annotations

from _worker import SPARSITY, serve
from torch import Tensor, nn

import blockprune as bp


def setup(model: nn.Module, block: tuple[int, int]) -> tuple[bp.recipes.OneShot, nn.Module]:
    return bp.recipes.magnitude(bp.linears(block)), model


def compute(state: tuple[bp.recipes.OneShot, nn.Module]) -> list[Tensor]:
    recipe, model = state
    return [mask.keep for mask in recipe(model, SPARSITY).masks.values()]


if __name__ == "__main__":
    serve("blockprune", setup, compute)
