# ruff: noqa: PLR0917  (operators of torch take everything by position)
"""The product with a block-sparse weight as an operator of torch, so that autograd, compile, export and vmap support it."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from blockprune.core._compat import forward_ad_is_active, functorch_is_active
from blockprune.export import triton_launch
from blockprune.export.format import BlockSparse, block_rows, ensure_valid
from blockprune.native import spmm
from blockprune.native.spmm import Window

BACKENDS = ("native", "triton", "torch")


@torch.library.custom_op("blockprune::linear", mutates_args=())
def linear_op(
    x: Tensor,
    bias: Tensor | None,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    shape: Sequence[int],
    block: Sequence[int],
    paired: bool,
    backend: str,
) -> Tensor:
    """``x W^T + bias`` of ``x [..., columns]`` with a block-sparse ``W [rows, columns]`` (`format.BlockSparse`): ``[..., rows]``.

    With the backends "native" and "triton", the layout of the weight decides which kernel runs: the compiled one for CPUs (``paired``) or
    the Triton one for GPUs. Types and devices that the kernel does not support are computed by `torch_product`. Inside `torch.func` use
    `linear`.

    Example:
        >>> from blockprune.export.format import pack
        >>> from blockprune.export.ops import linear_op
        >>> w = pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> linear_op(torch.ones(1, 4), None, w.values, w.crow, w.col, w.shape, w.block, w.paired, "native")
        tensor([[2., 2., 2., 2.]])
    """
    weight = BlockSparse(values, crow, col, (shape[0], shape[1]), (block[0], block[1]), paired)
    ensure_valid(weight)
    out = compiled_product(x, weight, bias, backend)
    return torch_product(x, weight, bias) if out is None else out


@torch.library.custom_op("blockprune::linear_input_grad", mutates_args=())
def linear_input_grad_op(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, shape: Sequence[int], block: Sequence[int], paired: bool, backend: str
) -> Tensor:
    """``grad W`` of ``grad [..., rows]``: ``[..., columns]``.

    Example:
        >>> from blockprune.export.format import pack
        >>> from blockprune.export.ops import linear_input_grad_op
        >>> w = pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> linear_input_grad_op(torch.ones(1, 4), w.values, w.crow, w.col, w.shape, w.block, w.paired, "native")
        tensor([[4., 4., 0., 0.]])
    """
    row_count, column_count = shape
    weight = BlockSparse(values, crow, col, (row_count, column_count), (block[0], block[1]), paired)
    ensure_valid(weight)
    flat = grad.reshape(-1, row_count).mT  # [rows, n]
    out = flat.new_zeros(column_count, flat.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))  # a sum over block rows
    for rows, columns, weights in block_rows(weight):
        out.index_add_(0, columns, (weights @ flat[rows]).to(out.dtype))
    return out.mT.to(grad.dtype).contiguous().view(*grad.shape[:-1], column_count)


@linear_op.register_fake
def _(x: Tensor, bias: Any, values: Any, crow: Any, col: Any, shape: Sequence[int], block: Any, paired: bool, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


@linear_input_grad_op.register_fake
def _(grad: Tensor, values: Any, crow: Any, col: Any, shape: Sequence[int], block: Any, paired: bool, backend: str) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], shape[1]))


class _Linear(torch.autograd.Function):
    """`linear_op` for `torch.func`, which does not support custom operators."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
        return cast(Tensor, linear_op(x, bias, *weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:5])
        ctx.save_for_forward(*inputs[2:5])
        ctx.options, ctx.shape = inputs[5:], output.shape  # options: shape, block, paired, backend

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input_grad = _input_grad(grad, *ctx.saved_tensors, *ctx.options) if ctx.needs_input_grad[0] else None
        bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return input_grad, bias_grad, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, bias: Tensor | None, *_: None) -> Tensor:
        weight = *ctx.saved_tensors, *ctx.options
        if x is None:
            assert bias is not None
            return bias.expand(ctx.shape)
        return linear(x, bias, *weight)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, bias: Tensor | None, *weight: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[2:5]):
            raise NotImplementedError("a block-sparse weight is frozen: vmap over inputs and biases, not over weights")
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        if bias is None or in_dims[1] is None:
            return linear(x, bias, *weight), 0
        out = linear(x, None, *weight)
        return out + bias.movedim(in_dims[1], 0).view(info.batch_size, *[1] * (out.ndim - 2), -1), 0


class _InputGrad(torch.autograd.Function):
    """`linear_input_grad_op` for `torch.func`; its gradient is `linear`."""

    @staticmethod
    def forward(grad: Tensor, *weight: Any) -> Tensor:
        return cast(Tensor, linear_input_grad_op(grad, *weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:4])
        ctx.save_for_forward(*inputs[1:4])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return linear(grad, None, *ctx.saved_tensors, *ctx.options), None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad: Tensor, *_: None) -> Tensor:
        return _input_grad(grad, *ctx.saved_tensors, *ctx.options)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], grad: Tensor, *weight: Any) -> tuple[Tensor, int]:
        return _input_grad(grad.movedim(cast(int, in_dims[0]), 0), *weight), 0


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
        >>> from blockprune.export.ops import conv2d_op
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
    x, _, *indices, shape, block, kernel_size, stride, dilation, padding = inputs
    ctx.save_for_backward(*indices)
    ctx.options, ctx.window, ctx.size = (shape, block, True, "native"), Window(kernel_size, stride, dilation, padding), x.shape


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input_grad, (_, _, height, width), (left, right, top, bottom) = None, ctx.size, ctx.window.padding
    if ctx.needs_input_grad[0]:
        kernel_size, stride, dilation, _ = ctx.window
        columns = _input_grad(grad.movedim(1, -1), *ctx.saved_tensors, *ctx.options).flatten(1, 2).mT  # [n, columns, outputs]
        padded = F.fold(columns, (height + top + bottom, width + left + right), kernel_size, dilation, stride=stride)
        input_grad = padded[:, :, top : top + height, left : left + width]
    return input_grad, grad.sum((0, 2, 3)) if ctx.needs_input_grad[1] else None, *[None] * 9


conv2d_op.register_autograd(_conv2d_backward, setup_context=_save_conv2d)


linear_op.register_autograd(_Linear.backward, setup_context=_Linear.setup_context)
linear_input_grad_op.register_autograd(_InputGrad.backward, setup_context=_InputGrad.setup_context)


def linear(*arguments: Any) -> Tensor:
    """`linear_op`, also inside `torch.func`: gradients for x and the bias, and vmap over both.

    Example:
        >>> from blockprune.export import ops
        >>> from blockprune.export.format import pack
        >>> w = pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> weight = w.values, w.crow, w.col, w.shape, w.block, w.paired, "torch"
        >>> torch.func.grad(lambda x: ops.linear(x, None, *weight).sum())(torch.ones(4))
        tensor([4., 4., 0., 0.])
    """
    return cast(Tensor, _Linear.apply(*arguments) if _in_transform() else linear_op(*arguments))  # type: ignore[no-untyped-call]


def conv2d(x: Tensor, bias: Tensor | None, weight: tuple[Any, ...], window: Window) -> Tensor:
    """A convolution with a block-sparse weight, also inside `torch.func`, on any device: the output has the memory format of x.

    Args:
        x: ``[n, channels, height, width]``.
        bias: ``[filters]`` or None.
        weight: values, crow, col, shape, block, paired and backend, as `linear` takes them.
        window: kernel size, stride, dilation and padding.

    Example:
        >>> from blockprune.export import ops
        >>> from blockprune.export.format import pack
        >>> from blockprune.native.spmm import Window
        >>> w = pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> weight = w.values, w.crow, w.col, w.shape, w.block, w.paired, "torch"
        >>> ops.conv2d(torch.ones(1, 4, 3, 2), None, weight, Window((1, 1))).shape
        torch.Size([1, 4, 3, 2])
    """
    *tensors, shape, block, paired, backend = weight
    if paired and backend != "torch" and not _in_transform():
        return cast(Tensor, conv2d_op(x, bias, *tensors, shape, block, *window))
    return _as_image(linear(patches(x, window), bias, *weight), spmm.memory_format(x))


def _as_image(out: Tensor, layout: torch.memory_format) -> Tensor:
    """From ``[n, height, width, channels]`` to ``[n, channels, height, width]``; vmap knows no other way to channels last."""
    image = out.movedim(-1, 1)
    return image if layout is torch.channels_last else image.contiguous()


def patches(x: Tensor, window: Window) -> Tensor:
    """What a convolution of ``x [n, channels, height, width]`` reads for each output (im2col): ``[n, height, width, channels * taps]``.

    Example:
        >>> from blockprune.export.ops import patches
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


def _input_grad(*arguments: Any) -> Tensor:
    return cast(Tensor, _InputGrad.apply(*arguments) if _in_transform() else linear_input_grad_op(*arguments))  # type: ignore[no-untyped-call]


def _in_transform() -> bool:
    return not torch.compiler.is_compiling() and (functorch_is_active() or forward_ad_is_active())


def compiled_product(x: Tensor, sparse: BlockSparse, bias: Tensor | None, backend: str) -> Tensor | None:
    """``x W^T + bias`` by the compiled CPU kernel or the Triton kernel, as the weight's layout decides.

    None if the backend is "torch", or if the kernel does not support the device, the type or a gradient.

    Example:
        >>> from blockprune.export.format import pack
        >>> from blockprune.export.ops import compiled_product
        >>> w = pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> compiled_product(torch.ones(1, 4), w, None, "torch")
    """
    if backend == "torch":
        return None
    product = spmm.linear if sparse.paired else triton_launch.linear
    return product(x, sparse.values, sparse.crow, sparse.col, shape=sparse.shape, block=sparse.block, bias=bias)


def compiled_conv2d(x: Tensor, sparse: BlockSparse, bias: Tensor | None, window: Window) -> Tensor | None:
    """The convolution by the compiled CPU kernel; None if it does not support the layout, the device, the type or a gradient.

    Example:
        >>> from blockprune.export.format import pack
        >>> from blockprune.export.ops import compiled_conv2d
        >>> from blockprune.native.spmm import Window
        >>> w = pack(torch.ones(4, 4).double(), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> compiled_conv2d(torch.ones(1, 4, 2, 2).double(), w, None, Window((1, 1)))
    """
    if not sparse.paired:
        return None
    return spmm.conv2d(x, sparse.values, sparse.crow, sparse.col, shape=sparse.shape, block=sparse.block, window=window, bias=bias)


def torch_product(x: Tensor, sparse: BlockSparse, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` by operators of torch, on any device: each block row multiplies the columns of x that it keeps.

    Example:
        >>> from blockprune.export.format import pack
        >>> from blockprune.export.ops import torch_product
        >>> w = pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> torch_product(torch.ones(1, 4), w)
        tensor([[2., 2., 2., 2.]])
    """
    row_count, column_count = sparse.shape
    transposed = x.reshape(-1, column_count).mT.contiguous()  # [columns, n], so that the gathered columns of x are contiguous
    out = transposed.new_zeros(row_count, transposed.shape[1])
    last_columns, gathered = torch.empty(0), transposed
    for rows, columns, weights in block_rows(sparse):
        if len(columns):
            # A tall block is stored as several block rows with the same columns.
            if last_columns.shape != columns.shape or not torch.equal(last_columns, columns):
                last_columns, gathered = columns, transposed.index_select(0, columns)
            torch.mm(weights.mT, gathered, out=out[rows])
    out = out.mT.contiguous().view(*x.shape[:-1], row_count)
    return out if bias is None else out + bias
