"""A first look: train a small network, prune it in blocks with several pipelines, and compare the accuracy that each of them keeps.

python benchmarks/demo.py [--quick] [--out demo.png]
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import blockprune as bp
from blockprune import allocate, metric, schedule
from blockprune.examples import digits

BLOCKS = ((2, 2), (4, 4), (8, 8), (1, 8))
COLUMNS = (0.25, 0.5, 0.75, 0.9)
SPARSITIES = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)  # the picture shows all, the table COLUMNS
STYLES = {  # colour (Okabe and Ito's, which colour-blind readers can tell apart) and marker of a line
    "l1 per_layer": ("#0072B2", "o"),
    "l1 per_model": ("#D55E00", "s"),
    "l2 per_row": ("#009E73", "^"),
    "lamp per_model": ("#CC79A7", "D"),
    "random per_layer": ("#555555", "x"),
}


def pipelines(block: Sequence[int], *, seed: int) -> Mapping[str, bp.Pipeline]:
    pipeline = partial(bp.Pipeline, partial(bp.collect.weights, where=bp.linears(block)))
    return {
        "l1 per_layer": pipeline(metric.l1, allocate.per_layer),
        "l1 per_model": pipeline(metric.l1, allocate.per_model),
        "l2 per_row": pipeline(metric.l2, allocate.per_row),
        "lamp per_model": pipeline(metric.lamp, allocate.per_model),
        "random per_layer": pipeline(partial(metric.random, generator=seed), allocate.per_layer),  # the baseline to beat
    }


Batches = Sequence[tuple[Tensor, Tensor]]
Schedule = Callable[[int], float]  # step -> sparsity
Curves = Mapping[tuple[int, ...], Mapping[str, Mapping[float, float]]]  # block -> pipeline -> sparsity -> mean accuracy


def measure(models: Sequence[nn.Module], blocks: Sequence[tuple[int, ...]], callback: Callable[[], object]) -> Curves:
    """Mean accuracy over the models, each pruned in one shot; the models stay dense. ``callback`` is called after each curve."""

    def curve(model: nn.Module, prune: bp.Pipeline) -> list[float]:
        scores = prune.scores(model)  # once, for all sparsities
        masks = (prune.allocate(scores, sparsity) for sparsity in SPARSITIES)
        return [digits.accuracy(model, bp.masked_parameters(model, m)) for m in masks]

    curves: dict[tuple[int, ...], dict[str, dict[float, float]]] = {}
    for block in blocks:
        for name in STYLES:
            accuracies = [curve(model, pipelines(block, seed=seed)[name]) for seed, model in enumerate(models)]
            means = map(statistics.mean, zip(*accuracies, strict=True))
            curves.setdefault(block, {})[name] = dict(zip(SPARSITIES, means, strict=True))
            callback()
    return curves


def largest_deviation(model: nn.Module, blocks: Sequence[tuple[int, ...]]) -> tuple[float, str]:
    """The largest difference between the sparsity that is asked for and the one that a pipeline of the table reaches, and its name."""
    named = [(name, prune) for block in blocks for name, prune in pipelines(block, seed=0).items()]
    return max((abs(bp.sparsity(prune(model, sparsity)) - sparsity), name) for name, prune in named for sparsity in COLUMNS)


def table(curves: Curves) -> str:
    """One line for each block and pipeline; * marks the best pipeline for a block and a sparsity."""
    lines = ["block  pipeline          " + " ".join(f"{sparsity:8.0%}" for sparsity in COLUMNS)]
    for block, named in curves.items():
        best = {sparsity: max(curve[sparsity] for curve in named.values()) for sparsity in COLUMNS}
        for name, curve in named.items():
            cells = (f"{curve[s]:8.3f}{'*' if curve[s] == best[s] else ' '}" for s in COLUMNS)
            lines.append(f"{'x'.join(map(str, block)):5}  {name:18}{''.join(cells)}".rstrip())
    return "\n".join(lines)


def tutorial_masks() -> str:
    """The masks of NNI's tutorial: 2x2 blocks of Linear(4, 8) and Linear(8, 4) at 50 %."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    masks = pipelines((2, 2), seed=0)["l1 per_layer"](model, 0.5)
    drawn = [["".join(".#"[kept] * 2 for kept in row) for row in bp.expand(m.keep, m.grid).tolist()] for m in masks.values()]
    first, second = drawn
    second += [""] * (len(first) - len(second))
    return "\n".join(f"    {left:8}      {right}".rstrip() for left, right in zip(first, second, strict=True))


def train_pruned(dense: nn.Module, prune: bp.Pipeline, batches: Batches, *, target: Schedule) -> nn.Module:
    """A plain model, pruned while it trains: a usual training loop with one more line, `apply_masks`."""
    model = copy.deepcopy(dense)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step, (images, labels) in enumerate(batches):
        if step % 10 == 0:
            bp.apply_masks(model, prune(model, target(step)))
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return bp.finalize(model)


def zero_share(model: nn.Module) -> float:
    """The fraction of the weights that are zero."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def picture(curves: Curves, mask: bp.BlockMask, *, dense: float, title: str, mask_title: str) -> Figure:
    figure = Figure(figsize=(10.5, 4.8), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, width_ratios=[2.6, 1])
    left.axhline(dense, color="0.6", lw=1, ls="--")
    left.annotate("dense", (0.95, dense), xytext=(0, 4), textcoords="offset points", color="0.4", ha="right")
    for name, (colour, marker) in STYLES.items():
        curve = curves[2, 2][name]
        left.plot(list(curve), list(curve.values()), color=colour, marker=marker, ms=5, lw=1.8, label=name)
    left.set(title=title, xlabel="sparsity (weights removed)", ylabel="test accuracy", xlim=(-0.01, 0.96), ylim=(0, 1.05))
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    left.grid(alpha=0.25)
    left.legend(loc="lower left", frameon=False)
    left.spines[["top", "right"]].set_visible(False)
    right.imshow(bp.expand(mask.keep, mask.grid).numpy(), cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest", aspect="equal")
    right.set(title=mask_title, xlabel="input pixel", ylabel="hidden unit", xticks=range(0, 65, 16), yticks=range(0, 129, 32))
    return figure


def train_all(
    networks: int, blocks: Sequence[tuple[int, ...]], epochs: int
) -> tuple[list[nn.Module], Curves, list[nn.Module], list[nn.Module]]:
    """Dense models, the accuracies of their pruned versions, and the models pruned while they train: gradually and at once."""
    with tqdm(total=2 * networks + len(blocks) * len(STYLES), desc="train", leave=False) as bar:
        models: list[nn.Module] = []
        for seed in range(networks):
            models.append(digits.trained(seed=seed))
            bar.update()
        before = [[w.tolist() for w in model.parameters()] for model in models]
        bar.set_description("prune")
        curves = measure(models, blocks, bar.update)
        bar.set_description("prune while training")
        prune = pipelines((2, 2), seed=0)["l1 per_layer"]
        batches = list(digits.batches(epochs=epochs, seed=0))
        gradually, at_once = [], []
        for model in models:
            gradually.append(train_pruned(model, prune, batches, target=partial(schedule.cubic, final=0.9, end=len(batches) // 2)))
            at_once.append(train_pruned(model, prune, batches, target=partial(schedule.constant, value=0.9)))
            bar.update()
    assert before == [[w.tolist() for w in model.parameters()] for model in models], "pruning must not change the dense models"
    return models, curves, gradually, at_once


def mean_accuracy(models: Sequence[nn.Module]) -> float:
    return statistics.mean(map(digits.accuracy, models))


def print_saved_size(model: nn.Module, masks: bp.Masks) -> None:
    """Save the masks, load them again, and compare the size of the file with that of the dense parameters."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "masks.safetensors")
        bp.save_masks(masks, path)
        assert bp.load_masks(path) == masks
        dense_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        print(f"Masks saved and loaded again, equal: {path.stat().st_size:,} bytes (the dense parameters: {dense_bytes:,})")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--quick", action="store_true", help="one network and two block shapes, for the tests")
    options.add_argument("--out", type=Path, default=Path("demo.png"), help="the file for the picture")
    args = options.parse_args()
    torch.set_num_threads(1)  # tensors this small are no faster on two, and far slower when another process needs a core
    networks, blocks, epochs = (1, BLOCKS[:2], 5) if args.quick else (5, BLOCKS, 20)
    models, curves, gradually, at_once = train_all(networks, blocks, epochs)
    dense = mean_accuracy(models)
    prune = pipelines((2, 2), seed=0)["l1 per_layer"]

    print(f"A pipeline is a value:\n    {prune}")
    print("\nIts masks for Linear(4, 8) and Linear(8, 4) at 50 % (# kept, . pruned):")
    print(tutorial_masks())
    count = "one network" if networks == 1 else f"mean of {networks} networks"
    print(f"\nTest accuracy on digits against sparsity: MLP 64-128-128-10, one shot, no retraining, {count}; dense {dense:.3f}")
    deviation, name = largest_deviation(models[0], blocks)
    print(f"(* best of its block shape; only whole blocks are pruned, so {name} deviates by up to {100 * deviation:.1f} points)\n")
    print(table(curves))
    print(
        f"\nTrained on, l1 per_layer in 2x2 blocks to 90 %, then finalized: {mean_accuracy(gradually):.3f} pruned gradually, "
        f"{mean_accuracy(at_once):.3f} pruned at once\n(without training {curves[2, 2]['l1 per_layer'][0.9]:.3f}); "
        f"{min(map(zero_share, gradually)):.1%} of the weights are zero."
    )
    print_saved_size(models[0], prune(models[0], 0.9))

    name = "0.weight"
    figure = picture(
        curves,
        prune(models[0], 0.75)[name],
        dense=dense,
        title=f"Digits, 2x2 blocks, no retraining ({count})",
        mask_title=f"mask of {name} at 75 %\n(l1 per_layer; blue = kept)",
    )
    figure.savefig(args.out)
    print(f"Picture: {args.out}\n")
    print("Next: notebooks/01_your_own_pruner.ipynb                            your own metric in five lines")
    print('      bp.apply_masks(model, prune(model, {"head.*": 0.2, "*": 0.8}))    your own model, a sparsity for each layer')
    print('      bp.excluding(bp.linears((16, 16)), "head.*"), bp.convs((1,))      other blocks: big tiles, whole filters')


if __name__ == "__main__":
    main()
