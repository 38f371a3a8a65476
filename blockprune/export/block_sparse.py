"""From a masked model to one that holds and runs only its kept blocks, and back from a file."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs
from torch import Tensor, nn

from blockprune.apply import finalize
from blockprune.export.choose import ROWS, Choices, choose, forced
from blockprune.export.dense import replaced
from blockprune.export.layers import TENSORS, BlockSparseLinear, as_matrix, layer_like, read
from blockprune.export.places import places
from blockprune.export.two_of_four import WANTED, TwoOfFourLinear, fits
from blockprune.fold import default_forward
from blockprune.names import near, slots

M = TypeVar("M", bound=nn.Module)


def block_sparse(
    model: M,
    *,
    backend: str | Choices = "auto",
    inputs: Any = None,
    rows: int = ROWS,
    forward: Callable[..., Any] = default_forward,
    progress: bool = True,
) -> M:
    """A new model whose masked Linears and convolutions hold and multiply only their kept blocks; the outputs are the masked model's.

    The kept weights are frozen; gradients reach the inputs, the biases and all other parameters. What no block-sparse form has, or is
    faster dense, stays a plain layer with zeros: ``choose(model)`` says which, and why.

    Args:
        model: with masks; it stays as it is.
        backend: "auto" measures every layer (`choose`); "native", "triton", "2:4", "torch" or "dense" for all; or the result of `choose`.
            What "2:4" makes cannot move to another device or type, nor go through `load_state_dict`.
        inputs, rows, forward, progress: for "auto", as in `choose`: what the layers will meet.

    Raises:
        ValueError: a model without masks, a backend that is not known, a choice of "2:4" for a weight that is not.
        RuntimeError: a backend that this machine has not; it says why.
        KeyError: choices made for another model.

    Example:
        >>> from blockprune import export
        >>> x, mask = torch.randn(3, 4), bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> model = bp.apply_masks(nn.Sequential(nn.Linear(4, 2)), {"0.weight": mask})
        >>> sparse = export.block_sparse(model, backend="torch")
        >>> sparse
        Sequential(
          (0): BlockSparseLinear(4, 2, bias=True, 50.0% pruned, torch)
        )
        >>> torch.allclose(sparse(x), model(x), atol=1e-6), list(sparse.state_dict())
        (True, ['0.bias', '0.values', '0.crow', '0.col', '0.layout'])
    """
    if isinstance(backend, Choices):
        choices = backend
    elif backend == "auto":
        choices = choose(model, inputs=inputs, rows=rows, forward=forward, progress=progress)
    else:
        choices = forced(model, backend)
    chosen = {row.name: row.backend for row in choices.rows}
    plain = finalize(model)
    new: dict[nn.Module, nn.Module] = {}
    for place in places(model):
        if place.name not in chosen:
            raise KeyError(f"backend has no choice for {place.name!r}{near(place.name, chosen)}; make it from this model: choose(model)")
        if chosen[place.name] != "dense" and not place.obstacle:
            layer: Any = plain.get_submodule(place.layer)
            made = chosen[place.name]
            if made == "2:4" and not fits(layer.weight):
                raise ValueError(f"{place.name} is not {WANTED}, as backend has it; make it from this model")
            new[layer] = TwoOfFourLinear(layer) if made == "2:4" else layer_like(layer, as_matrix(place.weight, place.mask), made)
    return replaced(plain, new.get)


def load_state_dict(model: M, state: Mapping[str, Tensor], *, strict: bool = True) -> M:
    """A new model with an exported state dict in a skeleton of the plain model, such as ``AutoModel.from_config(config)``.

    Args:
        model: plain, masked or exported; it stays as it is. On the meta device it takes the tensors as they are.
        state: of an exported model, from `safetensors.torch.load_file` for instance.
        strict: as in `nn.Module.load_state_dict`.

    Raises:
        KeyError: a block-sparse layer that the model does not have.
        ValueError: tensors that are not a block-sparse weight (indices out of range, other lengths), or of another shape than the layer; a
            tensor that stays on the meta device.
        RuntimeError: what else does not fit, as torch says it.

    Example:
        >>> from blockprune import export
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> sparse = export.block_sparse(bp.apply_masks(nn.Sequential(nn.Linear(4, 2)), {"0.weight": mask}), backend="torch")
        >>> again, x = export.load_state_dict(nn.Sequential(nn.Linear(4, 2)), sparse.state_dict()), torch.randn(3, 4)
        >>> torch.allclose(again(x), sparse(x), atol=1e-6)
        True
    """
    plain = finalize(model)
    modules = dict(plain.named_modules(remove_duplicate=False))
    new: dict[nn.Module, nn.Module] = {}
    for key in state:
        layer = "" if key == "layout" else key.removesuffix(".layout")
        prefix = f"{layer}." if layer else ""
        if key != f"{prefix}layout" or not all(prefix + name in state for name in TENSORS):
            continue
        if layer not in modules:
            raise KeyError(f"the state dict has a block-sparse layer {layer!r} that the model has not{near(layer, modules)}")
        new[modules[layer]] = _layer(layer, modules[layer], [state[prefix + name] for name in TENSORS])
    plain = replaced(plain, new.get)
    assign, shared = any(p.is_meta for p in plain.parameters()), [places for places in slots(plain).values() if len(places) > 1]
    plain.load_state_dict(state, strict=strict, assign=assign)
    for first, *others in shared:  # torch assigns each by itself
        for other in others:
            setattr(other.owner, other.attr, first.stored)
    if left := [name for name, x in [*plain.named_parameters(), *plain.named_buffers()] if x.is_meta]:
        raise ValueError(
            f"{', '.join(left[:4])}: still on the meta device, for the state dict has no such tensor; make the skeleton on a CPU"
        )
    return plain


def _layer(name: str, like: nn.Module, tensors: list[Tensor]) -> BlockSparseLinear:
    """A layer with a weight of a state dict, and the bias that the skeleton has."""
    if not isinstance(like, (nn.Linear, nn.Conv2d, BlockSparseLinear)):
        raise ValueError(f"{name}: the state dict has a block-sparse weight for a {type(like).__name__}; only Linear and Conv2d have such")
    try:
        weight = read(*(tensor.detach().clone() for tensor in tensors))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    wanted: Any = like.weight
    shape = (len(wanted), wanted[0].numel())
    if weight.shape != shape:
        raise ValueError(
            f"{name}: the state dict has a weight of shape {weight.shape}, and the layer one of {shape}; is it another model's?"
        )
    if not wanted.is_meta:
        values, crow, col = (x.to(wanted.device) for x in (weight.values, weight.crow, weight.col))
        weight = attrs.evolve(weight, values=values.to(wanted.dtype), crow=crow, col=col)
    return layer_like(like, weight)
