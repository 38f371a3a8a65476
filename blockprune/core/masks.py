"""Set operations on masks, their sparsity, and a summary table."""

import math
from collections.abc import Callable

import attrs
import torch
from torch import Tensor, nn

from blockprune.core.grid import BlockGrid, block_elements
from blockprune.core.table import Rows, Table
from blockprune.core.types import BlockMask, Masks, Scores, check_masks, check_scores


def union(a: Masks, b: Masks) -> Masks:
    """Masks that keep the blocks that ``a`` or ``b`` keeps.

    A parameter that only one of them has gets that mask.

    Raises:
        ValueError: a parameter has different grids in ``a`` and ``b``.
        TypeError: something else than masks, such as the result of a recipe.

    Example:
        >>> grid = bp.BlockGrid((3,), (1,))
        >>> a = {"w": bp.BlockMask(torch.tensor([True, False, False]), grid)}
        >>> b = {"w": bp.BlockMask(torch.tensor([True, False, True]), grid)}
        >>> bp.union(a, b)["w"].keep
        tensor([ True, False,  True])
    """
    return _combine(a, b, torch.logical_or)


def intersect(a: Masks, b: Masks) -> Masks:
    """Masks that keep the blocks that both ``a`` and ``b`` keep.

    A parameter that only one of them has gets that mask.

    Raises:
        ValueError: a parameter has different grids in ``a`` and ``b``.
        TypeError: something else than masks, such as the result of a recipe.

    Example:
        >>> grid = bp.BlockGrid((3,), (1,))
        >>> a = {"w": bp.BlockMask(torch.tensor([True, False, False]), grid)}
        >>> b = {"w": bp.BlockMask(torch.tensor([True, False, True]), grid)}
        >>> bp.intersect(a, b)["w"].keep
        tensor([ True, False, False])
    """
    return _combine(a, b, torch.logical_and)


def difference(a: Masks, b: Masks) -> Masks:
    """Masks that keep the blocks that ``a`` keeps and ``b`` prunes, for the parameters of ``a``.

    A parameter that ``b`` does not have counts as kept by ``b``.

    Raises:
        ValueError: a parameter has different grids in ``a`` and ``b``.
        TypeError: something else than masks, such as the result of a recipe.

    Example:
        >>> grid = bp.BlockGrid((3,), (1,))
        >>> a = {"w": bp.BlockMask(torch.tensor([True, True, False]), grid)}
        >>> b = {"w": bp.BlockMask(torch.tensor([True, False, True]), grid)}
        >>> bp.difference(a, b)["w"].keep
        tensor([False,  True, False])
    """
    check_masks(a, "a")
    check_masks(b, "b")
    kept_by_b = {**all_kept(a), **{name: b[name] for name in a if name in b}}
    return _combine(a, kept_by_b, lambda keep_a, keep_b: keep_a & ~keep_b)


def agreement(a: Masks, b: Masks) -> float:
    """The fraction of elements, 0 to 1, that both masks keep or both masks prune, over all parameters that ``a`` or ``b`` has.

    A parameter that one of them does not have counts as kept by it.

    Raises:
        ValueError: a parameter has different grids in ``a`` and ``b``.
        TypeError: something else than masks, such as the result of a recipe.

    Example:
        >>> grid = bp.BlockGrid((4,), (1,))
        >>> a = {"w": bp.BlockMask(torch.tensor([True, False, False, True]), grid)}
        >>> b = {"w": bp.BlockMask(torch.tensor([True, False, True, True]), grid)}
        >>> bp.agreement(a, b)
        0.75
    """
    check_masks(a, "a")
    check_masks(b, "b")
    kept = all_kept({**a, **b})
    return 1 - sparsity(_combine({**kept, **a}, {**kept, **b}, torch.eq))


def restrict(scores: Scores, masks: Masks) -> Scores:
    """Set the scores of the blocks that the masks prune to -inf, so that they stay pruned at any sparsity (NNI's ``continuous_mask``).

    Raises:
        ValueError: a parameter has different grids in ``scores`` and ``masks``.
        KeyError: a parameter with a mask has no scores.
        TypeError: something else than scores and masks, such as the result of a recipe; scores that are not floating point.

    Example:
        >>> grid = bp.BlockGrid((3,), (1,))
        >>> scores = {"w": bp.BlockScore(torch.tensor([5.0, 1.0, 2.0]), grid)}
        >>> bp.restrict(scores, {"w": bp.BlockMask(torch.tensor([False, True, True]), grid)})["w"].value
        tensor([-inf, 1., 2.])
    """
    check_scores(scores)
    check_masks(masks)
    restricted = {name: score.value.clone() for name, score in scores.items()}
    for name, mask in masks.items():
        if name not in scores:
            raise KeyError(f"masks has the parameter {name!r}, which has no scores; there are scores of {', '.join(map(repr, scores))}")
        _check_same_grid(name, scores[name].grid, mask.grid)
        if not restricted[name].is_floating_point():
            raise TypeError(
                f"{name}: scores {tuple(restricted[name].shape)} are {restricted[name].dtype} and cannot hold -inf; give floating-point "
                "numbers, such as score.value.float()"
            )
        restricted[name].masked_fill_(~mask.keep.to(restricted[name].device), -math.inf)
    return {name: attrs.evolve(score, value=restricted[name]) for name, score in scores.items()}


def sparsity(masks: Masks) -> float:
    """The fraction of the masked parameters' elements that is pruned; 0 if there are no masks.

    Raises:
        TypeError: something else than masks, such as the result of a recipe.

    Example:
        >>> bp.sparsity({"w": bp.BlockMask(torch.tensor([True, False, False, False]), bp.BlockGrid((4,), (1,)))})
        0.75
    """
    check_masks(masks)
    total = sum(mask.grid.elements for mask in masks.values())
    return 1 - sum(map(_elements_kept, masks.values())) / total if total else 0.0


def _elements_kept(mask: BlockMask) -> int:
    if not mask.grid.ragged:
        return int(mask.keep.sum()) * math.prod(mask.grid.block)
    return int(block_elements(mask.grid, device=mask.keep.device)[mask.keep].sum())


@attrs.frozen
class SummaryRow:
    """The counts of one parameter, or the totals; ``bytes`` is the size of the mask in a file."""

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
    """A table of masks; it prints as text and renders as HTML in a notebook."""

    rows: tuple[SummaryRow, ...]
    total: SummaryRow

    TEXT_COLUMNS = 3
    HAS_TOTAL = True

    def table(self) -> Rows:
        """Rows of cells; the first row is the header."""
        header = ("parameter", "shape", "block", "blocks", "blocks kept", "elements", "elements kept", "sparsity", "mask bytes")
        return [header, *(row.cells for row in self.rows), self.total.cells]


def summary(masks: Masks) -> Summary:
    """A table of each parameter's shape, block, numbers of blocks and elements, sparsity and mask size, and of their totals.

    The totals are those of the masked parameters. ``export.count_model(model, inputs=batch)`` counts the parameters and multiply-adds of
    the whole model, dense and kept.

    Raises:
        TypeError: something else than masks, such as a model or the result of a recipe.

    Example:
        >>> bp.summary({"w": bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((4, 8), (4, 4)))})
        parameter  shape  block  blocks  blocks kept  elements  elements kept  sparsity  mask bytes
        -------------------------------------------------------------------------------------------
        w          4x8    4x4         2            1        32             16     50.0%           1
        -------------------------------------------------------------------------------------------
        total                         2            1        32             16     50.0%           1
    """
    if isinstance(masks, nn.Module):
        check_masks(masks, remedy="give bp.read_masks(model), or count the whole model: blockprune.export.count_model(model)")
    check_masks(masks)
    rows = tuple(_summary_row(name, mask) for name, mask in masks.items())
    totals = [sum(getattr(row, field) for row in rows) for field in ("blocks", "kept", "elements", "elements_kept", "bytes")]
    return Summary(rows, SummaryRow("total", "", "", *totals))


def _summary_row(name: str, mask: BlockMask) -> SummaryRow:
    grid = mask.grid
    shape, block = ("x".join(map(str, sizes)) for sizes in (grid.shape, grid.block))
    return SummaryRow(
        name, shape, block, grid.blocks, int(mask.keep.sum()), grid.elements, _elements_kept(mask), bytes=math.ceil(grid.blocks / 8)
    )


def _combine(a: Masks, b: Masks, operation: Callable[[Tensor, Tensor], Tensor]) -> dict[str, BlockMask]:
    """The operation on the masks of each parameter; a parameter that only one of them has gets a copy of its mask."""
    check_masks(a, "a")
    check_masks(b, "b")
    combined = {}
    for name in dict.fromkeys((*a, *b)):
        if name in a and name in b:
            _check_same_grid(name, a[name].grid, b[name].grid)
            keep = operation(a[name].keep, b[name].keep.to(a[name].keep.device))
        else:
            keep = (a[name] if name in a else b[name]).keep.clone()
        combined[name] = BlockMask(keep, (a[name] if name in a else b[name]).grid)
    return combined


def all_kept(masks: Masks) -> dict[str, BlockMask]:
    """Masks of the same blocks that prune none.

    Example:
        >>> from blockprune.core.masks import all_kept
        >>> all_kept({"w": bp.BlockMask(torch.tensor([True, False]), bp.BlockGrid((4,), (2,)))})["w"].keep
        tensor([True, True])
    """
    return {name: attrs.evolve(mask, keep=torch.ones_like(mask.keep)) for name, mask in masks.items()}


def _check_same_grid(name: str, a: BlockGrid, b: BlockGrid) -> None:
    if a != b:
        raise ValueError(f"{name} has different blocks in the two arguments, {a} and {b}; make both with one `where`")
