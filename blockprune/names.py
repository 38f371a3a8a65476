"""Canonical parameter names: what a parameter is called whether or not it is masked, shared or parametrized.

A parameter keeps the name it has in the plain model (``encoder.0.weight``), never ``parametrizations.weight.original``.
A tensor that several modules share (tied weights) goes by its first name, and all its users are known.
"""

import contextlib
import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar, cast

import attrs
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockprune.parametrization import MaskBlocks

V = TypeVar("V")
Pattern = str | re.Pattern[str]


@attrs.frozen(eq=False)
class Slot:
    """One place where a parameter lives: the module that owns it and the attribute's name there."""

    name: str
    owner: nn.Module
    attr: str

    @property
    def chain(self) -> parametrize.ParametrizationList | None:
        """The torch parametrizations on it, if any."""
        if not parametrize.is_parametrized(self.owner, self.attr):
            return None
        return cast(parametrize.ParametrizationList, cast(nn.ModuleDict, self.owner.parametrizations)[self.attr])

    @property
    def masking(self) -> MaskBlocks | None:
        """Our parametrization on it, if any."""
        return next((p for p in self.chain or () if isinstance(p, MaskBlocks)), None)

    @property
    def alone(self) -> bool:
        """Whether no other parametrization computes the weight from what is stored."""
        return self.chain is None or (len(self.chain) == 1 and self.masking is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape; several tensors (weight_norm) are stored in other shapes than the weight's."""
        chain = self.chain
        return tuple(self.stored.shape if chain is None or chain.is_tensor else self.masked.shape)

    @property
    def stored(self) -> Tensor:
        """The tensor in storage: the parameter itself, or the (first) original behind its parametrizations."""
        chain = self.chain
        if chain is None:
            return cast(Tensor, getattr(self.owner, self.attr))
        return chain.original if chain.is_tensor else cast(Tensor, chain.original0)

    @property
    def originals(self) -> list[Tensor]:
        """All tensors in storage behind the weight."""
        chain = self.chain
        return [self.stored] if chain is None or chain.is_tensor else [getattr(chain, f"original{i}") for i in range(chain.ntensors)]

    @property
    def dense(self) -> Tensor:
        """The weight without our mask (with the parametrizations of others, such as weight_norm)."""
        chain = self.chain
        if chain is None or self.masking is None:
            return self.masked
        if len(chain) == 1:
            return self.stored
        with _still(chain):
            first, *others = [p for p in chain if not isinstance(p, MaskBlocks)]
            weight = first(*self.originals)
            for parametrization in others:
                weight = parametrization(weight)
        return cast(Tensor, weight)

    @property
    def masked(self) -> Tensor:
        """The weight as the model uses it."""
        with _still(self.chain):
            return cast(Tensor, getattr(self.owner, self.attr))


@contextlib.contextmanager
def _still(chain: nn.Module | None) -> Iterator[None]:
    """Parametrizations in evaluation mode: in training a read of spectral_norm moves its buffers."""
    modes = [(module, module.training) for module in chain.modules()] if chain is not None else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def slots(model: nn.Module) -> dict[str, list[Slot]]:
    """Every parameter of the model by canonical name, with all the places that share it, in the plain model's order."""
    shared: dict[int, list[Slot]] = {}
    for slot in _walk(model):
        shared.setdefault(id(slot.stored), []).append(slot)
    return {places[0].name: places for places in shared.values()}


def _walk(model: nn.Module) -> Iterator[Slot]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, parametrize.ParametrizationList):
            continue
        attrs_here = [name for name, value in module._parameters.items() if value is not None]
        if parametrize.is_parametrized(module):
            moved = [Slot("", module, attr) for attr in cast(nn.ModuleDict, module.parametrizations)]
            moved = [slot for slot in moved if isinstance(slot.stored, nn.Parameter)]
            attrs_here += [slot.attr for slot in moved]
            order = next((slot.masking.order for slot in moved if slot.masking), ())
            attrs_here.sort(key=lambda attr: order.index(attr) if attr in order else len(order))  # the plain module's order
        for attr in attrs_here:
            yield Slot(f"{prefix}.{attr}" if prefix else attr, module, attr)


def find(model: nn.Module, names: Iterable[str], *, what: str) -> dict[str, list[Slot]]:
    """The slots of these parameters by canonical name.

    Raises:
        KeyError: a name the model does not have, or two names of one tied tensor.
    """
    known = slots(model)
    canonical = {slot.name: name for name, places in known.items() for slot in places}
    found: dict[str, list[Slot]] = {}
    for name in names:
        if name not in canonical:
            raise KeyError(f"{what} names {name!r}, which is not a parameter of the model{near(str(name), canonical)}")
        if canonical[name] in found:
            raise KeyError(f"{what} names one tied tensor twice: {name!r} is {canonical[name]!r}; give it once")
        found[canonical[name]] = known[canonical[name]]
    return found


def matches(pattern: Pattern, name: str) -> bool:
    """Whether a name fits a glob (a string) or a regular expression (``re.compile(...)``, found anywhere in the name)."""
    return fnmatch.fnmatchcase(name, pattern) if isinstance(pattern, str) else pattern.search(name) is not None


def lookup(values: Mapping[str, V], names: Iterable[str], *, what: str, default: V) -> dict[str, V]:
    """A value for every name from a mapping by name or glob pattern: the name itself wins, then the first pattern that fits.

    Raises:
        KeyError: a key that fits none of the names.

    Example:
        >>> lookup({"a.*": 1, "a.w": 2}, ["a.w", "a.v", "b"], what="sparsity", default=0)
        {'a.w': 2, 'a.v': 1, 'b': 0}
    """
    names = list(names)
    for key in values:
        if not isinstance(key, (str, re.Pattern)):
            raise KeyError(f"{what} has a key {key!r} that is not a parameter name or pattern{near(str(key), names)}")
        if not any(matches(key, name) for name in names) and key not in names:
            raise KeyError(f"{what} has a key {key!r} that fits no parameter{near(str(key), names)}")
    return {name: default if (chosen := key_for(values, name)) is None else values[chosen] for name in names}


def key_for(values: Mapping[str, V], name: str) -> str | None:
    """The key of a by-name-or-pattern mapping that decides for this name."""
    return name if name in values else next((key for key in values if matches(key, name)), None)


def near(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the names closest to a mistyped one."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or [k for k in known if name in k][:3] or known[:6]
    return f"; near it: {', '.join(map(repr, close))}" if close else "; there are none"
