"""`MaskedWeight`, the tensor that a masked parameter reads as: a change of it in place also changes the stored weight."""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn

from blockprune.core._compat import disabled_torch_function, version_counter, without_base
from blockprune.core.grid import BlockGrid, expand
from blockprune.model.masking import mask_blocks


@attrs.define(eq=False)
class _Source:
    """What a masked weight was computed from. Tensors that share the memory of one masked weight share this record."""

    stored: Tensor | None  # None: other operations compute the weight, so there is no stored tensor of its values
    keep: Tensor
    grid: BlockGrid
    versions: tuple[int, ...] = ()  # of `stored` and `keep` when the masked weight was computed from them
    masked_version: int = 0  # of the masked weight at that time

    def record(self, masked: Tensor) -> None:
        self.versions, self.masked_version = self.current_versions(), _version(masked)

    def current_versions(self) -> tuple[int, ...]:
        return tuple(_version(x) for x in (self.stored, self.keep) if x is not None)

    def masked(self, weight: Tensor) -> Tensor:
        return mask_blocks(weight, self.keep.to(weight.device), self.grid)

    def merged(self, written: Tensor, stored: Tensor) -> Tensor:
        """The written values, and the stored ones where the mask has its zeros."""
        keep = expand(self.keep.to(written.device), self.grid)
        return torch.where(keep | (written != 0), written, stored.to(written))


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else version_counter(x)


class MaskedWeight(Tensor):
    """The value of a masked parameter; it passes changes in place on to the stored weight.

    Torch computes ``layer.weight`` of a masked layer anew at each read, and would lose ``layer.weight.data.mul_(2)``,
    ``nn.init.zeros_(layer.weight)``, ``layer.reset_parameters()`` or a merged adapter. This class writes such changes into the stored
    weight: the entries that the mask keeps, and pruned entries that are no longer zero. All other operations return plain tensors. This
    tensor keeps what was written; reading the weight again gives zeros in the pruned blocks.

    A change through a view or an ``out`` argument reaches the stored weight when the weight is read again or the view is deleted. Changes
    through a memory address (DLPack, ``data_ptr``), and through a view in inference mode, cannot be noticed: they are lost. NumPy arrays of
    the weight are read-only.
    """

    source: _Source

    __torch_function__ = disabled_torch_function

    @staticmethod
    def read(masked: Tensor, *, stored: Tensor | None, keep: Tensor, grid: BlockGrid) -> "MaskedWeight":
        """A masked weight, just computed, that belongs to this stored tensor."""
        source, masked = _Source(stored, keep, grid), without_base(masked)
        source.record(masked)
        return _with_source(masked, source)

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
        stored = self._writable()
        with torch.no_grad():
            stored.data = self.source.merged(value.detach().as_subclass(Tensor), stored.detach())
            _assign_data(self, self.source.masked(stored.detach()))
        self.source.record(self)

    def detach(self) -> "MaskedWeight":
        """The values without autograd, in the same memory."""
        return _with_source(Tensor.detach(self), self.source)

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array, because torch cannot notice a change of it."""
        array = Tensor.numpy(self, force=force)
        array.flags.writeable = False
        return array

    def write_back(self) -> None:
        """Change the stored weight as this tensor was changed.

        Raises:
            RuntimeError: another parametrization computes the weight, or the stored weight or the mask has changed since it was read.
        """
        if self._is_unchanged():
            return
        stored, plain = self._writable(), Tensor.detach(self).as_subclass(Tensor)
        with torch.no_grad():
            stored.copy_(self.source.merged(plain, stored.detach()))
        self.source.record(self)

    def _is_unchanged(self) -> bool:
        if not self.is_inference():
            return _version(self) == self.source.masked_version
        stored = self.source.stored
        return stored is not None and torch.equal(self, self.source.masked(stored.detach()))

    def _writable(self) -> Tensor:
        """The stored tensor; raise if a change cannot be passed on to it."""
        stored = self.source.stored
        if stored is None:
            raise RuntimeError(
                f"a change in place of this masked weight {tuple(self.shape)} would be lost, because other operations compute the "
                "weight (another parametrization, or functional_call); change the tensors that it is computed from, or call "
                "bp.finalize(model) first"
            )
        if self.source.versions != self.source.current_versions():
            raise RuntimeError(
                f"a change in place of this masked weight {tuple(self.shape)} would be lost, because its stored values or its mask "
                "have changed since it was read; read it again, as layer.weight, before you change it"
            )
        return stored

    def __del__(self) -> None:
        if hasattr(self, "source") and not self.is_inference():
            try:
                self.write_back()
            except RuntimeError as error:  # Python ignores exceptions here
                warnings.warn(str(error), RuntimeWarning, stacklevel=2)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def _become_parameter(self, _: bool) -> None:
        del self.source
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    # nn.Parameter(weight) sets this attribute; the result is then a plain nn.Parameter with the same memory
    _is_param = property(lambda self: False, _become_parameter)


_assign_data: Callable[[Tensor, Tensor], None] = Tensor.data.__set__  # type: ignore[attr-defined]


def _with_source(masked: Tensor, source: _Source) -> MaskedWeight:
    masked.__class__ = MaskedWeight  # `as_subclass` would make a view, which may be deleted before the views of it
    weight = cast(MaskedWeight, masked)
    weight.source = source
    return weight


def _passed_on(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of Tensor that changes it in place, which also changes the stored weight."""

    @functools.wraps(method, assigned=("__name__",))
    def change(self: MaskedWeight, *args: Any, **kwargs: Any) -> Any:
        if self.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"a masked weight {tuple(self.shape)} that requires gradients cannot be changed in place by {method.__name__}; "
                "change it within torch.no_grad()"
            )
        self._writable()
        result = method(self, *args, **kwargs)
        self.write_back()
        return result

    return change


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
    return type("MaskedShard", (DTensor,), {**methods, "detach": detach, "data": property(detach, refused("weight.data ="))})


def as_masked_shard(masked: Tensor) -> Tensor:
    """A masked DTensor, just computed, that raises where it would be changed in place: the change would be lost."""
    masked.__class__ = _masked_shard()
    return masked
