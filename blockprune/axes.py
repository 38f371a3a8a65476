"""Which tensors share a hidden axis: found by changing what one layer gives and looking at what the others are given (`watch`)."""

import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from tqdm import tqdm

from blockprune.apply import read_masks
from blockprune.fold import default_forward
from blockprune.gates import Forward
from blockprune.permute import Shuffle, permute
from blockprune.watch import SEED, Link, Watch

__all__ = ["find_axes"]

CLOSE = 1e-5  # of an output, or of the median one: rounding where a model computes in float32 whatever it is given


def find_axes(model: nn.Module, example: Any, *, forward: Forward = default_forward, progress: bool = True) -> list[Shuffle]:
    """The hidden axes whose units may change places, for `cluster` and `permute`; each is proved on the example.

    Found are units of MLPs (gated or not, the gate in the same Linear or not), channels of value heads (shared ones too), channels between
    convolutions (depthwise ones in between move along), and a residual stream that ends in a layer, not in the output. A Linear,
    convolution or embedding is made to give something else for some of its units, while all others give what they gave: where other
    layers see those units and no others, the axis is theirs as well. Last, all units change places at random: an axis stays if the
    outputs do, each to 1e-5 of itself or of the median one; if it does not, all bare parameters that are as long along one axis alone
    (learned positions, scales, a router) move along, and it is tried again.

    Not found are projections in one piece (queries, keys and values in one Linear; a gate whose units take turns with what they gate) and
    axes that a number in the model's code knows. Of two orders of one axis the first is kept. What the example does
    not show is not known: layers that it does not call (a warning names them, and axes as long as theirs are left out), heads if its
    sequences have one token only.

    Args:
        model: without masks; it stays as it is (a copy in float64 is looked at).
        example: one small batch that calls every layer, two tokens or more; every layer is run several times. Experts of `as_linears` take
            turns whatever the router says, so they need as many tokens as they are.
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
        watch = Watch.of(model, example, forward)
        return _proved(watch, _shown(watch, _parts(watch, progress)))


@attrs.frozen
class _Part:
    """Layers whose units are one axis, with how many pieces of them each gives, and who sees them."""

    givers: Mapping[str, int]
    links: Mapping[str, Link]
    heads: Collection[int] = ()  # how many of its readers' inputs see the same unit of yet another layer


def _parts(watch: Watch, progress: bool) -> Iterator[_Part]:
    """The stream, whose units each layer sees all at once; then what shows its units one by one, in the order of the layers."""
    names = tqdm(watch.given, desc="axes", disable=None if progress else True, leave=False)
    reached: dict[str, Mapping[str, Link]] = {}
    for name in names:
        one, own = watch.twins(name)
        found: Mapping[str, Link] | None = None
        if one == own:
            found = watch.reach(name)
        else:  # experts are alike, and the proof looks at all
            links = reached.get(name.replace(own, one, 1))
            found = links and {at.replace(one, own, 1): link for at, link in links.items()}
        if found is not None:
            reached[name] = found
    pieces = {name: max((link.pieces for link in links.values()), default=1) for name, links in reached.items()}
    parts = [
        ({a: pieces[a] for a in givers}, {at: link for a in givers for at, link in reached[a].items()})
        for givers in _joined(reached, pieces, watch)
    ]
    inner = [part for part in parts if all(link.copies for link in part[1].values())]
    shown = {at for _, links in inner for at in links}
    for givers, links in parts:
        if not shown & links.keys():  # not queries and keys, which the output projection mixes with values
            yield _Part(givers, links)
    for givers, links in inner:
        mixed = [(a, at) for a, seen in reached.items() for at in seen.keys() & links.keys() & watch.given.keys() if not seen[at].copies]
        yield _Part(givers, links, {head for a, at in mixed if (head := watch.head(a, at))})


def _joined(reached: Mapping[str, Mapping[str, Link]], pieces: Mapping[str, int], watch: Watch) -> list[list[str]]:
    """Layers of as many units that a same layer or norm sees in the same way (one by one, or all at once), or whose weight a reader has,
    such as a head tied to the embedding, together; those that no layer sees left out.
    """
    parts: list[tuple[list[str], set[tuple[Any, ...]]]] = []
    theirs = {watch.axis(name, gives=True) for name in reached}
    for name, seen in reached.items():
        n = watch.units(name) // pieces[name]
        readers = [at for at in seen if at in watch.given]
        marks: set[tuple[Any, ...]] = {(at, seen[at].copies > 0, n) for at in seen if at in readers or watch.numbers(at, n)}
        marks |= theirs & {watch.axis(at, gives=False) for at in readers}
        if marks:
            marks.add(watch.axis(name, gives=True))
            mine = [part for part in parts if part[1] & marks]
            others = [part for part in parts if not part[1] & marks]
            parts = [*others, ([*(a for part in mine for a in part[0]), name], marks.union(*(part[1] for part in mine)))]
    read = [givers for givers, _ in parts if any(at in watch.given for a in givers for at in reached[a])]
    return sorted(read, key=lambda givers: [*reached].index(givers[0]))


def _shuffle(watch: Watch, part: _Part) -> Shuffle | None:
    """The shuffle of a part, nothing moved; None if its layers do not fit each other."""
    first, pieces = next(iter(part.givers.items()))
    n = watch.units(first) // pieces
    groups = {link.groups for link in part.links.values()} | {n // head for head in part.heads if n % head == 0}
    groups |= {m.num_groups for m in map(watch.modules.__getitem__, part.links) if isinstance(m, nn.GroupNorm) and m.num_groups < n}
    within = max(groups)
    if within >= n or any(within % g for g in groups):
        return None
    if any(link.inputs != n for at, link in part.links.items() if not link.copies or at not in watch.given):
        return None
    readers = [at for at in part.links if at in watch.given]
    biases = [f"{a}.bias" for a in part.givers if getattr(watch.modules[a], "bias", None) is not None]
    copies = {f"{at}.weight": link.copies for at, link in part.links.items()}
    copies |= {name: times for a, times in part.givers.items() for name in (f"{a}.weight", f"{a}.bias")}
    small = [f"{at}.{name}" for at in part.links if at not in watch.given for name in watch.numbers(at, n)]

    def weights(names: Iterable[str], turned: bool) -> list[str]:
        return [f"{name}.weight" for name in names if watch.turned(name) == turned]

    rows = [*weights(part.givers, False), *biases, *small, *weights(readers, True)]
    columns = [*weights(part.givers, True), *weights(readers, False)]
    return Shuffle(
        torch.arange(n),
        rows=rows,
        columns=columns,
        within=within,
        copies={name: times for name, times in copies.items() if times > 1 and name in (*rows, *columns)},
    )


def _shown(watch: Watch, parts: Iterable[_Part]) -> list[Shuffle]:
    """The shuffles of parts that no layer can share which the example does not use, nor a bare parameter a stream: no proof sees it."""
    sizes = {name: watch.sizes(name) for name in watch.unused()}
    kept: list[Shuffle] = []
    for part in parts:
        if (shuffle := _shuffle(watch, part)) is None:
            continue
        n = len(shuffle.order)
        near = [name for name, found in sizes.items() if found & {n, *(n * times for times in shuffle.copies.values())}]
        if not all(link.copies for link in part.links.values()):
            near += watch.silent(n)
        if near:
            warnings.warn(
                f"the example does not use {', '.join(near[:4])}, which may share the axis of {n} units of "
                f"{', '.join([*shuffle.rows, *shuffle.columns][:2])}: left out; give an example (or forward=) that uses all",
                stacklevel=3,
            )
        else:
            kept.append(shuffle)
    return kept


def _proved(watch: Watch, plan: list[Shuffle]) -> list[Shuffle]:
    """Those of a plan that together leave the outputs as they are."""

    def holds(some: Sequence[Shuffle]) -> bool:
        try:
            got = watch.run(permute(watch.model, [_random(shuffle) for shuffle in some]))
        except Exception:  # tied to what is not in the plan, or a size that the model's own code knows
            return False
        return len(got) == len(watch.outputs) and all(map(_same, got, watch.outputs))

    if not plan or holds(plan):
        return plan
    if len(plan) == 1:
        tries = (_with_bare(watch, plan[0], inside) for inside in (_around(plan[0]), ""))
        return next(([whole] for whole in tries if whole is not None and holds([whole])), [])
    middle = len(plan) // 2
    kept, others = _proved(watch, plan[:middle]), _proved(watch, plan[middle:])
    if not kept or not others or holds([*kept, *others]):
        return [*kept, *others]
    for shuffle in others:  # two may move one axis
        kept = [*kept, shuffle] if holds([*kept, shuffle]) else kept
    return kept


def _around(shuffle: Shuffle) -> str:
    """What the names of all modules of a shuffle start with: the block that an MLP is in."""
    paths = [name.split(".")[:-1] for name in (*shuffle.rows, *shuffle.columns)]
    common = itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*paths, strict=False))
    return "".join(f"{part}." for part, *_ in common)


def _with_bare(watch: Watch, shuffle: Shuffle, inside: str) -> Shuffle | None:
    """The shuffle with all bare parameters in a module that are as long; None if there are none, or the proof would not see one."""
    n = len(shuffle.order)
    more = watch.beside(n, inside)
    if not any(more.values()) or watch.silent(n, inside):
        return None
    rows, columns, last = ((*getattr(shuffle, role), *more[role]) for role in ("rows", "columns", "last"))
    return attrs.evolve(shuffle, rows=rows, columns=columns, last=last)


def _same(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape or not (want.is_floating_point() or want.is_complex()):
        return torch.equal(got, want)
    size = want.abs()
    some = size[size.isfinite() & (size > 0)]
    near = size.isfinite() & ((got - want).abs() <= CLOSE * size.clamp_min(some.median() if len(some) else 0))
    return bool((near | (got == want) | (got.isnan() & want.isnan())).all())


def _random(shuffle: Shuffle) -> Shuffle:
    """Each unit goes to another place of its group: a cycle through all of them."""
    size = len(shuffle.order) // shuffle.within
    order = shuffle.order.clone()
    for group in order.split(size):
        cycle = group[torch.randperm(size)]
        order[cycle] = cycle.roll(1)
    return attrs.evolve(shuffle, order=order)
