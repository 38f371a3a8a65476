"""Replacing modules of a model by others, in place."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def replace_modules(model: M, replacement: Callable[[nn.Module], nn.Module | None]) -> M:
    """Replace modules of a model in place, and return the model (or its replacement, if the model is a single layer).

    Args:
        model: is changed.
        replacement: module -> the module that takes its place, or None to leave it.

    Example:
        >>> from blockprune.export.module_replacement import replace_modules
        >>> replace_modules(nn.Sequential(nn.ReLU()), lambda m: nn.GELU() if isinstance(m, nn.ReLU) else None)
        Sequential(
          (0): GELU(approximate='none')
        )
    """
    new = {module: substitute for module in model.modules() if (substitute := replacement(module)) is not None}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if name and module in new:
            parent, _, child = name.rpartition(".")
            modules[parent].register_module(child, new[module].train(module.training))
    return new.get(model, model)  # type: ignore[return-value]  # a model that is one layer
