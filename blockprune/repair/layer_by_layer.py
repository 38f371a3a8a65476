"""Layer after layer: each layer is pruned and repaired on the outputs of the pruned layers before it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Unpack

import attrs
from torch import nn

from blockprune.core.arguments import check_function
from blockprune.core.grid import BlockGrid
from blockprune.core.masks import sparsity as sparsity_of
from blockprune.core.pipeline import Pipeline, required_statistics
from blockprune.core.types import Data, Masks, Reconstruct, Sparsity, Weights
from blockprune.model.calibration import Calibration, RunOptions, as_calibration
from blockprune.repair.layer_finetuning import Finetune
from blockprune.repair.layer_pruning import LayerPruning, LayerResult
from blockprune.repair.transformer_layers import Layer


@attrs.frozen(eq=False, repr=False)
class PruningResult:
    """Masks and repaired weights; give both to `apply_masks`.

    Args:
        masks: by parameter name.
        weights: new values of the repaired parameters, by parameter name.
        layers: the names of the layers that are done, of `sequential`.

    Example:
        >>> mask = bp.BlockMask(torch.tensor([True, False]), bp.BlockGrid((4,), (2,)))
        >>> bp.PruningResult(masks={"fc.bias": mask}, weights={}, layers=("fc",))
        PruningResult(1 mask, 50.0% pruned; 0 weights; 1 layer: 'fc')
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
        return f"PruningResult({masks}, {sparsity_of(self.masks):.1%} pruned; {weights}; {layers}{named})"


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
    finetune: Finetune | Mapping[str, Finetune] | None = None,
    resume: PruningResult | None = None,
    callback: Callable[[PruningResult], None] | None = None,
    **options: Unpack[RunOptions],
) -> PruningResult:
    """Prune and repair layers in order, each calibrated on the outputs of the pruned layers before it (SparseGPT 2301.00774).

    The model is not changed, but no other thread may run it before this returns (see the guide of large models). The statistics of one
    layer are held at a time. To go on after an interruption, give what ``callback`` was last called with as ``resume``: save it with
    ``callback=partial(bp.save_repair, path="repair.safetensors")``, and go on with ``resume=bp.load_repair("repair.safetensors")``; the
    result has the same bits as that of an uninterrupted call.

    Args:
        model: a model without masks whose layers follow each other: the output of one is the (first) input of the next.
        pipeline: its ``collect`` takes ``where=``, ``statistics=`` and ``calibration=``, such as
            ``partial(collect.with_statistics, where=...)``. It is called with a module that holds one layer alone, under the layer's full
            name. The statistics that its metric and ``reconstruct`` require are added.
        reconstruct: (data, masks) -> weights, such as `reconstruct.least_squares`.
        batches: calibration data, or a `Calibration`; one pass is made over it, and the layers' inputs of all of it are kept.
        sparsity: a fraction, or a mapping by parameter name or pattern, such as a function of `budgets` returns.
        layers: names of the modules, in order; by default the children of the largest ModuleList or Sequential (the decoder and encoder
            layers of Hugging Face models).
        extra_data: statistics that were collected before, such as ``output_grad_gram`` of the dense model; added to each layer's own.
        target: "dense" matches the dense layers' outputs on the dense model's inputs, which makes up for errors of the layers before, too
            (it needs more damping; 0.4 was best on a language model). "pruned" matches the dense layer's outputs on the inputs that each
            layer now gets, which makes up for its own errors alone and takes half the work. With "dense", the experts of `as_linears` get
            the tokens that the dense layer's router sends them.
        finetune: a last step after ``reconstruct``, such as `finetune_layer`, that moves a layer's kept weights towards the dense layer's
            outputs on its dense inputs. A mapping tunes modules in each layer apart, in its order and each towards the dense module's
            outputs, such as ``{"self_attn": tune, "mlp": tune}`` (Wagner et al. 2510.14444): less memory for gradients, and one more
            forward pass for each module. "" is the layer itself, for all weights that are not tuned before; weights in none of the
            modules stay as ``reconstruct`` left them.
        resume: the result of an earlier, interrupted call.
        callback: called with the result so far after each new layer; the model is in evaluation mode meanwhile.
        options: the fields of `Calibration` besides batches, such as ``forward=``, where ``batches`` is not a `Calibration`. With
            ``reduce``, such as `blockprune.distributed.all_reduce`, each process has batches of its own, or none, and all end with the
            same masks and weights. They share the work of a metric and of a ``reconstruct`` that have
            ``share=blockprune.distributed.share``.

    Raises:
        ValueError: a masked model, one on the meta device, layers that do not follow each other, a chosen parameter that lies in no layer,
            no batches, a ``resume`` of other layers or without their masks and weights, a statistic that needs gradients, ``finetune`` in
            several processes, processes whose masks differ.
        KeyError: a layer or a parameter in ``extra_data`` that the model does not have, a module in ``finetune`` that no layer has, a
            sparsity for a parameter that is not chosen, or none for one that is.
        TypeError: a recipe instead of a pipeline, a collector without the three options, or with batches of its own; batches that are one
            tensor or mapping; arguments of other types.
        NotImplementedError: what `collect.with_statistics` raises.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(64, 8)
        >>> collect = partial(bp.collect.with_statistics, where=bp.linears((2, 2)))
        >>> pipeline = bp.Pipeline(collect, bp.metric.obs, bp.allocate.per_row)
        >>> result = bp.sequential(model, pipeline, bp.reconstruct.least_squares, [x], 0.5)
        >>> pruned = bp.apply_masks(model, result.masks, result.weights)
        >>> round(bp.sparsity(result.masks), 2)
        0.5
    """
    signature = "(PruningResult) -> None, such as partial(bp.save_repair, path='repair.safetensors')"
    check_function("callback", callback, signature, optional=True)
    if resume is not None and not isinstance(resume, PruningResult):
        raise TypeError(f"resume has the type {type(resume).__name__}; give a PruningResult, such as bp.load_repair('repair.safetensors')")
    calibration = as_calibration(batches, options) if isinstance(batches, Calibration) else Calibration(batches, **options)
    pruning = LayerPruning.of(
        model, pipeline, reconstruct, sparsity, layers=layers, extra_data=extra_data, target=target, finetune=finetune
    )
    if meta := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ValueError(
            f"{meta[0]} is on the meta device and has no values; give a model with weights, or prune the folder of a checkpoint, which "
            "needs memory for one layer: blockprune.hf.prune_checkpoint(source, destination, recipe, sparsity)"
        )
    result = _checked_resume(PruningResult({}, {}) if resume is None else resume, pruning, reconstruct)
    finished, given = result.layers, LayerResult(result.masks, result.weights)

    def receive(layer: Layer, new: LayerResult) -> None:
        nonlocal result
        result = PruningResult({**result.masks, **new.masks}, {**result.weights, **new.weights}, (*result.layers, layer.name))
        if callback is not None:
            callback(result)

    pruning.run(model, calibration, done=lambda layer: given.only(layer.local_names) if layer.name in finished else None, receive=receive)
    return result


def _checked_resume(done: PruningResult, pruning: LayerPruning, reconstruct: Reconstruct) -> PruningResult:
    """The earlier result, if it has masks and weights for all chosen parameters of its layers, which are the first ones."""
    finished = pruning.order[: len(done.layers)]
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
            grid = done.masks[name].grid
            if grid.shape != shape:
                raise ValueError(f"{name} {shape}: resume has a mask for shape {grid.shape}; it is of another model")
            owner = layer.module.get_submodule(layer.local_names[name].rpartition(".")[0])
            if grid != (chosen := BlockGrid(shape, pruning.where(name, owner) or ())):
                raise ValueError(f"{name} {shape}: resume has a mask of {grid}, and `where` chooses {chosen}; give the first call's where")
        for name, local_name in layer.local_names.items():
            shape = tuple(layer.module.get_parameter(local_name).shape)
            if name in done.weights and tuple(done.weights[name].shape) != shape:
                raise ValueError(f"{name} {shape}: resume has a weight of shape {tuple(done.weights[name].shape)}; it is of another model")
            if name in done.weights and not done.weights[name].isfinite().all():
                raise ValueError(f"{name} {shape}: resume has a weight with NaN or inf; give an earlier result")
    return done
