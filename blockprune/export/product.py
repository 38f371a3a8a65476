# ruff: noqa: PLR0917  (operators of torch take everything by position)
"""The product with a block-sparse weight as an operator of torch, so that autograd, compile, export and vmap know it."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from blockprune.export import gpu
from blockprune.native import spmm
from blockprune.storage import BlockSparse, bands

BACKENDS = ("native", "triton", "torch")


@torch.library.custom_op("blockprune::linear", mutates_args=())
def linear(
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
    """``x W^T + bias`` of ``x [..., cols]`` with ``W [rows, cols]`` stored as `storage.BlockSparse` says, and checked: ``[..., rows]``.

    What is stored in pairs is for CPUs and their compiled product, what is not for GPUs and Triton's, whichever of "native" and "triton" is
    the backend; what neither can multiply (other types, other devices) is torch's. Inside `torch.func` use `multiply`.

    Example:
        >>> from blockprune import storage
        >>> from blockprune.export.product import linear
        >>> w = storage.pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> linear(torch.ones(1, 4), None, w.values, w.crow, w.col, w.shape, w.block, w.paired, "native")
        tensor([[2., 2., 2., 2.]])
    """
    weight = BlockSparse(values, crow, col, (shape[0], shape[1]), (block[0], block[1]), paired)
    out = compiled(x, weight, bias, backend)
    return by_groups(x, weight, bias) if out is None else out


@torch.library.custom_op("blockprune::linear_input_grad", mutates_args=())
def linear_input_grad(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, shape: Sequence[int], block: Sequence[int], paired: bool, backend: str
) -> Tensor:
    """``grad W`` of ``grad [..., rows]``: ``[..., cols]``.

    Example:
        >>> from blockprune import storage
        >>> from blockprune.export.product import linear_input_grad
        >>> w = storage.pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> linear_input_grad(torch.ones(1, 4), w.values, w.crow, w.col, w.shape, w.block, w.paired, "native")
        tensor([[4., 4., 0., 0.]])
    """
    rows, cols = shape
    flat = grad.reshape(-1, rows).mT  # [rows, n]
    out = flat.new_zeros(cols, flat.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))  # a sum over bands
    for here, columns, weights in bands(BlockSparse(values, crow, col, (rows, cols), (block[0], block[1]), paired)):
        out.index_add_(0, columns, (weights @ flat[here]).to(out.dtype))
    return out.mT.to(grad.dtype).contiguous().view(*grad.shape[:-1], cols)


@linear.register_fake
def _(x: Tensor, bias: Any, values: Any, crow: Any, col: Any, shape: Sequence[int], block: Any, paired: bool, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


@linear_input_grad.register_fake
def _(grad: Tensor, values: Any, crow: Any, col: Any, shape: Sequence[int], block: Any, paired: bool, backend: str) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], shape[1]))


class _Linear(torch.autograd.Function):
    """`linear` for `torch.func`, which custom operators do not know."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
        return cast(Tensor, linear(x, bias, *weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:5])
        ctx.save_for_forward(*inputs[2:5])
        ctx.how, ctx.shape = inputs[5:], output.shape  # shape, block, paired, backend

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_x = _input_grad(grad, *ctx.saved_tensors, *ctx.how) if ctx.needs_input_grad[0] else None
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, bias: Tensor | None, *_: None) -> Tensor:
        weight = *ctx.saved_tensors, *ctx.how
        if x is None:
            assert bias is not None
            return bias.expand(ctx.shape)
        return multiply(x, bias, *weight)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, bias: Tensor | None, *weight: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[2:5]):
            raise NotImplementedError("a block-sparse weight is frozen: vmap over inputs and biases, not over weights")
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        if bias is None or in_dims[1] is None:
            return multiply(x, bias, *weight), 0
        out = multiply(x, None, *weight)
        return out + bias.movedim(in_dims[1], 0).view(info.batch_size, *[1] * (out.ndim - 2), -1), 0


class _InputGrad(torch.autograd.Function):
    """`linear_input_grad` for `torch.func`; its own gradient is `linear` again."""

    @staticmethod
    def forward(grad: Tensor, *weight: Any) -> Tensor:
        return cast(Tensor, linear_input_grad(grad, *weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:4])
        ctx.save_for_forward(*inputs[1:4])
        ctx.how = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return multiply(grad, None, *ctx.saved_tensors, *ctx.how), None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad: Tensor, *_: None) -> Tensor:
        return _input_grad(grad, *ctx.saved_tensors, *ctx.how)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], grad: Tensor, *weight: Any) -> tuple[Tensor, int]:
        return _input_grad(grad.movedim(cast(int, in_dims[0]), 0), *weight), 0


linear.register_autograd(_Linear.backward, setup_context=_Linear.setup_context)
linear_input_grad.register_autograd(_InputGrad.backward, setup_context=_InputGrad.setup_context)


def multiply(*arguments: Any) -> Tensor:
    """`linear`, also inside `torch.func`: gradients for x and the bias, vmap over both.

    Example:
        >>> from blockprune import storage
        >>> from blockprune.export.product import multiply
        >>> w = storage.pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> how = w.values, w.crow, w.col, w.shape, w.block, w.paired, "torch"
        >>> torch.func.grad(lambda x: multiply(x, None, *how).sum())(torch.ones(4))
        tensor([4., 4., 0., 0.])
    """
    return cast(Tensor, _Linear.apply(*arguments) if _transforming() else linear(*arguments))  # type: ignore[no-untyped-call]


def _input_grad(*arguments: Any) -> Tensor:
    return cast(Tensor, _InputGrad.apply(*arguments) if _transforming() else linear_input_grad(*arguments))  # type: ignore[no-untyped-call]


def _transforming() -> bool:
    return not torch.compiler.is_compiling() and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def compiled(x: Tensor, sparse: BlockSparse, bias: Tensor | None, backend: str) -> Tensor | None:
    """The same by the compiled loops, or the GPU's kernels if the weight is in their order; None where they cannot, or are not asked.

    Example:
        >>> from blockprune import storage
        >>> from blockprune.export.product import compiled
        >>> w = storage.pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> compiled(torch.ones(1, 4), w, None, "torch")
    """
    if backend == "torch":
        return None
    product = spmm.linear if sparse.paired else gpu.linear
    return product(x, sparse.values, sparse.crow, sparse.col, shape=sparse.shape, block=sparse.block, bias=bias)


def by_groups(x: Tensor, sparse: BlockSparse, bias: Tensor | None = None) -> Tensor:
    """The same in torch alone, on any device: of each band the columns in use are gathered and meet a small dense weight.

    Example:
        >>> from blockprune import storage
        >>> from blockprune.export.product import by_groups
        >>> w = storage.pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> by_groups(torch.ones(1, 4), w)
        tensor([[2., 2., 2., 2.]])
    """
    rows, cols = sparse.shape
    across = x.reshape(-1, cols).mT.contiguous()  # [cols, n]: columns are gathered as they lie
    out = across.new_zeros(rows, across.shape[1])
    last, gathered = torch.empty(0), across
    for here, columns, weights in bands(sparse):
        if len(columns):
            if last.shape != columns.shape or not torch.equal(last, columns):  # a tall block is stored as several bands
                last, gathered = columns, across.index_select(0, columns)
            torch.mm(weights.mT, gathered, out=out[here])
    out = out.mT.contiguous().view(*x.shape[:-1], rows)
    return out if bias is None else out + bias
