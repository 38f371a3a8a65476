"""Parameter names and patterns: which value of a mapping belongs to which parameter, and which names resemble a mistyped one."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

V = TypeVar("V")
Pattern = str | re.Pattern[str]


def matches(pattern: Pattern, name: str) -> bool:
    """Whether a name is this string, matches it as a glob, or contains a match of a regular expression (``re.compile(...)``)."""
    return pattern == name or fnmatch.fnmatchcase(name, pattern) if isinstance(pattern, str) else pattern.search(name) is not None


def check_pattern(pattern: Any) -> None:
    """Raise unless this is a glob or a regular expression for strings.

    Raises:
        TypeError: anything else, such as a list of them.

    Example:
        >>> from blockprune.core.patterns import check_pattern
        >>> check_pattern("layers.*.weight")
    """
    if isinstance(pattern, (list, tuple, set, frozenset)):
        raise TypeError(f"pattern={pattern!r} must be one pattern; give several one after the other, such as excluding(rule, 'a.*', 'b.*')")
    if not isinstance(pattern, str) and not (isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str)):
        raise TypeError(f'pattern={pattern!r} must be a glob such as "*.mlp.*.weight" or re.compile(...) of a string')


def resolve_by_name(values: Mapping[str, V], names: Iterable[str], *, what: str, default: V | None = None) -> dict[str, V]:
    """The value of each name, from a mapping whose keys are names or patterns (`matching_keys`).

    Args:
        values: by name, glob or regular expression; "*" stands for all names that no other key matches.
        names: the names that need a value.
        what: what the mapping is called in error messages.
        default: the value of names that no key matches.

    Raises:
        KeyError: a key matches no name; or no key matches a name, and there is no default.

    Example:
        >>> from blockprune.core.patterns import resolve_by_name
        >>> resolve_by_name({"a.*": 1, "a.w": 2, "*": 0}, ["a.w", "a.v", "b"], what="sparsity")
        {'a.w': 2, 'a.v': 1, 'b': 0}
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{what}={values!r} must be a mapping from parameter names or patterns to values, such as {{'*': 1.0}}")
    names = dict.fromkeys(names)
    for key in values:
        if not isinstance(key, (str, re.Pattern)) or (isinstance(key, re.Pattern) and not isinstance(key.pattern, str)):
            raise KeyError(f"{what} has a key {key!r} that is not a parameter name or pattern{suggest(str(key), names)}")
        if key not in names and key != "*" and not (_is_pattern(key) and any(matches(key, name) for name in names)):
            raise KeyError(f"{what} has a key {key!r} that matches no parameter{suggest(str(key), names)}")
    resolved: dict[str, V] = {}
    for name, match in matching_keys(values, names).items():
        if match is None and default is None:
            raise KeyError(f"{what} has no key for {name!r}; add one, or the key '*' for all parameters that no other key matches")
        resolved[name] = cast(V, default) if match is None else values[match]
    return resolved


def matching_keys(values: Mapping[str, V], names: Iterable[str]) -> dict[str, str | None]:
    """The key for each name: the name itself, else the first pattern that matches it, else "*"; None if there is none of them.

    Example:
        >>> from blockprune.core.patterns import matching_keys
        >>> matching_keys({"*": 0.5, "a.*": 0.25}, ["a.weight", "b.weight"])
        {'a.weight': 'a.*', 'b.weight': '*'}
    """
    patterns = [key for key in values if key != "*" and _is_pattern(key)]  # few, so that a key for each name costs no comparisons
    rest = "*" if "*" in values else None
    return {name: name if name in values else next((key for key in patterns if matches(key, name)), rest) for name in names}


def _is_pattern(key: Pattern) -> bool:
    """Whether a key may match other names than the one that it is."""
    return not isinstance(key, str) or any(character in key for character in "*?[")


def suggest(name: str, names: Iterable[str], *, listed: str = "the names are") -> str:
    """The end of an error message about a mistyped name: the names that resemble it, or else the first names that exist.

    ``listed`` are the words before the first names.
    """
    names = list(names)
    similar = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or [n for n in names if name in n][:3]
    if similar:
        return f"; similar names: {', '.join(map(repr, similar))}"
    return f"; {listed} {', '.join(map(repr, names[:6]))}{', ...' if len(names) > 6 else ''}" if names else "; there are no names"
