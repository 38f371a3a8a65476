"""What masks must tell ``fully_shard`` when they are added to or removed from parameters that it has sharded."""

import contextlib
import sys
from collections.abc import Iterator

from torch import nn

from blockprune.core._compat import follow_fsdp_parameters, is_fsdp_managed

__all__ = ["follow_parameters", "has_moved_unnoticed", "is_fully_sharded", "reshard", "without_fsdp_class"]


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
