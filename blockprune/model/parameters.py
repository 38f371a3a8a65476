"""Canonical parameter names: a parameter keeps its name when it is masked, parametrized or shared.

The canonical name is the one in the plain model (``encoder.0.weight``), never ``parametrizations.weight.original``. A tensor that several
modules share (tied weights) has the first of its names; references to all modules that use it are available.
"""

import contextlib
import gc
import itertools
import operator
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils import parametrize

from blockprune.core._compat import has_one_original, originals, own_parametrizations, parameter_names, storage_id
from blockprune.core._compat_hf import is_offloaded
from blockprune.core.arguments import check_model
from blockprune.core.patterns import suggest
from blockprune.core.sharded_tensor import is_sharded
from blockprune.model.masked_weight import write_pending
from blockprune.model.parametrization import MaskBlocks


@attrs.frozen(eq=False)
class ParameterRef:
    """A reference to a parameter of a model: the module that owns it and the attribute's name."""

    name: str
    owner: nn.Module
    attr: str

    @property
    def parametrizations(self) -> parametrize.ParametrizationList | None:
        """The parameter's torch parametrizations, or None."""
        of_owner = own_parametrizations(self.owner)
        return None if of_owner is None or self.attr not in of_owner else cast(parametrize.ParametrizationList, of_owner[self.attr])

    @property
    def mask(self) -> MaskBlocks | None:
        """The parameter's mask, or None."""
        return next((p for p in self.parametrizations or () if isinstance(p, MaskBlocks)), None)

    @property
    def order(self) -> tuple[str, ...]:
        """The names of the module's parameters in their original order, as a mask or gates of this parameter noted them; or none."""
        orders = (getattr(parametrization, "order", ()) for parametrization in self.parametrizations or ())
        return next((order for order in orders if isinstance(order, tuple) and order), ())

    @property
    def is_plain(self) -> bool:
        """Whether the parameter has no parametrization besides a mask."""
        return self.parametrizations is None or (len(self.parametrizations) == 1 and self.mask is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight; the stored tensors of a parametrization such as weight_norm may have other shapes."""
        parametrizations = self.parametrizations
        return tuple((self.stored if parametrizations is None or has_one_original(parametrizations) else self.masked).shape)

    @property
    def stored(self) -> Tensor:
        """The stored tensor: the parameter itself, or the (first) original tensor of its parametrizations."""
        return self.originals[0]

    @property
    def originals(self) -> list[Tensor]:
        """All stored tensors from which the weight is computed, with what was written through views of a masked weight."""
        parametrizations = self.parametrizations
        if parametrizations is None:
            return [getattr(self.owner, self.attr)]
        stored = originals(parametrizations)
        for tensor in stored:
            write_pending(tensor)
        return stored

    @property
    def parametrized_name(self) -> str:
        """What the names of the parameter's stored tensors and its mask begin with in a state dict, if it is parametrized."""
        return f"{self.name.removesuffix(self.attr)}parametrizations.{self.attr}."

    @property
    def stored_name(self) -> str:
        """The name of the (first) stored tensor in the model's state dict."""
        parametrizations = self.parametrizations
        if parametrizations is None:
            return self.name
        original = "original" if has_one_original(parametrizations) else "original0"
        return f"{self.parametrized_name}{original}"

    @property
    def dense(self) -> Tensor:
        """The weight without the mask, but with all other parametrizations (such as weight_norm)."""
        parametrizations = self.parametrizations
        if parametrizations is None or self.mask is None:
            return self.masked
        if len(parametrizations) == 1:
            return self.stored
        with _evaluation_mode(parametrizations):
            first, *others = [p for p in parametrizations if not isinstance(p, MaskBlocks)]
            weight = first(*self.originals)
            for parametrization in others:
                weight = parametrization(weight)
        return cast(Tensor, weight)

    @property
    def masked(self) -> Tensor:
        """The weight as the model uses it."""
        with _evaluation_mode(self.parametrizations):
            return cast(Tensor, getattr(self.owner, self.attr))


@contextlib.contextmanager
def _evaluation_mode(parametrizations: nn.Module | None) -> Iterator[None]:
    """Parametrizations in evaluation mode, because in training mode spectral_norm changes its buffers whenever the weight is read."""
    modes = [(module, module.training) for module in parametrizations.modules()] if parametrizations is not None else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def parameter_refs(model: nn.Module) -> dict[str, list[ParameterRef]]:
    """All parameters by canonical name, in the order of the plain model; each with a reference for every module that uses it."""
    shared: dict[int, list[ParameterRef]] = {}
    for ref in _all_refs(model):
        shared.setdefault(id(ref.stored), []).append(ref)
    return {refs[0].name: refs for refs in shared.values()}


def forget_lost(owner: nn.Module) -> None:
    """Let no read raise for a change of a masked weight that is lost, because other values are loaded over it."""
    for attr in own_parametrizations(owner) or ():
        parametrizations = ParameterRef(attr, owner, attr).parametrizations
        assert parametrizations is not None
        for followed in (*originals(parametrizations), *(p.keep for p in parametrizations if isinstance(p, MaskBlocks))):
            write_pending(followed, report=False)


def distinct(refs: Iterable[ParameterRef]) -> list[ParameterRef]:
    """The references without those to a module that an earlier reference names already: a module may have several names."""
    first: dict[tuple[int, str], ParameterRef] = {}
    for ref in refs:
        first.setdefault((id(ref.owner), ref.attr), ref)
    return list(first.values())


# the names that torch gives to what belongs to a parametrized weight in a state dict: (module.)parametrizations.(attribute).(...)
PARAMETRIZED_NAME = re.compile(r"(|.*\.)parametrizations\.([^.]+)\..*")
# that of a masked weight: (module.)parametrizations.(attribute).original
STORED_NAME = re.compile(r"(|.*\.)parametrizations\.([^.]+)\.original")


def is_exported(module: nn.Module) -> bool:
    """Whether a layer computes with its kept blocks only; it then tells which those are, by a method ``block_mask()``."""
    return callable(getattr(module, "block_mask", None))


def scripted_hint(model: nn.Module) -> str:
    """The end of an error message: what to do if a module with parameters is scripted or traced; else empty.

    Example:
        >>> from blockprune.model.parameters import scripted_hint
        >>> scripted_hint(nn.Linear(2, 2))
        ''
    """
    if not any(isinstance(module, torch.jit.ScriptModule) and [*module.parameters()] for module in model.modules()):
        return ""
    return "; it is scripted or traced, which hides the types of its layers: give the model before torch.jit.script or torch.jit.trace"


def exported_hint(model: nn.Module) -> str:
    """The end of an error message about a weight that is no parameter: what to do if layers of the model are exported; else empty.

    Example:
        >>> from blockprune.model.parameters import exported_hint
        >>> exported_hint(nn.Linear(2, 2))
        ''
    """
    exported = [name for name, module in model.named_modules() if is_exported(module)]
    if not exported:
        return ""
    shown = f"{', '.join(map(repr, exported[:3]))}{', ...' if len(exported) > 3 else ''}" if exported[0] else "the model itself"
    return (
        f"; exported layers ({shown}) have no parameter for their weight: blockprune.export.update(model, masks) gives them other masks, "
        "and blockprune.export.dense(model) is a plain model"
    )


def stored_aliases(model: nn.Module) -> dict[str, list[str]]:
    """For each name of a stored parameter the names under which `functional_call` replaces it in all modules that use it.

    `torch.func.functional_call` finds these itself with ``tie_weights=True``, but then leaves the replacement in a module that has two
    names. So replace all of these names, with ``tie_weights=False``.

    Example:
        >>> from blockprune.model.parameters import stored_aliases
        >>> model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
        >>> model["head"].weight = model["embedding"].weight
        >>> stored_aliases(model)["head.weight"]
        ['embedding.weight', 'head.weight']
    """
    aliases: dict[str, list[str]] = {}
    for refs in parameter_refs(model).values():
        names = [ref.stored_name for ref in distinct(refs)]
        aliases |= {ref.stored_name: names for ref in refs}
    return aliases


def under_all_names(tensors: Mapping[str, Tensor], aliases: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Replacements of stored parameters, under all names that `stored_aliases` lists."""
    return {alias: tensor for name, tensor in tensors.items() for alias in aliases.get(name, (name,))}


def _all_refs(model: nn.Module) -> Iterator[ParameterRef]:
    check_model(model)
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, parametrize.ParametrizationList):
            for attr in _parameter_attributes(module):
                yield ParameterRef(f"{prefix}.{attr}" if prefix else attr, module, attr)


def _parameter_attributes(module: nn.Module) -> list[str]:
    """The names of a module's parameters, parametrized ones included, in the order of the plain module."""
    names = [name for name in parameter_names(module) if getattr(module, name) is not None]
    of_module = own_parametrizations(module)
    if of_module is None:
        return names
    refs = [ParameterRef("", module, attr) for attr in of_module]
    refs = [ref for ref in refs if isinstance(ref.stored, nn.Parameter)]  # a buffer can be parametrized, too
    order = next((ref.order for ref in refs if ref.order), ())
    return sorted([*names, *(ref.attr for ref in refs)], key=lambda name: order.index(name) if name in order else len(order))


def parameter_order(owner: nn.Module) -> tuple[str, ...]:
    """The names of a module's parameters in the order of the plain module, as far as it is known."""
    refs = [ParameterRef("", owner, attr) for attr in own_parametrizations(owner) or ()]
    return next((ref.order for ref in refs if ref.order), (*parameter_names(owner), *(ref.attr for ref in refs)))


def restore_order(owner: nn.Module, order: tuple[str, ...]) -> None:
    """Put a module's parameters in this order: torch appends a restored parameter at the end, but optimizers rely on the order."""
    for name in sorted(parameter_names(owner), key=lambda attr: order.index(attr) if attr in order else len(order)):
        parameter = getattr(owner, name)
        delattr(owner, name)
        owner.register_parameter(name, parameter)


_REPLICAS: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the DistributedDataParallel made since this module was imported


def _note_replica(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    if isinstance(owner, nn.parallel.DistributedDataParallel):
        _REPLICAS.add(owner)


register_module_module_registration_hook(_note_replica)  # a wrapped model does not know its DistributedDataParallel


def is_replicated(model: nn.Module) -> bool:
    """Whether DistributedDataParallel is in the model."""
    return any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())


def is_in_replica(model: nn.Module, refs: Iterable[ParameterRef]) -> bool:
    """Whether DistributedDataParallel is in the model, or elsewhere refers to one of these parameters."""
    own = {id(stored) for ref in refs for stored in ref.originals}

    def is_wrapped() -> bool:
        return any(id(p) in own for replica in list(_REPLICAS) for p in replica.parameters())

    if is_replicated(model):
        return True
    if is_wrapped():
        gc.collect()  # a wrapper refers to itself, so that deleting it does not free it at once
    return is_wrapped()


def check_not_lazy(name: str, weight: Tensor) -> None:
    """Raise a ValueError for a weight of a lazy layer that was never called."""
    if nn.parameter.is_lazy(weight):
        raise ValueError(f"{name}: this weight of a lazy layer has no shape yet; run the model on one batch first")


def check_dense_gradients(name: str, ref: ParameterRef) -> None:
    """Raise a TypeError for the weight of ``nn.Embedding(sparse=True)``: no sparse gradient passes through a parametrization."""
    if getattr(ref.owner, "sparse", False):
        raise TypeError(
            f"{name}: the parameter {ref.shape} has sparse gradients, which do not pass through a mask or gates; build the layer with "
            "sparse=False"
        )


def check_loaded(model: nn.Module, refs: Iterable[ParameterRef], function: str) -> None:
    """Raise a ValueError if accelerate holds a parameter of a model elsewhere between forwards: here it has no values, and takes none."""
    ref = next((ref for ref in refs if ref.stored.is_meta), None)
    if ref is not None and any(map(is_offloaded, model.modules())):  # the hook may be that of a module around the layer
        raise ValueError(
            f"{ref.name} {ref.shape}: accelerate has offloaded this parameter, so {function} cannot use its values; load the model "
            "without offloading, or call accelerate.hooks.remove_hook_from_submodules(model) first"
        )


def check_all_loaded(model: nn.Module, function: str) -> None:
    """`check_loaded` for all parameters of a model."""
    check_loaded(model, [refs[0] for refs in parameter_refs(model).values()], function)


def check_not_inference(refs: Iterable[ParameterRef], *, outside: bool = False) -> None:
    """Raise a ValueError if a parameter was made under `torch.inference_mode`, outside of which it cannot be changed or have gradients.

    Args:
        refs: the parameters.
        outside: whether they are used outside of it, although it may be on.
    """
    for ref in refs:
        if ref.stored.is_inference() and (outside or not torch.is_inference_mode_enabled()):
            raise ValueError(
                f"{ref.name} {ref.shape} was made under torch.inference_mode, and torch allows no change of it outside; copy the model "
                "outside of torch.inference_mode: copy.deepcopy(model)"
            )


def find_parameters(model: nn.Module, names: Iterable[str], *, what: str) -> dict[str, list[ParameterRef]]:
    """The references to these parameters, by canonical name.

    Args:
        model: masked or not.
        names: any names of the parameters; a shared tensor may have several.
        what: what the names are in error messages, such as "masks".

    Raises:
        KeyError: the model does not have a parameter of this name, or two names are those of one shared tensor.
    """
    return select_parameters(model, parameter_refs(model), names, what=what)


def select_parameters(
    model: nn.Module, refs: Mapping[str, list[ParameterRef]], names: Iterable[str], *, what: str
) -> dict[str, list[ParameterRef]]:
    """`find_parameters` among the `parameter_refs` of a model."""
    canonical = {ref.name: name for name, shared in refs.items() for ref in shared}
    selected: dict[str, list[ParameterRef]] = {}
    for name in names:
        if name not in canonical:
            hint = f"{suggest(str(name), canonical)}{exported_hint(model)}"
            raise KeyError(f"{what} names {name!r}, which is not a parameter of the model{hint}")
        if canonical[name] in selected:
            raise KeyError(f"{what} names one tied tensor twice: {name!r} is the same as {canonical[name]!r}; give it once")
        selected[canonical[name]] = refs[canonical[name]]
    return selected


def check_own_memory(model: nn.Module, changed: Iterable[Tensor], function: str) -> None:
    """Raise if a change of these tensors in place would change another tensor, or one of their own elements twice.

    Raises:
        ValueError: a tensor that shares its memory with another parameter or buffer, or is expanded.
    """
    chosen, spans = {id(x) for x in changed}, list[tuple[int, int, int, str, Tensor]]()
    for name, x in itertools.chain(model.named_parameters(), model.named_buffers()):
        if x.numel() and not x.is_meta and not is_sharded(x) and x.layout == torch.strided:
            extents = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
            if id(x) in chosen and any(stride == 0 for stride, _ in extents):
                raise _no_own_memory(name, x, "is expanded, so its elements share memory", function)
            begin, last = int(x.storage_offset()), int(sum(stride * (size - 1) for stride, size in extents))
            spans.append((storage_id(x), begin * x.itemsize, (begin + last + 1) * x.itemsize, name, x))
    furthest: dict[
        tuple[int, bool], tuple[int, str]
    ] = {}  # by memory, of all tensors and of the changed ones: the last end, and whose it is
    for memory, begin, end, name, x in sorted(spans, key=operator.itemgetter(0, 1)):
        other_end, other = furthest.get((memory, id(x) not in chosen), (0, ""))
        if begin < other_end:
            raise _no_own_memory(name, x, f"shares its memory with {other}", function)
        for kind in {False, id(x) in chosen}:
            furthest[memory, kind] = max(furthest.get((memory, kind), (0, "")), (end, name))


def _no_own_memory(name: str, x: Tensor, what: str, function: str) -> ValueError:
    return ValueError(f"{name} {tuple(x.shape)} {what}; {function} cannot change it in place, so make a copy: inplace=False")
