"""GPT-2 keeps its weights transposed, in layers of its own; here they become Linears, which blocks, repair and export know."""

import copy
from typing import Any, TypeVar, cast

from torch import nn

__all__ = ["as_linears", "is_transposed"]

M = TypeVar("M", bound=nn.Module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is Hugging Face's Conv1D, a Linear whose weight is ``[inputs, outputs]``.

    Example:
        >>> from blockprune.as_linears import is_transposed
        >>> is_transposed(nn.Conv1d(1, 1, 1))
        False
    """
    return nn.utils.parametrize.type_before_parametrizations(module).__name__ == "Conv1D"


def as_linears(model: M) -> M:
    """A copy in which every Conv1D of Hugging Face (GPT-2 and its kin) is an nn.Linear of the same name and the same outputs.

    A checkpoint of the result has these weights transposed: give ``weight.mT`` back to the model that you came from.

    Args:
        model: without masks; it stays as it is. Without a Conv1D the copy is all that is made.

    Raises:
        ValueError: a Conv1D that is masked or otherwise parametrized.

    Example:
        >>> class Conv1D(nn.Module):  # as transformers.pytorch_utils has it
        ...     def __init__(self, nf, nx):
        ...         super().__init__()
        ...         self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))
        ...     def forward(self, x):
        ...         return x @ self.weight + self.bias
        >>> model, x = nn.Sequential(Conv1D(6, 4)), torch.randn(2, 4)
        >>> found = bp.as_linears(model)
        >>> found[0], torch.allclose(found(x), model(x), atol=1e-6)
        (Linear(in_features=4, out_features=6, bias=True), True)
    """
    for name, module in model.named_modules():
        if is_transposed(module) and nn.utils.parametrize.is_parametrized(module):
            raise ValueError(f"{name or 'the model'} is a parametrized Conv1D; make Linears of a plain model: bp.finalize(model)")
    model = copy.deepcopy(model)
    made = {module: _linear(module) for module in model.modules() if is_transposed(module)}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in made:
                parent._modules[name] = made[child]
    return cast(M, made.get(model, model))


def _linear(module: Any) -> nn.Linear:
    inputs, outputs = module.weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta").train(module.training)
    linear.weight = nn.Parameter(module.weight.detach().mT.contiguous(), requires_grad=module.weight.requires_grad)
    linear.bias = module.bias
    return linear
