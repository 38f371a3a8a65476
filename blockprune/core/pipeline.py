"""A pipeline: three stages composed into one value."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from inspect import Parameter, signature
from typing import Any, TypeVar, cast

import attrs
import torch
from torch import Tensor, nn

from blockprune.core._compat import storage_id
from blockprune.core.arguments import unwrap_partial
from blockprune.core.precision import no_autocast
from blockprune.core.sharded_tensor import is_sharded
from blockprune.core.types import (
    Allocate,
    BlockMask,
    BlockScore,
    Collect,
    Data,
    Masks,
    Metric,
    Param,
    Scores,
    Sparsity,
    check_data,
    check_finite,
    check_masks,
    check_scores,
)

V = TypeVar("V")
F = TypeVar("F", bound=Callable[..., Any])


_STAGES = {
    "collect": "(model) -> data, such as partial(bp.collect.weights, where=bp.linears((4, 4)))",
    "metric": "(data) -> scores, such as bp.metric.l1",
    "allocate": "(scores, sparsity) -> masks, such as bp.allocate.per_layer",
}


def _check_stage(_: Any, field: Any, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{field.name!r} must be callable, but is a {type(value).__name__}; give a function {_STAGES[field.name]}")
    function = unwrap_partial(value)
    stage = function.__module__.split(".")[1] if _in_blockprune(function) else field.name
    if stage in _STAGES and stage != field.name:
        raise TypeError(
            f"{field.name}={as_code(value)} is a function of bp.{stage}; give the stages in the order Pipeline(collect, metric, allocate), "
            f"where {field.name} is {_STAGES[field.name]}"
        )


@attrs.frozen(repr=False)
class Pipeline:
    """``collect`` -> ``metric`` -> ``allocate``: called with a model and a sparsity, it returns masks and changes nothing.

    It holds no state. Bind the options of a stage with ``functools.partial``; exchange a stage with ``attrs.evolve``.

    Args:
        collect: model -> data.
        metric: data -> scores.
        allocate: (scores, sparsity) -> masks.

    Raises:
        TypeError: a stage that is no function, such as the data that a collector returned, or a function of another stage.

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
        >>> one_of_two = attrs.evolve(prune, allocate=partial(bp.allocate.n_of_m, m=2))
    """

    collect: Collect = attrs.field(validator=_check_stage)
    metric: Metric = attrs.field(validator=_check_stage)
    allocate: Allocate = attrs.field(validator=_check_stage)

    def __call__(self, model: nn.Module, sparsity: Sparsity) -> Masks:
        return allocated(self.allocate, self.scores(model, sparsity), sparsity)

    def scores(self, model: nn.Module, sparsity: Sparsity | None = None) -> Scores:
        """Collect and score. The scores can be given to ``allocate`` with many sparsities.

        The collector also gets the statistics that the metric requires (`requires`).

        Args:
            model: the model; it is not changed.
            sparsity: for metrics that depend on it, as in `score`.
        """
        parameters = signature(self.collect).parameters
        options: dict[str, Any] = {}
        if "lazy" in parameters:  # the data does not outlive this call, so it may share memory with the model
            options["lazy"] = True
        if "statistics" in parameters and (required := required_statistics(self.metric)):
            bound = () if parameters["statistics"].default is Parameter.empty else parameters["statistics"].default
            names = {getattr(statistic, "name", None) for statistic in bound}  # the collector refuses what is no statistic
            options["statistics"] = [*bound, *(statistic for statistic in required if statistic.name not in names)]
        data = _checked("collect", self.collect(model, **options), Param, "Param(weight, grid)")
        scores = self.score(data, sparsity)
        if "lazy" in options:  # such a collector has not looked for NaN
            for name, score in scores.items():
                if name in data and not score.value.isfinite().all():
                    check_finite(name, data[name].weight)
        weights = {storage_id(param.stored) for param in data.values() if not is_sharded(param.stored)}
        return {name: _unshared(score, weights) for name, score in scores.items()}

    def score(self, data: Data, sparsity: Sparsity | None = None) -> Scores:
        """Score data that has been collected; ``sparsity`` is passed to a metric that requires it, such as `metric.sparsegpt`.

        Raises:
            TypeError: a metric that requires the sparsity, without one.
        """
        parameter = signature(self.metric).parameters.get("sparsity")
        is_required = parameter is not None and parameter.default is Parameter.empty
        if is_required and sparsity is None:
            raise TypeError(
                f"metric={as_code(self.metric)} scores for one sparsity: call the pipeline with it, or pipeline.scores(model, sparsity); "
                "what scores once for several sparsities, such as `sensitivity`, needs another metric, such as bp.metric.obs"
            )
        options = {"sparsity": sparsity} if is_required else {}
        scores = _checked("metric", self.metric(data, **options), BlockScore, "BlockScore(value, grid)")
        check_scores(scores, "the scores of metric")
        return scores

    def __repr__(self) -> str:
        return f"Pipeline(collect={as_code(self.collect)}, metric={as_code(self.metric)}, allocate={as_code(self.allocate)})"


def allocated(allocate: Allocate, scores: Scores, sparsity: Any) -> Masks:
    """The masks that an allocator, which may be a user's own, returns.

    Raises:
        TypeError: something else.

    Example:
        >>> from blockprune.core.pipeline import allocated
        >>> grid = bp.BlockGrid((4,), (2,))
        >>> allocated(bp.allocate.per_layer, {"w": bp.BlockScore(torch.tensor([1.0, 2.0]), grid)}, 0.5)["w"].keep
        tensor([False,  True])
    """
    return _checked("allocate", allocate(scores, sparsity), BlockMask, "BlockMask(keep, grid)")


def _checked(stage: str, result: Mapping[str, V], kind: type[V], constructor: str) -> Mapping[str, V]:
    """The result of a stage.

    Raises:
        TypeError: it is not a mapping from parameter names to values of this type.
    """
    if not isinstance(result, Mapping):
        raise TypeError(f"{stage} must return a mapping from parameter names to {kind.__name__}, not a {type(result).__name__}")
    for name, value in result.items():
        if not isinstance(value, kind):
            raise TypeError(
                f"{stage} must return {kind.__name__} values, but returned a {type(value).__name__} for {name!r}; wrap it: {constructor}"
            )
    return result


def _unshared(score: BlockScore, weights: set[int]) -> BlockScore:
    """The score, copied if it is a view of a weight (given by its storage)."""
    shares_memory = storage_id(score.value) in weights
    return attrs.evolve(score, value=score.value.clone()) if shares_memory else score


def requires(*statistics: Any) -> Callable[[F], F]:
    """Declare the statistics that a metric or a repair needs.

    A `Pipeline` and `sequential` ask their collector for them. A call with data that lacks one raises an error that says how to collect it.
    The function runs without `torch.autocast`, in the precision of the data.

    Args:
        statistics: statistics from `blockprune.statistics`, or your own.

    Raises:
        ValueError: by the declared function, if a parameter lacks a statistic. A repair looks only at the parameters that have a mask.
        TypeError: by the declared function, if it is given something else than data, such as a model.

    Example:
        >>> @bp.requires(bp.statistics.input_sq)
        ... def input_power(data):
        ...     return {name: bp.BlockScore(bp.pool(p.stats["input_sq"].expand(p.grid.shape), p.grid), p.grid) for name, p in data.items()}
        >>> prune = bp.Pipeline(partial(bp.collect.with_statistics, where=bp.linears((2, 2)), batches=[torch.ones(3, 4)]),
        ...                     input_power, bp.allocate.per_layer)
        >>> prune.scores(nn.Linear(4, 2))["weight"].value
        tensor([[4., 4.]])
    """

    def declare(function: F) -> F:
        is_repair = "masks" in signature(function).parameters

        @wraps(function)
        def checked(data: Data, *args: Any, **options: Any) -> Any:
            check_data(data)
            names = options.get("masks", args[0] if args else {}) if is_repair else data
            if is_repair:
                check_masks(names)
            for name in names:
                if name in data:
                    _check_statistics(function, name, data[name], statistics)
            with no_autocast():
                return function(data, *args, **options)

        checked.requires = statistics  # type: ignore[attr-defined]
        return cast(F, checked)

    return declare


def _check_statistics(function: Any, name: str, param: Param, statistics: Sequence[Any]) -> None:
    """Raise unless a parameter has all of these statistics."""
    for statistic in statistics:
        if statistic.name not in param.stats:
            stage = "reconstruct." if "masks" in signature(function).parameters else "metric."
            caller = f"{stage if _in_blockprune(function) else ''}{function.__name__}"
            code = f"{'bp.statistics.' if _in_blockprune(statistic.update) else ''}{statistic!r}"
            raise ValueError(
                f"{name} {param.grid.shape}: {caller} needs the statistic {statistic.name!r}; the data has {sorted(param.stats) or 'none'};"
                " in a Pipeline, use collect=partial(bp.collect.with_statistics, where=..., calibration=bp.Calibration(batches)); outside "
                f"of one, collect it: bp.collect.with_statistics(model, where=..., statistics=[{code}], batches=...)"
            )


def _in_blockprune(function: Any) -> bool:
    """Whether a function is defined in this library."""
    return str(getattr(function, "__module__", "")).startswith("blockprune.")


def required_statistics(function: Any) -> tuple[Any, ...]:
    """The statistics that a function declares with `requires`; a ``functools.partial`` has those of its function.

    Example:
        >>> from blockprune.core.pipeline import required_statistics
        >>> [statistic.name for statistic in required_statistics(partial(bp.metric.obs, damping=0.4))]
        ['input_gram']
    """
    marked: tuple[Any, ...] = getattr(unwrap_partial(function), "requires", ())
    return marked


def as_code(value: Any, *, prefix: str = "") -> str:
    """A function or value as it would be written in source code: with its name and bound options, without a memory address.

    With a prefix, such as "bp.", the names of functions in this library begin with it.
    """
    write = partial(as_code, prefix=prefix)
    if isinstance(value, partial):
        bound = [write(arg) for arg in value.args] + [f"{key}={write(arg)}" for key, arg in value.keywords.items()]
        return f"{write(value.func)}({', '.join(bound)})"
    if isinstance(value, Tensor):
        return f"Tensor({tuple(value.shape)}, {value.dtype})"
    if isinstance(value, (str, int, float, torch.dtype, torch.device, type(None), re.Pattern)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{write(k)}: {write(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(write, value))
        if len(inner) > 200 and attrs.has(type(value[0])):  # such as the hidden axes of a model
            inner = f"{len(value)} {type(value[0]).__name__}"
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    name = getattr(value, "__name__", None)
    code = name.lstrip("_") if isinstance(name, str) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return prefix + code if isinstance(name, str) and _in_blockprune(value) else code


def fields_as_code(value: Any) -> str:
    """An attrs value as it would be written in source code, with one field per line, without the fields that have their default value."""
    fields = [(field.name, getattr(value, field.name), field.default) for field in attrs.fields(type(value))]
    lines = [f"    {name}={as_code(x)},".replace("\n", "\n    ") for name, x, default in fields if not _is_default(x, default)]
    return "\n".join([f"{type(value).__name__}(", *lines, ")"])


def _is_default(value: Any, default: Any) -> bool:
    """Whether a field has its default value, also in a copy; what may not compare to one bool, such as tensors, is not compared."""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and len(value) == len(default) and all(map(_is_default, value, default))
    return value is default or (type(value) is type(default) and isinstance(value, (str, int, float)) and value == default)
