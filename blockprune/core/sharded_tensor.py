"""DTensors, which ``fully_shard`` and ``parallelize_module`` make of parameters: the whole tensor from its shards, and the way back."""

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from blockprune.core.grid import BlockGrid

__all__ = ["is_sharded", "sharded_like", "sharded_mask", "whole"]


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor (their module is slow to import, and there are none before)."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(x, tensors.DTensor)


def whole(x: Tensor) -> Tensor:
    """The values of a DTensor as a plain tensor, differentiable; all ranks must call it. A plain tensor is returned as it is.

    Example:
        >>> from blockprune.core.sharded_tensor import whole
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    return cast(Any, x).full_tensor() if is_sharded(x) else x


def sharded_like(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole, as a DTensor with the placements of ``like``; nothing is sent. Plain if ``like`` is plain.

    Example:
        >>> from blockprune.core.sharded_tensor import sharded_like
        >>> sharded_like(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    return x if is_sharded(x) or not is_sharded(like) else _distribute(x, like, like.placements)  # type: ignore[attr-defined]


def sharded_mask(keep: Tensor, grid: BlockGrid, like: Tensor) -> Tensor:
    """The mask of each element, ``[*grid.shape]`` bool, as a DTensor with the placements of ``like``; a rank expands its own shard alone.

    Args:
        keep: ``[*grid.size]`` bool, the same on every rank.
        grid: the blocks.
        like: ``[*grid.shape]``, a DTensor of which no rank holds a partial sum.
    """
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415 (slow, and there is a DTensor already)

    placements: Any = like.placements  # type: ignore[attr-defined]
    for axis, (length, block) in enumerate(zip(grid.shape, grid.block, strict=True)):
        along = torch.arange(length, device=keep.device).view([-1 if a == axis else 1 for a in range(len(grid.shape))])
        own = [p if getattr(p, "dim", None) == axis else Replicate() for p in placements]
        positions = _distribute(along, like, own).to_local().flatten()  # type: ignore[attr-defined]
        keep = keep.index_select(axis, positions // block)
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(keep, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def _distribute(x: Tensor, like: Tensor, placements: Sequence[Any]) -> Tensor:
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 (likewise)

    with torch.no_grad():
        return distribute_tensor(x, like.device_mesh, placements, src_data_rank=None)  # type: ignore[attr-defined]
