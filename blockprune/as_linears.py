"""GPT-2 keeps its weights transposed, in layers of its own; here they become Linears, which blocks, repair and export know."""

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["as_linears", "is_transposed"]

M = TypeVar("M", bound=nn.Module)


def is_transposed(module: Any) -> bool:
    """Whether a module is Hugging Face's Conv1D, a Linear whose weight is ``[inputs, outputs]``.

    Example:
        >>> from blockprune.as_linears import is_transposed
        >>> is_transposed(nn.Conv1d(1, 1, 1))
        False
    """
    named = parametrize.type_before_parametrizations(module).__name__ == "Conv1D"
    return named and isinstance(weight := getattr(module, "weight", None), Tensor) and weight.shape[1:] == (getattr(module, "nf", None),)


def as_linears(model: M) -> M:
    """A copy in which every Conv1D of Hugging Face (GPT-2 and its kin) is an nn.Linear of the same name and the same outputs.

    A checkpoint of the result has these weights transposed: give ``weight.mT`` back to the model that you came from.

    Args:
        model: without masks; it stays as it is. Without a Conv1D the copy is all that is made.

    Raises:
        ValueError: a Conv1D that is masked or otherwise parametrized, whose forward was replaced, or whose weight another layer has too.

    Example:
        >>> class Conv1D(nn.Module):  # as transformers.pytorch_utils has it
        ...     def __init__(self, nf, nx):
        ...         super().__init__()
        ...         self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))
        ...     def forward(self, x):
        ...         return x @ self.weight + self.bias
        >>> model, x = nn.Sequential(Conv1D(6, 4)), torch.randn(2, 4)
        >>> found = bp.as_linears(model)
        >>> found[0], torch.allclose(found(x), model(x), atol=1e-6)
        (Linear(in_features=4, out_features=6, bias=True), True)
    """
    model = copy.deepcopy(model)
    found: dict[str, Any] = {name: module for name, module in model.named_modules() if is_transposed(module)}
    others = {id(p) for module in model.modules() if not is_transposed(module) for p in module._parameters.values()}
    turned: dict[Tensor, nn.Parameter] = {}
    for name, module in found.items():
        if parametrize.is_parametrized(module) or "forward" in vars(module) or id(module.weight) in others:
            raise ValueError(
                f"{name or 'the model'} is a Conv1D that is parametrized, does more than a product, or has a weight that another layer has "
                "too; make Linears of a plain model: bp.finalize(model)"
            )
        if module.weight not in turned:
            turned[module.weight] = nn.Parameter(module.weight.detach().mT.contiguous(), requires_grad=module.weight.requires_grad)
        module.__class__ = nn.Linear  # hooks stay
        module.in_features, module.out_features = module.weight.shape
        module.weight = turned[module.weight]
    return model
