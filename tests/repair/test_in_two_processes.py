"""Two processes that share the batches and the work end with the masks of one that has all batches, and with its weights up to rounding."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from two_processes import in_two_processes

import blockprune as bp

WHERE = bp.including(bp.linears((4, 4)), "layers.*")
BATCHES_OF_RANK = {"halves": [[0, 1], [2, 3]], "unequal": [[0], [1, 2, 3]], "none": [[0, 1, 2, 3], []], "none at first": [[], [0, 1, 2, 3]]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(self.up(y) * self.gate(y).sigmoid())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def calibration(numbers: Sequence[int] = range(4), **options: Any) -> bp.Calibration:
    batches = torch.randn(4, 5, 20, 16, generator=torch.Generator().manual_seed(1))
    counts = torch.ones(5, 20)
    counts[3:, 10:] = 0  # padding
    options = {"loss": lambda output, batch: output.square().mean(), "token_weights": lambda batch: counts, "progress": False, **options}
    return bp.Calibration([batches[i] for i in numbers], **options)


RECIPES: dict[str, Callable[[bp.Calibration], Any]] = {
    "obs": partial(bp.recipes.obs, WHERE),
    "obs in passes": partial(bp.recipes.obs, WHERE, passes=2),
    "sparsegpt": partial(bp.recipes.sparsegpt, WHERE),
    "wanda": partial(bp.recipes.wanda, WHERE),
}


def result(recipe: str, numbers: Sequence[int] = range(4), **options: Any) -> Any:
    found = RECIPES[recipe](calibration(numbers, **options))(model(), 0.5)
    return {name: mask.keep for name, mask in found.masks.items()}, dict(found.weights)


def clustered(rank: int) -> Any:
    run = calibration(BATCHES_OF_RANK["halves"][rank], reduce=bp.distributed.all_reduce)
    return bp.recipes.cluster_units(model(), WHERE, run, example=calibration().batches[0][:1]).state_dict()  # type: ignore[index]


def a_group_that_is_bound(rank: int) -> Any:
    reduce = partial(bp.distributed.all_reduce, group=dist.new_group([0, 1]))
    return result("obs", BATCHES_OF_RANK["halves"][rank], reduce=reduce)


def by_its_argument(rank: int) -> Any:
    """As an argument of sequential, and resumed after the first layer."""
    pipeline = bp.Pipeline(partial(bp.collect.with_statistics, where=WHERE), bp.metric.obs, bp.allocate.per_layer)
    own = calibration(BATCHES_OF_RANK["halves"][rank])
    results: list[bp.PruningResult] = []
    share: Any = {"reduce": bp.distributed.all_reduce, "callback": results.append, "token_weights": own.token_weights, "progress": False}
    whole = bp.sequential(model(), pipeline, bp.reconstruct.least_squares, own.batches, 0.5, **share)
    resumed = bp.sequential(model(), pipeline, bp.reconstruct.least_squares, own.batches, 0.5, resume=results[0], **share)
    return whole.masks == resumed.masks, all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())


def without_batches(rank: int) -> Any:
    return result("obs", [], reduce=bp.distributed.all_reduce)


def without_batches_for_layers(rank: int) -> Any:
    return result("sparsegpt", [], reduce=bp.distributed.all_reduce)


def a_collector_that_does_not_reduce(rank: int) -> Any:
    def collect(model: nn.Module, *, where: bp.Where = WHERE, statistics: Any = (), calibration: Any = None) -> bp.Data:
        return bp.collect.compute(bp.collect.fold(model, where=where, statistics=statistics, calibration=calibration))

    recipe = bp.recipes.sparsegpt(WHERE, calibration(BATCHES_OF_RANK["halves"][rank], reduce=bp.distributed.all_reduce))
    return attrs.evolve(recipe, pipeline=attrs.evolve(recipe.pipeline, collect=collect))(model(), 0.5)


def finetuning(rank: int) -> Any:
    recipe = bp.recipes.obs(WHERE, calibration(BATCHES_OF_RANK["halves"][rank], reduce=bp.distributed.all_reduce))
    return attrs.evolve(recipe, finetune=bp.finetune_layer)(model(), 0.5)


def clustered_without_an_example(rank: int) -> Any:
    return bp.recipes.cluster_units(model(), WHERE, calibration(reduce=bp.distributed.all_reduce))


def nan_on_a_rank(rank: int) -> Any:
    own = calibration(BATCHES_OF_RANK["halves"][rank], reduce=bp.distributed.all_reduce)
    return bp.recipes.sparsegpt(WHERE, attrs.evolve(own, batches=[x * torch.nan for x in own.batches]) if rank else own)(model(), 0.5)


def a_forward_that_raises_on_a_rank(rank: int) -> Any:
    def forward(model: Any, batch: Tensor) -> Any:
        raise KeyError("input_ids")

    own = calibration(BATCHES_OF_RANK["halves"][rank], reduce=bp.distributed.all_reduce, **({"forward": forward} if rank else {}))
    return bp.recipes.sparsegpt(WHERE, own)(model(), 0.5)


def a_layer_that_raises_on_a_rank(rank: int) -> Any:
    """When it runs for the third time, so after its inputs have been noted."""
    runs = []

    def fail(module: nn.Module, args: Any) -> None:
        runs.append(module)
        if rank and len(runs) > 3:
            raise MemoryError("out of memory")

    built = model()
    built.layers[1].register_forward_pre_hook(fail)
    own = calibration(BATCHES_OF_RANK["halves"][rank], reduce=bp.distributed.all_reduce)
    return bp.recipes.sparsegpt(WHERE, own)(built, 0.5)


def a_callback_that_raises_on_a_rank(rank: int) -> Any:
    def callback(result: bp.PruningResult) -> None:
        if rank:
            raise OSError("the disk is full")

    pipeline = bp.Pipeline(partial(bp.collect.with_statistics, where=WHERE), bp.metric.obs, bp.allocate.per_layer)
    own = calibration(BATCHES_OF_RANK["halves"][rank], reduce=bp.distributed.all_reduce)
    return bp.sequential(model(), pipeline, bp.reconstruct.least_squares, own, 0.5, callback=callback)


RAISES: dict[Callable[[int], Any], str] = {
    nan_on_a_rank: r"^(rank 1 raised ValueError: )?layers\.0\.(up|gate)\.weight \(24, 16\): NaN or inf reached 'input_gram' in batch 0",
    a_forward_that_raises_on_a_rank: r"^(rank 1 raised KeyError: )?'input_ids'$",
    a_layer_that_raises_on_a_rank: r"^(rank 1 raised MemoryError: )?out of memory$",
    a_callback_that_raises_on_a_rank: r"^(rank 1 raised OSError: )?the disk is full$",
    without_batches: "batches is empty: statistics need at least one batch",
    without_batches_for_layers: "batches is empty: calibration needs at least one",
    a_collector_that_does_not_reduce: r"layers\.0\.gate\.weight \(24, 16\): the ranks keep different blocks",
    finetuning: r"finetune tunes on the batches of one process; .*bp\.distill",
    clustered_without_an_example: r"example is not given, but the first batches of several processes differ; give example=",
}
CASES = [(recipe, case) for recipe in RECIPES for case in BATCHES_OF_RANK]


def run_rank(rank: int, folder: str) -> dict[Any, Any]:
    results: dict[Any, Any] = {
        (recipe, case): result(recipe, BATCHES_OF_RANK[case][rank], reduce=bp.distributed.all_reduce) for recipe, case in CASES
    }
    results |= {function.__name__: function(rank) for function in (clustered, a_group_that_is_bound, by_its_argument)}
    for function in RAISES:
        try:
            results[function.__name__] = function(rank)
        except Exception as error:
            results[function.__name__] = str(error)
    return results


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return in_two_processes(run_rank, tmp_path_factory.mktemp("ranks"), seconds=120)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "case"), CASES)
def test_both_end_with_the_masks_and_weights_of_one_process(recipe: str, case: str, of_ranks: list[dict[Any, Any]]) -> None:
    (keep, weights), (other_keep, other_weights) = (results[recipe, case] for results in of_ranks)
    assert same(keep, other_keep)
    assert same(weights, other_weights)
    expected_keep, expected_weights = result(recipe)
    assert same(keep, expected_keep)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.slow
def test_a_group_an_argument_and_a_better_order_of_units(of_ranks: list[dict[Any, Any]]) -> None:
    keep, weights = result("obs")
    expected = bp.recipes.cluster_units(model(), WHERE, calibration(), example=calibration().batches[0][:1])  # type: ignore[index]
    for results in of_ranks:
        assert same(results["a_group_that_is_bound"][0], keep)
        torch.testing.assert_close(results["a_group_that_is_bound"][1], weights)
        assert results["by_its_argument"] == (True, True)
        assert same(results["clustered"], expected.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("function", RAISES, ids=lambda function: function.__name__)
def test_both_raise(function: Callable[[int], Any], of_ranks: list[dict[Any, Any]]) -> None:
    for results in of_ranks:
        assert isinstance(results[function.__name__], str)
        assert re.search(RAISES[function], results[function.__name__])


def test_without_a_process_group_the_share_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"distributed\.share needs a process group"):
        bp.distributed.share(2, lambda own: [torch.zeros(2)[own]])
