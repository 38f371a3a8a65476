"""Which units of which layers must go together, by Torch-Pruning's dependency graph, and which cannot go at all."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from blockprune.names import slots

__all__ = ["Coupling", "Group", "Part", "Stays", "axes", "count_heads", "depthwise", "reads"]

Part = tuple[str, str]  # a layer or parameter by name, and "outputs" or "inputs" of it
Stays = Mapping[str, list[str | None]]  # for each input of each layer that reads channels: why it must stay, or None

OUTPUT = "it is an output of the model"
INPUT = "no layer computes it: it is an input of the model"
UNKNOWN = "Torch-Pruning does not see the layer: the example does not reach it, or it is part of a larger one"
_SIZES = ("head_dim", "attention_head_size", "head_size", "dim_head", "d_head")  # what modules call the size of a head,
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")  # their number,
_SHARED = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")  # and that of keys and values


class _Unit(NamedTuple):
    """An index in some layer and the unit of the first layer that led there, under the names that Torch-Pruning's mappings use."""

    idx: int
    root_idx: int


Handler = Callable[..., Any]  # how Torch-Pruning would cut one side of a layer
Reached = dict[tuple[Any, Handler], set[_Unit]]  # by node and side


@attrs.frozen(eq=False)
class Group:
    """Units that go together: indices of each side of each layer; ``head`` is the size of one head, if these are whole heads."""

    parts: Mapping[Part, frozenset[int]]
    owner: str = ""
    head: int = 0


def reads(module: nn.Module) -> bool:
    """Whether a layer multiplies all the channels that it reads with a weight of its own."""
    return isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1)


def depthwise(module: nn.Module) -> bool:
    """Whether a layer is a convolution of each channel by itself."""
    return isinstance(module, _ConvNd) and not module.transposed and 1 < module.groups == module.in_channels == module.out_channels


def axes(module: nn.Module) -> tuple[int, int]:
    """The axes of a layer's weight along which its outputs and its inputs lie."""
    turned = isinstance(module, nn.Embedding) or (isinstance(module, _ConvNd) and module.transposed)
    return (1, 0) if turned else (0, 1)


class Coupling:
    """The dependency graph of a model, traced on one example.

    Torch-Pruning follows the gradients' graph and takes an operation that it does not know for one that treats each channel alone, so
    a group it names is a proposal: softmax or a root mean square over the channels, say, go unseen here. What is cut must be checked.
    """

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], Iterable[Tensor]]) -> None:
        import torch_pruning  # noqa: PLC0415 (an extra)

        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            self._graph = torch_pruning.DependencyGraph().build_dependency(
                model, None, lambda traced, _: [out for out in run(traced) if out.grad_fn is not None], verbose=False
            )
        self._op = torch_pruning.ops.OPTYPE
        self._nodes: dict[Any, Any] = self._graph.module2node
        self._modules = dict(model.named_modules())
        self._names: dict[Any, str] = {module: name for name, module in self._modules.items()} | {p: n for n, p in model.named_parameters()}
        self._tied = {slot.owner for shared in slots(model).values() if len(shared) > 1 for slot in shared}
        for node in self._nodes.values():
            _share_heads(node)
            _join_halves(node)

    def group(self, name: str, side: str, stays: Stays) -> tuple[Group | None, dict[int, str]]:
        """The units of one side of a layer that may go, with all that goes with them; and why each of the others stays."""
        node = self._nodes.get(self._modules[name])
        if node is None:
            return None, defaultdict(lambda: UNKNOWN)
        width, first = self._width(node, side), (node, self._handler(node, side))
        reached, blocked = self._reach(first, width, stays)
        if side == "inputs":  # only why they stay is asked: because of what computes them
            makers = [(at, units) for (at, how), units in reached.items() if reads(at.module) and self._side(at, how) == "outputs"]
            for at, units in makers:
                others = self.group(self._names[at.module], "outputs", stays)[1]
                blocked = {unit.root_idx: others[unit.idx] for unit in units if unit.idx in others} | blocked
            made = {unit.root_idx for _, units in makers for unit in units}
            return None, {i: INPUT for i in range(width) if i not in made} | blocked
        read = {unit.root_idx for (at, how), units in reached.items() if self._side(at, how) == "inputs" for unit in units}
        blocked = {i: OUTPUT for i in range(width) if i not in read} | blocked
        head, block = self._heads(node, width, reached)
        for start in range(0, width, block):
            unit = range(start, min(start + block, width))
            if any(i in blocked for i in unit):
                for i in unit:
                    blocked.setdefault(i, "heads go whole or not at all")
        layers = {(at, how): units for (at, how), units in reached.items() if at.module in self._names}

        def gone(units: Iterable[_Unit]) -> frozenset[int]:
            return frozenset(unit.idx for unit in units if unit.root_idx not in blocked)

        if any(len(gone(units)) >= self._width(at, self._side(at, how)) for (at, how), units in layers.items()):
            blocked |= dict.fromkeys([i for i in range(width) if i not in blocked][:block], "a layer keeps at least one")
        for other in reached[first]:  # in a layer of two halves one unit takes another along
            if other.idx in blocked:
                blocked.setdefault(other.root_idx, blocked[other.idx])
        parts = {(self._names[at.module], self._side(at, how)): gone(units) for (at, how), units in layers.items() if gone(units)}
        return (Group(parts, name.rpartition(".")[0], head) if parts else None), blocked

    def cut(self, model: nn.Module, part: Part, indices: Iterable[int]) -> None:
        """Take units out of one layer of a model, which is a copy of the traced one; in place."""
        owner, _, attr = part[0].rpartition(".")
        at = model.get_submodule(owner)
        target = getattr(at, attr) if attr else model
        if isinstance(target, nn.Parameter):
            axis = self._nodes[dict(self._graph.model.named_parameters())[part[0]]].pruning_dim
            keep = torch.tensor([i for i in range(target.shape[axis]) if i not in set(indices)], device=target.device)
            setattr(at, attr, nn.Parameter(target.detach().index_select(axis, keep)))
            return
        pruner = self._graph.get_pruner_of_module(target)
        (pruner.prune_out_channels if part[1] == "outputs" else pruner.prune_in_channels)(target, sorted(indices))

    def _reach(self, first: tuple[Any, Handler], width: int, stays: Stays) -> tuple[Reached, dict[int, str]]:
        """Every unit that each of these takes along, until one is met that must stay."""
        reached: Reached = {first: set()}
        blocked: dict[int, str] = {}
        stack: list[tuple[Any, Handler, Sequence[_Unit]]] = [(*first, [_Unit(i, i) for i in range(width)])]
        while stack:
            node, handler, units = stack.pop()
            seen = reached.setdefault((node, handler), set())
            new = [unit for unit in units if unit.root_idx not in blocked and unit not in seen]
            each = self._obstacles(node, self._side(node, handler), stays)
            for unit in new:
                if each is not None and (
                    why := each[unit.idx] if unit.idx < len(each) else f"Torch-Pruning's graph does not fit {self._names[node.module]}"
                ):
                    blocked.setdefault(unit.root_idx, why)
            if new := [unit for unit in new if unit.root_idx not in blocked]:
                seen.update(new)
                for edge in node.dependencies:
                    if edge.is_triggered_by(handler):
                        mapped: Sequence[_Unit] = new
                        for mapping in edge.index_mapping:
                            mapped = mapped if mapping is None else mapping(mapped)
                        stack.append((edge.target, edge.handler, mapped))
        return reached, blocked

    def _obstacles(self, node: Any, side: str, stays: Stays) -> Sequence[str | None] | None:
        """Why each channel of a layer must stay, or None if it may go; None for all channels of an operation."""
        module, name, width, why = node.module, self._names.get(node.module, ""), self._width(node, side), None
        if node.type == self._op.OUTPUT:
            return [OUTPUT] * width
        if node.module not in self._names:
            return None
        if node.type in (self._op.LN, self._op.GN):
            why = f"{name} ({type(module).__name__}) normalises over all channels"
        elif node.type in (self._op.MHA, self._op.LSTM) or (isinstance(module, _ConvNd) and not (reads(module) or depthwise(module))):
            why = f"{name} ({type(module).__name__}) cannot lose single channels"
        elif module in self._tied or (isinstance(module, nn.Module) and parametrize.is_parametrized(module)):
            why = f"the weight of {name} is tied to another or computed"
        return stays[name] if why is None and reads(module) and side == "inputs" else [why] * width

    def _handler(self, node: Any, side: str) -> Handler:
        pruner = self._graph.get_pruner_of_module(node.module)
        handler: Handler = pruner.prune_out_channels if side == "outputs" else pruner.prune_in_channels
        return handler

    def _side(self, node: Any, handler: Handler) -> str:
        return "outputs" if handler == self._graph.get_pruner_of_module(node.module).prune_out_channels else "inputs"

    def _width(self, node: Any, side: str) -> int:
        return (self._graph.get_out_channels(node) if side == "outputs" else self._graph.get_in_channels(node)) or 0

    def _heads(self, node: Any, width: int, reached: Reached) -> tuple[int, int]:
        """The size of a head if these units are heads (0 if not), and how many neighbours must go together: those of a key's queries."""
        mixing = [at for at, _ in reached if at.type == self._op.ELEMENTWISE and _mixes(at.grad_fn)]
        if not mixing:
            return 0, 1
        widths = [self._width(at, "outputs") for at, how in reached if reads(at.module) and self._side(at, how) == "outputs"]
        owner = vars(self._modules[self._names[node.module].rpartition(".")[0]])
        known = {name: value for name, value in owner.items() if type(value) is int and value > 0}
        sizes = [known[name] for name in _SIZES if name in known]
        sizes += [at.grad_fn._saved_query.shape[-1] for at in mixing if hasattr(at.grad_fn, "_saved_query")]
        sizes += [max(widths) // known[name] for name in _HEADS if name in known]
        size = next((size for size in sizes if size and width % size == 0), 0)
        return (size, size * max(1, width // min(widths))) if size else (0, 1)


def count_heads(smaller: nn.Module, model: nn.Module, group: Group) -> None:
    """Where the module that owned removed heads keeps count of them, write how many a smaller copy of the model has; in place."""
    owner, new = model.get_submodule(group.owner), smaller.get_submodule(group.owner)
    for name in [name for name, side in group.parts if side == "outputs"]:
        before, after = model.get_submodule(name), smaller.get_submodule(name)
        if isinstance(before, nn.Linear) and isinstance(after, nn.Linear):
            for attr in [attr for attr in (*_HEADS, *_SHARED) if vars(owner).get(attr) == before.out_features // group.head]:
                setattr(new, attr, after.out_features // group.head)


def _mixes(grad_fn: Any) -> bool:
    """Whether this is a product of activations with activations, as in attention."""
    return any(word in grad_fn.name() for word in ("ScaledDotProduct", "Bmm"))


def _share_heads(node: Any) -> None:
    """Where several query heads share a head of keys and values, say which belong together; Torch-Pruning follows only some spellings."""
    shared, size, sources = 1, 0, node.inputs
    if _is(node, "ScaledDotProduct") and hasattr(node.grad_fn, "_saved_query"):  # enable_gqa
        queries, keys = node.grad_fn._saved_query.shape, node.grad_fn._saved_key.shape
        shared, size, sources = queries[1] // keys[1], queries[3], node.inputs[1:3]
    elif _is(node, "Expand") and len(node.grad_fn._saved_self_sym_sizes) == 5:  # [batch, heads, 1, tokens, size], then a reshape
        for after in [after for out in node.outputs for after in (out, *out.outputs)]:
            sizes: Sequence[int] = getattr(after.grad_fn, "_saved_self_sym_sizes", ())
            if len(sizes) == 5:
                shared, size = sizes[2], sizes[4]
    if shared > 1:
        for source in sources:
            for start, end, mapping in ((node, source, _to_shared), (source, node, _to_sharing)):
                for edge in start.dependencies:
                    if edge.target is end:
                        edge.index_mapping[0] = partial(mapping, shared=shared, size=size)


def _join_halves(node: Any) -> None:
    """Rotary embeddings put the halves of each head in another order, which Torch-Pruning takes for a concatenation of channels."""
    sources = [source.inputs[0] if "Neg" in source.grad_fn.name() else source for source in node.inputs] if _is(node, "Cat") else []
    saved = [getattr(source.grad_fn, "_saved_self_sym_sizes", ()) for source in sources if _is(source, "Slice")]
    if saved and len(saved) == len(sources) and all(len(sizes) == 4 for sizes in saved) and node.grad_fn._saved_dim in (3, 2**64 - 1):
        for start in [node, *node.inputs, *node.outputs]:
            for edge in start.dependencies:
                if node in (edge.source, edge.target):
                    edge.index_mapping[:] = [None, None]


def _is(node: Any, operation: str) -> bool:
    return hasattr(node.grad_fn, "name") and node.grad_fn.name().startswith(operation)


def _to_shared(units: Iterable[_Unit], *, shared: int, size: int) -> list[_Unit]:
    return [_Unit(unit.idx // (shared * size) * size + unit.idx % size, unit.root_idx) for unit in units]


def _to_sharing(units: Iterable[_Unit], *, shared: int, size: int) -> list[_Unit]:
    return [_Unit((unit.idx // size * shared + i) * size + unit.idx % size, unit.root_idx) for unit in units for i in range(shared)]
