"""Which layers of a masked model can run block-sparse, and why the others cannot."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockprune.apply import read_masks
from blockprune.names import Slot, slots
from blockprune.types import BlockMask

_KINDS = (nn.Linear, nn.Conv2d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_READ_WEIGHTS = ("torch.nn.modules.transformer", "torch.nn.modules.activation")  # their fast paths


@attrs.frozen(eq=False)
class Place:
    """A masked weight: where it is, and what stands in the way of running it block-sparse ("" = nothing).

    Example:
        >>> from blockprune.export.places import places
        >>> [(p.name, p.layer, p.obstacle) for p in places(bp.apply_masks(nn.Linear(4, 2), _mask()))]
        [('weight', '', '')]
    """

    name: str  # of the parameter
    slot: Slot
    mask: BlockMask
    obstacle: str

    @property
    def layer(self) -> str:
        """The name of the module that owns the weight."""
        return self.name.removesuffix(self.slot.attr).removesuffix(".")

    @property
    def module(self) -> nn.Module:
        """The module that owns the weight, masked."""
        return self.slot.owner

    @property
    def weight(self) -> Tensor:
        """The weight with zeros, as the model uses it."""
        return self.slot.masked.detach()

    @property
    def pruned(self) -> float:
        """The share of the weight that is zero."""
        weight = self.weight
        return 1 - float(weight.count_nonzero()) / weight.numel()


def places(model: nn.Module) -> Iterator[Place]:
    """Every masked weight of a model.

    Raises:
        ValueError: a model without masks.

    Example:
        >>> from blockprune.export.places import places
        >>> [p.obstacle for p in places(bp.apply_masks(nn.Embedding(2, 4), _mask()))]
        ["a Embedding has no block-sparse form; torch's Linear and Conv2d have"]
    """
    masks = read_masks(model)
    if not masks:
        raise ValueError("the model has no masks, so there is nothing to leave out; apply_masks(model, masks) first")
    readers = {id(child): parent for parent in model.modules() for child in parent.children()}
    known = slots(model)
    every = [slot for shared in known.values() for slot in shared]
    for name, mask in masks.items():
        owner = known[name][0].owner
        yield Place(name, known[name][0], mask, _obstacle(known[name], [s for s in every if s.owner is owner], readers))


def _obstacle(shared: list[Slot], of_owner: list[Slot], readers: dict[int, nn.Module]) -> str:
    slot = shared[0]
    owner, parent, stored = slot.owner, readers.get(id(slot.owner)), slot.stored
    kind, attribute = parametrize.type_before_parametrizations(owner), "" if slot.attr == "weight" else f" {slot.attr}"
    obstacles = {
        f"tied: {', '.join(other.name for other in shared[1:])} has the same weight": len({id(other.owner) for other in shared}) > 1,
        "another parametrization computes the weight; remove_parametrizations first": not slot.alone,
        f"a {kind.__name__}{attribute} has no block-sparse form; torch's Linear and Conv2d have": kind not in _KINDS or bool(attribute),
        "its forward was replaced, so it does more than a product": "forward" in vars(owner),
        f"{type(parent).__name__} reads the weight itself instead of calling the layer": type(parent).__module__ in _READ_WEIGHTS,
        "the layer has hooks, which listen to it as it is; remove them first": any(getattr(owner, hooks) for hooks in _HOOKS),
        "another parametrization computes the bias; remove_parametrizations first": any(s.attr == "bias" and not s.alone for s in of_owner),
        "a convolution in groups has no block-sparse form": getattr(owner, "groups", 1) > 1,
        f"a weight of {stored.dtype} on {stored.device.type} has no block-sparse form": stored.dtype not in _DTYPES or stored.is_meta,
    }
    return next((why for why, holds in obstacles.items() if holds), "")


def _mask() -> dict[str, BlockMask]:
    """For the examples above."""
    from blockprune.blocks import BlockGrid  # noqa: PLC0415

    return {"weight": BlockMask(torch.tensor([[True, False]]), BlockGrid((2, 4), (2, 2)))}
