"""The masked copy of a model that `distill` trains."""

import re
from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockprune.core._compat import NormBase, convert_tensors
from blockprune.core.patterns import Pattern, matches, suggest
from blockprune.core.types import Masks, Weights, Where
from blockprune.model.apply import apply_masks
from blockprune.model.copying import copy_model
from blockprune.model.gates import GateBlocks
from blockprune.model.mask_reading import parameter_masks
from blockprune.model.parameters import ParameterRef, check_all_loaded, distinct, is_exported, parameter_refs
from blockprune.model.selection import norms_and_biases, select
from blockprune.model.sharding import check_not_fully_sharded


@attrs.frozen(eq=False)
class Student:
    """A masked copy of a model.

    Args:
        module: the copy, with masks on it; what is in half precision is copied in float32, where small steps do not round away.
        trained: what an optimizer changes, by name in the copy.
        refs: the parameters whose values are the result, by canonical name.
        dtypes: those of the model's parameters.
    """

    module: nn.Module
    trained: dict[str, Tensor]
    refs: dict[str, ParameterRef]
    dtypes: dict[str, torch.dtype]

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """Copies of the masked weights, in the model's dtypes."""
        return {name: ref.masked.to(self.dtypes[name], copy=True).as_subclass(Tensor) for name, ref in self.refs.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set what is trained.

        Raises:
            ValueError: the values are those of other parameters.
        """
        if {name: x.shape for name, x in values.items()} != {name: p.shape for name, p in self.trained.items()}:
            different = sorted(values.keys() ^ self.trained.keys()) or [n for n, p in self.trained.items() if values[n].shape != p.shape]
            raise ValueError(
                f"resume: its state trains different parameters, such as {different[0]!r}; give the arguments of the first call"
            )
        for name, p in self.trained.items():
            p.copy_(values[name])

    def set_mode(self, training: bool) -> None:
        """Training mode, or evaluation mode. Norms use their running statistics in both: they are no weights, so they are not returned."""
        self.module.train(training)
        for module in self.module.modules():
            if isinstance(module, NormBase) and module.track_running_stats:
                module.eval()


def make_student(
    model: nn.Module,
    masks: Masks | None,
    weights: Weights | None,
    *,
    where: Where | Pattern | Sequence[Pattern] | None,
    lora_rank: int | None,
) -> Student:
    """Copy a model, put masks and weights on the copy, and choose what is trained.

    Raises:
        ValueError: ``where`` chooses no parameter, or one that another parametrization computes; a rank below 1, or nothing that it is for;
            without both of them, kept weights of an exported layer that are frozen.
        KeyError, ValueError, TypeError: as `apply_masks`, for masks and weights.
    """
    check_not_fully_sharded(
        model, "distill trains a copy of the model (a loop of your own, with a loss of bp.losses, trains a sharded model)"
    )
    check_all_loaded(model, "distill")
    if where is None and lora_rank is None:
        _check_kept_weights_train(model)
    masks = parameter_masks(model) if masks is None else masks
    module = apply_masks(copy_model(model), masks, weights)
    dtypes = {name: refs[0].stored.dtype for name, refs in parameter_refs(module).items()}
    if any(dtype.is_floating_point and dtype.itemsize < 4 for dtype in dtypes.values()):
        convert_tensors(module, _not_half_precision)
    chosen = _chosen(module, where, lora_rank)
    refs = parameter_refs(module)
    low_rank = {name: refs[name] for name in chosen if lora_rank is not None and refs[name][0].mask and len(refs[name][0].shape) > 1}
    if lora_rank is not None and not low_rank:
        raise ValueError(
            f"lora_rank={lora_rank} is for masked matrices, and none of the trained parameters, such as {chosen[0]!r}, is masked and has "
            "two axes; give masks (to a block-sparse model in its masked form, export.dense(model)), another where=, or lora_rank=None"
        )
    _keep_kept_values(refs)
    if lora_rank is not None:
        masks = parameter_masks(module)
        apply_masks(module, {})
        factors = {name: _add_low_rank(name_refs, lora_rank) for name, name_refs in low_rank.items()}
        apply_masks(module, masks)
        refs = parameter_refs(module)
    else:
        factors = {}
    trained: dict[str, Tensor] = {refs[name][0].stored_name: refs[name][0].stored for name in chosen if name not in factors}
    for name, low in factors.items():
        trained |= {f"{refs[name][0].parametrized_name}0.{attr}": factor for attr, factor in low.named_parameters()}
    for p in module.parameters():
        p.grad = None
        p.requires_grad_(False)
    for x in trained.values():
        x.requires_grad_(True)
    canonical = {ref.name: name for name, name_refs in refs.items() for ref in name_refs}
    returned = dict.fromkeys([*chosen, *(canonical[name] for name in weights or {})])
    return Student(module, trained, {name: refs[name][0] for name in returned}, dtypes)


def _check_kept_weights_train(model: nn.Module) -> None:
    """Raise for a block-sparse layer whose kept weights are no parameter: training would change its bias alone."""
    frozen = [name for name, module in model.named_modules() if is_exported(module) and not getattr(module, "trainable", False)]
    if frozen:
        layer = f"layer {frozen[0]!r}" if frozen[0] else "the model"
        raise ValueError(
            f"{layer} is exported, and its kept weights are frozen; distill a model whose kept weights train, "
            "export.block_sparse(model, trainable=True), or choose what is trained, such as where=bp.norms_and_biases"
        )


def _not_half_precision(x: Tensor) -> Tensor:
    """A tensor of half precision in float32; any other as it is: float64 would lose digits in float32, and complex numbers a half."""
    return x.float() if x.is_floating_point() and x.itemsize < 4 else x


def _chosen(module: nn.Module, where: Where | Pattern | Sequence[Pattern] | None, lora_rank: int | None) -> list[str]:
    """The canonical names of the parameters that are trained."""
    refs = parameter_refs(module)
    floating = [name for name, (ref, *_) in refs.items() if ref.stored.is_floating_point()]
    if where is None:
        small = norms_and_biases
        chosen = [n for n in floating if lora_rank is None or refs[n][0].mask or small(n, refs[n][0].owner) is not None]
    elif where is norms_and_biases:  # scalars included, which have no blocks
        chosen = [n for n in floating if norms_and_biases(n, refs[n][0].owner) is not None]
    elif callable(where):
        chosen = list(select(module, where))
    else:
        aliases = {name: [ref.name for ref in refs[name]] for name in floating}
        patterns = [where] if not isinstance(where, Sequence) or isinstance(where, str) else where
        if other := [pattern for pattern in patterns if not isinstance(pattern, (str, re.Pattern))]:
            raise TypeError(f"where has {other[0]!r}; give names or patterns of parameters, or a rule such as bp.norms_and_biases")
        chosen = _matching(aliases, patterns)
    if not chosen:
        raise ValueError(f"where={where!r} chooses no floating-point parameter of the model, so there is nothing to train")
    if computed := [name for name in chosen if not refs[name][0].is_plain]:
        if any(isinstance(p, GateBlocks) for p in refs[computed[0]][0].parametrizations or ()):
            raise ValueError(
                f"{computed[0]} {refs[computed[0]][0].shape}: this weight has gates; take them off with bp.gates.remove(model)"
            )
        raise ValueError(
            f"{computed[0]} {refs[computed[0]][0].shape}: another parametrization computes this weight, so no new weight could be written "
            "to it; remove the parametrization, or leave the parameter out with where="
        )
    return chosen


def _matching(aliases: Mapping[str, Sequence[str]], patterns: Sequence[Pattern]) -> list[str]:
    """The canonical names of the parameters that have a name, of all names of a tied tensor, which fits a pattern."""
    for pattern in patterns:
        if not any(matches(pattern, alias) for names in aliases.values() for alias in names):
            raise ValueError(f"where: the pattern {pattern!r} matches no floating-point parameter{suggest(str(pattern), aliases)}")
    return [name for name, names in aliases.items() if any(matches(pattern, alias) for alias in names for pattern in patterns)]


@torch.no_grad()
def _keep_kept_values(refs: Mapping[str, Sequence[ParameterRef]]) -> None:
    """Store zeros in pruned blocks: optimizers that look at the size of a whole weight then see the weight that the model uses."""
    for ref in _masked(refs):
        if ref.is_plain:
            ref.stored.copy_(ref.masked.clone().as_subclass(Tensor))


def _masked(refs: Mapping[str, Sequence[ParameterRef]]) -> Iterator[ParameterRef]:
    return (name_refs[0] for name_refs in refs.values() if name_refs[0].mask)


class LowRank(nn.Module):
    """The parametrization ``W + B A`` with factors of a low rank; B starts at zero (LoRA, Hu et al. 2106.09685).

    A mask that is put on afterwards gives ``mask * (W + B A)``, so what is merged has the mask's zeros (PERP, Zimmer et al. 2312.15230).

    Args:
        weight: W.
        rank: the columns of B and the rows of A.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        columns = weight[0].numel()
        self.a = nn.Parameter(torch.randn(rank, columns, device="cpu").to(weight) / columns**0.5)
        self.b = nn.Parameter(weight.new_zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


def _add_low_rank(refs: Sequence[ParameterRef], rank: int) -> LowRank:
    """Add one product of factors to a parameter in all modules that use it."""
    low_rank = LowRank(refs[0].stored.detach(), rank)
    for ref in distinct(refs):
        parametrize.register_parametrization(ref.owner, ref.attr, low_rank, unsafe=True)
    return low_rank
