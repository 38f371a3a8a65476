"""Sums of statistics over batches. They can be added before they are divided."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor

from blockprune.core.precision import no_autocast
from blockprune.core.types import Data
from blockprune.model.parameters import ParameterRef
from blockprune.statistics import Gates, Statistic, Sums


@attrs.frozen(eq=False)
class Fold:
    """The sums of statistics over some batches; `merge` adds two folds, and `compute` divides the sums.

    Args:
        data: the weights and their blocks, by parameter name.
        refs: the places of the parameters in the model.
        statistics: what is added up.
        sums: the sums by parameter name and statistic name.

    Example:
        >>> fold = bp.collect.fold(nn.Linear(2, 2), where=bp.linears((1,)), statistics=[bp.statistics.input_sq], batches=[torch.ones(3, 2)])
        >>> fold.sums["weight", "input_sq"]
        {'sum': tensor([[3., 3.]]), 'n': tensor(3.)}
    """

    data: Data
    refs: Mapping[str, ParameterRef]
    statistics: tuple[Statistic, ...]
    sums: Mapping[tuple[str, str], Sums]


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
    return attrs.evolve(a, sums={key: {k: v + b.sums[key][k] for k, v in sums.items()} for key, sums in a.sums.items()})


def compute(fold: Fold) -> Data:
    """Divide the sums: the fold's data, with the statistics by name in ``stats``.

    Raises:
        ValueError: there was no batch, or a layer that no batch reached.

    Example:
        >>> fold = bp.collect.fold(nn.Linear(2, 2), where=bp.linears((1,)), statistics=[bp.statistics.input_sq], batches=[torch.ones(3, 2)])
        >>> bp.collect.compute(fold)["weight"].stats["input_sq"]
        tensor([[1., 1.]])
    """
    _check_reached(fold)
    return {
        name: attrs.evolve(param, stats={s.name: s.compute(fold.sums[name, s.name], fold.refs[name], param) for s in fold.statistics})
        for name, param in fold.data.items()
    }


def _check_reached(fold: Fold) -> None:
    """Raise if there was no batch, or if some layer was never called."""
    counted = {key: sums for key, sums in fold.sums.items() if "n" in sums}
    unreached = [key for key, sums in counted.items() if not sums.get("reached", sums["n"]).any()]
    if not unreached:
        return
    if not any(sums["n"].any() for sums in counted.values()):
        raise ValueError("batches is empty: statistics need at least one batch (a generator can be used once only)")
    name, statistic = unreached[0]
    owner = type(fold.refs[name].owner).__name__.removeprefix("Parametrized")
    more = list(dict.fromkeys(parameter for parameter, _ in unreached))[1:]
    listed = ", ".join(more[:4]) + (", ..." if len(more) > 4 else "")
    raise ValueError(
        f"{name} {fold.data[name].grid.shape}: the forward never calls its {owner}, so there is no data for {statistic!r}"
        + (f" (the same holds for {len(more)} more: {listed})" if more else "")
        + "; give batches that reach the layer, or leave it out with `excluding`"
    )


def empty_fold(data: Data, refs: Mapping[str, ParameterRef], statistics: Sequence[Statistic]) -> Fold:
    """A fold over no batches.

    Raises:
        NotImplementedError: a statistic of gradients of the stored weight, where another parametrization computes the weight from it.
    """
    for name, ref in refs.items():
        if unsupported := [s.name for s in statistics if s.sees in ("weight_grad", "gates") and not ref.is_plain]:
            raise NotImplementedError(
                f"{name} {data[name].grid.shape}: {', '.join(unsupported)} needs a stored weight, but another parametrization computes "
                "this one; remove that parametrization, use a statistic of activations, or leave the weight out with `excluding`"
            )
    sums = {(name, s.name): s.init(refs[name], param) for name, param in data.items() for s in statistics}
    return Fold(data, refs, tuple(statistics), sums)


def add_evidence(fold: Fold, name: str, sees: str, evidence: Any, batch_number: int) -> Fold:
    """The fold with the evidence that one batch gives of one parameter, for the statistics that use this kind of evidence.

    Raises:
        ValueError: NaN or inf in the new sums.
    """
    sums = dict(fold.sums)
    for s in fold.statistics:
        if s.sees == sees:
            with no_autocast():
                new = s.update(sums[name, s.name], evidence)
            if isinstance(evidence, Gates) and not evidence.called():
                continue  # the layer did not run, so its gradient of 0 says nothing; `compute` reports a layer that never runs
            if not all(_is_finite(total) for total in new.values()):
                raise ValueError(
                    f"{name} {fold.data[name].grid.shape}: NaN or inf reached {s.name!r} in batch {batch_number}; check that batch and the "
                    "layers before this one"
                )
            sums[name, s.name] = new
    return attrs.evolve(fold, sums=sums)


def _is_finite(x: Tensor) -> bool:
    """Whether all elements are finite; one read of ``x``, and a second only where large numbers add up to inf."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
