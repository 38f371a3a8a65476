"""Checks of arguments that are numbers, functions or models; each error names the argument, what was given and what would do."""

import functools
import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn


def check_number(
    what: str,
    value: Any,
    meaning: str | None = None,
    *,
    above: float = -math.inf,
    lowest: float = -math.inf,
    highest: float = math.inf,
    finite: bool = True,
) -> Any:
    """Raise unless a value is a number, or a tensor or array without axes, within the limits; True and False are no numbers.

    Args:
        what: the name of the argument.
        value: whatever a user gave.
        meaning: the numbers that would do, for the error message, such as "a number above 0"; by default "a finite number", or "a number"
            where infinity is allowed.
        above: the number that the value must be above.
        lowest: the lowest number that it may be.
        highest: the highest number that it may be.
        finite: whether infinity is refused.

    Returns:
        The number as one of Python; a tensor as it is, with its gradient.

    Raises:
        TypeError: no number.
        ValueError: NaN, or a number outside the limits or the range of floats.

    Example:
        >>> from blockprune.core.arguments import check_number
        >>> check_number("damping", np.array(0.01), "a number from 0 on", lowest=0)
        0.01
    """
    meaning = meaning or ("a finite number" if finite else "a number")
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
        raise TypeError(f"{what}={_shown(value)} must be {meaning}")
    try:
        number = float(plain)
    except OverflowError:
        raise ValueError(f"{what} must be {meaning}; it is beyond the range of floating-point numbers") from None
    if not (number > above and lowest <= number <= highest) or (finite and not math.isfinite(number)):
        raise ValueError(f"{what}={_shown(value)} must be {meaning}")
    return value if isinstance(value, Tensor) else plain if isinstance(plain, int) else number


def check_integer(
    what: str,
    value: Any,
    meaning: str = "an integer",
    *,
    lowest: int | None = None,
    highest: int | None = None,
    whole_floats: bool = False,
) -> int:
    """Raise unless a value is an integer, or a tensor or array without axes that holds one.

    Args:
        what: the name of the argument.
        value: whatever a user gave.
        meaning: the integers that would do, for the error message.
        lowest: the lowest that it may be.
        highest: the highest that it may be.
        whole_floats: whether a float such as 1e9 is an integer, too.

    Returns:
        The integer, as one of Python.

    Raises:
        TypeError: no integer.
        ValueError: one outside the limits.

    Example:
        >>> from blockprune.core.arguments import check_integer
        >>> check_integer("seed", torch.tensor(3)), check_integer("memory", 1e9, whole_floats=True)
        (3, 1000000000)
    """
    plain = _plain(value)
    if whole_floats and isinstance(plain, float) and plain.is_integer():
        plain = int(plain)
    message = f"{what}={_shown(value)} must be {meaning}" + (", or a whole float such as 1e2" if whole_floats else "")
    try:
        if isinstance(plain, (bool, Tensor)):  # `operator.index` takes True, and a tensor of one element with axes
            raise TypeError
        number = operator.index(plain)
    except TypeError:
        raise TypeError(message) from None
    if (lowest is not None and number < lowest) or (highest is not None and number > highest):
        raise ValueError(message)
    return number


def check_seed(what: str, value: Any, others: str = "") -> int:
    """The seed as an integer of Python; raise unless it is an integer that torch's generators take (`check_integer`).

    Args:
        what: the name of the argument.
        value: whatever a user gave.
        others: what else the argument may be, for the error message.

    Raises:
        TypeError: no integer.
        ValueError: one that does not fit in 64 bits.

    Example:
        >>> from blockprune.core.arguments import check_seed
        >>> check_seed("seed", torch.tensor(3))
        3
    """
    return check_integer(what, value, f"an integer from -2^63 to 2^64 - 1{others}", lowest=-(2**63), highest=2**64 - 1)


def check_counts(
    lowest: int, *, meaning: str | None = None, optional: bool = False, whole_floats: bool = False, **counts: Any
) -> list[Any]:
    """Raise for a count that is no integer (`check_integer`), or below the lowest.

    Args:
        lowest: the lowest that a count may be.
        meaning: the counts that would do, for the error message.
        optional: whether a count may be None.
        whole_floats: whether a float such as 1e9 is an integer, too.
        counts: by the names of the arguments.

    Returns:
        The counts as integers of Python, in order.

    Raises:
        ValueError: such a count, by its name.

    Example:
        >>> from blockprune.core.arguments import check_counts
        >>> check_counts(1, steps=torch.tensor(10), every=5)
        [10, 5]
    """
    meaning, checked = meaning or f"an integer, at least {lowest}", []
    for name, count in counts.items():
        try:
            is_absent = optional and count is None
            checked.append(None if is_absent else check_integer(name, count, meaning, lowest=lowest, whole_floats=whole_floats))
        except TypeError as error:
            raise ValueError(str(error)) from None
    return checked


def check_fraction(what: str, value: Any) -> float:
    """The value as a float; raise unless it is a number from 0 to 1 (`check_number`).

    Raises:
        TypeError, ValueError: anything else.

    Example:
        >>> from blockprune.core.arguments import check_fraction
        >>> check_fraction("sparsity", torch.tensor(0.5))
        0.5
    """
    meaning = "from 0 (keep all) to 1 (remove all)"
    try:
        return float(check_number(what, value, f"a number {meaning}", lowest=0, highest=1))
    except ValueError:
        raise ValueError(f"{what}={_shown(value)} must be {meaning}; 50 % is 0.5") from None


def check_sparsity(sparsity: Any) -> Any:
    """The sparsity in floats; raise unless it is a number from 0 to 1, or a mapping of parameter names or patterns to such numbers.

    Raises:
        TypeError, ValueError: anything else.

    Example:
        >>> from blockprune.core.arguments import check_sparsity
        >>> check_sparsity({"head.*": 0.25, "*": 1})
        {'head.*': 0.25, '*': 1.0}
    """
    if isinstance(sparsity, Mapping):
        return {key: check_fraction(f"sparsity[{key!r}]", fraction) for key, fraction in sparsity.items()}
    try:
        return check_fraction("sparsity", sparsity)
    except TypeError as error:
        raise TypeError(f"{error}, or a mapping of parameter names to numbers") from None


def check_function(what: str, value: Any, signature: str, *, optional: bool = False) -> None:
    """Raise unless a value can be called, and is not a class of modules, which is called to make one.

    Args:
        what: the name of the argument.
        value: whatever a user gave.
        signature: what the function takes and returns, for the error message.
        optional: whether it may be None.

    Raises:
        TypeError: it cannot, or it is a class of modules.

    Example:
        >>> from blockprune.core.arguments import check_function
        >>> check_function("loss", max, "(output, batch) -> one number")
    """
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise TypeError(f"{what}={value.__name__} is a class; give a function {signature}, or a module of this class: {value.__name__}()")
    if not (callable(value) or (optional and value is None)):
        raise TypeError(f"{what}={_shown(value)} must be a function {signature}")


def torch_loss(loss: Any, arguments: str) -> tuple[str, str] | None:
    """The name of a loss of torch, which takes the output and a target, and the code that calls it; None for any other function.

    Args:
        loss: a function such as ``F.mse_loss``, a module such as ``nn.MSELoss()``, its class, or a ``functools.partial`` of one.
        arguments: the code of what to call it with.

    Example:
        >>> from blockprune.core.arguments import torch_loss
        >>> torch_loss(nn.functional.mse_loss, "x, y"), torch_loss(nn.MSELoss(), "x, y")
        (('mse_loss', 'mse_loss(x, y)'), ('MSELoss', 'loss_function(x, y), with loss_function = nn.MSELoss()'))
    """
    loss = unwrap_partial(loss)
    kind = loss if isinstance(loss, type) else type(loss)
    if kind.__module__ == "torch.nn.modules.loss":
        return kind.__name__, f"loss_function({arguments}), with loss_function = nn.{kind.__name__}()"
    of_torch = getattr(loss, "__module__", "") in ("torch.nn.functional", "torch") and hasattr(loss, "__name__")
    if of_torch and not hasattr(loss, "__wrapped__"):  # functools.wraps gives a user's function the module of the one that it wraps
        return loss.__name__, f"{loss.__name__}({arguments})"
    return None


def unwrap_partial(function: Any) -> Any:
    """The function to which `functools.partial` binds arguments; any other as it is.

    Example:
        >>> from blockprune.core.arguments import unwrap_partial
        >>> unwrap_partial(partial(partial(max, 1), 2)) is max
        True
    """
    while isinstance(function, functools.partial):
        function = function.func
    return function


def check_model(model: Any, what: str = "model") -> None:
    """Raise unless this is a module.

    Raises:
        TypeError: anything else, such as a state dict.

    Example:
        >>> from blockprune.core.arguments import check_model
        >>> check_model(nn.Linear(2, 2))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what} has the type {type(model).__name__}; give a torch.nn.Module")


def check_tensor(what: str, value: Any) -> None:
    """Raise unless this is a tensor.

    Raises:
        TypeError: anything else, such as a list or a NumPy array.

    Example:
        >>> from blockprune.core.arguments import check_tensor
        >>> check_tensor("keep", torch.ones(2))
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is a {type(value).__name__}, not a tensor; convert it: torch.as_tensor(...)")


def _plain(value: Any) -> Any:
    """What NumPy's number, or a tensor or array without axes, holds, as a number of Python; everything else as it is."""
    has_item = isinstance(value, (np.generic, np.ndarray)) or (isinstance(value, Tensor) and not value.is_meta)
    return value.item() if has_item and value.ndim == 0 else value


def _shown(value: Any) -> str:
    """A value for an error message; its type if the value is long."""
    if isinstance(value, Tensor) and value.ndim:
        return f"tensor of shape {tuple(value.shape)}"
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return type(value).__name__
    return text if len(text) <= 80 and "\n" not in text else type(value).__name__
