"""Record one run of a model, and replay it with some units of one layer's output changed."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn

from blockprune.core._compat import ConvNd, ConvTransposeNd, NormBase
from blockprune.model.experts import record_routing
from blockprune.model.inputs import value_key
from blockprune.reorder.varied_values import Change, same_values
from blockprune.reorder.working_copy import Values, WorkingCopy, is_mixing


@attrs.frozen(eq=False)
class RecordedRun:
    """One run of a copy of a model: the inputs of its modules and the outputs of its mixing layers, call by call.

    A mixing layer (a Linear, an Embedding, an ungrouped convolution) computes each of its output units from all of its inputs. So a hidden
    axis starts at the outputs of mixing layers and ends at the inputs of mixing layers.

    Args:
        copied: the copy of the model, which other runs may give other values.
        values: those that it has in this run.
        modules: by name, the mixing layers and the modules that have one number or one kernel for each unit, such as norms and depthwise
            convolutions.
        layer_outputs: the outputs of each mixing layer that was called.
        module_inputs: the first input tensor of each module that was called.
        outputs: the tensors of the model's output.
        routing: the expert numbers and weights with which each module of `Experts` was called.
        unhooked_parameters: the parameters of the model that are in none of these modules, such as learned positions, scales and routers;
            a replay cannot show whether they have a hidden axis.

    Example:
        >>> from blockprune.model.calibration import default_forward
        >>> from blockprune.reorder.recording import RecordedRun
        >>> from blockprune.reorder.working_copy import WorkingCopy
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     recorded = RecordedRun.of(WorkingCopy.of(model, torch.ones(1, 2), default_forward))
        ...     recorded.replay("0", torch.tensor([False, True, False]))["2"]
        tensor([False,  True, False])
    """

    copied: WorkingCopy
    values: Values
    modules: Mapping[str, nn.Module]
    layer_outputs: Mapping[str, Sequence[Tensor]]
    module_inputs: Mapping[str, Sequence[Tensor]]
    outputs: Sequence[Tensor]
    routing: Mapping[str, Sequence[Any]]
    unhooked_parameters: Mapping[str, Tensor]

    @classmethod
    def of(cls, copied: WorkingCopy) -> "RecordedRun":
        """Run the copy with its present values and record it."""
        model = copied.model
        layer_outputs: dict[str, list[Tensor]] = {}
        module_inputs: dict[str, list[Tensor]] = {}
        routing: dict[str, list[Any]] = {}
        copy_once = _CopyOnce()

        def record(module: nn.Module, args: Any, kwargs: Any, output: Any, *, name: str) -> None:
            if (x := _first_tensor(args, kwargs)) is not None:
                module_inputs.setdefault(name, []).append(copy_once(x))
            if is_mixing(module) and isinstance(output, Tensor):
                layer_outputs.setdefault(name, []).append(output.clone())

        modules = _hookable_modules(model)
        with contextlib.ExitStack() as stack:
            for name, module in modules.items():
                stack.callback(module.register_forward_hook(partial(record, name=name), with_kwargs=True).remove)
            stack.enter_context(record_routing(model, routing))
            outputs = copied.run()
        # only an output that is one tensor can be replayed; a router that inherits from Linear may return several
        for name in [name for name in module_inputs if is_mixing(modules[name]) and name not in layer_outputs]:
            del modules[name], module_inputs[name]
        unhooked = _unhooked_parameters(model, [m for name, m in modules.items() if name in module_inputs or is_mixing(m)])
        return cls(copied, copied.values, modules, layer_outputs, module_inputs, outputs, routing, unhooked)

    @property
    def model(self) -> nn.Module:
        """The copy of the model."""
        return self.copied.model

    def run(self, change: Change = same_values) -> list[Tensor]:
        """The outputs of another run with the same values, after a change of the inputs."""
        self.copied.set_values(self.values)
        return self.copied.run(change)

    def is_multiplied_by_zero(self, layer: str) -> bool:
        """Whether a layer has no effect because the model multiplies its output by 0: NaN in the output then reaches other layers."""
        changes = _InputChanges(self.modules, self.module_inputs)
        try:
            with self._replayed_forwards(layer, torch.ones(self.units(layer), device="cpu").bool(), torch.nan, changes.compare):
                outputs = self.run()
        except Exception:  # for example, the model refuses NaN
            return False
        changed = changes.by_module()
        return changed is None or not self._are_outputs(outputs) or any(bool(inputs.any()) for inputs in changed.values())

    def _are_outputs(self, outputs: Sequence[Tensor]) -> bool:
        return len(outputs) == len(self.outputs) and all(map(torch.equal, outputs, self.outputs))

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
        changes = _InputChanges(self.modules, self.module_inputs)
        with self._replayed_forwards(layer, units, 1.0, changes.compare):
            try:
                outputs = self.run()
            except Exception:  # for example, the changed model calls an expert that it did not call before
                return None
        if not self._are_outputs(outputs):
            return None
        return changes.by_module()

    @contextlib.contextmanager
    def _replayed_forwards(self, layer: str, units: Tensor, change: float, observe: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Inside, mixing layers return their recorded outputs, one of them changed, and the inputs of all modules are passed on."""
        recorded = {name: iter(calls) for name, calls in self.layer_outputs.items()}

        def replayed(name: str, /, *args: Any, **kwargs: Any) -> Tensor:
            record(self.modules[name], args, kwargs, name=name)
            y = next(recorded[name])
            if name != layer:
                return y.clone()
            axis = unit_axis(self.modules[name], y)
            return y + change * (1 + y.abs().max()) * units.to(y).view([-1 if i == axis else 1 for i in range(y.ndim)])

        def record(module: nn.Module, args: Any, kwargs: Any, *, name: str) -> None:
            if (x := _first_tensor(args, kwargs)) is not None:
                observe(name, x)

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


def _hookable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The mixing layers, and the modules without children that have one number or one kernel for each unit."""
    mixing = {name: module for name, module in model.named_modules() if is_mixing(module)}
    leaves = {name: module for name, module in model.named_modules() if not is_mixing(module) and not [*module.children()]}
    per_unit = {name: m for name, m in leaves.items() if is_depthwise(m) or any(t.ndim == 1 for t in named_tensors(m).values())}
    return mixing | per_unit


def _unhooked_parameters(model: nn.Module, hooked: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The real parameters whose hidden axes, if any, the inputs and outputs of the hooked modules do not show."""
    covered = {id(p) for m in hooked for p in m.parameters() if is_mixing(m) or is_depthwise(m) or p.ndim == 1}
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if id(p) not in covered and not p.is_complex()}


def _first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor among the arguments of a call."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


class _CopyOnce:
    """Copies tensors; one that is given several times in succession, as to queries, keys and values, is copied once."""

    def __init__(self) -> None:
        self.key: Any = None
        self.last: list[Tensor] = []  # the last tensor, so that its address stays its own, and its copy

    def __call__(self, x: Tensor) -> Tensor:
        key = value_key(x)
        if key != self.key:
            self.key, self.last = key, [x, x.clone()]
        return self.last[1]


class _InputChanges:
    """Compares the inputs of modules with recorded ones, call by call, so that one input is held at a time."""

    def __init__(self, modules: Mapping[str, nn.Module], recorded: Mapping[str, Sequence[Tensor]]) -> None:
        self.modules, self.recorded = modules, recorded
        self.calls: Counter[str] = Counter()
        self.changed: dict[str, Tensor] = {}
        self.is_alike = True  # the same calls, with inputs of the same shapes

    def compare(self, name: str, x: Tensor) -> None:
        before, call = self.recorded.get(name), self.calls[name]
        self.calls[name] += 1
        if before is None:
            return
        if call >= len(before) or before[call].shape != x.shape:
            self.is_alike = False
        elif not isinstance(self.modules[name], nn.Embedding):  # its inputs are indices
            axis = unit_axis(self.modules[name], before[0])
            changed = (before[call] != x).movedim(axis, -1).reshape(-1, x.shape[axis]).any(0).cpu()
            self.changed[name] = changed | self.changed[name] if call else changed

    def by_module(self) -> dict[str, Tensor] | None:
        """The inputs that changed, bool ``[inputs]``; None if modules were called otherwise."""
        if not self.is_alike or any(self.calls[name] != len(before) for name, before in self.recorded.items()):
            return None
        return self.changed
