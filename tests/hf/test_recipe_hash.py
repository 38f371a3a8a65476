"""The hash of a recipe tells recipes and data apart, and is the same in another process."""

import dataclasses
import enum
import functools
import os
import runpy
import subprocess
import sys
import threading
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import blockprune as bp

pytest.importorskip("transformers")
from blockprune.hf.recipe_hash import data_hash, recipe_hash

WHERE = bp.linears((4, 4))
OWN_CODE = """
import dataclasses, enum, functools, re, torch, blockprune as bp
from torch import nn
from blockprune.hf.recipe_hash import recipe_hash
POWER, NAMES, MODEL, PATTERN = 2.0, {"a", "b", "c", "d"}, nn.Linear(2, 2), re.compile("a")
torch.nn.init.ones_(MODEL.weight), torch.nn.init.ones_(MODEL.bias)
MODEL.register_forward_hook(lambda *args: None)
class Kind(enum.Enum):
    A = 1
@dataclasses.dataclass
class Batch:
    ids: torch.Tensor
class Metric:
    kind = Kind.A
    def __init__(self): self.own = self
    def __call__(self, data): return scores(data) if PATTERN.match("a") else None
@functools.cache
def constant(): return POWER
def scores(data): return {n: constant() * MODEL(s.value) for n, s in bp.metric.l1(data).items() if n not in NAMES}
print(recipe_hash([Metric(), bp.Calibration([Batch(torch.ones(2))]), constant, Kind.A, Batch]))
print(recipe_hash(bp.recipes.sparsegpt(bp.linears((4, 4)), bp.Calibration([torch.ones(2, 4)]))))
"""


def factor(by: float) -> Any:
    return lambda x: x * by


def test_functions_differ_by_their_code_and_by_what_they_refer_to() -> None:
    hashes = [recipe_hash(f) for f in (factor(1.0), factor(2.0), lambda x: x + 1, lambda x: x + 2, torch.relu, torch.sigmoid)]
    assert len(set(hashes)) == len(hashes)
    assert recipe_hash(factor(2.0)) == recipe_hash(factor(2.0))
    assert recipe_hash(partial(torch.mul, other=2)) != recipe_hash(partial(torch.mul, other=3))


def test_an_object_that_occurs_again_counts() -> None:
    f, g = factor(1.0), factor(2.0)
    assert recipe_hash([f, g, f]) != recipe_hash([f, g, g])


def test_a_function_may_refer_to_itself() -> None:
    def repeated(x: float, times: int) -> float:
        return repeated(2 * x, times - 1) if times else x

    assert recipe_hash(repeated) == recipe_hash(repeated)


@pytest.mark.parametrize("known", [False, True])
def test_batches_count_unless_they_are_known(known: bool) -> None:
    recipes = []
    for value in (0.0, 1.0):
        batches = [torch.full((2, 4), value)]
        recipes.append((bp.recipes.sparsegpt(WHERE, bp.Calibration(batches)), batches))
    hashes = {recipe_hash(recipe, known=batches if known else ()) for recipe, batches in recipes}
    assert len(hashes) == (1 if known else 2)


def test_data_differ_by_values_types_and_nesting() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    data: list[Any] = [[a, b], [(a, b)], [b, a], [a.double(), b], [{"x": a, "y": b}], [{"y": a, "x": b}], [a.numpy(), b.double().numpy()]]
    assert len({data_hash(batches) for batches in data}) == len(data)
    assert data_hash(DataLoader(torch.arange(4), batch_size=2)) == data_hash([torch.tensor([0, 1]), torch.tensor([2, 3])])  # type: ignore[arg-type]


def test_a_loader_leaves_the_random_numbers_as_they_are() -> None:
    before = torch.get_rng_state()
    data_hash(DataLoader(torch.arange(4), batch_size=2))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_that_can_be_used_once_are_refused() -> None:
    with pytest.raises(TypeError, match="generator, which can be used once only"):
        data_hash(x for x in [torch.ones(2)])
    with pytest.raises(TypeError, match="generator, which can be used once only"):
        recipe_hash(bp.recipes.OneShot(partial(bp.collect.with_statistics, calibration=bp.Calibration(x for x in [torch.ones(2)]))))  # type: ignore[arg-type]


def module(**names: Any) -> Any:
    """A module of the user's own code."""
    made = types.ModuleType("own_code")
    exec("def helper(x):\n    return x * FACTOR\ndef score(x):\n    return [helper(y) for y in x]", made.__dict__)
    exec("def by_module(x):\n    return lib.helper(x)\ndef twice(x):\n    return twice(score(x)) if FACTOR else 0", made.__dict__)
    made.__dict__.update(names)
    return made


@pytest.mark.parametrize("function", ["helper", "score", "twice"])
@pytest.mark.parametrize(
    "value", [2, 2.5, "2", torch.ones(2), np.ones(2), [1, {"a": 2}], torch.relu, lambda x: x, nn.ReLU(), torch, Path("a"), bp.metric.l1]
)
def test_functions_differ_by_the_global_values_that_they_and_their_helpers_read(function: str, value: Any) -> None:
    of_value, again, other = (recipe_hash(getattr(module(FACTOR=x), function)) for x in (value, value, 3))
    assert of_value == again
    assert of_value != other
    assert recipe_hash(getattr(module(FACTOR=value, OTHER=4), function)) == of_value  # which it does not read


def test_functions_differ_by_what_they_read_of_modules_of_the_users_own() -> None:
    hashes = [recipe_hash(module(lib=module(FACTOR=factor)).by_module) for factor in (1, 2, 2)]
    assert hashes[0] != hashes[1] == hashes[2]


class Plain:
    def __init__(self, value: Any) -> None:
        self.value, self.own = value, self

    def __call__(self, x: Any) -> Any:
        return x


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclasses.dataclass
class Fields:
    value: Any


def holding(value: Any) -> list[Any]:
    linear: Any = nn.Linear(2, 2)
    nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
    linear.value = value
    endless: list[Any] = [value]
    endless.append(endless)
    return [
        Plain(value),
        Slots(value),
        Fields(value),
        types.SimpleNamespace(value=value),
        linear,
        endless,
        {value},
        np.array([value, None]),
    ]


@pytest.mark.parametrize("number", range(8))
def test_objects_differ_by_what_they_hold(number: int) -> None:
    for hashed in (recipe_hash, lambda value: data_hash([value])):
        same, again, other = (hashed(holding(value)[number]) for value in ("a", "a", "b"))  # type: ignore[operator]
        assert same == again
        assert same != other
    assert recipe_hash(holding("a")[number]) not in {recipe_hash(x) for i, x in enumerate(holding("a")) if i != number}


def test_classes_differ_by_their_code() -> None:
    def made(add: int, parents: tuple[type, ...] = (), **attributes: Any) -> Any:
        return type("Own", parents, {"__call__": (lambda self, x: x + 1) if add else (lambda self, x: x - 1), **attributes})

    variants = [made(0), made(1), made(1, a=2), made(1, parents=(Plain,)), made(1, b=staticmethod(torch.relu)), made(1, c=property(id))]
    assert len({recipe_hash(kind) for kind in variants}) == len(variants)
    assert recipe_hash(made(1)) == recipe_hash(made(1))


def test_members_methods_and_cached_functions_differ() -> None:
    kind = enum.IntEnum("kind", ["a", "b"])
    values: list[Any] = [kind.a, kind.b, 1, torch.ones(2).add, torch.zeros(2).add, Plain(1).__call__, Plain(2).__call__]
    values += [functools.cache(module(FACTOR=factor).helper) for factor in (1, 2)]
    values += [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    assert len({recipe_hash(value) for value in values}) == len(values)


def test_a_recipe_may_hold_what_cannot_be_read() -> None:
    assert recipe_hash([threading.Lock(), torch.ones(2, device="meta")]) == recipe_hash([threading.Lock(), torch.ones(2, device="meta")])


@pytest.mark.parametrize("batch", [threading.Lock(), Plain(threading.Lock()), {"x": [(x for x in [1])]}])
def test_batches_that_cannot_be_read_are_refused(batch: Any) -> None:
    message = r"calibration\.batches holds a (lock|generator), whose contents .* give batches of tensors, arrays, numbers"
    for hashed in (data_hash, lambda batches: recipe_hash(bp.Calibration(batches))):
        with pytest.raises(TypeError, match=message):
            hashed([batch])


@pytest.mark.slow
def test_recipes_and_own_code_have_the_same_hash_in_every_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def here(code: str) -> list[str]:
        program.write_text(code)
        runpy.run_path(str(program), run_name="__main__")
        return capsys.readouterr().out.split()

    program = tmp_path / "program.py"
    own, recipe = here(OWN_CODE)
    assert recipe == recipe_hash(bp.recipes.sparsegpt(WHERE, bp.Calibration([torch.ones(2, 4)])))
    done = subprocess.run([sys.executable, program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == [own, recipe]
    assert here(OWN_CODE.replace("= 2.0,", "= 3.0,"))[0] != own


def test_what_a_run_or_another_job_changes_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)

    def metric(data: bp.Data) -> Any:
        return generator.random(), os.environ.get("JOB")

    before = recipe_hash(metric)
    generator.random()
    monkeypatch.setenv("JOB", "7")
    assert recipe_hash(metric) == before


def test_deeply_nested_objects_have_a_hash_or_are_refused() -> None:
    linked: Any = None
    for _ in range(1000):
        linked = types.SimpleNamespace(next=linked)
    assert recipe_hash(lambda: linked)
    with pytest.raises(TypeError, match=r"holds a SimpleNamespace, whose contents cannot be read .*nested too deeply"):
        data_hash([linked])


def test_arrays_differ_by_their_fields_and_objects_without_axes_have_a_hash() -> None:
    first, second = (np.ones(2, dtype=[(name, "f4"), ("z", "i4")]) for name in "ab")
    assert data_hash([first]) != data_hash([second])
    assert data_hash([np.array(None)]) != data_hash([np.array([None])])
