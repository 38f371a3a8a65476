"""Layers that follow each other: which they are, with what they are called, and one run alone."""

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call

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

    def run(self, parameters: Mapping[str, Tensor], hidden: Tensor, call: Calls) -> Tensor:
        """The layer on hidden states, some of its parameters replaced."""
        named, args, kwargs = call.rest[self.name]
        hidden = hidden.clone()  # a layer may write into its input
        given = ((), {named: hidden, **kwargs}) if named else ((hidden, *args), kwargs)
        return _tensor(self.name, functional_call(self.module, dict(parameters), *given))


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
        name, inside = sorted(outside)[0], f"{layers[0].rpartition('.')[0]}."
        known = inside != "." and not name.startswith(inside) and all(layer.startswith(inside) for layer in layers)
        rest = f'keep to theirs, bp.including(rule, "{inside}*"),' if known else "leave it out (`excluding`)"
        raise ValueError(f"{name} lies in none of the layers {layers[0]!r} to {layers[-1]!r}; {rest} or give layers")
    return order


class Enough(Exception):
    """Ends a forward that has shown what was asked."""


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
            raise Enough

    def after(module: nn.Module, args: Any, output: Any, *, layer: str) -> None:
        last[:] = [_tensor(layer, output).clone()]  # what comes between may write into it

    handles = []
    for layer in order:
        handles.append(layer.module.register_forward_pre_hook(partial(before, layer=layer.name), with_kwargs=True))
        handles.append(layer.module.register_forward_hook(partial(after, layer=layer.name)))
    try:
        forward(model, batch)
    except Enough:
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
