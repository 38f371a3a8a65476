"""Sensitivity: each parameter alone, and the model untouched."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import matplotlib as mpl
import pytest
import torch
from torch import nn

import blockprune as bp

PRUNE = bp.Pipeline(partial(bp.collect.weights, where=bp.linears((2, 2))), bp.metric.l1, bp.allocate.per_layer)


def test_a_row_is_the_loss_with_only_that_parameter_pruned() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 6)
    before, target = copy.deepcopy(model.state_dict()), model(x).detach()
    table = bp.sensitivity(model, PRUNE, [0.0, 0.5, 1.0], lambda m: (m(x) - target).square().mean(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert table.dense == 0
    for name in ("0.weight", "2.weight"):
        for sparsity, loss in zip(table.sparsities, table.losses[name], strict=True):
            alone = bp.finalize(bp.apply_masks(copy.deepcopy(model), {name: PRUNE(model, sparsity)[name]}))
            assert abs(loss - (alone(x) - target).square().mean().item()) < 1e-6


def test_a_masked_model_is_tried_from_its_dense_weights() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4), torch.randn(8, 4)
    target = model(x).detach()
    bp.apply_masks(model, PRUNE(model, 0.75))
    table = bp.sensitivity(model, PRUNE, [0.0], lambda m: (m(x) - target).square().mean(), progress=False)
    assert table.losses["weight"][0] < 1e-12 < table.dense


def test_the_table_prints_renders_and_is_drawn() -> None:
    table = bp.Sensitivity((0.25, 0.5), 1.0, {"a.weight": (1.5, 2.0), "b.weight": (1.0, 1.25)})
    assert "a.weight   1.500  2.000" in repr(table)
    assert table._repr_html_().count("<tr>") == 4
    mpl.use("Agg")
    assert len(table.plot().get_yticklabels()) == 2


def test_stacked_masks_give_the_losses_of_one_at_a_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 6)).eval()
    x, y = torch.randn(8, 2, 6, 6), torch.randint(6, (8,))
    prune = attrs.evolve(PRUNE, collect=partial(bp.collect.weights, where=bp.first_of(bp.linears((2, 4)), bp.convs((1, 1)))))
    calls = []

    def evaluate(m: Callable[..., Any]) -> torch.Tensor:
        calls.append(1)
        return nn.functional.cross_entropy(m(x), y)

    alone = bp.sensitivity(model, prune, [0.25, 0.5, 0.75], evaluate, chunk_size=1, progress=False)
    one_at_a_time = len(calls)
    together = bp.sensitivity(model, prune, [0.25, 0.5, 0.75], evaluate, progress=False)
    assert (one_at_a_time, len(calls) - one_at_a_time) == (7, 3)
    for name, losses in alone.losses.items():
        assert together.losses[name] == pytest.approx(losses, abs=1e-5)


def test_a_masked_model_is_stacked_too() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 6)
    target = model(x).detach()
    bp.apply_masks(model, PRUNE(model, 0.5))
    tables = [
        bp.sensitivity(model, PRUNE, [0.0, 0.25, 0.5], lambda m: (m(x) - target).square().mean(), chunk_size=chunk, progress=False)
        for chunk in (1, 2, 8)
    ]
    for table in tables[1:]:
        for name, losses in table.losses.items():
            assert losses == pytest.approx(tables[0].losses[name], abs=1e-6)


def test_an_evaluation_that_vmap_cannot_run_says_so_and_runs_one_at_a_time() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4), torch.randn(8, 4)
    with pytest.warns(UserWarning, match=r"one at a time: vmap cannot run the model or evaluate \(.*return the loss as a tensor"):
        table = bp.sensitivity(model, PRUNE, [0.25, 0.75], lambda m: m(x).square().mean().item(), progress=False)
    again = bp.sensitivity(model, PRUNE, [0.25, 0.75], lambda m: m(x).square().mean(), progress=False)
    assert table.losses["weight"] == pytest.approx(again.losses["weight"])


@pytest.mark.parametrize(("sparsities", "chunk"), [([], 8), ([0.5], 0)])
def test_bad_options_are_errors(sparsities: list[float], chunk: int) -> None:
    with pytest.raises(ValueError, match="at least one sparsity"):
        bp.sensitivity(nn.Linear(4, 4), PRUNE, sparsities, lambda m: 0.0, chunk_size=chunk)


def test_a_recipe_is_refused_with_the_pipeline_to_give() -> None:
    model, recipe = nn.Linear(4, 4), bp.recipes.magnitude(bp.linears((2, 2)))
    with pytest.raises(
        TypeError, match=r"pipeline is a OneShot, not a bp\.Pipeline; .*, wanda\), give recipe\.pipeline; for others, build"
    ):
        bp.sensitivity(model, recipe, [0.5], lambda m: 0.0)  # type: ignore[arg-type]
    table = bp.sensitivity(model, recipe.pipeline, [0.0], lambda m: m(torch.ones(1, 4)).sum(), progress=False)
    assert table.losses["weight"][0] == pytest.approx(table.dense)
