"""Laws over the ways in which people build and run models; each kind was once a fault."""

import copy
import dataclasses
import gc
import types
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import blockprune as bp
from blockprune import allocate, collect, export, metric, reconstruct, statistics
from blockprune.model.running import copy_batch, to_model_device

BATCH = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def mask(rows: int, columns: int, block: tuple[int, int] = (4, 4)) -> bp.BlockMask:
    grid = bp.BlockGrid((rows, columns), block)
    return bp.BlockMask(torch.rand(grid.size, generator=torch.Generator().manual_seed(0)) < 0.5, grid)


def cross_entropy(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


# A module that is reachable by two names.


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = self.down

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def identities(model: nn.Module) -> list[tuple[str, int, bytes]]:
    named = model.named_parameters(remove_duplicate=False)
    return [(name, id(p), p.detach().numpy().tobytes()) for name, p in named if isinstance(p, nn.Parameter)]


@pytest.mark.parametrize("per_sample", ["vmap", "loop"])
def test_statistics_leave_a_module_with_two_names_as_it_was(per_sample: str) -> None:
    model = nn.Sequential(TwoNames(), nn.Linear(8, 4))
    before = identities(model)
    batches, gates = [(BATCH, torch.randint(0, 4, (64,)))], [statistics.gate_fisher, statistics.gate_flow]
    data = collect.with_statistics(
        model, where=bp.linears((4, 4)), statistics=gates, batches=batches, loss=cross_entropy, per_sample=per_sample
    )
    assert identities(model) == before
    plain = copy.deepcopy(model)
    del plain[0].last  # type: ignore[union-attr]
    plain[0].forward = lambda x: x + plain[0].down(torch.relu(plain[0].up(x)))  # type: ignore[union-attr,operator,assignment]
    want = collect.with_statistics(
        plain, where=bp.linears((4, 4)), statistics=gates, batches=batches, loss=cross_entropy, per_sample=per_sample
    )
    for name, param in data.items():
        torch.testing.assert_close(dict(param.stats), dict(want[name].stats))


@pytest.mark.parametrize("target", ["pruned", "dense"])
def test_sequential_leaves_a_module_with_two_names_as_it_was(target: Any) -> None:
    model = nn.Sequential(TwoNames(), TwoNames())
    before, output = identities(model), model(BATCH).detach()
    pipeline = bp.Pipeline(partial(collect.with_statistics, where=bp.linears((4, 4))), metric.obs, allocate.per_layer)
    bp.sequential(model, pipeline, reconstruct.least_squares, [BATCH], 0.5, target=target)
    assert identities(model) == before
    assert torch.equal(model(BATCH), output)


def test_sensitivity_leaves_a_module_with_two_names_as_it_was() -> None:
    model = nn.Sequential(TwoNames(), nn.Linear(8, 4)).eval()
    before = identities(model)
    prune = bp.Pipeline(partial(collect.weights, where=bp.linears((4, 4))), metric.l1, allocate.per_layer)
    bp.sensitivity(model, prune, [0.25, 0.5], lambda m: m(BATCH).square().mean())
    assert identities(model) == before


# Batches.


def test_a_packed_sequence_is_passed_on_whole() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, sequence: PackedSequence) -> Tensor:
            return self.out(self.rnn(sequence)[1][0][0])  # type: ignore[no-any-return]

    shapes: list[tuple[int, ...]] = []
    model = Recurrent()
    model.out.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    batch = pack_sequence([torch.randn(5, 4), torch.randn(3, 4)])
    collect.with_statistics(model, where=bp.named("out.weight", (1, 4)), statistics=[statistics.input_sq], batches=[batch])
    assert shapes == [(2, 8)]


# The state of the model.


class Running(nn.Module):
    """A buffer that the forward replaces instead of writing into it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.fc(x - self.mean)  # type: ignore[no-any-return]


def test_a_buffer_that_the_forward_replaces_is_restored() -> None:
    model = Running()
    buffer = model.mean
    collect.with_statistics(model, where=bp.linears((4, 4)), statistics=[statistics.input_sq], batches=[BATCH])
    assert model.mean is buffer
    assert not buffer.any()


class Changing(nn.Module):
    """The forward sets, adds, resizes or deletes a buffer, or changes a parameter in place."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc = kind, nn.Linear(8, 4)
        self.embedding = nn.Embedding(10, 8, max_norm=0.5 if "max_norm" in kind else None)
        self.register_buffer("mean", None if kind == "set" else torch.ones(3))
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "set":
            self.mean = x.mean(0)
        elif self.kind == "replace":
            del self.table
            self.table = torch.ones(3)  # a plain attribute
        elif self.kind == "resize":
            self.mean.resize_(5)
        elif self.kind == "delete" and hasattr(self, "table"):
            del self.table
        return self.fc(x + self.embedding(torch.arange(len(x)) % 10))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["set", "replace", "resize", "delete", "max_norm", "masked max_norm"])
def test_what_the_forward_changes_is_restored(kind: str) -> None:
    model = Changing(kind)
    if kind == "masked max_norm":
        bp.apply_masks(model, {"embedding.weight": mask(10, 8, (5, 4))})
    buffers = {name: None if b is None else b.clone() for name, b in model._buffers.items()}
    embedding = model.embedding.weight.detach().clone()
    collect.with_statistics(model, where=bp.linears((4, 4)), statistics=[statistics.input_sq], batches=[BATCH])
    assert model._buffers.keys() == buffers.keys()
    assert all(b is None if buffers[name] is None else torch.equal(b, buffers[name]) for name, b in model._buffers.items())
    assert "table" not in model.state_dict()
    assert torch.equal(model.embedding.weight, embedding)


class Cached(nn.Module):
    """A table of positions that the forward makes once for a length."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.length = nn.Linear(8, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.length:
            self.register_buffer("table", torch.ones(len(x), 1), persistent=False)
            self.length = len(x)
        return self.fc(x + self.table[: len(x)])  # type: ignore[no-any-return]


def test_a_buffer_that_the_forward_adds_stays_for_later_forwards() -> None:
    model = Cached()
    collect.with_statistics(model, where=bp.linears((4, 4)), statistics=[statistics.input_sq], batches=[BATCH])
    assert model(BATCH).shape == (64, 4)


def test_a_model_made_under_inference_mode_is_refused_outside_of_it_and_a_copy_is_not() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(8, 4))
    mask = {"0.weight": bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((4, 8), (4, 4)))}
    options: Any = {"where": bp.linears((4, 4)), "statistics": [statistics.input_sq], "batches": [BATCH]}
    for change in (lambda m: bp.apply_masks(m, mask), lambda m: collect.with_statistics(m, **options)):
        with pytest.raises(ValueError, match=r"0.weight \(4, 8\) was made under torch.inference_mode.*copy.deepcopy\(model\)"):
            change(model)
        change(copy.deepcopy(model))
    with torch.inference_mode():
        bp.apply_masks(model, mask)


PLAN = bp.UnitPermutation(torch.arange(8).flip(0), rows=("0.weight", "0.bias"), columns=("2.weight",))
INFERENCE: dict[str, Callable[[Any], object]] = {
    "gates": lambda m: bp.gates.add(m, where=bp.linears((4, 4))),
    "weights": lambda m: bp.apply_masks(m, {}, {"0.bias": torch.zeros(8)}),
    "load_masked": lambda m: bp.load_masked(m, with_masks().state_dict()),
    "proximal": lambda m: bp.regularizers.proximal_group_lasso(m, where=bp.linears((4, 4)), strength=0.1),
    "permute": lambda m: bp.permute(m, [PLAN], inplace=True),
}
CALIBRATION = bp.Calibration([BATCH], loss=lambda output, batch: output.square().mean(), progress=False)
RUNS: dict[str, Callable[[Any], object]] = {
    "statistics": lambda m: collect.with_statistics(m, where=bp.linears((4, 4)), statistics=[statistics.input_sq], calibration=CALIBRATION),
    "obs": lambda m: bp.recipes.obs(bp.linears((4, 4)), CALIBRATION)(m, 0.5),
    "cluster_units": lambda m: bp.recipes.cluster_units(m, bp.linears((4, 4)), CALIBRATION),
}


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("name", [*INFERENCE, *RUNS])
def test_a_model_made_under_inference_mode_is_refused_with_the_name_of_a_parameter(name: str, inside: bool) -> None:
    with torch.inference_mode():
        model = plain_model()
    with torch.inference_mode(inside):
        if inside and name in INFERENCE:
            INFERENCE[name](model)  # torch allows changes there
            return
        with pytest.raises(ValueError, match=r"0.(weight|bias) \(8.* was made under torch.inference_mode.*copy.deepcopy"):
            (INFERENCE | RUNS)[name](model)
    (INFERENCE | RUNS)[name](copy.deepcopy(model))


def test_gates_that_are_added_in_inference_mode_train_outside_of_it() -> None:
    model = plain_model()
    with torch.inference_mode():
        bp.gates.add(model, where=bp.linears((4, 4)))
    model(BATCH).sum().backward()
    assert all(logits.grad is not None for logits in bp.gates.parameters(model))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_layer_that_is_called_with_a_nested_tensor_is_named(layout: torch.layout) -> None:
    batch = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)
    loss = lambda output, batch: torch.cat(list(output.unbind())).square().mean()  # noqa: E731
    options: dict[str, Any] = {"where": bp.linears((4, 4)), "batches": [batch], "loss": loss, "progress": False}
    for statistic in (statistics.input_sq, statistics.input_gram, statistics.output_sq, statistics.output_grad_gram):
        with pytest.raises(ValueError, match=r"0.weight: this layer is called with a nested tensor .* give padded batches"):
            collect.with_statistics(plain_model(), statistics=[statistic], **options)
    with pytest.raises(ValueError, match=r"0: this layer is called with a nested tensor .* give padded batches"):
        bp.find_axes(plain_model(), batch)
    if layout == torch.strided:
        with pytest.raises(ValueError, match=r"0.weight: this layer is called with a nested tensor .* give padded batches"):
            collect.with_statistics(plain_model(), statistics=[statistics.gate_fisher], **options)
    gradient = collect.with_statistics(plain_model(), statistics=[statistics.weight_grad], **options)["0.weight"].stats["weight_grad"]
    assert gradient.isfinite().all()


def test_empty_batches_are_named() -> None:
    options: Any = {"where": bp.linears((4, 4)), "statistics": [statistics.input_sq]}
    with pytest.raises(ValueError, match=r"weight \(8, 8\): the batches are empty, or all rows .*; give batches with samples"):
        collect.with_statistics(nn.Linear(8, 8), batches=[torch.zeros(0, 8)], **options)
    with pytest.raises(ValueError, match=r"a batch is an empty tuple; its first element must be the model's inputs"):
        collect.with_statistics(nn.Linear(8, 8), batches=[()], **options)


@pytest.mark.parametrize("make", [nn.LSTM, nn.Linear, lambda n, m: nn.MultiheadAttention(n, 2)])
def test_a_model_with_tensors_that_a_hook_computes_is_not_finalized(make: Any) -> None:
    layer = make(8, 8)
    attr = {"LSTM": "weight_ih_l0", "Linear": "bias", "MultiheadAttention": "in_proj_weight"}[type(layer).__name__]
    torch_prune.l1_unstructured(layer, attr, 0.5)
    with pytest.raises(ValueError, match=rf"0.{attr}: a hook of the old weight_norm.* computes this tensor"):
        bp.finalize(nn.Sequential(layer))


@pytest.mark.parametrize(
    "statistic",
    [
        statistics.input_gram,
        statistics.output_grad_gram,
        statistics.weight_grad,
        statistics.gate_fisher,
        statistics.gate_hessian_diagonal(),
    ],
)
def test_nothing_of_a_batch_is_held_once_it_is_added(statistic: statistics.Statistic) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[Tensor]:
        for _ in range(3):
            assert not [ref for ref in alive[:-1] if ref() is not None]
            batch = BATCH.clone()
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    gc.collect()
    gc.disable()  # a reference cycle would be freed late, if at all
    try:
        collect.with_statistics(
            model, where=bp.linears((4, 4)), statistics=[statistic], batches=batches(), loss=lambda output, batch: output.square().sum()
        )
        assert not [ref for ref in alive if ref() is not None]
    finally:
        gc.enable()


# Precision and modes of torch.


def test_autocast_does_not_round_statistics_scores_or_repair() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    rule = bp.linears((4, 4))
    chosen = [statistics.input_gram, statistics.output_grad_gram, statistics.input_mean, statistics.bias]

    def everything() -> tuple[bp.Data, bp.Scores, bp.Weights]:
        data = collect.with_statistics(model, where=rule, statistics=chosen, batches=[BATCH], loss=lambda y, _: y.float().square().sum())
        scores = metric.obs(data)
        return data, scores, reconstruct.least_squares(data, allocate.per_layer(scores, 0.5))

    want = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        data, scores, weights = everything()
    gram = data["0.weight"].stats["input_gram"]
    assert gram.dtype == torch.float32
    assert torch.equal(gram, want[0]["0.weight"].stats["input_gram"])
    assert all(x.dtype == torch.float32 for x in [scores["0.weight"].value, *weights.values()])


def test_inference_mode_is_no_obstacle() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    chosen = [statistics.input_sq, statistics.weight_grad]
    look = partial(collect.with_statistics, model, where=bp.linears((4, 4)), statistics=chosen, loss=lambda y, _: y.square().sum())
    want = look(batches=[BATCH])["0.weight"].stats
    with torch.inference_mode():
        inside = look(batches=[BATCH.clone()], statistics=[statistics.input_sq])["0.weight"].stats
    torch.testing.assert_close(inside["input_sq"], want["input_sq"])


def test_a_model_that_was_compiled_in_place_shows_its_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    rule, one = bp.linears((4, 4)), [statistics.input_sq]
    want = collect.with_statistics(model, where=rule, statistics=one, batches=[BATCH])
    axes = bp.find_axes(model, BATCH[:4])
    model.compile(backend="eager")
    model(BATCH)
    data = collect.with_statistics(model, where=rule, statistics=one, batches=[BATCH])
    assert all(torch.equal(data[name].stats["input_sq"], want[name].stats["input_sq"]) for name in want)
    assert bp.find_axes(model, BATCH[:4]) == axes
    wrapper: Any = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"compiled wrapper; give the module that was compiled: model._orig_mod"):
        bp.find_axes(wrapper, BATCH[:4])


# Weights that are no parameters, or are elsewhere.


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(8, 8))


def old_pruning() -> nn.Module:
    return torch_prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)


@pytest.mark.parametrize("build", [old_weight_norm, lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), old_pruning])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_a_hook_computes_are_named_with_the_remedy(build: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), build())
    with pytest.raises(ValueError, match=r"1.weight \(8, 8\): this weight is no parameter; a hook .* computes it. Remove the hook"):
        collect.weights(model, where=bp.linears((4, 4)))
    assert list(collect.weights(model, where=bp.excluding(bp.linears((4, 4)), "1.*"))) == ["0.weight"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_torch_cannot_copy_is_not_finalized_without_a_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.weight_norm(nn.Linear(8, 8)))
    model(BATCH)
    with pytest.raises(ValueError, match=r"1.weight: a hook of the old weight_norm.*remove_weight_norm"):
        bp.finalize(model)


def test_offloaded_parameters_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(8, 8))
    accelerate.cpu_offload(model)
    with pytest.raises(ValueError, match=r"0.weight \(8, 8\): accelerate has offloaded this parameter.*without offloading"):
        bp.apply_masks(model, {"0.weight": mask(8, 8)})
    assert not bp.read_masks(model)
    accelerate.hooks.remove_hook_from_submodules(model)


def offloaded(model: nn.Module, how: str, folder: Path) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    if how == "to disk":
        layers: dict[str, str] = {"0": "disk", "1": "cpu", "2": "disk"}
        return accelerate.dispatch_model(model, layers, main_device="cpu", offload_dir=folder, force_hooks=True)  # type: ignore[no-any-return]
    return accelerate.cpu_offload(model, preload_module_classes=["Sequential"] if how == "as a whole" else None)  # type: ignore[no-any-return]


def plain_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def with_masks() -> nn.Sequential:
    return bp.apply_masks(plain_model(), {"0.weight": mask(8, 8), "2.weight": mask(8, 8)})


def with_gates() -> nn.Sequential:
    return bp.gates.add(plain_model(), where=bp.linears((4, 4)))


def exported_state() -> dict[str, Tensor]:
    return export.block_sparse(with_masks(), backend="torch").state_dict()


ADMM: dict[str, Any] = {"where": bp.linears((4, 4)), "prune": lambda data: bp.allocate.per_layer(bp.metric.l2(data), 0.5)}
NEEDS_VALUES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object]]] = {
    name: (make, use)
    for make, uses in (
        (
            plain_model,
            {
                "masks": lambda m: bp.apply_masks(m, {"0.weight": mask(8, 8)}),
                "weights": lambda m: bp.apply_masks(m, {}, {"0.weight": torch.zeros(8, 8)}),
                "biases": lambda m: bp.apply_masks(m, None, {"0.bias": torch.zeros(8)}),
                "masked_parameters": lambda m: bp.masked_parameters(m, {"0.weight": mask(8, 8)}),
                "load_masked": lambda m: bp.load_masked(m, with_masks().state_dict()),
                "gates": lambda m: bp.gates.add(m, where=bp.linears((4, 4))),
                "group_lasso": lambda m: bp.regularizers.group_lasso(m, where=bp.linears((4, 4))),
                "proximal": lambda m: bp.regularizers.proximal_group_lasso(m, where=bp.linears((4, 4)), strength=0.1),
                "admm": lambda m: bp.regularizers.admm(m, **ADMM),
                "admm_penalty": lambda m: bp.regularizers.admm_penalty(m, bp.regularizers.admm(with_masks(), **ADMM), rho=1.0),
                "distill": lambda m: bp.distill(m, {}, None, [BATCH], teacher=with_masks(), loss=bp.losses.kl, steps=1),
                "load an exported model": lambda m: export.load_state_dict(m, exported_state()),
                "full_state_dict": bp.distributed.full_state_dict,
                "benchmark": lambda m: export.benchmark(m, inputs=BATCH, rounds=1),
                "rowwise_int8": export.rowwise_int8,
                "dynamic_int8": export.dynamic_int8,
                "weights of data": lambda m: collect.weights(m, where=bp.linears((4, 4)), lazy=True),
            },
        ),
        (
            with_masks,
            {
                "unmask": lambda m: bp.apply_masks(m, {}),
                "other masks": lambda m: bp.apply_masks(m, {"0.weight": mask(8, 8)}),
                "finalize": bp.finalize,
                "finalize in place": lambda m: bp.finalize(m, inplace=True),
                "zero_new_blocks": lambda m: bp.zero_new_blocks(m, {"0.weight": mask(8, 8)}),
            },
        ),
        (with_gates, {"remove gates": bp.gates.remove, "scores": bp.gates.scores, "expected_sparsity": bp.gates.expected_sparsity}),
    )
    for name, use in uses.items()
}


@pytest.mark.parametrize("how", ["layer by layer", "as a whole", "to disk"])
@pytest.mark.parametrize("name", NEEDS_VALUES)
def test_what_needs_the_values_of_offloaded_parameters_is_refused_and_changes_nothing(name: str, how: str, tmp_path: Path) -> None:
    make, use = NEEDS_VALUES[name]
    model = make().eval()
    before = model(BATCH)
    if how == "to disk" and make is not plain_model:
        pytest.skip("accelerate writes no masks and gates to a disk")
    model = offloaded(model, how, tmp_path)
    with pytest.raises(ValueError, match="offloaded"):
        use(model)
    torch.testing.assert_close(model(BATCH), before)


def test_a_model_on_the_meta_device_is_searched_once_for_offloaded_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model, searched = nn.Sequential(*(nn.Linear(8, 8, device="meta") for _ in range(20))), list[nn.Module]()
    masks = {f"{i}.weight": mask(8, 8) for i in range(20)}
    bp.apply_masks(model, masks)
    monkeypatch.setattr("blockprune.model.parameters.is_offloaded", searched.append)
    bp.apply_masks(model, masks)
    assert len(searched) == len(list(model.modules()))


@pytest.mark.parametrize("function", ["find_axes", "permute"])
def test_units_of_offloaded_parameters_are_refused(function: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    plan = [bp.UnitPermutation(torch.arange(8).flip(0), rows=("0.weight", "0.bias"), columns=("2.weight",))]
    calibration = bp.Calibration([BATCH], loss=lambda output, batch: output.square().mean())
    calls: list[Callable[[], object]] = [
        lambda: bp.find_axes(model, BATCH),
        lambda: bp.recipes.cluster_units(model, bp.linears((4, 4)), calibration),
    ]
    for call in calls if function == "find_axes" else [lambda: bp.permute(model, plan), lambda: bp.permute(model, plan, inplace=True)]:
        with pytest.raises(ValueError, match=rf"0.weight \(8, 8\): accelerate has offloaded .* so {function} .* load the model without"):
            call()
    accelerate.hooks.remove_hook_from_submodules(model)
    assert len(bp.find_axes(model, BATCH)) == len(plan)


def test_masks_are_not_added_below_distributed_data_parallel() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 8)))
        with pytest.raises(ValueError, match=r"module.0.weight: masks cannot be added to or removed from.*wrap the model afterwards"):
            bp.apply_masks(plain, {"module.0.weight": mask(8, 8)})
        assert not bp.read_masks(plain)
        masked = nn.parallel.DistributedDataParallel(bp.apply_masks(nn.Sequential(nn.Linear(8, 8)), {"0.weight": mask(8, 8)}))
        everything = bp.BlockMask(torch.ones(2, 2).bool(), bp.BlockGrid((8, 8), (4, 4)))
        bp.apply_masks(masked, {"module.0.weight": everything})
        assert bp.read_masks(masked) == {"module.0.weight": everything}
        with pytest.raises(ValueError, match=r"cannot be added to or removed"):
            bp.apply_masks(masked, {})
    finally:
        dist.destroy_process_group()


CHANGES_PARAMETERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object]]] = {
    "add masks": (plain_model, lambda m: bp.apply_masks(m, {"0.weight": mask(8, 8)})),
    "add masks to a part": (plain_model, lambda m: bp.apply_masks(m[0], {"weight": mask(8, 8)})),
    "load masks": (plain_model, lambda m: bp.load_masked(m, with_masks().state_dict())),
    "remove masks": (with_masks, lambda m: bp.apply_masks(m, {})),
    "other blocks": (with_masks, lambda m: bp.apply_masks(m, {"0.weight": mask(8, 8)})),
    "finalize": (with_masks, lambda m: bp.finalize(m, inplace=True)),
    "add gates": (plain_model, lambda m: bp.gates.add(m, where=bp.linears((4, 4)))),
    "remove gates": (with_gates, bp.gates.remove),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", CHANGES_PARAMETERS)
def test_the_module_inside_distributed_data_parallel_keeps_its_parameters_as_long_as_that_lives(name: str) -> None:
    make, change = CHANGES_PARAMETERS[name]
    model = make().eval()
    want, names = model(BATCH), list(model.state_dict())
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match=r"cannot be (added to|removed from).* a model in DistributedDataParallel"):
        change(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(wrapped(BATCH), want)
    assert bp.finalize(model) is not model  # a copy is no part of it
    bp.apply_masks(model, bp.read_masks(model), {"0.bias": torch.zeros(8)})
    del wrapped
    change(model)


@pytest.mark.usefixtures("process_group")
def test_a_model_that_shares_a_part_with_distributed_data_parallel_changes_its_other_parameters() -> None:
    backbone = nn.Linear(8, 8)
    wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(backbone, nn.Linear(8, 8)))
    other = nn.Sequential(backbone, nn.Linear(8, 8))
    bp.apply_masks(other, {"1.weight": mask(8, 8)})
    bp.gates.remove(bp.gates.add(other, where=bp.including(bp.linears((4, 4)), "1.weight")))
    with pytest.raises(ValueError, match=r"0.weight: masks cannot be added to"):
        bp.apply_masks(other, {**bp.read_masks(other), "0.weight": mask(8, 8)})
    with pytest.raises(ValueError, match="gates cannot be added to"):
        bp.gates.add(other, where=bp.linears((4, 4)))
    assert wrapped(BATCH).shape == (len(BATCH), 8)


# Values print what they are in a few lines, and not their tensors.


def test_public_values_print_in_a_few_lines_and_without_their_numbers() -> None:
    model, where = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), bp.linears((2, 2))
    calibration = bp.Calibration([torch.ones(3, 64)], loss=lambda output, batch: output.sum(), progress=False)
    prune = bp.Pipeline(partial(bp.collect.weights, where=where), bp.metric.l1, bp.allocate.per_layer)
    data, scores, masks = prune.collect(model), prune.scores(model), prune(model, 0.5)
    options = {"where": where, "statistics": [bp.statistics.input_gram], "calibration": calibration}
    values = [
        *(where, bp.convs((1,)), bp.named("0.*", (1, 1)), bp.first_of(where, bp.convs((1,))), bp.including(where, "0.*", "2.*")),
        *(bp.excluding(where, "0.*"), bp.with_block(where, (1, 1)), calibration, prune),
        *(data["0.weight"], scores["0.weight"], masks["0.weight"]),
        *(bp.collect.with_statistics(model, **options)["0.weight"], bp.collect.fold(model, **options)),
        bp.PruningResult(masks, {name: param.weight for name, param in data.items()}, ("0", "2")),
        bp.UnitPermutation(torch.arange(64).flip(0), rows=("0.weight",)),
        *(bp.recipes.magnitude(where), bp.recipes.wanda(where, calibration), bp.recipes.obs(where, calibration)),
    ]
    for value in values:
        text = repr(value)
        assert len(text) < 1000, text
        assert not [word for word in ("functools", "<function _", " at 0x", "tensor(", "...") if word in text], text
    assert repr(where) == "linears(block=(2, 2))"
    assert repr(values[-5]) == "PruningResult(2 masks, 50.0% pruned; 2 weights; 2 layers: '0' to '2')"
    assert repr(bp.PruningResult({}, {})) == "PruningResult(0 masks, 0.0% pruned; 0 weights; 0 layers)"


# Progress bars show in notebooks, on a terminal, and wherever they are asked for.


class Table(nn.Module):
    """A buffer that grows on demand, as a table of positions does, in whatever mode the model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("table", torch.ones(0, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) < len(x):
            self.table = torch.ones(len(x), 8)
        return self.fc(x) * self.table[: len(x)]  # type: ignore[no-any-return]


def test_a_buffer_that_was_made_under_inference_mode_is_named_where_gradients_need_it() -> None:
    model = Table()
    with torch.inference_mode():
        model(BATCH)
    run = partial(collect.with_statistics, where=bp.linears((4, 4)), batches=[BATCH], loss=lambda output, batch: output.square().mean())
    for statistic in (statistics.weight_grad, statistics.output_grad_sq, statistics.gate_fisher):
        with pytest.raises(ValueError, match=r"^table \(64, 8\): this buffer was made under torch.inference_mode.*copy.deepcopy"):
            run(model, statistics=[statistic])
        run(copy.deepcopy(model), statistics=[statistic])
    run(model, statistics=[statistics.input_sq])


# Casts of parameters, which autocast keeps until its outermost region ends.


def _finalized(model: nn.Module) -> nn.Module:
    return bp.finalize(bp.apply_masks(model, {"0.weight": mask(8, 8)}), inplace=True)


def _permuted(model: nn.Module) -> nn.Module:
    bp.permute(model, [bp.UnitPermutation(torch.randperm(8), rows=("0.weight",))], inplace=True)
    return model


CHANGES_IN_PLACE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "new weights": lambda model: bp.apply_masks(model, None, {"0.weight": torch.zeros(8, 8)}),
    "finalize": _finalized,
    "permute": _permuted,
    "proximal": lambda model: bp.regularizers.proximal_group_lasso(model, where=bp.linears((4, 4)), strength=0.5),
    "gates": lambda model: bp.gates.remove(bp.gates.add(model, where=bp.linears((4, 4)), initial=0.0)),
    "load_masked": lambda model: bp.load_masked(model, nn.Sequential(nn.Linear(8, 8)).state_dict()),
}


@pytest.mark.parametrize("change", CHANGES_IN_PLACE)
def test_within_one_autocast_a_model_computes_with_the_weights_that_were_changed_in_place(change: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(BATCH)
        changed = CHANGES_IN_PLACE[change](model)
        output = changed(BATCH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(output, changed(BATCH))
        assert not torch.equal(output, before)


def test_distill_within_an_autocast_trains_as_without() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    masks = bp.recipes.magnitude(bp.linears((4, 4)))(model, 0.5).masks
    train = partial(bp.distill, model, masks, None, [BATCH], teacher=model, loss=bp.losses.kl, steps=5, autocast=torch.bfloat16)
    expected = train(progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = train(progress=False)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


# A forward that belongs to another module, so that a copy would not run itself.

COPYING: dict[str, Callable[[nn.Module], Any]] = {
    "finalize": bp.finalize,
    "block_sparse": lambda model: export.block_sparse(bp.apply_masks(model, {"0.weight": mask(8, 8)}), backend="torch"),
    "permute": lambda model: bp.permute(model, [bp.UnitPermutation(torch.randperm(8), rows=("0.weight",))]),
    "sweep": lambda model: bp.sweep(model, {"l1": bp.recipes.magnitude(bp.linears((4, 4)))}, [0.5], lambda m: m(BATCH).sum().item()),
    "distill": lambda model: bp.distill(model, {"0.weight": mask(8, 8)}, None, [BATCH], teacher=None, loss=lambda s, t, b: s.sum()),
    "as_linears": bp.as_linears,
    "find_axes": lambda model: bp.find_axes(model, BATCH),
    "shrink": lambda model: export.shrink(bp.apply_masks(model, {"0.weight": mask(8, 8)}), BATCH),
}


def _with_default(forward: Any) -> Any:
    return lambda x, own=forward: own(x)


def _in_a_list(forward: Any) -> Any:
    forwards = [forward]
    return lambda x: forwards[-1](x) if forwards else x


FORWARDS: dict[str, Callable[[Any], Any]] = {
    "compiled": lambda forward: torch.compile(forward, backend="eager"),
    "decorated": torch.no_grad(),
    "decorated twice": lambda forward: torch.no_grad()(torch.enable_grad()(forward)),
    "bound": lambda forward: types.MethodType(lambda self, x: forward(x), forward.__self__),
    "a default": _with_default,
    "a list": _in_a_list,
}


@pytest.mark.parametrize("kind", FORWARDS)
@pytest.mark.parametrize("function", COPYING)
def test_a_model_whose_copies_would_run_the_model_itself_is_not_copied(function: str, kind: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.forward = FORWARDS[kind](model.forward)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"its attribute forward is a function that holds a Sequential of the model.*module.compile\(\)"):
        COPYING[function](model)


OTHER_FORWARDS: dict[str, Callable[[nn.Module], Any]] = {
    "a module outside of the model": lambda _: _with_default(nn.ReLU()),
    "itself": lambda _: _recursive(),
    "bound": lambda module: types.MethodType(torch.no_grad()(nn.Identity.forward), module),
}


def _recursive() -> Any:
    def forward(x: Tensor, depth: int = 0) -> Tensor:
        return x if depth else forward(x, 1) + (0 if depth < 2 else later)

    if not forward:
        later = 1
    return forward


@pytest.mark.parametrize("kind", OTHER_FORWARDS)
def test_other_functions_as_a_forward_are_no_obstacle(kind: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity())
    model[1].forward = OTHER_FORWARDS[kind](model[1])  # type: ignore[method-assign, assignment]
    assert torch.equal(bp.finalize(model)(BATCH), model(BATCH))


def test_a_forward_that_copies_of_a_model_take_along_is_no_obstacle() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.forward = partial(nn.Sequential.forward, model)  # type: ignore[method-assign]
    finalized = bp.finalize(model)
    with torch.no_grad():
        finalized[0].weight.zero_()
    assert torch.equal(finalized(BATCH), finalized[0].bias.expand(64, 8))
    assert not torch.equal(model(BATCH), finalized(BATCH))


# What a forward changes besides buffers.


class Momentum(nn.Module):
    """A second encoder that follows the first, as in MoCo."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.second.weight.mul_(0.9).add_(self.first.weight, alpha=0.1)
        return self.first(x) - self.second(x)


@pytest.mark.filterwarnings("ignore:first.weight .* the forward calls its Linear, and also computes with this weight")
@pytest.mark.filterwarnings("ignore:0 of . masked layers became block-sparse")
def test_parameters_that_the_forward_changes_are_named() -> None:
    model, where = Momentum(), bp.named("first.weight", (4, 4))
    with pytest.warns(UserWarning, match=r"second.weight \(8, 8\): the forward changes these parameters in place"):
        collect.with_statistics(model, where=where, statistics=[statistics.input_sq], batches=[BATCH])
    bp.apply_masks(model, {"first.weight": mask(8, 8)})
    with pytest.warns(UserWarning, match=r"second.weight \(8, 8\): the forward changes these parameters in place"):
        export.choose(model, inputs=BATCH, rounds=1)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("form", [Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.to_mkldnn])
def test_parameters_whose_values_cannot_be_read_are_no_obstacle(form: Any) -> None:
    model = nn.Linear(8, 8)
    model.register_parameter("other", nn.Parameter(form(torch.eye(4)), requires_grad=False))
    collect.with_statistics(model, where=bp.linears((4, 4)), statistics=[statistics.input_sq], batches=[BATCH])


def test_a_change_in_place_that_changes_no_value_is_none() -> None:
    class Clamped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.no_grad():
                self.bias.clamp_(-10, 10)
            return super().forward(input)

    collect.with_statistics(Clamped(8, 8), where=bp.linears((4, 4)), statistics=[statistics.input_sq], batches=[BATCH])


class Remembering:
    """A batch that the forward changes, as it changes the cache of a language model."""

    def __init__(self) -> None:
        self.inputs = [BATCH.clone()]


def grow(model: nn.Module, batch: Remembering) -> Tensor:
    batch.inputs[0].mul_(2)
    batch.inputs.append(batch.inputs[0])
    return model(torch.cat(batch.inputs))


class Task:
    """A batch that brings its model along."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.x, self.seen = model, BATCH, list[int]()

    def run(self) -> Tensor:
        self.seen.append(len(self.x))
        return self.model(self.x)  # type: ignore[no-any-return]


def test_an_object_that_holds_a_module_is_passed_on_as_it_is() -> None:
    model = nn.Linear(8, 8)
    task = Task(model)
    collect.with_statistics(
        model, where=bp.linears((4, 4)), statistics=[statistics.input_sq], batches=[task], forward=lambda _, batch: batch.run()
    )
    assert task.seen == [64]


def test_an_object_that_is_a_batch_is_copied_for_each_run() -> None:
    model, batch = nn.Linear(8, 8), Remembering()
    run = partial(collect.with_statistics, model, where=bp.linears((4, 4)), statistics=[statistics.input_sq], forward=grow)
    first, second = (run(batches=[batch])["weight"].stats["input_sq"] for _ in range(2))
    assert torch.equal(first, second)
    assert len(batch.inputs) == 1
    assert torch.equal(batch.inputs[0], BATCH)


@dataclasses.dataclass(frozen=True)
class Pair:
    x: Tensor
    weight: float


def test_a_dataclass_is_moved_to_the_models_type() -> None:
    model, batch = nn.Linear(8, 8).double(), Pair(BATCH.float(), 2.0)
    options: dict[str, Any] = {"forward": lambda model, b: model(b.x), "loss": lambda output, b: b.weight * output.square().mean()}
    data = collect.with_statistics(model, where=bp.linears((4, 4)), statistics=[statistics.weight_grad], batches=[batch], **options)
    assert data["weight"].stats["weight_grad"].dtype == torch.float64
    assert batch.x.dtype == torch.float32


def test_a_jagged_batch_has_its_own_memory_and_the_models_type() -> None:
    jagged = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=torch.jagged)
    moved = to_model_device(nn.Linear(8, 8).double(), jagged)
    assert moved.values().dtype == torch.float64
    assert copy_batch(jagged).values().data_ptr() != jagged.values().data_ptr()


class Labelled(Tensor):
    length: int


def test_attributes_of_a_tensor_subclass_reach_the_forward() -> None:
    batch = BATCH.as_subclass(Labelled)
    batch.length = 2
    options: dict[str, Any] = {"forward": lambda model, b: model(b[: getattr(b, "length", 64)].as_subclass(Tensor))}
    data = collect.with_statistics(nn.Linear(8, 8), where=bp.linears((4, 4)), statistics=[statistics.input_sq], batches=[batch], **options)
    torch.testing.assert_close(data["weight"].stats["input_sq"].flatten(), BATCH[:2].square().mean(0))


# Tensors that are tied after one of them was masked.


@pytest.mark.filterwarnings("ignore:0 of 1 masked layers became block-sparse")
@pytest.mark.parametrize(
    "function",
    [bp.read_masks, bp.finalize, export.block_sparse, partial(bp.finalize, inplace=True), lambda model: bp.apply_masks(model, None, {})],
)
def test_a_tensor_that_was_tied_after_masking_is_named(function: Callable[[nn.Module], Any]) -> None:
    model: Any = nn.ModuleDict({"embedding": nn.Embedding(8, 8), "head": nn.Linear(8, 8, bias=False)})
    bp.apply_masks(model, {"head.weight": mask(8, 8)})
    model["head"].weight = model["embedding"].weight
    with pytest.raises(ValueError, match=r"head.weight \(8, 8\) is masked, but embedding.weight, which is the same tensor, is not"):
        function(model)
    bp.apply_masks(model, {"embedding.weight": mask(8, 8)})
    function(model)
    bp.apply_masks(model, {})
