"""What pruning costs, by method, pattern and sparsity, without fine-tuning: perplexity of SmolLM2-135M, correlation of MiniLM with people.

python benchmarks/quality.py --model minilm                                  # every pattern, every method
python benchmarks/quality.py --model smollm --patterns 16x16 --sparsities 0.25 --methods OBS "OBS + budget"

See benchmarks/smollm.py and benchmarks/minilm.py for what to install (the Makefile does). One line is printed a cell, with its
seconds and peak memory.
"""

import argparse
import copy
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import minilm
import smollm
import torch
from safetensors.torch import load_file, save_file
from timing import machine
from torch import Tensor, nn

import blockprune as bp
from blockprune import allocate, collect, distribute, metric, reconstruct, statistics

SEED = 0
CAP, BEYOND = 0.625, 0.1  # under a budget no layer loses more than the first, or than the second above the whole model's share
DAMPING = 0.4  # for repair towards the dense model; 0.01 for scores of the dense model itself


@attrs.frozen(eq=False)
class Task:
    """A model, what to calibrate on, a loss for gradients, and the figures that say how good it is."""

    model: nn.Module
    linears: Callable[[bp.Where], bp.Where]  # a rule without the parameters that no output needs
    batches: list[Any]
    asked: list[Any]  # batches for gradients
    forward: Callable[..., Any]
    loss: Callable[[Any, Any], Tensor]
    per_sample: str
    figures: Callable[[nn.Module], Sequence[float]]
    down: str  # pattern of the MLP's second projection
    few: Any  # a small batch, to find the hidden axes with


@attrs.frozen
class Pattern:
    """Blocks, and what may compete with what."""

    block: tuple[int, ...]
    m: int = 0  # n of m
    only: str = ""

    def where(self, task: Task) -> bp.Where:
        """The rule that chooses parameters and blocks."""
        return bp.named(task.down, self.block) if self.only else task.linears(bp.linears(self.block))

    def layer(self, scores: bp.Scores, sparsity: Any) -> bp.Masks:
        """Every layer equally sparse."""
        return allocate.n_of_m(scores, sparsity, m=self.m) if self.m else allocate.per_layer(scores, sparsity)

    def rows(self, scores: bp.Scores, sparsity: Any) -> bp.Masks:
        """Every row of blocks equally sparse."""
        return allocate.n_of_m(scores, sparsity, m=self.m) if self.m else allocate.per_row(scores, sparsity)


PATTERNS = {
    "16x16": Pattern((16, 16)),
    "32x32": Pattern((32, 32)),
    "4x4": Pattern((4, 4)),
    "16x1": Pattern((16, 1)),
    "1x16": Pattern((1, 16)),
    "MLP units": Pattern((-1, 1), only="down"),
    "1x1": Pattern((1, 1)),
    "2:4": Pattern((1, 1), m=4),
}
Found = tuple[nn.Module, bp.Masks, bp.Weights]  # the model that they are of


def smollm_task(windows: int, held_out: int, gradients: int, device: str) -> Task:
    """SmolLM2, Wikipedia: calibrate on the first articles, perplexity of the last 30."""
    model, tokenizer = smollm.load()
    texts = smollm.articles()
    calibration = smollm.spread(tokenizer, texts[:-30], windows).to(device)
    held = smollm.windows(tokenizer, texts[-30:], held_out).to(device)

    def figures(model: nn.Module) -> list[float]:
        losses = smollm.losses(model, held).double()
        return [float(losses[:n].mean().exp()) for n in sorted({min(8, held_out), held_out})]

    def loss(output: Any, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    return Task(
        model=model.to(device),
        linears=partial(bp.excluding, pattern="lm_head*"),
        batches=list(calibration[:, None]),
        asked=list(calibration[:gradients, None]),
        forward=lambda m, batch: m(batch),
        loss=loss,
        per_sample="vmap",
        figures=figures,
        down="*.down_proj.weight",
        few=calibration[:1, :8],
    )


def minilm_task(texts: int, device: str) -> Task:
    """MiniLM, Lee's news texts: calibrate on the background, Pearson correlation with people's judgement of 50 others."""
    model, tokenizer = minilm.load()
    documents, background = minilm.documents(), minilm.background()[:texts]
    judged = [minilm.tokens(tokenizer, documents[i : i + 10]) for i in range(0, 50, 10)]
    asked, loss = minilm.other_halves(model, tokenizer, min(texts, 128))
    model, judged = model.to(device), [{key: x.to(device) for key, x in batch.items()} for batch in judged]
    with torch.no_grad():
        dense = torch.cat([minilm.embed(model, batch) for batch in judged])
    return Task(
        model=model,
        linears=partial(bp.excluding, pattern="pooler.*"),
        batches=[minilm.tokens(tokenizer, background[i : i + 8], longest=128) for i in range(0, texts, 8)],
        asked=asked,
        forward=minilm.embed,
        loss=loss,
        per_sample="loop",
        figures=lambda model: [minilm.pearson(model, judged), minilm.likeness(model, judged, dense)],
        down="encoder.layer.*[0-9].output.dense.weight",
        few=minilm.tokens(tokenizer, documents[:2], longest=16),
    )


def one_shot(score: Callable[..., bp.Scores], seen: list[Any], task: Task, pattern: Pattern, sparsity: float) -> Found:
    """Scores of the dense model, no repair."""
    where = pattern.where(task)
    data = (
        collect.with_statistics(task.model, where=where, statistics=seen, batches=task.batches, lazy=True, progress=False)
        if seen
        else collect.weights(task.model, where=where, lazy=True)
    )
    return task.model, pattern.rows(score(data), sparsity), {}


def evidence(task: Task, model: nn.Module, where: bp.Where, seen: list[Any], **options: Any) -> bp.Data:
    """One look at a model, forward and backward."""
    how = {"batches": task.asked, "forward": task.forward, "loss": task.loss, "lazy": True, "progress": False, **options}
    return collect.with_statistics(model, where=where, statistics=seen, **how)


def fisher(task: Task, pattern: Pattern, sparsity: float) -> Found:
    """Gate Fisher, ranked over the model (2:4 within its groups), no repair."""
    data = evidence(task, task.model, pattern.where(task), [statistics.gate_fisher], per_sample=task.per_sample, lazy=False)
    scores = metric.fisher(data)
    return task.model, pattern.rows(scores, sparsity) if pattern.m else allocate.global_(scores, sparsity, max_sparsity=0.6), {}


def repaired(  # noqa: PLR0917 (the first three are bound)
    score: Any, seen: list[Any], repair: Any, task: Task, pattern: Pattern, sparsity: float, **options: Any
) -> Found:
    """Layer after layer: score, rank the blocks of each Linear, repair."""
    rank = options.pop("rank", pattern.layer)
    pipeline = bp.Pipeline(partial(collect.with_statistics, where=pattern.where(task), statistics=seen), score, rank)
    budget = options.pop("budget", sparsity)
    found = bp.sequential(task.model, pipeline, repair, task.batches, budget, progress=False, **options)
    return task.model, found.masks, found.weights


GRAM = [statistics.input_gram]
OBS = partial(metric.obs, damping=DAMPING, progress=False)
SQUARES = partial(reconstruct.least_squares, damping=DAMPING, progress=False)
TUNE = partial(bp.blockwise, lr=1e-3, epochs=4)


def sparsegpt(task: Task, pattern: Pattern, sparsity: float) -> Found:
    """SparseGPT: its masks, within 128 columns, and its update."""
    width = pattern.block[1]
    rank = pattern.rows if pattern.m else partial(allocate.per_bank, bank=(-1, max(1, 128 // width)))
    score, repair = partial(metric.sparsegpt, sparsity=sparsity, damping=DAMPING), partial(reconstruct.sparsegpt, damping=DAMPING)
    return repaired(score, GRAM, repair, task, pattern, sparsity, rank=rank)


def budgeted(task: Task, pattern: Pattern, sparsity: float, *, looks: int = 1, **options: Any) -> Found:
    """OBS weighed by output gradients; what each layer loses is ranked over the model, within bounds.

    With more looks the model is pruned to a part of the sparsity first, and the gradients at that model share out the next part; each
    time the weights are those of the dense model again, and a quarter of the batches does for all looks but the last, which alone tunes.
    """
    found: Found = task.model, {}, {}
    for look in range(1, looks + 1):
        share = sparsity * look / looks
        model = bp.finalize(bp.apply_masks(copy.deepcopy(task.model), *found[1:])) if found[1] else task.model
        data = evidence(task, model, pattern.where(task), [statistics.input_gram, statistics.output_grad_gram])
        del model
        budget = distribute.loss_weighted(metric.obs(data, progress=False), share, max_sparsity=max(CAP, share + BEYOND))
        known = {name: attrs.evolve(p, stats={"output_grad_gram": p.stats["output_grad_gram"]}) for name, p in data.items()}
        del data
        given = {"rank": allocate.per_layer, "budget": budget, "evidence": known}
        if look < looks:
            found = repaired(OBS, GRAM, SQUARES, attrs.evolve(task, batches=task.batches[::4]), pattern, sparsity, **given)
        else:
            found = repaired(OBS, GRAM, SQUARES, task, pattern, sparsity, **given, **options)
    return found


def clustered(task: Task, pattern: Pattern, sparsity: float, **options: Any) -> Found:
    """`budgeted` after hidden units that matter in the same places were brought into the same blocks."""
    data = evidence(task, task.model, task.linears(bp.linears((1, 1))), [statistics.input_gram, statistics.output_grad_sq])
    block = tuple(64 if side == -1 else side for side in pattern.block)
    axes = bp.find_axes(task.model, task.few, forward=task.forward, progress=False)
    plan = bp.cluster(metric.obs(data, max_sparsity=0, progress=False), axes, block=block, sparsity=sparsity, progress=False)
    del data
    return budgeted(attrs.evolve(task, model=bp.permute(task.model, plan)), pattern, sparsity, **options)


PEER = Path(__file__).parents[1] / ".peers" / "llmcompressor" / "bin" / "python"


def llmcompressor(method: str, task: Task, pattern: Pattern, sparsity: float) -> Found:
    """llm-compressor on the same tokens, in an environment of its own (`make peers`): 2:4 or single weights at 50 %."""
    with tempfile.TemporaryDirectory() as folder:
        smollm.save(task.model, smollm.load()[1], folder)
        tokens, out = f"{folder}/tokens.safetensors", f"{folder}/out.safetensors"
        save_file({"tokens": torch.cat(task.batches)}, tokens)
        script = Path(__file__).parent / "peers" / "llmcompressor_quality.py"
        structure = f"2:{pattern.m}" if pattern.m else "0:0"
        subprocess.run([PEER, script, folder, tokens, out, method, structure], check=True, capture_output=True)
        pruned = load_file(out)
    weights = {name: pruned[name] for name in collect.weights(task.model, where=pattern.where(task), lazy=True)}
    return task.model, {name: bp.BlockMask(w != 0, bp.BlockGrid(w.shape, (1, 1))) for name, w in weights.items()}, weights


METHODS: dict[str, Callable[[Task, Pattern, float], Found]] = {
    "magnitude": partial(one_shot, metric.l1, []),
    "Wanda": partial(one_shot, metric.wanda, [statistics.input_sq]),
    "Fisher": fisher,
    "Wanda + LS": partial(repaired, metric.wanda, [statistics.input_sq, *GRAM], SQUARES),
    "SparseGPT": sparsegpt,
    "OBS": partial(repaired, OBS, GRAM, SQUARES),
    "OBS + budget": budgeted,
    "OBS + budget + cluster": clustered,
    "OBS + 2 budgets + cluster": partial(clustered, looks=2),
    "OBS + budget + cluster + tune": partial(clustered, tune=TUNE),
    "OBS + 2 budgets + cluster + tune": partial(clustered, looks=2, tune=TUNE),
    "llm-compressor Wanda": partial(llmcompressor, "wanda"),
    "llm-compressor SparseGPT": partial(llmcompressor, "sparsegpt"),
}


def peak_mib(device: str, reset: bool = False) -> float:
    """Peak memory since the last reset: resident (Linux), or of the GPU's tensors."""
    if device != "cpu":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(status[1]) / 1024 if status else float("nan")


def runs(method: str, pattern: Pattern, sparsity: float, model: str) -> bool:
    """Whether a cell is there to be measured: 2:4 is half and has no budget, the peer has no blocks."""
    if method.startswith("llm-compressor"):
        return model == "smollm" and pattern.block == (1, 1) and sparsity == 0.5 and PEER.exists()
    return not pattern.m or (sparsity == 0.5 and "budget" not in method)


def shown(task: Task, model: nn.Module) -> str:
    """The figures of a model, for the table."""
    return " / ".join(f"{figure:,.3f}" for figure in task.figures(model))


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(SEED)
    print(machine())
    if options.model == "smollm":
        task = smollm_task(options.calibration or 16, options.held_out, options.gradients or 24, options.device)
        print(f"SmolLM2-135M: perplexity of 8 and {options.held_out} x 512 held-out tokens, calibration {len(task.batches)} x 512", end="")
    else:
        task = minilm_task(options.calibration or 128, options.device)
        print("all-MiniLM-L6-v2: correlation with people (Lee50) / cosine with the dense embeddings, ", end="")
        print(f"calibration {8 * len(task.batches)} texts", end="")
    print(f", gradients of {len(task.asked)} batches; seed {SEED}; damping {DAMPING}; dense {shown(task, task.model)}")
    print(f"Budgets take at most {CAP:.1%} of a layer, or {BEYOND:.0%} more than of the model")
    print(f"{'pattern':10}{'sparsity':>9}  {'method':30}{'figure':>24}{'pruned':>8}{'seconds':>9}{'peak MiB':>10}")
    for name in options.patterns:
        for sparsity in options.sparsities:
            for method in options.methods:
                if not runs(method, PATTERNS[name], sparsity, options.model):
                    continue
                peak_mib(options.device, reset=True)
                start = time.perf_counter()
                model, masks, weights = METHODS[method](task, PATTERNS[name], sparsity)
                peak = peak_mib(options.device)
                seconds = time.perf_counter() - start
                before = {key: p.detach().clone() for key, p in model.named_parameters() if key in weights}
                figures = shown(task, bp.apply_masks(model, masks, weights))
                bp.apply_masks(model, {}, before)
                print(
                    f"{name:10}{sparsity:>9.0%}  {method:30}{figures:>24}{bp.sparsity(masks):>8.1%}{seconds:>9.0f}{peak:>10,.0f}",
                    flush=True,
                )
                if options.save:
                    Path(options.save).mkdir(parents=True, exist_ok=True)
                    bp.save_masks(masks, Path(options.save) / f"{options.model}, {name}, {sparsity:g}, {method}.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm", "minilm"), default="smollm")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--calibration", type=int, help="windows of 512 tokens (SmolLM2; 16) or texts (MiniLM; 128)")
    parser.add_argument("--gradients", type=int, help="windows for gradients (SmolLM2; 24)")
    parser.add_argument("--device", default="cpu", help="cuda, or cuda:1: on a GPU, and the peak memory there")
    parser.add_argument("--save", help="a folder for the masks (of clustered units, in their new order), which speed.py times")
    parser.add_argument("--held-out", type=int, default=40, help="windows of 512 held-out tokens (SmolLM2; 40)")
    main(parser.parse_args())
