"""A pipeline is three functions composed into a value; calling it changes nothing and keeps nothing."""

import copy
import pickle
import re
from functools import partial
from itertools import permutations
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from strategies import seeds, shares_memory, sparsities
from torch import nn

import blockprune as bp
from blockprune import allocate, budgets, collect, metric, schedule, statistics
from blockprune.core.types import Allocate, Collect, Metric
from blockprune.statistics import Statistic

TILES = partial(collect.weights, where=bp.linears((2, 2)))
PRUNE = bp.Pipeline(TILES, metric.l1, allocate.per_layer)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5, bias=False))


def state(model: nn.Module) -> list[tuple]:
    """Names, identities, addresses, versions, flags: all that a call might touch, without reading a value."""
    parameters = [(n, id(p), p.data_ptr(), p._version, p.requires_grad, p.grad) for n, p in model.named_parameters()]
    return parameters + [(n, type(m), m.training, tuple(m._forward_hooks), tuple(m._backward_hooks)) for n, m in model.named_modules()]


@given(seeds, sparsities)
def test_a_call_is_its_three_stages_one_after_the_other(seed: int, sparsity: float) -> None:
    model = net()
    prune = attrs.evolve(PRUNE, metric=partial(metric.random, generator=seed))
    by_hand = allocate.per_layer(metric.random(collect.weights(model, where=bp.linears((2, 2))), generator=seed), sparsity)
    assert prune(model, sparsity) == by_hand
    assert prune.allocate(prune.scores(model), sparsity) == by_hand


def test_a_mapping_of_sparsities_names_all_parameters_or_has_a_star() -> None:
    with pytest.raises(KeyError, match=r"sparsity has no key for '2\.weight'; add one, or the key '\*'"):
        PRUNE(net(), {"0.weight": 0.5})
    masks = PRUNE(net(), {"*": 0.0, "0.weight": 0.5})
    assert masks["2.weight"].keep.all()
    assert masks["0.weight"] == PRUNE(net(), 0.5)["0.weight"]


def test_scores_made_once_are_allocated_at_many_sparsities() -> None:
    model, calls = net(), []
    counted = attrs.evolve(PRUNE, metric=lambda data: calls.append(1) or metric.l1(data))
    scores = counted.scores(model)
    masks = [counted.allocate(scores, s) for s in (0.0, 0.25, 0.5, 1.0)]
    assert calls == [1]
    assert masks == [PRUNE(model, s) for s in (0.0, 0.25, 0.5, 1.0)]


def test_the_step_lives_in_the_users_loop() -> None:
    model, target = net(), partial(schedule.cubic, final=0.8, begin=1, end=5)
    reached = []
    for step in range(7):
        bp.apply_masks(model, PRUNE(model, target(step)))
        reached.append(bp.sparsity(bp.read_masks(model)))
    assert reached == sorted(reached)
    assert reached[0] == 0
    assert reached[-1] == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("score", [metric.l1, metric.l2, metric.lamp, metric.random], ids=lambda f: f.__name__)
@pytest.mark.parametrize("choose", [allocate.per_layer, allocate.per_row, allocate.per_model], ids=lambda f: f.__name__)
@pytest.mark.parametrize("masked", [False, True])
def test_a_call_leaves_the_model_alone_and_its_masks_share_nothing_with_it(score: Metric, choose: Allocate, masked: bool) -> None:
    model = net()
    if masked:
        bp.apply_masks(model, PRUNE(model, 0.3))
    before, values = state(model), copy.deepcopy(model.state_dict())
    prune = bp.Pipeline(TILES, score, choose)
    masks, scores = prune(model, 0.5), prune.scores(model)
    assert state(model) == before
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in values.items())
    assert not any(shares_memory(m.keep, *model.state_dict().values()) for m in masks.values())
    assert not any(shares_memory(s.value, *model.state_dict().values()) for s in scores.values())


def _live(model: nn.Module) -> bp.Data:
    """A careless collector: the model's own memory."""
    return {"0.weight": bp.Param(model[0].weight.detach(), bp.BlockGrid(model[0].weight.shape, (1, 1)))}


@pytest.mark.parametrize("collected", [partial(collect.weights, where=bp.linears((1, 1))), _live], ids=["lazy", "live"])
def test_scores_do_not_follow_the_model_nor_the_model_the_scores(collected: Collect) -> None:
    model = net()
    scores = attrs.evolve(PRUNE, collect=collected, metric=_views).scores(model)
    frozen, weight = scores["0.weight"].value.clone(), model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(scores["0.weight"].value, frozen)
    scores["0.weight"].value.zero_()
    assert torch.equal(model[0].weight, weight + 1)


def _views(data: bp.Data) -> bp.Scores:
    """A careless metric: of single elements, the weight is the score."""
    return {name: bp.BlockScore(p.weight, p.grid) for name, p in data.items()}


def _undefined(data: bp.Data) -> bp.Scores:
    return {name: bp.BlockScore(score.value * torch.nan, score.grid) for name, score in metric.l1(data).items()}


def test_a_metric_that_writes_into_its_data_does_not_reach_the_model() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())

    def careless(data: bp.Data) -> bp.Scores:
        for p in data.values():
            p.weight.abs_().mul_(0)
        return metric.l1(data)

    bp.Pipeline(TILES, careless, allocate.per_layer)(model, 0.5)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_any_three_functions_are_a_pipeline() -> None:
    def biases(model: nn.Module) -> bp.Data:
        return {n: bp.Param(p.detach().clone(), bp.BlockGrid(p.shape, (2,))) for n, p in model.named_parameters() if p.ndim == 1}

    def negated(data: bp.Data) -> bp.Scores:
        return {n: bp.BlockScore(-bp.pool(p.weight, p.grid), p.grid) for n, p in data.items()}

    def all_but_the_best(scores: bp.Scores, sparsity: float) -> bp.Masks:
        return {n: bp.BlockMask(s.value == s.value.max(), s.grid) for n, s in scores.items()}

    (mask,) = bp.Pipeline(biases, negated, all_but_the_best)(net(), 0.5).values()
    assert int(mask.keep.sum()) == 1


def test_a_stage_is_swapped_by_evolve_and_the_pipeline_itself_never_changes() -> None:
    swapped = attrs.evolve(
        PRUNE, allocate=partial(allocate.n_of_m, m=2), collect=partial(collect.weights, where=bp.linears((1, 1)), lazy=False)
    )
    assert swapped.metric is PRUNE.metric
    assert all((m.keep.unflatten(1, (-1, 2)).sum(-1) == 1).all() for m in swapped(net(), 0.5).values())
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        PRUNE.metric = metric.l2  # type: ignore[misc]


def test_a_pipeline_pickles_and_copies() -> None:
    prune = bp.Pipeline(
        partial(collect.weights, where=bp.first_of(bp.named(re.compile("^0.w"), (2, 2)), bp.linears((1,)))),
        partial(metric.lp, p=3),
        partial(allocate.per_model, max_sparsity={"*": 0.8}, coupled=[("0.*",)]),
    )
    model = net()
    for copied in (pickle.loads(pickle.dumps(prune)), copy.deepcopy(prune)):
        assert copied(model, 0.5) == prune(model, 0.5)
        assert repr(copied) == repr(prune)


class Doubled:
    """A stage may be an object that is called."""

    def __call__(self, data: bp.Data) -> bp.Scores:
        return metric.l1(data)


@pytest.mark.parametrize(
    ("prune", "text"),
    [
        (PRUNE, "Pipeline(collect=weights(where=linears(block=(2, 2))), metric=l1, allocate=per_layer)"),
        (attrs.evolve(PRUNE, collect=partial(collect.weights, where=bp.convs([1]))), "collect=weights(where=convs(block=(1,)))"),
        (attrs.evolve(PRUNE, collect=partial(collect.weights, where=bp.excluding(bp.linears((4, 4)), "head.*"), masked=True)),
         "weights(where=excluding(rule=linears(block=(4, 4)), pattern='head.*'), masked=True)"),
        (attrs.evolve(PRUNE, collect=partial(collect.weights, where=bp.first_of(bp.named(re.compile("^a"), (1,)), bp.linears((2,))))),
         "first_of(named(pattern=re.compile('^a'), block=(1,)), linears(block=(2,)))"),
        (attrs.evolve(PRUNE, metric=partial(metric.lp, p=3)), "metric=lp(p=3)"),
        (attrs.evolve(PRUNE, metric=partial(_views, torch.ones(2, 3))), "views(Tensor((2, 3), torch.float32))"),
        (attrs.evolve(PRUNE, metric=Doubled()), "Doubled object"),
        (attrs.evolve(PRUNE, metric=lambda data: metric.lp(data, p=3)), "metric=<lambda>"),
        (attrs.evolve(PRUNE, allocate=partial(allocate.per_layer, budget=budgets.erk, min_keep={"a.*": 2}, coupled=[("a", "b")])),
         "allocate=per_layer(budget=erk, min_keep={'a.*': 2}, coupled=[('a', 'b')])"),
        (attrs.evolve(PRUNE, allocate=partial(partial(allocate.n_of_m, m=4), axis=0)), "allocate=n_of_m(m=4, axis=0)"),
        (attrs.evolve(PRUNE, metric=partial(metric.random, generator=torch.Generator())), "random(generator="),
    ],
)  # fmt: skip
def test_a_pipeline_reads_as_it_would_be_written_without_addresses(prune: bp.Pipeline, text: str) -> None:
    assert text in repr(prune)
    assert " at 0x" not in repr(prune)
    assert "functools" not in repr(prune)


# What a pipeline passes on: required statistics to the collector, the sparsity to the metric.


@bp.requires(statistics.input_sq, statistics.output_sq)
def _powers(data: bp.Data) -> bp.Scores:
    """A metric that requires two statistics."""
    assert all({"input_sq", "output_sq"} <= set(p.stats) for p in data.values())
    return metric.l1(data)


BOUND: dict[str, tuple[tuple[Statistic, ...] | None, list[str]]] = {
    "none": (None, ["input_sq", "output_sq"]),
    "others": ((statistics.input_gram,), ["input_gram", "input_sq", "output_sq"]),
    "one of them": ((statistics.output_sq, statistics.input_gram), ["output_sq", "input_gram", "input_sq"]),
}


@pytest.mark.parametrize(("bound", "expected"), BOUND.values(), ids=BOUND)
@pytest.mark.parametrize("score", [_powers, partial(_powers)], ids=["plain", "partial"])
def test_the_collector_is_given_the_statistics_that_the_metric_requires(
    score: Metric, bound: tuple[Statistic, ...] | None, expected: list[str]
) -> None:
    collected: list[list[str]] = []

    def counted(model: nn.Module, *, statistics: tuple[Statistic, ...], lazy: bool) -> bp.Data:
        collected.append([s.name for s in statistics])
        return collect.with_statistics(model, where=bp.linears((2, 2)), statistics=statistics, batches=[torch.ones(3, 6)], lazy=lazy)

    collector = counted if bound is None else partial(counted, statistics=bound)
    masks = bp.Pipeline(collector, score, allocate.per_layer)(net(), 0.5)
    assert collected == [expected]
    assert masks == PRUNE(net(), 0.5)


def test_a_metric_that_requires_nothing_leaves_the_statistics_to_the_collector() -> None:
    def counted(model: nn.Module, *, statistics: object = "its own") -> bp.Data:
        assert statistics == "its own"
        return collect.weights(model, where=bp.linears((2, 2)))

    assert bp.Pipeline(counted, metric.l1, allocate.per_layer)(net(), 0.5) == PRUNE(net(), 0.5)


def test_a_collector_without_an_option_for_statistics_is_called_as_it_is() -> None:
    prune = bp.Pipeline(lambda model: collect.weights(model, where=bp.linears((2, 2))), _powers, allocate.per_layer)
    with pytest.raises(ValueError, match=r"0\.weight \(8, 6\): _powers needs the statistic 'input_sq'"):
        prune(net(), 0.5)


def test_the_sparsity_reaches_a_metric_that_asks_for_it() -> None:
    asked: list[object] = []

    def depends(data: bp.Data, *, sparsity: float) -> bp.Scores:
        asked.append(sparsity)
        return metric.l1(data)

    prune = attrs.evolve(PRUNE, metric=depends)
    assert prune(net(), 0.5) == PRUNE(net(), 0.5)
    data = collect.weights(net(), where=bp.linears((2, 2)))
    prune.score(data, {"*": 0.25})
    prune.scores(net(), 0.75)
    attrs.evolve(prune, metric=partial(depends, sparsity=0.1))(net(), 0.5)  # what is bound stays
    assert asked == [0.5, {"*": 0.25}, 0.75, 0.1]
    with pytest.raises(TypeError, match="sparsity"):
        prune.score(data)


def test_a_metric_with_a_default_sparsity_keeps_it() -> None:
    def depends(data: bp.Data, *, sparsity: float = 0.2) -> bp.Scores:
        assert sparsity == 0.2
        return metric.l1(data)

    assert attrs.evolve(PRUNE, metric=depends)(net(), 0.5) == PRUNE(net(), 0.5)


@pytest.mark.parametrize(
    ("prune", "text"),
    [
        (attrs.evolve(PRUNE, collect=lambda model: [model]), "collect must return a mapping from parameter names to Param, not a list"),
        (attrs.evolve(PRUNE, collect=lambda model: {"w": model}),
         r"collect must return Param values, but returned a Sequential for 'w'; wrap it: Param\(weight, grid\)"),
        (attrs.evolve(PRUNE, metric=lambda data: {n: p.weight for n, p in data.items()}),
         r"metric must return BlockScore values, but returned a Tensor for '0\.weight'; wrap it: BlockScore\(value, grid\)"),
        (attrs.evolve(PRUNE, metric=lambda data: None), "metric must return a mapping from parameter names to BlockScore, not a NoneType"),
        (attrs.evolve(PRUNE, allocate=lambda scores, sparsity: {n: s.value > 0 for n, s in scores.items()}),
         r"allocate must return BlockMask values, but returned a Tensor for '0\.weight'; wrap it: BlockMask\(keep, grid\)"),
    ],
)  # fmt: skip
def test_a_stage_that_returns_something_else_is_named(prune: bp.Pipeline, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        prune(net(), 0.5)


@pytest.mark.parametrize("stage", ["collect", "metric", "allocate"])
def test_a_stage_that_is_no_function_is_refused_by_name(stage: str) -> None:
    with pytest.raises(TypeError, match=f"'{stage}' must be callable"):
        attrs.evolve(PRUNE, **{stage: "l1"})


STAGES = (partial(collect.weights, where=bp.linears((2, 2))), metric.l1, partial(allocate.n_of_m, m=2))


@pytest.mark.parametrize("stages", list(permutations(STAGES))[1:])
def test_stages_in_another_order_are_refused_with_the_order(stages: tuple[Any, ...]) -> None:
    with pytest.raises(
        TypeError, match=r"is a function of bp.(collect|metric|allocate); give .* order Pipeline\(collect, metric, allocate\)"
    ):
        bp.Pipeline(*stages)


@pytest.mark.parametrize(
    ("prune", "sparsity", "error"),
    [
        (PRUNE, 1.5, ValueError),
        (PRUNE, {"typo": 0.5}, KeyError),
        (PRUNE, {"0.weight": 0.5}, KeyError),
        (attrs.evolve(PRUNE, collect=partial(collect.weights, where=bp.linears((9, 9)))), 0.5, ValueError),
        (attrs.evolve(PRUNE, metric=_undefined), 0.5, ValueError),
        (attrs.evolve(PRUNE, allocate=partial(allocate.n_of_m, m=3)), 0.5, ValueError),
    ],
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_a_failed_call_leaves_the_model_as_it_was(prune: bp.Pipeline, sparsity: object, error: type[Exception], masked: bool) -> None:
    model = net()
    if masked:
        bp.apply_masks(model, PRUNE(model, 0.3))
    before, values = state(model), copy.deepcopy(model.state_dict())
    with pytest.raises(error):
        prune(model, sparsity)
    assert state(model) == before
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in values.items())


METRICS = {
    "l1": metric.l1,
    "l2": metric.l2,
    "max": partial(metric.lp, p=torch.inf),
    "lamp": metric.lamp,
    "random": partial(metric.random, generator=0),  # does not look at the weights
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("score", METRICS.values(), ids=METRICS)
def test_a_weight_with_nan_or_inf_is_refused_by_name_whatever_the_metric(value: float, score: Metric) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[3, 1] = value
    with pytest.raises(ValueError, match=r"2\.weight.*\(5, 8\).*NaN or inf.*excluding"):
        attrs.evolve(PRUNE, metric=score)(model, 0.5)


def test_a_metric_that_needs_the_sparsity_says_so() -> None:
    collector = partial(collect.with_statistics, where=bp.linears((2, 2)), batches=[torch.randn(8, 6)])
    prune = bp.Pipeline(collector, metric.sparsegpt, allocate.per_columns)
    with pytest.raises(TypeError, match=r"metric=sparsegpt scores for one sparsity: .*pipeline\.scores\(model, sparsity\)"):
        prune.scores(net())
    assert prune.allocate(prune.scores(net(), 0.5), 0.5) == prune(net(), 0.5)


def test_a_stage_that_was_called_already_is_refused_without_its_values() -> None:
    with pytest.raises(TypeError, match=r"^'collect' must be callable, but is a dict; give a function \(model\) -> data, such as partial"):
        attrs.evolve(PRUNE, collect=collect.weights(net(), where=bp.linears((1, 1))))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda value: value.to(torch.float8_e4m3fn), TypeError, r"0\.weight: the scores of metric \(4, 3\) are torch.float8_e4m3fn"),
        (lambda value: value.to_sparse(), TypeError, r"0\.weight: the scores of metric \(4, 3\) are sparse"),
        (lambda value: value.to("meta"), ValueError, r"0\.weight: the scores of metric \(4, 3\) are on the meta device"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused_by_name(change: Any, error: type[Exception], message: str) -> None:
    def own(data: bp.Data) -> bp.Scores:
        return {name: attrs.evolve(score, value=change(score.value)) for name, score in metric.l1(data).items()}

    with pytest.raises(error, match=message):
        attrs.evolve(PRUNE, metric=own)(net(), 0.5)
