"""Several processes: every rank gets the same sums, and so the same masks; and gets one model out of what each rank holds."""

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockprune.collect.accumulate import Counts, Fold
from blockprune.core._compat import without_compiled_prefixes
from blockprune.core.sharded_tensor import whole
from blockprune.model.parameters import PARAMETRIZED_NAME, check_loaded, parameter_refs
from blockprune.model.sharding import agree, check_process_group, reshard
from blockprune.statistics import Sums

__all__ = ["agree", "all_reduce", "full_state_dict", "share"]


def all_reduce(fold: Fold, *, group: dist.ProcessGroup | None = None) -> Fold:
    """Add the folds of all ranks of a process group (gloo or nccl), which may have run on different batches, or on none.

    Pass it as ``reduce`` to `Calibration`, `sequential` or `collect.with_statistics`. A sharded model runs on all ranks together, so all
    need as many batches.

    Args:
        fold: the sums of this rank.
        group: the ranks that run on batches of their own, such as ``mesh["data"].get_group()`` if others share them (tensor parallelism);
            by default all ranks.

    Raises:
        RuntimeError: there is no process group.
        ValueError: on all ranks, if two ranks have sums of different parameters, statistics, shapes or types.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> data = bp.collect.with_statistics(nn.Linear(4, 2), where=bp.linears((2, 2)), statistics=[bp.statistics.input_sq],
        ...                                   batches=[torch.ones(8, 4)], reduce=bp.distributed.all_reduce)
        >>> dist.destroy_process_group()
    """
    check_process_group("all_reduce")
    _check_same_sums(fold, group)
    names = sorted(fold.counts)  # all ranks must reduce in the same order
    device = fold.data[names[0]].stored.device
    reduced: dict[tuple[int, ...], Sums] = {}
    sums: dict[tuple[str, str], Sums] = {}
    for key, number in zip(sorted(fold.sums), _sharing(fold, group, device), strict=True):
        if number not in reduced:
            reduced[number] = {name: total.detach().clone() for name, total in fold.sums[key].items()}
            for total in reduced[number].values():
                dist.all_reduce(total, group=group)
        sums[key] = reduced[number]
    counts = torch.tensor([fold.counts[name] for name in names], dtype=torch.int64, device=device)
    dist.all_reduce(counts, group=group)
    return attrs.evolve(
        fold,
        sums={key: sums[key] for key in fold.sums},
        counts={name: Counts(*row) for name, row in zip(names, counts.tolist(), strict=True)},
    )


def _check_same_sums(fold: Fold, group: dist.ProcessGroup | None) -> None:
    """Raise on all ranks if two have different sums: torch would wait for ever, or end the process."""
    own = {key: {name: (tuple(total.shape), total.dtype) for name, total in sorted(sums.items())} for key, sums in fold.sums.items()}
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, own, group=group)
    for parameter, statistic in sorted(set().union(*of_ranks)):
        differing = [sums.get((parameter, statistic)) for sums in of_ranks]
        if any(sums != differing[0] for sums in differing):
            listed = ", ".join(f"{_listed(sums)} on rank {rank}" for rank, sums in enumerate(differing))
            raise ValueError(
                f"{parameter}: the ranks have different sums of {statistic!r}: {listed}; collect with the same model, `where` and "
                "statistics on each rank"
            )


def _listed(sums: dict[str, tuple[tuple[int, ...], torch.dtype]] | None) -> str:
    return "none" if sums is None else " and ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in sums.items())


def _sharing(fold: Fold, group: dist.ProcessGroup | None, device: torch.device) -> list[tuple[int, ...]]:
    """For each of the sorted keys a number for each rank; keys with the same numbers share their sums on all ranks."""
    first: dict[int, int] = {}
    own = torch.tensor([first.setdefault(id(fold.sums[key]), i) for i, key in enumerate(sorted(fold.sums))], device=device)
    of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, own, group=group)
    return [tuple(numbers) for numbers in torch.stack(of_ranks, 1).tolist()]


def share(count: int, solve: Callable[[slice], Sequence[Tensor]], *, group: dist.ProcessGroup | None = None) -> tuple[Tensor, ...]:
    """Divide independent systems among the ranks, and return all solutions on every rank.

    Pass it as ``share`` to `metric.obs` and `reconstruct.least_squares`, whose data must be the same on all ranks.

    Args:
        count: the number of systems.
        solve: (slice) -> tensors with one entry along the first axis for each system in the slice; the slice may be empty.
        group: the ranks; by default all.

    Raises:
        RuntimeError: there is no process group.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> bp.distributed.share(4, lambda own: [torch.arange(4)[own] ** 2])
        (tensor([0, 1, 4, 9]),)
        >>> dist.destroy_process_group()
    """
    check_process_group("share")
    own = slice(dist.get_rank(group), None, dist.get_world_size(group))
    solutions = []
    for part in solve(own):
        solution = part.new_zeros(count, *part.shape[1:])
        solution[own] = part
        dist.all_reduce(solution, group=group)  # all others have zeros there
        solutions.append(solution)
    return tuple(solutions)


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of ``finalize(model)`` on rank 0, in CPU memory, and an empty one on other ranks; all ranks must call it.

    Of a model that ``fully_shard`` or ``parallelize_module`` has sharded, one tensor at a time is gathered. A plain model of the same class
    loads it, on one process: the names are its own, also where ``torch.compile`` has wrapped the model.

    Args:
        model: masked or not, sharded or not; it is not changed.

    Raises:
        ValueError: accelerate has offloaded a parameter.

    Example:
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> bp.distributed.full_state_dict(bp.apply_masks(nn.Linear(4, 2), {"weight": mask}))["weight"][:, 2:].count_nonzero()
        tensor(0)
    """
    reshard(model)
    refs = parameter_refs(model)
    check_loaded(model, [users[0] for users in refs.values()], "full_state_dict")
    masked = {ref.name: ref for users in refs.values() for ref in users if ref.mask}
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
