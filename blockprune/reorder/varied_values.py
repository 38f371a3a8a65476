"""Other values for a model and its inputs, because values such as zeros and ones hide that an operation uses a tensor."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def vary_model(model: M, *, buffers: bool = True) -> M:
    """A copy with other floating-point parameters and buffers, of similar size; none is zero, and no two entries are equal.

    Entries are multiplied by 0.5 to 1.5, and 1 to 5 % of the tensor's size is added. Buffers, such as variances, do not become smaller by
    what is added.

    Example:
        >>> from blockprune.reorder.varied_values import vary_model
        >>> norm = vary_model(nn.LayerNorm(4))
        >>> bool(norm.weight.std() > 0), bool((norm.bias != 0).all())
        (True, True)
    """
    varied = copy.deepcopy(model)
    tensors = {id(p): (p, True) for p in varied.parameters()} | {id(b): (b, False) for b in varied.buffers() if buffers}
    for tensor, signed in tensors.values():
        if tensor.is_floating_point() and tensor.numel():
            tensor.copy_(_vary(tensor, signed=signed))
    return varied


def vary_floats(x: Tensor) -> Tensor:
    """Other floating-point values, of similar size; integers and booleans stay."""
    return _vary(x, signed=True) if x.is_floating_point() and x.numel() else x


def vary_inputs(x: Tensor) -> Tensor:
    """Values of another kind: a third of floating-point values become zero and a third negative, booleans and integers become random.

    Integers are between 0 and the largest one, or 1.
    """
    if x.is_floating_point():
        return vary_floats(x) * torch.randint(-1, 2, x.shape).to(x)
    if x.is_complex() or not x.numel():
        return x
    highest = 1 if x.dtype == torch.bool else max(1, int(x.max()))
    return torch.randint(highest + 1, x.shape).to(x)


def _vary(x: Tensor, *, signed: bool) -> Tensor:
    """The values times 0.5 to 1.5, plus 1 to 5 % of their root mean square, of random sign if signed."""
    size = x[x.isfinite()].double().square().mean().sqrt().nan_to_num()
    size = size if size > 0 else 1 / torch.tensor(x.shape[-1] if x.ndim > 1 else 1).sqrt()
    shift = (0.01 + 0.04 * torch.rand(x.shape)) * (torch.randn(x.shape).sign() if signed else 1)
    return x * (0.5 + torch.rand(x.shape)).to(x) + (size.cpu() * shift).to(x)
