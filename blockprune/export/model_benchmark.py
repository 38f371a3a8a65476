"""Whole models timed against the fastest dense form of a model, all interleaved."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn

from blockprune.core._compat import tree_leaves
from blockprune.core.arguments import check_counts
from blockprune.core.precision import multiplies_bfloat16
from blockprune.core.table import Rows, Table
from blockprune.core.types import BlockMask
from blockprune.export.backend_choice import fixed_backend
from blockprune.export.choice_table import backends
from blockprune.export.conversion import convert, dense
from blockprune.export.dense_baselines import PackedLinear, dynamic_int8, has_dynamic_int8, int8_bytes, is_int8, onednn_packed, rowwise_int8
from blockprune.export.ops import int8_backend
from blockprune.export.semi_structured import SemiStructuredLinear
from blockprune.export.sparse_layers import BlockSparseLinear, Int8BlockSparseLinear
from blockprune.export.timing import cuda_graphed, median_seconds, synchronized
from blockprune.model.apply import apply_masks
from blockprune.model.calibration import Forward, default_forward
from blockprune.model.mask_reading import parameter_masks
from blockprune.model.parameters import check_all_loaded, is_exported
from blockprune.model.running import copy_batch
from blockprune.model.sharding import check_not_fully_sharded

INT8_FORMS = ("dense int8", "dense int8, row by row")  # torch's, and that of block-sparse layers
SPARSITIES = (0.5, 0.75, 0.9, 0.95)  # tried, with the same blocks, where a model is not faster than dense

Timer = Callable[[Mapping[str, nn.Module]], dict[str, float]]  # models -> milliseconds of a call, by name


@attrs.frozen
class ModelSpeed:
    """The speed of one model.

    Args:
        name: of the model.
        dtype: the type of its weights, such as "float32" or "int8".
        milliseconds: of a call.
        inputs_per_second: the first axis of the inputs counts.
        mebibytes: of parameters and buffers.
        speedup_same_dtype: against the fastest dense model of the same type.
        speedup: against the fastest dense model of any type.

    Example:
        >>> from blockprune import export
        >>> export.ModelSpeed("mine", "float32", 2.0, 500.0, 1.5, 2.0, 1.0).cells
        ('mine', 'float32', '2.00', '500', '1.5', '2.00x', '1.00x')
    """

    name: str
    dtype: str
    milliseconds: float
    inputs_per_second: float
    mebibytes: float
    speedup_same_dtype: float
    speedup: float

    @property
    def cells(self) -> tuple[str, ...]:
        speedups = f"{self.speedup_same_dtype:.2f}x", f"{self.speedup:.2f}x"
        return self.name, self.dtype, f"{self.milliseconds:.2f}", f"{self.inputs_per_second:,.0f}", f"{self.mebibytes:,.1f}", *speedups


@attrs.frozen(repr=False)
class SpeedComparison(Table):
    """A table of models, dense ones first, and a verdict; it prints in a terminal and renders in a notebook.

    Example:
        >>> from blockprune import export
        >>> export.SpeedComparison((export.ModelSpeed("mine", "float32", 2.0, 500.0, 1.5, 2.0, 1.0),), "It is faster.")
        model    dtype  ms per call  inputs/s  MiB  vs dense of its dtype  vs fastest dense
        mine   float32         2.00       500  1.5                  2.00x             1.00x
        It is faster.
    """

    rows: tuple[ModelSpeed, ...]
    verdict: str

    def table(self) -> Rows:
        head = ("model", "dtype", "ms per call", "inputs/s", "MiB", "vs dense of its dtype", "vs fastest dense")
        return [head, *(row.cells for row in self.rows)]


def benchmark(
    model: nn.Module,
    *others: nn.Module,
    inputs: Any,
    names: Sequence[str] = (),
    forward: Forward = default_forward,
    dtypes: Sequence[str] | None = None,
    compiled: bool = False,
    graph: bool = False,
    rounds: int = 9,
) -> SpeedComparison:
    """Median times of models against the fastest dense form of ``model``: as it is, packed by oneDNN, in bfloat16, in int8, or compiled.

    Dense int8 is torch's dynamic quantization and, where the compiled loops run, the form of `Int8BlockSparseLinear` with all blocks.

    Where a model is not faster, and ``model`` has masks, random masks of the same blocks are timed to say from which sparsity it would be.

    Args:
        model: dense or masked; it is not changed. The others are compared with dense forms of it, with zeros in pruned blocks.
        others: such as exported models.
        inputs: one batch for ``forward``; its floating-point tensors are converted to the type of each model.
        names: of the others; by default "exported" for a model with exported layers, and the name of the class for another.
        forward: (model, batch) -> output, as in `Calibration`.
        dtypes: of the dense forms, of "float32", "bfloat16" and "int8" (of all Linears, which changes the outputs a little, on a CPU); by
            default the type of the model, bfloat16 where the machine has instructions for it, and int8 on a CPU.
        compiled: also time dense models that `torch.compile` compiles with frozen weights; this takes minutes.
        graph: on a GPU, time each model as a CUDA graph replays it.
        rounds: of measurement, of which the median counts.

    Raises:
        ValueError: another number of names than of others, a type that a dense form cannot have, rounds below 1, or a model that
            ``fully_shard`` or ``parallelize_module`` has sharded.

    Example:
        >>> from blockprune import export
        >>> mask = bp.BlockMask(torch.rand(16, 16) > 0.9, bp.BlockGrid((256, 256), (16, 16)))
        >>> model = bp.apply_masks(nn.Sequential(nn.Linear(256, 256)), {"0.weight": mask})
        >>> speed = export.benchmark(model, export.block_sparse(model, backend="torch"), inputs=torch.randn(8, 256), rounds=1)
        >>> [row.name for row in speed.rows][0], speed.rows[-1].name
        ('dense', 'exported')
    """
    if names and len(names) != len(others):
        raise ValueError(f"names has {len(names)} entries for {len(others)} models; give one name for each, or none")
    (rounds,) = check_counts(1, rounds=rounds)
    check_not_fully_sharded(model, "benchmark times copies of the model", nor_dtensors=True)
    check_all_loaded(model, "benchmark")
    plain = dense(model)
    baselines = _dense_baselines(plain, dtypes, compiled)
    if dtypes is None:
        unfit = [name for name in baselines if name in INT8_FORMS and not _runs(baselines[name], forward, inputs)]
        baselines = {name: baseline for name, baseline in baselines.items() if name not in unfit}  # the model reads weights of Linears
    named = _named(others, names, baselines)
    timer = partial(_milliseconds, inputs=inputs, forward=forward, graph=graph, rounds=rounds)
    models = {**baselines, **named}
    ms, batch_size = timer(models), _batch_size(inputs)
    fastest = min(baselines, key=ms.__getitem__)
    labels = {name: _label(compared) for name, compared in models.items()}
    fastest_of_dtype = {
        label: min((name for name in baselines if labels[name] == label), key=ms.__getitem__) for label in set(map(labels.get, baselines))
    }
    rows, sentences = [], []
    for name, compared in models.items():
        rival = fastest_of_dtype.get(labels[name], fastest)
        speedups = ms[rival] / ms[name], ms[fastest] / ms[name]
        rows.append(ModelSpeed(name, labels[name], ms[name], 1e3 * batch_size / ms[name], _mebibytes(compared), *speedups))
        if name in named:
            sentences += [_sentence(rows[-1], rival, fastest), _dense_sentence(name, compared, plain, model)]
            if rows[-1].speedup_same_dtype <= 1:
                sentences.append(_sparsity_sentence(model, compared, ms[rival], timer))
    return SpeedComparison(tuple(rows), " ".join(filter(None, sentences)) or f"The fastest model is {fastest}.")


def _dense_baselines(plain: nn.Module, dtypes: Sequence[str] | None, compiled: bool) -> dict[str, nn.Module]:
    on_cpu = all(p.device.type == "cpu" for p in plain.parameters())
    own = _dtype_name(_dtype(plain))
    wanted = _default_dtypes(own, on_cpu) if dtypes is None else tuple(dtypes)
    if not wanted:
        raise ValueError(f"dtypes is empty; give at least one type of a dense form, such as {own!r}")
    *known, last = dict.fromkeys((own, "float32", "bfloat16", "int8"))
    if unknown := [dtype for dtype in wanted if dtype not in (*known, last)]:
        listed = ", ".join(map(repr, known))
        raise ValueError(f"dtypes has {unknown[0]!r}; a dense form of this model is {listed} or {last!r}")
    eager = {"dense": plain} if own in wanted else {}
    eager |= {f"dense {name}": copy.deepcopy(plain).to(getattr(torch, name)) for name in wanted if name not in {own, "int8"}}
    baselines: dict[str, nn.Module] = {}
    for name, baseline in eager.items():
        baselines[name] = baseline
        if on_cpu:
            baselines[f"{name}, oneDNN packed"] = onednn_packed(baseline)
    if "int8" in wanted:
        if has_dynamic_int8():
            baselines[INT8_FORMS[0]] = dynamic_int8(plain)
        if int8_backend(torch.empty(0, dtype=_dtype(plain), device="cpu")) == "native" or not has_dynamic_int8():
            baselines[INT8_FORMS[1]] = rowwise_int8(plain)
    if compiled:
        freezing: Any = {"freezing": True}
        for name, baseline in eager.items():
            baselines[f"{name}, compiled"] = cast(nn.Module, torch.compile(copy.deepcopy(baseline), options=freezing))
    return baselines


def _default_dtypes(own: str, on_cpu: bool) -> tuple[str, ...]:
    bfloat16 = ("bfloat16",) if own == "float32" and (multiplies_bfloat16() or not on_cpu) else ()
    return own, *bfloat16, *(("int8",) if on_cpu and has_dynamic_int8() else ())


def _runs(model: nn.Module, forward: Forward, inputs: Any) -> bool:
    try:
        with torch.no_grad():
            forward(model, copy_batch(inputs, _dtype(model)))
    except Exception:
        return False
    return True


def _label(model: nn.Module) -> str:
    return "int8" if is_int8(model) else _dtype_name(_dtype(model))


def _named(models: Sequence[nn.Module], names: Sequence[str], taken: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The models by name; a name that is already taken gets a number."""
    named: dict[str, nn.Module] = {}
    for model, name in zip(models, names or map(_default_name, models), strict=True):
        named[name if name not in {**taken, **named} else f"{name} {len(named) + 1}"] = model
    return named


def _default_name(model: nn.Module) -> str:
    return "exported" if any(map(is_exported, model.modules())) else type(model).__name__


def _milliseconds(models: Mapping[str, nn.Module], *, inputs: Any, forward: Forward, graph: bool, rounds: int) -> dict[str, float]:
    """Median milliseconds of a call of each model, by name."""
    calls = {}
    with torch.no_grad():
        for name, model in models.items():
            device = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0, device="cpu")).device
            call = partial(forward, model, copy_batch(inputs, _dtype(model)))
            calls[name] = synchronized(cuda_graphed(call) if graph and device.type == "cuda" else call, device)
        return {name: 1e3 * seconds for name, seconds in median_seconds(calls, rounds=rounds).items()}


def _sentence(speed: ModelSpeed, rival: str, fastest: str) -> str:
    if speed.speedup_same_dtype > 1:
        faster = f"{speed.name} is {speed.speedup_same_dtype:.2f} times as fast as the fastest {speed.dtype} dense model ({rival})."
        return faster if speed.speedup > 1 else f"{faster} {fastest} is faster: it takes {speed.speedup:.2f} times as long."
    return f"{speed.name} is not faster than dense: it is {speed.speedup_same_dtype:.2f} times as fast as {rival}."


def _dense_sentence(name: str, compared: nn.Module, plain: nn.Module, model: nn.Module) -> str:
    """That no masked layer became block-sparse, if a model has the parameters of the dense one; otherwise empty."""
    masks = parameter_masks(model)
    shapes, dense_shapes = ({key: p.shape for key, p in m.named_parameters()} for m in (compared, plain))
    if not masks or shapes != dense_shapes:
        return ""
    return f"0 of {len(masks)} masked layers of {name} are block-sparse; print(choose(model)) lists the reason for each layer."


def _sparsity_sentence(model: nn.Module, compared: nn.Module, dense_ms: float, timer: Timer) -> str:
    """From which sparsity random masks in the same blocks are faster than dense; empty if the model has no masks."""
    masks, generator = parameter_masks(model), torch.Generator().manual_seed(0)
    if not masks:
        return ""
    speedup = 0.0
    backend = next(row.name for row in backends().rows if row.available)
    for sparsity in SPARSITIES:
        random = {
            name: BlockMask(torch.rand(m.grid.size, generator=generator, device="cpu") >= sparsity, m.grid) for name, m in masks.items()
        }
        masked = apply_masks(copy.deepcopy(model), random)
        choices = fixed_backend(masked, backend, dtype="int8" if is_int8(compared) else None, max_error=math.inf)
        sparser = convert(masked, choices)[0].to(_dtype(compared))
        speedup = dense_ms / timer({"sparser": sparser})["sparser"]
        if speedup > 1:
            return f"The same blocks would be faster at {sparsity:.0%} pruned: {speedup:.2f} times as fast."
    return f"The same blocks would not be faster at {SPARSITIES[-1]:.0%} pruned either: {speedup:.2f} times as fast."


def _dtype(model: nn.Module) -> torch.dtype:
    int8 = next((module.like.dtype for module in model.modules() if isinstance(module, Int8BlockSparseLinear)), None)
    sparse_layers = BlockSparseLinear, SemiStructuredLinear
    sparse = int8 or next((module.values.dtype for module in model.modules() if isinstance(module, sparse_layers)), None)
    return sparse or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mebibytes(model: nn.Module) -> float:
    packed = [module.plain for module in model.modules() if isinstance(module, PackedLinear)]
    layers = [module for module in model.modules() if isinstance(module, (BlockSparseLinear, SemiStructuredLinear))]
    constants: list[Tensor] = [getattr(layer, name) for layer in layers for name in layer.constants]
    nbytes = {x.data_ptr(): x.nbytes for x in [*model.parameters(), *model.buffers(), *packed, *constants]}
    return (sum(nbytes.values()) + int8_bytes(model)) / 2**20


def _batch_size(inputs: Any) -> int:
    """The length of the first axis of the first tensor."""
    first = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    return first.shape[0] if first is not None and first.ndim else 1
