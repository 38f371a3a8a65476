"""A recipe is the composition that its source says, printed as such; the model is not changed."""

import copy
import pickle
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

import blockprune as bp
from blockprune import allocate, budgets, collect, metric, recipes, reconstruct, statistics

WHERE = bp.linears((2, 2))


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4)).double()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(8, 8, generator=generator).double()
    return [torch.randn(20, 8, generator=generator).double() @ mix for _ in range(3)]


def loss(output: Tensor, batch: Tensor) -> Tensor:
    return output.square().mean()


def calibration(**options: Any) -> bp.Calibration:
    return bp.Calibration(batches(), **{"loss": loss, "progress": False, **options})


def same(a: bp.PruningResult, masks: bp.Masks, weights: bp.Weights) -> bool:
    return a.masks == masks and a.weights.keys() == weights.keys() and all(torch.equal(a.weights[k], weights[k]) for k in weights)


RECIPES = {
    "magnitude": lambda: recipes.magnitude(WHERE),
    "wanda": lambda: recipes.wanda(WHERE, calibration()),
    "sparsegpt": lambda: recipes.sparsegpt(WHERE, calibration()),
    "obs": lambda: recipes.obs(WHERE, calibration()),
}


@pytest.mark.parametrize("name", RECIPES)
def test_all_recipes_are_called_alike_and_leave_the_model_alone(name: str) -> None:
    network = model()
    before = copy.deepcopy(network.state_dict())
    result = RECIPES[name]()(network, 0.5)
    assert bp.sparsity(result.masks) == pytest.approx(0.5, abs=0.03)
    assert not bp.read_masks(network)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    pruned = bp.apply_masks(network, result.masks, result.weights)
    assert pruned(batches()[0]).isfinite().all()


def test_magnitude_and_wanda_are_their_pipelines() -> None:
    by_hand = bp.Pipeline(partial(collect.weights, where=WHERE), metric.l1, allocate.per_layer)
    assert same(recipes.magnitude(WHERE)(model(), 0.5), by_hand(model(), 0.5), {})
    look = partial(collect.with_statistics, where=WHERE, statistics=[statistics.input_sq], batches=batches())
    by_hand = bp.Pipeline(look, metric.wanda, allocate.per_row)
    assert same(recipes.wanda(WHERE, calibration())(model(), 0.5), by_hand(model(), 0.5), {})


def test_obs_is_the_composition_by_hand() -> None:
    network, gram = model(), [statistics.input_gram]
    data = collect.with_statistics(
        network, where=WHERE, statistics=[*gram, statistics.output_grad_gram], batches=batches(), loss=loss, progress=False
    )
    shares = budgets.loss_weighted(metric.obs(data), 0.5, max_sparsity=0.6)
    pipeline = bp.Pipeline(
        partial(collect.with_statistics, where=WHERE, statistics=gram), partial(metric.obs, damping=0.4), allocate.per_layer
    )
    repair = partial(reconstruct.least_squares, damping=0.4)
    by_hand = bp.sequential(network, pipeline, repair, batches(), shares, extra_data=data)
    result = recipes.obs(WHERE, calibration())(network, 0.5)
    assert same(result, by_hand.masks, by_hand.weights)
    assert result.layers == by_hand.layers


def test_a_layer_may_lose_a_tenth_more_than_the_model_where_that_is_more() -> None:
    result = recipes.obs(WHERE, calibration(), max_layer_sparsity=0.3)(model(), 0.5)
    lost = [bp.sparsity({name: mask}) for name, mask in result.masks.items()]
    assert max(lost) <= 0.6 + 1e-9
    assert bp.sparsity(result.masks) == pytest.approx(0.5, abs=0.03)


def test_sparsegpt_is_told_its_sparsity_once() -> None:
    network = model()
    pipeline = bp.Pipeline(
        partial(collect.with_statistics, where=WHERE, statistics=[statistics.input_gram]),
        partial(metric.sparsegpt, sparsity=0.5),
        partial(allocate.per_bank, bank=(-1, -1)),
    )
    by_hand = bp.sequential(network, pipeline, reconstruct.sparsegpt, batches(), 0.5)
    assert same(recipes.sparsegpt(WHERE, calibration())(network, 0.5), by_hand.masks, by_hand.weights)
    by_name = {"0.weight": 0.25, "*": 0.5}
    result = recipes.sparsegpt(WHERE, calibration())(network, by_name)
    assert [round(bp.sparsity({name: mask}), 2) for name, mask in result.masks.items()] == [0.25, 0.5, 0.5]


def test_a_stage_is_swapped_with_evolve() -> None:
    recipe = recipes.obs(WHERE, calibration())
    alike = attrs.evolve(recipe, budget=None)
    by_row = attrs.evolve(alike, pipeline=attrs.evolve(alike.pipeline, allocate=allocate.per_row))
    for name, mask in by_row(model(), 0.5).masks.items():
        assert (mask.keep.sum(1) == mask.grid.size[1] / 2).all() or mask.grid.size[1] % 2, name
    assert recipes.obs(WHERE, recipe.calibration).pipeline == recipe.pipeline or recipe.budget is not None


def test_a_recipe_prints_what_it_is_composed_of() -> None:
    assert repr(recipes.obs(WHERE, calibration())).splitlines() == [
        "LayerByLayer(",
        "    pipeline=Pipeline(collect=with_statistics(where=linears(block=(2, 2))), metric=obs(damping=0.4, progress=False), "
        "allocate=per_layer),",
        "    reconstruct=least_squares(damping=0.4, progress=False),",
        "    calibration=Calibration(batches=list of 3, loss=loss, progress=False),",
        "    budget=LayerBudget(",
        "        collect=with_statistics(where=linears(block=(2, 2)), statistics=[input_gram, output_grad_gram], "
        "calibration=Calibration(batches=list of 3, loss=loss, progress=False), lazy=True),",
        "        metric=obs(progress=False),",
        "        budget=loss_weighted(max_sparsity=0.6, margin=0.1),",
        "    ),",
        ")",
    ]


@pytest.mark.parametrize("passes", [2, 3, 10])
def test_more_passes_give_the_same_bits(passes: int) -> None:
    network = model()
    one, several = (recipes.obs(WHERE, calibration(), passes=number)(network, 0.5) for number in (1, passes))
    assert same(several, one.masks, one.weights)
    one, several = (recipes.cluster_units(network, WHERE, calibration(), passes=number).state_dict() for number in (1, passes))
    assert all(torch.equal(several[key], value) for key, value in one.items())


def test_each_pass_collects_a_share_of_the_parameters() -> None:
    collected: list[list[str]] = []

    def look(network: nn.Module, *, where: bp.Where = WHERE) -> bp.Data:
        collected.append([*(data := collect.weights(network, where=where))])
        return data

    budget = partial(recipes.LayerBudget, look, metric.l2, budgets.erk, reuse=())
    shares = [budget(passes=passes)(model(), 0.5)[0] for passes in (1, 2, 3)]
    assert shares[0] == shares[1] == shares[2]
    assert collected[1:3] == [["0.weight"], ["2.weight", "4.weight"]]  # 8 x 8 of inputs, 12 x 12 and 6 x 6
    with pytest.raises(ValueError, match="passes=0 must be an integer, at least 1"):
        budget(passes=0)(model(), 0.5)
    with pytest.raises(TypeError, match=r"passes=2 needs a collector with a where=, such as partial\(collect.with_statistics, where="):
        attrs.evolve(budget(passes=2), collect=lambda network: collect.weights(network, where=WHERE))(model(), 0.5)


def test_clustered_units_compute_the_same_and_lose_less() -> None:
    """The loss that Optimal Brain Surgeon predicts for half of the blocks is lower after clustering."""
    network, x = model(), batches()[0]
    clustered = recipes.cluster_units(network, WHERE, calibration(), sparsity=0.5)
    torch.testing.assert_close(clustered(x), network(x))
    assert not torch.equal(clustered[0].weight, network[0].weight)  # type: ignore[index]

    def lost(network: nn.Module) -> float:
        look = partial(
            collect.with_statistics, where=WHERE, statistics=[statistics.input_gram, statistics.output_grad_gram], calibration=calibration()
        )
        return bp.pareto(metric.obs(look(network)), points=3).errors[1]

    assert lost(clustered) < lost(network)


def test_cluster_units_takes_the_blocks_of_the_rule_or_asks_for_them() -> None:
    two = bp.first_of(bp.named("0.weight", (4, 4)), bp.linears((2, 2)))
    with pytest.raises(ValueError, match=r"blocks of several shapes, \[\(2, 2\), \(4, 4\)\]; say which to sort for: block="):
        recipes.cluster_units(model(), two, calibration())
    x = batches()[0]
    clustered = recipes.cluster_units(model(), two, calibration(), block=(4, 4), example=x[:2])
    torch.testing.assert_close(clustered(x), model()(x))


@pytest.mark.parametrize("make", [recipes.wanda, recipes.sparsegpt, recipes.obs, partial(recipes.cluster_units, model())])
def test_batches_that_can_be_used_once_only_are_refused(make: Any) -> None:
    once = bp.Calibration(iter(batches()), loss=loss)
    with pytest.raises(TypeError, match=r"runs over calibration.batches several times.*list_iterator can be used once only"):
        make(WHERE, once)


@pytest.mark.parametrize("make", [recipes.wanda, recipes.sparsegpt])
def test_batches_alone_are_a_calibration(make: Any) -> None:
    given, by_hand = make(WHERE, batches())(model(), 0.5), make(WHERE, calibration())(model(), 0.5)
    assert same(given, by_hand.masks, by_hand.weights)
    with pytest.raises(TypeError, match=r"batches is one Tensor; give an iterable of batches"):
        make(WHERE, batches()[0])
    with pytest.raises(ValueError, match=r"need a loss: give Calibration\(batches, loss="):
        recipes.obs(WHERE, batches())(model(), 0.5)


def test_cluster_units_needs_a_batch() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        bp.recipes.cluster_units(model(), bp.linears((2, 2)), [])


def test_a_budget_distributes_one_number() -> None:
    recipe, shares = recipes.obs(WHERE, calibration()), {"0.weight": 0.25, "*": 0.5}
    with pytest.raises(TypeError, match=r"the budget of this recipe distributes one number.*attrs\.evolve\(recipe, budget=None\)"):
        recipe(model(), shares)
    masks = attrs.evolve(recipe, budget=None)(model(), shares).masks
    assert {name: bp.sparsity({name: mask}) for name, mask in masks.items()} == {"0.weight": 0.25, "2.weight": 0.5, "4.weight": 0.5}


@pytest.mark.parametrize("make", [recipes.sparsegpt, recipes.obs])
def test_a_sparsity_that_is_none_is_refused_before_the_work(make: Any) -> None:
    recipe = make(WHERE, calibration())
    with pytest.raises(TypeError, match=r"sparsity='0\.5' must be a number from 0"):
        recipe(model(), "0.5")
    with pytest.raises(ValueError, match=r"sparsity=50 must be from 0"):
        recipe(model(), 50)


def test_finetuning_is_an_option() -> None:
    tune = partial(bp.finetune_layer, lr=1e-2, epochs=2, held_out=0.34)
    masks_only = attrs.evolve(recipes.obs(WHERE, calibration()), reconstruct=reconstruct.none)
    tuned = attrs.evolve(masks_only, finetune=tune)(model(), 0.5)
    assert masks_only(model(), 0.5).weights == {}
    assert tuned.weights.keys() == tuned.masks.keys()
    dense, x = model(), batches()[0]
    plain = bp.apply_masks(model(), tuned.masks)
    repaired = bp.apply_masks(model(), tuned.masks, tuned.weights)
    assert (repaired(x) - dense(x)).square().mean() < (plain(x) - dense(x)).square().mean()


def test_every_recipe_prints_the_same_in_another_process() -> None:
    plain, data = model(), bp.Calibration(batches(), loss=nn.functional.mse_loss, progress=False)
    made = [
        recipes.magnitude(WHERE),
        recipes.structured(bp.find_axes(plain, batches()[0])),
        recipes.wanda(WHERE, data),
        recipes.sparsegpt(WHERE, data, target="pruned"),
        recipes.obs(WHERE, data),
        attrs.evolve(recipes.obs(WHERE, data), budget=None, finetune=bp.finetune_layer),
        *(bp.Pipeline(partial(collect.with_statistics, where=WHERE, calibration=data), by, allocate.per_layer) for by in BY_DATA),
    ]
    for recipe in made:
        again = pickle.loads(pickle.dumps(recipe))
        assert repr(again) == repr(recipe)
    assert made[-1](plain, 0.5) == pickle.loads(pickle.dumps(made[-1]))(plain, 0.5)


BY_DATA = (metric.fisher, metric.obd, metric.wanda, metric.taylor, metric.synflow, metric.obs)
