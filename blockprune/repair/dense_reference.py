"""The dense layer as a reference for the pruned one: in what order its weights are used, and both run on the same batches.

The pruned layer's weights are fitted to what the dense layer gives on the dense model's hidden states. For that, each batch runs through
the dense layer first, which notes the inputs of each weight and the residual streams; then the pruned layer runs on its own hidden states.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blockprune.model.experts import experts_in, record_routing
from blockprune.model.inputs import InputHooks, value_key, weight_inputs
from blockprune.model.parameters import ParameterRef
from blockprune.model.running import cuda_devices, seeded
from blockprune.model.weight_reads import WeightReads
from blockprune.repair.transformer_layers import CapturedBatch, Layer, StopForward
from blockprune.statistics import Statistic, input_cross, residual_cross

RESIDUAL_TOLERANCE = 0.01  # the share of an output's norm by which stream + output may differ from the new stream


@attrs.frozen(eq=False)
class LayerTrace:
    """What one forward of a layer shows of the weights in it.

    Args:
        groups: the weights in the order in which they are used; a group is given the same input.
        call_counts: how often each weight is used.
        residual_inputs: of each weight whose output is added to a residual stream, the module in the layer that was given that stream
            ("" is the layer itself).

    Example:
        >>> from blockprune.repair.dense_reference import LayerTrace
        >>> counts, residual = {"up.weight": 1, "down.weight": 1}, {"down.weight": ""}
        >>> LayerTrace(groups=[["up.weight"], ["down.weight"]], call_counts=counts, residual_inputs=residual).residual_inputs
        {'down.weight': ''}
    """

    groups: Sequence[Sequence[str]]
    call_counts: Mapping[str, int]
    residual_inputs: Mapping[str, str]


@attrs.frozen(eq=False)
class LayerBatch:
    """One batch at one layer: the hidden states that the layer is given, with some of its parameters replaced by pruned ones.

    Each run of the layer draws the same random numbers, so that the dense and the pruned one, which draws too, have the same noise.

    Example:
        >>> from blockprune.repair.dense_reference import LayerBatch
        >>> from blockprune.repair.transformer_layers import CapturedBatch, Layer
        >>> layer, captured = Layer("", nn.ReLU(), []), CapturedBatch(None, torch.ones(2), {"": ("", (), {})})
        >>> LayerBatch(layer, {}, torch.tensor([-1.0, 2.0]), captured).run()
        tensor([0., 2.])
    """

    layer: Layer
    parameters: Mapping[str, Tensor]  # by the layer's own names
    hidden: Tensor
    captured: CapturedBatch  # the layer's other arguments
    token_weights: Tensor | None = None
    seed: int = 0  # of the random numbers that the layer draws

    def run(self) -> Tensor:
        """The layer's output."""
        with seeded(self.seed, cuda_devices(self.layer.module)):
            return self.layer.forward(self.parameters, self.hidden, self.captured)


@attrs.frozen(eq=False)
class PrunedPass:
    """The batches of a layer that is compared with itself on the hidden states that the pruned layers before it give.

    Example:
        >>> from blockprune.repair.dense_reference import PrunedPass
        >>> list(PrunedPass(names=[], pruned=[]))
        []
    """

    names: Sequence[str]  # weights whose statistics are collected
    pruned: Iterable[LayerBatch]

    @property
    def statistics(self) -> Sequence[Statistic]:
        """Statistics besides those that the metric and the repair need."""
        return ()

    def __iter__(self) -> Iterator[LayerBatch]:
        return iter(self.pruned)


@attrs.frozen(eq=False)
class DenseReferencePass:
    """The batches of a layer that is compared with the dense one; only one batch's dense inputs are held at a time.

    Tokens go to the experts that the dense layer's router chose, so that the two can be compared.

    Example:
        >>> from blockprune.repair.dense_reference import DenseReferencePass, LayerTrace
        >>> reference = DenseReferencePass([], [], [], [], LayerTrace([], {}, {}))
        >>> [statistic.name for statistic in reference.statistics]
        ['input_cross', 'residual_cross']
    """

    names: Sequence[str]  # weights whose statistics are collected
    pruned: Iterable[LayerBatch]
    dense: Iterable[LayerBatch]
    hooks: InputHooks
    trace: LayerTrace

    @property
    def statistics(self) -> Sequence[Statistic]:
        """The statistics that compare the two layers."""
        return input_cross, residual_cross(names=self.trace.residual_inputs)

    def __iter__(self) -> Iterator["ReferenceBatch"]:
        for pruned, dense in zip(self.pruned, self.dense, strict=True):
            yield ReferenceBatch.of(pruned, dense, self.hooks, self.trace)


@attrs.define(eq=False)
class ReferenceBatch:
    """One batch of the pruned layer, with what the dense layer showed of it; ``residual_error`` is filled while it runs.

    Example:
        >>> from blockprune.repair.dense_reference import LayerBatch, LayerTrace, ReferenceBatch
        >>> from blockprune.repair.transformer_layers import CapturedBatch, Layer
        >>> layer, captured = Layer("", nn.ReLU(), []), CapturedBatch(None, torch.ones(2), {"": ("", (), {})})
        >>> batch = LayerBatch(layer, {}, torch.ones(2), captured)
        >>> ReferenceBatch.of(batch, batch, [], LayerTrace([], {}, {})).dense_inputs
        {}
    """

    pruned: LayerBatch
    hooks: InputHooks
    trace: LayerTrace
    dense_inputs: Mapping[str, list[list[Tensor]]]  # by parameter name, call and group of outputs, [n, k]
    dense_residuals: Mapping[str, list[Tensor]]  # the residual stream that a weight's output is added to, by name and call, [n, outputs]
    routes: dict[str, list[Any]]  # the choices of the routers, for each call of a module of experts
    residual_error: dict[str, list[Tensor]]  # dense_residuals minus the pruned layer's own

    @classmethod
    def of(cls, pruned: LayerBatch, dense: LayerBatch, hooks: InputHooks, trace: LayerTrace) -> "ReferenceBatch":
        """Run the dense layer."""
        inputs: dict[str, list[list[Tensor]]] = defaultdict(list)
        residuals: dict[str, list[Tensor]] = defaultdict(list)
        routes: dict[str, list[Any]] = {}
        with record_routing(dense.layer.module, routes):
            _run_until_used(
                dense,
                hooks,
                trace,
                on_residual=lambda name, stream: residuals[name].append(_token_rows(stream)),
                on_inputs=lambda name, given: inputs[name].append([_token_rows(x) for x in given]),
            )
        return cls(pruned, hooks, trace, dict(inputs), dict(residuals), routes, {})

    @property
    def token_weights(self) -> Tensor | None:
        """How much each token counts."""
        return self.pruned.token_weights

    def run(self) -> None:
        """Run the pruned layer until each weight has been given its inputs."""
        self.residual_error.clear()

        def compare(name: str, stream: Tensor) -> None:
            calls = self.residual_error.setdefault(name, [])
            calls.append(self.dense_residuals[name][len(calls)] - _token_rows(stream))

        with record_routing(self.pruned.layer.module, self.routes, replay=True):
            _run_until_used(self.pruned, self.hooks, self.trace, on_residual=compare)


def _run_until_used(
    batch: LayerBatch,
    hooks: InputHooks,
    trace: LayerTrace,
    *,
    on_residual: Callable[[str, Tensor], None],
    on_inputs: Callable[[str, list[Tensor]], None] = lambda name, given: None,
) -> None:
    """Run a layer until each weight has been used, and pass on the residual streams and the inputs of the weights."""
    remaining = {name: trace.call_counts.get(name, 0) for name, _, _ in hooks}
    unfinished = {name for name, calls in remaining.items() if calls}
    may_stop = len(unfinished) == len(remaining)  # an expert that the first batch did not call may come after those that it did

    def after(  # noqa: PLR0917 (two are bound, torch passes the others)
        name: str, ref: ParameterRef, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        on_inputs(name, weight_inputs(ref, module, args, kwargs))
        remaining[name] -= 1
        (unfinished.add if remaining[name] else unfinished.discard)(name)
        if may_stop and not unfinished:
            raise StopForward

    with contextlib.ExitStack() as stack:
        for name, ref, module in hooks:
            if name in trace.residual_inputs:
                source = batch.layer.module.get_submodule(trace.residual_inputs[name])
                stack.callback(source.register_forward_pre_hook(_first_tensor(partial(on_residual, name)), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(after, name, ref), with_kwargs=True).remove)
        with contextlib.suppress(StopForward):
            batch.run()


def _token_rows(x: Tensor) -> Tensor:
    """A copy, one row per token; the layer may overwrite the tensor later."""
    return x.detach().clone().reshape(-1, x.shape[-1])


def trace_layer(batch: LayerBatch, hooks: InputHooks, statistics: Collection[str] = ()) -> LayerTrace:
    """The order in which a layer uses its weights, from one forward.

    An output is added to a residual stream if some later module (or the layer's own result) shows the sum of it and what an earlier module
    was given.

    Raises:
        NotImplementedError: these statistics of inputs do not describe all uses of a weight, as `WeightReads` finds.

    Example:
        >>> from blockprune.model.inputs import input_hooks
        >>> from blockprune.model.parameters import parameter_refs
        >>> from blockprune.repair.dense_reference import LayerBatch, trace_layer
        >>> from blockprune.repair.transformer_layers import CapturedBatch, Layer
        >>> class Residual(nn.Sequential):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> model = Residual(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> captured = CapturedBatch(None, torch.ones(1, 2), {"": ("", (), {})})
        >>> batch = LayerBatch(Layer("", model, ["0.weight", "2.weight"]), {}, captured.hidden, captured)
        >>> trace = trace_layer(batch, [hook for hook in input_hooks(model, parameter_refs(model)) if "weight" in hook[0]])
        >>> trace.groups, trace.residual_inputs
        ([['0.weight'], ['2.weight']], {'2.weight': ''})
    """
    layer, hidden = batch.layer, batch.hidden
    inputs: list[tuple[str, Tensor]] = []  # what each module was given, in order; the layer's result is the last
    outputs: list[tuple[str, int, Tensor]] = []  # of each weight that may be added to a stream, and how many inputs were noted before
    uses: list[tuple[str, Any]] = []  # each weight, and a key that tells its input from others
    alive: list[Tensor] = []  # holds the inputs, so that no memory is reused and the keys stay distinct
    expert_keys = _expert_keys(layer, hooks)

    def note_input(name: str, x: Tensor) -> None:
        if x.shape == hidden.shape:
            inputs.append((name, x.detach()[:1].clone()))

    def after(  # noqa: PLR0917 (two are bound, torch passes the others)
        name: str, ref: ParameterRef, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        x = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        uses.append((name, expert_keys.get(name) or value_key(x)))
        alive.append(x)
        if isinstance(module, nn.Linear) and isinstance(output, Tensor) and output.shape == hidden.shape and ref.attr == "weight":
            outputs.append((name, len(inputs), output.detach()[:1].clone()))

    with contextlib.ExitStack() as stack:
        for name, module in layer.module.named_modules():
            hook = _first_tensor(partial(note_input, name))
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for name, ref, module in hooks:
            stack.callback(module.register_forward_hook(partial(after, name, ref), with_kwargs=True).remove)
        reads = stack.enter_context(WeightReads(hooks, [*layer.module.buffers(), *batch.parameters.values()]))
        result = batch.run()
    note_input("", result)
    counts = Counter(name for name, _ in uses)
    reads.check(counts, statistics)
    uses += [(name, expert_keys.get(name, name)) for name in layer.parameters]  # those that are never called: collecting will say so
    residual_inputs = {
        name: source
        for name, before, output in outputs
        if counts[name] == 1 and (source := _residual_source(inputs, before, output)) is not None
    }
    return LayerTrace(_groups(uses), dict(counts), residual_inputs)


def _groups(uses: Sequence[tuple[str, Any]]) -> list[list[str]]:
    """The weights by the key of their first use, in order."""
    groups: dict[Any, list[str]] = {}
    placed: set[str] = set()
    for name, key in uses:
        if name not in placed:
            placed.add(name)
            groups.setdefault(key, []).append(name)
    return [*groups.values()]


def _expert_keys(layer: Layer, hooks: InputHooks) -> dict[str, tuple[str, bool]]:
    """A key that the Linears of all experts of a module share if they are used at the same time, though each has an input of its own."""
    name_of = {id(ref.owner): name for name, ref, _ in hooks}
    return {
        name_of[id(linear)]: (module, part == "down_proj")
        for module, experts in experts_in(layer.module).items()
        for expert in experts.experts()
        for part, linear in expert.named_children()
        if id(linear) in name_of
    }


def _first_tensor(receive: Callable[[Tensor], None]) -> Callable[..., None]:
    """A pre-hook that passes on the first tensor that a module is given."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if x is not None:
            receive(x)

    return hook


def _residual_source(inputs: Sequence[tuple[str, Tensor]], before: int, output: Tensor) -> str | None:
    """The module that was given the residual stream to which this output is added, if it is called once."""
    size, names = _norm(output), [name for name, _ in inputs[:-1]]
    for _, later in inputs[before:]:
        slack = min(max(RESIDUAL_TOLERANCE * size, 2 * torch.finfo(later.dtype).eps * _norm(later)), 0.5 * size)
        for name, stream in inputs[:before]:
            if size and names.count(name) == 1 and _norm(later - output.to(later.device) - stream.to(later.device)) <= slack:
                return name
    return None


def _norm(x: Tensor) -> float:
    return float(x.double().norm())
