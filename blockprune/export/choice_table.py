"""Which backends this machine has, and which of them runs each masked weight, as values that print as tables."""

import warnings
from collections.abc import Mapping

import attrs
import torch

from blockprune.core.table import Rows, Table
from blockprune.export import semi_structured, triton_launch
from blockprune.native import spmm


@attrs.frozen
class Backend:
    """An implementation of the product with a masked weight, whether this machine has it, and why not.

    Example:
        >>> from blockprune import export
        >>> export.backends().rows[-1].available
        True
    """

    name: str
    available: bool
    reason: str

    @property
    def cells(self) -> tuple[str, ...]:
        return self.name, "yes" if self.available else "no", self.reason


@attrs.frozen(repr=False)
class Backends(Table):
    """A table of backends; it prints in a terminal and renders in a notebook.

    Example:
        >>> from blockprune import export
        >>> export.Backends((export.Backend("torch", True, "always there"),))
        backend  available        reason
        torch          yes  always there
    """

    rows: tuple[Backend, ...]

    def table(self) -> Rows:
        return [("backend", "available", "reason"), *(row.cells for row in self.rows)]


def backends() -> Backends:
    """The backends for masked weights, which of them this machine has, and why it lacks the others.

    Example:
        >>> from blockprune import export
        >>> [row.name for row in export.backends().rows]
        ['native', 'triton', 'torch', '2:4', 'dense']
    """
    instruction_sets = ", ".join(spmm.instructions())
    details = f"compiled product on the CPU, {spmm.status}" + (f": {instruction_sets}" if instruction_sets else "")
    native = Backend("native", bool(instruction_sets), details)
    pytorch = Backend("torch", True, f"torch {torch.__version__}: a dense product for each row of blocks; any device and type")
    triton, two_of_four = Backend("triton", *triton_launch.status()), Backend("2:4", *semi_structured.status())
    return Backends((native, triton, pytorch, two_of_four, Backend("dense", True, "the plain layer, with zeros in pruned blocks")))


@attrs.frozen
class Choice:
    """Which backend runs one masked weight, and whether in int8.

    Args:
        name: of the parameter.
        sparsity: the fraction of its elements that is pruned.
        backend: "native", "triton", "2:4", "torch" or "dense".
        reason: why this backend was chosen.
        milliseconds: of each kernel that was measured, by name.
        dtype: "int8", or empty for the type of the weight.
        error: of the outputs in int8, relative, if int8 was asked for: ``|y_int8 - y| / |y|``.

    Example:
        >>> from blockprune import export
        >>> export.Choice("fc.weight", 0.5, "torch", "as requested").cells
        ('fc.weight', '50.0%', 'torch', 'as requested')
    """

    name: str
    sparsity: float
    backend: str
    reason: str
    milliseconds: Mapping[str, float] = attrs.field(factory=dict)
    dtype: str = ""
    error: float | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        return self.name, f"{self.sparsity:.1%}", f"{self.backend} {self.dtype}".strip(), self.reason


@attrs.frozen(repr=False)
class Choices(Table):
    """Which backend runs each masked weight.

    It prints as a table, and `block_sparse` takes it as its ``backend``.

    Example:
        >>> from blockprune import export
        >>> export.Choices((export.Choice("fc.weight", 0.5, "torch", "as requested"),))
        parameter  pruned  backend        reason
        fc.weight   50.0%    torch  as requested
    """

    rows: tuple[Choice, ...]

    def table(self) -> Rows:
        lines = [("parameter", "pruned", "backend", "reason"), *(row.cells for row in self.rows)]
        if all(row.error is None for row in self.rows):
            return lines
        errors = ["int8 error", *("" if row.error is None else f"{row.error:.2%}" for row in self.rows)]
        return [(*cells[:3], error, cells[3]) for cells, error in zip(lines, errors, strict=True)]


def warn_if_all_dense(choices: Choices) -> None:
    """Warn if no layer runs block-sparse, with the reasons of the first ones.

    Example:
        >>> import warnings
        >>> from blockprune.export import Choice, Choices
        >>> from blockprune.export.choice_table import warn_if_all_dense
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     warn_if_all_dense(Choices((Choice("fc.weight", 0.5, "dense", "inputs do not reach it"),)))
        >>> print(caught[0].message)
        0 of 1 masked layers became block-sparse (fc.weight: inputs do not reach it); print(choose(model)) lists the reason for each layer
    """
    if all(choice.backend == "dense" and not choice.dtype for choice in choices.rows):
        reasons = "; ".join(f"{choice.name}: {choice.reason}" for choice in choices.rows[:3])
        reasons = reasons or "all masks are on biases and norms, which keep their zeros"
        warnings.warn(
            f"0 of {len(choices.rows)} masked layers became block-sparse ({reasons}); print(choose(model)) lists the reason for each layer",
            stacklevel=3,
        )
