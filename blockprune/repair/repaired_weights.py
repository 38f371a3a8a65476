"""The check of what a repair function, which may be a user's own, returns for a layer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blockprune.core.patterns import suggest
from blockprune.model.apply import checked_weight
from blockprune.model.parameters import parameter_refs
from blockprune.repair.transformer_layers import Layer


def checked_repair(what: str, weights: Any, layer: Layer, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The new weights without their gradients' graph.

    Args:
        what: the argument that made them, such as "reconstruct".
        weights: whatever it returned.
        layer: the layer that it repaired.
        names: the names that it may use, and the name in the layer of such a parameter.

    Raises:
        TypeError: no mapping, or a weight that is no dense tensor of floating-point numbers.
        KeyError: a name that is none of these.
        ValueError: a weight of another shape than its parameter, or with NaN or inf.

    Example:
        >>> from blockprune.repair.repaired_weights import checked_repair
        >>> from blockprune.repair.transformer_layers import Layer
        >>> layer = Layer("encoder.0", nn.Linear(2, 2), ["encoder.0.weight"])
        >>> list(checked_repair("reconstruct", {"encoder.0.bias": torch.zeros(2)}, layer, layer.local_names))
        ['encoder.0.bias']
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"{what} must return a mapping from parameter names to tensors, but for layer {layer.name!r} it returned a "
            f"{type(weights).__name__}"
        )
    refs = {ref.name: ref for users in parameter_refs(layer.module).values() for ref in users}
    checked: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name not in names:
            raise KeyError(f"{what} returned a weight for {name!r}, which is not a parameter of layer {layer.name!r}{suggest(name, names)}")
        ref, full_name = refs[names[name]], f"{layer.name}.{names[name]}" if layer.name else names[name]
        if isinstance(weight, Tensor) and not weight.is_floating_point() and not weight.is_complex():
            raise TypeError(
                f"{full_name}: the parameter {ref.shape} has a new weight from {what} that is {weight.dtype}, which rounds it; give a "
                "dense real tensor of floating-point numbers"
            )
        checked_weight(full_name, ref, weight, f"a new weight from {what}")
        checked[name] = weight.detach()
    return checked
