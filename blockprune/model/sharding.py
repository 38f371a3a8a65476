"""What a model in several processes needs: `fully_shard` learns where masks move its parameters, and no rank waits for another in vain."""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from blockprune.core._compat import follow_fsdp_parameters, is_fsdp_managed
from blockprune.core.sharded_tensor import is_sharded

__all__ = [
    "follow_parameters",
    "has_moved_unnoticed",
    "in_step",
    "is_fully_sharded",
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
            torch.distributed.all_reduce(count, group=group)
        if 0 < count < shard.device_mesh.size():
            raise ValueError(
                f"batch {number}: {int(count)} of {shard.device_mesh.size()} ranks have one, but a sharded model runs on all ranks "
                "together; give every rank as many batches (and ranks of tensor parallelism the same ones)"
            )
        if batch is missing:
            return
        yield batch
