"""Find the hidden axes of a model: the sets of tensors whose units can be reordered together without a change of the model's outputs.

1. The model runs on an example, and the inputs and outputs of its layers are recorded (`RecordedRun`).
2. For each layer, two replays change one half of its output units and then the rest, while all other layers return their recorded outputs.
3. The inputs of other modules that change in the two replays tell which modules use the units, and whether each of their inputs depends on
   one unit or on several (`AxisTracer`).
4. Layers whose units arrive at the same module in the same way, or whose weights are tied, share one hidden axis.
5. Each hidden axis becomes a `UnitPermutation` that lists the weights, biases and norms that have the axis.
6. Finally all axes are permuted at random, and only those that leave the outputs unchanged are returned.

The model is traced with other values in its parameters and buffers, and the last step uses the model's own values and others, also of the
inputs: zeros and ones, for example, would hide that an operation uses a tensor.
"""

import contextlib
import itertools
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blockprune.core._compat import is_compiled_wrapper
from blockprune.core.progress import progress_bar
from blockprune.core.unit_permutation import UnitPermutation
from blockprune.model.calibration import Forward, default_forward
from blockprune.model.mask_reading import read_masks
from blockprune.model.parameters import check_loaded, parameter_refs, scripted_hint
from blockprune.model.running import without_compiled_code
from blockprune.reorder.recording import RecordedRun
from blockprune.reorder.tracing import AxisTracer, AxisUse, UsageCheck
from blockprune.reorder.varied_values import Change, same_values, vary_floats, vary_inputs
from blockprune.reorder.working_copy import SEED, Values, WorkingCopy

__all__ = ["find_axes"]

TOLERANCE = 1e-5  # of an output's value or of the median: the rounding errors of a model that always computes in float32
INTEGER_SEEDS = (SEED, SEED + 1, SEED + 2)  # random booleans of a few units may be equal

Check = tuple[Values, Change]  # the values of the model, and a change of its inputs
Consumers = Mapping[str, Mapping[str, AxisUse]]  # layer -> the modules that use its units, and how


def find_axes(model: nn.Module, example: Any, *, forward: Forward = default_forward, progress: bool | None = None) -> list[UnitPermutation]:
    """Find the hidden axes of a model whose units can be reordered or removed together; each is verified on the example.

    These are the hidden units of MLPs (with the gate, if any, in a Linear of its own or in the same one), the channels of value heads
    (also of shared ones), the heads where one Linear computes queries, keys and values, the channels between convolutions (also through
    depthwise convolutions), and a residual stream that a last layer reads. The documentation of this module describes the method. To prune
    the units of the axes, give them to `recipes.structured`, or to an allocator as ``coupled``.

    An axis is verified if a random permutation of its units changes no output by more than 1e-5 of its value or of the median output, with
    the model's own values and with others, since zeros and ones would hide that an operation uses a parameter or an input. If it does
    change the outputs, the parameters outside of layers (learned positions, scales, a router) that have exactly one axis of this length are
    permuted too, and the axis is verified again.

    These axes are not found: the channels of heads whose queries, keys and values come from one Linear, and such heads if they share keys;
    a gate whose units alternate with the units that it multiplies; and those where the model's code treats a unit by its number. If the
    units of one axis can be reordered in two ways (an outer product that is flattened), only the first is returned. The example must show
    all that matters: axes that may be shared with a layer that it does not call are left out with a warning, and sequences of a single
    token do not show the heads. Integers and booleans count as constants if the model does not run with other values of them. Buffers, and
    tensors in other attributes, that the example does not use are not noticed; nor are tensors in objects that are no module, list, tuple
    or dict, unless their values show the axis.

    Args:
        model: a model without masks; it is not changed (a copy, in float64 where the model can run in it, is traced).
        example: one small batch that calls every layer, with two tokens or more; the model runs several times for each layer. The experts
            of `as_linears` get the tokens in turn, whatever the router chooses, so the example needs at least as many tokens as experts.
        forward: (model, example) -> output, as in `Calibration`.
        progress: show a progress bar; by default in a terminal and in a notebook.

    Returns:
        Permutations that keep the order (0, 1, ...), those of residual streams first.

    Raises:
        ValueError: a masked or scripted model, a model on the meta device, one that accelerate has offloaded or that cannot be copied, an
            example that the model cannot run or for which it returns no floating-point tensors.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2)), torch.randn(5, 4)
        >>> (hidden,) = bp.find_axes(model, x)
        >>> hidden.rows, hidden.columns
        (('0.weight', '0.bias', '2.weight', '2.bias', '2.running_mean', '2.running_var'), ('3.weight',))
    """
    if read_masks(model):
        raise ValueError("the model is masked; find the hidden axes of a plain model: bp.finalize(model)")
    if is_compiled_wrapper(model):
        raise ValueError("the model is a compiled wrapper; give the module that was compiled: model._orig_mod")
    if hint := scripted_hint(model):
        raise ValueError(f"find_axes cannot trace the model{hint}")
    refs = [users[0] for users in parameter_refs(model).values()]
    check_loaded(model, refs, "find_axes")
    if meta := [ref for ref in refs if ref.stored.is_meta]:
        raise ValueError(f"{meta[0].name} {meta[0].shape} is on the meta device and has no values; load the model's weights first")
    with torch.no_grad(), without_compiled_code():
        recorded = _varied_run(WorkingCopy.of(model, example, forward))
        checks = _checks(recorded)
        usage = UsageCheck(recorded)
        tracer = AxisTracer(recorded)
        consumers = _consumers(tracer, progress)
        unused = usage.unused_modules()
        unused |= {
            layer: {recorded.units(layer)} for layer, uses in consumers.items() if not uses and recorded.is_multiplied_by_zero(layer)
        }
        plan = []
        for group in _axis_groups(tracer, consumers):
            permutation = _identity_permutation(recorded, group)
            if permutation is None:
                continue
            if names := _unused_with_axis(usage, unused, group, permutation):
                _warn_of_unused(names, permutation)
            else:
                plan.append(permutation)
        usage.recorded = recorded = attrs.evolve(recorded, layer_outputs={}, module_inputs={})  # the memory is needed
        return _verified(usage, plan, checks)


def _varied_run(copied: WorkingCopy) -> RecordedRun:
    """A run of the model with other values in its parameters and buffers, or in its parameters; with its own ones if neither succeeds."""
    own = RecordedRun.of(copied)
    own_finite, own_modules = _finite(own), own.module_inputs.keys()
    del own
    values: Sequence[Values] = ("varied", "varied parameters")
    for changed in values:
        copied.set_values(changed)
        try:
            varied = RecordedRun.of(copied)
        except Exception:  # for example, a buffer holds positions that the model uses as indices
            continue
        if _finite(varied) == own_finite and varied.module_inputs.keys() == own_modules:
            return varied
        del varied
    warnings.warn(
        "the model does not run with other values in its parameters, so the axes are verified with its own values only; parameters that "
        "are all zero or all one may have an axis that their values do not show",
        stacklevel=3,
    )
    copied.set_values("own")
    return RecordedRun.of(copied)


def _finite(recorded: RecordedRun) -> list[bool]:
    return [bool(y.isfinite().all()) for y in recorded.outputs]


def _checks(recorded: RecordedRun) -> list[Check]:
    """The runs of the model, with other values and with its own, and with other inputs if it runs with them."""
    checks: list[Check] = [(recorded.values, same_values), ("own", same_values)]
    for change in (vary_floats, vary_inputs):
        with contextlib.suppress(Exception):  # for example, an integer is no index any more
            recorded.run(change)
            checks.append((recorded.values, change))
    if recorded.values != "own":
        expected = recorded.copied.find_integers()
        for seed in INTEGER_SEEDS if recorded.copied.integers else ():
            with contextlib.suppress(Exception):
                recorded.copied.set_values(seed)
                if not all(map(torch.equal, recorded.copied.run(), expected)):
                    checks.append((seed, same_values))
    return sorted(checks, key=lambda check: check[0] == "own")  # so that the values change once


@attrs.frozen
class _AxisGroup:
    """The layers that compute the units of one hidden axis, and the modules that use them.

    Args:
        producers: the layers, with the number of pieces of which their output consists (`AxisUse.pieces`).
        units: the number of units.
        uses: the modules that use the units.
        head_sizes: the sizes of the attention heads among which the units are divided.
    """

    producers: Mapping[str, int]
    units: int
    uses: Mapping[str, AxisUse]
    head_sizes: Collection[int] = ()

    @property
    def is_separate(self) -> bool:
        """Whether all modules use the units one by one; the modules that read a residual stream through a norm do not."""
        return all(use.is_separate for use in self.uses.values())


def _axis_groups(tracer: AxisTracer, consumers: Consumers) -> list[_AxisGroup]:
    """The axes of the model: first the residual streams, whose units are used several at a time, then those whose units are used singly."""
    pieces = {layer: max((use.pieces for use in uses.values()), default=1) for layer, uses in consumers.items()}
    sizes = {layer: max((use.size for use in uses.values()), default=1) for layer, uses in consumers.items()}
    units = {layer: tracer.recorded.units(layer) // (pieces[layer] * sizes[layer]) for layer in consumers}
    groups = [
        _AxisGroup(
            {layer: pieces[layer] for layer in producers},
            units[producers[0]],
            {name: use for layer in producers for name, use in consumers[layer].items()},
        )
        for producers in _layers_by_axis(tracer.recorded, consumers, units)
    ]
    separate = [group for group in groups if group.is_separate]
    separately_used = {name for group in separate for name in group.uses}
    # the units of queries and keys are no stream: they arrive mixed at an output projection, which uses the values' units one by one
    streams = [group for group in groups if not separately_used & group.uses.keys()]
    return [*streams, *(attrs.evolve(group, head_sizes=_head_sizes(tracer, consumers, group)) for group in separate)]


def _consumers(tracer: AxisTracer, progress: bool | None) -> Consumers:
    """The modules that use the units of each layer; a layer whose units reach the output is left out."""
    consumers: dict[str, Mapping[str, AxisUse]] = {}
    for layer in progress_bar(tracer.recorded.layer_outputs, "axes", progress):
        first, own = tracer.expert_prefixes(layer)
        uses: Mapping[str, AxisUse] | None = None
        if first == own:
            uses = tracer.consumers_of(layer)
        elif (first_uses := consumers.get(layer.replace(own, first, 1))) is not None:  # experts are alike; verification covers all of them
            uses = {name.replace(first, own, 1): use for name, use in first_uses.items()}
        if uses is not None:
            consumers[layer] = uses
    return consumers


def _layers_by_axis(recorded: RecordedRun, consumers: Consumers, units_of: Mapping[str, int]) -> list[list[str]]:
    """The layers that share one hidden axis, for each axis that another mixing layer uses.

    Layers share an axis if they have equally many units and a mixing layer or norm uses the units of both, either one by one or several at
    a time. They also share it if the weight of a consumer is tied to the weight of a layer, as in a head that is tied to an embedding.
    """
    groups: list[
        tuple[list[str], set[tuple[Any, ...]]]
    ] = []  # layers of one axis, and the marks of which layers of this axis have at least one
    output_axes = {recorded.output_axis(layer) for layer in consumers}
    for layer, uses in consumers.items():
        units = units_of[layer]
        readers = [name for name in uses if name in recorded.layer_outputs]
        marks: set[tuple[Any, ...]] = {
            (name, use.is_separate, units) for name, use in uses.items() if name in readers or recorded.tensors_per_unit(name, units)
        }
        marks |= output_axes & {recorded.input_axis(reader) for reader in readers}
        if marks:
            marks.add(recorded.output_axis(layer))
            same_axis = [group for group in groups if group[1] & marks]
            merged = [name for layers, _ in same_axis for name in layers]
            groups = [group for group in groups if not group[1] & marks]
            groups.append(([*merged, layer], marks.union(*(group_marks for _, group_marks in same_axis))))
    is_read = [layers for layers, _ in groups if any(name in recorded.layer_outputs for layer in layers for name in consumers[layer])]
    return sorted(is_read, key=lambda layers: [*consumers].index(layers[0]))


def _head_sizes(tracer: AxisTracer, consumers: Consumers, group: _AxisGroup) -> set[int]:
    """The sizes of the heads into which queries and keys divide the group's units at the output projections that both reach."""
    readers = group.uses.keys() & tracer.recorded.layer_outputs.keys()
    mixed = [(layer, name) for layer, uses in consumers.items() for name in uses.keys() & readers if not uses[name].is_separate]
    return {size for layer, name in mixed if (size := tracer.head_size(layer, name))}


def _identity_permutation(recorded: RecordedRun, group: _AxisGroup) -> UnitPermutation | None:
    """The permutation that lists all tensors of an axis and keeps the order; None if the units cannot be reordered."""
    units = group.units
    groups = _number_of_unit_groups(recorded, group, units)
    if groups is None:
        return None
    if any(use.inputs != units for name, use in group.uses.items() if not use.is_separate or name not in recorded.layer_outputs):
        return None
    readers = [name for name in group.uses if name in recorded.layer_outputs]
    biases = [f"{layer}.bias" for layer in group.producers if getattr(recorded.modules[layer], "bias", None) is not None]
    norms = [name for name in group.uses if name not in recorded.layer_outputs]
    per_unit = [f"{name}.{own}" for name in norms for own in recorded.tensors_per_unit(name, units)]

    def weights(layers: Iterable[str], *, input_first: bool) -> list[str]:
        return [f"{layer}.weight" for layer in layers if recorded.is_input_first(layer) == input_first]

    rows = [*weights(group.producers, input_first=False), *biases, *per_unit, *weights(readers, input_first=True)]
    columns = [*weights(group.producers, input_first=True), *weights(readers, input_first=False)]
    copies = {f"{name}.weight": use.copies for name, use in group.uses.items()}
    copies |= {f"{layer}.{own}": count for layer, count in group.producers.items() for own in ("weight", "bias")}
    copies = {name: count for name, count in copies.items() if count > 1 and name in (*rows, *columns)}
    return UnitPermutation(
        torch.arange(units, device="cpu"), rows=rows, columns=columns, groups=groups, copies=copies, removable=group.is_separate
    )


def _number_of_unit_groups(recorded: RecordedRun, group: _AxisGroup, units: int) -> int | None:
    """The number of groups that the units must stay in: heads or the groups of a GroupNorm. None if the units cannot be reordered."""
    counts = {use.groups for use in group.uses.values()} | {units // size for size in group.head_sizes if units % size == 0}
    norms = [module for name in group.uses if isinstance(module := recorded.modules[name], nn.GroupNorm)]
    counts |= {norm.num_groups for norm in norms if norm.num_groups < units}
    largest = max(counts)
    return None if largest >= units or any(largest % count for count in counts) else largest


def _unused_with_axis(usage: UsageCheck, unused: Mapping[str, set[int]], group: _AxisGroup, permutation: UnitPermutation) -> list[str]:
    """The modules and the unhooked parameters that may have the axis but that the example does not use.

    The outputs do not depend on them, so the verification could not show whether they have the axis.
    """
    units = len(permutation.order)
    lengths = {units, *(units * copies for copies in permutation.copies.values())}
    modules = [name for name, sizes in unused.items() if sizes & lengths]
    parameters = usage.unused_parameters(units)
    if group.is_separate:  # a module of torch does not use parameters that were added to it
        parameters = [name for name in parameters if not _is_of_torch(usage.recorded.model.get_submodule(name.rpartition(".")[0]))]
    return [*modules, *parameters]


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _warn_of_unused(names: Sequence[str], permutation: UnitPermutation) -> None:
    tensors = [*permutation.rows, *permutation.columns][:2]
    warnings.warn(
        f"the example does not use {', '.join(names[:4])}, which may share the axis of {len(permutation.order)} units of "
        f"{', '.join(tensors)}, so this axis is left out; give an example (or forward=) that uses all layers",
        stacklevel=3,
    )


def _verified(usage: UsageCheck, plan: list[UnitPermutation], checks: Sequence[Check]) -> list[UnitPermutation]:
    """The permutations of a plan that leave the outputs of all checks unchanged when they are applied at once.

    Bisection finds them in few runs, because most plans are right.
    """
    if not plan or _keeps_outputs(usage.recorded.copied, checks, plan):
        return plan
    if len(plan) == 1:
        for prefix in (_common_prefix(plan[0]), ""):
            extended = _with_unhooked_parameters(usage, plan[0], prefix)
            if extended is not None and _keeps_outputs(usage.recorded.copied, checks, [extended]):
                return [extended]
        return []
    middle = len(plan) // 2
    verified, others = _verified(usage, plan[:middle], checks), _verified(usage, plan[middle:], checks)
    if not verified or not others or _keeps_outputs(usage.recorded.copied, checks, [*verified, *others]):
        return [*verified, *others]
    for permutation in others:  # two permutations can reorder the same axis
        verified = [*verified, permutation] if _keeps_outputs(usage.recorded.copied, checks, [*verified, permutation]) else verified
    return verified


def _keeps_outputs(copied: WorkingCopy, checks: Sequence[Check], plan: Sequence[UnitPermutation]) -> bool:
    """Whether the outputs are unchanged if the units of each permutation are reordered at random."""
    generator = torch.Generator().manual_seed(SEED)
    for values, change in checks:
        copied.set_values(values)
        expected = copied.run(change)
        try:
            with copied.permuted([_randomized(permutation, generator) for permutation in plan]):
                outputs = copied.run(change)
        except Exception:  # for example, a tensor is tied to one that is not listed
            return False
        if len(outputs) != len(expected) or not all(map(_is_close, outputs, expected)):
            return False
    return True


def _common_prefix(permutation: UnitPermutation) -> str:
    """The longest prefix that the names of all modules of a permutation share, such as the name of the block that contains an MLP."""
    paths = [name.split(".")[:-1] for name in (*permutation.rows, *permutation.columns)]
    shared = itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*paths, strict=False))
    return "".join(f"{part}." for part, *_ in shared)


def _with_unhooked_parameters(usage: UsageCheck, permutation: UnitPermutation, prefix: str) -> UnitPermutation | None:
    """The permutation with all unhooked parameters of the same length below a prefix.

    None if there are none, or if the outputs do not depend on one of them, so that they could not verify it.
    """
    units = len(permutation.order)
    unhooked = usage.unhooked_parameters(units, prefix)
    if not any(unhooked.values()) or usage.unused_parameters(units, prefix):
        return None
    rows, columns, last = ((*getattr(permutation, role), *unhooked[role]) for role in ("rows", "columns", "last"))
    return attrs.evolve(permutation, rows=rows, columns=columns, last=last)


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    """Whether an output is unchanged up to rounding errors, with infinite values and NaN at the same places."""
    if actual.shape != expected.shape or not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(actual, expected)
    size = expected.abs()
    positive = size[size.isfinite() & (size > 0)]
    median = positive.median() if len(positive) else 0
    close = size.isfinite() & ((actual - expected).abs() <= TOLERANCE * size.clamp_min(median))
    return bool((close | (actual == expected) | (actual.isnan() & expected.isnan())).all())


def _randomized(permutation: UnitPermutation, generator: torch.Generator) -> UnitPermutation:
    """A random order in which every unit changes its position within its group: one cycle through each group."""
    order = permutation.order.clone()
    for group in order.split(len(order) // permutation.groups):
        cycle = group[torch.randperm(len(group), generator=generator, device="cpu")]
        order[cycle] = cycle.roll(1)
    return attrs.evolve(permutation, order=order)
