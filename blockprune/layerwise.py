"""Layers that follow each other: which they are, with what they are called, and one run alone."""

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from blockprune.gates import Forward
from blockprune.names import near

CACHES = ("past_key_value", "layer_past", "cache_params")  # Hugging Face's: a layer adds to them whenever it is called


@attrs.frozen(eq=False)
class Calls:
    """One batch: the first layer's input, and with what else each layer is called.

    Example:
        >>> from blockprune.layerwise import capture, find_layers
        >>> model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2)
        >>> capture(model, find_layers(model, None, ["0.weight"]), lambda model, batch: model(batch), x).hidden
        tensor([[1., 1.]])
    """

    batch: Any
    hidden: Tensor
    rest: Mapping[str, tuple[str, tuple[Any, ...], dict[str, Any]]]


@attrs.frozen(eq=False)
class Layer:
    """One of the modules that follow each other.

    Example:
        >>> from blockprune.layerwise import Layer
        >>> Layer("encoder.0", nn.Linear(2, 2), ["encoder.0.weight"]).local("encoder.0.weight")
        'weight'
    """

    name: str
    module: nn.Module
    inside: list[str]  # the chosen parameters in it

    def local(self, name: str) -> str:
        """A parameter's name in the layer."""
        return name.removeprefix(f"{self.name}.") if self.name else name

    def run(self, parameters: Mapping[str, Tensor], hidden: Tensor, call: Calls, *, twice: bool = False) -> Tensor:
        """The layer on hidden states, of a batch or of two behind each other, some of its parameters replaced."""
        named, args, kwargs = call.rest[self.name]
        n = len(hidden) // 2
        if twice:
            args, kwargs = tree_map(lambda x: twice_over(x) if isinstance(x, Tensor) and x.ndim > 1 and len(x) == n else x, (args, kwargs))
        hidden = hidden.clone()  # a layer may write into its input
        given = ((), {named: hidden, **kwargs}) if named else ((hidden, *args), kwargs)
        return _tensor(self.name, functional_call(self.module, dict(parameters), *given))

    def check_twice(self, hidden: Tensor, call: Calls) -> None:
        """That two batches behind each other give, to every chosen weight and at the end, what each gives alone."""
        owners = {name.rpartition(".")[0] for name in map(self.local, self.inside)}

        def seen(hidden: Tensor, *, twice: bool) -> list[Tensor]:
            found: list[Tensor] = []

            def listen(module: nn.Module, args: Any, kwargs: Any) -> None:
                found.extend([x.detach().clone() for x in (*args, *kwargs.values()) if isinstance(x, Tensor)][:1])

            handles = [self.module.get_submodule(name).register_forward_pre_hook(listen, with_kwargs=True) for name in owners]
            try:
                return [self.run({}, hidden, call, twice=twice), *found]
            finally:
                for handle in handles:
                    handle.remove()

        other = hidden.flip(-1)  # that a router of tokens, say, sends elsewhere
        alone = [seen(x, twice=False) for x in (hidden, other)]
        why = ""
        try:
            both = seen(torch.cat([hidden, other]), twice=True)
        except (RuntimeError, AssertionError) as error:
            both, why = [], f" ({error})"
        if not len(both) == len(alone[0]) == len(alone[1]) or not all(map(_alike, both, *alone)):
            raise ValueError(
                f"layer {self.name!r} mixes or routes the samples of a batch, or they do not lie along the first axis{why}: "
                "target='dense' runs two batches behind each other; use target='pruned'"
            )


def find_layers(model: nn.Module, layers: Sequence[str] | None, names: Sequence[str]) -> list["Layer"]:
    """The layers in order, each with the chosen parameters that lie in it; by default the children of the largest list of modules.

    Raises:
        ValueError, KeyError, TypeError: no layers, one that the model does not have, a parameter in none of them.

    Example:
        >>> from blockprune.layerwise import find_layers
        >>> [layer.name for layer in find_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), None, ["0.weight"])]
        ['0', '1']
    """
    modules = dict(model.named_modules())
    if isinstance(layers, str):
        raise TypeError(f"layers={layers!r} is one name; give a sequence of the layers' names, such as [{layers!r}]")
    if layers is None:
        lists = {name: m for name, m in modules.items() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)}
        if not lists:
            raise ValueError(
                f"{type(model).__name__} has no ModuleList or Sequential whose children are the layers; name them: layers=[...]"
            )
        largest = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
        layers = [f"{largest}.{child}".removeprefix(".") for child, _ in lists[largest].named_children()]
    for layer in layers:
        if layer not in modules:
            raise KeyError(f"layers names {layer!r}, which is not a module of the model{near(layer, modules)}")
    if not layers:
        raise ValueError("layers is empty; name at least one, or leave it out")
    order = [Layer(layer, modules[layer], [name for name in names if not layer or name.startswith(f"{layer}.")]) for layer in layers]
    if outside := set(names).difference(*(layer.inside for layer in order)):
        raise ValueError(
            f"{sorted(outside)[0]} lies in none of the layers {layers[0]!r} to {layers[-1]!r}; leave it out (`excluding`) or give layers"
        )
    return order


class _Enough(Exception):
    pass


def capture(model: nn.Module, order: Sequence[Layer], forward: Forward, batch: Any) -> Calls:
    """One forward up to the last layer, listening.

    Raises:
        ValueError: layers that do not follow each other, or are not called once with a tensor first.

    Example:
        >>> from blockprune.layerwise import capture, find_layers
        >>> model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2)
        >>> list(capture(model, find_layers(model, None, ["0.weight"]), lambda model, batch: model(batch), x).rest)
        ['0', '1']
    """
    rest: dict[str, Any] = {}
    first: list[Tensor] = []
    last: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any, *, layer: str) -> None:
        if layer in rest:
            raise ValueError(f"layer {layer!r} is called twice in a forward; name layers that are called once: layers=[...]")
        named = next(iter(kwargs)) if not args and kwargs else ""
        hidden = args[0] if args else kwargs.get(named)
        if not isinstance(hidden, Tensor):
            raise ValueError(f"layer {layer!r} is not given a tensor first but a {type(hidden).__name__}; name other layers: layers=[...]")
        if hidden.is_nested:
            raise ValueError(
                f"layer {layer!r} is given a nested tensor; switch that off (enable_nested_tensor=False) or leave out the padding"
            )
        if rest and not (last and hidden.shape == last[0].shape and torch.equal(hidden, last[0])):
            raise ValueError(f"layer {layer!r} is not given the output of the one before; name layers that follow each other: layers=[...]")
        first.append(hidden.detach().clone()) if not rest else None
        last.clear()
        positions = [*signature(module.forward).parameters, *[""] * len(args)]
        others = {k: None if k.startswith(CACHES) else v for k, v in kwargs.items() if k != named}
        rest[layer] = (named, tuple(None if k.startswith(CACHES) else v for k, v in zip(positions[1:], args[1:], strict=False)), others)
        if layer == order[-1].name:
            raise _Enough

    def after(module: nn.Module, args: Any, output: Any, *, layer: str) -> None:
        last[:] = [_tensor(layer, output).clone()]  # what comes between may write into it

    handles = []
    for layer in order:
        handles.append(layer.module.register_forward_pre_hook(partial(before, layer=layer.name), with_kwargs=True))
        handles.append(layer.module.register_forward_hook(partial(after, layer=layer.name)))
    try:
        forward(model, batch)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if missing := [layer.name for layer in order if layer.name not in rest]:
        raise ValueError(
            f"the forward never calls layer {missing[0]!r} in the order given; name layers that follow each other: layers=[...]"
        )
    return Calls(batch, first[0], rest)


def _tensor(layer: str, output: Any) -> Tensor:
    found = next(iter(output.values()), None) if isinstance(output, Mapping) else output
    found = found[0] if isinstance(found, (tuple, list)) and found else found
    if not isinstance(found, Tensor):
        raise ValueError(f"layer {layer!r} does not give a tensor first but a {type(found).__name__}; name other layers: layers=[...]")
    return found


def _alike(both: Tensor, first: Tensor, second: Tensor) -> bool:
    """Whether these are two of a size, and the first is both behind each other, but for rounding."""
    if first.shape != second.shape or both.shape != (2 * len(first), *first.shape[1:]):
        return False
    wide = torch.promote_types(both.dtype, torch.float32)
    wanted = torch.cat([first, second])
    digits = torch.finfo(both.dtype).eps ** 0.5 if both.is_floating_point() else 0.0
    return bool((both - wanted).to(wide).norm() <= digits * wanted.to(wide).norm())


def twice_over(x: Tensor | None) -> Tensor | None:
    """A batch behind itself.

    Example:
        >>> from blockprune.layerwise import twice_over
        >>> twice_over(torch.ones(1))
        tensor([1., 1.])
    """
    return None if x is None else torch.cat([x, x])
