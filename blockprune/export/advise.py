"""Which blocks pay on this machine, and what a block costs: measured on single layers."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor
from tqdm import tqdm

from blockprune.blocks import BlockGrid, BlockShape
from blockprune.export.choose import ROWS, backends
from blockprune.export.dense import ways
from blockprune.export.layers import BlockSparseLinear, as_matrix
from blockprune.export.timing import by_turns, copies
from blockprune.tables import Rows, Table
from blockprune.types import BlockMask, Masks, Scores

BLOCKS: tuple[BlockShape, ...] = ((16, 1), (8, 1), (4, 4), (16, 16), (32, 32), (64, 64))
SPARSITIES = (0.5, 0.75, 0.9, 0.95)


@attrs.frozen
class Paying:
    """How often as fast as the best dense product blocks of one shape are on one layer, at each sparsity; where they begin to pay.

    Example:
        >>> from blockprune import export
        >>> export.Paying((512, 512), (16, 16), {0.5: 0.8, 0.75: 1.6}).pays_from
        0.6
    """

    shape: tuple[int, int]
    block: tuple[int, ...]
    speedup: Mapping[float, float]  # by sparsity

    @property
    def pays_from(self) -> float | None:
        """The sparsity at which time breaks even, between two that were measured; None where none pays."""
        before: tuple[float, float] | None = None
        for sparsity, times in sorted(self.speedup.items()):
            if times >= 1:
                if before is None:
                    return sparsity
                slow, fast = 1 / before[1], 1 / times  # time is close to a line in sparsity
                return before[0] + (sparsity - before[0]) * (slow - 1) / (slow - fast)
            before = sparsity, times
        return None


@attrs.frozen(repr=False)
class Advice(Table):
    """What pays on this machine; prints in a terminal, renders in a notebook.

    Example:
        >>> from blockprune import export
        >>> export.Advice((export.Paying((512, 512), (16, 16), {0.5: 0.8, 0.75: 1.6}),), 128)
        layer    block    50%    75%  pays from
        512x512  16x16  0.80x  1.60x        60%
        At 128 inputs a call. 512x512: 16x16 blocks pay first, from 60% pruned.
    """

    rows: tuple[Paying, ...]
    inputs: int

    def table(self) -> Rows:
        """The cells, the head first."""
        sparsities = sorted({s for row in self.rows for s in row.speedup})
        found = [("layer", "block", *(f"{s:.0%}" for s in sparsities), "pays from")]
        for row in self.rows:
            start = "never" if row.pays_from is None else f"{row.pays_from:.0%}"
            found.append((_by(row.shape), _by(row.block), *(f"{row.speedup[s]:.2f}x" for s in sparsities), start))
        return found

    @property
    def verdict(self) -> str:
        """Which blocks pay first, layer by layer."""
        said = [f"At {self.inputs} inputs a call."]
        for shape in dict.fromkeys(row.shape for row in self.rows):
            paying = [row for row in self.rows if row.shape == shape and row.pays_from is not None]
            if paying:  # of several that pay from the same sparsity on, the one that pays most
                first = min(paying, key=lambda row: (row.pays_from, -sum(row.speedup.values())))
                said.append(f"{_by(shape)}: {_by(first.block)} blocks pay first, from {first.pays_from:.0%} pruned.")
            else:
                said.append(f"{_by(shape)}: no blocks pay; leave it dense.")
        return " ".join(said)


def advise(
    layers: Masks | Scores,
    inputs: int | Tensor = ROWS,
    *,
    blocks: Sequence[BlockShape] = BLOCKS,
    sparsities: Sequence[float] = SPARSITIES,
    dtype: torch.dtype = torch.float32,
    graph: bool = False,
    rounds: int = 5,
    progress: bool = True,
) -> Advice:
    """Which block shape and sparsity pay for layers of these shapes on this machine, from random masks of each.

    Args:
        layers: masks or scores; their shapes and blocks count, and where they are, not their values.
        inputs: how many a layer meets in one call, or such inputs ``[..., in_features]`` of all these layers.
        blocks: more shapes to try.
        sparsities: to try, in (0, 1).
        dtype: of weights and inputs; that of the inputs, if they are a tensor.
        graph: as in `choose`.
        rounds: of measurement, of which the median counts.
        progress: show a bar on a terminal.

    Raises:
        ValueError: no layers, no inputs, a sparsity outside (0, 1).

    Example:
        >>> from blockprune import export
        >>> mask = bp.BlockMask(torch.rand(16, 16) > 0.9, bp.BlockGrid((256, 256), (16, 16)))
        >>> advice = export.advise({"fc.weight": mask}, 32, blocks=[], sparsities=[0.5, 0.9], rounds=1, progress=False)
        >>> [(row.shape, row.block, list(row.speedup)) for row in advice.rows]
        [((256, 256), (16, 16), [0.5, 0.9])]
    """
    like = _asked(layers, inputs, dtype)
    if not all(0 < s < 1 for s in sparsities):
        raise ValueError(f"sparsities={list(sparsities)} must be above 0 and below 1")
    tried: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for layer in layers.values():
        grid = _matrix(layer.grid)
        here = tried.setdefault(grid.shape, [])  # type: ignore[arg-type]  # two axes
        here += [grid.block, *(_fitted(one, grid.shape) for one in blocks)]
    found = []
    for shape, each in tqdm(tried.items(), desc="advise", disable=None if progress else True, leave=False):
        grids = [BlockGrid(shape, block) for block in dict.fromkeys(each)]
        best, times = _times(grids, sparsities, like, graph, rounds)
        found += [Paying(shape, grid.block, {s: best / times[grid.block, s] for s in sparsities}) for grid in grids]
    return Advice(tuple(found), len(like))


@attrs.frozen
class Cost:
    """What a kept block of one parameter costs in a call, milliseconds, and what the layer costs without any.

    Example:
        >>> from blockprune import export
        >>> export.Cost("fc.weight", (16, 16), 0.001, 0.02).per_element
        3.90625e-06
    """

    name: str
    block: tuple[int, ...]
    milliseconds: float
    fixed: float

    @property
    def per_element(self) -> float:
        """Of a kept element."""
        return self.milliseconds / math.prod(self.block)


@attrs.frozen(repr=False)
class Costs(Table):
    """Measured costs by parameter; prints in a terminal, renders in a notebook.

    Example:
        >>> from blockprune import export
        >>> costs = export.Costs((export.Cost("fc.weight", (16, 16), 0.001, 0.02),), 128)
        >>> costs
        parameter  block  us a block  ms without any
        fc.weight  16x16       1.000           0.020
        >>> costs.per_element
        {'fc.weight': 3.90625e-06}
    """

    rows: tuple[Cost, ...]
    inputs: int

    @property
    def per_element(self) -> dict[str, float]:
        """What `distribute.lagrangian` and `pareto` take as ``cost``: milliseconds of an element, by parameter."""
        return {row.name: row.per_element for row in self.rows}

    def table(self) -> Rows:
        """The cells, the head first."""
        head = ("parameter", "block", "us a block", "ms without any")
        return [head, *((r.name, _by(r.block), f"{1e3 * r.milliseconds:.3f}", f"{r.fixed:.3f}") for r in self.rows)]


def cost_table(
    layers: Scores | Masks,
    inputs: int | Tensor = ROWS,
    *,
    dtype: torch.dtype = torch.float32,
    graph: bool = False,
    rounds: int = 9,
    progress: bool = True,
) -> Costs:
    """What a kept block costs on this machine, from the times of each layer at 50 and 90 % pruned: a price for budgets in time.

    Layers of the same shape and blocks are measured once.

    Args:
        layers: scores or masks; their shapes and blocks count, and where they are, not their values.
        inputs, dtype, graph, rounds, progress: as in `advise`.

    Raises:
        ValueError: no layers, no inputs.

    Example:
        >>> from blockprune import export
        >>> scores = {"fc.weight": bp.BlockScore(torch.rand(16, 16), bp.BlockGrid((256, 256), (16, 16)))}
        >>> costs = export.cost_table(scores, 32, rounds=3, progress=False)
        >>> budget = bp.distribute.lagrangian(scores, 0.5, cost=costs.per_element)
        >>> list(budget)
        ['fc.weight']
    """
    like = _asked(layers, inputs, dtype)
    measured: dict[BlockGrid, tuple[float, float]] = {}
    found = []
    for name, layer in tqdm(layers.items(), desc="cost_table", disable=None if progress else True, leave=False):
        grid = _matrix(layer.grid)
        if grid not in measured:
            _, times = _times([grid], (0.5, 0.9), like, graph, rounds)
            half, tenth = times[grid.block, 0.5], times[grid.block, 0.9]
            block = max(half - tenth, 0.01 * half) / (0.4 * grid.blocks)  # a cost is positive, however noisy
            measured[grid] = block, max(0.0, tenth - 0.1 * grid.blocks * block)
        found.append(Cost(name, grid.block, *measured[grid]))
    return Costs(tuple(found), len(like))


def _asked(layers: Scores | Masks, inputs: int | Tensor, dtype: torch.dtype) -> Tensor:
    """As many numbers as there are inputs, of their type, where they are or, if only counted, where the layers are."""
    rows = inputs if isinstance(inputs, int) else inputs.numel() // inputs.shape[-1]
    if not layers or rows < 1:
        raise ValueError(f"give at least one layer (given {len(layers)}) and one input, as a number or a tensor [..., in] (given {rows})")
    wide = {name: math.prod(layer.grid.shape[1:]) for name, layer in layers.items()}
    if not isinstance(inputs, int) and (other := [name for name in wide if wide[name] != inputs.shape[-1]]):
        given = f"inputs {tuple(inputs.shape)} do not fit {other[0]}, which has {wide[other[0]]} input features"
        raise ValueError(f"{given}; give how many inputs a layer meets as a number")
    if flat := [name for name, layer in layers.items() if len(layer.grid.shape) < 2]:
        raise ValueError(f"{flat[0]} of shape {layers[flat[0]].grid.shape} is no weight of a Linear or a convolution; leave it out")
    if isinstance(inputs, Tensor):
        return inputs.new_empty(rows)
    one: Any = next(iter(layers.values()))
    return torch.empty(rows, dtype=dtype, device=one.keep.device if isinstance(one, BlockMask) else one.value.device)


def _fitted(block: BlockShape, shape: tuple[int, ...]) -> tuple[int, ...]:
    """No larger than the shape; axes that are not named are whole."""
    if len(block) > len(shape):
        raise ValueError(f"block={tuple(block)} names {len(block)} axes, and a layer's weight has {len(shape)}; give (rows, columns)")
    whole = (*block, *[-1] * (len(shape) - len(block)))
    return BlockGrid(shape, [b if b == -1 else min(b, s) for b, s in zip(whole, shape, strict=True)]).block


def _matrix(grid: BlockGrid) -> BlockGrid:
    """A kernel's blocks as those of the matrix ``[out, in * taps]``, as `as_matrix` stores them."""
    whole = grid.block[2:] == grid.shape[2:]
    wide = math.prod(grid.block[1:]) if whole else 1
    return BlockGrid((grid.shape[0], math.prod(grid.shape[1:])), (grid.block[0], wide))


def _times(
    grids: Sequence[BlockGrid], sparsities: Sequence[float], like: Tensor, graph: bool, rounds: int
) -> tuple[float, dict[tuple[tuple[int, ...], float], float]]:
    """Milliseconds of the best dense product, and of random masks by block and sparsity; of as many inputs as ``like`` has; all in turn."""
    generator, backend = torch.Generator().manual_seed(0), next(row.name for row in backends().rows if row.available)
    weight = torch.randn(grids[0].shape, generator=generator).to(like)
    x = torch.randn(len(like), weight.shape[1], generator=generator).to(like)

    def several(held: int) -> range:
        return range(1 if x.device.type == "cpu" else copies(held, x.device))

    calls: dict[Any, list[Callable[[], Tensor]]] = defaultdict(list)
    for _ in several(weight.nbytes):
        for name, way in ways(x, weight.clone(), None).items():
            calls[name].append(way)
    dense = list(calls)
    for grid in grids:
        order = torch.randperm(grid.blocks, generator=generator)
        for sparsity in sparsities:
            keep = (order >= round(sparsity * grid.blocks)).view(grid.size)
            layer = BlockSparseLinear(as_matrix(weight, BlockMask(keep, grid)), None, backend)
            calls[grid.block, sparsity] = [partial(copy.deepcopy(layer), x) for _ in several(layer.values.nbytes)]
    with torch.no_grad():
        ms = {name: 1e3 * seconds for name, seconds in by_turns(calls, x.device, graph=graph, rounds=rounds).items()}
    return min(ms.pop(name) for name in dense), ms


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
