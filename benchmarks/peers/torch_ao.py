"""torch.ao.pruning.WeightNormSparsifier, which ships inside torch."""

from __future__ import annotations

from typing import Any

from _worker import SPARSITY, serve
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier  # type: ignore[attr-defined]


def setup(model: nn.Module, block: tuple[int, int]) -> WeightNormSparsifier:
    # norm=1 gives the L1 criterion that the other libraries use; the default ranks by the sum of squares.
    sparsifier = WeightNormSparsifier(sparsity_level=SPARSITY, sparse_block_shape=block, zeros_per_block=block[0] * block[1], norm=1)
    sparsifier.prepare(model, config=None)  # type: ignore[no-untyped-call]
    return sparsifier


def compute(sparsifier: WeightNormSparsifier) -> list[Tensor]:
    sparsifier.step()
    groups: list[dict[str, Any]] = sparsifier.groups
    return [group["module"].parametrizations[group["tensor_name"]][0].mask for group in groups]


if __name__ == "__main__":
    serve("torch.ao WeightNormSparsifier", setup, compute)
