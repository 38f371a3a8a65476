"""What is reported about speed follows from what was measured."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal
from test_export import MAY_STAY_DENSE, close, masked, mlp, random_masks
from torch import nn

import blockprune as bp
from blockprune import export
from blockprune.export import backend_choice, model_benchmark, timed_layers, timing
from blockprune.export.timing import cold_copies, median_seconds, time_interleaved
from blockprune.native import spmm

FAKE = {"dense": 4.0, "dense, oneDNN packed": 2.0, "dense bfloat16": 8.0, "dense bfloat16, oneDNN packed": 1.0, "dense int8": 1.5}
FAKE |= {"dense int8, row by row": 1.75} if spmm.instructions() else {}  # the compiled product
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
    assert [r.name for r in comparison.rows[:-1]] == list(FAKE)
    assert "ms per call" in repr(comparison)
    assert "<table>" in comparison._repr_html_()


def test_a_model_that_is_not_faster_is_reported_and_from_which_sparsity_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model = masked(mlp())
    times = itertools.chain([2.2, 1.0])  # at 50 and at 75 % of the same blocks

    def fake(models: dict[str, nn.Module], **_: object) -> dict[str, float]:
        return {name: {**FAKE, "exported": 2.5}[name] for name in models} if "sparser" not in models else {"sparser": next(times)}

    monkeypatch.setattr(model_benchmark, "_milliseconds", fake)
    comparison = export.benchmark(model, export.block_sparse(model, backend="torch"), inputs=torch.randn(8, 24), dtypes=DTYPES)
    slower = "exported is not faster than dense: it is 0.80 times as fast as dense, oneDNN packed."
    assert comparison.verdict == f"{slower} The same blocks would be faster at 75% pruned: 2.00 times as fast."


def test_models_without_names_are_called_exported_or_by_their_class(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, exported=1.0, Sequential=1.5, **{"exported 3": 1.0})
    model = masked(mlp())
    sparse = export.block_sparse(model, backend="torch")
    rows = export.benchmark(model, sparse, bp.finalize(model), copy.deepcopy(sparse), inputs=torch.randn(8, 24), dtypes=["float32"]).rows
    assert [row.name for row in rows[-3:]] == ["exported", "Sequential", "exported 3"]


def test_a_dense_model_of_another_type_that_is_faster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, mine=1.25)
    model = masked(mlp())
    sparse = export.block_sparse(model, backend="torch")
    comparison = export.benchmark(model, sparse, names=["mine"], inputs=torch.randn(8, 24), dtypes=["float32", "int8", "bfloat16"])
    faster = "mine is 1.60 times as fast as the fastest float32 dense model (dense, oneDNN packed)."
    assert comparison.verdict == f"{faster} dense bfloat16, oneDNN packed is faster: it takes 0.80 times as long."
    assert {row.dtype for row in comparison.rows if "int8" in row.name} == {"int8"}


@pytest.mark.parametrize("has_instructions", [True, False])
def test_bfloat16_is_timed_by_default_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch, has_instructions: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": has_instructions})
    types = {row.dtype for row in export.benchmark(mlp(), inputs=torch.randn(8, 24), rounds=1).rows}
    assert types == {"float32", "int8", *(["bfloat16"] if has_instructions else [])}


def test_the_types_of_the_dense_models_are_chosen() -> None:
    model, x = mlp(), torch.randn(8, 24)
    assert {row.dtype for row in export.benchmark(model, inputs=x, rounds=1, dtypes=["int8"]).rows} == {"int8"}
    assert {row.dtype for row in export.benchmark(model, inputs=x, rounds=1, dtypes=["bfloat16"]).rows} == {"bfloat16"}
    sparse = export.block_sparse(masked(mlp()), backend="torch")
    names = [row.name for row in export.benchmark(masked(mlp()), sparse, inputs=x, rounds=1, dtypes=["int8"]).rows]
    assert names == [*(name for name in FAKE if "int8" in name), "exported"]
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


def test_a_model_that_cannot_run_in_the_int8_of_torch_is_timed_without() -> None:
    assert "dense int8" not in {row.name for row in export.benchmark(ReadsWeight(), inputs=torch.randn(8, 24), rounds=1).rows}


def test_a_benchmark_says_that_nothing_became_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, mine=0.5)
    model = masked(mlp())
    comparison = export.benchmark(model, bp.finalize(model), names=["mine"], inputs=torch.randn(8, 24), dtypes=DTYPES)
    said = "0 of 2 masked layers of mine are block-sparse; print(choose(model)) lists the reason for each layer."
    assert comparison.verdict.endswith(said)


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
    start = export.BlockSpeedup((8, 8), (1, 8), (4, 4), dict(zip(sparsities, times, strict=True)), ("w",)).faster_from
    wins = [s for s, t in zip(sparsities, times, strict=True) if t >= 1]
    if not wins:
        assert start is None
    elif wins[0] == sparsities[0]:
        assert start == sparsities[0]
    else:
        assert start is not None
        assert wins[0] - 0.1 - 1e-9 <= start <= wins[0] + 1e-9


def test_a_recommendation_covers_the_layers_own_blocks_and_the_others() -> None:
    masks = bp.read_masks(masked(nn.Sequential(nn.Linear(64, 48)), (4, 4)))
    recommendation = export.recommend_blocks(masks, rows=16, blocks=[(16, 1)], sparsities=[0.5, 0.9], rounds=1, progress=False)
    assert [(row.shape, row.inputs, row.block) for row in recommendation.rows] == [
        ((48, 64), (16, 64), (4, 4)),
        ((48, 64), (16, 64), (16, 1)),
    ]
    assert "48x64" in repr(recommendation)
    assert "48x64 with inputs 16x64: " in recommendation.verdict
    assert "<table>" in recommendation._repr_html_()


LINEAR_MASK = bp.BlockMask(torch.tensor([[True, False], [False, True]]), bp.BlockGrid((8, 8), (4, 4)))


class TwoSizes(nn.Module):
    """Alike layers on inputs of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.alike = (nn.Conv2d(8, 8, 3, stride=s, padding=1) for s in (2, 1, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.alike(self.second(self.first(x))).mean((2, 3)))


def test_layers_of_a_model_are_timed_on_inputs_of_the_size_that_they_get(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = TwoSizes().double(), torch.randn(2, 8, 12, 12, dtype=torch.float64)
    masks = bp.recipes.magnitude(bp.first_of(bp.linears((2, 2)), bp.convs((4, 2))))(model, 0.5).masks
    seen = []
    monkeypatch.setattr(
        timed_layers, "time_interleaved", lambda calls, *_, **__: seen.append([c[0]() for c in calls.values()]) or dict.fromkeys(calls, 1.0)
    )
    before = copy.deepcopy(model.state_dict())
    masked_model = bp.apply_masks(copy.deepcopy(model), masks)
    for of in (model, masked_model):
        recommendation = export.recommend_blocks(masks, model=of, inputs=x, blocks=[(8, 8)], sparsities=[0.5], progress=False)
        assert [(row.shape, row.inputs, row.block) for row in recommendation.rows] == [
            ((8, 8, 3, 3), (2, 8, 12, 12), (4, 2, 3, 3)),
            ((8, 8, 3, 3), (2, 8, 12, 12), (8, 8, 3, 3)),
            ((8, 8, 3, 3), (2, 8, 6, 6), (4, 2, 3, 3)),  # the second and the one like it
            ((8, 8, 3, 3), (2, 8, 6, 6), (8, 8, 3, 3)),
            ((4, 8), (2, 8), (2, 2)),
            ((4, 8), (2, 8), (4, 8)),
        ]
    assert [outputs[0].shape for outputs in seen[:3]] == [(2, 8, 6, 6), (2, 8, 6, 6), (2, 4)]
    assert all(out.shape == outputs[0].shape and out.dtype == torch.float64 for outputs in seen for out in outputs)
    costs = export.cost_table(masks, model=masked_model, inputs=x, progress=False)
    assert [(row.name, row.block) for row in costs.rows] == [(name, mask.grid.block) for name, mask in masks.items()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_masks_that_are_timed_keep_the_share_that_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    monkeypatch.setattr(timed_layers, "pack_weight", lambda weight, mask: packed.append(mask) or export.pack_weight(weight, mask))
    model, layers = (
        nn.Sequential(nn.Conv2d(8, 8, 3)),
        {"0.weight": bp.BlockScore(torch.rand(4, 4, 1, 1), bp.BlockGrid((8, 8, 3, 3), (2, 2)))},
    )
    export.recommend_blocks(layers, model=model, inputs=torch.randn(1, 8, 5, 5), blocks=[], sparsities=[0.25, 0.75], rounds=1)
    assert [bp.sparsity({"w": mask}) for mask in packed] == [0.25, 0.75]


def test_layers_that_cannot_be_timed_in_a_model_are_refused() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3)), torch.randn(1, 4, 8, 8)
    score = bp.BlockScore(torch.rand(4, 4, 1, 1), bp.BlockGrid((8, 8, 3, 3), (2, 2)))
    with pytest.raises(ValueError, match=r"1.weight of shape \(8, 8, 3, 3\) is a convolution, .* give the model= of the layers"):
        export.recommend_blocks({"1.weight": score})
    with pytest.raises(ValueError, match="a model and no inputs; give inputs=, one batch"):
        export.recommend_blocks({"1.weight": score}, model=model)
    with pytest.raises(ValueError, match="no layers; give at least one"):
        export.cost_table({}, model=model, inputs=x)
    with pytest.raises(KeyError, match=r"layers names '2.weight', which is not a parameter of the model; similar names: '1.weight'"):
        export.cost_table({"2.weight": score}, model=model, inputs=x)
    with pytest.raises(ValueError, match=r"1.weight has shape \(8, 8, 3, 3\) in the model and \(8, 4\) in layers; give masks"):
        export.cost_table({"1.weight": bp.BlockScore(torch.rand(4, 2), bp.BlockGrid((8, 4), (2, 2)))}, model=model, inputs=x)
    with pytest.raises(ValueError, match=r"0.weight is a Conv2d.weight with groups=2, which has no block-sparse form"):
        export.cost_table({"0.weight": bp.BlockScore(torch.rand(4, 1, 1, 1), bp.BlockGrid((8, 2, 3, 3), (2, 2)))}, model=model, inputs=x)
    with pytest.raises(ValueError, match=r"inputs do not reach 1.weight"):
        export.cost_table({"1.weight": score}, model=model, inputs=x, forward=lambda model, x: model[0](x))
    with pytest.raises(ValueError, match="inputs is dict; give a floating-point tensor"):
        export.cost_table({"w": bp.BlockScore(torch.rand(4, 2), bp.BlockGrid((8, 4), (2, 2)))}, inputs={"x": x})
    with pytest.raises(ValueError, match=r"inputs reach 1.weight with the shape \(0, 8, 6, 6\), which holds no numbers"):
        export.cost_table({"1.weight": score}, model=model, inputs=x[:0])
    with pytest.raises(ValueError, match=r"rows=8 is given beside a model"):
        export.cost_table({"1.weight": score}, model=model, inputs=x, rows=8)
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16 is given beside a model"):
        export.cost_table({"1.weight": score}, model=model, inputs=x, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"blocks has \(4, 4, 1, 1, 1\) with 5 axes, but 1.weight of shape \(8, 8, 3, 3\) has 4"):
        export.recommend_blocks({"1.weight": score}, model=model, inputs=x, blocks=[(4, 4, 1, 1, 1)])
    sparse = export.block_sparse(bp.apply_masks(nn.Linear(8, 8), {"weight": LINEAR_MASK}), backend="torch")
    with pytest.raises(ValueError, match="block-sparse already; give the model from before"):
        export.cost_table({"weight": LINEAR_MASK}, model=sparse, inputs=torch.randn(2, 8))
    for options in ({"dtype": torch.float8_e4m3fn}, {"inputs": torch.ones(4, 8).long()}, {"inputs": torch.ones(4, 8), "rows": 3}):
        with pytest.raises(
            ValueError, match=r"dtype=torch.float8_e4m3fn has no product|inputs is torch.int64|rows=3 and dtype=None are given"
        ):
            export.cost_table({"weight": LINEAR_MASK}, **options)
    assert not model[1]._forward_pre_hooks


def test_layers_that_differ_in_more_than_their_shapes_are_told_apart() -> None:
    layers = [
        nn.Conv2d(8, 8, 3, padding=1, stride=2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    ]
    layers.append(nn.Conv2d(8, 8, 3, padding=1, bias=False))
    model, x = nn.ModuleList(layers), torch.randn(1, 8, 6, 6)
    scores = {f"{i}.weight": bp.BlockScore(torch.rand(4, 4, 1, 1), bp.BlockGrid((8, 8, 3, 3), (2, 2))) for i in range(4)}
    options = {"model": model, "inputs": x, "forward": lambda model, x: [layer(x) for layer in model], "rounds": 1, "progress": False}
    recommendation = export.recommend_blocks(scores, blocks=[], sparsities=[0.5], **options)
    assert [row.names for row in recommendation.rows] == [(name,) for name in scores]
    assert all(f"8x8x3x3 ({name}) with inputs 1x8x6x6: " in recommendation.verdict for name in scores)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.second(x)


@MAY_STAY_DENSE
def test_tied_weights_and_autocast_inside_of_a_model() -> None:
    model, options = Tied(), {"inputs": torch.randn(4, 8), "rounds": 1, "progress": False}
    for name in ("first.weight", "second.weight"):
        layers, _ = timed_layers.layers_of_model({name: LINEAR_MASK}, model, options["inputs"], lambda model, x: model(x), None)
        assert (list(layers), layers[name].inputs, layers[name].dtype) == ([name], (4, 8), torch.bfloat16)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    masked_model = bp.apply_masks(plain, {f"{i}.weight": LINEAR_MASK for i in range(2)})

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    assert all(choice.milliseconds for choice in export.choose(masked_model, forward=forward, **options).rows)


@MAY_STAY_DENSE
def test_timing_leaves_the_random_numbers_of_torch_alone() -> None:
    model, x = bp.apply_masks(nn.Sequential(nn.Linear(8, 8)), {"0.weight": LINEAR_MASK}), torch.randn(4, 8)
    before, options = torch.get_rng_state(), {"rounds": 1, "progress": False}
    export.recommend_blocks({"0.weight": LINEAR_MASK}, **options)
    export.cost_table({"0.weight": LINEAR_MASK}, model=model, inputs=x, **options)
    export.choose(model, **options)
    export.choose(model, inputs=x, **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cost_is_positive_and_budgets_take_it() -> None:
    grids = {"small": bp.BlockGrid((512, 512), (16, 16)), "large": bp.BlockGrid((512, 512), (64, 64))}
    scores = {name: bp.BlockScore(torch.rand(grid.size), grid) for name, grid in grids.items()}
    costs = export.cost_table(scores, inputs=torch.randn(2, 64, 512), progress=False)
    small, large = costs.rows
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
    with pytest.raises(ValueError, match="with 3 axes"):
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


# int8


def half_pruned(layers: nn.Module, block: tuple[int, int] = (16, 16)) -> nn.Module:
    torch.manual_seed(0)
    return masked(layers, block)


@MAY_STAY_DENSE
def test_the_fastest_of_all_types_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = half_pruned(nn.Sequential(nn.Linear(64, 64))), torch.randn(8, 64)
    usual = {"F.linear": 4.0, "oneDNN packed": 3.0, "native": 2.0, "torch": 9.0}
    int8 = {"native int8": 1.0, "dense int8": 1.5, "torch dynamic int8": 1.25}
    for faster, backend, dtype, kind in (
        ({}, "native", "int8", export.Int8BlockSparseLinear),
        ({"dense int8": 0.5}, "dense", "int8", export.Int8BlockSparseLinear),
        ({"torch": 0.5}, "torch", "", export.BlockSparseLinear),
        ({"F.linear": 0.5}, "dense", "", nn.Linear),
        ({"torch dynamic int8": 0.5}, "native", "int8", export.Int8BlockSparseLinear),
    ):
        monkeypatch.setattr(
            backend_choice, "time_interleaved", lambda *_, ms={**usual, **int8, **faster}, **__: {k: v / 1e3 for k, v in ms.items()}
        )
        (choice,) = export.choose(model, dtype="int8", inputs=x, progress=False).rows
        assert (choice.backend, choice.dtype) == (backend, dtype)
        assert choice.error is not None
        assert 0 < choice.error < 0.02
        (layer,) = export.block_sparse(model, backend=export.Choices((choice,)))
        assert type(layer) is kind
        if (backend, dtype) == ("dense", "int8"):
            assert layer.block_mask().keep.all()
    compared = "native int8 is 4.00x as fast as F.linear and 0.50x as fast as torch dynamic int8 on (8, 64)"
    assert choice.reason == f"{compared}: native int8 1 ms, F.linear 4 ms, torch dynamic int8 0.5 ms"
    assert "native int8" in repr(export.Choices((choice,)))
    assert "int8 error" in repr(export.Choices((choice,)))


@MAY_STAY_DENSE
def test_what_int8_does_not_fit_stays_in_its_type_and_says_why() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Flatten(2), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 16))
    bp.apply_masks(model, random_masks(model, bp.first_of(bp.linears((4, 4)), bp.convs((4, 4)))))
    with torch.no_grad():
        model[4].parametrizations.weight.original[0, 0] = torch.nan
        model[4].parametrizations.weight[0].keep[0, 0] = True
    x = torch.randn(2, 8, 4, 4)
    x[0, 0, 0, 0] = 1e6  # the rest of this row of inputs becomes zero
    for choices in (
        export.choose(model, dtype="int8", max_error=1e-3, inputs=x, progress=False),
        backend_choice.fixed_backend(model, "torch", dtype="int8", max_error=1e-3, inputs=x),
    ):
        conv, *others, last = choices.rows
        assert "a convolution has no int8 form" in conv.reason
        assert "its weight or all its inputs are not finite" in last.reason
        assert [choice.dtype for choice in choices.rows] == [""] * 4
        for choice in others:
            assert choice.error is not None
            assert choice.error > 1e-3
            assert f"its error in int8, {choice.error:.2%}, is above max_error=0.10%" in choice.reason
    sparse = export.block_sparse(model, backend="torch", dtype="int8", inputs=x)
    assert [type(layer).__name__ for layer in sparse] == [
        "BlockSparseConv2d",
        "Flatten",
        "Int8BlockSparseLinear",
        "Int8BlockSparseLinear",
        "BlockSparseLinear",
    ]


class Twice(nn.Module):
    """One layer, called on easy and on hard inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outlier = torch.zeros(32)
        outlier[0] = 1e3
        return self.layer(x + outlier) + self.layer(x)


def test_the_error_is_that_of_the_outputs_and_the_largest_of_all_calls() -> None:
    model, x = half_pruned(Twice()), torch.randn(8, 32)
    with torch.no_grad():
        model.layer.parametrizations.weight.original[:, 0] = 0
    (choice,) = backend_choice.fixed_backend(model, "torch", dtype="int8", max_error=9, inputs=x).rows
    hard = x + 1e3 * torch.eye(32)[0]
    sparse = export.block_sparse(model, backend="torch", dtype="int8", max_error=9)
    exact, rounded = ((layer(hard) - layer.bias).detach() for layer in (model.layer, sparse.layer))
    assert choice.error == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=1e-3)
    assert choice.error > 0.1
    (without,) = backend_choice.fixed_backend(model, "torch", dtype="int8").rows
    assert without.error is not None
    assert without.error < 0.02


def test_bad_options_of_int8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_pruned(mlp(), (4, 4))
    for dtype in ("int4", "float32", torch.float32, "bfloat16"):
        with pytest.raises(ValueError, match=r"dtype=.* must be 'int8', or None for the type of the weights"):
            export.choose(model, dtype=dtype)
    with pytest.raises(ValueError, match=r"max_error=0 must be a number above 0"):
        export.block_sparse(model, dtype="int8", max_error=0)
    two_of_four = export.Backends((export.Backend("2:4", True, ""), export.Backend("torch", True, "")))
    with monkeypatch.context() as patch:
        patch.setattr(backend_choice, "backends", lambda: two_of_four)
        with pytest.raises(ValueError, match=r"backend='2:4' has no product with int8 weights; .* 'auto', 'native', 'torch', 'dense'"):
            backend_choice.fixed_backend(model, "2:4", dtype="int8")
    choices = backend_choice.fixed_backend(model, "torch")
    with pytest.raises(ValueError, match=r"dtype='int8' and backend are given, and the choices have types already"):
        export.block_sparse(model, backend=choices, dtype="int8")
    conv = half_pruned(nn.Sequential(nn.Conv2d(8, 8, 1)), (4, 4))
    with pytest.raises(ValueError, match=r"0.weight is no weight of a Linear, and backend chooses int8 for it"):
        export.block_sparse(conv, backend=export.Choices((export.Choice("0.weight", 0.5, "torch", "", dtype="int8"),)))


def test_every_linear_becomes_int8_where_that_is_asked_for() -> None:
    model, x = half_pruned(mlp(), (4, 4)), torch.randn(8, 24)
    for backend, all_kept in (("torch", False), ("dense", True)):
        fast = export.block_sparse(model, backend=backend, dtype="int8", inputs=x)
        layers = [layer for layer in fast if isinstance(layer, export.Int8BlockSparseLinear)]
        assert len(layers) == 2
        assert [bool(layer.block_mask().keep.all()) for layer in layers] == [all_kept] * 2
        close(fast(x), reference.int8_model(model)(x))


def test_recommendations_and_costs_know_int8() -> None:
    layers = bp.read_masks(masked(nn.Sequential(nn.Linear(64, 48)), (4, 4)))
    for options in ({"rows": 16}, {"inputs": torch.randn(16, 64)}):
        recommended = export.recommend_blocks(layers, dtype="int8", blocks=[(16, 1)], sparsities=[0.5], rounds=1, progress=False, **options)
        assert [row.block for row in recommended.rows] == [(4, 4), (16, 1)]
        assert export.cost_table(layers, dtype="int8", rounds=1, progress=False, **options).rows[0].milliseconds > 0
    with pytest.raises(ValueError, match=r"dtype='int4' must be 'int8'"):
        export.recommend_blocks(layers, dtype="int4")


@MAY_STAY_DENSE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_layers_of_other_types_are_timed_in_int8(dtype: torch.dtype) -> None:
    model, x = masked(nn.Sequential(nn.Linear(32, 16)), (16, 16)).to(dtype), torch.randn(8, 32, dtype=dtype)
    (choice,) = export.choose(model, dtype="int8", inputs=x, max_error=1, rounds=1, progress=False).rows
    assert choice.milliseconds is not None
    assert "dense int8" in choice.milliseconds
    options = {"dtype": "int8", "blocks": [], "sparsities": [0.5], "rounds": 1, "progress": False}
    layers = bp.read_masks(model)
    assert len(export.recommend_blocks(layers, inputs=x, **options).rows) == 1
    assert len(export.recommend_blocks(layers, model=model, inputs=x, **options).rows) == 1


def test_a_model_in_int8_is_compared_with_the_best_dense_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = masked(mlp()), torch.randn(8, 24)
    sparse = export.block_sparse(model, backend="torch", dtype="int8")
    monkeypatch.setattr(model_benchmark, "int8_backend", lambda _: "native")
    timed(monkeypatch, mine=0.8, **{"dense int8, row by row": 1.2})
    comparison = export.benchmark(model, sparse, names=["mine"], inputs=x, dtypes=DTYPES)
    row = comparison.rows[-1]
    assert (row.dtype, row.speedup_same_dtype, row.speedup) == ("int8", pytest.approx(1.5), pytest.approx(1.25))
    assert comparison.verdict == "mine is 1.50 times as fast as the fastest int8 dense model (dense int8, row by row)."


def test_a_benchmark_of_int8_runs_in_the_type_of_the_model() -> None:
    model, x = masked(mlp()), torch.randn(8, 24)
    sparse = export.block_sparse(model, backend="torch", dtype="int8")
    comparison = export.benchmark(model, sparse, sparse.to(torch.bfloat16), names=["a", "b"], inputs=x, rounds=1, dtypes=["int8"])
    assert [row.dtype for row in comparison.rows[-2:]] == ["int8", "int8"]
    kept = sum(layer.values.numel() for layer in sparse if isinstance(layer, export.BlockSparseLinear))
    assert kept < comparison.rows[-1].mebibytes * 2**20 < 4 * kept
    assert "The same blocks would" in comparison.verdict


def test_int8_is_recommended_for_a_cpu_alone() -> None:
    layers = {"w": bp.BlockScore(torch.rand(2, 2, device="meta"), bp.BlockGrid((8, 8), (4, 4)))}
    with pytest.raises(ValueError, match=r"dtype='int8' has kernels for a CPU alone, and the layers or inputs are on meta"):
        export.recommend_blocks(layers, dtype="int8")


@MAY_STAY_DENSE
def test_the_error_of_int8_is_that_of_the_inputs_or_says_that_they_are_random() -> None:
    model = masked(nn.Sequential(nn.Linear(24, 24)))
    (choice,) = export.choose(model, dtype="int8", rows=8, rounds=1, progress=False).rows
    assert choice.reason.endswith("; error on random inputs: give inputs= for that on real ones")
    (choice,) = backend_choice.fixed_backend(model, "torch", dtype="int8").rows
    assert (choice.dtype, "on random inputs" in choice.reason) == ("int8", True)
    not_finite = "its weight or all its inputs are not finite, so its error in int8 is not known"
    for inputs, reason in ((torch.full((4, 24), torch.nan), not_finite), (torch.randn(0, 24), "inputs do not reach it")):
        (choice,) = backend_choice.fixed_backend(model, "torch", dtype="int8", inputs=inputs).rows
        assert (choice.dtype, choice.reason) == ("", reason)


@pytest.mark.parametrize("size", [1e-60, 1e60])
def test_weights_beyond_float32_have_no_int8_form(size: float) -> None:
    model = nn.Sequential(nn.Linear(24, 24, bias=False)).double()
    with torch.no_grad():
        model[0].weight.mul_(size)
    masked(model)
    (choice,) = backend_choice.fixed_backend(model, "torch", dtype="int8").rows
    assert (choice.dtype, choice.reason) == (
        "",
        "its error in int8, inf%, is above max_error=3.00%; error on random inputs: give inputs= for that on real ones",
    )
    with pytest.raises(ValueError, match=r"a weight of shape \(24, 24\) is not finite, or not in the range of float32"):
        export.block_sparse(model, backend="torch", dtype="int8", max_error=math.inf)
    x = normal((4, 24), 0)
    torch.testing.assert_close(export.rowwise_int8(model)(x), model(x))


CALLS = {"rows": lambda x: x, "larger rows": lambda x: x * 3 + x[:1], "none": lambda x: x[:0], "nan": lambda x: x * torch.nan}


class Called(nn.Module):
    """A layer that is called several times, as an expert is."""

    def __init__(self, calls: tuple[str, ...]) -> None:
        super().__init__()
        self.calls, self.layer = calls, nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.layer(CALLS[call](x)) for call in self.calls]


@MAY_STAY_DENSE
def test_neither_calls_without_rows_nor_the_order_of_calls_count() -> None:
    torch.manual_seed(0)
    x, layer, errors = torch.randn(8, 24), masked(nn.Sequential(nn.Linear(24, 24)))[0], {}
    for calls in (("rows",), *itertools.permutations(("rows", "none")), *itertools.permutations(("rows", "nan", "none"))):
        model = Called(calls)
        model.layer = layer
        (choice,) = export.choose(model, dtype="int8", inputs=x, max_error=1, rounds=1, progress=False).rows
        (fixed,) = backend_choice.fixed_backend(model, "torch", dtype="int8", inputs=x, max_error=1).rows
        assert (fixed.dtype, fixed.backend) == ("int8", "torch")
        assert "(8, 24)" in choice.reason
        errors[calls] = (choice.error, fixed.error)
        layers = timed_layers.layers_of_model(bp.read_masks(model), model, x, lambda model, x: model(x), None)[0]
        assert layers["layer.weight"].inputs == (8, 24)
    assert len(set(errors.values())) == 1
    model.calls = ("none",)
    (choice,) = export.choose(model, dtype="int8", inputs=x, progress=False).rows
    assert (choice.backend, choice.reason) == ("dense", "inputs do not reach it")
    assert isinstance(export.block_sparse(model, dtype="int8", inputs=x, progress=False).layer, nn.Linear)
    model.calls = ("none", "nan")
    (choice,) = export.choose(model, dtype="int8", inputs=x, rounds=1, progress=False).rows
    assert choice.reason.startswith("its weight or all its inputs are not finite")


def test_of_several_errors_the_largest_counts() -> None:
    x, layer = torch.randn(8, 24), masked(nn.Sequential(nn.Linear(24, 24)))[0]
    model, errors = Called(("rows",)), {}
    model.layer = layer
    for calls in (("rows",), ("larger rows",), *itertools.permutations(("rows", "larger rows"))):
        model.calls = calls
        errors[calls] = backend_choice.fixed_backend(model, "torch", dtype="int8", inputs=x).rows[0].error
    single = [errors["rows",], errors["larger rows",]]
    assert set(list(errors.values())[2:]) == {max(e for e in single if e is not None)}


LAYERS = {"0.weight": bp.BlockMask(torch.ones(2, 2, dtype=torch.bool), bp.BlockGrid((8, 8), (4, 4)))}


@pytest.mark.parametrize("function", [export.recommend_blocks, export.cost_table])
def test_what_is_to_be_timed_is_checked(function: Any) -> None:
    with pytest.raises(TypeError, match=r"layers is a Sequential, not a mapping .*give masks or scores, such as bp\.read_masks\(model\)"):
        function(nn.Sequential(nn.Linear(8, 8)), inputs=torch.randn(2, 8))
    with pytest.raises(TypeError, match=r"layers\['w'\] is a int, not a BlockMask"):
        function({"w": 5})
    for rounds in (0, -1, 1.5):
        with pytest.raises(ValueError, match=rf"rounds={rounds} must be an integer, at least 1"):
            function(LAYERS, rounds=rounds)


def test_lists_of_blocks_and_sparsities_are_checked() -> None:
    for sparsities in ([], (0.5, 1.0), [0.0]):
        with pytest.raises(ValueError, match=r"sparsities=\[.*\] must be above 0 and below 1, and at least one"):
            export.recommend_blocks(LAYERS, sparsities=sparsities)
    for wrong in (0.5, ["half"], [None]):
        with pytest.raises(TypeError, match=r"sparsities=.* must be a list of numbers above 0 and below 1, such as \[0\.5, 0\.9\]"):
            export.recommend_blocks(LAYERS, sparsities=wrong)  # type: ignore[arg-type]
    for blocks in ([8], 8, (4, 4), ["ab"], [(4.0, 4)]):
        with pytest.raises(
            TypeError, match=r"blocks has .*, which is no shape of a block; give a list of shapes, such as blocks=\[\(16, 1\)"
        ):
            export.recommend_blocks(LAYERS, blocks=blocks)  # type: ignore[arg-type]


def test_a_benchmark_of_no_rounds_or_of_an_unknown_type_is_refused() -> None:
    for rounds in (0, 2.5):
        with pytest.raises(ValueError, match=rf"rounds={rounds} must be an integer, at least 1"):
            export.benchmark(mlp(), inputs=torch.randn(8, 24), rounds=rounds)  # type: ignore[arg-type]
    for dtype, listed in (
        (torch.float32, "'float32', 'bfloat16' or 'int8'"),
        (torch.float64, "'float64', 'float32', 'bfloat16' or 'int8'"),
    ):
        with pytest.raises(ValueError, match=rf"dtypes has 'foo'; a dense form of this model is {listed}$"):
            export.benchmark(mlp().to(dtype), inputs=torch.randn(8, 24), dtypes=["foo"])


def test_a_layer_that_inputs_do_not_reach_stays_in_its_type() -> None:
    model = masked(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)))
    reached, other = backend_choice.fixed_backend(
        model, "torch", dtype="int8", inputs=torch.randn(4, 24), forward=lambda model, x: model[0](x)
    ).rows
    assert (reached.dtype, reached.reason) == ("int8", "as requested")
    assert (other.dtype, other.reason) == ("", "inputs do not reach it")


@MAY_STAY_DENSE
@pytest.mark.filterwarnings("ignore:. of . masked layers have no block-sparse form")
def test_a_masked_embedding_is_left_out() -> None:
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64))
    where = bp.named("*.weight", (16, 16))
    bp.apply_masks(
        model, {name: bp.BlockMask(torch.rand(p.grid.size) > 0.5, p.grid) for name, p in bp.collect.weights(model, where=where).items()}
    )
    tokens = torch.randint(64, (7,))
    close(export.block_sparse(model, inputs=tokens)(tokens), model(tokens))


@MAY_STAY_DENSE
def test_the_reason_has_the_times_of_the_chosen_kernel_and_of_the_plain_layer() -> None:
    model = masked(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)))
    (choice,) = export.choose(model, inputs=torch.randn(1, 16, 9, 9), rounds=1, progress=False).rows
    chosen = "Conv2d" if choice.backend == "dense" else choice.backend
    assert f"{chosen} {choice.milliseconds[chosen]:.3g} ms" in choice.reason
    assert f"Conv2d {choice.milliseconds['Conv2d']:.3g} ms" in choice.reason


def test_the_reason_has_one_ratio_if_the_plain_layer_is_the_fastest_dense_form(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"F.linear": 2.0, "oneDNN packed": 3.0, "torch": 1.0}
    monkeypatch.setattr(backend_choice, "time_interleaved", lambda *_, **__: {name: ms / 1e3 for name, ms in times.items()})
    (choice,) = export.choose(masked(nn.Sequential(nn.Linear(64, 64))), inputs=torch.randn(8, 64), progress=False).rows
    assert choice.reason == "torch is 2.00x as fast as F.linear on (8, 64): torch 1 ms, F.linear 2 ms"
