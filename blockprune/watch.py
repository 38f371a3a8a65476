"""A model that is looked at: one layer is made to give something else, and the others tell which of their inputs changed."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from blockprune.experts import Experts, experts_in, routing
from blockprune.fold import call_by_call, gpus, moved, wide
from blockprune.gates import Forward
from blockprune.layerwise import CACHES

SEED = 0

Run = Callable[[nn.Module], list[Tensor]]
Seen = Mapping[str, Sequence[Tensor]]  # what each module was given, call by call
Units = Mapping[str, Tensor]  # which inputs of each module changed: [inputs] bool


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors of an output, those in dataclasses too."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            yield from _tensors([getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)])


def _mixes(module: nn.Module) -> bool:
    """Whether a layer gives each of its units from all that it is given."""
    return isinstance(module, (nn.Linear, nn.Embedding)) or (isinstance(module, _ConvNd) and module.groups == 1)


def _alone(module: nn.Module) -> bool:
    """Whether a convolution gives each unit from one that it is given."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels


def _channels(module: nn.Module, x: Tensor) -> int:
    """The axis of units in what a module is given or gives."""
    if isinstance(module, _ConvNd):
        return x.ndim - 1 - len(module.kernel_size)
    if isinstance(module, (_NormBase, nn.PReLU, nn.GroupNorm)):
        return min(1, x.ndim - 1)
    sizes = {t.shape[0] for t in module._parameters.values() if t is not None and t.ndim == 1}
    first = not _mixes(module) and x.ndim > 1 and x.shape[1] in sizes and x.shape[-1] not in sizes  # a norm where channels come first
    return 1 if first else x.ndim - 1


def _wide(model: nn.Module, example: Any, forward: Forward) -> tuple[nn.Module, Run]:
    """A copy in evaluation mode, in float64 if the model can run so, and how to run it."""

    def run(model: nn.Module) -> list[Tensor]:
        with call_by_call(), torch.random.fork_rng(devices := gpus(model)):
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
                generator.manual_seed(SEED)  # noise, if any, is the same each time
            output = forward(model, moved(model, example))
        if isinstance(output, Mapping):
            output = {key: value for key, value in output.items() if not str(key).startswith(CACHES)}
        return list(_tensors(output))

    try:
        plain = copy.deepcopy(model).eval()
    except RuntimeError as error:  # a module that keeps what it computed
        raise ValueError(f"the model cannot be copied: {error}; find_axes looks at a copy.deepcopy of it") from error
    work, outputs = wide(plain, run)
    if not any(y.is_floating_point() or y.is_complex() for y in outputs):
        raise ValueError("the model's output on the example has no floating-point tensors to compare; pass a forward= that returns some")
    return work, run


@attrs.frozen(eq=False)
class Watch:
    """A model of which each mixing layer gives what it gave once, so that a change ends at the next one.

    Example:
        >>> from blockprune.watch import Watch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     watch = Watch.of(model, torch.ones(1, 2), lambda model, batch: model(batch))
        ...     watch.changed("0", torch.tensor([False, True, False]))["2"]
        tensor([False,  True, False])
    """

    modules: Mapping[str, nn.Module]  # mixing layers, and small modules with a number or a kernel a unit (norms, depthwise convolutions)
    run: Run
    model: nn.Module
    given: Mapping[str, Sequence[Tensor]]  # by the mixing layers, call by call
    seen: Seen  # by all of them
    outputs: Sequence[Tensor]
    chosen: dict[str, list[Any]]  # by the router of each module of experts, call by call
    bare: Mapping[str, Tensor]  # parameters in which no change shows: learned positions, scales, routers
    heard: dict[str, bool] = attrs.field(factory=dict)  # whether the outputs depend on a bare parameter, once that was asked

    @classmethod
    def of(cls, original: nn.Module, example: Any, forward: Forward) -> "Watch":
        """The first look at a copy, nothing changed."""
        model, run = _wide(original, example, forward)
        for module in experts_in(model).values():
            module.register_forward_pre_hook(_by_turns)
        beside = {
            name: m
            for name, m in model.named_modules()
            if not _mixes(m) and not [*m.children()] and (_alone(m) or any(t.ndim == 1 for t in _own(m).values()))
        }
        given: dict[str, list[Tensor]] = {}
        seen: dict[str, list[Tensor]] = {}

        def look(module: nn.Module, args: Any, kwargs: Any, output: Any, *, name: str) -> None:
            _note(seen, name, args, kwargs)
            if _mixes(module) and isinstance(output, Tensor):
                given.setdefault(name, []).append(output.clone())

        chosen: dict[str, list[Any]] = {}
        watched = {name: m for name, m in model.named_modules() if _mixes(m)} | beside
        with contextlib.ExitStack() as stack:
            for name, module in watched.items():
                stack.callback(module.register_forward_hook(partial(look, name=name), with_kwargs=True).remove)
            stack.enter_context(routing(model, chosen))
            outputs = run(model)
        odd = {name for name, m in watched.items() if _mixes(m) and name in seen and name not in given}  # a router that is a Linear, say
        watched = {name: m for name, m in watched.items() if name not in odd}
        seen = {name: calls for name, calls in seen.items() if name not in odd}
        shown = [m for name, m in watched.items() if name in seen or _mixes(m)]
        known = {id(p) for m in shown for p in m.parameters() if _mixes(m) or _alone(m) or p.ndim == 1}
        named = model.named_parameters(remove_duplicate=False)
        bare = {name: p for name, p in named if id(p) not in known and p.is_floating_point()}
        return cls(watched, run, model, given, seen, outputs, chosen, bare)

    def changed(self, name: str, units: Tensor) -> Units | None:
        """Which inputs of each module change if these units of one layer do; None if the model then takes another course or ends there."""
        calls: dict[str, Iterator[Tensor]] = {}
        seen: dict[str, list[Tensor]] = {}

        def cut(at: str, /, *args: Any, **kwargs: Any) -> Tensor:
            _note(seen, at, args, kwargs)
            y = next(calls.setdefault(at, iter(self.given[at])))
            if at != name:
                return y.clone()
            axis = _channels(self.modules[at], y)
            return y + (1 + y.abs().max()) * units.to(y).view([-1 if i == axis else 1 for i in range(y.ndim)])

        def note(module: nn.Module, args: Any, kwargs: Any, *, at: str) -> None:
            _note(seen, at, args, kwargs)

        with contextlib.ExitStack() as stack:
            stack.enter_context(routing(self.model, self.chosen, again=True))
            for at, module in self.modules.items():
                if at in self.given:
                    stack.callback(vars(module).update, {key: own for key, own in vars(module).items() if key == "forward"})
                    module.forward = partial(cut, at)
                    stack.callback(delattr, module, "forward")
                else:
                    stack.callback(module.register_forward_pre_hook(partial(note, at=at), with_kwargs=True).remove)
            try:
                outputs = self.run(self.model)
            except Exception:  # other experts, say, than those whose outputs are known
                return None
        if len(outputs) != len(self.outputs) or not all(map(torch.equal, outputs, self.outputs)):
            return None
        found: dict[str, Tensor] = {}
        for at, before in self.seen.items():
            after = seen.get(at, [])
            if [x.shape for x in after] != [x.shape for x in before]:
                return None
            if isinstance(self.modules[at], nn.Embedding):
                continue
            axis = _channels(self.modules[at], before[0])
            found[at] = (
                torch.stack([(x != y).movedim(axis, -1).reshape(-1, x.shape[axis]).any(0) for x, y in zip(before, after, strict=True)])
                .any(0)
                .cpu()
            )
        return found

    def units(self, name: str) -> int:
        """How many units a layer gives."""
        y = self.given[name][0]
        return y.shape[_channels(self.modules[name], y)]

    def turned(self, name: str) -> bool:
        """Whether a layer's weight has its inputs along axis 0 and its outputs along axis 1."""
        return isinstance(self.modules[name], (nn.Embedding, _ConvTransposeNd))

    def axis(self, name: str, *, gives: bool) -> tuple[int, int]:
        """Which tensor's axis the units lie along that a layer gives, or is given: tied weights are one tensor."""
        module = self.modules[name]
        return id(module._parameters.get("weight", module)), int(self.turned(name) == gives)

    def numbers(self, name: str, n: int) -> list[str]:
        """Parameters and buffers of a small module that have one number a unit, or one kernel."""
        module = self.modules[name]
        return [own for own, t in _own(module).items() if t.shape == (n,) or (_alone(module) and t.shape[:1] == (n,))]

    def reach(self, name: str) -> dict[str, "Link"] | None:
        """How the units of a layer are seen by others."""
        half = torch.rand(n := self.units(name)).argsort() < n // 2
        one, other = (self.changed(name, half), self.changed(name, ~half)) if n > 1 else (None, None)
        if one is None or other is None:
            return None
        links = {at: Link.of(half, one[at], other[at]) for at in one if (one[at] | other[at]).any()}
        for m in {link.inputs for link in links.values() if 1 < link.inputs < n and n % link.inputs == 0}:
            links |= self._pieces(name, n // m, m, [at for at, link in links.items() if link.inputs == m])
        return links

    def _pieces(self, name: str, pieces: int, m: int, readers: Sequence[str]) -> dict[str, "Link"]:
        """Of some readers those that see a unit of each piece of a layer's in every input, and would miss any of the pieces."""
        half = torch.rand(m).argsort() < m // 2
        one, other = self.changed(name, half.repeat(pieces)), self.changed(name, ~half.repeat(pieces))
        links = {at: link for at in readers if one and other and (link := Link.of(half, one[at], other[at])).copies}
        for piece in range(pieces if links else 0):
            alone = self.changed(name, torch.arange(pieces).repeat_interleave(m) == piece)
            links = {at: link for at, link in links.items() if alone and alone[at].any()}
        return {at: attrs.evolve(link, pieces=pieces) for at, link in links.items()}

    def head(self, name: str, at: str) -> int:
        """How many inputs of a module see the first unit of a layer, such as a query's: if they are an equal share of all, else 0."""
        look = self.changed(name, torch.arange(self.units(name)) == 0)
        size = int(look[at].sum()) if look else 0
        return size if look and size and look[at][:size].all() and len(look[at]) % size == 0 else 0

    def twins(self, name: str) -> tuple[str, str]:
        """Of a Linear of an expert what names in the first expert start with, and in its own; of others nothing."""
        for at in self.chosen:
            if name.startswith(f"{at}."):
                return f"{at}.0.", f"{at}.{name.removeprefix(f'{at}.').partition('.')[0]}."
        return "", ""

    def unused(self) -> list[str]:
        """Modules that the example does not use, which no change shows."""
        return self._unused([name for name in self.modules if name not in self.seen])

    def _unused(self, names: Sequence[str]) -> list[str]:
        """Those of some modules that were not called, or bare parameters, on which no output depends: the layer around may use its weights,
        as attention does.
        """
        before = [(t, t.clone()) for name in names for t in self._tensors(name) if t.is_floating_point()]
        for t, _ in before:
            t.add_(1 + torch.rand(t.shape).to(t))  # not a shift that a softmax forgets
        outputs = self.run(self.model) if names else self.outputs
        for t, was in before:
            t.copy_(was)
        if all(map(torch.equal, outputs, self.outputs)):
            return [*names]
        middle = len(names) // 2
        return [*self._unused(names[:middle]), *self._unused(names[middle:])] if middle else []

    def sizes(self, name: str) -> set[int]:
        """How long the axes of a module's tensors are."""
        return {size for t in self._tensors(name) for size in t.shape[:2]}

    def _tensors(self, name: str) -> list[Tensor]:
        return [self.bare[name]] if name in self.bare else [*_own(self.modules[name]).values()]

    def silent(self, n: int, inside: str = "") -> list[str]:
        """Those of the bare parameters in a module that may share an axis so long which the example does not use."""
        asked = [name for names in self.beside(n, inside).values() for name in names]
        new = [name for name in asked if name not in self.heard]
        self.heard.update(dict.fromkeys(new, True) | dict.fromkeys(self._unused(new), False))
        return [name for name in asked if not self.heard[name]]

    def beside(self, n: int, inside: str = "") -> dict[str, list[str]]:
        """Bare parameters in a module of which one axis alone is so long, by the role that they would have in a `Shuffle`."""
        found: dict[str, list[str]] = {"rows": [], "columns": [], "last": []}
        for name, p in self.bare.items():
            if not name.startswith(inside):
                continue
            if [*p.shape].count(n) == 1 and (axis := [*p.shape].index(n)) in {0, 1, p.ndim - 1}:
                found["rows" if axis == 0 else "columns" if axis == 1 else "last"].append(name)
        return found


def _by_turns(module: nn.Module, args: Any) -> Any:
    """Whatever the router says: each expert gets tokens, and always the same."""
    chosen = args[1]
    return args[0], torch.arange(chosen.numel(), device=chosen.device).view_as(chosen) % len(cast(Experts, module).numbered()), *args[2:]


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _note(seen: dict[str, list[Tensor]], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    if x is not None:
        seen.setdefault(name, []).append(x.clone())


@attrs.frozen
class Link:
    """How a module sees the units of a layer: each input shows one unit (``copies`` times in groups, side by side), or many (0 copies).

    With ``pieces`` the layer gives several, one behind the other, such as an MLP's gate and what goes through it, and an input shows one
    unit of each.

    Example:
        >>> from blockprune.watch import Link
        >>> half = torch.tensor([True, False])
        >>> Link.of(half, one=half.repeat_interleave(3), other=~half.repeat_interleave(3))  # flattened: three inputs a unit
        Link(inputs=6, copies=1, groups=1, pieces=1)
    """

    inputs: int
    copies: int
    groups: int = 1
    pieces: int = 1

    @classmethod
    def of(cls, half: Tensor, one: Tensor, other: Tensor) -> "Link":
        """From the inputs that change with half of the units, and with the others."""
        n, m = len(half), len(one)

        def shows(unit: Tensor) -> bool:  # dead inputs may show nothing, but not most
            return not ((one & ~half[unit]) | (other & half[unit])).any() and 2 * int((one | other).sum()) >= m

        if m % n == 0:
            if shows(torch.arange(n).repeat_interleave(m // n)):  # a unit is m / n inputs, as after flatten
                return cls(m, 1)
            for groups in (g for g in range(1, n) if n % g == 0):
                if shows(torch.arange(n).view(groups, 1, -1).expand(-1, m // n, -1).flatten()):
                    return cls(m, m // n, groups)
        return cls(m, 0)
