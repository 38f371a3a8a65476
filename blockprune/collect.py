"""The first stage: what is seen of a model."""

import itertools
from collections.abc import Mapping

import attrs
import torch
from torch import nn

from blockprune.names import find
from blockprune.types import Data, Param, Where, check_finite, check_kind
from blockprune.where import select


def weights(model: nn.Module, *, where: Where, masked: bool = False, lazy: bool = False) -> Data:
    """The weights that a rule chooses, by parameter name, each with its blocks.

    Args:
        model: any module, masked or not; it is not changed.
        where: which parameters, in what blocks, such as ``linears((4, 4))``.
        masked: of an already masked parameter, read the weight as the model uses it (zeros in pruned blocks) instead of
            the dense weight in storage. Dense, the default, lets a pruned block come back; `restrict` forbids it.
        lazy: share memory with the model until either side writes (copy on write) and leave NaN and inf for the scores to show,
            instead of copying and looking. Only writes that torch makes count, so this is for data that does not outlive a call;
            `Pipeline` uses it for its own.

    Raises:
        ValueError: a rule that matches nothing, a block that does not fit, a weight with NaN or inf, or on the meta device.
        TypeError: an integer, complex, sparse or quantized weight.

    Example:
        >>> data = bp.collect.weights(nn.Linear(4, 6), where=bp.linears((2, 2)))
        >>> data["weight"].weight.shape, data["weight"].grid.size
        (torch.Size([6, 4]), (3, 2))
    """
    chosen = select(model, where)
    copy = torch._lazy_clone if lazy else torch.clone
    data: dict[str, Param] = {}
    with torch.no_grad():
        for name, (slot, grid) in chosen.items():
            weight = slot.masked if masked else slot.dense
            check_kind(name, weight)
            if not lazy:
                check_finite(name, weight)
            data[name] = Param(copy(weight.detach()), grid)
    return data


def batchnorm_scales(model: nn.Module, *, where: Where, pairs: Mapping[str, str] | None = None, lazy: bool = False) -> Data:
    """`weights`, with the statistic ``batchnorm_scale``: the scale that a batch norm gives to each output channel of a convolution.

    Args:
        model: any module; it is not changed.
        where: which convolutions (or Linears), in blocks of whole filters such as ``convs((1,))``.
        pairs: names of the weights that belong together, such as ``{"conv1.weight": "bn1.weight"}``; by default the batch
            norm of as many channels that is registered right behind the convolution.
        lazy: as in `weights`.

    Raises:
        ValueError: a chosen weight that no batch norm scales, and what `weights` raises.
        KeyError: ``pairs`` with a name the model does not have.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> bp.collect.batchnorm_scales(model, where=bp.convs((1,)))["0.weight"].stats["batchnorm_scale"].shape
        torch.Size([4, 1, 1, 1])
    """
    data = weights(model, where=where, lazy=lazy)
    pairs = _neighbours(model) if pairs is None else pairs
    norms = find(model, set(pairs.values()), what="pairs")
    found: dict[str, Param] = {}
    for name, param in data.items():
        if param.weight.ndim == 1:
            found[name] = param
            continue
        if name not in pairs:
            raise ValueError(f"{name} {param.grid.shape}: no batch norm is registered behind it; name it: pairs={{{name!r}: 'bn1.weight'}}")
        scale = norms[pairs[name]][0].dense.detach().clone()
        (slot,) = find(model, [name], what="where")[name]
        axis = 1 if isinstance(slot.owner, nn.modules.conv._ConvTransposeNd) else 0  # of the output channels
        if param.grid.shape[axis] != len(scale):
            raise ValueError(f"{name} {param.grid.shape} and {pairs[name]} {tuple(scale.shape)} differ in channels; mend `pairs`")
        found[name] = attrs.evolve(param, stats={"batchnorm_scale": scale.view([-1 if a == axis else 1 for a in range(param.weight.ndim)])})
    return found


def _neighbours(model: nn.Module) -> dict[str, str]:
    """Each weight's batch norm: the next leaf module, if it is one of as many channels."""
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    pairs: dict[str, str] = {}
    for (name, module), (norm, behind) in itertools.pairwise(leaves):
        channels = getattr(module, "out_channels", getattr(module, "out_features", None))
        if isinstance(behind, nn.modules.batchnorm._BatchNorm) and behind.affine and behind.num_features == channels:
            pairs[f"{name}.weight"] = f"{norm}.weight"
    return pairs
