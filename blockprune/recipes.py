"""Ready-made recipes: recipe(model, sparsity) -> a result with ``.masks`` and ``.weights``; the model is not changed.

The model must not run in another thread meanwhile: until the recipe returns, its modules have hooks and are in evaluation mode.

A recipe is a frozen value that is composed of the functions in the other folders, and nothing else: printing it shows of which ones, and
`attrs.evolve` swaps one of them. Give a result to `apply_masks`.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from inspect import Parameter, signature
from typing import Any, Literal, TypeVar, cast

import attrs
from torch import nn

from blockprune import allocate as allocators
from blockprune import collect, metric, statistics
from blockprune.allocate import budgets
from blockprune.collect import distributed
from blockprune.core.arguments import check_counts, check_fraction, check_number, check_sparsity
from blockprune.core.grid import BlockShape
from blockprune.core.pipeline import Pipeline, fields_as_code
from blockprune.core.types import Allocate, BlockScore, Budget, Collect, Data, Metric, Param, Reconstruct, Sparsity, Where
from blockprune.core.unit_permutation import UnitPermutation
from blockprune.model.calibration import Calibration
from blockprune.model.selection import including_names, select, units, with_block
from blockprune.reorder.clustering import checked_block, cluster, common_block
from blockprune.reorder.hidden_axes import find_axes
from blockprune.reorder.permutation import permute
from blockprune.repair import closed_form
from blockprune.repair.layer_by_layer import PruningResult, sequential
from blockprune.repair.layer_finetuning import Finetune
from blockprune.repair.layer_pruning import check_not_offloaded

__all__ = ["LayerBudget", "LayerByLayer", "OneShot", "cluster_units", "magnitude", "obs", "sparsegpt", "structured", "wanda"]

M = TypeVar("M", bound=nn.Module)


@attrs.frozen(repr=False)
class OneShot:
    """Score and prune the whole model at once; the kept weights stay as they are.

    Args:
        pipeline: the three stages.

    Example:
        >>> bp.recipes.OneShot(bp.recipes.magnitude(bp.linears((2, 2))).pipeline)(nn.Linear(4, 4), 0.5).weights
        {}
    """

    pipeline: Pipeline

    def __call__(self, model: nn.Module, sparsity: Sparsity) -> PruningResult:
        return PruningResult(self.pipeline(model, sparsity), {})

    __repr__ = fields_as_code


@attrs.frozen(repr=False)
class LayerBudget:
    """A sparsity for each parameter, from statistics of the dense model.

    Args:
        collect: model -> data, the statistics of the whole model.
        metric: data -> scores that compare between layers.
        budget: (scores, sparsity) -> one sparsity for each parameter.
        reuse: names of the statistics that the layers' own metric is given, too.
        passes: each pass over the batches collects the statistics of this share of the parameters, which are dropped once they are scores.
            More passes take less memory and more time. ``collect`` then needs an option ``where=``.

    Example:
        >>> collect = partial(bp.collect.weights, where=bp.linears((1, 1)))
        >>> shares, _ = bp.recipes.LayerBudget(collect, bp.metric.l2, bp.budgets.erk, reuse=())(nn.Linear(4, 4), 0.5)
        >>> shares
        {'weight': 0.5}
    """

    collect: Collect
    metric: Metric
    budget: Budget
    reuse: tuple[str, ...] = ("output_grad_gram",)
    passes: int = 1

    def __call__(self, model: nn.Module, sparsity: float) -> tuple[Mapping[str, float], Data]:
        if isinstance(sparsity, Mapping):
            raise TypeError(
                f"sparsity={sparsity!r} gives each parameter its own, but the budget of this recipe distributes one number; give a number, "
                "or leave out the budget: attrs.evolve(recipe, budget=None)"
            )
        check_sparsity(sparsity)
        scores, kept = _scores_in_passes(model, self.collect, self.metric, self.passes, self.reuse)
        return self.budget(scores, sparsity), kept

    __repr__ = fields_as_code


@attrs.frozen(repr=False)
class LayerByLayer:
    """Prune and repair layer after layer (`sequential`), each layer on the outputs of the pruned layers before it.

    Args:
        pipeline: the three stages of each layer.
        reconstruct: (data, masks) -> weights.
        calibration: batches, forward and loss.
        budget: how the sparsity is shared among layers; None prunes all layers alike.
        layers, target, finetune: as in `sequential`.

    Example:
        >>> x = torch.randn(32, 8)
        >>> recipe = bp.recipes.obs(bp.linears((2, 2)), bp.Calibration([x], loss=lambda output, batch: output.square().mean()))
        >>> uniform = attrs.evolve(recipe, budget=None)
        >>> result = uniform(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), 0.5)
        >>> {name: round(bp.sparsity({name: mask}), 2) for name, mask in result.masks.items()}
        {'0.weight': 0.5, '2.weight': 0.5}
    """

    pipeline: Pipeline
    reconstruct: Reconstruct
    calibration: Calibration
    budget: LayerBudget | None = None
    layers: Sequence[str] | None = None
    target: Literal["pruned", "dense"] = "dense"
    finetune: Finetune | Mapping[str, Finetune] | None = None

    def __call__(self, model: nn.Module, sparsity: Any) -> PruningResult:
        check_not_offloaded(model)  # before the budget, which takes time
        check_sparsity(sparsity)
        shares, extra_data = (sparsity, None) if self.budget is None else self.budget(model, sparsity)
        options: Any = {"layers": self.layers, "target": self.target, "finetune": self.finetune}
        return sequential(model, self.pipeline, self.reconstruct, self.calibration, shares, extra_data=extra_data, **options)

    __repr__ = fields_as_code


def magnitude(where: Where, *, allocate: Allocate = allocators.per_layer) -> OneShot:
    """Prune the blocks with the smallest mean ``|w|`` (Han et al. 1506.02626).

    Args:
        where: which parameters, in what blocks.
        allocate: which blocks are compared: by default those of each layer.

    Example:
        >>> bp.recipes.magnitude(bp.linears((4, 4)))
        OneShot(
            pipeline=Pipeline(collect=weights(where=linears(block=(4, 4))), metric=l1, allocate=per_layer),
        )
    """
    return OneShot(Pipeline(partial(collect.weights, where=where), metric.l1, allocate))


def structured(axes: Sequence[UnitPermutation]) -> OneShot:
    """Prune whole units, channels and heads: those whose elements have the smallest mean ``|w|`` (Li et al. 1608.08710, with all readers).

    A unit is pruned in everything that has it: its row, its bias, its batch norm and the columns that read it. `export.shrink` then makes
    the model smaller. Sparsity is the share of the units of each axis, of which at least one stays; a mapping such as
    ``{"*.attention.*": 1 / 3, "*": 0}`` takes heads alone (if it gives the tensors of an axis several numbers, their mean by elements
    counts). Axes whose units a norm joins, such as the residual stream of a transformer, stay. Where the configuration of a Hugging Face
    model cannot express fewer heads, as BERT's, call ``shrink(uniform=False)``.

    Args:
        axes: what `find_axes` returns.

    Raises:
        ValueError: no axis has units that can be removed.
        TypeError: something else than axes, such as a model.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(5, 4)
        >>> masks = bp.recipes.structured(bp.find_axes(model, x))(model, 0.25).masks
        >>> [*masks], bp.export.shrink(bp.apply_masks(model, masks), x).model[0]
        (['0.weight', '0.bias', '1.weight', '1.bias', '3.weight'], Linear(in_features=4, out_features=6, bias=True))
    """
    units(axes)  # raises an error for anything but axes
    removable = [axis for axis in axes if axis.removable]
    if not removable:
        present = (
            f"{len(axes)} hidden axes, whose units norms or softmaxes join: without some of them the others change" if axes else "no axis"
        )
        raise ValueError(f"axes has {present}; no unit can be removed from this model")
    allocate = partial(allocators.per_layer, coupled=removable, min_keep=1)
    return OneShot(Pipeline(partial(collect.weights, where=units(removable)), metric.l1, allocate))


def wanda(where: Where, calibration: Calibration | Iterable[Any], *, allocate: Allocate = allocators.per_row) -> OneShot:
    """Prune the blocks with the smallest ``|w| ||x||`` in each row of blocks (Sun et al. 2306.11695); without repair, as in the paper.

    Args:
        where: which parameters, in what blocks.
        calibration: batches and forward; or the batches alone.
        allocate: which blocks are compared.

    Example:
        >>> recipe = bp.recipes.wanda(bp.linears((2, 2)), bp.Calibration([torch.randn(8, 4)]))
        >>> bp.sparsity(recipe(nn.Linear(4, 4), 0.5).masks)
        0.5
    """
    return OneShot(Pipeline(partial(collect.with_statistics, where=where, calibration=_reusable(calibration)), metric.wanda, allocate))


def sparsegpt(
    where: Where,
    calibration: Calibration | Iterable[Any],
    *,
    damping: float = 0.01,
    columns: int = 128,
    target: Literal["pruned", "dense"] = "dense",
) -> LayerByLayer:
    """SparseGPT in blocks, layer after layer (Frantar & Alistarh 2301.00774): its masks, and its update of the kept weights.

    Args:
        where: which parameters, in what blocks.
        calibration: batches and forward; or the batches alone.
        damping: the share of the Hessian's diagonal that is added to it.
        columns: input columns among which blocks are compared.
        target: as in `sequential`; "pruned" is the paper's.

    Raises:
        TypeError, ValueError: a number that is none, or out of its range.

    Example:
        >>> recipe = bp.recipes.sparsegpt(bp.linears((2, 2)), bp.Calibration([torch.randn(32, 8)]))
        >>> recipe(nn.Sequential(nn.Linear(8, 8)), 0.5).weights["0.weight"].shape
        torch.Size([8, 8])
    """
    damping = check_number("damping", damping, "a number from 0 on", lowest=0)
    (columns,) = check_counts(1, columns=columns)
    score = partial(metric.sparsegpt, damping=damping, columns_per_step=columns)
    allocate = partial(allocators.per_columns, columns=columns)
    pipeline = Pipeline(partial(collect.with_statistics, where=where), score, allocate)
    return LayerByLayer(pipeline, partial(closed_form.sparsegpt, damping=damping), _reusable(calibration), target=target)


def obs(
    where: Where,
    calibration: Calibration | Iterable[Any],
    *,
    damping: float = 0.4,
    max_layer_sparsity: float = 0.6,
    passes: int = 1,
) -> LayerByLayer:
    """Optimal Brain Surgeon over blocks with a budget for each layer and least squares repair (OBC 2208.11580, ZipLM 2302.04089).

    A pass over the dense model with gradients says how much each layer may lose (`metric.obs`, `budgets.loss_weighted`). Then each layer
    is pruned by Optimal Brain Surgeon and its kept weights are fitted to the dense layer's outputs (`sequential`). With a calibration that
    has ``reduce=bp.distributed.all_reduce``, several processes share the batches and the work, and all have the result.

    Args:
        where: which parameters, in what blocks.
        calibration: batches, forward and loss; or the batches alone, if the model's output has a loss.
        damping: the share of the Hessian's diagonal that is added to it, in the layers' scores and their repair.
        max_layer_sparsity: no layer loses more than this fraction. If ``sparsity + 0.1`` is larger, that is the limit instead.
        passes: of the budget, as in `LayerBudget`.

    Raises:
        TypeError, ValueError: a number that is none, or out of its range.

    Example:
        >>> loss = lambda output, batch: output.square().mean()
        >>> recipe = bp.recipes.obs(bp.linears((2, 2)), bp.Calibration([torch.randn(32, 8)], loss=loss, progress=False))
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> result = recipe(model, 0.5)
        >>> round(bp.sparsity(bp.apply_masks(model, result.masks, result.weights) and result.masks), 2)
        0.5
    """
    damping = check_number("damping", damping, "a number from 0 on", lowest=0)
    if not isinstance(max_layer_sparsity, Mapping):
        max_layer_sparsity = check_fraction("max_layer_sparsity", max_layer_sparsity)
    (passes,) = check_counts(1, passes=passes)
    calibration = _reusable(calibration)
    progress = calibration.progress
    collector = partial(
        collect.with_statistics,
        where=where,
        statistics=[statistics.input_gram, statistics.output_grad_gram],
        calibration=calibration,
        lazy=True,
    )
    layer_sparsities = partial(budgets.loss_weighted, max_sparsity=max_layer_sparsity, margin=0.1)
    shared = _shared_work(calibration)
    budget = LayerBudget(collector, partial(metric.obs, progress=progress, **shared), layer_sparsities, passes=passes)
    score = partial(metric.obs, damping=damping, progress=False, **shared)
    repair = partial(closed_form.least_squares, damping=damping, progress=False, **shared)
    return LayerByLayer(Pipeline(partial(collect.with_statistics, where=where), score, allocators.per_layer), repair, calibration, budget)


def cluster_units(
    model: M,
    where: Where,
    calibration: Calibration | Iterable[Any],
    *,
    block: BlockShape | None = None,
    sparsity: float = 0.25,
    example: Any = None,
    passes: int = 1,
) -> M:
    """A copy of a model that computes the same, its hidden units reordered so that units that matter alike share blocks.

    It finds the hidden axes (`find_axes`), scores each weight by Optimal Brain Surgeon, finds better orders (`cluster`) and applies them
    (`permute`).

    Args:
        model: without masks; it stays as it is.
        where: which parameters will be pruned, in what blocks.
        calibration: batches, forward and loss; or the batches alone, if the model's output has a loss.
        block: the blocks to sort for, two axes; by default those of ``where``.
        sparsity: the share of the elements that will be pruned.
        example: one small batch that calls every layer, for `find_axes`; by default the first batch. It need not be long: sixteen tokens
            are enough and take less time and memory. Several processes must have the same one.
        passes: as in `LayerBudget`.

    Raises:
        ValueError: ``where`` has several block shapes and ``block`` is not given; a calibration with ``reduce`` and no ``example``; no
            batches; and what the four functions raise.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
        >>> calibration = bp.Calibration([x], loss=lambda output, batch: output.square().mean())
        >>> clustered = bp.recipes.cluster_units(model, bp.linears((2, 2)), calibration)
        >>> torch.allclose(clustered(x), model(x), atol=1e-5)
        True
    """
    calibration = _reusable(calibration)
    sparsity = check_fraction("sparsity", sparsity)
    (passes,) = check_counts(1, passes=passes)
    block = common_block(model, where) if block is None else checked_block(block)
    needed = [statistics.input_gram, statistics.output_grad_sq]
    if example is None and calibration.reduce:
        raise ValueError("example is not given, but the first batches of several processes differ; give example=, the same to all of them")
    if example is None:
        example = next(iter(calibration.batches), None)
        if example is None:
            raise ValueError("batches is empty: clustering needs at least one batch of calibration data")
    axes = find_axes(model, example, forward=calibration.forward, progress=calibration.progress)
    single = with_block(where, (1, 1))
    collector = partial(collect.with_statistics, where=single, statistics=needed, calibration=calibration, lazy=True)
    score = partial(metric.obs, stop_at=0, progress=calibration.progress, **_shared_work(calibration))
    # the scores have no name here, so that `cluster` can free them
    plan = cluster(
        _scores_in_passes(model, collector, score, passes)[0], axes, block=block, sparsity=sparsity, progress=calibration.progress
    )
    return permute(model, plan)


def _scores_in_passes(
    model: nn.Module, collect: Collect, metric: Metric, passes: int, keep: Sequence[str] = ()
) -> tuple[dict[str, BlockScore], dict[str, Param]]:
    """The scores, and the data with these statistics alone; the statistics of one share of the parameters are held at a time."""
    scores: dict[str, BlockScore] = {}
    kept: dict[str, Param] = {}
    for part in _parts_of(model, collect, passes):
        data = part(model)
        scores |= metric(data)
        kept |= {name: attrs.evolve(p, stats={key: p.stats[key] for key in keep if key in p.stats}) for name, p in data.items()}
        del data
    return scores, kept


def _parts_of(model: nn.Module, collect: Collect, passes: int) -> list[Collect]:
    """Collectors of consecutive parameters whose Gram matrices of inputs have about the same size."""
    (passes,) = check_counts(1, passes=passes)
    if passes == 1:
        return [collect]
    where = signature(collect).parameters.get("where")
    if where is None or where.default is Parameter.empty:
        raise TypeError(
            f"passes={passes} needs a collector with a where=, such as partial(collect.with_statistics, where=...); or passes=1"
        )
    sizes = {name: math.prod(grid.shape[1:]) ** 2 for name, (_, grid) in select(model, where.default).items()}
    ends = dict(zip(sizes, itertools.accumulate(sizes.values()), strict=True))
    total = sum(sizes.values())
    parts: dict[int, set[str]] = {}
    for name, end in ends.items():
        parts.setdefault((end - 1) * passes // total, set()).add(name)
    return [partial(cast(Any, collect), where=including_names(where.default, names)) for names in parts.values()]


def _shared_work(calibration: Calibration) -> dict[str, Any]:
    """The option of OBS and of least squares that shares their work among the processes that share the batches."""
    reduce = calibration.reduce
    bound = reduce.keywords if isinstance(reduce, partial) else {}
    is_known = reduce is not None and (reduce.func if isinstance(reduce, partial) else reduce) is distributed.all_reduce
    return {"share": partial(distributed.share, **bound) if bound else distributed.share} if is_known else {}


def _reusable(calibration: Calibration | Iterable[Any]) -> Calibration:
    """The calibration, or one of these batches.

    Raises:
        TypeError: batches that can be used once only, or that are none.
    """
    if not isinstance(calibration, Calibration):
        calibration = Calibration(calibration)
    if isinstance(calibration.batches, Iterator):
        kind = type(calibration.batches).__name__
        raise TypeError(f"a recipe runs over calibration.batches several times, and a {kind} can be used once only; give a list of batches")
    return calibration
