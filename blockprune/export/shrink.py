"""Take out the units that masks have emptied: a smaller dense model with the same outputs."""

import contextlib
import copy
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map_only

from blockprune.apply import finalize, read_masks
from blockprune.export.coupling import Coupling, Group, Part, axes, count_heads, depthwise, reads
from blockprune.fold import call_by_call, default_forward, moved, undisturbed, wide
from blockprune.tables import Rows, Table

__all__ = ["Shrunk", "Units", "shrink"]

Forward = Callable[[Callable[..., Any], Any], Any]
TOLERANCE = 1e-5  # of the largest output; checked in float64, where rounding does not count
UNKNOWN = "other units of its layer stay, or one it goes with is unknown to Torch-Pruning"
NOISE = [(scale, sign) for scale in (0.3, 3.0, 30.0, 300.0) for sign in (1, -1)]  # both signs, so that no ReLU sleeps through it


@attrs.frozen
class Units:
    """Units of one side of a layer, by their indices in the model that was given.

    Example:
        >>> bp.export.Units("fc", "outputs", (0, 3), of=8, why="it is an output of the model")
        Units(layer='fc', side='outputs', indices=(0, 3), of=8, why='it is an output of the model')
    """

    layer: str
    side: str  # "outputs" (rows of a Linear, filters) or "inputs" (columns)
    indices: tuple[int, ...]
    of: int
    why: str = ""


@attrs.frozen(eq=False, repr=False)
class Shrunk(Table):
    """A smaller model, what was removed, and what is empty but had to stay; prints as a table.

    Example:
        >>> from blockprune.export import Units
        >>> removed, kept = Units("fc", "inputs", (0, 3), of=4), Units("fc", "outputs", (1,), of=2, why="an output")
        >>> bp.export.Shrunk(nn.Linear(2, 2), (removed,), (kept,))
        layer     side  units  of             what
        fc      inputs      2   4          removed
        fc     outputs      1   2  kept: an output
    """

    model: nn.Module
    removed: tuple[Units, ...]
    kept: tuple[Units, ...]

    def table(self) -> Rows:
        """The cells, the head first."""
        found = [*((units, "removed") for units in self.removed), *((units, f"kept: {units.why}") for units in self.kept)]
        rows = [(units.layer, units.side, str(len(units.indices)), str(units.of), what) for units, what in found]
        return [("layer", "side", "units", "of", "what"), *rows]


def shrink(model: nn.Module, example: Any, *, forward: Forward = default_forward) -> Shrunk:
    """A new, smaller model without the units, filters, channels and heads that the masks have emptied, with the same outputs.

    A unit goes if each layer that reads it does so with empty weights, or finds it constant whatever the input; a constant that is not
    zero moves into the bias of the layer that reads it. What must go together is proposed by Torch-Pruning's graph (extra ``shrink``) and
    then checked: without it the model must give the same on the example, in evaluation mode, to 1e-5 of its largest output. What fails
    stays. Noise in place of what layers compute tells what is constant.

    Args:
        model: a masked model; it stays as it is. Models that keep sizes elsewhere (a Hugging Face ``config``) are not told the new ones.
        example: a batch of several items that the model can run; the result takes any other.
        forward: (model, example) -> output; by default a tensor is passed on, a mapping spread as keywords, of a tuple the first element.

    Raises:
        ImportError: Torch-Pruning is not installed.
        TypeError: a model that is not a module.
        ValueError: a model without masks, an example that the model cannot run or whose output has no tensors.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> mask = bp.BlockMask(torch.arange(8)[:, None] < 6, bp.BlockGrid((8, 4), (1,)))
        >>> found = bp.export.shrink(bp.apply_masks(model, {"0.weight": mask}), torch.randn(3, 4))
        >>> found, found.model[0]
        (layer     side  units  of     what
         0      outputs      2   8  removed
         2       inputs      2   8  removed, Linear(in_features=4, out_features=6, bias=True))
    """
    if importlib.util.find_spec("torch_pruning") is None:
        raise ImportError('shrink follows the graph that Torch-Pruning makes; install it: pip install "blockprune[shrink]"')
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module; give the masked model")
    if not read_masks(model):
        raise ValueError("the model has no masks, so nothing in it is empty; apply_masks first")
    plain = finalize(model)
    gone: dict[Part, frozenset[int]] = {}
    failed: dict[Original, str] = {}
    with undisturbed(plain):
        work, run = _wide(plain, example, forward)
        with torch.no_grad():
            check = partial(_difference, run, run(work))
        while True:  # what went may leave other units unread or constant
            stays, constants = _look(work, run)
            coupling = Coupling(copy.deepcopy(work), run)
            proposed = [group for name, _ in _layers(work) if (group := coupling.group(name, "outputs", stays)[0])]
            groups = {key: group for group in proposed if (key := _original(group.parts, gone)) not in failed}
            work, done = _remove(work, groups, coupling=coupling, constants=constants, check=check, failed=failed)
            if not done:
                break
            for part, indices in itertools.chain.from_iterable(done):
                gone[part] = gone.get(part, frozenset()) | indices
        kept = tuple(_kept(plain, work, coupling=coupling, stays=stays, gone=gone, failed=failed))
    sides = [(name, side) for name, _ in _layers(plain) for side in ("outputs", "inputs")]
    removed = tuple(_units(plain, part, gone[part], "") for part in sides if part in gone)
    return Shrunk(_like(plain, work), removed, kept)


Run = Callable[..., list[Tensor]]
Original = frozenset[tuple[Part, frozenset[int]]]  # a group's parts by the indices of the model that was given


def _wide(plain: nn.Module, example: Any, forward: Forward) -> tuple[nn.Module, Run]:
    """A copy, in float64 if the model can run so, and how to run it."""

    def run(model: nn.Module, change: Callable[[Tensor], Tensor] = torch.clone, seed: int = 0) -> list[Tensor]:
        torch.manual_seed(seed)
        given = tree_map_only(Tensor, change, moved(model, example))
        with call_by_call():
            return [leaf for leaf in tree_leaves(forward(model, given)) if isinstance(leaf, Tensor)]

    with torch.no_grad():
        work, outputs = wide(plain, run)
    if not outputs:
        raise ValueError("the model's output on the example has no tensors to compare; pass a forward= that returns some")
    return work, run


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if reads(m) or depthwise(m) or isinstance(m, nn.Embedding)]


def _empty(layer: nn.Module, side: str) -> Tensor:
    """Which outputs, or inputs, of a layer have zero weights only: ``[units]`` bool."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.detach().movedim(axes(layer)[side == "inputs"], 0).flatten(1).eq(0).all(1)


@torch.no_grad()
def _look(model: nn.Module, run: Run) -> tuple[dict[str, list[str | None]], dict[str, Tensor]]:
    """Why each input of each layer must stay (None: it need not), and the constant that it is, zero where it does not count.

    What is constant is seen when noise takes the place of whatever layers compute, but for their empty outputs, and joins the inputs.
    """
    lowest: dict[str, Tensor] = {}
    highest: dict[str, Tensor] = {}

    def see(layer: nn.Module, args: Any, kwargs: Any, *, name: str) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        low, high = x.movedim(_channels(layer, x), -1).flatten(0, -2).aminmax(dim=0)
        lowest[name] = torch.minimum(low, lowest.get(name, low))
        highest[name] = torch.maximum(high, highest.get(name, high))

    def noise(like: Tensor, scale: float) -> Tensor:
        return scale * (1 + torch.rand_like(like)) * torch.randn_like(like).sign()

    def disturb(layer: nn.Module, _: Any, output: Tensor, *, scale: float) -> Tensor:
        axis = _channels(layer, output)
        empty = _empty(layer, "outputs").view([-1 if at == axis % output.ndim else 1 for at in range(output.ndim)])
        return torch.where(empty, output, noise(output, scale))

    try:
        for scale, sign in NOISE:
            with contextlib.ExitStack() as stack:
                for name, layer in _layers(model):
                    if reads(layer):
                        stack.callback(layer.register_forward_pre_hook(partial(see, name=name), with_kwargs=True).remove)
                    if not depthwise(layer):
                        stack.callback(layer.register_forward_hook(partial(disturb, scale=sign * scale)).remove)
                run(model, lambda x, at=sign * scale: x + noise(x, at) if x.is_floating_point() else x.clone(), seed=int(10 * scale))
    except Exception:  # a model may refuse noise; then only empty weights tell what goes unread
        lowest.clear()
    stays: dict[str, list[str | None]] = {}
    constants: dict[str, Tensor] = {}
    for name, layer in [(name, layer) for name, layer in _layers(model) if reads(layer)]:
        unread = _empty(layer, "inputs")
        low, high = (found.get(name, torch.full_like(unread, torch.nan, dtype=torch.float64)) for found in (lowest, highest))
        constant = (high - low) <= 1e-6 * torch.maximum(low.abs(), high.abs())  # false for NaN
        value = torch.where(constant & ~unread, (low + high) / 2, 0)
        lost = constant & (value != 0) & _pads(layer)
        constants[name] = value
        stays[name] = [
            None if free else f"it is constant, but {name} pads it with zeros" if pads else f"{name} reads it"
            for free, pads in zip((unread | (constant & ~lost)).tolist(), lost.tolist(), strict=True)
        ]
    return stays, constants


def _channels(layer: nn.Module, x: Tensor) -> int:
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1


def _pads(layer: nn.Module) -> bool:
    """Whether some outputs see fewer inputs than others, so that a constant input does not add the same to all."""
    if not isinstance(layer, _ConvNd):
        return False
    padded = layer.padding == "same" if isinstance(layer.padding, str) else any(layer.padding)
    return layer.transposed or (padded and layer.padding_mode == "zeros")


def _remove(
    model: nn.Module,
    groups: dict[Original, Group],
    *,
    coupling: Coupling,
    constants: dict[str, Tensor],
    check: Callable[[nn.Module], str],
    failed: dict[Original, str],
) -> tuple[nn.Module, list[Original]]:
    """The model without all groups that pass the check, and which they are; those that fail are found by halving, and noted."""
    done: list[Original] = []
    best, stack = model, [list(groups)] if groups else []
    while stack:
        some = stack.pop()
        try:
            smaller = _without(model, [groups[key] for key in [*done, *some]], coupling, constants)
            why = check(smaller)
        except Exception as error:  # whatever a model's own code makes of other sizes
            why = f"without it the model cannot run ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        if not why:
            done, best = [*done, *some], smaller
        elif len(some) > 1:
            stack += [some[len(some) // 2 :], some[: len(some) // 2]]
        else:
            failed[some[0]] = why
    return best, done


@torch.no_grad()
def _without(model: nn.Module, groups: list[Group], coupling: Coupling, constants: dict[str, Tensor]) -> nn.Module:
    smaller, parts = copy.deepcopy(model), dict[Part, frozenset[int]]()
    for part, indices in [item for group in groups for item in group.parts.items()]:
        parts[part] = parts.get(part, frozenset()) | indices
    for (name, side), indices in parts.items():
        if side == "inputs" and name in constants:
            _take_in(smaller.get_submodule(name), constants[name], sorted(indices))
    for part, indices in parts.items():
        coupling.cut(smaller, part, indices)
    for group in groups:
        if group.head:
            count_heads(smaller, model, group)
    return smaller


def _take_in(layer: Any, constant: Tensor, indices: list[int]) -> None:
    """Add what a layer makes of its constant inputs to its bias."""
    if (given := constant[indices]).any():
        weight = layer.weight.movedim(axes(layer), (0, 1)).flatten(2).sum(2) if layer.weight.ndim > 2 else layer.weight  # [outputs, inputs]
        shift = weight[:, indices] @ given.to(weight.dtype)
        layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift)


@torch.no_grad()
def _difference(run: Run, want: list[Tensor], model: nn.Module) -> str:
    """How the outputs differ, or nothing."""
    got = run(model)
    if [x.shape for x in got] != [x.shape for x in want]:
        return "without it the outputs have other shapes"
    for x, y in zip(got, want, strict=True):
        x, y = (t.double() if t.is_floating_point() else t for t in (x, y))  # noqa: PLW2901
        off = (x - y).abs().max().item() if x.is_floating_point() and x.numel() else 0.0 if torch.equal(x, y) else torch.inf
        if not off <= TOLERANCE * (y.abs().max().item() if y.is_floating_point() and y.numel() else 0.0):
            return f"without it the outputs change (by {off:.1g})"
    return ""


def _original(parts: Mapping[Part, frozenset[int]], gone: Mapping[Part, frozenset[int]]) -> Original:
    """The same units by their indices before others went."""
    return frozenset((part, frozenset(_before(indices, gone.get(part, frozenset())))) for part, indices in parts.items())


def _before(indices: Iterable[int], gone: frozenset[int]) -> list[int]:
    indices = list(indices)
    left = [i for i in range(max(indices, default=0) + len(gone) + 1) if i not in gone]
    return [left[i] for i in indices]


def _kept(
    plain: nn.Module,
    work: nn.Module,
    *,
    coupling: Coupling,
    stays: dict[str, list[str | None]],
    gone: Mapping[Part, frozenset[int]],
    failed: dict[Original, str],
) -> Iterator[Units]:
    """What is still empty, by the reason why."""
    for name, layer in _layers(work):
        for side in ("outputs", "inputs") if reads(layer) else ("outputs",):
            empty = _empty(layer, side).nonzero().flatten().tolist()
            blocked = coupling.group(name, side, stays)[1] if empty else {}
            found: dict[str, list[int]] = {}
            for i, original in zip(empty, _before(empty, gone.get((name, side), frozenset())), strict=True):
                tried = (why for key, why in failed.items() if any(part == (name, side) and original in units for part, units in key))
                found.setdefault(next(tried, "") or blocked[i], []).append(original)
            yield from (_units(plain, (name, side), indices, why) for why, indices in found.items())


def _units(plain: nn.Module, part: Part, indices: Iterable[int], why: str) -> Units:
    layer = plain.get_submodule(part[0])
    return Units(*part, tuple(sorted(indices)), of=len(_empty(layer, part[1])), why=why)


def _like(plain: nn.Module, work: nn.Module) -> nn.Module:
    """The result in the dtypes, modes and with the flags of the model that was given."""
    tensors = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    for name, tensor in [*work.named_parameters(), *work.named_buffers()]:
        like = tensors.get(name, tensors.get(f"{name.removesuffix('bias')}weight"))  # a bias may be new
        assert like is not None
        tensor.data = tensor.data.to(like.dtype)
        if isinstance(tensor, nn.Parameter):
            tensor.grad = None
            tensor.requires_grad_(like.requires_grad)
    for name, module in plain.named_modules():
        work.get_submodule(name).training = module.training
    return work
