"""How each masked layer will run: measured, with the reason."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from tqdm import tqdm

from blockprune.apply import finalize
from blockprune.export import gpu, two_of_four
from blockprune.export.dense import ways
from blockprune.export.layers import as_matrix, layer_like
from blockprune.export.places import Place, places
from blockprune.export.product import BACKENDS
from blockprune.export.timing import by_turns, copies
from blockprune.fold import default_forward, undisturbed
from blockprune.native import spmm
from blockprune.tables import Rows, Table

ROWS = 128  # inputs of a layer in one call, where none are given
_DEVICES = {"native": "cpu", "triton": "cuda"}  # where a backend is measured; others everywhere


@attrs.frozen
class Backend:
    """A way to multiply with a block-sparse weight, and what it needs.

    Example:
        >>> from blockprune import export
        >>> export.backends().rows[-1].available
        True
    """

    name: str
    available: bool
    reason: str

    @property
    def cells(self) -> tuple[str, ...]:
        return self.name, "yes" if self.available else "no", self.reason


@attrs.frozen(repr=False)
class Backends(Table):
    """A table of ways to multiply; prints in a terminal, renders in a notebook.

    Example:
        >>> from blockprune import export
        >>> export.Backends((export.Backend("torch", True, "always there"),))
        backend  available       because
        torch          yes  always there
    """

    rows: tuple[Backend, ...]

    def table(self) -> Rows:
        """The cells, the head first."""
        return [("backend", "available", "because"), *(row.cells for row in self.rows)]


def backends() -> Backends:
    """What this machine can multiply block-sparse weights with, and why not.

    Example:
        >>> from blockprune import export
        >>> [row.name for row in export.backends().rows]
        ['native', 'triton', 'torch', '2:4', 'dense']
    """
    sets = ", ".join(spmm.instructions())
    native = Backend("native", bool(sets), f"compiled product on the CPU, {spmm.status}" + (f": {sets}" if sets else ""))
    groups = Backend("torch", True, f"torch {torch.__version__}: gathered columns, a small dense product a band; any device and type")
    triton, halved = Backend("triton", *gpu.status()), Backend("2:4", *two_of_four.status())
    return Backends((native, triton, groups, halved, Backend("dense", True, "the layer as it was, with zeros")))


@attrs.frozen
class Choice:
    """How one masked weight runs: "native", "triton", "2:4", "torch" or "dense"; milliseconds of each way that was measured.

    Example:
        >>> from blockprune import export
        >>> export.Choice("fc.weight", 0.5, "torch", "as asked").cells
        ('fc.weight', '50.0%', 'torch', 'as asked')
    """

    name: str  # of the parameter
    pruned: float
    backend: str
    reason: str
    milliseconds: Mapping[str, float] = attrs.field(factory=dict)

    @property
    def cells(self) -> tuple[str, ...]:
        return self.name, f"{self.pruned:.1%}", self.backend, self.reason


@attrs.frozen(repr=False)
class Choices(Table):
    """How every masked weight runs; prints as a table, and `block_sparse` takes it as its backend.

    Example:
        >>> from blockprune import export
        >>> export.Choices((export.Choice("fc.weight", 0.5, "torch", "as asked"),))
        parameter  pruned  backend   because
        fc.weight   50.0%    torch  as asked
    """

    rows: tuple[Choice, ...]

    def table(self) -> Rows:
        """The cells, the head first."""
        return [("parameter", "pruned", "backend", "because"), *(row.cells for row in self.rows)]


def choose(
    model: nn.Module,
    *,
    inputs: Any = None,
    rows: int = ROWS,
    forward: Callable[..., Any] = default_forward,
    graph: bool = False,
    rounds: int = 9,
    progress: bool = True,
) -> Choices:
    """Measure every masked layer, dense and block-sparse, at the inputs that it meets; the faster way is its choice.

    Layers alike (shape, blocks, sparsity to 2 %, inputs) are measured once, on copies that do not fit into the caches, as in a model. What
    runs if "dense" is chosen is F.linear; the reason also tells of oneDNN's product with packed weights.

    Args:
        model: with masks.
        inputs: one batch for ``forward``, of which a layer's last call counts; without it every Linear is measured on ``rows`` inputs, and
            convolutions stay dense.
        rows: inputs of a layer in one call, such as batch x tokens.
        forward: as in `collect.with_statistics`.
        graph: on a GPU, time layers as a CUDA graph replays them, for models that run so (``mode="reduce-overhead"`` of `torch.compile`);
            otherwise with what launching them from Python takes.
        rounds: of measurement, of which the median counts.
        progress: show a bar on a terminal.

    Raises:
        ValueError: a model without masks, rows below 1.

    Example:
        >>> from blockprune import export
        >>> mask = bp.BlockMask(torch.rand(16, 16) > 0.9, bp.BlockGrid((256, 256), (16, 16)))
        >>> choices = export.choose(bp.apply_masks(nn.Linear(256, 256), {"weight": mask}), rows=32, progress=False)
        >>> choices.rows[0].name, choices.rows[0].backend in ("native", "torch", "dense")
        ('weight', True)
    """
    if rows < 1:
        raise ValueError(f"rows={rows} must be 1 or more: the inputs that a layer meets in one call")
    found = list(places(model))
    met, passed_by = _met(model, found, inputs, forward) if inputs is not None else ({}, set())
    choices, measured = [], {}
    for place in tqdm(found, desc="choose", disable=None if progress else True, leave=False):
        pruned = place.pruned
        x = met.get(place.layer) if inputs is not None else _some(place, rows)
        if place.obstacle or x is None or place.layer in passed_by:
            why = (
                place.obstacle
                or ("the model reads the weight itself" if place.layer in passed_by else "")
                or ("inputs do not reach it" if inputs is not None else "a convolution is measured on inputs; give them")
            )
            choices.append(Choice(place.name, pruned, "dense", why))
            continue
        key = (place.mask.grid, round(pruned * 50), x.shape, x.dtype, x.device, _settings(place.module), two_of_four.fits(place.weight))
        if key not in measured:
            measured[key] = _measure(place, x, rounds, graph)
        choices.append(_fastest(place.name, pruned, measured[key], x))
    return Choices(tuple(choices))


def forced(model: nn.Module, backend: str) -> Choices:
    """One backend for every layer that has a block-sparse form.

    Raises:
        ValueError: a model without masks, a backend that is not known.
        RuntimeError: one that this machine has not.

    Example:
        >>> from blockprune.export.choose import forced
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> forced(bp.apply_masks(nn.Linear(4, 2), {"weight": mask}), "torch")
        parameter  pruned  backend     because
        weight      50.0%    torch  as asked
    """
    known = {row.name: row for row in backends().rows}
    if backend not in known:
        raise ValueError(f"backend={backend!r} must be 'auto', one of {', '.join(map(repr, known))}, or what choose(model) found")
    if not known[backend].available:
        raise RuntimeError(f"backend={backend!r} is not available: {known[backend].reason}; backend='torch' always is")
    rows = []
    for place in places(model):
        other = "" if backend != "2:4" or two_of_four.fits(place.weight) else f"not {two_of_four.WANTED}"
        why = place.obstacle or other
        rows.append(Choice(place.name, place.pruned, "dense" if why else backend, why or "as asked"))
    return Choices(tuple(rows))


def _met(model: nn.Module, found: Iterable[Place], inputs: Any, forward: Callable[..., Any]) -> tuple[dict[str, Tensor], set[str]]:
    """An input as each layer is given, by the layer's name; the last, if there are several (after a prompt, the token). And
    the layers whose weight is read more often than they are called.
    """
    met: dict[str, Tensor] = {}
    calls: dict[str, int] = defaultdict(int)
    reads: dict[str, int] = defaultdict(int)

    def look(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        met[name] = torch.empty_like(x)
        calls[name] += 1

    def read(name: str, *_: Any) -> None:
        reads[name] += 1

    handles = []
    try:
        for place in found:
            handles.append(place.module.register_forward_pre_hook(partial(look, place.layer), with_kwargs=True))
            if place.slot.masking is not None:
                handles.append(place.slot.masking.register_forward_hook(partial(read, place.layer)))
        with undisturbed(model), torch.no_grad():
            forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: x.normal_() for name, x in met.items()}, {name for name in reads if reads[name] > calls[name]}


def _some(place: Place, rows: int) -> Tensor | None:
    stored = place.slot.stored
    return torch.randn(rows, stored.shape[1], dtype=stored.dtype, device=stored.device) if stored.ndim == 2 else None


def _settings(module: nn.Module) -> tuple[Any, ...]:
    return (module.kernel_size, module.stride, module.padding, module.dilation) if isinstance(module, nn.Conv2d) else ()


def _measure(place: Place, x: Tensor, rounds: int, graph: bool) -> dict[str, float]:
    """Median milliseconds of each way. So many copies of a layer take turns that caches hold none of them, as in a model."""
    plain, kept = finalize(place.module), as_matrix(place.weight, place.mask)
    calls: dict[str, list[Callable[[], Any]]] = defaultdict(list)

    def several(held: int) -> range:  # on a CPU all ways take turns, and so there are as many of each
        return range(copies(place.slot.stored.nbytes if x.device.type == "cpu" else held, x.device))

    for one in (finalize(place.module) for _ in several(place.slot.stored.nbytes)):
        weight, bias = cast(Tensor, one.weight), cast(Any, one.bias)
        for name, call in ({"Conv2d": partial(one, x)} if isinstance(one, nn.Conv2d) else ways(x, weight, bias)).items():
            calls[name].append(call)
    for name in (row.name for row in backends().rows if row.available and row.name in BACKENDS):
        waits = name == "torch" or x.dtype not in gpu.DTYPES  # for the device, which a graph cannot
        if _DEVICES.get(name, x.device.type) == x.device.type and not (graph and waits and x.is_cuda):
            for _ in several(kept.values.nbytes):
                own = attrs.evolve(kept, values=kept.values.clone(), col=kept.col.clone())
                calls[name].append(partial(layer_like(plain, own, name), x))
    if two_of_four.status()[0] and isinstance(plain, nn.Linear) and two_of_four.fits(plain.weight):
        halved = two_of_four.TwoOfFourLinear(plain)
        calls["2:4"] = [partial(copy.deepcopy(halved), x) for _ in several(halved.values.nbytes)]
    with torch.no_grad():
        return {name: 1e3 * seconds for name, seconds in by_turns(calls, x.device, graph=graph, rounds=rounds).items()}


def _fastest(name: str, pruned: float, ms: Mapping[str, float], x: Tensor) -> Choice:
    sparse, dense = ({key: t for key, t in ms.items() if (key in (*BACKENDS, "2:4")) == wanted} for wanted in (True, False))
    other, plain = min(dense, key=lambda key: dense[key]), next(iter(dense))
    if not sparse:
        return Choice(name, pruned, "dense", f"nothing sparse to measure for {x.dtype} on {x.device.type} in a graph", dict(ms))
    best = min(sparse, key=lambda key: sparse[key])
    where = f"on {tuple(x.shape)}: {best} {ms[best]:.3g} ms, {other} {ms[other]:.3g} ms"
    return Choice(name, pruned, best if ms[best] < ms[plain] else "dense", f"{ms[other] / ms[best]:.2f}x {where}", dict(ms))
