"""Evaluate every recipe at every sparsity: reached sparsity, time, and scores of the pruned model."""

import json
import math
import numbers
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor, nn

from blockprune.analysis.drawing import COLOURS, MARKERS, legend_beside, new_axes, percent_axis, plain_frame, set_title
from blockprune.core.arguments import check_function, check_model
from blockprune.core.masks import all_kept
from blockprune.core.masks import sparsity as sparsity_of
from blockprune.core.progress import progress_bar
from blockprune.core.table import Rows, Table
from blockprune.core.types import masks_and_weights
from blockprune.model.apply import apply_masks
from blockprune.model.copying import copy_model
from blockprune.model.mask_reading import parameter_masks
from blockprune.model.sharding import check_not_fully_sharded

Recipe = Callable[[nn.Module, float], Any]  # a recipe, a pipeline, or a function that returns masks or a result with .masks and .weights
Evaluate = Callable[[nn.Module], float | Tensor | Mapping[str, float | Tensor]]


@attrs.frozen
class SweepRow:
    """One recipe at one sparsity.

    Args:
        recipe: its name.
        sparsity: that the recipe was called with.
        reached: the fraction of the elements of masked parameters that is pruned.
        seconds: that the recipe took, without the evaluation.
        scores: of the pruned model, by name.

    Example:
        >>> row = bp.SweepRow("l1", 0.5, 0.4994, 0.01, {"accuracy": 0.97})
        >>> bp.SweepRow(**attrs.asdict(row)) == row        # plain values: a row can be written as JSON
        True
    """

    recipe: str
    sparsity: float
    reached: float
    seconds: float
    scores: Mapping[str, float]


@attrs.frozen(repr=False)
class Sweep(Table):
    """A table with one row for each recipe and sparsity; prints in a terminal, renders in a notebook, and draws itself.

    Args:
        rows: recipe after recipe, each at all sparsities, in the order of the call.
        dense: the scores of the model without its masks, by name.

    Example:
        >>> bp.Sweep((bp.SweepRow("l1", 0.5, 0.4994, 0.01, {"accuracy": 0.97}),), {"accuracy": 0.98})
        recipe   sparsity  reached  seconds  accuracy
        (dense)        0%     0.0%               0.98
        l1            50%    49.9%     0.01      0.97
    """

    rows: tuple[SweepRow, ...]
    dense: Mapping[str, float]

    def table(self) -> Rows:
        """Rows of cells; the first row is the header."""
        head = ("recipe", "sparsity", "reached", "seconds", *self.dense)
        dense = ("(dense)", "0%", "0.0%", "", *(f"{value:.5g}" for value in self.dense.values()))
        cells = [
            (
                row.recipe,
                f"{100 * row.sparsity:.4g}%",
                f"{row.reached:.1%}",
                f"{row.seconds:.2f}",
                *(f"{row.scores[name]:.5g}" for name in self.dense),
            )
            for row in self.rows
        ]
        return [head, dense, *cells]

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; an older file is replaced only once the new one is complete.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> table = bp.Sweep((bp.SweepRow("l1", 0.5, 0.4994, 0.01, {"accuracy": 0.97}),), {"accuracy": 0.98})
            >>> with TemporaryDirectory() as folder:
            ...     table.save(f"{folder}/sweep.json")
            ...     bp.Sweep.load(f"{folder}/sweep.json") == table
            True
        """
        unfinished = Path(f"{path}.unfinished")
        unfinished.write_text(json.dumps(attrs.asdict(self), indent=1))
        unfinished.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Sweep":
        """Read a table that `save` wrote."""
        values = json.loads(Path(path).read_text())
        return cls(tuple(SweepRow(**row) for row in values["rows"]), values["dense"])

    def plot(self, ax: Any = None, *, score: str | None = None) -> Any:
        """Draw a score against the reached sparsity, one line per recipe and a dashed line for the dense model (needs the extra ``plot``).

        Args:
            ax: the matplotlib axes to draw on; by default those of a new figure.
            score: which score; by default the first.

        Returns:
            The axes.

        Raises:
            KeyError: the table has no such score.

        Example:
            >>> table = bp.Sweep((bp.SweepRow("l1", 0.5, 0.4994, 0.01, {"accuracy": 0.97}),), {"accuracy": 0.98})
            >>> table.plot().get_ylabel()
            'accuracy'
        """
        score = next(iter(self.dense)) if score is None else score
        if score not in self.dense:
            raise KeyError(f"score={score!r} is not among the scores of this table, {list(self.dense)}; name one of them")
        ax = new_axes(ax, width=7.2)
        ax.axhline(self.dense[score], color="0.4", lw=1, ls="--", label="dense")
        for i, recipe in enumerate(dict.fromkeys(row.recipe for row in self.rows)):
            points = sorted((row.reached, row.scores[score]) for row in self.rows if row.recipe == recipe)
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            ax.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=5, label=recipe)
        values = [self.dense[score], *(row.scores[score] for row in self.rows)]
        if all(value > 0 and math.isfinite(value) for value in values) and max(values) > 30 * min(values):
            ax.set_yscale("log")
        ax.set(xlabel="sparsity", ylabel=score)
        percent_axis(ax.xaxis)
        plain_frame(ax)
        legend_beside(ax)
        set_title(ax, f"{score} against sparsity")
        return ax


def sweep(
    model: nn.Module,
    recipes: Mapping[str, Recipe],
    sparsities: Iterable[float],
    evaluate: Evaluate,
    *,
    resume: Sweep | None = None,
    callback: Callable[[Sweep], object] | None = None,
    progress: bool | None = None,
) -> Sweep:
    """Prune a copy of the model with every recipe to every sparsity, and evaluate it; the model is not changed.

    It is the loop ``for recipe: for sparsity: evaluate(pruned copy)``, with a table, a progress bar, and a way to go on after an
    interruption: save the table so far with ``callback=lambda table: table.save("sweep.json")``, and go on with
    ``resume=bp.Sweep.load("sweep.json")``. An error of a recipe or an evaluation is raised with a note of which row it is.

    Args:
        model: any module, masked or not; copies of it are pruned and evaluated in the mode, training or evaluation, that it is in. The
            first row of the table, (dense), is that of the model without its masks.
        recipes: by name: recipes, pipelines, or functions (model, sparsity) -> masks, or a result with ``.masks`` and ``.weights``.
        sparsities: numbers from 0 to 1, with which each recipe is called.
        evaluate: (model) -> a number, or several by name. It may change the model that it is called with, for example train it.
        resume: the table of an earlier call. Its rows are taken over where recipe and sparsity are the same; others are left out.
        callback: called with the table so far, first with the dense model's scores and then after each new row.
        progress: show a progress bar; by default in a terminal and in a notebook.

    Raises:
        ValueError: no recipes or sparsities, a sparsity outside [0, 1] or twice, an evaluation that returns different scores than before.
        TypeError: a model that is no module, a sparsity that is no number, a function that is none; a recipe returns neither masks nor a
            result, an evaluation no number.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(32, 8)
        >>> where, target = bp.linears((2, 2)), model(x).detach()
        >>> recipes = {"magnitude": bp.recipes.magnitude(where), "Wanda": bp.recipes.wanda(where, bp.Calibration([x]))}
        >>> table = bp.sweep(model, recipes, [0.25, 0.5], lambda m: {"error": (m(x) - target).square().mean()})
        >>> [(row.recipe, row.sparsity, row.reached) for row in table.rows]
        [('magnitude', 0.25, 0.25), ('magnitude', 0.5, 0.5), ('Wanda', 0.25, 0.25), ('Wanda', 0.5, 0.5)]
        >>> table.dense
        {'error': 0.0}
    """
    check_model(model)
    check_function("evaluate", evaluate, "(model) -> a number, or a mapping from names to numbers")
    check_function("callback", callback, "(Sweep) -> None, such as lambda table: table.save('sweep.json')", optional=True)
    if resume is not None and not isinstance(resume, Sweep):
        raise TypeError(f"resume has the type {type(resume).__name__}; give a Sweep, such as bp.Sweep.load('sweep.json')")
    sparsities = _checked_cells(recipes, sparsities)
    check_not_fully_sharded(model, "sweep prunes copies of the model")
    finished = {} if resume is None else {(row.recipe, row.sparsity): row for row in resume.rows}
    table = Sweep((), _dense_scores(model, evaluate) if resume is None else resume.dense)
    if callback is not None and resume is None:
        callback(table)
    cells = [(name, float(sparsity)) for name in recipes for sparsity in sparsities]
    for name, sparsity in progress_bar(cells, "sweep", progress):
        row = finished.get((name, sparsity))
        if row is None:
            try:
                row = _row(model, name, recipes[name], sparsity, evaluate=evaluate, dense=table.dense)
            except Exception as error:
                error.add_note(f"This happened in sweep, recipe {name!r} at sparsity {sparsity:g}, after {len(table.rows)} finished rows.")
                raise
        table = Sweep((*table.rows, row), table.dense)
        if callback is not None and (name, sparsity) not in finished:
            callback(table)
    return table


def _dense_scores(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """The scores of a copy whose masks keep all blocks; masks cannot be removed from a model in DistributedDataParallel."""
    dense = copy_model(model)
    return _as_scores(evaluate(apply_masks(dense, all_kept(parameter_masks(dense)))))


def _row(model: nn.Module, name: str, recipe: Recipe, sparsity: float, *, evaluate: Evaluate, dense: Mapping[str, float]) -> SweepRow:
    pruned = copy_model(model)  # a new one for each row: a recipe or an evaluation may change what it is called with
    start = time.perf_counter()
    masks, weights = masks_and_weights(recipe(pruned, sparsity), f"recipe {name!r}")
    seconds = time.perf_counter() - start
    scores = _as_scores(evaluate(apply_masks(pruned, masks, weights)))
    if scores.keys() != dense.keys():
        raise ValueError(f"evaluate returned the scores {list(scores)}, and {list(dense)} for the dense model; it must return the same")
    return SweepRow(name, sparsity, sparsity_of(masks), seconds, scores)


def _as_scores(value: float | Tensor | Mapping[str, float | Tensor]) -> dict[str, float]:
    named = value if isinstance(value, Mapping) else {"score": value}
    try:
        scores = {str(name): float(x.detach() if isinstance(x, Tensor) else x) for name, x in named.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"evaluate must return a number, or a mapping from names to numbers: {error}") from error
    if not scores:
        raise TypeError("evaluate returned an empty mapping; return at least one number")
    return scores


def _checked_cells(recipes: Mapping[str, Recipe], sparsities: Iterable[float]) -> list[float]:
    """The sparsities as a list, if these and the recipes are what they should be."""
    if not isinstance(recipes, Mapping) or not recipes or not all(map(callable, recipes.values())):
        raise ValueError('recipes must be a mapping from names to recipes, such as {"magnitude": bp.recipes.magnitude(where)}')
    values = list(sparsities) if isinstance(sparsities, Iterable) else None
    if values is None or not all(isinstance(s, (numbers.Real, Tensor)) and not isinstance(s, bool) for s in values):
        raise TypeError(
            f"sparsities={sparsities if values is None else values!r} must be a list of numbers from 0 to 1, such as [0.25, 0.5]; for "
            "sparsities by parameter, give a recipe that makes them of one number: lambda model, s: "
            "recipe(model, {'*.attn.*': s / 2, '*': s})"
        )
    bad = [s for s in values if not 0 <= s <= 1]
    if bad or not values or len(set(values)) != len(values):
        raise ValueError(f"sparsities={values} must hold one or more different fractions from 0 to 1, such as [0.25, 0.5]")
    return values
