"""A sweep is a loop over recipes and sparsities that leaves the model alone and can go on after an interruption."""

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import blockprune as bp

SPARSITIES = [0.25, 0.5, 0.75]
WHERE = bp.linears((2, 2))
X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


OUTPUT = small()(X).detach()


def recipes() -> dict[str, Any]:
    pipeline = bp.Pipeline(partial(bp.collect.weights, where=WHERE), bp.metric.l2, bp.allocate.per_model)
    loss = bp.Calibration([X], loss=lambda output, batch: output.square().mean(), progress=False)
    return {"magnitude": bp.recipes.magnitude(WHERE), "pipeline": pipeline, "OBS": bp.recipes.obs(WHERE, loss)}


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    return {"error": float((model(X) - OUTPUT).square().mean()), "mean": float(model(X).mean())}


def untimed(table: bp.Sweep) -> list[bp.SweepRow]:
    return [attrs.evolve(row, seconds=0) for row in table.rows]


def test_a_sweep_is_a_plain_loop() -> None:
    model, rows = small(), []
    table = bp.sweep(model, recipes(), SPARSITIES, evaluate)
    for name, recipe in recipes().items():
        for sparsity in SPARSITIES:
            result = recipe(model, sparsity)
            masks, weights = (result, {}) if isinstance(result, dict) else (result.masks, result.weights)
            pruned = bp.apply_masks(copy.deepcopy(model), masks, weights)
            rows.append(bp.SweepRow(name, sparsity, bp.sparsity(masks), 0, evaluate(pruned)))
    assert untimed(table) == rows
    assert table.dense == evaluate(model)
    assert all(row.seconds > 0 for row in table.rows)


@pytest.mark.parametrize("is_masked", [False, True])
def test_the_model_is_untouched_whatever_recipes_and_evaluations_do(is_masked: bool) -> None:
    model = small()
    if is_masked:
        bp.apply_masks(model, bp.recipes.magnitude(WHERE)(model, 0.25).masks)
    before = copy.deepcopy(model.state_dict())

    def careless(model: nn.Module, sparsity: float) -> bp.Masks:
        masks = recipes()["pipeline"](model, sparsity)
        bp.apply_masks(model, masks)
        return masks

    def training(model: nn.Module) -> torch.Tensor:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        model(X).square().mean().backward()
        optimizer.step()
        return model(X).square().mean()

    table = bp.sweep(model, {"careless": careless}, [0.5, 0.25], training)
    assert [row.reached for row in table.rows] == [0.5, 0.25]
    assert [*table.dense] == ["score"]
    assert not model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if isinstance(value, torch.Tensor))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_first_row_of_a_masked_model_is_that_of_the_dense_weights() -> None:
    plain, masked = small(), small()
    bp.apply_masks(masked, bp.recipes.magnitude(WHERE)(masked, 0.75).masks, straight_through=True)
    tables: list[bp.Sweep] = []
    chosen = {name: recipes()[name] for name in ("magnitude", "pipeline")}  # they score what is stored, so masks do not matter
    swept = bp.sweep(masked, chosen, SPARSITIES, evaluate, callback=tables.append)
    assert swept.dense == tables[0].dense == evaluate(plain) != evaluate(masked)
    assert untimed(swept) == untimed(bp.sweep(plain, chosen, SPARSITIES, evaluate))
    assert bp.sensitivity(masked, chosen["pipeline"], [0.5], lambda m: (m(X) - OUTPUT).square().mean()).dense == swept.dense["error"]
    assert bp.sweep(masked, chosen, SPARSITIES, evaluate, resume=tables[2]).dense == swept.dense
    (line,) = [line for line in swept.plot().lines if line.get_label() == "dense"]
    assert set(line.get_ydata()) == {swept.dense["error"]}


@cache
def swept(names: tuple[str, ...], sparsities: tuple[float, ...]) -> bp.Sweep:
    return bp.sweep(small(), {name: recipes()[name] for name in names}, sparsities, evaluate)


@pytest.mark.slow
@given(st.permutations(SPARSITIES), st.permutations(["magnitude", "pipeline"]), st.integers(0, 6))
def test_going_on_gives_the_same_table_in_the_order_of_the_call(sparsities: list[float], names: list[str], finished: int) -> None:
    model, chosen = small(), {name: recipes()[name] for name in names}
    whole = swept(tuple(names), tuple(sparsities))
    assert [(row.recipe, row.sparsity) for row in whole.rows] == [(name, s) for name in names for s in sparsities]
    calls: list[int] = []

    def counted(model: nn.Module) -> dict[str, float]:
        calls.append(1)
        return evaluate(model)

    tables: list[bp.Sweep] = []
    earlier = bp.Sweep(whole.rows[len(whole.rows) - finished :], whole.dense)
    again = bp.sweep(model, chosen, sparsities, counted, resume=earlier, callback=tables.append)
    assert untimed(again) == untimed(whole)
    assert len(calls) == len(tables) == 6 - finished
    assert not tables or untimed(tables[-1]) == untimed(again)[: len(tables)]


def test_an_error_in_one_cell_keeps_the_finished_rows(tmp_path: Path) -> None:
    model, file = small(), tmp_path / "sweep.json"

    def fails(model: nn.Module, sparsity: float) -> bp.Masks:
        if sparsity == 0.5:
            raise RuntimeError("out of memory")
        return recipes()["pipeline"](model, sparsity)

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        bp.sweep(model, {"pipeline": recipes()["pipeline"], "fails": fails}, SPARSITIES, evaluate, callback=lambda table: table.save(file))
    assert caught.value.__notes__ == ["This happened in sweep, recipe 'fails' at sparsity 0.5, after 4 finished rows."]
    saved = bp.Sweep.load(file)
    assert [(row.recipe, row.sparsity) for row in saved.rows] == [*(("pipeline", s) for s in SPARSITIES), ("fails", 0.25)]
    mended = {"pipeline": recipes()["pipeline"], "fails": recipes()["pipeline"]}
    table = bp.sweep(model, mended, SPARSITIES, evaluate, resume=saved)
    assert table.rows[:4] == saved.rows
    assert len(table.rows) == 6


def test_the_dense_scores_are_reported_first() -> None:
    tables: list[bp.Sweep] = []
    bp.sweep(small(), {"pipeline": recipes()["pipeline"]}, [0.5], evaluate, callback=tables.append)
    assert [len(table.rows) for table in tables] == [0, 1]


@given(st.dictionaries(st.text(min_size=1), st.floats(), min_size=1, max_size=3), st.floats(0, 1))
def test_a_file_holds_the_table(scores: dict[str, float], sparsity: float) -> None:
    from tempfile import TemporaryDirectory  # noqa: PLC0415 (hypothesis forbids fixtures of a function's scope)

    table = bp.Sweep((bp.SweepRow("a", sparsity, sparsity, 1.5, scores),), scores)
    with TemporaryDirectory() as folder:
        table.save(f"{folder}/sweep.json")
        loaded = bp.Sweep.load(f"{folder}/sweep.json")
        assert [path.name for path in Path(folder).iterdir()] == ["sweep.json"]
    assert repr(attrs.asdict(loaded)) == repr(attrs.asdict(table)), "NaN and inf included"


def test_the_table_prints_and_chooses_a_score_to_draw() -> None:
    table = bp.sweep(small(), {"pipeline": recipes()["pipeline"]}, [0.5], evaluate)
    assert repr(table).split("\n")[0].split() == ["recipe", "sparsity", "reached", "seconds", "error", "mean"]
    assert table._repr_html_().count("<tr>") == 3
    assert table.plot(score="mean").get_ylabel() == "mean"
    with pytest.raises(KeyError, match=r"score='loss' is not among the scores of this table, \['error', 'mean'\]"):
        table.plot(score="loss")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"recipes": {}}, ValueError, "recipes must be a mapping from names"),
        ({"recipes": [lambda model, sparsity: {}]}, ValueError, "recipes must be a mapping from names"),
        ({"sparsities": []}, ValueError, "one or more different fractions"),
        ({"sparsities": [0.5, 0.5]}, ValueError, "one or more different fractions"),
        ({"sparsities": [50]}, ValueError, "one or more different fractions"),
        ({"sparsities": 0.5}, TypeError, r"sparsities=0.5 must be a list of numbers from 0 to 1, such as \[0.25, 0.5\]"),
        ({"sparsities": ["half"]}, TypeError, r"sparsities=\['half'\] must be a list of numbers"),
        ({"sparsities": [{"0.*": 0.5}]}, TypeError, "for sparsities by parameter, give a recipe that makes them of one number"),
        ({"sparsities": (s for s in (0.5, 0.5))}, ValueError, r"sparsities=\[0.5, 0.5\] must hold"),
        ({"sparsities": [True]}, TypeError, r"sparsities=\[True\] must be a list of numbers"),
        ({"sparsities": [float("nan")]}, ValueError, "one or more different fractions"),
        ({"recipes": {"mine": lambda model, sparsity: 0.5}}, TypeError, "recipe 'mine' returned a float; it must return masks"),
        ({"evaluate": lambda model: "good"}, TypeError, "evaluate must return a number"),
        ({"evaluate": lambda model: {}}, TypeError, "empty mapping"),
        ({"evaluate": lambda model: model(X)}, TypeError, "evaluate must return a number"),
        ({"evaluate": lambda model: {"b" if bp.read_masks(model) else "a": 1}}, ValueError, r"\['b'\], and \['a'\] for the dense model"),
    ],
)
def test_wrong_input_is_an_error(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    options: dict[str, Any] = {"recipes": {"pipeline": recipes()["pipeline"]}, "sparsities": [0.5], "evaluate": evaluate} | changes
    with pytest.raises(error, match=message):
        bp.sweep(small(), **options)


def test_a_generator_of_sparsities() -> None:
    chosen = {name: recipes()[name] for name in ("magnitude", "pipeline")}
    assert untimed(bp.sweep(small(), chosen, (s for s in SPARSITIES), evaluate)) == untimed(bp.sweep(small(), chosen, SPARSITIES, evaluate))


def test_an_evaluation_may_use_the_model_as_a_module() -> None:
    table = bp.sweep(small().train(), {"p": recipes()["pipeline"]}, [0.5], lambda model: float(model.eval().training))
    assert table.dense == {"score": 0.0}


def test_a_tensor_that_requires_gradients_is_a_number() -> None:
    score: Callable[[nn.Module], Any] = lambda model: {"error": model(X).mean()}  # noqa: E731
    assert isinstance(bp.sweep(small(), {"p": recipes()["pipeline"]}, [0.5], score).rows[0].scores["error"], float)
