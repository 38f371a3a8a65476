"""Arguments of the wrong kind: numbers, functions and models. The error names the argument, and nothing is changed."""

import copy
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import blockprune as bp
from blockprune import export, losses
from blockprune.core.arguments import check_counts, check_function, check_integer, check_number

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


def run(parameters: Any, batch: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = batch @ parameters["2.weight"].mT
    return output


finetune = partial(
    bp.finetune_layer,
    run=run,
    parameters={"2.weight": torch.ones(4, 16)},
    masks={"2.weight": MASKS["2.weight"]},
    batches=[torch.ones(2, 16)] * 2,
    targets=[torch.ones(2, 4)] * 2,
)
LAYERWISE = bp.recipes.sparsegpt(WHERE, bp.Calibration([X]))
sequential = partial(
    bp.sequential, network(), LAYERWISE.pipeline, reconstruct=LAYERWISE.reconstruct, batches=[X], sparsity=0.5, progress=False
)
sweep = partial(bp.sweep, network(), {"l1": PIPELINE}, [0.5], evaluate=lambda model: 0.0, progress=False)
cluster = partial(
    bp.cluster, bp.metric.l1(bp.collect.weights(network(), where=bp.linears((1, 1)))), bp.find_axes(network(), X), block=(4, 4)
)
admm = partial(bp.regularizers.admm, network(), where=WHERE)
SCHEDULES = (bp.schedule.linear, bp.schedule.cubic, bp.schedule.cosine, bp.schedule.exponential)
muon = partial(bp.muon, list(network().parameters()))
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
    *((partial(schedule, final=0.5, end=9), "step") for schedule in SCHEDULES),
    *((partial(schedule, 1, **{"final": 0.5, "end": 9}), name) for schedule in SCHEDULES for name in ("final", "end", "begin", "initial")),
    (partial(bp.schedule.constant, 1), "value"),
    (partial(bp.schedule.steps, milestones={2: 0.5}), "step"),
    (partial(bp.schedule.steps, 1, milestones={2: 0.5}), "initial"),
    (lambda milestones: bp.schedule.steps(1, milestones={2: milestones}), "milestones"),
    *((finetune, name) for name in ("epochs", "lr", "held_out", "patience", "seed")),
    *((partial(bp.recipes.sparsegpt, WHERE, [X]), name) for name in ("damping", "columns")),
    *((partial(bp.recipes.obs, WHERE, [X]), name) for name in ("damping", "max_layer_sparsity", "passes")),
    *((partial(bp.recipes.cluster_units, network(), WHERE, [X]), name) for name in ("sparsity", "passes")),
    *((cluster, name) for name in ("sparsity", "rounds")),
    *((bp.gates.hard_concrete, name) for name in ("temperature", "low", "high")),
    (bp.gates.soft_movement, "threshold"),
    *((bp.gates.n_of_m, name) for name in ("n", "m", "axis", "temperature")),
    (lambda cost: bp.gates.penalty(bp.gates.add(network(), where=WHERE), sparsity=0.5, costs={"*": cost}), "cost"),
    (partial(bp.Calibration, [X]), "chunk_size"),
    (sensitivity, "chunk_size"),
    *((distill, name) for name in ("steps", "warmup", "accumulate", "every", "seed", "final_lr", "clip", "lora_rank")),
    (kl, "temperature"),
    (kl, "top_k"),
    (muon, "lr"),
    (muon, "weight_decay"),
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
    *((sequential, name) for name in ("reconstruct", "loss", "forward", "token_weights", "reduce", "callback")),
    *((sweep, name) for name in ("evaluate", "callback")),
    (finetune, "run"),
    (admm, "prune"),
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
    partial(bp.find_axes, example=X),
    partial(bp.permute, plan=[]),
    partial(bp.recipes.cluster_units, where=WHERE, calibration=[X]),
    partial(bp.sweep, recipes={"l1": PIPELINE}, sparsities=[0.5], evaluate=max),
    partial(bp.zero_new_blocks, masks=MASKS),
    export.block_sparse,
    export.choose,
]

# what is no number, function or model: (call, the argument and the end of the message)
OTHERS: list[tuple[Callable[[], Any], str]] = [
    (lambda: sequential(callback=0), "callback=0 must be a function"),
    (lambda: sequential(layers=3), r"layers has 3; give a sequence of the layers' names"),
    (lambda: sequential(layers=[0]), "layers has 0"),
    (lambda: sequential(extra_data=0), "extra_data is a int; give data by parameter name"),
    (lambda: sequential(extra_data=["0.weight"]), "extra_data is a list"),
    (lambda: sequential(resume="repair.safetensors"), "resume has the type str; give a PruningResult"),
    (lambda: sequential(resume=0), "resume has the type int"),
    (lambda: distill(callback=0), "callback=0 must be a function"),
    (lambda: distill(train=1), "train is a int; it must be True or False"),
    (lambda: distill(checkpointing=0), "checkpointing is a int; it must be True or False"),
    (lambda: distill(held_out=X), "held_out is one Tensor; give an iterable of batches"),
    (lambda: sweep(resume="sweep.json"), "resume has the type str; give a Sweep"),
    (lambda: admm(prune=max, previous=MASKS), "previous has the type dict; give what bp.regularizers.admm returned"),
    (lambda: bp.regularizers.admm_penalty(network(), MASKS, rho=1), "state has the type dict"),  # type: ignore[arg-type]
    (lambda: bp.gates.penalty(bp.gates.add(network(), where=WHERE), sparsity=0.5, costs=1), "costs=1 must be a mapping"),  # type: ignore[arg-type]
    (lambda: cluster(block=4), r"block=4 must be a sequence of integers"),
    (lambda: cluster(block="44"), r"block='44' must be a sequence of integers"),
    (lambda: bp.recipes.cluster_units(network(), WHERE, [X], block=4), "block=4 must be a sequence of integers"),  # type: ignore[arg-type]
    (lambda: bp.schedule.steps(1, milestones=0.5), "milestones=0.5 must be a mapping from steps to sparsities"),  # type: ignore[arg-type]
    (lambda: export.update(masked(), MASKS, optimizer="adam"), "optimizer"),  # type: ignore[arg-type]
]
# numbers that make no sense: (call, the argument)
NONSENSE: list[tuple[Callable[..., Any], str, float]] = [
    *(
        (partial(schedule, 1, **{"final": 0.5, "end": 9}), name, wrong)
        for schedule in SCHEDULES
        for name in ("final", "initial")
        for wrong in (-1, 2, math.inf)
    ),
    *((partial(bp.schedule.constant, 1), "value", wrong) for wrong in (-0.1, 50)),
    *((muon, name, math.inf) for name in ("lr", "weight_decay")),
    *(
        (finetune, *wrong)
        for wrong in (("epochs", -1), ("patience", -1), ("lr", math.inf), ("lr", -1), ("held_out", -0.5), ("held_out", 1.5))
    ),
    *((partial(bp.recipes.obs, WHERE, [X]), "max_layer_sparsity", wrong) for wrong in (-1, 1.5)),
    *((bp.gates.hard_concrete, *wrong) for wrong in (("temperature", math.inf), ("low", -math.inf), ("high", math.inf), ("low", 0.1))),
    *((bp.gates.n_of_m, *wrong) for wrong in (("temperature", math.inf), ("axis", 0.5), ("axis", True), ("n", True))),
    (kl, "temperature", math.inf),
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


@pytest.mark.parametrize(("call", "says"), OTHERS, ids=[says for _, says in OTHERS])
def test_an_argument_of_another_type_is_refused_by_name(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        call()


@pytest.mark.parametrize(("function", "name", "wrong"), NONSENSE, ids=named)
def test_a_number_out_of_its_range_is_refused_by_name(function: Callable[..., Any], name: str, wrong: float) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        function(**{name: wrong})


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


def same(a: Any, b: Any) -> bool:
    """Equal, in equal types: counts are kept as integers of Python."""
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.allclose(a.double(), b.double()) if isinstance(a, torch.Tensor) else type(a) is type(b) and repr(a) == repr(b)


COUNTS: list[tuple[Callable[..., Any], str]] = [
    (partial(bp.allocate.per_columns, SCORES, 0.5), "columns"),
    (lambda m: bp.allocate.n_of_m({"w": bp.BlockScore(torch.arange(3.0), bp.BlockGrid((3,), (1,)))}, 2 / 3, m=m, axis=0), "m"),
    (partial(bp.allocate.per_layer, SCORES, 0.9), "min_keep"),
    (kl, "top_k"),
    (partial(bp.Calibration, [X]), "chunk_size"),
    (lambda n: bp.gates.n_of_m(n, 4), "n"),
    (lambda m: bp.gates.n_of_m(2, m), "m"),
    (lambda axis: bp.gates.n_of_m(2, 4, axis=axis), "axis"),
    (partial(bp.metric.obs, DATA), "memory"),
    (partial(bp.metric.random, DATA), "generator"),
    (partial(bp.metric.sparsegpt, DATA, sparsity=0.5), "columns_per_step"),
    (partial(bp.reconstruct.least_squares, DATA, MASKS), "memory"),
    (partial(bp.reconstruct.sparsegpt, DATA, MASKS), "columns_per_step"),
    (partial(bp.recipes.sparsegpt, WHERE, [X]), "columns"),
    *((finetune, name) for name in ("epochs", "patience", "seed")),
    *((distill, name) for name in ("steps", "accumulate", "every", "seed", "lora_rank")),
    (sensitivity, "chunk_size"),
    (cluster, "rounds"),
    (lambda points: bp.pareto(SCORES, points=points), "points"),
    (lambda probes: bp.statistics.gate_hessian_diagonal(probes=probes), "probes"),
    (lambda seed: bp.statistics.gate_hessian_diagonal(seed=seed), "seed"),
]


@pytest.mark.parametrize("three", [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int16)], ids=repr)
@pytest.mark.parametrize(("function", "name"), COUNTS, ids=named)
def test_an_integer_of_numpy_or_torch_is_one_of_python(function: Callable[..., Any], name: str, three: Any) -> None:
    assert same(function(**{name: three}), function(**{name: 3}))


@pytest.mark.parametrize(
    "wrong", [True, np.True_, torch.tensor(True), torch.tensor([3]), torch.tensor(3.5), torch.tensor(3, device="meta")]
)
@pytest.mark.parametrize(("function", "name"), COUNTS, ids=named)
def test_what_is_no_integer_is_refused_by_name(function: Callable[..., Any], name: str, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}="):
        function(**{name: wrong})


@pytest.mark.parametrize(
    "function",
    [
        finetune,
        distill,
        partial(bp.statistics.gate_hessian_diagonal),
        lambda seed: bp.metric.random(DATA, generator=seed),
        lambda seed: bp.examples.digits.batches(epochs=1, seed=seed),
        lambda seed: bp.examples.digits.trained(epochs=0, seed=seed),
    ],
)
def test_a_seed_that_torch_does_not_take_is_refused_by_name(function: Callable[..., Any]) -> None:
    for seed in (2**64 - 1, -(2**63)):
        function(seed=seed)
    for seed in (2**64, -(2**63) - 1, 2**70):
        with pytest.raises(ValueError, match=rf"(seed|generator)={seed} must be an integer from -2\^63 to 2\^64 - 1"):
            function(seed=seed)


def test_a_memory_may_be_a_whole_float() -> None:
    for function in (partial(bp.metric.obs, DATA), partial(bp.reconstruct.least_squares, DATA, MASKS)):
        assert same(function(memory=1e9), function(memory=10**9))
        with pytest.raises(ValueError, match=r"memory=1\.5 must be an integer, at least 0, or a whole float"):
            function(memory=1.5)


def test_counts_are_returned_as_integers() -> None:
    assert check_counts(1, optional=True, whole_floats=True, a=np.array(2), b=None, c=1e3) == [2, None, 1000]
    with pytest.raises(ValueError, match="a=None must be an integer, at least 1"):
        check_counts(1, a=None)
    with pytest.raises(TypeError, match=r"seed=1\.0 must be an integer"):
        check_integer("seed", 1.0)
    with pytest.raises(ValueError, match="a=int must be an integer, at least 1"):
        check_counts(1, a=-(10**5000))  # too long to be written in decimals
    check_function("callback", None, "", optional=True)


HALVES = [np.float32(0.5), np.float16(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), Fraction(1, 2)]


@pytest.mark.parametrize("half", HALVES, ids=repr)
def test_any_number_without_axes_is_a_number(half: Any) -> None:
    calls: list[Callable[[Any], Any]] = [
        lambda damping: bp.metric.obs(DATA, damping=damping),
        lambda sparsity: bp.allocate.per_layer(SCORES, sparsity),
        lambda sparsity: bp.allocate.per_layer(SCORES, {"*": sparsity}),
        lambda sparsity: bp.budgets.lagrangian(SCORES, sparsity, max_sparsity=sparsity),
        lambda cost: bp.budgets.lagrangian(SCORES, 0.5, cost={"*": cost}),
        lambda fraction: bp.regrow(MASKS, drop=SCORES, grow=SCORES, fraction=fraction),
        lambda p: bp.metric.lp(DATA, p=p),
        lambda temperature: kl(temperature=temperature),
        lambda weight: losses.weighted({losses.kl: weight})(torch.ones(2, 3), torch.eye(3)[:2], None),
        lambda strength: bp.regularizers.group_lasso(network(), where=WHERE, l1_ratio=strength),
        lambda strength: bp.regularizers.proximal_group_lasso(network(), where=WHERE, strength=strength).state_dict(),
        lambda threshold: bp.gates.soft_movement(threshold=threshold).value(X, True),
        lambda temperature: bp.gates.n_of_m(temperature=temperature).open_probability(X),
        lambda low: bp.gates.hard_concrete(low=-low).value(X, False),
        lambda initial: bp.gates.scores(bp.gates.add(network(), where=WHERE, initial=initial)),
        lambda lr: finetune(lr=lr),
        lambda held_out: finetune(held_out=held_out),
        lambda share: bp.sensitivity(network(), PIPELINE, [share], evaluate=lambda model: model(X).square().mean()).losses,
    ]
    for call in calls:
        assert same(call(half), call(0.5))


@pytest.mark.parametrize("wrong", [True, np.True_, torch.tensor(True), torch.tensor(0.5, device="meta"), 1j, torch.tensor(1j), None, "1"])
def test_what_is_no_number_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"p=.* must be a finite number$"):
        check_number("p", wrong)
    with pytest.raises(TypeError, match=r"p=.* must be a number$"):
        check_number("p", wrong, finite=False)


@pytest.mark.parametrize("huge", [10**400, -(10**400), 10**5000, Fraction(10**400)], ids=["1e400", "-1e400", "1e5000", "fraction"])
def test_a_number_beyond_the_range_of_floats_is_refused(huge: Any) -> None:
    for finite in (True, False):
        with pytest.raises(ValueError, match=r"damping must be a .*number; it is beyond the range"):
            check_number("damping", huge, finite=finite)


def test_a_number_keeps_its_gradient() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    losses.weighted({losses.kl: weight})(torch.ones(2, 3), torch.eye(3)[:2], None).backward()
    assert weight.grad is not None
    assert check_number("p", weight) is weight


STEPS = [3, 3.0, torch.tensor(3), np.int64(3), np.array(3), np.float32(3)]


@pytest.mark.parametrize("step", STEPS, ids=repr)
@pytest.mark.parametrize("schedule", [*SCHEDULES, bp.schedule.steps, bp.schedule.constant], ids=named)
def test_schedules_return_floats(schedule: Callable[..., Any], step: Any) -> None:
    half = torch.tensor(0.5)
    options: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = {
        bp.schedule.steps: ({"milestones": {2: half, torch.tensor(4): 0.75}}, {"milestones": {2: 0.5, 4: 0.75}}),
        bp.schedule.constant: ({"value": half}, {"value": 0.5}),
    }
    given, plain = options.get(schedule, ({"final": half, "end": torch.tensor(6)}, {"final": 0.5, "end": 6}))
    found = schedule(step, **given)
    assert type(found) is float
    assert found == schedule(3, **plain)
    assert bp.sparsity(PIPELINE(network(), found)) <= 0.5


def test_a_schedule_of_percents_is_refused() -> None:
    with pytest.raises(ValueError, match=r"final=20\.0 must be from 0 .* to 1 .*; 50 % is 0\.5"):
        bp.schedule.linear(1, final=20.0, end=2)


def test_what_numpy_calls_true_is_named_in_full() -> None:
    with pytest.raises(TypeError, match=r"train is a numpy\.bool_?; it must be True or False"):
        distill(train=np.True_)


@pytest.mark.parametrize(
    "blocks", [np.array([[4, 4]]), [np.array([4, 4])], [(np.int64(4), 4)], iter([[4, 4]])], ids=["array", "arrays", "integers", "iterator"]
)
def test_blocks_to_recommend_may_be_arrays(blocks: Any) -> None:
    table = export.recommend_blocks(MASKS, rows=2, blocks=blocks, sparsities=iter([0.5]), rounds=1, progress=False)  # type: ignore[arg-type]
    assert {row.block for row in table.rows} == {(4, 4)}


@pytest.mark.parametrize(
    "call",
    [
        lambda loss: bp.Calibration([torch.ones(1)], loss=loss),
        lambda loss: bp.Calibration([torch.ones(1)], forward=loss),
        lambda loss: bp.sensitivity(network(), PIPELINE, [0.5], loss),
        lambda loss: bp.sweep(network(), {"l1": PIPELINE}, [0.5], loss),
    ],
)
def test_the_class_of_a_module_is_no_function(call: Callable[[Any], object]) -> None:
    with pytest.raises(
        TypeError, match=r"=CrossEntropyLoss is a class; give a function \(.*\) -> .*, or a module .*: CrossEntropyLoss\(\)"
    ):
        call(nn.CrossEntropyLoss)
