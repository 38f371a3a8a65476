"""Deep copies of models, which do not depend on the model that they are copies of."""

import copy
import functools
import types
from typing import Any, TypeVar

from torch import nn

from blockprune.core._compat import is_compiled_wrapper
from blockprune.model.computed_weights import check_not_computed

M = TypeVar("M", bound=nn.Module)


def copy_model(model: M) -> M:
    """A deep copy of a model, which runs its own modules.

    Raises:
        ValueError: a computed tensor that torch cannot copy, or a forward that would run the modules of the given model.

    Example:
        >>> from blockprune.model.copying import copy_model
        >>> model = nn.Linear(2, 2)
        >>> model.forward = torch.no_grad()(model.forward)
        >>> copy_model(model)
        Traceback (most recent call last):
        ValueError: the model: its attribute forward is a function that holds a module (Linear), and copies of it would run that module...
    """
    check_not_computed(model)
    for name, module in model.named_modules():
        if not is_compiled_wrapper(module) and (held := _module_in(vars(module).get("forward"))) is not None:
            raise ValueError(
                f"{name or 'the model'}: its attribute forward is a function that holds a module ({type(held).__name__}), and copies of it "
                "would run that module and not their own; remove it (del module.forward), and write model.compile() instead of "
                "model.forward = torch.compile(model.forward)"
            )
    return copy.deepcopy(model)


def _module_in(function: Any) -> nn.Module | None:
    """The module that a function holds in its closure, where `copy.deepcopy` does not replace it by its copy."""
    if isinstance(function, functools.partial):
        function = function.func
    cells = function.__closure__ if isinstance(function, types.FunctionType) else None
    for cell in cells or ():
        value = cell.cell_contents
        held = value.__self__ if isinstance(value, types.MethodType) else value
        if isinstance(held, nn.Module):
            return held
        if (inner := _module_in(value)) is not None:
            return inner
    return None
