"""What the laws range over: shapes of rank 1 to 4 in blocks of any size, dtypes, scores full of ties, masks."""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from blockprune import BlockGrid, BlockMask, BlockScore, Param

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)
up_to = functools.cache(lambda top: st.integers(0, top))
inf = float("inf")

# Every number is exact in every dtype, and so is a sum of two.
PALETTES: dict[str, list[float]] = {
    "constant": [1.0],
    "zeros": [0.0, -0.0],
    "ties": [0.0, 1.0, 2.0, 3.0],
    "signs": [-2.0, -1.0, -0.0, 0.0, 1.0, 2.0],
    "near": [1.0, 1.0 + 2.0**-7, 1.0 + 2.0**-6],
    "many": [float(i) for i in range(-64, 64)],
    "edges": [-128.0, 0.0, 128.0, inf],
}

sparsities = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.integers(0, 64).map(lambda k: k / 64), st.floats(0, 1))
dyadic = st.integers(0, 64).map(lambda k: k / 64)  # exact: sparsity times elements does not round


def lengths(draw: st.DrawFn, counts: Sequence[int]) -> list[int]:
    """For each count a number from 0 on that is smaller, all as one choice: drawing many choices takes longer than most laws."""
    number, digits = draw(up_to(math.prod(counts) - 1)), []
    for count in reversed(counts):
        number, digit = divmod(number, count)
        digits.append(digit)
    return digits[::-1]


def block_of(draw: st.DrawFn, shape: Sequence[int]) -> list[int]:
    named = shape[: draw(up_to(len(shape)))]
    return [length or -1 for length in lengths(draw, [s + 1 for s in named])]


def grid_of(draw: st.DrawFn, rank: tuple[int, int], side: int) -> BlockGrid:
    axes = rank[0] + (draw(up_to(rank[1] - rank[0])) if rank[1] > rank[0] else 0)
    shape = [1 + length for length in lengths(draw, [side] * axes)]
    return BlockGrid(shape, block_of(draw, shape))


@st.composite
def grids(draw: st.DrawFn, *, rank: tuple[int, int] = (1, 4), side: int = 5) -> BlockGrid:
    return grid_of(draw, rank, side)


@st.composite
def blocks(draw: st.DrawFn, shape: list[int] | tuple[int, ...]) -> list[int]:
    """A block of any notation: whole axes as -1, as their size, or left out."""
    return block_of(draw, shape)


def integers(shape: tuple[int, ...], seed: int, *, top: int = 8) -> Tensor:
    """Whole numbers from -top to top: their sums are exact in any order."""
    return torch.randint(-top, top + 1, shape, generator=torch.Generator().manual_seed(seed)).double()


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def params(draw: st.DrawFn, *, rank: tuple[int, int] = (1, 4), exact: bool = False) -> Param:
    grid = grid_of(draw, rank, 5)
    weight = (integers if exact else normal)(grid.shape, draw(seeds)) * draw(st.sampled_from([1.0, 2.0**-6, 64.0]))
    return Param(weight.to(draw(dtypes)), grid)


def drawn(palette: list[float], grid: BlockGrid, seed: int, dtype: torch.dtype) -> BlockScore:
    pick = torch.randint(len(palette), grid.size, generator=torch.Generator().manual_seed(seed))
    return BlockScore(torch.tensor(palette, dtype=torch.float64)[pick].to(dtype), grid)


@functools.cache
def kinds_of(palettes: tuple[str, ...]) -> st.SearchStrategy[tuple[str, torch.dtype]]:
    return st.sampled_from([*itertools.product(palettes, DTYPES)])


@st.composite
def scores(
    draw: st.DrawFn, *, rank: tuple[int, int] = (1, 4), layers: int = 3, palettes: tuple[str, ...] = tuple(PALETTES), pruned: bool = False
) -> dict[str, BlockScore]:
    """One to three parameters of unlike grids and dtypes; with `pruned`, some blocks are -inf."""
    found, kinds, seed = {}, kinds_of(palettes), draw(seeds)
    for i, name in enumerate(["a.weight", "b.weight", "c.weight"][: 1 + draw(up_to(layers - 1))]):
        palette, dtype = draw(kinds)
        found[name] = drawn(PALETTES[palette] + [-inf] * pruned, grid_of(draw, rank, 5), seed + i, dtype)
    return found


@st.composite
def masks(draw: st.DrawFn, *, like: dict[str, BlockGrid] | None = None, names: tuple[str, ...] = ("a", "b", "c")) -> dict[str, BlockMask]:
    chosen = draw(st.lists(st.sampled_from(names), unique=True))
    found, seed = {}, draw(seeds) if chosen else 0
    for i, name in enumerate(chosen):
        grid = like[name] if like else grid_of(draw, (1, 4), 5)
        rng = torch.Generator().manual_seed(seed + i)
        found[name] = BlockMask(torch.rand(grid.size, generator=rng) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])), grid)
    return found


def shares_memory(x: Tensor, *others: Tensor) -> bool:
    return any(x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in others)


Matrix = tuple[Tensor, Tensor, BlockGrid]  # weight, keep, grid
batch_sizes = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 40, 70]))  # around the sizes of the kernels' tiles


@st.composite
def kept_matrices(draw: st.DrawFn, *, side: int = 48) -> Matrix:
    """A matrix of whole numbers, which of its blocks are kept, and the blocks; some block rows keep nothing, some everything."""
    if draw(st.integers(0, 3)):
        shape = draw(st.integers(1, side)), draw(st.integers(1, 2 * side))
        usual = st.sampled_from([1, 2, 4, 8, 16, 32])
        block = [draw(st.one_of(usual.map(lambda b, s=s: min(b, s)), st.integers(1, s))) for s in shape]
    else:  # blocks that are whole tiles of a processor
        block = [draw(st.sampled_from([16, 32])), draw(st.sampled_from([16, 32, 48, 64]))]
        shape = block[0] * draw(st.integers(1, 2)), block[1] * draw(st.integers(1, 3))
    grid, seed = BlockGrid(shape, block), draw(seeds)
    random = torch.rand(grid.size, generator=torch.Generator().manual_seed(seed))
    keep = random < draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
    keep[random[:, 0] < 0.1] = False
    return integers(shape, seed, top=4), keep, grid


@st.composite
def int8_inputs(draw: st.DrawFn, n: int, columns: int) -> Tensor:
    """Rows ``[n, columns]`` of whole numbers from -127 to 127, of which each has 127 or -127 once, so that their scale is 1."""
    seed = draw(seeds)
    x = integers((n, columns), seed, top=draw(st.sampled_from([1, 20, 127])))
    position = integers((n,), seed + 1, top=columns).long() % columns
    x[torch.arange(n), position] = draw(st.sampled_from([127.0, -127.0]))
    return x
