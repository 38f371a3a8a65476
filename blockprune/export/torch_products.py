"""The product with a block-sparse weight and its gradients by operators of torch, on any device and in any type."""

import torch
from torch import Tensor

from blockprune.core.precision import double
from blockprune.export.format import BlockSparse, block_rows
from blockprune.export.quantization import quantize_inputs


def torch_product(x: Tensor, sparse: BlockSparse, bias: Tensor | None = None, *, rounded: bool = True) -> Tensor:
    """``x W^T + bias`` by operators of torch, on any device: each block row multiplies the columns of x that it keeps.

    Args:
        x: ``[..., columns]``.
        sparse: the weight. With one of int8, each row of x is rounded to int8 numbers, whose products are added exactly; the sum is
            multiplied with both scales in float32.
        bias: ``[rows]``.
        rounded: False multiplies the values of x as they are with an int8 weight.

    Example:
        >>> from blockprune.export.format import pack
        >>> from blockprune.export.torch_products import torch_product
        >>> w = pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> torch_product(torch.ones(1, 4), w)
        tensor([[2., 2., 2., 2.]])
    """
    row_count, column_count = sparse.shape
    flat = x.reshape(-1, column_count)
    if sparse.scale is None:
        out = _sums(flat, sparse)
    elif rounded:
        numbers, scale = quantize_inputs(flat)
        out = _sums(double(numbers), sparse).float() * (scale[:, None] * sparse.scale)
        bias = None if bias is None else bias.float()
    else:
        out = _sums(flat, sparse) * sparse.scale
    return (out if bias is None else out + bias).to(x.dtype).view(*x.shape[:-1], row_count)


def _sums(x: Tensor, sparse: BlockSparse) -> Tensor:
    """``x W^T`` of ``x [n, columns]`` with the stored values, in the type of x."""
    transposed = x.mT.contiguous()  # [columns, n], so that the gathered columns of x are contiguous
    out = transposed.new_zeros(sparse.shape[0], transposed.shape[1])
    last_columns, gathered = torch.empty(0, device="cpu"), transposed
    for rows, columns, weights in block_rows(sparse):
        if len(columns):
            # A tall block is stored as several block rows with the same columns.
            if last_columns.shape != columns.shape or not torch.equal(last_columns, columns):
                last_columns, gathered = columns, transposed.index_select(0, columns)
            torch.mm(weights.mT.to(x.dtype), gathered, out=out[rows])
    return out.mT.contiguous()


def torch_input_grad(grad: Tensor, sparse: BlockSparse) -> Tensor:
    """``grad W`` of ``grad [..., rows]``: ``[..., columns]``, the gradient of the input. Sums over block rows are float32 or wider.

    Example:
        >>> from blockprune.export.format import pack
        >>> from blockprune.export.torch_products import torch_input_grad
        >>> torch_input_grad(torch.ones(1, 4), pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2))))
        tensor([[4., 4., 0., 0.]])
    """
    row_count, column_count = sparse.shape
    flat = grad.reshape(-1, row_count).mT  # [rows, n]
    if sparse.scale is not None:
        flat = flat * sparse.scale[:, None]
    out = flat.new_zeros(column_count, flat.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
    for rows, columns, weights in block_rows(sparse):
        out.index_add_(0, columns, (weights.to(flat.dtype) @ flat[rows]).to(out.dtype))
    return out.mT.to(grad.dtype).contiguous().view(*grad.shape[:-1], column_count)


def torch_values_grad(grad: Tensor, x: Tensor, positions: BlockSparse) -> Tensor:
    """``grad^T x`` where blocks are kept: the gradient of the kept values, in the order in which they are stored.

    Args:
        grad: of the output, ``[..., rows]``.
        x: ``[..., columns]``.
        positions: the weight with its values numbered from 0.

    Example:
        >>> from blockprune.export.format import pack
        >>> from blockprune.export.torch_products import torch_values_grad
        >>> positions = pack(torch.tensor([[0, 1, 9, 9]]), torch.tensor([[True, False]]), bp.BlockGrid((1, 4), (1, 2)))
        >>> torch_values_grad(torch.ones(1, 1), torch.arange(4.)[None], positions)
        tensor([0., 1.])
    """
    outputs, inputs = grad.reshape(-1, positions.shape[0]).mT, x.reshape(-1, positions.shape[1])
    out = x.new_zeros(len(positions.values))
    for rows, columns, places in block_rows(positions):
        out[places] = (outputs[rows] @ inputs[:, columns]).mT
    return out
