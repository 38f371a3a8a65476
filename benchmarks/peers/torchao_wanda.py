"""torchao 0.18's WandaSparsifier. It ranks over the whole layer, by |w| times the *squared* norm of the input."""

from __future__ import annotations

import torch
from _calibrated import serve
from _worker import SPARSITY
from torch import Tensor, nn
from torchao.sparsity import WandaSparsifier


def prune(model: nn.Sequential, batches: list[Tensor]) -> list[Tensor]:
    sparsifier = WandaSparsifier(sparsity_level=SPARSITY)
    sparsifier.prepare(model, config=None)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    sparsifier.step()
    return [group["module"].parametrizations["weight"][0].mask for group in sparsifier.groups]


if __name__ == "__main__":
    serve("torchao WandaSparsifier", prune)
