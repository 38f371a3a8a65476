"""Deep copies of models, which do not depend on the model that they are copies of."""

import copy
import functools
import types
from collections.abc import Iterator, Set
from typing import Any, TypeVar

from torch import nn

from blockprune.core._compat import is_compiled_wrapper
from blockprune.model.computed_weights import check_not_computed

M = TypeVar("M", bound=nn.Module)


def copy_model(model: M) -> M:
    """A deep copy of a model, which runs its own modules.

    Raises:
        ValueError: a computed tensor that torch cannot copy, or a forward that would run modules of the given model.

    Example:
        >>> from blockprune.model.copying import copy_model
        >>> model = nn.Linear(2, 2)
        >>> model.forward = torch.no_grad()(model.forward)
        >>> copy_model(model)
        Traceback (most recent call last):
        ValueError: the model: its attribute forward is a function that holds a Linear of the model, and copies would run that module...
    """
    check_not_computed(model)
    modules = {*model.modules()}
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if forward is not None and not is_compiled_wrapper(module) and (held := modules & {*_modules_in(forward, set())}):
            raise ValueError(
                f"{name or 'the model'}: its attribute forward is a function that holds a {type(held.pop()).__name__} of the model, and "
                "copies would run that module and not their own. Bind a function of the class instead: module.forward = "
                "types.MethodType(decorator(type(module).forward), module); or compile the module, module.compile()"
            )
    return copy.deepcopy(model)


def _modules_in(function: Any, known: Set[int]) -> Iterator[nn.Module]:
    """The modules that a function refers to where `copy.deepcopy` does not replace them by their copies."""
    if isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    if isinstance(function, types.FunctionType) and id(function) not in known:
        names = function.__code__.co_names
        values = [function.__globals__[name] for name in names if name in function.__globals__]
        values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *_closure(function)]
        for value in _items(values):
            held = value.__self__ if isinstance(value, types.MethodType) else value
            if isinstance(held, nn.Module):
                yield held
            elif isinstance(value, (functools.partial, types.FunctionType)):
                yield from _modules_in(value, known | {id(function)})


def _closure(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue


def _items(values: list[Any]) -> Iterator[Any]:
    """The values, and what the lists, tuples and dicts among them have."""
    for value in values:
        yield from value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else (value,)
