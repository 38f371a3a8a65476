"""A trainable block-sparse model learns what the masked model learns, by every way in which people train."""

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import Matrix, kept_matrices, normal, seeds
from test_export import BACKENDS, MAY_STAY_DENSE, TOLERANCE, close, leading, masked, mlp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from two_processes import in_two_processes

import blockprune as bp
from blockprune import export
from blockprune.export import ops
from blockprune.export.format import pack

TRAINING_BACKENDS = pytest.mark.parametrize("backend", BACKENDS[:2])


def trainable(model: nn.Module, backend: str = "torch") -> nn.Module:
    return export.block_sparse(model, backend=backend, trainable=True).train()


def train(model: nn.Module, x: Tensor, steps: int = 4, **options: Any) -> list[float]:
    """Plain steps of AdamW; the losses."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options), []
    for _ in range(steps):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def values_of(model: nn.Module) -> list[Tensor]:
    return [module.values for module in model.modules() if isinstance(module, export.BlockSparseLinear)]


@TRAINING_BACKENDS
@given(kept_matrices(), leading, seeds, st.sampled_from(list(TOLERANCE)))
def test_gradients_are_those_of_the_masked_layer(
    backend: str, matrix: Matrix, batch: tuple[int, ...], seed: int, dtype: torch.dtype
) -> None:
    _, keep, grid = matrix
    dense = (normal(grid.shape, seed) / 4).to(dtype).where(bp.expand(keep, grid), 0).requires_grad_()
    bias, x = (normal(size, seed + 1).to(dtype).requires_grad_() for size in (grid.shape[:1], (*batch, grid.shape[1])))
    layer = export.BlockSparseLinear(pack(dense.detach(), keep, grid), nn.Parameter(bias.detach().clone()), backend, trainable=True)
    y = layer(own := x.detach().clone().requires_grad_())
    grad = normal(y.shape, seed + 2).to(dtype)
    y.backward(grad)
    nn.functional.linear(x.double(), dense.double(), bias.double()).backward(grad.double())
    for computed, right in ((own.grad, x.grad), (layer.bias.grad, bias.grad), (layer.values.grad, pack(dense.grad, keep, grid).values)):
        close(computed, right, times=4)


@TRAINING_BACKENDS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_derivatives_of_every_order_and_both_modes(backend: str) -> None:
    grid = bp.BlockGrid((6, 8), (2, 4))
    keep = torch.tensor([[True, False], [False, False], [True, True]])
    weight = pack(torch.randn(6, 8).double(), keep, grid)

    def product(x: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        return ops.linear(x, bias, values, weight.crow, weight.col, weight.shape, weight.block, weight.paired, backend, None)

    operands = tuple(t.requires_grad_() for t in (torch.randn(3, 8).double(), torch.randn(6).double(), weight.values))
    assert torch.autograd.gradcheck(product, operands, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, operands)


def test_the_operators_keep_torchs_rules() -> None:
    weight = pack(torch.randn(6, 8).double(), torch.tensor([[True, False], [False, False], [True, True]]), bp.BlockGrid((6, 8), (2, 4)))
    layout = weight.crow, weight.col, weight.shape, weight.block, weight.paired, "torch"
    grad, x = torch.randn(3, 6).double().requires_grad_(), torch.randn(3, 8).double().requires_grad_()
    torch.library.opcheck(ops.linear_values_grad_op, (grad, x, *layout, len(weight.values)))
    torch.library.opcheck(ops.linear_op, (x, None, weight.values.requires_grad_(), *layout))


@TRAINING_BACKENDS
def test_it_learns_what_the_masked_model_learns(backend: str) -> None:
    model, x = masked(mlp().double()).train(), torch.randn(16, 24).double()
    sparse = trainable(model, backend)
    assert all(values.requires_grad and isinstance(values, nn.Parameter) for values in values_of(sparse))
    torch.testing.assert_close(torch.tensor(train(sparse, x)), torch.tensor(train(model, x)))
    torch.testing.assert_close(sparse(x), model(x))


def test_the_optimizer_holds_state_for_kept_weights_alone() -> None:
    sparse = trainable(masked(mlp()))
    optimizer = torch.optim.AdamW(sparse.parameters())
    sparse(torch.randn(3, 24)).sum().backward()
    optimizer.step()
    kept = sum(values.numel() for values in values_of(sparse))
    biases = sum(p.numel() for name, p in sparse.named_parameters() if name.endswith("bias"))
    assert sum(p.numel() for p in sparse.parameters()) == kept + biases
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == kept + biases


@TRAINING_BACKENDS
def test_convolutions_learn_too(backend: str) -> None:
    torch.manual_seed(0)
    model = masked(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 1)).double(), block=(4, 2)).train()
    x = torch.randn(2, 4, 9, 7).double()
    sparse = trainable(model, backend)
    torch.testing.assert_close(torch.tensor(train(sparse, x)), torch.tensor(train(model, x)))


@TRAINING_BACKENDS
def test_autocast_keeps_float32_weights(backend: str) -> None:
    model, x = masked(mlp()).train(), torch.randn(16, 24)
    sparse = trainable(model, backend)

    def gradients(module: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module(x).square().mean()
        loss.backward()
        return [p.grad for p in module.parameters() if p.grad is not None and p.ndim == 1 and len(p) == 32]

    for computed, right in zip(gradients(sparse), gradients(model), strict=True):
        torch.testing.assert_close(computed, right, atol=2e-2, rtol=2e-2)
    assert all(values.grad is not None and values.grad.dtype == torch.float32 for values in values_of(sparse))


def checkpointed(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(model, x, use_reentrant=False)


@TRAINING_BACKENDS
@pytest.mark.parametrize("wrap", [checkpointed, copy.deepcopy, lambda m: torch.compile(m, fullgraph=True, backend="aot_eager")])
def test_checkpointing_copies_and_compilation_give_the_same_gradients(backend: str, wrap: Callable[[nn.Module], Any]) -> None:
    sparse, x = trainable(masked(mlp().double()), backend), torch.randn(5, 24).double()
    expected = torch.autograd.grad(sparse(x).square().sum(), list(sparse.parameters()))
    wrapped = wrap(sparse)
    parameters = list(wrapped.parameters() if isinstance(wrapped, nn.Module) else sparse.parameters())
    for computed, right in zip(torch.autograd.grad(wrapped(x).square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(computed, right)


@TRAINING_BACKENDS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_functional_transforms_see_the_values(backend: str) -> None:
    sparse, x = trainable(masked(mlp().double()), backend), torch.randn(5, 24).double()
    parameters = {name: p.detach() for name, p in sparse.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(sparse, parameters, (x,)).square().sum()

    whole = torch.autograd.grad(sparse(x).square().sum(), list(sparse.parameters()))
    by_name = torch.func.grad(loss)(parameters, x)
    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for name, right in zip(parameters, whole, strict=True):
        torch.testing.assert_close(by_name[name], right)
        torch.testing.assert_close(by_sample[name].sum(0), right)
    by_weights = torch.func.vmap(loss, in_dims=(0, None))({name: torch.stack([p, 2 * p]) for name, p in parameters.items()}, x)
    torch.testing.assert_close(by_weights[0], loss(parameters, x))
    torch.testing.assert_close(by_weights[1], loss({name: 2 * p for name, p in parameters.items()}, x))
    forward, reverse = (jacobian(loss)(parameters, x[:1]) for jacobian in (torch.func.jacfwd, torch.func.jacrev))
    for name in parameters:
        torch.testing.assert_close(forward[name], reverse[name])


def test_averages_frozen_weights_and_files(tmp_path: Path) -> None:
    sparse, x = trainable(masked(mlp())), torch.randn(5, 24)
    average = torch.optim.swa_utils.AveragedModel(sparse, avg_fn=lambda old, new, _: (old + new) / 2)
    average.update_parameters(sparse)
    before = [values.detach().clone() for values in values_of(sparse)]
    train(sparse, x, steps=1)
    average.update_parameters(sparse)
    for mean, old, new in zip(values_of(average), before, values_of(sparse), strict=True):
        torch.testing.assert_close(mean, (old + new) / 2)
    save_file(sparse.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    frozen, again = export.load_state_dict(mlp(), state), export.load_state_dict(mlp(), state, trainable=True)
    assert not any(isinstance(values, nn.Parameter) for values in values_of(frozen))
    assert all(isinstance(values, nn.Parameter) for values in values_of(again))
    torch.testing.assert_close(frozen(x), sparse(x))
    torch.testing.assert_close(again(x), sparse(x))
    torch.save(sparse, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), sparse(x))
    thawed = export.load_state_dict(frozen, frozen.state_dict(), trainable=True)
    assert all(isinstance(values, nn.Parameter) for values in values_of(thawed))
    sparse.requires_grad_(False)
    assert not sparse(x).requires_grad
    sparse.load_state_dict(frozen.state_dict())


def test_the_way_back_is_exact() -> None:
    model, x = masked(mlp()), torch.randn(5, 24)
    sparse = trainable(model)
    train(sparse, x)
    plain = export.dense(sparse)
    assert all(p.requires_grad for p in plain.parameters())
    back = bp.apply_masks(plain, bp.read_masks(sparse))
    assert bp.read_masks(back) == bp.read_masks(model)
    for name in ("0", "2"):
        assert torch.equal(back.get_submodule(name).weight, sparse.get_submodule(name).weight)
    assert bp.read_masks(trainable(back)) == bp.read_masks(sparse)


def other_masks(model: nn.Module) -> dict[str, bp.BlockMask]:
    torch.manual_seed(1)
    return {name: bp.BlockMask(torch.rand(mask.keep.shape) < 0.7, mask.grid) for name, mask in bp.read_masks(model).items()}


@TRAINING_BACKENDS
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_an_update_keeps_values_and_state_of_blocks_that_stay(backend: str, kind: str) -> None:
    torch.manual_seed(0)
    layers, x = (mlp(), torch.randn(5, 24)) if kind == "linear" else (nn.Sequential(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 5, 5))
    model = masked(layers).train()
    sparse, weights = trainable(model, backend), {name: torch.ones(mask.grid.shape) for name, mask in bp.read_masks(model).items()}
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
    sparse(x).square().mean().backward()
    optimizer.step()
    loss = sparse(x).square().mean()  # its graph lives on while the masks change
    named = {name: sparse.get_submodule(name.removesuffix(".weight")) for name in weights}
    before = {name: (layer.weight.detach().clone(), layer.values) for name, layer in named.items()}

    def dense_state(name: str) -> Tensor:
        layer = copy.deepcopy(named[name])
        layer.values.data = optimizer.state[named[name].values]["exp_avg"].clone()
        return layer.weight

    states, new = {name: dense_state(name) for name in named}, other_masks(model)
    old = {name: bp.expand(mask.keep, mask.grid) for name, mask in bp.read_masks(sparse).items()}
    assert export.update(sparse, new, weights=weights, optimizer=[optimizer]) is sparse
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert bp.read_masks(sparse) == new
    for name, layer in named.items():
        weight, values = before[name]
        kept = bp.expand(new[name].keep, new[name].grid)
        assert layer.values is values
        assert torch.equal(layer.weight, torch.where(old[name], weight, 1).where(kept, 0))
        assert torch.equal(dense_state(name), states[name].where(old[name] & kept, 0))
    sparse(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("make", "key", "initial"),
    [
        (lambda p: torch.optim.Rprop(p, lr=0.03), "step_size", 0.03),
        (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5), "sum", 0.5),
    ],
)
def test_a_new_block_has_the_state_that_a_new_parameter_gets(make: Any, key: str, initial: float) -> None:
    model, x = masked(mlp()).train(), torch.randn(5, 24)
    sparse = trainable(model)
    optimizer = make(sparse.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        sparse(x).square().mean().backward()
        optimizer.step()
    old, new = bp.read_masks(sparse)["0.weight"], other_masks(model)["0.weight"]
    before = optimizer.state[sparse[0].values][key].clone()
    export.update(sparse, {"0.weight": new}, optimizer=optimizer)
    replica = copy.deepcopy(sparse[0])
    replica.values.data = optimizer.state[sparse[0].values][key].clone()
    is_new = bp.expand(new.keep, new.grid) & ~bp.expand(old.keep, old.grid)
    assert is_new.any()
    assert torch.equal(replica.weight[is_new], torch.full((int(is_new.sum()),), initial))
    assert set(replica.values.tolist()) <= {*before.tolist(), torch.tensor(initial).item()}
    values = sparse[0].weight.detach().clone()
    sparse(x).square().mean().backward()
    optimizer.step()
    assert (sparse[0].weight != values)[is_new].any()


def test_an_update_reaches_weights_that_stayed_masked() -> None:
    model = masked(nn.Sequential(nn.Linear(8, 8))).train()
    with pytest.warns(UserWarning, match="0 of 1 masked layers"):
        still_masked = export.block_sparse(model, backend=export.Choices((export.Choice("0.weight", 0.5, "dense", ""),)), trainable=True)
    assert bp.read_masks(still_masked) == bp.read_masks(model)
    new, weight = other_masks(model), still_masked[0].weight.detach().clone()
    was_kept, is_kept = (bp.expand(masks["0.weight"].keep, masks["0.weight"].grid) for masks in (bp.read_masks(model), new))
    export.update(still_masked, new, weights={"0.weight": torch.ones(8, 8)}, optimizer=None)
    assert torch.equal(still_masked[0].weight, weight.where(was_kept, 1).where(is_kept, 0))
    loaded = export.load_state_dict(nn.Sequential(nn.Linear(8, 8)), still_masked.state_dict())
    assert bp.read_masks(loaded) == new


def partly_masked() -> tuple[nn.Module, nn.Module]:
    """A masked model, and its trainable form with one weight that stays masked, because an Embedding has no block-sparse form."""
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    grid = bp.BlockGrid((8, 8), (4, 4))
    masks = {f"{i}.weight": bp.BlockMask(torch.tensor([[True, False], [False, True]]), grid) for i in range(2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, trainable(bp.apply_masks(model, masks))


@pytest.mark.parametrize("given", [True, False])
def test_an_update_does_the_same_to_masked_and_to_block_sparse_weights(given: bool) -> None:
    """The law: new blocks have the values given, or zeros, blocks that stay have their values and state, and all others a new state."""
    _, sparse = partly_masked()
    optimizer, tokens = torch.optim.AdamW(sparse.parameters(), lr=1e-2), torch.arange(8)
    for _ in range(2):
        sparse(tokens).square().mean().backward()
        optimizer.step()
    embedding, linear = sparse[0].parametrizations.weight.original, sparse[1].values
    with torch.no_grad():
        embedding.add_(1)  # also what is stored for pruned blocks
    optimizer.state[embedding]["exp_avg"].add_(1)

    def moment(i: int) -> Tensor:
        if i == 0:
            return optimizer.state[embedding]["exp_avg"].clone()
        layer = copy.deepcopy(sparse[1])
        layer.values.data = optimizer.state[linear]["exp_avg"].clone()
        return layer.weight.detach().clone()

    old = bp.expand(*attrs.astuple(bp.read_masks(sparse)["0.weight"], recurse=False))
    values, moments = [sparse[i].weight.detach().clone() for i in range(2)], [moment(i) for i in range(2)]
    new = {name: bp.BlockMask(torch.tensor([[True, True], [False, False]]), mask.grid) for name, mask in bp.read_masks(sparse).items()}
    kept = bp.expand(*attrs.astuple(new["0.weight"], recurse=False))
    export.update(sparse, new, optimizer=optimizer, weights={name: torch.full((8, 8), 7.0) for name in new} if given else None)
    for i in range(2):
        assert torch.equal(sparse[i].weight, values[i].where(old, 7.0 if given else 0.0).where(kept, 0))
        assert torch.equal(moment(i)[kept], moments[i].where(old, 0)[kept])
    assert not moment(0)[old & ~kept].any()
    assert moment(0)[~old & ~kept].all()  # blocks that stay pruned
    assert bp.read_masks(sparse) == new
    sparse(tokens).square().mean().backward()
    optimizer.step()


def test_an_update_keeps_which_gradients_the_masks_let_pass() -> None:
    model = nn.Sequential(nn.Embedding(8, 8), nn.Embedding(8, 8))
    grid = bp.BlockGrid((8, 8), (4, 4))
    masks = {f"{i}.weight": bp.BlockMask(torch.eye(2).bool(), grid) for i in range(2)}
    bp.apply_masks(model, masks, straight_through=True, decay=0.1)
    export.update(model, {"1.weight": bp.BlockMask(~masks["1.weight"].keep, grid)}, optimizer=None)
    for i in range(2):
        mask = model[i].parametrizations.weight[0]
        assert mask.reached.all()
        assert mask.decay == 0.1


class MeanOfTwo(torch.optim.Optimizer):
    """A step by the mean of the last two gradients, which are one tensor of the state."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            last = self.state[p].setdefault("last", torch.zeros(2, *p.shape))
            last.copy_(torch.stack((p.grad, last[0])))


@TRAINING_BACKENDS
@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("is_trainable", [True, False])
def test_a_compiled_model_is_compiled_once_more_for_all_updates(backend: str, kind: str, is_trainable: bool) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    is_linear = kind == "linear"
    model = mlp() if is_linear else nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    where, x = (bp.linears((4, 4)), torch.randn(5, 24)) if is_linear else (bp.convs((4, 4)), torch.randn(2, 4, 6, 6))
    prune = bp.recipes.magnitude(where)
    sparse = export.block_sparse(bp.apply_masks(model, prune(model, 0.1).masks), backend=backend, trainable=is_trainable)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    for number in range(12):
        changing = "0.weight" if number < 3 else "2.weight"  # one layer after the other
        with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
            computed = torch.autograd.grad(compiled(x).square().sum(), list(sparse.parameters()))
        expected = torch.autograd.grad(sparse(x).square().sum(), list(sparse.parameters()))
        torch.testing.assert_close(computed, expected)
        export.update(sparse, {changing: prune(export.dense(sparse), 0.2 + 0.05 * number).masks[changing]}, optimizer=None)


def test_an_update_refuses_what_it_cannot_carry_over_and_changes_nothing() -> None:
    _, sparse = partly_masked()
    optimizer = MeanOfTwo(sparse.parameters(), {})
    sparse(torch.arange(8)).sum().backward()
    optimizer.step()
    state, before = copy.deepcopy(sparse.state_dict()), copy.deepcopy(optimizer.state_dict())
    new = {name: bp.BlockMask(~mask.keep, mask.grid) for name, mask in bp.read_masks(sparse).items()}
    for name, own, shape in (("0.weight", r"\(8, 8\)", r"\(2, 8, 8\)"), ("1.weight", r"\(32,\)", r"\(2, 32\)")):
        with pytest.raises(ValueError, match=rf"{name} {own}: MeanOfTwo holds 'last' of shape {shape}"):
            export.update(sparse, {name: new[name]}, optimizer=optimizer)
    for bad in (float("nan"), float("inf")):
        for name in new:
            weights = {other: torch.full((8, 8), bad if other == name else 1.0) for other in new}
            with pytest.raises(ValueError, match=rf"{name} \(8, 8\): weights has NaN or inf"):
                export.update(sparse, new, weights=weights, optimizer=None)
    for name in new:
        weights = {other: torch.ones(8, 8, device="meta" if other == name else "cpu") for other in new}
        with pytest.raises(ValueError, match=rf"{name} \(8, 8\): weights has a tensor on the meta device"):
            export.update(sparse, new, weights=weights, optimizer=None)
    assert all(torch.equal(x, state[name]) for name, x in sparse.state_dict().items())
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


@MAY_STAY_DENSE
def test_auto_measures_steps_and_leaves_slow_layers_masked() -> None:
    model = masked(nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 8)), block=(4, 4), sparsity=0.9).train()
    choices = export.choose(model, training=True, rows=8, progress=False, rounds=3)
    assert {"masked", "unmasked", "torch"} <= set(choices.rows[0].milliseconds)
    sparse = export.block_sparse(model, trainable=True, rows=8, progress=False)
    assert bp.read_masks(sparse) == bp.read_masks(model)
    before = [module for module in sparse.modules() if isinstance(module, export.BlockSparseLinear)]
    assert all(layer.trainable for layer in before)
    train(sparse, torch.randn(8, 128))
    assert bp.read_masks(sparse) == bp.read_masks(model)
    assert sparse[0].weight[~bp.expand(*attrs.astuple(bp.read_masks(model)["0.weight"], recurse=False))].count_nonzero() == 0


@TRAINING_BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_type_has_no_influence(backend: str, dtype: torch.dtype) -> None:
    sparse, x = trainable(masked(mlp()), backend), torch.randn(5, 24)
    expected = torch.autograd.grad(sparse(x).sum(), list(sparse.parameters()))
    torch.set_default_dtype(dtype)
    try:
        for computed, right in zip(torch.autograd.grad(sparse(x).sum(), list(sparse.parameters())), expected, strict=True):
            torch.testing.assert_close(computed, right)
    finally:
        torch.set_default_dtype(torch.float32)


def test_frozen_weights_stay_frozen() -> None:
    model = masked(mlp())
    model[0].requires_grad_(False)
    sparse = trainable(model)
    assert [layer.values.requires_grad for layer in (sparse[0], sparse[2])] == [False, True]
    assert [export.dense(sparse)[i].weight.requires_grad for i in (0, 2)] == [False, True]
    again = export.load_state_dict(sparse, sparse.state_dict())
    assert [again[i].values.requires_grad for i in (0, 2)] == [False, True]
    optimizer = torch.optim.Adam([p for p in sparse.parameters() if p.requires_grad])
    export.update(sparse, other_masks(model), optimizer=optimizer)
    meta = copy.deepcopy(sparse).to("meta")
    assert torch.equal(export.load_state_dict(meta, sparse.state_dict())[2].values, sparse[2].values)


def test_an_update_knows_all_names_of_a_layer_and_what_an_optimizer_holds() -> None:
    model = masked(nn.ModuleDict({"a": nn.Linear(8, 8)}))
    model["b"] = model["a"]
    sparse, mask = trainable(model), other_masks(model)["a.weight"]
    export.update(sparse, {"b.weight": mask}, optimizer=None)
    assert bp.read_masks(sparse)["a.weight"] == mask
    other = bp.BlockMask(~mask.keep, mask.grid)
    with pytest.raises(ValueError, match="two different masks"):
        export.update(sparse, {"a.weight": mask, "b.weight": other}, optimizer=None)
    optimizer = torch.optim.LBFGS(sparse.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = sparse["a"](torch.ones(2, 8)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(ValueError, match="LBFGS is not one number for each weight"):
        export.update(sparse, {"a.weight": other}, optimizer=optimizer)


def test_it_is_distilled_as_the_masked_model_is() -> None:
    dense, batches = mlp().double(), [torch.randn(16, 24).double() for _ in range(3)]
    model = masked(copy.deepcopy(dense))
    sparse, options = trainable(model), {"teacher": dense, "loss": bp.losses.kl, "steps": 5, "progress": False}
    before = copy.deepcopy(sparse.state_dict())
    weights = bp.distill(sparse, None, None, batches, **options)
    assert all(torch.equal(x, before[name]) for name, x in sparse.state_dict().items())
    bp.apply_masks(sparse, None, weights)
    bp.apply_masks(model, None, bp.distill(model, None, None, batches, **options))
    torch.testing.assert_close(sparse(batches[0]), model(batches[0]))


def test_distillation_resumes_with_the_same_blocks_alone() -> None:
    dense, batches, states = mlp(), [torch.randn(16, 24) for _ in range(3)], []
    grids = {"0.weight": bp.BlockGrid((32, 24), (4, 4)), "2.weight": bp.BlockGrid((10, 32), (10, 4))}
    masks = {name: bp.BlockMask(torch.arange(grid.blocks).view(grid.size) % 2 == 0, grid) for name, grid in grids.items()}
    others = {name: bp.BlockMask(~mask.keep, mask.grid) for name, mask in masks.items()}
    sparse, other = (trainable(bp.apply_masks(copy.deepcopy(dense), k)) for k in (masks, others))
    options = {"teacher": dense, "loss": bp.losses.kl, "steps": 5, "every": 2, "progress": False}
    weights = bp.distill(sparse, None, None, batches, **options, callback=states.append)
    again = bp.distill(sparse, None, None, batches, **options, resume=states[0])
    assert all(torch.equal(x, weights[name]) for name, x in again.items())
    with pytest.raises(ValueError, match=r"resume: its state has different masks, such as that of '0\.weight'"):
        bp.distill(other, None, None, batches, **options, resume=states[0])


def test_bad_input_is_refused_and_changes_nothing() -> None:
    model = masked(mlp())
    with pytest.raises(ValueError, match="int8 does not train"):
        export.block_sparse(model, dtype="int8", trainable=True)
    with pytest.raises(ValueError, match="int8 does not train"):
        export.choose(model, dtype="int8", training=True)
    rows = tuple(export.Choice(name, 0.5, "torch", "", dtype="int8") for name in bp.read_masks(model))
    with pytest.raises(ValueError, match=r"chooses int8 for 0\.weight, which does not train"):
        export.block_sparse(model, backend=export.Choices(rows), trainable=True)
    sparse = trainable(model)
    with pytest.raises(ValueError, match=r"layers are block-sparse already.*trainable="):
        export.block_sparse(sparse, backend="torch", trainable=True)
    with pytest.raises(TypeError, match=r"an input of torch\.int64"):
        sparse(torch.ones(2, 24, dtype=torch.int64))
    masks, state = bp.read_masks(sparse), copy.deepcopy(sparse.state_dict())
    old = torch.optim.SGD(model.parameters())
    wrong = bp.BlockMask(torch.ones(2, 2).bool(), bp.BlockGrid((8, 8), (4, 4)))
    for arguments, error, said in [
        (({**masks, "2.weight": wrong},), ValueError, r"2\.weight: the mask has shape \(8, 8\), and the weight \(10, 32\)"),
        (({"3.weight": wrong},), KeyError, "no block-sparse weight of the model"),
        ((masks, old), ValueError, "make it from the parameters of this model"),
        (
            ({"0.weight": masks["0.weight"].keep},),
            TypeError,
            r"masks\['0\.weight'\] is a Tensor, not a BlockMask; build one: BlockMask\(keep, grid\)",
        ),
        ((bp.PruningResult(masks, {}),), TypeError, r"masks is a PruningResult, not a mapping .*; give result\.masks"),
    ]:
        with pytest.raises(error, match=said):
            export.update(sparse, arguments[0], optimizer=arguments[1] if len(arguments) > 1 else None)
    with pytest.raises(KeyError, match=r"weights names '0\.weight', but masks does not; give a mask"):
        export.update(sparse, {}, weights={"0.weight": torch.ones(32, 24)}, optimizer=None)
    with pytest.raises(ValueError, match=r"the weight has shape \(2, 2\)"):
        export.update(sparse, masks, weights={"0.weight": torch.ones(2, 2)}, optimizer=None)
    assert all(torch.equal(x, state[name]) for name, x in sparse.state_dict().items())
    int8 = export.block_sparse(model, backend="torch", dtype="int8", max_error=float("inf"))
    with pytest.raises(ValueError, match="int8 cannot be changed"):
        export.update(int8, masks, optimizer=None)
    with pytest.raises(ValueError, match=r"0: a weight of int8 does not train"):
        export.load_state_dict(mlp(), int8.state_dict(), trainable=True)


def partly_empty() -> nn.Module:
    """A masked model, all blocks of one of its layers pruned."""
    torch.manual_seed(0)
    model = masked(mlp().double())
    masks = bp.read_masks(model)
    return bp.apply_masks(model, {**masks, "2.weight": attrs.evolve(masks["2.weight"], keep=torch.zeros_like(masks["2.weight"].keep))})


def sharded_by_layers(model: Any) -> Any:
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def test_an_optimizer_that_trains_none_of_the_weights_is_refused() -> None:
    dense, half = partly_masked()
    frozen = export.block_sparse(masked(mlp()), backend="torch")
    frozen.requires_grad_(True)
    assert not [layer.values for layer in (frozen[0], frozen[2]) if layer.values.requires_grad]  # as the documentation says
    for model in (frozen, dense, half):
        masks, before = bp.read_masks(model), copy.deepcopy(model.state_dict())
        others = {name: attrs.evolve(mask, keep=~mask.keep) for name, mask in masks.items()}
        biases = torch.optim.AdamW([p for name, p in model.named_parameters() if name.endswith("bias")])
        for old in (torch.optim.AdamW(mlp().parameters()), biases):
            with pytest.raises(ValueError, match=r"block_sparse"):
                export.update(model, others, optimizer=old)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with pytest.raises(ValueError, match=r"optimizer holds no weight that masks names, such as 0\.weight; .* trainable=True"):
        export.update(half, {"0.weight": bp.read_masks(half)["0.weight"]}, optimizer=biases)
    with pytest.raises(ValueError, match=r"optimizer holds no weight that masks names, such as 0\.weight; .* optimizer=None"):
        export.update(frozen, bp.read_masks(frozen), optimizer=torch.optim.AdamW(frozen.parameters()))
    export.update(frozen, bp.read_masks(frozen), optimizer=None)


def run_rank(index: int, _: str) -> dict[str, dict[str, Tensor]]:
    states = {}
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(3)).double()[index::2]
    for kind, wrap in {"ddp": DistributedDataParallel, "fsdp": fully_shard, "fsdp of layers": sharded_by_layers}.items():
        model = wrap(trainable(partly_empty()))
        train(model, x, foreach=False)
        if kind != "ddp":
            with pytest.raises(ValueError, match="fully_shard has sharded this layer"):
                export.update(model, bp.read_masks(masked(mlp())), optimizer=None)
        state = model.state_dict().items()
        states[kind] = {key.removeprefix("module."): t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in state}
    return states


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    alone = trainable(partly_empty())
    train(alone, torch.randn(8, 24, generator=torch.Generator().manual_seed(3)).double())
    for states in in_two_processes(run_rank, tmp_path):
        assert states.keys() == {"ddp", "fsdp", "fsdp of layers"}
        for kind, state in states.items():
            for name, right in alone.state_dict().items():
                torch.testing.assert_close(state[name], right, msg=f"{kind} {name}")


def test_an_update_in_inference_mode_leaves_an_optimizer_that_can_go_on() -> None:
    model = masked(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    sparse, twin = (trainable(model) for _ in range(2))
    results = []
    for module, mode in ((sparse, torch.inference_mode), (twin, torch.no_grad)):
        optimizer = torch.optim.Adam(module.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            module(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            with mode():
                export.update(module, other_masks(model), optimizer=optimizer)
        results.append(module(torch.ones(2, 8)))
    assert torch.equal(*results)


def test_a_new_weight_of_another_type_is_named() -> None:
    model = masked(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(TypeError, match=r"weights\['0\.weight'\] is a int; give the dense weight as a tensor"):
        export.update(trainable(model), other_masks(model), optimizer=None, weights={"0.weight": 3})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="weights is a int, not a mapping"):
        export.update(trainable(model), other_masks(model), optimizer=None, weights=3)  # type: ignore[arg-type]
