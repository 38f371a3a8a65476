"""The compiled convolution equals its definition, on every instruction set that this processor has."""

from functools import partial
from typing import Any
from unittest import mock

import attrs
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import integers, seeds
from test_spmm import BUILT, DTYPES, EVERY, running
from torch import Tensor
from torch.nn import functional as F

import blockprune as bp
from blockprune.core.grid import BlockGrid
from blockprune.export.format import BlockSparse
from blockprune.export.packing import pack_weight
from blockprune.native import spmm
from blockprune.native.spmm import Window


def conv2d(x: Tensor, sparse: BlockSparse, bias: Tensor | None, window: Window) -> Tensor:
    out = spmm.conv2d(x, sparse.values, sparse.crow, sparse.col, shape=sparse.shape, block=sparse.block, bias=bias, window=window)
    assert out is not None
    return out


@attrs.frozen(eq=False)
class Problem:
    """A convolution of whole numbers."""

    x: Tensor
    weight: Tensor
    mask: bp.BlockMask
    bias: Tensor | None
    window: Window

    @property
    def expected(self) -> Tensor:
        return reference.sparse_conv2d(self.x, self.weight, bp.expand(self.mask.keep, self.mask.grid), self.bias, self.window)

    def outcome(self, dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        bias = None if self.bias is None else self.bias.to(dtype)
        return conv2d(self.x.to(dtype, memory_format=layout), pack_weight(self.weight.to(dtype), self.mask), bias, self.window)


@st.composite
def problems(draw: st.DrawFn, *, side: int = 12) -> Problem:
    small = partial(st.integers, 1)
    filters, channels, kernel = draw(small(36)), draw(small(20)), (draw(small(3)), draw(small(3)))
    window = Window(
        kernel,
        stride=(draw(small(3)), draw(small(3))),
        dilation=(draw(small(2)), draw(st.sampled_from([1, 2, 2, 1, 9, 18, 40]))),  # a panel of outputs may fit between two rows
        padding=tuple(draw(st.integers(0, 3)) for _ in range(4)),
    )
    left, right, top, bottom = window.padding
    least = [
        max(1, dilation * (taps - 1) + 1 - both)
        for taps, dilation, both in zip(kernel, window.dilation, (top + bottom, left + right), strict=True)
    ]
    image = [size + draw(st.integers(0, side)) for size in least]
    shape, seed = (filters, channels, *kernel), draw(seeds)
    block = draw(st.sampled_from([(16, 16), (8, 4), (4, 4), (3, 2), (16, 1), (1,), (16,), (-1, 1), (-1, 8), (5, 3, 1, 1), (1, 1, 1, 1)]))
    grid = BlockGrid(shape, [b if b < 0 else min(b, s) for b, s in zip(block, shape, strict=False)])
    keep = torch.rand(grid.size, generator=torch.Generator().manual_seed(seed)) < draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    x, weight = integers((draw(st.integers(0, 3)), channels, *image), seed + 1, top=4), integers(shape, seed, top=4)
    return Problem(x, weight, bp.BlockMask(keep, grid), integers((filters,), seed + 2) if seed % 2 else None, window)


layouts = st.sampled_from([torch.contiguous_format, torch.channels_last])


@EVERY
@given(problems(), st.sampled_from(DTYPES), layouts)
def test_sums_of_whole_numbers_are_exact(instructions: str, problem: Problem, dtype: torch.dtype, layout: torch.memory_format) -> None:
    with running(instructions):
        got = problem.outcome(dtype, layout)
    assert got.dtype == dtype
    assert torch.equal(got, problem.expected.to(dtype))
    assert got.is_contiguous(memory_format=spmm.memory_format(problem.x.to(memory_format=layout)))


@EVERY
@given(problems(side=5), seeds, layouts)
def test_nan_and_inf_reach_the_outputs_whose_kept_taps_read_them_and_no_others(
    instructions: str, problem: Problem, seed: int, layout: torch.memory_format
) -> None:
    if problem.x.numel():
        problem.x.view(-1)[seed % problem.x.numel()] = float("nan" if seed % 2 else "inf")
    with running(instructions):
        got = problem.outcome(layout=layout)
    assert torch.equal(got.nan_to_num(nan=1e30), problem.expected.float().nan_to_num(nan=1e30))


def problem(shape: tuple[int, ...], image: tuple[int, ...], block: tuple[int, ...], sparsity: float, **window: Any) -> Problem:
    grid = BlockGrid(shape, block)
    keep = torch.rand(grid.size, generator=torch.Generator().manual_seed(0)) >= sparsity
    x, weight, bias = integers((image[0], shape[1], *image[1:]), 0, top=2), integers(shape, 1, top=2), integers(shape[:1], 2)
    return Problem(x, weight, bp.BlockMask(keep, grid), bias, Window(shape[2:], **window))


LARGE = [  # images in several strips, rows of W in several groups
    problem((96, 64, 3, 3), (2, 57, 56), (16, 16), 0.5, padding=(1, 1, 1, 1)),
    problem((96, 64, 3, 3), (2, 56, 57), (1,), 0.5, padding=(1, 1, 1, 1), stride=(2, 2)),
    problem((300, 40, 1, 1), (3, 31, 33), (16, 8), 0.5),
    problem((300, 300, 1, 1), (1, 14, 14), (16, 16), 0.75),
    problem((300, 40, 1, 1), (3, 31, 33), (1,), 0.9, stride=(2, 2)),
    problem((600, 20, 1, 1), (1, 40, 40), (4, 4), 0.9),
    problem((24, 512, 3, 3), (1, 7, 7), (24, 1), 0.9, padding=(1, 1, 1, 1)),
    problem((17, 33, 5, 5), (1, 80, 80), (1, 33), 0.5, padding=(2, 2, 2, 2)),
    problem((8, 3, 7, 7), (1, 224, 224), (8, 3), 0.0, padding=(3, 3, 3, 3), stride=(2, 2)),
    problem((32, 3, 16, 16), (1, 64, 64), (8, 3), 0.5, stride=(16, 16)),
    problem((16, 16, 3, 3), (1, 65, 65), (4, 4), 0.5, padding=(18, 18, 18, 18), dilation=(18, 18)),
    problem((16, 16, 3, 3), (1, 90, 90), (4, 4), 0.5, padding=(36, 36, 36, 36), dilation=(36, 36)),
]


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 8), (3, 18), (3, 40), (17, 1), (33, 1), (80, 1), (7, 6)])
def test_panels_of_outputs_may_lie_between_two_rows(instructions: str, kernel: int, dilation: int, dtype: torch.dtype) -> None:
    reads = (kernel - 1) * dilation
    for width, padding in ((1, 0), (13, 0), (30, 0), (40, reads // 2), (65, 3)):
        wide = problem(
            (5, 3, 1, kernel), (2, 4, width + reads - 2 * padding), (4, 2), 0.5, padding=(padding, padding, 0, 0), dilation=(1, dilation)
        )
        with running(instructions):
            assert torch.equal(wide.outcome(dtype), wide.expected.to(dtype)), width


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(len(LARGE)))
def test_large_images_in_any_number_of_threads(instructions: str, index: int, dtype: torch.dtype) -> None:
    big = LARGE[index]
    left, right, top, bottom = big.window.padding
    weight = big.weight * bp.expand(big.mask.keep, big.mask.grid)
    padded = F.pad(big.x.float(), (left, right, top, bottom))
    expected = F.conv2d(padded, weight.float(), big.bias.float(), big.window.stride, dilation=big.window.dilation).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        for threads in (1, 2, 5):
            with running(instructions, threads):
                assert torch.equal(big.outcome(dtype, layout), expected), (layout, threads)


@BUILT
def test_inputs_that_are_views_are_read_as_they_look() -> None:
    base = problem((12, 8, 3, 3), (2, 10, 9), (4, 4), 0.5, padding=(1, 0, 0, 1))
    for x in (
        integers((2, 10, 9, 8), 3).permute(0, 3, 1, 2),
        integers((2, 16, 10, 9), 4)[:, ::2],
        integers((2, 8, 10, 18), 5)[..., 1::2],
        integers((2, 10, 9, 16), 6).permute(0, 3, 1, 2)[:, 3:11],
        integers((2, 9, 10, 8), 7).permute(0, 3, 2, 1),
        integers((1, 8, 1, 1), 8).expand(2, 8, 10, 9),
    ):
        view = attrs.evolve(base, x=x.float())
        sparse, bias = pack_weight(base.weight.float(), base.mask), base.bias.float()
        assert torch.equal(conv2d(view.x, sparse, bias, base.window), view.expected.float())


@BUILT
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_long_convolution_is_computed_in_parts(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 1 << 12, 1 << 14):
        monkeypatch.setattr(spmm, "_MULTIPLICATIONS", step)
        part = problem((12, 8, 3, 3), (3, 21, 19), (4, 4), 0.5, padding=(1, 1, 1, 1))
        assert torch.equal(part.outcome(layout=layout), part.expected.float())


@BUILT
def test_what_it_cannot_compute_it_leaves_to_others() -> None:
    small = problem((4, 4, 1, 1), (1, 3, 3), (2, 2), 0.5)
    sparse, x = pack_weight(small.weight.float(), small.mask), small.x.float()
    compute = partial(spmm.conv2d, crow=sparse.crow, col=sparse.col, shape=sparse.shape, block=sparse.block, window=small.window)
    assert compute(x, sparse.values) is not None
    assert compute(x.double(), sparse.values.double()) is None
    assert compute(x.bfloat16(), sparse.values) is None
    assert compute(x.clone().requires_grad_(), sparse.values) is None
    assert compute(x.to("meta"), sparse.values) is None
    assert compute(x, sparse.values, bias=torch.ones(5)) is None
    with mock.patch.object(spmm, "_library", None):
        assert compute(x, sparse.values) is None
    for code in (1, 2):
        with mock.patch.object(spmm, "_library", mock.Mock(conv2d=lambda *_, code=code: code)):
            assert compute(x, sparse.values) is None
