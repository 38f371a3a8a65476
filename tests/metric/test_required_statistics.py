"""A metric and a repair declare the statistics that they need: a pipeline collects these, and data without one of them is an error."""

import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from strategies import normal
from torch import Tensor, nn

import blockprune as bp
from blockprune import allocate, collect, metric, reconstruct, statistics
from blockprune.core.pipeline import required_statistics

WITHOUT = {"batchnorm_scale", "fpgm", "l1", "l2", "lamp", "lp", "movement", "random"}  # they need no statistic of `with_statistics`
DATA_METRICS = {name: getattr(metric, name) for name in metric.__all__ if name not in WITHOUT}
REPAIRS = {name: getattr(reconstruct, name) for name in reconstruct.__all__}
every_metric = pytest.mark.parametrize("name", DATA_METRICS)
every_repair = pytest.mark.parametrize("name", REPAIRS)
RULE, X = bp.linears((2, 2)), normal((12, 6), 0)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def loss(output: Tensor, batch: Any) -> Tensor:
    return (output.square() + output.exp()).sum(-1).mean()


def collected(*stats: statistics.Statistic) -> bp.Data:
    return collect.with_statistics(net(), where=RULE, statistics=stats, batches=[X], loss=loss)


def without(data: bp.Data, statistic: str) -> bp.Data:
    return {name: attrs.evolve(p, stats={key: v for key, v in p.stats.items() if key != statistic}) for name, p in data.items()}


def half(data: bp.Data) -> bp.Masks:
    return allocate.per_layer(metric.l1(data), 0.5)


@every_metric
def test_a_pipeline_collects_what_its_metric_requires(name: str) -> None:
    collector = partial(collect.with_statistics, where=RULE, batches=[X], loss=loss)
    masks = bp.Pipeline(collector, DATA_METRICS[name], allocate.per_layer)(net(), 0.5)
    assert bp.sparsity(masks) == 0.5
    options = {"sparsity": 0.5} if name == "sparsegpt" else {}
    scores = DATA_METRICS[name](collected(*required_statistics(DATA_METRICS[name])), **options)
    assert masks == allocate.per_layer(scores, 0.5)


@every_repair
def test_sequential_collects_what_its_repair_requires(name: str) -> None:
    pipeline = bp.Pipeline(partial(collect.with_statistics, where=RULE), metric.wanda, allocate.per_layer)
    result = bp.sequential(net(), pipeline, REPAIRS[name], [X], 0.5, progress=False)
    assert bp.sparsity(result.masks) == 0.5
    assert bool(result.weights) == (name != "none")


@every_metric
def test_a_metric_requires_what_it_reads_and_says_how_to_collect_what_is_missing(name: str) -> None:
    options = {"sparsity": 0.5} if name == "sparsegpt" else {}
    required = required_statistics(DATA_METRICS[name])
    assert required
    data = collected(*required)
    DATA_METRICS[name](data, **options)
    for statistic in required:
        with pytest.raises(ValueError) as caught:
            DATA_METRICS[name](without(data, statistic.name), **options)
        code = f"bp.collect.with_statistics(model, where=..., statistics=[bp.statistics.{statistic!r}], batches=...)"
        for part in ("0.weight (8, 6)", f"metric.{name} needs the statistic {statistic.name!r}", f"collect it: {code}"):
            assert part in str(caught.value), part


@every_repair
def test_a_repair_requires_what_it_reads_and_says_how_to_collect_what_is_missing(name: str) -> None:
    required = required_statistics(REPAIRS[name])
    data = collected(*(required or [statistics.output_sq]))
    REPAIRS[name](data, half(data))
    for statistic in required:
        with pytest.raises(ValueError) as caught:
            REPAIRS[name](without(data, statistic.name), masks=half(data))
        code = f"bp.collect.with_statistics(model, where=..., statistics=[bp.statistics.{statistic!r}], batches=...)"
        for part in ("0.weight (8, 6)", f"reconstruct.{name} needs the statistic {statistic.name!r}", f"collect it: {code}"):
            assert part in str(caught.value), part


@every_repair
def test_a_repair_requires_statistics_of_the_masked_parameters_only(name: str) -> None:
    required = required_statistics(REPAIRS[name])
    data = collected(*(required or [statistics.output_sq]))
    masks = {"2.weight": half(data)["2.weight"]}
    some = {**data, "0.weight": attrs.evolve(data["0.weight"], stats={})}
    expected = REPAIRS[name](data, masks)
    repaired = REPAIRS[name](some, masks)
    assert repaired.keys() == expected.keys()
    assert all(torch.equal(repaired[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_other_metrics_require_nothing(name: str) -> None:
    assert required_statistics(getattr(metric, name)) == ()


def test_the_code_in_the_error_collects_the_statistic() -> None:
    with pytest.raises(ValueError) as caught:
        metric.obd(collect.weights(net(), where=RULE))
    code = str(caught.value).split("collect it: ")[1]
    code = code.replace("where=...", "where=RULE").replace("batches=...", "batches=[X], loss=loss")
    data = eval(code, {"bp": bp, "model": net(), "RULE": RULE, "X": X, "loss": loss})
    assert metric.obd(data).keys() == data.keys()


def test_the_code_in_the_error_is_a_collector_for_a_pipeline() -> None:
    with pytest.raises(ValueError) as caught:
        bp.Pipeline(partial(collect.weights, where=RULE), metric.wanda, allocate.per_layer)(net(), 0.5)
    code = str(caught.value).split("collect=")[1].split("; outside")[0]
    code = code.replace("where=...", "where=RULE").replace("Calibration(batches)", "Calibration([X])")
    collector = eval(code, {"bp": bp, "partial": partial, "RULE": RULE, "X": X})
    assert bp.sparsity(bp.Pipeline(collector, metric.wanda, allocate.per_layer)(net(), 0.5)) == 0.5


# What a user declares.


def own_update(sums: statistics.Sums, call: statistics.Call) -> statistics.Sums:
    return statistics.output_sq.update(sums, call)


OWN = attrs.evolve(statistics.output_sq, name="own", update=own_update)


@bp.requires(OWN, statistics.input_sq)
def own_metric(data: bp.Data, *, power: float = 1.0) -> bp.Scores:
    """Its docstring."""
    return {n: bp.BlockScore(bp.pool((p.stats["own"] * p.stats["input_sq"]) ** power, p.grid), p.grid) for n, p in data.items()}


def test_own_metrics_and_statistics_are_named_as_the_user_names_them() -> None:
    with pytest.raises(ValueError) as caught:
        own_metric(collected(statistics.input_sq))
    text = str(caught.value)
    assert "0.weight (8, 6): own_metric needs the statistic 'own'; the data has ['input_sq']" in text
    assert "statistics=[own]" in text


def test_statistics_are_added_to_those_that_a_collector_names() -> None:
    asked: list[tuple[str, ...]] = []

    def collector(model: nn.Module, statistics: Any = (statistics.output_mean, OWN), lazy: bool = False) -> bp.Data:
        asked.append(tuple(s.name for s in statistics))
        return collected(*statistics)

    scores = bp.Pipeline(collector, partial(own_metric, power=0.5), allocate.per_layer).scores(net())
    assert asked == [("output_mean", "own", "input_sq")]
    assert scores == own_metric(collected(OWN, statistics.input_sq), power=0.5)


def test_a_named_statistic_is_used_instead_of_the_required_one_of_its_name() -> None:
    probes = statistics.gate_hessian_diagonal(probes=8, seed=3)
    collector = partial(collect.with_statistics, where=RULE, batches=[X], loss=loss, statistics=[probes])
    scores = bp.Pipeline(collector, metric.obd, allocate.per_layer).scores(net())
    assert scores == metric.obd(collected(probes))
    assert scores != metric.obd(collected(statistics.gate_hessian_diagonal()))


@pytest.mark.parametrize("function", [metric.obs, reconstruct.least_squares, own_metric], ids=lambda f: f.__name__)
def test_a_declared_function_looks_like_a_plain_one(function: Callable[..., Any]) -> None:
    assert pickle.loads(pickle.dumps(function)) is function
    assert next(iter(inspect.signature(function).parameters)) == "data"
    assert inspect.getdoc(function)
    assert [s.name for s in required_statistics(partial(partial(function), memory=1))] == [s.name for s in function.requires]  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) .*wrong_option"):
        function({}, wrong_option=1)
