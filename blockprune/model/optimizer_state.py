"""What changes with the masks of a model in training: the values of new blocks, and what the optimizer remembers of blocks."""

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockprune.core.grid import expand
from blockprune.core.sharded_tensor import sharded_like, whole
from blockprune.core.types import BlockMask, Masks, check_masks
from blockprune.model.masking import mask_blocks
from blockprune.model.parameters import check_loaded, find_parameters, parameter_refs, select_parameters
from blockprune.model.parametrization import MaskBlocks
from blockprune.model.sharding import reshard

Optimizers = TypeVar("Optimizers", bound=Optimizer | Sequence[Optimizer])

# the tensors that do not begin at 0, and the option of a group of parameters at which they do: of Rprop and of Adagrad
_INITIAL_STATES = {"step_size": "lr", "sum": "initial_accumulator_value"}


def zero_new_blocks(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """The stored weights, with zeros in the blocks that these masks keep and the model's present masks prune; for `apply_masks`.

    Without it, a block that comes back has the values that are stored for it, such as those from before it was pruned. NaN and inf that are
    stored in blocks that stay pruned become zero, too.

    Args:
        model: a masked model; it is not changed.
        masks: the next masks, such as `regrow` returns them.

    Raises:
        KeyError: a parameter that the model does not have.
        ValueError: a mask with different blocks than the present one, a parameter without a mask, or whose weight another parametrization
            computes.
        TypeError: something else than masks, such as the result of a recipe.

    Example:
        >>> grid = bp.BlockGrid((1, 2), (1, 1))
        >>> before, after = ({"weight": bp.BlockMask(torch.tensor([keep]), grid)} for keep in ([True, False], [False, True]))
        >>> model = bp.apply_masks(nn.Linear(2, 1), before, {"weight": torch.tensor([[3.0, 4.0]])})
        >>> bp.zero_new_blocks(model, after)
        {'weight': tensor([[3., 0.]])}
    """
    check_masks(masks)
    reshard(model)
    weights: dict[str, Tensor] = {}
    parameters = find_parameters(model, masks, what="masks")
    check_loaded(model, [refs[0] for refs in parameters.values()], "zero_new_blocks")
    for (name, refs), mask in zip(parameters.items(), masks.values(), strict=True):
        ref, present = refs[0], refs[0].mask
        if present is None or not ref.is_plain:
            reason = "has no mask, so that no block of it is new" if ref.is_plain else "is computed by another parametrization"
            raise ValueError(f"{name} {ref.shape}: this parameter {reason}; leave it out")
        if present.grid != mask.grid:
            raise ValueError(f"{name}: the masks have {mask.grid}, but the model has {present.grid}; use one `where` for both")
        keep = mask.keep.to(present.keep.device)
        weight = mask_blocks(ref.stored.detach(), present.keep | ~keep, mask.grid)
        if not whole(weight.isfinite().all()):  # NaN and inf may be stored in blocks that stay pruned, and `apply_masks` refuses them
            unused = sharded_like(expand(~(keep | present.keep), mask.grid).to(weight.device), weight)
            weight = weight.masked_fill(unused & ~weight.isfinite(), 0)
        weights[name] = weight
    return weights


def reset_state(optimizer: Optimizers, model: nn.Module, before: Masks, after: Masks) -> Optimizers:
    """Change an optimizer in place, so that it remembers nothing of the blocks that ``before`` or ``after`` keeps, but not both; return it.

    In these blocks the tensors that it holds for a parameter, such as the momentum of SGD and both moments of Adam and AdamW, become what
    they are before the first step: zero, but for the step sizes of Rprop and the sums of Adagrad (`initial_state`). Step counters stay, as
    in RigL.

    Args:
        optimizer: any optimizer whose tensors have the shapes of their parameters, with a step done or not; or several, as `muon` returns.
        model: the model that it trains; it is not changed.
        before: the masks of the model until now. A parameter that it lacks was kept whole.
        after: the masks from now on. A parameter that it lacks is kept whole.

    Raises:
        KeyError: a parameter that the model does not have.
        ValueError: optimizers that have none of these parameters, that hold tensors of other shapes (Adafactor), or lists for all
            parameters together (LBFGS); a parameter with different blocks in the two masks, or that another parametrization computes from
            several tensors (weight_norm). The optimizer is as it was before the call.
        TypeError: ``before`` or ``after`` are no masks, such as the result of a recipe; something that is no optimizer.

    Example:
        >>> model, grid = nn.Linear(2, 1, bias=False), bp.BlockGrid((1, 2), (1, 1))
        >>> before, after = ({"weight": bp.BlockMask(torch.tensor([keep]), grid)} for keep in ([True, True], [True, False]))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer = bp.reset_state(optimizer, model, before, after)
        >>> optimizer.state[model.weight]["momentum_buffer"]
        tensor([[1., 0.]])
    """
    check_masks(before, "before")
    check_masks(after, "after")
    reshard(model)
    of_model = parameter_refs(model)
    chosen = [(select_parameters(model, of_model, masks, what="masks"), masks) for masks in (before, after)]
    refs = {name: users[0] for selected, _ in chosen for name, users in selected.items()}
    old, new = (dict(zip(selected, masks.values(), strict=True)) for selected, masks in chosen)
    for name, ref in refs.items():
        if len(ref.originals) > 1:
            kind = next(type(p).__name__ for p in ref.parametrizations or () if not isinstance(p, MaskBlocks))
            raise ValueError(
                f"{name} {ref.shape}: the parametrization {kind.strip('_')} computes this weight from {len(ref.originals)} tensors, and "
                "no number of theirs belongs to one block; remove the parametrization, leave the parameter out, or make a new optimizer"
            )
    optimizers = list_of(optimizer)
    trained = trained_ids(optimizers)
    if refs and not any(id(ref.stored) in trained for ref in refs.values()):
        kinds = " and ".join(type(held).__name__ for held in optimizers) or "empty"
        raise ValueError(
            f"optimizer is {kinds}, which has none of the masked parameters, such as {next(iter(refs))!r}; give the optimizer that trains "
            "this model"
        )
    changed = {name: _changed_elements(name, old.get(name), new.get(name)) for name in refs}
    for held, (name, ref) in itertools.product(optimizers, refs.items()):
        check_state(held, name, ref.stored, ref.shape)
    for held, (name, ref) in itertools.product(optimizers, refs.items()):
        reset_elements(held, ref.stored, changed[name])
    return optimizer


def list_of(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """The optimizers of an argument that is one, several or None.

    Raises:
        TypeError: something that is no optimizer.
    """
    optimizers = list(optimizer or ()) if optimizer is None or isinstance(optimizer, Iterable) else [optimizer]
    for held in optimizers:
        if not hasattr(held, "param_groups") or not hasattr(held, "state"):
            raise TypeError(f"optimizer has the type {type(held).__name__}; give a torch.optim.Optimizer, or a list of them")
    return optimizers


def trained_ids(optimizers: Sequence[Optimizer]) -> set[int]:
    """The ids of the parameters of optimizers.

    Raises:
        ValueError: a state such as that of LBFGS, a list for all parameters together.
    """
    for optimizer in optimizers:
        lists = [key for state in optimizer.state.values() for key, value in state.items() if isinstance(value, (list, tuple))]
        if lists:
            raise ValueError(
                f"optimizer: the state {lists[0]!r} of {type(optimizer).__name__} is not one number for each weight; use an optimizer such "
                "as SGD, Adam or AdamW, or make a new one"
            )
    return {id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}


def initial_state(optimizer: Optimizer, parameter: Tensor, key: str) -> float:
    """The number that fills a tensor of a parameter's state before the first step, such as the momentum of SGD; ``key`` names the tensor.

    A step size of Rprop begins at the present learning rate, because Rprop multiplies it with factors and never adds to it.

    Example:
        >>> from blockprune.model.optimizer_state import initial_state
        >>> parameter = nn.Parameter(torch.ones(2))
        >>> initial_state(torch.optim.Rprop([parameter], lr=0.01), parameter, "step_size")
        0.01
    """
    option = _INITIAL_STATES.get(key)
    groups = [group for group in optimizer.param_groups if any(parameter is other for other in group["params"])]
    return float(groups[0].get(option, 0)) if option is not None and groups else 0.0


def _changed_elements(name: str, old: BlockMask | None, new: BlockMask | None) -> Tensor:
    """The elements of the blocks that one mask keeps and the other prunes; no mask keeps all."""
    if old is not None and new is not None:
        if old.grid != new.grid:
            raise ValueError(f"{name} has different blocks in before and after, {old.grid} and {new.grid}; make both with one `where`")
        return expand(old.keep ^ new.keep.to(old.keep.device), old.grid)
    mask = new if old is None else old
    assert mask is not None
    return expand(~mask.keep, mask.grid)


def check_state(optimizer: Optimizer, name: str, parameter: Tensor, shape: Sequence[int]) -> None:
    """Raise a ValueError for a tensor of a parameter's state that has axes and another shape: nothing says which numbers belong to a block.

    Step counters have no axes.
    """
    for key, state in optimizer.state.get(parameter, {}).items():
        if isinstance(state, Tensor) and state.ndim and tuple(state.shape) != tuple(shape):
            raise ValueError(
                f"{name} {tuple(shape)}: {type(optimizer).__name__} holds {key!r} of shape {tuple(state.shape)}, which is not one number "
                "for each weight; use an optimizer such as SGD, Adam or AdamW, or make a new one"
            )


@torch.no_grad()
def reset_elements(optimizer: Optimizer, parameter: Tensor, elements: Tensor) -> None:
    """Change the state of some elements of a parameter, in place, to what it is before the first step (`initial_state`)."""
    for key, state in optimizer.state.get(parameter, {}).items():
        if isinstance(state, Tensor) and state.ndim:
            state.masked_fill_(sharded_like(elements.to(state.device), state), initial_state(optimizer, parameter, key))
