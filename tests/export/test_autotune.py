"""What is reported about speed follows from what was measured."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_export import close, masked, mlp
from torch import nn

import blockprune as bp
from blockprune import export
from blockprune.export import model_benchmark, timing
from blockprune.export.timing import cold_copies, median_seconds, time_interleaved

FAKE = {"dense": 4.0, "dense, oneDNN packed": 2.0, "dense bfloat16": 8.0, "dense bfloat16, oneDNN packed": 1.0, "dense int8": 1.5}
DTYPES = ("float32", "bfloat16", "int8")  # whatever instructions the machine has


def timed(monkeypatch: pytest.MonkeyPatch, **more: float) -> None:
    monkeypatch.setattr(model_benchmark, "_milliseconds", lambda models, **_: {name: {**FAKE, **more}[name] for name in models})


def test_a_model_is_compared_with_the_best_dense_one_of_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, mine=0.5)
    model = masked(mlp())
    comparison = export.benchmark(
        model, export.block_sparse(model, backend="torch"), names=["mine"], inputs=torch.randn(8, 24), dtypes=DTYPES
    )
    row = comparison.rows[-1]
    assert (row.name, row.dtype, row.milliseconds, row.inputs_per_second) == ("mine", "float32", 0.5, 16_000)
    assert (row.speedup_same_dtype, row.speedup) == (4.0, 2.0)
    assert comparison.verdict == "mine is 4.00 times as fast as the fastest float32 dense model (dense, oneDNN packed)."
    assert [r.name for r in comparison.rows[:5]] == list(FAKE)
    assert "ms per call" in repr(comparison)
    assert "<table>" in comparison._repr_html_()


def test_a_model_that_is_not_faster_is_reported_and_from_which_sparsity_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model = masked(mlp())
    times = itertools.chain([2.2, 1.0])  # at 50 and at 75 % of the same blocks

    def fake(models: dict[str, nn.Module], **_: object) -> dict[str, float]:
        return {name: {**FAKE, "Sequential": 2.5}[name] for name in models} if "sparser" not in models else {"sparser": next(times)}

    monkeypatch.setattr(model_benchmark, "_milliseconds", fake)
    comparison = export.benchmark(model, export.block_sparse(model, backend="torch"), inputs=torch.randn(8, 24), dtypes=DTYPES)
    slower = "Sequential is not faster than dense: it is 0.80 times as fast as dense, oneDNN packed."
    assert comparison.verdict == f"{slower} The same blocks would be faster at 75% pruned: 2.00 times as fast."


def test_a_dense_model_of_another_type_that_is_faster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, mine=1.25)
    model = masked(mlp())
    sparse = export.block_sparse(model, backend="torch")
    comparison = export.benchmark(model, sparse, names=["mine"], inputs=torch.randn(8, 24), dtypes=["float32", "int8", "bfloat16"])
    faster = "mine is 1.60 times as fast as the fastest float32 dense model (dense, oneDNN packed)."
    assert comparison.verdict == f"{faster} dense bfloat16, oneDNN packed is faster: it takes 0.80 times as long."
    assert [row.dtype for row in comparison.rows if "int8" in row.name] == ["int8"]


def test_the_types_of_the_dense_models_are_chosen() -> None:
    model, x = mlp(), torch.randn(8, 24)
    assert {row.dtype for row in export.benchmark(model, inputs=x, rounds=1, dtypes=["int8"]).rows} == {"int8"}
    assert {row.dtype for row in export.benchmark(model, inputs=x, rounds=1, dtypes=["bfloat16"]).rows} == {"bfloat16"}
    sparse = export.block_sparse(masked(mlp()), backend="torch")
    assert [row.name for row in export.benchmark(masked(mlp()), sparse, inputs=x, rounds=1, dtypes=["int8"]).rows] == [
        "dense int8",
        "Sequential",
    ]
    with pytest.raises(ValueError, match="dtypes is empty"):
        export.benchmark(model, inputs=x, dtypes=[])
    with pytest.raises(ValueError, match=r"dtypes has 'int4'; a dense form of this model is 'float32', .*'int8'"):
        export.benchmark(model, inputs=x, dtypes=["int4"])


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.to(self.layer.weight.dtype))


def test_a_model_that_cannot_run_in_int8_is_timed_without() -> None:
    assert "int8" not in {row.dtype for row in export.benchmark(ReadsWeight(), inputs=torch.randn(8, 24), rounds=1).rows}


def test_a_benchmark_says_that_nothing_became_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, mine=0.5)
    model = masked(mlp())
    comparison = export.benchmark(model, bp.finalize(model), names=["mine"], inputs=torch.randn(8, 24), dtypes=DTYPES)
    assert comparison.verdict.endswith("0 of 2 masked layers of mine are block-sparse; choose(model) lists the reason of each.")


def test_a_real_benchmark_leaves_the_models_alone() -> None:
    model = masked(mlp())
    sparse = export.block_sparse(model, backend="torch")
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    comparison = export.benchmark(model, sparse, half, names=["a", "b"], inputs=torch.randn(8, 24), rounds=1)
    assert [row.dtype for row in comparison.rows[-2:]] == ["float32", "bfloat16"]
    assert all(row.milliseconds > 0 for row in comparison.rows)
    assert comparison.rows[-2].mebibytes < comparison.rows[0].mebibytes * 2
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="names has 1 entries for 2 models"):
        export.benchmark(model, sparse, half, names=["a"], inputs=torch.randn(8, 24))


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5))
def test_blocks_are_faster_from_between_the_last_slower_and_the_first_faster_sparsity(times: list[float]) -> None:
    sparsities = [(i + 1) / 10 for i in range(len(times))]
    start = export.BlockSpeedup((8, 8), (4, 4), dict(zip(sparsities, times, strict=True))).faster_from
    wins = [s for s, t in zip(sparsities, times, strict=True) if t >= 1]
    if not wins:
        assert start is None
    elif wins[0] == sparsities[0]:
        assert start == sparsities[0]
    else:
        assert start is not None
        assert wins[0] - 0.1 - 1e-9 <= start <= wins[0] + 1e-9


def test_a_recommendation_covers_the_layers_own_blocks_and_the_others() -> None:
    masks = bp.read_masks(masked(nn.Sequential(nn.Linear(64, 48), nn.Flatten(), nn.Conv2d(4, 6, 3)), (4, 4)))
    recommendation = export.recommend_blocks(masks, rows=16, blocks=[(16, 1)], sparsities=[0.5, 0.9], rounds=1, progress=False)
    assert [(row.shape, row.block) for row in recommendation.rows] == [
        ((48, 64), (4, 4)),
        ((48, 64), (16, 1)),
        ((6, 36), (4, 36)),  # four channels of 3 x 3 taps
        ((6, 36), (6, 1)),
    ]
    assert "48x64" in repr(recommendation)
    assert "<table>" in recommendation._repr_html_()


def test_a_cost_is_positive_and_budgets_take_it() -> None:
    grids = {"small": bp.BlockGrid((512, 512), (16, 16)), "large": bp.BlockGrid((512, 512), (64, 64))}
    scores = {name: bp.BlockScore(torch.rand(grid.size), grid) for name, grid in grids.items()}
    costs = export.cost_table(scores, inputs=torch.randn(2, 64, 512), progress=False)
    small, large = costs.rows
    assert costs.input_rows == 128
    assert min(small.milliseconds, large.milliseconds) > 0
    assert costs.per_element == {row.name: row.milliseconds / side**2 for row, side in ((small, 16), (large, 64))}
    assert min(small.fixed_milliseconds, large.fixed_milliseconds) >= 0
    budget = bp.budgets.lagrangian(scores, 0.5, cost=costs.per_element)
    assert set(budget) == set(scores)
    assert "us per block" in repr(costs)


def test_bad_arguments_are_refused() -> None:
    scores = {"b": bp.BlockScore(torch.rand(2), bp.BlockGrid((8,), (4,)))}
    with pytest.raises(ValueError, match="0 layers and 128 input rows; give at least one layer"):
        export.recommend_blocks({})
    with pytest.raises(ValueError, match=r"b of shape \(8,\) is no weight"):
        export.cost_table(scores)
    layer = {"w": bp.BlockScore(torch.rand(2, 2), bp.BlockGrid((8, 8), (4, 4)))}
    with pytest.raises(ValueError, match=r"inputs \(2, 3, 9\) do not fit w, which has 8 input features; .* rows=6"):
        export.recommend_blocks(layer, inputs=torch.randn(2, 3, 9))
    with pytest.raises(ValueError, match="1 layers and 0 input rows"):
        export.cost_table(layer, rows=0)
    with pytest.raises(ValueError, match="has 3 axes"):
        export.recommend_blocks(layer, rows=4, blocks=[(4, 4, 4)])
    assert export.recommend_blocks(layer, rows=4, blocks=[(4,)], sparsities=[0.5], rounds=1, progress=False).rows[1].block == (4, 8)
    with pytest.raises(ValueError, match=r"sparsities=\[1.0\]"):
        export.recommend_blocks({"w": bp.BlockScore(torch.rand(2, 2), bp.BlockGrid((8, 8), (4, 4)))}, sparsities=[1.0])


def test_timed_calls_are_interleaved() -> None:
    calls: list[str] = []
    medians = median_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert set(medians) == {"a", "b"}


@pytest.mark.parametrize("graph", [False, True])
def test_on_an_accelerator_all_copies_of_a_variant_run_before_one_synchronization(monkeypatch: pytest.MonkeyPatch, graph: bool) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: calls.append("end"))
    monkeypatch.setattr(timing, "cuda_graphed", lambda call: lambda: (calls.append("replay"), call()))
    monkeypatch.setattr(timing.time, "perf_counter", itertools.count().__next__)
    variants = {"a": [lambda: calls.append("a"), lambda: calls.append("A")], "b": [lambda: calls.append("b")]}
    seconds = time_interleaved(variants, torch.device("cuda"), graph=graph, rounds=2)
    replay = ["replay"] * graph
    assert calls == [*replay, "a", "A", "end", *replay, "b", "end"] * 3
    assert seconds == {"a": 0.5, "b": 1}


def test_there_are_more_copies_than_caches_hold() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [cold_copies(nbytes, cpu) for nbytes in (0, 1 << 22, 1 << 30)] == [32, 16, 1]
    assert [cold_copies(nbytes, cuda) for nbytes in (0, 1 << 25, 1 << 30)] == [512, 4, 2]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's exporter and onnx
def test_onnx_files_hold_dense_weights_and_a_warning_says_so(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415

    sparse, x = export.block_sparse(masked(mlp()), backend="torch"), torch.randn(3, 24)
    with pytest.warns(UserWarning, match="ONNX has no block-sparse product"):
        export.onnx(sparse, (x,), tmp_path / "model.onnx")
    program = onnx.load(tmp_path / "model.onnx")
    (out,) = ReferenceEvaluator(program).run(None, {program.graph.input[0].name: x.numpy()})
    close(torch.from_numpy(out), sparse(x).detach())
