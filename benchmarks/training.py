"""How fast a training step is that computes kept blocks alone, beside the dense and the masked step.

python benchmarks/training.py layers                      # 4096 x 4096, batch 512, one thread; minutes
python benchmarks/training.py layers --shapes 1024x1024 --batches 128 2048 --threads 1 2 --optimizer
python benchmarks/training.py models                      # a step of MiniLM and of SmolLM2, all Linears of their layers pruned
python benchmarks/training.py layers --tiny               # seconds, for the test command

A step of a layer is the output and the gradients of the input, the weight and the bias; with --optimizer also AdamW. A step of a model is
forward, backward and AdamW. Masks are random: the amount of computation does not depend on which blocks are kept.
"""

import argparse
import copy
import itertools
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from speed import DTYPES, Workload, add_layer_options, encoder, language_model, random_mask
from timing import machine, median_seconds, reset_peak, resident_bytes
from torch import Tensor, nn

import blockprune as bp
from blockprune import export

Step = Callable[[], object]


def layer_step(layer: nn.Module, x: Tensor, grad: Tensor, with_optimizer: bool) -> Step:
    """A call that computes all gradients of a layer, and with an optimizer changes its parameters."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-5, fused=True) if with_optimizer else None
    x = x.clone().requires_grad_()

    def step() -> None:
        layer(x).backward(grad)
        if optimizer:
            optimizer.step()
        x.grad = None
        layer.zero_grad()

    return step


def masked_torch_bsr(layer: nn.Linear, mask: bp.BlockMask, x: Tensor) -> nn.Module | None:
    """Torch's own block-sparse weight, if its product with x has gradients."""
    plain = bp.finalize(bp.apply_masks(copy.deepcopy(layer), {"weight": mask}))
    with warnings.catch_warnings(action="ignore"):  # torch's BSR is in beta state
        plain.weight = nn.Parameter(plain.weight.detach().to_sparse_bsr(mask.grid.block))
    try:
        plain(x.clone().requires_grad_()).sum().backward()
    except RuntimeError:
        return None
    plain.zero_grad()
    return plain


def layers(options: argparse.Namespace, dtype: torch.dtype, shape: tuple[int, int], batch: int) -> list[float]:
    """Time a dense layer and its pruned variants, and print them; return the speedups."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    layer = nn.Linear(columns, rows, dtype=dtype)
    x, grad = (torch.randn(batch, size, generator=generator).to(dtype) for size in (columns, rows))
    calls: dict[Any, Step] = {"dense": layer_step(layer, x, grad, options.optimizer)}
    for block, sparsity in itertools.product(options.blocks, options.sparsities):
        mask = random_mask(bp.BlockGrid(shape, (min(block[0], rows), min(block[1], columns))), sparsity, generator)
        masked = bp.apply_masks(copy.deepcopy(layer), {"weight": mask})
        if "masked" not in calls:
            calls["masked"] = layer_step(masked, x, grad, options.optimizer)
            if block[0] == block[1] and dtype == torch.float32:
                bsr = masked_torch_bsr(layer, mask, x)
                if bsr is None:
                    print("torch's BSR weight has no gradient here")
                else:
                    calls["torch BSR"] = layer_step(bsr, x, grad, options.optimizer)
        sparse = export.block_sparse(masked, backend=options.backend, trainable=True)
        calls[block, sparsity] = layer_step(sparse, x, grad, options.optimizer)
    seconds = median_seconds(calls, rounds=options.rounds)
    others = "; ".join(f"{name} {1e3 * seconds[name]:.1f} ms" for name in calls if isinstance(name, str))
    print(f"{str(dtype)[6:]:10}{torch.get_num_threads():>3}  {rows}x{columns:<7}{batch:>6}  {others}")
    for block in options.blocks:
        times = [seconds[block, sparsity] for sparsity in options.sparsities]
        print(f"    {block[0]}x{block[1]:<14}" + "".join(f"{1e3 * t:>10.1f} ms{seconds['dense'] / t:>7.2f}x" for t in times), flush=True)
    return [seconds["dense"] / seconds[key] for key in calls if isinstance(key, tuple)]


def reading_batch(is_tiny: bool) -> Workload:
    """SmolLM2 with the loss of the next token, 4 texts of 512 tokens; or the tiny model."""
    name, model, window = language_model(is_tiny, length=16 if is_tiny else 512)
    windows = window.expand(4, -1).contiguous()
    return (
        f"{name}, {' x '.join(map(str, windows.shape))} tokens",
        model,
        windows,
        lambda model, x: model(x, labels=x, use_cache=False).loss,
    )


def embedding_batch(is_tiny: bool) -> Workload:
    """MiniLM with a loss of its embeddings, 8 texts of 128 tokens; or the tiny model."""
    title, model, batch, forward = encoder(is_tiny)
    return title, model, batch, lambda model, x: forward(model, x).square().mean()


WORKLOADS = {"encoder": embedding_batch, "language": reading_batch}


def variants(options: argparse.Namespace, model: nn.Module, variant: str) -> nn.Module:
    """The dense, masked or block-sparse model that a variant such as "sparse 50%" names."""
    kind, _, share = variant.partition(" ")
    model = copy.deepcopy(model).train()
    if kind == "dense":
        return model
    where = bp.excluding(bp.linears((1, 1)), re.compile(r"(pooler|lm_head|embed).*"))
    generator, grids = torch.Generator().manual_seed(0), bp.collect.weights(model, where=where, lazy=True)
    sparsity = float(share.rstrip("%")) / 100
    masks = {name: random_mask(bp.BlockGrid(p.grid.shape, options.blocks[0]), sparsity, generator) for name, p in grids.items()}
    masked = bp.apply_masks(model, masks)
    return masked if kind == "masked" else export.block_sparse(masked, backend=options.backend, trainable=True)


def model_step(model: nn.Module, batch: Any, loss: Callable[..., Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def models(options: argparse.Namespace) -> None:
    """Time a training step of each model, dense, masked and block-sparse, and measure the memory of each in a process of its own."""
    for name in options.models:
        title, model, batch, loss = WORKLOADS[name](options.tiny)
        names = ["dense", *(f"{kind} {s:.0%}" for s in options.sparsities for kind in ("masked", "sparse"))]
        seconds = median_seconds({v: model_step(variants(options, model, v), batch, loss) for v in names}, rounds=options.rounds)
        peaks = {v: peak_memory(options, name, v) for v in names} if options.memory else {}
        print(f"\n{title}; {torch.get_num_threads()} threads; blocks {options.blocks[0][0]}x{options.blocks[0][1]}")
        for v in names:
            line = f"    {v:14}{1e3 * seconds[v]:>10.0f} ms{seconds['dense'] / seconds[v]:>7.2f}x"
            print(line + (f"{peaks[v] / 2**20:>8.0f} MiB{peaks[v] / peaks['dense']:>7.2f}" if peaks else ""), flush=True)
        short = ", ".join(f"{v} {seconds['dense'] / seconds[v]:.2f}x" for v in names if v.startswith("sparse"))
        print(f"In short: a training step of {title.split(',')[0]}, beside dense: {short}.")


def peak_memory(options: argparse.Namespace, name: str, variant: str) -> int:
    """Bytes that two steps of a variant need beyond what the process has before the model is loaded."""
    command = [sys.executable, __file__, "models", "--models", name, "--peak", variant, *["--tiny"] * options.tiny]
    blocks = ["--blocks", f"{options.blocks[0][0]}x{options.blocks[0][1]}"]
    return int(subprocess.run([*command, *blocks], capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(options: argparse.Namespace) -> None:
    """Print the peak of a variant, for `peak_memory`: two steps from a saved model, so that pruning it does not count."""
    _, model, batch, loss = WORKLOADS[options.models[0]](options.tiny)
    model = variants(options, model, options.peak)
    reset_peak()
    before = resident_bytes("VmRSS") - sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    step = model_step(model, batch, loss)
    step()
    step()
    print(resident_bytes() - before)


def main(options: argparse.Namespace) -> None:
    if options.peak:
        return print_peak(options)
    print(machine())
    if options.what == "layers":
        what = "output, gradients" + (", AdamW" if options.optimizer else "")
        print(f"A step is: {what}. In each cell: median ms, the speedup over the dense step")
        print(" " * 20 + "".join(f"{f'{sparsity:.0%} pruned':>20}" for sparsity in options.sparsities))
    all_threads, speedups = torch.get_num_threads(), []
    for threads in options.threads:
        torch.set_num_threads(threads)
        if options.what == "models":
            models(options)
            continue
        for dtype, shape, batch in itertools.product(options.dtypes, options.shapes, options.batches):
            speedups += layers(options, DTYPES[dtype], shape, batch)
    torch.set_num_threads(all_threads)
    if speedups:
        print(f"In short: steps of block-sparse layers are {min(speedups):.2f} to {max(speedups):.2f} times as fast as dense ones.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "models"))
    add_layer_options(parser)
    parser.set_defaults(batches=[512], rounds=9)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--optimizer", action="store_true", help="AdamW belongs to the step of a layer")
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure the peak memory of models")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.blocks = options.blocks or ([(16, 16), (32, 32), (64, 64), (16, 1)] if options.what == "layers" else [(32, 32)])
    if options.tiny:
        options.shapes, options.batches, options.rounds, options.blocks = [(64, 96)], [8], 1, [(16, 16)]
        options.sparsities = options.sparsities[:1]
    return options


if __name__ == "__main__":
    main(parse())
