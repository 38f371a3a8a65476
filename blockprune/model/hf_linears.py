"""Convert Hugging Face modules that keep weights transposed (GPT-2) or stacked (experts) to nn.Linear, and convert them back."""

import copy
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockprune.core._compat_hf import conv1d_outputs, experts_are_transposed, use_eager_experts
from blockprune.model.copying import copy_model
from blockprune.model.experts import is_stacked, stack_state_dict, unstack_experts
from blockprune.model.parameters import check_loaded, parameter_refs
from blockprune.model.sharding import check_not_fully_sharded

__all__ = ["as_linears", "from_linears", "is_transposed", "make_linears"]

M = TypeVar("M", bound=nn.Module)


def is_transposed(module: Any) -> bool:
    """Whether a module is Hugging Face's Conv1D, a Linear whose weight is ``[inputs, outputs]``.

    Example:
        >>> from blockprune.model.hf_linears import is_transposed
        >>> is_transposed(nn.Conv1d(1, 1, 1))
        False
    """
    outputs = conv1d_outputs(module)
    if outputs is None:
        return False
    shapes = [ref.shape for refs in parameter_refs(module).values() for ref in refs if ref.name == "weight"]
    return any(shape[1:] == (outputs,) for shape in shapes)


def as_linears(model: M) -> M:
    """A copy of a model in which every Conv1D and all stacked experts are nn.Linear modules.

    It has the same outputs.

    A Conv1D (in GPT-2 and similar models) becomes a Linear of the same name. Experts that are stacked in one tensor (Mixtral, Qwen 3 MoE,
    DeepSeek V3, GPT-OSS and others in transformers 5) become ``experts.0.gate_proj``, ``experts.0.up_proj``, ``experts.0.down_proj`` and
    so on, which are called one after the other. Random tokens check that the outputs are the same; if not, the experts stay stacked, with a
    warning. `from_linears` converts the copy back.

    After ``import blockprune.hf``, ``from_pretrained`` of a masked or exported copy converts each Conv1D, too. Pruned experts come back
    by `load_masked` or `export.load_state_dict`, into a converted model.

    Args:
        model: a model without masks; it is not changed. A model without such modules is only copied.

    Raises:
        ValueError: a module to convert is masked or otherwise parametrized, has its own ``forward``, or shares its weight with a module
            that is not converted; a model that ``fully_shard`` has sharded or accelerate has offloaded.

    Example:
        >>> class Conv1D(nn.Module):  # like transformers.pytorch_utils.Conv1D
        ...     def __init__(self, nf, nx):
        ...         super().__init__()
        ...         self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))
        ...     def forward(self, x):
        ...         return x @ self.weight + self.bias
        >>> model, x = nn.Sequential(Conv1D(6, 4)), torch.randn(2, 4)
        >>> converted = bp.as_linears(model)
        >>> converted[0], torch.allclose(converted(x), model(x), atol=1e-6)
        (Linear(in_features=4, out_features=6, bias=True), True)
    """
    check_not_fully_sharded(model, "as_linears changes a copy of the model")
    model = copy_model(model)
    modules = dict(model.named_modules())
    to_convert: dict[str, Any] = {name: module for name, module in modules.items() if is_transposed(module) or is_stacked(module)}
    owners = {id(p): name for name, module in modules.items() if not is_transposed(module) for p in module.parameters(recurse=False)}
    converted = {*to_convert.values()}
    refs = [ref for users in parameter_refs(model).values() for ref in users if ref.owner in converted]
    check_loaded(model, refs, "as_linears")
    for name, module in to_convert.items():
        _check_convertible(name, module, owners)
    for name, module in to_convert.items():
        if is_stacked(module):
            _unstack_if_equal(name, module)
    make_linears(module for module in to_convert.values() if is_transposed(module))
    return model


def make_linears(modules: Iterable[Any]) -> None:
    """Convert Conv1D modules to nn.Linear, in place; those that share a weight still do.

    Example:
        >>> from blockprune.model.hf_linears import make_linears
        >>> make_linears(module for module in nn.Sequential(nn.Linear(2, 2)).modules() if is_transposed(module))
    """
    transposed: dict[Tensor, nn.Parameter] = {}  # by the weight of the Conv1D
    for module in modules:
        if module.weight not in transposed:
            transposed[module.weight] = nn.Parameter(module.weight.detach().mT.contiguous(), requires_grad=module.weight.requires_grad)
        module.__class__ = nn.Linear  # the module keeps its hooks
        module.in_features, module.out_features = module.weight.shape
        module.weight = transposed[module.weight]


def from_linears(model: nn.Module, like: M) -> M:
    """A copy of ``like`` with the weights of a model that `as_linears` made from it, pruned or not.

    It has the same outputs as the model.

    Its ``save_pretrained`` writes a checkpoint that Hugging Face and other libraries can load.

    Args:
        model: a model without masks (`finalize`).
        like: the model that `as_linears` was called with; its weights do not matter.

    Raises:
        ValueError: the model is masked, or `as_linears` did not make it from a model like ``like``.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> torch.equal(bp.from_linears(bp.as_linears(model), model)[0].weight, model[0].weight)
        True
    """
    if masked := [name for name, module in model.named_modules() if parametrize.is_parametrized(module)]:
        raise ValueError(f"{masked[0] or 'the model'} is parametrized; give a plain model: bp.finalize(model)")
    if empty := [name for name, p in like.named_parameters() if p.is_meta]:
        raise ValueError(f"like cannot hold values: {empty[0]} is on the meta device; give the model that as_linears was called with")
    modules, state, like = dict(model.named_modules(remove_duplicate=False)), dict(model.state_dict()), copy.deepcopy(like)
    try:
        for name, module in like.named_modules(remove_duplicate=False):
            prefix = f"{name}." if name else ""
            if is_transposed(module) and not is_transposed(modules[name]):
                state[f"{prefix}weight"] = state[f"{prefix}weight"].mT
            elif is_stacked(module) and f"{prefix}down_proj" not in state:  # not the experts that as_linears left stacked
                stacked = stack_state_dict(module, state, prefix)
                unstacked = {key for key in state if key.startswith(prefix) and key[len(prefix)].isdecimal()}
                state = {key: value for key, value in state.items() if key not in unstacked} | stacked
        like.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"the model is not like bp.as_linears(like): {cause}; give as like= the model that it was made from") from error
    return like


def _check_convertible(name: str, module: Any, owners: dict[int, str]) -> None:
    """Raise unless a module can become a Linear.

    ``owners`` names, by the id of a parameter, the module that has it and keeps it as it is.
    """
    what = f"{name or 'the model'}, a {parametrize.type_before_parametrizations(module).__name__},"
    if parametrize.is_parametrized(module):
        raise ValueError(f"{what} is parametrized; convert a plain model: bp.finalize(model)")
    if "forward" in vars(module):
        raise ValueError(f"{what} has its own forward, which a Linear would not call; delete it first")
    if shared := [other for p in module.parameters(recurse=False) if (other := owners.get(id(p), name)) != name]:
        raise ValueError(f"{what} shares a weight with {shared[0] or 'the model'}, which is not converted; untie them first")


def _unstack_if_equal(name: str, module: Any) -> None:
    """Convert stacked experts to Linears, unless that would change their outputs."""
    trial = copy.deepcopy(module)
    unstack_experts(trial)
    if difference := "" if module.down_proj.is_meta else _difference(module, trial):
        warnings.warn(
            f"{name or 'the model'}, a {type(module).__name__}, {difference}, so its experts stay stacked and cannot be repaired",
            stacklevel=3,
        )
    else:
        unstack_experts(module)


def _difference(stacked: Any, unstacked: Any) -> str:
    """How the outputs of two modules of experts differ for random tokens; empty if they are equal up to rounding."""
    stacked, down, rng = copy.copy(stacked), stacked.down_proj, torch.Generator().manual_seed(0)
    if hasattr(stacked, "config"):
        stacked.config = copy.copy(stacked.config)
        use_eager_experts(stacked.config)  # the other kernels do not support every type and size
    x = torch.randn(32, down.shape[2 if experts_are_transposed(stacked) else 1], generator=rng, device="cpu").to(down)
    index = torch.rand(32, len(down), generator=rng, device="cpu").argsort(1)[:, :2]
    weights = torch.rand(index.shape, generator=rng, device="cpu")
    try:
        with torch.no_grad():  # `forward` runs no hooks
            expected, output = (m.forward(x, index.to(down.device), weights.to(down)) for m in (stacked, unstacked))
    except Exception as error:  # the module has another signature, or is quantized
        return f"cannot be compared with its experts as Linears ({' '.join(str(error).split())})"
    is_equal = (output - expected).norm() <= torch.finfo(expected.dtype).eps ** 0.5 * expected.norm()
    return "" if is_equal else "computes something else than its experts as Linears would"
