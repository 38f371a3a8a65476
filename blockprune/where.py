"""Which parameters to prune, in what blocks: rules from a parameter's name and its owner to a block shape.

A rule is any function ``(name, owner) -> block | None``; those here are partials of plain functions, so a pipeline that
holds one prints well and pickles.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from blockprune.as_linears import is_transposed
from blockprune.blocks import BlockGrid, BlockShape, integers
from blockprune.names import Pattern, Slot, matches, near, slots
from blockprune.types import Where


def linears(block: BlockShape) -> Where:
    """The weight of every ``nn.Linear``, subclasses included.

    Example:
        >>> bp.linears((4, 4))("encoder.weight", nn.Linear(8, 8))
        (4, 4)
    """
    return partial(_linears, block=integers("block", block))


def convs(block: BlockShape) -> Where:
    """The weight of every convolution: 1d, 2d, 3d and transposed; ``(1,)`` is a filter (of a transposed one, an input channel).

    Example:
        >>> bp.convs((1,))("stem.weight", nn.Conv2d(3, 8, 3))
        (1,)
    """
    return partial(_convs, block=integers("block", block))


def named(pattern: Pattern, block: BlockShape) -> Where:
    """Every parameter whose full name fits a glob such as ``"*.mlp.*.weight"``, or a regular expression from ``re.compile``.

    Example:
        >>> bp.named("layers.*.weight", (4, 4))("layers.0.weight", nn.Linear(8, 8))
        (4, 4)
    """
    if not isinstance(pattern, (str, re.Pattern)):
        raise TypeError(f'pattern={pattern!r} must be a glob such as "*.mlp.*.weight" or re.compile(...)')
    return partial(_named, pattern=pattern, block=integers("block", block))


def first_of(*rules: Where) -> Where:
    """The first rule that gives a block decides.

    Example:
        >>> rule = bp.first_of(bp.named("head.*", (1, 16)), bp.linears((16, 16)))
        >>> rule("head.weight", nn.Linear(32, 32)), rule("body.weight", nn.Linear(32, 32))
        ((1, 16), (16, 16))
    """
    return partial(_first_of, rules=rules)


def including(rule: Where, pattern: Pattern, *others: Pattern) -> Where:
    """A rule with only the parameters whose name fits the pattern, or one of several: those of the layers, say, without the head.

    Example:
        >>> rule = bp.including(bp.linears((4, 4)), "model.layers.*")
        >>> rule("model.layers.0.mlp.weight", nn.Linear(8, 8)), rule("lm_head.weight", nn.Linear(8, 8))
        ((4, 4), None)
    """
    return partial(_including, rule=rule, pattern=pattern) if not others else first_of(*(including(rule, p) for p in (pattern, *others)))


def excluding(rule: Where, pattern: Pattern, *others: Pattern) -> Where:
    """A rule without the parameters whose name fits the pattern, or one of several.

    Example:
        >>> bp.excluding(bp.linears((4, 4)), "head.*")("head.weight", nn.Linear(8, 8)) is None
        True
    """
    return partial(_excluding, rule=rule, pattern=pattern) if not others else excluding(excluding(rule, pattern), *others)


def _linears(name: str, owner: nn.Module, *, block: tuple[int, ...]) -> tuple[int, ...] | None:
    return block if isinstance(owner, nn.Linear) and name.endswith("weight") else None


def _convs(name: str, owner: nn.Module, *, block: tuple[int, ...]) -> tuple[int, ...] | None:
    return block if isinstance(owner, nn.modules.conv._ConvNd) and name.endswith("weight") else None


def _named(name: str, owner: nn.Module, *, pattern: Pattern, block: tuple[int, ...]) -> tuple[int, ...] | None:
    return block if matches(pattern, name) else None


def _first_of(name: str, owner: nn.Module, *, rules: tuple[Where, ...]) -> BlockShape | None:
    return next((block for rule in rules if (block := rule(name, owner)) is not None), None)


def _including(name: str, owner: nn.Module, *, rule: Where, pattern: Pattern) -> BlockShape | None:
    return rule(name, owner) if matches(pattern, name) else None


def _excluding(name: str, owner: nn.Module, *, rule: Where, pattern: Pattern) -> BlockShape | None:
    return None if matches(pattern, name) else rule(name, owner)


def select(model: nn.Module, where: Where) -> dict[str, tuple[Slot, BlockGrid]]:
    """The parameters a rule chooses, by canonical name, with their blocks.

    Raises:
        ValueError: a rule or a pattern in it that matches nothing, or a block that does not fit, with the parameter's name.
    """
    known = slots(model)
    aliases = [slot.name for places in known.values() for slot in places]
    for pattern, names in _patterns(where, chooses=list(known), excludes=aliases):
        if not any(matches(pattern, name) for name in names):
            raise ValueError(f"where: the pattern {pattern!r} matches no parameter{near(str(pattern), names)}{_tied(known)}")
    chosen: dict[str, tuple[Slot, BlockGrid]] = {}
    for name, (slot, *_) in known.items():
        block = where(name, slot.owner)
        if block is not None:
            try:
                chosen[name] = slot, BlockGrid(slot.shape, block)
            except (ValueError, TypeError) as error:
                raise type(error)(
                    f"{name}: {error}; or give this parameter blocks of its own with `first_of`, or leave it out with `excluding`"
                ) from None
    if not chosen:
        seen = [f"{name!r} {s.shape} of {_plain_type(s.owner)}" for name, (s, *_) in known.items()]
        listed = ", ".join(seen[:8] + ["..."] * (len(seen) > 8)) or "no parameters"
        rest = "; its Conv1D are no Linears: bp.as_linears(model)" if any(map(is_transposed, model.modules())) else ""
        raise ValueError(f"where={where!r} matches no parameter of {_plain_type(model)}; it has {listed}{_tied(known)}{rest}")
    return chosen


def _patterns(where: Any, *, chooses: list[str], excludes: list[str]) -> Iterator[tuple[Pattern, list[str]]]:
    """The patterns written in a rule with the names each should fit, so that a typo in one of several rules is not silent."""
    if isinstance(where, partial):
        if "pattern" in where.keywords:
            yield where.keywords["pattern"], excludes if where.func is _excluding else chooses
        for rule in (where.keywords.get("rule"), *where.keywords.get("rules", ())):
            yield from _patterns(rule, chooses=chooses, excludes=excludes)


def _tied(known: dict[str, list[Slot]]) -> str:
    """The end of an error message: a tied parameter is known by its first name only."""
    tied = [f"{other.name!r} is tied to {name!r}" for name, (_, *others) in known.items() for other in others]
    return f" ({'; '.join(tied)}: use that name)" if tied else ""


def _plain_type(module: nn.Module) -> str:
    return nn.utils.parametrize.type_before_parametrizations(module).__name__
