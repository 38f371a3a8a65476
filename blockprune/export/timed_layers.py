"""Layers with random weights and inputs of the sizes that they get, on which blocks are timed."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockprune.core.grid import BlockGrid
from blockprune.core.types import BlockMask, Masks, Scores
from blockprune.export.candidates import DTYPES, LAYER_TYPES
from blockprune.export.choice_table import backends
from blockprune.export.dense_baselines import dense_int8_kernels, dense_layer_calls
from blockprune.export.ops import int8_backend
from blockprune.export.packing import pack_int8, pack_weight
from blockprune.export.quantization import wants_int8
from blockprune.export.sparse_convs import sparse_layer_like
from blockprune.export.timing import cold_copies, time_interleaved
from blockprune.model.calibration import Forward
from blockprune.model.parameters import ParameterRef, find_parameters, is_exported
from blockprune.model.running import copy_batch, preserve_state, warn_of_writes

DEFAULT_ROWS = 128  # input rows of a layer in one call, where no inputs are given

Calls = dict[Any, list[Callable[[], Any]]]  # by name of a kernel or by mask, a call for each copy of the weight


@attrs.frozen
class TimedLayer:
    """All that the time of a Linear or a Conv2d depends on besides its mask; equal ones are timed once.

    Args:
        weight: the shape of the weight.
        inputs: the shape of what the layer gets in one call.
        dtype, device: of both.
        has_bias: whether there is a bias.
        options: of a Conv2d: stride, padding, dilation and padding_mode, by name.
        channels_last: whether images have their channels last in memory.

    Example:
        >>> from blockprune.export.timed_layers import TimedLayer
        >>> layer, grid = TimedLayer((4, 8), (2, 8), torch.float32, torch.device("cpu")), bp.BlockGrid((4, 8), (2, 2))
        >>> dense_ms, sparse_ms = layer.milliseconds([grid], [0.5], rounds=1)
        >>> dense_ms > 0, list(sparse_ms) == [(grid, 0.5)]
        (True, True)
    """

    weight: tuple[int, ...]
    inputs: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    has_bias: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    channels_last: bool = False

    def tensors(self) -> tuple[nn.Linear | nn.Conv2d, Tensor]:
        """The layer with random weights, and a random input. Torch's random numbers stay as they are."""
        out, features, *kernel = self.weight
        generator, where = torch.Generator().manual_seed(0), {"bias": self.has_bias, "device": self.device, "dtype": self.dtype}
        layer: nn.Linear | nn.Conv2d = (
            torch.nn.utils.skip_init(nn.Conv2d, features, out, kernel, **dict(self.options), **where)
            if kernel
            else torch.nn.utils.skip_init(nn.Linear, features, out, **where)
        )
        for p in layer.requires_grad_(False).parameters():
            p.copy_(torch.randn(p.shape, generator=generator, device="cpu"))
        x = torch.randn(self.inputs, generator=generator, device="cpu").to(self.device, self.dtype)
        return layer, x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def milliseconds(
        self, grids: Sequence[BlockGrid], sparsities: Sequence[float], *, int8: bool = False, graph: bool = False, rounds: int = 9
    ) -> tuple[float, dict[tuple[BlockGrid, float], float]]:
        """The time of the fastest dense kernel, and the times with random masks by grid and sparsity. Convolutions have no int8 form."""
        generator, (plain, x) = torch.Generator().manual_seed(0), self.tensors()
        int8 = int8 and isinstance(plain, nn.Linear)
        backend = next(row.name for row in backends().rows if row.available)
        calls: Calls = defaultdict(list)
        for _ in self._copies(plain.weight.nbytes):
            kernels = dense_layer_calls(copy.deepcopy(plain), x)
            if int8:
                kernels |= dense_int8_kernels(x, plain.weight, cast(Any, plain.bias))
            for name, call in kernels.items():
                calls[name].append(call)
        dense_names = list(calls)
        for grid in grids:
            order = torch.randperm(grid.blocks, generator=generator, device="cpu")
            for sparsity in sparsities:
                mask = BlockMask((order >= round(sparsity * grid.blocks)).view(grid.size), grid)
                packed, name = (pack_int8(plain.weight, mask), int8_backend(x)) if int8 else (pack_weight(plain.weight, mask), backend)
                layer = sparse_layer_like(plain, packed, name)
                calls[grid, sparsity] = [partial(copy.deepcopy(layer), x) for _ in self._copies(packed.values.nbytes)]
        with torch.no_grad():
            seconds = time_interleaved(calls, x.device, graph=graph, rounds=rounds)
        milliseconds = {name: 1e3 * value for name, value in seconds.items()}
        return min(milliseconds.pop(name) for name in dense_names), milliseconds

    def _copies(self, nbytes: int) -> range:
        return range(1 if self.device.type == "cpu" else cold_copies(nbytes, self.device))


def layers_without_model(
    layers: Scores | Masks, rows: int | None, inputs: Any, dtype: torch.dtype | str | None
) -> tuple[dict[str, TimedLayer], bool]:
    """Linears of these shapes by name, and whether they are to run in int8.

    Raises:
        ValueError: no layers, no input rows, a convolution, inputs that do not fit a layer, or options that exclude each other.

    Example:
        >>> from blockprune.export.timed_layers import layers_without_model
        >>> scores = {"fc.weight": bp.BlockScore(torch.rand(2, 2), bp.BlockGrid((4, 8), (2, 4)))}
        >>> layers, int8 = layers_without_model(scores, 16, None, None)
        >>> layers["fc.weight"].weight, layers["fc.weight"].inputs, int8
        ((4, 8), (16, 8), False)
    """
    int8, float_dtype = _types(dtype)
    if inputs is not None:
        if not isinstance(inputs, Tensor) or inputs.dtype not in DTYPES:
            kind = str(inputs.dtype) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ValueError(f"inputs is {kind}; give a floating-point tensor [..., in_features], or model= for a batch of a model")
        if rows is not None or float_dtype not in (None, inputs.dtype):
            raise ValueError(
                f"rows={rows} and dtype={dtype} are given beside inputs {tuple(inputs.shape)} of {inputs.dtype}; leave them out"
            )
        rows, float_dtype = inputs.numel() // max(1, inputs.shape[-1]), inputs.dtype
    rows = DEFAULT_ROWS if rows is None else rows
    if not layers or rows < 1:
        raise ValueError(
            f"there are {len(layers)} layers and {rows} input rows; give at least one layer, and at least one row by rows= or inputs="
        )
    for name, layer in layers.items():
        if len(layer.grid.shape) == 4:
            raise ValueError(
                f"{name} of shape {layer.grid.shape} is a convolution, whose time depends on its stride and the size of the image; give "
                "the model= of the layers, and inputs= for it"
            )
        if len(layer.grid.shape) != 2:
            raise ValueError(f"{name} of shape {layer.grid.shape} is no weight of a Linear or a convolution; leave it out")
        if inputs is not None and layer.grid.shape[1] != inputs.shape[-1]:
            misfit = f"inputs {tuple(inputs.shape)} do not fit {name}, which has {layer.grid.shape[1]} input features"
            raise ValueError(f"{misfit}; give the number of input rows instead: rows={rows}")
    first: Any = next(iter(layers.values()))
    of_layers = first.keep.device if isinstance(first, BlockMask) else first.value.device
    device = of_layers if inputs is None else inputs.device
    _check_device(int8, dtype, device)
    sizes = {name: tuple(layer.grid.shape) for name, layer in layers.items()}
    return {name: TimedLayer(size, (rows, size[1]), float_dtype or torch.float32, device) for name, size in sizes.items()}, int8


def layers_of_model(
    layers: Scores | Masks, model: nn.Module, inputs: Any, forward: Forward, dtype: torch.dtype | str | None
) -> tuple[dict[str, TimedLayer], bool]:
    """The layers of a model by the names of their weights, with inputs of the size that they get, and whether they are to run in int8.

    Raises:
        KeyError: a name that is no parameter of the model.
        ValueError: no layers or inputs; a layer that has no block-sparse form, that is of another shape, or that inputs do not reach; a
            dtype other than int8; an exported model.

    Example:
        >>> from blockprune.export.timed_layers import layers_of_model
        >>> scores = {"0.weight": bp.BlockScore(torch.rand(2, 1, 1, 1), bp.BlockGrid((8, 3, 3, 3), (4,)))}
        >>> conv, image = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(1, 3, 16, 16)
        >>> layers, _ = layers_of_model(scores, conv, image, lambda model, batch: model(batch), None)
        >>> layers["0.weight"].inputs
        (1, 3, 16, 16)
    """
    int8, float_dtype = _types(dtype)
    if float_dtype is not None:
        raise ValueError(
            f"dtype={dtype} is given beside a model, whose layers are timed in their own type; leave it out, or convert the model"
        )
    if not layers or inputs is None:
        missing = "no layers; give at least one" if not layers else "a model and no inputs; give inputs=, one batch for the model"
        raise ValueError(f"there are {missing}")
    if any(is_exported(module) for module in model.modules()):
        raise ValueError("the layers of the model are block-sparse already; give the model from before export.block_sparse")
    refs = {name: next(iter(find_parameters(model, [name], what="layers").values())) for name in layers}
    for name, layer in layers.items():
        _check_layer(name, refs[name][0], layer.grid)
    timed = _record_layers(refs, model, inputs, forward)
    for name in layers:
        if name not in timed:
            raise ValueError(f"inputs do not reach {name}: its layer is not called; give other inputs= or forward=, or leave it out")
        if not math.prod(timed[name].inputs):
            raise ValueError(f"inputs reach {name} with the shape {timed[name].inputs}, which holds no numbers; give inputs= with some")
        _check_device(int8, dtype, timed[name].device)
    return {name: timed[name] for name in layers}, int8


def _check_layer(name: str, ref: ParameterRef, grid: BlockGrid) -> None:
    if tuple(ref.shape) != tuple(grid.shape):
        raise ValueError(f"{name} has shape {tuple(ref.shape)} in the model and {grid.shape} in layers; give masks or scores of this model")
    kind, groups = parametrize.type_before_parametrizations(ref.owner), getattr(ref.owner, "groups", 1)
    if kind not in LAYER_TYPES or ref.attr != "weight" or groups != 1:
        layer = f"{kind.__name__}.{ref.attr}" + (f" with groups={groups}" if groups != 1 else "")
        raise ValueError(f"{name} is a {layer}, which has no block-sparse form; weights of torch's Linear and Conv2d have. Leave it out")


def _record_layers(refs: Mapping[str, Sequence[ParameterRef]], model: nn.Module, batch: Any, forward: Forward) -> dict[str, TimedLayer]:
    """The layers that a batch reaches; of several calls of a layer the last one with rows counts, and under autocast its type."""
    recorded: dict[str, TimedLayer] = {}

    def record(name: str, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if name in recorded and not x.numel():
            return
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        names = ("stride", "padding", "dilation", "padding_mode") if isinstance(module, nn.Conv2d) else ()
        options = tuple((option, getattr(module, option)) for option in names)
        last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        shape = tuple(refs[name][0].shape)
        recorded[name] = TimedLayer(shape, tuple(x.shape), dtype, x.device, module.bias is not None, options, last)

    owners = [(name, owner) for name, shared in refs.items() for owner in dict.fromkeys(ref.owner for ref in shared)]
    handles = [owner.register_forward_pre_hook(partial(record, name), with_kwargs=True) for name, owner in owners]
    try:
        with preserve_state(model), warn_of_writes(model), torch.no_grad():
            forward(model, copy_batch(batch))
    finally:
        for handle in handles:
            handle.remove()
    return recorded


def _types(dtype: torch.dtype | str | None) -> tuple[bool, torch.dtype | None]:
    """Whether layers are to run in int8, and the type that is asked for otherwise."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype} has no product on this machine; give one of {', '.join(map(str, DTYPES))}, or 'int8'")
        return False, dtype
    return wants_int8(dtype), None


def _check_device(int8: bool, dtype: Any, device: torch.device) -> None:
    if int8 and device.type != "cpu":
        raise ValueError(f"dtype={dtype!r} has kernels for a CPU alone, and the layers or inputs are on {device}")
