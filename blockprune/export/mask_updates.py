"""Other masks for a model that trains block-sparse: kept blocks go on where they were."""

from collections.abc import Mapping
from typing import TypeVar, cast

import attrs
import torch
from torch import Tensor, nn

from blockprune.core.patterns import suggest
from blockprune.core.types import BlockMask, Masks, Weights
from blockprune.export.format import BlockSparse, unpack
from blockprune.export.packing import pack_weight
from blockprune.export.sparse_layers import BlockSparseLinear
from blockprune.model.apply import apply_masks, parameter_masks

M = TypeVar("M", bound=nn.Module)


def update(model: M, masks: Masks, *, weights: Weights | None = None, optimizer: torch.optim.Optimizer | None = None) -> M:
    """Change in place which blocks the layers of an exported model hold; return it.

    A block that stays has its values, and in the optimizer its state, as before. A block that comes starts at zero, or with the values of
    ``weights``, and with a state of zero. The kept weights of a layer remain the same Parameter, so the optimizer stays valid; its length
    changes and it has no gradient. Wrap the model in DistributedDataParallel or `fully_shard` again afterwards: both hold the old length.

    Args:
        model: the result of `block_sparse`, trainable or not. Weights that are masked instead get the new masks as by `apply_masks`.
        masks: by the name of the weight, as `bp.read_masks` gives them. Weights that are not named keep their blocks.
        weights: dense, by the same names: the values of blocks that come.
        optimizer: of the model's parameters; its state of kept weights is carried over.

    Raises:
        KeyError: a name that is no block-sparse or masked weight of the model, or weights without a mask.
        ValueError: a mask or weight of another shape than the layer's, or a layer of int8; an optimizer that lacks the kept weights of a
            layer: it was made before `block_sparse` made this model. The model is then as it was before the call.

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
    sparse, masked = _named_layers(model), parameter_masks(model)
    for name in masks:
        if name not in sparse and name not in masked:
            raise KeyError(f"masks has {name!r}, which is no block-sparse weight of the model{suggest(name, [*sparse, *masked])}")
    if unmasked := [name for name in weights or {} if name not in masks]:
        raise KeyError(f"weights has {unmasked[0]!r}, and masks has not; give the mask of every weight that is given")
    layers = {name: sparse[name] for name in masks if name in sparse}
    for name, layer in layers.items():
        _check(name, layer, masks[name], (weights or {}).get(name), optimizer)
    new = {name: _with_mask(layer, masks[name], (weights or {}).get(name)) for name, layer in layers.items()}
    if others := {name: mask for name, mask in masks.items() if name in masked}:
        apply_masks(model, masked | others, {name: weight for name, weight in (weights or {}).items() if name in others})
    for name, (weight, source) in new.items():
        _move_state(optimizer, layers[name], source)
        layers[name].store(weight)
    return model


def _named_layers(model: nn.Module) -> dict[str, BlockSparseLinear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BlockSparseLinear)}
    return {f"{name}.weight" if name else "weight": layer for name, layer in layers.items()}


def _check(name: str, layer: BlockSparseLinear, mask: BlockMask, weight: Tensor | None, optimizer: torch.optim.Optimizer | None) -> None:
    shape = tuple(layer.weight.shape) if len(mask.grid.shape) != 2 else layer.shape
    if layer.scale is not None:
        raise ValueError(f"{name}: the blocks of a weight of int8 cannot be changed; export the masked model again")
    for what, given in (("mask", mask.grid.shape), ("weight", None if weight is None else tuple(weight.shape))):
        if given is not None and given != shape:
            raise ValueError(f"{name}: the {what} has shape {given}, and the weight {shape}")
    parameters = [] if optimizer is None else [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if optimizer is not None and layer.trainable and not any(parameter is layer.values for parameter in parameters):
        raise ValueError(
            f"optimizer has no parameter of {name}: block_sparse made new parameters; make the optimizer from model.parameters()"
        )


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


def _move_state(optimizer: torch.optim.Optimizer | None, layer: BlockSparseLinear, source: Tensor) -> None:
    state = cast(Mapping[str, object], {} if optimizer is None else optimizer.state.get(layer.values, {}))
    for key, x in state.items():
        if isinstance(x, Tensor) and x.shape == layer.values.shape:
            cast(dict[str, object], state)[key] = _carried(x, source, x.new_zeros(source.shape))
