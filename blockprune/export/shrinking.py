"""A smaller dense model without the units that masks have emptied, with the same outputs."""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blockprune.core._compat import tree_leaves, tree_map
from blockprune.core.table import Rows, Table
from blockprune.export.constant_units import constant_inputs, is_empty, prunable_layers, unused_reasons
from blockprune.export.coupled_channels import (
    ChannelGroup,
    CouplingGraph,
    InputReasons,
    LayerSide,
    channel_axes,
    first_line,
    mixes_channels,
    update_head_counts,
)
from blockprune.export.output_check import Change, OutputCheck, RunExample
from blockprune.export.uniform_widths import UniformWidths, uniform_widths
from blockprune.model.apply import finalize
from blockprune.model.calibration import Forward, default_forward
from blockprune.model.hf_checkpoint import model_config
from blockprune.model.mask_reading import read_masks
from blockprune.model.running import (
    cuda_devices,
    disable_attention_fastpath,
    float64_copy,
    keep_unfilled_buffers,
    preserve_state,
    seeded,
    to_model_device,
)
from blockprune.model.sharding import check_not_fully_sharded

GroupKey = frozenset[tuple[LayerSide, frozenset[int]]]  # a group, by the channels' indices in the given model


@attrs.frozen
class Units:
    """Units of one side of a layer, by their indices in the model that was given to `shrink`.

    Args:
        layer: its name.
        side: "outputs" (rows of a Linear, filters) or "inputs" (columns, channels).
        indices: of the units.
        total: units of this side of the layer.
        reason: why they were not removed; empty if they were.

    Example:
        >>> bp.export.Units("fc", "outputs", (0, 3), total=8, reason="it is an output of the model")
        Units(layer='fc', side='outputs', indices=(0, 3), total=8, reason='it is an output of the model')
    """

    layer: str
    side: str
    indices: tuple[int, ...]
    total: int
    reason: str = ""


@attrs.frozen(eq=False, repr=False)
class ShrinkResult(Table):
    """A smaller model, the units that were removed, and the empty units that were not, with the reason.

    It prints as a table.

    Args:
        model: the smaller model.
        removed: the units that were removed, by layer and side.
        kept: the empty units that were not, each with its reason.
        widths: of a Hugging Face model: its sizes, and what it costs that all layers have the same; None for other models.
        not_uniform: why a Hugging Face model has widths that its configuration does not express, although ``uniform`` was asked for, so
            that ``from_pretrained`` cannot load it; empty otherwise.

    Example:
        >>> from blockprune.export import Units
        >>> removed, kept = Units("fc", "inputs", (0, 3), total=4), Units("fc", "outputs", (1,), total=2, reason="an output")
        >>> bp.export.ShrinkResult(nn.Linear(2, 2), (removed,), (kept,))
        layer     side  units  of             what
        fc      inputs      2   4          removed
        fc     outputs      1   2  kept: an output
    """

    model: nn.Module
    removed: tuple[Units, ...]
    kept: tuple[Units, ...]
    widths: UniformWidths | None = None
    not_uniform: str = ""

    def table(self) -> Rows:
        all_units = [*((units, "removed") for units in self.removed), *((units, f"kept: {units.reason}") for units in self.kept)]
        cells = [(units.layer, units.side, str(len(units.indices)), str(units.total), what) for units, what in all_units]
        if self.widths:
            free, uniform = self.widths.parameters
            sizes = ", ".join(f"{name} {change}" for name, change in self.widths.sizes.items()) or "no change"
            cost = f"{uniform / free - 1:+.1%} parameters for uniform widths ({sizes})"
            cells.append(("config", "all", str(uniform - free), str(free), cost))
        if self.not_uniform:
            cells.append(("config", "all", "", "", f"does not fit the model: {self.not_uniform}"))
        return [("layer", "side", "units", "of", "what"), *cells]


def shrink(model: nn.Module, example: Any, *, forward: Forward = default_forward, uniform: bool = True) -> ShrinkResult:
    """A new, smaller model without the units, filters, channels and attention heads that masks have emptied, with the same outputs.

    A unit is removed if every layer that reads it has zero weights for it, or if its value is computed from parameters, buffers and
    constants alone. A constant that is not zero moves into the biases of the layers that read it. Every operation of a run on the example
    is followed to see what depends on an input, of any type. Only attention is taken for an average although a mask may hide all tokens.

    Torch-Pruning's graph (extra ``shrink``) proposes which units must be removed together. Each proposal is checked: in evaluation mode,
    the outputs on the example must stay the same, to 1e-5 of the largest output. Units that fail the check are kept, and so are units that
    the graph cannot follow and units that a layer may read which the example does not use.

    What Python decides is no operation, so the model also runs with other values of it, where it can: conditions on inputs become true and
    false; numbers that Python reads of inputs (``int()``, ``item()``, ``tolist()``, ``numpy()``), and ints and floats in the example,
    become a little larger and smaller; axes of the example become shorter. Units that this changes are kept; where
    the model runs with no other numbers of inputs, only zeros count as constants. What these runs cannot show is not seen:

    * bools and other objects in the example, and numbers and tensors in them; axes of length 1; lengths that values decide
      (``x[mask].shape``); values for which the forward does something else only if they change more;
    * arguments that the example leaves out. Where these call layers or parameters that the example does not use, units that may be read
      there are kept; but not where they call the same layers more often or not at all, or operations alone. Let ``forward`` return the
      outputs of several such calls.

    Args:
        model: with masks; it is not changed. Sizes that a model keeps elsewhere are not updated, but for a Hugging Face ``config``.
        example: a batch of several items that the model can run, and that uses all of its layers; the smaller model runs any batch, but for
            what the model decides as described above. There is a warning if the model runs with no other ints and floats than those in the
            example; give those that never change in ``forward``.
        forward: (model, example) -> output, as in `Calibration`.
        uniform: give all layers of a Hugging Face model the widths that its configuration can express, and write them there, so that
            ``save_pretrained`` and ``from_pretrained`` work; the result says what this costs. If False, each layer has its own widths, and
            the configuration stays as it was. The same happens where uniform widths fail; a warning and the result then say why. Other
            models always have widths of their own.

    Raises:
        ImportError: Torch-Pruning is not installed.
        TypeError: a model that is not a module.
        ValueError: a model without masks, one that ``fully_shard`` or ``parallelize_module`` has sharded, an example that the model cannot
            run, or an output without tensors.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> mask = bp.BlockMask(torch.arange(8)[:, None] < 6, bp.BlockGrid((8, 4), (1,)))
        >>> shrunk = bp.export.shrink(bp.apply_masks(model, {"0.weight": mask}), torch.randn(3, 4))
        >>> shrunk, shrunk.model[0]
        (layer     side  units  of     what
         0      outputs      2   8  removed
         2       inputs      2   8  removed, Linear(in_features=4, out_features=6, bias=True))
    """
    if importlib.util.find_spec("torch_pruning") is None:
        raise ImportError('shrink uses the dependency graph of Torch-Pruning; install it: pip install "blockprune[shrink]"')
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module; give the masked model")
    if not read_masks(model):
        raise ValueError("the model has no masks, so none of its units are empty; apply_masks(model, masks) first")
    check_not_fully_sharded(model, "shrink runs smaller copies of the model", nor_dtensors=True)
    plain = finalize(model)
    with preserve_state(plain):
        working, run = _float64_model(plain, example, forward)
        with torch.no_grad():
            check = OutputCheck.of(working, to_model_device(working, example), run)
            reasons_of_unused = unused_reasons(working, run)
        state = _State(working)
        while True:  # removed units may leave others unread or constant
            constants, input_reasons = constant_inputs(state.model, run)
            graph = CouplingGraph(copy.deepcopy(state.model), run, reasons_of_unused)
            passed = state.remove_groups(graph, constants, input_reasons, check)
            if not passed:
                break
        kept = tuple(state.empty_units(plain, graph, input_reasons))
    sides = [(name, side) for name, _ in prunable_layers(plain) for side in ("outputs", "inputs")]
    removed = tuple(_units(plain, side, state.removed[side]) for side in sides if side in state.removed)
    widths = uniform_widths(state.model, plain) if uniform else None
    if not_uniform := _failure_of_widths(widths, plain, check) if uniform and removed else "":
        widths = None
        warnings.warn(
            f"the layers of the smaller model have widths of their own ({not_uniform}), so from_pretrained cannot load what its "
            "save_pretrained writes; with uniform=False this is what you ask for, and bp.finalize(model) is a model that can be saved",
            stacklevel=2,
        )
    if widths is None:
        return ShrinkResult(_restore_dtypes(state.model, plain), removed, kept, not_uniform=not_uniform)
    removed, filled = _split_filled(removed, widths.model)
    return ShrinkResult(_restore_dtypes(widths.model, plain), removed, (*kept, *filled), widths)


@attrs.define(eq=False)
class _State:
    """The smaller model so far, which channels of the given model it lacks, and which groups failed the check, with the reason."""

    model: nn.Module
    removed: dict[LayerSide, frozenset[int]] = attrs.field(factory=dict)
    failed: dict[GroupKey, str] = attrs.field(factory=dict)

    def remove_groups(
        self, graph: CouplingGraph, constants: dict[str, Tensor], input_reasons: InputReasons, check: Callable[[nn.Module], str]
    ) -> bool:
        """Remove all groups that pass the check; return whether there are any."""
        proposed = [group for name, _ in prunable_layers(self.model) if (group := graph.group(name, "outputs", input_reasons)[0])]
        groups = {key: group for group in proposed if (key := self._key(group)) not in self.failed}
        self.model, passed = _bisect_removal(self.model, groups, partial(_without, graph=graph, constants=constants), check, self.failed)
        for layer_side, indices in (item for key in passed for item in key):
            self.removed[layer_side] = self.removed.get(layer_side, frozenset()) | indices
        return bool(passed)

    def empty_units(self, plain: nn.Module, graph: CouplingGraph, input_reasons: InputReasons) -> Iterator[Units]:
        """The units that are empty but were not removed, by reason."""
        for name, layer in prunable_layers(self.model):
            for side in ("outputs", "inputs") if mixes_channels(layer) else ("outputs",):
                empty = is_empty(layer, side).nonzero().flatten().tolist()
                graph_reasons = graph.group(name, side, input_reasons)[1] if empty else {}
                by_reason: dict[str, list[int]] = {}
                for index, original in zip(empty, self._original_indices((name, side), empty), strict=True):
                    reason = self._failure((name, side), original) or graph_reasons[index]
                    by_reason.setdefault(reason, []).append(original)
                yield from (_units(plain, (name, side), indices, reason) for reason, indices in by_reason.items())

    def _failure(self, layer_side: LayerSide, original: int) -> str:
        """Why the removal of this unit failed; empty if it did not."""
        for key, failure in self.failed.items():
            if any(side == layer_side and original in indices for side, indices in key):
                return failure
        return ""

    def _key(self, group: ChannelGroup) -> GroupKey:
        """The channels of a group by their indices in the given model."""
        return frozenset((side, frozenset(self._original_indices(side, indices))) for side, indices in group.channels.items())

    def _original_indices(self, layer_side: LayerSide, indices: Iterable[int]) -> list[int]:
        """The indices in the given model of channels of the smaller model."""
        indices, removed = list(indices), self.removed.get(layer_side, frozenset())
        remaining = [i for i in range(max(indices, default=0) + len(removed) + 1) if i not in removed]
        return [remaining[i] for i in indices]


def _float64_model(plain: nn.Module, example: Any, forward: Forward) -> tuple[nn.Module, RunExample]:
    """A copy, in float64 if the model can run so, and a function that runs it on the example."""

    def run(model: nn.Module, change: Change | None = None) -> list[Tensor]:
        batch = to_model_device(model, example)
        with seeded(0, cuda_devices(model)), disable_attention_fastpath(), keep_unfilled_buffers(model):
            output = forward(model, tree_map(change, batch) if change else batch)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

    with torch.no_grad():
        working, outputs = float64_copy(plain, run)
    if not outputs:
        raise ValueError("the model's output on the example has no tensors to compare; pass a forward= that returns some")
    return working, run


def _bisect_removal(
    model: nn.Module,
    groups: Mapping[GroupKey, ChannelGroup],
    without: Callable[[nn.Module, list[ChannelGroup]], nn.Module],
    check: Callable[[nn.Module], str],
    failed: dict[GroupKey, str],
) -> tuple[nn.Module, list[GroupKey]]:
    """The model without all groups that pass the check, and their keys. Groups that fail are found by halving, and added to ``failed``."""
    passed: list[GroupKey] = []
    smallest, stack = model, [list(groups)] if groups else []
    while stack:
        keys = stack.pop()
        try:
            smaller = without(model, [groups[key] for key in [*passed, *keys]])
            failure = check(smaller)
        except Exception as error:  # the model's own code may raise anything on other sizes
            failure = f"without it the model cannot run ({first_line(error)})"
        if not failure:
            passed, smallest = [*passed, *keys], smaller
        elif len(keys) > 1:
            stack += [keys[len(keys) // 2 :], keys[: len(keys) // 2]]
        else:
            failed[keys[0]] = failure
    return smallest, passed


@torch.no_grad()
def _without(model: nn.Module, groups: Sequence[ChannelGroup], *, graph: CouplingGraph, constants: dict[str, Tensor]) -> nn.Module:
    """A copy of a model without these groups of channels."""
    smaller, removed = copy.deepcopy(model), dict[LayerSide, frozenset[int]]()
    for layer_side, indices in (item for group in groups for item in group.channels.items()):
        removed[layer_side] = removed.get(layer_side, frozenset()) | indices
    for (name, side), indices in removed.items():
        if side == "inputs" and name in constants:
            _add_constants_to_bias(smaller.get_submodule(name), constants[name], sorted(indices))
    for layer_side, indices in removed.items():
        graph.remove(smaller, layer_side, indices)
    for group in groups:
        if group.head_size:
            update_head_counts(smaller, model, group)
    return smaller


def _add_constants_to_bias(layer: Any, constants: Tensor, indices: list[int]) -> None:
    """Add to a layer's bias what the layer computes from these constant inputs."""
    if (values := constants[indices]).any():
        weight = layer.weight
        if weight.ndim > 2:
            weight = weight.movedim(channel_axes(layer), (0, 1)).flatten(2).sum(2)  # [outputs, inputs]
        shift = weight[:, indices] @ values.to(weight.dtype)
        layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift)


def _units(plain: nn.Module, layer_side: LayerSide, indices: Iterable[int], reason: str = "") -> Units:
    name, side = layer_side
    return Units(name, side, tuple(sorted(indices)), len(is_empty(plain.get_submodule(name), side)), reason)


def _failure_of_widths(widths: UniformWidths | None, plain: Any, check: Callable[[nn.Module], str]) -> str:
    """Why a Hugging Face model cannot have widths that its configuration expresses; empty if it can, or is no such model."""
    if widths is None:
        is_built_from_config = model_config(plain) is not None
        return f"no configuration was found of which {type(plain).__name__} gets such widths" if is_built_from_config else ""
    try:
        failure = check(widths.model)
    except Exception as error:  # the model's own code may raise anything on other sizes
        return f"with uniform widths it cannot run ({first_line(error)})"
    return failure.replace("without it", "with uniform widths")


def _split_filled(removed: Iterable[Units], model: nn.Module) -> tuple[tuple[Units, ...], tuple[Units, ...]]:
    """The units that a model with uniform widths lacks, and those that it has again, as zeros."""
    lacking, filled = [], []
    for units in removed:
        width = len(is_empty(model.get_submodule(units.layer), units.side))
        count = units.total - width
        if count:
            lacking.append(attrs.evolve(units, indices=units.indices[:count]))
        if len(units.indices) > count:
            reason = "the configuration cannot express a smaller width of this layer; it is zero, and uniform=False removes it"
            filled.append(attrs.evolve(units, indices=units.indices[count:], reason=reason))
    return tuple(lacking), tuple(filled)


def _restore_dtypes(smaller: nn.Module, plain: nn.Module) -> nn.Module:
    """The smaller model with the dtypes, training modes and ``requires_grad`` flags of the given model."""
    tensors = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    for name, tensor in [*smaller.named_parameters(), *smaller.named_buffers()]:
        template = tensors.get(name, tensors.get(f"{name.removesuffix('bias')}weight"))  # a bias may be new
        assert template is not None
        tensor.data = tensor.data.to(template.dtype)
        if isinstance(tensor, nn.Parameter):
            tensor.grad = None
            tensor.requires_grad_(template.requires_grad)
    for name, module in plain.named_modules():
        smaller.get_submodule(name).training = module.training
    return smaller
