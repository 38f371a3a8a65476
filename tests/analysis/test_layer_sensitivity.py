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
from blockprune.core.types import Allocate

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
    assert table.losses["weight"][0] == table.dense == 0 < (model(x) - target).square().mean()


@pytest.mark.parametrize("chunk_size", [1, 8])
def test_all_others_of_a_masked_model_are_dense_and_its_masks_stay(chunk_size: int) -> None:
    torch.manual_seed(0)
    dense, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 6)
    wider = attrs.evolve(PRUNE, collect=partial(bp.collect.weights, where=bp.linears((2, 1))))
    for put_on in (PRUNE, wider):  # masks with the same blocks, and with others
        masks = put_on(dense, 0.75)
        model = bp.apply_masks(copy.deepcopy(dense), masks, straight_through=True)
        tables = [
            bp.sensitivity(m, PRUNE, [0.25, 0.5], lambda m: m(x).square().mean(), chunk_size=chunk_size, progress=False)
            for m in (dense, model)
        ]
        assert tables[1].dense == pytest.approx(tables[0].dense)
        for name, losses in tables[0].losses.items():
            assert tables[1].losses[name] == pytest.approx(losses)
        assert bp.read_masks(model) == masks


ALLOCATORS = [bp.allocate.per_layer, bp.allocate.per_model, bp.allocate.per_row, partial(bp.allocate.per_layer, budget=bp.budgets.erk)]


@pytest.mark.parametrize("allocate", ALLOCATORS)
def test_each_parameter_is_at_the_sparsity_of_its_column(allocate: Allocate) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 8)
    with torch.no_grad():
        model[0].weight.mul_(0.01)  # so that all parameters together would lose blocks of this one alone
    prune, sparsities = attrs.evolve(PRUNE, allocate=allocate), [0.25, 0.5, 0.75]
    table = bp.sensitivity(model, prune, sparsities, lambda m: m(x).square().mean(), progress=False)
    for name, losses in table.losses.items():
        for sparsity, loss in zip(sparsities, losses, strict=True):
            mask = allocate({name: prune.scores(model)[name]}, sparsity)
            assert bp.sparsity(mask) == sparsity
            assert loss == pytest.approx(bp.apply_masks(copy.deepcopy(model), mask)(x).square().mean().item())


def test_an_allocator_that_needs_several_parameters_is_refused_and_other_errors_are_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    coupled = attrs.evolve(PRUNE, allocate=partial(bp.allocate.per_layer, coupled=[("0.weight", "1.weight")]))
    with pytest.raises(ValueError, match=r"0\.weight \(4, 4\): allocate=per_layer\(coupled=.*cannot prune this parameter alone"):
        bp.sensitivity(model, coupled, [0.5], lambda m: 0.0, progress=False)
    with pytest.raises(ValueError, match=r"n_of_m\(m=2\) keeps a whole number"):
        bp.sensitivity(model, attrs.evolve(PRUNE, allocate=partial(bp.allocate.n_of_m, m=2)), [0.3], lambda m: 0.0, progress=False)


def test_units_of_hidden_axes_are_pruned_in_one_parameter_at_a_time() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(5, 4)
    prune = bp.recipes.structured(bp.find_axes(model, x)).pipeline
    table = bp.sensitivity(model, prune, [0.0, 0.25], lambda m: m(x).square().mean(), progress=False)
    assert list(table.losses) == ["0.weight", "0.bias", "2.weight"]
    assert all(losses[0] == pytest.approx(table.dense) != losses[1] for losses in table.losses.values())


@pytest.mark.filterwarnings("ignore:sensitivity runs its sparsities one at a time")
def test_buffers_that_the_forward_changes_are_those_from_before_at_each_evaluation() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.norm(self.fc(x)).square().mean() * 0 + self.calls + self.norm.running_mean.sum() * 0

    model, x = Counter(), torch.randn(8, 4)
    before = copy.deepcopy(model.state_dict())
    table = bp.sensitivity(model, PRUNE, [0.0, 0.5, 1.0], lambda m: m(x), progress=False)
    assert (table.dense, table.losses["fc.weight"]) == (1, (1, 1, 1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    embedding = nn.Sequential(nn.Embedding(3, 4, max_norm=0.1), nn.Linear(4, 2))
    weight = embedding[0].weight.detach().clone()
    bp.sensitivity(embedding, PRUNE, [0.5], lambda m: m(torch.tensor([0, 1])).sum(), progress=False)
    assert torch.equal(embedding[0].weight, weight)


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


@pytest.mark.parametrize(
    ("sparsities", "chunk", "says"), [([], 8, "at least one sparsity"), ([0.5], 0, "chunk_size=0 must be an integer, at least 1")]
)
def test_bad_options_are_errors(sparsities: list[float], chunk: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        bp.sensitivity(nn.Linear(4, 4), PRUNE, sparsities, lambda m: 0.0, chunk_size=chunk)


def test_a_recipe_is_refused_with_the_pipeline_to_give() -> None:
    model, recipe = nn.Linear(4, 4), bp.recipes.magnitude(bp.linears((2, 2)))
    with pytest.raises(
        TypeError, match=r"pipeline is a OneShot, not a bp\.Pipeline; .*, wanda\), give recipe\.pipeline; for others, build"
    ):
        bp.sensitivity(model, recipe, [0.5], lambda m: 0.0)  # type: ignore[arg-type]
    table = bp.sensitivity(model, recipe.pipeline, [0.0], lambda m: m(torch.ones(1, 4)).sum(), progress=False)
    assert table.losses["weight"][0] == pytest.approx(table.dense)


@pytest.mark.parametrize(
    ("sparsities", "error", "says"),
    [
        (0.5, TypeError, r"sparsities=0\.5 must be a list of numbers, such as \[0\.25, 0\.5\]"),
        ("0.5", TypeError, "must be a list of numbers"),
        (["0.5"], TypeError, r"sparsities\[0\]='0\.5' must be a number"),
        ([0.5, 50], ValueError, r"sparsities\[1\]=50 must be from 0 .*50 % is 0\.5"),
    ],
)
def test_sparsities_that_are_none_are_named(sparsities: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        bp.sensitivity(nn.Linear(4, 4), PRUNE, sparsities, lambda m: 0.0, progress=False)


@pytest.mark.parametrize("name", ["eval", "config", "weight"])
def test_the_function_in_the_models_place_says_that_it_has_no_attributes(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"evaluate asks for model\.{name}, but sensitivity calls it with a function.*bp\.sweep"):
        bp.sensitivity(nn.Linear(4, 4), PRUNE, [0.25, 0.5], lambda m: getattr(m, name)(), progress=False)  # type: ignore[attr-defined]


def test_a_generator_of_sparsities() -> None:
    evaluate: Callable[..., Any] = lambda m: m(torch.ones(1, 4)).sum() if callable(m) and not hasattr(m, "config") else 0.0  # noqa: E731
    model = nn.Linear(4, 4)
    tables = [bp.sensitivity(model, PRUNE, values, evaluate, progress=False) for values in ([0.25, 0.5], (s / 4 for s in (1, 2)))]  # type: ignore[arg-type]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("result", "kind"),
    [(torch.ones(2), r"tensor of shape \(2,\)"), ({"loss": 1.0}, "dict"), (None, "NoneType"), ([1.0, 2.0], "list")],
)
def test_a_loss_that_is_not_one_number_is_named(result: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"evaluate returned a {kind}; it must return one number"):
        bp.sensitivity(nn.Linear(4, 4), PRUNE, [0.5], lambda m: result, progress=False)


def test_a_loss_in_a_tensor_with_axes_is_a_number() -> None:
    table = bp.sensitivity(nn.Linear(4, 4), PRUNE, [0.0, 0.5], lambda m: m(torch.ones(1, 4)).sum().view(1, 1), progress=False)
    assert table.losses["weight"][0] == pytest.approx(table.dense)


def test_what_cannot_be_replaced_or_scored_once_says_what_to_do() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"0\.weight \(4, 4\): another parametrization, such as weight_norm, .*or leave the weight out"):
        bp.sensitivity(model, PRUNE, [0.5], lambda m: 0.0, progress=False)
    kept = {"0.weight": bp.BlockMask(torch.ones(2, 2, dtype=torch.bool), bp.BlockGrid((4, 4), (2, 2)))}
    bp.apply_masks(model, kept)  # then its mask can be replaced
    assert bp.sensitivity(model, PRUNE, [0.5], lambda m: m(torch.ones(1, 4)).sum(), progress=False).losses["0.weight"]
    collector = partial(bp.collect.with_statistics, where=bp.linears((2, 2)), batches=[torch.randn(8, 4)])
    sparsegpt = bp.Pipeline(collector, bp.metric.sparsegpt, bp.allocate.per_columns)
    with pytest.raises(TypeError, match=r"metric=sparsegpt scores for one sparsity: .*`sensitivity`, needs another metric"):
        bp.sensitivity(nn.Linear(4, 4), sparsegpt, [0.5], lambda m: 0.0, progress=False)


def test_an_allocator_that_returns_no_masks_and_a_complex_loss_are_named() -> None:
    with pytest.raises(TypeError, match="allocate must return a mapping from parameter names to BlockMask, not a list"):
        bp.sensitivity(nn.Linear(4, 4), attrs.evolve(PRUNE, allocate=lambda scores, sparsity: [1]), [0.5], lambda m: 0.0)
    with pytest.raises(TypeError, match=r"evaluate returned a number of torch\.complex64; it must return one real number"):
        bp.sensitivity(nn.Linear(4, 4), PRUNE, [0.5], lambda m: m(torch.ones(1, 4)).sum() * 1j, progress=False)
