"""Reorder the hidden units, heads or channels of a model, so that unimportant ones share blocks; the model's outputs stay the same."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import attrs
import torch
from torch import Tensor, nn

from blockprune.core.grid import BlockGrid, block_elements, expand
from blockprune.core.patterns import suggest
from blockprune.core.precision import forget_casts
from blockprune.core.types import BlockScore, Scores
from blockprune.core.unit_permutation import UnitPermutation, checked_names
from blockprune.model.copying import copy_model
from blockprune.model.parameters import check_loaded, check_not_inference, check_own_memory, parameter_refs
from blockprune.model.sharding import check_not_fully_sharded

__all__ = ["permute", "sort_units"]

M = TypeVar("M", bound=nn.Module)


def permute(model: M, plan: Sequence[UnitPermutation], *, inplace: bool = False) -> M:
    """A copy of a model without masks whose hidden units have a new order.

    The copy computes the same as the model if the plan names every tensor that has the units; only a forward pass can show that it does.
    A packed projection (MultiheadAttention's in_proj) needs a permutation of its own, which joins ``order``, ``order + heads`` and
    ``order + 2 * heads``.

    Args:
        model: any module without masks; it is not changed, unless ``inplace``.
        plan: the permutations, each of other axes; a tied tensor must be listed by all its names.
        inplace: reorder the model's own tensors and their gradients and return it, instead of a copy; an optimizer's state keeps its order.
            After an error they have their former order.

    Raises:
        KeyError: a name that the model does not have.
        ValueError: a masked or sharded model, a number of units that does not divide an axis, an axis that two permutations reorder, a
            tensor that is tied to one that is not listed, a parameter that a parametrization computes or that accelerate has offloaded; in
            place also one that shares its memory.
        TypeError: a plan that is not a sequence of `UnitPermutation`.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(5, 4)
        >>> plan = [bp.UnitPermutation(torch.tensor([2, 0, 1]), rows=("0.weight", "0.bias"), columns=("2.weight",))]
        >>> permuted = bp.permute(model, plan)
        >>> torch.equal(permuted[0].bias, model[0].bias[[2, 0, 1]]), torch.allclose(permuted(x), model(x), atol=1e-6)
        (True, True)
    """
    orders = _orders_by_axis(model, plan)
    check_not_fully_sharded(model, "permute reorders whole parameters", nor_dtensors=True)
    permuted = model if inplace else copy_model(model)
    tensors, written = _named_tensors(permuted), list[_Written]()
    if inplace:
        refs = {ref.name: ref for users in parameter_refs(model).values() for ref in users}
        check_not_inference(refs[name] for name, _ in orders if name in refs)
        check_own_memory(model, [tensors[name] for name, _ in orders], "permute")
    with torch.no_grad():
        try:
            for (name, axis), order in orders.items():
                written.append(_Written(tensors[name], axis, order, tensors[name].clone() if inplace else None))
                tensors[name].copy_(_reordered(tensors[name], axis, order))
                for before in written[-2:-1]:
                    before.former = None
        except BaseException:
            for tensor in reversed(written if inplace else []):
                tensor.restore()
            raise
        forget_casts()
        for (name, axis), order in orders.items():
            if (gradient := tensors[name].grad) is not None:
                tensors[name].grad = _reordered(gradient, axis, order)
    return permuted


@attrs.define(eq=False)
class _Written:
    """A tensor that is reordered in place, and its former values while it is written."""

    tensor: Tensor
    axis: int
    order: Tensor
    former: Tensor | None

    def restore(self) -> None:
        """Undo the reordering, of which it is not known whether it is done while there are former values."""
        self.tensor.copy_(_reordered(self.tensor, self.axis, self.order.argsort()) if self.former is None else self.former)


def _reordered(x: Tensor, axis: int, order: Tensor) -> Tensor:
    units = x.unflatten(axis, (len(order), -1))  # [..., units, entries of a unit, ...]
    reordered: Tensor = units.index_select(axis, order.to(units.device)).flatten(axis, axis + 1)
    return reordered


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
    rows, columns = checked_names(rows), checked_names(columns)
    if units < 1 or groups < 1 or units % groups:
        raise ValueError(f"sort_units cannot sort units={units} in groups={groups}; the number of groups must divide the number of units")
    scored = [(name, axis) for axis, names in enumerate((rows, columns)) for name in dict.fromkeys(names) if name in scores]
    if not scored:
        names = [*rows, *columns]
        raise KeyError(f"sort_units has no scores for any of {names}{suggest(names[0] if names else '', scores)}")
    total = sum(
        (_score_by_unit(name, scores[name], axis, units) for name, axis in scored), torch.zeros(units, dtype=torch.float64, device="cpu")
    )
    within_group = total.view(groups, -1).argsort(dim=1, descending=descending, stable=True)  # [groups, units of a group]
    starts = torch.arange(0, units, units // groups, device="cpu")[:, None]
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
    named = {name for permutation in plan for _, name in _names_by_role(permutation)}
    check_loaded(model, [ref for ref in refs if ref.name in named], "permute")
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
