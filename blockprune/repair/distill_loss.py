"""What a loss of `distill` must be, and its value for a batch."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.core.arguments import check_function, torch_loss, unwrap_partial
from blockprune.model.calibration import Forward
from blockprune.model.running import to_model_device

DistillLoss = Callable[[Any, Any, Any], Tensor]  # (student's output, teacher's output, batch) -> one number


def check_loss(what: str, loss: Any) -> None:
    """Raise unless a loss can be called with the student's output, the teacher's output and the batch, as those of torch cannot.

    Args:
        what: the name of the argument.
        loss: whatever a user gave.

    Raises:
        TypeError: it cannot.

    Example:
        >>> from blockprune.repair.distill_loss import check_loss
        >>> check_loss("loss", bp.losses.kl)
    """
    if of_torch := torch_loss(loss, "student, teacher"):
        name, call = of_torch
        parameters = () if (signature := _signature(unwrap_partial(loss))) is None else signature.parameters.values()
        fits = sum(p.default is p.empty for p in parameters) == 3  # the third one of most is an option, such as a weight
    else:
        check_function(what, loss, "of the student's output, the teacher's output and the batch, such as losses.kl")
        signature = _signature(loss)
        fits = signature is None or _can_bind(signature, 3)
        name = getattr(unwrap_partial(loss), "__name__", type(loss).__name__)
        is_named = inspect.isfunction(loss) and name.isidentifier()
        call = f"{name}(student, teacher)" if is_named and signature and _can_bind(signature, 2) else "..."
    if not fits:
        raise TypeError(
            f"{what}={name} does not take (student's output, teacher's output, batch), which a loss is called with; give lambda "
            f"student, teacher, batch: {call}; or one of bp.losses, such as bp.losses.kl"
        )


def _signature(function: Any) -> inspect.Signature | None:
    """That of a function, a decorated one as it is called, or of a module's forward; None for compiled code."""
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function, follow_wrapped=False)
    except (TypeError, ValueError):
        return None


def _can_bind(signature: inspect.Signature, count: int) -> bool:
    """Whether a function takes so many arguments by position and no others."""
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def loss_of(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Any,
    *,
    forward: Forward,
    loss: DistillLoss,
    autocast: torch.dtype | None,
) -> Tensor:
    """The loss of a batch as a tensor without axes.

    Args:
        student: the model that is trained.
        teacher: the dense model, which is run without gradients, or None.
        batch: as the user gave it.
        forward, loss, autocast: as in `distill`.

    Raises:
        TypeError: a loss that returns something else than one real number.

    Example:
        >>> from blockprune.model.calibration import default_forward
        >>> from blockprune.repair.distill_loss import loss_of
        >>> model = nn.Linear(2, 2)
        >>> loss_of(model, model, torch.ones(1, 2), forward=default_forward, loss=bp.losses.kl, autocast=None).item()
        0.0
    """
    target = None
    if teacher is not None:
        with torch.no_grad():
            target = _output(teacher, to_model_device(teacher, batch), forward, autocast)
    batch = to_model_device(student, batch)
    value = loss(_output(student, batch, forward, autocast), target, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss must return one number as a tensor, not {kind}; take its mean or sum")
    if value.is_complex():
        raise TypeError(f"loss must return a real number, not {value.dtype}; take its .abs() or .real")
    return value.reshape(())


def _output(module: nn.Module, batch: Any, forward: Forward, autocast: torch.dtype | None) -> Any:
    if autocast is None:
        return forward(module, batch)
    device = next(module.parameters()).device.type
    with torch.autocast(device, dtype=autocast):
        return forward(module, batch)
