"""Which backend runs each masked layer: the one that was measured to be fastest, with the measurements as the reason."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn

from blockprune.core.arguments import check_counts, check_function, check_number
from blockprune.core.progress import progress_bar
from blockprune.export import semi_structured, triton_launch
from blockprune.export.candidates import Candidate, find_candidates
from blockprune.export.choice_table import Choice, Choices, backends, warn_if_all_dense
from blockprune.export.dense_baselines import dense_int8_kernels, dense_layer_calls
from blockprune.export.ops import BACKENDS, int8_backend
from blockprune.export.packing import pack_int8, pack_weight
from blockprune.export.quantization import is_quantizable, output_error, wants_int8
from blockprune.export.sparse_convs import sparse_layer_like
from blockprune.export.timed_layers import DEFAULT_ROWS
from blockprune.export.timing import cold_copies, time_interleaved
from blockprune.model.apply import finalize
from blockprune.model.calibration import Forward, default_forward
from blockprune.model.running import copy_batch, preserve_state, warn_of_writes

MAX_ERROR = 0.03  # relative, of a layer's outputs in int8; dense SmolLM2 then has 0.8 % more perplexity, and 3.4 % without a limit
INT8_BACKENDS = ("native", "torch", "dense")
_DEVICES = {"native": "cpu", "triton": "cuda"}  # the only device on which a backend is measured; the others run on all

_INT8_KERNELS = tuple(f"{backend} int8" for backend in INT8_BACKENDS)
_ERROR_ROWS = 256  # at least, on which the error of int8 is measured

Calls = dict[str, list[Callable[[], Any]]]  # by name of the kernel, one call for each copy of the weight


def choose(
    model: nn.Module,
    *,
    dtype: str | torch.dtype | None = None,
    max_error: float = MAX_ERROR,
    inputs: Any = None,
    rows: int = DEFAULT_ROWS,
    forward: Forward = default_forward,
    training: bool = False,
    graph: bool = False,
    rounds: int = 9,
    progress: bool | None = None,
) -> Choices:
    """Time every masked layer dense and block-sparse, on inputs of the size that it gets, and choose the faster one.

    Layers that are alike (shape, blocks, sparsity to 2 %, inputs) are timed once, on more copies than the caches hold, as in a model. A
    layer becomes block-sparse if that is faster than what torch would run otherwise (F.linear, or the convolution as it is). Another dense
    form (weights packed by oneDNN, channels last) may be faster still: the reason compares with the fastest one, too. If every layer stays
    dense, a warning says so.

    With ``dtype="int8"`` a Linear on a CPU may also run in int8, block-sparse or with all blocks ("dense int8"), if that is the fastest and
    its outputs are precise enough. Weights have a scale for each output, and inputs one for each row, found while the model runs.

    With ``training=True``, the forward pass and the gradients of the input, the weight and the bias are timed together, and a layer is
    block-sparse if that is faster than the masked layer, which would train otherwise. The time of the layer without its mask is there, too.

    Args:
        model: with masks; it is not changed.
        dtype: "int8", or None for the type of the weights.
        max_error: for int8: a layer stays in the type of its weight if ``|y_int8 - y| / |y|`` is larger, with y its product with ``inputs``
            (or with normal random numbers), without the bias. If it is called several times, its largest error counts.
        inputs: one batch for ``forward``; if it calls a layer several times, the last call counts, and a call without rows, as of an expert
            that gets no token, never does. Without it, every Linear is timed on ``rows`` rows, and convolutions stay dense.
        rows: input rows of a layer in one call, such as batch x tokens.
        forward: (model, batch) -> output, as in `Calibration`.
        training: time a step of training instead of the forward pass.
        graph: on a GPU, time layers as a CUDA graph replays them, for models that run so (``mode="reduce-overhead"`` of `torch.compile`);
            by default, launching the kernels from Python is part of the time.
        rounds: of measurement, of which the median counts.
        progress: show a progress bar; by default in a terminal and in a notebook.

    Raises:
        ValueError: a model without masks, rows below 1, another dtype, or a max_error that is not above 0; int8 or a CUDA graph for
            training.

    Example:
        >>> import warnings
        >>> from blockprune import export
        >>> warnings.simplefilter("ignore")  # on some machines so small a layer stays dense
        >>> mask = bp.BlockMask(torch.rand(16, 16) > 0.9, bp.BlockGrid((256, 256), (16, 16)))
        >>> choices = export.choose(bp.apply_masks(nn.Linear(256, 256), {"weight": mask}), rows=32, progress=False)
        >>> choices.rows[0].name, choices.rows[0].backend in ("native", "torch", "dense")
        ('weight', True)
    """
    rows, rounds = check_counts(1, rows=rows, rounds=rounds)
    check_function("forward", forward, "(model, batch) -> output")
    int8, masked = _int8_option(dtype, max_error), list(find_candidates(model))
    if training and (int8 or graph):
        raise ValueError(
            "training=True goes with neither dtype='int8' nor graph=True: int8 does not train, and a step is not timed as a graph"
        )
    recorded, reads_weight, errors = _record_inputs(model, masked, inputs, forward, int8) if inputs is not None else ({}, set(), {})
    choices, timed = [], {}
    for candidate in progress_bar(masked, "choose", progress):
        x = recorded.get(candidate.layer) if inputs is not None else _random_inputs(candidate, rows)
        reason = candidate.unsupported_reason or ("the model reads the weight itself" if candidate.layer in reads_weight else "")
        if not reason and x is None:
            reason = "inputs do not reach it" if inputs is not None else "a convolution is timed only on real inputs; give inputs="
        if reason or x is None:
            choices.append(Choice(candidate.name, candidate.sparsity, "dense", reason))
            continue
        if int8 and candidate.layer not in errors:
            errors[candidate.layer] = _int8_error(candidate, x)
        error = errors.get(candidate.layer)
        obstacle = _int8_obstacle(error, max_error) if int8 else ""
        if int8 and x.device.type != "cpu":
            obstacle = f"int8 has no kernel for {x.device.type}"
        with_int8 = int8 and not obstacle
        key = _timing_key(candidate, x), with_int8
        if key not in timed:
            if training:
                with torch.inference_mode(False):
                    timed[key] = _time_steps(candidate, x.clone(), rounds)
            else:
                timed[key] = _time_kernels(candidate, x, rounds, graph, with_int8)
        choice = _fastest_choice(candidate, timed[key], x, error, obstacle)
        choices.append(attrs.evolve(choice, reason=choice.reason + _error_note(inputs, error)))
    warn_if_all_dense(Choices(tuple(choices)))
    return Choices(tuple(choices))


def fixed_backend(
    model: nn.Module,
    backend: str,
    *,
    dtype: str | torch.dtype | None = None,
    max_error: float = MAX_ERROR,
    inputs: Any = None,
    rows: int = DEFAULT_ROWS,
    forward: Forward = default_forward,
) -> Choices:
    """The choice of one backend for every layer that has a block-sparse form. The options are those of `choose`.

    Raises:
        ValueError: a model without masks, an unknown backend, or one that has no int8; an option that `choose` refuses.
        RuntimeError: a backend that this machine does not have.

    Example:
        >>> from blockprune.export.backend_choice import fixed_backend
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> fixed_backend(bp.apply_masks(nn.Linear(4, 2), {"weight": mask}), "torch")
        parameter  pruned  backend        reason
        weight      50.0%    torch  as requested
    """
    (rows,) = check_counts(1, rows=rows)
    by_name = {row.name: row for row in backends().rows}
    if not isinstance(backend, str) or backend not in by_name:
        raise ValueError(f"backend={backend!r} must be 'auto', one of {', '.join(map(repr, by_name))}, or the result of choose(model)")
    if not by_name[backend].available:
        raise RuntimeError(f"backend={backend!r} is not available: {by_name[backend].reason}; backend='torch' always is")
    int8, masked = _int8_option(dtype, max_error), list(find_candidates(model))
    if int8 and backend not in INT8_BACKENDS:
        names = ", ".join(map(repr, INT8_BACKENDS))
        raise ValueError(f"backend={backend!r} has no product with int8 weights; dtype='int8' goes with 'auto', {names}")
    errors = _record_inputs(model, masked, inputs, forward, int8)[2] if int8 and inputs is not None else {}
    choices = []
    for candidate in masked:
        reason = candidate.unsupported_reason
        if not reason and backend == "2:4" and not semi_structured.is_supported(candidate.weight):
            reason = f"not {semi_structured.REQUIREMENT}"
        choice = Choice(candidate.name, candidate.sparsity, "dense" if reason else backend, reason or "as requested")
        if int8 and not reason:
            unreached = inputs is not None and candidate.layer not in errors
            error = errors.get(candidate.layer) if inputs is not None else _int8_error(candidate, _random_inputs(candidate, rows))
            obstacle = "inputs do not reach it" if unreached else _int8_obstacle(error, max_error)
            note = _error_note(inputs, error) if max_error < math.inf else ""
            choice = attrs.evolve(choice, error=error, dtype="" if obstacle else "int8", reason=(obstacle or choice.reason) + note)
        choices.append(choice)
    return Choices(tuple(choices))


def _int8_option(dtype: str | torch.dtype | None, max_error: float) -> bool:
    meaning = f"a number above 0, the largest relative error of a layer's outputs in int8: {MAX_ERROR}"
    check_number("max_error", max_error, meaning, above=0, finite=False)
    return wants_int8(dtype)


def _int8_error(candidate: Candidate, x: Tensor | None) -> float | None:
    """The relative error of a layer's outputs in int8 on some rows of ``x [..., columns]``; NaN if a weight is not finite.

    None for a convolution.
    """
    weight = candidate.weight
    if weight.ndim != 2 or x is None:
        return None
    sample = x.detach().reshape(-1, weight.shape[1])
    if not is_quantizable(weight):
        return math.inf if bool(weight.isfinite().all()) else math.nan
    return output_error(sample[:: max(1, len(sample) // _ERROR_ROWS)], weight)


def _error_note(inputs: Any, error: float | None) -> str:
    """What a reason says of an error that was not measured on real inputs."""
    return "; error on random inputs: give inputs= for that on real ones" if inputs is None and error is not None else ""


def _int8_obstacle(error: float | None, max_error: float) -> str:
    """Why a layer stays in the type of its weight; empty if it may run in int8."""
    if error is None:
        return "a convolution has no int8 form"
    if math.isnan(error):
        return "its weight or all its inputs are not finite, so its error in int8 is not known"
    return "" if error <= max_error else f"its error in int8, {error:.2%}, is above max_error={max_error:.2%}"


def _record_inputs(
    model: nn.Module, masked: Iterable[Candidate], batch: Any, forward: Forward, int8: bool
) -> tuple[dict[str, Tensor], set[str], dict[str, float | None]]:
    """Random inputs of the shape that each layer gets, by the layer's name; the layers whose weight the model also reads itself; and, if
    asked for, the errors in int8.

    Of several calls the last one counts: after a prompt, that is the call for the next token. Of errors the largest counts, and one that is
    not known does not. Calls without rows do not count.
    """
    recorded: dict[str, Tensor] = {}
    errors: dict[str, float | None] = {}
    calls: dict[str, int] = defaultdict(int)
    reads: dict[str, int] = defaultdict(int)

    def record_call(candidate: Candidate, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name, x = candidate.layer, args[0] if args else kwargs["input"]
        calls[name] += 1
        if candidate.unsupported_reason or not x.numel():  # such as an Embedding, whose inputs are integers; an expert without tokens
            return
        recorded[name] = torch.empty_like(x, dtype=candidate.ref.stored.dtype)  # under autocast inputs may have another type
        if int8:
            error = _int8_error(candidate, x)
            known = [e for e in (errors.get(name), error) if e is not None and not math.isnan(e)]
            errors[name] = max(known, default=error)
            reads[name] = max(0, reads[name] - 1)  # that was the read of `_int8_error`

    def record_read(name: str, *_: Any) -> None:
        reads[name] += 1

    handles = []
    try:
        for candidate in masked:
            handles.append(candidate.module.register_forward_pre_hook(partial(record_call, candidate), with_kwargs=True))
            if candidate.ref.mask is not None:
                handles.append(candidate.ref.mask.register_forward_hook(partial(record_read, candidate.layer)))
        with preserve_state(model), warn_of_writes(model), torch.no_grad():
            forward(model, copy_batch(batch))
    finally:
        for handle in handles:
            handle.remove()
    return {name: _filled(x) for name, x in recorded.items()}, {name for name in reads if reads[name] > calls[name]}, errors


def _random_inputs(candidate: Candidate, rows: int) -> Tensor | None:
    stored = candidate.ref.stored
    return _filled(torch.empty(rows, stored.shape[1], dtype=stored.dtype, device=stored.device)) if stored.ndim == 2 else None


def _filled(x: Tensor) -> Tensor:
    """The tensor with normal random numbers; torch's own stay as they are."""
    return x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu"))


def _timing_key(candidate: Candidate, x: Tensor) -> tuple[Any, ...]:
    """What the time of a layer depends on."""
    layer = candidate.module
    options = (layer.kernel_size, layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else ()
    two_of_four = semi_structured.is_supported(candidate.weight)
    return candidate.mask.grid, round(candidate.sparsity * 50), x.shape, x.stride(), x.dtype, x.device, options, two_of_four


def _time_kernels(candidate: Candidate, x: Tensor, rounds: int, graph: bool, int8: bool) -> dict[str, float]:
    """Median milliseconds of each dense and sparse kernel, first the one that a plain layer runs."""
    calls = _dense_calls(candidate, x) | _sparse_calls(candidate, x, graph) | _two_of_four_calls(candidate, x)
    if int8:
        calls |= _int8_calls(candidate, x)
    with torch.no_grad():
        return {name: 1e3 * seconds for name, seconds in time_interleaved(calls, x.device, graph=graph, rounds=rounds).items()}


def _time_steps(candidate: Candidate, x: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of a forward and a backward pass: first of the masked layer, then of a plain one and of block-sparse ones."""
    plain, packed = finalize(candidate.module), pack_weight(candidate.weight, candidate.mask)
    layers: dict[str, Callable[[], nn.Module]] = {
        "masked": partial(copy.deepcopy, candidate.module),
        "unmasked": partial(copy.deepcopy, plain),
    }
    for name in _backends_on(x.device):
        layers[name] = partial(copy.deepcopy, sparse_layer_like(plain, packed, name, trainable=True))
    calls = {name: [_training_step(make(), x) for _ in _copies(candidate, x, packed.values.nbytes)] for name, make in layers.items()}
    with torch.enable_grad():
        return {name: 1e3 * seconds for name, seconds in time_interleaved(calls, x.device, rounds=rounds).items()}


def _training_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """A call that computes a layer's output and the gradients of its input and parameters."""
    layer.requires_grad_()
    x = x.detach().clone().requires_grad_()
    with torch.no_grad():
        grad = _filled(torch.empty_like(layer(x)))

    def step() -> None:
        torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)

    return step


def _backends_on(device: torch.device) -> list[str]:
    """The block-sparse backends of this machine that run on a device."""
    names = (row.name for row in backends().rows if row.available and row.name in BACKENDS)
    return [name for name in names if _DEVICES.get(name, device.type) == device.type]


def _copies(candidate: Candidate, x: Tensor, nbytes: int) -> range:
    """One item for each copy of a weight of ``nbytes`` bytes. On a CPU all kernels have as many copies, because they run in turn."""
    return range(cold_copies(candidate.ref.stored.nbytes if x.device.type == "cpu" else nbytes, x.device))


def _dense_calls(candidate: Candidate, x: Tensor) -> Calls:
    plain = finalize(candidate.module)
    calls: Calls = defaultdict(list)
    for _ in _copies(candidate, x, candidate.ref.stored.nbytes):
        for name, call in dense_layer_calls(cast(Any, copy.deepcopy(plain)), x).items():
            calls[name].append(call)
    return calls


def _sparse_calls(candidate: Candidate, x: Tensor, graph: bool) -> Calls:
    plain, packed = finalize(candidate.module), pack_weight(candidate.weight, candidate.mask)
    calls: Calls = {}
    for name in _backends_on(x.device):
        # The torch backend waits for the device, which a CUDA graph cannot capture.
        if not x.is_cuda or not graph or (name != "torch" and x.dtype in triton_launch.DTYPES):
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


def _int8_calls(candidate: Candidate, x: Tensor) -> Calls:
    calls: Calls = defaultdict(list)
    plain: Any = finalize(candidate.module)
    packed, backend = pack_int8(candidate.weight, candidate.mask), int8_backend(x)
    for _ in _copies(candidate, x, packed.values.nbytes):
        weight = attrs.evolve(packed, values=packed.values.clone(), col=packed.col.clone())
        calls[f"{backend} int8"].append(partial(sparse_layer_like(plain, weight, backend), x))
        for name, call in dense_int8_kernels(x, plain.weight, plain.bias).items():
            calls[name].append(call)
    return calls


def _fastest_choice(candidate: Candidate, milliseconds: Mapping[str, float], x: Tensor, error: float | None, obstacle: str) -> Choice:
    """The fastest kernel that a layer can run; on a tie the first dense one, which the layer would run otherwise."""
    plain, *others = milliseconds
    layers = {plain: ("dense", "")}  # backend and type, by the name of the kernel
    layers |= {name: (name, "") for name in others if name in (*BACKENDS, "2:4")}
    layers |= {name: (name.removesuffix(" int8"), "int8") for name in others if name in _INT8_KERNELS}
    sparse = [name for name, (backend, _) in layers.items() if backend != "dense"]
    choice = partial(Choice, candidate.name, candidate.sparsity, milliseconds=dict(milliseconds), error=error)
    if not sparse:
        return choice("dense", f"there is no sparse kernel for {x.dtype} on {x.device.type} in a CUDA graph")
    fastest, best_sparse = min(layers, key=milliseconds.__getitem__), min(sparse, key=milliseconds.__getitem__)
    best_dense = min((name for name in milliseconds if name not in sparse), key=milliseconds.__getitem__)
    compared = dict.fromkeys((fastest, best_sparse, plain, best_dense))
    times = ", ".join(f"{name} {milliseconds[name]:.3g} ms" for name in compared)
    rivals = dict.fromkeys((plain, plain if plain == "masked" else best_dense))  # a layer that trains with its zeros needs its mask
    speedups = " and ".join(f"{milliseconds[name] / milliseconds[best_sparse]:.2f}x as fast as {name}" for name in rivals)
    reason = f"{best_sparse} is {speedups} on {tuple(x.shape)}: {times}"
    backend, dtype = layers[fastest]
    return choice(backend, f"{obstacle}; {reason}" if obstacle else reason, dtype=dtype)
