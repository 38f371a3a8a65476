"""How the time of each operation grows with the size of a model: 3,000 small Linears against 300, and `sequential` over 2 to 128 layers.

python benchmarks/growth.py                     # about three minutes
python benchmarks/growth.py --only apply_masks  # the operations whose name contains this text
python benchmarks/growth.py --tiny              # seconds, for the test command

An operation that is linear in the number of modules has a ratio of 10; one above 12 is marked as superlinear. torch's own
`load_state_dict` is: it compares all keys with the prefix of each child.
"""

import argparse
import copy
import gc
import io
import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import torch
from timing import machine
from torch import nn

import blockprune as bp

WIDTH, LINEARS_OF_LAYER = 8, 10
LIMIT = 1.2  # the most by which a ratio may exceed that of the sizes
WHERE = bp.linears((2, 2))
PRUNE = bp.Pipeline(partial(bp.collect.weights, where=WHERE), bp.metric.l1, bp.allocate.per_layer)


def plain_model(linears: int) -> nn.Sequential:
    """Layers of ten small Linears each, as in a transformer, with weights near the identity, so that gradients do not vanish."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LINEARS_OF_LAYER))) for _ in range(linears // 10)))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.001).data.diagonal().add_(1)
    return model.eval()


class Prepared:
    """A model of so many Linears, plain and masked, and what belongs to it; each is made when it is first read."""

    def __init__(self, linears: int, folder: Path) -> None:
        self.linears, self.path = linears, folder / "file"

    @cached_property
    def plain(self) -> nn.Sequential:
        return plain_model(self.linears)

    @cached_property
    def masks(self) -> bp.Masks:
        return PRUNE(self.plain, 0.5)

    @cached_property
    def masked(self) -> nn.Module:
        return bp.apply_masks(plain_model(self.linears), self.masks)

    @cached_property
    def result(self) -> bp.PruningResult:
        return bp.PruningResult(self.masks, {name: p.detach() for name, p in self.plain.named_parameters()})

    def exported(self) -> nn.Module:
        return bp.export.block_sparse(self.masked, backend="torch")

    def collecting(self, *statistics: bp.statistics.Statistic) -> Callable[[], object]:
        calibration = bp.Calibration([torch.ones(2, WIDTH)], loss=lambda output, batch: output.sum(), progress=False)
        return partial(bp.collect.with_statistics, self.plain, where=WHERE, statistics=statistics, calibration=calibration)

    def saved(self, save: Callable[..., None], value: object) -> Path:
        save(value, self.path)
        return self.path


OPERATIONS: dict[str, Callable[[Prepared], Callable[[], object]]] = {  # what is called before, and what is timed
    "load_state_dict, plain (torch)": lambda p: partial(p.plain.load_state_dict, p.plain.state_dict()),
    "load_state_dict, masked": lambda p: partial(p.masked.load_state_dict, p.masked.state_dict()),
    "load_state_dict, masked, of a plain model": lambda p: partial(p.masked.load_state_dict, p.plain.state_dict()),
    "load_masked": lambda p: partial(bp.load_masked, p.plain, p.masked.state_dict()),
    "deepcopy, plain (torch)": lambda p: partial(copy.deepcopy, p.plain),
    "deepcopy, masked": lambda p: partial(copy.deepcopy, p.masked),
    "repr of a masked model": lambda p: partial(repr, p.masked),
    "torch.save of a masked model's state": lambda p: lambda: torch.save(p.masked.state_dict(), io.BytesIO()),
    "pipeline": lambda p: partial(PRUNE, p.plain, 0.5),
    "pipeline, mapping of names": lambda p: partial(PRUNE, p.plain, dict.fromkeys(p.masks, 0.5)),
    "pipeline, mapping of half the names": lambda p: partial(PRUNE, p.plain, {**dict.fromkeys([*p.masks][::2], 0.5), "*": 0.25}),
    "pipeline, mapping of patterns": lambda p: partial(PRUNE, p.plain, {"0.*": 0.25, "*": 0.5}),
    "allocate.per_model": lambda p: partial(bp.allocate.per_model, PRUNE.scores(p.plain), 0.5),
    "allocate.per_layer, coupled pairs": lambda p: partial(
        bp.allocate.per_layer, PRUNE.scores(p.plain), 0.5, coupled=list(zip([*p.masks][::2], [*p.masks][1::2], strict=True))
    ),
    "budgets.erk": lambda p: partial(bp.budgets.erk, PRUNE.scores(p.plain), 0.5),
    "apply_masks": lambda p: partial(bp.apply_masks, p.plain, p.masks),
    "apply_masks with weights": lambda p: partial(bp.apply_masks, p.plain, p.masks, p.result.weights),
    "apply_masks again": lambda p: partial(bp.apply_masks, p.masked, p.masks),
    "apply_masks(model, {})": lambda p: partial(bp.apply_masks, p.masked, {}),
    "read_masks": lambda p: partial(bp.read_masks, p.masked),
    "masked_parameters": lambda p: partial(bp.masked_parameters, p.plain, p.masks),
    "masks_from_zeros": lambda p: partial(bp.masks_from_zeros, p.plain, where=WHERE),
    "sparsity": lambda p: partial(bp.sparsity, p.masks),
    "str(summary)": lambda p: lambda: str(bp.summary(p.masks)),
    "finalize": lambda p: partial(bp.finalize, p.masked),
    "save_masks": lambda p: partial(bp.save_masks, p.masks, p.path),
    "load_masks": lambda p: partial(bp.load_masks, p.saved(bp.save_masks, p.masks)),
    "save_repair": lambda p: partial(bp.save_repair, p.result, p.path),
    "load_repair": lambda p: partial(bp.load_repair, p.saved(bp.save_repair, p.result)),
    "union": lambda p: partial(bp.union, p.masks, p.masks),
    "collect.weights": lambda p: partial(bp.collect.weights, p.plain, where=WHERE),
    "collect.with_statistics, inputs": lambda p: p.collecting(bp.statistics.input_sq, bp.statistics.input_gram),
    "collect.with_statistics, output gradients": lambda p: p.collecting(bp.statistics.output_grad_gram),
    "collect.with_statistics, gates": lambda p: p.collecting(bp.statistics.gate_grad),
    "export.choose": lambda p: partial(bp.export.choose, p.masked, rows=4, rounds=1, progress=False),
    "export.block_sparse": lambda p: p.exported,
    "export.load_state_dict": lambda p: partial(bp.export.load_state_dict, p.plain, p.exported().state_dict()),
    "export.dense": lambda p: partial(bp.export.dense, p.exported()),
}


def cpu_seconds(call: Callable[[], object]) -> float:
    """The time of this process alone, without garbage collection, which depends on what else is in memory (as `timeit` does)."""
    gc.disable()
    try:
        start = time.process_time()
        call()
        return time.process_time() - start
    finally:
        gc.enable()


def compare_operations(sizes: tuple[int, int], only: str) -> None:
    """Print the seconds at both sizes and their ratio, one operation a line."""
    print(f"\n{'operation':<44}{f'{sizes[0]:,} Linears':>16}{f'{sizes[1]:,} Linears':>16}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, prepare in OPERATIONS.items():
            if only in name:
                prepare(Prepared(min(20, sizes[0]), Path(folder)))()  # imports
                times = [min(cpu_seconds(prepare(Prepared(size, Path(folder)))) for _ in range(2)) for size in sizes]
                ratio = times[1] / times[0]
                mark = "  superlinear" if ratio > LIMIT * sizes[1] / sizes[0] else ""
                print(f"{name:<44}{times[0]:>14.4f} s{times[1]:>14.4f} s{ratio:>8.1f}{mark}", flush=True)


def sequential_seconds(layers: int) -> float:
    """Seconds a layer of `sequential` over so many layers of two Linears."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(layers)))
    pipeline = bp.Pipeline(partial(bp.collect.with_statistics, where=WHERE), bp.metric.obs, bp.allocate.per_row)
    repair, batches = partial(bp.reconstruct.least_squares, damping=0.4), [torch.randn(16, WIDTH) for _ in range(4)]
    return min(cpu_seconds(partial(bp.sequential, model, pipeline, repair, batches, 0.5, progress=False)) for _ in range(2)) / layers


def compare_depths(depths: tuple[int, ...]) -> None:
    """Print what a layer of `sequential` costs in models of several depths."""
    print(f"\n{'sequential':<44}{'milliseconds a layer':>32}{'ratio':>8}")
    sequential_seconds(2)  # imports
    first = sequential_seconds(depths[0])
    for layers in depths:
        per_layer = sequential_seconds(layers)
        mark = "  superlinear" if per_layer > LIMIT * first else ""
        print(f"{f'{layers} layers':<44}{1e3 * per_layer:>32.1f}{per_layer / first:>8.2f}{mark}", flush=True)


def main(sizes: tuple[int, int], depths: tuple[int, ...], only: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print(machine())
    compare_operations(sizes, only)
    if only in "sequential":
        compare_depths(depths)
    torch.set_num_threads(threads)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="10 and 20 Linears, 2 and 4 layers")
    parser.add_argument("--only", default="", help="only the operations whose name contains this text")
    options = parser.parse_args()
    if options.tiny:
        main((10, 20), (2, 4), options.only)
    else:
        main((300, 3000), (2, 16, 64, 128), options.only)
