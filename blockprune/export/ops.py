# ruff: noqa: PLR0917  (operators of torch take everything by position)
"""The product with a block-sparse weight as an operator of torch, so that autograd, compile, export and vmap support it."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from blockprune.core._compat import forward_ad_is_active, functorch_is_active
from blockprune.export import triton_launch
from blockprune.export.format import BlockSparse, ensure_valid
from blockprune.export.torch_products import torch_input_grad, torch_product, torch_values_grad
from blockprune.native import spmm

BACKENDS = ("native", "triton", "torch")
UNROUNDED = "unrounded"  # of an int8 weight, for derivatives: inputs are multiplied as they are, as if rounding them were the identity


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
    scale: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias`` of ``x [..., columns]`` with a block-sparse ``W [rows, columns]`` (`format.BlockSparse`): ``[..., rows]``.

    A weight of int8 has a ``scale`` of each row; it multiplies inputs that are rounded to int8 (`quantization`), and its gradient for x is
    that of the product with W, as if the rounding were the identity.

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
    weight = BlockSparse(values, crow, col, (shape[0], shape[1]), (block[0], block[1]), paired, scale)
    ensure_valid(weight)
    out = compiled_product(x, weight, bias, backend)
    return torch_product(x, weight, bias, rounded=backend != UNROUNDED) if out is None else out


@torch.library.custom_op("blockprune::linear_input_grad", mutates_args=())
def linear_input_grad_op(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    shape: Sequence[int],
    block: Sequence[int],
    paired: bool,
    backend: str,
    scale: Tensor | None = None,
) -> Tensor:
    """``grad W`` of ``grad [..., rows]``: ``[..., columns]``. A gradient is not rounded, also where the weight is of int8.

    Example:
        >>> from blockprune.export.format import pack
        >>> from blockprune.export.ops import linear_input_grad_op
        >>> w = pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> linear_input_grad_op(torch.ones(1, 4), w.values, w.crow, w.col, w.shape, w.block, w.paired, "native")
        tensor([[4., 4., 0., 0.]])
    """
    weight = BlockSparse(values, crow, col, (shape[0], shape[1]), (block[0], block[1]), paired, scale)
    ensure_valid(weight)
    if paired and scale is None and backend not in ("torch", UNROUNDED):
        compiled = spmm.input_grad(grad, values, crow, col, shape=weight.shape, block=weight.block)
        if compiled is not None:
            return compiled
    return torch_input_grad(grad, weight)


@torch.library.custom_op("blockprune::linear_values_grad", mutates_args=())
def linear_values_grad_op(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    shape: Sequence[int],
    block: Sequence[int],
    paired: bool,
    backend: str,
    count: int,
) -> Tensor:
    """``grad^T x`` where blocks are kept, for ``grad [..., rows]`` and ``x [..., columns]``: the gradient of the values, ``[count]``.

    This is a sampled dense-dense matrix product: nothing is computed for pruned blocks.

    Example:
        >>> from blockprune.export.format import pack
        >>> from blockprune.export.ops import linear_values_grad_op
        >>> w = pack(torch.ones(2, 4), torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> x, grad = torch.arange(4.).view(1, 4), torch.tensor([[1., 2.]])
        >>> linear_values_grad_op(grad, x, w.crow, w.col, w.shape, w.block, w.paired, "native", len(w.values))
        tensor([0., 1., 0., 2.])
    """
    matrix, blocks = (shape[0], shape[1]), (block[0], block[1])
    ensure_valid(BlockSparse(x.new_empty(count), crow, col, matrix, blocks, paired))
    if paired and backend not in ("torch", UNROUNDED):
        compiled = spmm.values_grad(grad, x, crow, col, shape=matrix, block=blocks, count=count)
        if compiled is not None:
            return compiled
    return torch_values_grad(grad, x, BlockSparse(torch.arange(count, device=x.device), crow, col, matrix, blocks, paired))


@linear_values_grad_op.register_fake
def _(grad: Any, x: Tensor, crow: Any, col: Any, shape: Any, block: Any, paired: Any, backend: Any, count: int) -> Tensor:
    return x.new_empty(count)


@linear_op.register_fake
def _(x: Tensor, bias: Any, values: Any, crow: Any, col: Any, shape: Sequence[int], *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


@linear_input_grad_op.register_fake
def _(grad: Tensor, values: Any, crow: Any, col: Any, shape: Sequence[int], *_: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], shape[1]))


class _Linear(torch.autograd.Function):
    """`linear_op` for `torch.func`, which does not support custom operators."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
        return cast(Tensor, linear_op(x, bias, *weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, *weight = inputs
        _save(ctx, weight, x if ctx.needs_input_grad[2] or in_transform() else None)
        ctx.shape = output.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = _saved(ctx)
        x_grad = input_grad(grad, *weight) if ctx.needs_input_grad[0] else None
        bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return x_grad, bias_grad, _weight_grad(ctx, grad, x, weight, 2), None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, bias: Tensor | None, values: Tensor | None, *_: None) -> Tensor:
        weight, saved = _saved(ctx, UNROUNDED)
        terms = [] if x is None else [linear(x, None, *weight)]
        if values is not None:
            terms.append(linear(saved, None, values, *weight[1:]))
        if bias is not None:
            terms.append(bias.expand(ctx.shape))
        return cast(Tensor, sum(terms))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, bias: Tensor | None, *weight: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in (*in_dims[3:5], in_dims[-1])):
            raise NotImplementedError("vmap is over inputs, biases and kept values, not over the indices or scales of a weight")
        if in_dims[2] is not None:
            calls = _unbatched((x, bias, weight[0]), in_dims, info.batch_size)
            return torch.stack([linear(y, b, values, *weight[1:]) for y, b, values in calls]), 0
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        if bias is None or in_dims[1] is None:
            return linear(x, bias, *weight), 0
        out = linear(x, None, *weight)
        return (out + bias.movedim(in_dims[1], 0).view(info.batch_size, *[1] * (out.ndim - 2), -1)).to(out.dtype), 0


class _InputGrad(torch.autograd.Function):
    """`linear_input_grad_op` for `torch.func`; its gradients are `linear` and `values_grad`."""

    @staticmethod
    def forward(grad: Tensor, *weight: Any) -> Tensor:
        return cast(Tensor, linear_input_grad_op(grad, *weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, *weight = inputs
        _save(ctx, weight, grad if ctx.needs_input_grad[1] or in_transform() else None)

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, grad = _saved(ctx, UNROUNDED)
        grad_grad = linear(out_grad, None, *weight) if ctx.needs_input_grad[0] else None
        return grad_grad, _weight_grad(ctx, grad, out_grad, weight, 1), None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad: Tensor | None, values: Tensor | None, *_: None) -> Tensor:
        weight, saved = _saved(ctx)
        terms = [] if grad is None else [input_grad(grad, *weight)]
        if values is not None:
            terms.append(input_grad(saved, values, *weight[1:]))
        return cast(Tensor, sum(terms))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], grad: Tensor, *weight: Any) -> tuple[Tensor, int]:
        if in_dims[1] is not None:
            calls = _unbatched((grad, weight[0]), in_dims, info.batch_size)
            return torch.stack([input_grad(g, values, *weight[1:]) for g, values in calls]), 0
        return input_grad(grad.movedim(cast(int, in_dims[0]), 0), *weight), 0


class _ValuesGrad(torch.autograd.Function):
    """`linear_values_grad_op` for `torch.func`; it is linear in both operands."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, *layout: Any) -> Tensor:
        return cast(Tensor, linear_values_grad_op(grad, x, *layout))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, x, crow, col, *ctx.layout = inputs
        ctx.save_for_backward(grad, x, crow, col)
        ctx.save_for_forward(grad, x, crow, col)

    @staticmethod
    def backward(ctx: Any, values: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, crow, col = ctx.saved_tensors
        weight = values, crow, col, *ctx.layout[:-1], None
        grad_grad = linear(x, None, *weight) if ctx.needs_input_grad[0] else None
        x_grad = input_grad(grad, *weight) if ctx.needs_input_grad[1] else None
        return grad_grad, x_grad, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad: Tensor | None, x: Tensor | None, *_: None) -> Tensor:
        saved_grad, saved_x, *indices = ctx.saved_tensors
        terms = [] if grad is None else [values_grad(grad, saved_x, *indices, *ctx.layout)]
        if x is not None:
            terms.append(values_grad(saved_grad, x, *indices, *ctx.layout))
        return cast(Tensor, sum(terms))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], grad: Tensor, x: Tensor, *layout: Any) -> tuple[Tensor, int]:
        calls = _unbatched((grad, x), in_dims, info.batch_size)
        return torch.stack([values_grad(g, y, *layout) for g, y in calls]), 0


def _unbatched(operands: Sequence[Tensor | None], in_dims: Sequence[int | None], size: int) -> Iterator[tuple[Any, ...]]:
    """The operands of each call that a batch of calls stands for: slices along their axes; those without an axis are always the same."""
    slices = ([x] * size if dim is None or x is None else x.unbind(dim) for x, dim in zip(operands, in_dims, strict=False))
    return zip(*slices, strict=True)


def _save(ctx: Any, weight: Sequence[Any], operand: Tensor | None) -> None:
    """Keep a weight for derivatives, and what it was multiplied with where its values need a gradient."""
    *tensors, scale = *weight[:3], weight[-1]
    saved = *tensors, scale, operand
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.options = weight[3:-1]  # shape, block, paired, backend


def _saved(ctx: Any, backend: str = "") -> tuple[tuple[Any, ...], Any]:
    """The arguments of the operators, for derivatives of an int8 product with another backend, and what the weight was multiplied with."""
    *tensors, scale, operand = ctx.saved_tensors
    *layout, own = ctx.options
    return (*tensors, *layout, backend if backend and scale is not None else own, scale), operand


def _weight_grad(ctx: Any, grad: Tensor, x: Tensor, weight: tuple[Any, ...], position: int) -> Tensor | None:
    """The gradient of the values, which are an operator's argument of this position, if they need it.

    Their number is ``shape[0]``, because ``len`` would make it a constant of a graph that `torch.compile` records.
    """
    values, crow, col, *layout, _ = weight
    return values_grad(grad, x, crow, col, *layout, values.shape[0]) if ctx.needs_input_grad[position] else None


linear_op.register_autograd(_Linear.backward, setup_context=_Linear.setup_context)
linear_input_grad_op.register_autograd(_InputGrad.backward, setup_context=_InputGrad.setup_context)
linear_values_grad_op.register_autograd(_ValuesGrad.backward, setup_context=_ValuesGrad.setup_context)


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
    scale: Tensor | None = None,
) -> Tensor:
    """`linear_op`, also inside `torch.func`: gradients for x, the bias and the values, and vmap over x and the bias.

    Example:
        >>> from blockprune.export import ops
        >>> from blockprune.export.format import pack
        >>> w = pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> weight = w.values, w.crow, w.col, w.shape, w.block, w.paired, "torch"
        >>> torch.func.grad(lambda x: ops.linear(x, None, *weight).sum())(torch.ones(4))
        tensor([4., 4., 0., 0.])
    """
    product: Any = _Linear.apply if in_transform() else linear_op
    return cast(Tensor, product(x, bias, values, crow, col, shape, block, paired, backend, scale))


def input_grad(*arguments: Any) -> Tensor:
    """`linear_input_grad_op`, also inside `torch.func`.

    Example:
        >>> from blockprune.export.format import pack
        >>> from blockprune.export.ops import input_grad
        >>> w = pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> input_grad(torch.ones(1, 4), w.values, w.crow, w.col, w.shape, w.block, w.paired, "torch", None)
        tensor([[4., 4., 0., 0.]])
    """
    return cast(Tensor, _InputGrad.apply(*arguments) if in_transform() else linear_input_grad_op(*arguments))  # type: ignore[no-untyped-call]


def values_grad(*arguments: Any) -> Tensor:
    """`linear_values_grad_op`, also inside `torch.func`.

    Example:
        >>> from blockprune.export.format import pack
        >>> from blockprune.export.ops import values_grad
        >>> w = pack(torch.ones(2, 4), torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> values_grad(torch.ones(1, 2), torch.arange(4.)[None], w.crow, w.col, w.shape, w.block, w.paired, "torch", len(w.values))
        tensor([0., 1., 0., 1.])
    """
    return cast(Tensor, _ValuesGrad.apply(*arguments) if in_transform() else linear_values_grad_op(*arguments))  # type: ignore[no-untyped-call]


def in_transform() -> bool:
    """Whether a transform of `torch.func` is running, which needs an autograd function instead of an operator.

    Example:
        >>> from blockprune.export.ops import in_transform
        >>> in_transform()
        False
    """
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
    if backend in ("torch", UNROUNDED) or (sparse.scale is not None and not sparse.paired):
        return None
    weight = sparse.values, sparse.crow, sparse.col
    if sparse.scale is not None:
        return spmm.linear_int8(x, *weight, sparse.scale, shape=sparse.shape, block=sparse.block, bias=bias)
    product = spmm.linear if sparse.paired else triton_launch.linear
    return product(x, *weight, shape=sparse.shape, block=sparse.block, bias=bias)


def int8_backend(x: Tensor) -> str:
    """The backend that multiplies inputs of this type and device with int8 weights: "native" where the compiled loops can, else "torch".

    Example:
        >>> from blockprune.export.ops import int8_backend
        >>> int8_backend(torch.ones(1, 2).to(torch.float64))
        'torch'
    """
    values, crow, col = (torch.tensor(numbers, device=x.device) for numbers in ([1, 1], [0, 1], [0]))
    weight = BlockSparse(values.to(torch.int8), crow, col.int(), (1, 2), (1, 2), scale=values[:1].float())
    return "torch" if compiled_product(x.new_ones(1, 2), weight, None, "native") is None else "native"
