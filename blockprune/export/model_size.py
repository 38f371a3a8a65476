"""The size of a whole model with its masks: parameters and multiply-adds, dense and kept."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blockprune.core.masks import summary
from blockprune.core.table import Rows, Table
from blockprune.export.conversion import dense
from blockprune.model.calibration import Forward, default_forward
from blockprune.model.mask_reading import read_masks
from blockprune.model.parameters import parameter_refs
from blockprune.model.running import copy_batch, disable_attention_fastpath, preserve_state

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@attrs.frozen(repr=False)
class ModelSize(Table):
    """Parameters and multiply-adds of a model, dense and kept; it prints in a terminal and renders in a notebook.

    Args:
        parameters: of the dense model.
        parameters_kept: those that no mask prunes.
        multiply_adds: of one call of the dense model; None without inputs.
        multiply_adds_kept: those of the kept weights.

    Example:
        >>> from blockprune import export
        >>> export.ModelSize(parameters=1000, parameters_kept=600)
                    dense  kept  sparsity
        parameters  1,000   600     40.0%
    """

    parameters: int
    parameters_kept: int
    multiply_adds: int | None = None
    multiply_adds_kept: int | None = None

    @property
    def sparsity(self) -> float:
        """The pruned share of all parameters, those without a mask included."""
        return _removed_share(self.parameters, self.parameters_kept)

    def table(self) -> Rows:
        counts = {"parameters": (self.parameters, self.parameters_kept)}
        if self.multiply_adds is not None and self.multiply_adds_kept is not None:
            counts["multiply-adds"] = self.multiply_adds, self.multiply_adds_kept
        rows = [(name, f"{total:,}", f"{kept:,}", f"{_removed_share(total, kept):.1%}") for name, (total, kept) in counts.items()]
        return [("", "dense", "kept", "sparsity"), *rows]


def _removed_share(total: int, kept: int) -> float:
    """The share that is removed; 0 of nothing, such as of the multiply-adds of layers whose operations are not counted."""
    return 1 - kept / total if total else 0.0


def count_model(model: nn.Module, *, inputs: Any = None, forward: Forward = default_forward) -> ModelSize:
    """Count the parameters of a masked or exported model and, given inputs, the multiply-adds of one call; `summary` counts masks alone.

    A Linear or a convolution with a masked weight takes the kept share of its multiply-adds whenever it is called. `MultiheadAttention` and
    others that read the weights of their layers count as dense. `torch.utils.flop_counter` counts the dense model: matrix products and
    convolutions, also those of attention and recurrent layers, but not `Bilinear` and operations of your own.

    Args:
        model: with or without masks; it is not changed.
        inputs: one batch for ``forward``; without it, multiply-adds are not counted.
        forward: (model, batch) -> output, as in `Calibration`.

    Example:
        >>> from blockprune import export
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((4, 8), (4, 4)))
        >>> model = bp.apply_masks(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)), {"0.weight": mask})
        >>> export.count_model(model, inputs=torch.ones(10, 8))
                       dense  kept  sparsity
        parameters        56    40     28.6%
        multiply-adds    480   320     33.3%
    """
    plain, masks = dense(model), {row.name: row for row in summary(read_masks(model)).rows}
    pruned = sum(row.elements - row.elements_kept for row in masks.values())
    parameters = sum(p.numel() for p in plain.parameters())
    if inputs is None:
        return ModelSize(parameters, parameters - pruned)
    sparsities: dict[nn.Module, float] = {
        ref.owner: masks[name].sparsity
        for name, refs in parameter_refs(plain).items()
        for ref in refs
        if name in masks and ref.attr == "weight" and isinstance(ref.owner, _LAYERS)
    }
    saved, counter = 0.0, FlopCounterMode(display=False)

    def add_saved(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        nonlocal saved
        saved += sparsities[layer] * _multiply_adds(layer, args[0] if args else kwargs["input"], output)

    handles = [layer.register_forward_hook(add_saved, with_kwargs=True) for layer in sparsities]
    try:
        with torch.no_grad(), preserve_state(plain), _countable(), counter:
            forward(plain, copy_batch(inputs))
    finally:
        for handle in handles:
            handle.remove()
    total = int(counter.get_total_flops()) // 2
    return ModelSize(parameters, parameters - pruned, total, round(total - saved))


@contextlib.contextmanager
def _countable() -> Iterator[None]:
    """Attention and LSTMs as products that the counter knows."""
    with disable_attention_fastpath(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration")  # which `flags` sets, too
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def _multiply_adds(layer: nn.Module, input: Tensor, output: Tensor) -> int:
    """Of a Linear or a convolution: each weight meets each position of the output, or of the input of a transposed convolution."""
    weight: Any = layer.weight
    if isinstance(layer, nn.Linear):
        return int(weight.numel()) * (input.numel() // layer.in_features)
    transposed = isinstance(layer, _TRANSPOSED)
    positions, channels = (input, layer.in_channels) if transposed else (output, layer.out_channels)
    return int(weight.numel()) * (positions.numel() // int(cast(Any, channels)))
