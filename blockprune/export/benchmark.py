"""Whole models against the best that a dense one does, measured in turn."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from blockprune.apply import apply_masks, read_masks
from blockprune.export.block_sparse import block_sparse
from blockprune.export.choose import backends
from blockprune.export.dense import PackedLinear, dense, packed
from blockprune.export.layers import BlockSparseLinear
from blockprune.export.timing import captured, medians, waited
from blockprune.export.two_of_four import TwoOfFourLinear
from blockprune.fold import default_forward
from blockprune.tables import Rows, Table
from blockprune.types import BlockMask

SPARSITIES = (0.5, 0.75, 0.9, 0.95)  # tried where what was asked does not pay


@attrs.frozen
class Speed:
    """One model: its type, milliseconds a call, inputs a second, mebibytes of weights, and how often as fast as the best dense.

    Example:
        >>> from blockprune import export
        >>> export.Speed("mine", "float32", 2.0, 500.0, 1.5, 2.0, 1.0).cells
        ('mine', 'float32', '2.00', '500', '1.5', '2.00x', '1.00x')
    """

    name: str
    dtype: str
    milliseconds: float
    inputs_per_second: float
    mebibytes: float
    of_its_dtype: float  # times as fast as the best dense model of the same type
    of_any: float

    @property
    def cells(self) -> tuple[str, ...]:
        times = f"{self.of_its_dtype:.2f}x", f"{self.of_any:.2f}x"
        return self.name, self.dtype, f"{self.milliseconds:.2f}", f"{self.inputs_per_second:,.0f}", f"{self.mebibytes:,.1f}", *times


@attrs.frozen(repr=False)
class Comparison(Table):
    """A table of models, dense ones first, and what follows from it; prints in a terminal, renders in a notebook.

    Example:
        >>> from blockprune import export
        >>> export.Comparison((export.Speed("mine", "float32", 2.0, 500.0, 1.5, 2.0, 1.0),), "It pays.")
        model    dtype  ms a call  inputs/s  MiB  x dense of the type  x best dense
        mine   float32       2.00       500  1.5                2.00x         1.00x
        It pays.
    """

    rows: tuple[Speed, ...]
    verdict: str

    def table(self) -> Rows:
        """The cells, the head first."""
        head = ("model", "dtype", "ms a call", "inputs/s", "MiB", "x dense of the type", "x best dense")
        return [head, *(row.cells for row in self.rows)]


def benchmark(
    model: nn.Module,
    *others: nn.Module,
    inputs: Any,
    names: Sequence[str] = (),
    forward: Callable[..., Any] = default_forward,
    compiled: bool = False,
    graph: bool = False,
    rounds: int = 9,
) -> Comparison:
    """Median time of models against the best dense one: as it is, packed by oneDNN, in bfloat16, and compiled; all run in turn.

    Where a model with masks does not pay, the same blocks are tried at higher sparsities, with random masks, to say from where it would.

    Args:
        model: dense or masked; dense forms of it (with zeros) are what the others are compared with.
        others: exported models, for instance.
        inputs: one batch for ``forward``; its floating tensors follow a model's type.
        names: of the others; their classes by default.
        forward: as in `collect.with_statistics`.
        compiled: also `torch.compile` dense models, with frozen weights; minutes.
        graph: on a GPU, time each model as a CUDA graph replays it.
        rounds: of measurement, of which the median counts.

    Raises:
        ValueError: names that are not as many as the others.

    Example:
        >>> from blockprune import export
        >>> mask = bp.BlockMask(torch.rand(16, 16) > 0.9, bp.BlockGrid((256, 256), (16, 16)))
        >>> model = bp.apply_masks(nn.Sequential(nn.Linear(256, 256)), {"0.weight": mask})
        >>> speed = export.benchmark(model, export.block_sparse(model, backend="torch"), inputs=torch.randn(8, 256), rounds=1)
        >>> [row.name for row in speed.rows][0], speed.rows[-1].name
        ('dense', 'Sequential')
    """
    if names and len(names) != len(others):
        raise ValueError(f"names has {len(names)} entries for {len(others)} models; give one each, or none")
    whole, count = _dense_ways(model, compiled), _count(inputs)
    tried: dict[str, nn.Module] = {}
    for other, name in zip(others, names or [type(other).__name__ for other in others], strict=True):
        tried[name if name not in {**whole, **tried} else f"{name} {len(tried) + 1}"] = other
    time = partial(_time, inputs=inputs, forward=forward, graph=graph, rounds=rounds)
    models = {**whole, **tried}
    ms = time(models)
    best = {dtype: min((n for n in whole if _dtype(whole[n]) == dtype), key=ms.__getitem__) for dtype in map(_dtype, whole.values())}
    fastest = min(whole, key=ms.__getitem__)
    rows, sentences = [], []
    for name, one in models.items():
        rival = best.get(_dtype(one), fastest)
        of_rival = ms[rival] / ms[name]
        rows.append(Speed(name, str(_dtype(one))[6:], ms[name], 1e3 * count / ms[name], _mebibytes(one), of_rival, ms[fastest] / ms[name]))
        if name in tried and of_rival > 1:
            sentences.append(f"{name} is {of_rival:.2f} times as fast as the best {rows[-1].dtype} dense model ({rival}).")
        elif name in tried:
            sentences.append(
                f"{name} does not pay: it is {of_rival:.2f} times as fast as {rival}.{_would(model, _dtype(one), ms[rival], time)}"
            )
    return Comparison(tuple(rows), " ".join(sentences) or f"The fastest is: {fastest}.")


def _dense_ways(model: nn.Module, compiled: bool) -> dict[str, nn.Module]:
    plain = dense(model)
    wide = _dtype(plain) == torch.float32
    eager = {"dense": plain, **({"dense bfloat16": copy.deepcopy(plain).to(torch.bfloat16)} if wide else {})}
    found: dict[str, nn.Module] = {}
    for name, one in eager.items():
        found[name] = one
        if all(p.device.type == "cpu" for p in one.parameters()):
            found[f"{name}, oneDNN packed"] = packed(one)
    if compiled:
        freezing: Any = {"freezing": True}
        found |= {f"{name}, compiled": cast(nn.Module, torch.compile(copy.deepcopy(found[name]), options=freezing)) for name in eager}
    return found


def _time(models: Mapping[str, nn.Module], *, inputs: Any, forward: Callable[..., Any], graph: bool, rounds: int) -> dict[str, float]:
    """Median milliseconds a call."""
    calls = {}
    with torch.no_grad():
        for name, model in models.items():
            device = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0)).device
            call = partial(forward, model, _as(_dtype(model), inputs))
            calls[name] = waited(captured(call) if graph and device.type == "cuda" else call, device)
        return {name: 1e3 * seconds for name, seconds in medians(calls, rounds=rounds).items()}


def _would(model: nn.Module, dtype: torch.dtype, dense_ms: float, time: Callable[..., dict[str, float]]) -> str:
    """From which sparsity on the same blocks would pay, with random masks in the same places."""
    masks, generator = read_masks(model), torch.Generator().manual_seed(0)
    best = 0.0
    for sparsity in SPARSITIES if masks else ():
        random = {name: BlockMask(torch.rand(m.grid.size, generator=generator) >= sparsity, m.grid) for name, m in masks.items()}
        backend = next(row.name for row in backends().rows if row.available)
        tried = block_sparse(apply_masks(copy.deepcopy(model), random), backend=backend).to(dtype)
        best = dense_ms / time({"tried": tried})["tried"]
        if best > 1:
            return f" The same blocks would pay at {sparsity:.0%} pruned: {best:.2f} times as fast."
    return f" Nor would the same blocks at {SPARSITIES[-1]:.0%} pruned: {best:.2f} times." if masks else ""


def _dtype(model: nn.Module) -> torch.dtype:
    kinds = BlockSparseLinear, TwoOfFourLinear
    sparse = next((module.values.dtype for module in model.modules() if isinstance(module, kinds)), None)
    return sparse or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _as(dtype: torch.dtype, inputs: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)


def _mebibytes(model: nn.Module) -> float:
    held = [module.plain for module in model.modules() if isinstance(module, PackedLinear)]
    seen = {x.data_ptr(): x.nbytes for x in [*model.parameters(), *model.buffers(), *held]}
    return sum(seen.values()) / 2**20


def _count(inputs: Any) -> int:
    """Inputs in a batch: along the first axis of its first tensor."""
    found: list[int] = []
    tree_map_only(Tensor, lambda x: found.append(x.shape[0] if x.ndim else 1), inputs)
    return found[0] if found else 1
