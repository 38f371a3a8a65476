"""Rules that select the parameters to prune and their block shapes.

A rule is any function ``(name, module) -> block or None``; it is called with the name of each parameter and the module that owns it. The
rules in this file are ``functools.partial`` objects, so a pipeline that contains one can be pickled, and print as source code.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.core._compat import BatchNorm, ConvNd, NormBase
from blockprune.core.grid import BlockGrid, BlockShape, int_tuple
from blockprune.core.patterns import Pattern, check_pattern, matches, suggest
from blockprune.core.pipeline import as_code
from blockprune.core.types import Where, check_prunable
from blockprune.core.unit_permutation import UnitPermutation
from blockprune.model.computed_weights import check_is_parameter
from blockprune.model.hf_linears import is_transposed
from blockprune.model.parameters import ParameterRef, check_not_lazy, exported_hint, is_exported, parameter_refs, scripted_hint


class _Rule(partial[Any]):
    """A partial that prints as source code."""

    def __repr__(self) -> str:
        return as_code(self)


def linears(block: BlockShape) -> Where:
    """The weight of every ``nn.Linear``, subclasses included.

    Args:
        block: its size along the leading axes; -1, or an axis that is left out, is taken whole.

    Raises:
        TypeError: a block that is not whole numbers.

    Example:
        >>> bp.linears((4, 4))("encoder.weight", nn.Linear(8, 8))
        (4, 4)
    """
    return _Rule(_linears, block=int_tuple("block", block))


def convs(block: BlockShape) -> Where:
    """The weight of every convolution: 1d, 2d, 3d and transposed.

    The block ``(1,)`` is a filter (an input channel if transposed).

    Args:
        block: its size along the leading axes; -1, or an axis that is left out, is taken whole.

    Raises:
        TypeError: a block that is not whole numbers.

    Example:
        >>> bp.convs((1,))("stem.weight", nn.Conv2d(3, 8, 3))
        (1,)
    """
    return _Rule(_convs, block=int_tuple("block", block))


def batchnorms(block: BlockShape = (1,)) -> Where:
    """The weight (scale) of every batch norm, such as for network slimming with `regularizers.group_lasso`.

    Args:
        block: its size along the leading axes; -1, or an axis that is left out, is taken whole.

    Raises:
        TypeError: a block that is not whole numbers.

    Example:
        >>> bp.batchnorms()("bn1.weight", nn.BatchNorm2d(8))
        (1,)
    """
    return _Rule(_batchnorms, block=int_tuple("block", block))


def named(pattern: Pattern, block: BlockShape) -> Where:
    """Every parameter whose full name matches a glob such as ``"*.mlp.*.weight"``, or a regular expression from ``re.compile``.

    Args:
        pattern: a glob that fits the whole name, or a compiled regular expression that fits a part of it.
        block: as in `linears`.

    Raises:
        TypeError: a pattern that is neither, or a block that is not whole numbers.

    Example:
        >>> bp.named("layers.*.weight", (4, 4))("layers.0.weight", nn.Linear(8, 8))
        (4, 4)
    """
    check_pattern(pattern)
    return _Rule(_named, pattern=pattern, block=int_tuple("block", block))


def units(axes: Sequence[UnitPermutation]) -> Where:
    """Every parameter that has one of these hidden axes, in blocks of one unit or head, for allocators with ``coupled=axes``.

    Raises:
        TypeError: something else than axes, such as a model.

    Example:
        >>> axis = bp.UnitPermutation(torch.arange(8), rows=["0.weight", "0.bias"], columns=["2.weight"])
        >>> rule = bp.units([axis])
        >>> rule("0.weight", nn.Linear(4, 8)), rule("0.bias", nn.Linear(4, 8)), rule("2.weight", nn.Linear(8, 4))
        ((1, -1), (1,), (-1, 1))
    """
    if not isinstance(axes, (list, tuple)) or not all(isinstance(axis, UnitPermutation) for axis in axes):
        raise TypeError(f"axes is {type(axes).__name__} and must be a list of hidden axes, as bp.find_axes(model, example) returns")
    return _Rule(_units, axes=tuple(axes))


def norms_and_biases(name: str, owner: nn.Module) -> BlockShape | None:
    """The parameters of norms, and biases.

    It is a rule itself, for ``where=`` of `distill`.

    Norms are those of torch, and modules whose class has "Norm" in its name, such as an RMSNorm of your own; biases are parameters whose
    name contains "bias".

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> bp.norms_and_biases("bias", layer), bp.norms_and_biases("weight", layer), bp.norms_and_biases("weight", nn.LayerNorm(4))
        ((), None, ())
    """
    is_norm = isinstance(owner, (NormBase, nn.LayerNorm, nn.GroupNorm)) or (
        "Norm" in _type_name(owner) and not isinstance(owner, (nn.Linear, ConvNd, nn.Embedding)) and not is_exported(owner)
    )
    return () if is_norm or "bias" in name.rpartition(".")[2] else None


def first_of(*rules: Where) -> Where:
    """Each parameter gets the block of the first rule that selects it.

    Raises:
        TypeError: something that is no rule.

    Example:
        >>> rule = bp.first_of(bp.named("head.*", (1, 16)), bp.linears((16, 16)))
        >>> rule
        first_of(named(pattern='head.*', block=(1, 16)), linears(block=(16, 16)))
        >>> rule("head.weight", nn.Linear(32, 32)), rule("body.weight", nn.Linear(32, 32))
        ((1, 16), (16, 16))
    """
    for rule in rules:
        _check_rule("rule", rule)
    return _Rule(_first_of, *rules)


def including(rule: Where, pattern: Pattern, *others: Pattern) -> Where:
    """The parameters that a rule selects and whose name matches at least one of the patterns, such as those of the hidden layers.

    Args:
        rule: which parameters, in what blocks.
        pattern: a glob that fits the whole name, or a compiled regular expression that fits a part of it.
        others: more patterns.

    Raises:
        TypeError: something that is no rule, or no pattern.

    Example:
        >>> rule = bp.including(bp.linears((4, 4)), "model.layers.*")
        >>> rule("model.layers.0.mlp.weight", nn.Linear(8, 8)), rule("lm_head.weight", nn.Linear(8, 8))
        ((4, 4), None)
    """
    _check_rule("rule", rule)
    check_pattern(pattern)
    return _Rule(_including, rule=rule, pattern=pattern) if not others else first_of(*(including(rule, p) for p in (pattern, *others)))


def excluding(rule: Where, pattern: Pattern, *others: Pattern) -> Where:
    """The parameters that a rule selects, without those whose name matches one of the patterns.

    A tied tensor is left out if any of its names matches.

    Args:
        rule: which parameters, in what blocks.
        pattern: a glob that fits the whole name, or a compiled regular expression that fits a part of it.
        others: more patterns.

    Raises:
        TypeError: something that is no rule, or no pattern.

    Example:
        >>> bp.excluding(bp.linears((4, 4)), "head.*")("head.weight", nn.Linear(8, 8)) is None
        True
    """
    _check_rule("rule", rule)
    check_pattern(pattern)
    return _Rule(_excluding, rule=rule, pattern=pattern) if not others else excluding(excluding(rule, pattern), *others)


def including_names(rule: Where, names: Collection[str]) -> Where:
    """The parameters that a rule selects and that have one of these names; patterns in the rule need not match any of them.

    Example:
        >>> from blockprune.model.selection import including_names
        >>> including_names(bp.linears((4, 4)), {"a.weight"})("b.weight", nn.Linear(8, 8)) is None
        True
    """
    return partial(_including_names, rule, frozenset(names))


def with_block(rule: Where, block: BlockShape) -> Where:
    """The parameters that a rule selects, with another block shape.

    Raises:
        TypeError: something that is no rule, or a block that is not whole numbers.

    Example:
        >>> bp.with_block(bp.linears((16, 16)), (1, 1))("weight", nn.Linear(32, 32))
        (1, 1)
    """
    _check_rule("rule", rule)
    return _Rule(_with_block, rule=rule, block=int_tuple("block", block))


def _check_rule(what: str, rule: Any) -> None:
    """Raise a TypeError unless this is a function (parameter name, its module) -> block."""
    if not callable(rule):
        raise TypeError(f"{what}={rule!r} must be a rule that selects parameters; for blocks of this shape: {what}=bp.linears({rule!r})")
    makers = (linears, convs, batchnorms, named, units, first_of, including, excluding, with_block)
    if any(rule is maker for maker in makers):
        raise TypeError(f"{what}={rule.__name__} makes rules and is none itself; call it, such as {what}=bp.linears((4, 4))")
    try:
        signature(rule).bind("name", None)
    except TypeError:
        raise TypeError(f"{what}={as_code(rule)} must be a function (parameter name, its module) -> block, or None") from None
    except ValueError:  # some functions in C have no signature
        return


def _linears(name: str, owner: nn.Module, *, block: tuple[int, ...]) -> tuple[int, ...] | None:
    return block if isinstance(owner, nn.Linear) and _is_weight(name) else None


def _convs(name: str, owner: nn.Module, *, block: tuple[int, ...]) -> tuple[int, ...] | None:
    return block if isinstance(owner, ConvNd) and _is_weight(name) else None


def _batchnorms(name: str, owner: nn.Module, *, block: tuple[int, ...]) -> tuple[int, ...] | None:
    return block if isinstance(owner, BatchNorm) and _is_weight(name) else None


def _is_weight(name: str) -> bool:
    """Whether a parameter is the weight of its module, and not another one of a subclass, such as a ``scale_weight``."""
    return name.rpartition(".")[2] == "weight"


def _named(name: str, owner: nn.Module, *, pattern: Pattern, block: tuple[int, ...]) -> tuple[int, ...] | None:
    return block if matches(pattern, name) else None


def _units(name: str, owner: nn.Module, *, axes: tuple[UnitPermutation, ...]) -> tuple[int, ...] | None:
    shape = ParameterRef(name, owner, name.rpartition(".")[2]).shape
    runs = {tensor_axis: axis.run_length(name, shape[tensor_axis]) for axis in axes for tensor_axis in axis.tensor_axes(name, len(shape))}
    return tuple(runs.get(tensor_axis, -1) for tensor_axis in range(len(shape))) if runs else None


def _first_of(*rules_name_owner: Any) -> BlockShape | None:
    *rules, name, owner = rules_name_owner  # positional, so that the rule prints as it is written
    return next((block for rule in rules if (block := rule(name, owner)) is not None), None)


def _including(name: str, owner: nn.Module, *, rule: Where, pattern: Pattern) -> BlockShape | None:
    return rule(name, owner) if matches(pattern, name) else None


def _including_names(rule: Where, names: Collection[str], name: str, owner: nn.Module) -> BlockShape | None:
    return rule(name, owner) if name in names else None


def _with_block(name: str, owner: nn.Module, *, rule: Where, block: tuple[int, ...]) -> tuple[int, ...] | None:
    return None if rule(name, owner) is None else block


def _excluding(
    name: str, owner: nn.Module, *, rule: Where, pattern: Pattern, aliases: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> BlockShape | None:
    return None if any(matches(pattern, known) for known in (name, *aliases.get(name, ()))) else rule(name, owner)


def _with_aliases(where: Any, aliases: Mapping[str, Sequence[str]]) -> Any:
    """A rule whose `excluding`, also within other rules, knows the other names of tied parameters."""
    if type(where) not in (partial, _Rule):
        return where
    keywords = {key: _with_aliases(x, aliases) for key, x in where.keywords.items()}
    known = {"aliases": aliases} if where.func is _excluding else {}
    return partial(where.func, *(_with_aliases(x, aliases) for x in where.args), **keywords, **known)


def select(model: nn.Module, where: Where) -> dict[str, tuple[ParameterRef, BlockGrid]]:
    """The parameters that a rule selects, by canonical name, with their blocks.

    Raises:
        ValueError: the rule, or a pattern in it, matches no parameter; or a block does not fit its parameter.
        TypeError: ``where`` is no rule; the rule returns a block that is not a sequence of integers, or selects a weight that is quantized,
            sparse, of integers, or another tensor subclass with values of its own.
    """
    _check_rule("where", where)
    refs = parameter_refs(model)
    check_is_parameter(model, where)
    owners = {ref.name: ref.owner for shared in refs.values() for ref in shared}
    for pattern, rule, names in _patterns(where, selecting=list(refs), excluding=list(owners)):
        if not any(matches(pattern, name) for name in names):
            by_rule = [] if rule is None else [name for name in names if rule(name, owners[name]) is not None]
            hint = suggest(str(pattern), by_rule, listed="its rule selects") if by_rule else suggest(str(pattern), names)
            raise ValueError(f"where: the pattern {pattern!r} matches no parameter{hint}{_tied_names(refs)}{exported_hint(model)}")
    tied = {name: [alias.name for alias in aliases] for name, (_, *aliases) in refs.items() if aliases}
    rule = _with_aliases(where, tied) if tied else where
    selected: dict[str, tuple[ParameterRef, BlockGrid]] = {}
    for name, (ref, *_) in refs.items():
        block = rule(name, ref.owner)
        if block is not None:
            _check_dense(name, ref.stored)
            try:
                selected[name] = ref, BlockGrid(ref.shape, block)
            except (ValueError, TypeError) as error:
                raise type(error)(
                    f"{name}: {error}; or give this parameter another block with `first_of`, or leave it out: "
                    f"where=bp.excluding({as_code(where, prefix='bp.')}, {name!r})"
                ) from None
    if not selected:
        parameters = [f"{name!r} {_shape(ref)} of {_type_name(ref.owner)}" for name, (ref, *_) in refs.items()]
        listed = ", ".join(parameters[:8] + ["..."] * (len(parameters) > 8)) or "no parameters"
        hint = _why_nothing_matches(model)
        raise ValueError(f"where={as_code(where)} matches no parameter of {_type_name(model)}; it has {listed}{_tied_names(refs)}{hint}")
    return selected


def _check_dense(name: str, weight: Tensor) -> None:
    """Raise for a weight that has no values yet, or whose values are not those of a plain tensor."""
    check_not_lazy(name, weight)
    if hasattr(weight, "__tensor_flatten__") and type(weight).__name__ != "DTensor":
        raise TypeError(
            f"{name}: the weight {tuple(weight.shape)} is a {type(weight).__name__}, a tensor subclass that stores different values than "
            "those of the weight (such as a quantized one); prune the model before it is converted, or leave this weight out with "
            "`excluding`"
        )
    if not weight.is_meta:
        check_prunable(name, weight)


def _shape(ref: ParameterRef) -> tuple[int, ...] | str:
    return "(no shape yet)" if torch.nn.parameter.is_lazy(ref.stored) else ref.shape


def _why_nothing_matches(model: nn.Module) -> str:
    """The end of an error message: layers of the model that look like Linears or convolutions, but are none, or have been exported."""
    modules = list(model.modules())
    if hint := exported_hint(model):
        return hint
    if any(map(is_transposed, modules)):
        return "; its Conv1D are no Linears: bp.as_linears(model)"
    if hint := scripted_hint(model):
        return hint
    quantized = sorted({_type_name(module) for module in modules if ".quantized." in type(module).__module__})
    return f"; its layers {', '.join(quantized)} are quantized: prune the model before it is quantized" if quantized else ""


def _patterns(where: Any, *, selecting: list[str], excluding: list[str]) -> Iterator[tuple[Pattern, Where | None, list[str]]]:
    """The patterns in a rule and in the rules that it is made of.

    Each comes with the rule that it limits, if any, and the names of which it should match at least one.
    """
    if isinstance(where, partial):
        if "pattern" in where.keywords:
            yield where.keywords["pattern"], where.keywords.get("rule"), excluding if where.func is _excluding else selecting
        for rule in (where.keywords.get("rule"), *(where.args if where.func is _first_of else ())):
            yield from _patterns(rule, selecting=selecting, excluding=excluding)


def _tied_names(refs: dict[str, list[ParameterRef]]) -> str:
    """The end of an error message: which names are those of tied parameters, whose first name a rule must match."""
    tied = [f"{alias.name!r} is tied to {name!r}" for name, (_, *aliases) in refs.items() for alias in aliases]
    return f" ({'; '.join(tied)}: use that name)" if tied else ""


def _type_name(module: nn.Module) -> str:
    return nn.utils.parametrize.type_before_parametrizations(module).__name__
