"""The inputs of weights: which activations a weight multiplies, and which axis of the weight belongs to the input features."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from blockprune.core._compat import ConvNd, ConvTransposeNd, conv_padding, tree_leaves, version_counter
from blockprune.model.hf_linears import is_transposed
from blockprune.model.parameters import ParameterRef

InputHooks = Sequence[tuple[str, ParameterRef, nn.Module]]  # (canonical name, reference, module whose arguments are the input)


def input_hooks(model: nn.Module, refs: Mapping[str, Sequence[ParameterRef]]) -> list[tuple[str, ParameterRef, nn.Module]]:
    """For each reference of each parameter: the module whose calls have the parameter's input as arguments.

    This is the module that owns the parameter. The exception is the out_proj of `MultiheadAttention`: it is never called, because the
    attention passes its weight to a function. The module for its parameters is the attention itself.
    """
    attentions = {id(m.out_proj): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    hooks: dict[tuple[str, int, str], tuple[str, ParameterRef, nn.Module]] = {}
    for name, shared in refs.items():
        for ref in shared:  # a module that is registered under several names has a reference for each, but needs one hook
            hooks.setdefault((name, id(ref.owner), ref.attr), (name, ref, attentions.get(id(ref.owner), ref.owner)))
    return list(hooks.values())


def value_key(x: Tensor) -> Any:
    """A key that two tensors share if they are the same memory, and were not written in between, as long as both are alive.

    Tensors of `torch.inference_mode` do not tell whether they were written, so each has a key of its own.

    Example:
        >>> from blockprune.model.inputs import value_key
        >>> x = torch.ones(2)
        >>> key = value_key(x)
        >>> value_key(x.detach()) == key, value_key(x.add_(1)) == key
        (True, False)
    """
    return object() if x.is_inference() else (x.data_ptr(), version_counter(x), x.shape, x.stride(), x.dtype)


def check_not_nested(layer: str, tensors: Any, what: str) -> None:
    """Raise a ValueError if a layer is called with a nested tensor, whose rows have different lengths.

    Example:
        >>> from blockprune.model.inputs import check_not_nested
        >>> check_not_nested("fc.weight", (torch.ones(2),), "statistics")
    """
    if any(isinstance(x, Tensor) and x.is_nested for x in tree_leaves(tensors)):
        raise ValueError(
            f"{layer}: this layer is called with a nested tensor (torch.nested), which {what} do not support; give padded batches, and "
            "token_weights= or an attention_mask, so that the padding does not count"
        )


def weight_inputs(ref: ParameterRef, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The activations that a weight multiplies in one call of its module: ``[..., k]`` for each group of output rows.

    A grouped convolution has several groups of output rows, and so has the in_proj of an attention (query, key and value).

    Args:
        ref: the weight.
        module: the module of `input_hooks`.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        NotImplementedError: the input does not follow from the arguments (weights of RNNs and of unknown modules).
    """
    owner = ref.owner
    if isinstance(module, nn.MultiheadAttention):
        query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value")))
        if owner is module.out_proj:
            return [_out_proj_input(module, args, kwargs)]
        inputs = {"in_proj_weight": [query, key, value], "q_proj_weight": [query], "k_proj_weight": [key], "v_proj_weight": [value]}
        if ref.attr in inputs:
            return inputs[ref.attr]
    x: Tensor = args[0] if args else kwargs["input"]
    if ref.attr == "weight":
        if isinstance(owner, nn.Linear):
            return [x]
        if isinstance(owner, nn.Embedding):
            return [F.one_hot(x, owner.num_embeddings)]
        if isinstance(owner, ConvTransposeNd):
            x = x if x.ndim == len(owner.kernel_size) + 2 else x[None]
            return list(x.movedim(1, -1).split(owner.in_channels // owner.groups, dim=-1))
        if isinstance(owner, ConvNd):
            return list(_unfold(owner, x).split(owner.in_channels // owner.groups * math.prod(owner.kernel_size), dim=-1))
    kind = nn.utils.parametrize.type_before_parametrizations(owner).__name__
    remedy = "convert it, bp.as_linears(model)" if is_transposed(owner) else "collect gate statistics (gate_grad, gate_fisher)"
    raise NotImplementedError(
        f"{ref.name}: blockprune does not know the input of {ref.attr!r} of a {kind}; {remedy}, or leave it out with `excluding`"
    )


def _unfold(conv: ConvNd, x: Tensor) -> Tensor:
    """The patches of the input that a convolution multiplies by its weight: ``[batch, *positions, channels * kernel elements]``.

    A convolution with one-hot kernels extracts them, so that torch takes care of padding and dilation, in 1, 2 and 3 dimensions.
    """
    spatial = len(conv.kernel_size)
    x = x if x.ndim == spatial + 2 else x[None]
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        x, padding = F.pad(x, conv_padding(conv), mode=conv.padding_mode), 0
    size = math.prod(conv.kernel_size)  # not of the weight, which a read may compute anew
    one_hot = torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *conv.kernel_size)
    one_hot = one_hot.repeat(conv.in_channels, *[1] * (spatial + 1))
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    return convolve(x, one_hot, None, conv.stride, padding, conv.dilation, conv.in_channels).movedim(1, -1)


def _out_proj_input(attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of an attention's out_proj: the output of the same attention if out_proj is the identity."""
    ref = ParameterRef("out_proj.weight", attention.out_proj, "weight")
    weight = ref.stored
    stored = "weight" if ref.parametrizations is None else "parametrizations.weight.original"
    identity = {f"module.out_proj.{stored}": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
    if ref.mask is not None:
        identity["module.out_proj.parametrizations.weight.0.keep"] = torch.ones_like(ref.mask.keep)
    if attention.out_proj.bias is not None:
        identity["module.out_proj.bias"] = torch.zeros_like(attention.out_proj.bias)
    output: tuple[Tensor, Any] = functional_call(WithoutHooks(attention), identity, args, dict(kwargs))
    return output[0]


class WithoutHooks(nn.Module):
    """Runs a module's forward without its hooks, which have already run in this call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def input_axis(ref: ParameterRef) -> int:
    """The axis of a weight that belongs to its input features."""
    return 0 if isinstance(ref.owner, (nn.Embedding, ConvTransposeNd)) and ref.attr == "weight" else 1


def along_weight(features: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """A statistic of the input features ``[groups, k]``, reshaped so that it broadcasts to a weight of this shape and input axis."""
    groups = len(features)
    if axis == 0:
        return features.reshape(shape[0], *[1] * (len(shape) - 1))
    if groups == 1:
        return features.reshape(1, *shape[1:])
    return features.repeat_interleave(shape[0] // groups, dim=0).reshape(shape)  # every row of a group has the group's input features
