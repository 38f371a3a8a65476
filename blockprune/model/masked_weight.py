"""`MaskedWeight`, the tensor that a masked parameter reads as: a change of it in place also changes the stored weight."""

import copy
import functools
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn

from blockprune.core._compat import SWAP_CHECK, disabled_torch_function, version_counter, without_base
from blockprune.core.grid import BlockGrid, expand
from blockprune.core.sharded_tensor import is_sharded
from blockprune.model.masking import mask_blocks


@attrs.define(eq=False)
class _Source:
    """What a masked weight was computed from, and its memory. All tensors that share this memory and can be written share this record."""

    stored: Tensor | None  # None: other operations compute the weight, so there is no stored tensor of its values
    keep: Tensor
    grid: BlockGrid
    values: Tensor  # a plain tensor in the memory of the masked weight, which counts the writes into it
    versions: tuple[int, ...] = ()  # of `stored` and `keep` when the masked weight was computed from them
    written_version: int = 0  # of `values` when it was last equal to what is stored; -1: changes of it do not count
    is_shared: bool = False  # whether tensors that no graph of gradients holds may be written
    lost_version: int = -1  # of `values` when an error said that a change is lost

    def record(self) -> None:
        self.versions, self.written_version = self.current_versions(), _version(self.values)

    def current_versions(self) -> tuple[int, ...]:
        return tuple(_version(x) for x in (self.stored, self.keep) if x is not None)

    def masked(self, weight: Tensor) -> Tensor:
        return mask_blocks(weight, self.keep.to(weight.device), self.grid)

    def merged(self, written: Tensor, stored: Tensor) -> Tensor:
        """The written values, and the stored ones where the mask has its zeros."""
        keep = expand(self.keep.to(written.device), self.grid)
        return torch.where(keep | (written != 0), written, stored.to(written))

    def write_back(self) -> None:
        """Change the stored weight as the memory of the masked weight was changed.

        Raises:
            RuntimeError: another parametrization computes the weight, or the stored weight or the mask has changed since it was read.
        """
        if self.is_unchanged():
            return
        stored = self.writable()
        with torch.no_grad():
            stored.copy_(self.merged(self.values, stored.detach()))
        self.record()

    def is_unchanged(self) -> bool:
        if not self.values.is_inference():
            return self.written_version in (version_counter(self.values), -1)
        if self.stored is None or self.is_outdated():
            return True  # whether it was changed cannot be known
        return torch.equal(self.values, self.masked(self.stored.detach()))

    def is_outdated(self) -> bool:
        return self.versions != self.current_versions()

    def writable(self) -> Tensor:
        """The stored tensor; raise if a change cannot be passed on to it."""
        if self.stored is None:
            raise RuntimeError(
                f"a change in place of this masked weight {self.grid.shape} would be lost, because other operations compute the "
                "weight (another parametrization, or functional_call); change the tensors that it is computed from, or call "
                "bp.finalize(model) first"
            )
        if self.is_outdated():
            raise RuntimeError(
                f"a change in place of this masked weight {self.grid.shape} would be lost, because its stored values or its mask "
                "have changed since it was read; read it again, as layer.weight, before you change it"
            )
        return self.stored

    def __del__(self) -> None:
        if sys.is_finalizing() or not hasattr(self, "values"):
            return  # the process ends, and with it the stored weight
        if self.values.is_inference():
            return
        try:
            self.write_back()
        except RuntimeError as error:  # Python ignores exceptions here
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)


_FOLLOWED: dict[int, list[weakref.ref[_Source]]] = {}  # by the id of the stored tensor: what may have been written since it was read
_OUTDATED = 16  # how many reads from before a change of the stored tensor are followed, so that a write through a view of them raises


def _follow(source: _Source) -> None:
    """Let `write_pending` see the writes of this read, and of earlier ones, but for those that live in graphs of gradients."""
    followed = source.stored if source.stored is not None else source.keep
    key = id(followed)
    earlier = _FOLLOWED.get(key, [])
    if earlier and not ((last := earlier[-1]()) and last.is_shared):  # all before it are shared
        earlier = earlier[:-1]
    elif len(earlier) > _OUTDATED and last and last.versions != source.versions:
        current = [reference for reference in earlier[:-_OUTDATED] if (other := reference()) and not other.is_outdated()]
        earlier = current + earlier[-_OUTDATED:]

    def forget(reference: weakref.ref[_Source]) -> None:
        remaining = [other for other in _FOLLOWED.get(key, ()) if other is not reference]
        if remaining:
            _FOLLOWED[key] = remaining
        else:
            _FOLLOWED.pop(key, None)

    _FOLLOWED[key] = [*earlier, weakref.ref(source, forget)]


def write_pending(followed: Tensor, *, report: bool = True) -> None:
    """Write into a stored weight what was changed through views of its reads that are still in use.

    Args:
        followed: the stored weight; the mask, if other operations compute the weight.
        report: whether to raise for a change that is lost, once; it is False where a state is loaded over it.

    Raises:
        RuntimeError: the stored weight or the mask has changed since the weight was read.
    """
    for reference in _FOLLOWED.get(id(followed), ()):
        if (source := reference()) is None or source.is_unchanged() or source.lost_version == _version(source.values):
            continue
        try:
            source.write_back()
        except RuntimeError as error:
            source.lost_version = _version(source.values)
            if report:
                raise RuntimeError(
                    f"{error}. The change was made through a view, and it is not stored: the weight keeps its stored values, which the "
                    "next read gives (this is said once for each such change)"
                ) from None


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else version_counter(x)


class MaskedWeight(Tensor):
    """The value of a masked parameter; it passes changes in place on to the stored weight.

    Torch computes ``layer.weight`` of a masked layer anew at each read, and would lose ``layer.weight.data.mul_(2)``,
    ``nn.init.zeros_(layer.weight)``, ``layer.reset_parameters()`` or a merged adapter. This class writes such changes into the stored
    weight: the entries that the mask keeps, and pruned entries that are no longer zero. All other operations return plain tensors. This
    tensor keeps what was written; reading the weight again gives zeros in the pruned blocks.

    A change through an ``out`` argument, an operation on lists (``torch._foreach_mul_``), or a view of this tensor, of its ``data`` or of
    its ``detach()`` reaches the stored weight when the weight is read again, when the model is copied, finalized, saved or pruned, or when
    the view is deleted. An optimizer does not wait for it: a step before that makes the next read raise once, or warn that it is lost.
    A view of a read that requires gradients is noticed until the weight is read again, and then when it is deleted.
    Changes through a memory address (DLPack, ``data_ptr``, ``untyped_storage()``), through the ``data``, ``detach()``, ``apply_`` or
    ``map_`` of a view, through a view of another type or in inference mode, through ``nn.Parameter(weight.data)``, and within a compiled
    function, cannot be noticed: they are lost. NumPy arrays of the weight are read-only, and ``torch.utils.swap_tensors`` raises.

    ``requires_grad``, ``grad`` and hooks are those of the stored parameter.
    """

    source: _Source
    is_read: bool  # whether it stands for the parameter; not what `data` and `detach` return

    __torch_function__ = disabled_torch_function

    @staticmethod
    def read(masked: Tensor, *, stored: Tensor | None, keep: Tensor, grid: BlockGrid) -> "MaskedWeight":
        """A masked weight, just computed, that belongs to this stored tensor."""
        masked = without_base(masked)
        source = _Source(stored, keep, grid, Tensor.detach(masked), is_shared=not masked.requires_grad)
        source.record()
        _follow(source)
        return _with_source(masked, source, is_read=True)

    @property
    def data(self) -> "MaskedWeight":
        """The values without autograd, in the same memory."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape:
            raise ValueError(
                f"the data of a masked weight {tuple(self.shape)} cannot be a tensor of shape {tuple(value.shape)}; give the whole weight, "
                "or call bp.finalize(model) first to change its shape"
            )
        if value.device.type != "meta" and value.data_ptr() == self.data_ptr():
            return  # `weight.data += x` assigns the tensor that it has changed already
        former = self.source
        if not self.is_read:  # as of a plain weight: this tensor has other memory from now on, and the weight stays
            del self.source, self.is_read
            self.__class__ = Tensor  # type: ignore[assignment]
            _assign_data(self, value)
            return
        stored = former.writable()
        with torch.no_grad():
            stored.data = former.merged(value.detach().as_subclass(Tensor), stored.detach())
            _assign_data(self, former.masked(stored.detach()))
        former.versions, former.written_version = (), -1  # what stays in the former memory is the weight no more
        self.source = _Source(stored, former.keep, former.grid, Tensor.detach(self).as_subclass(Tensor), is_shared=former.is_shared)
        self.source.record()
        _follow(self.source)

    def detach(self) -> "MaskedWeight":
        """The values without autograd, in the same memory."""
        self.source.is_shared = True
        return _with_source(Tensor.detach(self), self.source, is_read=False)

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array, because torch cannot notice a change of it."""
        array = Tensor.numpy(self, force=force)
        array.flags.writeable = False
        return array

    def _parameter(self, change: str) -> Tensor:
        """The tensor that has the gradient: the stored parameter, or this tensor if it is detached; raise if several compute the weight."""
        if not self.is_read:
            return self
        if self.source.stored is None:
            raise RuntimeError(
                f"{change} of this masked weight {tuple(self.shape)} would be lost, because other operations compute the weight; use the "
                "stored parameters that it is computed from (their names are in model.named_parameters())"
            )
        return self.source.stored

    @property
    def requires_grad(self) -> bool:
        """Whether the stored parameter gets gradients, also of a read under ``no_grad``; setting it sets it for that parameter."""
        is_own = not self.is_read or self.source.stored is None
        return bool(_REQUIRES_GRAD.__get__(self if is_own else self.source.stored))

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        _REQUIRES_GRAD.__set__(self._parameter("a change of requires_grad"), value)

    def requires_grad_(self, requires_grad: bool = True) -> "MaskedWeight":
        """Set ``requires_grad`` of the stored parameter."""
        self.requires_grad = requires_grad
        return self

    @property
    def grad(self) -> Tensor | None:
        """The gradient of the stored parameter; of this tensor after ``retain_grad()``."""
        has_own = not self.is_read or self.source.stored is None or self.retains_grad
        return cast("Tensor | None", _GRAD.__get__(self if has_own else self.source.stored))

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        _GRAD.__set__(self._parameter("a gradient"), value)

    @grad.deleter
    def grad(self) -> None:
        _GRAD.__delete__(self._parameter("a change of the gradient"))

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """Call a function with each gradient of the stored parameter."""
        return Tensor.register_hook(self._parameter("a hook"), hook)  # type: ignore[no-untyped-call]

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """Call a function whenever the stored parameter has got a gradient."""
        return Tensor.register_post_accumulate_grad_hook(self._parameter("a hook"), hook)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def _become_parameter(self, _: bool) -> None:
        del self.source, self.is_read
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    # nn.Parameter(weight) sets this attribute; the result is then a plain nn.Parameter with the same memory
    _is_param = property(lambda self: False, _become_parameter)


_REQUIRES_GRAD: Any = Tensor.requires_grad
_GRAD: Any = Tensor.grad
_assign_data: Callable[[Tensor, Tensor], None] = Tensor.data.__set__  # type: ignore[attr-defined]


def _with_source(masked: Tensor, source: _Source, *, is_read: bool) -> MaskedWeight:
    masked.__class__ = MaskedWeight  # `as_subclass` would make a view, which may be deleted before the views of it
    weight = cast(MaskedWeight, masked)
    weight.source, weight.is_read = source, is_read
    return weight


def _passed_on(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of Tensor that changes it in place, which also changes the stored weight."""

    @functools.wraps(method, assigned=("__name__",))
    def change(self: MaskedWeight, *args: Any, **kwargs: Any) -> Any:
        if _REQUIRES_GRAD.__get__(self) and torch.is_grad_enabled():
            raise RuntimeError(
                f"a masked weight {tuple(self.shape)} that requires gradients cannot be changed in place by {method.__name__}; "
                "change it within torch.no_grad()"
            )
        self.source.writable()
        values = self.source.values
        version, place = _version(values), (self.data_ptr(), self.shape, self.stride())
        result = method(self, *args, **kwargs)
        if self.is_read and place != (self.data_ptr(), self.shape, self.stride()):
            raise RuntimeError(
                f"{method.__name__} gives this masked weight {tuple(place[1])} other memory or another shape, which the layer does not "
                "read; assign values of its shape, weight.data = values, or call bp.finalize(model) first"
            )
        if version == _version(values) and not values.is_inference():  # torch does not count what `apply_` and `map_` write
            torch.autograd.graph.increment_version(values)
        self.source.write_back()
        return result

    return change


def _not_swapped(self: Tensor) -> int:
    """Called by ``torch.utils.swap_tensors`` before it changes anything: the layer would not read the other tensor."""
    raise RuntimeError(
        f"torch.utils.swap_tensors cannot swap this masked weight {tuple(self.shape)}, which the layer computes anew at each read; swap "
        "layer.parametrizations.weight.original, or assign a new nn.Parameter to layer.weight"
    )


setattr(MaskedWeight, SWAP_CHECK, _not_swapped)
_IN_PLACE = [name for name in dir(Tensor) if name.endswith("_") and not name.endswith("__")]
_IN_PLACE += [f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")]
CHANGES = {*_IN_PLACE, "__setitem__"} - {"requires_grad_", "detach_", "share_memory_"}  # methods that write into a tensor
for _name in CHANGES:
    if hasattr(Tensor, _name):
        setattr(MaskedWeight, _name, _passed_on(getattr(Tensor, _name)))


@functools.cache
def _masked_shard() -> type[Tensor]:
    """The class of a masked DTensor. It is made late, because the module of DTensors is slow to import."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    def refused(name: str) -> Callable[..., Any]:
        def change(self: Tensor, *_: Any, **__: Any) -> Any:
            raise RuntimeError(
                f"{name} would change this masked weight {tuple(self.shape)} in place; as a DTensor it does not pass the change on to "
                "the stored weight, so call bp.apply_masks(model, None, {name: weight}), or change layer.parametrizations.weight.original"
            )

        return change

    def detach(self: Tensor) -> Tensor:
        return as_masked_shard(DTensor.detach(self))

    methods: dict[str, Any] = {name: refused(name) for name in CHANGES if hasattr(DTensor, name)}
    return type(
        "MaskedShard",
        (DTensor,),
        {**methods, SWAP_CHECK: _not_swapped, "detach": detach, "data": property(detach, refused("weight.data ="))},
    )


def as_masked_shard(masked: Tensor) -> Tensor:
    """A masked DTensor, just computed, that raises where it would be changed in place: the change would be lost."""
    masked.__class__ = _masked_shard()
    return masked


def is_masked_shard(x: Tensor) -> bool:
    """Whether a tensor is a masked DTensor."""
    return is_sharded(x) and isinstance(x, _masked_shard())
