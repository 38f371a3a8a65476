"""How fast block-pruned layers and models are, against the fastest dense ones of the same type.

python benchmarks/speed.py layers                         # 4096 x 4096, batch 128, one thread; minutes
python benchmarks/speed.py layers --shapes 1024x1024 4096x11008 --batches 1 16 512 --blocks 16x1 32x32 --threads 1 2
python benchmarks/speed.py models                         # MiniLM, SmolLM2 reading and writing, all Linears pruned; minutes
python benchmarks/speed.py models --models reading --masks saved/smollm*    # with masks that `quality.py --save saved` wrote
python benchmarks/speed.py layers --device cuda --bsr --two-of-four --roofline --dtypes bfloat16 --batches 1 16 128 2048     # on a GPU
python benchmarks/speed.py layers --tiny                  # seconds, for the test command

All variants run in turn, so each finds the caches full of the others' weights, as a layer in a model does; on a GPU each runs on as many
copies as its cache cannot hold. Without --masks the masks are random: the amount of computation does not depend on which blocks are kept.
`benchmarks/peers/speed_rivals.py` times other engines.
"""

import argparse
import contextlib
import copy
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import tiny
import torch
from timing import cold_copies, machine, time_interleaved
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import blockprune as bp
from blockprune import export
from blockprune.examples import minilm, smollm
from blockprune.export.dense_baselines import dense_kernels, dynamic_int8, rowwise_int8
from blockprune.export.packing import pack_int8
from blockprune.export.semi_structured import SemiStructuredLinear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
Calls = dict[Any, list[Callable[[], object]]]  # by variant: the same call on one or more copies of the weight


def pair(text: str) -> tuple[int, int]:
    first, second = text.split("x")
    return int(first), int(second)


def random_mask(grid: bp.BlockGrid, sparsity: float, generator: torch.Generator) -> bp.BlockMask:
    order = torch.randperm(grid.blocks, generator=generator)
    return bp.BlockMask((order >= round(sparsity * grid.blocks)).view(grid.size), grid)


def timed(calls: Mapping[Any, Sequence[Callable[[], object]]], options: argparse.Namespace) -> dict[Any, float]:
    """Median seconds; on a GPU as a CUDA graph replays the calls, on more copies than its cache holds."""
    return time_interleaved(calls, torch.device(options.device), graph=options.device == "cuda", rounds=options.rounds)


def roofline(options: argparse.Namespace, dtype: torch.dtype) -> tuple[float, float]:
    """What this device reaches: bytes per second in a large copy, operations per second in a large dense product."""
    size = 512 if options.tiny else 8192
    a = torch.randn(size, size, device=options.device).to(dtype)
    seconds = timed({"copy": [a.clone], "product": [lambda: a @ a]}, options)
    return 2 * a.nbytes / seconds["copy"], 2 * size**3 / seconds["product"]


@torch.no_grad()
def layers(options: argparse.Namespace, dtype: torch.dtype, shape: tuple[int, int], batch: int) -> None:
    """Time one dense layer and its pruned variants, and print them."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    floating = torch.float32 if dtype == torch.int8 else dtype  # the type of inputs and outputs
    weight, bias, x = (torch.randn(size, generator=generator).to(options.device, floating) for size in (shape, (rows,), (batch, columns)))
    problem = Problem(weight, bias, x, is_int8=dtype == torch.int8)
    others = dense_calls(options, problem) if problem.is_int8 else {}
    dense_of_type = int8_calls(problem) if problem.is_int8 else dense_calls(options, problem)
    dense, calls = list(dense_of_type), dense_of_type | others
    for block, sparsity in itertools.product(options.blocks, options.sparsities):
        mask = random_mask(bp.BlockGrid(shape, (min(block[0], rows), min(block[1], columns))), sparsity, generator)
        calls[block, sparsity] = sparse_calls(options, problem, mask)
        if options.bsr and block[0] == block[1] and torch_supports(block[0], problem):
            calls[f"BSR {block[0]}x{block[1]}", sparsity] = torch_bsr_calls(options, problem, mask)
    if options.two_of_four:
        calls["2:4", 0.5] = two_of_four_calls(problem)
    seconds = timed(calls, options)
    fastest = min(dense, key=seconds.__getitem__)
    print(
        f"{str(dtype)[6:]:10}{torch.get_num_threads():>3}  {rows}x{columns:<7}{batch:>6}  "
        + "; ".join(f"{name} {1e3 * seconds[name]:.3f} ms" for name in [*dense, *others])
        + f"; {2e-9 * batch * rows * columns / seconds[fastest]:.0f} GF/s"
    )
    limits = roofline(options, dtype) if options.roofline else None
    for block in dict.fromkeys(key[0] for key in calls if isinstance(key, tuple)):
        cells = [
            cell(problem, sparsity, seconds[block, sparsity], seconds[fastest], limits)
            for sparsity in options.sparsities
            if (block, sparsity) in seconds
        ]
        print(f"    {block if isinstance(block, str) else f'{block[0]}x{block[1]}':16}{''.join(cells)}", flush=True)


@attrs.frozen(eq=False)
class Problem:
    """One layer: ``x W^T + bias``."""

    weight: Tensor  # [rows, columns]
    bias: Tensor  # [rows]
    x: Tensor  # [batch, columns]
    is_int8: bool = False  # weights and inputs are multiplied in int8


def cell(problem: Problem, sparsity: float, seconds: float, dense: float, limits: tuple[float, float] | None) -> str:
    """Milliseconds, the speedup, billions of operations with kept weights per second, and the share of the roofline."""
    weight, x = problem.weight, problem.x
    operations = len(x) * weight.numel() * (1 - sparsity)
    text = f"{1e3 * seconds:>10.{3 if seconds > 1e-4 else 4}f}{dense / seconds:>7.2f}x{2e-9 * operations / seconds:>6.0f}"
    if limits is None:
        return text
    nbytes = weight.nbytes * (1 - sparsity) + x.nbytes + len(x) * len(weight) * x.element_size()
    return text + f"{max(nbytes / limits[0], 2 * operations / limits[1]) / seconds:>5.0%}"


def copies(nbytes: int, device: torch.device) -> range:
    """One on a CPU, where the variants displace each other from the cache; on a GPU as many as its cache cannot hold."""
    return range(1 if device.type == "cpu" else cold_copies(nbytes, device))


def dense_calls(options: argparse.Namespace, problem: Problem) -> Calls:
    """The dense implementations on this machine."""
    weight = problem.weight
    calls: Calls = {}
    for _ in copies(weight.nbytes, weight.device):
        for name, kernel in dense_kernels(problem.x, weight.clone(), problem.bias).items():
            calls.setdefault(name, []).append(kernel)
    if options.inductor:
        layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        calls["inductor"] = [partial(torch.compile(layer, options={"freezing": True}), problem.x)]
    return calls


def int8_calls(problem: Problem) -> Calls:
    """The dense implementations in int8: torch's, and the layer of blockprune with all blocks."""
    layer = nn.Sequential(nn.Linear(*reversed(problem.weight.shape)))
    layer[0].weight, layer[0].bias = nn.Parameter(problem.weight), nn.Parameter(problem.bias)
    return {
        "torch's dynamic int8": [partial(dynamic_int8(layer), problem.x)],
        "int8, all blocks": [partial(rowwise_int8(layer), problem.x)],
    }


def sparse_calls(options: argparse.Namespace, problem: Problem, mask: bp.BlockMask) -> list[Callable[[], object]]:
    """The layer of blockprune."""
    bias = nn.Parameter(problem.bias, requires_grad=False)
    if problem.is_int8:
        return [partial(export.Int8BlockSparseLinear(pack_int8(problem.weight, mask), bias, options.backend, torch.float32), problem.x)]
    layer = export.BlockSparseLinear(export.pack_weight(problem.weight, mask), bias, options.backend)
    return [partial(copy.deepcopy(layer), problem.x) for _ in copies(layer.values.nbytes, problem.weight.device)]


def two_of_four_calls(problem: Problem) -> list[Callable[[], object]]:
    """The product of cuSPARSELt with a 2:4 weight."""
    rows, columns = problem.weight.shape
    keep = torch.tensor([True, True, False, False], device=problem.weight.device).repeat(rows, columns // 4)
    plain = nn.Linear(columns, rows)
    plain.weight, plain.bias = nn.Parameter(problem.weight * keep), nn.Parameter(problem.bias)
    layer = SemiStructuredLinear(plain)  # it searches for the fastest algorithm once; its copies share the result
    return [partial(copy.deepcopy(layer), problem.x) for _ in copies(layer.values.nbytes, problem.weight.device)]


def torch_supports(side: int, problem: Problem) -> bool:
    """Whether torch's own block-sparse product runs with square blocks of this side."""
    if problem.weight.device.type == "cpu":
        return problem.weight.dtype == torch.float32
    return side >= 16 and len(problem.x) >= 16


def torch_bsr_calls(options: argparse.Namespace, problem: Problem, mask: bp.BlockMask) -> list[Callable[[], object]]:
    """F.linear with a BSR weight; on a GPU the Triton kernel that it calls, with the fastest of several of that kernel's settings."""
    weight, x, n = problem.weight, problem.x, len(problem.x)
    bsr = (weight * bp.expand(mask.keep, mask.grid).to(weight.device)).to_sparse_bsr(mask.grid.block)
    count = copies(bsr.values().nbytes, weight.device)
    weights = [torch.sparse_bsr_tensor(bsr.crow_indices(), bsr.col_indices(), bsr.values().clone(), bsr.shape) for _ in count]
    if weight.device.type == "cpu":
        return [partial(nn.functional.linear, x, weight) for weight in weights]
    from torch.sparse._triton_ops import bsr_dense_addmm  # noqa: PLC0415 (needs Triton)

    no_bias = x.new_empty(()).expand(len(weight), n)
    calls: Calls = {}
    for split, stages, warps in itertools.product(sorted({max(1, n // 256), max(1, n // 128)}), (1, 4), (4, 8)):
        meta = {"SPLIT_N": split, "GROUP_SIZE_ROW": 4, "num_stages": stages, "num_warps": warps}
        with_settings = [partial(bsr_dense_addmm, no_bias, weight, x.mT, beta=0, meta=meta) for weight in weights]
        with contextlib.suppress(Exception):  # these settings need more shared memory than the GPU has
            with_settings[0]()
            calls[split, stages, warps] = with_settings
    seconds = timed(calls, options)
    return calls[min(seconds, key=seconds.__getitem__)]


Workload = tuple[str, nn.Module, Any, Callable[..., Any]]  # a title, a model, a batch and (model, batch) -> output


def encoder(is_tiny: bool) -> Workload:
    """MiniLM, 8 texts of 128 tokens; or the tiny model."""
    if is_tiny:
        return "Tiny model, 2 x 32 tokens", tiny.load(), tiny.windows(2), lambda model, x: model(x).logits
    model, tokenizer = minilm.load()
    batch = minilm.tokens(tokenizer, minilm.background()[:8], longest=128)
    return f"MiniLM, {'x'.join(map(str, batch['input_ids'].shape))} tokens", model, batch, minilm.embed


def language_model(is_tiny: bool, length: int) -> tuple[str, nn.Module, Tensor]:
    """SmolLM2 or the tiny model, and a window of tokens."""
    if is_tiny:
        return "Tiny model", tiny.load(), tiny.windows(1, length=8)
    model, tokenizer = smollm.load()
    return "SmolLM2", model, smollm.windows(tokenizer, smollm.articles(), 1)[:, :length]


def reading(is_tiny: bool) -> Workload:
    """SmolLM2, a prompt of 512 tokens."""
    name, model, window = language_model(is_tiny, length=512)
    return f"{name}, reading {window.shape[1]} tokens", model, window, lambda model, x: model(x, logits_to_keep=1).logits


def writing(is_tiny: bool) -> Workload:
    """SmolLM2, one more token after 128."""
    name, model, window = language_model(is_tiny, length=128)
    caches: dict[torch.dtype, Any] = {}

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        dtype = next(model.parameters()).dtype
        if dtype not in caches:
            caches[dtype] = model(x, use_cache=True).past_key_values
        logits: Tensor = model(x[:, -1:], past_key_values=caches[dtype], use_cache=True).logits
        caches[dtype].crop(-1)
        return logits

    return f"{name}, one token after {window.shape[1]}", model, window, forward


def llama(is_tiny: bool, batch: int, length: int) -> Workload:
    """The shapes of Llama 7B, 4 of its 32 layers, random weights: for GPUs, on which SmolLM2's layers are too small."""
    if is_tiny:
        model, inputs = tiny.load(), tiny.windows(batch, min(length, 8))
    else:
        from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 (slow to import, and an extra)

        sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4, "num_attention_heads": 32, "vocab_size": 256}
        model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
        inputs = torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0))
    title = f"{'Tiny model' if is_tiny else 'Llama 7B, 4 layers'}, {batch} x {inputs.shape[1]} tokens"
    return title, model, inputs, lambda model, x: model(x, use_cache=False, logits_to_keep=1).logits


MODELS: dict[str, Callable[[bool], Workload]] = {
    "encoder": encoder,
    "reading": reading,
    "writing": writing,
    "llama-reading": partial(llama, batch=1, length=2048),
    "llama-tokens": partial(llama, batch=16, length=1),
}


def models(options: argparse.Namespace) -> None:
    """Time each model dense and in its pruned variants, and print a table."""
    for kind in options.models:
        title, model, inputs, forward = MODELS[kind](options.tiny)
        model = model.to(options.device)
        inputs = tree_map_only(Tensor, lambda x: x.to(options.device), inputs)
        graph = options.device == "cuda" and kind != "writing"  # whose cache changes in every call
        sparse, names = [], []
        for name, masks in masks_by_name(options, model).items():
            masked = bp.apply_masks(copy.deepcopy(model), masks)
            for dtype in options.dtypes:
                is_int8 = dtype == "int8"
                cast = masked.to(torch.float32 if is_int8 else DTYPES[dtype])
                choices = export.choose(
                    cast, inputs=inputs, forward=forward, graph=graph, progress=False, dtype="int8" if is_int8 else None
                )
                exported = export.block_sparse(cast, backend=choices)
                sparse.append(rowwise_int8(exported) if is_int8 else exported)  # Linears without masks, such as the output head, too
                count = sum(isinstance(module, export.BlockSparseLinear) for module in exported.modules())
                names.append(f"{name}{' int8' * is_int8}, {count} of {len(masks)} layers {'int8' if is_int8 else 'sparse'}")
        print(f"\n{title}; {torch.get_num_threads()} threads")
        measured: Any = {"forward": forward, "compiled": options.inductor, "graph": graph, "rounds": options.rounds}
        print(export.benchmark(model, *sparse, inputs=inputs, names=names, **measured), flush=True)


def masks_by_name(options: argparse.Namespace, model: nn.Module) -> dict[str, bp.Masks]:
    """The masks of --masks, or a random one for each block and sparsity."""
    if options.masks:
        return {Path(file).stem: bp.load_masks(file) for file in options.masks}
    inside = bp.excluding(bp.linears((1, 1)), re.compile(r"(pooler|lm_head)\..*"))
    shapes = {name: p.grid.shape for name, p in bp.collect.weights(model, where=inside, lazy=True).items()}
    masks: dict[str, bp.Masks] = {}
    for block, sparsity in itertools.product(options.blocks, options.sparsities):
        generator = torch.Generator().manual_seed(0)
        name = f"{block[0]}x{block[1]} {sparsity:.0%}"
        masks[name] = {key: random_mask(bp.BlockGrid(shape, block), sparsity, generator) for key, shape in shapes.items()}
    return masks


def main(options: argparse.Namespace) -> None:
    print(machine())
    print(f"Backends:\n{export.backends()}")
    if options.what == "layers":
        print("In each cell: median ms; the speedup over the fastest dense; billions of operations with kept weights per second")
        if options.roofline:
            print("and the share of the roofline, which is drawn through a large copy and a large dense product on this device")
        print(" " * 20 + "".join(f"{f'{sparsity:.0%} pruned':>{28 if options.roofline else 23}}" for sparsity in options.sparsities))
    all_threads = torch.get_num_threads()
    for threads in options.threads:
        torch.set_num_threads(threads)
        if options.what == "models":
            models(options)
            continue
        for dtype, shape, batch in itertools.product(options.dtypes, options.shapes, options.batches):
            layers(options, DTYPES[dtype], shape, batch)
    torch.set_num_threads(all_threads)


def add_layer_options(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark of layers and models; their defaults can be set anew."""
    parser.add_argument("--tiny", action="store_true", help="small shapes, a random model, few blocks, one round")
    parser.add_argument("--shapes", nargs="+", type=pair, default=[(4096, 4096)])
    parser.add_argument("--batches", nargs="+", type=int, default=[128])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.75, 0.9])
    parser.add_argument("--blocks", nargs="+", type=pair)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend", default=next(row.name for row in export.backends().rows if row.available))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "models"))
    parser.add_argument("--models", nargs="+", choices=MODELS)
    add_layer_options(parser)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--masks", nargs="+", default=[], help="files that quality.py --save wrote for the one model that --models names")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: as CUDA graphs, on weights that no cache holds")
    parser.add_argument("--roofline", action="store_true", help="also the share of what the device could do")
    parser.add_argument("--inductor", action="store_true", help="also torch.compile with frozen weights")
    parser.add_argument("--bsr", action="store_true", help="also torch's own block-sparse product, in square blocks")
    parser.add_argument("--two-of-four", action="store_true", help="also cuSPARSELt on a 2:4 weight, on a GPU")
    options = parser.parse_args()
    blocks = [(16, 1), (8, 1), (4, 4), (16, 16), (32, 32), (64, 64)]
    options.blocks = options.blocks or (blocks if options.what == "layers" else [(32, 32)])
    options.models = options.models or (["encoder", "writing", "llama-tokens"] if options.tiny else ["encoder", "reading", "writing"])
    if options.masks and (options.what != "models" or len(options.models) > 1):
        parser.error("--masks are those of one model: speed.py models --models encoder (or reading, writing) --masks FILE ...")
    if options.device != "cpu":
        options.dtypes = [dtype for dtype in options.dtypes if dtype != "int8"]
    if options.tiny:
        options.shapes, options.batches, options.rounds = [(128, 128)], [1, 4], 1
        options.blocks = [(16, 16), (16, 1)] if options.what == "layers" else [(16, 16)]
        options.sparsities, options.dtypes = options.sparsities[:1], options.dtypes[:1]
    return options


if __name__ == "__main__":
    main(parse())
