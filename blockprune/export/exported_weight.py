"""`ExportedWeight`, the dense weight that a block-sparse layer reads as: it refuses changes in place, which would be lost."""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn

from blockprune.core._compat import disabled_torch_function, functorch_is_active, is_tracing, version_counter, without_base
from blockprune.model.masked_weight import CHANGES

REMEDY = "change layer.values, or give export.update the option weights={name: weight}"


@attrs.define(eq=False)
class _Origin:
    """What the tensors that share the memory of one exported weight share."""

    reason: str  # why a change would be lost, and what to do instead
    version: int | None  # of the weight when it was computed; None: unknown, or changes are not lost, as a parameter has the memory


class ExportedWeight(Tensor):
    """The dense weight of a block-sparse layer, which computes it anew at each read; a change in place raises.

    All other operations return plain tensors, and so does a copy. A change through a view or an ``out`` argument cannot be refused: a
    warning says that it is lost, when the weight is deleted. NumPy arrays of the weight are read-only. Some operations of functions that
    torch.compile has compiled do not take this class as an argument: give them ``weight.clone()``.
    """

    origin: _Origin

    __torch_function__ = disabled_torch_function

    @staticmethod
    def read(weight: Tensor, layer: str, remedy: str = REMEDY) -> Tensor:
        """A weight, just computed, of the layer of this name; a plain tensor while a graph is recorded and in `torch.func`.

        Args:
            weight: what the layer computed.
            layer: its name, or "".
            remedy: how to change the weight.
        """
        if torch.compiler.is_compiling() or is_tracing() or functorch_is_active() or type(weight) is not Tensor:
            return weight
        weight, owner = without_base(weight), f"layer {layer}" if layer else "an exported layer"
        reason = f"the dense weight {tuple(weight.shape)} of {owner} is computed from what it stores at each read: {remedy}"
        reason += "; to change a copy of your own: layer.weight.clone()"
        return _with_origin(weight, _Origin(reason, None if weight.is_inference() else version_counter(weight)))

    @property
    def data(self) -> "ExportedWeight":
        """The values without autograd, in the same memory."""
        return self.detach()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise RuntimeError(f"an assignment to .data would be lost, because {self.origin.reason}")

    def detach(self) -> "ExportedWeight":
        """The values without autograd, in the same memory."""
        return _with_origin(Tensor.detach(self), self.origin)

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array, because a change of it would be lost."""
        array = Tensor.numpy(self, force=force)
        array.flags.writeable = False
        return array

    def __del__(self) -> None:
        origin = getattr(self, "origin", None)
        if origin and origin.version is not None and version_counter(self) != origin.version:
            warnings.warn(f"a change through a view or an out argument is lost, because {origin.reason}", RuntimeWarning, stacklevel=2)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def _become_parameter(self, _: bool) -> None:
        self.origin.version = None
        del self.origin
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    # nn.Parameter(weight) sets this attribute; the result is then a plain nn.Parameter with the same memory
    _is_param = property(lambda self: False, _become_parameter)


def _with_origin(weight: Tensor, origin: _Origin) -> ExportedWeight:
    weight.__class__ = ExportedWeight  # `as_subclass` would make a view
    exported = cast(ExportedWeight, weight)
    exported.origin = origin
    return exported


def _refused(method: Callable[..., Any]) -> Callable[..., Any]:
    """In place of a method of Tensor that changes it in place."""

    @functools.wraps(method, assigned=("__name__",))
    def change(self: ExportedWeight, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"a change in place by {method.__name__} would be lost, because {self.origin.reason}")

    return change


for _name in CHANGES:
    if hasattr(Tensor, _name):
        setattr(ExportedWeight, _name, _refused(getattr(Tensor, _name)))
