"""Pictures of masks, and of quality against latency; they need matplotlib (``pip install "blockprune[plot]"``).

The tables of `sensitivity`, `pareto` and `sweep` draw themselves: ``table.plot()``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.nn.functional import adaptive_avg_pool2d

from blockprune.analysis.drawing import (
    COLOURS,
    MARKERS,
    label_points,
    legend_beside,
    new_axes,
    new_figure,
    plain_frame,
    set_title,
    short_names,
)
from blockprune.core.arguments import check_number
from blockprune.core.masks import sparsity
from blockprune.core.types import BlockMask, Masks, check_masks

__all__ = ["mask", "masks", "quality_against_latency"]

PIXELS = 256  # along each side of a mask; what is finer is averaged
Point = tuple[float, float]  # milliseconds, quality


def mask(mask: BlockMask, *, title: str = "", ax: Any = None) -> Any:
    """Draw one mask: kept blocks are dark, pruned ones white; where several blocks share a pixel, it shows the share that is kept.

    Args:
        mask: of a parameter of any rank; all axes but the first lie side by side.
        title: the text above; by default the shape and the sparsity.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: something else than one mask, such as the masks of a model.

    Example:
        >>> kept = bp.BlockMask(torch.rand(8, 8) > 0.5, bp.BlockGrid((32, 32), (4, 4)))
        >>> bp.pictures.mask(kept, title="a mask").get_title()
        'a mask'
    """
    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"mask is a {type(mask).__name__}; give one BlockMask, such as masks['0.weight'], or draw all: bp.pictures.masks(masks)"
        )
    ax = new_axes(ax, width=4.2)
    grid = mask.grid
    rows, columns = grid.shape[0], math.prod(grid.shape[1:])
    keep = mask.keep.detach().cpu().float().reshape(grid.size[0], -1)  # [blocks along the first axis, all others]
    height, width = (min(PIXELS, size) for size in keep.shape)
    shown = adaptive_avg_pool2d(keep[None], (height, width))[0]
    right, bottom = math.prod(n * b for n, b in zip(grid.size[1:], grid.block[1:], strict=True)), grid.size[0] * grid.block[0]
    ax.imshow(shown.tolist(), cmap="Blues", vmin=0, vmax=1.15, extent=(0, right, bottom, 0), interpolation="nearest", aspect="auto")
    ax.set(xlim=(0, columns), ylim=(rows, 0), xticks=(0, columns), yticks=(0, rows))
    ax.set_box_aspect(min(2.5, max(0.4, rows / columns)))
    ax.tick_params(labelsize=7)
    set_title(ax, title or f"{' x '.join(map(str, grid.shape))}, {sparsity({'': mask}):.1%} pruned")
    return ax


def masks(masks: Masks, *, columns: int = 4, axes: Sequence[Any] | None = None) -> Any:
    """Draw the masks of a model, one small picture a parameter, with its name and sparsity.

    Args:
        masks: as a pipeline returns them; of a large model, select some: ``{n: m for n, m in masks.items() if ".mlp." in n}``.
        columns: pictures in a row of a new figure.
        axes: matplotlib axes, one a mask; by default those of a new figure.

    Returns:
        The figure.

    Raises:
        ValueError: no masks, fewer than one column, or another number of axes than of masks.
        TypeError: something else than masks, such as the result of a recipe.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> figure = bp.pictures.masks(bp.recipes.magnitude(bp.linears((4, 4)))(model, 0.5).masks)
        >>> [ax.get_title().split() for ax in figure.axes]
        [['0.weight', '50.0%', 'pruned'], ['2.weight', '50.0%', 'pruned']]
    """
    check_masks(masks)
    if not masks or columns < 1:
        raise ValueError(f"masks holds {len(masks)} masks, and columns={columns}; there must be one or more of both")
    if axes is None:
        columns = min(columns, len(masks))
        rows = -(-len(masks) // columns)
        figure = new_figure(2.3 * columns + 0.4, 2.5 * rows)
        axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(masks))]
    if len(axes) != len(masks):
        raise ValueError(f"axes has {len(axes)} entries for {len(masks)} masks; give one for each mask, or none")
    for ax, (parameter, name) in zip(axes, zip(masks, short_names(list(masks), longest=26), strict=True), strict=True):
        mask(masks[parameter], ax=ax)
        ax.set_title(f"{name}\n{sparsity({parameter: masks[parameter]}):.1%} pruned", fontsize=8)
    return axes[0].figure


def quality_against_latency(
    dense: Mapping[str, Point],
    pruned: Mapping[str, Mapping[str, Point]],
    *,
    latency: str = "milliseconds",
    quality: str = "quality",
    title: str = "Quality against latency",
    ax: Any = None,
) -> Any:
    """Draw models by latency and quality: dense ones as labelled points, pruned ones as lines of labelled points.

    A dotted line marks the fastest dense model: what lies left of it is faster than every dense one.

    Args:
        dense: (milliseconds, quality) by label, such as float32, bfloat16 and int8.
        pruned: for each line of the picture, (milliseconds, quality) by label, such as the sparsity.
        latency: the text below the horizontal axis: what one call computes, and on what.
        quality: the text beside the vertical axis.
        title: the text above.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: no dense model, or a point that is not two finite numbers.
        TypeError: no mappings.

    Example:
        >>> dense = {"float32": (20.0, 0.66), "bfloat16": (12.0, 0.66), "int8": (9.0, 0.64)}
        >>> ax = bp.pictures.quality_against_latency(dense, {"16x16 blocks": {"50%": (11.0, 0.65), "75%": (6.5, 0.62)}})
        >>> sorted(text.get_text() for text in ax.texts)
        ['50%', '75%', 'dense bfloat16', 'dense float32', 'dense int8']
    """
    for line, points in {"dense": dense, "pruned": pruned, **(pruned if isinstance(pruned, Mapping) else {})}.items():
        if not isinstance(points, Mapping):
            raise TypeError(f"{line} is a {type(points).__name__}; give a mapping from labels to (milliseconds, quality)")
    lines = {"dense": {f"dense {label}": point for label, point in dense.items()}, **pruned}
    bad = [f"{line}, {label}: {point}" for line, points in lines.items() for label, point in points.items() if not _is_point(point)]
    if not dense or bad:
        raise ValueError(
            f"each point must be two finite numbers (milliseconds, quality), and dense must hold one or more; {bad or dict(dense)}"
        )
    ax = new_axes(ax, width=7.2)
    ax.axvline(min(milliseconds for milliseconds, _ in dense.values()), color="0.3", lw=0.8, ls=":")
    colours = ["0.25", *(COLOURS[i % len(COLOURS)] for i in range(len(pruned)))]
    ax.plot(*zip(*dense.values(), strict=True), color=colours[0], marker="X", ls="", ms=8, label="dense")
    for i, (line, points) in enumerate(pruned.items()):
        ax.plot(*zip(*points.values(), strict=True), color=colours[i + 1], marker=MARKERS[i % len(MARKERS)], ms=6, label=line)
    plain_frame(ax)
    ax.margins(0.12, 0.15)
    ax.set_xlim(left=0)
    ax.set(xlabel=latency, ylabel=quality)
    legend_beside(ax)
    set_title(ax, title)
    label_points(ax, list(lines.values()), colours)
    return ax


def _is_point(point: Any) -> bool:
    """Whether this is two finite numbers."""
    try:
        milliseconds, quality = point
        check_number("milliseconds", milliseconds)
        check_number("quality", quality)
    except (TypeError, ValueError):
        return False
    return True
