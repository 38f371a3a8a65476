"""A small language model with random weights, for tests and quick runs of the benchmarks; its figures mean nothing.

It has the parameter names and the outputs of SmolLM2, so that what runs on it runs on that one. It needs `pip install transformers`.
"""

import torch
from torch import Tensor, nn

WORDS = 64


def load() -> nn.Module:
    """A Llama of two layers, 64 wide; every call gives the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 (slow to import, and an extra)

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": WORDS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def windows(count: int, length: int = 32) -> Tensor:
    """Random tokens: ``[count, length]``."""
    return torch.randint(WORDS, (count, length), generator=torch.Generator().manual_seed(0))
