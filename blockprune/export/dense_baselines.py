"""The fastest dense layers and models, which a block-sparse one must beat."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockprune.core._compat import has_hooks, has_packed_linear, pack_linear_weight, packed_linear, packs_bfloat16
from blockprune.core.sharded_tensor import is_sharded
from blockprune.export.module_replacement import replace_modules
from blockprune.export.ops import int8_backend
from blockprune.export.packing import pack_int8
from blockprune.export.quantization import is_quantizable
from blockprune.export.sparse_layers import Int8BlockSparseLinear
from blockprune.model.apply import finalize
from blockprune.model.hf_checkpoint import prepare_checkpoints
from blockprune.model.parameters import check_all_loaded
from blockprune.model.sharding import check_not_fully_sharded

M = TypeVar("M", bound=nn.Module)


def dense_kernels(x: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Callable[[], Tensor]]:
    """The dense implementations of one Linear on this machine, by name: each a call that multiplies x.

    Example:
        >>> from blockprune.export.dense_baselines import dense_kernels
        >>> list(dense_kernels(torch.ones(2, 4), torch.ones(3, 4), None))[:1]
        ['F.linear']
    """
    kernels: dict[str, Callable[[], Tensor]] = {"F.linear": partial(F.linear, x, weight, bias)}
    if can_pack(weight):
        packed = pack_linear_weight(weight, x.numel() // weight.shape[1])
        kernels["oneDNN packed"] = partial(packed_linear, x, packed, bias)
    return kernels


def dense_layer_calls(layer: nn.Linear | nn.Conv2d, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The dense implementations of a Linear or of a convolution on this machine, by name: the first is the one that the layer runs.

    Example:
        >>> from blockprune.export.dense_baselines import dense_layer_calls
        >>> list(dense_layer_calls(nn.Conv2d(3, 4, 3), torch.ones(1, 3, 8, 8)))
        ['Conv2d', 'Conv2d channels_last']
    """
    if isinstance(layer, nn.Linear):
        return dense_kernels(x, layer.weight, layer.bias)
    calls: dict[str, Callable[[], Tensor]] = {"Conv2d": partial(layer, x)}
    if x.ndim == 4:
        other = copy.deepcopy(layer).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        calls["Conv2d channels_last"] = partial(other, x.to(memory_format=torch.channels_last))
    return calls


def dense_int8_kernels(x: Tensor, weight: Tensor, bias: nn.Parameter | None) -> dict[str, Callable[[], Tensor]]:
    """The dense int8 implementations of one Linear, by name: an `Int8BlockSparseLinear` with all blocks, and torch's own on a CPU.

    Example:
        >>> from blockprune.export.dense_baselines import dense_int8_kernels
        >>> list(dense_int8_kernels(torch.ones(2, 4), torch.ones(3, 4), None))[:1]
        ['dense int8']
    """
    layer = Int8BlockSparseLinear(pack_int8(weight), bias, int8_backend(x), weight.dtype)
    kernels: dict[str, Callable[[], Tensor]] = {"dense int8": partial(layer, x)}
    if has_dynamic_int8() and x.device.type == "cpu":
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight.detach(), requires_grad=False), cast(Any, bias)
        kernels["torch dynamic int8"] = partial(dynamic_int8(nn.Sequential(plain)), x.float())
    return kernels


def onednn_packed(model: M) -> M:
    """A copy whose Linears hold their weight in oneDNN's own format, where this machine has oneDNN; for inference on a CPU.

    This is the fastest dense product that was measured; `torch.compile` with frozen weights was no faster than F.linear.

    Example:
        >>> from blockprune.export.dense_baselines import onednn_packed
        >>> model, x = nn.Linear(64, 32), torch.randn(8, 64)
        >>> torch.allclose(onednn_packed(model)(x), model(x), atol=1e-5)
        True
    """
    return replace_modules(
        copy.deepcopy(model), lambda module: PackedLinear(module) if type(module) is nn.Linear and can_pack(module.weight) else None
    )


def dynamic_int8(model: nn.Module) -> nn.Module:
    """A float32 copy whose Linears multiply in int8, with one scale a layer for weights and one a call for activations; for a CPU.

    This is ``torch.ao.quantization.quantize_dynamic``, which people have without installing anything else. The model changes its outputs a
    little, unlike the other dense forms.

    Args:
        model: masked or not; it is not changed. The result has no parameters in its Linears and cannot be trained. Linears with hooks or
            with a forward of their own, which a new layer would not have, stay as they are; a warning names them.

    Raises:
        ValueError: a weight on the meta device, which has no values; a model that ``fully_shard`` or ``parallelize_module`` has sharded.

    Example:
        >>> from blockprune.export import dynamic_int8
        >>> model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(8, 64)
        >>> (dynamic_int8(model)(x) - model(x)).abs().max().item() < 0.1
        True
    """
    check_not_fully_sharded(model, "dynamic_int8 rounds whole weights", nor_dtensors=True)
    plain = nn.Sequential(finalize(model))
    _check_has_values(plain[0], "dynamic_int8")
    kept = _irreplaceable(plain[0])
    forms: dict[Any, Any] = {nn.Linear: torch.ao.quantization.default_dynamic_qconfig}
    forms |= {name: None for name, module in plain.named_modules(remove_duplicate=False) if module in kept}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that torchao, a package of its own, will take this over
        quantized: Any = torch.ao.quantization.quantize_dynamic(plain.to(torch.float32), forms, dtype=torch.qint8, inplace=True)
    _warn_of_kept(kept)
    return cast(nn.Module, quantized[0])


def rowwise_int8(model: M) -> M:
    """A copy whose Linears multiply in int8 as block-sparse layers do, with all blocks: a scale for each output and each row of inputs.

    Args:
        model: masked or not; it is not changed. Subclasses of ``nn.Linear``, and Linears whose weight is not finite, stay as they are. So
            do those with hooks or with a forward of their own, which a new layer would not have; a warning names them.

    Raises:
        ValueError: a weight on the meta device, which has no values.

    Example:
        >>> from blockprune.export import rowwise_int8
        >>> model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(8, 64)
        >>> (rowwise_int8(model)(x) - model(x)).abs().max().item() < 0.1
        True
    """
    plain = finalize(model)
    _check_has_values(plain, "rowwise_int8")
    names, kept = {module: name for name, module in plain.named_modules()}, _irreplaceable(plain)

    def replacement(module: nn.Module) -> nn.Module | None:
        if type(module) is not nn.Linear or module in kept or not is_quantizable(module.weight):
            return None
        layer = Int8BlockSparseLinear(pack_int8(module.weight), module.bias, "native", module.weight.dtype)
        layer.name = names[module]
        return layer

    result = replace_modules(plain, replacement)
    _warn_of_kept(kept)
    prepare_checkpoints(result)
    return result


def _irreplaceable(model: nn.Module) -> dict[nn.Module, str]:
    """The Linears that do more than a product which a new layer would do, each with its name and the reason."""
    reasons: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            sharded = "parallelize_module has sharded its weight" if is_sharded(module.weight) else ""
            hooks, forward = "it has hooks" * has_hooks(module), "its forward was replaced" * ("forward" in vars(module))
            if reason := sharded or hooks or forward:
                reasons[module] = f"{name or 'the layer'}: {reason}"
    return reasons


def _warn_of_kept(kept: dict[nn.Module, str]) -> None:
    if kept:
        reasons = "; ".join([*kept.values()][:3])
        warnings.warn(f"Linears that a layer of int8 cannot replace stay as they are ({reasons}); {len(kept)} in all", stacklevel=3)


def _check_has_values(model: nn.Module, function: str) -> None:
    check_all_loaded(model, function)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module.weight.is_meta:
            weight = f"{name}.weight" if name else "weight"
            raise ValueError(
                f"{weight} {tuple(module.weight.shape)} is on the meta device and has no values to round to int8; load the model's values "
                "first, with model.to_empty(device='cpu') and model.load_state_dict(state)"
            )


def int8_bytes(model: nn.Module) -> int:
    """The bytes of the int8 weights of a model, which are no parameters."""
    layers = (module for module in model.modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear))
    return sum(layer.weight().numel() for layer in layers)


def has_dynamic_int8() -> bool:
    """Whether this torch still has dynamic quantization, and kernels for this machine."""
    return hasattr(torch.ao, "quantization") and torch.backends.quantized.engine != "none"


def is_int8(model: nn.Module) -> bool:
    """Whether a model has Linears that multiply in int8."""
    return any(isinstance(module, (torch.ao.nn.quantized.dynamic.Linear, Int8BlockSparseLinear)) for module in model.modules())


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can pack a weight on this machine.

    Example:
        >>> from blockprune.export.dense_baselines import can_pack
        >>> can_pack(torch.ones(2, 2, dtype=torch.float64))
        False
    """
    if not (has_packed_linear() and weight.device.type == "cpu"):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and packs_bfloat16())


class PackedLinear(nn.Module):
    """A Linear whose weight is in oneDNN's format, which depends on the number of input rows: it is packed again when that changes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.plain, self.bias, self.rows, self.weight = layer.weight.detach(), layer.bias, 0, layer.weight.detach()
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, input: Tensor) -> Tensor:
        rows = input.numel() // self.in_features
        if rows != self.rows:
            self.rows, self.weight = rows, pack_linear_weight(self.plain, rows)
        return packed_linear(input, self.weight, self.bias)
