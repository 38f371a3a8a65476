"""llm-compressor 0.14 prunes a Hugging Face model on some tokens through its own entry point, and saves the weights to a file.

python llmcompressor_quality.py MODEL_FOLDER TOKENS.safetensors OUT.safetensors sparsegpt|wanda 2:4|0:0

`tokens` is int64 [windows, positions]. `benchmarks/quality.py` runs it and measures the pruned model.
"""

from __future__ import annotations

import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(folder: str, tokens: str, out: str, method: str, structure: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = load_file(tokens)["tokens"].tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    recipe = modifier(sparsity=0.5, mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head.*"])
    start = time.perf_counter()
    options = {"num_calibration_samples": len(ids), "max_seq_length": len(ids[0]), "shuffle_calibration_samples": False}
    oneshot(model=model, dataset=data, recipe=recipe, **options)
    print(f"seconds {time.perf_counter() - start:.0f}")
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
