"""Which units of a model are constant, and which may be read by something that the example does not use."""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.core._compat import ConvNd
from blockprune.export.coupled_channels import LayerSide, channel_axes, first_line, is_depthwise, mixes_channels
from blockprune.export.input_dependence import OTHER_VALUES, InputDependence

Run = Callable[[nn.Module], list[Tensor]]  # model -> the output tensors on the example


def prunable_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers whose channels can be removed, by name."""
    return [(name, m) for name, m in model.named_modules() if mixes_channels(m) or is_depthwise(m) or isinstance(m, nn.Embedding)]


def is_empty(layer: nn.Module, side: str) -> Tensor:
    """Which outputs or inputs of a layer have only zero weights: bool ``[units]``."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.detach().movedim(channel_axes(layer)[side == "inputs"], 0).flatten(1).eq(0).all(1)


@torch.no_grad()
def constant_inputs(model: nn.Module, run: Run) -> tuple[dict[str, Tensor], dict[str, list[str | None]]]:
    """The constant value of each layer's inputs, zero for those that are not constant or not read; and why each must stay, or None."""
    lowest, highest = _input_ranges(model, run)
    constants: dict[str, Tensor] = {}
    reasons: dict[str, list[str | None]] = {}
    for name, layer in [(name, layer) for name, layer in prunable_layers(model) if mixes_channels(layer)]:
        unread = is_empty(layer, "inputs")
        unknown = torch.full_like(unread, torch.nan, dtype=torch.float64)
        low, high = lowest.get(name, unknown), highest.get(name, unknown)
        constant = (high - low) <= 1e-6 * torch.maximum(low.abs(), high.abs())  # False for NaN
        constants[name] = torch.where(constant & ~unread, (low + high) / 2, 0)
        padded = constant & (constants[name] != 0) & _pads_with_zeros(layer)
        removable = unread | (constant & ~padded)
        reasons[name] = [
            None if free else f"it is constant, but {name} pads it with zeros" if pads else f"{name} reads it"
            for free, pads in zip(removable.tolist(), padded.tolist(), strict=True)
        ]
    return constants, reasons


def _input_ranges(model: nn.Module, run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The lowest and the highest value of each input channel ``[channels]``, by layer; NaN for those that depend on the model's inputs.

    If Python reads conditions that depend on an input, the model runs again with all of them true, and then false; if it reads such
    numbers, with larger and with smaller ones. A layer that neither of these reaches has only zeros as constants. Both results are empty
    if the operations of the model cannot be followed.
    """
    lowest: dict[str, Tensor] = {}
    highest: dict[str, Tensor] = {}

    def record_range(name: str, layer: nn.Module, x: Tensor, dependence: InputDependence, calls: Counter[str]) -> None:
        if x.numel():
            value = torch.where(dependence.marks(x), torch.nan, x).movedim(_channel_axis(layer), -1).flatten(0, -2)
            lowest[name] = torch.minimum(value.amin(0), lowest.get(name, value[0]))
            highest[name] = torch.maximum(value.amax(0), highest.get(name, value[0]))
            calls[name] += 1

    def hook(layer: nn.Module, args: Any, kwargs: Any, *, name: str, dependence: InputDependence, calls: Counter[str]) -> None:
        dependence.paused(record_range, name, layer, args[0] if args else kwargs["input"], dependence, calls)

    def follow(model: nn.Module, dependence: InputDependence) -> Counter[str]:
        calls = Counter[str]()
        with contextlib.ExitStack() as stack:
            for name, layer in prunable_layers(model):
                if mixes_channels(layer):
                    record = partial(hook, name=name, dependence=dependence, calls=calls)
                    stack.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
            stack.enter_context(dependence)
            with contextlib.suppress(Exception) if dependence.has_other_values else contextlib.nullcontext():
                run(model)  # with other values the model may not run; the units that it has read until then are recorded
        return calls

    try:
        calls = follow(model, dependence := InputDependence(model))
    except Exception:  # for example, tensors without a storage; then only zero weights show which units are not needed
        return {}, {}
    for kind in [kind for kind, count in dependence.reads.items() if count]:
        others = []
        for change in OTHER_VALUES[kind]:
            copied = copy.deepcopy(model)  # a model may note the values that it has met
            others.append(follow(copied, InputDependence(copied, kind, change)))
        for name in lowest if kind == "number" else ():
            if all(other[name] < calls[name] for other in others):  # zeros survive slices, shifts and factors
                lowest[name] = torch.where((lowest[name] == 0) & (highest[name] == 0), lowest[name], torch.nan)
    return lowest, highest


@torch.no_grad()
def unused_reasons(model: nn.Module, run: Run) -> dict[LayerSide, str]:
    """Why units that a layer or parameter may read stay, if the example does not use this layer or parameter.

    Their code can cut or join units, so a layer may read units if it has as many inputs or outputs or more, or a whole fraction of them.
    """
    dependence = InputDependence(model)
    try:
        with dependence:
            run(model)
    except Exception as error:
        reason = f"the operations of the model cannot be followed ({first_line(error)})"
        return {(name, side): reason for name, _ in prunable_layers(model) for side in ("outputs", "inputs")}
    named = [(name, t) for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_floating_point()]
    owners = {name.rpartition(".")[0] for name, tensor in named if dependence.uses(tensor)}
    sizes: dict[tuple[int, bool], str] = {}  # by the size of an axis and whether a layer has it: the name of an unused layer or parameter
    for name, tensor in named:
        owner = name.rpartition(".")[0]
        is_layer = owner not in owners and not [*model.get_submodule(owner).children()]
        sizes |= {} if dependence.uses(tensor) else {(size, is_layer): owner if is_layer else name for size in tensor.shape}
    reasons: dict[LayerSide, str] = {}
    for name, layer in prunable_layers(model):
        for side in ("outputs", "inputs"):
            units = len(is_empty(layer, side))
            for (size, is_layer), unused in sizes.items():
                if size >= units or (is_layer and size > 1 and units % size == 0):
                    reasons[name, side] = f"the example does not use {unused}, which may read it; use it in forward="
    return reasons


def _channel_axis(layer: nn.Module) -> int:
    """The axis of a layer's inputs and outputs that its channels lie along, counted from the last."""
    return -1 - len(layer.kernel_size) if isinstance(layer, ConvNd) else -1


def _pads_with_zeros(layer: nn.Module) -> bool:
    """Whether some outputs are computed from fewer inputs than others, so that a constant input does not add the same to all."""
    if not isinstance(layer, ConvNd):
        return False
    pads = layer.padding == "same" if isinstance(layer.padding, str) else any(layer.padding)
    return layer.transposed or (pads and layer.padding_mode == "zeros")
