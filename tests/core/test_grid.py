"""Law 1 (expand and pool agree about the blocks), and the fast pooling against a slow reference."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import attrs
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import blocks, dtypes, grids, integers, normal, seeds
from torch import Tensor

import blockprune as bp
from blockprune.core import grid as module
from blockprune.core.grid import tiles, untile

PATHS = st.tuples(st.booleans(), st.sampled_from([1, 3, 16, 1 << 18]))  # with the compiled loop or without, elements of a chunk
REDUCTIONS = st.tuples(st.sampled_from(list(reference.REDUCE)), st.sampled_from(list(reference.ELEMENTWISE)))


@contextmanager
def pooling_path(compiled: bool, chunk: int) -> Iterator[None]:
    """Pool in small pieces, and without the compiled loop: every path must give the same numbers."""
    with patch.object(module, "CHUNK_ELEMENTS", chunk):
        if compiled:
            yield
        else:
            with patch.object(module.native, "pool_sum", lambda *args: None):
                yield


def same(result: Tensor, expected: Tensor) -> bool:
    return result.dtype == expected.dtype and torch.equal(result, expected)


@given(grids(), st.sampled_from([torch.bool, torch.int64, torch.uint8, torch.float32, torch.float64, torch.bfloat16]), seeds)
def test_expand_gives_the_parameters_shape_and_each_element_its_blocks_value(grid: bp.BlockGrid, dtype: torch.dtype, seed: int) -> None:
    value = integers(grid.size, seed).abs().to(dtype)
    before = value.clone()
    assert same(bp.expand(value, grid), reference.expand(value, grid))
    assert same(value, before)


@given(grids(), st.sampled_from([torch.bool, torch.int64, torch.float32, torch.float64, torch.bfloat16, torch.float16]), seeds, PATHS)
def test_pool_of_expand_is_the_value_times_the_blocks_true_size(grid: bp.BlockGrid, dtype: torch.dtype, seed: int, path: tuple) -> None:
    value = integers(grid.size, seed).abs().to(dtype)
    with pooling_path(*path):
        pooled = bp.pool(bp.expand(value, grid), grid)
    assert torch.equal(pooled.double(), value.double() * bp.block_elements(grid))


@given(
    grids(side=6), dtypes, seeds, st.tuples(st.sampled_from(list(reference.REDUCE)), st.sampled_from(list(reference.ELEMENTWISE))), PATHS
)
def test_pool_equals_the_slow_reference(grid: bp.BlockGrid, dtype: torch.dtype, seed: int, reduction: tuple[str, str], path: tuple) -> None:
    reduce, function = reduction
    x = integers(grid.shape, seed).to(dtype)  # whole numbers: sums are exact in any order
    before = x.clone()
    with pooling_path(*path):
        pooled = bp.pool(x, grid, reduce=reduce, elementwise=reference.ELEMENTWISE[function])
    assert same(pooled, reference.pool(x, grid, reduce=reduce, elementwise=reference.ELEMENTWISE[function]))
    assert same(x, before)
    assert pooled.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@given(grids(side=6), seeds, st.randoms(use_true_random=False), PATHS)
def test_pool_reads_any_memory_order(grid: bp.BlockGrid, seed: int, random: object, path: tuple) -> None:
    order = list(range(len(grid.shape)))
    random.shuffle(order)  # type: ignore[attr-defined]
    x = integers(grid.shape, seed).float()
    scattered = torch.stack([x, -x], -1).permute(*order, -1).contiguous().permute(*[order.index(a) for a in range(x.ndim)], -1)[..., 0]
    with pooling_path(*path):
        assert same(bp.pool(scattered, grid), bp.pool(x, grid))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((999, 19), (-1, 1)), ((999, 19), (1, -1)), ((301, 299), (64, 48)), ((121, 301), (2, 2)), ((70000,), (-1,)), ((9, 8, 37, 31), (4,))],
)
def test_pool_of_many_chunks_equals_the_sum_in_double(shape: tuple, block: tuple, dtype: torch.dtype, compiled: bool) -> None:
    grid, x = bp.BlockGrid(shape, block), normal(shape, 0).to(dtype)
    with pooling_path(compiled, 1 << 12):
        pooled = bp.pool(x, grid, elementwise=torch.abs)
    expected = reference.pool(x.double(), grid, elementwise=torch.abs)
    assert pooled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=0)


@given(grids(rank=(2, 2), side=700), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(2, 5))
@settings(max_examples=20)
def test_the_number_of_threads_does_not_matter(grid: bp.BlockGrid, dtype: torch.dtype, threads: int) -> None:
    x = integers(grid.shape, 0).to(dtype)
    with patch.object(module.native, "_PER_THREAD", 1000), patch.object(torch, "get_num_threads", lambda: threads):
        several = bp.pool(x, grid, elementwise=torch.abs)
    with patch.object(module.native, "pool_sum", lambda *args: None):
        assert same(several, bp.pool(x, grid, elementwise=torch.abs))


def test_half_types_are_summed_in_float32() -> None:
    x = torch.ones(4096, dtype=torch.bfloat16)  # in bfloat16, 256 + 1 is 256
    assert bp.pool(x, bp.BlockGrid((4096,), (-1,))).tolist() == [4096.0]
    assert bp.pool(torch.full((8,), 60000.0, dtype=torch.float16), bp.BlockGrid((8,), (-1,))).tolist() == [480000.0]


@pytest.mark.parametrize("block", [(1, 1), (2, 1), (1, 3), (-1, -1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64])
def test_bool_and_integers_are_summed_as_int64_whatever_the_block(dtype: torch.dtype, block: tuple) -> None:
    assert same(bp.pool(torch.ones(4, 6, dtype=dtype), g := bp.BlockGrid((4, 6), block)), bp.block_elements(g))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("compiled", [True, False])
def test_what_is_not_finite_stays_in_its_own_block(value: float, compiled: bool) -> None:
    x = torch.ones(5, 7)
    x[0, 0] = value
    with pooling_path(compiled, 1 << 18):
        pooled = bp.pool(x, bp.BlockGrid((5, 7), (2, 3)))
    assert pooled[0, 0].item() == pytest.approx(value, nan_ok=True)
    assert int(pooled.isfinite().sum()) == 8


@given(grids(side=4), seeds)
def test_the_gradient_of_pool_is_expand(grid: bp.BlockGrid, seed: int) -> None:
    x = normal(grid.shape, seed).requires_grad_()
    upstream = normal(grid.size, seed + 1)
    bp.pool(x, grid).backward(upstream)
    assert torch.equal(x.grad, bp.expand(upstream, grid))


@given(grids(side=6))
def test_block_elements_counts_every_element_once(grid: bp.BlockGrid) -> None:
    assert same(bp.block_elements(grid), reference.block_elements(grid))
    assert int(bp.block_elements(grid).sum()) == grid.elements == math.prod(grid.shape)
    assert grid.blocks == math.prod(grid.size) == len(list(reference.cells(grid)))
    assert grid.ragged == (int(bp.block_elements(grid).min()) < math.prod(grid.block))


@given(grids(side=4), seeds)
def test_tiles_lists_each_blocks_elements_and_untile_is_its_inverse(grid: bp.BlockGrid, seed: int) -> None:
    x = normal(grid.shape, seed)
    rows = tiles(x, grid, fill=math.inf)
    assert rows.shape == (grid.blocks, math.prod(grid.block))
    assert [sorted(row[row != math.inf].tolist()) for row in rows] == [sorted(x[at].flatten().tolist()) for _, at in reference.cells(grid)]
    assert torch.equal(untile(rows, grid), x)


@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_one_notation_axes_left_out_or_minus_one_are_whole(data: st.DataObject, shape: list[int]) -> None:
    block = data.draw(blocks(shape))
    whole = [b if b != -1 else s for b, s in zip(block + [-1] * len(shape), shape, strict=False)]
    grid = bp.BlockGrid(shape, block)
    assert grid == bp.BlockGrid(torch.Size(shape), tuple(whole))
    assert grid.block == tuple(whole)
    assert grid.size == tuple(math.ceil(s / b) for s, b in zip(shape, whole, strict=True))


@given(grids())
def test_a_grid_is_a_value(grid: bp.BlockGrid) -> None:
    for copied in (bp.BlockGrid(grid.shape, grid.block), copy.deepcopy(grid), pickle.loads(pickle.dumps(grid)), attrs.evolve(grid)):
        assert copied == grid
        assert hash(copied) == hash(grid)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        grid.block = grid.shape  # type: ignore[misc]


@pytest.mark.parametrize(
    ("shape", "block", "error", "says"),
    [
        ((8, 8), (0, 4), ValueError, ["axis 0", "8 elements", "block 0", "-1"]),
        ((8, 8), (4, -2), ValueError, ["axis 1", "block -2"]),
        ((8, 6), (4, 7), ValueError, ["(4, 7)", "(8, 6)", "axis 1 has 6 elements", "1 <= block[i] <= shape[i]"]),
        ((8, 6), (1, 1, 1), ValueError, ["has 3 axes", "has 2", "leading axes"]),
        ((), (), ValueError, ["shape=()", "at least one axis"]),
        ((4, 0), (1,), ValueError, ["shape=(4, 0)", "no elements"]),
        ((4, -1), (1,), ValueError, ["shape=(4, -1)"]),
        ((8, 8), 4, TypeError, ["block=4", "sequence of integers"]),
        ((8, 8), "44", TypeError, ["block='44'", "sequence of integers"]),
        ((8, 8), (2.0, 2), TypeError, ["block=(2.0, 2)", "sequence of integers"]),
        ((8, 8), (True, 2), TypeError, ["block=(True, 2)"]),
        ((8, 8), None, TypeError, ["block=None"]),
    ],
)
def test_a_block_that_does_not_fit_says_why_and_what_would(shape: tuple, block: object, error: type[Exception], says: list[str]) -> None:
    with pytest.raises(error) as caught:
        bp.BlockGrid(shape, block)  # type: ignore[arg-type]
    assert not [part for part in says if part not in str(caught.value)]


def test_pool_and_expand_refuse_another_shape_and_an_unknown_reduction() -> None:
    grid = bp.BlockGrid((5, 4), (2, 2))
    with pytest.raises(ValueError, match=r"x has shape \(4, 5\).*\(5, 4\)"):
        bp.pool(torch.ones(4, 5), grid)
    with pytest.raises(ValueError, match=r"keep has shape \(5, 4\).*\(3, 2\)"):
        bp.expand(torch.ones(5, 4), grid)
    with pytest.raises(ValueError, match=r'median.*"sum".*"mean"'):
        bp.pool(torch.ones(5, 4), grid, reduce="median")


GRID = bp.BlockGrid((4, 4), (2, 2))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: bp.pool(torch.ones(4, 4), (2, 2)), r"grid=\(2, 2\) must be a BlockGrid; build one: bp.BlockGrid"),
        (lambda: bp.pool([1.0], GRID), "x is a list, not a tensor"),
        (lambda: bp.pool(torch.ones(4, 4), GRID, elementwise="abs"), "elementwise='abs' must be a function"),
        (lambda: bp.expand(bp.BlockMask(torch.ones(2, 2).bool(), GRID), GRID), "keep is a BlockMask, not a tensor"),
        (lambda: bp.block_elements((4, 4)), r"grid=\(4, 4\) must be a BlockGrid"),
    ],
)  # fmt: skip
def test_what_is_no_tensor_or_grid_is_refused_by_name(call: Callable[[], object], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        call()
