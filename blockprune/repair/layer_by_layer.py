"""Layer after layer: each layer is pruned and repaired on the inputs that the pruned layers before it give it."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from inspect import Parameter, signature
from typing import Any, Literal, Unpack, cast

import attrs
import torch
from torch import Tensor, nn

from blockprune.core.grid import BlockShape
from blockprune.core.masks import sparsity as sparsity_of
from blockprune.core.patterns import resolve_by_name
from blockprune.core.pipeline import Pipeline, required_statistics
from blockprune.core.progress import progress_bar
from blockprune.core.types import Data, Masks, Reconstruct, Sparsity, Weights, Where
from blockprune.model.apply import read_masks
from blockprune.model.inputs import InputHooks, input_axis, input_hooks
from blockprune.model.masking import mask_blocks
from blockprune.model.parameters import find_parameters
from blockprune.model.running import Calibration, RunOptions, as_calibration, preserve_state, to_model_device
from blockprune.model.selection import select
from blockprune.model.token_streams import hidden_token_weights
from blockprune.repair.dense_reference import DenseReferencePass, LayerBatch, LayerTrace, PrunedPass, trace_layer
from blockprune.repair.transformer_layers import CapturedBatch, Layer, capture_layer_inputs, find_layers
from blockprune.statistics import Statistic


@attrs.frozen(eq=False, repr=False)
class RepairResult:
    """Masks and repaired weights; give both to `apply_masks`. ``layers`` names the layers that are done.

    Example:
        >>> mask = bp.BlockMask(torch.tensor([True, False]), bp.BlockGrid((4,), (2,)))
        >>> bp.RepairResult(masks={"fc.bias": mask}, weights={}, layers=("fc",))
        RepairResult(1 mask, 50.0% pruned; 0 weights; 1 layer: 'fc')
    """

    masks: Masks
    weights: Weights
    layers: tuple[str, ...] = ()

    def __repr__(self) -> str:
        masks, weights, layers = (
            f"{len(items)} {noun}{'s' * (len(items) != 1)}"
            for items, noun in ((self.masks, "mask"), (self.weights, "weight"), (self.layers, "layer"))
        )
        ends = dict.fromkeys((*self.layers[:1], *self.layers[-1:]))
        named = f": {' to '.join(map(repr, ends))}" if ends else ""
        return f"RepairResult({masks}, {sparsity_of(self.masks):.1%} pruned; {weights}; {layers}{named})"


def sequential(
    model: nn.Module,
    pipeline: Pipeline,
    reconstruct: Reconstruct,
    batches: Iterable[Any] | Calibration,
    sparsity: Sparsity,
    *,
    layers: Sequence[str] | None = None,
    extra_data: Data | None = None,
    target: Literal["pruned", "dense"] = "dense",
    finetune: Callable[..., Mapping[str, Tensor]] | None = None,
    resume: RepairResult | None = None,
    callback: Callable[[RepairResult], None] | None = None,
    **options: Unpack[RunOptions],
) -> RepairResult:
    """Prune and repair layers in order, each calibrated on what the pruned layers before it give (SparseGPT 2301.00774); pure.

    The statistics of one layer are held at a time. To go on after an interruption, give what ``callback`` was last called with as
    ``resume``: save it with ``callback=partial(bp.save_repair, path="repair.safetensors")``, and go on with
    ``resume=bp.load_repair("repair.safetensors")``; the result has the same bits as that of an uninterrupted call.

    Args:
        model: a model without masks whose layers follow each other: the output of one is the (first) input of the next.
        pipeline: its ``collect`` takes ``where=``, ``statistics=`` and ``calibration=``, such as
            ``partial(collect.with_statistics, where=...)``. It is called with a module that holds one layer alone, under the layer's full
            name. The statistics that its metric and ``reconstruct`` require are added.
        reconstruct: (data, masks) -> weights, such as `reconstruct.least_squares`.
        batches: calibration data, or a `Calibration`; one pass is made over it, and the layers' inputs of all of it are kept.
        sparsity: a fraction, or a mapping by parameter name or pattern, such as a function of `budget` returns.
        layers: names of the modules, in order; by default the children of the largest ModuleList or Sequential (the decoder and encoder
            layers of Hugging Face models).
        extra_data: statistics that were collected before, such as ``output_grad_gram`` of the dense model; added to each layer's own.
        target: "dense" matches the dense layers' outputs on the dense model's inputs, which makes up for errors of the layers before, too
            (it needs more damping; 0.4 was best on a language model). "pruned" matches the dense layer's outputs on the inputs that each
            layer now gets, which makes up for its own errors alone and takes half the work. With "dense", the experts of `as_linears` get
            the tokens that the dense layer's router sends them.
        finetune: a last step after ``reconstruct``, such as `finetune_layer`, that moves a layer's kept weights towards the dense layer's
            outputs on its dense inputs.
        resume: the result of an earlier, interrupted call.
        callback: called with the result so far after each new layer; the model is in evaluation mode meanwhile.
        options: the fields of `Calibration` besides batches, such as ``forward=``, where ``batches`` is not a `Calibration`.

    Raises:
        ValueError: a masked model, layers that do not follow each other, a chosen parameter that lies in no layer, no batches, a
            ``resume`` of other layers or without their masks and weights, a statistic that needs gradients.
        KeyError: a layer that the model does not have, a sparsity for a parameter that is not chosen, or none for one that is.
        TypeError: a collector without the three options, or with batches of its own; batches that are one tensor or mapping.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(64, 8)
        >>> collect = partial(bp.collect.with_statistics, where=bp.linears((2, 2)))
        >>> pipeline = bp.Pipeline(collect, bp.metric.obs, bp.allocate.per_row)
        >>> result = bp.sequential(model, pipeline, bp.reconstruct.least_squares, [x], 0.5)
        >>> pruned = bp.apply_masks(model, result.masks, result.weights)
        >>> round(bp.sparsity(result.masks), 2)
        0.5
    """
    calibration = as_calibration(batches, options) if isinstance(batches, Calibration) else Calibration(batches, **options)
    if target not in ("pruned", "dense"):
        raise ValueError(f"target={target!r} must be 'pruned' or 'dense'")
    where, statistics = _collector_options(pipeline, reconstruct)
    names = _prunable(model, where)
    order = find_layers(model, layers, names)
    shares = resolve_by_name(sparsity, names, what="sparsity") if isinstance(sparsity, Mapping) else sparsity
    stage = _LayerStage(pipeline, reconstruct, where, statistics, shares, extra_data or {}, target)
    done = _checked_resume(resume or RepairResult({}, {}), order, reconstruct)
    with preserve_state(model), torch.no_grad():
        states = _HiddenStates.of(model, order, calibration, keep_dense=target == "dense" or finetune is not None)
        for number, layer in enumerate(progress_bar(order, "sequential", calibration.progress)):
            is_new = number >= len(done.layers)
            if is_new:
                done = stage.prune(layer, states, done)
            targets = states.advance_dense(layer)
            parameters = _pruned_parameters(layer, done)
            if finetune and is_new and layer.parameters:
                parameters |= _finetuned(finetune, states.batches(layer, parameters), done.masks, targets)
                done = attrs.evolve(
                    done, weights={**done.weights, **{name: parameters[layer.local_names[name]] for name in layer.parameters}}
                )
            states.advance_pruned(layer, parameters)
            if is_new:
                done = attrs.evolve(done, layers=(*done.layers, layer.name))
                if callback:
                    callback(done)
    return done


def _checked_resume(done: RepairResult, order: Sequence[Layer], reconstruct: Reconstruct) -> RepairResult:
    """The earlier result, if it has masks and weights for all chosen parameters of its layers, which are the first ones."""
    finished = order[: len(done.layers)]
    if done.layers != tuple(layer.name for layer in finished):
        names = ", ".join(map(repr, done.layers))
        raise ValueError(f"resume is of layers {names}, which are not the first ones here; give the same layers")
    has_weights = bool(done.weights or required_statistics(reconstruct))
    for layer in finished:
        for name in layer.parameters:
            shape = tuple(layer.module.get_parameter(layer.local_names[name]).shape)
            missing = "mask" if name not in done.masks else "weight" if has_weights and name not in done.weights else ""
            if missing:
                raise ValueError(
                    f"resume says that layer {layer.name!r} is done, but it has no {missing} for {name} {shape}; give the whole result"
                )
            if done.masks[name].grid.shape != shape:
                raise ValueError(f"{name} {shape}: resume has a mask for shape {done.masks[name].grid.shape}; it is of another model")
        for name, local_name in layer.local_names.items():
            shape = tuple(layer.module.get_parameter(local_name).shape)
            if name in done.weights and tuple(done.weights[name].shape) != shape:
                raise ValueError(f"{name} {shape}: resume has a weight of shape {tuple(done.weights[name].shape)}; it is of another model")
            if name in done.weights and not done.weights[name].isfinite().all():
                raise ValueError(f"{name} {shape}: resume has a weight with NaN or inf; give an earlier result")
    return done


@attrs.frozen(eq=False)
class _LayerStage:
    """How one layer is pruned and repaired."""

    pipeline: Pipeline
    reconstruct: Reconstruct
    where: Where
    statistics: Sequence[Statistic]
    sparsity: Sparsity
    extra_data: Data
    target: str

    def prune(self, layer: Layer, states: "_HiddenStates", done: RepairResult) -> RepairResult:
        """The result with the masks and weights of one more layer."""
        for names, hooks, trace in self._groups(layer, states):
            if trace is None:
                batches: PrunedPass | DenseReferencePass = PrunedPass(names, states.batches(layer, {}))
            else:  # the weights of the groups before are pruned already
                pruned = states.batches(layer, _pruned_parameters(layer, done))
                batches = DenseReferencePass(names, pruned, states.batches(layer, {}, dense=True), hooks, trace)
            data = self._collect(layer, names, batches)
            sparsity = {name: self.sparsity[name] for name in names} if isinstance(self.sparsity, Mapping) else self.sparsity
            masks = self.pipeline.allocate(self.pipeline.score(data, sparsity), sparsity)
            weights = self.reconstruct(data, masks)
            done = attrs.evolve(done, masks={**done.masks, **masks}, weights={**done.weights, **weights})
            del data
        return done

    def _groups(self, layer: Layer, states: "_HiddenStates") -> list[tuple[Sequence[str], InputHooks, LayerTrace | None]]:
        """The weights of a layer that are pruned at one time: all of them, or beside the dense layer those that are given one input."""
        if not layer.parameters:
            return []
        if self.target == "pruned":
            return [(layer.parameters, [], None)]
        refs = find_parameters(layer.root, layer.parameters, what="where")
        hooks = [
            (name, ref, module)
            for name, ref, module in input_hooks(layer.root, refs)
            if input_axis(ref) == input_axis(refs[name][0])  # not a head tied to an embedding
        ]
        trace = trace_layer(states.batches(layer, {})[0], hooks)
        return [(names, [hook for hook in hooks if hook[0] in names], trace) for names in trace.groups]

    def _collect(self, layer: Layer, names: Sequence[str], batches: PrunedPass | DenseReferencePass) -> Data:
        data = cast(Any, self.pipeline.collect)(
            layer.root,
            where=partial(_only, self.where, frozenset(names)),
            statistics=_with_required(self.statistics, batches.statistics),
            calibration=Calibration(batches, forward=_run_batch, token_weights=_token_weights, progress=False),
        )
        extra = {name: self.extra_data[name].stats if name in self.extra_data else {} for name in data}
        return {name: attrs.evolve(p, stats={**extra[name], **p.stats}) for name, p in data.items()}


@attrs.define(eq=False)
class _HiddenStates:
    """The hidden states of all batches before the current layer, in the pruned model and, if asked for, in the dense one."""

    captured: Sequence[CapturedBatch]
    token_weights: Sequence[Tensor | None]
    pruned: list[Tensor]
    dense: list[Tensor] | None

    @classmethod
    def of(cls, model: nn.Module, order: Sequence[Layer], calibration: Calibration, *, keep_dense: bool) -> "_HiddenStates":
        captured = [capture_layer_inputs(model, order, calibration.forward, to_model_device(model, batch)) for batch in calibration.batches]
        if not captured:
            raise ValueError("batches is empty: calibration needs at least one")
        hidden = [batch.hidden for batch in captured]
        weights = [hidden_token_weights(model, calibration, batch.batch, batch.hidden) for batch in captured]
        return cls(captured, weights, hidden, list(hidden) if keep_dense else None)

    def batches(self, layer: Layer, parameters: Mapping[str, Tensor], *, dense: bool = False) -> list[LayerBatch]:
        """The layer's batches, with these of its parameters replaced."""
        hidden = self.dense if dense and self.dense is not None else self.pruned
        return [LayerBatch(layer, parameters, *of) for of in zip(hidden, self.captured, self.token_weights, strict=True)]

    def advance_dense(self, layer: Layer) -> list[Tensor]:
        """Run the dense layer; its outputs are what the next layer is given."""
        if self.dense is not None:
            self.dense = [batch.run() for batch in self.batches(layer, {}, dense=True)]
        return self.dense or []

    def advance_pruned(self, layer: Layer, parameters: Mapping[str, Tensor]) -> None:
        self.pruned = [batch.run() for batch in self.batches(layer, parameters)]


def _collector_options(pipeline: Pipeline, reconstruct: Reconstruct) -> tuple[Where, list[Statistic]]:
    """The rule and the statistics of a pipeline's collector, and the statistics that its metric and the repair require."""
    options = signature(pipeline.collect).parameters
    where = options["where"].default if "where" in options else Parameter.empty
    if where is Parameter.empty or "statistics" not in options or "calibration" not in options:
        raise TypeError(
            "sequential gives pipeline.collect the batches of each layer: it must take where=, statistics= and calibration=, and have a "
            "default for where; such as collect=partial(collect.with_statistics, where=...)"
        )
    bound = options["statistics"].default
    statistics = _with_required(() if bound is Parameter.empty else bound, required_statistics(pipeline.metric))
    statistics = _with_required(statistics, required_statistics(reconstruct))
    if any(s.name in ("input_cross", "residual_cross") for s in statistics):
        raise ValueError("input_cross and residual_cross compare two models; leave them out of the statistics: target='dense' adds them")
    if bad := [s.name for s in statistics if s.sees not in ("inputs", "output")]:
        raise ValueError(
            f"{', '.join(bad)} needs gradients, which a single layer does not have; collect it from the whole model and pass it as "
            "extra_data="
        )
    fields = {"calibration", *(field.name for field in attrs.fields(Calibration))}
    if own := [key for key in getattr(pipeline.collect, "keywords", {}) if key in fields]:
        raise TypeError(f"pipeline.collect binds {', '.join(own)}, which sequential would not use; give it to sequential instead")
    return cast(Where, where), statistics


def _with_required(statistics: Sequence[Statistic], required: Iterable[Statistic]) -> list[Statistic]:
    names = {s.name for s in statistics}
    return [*statistics, *(s for s in required if s.name not in names)]


def _prunable(model: nn.Module, where: Where) -> list[str]:
    """The chosen parameters of a plain model."""
    if read_masks(model):
        raise ValueError("the model is masked; prune a plain one: bp.finalize(model)")
    chosen = select(model, where)
    if computed := [name for name, (ref, _) in chosen.items() if not ref.is_plain]:
        raise ValueError(f"{computed[0]} is computed by another parametrization, so it cannot be repaired; remove that first")
    return list(chosen)


def _run_batch(model: Any, batch: Any) -> Any:
    return batch.run()


def _token_weights(batch: Any) -> Tensor | None:
    weights: Tensor | None = batch.token_weights
    return weights


def _only(where: Where, names: Collection[str], name: str, owner: nn.Module) -> BlockShape | None:
    return where(name, owner) if name in names else None


def _finetuned(
    finetune: Callable[..., Mapping[str, Tensor]], batches: Sequence[LayerBatch], masks: Masks, targets: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The layer's tuned parameters, by its own names."""
    layer, parameters = batches[0].layer, batches[0].parameters

    def run(parameters: Mapping[str, Tensor], batch: LayerBatch) -> Tensor:
        return _weighted_tokens(attrs.evolve(batch, parameters=parameters).run(), batch.token_weights)

    weighted = [_weighted_tokens(x, batch.token_weights) for x, batch in zip(targets, batches, strict=True)]
    return dict(finetune(run, parameters, {layer.local_names[name]: masks[name] for name in layer.parameters}, batches, weighted))


def _weighted_tokens(x: Tensor, weights: Tensor | None) -> Tensor:
    """The tokens that count, times the square root of their weights, so that a plain squared error is the weighted one."""
    if weights is None or x.shape[: weights.ndim] != weights.shape:
        return x
    counts = weights > 0
    return x[counts] * weights[counts].to(x).sqrt().view(-1, *[1] * (x.ndim - weights.ndim))


def _pruned_parameters(layer: Layer, done: RepairResult) -> dict[str, Tensor]:
    """The parameters of a layer that are masked or repaired, each by its first name in the layer."""
    parameters: dict[str, Tensor] = {}
    for name, local_name in layer.local_names.items():
        if name in done.masks or name in done.weights:
            stored = layer.module.get_parameter(local_name)
            value = done.weights[name].to(stored) if name in done.weights else stored
            if name in done.masks:
                value = mask_blocks(value, done.masks[name].keep.to(stored.device), done.masks[name].grid)
            parameters[local_name] = value
    return parameters
