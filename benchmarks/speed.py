"""How fast block-pruned layers and models are, against the best dense ones of the same type.

python benchmarks/speed.py layers                         # 4096 x 4096, batch 128, one thread; minutes
python benchmarks/speed.py layers --shapes 1024x1024 4096x11008 --batches 1 16 512 --blocks 16x1 32x32 --threads 1 2
python benchmarks/speed.py models --models reading --masks found/smollm*    # in masks that quality.py --save found wrote
python benchmarks/speed.py models                         # MiniLM, SmolLM2 reading and writing, all Linears pruned; minutes
python benchmarks/speed.py layers --device cuda --bsr --two-of-four --roofline --dtypes bfloat16 --batches 1 16 128 2048     # on a GPU
python benchmarks/speed.py layers --tiny                  # seconds, for the test command

All variants run in turn, so each finds the caches full of the others' weights, as a layer of a model does; on a GPU each runs on so many
copies that its cache does not hold them. Masks are random, if none are
given: what is computed does not depend on which blocks are kept. `benchmarks/peers/speed_rivals.py` times other engines.
"""

import argparse
import contextlib
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import minilm
import smollm
import torch
from timing import by_turns, copies, machine
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import blockprune as bp
from blockprune import export
from blockprune.export.dense import ways
from blockprune.export.two_of_four import TwoOfFourLinear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pair(text: str) -> tuple[int, int]:
    first, second = text.split("x")
    return int(first), int(second)


def random_mask(grid: bp.BlockGrid, sparsity: float, generator: torch.Generator) -> bp.BlockMask:
    order = torch.randperm(grid.blocks, generator=generator)
    return bp.BlockMask((order >= round(sparsity * grid.blocks)).view(grid.size), grid)


def roofline(options: argparse.Namespace, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second in a copy, additions and multiplications a second in a dense product, both large: what the device reaches."""
    a = torch.randn(size := 512 if options.tiny else 8192, size, device=options.device).to(dtype)
    seconds = timed({"copy": [a.clone], "product": [lambda: a @ a]}, options)
    return 2 * a.nbytes / seconds["copy"], 2 * size**3 / seconds["product"]


def timed(calls: Mapping[Any, Sequence[Callable[[], object]]], options: argparse.Namespace) -> dict[Any, float]:
    """Median seconds; on a GPU as a CUDA graph replays them, over several copies that its cache does not hold."""
    return by_turns(calls, torch.device(options.device), graph=options.device == "cuda", rounds=options.rounds)


@torch.no_grad()
def layers(options: argparse.Namespace, dtype: torch.dtype, shape: tuple[int, int], batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, cols = shape
    weight, bias, x = (torch.randn(size, generator=generator).to(options.device, dtype) for size in (shape, (rows,), (batch, cols)))

    def several(held: int) -> range:
        return range(1 if options.device == "cpu" else copies(held, x.device))

    calls: dict[Any, list[Callable[[], object]]] = {}
    for _ in several(weight.nbytes):
        for name, way in ways(x, weight.clone(), bias).items():
            calls.setdefault(name, []).append(way)
    if options.inductor:
        layer = nn.Linear(cols, rows, device=options.device, dtype=dtype)
        calls["inductor"] = [partial(torch.compile(layer, options={"freezing": True}), x)]
    dense = list(calls)
    for block, sparsity in itertools.product(options.blocks, options.sparsities):
        grid = bp.BlockGrid(shape, (min(block[0], rows), min(block[1], cols)))
        keep = random_mask(grid, sparsity, generator)
        sparse = export.BlockSparseLinear(export.as_matrix(weight, keep), nn.Parameter(bias, requires_grad=False), options.backend)
        calls[block, sparsity] = [partial(copy.deepcopy(sparse), x) for _ in several(sparse.values.nbytes)]
        square = block[0] == block[1] and (dtype == torch.float32 if options.device == "cpu" else block[0] >= 16 and batch >= 16)
        if options.bsr and square:
            bsr = (weight * bp.expand(keep.keep, keep.grid).to(options.device)).to_sparse_bsr(block)
            calls[f"BSR {block[0]}x{block[1]}", sparsity] = torchs_own(options, x, bsr, several(sparse.values.nbytes))
    if options.two_of_four:
        kept = torch.tensor([True, True, False, False], device=options.device).repeat(rows, cols // 4)
        halved = nn.Linear(cols, rows, bias=False, device=options.device, dtype=dtype)
        halved.weight, halved.bias = nn.Parameter(weight * kept), nn.Parameter(bias)
        searched = TwoOfFourLinear(halved)
        calls["2:4", 0.5] = [partial(copy.deepcopy(searched), x) for _ in several(searched.values.nbytes)]
    seconds = timed(calls, options)
    most = roofline(options, dtype) if options.roofline else None
    best = min(dense, key=seconds.__getitem__)
    print(
        f"{str(dtype)[6:]:10}{torch.get_num_threads():>3}  {rows}x{cols:<7}{batch:>6}  "
        + "; ".join(f"{name} {1e3 * seconds[name]:.3f} ms" for name in dense)
        + f"; {2e-9 * batch * rows * cols / seconds[best]:.0f} GF/s"
    )
    for block in dict.fromkeys(key[0] for key in calls if isinstance(key, tuple)):
        text = ""
        for sparsity in options.sparsities:
            if (block, sparsity) not in seconds:
                continue
            s, rate = seconds[block, sparsity], 2e-9 * batch * rows * cols * (1 - sparsity)
            text += f"{1e3 * s:>10.{3 if s > 1e-4 else 4}f}{seconds[best] / s:>7.2f}x{rate / s:>6.0f}"
            if most:
                moved, done = (
                    weight.nbytes * (1 - sparsity) + x.nbytes + batch * rows * x.element_size(),
                    2 * batch * rows * cols * (1 - sparsity),
                )
                text += f"{max(moved / most[0], done / most[1]) / s:>5.0%}"
        print(f"    {block if isinstance(block, str) else f'{block[0]}x{block[1]}':16}{text}", flush=True)


def torchs_own(options: argparse.Namespace, x: Tensor, bsr: Tensor, several: range) -> list[Callable[[], object]]:
    """F.linear with a BSR weight; on a GPU the kernel below it, with the fastest of some settings of its own."""
    many = [torch.sparse_bsr_tensor(bsr.crow_indices(), bsr.col_indices(), bsr.values().clone(), bsr.shape) for _ in several]
    if options.device == "cpu":
        return [partial(nn.functional.linear, x, one) for one in many]
    from torch.sparse._triton_ops import bsr_dense_addmm  # noqa: PLC0415

    nothing, n = x.new_empty(()).expand(bsr.shape[0], len(x)), len(x)
    tried: dict[Any, list[Callable[[], object]]] = {}
    for split, stages, warps in itertools.product(sorted({max(1, n // 256), max(1, n // 128)}), (1, 4), (4, 8)):
        meta = {"SPLIT_N": split, "GROUP_SIZE_ROW": 4, "num_stages": stages, "num_warps": warps}
        calls = [partial(bsr_dense_addmm, nothing, one, x.mT, beta=0, meta=meta) for one in many]
        with contextlib.suppress(Exception):  # too much shared memory
            calls[0]()
            tried[split, stages, warps] = calls
    seconds = timed(tried, options)
    return tried[min(seconds, key=seconds.__getitem__)]


def encoder(tiny: bool) -> tuple[str, nn.Module, Any, Callable[..., Any]]:
    """MiniLM, 8 texts of 128 tokens."""
    model, tokenizer = minilm.load()
    batch = minilm.tokens(tokenizer, minilm.background()[: 1 if tiny else 8], longest=16 if tiny else 128)
    return f"MiniLM, {'x'.join(map(str, batch['input_ids'].shape))} tokens", model, batch, minilm.embed


def reading(tiny: bool) -> tuple[str, nn.Module, Any, Callable[..., Any]]:
    """SmolLM2, a prompt of 512 tokens."""
    model, tokenizer = smollm.load()
    window = smollm.windows(tokenizer, smollm.articles(), 1)[:, : 8 if tiny else None]
    return f"SmolLM2, reading {window.shape[1]} tokens", model, window, lambda m, x: m(x, logits_to_keep=1).logits


def writing(tiny: bool) -> tuple[str, nn.Module, Any, Callable[..., Any]]:
    """SmolLM2, one more token after 128."""
    model, tokenizer = smollm.load()
    window = smollm.windows(tokenizer, smollm.articles(), 1)[:, : 8 if tiny else 128]
    caches: dict[torch.dtype, Any] = {}

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        dtype = next(m.parameters()).dtype
        if dtype not in caches:
            caches[dtype] = m(x, use_cache=True).past_key_values
        out: Tensor = m(x[:, -1:], past_key_values=caches[dtype], use_cache=True).logits
        caches[dtype].crop(-1)
        return out

    return f"SmolLM2, one token after {window.shape[1]}", model, window, forward


def llama(tiny: bool, batch: int, length: int) -> tuple[str, nn.Module, Any, Callable[..., Any]]:
    """The shapes of Llama 7B, 4 of its 32 layers, random weights: for GPUs, to which SmolLM2's layers are small."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    size = {"hidden_size": 64, "intermediate_size": 96} if tiny else {"hidden_size": 4096, "intermediate_size": 11008}
    heads = 2 if tiny else 32
    config = LlamaConfig(vocab_size=256, num_hidden_layers=1 if tiny else 4, num_attention_heads=heads, num_key_value_heads=heads, **size)
    model, length = LlamaForCausalLM(config).eval(), min(length, 8) if tiny else length
    inputs = torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0))
    return f"Llama 7B's shapes, {batch} x {length} tokens", model, inputs, lambda m, x: m(x, use_cache=False, logits_to_keep=1).logits


MODELS: dict[str, Callable[[bool], tuple[str, nn.Module, Any, Callable[..., Any]]]] = {
    "encoder": encoder,
    "reading": reading,
    "writing": writing,
    "llama-reading": partial(llama, batch=1, length=2048),
    "llama-tokens": partial(llama, batch=16, length=1),
}


def models(options: argparse.Namespace) -> None:
    for make in map(MODELS.__getitem__, options.models):
        name, model, inputs, forward = make(options.tiny)
        model, graph = model.to(options.device), options.device == "cuda" and make is not writing  # whose cache changes at every call
        inputs = tree_map_only(Tensor, lambda x: x.to(options.device), inputs)
        rule = bp.excluding(bp.linears((1, 1)), pattern="pooler*" if make is encoder else "lm_head*")
        shapes = {key: p.grid.shape for key, p in bp.collect.weights(model, where=rule, lazy=True).items()}
        variants = {Path(file).stem: bp.load_masks(file) for file in options.masks}
        for block, sparsity in itertools.product(options.blocks, options.sparsities if not variants else ()):
            generator = torch.Generator().manual_seed(0)
            masks = {key: random_mask(bp.BlockGrid(shape, block), sparsity, generator) for key, shape in shapes.items()}
            variants[f"{block[0]}x{block[1]} {sparsity:.0%}"] = masks
        tried, names = [], []
        for variant, masks in variants.items():
            masked = bp.apply_masks(copy.deepcopy(model), masks)
            for dtype in options.dtypes:
                cast = masked.to(DTYPES[dtype])
                choices = export.choose(cast, inputs=inputs, forward=forward, graph=graph, progress=False)
                tried.append(export.block_sparse(cast, backend=choices))
                kept = sum(isinstance(m, export.BlockSparseLinear) for m in tried[-1].modules())
                names.append(f"{variant}, {kept} of {len(masks)} layers sparse")
            del masked
        print(f"\n{name}; {torch.get_num_threads()} threads")
        how: Any = {"forward": forward, "compiled": options.inductor, "graph": graph, "rounds": options.rounds}
        print(export.benchmark(model, *tried, inputs=inputs, names=names, **how), flush=True)


def main(options: argparse.Namespace) -> None:
    print(machine())
    print(f"Backends:\n{export.backends()}")
    if options.what == "layers":
        print("each cell: median ms, times as fast as the best dense, billions of multiplications and additions with kept weights a second")
        if options.roofline:
            print("and the share of the roofline, which is drawn through a large copy and a large dense product on this device")
        print(" " * 20 + "".join(f"{f'{sparsity:.0%} pruned':>{28 if options.roofline else 23}}" for sparsity in options.sparsities))
    for threads in options.threads:
        torch.set_num_threads(threads)
        if options.what == "models":
            models(options)
            continue
        for dtype, shape, batch in itertools.product(options.dtypes, options.shapes, options.batches):
            layers(options, DTYPES[dtype], shape, batch)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "models"))
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--tiny", action="store_true", help="small shapes, few blocks, one round")
    parser.add_argument("--shapes", nargs="+", type=pair, default=[(4096, 4096)])
    parser.add_argument("--batches", nargs="+", type=int, default=[128])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.75, 0.9])
    parser.add_argument("--blocks", nargs="+", type=pair)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend", default=next(row.name for row in export.backends().rows if row.available))
    parser.add_argument("--masks", nargs="+", default=[], help="files that quality.py --save wrote for the one model that --models names")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: as CUDA graphs, on weights that no cache holds")
    parser.add_argument("--roofline", action="store_true", help="also the share of what the device could do")
    parser.add_argument("--inductor", action="store_true", help="also torch.compile with frozen weights")
    parser.add_argument("--bsr", action="store_true", help="also torch's own block-sparse product, in square blocks")
    parser.add_argument("--two-of-four", action="store_true", help="also cuSPARSELt on a 2:4 weight, on a GPU")
    given = parser.parse_args()
    every = [(16, 1), (8, 1), (4, 4), (16, 16), (32, 32), (64, 64)]
    given.blocks = given.blocks or (every if given.what == "layers" else [(32, 32)])
    given.models = given.models or (["encoder", "writing", "llama-tokens"] if given.tiny else ["encoder", "reading", "writing"])
    if given.masks and (given.what != "models" or len(given.models) > 1):
        parser.error("--masks are those of one model: speed.py models --models encoder (or reading, writing) --masks FILE ...")
    if given.tiny:
        given.shapes, given.batches, given.blocks, given.rounds = (
            [(128, 128)],
            [1, 4],
            [(16, 16), (16, 1)][: 1 + (given.what == "layers")],
            1,
        )
        given.sparsities, given.dtypes = given.sparsities[:1], given.dtypes[:1]
    main(given)
