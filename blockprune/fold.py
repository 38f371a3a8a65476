"""The fold: one pass over batches that adds up statistics and leaves the model as it was."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from tqdm import tqdm

from blockprune.experts import Experts, experts_in
from blockprune.gates import Heard, How, gates, scalar
from blockprune.layers import input_axis, listeners, rows
from blockprune.names import Slot, find
from blockprune.statistics import Call, Gates, Statistic, Sums
from blockprune.types import Data


@attrs.frozen(eq=False)
class Fold:
    """Sums so far: what `merge` adds up and `finish` divides.

    Example:
        >>> one = bp.collect.fold(nn.Linear(2, 2), where=bp.linears((1,)), statistics=[bp.statistics.input_sq], batches=[torch.ones(3, 2)])
        >>> one.sums["weight", "input_sq"]
        {'sum': tensor([[3., 3.]]), 'n': tensor(3.)}
    """

    data: Data
    slots: Mapping[str, Slot]
    statistics: tuple[Statistic, ...]
    sums: Mapping[tuple[str, str], Sums]  # by parameter and statistic


def merge(a: Fold, b: Fold) -> Fold:
    """The fold over the batches of both.

    Raises:
        ValueError: folds of other parameters or statistics.

    Example:
        >>> one = bp.collect.fold(nn.Linear(2, 2), where=bp.linears((1,)), statistics=[bp.statistics.input_sq], batches=[torch.ones(3, 2)])
        >>> bp.collect.merge(one, one).sums["weight", "input_sq"]["n"]
        tensor(6.)
    """
    if a.sums.keys() != b.sums.keys():
        odd = sorted(a.sums.keys() ^ b.sums.keys())
        raise ValueError(f"only folds of the same parameters and statistics can be merged; {odd[0]} is in one of them only")
    return attrs.evolve(a, sums={key: {k: v + b.sums[key][k] for k, v in sums.items()} for key, sums in a.sums.items()})


def finish(fold: Fold) -> Data:
    """Divide the sums: data with ``stats`` by name.

    Raises:
        ValueError: no batch at all, or a layer that no batch reached.

    Example:
        >>> one = bp.collect.fold(nn.Linear(2, 2), where=bp.linears((1,)), statistics=[bp.statistics.input_sq], batches=[torch.ones(3, 2)])
        >>> bp.collect.finish(one)["weight"].stats["input_sq"]
        tensor([[1., 1.]])
    """
    missed = {key: sums for key, sums in fold.sums.items() if "n" in sums and not sums.get("reached", sums["n"]).any()}
    if missed and all(not sums["n"].any() for sums in fold.sums.values() if "n" in sums):
        raise ValueError("batches is empty: statistics need at least one batch (a generator can be used once only)")
    if missed:
        name, statistic = next(iter(missed))
        owner, others = type(fold.slots[name].owner).__name__.removeprefix("Parametrized"), [*dict.fromkeys(n for n, _ in missed)][1:]
        raise ValueError(
            f"{name} {fold.data[name].grid.shape}: the forward never calls its {owner}, so {statistic!r} saw nothing"
            + (f" (nor of {len(others)} more: {', '.join(others[:4])}{', ...' if len(others) > 4 else ''})" if others else "")
            + "; give batches that reach it, or leave it out with `excluding`"
        )
    return {
        name: attrs.evolve(param, stats={s.name: s.finalize(fold.sums[name, s.name], fold.slots[name], param) for s in fold.statistics})
        for name, param in fold.data.items()
    }


def start(data: Data, slots: Mapping[str, Slot], statistics: Sequence[Statistic]) -> Fold:
    """A fold over no batches."""
    for name, slot in slots.items():
        if bad := [s.name for s in statistics if s.sees in ("weight_grad", "gates") and not slot.alone]:
            raise NotImplementedError(
                f"{name} {data[name].grid.shape}: {', '.join(bad)} is of a stored weight, but another parametrization computes this one; "
                "remove that one, use a statistic of activations, or leave it out with `excluding`"
            )
    sums = {(name, s.name): s.init(slots[name], param) for name, param in data.items() for s in statistics}
    return Fold(data, slots, tuple(statistics), sums)


def run(model: nn.Module, fold: Fold, batches: Iterable[Any], how: How, *, progress: bool) -> Fold:
    """Add the batches to a fold; the model's mode, gradients, hooks and the RNG are as before afterwards, whatever happens."""
    sees = {s.sees for s in fold.statistics}
    needs = sorted(s.name for s in fold.statistics if s.sees in ("output_grad", "weight_grad"))
    heard = listeners(model, find(model, fold.slots, what="where"))
    per_block = sorted(s.name for s in fold.statistics if s.sees == "gates")
    with undisturbed(model, [slot.stored for slot in fold.slots.values()]), call_by_call():
        for number, given in enumerate(tqdm(batches, desc="collect", disable=None if progress else True, leave=False)):
            if not isinstance(given, (Tensor, Mapping, tuple, list)) and how.forward is default_forward:
                raise TypeError(f"batch {number} is a {type(given).__name__}; give tensors, tuples or mappings, or pass forward=")
            batch = moved(model, given)
            if sees - {"gates"}:
                fold = _layers(model, fold, heard, batch, how, needs, number=number)
            if "gates" in sees:
                grids = {name: p.grid for name, p in fold.data.items()}
                found = gates(model, grids, fold.slots, heard, batch, how, needs=per_block)
                fold = _add(fold, [(name, "gates", one) for name, one in found.items()], number)
    return fold


Seen = Iterable[tuple[str, str, Any]]  # (parameter, what is seen, the evidence)


def _add(fold: Fold, seen: Seen, number: int) -> Fold:
    sums = dict(fold.sums)
    for name, kind, evidence in seen:
        for s in fold.statistics:
            if s.sees == kind:
                new = s.update(sums[name, s.name], evidence)
                if isinstance(evidence, Gates) and not evidence.called():
                    continue  # a gradient of 0 that is no evidence: `finish` names the layer
                if not all(_finite(v) for v in new.values()):
                    shape = fold.data[name].grid.shape
                    raise ValueError(
                        f"{name} {shape}: NaN or inf reached {s.name!r} in batch {number}; look at that batch and the layers before"
                    )
                sums[name, s.name] = new
    return attrs.evolve(fold, sums=sums)


def _finite(x: Tensor) -> bool:
    """One read; a second only where large numbers add up to inf."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _layers(  # noqa: PLR0917 (of one caller)
    model: nn.Module, fold: Fold, heard: Heard, batch: Any, how: How, needs_grad: list[str], *, number: int
) -> Fold:
    """One forward, and one backward if a statistic needs it; what a layer sees is added at once, before the forward writes into it."""
    token_weights = how.token_weights(batch)
    routed: dict[nn.Module, Tensor] = {}  # by an expert's Linear: how much each of its tokens counts
    handles = []
    outputs: list[GradientEdge] = []  # of which the gradients are asked for
    kinds = {s.sees for s in fold.statistics}

    def add(name: str, kind: str, evidence: Any) -> None:
        nonlocal fold
        if kind in kinds:
            fold = _add(fold, [(name, kind, evidence)], number)

    last: tuple[Any, Call] | None = None

    def shared(call: Call) -> Call:
        """Layers that are given one tensor after each other (queries, keys and values, say) share what is worked out from it."""
        nonlocal last
        seen = [x for x in (*call.inputs, call.weights) if x is not None]
        key = [(x.data_ptr(), x._version, x.shape, x.stride(), x.dtype) for x in seen]
        if last is None or last[0] != key:
            last = key, attrs.evolve(call, known={})  # kept, so that its memory is not another's
        return attrs.evolve(call, known=last[1].known)

    def listen(name: str, slot: Slot) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            raw: Tensor = output[0] if isinstance(output, tuple) else output
            with torch.no_grad():
                views = [x.detach() for x in rows(slot, module, args, kwargs)] if "inputs" in kinds else []
                call = attrs.evolve(_call(slot, module, views, raw, routed.get(module, token_weights)), name=name)
                if "inputs" in kinds:
                    add(name, "inputs", shared(call))
                add(name, "output", call)
            if "output_grad" in kinds and raw.requires_grad:  # the gradient of this value, also if it is overwritten later
                raw.register_hook(lambda g: add(name, "output_grad", attrs.evolve(call, output_grad=_matrix(slot, g))))
                outputs.append(get_gradient_edge(raw))

        return hook

    if kinds & {"inputs", "output", "output_grad"}:
        if token_weights is not None:
            route = partial(_route, routed, token_weights.flatten())
            handles += [module.register_forward_pre_hook(route) for module in experts_in(model).values()]
        for name, slot, module in heard:
            if input_axis(slot) == input_axis(fold.slots[name]):  # not a head tied to an embedding
                handles.append(module.register_forward_hook(listen(name, slot), with_kwargs=True))
    try:
        with torch.set_grad_enabled(bool(needs_grad)):
            output = how.forward(model, batch)
            loss = scalar(how, output, batch, needs_grad) if needs_grad else None
    finally:
        for handle in handles:
            handle.remove()
    if loss is not None and "weight_grad" in kinds:
        weights = {name: slot.stored for name, slot in fold.slots.items()}
        grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, g in zip(weights, grads, strict=True):
            add(name, "weight_grad", g)  # None: this batch does not reach the weight
    elif loss is not None and outputs:  # none of weights: a third of the products of the backward
        torch.autograd.grad(loss, _lowest(outputs), allow_unused=True)
    return fold


def _route(routed: dict[nn.Module, Tensor], weights: Tensor, module: Experts, args: Any) -> None:
    if len(args[1]) == len(weights):
        for number, expert in enumerate(module.numbered()):
            routed.update(dict.fromkeys(expert.children(), weights[torch.where(args[1] == number)[0]]))


def _lowest(edges: Sequence[GradientEdge]) -> list[GradientEdge]:
    """Those below which there are no others: on the way to them gradients pass all."""
    nodes = {edge.node for edge in edges}

    def ends(node: Any) -> bool:
        seen: set[Any] = set()
        below = [node]
        while below:
            following = {f for f, _ in below.pop().next_functions if f is not None} - seen
            if following & nodes:
                return False
            seen |= following
            below += following
        return True

    return [edge for edge in edges if ends(edge.node)]


def _matrix(slot: Slot, raw: Tensor) -> Tensor:
    """A layer's output, or its gradient, as ``[n, outputs]``."""
    raw = raw.detach()
    if isinstance(slot.owner, nn.modules.conv._ConvNd):
        raw = raw.movedim(-len(slot.owner.kernel_size) - 1, -1)
    return raw.reshape(-1, raw.shape[-1])


def _call(slot: Slot, module: nn.Module, views: list[Tensor], raw: Tensor, token_weights: Tensor | None) -> Call:
    """What a hook saw as matrices, one row a token; tokens are weighed where their layout is that of the weights, transposed or flat."""
    inputs = [x.reshape(-1, x.shape[-1]) for x in views]
    if isinstance(slot.owner, nn.modules.conv._ConvNd):
        return Call(inputs, _matrix(slot, raw), None)
    leading = {x.shape[:-1] for x in [*views, raw]}
    candidates = [] if token_weights is None else [token_weights, token_weights.movedim(0, -1), token_weights.flatten()]
    if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
        candidates = candidates[1:]
    weights = next((w.flatten() for w in candidates if w.shape in leading), None)
    return Call(inputs, _matrix(slot, raw), weights)


def default_forward(model: Callable[..., Any], batch: Any) -> Any:
    """A tensor is passed on, a mapping spread as keywords, of a tuple or list the first element (itself spread, if it is a tuple)."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        first = batch[0]
        return model(**first) if isinstance(first, Mapping) else model(*first) if isinstance(first, (tuple, list)) else model(first)
    return model(batch)


def default_token_weights(batch: Any) -> Tensor | None:
    """The ``attention_mask`` of a mapping: padding does not count."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def moved(model: nn.Module, batch: Any) -> Any:
    """The batch on the model's device, floats in its dtype, mappings as plain dicts."""
    return _to(batch, next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(())))


def _to(batch: Any, like: Tensor) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(like.device, like.dtype) if batch.is_floating_point() else batch.to(like.device)
    if isinstance(batch, Mapping):
        return {key: _to(value, like) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(*[_to(v, like) for v in batch]) if hasattr(batch, "_fields") else type(batch)(_to(v, like) for v in batch)
    return batch


@contextlib.contextmanager
def undisturbed(model: nn.Module, weights: Sequence[Tensor] = ()) -> Iterator[None]:
    """Evaluation mode, gradients on for these weights; afterwards all as before: modes, flags, buffers, random numbers."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in weights]
    buffers = [(b, b._version, b.clone()) for b in model.buffers()]
    with torch.random.fork_rng(gpus(model)):
        try:
            model.eval()
            for p in weights:
                p.requires_grad_(True)
            yield
        finally:
            for module, training in modes:
                module.training = training
            for p, flag in flags:
                p.requires_grad_(flag)
            with torch.no_grad():
                for b, version, value in buffers:
                    if b._version != version:
                        b.copy_(value)


def gpus(model: nn.Module) -> list[int]:
    """The GPUs on which a model is, whose random numbers it may draw."""
    return sorted({p.device.index or 0 for p in itertools.chain(model.parameters(), model.buffers()) if p.device.type == "cuda"})


@contextlib.contextmanager
def call_by_call() -> Iterator[None]:
    """Attention calls its layers one by one; its fast path would pass by those that are looked at."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def wide(model: nn.Module, run: Callable[[nn.Module], list[Tensor]]) -> tuple[nn.Module, list[Tensor]]:
    """A copy, in float64 if the model can run so, and what the model gave.

    Raises:
        ValueError: the model cannot run the example.
    """
    try:
        outputs = run(model)
    except Exception as error:
        raise ValueError(f"the model cannot run the example: {error}; give what `forward` takes, by default model(example)") from error
    try:
        double = copy.deepcopy(model).double()
        run(double)
    except Exception:  # a model that makes tensors of its own dtype, or a device without float64
        return copy.deepcopy(model), outputs
    return double, outputs
