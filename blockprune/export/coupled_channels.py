"""Which channels of which layers must be removed together, by Torch-Pruning's dependency graph, and which cannot be removed at all."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockprune.core._compat import ConvNd
from blockprune.core._compat_pruning import (
    PrunedUnit,
    PruningNode,
    channel_count,
    module_pruner,
    nodes_by_module,
    operation_types,
    saved_dim,
    saved_query_and_key,
    saved_sizes,
)
from blockprune.model.parameters import parameter_refs

LayerSide = tuple[str, str]  # the name of a layer or parameter, and "outputs" or "inputs"
InputReasons = Mapping[str, list[str | None]]  # by layer: why each of its input channels must stay, or None if it need not

OUTPUT = "it is an output of the model"
INPUT = "no layer computes it: it is an input of the model"
UNKNOWN = "Torch-Pruning does not see the layer: the example does not reach it, or it is part of a larger one"
# attributes in which modules and configurations keep the size of a head,
HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "dim_head", "d_head", "d_kv", "key_value_proj_dim")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")  # the number of heads,
HEAD_WIDTHS = ("attn_dim", "all_head_size", "inner_dim")  # the width of all heads,
KEY_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")  # and the number of key and value heads

Handler = Callable[..., Any]  # Torch-Pruning's method that prunes one side of a layer; it identifies the side
Reached = dict[tuple[PruningNode, Handler], set[PrunedUnit]]  # the coupled channels of each side of each node of the graph


@attrs.frozen(eq=False)
class ChannelGroup:
    """Channels that can only be removed together.

    Args:
        channels: the indices on each side of each layer.
        owner: the module that contains the first layer.
        head_size: channels per attention head if these are whole heads, otherwise 0.
    """

    channels: Mapping[LayerSide, frozenset[int]]
    owner: str = ""
    head_size: int = 0


def first_line(error: Exception) -> str:
    """The type and the first line of an error, for a reason in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def mixes_channels(module: nn.Module) -> bool:
    """Whether every output of a layer is a weighted sum of all its input channels."""
    return isinstance(module, nn.Linear) or (isinstance(module, ConvNd) and module.groups == 1)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a layer is a convolution of each channel by itself."""
    return isinstance(module, ConvNd) and not module.transposed and 1 < module.groups == module.in_channels == module.out_channels


def channel_axes(module: nn.Module) -> tuple[int, int]:
    """The axes of a layer's weight that index its outputs and its inputs."""
    inputs_first = isinstance(module, nn.Embedding) or (isinstance(module, ConvNd) and module.transposed)
    return (1, 0) if inputs_first else (0, 1)


class CouplingGraph:
    """The dependency graph of a model, traced on one example.

    Torch-Pruning follows autograd's graph and assumes that an operation it does not recognize treats each channel by itself. A group is
    therefore a proposal: a softmax or a root mean square over the channels, for example, is not recognized. The result of a removal must be
    checked.

    Args:
        model: to trace; its parameters get gradients, so give a copy.
        run: model -> the output tensors on the example.
        unused_reasons: why the units of a side of a layer must stay, because something may read them that the example does not use.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[nn.Module], Iterable[Tensor]], unused_reasons: Mapping[LayerSide, str] | None = None
    ) -> None:
        self._modules, self._unused_reasons = dict(model.named_modules()), unused_reasons or {}
        self._nodes: dict[Any, PruningNode] = {}
        self._failure = ""
        try:
            self._build(model, run)
        except Exception as error:  # Torch-Pruning supports some operations only, and raises anything at others
            self._nodes, self._failure = {}, f"Torch-Pruning's graph cannot follow the model ({first_line(error)})"

    def _build(self, model: nn.Module, run: Callable[[nn.Module], Iterable[Tensor]]) -> None:
        import torch_pruning  # noqa: PLC0415 (an extra)

        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            self._graph = torch_pruning.DependencyGraph().build_dependency(
                model, None, lambda traced, _: [out for out in run(traced) if out.grad_fn is not None], verbose=False
            )
        self._op = operation_types()
        self._nodes = nodes_by_module(self._graph)
        self._names: dict[Any, str] = {module: name for name, module in self._modules.items()} | {p: n for n, p in model.named_parameters()}
        self._tied = {ref.owner for shared in parameter_refs(model).values() if len(shared) > 1 for ref in shared}
        for node in self._nodes.values():
            _couple_shared_heads(node)
            _ignore_rotated_halves(node)

    def group(self, name: str, side: str, input_reasons: InputReasons) -> tuple[ChannelGroup | None, dict[int, str]]:
        """The channels of one side of a layer that can be removed, with all channels coupled with them; and why each of the rest stays.

        The group is None for the side "inputs", of which only the reasons are computed, and if no channel can be removed.
        """
        node = self._nodes.get(self._modules[name])
        if node is None:
            return None, defaultdict(lambda: self._failure or UNKNOWN)
        try:
            return self._group(node, name, side, input_reasons)
        except Exception as error:
            failure = f"Torch-Pruning's graph cannot follow it from {name} ({first_line(error)})"
            return None, defaultdict(lambda: failure)

    def _group(self, node: PruningNode, name: str, side: str, input_reasons: InputReasons) -> tuple[ChannelGroup | None, dict[int, str]]:
        width, start = self._width(node, side), (node, self._handler(node, side))
        reached, reasons = self._propagate(start, width, input_reasons)
        if side == "inputs":
            return None, self._reasons_of_inputs(width, reached, reasons, input_reasons)
        consumed = {c.root_idx for (n, handler), channels in reached.items() if self._side(n, handler) == "inputs" for c in channels}
        reasons = {i: OUTPUT for i in range(width) if i not in consumed} | reasons
        head_size, head_group = self._head_sizes(node, width, reached)
        _keep_whole_heads(reasons, width, head_group)
        layers = {(n, handler): channels for (n, handler), channels in reached.items() if n.module in self._names}
        if any(len(_removable(channels, reasons)) >= self._width(n, self._side(n, handler)) for (n, handler), channels in layers.items()):
            removable = [i for i in range(width) if i not in reasons]
            reasons |= dict.fromkeys(removable[:head_group], "a layer keeps at least one channel")
        for channel in reached[start]:  # in a gated layer of two halves, removing a channel removes a channel of the other half, too
            if channel.idx in reasons:
                reasons.setdefault(channel.root_idx, reasons[channel.idx])
        removed = {
            (self._names[n.module], self._side(n, handler)): indices
            for (n, handler), channels in layers.items()
            if (indices := _removable(channels, reasons))
        }
        return (ChannelGroup(removed, name.rpartition(".")[0], head_size) if removed else None), reasons

    def remove(self, model: nn.Module, layer_side: LayerSide, indices: Iterable[int]) -> None:
        """Remove channels from one layer of a copy of the traced model, in place."""
        owner_name, _, attr = layer_side[0].rpartition(".")
        owner = model.get_submodule(owner_name)
        target = getattr(owner, attr) if attr else model
        if isinstance(target, nn.Parameter):
            axis = self._nodes[dict(self._graph.model.named_parameters())[layer_side[0]]].pruning_dim
            keep = torch.tensor([i for i in range(target.shape[axis]) if i not in set(indices)], device=target.device)
            setattr(owner, attr, nn.Parameter(target.detach().index_select(axis, keep)))
            return
        pruner = module_pruner(self._graph, target)
        (pruner.prune_out_channels if layer_side[1] == "outputs" else pruner.prune_in_channels)(target, sorted(indices))

    def _propagate(self, start: tuple[PruningNode, Handler], width: int, input_reasons: InputReasons) -> tuple[Reached, dict[int, str]]:
        """Every channel that is coupled with a channel of the first layer, and why some of these must stay."""
        reached: Reached = {start: set()}
        reasons: dict[int, str] = {}
        stack: list[tuple[Any, Handler, Sequence[PrunedUnit]]] = [(*start, [PrunedUnit(i, i) for i in range(width)])]
        while stack:
            node, handler, channels = stack.pop()
            before = reached.setdefault((node, handler), set())
            new = [c for c in channels if c.root_idx not in reasons and c not in before]
            node_reasons = self._node_reasons(node, self._side(node, handler), input_reasons)
            for channel in new if node_reasons else ():
                if channel.idx >= len(node_reasons):
                    reasons.setdefault(channel.root_idx, f"Torch-Pruning's graph does not fit {self._names[node.module]}")
                elif reason := node_reasons[channel.idx]:
                    reasons.setdefault(channel.root_idx, reason)
            new = [c for c in new if c.root_idx not in reasons]
            if not new:
                continue
            before.update(new)
            for edge in node.dependencies:
                if edge.is_triggered_by(handler):
                    mapped: Sequence[PrunedUnit] = new
                    for mapping in edge.index_mapping:
                        mapped = mapped if mapping is None else mapping(mapped)
                    stack.append((edge.target, edge.handler, mapped))
        return reached, reasons

    def _node_reasons(self, node: PruningNode, side: str, input_reasons: InputReasons) -> Sequence[str | None]:
        """Why each channel of a node must stay, or None if it need not; empty for an operation, because of which no channel stays."""
        module, name, width = node.module, self._names.get(node.module, ""), self._width(node, side)
        if node.type != self._op.OUTPUT and node.module not in self._names:
            return []
        grouped = isinstance(module, ConvNd) and not (mixes_channels(module) or is_depthwise(module))
        reason = self._unused_reasons.get((name, side))
        if node.type == self._op.OUTPUT:
            reason = OUTPUT
        elif node.type in (self._op.LN, self._op.GN):
            reason = f"{name} ({type(module).__name__}) normalises over all channels"
        elif grouped or node.type in (self._op.MHA, self._op.LSTM):
            reason = f"{name} ({type(module).__name__}) cannot lose single channels"
        elif module in self._tied or (isinstance(module, nn.Module) and parametrize.is_parametrized(module)):
            reason = f"the weight of {name} is tied to another or computed"
        elif reason is None and mixes_channels(module) and side == "inputs":
            return input_reasons[name]
        return [reason] * width

    def _reasons_of_inputs(self, width: int, reached: Reached, reasons: dict[int, str], input_reasons: InputReasons) -> dict[int, str]:
        """Why the inputs of a layer stay: the reasons of the layers that compute them."""
        producers = [
            (n, channels) for (n, handler), channels in reached.items() if mixes_channels(n.module) and self._side(n, handler) == "outputs"
        ]
        for node, channels in producers:
            producer_reasons = self._group(node, self._names[node.module], "outputs", input_reasons)[1]
            reasons = {c.root_idx: producer_reasons[c.idx] for c in channels if c.idx in producer_reasons} | reasons
        produced = {c.root_idx for _, channels in producers for c in channels}
        return {i: INPUT for i in range(width) if i not in produced} | reasons

    def _head_sizes(self, node: PruningNode, width: int, reached: Reached) -> tuple[int, int]:
        """The channels of a head, and of all query heads that share a key, if these channels are attention heads; otherwise 0 and 1."""
        products = [n for n, _ in reached if n.type == self._op.ELEMENTWISE and _is_attention_product(n.grad_fn)]
        if not products:
            return 0, 1
        widths = [self._width(n, "outputs") for n, handler in reached if mixes_channels(n.module) and self._side(n, handler) == "outputs"]
        owner = vars(self._modules[self._names[node.module].rpartition(".")[0]])
        numbers = {name: value for name, value in owner.items() if type(value) is int and value > 0}
        sizes = [numbers[name] for name in HEAD_SIZES if name in numbers]
        sizes += [saved[0].shape[-1] for n in products if (saved := saved_query_and_key(n.grad_fn))]
        sizes += [max(widths) // numbers[name] for name in HEAD_COUNTS if name in numbers]
        size = next((size for size in sizes if size and width % size == 0), 0)
        return (size, size * max(1, width // min(widths))) if size else (0, 1)

    def _handler(self, node: PruningNode, side: str) -> Handler:
        pruner = module_pruner(self._graph, node.module)
        handler: Handler = pruner.prune_out_channels if side == "outputs" else pruner.prune_in_channels
        return handler

    def _side(self, node: PruningNode, handler: Handler) -> str:
        return "outputs" if handler == module_pruner(self._graph, node.module).prune_out_channels else "inputs"

    def _width(self, node: PruningNode, side: str) -> int:
        return channel_count(self._graph, node, side)


def update_head_counts(smaller: nn.Module, model: nn.Module, group: ChannelGroup) -> None:
    """Set the attributes that count attention heads in a smaller copy of a model, from which whole heads were removed; in place."""
    owner, smaller_owner = model.get_submodule(group.owner), smaller.get_submodule(group.owner)
    for name, side in group.channels:  # what reads the heads shows their number also where one layer computes queries, keys and values
        before, after = model.get_submodule(name), smaller.get_submodule(name)
        if isinstance(before, nn.Linear) and isinstance(after, nn.Linear):
            width, new = (m.out_features if side == "outputs" else m.in_features for m in (before, after))
            units = dict.fromkeys((*HEAD_COUNTS, *KEY_HEAD_COUNTS), group.head_size) | dict.fromkeys(HEAD_WIDTHS, 1)
            for attr, unit in units.items():
                if vars(owner).get(attr) == width // unit:
                    setattr(smaller_owner, attr, new // unit)


def _removable(channels: Iterable[PrunedUnit], reasons: Mapping[int, str]) -> frozenset[int]:
    return frozenset(c.idx for c in channels if c.root_idx not in reasons)


def _keep_whole_heads(reasons: dict[int, str], width: int, head_group: int) -> None:
    """Add a reason for all channels of each head of which some channel stays."""
    for start in range(0, width, head_group):
        head = range(start, min(start + head_group, width))
        if any(i in reasons for i in head):
            for i in head:
                reasons.setdefault(i, "a head is removed as a whole or not at all")


def _is_attention_product(grad_fn: Any) -> bool:
    """Whether this is a product of activations with activations, as in attention."""
    return any(operation in grad_fn.name() for operation in ("ScaledDotProduct", "Bmm"))


def _couple_shared_heads(node: PruningNode) -> None:
    """Where several query heads share a head of keys and values, couple them; Torch-Pruning recognizes only some implementations."""
    queries_per_key, size, sources = 1, 0, node.inputs
    if _is_operation(node, "ScaledDotProduct") and (saved := saved_query_and_key(node.grad_fn)):  # enable_gqa
        queries, keys = saved[0].shape, saved[1].shape
        queries_per_key, size, sources = queries[1] // keys[1], queries[3], node.inputs[1:3]
    elif _is_operation(node, "Expand") and len(saved_sizes(node.grad_fn)) == 5:  # [batch, heads, 1, tokens, size], then a reshape
        for following in [n for out in node.outputs for n in (out, *out.outputs)]:
            sizes = saved_sizes(following.grad_fn)
            if len(sizes) == 5:
                queries_per_key, size = sizes[2], sizes[4]
    if queries_per_key > 1:
        for source in sources:
            for start, end, mapping in ((node, source, _queries_to_keys), (source, node, _keys_to_queries)):
                for edge in start.dependencies:
                    if edge.target is end:
                        edge.index_mapping[0] = partial(mapping, queries_per_key=queries_per_key, size=size)


def _ignore_rotated_halves(node: PruningNode) -> None:
    """Rotary embeddings exchange the halves of each head. Torch-Pruning takes that for a concatenation of channels; map them one to one."""
    sources = (
        [source.inputs[0] if "Neg" in source.grad_fn.name() else source for source in node.inputs] if _is_operation(node, "Cat") else []
    )
    saved = [saved_sizes(source.grad_fn) for source in sources if _is_operation(source, "Slice")]
    if saved and len(saved) == len(sources) and all(len(sizes) == 4 for sizes in saved) and saved_dim(node.grad_fn) in (3, 2**64 - 1):
        for start in [node, *node.inputs, *node.outputs]:
            for edge in start.dependencies:
                if node in (edge.source, edge.target):
                    edge.index_mapping[:] = [None, None]


def _is_operation(node: PruningNode, operation: str) -> bool:
    return hasattr(node.grad_fn, "name") and node.grad_fn.name().startswith(operation)


def _queries_to_keys(channels: Iterable[PrunedUnit], *, queries_per_key: int, size: int) -> list[PrunedUnit]:
    return [PrunedUnit(c.idx // (queries_per_key * size) * size + c.idx % size, c.root_idx) for c in channels]


def _keys_to_queries(channels: Iterable[PrunedUnit], *, queries_per_key: int, size: int) -> list[PrunedUnit]:
    return [
        PrunedUnit((c.idx // size * queries_per_key + i) * size + c.idx % size, c.root_idx)
        for c in channels
        for i in range(queries_per_key)
    ]
