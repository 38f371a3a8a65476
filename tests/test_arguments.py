"""Arguments of the wrong kind: numbers, functions and models. The error names the argument, and nothing is changed."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import blockprune as bp
from blockprune import export, losses

WHERE = bp.linears((4, 4))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
DATA = bp.collect.with_statistics(network(), where=WHERE, statistics=[bp.statistics.input_gram], batches=[X])
SCORES = bp.metric.l1(DATA)
MASKS = bp.allocate.per_layer(SCORES, 0.5)
PIPELINE = bp.Pipeline(partial(bp.collect.weights, where=WHERE), bp.metric.l1, bp.allocate.per_layer)


def masked() -> nn.Module:
    return bp.apply_masks(network(), MASKS)


distill = partial(bp.distill, network(), MASKS, None, [X], teacher=network(), loss=losses.kl, steps=1)
sensitivity = partial(bp.sensitivity, network(), PIPELINE, [0.5], evaluate=lambda model: model(X).square().mean())
kl = partial(losses.kl, torch.ones(2, 3), torch.ones(2, 3))
NUMBERS: list[tuple[Callable[..., Any], str]] = [
    (partial(bp.metric.lp, DATA), "p"),
    (partial(bp.metric.obs, DATA), "damping"),
    (partial(bp.metric.obs, DATA), "stop_at"),
    (partial(bp.metric.obs, DATA), "memory"),
    (partial(bp.metric.sparsegpt, DATA, sparsity=0.5), "damping"),
    (partial(bp.metric.sparsegpt, DATA, sparsity=0.5), "columns_per_step"),
    (partial(bp.metric.sparsegpt, DATA), "sparsity"),
    (partial(bp.allocate.per_layer, SCORES), "sparsity"),
    (partial(bp.allocate.per_columns, SCORES, 0.5), "columns"),
    (partial(bp.reconstruct.least_squares, DATA, MASKS), "damping"),
    (partial(bp.reconstruct.least_squares, DATA, MASKS), "memory"),
    (partial(bp.reconstruct.sparsegpt, DATA, MASKS), "columns_per_step"),
    *((partial(schedule, final=0.5, end=9), "step") for schedule in (bp.schedule.linear, bp.schedule.cubic, bp.schedule.cosine)),
    *((partial(bp.schedule.exponential, 1, **{"final": 0.5, "end": 9}), name) for name in ("final", "end", "begin", "initial")),
    (partial(bp.Calibration, [X]), "chunk_size"),
    (sensitivity, "chunk_size"),
    *((distill, name) for name in ("steps", "warmup", "accumulate", "every", "seed", "final_lr", "clip", "lora_rank")),
    (kl, "temperature"),
    (kl, "top_k"),
    (partial(bp.muon, list(network().parameters())), "lr"),
    (partial(bp.muon, list(network().parameters())), "weight_decay"),
    (partial(export.choose, masked(), progress=False), "rows"),
    (partial(export.choose, masked(), progress=False), "rounds"),
    (partial(export.choose, masked(), progress=False), "max_error"),
    (partial(bp.metric.random, DATA), "generator"),
    (partial(bp.regrow, MASKS, drop=SCORES, grow=SCORES), "fraction"),
]
FUNCTIONS: list[tuple[Callable[..., Any], str]] = [
    (partial(bp.metric.obs, DATA), "share"),
    (partial(bp.reconstruct.least_squares, DATA, MASKS), "share"),
    (partial(bp.allocate.per_layer, SCORES, 0.5), "budget"),
    *((partial(bp.Calibration, [X]), name) for name in ("loss", "forward", "token_weights", "reduce")),
    *((distill, name) for name in ("loss", "optimizer", "forward", "callback")),
    (sensitivity, "evaluate"),
    (partial(export.choose, masked()), "forward"),
]
MODELS: list[Callable[[Any], Any]] = [
    partial(bp.apply_masks, masks=MASKS),
    bp.finalize,
    bp.read_masks,
    partial(bp.masked_parameters, masks=MASKS),
    partial(bp.masks_from_zeros, where=WHERE),
    partial(bp.collect.weights, where=WHERE),
    partial(bp.collect.with_statistics, where=WHERE, statistics=[bp.statistics.input_sq], batches=[X]),
    partial(bp.sensitivity, pipeline=PIPELINE, sparsities=[0.5], evaluate=max),
    partial(bp.distill, masks=MASKS, weights=None, batches=[X], teacher=None, loss=losses.kl),
    partial(bp.gates.add, where=WHERE),
    partial(bp.regularizers.group_lasso, where=WHERE),
    export.block_sparse,
    export.choose,
]


def named(case: Any) -> str | None:
    if isinstance(case, str):
        return case
    return getattr(getattr(case, "func", case), "__name__", None) if callable(case) else None


@pytest.mark.parametrize("wrong", ["0.5", [0.5], math.nan, torch.ones(2), nn.ReLU()], ids=["string", "list", "NaN", "tensor", "module"])
@pytest.mark.parametrize(("function", "name"), NUMBERS, ids=named)
def test_something_else_than_a_number_is_refused_by_name(function: Callable[..., Any], name: str, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        function(**{name: wrong})


@pytest.mark.parametrize(("function", "name"), FUNCTIONS, ids=named)
def test_something_else_than_a_function_is_refused_by_name(function: Callable[..., Any], name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}='lagrangian' must be a function"):
        function(**{name: "lagrangian"})


@pytest.mark.parametrize("function", MODELS, ids=named)
def test_a_state_dict_is_not_taken_for_a_model(function: Callable[[Any], Any]) -> None:
    state = network().state_dict()
    before = copy.deepcopy(state)
    with pytest.raises(TypeError, match=r"model has the type OrderedDict; give a torch\.nn\.Module"):
        function(state)
    assert all(torch.equal(state[name], value) for name, value in before.items())


@pytest.mark.parametrize("coupled", ["0.weight", 3, [3], torch.ones(2)], ids=["string", "number", "list of numbers", "tensor"])
def test_coupled_that_holds_no_names_is_refused(coupled: Any) -> None:
    with pytest.raises(TypeError, match="coupled"):
        bp.allocate.per_layer(SCORES, 0.5, coupled=coupled)


def test_other_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"cost=2.0 must be a mapping from parameter names or patterns to values"):
        bp.budgets.lagrangian(SCORES, 0.5, cost=2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"calibration has the type list; give bp\.Calibration"):
        bp.collect.with_statistics(network(), where=WHERE, statistics=[bp.statistics.input_sq], calibration=[X])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="batches is one str"):
        bp.Calibration("texts.txt")
    with pytest.raises(TypeError, match=r"where has 4; give names or patterns"):
        distill(where=[4])
    with pytest.raises(TypeError, match="optimizer=SGD must be a function"):
        distill(optimizer=torch.optim.SGD(network().parameters()))
    with pytest.raises(ValueError, match="backend="):
        export.block_sparse(masked(), backend=["native"])  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3)], ids=["int", "float", "tensor"])
def test_a_step_may_be_a_tensor_without_axes(step: Any) -> None:
    assert float(bp.schedule.linear(step, final=0.6, end=6)) == pytest.approx(0.3)
