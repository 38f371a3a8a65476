"""What distillation gives back after pruning: perplexity of SmolLM2-135M and embeddings of MiniLM, against tokens trained on.

python benchmarks/recover.py --model minilm --sparsity 0.5 --tokens 4_000_000
python benchmarks/recover.py --model smollm --sparsity 0 --loss cross-entropy      # the control: the dense model trained alike
python benchmarks/recover.py --draw RUN.json ... --picture curve.png               # curves of finished runs in one picture

A run writes its state to --folder at each evaluation; the same command goes on from there. Training texts are Wikipedia articles, for
MiniLM also the news texts that it is calibrated on. Choices (learning rate, loss) are made by the validation texts; the articles and the
news texts that are reported decide nothing.
"""

import argparse
import copy
import gzip
import html
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import front_page
import tiny
import torch
from quality import METHODS, PATTERNS, SEED, Task, minilm_task, next_token_loss, smollm_task, tiny_task
from timing import machine
from torch import Tensor, nn

import blockprune as bp
from blockprune import losses
from blockprune.examples import minilm, smollm


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
REPORTED, VALIDATION = 30, 4  # articles: the last ones are reported, those before them are for choices, all others are trained on
NEWS_VALIDATION, NEWS_REPEATS = 20, 3  # of the news texts of MiniLM: how many are for choices, and how often a pass has the others


class Spans:
    """Batches of random spans of a text, all of one length in a batch; one pass takes as many tokens as the text has."""

    def __init__(self, ids: Tensor, per_batch: int, lengths: tuple[int, int], as_batch: Callable[[Tensor], Any] = lambda x: x) -> None:
        self.ids, self.per_batch, self.lengths, self.as_batch = ids, per_batch, lengths, as_batch

    def __len__(self) -> int:
        return max(1, len(self.ids) // self.per_batch)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self)):
            length = int(torch.randint(self.lengths[0], self.lengths[1] + 1, ()))
            starts = torch.randint(len(self.ids) - length + 1, (max(1, self.per_batch // length), 1))
            yield self.as_batch(self.ids[starts + torch.arange(length)])


@attrs.frozen(eq=False)
class Problem:
    """A model and how it is pruned, trained, and judged."""

    task: Task
    batches: Spans
    validation: Sequence[Any]
    forward: Callable[[Any, Any], Any]
    losses: tuple[str, ...]  # that suit the model, the default first
    curve: Callable[[nn.Module], float]  # a figure of the validation texts
    curve_name: str
    figures: Callable[[nn.Module], dict[str, float]]  # of the texts that are reported
    lower_is_better: bool


def smollm_problem(options: argparse.Namespace) -> Problem:
    task = smollm_task(16, options.held_out, 24, options.device)
    tokenizer, texts = smollm.load()[1], smollm.articles()
    training, validation = texts[: -REPORTED - VALIDATION], texts[-REPORTED - VALIDATION : -REPORTED]
    ids = [token for text in training for token in tokenizer(text, verbose=False)["input_ids"]]
    windows = {
        "validation": smollm.windows(tokenizer, validation, 8),
        "Wikipedia": smollm.windows(tokenizer, texts[-REPORTED:], options.held_out),
        "news": smollm.windows(tokenizer, minilm.background(), options.held_out),
    }
    windows = {name: x.to(options.device) for name, x in windows.items()}
    return Problem(
        task=task,
        batches=Spans(torch.tensor(ids), options.step_tokens // options.accumulate, (512, 512)),
        validation=list(windows["validation"].split(2)),
        forward=hidden_too if "hidden" in (options.loss or "") else lambda model, batch: model(batch, use_cache=False),
        losses=("KL", "KL + cross-entropy", "KL + hidden states", "cross-entropy"),
        curve=lambda model: smollm.perplexity(model, windows["validation"]),
        curve_name="perplexity",
        figures=lambda model: {f"perplexity {name}": smollm.perplexity(model, windows[name]) for name in ("Wikipedia", "news")},
        lower_is_better=True,
    )


def hidden_too(model: Callable[..., Any], batch: Any) -> Any:
    inputs = batch if isinstance(batch, dict) else {"input_ids": batch, "use_cache": False}
    return model(**inputs, output_hidden_states=True)


def minilm_problem(options: argparse.Namespace) -> Problem:
    task = minilm_task(128, options.device)
    model, tokenizer = task.model, minilm.load()[1]
    texts = smollm.articles()
    training, validation = texts[: -REPORTED - VALIDATION], texts[-REPORTED - VALIDATION : -REPORTED]
    news = minilm.background()
    training = [*options.repeats * [*training, *NEWS_REPEATS * news[:-NEWS_VALIDATION]], *map(plain_text, files(options.texts))]
    ids = [token for text in training for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def as_batch(spans: Tensor) -> dict[str, Tensor]:
        first, last = (torch.full((len(spans), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
        tokens = torch.cat([first, spans, last], 1)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def encoded(texts: list[str]) -> list[dict[str, Tensor]]:
        batches = (minilm.tokens(tokenizer, texts[i : i + 10]) for i in range(0, len(texts), 10))
        return [{key: x.to(options.device) for key, x in batch.items()} for batch in batches]

    batches = {
        "validation": encoded([*paragraphs(validation)[:60], *news[-NEWS_VALIDATION:]]),
        "Wikipedia": encoded(paragraphs(texts[-REPORTED:])[: 5 * options.held_out]),
        "Lee50": encoded(minilm.documents()),
    }
    with torch.no_grad():
        dense = {name: torch.cat([minilm.embed(model, batch) for batch in parts]) for name, parts in batches.items()}

    def likeness(model: nn.Module, name: str) -> float:
        return minilm.likeness(model, batches[name], dense[name])

    def figures(model: nn.Module) -> dict[str, float]:
        cosines = {f"cosine {name}": likeness(model, name) for name in ("Lee50", "Wikipedia")}
        return {**cosines, "correlation Lee50": minilm.pearson(model, batches["Lee50"])}

    return Problem(
        task=task,
        batches=Spans(torch.tensor(ids), options.step_tokens // options.accumulate, (16, 160), as_batch),
        validation=batches["validation"],
        forward=hidden_too,
        losses=("cosine + hidden states", "cosine + last hidden states", "cosine"),
        curve=partial(likeness, name="validation"),
        curve_name="cosine with the dense embeddings",
        figures=figures,
        lower_is_better=False,
    )


def files(paths: Sequence[Path]) -> list[Path]:
    """The files, and the text files in the folders."""
    inside = {path: (file for file in path.rglob("*") if file.name.endswith((".html", ".txt", ".txt.gz"))) for path in paths}
    return [file for path in paths for file in ([path] if path.is_file() else sorted(inside[path]))]


def plain_text(path: Path) -> str:
    """The paragraphs of a text or HTML file that are longer than a line."""
    text = gzip.decompress(path.read_bytes()).decode(errors="replace") if path.suffix == ".gz" else path.read_text(errors="replace")
    if path.suffix == ".html":
        text = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", "", text)
        text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"(?i)<(p|div|br|li|h\d|tr)\b[^>]*>", "\n\n", text)))
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n".join(part for part in parts if len(part) >= 60)


def paragraphs(texts: list[str]) -> list[str]:
    """The paragraphs of 200 to 1,200 characters."""
    return [part for text in texts for part in text.split("\n") if 200 <= len(part) <= 1200]


def tiny_problem(options: argparse.Namespace) -> Problem:
    task = attrs.evolve(tiny_task(4), model=tiny.load())
    windows = tiny.windows(6)

    def perplexity(model: nn.Module) -> float:
        with torch.no_grad():
            return float(next_token_loss(model(windows), windows).exp())

    return Problem(
        task=task,
        batches=Spans(tiny.windows(8).flatten(), options.step_tokens // options.accumulate, (16, 32)),
        validation=[windows],
        forward=lambda model, batch: model(batch, output_hidden_states=True),
        losses=("KL", "KL + cross-entropy", "KL + hidden states", "cross-entropy"),
        curve=perplexity,
        curve_name="perplexity",
        figures=lambda model: {"perplexity": perplexity(model)},
        lower_is_better=True,
    )


PROBLEMS = {"smollm": smollm_problem, "minilm": minilm_problem, "tiny": tiny_problem}


def pruned(problem: Problem, options: argparse.Namespace) -> tuple[nn.Module, dict[str, bp.BlockMask], dict[str, Tensor]]:
    """The pruned and repaired model that training starts from; it is kept in a file, because pruning takes minutes."""
    model = problem.task.model
    if not options.sparsity:
        return model, {}, {}
    path = options.folder / f"start, {options.model}, {options.pattern}, {options.sparsity:g}, {options.method}.pt"
    if not path.exists():
        model, result = METHODS[options.method](problem.task, PATTERNS[options.pattern], options.sparsity)
        grids = {name: (mask.keep, mask.grid.shape, mask.grid.block) for name, mask in result.masks.items()}
        save({"model": model.state_dict(), "masks": grids, "weights": dict(result.weights)}, path)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])  # clustering gives units another order
    masks = {name: bp.BlockMask(keep, bp.BlockGrid(shape, block)) for name, (keep, shape, block) in saved["masks"].items()}
    return model, masks, saved["weights"]


def save(value: Any, path: Path) -> None:
    """Write a file whole or not at all."""
    torch.save(value, f"{path}.part")
    os.replace(f"{path}.part", path)


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(SEED)
    print(machine())
    options.folder.mkdir(parents=True, exist_ok=True)
    problem = PROBLEMS[options.model](options)
    if options.bfloat16 and hasattr(problem.task.model, "set_attn_implementation"):
        problem.task.model.set_attn_implementation("eager")  # the backward of torch's fused attention is slow in bfloat16 on CPUs
    options.loss = options.loss or problem.losses[0]
    if options.loss not in problem.losses:
        raise SystemExit(f"--loss {options.loss!r} does not suit {options.model}; use one of {problem.losses}")
    steps = max(1, options.tokens // options.step_tokens)
    model, masks, weights = pruned(problem, options)
    start = f"{options.pattern} at {options.sparsity:.0%}, {options.method}" if masks else "dense"
    training = f"{options.loss}, {options.optimizer} {options.lr:g}, {options.tokens:,} tokens, {options.step_tokens:,} a step"
    title = f"{options.model}, {start}; {training}"
    name = title.replace("; ", ", ").replace(",", "") + f" seed {options.seed}"
    path = options.folder / f"{name}.pt"
    record = torch.load(path, weights_only=True) if path.exists() else {"seconds": 0.0, "curve": [], "figures": {}, "state": None}
    chosen = {key: str(value) for key, value in vars(options).items() if key not in NOT_OF_THE_RUN}
    if record.get("options") not in (None, chosen):
        raise SystemExit(f"{path} is of a run with other options; give another --folder")
    record["options"] = chosen
    copied = copy.deepcopy(model)

    def judged(weights: bp.Weights) -> nn.Module:
        return bp.apply_masks(copied, masks, weights)

    if not record["figures"]:
        record["figures"] = {"dense": problem.figures(model), "before": problem.figures(judged(weights))}
        record["curve"] = [(0, 0.0, problem.curve(copied))]
    print(f"{title}; warmup {options.warmup:.0%}, cosine; seed {options.seed}; {bp.sparsity(masks):.1%} pruned" if masks else title)
    print(f"{'tokens':>10}{'seconds':>9}  validation {problem.curve_name}")
    for row in record["curve"]:
        print_row(*row)
    clock = time.monotonic()

    def keep(state: bp.DistillState) -> None:
        nonlocal clock
        record["seconds"] += time.monotonic() - clock
        record["curve"].append((state.count, record["seconds"], problem.curve(judged(state.weights))))
        print_row(*record["curve"][-1])
        save({**record, "state": attrs.asdict(state, recurse=False)}, path)
        clock = time.monotonic()

    final = bp.distill(
        model,
        masks,
        weights,
        problem.batches,
        teacher=model,
        loss=LOSSES[options.loss],
        optimizer=partial(OPTIMIZERS[options.optimizer], lr=options.lr),
        steps=steps,
        warmup=math.ceil(options.warmup * steps),
        accumulate=options.accumulate,
        held_out=problem.validation,
        every=max(1, options.every // options.step_tokens),
        seed=options.seed,
        forward=problem.forward,
        autocast=torch.bfloat16 if options.bfloat16 else None,
        lora_rank=options.lora_rank,
        callback=keep,
        resume=bp.DistillState(**record["state"]) if record["state"] else None,
    )
    figures = record["figures"] | {"after": problem.figures(judged(final))}
    finished = {"title": title, "curve_name": problem.curve_name, "curve": record["curve"], "figures": figures, "machine": machine()}
    (options.folder / f"{name}.json").write_text(json.dumps(finished, indent=1) + "\n")
    print_figures(figures, problem, options, record["curve"][-1])
    if options.picture:
        draw([finished], options.picture)
    if options.deploy:
        deployed = {"repaired": judged(weights), "distilled": bp.apply_masks(copy.deepcopy(model), masks, final)}
        deploy(model, minilm.load()[1], deployed, options)


def deploy(dense: nn.Module, tokenizer: Any, masked: Mapping[str, nn.Module], options: argparse.Namespace) -> None:
    """Speed and size of the exported models beside dense ones, in a table and a picture."""
    speeds, quality = front_page.compared(dense, tokenizer, masked, options.rounds)
    share = f"{options.sparsity:.0%}"
    title = f"MiniLM with {share} of its 16x16 blocks pruned"
    front_page.draw(speeds, quality, {name: {share: name} for name in masked}, options.deploy, title)


def print_row(tokens: int, seconds: float, figure: float) -> None:
    print(f"{tokens:>10,}{seconds:>9,.0f}  {figure:.4g}", flush=True)


def print_figures(
    figures: dict[str, dict[str, float]], problem: Problem, options: argparse.Namespace, last: tuple[int, float, float]
) -> None:
    """The texts that are reported: dense, before and after training, and the ratio to the better of dense and dense-trained."""
    reference = figures["dense"]
    if options.control:
        figures = {"dense": reference, "dense, trained": json.loads(options.control.read_text())["figures"]["after"], **figures}
        best = min if problem.lower_is_better else max
        reference = {name: best(reference[name], figures["dense, trained"][name]) for name in reference}
    print("\n" + " " * 16 + "".join(f"{name:>24}" for name in reference))
    for row, values in figures.items():
        print(f"{row:16}" + "".join(f"{value:>24.4f}" for value in values.values()))
    ratios = {name: figures["after"][name] / reference[name] for name in reference}
    print(f"{'after / dense':16}" + "".join(f"{ratio:>24.3f}" for ratio in ratios.values()))
    changes = ", ".join(
        f"{name} {figures['before'][name]:.3f} -> {figures['after'][name]:.3f} ({reference[name]:.3f})" for name in reference
    )
    what = f"{options.pattern} at {options.sparsity:.0%}" if options.sparsity else "dense"
    print(f"In short: {options.model}, {what}, before and after {last[0]:,} tokens ({last[1] / 60:.0f} minutes), beside dense: {changes}.")


def draw(runs: Sequence[dict[str, Any]], picture: Path) -> None:
    """The validation figure of each run against the tokens that it was trained on."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 (an extra)

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for run in runs:
        tokens, _, values = zip(*run["curve"], strict=True)
        axes.plot(tokens, values, marker=".", label=run["title"])
    axes.set(xlabel="tokens trained on", ylabel=f"{runs[0]['curve_name']}, validation texts")
    axes.set_yscale("log" if runs[0]["curve_name"] == "perplexity" else "linear")
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
    parser.add_argument("--method", choices=METHODS, default="OBS + budget + cluster", help="what training starts from")
    parser.add_argument("--loss", choices=LOSSES, help="by default KL, or cosine + hidden states")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="AdamW")
    parser.add_argument(
        "--texts", type=Path, nargs="+", default=[], help="MiniLM: more texts to train on: files or folders of .txt, .html and .txt.gz"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="how often a pass has the articles and the news, which --texts are mixed with"
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--step-tokens", type=int, default=2048, help="tokens of an optimizer step")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of an optimizer step")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--bfloat16", action="store_true", help="autocast")
    parser.add_argument("--every", type=int, default=100_000, help="tokens between evaluations")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--held-out", type=int, default=40, help="reported windows of 512 tokens (SmolLM2) or fives of paragraphs (MiniLM)")
    parser.add_argument("--folder", type=Path, default=Path(".cache/recover"), help="of the files from which runs go on")
    parser.add_argument("--control", type=Path, help="the .json of the dense model's run, to compare with the better of it and dense")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--deploy", type=Path, help="MiniLM: export the model, time it beside dense ones, and draw this picture")
    parser.add_argument("--rounds", type=int, default=9, help="of --deploy, of which the median counts")
    parser.add_argument("--draw", type=Path, nargs="+", help="only draw these runs (.json) into --picture")
    options = parser.parse_args()
    if options.deploy and (options.model != "minilm" or options.pattern != "16x16" or not options.sparsity):
        parser.error("--deploy is for --model minilm in 16x16 blocks")
    if options.draw and not options.picture:
        parser.error("--draw needs --picture, the file to draw into")
    if options.draw:
        draw([json.loads(path.read_text()) for path in options.draw], options.picture)
    else:
        main(options)
