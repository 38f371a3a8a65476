"""How each layer is pruned and repaired in turn, while the model's other layers may not be loaded at all."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn

from blockprune.core._compat_hf import is_offloaded
from blockprune.core.arguments import check_function
from blockprune.core.patterns import resolve_by_name, suggest
from blockprune.core.pipeline import Pipeline, allocated, required_statistics
from blockprune.core.progress import progress_bar
from blockprune.core.types import Data, Masks, Param, Reconstruct, Sparsity, Weights, Where
from blockprune.model.calibration import Calibration
from blockprune.model.inputs import InputHooks, input_axis, input_hooks
from blockprune.model.mask_reading import read_masks
from blockprune.model.masking import mask_blocks
from blockprune.model.parameters import find_parameters, parameter_refs
from blockprune.model.running import preserve_state
from blockprune.model.selection import including_names, select
from blockprune.model.sharding import (
    agree,
    check_not_fully_sharded,
    gather_from_ranks,
    group_of,
    in_step,
    raised_together,
    reshard,
    unsharded_around,
)
from blockprune.repair.dense_reference import DenseReferencePass, LayerTrace, PrunedPass, trace_layer
from blockprune.repair.hidden_states import HiddenStates, Store, in_memory, layer_calibration
from blockprune.repair.layer_finetuning import Finetune, check_parts, dense_outputs, finetune_parts
from blockprune.repair.repaired_weights import checked_repair
from blockprune.repair.transformer_layers import Layer, LoadWeights, find_layers
from blockprune.statistics import Statistic
from blockprune.statistics.inputs import COMPARE_TWO_MODELS


@attrs.frozen(eq=False)
class LayerResult:
    """The masks and the repaired weights of one layer, by their names in the model.

    Example:
        >>> from blockprune.repair.layer_pruning import LayerResult
        >>> LayerResult().masks
        {}
    """

    masks: Masks = attrs.field(factory=dict)
    weights: Weights = attrs.field(factory=dict)

    def joined(self, masks: Masks, weights: Weights) -> "LayerResult":
        """With more masks and weights."""
        return LayerResult({**self.masks, **masks}, {**self.weights, **weights})

    def only(self, names: Collection[str]) -> "LayerResult":
        """Those of these names."""
        masks = {name: mask for name, mask in self.masks.items() if name in names}
        return LayerResult(masks, {name: weight for name, weight in self.weights.items() if name in names})

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        """The parameters of a layer that are masked or repaired, each by its first name in the layer."""
        parameters: dict[str, Tensor] = {}
        for name, local_name in layer.local_names.items():
            if name in self.masks or name in self.weights:
                stored = layer.module.get_parameter(local_name)
                value = self.weights[name].to(stored) if name in self.weights else stored
                if name in self.masks:
                    value = mask_blocks(value, self.masks[name].keep.to(stored.device), self.masks[name].grid)
                parameters[local_name] = value
        return parameters


@attrs.frozen(eq=False)
class LayerPruning:
    """The layers of a model, and how each of them is pruned and repaired; the arguments of `sequential`, checked.

    Example:
        >>> from blockprune.repair.layer_pruning import LayerPruning
        >>> recipe = bp.recipes.sparsegpt(bp.linears((2, 2)), bp.Calibration([torch.ones(4, 2)]))
        >>> pruning = LayerPruning.of(nn.Sequential(nn.Linear(2, 2)), recipe.pipeline, recipe.reconstruct, 0.5)
        >>> [layer.parameters for layer in pruning.order]
        [['0.weight']]
    """

    order: Sequence[Layer]
    pipeline: Pipeline
    reconstruct: Reconstruct
    where: Where
    statistics: Sequence[Statistic]
    sparsity: Sparsity
    extra_data: Data
    target: str
    finetune: Mapping[str, Finetune]  # by the name of a module in each layer

    @classmethod
    def of(
        cls,
        model: nn.Module,
        pipeline: Pipeline,
        reconstruct: Reconstruct,
        sparsity: Sparsity,
        *,
        layers: Sequence[str] | None = None,
        extra_data: Data | None = None,
        target: str = "dense",
        finetune: Finetune | Mapping[str, Finetune] | None = None,
    ) -> "LayerPruning":
        """Check the arguments of `sequential` and find the layers; the weights may be missing (on the meta device)."""
        if target not in ("pruned", "dense"):
            raise ValueError(f"target={target!r} must be 'pruned' or 'dense'")
        if not isinstance(pipeline, Pipeline):
            raise TypeError(
                f"pipeline is a {type(pipeline).__name__}; give a Pipeline, such as that of a recipe, recipe.pipeline, or call the recipe "
                "itself: recipe(model, sparsity)"
            )
        check_function("reconstruct", reconstruct, "(data, masks) -> weights, such as reconstruct.least_squares")
        where, statistics = _collector_options(pipeline, reconstruct)
        names = _prunable(model, where)
        extra_data = {} if extra_data is None else extra_data
        _check_extra_data(model, extra_data)
        order = find_layers(model, layers, names)
        shares = resolve_by_name(sparsity, names, what="sparsity") if isinstance(sparsity, Mapping) else sparsity
        if finetune is not None and not callable(finetune) and not isinstance(finetune, Mapping):
            raise TypeError(f"finetune has the type {type(finetune).__name__}; give a function such as bp.finetune_layer, or a mapping")
        parts = finetune if isinstance(finetune, Mapping) else {"": finetune} if finetune else {}
        check_parts(parts, order)
        if parts:
            check_not_fully_sharded(model, "finetune tunes plain parameters of a layer")
        return cls(order, pipeline, reconstruct, where, statistics, shares, extra_data, target, parts)

    def run(
        self,
        model: nn.Module,
        calibration: Calibration,
        *,
        done: Callable[[Layer], LayerResult | None],
        receive: Callable[[Layer, LayerResult], None],
        load: LoadWeights | None = None,
        store: Store = in_memory,
    ) -> None:
        """Prune the layers in order.

        Args:
            model: whose weights may be missing if ``load`` provides them; it is unchanged afterwards.
            calibration: batches, forward and reduce.
            done: the result of a layer that an earlier call has finished, or None.
            receive: is given each new layer's result, while the layer's weights are loaded.
            load: loads the weights of one layer at a time.
            store: where hidden states are kept.

        Raises:
            ValueError: finetuning in several processes, ranks that end with different masks, and what `HiddenStates.of` raises.
        """
        if self.finetune and calibration.reduce:
            raise ValueError(
                "finetune tunes on the batches of one process; leave out reduce= and give all batches to one process, or leave out "
                "finetune= and train afterwards: bp.distill"
            )
        last_layer = {name: number for number, layer in enumerate(self.order) for name in layer.local_names}
        earlier = LayerResult()  # of tensors that a later layer has, too
        reshard(model)
        steps = attrs.evolve(calibration, batches=in_step(model, calibration.batches))
        with preserve_state(model), torch.no_grad(), contextlib.ExitStack() as stack:
            keep_dense = self.target == "dense" or bool(self.finetune)
            states = HiddenStates.of(model, self.order, steps, keep_dense=keep_dense, load=load, store=store)
            stack.enter_context(unsharded_around(model, [layer.module for layer in self.order]))
            for number, layer in enumerate(progress_bar(self.order, "sequential", calibration.progress)):
                with load(layer) if load else contextlib.nullcontext():
                    finished = done(layer)
                    result = earlier.joined(finished.masks, finished.weights) if finished else self._prune(layer, states, earlier)
                    finetune = {} if finished else self.finetune
                    with raised_together(layer.module, calibration.reduce):
                        targets = dense_outputs(finetune, states.batches(layer, {}, dense=True))
                        targets[""] = states.advance_dense(layer)
                        parameters = result.parameters(layer)
                        if finetune and layer.parameters:
                            tuned = finetune_parts(finetune, states.batches(layer, parameters), result.masks, targets)
                            parameters |= tuned
                            names = [name for name, local in layer.local_names.items() if name in layer.parameters or local in tuned]
                            result = result.joined({}, {name: parameters[layer.local_names[name]] for name in names})
                        states.advance_pruned(layer, parameters)
                        if not finished:
                            receive(layer, result)
                    earlier = result.only({name for name, last in last_layer.items() if last > number})

    def _prune(self, layer: Layer, states: HiddenStates, result: LayerResult) -> LayerResult:
        """The result with the masks and weights of the layer."""
        for names, hooks, trace in self._groups(layer, states):
            if trace is None:
                batches: PrunedPass | DenseReferencePass = PrunedPass(names, states.batches(layer, {}))
            else:  # the weights of the groups before are pruned already
                pruned = states.batches(layer, result.parameters(layer))
                batches = DenseReferencePass(names, pruned, states.batches(layer, {}, dense=True), hooks, trace)
            data = self._collect(layer, names, batches, states.reduce)
            sparsity = {name: self.sparsity[name] for name in names} if isinstance(self.sparsity, Mapping) else self.sparsity
            masks = allocated(self.pipeline.allocate, self.pipeline.score(data, sparsity), sparsity)
            if (group := group_of(states.reduce)) is not None:
                agree(masks, group=group)
            weights = checked_repair("reconstruct", self.reconstruct(data, masks), layer, _all_names(layer))
            result = result.joined(masks, weights)
            del data
        return result

    def _groups(self, layer: Layer, states: HiddenStates) -> list[tuple[Sequence[str], InputHooks, LayerTrace | None]]:
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
        first = next(iter(states.batches(layer, {})), None)
        with raised_together(layer.module, states.reduce):
            own = None if first is None else trace_layer(first, hooks, [s.name for s in self.statistics if s.source == "inputs"])
        traces = gather_from_ranks(own, states.reduce)
        trace = next(trace for trace in traces if trace is not None)  # the same one on all ranks
        return [(names, [hook for hook in hooks if hook[0] in names], trace) for names in trace.groups]

    def _collect(
        self,
        layer: Layer,
        names: Sequence[str],
        batches: PrunedPass | DenseReferencePass,
        reduce: Callable[[Any], Any] | None,
    ) -> Data:
        data = cast(Any, self.pipeline.collect)(
            layer.root,
            where=including_names(self.where, names),
            statistics=_with_required(self.statistics, batches.statistics),
            calibration=layer_calibration(batches, reduce=reduce),
        )
        extra = {name: self.extra_data[name].stats if name in self.extra_data else {} for name in data}
        return {name: attrs.evolve(p, stats={**extra[name], **p.stats}) for name, p in data.items()}


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
        raise ValueError(COMPARE_TWO_MODELS)
    if bad := [s.name for s in statistics if s.source not in ("inputs", "output")]:
        raise ValueError(
            f"{', '.join(bad)} needs gradients, which a single layer does not have; collect it from the whole model and pass it as "
            "extra_data="
        )
    fields = {"calibration", *(field.name for field in attrs.fields(Calibration))}
    if own := [key for key in getattr(pipeline.collect, "keywords", {}) if key in fields]:
        raise TypeError(f"pipeline.collect binds {', '.join(own)}, which sequential would not use; give it to sequential instead")
    return cast(Where, where), statistics


def _all_names(layer: Layer) -> dict[str, str]:
    """The first names in the layer of its parameters, by their names in the model and by those of the modules that share them."""
    prefix = f"{layer.name}." if layer.name else ""
    shared = {f"{prefix}{alias}": first for first, aliases in layer.aliases.items() for alias in aliases}
    return {**shared, **layer.local_names}


def _check_extra_data(model: nn.Module, extra_data: Data) -> None:
    """Raise if there is data of a parameter that the model lacks or has in another shape; data of one that is not chosen is not used."""
    if not isinstance(extra_data, Mapping):
        raise TypeError(
            f"extra_data is a {type(extra_data).__name__}; give data by parameter name, such as collect.with_statistics returns"
        )
    known = parameter_refs(model)
    for name, param in extra_data.items():
        if name not in known:
            raise KeyError(f"extra_data names {name!r}, which is not a parameter of the model{suggest(name, known)}")
        if not isinstance(param, Param):
            raise TypeError(f"extra_data[{name!r}] is a {type(param).__name__}, not a Param, such as collect.with_statistics returns")
        if param.grid.shape != known[name][0].shape:
            raise ValueError(
                f"extra_data[{name!r}] is of a parameter {param.grid.shape}, but that of the model is {known[name][0].shape}; collect it "
                "from this model"
            )


def _with_required(statistics: Sequence[Statistic], required: Iterable[Statistic]) -> list[Statistic]:
    names = {s.name for s in statistics}
    return [*statistics, *(s for s in required if s.name not in names)]


def check_not_offloaded(model: nn.Module) -> None:
    """Raise a ValueError if accelerate has offloaded weights of a model."""
    offloaded = [name for name, module in model.named_modules() if is_offloaded(module)]
    if offloaded:
        raise ValueError(
            f"accelerate has offloaded the weights of {offloaded[-1]!r}; prune the folder from which the model was loaded, which needs "
            "memory for one layer: blockprune.hf.prune_checkpoint(source, destination, recipe, sparsity)"
        )


def _prunable(model: nn.Module, where: Where) -> list[str]:
    """The chosen parameters of a plain model."""
    if read_masks(model):
        raise ValueError("the model is masked; prune a plain one: bp.finalize(model)")
    check_not_offloaded(model)
    chosen = select(model, where)
    if computed := [name for name, (ref, _) in chosen.items() if not ref.is_plain]:
        raise ValueError(f"{computed[0]} is computed by another parametrization, so it cannot be repaired; remove that first")
    return list(chosen)
