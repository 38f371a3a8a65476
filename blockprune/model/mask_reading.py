"""Read the masks that are on a model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from blockprune.core.types import BlockMask
from blockprune.model.parameters import ParameterRef, distinct, is_exported, parameter_refs
from blockprune.model.parametrization import MaskBlocks

Refs = Mapping[str, list[ParameterRef]]  # `parameter_refs` of a model


def read_masks(model: nn.Module) -> dict[str, BlockMask]:
    """Copies of the masks on a model, by parameter name; those of exported layers, too (`export.block_sparse`).

    Example:
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> bp.read_masks(bp.apply_masks(nn.Linear(4, 2), {"weight": mask})) == {"weight": mask}
        True
    """
    return parameter_masks(model) | _masks_of_exported_layers(model)


def parameter_masks(model: nn.Module) -> dict[str, BlockMask]:
    """Copies of the masks on the parameters of a model; exported layers have none."""
    return masks_of_refs(parameter_refs(model))


def masks_of_refs(refs: Refs) -> dict[str, BlockMask]:
    """Copies of the masks on these parameters, by canonical name.

    Raises:
        ValueError: as `check_tied_masks`.
    """
    check_tied_masks(refs)
    return {name: BlockMask(mask.keep.clone(), mask.grid) for name, users in refs.items() if (mask := users[0].mask)}


def check_tied_masks(refs: Refs) -> None:
    """Raise a ValueError if only some of the modules that use a tensor mask it, because it was tied after masking."""
    for first, *others in refs.values():
        for ref in others:
            if (first.mask is None) != (ref.mask is None):
                masked, plain = (first.name, ref.name) if first.mask else (ref.name, first.name)
                raise ValueError(
                    f"{masked} {ref.shape} is masked, but {plain}, which is the same tensor, is not, because they were tied after masking; "
                    f"call bp.apply_masks(model, {{}}), which takes the mask off, and apply a mask again, under the name {first.name!r}"
                )


def _masks_of_exported_layers(model: nn.Module) -> dict[str, BlockMask]:
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if is_exported(module)}
    masks = {f"{name}.weight" if name else "weight": layer.block_mask() for name, layer in layers.items()}
    return {name: mask for name, mask in masks.items() if isinstance(mask, BlockMask)}


def masked_refs(refs: Refs) -> list[tuple[ParameterRef, MaskBlocks]]:
    """The masked ones of these parameters, each tensor once, with their masks."""
    return [(ref, mask) for users in refs.values() for ref in distinct(users) if (mask := ref.mask)]
