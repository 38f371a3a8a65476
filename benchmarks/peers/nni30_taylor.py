"""NNI 3.0's TaylorPruner, which prunes output channels by the mean over batches of (w * gradient)^2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nni
import torch
from _calibrated import serve, square_loss
from _worker import SPARSITY
from nni.compression import TorchEvaluator
from nni.compression.pruning import TaylorPruner
from torch import Tensor, nn


def prune(model: nn.Sequential, batches: list[Tensor]) -> list[Tensor]:
    def train(  # noqa: PLR0917 (NNI's signature)
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_step: Callable[..., Tensor],
        scheduler: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        for batch in batches[:max_steps]:
            optimizer.zero_grad()
            training_step(batch, model).backward()
            optimizer.step()

    # TaylorPruner needs an optimizer that takes steps; with a learning rate of 0 they leave the weights as they are
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0)
    evaluator = TorchEvaluator(train, optimizer, lambda batch, model: square_loss(model(batch)))
    config = {"op_types": ["Linear"], "target_names": ["weight"], "sparse_ratio": SPARSITY}
    _, masks = TaylorPruner(model, [config], evaluator, training_steps=len(batches)).compress()
    return [masks[name]["weight"] for name in sorted(masks, key=int)]


if __name__ == "__main__":
    serve("NNI 3.0 TaylorPruner", prune)
