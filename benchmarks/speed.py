"""How fast block-pruned layers and models are, against the best dense ones of the same type.

python benchmarks/speed.py layers                         # 4096 x 4096, batch 128, one thread; minutes
python benchmarks/speed.py layers --shapes 1024x1024 4096x11008 --batches 1 16 512 --blocks 16x1 32x32 --threads 1 2
python benchmarks/speed.py models --models reading --masks found/smollm*    # in masks that quality.py --save found wrote
python benchmarks/speed.py models                         # MiniLM, SmolLM2 reading and writing, all Linears pruned; minutes
python benchmarks/speed.py layers --device cuda --bsr --roofline --dtypes bfloat16 --batches 1 16 128 2048      # on a GPU
python benchmarks/speed.py layers --tiny                  # seconds, for the test command

All variants run in turn, so each finds the caches full of the others' weights, as a layer of a model does. Masks are random, if none are
given: what is computed does not depend on which blocks are kept. `benchmarks/peers/speed_rivals.py` times other engines.
"""

import argparse
import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import minilm
import smollm
import torch
from timing import machine, medians
from torch import Tensor, nn

import blockprune as bp
from blockprune import export
from blockprune.export.choose import waited
from blockprune.export.dense import ways

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
    seconds = medians({"copy": waited(a.clone, a), "product": waited(lambda: a @ a, a)}, rounds=min(5, options.rounds))
    return 2 * a.nbytes / seconds["copy"], 2 * size**3 / seconds["product"]


@torch.no_grad()
def layers(options: argparse.Namespace, dtype: torch.dtype, shape: tuple[int, int], batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, cols = shape
    weight, bias, x = (torch.randn(size, generator=generator).to(options.device, dtype) for size in (shape, (rows,), (batch, cols)))
    calls: dict[Any, Callable[[], Tensor]] = {**ways(x, weight, bias)}
    if options.inductor:
        layer = nn.Linear(cols, rows, device=options.device, dtype=dtype)
        calls["inductor"] = partial(torch.compile(layer, options={"freezing": True}), x)
    dense = list(calls)
    for block, sparsity in itertools.product(options.blocks, options.sparsities):
        grid = bp.BlockGrid(shape, (min(block[0], rows), min(block[1], cols)))
        sparse = export.as_matrix(weight, random_mask(grid, sparsity, generator))
        calls[block, sparsity] = partial(export.BlockSparseLinear(sparse, nn.Parameter(bias, requires_grad=False), options.backend), x)
    if options.bsr and (options.device != "cpu" or dtype == torch.float32):
        for sparsity in options.sparsities:
            kept = random_mask(bp.BlockGrid(shape, (32, 32)), sparsity, generator)
            bsr = (weight * bp.expand(kept.keep, kept.grid).to(options.device)).to_sparse_bsr((32, 32))
            calls["torch BSR 32x32", sparsity] = partial(nn.functional.linear, x, bsr)
    seconds = medians({name: waited(call, x) for name, call in calls.items()}, rounds=options.rounds)
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
            s = seconds[block, sparsity]
            text += f"{1e3 * s:>10.3f}{seconds[best] / s:>7.2f}x{2e-9 * batch * rows * cols * (1 - sparsity) / s:>6.0f}"
            if most:
                moved, done = (
                    weight.nbytes * (1 - sparsity) + x.nbytes + batch * rows * x.element_size(),
                    2 * batch * rows * cols * (1 - sparsity),
                )
                text += f"{max(moved / most[0], done / most[1]) / s:>5.0%}"
        print(f"    {block if isinstance(block, str) else f'{block[0]}x{block[1]}':16}{text}", flush=True)


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


def models(options: argparse.Namespace) -> None:
    for make in [{"encoder": encoder, "reading": reading, "writing": writing}[name] for name in options.models]:
        name, model, inputs, forward = make(options.tiny)
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
                tried.append(export.block_sparse(cast, inputs=inputs, forward=forward, progress=False))
                kept = sum(isinstance(m, export.BlockSparseLinear) for m in tried[-1].modules())
                names.append(f"{variant}, {kept} of {len(masks)} layers sparse")
            del masked
        print(f"\n{name}; {torch.get_num_threads()} threads")
        print(
            export.benchmark(model, *tried, inputs=inputs, names=names, forward=forward, compiled=options.inductor, rounds=options.rounds),
            flush=True,
        )


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
    parser.add_argument("--models", nargs="+", choices=("encoder", "reading", "writing"))
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
    parser.add_argument("--device", default="cpu", help="layers only; on another than cpu, each call is waited for")
    parser.add_argument("--roofline", action="store_true", help="also the share of what the device could do")
    parser.add_argument("--inductor", action="store_true", help="also torch.compile with frozen weights")
    parser.add_argument("--bsr", action="store_true", help="also torch's own block-sparse product")
    given = parser.parse_args()
    every = [(16, 1), (8, 1), (4, 4), (16, 16), (32, 32), (64, 64)]
    given.blocks = given.blocks or (every if given.what == "layers" else [(32, 32)])
    given.models = given.models or (["encoder", "writing"] if given.tiny else ["encoder", "reading", "writing"])
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
