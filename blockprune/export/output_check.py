"""Whether a smaller model has the outputs of the given one, on an example and on others that are made from it."""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

from blockprune.core._compat import tree_leaves

TOLERANCE = 1e-5  # relative to the largest output; outputs are compared in float64, so rounding does not matter
MAX_SIZES = 8  # of an example that are changed

Change = Callable[[Any], Any]  # of a leaf of the example: a tensor, a number or anything else


class RunExample(Protocol):
    """Runs a model on the example, whose leaves a function may change: (model, change) -> the output tensors."""

    def __call__(self, model: nn.Module, change: Change | None = None) -> list[Tensor]: ...


@attrs.frozen(eq=False)
class OutputCheck:
    """How the outputs of a smaller model differ from those of the given one; empty if they do not.

    Python hides from the operations of a model what depends on sizes, and on numbers in the example. So the check also takes examples with
    other numbers, and with shorter axes, if the model runs with them.

    Args:
        run: the function that runs a model.
        expected: the changes of the example, the first of which changes nothing, and the outputs with each.
    """

    run: RunExample
    expected: Sequence[tuple[Change | None, list[Tensor]]]

    @classmethod
    def of(cls, model: nn.Module, example: Any, run: RunExample) -> "OutputCheck":
        """Run a model on the example and on the others; it warns if the example has numbers and the model runs with no others."""
        expected: list[tuple[Change | None, list[Tensor]]] = [(None, run(model))]
        leaves = tree_leaves(example)
        numbers = [leaf for leaf in leaves if type(leaf) in (int, float)]
        with_numbers = [pair for change in (_larger, _smaller) if numbers and (pair := _outputs(run, model, change))]
        if numbers and not with_numbers:
            warnings.warn(
                f"the model runs with no other numbers than those of the example ({', '.join(map(str, numbers[:4]))}), so what depends on "
                "them counts as constant, and the smaller model may be right for these numbers only; if they never change, give them in "
                "forward= and not in the example",
                stacklevel=3,
            )
        with_sizes: list[tuple[Change | None, list[Tensor]]] = []
        shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
        sizes = dict.fromkeys(shape[axis] for axis in range(max(map(len, shapes), default=0)) for shape in shapes if axis < len(shape))
        for size in [size for size in sizes if size > 1][:MAX_SIZES]:
            shorter = (partial(_cut, size=size, new=new) for new in dict.fromkeys((size - 1, size // 2)))
            with_sizes += [*filter(None, (_outputs(run, model, change) for change in shorter))][:1]
        return cls(run, [*expected, *with_numbers, *with_sizes])

    @torch.no_grad()
    def __call__(self, smaller: nn.Module) -> str:
        for change, expected in self.expected:
            outputs = _run_copy(self.run, smaller, change) if change else self.run(smaller)
            where = " with other sizes or numbers in the example" if change else ""
            if failure := _difference(outputs, expected):
                return f"without it the outputs {failure}{where}"
        return ""


def _outputs(run: RunExample, model: nn.Module, change: Change) -> tuple[Change, list[Tensor]] | None:
    """A change and the outputs with it; None if the model does not run with it, or has outputs that are not finite."""
    try:
        outputs = _run_copy(run, model, change)
    except Exception:  # the model's own code may raise anything on other sizes and numbers
        return None
    return (change, outputs) if outputs and all(bool(x.isfinite().all()) for x in outputs) else None


def _run_copy(run: RunExample, model: nn.Module, change: Change) -> list[Tensor]:
    """Run a copy of the model, because some models note sizes that they have met, such as a window that is smaller than the usual one."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(copy.deepcopy(model), change)


def _larger(leaf: Any) -> Any:
    return leaf + 1 if type(leaf) in (int, float) else leaf


def _smaller(leaf: Any) -> Any:
    if type(leaf) is int:
        return max(1, leaf - 1) if leaf > 0 else leaf - 1  # a length of 0 is often an error
    return leaf / 2 if type(leaf) is float else leaf


def _cut(leaf: Any, *, size: int, new: int) -> Any:
    """Tensors without the last elements of all axes of this size."""
    return leaf[tuple(slice(new if length == size else length) for length in leaf.shape)] if isinstance(leaf, Tensor) else leaf


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    if [x.shape for x in outputs] != [x.shape for x in expected]:
        return "have different shapes"
    for output, target in zip(outputs, expected, strict=True):
        x, y = (t.double() if t.is_floating_point() else t for t in (output, target))
        change = (x - y).abs().max().item() if x.is_floating_point() and x.numel() else 0.0 if torch.equal(x, y) else torch.inf
        largest = y.abs().max().item() if y.is_floating_point() and y.numel() else 0.0
        if not change <= TOLERANCE * largest:  # NaN is a change
            return f"change (by {change:.1g})"
    return ""
