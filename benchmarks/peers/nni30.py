"""NNI 3.0's own L1NormPruner with a block granularity."""

from __future__ import annotations

from _worker import SPARSITY, serve
from nni.compression.pruning import L1NormPruner
from torch import Tensor, nn


def setup(model: nn.Module, block: tuple[int, int]) -> L1NormPruner:
    config = {"op_types": ["Linear"], "target_names": ["weight"], "sparse_ratio": SPARSITY, "granularity": list(block)}
    return L1NormPruner(model, [config])


def compute(pruner: L1NormPruner) -> list[Tensor]:
    _, masks = pruner.compress()
    return [masks[name]["weight"] for name, _ in pruner.bound_model.named_children()]  # its own order varies from run to run


if __name__ == "__main__":
    serve("NNI 3.0", setup, compute)
