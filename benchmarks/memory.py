"""How much memory each step of the repair recipe takes: peak and lasting resident memory, in multiples of the model's size.

python benchmarks/memory.py            # a Llama of 12 layers, 512 wide, with random weights: about five minutes
python benchmarks/memory.py --smollm   # SmolLM2-135M on windows of 512 tokens of Wikipedia: about a quarter of an hour
python benchmarks/memory.py --tiny     # seconds, for the test command

Resident memory is what Linux says (VmHWM, which is reset before each step). It counts from the level before the step, so it excludes the
model itself, unless the step returns another one. The recipe is that of the README: `cluster_units`, `obs` at 25 %, `apply_masks`.
"""

import argparse
import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import attrs
import torch
from quality import next_token_loss
from timing import machine, reset_peak, resident_bytes
from torch import Tensor, nn

import blockprune as bp
from blockprune.examples import smollm

R = TypeVar("R")

WHERE = bp.including(bp.linears((16, 16)), "model.layers.*")
SPARSITY = 0.25


@attrs.frozen
class Sizes:
    """The model and the calibration."""

    layers: int
    width: int
    words: int
    batches: int
    tokens: int


def llama(sizes: Sizes) -> nn.Module:
    """A Llama with random weights, its head tied to the embedding, in the proportions of SmolLM2."""
    import transformers  # noqa: PLC0415 (slow to import, and an extra)

    library: Any = transformers
    heads = max(2, sizes.width // 64)
    config = library.LlamaConfig(
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers,
        vocab_size=sizes.words,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: nn.Module = library.LlamaForCausalLM(config).eval()
    return model


def give_memory_back() -> None:
    """Give free memory back to the system, and let the peak begin anew at the present level."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()


class Table:
    """Measures steps and prints a line for each."""

    def __init__(self, model: nn.Module) -> None:
        self.size = sum(p.numel() * p.itemsize for p in model.parameters())
        print(f"\nThe model has {self.size / 2**20:,.0f} MiB.\n{'step':<44}{'peak':>8}{'after':>8}{'seconds':>9}")

    def measure(self, step: str, call: Callable[[], R]) -> R:
        """What the call returns; print its peak and what it holds afterwards, both above the level before."""
        give_memory_back()
        before, start = resident_bytes("VmRSS"), time.perf_counter()
        result = call()
        seconds, peak = time.perf_counter() - start, resident_bytes()
        give_memory_back()
        above = [(level - before) / self.size for level in (peak, resident_bytes("VmRSS"))]
        print(f"{step:<44}{above[0]:>8.2f}{above[1]:>8.2f}{seconds:>9.1f}", flush=True)
        return result


def steps(model: nn.Module, calibration: bp.Calibration, first: Tensor) -> None:
    """The recipe's steps, one after the other."""
    table, single = Table(model), bp.linears((1, 1))
    each_weight = [bp.statistics.input_gram, bp.statistics.output_grad_sq]
    where = bp.including(single, "model.layers.*")
    look = partial(bp.collect.with_statistics, calibration=calibration, lazy=True)
    data = table.measure("collect, for clustering", partial(look, model, where=where, statistics=each_weight))
    scores = table.measure("metric.obs, stop_at=0", partial(bp.metric.obs, data, stop_at=0, progress=False))
    del data
    axes = table.measure("find_axes, first batch", partial(bp.find_axes, model, first, progress=False))
    axes = table.measure("find_axes, 16 tokens", partial(bp.find_axes, model, first[:1, :16], progress=False))
    plan = table.measure("cluster", partial(bp.cluster, scores, axes, block=(16, 16), sparsity=SPARSITY, progress=False))
    del scores
    model = table.measure("permute", partial(bp.permute, model, plan))
    recipe = bp.recipes.obs(WHERE, calibration)
    assert recipe.budget is not None
    shares, extra = table.measure("obs: a budget for each layer", partial(recipe.budget, model, SPARSITY))
    stages = model, recipe.pipeline, recipe.reconstruct, calibration, shares
    result = table.measure("sequential", partial(bp.sequential, *stages, extra_data=extra))
    del extra
    table.measure("apply_masks", partial(bp.apply_masks, model, result.masks, result.weights))
    table.measure("finalize", partial(bp.finalize, model))


def whole(model: nn.Module, calibration: bp.Calibration, first: Tensor) -> None:
    """The README's lines, in which nothing is deleted."""
    table = Table(model)
    cluster = partial(bp.recipes.cluster_units, model, WHERE, calibration, example=first[:1, :16])
    clustered = table.measure("cluster_units", cluster)
    recipe = bp.recipes.obs(WHERE, calibration)
    result = table.measure("obs", partial(recipe, clustered, SPARSITY))
    table.measure("apply_masks", partial(bp.apply_masks, clustered, result.masks, result.weights))


def main(make: Callable[[], tuple[nn.Module, Sequence[Tensor]]], only: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print(machine())
    model, batches = make()
    calibration = bp.Calibration(batches, loss=next_token_loss, progress=False)
    if only != "recipe":
        steps(model, calibration, batches[0])
    if only != "steps":
        whole(model, calibration, batches[0])
    torch.set_num_threads(threads)


def random_model(sizes: Sizes) -> tuple[nn.Module, Sequence[Tensor]]:
    """A model with random weights and random tokens."""
    model = llama(sizes)
    return model, torch.randint(sizes.words, (sizes.batches, sizes.tokens)).split(1)


def smollm_model(batches: int) -> tuple[nn.Module, Sequence[Tensor]]:
    """SmolLM2 and windows of Wikipedia."""
    model, tokenizer = smollm.load()
    return model, smollm.evenly_spaced_windows(tokenizer, smollm.articles()[:-30], batches).split(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two layers, 64 wide")
    parser.add_argument("--smollm", action="store_true", help="SmolLM2-135M")
    parser.add_argument("--only", choices=["", "steps", "recipe"], default="", help="only the single steps, or only the whole recipe")
    options = parser.parse_args()
    if options.smollm:
        main(partial(smollm_model, 16), options.only)
    else:
        main(partial(random_model, Sizes(2, 64, 64, 2, 32) if options.tiny else Sizes(12, 512, 8192, 8, 256)), options.only)
