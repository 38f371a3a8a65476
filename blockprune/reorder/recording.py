"""Record one run of a model, and replay it with some units of one layer's output changed."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn

from blockprune.core._compat import ConvNd, ConvTransposeNd, NormBase, tree_leaves, tree_map_only
from blockprune.core._compat_hf import CACHE_ARGUMENTS
from blockprune.model.experts import Experts, experts_in, record_routing
from blockprune.model.running import Forward, cuda_devices, disable_attention_fastpath, float64_copy, to_model_device

SEED = 0  # every run of the model draws the same random numbers

Run = Callable[..., list[Tensor]]  # (model, change of the input tensors) -> the tensors of its output on the example


@attrs.frozen(eq=False)
class RecordedRun:
    """One run of a copy of a model: the inputs of its modules and the outputs of its mixing layers, call by call.

    A mixing layer (a Linear, an Embedding, an ungrouped convolution) computes each of its output units from all of its inputs. So a hidden
    axis starts at the outputs of mixing layers and ends at the inputs of mixing layers.

    Args:
        model: the copy, in evaluation mode, and in float64 if the model can run in it.
        run: runs a model on the example and returns the tensors of its output. Its second argument, if any, changes the inputs.
        modules: by name, the mixing layers and the modules that have one number or one kernel for each unit, such as norms and depthwise
            convolutions.
        layer_outputs: the outputs of each mixing layer that was called.
        module_inputs: the first input tensor of each module that was called.
        outputs: the tensors of the model's output.
        routing: the expert numbers and weights with which each module of `Experts` was called.
        unhooked_parameters: the parameters of the model that are in none of these modules, such as learned positions, scales and routers;
            a replay cannot show whether they have a hidden axis.

    Example:
        >>> from blockprune.model.running import default_forward
        >>> from blockprune.reorder.recording import RecordedRun
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     recorded = RecordedRun.of(model, torch.ones(1, 2), default_forward)
        ...     recorded.replay("0", torch.tensor([False, True, False]))["2"]
        tensor([False,  True, False])
    """

    model: nn.Module
    run: Run
    modules: Mapping[str, nn.Module]
    layer_outputs: Mapping[str, Sequence[Tensor]]
    module_inputs: Mapping[str, Sequence[Tensor]]
    outputs: Sequence[Tensor]
    routing: Mapping[str, Sequence[Any]]
    unhooked_parameters: Mapping[str, Tensor]

    @classmethod
    def of(cls, original: nn.Module, example: Any, forward: Forward) -> "RecordedRun":
        """Run a copy of the model on the example and record it.

        Raises:
            ValueError: the model cannot be copied, cannot run the example, or returns no floating-point tensors.
        """
        run = partial(_run, example=example, forward=forward)
        model = _evaluation_copy(original, run)
        for experts in experts_in(model).values():
            experts.register_forward_pre_hook(_assign_tokens_in_turn)
        layer_outputs: dict[str, list[Tensor]] = {}
        module_inputs: dict[str, list[Tensor]] = {}
        routing: dict[str, list[Any]] = {}

        def record(module: nn.Module, args: Any, kwargs: Any, output: Any, *, name: str) -> None:
            _append_input(module_inputs, name, args, kwargs)
            if is_mixing(module) and isinstance(output, Tensor):
                layer_outputs.setdefault(name, []).append(output.clone())

        modules = _hookable_modules(model)
        with contextlib.ExitStack() as stack:
            for name, module in modules.items():
                stack.callback(module.register_forward_hook(partial(record, name=name), with_kwargs=True).remove)
            stack.enter_context(record_routing(model, routing))
            outputs = run(model)
        # only an output that is one tensor can be replayed; a router that inherits from Linear may return several
        for name in [name for name in module_inputs if is_mixing(modules[name]) and name not in layer_outputs]:
            del modules[name], module_inputs[name]
        unhooked = _unhooked_parameters(model, [m for name, m in modules.items() if name in module_inputs or is_mixing(m)])
        return cls(model, run, modules, layer_outputs, module_inputs, outputs, routing, unhooked)

    def replay(self, layer: str, units: Tensor) -> Mapping[str, Tensor] | None:
        """Run the model again with some units of one layer's output changed, and compare the inputs of all modules with the recorded ones.

        All other mixing layers return their recorded outputs, so the change reaches the inputs of the next mixing layers and ends there.

        Args:
            layer: the name of a mixing layer.
            units: bool ``[units]``, the units of its output to change.

        Returns:
            For each module that was called, bool ``[inputs]``: the inputs that changed. None if the model's output changed, or if
            the model called other modules or gave them inputs of other shapes.
        """
        inputs: dict[str, list[Tensor]] = {}
        with self._replayed_forwards(layer, units, inputs):
            try:
                outputs = self.run(self.model)
            except Exception:  # for example, the changed model calls an expert that it did not call before
                return None
        if len(outputs) != len(self.outputs) or not all(map(torch.equal, outputs, self.outputs)):
            return None
        changed: dict[str, Tensor] = {}
        for name, before in self.module_inputs.items():
            after = inputs.get(name, [])
            if [x.shape for x in after] != [x.shape for x in before]:
                return None
            if not isinstance(self.modules[name], nn.Embedding):  # its inputs are indices
                axis = unit_axis(self.modules[name], before[0])
                changed[name] = torch.stack([_changed(x, y, axis) for x, y in zip(before, after, strict=True)]).any(0).cpu()
        return changed

    @contextlib.contextmanager
    def _replayed_forwards(self, layer: str, units: Tensor, inputs: dict[str, list[Tensor]]) -> Iterator[None]:
        """Inside, mixing layers return their recorded outputs, one of them changed, and the inputs of all modules are appended."""
        recorded = {name: iter(calls) for name, calls in self.layer_outputs.items()}

        def replayed(name: str, /, *args: Any, **kwargs: Any) -> Tensor:
            _append_input(inputs, name, args, kwargs)
            y = next(recorded[name])
            if name != layer:
                return y.clone()
            axis = unit_axis(self.modules[name], y)
            return y + (1 + y.abs().max()) * units.to(y).view([-1 if i == axis else 1 for i in range(y.ndim)])

        def record(module: nn.Module, args: Any, kwargs: Any, *, name: str) -> None:
            _append_input(inputs, name, args, kwargs)

        with contextlib.ExitStack() as stack:
            stack.enter_context(record_routing(self.model, cast(Any, self.routing), replay=True))
            for name, module in self.modules.items():
                if name in self.layer_outputs:
                    stack.callback(vars(module).update, {key: own for key, own in vars(module).items() if key == "forward"})
                    module.forward = partial(replayed, name)
                    stack.callback(delattr, module, "forward")
                else:
                    stack.callback(module.register_forward_pre_hook(partial(record, name=name), with_kwargs=True).remove)
            yield

    def units(self, layer: str) -> int:
        """The number of units of a mixing layer's output."""
        y = self.layer_outputs[layer][0]
        return y.shape[unit_axis(self.modules[layer], y)]

    def is_input_first(self, layer: str) -> bool:
        """Whether the weight of a mixing layer has its inputs along axis 0 and its outputs along axis 1."""
        return isinstance(self.modules[layer], (nn.Embedding, ConvTransposeNd))

    def output_axis(self, layer: str) -> tuple[int, int]:
        """The tensor and the axis along which a layer's weight has its outputs; layers with tied weights have the same tensor."""
        return self._weight_id(layer), int(self.is_input_first(layer))

    def input_axis(self, layer: str) -> tuple[int, int]:
        """The tensor and the axis along which a layer's weight has its inputs."""
        return self._weight_id(layer), int(not self.is_input_first(layer))

    def _weight_id(self, layer: str) -> int:
        module = self.modules[layer]
        return id(dict(module.named_parameters(recurse=False, remove_duplicate=False)).get("weight", module))

    def tensors_per_unit(self, name: str, units: int) -> list[str]:
        """The names that a norm or a depthwise convolution gives its tensors with one number, or one kernel, for each of so many units."""
        module = self.modules[name]
        return [
            own for own, t in named_tensors(module).items() if t.shape == (units,) or (is_depthwise(module) and t.shape[:1] == (units,))
        ]


def is_mixing(module: nn.Module) -> bool:
    """Whether a layer computes each output unit from all of its inputs.

    Example:
        >>> from blockprune.reorder.recording import is_mixing
        >>> is_mixing(nn.Linear(4, 4)), is_mixing(nn.LayerNorm(4)), is_mixing(nn.Conv2d(4, 4, 3, groups=4))
        (True, False, False)
    """
    return isinstance(module, (nn.Linear, nn.Embedding)) or (isinstance(module, ConvNd) and module.groups == 1)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a convolution that computes each output channel from one input channel."""
    return isinstance(module, ConvNd) and module.groups == module.in_channels == module.out_channels


def unit_axis(module: nn.Module, x: Tensor) -> int:
    """The axis of a module's input or output along which the units are."""
    if isinstance(module, ConvNd):
        return x.ndim - 1 - len(module.kernel_size)
    if isinstance(module, (NormBase, nn.PReLU, nn.GroupNorm)):
        return min(1, x.ndim - 1)
    sizes = {t.shape[0] for t in module.parameters(recurse=False) if t.ndim == 1}
    is_channels_first_norm = not is_mixing(module) and x.ndim > 1 and x.shape[1] in sizes and x.shape[-1] not in sizes
    return 1 if is_channels_first_norm else x.ndim - 1


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _run(model: nn.Module, change: Callable[[Tensor], Tensor] = torch.clone, *, example: Any, forward: Forward) -> list[Tensor]:
    """The tensors of the model's output on the example, without caches; random numbers are the same in each run."""
    with disable_attention_fastpath(), torch.random.fork_rng(devices := cuda_devices(model)):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
            generator.manual_seed(SEED)
        output = forward(model, tree_map_only(Tensor, change, to_model_device(model, example)))
    if isinstance(output, Mapping):
        output = {key: value for key, value in output.items() if not str(key).startswith(CACHE_ARGUMENTS)}
    return list(_tensors_in(output))


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors of an output, including those in dataclasses."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            yield from _tensors_in([getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)])


def _evaluation_copy(model: nn.Module, run: Run) -> nn.Module:
    """A copy in evaluation mode, in float64 if the model can run in it."""
    try:
        evaluation = copy.deepcopy(model).eval()
    except RuntimeError as error:  # for example, a module stores a tensor that it computed with a gradient
        raise ValueError(f"the model cannot be copied: {error}; find_axes runs a copy of the model, which copy.deepcopy makes") from error
    double, outputs = float64_copy(evaluation, run)
    if not any(y.is_floating_point() or y.is_complex() for y in outputs):
        raise ValueError("the model's output on the example has no floating-point tensors to compare; pass a forward= that returns some")
    return double


def _hookable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The mixing layers, and the modules without children that have one number or one kernel for each unit."""
    mixing = {name: module for name, module in model.named_modules() if is_mixing(module)}
    leaves = {name: module for name, module in model.named_modules() if not is_mixing(module) and not [*module.children()]}
    per_unit = {name: m for name, m in leaves.items() if is_depthwise(m) or any(t.ndim == 1 for t in named_tensors(m).values())}
    return mixing | per_unit


def _unhooked_parameters(model: nn.Module, hooked: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The floating-point parameters whose hidden axes, if any, the inputs and outputs of the hooked modules do not show."""
    covered = {id(p) for m in hooked for p in m.parameters() if is_mixing(m) or is_depthwise(m) or p.ndim == 1}
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if id(p) not in covered and p.is_floating_point()}


def _assign_tokens_in_turn(experts: nn.Module, args: Any) -> Any:
    """Replace the router's choice, so that every expert gets tokens, and the same ones in each run."""
    hidden, chosen, *weights = args
    count = len(cast(Experts, experts).experts())
    return hidden, torch.arange(chosen.numel(), device=chosen.device).view_as(chosen) % count, *weights


def _append_input(inputs: dict[str, list[Tensor]], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Append the first tensor among the arguments of a call."""
    x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    if x is not None:
        inputs.setdefault(name, []).append(x.clone())


def _changed(before: Tensor, after: Tensor, axis: int) -> Tensor:
    """Where along an axis two tensors differ: bool ``[units]``."""
    return (before != after).movedim(axis, -1).reshape(-1, before.shape[axis]).any(0)
