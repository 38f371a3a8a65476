"""Other masks for a model that trains block-sparse: blocks kept by both masks keep their values and the optimizer's state."""

from collections.abc import Sequence
from typing import TypeVar

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockprune.core.patterns import suggest
from blockprune.core.sharded_tensor import is_sharded
from blockprune.core.types import BlockMask, Masks, Weights
from blockprune.export.format import BlockSparse, unpack
from blockprune.export.packing import pack_weight
from blockprune.export.sparse_layers import BlockSparseLinear
from blockprune.model.apply import apply_masks, parameter_masks
from blockprune.model.optimizer_state import initial_state, list_of

M = TypeVar("M", bound=nn.Module)


def update(model: M, masks: Masks, *, optimizer: Optimizer | Sequence[Optimizer] | None, weights: Weights | None = None) -> M:
    """Change in place which blocks the layers of an exported model hold; return it.

    A block that both masks keep has the same values as before, and in the optimizer the same state. A new block starts at zero, or with the
    values of ``weights``, and with the state that a new parameter gets (`bp.reset_state`). The kept weights of a layer remain the same
    Parameter, without a gradient, whose length changes. So give all optimizers that hold them, call `update` on averages of the model (an
    EMA) with the same masks, and wrap the model in DistributedDataParallel again.

    Args:
        model: the result of `block_sparse`, trainable or not. Weights that are masked instead get the new masks as by `apply_masks`.
        masks: by the name of the weight, as `bp.read_masks` gives them. Weights that are not named keep their blocks.
        optimizer: that of the model's parameters, or several; None if there is none.
        weights: dense, by the same names: the values of new blocks.

    Raises:
        KeyError: a name that is no block-sparse or masked weight of the model, or weights without a mask.
        ValueError: a mask or weight of another shape than the layer's; a layer of int8; a layer that `fully_shard` has sharded; two masks
            for one layer; an optimizer without the kept weights of a layer, or whose state is not one number for each of them (LBFGS).
        TypeError: a mask that is no `BlockMask`. After any error the model is as it was before the call.

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
    optimizers = list_of(optimizer)
    sparse, masked, weights = _named_layers(model), parameter_masks(model), {} if weights is None else weights
    for name, mask in masks.items():
        if name not in sparse and name not in masked:
            raise KeyError(f"masks has {name!r}, which is no block-sparse weight of the model{suggest(name, [*sparse, *masked])}")
        if not isinstance(mask, BlockMask):
            raise TypeError(f"masks[{name!r}] is a {type(mask).__name__} and must be a BlockMask(keep, grid)")
    if unmasked := [name for name in weights if name not in masks]:
        raise KeyError(f"weights has {unmasked[0]!r}, and masks has not; give the mask of every weight that is given")
    layers = {name: sparse[name] for name in masks if name in sparse}
    for name, layer in layers.items():
        _check(name, layer, masks[name], weights.get(name), optimizers)
        if twin := next((other for other in layers if layers[other] is layer and masks[other] != masks[name]), None):
            raise ValueError(f"{name} and {twin} are names of the same layer, and masks has two different masks for it")
    new = {layer: _with_mask(layer, masks[name], weights.get(name)) for name, layer in layers.items()}
    if others := {name: mask for name, mask in masks.items() if name in masked}:
        apply_masks(model, masked | others, {name: weight for name, weight in weights.items() if name in others})
    for layer, (weight, source) in new.items():
        for holder in optimizers:
            _move_state(holder, layer, source)
        layer.store(weight)
    return model


def _named_layers(model: nn.Module) -> dict[str, BlockSparseLinear]:
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in modules if isinstance(module, BlockSparseLinear)}
    return {f"{name}.weight" if name else "weight": layer for name, layer in layers.items()}


def _check(name: str, layer: BlockSparseLinear, mask: BlockMask, weight: Tensor | None, optimizers: Sequence[Optimizer]) -> None:
    if layer.scale is not None:
        raise ValueError(f"{name}: the blocks of a weight of int8 cannot be changed; export the masked model again")
    if is_sharded(layer.values):
        raise ValueError(f"{name}: fully_shard has sharded this layer; update the model before it is sharded, and make the optimizer then")
    shape = layer.weight_shape
    for what, given in (("mask", mask.grid.shape), ("weight", None if weight is None else tuple(weight.shape))):
        if given is not None and given != shape:
            raise ValueError(f"{name}: the {what} has shape {given}, and the weight {shape}")
    parameters = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    if optimizers and layer.trainable and layer.values.requires_grad and not any(parameter is layer.values for parameter in parameters):
        raise ValueError(
            f"optimizer has not the kept weights of {name}; make it from the parameters of this model, which block_sparse has made anew"
        )
    for optimizer in optimizers:
        lists = [key for state in optimizer.state.values() for key, value in state.items() if isinstance(value, (list, tuple))]
        if lists:
            raise ValueError(f"optimizer: the state {lists[0]!r} of {type(optimizer).__name__} is not one number for each kept weight")


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
