"""Sensitivity: each parameter alone, and the model untouched."""

import copy
from functools import partial

import matplotlib as mpl
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
