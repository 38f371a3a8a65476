"""How fast block-pruned convolutions are, against torch's dense ones: the faster of channels first and channels last.

python benchmarks/conv.py layers                       # shapes of ResNet-18 and EfficientNet-Lite0, batches 1 and 8, one thread; minutes
python benchmarks/conv.py layers --batches 1 --threads 2 --sparsities 0.9
python benchmarks/conv.py model                        # a ResNet-18 with random weights
python benchmarks/conv.py layers --tiny                # seconds, for the test command

All variants run in turn. Masks are random: the amount of computation does not depend on which blocks are kept. Pruned layers run in both
memory formats, and the table shows the faster one, as the dense baseline does.
"""

import argparse
import copy
import itertools
from collections.abc import Callable
from functools import partial

import torch
from speed import random_mask
from timing import machine, median_seconds
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune as bp
from blockprune import export

LAYERS = {  # filters, channels, kernel, stride, height and width of the input
    "ResNet-18": [
        (64, 64, 3, 1, 56),
        (128, 64, 3, 2, 56),
        (128, 128, 3, 1, 28),
        (256, 256, 3, 1, 14),
        (512, 512, 3, 1, 7),
        (128, 64, 1, 2, 56),
        (512, 256, 1, 2, 14),
    ],
    "EfficientNet-Lite0": [
        (96, 16, 1, 1, 112),
        (24, 144, 1, 1, 56),
        (240, 40, 1, 1, 28),
        (480, 80, 1, 1, 14),
        (112, 672, 1, 1, 14),
        (1152, 192, 1, 1, 7),
        (192, 1152, 1, 1, 7),
    ],
}
FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
BLOCKS = {"16x16": (16, 16), "filters": (1,)}


def layer_calls(shape: tuple[int, ...], batch: int, sparsities: list[float]) -> dict[tuple[str, float, str], Callable[[], Tensor]]:
    """The dense convolution and its pruned variants, by blocks, sparsity and memory format."""
    filters, channels, side, stride, size = shape
    generator, calls = torch.Generator().manual_seed(0), {}
    conv = nn.Conv2d(channels, filters, side, stride=stride, padding=side // 2).requires_grad_(False)
    x = torch.randn(batch, channels, size, size)
    images = {name: x.to(memory_format=layout) for name, layout in FORMATS.items()}
    for name, layout in FORMATS.items():
        calls["dense", 0.0, name] = partial(copy.deepcopy(conv).to(memory_format=layout), images[name])
    for (blocks, block), sparsity in itertools.product(BLOCKS.items(), sparsities):
        grid = bp.BlockGrid(conv.weight.shape, [min(b, s) for b, s in zip(block, conv.weight.shape, strict=False)])
        mask = random_mask(grid, sparsity, generator)
        layer = export.BlockSparseConv2d(export.pack_weight(conv.weight, mask), conv)
        for name, image in images.items():
            calls[blocks, sparsity, name] = partial(layer, image)
    return calls


@torch.no_grad()
def layers(options: argparse.Namespace) -> None:
    """Print how much faster than the best dense layer each pruned one is."""
    columns = [(blocks, sparsity) for blocks in BLOCKS for sparsity in options.sparsities]
    print(f"{'layer':28}{'batch':>6}{'dense ms':>10}{'GF/s':>6}" + "".join(f"{blocks + f' {s:.0%}':>13}" for blocks, s in columns))
    for (network, shapes), batch in itertools.product(LAYERS.items(), options.batches):
        for shape in [(8, 8, 3, 1, 8)] if options.tiny else shapes:
            filters, channels, side, stride, size = shape
            seconds = median_seconds(layer_calls(shape, batch, options.sparsities), rounds=options.rounds)
            fastest = {key: min(seconds[*key, name] for name in FORMATS) for key in [("dense", 0.0), *columns]}
            dense = fastest["dense", 0.0]
            work = 2e-9 * batch * filters * channels * side**2 * (size // stride) ** 2
            title = f"{network[:9]} {side}x{side} {channels}-{filters} {size}" + (f"/{stride}" if stride > 1 else "")
            cells = "".join(f"{dense / fastest[key]:>12.2f}x" for key in columns)
            print(f"{title:28}{batch:>6}{1e3 * dense:>10.3f}{work / dense:>6.0f}{cells}", flush=True)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; the norms are folded into them, as for inference."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, filters, 3, stride, 1), nn.Conv2d(filters, filters, 3, 1, 1)
        self.shortcut = nn.Conv2d(channels, filters, 1, stride) if channels != filters else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def resnet18(width: int = 64) -> nn.Sequential:
    """The shapes of ResNet-18, random weights."""
    stem = nn.Conv2d(3, width, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    sizes = [width, width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
    blocks = [Block(a, b, 2 if b > a else 1) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 1000)).eval().requires_grad_(False)


@torch.no_grad()
def model(options: argparse.Namespace) -> None:
    """Time a whole network: all convolutions but the first are pruned, and `export.block_sparse` chooses how each runs."""
    width, size = (16, 32) if options.tiny else (64, 224)
    generator = torch.Generator().manual_seed(0)
    for batch in options.batches:
        torch.manual_seed(0)
        plain, x = resnet18(width), torch.randn(batch, 3, size, size)
        images = {name: x.to(memory_format=layout) for name, layout in FORMATS.items()}
        calls = {
            ("dense", 0.0, name): partial(copy.deepcopy(plain).to(memory_format=layout), images[name]) for name, layout in FORMATS.items()
        }
        chosen = {}
        for (blocks, block), sparsity in itertools.product(BLOCKS.items(), options.sparsities):
            data = bp.collect.weights(plain, where=bp.excluding(bp.convs(block), "0.weight"))
            masks = {name: random_mask(p.grid, sparsity, generator) for name, p in data.items()}
            for name, image in images.items():
                source = bp.apply_masks(copy.deepcopy(plain).to(memory_format=FORMATS[name]), masks)
                choices = export.choose(source, inputs=image, rounds=options.rounds, progress=False)
                calls[blocks, sparsity, name] = partial(export.block_sparse(source, backend=choices), image)
                chosen[blocks, sparsity, name] = sum(choice.backend != "dense" for choice in choices.rows), len(choices.rows)
        seconds = median_seconds(calls, rounds=options.rounds)
        dense = min(seconds["dense", 0.0, name] for name in FORMATS)
        print(f"ResNet-18, {batch} x {size} x {size}: dense {1e3 * dense:.1f} ms")
        for blocks, sparsity in itertools.product(BLOCKS, options.sparsities):
            best = min(FORMATS, key=lambda name: seconds[blocks, sparsity, name])
            key = blocks, sparsity, best
            sparse, count = chosen[key]
            print(
                f"  {blocks:8} {sparsity:.0%}: {1e3 * seconds[key]:8.1f} ms {dense / seconds[key]:6.2f}x, channels {best}, "
                f"{sparse} of {count} layers block-sparse",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "model"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.batches, options.rounds = [1], 1
    print(machine())
    before = torch.get_num_threads()
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"{threads} threads")
        {"layers": layers, "model": model}[options.what](options)
    torch.set_num_threads(before)


if __name__ == "__main__":
    main()
