"""Parameters that share one mask, or one hidden axis: their scores are joined before allocation, and each gets its mask after it."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from blockprune.core.grid import block_elements
from blockprune.core.patterns import matches, suggest
from blockprune.core.types import BlockMask, BlockScore, Masks, Scores, check_scores
from blockprune.core.unit_permutation import UnitPermutation

# sets of parameter names or patterns, of which the parameters share one mask; or hidden axes, whose units are pruned in all their tensors
Coupled = Iterable[Iterable[str] | UnitPermutation]


@attrs.frozen(eq=False)
class SharedMask:
    """The parameters that share one mask: those of a coupled set or of a hidden axis, or else a single parameter."""

    names: tuple[str, ...]
    score: Tensor  # [*size] summed over the parameters, in the shape of the first one's blocks; of an axis [parts], see `_axis_mask`
    elements: Tensor  # [*size] that all parameters together lose with a block
    parameter_elements: tuple[int, ...]  # of each parameter
    axis: UnitPermutation | None = None
    tensor_axes: tuple[int, ...] = ()  # of each parameter, the one that is the hidden axis

    @property
    def total(self) -> int:
        """The elements of all parameters."""
        return sum(self.parameter_elements)

    def sparsity(self, sparsities: Mapping[str, float]) -> float:
        """The mean of the parameters' sparsities, weighted by their elements."""
        return sum(sparsities[name] * n for name, n in zip(self.names, self.parameter_elements, strict=True)) / self.total


def shared_masks(scores: Scores, coupled: Coupled) -> list[SharedMask]:
    """The masks that the parameters need, each with its parameters, in the order of their first ones; those of hidden axes come first.

    Raises:
        TypeError: scores that are not floating point or of 8 bits, a coupled set that is a string.
        ValueError: NaN scores, a parameter in two sets, parameters of a set with different numbers of blocks, an axis whose units cannot
            be removed, two axes that share an axis of a parameter, blocks that join units.
        KeyError: a name or pattern that matches no parameter, axes of which no parameter has scores.
    """
    check_scores(scores)
    for name, score in scores.items():
        if not score.value.is_floating_point():
            raise TypeError(f"{name}: scores {tuple(score.value.shape)} are {score.value.dtype}; they must be floating point")
        if score.value.amin().isnan():
            raise ValueError(
                f"{name}: {int(score.value.isnan().sum())} of the scores {tuple(score.value.shape)} are NaN and cannot be ranked; "
                "check the metric"
            )
    if isinstance(coupled, (str, Tensor)) or not isinstance(coupled, Iterable):
        raise TypeError(f"coupled={coupled!r} must be a list of hidden axes, as bp.find_axes returns, or of sets of parameter names")
    coupled = list(coupled)
    of_axes = _masks_of_axes(scores, [axis for axis in coupled if isinstance(axis, UnitPermutation)])
    on_axes = {name for shared in of_axes for name in shared.names}
    sets = [names for names in coupled if not isinstance(names, UnitPermutation)]
    others = _coupled_names(scores, sets)
    for names in others:
        if len(names) > 1 and (both := on_axes.intersection(names)):
            raise ValueError(
                f"coupled has {min(both)!r} in a set and on a hidden axis, but a parameter has one mask; leave one of them out"
            )
    return [*of_axes, *(_shared_mask(scores, names) for names in others if not on_axes.intersection(names))]


def _masks_of_axes(scores: Scores, axes: Sequence[UnitPermutation]) -> list[SharedMask]:
    """The mask of each hidden axis, of those that have scores."""
    masks: list[SharedMask] = []
    taken: set[tuple[str, int]] = set()
    for axis in axes:
        names = [name for name in dict.fromkeys((*axis.rows, *axis.columns, *axis.last)) if name in scores]
        places = [(name, tensor_axis) for name in names for tensor_axis in axis.tensor_axes(name, len(scores[name].grid.shape))]
        if places and not axis.removable:
            raise ValueError(
                f"coupled has the hidden axis of {names[0]}, of {len(axis.order)} units that a norm or a softmax joins: without some of "
                "them the others change; leave it out: coupled=[axis for axis in axes if axis.removable]"
            )
        if both := taken.intersection(places):
            name, tensor_axis = min(both)
            raise ValueError(
                f"{name}: {scores[name].grid.shape} is on two hidden axes along its axis {tensor_axis}; leave one out of coupled"
            )
        taken.update(places)
        if places:
            masks.append(_axis_mask(scores, axis, places))
    if axes and not masks:
        first = (*axes[0].rows, *axes[0].columns, *axes[0].last)
        raise KeyError(
            f"coupled has hidden axes, but none of their parameters has scores, such as {first[:3]}; collect where=bp.units(axes)"
        )
    return masks


def _axis_mask(scores: Scores, axis: UnitPermutation, places: Sequence[tuple[str, int]]) -> SharedMask:
    """The mask of a hidden axis: the score of a part is the mean over its elements in all parameters, without blocks pruned already."""
    dtype = functools.reduce(torch.promote_types, (scores[name].value.dtype for name, _ in places), torch.float32)
    total = torch.zeros(axis.parts, dtype=dtype, device=scores[places[0][0]].value.device)
    counted, elements = torch.zeros_like(total, dtype=torch.int64), torch.zeros_like(total, dtype=torch.int64)
    for name, tensor_axis in places:
        value = scores[name].value.to(total)
        in_block = block_elements(scores[name].grid, device=total.device)
        is_left = value != -math.inf
        parts = _part_of_block(axis, name, scores[name], tensor_axis).to(total.device)
        for summed, x in ((total, torch.where(is_left, value, 0) * in_block), (counted, is_left * in_block), (elements, in_block)):
            summed.index_add_(0, parts, x.movedim(tensor_axis, 0).flatten(1).sum(1) if x.ndim > 1 else x.contiguous())
    mean = torch.where(counted > 0, total / counted.clamp_min(1), -math.inf)
    names, tensor_axes = zip(*places, strict=True)
    return SharedMask(names, mean, elements, tuple(scores[name].grid.elements for name in names), axis, tensor_axes)


def _part_of_block(axis: UnitPermutation, name: str, score: BlockScore, tensor_axis: int) -> Tensor:
    """The part of a hidden axis to which each block along one axis of a parameter belongs: int64 ``[blocks along the axis]``."""
    length, block = score.grid.shape[tensor_axis], score.grid.block[tensor_axis]
    run = axis.run_length(name, length)
    if run % block:
        raise ValueError(
            f"{name}: blocks of {score.grid.block} in {score.grid.shape} join units of a hidden axis, of which each has {run} consecutive "
            f"entries along axis {tensor_axis}; choose the blocks with where=bp.units(axes)"
        )
    return torch.arange(0, length, block, device="cpu") // run % axis.parts


def _coupled_names(scores: Scores, coupled: Iterable[Iterable[str]]) -> list[tuple[str, ...]]:
    """The parameter names of each mask."""
    names_of: dict[str, tuple[str, ...]] = {name: (name,) for name in scores}
    position = {name: number for number, name in enumerate(scores)}
    for names_or_patterns in coupled:
        if not isinstance(names_or_patterns, Iterable):
            raise TypeError(f"coupled holds {names_or_patterns!r}; give hidden axes, as bp.find_axes returns, or sets of parameter names")
        if isinstance(names_or_patterns, str):
            raise TypeError(
                f"coupled must hold sets of names, but {names_or_patterns!r} is a single name; write coupled=[({names_or_patterns!r}, ...)]"
            )
        patterns = tuple(names_or_patterns)
        matched: dict[str, None] = {}
        for pattern in patterns:
            new = [pattern] if pattern in names_of else [name for name in scores if matches(pattern, name)]
            if not new:
                raise KeyError(f"coupled has {pattern!r}, which matches no parameter{suggest(str(pattern), scores)}")
            matched |= dict.fromkeys(new)
        names = tuple(sorted(matched, key=position.__getitem__))
        for name in names:
            if len(names_of[name]) > 1:
                raise ValueError(f"coupled has {name!r} in two sets, but a parameter has one mask; merge the sets")
            names_of[name] = names
    return list(dict.fromkeys(names_of.values()))


def _shared_mask(scores: Scores, names: tuple[str, ...]) -> SharedMask:
    first, *rest = (scores[name] for name in names)
    dtype = functools.reduce(torch.promote_types, (scores[name].value.dtype for name in names), torch.float32)
    total = first.value.to(dtype)
    elements = block_elements(first.grid, device=total.device)
    for name, score in zip(names[1:], rest, strict=True):
        if _divided_axes(score.grid.size) != _divided_axes(first.grid.size):
            raise ValueError(
                f"coupled parameters share one mask, but {names[0]} has {first.grid.size} blocks and {name} {score.grid.size}; "
                "choose blocks so that they agree"
            )
        value = score.value.to(total).reshape(total.shape)
        total = torch.where((total == -math.inf) | (value == -math.inf), -math.inf, total + value)  # a block pruned in one is pruned in all
        elements = elements + block_elements(score.grid, device=total.device).reshape(total.shape)
    return SharedMask(names, total, elements, tuple(scores[name].grid.elements for name in names))


def _divided_axes(size: Sequence[int]) -> tuple[int, ...]:
    """The numbers of blocks along the axes that have several: the rows of one layer can share a mask with the columns of another."""
    return tuple(n for n in size if n > 1)


def masks_of(scores: Scores, keep: Mapping[SharedMask, Tensor]) -> Masks:
    """The mask of each parameter, from the blocks to keep of each shared mask; blocks with a score of -inf are pruned in any case."""
    keep_of: dict[str, Tensor] = {}
    for shared, blocks in keep.items():
        if shared.axis is None:
            keep_of |= {name: _without_pruned(shared, blocks).reshape(scores[name].grid.size) for name in shared.names}
            continue
        for name, tensor_axis in zip(shared.names, shared.tensor_axes, strict=True):
            score = scores[name]
            along = blocks[_part_of_block(shared.axis, name, score, tensor_axis).to(blocks.device)].to(score.value.device)
            along = along.view([-1 if axis == tensor_axis else 1 for axis in range(score.value.ndim)])
            keep_of[name] = keep_of.get(name, score.value != -math.inf) & along
    return {name: BlockMask(keep_of[name].to(score.value.device), score.grid) for name, score in scores.items()}


def _without_pruned(shared: SharedMask, keep: Tensor) -> Tensor:
    """The mask, with the blocks pruned whose score is -inf; a copy if several parameters share it."""
    if shared.score.amin() == -math.inf:
        return keep & (shared.score != -math.inf)
    return keep if len(shared.names) == 1 else keep.clone()
