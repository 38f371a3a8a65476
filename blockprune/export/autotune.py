"""Which backend runs each masked layer: the one that was measured to be fastest, with the measurements as the reason."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn

from blockprune.core.progress import progress_bar
from blockprune.core.table import Rows, Table
from blockprune.export import semi_structured, triton_launch
from blockprune.export.candidates import Candidate, find_candidates
from blockprune.export.dense_baselines import dense_kernels
from blockprune.export.ops import BACKENDS
from blockprune.export.sparse_layers import pack_weight, sparse_layer_like
from blockprune.export.timing import cold_copies, time_interleaved
from blockprune.model.apply import finalize
from blockprune.model.running import Forward, default_forward, preserve_state
from blockprune.native import spmm

DEFAULT_ROWS = 128  # input rows of a layer in one call, where no inputs are given
_DEVICES = {"native": "cpu", "triton": "cuda"}  # the only device on which a backend is measured; the others run on all

Calls = dict[str, list[Callable[[], Any]]]  # by name of the kernel, one call for each copy of the weight


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
        backend  available       because
        torch          yes  always there
    """

    rows: tuple[Backend, ...]

    def table(self) -> Rows:
        return [("backend", "available", "because"), *(row.cells for row in self.rows)]


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
    """Which backend runs one masked weight: "native", "triton", "2:4", "torch" or "dense".

    Example:
        >>> from blockprune import export
        >>> export.Choice("fc.weight", 0.5, "torch", "as requested").cells
        ('fc.weight', '50.0%', 'torch', 'as requested')
    """

    name: str  # of the parameter
    sparsity: float
    backend: str
    reason: str
    milliseconds: Mapping[str, float] = attrs.field(factory=dict)  # of each kernel that was measured

    @property
    def cells(self) -> tuple[str, ...]:
        return self.name, f"{self.sparsity:.1%}", self.backend, self.reason


@attrs.frozen(repr=False)
class Choices(Table):
    """Which backend runs each masked weight. It prints as a table, and `block_sparse` takes it as its ``backend``.

    Example:
        >>> from blockprune import export
        >>> export.Choices((export.Choice("fc.weight", 0.5, "torch", "as requested"),))
        parameter  pruned  backend       because
        fc.weight   50.0%    torch  as requested
    """

    rows: tuple[Choice, ...]

    def table(self) -> Rows:
        return [("parameter", "pruned", "backend", "because"), *(row.cells for row in self.rows)]


def choose(
    model: nn.Module,
    *,
    inputs: Any = None,
    rows: int = DEFAULT_ROWS,
    forward: Forward = default_forward,
    graph: bool = False,
    rounds: int = 9,
    progress: bool | None = None,
) -> Choices:
    """Time every masked layer dense and block-sparse, on inputs of the size that it gets, and choose the faster one.

    Layers that are alike (shape, blocks, sparsity to 2 %, inputs) are timed once, on more copies than the caches hold, as in a model. A
    layer is block-sparse if that is faster than F.linear, which it would run otherwise; the reason also compares with oneDNN's product of
    packed weights. If every layer stays dense, a warning says so.

    Args:
        model: with masks; it is not changed.
        inputs: one batch for ``forward``; if it calls a layer several times, the last call counts. Without it, every Linear is timed on
            ``rows`` rows, and convolutions stay dense.
        rows: input rows of a layer in one call, such as batch x tokens.
        forward: (model, batch) -> output, as in `Calibration`.
        graph: on a GPU, time layers as a CUDA graph replays them, for models that run so (``mode="reduce-overhead"`` of `torch.compile`);
            by default, launching the kernels from Python is part of the time.
        rounds: of measurement, of which the median counts.
        progress: show a progress bar; by default in a terminal and in a notebook.

    Raises:
        ValueError: a model without masks, or rows below 1.

    Example:
        >>> import warnings
        >>> from blockprune import export
        >>> warnings.simplefilter("ignore")  # on some machines so small a layer stays dense
        >>> mask = bp.BlockMask(torch.rand(16, 16) > 0.9, bp.BlockGrid((256, 256), (16, 16)))
        >>> choices = export.choose(bp.apply_masks(nn.Linear(256, 256), {"weight": mask}), rows=32, progress=False)
        >>> choices.rows[0].name, choices.rows[0].backend in ("native", "torch", "dense")
        ('weight', True)
    """
    if rows < 1:
        raise ValueError(f"rows={rows} must be 1 or more: the number of input rows of a layer in one call")
    masked = list(find_candidates(model))
    recorded, reads_weight = _record_inputs(model, masked, inputs, forward) if inputs is not None else ({}, set())
    choices, timed = [], {}
    for candidate in progress_bar(masked, "choose", progress):
        x = recorded.get(candidate.layer) if inputs is not None else _random_inputs(candidate, rows)
        reason = candidate.unsupported_reason or ("the model reads the weight itself" if candidate.layer in reads_weight else "")
        if not reason and x is None:
            reason = "inputs do not reach it" if inputs is not None else "a convolution is timed only on real inputs; give inputs="
        if reason or x is None:
            choices.append(Choice(candidate.name, candidate.sparsity, "dense", reason))
            continue
        key = _timing_key(candidate, x)
        if key not in timed:
            timed[key] = _time_kernels(candidate, x, rounds, graph)
        choices.append(_fastest_choice(candidate, timed[key], x))
    warn_if_all_dense(Choices(tuple(choices)))
    return Choices(tuple(choices))


def warn_if_all_dense(choices: Choices) -> None:
    """Warn if no layer runs block-sparse, with the reasons of the first ones.

    Example:
        >>> import warnings
        >>> from blockprune.export import Choice, Choices
        >>> from blockprune.export.autotune import warn_if_all_dense
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     warn_if_all_dense(Choices((Choice("fc.weight", 0.5, "dense", "inputs do not reach it"),)))
        >>> print(caught[0].message)
        0 of 1 masked layers became block-sparse (fc.weight: inputs do not reach it); choose(model) lists the reason of each
    """
    if all(choice.backend == "dense" for choice in choices.rows):
        reasons = "; ".join(f"{choice.name}: {choice.reason}" for choice in choices.rows[:3])
        warnings.warn(
            f"0 of {len(choices.rows)} masked layers became block-sparse ({reasons}); choose(model) lists the reason of each", stacklevel=3
        )


def fixed_backend(model: nn.Module, backend: str) -> Choices:
    """The choice of one backend for every layer that has a block-sparse form.

    Raises:
        ValueError: a model without masks, or an unknown backend.
        RuntimeError: a backend that this machine does not have.

    Example:
        >>> from blockprune.export.autotune import fixed_backend
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> fixed_backend(bp.apply_masks(nn.Linear(4, 2), {"weight": mask}), "torch")
        parameter  pruned  backend       because
        weight      50.0%    torch  as requested
    """
    by_name = {row.name: row for row in backends().rows}
    if backend not in by_name:
        raise ValueError(f"backend={backend!r} must be 'auto', one of {', '.join(map(repr, by_name))}, or the result of choose(model)")
    if not by_name[backend].available:
        raise RuntimeError(f"backend={backend!r} is not available: {by_name[backend].reason}; backend='torch' always is")
    rows = []
    for candidate in find_candidates(model):
        reason = candidate.unsupported_reason
        if not reason and backend == "2:4" and not semi_structured.is_supported(candidate.weight):
            reason = f"not {semi_structured.REQUIREMENT}"
        rows.append(Choice(candidate.name, candidate.sparsity, "dense" if reason else backend, reason or "as requested"))
    return Choices(tuple(rows))


def _record_inputs(model: nn.Module, masked: Iterable[Candidate], batch: Any, forward: Forward) -> tuple[dict[str, Tensor], set[str]]:
    """Random inputs of the shape that each layer gets, by the layer's name; and the layers whose weight the model also reads itself.

    Of several calls the last one counts: after a prompt, that is the call for the next token.
    """
    recorded: dict[str, Tensor] = {}
    calls: dict[str, int] = defaultdict(int)
    reads: dict[str, int] = defaultdict(int)

    def record_call(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        recorded[name] = torch.empty_like(args[0] if args else kwargs["input"])
        calls[name] += 1

    def record_read(name: str, *_: Any) -> None:
        reads[name] += 1

    handles = []
    try:
        for candidate in masked:
            handles.append(candidate.module.register_forward_pre_hook(partial(record_call, candidate.layer), with_kwargs=True))
            if candidate.ref.mask is not None:
                handles.append(candidate.ref.mask.register_forward_hook(partial(record_read, candidate.layer)))
        with preserve_state(model), torch.no_grad():
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: x.normal_() for name, x in recorded.items()}, {name for name in reads if reads[name] > calls[name]}


def _random_inputs(candidate: Candidate, rows: int) -> Tensor | None:
    stored = candidate.ref.stored
    return torch.randn(rows, stored.shape[1], dtype=stored.dtype, device=stored.device) if stored.ndim == 2 else None


def _timing_key(candidate: Candidate, x: Tensor) -> tuple[Any, ...]:
    """What the time of a layer depends on."""
    layer = candidate.module
    options = (layer.kernel_size, layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else ()
    two_of_four = semi_structured.is_supported(candidate.weight)
    return candidate.mask.grid, round(candidate.sparsity * 50), x.shape, x.stride(), x.dtype, x.device, options, two_of_four


def _time_kernels(candidate: Candidate, x: Tensor, rounds: int, graph: bool) -> dict[str, float]:
    """Median milliseconds of each dense and sparse kernel, first the one that a plain layer runs."""
    calls = _dense_calls(candidate, x) | _sparse_calls(candidate, x, graph) | _two_of_four_calls(candidate, x)
    with torch.no_grad():
        return {name: 1e3 * seconds for name, seconds in time_interleaved(calls, x.device, graph=graph, rounds=rounds).items()}


def _copies(candidate: Candidate, x: Tensor, nbytes: int) -> range:
    """One item for each copy of a weight of ``nbytes`` bytes. On a CPU all kernels have as many copies, because they run in turn."""
    return range(cold_copies(candidate.ref.stored.nbytes if x.device.type == "cpu" else nbytes, x.device))


def _dense_calls(candidate: Candidate, x: Tensor) -> Calls:
    calls: Calls = defaultdict(list)
    for _ in _copies(candidate, x, candidate.ref.stored.nbytes):
        layer = finalize(candidate.module)
        if isinstance(layer, nn.Conv2d):
            calls["Conv2d"].append(partial(layer, x))
            if x.ndim == 4:
                other = copy.deepcopy(layer).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                calls["Conv2d channels_last"].append(partial(other, x.to(memory_format=torch.channels_last)))
        else:
            for name, call in dense_kernels(x, cast(Tensor, layer.weight), cast(Any, layer.bias)).items():
                calls[name].append(call)
    return calls


def _sparse_calls(candidate: Candidate, x: Tensor, graph: bool) -> Calls:
    plain, packed = finalize(candidate.module), pack_weight(candidate.weight, candidate.mask)
    calls: Calls = {}
    for name in (row.name for row in backends().rows if row.available and row.name in BACKENDS):
        # The torch backend waits for the device, which a CUDA graph cannot capture.
        captured = not x.is_cuda or not graph or (name != "torch" and x.dtype in triton_launch.DTYPES)
        if captured and _DEVICES.get(name, x.device.type) == x.device.type:
            calls[name] = [
                partial(sparse_layer_like(plain, attrs.evolve(packed, values=packed.values.clone(), col=packed.col.clone()), name), x)
                for _ in _copies(candidate, x, packed.values.nbytes)
            ]
    return calls


def _two_of_four_calls(candidate: Candidate, x: Tensor) -> Calls:
    plain = finalize(candidate.module)
    if not (semi_structured.status()[0] and isinstance(plain, nn.Linear) and semi_structured.is_supported(plain.weight)):
        return {}
    layer = semi_structured.SemiStructuredLinear(plain)
    return {"2:4": [partial(copy.deepcopy(layer), x) for _ in _copies(candidate, x, layer.values.nbytes)]}


def _fastest_choice(candidate: Candidate, milliseconds: Mapping[str, float], x: Tensor) -> Choice:
    """The fastest sparse kernel, if it is faster than the first dense one, which a plain layer runs."""
    sparse = {name: ms for name, ms in milliseconds.items() if name in (*BACKENDS, "2:4")}
    dense = {name: ms for name, ms in milliseconds.items() if name not in sparse}
    choice = partial(Choice, candidate.name, candidate.sparsity, milliseconds=dict(milliseconds))
    if not sparse:
        return choice("dense", f"there is no sparse kernel for {x.dtype} on {x.device.type} in a CUDA graph")
    best_sparse, best_dense = min(sparse, key=sparse.__getitem__), min(dense, key=dense.__getitem__)
    sparse_ms, dense_ms = sparse[best_sparse], dense[best_dense]
    reason = f"{dense_ms / sparse_ms:.2f}x on {tuple(x.shape)}: {best_sparse} {sparse_ms:.3g} ms, {best_dense} {dense_ms:.3g} ms"
    return choice(best_sparse if sparse_ms < next(iter(dense.values())) else "dense", reason)
