"""What a model in several processes needs: `fully_shard` learns where masks move its parameters, and no rank waits for another in vain."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from blockprune.core._compat import follow_fsdp_parameters, is_fsdp_managed
from blockprune.core.sharded_tensor import is_sharded
from blockprune.core.types import Masks

__all__ = [
    "agree",
    "check_process_group",
    "follow_parameters",
    "gather_from_ranks",
    "group_of",
    "has_moved_unnoticed",
    "in_step",
    "is_fully_sharded",
    "rank_of",
    "reshard",
    "without_broadcasts",
    "without_fsdp_class",
]

T = TypeVar("T")


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and no module is sharded before
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let the model hold its sharded parameters: after a forward without a backward, the outermost ones are whole copies."""
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def has_moved_unnoticed(model: nn.Module, owner: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module around the model alone, which `follow_parameters` does not reach."""
    return is_fsdp_managed(owner) and not any(is_fully_sharded(module) and owner in set(module.modules()) for module in model.modules())


def follow_parameters(model: nn.Module) -> None:
    """Tell ``fully_shard`` which modules have its parameters: a mask moves a parameter into another module."""
    follow_fsdp_parameters(model, [module for module in model.modules() if is_fully_sharded(module)])


@contextlib.contextmanager
def without_fsdp_class(owner: nn.Module) -> Iterator[None]:
    """A block in which a module has the class that torch made of it for parametrizations: ``fully_shard`` may have put one in front."""
    front, parametrized = type(owner), getattr(owner, "parametrizations", ())
    behind = next((kind for kind in front.__mro__ if any(attr in vars(kind) for attr in parametrized)), front)
    if behind is front:
        yield
        return
    owner.__class__ = behind
    try:
        yield
    finally:
        bases = tuple(type(owner) if base is behind else base for base in front.__bases__)
        attributes = {name: value for name, value in vars(front).items() if name not in ("__dict__", "__weakref__")}
        owner.__class__ = type(front.__name__.replace(behind.__name__, type(owner).__name__), bases, attributes)


@contextlib.contextmanager
def without_broadcasts(model: nn.Module) -> Iterator[None]:
    """A block in which DistributedDataParallel sends no buffers: it would wait for a rank without batches, which receives none."""
    replicas = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    flags = [replica.broadcast_buffers for replica in replicas]
    try:
        for replica in replicas:
            replica.broadcast_buffers = False
        yield
    finally:
        for replica, flag in zip(replicas, flags, strict=True):
            replica.broadcast_buffers = flag


def in_step(model: nn.Module, batches: Iterable[T]) -> Iterator[T]:
    """The batches. A sharded model runs on all ranks together, so a rank that has fewer raises on all, instead of letting them wait.

    Raises:
        ValueError: on all ranks, when one of them has no more batches and another has.
    """
    shard: Any = next(filter(is_sharded, model.parameters()), None)
    if shard is None:
        yield from batches
        return
    missing, remaining = object(), iter(batches)
    for number in itertools.count():
        batch: Any = next(remaining, missing)
        count = torch.tensor(int(batch is not missing), device=shard.device)
        for group in shard.device_mesh.get_all_groups():
            dist.all_reduce(count, group=group)
        if 0 < count < shard.device_mesh.size():
            raise ValueError(
                f"batch {number}: {int(count)} of {shard.device_mesh.size()} ranks have one, but a sharded model runs on all ranks "
                "together; give every rank as many batches (and ranks of tensor parallelism the same ones)"
            )
        if batch is missing:
            return
        yield batch


def check_process_group(function: str) -> None:
    """Raise a RuntimeError that names a function of `blockprune.distributed` if there is no process group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"distributed.{function} needs a process group: call torch.distributed.init_process_group first")


def group_of(reduce: Callable[..., Any] | None) -> dist.ProcessGroup | None:
    """The process group that ``reduce`` adds over: that which is bound to it, or the default one; None if there is only this process."""
    if reduce is None or not (dist.is_available() and dist.is_initialized()):
        return None
    bound: dist.ProcessGroup | None = reduce.keywords.get("group") if isinstance(reduce, partial) else None
    return bound or dist.group.WORLD


def rank_of(reduce: Callable[..., Any] | None) -> int:
    """The number of this process among those that ``reduce`` adds over, of which the first writes for all; 0 if it is the only one."""
    group = group_of(reduce)
    return 0 if group is None else dist.get_rank(group)


def gather_from_ranks(value: T, reduce: Callable[..., Any] | None) -> list[T]:
    """The values of all ranks that ``reduce`` adds over, in order; without it this one alone. All of them must call it.

    Example:
        >>> from blockprune.model.sharding import gather_from_ranks
        >>> gather_from_ranks(5, None)
        [5]
    """
    if (group := group_of(reduce)) is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def agree(masks: Masks, *, group: dist.ProcessGroup | None = None) -> Masks:
    """The same masks, if all ranks have them; all ranks must call it.

    Ranks with other masks train another model, which `torch.distributed` does not notice.

    Args:
        masks: by parameter name.
        group: the ranks; by default all.

    Raises:
        RuntimeError: there is no process group.
        ValueError: on all ranks, if two ranks have masks of other parameters, of other blocks, or that keep other blocks.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> masks = {"weight": bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))}
        >>> bp.distributed.agree(masks) == masks
        True
        >>> dist.destroy_process_group()
    """
    check_process_group("agree")
    grids = {name: masks[name].grid for name in sorted(masks)}
    grids_of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(grids_of_ranks, grids, group=group)
    for name in sorted(set().union(*grids_of_ranks)):
        of_ranks = [grids_of_rank.get(name) for grids_of_rank in grids_of_ranks]
        if len(set(of_ranks)) > 1:
            listed = ", ".join(f"{grid or 'no mask'} on rank {rank}" for rank, grid in enumerate(of_ranks))
            raise ValueError(f"{name}: the ranks have other masks: {listed}; prune with the same model, `where` and sparsity on each rank")
    if grids:
        counts = torch.cat([masks[name].keep.flatten() for name in grids]).to(torch.int32)  # how many ranks keep each block
        dist.all_reduce(counts, group=group)
        for name, count in zip(grids, counts.split([grid.blocks for grid in grids.values()]), strict=True):
            if differing := int(((count > 0) & (count < len(grids_of_ranks))).sum()):
                raise ValueError(
                    f"{name} {grids[name].shape}: the ranks keep other blocks, {differing} of {grids[name].blocks} differ; collect with "
                    "reduce=bp.distributed.all_reduce, and give each rank the same model and the same seed"
                )
    return masks
