"""What does a user gain without training: quality against milliseconds of a pruned MiniLM, beside dense float32, bfloat16 and int8?

python benchmarks/front_page.py                      # about ten minutes; saves front_page.png
python benchmarks/front_page.py --tiny               # seconds, one layer and one sparsity, for the test command
"""

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timing import machine
from torch import nn

import blockprune as bp
from blockprune import export
from blockprune.analysis.pictures import quality_against_latency
from blockprune.core.precision import multiplies_bfloat16
from blockprune.examples import minilm
from blockprune.export import dynamic_int8, rowwise_int8

PICTURE = Path("front_page.png")
WHERE = bp.including(bp.linears((16, 16)), "encoder.*")


def main(sparsities: list[float], layers: int | None, texts: int, rounds: int, picture: Path, *, judged: int = 50, timed: int = 8) -> None:
    print(machine())
    dense, tokenizer = minilm.load(layers)
    repair = bp.recipes.obs(WHERE, minilm.calibration(dense, tokenizer, texts))
    results = {f"{sparsity:.0%} pruned": repair(dense, sparsity) for sparsity in sparsities}
    pruned = {name: bp.apply_masks(copy.deepcopy(dense), result.masks, result.weights) for name, result in results.items()}
    speeds, quality = compared(dense, tokenizer, pruned, rounds, judged=judged, timed=timed)
    draw(speeds, quality, {"pruned": {f"{sparsity:.0%}": f"{sparsity:.0%} pruned" for sparsity in sparsities}}, picture)
    best = max(speeds.rows, key=lambda row: row.speedup)
    print(f"In short: {verdict(speeds, quality, sparsities)} The fastest model of all is {best.name}, {best.milliseconds:.0f} ms.")


def compared(
    dense: nn.Module, tokenizer: Any, masked: Mapping[str, nn.Module], rounds: int, *, judged: int = 50, timed: int = 8
) -> tuple[export.SpeedComparison, dict[str, float]]:
    """Time masked models, exported in each type, beside dense ones with one thread; and the cosine of each with the dense embeddings.

    Args:
        dense, tokenizer: MiniLM.
        masked: the masked models by name.
        rounds: of measurement.
        judged: how many texts are embedded for the cosine.
        timed: how many texts a timed call has.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batches = [minilm.tokens(tokenizer, minilm.documents()[i : i + 10]) for i in range(0, judged, 10)]
    with torch.no_grad():
        embeddings = torch.cat([minilm.embed(dense, batch) for batch in batches])
    inputs = minilm.tokens(tokenizer, minilm.background()[:timed], longest=128)
    quality = {"dense": 1.0, "dense int8": minilm.mean_cosine(dynamic_int8(dense), batches, embeddings)}
    quality["dense int8, row by row"] = minilm.mean_cosine(rowwise_int8(dense), batches, embeddings)
    dtypes = ["float32", "int8"]
    if multiplies_bfloat16():  # without instructions for it, bfloat16 is slower than float32
        dtypes.append("bfloat16")
        quality["dense bfloat16"] = minilm.mean_cosine(copy.deepcopy(dense).bfloat16(), batches, embeddings)
    models = {}
    for title, model in masked.items():
        for dtype in dtypes:
            name = f"{title}, {dtype}"
            cast = copy.deepcopy(model).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
            asked: Any = {"dtype": "int8"} if dtype == "int8" else {}
            models[name] = export.block_sparse(cast, inputs=inputs, forward=minilm.embed, **asked)
            quality[name] = minilm.mean_cosine(models[name], batches, embeddings)
            linears, dense_linears = (sum(isinstance(m, nn.Linear) for m in model.modules()) for model in (dense, models[name]))
            print(f"{name}: {dense_linears} of {linears} Linears stay dense", flush=True)
    options: dict[str, Any] = {"inputs": inputs, "forward": minilm.embed, "dtypes": dtypes, "rounds": rounds}
    speeds = export.benchmark(dense, *models.values(), names=list(models), **options)
    torch.set_num_threads(threads)
    print(f"\nOne thread, {'x'.join(map(str, inputs['input_ids'].shape))} tokens a call; 16x16 blocks\n{speeds}\n")
    print(f"cosine of the embeddings with those of the dense model ({judged} news texts that were not calibrated on):")
    for name, value in quality.items():
        print(f"  {name:26}{value:.3f}")
    return speeds, quality


def milliseconds(speeds: export.SpeedComparison, start: str) -> float:
    """Of the fastest form of a model: as it is or packed by oneDNN."""
    return min(row.milliseconds for row in speeds.rows if row.name.removesuffix(", oneDNN packed") == start)


def draw(
    speeds: export.SpeedComparison,
    quality: Mapping[str, float],
    series: Mapping[str, Mapping[str, str]],
    picture: Path,
    title: str = "MiniLM in 16x16 blocks, repaired without training",
) -> None:
    """Quality against milliseconds.

    Args:
        speeds, quality: as `compared` returns them.
        series: for each line of the picture, the label of each point and the name of its masked model.
        picture: the file.
        title: of the picture.
    """
    labels = {"dense": "float32", "dense bfloat16": "bfloat16", "dense int8": "int8 of torch", "dense int8, row by row": "int8"}
    measured = {row.name for row in speeds.rows}
    points = {label: (milliseconds(speeds, name), quality[name]) for name, label in labels.items() if name in measured}
    pruned = {
        f"{line}, {dtype}": {
            label: (milliseconds(speeds, f"{start}, {dtype}"), quality[f"{start}, {dtype}"]) for label, start in models.items()
        }
        for line, models in series.items()
        for dtype in ("float32", "int8", "bfloat16")
        if f"{next(iter(models.values()))}, {dtype}" in measured
    }
    axes = quality_against_latency(
        points,
        pruned,
        latency="milliseconds a call (8 texts of 128 tokens, one thread)",
        quality="cosine with the dense embeddings",
        title=title,
    )
    axes.figure.savefig(picture, dpi=150)


def verdict(speeds: export.SpeedComparison, quality: dict[str, float], sparsities: list[float]) -> str:
    """What pruning gains, with figures from this run."""
    sentences = []
    for sparsity in sparsities:
        names = [f"{sparsity:.0%} pruned, {dtype}" for dtype in ("float32", "int8")]
        gains = [f"{milliseconds(speeds, 'dense') / milliseconds(speeds, name):.2f}" for name in names]
        sentences.append(
            f"{sparsity:.0%} pruned: {gains[0]} times as fast as the fastest dense float32, {gains[1]} times in int8, "
            f"cosine {quality[names[0]]:.3f} and {quality[names[1]]:.3f}."
        )
    return " ".join(sentences)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument(
        "--rounds", type=int, default=9, help="of measurement, of which the median counts; more on a machine whose speed varies"
    )
    options = parser.parse_args()
    if options.tiny:
        main([0.5], layers=1, texts=8, rounds=1, picture=options.picture, judged=10, timed=1)
    else:
        main([0.25, 0.5, 0.75], layers=None, texts=128, rounds=options.rounds, picture=options.picture)
