"""Pruning while a `transformers.Trainer` trains."""

import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import nn
from transformers import TrainerCallback

from blockprune.core.arguments import check_counts, check_function
from blockprune.core.masks import sparsity
from blockprune.core.pipeline import as_code
from blockprune.core.types import Masks, Weights, masks_and_weights
from blockprune.model.apply import apply_masks, finalize
from blockprune.model.mask_reading import parameter_masks
from blockprune.recipes import LayerByLayer


class GradualPruning(TrainerCallback):
    """A callback of `transformers.Trainer` that gives the model new masks every ``every`` optimizer steps.

    With a rising schedule this is gradual pruning (AGP, Zhu & Gupta 1710.01878). With a constant one the masks are dynamic: a `Pipeline`
    scores the stored dense weights, so a pruned block can come back, with the weights that are stored for it: those that it had when it was
    pruned, as far as the optimizer's momentum and weight decay have not changed them.

    Pass it to the constructor of the Trainer: the model then has masks before a checkpoint is loaded, so ``resume_from_checkpoint``
    continues with the masks and the dense weights of the checkpoint. ``trainer.save_model`` writes both.

    With ``load_best_model_at_end=True`` the best checkpoint may be of a step at which the masks pruned less. The callback warns if the
    model at the end is less sparse than the last update made it.

    Args:
        prune: (model, sparsity) -> masks, such as a `Pipeline`, or a result with ``masks`` and ``weights``, such as that of a recipe. A
            recipe that works layer by layer (`recipes.obs`, `recipes.sparsegpt`) is called with a finalized copy of the model, in which the
            blocks that are pruned at present are zeros.
        schedule: step -> sparsity; see `blockprune.schedule`. Steps count optimizer updates and go on after a resume.
        every: steps from one update of the masks to the next.
        end: the last step at which masks are updated, which may be a whole float such as ``0.8 * 1000``; None for the whole training.
        straight_through, decay: as in `apply_masks`.

    Raises:
        TypeError: ``prune`` or ``schedule`` is no function.
        ValueError: ``every`` or ``end`` is no whole number from 1 on; in training, a checkpoint with masks was loaded into a model without.

    Example:
        >>> from blockprune.hf import GradualPruning
        >>> prune = bp.Pipeline(partial(bp.collect.weights, where=bp.linears((16, 16))), bp.metric.l1, bp.allocate.per_layer)
        >>> callback = GradualPruning(prune, partial(bp.schedule.cubic, final=0.5, end=1000), every=100, end=1000)
        >>> print(callback)
        GradualPruning(prune=Pipeline(...), schedule=cubic(final=0.5, end=1000), every=100, end=1000)
        >>> trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self,
        prune: Callable[[Any, float], Any],
        schedule: Callable[[int], float],
        *,
        every: int = 1,
        end: int | None = None,
        straight_through: bool = False,
        decay: float = 0.0,
    ) -> None:
        check_function("prune", prune, "(model, sparsity) -> masks, such as a Pipeline")
        check_function("schedule", schedule, "step -> sparsity, such as partial(bp.schedule.cubic, final=0.5, end=1000)")
        (every,) = check_counts(1, whole_floats=True, every=every)
        (end,) = check_counts(1, optional=True, whole_floats=True, end=end)
        self.prune, self.schedule, self.every, self.end = prune, schedule, every, end
        self.straight_through, self.decay = straight_through, decay
        self.last_sparsity = 0.0  # of the masks of the last update, or of the checkpoint from which training resumed

    def __repr__(self) -> str:
        values = [(name, getattr(self, name), option.default) for name, option in signature(GradualPruning).parameters.items()]
        code = ", ".join(f"{name}={as_code(value)}" for name, value, default in values if value is not default)
        return f"{type(self).__name__}({' '.join(code.split()).replace('( ', '(').replace(', )', ')')})"

    def on_init_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Put masks on a plain model, so that a checkpoint's masks can be loaded."""
        if not parameter_masks(options["model"]):
            self._update(options["model"], 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Pass gradients as the options say, also to a model that had masks before; raise if a checkpoint was loaded into one without."""
        masks = parameter_masks(options["model"])
        if masks:
            self._apply_masks(options["model"], masks)
        elif state.global_step:
            raise ValueError(
                f"training resumes at step {state.global_step}, but the model has no masks, so those of the checkpoint are lost; "
                "pass this callback to Trainer(callbacks=[...]) instead of trainer.add_callback, and a model instead of model_init"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Update the masks before the optimizer step, if it is time to."""
        if self._is_update(state.global_step):
            self._update(options["model"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Reach the sparsity of the last step, if the schedule has risen since the last update."""
        step = state.global_step
        last_update = next((i for i in range(step - 1, -1, -1) if self._is_update(i)), None)
        is_ended = self.end is not None and step > self.end
        if last_update is not None and not is_ended and self.schedule(step) != self.schedule(last_update):
            self._update(options["model"], step)
        present = sparsity(parameter_masks(options["model"]))
        if args.load_best_model_at_end and present < self.last_sparsity:
            warnings.warn(
                f"the masks of the model prune {present:.1%} at the end of the training, and the last update pruned "
                f"{self.last_sparsity:.1%}: load_best_model_at_end=True has loaded {state.best_model_checkpoint}, which is of an earlier "
                "step; train with load_best_model_at_end=False, or load the best of the checkpoints that have the final sparsity",
                stacklevel=2,
            )

    def _is_update(self, step: int) -> bool:
        return step == self.end or (step % self.every == 0 and (self.end is None or step < self.end))

    def _update(self, model: nn.Module, step: int) -> None:
        needs_plain_model = isinstance(self.prune, LayerByLayer) and bool(parameter_masks(model))
        result = self.prune(finalize(model) if needs_plain_model else model, self.schedule(step))
        masks, weights = masks_and_weights(result, "prune")
        self._apply_masks(model, masks, weights)

    def _apply_masks(self, model: nn.Module, masks: Masks, weights: Weights | None = None) -> None:
        apply_masks(model, masks, weights, straight_through=self.straight_through, decay=self.decay)
        self.last_sparsity = sparsity(parameter_masks(model))
