"""Masks are values: combine, compare and measure them."""

import math
from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from blockprune.blocks import BlockGrid, block_elements
from blockprune.tables import Rows, Table
from blockprune.types import BlockMask, Masks, Scores


def union(a: Masks, b: Masks) -> Masks:
    """Blocks kept by either; a parameter in one of them only keeps that mask.

    Raises:
        ValueError: a parameter whose grids differ.

    Example:
        >>> bp.union(_pair([1, 0, 0]), _pair([1, 0, 1]))["w"].keep
        tensor([ True, False,  True])
    """
    return _combine(a, b, torch.logical_or)


def intersect(a: Masks, b: Masks) -> Masks:
    """Blocks kept by both; a parameter in one of them only keeps that mask.

    Raises:
        ValueError: a parameter whose grids differ.

    Example:
        >>> bp.intersect(_pair([1, 0, 0]), _pair([1, 0, 1]))["w"].keep
        tensor([ True, False, False])
    """
    return _combine(a, b, torch.logical_and)


def difference(a: Masks, b: Masks) -> Masks:
    """Blocks kept by ``a`` and pruned by ``b``, for the parameters of ``a``; what ``b`` does not name it keeps.

    Raises:
        ValueError: a parameter whose grids differ.

    Example:
        >>> bp.difference(_pair([1, 1, 0]), _pair([1, 0, 1]))["w"].keep
        tensor([False,  True, False])
    """
    both = _combine({name: mask for name, mask in a.items() if name in b}, {n: m for n, m in b.items() if n in a}, lambda x, y: x & ~y)
    return {name: both.get(name, attrs.evolve(mask, keep=torch.zeros_like(mask.keep))) for name, mask in a.items()}


def agreement(a: Masks, b: Masks) -> float:
    """Fraction of elements that both masks keep or both prune, 0 to 1; over the parameters of either (unnamed = kept).

    Raises:
        ValueError: a parameter whose grids differ.

    Example:
        >>> bp.agreement(_pair([1, 0, 0, 1]), _pair([1, 0, 1, 1]))
        0.75
    """
    one, two = ({**_ones(other), **this} for this, other in ((a, b), (b, a)))
    same = _combine(one, two, torch.eq)
    return 1 - sparsity(same)


def restrict(scores: Scores, masks: Masks) -> Scores:
    """Scores in which a block that the masks prune is -inf: it stays pruned at any sparsity (NNI's ``continuous_mask``).

    Raises:
        ValueError: a parameter whose grids differ.
        KeyError: masks for a parameter without scores.

    Example:
        >>> scores = {"w": bp.BlockScore(torch.tensor([5.0, 1.0, 2.0]), bp.BlockGrid((3,), (1,)))}
        >>> bp.restrict(scores, _pair([0, 1, 1]))["w"].value
        tensor([-inf, 1., 2.])
    """
    for name, mask in masks.items():
        if name not in scores:
            raise KeyError(f"masks name {name!r}, which has no scores; the scores are of {', '.join(map(repr, scores))}")
        _same_grid(name, scores[name].grid, mask.grid)
    return {
        name: attrs.evolve(
            s, value=torch.where(masks[name].keep.to(s.value.device), s.value, -math.inf) if name in masks else s.value.clone()
        )
        for name, s in scores.items()
    }


def sparsity(masks: Masks) -> float:
    """Fraction of the masked parameters' elements that are pruned; 0 for no masks.

    Example:
        >>> bp.sparsity(_pair([1, 0, 0, 0]))
        0.75
    """
    total = sum(mask.grid.elements for mask in masks.values())
    return 1 - sum(map(_kept, masks.values())) / total if total else 0.0


def _kept(mask: BlockMask) -> int:
    """Elements that a mask keeps."""
    if not mask.grid.ragged:
        return int(mask.keep.sum()) * math.prod(mask.grid.block)
    return int(block_elements(mask.grid, device=mask.keep.device)[mask.keep].sum())


@attrs.frozen
class Row:
    """One line of a `Summary`: counts are of blocks and elements, ``bytes`` of the saved mask."""

    name: str
    shape: str
    block: str
    blocks: int
    kept: int
    elements: int
    elements_kept: int
    bytes: int

    @property
    def sparsity(self) -> float:
        return 1 - self.elements_kept / self.elements if self.elements else 0.0

    @property
    def cells(self) -> tuple[str, ...]:
        counts = f"{self.blocks:,}", f"{self.kept:,}", f"{self.elements:,}", f"{self.elements_kept:,}"
        return self.name, self.shape, self.block, *counts, f"{self.sparsity:.1%}", f"{self.bytes:,}"


@attrs.frozen(repr=False)
class Summary(Table):
    """A table of masks; prints in a terminal, renders in a notebook."""

    rows: tuple[Row, ...]
    total: Row

    LEFT = 3
    TOTAL = True

    def table(self) -> Rows:
        """The cells, the head first."""
        head = ("parameter", "shape", "block", "blocks", "blocks kept", "elements", "elements kept", "sparsity", "mask bytes")
        return [head, *(row.cells for row in self.rows), self.total.cells]


def summary(masks: Masks) -> Summary:
    """Per parameter and in all: shape, block, blocks, blocks kept, elements, elements kept, sparsity, bytes of the saved mask.

    Example:
        >>> bp.summary({"w": bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((4, 8), (4, 4)))})
        parameter  shape  block  blocks  blocks kept  elements  elements kept  sparsity  mask bytes
        -------------------------------------------------------------------------------------------
        w          4x8    4x4         2            1        32             16     50.0%           1
        -------------------------------------------------------------------------------------------
        total                         2            1        32             16     50.0%           1
    """
    rows = tuple(
        Row(name, _by(m.grid.shape), _by(m.grid.block), m.grid.blocks, int(m.keep.sum()), m.grid.elements, _kept(m), -(-m.grid.blocks // 8))
        for name, m in masks.items()
    )
    sums = [sum(getattr(row, field) for row in rows) for field in ("blocks", "kept", "elements", "elements_kept", "bytes")]
    return Summary(rows, Row("total", "", "", *sums))


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _combine(a: Masks, b: Masks, rule: Callable[[Tensor, Tensor], Tensor]) -> dict[str, BlockMask]:
    for name in a.keys() & b.keys():
        _same_grid(name, a[name].grid, b[name].grid)
    return {
        name: BlockMask(rule(a[name].keep, b[name].keep.to(a[name].keep.device)), a[name].grid)
        if name in a and name in b
        else _copy(a[name] if name in a else b[name])
        for name in dict.fromkeys((*a, *b))
    }


def _copy(mask: BlockMask) -> BlockMask:
    return attrs.evolve(mask, keep=mask.keep.clone())


def _same_grid(name: str, one: BlockGrid, two: BlockGrid) -> None:
    if one != two:
        raise ValueError(f"{name}: the two sides have different blocks, {one} and {two}; make both with one `where`")


def _ones(masks: Masks) -> Masks:
    return {name: attrs.evolve(mask, keep=torch.ones_like(mask.keep)) for name, mask in masks.items()}


def _pair(keep: list[int]) -> Masks:
    """For the examples above: one parameter 'w' of blocks of one element."""
    return {"w": BlockMask(torch.tensor(keep).bool(), BlockGrid((len(keep),), (1,)))}
