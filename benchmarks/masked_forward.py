"""What a mask costs while it is on: a masked Linear against the same dense one, forward and in a training step.

python benchmarks/masked_forward.py           # Linear(2048, 2048)
python benchmarks/masked_forward.py --tiny    # seconds, for the test command
"""

import argparse
import copy
from functools import partial

import torch
from timing import machine, medians
from torch import nn

import blockprune as bp

BLOCKS = [(4, 4), (16, 16), (32, 32), (1, -1)]


def forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(x)


def step(layer: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    layer(x).square().mean().backward()
    optimizer.step()


def main(width: int, batches: tuple[int, ...], rounds: int) -> None:
    print(machine())
    print(f"\nA masked Linear({width}, {width}), float32, 50 %, as a multiple of the dense one")
    print(f"{'threads':>8}{'batch':>7}{'block':>10}{'dense ms':>10}{'forward':>9}{'dense step ms':>15}{'step':>7}")
    every = torch.get_num_threads()
    for threads in sorted({1, every}):
        torch.set_num_threads(threads)
        for batch in batches:
            for block in BLOCKS:
                torch.manual_seed(0)
                dense, x = nn.Linear(width, width), torch.randn(batch, width)
                prune = bp.Pipeline(partial(bp.collect.weights, where=bp.linears(block)), bp.metric.l1, bp.allocate.per_layer)
                masked = bp.apply_masks(copy.deepcopy(dense), prune(dense, 0.5))
                seen = medians({"dense": partial(forward, dense, x), "masked": partial(forward, masked, x)}, rounds=rounds)
                steps = {
                    name: partial(step, layer, x, torch.optim.SGD(layer.parameters(), lr=1e-3))
                    for name, layer in (("dense", dense), ("masked", masked))
                }
                train = medians(steps, rounds=rounds)
                print(
                    f"{threads:>8}{batch:>7}{block!s:>10}{1e3 * seen['dense']:>10.2f}{seen['masked'] / seen['dense']:>9.2f}"
                    f"{1e3 * train['dense']:>15.2f}{train['masked'] / train['dense']:>7.2f}",
                    flush=True,
                )
    torch.set_num_threads(every)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="Linear(256, 256), 3 rounds")
    tiny = parser.parse_args().tiny
    main(256 if tiny else 2048, (16,) if tiny else (128, 2048), 3 if tiny else 15)
