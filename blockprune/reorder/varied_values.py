"""Other values for a model and its inputs, because values such as zeros and ones hide that an operation uses a tensor."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.core._compat import tree_leaves

CHUNK = 1 << 20  # elements whose values are changed at a time
_OF_TORCH = frozenset(vars(nn.Module()))  # the names of a module's containers of parameters, buffers, modules and hooks
Change = Callable[[Tensor, torch.Generator], Tensor]  # of an input; the random numbers are those of the generator


@torch.no_grad()
def vary_model(model: nn.Module, *, buffers: bool = True, generator: torch.Generator | None = None) -> None:
    """Give a model, in place, other floating-point parameters and buffers, of similar size; none is zero, and no two entries are equal.

    Entries are multiplied by 0.5 to 1.5, and 1 to 5 % of the tensor's size is added. Buffers, such as variances, do not become smaller by
    what is added. Tensors in attributes that are no buffers (`tensors_in_attributes`) count as buffers.

    Example:
        >>> from blockprune.reorder.varied_values import vary_model
        >>> norm = nn.LayerNorm(4)
        >>> vary_model(norm)
        >>> bool(norm.weight.std() > 0), bool((norm.bias != 0).all())
        (True, True)
    """
    parameters = {*model.parameters()}
    for tensor in _all_tensors(model) if buffers else model.parameters():
        if tensor.is_floating_point() and tensor.numel():
            size, signed = _size(tensor), tensor in parameters
            for part in tensor.split(max(1, CHUNK // tensor[0].numel())) if tensor.ndim else [tensor]:
                part.copy_(_vary(part, size, signed=signed, generator=generator))


def integers_and_booleans(model: nn.Module) -> list[Tensor]:
    """The parameters, buffers and tensors in attributes that are integers or booleans.

    Example:
        >>> from blockprune.reorder.varied_values import integers_and_booleans
        >>> integers_and_booleans(nn.BatchNorm1d(2))
        [tensor(0)]
    """
    return [x for x in _all_tensors(model) if x.numel() and not (x.is_floating_point() or x.is_complex())]


def _all_tensors(model: nn.Module) -> list[Tensor]:
    """The parameters, buffers and tensors in attributes, each once."""
    attributes = (x for module in model.modules() for values in tensors_in_attributes(module).values() for x in values)
    return [*{id(x): x for x in itertools.chain(model.parameters(), model.buffers(), attributes)}.values()]


def tensors_in_attributes(module: nn.Module) -> dict[str, list[Tensor]]:
    """The plain tensors in each attribute of a module itself, also in lists, tuples and dicts, that are no parameters or buffers.

    Example:
        >>> from blockprune.reorder.varied_values import tensors_in_attributes
        >>> layer = nn.Linear(2, 2)
        >>> layer.tables = [torch.ones(2), {"more": torch.zeros(2)}]
        >>> tensors_in_attributes(layer)
        {'tables': [tensor([1., 1.]), tensor([0., 0.])]}
    """
    leaves = {name: _leaves(value) for name, value in vars(module).items() if name not in _OF_TORCH}
    return {name: tensors for name, values in leaves.items() if (tensors := [x for x in values if _can_be_written(x)])}


def _leaves(value: Any) -> list[Any]:
    try:
        return tree_leaves(value)
    except RecursionError:  # a container that contains itself
        return []


def _can_be_written(x: Any) -> bool:
    is_plain = type(x) is Tensor and x.layout == torch.strided and not (x.is_nested or x.is_meta or x.is_inference())
    return is_plain and all(stride or size < 2 for stride, size in zip(x.stride(), x.shape, strict=True))


def same_values(x: Tensor, generator: torch.Generator) -> Tensor:
    """A copy."""
    return x.clone()


def vary_floats(x: Tensor, generator: torch.Generator) -> Tensor:
    """Other floating-point values, of similar size; integers and booleans stay."""
    return _vary(x, _size(x), signed=True, generator=generator) if x.is_floating_point() and x.numel() else x


def vary_inputs(x: Tensor, generator: torch.Generator) -> Tensor:
    """Values of another kind: a third of floating-point values become zero and a third negative, booleans and integers become random.

    Integers are between 0 and the largest one, or 1.
    """
    if x.is_floating_point():
        return vary_floats(x, generator) * torch.randint(-1, 2, x.shape, generator=generator, device="cpu").to(x)
    if x.is_complex() or not x.numel():
        return x
    highest = 1 if x.dtype == torch.bool else max(1, int(x.max()))
    return torch.randint(highest + 1, x.shape, generator=generator, device="cpu").to(x)


def _size(x: Tensor) -> Tensor:
    """The root mean square of the finite values; for zeros, that of usual initial values."""
    squares = [(part[part.isfinite()].double().square().sum(), part.isfinite().sum()) for part in x.flatten().split(CHUNK)]
    total, count = (torch.stack(parts).sum() for parts in zip(*squares, strict=True))
    size = (total / count).sqrt().nan_to_num()
    return size if size > 0 else 1 / torch.tensor(x.shape[-1] if x.ndim > 1 else 1, device="cpu").sqrt()


def _vary(x: Tensor, size: Tensor, *, signed: bool, generator: torch.Generator | None = None) -> Tensor:
    """The values times 0.5 to 1.5, plus 1 to 5 % of this size, of random sign if signed."""
    shift = (0.01 + 0.04 * torch.rand(x.shape, generator=generator, device="cpu")) * (
        torch.randn(x.shape, generator=generator, device="cpu").sign() if signed else 1
    )
    return x * (0.5 + torch.rand(x.shape, generator=generator, device="cpu")).to(x) + (size.cpu() * shift).to(x)
