"""What all pictures share: new axes, colours, short names, and tick labels that do not overlap."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from textwrap import fill
from typing import Any

import attrs
import numpy as np

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito's, for colour-blind readers too
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
TICK_POINTS = 7  # the font size of parameter names


def new_axes(ax: Any = None, *, width: float = 6.4, height: float = 4.4) -> Any:
    """The axes to draw on: ``ax``, or those of a new figure of this size in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    return ax if ax is not None else new_figure(width, height).add_subplot()


def new_figure(width: float, height: float) -> Any:
    """A figure whose layout keeps titles and labels inside, shown at the end of a notebook cell.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('pictures need matplotlib; install it with: pip install "blockprune[plot]"', name=error.name) from error
    return plt.figure(figsize=(width, height), layout="constrained", dpi=120)


def short_names(names: Sequence[str], *, longest: int = 32) -> list[str]:
    """Parameter names without the first parts and the ``.weight`` that all of them share; long ones are cut in the middle.

    Example:
        >>> from blockprune.analysis.drawing import short_names
        >>> short_names(["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"])
        ['0.mlp.up_proj', '1.mlp.up_proj']
        >>> short_names(["0.weight", "2.weight"])
        ['0.weight', '2.weight']
    """
    parts = [name.split(".") for name in names]
    spare = min(map(len, parts), default=1) - 2 if len(set(names)) > 1 else 0  # at least two parts of each name stay
    first = 0
    while first < spare and len({p[first] for p in parts}) == 1:
        first += 1
    short = [".".join(p[first:]) for p in parts]
    plain = [name.removesuffix(".weight") for name in short]
    if all(end != name and not end.isdigit() for end, name in zip(plain, short, strict=True)):
        short = plain
    half = (longest - 1) // 2
    cut = [name if len(name) <= longest else f"{name[:half]}…{name[-half:]}" for name in short]
    return cut if len(set(cut)) == len(set(short)) else short


def label_rows(ax: Any, names: Sequence[str]) -> None:
    """Name the rows 0, 1, 2 ... of the vertical axis; where there is not enough height for all, every second, third ... of them."""
    height = ax.get_window_extent().height / ax.figure.dpi * 72  # points
    step = max(1, -int(-len(names) * 1.25 * TICK_POINTS // height))
    rows = range(0, len(names), step)
    ax.set_yticks(rows, [names[row] for row in rows], fontsize=TICK_POINTS)


def plain_frame(ax: Any) -> None:
    """A light grid, and no lines above and on the right."""
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def percent_axis(axis: Any) -> None:
    """Show the fractions along an axis as percentages."""
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415 (an extra)

    axis.set_major_formatter(PercentFormatter(1, decimals=None))


def set_title(ax: Any, text: str) -> None:
    """A title that is wrapped to the width of the axes."""
    points = ax.get_window_extent().width / ax.figure.dpi * 72
    ax.set_title(fill(text, max(16, int(points / 5.5))), fontsize=10)


def legend_beside(ax: Any) -> None:
    """The legend on the right of the axes, where it covers nothing; long entries are wrapped."""
    handles, labels = ax.get_legend_handles_labels()
    wrapped = [fill(label, 22) for label in labels]
    ax.legend(handles, wrapped, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)


def label_points(ax: Any, lines: Sequence[Mapping[str, tuple[float, float]]], colours: Sequence[str]) -> None:
    """Write a label beside each point, inside the axes, where it covers no other label, no point and, if possible, no line.

    Args:
        ax: the axes, on which everything else has been drawn.
        lines: for each line, its points by label.
        colours: of the labels of each line.
    """
    ax.figure.draw_without_rendering()  # the layout is settled, so positions on the page are final
    frame = ax.get_window_extent()
    pixels = [ax.transData.transform(list(line.values())) for line in lines]
    points = [Bounds(x - 6, y - 6, x + 6, y + 6) for line in pixels for x, y in line]
    between = [
        Bounds(x - 1, y - 1, x + 1, y + 1)
        for line in pixels
        for start, end in pairwise(line)
        for x, y in start + (end - start) * np.linspace(0, 1, 100)[:, None]
    ]
    named = [(label, point, colour) for line, colour in zip(lines, colours, strict=True) for label, point in line.items()]
    for label, point, colour in sorted(named, key=lambda item: -len(item[0])):  # the longest first, while there is much space
        text = ax.annotate(label, point, xytext=(0, 0), textcoords="offset points", fontsize=8, color=colour)
        places = [(taken, offset) for taken in (points + between, points) for offset in OFFSETS]
        free = (offset for taken, offset in places if _is_free(_box_at(text, offset), taken, frame))
        offset = next(free, OFFSETS[0])
        points.append(_box_at(text, offset))
        if max(map(abs, offset)) > 14:  # far from its point: a thin line joins them
            line = {"arrowstyle": "-", "lw": 0.6, "color": colour, "shrinkA": 0, "shrinkB": 4}
            ax.annotate("", point, xytext=offset, textcoords="offset points", arrowprops=line)


OFFSETS = [  # from a point to its label, in points of 1/72 inch: above, below, right, left, and farther away
    (x * distance, y * distance)
    for distance in (8, 14, 22, 32, 44, 58)
    for x, y in ((0, 1), (0, -1), (1, 0), (-1, 0), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))
]


@attrs.frozen
class Bounds:
    """A rectangle on the page, in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "Bounds") -> bool:
        return self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top


def _box_at(text: Any, offset: tuple[float, float]) -> Bounds:
    """Move a label to an offset from its point; where it is on the page then."""
    x, y = offset
    horizontal = "left" if x > 0 else "right" if x < 0 else "center"
    vertical = "bottom" if y > 0 else "top" if y < 0 else "center"
    text.set(position=offset, ha=horizontal, va=vertical)
    return Bounds(*text.get_window_extent().extents)


def _is_free(box: Bounds, taken: Sequence[Bounds], frame: Any) -> bool:
    inside = frame.x0 <= box.left and box.right <= frame.x1 and frame.y0 <= box.bottom and box.top <= frame.y1
    return inside and not any(box.overlaps(other) for other in taken)


def engineering(value: float) -> str:
    """A number with a letter for thousands, millions and so on.

    Example:
        >>> from blockprune.analysis.drawing import engineering
        >>> engineering(134515008), engineering(0)
        ('134.5 M', '0')
    """
    from matplotlib.ticker import EngFormatter  # noqa: PLC0415 (an extra)

    return EngFormatter(places=None if abs(value) < 1000 else 1)(value)
