"""Sums of statistics over batches. They can be added before they are divided."""

import operator
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast, get_args

import attrs
import torch
from torch import Tensor

from blockprune.core.precision import SMALLEST, no_autocast
from blockprune.core.sharded_tensor import is_sharded
from blockprune.core.types import Data
from blockprune.model.parameters import ParameterRef
from blockprune.statistics import GateDerivatives, Source, Statistic, Sums

TINY = 1e-12  # the square of a smaller number may be too small for float32
GRADIENTS = ("output_grad", "weight_grad", "gates")  # the kinds of evidence that need a gradient of the loss
# the library's own statistics of derivatives of the loss; in a statistic of a user, 0 may mean anything
OWN_GRADIENT_STATISTICS = {
    "gate_fisher",
    "gate_flow",
    "gate_grad",
    "gate_hessian_diagonal",
    "gate_hessian_grad",
    "output_grad_gram",
    "output_grad_sq",
    "weight_grad",
    "weight_grad_sq",
}


@attrs.frozen(eq=False)
class Fold:
    """The sums of statistics over some batches; `merge` adds two folds, and `compute` divides the sums.

    Args:
        data: the weights and their blocks, by parameter name.
        refs: the places of the parameters in the model.
        statistics: what is added up.
        sums: the sums by parameter name and statistic name.
        counts: how often each parameter was used, by parameter name.

    Example:
        >>> fold = bp.collect.fold(nn.Linear(2, 2), where=bp.linears((1,)), statistics=[bp.statistics.input_sq], batches=[torch.ones(3, 2)])
        >>> fold.sums["weight", "input_sq"]
        {'sum': tensor([[3., 3.]]), 'n': tensor(3.)}
    """

    data: Data
    refs: Mapping[str, ParameterRef] = attrs.field(repr=False)
    statistics: tuple[Statistic, ...]
    sums: Mapping[tuple[str, str], Sums] = attrs.field(repr=False)
    counts: Mapping[str, "Counts"]


class Counts(NamedTuple):
    """How often a parameter was used. These numbers explain why a statistic has no data."""

    batches: int = 0  # the batches that the model ran on
    calls: int = 0  # the calls of the parameter's layer
    gradients: int = 0  # the gradients of the loss that reached the parameter


def merge(a: Fold, b: Fold) -> Fold:
    """The fold over the batches of both.

    Raises:
        ValueError: the folds differ in their parameters or statistics.

    Example:
        >>> fold = bp.collect.fold(nn.Linear(2, 2), where=bp.linears((1,)), statistics=[bp.statistics.input_sq], batches=[torch.ones(3, 2)])
        >>> bp.collect.merge(fold, fold).sums["weight", "input_sq"]["n"]
        tensor(6.)
    """
    if a.sums.keys() != b.sums.keys():
        parameter, statistic = sorted(a.sums.keys() ^ b.sums.keys())[0]
        raise ValueError(
            f"only folds of the same parameters and statistics can be merged, but one of the two has no {statistic!r} of {parameter!r}"
        )
    merged: dict[tuple[int, int], Sums] = {}  # sums that layers share stay shared
    for key, sums in a.sums.items():
        if (id(sums), id(b.sums[key])) not in merged:
            merged[id(sums), id(b.sums[key])] = {k: v + b.sums[key][k] for k, v in sums.items()}
    return attrs.evolve(
        a,
        sums={key: merged[id(sums), id(b.sums[key])] for key, sums in a.sums.items()},
        counts={name: Counts(*map(operator.add, counts, b.counts[name])) for name, counts in a.counts.items()},
    )


def compute(fold: Fold) -> Data:
    """Divide the sums: the fold's data, with the statistics by name in ``stats``.

    Raises:
        ValueError: there was no batch, or a layer that no batch called, or that no gradient reached.

    Example:
        >>> fold = bp.collect.fold(nn.Linear(2, 2), where=bp.linears((1,)), statistics=[bp.statistics.input_sq], batches=[torch.ones(3, 2)])
        >>> bp.collect.compute(fold)["weight"].stats["input_sq"]
        tensor([[1., 1.]])
    """
    return compute_once(attrs.evolve(fold, sums=dict(fold.sums)))


def compute_once(fold: Fold) -> Data:
    """`compute` of a fold that is not used afterwards: its sums are removed from it as they are divided, so that memory is not doubled."""
    _check_data(fold)
    _check_derivatives(fold)
    _warn_of_zeros(fold)
    remaining = cast(dict[tuple[str, str], Sums], fold.sums)
    stats: dict[str, dict[str, Tensor]] = {name: {} for name in fold.data}
    for s in fold.statistics:
        sharing: dict[Any, list[str]] = {}
        for name in fold.data:
            sharing.setdefault(id(remaining[name, s.name]) if s.shared else name, []).append(name)
        for first, *others in sharing.values():
            value = s.compute(remaining.pop((first, s.name)), fold.refs[first], fold.data[first])
            for name in (first, *others):
                remaining.pop((name, s.name), None)
                stats[name][s.name] = value
    return {name: attrs.evolve(param, stats=stats[name]) for name, param in fold.data.items()}


def _check_data(fold: Fold) -> None:
    """Raise if a statistic has no data of a parameter, and say why."""
    missing = {name: s for s in reversed(fold.statistics) for name in fold.data if _has_no_data(fold, name, s)}
    if not missing:
        return
    name = next(name for name in fold.data if name in missing)
    counts, statistic = fold.counts[name], missing[name]
    if not counts.batches:
        raise ValueError("batches is empty: statistics need at least one batch (a generator can be used once only)")
    owner = type(fold.refs[name].owner).__name__.removeprefix("Parametrized")
    if not counts.calls:
        reason = f"the forward never calls its {owner}"
        remedy = "give batches that reach the layer, or leave it out with `excluding`"
    elif statistic.source in GRADIENTS:
        reason = (
            f"no gradient of the loss reaches it, although the forward calls its {owner}. Its output is detached, computed under "
            "torch.no_grad or by gradient checkpointing of another library, passed to an operation without a gradient such as argmax, or "
            "not used by the loss"
        )
        remedy = "change that, leave the weight out with `excluding`, or use a metric of inputs such as metric.wanda"
    else:
        reason = f"the batches are empty, or all rows of its {owner} have the token weight 0"
        remedy = "give batches with samples; check their attention_mask, or give token_weights="
    alike = [other for other in missing if other != name and _reason(fold.counts[other]) == _reason(counts)]
    listed = ", ".join(alike[:4]) + (", ..." if len(alike) > 4 else "")
    raise ValueError(
        f"{name} {fold.data[name].grid.shape}: {reason}, so there is no data for {statistic.name!r}"
        + (f" (the same holds for {len(alike)} more: {listed})" if alike else "")
        + f"; {remedy}"
    )


def _warn_of_zeros(fold: Fold) -> None:
    """Warn of parameters whose derivatives are all exactly 0, because that is no sign of unimportance."""
    own = [s.name for s in fold.statistics if s.name in OWN_GRADIENT_STATISTICS]
    zero = [name for name in fold.data if not _is_pruned(fold.refs[name]) and any(_largest(fold.sums[name, s]) == 0 for s in own)]
    if zero:
        listed = ", ".join(f"{name} {fold.data[name].grid.shape}" for name in zero[:4]) + ", ..." * (len(zero) > 4)
        warnings.warn(
            f"{listed}: all derivatives are exactly 0 ({', '.join(own)}), so all blocks score 0 and their order decides which "
            "are pruned. Weights behind these may be 0 (a zero-initialized branch, a new LoRA), an operation such as sign, round, a "
            "saturated clamp or a dead ReLU may stop the gradients, the loss may be linear, or they are too small for the type of the "
            "model (multiply the loss by a constant, or convert the model to float64). Leave these weights out with `excluding`, or use a "
            "metric of inputs such as metric.wanda",
            stacklevel=3,
        )


def _is_pruned(ref: ParameterRef) -> bool:
    return ref.mask is not None and not bool(ref.mask.keep.any())


def _check_derivatives(fold: Fold) -> None:
    """Raise for derivatives of gates, added up in float64, that float32 hardly held."""
    of_gates = [s for s in fold.statistics if s.source == "gates" and s.name in OWN_GRADIENT_STATISTICS]
    for name, ref in fold.refs.items():
        for s in of_gates if ref.stored.dtype != torch.float64 else ():
            largest = _largest(fold.sums[name, s.name])
            if 0 < largest < (SMALLEST**2 if s.name in ("gate_fisher", "gate_hessian_grad") else SMALLEST):
                raise ValueError(
                    f"{name} {fold.data[name].grid.shape}: {s.name!r} adds up to at most {largest:.1e}, from derivatives of which float32 "
                    "keeps few digits; multiply the loss by a constant, or convert the model to float64"
                )


def _largest(sums: Sums) -> float:
    """The largest absolute value, without a copy of the sums; 1 if there are none."""
    totals = [total for key, total in sums.items() if key != "n" and total.numel()]
    return max((float(torch.linalg.vector_norm(total, torch.inf)) for total in totals), default=1.0)


def _has_no_data(fold: Fold, name: str, s: Statistic) -> bool:
    if s.source in ("weight_grad", "gates") and not fold.counts[name].gradients:
        return True
    count = fold.sums[name, s.name].get("n")
    return count is not None and not count.any()


def _reason(counts: Counts) -> tuple[bool, bool]:
    return counts.calls > 0, counts.gradients > 0


def empty_fold(data: Data, refs: Mapping[str, ParameterRef], statistics: Sequence[Statistic]) -> Fold:
    """A fold over no batches.

    Raises:
        NotImplementedError: a statistic of gradients of the stored weight, where another parametrization computes the weight from it, or
            where the stored weight is a DTensor.
    """
    for name, ref in refs.items():
        unsupported = [s.name for s in statistics if s.source in ("weight_grad", "gates")]
        if unsupported and is_sharded(ref.stored):
            raise NotImplementedError(
                f"{name} {data[name].grid.shape}: {', '.join(unsupported)} needs the whole weight in the graph of the loss, but this one "
                "is a DTensor; collect before fully_shard or parallelize_module, use a statistic of inputs or outputs, or call "
                "collect.gradients after a backward of your own"
            )
        if unsupported and not ref.is_plain:
            raise NotImplementedError(
                f"{name} {data[name].grid.shape}: {', '.join(unsupported)} needs a stored weight, but another parametrization computes "
                "this one; remove that parametrization, use a statistic of activations, or leave the weight out with `excluding`"
            )
    zeros: dict[Any, Sums] = {}  # of layers that may share their sums, by shape
    sums: dict[tuple[str, str], Sums] = {}
    for name, param in data.items():
        for s in statistics:
            initial = s.init(refs[name], param)
            shapes = tuple((key, total.shape, total.dtype, total.device) for key, total in initial.items())
            sums[name, s.name] = zeros.setdefault((s.name, shapes), initial) if s.shared else initial
    return Fold(data, refs, tuple(statistics), sums, dict.fromkeys(data, Counts()))


class RunningFold:
    """A fold while batches are added to it. It writes into sums and counts of its own, so that a batch costs the same in a large model."""

    def __init__(self, fold: Fold) -> None:
        self.fold = attrs.evolve(fold, sums=dict(fold.sums), counts=dict(fold.counts))
        self.sums: dict[tuple[str, str], Sums] = self.fold.sums  # type: ignore[assignment]
        self.counts: dict[str, Counts] = self.fold.counts  # type: ignore[assignment]
        self.by_evidence = {source: [s for s in fold.statistics if s.source == source] for source in get_args(Source)}

    def count(self, name: str, *, batches: int = 0, calls: int = 0, gradients: int = 0) -> None:
        self.counts[name] = Counts(*map(operator.add, self.counts[name], (batches, calls, gradients)))

    def add(self, name: str, source: Source, evidence: Any, batch_number: int) -> None:
        """Update the statistics of one parameter that read this source (such as inputs or weight gradients) with one batch.

        Raises:
            ValueError: NaN or inf in the new sums.
        """
        changed = False
        for s in self.by_evidence[source]:
            before = self.sums[name, s.name]
            new = _updated(s, before, evidence)
            if isinstance(evidence, GateDerivatives) and not evidence.called():
                continue  # the layer did not run, so its gradient of 0 says nothing; `compute` reports a layer that never runs
            if not all(_is_finite(total) for total in new.values()):
                raise ValueError(
                    f"{name} {self.fold.data[name].grid.shape}: NaN or inf reached {s.name!r} in batch {batch_number}; check that batch "
                    "and the layers before this one"
                )
            if self.counts[name].batches == 1:
                self._check_underflow(name, s, new, evidence)
            changed = changed or (source in GRADIENTS and _differs(before, new))
            self.sums[name, s.name] = new
        if source in GRADIENTS and not self.counts[name].gradients and self._is_reached(evidence, changed):
            self.count(name, gradients=1)

    def _check_underflow(self, name: str, s: Statistic, sums: Sums, evidence: Any) -> None:
        """Raise if what is added up is too small for float32, as the squares of tiny gradients are: all blocks would score 0."""
        values = _values(s.source, evidence)
        if not values or not all(
            total.dtype == torch.float32 and bool((total.abs() < SMALLEST).all()) for key, total in sums.items() if key != "n"
        ):
            return
        largest = max(float(x.abs().max()) if x.numel() else 0.0 for x in values)
        if 0 < largest < TINY:
            what = {"inputs": "inputs", "output": "outputs"}.get(s.source, "gradients of the loss")
            remedy = "multiply the loss by a constant" if s.source in GRADIENTS else "scale them"
            raise ValueError(
                f"{name} {self.fold.data[name].grid.shape}: the {what} are at most {largest:.1e}, so {s.name!r} is below what float32 "
                f"holds; {remedy}, or convert the model to float64"
            )

    @staticmethod
    def _is_reached(evidence: Any, changed: bool) -> bool:
        """Whether a gradient reaches a parameter. If none reaches a gate, its derivative is 0, so a derivative of 0 is checked further."""
        if isinstance(evidence, GateDerivatives):
            return evidence.called() and (changed or evidence.reached())
        return evidence is not None


def _updated(s: Statistic, before: Sums, evidence: Any) -> Sums:
    """The new sums; the same object for layers that share the sums before, if the statistic allows it and the inputs are the same."""
    if not s.shared or evidence.shared is None:
        with no_autocast():
            return s.update(before, evidence)
    key = s.name, *map(id, before.values())
    kept, new = evidence.shared.get(key, ((), None))
    if new is None or any(ref() is not total for ref, total in zip(kept, before.values(), strict=True)):
        with no_autocast():
            new = s.update(before, evidence)
        evidence.shared[key] = [weakref.ref(total) for total in before.values()], new  # weak, because the sums before may be large
    return cast(Sums, new)


def _values(source: str, evidence: Any) -> list[Tensor]:
    """The tensors that a statistic of this kind adds up; gates are added up in float64."""
    if source == "inputs":
        return list(evidence.inputs)
    if source == "weight_grad":
        return [] if evidence is None else [evidence]
    return [] if source == "gates" else [evidence.output if source == "output" else evidence.output_grad]


def _differs(before: Sums, new: Sums) -> bool:
    return any(not torch.equal(total, before[key]) for key, total in new.items() if key != "n")


def _is_finite(x: Tensor) -> bool:
    """Whether all elements are finite; one read of ``x``, and a second only where large numbers add up to inf."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
