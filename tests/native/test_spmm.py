"""The compiled product equals its definition, on every instruction set that this processor has."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Matrix, batch_sizes, integers, kept_matrices, normal, seeds
from torch import Tensor

import blockprune as bp
from blockprune.core._compat import gomp_parallel
from blockprune.core.grid import BlockGrid
from blockprune.export.format import BlockSparse, pack
from blockprune.native import spmm

BUILT = pytest.mark.skipif(spmm._library is None, reason=spmm.status)
DTYPES = [torch.float32, torch.bfloat16]


@contextlib.contextmanager
def running(instructions: str, threads: int = 1) -> Iterator[None]:
    before = torch.get_num_threads()
    with mock.patch.object(spmm, "_choice", spmm.INSTRUCTIONS.index(instructions)):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def linear(x: Tensor, sparse: BlockSparse, bias: Tensor | None = None) -> Tensor:
    out = spmm.linear(x, sparse.values, sparse.crow, sparse.col, shape=sparse.shape, block=sparse.block, bias=bias)
    assert out is not None
    return out


EVERY = pytest.mark.parametrize("instructions", spmm.instructions() or [pytest.param("plain", marks=BUILT)])


@EVERY
@given(kept_matrices(), batch_sizes, seeds, st.sampled_from(DTYPES))
def test_sums_of_whole_numbers_are_exact(instructions: str, matrix: Matrix, n: int, seed: int, dtype: torch.dtype) -> None:
    weight, keep, grid = matrix
    x, bias = integers((n, grid.shape[1]), seed, top=4), integers((grid.shape[0],), seed + 1) if seed % 2 else None
    sparse = pack(weight.to(dtype), keep, grid)
    with running(instructions):
        got = linear(x.to(dtype), sparse, None if bias is None else bias.to(dtype))
    assert got.dtype == dtype
    assert torch.equal(got, reference.sparse_linear(x, weight, bp.expand(keep, grid), bias).to(dtype))


LARGE = [  # bands long enough to be read in parts, of heights that are cut into tiles in every way
    ((96, 3000), (32, 32)),
    ((40, 2999), (20, 4)),
    ((64, 1500), (16, 1)),
    ((33, 4001), (33, 2)),
    ((70, 1201), (7, 1)),
    ((9, 5000), (1, 16)),
    ((500, 257), (-1, 1)),
    ((48, 3072), (16, 16)),  # from here on blocks are whole tiles
    ((32, 7200), (16, 48)),
    ((64, 2048), (32, 64)),
]


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 13, 33, 100, 128])
@pytest.mark.parametrize(("shape", "block"), LARGE)
def test_large_layers_in_any_number_of_threads(instructions: str, shape: Any, block: Any, n: int, dtype: torch.dtype) -> None:
    grid = BlockGrid(shape, block)
    weight, x, bias = integers(shape, 0, top=2), integers((n, shape[1]), 1, top=2), integers((shape[0],), 2)
    patterns = {"random": torch.rand(grid.size) < 0.4, "skewed": torch.zeros(grid.size).bool()}
    patterns["skewed"][0] = True
    for keep in patterns.values():
        sparse = pack(weight.to(dtype), keep, grid)
        expected = (x @ torch.where(bp.expand(keep, grid), weight, 0).mT + bias).to(dtype)
        for threads in (1, 2, 5):
            with running(instructions, threads):
                assert torch.equal(linear(x.to(dtype), sparse, bias.to(dtype)), expected), threads


@BUILT
def test_its_own_threads_compute_the_same_without_openmp() -> None:
    assert spmm._library is not None
    grid = BlockGrid((256, 512), (16, 16))
    weight, x = integers(grid.shape, 0, top=2).float(), integers((64, 512), 1, top=2).float()
    sparse = pack(weight, torch.ones(grid.size).bool(), grid)
    spmm._library.use_openmp(None)
    try:
        with running(spmm.instructions()[-1], threads=3):
            assert torch.equal(linear(x, sparse), x @ weight.mT)
    finally:
        spmm._library.use_openmp(gomp_parallel())


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(16, 1), (32, 32), (4, 4), (1, 16), (5, 3)])
@pytest.mark.parametrize("n", [1, 4, 40])
@pytest.mark.parametrize("shape", [(200, 700), (192, 704)])
def test_real_numbers_are_close(instructions: str, shape: tuple[int, int], block: Any, n: int, dtype: torch.dtype) -> None:
    grid = BlockGrid(shape, block)
    keep = torch.rand(grid.size, generator=torch.Generator().manual_seed(0)) < 0.5
    weight, x, bias = (normal(size, i).to(dtype) for i, size in enumerate([shape, (n, shape[1]), shape[:1]]))
    with running(instructions):
        got = linear(x, pack(weight, keep, grid), bias).double()
    kept = torch.where(bp.expand(keep, grid), weight, 0).double()
    expected, size = x.double() @ kept.mT + bias.double(), x.double().abs() @ kept.abs().mT + bias.double().abs()
    assert ((got - expected).abs() <= 3e-7 * size + (2.0**-8 * expected.abs() if dtype == torch.bfloat16 else 0)).all()


@EVERY
@given(kept_matrices(), st.sampled_from([1, 2, 4, 8, 20, 33]), seeds, st.sampled_from(DTYPES))
def test_nan_and_inf_reach_the_rows_that_keep_them_and_no_others(
    instructions: str, matrix: Matrix, n: int, seed: int, dtype: torch.dtype
) -> None:
    weight, keep, grid = matrix
    x = integers((n, grid.shape[1]), seed, top=4)
    x[seed % n, seed % grid.shape[1]] = float("nan" if seed % 2 else "inf")
    with running(instructions):
        got = linear(x.to(dtype), pack(weight.to(dtype), keep, grid))
    expected = reference.sparse_linear(x, weight, bp.expand(keep, grid), None).to(dtype)
    assert torch.equal(got.nan_to_num(nan=1e30), expected.nan_to_num(nan=1e30))


@BUILT
@pytest.mark.parametrize("shape", [(12,), (0, 12), (3, 12), (2, 3, 12), (2, 1, 3, 12)])
def test_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    grid = BlockGrid((6, 12), (2, 4))
    weight, keep = integers(grid.shape, 0).float(), torch.rand(grid.size) < 0.5
    x = integers(shape, 1).float()
    got = linear(x, pack(weight, keep, grid))
    assert torch.equal(got, x @ torch.where(bp.expand(keep, grid), weight, 0).mT)
    strided = integers((*shape, 2), 2).float()[..., 0]
    assert torch.equal(linear(strided, pack(weight, keep, grid)), strided @ torch.where(bp.expand(keep, grid), weight, 0).mT)


@BUILT
def test_what_it_cannot_multiply_it_leaves_to_others() -> None:
    sparse = pack(torch.ones(4, 4), torch.ones(2, 2).bool(), BlockGrid((4, 4), (2, 2)))
    multiply = partial(spmm.linear, crow=sparse.crow, col=sparse.col, shape=sparse.shape, block=sparse.block)
    x = torch.ones(3, 4)
    assert multiply(x, sparse.values) is not None
    assert multiply(x.double(), sparse.values.double()) is None
    assert multiply(x.bfloat16(), sparse.values) is None
    assert multiply(x.clone().requires_grad_(), sparse.values) is None
    assert multiply(x, sparse.values.clone().requires_grad_()) is None
    assert multiply(x.to("meta"), sparse.values) is None
    assert multiply(x, sparse.values.to("meta")) is None
    assert multiply(x, sparse.values, bias=torch.ones(4).bfloat16()) is None
    assert multiply(x, sparse.values, bias=torch.ones(5)) is None
    assert multiply(x, sparse.values, bias=torch.ones(8)[::2]) is None
    with torch.no_grad():
        assert multiply(x.clone().requires_grad_(), sparse.values.clone().requires_grad_()) is not None
    with mock.patch.object(spmm, "_library", None):
        assert multiply(x, sparse.values) is None
        assert spmm.instructions() == []
    with pytest.raises(ValueError, match=r"shape \(3, 5\) does not fit a weight of shape \(4, 4\): its last axis must be 4"):
        multiply(torch.ones(3, 5), sparse.values)


@BUILT
def test_it_shares_the_threads_of_torch() -> None:
    assert gomp_parallel() or "linux" not in sys.platform


@pytest.mark.slow
def test_the_environment_chooses_instructions_or_says_which_there_are() -> None:
    code = "from blockprune.native import spmm; print(spmm.INSTRUCTIONS[spmm._choice])"
    error = "BLOCKPRUNE_INSTRUCTIONS='sse9' must be one of plain, avx2, avx_vnni, avx512, avx512_vnni, avx512_bf16"
    for choice, said in (("avx2", "avx2"), ("sse9", error)):
        environment = os.environ | {"BLOCKPRUNE_INSTRUCTIONS": choice}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert said in done.stdout + done.stderr
