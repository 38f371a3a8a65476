"""Two processes: every rank ends with the statistics of all batches, and so with the same masks."""

import contextlib
import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from two_processes import in_two_processes

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


def statistics_and_masks(rank: int, case: str) -> dict[str, Any]:
    own = [batches()[i] for i in BATCHES_OF_RANK[case][rank]]
    data = bp.collect.with_statistics(model(), batches=own, reduce=bp.distributed.all_reduce, **options())
    masks = bp.allocate.per_model(bp.metric.fisher(data), 0.5)
    return {name: (param.stats, masks[name].keep) for name, param in data.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", BATCHES_OF_RANK)
def test_every_rank_ends_with_the_statistics_of_all_batches(case: str, of_ranks: list[dict[str, Any]]) -> None:
    whole = bp.collect.with_statistics(model(), batches=batches(), **options())
    first, second = (results[case] for results in of_ranks)
    for name, param in whole.items():
        (statistics, keep), (other_statistics, other_keep) = first[name], second[name]
        for key, value in param.stats.items():
            torch.testing.assert_close(statistics[key], value)
            assert torch.equal(statistics[key], other_statistics[key])
        assert torch.equal(keep, other_keep)


# What both ranks do, and what they raise or return


GRID = bp.BlockGrid((4, 4), (2, 2))


def masks(*pruned: int, grid: bp.BlockGrid = GRID, **others: bp.BlockMask) -> bp.Masks:
    keep = torch.ones(grid.size, dtype=torch.bool)
    keep.view(-1)[list(pruned)] = False
    return {"a.weight": bp.BlockMask(keep, grid), "b.weight": bp.BlockMask(torch.ones_like(keep), grid), **others}


def the_same(rank: int) -> Any:
    given = masks(1)
    return bp.distributed.agree(given) is given and bp.distributed.agree({}) == {}


def other_blocks_kept(rank: int) -> Any:
    return bp.distributed.agree(masks(1, 2) if rank else masks(2, 3))


def other_grids(rank: int) -> Any:
    return bp.distributed.agree(masks(grid=bp.BlockGrid((4, 4), (4, 1)) if rank else GRID))


def other_parameters(rank: int) -> Any:
    return bp.distributed.agree(masks(**{"c.weight": masks()["a.weight"]} if rank else {}))


def no_masks_on_a_rank(rank: int) -> Any:
    return bp.distributed.agree({"a.weight": torch.ones(2, 2)} if rank else masks())  # type: ignore[dict-item]


def something_else_than_masks(rank: int) -> Any:
    return bp.distributed.agree(masks() if rank else None)  # type: ignore[arg-type]


def sharded() -> Any:
    built: Any = model()
    for layer in (built[0], built[2]):
        fully_shard(layer)
    return fully_shard(built)


def sharded_and_a_rank_without_batches(rank: int) -> Any:
    own = batches()[:2] if rank else []
    return bp.collect.with_statistics(sharded(), batches=own, **{**options(), "statistics": [bp.statistics.input_sq]})


def sharded_and_fewer_batches(rank: int) -> Any:
    return bp.collect.with_statistics(sharded(), batches=batches()[: 2 + rank], **{**options(), "statistics": [bp.statistics.input_sq]})


def sharded_and_fewer_batches_for_layers(rank: int) -> Any:
    calibration = bp.Calibration(batches()[: 2 + rank], reduce=bp.distributed.all_reduce, progress=False)
    return bp.recipes.sparsegpt(bp.linears((2, 2)), calibration)(sharded(), 0.5)


def replicated_and_a_rank_without_batches(rank: int) -> Any:
    replica = DistributedDataParallel(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))  # its buffers are broadcast before a forward
    own = [] if rank else batches()[:2]
    data = bp.collect.with_statistics(replica, batches=own, reduce=bp.distributed.all_reduce, **options())
    return replica.broadcast_buffers, data["module.0.weight"].stats["input_sq"]


def at_most_one_weight_is_whole(rank: int) -> Any:
    """The most whole weights that are in memory while a sharded model is scored."""
    gathered: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    gather = DTensor.full_tensor

    def counted(self: Any, **options: Any) -> Tensor:
        tensor = gather(self, **options)
        gathered.append(weakref.ref(tensor))
        alive.append(sum(ref() is not None for ref in gathered))
        return tensor

    DTensor.full_tensor = counted  # type: ignore[method-assign]
    try:
        for collect, metric in [
            (partial(bp.collect.weights, where=bp.linears((2, 2))), bp.metric.l2),
            (partial(bp.collect.with_statistics, where=bp.linears((2, 2)), batches=batches(), progress=False), bp.metric.wanda),
        ]:
            bp.Pipeline(collect, metric, bp.allocate.per_model)(sharded(), 0.5)
    finally:
        DTensor.full_tensor = gather  # type: ignore[method-assign]
    return len(alive) >= 4, max(alive)


def masked(built: Any) -> Any:
    keep = torch.tensor([[True, False, True]] * 4)
    return bp.apply_masks(built, {"0.weight": bp.BlockMask(keep, bp.BlockGrid((8, 6), (2, 2)))})


def compiled(built: Any) -> Any:
    """A compiled model with a compiled layer; nothing is compiled before it runs."""
    built[2] = torch.compile(built[2])
    return torch.compile(built)


def sharded_and_compiled(rank: int) -> Any:
    state = bp.distributed.full_state_dict(compiled(masked(sharded())))
    return dict(sorted(state.items())) if not rank else finalized_state() if not state else "rank 1 has a state"


def finalized_state() -> dict[str, Tensor]:
    return dict(sorted(bp.finalize(masked(model())).state_dict().items()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the compiler's imports
def test_the_state_of_a_compiled_model_has_the_names_of_the_plain_one() -> None:
    state = bp.distributed.full_state_dict(compiled(masked(model())))
    model().load_state_dict(state)
    assert state.keys() == finalized_state().keys()
    assert all(torch.equal(state[name], value) for name, value in finalized_state().items())


def collected(rank: int, **others: Any) -> Any:
    """Statistics that both ranks add up, where rank 1 has other options."""
    given = {"batches": batches(), "reduce": bp.distributed.all_reduce, **options(), **(others if rank else {})}
    return bp.collect.with_statistics(given.pop("model", None) or model(), **given)


def sums_of_other_parameters(rank: int) -> Any:
    return collected(rank, where=bp.including(bp.linears((2, 2)), "0.*"))


def sums_of_other_statistics(rank: int) -> Any:
    return collected(rank, statistics=[bp.statistics.input_gram])


def sums_of_other_shapes(rank: int) -> Any:
    built, seen = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)), [bp.statistics.input_sq]
    given = {**options(), "batches": batches(), "statistics": seen, "reduce": bp.distributed.all_reduce}
    return bp.collect.with_statistics(built if rank else model(), **given)


def sums_of_other_types(rank: int) -> Any:
    return collected(rank, model=model().double())


def nan_on_a_rank(rank: int) -> Any:
    return collected(rank, batches=[batches()[0] * torch.nan])


def a_batch_of_another_width_on_a_rank(rank: int) -> Any:
    return collected(rank, batches=[batches()[0][:, :3]])


def a_loss_that_raises_on_a_rank(rank: int) -> Any:
    def loss(output: Tensor, batch: Tensor) -> Tensor:
        raise KeyError("labels")

    return collected(rank, statistics=[bp.statistics.input_sq, bp.statistics.output_grad_sq], loss=loss)


def other_sums_after_an_error(rank: int) -> Any:
    """The ranks are in step again after errors."""
    for function in (nan_on_a_rank, sums_of_other_types, a_loss_that_raises_on_a_rank):
        with contextlib.suppress(Exception):
            function(rank)
    return {name: param.stats for name, param in collected(rank).items()}


RETURNS: dict[Callable[[int], Any], Any] = {
    the_same: True,
    at_most_one_weight_is_whole: (True, 1),
    sharded_and_compiled: finalized_state(),
    replicated_and_a_rank_without_batches: (True, torch.stack(batches()[:2]).square().mean((0, 1))[None]),
}
OTHERS = "collect with the same model, `where` and statistics on each rank"
RAISES: dict[Callable[[int], Any], str] = {
    sums_of_other_parameters: rf"^2\.weight: the ranks have different sums of '\w+': .* on rank 0, none on rank 1; {OTHERS}",
    sums_of_other_statistics: rf"^0\.weight: the ranks have different sums of '\w+': .*; {OTHERS}",
    sums_of_other_shapes: rf"^2\.weight: the ranks have different sums of 'input_sq': .*\(1, 8\) .* on rank 0, .*\(1, 10\) .*; {OTHERS}",
    sums_of_other_types: (
        rf"^0\.weight: the ranks have different sums of '\w+': n \(\) torch.float32 .*0, n \(\) torch.float64 .*; {OTHERS}"
    ),
    nan_on_a_rank: r"^(rank 1 raised ValueError: )?0\.weight \(8, 6\): NaN or inf reached '\w+' in batch 0",
    a_batch_of_another_width_on_a_rank: r"^(rank 1 raised RuntimeError: )?mat1 and mat2 shapes cannot be multiplied",
    a_loss_that_raises_on_a_rank: r"^(rank 1 raised KeyError: )?'labels'$",
    other_blocks_kept: r"a\.weight \(4, 4\): the ranks keep different blocks, 2 of 4 differ; collect with reduce=",
    other_grids: r"a\.weight: the ranks have different masks: .*\(2, 2\)\) on rank 0, .*\(4, 1\)\) on rank 1; prune with the same",
    other_parameters: r"c\.weight: the ranks have different masks: no mask on rank 0, .* on rank 1",
    no_masks_on_a_rank: r"^(rank 1 raised TypeError: )?masks\['a\.weight'\] is a Tensor, not a BlockMask",
    something_else_than_masks: r"^(rank 0 raised TypeError: )?masks is a NoneType, not a mapping from parameter names to BlockMask",
    sharded_and_a_rank_without_batches: r"batch 0: 1 of 2 ranks have one, .* give every rank as many batches",
    sharded_and_fewer_batches: r"batch 2: 1 of 2 ranks have one, .* give every rank as many batches",
    sharded_and_fewer_batches_for_layers: r"batch 2: 1 of 2 ranks have one, .* give every rank as many batches",
}


def run_all(rank: int, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {case: statistics_and_masks(rank, case) for case in BATCHES_OF_RANK}
    for function in (*RETURNS, *RAISES):
        try:
            results[function.__name__] = function(rank)
        except Exception as error:
            results[function.__name__] = str(error)
    return results


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_two_processes(run_all, tmp_path_factory.mktemp("all"))


@pytest.mark.slow
@pytest.mark.parametrize("function", RETURNS, ids=lambda function: function.__name__)
def test_both_ranks_return(function: Callable[[int], Any], of_ranks: list[dict[str, Any]]) -> None:
    for results in of_ranks:
        torch.testing.assert_close(results[function.__name__], RETURNS[function])


@pytest.mark.slow
@pytest.mark.parametrize("function", RAISES, ids=lambda function: function.__name__)
def test_both_ranks_raise(function: Callable[[int], Any], of_ranks: list[dict[str, Any]]) -> None:
    for results in of_ranks:
        assert re.search(RAISES[function], results[function.__name__])


def test_without_a_process_group_it_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"distributed\.agree needs a process group"):
        bp.distributed.agree(masks())
    with pytest.raises(RuntimeError, match="init_process_group"):
        bp.collect.with_statistics(model(), batches=batches(), reduce=bp.distributed.all_reduce, **options())
