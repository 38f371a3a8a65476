"""Which way of learning masks in training keeps the accuracy of a small network with 80 % and 90 % of its blocks pruned?

python benchmarks/train_masks.py [--seeds 5] [--split test] [--picture train_masks.png] [--methods RigL SET]
python benchmarks/train_masks.py --problem fashion-mnist --block 16 --split test
python benchmarks/train_masks.py --problem vit --split test

A convolutional network learns scikit-learn's digits or Fashion-MNIST from scratch, a vision transformer the digits (`mask_problems.py`).
Every method starts from the same weights, sees the same batches for the same number of steps, and ends with the same share of the blocks in
each layer. Learning rates and strengths were chosen with --split validation, a part of the training images, for the digits and the
convolutional network; --split test reports the accuracy on the test images.

Computation is what a block-sparse implementation would have to multiply in the pruned layers during training, as a share of dense training:
a forward pass and two products of a backward pass. The forward pass of a dense teacher counts, its training does not. This program
multiplies dense.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import attrs
import torch
from mask_problems import PROBLEMS, Problem
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import blockprune as bp
from blockprune.core.types import Metric

SPARSITIES = (0.8, 0.9)
BATCH = 64
EVERY = 12  # steps from one update of the masks to the next
LEARNED = 0.6  # the masks are final after this share of the steps
Method = Callable[["Run"], None]


@attrs.frozen
class Task:
    """What all methods are compared on."""

    problem: Problem
    block: int
    split: str
    epochs: int

    @property
    def where(self) -> bp.Where:
        return self.problem.prunable(self.block)


@attrs.define(eq=False)
class Run:
    """One training run: what a method may read and change between two steps."""

    task: "Task"
    model: nn.Module
    optimizer: torch.optim.Optimizer
    sparsity: float
    seed: int
    steps: int
    step: int = 0
    forward: float = 1.0  # the share of the weights that the forward pass multiplies
    backward: float = 1.0  # the share of the weights that need a gradient
    penalty: Callable[[nn.Module], Tensor] | None = None
    logits: torch.optim.Optimizer | None = None
    teacher: nn.Module | None = None

    @property
    def where(self) -> bp.Where:
        return self.task.where

    @property
    def last(self) -> int:
        """The step of the last update."""
        return int(LEARNED * self.steps)

    @property
    def is_update(self) -> bool:
        return self.step % EVERY == 0 and self.step <= self.last

    def apply(self, masks: bp.Masks, weights: bp.Weights | None = None, **options: Any) -> None:
        bp.apply_masks(self.model, masks, weights, **options)
        through = options.get("straight_through", False)
        self.forward = 1 - bp.sparsity(masks)
        self.backward = 1.0 if through is True else self.forward if through is False else 1 - bp.sparsity(through)


def scored(metric: Metric, run: Run, sparsity: float) -> bp.Masks:
    """Masks of the stored weights, the same share of each layer."""
    return bp.allocate.per_layer(metric(bp.collect.weights(run.model, where=run.where)), sparsity)


def random_masks(run: Run) -> bp.Masks:
    return scored(partial(bp.metric.random, generator=run.seed), run, run.sparsity)


def rising(run: Run) -> float:
    return bp.schedule.cubic(run.step, final=run.sparsity, end=run.last)


# The methods. Each is called before every step, with the gradients of the step before still in place.


def dense(run: Run) -> None:
    """No mask."""


def static(run: Run) -> None:
    if run.step == 0:
        run.apply(random_masks(run))


def magnitude(run: Run) -> None:
    if run.is_update:
        run.apply(scored(bp.metric.l1, run, rising(run)))


def distilled(run: Run) -> None:
    """Half of the loss is the distance from the outputs of the dense network, trained in the same way."""
    if run.step == 0:
        run.teacher = teacher_of(run.task, run.seed)
    magnitude(run)


def exchanging(run: Run, grow: Callable[[Run], bp.Scores], *, needs_gradients: bool) -> None:
    """Dynamic sparsity: SET and RigL differ in `grow`."""
    if run.step == 0:
        run.apply(random_masks(run))
    elif run.is_update:
        before = bp.read_masks(run.model)
        drop = bp.metric.l1(bp.collect.weights(run.model, where=run.where))
        fraction = bp.schedule.cosine(run.step, initial=0.3, final=0.0, end=run.last)
        after = bp.regrow(before, drop=drop, grow=grow(run), fraction=fraction)
        run.apply(after, bp.zero_new_blocks(run.model, after))
        bp.reset_state(run.optimizer, run.model, before, after)
    elif needs_gradients and (run.step + 1) % EVERY == 0 and run.step < run.last:
        run.apply(bp.read_masks(run.model), straight_through=True)  # for one step, whose gradients decide what grows


def random_scores(run: Run) -> bp.Scores:
    return bp.metric.random(bp.collect.weights(run.model, where=run.where), generator=run.seed + run.step)


def gradient_scores(run: Run) -> bp.Scores:
    return bp.metric.gradient_magnitude(bp.collect.gradients(run.model, where=run.where))


def top_kast(run: Run) -> None:
    if run.is_update:
        run.apply(scored(bp.metric.l1, run, run.sparsity), straight_through=scored(bp.metric.l1, run, run.sparsity - 0.1))
    elif run.step == run.last + 1:
        run.apply(bp.read_masks(run.model))


def straight_through(run: Run, *, decay: float) -> None:
    if run.step <= run.last:  # at every step, as in the paper
        run.apply(scored(bp.metric.l1, run, rising(run)), straight_through=True, decay=decay)
    elif run.step == run.last + 1:
        run.apply(bp.read_masks(run.model))


def gated(run: Run, gate: Callable[[], bp.gates.Gate], *, strength: float, lr: float, initial: float, fold: bool) -> None:
    """Gates with a penalty whose target rises; then masks of the gates, and the rest of the steps with these masks."""
    if run.step == 0:
        bp.gates.add(run.model, where=run.where, gate=gate(), initial=initial)
        run.logits = torch.optim.Adam(bp.gates.parameters(run.model), lr=lr)
        run.penalty = lambda model: strength * bp.gates.penalty(model, sparsity=rising(run))
    elif run.step == run.last:
        masks = bp.allocate.per_layer(bp.gates.scores(run.model), run.sparsity)
        bp.gates.remove(run.model, fold=fold)
        run.logits = run.penalty = None
        run.apply(masks)


def group_lasso(run: Run, *, strength: float) -> None:
    if run.step < run.last:
        lr = run.optimizer.param_groups[0]["lr"]
        bp.regularizers.proximal_group_lasso(run.model, where=run.where, strength=lr * strength)
    elif run.step == run.last:
        run.apply(scored(bp.metric.l2, run, run.sparsity))


METHODS: Mapping[str, Method] = {
    "dense": dense,
    "static random": static,
    "magnitude gradual": magnitude,
    "distilled gradual": distilled,
    "SET": partial(exchanging, grow=random_scores, needs_gradients=False),
    "RigL": partial(exchanging, grow=gradient_scores, needs_gradients=True),
    "Top-KAST": top_kast,
    "STE": partial(straight_through, decay=2e-4),
    "soft movement": partial(gated, gate=bp.gates.soft_movement, strength=0.1, lr=0.05, initial=0.5, fold=False),
    "L0": partial(gated, gate=bp.gates.hard_concrete, strength=10.0, lr=0.05, initial=0.5, fold=True),
    "group lasso": partial(group_lasso, strength=3e-4),
}


@attrs.frozen
class Result:
    """What one run gave."""

    accuracy: float
    sparsity: float
    computation: float  # in the pruned layers, as a share of dense training
    seconds: float  # of one core, which do not depend on what else it does
    update_seconds: float  # spent in the method


@cache
def teacher_of(task: Task, seed: int) -> nn.Module:
    """The dense network."""
    return trained(dense, 0.0, seed, task)[0]


def trained(method: Method, sparsity: float, seed: int, task: Task) -> tuple[nn.Module, Result]:
    """Train a network from scratch with a method."""
    problem, epochs = task.problem, task.epochs
    images, labels, held_out, held_out_labels = problem.images(task.split)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = problem.network()
        loader = DataLoader(
            TensorDataset(images, labels), BATCH, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed)
        )
        steps = epochs * len(loader)
        optimizer = problem.optimizer(model.parameters())
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        run = Run(task, model, optimizer, sparsity, seed, steps)
        computation, spent, start = 0.0, 0.0, time.process_time()
        for _ in range(epochs):
            for x, y in loader:
                before = time.process_time()
                method(run)
                spent += time.process_time() - before
                computation += (2 * run.forward + run.backward + (run.teacher is not None)) / 3 / steps
                logits = model(x)
                loss = cross_entropy(logits, y)
                if run.teacher is not None:
                    with torch.no_grad():
                        target = run.teacher(x)
                    loss = (loss + bp.losses.kl(logits, target)) / 2
                if run.penalty is not None:
                    loss = loss + run.penalty(model)
                for trains in filter(None, (optimizer, run.logits)):
                    trains.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # batch norms amplify the gradients of channels that are nearly pruned
                for trains in filter(None, (optimizer, run.logits)):
                    trains.step()
                cosine.step()
                run.step += 1
        seconds = time.process_time() - start
    plain = with_batchnorm_statistics(bp.finalize(model), images)
    with torch.no_grad():
        accuracy = float((plain(held_out).argmax(1) == held_out_labels).double().mean())
    return plain, Result(accuracy, bp.sparsity(bp.read_masks(model)), computation, seconds, spent)


def with_batchnorm_statistics(model: nn.Module, images: Tensor) -> nn.Module:
    """The model in evaluation mode with the statistics of all training images: running averages lag behind where blocks have just gone."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def mean_and_spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):5.1f} +- {100 * spread:3.1f}"


def draw(results: Mapping[tuple[str, float], list[Result]], title: str, path: Path) -> None:
    """Accuracy against the computation of training."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, sparsity in zip(figure.subplots(1, len(SPARSITIES), sharey=True), SPARSITIES, strict=True):
        for number, name in enumerate(name for name in METHODS if (name, sparsity) in results):
            runs = results[name, sparsity]
            accuracies = [100 * run.accuracy for run in runs]
            error = statistics.stdev(accuracies) if len(runs) > 1 else 0.0
            x, y = statistics.mean(run.computation for run in runs), statistics.mean(accuracies)
            color = "black" if name == "dense" else f"C{(number - 1) % 10}"
            axes.errorbar([x], [y], [error], fmt="o^sDvPX*<>h"[number % 11], color=color, capsize=3, label=name)
        axes.set(title=f"{title}, {sparsity:.0%} of the blocks pruned", xlabel="computation in pruned layers / dense training")
    figure.axes[0].set_ylabel("accuracy (%)")
    figure.axes[-1].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="digits")
    parser.add_argument("--block", type=int, default=4, help="rows and columns of a block")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--tiny", action="store_true", help="three epochs, one seed")
    options = parser.parse_args()
    problem, seeds = PROBLEMS[options.problem], 1 if options.tiny else options.seeds
    task = Task(problem, options.block, options.split, 3 if options.tiny else problem.epochs)
    title = f"{options.problem}, {options.block}x{options.block}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results: dict[tuple[str, float], list[Result]] = {}
    try:
        print(
            f"{title}, {task.epochs} epochs, seeds 0 to {seeds - 1}; accuracy on {options.split} images (%), mean +- standard deviation\n"
        )
        print("method             pruned    accuracy   computation   seconds   in the method")
        for name in options.methods:
            if METHODS[name] is distilled:
                for seed in range(seeds):
                    teacher_of(task, seed)  # here, so that its training is not part of a run
            for sparsity in (0.0,) if name == "dense" else SPARSITIES:
                runs = [trained(METHODS[name], sparsity, seed, task)[1] for seed in range(seeds)]
                for target in SPARSITIES if name == "dense" else (sparsity,):
                    results[name, target] = runs
                mean = {field: statistics.mean(getattr(run, field) for run in runs) for field in ("sparsity", "computation", "seconds")}
                share = statistics.mean(run.update_seconds / run.seconds for run in runs)
                accuracy = mean_and_spread([run.accuracy for run in runs])
                cost = f"{mean['computation']:11.2f}   {mean['seconds']:7.1f}   {share:13.1%}"
                print(f"{name:17} {mean['sparsity']:7.1%}   {accuracy}   {cost}", flush=True)
    finally:
        torch.set_num_threads(threads)
    if options.picture:
        draw(results, title, options.picture)
    print(f"\nIn short: {in_short(results)}")


def in_short(results: Mapping[tuple[str, float], list[Result]]) -> str:
    """The answer in a sentence, from the numbers."""
    sentences = []
    for sparsity in SPARSITIES:
        means = {name: 100 * statistics.mean(run.accuracy for run in results[name, sparsity]) for name, s in results if s == sparsity}
        pruned = {name: mean for name, mean in means.items() if name != "dense"}
        if {"dense", "static random", "RigL"} <= means.keys():
            best = max(pruned, key=pruned.__getitem__)
            sentences.append(
                f"at {sparsity:.0%} {best} is best with {pruned[best]:.1f} (dense {means['dense']:.1f}), RigL has {pruned['RigL']:.1f} "
                f"and a static random mask {pruned['static random']:.1f}"
            )
    return "; ".join(sentences) or "not all methods ran"


if __name__ == "__main__":
    main()
