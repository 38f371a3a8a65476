"""Check that a layer returns the product of its input and its weight, which statistics of inputs take for granted."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from blockprune.core._compat import FORWARD_METHODS, ConvNd
from blockprune.model.inputs import WithoutHooks
from blockprune.model.parameters import ParameterRef

# the layers whose inputs are known; a subclass is compared with the first of these that it belongs to
_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Embedding,
    nn.MultiheadAttention,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
TOLERANCE = 4e-3  # relative difference of two outputs that rounding alone may cause; TF32 keeps 10 bits


def check_product(ref: ParameterRef, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
    """Check that one call of a layer returned the product of its input and its weight, plus terms that do not depend on the weight.

    Layers whose forward is torch's own pass at once. Those of subclasses with a forward of their own, and patched ones, are computed a
    second time by torch's forward. An adapter such as LoRA's adds a term of its own; it passes if the output without that term is right.

    Args:
        ref: the weight.
        module: the module of `input_hooks`.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        output: the output of the call; of an attention the first one.

    Raises:
        NotImplementedError: the layer returned something else.

    Example:
        >>> from blockprune.model.parameters import ParameterRef
        >>> from blockprune.model.product_check import check_product
        >>> layer, x = nn.Linear(4, 2), torch.ones(3, 4)
        >>> check_product(ParameterRef("weight", layer, "weight"), layer, (x,), {}, layer(x))
    """
    layer = next((layer for layer in _LAYERS if isinstance(module, layer)), None)
    if layer is None or _runs_forward_of(layer, module):
        return
    try:
        difference = _difference(layer, ref, module, args, kwargs, output)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        difference = f"that forward cannot run its arguments ({str(error).splitlines()[0]})"
    if difference:
        kind = nn.utils.parametrize.type_before_parametrizations(module).__name__
        raise NotImplementedError(
            f"{ref.name} {ref.shape}: its {kind} does not run the forward of torch's nn.{layer.__name__}, and {difference}, so statistics "
            "of its inputs would be wrong. Do the additional work in a module of its own, collect gate statistics (gate_grad, "
            "gate_fisher), or leave the weight out with `excluding`"
        )


def _runs_forward_of(layer: type[nn.Module], module: nn.Module) -> bool:
    """Whether neither the module nor its class changes what this class of torch computes."""
    names = [name for name in FORWARD_METHODS if hasattr(layer, name)]
    unchanged = all(getattr(type(module), name) is getattr(layer, name) and name not in vars(module) for name in names)
    return unchanged and _is_in_file_of(layer)


def _is_in_file_of(layer: type[nn.Module]) -> bool:
    """Whether the class has its forward from torch; some libraries replace it for all layers."""
    return layer.forward.__code__.co_filename == inspect.getfile(layer)


def _difference(  # noqa: PLR0917 (the arguments of one call)
    layer: type[nn.Module], ref: ParameterRef, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
) -> str:
    """How a call differs from the product of input and weight; empty if it does not."""
    if not _is_in_file_of(layer):
        return f"that forward is replaced in this process (by {layer.forward.__code__.co_filename})"
    if type(module).__call__ is not nn.Module.__call__:
        return "its class has a `__call__` of its own"
    expected = _first(layer.forward(_plain_copy(layer, module), *args, **kwargs))
    bias = _bias(ref, module, expected)
    if _is_close(output, bias, expected, bias, ref, args):
        return ""
    if ref.is_plain and ref.owner is module and _is_close(output, _without_weight(ref, module, args, kwargs), expected, bias, ref, args):
        return ""
    return "it does not return the product of its input and this weight"


def _plain_copy(layer: type[nn.Module], module: nn.Module) -> nn.Module:
    """A module of this class with the module's attributes and submodules, and without its patches and parametrizations."""
    plain = layer.__new__(layer)
    vars(plain).update({name: value for name, value in vars(module).items() if name not in FORWARD_METHODS})
    if nn.utils.parametrize.is_parametrized(module):
        vars(plain).update({name: getattr(module, name) for name in module.parametrizations})  # type: ignore[union-attr]
    return plain


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _bias(ref: ParameterRef, module: nn.Module, like: Tensor) -> Tensor:
    """The bias, in a shape that broadcasts to the output; 0 if the layer has none."""
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor) or ref.attr != "weight":
        return like.new_zeros(())
    spatial = len(module.kernel_size) if isinstance(module, ConvNd) else 0
    return bias.detach().view(-1, *[1] * spatial)


def _without_weight(ref: ParameterRef, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The output if the weight were 0."""
    zeros = {f"module.{name}": torch.zeros_like(p) for name, p in module.named_parameters() if p is ref.stored}
    return _first(functional_call(WithoutHooks(module), zeros, args, dict(kwargs)))


def _is_close(  # noqa: PLR0917 (two differences, and what their rounding depends on)
    output: Tensor, rest: Tensor, expected: Tensor, bias: Tensor, ref: ParameterRef, args: tuple[Any, ...]
) -> bool:
    """Whether ``output - rest`` equals ``expected - bias`` up to rounding."""
    if output.shape != expected.shape:
        return False
    dtype = torch.promote_types(ref.stored.dtype, torch.float32)
    eps = max(torch.finfo(x.dtype).eps for x in (output, expected, ref.stored))
    product = expected.to(dtype) - bias.to(dtype)
    difference = _norm(output.to(dtype) - rest.to(dtype) - product)
    slack = max(TOLERANCE, 4 * eps) * _norm(product) + 4 * eps * (_norm(expected) + _norm(output))
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():  # the product may be a small sum of large terms
        slack += 32 * torch.finfo(torch.float32).eps * _norm(args[0]) * _norm(ref.stored)
    return difference <= slack or not math.isfinite(_norm(output))  # a batch with NaN is reported with its number


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64 if x.device.type != "mps" else torch.float32))
