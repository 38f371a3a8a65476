"""Every stage stays on the model's device and gives there what it gives on the CPU: on a GPU, or where there is none on the device of
`elsewhere`. That one changes what torch takes for an accelerator, so test_devices.py runs this file in a process of its own.
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
from elsewhere import AWAY, Away, elsewhere, moved
from torch import Tensor, nn

import blockprune as bp
from blockprune import allocate, collect, distribute, export, metric, reconstruct, statistics

WHERE = bp.first_of(bp.linears((4, 2)), bp.convs((4, 2)))
GRAM = [statistics.input_gram, statistics.input_sq]
Found = Any  # tensors, in whatever holds them


class Attends(nn.Module):
    """A residual layer with heads, as transformers have it."""

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
    return nn.Sequential(Attends(), Attends(), nn.Linear(8, 8))


MODELS = {convolutions: (6, 4, 4, 4, 4), transformer: (6, 4, 5, 8)}


def loss(output: Tensor, batch: Any) -> Tensor:
    return output.flatten(1).logsumexp(1).mean()


def data(model: nn.Module, x: Tensor, *seen: statistics.Statistic) -> bp.Data:
    if not seen:
        return collect.weights(model, where=WHERE)
    how: Any = {"loss": loss} if any(s.sees not in ("inputs", "output") for s in seen) else {}
    return collect.with_statistics(model, where=WHERE, statistics=seen, batches=list(x), **how)


def scored(model: nn.Module, x: Tensor) -> bp.Scores:
    return metric.obs(data(model, x, statistics.input_gram, statistics.output_grad_gram))


def repaired(model: nn.Module, x: Tensor, **options: Any) -> Found:
    pipeline = bp.Pipeline(partial(collect.with_statistics, where=WHERE, statistics=GRAM), metric.obs, allocate.per_layer)
    found = bp.sequential(model, pipeline, partial(reconstruct.least_squares, damping=0.1), list(x), 0.5, **options)
    return found.weights, bp.apply_masks(model, found.masks, found.weights)(x[0])


def rebuilt(model: nn.Module, x: Tensor, repair: Any) -> Found:
    seen = data(model, x, *GRAM, statistics.input_mean, statistics.bias)
    return repair(seen, allocate.per_row(metric.wanda(seen), 0.5))


def in_order(model: nn.Module, x: Tensor) -> Found:
    """Units in the same blocks that matter in the same places; the model gives what it gave."""
    single = bp.first_of(bp.linears((1, 1)), bp.convs((1, 1)))
    elements = collect.with_statistics(model, where=single, statistics=GRAM, batches=list(x))
    plan = bp.cluster(metric.obs(elements, max_sparsity=0), bp.find_axes(model, x[0]), block=(4, 2))
    better = bp.permute(model, plan)
    weakest = bp.weakest_first(metric.l2(elements), units=len(plan[0].order), rows=plan[0].rows[:1])
    return better(x[0]), [(s.order.tolist(), s.rows, s.columns) for s in (*plan, weakest)]


def exported(model: nn.Module, x: Tensor) -> Found:
    masked = bp.apply_masks(model, allocate.per_row(metric.l2(collect.weights(model, where=WHERE)), 0.5))
    return export.block_sparse(masked, backend="torch")(x[0]), export.dense(masked)(x[0])


def smaller(model: nn.Module, x: Tensor) -> Found:
    def rows(name: str, owner: nn.Module) -> tuple[int] | None:
        hidden = name.endswith("up.weight") or (isinstance(owner, nn.Conv2d) and name.endswith("weight"))
        return (1,) if hidden else None

    masked = bp.apply_masks(model, allocate.per_layer(metric.fpgm(collect.weights(model, where=rows)), 0.5))
    return export.shrink(masked, x[0]).model(x[0])


def trained(model: nn.Module, x: Tensor) -> Found:
    masked = bp.apply_masks(model, allocate.global_(metric.l1(collect.weights(model, where=WHERE)), 0.5))
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.1)
    loss(masked(x[0]), x[0]).backward()
    moved_by = metric.movement(collect.movement(masked, where=WHERE))
    optimizer.step()
    return moved_by, bp.restrict(moved_by, bp.read_masks(masked)), dict(bp.finalize(masked).named_parameters())


def masks_of(model: nn.Module, x: Tensor) -> Found:
    one, two = (allocate.per_layer(score(collect.weights(model, where=WHERE)), 0.5) for score in (metric.l1, metric.l2))
    with tempfile.TemporaryDirectory() as folder:
        bp.save_masks(one, f"{folder}/masks.safetensors")
        bp.apply_masks(model, bp.load_masks(f"{folder}/masks.safetensors"))
    numbers = bp.summary(one).table(), bp.agreement(one, two), bp.sparsity(one)
    return numbers, bp.union(one, two), bp.intersect(one, two), bp.difference(one, two), bp.read_masks(model)


SEEN = [getattr(statistics, name) for name in statistics.__all__ if isinstance(getattr(statistics, name), statistics.Statistic)]
METRICS: dict[str, list[statistics.Statistic]] = {
    "wanda": [statistics.input_sq],
    "correlated": GRAM,
    "apoz": [statistics.apoz],
    "mean_activation": [statistics.mean_activation],
    "fisher": [statistics.gate_fisher],
    "grasp": [statistics.gate_hg],
    "obd": [statistics.gate_hvp(probes=2)],
    "snip": [statistics.gate_grad],
    "synflow": [statistics.gate_flow],
    "taylor": [statistics.weight_grad],
    "l1": [],
    "l2": [],
    "lamp": [],
    "obs": [*GRAM, statistics.output_grad_sq],
    "sparsegpt": GRAM,
}
OPTIONS: dict[str, dict[str, Any]] = {"sparsegpt": {"sparsity": 0.5}}
RANKS: dict[str, Callable[[bp.Scores], Any]] = {
    "per_layer": lambda scores: allocate.per_layer(scores, 0.4, min_keep=1),
    "per_row": lambda scores: allocate.per_row(scores, 0.4),
    "per_bank": lambda scores: allocate.per_bank(scores, 0.5, bank=(-1, 2)),
    "n_of_m": lambda scores: allocate.n_of_m(scores, 0.5, m=2),
    "global_": lambda scores: allocate.global_(scores, 0.4, max_sparsity=0.7),
    "coupled": lambda scores: allocate.global_(scores, 0.4, coupled=[("0.q.weight", "0.k.weight")] if "0.q.weight" in scores else []),
    "uniform": lambda scores: distribute.uniform(scores, 0.4),
    "erk": lambda scores: distribute.erk(scores, 0.4),
    "owl": lambda scores: distribute.owl(scores, 0.4),
    "lagrangian": lambda scores: distribute.lagrangian(scores, 0.4),
    "loss_weighted": lambda scores: distribute.loss_weighted(scores, 0.4),
    "pareto": lambda scores: bp.pareto(scores).table(),
}


def metric_of(model: nn.Module, x: Tensor, name: str) -> Found:
    return getattr(metric, name)(data(model, x, *METRICS[name]), **OPTIONS.get(name, {}))


def conditioned(model: nn.Module, x: Tensor) -> Found:
    return bp.conditioning(data(model, x, *GRAM)).rows["0.up.weight" if isinstance(model[0], Attends) else "3.weight"][:3]


def ranked(model: nn.Module, x: Tensor, rank: Callable[[bp.Scores], Any]) -> Found:
    return rank(scored(model, x))


def curve(model: nn.Module, x: Tensor) -> Found:
    pipeline = bp.Pipeline(partial(collect.weights, where=WHERE), metric.l1, allocate.per_layer)
    return bp.sensitivity(model, pipeline, [0.25, 0.5], lambda call: loss(call(x[0]), x[0]), progress=False).table()


LAWS: dict[str, Callable[[nn.Module, Tensor], Found]] = {
    **{f"statistics.{seen.name}": lambda model, x, seen=seen: data(model, x, seen) for seen in SEEN if not seen.name.endswith("_cross")},
    **{f"metric.{name}": partial(metric_of, name=name) for name in METRICS},
    **{f"rank {name}": partial(ranked, rank=rank) for name, rank in RANKS.items()},
    "sequential": repaired,
    "sequential, to the pruned": partial(repaired, target="pruned"),
    "sequential, tuned": partial(repaired, tune=partial(bp.blockwise, lr=1e-2, epochs=2)),
    "reconstruct.sparsegpt": partial(rebuilt, repair=reconstruct.sparsegpt),
    "reconstruct.bias": partial(rebuilt, repair=reconstruct.bias),
    "reconstruct.least_squares": partial(rebuilt, repair=reconstruct.least_squares),
    "cluster": in_order,
    "conditioning": conditioned,
    "sensitivity": curve,
    "training": trained,
    "masks": masks_of,
    "block_sparse": exported,
    "shrink": smaller,
}


def tensors(found: Found) -> Iterator[Tensor]:
    """All tensors in it, in order."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (float, int, str)):
        yield torch.tensor(hash(found) if isinstance(found, str) else float(found), dtype=torch.float64)
    elif isinstance(found, Mapping):
        for value in found.values():
            yield from tensors(value)
    elif isinstance(found, (list, tuple)):
        for value in found:
            yield from tensors(value)
    elif attrs.has(type(found)) and not isinstance(found, bp.BlockGrid):
        yield from tensors([getattr(found, field.name) for field in attrs.fields(type(found))])


@pytest.mark.parametrize("model", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("law", LAWS)
def test_a_stage_gives_elsewhere_what_it_gives_here(law: str, model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    here, x = model().eval().double(), torch.randn(MODELS[model]).double()
    expected = [*tensors(LAWS[law](copy.deepcopy(here), x))]
    assert expected
    gpu = torch.cuda.is_available()
    with contextlib.nullcontext() if gpu else elsewhere():
        there, y = (here.cuda(), x.cuda()) if gpu else (moved(here), x.to(AWAY))
        for got, wanted in zip([*tensors(LAWS[law](there, y))], expected, strict=True):
            assert not got.ndim or got.device.type != "cpu", f"{tuple(got.shape)} came back to the CPU"
            torch.testing.assert_close(got.here if isinstance(got, Away) else got.cpu(), wanted, rtol=1e-6, atol=1e-9)


class Apart(nn.Module):
    """A layer that moves what it is given to where it is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(next(self.layer.parameters()).device))


@pytest.mark.parametrize("law", [*(f"rank {name}" for name in RANKS if name != "coupled"), "cluster", "sequential", "training"])
def test_a_model_on_two_devices_gives_what_it_gives_on_one(law: str) -> None:
    torch.manual_seed(0)
    here, x = nn.Sequential(*(Apart(Attends()) for _ in range(2))).eval().double(), torch.randn(6, 4, 5, 8).double()
    expected = [*tensors(LAWS[law](copy.deepcopy(here), x))]
    gpu = torch.cuda.is_available()
    with contextlib.nullcontext() if gpu else elsewhere():
        here[1] = here[1].cuda() if gpu else moved(here[1])
        found = [*tensors(LAWS[law](here, x))]
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got.here if isinstance(got, Away) else got.cpu(), wanted, rtol=1e-6, atol=1e-9)
