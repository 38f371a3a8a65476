"""Each layer's loss against sparsity, alone, without touching the model."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from tqdm import tqdm

from blockprune.apply import masked_parameters
from blockprune.pipeline import Pipeline
from blockprune.tables import Rows, Table

Evaluate = Callable[[Callable[..., Any]], float | Tensor]  # (model) -> the loss, or any number that is lower when better


@attrs.frozen(repr=False)
class Sensitivity(Table):
    """A table of losses, one row a parameter, one column a sparsity; prints in a terminal, renders in a notebook.

    Example:
        >>> bp.Sensitivity((0.5,), 1.0, {"fc.weight": (1.25,)})
        parameter    50%
        (dense)    1.000
        fc.weight  1.250
    """

    sparsities: tuple[float, ...]
    dense: float
    losses: Mapping[str, tuple[float, ...]]  # by parameter, one a sparsity

    def table(self) -> Rows:
        """The cells, the head first."""
        head = ("parameter", *(f"{s:.0%}" for s in self.sparsities))
        dense = ("(dense)", *(f"{self.dense:.3f}" for _ in self.sparsities))
        return [head, dense, *((name, *(f"{loss:.3f}" for loss in losses)) for name, losses in self.losses.items())]

    def plot(self, axis: Any = None) -> Any:
        """A heat map of the loss above dense, on a matplotlib axis (extra ``plot``), which is returned."""
        import matplotlib.pyplot as plt  # noqa: PLC0415 (an extra)

        axis = axis or plt.subplots(figsize=(2 + 0.6 * len(self.sparsities), 1 + 0.22 * len(self.losses)), layout="constrained")[1]
        rise = torch.tensor(list(self.losses.values())) - self.dense
        image = axis.imshow(rise.clamp_min(1e-4).log10().tolist(), aspect="auto", cmap="viridis")
        axis.set_xticks(range(len(self.sparsities)), [f"{s:.0%}" for s in self.sparsities])
        axis.set_yticks(range(len(self.losses)), list(self.losses), fontsize=7)
        axis.set(xlabel="sparsity of this parameter alone", title="log10 of the loss above dense")
        axis.figure.colorbar(image, ax=axis)
        return axis


def sensitivity(
    model: nn.Module, pipeline: Pipeline, sparsities: Sequence[float], evaluate: Evaluate, *, chunk: int = 8, progress: bool = True
) -> Sensitivity:
    """The loss when one parameter alone is pruned to each sparsity, all others dense, by `functional_call`; the model is not touched.

    The sparsities of a parameter run together, by `vmap` over its stacked masks, so what comes before it runs once. Where the model or
    ``evaluate`` does not allow that (``.item()``, control flow on values) they run one at a time, and a warning says so.

    Args:
        model: any module; run as it is, so put it in evaluation mode.
        pipeline: its scores are computed once and allocated at every sparsity.
        sparsities: to try.
        evaluate: (model) -> loss, a tensor rather than a float; it is given a callable in the model's place.
        chunk: sparsities at a time under vmap; 1 runs them one at a time.
        progress: show a bar on a terminal.

    Raises:
        ValueError: chunk below 1, no sparsities, and what the pipeline raises.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(16, 4)
        >>> prune = bp.Pipeline(partial(bp.collect.weights, where=bp.linears((2, 2))), bp.metric.l1, bp.allocate.per_layer)
        >>> target = model(x).detach()
        >>> table = bp.sensitivity(model, prune, [0.0, 0.5, 1.0], lambda m: (m(x) - target).square().mean())
        >>> [round(losses[0], 6) for losses in table.losses.values()]
        [0.0, 0.0]
    """
    if chunk < 1 or not sparsities:
        raise ValueError(f"chunk={chunk} and sparsities={list(sparsities)}: give chunk of at least 1 and at least one sparsity")
    scores = pipeline.scores(model)
    masks = [pipeline.allocate(scores, sparsity) for sparsity in sparsities]
    together = chunk > 1 and len(sparsities) > 1
    losses: dict[str, tuple[float, ...]] = {}

    def loss_with(parameters: dict[str, Tensor]) -> Tensor:
        return torch.as_tensor(evaluate(lambda *args, **kwargs: functional_call(model, parameters, args, kwargs)))

    with torch.no_grad():
        dense = float(evaluate(model))
        for name in tqdm(scores, desc="sensitivity", disable=None if progress else True, leave=False):
            tried = [masked_parameters(model, {name: at[name]}) for at in masks]
            if together:
                stacked = {key: torch.stack([parameters[key] for parameters in tried]) for key in tried[0]}
                try:
                    with warnings.catch_warnings():
                        warnings.filterwarnings("ignore", "There is a performance drop")  # an operation without a batching rule
                        losses[name] = tuple(vmap(loss_with, randomness="same", chunk_size=chunk)(stacked).tolist())
                    continue
                except (RuntimeError, ValueError, TypeError) as error:  # whatever a model's own code makes of batched tensors
                    together = False
                    reason = str(error).strip().splitlines()[0]
                    warnings.warn(f"sensitivity runs its sparsities one at a time: vmap cannot run this model ({reason})", stacklevel=2)
            losses[name] = tuple(loss_with(parameters).item() for parameters in tried)
    return Sensitivity(tuple(sparsities), dense, losses)
