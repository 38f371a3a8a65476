"""The whole trade of error against sparsity and cost, from one ranking of the model's blocks."""

import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from blockprune.distribute import priced
from blockprune.tables import Rows, Table
from blockprune.types import Scores


@attrs.frozen(repr=False)
class Pareto(Table):
    """A curve from dense to empty, one point a sparsity; prints in a terminal, renders in a notebook.

    Example:
        >>> from blockprune.pareto import Pareto
        >>> curve = Pareto((0.0, 0.5, 1.0), (16.0, 8.0, 0.0), (0.0, 1.5, 9.0))
        >>> curve
        sparsity  kept cost  predicted error
        0.0%             16                0
        50.0%             8              1.5
        100.0%            0                9
        >>> curve.at(error=2.0), curve.at(cost=7.0)
        (0.5, 1.0)
    """

    sparsities: tuple[float, ...]  # of elements, ascending
    costs: tuple[float, ...]  # of what is kept
    errors: tuple[float, ...]  # the sum over what has fallen

    def at(self, *, error: float | None = None, cost: float | None = None) -> float:
        """The largest sparsity whose predicted error is at most ``error``, or the smallest whose kept cost is at most ``cost``.

        It is one of the points: what is there was ranked, not interpolated; more ``points`` make it finer.

        Raises:
            ValueError: neither or both are given, or no point is as low as that.

        Example:
            >>> from blockprune.pareto import Pareto
            >>> Pareto((0.0, 0.5, 1.0), (16.0, 8.0, 0.0), (0.0, 1.5, 9.0)).at(error=1.5)
            0.5
        """
        if (error is None) == (cost is None):
            raise ValueError(f"at(error={error}, cost={cost}) needs one of the two")
        what, limit, values = ("cost", cost, self.costs) if error is None else ("error", error, self.errors)
        found = [s for s, value in zip(self.sparsities, values, strict=True) if value <= limit]  # type: ignore[operator]
        if not found:
            raise ValueError(f"at({what}={limit}): no point is as low; the lowest {what} of the curve is {min(values):.4g}")
        return max(found) if what == "error" else min(found)

    def table(self) -> Rows:
        """The cells, the head first: a dozen points, evenly spaced."""
        last, shown = len(self.sparsities) - 1, min(12, len(self.sparsities))
        points = [round(i * last / max(1, shown - 1)) for i in range(shown)]
        body = [(f"{self.sparsities[i]:.1%}", f"{self.costs[i]:.4g}", f"{self.errors[i]:.4g}") for i in points]
        return [("sparsity", "kept cost", "predicted error"), *body]

    def plot(self, axis: Any = None) -> Any:
        """The predicted error against the kept cost, on a matplotlib axis (extra ``plot``), which is returned."""
        import matplotlib.pyplot as plt  # noqa: PLC0415 (an extra)

        axis = axis or plt.subplots(layout="constrained")[1]
        axis.plot(self.costs, self.errors, marker=".")
        axis.set(xlabel="kept cost", ylabel="predicted error")
        return axis


def pareto(scores: Scores, *, cost: Mapping[str, float] | None = None, points: int = 50) -> Pareto:
    """The predicted error at every sparsity, from the scores alone: blocks fall in the order of error per cost over the whole model.

    The predicted error is the sum of score times elements over what has fallen, so it is what dropping the blocks adds to the error
    where scores are such increments (`metric.obs`). A point's blocks are those of `allocate.global_` at that sparsity, unclamped
    (``max_sparsity=1, min_keep=0``); with a cost, those of `distribute.lagrangian` with the same cost at that share of the cost,
    ``relative=False`` and ``max_sparsity=1``. Blocks pruned already (-inf) cost and err nothing: the curve begins without them.

    Args:
        scores: error per element, comparable between parameters.
        cost: what one element costs, by parameter name or pattern, as in `lagrangian`; 1 by default.
        points: of the curve, evenly spaced in elements, each at the first block that gets there; a model of few blocks has fewer.

    Raises:
        ValueError: fewer than 2 points, no scores, NaN scores, a cost that is not positive.
        KeyError: a key that fits no parameter, a parameter without a cost.

    Example:
        >>> from blockprune.pareto import pareto
        >>> grid = bp.BlockGrid((4,), (1,))
        >>> low, high = bp.BlockScore(torch.tensor([1.0, 2.0, 3.0, 4.0]), grid), bp.BlockScore(torch.tensor([5.0, 6.0, 7.0, 8.0]), grid)
        >>> pareto({"low": low, "high": high}, points=3)
        sparsity  kept cost  predicted error
        0.0%              8                0
        50.0%             4               10
        100.0%            0               36
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ValueError(f"points={points!r} must be a whole number, at least 2: the two ends of the curve")
    if not scores:
        raise ValueError("pareto has no scores to rank; collect at least one parameter")
    rank, elements, price = priced(scores, cost=cost)
    order = rank.argsort(stable=True)
    error = (rank * price).masked_fill(rank == -math.inf, 0)[order]
    fallen, paid, error = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (elements[order], price[order], error))  # [blocks + 1]
    begin = int((rank == -math.inf).sum())  # blocks
    aims = torch.linspace(int(fallen[begin]), int(fallen[-1]), points, dtype=torch.float64, device=fallen.device)
    at = torch.searchsorted(fallen.double(), aims).clamp(begin, len(order)).unique()

    def curve(x: Tensor) -> tuple[float, ...]:
        return tuple(x[at].tolist())

    return Pareto(curve(fallen.double() / int(fallen[-1])), curve(paid[-1] - paid), curve(error))
