"""The table of ranks and condition numbers against numpy."""

import attrs
import numpy as np
import pytest
import reference
import torch
from hessian_cases import collected, param, underdetermined
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import nn

import blockprune as bp
from blockprune import collect


@pytest.mark.filterwarnings("ignore:.*singular")
@given(st.integers(1, 20), st.integers(1, 8), seeds, st.integers(0, 3), st.sampled_from([1e-3, 0.01, 1.0]))
def test_conditioning_is_numpys_rank_and_condition(n: int, k: int, seed: int, dead: int, damping: float) -> None:
    x = normal((n, k), seed)
    x[:, : min(dead, k - 1)] = 0
    p = param(normal((3, k), seed), x, (1, 1))
    inputs, rank, unused, condition, used = bp.conditioning({"w": p}, damping=damping).rows["w"]
    gram = p.stats["input_gram"][0].numpy()
    assert (inputs, unused, used) == (k, min(dead, k - 1), damping)
    assert rank == np.linalg.matrix_rank(gram, hermitian=True) == min(n, k - unused)
    assert condition == pytest.approx(np.linalg.cond(reference.hessians(p, damping)[0].numpy()), rel=1e-6)


def test_conditioning_shows_the_worst_group_and_every_parameter() -> None:
    data = {**collected("grouped", (3, 1))[-1], "fc.weight": collected("linear", (1, 1))[-1]["weight"]}
    gram = data["weight"].stats["input_gram"].clone()
    gram[1, :3] = gram[1, :, :3] = 0
    data["weight"] = attrs.evolve(data["weight"], stats={"input_gram": gram})
    table = bp.conditioning(data)
    k = gram.shape[-1]
    assert list(table.rows) == ["weight", "fc.weight"]
    assert table.rows["weight"][:3] == (k, k - 3, 3)
    worst = max(np.linalg.cond(h.numpy()) for h in reference.hessians(data["weight"], 0.01))
    assert table.rows["weight"][3] == pytest.approx(worst)
    lines = repr(table).splitlines()
    assert [line.split()[0] for line in lines] == ["parameter", "weight", "fc.weight"]
    assert all(cell in table._repr_html_() for cell in (">parameter</th>", ">fc.weight</td>", ">0.01</td>"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conditioning_shows_the_damping_that_was_needed(dtype: torch.dtype) -> None:
    p = underdetermined(3, 8, 0, dtype)
    with pytest.warns(UserWarning, match=rf"fc\.weight \(4, 8\): H is singular in {str(dtype)[6:]} with damping=0; 0\.0001 was used"):
        table = bp.conditioning({"fc.weight": p}, damping=0)
    assert table.rows["fc.weight"][:3] == (8, 3, 0)
    assert table.rows["fc.weight"][4] == pytest.approx(1e-4)


def test_conditioning_without_its_statistic_says_so() -> None:
    data = collect.weights(nn.Linear(4, 2), where=bp.linears((1, 1)))
    with pytest.raises(ValueError, match=r"weight \(2, 4\): conditioning needs the statistic 'input_gram'; the data has none"):
        bp.conditioning(data)


@pytest.mark.parametrize("damping", [-1.0, float("nan")])
def test_a_damping_below_zero_is_an_error(damping: float) -> None:
    with pytest.raises(ValueError, match=f"damping={damping}"):
        bp.conditioning(collected("linear", (1, 1))[-1], damping=damping)
