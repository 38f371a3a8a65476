"""What the laws range over: shapes of rank 1 to 4 in blocks of any size, dtypes, scores full of ties, masks."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from blockprune import BlockGrid, BlockMask, BlockScore, Param

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)
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


@st.composite
def grids(draw: st.DrawFn, *, rank: tuple[int, int] = (1, 4), side: int = 5) -> BlockGrid:
    shape = draw(st.lists(st.integers(1, side), min_size=rank[0], max_size=rank[1]))
    return BlockGrid(shape, draw(blocks(shape)))


@st.composite
def blocks(draw: st.DrawFn, shape: list[int] | tuple[int, ...]) -> list[int]:
    """A block of any notation: whole axes as -1, as their size, or left out."""
    block = [draw(st.sampled_from([-1, *range(1, s + 1)])) for s in shape]
    return block[: draw(st.integers(0, len(shape)))]


def integers(shape: tuple[int, ...], seed: int, *, top: int = 8) -> Tensor:
    """Whole numbers from -top to top: their sums are exact in any order."""
    return torch.randint(-top, top + 1, shape, generator=torch.Generator().manual_seed(seed)).double()


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def params(draw: st.DrawFn, *, rank: tuple[int, int] = (1, 4), exact: bool = False) -> Param:
    grid = draw(grids(rank=rank))
    weight = (integers if exact else normal)(grid.shape, draw(seeds)) * draw(st.sampled_from([1.0, 2.0**-6, 64.0]))
    return Param(weight.to(draw(dtypes)), grid)


def drawn(palette: list[float], grid: BlockGrid, seed: int, dtype: torch.dtype) -> BlockScore:
    pick = torch.randint(len(palette), grid.size, generator=torch.Generator().manual_seed(seed))
    return BlockScore(torch.tensor(palette, dtype=torch.float64)[pick].to(dtype), grid)


@st.composite
def scores(
    draw: st.DrawFn, *, rank: tuple[int, int] = (1, 4), layers: int = 3, palettes: tuple[str, ...] = tuple(PALETTES), pruned: bool = False
) -> dict[str, BlockScore]:
    """One to three parameters of unlike grids and dtypes; with `pruned`, some blocks are -inf."""
    found = {}
    for name in ["a.weight", "b.weight", "c.weight"][: draw(st.integers(1, layers))]:
        palette = PALETTES[draw(st.sampled_from(palettes))] + [-inf] * pruned
        found[name] = drawn(palette, draw(grids(rank=rank)), draw(seeds), draw(dtypes))
    return found


@st.composite
def masks(draw: st.DrawFn, *, like: dict[str, BlockGrid] | None = None, names: tuple[str, ...] = ("a", "b", "c")) -> dict[str, BlockMask]:
    chosen = draw(st.lists(st.sampled_from(names), unique=True))
    found = {}
    for name in chosen:
        grid = like[name] if like else draw(grids())
        rng = torch.Generator().manual_seed(draw(seeds))
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
