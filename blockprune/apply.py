"""The one imperative edge: masks onto a model and off again, through ``torch.nn.utils.parametrize``."""

import copy
from collections.abc import Mapping
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
    checked = _checked_masks(model, masks)
    new_weights = _checked_weights(model, {} if weights is None else weights)
    before = [(slot, BlockMask(masking.keep.clone(), masking.grid)) for slot, masking in _masked_slots(model)]
    before.sort(key=lambda item: list(item[0].owner.parametrizations).index(item[0].attr))  # type: ignore[arg-type]  # as they came
    wanted = {(id(slot.owner), slot.attr) for _, _, shared in checked for slot in shared}
    with torch.no_grad():
        old_weights = [(slot, slot.stored.detach().clone()) for slot, _ in new_weights]
        written: list[Slot] = []
        try:
            for slot, _ in before:
                if (id(slot.owner), slot.attr) not in wanted:
                    _unmask(slot)
            for _, mask, shared in checked:
                for slot in shared:
                    _mask(slot, mask)
            for slot, weight in new_weights:
                slot.stored.copy_(weight)
                written.append(slot)
        except BaseException:
            for slot, _ in _masked_slots(model):
                _unmask(slot)
            for slot, mask in before:
                _mask(slot, mask)
            for slot, weight in old_weights[: len(written)]:
                slot.stored.copy_(weight)
            raise
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
        for slot, masking in _masked_slots(plain):
            if slot.alone:
                slot.stored.copy_(slot.masked)
                _unmask(slot)
            else:  # behind another's parametrization there is no stored weight to write to: bake both
                weight, trained = slot.masked.detach().clone(), any(p.requires_grad for p in slot.originals)
                parametrize.remove_parametrizations(slot.owner, slot.attr, leave_parametrized=True)
                delattr(slot.owner, slot.attr)
                slot.owner.register_parameter(slot.attr, nn.Parameter(weight, requires_grad=trained))
                _reorder(slot.owner, masking.order)
    return plain


def masked_parameters(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Masked weights for ``torch.func.functional_call``: try masks on a model, masked or not, without touching it.

    The result is differentiable with respect to the model's parameters. Of a parameter that is masked already the dense weight is
    masked anew. With a module used under two names pass ``tie_weights=False`` to `functional_call`: torch would leave its tensors in
    it. Inside ``torch.compile(fullgraph=True)`` compile the `functional_call` and make the masks outside.

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
    for name, mask, shared in _checked_masks(model, masks):
        keep = mask.keep.to(shared[0].stored.device).clone()
        weight = mask_blocks(shared[0].stored, keep, mask.grid) if shared[0].alone else None  # one for all that are tied
        for slot in shared:
            masking, chain = slot.masking, slot.chain
            prefix = slot.name if chain is None else f"{slot.name.removesuffix(slot.attr)}parametrizations.{slot.attr}."
            if chain is not None and masking is not None and masking.grid == mask.grid:
                found[f"{prefix}{list(chain).index(masking)}.keep"] = keep
            elif weight is None:
                raise ValueError(f"{name}: another parametrization computes this weight {slot.shape}; use apply_masks on a copy")
            elif masking is None:
                found[prefix] = weight
            else:
                found |= {f"{prefix}original": weight, f"{prefix}0.keep": torch.ones_like(masking.keep)}
    return found


def _checked_masks(model: nn.Module, masks: Masks) -> list[tuple[str, BlockMask, list[Slot]]]:
    """Each mask with the parameter's canonical name and all places that share it."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks is a {type(masks).__name__}, not a mapping from parameter names to BlockMask")
    places = find(model, masks, what="masks")
    checked = [(name, mask, _once(shared)) for (name, shared), mask in zip(places.items(), masks.values(), strict=True)]
    for name, mask, shared in checked:
        _check(name, mask, shared[0])
    return checked


def _check(name: str, mask: Any, slot: Slot) -> None:
    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"masks[{name!r}] is a {type(mask).__name__}, not a BlockMask; build one with BlockMask(keep, BlockGrid(shape, block))"
        )
    here, stored = f"{name}: the parameter {slot.shape}", slot.stored
    if slot.shape != mask.grid.shape:
        raise ValueError(f"{here} has a mask for shape {mask.grid.shape}; make the masks from this model")
    if stored.layout != torch.strided or not stored.is_floating_point():
        raise TypeError(f"{here} is {stored.dtype}, {stored.layout}; only dense floating parameters can be masked")
    if getattr(slot.owner, "sparse", False):
        raise TypeError(f"{here} has sparse gradients, which a masked read cannot pass on; build the layer with sparse=False")


def _checked_weights(model: nn.Module, weights: Weights) -> list[tuple[Slot, Tensor]]:
    """Each new weight as it will be stored."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights is a {type(weights).__name__}, not a mapping from parameter names to tensors")
    checked = []
    for (name, (slot, *_)), weight in zip(find(model, weights, what="weights").items(), weights.values(), strict=True):
        here, stored = f"{name}: the parameter {slot.shape}", slot.stored
        if not slot.alone:
            raise ValueError(f"{here} is computed by another parametrization, so weights cannot write it; remove that first")
        if not isinstance(weight, Tensor) or weight.is_complex() or weight.layout != torch.strided:
            given = f"{weight.dtype}, {weight.layout}" if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"{here} cannot take weights that are {given}; give a dense real tensor of its shape")
        if tuple(weight.shape) != slot.shape:
            raise ValueError(f"{here} cannot take weights of shape {tuple(weight.shape)}; give the whole weight")
        if weight.device.type == "meta" and stored.device.type != "meta":
            raise ValueError(f"{here} cannot take weights on the meta device, which have no numbers; give real ones")
        new = weight.detach().to(stored.device, stored.dtype, copy=True)
        if new.device.type != "meta" and not new.isfinite().all():
            raise ValueError(f"{here} cannot take weights with NaN or inf (as {stored.dtype}); repair them")
        checked.append((slot, new))
    return checked


def _masked_slots(model: nn.Module) -> list[tuple[Slot, MaskBlocks]]:
    return [(slot, slot.masking) for places in slots(model).values() for slot in _once(places) if slot.masking]


def _once(places: list[Slot]) -> list[Slot]:
    """A module that is used under two names is one place."""
    return list({(id(slot.owner), slot.attr): slot for slot in reversed(places)}.values())[::-1]


def _mask(slot: Slot, mask: BlockMask) -> None:
    masking, chain, owner = slot.masking, slot.chain, slot.owner
    if masking is not None and masking.grid == mask.grid:
        if masking.keep.is_inference():
            masking.keep = _new_masking(mask, slot, masking.order).keep
        else:
            masking.keep.copy_(mask.keep)
        return
    if masking is not None and chain is not None:
        chain[list(chain).index(masking)] = _new_masking(mask, slot, masking.order)
        return
    others = (other.masking.order for other in _own_slots(owner) if other.masking)
    order = next(others, (*owner._parameters, *getattr(owner, "parametrizations", ())))
    if parametrize.is_parametrized(owner) and not _has_methods(owner):
        owner.__class__ = _class_of_its_own(owner)  # a copy that torch made shares it
    parametrize.register_parametrization(owner, slot.attr, _new_masking(mask, slot, order), unsafe=True)
    if not _has_methods(owner):
        type.__setattr__(type(owner), _BEFORE, {name: vars(type(owner)).get(name) for name in _METHODS})
        for name, method in _METHODS.items():
            setattr(type(owner), name, method)


def _new_masking(mask: BlockMask, slot: Slot, order: tuple[str, ...]) -> MaskBlocks:
    device = slot.stored.device
    with torch.inference_mode(False):  # a mask made in it could not be changed outside it
        return MaskBlocks(mask.keep if device.type == "meta" else mask.keep.to(device), mask.grid, order=order)


def _unmask(slot: Slot) -> None:
    masking, chain, owner = slot.masking, slot.chain, slot.owner
    assert masking is not None
    assert chain is not None
    if slot.alone:
        parametrize.remove_parametrizations(owner, slot.attr, leave_parametrized=False)
        _reorder(owner, masking.order)
    else:
        del chain[list(chain).index(masking)]
    if parametrize.is_parametrized(owner) and not any(other.masking for other in _own_slots(owner)):
        for name, method in vars(type(owner)).get(_BEFORE, {}).items():
            delattr(type(owner), name) if method is None else setattr(type(owner), name, method)
        if _has_methods(owner):
            delattr(type(owner), _BEFORE)


def _reorder(owner: nn.Module, order: tuple[str, ...]) -> None:
    """Torch puts a parameter that comes back last; optimizers count on the order."""
    for name in sorted(owner._parameters, key=lambda attr: order.index(attr) if attr in order else len(order)):
        owner._parameters[name] = owner._parameters.pop(name)


def _own_slots(owner: nn.Module) -> list[Slot]:
    return [slot for places in slots(owner).values() for slot in places if slot.owner is owner]


# torch gives each parametrized module a class of its own; while it is masked, that class has two methods more.
_BEFORE = "_blockprune_before"


def _has_methods(owner: nn.Module) -> bool:
    return _BEFORE in vars(type(owner))


def _class_of_its_own(owner: nn.Module) -> type:
    shared = type(owner)
    return type(shared.__name__, shared.__bases__, {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")})


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy with a class of its own: torch's shares it, and taking the mask off the copy would break the original."""
    replica: Any = object.__new__(_class_of_its_own(self))
    memo[id(self)] = replica
    computed = ("_flat_weights", "_flat_weight_refs")  # an RNN's list of masked weights, which are no leaves and do not copy
    replica.__dict__ = copy.deepcopy({key: value for key, value in vars(self).items() if key not in computed}, memo)
    if isinstance(replica, nn.RNNBase):
        replica._init_flat_weights()
    return cast(nn.Module, replica)


def _load_from_state_dict(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Accept a checkpoint of the plain model: its weight is the dense weight, and the mask stays."""
    for slot in _own_slots(self):
        if slot.masking and slot.chain:
            stored = f"{prefix}parametrizations.{slot.attr}."
            if slot.alone and prefix + slot.attr in state_dict:
                state_dict[stored + "original"] = state_dict.pop(prefix + slot.attr)
            if any(key.startswith(stored + "original") for key in state_dict):
                state_dict.setdefault(f"{stored}{list(slot.chain).index(slot.masking)}.keep", slot.masking.keep)
    plain: Any = type(self).__bases__[0]
    plain._load_from_state_dict(self, state_dict, prefix, *args)


_METHODS: Mapping[str, Any] = {"__deepcopy__": _deepcopy, "_load_from_state_dict": _load_from_state_dict}
