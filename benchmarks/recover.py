"""What distillation gives back after pruning: perplexity of SmolLM2-135M, embeddings of MiniLM, classes of EfficientNet-Lite0.

python benchmarks/recover.py --model minilm --sparsity 0.5 --tokens 4_000_000
python benchmarks/recover.py --model minilm --tokens 4_000_000 --stages 0.2:0.12 0.35:0.15 0.45:0.15     # pruned little by little
python benchmarks/recover.py --model smollm --sparsity 0 --loss cross-entropy      # the control: the dense model trained alike
python benchmarks/recover.py --model efficientnet --tokens 8_000 --step-tokens 32 --every 800     # "tokens" are crops of photos
python benchmarks/recover.py --draw RUN.json ... --picture curve.png               # curves of finished runs in one picture

A run writes its state to --folder at each evaluation; the same command goes on from there. "before" is the model pruned at once and
repaired, from which a run with --stages does not start. Where a stage starts, the curve of such a run falls: it has two figures for the
same tokens, before and after the pruning. Training texts are Wikipedia articles, for
MiniLM also the news texts that it is calibrated on; EfficientNet-Lite0 sees random crops of photos without labels. Choices (learning rate,
loss) are made by the validation texts or photos; those that are reported decide nothing.
"""

import argparse
import copy
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from quality import METHODS, PATTERNS, SEED
from recover_problems import GCOMPRIS, PROBLEMS, Problem
from timing import machine
from torch import Tensor, nn

import blockprune as bp
from blockprune import losses


def last_hidden_states(student: Any, teacher: Any, batch: Any = None) -> Tensor:
    """Squared error of the hidden states behind the last layer relative to the teacher's own square."""
    return losses.hidden_states(student.hidden_states[-1], teacher.hidden_states[-1], batch)


LOSSES: dict[str, losses.DistillLoss] = {
    "KL": losses.kl,
    "KL + cross-entropy": losses.weighted({losses.kl: 0.67, losses.cross_entropy: 0.33}),
    "KL + hidden states": losses.weighted({losses.kl: 1.0, losses.hidden_states: 1.0}),
    "cross-entropy": losses.cross_entropy,
    "cosine": losses.cosine,
    "cosine + hidden states": losses.weighted({losses.cosine: 1.0, losses.hidden_states: 1.0}),
    "cosine + last hidden states": losses.weighted({losses.cosine: 1.0, last_hidden_states: 1.0}),
}
OPTIMIZERS = {"AdamW": partial(torch.optim.AdamW, fused=True), "Muon": bp.muon}
NOT_OF_THE_RUN = ("folder", "control", "picture", "deploy", "rounds", "draw")  # options that do not change what is trained and judged


def pruned(problem: Problem, options: argparse.Namespace) -> tuple[nn.Module, dict[str, bp.BlockMask], dict[str, Tensor]]:
    """The pruned and repaired model that training starts from; it is kept in a file, because pruning takes minutes."""
    model = problem.task.model
    if not options.sparsity:
        return model, {}, {}
    photos = f", photos {zlib.crc32(bytes(options.photos.resolve()))}" if options.model == "efficientnet" else ""
    path = options.folder / f"start, {options.model}, {options.pattern}, {options.sparsity:g}, {options.method}{photos}.pt"
    if not path.exists():
        model, result = METHODS[options.method](problem.task, PATTERNS[options.pattern], options.sparsity)
        save({"model": model.state_dict(), **packed(result.masks, result.weights)}, path)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])  # clustering gives units another order
    return model, *unpacked(saved)


def packed(masks: bp.Masks, weights: bp.Weights) -> dict[str, Any]:
    """Masks and weights for `torch.save`."""
    return {"masks": {name: (m.keep, m.grid.shape, m.grid.block) for name, m in masks.items()}, "weights": dict(weights)}


def unpacked(saved: Mapping[str, Any]) -> tuple[dict[str, bp.BlockMask], dict[str, Tensor]]:
    masks = {name: bp.BlockMask(keep, bp.BlockGrid(shape, block)) for name, (keep, shape, block) in saved["masks"].items()}
    return masks, saved["weights"]


def pruned_further(
    problem: Problem, options: argparse.Namespace, model: nn.Module, sparsity: float
) -> tuple[dict[str, bp.BlockMask], dict[str, Tensor]]:
    """Masks and repaired weights of a model whose units are in order already.

    Where a layer is at its limit, a pruned block may come back.
    """
    method = METHODS[options.method.removesuffix(" + cluster")]
    result = method(attrs.evolve(problem.task, model=model), PATTERNS[options.pattern], sparsity)[1]
    return dict(result.masks), dict(result.weights)


def stage(text: str) -> tuple[float, float, float | None]:
    """The sparsity, the share of the tokens and the learning rate that ``0.2:0.12:3e-4`` names; ``0.2:0.12`` names no learning rate."""
    sparsity, share, *lr = map(float, text.split(":"))
    return sparsity, share, lr[0] if lr else None


def save(value: Any, path: Path) -> None:
    """Write a file whole or not at all."""
    torch.save(value, f"{path}.part")
    os.replace(f"{path}.part", path)


def title_of(options: argparse.Namespace, unit: str, is_pruned: bool) -> str:
    """What a run prunes and how it trains."""
    start = f"{options.pattern} at {options.sparsity:.0%}, {options.method}" if is_pruned else "dense"
    stages = "".join(f", {share:.0%} of them at {sparsity:.0%}" + (f" with {lr:g}" if lr else "") for sparsity, share, lr in options.stages)
    training = f"{options.loss}, {options.optimizer} {options.lr:g}, {options.tokens:,} {unit}{stages}, {options.step_tokens:,} a step"
    return f"{options.model}, {start}; {training}"


def train(
    problem: Problem,
    options: argparse.Namespace,
    model: nn.Module,
    judged: Callable[[bp.Masks, bp.Weights], nn.Module],
    start: tuple[dict[str, bp.BlockMask], dict[str, Tensor]],
    *,
    record: dict[str, Any],
    path: Path,
) -> None:
    """Prune and train, stage after stage, from where the record is; it is kept in a file.

    ``judged`` gives the model with masks and weights.
    """
    teacher = copy.deepcopy(model).bfloat16() if options.bfloat16 else model  # saves autocast the conversion of each weight
    masks, weights = start
    clock = time.monotonic()

    def keep(state: bp.DistillState) -> None:
        nonlocal clock
        record["seconds"] += time.monotonic() - clock
        record["curve"].append((record["count"] + state.count, record["seconds"], problem.curve(judged(masks, state.weights))))
        print_row(*record["curve"][-1])
        record["state"] = attrs.asdict(state, recurse=False)
        save(record, path)
        clock = time.monotonic()

    stages = [*options.stages, (options.sparsity, 1 - sum(share for _, share, _ in options.stages), None)]
    for number in range(record["stage"], len(stages)):
        sparsity, share, lr = stages[number]
        if record["start"] is None:
            if options.stages:
                before = unpacked(record["result"]) if number else ({}, {})
                masks, repaired = pruned_further(problem, options, bp.finalize(judged(*before)), sparsity)
                weights = {**before[1], **repaired}
                record["curve"].append((record["count"], record["seconds"], problem.curve(judged(masks, weights))))
                print_row(*record["curve"][-1])
            record["start"] = packed(masks, weights)
        masks, weights = unpacked(record["start"])
        steps = max(1, int(share * options.tokens) // options.step_tokens)
        trained = bp.distill(
            model,
            masks,
            weights,
            problem.batches,
            teacher=teacher,
            loss=LOSSES[options.loss],
            optimizer=partial(OPTIMIZERS[options.optimizer], lr=lr or options.lr),
            steps=steps,
            warmup=math.ceil(options.warmup * steps),
            accumulate=options.accumulate,
            held_out=problem.validation,
            every=max(1, options.every // options.step_tokens),
            seed=options.seed + number,
            forward=problem.forward,
            autocast=torch.bfloat16 if options.bfloat16 else None,
            lora_rank=options.lora_rank,
            callback=keep,
            resume=bp.DistillState(**record["state"]) if record["state"] else None,
        )
        record |= {"stage": number + 1, "count": record["curve"][-1][0], "start": None, "state": None, "result": packed(masks, trained)}
        save(record, path)


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(SEED)
    print(machine())
    options.folder.mkdir(parents=True, exist_ok=True)
    problem = PROBLEMS[options.model](options)
    if options.bfloat16 and hasattr(problem.task.model, "set_attn_implementation"):
        problem.task.model.set_attn_implementation("eager")  # the backward of torch's fused attention is slow in bfloat16 on CPUs
    options.loss, options.lr, options.method = options.loss or problem.losses[0], options.lr or problem.lr, options.method or problem.method
    if options.stages and "cluster" in options.method.removesuffix(" + cluster"):
        raise SystemExit(f"--stages needs a method whose units keep their order after the first stage, not {options.method!r}")
    if options.loss not in problem.losses:
        raise SystemExit(f"--loss {options.loss!r} does not suit {options.model}; use one of {problem.losses}")
    model, masks, weights = pruned(problem, options)
    title = title_of(options, problem.unit, bool(masks))
    name = title.replace("; ", ", ").replace(",", "") + f" seed {options.seed}"
    path = options.folder / f"{name}.pt"
    record: dict[str, Any] = {"seconds": 0.0, "curve": [], "figures": {}, "stage": 0, "count": 0, "start": None, "state": None}
    if path.exists():
        record |= torch.load(path, weights_only=True)  # a file may be older than one of these
    chosen = {key: str(value) for key, value in vars(options).items() if key not in NOT_OF_THE_RUN}
    if any(chosen[key] != value for key, value in record.get("options", {}).items()):  # a file may be older than an option
        raise SystemExit(f"{path} is of a run with other options; give another --folder")
    record["options"] = chosen

    def judged(masks: bp.Masks, weights: bp.Weights) -> nn.Module:
        return bp.apply_masks(copy.deepcopy(model), masks, weights)  # a new copy: an earlier one has other weights where these give none

    if not record["figures"]:
        record["figures"] = {"dense": problem.figures(model), "before": problem.figures(judged(masks, weights))}
        record["curve"] = [] if options.stages else [(0, 0.0, problem.curve(judged(masks, weights)))]
    print(f"{title}; warmup {options.warmup:.0%}, cosine; seed {options.seed}; {bp.sparsity(masks):.1%} pruned" if masks else title)
    if problem.data:
        print(problem.data)
    print(f"{problem.unit:>10}{'seconds':>9}  validation {problem.curve_name}")
    for row in record["curve"]:
        print_row(*row)
    train(problem, options, model, judged, (masks, weights), record=record, path=path)
    final = unpacked(record["result"])
    figures = record["figures"] | {"after": problem.figures(judged(*final))}
    finished = {
        "title": title,
        "curve_name": problem.curve_name,
        "curve": record["curve"],
        "figures": figures,
        "unit": problem.unit,
        "machine": machine(),
    }
    (options.folder / f"{name}.json").write_text(json.dumps(finished, indent=1) + "\n")
    print_figures(figures, problem, options, record["curve"][-1])
    if options.picture:
        draw([finished], options.picture)
    if options.deploy:
        assert problem.deploy is not None
        models = {"repaired": (masks, weights), "distilled": final}
        problem.deploy({name: bp.apply_masks(copy.deepcopy(model), *parts) for name, parts in models.items()}, options)


def print_row(tokens: int, seconds: float, figure: float) -> None:
    print(f"{tokens:>10,}{seconds:>9,.0f}  {figure:.4g}", flush=True)


def print_figures(
    figures: dict[str, dict[str, float]], problem: Problem, options: argparse.Namespace, last: tuple[int, float, float]
) -> None:
    """The texts that are reported: dense, before and after training, and the ratio to the better of dense and dense-trained."""
    reference = figures["dense"]
    if options.control:
        figures = {"dense": reference, "dense, trained": json.loads(options.control.read_text())["figures"]["after"], **figures}
        reference = {name: best_of(name)(reference[name], figures["dense, trained"][name]) for name in reference}
    widths = [max(22, len(name)) + 2 for name in reference]
    print("\n" + " " * 16 + "".join(f"{name:>{width}}" for name, width in zip(reference, widths, strict=True)))
    for row, values in figures.items():
        print(f"{row:16}" + "".join(f"{value:>{width}.4f}" for value, width in zip(values.values(), widths, strict=True)))
    ratios = [f"{figures['after'][name] / value:.3f}" if value else "" for name, value in reference.items()]
    print(f"{'after / dense':16}" + "".join(f"{ratio:>{width}}" for ratio, width in zip(ratios, widths, strict=True)))
    changes = ", ".join(
        f"{name} {figures['before'][name]:.3f} -> {figures['after'][name]:.3f} ({reference[name]:.3f})" for name in reference
    )
    what = f"{options.pattern} at {options.sparsity:.0%}" if options.sparsity else "dense"
    trained = f"{last[0]:,} {problem.unit} ({last[1] / 60:.0f} minutes)"
    print(f"In short: {options.model}, {what}, before and after {trained}, beside dense: {changes}.")


def best_of(figure: str) -> Callable[[float, float], float]:
    """The better of two values of a figure."""
    return min if figure.startswith(("perplexity", "KL")) else max


def draw(runs: Sequence[dict[str, Any]], picture: Path) -> None:
    """The validation figure of each run against the tokens that it was trained on."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 (an extra)

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for run in runs:
        tokens, _, values = zip(*run["curve"], strict=True)
        axes.plot(tokens, values, marker=".", label=run["title"])
    axes.set(xlabel=f"{runs[0].get('unit', 'tokens')} trained on", ylabel=f"{runs[0]['curve_name']}, validation texts or photos")
    axes.set_yscale("log" if runs[0]["curve_name"].startswith(("perplexity", "KL")) else "linear")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")  # of a logarithmic axis
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PROBLEMS, default="minilm")
    parser.add_argument("--pattern", choices=PATTERNS, default="16x16")
    parser.add_argument("--sparsity", type=float, default=0.5, help="0: the dense model is trained, the control")
    parser.add_argument(
        "--method", choices=METHODS, help="what training starts from; by default OBS + budget + cluster, images without cluster"
    )
    parser.add_argument("--loss", choices=LOSSES, help="by default KL, or cosine + hidden states")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="AdamW")
    parser.add_argument(
        "--texts", type=Path, nargs="+", default=[], help="MiniLM: trained on, too: files or folders of .txt, .html, .txt.gz"
    )
    parser.add_argument("--repeats", type=int, default=1, help="how often a pass has the articles and the news beside --texts")
    parser.add_argument(
        "--tokens", type=int, default=1_000_000, help="that are trained on; crops of photos for efficientnet, here and below"
    )
    parser.add_argument(
        "--stages",
        type=stage,
        nargs="+",
        default=[],
        metavar="SPARSITY:SHARE[:LR]",
        help="prune to these sparsities first, each trained on a share, by default with --lr",
    )
    parser.add_argument("--step-tokens", type=int, default=2048, help="tokens of an optimizer step")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of an optimizer step")
    parser.add_argument("--lr", type=float, help="by default 5e-4, images 1e-5")
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--bfloat16", action="store_true", help="autocast")
    parser.add_argument("--every", type=int, default=100_000, help="tokens between evaluations")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--held-out", type=int, default=40, help="reported windows of 512 tokens (SmolLM2) or fives of paragraphs (MiniLM)")
    parser.add_argument("--photos", type=Path, default=GCOMPRIS, help="folder of the photos for efficientnet")
    parser.add_argument("--folder", type=Path, default=Path(".cache/recover"), help="of the files from which runs go on")
    parser.add_argument("--control", type=Path, help="the .json of the dense model's run, to compare with the better of it and dense")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--deploy", type=Path, help="export MiniLM or EfficientNet, time it beside dense ones, and draw this picture")
    parser.add_argument("--rounds", type=int, default=9, help="of --deploy, of which the median counts")
    parser.add_argument("--draw", type=Path, nargs="+", help="only draw these runs (.json) into --picture")
    options = parser.parse_args()
    if options.deploy and (options.model not in ("minilm", "efficientnet") or options.pattern != "16x16" or not options.sparsity):
        parser.error("--deploy is for --model minilm and efficientnet in 16x16 blocks")
    sparsities, shares = [0.0, *(stage[0] for stage in options.stages), options.sparsity], [stage[1] for stage in options.stages]
    if options.stages and (sparsities != sorted(set(sparsities)) or min(shares) <= 0 or sum(shares) >= 1):
        parser.error("--stages: sparsities must rise from above 0 to below --sparsity; shares must be above 0, and their sum below 1")
    if options.draw and not options.picture:
        parser.error("--draw needs --picture, the file to draw into")
    if options.draw:
        draw([json.loads(path.read_text()) for path in options.draw], options.picture)
    else:
        main(options)
