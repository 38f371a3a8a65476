"""Penalties that push whole blocks to zero in training, their proximal maps, and ADMM. Each takes parameters and blocks from a rule.

``torch.compile`` leaves the penalties out of the compiled graph, so ``fullgraph=True`` raises an error.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor, nn

from blockprune.core.arguments import check_function, check_number
from blockprune.core.grid import BlockGrid, block_elements, pool, tiles
from blockprune.core.patterns import suggest
from blockprune.core.precision import at_least_float32, forget_casts, no_autocast
from blockprune.core.sharded_tensor import sharded_like, whole
from blockprune.core.types import Data, Masks, Param, Weights, Where, check_masks
from blockprune.model.masking import broadcastable, mask_blocks
from blockprune.model.parameters import ParameterRef, check_loaded, check_not_inference, find_parameters
from blockprune.model.running import uncompiled
from blockprune.model.selection import select

__all__ = ["Admm", "admm", "admm_penalty", "group_lasso", "proximal_group_lasso"]

M = TypeVar("M", bound=nn.Module)


@uncompiled
def group_lasso(model: nn.Module, *, where: Where, l1_ratio: float = 0.0) -> Tensor:
    """The mixed l1/l2 norm of the blocks, ``sum over blocks of sqrt(elements) * ||block||_2``; add a multiple of it to the loss.

    Source: Yuan & Lin 2006, eq. 2.1; for networks Wen et al. 1608.03665; with ``l1_ratio`` the sparse group lasso (Simon et al. 2013).
    With ``where=bp.batchnorms()`` it is the l1 norm of batch norm scales (network slimming, Liu et al. 1708.06519, eq. 1).

    Gradient descent makes weights small, but hardly ever zero; `proximal_group_lasso` makes blocks exactly zero.

    Args:
        model: any module, masked or not; weights count as the model uses them, so that pruned blocks add nothing.
        where: which parameters, in what blocks.
        l1_ratio: r in ``(1 - r) * group lasso + r * l1 norm``, 0 to 1.

    Returns:
        One number, differentiable, in at least float32.

    Raises:
        ValueError, TypeError: a rule that matches nothing, a block that does not fit, a weight that accelerate has offloaded, an
            ``l1_ratio`` outside [0, 1].

    Example:
        >>> model = nn.Linear(4, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0, 0.0, 0.0]]))
        >>> bp.regularizers.group_lasso(model, where=bp.linears((1, 2)))
        tensor(7.0711, grad_fn=<SumBackward0>)
    """
    l1_ratio = _checked_ratio(l1_ratio)
    penalties: list[Tensor] = []
    with no_autocast():
        for ref, grid in _selected(model, where, "group_lasso").values():
            weight = at_least_float32(whole(ref.masked))
            norms = torch.linalg.vector_norm(tiles(weight, grid, fill=0), dim=1)  # [blocks]; its gradient is 0 for a block of zeros
            group = (norms * _root_of_elements(grid, norms).flatten()).sum()
            penalties.append((1 - l1_ratio) * group + l1_ratio * weight.abs().sum() if l1_ratio else group)
    return _total(penalties)


def proximal_group_lasso(model: M, *, where: Where, strength: float, l1_ratio: float = 0.0) -> M:
    """Change the weights of a model in place: each becomes the ``v`` that minimises ``1/2 ||v - w||^2 + strength * group_lasso(v)``.

    Call it after the optimizer's step, with ``strength`` = learning rate times the factor of the penalty, in place of adding the penalty to
    the loss (proximal gradient descent, Parikh & Boyd 2014, section 6.5.4). Blocks whose norm is at most ``strength * sqrt(elements)``
    become zero, all others shrink. `masks_from_zeros` reads the masks. Stored values of blocks that a mask prunes stay.

    Args:
        model: any module, masked or not; it is changed and returned.
        where: which parameters, in what blocks.
        strength: the factor of the penalty, at least 0.
        l1_ratio: as in `group_lasso`. Elements are shrunk first, then blocks (Simon et al. 2013).

    Raises:
        ValueError, TypeError: as `group_lasso`; a negative strength; a weight that has NaN or inf, or that another parametrization
            computes. The model is as it was before the call.

    Example:
        >>> model = nn.Linear(4, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0, 0.1, 0.1]]))
        >>> bp.regularizers.proximal_group_lasso(model, where=bp.linears((1, 2)), strength=2.5 / 2**0.5).weight.data
        tensor([[1.5000, 2.0000, 0.0000, 0.0000]])
    """
    l1_ratio, strength = _checked_ratio(l1_ratio), check_number("strength", strength, "a number from 0 on", lowest=0)
    selected = list(_selected(model, where, "proximal_group_lasso").items())
    check_not_inference(ref for _, (ref, _) in selected)
    for name, (ref, _) in selected:
        if not ref.is_plain:
            raise ValueError(f"{name} {ref.shape}: another parametrization computes this weight; leave it out with `excluding`")
        if not whole(ref.masked.detach().isfinite().all()):
            raise ValueError(f"{name} {ref.shape}: the weight has NaN or inf, so its blocks have no norm; take a lower learning rate")
    with torch.no_grad():
        for _, (ref, grid) in selected:
            stored, masked = whole(ref.stored.detach()), whole(ref.masked.detach())
            shrunk = _shrunk(masked, grid, strength, l1_ratio)
            if ref.mask is not None:  # the rule may have different blocks than the mask
                shrunk = mask_blocks(shrunk, ref.mask.keep, ref.mask.grid) + mask_blocks(stored, ~ref.mask.keep, ref.mask.grid)
            ref.stored.copy_(sharded_like(shrunk, ref.stored))
    forget_casts()
    return model


def _shrunk(weight: Tensor, grid: BlockGrid, strength: float, l1_ratio: float) -> Tensor:
    """The proximal map of ``strength`` times the sparse group lasso: soft thresholds of the elements, then of the norms of the blocks."""
    wide = at_least_float32(weight)
    wide = wide.sign() * (wide.abs() - strength * l1_ratio).clamp_min(0) if l1_ratio else wide
    norms = pool(wide, grid, elementwise=torch.square).sqrt()  # [*size]
    threshold = strength * (1 - l1_ratio) * _root_of_elements(grid, norms)
    shape, factor = broadcastable(torch.where(norms > threshold, 1 - threshold / norms, 0), grid)
    return (wide.reshape(shape) * factor).reshape(weight.shape).to(weight.dtype)


@attrs.frozen(eq=False)
class Admm:
    """The state of ADMM between two projections, by parameter name.

    Args:
        masks: of the last projection.
        targets: the projected weights Z, with zeros in the blocks that the masks prune; in at least float32, like ``duals``.
        duals: the scaled dual variables U, the sum of all differences between weights and targets.

    Example:
        >>> state = bp.regularizers.admm(nn.Linear(4, 2), where=bp.linears((2, 2)),
        ...                              prune=lambda data: bp.allocate.per_layer(bp.metric.l2(data), 0.5))
        >>> bp.sparsity(state.masks)
        0.5
    """

    masks: Masks
    targets: Weights
    duals: Weights


def admm(model: nn.Module, *, where: Where, prune: Callable[[Data], Masks], previous: Admm | None = None) -> Admm:
    """One projection of ADMM: ``Z = prune(W + U)`` and ``U = U + W - Z`` (Boyd et al. 2011, eq. 3.6 and 3.7; Zhang et al. 1804.03294).

    Train with ``loss + admm_penalty(model, state, rho=...)`` from one projection to the next, then apply ``state.masks``.

    Args:
        model: any module, masked or not; it is not changed.
        where: which parameters, in what blocks.
        prune: data -> masks, a metric and an allocator. The weights of its data are W + U.
        previous: the result of the projection before; None at the first.

    Raises:
        ValueError, TypeError: a rule that matches nothing; masks with different blocks; ``previous`` with different shapes; a ``prune``
            that returns no masks.
        KeyError: ``prune`` returns no mask of a parameter, or ``previous`` lacks a parameter.

    Example:
        >>> model, x, y = nn.Linear(4, 2), torch.randn(8, 4), torch.randn(8, 2)
        >>> optimizer, state = torch.optim.SGD(model.parameters(), lr=0.1), None
        >>> for step in range(40):
        ...     if step % 10 == 0:
        ...         state = bp.regularizers.admm(model, where=bp.linears((2, 2)), previous=state,
        ...                                      prune=lambda data: bp.allocate.per_layer(bp.metric.l2(data), 0.5))
        ...     optimizer.zero_grad()
        ...     ((model(x) - y).square().mean() + bp.regularizers.admm_penalty(model, state, rho=1.0)).backward()
        ...     optimizer.step()
        >>> bp.sparsity(bp.read_masks(bp.apply_masks(model, state.masks)))
        0.5
    """
    check_function("prune", prune, "data -> masks, a metric and an allocator")
    if previous is not None:
        _check_state("previous", previous)
    sums: dict[str, Param] = {}
    for name, (ref, grid) in _selected(model, where, "admm").items():
        if previous is not None and name not in previous.duals:
            raise KeyError(f"previous lacks {name!r}, which `where` selects{suggest(name, previous.duals)}; give the same `where`")
        weight = at_least_float32(whole(ref.masked.detach())).clone()  # in half precision small differences would not add up
        if previous is not None:
            if tuple(previous.duals[name].shape) != ref.shape:
                raise ValueError(
                    f"{name} {ref.shape}: previous has a dual of shape {tuple(previous.duals[name].shape)}; give the state of this model"
                )
            weight = weight + previous.duals[name].to(weight)
        sums[name] = Param(weight, grid)
    masks = prune(sums)
    check_masks(masks, "the result of prune", remedy="prune must return the masks of an allocator, data -> masks")
    targets: dict[str, Tensor] = {}
    for name, param in sums.items():
        if name not in masks:
            raise KeyError(f"prune returned no mask of {name!r}{suggest(name, masks)}; it must return one for each parameter of its data")
        if masks[name].grid != param.grid:
            raise ValueError(f"{name}: prune returned a mask of {masks[name].grid}, but its data has {param.grid}")
        targets[name] = mask_blocks(param.weight, masks[name].keep.to(param.weight.device), param.grid)
    return Admm({name: masks[name] for name in sums}, targets, {name: param.weight - targets[name] for name, param in sums.items()})


@uncompiled
def admm_penalty(model: nn.Module, state: Admm, *, rho: float) -> Tensor:
    """``rho / 2 * ||W - Z + U||^2`` over all parameters of the state (Boyd et al. 2011, eq. 3.5), to add to the loss.

    Args:
        model: any module, masked or not.
        state: of the last `admm`.
        rho: the strength, at least 0.

    Raises:
        KeyError: the model does not have a parameter of the state.
        ValueError: a parameter of another shape, a negative rho.
        TypeError: a state that is none.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> state = bp.regularizers.Admm({}, {"weight": torch.zeros(1, 1)}, {"weight": torch.zeros(1, 1)})
        >>> bool(bp.regularizers.admm_penalty(model, state, rho=2.0) == model.weight.square())
        True
    """
    rho = check_number("rho", rho, "a number from 0 on", lowest=0)
    _check_state("state", state)
    penalties: list[Tensor] = []
    parameters = find_parameters(model, state.targets, what="state")
    check_loaded(model, [refs[0] for refs in parameters.values()], "regularizers.admm_penalty")
    with no_autocast():
        for (name, (ref, *_)), key in zip(parameters.items(), state.targets, strict=True):
            for shape in (tuple(state.targets[key].shape), tuple(state.duals[key].shape)):
                if ref.shape != shape:
                    raise ValueError(f"{name} {ref.shape}: the state has the shape {shape}; make it from this model")
            weight = at_least_float32(whole(ref.masked))
            penalties.append(rho / 2 * (weight - state.targets[key].to(weight) + state.duals[key].to(weight)).square().sum())
    return _total(penalties)


def _selected(model: nn.Module, where: Where, function: str) -> dict[str, tuple[ParameterRef, BlockGrid]]:
    """The parameters that a rule selects, with their blocks; raise a ValueError if accelerate has offloaded one."""
    selected = select(model, where)
    check_loaded(model, [ref for ref, _ in selected.values()], f"regularizers.{function}")
    return selected


def _root_of_elements(grid: BlockGrid, like: Tensor) -> Tensor:
    """``[*grid.size]``."""
    return block_elements(grid, device=like.device).to(like.dtype).sqrt()


def _total(penalties: list[Tensor]) -> Tensor:
    """Their sum, on the device of the first; 0 without any."""
    return torch.stack([penalty.to(penalties[0].device) for penalty in penalties]).sum() if penalties else torch.zeros((), device="cpu")


def _check_state(what: str, state: Admm) -> None:
    if not isinstance(state, Admm):
        raise TypeError(f"{what} has the type {type(state).__name__}; give what bp.regularizers.admm returned")


def _checked_ratio(l1_ratio: float) -> Any:
    return check_number("l1_ratio", l1_ratio, "a number from 0 (group lasso) to 1 (l1 norm)", lowest=0, highest=1)
