"""The compiled loops on every instruction set that this processor has: sums over blocks, and Optimal Brain Surgeon."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from strategies import integers, normal
from torch import Tensor

from blockprune import native
from blockprune.native import spmm
from blockprune.native.library import BEST, INSTRUCTIONS, chosen_instructions

BUILT = pytest.mark.skipif(native._library is None, reason=native.status)
TERMS = [None, torch.abs, torch.square]
BLOCKS = [(1, 1), (2, 2), (4, 4), (3, 8), (40, 16), (16, 32), (2, 5), (1, 64), (70, 131)]


@BUILT
@pytest.mark.parametrize("folder", ["", "spmm"])
def test_no_code_runs_when_the_library_is_loaded(folder: str) -> None:
    """Constructors of constants would be compiled for AVX-512, too, and end the process on every other processor."""
    libraries = [*(Path(native.__file__).parent / folder).glob("kernels*.so")]
    assert libraries
    for library in libraries:
        assert b"_GLOBAL__sub_I_" not in library.read_bytes(), f"{library.name}: a constant of a kernel file is not constexpr"


@pytest.fixture(params=native.instructions() or [pytest.param("plain", marks=BUILT)])
def _instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test on each instruction set."""
    monkeypatch.setattr(native, "_choice", INSTRUCTIONS.index(request.param))


@pytest.mark.usefixtures("_instructions")
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_blocks_of_whole_numbers_are_exact(block: tuple[int, int], term: object, dtype: torch.dtype) -> None:
    x = integers((70, 131), 0, top=4)
    terms = term(x) if callable(term) else x
    (rows, cols), (r, c) = x.shape, block
    padded = torch.zeros(-(-rows // r) * r, -(-cols // c) * c)
    padded[:rows, :cols] = terms
    expected = padded.view(-1, r, padded.shape[1] // c, c).sum((1, 3))
    got = native.pool_sum(x.to(dtype), (rows, cols), block, term)
    assert got is not None
    assert torch.equal(got, expected)


def removals(rows: Tensor, inverse: Tensor, n: int, order: list[int]) -> Iterator[tuple[float, float]]:
    """By the definition, what each removal in this order adds to the error, and the least that any block would add."""
    w, h, left = rows.double(), inverse.double(), torch.ones(len(order), dtype=torch.bool)
    for removed in order:
        blocks = w.view(len(w), -1, n).permute(1, 2, 0)[left]  # [left, n, m]
        diagonal = h.view(-1, n, len(order), n).diagonal(dim1=0, dim2=2).permute(2, 0, 1)[left]
        added = (blocks * torch.linalg.solve(diagonal, blocks)).sum((1, 2))
        yield float(added[int(left[:removed].sum())]), float(added.min())
        columns = slice(removed * n, removed * n + n)
        solved = torch.linalg.solve(h[columns, columns], h[columns])
        w, h = w - w[:, columns] @ solved, h - h[:, columns] @ solved
        left[removed] = False


def problem(k: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Two bands of rows and the inverse Hessian of each."""
    x = normal((2, 2 * k, k), 0).double()
    inverse = torch.linalg.inv(x.mT @ x / k + 0.1 * torch.eye(k))
    return normal((2, m, k), 1).to(dtype), ((inverse + inverse.mT) / 2).to(dtype).contiguous(), torch.tensor([0, 1])


@pytest.mark.usefixtures("_instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "m", "blocks"), [(1, 1, 90), (1, 20, 67), (2, 3, 50), (3, 4, 30), (4, 4, 40), (8, 1, 18), (16, 16, 7), (33, 5, 3)]
)
def test_blocks_are_removed_as_the_definition_says(n: int, m: int, blocks: int, dtype: torch.dtype) -> None:
    rows, inverse, group = problem(n * blocks, m, dtype)
    found = native.obs_sweep(rows, inverse, group, n, blocks)
    assert found is not None
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    for band in range(2):
        errors, order = found[0][band].tolist(), found[1][band].tolist()
        assert sorted(order) == list(range(blocks))
        for error, (added, least) in zip(errors, removals(rows[band], inverse[band], n, order), strict=True):
            assert error == pytest.approx(added, rel=tolerance, abs=tolerance * max(errors) / 100)
            assert added <= least * (1 + tolerance) + tolerance * max(errors) / 100


@pytest.mark.usefixtures("_instructions")
@pytest.mark.parametrize(("n", "m", "blocks"), [(1, 1, 90), (4, 4, 40), (16, 16, 7)])
def test_a_stop_lists_the_others_by_their_scores(n: int, m: int, blocks: int) -> None:
    rows, inverse, group = problem(n * blocks, m, torch.float64)
    stop = blocks // 2
    every, some = native.obs_sweep(rows, inverse, group, n, blocks), native.obs_sweep(rows, inverse, group, n, stop)
    assert every is not None
    assert some is not None
    for whole, part in zip(every, some, strict=True):
        assert torch.equal(part[:, :stop], whole[:, :stop])
    rest = some[0][:, stop:]
    assert torch.equal(rest, rest.sort(1).values)
    assert torch.equal(some[1].sort(1).values, torch.arange(blocks).expand(2, -1))


@pytest.mark.usefixtures("_instructions")
@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_an_inverse_that_is_not_positive_definite_is_an_error(n: int) -> None:
    rows, inverse, group = problem(6 * n, 3, torch.float32)
    inverse[1, -1, -1] = -1
    with pytest.raises(torch.linalg.LinAlgError, match=r"band 1: the inverse lost positive definiteness in torch\.float32"):
        native.obs_sweep(rows, inverse, group, n, 6)


@BUILT
def test_an_instruction_set_that_is_not_there_leaves_the_work_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_choice", len(INSTRUCTIONS))
    assert native.pool_sum(torch.ones(4, 4), (4, 4), (2, 2), None) is None
    assert native.obs_sweep(*problem(4, 2, torch.float32), 2, 2) is None


def test_the_environment_chooses_for_all_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native._choice == spmm._choice == chosen_instructions()
    for name, position in (("avx2", 1), ("plain", 0), ("", BEST)):
        monkeypatch.setenv("BLOCKPRUNE_INSTRUCTIONS", name)
        assert chosen_instructions() == position
    names = "plain, avx2, avx_vnni, avx512, avx512_vnni, avx512_bf16, amx"
    monkeypatch.setenv("BLOCKPRUNE_INSTRUCTIONS", "sse9")
    with pytest.raises(ValueError, match=f"BLOCKPRUNE_INSTRUCTIONS='sse9' must be one of {names}, or"):
        chosen_instructions()
