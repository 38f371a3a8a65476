"""Peak memory of pruning a checkpoint folder that is never loaded whole, against the size of the model.

python benchmarks/scale.py --gib 2 6 --recipe obs      # checkpoints of these sizes, with Llama's shapes and random bfloat16 weights
python benchmarks/scale.py --tiny                      # seconds, for the test command

Each model is pruned in a process of its own, whose peak resident memory is read from the system. The bound is
1.5 x (one layer's weights + its statistics + the hidden states) + 1 GiB. The statistics of a weight with k inputs are two k x k matrices in
float32: the products of its inputs, and of its inputs with those of the dense model. The hidden states are those of the dense and of the
pruned model; with a budget, which needs those of all layers, they are kept in files.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file
from timing import machine, resident_bytes
from torch import Tensor

import blockprune as bp

GIB = 1 << 30
WORDS = 32_000
RECIPES = {"magnitude": "weights alone", "sparsegpt": "SparseGPT", "obs": "OBS, a budget, least squares"}


@attrs.frozen
class Shape:
    """The sizes of a Llama, in bfloat16."""

    width: int
    inner: int
    kv: int  # outputs of the keys and of the values
    layers: int
    words: int = WORDS

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The outputs and inputs of a layer's weights."""
        attention = {"q": (self.width, self.width), "k": (self.kv, self.width), "v": (self.kv, self.width), "o": (self.width, self.width)}
        mlp = {"gate": (self.inner, self.width), "up": (self.inner, self.width), "down": (self.width, self.inner)}
        return {f"self_attn.{n}_proj": s for n, s in attention.items()} | {f"mlp.{n}_proj": s for n, s in mlp.items()}

    @property
    def layer_bytes(self) -> int:
        """Of one layer's weights."""
        return 2 * sum(outputs * inputs for outputs, inputs in self.linears.values())

    @property
    def model_bytes(self) -> int:
        """Of all weights; the head is not tied."""
        return self.layers * self.layer_bytes + 4 * self.words * self.width

    @property
    def statistics_bytes(self) -> int:
        """Of one layer."""
        return sum(2 * 4 * inputs**2 for _, inputs in self.linears.values())

    def hidden_bytes(self, tokens: int) -> int:
        """Of the dense and the pruned model between two layers."""
        return 2 * 2 * tokens * self.width

    def bound(self, tokens: int) -> float:
        """Of the peak memory."""
        return 1.5 * (self.layer_bytes + self.statistics_bytes + self.hidden_bytes(tokens)) + GIB


LARGE = {"8B": Shape(4096, 14336, 1024, 32, 128_256), "70B": Shape(8192, 28672, 1024, 80, 128_256)}  # Llama 3.1


def of_size(gib: float, width: int) -> Shape:
    """As many layers as fill this size."""
    shape = Shape(width, 4 * width, width // 4, 1)
    return attrs.evolve(shape, layers=max(1, round((gib * GIB - 4 * shape.words * width) / shape.layer_bytes)))


def make_checkpoint(folder: Path, shape: Shape) -> None:
    """A folder with random weights, written layer by layer."""
    from transformers import LlamaConfig  # noqa: PLC0415 (slow to import, and an extra)

    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": shape.words, "tie_word_embeddings": False}
    config = LlamaConfig(hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers, **heads)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    weight_map = {}
    for i, tensors in enumerate(random_tensors(shape)):
        save_file(tensors, folder / f"model-{i}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def random_tensors(shape: Shape) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.bfloat16) * 0.02

    for i in range(shape.layers):
        tensors = {f"model.layers.{i}.{name}.weight": random(*size) for name, size in shape.linears.items()}
        norms = {f"model.layers.{i}.{name}_layernorm.weight": torch.ones(shape.width).bfloat16() for name in ("input", "post_attention")}
        yield tensors | norms
    yield {"model.embed_tokens.weight": random(shape.words, shape.width), "model.norm.weight": torch.ones(shape.width).bfloat16()}
    yield {"lm_head.weight": random(shape.words, shape.width)}


def prune(source: str, destination: str, recipe_name: str, batches: int, length: int) -> dict[str, float]:
    """Prune half of the blocks; seconds, and bytes of peak memory of this process."""
    from blockprune.hf import prune_checkpoint  # noqa: PLC0415

    where = bp.including(bp.linears((16, 16)), "model.layers.*")
    words = json.loads((Path(source) / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(words, (batches, 1, length), generator=torch.Generator().manual_seed(0))
    calibration = bp.Calibration([{"input_ids": x, "labels": x} for x in tokens], progress=False)
    make = {"magnitude": bp.recipes.magnitude, "sparsegpt": partial(bp.recipes.sparsegpt, calibration=calibration)}
    recipe: Any = (make | {"obs": partial(bp.recipes.obs, calibration=calibration)})[recipe_name](where)
    start = time.perf_counter()
    prune_checkpoint(source, destination, recipe, 0.5, spill=recipe_name == "obs")
    return {"seconds": time.perf_counter() - start, "bytes": resident_bytes()}


def measure(shape: Shape, recipe: str, batches: int, length: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder) / "dense", shape)
        paths = [f"{folder}/dense", f"{folder}/pruned"]
        command = [sys.executable, __file__, "--prune", *paths, "--recipe", recipe, "--batches", str(batches), "--length", str(length)]
        measured: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="1 and 3 layers, 64 wide")
    parser.add_argument("--gib", nargs="+", type=float, default=[2.0, 6.0], help="sizes of the checkpoints")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--recipe", choices=RECIPES, default="sparsegpt")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of a batch")
    parser.add_argument("--prune", nargs=2, metavar="FOLDER", help="only prune a folder into another, and print the figures as JSON")
    options = parser.parse_args()
    if options.prune:
        print(json.dumps(prune(*options.prune, options.recipe, options.batches, options.length)))
        return
    shapes = [of_size(gib, options.width) for gib in options.gib]
    if options.tiny:
        shapes = [Shape(64, 256, 16, layers, words=64) for layers in (1, 3)]
        options.batches, options.length = 2, 16
    tokens = options.batches * options.length
    print(f"{machine()}\n50% of 16x16, {RECIPES[options.recipe]}; {options.batches} x {options.length} tokens; GiB\n")
    columns = ("model", "layers", "width", "one layer", "statistics", "hidden", "bound", "peak", "seconds")
    print(("{:>12}" * len(columns)).format(*columns))
    for shape in shapes:
        print_row(f"{shape.model_bytes / GIB:.2f}", shape, tokens, measure(shape, options.recipe, options.batches, options.length))
    for name, shape in LARGE.items():  # the same arithmetic, not measured
        print_row(f"{name}", shape, tokens, {})
    print("\nbound = 1.5 x (one layer + statistics + hidden) + 1; the rows of 8B and 70B are computed")


def print_row(name: str, shape: Shape, tokens: int, measured: dict[str, float]) -> None:
    parts = (shape.layer_bytes, shape.statistics_bytes, shape.hidden_bytes(tokens), shape.bound(tokens))
    peak, seconds = (f"{measured['bytes'] / GIB:.2f}", f"{measured['seconds']:.0f}") if measured else ("", "")
    sizes = "".join(f"{part / GIB:>12.3f}" for part in parts)
    print(f"{name:>12}{shape.layers:>12}{shape.width:>12}{sizes}{peak:>12}{seconds:>12}", flush=True)


if __name__ == "__main__":
    main()
