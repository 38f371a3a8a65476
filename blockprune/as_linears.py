"""Weights that Hugging Face keeps transposed (GPT-2) or stacked (experts) become Linears, which blocks, repair and export know."""

import copy
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockprune.experts import is_stacked, split, stacked

__all__ = ["as_linears", "from_linears", "is_transposed"]

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
    """A copy in which every weight that Hugging Face keeps otherwise is an nn.Linear's; the same outputs. `from_linears` goes back.

    A Conv1D (GPT-2 and its kin) becomes a Linear of the same name. Experts in one tensor (Mixtral, Qwen 3 MoE, DeepSeek V3, GPT-OSS and
    others in transformers 5) become ``experts.0.gate_proj``, ``experts.0.up_proj``, ``experts.0.down_proj`` and so on, called one
    expert after the other; that this computes the same is tried on random tokens.

    Args:
        model: without masks; it stays as it is. Where nothing is to be done, the copy is all that is made.

    Raises:
        ValueError: what would become a Linear is masked or otherwise parametrized, has a forward of its own, or shares its weight.

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
    found: dict[str, Any] = {name: module for name, module in model.named_modules() if is_transposed(module) or is_stacked(module)}
    held = {id(p): name for name, module in model.named_modules() if not is_transposed(module) for p in module._parameters.values()}
    for name, module in found.items():
        _check(name, module, held)
    turned: dict[Tensor, nn.Parameter] = {}
    for name, module in found.items():
        if is_stacked(module):
            _split(name, module)
            continue
        if module.weight not in turned:
            turned[module.weight] = nn.Parameter(module.weight.detach().mT.contiguous(), requires_grad=module.weight.requires_grad)
        module.__class__ = nn.Linear  # hooks stay
        module.in_features, module.out_features = module.weight.shape
        module.weight = turned[module.weight]
    return model


def from_linears(model: nn.Module, like: M) -> M:
    """The other way: a copy of ``like``, from which `as_linears` made the model, with the model's weights, pruned or not.

    What it computes is the same, so ``save_pretrained`` writes a checkpoint that Hugging Face and others load.

    Args:
        model: without masks (`finalize`).
        like: the model as it was before `as_linears`; its own values do not matter.

    Raises:
        ValueError: a masked model, or one that was not made from such a model.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> torch.equal(bp.from_linears(bp.as_linears(model), model)[0].weight, model[0].weight)
        True
    """
    if masked := [name for name, module in model.named_modules() if parametrize.is_parametrized(module)]:
        raise ValueError(f"{masked[0] or 'the model'} is parametrized; give a plain model: bp.finalize(model)")
    if empty := [name for name, p in like.named_parameters() if p.is_meta]:
        raise ValueError(f"like has no room for values: {empty[0]} is on the meta device; give the model that as_linears was given")
    modules, state, like = dict(model.named_modules(remove_duplicate=False)), dict(model.state_dict()), copy.deepcopy(like)
    try:
        for name, module in like.named_modules(remove_duplicate=False):
            prefix = f"{name}." if name else ""
            if is_transposed(module) and not is_transposed(modules[name]):
                state[f"{prefix}weight"] = state[f"{prefix}weight"].mT
            elif is_stacked(module) and f"{prefix}down_proj" not in state:  # those that as_linears left as they were
                own = stacked(module, state, prefix)
                split_up = [key for key in state if key.startswith(prefix) and key[len(prefix)].isdecimal()]
                state = {key: x for key, x in state.items() if key not in split_up} | own
        like.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"the model is not as bp.as_linears(like) is: {what}; give as like= what it was made from") from error
    return like


def _check(name: str, module: Any, held: dict[int, str]) -> None:
    what = f"{name or 'the model'}, a {parametrize.type_before_parametrizations(module).__name__},"
    if parametrize.is_parametrized(module):
        raise ValueError(f"{what} is parametrized; make Linears of a plain model: bp.finalize(model)")
    if "forward" in vars(module):
        raise ValueError(f"{what} has a forward of its own, which may do more than a product; delete that first")
    if shared := [other for p in module._parameters.values() if (other := held.get(id(p), name)) != name and p is not None]:
        raise ValueError(
            f"{what} has a weight that {shared[0] or 'the model'} has too, and only one of them would change; untie them first"
        )


def _split(name: str, module: Any) -> None:
    """Make Linears of experts, unless that would not compute the same."""
    trial = copy.deepcopy(module)
    split(trial)
    if why := "" if module.down_proj.is_meta else _odds(module, trial):
        warnings.warn(
            f"{name or 'the model'}, a {type(module).__name__}, {why}, so its experts do not become Linears; repair does not know them",
            stacklevel=3,
        )
    else:
        split(module)


def _odds(module: Any, other: Any) -> str:
    """What is wrong if two modules of experts do not give the same for random tokens, else nothing."""
    plain, down, draw = copy.copy(module), module.down_proj, torch.Generator().manual_seed(0)
    if hasattr(plain, "config"):
        plain.config = copy.copy(plain.config)
        plain.config._experts_implementation = "eager"  # kernels do not know every type and size
    x = torch.randn(32, down.shape[2 if module.is_transposed else 1], generator=draw).to(down)
    chosen = torch.rand(32, len(down), generator=draw).argsort(1)[:, :2]
    share = torch.rand(chosen.shape, generator=draw)
    try:
        with torch.no_grad():
            want, got = (m.forward(x, chosen.to(down.device), share.to(down)) for m in (plain, other))  # no hooks
    except Exception as error:  # called otherwise, or quantized
        return f"cannot be compared with its experts as Linears ({' '.join(str(error).split())})"
    same = (got - want).norm() <= torch.finfo(want.dtype).eps ** 0.5 * want.norm()
    return "" if same else "computes something else than its experts as Linears would"
