"""The hash of a recipe tells recipes and data apart, and is the same in another process."""

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import blockprune as bp

pytest.importorskip("transformers")
from blockprune.hf.recipe_hash import data_hash, recipe_hash

WHERE = bp.linears((4, 4))
PROGRAM = """
import torch, blockprune as bp
from blockprune.hf.recipe_hash import recipe_hash
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


@pytest.mark.slow
def test_another_process_has_the_same_hash() -> None:
    output = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout.strip()
    assert output == recipe_hash(bp.recipes.sparsegpt(WHERE, bp.Calibration([torch.ones(2, 4)])))
