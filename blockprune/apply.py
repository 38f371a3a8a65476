"""The one imperative edge: masks onto a model and off again, through ``torch.nn.utils.parametrize``."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockprune.names import Slot, find, slots
from blockprune.parametrization import MaskBlocks, mask_blocks
from blockprune.types import BlockMask, Masks, Weights

M = TypeVar("M", bound=nn.Module)


def apply_masks(model: M, masks: Masks, weights: Weights | None = None) -> M:
    """Mask a model in place and return it: afterwards it has exactly these masks, whatever it had before.

    A masked parameter reads as zero in its pruned blocks, while its dense weight stays in storage: the same Parameter, so an
    optimizer made before stays valid, and a block that a later mask keeps comes back. All users of a tied tensor are masked. A
    mask of the same blocks is updated in place (no recompile). ``apply_masks(model, {})`` takes all masks off.

    Args:
        model: any module, masked or not.
        masks: by parameter name.
        weights: new values to write into parameters, by name (repaired weights, biases); any parameter of the model.

    Raises:
        KeyError: a name that the model does not have, or two names of one tied tensor.
        ValueError: a mask or weight of another shape than its parameter, a weight with NaN or inf.
        TypeError: masks that are not a mapping of `BlockMask`, a parameter that cannot be masked (integer, complex, sparse).
        On any error the model is as it was.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> bp.apply_masks(model, {"weight": mask}).weight[:, 2:].abs().sum().item()
        0.0
    """
    places = find(model, masks, what="masks")
    new_weights = _checked_weights(model, weights or {})
    masks = dict(zip(places, masks.values(), strict=True))  # by canonical name
    for name, mask in masks.items():
        _check(name, mask, places[name][0].stored)
    before = _attached(model)
    try:
        for slot in _masked_slots(model):
            if not any(slot.owner is s.owner and slot.attr == s.attr for shared in places.values() for s in shared):
                _unmask(slot)
        for name, shared in places.items():
            for slot in shared:
                _mask(slot, masks[name])
    except BaseException:
        for slot in _masked_slots(model):
            _unmask(slot)
        for slot, mask in before:
            _mask(slot, mask)
        raise
    with torch.no_grad():
        for slot, weight in new_weights:
            slot.stored.copy_(weight)
    return model


def read_masks(model: nn.Module) -> dict[str, BlockMask]:
    """The masks on a model, by parameter name; copies.

    Example:
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> bp.read_masks(bp.apply_masks(nn.Linear(4, 2), {"weight": mask})) == {"weight": mask}
        True
    """
    first = {name: places[0].masking for name, places in slots(model).items()}
    return {name: BlockMask(masking.keep.clone(), masking.grid) for name, masking in first.items() if masking}


def finalize(model: M) -> M:
    """A new plain model with zeros in the pruned blocks and no trace of masking; of an unmasked model, a copy.

    Example:
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> model = bp.apply_masks(nn.Linear(4, 2), {"weight": mask})
        >>> type(bp.finalize(model)), bp.finalize(model).weight[:, 2:].count_nonzero().item(), type(model).__name__
        (<class 'torch.nn.modules.linear.Linear'>, 0, 'ParametrizedLinear')
    """
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for slot in _masked_slots(plain):
            weight = slot.masked
            chain = slot.chain
            assert chain is not None
            if len(chain) > 1:  # behind another's parametrization there is no dense weight to keep: bake both
                parametrize.remove_parametrizations(slot.owner, slot.attr, leave_parametrized=True)
            else:
                slot.stored.copy_(weight)
                _unmask(slot)
    return plain


def masked_parameters(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Masked weights for ``torch.func.functional_call``: try masks on a model, masked or not, without touching it.

    The result is differentiable with respect to the model's parameters. Of a parameter that is masked already the dense weight is
    masked anew.

    Raises:
        KeyError, ValueError, TypeError: as `apply_masks`; a parameter behind another's parametrization.

    Example:
        >>> from torch.func import functional_call
        >>> model, x = nn.Linear(4, 2, bias=False), torch.ones(1, 4)
        >>> mask = bp.BlockMask(torch.tensor([[False]]), bp.BlockGrid((2, 4), (2, 4)))
        >>> functional_call(model, bp.masked_parameters(model, {"weight": mask}), x).abs().sum().item()
        0.0
    """
    found: dict[str, Tensor] = {}
    for (name, shared), mask in zip(find(model, masks, what="masks").items(), masks.values(), strict=True):
        _check(name, mask, shared[0].stored)
        for slot in shared:
            masking, chain = slot.masking, slot.chain
            keep = mask.keep.to(slot.stored.device)
            if chain is None:
                found[slot.name] = mask_blocks(slot.stored, keep, mask.grid)
                continue
            prefix = slot.name.removesuffix(slot.attr) + f"parametrizations.{slot.attr}."
            if masking is not None and masking.grid == mask.grid:
                found[f"{prefix}{len(chain) - 1}.keep"] = keep
            elif masking is not None and len(chain) == 1:
                found[f"{prefix}original"] = mask_blocks(slot.stored, keep, mask.grid)
                found[f"{prefix}0.keep"] = torch.ones_like(masking.keep)
            else:
                raise ValueError(
                    f"{name}: another parametrization ({type(chain[0]).__name__}) computes this weight; use apply_masks on a copy"
                )
    return found


def _check(name: str, mask: Any, stored: Tensor) -> None:
    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"masks[{name!r}] is a {type(mask).__name__}, not a BlockMask; build one with BlockMask(keep, BlockGrid(shape, block))"
        )
    here = f"{name}: the parameter {tuple(stored.shape)}"
    if tuple(stored.shape) != mask.grid.shape:
        raise ValueError(f"{here} has a mask for shape {mask.grid.shape}; make the masks from this model")
    if stored.layout != torch.strided or not stored.is_floating_point():
        raise TypeError(f"{here} is {stored.dtype}, {stored.layout}; only dense floating parameters can be masked")


def _checked_weights(model: nn.Module, weights: Weights) -> list[tuple[Slot, Tensor]]:
    checked = []
    for (name, (slot, *_)), weight in zip(find(model, weights, what="weights").items(), weights.values(), strict=True):
        stored = slot.stored
        if tuple(weight.shape) != tuple(stored.shape):
            raise ValueError(f"{name}: weights has shape {tuple(weight.shape)}, the parameter {tuple(stored.shape)}; give the whole weight")
        if weight.device.type != "meta" and not weight.isfinite().all():
            raise ValueError(f"{name}: weights {tuple(weight.shape)} has NaN or inf; the parameter was left as it is")
        checked.append((slot, weight.detach().clone()))
    return checked


def _masked_slots(model: nn.Module) -> list[Slot]:
    return [slot for places in slots(model).values() for slot in places if slot.masking]


def _attached(model: nn.Module) -> list[tuple[Slot, BlockMask]]:
    return [(slot, BlockMask(slot.masking.keep.clone(), slot.masking.grid)) for slot in _masked_slots(model) if slot.masking]


def _mask(slot: Slot, mask: BlockMask) -> None:
    masking, chain, owner = slot.masking, slot.chain, slot.owner
    if masking is not None and masking.grid == mask.grid:
        masking.keep.copy_(mask.keep)
        return
    keep = mask.keep.to(slot.stored.device)
    if masking is not None and chain is not None:
        chain[len(chain) - 1] = MaskBlocks(keep, mask.grid, position=masking.position)
        return
    position = list(owner._parameters).index(slot.attr) if chain is None else len(owner._parameters)
    parametrize.register_parametrization(owner, slot.attr, MaskBlocks(keep, mask.grid, position=position), unsafe=True)
    for name, method in _METHODS.items():
        setattr(type(owner), name, method)


def _unmask(slot: Slot) -> None:
    masking, chain, owner = slot.masking, slot.chain, slot.owner
    assert masking is not None
    assert chain is not None
    if len(chain) > 1:
        del chain[len(chain) - 1]
    else:
        parametrize.remove_parametrizations(owner, slot.attr, leave_parametrized=False)
        names = [name for name in owner._parameters if name != slot.attr]
        names.insert(masking.position, slot.attr)  # torch puts it last; optimizers count on the order
        owner._parameters.update({name: owner._parameters.pop(name) for name in names})
    if parametrize.is_parametrized(owner) and not any(s.masking for s in _slots_of(owner)):
        for name in _METHODS:
            delattr(type(owner), name)


def _slots_of(owner: nn.Module) -> Iterator[Slot]:
    return (Slot(attr, owner, attr) for attr in getattr(owner, "parametrizations", ()))


# torch gives each parametrized module a class of its own; while it is masked, that class has these two methods more.


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy with a class of its own: torch's shares it, and taking the mask off the copy would break the original."""
    shared = type(self)
    own = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    replica: Any = object.__new__(type(shared.__name__, shared.__bases__, own))
    memo[id(self)] = replica
    computed = ("_flat_weights", "_flat_weight_refs")  # an RNN's list of masked weights, which are no leaves and do not copy
    replica.__dict__ = copy.deepcopy({key: value for key, value in vars(self).items() if key not in computed}, memo)
    if isinstance(replica, nn.RNNBase):
        replica._init_flat_weights()
    return cast(nn.Module, replica)


def _load_from_state_dict(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Accept a checkpoint of the plain model: its weight is the dense weight, and the mask stays."""
    for slot in _slots_of(self):
        if slot.masking and slot.chain:
            stored = f"{prefix}parametrizations.{slot.attr}."
            if len(slot.chain) == 1 and prefix + slot.attr in state_dict:
                state_dict[stored + "original"] = state_dict.pop(prefix + slot.attr)
            if any(key.startswith(stored + "original") for key in state_dict):
                state_dict.setdefault(f"{stored}{len(slot.chain) - 1}.keep", slot.masking.keep)
    plain: Any = type(self).__bases__[0]
    plain._load_from_state_dict(self, state_dict, prefix, *args)


_METHODS: Mapping[str, Any] = {"__deepcopy__": _deepcopy, "_load_from_state_dict": _load_from_state_dict}
