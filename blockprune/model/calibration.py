"""The data that a model is run on, and how it is run: `Calibration`, and its loss."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, TypedDict, cast

import attrs
from torch import Tensor

from blockprune.core.arguments import check_counts, check_function, torch_loss
from blockprune.core.pipeline import as_code

Forward = Callable[[Callable[..., Any], Any], Any]  # (model, batch) -> output
Loss = Callable[[Any, Any], Tensor]  # (output, batch) -> one number
# batch -> the weight of each token in statistics, the same by entry of the batch, or None
TokenWeights = Callable[[Any], Tensor | Mapping[str, Tensor | None] | None]


def default_forward(model: Callable[..., Any], batch: Any) -> Any:
    """Call the model with a batch.

    A tensor or a named tuple, such as a PackedSequence, is the model's only argument; the values of a mapping are keyword arguments. Of
    another tuple or list only the first element, the inputs, is passed on: it may itself be a mapping of keyword arguments, or a tuple or
    list of positional arguments.

    Raises:
        TypeError: a tuple or list whose first element alone is not what the model takes.
    """
    inputs = inputs_of(batch)
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs if _is_sequence(inputs) else (inputs,), {})
    if inputs is not batch and len(batch) > 1:
        _check_arguments(model, args, kwargs, batch)
    return model(*args, **kwargs)


def inputs_of(batch: Any) -> Any:
    """The part of a batch that the model is called with by default: of a tuple or list the first element, of others the whole.

    Raises:
        ValueError: an empty tuple or list.

    Example:
        >>> from blockprune.model.calibration import inputs_of
        >>> inputs_of((1, 2)), inputs_of({"x": 1})
        (1, {'x': 1})
    """
    if _is_sequence(batch) and not batch:
        raise ValueError(f"a batch is an empty {type(batch).__name__}; its first element must be the model's inputs")
    return batch[0] if _is_sequence(batch) else batch


def check_batch(number: int, batch: Any, forward: Forward) -> None:
    """Raise unless this is something that `default_forward` passes on, or the user passes it on.

    Raises:
        TypeError: such as an array.

    Example:
        >>> from blockprune.model.calibration import check_batch, default_forward
        >>> check_batch(0, torch.ones(2), default_forward)
    """
    if not isinstance(batch, (Tensor, Mapping, tuple, list)) and forward is default_forward:
        raise TypeError(f"batch {number} is a {type(batch).__name__}; give tensors, tuples or mappings, or pass forward=")


def _check_arguments(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], batch: Sequence[Any]) -> None:
    """Raise if a model does not take the inputs of a batch of inputs and targets, as where the batch holds several inputs."""
    try:
        signature = inspect.signature(getattr(model, "forward", model))
    except (TypeError, ValueError):  # compiled code has none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"the batch is a {type(batch).__name__} of {len(batch)}: the first element is passed to {type(model).__name__}.forward"
            f"{signature}, and the others are targets, but then there is {error}. Give several inputs as one element, such as "
            "((x1, x2), target) or ((x1, x2),), or pass forward=lambda model, batch: model(*batch)"
        ) from None


def _is_sequence(batch: Any) -> bool:
    """Whether a batch is a plain tuple or list; a named tuple, such as a PackedSequence, is one argument."""
    return isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields")


def default_token_weights(batch: Any) -> Tensor | Mapping[str, Tensor | None] | None:
    """The ``attention_mask`` of a batch's inputs if they are a mapping, so that padding does not count; None for other batches.

    If there are several masks, each counts for the entries with the same prefix: ``decoder_attention_mask`` for ``decoder_input_ids``.
    """
    inputs = inputs_of(batch)
    if not isinstance(inputs, Mapping):
        return None
    masks = {str(name): x for name, x in inputs.items() if str(name).endswith("attention_mask") and isinstance(x, Tensor) and x.ndim == 2}
    if masks.keys() <= {"attention_mask"}:
        return masks.get("attention_mask")
    prefixed = {name.replace("attention_mask", "*"): mask for name, mask in masks.items() if name != "attention_mask"}
    decoder = masks.get("decoder_attention_mask")
    return {"decoder_*": decoder, "labels": decoder, **prefixed, "*": masks.get("attention_mask")}


def several_batches(batches: Any, what: str = "batches", *, forward: Forward = default_forward) -> Any:
    """The same batches, if there may be several.

    Args:
        batches: whatever a user gave.
        what: the name of the argument.
        forward: what calls the model with a batch; one of a user's own may take batches of several kinds.

    Raises:
        TypeError: one tensor or mapping, or nothing that can be iterated; a tuple or list whose elements cannot all be batches, because
            some are floating-point tensors and others are tensors of integers or mappings, such as inputs and their labels.

    Example:
        >>> from blockprune.model.calibration import several_batches
        >>> several_batches([torch.ones(1)])
        [tensor([1.])]
    """
    if isinstance(batches, (str, Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"{what} is one {type(batches).__name__}; give an iterable of batches, such as [batch]")
    if isinstance(batches, (tuple, list)) and forward is default_forward:
        kinds: dict[str, str] = {}
        for batch in batches:
            if isinstance(batch, Mapping):
                kinds.setdefault("mapping", type(batch).__name__)
            elif isinstance(batch, Tensor) and not batch.is_nested:
                kinds.setdefault("float" if batch.is_floating_point() else "integer", f"{tuple(batch.shape)} of {batch.dtype}")
        if len(kinds) > 1:
            kind = type(batches).__name__
            raise TypeError(
                f"{what} is a {kind} of {' and '.join(kinds.values())}, which are no batches of one model; if the {kind} is one batch of "
                f"inputs and targets, give [batch]: {what}=[({'x, y' if len(batches) == 2 else '...'})]"
            )
    return batches


def _checked_size(chunk_size: Any) -> int:
    return int(check_counts(1, chunk_size=chunk_size)[0])


@attrs.frozen(eq=False)
class Calibration:
    """The data that a model is run on, and how it is run: batches, forward and loss.

    Collectors (`collect.with_statistics`, `collect.fold`), `sequential` and recipes take it; the first two also take its fields as keyword
    arguments.

    Args:
        batches: an iterable of tensors, tuples, mappings or dataclasses. What follows is called with a copy of each batch: tensors on the
            model's device, floating-point ones in its dtype, mappings as dicts, other objects as they are. A recipe runs over the batches
            several times, so give it a list or a DataLoader, not a generator.
        loss: (output, batch) -> one number with a gradient. By default it is the output's own ``loss`` (Hugging Face models return one if
            the batch has labels).
        forward: (model, batch) -> output. By default a tensor or a named tuple is passed on, a mapping is spread as keyword arguments,
            and of another tuple or list the first element is passed on.
        token_weights: batch -> the weight of each token in statistics, ``[batch, positions]``, or None to count each token once. By
            default it is the batch's ``attention_mask``, so that padding does not count. Weights are at least 0. If the batch has several
            entries with tokens, return a mapping from names of entries (or patterns) to weights; a layer's rows have the weights of the
            first entry in the mapping that flows into the layer. Rows are recognized by their axes: [batch, positions], maybe with more
            axes behind; [positions, batch] if both sizes differ; or both in one axis, in the order of [batch, positions]. A model that
            works on [positions, batch] with as many samples as positions, or on both in one axis in that order, needs weights of its own;
            so does one whose layers get samples or tokens in another order than the batch has, or rows of something else with these sizes.
        per_sample: "vmap" computes the gradients of several samples at a time; "loop" computes one sample at a time, with the same result,
            for models that `torch.func.vmap` cannot run.
            Gradients of samples (``gate_grad``, ``gate_fisher``) take axis 0 of every tensor of a batch for the samples, except of tensors
            without axes: of a model that takes [positions, batch], transpose in ``forward=``, or give the samples one by one as batches.
        chunk_size: samples at a time under vmap.
        progress: show a progress bar; by default in a terminal and in a notebook.
        reduce: adds the sums of statistics of several processes, such as `blockprune.distributed.all_reduce`. Each process then has batches
            of its own, or none, and all of them end with the same statistics, masks and weights. It adds over the default process group,
            or over the ``group`` that `functools.partial` binds to it.

    Raises:
        TypeError: batches that are one tensor or mapping, or one batch of inputs and labels, instead of an iterable of batches; a function
            that cannot be called, or the class of a loss instead of a loss.
        ValueError: ``per_sample`` that is neither "vmap" nor "loop", or ``chunk_size`` that is no integer from 1 on.

    Example:
        >>> bp.Calibration([torch.ones(2, 4), torch.ones(2, 4)])
        Calibration(batches=list of 2)
    """

    batches: Iterable[Any]
    loss: Loss | None = attrs.field(default=None, kw_only=True)
    forward: Forward = attrs.field(default=default_forward, kw_only=True)
    token_weights: TokenWeights = attrs.field(default=default_token_weights, kw_only=True)
    per_sample: str = attrs.field(default="vmap", kw_only=True)
    chunk_size: int = attrs.field(default=8, kw_only=True, converter=_checked_size)
    progress: bool | None = attrs.field(default=None, kw_only=True)
    reduce: Callable[[Any], Any] | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        several_batches(self.batches, forward=self.forward)
        check_function("loss", self.loss, "(output, batch) -> one number", optional=True)
        check_function("forward", self.forward, "(model, batch) -> output")
        check_function("token_weights", self.token_weights, "(batch) -> weights of the tokens, or None")
        check_function("reduce", self.reduce, "that adds up over processes, such as blockprune.distributed.all_reduce", optional=True)
        if self.per_sample not in ("vmap", "loop"):
            raise ValueError(f"per_sample={self.per_sample!r} must be 'vmap' or 'loop'")

    def __repr__(self) -> str:
        size = f" of {len(self.batches)}" if isinstance(self.batches, Sized) else ""
        values = [(field, getattr(self, field.name)) for field in attrs.fields(type(self))[1:]]
        arguments = [f"{field.name}={as_code(value)}" for field, value in values if value != field.default]
        return f"Calibration({', '.join([f'batches={type(self.batches).__name__}{size}', *arguments])})"


class RunOptions(TypedDict, total=False):
    """The fields of `Calibration` besides batches, for functions that take them as keyword arguments."""

    loss: Loss | None
    forward: Forward
    token_weights: TokenWeights
    per_sample: str
    chunk_size: int
    progress: bool | None
    reduce: Callable[[Any], Any] | None


class CalibrationOptions(RunOptions, total=False):
    """The fields of `Calibration`, for functions that take them as keyword arguments."""

    batches: Iterable[Any]


def as_calibration(calibration: Calibration | None, options: CalibrationOptions | RunOptions) -> Calibration:
    """The calibration, or a new one from the fields of `Calibration` that were passed as keyword arguments.

    Raises:
        TypeError: there is both a calibration and a field, or neither a calibration nor batches.

    Example:
        >>> from blockprune.model.calibration import as_calibration
        >>> as_calibration(None, {"batches": [torch.ones(2)], "progress": False})
        Calibration(batches=list of 1, progress=False)
    """
    if calibration is None:
        if "batches" not in options:
            raise TypeError("there is no data to run the model on; give calibration=bp.Calibration(batches, ...), or batches=")
        return Calibration(**cast(CalibrationOptions, options))
    if not isinstance(calibration, Calibration):
        raise TypeError(f"calibration has the type {type(calibration).__name__}; give bp.Calibration(batches, ...)")
    if options:
        code = ", ".join(f"{name}=..." for name in options)
        raise TypeError(f"{', '.join(options)} and calibration are both given; give one calibration: attrs.evolve(calibration, {code})")
    return calibration


def scalar_loss(calibration: Calibration, output: Any, batch: Any, statistics: Sequence[str]) -> Tensor:
    """The loss of an output as a tensor without axes.

    Args:
        calibration: its loss; without one the output's own ``loss`` is used.
        output: the model's output.
        batch: the batch that the model was called with.
        statistics: the names of the statistics that need the loss, for error messages.

    Raises:
        ValueError: there is no loss, or it is not one number with a gradient.

    Example:
        >>> from blockprune.model.calibration import Calibration, scalar_loss
        >>> calibration = Calibration([], loss=lambda output, batch: output.sum())
        >>> scalar_loss(calibration, torch.ones(2, requires_grad=True), None, ["weight_grad"]).item()
        2.0
    """
    what = f"statistics {', '.join(statistics)} need a loss"
    loss: Any
    if calibration.loss is not None:
        _check_form(calibration.loss, batch)
        loss = calibration.loss(output, batch)
    else:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                f"{what}: give Calibration(batches, loss=...), with a function of (output, batch) that returns one number; the model's "
                f"output ({type(output).__name__}) has no loss (Hugging Face models return one if the batch has labels)"
            )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{what} that is one number, but loss(output, batch) gave {kind}; take its mean or sum")
    if loss.is_complex():
        raise ValueError(f"{what} that is a real number, but loss(output, batch) gave {loss.dtype}; take its .abs() or .real")
    if not loss.requires_grad:
        raise ValueError(f"{what} with a gradient, but loss(output, batch) has none; is something detached or under no_grad?")
    return loss.reshape(())


def _check_form(loss: Loss, batch: Any) -> None:
    """Raise if a loss of torch, which takes (output, target), would be called with a batch that is not the target."""
    target = "batch['labels']" if isinstance(batch, Mapping) else "batch[1]"
    of_torch = torch_loss(loss, f"output, {target}")
    if of_torch and not isinstance(batch, Tensor):
        name, call = of_torch
        raise TypeError(
            f"loss={name} takes (output, target), but a loss is called with (output, batch), and this batch is a {type(batch).__name__}; "
            f"give loss=lambda output, batch: {call}"
        )
