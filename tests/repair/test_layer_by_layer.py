"""Layer after layer is the hand-written loop; the model is left alone; what was interrupted goes on; mistakes are named."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import pytest
import reference
import torch
from strategies import normal
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune as bp
from blockprune import allocate, collect, metric, reconstruct, statistics
from blockprune.core.types import Param
from blockprune.model.inputs import input_hooks
from blockprune.model.parameters import find_parameters
from blockprune.repair.dense_reference import LayerBatch, trace_layer
from blockprune.repair.hidden_states import HiddenStates
from blockprune.repair.transformer_layers import capture_layer_inputs, find_layers

GRAM = (statistics.input_gram,)
ABSORBING = (statistics.input_gram, statistics.input_mean, statistics.bias)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def mlp(seed: int = 0) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4)), seed).double()


def pipeline(
    block: tuple[int, int] = (2, 2),
    seen: Sequence[statistics.Statistic] = GRAM,
    *,
    where: Any = None,
    score: Any = metric.obs,
    allocator: Any = allocate.per_row,
) -> bp.Pipeline:
    rule = where or bp.linears(block)
    return bp.Pipeline(partial(collect.with_statistics, where=rule, statistics=list(seen)), score, allocator)


def inputs(count: int = 3, rows: int = 20, width: int = 8) -> list[Tensor]:
    mix = normal((width, width), 99)
    return [normal((rows, width), i) @ mix + 0.5 for i in range(count)]


def close(a: Tensor, b: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def same(a: bp.PruningResult, b: bp.PruningResult) -> bool:
    weights = a.weights.keys() == b.weights.keys() and all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
    return weights and a.masks == b.masks and a.layers == b.layers


# The loop by hand.


def greedy(p: Param, sparsity: float, damping: float) -> Tensor:
    """In each row of blocks the least harmful goes, each error from scratch."""
    keep = torch.ones(p.grid.size, dtype=torch.bool)
    (hessian,) = reference.hessians(p, damping)
    for i, band in enumerate(reference.bands(p)):
        order: list[int] = []
        for _ in band.blocks:
            errors = reference.removals(p.weight[band.at], hessian, band.blocks, order)
            order.append(errors.index(min(errors)))
        elements = [len(block) for block in band.blocks]
        fallen = reference.prune_lowest([float(order.index(j)) for j in range(len(order))], elements, sparsity * sum(elements))
        keep[i, sorted(fallen)] = False
    return keep


@pytest.mark.parametrize("block", [(1, 1), (2, 2), (-1, 1), (2, 3)])
def test_it_is_the_loop_by_hand(block: tuple[int, int]) -> None:
    model, x = mlp(), torch.cat(inputs())
    found = bp.sequential(model, pipeline(block), reconstruct.least_squares, inputs(), 0.5, target="pruned")
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            p = Param(layer.weight.detach(), bp.BlockGrid(layer.weight.shape, block), {"input_gram": (x.mT @ x / len(x))[None]})
            keep = greedy(p, 0.5, 0.01)
            assert torch.equal(found.masks[f"{name}.weight"].keep, keep)
            weight = reference.least_squares(p, reference.expand(keep, p.grid), 0.01)
            close(found.weights[f"{name}.weight"], weight)
            x = x @ weight.mT + layer.bias.detach()
        else:
            x = layer(x)
    assert list(found.masks) == list(found.weights) == ["0.weight", "2.weight", "4.weight"]
    assert found.layers == ("0", "1", "2", "3", "4")


# Dense targets.


def kept_inputs(mask: bp.BlockMask) -> Tensor:
    return reference.expand(mask.keep, mask.grid)


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_dense_target_is_the_regression_of_dense_outputs_on_pruned_inputs(absorb: bool, damping: float) -> None:
    """Ridge towards the weight there was, the intercept free; plain least squares without damping."""
    model, x = mlp(), torch.cat(inputs())
    fit = partial(reconstruct.least_squares, damping=damping)
    found = bp.sequential(model, pipeline(seen=ABSORBING if absorb else GRAM), fit, inputs(), 0.5, target="dense")
    pruned = dense = x
    for name, layer in model.named_children():
        if not isinstance(layer, nn.Linear):
            pruned, dense = layer(pruned), layer(dense)
            continue
        weight, bias = layer.weight.detach(), layer.bias.detach()
        center = [z.mean(0) if absorb else torch.zeros(z.shape[1]).double() for z in (pruned, dense)]
        a, b = pruned - center[0], dense - center[1]
        ridge = (damping * a.square().mean(0)).sqrt().diag()
        n = len(x) ** 0.5
        design, aim = torch.cat([a / n, ridge]), torch.cat([b @ weight.mT / n, ridge @ weight.mT])
        keep = kept_inputs(found.masks[f"{name}.weight"])
        for r, kept in enumerate(keep):
            by_hand = torch.linalg.lstsq(design[:, kept], aim[:, r : r + 1], driver="gelsd").solution[:, 0]
            close(found.weights[f"{name}.weight"][r, kept], by_hand, atol=1e-7)
        assert (found.weights[f"{name}.weight"][~keep] == 0).all()
        new = found.weights[f"{name}.weight"]
        shift = weight @ center[1] - new @ center[0] if absorb else 0
        repaired = found.weights.get(f"{name}.bias", bias)
        close(repaired, bias + shift, atol=1e-9)
        if absorb and damping == 0:  # lstsq with a column of ones
            ones = torch.ones(len(x), 1).double()
            for r, kept in enumerate(keep):
                fitted = torch.linalg.lstsq(torch.cat([pruned[:, kept], ones], 1), (dense @ weight[r] + bias[r])[:, None]).solution[:, 0]
                close(torch.cat([new[r, kept], repaired[r : r + 1]]), fitted, atol=1e-7)
        pruned, dense = pruned @ new.mT + repaired, dense @ weight.mT + bias


class Residual(nn.Module):
    """Two weights that meet one input, and one whose output joins the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate, self.down = nn.Tanh(), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(self.up(y) * F.silu(self.gate(y)))  # type: ignore[no-any-return]


def test_a_dense_target_takes_weights_in_order_and_makes_up_for_the_stream() -> None:
    """By hand: up and gate aim at the dense ones on dense inputs; down, fed by those, at the dense stream behind the layer."""
    model, batches = seeded(lambda: nn.Sequential(Residual(), Residual(), Residual())).double(), inputs(width=6)
    found = bp.sequential(
        model, pipeline(), partial(reconstruct.least_squares, damping=1e-12), batches, {"*.down.weight": 0.5, "*": 0.25}, target="dense"
    )
    assert list(found.masks) == [f"{i}.{name}.weight" for i in range(3) for name in ("up", "gate", "down")]
    pruned = dense = torch.cat(batches)

    def fitted(name: str, layer: nn.Linear, x: Tensor, aim: Tensor) -> Tensor:
        weight, keep = found.weights[name], kept_inputs(found.masks[name])
        for r, kept in enumerate(keep):
            close(weight[r, kept], torch.linalg.lstsq(x[:, kept], (aim - layer.bias)[:, r : r + 1]).solution[:, 0], atol=1e-6)
        return x @ weight.mT + layer.bias

    with torch.no_grad():
        for i, layer in enumerate(model):
            x, y = layer.norm(pruned), layer.norm(dense)
            up, gate = (fitted(f"{i}.{name}.weight", part, x, part(y)) for name, part in (("up", layer.up), ("gate", layer.gate)))
            after = layer(dense)
            pruned = pruned + fitted(f"{i}.down.weight", layer.down, up * F.silu(gate), after - pruned)
            dense = after


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_the_streams_that_outputs_join_are_found(name: str) -> None:
    """Before a norm and behind it, in float32 and bfloat16; the order is that of use."""
    build, rule, prefix = MODELS[name]
    for dtype in (torch.float32, torch.bfloat16):
        model = build().to(dtype).eval()
        names = [found for found in bp.collect.weights(model, where=rule) if found.startswith(f"{prefix}1.")]
        layers = [layer for layer in find_layers(model, None, names) if layer.parameters]
        batch = padded(words([16, 11]))
        with torch.no_grad():
            call = capture_layer_inputs(model, layers, lambda m, b: m(**b), batch)
            hooks = input_hooks(model, find_parameters(model, names, what="where"))
            trace = trace_layer(LayerBatch(layers[0], {}, call.hidden, call), hooks)
        assert [len(group) for group in trace.groups] == {"llama": [3, 1, 2, 1], "bert": [3, 1, 1, 1], "gpt2": [1]}[name]
        assert [key.removeprefix(f"{prefix}1.") for key in trace.residual_inputs] == {
            "llama": ["self_attn.o_proj.weight", "mlp.down_proj.weight"],
            "bert": ["attention.output.dense.weight", "output.dense.weight"],
            "gpt2": [],
        }[name]


def test_given_the_same_masks_and_inputs_a_dense_target_is_never_further_from_the_dense_output() -> None:
    """Of two layers: what the second gets is then the same under both targets."""
    for seed in range(5):
        model = seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)), seed).double()
        x, error = torch.cat(inputs()), {}
        for target in ("pruned", "dense"):
            fit = partial(reconstruct.least_squares, damping=0.0)
            found = bp.sequential(model, pipeline(score=metric.l1), fit, inputs(), 0.5, target=target)  # type: ignore[arg-type]
            pruned = bp.apply_masks(copy.deepcopy(model), found.masks, found.weights)
            error[target] = (pruned(x) - model(x)).square().mean().item()
        assert error["dense"] < error["pruned"]


def test_of_the_first_layer_both_targets_are_one() -> None:
    found = [
        bp.sequential(mlp(), pipeline(seen=ABSORBING), reconstruct.least_squares, inputs(), 0.5, target=target)  # type: ignore[arg-type]
        for target in ("pruned", "dense")
    ]
    assert found[0].masks["0.weight"] == found[1].masks["0.weight"]
    close(found[0].weights["0.weight"], found[1].weights["0.weight"])
    close(found[0].weights["0.bias"], found[1].weights["0.bias"])
    assert not torch.allclose(found[0].weights["4.weight"], found[1].weights["4.weight"])


class Sheared(nn.Module):
    """Its samples lie along the second axis, and it looks across the first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + x.mean(0, keepdim=True))  # type: ignore[no-any-return]


class Routed(nn.Module):
    """Two experts, each for some of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        mine, out = rows[:, 0] > 0, rows.clone()
        out[mine], out[~mine] = self.fc(rows[mine]), self.other(rows[~mine])
        return out.view(x.shape)


@pytest.mark.parametrize("target", ["pruned", "dense"])
def test_a_layer_may_mix_the_samples_of_a_batch(target: Any) -> None:
    model, x = seeded(lambda: nn.Sequential(Sheared(), Sheared())).double(), [normal((40, 2, 4), i) for i in range(3)]
    assert bp.sequential(model, pipeline(), reconstruct.least_squares, x, 0.5, target=target).layers == ("0", "1")


def test_a_layer_that_routes_tokens_elsewhere_once_pruned_is_refused_by_a_dense_target_only() -> None:
    model, x = seeded(lambda: nn.Sequential(Routed(), Routed())).double(), [normal((40, 2, 4), i) for i in range(3)]
    assert bp.sequential(model, pipeline(), reconstruct.least_squares, x, 0.5, target="pruned").layers == ("0", "1")
    with pytest.raises(ValueError, match=r"1\.(fc|other)\.weight: the dense layer has \d+ input rows.*use target='pruned'"):
        bp.sequential(model, pipeline(), reconstruct.least_squares, x, 0.5, target="dense")


# The model is left alone.


class Stopped(KeyboardInterrupt):
    pass


def restless() -> nn.Module:
    """Batch norm, dropout, parts in training and in evaluation mode, a frozen weight, a hook."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU())
        )
    ).double()
    model[0][1].eval()  # type: ignore[index,operator]
    model[1][1].weight.requires_grad_(False)  # type: ignore[index,union-attr]
    model[0].register_forward_hook(lambda *_: None)  # type: ignore[index,operator,union-attr]
    return model


def state_of(model: nn.Module) -> list[Any]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs), m.training) for m in model.modules()]
    flags = [(name, id(p), p.requires_grad, p._version, p.grad is None) for name, p in model.named_parameters()]
    tensors = [(name, value.tolist()) for name, value in model.state_dict().items()]
    return [hooks, flags, tensors, torch.get_rng_state().tolist(), torch.is_grad_enabled()]


@pytest.mark.parametrize("target", ["pruned", "dense"])
@pytest.mark.parametrize("stop", [None, ValueError, Stopped])
def test_the_model_is_as_it_was_whatever_happens(stop: type[BaseException] | None, target: Any) -> None:
    model = restless()
    before = state_of(model)

    def each(_: bp.PruningResult) -> None:
        torch.rand(3)
        if stop:
            raise stop

    def go() -> bp.PruningResult:
        tune = partial(bp.finetune_layer, epochs=2, held_out=0.34)
        return bp.sequential(model, pipeline(), reconstruct.least_squares, inputs(), 0.5, target=target, finetune=tune, callback=each)

    if stop:
        with pytest.raises(stop):
            go()
    else:
        assert not any(w.requires_grad for w in go().weights.values())
    assert state_of(model) == before


def test_the_batches_are_as_they_were_also_where_layers_write_into_their_input() -> None:
    """And what comes out is that of a model that does not."""

    def build(inplace: bool) -> nn.Module:
        return seeded(
            lambda: nn.Sequential(nn.Sequential(nn.ELU(inplace=inplace), nn.Linear(8, 8)), nn.ELU(inplace=inplace), nn.Linear(8, 4))
        )

    batches = inputs()
    before = [x.clone() for x in batches]
    for target in ("pruned", "dense"):
        tune = partial(bp.finetune_layer, epochs=1, held_out=0)
        one, two = (
            bp.sequential(build(i).double(), pipeline(), reconstruct.least_squares, inputs(), 0.5, target=target, finetune=tune)  # type: ignore[arg-type]
            for i in (False, True)
        )
        assert same(one, two)
    bp.sequential(build(False).double(), pipeline(), reconstruct.least_squares, batches, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))


# Interrupted and gone on with.


@pytest.mark.parametrize("tune", [None, partial(bp.finetune_layer, epochs=2, held_out=0.34, lr=1e-2)])
@pytest.mark.parametrize("target", ["pruned", "dense"])
def test_stopped_after_any_layer_and_gone_on_with_it_is_the_same_to_the_bit(target: Any, tune: Any) -> None:
    go = partial(bp.sequential, mlp(), pipeline(seen=ABSORBING), reconstruct.least_squares, inputs(), 0.5, target=target, finetune=tune)
    whole = go()
    for stop in range(5):
        seen: list[bp.PruningResult] = []

        def each(so_far: bp.PruningResult, seen: list[bp.PruningResult] = seen, stop: int = stop) -> None:
            seen.append(so_far)
            if len(seen) == stop + 1:
                raise Stopped

        with pytest.raises(Stopped):
            go(callback=each)
        later: list[bp.PruningResult] = []
        assert same(go(resume=seen[-1], callback=later.append), whole)
        prefixes = [one.layers for one in [*seen, *later]]
        assert prefixes == [whole.layers[:i] for i in range(1, 6)]
        for one in [*seen, *later]:
            assert {name.split(".")[0] for name in one.masks} == {"0", "2", "4"} & set(one.layers)
            assert all(one.masks[name] == whole.masks[name] for name in one.masks)
            assert all(torch.equal(one.weights[name], whole.weights[name]) for name in one.weights)


def test_all_done_is_done() -> None:
    whole = bp.sequential(mlp(), pipeline(), reconstruct.least_squares, inputs(), 0.5)
    assert same(bp.sequential(mlp(), pipeline(), reconstruct.least_squares, inputs(), 0.9, resume=whole), whole)


def test_what_was_done_of_other_layers_is_refused() -> None:
    done = bp.PruningResult({}, {}, ("0", "2"))
    with pytest.raises(ValueError, match=r"resume is of layers '0', '2'.*give the same layers"):
        bp.sequential(mlp(), pipeline(), reconstruct.least_squares, inputs(), 0.5, resume=done)


def test_a_result_that_lacks_a_mask_of_a_finished_layer_or_has_one_of_another_shape_is_refused() -> None:
    go = partial(bp.sequential, mlp(), pipeline(), reconstruct.least_squares, inputs(), 0.5)
    whole = go()
    without = {name: mask for name, mask in whole.masks.items() if name != "2.weight"}
    with pytest.raises(ValueError, match=r"layer '2' is done, but it has no mask for 2.weight \(6, 12\); give the whole result"):
        go(resume=attrs.evolve(whole, masks=without))
    with pytest.raises(
        ValueError, match=r"0.weight \(12, 8\): resume has a mask of .*block=\(2, 2\).*chooses .*block=\(4, 4\).*; give the first"
    ):
        bp.sequential(mlp(), pipeline((4, 4)), reconstruct.least_squares, inputs(), 0.5, resume=whole)
    other = {**whole.masks, "2.weight": whole.masks["0.weight"]}
    with pytest.raises(ValueError, match=r"2.weight \(6, 12\): resume has a mask for shape \(12, 8\)"):
        go(resume=attrs.evolve(whole, masks=other))


def test_a_result_without_a_weight_of_a_finished_layer_or_with_a_wrong_one_is_refused() -> None:
    go = partial(bp.sequential, mlp(), pipeline(), reconstruct.least_squares, inputs(), 0.5)
    whole = go()
    for without in ({}, {name: weight for name, weight in whole.weights.items() if name != "0.weight"}):
        with pytest.raises(ValueError, match=r"layer '0' is done, but it has no weight for 0.weight \(12, 8\); give the whole result"):
            go(resume=attrs.evolve(whole, weights=without))
    for weight, message in (
        (whole.weights["0.weight"], r"2.weight \(6, 12\): resume has a weight of shape \(12, 8\); it is of another model"),
        (whole.weights["2.weight"] * float("nan"), r"2.weight \(6, 12\): resume has a weight with NaN or inf"),
    ):
        with pytest.raises(ValueError, match=message):
            go(resume=attrs.evolve(whole, weights={**whole.weights, "2.weight": weight}))


def test_a_repair_that_returns_no_weights_can_be_resumed() -> None:
    go = partial(bp.sequential, mlp(), pipeline(), lambda data, masks: {}, inputs(), 0.5)
    callbacks: list[bp.PruningResult] = []
    whole = go(callback=callbacks.append)
    assert same(go(resume=callbacks[1]), whole)
    assert not whole.weights


# Layers.


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return x + scale * self.down(F.gelu(self.up(self.norm(x)))), None


class Stacked(nn.Module):
    """Layers in a ModuleList some way down, beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.inner = nn.ModuleDict({"layers": nn.ModuleList([Block(8) for _ in range(3)])})
        self.small = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.inner["layers"]:  # type: ignore[union-attr]
            x, _ = layer(x, scale=0.5)
        return self.head(self.small(x))  # type: ignore[no-any-return]


def words(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    return [torch.randint(1, 20, (n,), generator=torch.Generator().manual_seed(seed + i)) for i, n in enumerate(lengths)]


IN_LAYERS = bp.named("inner.layers.*.up.weight", (2, 2))


def test_the_layers_of_a_nested_list_are_found() -> None:
    model, batches = seeded(Stacked).double(), [torch.stack(words([12] * 4, seed=4 * i)) for i in range(2)]
    found = bp.sequential(model, pipeline(where=IN_LAYERS), reconstruct.least_squares, batches, 0.5, target="dense")
    assert found.layers == tuple(f"inner.layers.{i}" for i in range(3))
    assert list(found.masks) == [f"inner.layers.{i}.up.weight" for i in range(3)]
    assert bp.sparsity(found.masks) == 0.5


def test_layers_may_be_named_and_some_hold_nothing_to_prune() -> None:
    model, batches = seeded(Stacked).double(), words([40, 50])
    rule = bp.first_of(bp.named("inner.layers.1.*.weight", (2, 2)), bp.named("inner.layers.2.down.weight", (4, 4)))
    rule = bp.excluding(rule, "*norm*")
    names = ["inner.layers.1", "inner.layers.2"]
    found = bp.sequential(model, pipeline(where=rule), reconstruct.least_squares, batches, 0.25, layers=names)
    assert found.layers == tuple(names)
    assert bp.sparsity(found.masks) == 0.25
    whole = bp.sequential(model, pipeline(where=rule), reconstruct.least_squares, batches, 0.25)
    assert same(attrs.evolve(whole, layers=found.layers), found)


def test_the_whole_model_may_be_the_one_layer() -> None:
    model = mlp()
    found = bp.sequential(model, pipeline(), reconstruct.least_squares, inputs(), 0.5, layers=[""], target="pruned")
    data = pipeline().collect.func(model, **pipeline().collect.keywords, batches=inputs())  # type: ignore[attr-defined]
    masks = allocate.per_row(metric.obs(data), 0.5)
    assert found.masks == masks
    assert all(torch.equal(found.weights[k], v) for k, v in reconstruct.least_squares(data, masks).items())


def test_a_tensor_that_two_layers_share_is_pruned_in_both() -> None:
    """It goes by its first name; the later layer sees it as `apply_masks` will write it."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))).double()
    model[2].weight = model[0].weight  # type: ignore[index,union-attr,assignment]
    found = bp.sequential(model, pipeline(), reconstruct.least_squares, inputs(), 0.5, target="pruned")
    assert list(found.masks) == ["0.weight", "4.weight"]
    x = torch.cat(inputs())
    for layer in list(bp.apply_masks(copy.deepcopy(model), found.masks, found.weights))[:4]:  # type: ignore[call-overload]
        x = layer(x).detach()
    p = Param(model[4].weight.detach(), bp.BlockGrid((4, 8), (2, 2)), {"input_gram": (x.mT @ x / len(x))[None]})  # type: ignore[index,union-attr]
    close(found.weights["4.weight"], reference.least_squares(p, kept_inputs(found.masks["4.weight"]), 0.01))


def test_tuning_moves_a_tensor_that_a_layer_uses_twice_as_one() -> None:
    def build() -> nn.Module:
        inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        inner[2].weight = inner[0].weight
        return nn.Sequential(inner, nn.Tanh())

    model, seen = seeded(build).double(), []

    def tune(run: Any, parameters: Mapping[str, Tensor], masks: bp.Masks, batches: Any, targets: Sequence[Tensor]) -> Mapping[str, Tensor]:
        seen.extend([*parameters])
        return {name: 0.5 * parameters[name] for name in masks}

    found = bp.sequential(model, pipeline(), reconstruct.least_squares, inputs(), 0.5, finetune=tune)
    assert seen == ["0.weight"]
    assert list(found.weights) == ["0.0.weight"]


@pytest.mark.parametrize("kind", ["keyword", "mapping", "list"])
def test_a_layer_may_be_given_its_input_by_keyword_and_give_more_than_a_tensor(kind: str) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor, scale: float = 1.0) -> Any:
            y = self.fc(x) * scale
            return {"keyword": y, "mapping": {"y": y, "more": 0}, "list": [y, None]}[kind]

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                y = layer(x=x, scale=0.5)
                x = {"keyword": lambda y: y, "mapping": lambda y: y["y"], "list": lambda y: y[0]}[kind](y)
            return x

    model = seeded(Chain).double()
    found = bp.sequential(model, pipeline(), reconstruct.least_squares, inputs(), 0.5, target="dense")
    assert list(found.weights) == ["layers.0.fc.weight", "layers.1.fc.weight"]


@pytest.mark.parametrize(("length", "samples"), [(5, 3), (4, 4), (5, 1)])
@pytest.mark.parametrize("target", ["pruned", "dense"])
def test_torchs_encoder_with_its_masks(length: int, samples: int, target: Any) -> None:
    """Batch by batch as sample by sample; the square mask has no batch axis, also where it is as long as there are samples."""
    layer = partial(nn.TransformerEncoderLayer, 16, 4, 24, batch_first=True)
    model = seeded(lambda: nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)).double()
    go = partial(bp.sequential, model, pipeline(where=bp.named("*linear*.weight", (4, 4))), reconstruct.least_squares, sparsity=0.5)
    x, square = normal((samples, length, 16), 0), nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)
    one = go(batches=[{"src": x, "mask": square}], target=target)
    two = go(batches=[{"src": x[i : i + 1], "mask": square} for i in range(samples)], target=target)
    assert one.masks == two.masks
    for key, weight in one.weights.items():
        close(two.weights[key], weight, atol=1e-8)


# Hugging Face, with padding.


def llama() -> nn.Module:
    hf = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return seeded(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=20, num_key_value_heads=2, max_position_embeddings=32, **sizes))
    ).double()


def bert() -> nn.Module:
    hf = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return seeded(lambda: hf.BertModel(hf.BertConfig(vocab_size=20, max_position_embeddings=32, **sizes))).double()


def gpt2() -> nn.Module:
    hf = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 1}
    model = seeded(lambda: hf.GPT2Model(hf.GPT2Config(vocab_size=20, **sizes))).double()
    for layer in model.h:  # type: ignore[union-attr]
        old = layer.mlp.c_fc  # type: ignore[union-attr]
        layer.mlp.c_fc = seeded(lambda: nn.Linear(32, 128)).double()  # type: ignore[union-attr]
        with torch.no_grad():
            layer.mlp.c_fc.weight.copy_(old.weight.mT)  # type: ignore[union-attr]
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "llama": (llama, bp.excluding(bp.linears((4, 4)), "lm_head*"), "model.layers."),
    "bert": (bert, bp.excluding(bp.linears((4, 4)), "pooler*"), "encoder.layer."),
    "gpt2": (gpt2, bp.linears((4, 4)), "h."),  # caches are positional there
}


def padded(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    longest = max(map(len, texts))
    mask = [F.pad(torch.ones_like(t), (0, longest - len(t))) for t in texts]
    return {"input_ids": torch.stack([F.pad(t, (0, longest - len(t))) for t in texts]), "attention_mask": torch.stack(mask)}


@pytest.mark.parametrize("target", ["pruned", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_and_batching_change_nothing(name: str, target: Any) -> None:
    build, rule, prefix = MODELS[name]
    model, texts = build(), words([16, 11, 7, 14])
    how = {"target": target, "finetune": lambda run, parameters, masks, batches, targets: {k: parameters[k] for k in masks}}
    go = partial(bp.sequential, model, pipeline(where=rule, seen=ABSORBING), reconstruct.least_squares, sparsity=0.5, **how)
    one = go(batches=[padded(texts)])
    two = go(batches=[padded([t]) for t in texts])
    some = go(batches=[padded(texts[:3]), padded(texts[3:])])
    assert all(layer.startswith(prefix) for layer in one.layers)
    assert bp.sparsity(one.masks) == 0.5
    for other in (two, some):
        assert other.masks == one.masks
        for key, weight in one.weights.items():
            close(other.weights[key], weight, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_tuning_does_not_see_padding(name: str) -> None:
    build, rule, _ = MODELS[name]
    model, texts, shapes = build(), words([16, 11]), []

    def tune(run: Any, parameters: Mapping[str, Tensor], masks: bp.Masks, batches: Any, targets: Sequence[Tensor]) -> Mapping[str, Tensor]:
        shapes.append((run(parameters, batches[0]).shape, targets[0].shape))
        return {k: parameters[k] for k in masks}

    bp.sequential(model, pipeline(where=rule), reconstruct.least_squares, [padded(texts)], 0.5, finetune=tune)
    assert set(shapes) == {((27, 32), (27, 32))}


def test_tokens_may_count_in_part() -> None:
    """A token of weight 2 is the token twice."""
    model, texts = seeded(Stacked).double(), torch.stack(words([12, 12]))
    go = partial(bp.sequential, model, pipeline(where=IN_LAYERS), reconstruct.least_squares, sparsity=0.5, target="dense")
    weights = torch.ones(2, 12)
    weights[1] = 2
    one = go(batches=[texts], token_weights=lambda batch: weights)
    two = go(batches=[texts, texts[1:]])
    assert one.masks == two.masks
    assert all(torch.allclose(one.weights[k], two.weights[k]) for k in one.weights)


# What a layer computed is what the repaired model computes.


@pytest.mark.parametrize("name", [*MODELS, "stacked"])
def test_the_repaired_model_computes_what_each_layer_was_given_and_gave(name: str) -> None:
    build, rule, _ = MODELS[name] if name != "stacked" else (lambda: seeded(Stacked).double(), IN_LAYERS, "")
    batch: Any = padded(words([16, 11])) if name != "stacked" else torch.stack(words([16, 16]))
    model, gave = build(), []

    def tune(run: Any, parameters: Mapping[str, Tensor], masks: bp.Masks, batches: Any, targets: Sequence[Tensor]) -> Mapping[str, Tensor]:
        gave.append(run(parameters, batches[0]))
        return {k: parameters[k] for k in masks}

    pipe = pipeline(where=rule, seen=ABSORBING)
    found = bp.sequential(model, pipe, reconstruct.least_squares, [batch], 0.5, finetune=tune)
    bp.apply_masks(model, found.masks, found.weights)
    model.eval()
    computed: list[Tensor] = []
    for layer in found.layers:
        model.get_submodule(layer).register_forward_hook(lambda m, a, y: computed.append(y if isinstance(y, Tensor) else y[0]))
    with torch.no_grad():
        model(**batch) if isinstance(batch, Mapping) else model(batch)
    real = batch["attention_mask"].bool() if isinstance(batch, Mapping) else torch.ones_like(batch, dtype=torch.bool)
    assert len(computed) == len(gave) > 1
    for a, b in zip(computed, gave, strict=True):
        close(a[real], b.reshape(-1, b.shape[-1]))


# Sparsities, evidence, other stages.


def test_a_sparsity_for_each_parameter_by_name_or_pattern() -> None:
    wanted = {"0.weight": 0.25, "[24].*": 0.75}
    found = bp.sequential(mlp(), pipeline((1, 1)), reconstruct.least_squares, inputs(), wanted)
    spent = {name: bp.sparsity({name: mask}) for name, mask in found.masks.items()}
    assert spent["0.weight"] == 0.25
    assert spent["2.weight"] == 0.75
    assert spent["4.weight"] == pytest.approx(0.75, abs=0.1)  # 6 columns: 4 or 5 of them
    with pytest.raises(KeyError, match=r"sparsity has no key for '2.weight'.*'\*'"):
        bp.sequential(mlp(), pipeline((1, 1)), reconstruct.least_squares, inputs(), {"0.*": 0.5})
    rest = bp.sequential(mlp(), pipeline((1, 1)), reconstruct.least_squares, inputs(), {"0.*": 0.5, "*": 0.0})
    assert rest.masks["2.weight"].keep.all()
    assert rest.masks["4.weight"].keep.all()


def test_sparsity_0_changes_no_weight_and_1_leaves_none() -> None:
    model = mlp()
    none = bp.sequential(model, pipeline(), reconstruct.least_squares, inputs(), 0.0, target="pruned")
    assert all(torch.equal(none.weights[k], model.get_parameter(k)) for k in none.masks)
    everything = bp.sequential(model, pipeline(), reconstruct.least_squares, inputs(), {"2.weight": 1.0, "*": 0.0})
    assert not everything.weights["2.weight"].any()


def test_evidence_weighs_the_scores() -> None:
    """Rows of no gradient lose first where the whole layer competes; the layer's own statistics win over older ones."""
    model, size = mlp(), (12, 1)
    grads = torch.ones(size).double()
    grads[:4] = 1e-6
    old = Param(model[0].weight.detach(), bp.BlockGrid((12, 8), (2, 2)), {"output_grad_sq": grads, "input_gram": torch.zeros(1, 8, 8)})  # type: ignore[index,union-attr]
    pipe = pipeline(allocator=allocate.per_layer)
    plain = bp.sequential(model, pipe, reconstruct.least_squares, inputs(), 1 / 3)
    weighed = bp.sequential(model, pipe, reconstruct.least_squares, inputs(), 1 / 3, extra_data={"0.weight": old})
    keep = weighed.masks["0.weight"].keep
    assert not keep[:2].any()
    assert keep[2:].all()
    assert plain.masks["0.weight"].keep[:2].any()


def test_evidence_is_what_the_dense_model_gives() -> None:
    model, rule = mlp(), bp.linears((2, 2))
    known = collect.with_statistics(
        model, where=rule, statistics=[statistics.output_grad_gram], batches=inputs(), loss=lambda y, _: y.square().sum()
    )
    seen: list[set[str]] = []

    def score(data: bp.Data) -> bp.Scores:
        seen.append({key for p in data.values() for key in p.stats})
        return metric.obs(data)

    bp.sequential(model, pipeline(score=score), reconstruct.least_squares, inputs(), 0.5, extra_data=known, target="pruned")
    assert seen == [{"input_gram", "output_grad_gram"}] * 3


def test_other_metrics_without_repair_are_masks_only() -> None:
    model, x = mlp(), torch.cat(inputs())
    found = bp.sequential(model, pipeline(seen=[statistics.input_sq], score=metric.wanda), reconstruct.none, inputs(), 0.5)
    assert found.weights == {}
    plain = bp.apply_masks(copy.deepcopy(model), found.masks)
    for name, layer in plain.named_children():
        if isinstance(layer, nn.Linear):
            p = Param(
                model.get_parameter(f"{name}.weight").detach(),
                bp.BlockGrid(layer.weight.shape, (2, 2)),
                {"input_sq": x.square().mean(0)[None]},
            )
            assert allocate.per_row(metric.wanda({"w": p}), 0.5)["w"] == found.masks[f"{name}.weight"]
        x = layer(x).detach()


def test_folded_biases_are_those_of_the_inputs_that_the_layer_gets() -> None:
    model, x = mlp(), torch.cat(inputs())
    pipe = pipeline(seen=[statistics.input_mean, statistics.bias], score=metric.l1)
    found = bp.sequential(model, pipe, reconstruct.bias, inputs(), 0.5)
    assert set(found.weights) == {"0.bias", "2.bias", "4.bias"}
    pruned = bp.apply_masks(copy.deepcopy(model), found.masks, found.weights)
    for layer, dense in zip(pruned.children(), model.children(), strict=True):
        if isinstance(layer, nn.Linear):
            close(layer(x).mean(0), dense(x).mean(0))
        x = layer(x).detach()


def test_batches_may_be_a_generator_and_mixed_in_size() -> None:
    def batches() -> Iterator[Tensor]:
        yield from torch.cat(inputs()).split([7, 1, 52])

    one, two = (
        bp.sequential(mlp(), pipeline(), reconstruct.least_squares, b, 0.5, target="dense") for b in (batches(), [torch.cat(inputs())])
    )
    assert one.masks == two.masks
    assert all(torch.allclose(one.weights[k], two.weights[k]) for k in one.weights)


def test_batches_may_be_pairs_or_go_through_a_forward_of_ones_own() -> None:
    x = inputs()
    one, two, three = (
        bp.sequential(mlp(), pipeline(), reconstruct.least_squares, batches, 0.5, **how)
        for batches, how in (
            (x, {}),
            ([(b, 0) for b in x], {}),
            ([{"x": b} for b in x], {"forward": lambda model, batch: model(batch["x"])}),
        )
    )
    assert same(one, two)
    assert same(one, three)


# Mistakes.


def branching() -> nn.Module:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            a, b, c = self.layers
            return c(a(x) + b(x))  # type: ignore[no-any-return]

    return Branching().double()


class Overwritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layers
        return b(a(x).mul_(2))  # type: ignore[no-any-return]


def shared(last: bool = False) -> nn.Module:
    act = nn.ReLU()
    if last:
        linear = nn.Linear(8, 8)
        return nn.Sequential(nn.Linear(8, 8), linear, linear).double()
    return nn.Sequential(nn.Linear(8, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 8)).double()


def keyed() -> nn.Module:
    class Keyed(nn.Module):
        def forward(self, x: Tensor) -> dict[str, int]:
            return {"count": len(x)}

    return nn.Sequential(Keyed(), nn.Linear(8, 8)).double()


class Loop(nn.Module):
    """One layer that runs several times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layers[0](x).tanh()
        return x


def nested() -> dict[str, Any]:
    """What torch's own encoder makes of padding."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1).double()
    padding = torch.tensor([[False, False], [False, True]])
    where = bp.named("*linear*.weight", (2, 2))
    return {"model": model, "pipeline": pipeline(where=where), "batches": [{"src": normal((2, 2, 8), 0), "src_key_padding_mask": padding}]}


def masked() -> nn.Module:
    model = mlp()
    return bp.apply_masks(model, {"0.weight": bp.BlockMask(torch.ones(6, 4).bool(), bp.BlockGrid((12, 8), (2, 2)))})


def bound(**more: Any) -> bp.Pipeline:
    how = {"where": bp.linears((2, 2)), "statistics": [statistics.input_gram], **more}
    return bp.Pipeline(partial(collect.with_statistics, **{k: v for k, v in how.items() if v is not None}), metric.obs, allocate.per_row)


def unbound() -> bp.Pipeline:
    return bp.Pipeline(lambda model: {}, metric.obs, allocate.per_row)


def without_statistics() -> bp.Pipeline:
    def collector(model: nn.Module, *, where: bp.Where = bp.linears((2, 2)), calibration: Any = None) -> bp.Data:  # noqa: B008
        return {}

    return bp.Pipeline(collector, metric.obs, allocate.per_row)


class Unfinished(nn.Sequential):
    """An encoder whose decoder lacks its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise ValueError("give decoder_input_ids")


def test_an_error_after_the_last_layer_does_not_matter() -> None:
    model, unfinished = mlp(), Unfinished(*mlp())
    found, expected = (bp.sequential(m, pipeline(), reconstruct.least_squares, inputs(), 0.5) for m in (unfinished, model))
    assert same(found, expected)


MISTAKES: dict[str, tuple[type[Exception], str, Callable[[], dict[str, Any]]]] = {
    "masked": (ValueError, r"model is masked.*bp.finalize", lambda: {"model": masked()}),
    "collect is a function": (TypeError, r"partial\(collect.with_statistics, where=", lambda: {"pipeline": unbound()}),
    "a recipe": (
        TypeError,
        r"pipeline is a OneShot; give a Pipeline, .*recipe\.pipeline, or call the recipe itself: recipe\(model, sparsity\)",
        lambda: {"pipeline": bp.recipes.wanda(bp.linears((2, 2)), bp.Calibration([]))},
    ),
    "unknown extra data": (
        KeyError,
        r"extra_data names '0.wieght', which is not a parameter of the model; similar names: '0.weight'",
        lambda: {"extra_data": {"0.wieght": Param(torch.ones(12, 8), bp.BlockGrid((12, 8), (2, 2)))}},
    ),
    "extra data of another model": (
        ValueError,
        r"extra_data\['0.weight'\] is of a parameter \(3, 8\), but that of the model is \(\d+, 8\); collect it from this model",
        lambda: {"extra_data": {"0.weight": Param(torch.ones(3, 8), bp.BlockGrid((3, 8), (2, 2)))}},
    ),
    "extra data without grids": (
        TypeError,
        r"extra_data\['0.weight'\] is a Tensor, not a Param",
        lambda: {"extra_data": {"0.weight": torch.ones(12, 8)}},
    ),
    "an allocator without masks": (
        TypeError,
        r"allocate must return a mapping from parameter names to BlockMask, not a list",
        lambda: {"pipeline": attrs.evolve(pipeline(), allocate=lambda scores, sparsity: [1])},
    ),
    "no where": (TypeError, r"have a default for where", lambda: {"pipeline": bound(where=None)}),
    "no statistics": (TypeError, r"must take where=, statistics= and calibration=", lambda: {"pipeline": without_statistics()}),
    "batches bound": (TypeError, r"binds batches.*give it to sequential", lambda: {"pipeline": bound(batches=[])}),
    "calibration bound": (
        TypeError,
        r"binds calibration.*give it to sequential",
        lambda: {"pipeline": bound(calibration=bp.Calibration([]))},
    ),
    "forward bound": (TypeError, r"binds forward.*give it to sequential", lambda: {"pipeline": bound(forward=len)}),
    "gradients": (
        ValueError,
        r"output_grad_sq needs gradients.*extra_data=",
        lambda: {"pipeline": bound(statistics=[statistics.input_gram, statistics.output_grad_sq])},
    ),
    "gates": (ValueError, r"gate_fisher needs gradients.*extra_data=", lambda: {"pipeline": bound(statistics=[statistics.gate_fisher])}),
    "cross": (
        ValueError,
        r"input_cross.*leave them out",
        lambda: {"pipeline": bound(statistics=[statistics.input_gram, statistics.input_cross])},
    ),
    "outside": (ValueError, r"4.weight lies in none of the layers '0' to '2'.*excluding", lambda: {"layers": ["0", "1", "2"]}),
    "a head": (
        ValueError,
        r"head.weight lies in none of the layers 'body.0' to 'body.1'; keep to theirs, bp.including\(rule, \"body\.\*\"\)",
        lambda: {
            "model": nn.ModuleDict({"body": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "head": nn.Linear(8, 8)}).double(),
            "pipeline": pipeline(where=bp.linears((4, 4))),
        },
    ),
    "some of the layers": (
        ValueError,
        r"body.1.weight lies in none of the layers 'body.0' to 'body.0'; leave it out \(`excluding`\)",
        lambda: {
            "model": nn.ModuleDict({"body": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))}).double(),
            "pipeline": pipeline(where=bp.linears((4, 4))),
            "layers": ["body.0"],
        },
    ),
    "apart": (ValueError, r"layer '2' is not given the output of the one before", lambda: {"layers": ["0", "2", "3", "4"]}),
    "branches": (ValueError, r"layer 'layers.1' is not given the output of the one before", lambda: {"model": branching()}),
    "written into between": (ValueError, r"layer 'layers.1' is not given", lambda: {"model": Overwritten().double()}),
    "out of order": (ValueError, r"never calls layer '2' in the order", lambda: {"layers": ["2", "3", "4", "0", "1"]}),
    "twice": (ValueError, r"layer '1' is called twice.*layers=", lambda: {"model": shared()}),
    "the last one twice": (ValueError, r"layer '1' is called twice.*layers=.*recipes.wanda", lambda: {"model": shared(last=True)}),
    "in a loop": (ValueError, r"layer 'layers.0' is called twice", lambda: {"model": Loop().double(), "pipeline": pipeline()}),
    "no tensor": (
        ValueError,
        r"layer '0' must return a tensor, or a tuple that starts with one, not a int;",
        lambda: {"model": keyed(), "pipeline": pipeline()},
    ),
    "nested": (ValueError, r"layer 'layers.0' is given a nested tensor; .*enable_nested_tensor=False", nested),
    "layer in a layer": (ValueError, r"layer '0' is not given the output of the one before", lambda: {"layers": ["", "0"]}),
    "unknown layer": (KeyError, r"layers names '5'.*; the names are .*'0', '1'", lambda: {"layers": ["0", "5"]}),
    "one name": (TypeError, r"layers='model' is one name.*\['model'\]", lambda: {"layers": "model"}),
    "no layers": (ValueError, r"layers is empty; name at least one", lambda: {"layers": []}),
    "no list": (ValueError, r"Linear has no ModuleList or Sequential.*layers=", lambda: {"model": nn.Linear(8, 8).double()}),
    "no batches": (ValueError, r"batches is empty", lambda: {"batches": []}),
    "one batch": (TypeError, r"batches is one Tensor.*\[batch\]", lambda: {"batches": inputs()[0]}),
    "one mapping": (TypeError, r"batches is one dict.*\[batch\]", lambda: {"batches": {"input": inputs()[0]}}),
    "target": (ValueError, r"target='both' must be 'pruned' or 'dense'", lambda: {"target": "both"}),
    "sparsity key": (
        KeyError,
        r"sparsity has a key '1.weight' that matches no parameter; similar names: '",
        lambda: {"sparsity": {"1.weight": 0.5}},
    ),
    "sparsity": (ValueError, r"sparsity=1.5", lambda: {"sparsity": 1.5}),
    "nothing chosen": (ValueError, r"matches no parameter", lambda: {"pipeline": pipeline(where=bp.convs((1,)))}),
    "computed": (
        ValueError,
        r"0.weight is computed by another parametrization.*remove",
        lambda: {"model": nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))).double()},
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_the_model_left_alone(mistake: str) -> None:
    error, message, change = MISTAKES[mistake]
    given: dict[str, Any] = {"model": mlp(), "pipeline": pipeline(), "batches": inputs(), "sparsity": 0.5, **change()}
    before = state_of(given["model"])
    with pytest.raises(error, match=message):
        bp.sequential(reconstruct=reconstruct.least_squares, **given)
    assert state_of(given["model"]) == before


def test_a_model_without_values_names_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device and has no values; .*prune_checkpoint"):
        bp.sequential(mlp().to("meta"), pipeline(), reconstruct.none, inputs(), 0.5)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layers", [["2", "1", "0"], ["1", "2", "0"]])
def test_layers_in_another_order_are_refused_whatever_the_batches(layers: list[str], count: int) -> None:
    model = seeded(lambda: nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])).double()
    with pytest.raises(ValueError, match=r"the forward never calls layer '.' in the order given"):
        bp.sequential(model, pipeline(), reconstruct.none, inputs(count), 0.5, layers=layers)


class NoisyLayer(nn.Module):
    """A layer whose own forward draws random numbers, in evaluation mode too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(8, 8), nn.Linear(8, 8), kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return x + self.second(F.dropout(h, 0.3, training=True) if self.kind == "dropout" else h + torch.randn_like(h))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["dropout", "randn"])
@pytest.mark.parametrize("repair", [reconstruct.least_squares, reconstruct.sparsegpt])
def test_the_noise_of_a_layer_is_the_same_beside_the_dense_one_so_that_nothing_pruned_keeps_the_weights(
    kind: str, repair: Callable[..., Any]
) -> None:
    model = seeded(lambda: nn.Sequential(*(NoisyLayer(kind) for _ in range(3)))).double()
    before = torch.get_rng_state()
    result = bp.sequential(model, pipeline(), repair, inputs(), 0.0)
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in result.weights.items():
        close(weight, model.get_parameter(name), atol=1e-8)


def test_each_layer_and_batch_has_noise_of_its_own_and_a_layer_on_a_batch_always_the_same() -> None:
    model = seeded(lambda: nn.Sequential(*(NoisyLayer("randn") for _ in range(2)))).double()
    order = find_layers(model, None, [])
    x = normal((20, 8), 0)
    states = HiddenStates.of(model, order, bp.Calibration([x, x]), keep_dense=True)
    outputs = [[batch.run() for batch in states.batches(layer, {}, dense=dense)] for layer in order for dense in (True, False)]
    for dense, pruned in (outputs[:2], outputs[2:]):
        assert torch.equal(dense[0], pruned[0])
        assert torch.equal(dense[1], pruned[1])
        assert not torch.equal(dense[0], dense[1])
    first, second = (states.batches(layer, {})[0].seed for layer in order)
    assert first != second


def of_weights(change: Callable[[Tensor], Any]) -> Callable[..., Any]:
    return lambda data, masks: {name: change(p.weight) for name, p in data.items()}


WRONG_REPAIRS: dict[str, tuple[type[Exception], str, Callable[..., Any]]] = {
    "NaN": (ValueError, r"a new weight from reconstruct with NaN or inf", of_weights(lambda w: w * torch.nan)),
    "integers": (TypeError, r"a new weight from reconstruct that is torch.int64, which rounds it", of_weights(lambda w: w.long())),
    "complex": (TypeError, r"that is torch.complex128", of_weights(lambda w: w + 1j)),
    "sparse": (TypeError, r"that is torch.float64, torch.sparse_coo", of_weights(lambda w: w.to_sparse())),
    "meta": (ValueError, r"on the meta device, which has no values", of_weights(lambda w: w.to("meta"))),
    "lists": (TypeError, r"that is list; give a dense real tensor", of_weights(lambda w: w.tolist())),
    "NumPy": (TypeError, r"that is ndarray; give a dense real tensor", of_weights(lambda w: w.numpy())),
    "a row": (
        ValueError,
        r"0.weight: the parameter \(\d+, 8\) has a new weight from reconstruct of shape \(1, 8\)",
        of_weights(lambda w: w[:1]),
    ),
    "transposed": (ValueError, r"from reconstruct of shape \(8, \d+\); give the whole weight", of_weights(lambda w: w.T)),
    "a bias of one number": (
        ValueError,
        r"0.bias: the parameter .* of shape \(1,\)",
        lambda d, m: {"0.bias": torch.zeros(1)} if "0.weight" in d else {},
    ),
    "a mistyped name": (
        KeyError,
        r"'0.wieght', which is not a parameter of layer '0'; similar names: '0.weight'",
        lambda d, m: {"0.wieght": torch.zeros(1)},
    ),
    "another layer": (KeyError, r"'2.weight', which is not a parameter of layer '0'", lambda d, m: {"2.weight": torch.zeros(1)}),
    "None": (TypeError, r"reconstruct must return a mapping .*for layer '0' it returned a NoneType", lambda d, m: None),
    "a list": (TypeError, r"reconstruct must return a mapping .*for layer '0' it returned a list", lambda d, m: [*d]),
}


@pytest.mark.parametrize("target", ["dense", "pruned"])
@pytest.mark.parametrize("wrong", WRONG_REPAIRS)
def test_a_repair_that_returns_something_else_than_the_layers_weights_is_named(wrong: str, target: Any) -> None:
    error, message, repair = WRONG_REPAIRS[wrong]
    model = mlp()
    before = state_of(model)
    with pytest.raises(error, match=message):
        bp.sequential(model, pipeline(), repair, inputs(), 0.5, target=target)
    assert state_of(model) == before


def test_the_weights_of_a_repair_leave_its_graph() -> None:
    tuned = of_weights(lambda w: w.detach().clone().requires_grad_())
    result = bp.sequential(mlp(), pipeline(), tuned, inputs(), 0.5)
    assert result.weights
    assert not any(w.requires_grad for w in result.weights.values())
