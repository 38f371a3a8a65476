"""Every private or undocumented API that `shrink` uses of Torch-Pruning's dependency graph and of the autograd graph that it follows.

As in `_compat`, each docstring ends with the first version that has the API; "torch 2.0" and "Torch-Pruning 1.5" also stand for earlier
ones.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

__all__ = [
    "PrunedUnit",
    "PruningEdge",
    "PruningNode",
    "channel_count",
    "module_pruner",
    "nodes_by_module",
    "operation_types",
    "saved_dim",
    "saved_query_and_key",
    "saved_sizes",
]


class PrunedUnit(NamedTuple):
    """A unit of some layer and the unit of the first layer that led to it, as its index mappings read them (Torch-Pruning 1.5)."""

    idx: int
    root_idx: int


class PruningNode(Protocol):
    """A layer or an operation in the graph, with the attributes that blockprune reads and writes (Torch-Pruning 1.5)."""

    module: Any
    type: Any  # one of `operation_types`
    grad_fn: Any
    inputs: list[Any]  # the nodes before this one
    outputs: list[Any]
    dependencies: list["PruningEdge"]
    pruning_dim: int  # of a parameter: the axis of its units


class PruningEdge(Protocol):
    """Says that pruning one side of a node prunes one side of another (Torch-Pruning 1.5)."""

    source: Any
    target: Any
    handler: Any  # the function that prunes that side of the target
    index_mapping: list[Any]  # two functions from units of the source to units of the target, or None

    def is_triggered_by(self, pruning_fn: Any) -> bool:
        """Whether this function prunes the side of the source that the edge starts from."""


def operation_types() -> Any:
    """The enumeration of ``PruningNode.type``, which has the model's outputs since then (Torch-Pruning 1.5.3)."""
    import torch_pruning  # noqa: PLC0415 (an extra)

    return torch_pruning.ops.OPTYPE


def nodes_by_module(graph: Any) -> dict[Any, PruningNode]:
    """The nodes of a dependency graph; its public groups do not say why a unit must stay (Torch-Pruning 1.5)."""
    nodes: dict[Any, PruningNode] = graph.module2node
    return nodes


def module_pruner(graph: Any, module: nn.Module) -> Any:
    """The object whose ``prune_out_channels`` and ``prune_in_channels`` remove units of a layer, in place (Torch-Pruning 1.5)."""
    return graph.get_pruner_of_module(module)


def channel_count(graph: Any, node: PruningNode, side: str) -> int:
    """How many "outputs" or "inputs" a node has in the graph, 0 where it does not say (Torch-Pruning 1.5)."""
    return (graph.get_out_channels(node) if side == "outputs" else graph.get_in_channels(node)) or 0


# What autograd saved for the backward of an operation; torch documents that such attributes exist, not their names


def saved_query_and_key(grad_fn: Any) -> tuple[Tensor, Tensor] | None:
    """Query and key of a fused attention, whose shapes tell which heads share a key; None for other operations (torch 2.0)."""
    return (grad_fn._saved_query, grad_fn._saved_key) if hasattr(grad_fn, "_saved_query") else None


def saved_sizes(grad_fn: Any) -> Sequence[int]:
    """The sizes of the input of an expand, slice or reshape, which show heads and their size; () for other operations (torch 2.0)."""
    sizes: Sequence[int] = getattr(grad_fn, "_saved_self_sym_sizes", ())
    return sizes


def saved_dim(grad_fn: Any) -> int:
    """The axis of a concatenation; a negative one is saved as an unsigned 64-bit number (torch 2.0)."""
    return int(grad_fn._saved_dim)
