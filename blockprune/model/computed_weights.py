"""Weights that are no parameters: buffers, and what a hook, other code or a property computes."""

from collections.abc import Iterator, Set

from torch import Tensor, nn

from blockprune.core._compat import ConvNd, own_parametrizations, parameter_names
from blockprune.core.types import Where
from blockprune.model.parameters import ParameterRef

_LAYERS = (nn.Linear, nn.Embedding, ConvNd)  # of torch, in which ``weight`` is a parameter


def _computed_attributes(model: nn.Module) -> Iterator[ParameterRef]:
    """Weights that are buffers or that other code computes, plain tensors and properties, and all that an old hook computes."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {*parameter_names(module)}
        for attr in dict.fromkeys(["weight", *(attr for attr in vars(module) if _is_of_old_hook(attr, own))]):
            value = vars(module).get(attr)
            is_computed = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
            if is_computed or (isinstance(module, _LAYERS) and (_has_property(module, attr) or _has_buffer(module, attr))):
                yield ParameterRef(f"{prefix}.{attr}" if prefix else attr, module, attr)


def _is_of_old_hook(attr: str, own: Set[str]) -> bool:
    """Whether the old weight_norm, spectral_norm or torch.nn.utils.prune computes an attribute of a module with these parameters."""
    return f"{attr}_orig" in own or {f"{attr}_g", f"{attr}_v"} <= own


def _has_property(module: nn.Module, attr: str) -> bool:
    """Whether a property of a user's class computes the weight; parametrizations are properties, too."""
    return isinstance(getattr(type(module), attr, None), property) and attr not in (own_parametrizations(module) or ())


def _has_buffer(module: nn.Module, attr: str) -> bool:
    return any(name == attr for name, _ in module.named_buffers(recurse=False))


def _computed_by(ref: ParameterRef) -> tuple[str, str]:
    """What makes a weight one of `_computed_attributes`, and what to do about it, for an error message."""
    if _is_of_old_hook(ref.attr, {*parameter_names(ref.owner)}):
        remedy = "Remove the hook (remove_weight_norm, remove_spectral_norm, prune.remove), use torch.nn.utils.parametrizations"
        return "a hook of the old weight_norm, spectral_norm or torch.nn.utils.prune computes", remedy
    kind = type(ref.owner).__name__
    if _has_buffer(ref.owner, ref.attr):
        return f"a buffer of the {kind} holds", "Make it an nn.Parameter, with requires_grad=False if it is not to be trained"
    what = f"the property {kind}.{ref.attr}" if _has_property(ref.owner, ref.attr) else f"code that assigns a tensor to the {kind}"
    return f"{what} computes", "Make it an nn.Parameter, compute it by torch.nn.utils.parametrize.register_parametrization"


def check_is_parameter(model: nn.Module, where: Where) -> None:
    """Raise a ValueError if a rule selects a weight that is no parameter."""
    for ref in _computed_attributes(model):
        if where(ref.name, ref.owner) is not None:
            what, remedy = _computed_by(ref)
            raise ValueError(
                f"{ref.name} {ref.shape}: this weight is no parameter; {what} it. {remedy}, or leave the weight out with `excluding`"
            )


def check_not_computed(model: nn.Module) -> None:
    """Raise a ValueError if a module has a computed tensor that `copy.deepcopy` cannot copy, because it has a gradient."""
    if computed := [ref for ref in _computed_attributes(model) if ref.attr in vars(ref.owner) and ref.stored.grad_fn is not None]:
        what, remedy = _computed_by(computed[0])
        raise ValueError(f"{computed[0].name}: {what} this tensor, and torch cannot copy it. {remedy}, or detach the tensor")
