"""Tuning keeps masks, never loses on what is held out, and touches nothing but the weights that it is given."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal, seeds
from test_layer_by_layer import inputs, pipeline, seeded
from torch import Tensor, nn
from torch.func import functional_call

import blockprune as bp
from blockprune import reconstruct
from blockprune.core.types import BlockMask

Run = Callable[[Mapping[str, Tensor], Any], Tensor]


class Problem:
    """A small nonlinear layer of which two weights are pruned, and its dense outputs."""

    def __init__(self, *, batches: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        self.layer = seeded(lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4)), seed).to(dtype)
        self.x = [normal((16, 6), seed + i).to(dtype) for i in range(batches)]
        with torch.no_grad():
            self.targets = [self.layer(x) for x in self.x]
        self.masks = {name: mask(self.layer.get_parameter(name), seed) for name in ("1.weight", "3.weight")}
        self.parameters = {name: p.detach() for name, p in self.layer.named_parameters() if name != "0.bias"}
        self.calls: list[int] = []

    def run(self, parameters: Mapping[str, Tensor], i: int) -> Tensor:
        if torch.is_grad_enabled():
            self.calls.append(i)
        return functional_call(self.layer, dict(parameters), (self.x[i],))  # type: ignore[no-any-return]

    def pruned(self) -> dict[str, Tensor]:
        return {name: reference.masked(self.parameters[name], m.keep, m.grid) for name, m in self.masks.items()}

    def error(self, weights: Mapping[str, Tensor], first: int = 0, last: int | None = None) -> float:
        with torch.no_grad():
            parts = [
                (functional_call(self.layer, {**self.parameters, **weights}, (x,)) - y).double().square().mean()
                for x, y in list(zip(self.x, self.targets, strict=True))[first:last]
            ]
        return float(torch.stack(parts).sum())

    def tuned(self, **how: Any) -> dict[str, Tensor]:
        return bp.finetune_layer(self.run, self.parameters, self.masks, range(len(self.x)), self.targets, **how)


def mask(weight: Tensor, seed: int) -> BlockMask:
    grid = bp.BlockGrid(weight.shape, (2, 2))
    return BlockMask(torch.rand(grid.size, generator=torch.Generator().manual_seed(seed)) >= 0.5, grid)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_pruned_blocks_stay_zero_and_kept_ones_learn(dtype: torch.dtype) -> None:
    problem = Problem(dtype=dtype)
    got = problem.tuned(lr=1e-2)
    assert got.keys() == problem.masks.keys()
    for name, m in problem.masks.items():
        keep = reference.expand(m.keep, m.grid)
        assert got[name].shape == problem.parameters[name].shape
        assert got[name].dtype == dtype
        assert not got[name].requires_grad
        assert (got[name][~keep] == 0).all()
        assert (got[name] != problem.parameters[name])[keep].any()
    assert problem.error(got) < 0.9 * problem.error(problem.pruned())


@settings(max_examples=25)
@given(seeds, st.sampled_from([0.125, 0.25, 0.5, 0.01]), st.sampled_from([1e-4, 1e-2, 1.0, 30.0]), st.integers(2, 6), st.integers(0, 2))
def test_what_is_held_out_never_gets_worse(seed: int, share: float, lr: float, batches: int, patience: int) -> None:
    problem = Problem(batches=batches, seed=seed % 1000)
    held = max(1, round(share * batches))
    got = problem.tuned(held_out=share, lr=lr, epochs=3, patience=patience)
    before, after = (problem.error(w, batches - held) for w in (problem.pruned(), got))
    assert after < before or same(got, problem.pruned())
    assert set(problem.calls) <= set(range(batches - held))


def test_where_nothing_is_better_the_given_weights_come_back() -> None:
    problem = Problem()
    problem.parameters |= problem.pruned()
    problem.targets = [problem.run(problem.parameters, i).detach() for i in range(8)]
    assert same(problem.tuned(lr=1.0), problem.pruned())


@pytest.mark.parametrize("how", [{"epochs": 0}, {"epochs": 0, "held_out": 0}, {"lr": 0.0}, {"lr": 0.0, "held_out": 0}])
def test_no_epochs_or_no_step_give_the_masked_weights(how: dict[str, Any]) -> None:
    problem = Problem()
    assert same(problem.tuned(**how), problem.pruned())


@pytest.mark.parametrize("lr", [1e-3, 0.1])
def test_held_out_0_is_adam_along_a_cosine_on_all_batches(lr: float) -> None:
    """By hand, in the order of the seed; the last step's weights."""
    problem, epochs = Problem(batches=3), 3
    leaves = {name: w.clone().requires_grad_(True) for name, w in problem.pruned().items()}
    optimizer, generator, total = torch.optim.Adam(leaves.values(), lr=lr), torch.Generator().manual_seed(5), 9
    step = 0
    for _ in range(epochs):
        for i in torch.randperm(3, generator=generator).tolist():
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(step * math.pi / total)) / 2
            optimizer.zero_grad()
            (problem.run({**problem.parameters, **leaves}, i) - problem.targets[i]).square().mean().backward()
            for name, leaf in leaves.items():
                assert leaf.grad is not None
                leaf.grad *= reference.expand(problem.masks[name].keep, problem.masks[name].grid)
            optimizer.step()
            step += 1
    got = problem.tuned(epochs=epochs, lr=lr, held_out=0, seed=5)
    for name, leaf in leaves.items():
        torch.testing.assert_close(got[name], leaf.detach(), rtol=0, atol=1e-9)


def test_it_stops_after_patience_epochs_more_without_a_lower_error() -> None:
    for patience in (0, 1, 3):
        problem = Problem()
        problem.parameters |= problem.pruned()
        problem.targets = [problem.run(problem.parameters, i).detach() for i in range(8)]  # nothing can be better
        problem.calls.clear()
        problem.tuned(patience=patience, epochs=8, lr=0.1)
        assert len(problem.calls) == (patience + 1) * 7


def test_one_seed_is_one_result_and_global_random_numbers_are_not_drawn() -> None:
    before = torch.get_rng_state()
    first = Problem().tuned(lr=1e-2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert same(Problem().tuned(lr=1e-2), first)
    assert not same(Problem().tuned(lr=1e-2, seed=1), first)
    torch.set_rng_state(before)


def test_what_it_is_given_is_as_it_was() -> None:
    """Also the parameters of the layer that it does not replace: they take part in backward and get no gradient."""
    problem = Problem()
    for p in problem.parameters.values():
        p.requires_grad_(True)
    before, masks = copy.deepcopy(problem.parameters), copy.deepcopy(problem.masks)
    got = problem.tuned(lr=1e-2)
    assert same(problem.parameters, before)
    assert problem.masks == masks
    assert all(p.grad is None for p in [*problem.layer.parameters(), *problem.parameters.values()])
    assert not any(got[k].untyped_storage()._cdata == p.untyped_storage()._cdata for k in got for p in problem.parameters.values())


def test_parameters_without_masks_are_given_on_unchanged() -> None:
    problem, seen = Problem(), []
    inner = problem.run

    def run(parameters: Mapping[str, Tensor], i: int) -> Tensor:
        seen.append({name: parameters[name] is problem.parameters[name] for name in parameters})
        return inner(parameters, i)

    bp.finetune_layer(run, problem.parameters, problem.masks, range(8), problem.targets, epochs=1)
    assert seen
    assert all(one == {name: name not in problem.masks for name in problem.parameters} for one in seen)


def test_a_frozen_grad_mode_does_not_stop_it() -> None:
    with torch.no_grad():
        one = Problem().tuned(lr=1e-2)
    assert same(one, Problem().tuned(lr=1e-2))


def test_steps_too_small_for_half_precision_add_up() -> None:
    problem = Problem(dtype=torch.bfloat16)
    got = problem.tuned(lr=1e-4, epochs=40, held_out=0)
    moved = torch.cat(
        [(got[k] != problem.pruned()[k]).flatten()[reference.expand(m.keep, m.grid).flatten()] for k, m in problem.masks.items()]
    )
    assert moved.double().mean() > 0.5
    assert problem.error(got) < problem.error(problem.pruned())


def test_no_masks_nothing_to_do() -> None:
    problem = Problem()
    assert bp.finetune_layer(problem.run, problem.parameters, {}, range(8), problem.targets) == {}


@pytest.mark.parametrize("share", [float("nan"), "half", 1.5, -0.1])
def test_a_share_that_is_no_number_is_refused(share: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"held_out=.* must be a number from 0 to 1"):
        Problem().tuned(held_out=share)


@pytest.mark.parametrize("share", [1.0, 1, 0.97])
def test_a_share_that_leaves_nothing_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"held_out=.* of 8 batches leaves none to learn from; give more batches, or held_out=0"):
        Problem().tuned(held_out=share)


def test_a_batch_is_held_out_where_any_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"held_out=0.125 of 1 batches leaves none"):
        Problem(batches=1).tuned()
    problem = Problem(batches=2)
    problem.tuned()
    assert set(problem.calls) == {0}


# Through `sequential`.


def net() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    return seeded(lambda: nn.Sequential(block(), block(), block())).double()


@pytest.mark.parametrize("repair", [reconstruct.none, reconstruct.least_squares])
@pytest.mark.parametrize("target", ["pruned", "dense"])
def test_through_sequential_each_layer_comes_closer_to_its_dense_output(repair: Any, target: Any) -> None:
    """On the batches that are held out, which say when to stop; where least squares aims there too, all but one may be as near as that."""
    errors: list[tuple[float, float]] = []
    whole: list[float] = []

    def tune(
        run: Run, parameters: Mapping[str, Tensor], masks: bp.Masks, batches: Sequence[Any], targets: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        def error(weights: Mapping[str, Tensor], numbers: Sequence[int]) -> float:
            return sum(float((run({**parameters, **weights}, batches[i]) - targets[i]).square().mean()) for i in numbers)

        got = bp.finetune_layer(run, parameters, masks, batches, targets, lr=3e-3, epochs=10)
        errors.append((error({}, [7]), error(got, [7])))
        whole.append(error(got, range(8)))
        return got

    model, x = net(), inputs(8)
    found = bp.sequential(model, pipeline(), repair, x, 0.5, target=target, finetune=tune)
    assert len(errors) == 3
    assert all(after < before or (after == before and (repair, target) == (reconstruct.least_squares, "dense")) for before, after in errors)
    assert any(after < before for before, after in errors)
    assert found.weights.keys() == found.masks.keys()
    for name, m in found.masks.items():
        assert (found.weights[name][~reference.expand(m.keep, m.grid)] == 0).all()
    pruned = bp.apply_masks(copy.deepcopy(model), found.masks, found.weights)
    with torch.no_grad():
        assert sum(float((pruned(b) - model(b)).square().mean()) for b in x) == pytest.approx(whole[-1], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_through_sequential_with_options_bound_and_in_half_precision(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    tune = partial(bp.finetune_layer, lr=1e-3, epochs=2, held_out=0.25)
    one, two = (bp.sequential(model, pipeline(), reconstruct.least_squares, inputs(8), 0.5, finetune=tune) for _ in range(2))
    assert same(one.weights, two.weights)
    assert all(w.dtype == dtype for w in one.weights.values())


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("of", ["batches", "targets"])
def test_a_batch_with_nan_is_named(number: int, of: str) -> None:
    grid = bp.BlockGrid((4, 4), (2, 2))
    mask = bp.BlockMask(torch.tensor([[True, False], [True, True]]), grid)
    batches, targets = list(torch.ones(4, 8, 4)), list(torch.zeros(4, 8, 4))
    (batches if of == "batches" else targets)[number] = torch.full((8, 4), torch.nan)
    with pytest.raises(ValueError, match=f"finetune_layer: the error of the layer's output on batch {number} is nan"):
        bp.finetune_layer(lambda p, x: x @ p["weight"].mT, {"weight": torch.eye(4)}, {"weight": mask}, batches, targets, held_out=0.25)


# The parts of a layer.


class PreNorm(nn.Module):
    """A layer of two branches on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x))
        return x + self.mlp(x)  # type: ignore[no-any-return]


def parts_by_hand(model: Any, masks: bp.Masks, x: list[Tensor], tune: Any) -> dict[str, Tensor]:
    """Each branch of each layer is fitted to the dense branch on the dense model's inputs."""
    weights: dict[str, Tensor] = {}
    with torch.no_grad():
        dense, pruned = list(x), list(x)
        for number, layer in enumerate(model):
            for part in ("mix", "mlp"):
                branch = layer.get_submodule(part)
                into = layer.norm if part == "mix" else nn.Identity()
                prefix = f"{number}.{part}."
                own = {name.removeprefix(prefix): m for name, m in masks.items() if name.startswith(prefix)}
                start = {k: reference.masked(branch.get_parameter(k).detach(), m.keep, m.grid) for k, m in own.items()}
                targets = [branch(into(h)) for h in dense]

                def run(p: Mapping[str, Tensor], h: Tensor, branch: nn.Module = branch) -> Tensor:
                    return functional_call(branch, dict(p), (h,))  # type: ignore[no-any-return]

                got = tune(run, start, own, [into(h) for h in pruned], targets)
                weights |= {f"{prefix}{k}": w for k, w in got.items()}
                pruned = [h + run(got, into(h)) for h in pruned]
                dense = [h + y for h, y in zip(dense, targets, strict=True)]
    return weights


@settings(max_examples=8, deadline=None)
@given(seeds, st.sampled_from(["pruned", "dense"]), st.integers(3, 5))
def test_parts_are_tuned_as_by_hand(seed: int, target: Any, count: int) -> None:
    model, x = seeded(lambda: nn.Sequential(PreNorm(), PreNorm()), seed).double(), inputs(count)
    tune = partial(bp.finetune_layer, lr=1e-2, epochs=3, held_out=0.34)
    found = bp.sequential(model, pipeline(), reconstruct.none, x, 0.5, target=target, finetune={"mix": tune, "mlp": tune})
    expected = parts_by_hand(model, found.masks, x, tune)
    assert found.weights.keys() == expected.keys() == found.masks.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("target", ["pruned", "dense"])
def test_the_layer_is_one_of_its_parts_and_takes_what_is_left(target: Any) -> None:
    model, x, seen = seeded(lambda: nn.Sequential(PreNorm(), PreNorm())).double(), inputs(4), []
    go = partial(bp.sequential, model, pipeline(), reconstruct.least_squares, x, 0.5, target=target)
    tune = partial(bp.finetune_layer, lr=1e-2, epochs=2)

    def noted(run: Run, parameters: Any, masks: bp.Masks, batches: Any, targets: Any) -> Mapping[str, Tensor]:
        seen.append(sorted(masks))
        return tune(run, parameters, masks, batches, targets)

    assert same(go(finetune=tune).weights, go(finetune={"": tune}).weights)
    go(finetune={"mix": noted, "": noted})
    assert seen == [["0.weight", "2.weight"], ["mlp.0.weight", "mlp.2.weight"]] * 2
    found = bp.sequential(model, pipeline(), reconstruct.none, x, 0.5, target=target, finetune={"mlp.2": tune})
    plain = {name: reference.masked(model.get_parameter(name), m.keep, m.grid) for name, m in found.masks.items()}
    assert [name for name, w in plain.items() if not torch.equal(w, found.weights[name])] == ["0.mlp.2.weight", "1.mlp.2.weight"]


def test_a_weight_under_two_names_of_a_part_stays_one() -> None:
    def build() -> nn.Module:
        layers = PreNorm(), PreNorm()
        for layer in layers:
            layer.mix[2].weight = layer.mix[0].weight
        return nn.Sequential(*layers)

    model, x = seeded(build).double(), inputs(4)
    found = bp.sequential(model, pipeline(), reconstruct.none, x, 0.5, finetune={"mix": partial(bp.finetune_layer, lr=1e-2, epochs=2)})
    expected = parts_by_hand_tied(model, found.masks, x)
    torch.testing.assert_close(found.weights["0.mix.0.weight"], expected, rtol=0, atol=1e-9)


def parts_by_hand_tied(model: Any, masks: bp.Masks, x: list[Tensor]) -> Tensor:
    layer = model[0]
    own = masks["0.mix.0.weight"]
    start = {"w": reference.masked(layer.mix[0].weight.detach(), own.keep, own.grid)}
    b, c = layer.mix[0].bias.detach(), layer.mix[2].bias.detach()

    def run(p: Mapping[str, Tensor], h: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(h @ p["w"].mT + b)
        return hidden @ p["w"].mT + c  # type: ignore[no-any-return]

    with torch.no_grad():
        given = [layer.norm(h) for h in x]
        targets = [layer.mix(h) for h in given]
    return bp.finetune_layer(run, start, {"w": own}, given, targets, lr=1e-2, epochs=2)["w"]


@pytest.mark.parametrize(
    ("finetune", "error", "message"),
    [
        ({"mpl": bp.finetune_layer}, KeyError, "finetune names 'mpl', which is a module of no layer; similar names: 'mlp'"),
        ([("mlp", bp.finetune_layer)], TypeError, "finetune has the type list"),
        ({"": bp.finetune_layer, "mlp": bp.finetune_layer}, ValueError, "finetune has nothing to tune in 'mlp'"),
        ({"mlp": 3}, TypeError, r"finetune\['mlp'\] must be a function such as bp.finetune_layer, not int"),
        ({"twice": bp.finetune_layer}, ValueError, "finetune names 'twice', which in layer '0' is called 2 times in a forward"),
        ({"bag": bp.finetune_layer}, ValueError, "finetune names 'bag', which in layer '0' is called 0 times in a forward"),
    ],
)
def test_parts_that_cannot_be_tuned_are_named(finetune: Any, error: type[Exception], message: str) -> None:
    class Odd(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.bag = nn.Sequential(nn.Linear(8, 8)), nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.bag[0](self.twice(self.twice(x))))

    model = seeded(lambda: nn.Sequential(Odd())).double()
    with pytest.raises(error, match=message):
        bp.sequential(model, pipeline(), reconstruct.none, inputs(4), 0.5, target="pruned", finetune=finetune)


def finetuned(result: Callable[[Any, Any], Any], repair: Any = reconstruct.none) -> Any:
    model = seeded(lambda: nn.Sequential(*[PreNorm() for _ in range(2)])).double()
    finetune = {"mlp": lambda run, parameters, masks, batches, targets: result(parameters, masks)}
    return bp.sequential(model, pipeline(), repair, inputs(4), 0.5, target="pruned", finetune=finetune)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda parameters, masks: None, TypeError, r"finetune\['mlp'\] must return a mapping .* for layer '0' it returned a NoneType"),
        (lambda parameters, masks: {"wieght": torch.zeros(1)}, KeyError, r"finetune\['mlp'\] returned a weight for 'wieght'"),
        (
            lambda parameters, masks: {name: parameters[name] * torch.nan for name in masks},
            ValueError,
            r"0\.mlp\..*weight: the parameter .* has a new weight from finetune\['mlp'\] with NaN",
        ),
    ],
)
def test_a_function_that_returns_no_weights_of_its_part_is_named(result: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        finetuned(result)


def test_biases_that_are_tuned_are_returned_without_a_graph() -> None:
    def repair(data: bp.Data, masks: bp.Masks) -> bp.Weights:
        return {name.replace("weight", "bias"): p.weight[:, 0] for name, p in data.items()}

    result = finetuned(lambda parameters, masks: {name: (2 * p).requires_grad_() for name, p in parameters.items()}, repair)
    untuned = finetuned(lambda parameters, masks: {}, repair)
    assert torch.equal(result.weights["0.mlp.0.bias"], 2 * untuned.weights["0.mlp.0.bias"])
    assert not any(w.requires_grad for w in result.weights.values())
