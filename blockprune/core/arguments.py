"""Checks of arguments that are numbers, functions or models; each error names the argument, what was given and what would do."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def check_number(
    what: str,
    value: Any,
    meaning: str = "a number",
    *,
    above: float = -math.inf,
    lowest: float = -math.inf,
    highest: float = math.inf,
    finite: bool = True,
) -> None:
    """Raise unless a value is a number, or a tensor without axes, within the limits.

    Args:
        what: the name of the argument.
        value: whatever a user gave.
        meaning: the numbers that would do, for the error message, such as "a number above 0".
        above: the number that the value must be above.
        lowest: the lowest number that it may be.
        highest: the highest number that it may be.
        finite: whether infinity is refused.

    Raises:
        TypeError: no number.
        ValueError: NaN, or a number outside the limits.

    Example:
        >>> from blockprune.core.arguments import check_number
        >>> check_number("damping", 0.01, "a number from 0 on", lowest=0)
    """
    is_number = isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex())
    if isinstance(value, bool) or not is_number:
        raise TypeError(f"{what}={_shown(value)} must be {meaning}")
    if not (value > above and lowest <= value <= highest) or (finite and not math.isfinite(value)):
        raise ValueError(f"{what}={value!r} must be {meaning}")


def check_counts(lowest: int, **counts: Any) -> None:
    """Raise for a count that is no integer, or below the lowest.

    Raises:
        ValueError: such a count, by its name.

    Example:
        >>> from blockprune.core.arguments import check_counts
        >>> check_counts(1, steps=10, every=5)
    """
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < lowest:
            raise ValueError(f"{name}={_shown(count)} must be an integer, at least {lowest}")


def check_fraction(what: str, value: float) -> None:
    """Raise unless a value is a number from 0 to 1.

    Raises:
        TypeError, ValueError: anything else.

    Example:
        >>> from blockprune.core.arguments import check_fraction
        >>> check_fraction("sparsity", 0.5)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what}={_shown(value)} must be a number from 0 (keep all) to 1 (remove all)")
    if not 0 <= value <= 1:
        raise ValueError(f"{what}={value!r} must be from 0 (keep all) to 1 (remove all); 50 % is 0.5")


def check_sparsity(sparsity: Any) -> None:
    """Raise unless this is a number from 0 to 1, or a mapping of parameter names or patterns to such numbers.

    Raises:
        TypeError, ValueError: anything else.

    Example:
        >>> from blockprune.core.arguments import check_sparsity
        >>> check_sparsity({"head.*": 0.25, "*": 0.5})
    """
    if isinstance(sparsity, Mapping):
        for key, fraction in sparsity.items():
            check_fraction(f"sparsity[{key!r}]", fraction)
        return
    try:
        check_fraction("sparsity", sparsity)
    except TypeError as error:
        raise TypeError(f"{error}, or a mapping of parameter names to numbers") from None


def check_function(what: str, value: Any, signature: str) -> None:
    """Raise unless a value can be called.

    Args:
        what: the name of the argument.
        value: whatever a user gave.
        signature: what the function takes and returns, for the error message.

    Raises:
        TypeError: it cannot.

    Example:
        >>> from blockprune.core.arguments import check_function
        >>> check_function("loss", max, "(output, batch) -> one number")
    """
    if not callable(value):
        raise TypeError(f"{what}={_shown(value)} must be a function {signature}")


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


def _shown(value: Any) -> str:
    """A value for an error message; its type if the value is long."""
    if isinstance(value, Tensor) and value.ndim:
        return f"tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else type(value).__name__
