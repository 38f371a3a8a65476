"""The compiled gradients of the block-sparse product equal their definitions, on every instruction set that this processor has."""

from typing import Any
from unittest import mock

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Matrix, batch_sizes, integers, kept_matrices, normal, seeds
from test_spmm import BUILT, DTYPES, EVERY, LARGE, running
from torch import Tensor

import blockprune as bp
from blockprune.core.grid import BlockGrid
from blockprune.export.format import BlockSparse, pack
from blockprune.native import spmm


def gradients(grad: Tensor, x: Tensor, sparse: BlockSparse) -> tuple[Tensor, Tensor]:
    """Of the inputs and of the kept values."""
    layout: dict[str, Any] = {"shape": sparse.shape, "block": sparse.block}
    of_inputs = spmm.input_grad(grad, sparse.values, sparse.crow, sparse.col, **layout)
    of_values = spmm.values_grad(grad, x, sparse.crow, sparse.col, count=len(sparse.values), **layout)
    assert of_inputs is not None
    assert of_values is not None
    return of_inputs, of_values


@EVERY
@given(kept_matrices(), batch_sizes, seeds, st.sampled_from(DTYPES))
def test_sums_of_whole_numbers_are_exact(instructions: str, matrix: Matrix, n: int, seed: int, dtype: torch.dtype) -> None:
    weight, keep, grid = matrix
    x, grad = integers((n, grid.shape[1]), seed, top=4), integers((n, grid.shape[0]), seed + 1, top=4)
    mask = bp.expand(keep, grid)
    with running(instructions):
        of_inputs, of_values = gradients(grad.to(dtype), x.to(dtype), pack(weight.to(dtype), keep, grid))
    assert of_inputs.dtype == of_values.dtype == dtype
    assert torch.equal(of_inputs, reference.input_grad(grad, weight, mask).to(dtype))
    assert torch.equal(of_values, pack(reference.values_grad(grad, x, mask).to(dtype), keep, grid).values)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 33, 300])  # 300 rows are packed in two parts
@pytest.mark.parametrize(("shape", "block"), LARGE)
def test_large_layers_in_any_number_of_threads(instructions: str, shape: Any, block: Any, n: int, dtype: torch.dtype) -> None:
    grid = BlockGrid(shape, block)
    weight, x, grad = integers(shape, 0, top=2), integers((n, shape[1]), 1, top=2), integers((n, shape[0]), 2, top=2)
    keep = torch.rand(grid.size) < 0.4
    sparse, kept = pack(weight.to(dtype), keep, grid), torch.where(bp.expand(keep, grid), weight, 0)
    expected = (grad @ kept).to(dtype), pack((grad.mT @ x).to(dtype), keep, grid).values
    for threads in (1, 2, 5):
        with running(instructions, threads):
            for computed, right in zip(gradients(grad.to(dtype), x.to(dtype), sparse), expected, strict=True):
                assert torch.equal(computed, right), threads


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(16, 1), (32, 32), (4, 4), (1, 16), (5, 3)])
def test_real_numbers_are_close(instructions: str, block: Any, dtype: torch.dtype) -> None:
    grid = BlockGrid((200, 700), block)
    keep = torch.rand(grid.size, generator=torch.Generator().manual_seed(0)) < 0.5
    weight, x, grad = normal(grid.shape, 0).to(dtype), normal((40, 700), 1).to(dtype), normal((40, 200), 2).to(dtype)
    kept = torch.where(bp.expand(keep, grid), weight, 0).double()
    with running(instructions):
        of_inputs, of_values = gradients(grad, x, pack(weight, keep, grid))
    rounding = 2**-8 if dtype == torch.bfloat16 else 0  # of the result
    right, size = grad.double() @ kept, grad.double().abs() @ kept.abs()
    assert ((of_inputs - right).abs() <= 3e-7 * size + rounding * right.abs()).all()
    sums, sizes = (pack(a.double().mT @ b.double(), keep, grid).values for a, b in ((grad, x), (grad.abs(), x.abs())))
    assert ((of_values - sums).abs() <= 3e-7 * sizes + rounding * sums.abs()).all()


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_the_gradients_of_what_it_meets_and_no_others(instructions: str, dtype: torch.dtype) -> None:
    grid = BlockGrid((4, 4), (2, 2))
    keep = torch.tensor([[True, False], [False, True]])
    x, grad = torch.ones(3, 4, dtype=dtype), torch.ones(3, 4, dtype=dtype)
    x[1, 0], grad[2, 3] = float("nan"), float("inf")
    with running(instructions):
        of_inputs, of_values = gradients(grad, x, pack(torch.ones(4, 4, dtype=dtype), keep, grid))
    assert torch.equal(of_inputs.isfinite(), torch.tensor([[True] * 4, [True] * 4, [True, True, False, False]]))
    finite = torch.tensor([[False, True, True, True], [False, True, True, True], [True, True, True, True], [True, True, False, False]])
    assert torch.equal(of_values.isfinite(), pack(finite.float(), keep, grid).values > 0)


@BUILT
@pytest.mark.skipif("avx512_bf16" not in spmm.instructions(), reason="the processor does not multiply pairs of bfloat16")
def test_pairs_of_bfloat16_count_subnormal_numbers_as_zero_and_floats_do_not() -> None:
    grid = BlockGrid((4, 4), (2, 2))
    small, large = (torch.full((4, 4), x, dtype=torch.bfloat16) for x in (2.0**-130, 2.0**100))
    for instructions, is_zero in (("avx512_bf16", True), ("avx512", False)):
        with running(instructions):
            of_inputs, _ = gradients(large, small, pack(small, torch.ones(2, 2).bool(), grid))
            _, of_values = gradients(large, small, pack(large, torch.ones(2, 2).bool(), grid))
        assert (of_inputs == 0).all() == (of_values == 0).all() == is_zero, instructions


@BUILT
@pytest.mark.parametrize("n", [5, 130])
def test_long_calls_are_parts_that_add_up(n: int) -> None:
    grid = BlockGrid((24, 40), (8, 8))
    keep = torch.rand(grid.size) < 0.6
    sparse, x, grad = pack(integers((24, 40), 0).float(), keep, grid), integers((n, 40), 1).float(), integers((n, 24), 2).float()
    whole = gradients(grad, x, sparse)
    with mock.patch.object(spmm, "_MULTIPLICATIONS", 1):
        parts = gradients(grad, x, sparse)
    assert all(map(torch.equal, whole, parts))


@BUILT
def test_what_it_cannot_read_is_left_to_torch() -> None:
    grid = BlockGrid((4, 4), (2, 2))
    sparse = pack(torch.ones(4, 4), torch.ones(2, 2).bool(), grid)
    layout: dict[str, Any] = {"shape": sparse.shape, "block": sparse.block}
    indices = sparse.crow, sparse.col
    assert spmm.input_grad(torch.ones(2, 4).double(), sparse.values, *indices, **layout) is None
    assert spmm.values_grad(torch.ones(2, 4), torch.ones(2, 4).half(), *indices, count=16, **layout) is None
    assert spmm.values_grad(torch.ones(2, 4), torch.ones(2, 4, requires_grad=True), *indices, count=16, **layout) is None
