"""One layer: the compiled product with a block-sparse weight against the best dense product of the same type.

python benchmarks/spmm.py                                  # 4096 x 4096, batch 128, one thread; minutes
python benchmarks/spmm.py --shapes 1024x1024 4096x11008 --batches 1 16 512 --blocks 16x1 32x32 --threads 1 2
python benchmarks/spmm.py --tiny                           # seconds, for the test command

All variants run in turn, so each finds the caches full of the others' weights, as a layer of a model does.
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch._inductor.config
from timing import machine, medians
from torch import Tensor, nn

import blockprune as bp
from blockprune import storage
from blockprune.native import spmm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pair(text: str) -> tuple[int, int]:
    first, second = text.split("x")
    return int(first), int(second)


def dense(layer: nn.Linear, x: Tensor, inductor: bool) -> dict[str, Callable[[], Tensor]]:
    """The ways to multiply with the whole weight: torch's own, packed by oneDNN for this batch (what inductor does with frozen weights,
    and faster than `torch.utils.mkldnn.to_mkldnn`, which packs for any batch), and inductor itself.
    """
    ways: dict[str, Callable[[], Tensor]] = {"F.linear": partial(nn.functional.linear, x, layer.weight, layer.bias)}
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, len(x))
        ways["oneDNN packed"] = partial(torch.ops.mkldnn._linear_pointwise, x, packed, layer.bias, "none", [], "")
    if inductor:
        torch._inductor.config.freezing = True
        compiled = torch.compile(layer)
        compiled(x)
        ways["inductor"] = partial(compiled, x)
    return ways


def random_mask(grid: bp.BlockGrid, sparsity: float) -> Tensor:
    order = torch.randperm(grid.blocks)
    keep = torch.ones(grid.blocks, dtype=torch.bool)
    keep[order[: round(sparsity * grid.blocks)]] = False
    return keep.view(grid.size)


@torch.no_grad()
def table(options: argparse.Namespace, dtype: torch.dtype, shape: tuple[int, int], batch: int) -> None:
    torch.manual_seed(0)
    rows, cols = shape
    layer, x = nn.Linear(cols, rows).to(dtype).eval().requires_grad_(requires_grad=False), torch.randn(batch, cols).to(dtype)
    ways = dense(layer, x, options.inductor)
    cells = [(block, sparsity) for block in options.blocks for sparsity in options.sparsities]
    for block, sparsity in cells:
        grid = bp.BlockGrid(shape, (min(block[0], rows), min(block[1], cols)))
        sparse = storage.pack(layer.weight, random_mask(grid, sparsity), grid)
        multiply = partial(spmm.linear, shape=sparse.shape, block=sparse.block, bias=layer.bias)
        ways[f"{block} {sparsity}"] = partial(multiply, x, sparse.values, sparse.crow, sparse.col)
    seconds = medians(ways, rounds=options.rounds)
    whole = {name: seconds[name] for name in ways if not name.startswith("(")}
    best = min(whole, key=lambda name: whole[name])
    print(
        f"{str(dtype)[6:]:10}{torch.get_num_threads():>3}  {rows}x{cols:<7}{batch:>6}  "
        + "; ".join(f"{name} {1e3 * s:.3f} ms" for name, s in whole.items())
        + f"; {2e-9 * batch * rows * cols / whole[best]:.0f} GF/s"
    )
    for block in options.blocks:
        text = ""
        for sparsity in options.sparsities:
            s = seconds[f"{block} {sparsity}"]
            text += f"{1e3 * s:>10.3f}{whole[best] / s:>7.2f}x{2e-9 * batch * rows * cols * (1 - sparsity) / s:>6.0f}"
        print(f"    {f'{block[0]}x{block[1]}':9}{text}", flush=True)


def main(options: argparse.Namespace) -> None:
    print(machine())
    print(f"compiled product: {spmm.status}, {', '.join(spmm.instructions())}; the last one runs")
    print("each cell: median ms, times as fast as the best dense, billions of multiplications and additions with kept weights a second")
    print(" " * 13 + "".join(f"{f'{sparsity:.0%} pruned':>24}" for sparsity in options.sparsities))
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype, shape, batch in itertools.product(options.dtypes, options.shapes, options.batches):
            table(options, DTYPES[dtype], shape, batch)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="128 x 128, batches 1 and 4, two blocks, one round")
    parser.add_argument("--shapes", nargs="+", type=pair, default=[(4096, 4096)])
    parser.add_argument("--batches", nargs="+", type=int, default=[128])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.75, 0.9])
    parser.add_argument("--blocks", nargs="+", type=pair, default=[(32, 32), (16, 1), (16, 16), (64, 64), (8, 1), (4, 4), (1, 16)])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--inductor", action="store_true", help="also torch.compile with frozen weights")
    given = parser.parse_args()
    if given.tiny:
        given.shapes, given.batches, given.blocks, given.rounds = [(128, 128)], [1, 4], [(16, 16), (16, 1)], 1
    main(given)
