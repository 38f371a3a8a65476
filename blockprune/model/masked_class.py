"""The methods that a module has while it is masked.

Torch gives every parametrized module a class of its own, ``ParametrizedLinear``. While the module is masked, this class has the methods in
`_METHODS`, and its attribute `_REPLACED` holds the methods of the same names that the class had before.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockprune.core._compat import RNN_CACHES, functional_call_assigns, own_parametrizations, rebuild_rnn_caches
from blockprune.core.sharded_tensor import is_sharded
from blockprune.model.masked_weight import MaskedWeight, is_masked_shard, write_pending
from blockprune.model.parameters import ParameterRef, forget_lost, parameter_order, parameter_refs, restore_order
from blockprune.model.parametrization import MaskBlocks

_REPLACED = "_blockprune_replaced"
_UNEXPECTED = -2  # the place of the list of unexpected keys among the arguments of nn.Module's method


def has_mask_methods(owner: nn.Module) -> bool:
    """Whether the class of a module has the methods of a masked module."""
    return any(_REPLACED in vars(ancestor) for ancestor in type(owner).__mro__)


def add_mask_methods(owner: nn.Module) -> None:
    """Add the methods to the class of a parametrized module, which belongs to this module only."""
    if not has_mask_methods(owner):
        type.__setattr__(type(owner), _REPLACED, {name: vars(type(owner)).get(name) for name in _METHODS})
        for name, method in _METHODS.items():
            setattr(type(owner), name, method)


def remove_mask_methods(owner: nn.Module) -> None:
    """Restore the class of a module that is no longer masked, but is still parametrized."""
    if has_mask_methods(owner):
        for name, method in vars(type(owner))[_REPLACED].items():
            delattr(type(owner), name) if method is None else setattr(type(owner), name, method)
        delattr(type(owner), _REPLACED)


def own_class(shared: type) -> type:
    """A copy of a class."""
    return type(shared.__name__, shared.__bases__, {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")})


def refs_of_module(owner: nn.Module) -> list[ParameterRef]:
    """The parameters that belong to a module itself, not to its children."""
    return [ref for refs in parameter_refs(owner).values() for ref in refs if ref.owner is owner]


def mask_index(ref: ParameterRef) -> int:
    """The position of the mask among the parametrizations of a masked parameter."""
    return [isinstance(p, MaskBlocks) for p in ref.parametrizations or ()].index(True)


def _super(self: nn.Module) -> Any:
    """The methods that follow those of a masked module; FSDP may have put a class in front of it."""
    return super(next(ancestor for ancestor in type(self).__mro__ if _REPLACED in vars(ancestor)), self)


@attrs.frozen
class _NewObject:
    """Makes an empty object with a class of its own: if a copy shared the class, removing the copy's mask would break the original."""

    shared: type

    def __call__(self) -> Any:
        return object.__new__(own_class(self.shared))

    def __reduce__(self) -> Any:
        raise RuntimeError("a masked module cannot be pickled; save model.state_dict(), or call bp.finalize(model) first")


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    """How `copy.deepcopy` copies a masked module.

    It has no ``__deepcopy__``: wrappers that pass attributes on, such as those of torch.compile and PEFT, would pass on this method, too,
    and `copy.deepcopy` of the wrapper would return a copy of the module inside it.
    """
    _write_pending(self)
    if _own_method(self, "__deepcopy__"):
        masked = {attr: ref for attr in own_parametrizations(self) or () if (ref := ParameterRef(attr, self, attr)).mask}
        plain = _unmasked(self, masked)
        return functools.partial(_masked_copy, self, plain), (plain, {attr: ref.mask for attr, ref in masked.items()})
    get_state = _own_method(self, "__getstate__")
    state = vars(self) if get_state is None else get_state(self)
    if isinstance(state, Mapping):
        state = {key: value for key, value in state.items() if key not in RNN_CACHES}
    return _NewObject(type(self)), (), state


def _write_pending(self: nn.Module) -> None:
    """Write into the stored weights what was changed through views of the masked ones."""
    for attr in own_parametrizations(self) or ():
        _ = ParameterRef(attr, self, attr).originals


def _own_method(self: nn.Module, name: str) -> Callable[..., Any] | None:
    """A method that a user's class defines, not torch's."""
    ancestors = itertools.dropwhile(lambda ancestor: _REPLACED not in vars(ancestor), type(self).__mro__)
    definer = next((ancestor for ancestor in itertools.islice(ancestors, 1, None) if name in vars(ancestor)), object)
    return None if definer is object or definer.__module__.startswith("torch.") else vars(definer)[name]


def _unmasked(self: nn.Module, masked: Mapping[str, ParameterRef]) -> nn.Module:
    """A module of the class that the user wrote, which has the stored tensors as its own parameters, for the user's ``__deepcopy__``."""
    if other := [attr for attr in own_parametrizations(self) or () if attr not in masked or not masked[attr].is_plain]:
        raise RuntimeError(
            f"{other[0]}: the __deepcopy__ of {type(self).__name__} cannot copy a masked module with another parametrization; remove "
            "that, or the masks with bp.apply_masks(model, {})"
        )
    of_torch = vars(nn.Module())  # the names of the containers of parameters, modules and hooks
    plain: nn.Module = object.__new__(parametrize.type_before_parametrizations(self))
    vars(plain).update({k: copy.copy(v) if k in of_torch else v for k, v in vars(self).items() if k not in RNN_CACHES})
    del plain.parametrizations
    for attr, ref in masked.items():
        plain.register_parameter(attr, cast(nn.Parameter, ref.stored))
    restore_order(plain, parameter_order(self))
    if isinstance(plain, nn.RNNBase):
        rebuild_rnn_caches(plain)
    return plain


def _masked_copy(self: nn.Module, plain: nn.Module, copied: nn.Module, masks: Mapping[str, MaskBlocks]) -> nn.Module:
    if copied is plain:  # the user's ``__deepcopy__`` returns the module itself
        return self
    for attr, mask in masks.items():
        parametrize.register_parametrization(copied, attr, mask, unsafe=True)
        add_mask_methods(copied)
    if isinstance(copied, nn.RNNBase):
        rebuild_rnn_caches(copied)
    return copied


def let_copy_rnn(owner: nn.RNNBase) -> None:
    """Let `copy.deepcopy` copy a parametrized RNN, whose lists of weights may hold tensors with a gradient; masked ones can be copied."""
    if has_mask_methods(owner):
        vars(type(owner))[_REPLACED]["__deepcopy__"] = _copy_rnn  # for the time without masks
    else:
        setattr(type(owner), "__deepcopy__", _copy_rnn)  # noqa: B010 (a type checker refuses an assignment)


def _copy_rnn(self: nn.RNNBase, memo: dict[int, Any]) -> nn.RNNBase:
    new: nn.RNNBase = object.__new__(type(self))
    memo[id(self)] = new
    vars(new).update(copy.deepcopy({key: value for key, value in vars(self).items() if key not in RNN_CACHES}, memo))
    rebuild_rnn_caches(new)
    return new


def _copy(self: nn.Module) -> nn.Module:
    raise RuntimeError("a shallow copy of a masked module would share the masks with it; use copy.deepcopy(model)")


def _setstate(self: nn.Module, state: Any) -> None:
    if set_state := _own_method(self, "__setstate__"):
        set_state(self, state)
    else:
        vars(self).update(state)
    if isinstance(self, nn.RNNBase):
        rebuild_rnn_caches(self)


def _setattr(self: nn.Module, name: str, value: Any) -> None:
    """Let ``layer.weight = nn.Parameter(w)`` replace the stored dense weight, as it replaces the weight of a plain layer."""
    if isinstance(value, Tensor) and parametrize.is_parametrized(self, name) and (ref := ParameterRef(name, self, name)).mask:
        if functional_call_assigns():
            raise RuntimeError(
                f"functional_call cannot replace {name} {ref.shape} of a {type(self).__name__}, because it is masked; give the weight "
                f"under its stored name, {ref.stored_name!r} instead of {name!r} (as in model.named_parameters()), or the result of "
                "bp.masked_parameters(model, masks)"
            )
        if isinstance(value, MaskedWeight) or is_masked_shard(value):
            _assign_masked(self, ref, value)
            return
        if isinstance(value, nn.Parameter) and ref.is_plain:
            if type(value) is not nn.Parameter or tuple(value.shape) != ref.shape or not value.is_floating_point():
                raise TypeError(
                    f"{name} {ref.shape} is masked and cannot be a {type(value).__name__} {tuple(value.shape)} of {value.dtype}; "
                    "call bp.finalize(model) first, which writes the zeros into a plain model, and change that"
                )
            cast(Any, self.parametrizations)[name].original = value
            return
    _super(self).__setattr__(name, value)


def _assign_masked(self: nn.Module, ref: ParameterRef, value: Tensor) -> None:
    """Let ``layer.weight = other.weight`` do what it does in plain modules: nothing for its own weight, else share the stored one."""
    source = value.source if isinstance(value, MaskedWeight) else None
    stored = None if source is None else source.stored
    mask = cast(MaskBlocks, ref.mask)
    if any(stored is own for own in ref.originals) or (source is not None and source.keep is mask.keep):
        return
    is_same_mask = source is not None and source.grid == mask.grid and torch.equal(source.keep.to(mask.keep.device), mask.keep)
    if isinstance(stored, nn.Parameter) and ref.is_plain and is_same_mask and cast(MaskedWeight, value).is_read:
        write_pending(stored)
        cast(Any, self.parametrizations)[ref.attr].original = stored
        return
    if source is None:
        reason = "it is a DTensor"
    elif stored is None or not ref.is_plain:
        reason = "other operations compute one of the two weights"
    else:
        reason = "it is detached" if is_same_mask else "it has another mask"
    raise ValueError(
        f"{ref.attr} {ref.shape} of a {type(self).__name__} is masked and cannot become the masked weight {tuple(value.shape)} of another "
        f"module, because {reason}; tie the weights before bp.apply_masks (bp.apply_masks(model, {{}}) takes the masks off), or copy "
        "the values into layer.weight.data"
    )


def _load_from_state_dict(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Accept a checkpoint of the plain model as well: its weight becomes the dense weight, and the mask stays.

    The class's own method and the hooks before it see the dense weight under its plain name, whichever checkpoint it is. The modules inside
    this one, which have the stored weights, load theirs afterwards.
    """
    forget_lost(self)
    masked = [ref for ref in refs_of_module(self) if ref.mask]
    for ref in masked:
        stored = f"{prefix}parametrizations.{ref.attr}.original"
        if ref.is_plain and stored in state_dict:  # a checkpoint of a masked Hugging Face model has both
            state_dict[prefix + ref.attr] = state_dict.pop(stored)
    _super(self)._load_from_state_dict(state_dict, prefix, *args)
    unexpected = args[_UNEXPECTED]
    for ref in masked:
        plain, stored = prefix + ref.attr, f"{prefix}parametrizations.{ref.attr}."
        if ref.is_plain and plain in state_dict:
            state_dict[stored + "original"] = state_dict.pop(plain)
            unexpected[:] = [name for name in unexpected if name != plain]
        if ref.mask and any(key.startswith(stored + "original") for key in state_dict):
            state_dict.setdefault(f"{stored}{mask_index(ref)}.keep", ref.mask.keep)
            state_dict.setdefault(f"{stored}{mask_index(ref)}._extra_state", ref.mask.get_extra_state())


def _save_to_state_dict(self: nn.Module, *args: Any) -> None:
    _write_pending(self)
    _super(self)._save_to_state_dict(*args)


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """Raise for what ``parallelize_module`` and ``distribute_module`` do: they would lose the dense weight."""
    ref = next((ref for ref in refs_of_module(self) if ref.mask and name in (ref.attr, ref.stored_name)), None)
    if ref and is_sharded(param):
        raise ValueError(
            f"{ref.attr} {ref.shape} of a {type(self).__name__} is masked, and parallelize_module cannot shard a masked weight; call "
            "parallelize_module first and apply the masks afterwards"
        )
    _super(self).register_parameter(name, param)


_METHODS: Mapping[str, Any] = {
    "__copy__": _copy,
    "__deepcopy__": None,
    "__reduce_ex__": _reduce_ex,
    "__setstate__": _setstate,
    "__setattr__": _setattr,
    "_load_from_state_dict": _load_from_state_dict,
    "_save_to_state_dict": _save_to_state_dict,
    "register_parameter": _register_parameter,
}
