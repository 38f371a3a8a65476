"""Models that torch has distributed over two processes do what the same model does in one, or say why they cannot and what would do.

Each cell of the table (how the model is distributed, whether masks come before or after, what is done with it) is one test.
"""

import functools
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from two_processes import in_two_processes

import blockprune as bp
from blockprune.core.sharded_tensor import is_sharded, whole

RANKS = 2
WHERE = bp.linears((3, 2))  # the shards of the 8 rows end within a block
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
ROWS = torch.randn(32, 6, generator=torch.Generator().manual_seed(6))


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))


def random_masks(seed: int = 0, where: bp.Where = WHERE) -> bp.Masks:
    metric = partial(bp.metric.random, generator=seed)
    return bp.Pipeline(partial(bp.collect.weights, where=where), metric, bp.allocate.per_layer)(plain(), 0.5)


# How a model is distributed


@functools.cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (RANKS,))


def fsdp(model: Any, parts: tuple[int, ...] = (0, 2)) -> Any:
    for index in parts:
        fully_shard(model[index], mesh=mesh())
    return fully_shard(model, mesh=mesh())


def tensor_parallel(model: Any) -> Any:
    return parallelize_module(model, mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})


WRAPS: dict[str, Callable[[Any], Any]] = {
    "none": lambda model: model,
    "FSDP2": fsdp,
    "FSDP2 root": partial(fsdp, parts=()),  # whole copies stay after a forward
    "TP": tensor_parallel,
    "DDP": DistributedDataParallel,
}


def named(model: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """By the names that parameters have in this model."""
    return {f"module.{name}" if isinstance(model, DistributedDataParallel) else name: value for name, value in values.items()}


def distributed(wrap: str, when: str, seed: int = 0) -> Any:
    """A model with masks, distributed."""
    if when == "before":
        return WRAPS[wrap](bp.apply_masks(plain(seed), random_masks(seed)))
    model = WRAPS[wrap](plain(seed))
    return bp.apply_masks(model, named(model, random_masks(seed)))


# What is done with it: each function returns what must be the same on every rank, and in one process


def output(model: nn.Module) -> Tensor:
    return whole(model(X).detach()).clone()  # tensor parallel layers return tensors that wait for another rank when they are used


def own_rows(wrap: str) -> Tensor:
    """The batch of this rank; ranks of tensor parallelism share one."""
    return X if wrap in ("none", "TP") else X[dist.get_rank() :: RANKS]


def train(model: nn.Module, wrap: str, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(own_rows(wrap)).square().mean().backward()
        optimizer.step()
    return optimizer


def keep(masks: bp.Masks) -> dict[str, Tensor]:
    return {name.removeprefix("module."): mask.keep for name, mask in masks.items()}


def forward(wrap: str, when: str, folder: str) -> Any:
    return output(distributed(wrap, when))


def score(wrap: str, when: str, folder: str) -> Any:
    collect = partial(bp.collect.weights, where=WHERE)
    return keep(bp.Pipeline(collect, bp.metric.l1, bp.allocate.per_model)(distributed(wrap, when), 0.5))


def statistics(wrap: str, when: str, folder: str) -> Any:
    options: Any = {
        "batches": [own_rows(wrap)[:1], own_rows(wrap)[1:]],
        "reduce": None if wrap in ("none", "TP") else bp.distributed.all_reduce,
        "loss": lambda y, _: y.square().sum(),
    }
    model, seen = distributed(wrap, when), [bp.statistics.input_gram, bp.statistics.output_sq, bp.statistics.output_grad_sq]
    data = bp.collect.with_statistics(model, where=WHERE, statistics=seen, **options)
    wanda = bp.Pipeline(partial(bp.collect.with_statistics, where=WHERE, **options), bp.metric.wanda, bp.allocate.per_row)
    return keep(wanda(model, 0.5)), {f"{n.removeprefix('module.')} {key}": value for n, p in data.items() for key, value in p.stats.items()}


def gradients_of_weights(wrap: str, when: str, folder: str) -> Any:
    options: Any = {"batches": [X], "loss": lambda y, _: y.square().sum()}
    data = bp.collect.with_statistics(distributed(wrap, when), where=WHERE, statistics=[bp.statistics.weight_grad], **options)
    return [p.stats["weight_grad"] for p in data.values()]


def gates(wrap: str, when: str, folder: str) -> Any:
    options: Any = {"batches": [X], "loss": lambda y, _: y.square().sum()}
    data = bp.collect.with_statistics(distributed(wrap, when), where=WHERE, statistics=[bp.statistics.gate_fisher], **options)
    return [p.stats["gate_fisher"] for p in data.values()]


def gradients(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    bp.apply_masks(model, bp.read_masks(model), straight_through=True)
    model(own_rows(wrap)).square().mean().backward()
    data, moved = bp.collect.gradients(model, where=WHERE), bp.collect.movement(model, where=WHERE)
    return [p.stats["weight_grad"] for p in data.values()], [p.stats["movement"] for p in moved.values()]


def update(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    bp.apply_masks(model, named(model, random_masks(3)))
    return output(model), keep(bp.read_masks(model))


def other_blocks(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    bp.apply_masks(model, named(model, random_masks(3, bp.linears((2, 3)))))
    return output(model), keep(bp.read_masks(model))


def weights(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    bp.apply_masks(model, None, named(model, {"0.weight": torch.arange(48.0).view(8, 6), "2.bias": torch.arange(6.0)}))
    return output(model)


def unmask(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    before = output(model)
    assert not [module for module in bp.apply_masks(model, {}).modules() if "Parametrized" in type(module).__name__]
    optimizer = train(model, wrap)
    trained = output(model)
    assert wrap == "none" or all(map(is_sharded, model.state_dict().values()))  # not the whole copies that the forward made
    bp.apply_masks(model, random_masks(3))
    train(model, wrap, optimizer)  # the optimizer has the same parameters still
    return before, trained, output(model)


def training(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    optimizer = train(model, wrap)
    bp.apply_masks(model, named(model, random_masks(3)))
    train(model, wrap, optimizer)
    return output(model)


def straight_through(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    bp.apply_masks(model, bp.read_masks(model), straight_through=True, decay=0.1)
    train(model, wrap)
    return output(model), output(bp.apply_masks(model, named(model, random_masks(3))))


def regrow(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    bp.apply_masks(model, bp.read_masks(model), straight_through=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(own_rows(wrap)).square().mean().backward()
    before, data = bp.read_masks(model), bp.collect.gradients(model, where=WHERE)
    after = bp.regrow(before, drop=bp.metric.l1(data), grow=bp.metric.gradient_magnitude(data), fraction=0.3)
    optimizer.step()
    bp.apply_masks(model, after, bp.zero_new_blocks(model, after), straight_through=True)
    bp.reset_state(optimizer, model, before, after)
    train(model, wrap, optimizer)
    return output(model), keep(after)


def regularizers(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    state = bp.regularizers.admm(model, where=WHERE, prune=lambda data: bp.allocate.per_layer(bp.metric.l2(data), 0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = bp.regularizers.group_lasso(model, where=WHERE) + bp.regularizers.admm_penalty(model, state, rho=0.5)
    (model(own_rows(wrap)).square().mean() + penalty).backward()
    optimizer.step()
    bp.regularizers.proximal_group_lasso(model, where=WHERE, strength=0.01)
    return output(model), keep(bp.masks_from_zeros(model, where=WHERE))


def train_gates(wrap: str, when: str, folder: str) -> Any:
    gate = bp.gates.Gate(lambda logits, training: logits.sigmoid(), torch.sigmoid)  # no random numbers, which ranks draw apart
    model = WRAPS[wrap](bp.gates.add(plain(), where=WHERE, gate=gate, initial=0.5))
    multipliers = torch.zeros(2, requires_grad=True)
    optimizers = torch.optim.AdamW(model.parameters(), lr=0.1), torch.optim.SGD([multipliers], lr=0.5, maximize=True)
    for _ in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model(own_rows(wrap)).square().mean() + bp.gates.penalty(model, sparsity=0.8)
        gap = bp.gates.expected_sparsity(model, costs={"*0.weight": 3.0, "*": 1.0}) - 0.9  # CoFi's Lagrangian
        (loss + multipliers[0] * gap + multipliers[1] * gap**2).backward()
        for optimizer in optimizers:
            optimizer.step()
    scores = bp.gates.scores(model)
    masks = bp.allocate.per_model(scores, 0.5)
    grown = bp.regrow(masks, drop=scores, grow=bp.metric.random(bp.collect.weights(model, where=WHERE), generator=0), fraction=0.3)
    learned = output(model), [score.value for score in scores.values()], keep(masks), keep(grown), multipliers.detach()
    if wrap == "DDP":
        with pytest.raises(ValueError, match=r"gates cannot be removed .*model = wrapped\.module, del wrapped"):
            bp.gates.remove(model)
        model = model.module
        masks = dict(zip(random_masks(), masks.values(), strict=True))
    state, pruned = bp.distributed.full_state_dict(bp.apply_masks(model, masks)), output(model)
    if state:  # of the first rank: gates and masks are multiplied into its weights
        loaded = plain(2)
        loaded.load_state_dict(state)
        torch.testing.assert_close(output(loaded), pruned)
    return *learned, pruned


def add_gates(wrap: str, when: str, folder: str) -> Any:
    return output(bp.gates.add(distributed(wrap, when), where=WHERE))


def save_and_resume(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    optimizer = train(model, wrap, torch.optim.AdamW(model.parameters()))
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
    resumed = distributed(wrap, when, seed=1)
    resumed_optimizer = torch.optim.AdamW(resumed.parameters())
    state, optimizer_state = get_state_dict(resumed, resumed_optimizer)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(resumed, resumed_optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    train(resumed, wrap, resumed_optimizer)
    return output(resumed), keep(bp.read_masks(resumed))


def load_own_state(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    before = output(model)
    model.load_state_dict(model.state_dict())
    assert torch.equal(output(model), before)
    return before


def load_whole_state(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    bp.load_masked(model, named(model, bp.apply_masks(plain(2), random_masks(3)).state_dict()))
    return output(model), keep(bp.read_masks(model))


def whole_state(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return output(bp.load_masked(plain(2), state))


def finalize(wrap: str, when: str, folder: str) -> Any:
    return output(bp.finalize(distributed(wrap, when)))


def finalized_state(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    model(X)
    state = bp.distributed.full_state_dict(getattr(model, "module", model))
    if wrap != "none" and dist.get_rank():
        assert state == {}
        state = bp.finalize(bp.apply_masks(plain(), random_masks())).state_dict()
    assert not any(map(is_sharded, state.values()))
    loaded = plain(2)
    loaded.load_state_dict(state)
    return {name: state[name] for name in sorted(state)}, output(loaded)


def change_in_place(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    layer = getattr(model, "module", model)[0]
    with torch.no_grad():
        layer.weight.mul_(2)
    return output(model)


def part(wrap: str, when: str, folder: str) -> Any:
    model = distributed(wrap, when)
    bp.apply_masks(getattr(model, "module", model)[0], {})
    return output(model)


def repaired(recipe: Any, wrap: str) -> Any:
    """What a recipe that runs layer by layer gives for a model without masks, and what the model gives afterwards."""
    model, shares = WRAPS[wrap](plain()), wrap not in ("none", "TP")
    rows = ROWS[dist.get_rank() :: RANKS] if shares else ROWS
    reduce = bp.distributed.all_reduce if shares else None
    loss = {"loss": lambda y, _: y.square().mean()}
    result = recipe(WHERE, bp.Calibration([rows[:8], rows[8:]], reduce=reduce, progress=False, **loss))(model, 0.5)
    repaired = {name.removeprefix("module."): whole(weight) for name, weight in result.weights.items()}
    return keep(result.masks), repaired, output(model)


def sparsegpt(wrap: str, when: str, folder: str) -> Any:
    return repaired(bp.recipes.sparsegpt, wrap)


def obs(wrap: str, when: str, folder: str) -> Any:
    return repaired(bp.recipes.obs, wrap)


def finetune(wrap: str, when: str, folder: str) -> Any:
    recipe = attrs.evolve(bp.recipes.sparsegpt(WHERE, bp.Calibration([ROWS[:8], ROWS[8:]])), finetune=partial(bp.finetune_layer, epochs=1))
    result = recipe(WRAPS[wrap](plain()), 0.5)
    return {name.removeprefix("module."): whole(weight) for name, weight in result.weights.items()}


def sensitivity(wrap: str, when: str, folder: str) -> Any:
    """Of a model with and without masks; it computes what it did."""
    losses = []
    for model in WRAPS[wrap](plain()), distributed(wrap, "after" if wrap == "TP" else "before"):
        before = output(model)
        prune = bp.Pipeline(partial(bp.collect.weights, where=WHERE), bp.metric.l1, bp.allocate.per_layer)
        table = bp.sensitivity(model, prune, [0.25, 0.75], lambda model: whole(model(X)).square().mean(), progress=False)
        losses.append(torch.tensor(list(table.losses.values())))
        assert torch.equal(output(model), before)
    return losses


def functional(wrap: str, when: str, folder: str) -> Any:
    model = WRAPS[wrap](plain())
    return whole(functional_call(model, bp.masked_parameters(model, named(model, random_masks(3))), X).detach()).clone()


def sweep(wrap: str, when: str, folder: str) -> Any:
    model, prune = WRAPS[wrap](plain()), lambda model, sparsity: {}
    return bp.sweep(model, {"none": prune}, [0.5], lambda model: output(model).square().mean()).rows[0].scores


def distill(wrap: str, when: str, folder: str) -> Any:
    model = WRAPS[wrap](plain())
    loss = lambda output, target, batch: whole(output - target).square().mean()  # noqa: E731
    weights = bp.distill(model, named(model, random_masks(3)), None, [X], teacher=plain(1), loss=loss, steps=3)
    return {name.removeprefix("module."): whole(weight) for name, weight in weights.items()}


def permute(wrap: str, when: str, folder: str) -> Any:
    model = WRAPS[wrap](plain())
    names = named(model, dict.fromkeys(("0.weight", "0.bias", "2.weight")))
    return output(bp.permute(model, [bp.UnitPermutation(torch.arange(8).flip(0), rows=list(names)[:2], columns=list(names)[2:])]))


def convert(wrap: str, when: str, folder: str) -> Any:
    return output(bp.as_linears(WRAPS[wrap](plain())))


def units(wrap: str, when: str, folder: str) -> Any:
    return len(bp.find_axes(WRAPS[wrap](plain()), X))


DONE = [
    *(forward, score, statistics, gradients, update, other_blocks, weights, unmask, training, straight_through, regrow, regularizers),
    *(save_and_resume, load_own_state, load_whole_state, whole_state, finalized_state),
    *(finalize, change_in_place, gradients_of_weights, gates, add_gates, part),
]

BEFORE_TP = "parallelize_module cannot shard a masked weight; call parallelize_module first"
AFTER_DDP = "masks cannot be added to or removed from a model in DistributedDataParallel.* apply masks first and wrap the model afterwards"
NO_COPY = r"cannot be copied; call bp\.finalize\(wrapped\.module\).* bp\.distributed\.full_state_dict"
IN_PLACE = r"mul_ would change this masked weight \(8, 6\) in place; .* bp\.apply_masks\(model, None"
AROUND = r"weight \(8, 6\): this parameter is sharded by fully_shard of a module around .* give the whole model to apply_masks"
NO_GRAPH = r"0\.weight \(8, 6\): (weight_grad|gate_fisher) needs the whole weight .* collect before fully_shard"

PARALLEL = {
    "permute": "permute reorders whole parameters, but parallelize_module has sharded .* call it before parallelize_module",
    "units": "find_axes runs a copy of the model, but parallelize_module has sharded .* call it before parallelize_module",
}
COPIES = {
    "convert": r"as_linears changes a copy of the model, but fully_shard has sharded",
    "distill": r"distill trains a copy of the model \(a loop of your own.*\), but fully_shard has sharded",
    "permute": r"permute reorders whole parameters, but fully_shard has sharded",
    "finetune": r"finetune tunes plain parameters of a layer, but fully_shard has sharded .* call it before fully_shard",
    "functional": r"0\.weight \(8, 6\): fully_shard puts its own parameter into the module .* use apply_masks",
    "sweep": r"sweep prunes copies of the model, but fully_shard has sharded .* bp\.distributed\.full_state_dict\(model\)",
    "units": r"find_axes runs a copy of the model, but fully_shard has sharded",
}


def refusal(wrap: str, when: str, what: str) -> str | None:
    """What the error message says if this cannot work."""
    if (wrap, what) == ("DDP", "distill"):
        return AFTER_DDP
    if what in COPIES and wrap != "none":
        return None if wrap == "DDP" else COPIES[what] if wrap != "TP" else PARALLEL.get(what)
    if (wrap, when) in (("TP", "before"), ("DDP", "after")) and what not in ("sparsegpt", "obs", "sensitivity"):
        return BEFORE_TP if wrap == "TP" else AFTER_DDP
    sharded = wrap != "DDP"
    return {
        "unmask": None if sharded else AFTER_DDP,
        "finalize": None if wrap == "TP" else NO_COPY,
        "change_in_place": IN_PLACE if sharded else None,
        "gradients_of_weights": NO_GRAPH if sharded else None,
        "gates": NO_GRAPH if sharded else None,
        "part": {"FSDP2 root": AROUND, "DDP": AFTER_DDP}.get(wrap),
        "add_gates": "gates cannot be added to .* change the model first and (shard|wrap) it afterwards",
    }.get(what)


TABLE = [(wrap, when, do.__name__) for wrap in WRAPS if wrap != "none" for when in ("before", "after") for do in DONE]
ON_PLAIN = (sparsegpt, obs, finetune, sensitivity, functional, sweep, units, distill, permute, convert)
TABLE += [(wrap, "after", do.__name__) for wrap in ("FSDP2", "FSDP2 root", "DDP") for do in ON_PLAIN]
TABLE += [(wrap, "before", "train_gates") for wrap in ("FSDP2", "FSDP2 root", "DDP")]
TABLE += [("TP", "after", do.__name__) for do in (sensitivity, functional, sweep, units, distill, permute, convert)]


def run_rank(rank: int, folder: str) -> dict[tuple[str, str, str], Any]:
    warnings.simplefilter("ignore")
    results: dict[tuple[str, str, str], Any] = {}
    for number, (wrap, when, what) in enumerate(TABLE):
        try:
            results[wrap, when, what] = globals()[what](wrap, when, f"{folder}/{number}")
        except Exception as error:
            results[wrap, when, what] = f"{type(error).__name__}: {error}"
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str, str], Any]]:
    """What each rank returned, or its error, for each cell of the table."""
    return in_two_processes(run_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch saves a checkpoint of one process
@pytest.mark.parametrize(("wrap", "when", "what"), TABLE)
def test_two_processes_do_what_one_does_or_say_why_not(
    wrap: str, when: str, what: str, results: list[dict[tuple[str, str, str], Any]], tmp_path: Path
) -> None:
    of_ranks = [rank[wrap, when, what] for rank in results]
    if message := refusal(wrap, when, what):
        assert all(isinstance(error, str) and re.search(message, error) for error in of_ranks), of_ranks
        return
    assert not [error for error in of_ranks if isinstance(error, str)]
    expected = globals()[what]("none", when, str(tmp_path))
    for result in of_ranks:
        torch.testing.assert_close(result, expected)
