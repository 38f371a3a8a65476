"""Layers whose weight the forward also uses by itself: statistics of the layer's calls do not describe that use."""

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blockprune.core._compat import ConvNd, ConvTransposeNd, data_address, functorch_is_active
from blockprune.core.sharded_tensor import is_sharded
from blockprune.model.inputs import InputHooks
from blockprune.model.parameters import ParameterRef

_TAKE_A_FORM = ("to", "type_as", "expand_as", "view_as", "reshape_as")  # the values of later arguments do not count
_NO_NAMES: frozenset[str] = frozenset()


class WeightReads(TorchFunctionMode):
    """Notes, while it is entered, which weights of Linears and convolutions are used outside of the modules that own them.

    A use is an operation that gives numbers of a weight and an activation, such as ``x @ layer.weight``. What is computed of weights and
    constants alone, such as ``layer.weight.T``, is the weight under another name; a single number, such as a penalty, is not, and neither
    is ``layer.forward(x)``, a call without hooks. Uses by way of numpy, ``tolist``, ``new_tensor`` or an ``autograd.Function``, or within a
    call of the layer, go unnoticed.

    Args:
        hooks: of the parameters, with all modules that use them.
        constants: tensors that are no activations, such as the model's buffers.

    Example:
        >>> from blockprune.model.weight_reads import WeightReads
        >>> from blockprune.model.inputs import input_hooks
        >>> from blockprune.model.parameters import parameter_refs
        >>> layer, x = nn.Linear(4, 4, bias=False), torch.randn(2, 4)
        >>> with WeightReads(input_hooks(layer, parameter_refs(layer))) as reads:
        ...     _ = layer(x).to(layer.weight.dtype) @ layer.weight
        >>> reads.names
        {'weight'}
    """

    def __init__(self, hooks: InputHooks, constants: Iterable[Tensor] = ()) -> None:
        super().__init__()
        first: dict[str, ParameterRef] = {}
        for name, ref, _ in hooks:
            first.setdefault(name, ref)
        self._refs = {
            n: ref for n, ref in first.items() if isinstance(ref.owner, (nn.Linear, ConvNd)) and not any(map(is_sharded, ref.originals))
        }
        self.names: set[str] = set()
        self._hooks = [(name, ref, module) for name, ref, module in hooks if name in self._refs]
        self._constants = list(constants)
        self._running: Counter[str] = Counter()  # calls of the modules of a parameter that have begun and not ended
        self._noted: dict[int, tuple[frozenset[str], weakref.ref[Tensor]]] = {}  # by id: the weights of which a tensor is computed
        self._whole: dict[int, weakref.ref[Tensor]] = {}  # by id: what layers read as their weight
        self._addresses: dict[tuple[int, int], str] = {}  # of weights, in memory
        self._handles: list[Any] = []

    def __enter__(self) -> "WeightReads":
        for constant in self._constants:
            self._note(_NO_NAMES, constant)
        for name, ref, module in self._hooks:
            self._handles.append(module.register_forward_pre_hook(partial(self._count, name, 1), prepend=True))
            self._handles.append(module.register_forward_hook(partial(self._count, name, -1), always_call=True))
            if ref.parametrizations is None:
                self._note_weight(name, ref.stored)
            else:  # each read computes another tensor
                hook = partial(self._note_computed, name)
                self._handles.append(ref.parametrizations.register_forward_hook(hook))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _count(self, name: str, change: int, *_: Any) -> None:
        self._running[name] += change

    def _note(self, names: frozenset[str], x: Tensor) -> None:
        self._noted[id(x)] = names, weakref.ref(x)

    def _note_weight(self, name: str, weight: Tensor) -> None:
        self._note(frozenset([name]), weight)
        self._whole[id(weight)] = weakref.ref(weight)
        if address := _address(weight):
            self._addresses[address] = name

    def _note_computed(self, name: str, module: nn.Module, args: Any, weight: Tensor) -> None:
        self._note_weight(name, weight)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        named: Any = func.__self__ if getattr(func, "__name__", "") == "__get__" else func  # type: ignore[attr-defined]
        kind = str(getattr(named, "__name__", ""))
        if kind != "__set__":
            self._follow(kind, args, kwargs, args[0] if kind == "__setitem__" else result)
        return result

    def _follow(self, kind: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note what an operation gives: tensors that are computed of weights and constants alone, or the use of a weight."""
        if kind.startswith("new_") or kind.endswith("_like"):
            given = []
        else:
            given = list(_tensors(args[:1] if kind in _TAKE_A_FORM else (*args, *(x for name, x in kwargs.items() if name != "out"))))
        known = [self._names_of(x) for x in given]
        names = _NO_NAMES.union(*(of_tensor for of_tensor in known if of_tensor is not None))
        if None not in known:
            for x in _tensors((result,)):
                if x.ndim:
                    self._note(names, x)
        elif not (known[0] and result is given[0]):  # not a weight that is changed in place
            if names and any(x.ndim and x.is_floating_point() for x in _tensors((result,))) and not self._is_call(kind, args):
                self.names |= names
            for x in _tensors((result,)):
                self._noted.pop(id(x), None)

    def _names_of(self, x: Tensor) -> frozenset[str] | None:
        """The weights of which a tensor is computed, but for those whose module runs; None if it is an activation."""
        names, noted = self._noted.get(id(x), (_NO_NAMES, None))
        if noted is None or noted() is not x:
            is_parameter = isinstance(x, nn.Parameter)  # maybe made of a weight, in its memory
            if x.ndim and x.dtype != torch.bool and not is_parameter:
                return None
            address = _address(x) if is_parameter else None
            names = frozenset([self._addresses[address]]) if address in self._addresses else _NO_NAMES
        return frozenset(name for name in names if not self._running[name])

    def _is_call(self, kind: str, args: Sequence[Any]) -> bool:
        """Whether an operation is the one that the forward of a layer runs, with its own weight and bias."""
        if len(args) < 3 or (whole := self._whole.get(id(args[1]))) is None or whole() is not args[1]:
            return False
        names, _ = self._noted[id(args[1])]
        owners = [ref.owner for name, ref, _ in self._hooks if name in names]
        return any(kind == _operation(owner) and getattr(owner, "bias", None) is args[2] for owner in owners)

    def check(self, called: Collection[str], statistics: Collection[str]) -> None:
        """Raise an error, or without a Gram matrix warn, if a weight was used by itself and its layer was called, too.

        Args:
            called: the parameters whose layers were called.
            statistics: the names of the statistics of inputs, and of gradients of outputs, that are collected.

        Raises:
            NotImplementedError: such a weight, of which a Gram matrix is collected.
        """
        for name, ref in self._refs.items() if statistics else ():
            if name not in self.names or name not in called:
                continue
            kind = nn.utils.parametrize.type_before_parametrizations(ref.owner).__name__
            message = (
                f"{name} {ref.shape}: the forward calls its {kind}, and also computes with this weight itself, as a tied decoder does; "
                f"{', '.join(sorted(statistics))} would describe the calls alone"
            )
            if "input_gram" in statistics:
                raise NotImplementedError(
                    f"{message}, so a repair would make the other use worse. Leave the weight out with `excluding`, or use a metric of "
                    "weights, of gradients or of gates, and no repair"
                )
            warnings.warn(f"{message}; metrics of gradients or gates count all uses", stacklevel=2)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operation, those in lists too."""
    for value in values:
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, Tensor):
                yield x


def _address(x: Tensor) -> tuple[int, int] | None:
    """Where the values of a plain tensor or parameter are in memory."""
    is_plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and not x.is_meta and not functorch_is_active()
    return (data_address(x), int(x.storage_offset())) if is_plain else None


def _operation(layer: nn.Module) -> str:
    """The name of the function of torch that computes the forward of a Linear or a convolution."""
    if not isinstance(layer, ConvNd):
        return "linear"
    return f"conv{'_transpose' if isinstance(layer, ConvTransposeNd) else ''}{len(layer.kernel_size)}d"
