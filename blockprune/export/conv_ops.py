# ruff: noqa: PLR0917  (operators of torch take everything by position)
"""The convolution with a block-sparse kernel as an operator of torch, and the patches that it reads."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from blockprune.export.format import BlockSparse, ensure_valid
from blockprune.export.ops import in_transform, input_grad, linear, values_grad
from blockprune.export.torch_products import torch_product
from blockprune.native import spmm
from blockprune.native.spmm import Window


@torch.library.custom_op("blockprune::conv2d", mutates_args=())
def conv2d_op(
    x: Tensor,
    bias: Tensor | None,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    shape: Sequence[int],
    block: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """The convolution of ``x [n, channels, height, width]`` with a kernel whose matrix is block-sparse, in the CPU layout.

    The output has the memory format of x. Types that no compiled kernel supports are computed by `torch_product`. Inside `torch.func` use
    `conv2d`.

    Example:
        >>> from blockprune.export.format import pack
        >>> from blockprune.export.conv_ops import conv2d_op
        >>> w = pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> weight = w.values, w.crow, w.col, w.shape, w.block
        >>> conv2d_op(torch.ones(1, 4, 2, 1), None, *weight, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)).flatten()
        tensor([2., 2., 2., 2., 2., 2., 2., 2.])
    """
    weight, window = (
        BlockSparse(values, crow, col, (shape[0], shape[1]), (block[0], block[1])),
        Window(kernel_size, stride, dilation, padding),
    )
    ensure_valid(weight)
    out = compiled_conv2d(x, weight, bias, window)
    return _as_image(torch_product(patches(x, window), weight, bias), spmm.memory_format(x)) if out is None else out


@conv2d_op.register_fake
def _(x: Tensor, bias: Any, values: Any, crow: Any, col: Any, shape: Sequence[int], block: Any, *window: Sequence[int]) -> Tensor:
    size = x.shape[0], shape[0], *Window(*window).out_size(x)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=spmm.memory_format(x))


def _save_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, *weight, shape, block, kernel_size, stride, dilation, padding = inputs
    ctx.save_for_backward(*weight, x if ctx.needs_input_grad[2] else None)
    ctx.options, ctx.window, ctx.size = (shape, block, True, "native"), Window(kernel_size, stride, dilation, padding), x.shape


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    image_grad, (_, _, height, width), (left, right, top, bottom) = None, ctx.size, ctx.window.padding
    *weight, x = ctx.saved_tensors
    rows = grad.movedim(1, -1)  # [n, height, width, outputs]
    if ctx.needs_input_grad[0]:
        kernel_size, stride, dilation, _ = ctx.window
        columns = input_grad(rows, *weight, *ctx.options, None).flatten(1, 2).mT  # [n, columns, outputs]
        padded = F.fold(columns, (height + top + bottom, width + left + right), kernel_size, dilation, stride=stride)
        image_grad = padded[:, :, top : top + height, left : left + width]
    weight_grad = None
    if ctx.needs_input_grad[2]:
        weight_grad = values_grad(rows, patches(x, ctx.window), *weight[1:], *ctx.options, weight[0].shape[0])
    return image_grad, grad.sum((0, 2, 3)) if ctx.needs_input_grad[1] else None, weight_grad, *[None] * 8


conv2d_op.register_autograd(_conv2d_backward, setup_context=_save_conv2d)


def compiled_conv2d(x: Tensor, sparse: BlockSparse, bias: Tensor | None, window: Window) -> Tensor | None:
    """The convolution by the compiled CPU kernel; None if it does not support the layout, the device, the type or a gradient.

    Example:
        >>> from blockprune.export.format import pack
        >>> from blockprune.export.conv_ops import compiled_conv2d
        >>> from blockprune.native.spmm import Window
        >>> w = pack(torch.ones(4, 4).double(), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> compiled_conv2d(torch.ones(1, 4, 2, 2).double(), w, None, Window((1, 1)))
    """
    if not sparse.paired:
        return None
    return spmm.conv2d(x, sparse.values, sparse.crow, sparse.col, shape=sparse.shape, block=sparse.block, window=window, bias=bias)


def conv2d(x: Tensor, bias: Tensor | None, weight: tuple[Any, ...], window: Window) -> Tensor:
    """A convolution with a block-sparse weight, also inside `torch.func`, on any device: the output has the memory format of x.

    Args:
        x: ``[n, channels, height, width]``.
        bias: ``[filters]`` or None.
        weight: values, crow, col, shape, block, paired and backend, as `linear` takes them.
        window: kernel size, stride, dilation and padding.

    Example:
        >>> from blockprune.export import conv_ops
        >>> from blockprune.export.format import pack
        >>> from blockprune.native.spmm import Window
        >>> w = pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> weight = w.values, w.crow, w.col, w.shape, w.block, w.paired, "torch"
        >>> conv_ops.conv2d(torch.ones(1, 4, 3, 2), None, weight, Window((1, 1))).shape
        torch.Size([1, 4, 3, 2])
    """
    *tensors, shape, block, paired, backend = weight
    if paired and backend != "torch" and not in_transform():
        return cast(Tensor, conv2d_op(x, bias, *tensors, shape, block, *window))
    return _as_image(linear(patches(x, window), bias, *weight), spmm.memory_format(x))


def _as_image(out: Tensor, layout: torch.memory_format) -> Tensor:
    """From ``[n, height, width, channels]`` to ``[n, channels, height, width]``; vmap knows no other way to channels last."""
    image = out.movedim(-1, 1)
    return image if layout is torch.channels_last else image.contiguous()


def patches(x: Tensor, window: Window) -> Tensor:
    """What a convolution of ``x [n, channels, height, width]`` reads for each output (im2col): ``[n, height, width, channels * taps]``.

    Example:
        >>> from blockprune.export.conv_ops import patches
        >>> from blockprune.native.spmm import Window
        >>> patches(torch.ones(1, 4, 5, 5), Window((3, 3))).shape
        torch.Size([1, 3, 3, 36])
    """
    kernel_size, (down, right), dilation, padding = window
    if any(padding):
        x = F.pad(x, list(padding))
    if tuple(kernel_size) == (1, 1):
        return x[:, :, ::down, ::right].movedim(1, -1)
    size = window._replace(padding=(0, 0, 0, 0)).out_size(x)
    columns: Tensor = F.unfold(x, tuple(kernel_size), tuple(dilation), stride=(down, right))  # [n, channels * taps, outputs]
    rows: Tensor = columns.mT.unflatten(1, size)
    return rows
