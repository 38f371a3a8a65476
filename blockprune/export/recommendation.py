"""Which blocks make layers faster on this machine, and what a block costs: timed on single layers with random masks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import attrs
import torch
from torch import nn

from blockprune.core.arguments import check_counts
from blockprune.core.grid import BlockGrid, BlockShape, int_tuple
from blockprune.core.progress import progress_bar
from blockprune.core.table import Rows, Table
from blockprune.core.types import BlockScore, Masks, Scores, check_masks, check_scores
from blockprune.export.timed_layers import TimedLayer, layers_of_model, layers_without_model
from blockprune.model.calibration import Forward, default_forward

BLOCKS: tuple[BlockShape, ...] = ((16, 1), (8, 1), (4, 4), (16, 16), (32, 32), (64, 64))
SPARSITIES = (0.5, 0.75, 0.9, 0.95)


@attrs.frozen
class BlockSpeedup:
    """The speedup of a layer in blocks of one shape over the fastest dense kernel, by sparsity.

    Args:
        shape: of the weight.
        inputs: the shape of what the layer gets in one call.
        block: of the mask.
        speedup: by sparsity.
        names: of the weights of this layer and of those that are alike.

    Example:
        >>> from blockprune import export
        >>> export.BlockSpeedup((512, 512), (128, 512), (16, 16), {0.5: 0.8, 0.75: 1.6}, ("fc.weight",)).faster_from
        0.6
    """

    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    block: tuple[int, ...]
    speedup: Mapping[float, float]
    names: tuple[str, ...]

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
        >>> row = export.BlockSpeedup((512, 512), (128, 512), (16, 16), {0.5: 0.8, 0.75: 1.6}, ("fc1.weight", "fc2.weight"))
        >>> export.BlockRecommendation((row,))
        layer    inputs   block    50%    75%  faster from                     such as
        512x512  128x512  16x16  0.80x  1.60x          60%  fc1.weight, 2 in all alike
        512x512 with inputs 128x512: 16x16 blocks are best, faster than dense from 60% pruned.
    """

    rows: tuple[BlockSpeedup, ...]

    def table(self) -> Rows:
        sparsities = sorted({s for row in self.rows for s in row.speedup})
        lines = [("layer", "inputs", "block", *(f"{s:.0%}" for s in sparsities), "faster from", "such as")]
        for row in self.rows:
            start = "never" if row.faster_from is None else f"{row.faster_from:.0%}"
            sizes = (_size_text(row.shape), _size_text(row.inputs), _size_text(row.block))
            alike = f", {len(row.names)} in all alike" if len(row.names) > 1 else ""
            lines.append((*sizes, *(f"{row.speedup[s]:.2f}x" for s in sparsities), start, row.names[0] + alike))
        return lines

    @property
    def verdict(self) -> str:
        """The best block of each layer: faster than dense from the lowest sparsity, and the fastest among several such blocks."""
        sentences, groups = [], dict.fromkeys((row.names, row.shape, row.inputs) for row in self.rows)
        sizes = [(shape, inputs) for _, shape, inputs in groups]
        for names, shape, inputs in groups:
            differing = f" ({names[0]})" if sizes.count((shape, inputs)) > 1 else ""  # in stride, for example
            layer = f"{_size_text(shape)}{differing} with inputs {_size_text(inputs)}"
            faster = [row for row in self.rows if row.names == names and row.faster_from is not None]
            if faster:
                best = min(faster, key=lambda row: (row.faster_from, -sum(row.speedup.values())))
                blocks = f"{_size_text(best.block)} blocks are best, faster than dense from {best.faster_from:.0%} pruned"
                sentences.append(f"{layer}: {blocks}.")
            else:
                sentences.append(f"{layer}: no blocks are faster than dense; leave it dense.")
        return " ".join(sentences)


@attrs.frozen
class BlockCost:
    """The time that one kept block of a parameter adds to a call, and the time of a call without any block.

    Args:
        name: of the parameter.
        block: its shape.
        milliseconds: of one kept block.
        fixed_milliseconds: of a call without any block.

    Example:
        >>> from blockprune import export
        >>> export.BlockCost("fc.weight", (16, 16), 0.001, 0.02).per_element
        3.90625e-06
    """

    name: str
    block: tuple[int, ...]
    milliseconds: float
    fixed_milliseconds: float

    @property
    def per_element(self) -> float:
        """Milliseconds of one kept element."""
        return self.milliseconds / math.prod(self.block)


@attrs.frozen(repr=False)
class BlockCosts(Table):
    """Measured costs by parameter; it prints in a terminal and renders in a notebook.

    Example:
        >>> from blockprune import export
        >>> costs = export.BlockCosts((export.BlockCost("fc.weight", (16, 16), 0.001, 0.02),))
        >>> costs
        parameter  block  us per block  ms without blocks
        fc.weight  16x16         1.000              0.020
        >>> costs.per_element
        {'fc.weight': 3.90625e-06}
    """

    rows: tuple[BlockCost, ...]

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
    model: nn.Module | None = None,
    inputs: Any = None,
    forward: Forward = default_forward,
    rows: int | None = None,
    blocks: Sequence[BlockShape] = BLOCKS,
    sparsities: Sequence[float] = SPARSITIES,
    dtype: torch.dtype | str | None = None,
    graph: bool = False,
    rounds: int = 5,
    progress: bool | None = None,
) -> BlockRecommendation:
    """Time layers of these shapes on this machine, with random masks in several blocks and sparsities, against the fastest dense kernel.

    Args:
        layers: masks or scores, of which only the shapes, blocks and device matter.
        model: the model of these layers. Each is timed in its own type, with inputs of the size that it gets; if the model calls it several
            times, the last call counts. Convolutions need it, because their time depends on their stride and the size of the image.
        inputs: with a model, one batch for ``forward``; without, a floating-point tensor ``[..., in_features]`` as all layers get it.
        forward: (model, batch) -> output, as in `Calibration`.
        rows: without model and inputs, the input rows of a layer in one call, such as batch x tokens; by default 128.
        blocks: block shapes to try besides those of the layers.
        sparsities: to try, each above 0 and below 1.
        dtype: without model and inputs, the type of weights and inputs, by default float32. In any case "int8", for weights of int8, which
            are compared with the fastest dense kernel of both types; convolutions have no int8 form and stay in their type.
        graph: on a GPU, time layers as a CUDA graph replays them, as in `choose`.
        rounds: of measurement, of which the median counts.
        progress: show a progress bar; by default in a terminal and in a notebook.

    Raises:
        KeyError: a name that is no parameter of the model.
        ValueError: no layers, no input rows, inputs that do not fit or reach a layer, a layer that has no block-sparse form, a convolution
            without its model, options that exclude each other, a block with too many axes, no sparsities or one outside (0, 1), or rounds
            below 1.
        TypeError: layers that are neither masks nor scores, such as a model; a block that is no shape, or a sparsity that is no number.

    Example:
        >>> from blockprune import export
        >>> mask = bp.BlockMask(torch.rand(16, 16) > 0.9, bp.BlockGrid((256, 256), (16, 16)))
        >>> options = {"blocks": [], "sparsities": [0.5, 0.9], "rounds": 1, "progress": False}
        >>> speed = export.recommend_blocks({"fc.weight": mask}, rows=32, **options)
        >>> [(row.shape, row.inputs, row.block, list(row.speedup)) for row in speed.rows]
        [((256, 256), (32, 256), (16, 16), [0.5, 0.9])]
    """
    blocks, sparsities = _checked_lists(blocks, sparsities)
    (rounds,) = check_counts(1, rounds=rounds)
    timed, int8 = _timed_layers(layers, model, inputs, forward=forward, rows=rows, dtype=dtype)
    grids: dict[TimedLayer, list[BlockGrid]] = {}
    names: dict[TimedLayer, list[str]] = {}
    for name, layer in timed.items():
        grid = layers[name].grid
        grids.setdefault(layer, []).extend([grid, *(_clipped_grid(block, name, grid.shape) for block in blocks)])
        names.setdefault(layer, []).append(name)
    speedups = []
    for layer, candidates in progress_bar(grids.items(), "recommend_blocks", progress):
        distinct = list(dict.fromkeys(candidates))
        dense_ms, sparse_ms = layer.milliseconds(distinct, sparsities, int8=int8, graph=graph, rounds=rounds)
        for grid in distinct:
            speedup = {s: dense_ms / sparse_ms[grid, s] for s in sparsities}
            speedups.append(BlockSpeedup(layer.weight, layer.inputs, tuple(grid.block), speedup, tuple(names[layer])))
    return BlockRecommendation(tuple(speedups))


def cost_table(
    layers: Scores | Masks,
    *,
    model: nn.Module | None = None,
    inputs: Any = None,
    forward: Forward = default_forward,
    rows: int | None = None,
    dtype: torch.dtype | str | None = None,
    graph: bool = False,
    rounds: int = 9,
    progress: bool | None = None,
) -> BlockCosts:
    """What one kept block costs on this machine, from the times of each layer at 50 and 90 % sparsity.

    Give it as the ``cost`` of a budget in milliseconds.

    Layers of the same shape, blocks and inputs are timed once.

    Args:
        layers: scores or masks, of which only the shapes, blocks and device matter.
        model, inputs, forward, rows, dtype, graph, rounds, progress: as in `recommend_blocks`.

    Raises:
        KeyError, ValueError, TypeError: as `recommend_blocks`.

    Example:
        >>> from blockprune import export
        >>> scores = {"fc.weight": bp.BlockScore(torch.rand(16, 16), bp.BlockGrid((256, 256), (16, 16)))}
        >>> costs = export.cost_table(scores, rows=32, rounds=3, progress=False)
        >>> budget = bp.budgets.lagrangian(scores, 0.5, cost=costs.per_element)
        >>> list(budget)
        ['fc.weight']
    """
    (rounds,) = check_counts(1, rounds=rounds)
    timed, int8 = _timed_layers(layers, model, inputs, forward=forward, rows=rows, dtype=dtype)
    keys = {name: (layer, layers[name].grid) for name, layer in timed.items()}
    costs: dict[Any, tuple[float, float]] = {}  # milliseconds of one block, and without any block
    for layer, grid in progress_bar(dict.fromkeys(keys.values()), "cost_table", progress):
        _, sparse_ms = layer.milliseconds([grid], (0.5, 0.9), int8=int8, graph=graph, rounds=rounds)
        half, tenth = sparse_ms[grid, 0.5], sparse_ms[grid, 0.9]
        per_block = max(half - tenth, 0.01 * half) / (0.4 * grid.blocks)  # above 0, however noisy the times are
        costs[layer, grid] = per_block, max(0.0, tenth - 0.1 * grid.blocks * per_block)
    return BlockCosts(tuple(BlockCost(name, tuple(layers[name].grid.block), *costs[keys[name]]) for name in layers))


def _timed_layers(
    layers: Scores | Masks,
    model: nn.Module | None,
    inputs: Any,
    *,
    forward: Forward,
    rows: int | None,
    dtype: torch.dtype | str | None,
) -> tuple[dict[str, TimedLayer], bool]:
    if isinstance(layers, Mapping) and any(isinstance(layer, BlockScore) for layer in layers.values()):
        check_scores(layers, "layers", ranked=False)
    else:
        check_masks(layers, "layers", remedy="give masks or scores, such as bp.read_masks(model), and the model as model=")
    if model is None:
        return layers_without_model(layers, rows, inputs, dtype)
    if rows is not None:
        raise ValueError(f"rows={rows} is given beside a model, whose inputs decide it; leave it out")
    return layers_of_model(layers, model, inputs, forward, dtype)


def _checked_lists(blocks: Any, sparsities: Any) -> tuple[list[tuple[int, ...]], list[float]]:
    shapes = []
    for block in blocks if isinstance(blocks, Iterable) else [blocks]:
        try:
            shapes.append(int_tuple("block", block))
        except TypeError:
            raise TypeError(
                f"blocks has {block!r}, which is no shape of a block; give a list of shapes, such as blocks=[(16, 1), (8, 8)]"
            ) from None
    listed = list(sparsities) if isinstance(sparsities, Iterable) else [sparsities]
    if not isinstance(sparsities, Iterable) or not all(isinstance(s, Real) for s in listed):
        raise TypeError(f"sparsities={sparsities!r} must be a list of numbers above 0 and below 1, such as [0.5, 0.9]")
    if not listed or not all(0 < s < 1 for s in listed):
        raise ValueError(f"sparsities={listed} must be above 0 and below 1, and at least one")
    return shapes, listed


def _clipped_grid(block: BlockShape, name: str, shape: Sequence[int]) -> BlockGrid:
    """A grid whose block is no larger than the shape; axes that the block does not name are whole."""
    if len(block) > len(shape):
        raise ValueError(
            f"blocks has {tuple(block)} with {len(block)} axes, but {name} of shape {tuple(shape)} has {len(shape)}; give "
            f"{tuple(block[: len(shape)])}, or time layers of another number of axes in another call"
        )
    whole = (*block, *[-1] * (len(shape) - len(block)))
    return BlockGrid(shape, [b if b == -1 else min(b, s) for b, s in zip(whole, shape, strict=True)])


def _size_text(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
