"""Put masks on a model and take them off again, with ``torch.nn.utils.parametrize``. `apply_masks` changes the model in place."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockprune.core._compat import data_address, storage_id
from blockprune.core.arguments import check_number
from blockprune.core.grid import BlockGrid
from blockprune.core.patterns import suggest
from blockprune.core.precision import forget_casts
from blockprune.core.sharded_tensor import is_sharded, sharded_like, whole
from blockprune.core.types import BlockMask, Masks, Weights, check_masks
from blockprune.model.copying import copy_model
from blockprune.model.hf_checkpoint import prepare_checkpoints
from blockprune.model.mask_reading import Refs, check_tied_masks, masked_refs, masks_of_refs
from blockprune.model.masked_class import add_mask_methods, has_mask_methods, mask_index, own_class, refs_of_module, remove_mask_methods
from blockprune.model.masking import mask_blocks, zeros_in_pruned_blocks
from blockprune.model.parameters import (
    ParameterRef,
    check_dense_gradients,
    check_loaded,
    check_not_inference,
    check_not_lazy,
    check_own_memory,
    distinct,
    is_in_replica,
    parameter_order,
    parameter_refs,
    restore_order,
    select_parameters,
)
from blockprune.model.parametrization import MaskBlocks
from blockprune.model.sharding import check_copyable, check_replaceable, follow_parameters, has_moved_unnoticed, reshard, without_fsdp_class

M = TypeVar("M", bound=nn.Module)


def apply_masks(
    model: M, masks: Masks | None, weights: Weights | None = None, *, straight_through: bool | Masks = False, decay: float = 0.0
) -> M:
    """Change a model in place, so that it has exactly these masks, whichever it had before; return it.

    A masked parameter reads as zero in its pruned blocks. Its dense weight stays stored in the same Parameter, so existing optimizers stay
    valid, and a block that a later mask keeps has its old values again. A tied tensor is masked in all modules that use it. A mask with the
    same blocks as the present one is updated in place, so a compiled model is not recompiled. ``apply_masks(model, {})`` removes all masks.

    Args:
        model: any module, masked or not.
        masks: by parameter name; None, with weights, for the masks that are on the model.
        weights: new values for parameters, by name (repaired weights and biases); any parameter of the model.
        straight_through: whether gradients also reach pruned blocks, so that the optimizer changes their stored values (the
            straight-through estimator, Bengio et al. 1308.3432). Or masks: then gradients reach the blocks that these keep, as in Top-KAST
            (Jayakumar et al. 2106.03517). This option holds until the next call, and is not saved with the model.
        decay: with ``straight_through``, this number times the stored values of the pruned blocks that gradients reach is added to their
            gradients (SR-STE, Zhou et al. 2102.04010). It is added once for each read of the weight in a backward pass, so twice if a
            forward uses the weight twice or two batches are accumulated, and it is not scaled with the loss. Apply it before `gates.add`:
            of a weight that has gates already, the decay is that of their product.

    Raises:
        KeyError: the model does not have a parameter of this name, two names are those of one tied tensor, or ``straight_through`` has a
            parameter that ``masks`` does not have.
        ValueError: a mask or a weight does not have its parameter's shape, a weight has NaN or inf, accelerate has offloaded a parameter,
            masks would be added to or removed from a model in DistributedDataParallel, or from the module inside (which is not noticed
            if the wrapper was made before blockprune was imported), ``straight_through`` has different blocks than a mask, or a decay is
            negative or without ``straight_through``.
        RuntimeError: a weight is given for an expanded parameter, whose elements share memory.
        TypeError: ``masks`` is not a mapping of `BlockMask`, or a parameter cannot be masked (integer, complex, sparse, scripted).
            After any error the model is as it was before the call.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> bp.apply_masks(model, {"weight": mask}).weight[:, 2:].abs().sum().item()
        0.0
    """
    reshard(model)
    refs = parameter_refs(model)  # they say what is masked at the time at which they are asked
    requested = masks_of_refs(refs) if masks is None and weights is not None else cast(Masks, masks)
    new_masks = _checked_masks(
        model,
        refs,
        requested,
        remedy="for the result of a recipe, call apply_masks(model, result.masks, result.weights); {} removes all masks",
    )
    check_loaded(model, [*(users[0] for _, _, users in new_masks), *(ref for ref, _ in masked_refs(refs))], "apply_masks")
    check_not_inference(users[0] for _, _, users in new_masks)
    _check_not_wrapped(model, refs, new_masks)
    new_weights = _checked_weights(model, refs, {} if weights is None else weights)
    decay = check_number("decay", decay, "a number from 0 on", lowest=0)
    reached = _checked_reached(model, refs, {name: mask for name, mask, _ in new_masks}, straight_through, decay)
    old_masks = [(ref, BlockMask(mask.keep.clone(), mask.grid), _copy(mask.reached), mask.decay) for ref, mask in masked_refs(refs)]
    # in the order in which they were put on, so that an error restores that order
    old_masks.sort(key=lambda item: list(item[0].owner.parametrizations).index(item[0].attr))  # type: ignore[arg-type]
    with torch.no_grad():
        written: list[tuple[ParameterRef, Tensor]] = []
        try:
            _replace_masks([ref for ref, *_ in old_masks], new_masks)
            for ref, weight in new_weights:
                _check_not_expanded(ref)
                written.append((ref, ref.stored.detach().clone()))
                ref.stored.copy_(weight)
            for name, _, users in new_masks:
                for ref in users:
                    cast(MaskBlocks, ref.mask).pass_gradients(reached.get(name), decay)
        except BaseException:
            for ref, _ in masked_refs(refs):
                _remove_mask(ref)
            for ref, mask, old_reached, old_decay in old_masks:
                _set_mask(ref, mask)
                cast(MaskBlocks, ref.mask).pass_gradients(old_reached, old_decay)
            for ref, weight in written:
                ref.stored.copy_(weight)
            raise
        finally:
            forget_casts()
            follow_parameters(model)
    prepare_checkpoints(model)
    return model


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


def _checked_reached(model: nn.Module, refs: Refs, masks: Masks, straight_through: bool | Masks, decay: float) -> dict[str, Tensor]:
    """The blocks of each masked parameter that gradients reach, by canonical name; none of a parameter that is not in the result."""
    if decay and straight_through is False:
        raise ValueError(f"decay={decay} changes the gradients of pruned blocks, which reach none; give straight_through=True, too")
    if isinstance(straight_through, bool):
        return {name: torch.ones_like(mask.keep) for name, mask in masks.items()} if straight_through else {}
    if not isinstance(straight_through, Mapping):
        raise TypeError(f"straight_through is a {type(straight_through).__name__}; give True, False, or masks")
    names = select_parameters(model, refs, straight_through, what="straight_through")
    reached: dict[str, Tensor] = {}
    for name, mask in zip(names, straight_through.values(), strict=True):
        if name not in masks:
            raise KeyError(f"straight_through has {name!r}, which masks does not have{suggest(name, masks)}")
        if not isinstance(mask, BlockMask):
            raise TypeError(f"straight_through[{name!r}] is a {type(mask).__name__}, not a BlockMask")
        if mask.grid != masks[name].grid:
            raise ValueError(f"{name}: straight_through has {mask.grid}, but the mask has {masks[name].grid}; use one `where` for both")
        reached[name] = mask.keep
    return reached


def _check_not_wrapped(model: nn.Module, refs: Refs, new_masks: list[tuple[str, BlockMask, list[ParameterRef]]]) -> None:
    """Raise if masks would be added or removed where DistributedDataParallel or a module around the model refers to the parameters."""
    before = {ref.name: ref for ref, _ in masked_refs(refs)}
    after = {ref.name: ref for _, _, users in new_masks for ref in users}
    changed = sorted(before.keys() ^ after.keys())
    replicated = bool(changed) and is_in_replica(model, [before.get(name) or after[name] for name in changed])
    for name in changed:
        if replicated:
            raise ValueError(
                f"{name}: masks cannot be added to or removed from a model in DistributedDataParallel, which would no longer average the "
                "gradients of this parameter; apply masks first and wrap the model afterwards (existing masks may be updated); "
                "or keep the module alone: model = wrapped.module, del wrapped"
            )
        if has_moved_unnoticed(model, (ref := before.get(name) or after[name]).owner):
            raise ValueError(
                f"{name} {ref.shape}: this parameter is sharded by fully_shard of a module around the given one, which must learn that a "
                "mask is added or removed; give the whole model to apply_masks"
            )


def _replace_masks(masked: list[ParameterRef], new_masks: list[tuple[str, BlockMask, list[ParameterRef]]]) -> None:
    still_masked = {(id(ref.owner), ref.attr) for _, _, refs in new_masks for ref in refs}
    for ref in masked:
        if (id(ref.owner), ref.attr) not in still_masked:
            _remove_mask(ref)
    for _, mask, refs in new_masks:
        for ref in refs:
            _set_mask(ref, mask)


def finalize(model: M, *, inplace: bool = False) -> M:
    """A copy of a model without masks, with zeros in the pruned blocks.

    The copy of an unmasked model is an equal model.

    Args:
        model: masked or not; it is not changed, unless ``inplace``.
        inplace: write the zeros into the model's own parameters, take its masks off, and return it, instead of a copy.

    Raises:
        ValueError: a model in DistributedDataParallel, or one that ``fully_shard`` has sharded (see `distributed.full_state_dict`); a
            weight that accelerate has offloaded or that a hook computes; in place also one that another parametrization computes, that is
            a DTensor or shares its memory. After any error the model is as it was before the call.

    Example:
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> model = bp.apply_masks(nn.Linear(4, 2), {"weight": mask})
        >>> type(bp.finalize(model)), bp.finalize(model).weight[:, 2:].count_nonzero().item(), type(model).__name__
        (<class 'torch.nn.modules.linear.Linear'>, 0, 'ParametrizedLinear')
    """
    refs = parameter_refs(model)
    check_tied_masks(refs)
    check_loaded(model, [ref for ref, _ in masked_refs(refs)], "finalize")
    check_copyable(model)
    if inplace:
        masks = masked_refs(refs)
        if sharded := [ref for ref, _ in masks if is_sharded(ref.stored)]:
            raise ValueError(f"{sharded[0].name} {sharded[0].shape}: this weight is a DTensor; make a copy: finalize(model)")
        if other := [ref for ref, _ in masks if not ref.is_plain]:
            raise ValueError(
                f"{other[0].name}: another parametrization computes this weight {other[0].shape}, so its zeros have no place; remove that "
                "parametrization, or make a copy: finalize(model)"
            )
        check_not_inference(ref for ref, _ in masks)
        check_own_memory(model, [ref.stored for ref, _ in masks], "finalize")
        for ref, _ in masks:
            ref.masked.detach()  # a read writes changes through views of earlier reads into the stored weight
        with zeros_in_pruned_blocks([(ref.stored, mask.keep, mask.grid) for ref, mask in masks]):
            return apply_masks(model, {})
    plain = copy_model(model)
    with torch.no_grad():
        for ref, mask in masked_refs(parameter_refs(plain)):
            if ref.is_plain:
                ref.stored.copy_(ref.masked)
                _remove_mask(ref)
            else:  # another parametrization computes the weight, so no stored tensor can hold the zeros: store the weight itself
                weight, requires_grad = ref.masked.detach().clone(), any(p.requires_grad for p in ref.originals)
                parametrize.remove_parametrizations(ref.owner, ref.attr, leave_parametrized=True)
                delattr(ref.owner, ref.attr)
                ref.owner.register_parameter(ref.attr, nn.Parameter(weight, requires_grad=requires_grad))
                restore_order(ref.owner, mask.order)
    prepare_checkpoints(plain)
    return plain


def masked_parameters(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Masked weights for ``torch.func.functional_call``, to run a model with masks without changing it.

    The weights are differentiable with respect to the model's parameters. A parameter that is already masked gets the new mask instead of
    its own, and gradients then reach the kept blocks alone, also if its own mask is straight-through. If a module is used under two names,
    pass ``tie_weights=False`` to `functional_call`; torch would otherwise leave the given tensors in the module. With
    ``torch.compile(fullgraph=True)`` compile the `functional_call` and create the masks outside of it.

    Raises:
        KeyError, ValueError, TypeError: as `apply_masks`; also ValueError if another parametrization computes a weight or ``fully_shard``
            has sharded it.

    Example:
        >>> from torch.func import functional_call
        >>> model, x = nn.Linear(4, 2, bias=False), torch.ones(1, 4)
        >>> mask = bp.BlockMask(torch.tensor([[False]]), bp.BlockGrid((2, 4), (2, 4)))
        >>> functional_call(model, bp.masked_parameters(model, {"weight": mask}), x).abs().sum().item()
        0.0
    """
    tensors = functional_parameters(model, masks)
    check_replaceable(model, tensors)
    return tensors


def functional_parameters(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """`masked_parameters`, also of a model that ``fully_shard`` has sharded, for `replaced_shards`."""
    tensors: dict[str, Tensor] = {}
    new_masks = _checked_masks(model, parameter_refs(model), masks)
    check_loaded(model, [refs[0] for _, _, refs in new_masks], "masked_parameters")
    for name, mask, refs in new_masks:
        keep = mask.keep.to(refs[0].stored.device).clone()
        weight = mask_blocks(refs[0].stored, keep, mask.grid) if refs[0].is_plain else None  # shared by all references
        for ref in refs:
            tensors |= _functional_tensors(name, ref, mask.grid, keep, weight)
    return tensors


def _functional_tensors(name: str, ref: ParameterRef, grid: BlockGrid, keep: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
    """The tensors to replace, by state dict name, so that a parameter reads as the masked weight; ``weight`` is None if it is computed."""
    old, parametrizations = ref.mask, ref.parametrizations
    if old is not None and old.grid == grid:
        of_mask = f"{ref.parametrized_name}{mask_index(ref)}."
        no_others = {f"{of_mask}reached_blocks": torch.zeros_like(old.reached_blocks)} if old.is_straight_through else {}
        return {f"{of_mask}keep": keep, **no_others}
    if weight is None:
        raise ValueError(f"{name}: another parametrization computes this weight {ref.shape}; use apply_masks on a copy of the model")
    if old is None or parametrizations is None:
        return {ref.name: weight}
    return {ref.stored_name: weight, f"{ref.parametrized_name}0.keep": torch.ones_like(old.keep)}  # all gradients pass to the masked weight


def _checked_masks(model: nn.Module, refs: Refs, masks: Masks, **remedy: str) -> list[tuple[str, BlockMask, list[ParameterRef]]]:
    """Each mask with the parameter's canonical name and the references to all modules that use it."""
    parameters = select_parameters(model, refs, masks if isinstance(masks, Mapping) else (), what="masks")
    check_masks(masks, **remedy)
    checked = [(name, mask, distinct(users)) for (name, users), mask in zip(parameters.items(), masks.values(), strict=True)]
    for name, mask, users in checked:
        _check_mask(name, mask, users[0])
    return checked


def _check_mask(name: str, mask: BlockMask, ref: ParameterRef) -> None:
    check_not_lazy(name, ref.stored)
    what, stored = f"{name}: the parameter {ref.shape}", ref.stored
    if ref.shape != mask.grid.shape:
        raise ValueError(f"{what} has a mask for shape {mask.grid.shape}; make the masks from this model")
    if mask.keep.is_meta and not stored.is_meta:
        raise ValueError(f"{what} has a mask on the meta device, which has no values; give a mask with values")
    if stored.layout != torch.strided or not stored.is_floating_point():
        raise TypeError(f"{what} is {stored.dtype}, {stored.layout}; only dense floating-point parameters can be masked")
    if isinstance(ref.owner, torch.jit.ScriptModule):
        raise TypeError(f"{what} belongs to a scripted or traced module, which takes no mask; mask the model before torch.jit makes it")
    check_dense_gradients(name, ref)


def _checked_weights(model: nn.Module, refs: Refs, weights: Weights) -> list[tuple[ParameterRef, Tensor]]:
    """The new weights in the device and dtype of their parameters; those in the model's memory are copied, as writes would change them."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights is a {type(weights).__name__}, not a mapping from parameter names to tensors")
    parameters = select_parameters(model, refs, weights, what="weights")
    check_loaded(model, [users[0] for users in parameters.values()], "apply_masks")
    check_not_inference(users[0] for users in parameters.values())
    checked = [
        (users[0], checked_weight(name, users[0], weights[key])) for (name, users), key in zip(parameters.items(), weights, strict=True)
    ]
    stored = {_address(ref.stored) for ref, _ in checked}
    return [(ref, weight.clone() if _address(weight) in stored else weight) for ref, weight in checked]


def _address(x: Tensor) -> int:
    """Where the memory of a tensor begins."""
    return storage_id(x) if is_sharded(x) else data_address(x)


def checked_weight(name: str, ref: ParameterRef, weight: Any, source: str = "a new weight") -> Tensor:
    """A new weight in the device and dtype of its parameter.

    Raises:
        ValueError, TypeError: as `apply_masks`; ``source`` is what the message calls the weight.
    """
    what, stored = f"{name}: the parameter {ref.shape}", ref.stored
    if not ref.is_plain:
        raise ValueError(f"{what} is computed by another parametrization, so no weight can be written to it; remove the parametrization")
    if not isinstance(weight, Tensor) or weight.is_complex() or weight.layout != torch.strided:
        kind = f"{weight.dtype}, {weight.layout}" if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{what} has {source} that is {kind}; give a dense real tensor of its shape")
    if tuple(weight.shape) != ref.shape:
        raise ValueError(f"{what} has {source} of shape {tuple(weight.shape)}; give the whole weight")
    if weight.device.type == "meta" and stored.device.type != "meta":
        raise ValueError(f"{what} has {source} on the meta device, which has no values; give a weight with values")
    new = sharded_like(weight.detach().to(stored.device, stored.dtype), stored)
    if new.device.type != "meta" and not whole(new.isfinite().all()):
        raise ValueError(f"{what} has {source} with NaN or inf (as {stored.dtype}); give finite values")
    return new


def _check_not_expanded(ref: ParameterRef) -> None:
    stored = ref.stored
    if stored.layout == torch.strided and any(b == 0 and n > 1 for n, b in zip(stored.shape, stored.stride(), strict=True)):
        raise RuntimeError(
            f"{ref.name}: the parameter {ref.shape} is expanded, so its elements share memory and take no new weight; replace it first: "
            "layer.weight = nn.Parameter(weight.clone())"
        )


def _set_mask(ref: ParameterRef, mask: BlockMask) -> None:
    old, owner = ref.mask, ref.owner
    if old is not None and old.grid == mask.grid:
        if old.keep.is_inference():
            old.keep = _new_parametrization(mask, ref, old.order).keep
        else:
            old.keep.copy_(mask.keep)
        return
    if old is not None and ref.parametrizations is not None:
        ref.parametrizations[mask_index(ref)] = _new_parametrization(mask, ref, old.order)
        return
    order = parameter_order(owner)
    with without_fsdp_class(owner):
        if parametrize.is_parametrized(owner) and not has_mask_methods(owner):
            owner.__class__ = own_class(type(owner))  # torch lets a copy of a parametrized module share its class
        parametrize.register_parametrization(owner, ref.attr, _new_parametrization(mask, ref, order), unsafe=True)
        add_mask_methods(owner)


def _new_parametrization(mask: BlockMask, ref: ParameterRef, order: tuple[str, ...]) -> MaskBlocks:
    device = ref.stored.device
    with torch.inference_mode(False):  # an inference tensor could not be changed outside of inference mode
        return MaskBlocks(mask.keep if device.type == "meta" else mask.keep.to(device), mask.grid, order=order)


def _remove_mask(ref: ParameterRef) -> None:
    mask, parametrizations, owner = ref.mask, ref.parametrizations, ref.owner
    assert mask is not None
    assert parametrizations is not None
    with without_fsdp_class(owner):
        if ref.is_plain:
            parametrize.remove_parametrizations(owner, ref.attr, leave_parametrized=False)
            restore_order(owner, mask.order)
        else:
            del parametrizations[mask_index(ref)]
        if parametrize.is_parametrized(owner) and not any(other.mask for other in refs_of_module(owner)):
            remove_mask_methods(owner)
