"""Find the consecutive layers of a model, record their call arguments, and run a single layer."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call

from blockprune.core._compat import tree_leaves
from blockprune.core._compat_hf import CACHE_ARGUMENTS
from blockprune.core.patterns import suggest
from blockprune.core.sharded_tensor import is_sharded
from blockprune.model.calibration import Forward
from blockprune.model.inputs import value_key
from blockprune.model.parameters import parameter_refs, stored_aliases, under_all_names
from blockprune.model.running import cuda_devices
from blockprune.model.sharding import replaced_shards, reshard


@attrs.frozen(eq=False)
class CapturedBatch:
    """One batch: the hidden states that the first layer is given, and the other arguments of every layer.

    Example:
        >>> from blockprune.repair.transformer_layers import capture_layer_inputs, find_layers
        >>> model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2)
        >>> capture_layer_inputs(model, find_layers(model, None, ["0.weight"]), lambda model, batch: model(batch), x).hidden
        tensor([[1., 1.]])
    """

    batch: Any
    hidden: Tensor
    arguments: Mapping[str, tuple[str, tuple[Any, ...], dict[str, Any]]]  # by layer: hidden's keyword ("" = positional), args, kwargs


@attrs.frozen(eq=False)
class Layer:
    """One of the modules that follow each other.

    Args:
        name: of the module in the model.
        module: the layer.
        parameters: the chosen parameters in it, by their names in the model.
        local_names: of all its parameters, by their names in the model: the first name in the layer. A tensor that is tied to one of an
            earlier layer has its name there in the model.

    Example:
        >>> from blockprune.repair.transformer_layers import Layer
        >>> layer = Layer("encoder.0", nn.Linear(2, 2), ["encoder.0.weight"])
        >>> layer.local_names
        {'encoder.0.weight': 'weight', 'encoder.0.bias': 'bias'}
        >>> [name for name, _ in layer.root.named_parameters()]
        ['encoder.0.weight', 'encoder.0.bias']
    """

    name: str
    module: nn.Module
    parameters: list[str]
    local_names: Mapping[str, str] = attrs.field()
    root: nn.Module = attrs.field(init=False)  # in the model's place, it holds this layer alone, so that no step walks over the others
    aliases: Mapping[str, Sequence[str]] = attrs.field(init=False)

    @local_names.default
    def _local_names(self) -> dict[str, str]:
        prefix = f"{self.name}." if self.name else ""
        return {f"{prefix}{name}": name for name in parameter_refs(self.module)}

    @root.default
    def _root(self) -> nn.Module:
        root = self.module
        for child in reversed(self.name.split(".") if self.name else []):
            parent = nn.Module()
            parent.add_module(child, root)
            root = parent
        return root

    @aliases.default
    def _aliases(self) -> dict[str, list[str]]:
        return stored_aliases(self.module)

    def forward(self, parameters: Mapping[str, Tensor], hidden: Tensor, captured: CapturedBatch) -> Tensor:
        """The layer's output on hidden states, with some of its parameters replaced."""
        keyword, args, kwargs = captured.arguments[self.name]
        hidden = hidden.clone()  # a layer may write into its input
        arguments = ((), {keyword: hidden, **kwargs}) if keyword else ((hidden, *args), kwargs)
        with replaced_shards(self.module, under_all_names(parameters, self.aliases)) as others:
            return _first_tensor(self.name, functional_call(self.module, others, *arguments, tie_weights=False))


# Loads the weights of a layer, or with None those outside of all layers, into a model that lacks them, and takes them out again.
LoadWeights = Callable[[Layer | None], contextlib.AbstractContextManager[Any]]


def find_layers(model: nn.Module, layers: Sequence[str] | None, names: Sequence[str]) -> list["Layer"]:
    """The layers in order, each with the chosen parameters that lie in it; by default the children of the largest list of modules.

    Raises:
        ValueError, KeyError, TypeError: no layers, one that the model does not have, a parameter in none of them.

    Example:
        >>> from blockprune.repair.transformer_layers import find_layers
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
    layers = list(layers) if isinstance(layers, Iterable) else [layers]
    if other := [layer for layer in layers if not isinstance(layer, str)]:
        raise TypeError(f"layers has {other[0]!r}; give a sequence of the layers' names, such as ['layers.0', 'layers.1']")
    for layer in layers:
        if layer not in modules:
            raise KeyError(f"layers names {layer!r}, which is not a module of the model{suggest(layer, modules)}")
    if not layers:
        raise ValueError("layers is empty; name at least one, or leave it out")
    local_names, chosen = _local_names(model, layers), set(names)
    order = []
    for layer in layers:
        prefix = f"{layer}." if layer else ""
        inside = [name for name, local in local_names[layer].items() if name in chosen and name == f"{prefix}{local}"]
        order.append(Layer(layer, modules[layer], inside, local_names[layer]))
    _check_all_inside(order, names)
    return order


def _local_names(model: nn.Module, layers: Sequence[str]) -> dict[str, dict[str, str]]:
    """For each layer: the first name in the layer of each of its parameters, by the parameter's name in the model."""
    local_names: dict[str, dict[str, str]] = {layer: {} for layer in layers}
    for name, refs in parameter_refs(model).items():
        for ref in refs:
            parts = ref.name.split(".")
            for depth in range(len(parts)):
                if (layer := ".".join(parts[:depth])) in local_names:
                    local_names[layer].setdefault(name, ".".join(parts[depth:]))
    return local_names


def _check_all_inside(order: Sequence[Layer], names: Sequence[str]) -> None:
    if outside := set(names).difference(*(layer.parameters for layer in order)):
        first, last, prefix = order[0].name, order[-1].name, f"{order[0].name.rpartition('.')[0]}."
        known = prefix != "." and not min(outside).startswith(prefix) and all(layer.name.startswith(prefix) for layer in order)
        remedy = f'keep to theirs, bp.including(rule, "{prefix}*"),' if known else "leave it out (`excluding`)"
        raise ValueError(f"{min(outside)} lies in none of the layers {first!r} to {last!r}; {remedy} or give layers")


class StopForward(Exception):
    """Ends a forward that has shown what was asked."""


def capture_layer_inputs(model: nn.Module, order: Sequence[Layer], forward: Forward, batch: Any, *, to_end: bool = False) -> CapturedBatch:
    """What the layers are called with in one forward, which stops at the last layer.

    Args:
        model: of the layers.
        order: the layers.
        forward: (model, batch) -> output.
        batch: one.
        to_end: do not stop, so that a second call of the last layer is seen. An error that follows the last layer does not matter. Warn of
            other arguments that earlier layers compute, after one more forward: each layer is given them as the dense model has them.

    Raises:
        ValueError: layers that do not follow each other, or are not called once with a tensor first.

    Example:
        >>> from blockprune.repair.transformer_layers import capture_layer_inputs, find_layers
        >>> model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2)
        >>> list(capture_layer_inputs(model, find_layers(model, None, ["0.weight"]), lambda model, batch: model(batch), x).arguments)
        ['0', '1']
    """
    recorder, devices = _ArgumentRecorder(order[-1].name, to_end), cuda_devices(model)
    states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    captured = _capture(model, order, forward, batch, recorder)
    if to_end and recorder.has_own_arguments and not any(map(is_sharded, model.parameters())):
        with torch.random.fork_rng(devices):  # the same random numbers as before
            torch.set_rng_state(states[0])
            for device, state in zip(devices, states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            _warn_of_computed_arguments(model, order, forward, batch, captured)
    return captured


def _capture(model: nn.Module, order: Sequence[Layer], forward: Forward, batch: Any, recorder: "_ArgumentRecorder") -> CapturedBatch:
    handles = []
    for layer in order:
        handles.append(layer.module.register_forward_pre_hook(partial(recorder.before, layer=layer.name), with_kwargs=True))
        handles.append(layer.module.register_forward_hook(partial(recorder.after, layer=layer.name)))
    try:
        forward(model, batch)
    except StopForward:
        pass
    except Exception:
        if not recorder.is_done:
            raise
    finally:
        for handle in handles:
            handle.remove()
        reshard(model)
    called = list(recorder.arguments)
    if wrong := [layer.name for i, layer in enumerate(order) if [layer.name] != called[i : i + 1]]:
        raise ValueError(f"the forward never calls layer {wrong[0]!r} in the order given; name layers that follow each other: layers=[...]")
    assert recorder.hidden is not None
    return CapturedBatch(batch, recorder.hidden, recorder.arguments)


def _warn_of_computed_arguments(model: nn.Module, order: Sequence[Layer], forward: Forward, batch: Any, captured: CapturedBatch) -> None:
    """Warn of arguments besides hidden states that earlier layers compute: those that change with what the first layer is given."""
    keyword = captured.arguments[order[0].name][0]

    def change(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args, {**kwargs, keyword: _changed(kwargs[keyword])}) if keyword else ((_changed(args[0]), *args[1:]), kwargs)

    handle = order[0].module.register_forward_pre_hook(change, with_kwargs=True)
    try:
        other = _capture(model, order, forward, batch, _ArgumentRecorder(order[-1].name, to_end=False))
    except Exception:  # the model does not run on such hidden states
        return
    finally:
        handle.remove()
    stale: dict[str, list[str]] = {}
    for layer in order[1:]:
        before, after = (_named_arguments(layer, batch.arguments[layer.name]) for batch in (captured, other))
        pairs = [(name, x, y) for name in before for x, y in zip(tree_leaves(before[name]), tree_leaves(after[name]), strict=False)]
        names = [name for name, x, y in pairs if isinstance(x, Tensor) and not _is_equal(x, y) and not _is_equal(x, captured.hidden)]
        if names:
            stale[layer.name] = [*dict.fromkeys(names)]
    if stale:
        layer_name, names = next(iter(stale.items()))
        more = f" (the same holds for {len(stale) - 1} more)" if len(stale) > 1 else ""
        warnings.warn(
            f"layer {layer_name!r} is given {', '.join(map(repr, names))}, which earlier layers compute{more}; sequential gives the pruned "
            "layer the dense model's value of it. For exact statistics, name layers that are given nothing besides hidden states that "
            "earlier ones compute, layers=[...], or prune all weights at once, such as by bp.recipes.wanda",
            stacklevel=3,
        )


def _changed(hidden: Tensor) -> Tensor:
    return hidden * 0.5 + 0.1


def _is_equal(x: Tensor, y: Any) -> bool:
    return isinstance(y, Tensor) and x.shape == y.shape and _are_same(x, y.to(x.device))


def _named_arguments(layer: Layer, call: tuple[str, tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """The arguments of a call besides hidden states, by name or position."""
    positions = [*signature(layer.module.forward).parameters][1:]
    _, args, kwargs = call
    return {**{positions[i] if i < len(positions) else str(i + 1): x for i, x in enumerate(args)}, **kwargs}


class _ArgumentRecorder:
    """Hooks that note the layers' arguments and check that each layer is given the output of the one before."""

    def __init__(self, last: str, to_end: bool) -> None:
        self.last, self.to_end = last, to_end
        self.has_own_arguments = False  # a layer is given a tensor, besides hidden states, that the first one was not given
        self.first_keys: set[Any] = set()  # of the tensors that the first layer was given
        self.is_done = False  # the last layer has run, once
        self.arguments: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {}
        self.hidden: Tensor | None = None  # of the first layer
        self.output: Tensor | None = None  # of the layer before

    def before(self, module: nn.Module, args: Any, kwargs: Any, *, layer: str) -> None:
        keyword = next(iter(kwargs)) if not args and kwargs else ""
        hidden = args[0] if args else kwargs.get(keyword)
        self._check(layer, hidden)
        if self.hidden is None:
            self.hidden = hidden.detach().clone()
        self.output = None
        positions = [*signature(module.forward).parameters, *[""] * len(args)]
        others = tuple(_without_cache(k, v) for k, v in zip(positions[1:], args[1:], strict=False))
        named = {k: _without_cache(k, v) for k, v in kwargs.items() if k != keyword}
        self.arguments[layer] = keyword, others, named
        keys = {value_key(x) for x in tree_leaves((others, named)) if isinstance(x, Tensor) and x.layout == torch.strided}
        if len(self.arguments) == 1:
            self.first_keys = keys
        self.has_own_arguments = self.has_own_arguments or not keys <= self.first_keys
        if layer == self.last and not self.to_end:
            raise StopForward

    def after(self, module: nn.Module, args: Any, output: Any, *, layer: str) -> None:
        self.output = _first_tensor(layer, output).clone()  # what comes between two layers may write into it
        self.is_done = layer == self.last

    def _check(self, layer: str, hidden: Any) -> None:
        if layer in self.arguments:
            self.is_done = False
            raise ValueError(
                f"layer {layer!r} is called twice in a forward; name layers that are called once: layers=[...], or prune all weights at "
                "once, such as by bp.recipes.wanda"
            )
        if not isinstance(hidden, Tensor):
            raise ValueError(f"layer {layer!r} is not given a tensor first but a {type(hidden).__name__}; name other layers: layers=[...]")
        if hidden.is_nested:
            raise ValueError(
                f"layer {layer!r} is given a nested tensor; switch that off (enable_nested_tensor=False) or leave out the padding"
            )
        follows = self.output is not None and hidden.shape == self.output.shape and _are_same(hidden, self.output)
        if self.arguments and not follows:
            raise ValueError(f"layer {layer!r} is not given the output of the one before; name layers that follow each other: layers=[...]")


def _are_same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal; NaN is equal to NaN, so that the statistics say which batch has it."""
    return torch.equal(x, y) or bool(((x == y) | (x.isnan() & y.isnan())).all())


def _without_cache(name: str, value: Any) -> Any:
    return None if name.startswith(CACHE_ARGUMENTS) else value


def _first_tensor(layer: str, output: Any) -> Tensor:
    first = next(iter(output.values()), None) if isinstance(output, Mapping) else output
    first = first[0] if isinstance(first, (tuple, list)) and first else first
    if not isinstance(first, Tensor):
        raise ValueError(
            f"layer {layer!r} must return a tensor, or a tuple that starts with one, not a {type(first).__name__}; name other layers: "
            "layers=[...]"
        )
    return first
