"""Weights of every kind of layer with the Gram matrix of their inputs, for the tests of Hessians, scores and repairs."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import reference
import torch
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import Tensor, nn

import blockprune as bp
from blockprune import collect, native, statistics
from blockprune.core.types import Data, Param
from blockprune.statistics import Statistic

GRAM = statistics.input_gram
EITHER = pytest.mark.parametrize("compiled", [True, False], ids=["native", "torch"])


@contextlib.contextmanager
def loops(compiled: bool) -> Iterator[None]:
    """Use the compiled loop, or behave as if it were not built."""
    if compiled and native._library is None:
        pytest.skip(native.status)
    with mock.patch.object(native, "_library", native._library if compiled else None):
        yield


def close(result: Any, expected: Any, rtol: float = 1e-7, atol: float = 1e-9) -> None:
    torch.testing.assert_close(torch.as_tensor(result).double(), torch.as_tensor(expected).double(), rtol=rtol, atol=atol)


def param(weight: Tensor, x: Tensor, block: Any, **stats: Tensor) -> Param:
    """The weight of a Linear with the Gram matrix of its inputs x."""
    return Param(weight, bp.BlockGrid(weight.shape, block), {"input_gram": (x.mT @ x / len(x))[None], **stats})


@st.composite
def linears(draw: st.DrawFn, *, side: int = 6) -> Param:
    """Any shape and block, ragged along both axes; correlated, duplicated or dead inputs, and weights with ties."""
    rows, k, seed = draw(st.integers(1, 5)), draw(st.integers(1, side)), draw(seeds)
    block = (draw(st.integers(1, rows)), draw(st.integers(1, k)))
    weight, x = normal((rows, k), seed), normal((3 * k, k), seed + 1) @ (torch.eye(k).double() + normal((k, k), seed + 2) / 2)
    kind = draw(st.sampled_from(["plain", "plain", "constant", "dead", "twice"]))
    if kind == "constant":
        weight, x = torch.ones_like(weight), normal((3 * k, 1), seed) * torch.ones(k).double() + normal((3 * k, k), seed)
    if kind == "dead" and k > 1:
        x[:, :: draw(st.integers(2, 3))] = 0
        x[:, 1] += 1
    if kind == "twice":
        x[:, -1] = x[:, 0]
        weight[:, -1] = weight[:, 0]
    return param(weight, x, block)


# By kind of layer: how to make one, the shape of its input, blocks.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[int, ...]]]] = {
    "linear": (lambda: nn.Linear(7, 5), (30, 7), [(2, 3), (1, 1), (1,), (-1, 1), (5, 2), (3, 7), (1, 4)]),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (4, 3, 9), [(2, 1), (3, 2), (1, 1, 1), (1,), (2, 3, 2), (4, 2, 1)]),
    "conv2d": (lambda: nn.Conv2d(2, 5, (2, 3), stride=2), (6, 2, 7, 9), [(2, 1), (1, 2, 1), (2, 2, 2, 2), (5, 1, 1, 2), (1, 1, 1, 1)]),
    "grouped": (lambda: nn.Conv2d(4, 6, 2, groups=2), (6, 4, 5, 4), [(3, 1), (1, 2, 1), (3, 2, 2, 1), (1, 1, 1, 1), (1,)]),
    "depthwise": (lambda: nn.Conv1d(3, 6, 4, groups=3), (4, 3, 9), [(1, 1, 1), (2, 1, 3), (1, 1, 2)]),
    "in_proj": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (4, 7, 4), [(4, 2), (2, 3), (1, 1), (2,)]),
}
EVERY = pytest.mark.parametrize(("kind", "block"), [(kind, block) for kind, (_, _, blocks) in KINDS.items() for block in blocks])


class SelfAttention(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x + 1, x.square())[0]


def made(kind: str) -> tuple[nn.Module, Tensor]:
    make, shape, _ = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layer = make().double()
    x = normal(shape, 0)
    x = x + 0.5 * x.roll(1, -1) + 0.3  # correlated, with a mean
    return (SelfAttention(layer) if kind == "in_proj" else layer), x


def collected(kind: str, block: tuple[int, ...], *stats: Statistic) -> tuple[nn.Module, Tensor, str, Data]:
    model, x = made(kind)
    name = "attention.in_proj_weight" if kind == "in_proj" else "weight"
    rule = bp.named(name, block)
    return model, x, name, collect.with_statistics(model, where=rule, statistics=stats or (GRAM,), batches=[x[:2], x[2:]])


def gains(p: Param, bands: list[reference.Band]) -> list[Tensor | None]:
    """The matrix that weighs the output errors of each band, from output_grad_gram or output_grad_sq; None without one."""
    if "output_grad_gram" in p.stats:
        grams = p.stats["output_grad_gram"].double()
        return [g[: band.at.stop - band.at.start, : band.at.stop - band.at.start] for g, band in zip(grams, bands, strict=True)]
    if "output_grad_sq" in p.stats:
        return [p.stats["output_grad_sq"].double().flatten()[band.at].diag() for band in bands]
    return [None] * len(bands)


def check_removals(p: Param, score: bp.BlockScore, damping: float, rtol: float = 1e-6, steps: int | None = None) -> None:
    """In the order of the scores each removal raises the error least, and its score is that rise per element (the maximum so far)."""
    hessians, elements = reference.hessians(p, damping), reference.block_elements(p.grid).flatten(1).double()
    bands = reference.bands(p)
    assert score.grid == p.grid
    for i, (band, gain) in enumerate(zip(bands, gains(p, bands), strict=True)):
        rows, hessian = p.weight.double().flatten(1)[band.at], hessians[band.group]
        row_scores = score.value.flatten(1)[i]
        order = row_scores.argsort().tolist()
        assert len(set(row_scores.tolist())) == len(order), "scores of a band are all different"
        scale = reference.error_of(rows, torch.zeros_like(rows), hessian, gain)
        pruned: list[int] = []
        before, highest = 0.0, 0.0
        for j in order[:steps]:
            errors = reference.removals(rows, hessian, band.blocks, pruned, gain)
            assert errors[j] <= min(errors) + rtol * scale + 1e-12
            highest = max(highest, (errors[j] - before) / float(elements[i, j]))
            close(row_scores[j], highest, rtol=rtol, atol=rtol * scale + 1e-12)
            pruned.append(j)
            before = errors[j]


def underdetermined(n: int, k: int, seed: int, dtype: torch.dtype, block: Any = (2, 2)) -> Param:
    """Fewer samples than inputs."""
    x = normal((n, k), seed).to(dtype)
    return param(normal((4, k), seed + 1).to(dtype), x, block)


def in_turns(ranks: int) -> Any:
    """What `distributed.share` does on this many ranks, one after the other; some may have nothing to solve."""

    def share(count: int, solve: Callable[[slice], Sequence[Tensor]]) -> Sequence[Tensor]:
        parts = [(own, solve(own)) for own in (slice(rank, None, ranks) for rank in range(ranks))]
        solutions = [part.new_zeros(count, *part.shape[1:]) for part in parts[0][1]]
        for own, solved in parts:
            for solution, part in zip(solutions, solved, strict=True):
                solution[own] = part
        return solutions

    return share
