"""How kept blocks are stored: it loses nothing, is what it says, and is refused when it does not fit together."""

from typing import Any

import attrs
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Matrix, dtypes, kept_matrices, normal

import blockprune as bp
from blockprune.core.grid import BlockGrid
from blockprune.export import format as block_format
from blockprune.export.format import block_rows, pack, to_layout, unpack, validate


@given(kept_matrices(), dtypes, st.booleans())
def test_unpacking_gives_back_what_was_kept_and_zeros(matrix: Matrix, dtype: torch.dtype, paired: bool) -> None:
    weight, keep, grid = matrix
    sparse = pack(weight.to(dtype), keep, grid, paired=paired)
    validate(sparse)
    assert torch.equal(unpack(sparse), torch.where(bp.expand(keep, grid), weight, 0).to(dtype))
    assert sparse.values.dtype == dtype
    assert sparse.values.numel() == int(bp.expand(keep, grid).sum()), "one number a kept weight"


@given(kept_matrices(), st.booleans())
def test_packing_is_the_definition(matrix: Matrix, paired: bool) -> None:
    weight, keep, grid = matrix
    sparse = pack(weight, keep, grid, paired=paired)
    values, crow, col = reference.stored(weight, bp.expand(keep, grid), sparse.block, paired)
    assert (sparse.values.tolist(), sparse.crow.tolist(), sparse.col.tolist()) == (values, crow, col)


@given(kept_matrices(), st.booleans())
def test_the_other_layout_holds_the_same_matrix(matrix: Matrix, paired: bool) -> None:
    packed, other = (pack(*matrix, paired=layout) for layout in (paired, not paired))
    converted = to_layout(packed, paired=not paired)
    validate(converted)
    assert torch.equal(unpack(converted), unpack(other))
    assert converted.values.numel() == other.values.numel()
    assert paired == (not converted.paired)
    assert to_layout(packed, paired=paired) is packed
    if paired and matrix[1].any() and not matrix[1].all():
        assert converted.block[0] >= packed.block[0]


@pytest.mark.parametrize(
    ("block", "tall"),
    [((16, 16), 16), ((32, 32), 32), ((64, 1), 64), ((128, 64), 128), ((256, 64), 128), ((24, 8), 24), ((48, 16), 48), ((112, 16), 112)],
)
def test_the_gpu_layout_merges_the_block_rows_of_a_tall_block(block: tuple[int, int], tall: int) -> None:
    grid = BlockGrid((3 * block[0] + 16, 4 * block[1]), block)
    keep = torch.rand(grid.size, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[:, 0] = torch.arange(len(keep)) % 2 == 0  # no two rows of blocks alike
    converted = to_layout(pack(torch.ones(grid.shape), keep, grid), paired=False)
    assert converted.block[0] == tall == pack(torch.ones(grid.shape), keep, grid, paired=False).block[0]


@given(kept_matrices(), st.booleans())
def test_block_rows_multiply_to_the_whole_product(matrix: Matrix, paired: bool) -> None:
    weight, keep, grid = matrix
    x = normal((3, grid.shape[1]), 1)
    y = x.new_full((3, grid.shape[0]), float("nan"))
    for rows, columns, weights in block_rows(pack(weight, keep, grid, paired=paired)):
        y[:, rows] = x[:, columns] @ weights
    torch.testing.assert_close(y, x @ torch.where(bp.expand(keep, grid), weight, 0).mT)


@pytest.mark.parametrize(
    ("shape", "block", "stored"),
    [
        ((64, 64), (4, 4), (4, 4)),
        ((64, 64), (16, 1), (16, 1)),
        ((128, 128), (64, 64), (16, 64)),
        ((128, 128), (32, 128), (16, 64)),
        ((40, 77), (-1, 1), (16, 1)),
        ((40, 77), (1, -1), (1, 64)),
        ((40, 7), (1, -1), (1, 8)),
        ((9, 9), (3, 3), (3, 1)),
        ((96, 96), (48, 48), (16, 48)),
        ((72, 72), (24, 24), (12, 24)),
        ((134, 134), (67, 67), (67, 1)),
        ((4, 1), (1, 1), (1, 1)),
    ],
)
def test_large_and_odd_blocks_are_stored_as_several(shape: Any, block: Any, stored: Any) -> None:
    grid = BlockGrid(shape, block)
    keep = torch.arange(grid.blocks).view(grid.size) % 2 == 0
    sparse = pack(torch.ones(shape), keep, grid)
    assert sparse.block == stored
    assert torch.equal(unpack(sparse).bool(), bp.expand(keep, grid))


@given(kept_matrices(), st.integers(1, 200))
def test_packing_in_chunks_is_packing_at_once(matrix: Matrix, chunk: int) -> None:
    whole = pack(*matrix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_format, "_CHUNK_ELEMENTS", chunk)
        parts = pack(*matrix)
        assert torch.equal(unpack(parts), unpack(whole))
    assert torch.equal(parts.values, whole.values)


def test_nothing_is_shared_with_the_weight() -> None:
    weight = torch.ones(4, 4, requires_grad=True)
    sparse = pack(weight, torch.ones(1, 1).bool(), BlockGrid((4, 4), (4, 4)))
    with torch.no_grad():
        weight.zero_()
    assert sparse.values.eq(1).all()
    assert not sparse.values.requires_grad


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block": (2, 3)}, "width 1 or even"),
        ({"block": (0, 2)}, "must be positive"),
        ({"shape": (6, 0)}, "must be positive"),
        ({"crow": torch.tensor([0, 2, 3, 4]).int()}, "crow is torch.int32"),
        ({"crow": torch.tensor([0, 2, 4])}, "crow has 3 entries and must have 4"),
        ({"crow": torch.tensor([1, 2, 3, 4])}, "crow must rise from 0"),
        ({"crow": torch.tensor([0, 3, 2, 4])}, "crow must rise from 0"),
        ({"crow": torch.tensor([0, 2, 3, 5])}, "to the number of kept blocks, 4"),
        ({"crow": torch.tensor([0, 9, 9, 4])}, "crow must rise from 0"),
        ({"crow": torch.tensor([0, -1, 3, 4])}, "crow must rise from 0"),
        ({"col": torch.tensor([0, 2, 1, 1])}, "col is torch.int64"),
        ({"col": torch.tensor([0, 3, 1, 1]).int()}, "col must be from 0 to 2; it is from 0 to 3"),
        ({"col": torch.tensor([-1, 2, 1, 1]).int()}, "it is from -1 to 2"),
        ({"col": torch.tensor([2, 0, 1, 1]).int()}, "rise within each block row"),
        ({"col": torch.tensor([2, 2, 1, 1]).int()}, "rise within each block row"),
        ({"col": torch.tensor([[0, 2], [1, 1]]).int()}, "with one axis"),
        ({"col": torch.tensor([0, 1, 1, 1]).int()}, "values has 12 numbers and must have 14"),
        ({"values": torch.ones(14)}, "values has 14 numbers and must have 12"),
        ({"values": torch.ones(24)[::2]}, "contiguous"),
        ({"shape": (6, 5)}, "values has 12 numbers"),
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Any], said: str) -> None:
    keep = torch.tensor([[True, False, True], [False, True, False], [False, True, False]])
    sparse = pack(torch.ones(5, 5), keep, BlockGrid((5, 5), (2, 2)))
    validate(sparse)
    with pytest.raises(ValueError, match="block-sparse weight of shape") as caught:
        validate(attrs.evolve(sparse, **change))
    assert said in str(caught.value)


def test_a_mask_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"weight \(4, 4\) and keep \(1, 2\)"):
        pack(torch.ones(4, 4), torch.ones(1, 2).bool(), BlockGrid((4, 4), (2, 2)))
