"""Which layers of a masked model can run block-sparse, and why the others cannot."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockprune.core._compat import FAST_PATH_MODULES, has_hooks
from blockprune.core.sharded_tensor import is_sharded
from blockprune.core.types import BlockMask
from blockprune.model.mask_reading import parameter_masks
from blockprune.model.parameters import ParameterRef, is_exported, parameter_refs

LAYER_TYPES = (nn.Linear, nn.Conv2d)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@attrs.frozen(eq=False)
class Candidate:
    """A masked weight.

    Args:
        name: of the parameter.
        ref: the module and attribute that hold it.
        mask: its mask.
        unsupported_reason: why the layer cannot run block-sparse; empty if it can.

    Example:
        >>> from blockprune.export.candidates import find_candidates
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> model = bp.apply_masks(nn.Sequential(nn.Linear(4, 2)), {"0.weight": mask})
        >>> [(c.name, c.layer, c.sparsity, c.unsupported_reason) for c in find_candidates(model)]
        [('0.weight', '0', 0.5, '')]
    """

    name: str
    ref: ParameterRef
    mask: BlockMask
    unsupported_reason: str

    @property
    def layer(self) -> str:
        """The name of the module that owns the weight."""
        return self.name.removesuffix(self.ref.attr).removesuffix(".")

    @property
    def module(self) -> nn.Module:
        """The module that owns the weight, masked."""
        return self.ref.owner

    @property
    def weight(self) -> Tensor:
        """The weight with zeros, as the model uses it."""
        return self.ref.masked.detach()

    @property
    def sparsity(self) -> float:
        """The share of the weight that is zero."""
        weight = self.weight
        return 1 - float(weight.count_nonzero()) / weight.numel()


def find_candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every masked weight of two or more axes of a model.

    Biases and the factors of norms have one axis, and no product to leave out: without their masks they are plain parameters with zeros.

    Raises:
        ValueError: a model without masks.

    Example:
        >>> from blockprune.export.candidates import find_candidates
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> [c.unsupported_reason for c in find_candidates(bp.apply_masks(nn.Embedding(2, 4), {"weight": mask}))]
        ["Embedding has no block-sparse form; torch's Linear and Conv2d have"]
    """
    refs, masks = parameter_refs(model), parameter_masks(model)
    if not masks:
        if any(is_exported(module) for module in model.modules()):
            raise ValueError(
                "the model has no masks; its layers are block-sparse already. To make their kept weights parameters or buffers, give "
                "trainable= to export.load_state_dict(model, model.state_dict()); for other masks: export.update(model, masks)"
            )
        raise ValueError(
            "the model has no masks, so it has no blocks to leave out; apply_masks(model, masks) first, "
            "with bp.masks_from_zeros(model, where=bp.linears((16, 16))) if its pruned blocks are zero already"
        )
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    by_owner: dict[int, list[ParameterRef]] = {}
    for shared in refs.values():
        for ref in shared:
            by_owner.setdefault(id(ref.owner), []).append(ref)
    for name, mask in masks.items():
        if len(mask.grid.shape) < 2:
            continue
        ref, owner = refs[name][0], id(refs[name][0].owner)
        yield Candidate(name, ref, mask, _unsupported_reason(refs[name], by_owner[owner], parents.get(owner)))


def _unsupported_reason(shared: list[ParameterRef], of_owner: list[ParameterRef], parent: nn.Module | None) -> str:
    """Why a weight cannot be replaced by its kept blocks.

    Args:
        shared: all modules and attributes that hold the weight.
        of_owner: all parameters of the first of these modules.
        parent: the module that contains it.
    """
    owner, stored = shared[0].owner, shared[0].stored
    layer_type = parametrize.type_before_parametrizations(owner)
    attribute = "" if shared[0].attr == "weight" else f".{shared[0].attr}"
    base = next((base.__name__ for base in LAYER_TYPES if issubclass(layer_type, base) and layer_type is not base), None)
    conditions = [
        (
            is_sharded(stored),
            "sharded by parallelize_module or fully_shard; load bp.distributed.full_state_dict(model) into a plain model, and give that "
            "the masks: bp.apply_masks(plain, bp.read_masks(model))",
        ),
        (len({id(ref.owner) for ref in shared}) > 1, f"tied: {', '.join(ref.name for ref in shared[1:])} has the same weight"),
        (not shared[0].is_plain, "another parametrization computes the weight; remove_parametrizations first"),
        (
            base is not None,
            f"{layer_type.__name__}, a subclass of {base} that may do more than a product, has no block-sparse form; "
            f"replace it by a plain {base} first if it does not",
        ),
        (
            layer_type not in LAYER_TYPES or attribute != "",
            f"{layer_type.__name__}{attribute} has no block-sparse form; torch's Linear and Conv2d have",
        ),
        ("forward" in vars(owner), "its forward was replaced, so it may do more than a product"),
        (
            type(parent).__module__ in FAST_PATH_MODULES,
            f"{type(parent).__name__} reads the weight itself instead of calling the layer",
        ),
        (has_hooks(owner), "the layer has hooks, which a new layer would not have; remove them first"),
        (
            any(ref.attr == "bias" and not ref.is_plain for ref in of_owner),
            "another parametrization computes the bias; remove_parametrizations first",
        ),
        (getattr(owner, "groups", 1) > 1, "a convolution in groups has no block-sparse form"),
        (
            stored.dtype not in DTYPES or stored.is_meta,
            f"a weight of {stored.dtype} on {stored.device.type} has no block-sparse form",
        ),
    ]
    return next((reason for holds, reason in conditions if holds), "")
