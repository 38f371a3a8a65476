"""How the time of `metric.obs` grows with width and block size, against its number of operations and the machine's matrix product.

python benchmarks/obs.py                                # half an hour; 576, 1,536 and 4,096 inputs
python benchmarks/obs.py --widths 576 --threads 2       # a part of it
python benchmarks/obs.py --tiny                         # seconds, for the test command

A band (one row of blocks) over k inputs in blocks of N columns takes k^3 / 3 operations to downdate H^-1 (its upper half, which shrinks
with each removal), whatever N is. The scores of the remaining blocks take (k / N)^2 / 2 solves of an N x N system with M right-hand sides.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from timing import machine, median_seconds

import blockprune as bp
from blockprune import native

WIDTHS = (576, 1536, 4096)
BLOCKS = ((1, 1), (4, 4), (16, 16), (32, 32), (16, 1), (64, 64))


def layer(rows: int, width: int, block: tuple[int, int]) -> bp.Data:
    """The data of a layer with correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * width, width, generator=generator) @ torch.diag(torch.rand(width, generator=generator) * 3)
    weight = torch.randn(rows, width, generator=generator)
    return {"w": bp.Param(weight, bp.BlockGrid((rows, width), block), {"input_gram": (x.mT @ x / len(x))[None]})}


def operations_per_second(n: int) -> float:
    """Of a float32 product of two n x n matrices."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / median_seconds({"product": lambda: a @ b}, rounds=5)["product"]


def measure(width: int, block: tuple[int, int], bands: int, product: float) -> None:
    """Print one line of the table."""
    data = layer(bands * block[0], width, block)
    calls = {
        "all": partial(bp.metric.obs, data, progress=False),
        "half": partial(bp.metric.obs, data, stop_at=0.5, progress=False),
        "none": partial(bp.metric.obs, data, stop_at=0.0, progress=False),  # H^-1 and the first scores
    }
    seconds = median_seconds(calls, rounds=3)
    per_band = (seconds["all"] - seconds["none"]) / bands
    rate = width**3 / 3 / per_band
    print(
        f"{torch.get_num_threads():>8}{width:>8}{block!s:>10}{1e3 * per_band:>11.2f}{1e9 * per_band / block[0] / width:>13.1f}"
        f"{rate / 1e9:>11.1f}{rate / product:>12.0%}{seconds['half'] / seconds['all']:>9.0%}",
        flush=True,
    )


def main(widths: Sequence[int], bands: int, product_size: int, threads: Sequence[int]) -> None:
    print(machine(), "; compiled loop:", native.status)
    all_threads = torch.get_num_threads()
    for count in threads:
        torch.set_num_threads(count)
        product = operations_per_second(product_size)
        size = f"{product_size} x {product_size}"
        print(f"\n{count} threads; a float32 product of {size}: {product / 1e9:.0f} billion operations a second")
        head = f"{'threads':>8}{'inputs':>8}{'block':>10}{'ms a band':>11}{'ns a weight':>13}{'billion/s':>11}"
        print(f"{head}{'of product':>12}{'to 50 %':>9}")
        for width in widths:
            for block in BLOCKS:
                measure(width, block, max(2, bands * WIDTHS[0] // width), product)
    torch.set_num_threads(all_threads)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="64 inputs")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    options = parser.parse_args()
    if options.tiny:
        main((64,), bands=2, product_size=256, threads=options.threads)
    else:
        main(options.widths, bands=8, product_size=2048, threads=options.threads)
