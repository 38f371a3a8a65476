"""Every stage keeps its tensors on the model's device and gives there what it gives on the CPU: on a GPU, or without one on `fake_device`.

The fake device changes what torch takes for an accelerator, so test_devices.py runs this file in a process of its own.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from fake_device import FAKE_DEVICE, FakeDeviceTensor, fake_device, to_fake_device
from torch import Tensor, nn

import blockprune as bp
from blockprune import allocate, budgets, collect, export, metric, reconstruct, statistics

WHERE = bp.first_of(bp.linears((4, 2)), bp.convs((4, 2)))
INPUTS = [statistics.input_gram, statistics.input_sq]
Result = Any  # tensors and numbers in lists, mappings and attrs values


class AttentionLayer(nn.Module):
    """A residual layer with attention heads and an MLP, as transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v, self.out = nn.LayerNorm(8), *(nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(self.norm(x)).unflatten(-1, (2, 4)).transpose(-3, -2) for layer in (self.q, self.k, self.v))
        x = x + self.out((torch.softmax(q @ k.mT, -1) @ v).transpose(-3, -2).flatten(-2))
        return x + self.down(torch.relu(self.up(x)))


def convolutions() -> nn.Module:
    first = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*first, nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))


def transformer() -> nn.Module:
    return nn.Sequential(AttentionLayer(), AttentionLayer(), nn.Linear(8, 8))


MODELS = {convolutions: (3, 4, 4, 4, 4), transformer: (3, 4, 5, 8)}  # and the shape of three batches


def loss(output: Tensor, batch: Any) -> Tensor:
    return output.flatten(1).logsumexp(1).mean()


def calibration(x: Tensor) -> bp.Calibration:
    return bp.Calibration(list(x), loss=loss, progress=False)


def data(model: nn.Module, x: Tensor, *of: statistics.Statistic) -> bp.Data:
    if not of:
        return collect.weights(model, where=WHERE)
    return collect.with_statistics(model, where=WHERE, statistics=of, calibration=calibration(x))


def repair_by_layer(model: nn.Module, x: Tensor, **options: Any) -> Result:
    pipeline = bp.Pipeline(partial(collect.with_statistics, where=WHERE, statistics=INPUTS), metric.obs, allocate.per_layer)
    result = bp.sequential(model, pipeline, partial(reconstruct.least_squares, damping=0.1), calibration(x), 0.5, **options)
    return result.weights, bp.apply_masks(model, result.masks, result.weights)(x[0])


def repair_at_once(model: nn.Module, x: Tensor, reconstruct: Any) -> Result:
    collected = data(model, x, *INPUTS, statistics.input_mean, statistics.bias)
    return reconstruct(collected, allocate.per_row(metric.wanda(collected), 0.5))


def reorder_units(model: nn.Module, x: Tensor) -> Result:
    elements = bp.first_of(bp.linears((1, 1)), bp.convs((1, 1)))
    collected = collect.with_statistics(model, where=elements, statistics=INPUTS, calibration=calibration(x))
    # rounded, because the compiled loop and torch differ in the last bits of a score, which would decide between equal exchanges
    scores = {n: attrs.evolve(s, value=s.value.to(torch.bfloat16).to(s.value)) for n, s in metric.obs(collected, stop_at=0).items()}
    plan = bp.cluster(scores, bp.find_axes(model, x[0]), block=(4, 2))
    by_score = bp.sort_units(metric.l2(collected), units=len(plan[0].order), rows=plan[0].rows[:1])
    return bp.permute(model, plan)(x[0]), [(p.order.tolist(), p.rows, p.columns) for p in (*plan, by_score)]


def export_kept_blocks(model: nn.Module, x: Tensor) -> Result:
    masked = bp.apply_masks(model, allocate.per_row(metric.l2(collect.weights(model, where=WHERE)), 0.5))
    in_int8 = export.block_sparse(masked, backend="torch", dtype="int8", inputs=x[0])
    return export.block_sparse(masked, backend="torch")(x[0]), export.dense(masked)(x[0]), in_int8(x[0])


def shrink(model: nn.Module, x: Tensor) -> Result:
    def rows(name: str, owner: nn.Module) -> tuple[int] | None:
        hidden = name.endswith("up.weight") or (isinstance(owner, nn.Conv2d) and name.endswith("weight"))
        return (1,) if hidden else None

    masked = bp.apply_masks(model, allocate.per_layer(metric.fpgm(collect.weights(model, where=rows)), 0.5))
    return export.shrink(masked, x[0]).model(x[0])


def train(model: nn.Module, x: Tensor) -> Result:
    masked = bp.apply_masks(model, allocate.per_model(metric.l1(collect.weights(model, where=WHERE)), 0.5))
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.1)
    loss(masked(x[0]), x[0]).backward()
    movement = metric.movement(collect.movement(masked, where=WHERE))
    optimizer.step()
    return movement, bp.restrict(movement, bp.read_masks(masked)), dict(bp.finalize(masked).named_parameters())


def dynamic_masks(model: nn.Module, x: Tensor) -> Result:
    masks = allocate.per_layer(metric.l1(collect.weights(model, where=WHERE)), 0.5)
    wider = allocate.per_layer(metric.l1(collect.weights(model, where=WHERE)), 0.25)
    bp.apply_masks(model, masks, straight_through=wider, decay=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss(model(x[0]), x[0]).backward()
    partly = [p.grad for p in model.parameters()]
    bp.apply_masks(model, masks, straight_through=True)
    loss(model(x[0]), x[0]).backward()
    optimizer.step()
    gradients = collect.gradients(model, where=WHERE)
    after = bp.regrow(masks, drop=metric.l1(gradients), grow=metric.gradient_magnitude(gradients), fraction=0.5)
    bp.apply_masks(model, after, bp.zero_new_blocks(model, after))
    bp.reset_state(optimizer, model, masks, after)
    return partly, after, [state["momentum_buffer"] for state in optimizer.state.values()], model(x[0])


def gates(model: nn.Module, x: Tensor) -> Result:
    bp.gates.add(model, where=WHERE, gate=bp.gates.soft_movement(), initial=0.5)
    before = bp.gates.expected_sparsity(model)
    (loss(model(x[0]), x[0]) + bp.gates.penalty(model, sparsity=0.5)).backward()
    optimizer = torch.optim.SGD(bp.gates.parameters(model), lr=4.0)
    optimizer.step()
    scores, outputs = bp.gates.scores(model), model(x[0])
    return before, scores, outputs, bp.gates.remove(model)(x[0])


def regularizers(model: nn.Module, x: Tensor) -> Result:
    penalty = bp.regularizers.group_lasso(model, where=WHERE, l1_ratio=0.2)
    state = bp.regularizers.admm(model, where=WHERE, prune=lambda data: allocate.per_layer(metric.l2(data), 0.5))
    pull = bp.regularizers.admm_penalty(model, state, rho=0.5)
    (penalty + pull).backward()
    bp.regularizers.proximal_group_lasso(model, where=WHERE, strength=0.05, l1_ratio=0.2)
    return penalty, pull, state, [(p, p.grad) for p in model.parameters() if p.grad is not None]


def combine_masks(model: nn.Module, x: Tensor) -> Result:
    first, second = (allocate.per_layer(score(collect.weights(model, where=WHERE)), 0.5) for score in (metric.l1, metric.l2))
    with tempfile.TemporaryDirectory() as folder:
        bp.save_masks(first, f"{folder}/masks.safetensors")
        bp.apply_masks(model, bp.load_masks(f"{folder}/masks.safetensors"))
    numbers = bp.summary(first).table(), bp.agreement(first, second), bp.sparsity(first)
    return numbers, bp.union(first, second), bp.intersect(first, second), bp.difference(first, second), bp.read_masks(model)


STATISTICS = [getattr(statistics, name) for name in statistics.__all__ if isinstance(getattr(statistics, name), statistics.Statistic)]
SOURCES = sorted({s.source for s in STATISTICS})  # what statistics are computed from: inputs, outputs, gradients ...
METRICS: dict[str, list[statistics.Statistic]] = {  # and what each is given
    "wanda": [statistics.input_sq],
    "block_output_error": INPUTS,
    "apoz": [statistics.apoz],
    "mean_activation": [statistics.mean_activation],
    "fisher": [statistics.gate_fisher],
    "grasp": [statistics.gate_hessian_grad],
    "obd": [statistics.gate_hessian_diagonal(probes=2)],
    "snip": [statistics.gate_grad],
    "synflow": [statistics.gate_flow],
    "taylor": [statistics.weight_grad],
    "l1": [],
    "l2": [],
    "lamp": [],
    "obs": [*INPUTS, statistics.output_grad_sq],
    "sparsegpt": INPUTS,
}
OPTIONS: dict[str, dict[str, Any]] = {"sparsegpt": {"sparsity": 0.5}}
ALLOCATORS: dict[str, Callable[[bp.Scores], Any]] = {
    "per_layer": lambda scores: allocate.per_layer(scores, 0.4, min_keep=1),
    "per_row": lambda scores: allocate.per_row(scores, 0.4),
    "per_bank": lambda scores: allocate.per_bank(scores, 0.5, bank=(-1, 2)),
    "n_of_m": lambda scores: allocate.n_of_m(scores, 0.5, m=2),
    "per_model": lambda scores: allocate.per_model(scores, 0.4, max_sparsity=0.7),
    "coupled": lambda scores: allocate.per_model(scores, 0.4, coupled=[("0.q.weight", "0.k.weight")] if "0.q.weight" in scores else []),
    "uniform": lambda scores: budgets.uniform(scores, 0.4),
    "erk": lambda scores: budgets.erk(scores, 0.4),
    "owl": lambda scores: budgets.owl(scores, 0.4),
    "lagrangian": lambda scores: budgets.lagrangian(scores, 0.4),
    "loss_weighted": lambda scores: budgets.loss_weighted(scores, 0.4),
    "pareto": lambda scores: bp.pareto(scores).table(),
}


def score_by(model: nn.Module, x: Tensor, name: str) -> Result:
    return getattr(metric, name)(data(model, x, *METRICS[name]), **OPTIONS.get(name, {}))


def statistics_of(model: nn.Module, x: Tensor, source: str) -> Result:
    return data(model, x, *(s for s in STATISTICS if s.source == source and not s.name.endswith("_cross")))


def allocate_by(model: nn.Module, x: Tensor, name: str) -> Result:
    return ALLOCATORS[name](metric.l2(data(model, x)))


def conditioning(model: nn.Module, x: Tensor) -> Result:
    name = "0.up.weight" if isinstance(model[0], AttentionLayer) else "3.weight"
    return bp.conditioning(data(model, x, *INPUTS)).rows[name][:3]


def sensitivity(model: nn.Module, x: Tensor) -> Result:
    pipeline = bp.Pipeline(partial(collect.weights, where=WHERE), metric.l1, allocate.per_layer)
    return bp.sensitivity(model, pipeline, [0.25, 0.5], lambda call: loss(call(x[0]), x[0]), progress=False).table()


STAGES: dict[str, Callable[[nn.Module, Tensor], Result]] = {
    **{f"statistics of {source}": partial(statistics_of, source=source) for source in SOURCES},
    **{f"metric.{name}": partial(score_by, name=name) for name in METRICS},
    **{f"allocate {name}": partial(allocate_by, name=name) for name in ALLOCATORS},
    "sequential": repair_by_layer,
    "sequential, target pruned": partial(repair_by_layer, target="pruned"),
    "sequential, finetuned": partial(repair_by_layer, finetune=partial(bp.finetune_layer, lr=1e-2, epochs=2)),
    "reconstruct.sparsegpt": partial(repair_at_once, reconstruct=reconstruct.sparsegpt),
    "reconstruct.bias": partial(repair_at_once, reconstruct=reconstruct.bias),
    "reconstruct.least_squares": partial(repair_at_once, reconstruct=reconstruct.least_squares),
    "cluster": reorder_units,
    "conditioning": conditioning,
    "sensitivity": sensitivity,
    "train": train,
    "dynamic masks": dynamic_masks,
    "gates": gates,
    "regularizers": regularizers,
    "masks": combine_masks,
    "block_sparse": export_kept_blocks,
    "shrink": shrink,
}


def tensors(result: Result) -> Iterator[Tensor]:
    """All tensors in a result, in order, and its numbers and strings as tensors."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (float, int, str)):
        yield torch.tensor(hash(result) if isinstance(result, str) else float(result), dtype=torch.float64)
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from tensors(value)
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from tensors(value)
    elif attrs.has(type(result)) and not isinstance(result, bp.BlockGrid):
        yield from tensors([getattr(result, field.name) for field in attrs.fields(type(result))])


def to_cpu(x: Tensor) -> Tensor:
    return x.data_on_cpu if isinstance(x, FakeDeviceTensor) else x.cpu()


@pytest.fixture(autouse=True, scope="module")
def _register() -> None:
    """Autograd counts the devices when it first runs, so the fake device has to exist before."""
    if not torch.cuda.is_available():
        with fake_device():
            pass


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_gives_on_another_device_what_it_gives_on_the_cpu(stage: str, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make().eval().double(), torch.randn(MODELS[make]).double()
    expected = [*tensors(STAGES[stage](copy.deepcopy(model), x))]
    assert expected
    gpu = torch.cuda.is_available()
    with contextlib.nullcontext() if gpu else fake_device():
        model, x = (model.cuda(), x.cuda()) if gpu else (to_fake_device(model), x.to(FAKE_DEVICE))
        for got, want in zip([*tensors(STAGES[stage](model, x))], expected, strict=True):
            assert not got.ndim or got.device.type != "cpu", f"a result of shape {tuple(got.shape)} is on the CPU"
            torch.testing.assert_close(to_cpu(got), want, rtol=1e-6, atol=1e-9)


class OnItsDevice(nn.Module):
    """A layer that copies its input to its own device."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(next(self.layer.parameters()).device))


@pytest.mark.parametrize(
    "stage",
    [
        *(f"allocate {name}" for name in ALLOCATORS if name != "coupled"),
        "metric.obs",
        "cluster",
        "sequential",
        "train",
        "dynamic masks",
        "gates",
    ],
)
def test_a_model_on_two_devices_gives_what_it_gives_on_one(stage: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(OnItsDevice(AttentionLayer()) for _ in range(2))).eval().double(), torch.randn(3, 4, 5, 8).double()
    expected = [*tensors(STAGES[stage](copy.deepcopy(model), x))]
    gpu = torch.cuda.is_available()
    with contextlib.nullcontext() if gpu else fake_device():
        model[1] = model[1].cuda() if gpu else to_fake_device(model[1])
        for got, want in zip([*tensors(STAGES[stage](model, x))], expected, strict=True):
            torch.testing.assert_close(to_cpu(got), want, rtol=1e-6, atol=1e-9)
