"""Masks from zeros in a model and from the state dict of a masked model."""

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from blockprune.core.arguments import check_model
from blockprune.core.grid import BlockGrid, expand, pool
from blockprune.core.precision import forget_casts
from blockprune.core.sharded_tensor import sharded_like, whole
from blockprune.core.types import BlockMask, Where, check_prunable
from blockprune.model.apply import apply_masks
from blockprune.model.hf_linears import is_transposed
from blockprune.model.mask_reading import parameter_masks
from blockprune.model.parameters import (
    STORED_NAME,
    ParameterRef,
    check_loaded,
    check_not_inference,
    check_not_lazy,
    distinct,
    forget_lost,
    parameter_refs,
)
from blockprune.model.parametrization import MaskBlocks
from blockprune.model.selection import select

M = TypeVar("M", bound=nn.Module)


def masks_from_zeros(model: nn.Module, *, where: Where) -> dict[str, BlockMask]:
    """The masks of a model whose pruned blocks are zero already: a block is kept if any of its elements is not zero.

    Use it on a finalized model, on one that another tool pruned, or on a checkpoint that only has zeros.

    Args:
        model: masked or not; it is not changed.
        where: which parameters, in which blocks.

    Raises:
        ValueError, TypeError: the rule matches no parameter, or a parameter has no values (meta device, integers).

    Example:
        >>> model = nn.Linear(4, 2)
        >>> _ = model.weight.data[:, 2:].zero_()
        >>> bp.masks_from_zeros(model, where=bp.linears((2, 2)))["weight"].keep
        tensor([[ True, False]])
    """
    masks = {}
    for name, (ref, grid) in select(model, where).items():
        weight = whole(ref.masked.detach())
        check_prunable(name, weight)
        masks[name] = BlockMask(pool(weight != 0, grid) > 0, grid)
    return masks


def load_masked(model: M, state: Mapping[str, Tensor]) -> M:
    """Load the state dict of a masked model into a model of the same class, in place, masks included; return it.

    The model may be plain: it gets the masks of the state dict. Weights of the state dict that are not masked are loaded as usual, and a
    parameter that is masked in the model only keeps its mask. A mask that is on the model already keeps its options, ``straight_through``
    and ``decay``, which no state dict has.

    Make the optimizer on the same side of masking as in the run that was saved, before or after it, and then load its state: torch's
    optimizers know parameters by the order of ``model.parameters()``, in which masked weights come after a layer's other parameters.

    Args:
        model: masked or not.
        state: what ``masked_model.state_dict()`` returned, or the tensors of a checkpoint file of it. A sharded model can be given the
            state of a whole model, on every rank.

    Raises:
        ValueError: the state has a mask with different blocks than the model, lacks a tensor of the model, has another tensor,
            or one of another shape; the state of an exported model, which `export.load_state_dict` loads; a model on the meta device,
            which has no memory for values, one that accelerate has offloaded, or one with a lazy layer that was never called.
        TypeError: ``state`` is no mapping, or has something else than a tensor for a parameter or a buffer.
            After any of these errors, and if a module refuses its extra state, the model is as it was before the call.

    Example:
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> state = bp.apply_masks(nn.Linear(4, 2), {"weight": mask}).state_dict()
        >>> bp.read_masks(bp.load_masked(nn.Linear(4, 2), state)) == {"weight": mask}
        True
    """
    check_model(model)
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state has the type {type(state).__name__}; give what masked_model.state_dict() returned, such as torch.load(path) or "
            "safetensors.torch.load_file(path) read it from a file"
        )
    for module in model.modules():
        forget_lost(module)
    refs = {name: users[0] for name, users in parameter_refs(model).items()}
    for name, ref in refs.items():
        check_not_lazy(name, ref.stored)
    check_loaded(model, refs.values(), "load_masked")
    check_not_inference(refs.values())
    before = parameter_masks(model)
    masks = masks_in_state(model, state)
    for name in masks.keys() & before.keys():
        if masks[name].grid != before[name].grid:
            raise ValueError(
                f"{name}: the state has a mask of blocks {masks[name].grid.block}, but the model has blocks {before[name].grid.block}; "
                "remove the masks of the model first, with bp.apply_masks(model, {})"
            )
    is_masked_anew = not masks.keys() <= before.keys()
    with keep_gradient_options(model):
        if is_masked_anew:
            apply_masks(model, before | masks)
        try:
            _load_or_restore(model, _fitting_state(model, state))
        except BaseException:
            if is_masked_anew:
                apply_masks(model, before)
            raise
        finally:
            forget_casts()
    return model


def _load_or_restore(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state that fits; if a module refuses its extra state, all others get their former values back."""
    may_be_refused = any(_is_extra(name) and not _MASK.fullmatch(name) for name in state)
    former = copy.deepcopy(model.state_dict()) if may_be_refused else {}
    try:
        model.load_state_dict(state, strict=False)  # _fitting_state has compared the names; an alias of a tied tensor may be missing
    except BaseException:
        model.load_state_dict(former, strict=False)
        raise


def _is_extra(name: str) -> bool:
    """Whether a name in a state dict is that of a module's extra state, which need not be a tensor."""
    return name.rpartition(".")[2] == "_extra_state"


@contextlib.contextmanager
def keep_gradient_options(model: nn.Module) -> Iterator[None]:
    """Restore at the end, in place, which gradients the masks let pass (``straight_through`` and ``decay`` of `apply_masks`).

    Parameters that are masked both before and after keep these options. Where a mask gets other blocks, gradients reach those that
    have an element that they reached before.

    Example:
        >>> from blockprune.model.checkpoint import keep_gradient_options
        >>> masks = {"weight": bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))}
        >>> model = bp.apply_masks(nn.Linear(4, 2), masks, straight_through=True)
        >>> with keep_gradient_options(model):
        ...     _ = bp.apply_masks(model, masks)
        >>> model.parametrizations.weight[0].reached
        tensor([[True, True]])
    """
    before = {
        name: (mask.grid, None if mask.reached is None else mask.reached.clone(), mask.decay)
        for name, (mask, *_) in _mask_modules(model).items()
    }
    try:
        yield
    finally:
        for name, modules in _mask_modules(model).items():
            for mask in modules if name in before else []:
                grid, reached, decay = before[name]
                if reached is not None and mask.grid != grid:
                    reached = pool(expand(reached, grid), mask.grid) > 0
                mask.pass_gradients(reached, decay)


def _mask_modules(model: nn.Module) -> dict[str, list[MaskBlocks]]:
    """The masks on each masked parameter, in all modules that use it."""
    masks = {name: [ref.mask for ref in distinct(refs) if ref.mask] for name, refs in parameter_refs(model).items()}
    return {name: modules for name, modules in masks.items() if modules}


_EXPORTED_PARTS = ("values", "crow", "col", "layout")  # the names of an exported layer's tensors in a state dict
_WRAPPED = "_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module"  # names that wrappers of torch give to what they wrap
# the names of a mask in a state dict
_MASK = re.compile(r"(|.*\.)parametrizations\.([^.]+)\.\d+\.(keep|_extra_state)")


def masks_in_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, BlockMask]:
    """The masks that a state dict holds, by the names of the model's parameters.

    Raises:
        ValueError: a mask of a parameter that the model does not have, of another shape, or without the shape of its blocks.
    """
    canonical = {ref.name: (name, ref) for name, refs in parameter_refs(model).items() for ref in refs}
    masks = {}
    for key in state:
        if (match := _MASK.fullmatch(key)) and match[3] == "keep":
            name = match.expand(r"\1\2")
            if name not in canonical:
                remedy = without_wrapper(state) or "give the model of the same class"
                raise ValueError(f"the state has a mask of {name!r}, which is not a parameter of the model; {remedy}")
            name, ref = canonical[name]
            masks[name] = _mask_in_state(name, ref, state[key], state.get(f"{key.removesuffix('keep')}_extra_state"))
    return masks


def exported_layers(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers for which a state dict has a block-sparse weight; a tensor called ``layout`` alone is a model's own.

    Example:
        >>> from blockprune import export
        >>> from blockprune.model.checkpoint import exported_layers
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> model = bp.apply_masks(nn.Sequential(nn.Linear(4, 2)), {"0.weight": mask})
        >>> exported_layers(export.block_sparse(model, backend="torch").state_dict())
        ['0']
    """
    prefixes = [key.removesuffix("layout") for key in state if key == "layout" or key.endswith(".layout")]
    return [prefix.removesuffix(".") for prefix in prefixes if all(prefix + part in state for part in _EXPORTED_PARTS)]


def with_tied_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state in which a tied tensor has all its names, if it has one of them: files such as safetensors hold it once.

    Example:
        >>> from blockprune.model.checkpoint import with_tied_names
        >>> model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
        >>> model["head"].weight = model["embedding"].weight
        >>> sorted(with_tied_names(model, {"embedding.weight": torch.ones(3, 2)}))
        ['embedding.weight', 'head.weight']
    """
    names = _tied_names(model)
    return {**{alias: state[name] for name in state for alias in names.get(name, ())}, **state}


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For each name of a parameter or buffer in a state dict all names of this tensor."""
    names, saved = dict[int, list[str]](), model.state_dict().keys()  # without buffers that are not persistent
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if name in saved:
            names.setdefault(id(tensor), []).append(name)
    return {name: shared for shared in names.values() for name in shared}


def without_wrapper(state: Mapping[str, Tensor]) -> str:
    """What to do about a state dict whose names have that of a wrapper; empty if they do not.

    Example:
        >>> from blockprune.model.checkpoint import without_wrapper
        >>> without_wrapper({"module.weight": torch.ones(2)})
        "its names begin with 'module.', of a wrapper; strip it: {key.removeprefix('module.'): x for key, x in state.items()}"
    """
    match = re.match(rf"((module|{_WRAPPED})\.)+", min(state, default=""))
    if match is not None and all(name.startswith(match[0]) for name in state):
        return (
            f"its names begin with {match[0]!r}, of a wrapper; strip it: {{key.removeprefix({match[0]!r}): x for key, x in state.items()}}"
        )
    inner = next((match[0] for name in state if (match := re.search(rf"(?<![^.])({_WRAPPED})\.", name))), None)
    if inner is None:
        return ""
    return f"its names have {inner!r}, of a wrapper; strip it: {{key.replace({inner!r}, ''): x for key, x in state.items()}}"


def _mask_in_state(name: str, ref: ParameterRef, keep: Any, block: Any) -> BlockMask:
    for part, value in (("mask", keep), ("shape of the blocks", block)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: the {part} in the state is a {type(value).__name__}, not a tensor; give the state as it was saved")
    if block is None:
        raise ValueError(
            f"{name}: the state has a mask, but not the shape of its blocks; apply the masks first, then model.load_state_dict"
        )
    try:
        return BlockMask(keep.clone(), BlockGrid(ref.shape, tuple(block.tolist())))
    except (ValueError, TypeError) as error:
        remedy = "; if it is that of Linears, convert the model first: bp.as_linears(model)" if is_transposed(ref.owner) else ""
        raise ValueError(f"{name}: the mask in the state does not fit this parameter {ref.shape}: {error}{remedy}") from None


def _fitting_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with shards for a sharded model. Raise unless it has exactly the tensors of the model, in their shapes."""
    expected = model.state_dict()
    tied_names = _tied_names(model)
    stored_names = {match.expand(r"\1\2"): name for name in expected if (match := STORED_NAME.fullmatch(name))}
    expected = {name: tensor for name, tensor in expected.items() if name not in stored_names}
    names = {stored_names.get(name, name): name for name in state}  # a plain checkpoint has ``0.weight`` instead
    loaded = {alias for name in names for alias in tied_names.get(name, [name])}
    missing = [name for name in expected if name not in loaded and not _MASK.fullmatch(name)]
    if missing or (unexpected := [name for name in names if name not in expected]):
        problem = f"lacks {missing[0]!r}, which the model has" if missing else f"has {unexpected[0]!r}, which the model does not have"
        remedy = "it is that of an exported model: give it to export.load_state_dict(model, state)" if exported_layers(state) else ""
        remedy = without_wrapper(state) or remedy or "give the state dict of a masked model of the same class"
        raise ValueError(f"the state {problem}; {remedy}")
    for name, key in names.items():
        if _is_extra(name):  # compared by the module that gets it
            continue
        if not isinstance(state[key], Tensor):
            raise TypeError(f"{key}: the state has a {type(state[key]).__name__}, not a tensor; give the state as it was saved")
        check_not_lazy(key, state[key])
        if tuple(state[key].shape) != tuple(expected[name].shape):
            raise ValueError(f"{key}: the state has the shape {tuple(state[key].shape)}, but the model has {tuple(expected[name].shape)}")
        if expected[name].is_meta and not state[key].is_meta:
            raise ValueError(
                f"{key} {tuple(expected[name].shape)}: the model has this tensor on the meta device, so no values can be loaded into it; "
                "give the model memory first, with model.to_empty(device='cpu')"
            )
    return {key: value if _is_extra(key) else sharded_like(value, expected[stored_names.get(key, key)]) for key, value in state.items()}
