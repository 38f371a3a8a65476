"""A new order for the units of a hidden axis, and the names of the tensors that have it."""

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from blockprune.core.types import in_short


def _checked_order(order: Tensor) -> Tensor:
    """A copy of the order on the CPU, after a check that it is a permutation."""
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or order.dim() != 1:
        kind = f"a {order.dtype} tensor of shape {tuple(order.shape)}" if isinstance(order, Tensor) else f"a {type(order).__name__}"
        raise TypeError(f"UnitPermutation.order is {kind}; give an int64 tensor of shape [units], such as torch.tensor([2, 0, 1])")
    order = order.detach().to("cpu", copy=True)
    units = torch.arange(len(order), device="cpu")
    if not len(order) or not torch.equal(order.sort().values, units):
        missing = units[~torch.isin(units, order)].tolist()
        raise ValueError(
            f"UnitPermutation.order of {len(order)} units must have one unit or more and contain each of 0..units-1 exactly once; "
            f"it lacks {missing[:6]}"
        )
    return order


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
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
        removable: whether what stays computes the same without some of the units, or groups. It does not where a norm or a softmax divides
            by all of them; such an axis can be reordered, but `coupled` of the allocators does not take it.

    Raises:
        TypeError: ``order`` is not an int64 tensor with one axis; ``rows``, ``columns`` or ``last`` is a string.
        ValueError: ``order`` is not a permutation or moves a unit out of its group; ``copies`` has a name that is in neither ``rows`` nor
            ``columns``, or a count below 1.

    Example:
        >>> bp.UnitPermutation(torch.tensor([2, 0, 1]), rows=("0.weight", "0.bias"), columns=("2.weight",)).inverse.order
        tensor([1, 2, 0])
    """

    order: Tensor = attrs.field(eq=attrs.cmp_using(eq=torch.equal), repr=in_short, converter=_checked_order)  # [units] int64
    rows: tuple[str, ...] = attrs.field(default=(), converter=checked_names, kw_only=True)
    columns: tuple[str, ...] = attrs.field(default=(), converter=checked_names, kw_only=True)
    last: tuple[str, ...] = attrs.field(default=(), converter=checked_names, kw_only=True)
    groups: int = attrs.field(default=1, kw_only=True)
    copies: Mapping[str, int] = attrs.field(factory=dict, converter=_as_dict, kw_only=True)
    removable: bool = attrs.field(default=True, kw_only=True)

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
        starts = torch.arange(self.groups * copies, device="cpu").view(self.groups, copies, 1) * group_size
        return (starts + within_group).flatten()

    @property
    def parts(self) -> int:
        """The number of parts that can be removed: the units; or the groups, such as heads, if there are several."""
        return self.groups if self.groups > 1 else len(self.order)

    def run_length(self, name: str, length: int) -> int:
        """How many consecutive entries belong to one part, along the axis of one tensor; run ``r`` belongs to part ``r % parts``.

        Raises:
            ValueError: the axis of this length does not divide into the parts.
        """
        runs = self.parts if self.groups > 1 else self.parts * self.copies.get(name, 1)
        if not length or length % runs:
            raise ValueError(f"{name}: its axis of {length} entries does not divide into {runs} equal runs for the {self.parts} parts")
        return length // runs

    def tensor_axes(self, name: str, rank: int) -> tuple[int, ...]:
        """The axes of one tensor, which has ``rank`` of them, that are the hidden axis; none if the tensor does not have it."""
        roles = ((0, self.rows), (1, self.columns), (rank - 1, self.last))
        return tuple(dict.fromkeys(axis for axis, names in roles if name in names))

    @property
    def inverse(self) -> "UnitPermutation":
        """The permutation that restores the former order."""
        return attrs.evolve(self, order=self.order.argsort())
