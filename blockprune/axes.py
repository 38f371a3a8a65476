"""Which tensors share a hidden axis: found by changing what one layer gives and looking at what the others are given."""

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from blockprune.apply import read_masks
from blockprune.fold import default_forward, moved
from blockprune.gates import Forward
from blockprune.layerwise import CACHES
from blockprune.permute import Shuffle, permute

__all__ = ["find_axes"]

SEED = 0
CLOSE = 1e-5  # of an output, or of the median one: rounding where a model computes in float32 whatever it is given

Seen = Mapping[str, Sequence[Tensor]]  # what each module was given, call by call
Units = Mapping[str, Tensor]  # which inputs of each module changed: [inputs] bool


def find_axes(model: nn.Module, example: Any, *, forward: Forward = default_forward, progress: bool = True) -> list[Shuffle]:
    """The hidden axes whose units may change places, for `cluster` and `permute`; each is proved on the example.

    Found are units of MLPs (gated or not), channels of value heads (shared ones too), channels between convolutions, and a residual
    stream that ends in a layer, not in the output. A Linear, convolution or embedding is made to give something else for some of its
    units, while all others give what they gave: where other layers see those units and no others, the axis is theirs as well. Last,
    all units change places at random: an axis stays if the outputs do, each to 1e-5 of itself or of the median one.

    Not found are axes that a bare parameter knows too (a learned position, a scale) and projections in one piece (queries, keys and values
    in one Linear). What the example does not show is not known: layers that it does not call (a warning names them, and axes as long as
    theirs are left out), heads if its sequences have one token only.

    Args:
        model: without masks; it stays as it is (a copy in float64 is looked at).
        example: one small batch that calls every layer: two tokens are enough if no layer is an expert; every layer is run several times.
        forward: as in `collect.with_statistics`.
        progress: show a bar on a terminal.

    Returns:
        Shuffles that leave everything where it is (order 0, 1, ...), the stream first.

    Raises:
        ValueError: a masked model, one without values or that cannot be copied, an example that it cannot run or that gives no
            floating-point tensors.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2)), torch.randn(5, 4)
        >>> (hidden,) = bp.find_axes(model, x)
        >>> hidden.rows, hidden.columns
        (('0.weight', '0.bias', '2.weight', '2.bias', '2.running_mean', '2.running_var'), ('3.weight',))
    """
    if read_masks(model):
        raise ValueError("the model is masked; units change places before masking: bp.finalize(model)")
    if meta := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ValueError(f"{meta[0]} is on the meta device and has no values; give a model with weights")
    with torch.random.fork_rng([]), torch.no_grad():
        torch.default_generator.manual_seed(SEED)
        work, run = _wide(model, example, forward)
        watch = _Watch.of(work, run)
        found = [_shuffle(watch, part) for part in _parts(watch, progress)]
        return _proved(work, run, _called(watch, [shuffle for shuffle in found if shuffle is not None]))


Run = Callable[[nn.Module], list[Tensor]]


def _wide(model: nn.Module, example: Any, forward: Forward) -> tuple[nn.Module, Run]:
    """A copy in evaluation mode, in float64 if the model can run so, and how to run it."""

    def run(model: nn.Module) -> list[Tensor]:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it would pass by the layers that are looked at
        try:
            with torch.random.fork_rng([]):
                torch.default_generator.manual_seed(SEED)  # noise, if any, is the same each time
                output = forward(model, moved(model, example))
            if isinstance(output, Mapping):
                output = {key: value for key, value in output.items() if not str(key).startswith(CACHES)}
            return list(_tensors(output))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    try:
        plain = copy.deepcopy(model).eval()
    except RuntimeError as error:  # a module that keeps what it computed
        raise ValueError(f"the model cannot be copied: {error}; find_axes looks at a copy.deepcopy of it") from error
    try:
        outputs = run(plain)
    except Exception as error:
        raise ValueError(f"the model cannot run the example: {error}; give what `forward` takes, by default model(example)") from error
    if not any(y.is_floating_point() or y.is_complex() for y in outputs):
        raise ValueError("the model's output on the example has no floating-point tensors to compare; pass a forward= that returns some")
    with contextlib.suppress(Exception):  # a model that makes tensors of its own dtype, a device without float64
        wide = copy.deepcopy(plain).double()
        run(wide)
        return wide, run
    return plain, run


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors of an output, those in dataclasses too."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            yield from _tensors([getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)])


def _mixes(module: nn.Module) -> bool:
    """Whether a layer gives each of its units from all that it is given."""
    return isinstance(module, (nn.Linear, nn.Embedding)) or (
        isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd) and module.groups == 1
    )


def _channels(module: nn.Module, x: Tensor) -> int:
    """The axis of units in what a module is given or gives."""
    if isinstance(module, _ConvNd):
        return x.ndim - 1 - len(module.kernel_size)
    return 1 if isinstance(module, (_NormBase, nn.PReLU, nn.GroupNorm)) and x.ndim > 1 else x.ndim - 1


@attrs.frozen(eq=False)
class _Watch:
    """A model of which each mixing layer gives what it gave once, so that a change ends at the next one."""

    modules: Mapping[str, nn.Module]  # mixing layers, and small modules with a number a unit (norms)
    run: Run
    model: nn.Module
    given: Mapping[str, Sequence[Tensor]]  # by the mixing layers, call by call
    seen: Seen  # by all of them
    outputs: Sequence[Tensor]

    @classmethod
    def of(cls, model: nn.Module, run: Run) -> "_Watch":
        """The first look, nothing changed."""
        beside = {
            name: m
            for name, m in model.named_modules()
            if not _mixes(m) and not [*m.children()] and any(t.ndim == 1 for t in [*m.parameters(), *m.buffers()])
        }
        given: dict[str, list[Tensor]] = {}
        seen: dict[str, list[Tensor]] = {}

        def look(module: nn.Module, args: Any, kwargs: Any, output: Any, *, name: str) -> None:
            _note(seen, name, args, kwargs)
            if _mixes(module):
                given.setdefault(name, []).append(output.clone())

        watched = {name: m for name, m in model.named_modules() if _mixes(m)} | beside
        with contextlib.ExitStack() as stack:
            for name, module in watched.items():
                stack.callback(module.register_forward_hook(partial(look, name=name), with_kwargs=True).remove)
            outputs = run(model)
        return cls(watched, run, model, given, seen, outputs)

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
            found[at] = torch.stack(
                [(x != y).movedim(axis, -1).reshape(-1, x.shape[axis]).any(0) for x, y in zip(before, after, strict=True)]
            ).any(0)
        return found

    def units(self, name: str) -> int:
        """How many units a layer gives."""
        y = self.given[name][0]
        return y.shape[_channels(self.modules[name], y)]

    def numbers(self, name: str, n: int) -> list[str]:
        """Parameters and buffers of a small module that have one number a unit."""
        module = self.modules[name]
        return [own for own, t in [*module.named_parameters(), *module.named_buffers()] if t.shape == (n,)]

    def reach(self, name: str) -> dict[str, "_Link"] | None:
        """How the units of a layer are seen by others."""
        half = torch.rand(n := self.units(name)).argsort() < n // 2
        one, other = self.changed(name, half), self.changed(name, ~half)
        if one is None or other is None:
            return None
        return {at: _Link.of(half, one[at], other[at]) for at in one if (one[at] | other[at]).any()}

    def head(self, name: str, at: str) -> int:
        """How many inputs of a module see the first unit of a layer, such as a query's: if they are an equal share of all, else 0."""
        look = self.changed(name, torch.arange(self.units(name)) == 0)
        size = int(look[at].sum()) if look else 0
        return size if look and size and look[at][:size].all() and len(look[at]) % size == 0 else 0


def _note(seen: dict[str, list[Tensor]], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    if x is not None:
        seen.setdefault(name, []).append(x.clone())


@attrs.frozen
class _Link:
    """How a module sees the units of a layer: each input shows one unit (``copies`` times in groups, side by side), or many (0 copies)."""

    inputs: int
    copies: int
    groups: int = 1

    @classmethod
    def of(cls, half: Tensor, one: Tensor, other: Tensor) -> "_Link":
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


@attrs.frozen
class _Part:
    """Layers whose units are one axis, and who sees them."""

    givers: Sequence[str]
    links: Mapping[str, _Link]
    heads: Collection[int] = ()  # how many of its readers' inputs see the same unit of yet another layer


def _parts(watch: _Watch, progress: bool) -> Iterator[_Part]:
    """The stream, whose units each layer sees all at once; then what shows its units one by one, in the order of the layers."""
    names = tqdm(watch.given, desc="axes", disable=None if progress else True, leave=False)
    reached = {name: links for name in names if (links := watch.reach(name)) is not None}
    single = {a: links for a, links in reached.items() if all(link.copies for link in links.values())}
    mixing = {a: links for a, links in reached.items() if not any(link.copies for at, link in links.items() if at in watch.given)}
    inner = [(givers, {at: link for a in givers for at, link in single[a].items()}) for givers in _joined(single, watch)]
    shown = {at for _, links in inner for at in links}
    for givers in _joined(mixing, watch):
        links = {at: link for a in givers for at, link in mixing[a].items()}
        if not shown & links.keys():  # queries and keys, which the output projection mixes with values
            yield _Part(givers, links)
    for givers, links in inner:
        others = [(a, at) for a, seen in mixing.items() for at in seen if at in links and at in watch.given]
        yield _Part(givers, links, {head for a, at in others if (head := watch.head(a, at))})


def _joined(links: Mapping[str, Mapping[str, _Link]], watch: _Watch) -> list[list[str]]:
    """Layers that are seen by a same layer or norm, together; those that no layer sees left out."""
    parts: list[tuple[list[str], set[str]]] = []
    for name, seen in links.items():
        readers = {at for at in seen if at in watch.given or watch.numbers(at, watch.units(name))}
        mine = [part for part in parts if part[1] & readers]
        others = [part for part in parts if not part[1] & readers]
        parts = (
            [*others, ([*(a for part in mine for a in part[0]), name], readers.union(*(part[1] for part in mine)))] if readers else parts
        )
    parts = [part for part in parts if part[1] & watch.given.keys()]
    return [givers for givers, _ in sorted(parts, key=lambda part: [*links].index(part[0][0]))]


def _shuffle(watch: _Watch, part: _Part) -> Shuffle | None:
    """The shuffle of a part, nothing moved; None if its layers do not fit each other."""
    n = watch.units(part.givers[0])
    groups = {link.groups for link in part.links.values()} | {n // head for head in part.heads if n % head == 0}
    within = max(groups)
    if any(watch.units(a) != n for a in part.givers) or within >= n or any(within % g for g in groups):
        return None
    if any(link.inputs != n for at, link in part.links.items() if not link.copies or at not in watch.given):
        return None
    tables = [f"{a}.weight" for a in part.givers if isinstance(watch.modules[a], nn.Embedding)]
    weights = [f"{a}.weight" for a in part.givers if not isinstance(watch.modules[a], nn.Embedding)]
    biases = [f"{a}.bias" for a in part.givers if getattr(watch.modules[a], "bias", None) is not None]
    small = [f"{at}.{name}" for at in part.links if at not in watch.given for name in watch.numbers(at, n)]
    readers = [f"{at}.weight" for at in part.links if at in watch.given]
    return Shuffle(
        torch.arange(n),
        rows=[*weights, *biases, *small],
        columns=[*tables, *readers],
        within=within,
        copies={f"{at}.weight": link.copies for at, link in part.links.items() if link.copies > 1},
    )


def _called(watch: _Watch, plan: list[Shuffle]) -> list[Shuffle]:
    """Those of a plan that no layer can share which the example does not use: the proof would not see it."""
    unused = [name for name in watch.modules if name not in watch.seen and not _used(watch, name)]
    sizes = {name: {size for t in _numbers(watch.modules[name]) for size in t.shape[:2]} for name in unused}
    kept: list[Shuffle] = []
    for shuffle in plan:
        n = len(shuffle.order)
        if near := [name for name, found in sizes.items() if found & {n, *(n * times for times in shuffle.copies.values())}]:
            warnings.warn(
                f"the example does not call {', '.join(near[:4])}, which may share the axis of {n} units of "
                f"{', '.join([*shuffle.rows, *shuffle.columns][:2])}: left out; give an example that calls every layer",
                stacklevel=3,
            )
        else:
            kept.append(shuffle)
    return kept


def _numbers(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _used(watch: _Watch, name: str) -> bool:
    """Whether outputs depend on a layer that was not called: the one around it may use its weight, as attention does."""
    before = [(t, t.clone()) for t in _numbers(watch.modules[name]) if t.is_floating_point()]
    for t, _ in before:
        t.add_(1)
    outputs = watch.run(watch.model)
    for t, was in before:
        t.copy_(was)
    return not all(map(torch.equal, outputs, watch.outputs))


def _proved(model: nn.Module, run: Run, plan: list[Shuffle]) -> list[Shuffle]:
    """Those of a plan that leave the outputs as they are."""
    want = run(model)

    def holds(some: Sequence[Shuffle]) -> bool:
        try:
            got = run(permute(model, [_random(shuffle) for shuffle in some]))
        except Exception:  # tied to what is not in the plan, or a size that the model's own code knows
            return False
        return len(got) == len(want) and all(map(_same, got, want))

    if not plan or holds(plan):
        return plan
    if len(plan) == 1:
        return []
    middle = len(plan) // 2
    return [*_proved(model, run, plan[:middle]), *_proved(model, run, plan[middle:])]


def _same(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape or not want.is_floating_point():
        return torch.equal(got, want)
    size = want.abs()
    some = size[size.isfinite() & (size > 0)]
    near = (got - want).abs() <= CLOSE * size.clamp_min(some.median() if len(some) else 0)
    return bool((near | (got == want) | (got.isnan() & want.isnan())).all())


def _random(shuffle: Shuffle) -> Shuffle:
    """Each unit goes to another place of its group: a cycle through all of them."""
    size = len(shuffle.order) // shuffle.within
    order = shuffle.order.clone()
    for group in order.split(size):
        cycle = group[torch.randperm(size)]
        order[cycle] = cycle.roll(1)
    return attrs.evolve(shuffle, order=order)
