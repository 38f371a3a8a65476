"""A device without hardware: tensors of the CPU that say they are "away", and refuse to be mixed with others as a GPU's would.

Every operation runs on the CPU, so its result is the CPU's; what a test finds is a forgotten device.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
AWAY = "away"
PICK = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}  # their indices may be here


class Away(Tensor):
    """A tensor that is elsewhere, and where it really is."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "Away":
        how = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype, "layout": here.layout}
        away = Tensor._make_wrapper_subclass(cls, here.size(), device=f"{AWAY}:0", requires_grad=here.requires_grad, **how)
        away.here = here
        return away

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = Away(self.here.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=self.requires_grad)
        return memo.setdefault(id(self), copied)

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def tolist(self) -> Any:
        return self.here.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Away({self.here})"


class _Factories(TorchDispatchMode):
    """Operations without a tensor of there that ask for one, such as ``torch.zeros(3, device="away")``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ours = _asked(kwargs) == AWAY or any(isinstance(t, Away) for t in tree_leaves((args, kwargs)))
        return _run(func, args, kwargs) if ours else func(*args, **kwargs)


def _asked(kwargs: Mapping[str, Any]) -> str:
    return "" if kwargs.get("device") is None else torch.device(kwargs["device"]).type


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, Away)]
    picked = {id(t) for t in tree_leaves(args[1])} if func in PICK else set()
    one_number = torch.Tag.pointwise in func.tags and not func._schema.is_mutable  # numbers may be here too
    here = [t for t in tensors if not (isinstance(t, Away) or id(t) in picked or (t.ndim == 0 and (one_number or t is not args[0])))]
    wanted = bool(there)
    if (there or _asked(kwargs) == AWAY) and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: the generator is on the CPU")
    if asked := _asked(kwargs):
        wanted, kwargs = asked == AWAY, {**kwargs, "device": "cpu"}
    elif func is aten.copy_.default:
        wanted = isinstance(args[0], Away)
    elif there and here:
        raise RuntimeError(f"{func}: all tensors must be on one device, but {[tuple(t.shape) for t in here]} are on the CPU")
    found = func(*tree_map_only(Away, lambda t: t.here, args), **tree_map_only(Away, lambda t: t.here, kwargs))
    known = {id(t.here): t for t in there} | {id(t): t for t in tensors if not isinstance(t, Away)}  # what was changed in place
    return tree_map_only(Tensor, lambda t: known[id(t)] if id(t) in known else Away(t) if wanted else t, found)


def _empty(func: Any) -> Callable[..., Tensor]:
    def empty(*args: Any, **kwargs: Any) -> Tensor:
        given = {key: value for key, value in kwargs.items() if value is not None and key != "pin_memory"}
        return Away(func(*args, **{**given, "device": "cpu"}))

    return empty


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    ends = [t.here if isinstance(t, Away) else t for t in (source, target)]
    ends[1].copy_(ends[0])
    return target


_kept: list[torch.library.Library] = []


def _register() -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # noqa: PLC0415 (torch 2.10 and later)

    _setup_privateuseone_for_python_backend(AWAY)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", _empty(aten.empty_strided.default), "PrivateUse1")
    library.impl("empty.memory_format", _empty(aten.empty.memory_format), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _kept.append(library)


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Where the device "away" can be used."""
    if not _kept:
        _register()
    with _Factories():
        yield


def moved(model: nn.Module) -> nn.Module:
    """A copy of a model there, what is tied tied."""
    new: dict[int, Tensor] = {}
    model = copy.deepcopy(model)
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if t is not None and id(t) not in new:
                    away = Away(t.detach().clone())
                    new[id(t)] = nn.Parameter(away, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else away
                if t is not None:
                    held[name] = new[id(t)]  # type: ignore[assignment]
    return model
