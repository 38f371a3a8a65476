"""Which blocks make layers faster on this machine, and what a block costs: timed on single layers with random masks."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import attrs
import torch
from torch import Tensor

from blockprune.core.grid import BlockGrid, BlockShape
from blockprune.core.progress import progress_bar
from blockprune.core.table import Rows, Table
from blockprune.core.types import BlockMask, Masks, Scores
from blockprune.export.autotune import DEFAULT_ROWS
from blockprune.export.choices import backends
from blockprune.export.dense_baselines import dense_int8_kernels, dense_kernels
from blockprune.export.ops import int8_backend
from blockprune.export.packing import pack_int8, pack_weight
from blockprune.export.quantization import wants_int8
from blockprune.export.sparse_layers import BlockSparseLinear, Int8BlockSparseLinear
from blockprune.export.timing import cold_copies, time_interleaved

BLOCKS: tuple[BlockShape, ...] = ((16, 1), (8, 1), (4, 4), (16, 16), (32, 32), (64, 64))
SPARSITIES = (0.5, 0.75, 0.9, 0.95)


@attrs.frozen
class BlockSpeedup:
    """The speedup of a layer in blocks of one shape over the fastest dense kernel, by sparsity.

    Example:
        >>> from blockprune import export
        >>> export.BlockSpeedup((512, 512), (16, 16), {0.5: 0.8, 0.75: 1.6}).faster_from
        0.6
    """

    shape: tuple[int, int]
    block: tuple[int, ...]
    speedup: Mapping[float, float]  # by sparsity

    @property
    def faster_from(self) -> float | None:
        """The sparsity from which the layer is faster than dense, interpolated between measured ones; None if it is never faster."""
        slower: tuple[float, float] | None = None
        for sparsity, speedup in sorted(self.speedup.items()):
            if speedup >= 1:
                if slower is None:
                    return sparsity
                slow, fast = 1 / slower[1], 1 / speedup  # times, which are almost linear in the sparsity
                return slower[0] + (sparsity - slower[0]) * (slow - 1) / (slow - fast)
            slower = sparsity, speedup
        return None


@attrs.frozen(repr=False)
class BlockRecommendation(Table):
    """Which blocks make which layers faster on this machine; it prints in a terminal and renders in a notebook.

    Example:
        >>> from blockprune import export
        >>> export.BlockRecommendation((export.BlockSpeedup((512, 512), (16, 16), {0.5: 0.8, 0.75: 1.6}),), 128)
        layer    block    50%    75%  faster from
        512x512  16x16  0.80x  1.60x          60%
        With 128 input rows per call. 512x512: 16x16 blocks are best, faster than dense from 60% pruned.
    """

    rows: tuple[BlockSpeedup, ...]
    input_rows: int  # in one call of a layer

    def table(self) -> Rows:
        sparsities = sorted({s for row in self.rows for s in row.speedup})
        lines = [("layer", "block", *(f"{s:.0%}" for s in sparsities), "faster from")]
        for row in self.rows:
            start = "never" if row.faster_from is None else f"{row.faster_from:.0%}"
            lines.append((_size_text(row.shape), _size_text(row.block), *(f"{row.speedup[s]:.2f}x" for s in sparsities), start))
        return lines

    @property
    def verdict(self) -> str:
        """The best block of each layer: faster than dense from the lowest sparsity, and the fastest among several such blocks."""
        sentences = [f"With {self.input_rows} input rows per call."]
        for shape in dict.fromkeys(row.shape for row in self.rows):
            faster = [row for row in self.rows if row.shape == shape and row.faster_from is not None]
            if faster:
                best = min(faster, key=lambda row: (row.faster_from, -sum(row.speedup.values())))
                blocks = f"{_size_text(best.block)} blocks are best, faster than dense from {best.faster_from:.0%} pruned"
                sentences.append(f"{_size_text(shape)}: {blocks}.")
            else:
                sentences.append(f"{_size_text(shape)}: no blocks are faster than dense; leave it dense.")
        return " ".join(sentences)


@attrs.frozen
class BlockCost:
    """The time that one kept block of a parameter adds to a call, and the time of a call without any block.

    Example:
        >>> from blockprune import export
        >>> export.BlockCost("fc.weight", (16, 16), 0.001, 0.02).per_element
        3.90625e-06
    """

    name: str
    block: tuple[int, ...]
    milliseconds: float  # of one kept block
    fixed_milliseconds: float  # without any block

    @property
    def per_element(self) -> float:
        """Milliseconds of one kept element."""
        return self.milliseconds / math.prod(self.block)


@attrs.frozen(repr=False)
class BlockCosts(Table):
    """Measured costs by parameter; it prints in a terminal and renders in a notebook.

    Example:
        >>> from blockprune import export
        >>> costs = export.BlockCosts((export.BlockCost("fc.weight", (16, 16), 0.001, 0.02),), 128)
        >>> costs
        parameter  block  us per block  ms without blocks
        fc.weight  16x16         1.000              0.020
        >>> costs.per_element
        {'fc.weight': 3.90625e-06}
    """

    rows: tuple[BlockCost, ...]
    input_rows: int  # in one call of a layer

    @property
    def per_element(self) -> dict[str, float]:
        """Milliseconds of one element by parameter, which `budgets.lagrangian` and `pareto` take as ``cost``."""
        return {row.name: row.per_element for row in self.rows}

    def table(self) -> Rows:
        head = ("parameter", "block", "us per block", "ms without blocks")
        cells = [(row.name, _size_text(row.block), f"{1e3 * row.milliseconds:.3f}", f"{row.fixed_milliseconds:.3f}") for row in self.rows]
        return [head, *cells]


def recommend_blocks(
    layers: Masks | Scores,
    *,
    rows: int = DEFAULT_ROWS,
    inputs: Tensor | None = None,
    blocks: Sequence[BlockShape] = BLOCKS,
    sparsities: Sequence[float] = SPARSITIES,
    dtype: torch.dtype | str = torch.float32,
    graph: bool = False,
    rounds: int = 5,
    progress: bool | None = None,
) -> BlockRecommendation:
    """Time layers of these shapes on this machine, with random masks in several blocks and sparsities, against the fastest dense kernel.

    Args:
        layers: masks or scores, of which only the shapes, blocks and device matter.
        rows: input rows of a layer in one call, such as batch x tokens.
        inputs: instead of ``rows`` and ``dtype``: a tensor ``[..., in_features]`` as all of these layers get it.
        blocks: block shapes to try besides those of the layers.
        sparsities: to try, each above 0 and below 1.
        dtype: of weights and inputs, or "int8" for weights of int8 and inputs of float32 (or of the type of ``inputs``), which are
            compared with the fastest dense kernel of both types.
        graph: on a GPU, time layers as a CUDA graph replays them, as in `choose`.
        rounds: of measurement, of which the median counts.
        progress: show a progress bar; by default in a terminal and in a notebook.

    Raises:
        ValueError: no layers, no input rows, inputs that do not fit a layer, a block with too many axes, or a sparsity outside (0, 1).

    Example:
        >>> from blockprune import export
        >>> mask = bp.BlockMask(torch.rand(16, 16) > 0.9, bp.BlockGrid((256, 256), (16, 16)))
        >>> options = {"blocks": [], "sparsities": [0.5, 0.9], "rounds": 1, "progress": False}
        >>> speed = export.recommend_blocks({"fc.weight": mask}, rows=32, **options)
        >>> [(row.shape, row.block, list(row.speedup)) for row in speed.rows]
        [((256, 256), (16, 16), [0.5, 0.9])]
    """
    timing = _LayerTiming.of(layers, rows, inputs, dtype, graph=graph, rounds=rounds)
    if not all(0 < s < 1 for s in sparsities):
        raise ValueError(f"sparsities={list(sparsities)} must be above 0 and below 1")
    grids: dict[tuple[int, int], list[BlockGrid]] = defaultdict(list)
    for layer in layers.values():
        grid = _matrix_grid(layer.grid)
        shape = cast(tuple[int, int], grid.shape)
        grids[shape] += [grid, *(_clipped_grid(block, shape) for block in blocks)]
    speedups = []
    for shape, candidates in progress_bar(grids.items(), "recommend_blocks", progress):
        distinct = list(dict.fromkeys(candidates))
        dense_ms, sparse_ms = timing.milliseconds(distinct, sparsities)
        speedups += [BlockSpeedup(shape, grid.block, {s: dense_ms / sparse_ms[grid, s] for s in sparsities}) for grid in distinct]
    return BlockRecommendation(tuple(speedups), timing.input_rows)


def cost_table(
    layers: Scores | Masks,
    *,
    rows: int = DEFAULT_ROWS,
    inputs: Tensor | None = None,
    dtype: torch.dtype | str = torch.float32,
    graph: bool = False,
    rounds: int = 9,
    progress: bool | None = None,
) -> BlockCosts:
    """What one kept block costs on this machine, from the times of each layer at 50 and 90 % sparsity: a price for budgets in milliseconds.

    Layers of the same shape and blocks are timed once.

    Args:
        layers: scores or masks, of which only the shapes, blocks and device matter.
        rows, inputs, dtype, graph, rounds, progress: as in `recommend_blocks`.

    Raises:
        ValueError: no layers, no input rows, or inputs that do not fit a layer.

    Example:
        >>> from blockprune import export
        >>> scores = {"fc.weight": bp.BlockScore(torch.rand(16, 16), bp.BlockGrid((256, 256), (16, 16)))}
        >>> costs = export.cost_table(scores, rows=32, rounds=3, progress=False)
        >>> budget = bp.budgets.lagrangian(scores, 0.5, cost=costs.per_element)
        >>> list(budget)
        ['fc.weight']
    """
    timing = _LayerTiming.of(layers, rows, inputs, dtype, graph=graph, rounds=rounds)
    grids = {name: _matrix_grid(layer.grid) for name, layer in layers.items()}
    costs: dict[BlockGrid, tuple[float, float]] = {}  # milliseconds of one block, and without any block
    for grid in progress_bar(dict.fromkeys(grids.values()), "cost_table", progress):
        _, sparse_ms = timing.milliseconds([grid], (0.5, 0.9))
        half, tenth = sparse_ms[grid, 0.5], sparse_ms[grid, 0.9]
        per_block = max(half - tenth, 0.01 * half) / (0.4 * grid.blocks)  # above 0, however noisy the times are
        costs[grid] = per_block, max(0.0, tenth - 0.1 * grid.blocks * per_block)
    return BlockCosts(tuple(BlockCost(name, grid.block, *costs[grid]) for name, grid in grids.items()), timing.input_rows)


@attrs.frozen
class _LayerTiming:
    """The size of the inputs on which layers are timed, and how they are timed."""

    input_rows: int
    dtype: torch.dtype
    device: torch.device
    graph: bool
    rounds: int
    int8: bool

    @classmethod
    def of(
        cls, layers: Scores | Masks, rows: int, inputs: Tensor | None, dtype: torch.dtype | str, *, graph: bool, rounds: int
    ) -> "_LayerTiming":
        int8 = not (isinstance(dtype, torch.dtype) and dtype.is_floating_point) and wants_int8(dtype)
        float_dtype = dtype if isinstance(dtype, torch.dtype) and not int8 else torch.float32
        if inputs is not None:
            rows = inputs.numel() // inputs.shape[-1]
        if not layers or rows < 1:
            raise ValueError(
                f"there are {len(layers)} layers and {rows} input rows; give at least one layer, and at least one row by rows= or inputs="
            )
        if vectors := [name for name, layer in layers.items() if len(layer.grid.shape) < 2]:
            shape = layers[vectors[0]].grid.shape
            raise ValueError(f"{vectors[0]} of shape {shape} is no weight of a Linear or a convolution; leave it out")
        if inputs is None:
            first: Any = next(iter(layers.values()))
            device = first.keep.device if isinstance(first, BlockMask) else first.value.device
        else:
            device, float_dtype = inputs.device, inputs.dtype
            in_features = {name: math.prod(layer.grid.shape[1:]) for name, layer in layers.items()}
            if wrong := [name for name, features in in_features.items() if features != inputs.shape[-1]]:
                misfit = f"inputs {tuple(inputs.shape)} do not fit {wrong[0]}, which has {in_features[wrong[0]]} input features"
                raise ValueError(f"{misfit}; give the number of input rows instead: rows={rows}")
        if int8 and device.type != "cpu":
            raise ValueError(f"dtype={dtype!r} has kernels for a CPU alone, and the layers or inputs are on {device}")
        return cls(rows, float_dtype, device, graph, rounds, int8)

    def milliseconds(self, grids: Sequence[BlockGrid], sparsities: Sequence[float]) -> tuple[float, dict[tuple[BlockGrid, float], float]]:
        """The time of the fastest dense kernel, and the times of random masks by grid and sparsity; the grids have one shape."""
        generator = torch.Generator().manual_seed(0)
        backend = next(row.name for row in backends().rows if row.available)
        weight = torch.randn(grids[0].shape, generator=generator).to(self.device, self.dtype)
        x = torch.randn(self.input_rows, weight.shape[1], generator=generator).to(self.device, self.dtype)
        calls: dict[Any, list[Callable[[], Tensor]]] = defaultdict(list)
        for _ in self._copies(weight.nbytes):
            kernels = dense_kernels(x, weight.clone(), None) | (dense_int8_kernels(x, weight, None) if self.int8 else {})
            for name, call in kernels.items():
                calls[name].append(call)
        dense_names = list(calls)
        for grid in grids:
            order = torch.randperm(grid.blocks, generator=generator)
            for sparsity in sparsities:
                keep = (order >= round(sparsity * grid.blocks)).view(grid.size)
                mask = BlockMask(keep, grid)
                if self.int8:
                    layer: BlockSparseLinear = Int8BlockSparseLinear(pack_int8(weight, mask), None, int8_backend(x))
                else:
                    layer = BlockSparseLinear(pack_weight(weight, mask), None, backend)
                calls[grid, sparsity] = [partial(copy.deepcopy(layer), x) for _ in self._copies(layer.values.nbytes)]
        with torch.no_grad():
            seconds = time_interleaved(calls, self.device, graph=self.graph, rounds=self.rounds)
        milliseconds = {name: 1e3 * value for name, value in seconds.items()}
        return min(milliseconds.pop(name) for name in dense_names), milliseconds

    def _copies(self, nbytes: int) -> range:
        return range(1 if self.device.type == "cpu" else cold_copies(nbytes, self.device))


def _matrix_grid(grid: BlockGrid) -> BlockGrid:
    """The blocks of a kernel as blocks of the matrix ``[out, in * taps]``, as `pack_weight` stores them."""
    whole_kernels = grid.block[2:] == grid.shape[2:]
    width = math.prod(grid.block[1:]) if whole_kernels else 1
    return BlockGrid((grid.shape[0], math.prod(grid.shape[1:])), (grid.block[0], width))


def _clipped_grid(block: BlockShape, shape: tuple[int, int]) -> BlockGrid:
    """A grid whose block is no larger than the shape; axes that the block does not name are whole."""
    if len(block) > len(shape):
        raise ValueError(f"block={tuple(block)} has {len(block)} axes, but a layer's weight has {len(shape)}; give (rows, columns)")
    whole = (*block, *[-1] * (len(shape) - len(block)))
    return BlockGrid(shape, [b if b == -1 else min(b, s) for b, s in zip(whole, shape, strict=True)])


def _size_text(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
