"""Data from the model's weights and gradients, without running the model."""

import itertools
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor, nn

from blockprune.core._compat import BatchNorm, ConvTransposeNd, lazy_clone, own_parametrizations
from blockprune.core.patterns import suggest
from blockprune.core.precision import at_least_float32
from blockprune.core.sharded_tensor import is_sharded, whole
from blockprune.core.types import Data, Param, Where, check_finite, check_prunable
from blockprune.model.parameters import find_parameters
from blockprune.model.selection import select
from blockprune.model.sharding import reshard


def weights(model: nn.Module, *, where: Where, masked: bool = False, lazy: bool = False) -> Data:
    """The weights that a rule chooses, with their blocks, by parameter name.

    Args:
        model: any module, masked or not; it is not changed.
        where: which parameters, in what blocks, such as ``linears((4, 4))``.
        masked: read the weight of a masked parameter as the model uses it, with zeros in pruned blocks, instead of the stored dense
            weight. With dense weights, the default, a pruned block can be kept again; `restrict` prevents that.
        lazy: do not copy the weights and do not check them for NaN and inf. They share memory with the model until either side writes
            (copy on write). Only writes by torch are noticed, so use it for data that is dropped before the model changes, as a
            `Pipeline` does.

    Raises:
        ValueError: a rule that matches nothing, a block that does not fit, a weight with NaN or inf, a weight on the meta device.
        TypeError: an integer, complex, sparse or quantized weight.

    Example:
        >>> data = bp.collect.weights(nn.Linear(4, 6), where=bp.linears((2, 2)))
        >>> data["weight"].weight.shape, data["weight"].grid.size
        (torch.Size([6, 4]), (3, 2))
    """
    reshard(model)
    chosen = select(model, where)
    copy = _lazy_copy if lazy else torch.clone
    data: dict[str, Param] = {}
    with torch.no_grad():
        for name, (ref, grid) in chosen.items():
            weight = ref.masked if masked else ref.dense
            check_prunable(name, weight)
            if not lazy:
                weight = whole(weight)
                if ref.mask is not None and not weight.isfinite().all() and whole(ref.masked).isfinite().all():
                    raise ValueError(
                        f"{name} {grid.shape}: its pruned blocks hold NaN or inf, which cannot be scored; write zeros there, "
                        "model = bp.apply_masks(bp.finalize(model), masks), or collect weights(..., masked=True)"
                    )
                check_finite(name, weight)
            data[name] = Param(copy(weight.detach()), grid)
    return data


def _lazy_copy(weight: Tensor) -> Tensor:
    if is_sharded(weight):
        return weight.clone()
    try:
        return lazy_clone(weight)
    except RuntimeError:  # memory that torch did not allocate, such as a NumPy array or a memory-mapped checkpoint
        return weight.clone()


def movement(model: nn.Module, *, where: Where, previous: Data | None = None) -> Data:
    """`weights`, with the statistic ``movement``: minus weight times gradient, summed over training steps (Sanh et al. 2005.07683).

    Call it in the training loop after ``backward``. A parameter without a gradient in a step, such as an expert that no token was sent to,
    adds nothing to its sum; as long as no step gave it a gradient, it has no statistic, and `metric.movement` raises an error.

    Args:
        model: any module, masked or not; it is not changed.
        where: which parameters, in what blocks.
        previous: the result of the step before; None at the first step.

    Raises:
        ValueError: a parameter that is frozen or that another parametrization computes, no parameter with a gradient; and what `weights`
            raises.
        KeyError: ``previous`` without a parameter.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> data = bp.collect.movement(model, where=bp.linears((2, 2)))
        >>> torch.equal(data["weight"].stats["movement"], -model.weight.detach())
        True
    """
    data = weights(model, where=where)
    refs = find_parameters(model, data, what="where")
    stored: dict[str, Tensor] = {}
    for name, param in data.items():
        ref = refs[name][0]
        if not ref.is_plain or not ref.stored.requires_grad:
            reason = "is frozen, so it never has a gradient" if ref.is_plain else "is computed by another parametrization"
            raise ValueError(f"{name} {param.grid.shape}: this weight {reason}; leave it out with `excluding`")
        if previous and name not in previous:
            raise KeyError(f"previous has no {name!r}{suggest(name, previous)}; collect all steps with the same `where`")
        stored[name] = ref.stored
    if all(x.grad is None for x in stored.values()):
        raise ValueError(f"no parameter has a gradient, such as {next(iter(stored))!r}; call `movement` after `backward`")
    summed: dict[str, Param] = {}
    for name, param in data.items():
        stats = {"movement": previous[name].stats["movement"]} if previous and "movement" in previous[name].stats else {}
        if (gradient := stored[name].grad) is not None:
            step = -(at_least_float32(param.weight) * at_least_float32(whole(gradient)))
            stats = {"movement": step + stats.get("movement", 0)}
        summed[name] = attrs.evolve(param, stats=stats)
    return summed


def gradients(model: nn.Module, *, where: Where) -> Data:
    """`weights`, with the statistic ``weight_grad``: the gradients that the model's parameters have, as ``backward`` left them.

    Call it in the training loop after ``backward``; `with_statistics` runs batches of its own instead. Gradients reach the pruned blocks of
    a masked model if its masks were applied with ``straight_through=True``.

    Args:
        model: any module, masked or not; it is not changed.
        where: which parameters, in what blocks.

    Raises:
        ValueError: a parameter without a gradient, or with a mask that keeps gradients from its pruned blocks; and what `weights` raises.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((1, 2), (1, 1)))
        >>> bp.apply_masks(model, {"weight": mask}, straight_through=True)(torch.tensor([[1.0, -3.0]])).sum().backward()
        >>> bp.collect.gradients(model, where=bp.linears((1, 1)))["weight"].stats["weight_grad"]
        tensor([[ 1., -3.]])
    """
    data = weights(model, where=where)
    refs = find_parameters(model, data, what="where")
    collected: dict[str, Param] = {}
    for name, param in data.items():
        ref = refs[name][0]
        if ref.mask is not None and not (ref.mask.keep if ref.mask.reached is None else ref.mask.keep | ref.mask.reached).all():
            raise ValueError(
                f"{name} {ref.shape}: its mask keeps gradients from some pruned blocks, which would look as if they were 0; before "
                "`backward`, call apply_masks(model, masks, straight_through=True)"
            )
        if not ref.is_plain or ref.stored.grad is None:
            reason = "has no gradient; call `backward` first" if ref.is_plain else "is computed by another parametrization; remove that"
            raise ValueError(f"{name} {ref.shape}: this weight {reason}, or leave it out with `excluding`")
        collected[name] = attrs.evolve(param, stats={"weight_grad": at_least_float32(whole(ref.stored.grad.detach().clone()))})
    return collected


def batchnorm_scales(model: nn.Module, *, where: Where, pairs: Mapping[str, str] | None = None, lazy: bool = False) -> Data:
    """`weights`, with the statistic ``batchnorm_scale``: the factor of a batch norm on each output channel of a convolution.

    Args:
        model: any module; it is not changed.
        where: which convolutions (or Linears), in blocks of whole filters such as ``convs((1,))``.
        pairs: the batch norm's weight for each convolution's, such as ``{"conv1.weight": "bn1.weight"}``. By default it is the next
            module that is registered after the convolution, if that is a batch norm of as many channels.
        lazy: as in `weights`.

    Raises:
        ValueError: a chosen weight without a batch norm, or with one of another number of channels; and what `weights` raises.
        KeyError: ``pairs`` with a name that the model does not have.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> bp.collect.batchnorm_scales(model, where=bp.convs((1,)))["0.weight"].stats["batchnorm_scale"].shape
        torch.Size([4, 1, 1, 1])
    """
    data = weights(model, where=where, lazy=lazy)
    pairs = _following_batchnorms(model) if pairs is None else pairs
    norms = find_parameters(model, set(pairs.values()), what="pairs")
    refs = find_parameters(model, data, what="where")
    scaled: dict[str, Param] = {}
    for name, param in data.items():
        if param.weight.ndim == 1:  # a batch norm's own weight
            scaled[name] = param
            continue
        if name not in pairs:
            raise ValueError(
                f"{name} {param.grid.shape}: no batch norm of as many channels follows it in the model; name the one that scales its "
                f"output: pairs={{{name!r}: 'bn1.weight'}}"
            )
        scale = whole(norms[pairs[name]][0].dense.detach()).clone()
        axis = 1 if isinstance(refs[name][0].owner, ConvTransposeNd) else 0  # of the output channels
        if param.grid.shape[axis] != len(scale):
            raise ValueError(
                f"{name} {param.grid.shape} has {param.grid.shape[axis]} output channels, but {pairs[name]} {tuple(scale.shape)} scales "
                f"{len(scale)}; correct `pairs`"
            )
        broadcast = scale.view([-1 if a == axis else 1 for a in range(param.weight.ndim)])
        scaled[name] = attrs.evolve(param, stats={"batchnorm_scale": broadcast})
    return scaled


def _following_batchnorms(model: nn.Module) -> dict[str, str]:
    """The batch norm's weight for each weight whose next leaf module is a batch norm of as many channels.

    The parametrizations of a module, such as its mask, are no modules of the network.
    """
    parametrizations = {inner for module in model.modules() for inner in (own_parametrizations(module) or nn.ModuleDict()).modules()}
    network = [(name, module) for name, module in model.named_modules() if module not in parametrizations]
    leaves = [(name, module) for name, module in network if parametrizations.issuperset(module.children())]
    pairs: dict[str, str] = {}
    for (name, module), (next_name, next_module) in itertools.pairwise(leaves):
        channels = getattr(module, "out_channels", getattr(module, "out_features", None))
        if isinstance(next_module, BatchNorm) and next_module.affine and next_module.num_features == channels:
            pairs[f"{name}.weight"] = f"{next_name}.weight"
    return pairs
