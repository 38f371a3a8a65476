"""The first stage: what is seen of a model, and of data flowing through it."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blockprune.fold import Fold, default_forward, default_token_weights, finish, merge, run, start
from blockprune.gates import Forward, How, Loss
from blockprune.names import find
from blockprune.statistics import Statistic
from blockprune.types import Data, Param, Where, check_finite, check_kind
from blockprune.where import select

__all__ = ["Fold", "batchnorm_scales", "finish", "fold", "merge", "movement", "weights", "with_statistics"]


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
    copy = _lazy_copy if lazy else torch.clone
    data: dict[str, Param] = {}
    with torch.no_grad():
        for name, (slot, grid) in chosen.items():
            weight = slot.masked if masked else slot.dense
            check_kind(name, weight)
            if not lazy:
                check_finite(name, weight)
            data[name] = Param(copy(weight.detach()), grid)
    return data


def _lazy_copy(weight: Tensor) -> Tensor:
    try:
        return torch._lazy_clone(weight)
    except RuntimeError:  # memory that is not torch's own: numpy's, or a mapped file's, as loaders of checkpoints give
        return weight.clone()


def movement(model: nn.Module, *, where: Where, previous: Data | None = None) -> Data:
    """`weights`, with the statistic ``movement``: the previous one minus weight times gradient (Sanh et al. 2005.07683).

    Call it in the training loop after ``backward``; a parameter without a gradient adds nothing.

    Args:
        model: any module, masked or not; it is not changed.
        where: which parameters, in what blocks.
        previous: what the last call returned.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> data = bp.collect.movement(model, where=bp.linears((2, 2)))
        >>> torch.equal(data["weight"].stats["movement"], -model.weight.detach())
        True
    """
    data = weights(model, where=where)
    stored = find(model, data, what="where")
    found: dict[str, Param] = {}
    for name, param in data.items():
        gradient = stored[name][0].stored.grad
        step = torch.zeros_like(param.weight) if gradient is None else -(param.weight * gradient)
        before = previous[name].stats["movement"] if previous else 0
        found[name] = attrs.evolve(param, stats={"movement": step.to(torch.promote_types(step.dtype, torch.float32)) + before})
    return found


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
    places = find(model, data, what="where")
    found: dict[str, Param] = {}
    for name, param in data.items():
        if param.weight.ndim == 1:
            found[name] = param
            continue
        if name not in pairs:
            raise ValueError(f"{name} {param.grid.shape}: no batch norm is registered behind it; name it: pairs={{{name!r}: 'bn1.weight'}}")
        scale = norms[pairs[name]][0].dense.detach().clone()
        axis = 1 if isinstance(places[name][0].owner, nn.modules.conv._ConvTransposeNd) else 0  # of the output channels
        if param.grid.shape[axis] != len(scale):
            raise ValueError(f"{name} {param.grid.shape} and {pairs[name]} {tuple(scale.shape)} differ in channels; mend `pairs`")
        found[name] = attrs.evolve(param, stats={"batchnorm_scale": scale.view([-1 if a == axis else 1 for a in range(param.weight.ndim)])})
    return found


def with_statistics(
    model: nn.Module,
    *,
    where: Where,
    statistics: Sequence[Statistic],
    batches: Iterable[Any],
    forward: Forward = default_forward,
    loss: Loss | None = None,
    reduce: Callable[[Fold], Fold] | None = None,
    token_weights: Callable[[Any], Tensor | None] = default_token_weights,
    per_sample: str = "vmap",
    chunk: int = 8,
    progress: bool = True,
    lazy: bool = False,
) -> Data:
    """`weights`, each with statistics folded over batches; the model is run in evaluation mode and left as it was.

    Args:
        model: any module, masked or not (a masked one runs masked).
        where: which parameters, in what blocks.
        statistics: what to fold, from `blockprune.statistics`; all share one forward, and one backward where any needs it.
        batches: tensors, tuples or mappings, an iterable that is gone through once; moved to the model's device and dtype.
        forward: (model, batch) -> output; by default a tensor is passed on, a mapping spread as keywords, of a tuple the first element.
        loss: (output, batch) -> one number; by default the output's own ``loss`` (Hugging Face, given labels).
        reduce: applied to the sums before they are divided, such as `blockprune.distributed.all_reduce`.
        token_weights: batch -> how much each token counts, ``[batch, positions]``; by default an ``attention_mask`` in the batch.
        per_sample: "vmap", or "loop" for models that vmap cannot run, with the same result.
        chunk: samples at a time under vmap.
        progress: show a bar on a terminal.
        lazy: as in `weights`.

    Raises:
        ValueError: no batches, a chosen layer that the forward never calls, NaN or inf in what is seen, a loss that is not one
            number with a gradient, and what `weights` raises.
        TypeError: batches that are one tensor or mapping instead of an iterable of them.
        RuntimeError: an operation that vmap cannot run.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 2), where=bp.linears((2, 2)),
        ...     statistics=[bp.statistics.input_sq], batches=[torch.ones(8, 4), torch.zeros(8, 4)])
        >>> data["weight"].stats["input_sq"]
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    one = fold(
        model,
        where=where,
        statistics=statistics,
        batches=batches,
        forward=forward,
        loss=loss,
        token_weights=token_weights,
        per_sample=per_sample,
        chunk=chunk,
        progress=progress,
        lazy=lazy,
    )
    return finish(reduce(one) if reduce else one)


def fold(
    model: nn.Module,
    *,
    where: Where,
    statistics: Sequence[Statistic],
    batches: Iterable[Any],
    forward: Forward = default_forward,
    loss: Loss | None = None,
    token_weights: Callable[[Any], Tensor | None] = default_token_weights,
    per_sample: str = "vmap",
    chunk: int = 8,
    progress: bool = True,
    lazy: bool = False,
) -> Fold:
    """`with_statistics` before the sums are divided, for `merge` and `finish`; options and errors as there.

    Example:
        >>> model, options = nn.Linear(4, 2), dict(where=bp.linears((2, 2)), statistics=[bp.statistics.input_sq])
        >>> a, b = (bp.collect.fold(model, batches=[x], **options) for x in (torch.ones(8, 4), torch.zeros(24, 4)))
        >>> bp.collect.finish(bp.collect.merge(a, b))["weight"].stats["input_sq"]
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"batches is one {type(batches).__name__}; give an iterable of batches, such as [batch]")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches is one {type(batches).__name__}, which is no iterable; give an iterable of batches, such as [batch]")
    if per_sample not in ("vmap", "loop"):
        raise ValueError(f"per_sample={per_sample!r} must be 'vmap' or 'loop'")
    names = [s.name for s in statistics]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"statistics={names} must be at least one, each of another name")
    data = weights(model, where=where, lazy=lazy)
    slots = {name: places[0] for name, places in find(model, data, what="where").items()}
    how = How(forward, loss, token_weights, per_sample, chunk)
    return run(model, start(data, slots, statistics), batches, how, progress=progress)


def _neighbours(model: nn.Module) -> dict[str, str]:
    """Each weight's batch norm: the next leaf module, if it is one of as many channels."""
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    pairs: dict[str, str] = {}
    for (name, module), (norm, behind) in itertools.pairwise(leaves):
        channels = getattr(module, "out_channels", getattr(module, "out_features", None))
        if isinstance(behind, nn.modules.batchnorm._BatchNorm) and behind.affine and behind.num_features == channels:
            pairs[f"{name}.weight"] = f"{norm}.weight"
    return pairs
