"""Reorder the hidden units, heads or channels of a model, so that unimportant ones share blocks; the model's outputs stay the same."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import attrs
import torch
from torch import Tensor, nn

from blockprune.core.grid import BlockGrid, block_elements, expand
from blockprune.core.patterns import suggest
from blockprune.core.types import BlockScore, Scores, in_short
from blockprune.model.parameters import parameter_refs

__all__ = ["UnitPermutation", "permute", "sort_units"]

M = TypeVar("M", bound=nn.Module)


def _checked_order(order: Tensor) -> Tensor:
    """A copy of the order on the CPU, after a check that it is a permutation."""
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or order.dim() != 1:
        kind = f"a {order.dtype} tensor of shape {tuple(order.shape)}" if isinstance(order, Tensor) else f"a {type(order).__name__}"
        raise TypeError(f"UnitPermutation.order is {kind}; give an int64 tensor of shape [units], such as torch.tensor([2, 0, 1])")
    order = order.detach().to("cpu", copy=True)
    units = torch.arange(len(order))
    if not len(order) or not torch.equal(order.sort().values, units):
        missing = units[~torch.isin(units, order)].tolist()
        raise ValueError(
            f"UnitPermutation.order of {len(order)} units must have one unit or more and contain each of 0..units-1 exactly once; "
            f"it lacks {missing[:6]}"
        )
    return order


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"rows, columns and last are tuples of names, but one of them is the string {names!r}; write ({names!r},)")
    return tuple(names)


def _as_dict(copies: Mapping[str, int]) -> dict[str, int]:
    return dict(copies)


@attrs.frozen(unsafe_hash=False)
class UnitPermutation:
    """A new order for the units of one hidden axis, and the names of all tensors that have this axis.

    After `permute`, unit ``i`` is the former unit ``order[i]``. A unit is a run of ``axis length / units`` consecutive entries: a head has
    head_dim entries, a channel before flatten + Linear has height x width. Layers with transposed weights (ConvTranspose, GPT-2's Conv1D)
    have their inputs on axis 0: list their weights under ``columns`` if they compute the units, and under ``rows`` if they read them.

    Args:
        order: int64 ``[units]``, each of 0..units-1 exactly once.
        rows: parameters and buffers whose axis 0 is the hidden axis: weights that compute the units, biases, batch norm's running_mean.
        columns: parameters whose axis 1 is the hidden axis: weights that read the units.
        last: parameters whose last axis is the hidden axis: learned positions and tokens, ``[1, tokens, units]``.
        groups: the units form this many equal groups of consecutive units, and every unit stays in its group; for example the heads, if
            the units are their channels.
        copies: for a name, how many times its axis contains the units of each group, one copy after another; for example the number of
            query heads that share one value head, for the output projection.

    Raises:
        TypeError: ``order`` is not an int64 tensor with one axis; ``rows``, ``columns`` or ``last`` is a string.
        ValueError: ``order`` is not a permutation or moves a unit out of its group; ``copies`` has a name that is in neither ``rows`` nor
            ``columns``, or a count below 1.

    Example:
        >>> bp.UnitPermutation(torch.tensor([2, 0, 1]), rows=("0.weight", "0.bias"), columns=("2.weight",)).inverse.order
        tensor([1, 2, 0])
    """

    order: Tensor = attrs.field(eq=attrs.cmp_using(eq=torch.equal), repr=in_short, converter=_checked_order)  # [units] int64
    rows: tuple[str, ...] = attrs.field(default=(), converter=_checked_names, kw_only=True)
    columns: tuple[str, ...] = attrs.field(default=(), converter=_checked_names, kw_only=True)
    last: tuple[str, ...] = attrs.field(default=(), converter=_checked_names, kw_only=True)
    groups: int = attrs.field(default=1, kw_only=True)
    copies: Mapping[str, int] = attrs.field(factory=dict, converter=_as_dict, kw_only=True)

    def __attrs_post_init__(self) -> None:
        units = len(self.order)
        if self.groups < 1 or units % self.groups:
            raise ValueError(f"UnitPermutation.groups={self.groups} must divide the number of units, which is {units}")
        group_size = units // self.groups
        if leaving := [new for new, former in enumerate(self.order.tolist()) if new // group_size != former // group_size]:
            raise ValueError(
                f"UnitPermutation.order puts units of other groups at positions {leaving[:6]}; with groups={self.groups} every unit must "
                f"stay in its group of {group_size}"
            )
        if bad := {name: count for name, count in self.copies.items() if count < 1 or name not in (*self.rows, *self.columns)}:
            raise ValueError(
                f"UnitPermutation.copies={bad} must map names from rows or columns to the number of copies of the units, 1 or more"
            )

    def expand_order(self, name: str) -> Tensor:
        """The order along the axis of one tensor, int64 ``[units * copies]``: it repeats the order of each group for all of its copies."""
        copies, group_size = self.copies.get(name, 1), len(self.order) // self.groups
        within_group = self.order.view(self.groups, 1, group_size) % group_size  # [groups, 1, units of a group]
        starts = torch.arange(self.groups * copies).view(self.groups, copies, 1) * group_size
        return (starts + within_group).flatten()

    @property
    def inverse(self) -> "UnitPermutation":
        """The permutation that restores the former order."""
        return attrs.evolve(self, order=self.order.argsort())


def permute(model: M, plan: Sequence[UnitPermutation]) -> M:
    """A copy of a model without masks whose hidden units have a new order.

    The copy computes the same as the model if the plan names every tensor that has the units; only a forward pass can show that it does.
    A packed projection (MultiheadAttention's in_proj) needs a permutation of its own, which joins ``order``, ``order + heads`` and
    ``order + 2 * heads``.

    Args:
        model: any module without masks; it is not changed.
        plan: the permutations, each of other axes; a tied tensor must be listed by all its names.

    Raises:
        KeyError: a name that the model does not have.
        ValueError: a masked model, a number of units that does not divide an axis, an axis that two permutations reorder, a tensor that is
            tied to one that is not listed, a parameter that a parametrization computes.
        TypeError: a plan that is not a sequence of `UnitPermutation`.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(5, 4)
        >>> plan = [bp.UnitPermutation(torch.tensor([2, 0, 1]), rows=("0.weight", "0.bias"), columns=("2.weight",))]
        >>> permuted = bp.permute(model, plan)
        >>> torch.equal(permuted[0].bias, model[0].bias[[2, 0, 1]]), torch.allclose(permuted(x), model(x), atol=1e-6)
        (True, True)
    """
    orders = _orders_by_axis(model, plan)
    permuted = copy.deepcopy(model)
    tensors = _named_tensors(permuted)
    with torch.no_grad():
        for (name, axis), order in orders.items():
            units = tensors[name].unflatten(axis, (len(order), -1))  # [..., units, entries of a unit, ...]
            tensors[name].copy_(units.index_select(axis, order.to(units.device)).flatten(axis, axis + 1))
    return permuted


def sort_units(
    scores: Scores, *, units: int, rows: Sequence[str] = (), columns: Sequence[str] = (), groups: int = 1, descending: bool = False
) -> UnitPermutation:
    """The permutation that sorts units by the sum of their elements' scores, lowest first; units with equal sums keep their order.

    A block's score counts for each of its elements, so blocks of single rows and columns (or elements) distinguish units best.

    Args:
        scores: of one metric, by parameter name, in blocks of any shape. Names without scores (biases) are listed in the permutation, but
            add nothing to the sums.
        units: the number of units: hidden units, heads or channels.
        rows, columns: as in `UnitPermutation`.
        groups: sort only within each of this many equal groups of consecutive units. Query heads must stay with their key/value head, so
            sort them with ``units=query heads, groups=key/value heads``; to sort whole groups, make another permutation with
            ``units=key/value heads``.
        descending: highest first.

    Raises:
        KeyError: none of the names has scores.
        ValueError: the units do not divide a scored axis, the groups do not divide the units, or scores are NaN or infinite.

    Example:
        >>> scores = {"up.weight": bp.BlockScore(torch.tensor([[5.0], [1.0], [3.0]]), bp.BlockGrid((3, 4), (1,)))}
        >>> bp.sort_units(scores, units=3, rows=("up.weight", "up.bias"), columns=("down.weight",)).order
        tensor([1, 2, 0])
    """
    rows, columns = _checked_names(rows), _checked_names(columns)
    if units < 1 or groups < 1 or units % groups:
        raise ValueError(f"sort_units cannot sort units={units} in groups={groups}; the number of groups must divide the number of units")
    scored = [(name, axis) for axis, names in enumerate((rows, columns)) for name in dict.fromkeys(names) if name in scores]
    if not scored:
        names = [*rows, *columns]
        raise KeyError(f"sort_units has no scores for any of {names}{suggest(names[0] if names else '', scores)}")
    total = sum((_score_by_unit(name, scores[name], axis, units) for name, axis in scored), torch.zeros(units, dtype=torch.float64))
    within_group = total.view(groups, -1).argsort(dim=1, descending=descending, stable=True)  # [groups, units of a group]
    starts = torch.arange(0, units, units // groups)[:, None]
    return UnitPermutation((within_group + starts).flatten(), rows=rows, columns=columns, groups=groups)


def _score_by_unit(name: str, score: BlockScore, axis: int, units: int) -> Tensor:
    """The sum over each unit's elements, each of which has its block's score: float64 ``[units]`` on the CPU."""
    grid, value = score.grid, score.value.detach().cpu().double()
    _check_axis(name, grid.shape, axis, units, role=("rows", "columns")[axis])
    if not value.isfinite().all():
        raise ValueError(f"{name}: the scores of {grid} have NaN or infinite values, which do not add up; sort before `restrict`")
    axis_grid = BlockGrid((grid.shape[axis],), (grid.block[axis],))
    other_axes = [other for other in range(len(grid.shape)) if other != axis]
    block_totals = value * block_elements(grid)  # the score of all elements of a block
    axis_totals = block_totals.sum(other_axes) if other_axes else block_totals  # [blocks along the axis]
    return expand(axis_totals / block_elements(axis_grid), axis_grid).reshape(units, -1).sum(1)


def _check_axis(name: str, shape: Sequence[int], axis: int, units: int, *, role: str) -> None:
    if len(shape) <= axis:
        raise ValueError(f"{name}: its shape {tuple(shape)} has no axis {axis}, so it cannot be listed under `{role}`")
    if not shape[axis] or shape[axis] % units:
        raise ValueError(
            f"{name}: axis {axis} of {tuple(shape)} has {shape[axis]} `{role}`, which do not divide into {units} equal units; a unit is a "
            "run of (axis length / units) consecutive entries, so the number of units must divide the axis"
        )


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, by each of its names."""
    parameters = {ref.name: ref.stored for refs in parameter_refs(model).values() for ref in refs}
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def _orders_by_axis(model: nn.Module, plan: Sequence[UnitPermutation]) -> dict[tuple[str, int], Tensor]:
    """The order for each (name, axis) that the plan reorders, after all checks of the plan; a tied tensor has its first name only."""
    if not isinstance(plan, Sequence) or not all(isinstance(permutation, UnitPermutation) for permutation in plan):
        raise TypeError(
            f"plan is a {type(plan).__name__}, not a sequence of UnitPermutation; write [UnitPermutation(order, rows=..., columns=...)]"
        )
    refs = [ref for shared in parameter_refs(model).values() for ref in shared]
    if masked := next((ref for ref in refs if ref.mask), None):
        raise ValueError(f"{masked.name}: the parameter {masked.shape} is masked; permute before masking, or `finalize` the model first")
    computed, tensors = {ref.name for ref in refs if ref.parametrizations is not None}, _named_tensors(model)
    orders: dict[tuple[str, int], Tensor] = {}
    plan_number: dict[tuple[int, int], int] = {}  # by (tensor, axis)
    for number, permutation in enumerate(plan):
        for role, name in _names_by_role(permutation):
            if name not in tensors:
                raise KeyError(f"plan[{number}] lists {name!r}, which is no parameter or buffer of the model{suggest(name, tensors)}")
            tensor, label = tensors[name], f"{name}: {tuple(tensors[name].shape)}"
            if name in computed:
                raise ValueError(f"{label} is computed by a parametrization; remove that first (`remove_parametrizations`)")
            order, axis = permutation.expand_order(name), {"rows": 0, "columns": 1}.get(role, max(0, tensor.ndim - 1))
            _check_axis(name, tensor.shape, axis, len(order), role=role)
            if missing := [tied for tied, t in tensors.items() if t is tensor and tied not in getattr(permutation, role)]:
                raise ValueError(
                    f"{label} is tied to {missing}, which plan[{number}] would change too; list all these names, or untie the tensors"
                )
            first = plan_number.get((id(tensor), axis))
            if first is None:
                plan_number[id(tensor), axis], orders[name, axis] = number, order
            elif first != number:
                raise ValueError(
                    f"{label} is reordered along axis {axis} by both plan[{first}] and plan[{number}]; call permute twice instead"
                )
    return orders


def _names_by_role(permutation: UnitPermutation) -> Iterator[tuple[str, str]]:
    for role in ("rows", "columns", "last"):
        for name in getattr(permutation, role):
            yield role, name
