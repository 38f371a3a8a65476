"""What the options of `distill` must be."""

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockprune.core.arguments import check_counts, check_function, check_number, check_seed
from blockprune.model.mask_reading import parameter_masks
from blockprune.model.parameters import check_not_lazy
from blockprune.repair.distill_loss import check_loss

SIGNATURES = {
    "optimizer": "(parameters) -> optimizer, such as partial(torch.optim.AdamW, lr=1e-4)",
    "forward": "(model, batch) -> output",
    "callback": "(DistillState) -> None",
}


def steps_of_one_pass(batches: Iterable[Any], accumulate: int) -> int:
    """The optimizer steps of one pass over the batches."""
    count = length(batches)
    if count is None:
        raise ValueError(
            f"batches has the type {type(batches).__name__} and an unknown length; say how many optimizer steps to take: steps="
        )
    return max(1, count // accumulate)


def length(batches: Iterable[Any]) -> int | None:
    """The number of batches; None if they do not tell."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader of an IterableDataset
        return None


def check_schedule(steps: int, *, warmup: int, final_lr: float, clip: float | None) -> None:
    """Raise for a schedule or a limit that makes no sense."""
    check_counts(0, warmup=warmup)
    if warmup > steps:
        raise ValueError(f"warmup={warmup} must be at most the number of steps, which is {steps}")
    check_number("final_lr", final_lr, "a number from 0 to 1, the share of the highest learning rate", lowest=0, highest=1)
    if clip is not None:
        check_number("clip", clip, "a positive number, or None for no limit", above=0)


def check_functions(**functions: Any) -> None:
    """Raise for a function that cannot be called, or a loss that does not take what it is called with."""
    for name, function in functions.items():
        if name == "loss":
            check_loss(name, function)
        else:
            check_function(name, function, SIGNATURES[name], optional=name == "callback")


def check_options(
    model: nn.Module, teacher: nn.Module | None, *, seed: int, train: bool, autocast: torch.dtype | None, checkpointing: bool
) -> None:
    """Raise for a teacher, a seed or modes that do not fit the model, or for a model whose parameters have no shapes yet."""
    for name, p in itertools.chain(model.named_parameters(), teacher.named_parameters() if isinstance(teacher, nn.Module) else ()):
        check_not_lazy(name, p)
    for name, mode in {"train": train, "checkpointing": checkpointing}.items():
        if not isinstance(mode, bool):
            module = "" if type(mode).__module__ == "builtins" else f"{type(mode).__module__}."  # NumPy's bool has the name of Python's
            raise TypeError(f"{name} is a {module}{type(mode).__name__}; it must be True or False")
    check_seed("seed", seed)
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher has the type {type(teacher).__name__}; give the dense model, or None if the loss needs no teacher")
    if teacher is model and parameter_masks(model):
        raise ValueError("the teacher is the masked model itself; give the dense model, such as a copy made before apply_masks")
    if autocast is torch.float16:
        raise ValueError("autocast=torch.float16 needs its loss scaled, or small gradients become 0; give torch.bfloat16")
    if autocast is not None and not (isinstance(autocast, torch.dtype) and autocast.is_floating_point):
        raise ValueError(f"autocast={autocast!r} must be a floating-point dtype, such as torch.bfloat16, or None")
    if checkpointing and checkpointing_method(model) is None:
        raise ValueError(f"checkpointing=True needs a model with gradient_checkpointing_enable, which {type(model).__name__} does not have")
    if checkpointing and not train:
        raise ValueError("checkpointing=True needs train=True: transformers keeps all activations in evaluation mode")


def optimizers_of(made: Any, parameters: Mapping[str, Tensor]) -> list[Optimizer]:
    """The optimizers that ``optimizer=`` made of the parameters.

    Raises:
        TypeError: neither an optimizer nor a list of some.
        ValueError: a parameter that no optimizer or several optimizers have; one whose step needs a closure (LBFGS).
    """
    optimizers = [made] if isinstance(made, Optimizer) else list(made) if isinstance(made, (list, tuple)) else []
    if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
        raise TypeError(f"optimizer returned {made!r}; it must return a torch.optim.Optimizer, or a list of some")
    for optimizer in optimizers:
        if _needs_closure(optimizer):
            raise ValueError(
                f"optimizer returned {type(optimizer).__name__}, whose step needs a closure that computes the loss several times, and each "
                "step computes it once, on the next batches; return an optimizer such as torch.optim.AdamW or torch.optim.SGD"
            )
    held = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    for name, p in parameters.items():
        if held[id(p)] == 0 and len(optimizers) == 1:
            raise ValueError(
                f"{name} {tuple(p.shape)} is not in the {type(optimizers[0]).__name__} that optimizer= returned, so it would not be "
                "trained; make the optimizer of all parameters that optimizer= is called with, which are those of a copy of the model "
                "(where= chooses which are trained)"
            )
        if held[id(p)] != 1:
            raise ValueError(
                f"{name} {tuple(p.shape)} is in {held[id(p)]} of the optimizers that optimizer= returned; put it into exactly one"
            )
    return optimizers


def _needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``step()`` without arguments would fail."""
    parameters = inspect.signature(optimizer.step).parameters.values()
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)


def checkpointing_method(model: Any) -> Callable[[Mapping[str, Any]], None] | None:
    """The method of a Hugging Face model that turns checkpointing on; it has a second name from transformers 5 on."""
    return getattr(model, "activation_checkpointing_enable", None) or getattr(model, "gradient_checkpointing_enable", None)
