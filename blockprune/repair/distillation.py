"""`distill`: the kept weights of a whole model learn what the dense model gives."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockprune.core.arguments import check_counts, check_model, check_seed
from blockprune.core.patterns import Pattern
from blockprune.core.precision import forget_casts
from blockprune.core.progress import progress_bar, show_values
from blockprune.core.types import Masks, Weights, Where
from blockprune.model.calibration import Forward, default_forward, several_batches
from blockprune.model.mask_reading import read_masks
from blockprune.model.running import PutBack, cuda_devices, preserve_state
from blockprune.repair.batch_stream import BatchStream, keep_generators, size_of
from blockprune.repair.distill_loss import DistillLoss, loss_of
from blockprune.repair.distill_options import (
    check_functions,
    check_options,
    check_schedule,
    checkpointing_method,
    length,
    optimizers_of,
    steps_of_one_pass,
)
from blockprune.repair.optimizers import limit_gradients
from blockprune.repair.student import Student, make_student

MakeOptimizer = Callable[[list[Tensor]], Optimizer | list[Optimizer]]
ADAMW = partial(torch.optim.AdamW, lr=3e-4)


@attrs.frozen(eq=False, repr=False)
class DistillState:
    """How far `distill` has come.

    ``torch.save(attrs.asdict(state, recurse=False), path)`` writes it to a file, and
    ``bp.DistillState(**torch.load(path, weights_only=True))`` reads it.

    Args:
        step: optimizer steps done.
        count: tokens trained on; samples where the batches have no tokens.
        weights: the masked weights after this step.
        best: the weights that `distill` would return: those of the lowest held-out loss, or the present ones.
        best_loss: the lowest held-out loss; None without held-out batches.
        history: (step, count, mean training loss since the last entry, held-out loss), an entry for each evaluation, the first before
            training; what does not exist is None.
        internals: what ``resume=`` needs besides: what is trained, the masks, the optimizer, torch's random number generators, the place
            in the batches.

    Example:
        >>> import copy
        >>> states, model, x = [], nn.Linear(4, 2), torch.randn(8, 4)
        >>> options = {"teacher": copy.deepcopy(model), "loss": bp.losses.hidden_states, "steps": 2, "every": 1}
        >>> weights = bp.distill(model, {}, {}, [x], **options, callback=states.append)
        >>> states[0]
        DistillState(step 1, 8 samples, 2 weights, held-out loss None)
        >>> again = bp.distill(model, {}, {}, [x], **options, resume=states[0])
        >>> all(torch.equal(weights[name], again[name]) for name in weights)
        True
    """

    step: int
    count: int
    weights: Weights
    best: Weights
    best_loss: float | None
    history: tuple[tuple[int, int, float | None, float | None], ...]
    internals: Mapping[str, Any]

    def __repr__(self) -> str:
        unit = self.internals["unit"]
        return f"DistillState(step {self.step}, {self.count} {unit}, {len(self.weights)} weights, held-out loss {self.best_loss})"


def _check_resume(resume: Any) -> None:
    if resume is not None and not isinstance(resume, DistillState):
        raise TypeError(
            f"resume has the type {type(resume).__name__}; give a DistillState: bp.DistillState(**torch.load(path, weights_only=True)) "
            "reads one from a file"
        )


def distill(
    model: nn.Module,
    masks: Masks | None,
    weights: Weights | None,
    batches: Iterable[Any],
    *,
    teacher: nn.Module | None,
    loss: DistillLoss,
    optimizer: MakeOptimizer = ADAMW,
    steps: int | None = None,
    warmup: int = 0,
    final_lr: float = 0.0,
    accumulate: int = 1,
    clip: float | None = 1.0,
    where: Where | Pattern | Sequence[Pattern] | None = None,
    lora_rank: int | None = None,
    train: bool = False,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    held_out: Iterable[Any] | None = None,
    every: int = 100,
    patience: int | None = None,
    seed: int = 0,
    forward: Forward = default_forward,
    progress: bool | None = None,
    callback: Callable[[DistillState], None] | None = None,
    resume: DistillState | None = None,
) -> dict[str, Tensor]:
    """Train the kept weights of a pruned model towards a teacher (knowledge distillation, Hinton et al. 1503.02531).

    A masked copy of the model is trained; the model and the teacher stay as they are. Give the result to `apply_masks` together with the
    masks: pruned elements are exactly zero in it.

    Only torch's random numbers are controlled: ``seed`` sets its generators, and the generator of a DataLoader or sampler is restored at
    the end. Python's and NumPy's generators are not set or recorded; if a dataset or sampler uses them, set them yourself.

    Args:
        model: the model that was pruned, or a masked model; or a block-sparse one, ``export.block_sparse(masked, trainable=True)``, with
            masks None: then its kept values are among the weights, and ``apply_masks(model, None, weights)`` sets them.
        masks: by parameter name; None for the masks that are on the model.
        weights: the weights to start from where they are not the model's own, such as those of a recipe; or None.
        batches: the training batches, a list or a DataLoader, used in order and repeated until ``steps`` is reached. Random numbers
            that persistent workers draw themselves, as in augmentations, differ after ``resume``; with ``persistent_workers=False`` they
            do not.
        teacher: the dense model, which may be ``model`` itself if that has no masks; None if the loss needs none.
        loss: (student's output, teacher's output, batch) -> one number, such as `losses.kl`.
        optimizer: parameters -> optimizer of all of them, such as ``partial(torch.optim.SGD, lr=0.1)``, or a list of optimizers that
            share them out, such as `muon`; their learning rates are the highest ones. By default AdamW with a learning rate of 3e-4.
        steps: optimizer steps; by default one pass over the batches.
        warmup: steps in which the learning rate rises linearly from near 0, 0 to ``steps``; then it falls along a cosine.
        final_lr: what the learning rate falls to, as a share of the highest, 0 to 1; 1 leaves it constant.
        accumulate: batches whose gradients are averaged for one step.
        clip: the largest norm of the gradient of all parameters; None for no limit.
        where: which parameters are trained: a rule such as `norms_and_biases`, or names or patterns of names. By default all of
            floating-point numbers, frozen ones included; with ``lora_rank`` the masked ones, norms and biases.
        lora_rank: train masked matrices as ``mask * (W + B A)`` with factors of this rank, and return the product (PERP, 2312.15230).
        train: run the student in training mode, with dropout. Batch norms use their running statistics in any case; and as only weights
            are returned, buffers that a forward changes, such as the range of a quantizer, are put back after each step.
        autocast: the dtype of `torch.autocast` for both models, such as ``torch.bfloat16``.
        checkpointing: compute activations again in the backward, which takes less memory and more time. It needs ``train=True`` and a
            model with ``gradient_checkpointing_enable`` (Hugging Face).
        held_out: batches that are not trained on. The weights with the lowest mean loss on them are returned.
        every: steps from one evaluation on the held-out batches, and call of ``callback``, to the next.
        patience: evaluations in a row without a lower held-out loss that are allowed; one more ends the training. None never ends it.
        seed: of dropout, of the factors of ``lora_rank``, and of DataLoaders that shuffle without a generator of their own.
        forward: (model, batch) -> output, for both models; by default as in `Calibration`.
        progress: show a progress bar; by default in a terminal and in a notebook.
        callback: called with a `DistillState` every ``every`` steps and at the end.
        resume: such a state; with the same other arguments, the result has the same bits as that of an uninterrupted call.

    Raises:
        KeyError, ValueError, TypeError: as `apply_masks`, for masks and weights.
        ValueError: batches that run out, a loss or gradient that is NaN or inf, a loss that has no gradient, options that do not fit each
            other or the model, an optimizer without some of the parameters, a model that ``fully_shard`` has sharded or accelerate has
            offloaded, a block-sparse model whose kept weights are frozen, without a choice of what is trained.
        TypeError: ``batches`` that is one tensor or mapping, a teacher that is no module, a loss that does not take these three arguments
            or returns no tensor.

    Example:
        >>> import copy
        >>> model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 8)
        >>> masks = bp.recipes.magnitude(bp.linears((4, 4)))(model, 0.5).masks
        >>> optimizer = partial(torch.optim.AdamW, lr=1e-2)
        >>> weights = bp.distill(model, masks, None, [x], teacher=model, loss=bp.losses.kl, optimizer=optimizer, steps=20)
        >>> pruned, recovered = (bp.apply_masks(copy.deepcopy(model), masks, w) for w in (None, weights))
        >>> bool(bp.losses.kl(recovered(x), model(x)) < bp.losses.kl(pruned(x), model(x)))
        True
    """
    check_model(model)
    check_functions(loss=loss, optimizer=optimizer, forward=forward, callback=callback)
    check_options(model, teacher, seed=seed, train=train, autocast=autocast, checkpointing=checkpointing)
    accumulate, every = check_counts(1, accumulate=accumulate, every=every)
    steps, lora_rank = check_counts(1, optional=True, steps=steps, lora_rank=lora_rank)
    batches = several_batches(batches, forward=forward)
    if length(batches) == 0:
        raise ValueError("batches has no batches; give a list or a DataLoader that has at least one")
    steps = steps_of_one_pass(batches, accumulate) if steps is None else steps
    check_schedule(steps, warmup=warmup, final_lr=final_lr, clip=clip)
    _check_resume(resume)
    (patience,) = check_counts(0, optional=True, patience=patience)
    if patience is not None and held_out is None:
        raise ValueError(f"patience={patience} compares losses on held-out batches; give held_out=, too, or patience=None")
    held_out = None if held_out is None else several_batches(held_out, "held_out", forward=forward)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(cuda_devices(model)), keep_generators(batches):
        torch.manual_seed(check_seed("seed", seed))
        student = make_student(model, masks, weights, where=where, lora_rank=lora_rank)
        if checkpointing and (enable := checkpointing_method(student.module)):
            enable({"use_reentrant": False})
        with contextlib.ExitStack() as stack:
            put_back = [stack.enter_context(preserve_state(student.module, trains=True))]
            put_back += [stack.enter_context(preserve_state(teacher))] if teacher is not None else []
            batch_loss = partial(loss_of, student.module, teacher, forward=forward, loss=loss, autocast=autocast)
            training = _Training(student, optimizer, batches, batch_loss, put_back)
            if resume is None:
                training.compare(held_out)
            else:
                training.restore(resume)
                if training.step > steps:
                    raise ValueError(f"resume: its state is of step {training.step}, after steps={steps}; give more steps")
            bar = progress_bar(range(training.step, steps), "distill", progress, initial=training.step, total=steps)
            start, first = time.monotonic(), training.count
            for step in bar:
                if patience is not None and training.worse > patience:
                    break
                student.set_mode(train)
                training.update(accumulate, clip, _lr_factor(step, steps, warmup, final_lr))
                speed = (training.count - first) / max(time.monotonic() - start, 1e-9)  # clocks may stand still for a while
                show_values(bar, {"loss": f"{training.losses[-1]:.4g}", f"{training.unit}/s": f"{speed:,.0f}"})
                if training.step % every == 0 or training.step == steps:
                    training.compare(held_out)
                    if callback is not None:
                        with torch.random.fork_rng(cuda_devices(student.module)):
                            callback(training.state())
            return dict(training.best())


class _Training:
    """What changes while a student is trained."""

    def __init__(
        self,
        student: Student,
        optimizer: MakeOptimizer,
        batches: Iterable[Any],
        batch_loss: Callable[[Any], Tensor],
        put_back: Sequence[PutBack],
    ) -> None:
        self.student, self.batch_loss, self.put_back = student, batch_loss, put_back
        self.parameters = list(student.trained.values())
        self.optimizers = optimizers_of(optimizer(self.parameters), student.trained)
        self.highest_lrs = [group["lr"] for group in self._groups()]
        self.stream = BatchStream(batches, cuda_devices(student.module))
        self.step, self.count, self.unit = 0, 0, "samples"
        self.best_weights: dict[str, Tensor] | None = None
        self.best_loss: float | None = None
        self.worse = 0  # evaluations since the best
        self.losses: list[float] = []  # of the steps since the last evaluation
        self.history: list[tuple[int, int, float | None, float | None]] = []

    def update(self, accumulate: int, clip: float | None, lr_factor: float) -> None:
        """One optimizer step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        total, empty = 0.0, ""
        for _ in range(accumulate):
            batch = next(self.stream)
            loss = self.batch_loss(batch) / accumulate
            if not loss.requires_grad:
                raise ValueError("the loss does not depend on a parameter that is trained; is something detached, or where= too narrow?")
            loss.backward(inputs=self.parameters)  # not of other tensors, such as the batch
            value = loss.item()
            size, self.unit = size_of(batch)
            if not size and not math.isfinite(value):
                empty = f"batch {self.stream.taken - 1} has no {self.unit}; leave out such batches"
            total += value
            self.count += size
        self._put_buffers_back(quick=bool(self.losses))  # not in the first step after an evaluation
        if not math.isfinite(total):
            raise ValueError(
                f"the training loss is {total} in step {self.step}; "
                + (empty or "check the batches for NaN and inf, or take a lower learning rate")
            )
        if not limit_gradients(self.parameters, clip):
            raise ValueError(
                f"the gradient is NaN or inf in step {self.step}, though the loss is {total}; look for a square root or logarithm of 0, or "
                "take a lower learning rate"
            )
        for group, lr in zip(self._groups(), self.highest_lrs, strict=True):
            group["lr"] = lr * lr_factor
        for optimizer in self.optimizers:
            optimizer.step()
        forget_casts()  # of an autocast around `distill`
        self.step += 1
        self.losses.append(total)

    def compare(self, held_out: Iterable[Any] | None) -> None:
        """Compare the present weights with the best ones on the held-out batches."""
        self._put_buffers_back(quick=False)
        loss = None if held_out is None else self._held_out_loss(held_out)
        if loss is not None:
            is_better = self.best_loss is None or loss < self.best_loss
            self.worse = 0 if is_better else self.worse + 1
            if is_better:
                self.best_weights, self.best_loss = self.student.weights(), loss
        mean = sum(self.losses) / len(self.losses) if self.losses else None
        self.history.append((self.step, self.count, mean, loss))
        self.losses = []

    def _held_out_loss(self, batches: Iterable[Any]) -> float:
        self.student.set_mode(False)
        with torch.no_grad(), torch.random.fork_rng(cuda_devices(self.student.module)), keep_generators(batches):
            losses, empty = [], ""
            for number, batch in enumerate(batches):
                losses.append(float(self.batch_loss(batch)))
                size, unit = size_of(batch)
                empty = f"batch {number} of held_out has no {unit}; leave out such batches" if not size else empty
        self._put_buffers_back(quick=False)
        mean = sum(losses) / len(losses) if losses else math.nan
        if not math.isfinite(mean):
            cause = "the loss of a held-out batch is NaN or inf; " + (empty or "check these batches, or take a lower learning rate")
            none = "held_out has no batches (any more); give a list or a DataLoader, which can be iterated at each evaluation, or None"
            raise ValueError(f"step {self.step}: {cause if losses else none}")
        return mean

    def best(self) -> dict[str, Tensor]:
        """The weights of the lowest held-out loss, or the present ones if none are held out."""
        return self.student.weights() if self.best_weights is None else self.best_weights

    def state(self) -> DistillState:
        """Copies of all that changes."""
        weights = self.student.weights()
        internals = {
            "parameters": {name: p.detach().clone() for name, p in self.student.trained.items()},
            "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers],
            "classes": [type(optimizer).__name__ for optimizer in self.optimizers],
            "stream": self.stream.state(),
            "masks": self._masks(),
            "worse": self.worse,
            "unit": self.unit,
        }
        best = weights if self.best_weights is None else _copies(self.best_weights)
        return DistillState(self.step, self.count, weights, best, self.best_loss, tuple(self.history), internals)

    def restore(self, state: DistillState) -> None:
        """Go on from a state.

        Raises:
            ValueError: a state of other parameters, masks or batches.
        """
        masks, before = self._masks(), state.internals["masks"]
        different = sorted(masks.keys() ^ before.keys()) or [n for n, keep in masks.items() if not torch.equal(keep, before[n].to(keep))]
        if different:
            raise ValueError(f"resume: its state has different masks, such as that of {different[0]!r}; give the masks of the first call")
        classes, saved_classes = [type(optimizer).__name__ for optimizer in self.optimizers], state.internals["classes"]
        if classes != saved_classes:
            raise ValueError(
                f"resume: its state is of {', '.join(saved_classes)}, not {', '.join(classes)}; give optimizer= of the first call"
            )
        self.student.load(state.internals["parameters"])
        for optimizer, saved in zip(self.optimizers, state.internals["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(saved))
        self.stream.restore(state.internals["stream"])
        self.step, self.count, self.unit = state.step, state.count, state.internals["unit"]
        self.best_loss, self.worse, self.history = state.best_loss, state.internals["worse"], list(state.history)
        self.best_weights = None if state.best_loss is None else _copies(state.best)

    def _put_buffers_back(self, *, quick: bool) -> None:
        """Forwards may change buffers, such as the scale of a quantizer or the vectors of ``spectral_norm``: only weights are returned."""
        for put_back in self.put_back:
            put_back(quick=quick)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _masks(self) -> dict[str, Tensor]:
        return {name: mask.keep for name, mask in read_masks(self.student.module).items()}


def _copies(weights: Weights) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in weights.items()}


def _lr_factor(step: int, steps: int, warmup: int, final: float) -> float:
    """The learning rate of a step as a share of the highest: it rises along a line, then falls along a cosine (SGDR, 1608.03983, eq. 5)."""
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
