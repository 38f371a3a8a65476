"""How the cost of `metric.obs` grows with width and block size, against its count of operations and the machine's matrix product.

python benchmarks/obs.py                                # half an hour; 576, 1,536 and 4,096 inputs
python benchmarks/obs.py --widths 576 --threads 2       # a part of it
python benchmarks/obs.py --tiny                         # seconds, for the test command

A band of rows over k inputs in columns of N takes k^3 / 3 operations for H^-1 (the upper half, less at each step), whatever N is; the
scores of what is left take (k / N)^2 / 2 solves of N x N with M rows.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from timing import machine, medians

import blockprune as bp
from blockprune import native

WIDTHS = (576, 1536, 4096)
BLOCKS = ((1, 1), (4, 4), (16, 16), (32, 32), (16, 1), (64, 64))


def layer(rows: int, width: int, block: tuple[int, int]) -> dict[str, bp.Param]:
    """A layer of some bands with correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * width, width, generator=generator) @ torch.diag(torch.rand(width, generator=generator) * 3)
    weight = torch.randn(rows, width, generator=generator)
    return {"w": bp.Param(weight, bp.BlockGrid((rows, width), block), {"input_gram": (x.mT @ x / len(x))[None]})}


def product(n: int) -> float:
    """Operations a second of a float32 matrix product."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / medians({"product": lambda: a @ b}, rounds=5)["product"]


def main(widths: Sequence[int], most: int, size: int, threads_tried: Sequence[int]) -> None:
    print(machine(), "; compiled loop:", native.status)
    every = torch.get_num_threads()
    for threads in threads_tried:
        torch.set_num_threads(threads)
        peak = product(size)
        print(f"\n{threads} threads; a float32 product of {size} x {size}: {peak / 1e9:.0f} billion operations a second")
        print(
            f"{'threads':>8}{'inputs':>8}{'block':>10}{'ms a band':>11}{'ns a weight':>13}{'billion/s':>11}{'of product':>12}{'to 50 %':>9}"
        )
        for width in widths:
            for block in BLOCKS:
                bands = max(2, most * WIDTHS[0] // width)
                data = layer(bands * block[0], width, block)
                calls = {
                    "all": partial(bp.metric.obs, data, progress=False),
                    "half": partial(bp.metric.obs, data, max_sparsity=0.5, progress=False),
                }
                calls["prepare"] = partial(bp.metric.obs, data, max_sparsity=0.0, progress=False)  # H^-1 and the first scores
                seen = medians(calls, rounds=3)
                seconds = (seen["all"] - seen["prepare"]) / bands
                rate = width**3 / 3 / seconds
                print(
                    f"{threads:>8}{width:>8}{block!s:>10}{1e3 * seconds:>11.2f}{1e9 * seconds / block[0] / width:>13.1f}{rate / 1e9:>11.1f}"
                    f"{rate / peak:>12.0%}{seen['half'] / seen['all']:>9.0%}",
                    flush=True,
                )
    torch.set_num_threads(every)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="64 inputs")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    options = parser.parse_args()
    main((64,) if options.tiny else options.widths, 2 if options.tiny else 8, 256 if options.tiny else 2048, options.threads)
