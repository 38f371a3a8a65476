"""What a model in several processes needs: `fully_shard` learns where masks move its parameters, and no rank waits for another in vain."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockprune.core._compat_fsdp import end_fsdp_forwards, follow_fsdp_parameters, is_fsdp_managed
from blockprune.core.arguments import check_model
from blockprune.core.sharded_tensor import is_sharded, sharded_like
from blockprune.core.types import Masks, check_masks
from blockprune.model.parameters import is_replicated

__all__ = [
    "agree",
    "check_copyable",
    "check_not_fully_sharded",
    "check_process_group",
    "check_replaceable",
    "follow_parameters",
    "gather_from_ranks",
    "group_of",
    "has_moved_unnoticed",
    "in_step",
    "is_fully_sharded",
    "on_first_rank",
    "raised_together",
    "rank_of",
    "replaced_shards",
    "reshard",
    "unsharded_around",
    "without_broadcasts",
    "without_fsdp_class",
]

T = TypeVar("T")


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and no module is sharded before
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let the model hold its sharded parameters: after a forward without a backward, or one that stopped early, some are whole copies."""
    check_model(model)
    sharded: list[Any] = [module for module in model.modules() if is_fully_sharded(module)]
    end_fsdp_forwards(sharded)
    for module in sharded:
        module.reshard()


@contextlib.contextmanager
def unsharded_around(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """A block in which these modules run alone, so what ``fully_shard`` holds around them is whole; afterwards all hold shards."""
    inside = {inner for module in modules for inner in module.modules()}
    around: list[Any] = [module for module in model.modules() if is_fully_sharded(module) and module not in inside]
    try:
        for module in around:
            module.unshard()
        yield
    finally:
        reshard(model)


@contextlib.contextmanager
def replaced_shards(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A block in which parameters that ``fully_shard`` manages in a module have other values; gives the others, for `functional_call`.

    Before a forward ``fully_shard`` puts its own parameters into its modules, whatever `functional_call` has put there. So the values are
    written into the shards, and afterwards those from before.

    Example:
        >>> from blockprune.model.sharding import replaced_shards
        >>> with replaced_shards(nn.Linear(1, 1), {"weight": torch.ones(1, 1)}) as others:
        ...     others
        {'weight': tensor([[1.]])}
    """
    sharded = _shards(module)
    if sharded is None:
        yield dict(parameters)
        return
    before = {sharded[name]: sharded[name].detach().clone() for name in parameters if name in sharded}
    with torch.no_grad():
        try:
            for name, value in parameters.items():
                if name in sharded:
                    sharded[name].copy_(sharded_like(value.detach(), sharded[name]))
            yield {name: value for name, value in parameters.items() if name not in sharded}
        finally:
            reshard(module)
            for shard, value in before.items():
                shard.copy_(value)


def _shards(module: nn.Module) -> dict[str, Tensor] | None:
    """The parameters that ``fully_shard`` puts into a module before its forward, by all their names; None if it was not called on any."""
    managed = {inner for part in module.modules() if is_fully_sharded(part) for inner in part.modules()}
    if not managed:
        return None
    reshard(module)
    own = {id(p) for inner in managed for p in inner.parameters(recurse=False)}
    return {name: p for name, p in module.named_parameters(remove_duplicate=False) if is_sharded(p) and id(p) in own}


def check_replaceable(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if `functional_call` would not replace one of these tensors, as ``fully_shard`` puts its own back."""
    if replaced := [name for name in _shards(model) or () if name in tensors]:
        raise ValueError(
            f"{replaced[0]} {tuple(tensors[replaced[0]].shape)}: fully_shard puts its own parameter into the module before a forward, so "
            "functional_call would run the model without the mask; use apply_masks, or call masked_parameters before fully_shard"
        )


def check_copyable(model: nn.Module) -> None:
    """Raise a ValueError if a model is in ``DistributedDataParallel``, or if ``fully_shard`` was called on a part of it."""
    if any(map(is_fully_sharded, model.modules())) or is_replicated(model):
        raise ValueError(
            f"a {type(model).__name__} in DistributedDataParallel or fully_shard cannot be copied; call bp.finalize(wrapped.module) of "
            "DistributedDataParallel, or bp.distributed.full_state_dict(model), which gathers what the finalized model would have"
        )


def check_not_fully_sharded(model: nn.Module, reason: str, *, nor_dtensors: bool = False) -> None:
    """Raise a ValueError with a reason if ``fully_shard`` has sharded a part of a model; on all ranks, as all have the same model.

    Args:
        model: any.
        reason: what cannot be done with such a model.
        nor_dtensors: also raise if ``parallelize_module`` has.
    """
    by_fsdp = any(map(is_fully_sharded, model.modules()))
    if by_fsdp or (nor_dtensors and any(map(is_sharded, model.parameters()))):
        function = "fully_shard" if by_fsdp else "parallelize_module"
        raise ValueError(
            f"{reason}, but {function} has sharded this {type(model).__name__}; call it before {function}, or on a plain model that "
            "loads bp.distributed.full_state_dict(model)"
        )


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


def on_first_rank(compute: Callable[[], T], reduce: Callable[..., Any] | None) -> T:
    """What a function returns on the first of the ranks that ``reduce`` adds over, on all of them, which must call this.

    An error of the function is raised on all ranks, so that none waits for another.

    Example:
        >>> from blockprune.model.sharding import on_first_rank
        >>> on_first_rank(lambda: 5, None)
        5
    """
    result: Any = None
    error: Exception | None = None
    if rank_of(reduce) == 0:
        try:
            result = compute()
        except Exception as raised:
            error = raised
    result, of_first = gather_from_ranks((result, error), reduce)[0]
    if of_first is not None:
        raise error or of_first  # its own has the traceback
    return cast(T, result)


@contextlib.contextmanager
def raised_together(model: nn.Module, reduce: Callable[..., Any] | None) -> Iterator[None]:
    """A block whose error on one rank is raised on all that ``reduce`` adds over, which would wait for that rank; all must enter it.

    The block must not wait for other ranks itself. A sharded model does, so there the error is raised on its own rank alone.

    Example:
        >>> from blockprune.model.sharding import raised_together
        >>> with raised_together(nn.Linear(1, 1), None):
        ...     pass
    """
    check_model(model)
    if any(map(is_fully_sharded, model.modules())) or any(map(is_sharded, model.parameters())):
        yield
        return
    with _raised_by_all(reduce):
        yield


@contextlib.contextmanager
def _raised_by_all(reduce: Callable[..., Any] | None) -> Iterator[None]:
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    of_ranks = gather_from_ranks(None if error is None else f"{type(error).__name__}: {error}", reduce)
    if error is not None:
        raise error
    if failed := [f"rank {rank} raised {message}" for rank, message in enumerate(of_ranks) if message]:
        raise RuntimeError(failed[0])


def agree(masks: Masks, *, group: dist.ProcessGroup | None = None) -> Masks:
    """The same masks, if all ranks have them; all ranks must call it.

    Ranks with different masks train different models, which `torch.distributed` does not notice.

    Args:
        masks: by parameter name.
        group: the ranks; by default all.

    Raises:
        RuntimeError: there is no process group; an error of another rank.
        TypeError: something else than masks.
        ValueError: on all ranks, if two ranks have masks of different parameters, with different blocks, or that keep different blocks.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> masks = {"weight": bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))}
        >>> bp.distributed.agree(masks) == masks
        True
        >>> dist.destroy_process_group()
    """
    check_process_group("agree")
    with _raised_by_all(partial(dist.all_reduce, group=group)):
        check_masks(masks)
        grids = {name: masks[name].grid for name in sorted(masks)}
    grids_of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(grids_of_ranks, grids, group=group)
    for name in sorted(set().union(*grids_of_ranks)):
        of_ranks = [grids_of_rank.get(name) for grids_of_rank in grids_of_ranks]
        if len(set(of_ranks)) > 1:
            listed = ", ".join(f"{grid or 'no mask'} on rank {rank}" for rank, grid in enumerate(of_ranks))
            raise ValueError(
                f"{name}: the ranks have different masks: {listed}; prune with the same model, `where` and sparsity on each rank"
            )
    if grids:
        counts = torch.cat([masks[name].keep.flatten() for name in grids]).to(torch.int32)  # how many ranks keep each block
        dist.all_reduce(counts, group=group)
        for name, count in zip(grids, counts.split([grid.blocks for grid in grids.values()]), strict=True):
            if differing := int(((count > 0) & (count < len(grids_of_ranks))).sum()):
                raise ValueError(
                    f"{name} {grids[name].shape}: the ranks keep different blocks, {differing} of {grids[name].blocks} differ; collect "
                    "with reduce=bp.distributed.all_reduce, and give each rank the same model and the same seed"
                )
    return masks
