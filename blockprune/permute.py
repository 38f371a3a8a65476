"""Reorder hidden units, heads or channels so that weak ones fall into the same blocks; what the model computes stays the same."""

import copy
from collections.abc import Mapping, Sequence
from typing import TypeVar

import attrs
import torch
from torch import Tensor, nn

from blockprune.blocks import BlockGrid, block_elements, expand
from blockprune.names import near, slots
from blockprune.types import BlockScore, Scores

__all__ = ["Shuffle", "permute", "weakest_first"]

M = TypeVar("M", bound=nn.Module)
_same = attrs.cmp_using(eq=torch.equal)
_FIX = "a unit is axis length / units consecutive entries, so the units must divide the axis"


def _permutation(order: Tensor) -> Tensor:
    """A copy on the CPU, or an error that says what is wrong."""
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or order.dim() != 1:
        given = f"{order.dtype} of shape {tuple(order.shape)}" if isinstance(order, Tensor) else type(order).__name__
        raise TypeError(f"Shuffle.order is {given}; give an int64 tensor [units], such as torch.tensor([2, 0, 1])")
    order = order.detach().to("cpu", copy=True)
    wanted = torch.arange(len(order))
    if not len(order) or not torch.equal(order.sort().values, wanted):
        missing = wanted[~torch.isin(wanted, order)].tolist()
        raise ValueError(f"Shuffle.order of {len(order)} units must have each of 0..units-1 once; it lacks {missing[:6]}")
    return order


def _names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"a Shuffle's rows, columns and last are tuples of names, not the string {names!r}; write ({names!r},)")
    return tuple(names)


def _counts(copies: Mapping[str, int]) -> dict[str, int]:
    return dict(copies)


@attrs.frozen(unsafe_hash=False)
class Shuffle:
    """One order for the units of a hidden axis, and all the tensors that have it: unit ``i`` becomes what unit ``order[i]`` was.

    A unit is ``axis length / units`` consecutive entries: a head is head_dim of them, a channel before flatten + Linear height x width.
    Transposed layers (ConvTranspose, GPT-2's Conv1D) have their inputs on axis 0: name them the other way round.

    Args:
        order: int64 ``[units]``, each of 0..units-1 once.
        rows: parameters and buffers whose axis 0 is made of the units: weights that compute them, biases, batch norm's running_mean.
        columns: those whose axis 1 is made of the units: weights that read them.
        last: those whose last axis is made of the units: learned positions and tokens, ``[1, tokens, units]``.
        within: equal groups of consecutive units that none may leave, such as heads whose channels are the units.
        copies: names on whose axis each group stands several times, one copy behind the other: the output projection where so many
            query heads share the values of one head.

    Raises:
        TypeError, ValueError: an order that is not a permutation or leaves its groups, a string in place of a tuple of names.

    Example:
        >>> from blockprune.permute import Shuffle
        >>> Shuffle(torch.tensor([2, 0, 1]), rows=("0.weight", "0.bias"), columns=("2.weight",)).inverse.order
        tensor([1, 2, 0])
    """

    order: Tensor = attrs.field(eq=_same, converter=_permutation)  # [units] int64
    rows: tuple[str, ...] = attrs.field(default=(), converter=_names, kw_only=True)
    columns: tuple[str, ...] = attrs.field(default=(), converter=_names, kw_only=True)
    last: tuple[str, ...] = attrs.field(default=(), converter=_names, kw_only=True)
    within: int = attrs.field(default=1, kw_only=True)
    copies: Mapping[str, int] = attrs.field(factory=dict, converter=_counts, kw_only=True)

    def __attrs_post_init__(self) -> None:
        units = len(self.order)
        if self.within < 1 or units % self.within:
            raise ValueError(f"Shuffle.within={self.within} must divide the units, which are {units}")
        size = units // self.within
        if leaves := [i for i, was in enumerate(self.order.tolist()) if i // size != was // size]:
            raise ValueError(f"Shuffle.order takes units {leaves[:6]} out of their groups of {size} (within={self.within})")
        if bad := {name: times for name, times in self.copies.items() if times < 1 or name not in (*self.rows, *self.columns)}:
            raise ValueError(f"Shuffle.copies={bad} must be names of rows or columns and how often each has the units, 1 or more")

    def along(self, name: str) -> Tensor:
        """The order on a tensor's axis: of all copies, each group's behind each other."""
        times, size = self.copies.get(name, 1), len(self.order) // self.within
        inside = self.order.view(self.within, 1, size) % size  # [groups, 1, units of one]
        first = torch.arange(self.within * times).view(self.within, times, 1) * size
        return (first + inside).flatten()

    @property
    def inverse(self) -> "Shuffle":
        """What brings the units back."""
        return attrs.evolve(self, order=self.order.argsort())


def permute(model: M, plan: Sequence[Shuffle]) -> M:
    """A copy of an unmasked model with its units in other places.

    It computes the same if the plan names every tensor that has the units; only a forward pass can show that it does. A packed
    projection (MultiheadAttention's in_proj) takes a shuffle of its own: ``order``, ``order + heads``, ``order + 2 * heads`` in one.

    Args:
        model: any module; it stays as it is.
        plan: the shuffles, each of axes of its own; a tied tensor is named by all its names.

    Raises:
        KeyError: a name that the model does not have.
        ValueError: a masked model, units that do not divide an axis, an axis that two shuffles move, a tensor tied to one not named, a
            parameter that a parametrization computes.
        TypeError: a plan that is not a sequence of `Shuffle`.

    Example:
        >>> from blockprune.permute import Shuffle, permute
        >>> model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(5, 4)
        >>> turned = permute(model, [Shuffle(torch.tensor([2, 0, 1]), rows=("0.weight", "0.bias"), columns=("2.weight",))])
        >>> torch.equal(turned[0].bias, model[0].bias[[2, 0, 1]]), torch.allclose(turned(x), model(x), atol=1e-6)
        (True, True)
    """
    moves = _moves(model, plan)
    permuted = copy.deepcopy(model)
    tensors = _tensors(permuted)
    with torch.no_grad():
        for (name, axis), order in moves.items():
            units = tensors[name].unflatten(axis, (len(order), -1))  # [..., units, entries of one, ...]
            tensors[name].copy_(units.index_select(axis, order.to(units.device)).flatten(axis, axis + 1))
    return permuted


def weakest_first(
    scores: Scores, *, units: int, rows: Sequence[str] = (), columns: Sequence[str] = (), within: int = 1, descending: bool = False
) -> Shuffle:
    """The shuffle that sorts units by the sum of the scores of their elements, weakest first; equal units stay in order.

    A block's score counts for each of its elements, so blocks of single rows and columns (or elements) tell units apart best.

    Args:
        scores: of one metric, by parameter name, in any blocks; names without scores (biases) are moved but count nothing.
        units: how many there are: hidden units, heads, channels.
        rows, columns: as in `Shuffle`.
        within: sort only inside each of so many equal groups of consecutive units. Query heads must stay with their key/value head:
            ``units=query heads, within=key/value heads``. Whole groups move with ``units=key/value heads`` in a permutation of its own.
        descending: strongest first.

    Raises:
        KeyError: no scores for any of the names.
        ValueError: units that do not divide a scored axis, groups that do not divide the units, scores that are NaN or infinite.

    Example:
        >>> from blockprune.permute import weakest_first
        >>> scores = {"up.weight": bp.BlockScore(torch.tensor([[5.0], [1.0], [3.0]]), bp.BlockGrid((3, 4), (1,)))}
        >>> weakest_first(scores, units=3, rows=("up.weight", "up.bias"), columns=("down.weight",)).order
        tensor([1, 2, 0])
    """
    rows, columns = _names(rows), _names(columns)
    if units < 1 or within < 1 or units % within:
        raise ValueError(f"weakest_first cannot sort units={units} within={within} equal groups; the groups must divide the units")
    found = [(name, axis) for axis, names in enumerate((rows, columns)) for name in dict.fromkeys(names) if name in scores]
    if not found:
        wanted = [*rows, *columns]
        raise KeyError(f"weakest_first has no scores for any of {wanted}{near(wanted[0] if wanted else '', scores)}")
    total = sum((_by_unit(name, scores[name], axis, units) for name, axis in found), torch.zeros(units, dtype=torch.float64))
    inside = total.view(within, -1).argsort(dim=1, descending=descending, stable=True)  # [within, units of a group]
    return Shuffle((inside + torch.arange(0, units, units // within)[:, None]).flatten(), rows=rows, columns=columns, within=within)


def _by_unit(name: str, score: BlockScore, axis: int, units: int) -> Tensor:
    """The sum over each unit's elements, which all have their block's score: float64 ``[units]`` on the CPU."""
    grid, value = score.grid, score.value.detach().cpu().double()
    _check_axis(name, grid.shape, axis, units, role=("rows", "columns")[axis])
    if not value.isfinite().all():
        raise ValueError(f"{name}: the scores of {grid} have NaN or infinite values, which do not add up; sort before `restrict`")
    line = BlockGrid((grid.shape[axis],), (grid.block[axis],))
    others = [other for other in range(len(grid.shape)) if other != axis]
    blocks = value * block_elements(grid)  # the score of all elements of a block
    along = blocks.sum(others) if others else blocks  # [blocks along the axis]
    return expand(along / block_elements(line), line).reshape(units, -1).sum(1)


def _check_axis(name: str, shape: Sequence[int], axis: int, units: int, *, role: str) -> None:
    if len(shape) <= axis:
        raise ValueError(f"{name}: its shape {tuple(shape)} has no axis {axis}, which `{role}` moves; only weights have columns")
    if not shape[axis] or shape[axis] % units:
        raise ValueError(f"{name}: axis {axis} of {tuple(shape)} has {shape[axis]} `{role}`, which are not {units} equal units; {_FIX}")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names."""
    parameters = {slot.name: slot.stored for places in slots(model).values() for slot in places}
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def _moves(model: nn.Module, plan: Sequence[Shuffle]) -> dict[tuple[str, int], Tensor]:
    """The order for each (name, axis), a tied tensor by one of its names; everything is checked here."""
    if not isinstance(plan, Sequence) or not all(isinstance(shuffle, Shuffle) for shuffle in plan):
        raise TypeError(f"plan is a {type(plan).__name__}, not a sequence of Shuffle; write [Shuffle(order, rows=..., columns=...)]")
    places = [slot for shared in slots(model).values() for slot in shared]
    if masked := next((slot for slot in places if slot.masking), None):
        raise ValueError(f"{masked.name}: the parameter {masked.shape} is masked; permute before masking, or `finalize` the model first")
    computed, tensors = {slot.name for slot in places if slot.chain is not None}, _tensors(model)
    moves: dict[tuple[str, int], Tensor] = {}
    taken: dict[tuple[int, int], int] = {}  # which shuffle moves this axis of this tensor
    for number, shuffle in enumerate(plan):
        for role, names in (("rows", shuffle.rows), ("columns", shuffle.columns), ("last", shuffle.last)):
            for name in names:
                if name not in tensors:
                    raise KeyError(f"plan[{number}] names {name!r}, which is no parameter or buffer of the model{near(name, tensors)}")
                tensor, here = tensors[name], f"{name}: {tuple(tensors[name].shape)}"
                if name in computed:
                    raise ValueError(f"{here} is computed by a parametrization; remove that first (`remove_parametrizations`)")
                order, axis = shuffle.along(name), {"rows": 0, "columns": 1}.get(role, max(0, tensor.ndim - 1))
                _check_axis(name, tensor.shape, axis, len(order), role=role)
                if missing := [other for other, t in tensors.items() if t is tensor and other not in names]:
                    raise ValueError(f"{here} is tied to {missing}, which plan[{number}] would change too; name all, or untie them")
                if (first := taken.get((id(tensor), axis))) is None:
                    taken[id(tensor), axis], moves[name, axis] = number, order
                elif first != number:
                    raise ValueError(f"{here} is moved along axis {axis} by plan[{first}] and plan[{number}]; permute twice instead")
    return moves
