"""Parameters that share one mask. Their scores are added before allocation, and each gets a copy of the mask after it."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from blockprune.core.grid import block_elements
from blockprune.core.patterns import matches, suggest
from blockprune.core.types import BlockMask, Masks, Scores

Coupled = Iterable[Iterable[str]]  # sets of parameter names or patterns; the parameters of a set share one mask


@attrs.frozen(eq=False)
class SharedMask:
    """The parameters that share one mask: those of a coupled set, or else a single parameter."""

    names: tuple[str, ...]
    score: Tensor  # [*size] summed over the parameters, in the shape of the first one's blocks
    elements: Tensor  # [*size] that all parameters together lose with a block
    parameter_elements: tuple[int, ...]  # of each parameter

    @property
    def total(self) -> int:
        """The elements of all parameters."""
        return sum(self.parameter_elements)

    def sparsity(self, sparsities: Mapping[str, float]) -> float:
        """The mean of the parameters' sparsities, weighted by their elements."""
        return sum(sparsities[name] * n for name, n in zip(self.names, self.parameter_elements, strict=True)) / self.total


def shared_masks(scores: Scores, coupled: Coupled) -> list[SharedMask]:
    """The masks that the parameters need, each with its parameters, in the order of their first ones.

    Raises:
        TypeError: scores that are not floating point, a coupled set that is a string.
        ValueError: NaN scores, a parameter in two sets, parameters of a set with different numbers of blocks.
        KeyError: a name or pattern that matches no parameter.
    """
    for name, score in scores.items():
        if not score.value.is_floating_point():
            raise TypeError(f"{name}: scores {tuple(score.value.shape)} are {score.value.dtype}; they must be floating point")
        if score.value.amin().isnan():
            raise ValueError(
                f"{name}: {int(score.value.isnan().sum())} of the scores {tuple(score.value.shape)} are NaN and cannot be ranked; "
                "check the metric"
            )
    return [_shared_mask(scores, names) for names in _coupled_names(scores, coupled)]


def _coupled_names(scores: Scores, coupled: Coupled) -> list[tuple[str, ...]]:
    """The parameter names of each mask."""
    names_of: dict[str, tuple[str, ...]] = {name: (name,) for name in scores}
    position = {name: number for number, name in enumerate(scores)}
    for names_or_patterns in coupled:
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
    keep_of = {name: _without_pruned(shared, blocks) for shared, blocks in keep.items() for name in shared.names}
    return {name: BlockMask(keep_of[name].reshape(score.grid.size).to(score.value.device), score.grid) for name, score in scores.items()}


def _without_pruned(shared: SharedMask, keep: Tensor) -> Tensor:
    """The mask, with the blocks pruned whose score is -inf; a copy if several parameters share it."""
    if shared.score.amin() == -math.inf:
        return keep & (shared.score != -math.inf)
    return keep if len(shared.names) == 1 else keep.clone()
