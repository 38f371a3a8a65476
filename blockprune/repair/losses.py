"""Losses for `distill` and for training loops of your own: (student's output, teacher's output, batch) -> one number.

They read Hugging Face outputs (``logits``, ``hidden_states``, ``last_hidden_state``) and plain tensors, compute in float32 or wider, and
leave out padding: positions whose ``attention_mask`` is 0 and positions whose label is -100.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blockprune.core.arguments import check_counts, check_number
from blockprune.core.precision import SMALLEST, at_least_float32
from blockprune.repair import divergence
from blockprune.repair.distill_loss import DistillLoss, check_loss
from blockprune.repair.loss_positions import (
    IGNORED,
    are_next_tokens,
    attention_of,
    check_shift,
    decoder_batch,
    encoder_batch,
    entry,
    labels_of,
    mean,
    mean_of_counted,
    own_labels,
)

__all__ = ["cosine", "cross_entropy", "hidden_states", "kl", "weighted"]


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
        student: logits ``[classes]``, ``[batch, classes]`` or ``[batch, positions, classes]``, or an output that has ``logits``.
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
    temperature = check_number("temperature", temperature, "a finite number above 0", above=0)
    (top_k,) = check_counts(1, optional=True, top_k=top_k)
    q, p = _logits(student, "student"), _logits(teacher, "teacher")
    _check_shapes("kl", "logits", q, p)
    if not 1 <= q.ndim <= 3:
        raise _no_class_axis("kl", q)
    batch = decoder_batch(student, batch)
    check_shift("kl", own_labels(batch), batch, shift)
    p = p.to(q.device)
    top_k = None if top_k is None or top_k >= p.shape[-1] else top_k
    return temperature**2 * mean(divergence.of_logits(q, p, temperature, top_k), batch, shift)


def hidden_states(student: Any, teacher: Any, batch: Any = None) -> Tensor:
    """Squared error of the hidden states relative to the teacher's own square, mean over layers (SquareHead, Kurtic et al. 2310.06927).

    ``mean over layers of |student - teacher|^2 / |teacher|^2``, so that layers count equally, whatever the size of their hidden states.

    Args:
        student: an output that has ``hidden_states`` (call the model with ``output_hidden_states=True``), hidden states
            ``[batch, positions, width]``, or a sequence of them. Of an encoder and a decoder, ``encoder_hidden_states`` and
            ``decoder_hidden_states`` are compared, each with its own padding.
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
    xs, ys = _hidden_states(student, batch, "student"), _hidden_states(teacher, batch, "teacher")
    if len(xs) != len(ys) or not xs:
        raise ValueError(f"hidden_states: the student has {len(xs)} hidden states and the teacher {len(ys)}; choose the layers to compare")
    return torch.stack([_relative_error(x, y, own_batch) for (x, own_batch), (y, _) in zip(xs, ys, strict=True)]).mean()


def _relative_error(student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
    _check_shapes("hidden_states", "hidden states", student, teacher)
    x, y = at_least_float32(student), at_least_float32(teacher.to(student.device))
    if x.ndim < 2:  # one vector
        x, y = x.view(1, -1), y.view(1, -1)
    return mean((x - y).square().mean(-1), batch) / mean(y.square().mean(-1), batch).clamp_min(SMALLEST)


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
        TypeError: an output without logits, a batch without labels or tokens, or labels that are bool.
        ValueError: labels of another shape than the positions, logits with four or more axes of which the second could be that of the
            classes, too, a label that is no class, only labels of -100, or labels that need ``shift``.

    Example:
        >>> logits = torch.zeros(1, 3, 50)
        >>> round(bp.losses.cross_entropy(logits, None, {"input_ids": torch.tensor([[4, 7, 9]])}).exp().item(), 3)
        50.0
    """
    logits, batch = _logits(student, "student"), decoder_batch(student, batch)
    labels = labels_of(batch)
    if labels is None:
        raise TypeError(
            f"cross_entropy: the batch has the type {type(batch).__name__} and no labels; give a mapping with 'labels' or 'input_ids', or "
            "a tuple (inputs, labels)"
        )
    own, others = logits.shape[:-1], (*logits.shape[:1], *logits.shape[2:])  # the positions, if the classes are the last or second axis
    if not logits.ndim or (logits.ndim > 3 and (labels.shape != own or own == others)):
        raise _no_class_axis("cross_entropy", logits, labels)
    if labels.dtype == torch.bool:
        raise TypeError("cross_entropy: the labels are bool; give the numbers of the classes, such as labels.long()")
    if labels.shape != own:
        is_other_axis = logits.ndim == 3 and labels.shape == (logits.shape[0], logits.shape[2])
        raise ValueError(
            f"cross_entropy: the logits {tuple(logits.shape)} need labels {tuple(own)}, not {tuple(labels.shape)}"
            + ("; the classes must be the last axis: give a forward that returns model(batch).mT" if is_other_axis else "")
        )
    labels = labels.to(logits.device, torch.long)
    check_shift("cross_entropy", labels, batch, shift)
    is_shifted = are_next_tokens(labels, batch) if shift is None else shift
    if (attention := attention_of(labels, batch, must_fit=is_shifted)) is not None:
        is_padding = attention.to(labels.device) == 0
        labels = labels.masked_fill(is_padding | F.pad(is_padding[:, :-1], (1, 0)) if is_shifted else is_padding, IGNORED)
    if is_shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    try:
        rows = at_least_float32(logits).reshape(-1, logits.shape[-1])
        loss = F.cross_entropy(rows, labels.flatten(), reduction="none", ignore_index=IGNORED)
    except IndexError as error:
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))]
        raise ValueError(
            f"cross_entropy: the label {wrong[0].item() if len(wrong) else error} is none of the {logits.shape[-1]} classes of the logits "
            f"{tuple(logits.shape)}; labels are from 0 to {logits.shape[-1] - 1}, or {IGNORED} for what does not count"
        ) from error
    counted = labels.flatten() != IGNORED
    if not counted.any():
        raise ValueError("cross_entropy: no label of this batch counts; all are -100 or padding")
    return loss.sum() / counted.sum()


def cosine(student: Any, teacher: Any, batch: Any = None) -> Tensor:
    """One minus the cosine between the student's and the teacher's embeddings, mean over the samples that are not all padding.

    Args:
        student: embeddings ``[samples, width]`` (with three axes, each vector along the last counts), or an output that has
            ``last_hidden_state``, whose mean over all positions but padding is the embedding.
        teacher: the same of the teacher.
        batch: what the models were called with; it tells which positions are padding.

    Raises:
        TypeError: an output without ``last_hidden_state``.
        ValueError: embeddings of different shapes, or with four or more axes, as those of image models; only padding.

    Example:
        >>> bp.losses.cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
        1.0
    """
    (x, own), (y, other) = _embeddings(student, batch, "student"), _embeddings(teacher, batch, "teacher")
    _check_shapes("cosine", "embeddings", x, y)
    if x.ndim > 3:
        raise _no_embeddings("student", x)
    distance = 1 - F.cosine_similarity(at_least_float32(x), at_least_float32(y.to(x.device)), dim=-1)
    if own is None and other is None:
        return mean(distance, batch)
    return mean_of_counted(distance, torch.stack([has.to(x.device) for has in (own, other) if has is not None]).all(0))


def weighted(terms: Mapping[DistillLoss, float]) -> DistillLoss:
    """A loss that is the weighted sum of others.

    Args:
        terms: the weight of each loss.

    Raises:
        ValueError: no terms, a weight that is NaN or infinite.
        TypeError: terms that are no mapping, a loss that does not take three arguments, a weight that is no number, or a tensor with axes.

    Example:
        >>> loss = bp.losses.weighted({bp.losses.kl: 1.0, bp.losses.cross_entropy: 0.5})
        >>> logits, batch = torch.zeros(1, 3, 2), torch.tensor([[0, 1, 1]])
        >>> loss(logits, logits, batch).item() == 0.5 * bp.losses.cross_entropy(logits, None, batch).item()
        True
    """
    if not isinstance(terms, Mapping):
        raise TypeError(f"weighted: terms is a {type(terms).__name__}; give a mapping from losses to weights, such as {{losses.kl: 1.0}}")
    for loss in terms:
        check_loss("a loss of terms", loss)
    if not terms:
        raise ValueError("weighted: terms is empty; give at least one loss and its weight, such as {losses.kl: 1.0}")
    checked = [(loss, check_number(f"terms[{getattr(loss, '__name__', loss)}]", weight)) for loss, weight in terms.items()]
    return partial(_weighted_sum, terms=tuple(checked))


def _weighted_sum(student: Any, teacher: Any, batch: Any, *, terms: Sequence[tuple[DistillLoss, float]]) -> Tensor:
    return torch.stack([weight * loss(student, teacher, batch) for loss, weight in terms]).sum()


# What outputs hold


def _logits(output: Any, who: str) -> Tensor:
    logits = output if isinstance(output, Tensor) else entry(output, "logits")
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the {who}'s output ({_kind(output)}) has no logits; use a model with a head, or a forward that returns the logits as a tensor"
        )
    _check_not_empty(who, logits)
    return logits


def _hidden_states(output: Any, batch: Any, who: str) -> list[tuple[Tensor, Any]]:
    """The hidden states of an output, each with the batch that tells its padding."""
    if isinstance(output, Tensor):
        _check_not_empty(who, output)
        return [(output, batch)]
    own, of_encoder, of_decoder = (entry(output, f"{part}hidden_states") for part in ("", "encoder_", "decoder_"))
    states = output if type(output) in (tuple, list) else own
    parts = [(states, decoder_batch(output, batch))]
    if states is None and of_decoder is not None:
        parts = [(of_encoder or (), encoder_batch(batch)), (of_decoder, decoder_batch(output, batch))]
    if not all(isinstance(part, (tuple, list)) and all(isinstance(x, Tensor) for x in part) for part, _ in parts):
        raise TypeError(
            f"the {who}'s output ({_kind(output)}) has no hidden states; call the model with output_hidden_states=True, in distill with "
            "forward=lambda model, batch: model(**batch, output_hidden_states=True)"
        )
    states = [(x, own_batch) for part, own_batch in parts for x in part]
    _check_not_empty(who, *(x for x, _ in states))
    return states


def _embeddings(output: Any, batch: Any, who: str) -> tuple[Tensor, Tensor | None]:
    """The embeddings, and which samples have any position that is not padding; None if all do."""
    if isinstance(output, Tensor):
        _check_not_empty(who, output)
        return output, None
    hidden = entry(output, "last_hidden_state")
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"the {who}'s output ({_kind(output)}) has no last_hidden_state; give a forward that returns the embeddings as a tensor"
        )
    _check_not_empty(who, hidden)
    if hidden.ndim != 3:
        raise _no_embeddings(who, hidden)
    attention = attention_of(hidden[..., 0], decoder_batch(output, batch))
    if attention is None:
        return at_least_float32(hidden).mean(1), None
    weights = attention.to(hidden.device)[..., None]
    sums = (at_least_float32(hidden).masked_fill(weights == 0, 0) * weights).sum(1)
    return sums / weights.sum(1).clamp_min(1), (attention != 0).any(1)


def _check_not_empty(who: str, *outputs: Tensor) -> None:
    """Raise for an output of a batch without samples, whose mean would be NaN."""
    if empty := [x for x in outputs if not x.numel()]:
        raise ValueError(f"the {who}'s output has shape {tuple(empty[0].shape)}, so the batch is empty; leave out such batches")


def _no_embeddings(who: str, x: Tensor) -> ValueError:
    return ValueError(
        f"cosine: the {who}'s output has shape {tuple(x.shape)}, and which axis holds the embeddings is unknown; give a forward that "
        "returns embeddings [samples, width], for an image model model(batch).last_hidden_state.mean((2, 3))"
    )


def _kind(output: Any) -> str:
    return "None; give distill a teacher" if output is None else type(output).__name__


def _check_shapes(loss: str, what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{loss}: the student's {what} have shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; both need one shape"
        )


def _no_class_axis(loss: str, logits: Tensor, labels: Tensor | None = None) -> ValueError:
    """The error where the axis of the classes is not the last one, or not known."""
    advice = "returns logits [batch, positions, classes], for an image model model(batch).flatten(2).mT"
    if not logits.ndim:
        advice = "returns logits [classes] or [batch, classes]"
    elif labels is not None:
        advice += f", and labels [batch, positions] instead of {tuple(labels.shape)}: labels.flatten(1)"
    what = f"{loss}: the logits have shape {tuple(logits.shape)}, and which axis is that of the classes is not known"
    return ValueError(f"{what}; give a forward that {advice}")
