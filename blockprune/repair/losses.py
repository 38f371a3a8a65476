"""Losses for `distill` and for training loops of your own: (student's output, teacher's output, batch) -> one number.

They read Hugging Face outputs (``logits``, ``hidden_states``, ``last_hidden_state``) and plain tensors, compute in float32 or wider, and
leave out padding: positions whose ``attention_mask`` is 0 and positions whose label is -100.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blockprune.core.arguments import check_counts, check_number
from blockprune.core.precision import SMALLEST, at_least_float32
from blockprune.model.calibration import inputs_of
from blockprune.repair import divergence

__all__ = ["cosine", "cross_entropy", "hidden_states", "kl", "weighted"]

DistillLoss = Callable[[Any, Any, Any], Tensor]  # (student's output, teacher's output, batch) -> one number
IGNORED = -100  # the label that Hugging Face and `F.cross_entropy` leave out


def kl(
    student: Any,
    teacher: Any,
    batch: Any = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    shift: bool | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of the student's predictions from the teacher's, mean over positions (Hinton et al. 1503.02531, eq. 4).

    ``T^2 KL(softmax(teacher / T) || softmax(student / T))``; the factor keeps the size of the gradients when T changes. A class whose logit
    is -inf in the teacher adds nothing.

    Args:
        student: logits ``[batch, classes]`` or ``[batch, positions, classes]``, or an output that has ``logits``.
        teacher: the same of the teacher.
        batch: what the models were called with; it tells which positions are padding, and with labels which positions count.
        temperature: T; higher temperatures give more weight to unlikely classes.
        top_k: compare only the teacher's k most likely classes, and all other classes as one, so that the tail of unlikely classes is
            not learned. It is never more than the whole divergence.
        shift: as in `cross_entropy`; with True a position counts if the next position has a label.

    Raises:
        TypeError: an output without logits.
        ValueError: logits of different shapes or with four or more axes, a temperature that is not positive, ``top_k`` below 1, only
            padding, or labels that need ``shift``.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> bp.losses.kl(logits, logits).item()
        0.0
        >>> round(bp.losses.kl(torch.zeros(1, 3), logits).item(), 3), round(bp.losses.kl(torch.zeros(1, 3), logits, top_k=1).item(), 3)
        (0.574, 0.557)
    """
    check_number("temperature", temperature, "a number above 0", above=0)
    if top_k is not None:
        check_counts(1, top_k=top_k)
    q, p = _logits(student, "student"), _logits(teacher, "teacher")
    _check_shapes("kl", "logits", q, p)
    if q.ndim > 3:
        raise ValueError(
            f"kl: the logits have shape {tuple(q.shape)}, and which axis is that of the classes is not known; give a forward that returns "
            "logits [batch, positions, classes], for an image model model(batch).flatten(2).mT"
        )
    batch = _decoder_batch(student, batch)
    _check_shift("kl", _own_labels(batch), batch, shift)
    p = p.to(q.device)
    top_k = None if top_k is None or top_k >= p.shape[-1] else top_k
    return temperature**2 * _mean(divergence.of_logits(q, p, temperature, top_k), batch, shift)


def hidden_states(student: Any, teacher: Any, batch: Any = None) -> Tensor:
    """Squared error of the hidden states relative to the teacher's own square, mean over layers (SquareHead, Kurtic et al. 2310.06927).

    ``mean over layers of |student - teacher|^2 / |teacher|^2``, so that layers count equally, whatever the size of their hidden states.

    Args:
        student: an output that has ``hidden_states`` (call the model with ``output_hidden_states=True``), hidden states
            ``[batch, positions, width]``, or a sequence of them.
        teacher: the same of the teacher.
        batch: what the models were called with; it tells which positions are padding.

    Raises:
        TypeError: an output without hidden states.
        ValueError: hidden states of different numbers or shapes, or only padding.

    Example:
        >>> teacher = [torch.ones(1, 2, 4), 100 * torch.ones(1, 2, 4)]
        >>> bp.losses.hidden_states([0.5 * x for x in teacher], teacher).item()
        0.25
    """
    xs, ys = _hidden_states(student, "student"), _hidden_states(teacher, "teacher")
    if len(xs) != len(ys) or not xs:
        raise ValueError(f"hidden_states: the student has {len(xs)} hidden states and the teacher {len(ys)}; choose the layers to compare")
    batch = _decoder_batch(student, batch)
    return torch.stack([_relative_error(x, y, batch) for x, y in zip(xs, ys, strict=True)]).mean()


def _relative_error(student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
    _check_shapes("hidden_states", "hidden states", student, teacher)
    x, y = at_least_float32(student), at_least_float32(teacher.to(student.device))
    if x.ndim < 2:  # one vector
        x, y = x.view(1, -1), y.view(1, -1)
    return _mean((x - y).square().mean(-1), batch) / _mean(y.square().mean(-1), batch).clamp_min(SMALLEST)


def cross_entropy(student: Any, teacher: Any, batch: Any, *, shift: bool | None = None) -> Tensor:
    """Cross-entropy of the labels; the teacher is not used.

    Labels are the ``labels`` of a mapping, the second element of a tuple, or, without either, the input tokens. A label counts if neither
    it nor the position that predicts it is padding.

    Args:
        student: logits ``[..., classes]``, or an output that has ``logits``.
        teacher: anything.
        batch: what the model was called with.
        shift: True compares labels with the logits of the position before them (causal language models), False with those of their own
            position. None shifts if the labels equal the input tokens wherever they are not -100, and at least half of the positions that
            are not padding have a label. Labels that equal the input tokens at fewer positions could be either, which is an error.

    Raises:
        TypeError: an output without logits, or a batch without labels or tokens.
        ValueError: labels of another shape than the positions, only labels of -100, or labels that need ``shift``.

    Example:
        >>> logits = torch.zeros(1, 3, 50)
        >>> round(bp.losses.cross_entropy(logits, None, {"input_ids": torch.tensor([[4, 7, 9]])}).exp().item(), 3)
        50.0
    """
    logits, batch = _logits(student, "student"), _decoder_batch(student, batch)
    labels = _labels(batch)
    if labels is None:
        raise TypeError(
            f"cross_entropy: the batch has the type {type(batch).__name__} and no labels; give a mapping with 'labels' or 'input_ids', or "
            "a tuple (inputs, labels)"
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy: the logits {tuple(logits.shape)} need labels {tuple(logits.shape[:-1])}, not {tuple(labels.shape)}"
        )
    labels = labels.to(logits.device)
    _check_shift("cross_entropy", labels, batch, shift)
    is_shifted = _are_next_tokens(labels, batch) if shift is None else shift
    if (attention := _attention(labels, batch, must_fit=is_shifted)) is not None:
        is_padding = attention.to(labels.device) == 0
        labels = labels.masked_fill(is_padding | F.pad(is_padding[:, :-1], (1, 0)) if is_shifted else is_padding, IGNORED)
    if is_shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(at_least_float32(logits).flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED)
    counted = labels.flatten() != IGNORED
    if not counted.any():
        raise ValueError("cross_entropy: no label of this batch counts; all are -100 or padding")
    return loss.sum() / counted.sum()


def cosine(student: Any, teacher: Any, batch: Any = None) -> Tensor:
    """One minus the cosine between the student's and the teacher's embeddings, mean over the samples.

    Args:
        student: embeddings ``[samples, width]`` (with three axes, each vector along the last counts), or an output that has
            ``last_hidden_state``, whose mean over all positions but padding is the embedding.
        teacher: the same of the teacher.
        batch: what the models were called with; it tells which positions are padding.

    Raises:
        TypeError: an output without ``last_hidden_state``.
        ValueError: embeddings of different shapes, or with four or more axes, as those of image models.

    Example:
        >>> bp.losses.cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
        1.0
    """
    x, y = _embeddings(student, batch, "student"), _embeddings(teacher, batch, "teacher")
    _check_shapes("cosine", "embeddings", x, y)
    if x.ndim > 3:
        raise _no_embeddings("student", x)
    distance = 1 - F.cosine_similarity(at_least_float32(x), at_least_float32(y.to(x.device)), dim=-1)
    return _mean(distance, batch)


def weighted(terms: Mapping[DistillLoss, float]) -> DistillLoss:
    """A loss that is the weighted sum of others.

    Raises:
        ValueError: no terms.

    Example:
        >>> loss = bp.losses.weighted({bp.losses.kl: 1.0, bp.losses.cross_entropy: 0.5})
        >>> logits, batch = torch.zeros(1, 3, 2), torch.tensor([[0, 1, 1]])
        >>> loss(logits, logits, batch).item() == 0.5 * bp.losses.cross_entropy(logits, None, batch).item()
        True
    """
    if not terms:
        raise ValueError("weighted: terms is empty; give at least one loss and its weight, such as {losses.kl: 1.0}")
    return partial(_weighted_sum, terms=tuple(terms.items()))


def _weighted_sum(student: Any, teacher: Any, batch: Any, *, terms: Sequence[tuple[DistillLoss, float]]) -> Tensor:
    return torch.stack([weight * loss(student, teacher, batch) for loss, weight in terms]).sum()


# What outputs and batches hold


def _entry(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _logits(output: Any, who: str) -> Tensor:
    logits = output if isinstance(output, Tensor) else _entry(output, "logits")
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the {who}'s output ({_kind(output)}) has no logits; use a model with a head, or a forward that returns the logits as a tensor"
        )
    return logits


def _hidden_states(output: Any, who: str) -> Sequence[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    states = output if type(output) in (tuple, list) else _entry(output, "hidden_states")
    if not isinstance(states, (tuple, list)) or not all(isinstance(x, Tensor) for x in states):
        raise TypeError(
            f"the {who}'s output ({_kind(output)}) has no hidden_states; call the model with output_hidden_states=True, in distill with "
            "forward=lambda model, batch: model(**batch, output_hidden_states=True)"
        )
    return states


def _embeddings(output: Any, batch: Any, who: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    hidden = _entry(output, "last_hidden_state")
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"the {who}'s output ({_kind(output)}) has no last_hidden_state; give a forward that returns the embeddings as a tensor"
        )
    if hidden.ndim != 3:
        raise _no_embeddings(who, hidden)
    weights = _attention(hidden[..., 0], _decoder_batch(output, batch))
    if weights is None:
        return at_least_float32(hidden).mean(1)
    weights = weights.to(hidden.device)[..., None]
    return (at_least_float32(hidden).masked_fill(weights == 0, 0) * weights).sum(1) / weights.sum(1).clamp_min(1)


def _no_embeddings(who: str, x: Tensor) -> ValueError:
    return ValueError(
        f"cosine: the {who}'s output has shape {tuple(x.shape)}, and which axis holds the embeddings is unknown; give a forward that "
        "returns embeddings [samples, width], for an image model model(batch).last_hidden_state.mean((2, 3))"
    )


def _kind(output: Any) -> str:
    return "None; give distill a teacher" if output is None else type(output).__name__


def _decoder_batch(output: Any, batch: Any) -> Any:
    """The batch as the decoder sees it, where the output is that of an encoder and a decoder."""
    inputs = inputs_of(batch)
    if not isinstance(inputs, Mapping) or isinstance(output, Tensor) or _entry(output, "encoder_last_hidden_state") is None:
        return batch
    renamed = {name: inputs[f"decoder_{name}"] for name in ("input_ids", "attention_mask") if f"decoder_{name}" in inputs}
    return {**renamed, **{name: x for name, x in inputs.items() if name == "labels"}}


def _labels(batch: Any) -> Tensor | None:
    """The labels of a batch: its own, or the input tokens."""
    labels = _own_labels(batch)
    if labels is not None:
        return labels
    inputs = inputs_of(batch)
    has_target = (inputs is not batch and len(batch) > 1) or (isinstance(inputs, Mapping) and inputs.get("labels") is not None)
    return None if has_target else _tokens(batch)  # a target of other numbers is no label


def _own_labels(batch: Any) -> Tensor | None:
    """The labels of a batch, not its input tokens."""
    inputs = inputs_of(batch)
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if labels is None and inputs is not batch and len(batch) > 1:
        labels = batch[1]
    return labels if isinstance(labels, Tensor) and not labels.is_floating_point() else None


def _tokens(batch: Any) -> Tensor | None:
    inputs = inputs_of(batch)
    tokens = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    return tokens if isinstance(tokens, Tensor) and not tokens.is_floating_point() else None


def _are_next_tokens(labels: Tensor, batch: Any) -> bool:
    """Whether labels repeat the input tokens at half of all positions, so that logits predict the label of the next position."""
    if not _are_tokens(labels, batch):
        return False
    attention = _attention(labels, batch)
    attended = torch.ones_like(labels, dtype=torch.bool) if attention is None else attention.to(labels.device) != 0
    return bool(2 * ((labels != IGNORED) & attended).sum() >= attended.sum())


def _check_shift(loss: str, labels: Tensor | None, batch: Any, shift: bool | None) -> None:
    """Raise if nobody said whether labels belong to the next position, and the labels do not tell."""
    if shift not in (None, True, False):
        raise ValueError(f"{loss}: shift={shift!r} must be True, False or None")
    if labels is None:
        return
    if shift and labels.ndim < 2:
        raise ValueError(f"{loss}: shift=True needs labels [batch, positions], not {tuple(labels.shape)}")
    is_unclear = shift is None and _are_tokens(labels, batch) and not _are_next_tokens(labels, batch)
    if is_unclear and (labels != IGNORED).any():
        raise ValueError(
            f"{loss}: the labels equal the input tokens, but fewer than half of the positions have a label; give shift=True for a causal "
            f"language model whose prompts have no labels, or shift=False for a masked one: partial(losses.{loss}, shift=True)"
        )


def _are_tokens(labels: Tensor, batch: Any) -> bool:
    """Whether labels equal the input tokens wherever there is a label."""
    tokens = _tokens(batch)
    if tokens is None or tokens.shape != labels.shape or labels.ndim < 2:
        return False
    return bool(((labels == tokens.to(labels.device)) | (labels == IGNORED)).all())


def _attention(x: Tensor, batch: Any, *, must_fit: bool = True) -> Tensor | None:
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


def _mean(values: Tensor, batch: Any, shift: bool | None = None) -> Tensor:
    """The mean of numbers by position over all positions that count."""
    counted = _counted(values, batch, shift)
    if counted is None:
        return values.mean()
    counted = counted.to(values.device).reshape(*counted.shape, *[1] * (values.ndim - counted.ndim)).expand_as(values)
    if not counted.any():
        raise ValueError("no position of this batch counts: each is padding (attention_mask 0) or has the label -100")
    return values.masked_fill(~counted, 0).sum() / counted.sum()


def _counted(values: Tensor, batch: Any, shift: bool | None) -> Tensor | None:
    """Which positions count, ``[batch, positions]`` bool; None if all do."""
    attention = _attention(values, batch)
    counted = None if attention is None else attention != 0
    labels = _own_labels(batch)
    if labels is not None and labels.shape == values.shape:
        has_label = labels != IGNORED
        if _are_next_tokens(labels, batch) if shift is None else shift:  # a position counts if the next one has a label
            has_label = F.pad(has_label[:, 1:], (0, 1), value=False)
        counted = has_label if counted is None else counted.to(has_label.device) & has_label
    return counted


def _check_shapes(loss: str, what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{loss}: the student's {what} have shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; both need one shape"
        )
