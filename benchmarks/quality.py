"""What pruning costs, by method, pattern and sparsity, without fine-tuning: perplexity of SmolLM2-135M, correlation of MiniLM with people.

python benchmarks/quality.py --model minilm                                  # every pattern, every method
python benchmarks/quality.py --model smollm --patterns 16x16 --sparsities 0.25 --methods OBS "OBS + budget"

`blockprune.examples` says what to install (the Makefile does). One line is printed a cell, with its
seconds and peak memory.
"""

import argparse
import copy
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import load_file, save_file
from timing import machine, reset_peak, resident_bytes
from torch import Tensor, nn

import blockprune as bp
from blockprune import allocate, collect, metric, recipes, reconstruct
from blockprune.examples import minilm, smollm

SEED = 0
MAX_LAYER_SPARSITY = 0.625  # under a budget no layer loses more than this, or than 0.1 more than the whole model
DAMPING = 0.4  # of repair towards the dense model; the budget's scores of the dense model itself take 0.01


@attrs.frozen(eq=False)
class Task:
    """A model, what to calibrate it on, and the figures that say how good it is."""

    model: nn.Module
    prunable: Callable[[tuple[int, ...]], bp.Where]  # block -> the rule of what is pruned
    calibration: bp.Calibration
    gradients: bp.Calibration  # batches and loss for statistics that need gradients
    figures: Callable[[nn.Module], Sequence[float]]
    down: str  # pattern of the MLP's second projection
    example: Any  # a small batch, to find the hidden axes with
    layers: Sequence[str] | None = None  # that follow each other, where the model does not show it


@attrs.frozen
class Pattern:
    """Blocks, and which of them are compared with each other."""

    block: tuple[int, ...]
    m: int = 0  # n of m
    only_down: bool = False

    def where(self, task: Task) -> bp.Where:
        """The rule that chooses parameters and blocks."""
        return bp.named(task.down, self.block) if self.only_down else task.prunable(self.block)

    @property
    def per_layer(self) -> Any:
        """Every layer equally sparse."""
        return partial(allocate.n_of_m, m=self.m) if self.m else allocate.per_layer

    @property
    def per_row(self) -> Any:
        """Every row of blocks equally sparse."""
        return partial(allocate.n_of_m, m=self.m) if self.m else allocate.per_row


PATTERNS = {
    "16x16": Pattern((16, 16)),
    "32x32": Pattern((32, 32)),
    "4x4": Pattern((4, 4)),
    "16x1": Pattern((16, 1)),
    "1x16": Pattern((1, 16)),
    "MLP units": Pattern((-1, 1), only_down=True),
    "1x1": Pattern((1, 1)),
    "2:4": Pattern((1, 1), m=4),
}
Pruned = tuple[nn.Module, bp.PruningResult]  # the model that the masks and weights are for


def smollm_task(windows: int, held_out: int, gradients: int, device: str) -> Task:
    """SmolLM2, Wikipedia: calibrate on the first articles, perplexity of the last 30."""
    model, tokenizer = smollm.load()
    texts = smollm.articles()
    calibration = smollm.evenly_spaced_windows(tokenizer, texts[:-30], windows).to(device)
    held = smollm.windows(tokenizer, texts[-30:], held_out).to(device)

    def figures(model: nn.Module) -> list[float]:
        losses = smollm.losses(model, held).double()
        return [float(losses[:n].mean().exp()) for n in sorted({min(8, held_out), held_out})]

    def forward(model: nn.Module, batch: Tensor) -> Any:
        return model(batch)

    return Task(
        model=model.to(device),
        prunable=lambda block: bp.excluding(bp.linears(block), "lm_head*"),
        calibration=bp.Calibration(list(calibration[:, None]), forward=forward, progress=False),
        gradients=bp.Calibration(list(calibration[:gradients, None]), forward=forward, loss=next_token_loss, progress=False),
        figures=figures,
        down="*.down_proj.weight",
        example=calibration[:1, :8],
    )


def next_token_loss(output: Any, batch: Tensor) -> Tensor:
    """The mean cross-entropy of the next token."""
    return nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def tiny_task(windows: int) -> Task:
    """A language model of two small layers with random weights on random tokens: it tests this script, and its figures mean nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 (slow to import, and an extra)

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    tokens = torch.randint(64, (windows + 1, 32))

    def figures(model: nn.Module) -> list[float]:
        with torch.no_grad():
            return [float(next_token_loss(model(tokens[-1:]), tokens[-1:]).exp())]

    batches = list(tokens[:-1, None])
    return Task(
        model=model,
        prunable=lambda block: bp.excluding(bp.linears(block), "lm_head*"),
        calibration=bp.Calibration(batches, progress=False),
        gradients=bp.Calibration(batches, loss=next_token_loss, progress=False),
        figures=figures,
        down="*.down_proj.weight",
        example=tokens[:1, :8],
    )


def minilm_task(texts: int, device: str) -> Task:
    """MiniLM, Lee's news texts: calibrate on the background, Pearson correlation with people's judgement of 50 others."""
    model, tokenizer = minilm.load()
    documents, background = minilm.documents(), minilm.background()[:texts]
    judged = [minilm.tokens(tokenizer, documents[i : i + 10]) for i in range(0, 50, 10)]
    pairs, loss = minilm.other_halves(model, tokenizer, min(texts, 128))
    model, judged = model.to(device), [{key: x.to(device) for key, x in batch.items()} for batch in judged]
    with torch.no_grad():
        dense = torch.cat([minilm.embed(model, batch) for batch in judged])
    return Task(
        model=model,
        prunable=lambda block: bp.excluding(bp.linears(block), "pooler.*"),
        calibration=bp.Calibration(
            [minilm.tokens(tokenizer, background[i : i + 8], longest=128) for i in range(0, texts, 8)],
            forward=minilm.embed,
            progress=False,
        ),
        gradients=bp.Calibration(pairs, forward=minilm.embed, loss=loss, per_sample="loop", progress=False),
        figures=lambda model: [minilm.pearson(model, judged), minilm.mean_cosine(model, judged, dense)],
        down="encoder.layer.*[0-9].output.dense.weight",
        example=minilm.tokens(tokenizer, documents[:2], longest=16),
    )


def magnitude(task: Task, pattern: Pattern, sparsity: float) -> Pruned:
    """The smallest mean weights, without repair."""
    return task.model, recipes.magnitude(pattern.where(task), allocate=pattern.per_row)(task.model, sparsity)


def wanda(task: Task, pattern: Pattern, sparsity: float) -> Pruned:
    """Wanda, without repair."""
    return task.model, recipes.wanda(pattern.where(task), task.calibration, allocate=pattern.per_row)(task.model, sparsity)


def fisher(task: Task, pattern: Pattern, sparsity: float) -> Pruned:
    """The gates' Fisher information, ranked over the whole model (2:4 within its groups), without repair."""
    collector = partial(collect.with_statistics, where=pattern.where(task), calibration=task.gradients)
    ranking = pattern.per_row if pattern.m else partial(allocate.per_model, max_sparsity=0.6)
    return task.model, recipes.OneShot(bp.Pipeline(collector, metric.fisher, ranking))(task.model, sparsity)


def wanda_least_squares(task: Task, pattern: Pattern, sparsity: float) -> Pruned:
    """Wanda layer after layer, each repaired by least squares."""
    pipeline = bp.Pipeline(partial(collect.with_statistics, where=pattern.where(task)), metric.wanda, pattern.per_layer)
    repair = partial(reconstruct.least_squares, damping=DAMPING, progress=False)
    return task.model, recipes.LayerByLayer(pipeline, repair, task.calibration)(task.model, sparsity)


def sparsegpt(task: Task, pattern: Pattern, sparsity: float) -> Pruned:
    """SparseGPT: its masks and its update."""
    recipe = recipes.sparsegpt(pattern.where(task), task.calibration, damping=DAMPING)
    if pattern.m:
        recipe = attrs.evolve(recipe, pipeline=attrs.evolve(recipe.pipeline, allocate=pattern.per_row))
    return task.model, recipe(task.model, sparsity)


def obs_recipe(task: Task, pattern: Pattern, **options: Any) -> recipes.LayerByLayer:
    """Optimal Brain Surgeon with a budget for each layer, whose gradients come from batches of their own."""
    recipe = recipes.obs(pattern.where(task), task.calibration, damping=DAMPING, max_layer_sparsity=MAX_LAYER_SPARSITY)
    assert recipe.budget is not None
    budget = attrs.evolve(recipe.budget, collect=partial(recipe.budget.collect, calibration=task.gradients))
    pipeline = attrs.evolve(recipe.pipeline, allocate=pattern.per_layer)
    return attrs.evolve(recipe, **{"pipeline": pipeline, "budget": budget, "layers": task.layers, **options})


def obs(task: Task, pattern: Pattern, sparsity: float) -> Pruned:
    """Optimal Brain Surgeon, all layers alike."""
    return task.model, obs_recipe(task, pattern, budget=None)(task.model, sparsity)


def budgeted(task: Task, pattern: Pattern, sparsity: float, *, looks: int = 1, **options: Any) -> Pruned:
    """Optimal Brain Surgeon with a budget for each layer.

    With more than one pass over the gradients, the model is pruned to a part of the sparsity first, on a quarter of the batches, and the
    gradients at that model share out the next part. Each time the weights start from those of the dense model.
    """
    recipe = obs_recipe(task, pattern, **options)
    assert recipe.budget is not None
    model = task.model
    for look in range(1, looks):
        shares, extra_data = recipe.budget(model, sparsity * look / looks)
        quarter = attrs.evolve(task.calibration, batches=list(task.calibration.batches)[::4])
        part = bp.sequential(task.model, recipe.pipeline, recipe.reconstruct, quarter, shares, layers=task.layers, extra_data=extra_data)
        model = bp.finalize(bp.apply_masks(copy.deepcopy(task.model), part.masks, part.weights))
    shares, extra_data = recipe.budget(model, sparsity)
    del model
    stages = task.model, recipe.pipeline, recipe.reconstruct, task.calibration
    return task.model, bp.sequential(*stages, shares, layers=task.layers, extra_data=extra_data, finetune=recipe.finetune)


def clustered(task: Task, pattern: Pattern, sparsity: float, **options: Any) -> Pruned:
    """`budgeted` after hidden units that matter in the same places were brought into the same blocks."""
    block = tuple(64 if side == -1 else side for side in pattern.block)
    model = recipes.cluster_units(task.model, task.prunable(block), task.gradients, block=block, sparsity=sparsity, example=task.example)
    return budgeted(attrs.evolve(task, model=model), pattern, sparsity, **options)


FINETUNE = partial(bp.finetune_layer, lr=1e-3, epochs=4)
PEER = Path(__file__).parents[1] / ".peers" / "llmcompressor" / "bin" / "python"


def llmcompressor(method: str, task: Task, pattern: Pattern, sparsity: float) -> Pruned:
    """llm-compressor on the same tokens, in an environment of its own (`make peers`): 2:4 or single weights at 50 %."""
    with tempfile.TemporaryDirectory() as folder:
        smollm.save(task.model, smollm.load()[1], folder)
        tokens, out = f"{folder}/tokens.safetensors", f"{folder}/out.safetensors"
        save_file({"tokens": torch.cat(list(task.calibration.batches))}, tokens)
        script = Path(__file__).parent / "peers" / "llmcompressor_quality.py"
        structure = f"2:{pattern.m}" if pattern.m else "0:0"
        subprocess.run([PEER, script, folder, tokens, out, method, structure], check=True, capture_output=True)
        pruned = load_file(out)
    weights = {name: pruned[name] for name in collect.weights(task.model, where=pattern.where(task), lazy=True)}
    masks = {name: bp.BlockMask(w != 0, bp.BlockGrid(w.shape, (1, 1))) for name, w in weights.items()}
    return task.model, bp.PruningResult(masks, weights)


METHODS: dict[str, Callable[[Task, Pattern, float], Pruned]] = {
    "magnitude": magnitude,
    "Wanda": wanda,
    "Fisher": fisher,
    "Wanda + LS": wanda_least_squares,
    "SparseGPT": sparsegpt,
    "OBS": obs,
    "OBS + budget": budgeted,
    "OBS + budget + cluster": clustered,
    "OBS + 2 budgets + cluster": partial(clustered, looks=2),
    "OBS + budget + cluster + finetune": partial(clustered, finetune=FINETUNE),
    "OBS + 2 budgets + cluster + finetune": partial(clustered, looks=2, finetune=FINETUNE),
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
        reset_peak()
    return resident_bytes() / 2**20


def runs(method: str, pattern: Pattern, sparsity: float, model: str) -> bool:
    """Whether a cell is there to be measured: 2:4 is half and has no budget, the peer has no blocks."""
    if method.startswith("llm-compressor"):
        return model == "smollm" and pattern.block == (1, 1) and sparsity == 0.5 and PEER.exists()
    return not pattern.m or (sparsity == 0.5 and "budget" not in method)


def shown(task: Task, model: nn.Module) -> str:
    """The figures of a model, for the table."""
    return " / ".join(f"{figure:,.3f}" for figure in task.figures(model))


def task_of(options: argparse.Namespace) -> Task:
    """The model's task, its first line printed."""
    if options.model == "smollm":
        task = smollm_task(options.calibration or 16, options.held_out, options.gradients or 24, options.device)
        title = f"SmolLM2-135M: perplexity of 8 and {options.held_out} x 512 held-out tokens, calibration {options.calibration or 16} x 512"
    elif options.model == "minilm":
        task = minilm_task(options.calibration or 128, options.device)
        title = f"all-MiniLM-L6-v2: correlation with people (Lee50) / cosine with the dense embeddings, {options.calibration or 128} texts"
    else:
        task, title = tiny_task(options.calibration or 8), "A tiny model with random weights: perplexity of 32 random tokens"
    batches = len(list(task.gradients.batches))
    print(f"{title}, gradients of {batches} batches; seed {SEED}; damping {DAMPING}; dense {shown(task, task.model)}")
    return task


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(SEED)
    print(machine())
    task = task_of(options)
    print(f"Budgets take at most {MAX_LAYER_SPARSITY:.1%} of a layer, or 10 % more than of the model")
    print(f"{'pattern':10}{'sparsity':>9}  {'method':36}{'figure':>24}{'pruned':>8}{'seconds':>9}{'peak MiB':>10}")
    for name in options.patterns:
        for sparsity in options.sparsities:
            for method in options.methods:
                if not runs(method, PATTERNS[name], sparsity, options.model):
                    continue
                peak_mib(options.device, reset=True)
                start = time.perf_counter()
                model, result = METHODS[method](task, PATTERNS[name], sparsity)
                peak = peak_mib(options.device)
                seconds = time.perf_counter() - start
                before = {key: p.detach().clone() for key, p in model.named_parameters() if key in result.weights}
                figures = shown(task, bp.apply_masks(model, result.masks, result.weights))
                bp.apply_masks(model, {}, before)
                print(
                    f"{name:10}{sparsity:>9.0%}  {method:36}{figures:>24}{bp.sparsity(result.masks):>8.1%}{seconds:>9.0f}{peak:>10,.0f}",
                    flush=True,
                )
                if options.save:
                    Path(options.save).mkdir(parents=True, exist_ok=True)
                    bp.save_masks(result.masks, Path(options.save) / f"{options.model}, {name}, {sparsity:g}, {method}.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm", "minilm", "tiny"), default="smollm")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--calibration", type=int, help="windows of 512 tokens (SmolLM2; 16) or texts (MiniLM; 128)")
    parser.add_argument("--gradients", type=int, help="windows for gradients (SmolLM2; 24)")
    parser.add_argument("--device", default="cpu", help="cuda, or cuda:1: on a GPU, and the peak memory there")
    parser.add_argument("--save", help="a folder for the masks (of clustered units, in their new order), which speed.py times")
    parser.add_argument("--held-out", type=int, default=40, help="windows of 512 held-out tokens (SmolLM2; 40)")
    main(parser.parse_args())
