"""The methods that a module has while it is masked.

Torch gives every parametrized module a class of its own, ``ParametrizedLinear``. While the module is masked, this class has the methods in
`_METHODS`, and its attribute `_REPLACED` holds the methods of the same names that the class had before.
"""

import copy
from collections.abc import Mapping
from typing import Any, cast

import attrs
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockprune.core._compat import RNN_CACHES, rebuild_rnn_caches
from blockprune.core.sharded_tensor import is_sharded
from blockprune.model.parameters import ParameterRef, parameter_refs
from blockprune.model.parametrization import MaskBlocks

_REPLACED = "_blockprune_replaced"


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
    return _NewObject(type(self)), (), {key: value for key, value in vars(self).items() if key not in RNN_CACHES}


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


def _setstate(self: nn.Module, state: Mapping[str, Any]) -> None:
    vars(self).update(state)
    if isinstance(self, nn.RNNBase):
        rebuild_rnn_caches(self)


def _setattr(self: nn.Module, name: str, value: Any) -> None:
    """Let ``layer.weight = nn.Parameter(w)`` replace the stored dense weight, as it replaces the weight of a plain layer."""
    if isinstance(value, nn.Parameter) and parametrize.is_parametrized(self, name):
        ref = ParameterRef(name, self, name)
        if ref.mask and ref.is_plain:
            if type(value) is not nn.Parameter or tuple(value.shape) != ref.shape or not value.is_floating_point():
                raise TypeError(
                    f"{name} {ref.shape} is masked and cannot be a {type(value).__name__} {tuple(value.shape)} of {value.dtype}; "
                    "call bp.finalize(model) first, which writes the zeros into a plain model, and change that"
                )
            cast(Any, self.parametrizations)[name].original = value
            return
    _super(self).__setattr__(name, value)


def _load_from_state_dict(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Accept a checkpoint of the plain model as well: its weight becomes the dense weight, and the mask stays."""
    for ref in refs_of_module(self):
        if ref.mask and ref.parametrizations:
            stored = f"{prefix}parametrizations.{ref.attr}."
            plain: Tensor | None = state_dict.pop(prefix + ref.attr, None) if ref.is_plain else None
            if plain is not None:
                state_dict.setdefault(stored + "original", plain)  # a checkpoint of a masked Hugging Face model has both
            if any(key.startswith(stored + "original") for key in state_dict):
                state_dict.setdefault(f"{stored}{mask_index(ref)}.keep", ref.mask.keep)
                state_dict.setdefault(f"{stored}{mask_index(ref)}._extra_state", ref.mask.get_extra_state())
    _super(self)._load_from_state_dict(state_dict, prefix, *args)


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
    "register_parameter": _register_parameter,
}
