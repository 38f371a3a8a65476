"""Trace the units of a layer to the modules that use them, and find the modules and parameters that the example does not use."""

from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor

from blockprune.reorder.recording import RecordedRun, named_tensors
from blockprune.reorder.varied_values import vary_inputs
from blockprune.reorder.working_copy import SEED


@attrs.frozen
class AxisUse:
    """How a module uses the units of a layer.

    Args:
        inputs: the number of the module's inputs.
        copies: how many times the inputs contain all units, if every input depends on one unit only; 0 if inputs depend on several units.
            Where a unit is a run of several inputs, as after flatten, these count as one copy.
        groups: the units are in this many equal groups of consecutive units, and the copies of one group follow each other.
        pieces: the layer's output contains all units this many times, one piece after another, and an input depends on the same unit of
            each piece; 2 if one Linear computes an MLP's gate and what the gate multiplies.
        size: consecutive units of the layer's output that count as one unit, of each piece; the size of a head if one Linear computes
            queries, keys and values.

    Example:
        >>> from blockprune.reorder.tracing import AxisUse
        >>> half = torch.tensor([True, False])
        >>> AxisUse.of(half, half.repeat_interleave(3), ~half.repeat_interleave(3))  # flattened: three inputs for each unit
        AxisUse(inputs=6, copies=1, groups=1, pieces=1, size=1)
    """

    inputs: int
    copies: int
    groups: int = 1
    pieces: int = 1
    size: int = 1

    @property
    def is_separate(self) -> bool:
        """Whether every input depends on one unit only."""
        return self.copies > 0

    @classmethod
    def of(cls, half: Tensor, changed: Tensor, changed_by_rest: Tensor) -> "AxisUse":
        """From two replays: the inputs that change with half of the units, and those that change with the rest of the units."""
        units, inputs = len(half), len(changed)
        if inputs % units == 0:
            for copies, groups, unit_of_input in _layouts(units, inputs // units):
                wrong = (changed & ~half[unit_of_input]) | (changed_by_rest & half[unit_of_input])
                # an input can be dead, for example behind a ReLU, but most inputs must change
                if not wrong.any() and 2 * int((changed | changed_by_rest).sum()) >= inputs:
                    return cls(inputs, copies, groups)
        return cls(inputs, copies=0)


def _layouts(units: int, repeats: int) -> Iterator[tuple[int, int, Tensor]]:
    """The ways in which ``units * repeats`` inputs can contain units: copies, groups, and the unit of each input."""
    yield 1, 1, torch.arange(units, device="cpu").repeat_interleave(repeats)  # each unit is a run of inputs, as after flatten
    for groups in range(1, units):
        if units % groups == 0:
            yield repeats, groups, torch.arange(units, device="cpu").view(groups, 1, -1).expand(-1, repeats, -1).flatten()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


@attrs.frozen(eq=False)
class AxisTracer:
    """Traces the units of a layer to the modules that use them, by replays of a recorded run with some of the units changed.

    Example:
        >>> from blockprune.model.calibration import default_forward
        >>> from blockprune.reorder.recording import RecordedRun
        >>> from blockprune.reorder.working_copy import WorkingCopy
        >>> from blockprune.reorder.tracing import AxisTracer
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> with torch.no_grad():
        ...     AxisTracer(RecordedRun.of(WorkingCopy.of(model, torch.randn(8, 2), default_forward))).consumers_of("0")
        {'2': AxisUse(inputs=4, copies=1, groups=1, pieces=1, size=1)}
    """

    recorded: RecordedRun
    generator: torch.Generator = attrs.field(factory=_generator, init=False)  # not torch's own, in which other threads draw, too

    def consumers_of(self, layer: str) -> dict[str, AxisUse] | None:
        """The modules that use the units of a mixing layer, and how they use them.

        None if the layer has a single unit, if the units reach the model's output, or if they change which layers the model calls.
        """
        units = self.recorded.units(layer)
        if units < 2:
            return None
        half = _random_half(units, self.generator)
        changed, by_rest = self.recorded.replay(layer, half), self.recorded.replay(layer, ~half)
        if changed is None or by_rest is None:
            return None
        uses = {name: AxisUse.of(half, changed[name], by_rest[name]) for name in changed if (changed[name] | by_rest[name]).any()}
        for inputs in {use.inputs for use in uses.values() if 1 < use.inputs < units and units % use.inputs == 0}:
            uses |= self._consumers_of_pieces(layer, units // inputs, inputs, [name for name, use in uses.items() if use.inputs == inputs])
        for name, use in uses.items():
            if not use.is_separate and units == 3 * use.inputs:
                uses[name] = self._use_of_packed_heads(layer, name) or use
        return uses

    def _consumers_of_pieces(self, layer: str, pieces: int, units: int, candidates: Sequence[str]) -> dict[str, AxisUse]:
        """The candidates whose inputs each depend on one unit, the same unit of every piece of the layer's output."""
        half = _random_half(units, self.generator)
        changed, by_rest = self.recorded.replay(layer, half.repeat(pieces)), self.recorded.replay(layer, ~half.repeat(pieces))
        if not changed or not by_rest:
            return {}
        uses = {name: AxisUse.of(half, changed[name], by_rest[name]) for name in candidates}
        uses = {name: attrs.evolve(use, pieces=pieces) for name, use in uses.items() if use.is_separate}
        for piece in range(pieces if uses else 0):
            by_piece = self.recorded.replay(layer, torch.arange(pieces, device="cpu").repeat_interleave(units) == piece)
            uses = {name: use for name, use in uses.items() if by_piece and by_piece[name].any()}
        return uses

    def _use_of_packed_heads(self, layer: str, consumer: str) -> AxisUse | None:
        """How a consumer uses the heads of a layer that computes queries, keys and values, one piece after another or head after head.

        None if some head of the consumer's inputs depends on more than one head of the layer.
        """
        size, inputs = self.head_size(layer, consumer), self.recorded.units(layer) // 3
        heads = inputs // size if size else 1
        if heads < 2:
            return None
        half = _random_half(heads, self.generator)
        for pieces, run in ((3, size), (1, 3 * size)):
            units = half.repeat_interleave(run).repeat(pieces)
            changed, by_rest = self.recorded.replay(layer, units), self.recorded.replay(layer, ~units)
            if changed and by_rest and (use := AxisUse.of(half, changed[consumer], by_rest[consumer])).copies == 1:
                return attrs.evolve(use, pieces=pieces, size=run)
        return None

    def head_size(self, layer: str, consumer: str) -> int:
        """The size of the attention heads: the first unit of a layer of queries or keys changes the first head of the consumer's inputs.

        0 if the inputs that change are not the first ones, or if the inputs do not divide into heads of their number.
        """
        changed = self.recorded.replay(layer, torch.arange(self.recorded.units(layer), device="cpu") == 0)
        if not changed:
            return 0
        inputs = changed[consumer]
        size = int(inputs.sum())
        return size if size and inputs[:size].all() and len(inputs) % size == 0 else 0

    def expert_prefixes(self, layer: str) -> tuple[str, str]:
        """For a Linear of an expert, the prefixes of the names in the first expert and in its own; for other layers, empty strings."""
        for experts in self.recorded.routing:
            if layer.startswith(f"{experts}."):
                return f"{experts}.0.", f"{experts}.{layer.removeprefix(f'{experts}.').partition('.')[0]}."
        return "", ""


def _random_half(units: int, generator: torch.Generator) -> Tensor:
    """Half of the units, two or more; the first unit and not the second, so that it is no union of groups of consecutive units."""
    others = torch.randperm(units - 2, generator=generator, device="cpu")
    return torch.cat([torch.tensor([0, units - 1], device="cpu"), 1 + others]) < units // 2


@attrs.define(eq=False)
class UsageCheck:
    """Finds modules and parameters that the example does not use, by changing their values and running the model again.

    It remembers the parameters that it has checked.

    Example:
        >>> from blockprune.model.calibration import default_forward
        >>> from blockprune.reorder.recording import RecordedRun
        >>> from blockprune.reorder.working_copy import WorkingCopy
        >>> from blockprune.reorder.tracing import UsageCheck
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> model.register_parameter("unused", nn.Parameter(torch.ones(4)))
        >>> with torch.no_grad():
        ...     UsageCheck(RecordedRun.of(WorkingCopy.of(model, torch.randn(8, 2), default_forward))).unused_parameters(4)
        ['unused']
    """

    recorded: RecordedRun
    generator: torch.Generator = attrs.field(factory=_generator, init=False)
    _is_used: dict[str, bool] = attrs.field(factory=dict, init=False)

    def unused_modules(self) -> dict[str, set[int]]:
        """The modules that are not called and on whose tensors no output depends, and the lengths of their tensors' first two axes.

        A module that is not called can be used: attention passes the weights of its output projection to a function.
        """
        names = self._unused([name for name in self.recorded.modules if name not in self.recorded.module_inputs])
        return {name: {size for t in self._tensors(name) for size in t.shape[:2]} for name in names}

    def unused_parameters(self, length: int, prefix: str = "") -> list[str]:
        """The unhooked parameters that may have an axis of this length (`unhooked_parameters`) and on which no output depends."""
        names = [name for names in self.unhooked_parameters(length, prefix).values() for name in names]
        unchecked = [name for name in names if name not in self._is_used]
        self._is_used |= dict.fromkeys(unchecked, True) | dict.fromkeys(self._unused(unchecked), False)
        return [name for name in names if not self._is_used[name]]

    def unhooked_parameters(self, length: int, prefix: str = "") -> dict[str, list[str]]:
        """The unhooked parameters below a prefix that have exactly one axis of this length, by their role in a `UnitPermutation`."""
        by_role: dict[str, list[str]] = {"rows": [], "columns": [], "last": []}
        for name, p in self.recorded.unhooked_parameters.items():
            if name.startswith(prefix) and [*p.shape].count(length) == 1:
                axis = [*p.shape].index(length)
                if role := {0: "rows", 1: "columns"}.get(axis, "last" if axis == p.ndim - 1 else ""):
                    by_role[role].append(name)
        return by_role

    def _unused(self, names: Sequence[str]) -> list[str]:
        """The modules and parameters on which no output depends, by bisection: many can be changed in one run."""
        saved = [(t, t.clone()) for name in names for t in self._tensors(name)]
        for t, _ in saved:
            if t.is_floating_point():
                change = torch.rand(t.shape, generator=self.generator, device="cpu")  # a softmax ignores a constant shift
                t.add_(1 + change.to(t))
            else:
                t.copy_(vary_inputs(t, self.generator))
        try:
            outputs = self.recorded.run() if names else self.recorded.outputs
        except Exception:  # for example, an integer is no index any more
            outputs = []
        for t, value in saved:
            t.copy_(value)
        if len(outputs) == len(self.recorded.outputs) and all(map(torch.equal, outputs, self.recorded.outputs)):
            return [*names]
        middle = len(names) // 2
        return [*self._unused(names[:middle]), *self._unused(names[middle:])] if middle else []

    def _tensors(self, name: str) -> list[Tensor]:
        parameter = self.recorded.unhooked_parameters.get(name)
        return [*named_tensors(self.recorded.modules[name]).values()] if parameter is None else [parameter]
