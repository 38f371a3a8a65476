"""Layers whose weight the forward also uses by itself: statistics of the layer's calls do not describe that use."""

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blockprune.core._compat import ConvNd
from blockprune.core.sharded_tensor import is_sharded
from blockprune.model.inputs import InputHooks
from blockprune.model.parameters import ParameterRef

_TAKE_A_FORM = ("to", "type_as", "expand_as", "view_as", "reshape_as")  # with a weight as a later argument, whose values do not count


class WeightReads(TorchFunctionMode):
    """Notes, while it is entered, which weights of Linears and convolutions are used outside of the modules that own them.

    A use is an operation on the values that gives a tensor: ``x.to(layer.weight.dtype)`` is none, ``x @ layer.weight`` is.

    Args:
        hooks: of the parameters, with all modules that use them.

    Example:
        >>> from blockprune.model.weight_reads import WeightReads
        >>> from blockprune.model.inputs import input_hooks
        >>> from blockprune.model.parameters import parameter_refs
        >>> layer = nn.Linear(4, 4, bias=False)
        >>> with WeightReads(input_hooks(layer, parameter_refs(layer))) as reads:
        ...     _ = layer(torch.ones(2, 4)).to(layer.weight.dtype) @ layer.weight
        >>> reads.names
        {'weight'}
    """

    def __init__(self, hooks: InputHooks) -> None:
        super().__init__()
        first: dict[str, ParameterRef] = {}
        for name, ref, _ in hooks:
            first.setdefault(name, ref)
        watched = {n for n, ref in first.items() if isinstance(ref.owner, (nn.Linear, ConvNd)) and not any(map(is_sharded, ref.originals))}
        self.names: set[str] = set()
        self._hooks = [(name, ref, module) for name, ref, module in hooks if name in watched]
        self._running: Counter[str] = Counter()  # calls of the modules of a parameter that have begun and not ended
        self._weights: dict[int, tuple[str, weakref.ref[Tensor]]] = {}  # by id
        self._handles: list[Any] = []

    def __enter__(self) -> "WeightReads":
        for name, ref, module in self._hooks:
            self._handles.append(module.register_forward_pre_hook(partial(self._count, name, 1), prepend=True))
            self._handles.append(module.register_forward_hook(partial(self._count, name, -1)))
            if ref.parametrizations is None:
                self._note(name, ref.stored)
            else:  # each read computes another tensor
                self._handles.append(ref.parametrizations.register_forward_hook(partial(self._note_computed, name)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _count(self, name: str, change: int, *_: Any) -> None:
        self._running[name] += change

    def _note(self, name: str, weight: Tensor) -> None:
        self._weights[id(weight)] = name, weakref.ref(weight)

    def _note_computed(self, name: str, module: nn.Module, args: Any, weight: Tensor) -> None:
        if not self._running[name]:
            self._note(name, weight)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for name in self._names_among(args, kwargs):
            named: Any = func.__self__ if getattr(func, "__name__", "") == "__get__" else func  # type: ignore[attr-defined]
            kind = str(getattr(named, "__name__", ""))
            if kind in ("data", "detach"):  # the weight itself, under another name
                self._note(name, result)
            elif self._reads_values(kind, args, result):
                self.names.add(name)
        return result

    def _names_among(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[str]:
        """The parameters among the arguments of an operation, but for those whose module runs."""
        for arg in (*args, *kwargs.values()):
            for x in arg if isinstance(arg, (tuple, list)) else (arg,):
                name, weight = self._weights.get(id(x), ("", None))
                if weight is not None and weight() is x and not self._running[name]:
                    yield name

    def _reads_values(self, kind: str, args: Sequence[Any], result: Any) -> bool:
        if (
            kind == "grad"
            or kind.startswith("new_")
            or kind.endswith("_like")
            or (kind in _TAKE_A_FORM and id(args[0]) not in self._weights)
        ):
            return False
        return any(isinstance(x, Tensor) for x in (result if isinstance(result, (tuple, list)) else (result,)))

    def check(self, called: Collection[str], statistics: Collection[str]) -> None:
        """Raise an error, or without a Gram matrix warn, if a weight was used by itself and its layer was called, too.

        Args:
            called: the parameters whose layers were called.
            statistics: the names of the statistics of inputs, and of gradients of outputs, that are collected.

        Raises:
            NotImplementedError: such a weight, of which a Gram matrix is collected.
        """
        for name, ref, _ in self._hooks if statistics else ():
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
            self.names.discard(name)
