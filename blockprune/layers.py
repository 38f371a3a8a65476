"""How a module's input meets its weight: the rows that multiply it, and where a statistic of the input features goes on it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from blockprune.as_linears import is_transposed
from blockprune.names import Slot


def listeners(model: nn.Module, places: Mapping[str, Sequence[Slot]]) -> list[tuple[str, Slot, nn.Module]]:
    """For every place of every parameter the module whose calls show its input: its owner, but the attention of an attention's out_proj."""
    attentions = {id(m.out_proj): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}  # passes the weight on, uncalled
    return [(name, slot, attentions.get(id(slot.owner), slot.owner)) for name, shared in places.items() for slot in shared]


def rows(slot: Slot, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What multiplies the weight in one call: for each group of its output rows a view ``[..., k]`` of the input features.

    Raises:
        NotImplementedError: a parameter whose input the module does not show (RNN weights, unknown modules).
    """
    owner = slot.owner
    if isinstance(module, nn.MultiheadAttention):
        query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value")))
        if owner is module.out_proj:
            return [_before_out_proj(module, args, kwargs)]
        known = {"in_proj_weight": [query, key, value], "q_proj_weight": [query], "k_proj_weight": [key], "v_proj_weight": [value]}
        if slot.attr in known:
            return known[slot.attr]
    x: Tensor = args[0] if args else kwargs["input"]
    if slot.attr == "weight":
        if isinstance(owner, nn.Linear):
            return [x]
        if isinstance(owner, nn.Embedding):
            return [F.one_hot(x, owner.num_embeddings)]
        if isinstance(owner, _ConvTransposeNd):
            x = x if x.ndim == len(owner.kernel_size) + 2 else x[None]
            return list(x.movedim(1, -1).split(owner.in_channels // owner.groups, dim=-1))
        if isinstance(owner, _ConvNd):
            return list(_unfold(owner, x).split(owner.weight[0].numel(), dim=-1))
    rest = "turn it into a Linear, bp.as_linears(model)" if is_transposed(owner) else "choose statistics of gates (gate_grad, gate_fisher)"
    raise NotImplementedError(
        f"{slot.name}: the input of a {nn.utils.parametrize.type_before_parametrizations(owner).__name__}'s {slot.attr!r} cannot be seen; "
        f"{rest} or leave it out with `excluding`"
    )


def _unfold(conv: _ConvNd, x: Tensor) -> Tensor:
    """im2col by a convolution with unit kernels, so padding, dilation and rank are torch's own: [batch, *positions, channels * taps]."""
    spatial = len(conv.kernel_size)
    x = x if x.ndim == spatial + 2 else x[None]
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
    taps = conv.weight[0, 0].numel()
    unit = torch.eye(taps, dtype=x.dtype, device=x.device).view(taps, 1, *conv.kernel_size).repeat(conv.in_channels, *[1] * (spatial + 1))
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    return convolve(x, unit, None, conv.stride, padding, conv.dilation, conv.in_channels).movedim(1, -1)


def _before_out_proj(attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of ``out_proj``: the same attention with the identity in its place."""
    slot = Slot("out_proj.weight", attention.out_proj, "weight")
    weight = slot.stored
    prefix = "out_proj.weight" if slot.chain is None else "out_proj.parametrizations.weight.original"
    swapped = {prefix: torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
    if slot.masking is not None:
        swapped["out_proj.parametrizations.weight.0.keep"] = torch.ones_like(slot.masking.keep)
    if attention.out_proj.bias is not None:
        swapped["out_proj.bias"] = torch.zeros_like(attention.out_proj.bias)
    hooks, attention._forward_hooks = attention._forward_hooks, type(attention._forward_hooks)()
    try:
        out: tuple[Tensor, Any] = functional_call(attention, swapped, args, dict(kwargs))
    finally:
        attention._forward_hooks = hooks
    return out[0]


def input_axis(slot: Slot) -> int:
    """The weight's axis along which its input features lie."""
    return 0 if isinstance(slot.owner, (nn.Embedding, _ConvTransposeNd)) and slot.attr == "weight" else 1


def along_weight(feature: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """A statistic of the input features ``[groups, k]`` in a shape that broadcasts to the weight's."""
    groups = len(feature)
    if axis == 0:
        return feature.reshape(shape[0], *[1] * (len(shape) - 1))
    if groups == 1:
        return feature.reshape(1, *shape[1:])
    return feature.repeat_interleave(shape[0] // groups, dim=0).reshape(shape)  # each group of output rows has features of its own
