"""Collecting in several processes: every rank gets the same sums, and so the same masks."""

import attrs
import torch
import torch.distributed as dist

from blockprune.collect.accumulate import Counts, Fold


def all_reduce(fold: Fold) -> Fold:
    """Add the folds of all ranks of the default process group (gloo or nccl), which may have run on different batches, or on none.

    Pass it as ``reduce`` to `collect.with_statistics`.

    Raises:
        RuntimeError: there is no process group.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> data = bp.collect.with_statistics(nn.Linear(4, 2), where=bp.linears((2, 2)), statistics=[bp.statistics.input_sq],
        ...                                   batches=[torch.ones(8, 4)], reduce=bp.distributed.all_reduce)
        >>> dist.destroy_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("distributed.all_reduce needs a process group: call torch.distributed.init_process_group first")
    reduced = {}
    for key in sorted(fold.sums):  # all ranks must reduce in the same order
        reduced[key] = {name: total.detach().clone() for name, total in fold.sums[key].items()}
        for total in reduced[key].values():
            dist.all_reduce(total)
    names = sorted(fold.counts)
    counts = torch.tensor([fold.counts[name] for name in names], dtype=torch.int64, device=fold.data[names[0]].weight.device)
    dist.all_reduce(counts)
    return attrs.evolve(
        fold,
        sums={key: reduced[key] for key in fold.sums},
        counts={name: Counts(*row) for name, row in zip(names, counts.tolist(), strict=True)},
    )
