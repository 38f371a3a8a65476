"""The predicted error against sparsity and cost, from one ranking of all blocks of a model."""

import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from blockprune.allocate.budgets import block_costs
from blockprune.analysis.drawing import COLOURS, engineering, new_axes, percent_axis, plain_frame, set_title
from blockprune.core.arguments import check_counts, check_number
from blockprune.core.table import Rows, Table
from blockprune.core.types import Scores


@attrs.frozen(repr=False)
class Pareto(Table):
    """The predicted error and the kept cost at each sparsity, from the dense to the empty model.

    It prints in a terminal and renders in a notebook.

    Args:
        sparsities: the fraction of the elements that is pruned, ascending.
        costs: the cost of the kept blocks at each sparsity.
        errors: the predicted error at each sparsity, the sum over the pruned blocks.
        unit: of the costs.

    Example:
        >>> from blockprune.analysis.pareto_curve import Pareto
        >>> curve = Pareto((0.0, 0.5, 1.0), (16.0, 8.0, 0.0), (0.0, 1.5, 9.0))
        >>> curve
        sparsity  kept weights  predicted error
        0.0%             16                0
        50.0%             8              1.5
        100.0%            0                9
        >>> curve.sparsity_for(error=2.0), curve.sparsity_for(cost=7.0)
        (0.5, 1.0)
    """

    sparsities: tuple[float, ...]
    costs: tuple[float, ...]
    errors: tuple[float, ...]
    unit: str = "weights"

    def sparsity_for(self, *, error: float | None = None, cost: float | None = None) -> float:
        """The largest sparsity whose predicted error is at most ``error``, or the smallest whose kept cost is at most ``cost``.

        The result is one of the curve's points; more ``points`` make the curve finer.

        Raises:
            ValueError: neither or both are given, or no point is as low as that.
            TypeError: no number.

        Example:
            >>> from blockprune.analysis.pareto_curve import Pareto
            >>> Pareto((0.0, 0.5, 1.0), (16.0, 8.0, 0.0), (0.0, 1.5, 9.0)).sparsity_for(error=1.5)
            0.5
        """
        if (error is None) == (cost is None):
            raise ValueError(f"sparsity_for(error={error}, cost={cost}) needs exactly one of error= and cost=")
        for name, number in {"error": error, "cost": cost}.items():
            if number is not None:
                check_number(name, number, finite=False)
        what, limit, values = ("cost", cost, self.costs) if error is None else ("error", error, self.errors)
        fitting = [s for s, value in zip(self.sparsities, values, strict=True) if value <= limit]  # type: ignore[operator]
        if not fitting:
            raise ValueError(f"sparsity_for({what}={limit}): no point is as low; the lowest {what} of the curve is {min(values):.4g}")
        return max(fitting) if what == "error" else min(fitting)

    def table(self) -> Rows:
        """Rows of cells, the first of which is the header: a dozen evenly spaced points."""
        last, shown = len(self.sparsities) - 1, min(12, len(self.sparsities))
        points = [round(i * last / max(1, shown - 1)) for i in range(shown)]
        body = [(f"{self.sparsities[i]:.1%}", f"{self.costs[i]:.4g}", f"{self.errors[i]:.4g}") for i in points]
        return [("sparsity", f"kept {self.unit}", "predicted error"), *body]

    def plot(self, ax: Any = None) -> Any:
        """Draw the predicted error against the sparsity, with the kept cost above (needs the extra ``plot``).

        Args:
            ax: the matplotlib axes to draw on; by default those of a new figure.

        Returns:
            The axes.

        Example:
            >>> from blockprune.analysis.pareto_curve import Pareto
            >>> Pareto((0.0, 0.5, 1.0), (16.0, 8.0, 0.0), (0.0, 1.5, 9.0), unit="microseconds").plot().get_xlabel()
            'sparsity'
        """
        ax = new_axes(ax)
        ax.plot(self.sparsities, self.errors, marker=".", color=COLOURS[0])
        positive = [error for error in self.errors if error > 0]
        if positive and min(self.errors) >= 0 and max(positive) > 100 * min(positive):
            ax.set_yscale("log")
        ax.set(xlabel="sparsity", ylabel="predicted error (sum over pruned blocks)")
        percent_axis(ax.xaxis)
        plain_frame(ax)
        kept = ax.twiny()  # the same points, labelled by their cost
        last = len(self.sparsities) - 1
        ticks = sorted({round(i * last / 4) for i in range(5)})
        kept.set_xlim(ax.get_xlim())
        kept.set_xticks([self.sparsities[i] for i in ticks], [engineering(self.costs[i]) for i in ticks])
        kept.set_xlabel(f"kept {self.unit}")
        kept.spines[["left", "right", "bottom"]].set_visible(False)
        set_title(ax, "Predicted error of one ranking of all blocks")
        return ax


def pareto(scores: Scores, *, cost: Mapping[str, float] | None = None, points: int = 50, unit: str | None = None) -> Pareto:
    """The predicted error at every sparsity, from scores alone: all blocks of the model are pruned in the order of their error per cost.

    The predicted error is the sum of score times elements over the pruned blocks. That is the error that pruning them adds if scores are
    such increments (`metric.obs`). The blocks of a point are those that `allocate.per_model` prunes at that sparsity without limits
    (``max_sparsity=1, min_keep=0``); with a cost, those of `budgets.lagrangian` with the same cost at that share of the cost,
    ``relative=False`` and ``max_sparsity=1``. Blocks that are pruned already (-inf) add no cost and no error;
    the curve begins without them.

    Args:
        scores: error per element, comparable between parameters.
        cost: what one element costs, by parameter name or pattern, as in `budgets.lagrangian`; 1 by default.
        unit: what the costs are counted in, for the table and the picture; by default weights, or "cost" where ``cost`` is given.
        points: points of the curve, evenly spaced in elements; a model with fewer blocks has fewer points.

    Raises:
        ValueError: fewer than 2 points, no scores, NaN scores, a cost that is not positive.
        KeyError: a key that matches no parameter, a parameter without a cost.

    Example:
        >>> from blockprune.analysis.pareto_curve import pareto
        >>> grid = bp.BlockGrid((4,), (1,))
        >>> low, high = bp.BlockScore(torch.tensor([1.0, 2.0, 3.0, 4.0]), grid), bp.BlockScore(torch.tensor([5.0, 6.0, 7.0, 8.0]), grid)
        >>> pareto({"low": low, "high": high}, points=3)
        sparsity  kept weights  predicted error
        0.0%              8                0
        50.0%             4               10
        100.0%            0               36
    """
    (points,) = check_counts(2, meaning="a whole number of 2 or more: the two ends of the curve", points=points)
    if not scores:
        raise ValueError("pareto has no scores to rank; collect at least one parameter")
    error_per_cost, elements, costs = block_costs(scores, cost=cost)
    order = error_per_cost.argsort(stable=True)
    errors = (error_per_cost * costs).masked_fill(error_per_cost == -math.inf, 0)
    pruned_elements, pruned_cost, error = (_running_sum(x[order]) for x in (elements, costs, errors))  # [blocks + 1] each
    first = int((error_per_cost == -math.inf).sum())  # blocks that are pruned already
    wanted = torch.linspace(
        int(pruned_elements[first]), int(pruned_elements[-1]), points, dtype=torch.float64, device=pruned_elements.device
    )
    index = torch.searchsorted(pruned_elements.double(), wanted).clamp(first, len(order)).unique()
    curves = pruned_elements.double() / int(pruned_elements[-1]), pruned_cost[-1] - pruned_cost, error
    sparsities, kept, summed = (tuple(curve[index].tolist()) for curve in curves)
    return Pareto(sparsities, kept, summed, unit or ("weights" if cost is None else "cost"))


def _running_sum(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.cumsum(0)])
