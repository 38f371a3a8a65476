"""How much a mask costs while it is on: a masked Linear against the same dense one, in the forward pass and in a training step.

python benchmarks/masked_forward.py           # Linear(2048, 2048)
python benchmarks/masked_forward.py --tiny    # seconds, for the test command
"""

import argparse
import copy
from functools import partial

import torch
from timing import machine, median_seconds
from torch import nn

import blockprune as bp

BLOCKS = [(4, 4), (16, 16), (32, 32), (1, -1)]


def forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(x)


def training_step(layer: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    layer(x).square().mean().backward()
    optimizer.step()


def compare(width: int, batch: int, block: tuple[int, int], rounds: int) -> None:
    """Print one line of the table."""
    torch.manual_seed(0)
    dense, x = nn.Linear(width, width), torch.randn(batch, width)
    masks = bp.recipes.magnitude(bp.linears(block))(dense, 0.5).masks
    layers = {"dense": dense, "masked": bp.apply_masks(copy.deepcopy(dense), masks)}
    forwards = median_seconds({name: partial(forward, layer, x) for name, layer in layers.items()}, rounds=rounds)
    optimizers = {name: torch.optim.SGD(layer.parameters(), lr=1e-3) for name, layer in layers.items()}
    steps = median_seconds(
        {name: partial(training_step, layer, x, optimizers[name]) for name, layer in layers.items()},
        rounds=rounds,
    )
    print(
        f"{torch.get_num_threads():>8}{batch:>7}{block!s:>10}"
        f"{1e3 * forwards['dense']:>10.2f}{forwards['masked'] / forwards['dense']:>9.2f}"
        f"{1e3 * steps['dense']:>15.2f}{steps['masked'] / steps['dense']:>7.2f}",
        flush=True,
    )


def main(width: int, batches: tuple[int, ...], rounds: int) -> None:
    print(machine())
    print(f"\nA masked Linear({width}, {width}), float32, 50 %, as a multiple of the dense one")
    print(f"{'threads':>8}{'batch':>7}{'block':>10}{'dense ms':>10}{'forward':>9}{'dense step ms':>15}{'step':>7}")
    all_threads = torch.get_num_threads()
    for threads in sorted({1, all_threads}):
        torch.set_num_threads(threads)
        for batch in batches:
            for block in BLOCKS:
                compare(width, batch, block, rounds)
    torch.set_num_threads(all_threads)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="Linear(256, 256), 3 rounds")
    tiny = parser.parse_args().tiny
    main(256 if tiny else 2048, (16,) if tiny else (128, 2048), 3 if tiny else 15)
