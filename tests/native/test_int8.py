"""The product with int8 weights equals its definition: by operators of torch, and compiled for every instruction set of this processor."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Matrix, batch_sizes, int8_inputs, integers, kept_matrices, normal, seeds
from test_spmm import BUILT, LARGE, running
from torch import Tensor

import blockprune as bp
from blockprune.core.grid import BlockGrid
from blockprune.core.types import BlockMask
from blockprune.export.format import BlockSparse
from blockprune.export.packing import pack_int8
from blockprune.export.quantization import quantize_inputs, quantize_weight
from blockprune.export.torch_products import torch_product
from blockprune.native import spmm

DTYPES = [torch.float32, torch.bfloat16]
Product = Callable[[Tensor, BlockSparse, Tensor | None], Tensor]


def by_operators(x: Tensor, sparse: BlockSparse, bias: Tensor | None = None) -> Tensor:
    return torch_product(x, sparse, bias)


def compiled(instructions: str, threads: int = 1) -> Product:
    def product(x: Tensor, sparse: BlockSparse, bias: Tensor | None = None) -> Tensor:
        assert sparse.scale is not None
        weight = sparse.values, sparse.crow, sparse.col, sparse.scale
        with running(instructions, threads):
            out = spmm.linear_int8(x, *weight, shape=sparse.shape, block=sparse.block, bias=bias)
        if out is None:
            pytest.skip(f"int8 is not compiled for {instructions}")
        return out

    return product


EVERY = pytest.mark.parametrize(
    "product",
    [by_operators, *(pytest.param(compiled(name), id=name, marks=BUILT) for name in spmm.instructions())],
)


def packed(matrix: Matrix) -> tuple[BlockSparse, Tensor, Tensor, Tensor]:
    """The weight, stored and as numbers, what it keeps, and its scales."""
    weight, keep, grid = matrix
    kept = bp.expand(keep, grid)
    return pack_int8(weight, BlockMask(keep, grid)), *reference.int8_numbers(torch.where(kept, weight, 0)), kept


def close(got: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """Up to the rounding of a product, a sum, and the type."""
    assert got.dtype == dtype
    assert torch.equal(got.isnan(), expected.isnan())
    error = (got.double() - expected.double()).abs().nan_to_num(0)
    assert (error <= 4e-7 * size + (2.0**-8 * expected.double().abs().nan_to_num(0) if dtype == torch.bfloat16 else 0)).all()


@EVERY
@given(kept_matrices(), batch_sizes | st.sampled_from([48, 70]), st.sampled_from(DTYPES), st.data())
def test_sums_are_exact(product: Product, matrix: Matrix, n: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """All scales are 1, so that every output is the sum itself."""
    (weight, keep, grid), x = matrix, data.draw(int8_inputs(n, matrix[2].shape[1]))
    weight = weight.sign() * 127 if data.draw(st.booleans()) else weight
    keep[:, 0], weight[:, 0] = True, 127
    bias = integers((grid.shape[0],), data.draw(seeds)) if data.draw(st.booleans()) else None
    sparse, numbers, scale, kept = packed((weight, keep, grid))
    assert torch.equal(scale, torch.ones_like(scale))
    got = product(x.to(dtype), sparse, None if bias is None else bias.to(data.draw(st.sampled_from([dtype, torch.float32]))))
    sums = reference.sparse_linear(x, numbers, kept, bias)
    assert torch.equal(got, sums.float().to(dtype))


@EVERY
@given(kept_matrices(), st.sampled_from([0, 1, 2, 5, 16, 33]), seeds, st.sampled_from(DTYPES))
def test_real_numbers_follow_the_definition(product: Product, matrix: Matrix, n: int, seed: int, dtype: torch.dtype) -> None:
    weight, keep, grid = matrix
    x = (normal((n, grid.shape[1]), seed) * (1e-30, 1e-3, 1.0, 1e20)[seed % 4]).to(dtype)
    x[: n // 3] = 0
    bias = normal((grid.shape[0],), seed + 1).float() if seed % 2 else None
    sparse, numbers, scale, kept = packed((weight * normal((1,), seed), keep, grid))
    expected = reference.int8_linear(x, numbers, kept, scale, bias)
    terms = expected if bias is None else expected - bias
    close(product(x, sparse, bias), expected.to(dtype), terms.double().abs() + expected.double().abs(), dtype)


@EVERY
@given(kept_matrices(), st.sampled_from([1, 4, 20]), seeds, st.sampled_from(DTYPES))
def test_a_row_that_is_not_finite_gives_a_row_of_nan_and_no_other(
    product: Product, matrix: Matrix, n: int, seed: int, dtype: torch.dtype
) -> None:
    sparse, *_ = packed(matrix)
    x = normal((n, sparse.shape[1]), seed).to(dtype)
    good = product(x, sparse, None)
    x[seed % n, seed % sparse.shape[1]] = (torch.nan, torch.inf, -torch.inf)[seed % 3]
    got, others = product(x, sparse, None), torch.arange(n) != seed % n
    assert got[~others].isnan().all()
    assert torch.equal(got[others], good[others])


@EVERY
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("columns", [2, 64, 1000, 5056])
def test_the_largest_numbers_do_not_saturate(product: Product, sign: int, columns: int) -> None:
    rows = 40 if columns % 64 else 48
    weight, x = torch.full((rows, columns), 127.0), torch.full((50, columns), 127.0 * sign)
    for block in ((16, 16), (16, 1), (4, 4)):
        grid = BlockGrid(weight.shape, tuple(min(b, s) for b, s in zip(block, weight.shape, strict=True)))
        sparse = pack_int8(weight, BlockMask(torch.ones(grid.size).bool(), grid))
        assert torch.equal(product(x, sparse, None), torch.full((50, rows), float(127 * 127 * columns * sign)))
        sparse.values.neg_()
        assert torch.equal(product(x, sparse, None), torch.full((50, rows), -float(127 * 127 * columns * sign)))


@EVERY
@pytest.mark.parametrize("block", [(4, 4), (5, 8), (16, 16), (12, 20)])
@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("zeros", [0, 3570])  # with many large sums AVX2 multiplies pairs, with few it multiplies quads and remainders
def test_any_two_neighbouring_weights_are_added_without_saturation(product: Product, block: tuple[int, int], n: int, zeros: int) -> None:
    """All sums of two weights from -254 to 254 occur, for inputs of -127, of 127 and of both."""
    first, second = torch.meshgrid(torch.arange(-127, 128), torch.arange(-127, 128), indexing="ij")
    weight = torch.cat([torch.stack((first, second), -1).flatten(1).float(), torch.zeros(255, zeros)], 1)  # [255, 510 + zeros]
    weight[:, 0] = 127
    x = 127 * integers((n, weight.shape[1]), 0, top=1).float()
    x[0], x[-1], x[:, 0] = -127, 127, 127
    grid = BlockGrid((255, 510 + zeros), block)
    sparse = pack_int8(weight, BlockMask(torch.ones(grid.size).bool(), grid))
    assert torch.equal(product(x, sparse, None), x @ weight.mT)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 8, 100, 128])
@pytest.mark.parametrize(("shape", "block"), LARGE)
def test_large_layers(product: Product, shape: Any, block: Any, n: int, dtype: torch.dtype) -> None:
    grid = BlockGrid(shape, block)
    weight, x = integers(shape, 0, top=127), integers((n, shape[1]), 1, top=127)
    weight[:, 0], x[:, 0] = 127, -127
    keep = torch.rand(grid.size, generator=torch.Generator().manual_seed(0)) < 0.4
    keep[:, 0] = True
    expected = (x @ torch.where(bp.expand(keep, grid), weight, 0).mT).float().to(dtype)
    assert torch.equal(product(x.to(dtype), pack_int8(weight, BlockMask(keep, grid)), None), expected)


@EVERY
@pytest.mark.parametrize("shape", [(12,), (0, 12), (3, 12), (2, 3, 12)])
def test_inputs_of_any_rank(product: Product, shape: tuple[int, ...]) -> None:
    weight, x = integers((6, 12), 0, top=127), integers((*shape, 2), 1, top=127)[..., 0]
    weight[:, 0], x[..., 0] = 127, 127
    sparse = pack_int8(weight, BlockMask(torch.ones(3, 3).bool(), BlockGrid((6, 12), (2, 4))))
    assert torch.equal(product(x.float(), sparse, None), (x @ weight.mT).float())


@pytest.mark.parametrize("instructions", spmm.instructions() or ["plain"])
@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_gives_the_same(instructions: str, threads: int) -> None:
    if not spmm.instructions():
        pytest.skip(spmm.status)
    keep = torch.rand(16, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    sparse = pack_int8(normal((256, 640), 0), BlockMask(keep, BlockGrid((256, 640), (16, 16))))
    for n in (1, 7, 200):
        x = normal((n, 640), 1).float()
        assert torch.equal(compiled(instructions, threads)(x, sparse, None), compiled(instructions)(x, sparse, None))


@given(kept_matrices(), seeds, st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_a_weight_is_rounded_by_definition(matrix: Matrix, seed: int, dtype: torch.dtype) -> None:
    weight = normal(matrix[2].shape, seed).to(dtype)
    weight[seed % len(weight)] *= seed % 3 * 1e-3
    numbers, scale = quantize_weight(weight)
    expected, expected_scale = reference.int8_numbers(weight)
    assert torch.equal(numbers.long(), expected)
    assert torch.equal(scale, expected_scale)
    assert ((numbers * scale[:, None] - weight.float()).abs() <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-36, 1e30, 3e38])
def test_inputs_and_weights_of_any_size_become_numbers_of_at_most_127(size: float) -> None:
    x = torch.tensor([[size, -size, size / 3, 0.0]])
    for numbers, scale in (quantize_inputs(x), quantize_weight(x)):
        assert numbers.abs().max() <= 127
        assert scale.isfinite().all()
        if size > 1e-36:
            torch.testing.assert_close(numbers * scale[:, None], x, atol=size / 250, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match=r"a weight of shape \(4, 4\) is not finite"):
        quantize_weight(weight)
    pack_int8(weight, BlockMask(torch.tensor([[True, False], [True, True]]), BlockGrid((4, 4), (2, 2))))  # it is not kept


def test_what_is_not_compiled_is_left_to_others() -> None:
    sparse = pack_int8(torch.ones(4, 4), BlockMask(torch.ones(2, 2).bool(), BlockGrid((4, 4), (2, 2))))
    x, scale = torch.ones(3, 4), sparse.scale
    assert scale is not None

    def multiply(x: Tensor, values: Tensor = sparse.values, scale: Tensor = scale, bias: Tensor | None = None) -> Tensor | None:
        return spmm.linear_int8(x, values, sparse.crow, sparse.col, scale, shape=sparse.shape, block=sparse.block, bias=bias)

    for inputs in (x.double(), x.half(), x.to("meta"), x.clone().requires_grad_()):
        assert multiply(inputs) is None
    for values in (sparse.values.float(), sparse.values.to("meta")):
        assert multiply(x, values) is None
    for other in (scale[:3], scale.double(), torch.ones(8)[::2], scale.to("meta")):
        assert multiply(x, scale=other) is None
    for bias in (torch.ones(5), torch.ones(4).double(), torch.ones(8)[::2], torch.ones(4).requires_grad_()):
        assert multiply(x, bias=bias) is None
    with mock.patch.object(spmm, "_library", None):
        assert multiply(x) is None
