"""Repair by gradients, one layer at a time: the kept weights learn the dense layer's outputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blockprune.core.types import BlockMask
from blockprune.model.masking import mask_blocks


def finetune_layer(
    run: Callable[[Mapping[str, Tensor], Any], Tensor],
    parameters: Mapping[str, Tensor],
    masks: Mapping[str, BlockMask],
    batches: Sequence[Any],
    targets: Sequence[Tensor],
    *,
    epochs: int = 8,
    lr: float = 1e-4,
    held_out: float = 0.125,
    patience: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Tune a layer's kept weights towards the dense layer's outputs, by Adam on the mean squared error (EBFT, Guo et al. 2402.12419).

    The masks stay as they are. Give it to `sequential` as ``finetune=``, with options bound by ``functools.partial``; it runs after
    ``reconstruct``.

    Args:
        run: (parameters, batch) -> the layer's output on one batch.
        parameters: the parameters to start from, by the layer's own names; those with a mask are tuned.
        masks: by the same names.
        batches: the layer's inputs, in any form that ``run`` takes.
        targets: the dense layer's output for each batch.
        epochs: the most passes over the batches.
        lr: Adam's learning rate; it falls to 0 along a cosine.
        held_out: the share of the batches, the last ones and at least one, on which tuning is not done but stopped; 0 tunes on all
            batches and keeps the last epoch's weights.
        patience: epochs without a lower error on the held-out batches before tuning stops. The best epoch's weights are returned, or the
            given ones if no epoch is better.
        seed: of the order of the batches.

    Raises:
        ValueError: a held_out share that leaves no batch to learn from; NaN or inf in the error of a batch.

    Example:
        >>> x, dense = torch.randn(8, 16, 4), torch.randn(4, 4)
        >>> mask = bp.BlockMask(torch.tensor([[True, False], [True, True]]), bp.BlockGrid((4, 4), (2, 2)))
        >>> run = lambda parameters, batch: batch @ parameters["weight"].mT
        >>> targets = [batch @ dense.mT for batch in x]
        >>> tuned = bp.finetune_layer(run, {"weight": dense}, {"weight": mask}, list(x), targets, lr=0.1)
        >>> tuned["weight"][:2, 2:].count_nonzero().item()
        0
    """
    count = _training_batches(len(targets), held_out)
    layer = _MaskedLayer(run, parameters, masks)
    values = layer.trainable()
    if not masks or not epochs:
        return layer.weights(values)
    training, validation = (list(zip(batches[part], targets[part], strict=True)) for part in (slice(count), slice(count, None)))

    def validation_error() -> float:
        with torch.no_grad():
            return sum(_checked(layer.error(values, *pair), count + i).item() for i, pair in enumerate(validation))

    best, least, worse_epochs = _copies(values), validation_error(), 0
    optimizer = torch.optim.Adam(values.values(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * count)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            for i in torch.randperm(count, generator=generator).tolist():
                loss = _checked(layer.error(values, *training[i]), i)
                gradients = torch.autograd.grad(loss, list(values.values()), allow_unused=True)  # not of the layer's other parameters
                for value, gradient in zip(values.values(), gradients, strict=True):
                    value.grad = gradient
                optimizer.step()
                schedule.step()
            error = validation_error()
            worse_epochs = 0 if error < least else worse_epochs + 1
            if error < least or not validation:
                best, least = _copies(values), error
            elif worse_epochs > patience:
                break
    return layer.weights(best)


def _checked(error: Tensor, batch_number: int) -> Tensor:
    if not error.isfinite():
        raise ValueError(
            f"finetune_layer: the error of the layer's output on batch {batch_number} is {error.item()}; check that batch and its target "
            "for NaN and inf, or give a smaller lr"
        )
    return error


def _training_batches(total: int, held_out: float) -> int:
    """How many batches are tuned on."""
    share = held_out if 0 <= held_out < 1 else 1
    count = total - (max(1, round(share * total)) if held_out else 0)
    if count < 1:
        raise ValueError(
            f"held_out={held_out} of {total} batches leaves none to learn from; give more batches, or held_out=0 to hold none out"
        )
    return count


class _MaskedLayer:
    """A layer as a function of the weights that have a mask; these are trained in float32, where small steps do not round away."""

    def __init__(
        self, run: Callable[[Mapping[str, Tensor], Any], Tensor], parameters: Mapping[str, Tensor], masks: Mapping[str, BlockMask]
    ) -> None:
        self.run, self.parameters, self.masks = run, parameters, masks
        self.keep = {name: mask.keep.to(parameters[name].device) for name, mask in masks.items()}

    def trainable(self) -> dict[str, Tensor]:
        """Copies of the weights to tune."""
        weights = {name: self.parameters[name].detach() for name in self.masks}
        return {name: w.to(torch.promote_types(w.dtype, torch.float32), copy=True).requires_grad_(True) for name, w in weights.items()}

    def weights(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masked weights, in the layer's dtypes."""
        return {name: mask_blocks(v.to(self.parameters[name].dtype), self.keep[name], self.masks[name].grid) for name, v in values.items()}

    def error(self, values: Mapping[str, Tensor], batch: Any, target: Tensor) -> Tensor:
        """The mean squared error of the output."""
        difference = self.run({**self.parameters, **self.weights(values)}, batch) - target
        return difference.to(torch.promote_types(difference.dtype, torch.float32)).square().mean()


def _copies(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}
