"""Other masks for a model that trains block-sparse: blocks kept by both masks keep their values and the optimizer's state."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockprune.core._compat_dynamo import vary_lengths
from blockprune.core.grid import expand
from blockprune.core.patterns import suggest
from blockprune.core.sharded_tensor import is_sharded, sharded_like, whole
from blockprune.core.types import BlockMask, Masks, Weights, check_masks
from blockprune.export.format import BlockSparse, unpack
from blockprune.export.packing import pack_weight
from blockprune.export.sparse_layers import BlockSparseLinear
from blockprune.model.apply import apply_masks
from blockprune.model.checkpoint import keep_gradient_options
from blockprune.model.mask_reading import parameter_masks
from blockprune.model.optimizer_state import check_state, initial_state, list_of, reset_elements, trained_ids
from blockprune.model.parameters import find_parameters, parameter_refs
from blockprune.model.sharding import reshard

M = TypeVar("M", bound=nn.Module)


def update(model: M, masks: Masks, *, optimizer: Optimizer | Sequence[Optimizer] | None, weights: Weights | None = None) -> M:
    """Change in place which blocks the layers of an exported model hold; return it.

    A block that both masks keep has the same values as before, and in the optimizer the same state. A new block starts at zero, or with the
    values of ``weights``, and with the state that a new parameter gets (`bp.reset_state`). The kept weights of a layer remain the same
    Parameter, without a gradient, whose length changes. So give all optimizers that hold them, call `update` on averages of the model with
    the same masks (``ema.module`` of an `AveragedModel`), because averages and states of other blocks are used without an error where as
    many are kept, and wrap the model in DistributedDataParallel again.

    This holds for weights that stayed masked, too, whose new blocks lose the values that were stored for them. Their masks, whether named
    or not, keep the options ``straight_through`` and ``decay`` of `apply_masks`.

    A model that ``torch.compile`` has compiled is compiled again after the first call that changes how many values its layers hold, for
    any numbers of them from then on; a layer that keeps nothing or a single block is a case of its own.

    Args:
        model: the result of `block_sparse`, trainable or not.
        masks: by the name of the weight, as `bp.read_masks` gives them. Weights that are not named keep their blocks.
        optimizer: that of the model's parameters, or several; None if there is none, as of a model that is not ``trainable``.
        weights: dense, by the same names: the values of new blocks.

    Raises:
        KeyError: a name that is no block-sparse or masked weight of the model, or weights without a mask.
        ValueError: a mask or weight of another shape than the layer's; a weight with NaN or inf, or on the meta device; a layer of int8; a
            layer that `fully_shard` has sharded; two masks for one layer; an optimizer without the kept weights of a layer, or for layers
            that are not trainable, or whose state is not one number for each kept weight (LBFGS).
        TypeError: a mask that is no `BlockMask`, a weight that is no tensor.
            After any error the model and the optimizer are as they were before the call.

    Example:
        >>> from blockprune import export
        >>> masks = {"weight": bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))}
        >>> model = export.block_sparse(bp.apply_masks(nn.Linear(4, 2), masks), backend="torch", trainable=True)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> masks = {"weight": bp.BlockMask(torch.tensor([[True, True]]), bp.BlockGrid((2, 4), (2, 2)))}
        >>> export.update(model, masks, optimizer=optimizer)
        BlockSparseLinear(4, 2, bias=True, 0.0% pruned, torch, trainable)
        >>> model.weight[:, 2:].count_nonzero().item()
        0
    """
    check_masks(masks)
    optimizers = list_of(optimizer)
    sparse, masked, weights = _named_layers(model), parameter_masks(model), {} if weights is None else weights
    _check_tensors(weights)
    for name in masks:
        if name not in sparse and name not in masked:
            raise KeyError(f"masks has {name!r}, which is no block-sparse weight of the model{suggest(name, [*sparse, *masked])}")
    if unmasked := [name for name in weights if name not in masks]:
        raise KeyError(f"weights names {unmasked[0]!r}, but masks does not; give a mask for every weight")
    layers = {name: sparse[name] for name in masks if name in sparse}
    trained = trained_ids(optimizers) if masks else set()
    for name, layer in layers.items():
        _check(name, layer, masks[name], weights.get(name))
        _check_optimizers(name, layer, optimizers, trained)
        if twin := next((other for other in layers if layers[other] is layer and masks[other] != masks[name]), None):
            raise ValueError(f"{name} and {twin} are names of the same layer, and masks has two different masks for it")
    _check_trained(model, masks, layers, optimizers, trained)
    with torch.inference_mode(False):  # the optimizer's next step could not change tensors that were made in inference mode
        new = {layer: _with_mask(layer, masks[name], weights.get(name)) for name, layer in layers.items()}
        if others := {name: mask for name, mask in masks.items() if name in masked}:
            _update_masked(model, masked, others, weights, optimizers)
        lengths_change = any(len(weight.values) != len(layer.values) for layer, (weight, _) in new.items())
        for layer, (weight, source) in new.items():
            for holder in optimizers:
                _move_state(holder, layer, source)
            layer.store(weight)
    if lengths_change:
        vary_lengths(x for layer in sparse.values() for x in (layer.values, layer.col))
    return model


def _check_tensors(weights: Any) -> None:
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights is a {type(weights).__name__}, not a mapping from parameter names to tensors")
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            raise TypeError(f"weights[{name!r}] is a {type(weight).__name__}; give the dense weight as a tensor")


def _named_layers(model: nn.Module) -> dict[str, BlockSparseLinear]:
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in modules if isinstance(module, BlockSparseLinear)}
    return {f"{name}.weight" if name else "weight": layer for name, layer in layers.items()}


def _check(name: str, layer: BlockSparseLinear, mask: BlockMask, weight: Tensor | None) -> None:
    if layer.scale is not None:
        raise ValueError(f"{name}: the blocks of a weight of int8 cannot be changed; export the masked model again")
    if is_sharded(layer.values):
        raise ValueError(f"{name}: fully_shard has sharded this layer; update the model before it is sharded, and make the optimizer then")
    _check_values(name, layer.weight_shape, layer.values, mask, weight)


def _check_optimizers(name: str, layer: BlockSparseLinear, optimizers: Sequence[Optimizer], trained: Collection[int]) -> None:
    if optimizers and layer.trainable and layer.values.requires_grad and id(layer.values) not in trained:
        raise ValueError(
            f"optimizer does not hold the kept weights of {name}; make it from the parameters of this model, which block_sparse made anew"
        )
    for optimizer in optimizers:
        check_state(optimizer, name, layer.values, layer.values.shape)


def _check_trained(
    model: nn.Module, masks: Masks, layers: Mapping[str, BlockSparseLinear], optimizers: Sequence[Optimizer], trained: Collection[int]
) -> None:
    """Raise if optimizers hold none of the weights that masks name, such as those of an export that does not train."""
    reshard(model)
    masked = find_parameters(model, [name for name in masks if name not in layers], what="masks")
    weights = [*(layer.values for layer in layers.values()), *(tensor for users in masked.values() for tensor in users[0].originals)]
    are_frozen = all(isinstance(weight, nn.Parameter) and not weight.requires_grad for weight in weights)
    if optimizers and not are_frozen and not any(id(weight) in trained for weight in weights):
        raise ValueError(
            f"optimizer holds no weight that masks names, such as {next(iter(masks))}; if it is to train, export with "
            "block_sparse(model, trainable=True) and make the optimizer from the new model's parameters; else give optimizer=None"
        )


def _check_values(name: str, shape: tuple[int, ...], values: Tensor, mask: BlockMask, weight: Tensor | None) -> None:
    """Raise for a mask or a weight of another shape than the layer's, and for a weight that is not finite in the type of the values."""
    for what, given in (("mask", mask.grid.shape), ("weight", None if weight is None else tuple(weight.shape))):
        if given is not None and given != shape:
            raise ValueError(f"{name}: the {what} has shape {given}, and the weight {shape}")
    if weight is not None and weight.is_meta and not values.is_meta:
        raise ValueError(f"{name} {shape}: weights has a tensor on the meta device, which has no values; give a weight with values")
    if weight is not None and not weight.is_meta and not whole(weight.detach().to(values.dtype).isfinite().all()):
        raise ValueError(f"{name} {shape}: weights has NaN or inf for this weight (as {values.dtype}); give finite values")


def _update_masked(model: nn.Module, before: Masks, after: Masks, weights: Weights, optimizers: Sequence[Optimizer]) -> None:
    """Other masks for weights that stayed masked, in place: new blocks get their values, and blocks that come or go a new state."""
    reshard(model)
    refs = {name: users[0] for name, users in parameter_refs(model).items() if name in after}
    for name, ref in refs.items():
        _check_values(name, ref.shape, ref.stored, after[name], weights.get(name))
        for optimizer in optimizers:
            check_state(optimizer, name, ref.stored, ref.stored.shape)
    computed = {name: weights[name] for name, ref in refs.items() if not ref.is_plain and name in weights}  # `apply_masks` refuses them
    with keep_gradient_options(model):
        apply_masks(model, {**before, **after}, computed)
    for name, ref in refs.items():
        if ref.is_plain:  # else another parametrization computes the weight, and no stored number belongs to one block
            kept_before, kept = (expand(mask.keep, mask.grid).to(ref.stored.device) for mask in (before[name], after[name]))
            _set_new_elements(ref.stored, kept & ~kept_before, weights.get(name))
            for optimizer in optimizers:
                reset_elements(optimizer, ref.stored, kept ^ kept_before)


@torch.no_grad()
def _set_new_elements(stored: Tensor, is_new: Tensor, weight: Tensor | None) -> None:
    """Write the values of a weight, or zeros, into the elements of new blocks."""
    if bool(is_new.any()):
        old = whole(stored)
        stored.copy_(sharded_like(torch.where(is_new, old.new_zeros(()) if weight is None else whole(weight).to(old), old), stored))


def _with_mask(layer: BlockSparseLinear, mask: BlockMask, weight: Tensor | None) -> tuple[BlockSparse, Tensor]:
    """The layer's weight with another mask, and which of the old values each new one is: -1 for none."""
    old = layer.packed_weight
    shape = mask.grid.shape
    positions = unpack(attrs.evolve(old, values=torch.arange(1, len(old.values) + 1, device=old.values.device)))
    packed = pack_weight(positions.view(shape), mask)
    source = packed.values - 1
    start = torch.zeros_like(source, dtype=old.values.dtype)
    if weight is not None:
        start = pack_weight(weight.detach().to(old.values), mask).values
    return attrs.evolve(packed, values=_carried(old.values.detach(), source, start)), source


def _carried(old: Tensor, source: Tensor, start: Tensor) -> Tensor:
    """The old values that stay, and those of ``start`` in new places."""
    return torch.where(source >= 0, old[source.clamp(min=0)], start) if len(old) else start


def _move_state(optimizer: Optimizer, layer: BlockSparseLinear, source: Tensor) -> None:
    state = optimizer.state.get(layer.values, {})
    for key, x in state.items():
        if isinstance(x, Tensor) and x.shape == layer.values.shape:
            state[key] = _carried(x, source, x.new_full(source.shape, initial_state(optimizer, layer.values, key)))
