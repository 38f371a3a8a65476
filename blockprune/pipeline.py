"""A pipeline: three stages composed into one value."""

import re
from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor, nn

from blockprune.types import Allocate, BlockMask, BlockScore, Collect, Masks, Metric, Param, Scores, Sparsity, check_finite

V = TypeVar("V")


@attrs.frozen(repr=False)
class Pipeline:
    """``collect`` -> ``metric`` -> ``allocate``: call it with a model and a sparsity to get masks; nothing is changed.

    It holds no state: bind a stage's options with ``functools.partial``, swap a stage with ``attrs.evolve``.

    Args:
        collect: model -> data.
        metric: data -> scores.
        allocate: (scores, sparsity) -> masks.

    Example:
        >>> prune = bp.Pipeline(partial(bp.collect.weights, where=bp.linears((2, 2))), bp.metric.l1, bp.allocate.per_layer)
        >>> prune
        Pipeline(collect=weights(where=linears(block=(2, 2))), metric=l1, allocate=per_layer)
        >>> model = nn.Linear(4, 4)
        >>> bp.sparsity(prune(model, 0.5))
        0.5
        >>> scores = prune.scores(model)                      # once ...
        >>> [bp.sparsity(prune.allocate(scores, s)) for s in (0.25, 0.75)]      # ... for many sparsities
        [0.25, 0.75]
        >>> two_of_four = attrs.evolve(prune, allocate=partial(bp.allocate.n_of_m, m=2))
    """

    collect: Collect = attrs.field(validator=attrs.validators.is_callable())
    metric: Metric = attrs.field(validator=attrs.validators.is_callable())
    allocate: Allocate = attrs.field(validator=attrs.validators.is_callable())

    def __call__(self, model: nn.Module, sparsity: Sparsity) -> Masks:
        return _checked("allocate", self.allocate(self.scores(model), sparsity), BlockMask, "BlockMask(keep, grid)")

    def scores(self, model: nn.Module) -> Scores:
        """Collect and score; pass the result to ``allocate`` at as many sparsities as you like."""
        # the data dies with this call, so a collector that can share memory with the model (copy on write) need not copy it
        lazy = {"lazy": True} if "lazy" in signature(self.collect).parameters else {}
        data = _checked("collect", self.collect(model, **lazy), Param, "Param(weight, grid)")
        scores = _checked("metric", self.metric(data), BlockScore, "BlockScore(value, grid)")
        for name, score in scores.items():
            if lazy and name in data and not score.value.isfinite().all():
                check_finite(name, data[name].weight)
        held = {param.weight.untyped_storage()._cdata for param in data.values()}
        return {name: _own(score, held) for name, score in scores.items()}

    def __repr__(self) -> str:
        return f"Pipeline(collect={_text(self.collect)}, metric={_text(self.metric)}, allocate={_text(self.allocate)})"


def _checked(stage: str, found: Mapping[str, V], kind: type[V], build: str) -> Mapping[str, V]:
    """What a stage returned, if it is a mapping of the right values."""
    if not isinstance(found, Mapping):
        raise TypeError(f"{stage} must return a mapping from parameter names to {kind.__name__}, not a {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(value, kind):
            raise TypeError(f"{stage} must return {kind.__name__} values, but gave a {type(value).__name__} for {name!r}; wrap it: {build}")
    return found


def _own(score: BlockScore, held: set[int]) -> BlockScore:
    """A score that is a view of a weight gets memory of its own."""
    shares = score.value.untyped_storage()._cdata in held
    return attrs.evolve(score, value=score.value.clone()) if shares else score


def _text(value: Any) -> str:
    """A stage as it would be written: names and bound options, no addresses."""
    if isinstance(value, partial):
        bound = [_text(arg) for arg in value.args] + [f"{key}={_text(arg)}" for key, arg in value.keywords.items()]
        return f"{_text(value.func)}({', '.join(bound)})"
    if isinstance(value, Tensor):
        return f"Tensor({tuple(value.shape)}, {value.dtype})"
    if isinstance(value, (str, int, float, torch.dtype, torch.device, type(None), re.Pattern)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(k)}: {_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_text, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    name = getattr(value, "__name__", None)
    return name.lstrip("_") if isinstance(name, str) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
