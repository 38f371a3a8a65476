"""Each layer's loss against sparsity, alone, without touching the model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from blockprune.apply import masked_parameters
from blockprune.pipeline import Pipeline

Evaluate = Callable[[Callable[..., Any]], float | Tensor]  # (model) -> the loss, or any number that is lower when better


@attrs.frozen
class Sensitivity:
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

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells, the head first."""
        head = ("parameter", *(f"{s:.0%}" for s in self.sparsities))
        dense = ("(dense)", *(f"{self.dense:.3f}" for _ in self.sparsities))
        return [head, dense, *((name, *(f"{loss:.3f}" for loss in losses)) for name, losses in self.losses.items())]

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows(), strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            for row in self.rows()
        )

    def _repr_html_(self) -> str:
        head, *body = self.rows()
        cells = "".join(f"<th>{cell}</th>" for cell in head)
        lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
        return f"<table><tr>{cells}</tr>{lines}</table>"

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
    model: nn.Module, pipeline: Pipeline, sparsities: Sequence[float], evaluate: Evaluate, *, progress: bool = True
) -> Sensitivity:
    """The loss when one parameter alone is pruned to each sparsity, all others dense, by `functional_call`; the model is not touched.

    Args:
        model: any module; run as it is, so put it in evaluation mode.
        pipeline: its scores are computed once and allocated at every sparsity.
        sparsities: to try.
        evaluate: (model) -> loss; it is given a callable in the model's place.
        progress: show a bar on a terminal.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(16, 4)
        >>> prune = bp.Pipeline(partial(bp.collect.weights, where=bp.linears((2, 2))), bp.metric.l1, bp.allocate.per_layer)
        >>> target = model(x).detach()
        >>> table = bp.sensitivity(model, prune, [0.0, 0.5, 1.0], lambda m: (m(x) - target).square().mean())
        >>> [round(losses[0], 6) for losses in table.losses.values()]
        [0.0, 0.0]
    """
    scores = pipeline.scores(model)
    losses: dict[str, list[float]] = {name: [] for name in scores}
    with torch.no_grad():
        dense = float(evaluate(model))
        for sparsity in tqdm(sparsities, desc="sensitivity", disable=None if progress else True, leave=False):
            masks = pipeline.allocate(scores, sparsity)
            for name, found in losses.items():
                tried = masked_parameters(model, {name: masks[name]})
                found.append(float(evaluate(_with(model, tried))))
    return Sensitivity(tuple(sparsities), dense, {name: tuple(found) for name, found in losses.items()})


def _with(model: nn.Module, parameters: dict[str, Tensor]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, parameters, args, kwargs)

    return call
