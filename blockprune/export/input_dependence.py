"""Which values inside a model depend on its inputs, and which on its weights alone."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blockprune.core._compat import DispatchMode, storage_id, tree_leaves, tree_map_only, writes_arguments

# operations that copy elements, or add them up with weights above zero: what they make of the marks shows which outputs are marked
_MOVES = {
    *("cat", "stack", "index_select", "gather", "index", "repeat", "flip", "roll", "mean", "amax", "constant_pad_nd", "im2col"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    *("avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_linear1d", "upsample_bilinear2d"),
    *(f"{kind}{n}d" for kind in ("reflection_pad", "replication_pad", "upsample_nearest") for n in (1, 2, 3)),
}
_COPIES = {"clone", "to_copy", "unsafe_view", "contiguous", "alias_copy"}
_LIKE = {f"{kind}{ending}" for kind in ("zeros", "ones", "full") for ending in ("_like", "")} | {"new_zeros", "new_ones", "new_full"}
_OVERWRITES = {"copy", "fill", "zero"}
_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "linear": (0, 1), "convolution": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_READS = {"local_scalar_dense", "equal"}  # give a value to Python
_READS_OF_ALL = (Tensor.tolist, Tensor.numpy, Tensor.__array__)  # give values to Python without an operation
MAX_READS = 10_000  # of one run with other values, in which a loop may not end

Kind = Literal["bool", "number"]  # of a value that Python reads
OTHER_VALUES: dict[Kind, Sequence[Callable[[Tensor], Tensor]]] = {
    "bool": (torch.ones_like, torch.zeros_like),
    "number": (lambda x: x + 1, lambda x: x - 1),
}


class InputDependence(DispatchMode):
    """While it is active, each operation marks the elements of its result that depend on the inputs of a model.

    An element is unmarked if it is computed from parameters, buffers and constants alone. Every other tensor counts as an input, wherever
    it comes from. Zero times anything is zero, and the average of equal values, as attention computes it, is this value.

    If Python reads a value that depends on an input, constants that are made afterwards are marked. What else it does with the value, such
    as a branch or a slice, another run with other values (`OTHER_VALUES`) shows.

    Args:
        model: whose parameters and buffers are no inputs.
        kind: of the values that depend on the inputs and that Python reads otherwise.
        change: the tensor of which it reads them instead.

    Example:
        >>> from blockprune.export.input_dependence import InputDependence
        >>> layer, x = nn.Linear(2, 3).requires_grad_(False), torch.ones(1, 2)
        >>> _ = layer.weight[1].zero_()
        >>> with InputDependence(layer) as dependence:
        ...     y = layer(x).tanh()
        >>> dependence.marks(y)
        tensor([[ True, False,  True]])
    """

    def __init__(self, model: nn.Module, kind: Kind | None = None, change: Callable[[Tensor], Tensor] = torch.clone) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads: dict[Kind, int] = {"bool": 0, "number": 0}  # how often Python has read values that depend on the inputs
        self._used: set[int] = set()  # the storages that operations have used
        self._kind, self._change, self._reads_of_all = kind, change, _ReadsOfAll(self)
        self._records: dict[int, tuple[Tensor, Tensor]] = {}  # by storage: a tensor that keeps it, and the mark of each element
        self._averages: set[int] = set()  # the storages of results of softmax
        self._paused = False
        for tensor in (*model.parameters(), *model.buffers()):
            self._record(tensor, marked=False)

    @property
    def has_other_values(self) -> bool:
        """Whether Python reads other values than the tensors have."""
        return self._kind is not None

    def marks(self, x: Tensor) -> Tensor:
        """Which elements of a tensor depend on the inputs: bool, with the shape of the tensor."""
        owner, marks = self._records.get(storage_id(x)) or self._record(x, marked=True)
        if owner.element_size() != x.element_size():  # a view as another type
            return marks.any().expand(x.shape)
        return marks.as_strided(x.shape, x.stride(), x.storage_offset())

    def uses(self, x: Tensor) -> bool:
        """Whether an operation has used a tensor or a view of it."""
        return storage_id(x) in self._used

    def paused(self, function: Any, *args: Any) -> Any:
        """Call a function whose operations are not followed."""
        before, self._paused = self._paused, True
        try:
            return function(*args)
        finally:
            self._paused = before

    def __enter__(self) -> "InputDependence":
        self._reads_of_all.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._reads_of_all.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Run one operation, and mark the elements of its result."""
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        name, writes = _name(func), writes_arguments(func)
        inputs = _tensors(args[1:] if writes and name in _OVERWRITES else (args, {key: x for key, x in kwargs.items() if key != "out"}))
        self._used.update(map(storage_id, _tensors((args, kwargs))))
        marks = [self.marks(x) for x in inputs]
        marked = any(bool(m.any()) for m in marks)
        if name in _READS and marked:
            return self.read(args[0] if name == "local_scalar_dense" else torch.tensor(func(*args, **kwargs), device="cpu")).item()
        is_attention = name.startswith("scaled_dot_product")  # tagged as random because of dropout, after which values differ anyway
        is_random = (torch.Tag.nondeterministic_seeded in func.tags and not is_attention) or "empty" in name
        may_differ = is_random or (any(self.reads.values()) and _uses_numbers(func, args, kwargs))
        marked |= may_differ
        first = None if may_differ else torch.tensor(False, device="cpu")  # None stands for a result of which all elements are marked
        if marked and not may_differ:
            average = bool(inputs) and storage_id(inputs[0]) in self._averages
            first = _result_marks(_Operation(func, args, kwargs, inputs, marks, average))
        output = func(*args, **kwargs)
        results = _tensors(output)
        for number, y in enumerate(results):
            if writes or storage_id(y) not in self._records:
                self._mark(y, first if number == 0 and first is not None else torch.tensor(marked, device="cpu"))
        if writes and not results:
            for x in _tensors((args, kwargs)):
                self._mark(x, torch.tensor(marked, device="cpu"))
        if name in ("softmax", "safe_softmax") or (name in _COPIES and storage_id(inputs[0]) in self._averages):
            self._averages.add(storage_id(results[0]))
        return output

    def _record(self, x: Tensor, *, marked: bool) -> tuple[Tensor, Tensor]:
        elements = x.untyped_storage().nbytes() // x.element_size()
        self._records[storage_id(x)] = x, torch.full((elements,), marked, device=x.device)
        return self._records[storage_id(x)]

    def _mark(self, x: Tensor, marks: Tensor) -> None:
        self.marks(x).copy_(marks.to(x.device).expand(x.shape))

    def read(self, x: Tensor) -> Tensor:
        """What Python reads of a tensor, with another value if it depends on the inputs."""
        if not self.marks(x).any():
            return x
        kind: Kind = "bool" if x.dtype == torch.bool else "number"
        self.reads[kind] += 1
        if self.has_other_values and sum(self.reads.values()) > MAX_READS:
            raise RuntimeError("a loop does not end with these values")
        return self._change(x) if kind == self._kind else x


class _ReadsOfAll(TorchFunctionMode):
    """Shows `InputDependence` what Python reads of a tensor as a whole, as by ``tolist``, which is no operation."""

    def __init__(self, dependence: InputDependence) -> None:
        super().__init__()
        self._dependence = dependence

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS_OF_ALL:
            args = (self._dependence.paused(self._dependence.read, args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _name(func: Any) -> str:
    """The name of an operation, the same for its variant in place."""
    return str(func.overloadpacket.__name__).strip("_")


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _uses_numbers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether numbers of Python are in the result: in a new tensor, or in a sum or product with a number."""
    if not _tensors((args, kwargs)) or _name(func) in _LIKE | _OVERWRITES:
        return True
    return _is_elementwise(func) and any(isinstance(x, (int, float, complex)) for x in tree_leaves((args, kwargs)))


def _is_elementwise(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags or _name(func) in ("masked_fill", "prelu_kernel")


@attrs.frozen(eq=False)
class _Operation:
    """One operation, its input tensors and their marks, and whether the first of them is a result of softmax."""

    func: Any
    args: Sequence[Any]
    kwargs: Any
    inputs: Sequence[Tensor]
    marks: Sequence[Tensor]
    average: bool

    @property
    def nonzero(self) -> list[Tensor]:
        """Which elements of each input are not zero, or not always."""
        return [(x != 0) | m for x, m in zip(self.inputs, self.marks, strict=True)]


def _result_marks(op: _Operation) -> Tensor | None:
    """The marks of the first result of an operation, which can be expanded to its shape; None if all elements are marked."""
    name = _name(op.func)
    rules = {
        **dict.fromkeys(_LIKE, lambda op: torch.tensor(False, device="cpu")),
        **dict.fromkeys(_COPIES, lambda op: op.marks[0]),
        **dict.fromkeys(_PRODUCTS, _product_marks),
        **dict.fromkeys(_MOVES, _moved_marks),
        **dict.fromkeys(("native_batch_norm", "native_batch_norm_legit_no_training"), _batch_norm_marks),
        "embedding": lambda op: op.marks[0].any(0) | (op.inputs[0].amax(0) != op.inputs[0].amin(0)),
        "sum": lambda op: op.func(op.nonzero[0].float(), *op.args[1:]) > 0,  # a sum of equal values depends on their number
    }
    if name == "mul" and len(op.inputs) == 2:
        return (op.marks[0] & op.nonzero[1]) | (op.nonzero[0] & op.marks[1])
    if name in _OVERWRITES or _is_elementwise(op.func):
        return torch.stack(torch.broadcast_tensors(*op.marks)).any(0)
    rule = _attention_marks if name.startswith("scaled_dot_product") else rules.get(name)
    try:
        return rule(op) if rule else None
    except Exception:  # an operation with other arguments than usual
        return None


def _product_marks(op: _Operation) -> Tensor:
    name, nonzero = _name(op.func), op.nonzero
    a, b = _PRODUCTS[name]
    product = {"addmm": torch.mm, "baddbmm": torch.bmm, "linear": lambda x, y: x @ y.mT}.get(name, op.func)
    options = (None, *op.args[3:]) if name == "convolution" else ()
    products = [product(x.float(), y.float(), *options) for x, y in ((op.marks[a], nonzero[b]), (nonzero[a], op.marks[b]))]
    marks: Tensor = products[0] + products[1] > 0
    if name == "bmm" and op.average and (op.inputs[0].sum(-1) - 1).abs().max() < 1e-3:
        marks &= ~_equal_rows(op.inputs[1], op.marks[1])
    if len(op.marks) == 2:
        return marks
    bias = op.marks[3 - a - b]
    return marks | (bias.view(-1, *[1] * (marks.ndim - 2)) if name == "convolution" else bias)


def _moved_marks(op: _Operation) -> Tensor | None:
    """The marks that an operation moves like elements; None if its indices are marked."""
    name, remaining = _name(op.func), iter(op.marks)
    if name in ("cat", "stack"):
        args = tree_map_only(Tensor, lambda _: next(remaining).float(), tuple(op.args))
    elif any(bool(m.any()) for m in op.marks[1:]):
        return None
    else:
        args = (op.marks[0].float(), *op.args[1:])
    moved = _tensors(op.func(*(args if name != "constant_pad_nd" else args[:2]), **op.kwargs))[0]
    return moved > 0


def _batch_norm_marks(op: _Operation) -> Tensor | None:
    of_batch = _name(op.func) == "native_batch_norm" and op.args[5]
    return None if of_batch or any(bool(m.any()) for m in op.marks[1:]) else op.marks[0]


def _attention_marks(op: _Operation) -> Tensor:
    queries, value = op.inputs[0], op.inputs[2]
    return ~_equal_rows(value, op.marks[2]).repeat_interleave(queries.shape[1] // value.shape[1], dim=1)


def _equal_rows(x: Tensor, marks: Tensor) -> Tensor:
    """In which columns of ``[..., rows, columns]`` all rows are equal and unmarked: bool ``[..., 1, columns]``."""
    return (x.amax(-2, keepdim=True) == x.amin(-2, keepdim=True)) & ~marks.any(-2, keepdim=True)
