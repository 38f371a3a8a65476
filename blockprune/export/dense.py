"""The best that a dense model does: what a sparse one has to beat."""

import copy
import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockprune.apply import finalize
from blockprune.export.layers import BlockSparseConv2d, BlockSparseLinear
from blockprune.export.two_of_four import TwoOfFourLinear

M = TypeVar("M", bound=nn.Module)


def dense(model: M) -> M:
    """A copy with plain layers, zeros where blocks were pruned: of a masked model or of an exported one. ONNX takes it.

    Example:
        >>> from blockprune import export
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> sparse = export.block_sparse(bp.apply_masks(nn.Linear(4, 2), {"weight": mask}), backend="torch")
        >>> export.dense(sparse)
        Linear(in_features=4, out_features=2, bias=True)
    """
    return replaced(finalize(model), _plain)


def onnx(model: nn.Module, args: tuple[Any, ...], path: str | Path, **options: Any) -> None:
    """Write a masked or exported model as an ONNX file, dense with zeros, for ONNX has no block-sparse product; a warning says so.

    Args:
        model: stays as it is.
        args: example inputs.
        path: of the file.
        options: for `torch.onnx.export`, such as dynamic_shapes.

    Raises:
        ImportError: onnx and onnxscript are not installed: ``pip install "blockprune[onnx]"``.

    Example:
        >>> from blockprune import export
        >>> export.onnx(model, (x,), "model.onnx")  # doctest: +SKIP
    """
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise ImportError(f'ONNX files need {" and ".join(missing)}: pip install "blockprune[onnx]"')
    warnings.warn("ONNX has no block-sparse product: the file holds dense weights, zero where blocks were pruned", stacklevel=2)
    torch.onnx.export(dense(model), args, path, dynamo=True, verbose=False, **options)


def packed(model: M) -> M:
    """A copy whose Linears hold their weight as oneDNN wants it, for any batch, where oneDNN is there; for inference on a CPU.

    It is the fastest dense product that was found; `torch.compile` with frozen weights was measured no faster than F.linear.

    Example:
        >>> from blockprune.export.dense import packed
        >>> model, x = nn.Linear(64, 32), torch.randn(8, 64)
        >>> torch.allclose(packed(model)(x), model(x), atol=1e-5)
        True
    """
    return replaced(
        copy.deepcopy(model), lambda module: PackedLinear(module) if type(module) is nn.Linear and can_pack(module.weight) else None
    )


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN takes a weight.

    Example:
        >>> from blockprune.export.dense import can_pack
        >>> can_pack(torch.ones(2, 2, dtype=torch.float64))
        False
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and weight.device.type == "cpu"):
        return False
    mkldnn: Any = torch.ops.mkldnn
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and bool(mkldnn._is_mkldnn_bf16_supported()))


class PackedLinear(nn.Module):
    """A Linear whose weight lies as oneDNN wants it for the number of rows that it last met."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.plain, self.bias, self.rows, self.weight = layer.weight.detach(), layer.bias, 0, layer.weight.detach()
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, input: Tensor) -> Tensor:
        mkldnn: Any = torch.ops.mkldnn
        rows = input.numel() // self.in_features
        if rows != self.rows:
            self.rows, self.weight = rows, mkldnn._reorder_linear_weight(self.plain, rows)
        out: Tensor = mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return out


def ways(x: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Callable[[], Tensor]]:
    """The dense products that one layer may choose from, by name.

    Example:
        >>> from blockprune.export.dense import ways
        >>> list(ways(torch.ones(2, 4), torch.ones(3, 4), None))[:1]
        ['F.linear']
    """
    found: dict[str, Callable[[], Tensor]] = {"F.linear": partial(F.linear, x, weight, bias)}
    if can_pack(weight):
        mkldnn: Any = torch.ops.mkldnn
        ready = mkldnn._reorder_linear_weight(weight, x.numel() // weight.shape[1])
        found["oneDNN packed"] = partial(mkldnn._linear_pointwise, x, ready, bias, "none", [], "")
    return found


def replaced(model: M, change: Callable[[nn.Module], nn.Module | None]) -> M:
    """The same model with other modules in the places of some.

    Example:
        >>> from blockprune.export.dense import replaced
        >>> replaced(nn.Sequential(nn.ReLU()), lambda m: nn.GELU() if isinstance(m, nn.ReLU) else None)
        Sequential(
          (0): GELU(approximate='none')
        )
    """
    new = {module: found for module in model.modules() if (found := change(module)) is not None}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child].train(child.training)
    return new.get(model, model)  # type: ignore[return-value]  # a model that is one layer


def _plain(module: nn.Module) -> nn.Module | None:
    if not isinstance(module, (BlockSparseLinear, TwoOfFourLinear)):
        return None
    weight, bias = module.weight, module.bias
    if isinstance(module, BlockSparseConv2d):
        names = "kernel_size", "stride", "padding", "dilation", "padding_mode"
        how: Any = {name: getattr(module, name) for name in names}
        out: Any = nn.Conv2d(module.in_channels, module.out_features, bias=False, device="meta", **how)
    else:
        out = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    out.weight, out.bias = nn.Parameter(weight, requires_grad=False), bias
    return cast(nn.Module, out)
