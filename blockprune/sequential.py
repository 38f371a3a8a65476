"""Layer after layer: each is pruned and repaired on the inputs that the layers before it, pruned already, give it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import attrs
import torch
from torch import Tensor, nn
from tqdm import tqdm

from blockprune import statistics
from blockprune.apply import read_masks
from blockprune.beside import Alone, Beside, dissect
from blockprune.blocks import BlockShape
from blockprune.fold import default_forward, default_token_weights, moved, undisturbed
from blockprune.gates import Forward
from blockprune.layers import input_axis, listeners
from blockprune.layerwise import Calls, Layer, capture, find_layers
from blockprune.names import find, lookup
from blockprune.parametrization import mask_blocks
from blockprune.pipeline import Pipeline
from blockprune.types import Data, Masks, Reconstruct, Sparsity, Weights, Where
from blockprune.where import select


@attrs.frozen(eq=False)
class Repaired:
    """Masks and repaired weights of the layers that are done; give both to `apply_masks`.

    Example:
        >>> bp.Repaired(masks={}, weights={}, layers=()).layers
        ()
    """

    masks: Masks
    weights: Weights
    layers: tuple[str, ...]


def sequential(
    model: nn.Module,
    pipeline: Pipeline,
    reconstruct: Reconstruct,
    batches: Iterable[Any],
    sparsity: Sparsity,
    *,
    layers: Sequence[str] | None = None,
    evidence: Data | None = None,
    target: Literal["pruned", "dense"] = "dense",
    tune: Callable[..., Mapping[str, Tensor]] | None = None,
    forward: Forward = default_forward,
    token_weights: Callable[[Any], Tensor | None] = default_token_weights,
    done: Repaired | None = None,
    each: Callable[[Repaired], None] | None = None,
    progress: bool = True,
) -> Repaired:
    """Prune and repair layers in order, each calibrated on what the pruned ones before it give (SparseGPT 2301.00774); pure.

    One layer's statistics are held at a time. Interrupted, nothing is half-written: give what ``each`` saw last as ``done`` to go on.

    Args:
        model: a model without masks whose layers follow each other: the output of one is the (first) input of the next.
        pipeline: its ``collect`` is ``partial(collect.with_statistics, where=..., statistics=[...])``, without batches.
        reconstruct: (data, masks) -> weights, such as `reconstruct.least_squares`.
        batches: calibration data, as for `collect.with_statistics`; gone through once, and the layers' inputs of all of it are kept.
        sparsity: a fraction, or a mapping by parameter name or pattern, such as a budget from `distribute`.
        layers: names of the modules, in order; by default the children of the largest ModuleList or Sequential (Hugging Face's decoder
            and encoder layers).
        evidence: statistics collected before, such as ``output_grad_gram`` of the dense model; added to each layer's own.
        target: match the dense layers' outputs on the dense model's inputs, which makes up for errors of the layers before too ("dense";
            damp more, 0.4 was best on a language model), or on the inputs that each layer now gets, which makes up for its own errors
            alone ("pruned", half the work). Beside a dense layer, experts of `as_linears` get the tokens that its router sends them.
        tune: a last step after ``reconstruct``, such as `blockwise`, that moves a layer's kept weights towards the dense layer's outputs
            on its dense inputs.
        forward: as in `collect.with_statistics`.
        token_weights: as in `collect.with_statistics`.
        done: what an earlier, interrupted call had done.
        each: called with all that is done after each new layer; the model is in evaluation mode meanwhile.
        progress: show a bar on a terminal.

    Raises:
        ValueError: a masked model, layers that do not follow each other, a chosen parameter that lies in no layer, no batches, what was
            done of other layers.
        KeyError: a layer or a sparsity for a parameter that does not exist.
        TypeError: a pipeline that does not collect statistics, batches that are one tensor or mapping.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(64, 8)
        >>> collect = partial(bp.collect.with_statistics, where=bp.linears((2, 2)), statistics=[bp.statistics.input_gram])
        >>> pipeline = bp.Pipeline(collect, bp.metric.obs, bp.allocate.per_row)
        >>> found = bp.sequential(model, pipeline, bp.reconstruct.least_squares, [x], 0.5)
        >>> pruned = bp.apply_masks(model, found.masks, found.weights)
        >>> round(bp.sparsity(found.masks), 2)
        0.5
    """
    rule, wanted = _asked(pipeline, target)
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"batches is one {type(batches).__name__}; give an iterable of batches, such as [batch]")
    if read_masks(model):
        raise ValueError("the model is masked; prune a plain one: bp.finalize(model)")
    chosen = select(model, rule)
    if computed := [name for name, (slot, _) in chosen.items() if not slot.alone]:
        raise ValueError(f"{computed[0]} is computed by another parametrization, so it cannot be repaired; remove that first")
    names = list(chosen)
    order = find_layers(model, layers, names)
    share = lookup(sparsity, names, what="sparsity", default=0.0) if isinstance(sparsity, Mapping) else None
    masks, weights, before = (dict(done.masks), dict(done.weights), done.layers) if done else ({}, {}, ())
    if before != tuple(layer.name for layer in order[: len(before)]):
        raise ValueError(f"done is of layers {', '.join(map(repr, before))}, which are not the first ones here; give the same layers")
    with undisturbed(model), torch.no_grad():
        calls = [capture(model, order, forward, moved(model, batch)) for batch in batches]
        if not calls:
            raise ValueError("batches is empty: calibration needs at least one")
        scales = [token_weights(call.batch) for call in calls]
        pruned = [call.hidden for call in calls]
        dense = list(pruned) if target == "dense" or tune else None
        for number, layer in enumerate(tqdm(order, desc="sequential", disable=None if progress else True)):
            new = number >= len(before)
            if new and layer.inside:
                for seen in _groups(model, layer, pruned, calls, dense if target == "dense" else None):
                    parameters = _pruned(model, layer.name, masks, weights) if target == "dense" else {}
                    data = cast(Any, pipeline.collect)(
                        model,
                        where=partial(_only, rule, seen.names),
                        statistics=[*wanted, *seen.statistics],
                        batches=seen.batches(),
                        forward=partial(seen.forward, parameters),
                        token_weights=scales.__getitem__,
                        progress=False,
                    )
                    data = {name: attrs.evolve(p, stats={**_known(evidence, name), **p.stats}) for name, p in data.items()}
                    found = pipeline.allocate(pipeline.metric(data), {name: share[name] for name in seen.names} if share else sparsity)
                    masks |= found
                    weights |= reconstruct(data, found)
                    del data
            if dense:
                dense = [layer.run({}, x, call) for x, call in zip(dense, calls, strict=True)]
            changed = _pruned(model, layer.name, masks, weights)
            if tune and dense and new and layer.inside:
                changed |= _tuned(tune, layer, changed, masks, pruned, calls, dense, scales)
                weights |= {name: changed[layer.local(name)] for name in layer.inside}
            pruned = [layer.run(changed, x, call) for x, call in zip(pruned, calls, strict=True)]
            if each and new:
                each(Repaired(dict(masks), dict(weights), tuple(layer.name for layer in order[: number + 1])))
    return Repaired(masks, weights, tuple(layer.name for layer in order))


def _groups(
    model: nn.Module, layer: Layer, given: Sequence[Tensor], calls: Sequence[Calls], dense: Sequence[Tensor] | None
) -> Iterator[Alone | Beside]:
    """Weights of a layer that are pruned at one time: all, or beside the dense layer those that meet one input."""
    if dense is None:
        yield Alone(layer.inside, layer, given, calls)
        return
    places, inside = find(model, layer.inside, what="where"), set(layer.module.modules())
    heard = [
        (name, slot, module)
        for name, slot, module in listeners(model, places)
        if module in inside and input_axis(slot) == input_axis(places[name][0])  # not a head tied to an embedding
    ]
    anatomy = dissect(layer, given[0], calls[0], heard)
    for names in anatomy.groups:
        yield Beside(names, layer, given, calls, dense, [one for one in heard if one[0] in names], anatomy)


def _tuned(  # noqa: PLR0917 (of one caller)
    tune: Callable[..., Mapping[str, Tensor]],
    layer: Layer,
    parameters: Mapping[str, Tensor],
    masks: Masks,
    given: list[Tensor],
    calls: list[Calls],
    targets: list[Tensor],
    scales: list[Tensor | None],
) -> Mapping[str, Tensor]:
    def run(changed: Mapping[str, Tensor], i: int) -> Tensor:
        return _counted(layer.run(changed, given[i], calls[i]), scales[i])

    aims = [_counted(x, scale) for x, scale in zip(targets, scales, strict=True)]
    return tune(run, parameters, {layer.local(name): masks[name] for name in layer.inside}, aims)


def _counted(x: Tensor, scale: Tensor | None) -> Tensor:
    """The tokens that count, times the root of how much: the squared error of what is left is the weighed one."""
    if scale is None or x.shape[: scale.ndim] != scale.shape:
        return x
    here = scale > 0
    return x[here] * scale[here].to(x).sqrt().view(-1, *[1] * (x.ndim - scale.ndim))


def _only(rule: Where, inside: Sequence[str], name: str, owner: nn.Module) -> BlockShape | None:
    return rule(name, owner) if name in inside else None


def _asked(pipeline: Pipeline, target: str) -> tuple[Any, list[statistics.Statistic]]:
    bound = pipeline.collect.keywords if isinstance(pipeline.collect, partial) else {}
    if "where" not in bound or "statistics" not in bound:
        raise TypeError(
            "sequential gives each layer's batches to pipeline.collect itself; bind the rest: "
            "collect=partial(collect.with_statistics, where=..., statistics=[...])"
        )
    if own := [key for key in ("batches", "forward", "token_weights") if key in bound]:
        raise TypeError(f"pipeline.collect binds {', '.join(own)}, which sequential would not use; give it to sequential instead")
    wanted = list(bound["statistics"])
    if any(s.name in ("input_cross", "stream_cross") for s in wanted):
        raise ValueError("input_cross and stream_cross compare two models; leave them out of the statistics: target='dense' adds them")
    if bad := [s.name for s in wanted if s.sees not in ("inputs", "output")]:
        raise ValueError(
            f"{', '.join(bad)} needs gradients, which a layer alone has not; collect it of the whole model and pass it as evidence="
        )
    if target not in ("pruned", "dense"):
        raise ValueError(f"target={target!r} must be 'pruned' or 'dense'")
    return bound["where"], wanted


def _known(evidence: Data | None, name: str) -> Mapping[str, Tensor]:
    return evidence[name].stats if evidence and name in evidence else {}


def _pruned(model: nn.Module, layer: str, masks: Masks, weights: Weights) -> dict[str, Tensor]:
    """The parameters of a layer that are masked or new, each by its first name in it."""
    prefix = f"{layer}." if layer else ""
    names = {**masks, **weights}
    found: dict[str, Tensor] = {}
    for name, places in zip(names, find(model, names, what="weights").values(), strict=True):
        if here := [slot.name for slot in places if slot.name.startswith(prefix)]:
            stored = places[0].stored
            value = weights[name].to(stored) if name in weights else stored
            if name in masks:
                value = mask_blocks(value, masks[name].keep.to(stored.device), masks[name].grid)
            found[here[0].removeprefix(prefix)] = value
    return found
