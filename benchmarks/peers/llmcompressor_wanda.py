"""llm-compressor 0.14's WandaPruningModifier, unstructured, each row ranked as in the paper.

Its entry point `oneshot` takes Hugging Face models only, so this script calls the modifier's hooks itself, in the order of the library's
basic pipeline. The modifier is measured, without the library's loaders. It writes zeros into the weights; they give the masks.
"""

from __future__ import annotations

import torch
from _calibrated import serve
from _worker import SPARSITY
from llmcompressor.core import Event, State
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from torch import Tensor, nn


def prune(model: nn.Sequential, batches: list[Tensor]) -> list[Tensor]:
    state, event = State(model=model), Event()
    modifier = WandaPruningModifier(sparsity=SPARSITY, mask_structure="0:0", targets=["Linear"])
    modifier.on_initialize(state, sequential_targets=["Linear"])
    modifier.on_calibration_start(state, event)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    modifier.on_sequential_epoch_end(state, event)
    modifier.on_calibration_end(state, event)
    return [module.weight for module in model if isinstance(module, nn.Linear)]


if __name__ == "__main__":
    serve("llm-compressor WandaPruningModifier", prune)
