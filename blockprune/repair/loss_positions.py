"""What a loss reads of a batch: its labels, its padding, and the mean over the positions that count."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blockprune.model.calibration import inputs_of

IGNORED = -100  # the label that Hugging Face and `F.cross_entropy` leave out


def entry(output: Any, name: str) -> Any:
    """What a model's output has under this name, or None.

    Example:
        >>> from blockprune.repair.loss_positions import entry
        >>> entry({"logits": 1}, "logits"), entry(None, "logits")
        (1, None)
    """
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def decoder_batch(output: Any, batch: Any) -> Any:
    """The batch as the decoder sees it, where the output is that of an encoder and a decoder."""
    inputs = inputs_of(batch)
    if not isinstance(inputs, Mapping) or isinstance(output, Tensor) or entry(output, "encoder_last_hidden_state") is None:
        return batch
    renamed = {name: inputs[f"decoder_{name}"] for name in ("input_ids", "attention_mask") if f"decoder_{name}" in inputs}
    return {**renamed, **{name: x for name, x in inputs.items() if name == "labels"}}


def encoder_batch(batch: Any) -> Any:
    """The batch as the encoder sees it: without the labels, which belong to positions of the decoder.

    Example:
        >>> from blockprune.repair.loss_positions import encoder_batch
        >>> encoder_batch({"attention_mask": 1, "labels": 2})
        ({'attention_mask': 1},)
    """
    inputs = inputs_of(batch)
    return ({name: x for name, x in inputs.items() if name != "labels"} if isinstance(inputs, Mapping) else inputs,)


def labels_of(batch: Any) -> Tensor | None:
    """The labels of a batch: its own, or the input tokens."""
    labels = own_labels(batch)
    if labels is not None:
        return labels
    inputs = inputs_of(batch)
    has_target = (inputs is not batch and len(batch) > 1) or (isinstance(inputs, Mapping) and inputs.get("labels") is not None)
    return None if has_target else tokens_of(batch)  # a target of other numbers is no label


def own_labels(batch: Any) -> Tensor | None:
    """The labels of a batch, not its input tokens."""
    inputs = inputs_of(batch)
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if labels is None and inputs is not batch and len(batch) > 1:
        labels = batch[1]
    return labels if isinstance(labels, Tensor) and not labels.is_floating_point() else None


def tokens_of(batch: Any) -> Tensor | None:
    """The input tokens of a batch, or None."""
    inputs = inputs_of(batch)
    tokens = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    return tokens if isinstance(tokens, Tensor) and not tokens.is_floating_point() else None


def are_next_tokens(labels: Tensor, batch: Any) -> bool:
    """Whether labels repeat the input tokens at half of all positions, so that logits predict the label of the next position."""
    if not _are_tokens(labels, batch):
        return False
    attention = attention_of(labels, batch)
    attended = torch.ones_like(labels, dtype=torch.bool) if attention is None else attention.to(labels.device) != 0
    return bool(2 * ((labels != IGNORED) & attended).sum() >= attended.sum())


def check_shift(loss: str, labels: Tensor | None, batch: Any, shift: bool | None) -> None:
    """Raise if nobody said whether labels belong to the next position, and the labels do not tell.

    Raises:
        ValueError: that, or labels without positions that shall be shifted.
    """
    if not (shift is None or isinstance(shift, bool)):
        raise ValueError(f"{loss}: shift={shift!r} must be True, False or None")
    if labels is None:
        return
    if shift and labels.ndim < 2:
        raise ValueError(f"{loss}: shift=True needs labels [batch, positions], not {tuple(labels.shape)}")
    is_unclear = shift is None and _are_tokens(labels, batch) and not are_next_tokens(labels, batch)
    if is_unclear and (labels != IGNORED).any():
        raise ValueError(
            f"{loss}: the labels equal the input tokens, but fewer than half of the positions have a label; give shift=True for a causal "
            f"language model whose prompts have no labels, or shift=False for a masked one: partial(losses.{loss}, shift=True)"
        )


def _are_tokens(labels: Tensor, batch: Any) -> bool:
    """Whether labels equal the input tokens wherever there is a label."""
    tokens = tokens_of(batch)
    if tokens is None or tokens.shape != labels.shape or labels.ndim < 2:
        return False
    return bool(((labels == tokens.to(labels.device)) | (labels == IGNORED)).all())


def attention_of(x: Tensor, batch: Any, *, must_fit: bool = True) -> Tensor | None:
    """The attention mask of a batch for numbers by position, ``[batch, positions, ...]``; None if there is none for them.

    A mask of other positions than the numbers is an error if it must fit. Otherwise it is ignored, as for labels of words and a mask of
    speech frames.
    """
    inputs = inputs_of(batch)
    if not isinstance(inputs, Mapping) or x.ndim < 2:  # numbers by sample have no padding
        return None
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    if mask.shape != x.shape[:2]:
        if not must_fit:
            return None
        raise ValueError(
            f"the attention mask {tuple(mask.shape)} has different positions than the output {tuple(x.shape[:2])}, so its padding cannot "
            "be left out; compare outputs of these positions, or give a batch without the mask"
        )
    return mask


def mean(values: Tensor, batch: Any, shift: bool | None = None) -> Tensor:
    """The mean of numbers by position over all positions that count.

    Raises:
        ValueError: none counts.

    Example:
        >>> from blockprune.repair.loss_positions import mean
        >>> mean(torch.tensor([[1.0, 9.0]]), {"attention_mask": torch.tensor([[1, 0]])})
        tensor(1.)
    """
    return mean_of_counted(values, _counted(values, batch, shift))


def mean_of_counted(values: Tensor, counted: Tensor | None) -> Tensor:
    """The mean of the numbers that count, given as bool of their first axes; of all for None.

    Raises:
        ValueError: none counts.

    Example:
        >>> from blockprune.repair.loss_positions import mean_of_counted
        >>> mean_of_counted(torch.tensor([1.0, 9.0]), torch.tensor([True, False]))
        tensor(1.)
    """
    if counted is None:
        return values.mean()
    counted = counted.to(values.device).reshape(*counted.shape, *[1] * (values.ndim - counted.ndim)).expand_as(values)
    if not counted.any():
        raise ValueError("no position of this batch counts: each is padding (attention_mask 0) or has the label -100")
    return values.masked_fill(~counted, 0).sum() / counted.sum()


def _counted(values: Tensor, batch: Any, shift: bool | None) -> Tensor | None:
    """Which positions count, ``[batch, positions]`` bool; None if all do."""
    attention = attention_of(values, batch)
    counted = None if attention is None else attention != 0
    labels = own_labels(batch)
    if labels is not None and labels.shape == values.shape:
        has_label = labels != IGNORED
        if are_next_tokens(labels, batch) if shift is None else shift:  # a position counts if the next one has a label
            has_label = F.pad(has_label[:, 1:], (0, 1), value=False)
        counted = has_label if counted is None else counted.to(has_label.device) & has_label
    return counted
