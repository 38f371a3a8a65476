"""Data from running a model on batches: weights, with statistics of what flows through their layers."""

from collections.abc import Sequence
from typing import Unpack

from torch import nn

from blockprune.collect.accumulate import Fold, compute, compute_once, empty_fold
from blockprune.collect.from_weights import weights
from blockprune.collect.layer_hooks import add_batches
from blockprune.core.types import Data, Where
from blockprune.model.calibration import Calibration, CalibrationOptions, as_calibration
from blockprune.model.parameters import find_parameters
from blockprune.model.sharding import raised_together
from blockprune.statistics import Statistic
from blockprune.statistics.statistic import check_statistics


def with_statistics(
    model: nn.Module,
    *,
    where: Where,
    statistics: Sequence[Statistic] = (),
    calibration: Calibration | None = None,
    lazy: bool = False,
    **options: Unpack[CalibrationOptions],
) -> Data:
    """`weights`, with statistics that are added up over batches.

    The model runs in evaluation mode and is not changed.

    Args:
        model: any module, masked or not. A masked model runs with its masks: gradients of weights and gates are 0 in pruned blocks, unless
            its masks were applied with ``straight_through=True``; to grow blocks by their gradients, apply them so.
        where: which parameters, in what blocks.
        statistics: what to collect, from `blockprune.statistics` or your own. All of them share one forward pass, and one backward pass if
            any needs it. A `Pipeline` adds the statistics that its metric requires.
        calibration: batches, forward and loss.
        lazy: as in `weights`.
        options: the fields of `Calibration`, such as ``batches=``, ``loss=`` and ``reduce=``, in place of ``calibration``.

    Raises:
        ValueError: no batches, a chosen layer that the forward never calls, NaN or inf in an activation or gradient, a loss that is not
            one number with a gradient, no statistics, two statistics of the same name, and what `weights` raises.
        TypeError: no calibration, or both ``calibration`` and its fields; batches that are one tensor or mapping; statistics that are none.
        NotImplementedError: a statistic that cannot be collected from a chosen parameter; ``input_gram`` of a Linear or convolution whose
            weight the forward also uses by itself, as in ``F.linear(self.layer(x), self.layer.weight.T)``: it would describe the calls of
            the layer alone. Other statistics of inputs, and of gradients of outputs, give a warning. (This is checked on the first batch;
            an operation that takes no part in ``__torch_function__``, such as an autograd.Function, is not seen.)
        RuntimeError: an operation that vmap cannot run; with ``reduce``, an error on another rank.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 2), where=bp.linears((2, 2)),
        ...     statistics=[bp.statistics.input_sq], batches=[torch.ones(8, 4), torch.zeros(8, 4)])
        >>> data["weight"].stats["input_sq"]
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    calibration = as_calibration(calibration, options)
    with raised_together(model, calibration.reduce):
        total = _fold(model, where, statistics, calibration, lazy)
    return compute(calibration.reduce(total)) if calibration.reduce else compute_once(total)


def fold(
    model: nn.Module,
    *,
    where: Where,
    statistics: Sequence[Statistic] = (),
    calibration: Calibration | None = None,
    lazy: bool = False,
    **options: Unpack[CalibrationOptions],
) -> Fold:
    """The sums of `with_statistics` before they are divided, for `merge` and `compute`; with the same options and errors.

    The sums are those of this process alone: ``reduce`` is not called.

    Example:
        >>> model, options = nn.Linear(4, 2), dict(where=bp.linears((2, 2)), statistics=[bp.statistics.input_sq])
        >>> a, b = (bp.collect.fold(model, batches=[x], **options) for x in (torch.ones(8, 4), torch.zeros(24, 4)))
        >>> bp.collect.compute(bp.collect.merge(a, b))["weight"].stats["input_sq"]
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return _fold(model, where, statistics, as_calibration(calibration, options), lazy)


def _fold(model: nn.Module, where: Where, statistics: Sequence[Statistic], calibration: Calibration, lazy: bool) -> Fold:
    check_statistics(statistics)
    data = weights(model, where=where, lazy=lazy)
    refs = {name: users[0] for name, users in find_parameters(model, data, what="where").items()}
    return add_batches(model, empty_fold(data, refs, statistics), calibration)
