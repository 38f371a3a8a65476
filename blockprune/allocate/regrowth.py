"""Dynamic sparsity: masks of the same sparsity, in which the worst kept blocks are exchanged for the best pruned ones."""

import math
from collections.abc import Mapping

import attrs
from torch import Tensor

from blockprune.allocate.ranking import prune_lowest
from blockprune.core.arguments import check_fraction
from blockprune.core.grid import block_elements
from blockprune.core.patterns import resolve_by_name, suggest
from blockprune.core.precision import at_least_float32
from blockprune.core.types import BlockMask, BlockScore, Masks, Scores, Sparsity, check_masks, check_scores


def regrow(masks: Masks, *, drop: Scores, grow: Scores, fraction: Sparsity, sparsity: Sparsity | None = None) -> Masks:
    """Masks of the same sparsity, in which the kept blocks that ``drop`` scores lowest make room for the pruned blocks that ``grow`` scores
    highest.

    Each parameter keeps its number of elements. Blocks with equal scores are taken in the order of their positions. A block that this call
    drops is not one that it grows, so the masks differ by ``fraction`` of the kept elements. (RigL lets dropped blocks compete for growth.)

    Three published rules differ in ``grow`` and in the masks that gradients pass:

    * SET (Mocanu et al. 1707.04780, algorithm 1): ``drop=metric.l1(weights)``, ``grow=metric.random(weights)``.
    * RigL (Evci et al. 1911.11134, algorithm 1): ``grow=metric.gradient_magnitude(collect.gradients(model, where=...))``, with
      ``fraction`` from `schedule.cosine`.
    * Top-KAST (Jayakumar et al. 2106.03517, section 2) needs no exchange: ``apply_masks(model, prune(model, 0.9),
      straight_through=prune(model, 0.8))`` lets gradients reach a superset of the kept blocks.

    With `zero_new_blocks` blocks come back as zeros, and `reset_state` clears what the optimizer remembers of them.

    Parameters are exchanged one by one, so that those that share a mask (``coupled=`` of the allocators) would no longer share it: give one
    of them, with the sum of their scores, and its new ``keep`` to the others, ``BlockMask(keep, grid)``.

    Args:
        masks: the present masks, such as ``bp.read_masks(model)``.
        drop: a score for each block; the kept blocks with the lowest scores are pruned. Scores of pruned blocks are not used.
        grow: a score for each block; the pruned blocks with the highest scores are kept. Scores of kept blocks are not used. A pruned block
            with the score -inf stays pruned, so `restrict` limits where blocks may grow.
        fraction: the share of the kept elements to exchange, 0 to 1; or a mapping by parameter name or pattern. Less is exchanged where
            fewer elements are pruned.
        sparsity: the sparsity of the new masks, as in `allocate.per_layer`; None keeps the number of kept elements of each parameter. With
            a rising sparsity this is GraNet (Liu et al. 2106.10404). If blocks differ in size (ragged ones), an exchange can change the
            number of kept elements by up to half a block. Passing a fixed sparsity keeps these changes from adding up over many calls.

    Raises:
        ValueError: a fraction or sparsity outside [0, 1], NaN scores, or scores with different blocks than the mask.
        TypeError: a fraction that is neither a number nor a mapping; scores that are not floating point; something else than masks
            and scores, such as the result of a recipe or a metric.
        KeyError: a parameter that has a mask, but no scores; or scores, but no mask.

    Example:
        >>> grid = bp.BlockGrid((4,), (1,))
        >>> masks = {"w": bp.BlockMask(torch.tensor([True, True, False, False]), grid)}
        >>> drop, grow = ({"w": bp.BlockScore(torch.tensor(x), grid)} for x in ([2.0, 1.0, 9.0, 9.0], [9.0, 9.0, 1.0, 2.0]))
        >>> bp.regrow(masks, drop=drop, grow=grow, fraction=0.5)["w"].keep
        tensor([ True, False, False,  True])
    """
    check_masks(masks)
    _check_scores(masks, drop, "drop")
    _check_scores(masks, grow, "grow")
    fractions = _by_parameter(masks, fraction, "fraction")
    sparsities = None if sparsity is None else _by_parameter(masks, sparsity, "sparsity")
    return {
        name: _exchanged(mask, drop[name], grow[name], fractions[name], None if sparsities is None else sparsities[name])
        for name, mask in masks.items()
    }


def _exchanged(mask: BlockMask, drop: BlockScore, grow: BlockScore, fraction: float, sparsity: float | None) -> BlockMask:
    keep = mask.keep.flatten()
    elements = block_elements(mask.grid, device=keep.device).flatten()
    growing = -_ranked(grow, keep)  # ascending, so that the highest score comes first
    kept, candidates = keep.nonzero()[:, 0], (~keep & (growing != math.inf)).nonzero()[:, 0]
    present, available = int(elements[kept].sum()), int(elements[candidates].sum())
    wanted = present if sparsity is None else (1 - sparsity) * mask.grid.elements
    surplus = max(0.0, present - wanted)
    score, sizes = _ranked(drop, keep)[kept], elements[kept]
    # three first parts of one order: the surplus, what is asked for, and no more than what can grow back
    dropped = prune_lowest(score, sizes, fraction * present + surplus)
    dropped &= prune_lowest(score, sizes, max(0.0, available + present - wanted), round_down=True)
    dropped |= prune_lowest(score, sizes, surplus)
    missing = wanted - (present - int(sizes[dropped].sum()))
    grown = prune_lowest(growing[candidates], elements[candidates], missing)
    new = keep.clone()
    new[kept[dropped]] = False
    new[candidates[grown]] = True
    return attrs.evolve(mask, keep=new.view(mask.grid.size))


def _ranked(score: BlockScore, keep: Tensor) -> Tensor:
    """The scores ``[blocks]`` on the device of the mask, in a type that `prune_lowest` can rank."""
    return at_least_float32(score.value.detach().flatten().to(keep.device))


def _by_parameter(masks: Masks, values: Sparsity, what: str) -> dict[str, float]:
    """The fraction or sparsity of each parameter."""
    if not isinstance(values, Mapping):
        return dict.fromkeys(masks, check_fraction(what, values))
    return resolve_by_name({key: check_fraction(f"{what}[{key!r}]", value) for key, value in values.items()}, masks, what=what)


def _check_scores(masks: Masks, scores: Scores, what: str) -> None:
    """Raise unless there is one rankable score for each block of each mask, and no other."""
    check_scores(scores, what)
    for name in masks:
        if name not in scores:
            raise KeyError(f"{what} has no scores of {name!r}, which has a mask{suggest(name, scores)}; collect them with the same `where`")
    for name, score in scores.items():
        if name not in masks:
            raise KeyError(f"{what} has scores of {name!r}, which has no mask{suggest(name, masks)}; collect them with the same `where`")
        if score.grid != masks[name].grid:
            raise ValueError(f"{name}: {what} has scores of {score.grid}, but the mask has {masks[name].grid}; use one `where` for both")
        if not score.value.is_floating_point():
            raise TypeError(f"{name}: the {what} scores {tuple(score.value.shape)} are {score.value.dtype}; they must be floating point")
        if bad := int(score.value.isnan().sum()):
            raise ValueError(f"{name}: {bad} of the {what} scores {tuple(score.value.shape)} are NaN and cannot be ranked")
