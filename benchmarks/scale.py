"""Peak memory of pruning a checkpoint folder that is never loaded whole, against the size of the model; and time in several processes.

python benchmarks/scale.py --gib 2 6      # checkpoints of these sizes, with Llama's shapes and random bfloat16 weights (see below)
python benchmarks/scale.py --gib 0.3 --width 1024 --recipe obs --processes 1 2   # one thread each, which share the batches and the work
python benchmarks/scale.py --tiny                      # seconds, for the test command

Each model is pruned in a process of its own, whose peak resident memory is read from the system. The bound is
1.5 x (one layer's weights + its statistics + the hidden states) + 1 GiB. The statistics of a weight with k inputs are two k x k matrices in
float32: the products of its inputs, and of its inputs with those of the dense model. While a weight is repaired, four to five more are in
memory, which the bound does not count. The hidden states are those of the dense and of the pruned model; with a budget, which needs those
of all layers, they are kept in files. Of several processes, peak and seconds are those of the first one; the last column says whether the
masks are those of the first row of the same model.

A CPU without bfloat16 instructions takes hours, and so does OBS (--recipe obs) of weights with thousands of inputs, k^3 operations a band.
"""

import argparse
import hashlib
import json
import os
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
from torch import distributed as dist

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


def prune(source: str, destination: str, recipe_name: str, batches: int, length: int) -> dict[str, Any]:
    """Prune half of the blocks; seconds, bytes of peak memory of this process, and a hash of the masks."""
    from blockprune.hf import prune_checkpoint  # noqa: PLC0415

    where = bp.including(bp.linears((16, 16)), "model.layers.*")
    words = json.loads((Path(source) / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(words, (batches, 1, length), generator=torch.Generator().manual_seed(0))
    reduce, own = None, slice(None)
    if "RANK" in os.environ:  # torchrun has started this process
        dist.init_process_group("gloo")
        reduce, own = bp.distributed.all_reduce, slice(dist.get_rank(), None, dist.get_world_size())
    calibration = bp.Calibration([{"input_ids": x, "labels": x} for x in tokens[own]], progress=False, reduce=reduce)
    make = {"magnitude": bp.recipes.magnitude, "sparsegpt": partial(bp.recipes.sparsegpt, calibration=calibration)}
    recipe: Any = (make | {"obs": partial(bp.recipes.obs, calibration=calibration)})[recipe_name](where)
    start = time.perf_counter()
    masks = prune_checkpoint(source, destination, recipe, 0.5, spill=recipe_name == "obs")
    seconds, keep = time.perf_counter() - start, torch.cat([masks[name].keep.flatten() for name in sorted(masks)])
    if reduce:
        dist.destroy_process_group()  # else its threads may end the process with SIGABRT
    return {"seconds": seconds, "bytes": resident_bytes(), "masks": hashlib.sha256(keep.numpy().tobytes()).hexdigest()}


def measure(shape: Shape, recipe: str, batches: int, length: int, processes: int, *, one_thread: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder) / "dense", shape)
        paths = [f"{folder}/dense", f"{folder}/pruned"]
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
        options = [f"--recipe={recipe}", f"--batches={batches}", f"--length={length}"]
        command = [sys.executable, *start, __file__, "--prune", *paths, *options]
        threads = {"OMP_NUM_THREADS": "1"} if one_thread else {}
        run = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | threads)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}:\n{run.stderr}")
        measured: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="1 and 3 layers, 64 wide; with --processes only 3")
    parser.add_argument("--gib", nargs="+", type=float, default=[2.0, 6.0], help="sizes of the checkpoints")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--recipe", choices=RECIPES, default="sparsegpt")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of a batch")
    parser.add_argument("--processes", nargs="+", type=int, default=[], help="numbers of processes, of one thread each")
    parser.add_argument("--prune", nargs=2, metavar="FOLDER", help="only prune a folder into another, and print the figures as JSON")
    options = parser.parse_args()
    if options.prune:
        measured = prune(*options.prune, options.recipe, options.batches, options.length)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(measured))
        return
    shapes = [of_size(gib, options.width) for gib in options.gib]
    if options.tiny:
        shapes = [Shape(64, 256, 16, layers, words=64) for layers in ((3,) if options.processes else (1, 3))]
        options.batches, options.length = 2, 16
    tokens = options.batches * options.length
    print(f"{machine()}\n50% of 16x16, {RECIPES[options.recipe]}; {options.batches} x {options.length} tokens; GiB\n")
    columns = ("model", "layers", "width", "one layer", "statistics", "hidden", "bound", "peak", "seconds", "processes", "masks")
    print(("{:>12}" * len(columns)).format(*columns))
    for shape in shapes:
        first = ""
        for count in options.processes or [1]:
            one_thread = bool(options.processes)
            measured = measure(shape, options.recipe, options.batches, options.length, count, one_thread=one_thread)
            first = first or measured["masks"]
            same = "the same" if measured["masks"] == first else "others"
            print_row(f"{shape.model_bytes / GIB:.2f}", shape, tokens, {**measured, "processes": count, "masks": same})
    for name, shape in LARGE.items():  # the same arithmetic, not measured
        print_row(f"{name}", shape, tokens, {})
    print("\nbound = 1.5 x (one layer + statistics + hidden) + 1; the rows of 8B and 70B are computed")


def print_row(name: str, shape: Shape, tokens: int, measured: dict[str, Any]) -> None:
    parts = (shape.layer_bytes, shape.statistics_bytes, shape.hidden_bytes(tokens), shape.bound(tokens))
    peak, seconds = (f"{measured['bytes'] / GIB:.2f}", f"{measured['seconds']:.0f}") if measured else ("", "")
    sizes = "".join(f"{part / GIB:>12.3f}" for part in parts)
    ends = "".join(f"{measured.get(key, ''):>12}" for key in ("processes", "masks"))
    print(f"{name:>12}{shape.layers:>12}{shape.width:>12}{sizes}{peak:>12}{seconds:>12}{ends}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
