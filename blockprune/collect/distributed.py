"""Several processes: every rank gets the same sums, and so the same masks; and gets one model out of what each rank holds."""

from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockprune.collect.accumulate import Counts, Fold
from blockprune.core._compat import without_compiled_prefixes
from blockprune.core.sharded_tensor import whole
from blockprune.core.types import Masks
from blockprune.model.parameters import PARAMETRIZED_NAME, parameter_refs
from blockprune.model.sharding import reshard

__all__ = ["agree", "all_reduce", "full_state_dict"]


def all_reduce(fold: Fold, *, group: dist.ProcessGroup | None = None) -> Fold:
    """Add the folds of all ranks of a process group (gloo or nccl), which may have run on different batches, or on none.

    Pass it as ``reduce`` to `collect.with_statistics`. A sharded model runs on all ranks together, so all need as many batches.

    Args:
        fold: the sums of this rank.
        group: the ranks that run on batches of their own, such as ``mesh["data"].get_group()`` if others share them (tensor parallelism);
            by default all ranks.

    Raises:
        RuntimeError: there is no process group.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> data = bp.collect.with_statistics(nn.Linear(4, 2), where=bp.linears((2, 2)), statistics=[bp.statistics.input_sq],
        ...                                   batches=[torch.ones(8, 4)], reduce=bp.distributed.all_reduce)
        >>> dist.destroy_process_group()
    """
    _check_process_group("all_reduce")
    reduced = {}
    for key in sorted(fold.sums):  # all ranks must reduce in the same order
        reduced[key] = {name: total.detach().clone() for name, total in fold.sums[key].items()}
        for total in reduced[key].values():
            dist.all_reduce(total, group=group)
    names = sorted(fold.counts)
    counts = torch.tensor([fold.counts[name] for name in names], dtype=torch.int64, device=fold.data[names[0]].stored.device)
    dist.all_reduce(counts, group=group)
    return attrs.evolve(
        fold,
        sums={key: reduced[key] for key in fold.sums},
        counts={name: Counts(*row) for name, row in zip(names, counts.tolist(), strict=True)},
    )


def agree(masks: Masks) -> Masks:
    """The same masks, if all ranks of the default process group have them; all ranks must call it.

    Ranks with other masks train another model, which `torch.distributed` does not notice.

    Args:
        masks: by parameter name.

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
    _check_process_group("agree")
    grids = {name: masks[name].grid for name in sorted(masks)}
    grids_of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(grids_of_ranks, grids)
    for name in sorted(set().union(*grids_of_ranks)):
        of_ranks = [grids_of_rank.get(name) for grids_of_rank in grids_of_ranks]
        if len(set(of_ranks)) > 1:
            listed = ", ".join(f"{grid or 'no mask'} on rank {rank}" for rank, grid in enumerate(of_ranks))
            raise ValueError(f"{name}: the ranks have other masks: {listed}; prune with the same model, `where` and sparsity on each rank")
    if grids:
        counts = torch.cat([masks[name].keep.flatten() for name in grids]).to(torch.int32)  # how many ranks keep each block
        dist.all_reduce(counts)
        for name, count in zip(grids, counts.split([grid.blocks for grid in grids.values()]), strict=True):
            if differing := int(((count > 0) & (count < len(grids_of_ranks))).sum()):
                raise ValueError(
                    f"{name} {grids[name].shape}: the ranks keep other blocks, {differing} of {grids[name].blocks} differ; collect with "
                    "reduce=bp.distributed.all_reduce, and give each rank the same model and the same seed"
                )
    return masks


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of ``finalize(model)`` on rank 0, in CPU memory, and an empty one on other ranks; all ranks must call it.

    Of a model that ``fully_shard`` or ``parallelize_module`` has sharded, one tensor at a time is gathered. A plain model of the same class
    loads it, on one process: the names are its own, also where ``torch.compile`` has wrapped the model.

    Args:
        model: masked or not, sharded or not; it is not changed.

    Example:
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> bp.distributed.full_state_dict(bp.apply_masks(nn.Linear(4, 2), {"weight": mask}))["weight"][:, 2:].count_nonzero()
        tensor(0)
    """
    reshard(model)
    masked = {ref.name: ref for refs in parameter_refs(model).values() for ref in refs if ref.mask}
    state: dict[str, Any] = {}
    for key, value in model.state_dict().items():
        match = PARAMETRIZED_NAME.fullmatch(key)
        own = match.expand(r"\1\2") if match and match.expand(r"\1\2") in masked else key
        name = without_compiled_prefixes(own)
        if name in state or (own not in masked and not isinstance(value, Tensor)):
            state.setdefault(name, value)
            continue
        with torch.no_grad():
            tensor = whole(masked[own].masked if own in masked else value).detach()
        state[name] = tensor.to("cpu", copy=True) if _is_first_rank() else None
    return state if _is_first_rank() else {}


def _is_first_rank() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _check_process_group(function: str) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"distributed.{function} needs a process group: call torch.distributed.init_process_group first")
