"""The loss against the sparsity of each layer, without changing the model."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from blockprune.analysis.drawing import label_rows, new_axes, set_title, short_names
from blockprune.core.arguments import check_counts, check_fraction, check_function
from blockprune.core.masks import all_kept
from blockprune.core.pipeline import Pipeline, allocated, as_code
from blockprune.core.progress import progress_bar
from blockprune.core.table import Rows, Table
from blockprune.core.types import BlockMask, Scores
from blockprune.model.apply import functional_parameters
from blockprune.model.mask_reading import parameter_masks
from blockprune.model.parameters import find_parameters
from blockprune.model.running import buffers_as_now, weights_written_by_forward
from blockprune.model.sharding import is_fully_sharded, replaced_shards

V = TypeVar("V")
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

        Raises:
            ValueError: ``most`` that is no integer from 1 on.

        Example:
            >>> table = bp.Sensitivity((0.25, 0.5), 1.0, {"a.weight": (1.5, 2.0), "b.weight": (1.0, 1.25)})
            >>> [label.get_text() for label in table.plot().get_yticklabels()]
            ['a', 'b']
        """
        (most,) = check_counts(1, most=most)
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

    Each parameter is allocated alone, so that it is at the column's sparsity, or the closest that its blocks allow, also where
    `allocate.per_model` or a budget would prune it more or less than others. A masked model is evaluated without its masks, but the
    pipeline collects from it as it is.

    The sparsities of a parameter are evaluated together, by `torch.func.vmap` over its stacked masks, so the layers before it are computed
    once. Where the model or ``evaluate`` does not allow that (``.item()``, control flow on values), they are evaluated one after the other,
    and a warning says so.

    Args:
        model: any module; it is run in the mode that it is in, so put it in evaluation mode. Each evaluation begins with the same buffers.
        pipeline: its scores are computed once and allocated at every sparsity.
        sparsities: fractions of the parameter to remove.
        evaluate: (model) -> loss, one number, as a tensor rather than a float; it is called with a function in the model's place, which
            has no attributes of the model, such as ``eval()``. `sweep` gives it a copy of the model.
        chunk_size: sparsities at a time under vmap; 1 evaluates them one after the other.
        progress: show a progress bar; by default in a terminal and in a notebook.

    Raises:
        TypeError: a recipe in place of a pipeline, sparsities that are no list of numbers, a loss that is not one number.
        ValueError: chunk_size below 1, no sparsities, an allocator that needs other parameters too (a set of ``coupled``), a weight that
            another parametrization computes, such as weight_norm; and what the pipeline raises.

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
    if isinstance(sparsities, (str, Mapping)) or not isinstance(sparsities, Iterable):
        raise TypeError(f"sparsities={sparsities!r} must be a list of numbers, such as [0.25, 0.5]")
    sparsities = list(sparsities)
    (chunk_size,) = check_counts(1, chunk_size=chunk_size)
    check_function("evaluate", evaluate, "(model) -> one number, the loss")
    if not sparsities:
        raise ValueError("sparsities=[] must hold at least one sparsity")
    sparsities = [check_fraction(f"sparsities[{position}]", sparsity) for position, sparsity in enumerate(sparsities)]
    scores = pipeline.scores(model)
    _check_replaceable(model, scores)
    masks = {name: [_allocated_alone(pipeline, scores, name, sparsity) for sparsity in sparsities] for name in scores}
    unmasked = functional_parameters(model, all_kept(parameter_masks(model)))
    put_back = buffers_as_now(model, weights_written_by_forward(model))
    is_sharded = any(map(is_fully_sharded, model.modules()))  # the masked weights are written into the shards
    use_vmap = chunk_size > 1 and len(sparsities) > 1 and not is_sharded
    losses: dict[str, tuple[float, ...]] = {}

    def loss_with(parameters: dict[str, Tensor]) -> Tensor:
        with replaced_shards(model, {**unmasked, **parameters}) as others:
            return _as_number(evaluate(_Replaced(model, others)))

    def loss_of(parameters: dict[str, Tensor]) -> float:
        return loss_with(parameters).item()

    def measured(losses: Callable[[], V]) -> V:
        try:
            return losses()
        finally:
            put_back()

    with torch.no_grad():
        dense = measured(partial(loss_of, {}))
        for name in progress_bar(scores, "sensitivity", progress):
            masked = [functional_parameters(model, {name: mask}) for mask in masks[name]]
            if use_vmap:
                try:
                    chunks = [masked[start : start + chunk_size] for start in range(0, len(masked), chunk_size)]
                    losses[name] = tuple(loss for chunk in chunks for loss in measured(partial(_vmapped, loss_with, chunk)))
                    continue
                except (RuntimeError, ValueError, TypeError) as error:  # a model's own code may do anything with batched tensors
                    use_vmap = False
                    reason = str(error).strip().splitlines()[0]
                    warnings.warn(
                        f"sensitivity runs its sparsities one at a time: vmap cannot run the model or evaluate ({reason}); if evaluate "
                        "calls .item() or float(), return the loss as a tensor instead",
                        stacklevel=2,
                    )
            losses[name] = tuple(measured(partial(loss_of, parameters)) for parameters in masked)
    return Sensitivity(tuple(sparsities), dense, losses)


class _Replaced:
    """What stands in the model's place: a function that runs it with other parameters."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self._model, self._parameters = model, parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._model, dict(self._parameters), args, kwargs, tie_weights=False)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"evaluate asks for model.{name}, but sensitivity calls it with a function in the model's place, which can only be called, "
            "model(x): put the model in evaluation mode before the call, or evaluate with bp.sweep, which gives copies of the model",
            name=name,
            obj=self,
        )


def _allocated_alone(pipeline: Pipeline, scores: Scores, name: str, sparsity: float) -> BlockMask:
    """The mask of a parameter at this sparsity, whatever the others lose.

    Raises:
        ValueError: the allocator cannot prune it without the others.
    """
    try:
        return allocated(pipeline.allocate, {name: scores[name]}, sparsity)[name]
    except (KeyError, ValueError) as error:
        allocated(pipeline.allocate, scores, sparsity)  # an error of all parameters together says more
        raise ValueError(
            f"{name} {scores[name].grid.shape}: allocate={as_code(pipeline.allocate)} cannot prune this parameter alone to "
            f"{sparsity:g}, as `sensitivity` does ({error}); give attrs.evolve(pipeline, allocate=bp.allocate.per_layer)"
        ) from None


def _check_replaceable(model: nn.Module, scores: Scores) -> None:
    """Raise for a weight that `functional_call` cannot replace."""
    for name, (ref, *_) in find_parameters(model, scores, what="scores").items():
        if not ref.is_plain and (ref.mask is None or ref.mask.grid != scores[name].grid):
            raise ValueError(
                f"{name} {ref.shape}: another parametrization, such as weight_norm, computes this weight, so `sensitivity` cannot replace "
                "it; remove the parametrization, or leave the weight out with `excluding`"
            )


def _as_number(loss: Any) -> Tensor:
    """The loss as a tensor without axes."""
    try:
        number = torch.as_tensor(loss, device=loss.device if isinstance(loss, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError):  # such as a dict, or None
        number = torch.empty(0, device="cpu")
    if number.numel() != 1:
        kind = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"evaluate returned a {kind}; it must return one number, the loss, such as the mean of the losses")
    if number.is_complex():
        raise TypeError(f"evaluate returned a number of {number.dtype}; it must return one real number, such as its .abs()")
    return number.reshape(())


def _vmapped(loss: Callable[[dict[str, Tensor]], Tensor], parameters: Sequence[dict[str, Tensor]]) -> list[float]:
    """The loss for each of several replacements of the same parameters."""
    stacked = {key: torch.stack([values[key] for values in parameters]) for key in parameters[0]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # an operation without a batching rule
        return cast(list[float], vmap(loss, randomness="same")(stacked).tolist())
