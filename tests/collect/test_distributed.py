"""Two processes: every rank ends with the statistics of all batches, and so with the same masks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import blockprune as bp

RANKS = 2
BATCHES_OF_RANK = {"unequal": [[0, 1, 2], [3, 4]], "one rank without batches": [[0, 1, 2, 3, 4], []]}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def batches() -> list[torch.Tensor]:
    return list(torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(1)))


def options() -> dict[str, Any]:
    statistics = [bp.statistics.input_sq, bp.statistics.input_gram, bp.statistics.gate_fisher, bp.statistics.weight_grad]
    return {"where": bp.linears((2, 2)), "statistics": statistics, "loss": lambda output, batch: output.square().mean(), "progress": False}


def run_rank(index: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=RANKS)
    for case, numbers in BATCHES_OF_RANK.items():
        own = [batches()[i] for i in numbers[index]]
        data = bp.collect.with_statistics(model(), batches=own, reduce=bp.distributed.all_reduce, **options())
        masks = bp.allocate.per_model(bp.metric.fisher(data), 0.5)
        torch.save({name: (param.stats, masks[name].keep) for name, param in data.items()}, f"{folder}/{case}, {index}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what each rank saved in each case."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", BATCHES_OF_RANK)
def test_every_rank_ends_with_the_statistics_of_all_batches(case: str, results: Path) -> None:
    whole = bp.collect.with_statistics(model(), batches=batches(), **options())
    first, second = (torch.load(results / f"{case}, {index}.pt", weights_only=True) for index in range(RANKS))
    for name, param in whole.items():
        (statistics, keep), (other_statistics, other_keep) = first[name], second[name]
        for key, value in param.stats.items():
            torch.testing.assert_close(statistics[key], value)
            assert torch.equal(statistics[key], other_statistics[key])
        assert torch.equal(keep, other_keep)


def test_without_a_process_group_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        bp.collect.with_statistics(model(), batches=batches(), reduce=bp.distributed.all_reduce, **options())
