"""Layers with random weights and inputs of the sizes that they get, on which blocks are timed."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockprune.core.grid import BlockGrid
from blockprune.core.patterns import suggest
from blockprune.core.types import BlockMask, Masks, Scores
from blockprune.export.choices import backends
from blockprune.export.dense_baselines import dense_int8_kernels, dense_layer_calls
from blockprune.export.ops import int8_backend
from blockprune.export.packing import pack_int8, pack_weight
from blockprune.export.quantization import wants_int8
from blockprune.export.sparse_convs import sparse_layer_like
from blockprune.export.timing import cold_copies, time_interleaved
from blockprune.model.parameters import parameter_refs
from blockprune.model.running import Forward, preserve_state

Calls = dict[Any, list[Callable[[], Any]]]  # by name of a kernel or by mask, a call for each copy of the weight


@attrs.frozen(eq=False)
class TimedLayer:
    """A Linear or a Conv2d with random weights, and an input of it.

    Args:
        plain: the layer.
        x: its input.

    Example:
        >>> from blockprune.export.timed_layers import TimedLayer
        >>> layer, grid = TimedLayer(nn.Linear(8, 4), torch.randn(2, 8)), bp.BlockGrid((4, 8), (2, 2))
        >>> dense_ms, sparse_ms = layer.milliseconds([grid], [0.5], rounds=1)
        >>> dense_ms > 0, list(sparse_ms) == [(grid, 0.5)]
        (True, True)
    """

    plain: nn.Linear | nn.Conv2d
    x: Tensor

    @property
    def key(self) -> tuple[Any, ...]:
        """What its times depend on besides the mask."""
        layer, x = self.plain, self.x
        options = (layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else ()
        return tuple(layer.weight.shape), layer.weight.dtype, x.shape, x.stride(), x.dtype, x.device, options

    def milliseconds(
        self, grids: Sequence[BlockGrid], sparsities: Sequence[float], *, int8: bool = False, graph: bool = False, rounds: int = 9
    ) -> tuple[float, dict[tuple[BlockGrid, float], float]]:
        """The time of the fastest dense kernel, and the times with random masks by grid and sparsity. Convolutions have no int8 form."""
        generator, weight, x = torch.Generator().manual_seed(0), self.plain.weight.detach(), self.x
        int8 = int8 and isinstance(self.plain, nn.Linear)
        backend = next(row.name for row in backends().rows if row.available)
        calls: Calls = defaultdict(list)
        for _ in self._copies(weight.nbytes):
            kernels = dense_layer_calls(copy.deepcopy(self.plain), x) | (dense_int8_kernels(x, weight, None) if int8 else {})
            for name, call in kernels.items():
                calls[name].append(call)
        dense_names = list(calls)
        for grid in grids:
            order = torch.randperm(grid.blocks, generator=generator)
            for sparsity in sparsities:
                mask = BlockMask((order >= round(sparsity * grid.blocks)).view(grid.size), grid)
                packed, name = (pack_int8(weight, mask), int8_backend(x)) if int8 else (pack_weight(weight, mask), backend)
                layer = sparse_layer_like(self.plain, packed, name)
                calls[grid, sparsity] = [partial(copy.deepcopy(layer), x) for _ in self._copies(packed.values.nbytes)]
        with torch.no_grad():
            seconds = time_interleaved(calls, x.device, graph=graph, rounds=rounds)
        milliseconds = {name: 1e3 * value for name, value in seconds.items()}
        return min(milliseconds.pop(name) for name in dense_names), milliseconds

    def _copies(self, nbytes: int) -> range:
        return range(1 if self.x.device.type == "cpu" else cold_copies(nbytes, self.x.device))


def layers_without_model(
    layers: Scores | Masks, rows: int, inputs: Tensor | None, dtype: torch.dtype | str
) -> tuple[dict[str, TimedLayer], bool]:
    """Linears of these shapes by name, and whether they are to run in int8.

    Raises:
        ValueError: no layers, no input rows, a convolution, or inputs that do not fit a layer.

    Example:
        >>> from blockprune.export.timed_layers import layers_without_model
        >>> scores = {"fc.weight": bp.BlockScore(torch.rand(2, 2), bp.BlockGrid((4, 8), (2, 4)))}
        >>> layers, int8 = layers_without_model(scores, 16, None, torch.float32)
        >>> layers["fc.weight"].plain, layers["fc.weight"].x.shape, int8
        (Linear(in_features=8, out_features=4, bias=False), torch.Size([16, 8]), False)
    """
    int8 = _is_int8(dtype)
    rows = rows if inputs is None else inputs.numel() // max(1, inputs.shape[-1])
    if not layers or rows < 1:
        raise ValueError(
            f"there are {len(layers)} layers and {rows} input rows; give at least one layer, and at least one row by rows= or inputs="
        )
    for name, layer in layers.items():
        if len(layer.grid.shape) != 2:
            _check_axes(name, layer.grid)
            raise ValueError(
                f"{name} of shape {layer.grid.shape} is a convolution, whose time depends on its stride and the size of the image; give "
                "the model= of the layers, and inputs= for it"
            )
        if inputs is not None and layer.grid.shape[1] != inputs.shape[-1]:
            misfit = f"inputs {tuple(inputs.shape)} do not fit {name}, which has {layer.grid.shape[1]} input features"
            raise ValueError(f"{misfit}; give the number of input rows instead: rows={rows}")
    first: Any = next(iter(layers.values()))
    of_layers = first.keep.device if isinstance(first, BlockMask) else first.value.device
    device, float_dtype = (of_layers, torch.float32 if int8 else dtype) if inputs is None else (inputs.device, inputs.dtype)
    _check_device(int8, dtype, device)
    result = {}
    for name, layer in layers.items():
        size = cast(tuple[int, int], layer.grid.shape)
        plain = nn.Linear(size[1], size[0], bias=False, device=device, dtype=cast(torch.dtype, float_dtype))
        x = torch.randn(rows, size[1], generator=torch.Generator().manual_seed(0)).to(plain.weight)
        result[name] = TimedLayer(plain.requires_grad_(False), x)
    return result, int8


def layers_of_model(
    layers: Scores | Masks, model: nn.Module, inputs: Any, forward: Forward, dtype: torch.dtype | str
) -> tuple[dict[str, TimedLayer], bool]:
    """The layers of a model by the names of their weights, with random weights and inputs as they get, and whether to run in int8.

    Raises:
        KeyError: a name that is no parameter of the model.
        ValueError: no layers or inputs; a layer that has no block-sparse form, that is of another shape, or that inputs do not reach.

    Example:
        >>> from blockprune.export.timed_layers import layers_of_model
        >>> scores = {"0.weight": bp.BlockScore(torch.rand(2, 1, 1, 1), bp.BlockGrid((8, 3, 3, 3), (4,)))}
        >>> conv, image = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(1, 3, 16, 16)
        >>> layers, _ = layers_of_model(scores, conv, image, lambda model, batch: model(batch), torch.float32)
        >>> layers["0.weight"].x.shape
        torch.Size([1, 3, 16, 16])
    """
    int8, refs = _is_int8(dtype), parameter_refs(model)
    if not layers or inputs is None:
        missing = "no layers; give at least one" if not layers else "a model and no inputs; give inputs=, one batch for the model"
        raise ValueError(f"there are {missing}")
    owners: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        if name not in refs:
            raise KeyError(f"{name!r} is no parameter of the model{suggest(name, refs)}")
        ref = refs[name][0]
        _check_axes(name, layer.grid)
        if tuple(ref.shape) != tuple(layer.grid.shape):
            raise ValueError(f"{name} has shape {tuple(ref.shape)} in the model and {layer.grid.shape} in layers")
        kind = parametrize.type_before_parametrizations(ref.owner)
        if kind not in (nn.Linear, nn.Conv2d) or ref.attr != "weight" or getattr(ref.owner, "groups", 1) > 1:
            in_groups = " in groups" if getattr(ref.owner, "groups", 1) > 1 else ""
            raise ValueError(
                f"{name} belongs to a {kind.__name__}{in_groups}, which has no block-sparse form; torch's Linear and Conv2d with groups=1 "
                "have. Leave it out"
            )
        owners[name] = ref.owner
    recorded = _inputs_of_layers(owners, model, inputs, forward)
    if missed := [name for name in layers if name not in recorded]:
        raise ValueError(f"inputs do not reach {missed[0]}; give inputs= that do, or leave the layer out")
    _check_device(int8, dtype, next(iter(recorded.values())).device)
    return {name: TimedLayer(_random_like(owners[name], refs[name][0].stored), x) for name, x in recorded.items()}, int8


def _inputs_of_layers(owners: Mapping[str, nn.Module], model: nn.Module, batch: Any, forward: Forward) -> dict[str, Tensor]:
    """Random inputs of the size that each layer gets; of several calls the last one counts."""
    recorded: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        recorded[name] = torch.empty_like(args[0] if args else kwargs["input"])

    handles = [owner.register_forward_pre_hook(partial(record, name), with_kwargs=True) for name, owner in owners.items()]
    try:
        with preserve_state(model), torch.no_grad():
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: recorded[name].normal_() for name in owners if name in recorded}


def _random_like(layer: Any, stored: Tensor) -> nn.Linear | nn.Conv2d:
    """A layer with the options of another one and random weights, without its masks."""
    options: dict[str, Any] = {"bias": layer.bias is not None, "device": stored.device, "dtype": stored.dtype}
    if isinstance(layer, nn.Linear):
        plain: nn.Linear | nn.Conv2d = nn.Linear(layer.in_features, layer.out_features, **options)
    else:
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            cast(Any, layer.kernel_size),
            cast(Any, layer.stride),
            cast(Any, layer.padding),
            cast(Any, layer.dilation),
            padding_mode=layer.padding_mode,
            **options,
        )
    return plain.requires_grad_(False)


def _is_int8(dtype: torch.dtype | str) -> bool:
    return not (isinstance(dtype, torch.dtype) and dtype.is_floating_point) and wants_int8(dtype)


def _check_axes(name: str, grid: BlockGrid) -> None:
    if len(grid.shape) < 2:
        raise ValueError(f"{name} of shape {grid.shape} is no weight of a Linear or a convolution; leave it out")


def _check_device(int8: bool, dtype: torch.dtype | str, device: torch.device) -> None:
    if int8 and device.type != "cpu":
        raise ValueError(f"dtype={dtype!r} has kernels for a CPU alone, and the layers or inputs are on {device}")
