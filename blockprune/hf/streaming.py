"""Prune a checkpoint folder into another without ever loading the whole model."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from blockprune.collect.from_weights import weights as collect_weights
from blockprune.core.arguments import check_function, check_sparsity
from blockprune.core.grid import BlockGrid
from blockprune.core.mask_file import load_masks, save_masks
from blockprune.core.pipeline import Pipeline, as_code
from blockprune.core.types import Masks, Param, Sparsity, check_finite, check_prunable
from blockprune.hf.checkpoint_folder import Checkpoint, Skeleton
from blockprune.hf.pruned_folder import MASKS, PrunedFolder, is_sealed, opened_by_first, write_sealed
from blockprune.hf.recipe_hash import data_hash, recipe_hash
from blockprune.hf.streamed_budget import layer_budget
from blockprune.model.masking import mask_blocks
from blockprune.model.selection import select
from blockprune.model.sharding import gather_from_ranks, on_first_rank, rank_of
from blockprune.recipes import LayerByLayer, OneShot
from blockprune.repair.hidden_states import TensorFiles, in_memory
from blockprune.repair.layer_pruning import LayerPruning, LayerResult
from blockprune.repair.transformer_layers import Layer, find_layers

VERSION = 2  # of the folder while it is written


def prune_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    recipe: OneShot | LayerByLayer,
    sparsity: Sparsity,
    *,
    model_class: Any = None,
    device: torch.device | str = "cpu",
    spill: bool = False,
    callback: Callable[[str], None] | None = None,
) -> Masks:
    """Prune a checkpoint folder into another folder, with the weights of one layer in memory at a time.

    The result has the same bits as ``recipe(model, sparsity)`` of the loaded model. Each layer is written when it is done. If the call is
    interrupted, the same call goes on where it was, and ends in the same bits; the functions of the recipe and what they refer to must
    be the same. The new folder loads with ``from_pretrained``; pruned blocks are zeros in plain weights. Its masks are in
    ``masks.safetensors`` (`load_masks`). All other files of the source are copied, with subfolders such as ``1_Pooling`` of
    sentence-transformers, but no weights in other formats: a subfolder that has some, such as
    ``onnx``, is left out, as its model is not pruned.

    If the recipe's calibration has ``reduce=bp.distributed.all_reduce``, all processes call this, each with batches of its own, and see the
    same folders; the first one writes.

    Args:
        source: a folder with config.json and safetensors files.
        destination: a new or empty folder, or one that the same call has begun.
        recipe: a value of `recipes`: of weights alone, such as `recipes.magnitude`, or layer by layer, such as `recipes.sparsegpt`.
        sparsity: a fraction, or a mapping by parameter name or pattern.
        model_class: the class of the model; by default the one that config.json names. What ``recipe.calibration.forward`` needs of the
            output, such as a loss, it must give.
        device: where layers are loaded and computed.
        spill: keep the hidden states of all batches in files in ``destination`` instead of in memory.
        callback: called with the name of each file of weights after it is written: one for each layer, then those of all else; in the
            process that writes.

    Returns:
        The masks, by parameter name.

    Raises:
        ValueError: a sparsity outside [0, 1] or NaN, a file that is damaged or does not fit config.json, stacked experts, a destination
            that holds something else or was begun with another recipe, sparsity, source or calibration data, a recipe that needs the whole
            model, a device that this machine does not have, and what `sequential` raises.
        TypeError: a sparsity that is no number, a class or a callback that cannot be called, calibration batches that can be used once only
            or whose contents cannot be read.
        BlockingIOError: another process is writing into the destination.
        OSError: a file is missing, the disk is full. What is written stays, and the same call goes on from there.

    Example:
        >>> import tempfile, transformers
        >>> from blockprune.hf import prune_checkpoint
        >>> sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=16)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        >>> where = bp.including(bp.linears((4, 4)), "model.layers.*")
        >>> recipe = bp.recipes.sparsegpt(where, bp.Calibration([torch.randint(16, (4, 8))], progress=False))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(f"{folder}/dense")
        ...     masks = prune_checkpoint(f"{folder}/dense", f"{folder}/pruned", recipe, 0.5)
        ...     pruned = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/pruned")
        >>> bp.sparsity(masks), bp.masks_from_zeros(pruned, where=where) == masks
        (0.5, True)
    """
    source, destination, sparsity = Path(source), Path(destination), check_sparsity(sparsity)
    if not isinstance(recipe, (OneShot, LayerByLayer)):
        raise TypeError(
            f"recipe is a {type(recipe).__name__}; give a value of bp.recipes, such as bp.recipes.sparsegpt(where, calibration)"
        )
    if not isinstance(model_class, type):  # a class is called to make a model, as any function is
        check_function("model_class", model_class, "(config) -> model, such as transformers.AutoModelForCausalLM", optional=True)
    check_function("callback", callback, "(name of a file) -> None", optional=True)
    _check_device(device)
    if destination.exists() and destination.resolve() == source.resolve():
        raise ValueError(f"destination={str(destination)!r} is the source, which would be overwritten; give a new folder")
    checkpoint = Checkpoint.open(source)
    skeleton = Skeleton.of(checkpoint, model_class=model_class, device=device)
    order = _layers(skeleton, recipe)
    skeleton.check_ties()
    folder = PrunedFolder(destination, _parts(skeleton, order), callback)
    batches, reduce = (recipe.calibration.batches, recipe.calibration.reduce) if isinstance(recipe, LayerByLayer) else ((), None)
    hashes = gather_from_ranks(data_hash(batches), reduce)
    state = {
        "version": VERSION,
        "recipe": repr(recipe),
        "sparsity": sparsity,
        "source": checkpoint.fingerprint,
        "model class or device": f"{type(skeleton.model).__qualname__}, {skeleton.device}",
        "calibration data": hashes[0] if len(hashes) == 1 else hashes,
        "recipe or calibration data": recipe_hash(recipe, known=batches),
    }
    with opened_by_first(folder, state, reduce):
        if on_first_rank(partial(_is_finished, folder), reduce):
            return load_masks(destination / MASKS)
        if isinstance(recipe, OneShot):
            _prune_at_once(skeleton, folder, recipe.pipeline, sparsity)
        else:
            _prune_layers(skeleton, folder, order, recipe, sparsity, spill=spill)
        on_first_rank(lambda: len(folder.finish(source)), reduce)  # sends no masks, which all read below
        return load_masks(destination / MASKS)


def _is_finished(folder: PrunedFolder) -> bool:
    """Whether all files are complete.

    Raises:
        ValueError: they were, but a file is missing or is another one.
    """
    if folder.is_finished and (missing := [folder.file(i) for i in range(len(folder.parts)) if not folder.is_written(i)]):
        raise ValueError(f"{folder.path} was finished, but {missing[0]} is missing; delete the folder and begin again")
    return folder.is_finished


def _check_device(device: torch.device | str) -> None:
    """Raise a ValueError unless this machine can compute on a device."""
    try:
        problem = "it holds no values" if torch.empty(0, device=torch.device(device)).is_meta else ""
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA fails an assertion
        problem = str(error).partition("\n")[0]
    if problem:
        raise ValueError(f"device={device!r} cannot be used: {problem}; give one that this machine has, such as 'cpu'")


def _layers(skeleton: Skeleton, recipe: OneShot | LayerByLayer) -> list[Layer]:
    """The layers of the model, which share no parameter with anything else."""
    order = find_layers(skeleton.model, recipe.layers if isinstance(recipe, LayerByLayer) else None, [])
    for layer in order:
        for name in layer.local_names:
            if other := [ref.name for ref in skeleton.refs[name] if not ref.name.startswith(f"{layer.name}.")]:
                raise ValueError(f"{name} in layer {layer.name!r} is tied to {other[0]}; prune it in memory: recipe(model, ...)")
    return order


def _parts(skeleton: Skeleton, order: Sequence[Layer]) -> list[list[str]]:
    """The keys of each file: a file for each layer, and files of at most that size for everything else."""
    tensors = skeleton.checkpoint.tensors
    parts = [[key for key, name in skeleton.names.items() if name.startswith(f"{layer.name}.")] for layer in order]
    largest = max(sum(tensors[key].nbytes for key in keys) for keys in parts)
    inside = {key for keys in parts for key in keys}
    size = largest
    for key in tensors:
        if key not in inside:
            if size + tensors[key].nbytes > largest:
                parts.append([])
                size = 0
            parts[-1].append(key)
            size += tensors[key].nbytes
    return parts


# Weights alone.


@attrs.frozen(eq=False)
class _WeightsOnDisk(Mapping[str, Param]):
    """The data of a pipeline of weights alone: each weight is read when it is used."""

    skeleton: Skeleton
    grids: Mapping[str, BlockGrid]

    def __len__(self) -> int:
        return len(self.grids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.grids)

    def __getitem__(self, name: str) -> Param:
        weight = self.skeleton.read(name)
        check_prunable(name, weight)
        return Param(weight, self.grids[name])


def _prune_at_once(skeleton: Skeleton, folder: PrunedFolder, pipeline: Pipeline, sparsity: Sparsity) -> None:
    path = folder.work / MASKS  # kept, because a metric may be random
    if not is_sealed(path, folder.work):
        write_sealed(path, folder.work, lambda: save_masks(_masks_of_weights(skeleton, pipeline, sparsity), path))
    masks = load_masks(path)
    for number, keys in enumerate(folder.parts):
        if not folder.is_written(number):
            tensors = {key: _masked(skeleton, key, masks) for key in keys}
            names = {skeleton.names[key] for key in keys}
            folder.write(number, tensors, masks={name: mask for name, mask in masks.items() if name in names})
            del tensors  # before those of the next file are read


def _masks_of_weights(skeleton: Skeleton, pipeline: Pipeline, sparsity: Sparsity) -> Masks:
    collect: Any = pipeline.collect
    options = collect.keywords if isinstance(collect, partial) and collect.func is collect_weights else {}
    if "where" not in options:
        raise ValueError(
            f"recipe collects by {as_code(collect)}, which needs the whole model; prune a checkpoint by a recipe of weights alone "
            "(collect=partial(collect.weights, where=...)), or layer by layer: bp.recipes.LayerByLayer(pipeline, bp.reconstruct.none, "
            'calibration, target="pruned"), whose pipeline collects by partial(collect.with_statistics, where=...) without batches'
        )
    data = _WeightsOnDisk(skeleton, {name: grid for name, (_, grid) in select(skeleton.model, options["where"]).items()})
    scores = pipeline.score(data, sparsity)
    for name, score in scores.items():
        if not score.value.isfinite().all():
            check_finite(name, data[name].weight)
    return pipeline.allocate(scores, sparsity)


def _masked(skeleton: Skeleton, key: str, masks: Masks) -> Tensor:
    value, name = skeleton.checkpoint.read(key), skeleton.names[key]
    return mask_blocks(value.to(skeleton.dtypes[name]), masks[name].keep.cpu(), masks[name].grid) if name in masks else value


# Layer by layer.


def _prune_layers(
    skeleton: Skeleton, folder: PrunedFolder, order: Sequence[Layer], recipe: LayerByLayer, sparsity: Sparsity, *, spill: bool
) -> None:
    reduce = recipe.calibration.reduce
    states = folder.work / f"hidden-{rank_of(reduce)}"
    states.mkdir(exist_ok=True)
    store = partial(TensorFiles, folder=states) if spill else in_memory
    load = partial(skeleton.load_layer, order)
    options: Any = {"layers": recipe.layers, "target": recipe.target, "finetune": recipe.finetune}
    if recipe.budget is not None:
        if isinstance(sparsity, Mapping):
            raise TypeError(
                "sparsity is a mapping, which the recipe's budget makes of a number; leave that out: attrs.evolve(recipe, budget=None)"
            )
        names = [layer.name for layer in order]
        path = folder.work / "budget.safetensors"
        sparsity, options["extra_data"] = layer_budget(
            skeleton.model, recipe.budget, sparsity, layers=names, path=path, load=load, store=store
        )
    pruning = LayerPruning.of(skeleton.model, recipe.pipeline, recipe.reconstruct, sparsity, **options)
    number_of = {layer.name: number for number, layer in enumerate(pruning.order)}
    numbers = range(len(folder.parts))
    written = on_first_rank(lambda: [number for number in numbers if folder.is_written(number)], reduce)  # it reads all their bytes

    def done(layer: Layer) -> LayerResult | None:
        number = number_of[layer.name]
        if number not in written:
            return None
        keys = [key for key in folder.parts[number] if skeleton.names[key] in layer.local_names]
        tensors = folder.tensors(number, keys)
        return LayerResult(folder.masks(number), {skeleton.names[key]: x.to(skeleton.device) for key, x in tensors.items()})

    def receive(layer: Layer, result: LayerResult) -> None:
        if rank_of(reduce) > 0:
            return
        parameters, number, tensors = result.parameters(layer), number_of[layer.name], {}
        for key in folder.parts[number]:
            local_name = layer.local_names.get(skeleton.names[key], "")
            tensors[key] = parameters[local_name].cpu() if local_name in parameters else skeleton.checkpoint.read(key)
        folder.write(number, tensors, masks=result.masks)

    pruning.run(skeleton.model, recipe.calibration, done=done, receive=receive, load=load, store=store)
    for number in numbers[len(pruning.order) :]:
        if rank_of(reduce) == 0 and number not in written:
            folder.write(number, {key: skeleton.checkpoint.read(key) for key in folder.parts[number]}, masks={})
