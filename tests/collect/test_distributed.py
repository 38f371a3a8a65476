"""Two processes: every rank ends with the sums of all batches, and so with the same masks."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import blockprune as bp

WORLD = 2


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def batches() -> list[torch.Tensor]:
    return list(torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(1)))


def options() -> dict:
    stats = [bp.statistics.input_sq, bp.statistics.input_gram, bp.statistics.gate_fisher, bp.statistics.weight_grad]
    return {"where": bp.linears((2, 2)), "statistics": stats, "loss": lambda output, batch: output.square().mean(), "progress": False}


def rank(index: int, store: str, out: str, shares: list[list[int]]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=WORLD)
    mine = [batches()[i] for i in shares[index]]
    data = bp.collect.with_statistics(model(), batches=mine, reduce=bp.distributed.all_reduce, **options())
    masks = bp.allocate.per_model(bp.metric.fisher(data), 0.5)
    torch.save({name: (param.stats, masks[name].keep) for name, param in data.items()}, f"{out}/{index}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("shares", [[[0, 1, 2], [3, 4]], [[0, 1, 2, 3, 4], []]], ids=["unequal", "one rank with none"])
def test_every_rank_ends_with_the_fold_of_all_batches(shares: list[list[int]]) -> None:
    whole = bp.collect.with_statistics(model(), batches=batches(), **options())
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (str(Path(folder) / "store"), folder, shares), nprocs=WORLD)
        ranks = [torch.load(f"{folder}/{i}.pt", weights_only=True) for i in range(WORLD)]
    for name, param in whole.items():
        for stat, value in param.stats.items():
            torch.testing.assert_close(ranks[0][name][0][stat], value)
            assert torch.equal(ranks[0][name][0][stat], ranks[1][name][0][stat])
        assert torch.equal(ranks[0][name][1], ranks[1][name][1])


def test_without_a_process_group_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        bp.collect.with_statistics(model(), batches=batches(), reduce=bp.distributed.all_reduce, **options())
