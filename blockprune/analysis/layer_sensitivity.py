"""The loss against the sparsity of each layer, without changing the model."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from blockprune.analysis.drawing import label_rows, new_axes, set_title, short_names
from blockprune.core.pipeline import Pipeline
from blockprune.core.progress import progress_bar
from blockprune.core.table import Rows, Table
from blockprune.model.apply import functional_parameters
from blockprune.model.sharding import is_fully_sharded, replaced_shards

Evaluate = Callable[[Callable[..., Any]], float | Tensor]  # (model) -> the loss, or another number that is lower for better models


@attrs.frozen(repr=False)
class Sensitivity(Table):
    """A table of losses, one row per parameter and one column per sparsity; prints in a terminal, renders in a notebook.

    Args:
        sparsities: of the parameter that is pruned, the others stay dense.
        dense: the loss of the dense model.
        losses: by parameter, the loss at each of the sparsities.

    Example:
        >>> bp.Sensitivity((0.5,), 1.0, {"fc.weight": (1.25,)})
        parameter    50%
        (dense)    1.000
        fc.weight  1.250
    """

    sparsities: tuple[float, ...]
    dense: float
    losses: Mapping[str, tuple[float, ...]]

    def table(self) -> Rows:
        """Rows of cells; the first row is the header."""
        head = ("parameter", *(f"{s:.0%}" for s in self.sparsities))
        dense = ("(dense)", *(f"{self.dense:.3f}" for _ in self.sparsities))
        return [head, dense, *((name, *(f"{loss:.3f}" for loss in losses)) for name, losses in self.losses.items())]

    def plot(self, ax: Any = None, *, most: int = 40) -> Any:
        """Draw the increase of the loss as a heat map, one row per parameter and one column per sparsity (needs the extra ``plot``).

        Args:
            ax: the matplotlib axes to draw on; by default those of a new figure.
            most: the largest number of parameters to draw; those with the largest increases are chosen, and drawn in the model's order.

        Returns:
            The axes.

        Example:
            >>> table = bp.Sensitivity((0.25, 0.5), 1.0, {"a.weight": (1.5, 2.0), "b.weight": (1.0, 1.25)})
            >>> [label.get_text() for label in table.plot().get_yticklabels()]
            ['a', 'b']
        """
        rises = {name: [loss - self.dense for loss in losses] for name, losses in self.losses.items()}
        largest = set(sorted(rises, key=lambda name: max(rises[name]), reverse=True)[:most])
        names = [name for name in rises if name in largest]
        ax = new_axes(ax, width=3.6 + 0.55 * len(self.sparsities), height=max(2.4, 1.5 + 0.17 * len(names)))
        top = max([rise for name in names for rise in rises[name] if math.isfinite(rise)], default=0.0)
        norm = {"norm": "log", "vmin": top / 1e3, "vmax": top} if top > 0 else {"vmin": 0, "vmax": 1}
        image = ax.imshow([[max(rise, top / 1e3) for rise in rises[name]] for name in names], aspect="auto", cmap="viridis", **norm)
        ax.set_xticks(range(len(self.sparsities)), [f"{s:.0%}" for s in self.sparsities])
        label_rows(ax, short_names(names))
        ax.set_xlabel("sparsity of this parameter")
        ax.figure.colorbar(image, ax=ax, label=f"loss above dense ({self.dense:.4g})")
        shown = "" if len(names) == len(rises) else f" ({len(names)} most sensitive of {len(rises)})"
        set_title(ax, f"One parameter pruned at a time{shown}")
        return ax


def sensitivity(
    model: nn.Module,
    pipeline: Pipeline,
    sparsities: Sequence[float],
    evaluate: Evaluate,
    *,
    chunk_size: int = 8,
    progress: bool | None = None,
) -> Sensitivity:
    """The loss when a single parameter is pruned to each sparsity and all others stay dense; the model is not changed.

    The sparsities of a parameter are evaluated together, by `torch.func.vmap` over its stacked masks, so the layers before it are computed
    once. Where the model or ``evaluate`` does not allow that (``.item()``, control flow on values), they are evaluated one after the other,
    and a warning says so.

    Args:
        model: any module; it is run in the mode that it is in, so put it in evaluation mode.
        pipeline: its scores are computed once and allocated at every sparsity.
        sparsities: fractions of the parameter to remove.
        evaluate: (model) -> loss, as a tensor rather than a float; it is called with a function in the model's place.
        chunk_size: sparsities at a time under vmap; 1 evaluates them one after the other.
        progress: show a progress bar; by default in a terminal and in a notebook.

    Raises:
        TypeError: a recipe in place of a pipeline.
        ValueError: chunk_size below 1, no sparsities, and what the pipeline raises.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(16, 4)
        >>> prune = bp.Pipeline(partial(bp.collect.weights, where=bp.linears((2, 2))), bp.metric.l1, bp.allocate.per_layer)
        >>> target = model(x).detach()
        >>> table = bp.sensitivity(model, prune, [0.0, 0.5, 1.0], lambda m: (m(x) - target).square().mean())
        >>> [round(losses[0], 6) for losses in table.losses.values()]
        [0.0, 0.0]
    """
    if not isinstance(pipeline, Pipeline):
        raise TypeError(
            f"pipeline is a {type(pipeline).__name__}, not a bp.Pipeline; for a recipe that prunes in one shot (magnitude, structured, "
            "wanda), give recipe.pipeline; for others, build a bp.Pipeline whose collect has a calibration"
        )
    if chunk_size < 1 or not sparsities:
        raise ValueError(f"chunk_size={chunk_size} must be 1 or more, and sparsities={list(sparsities)} must hold at least one sparsity")
    scores = pipeline.scores(model)
    masks = [pipeline.allocate(scores, sparsity) for sparsity in sparsities]
    is_sharded = any(map(is_fully_sharded, model.modules()))  # the masked weights are written into the shards
    use_vmap = chunk_size > 1 and len(sparsities) > 1 and not is_sharded
    losses: dict[str, tuple[float, ...]] = {}

    def loss_with(parameters: dict[str, Tensor]) -> Tensor:
        with replaced_shards(model, parameters) as others:
            return torch.as_tensor(evaluate(lambda *args, **kwargs: functional_call(model, others, args, kwargs, tie_weights=False)))

    with torch.no_grad():
        dense = float(evaluate(model))
        for name in progress_bar(scores, "sensitivity", progress):
            masked = [functional_parameters(model, {name: masks_at_sparsity[name]}) for masks_at_sparsity in masks]
            if use_vmap:
                try:
                    losses[name] = _vmapped(loss_with, masked, chunk_size)
                    continue
                except (RuntimeError, ValueError, TypeError) as error:  # a model's own code may do anything with batched tensors
                    use_vmap = False
                    reason = str(error).strip().splitlines()[0]
                    warnings.warn(
                        f"sensitivity runs its sparsities one at a time: vmap cannot run the model or evaluate ({reason}); if evaluate "
                        "calls .item() or float(), return the loss as a tensor instead",
                        stacklevel=2,
                    )
            losses[name] = tuple(loss_with(parameters).item() for parameters in masked)
    return Sensitivity(tuple(sparsities), dense, losses)


def _vmapped(loss: Callable[[dict[str, Tensor]], Tensor], parameters: Sequence[dict[str, Tensor]], chunk_size: int) -> tuple[float, ...]:
    """The loss for each of several replacements of the same parameters."""
    stacked = {key: torch.stack([values[key] for values in parameters]) for key in parameters[0]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # an operation without a batching rule
        return tuple(vmap(loss, randomness="same", chunk_size=chunk_size)(stacked).tolist())
