"""Every private or undocumented API of torch, transformers, accelerate and Torch-Pruning that blockprune uses.

A new version of these libraries may change any of them without notice. tests/core/test_compat.py has a test for each, which says what
blockprune loses with it, and a test that no other module uses such a name. Each docstring ends with the first version that has the API;
"torch 2.0" and "Torch-Pruning 1.5" also stand for earlier ones.

A class can override a private method of torch only in its own body, so these stay where they are:

* ``nn.Module._apply``: model/parametrization.py, export/sparse_layers.py, export/semi_structured.py
* ``nn.Module._load_from_state_dict``: model/apply.py, export/sparse_layers.py

This module imports nothing of blockprune, so that every other module can import it.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

try:
    # the base classes tell whether a layer is a convolution or a normalisation, users' subclasses included (torch 2.0)
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.nn.modules.conv import _ConvNd as ConvNd
    from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd

    # batches and outputs are nested containers, which no public function of torch maps over (torch 2.2)
    from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
except ImportError as error:
    raise ImportError(f"torch {torch.__version__}: {error}; blockprune imports it in blockprune/core/_compat.py") from error

__all__ = [
    "CACHE_ARGUMENTS",
    "EXPERT_ATTRIBUTES",
    "FAST_PATH_MODULES",
    "RNN_CACHES",
    "BatchNorm",
    "ConvNd",
    "ConvTransposeNd",
    "NormBase",
    "PrunedUnit",
    "PruningEdge",
    "PruningNode",
    "apply_expert_gate",
    "channel_count",
    "compress_two_of_four",
    "conv1d_outputs",
    "conv_padding",
    "data_address",
    "dispatch_mode_is_active",
    "experts_are_concatenated",
    "experts_are_gated",
    "experts_are_transposed",
    "forward_ad_is_active",
    "functorch_is_active",
    "gomp_parallel",
    "has_hooks",
    "has_one_original",
    "has_packed_linear",
    "is_compiled_wrapper",
    "is_copy_on_write",
    "is_functorch_tensor",
    "is_legacy_batched",
    "is_offloaded",
    "is_tracing",
    "is_zero_tensor",
    "lazy_clone",
    "module_pruner",
    "nodes_by_module",
    "operation_types",
    "originals",
    "pack_linear_weight",
    "packed_linear",
    "packs_bfloat16",
    "parameter_names",
    "rebuild_rnn_caches",
    "saved_dim",
    "saved_query_and_key",
    "saved_sizes",
    "search_two_of_four",
    "shared_memory_bytes",
    "storage_id",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "two_of_four_product",
    "use_eager_experts",
    "version_counter",
]

_C: Any = torch._C


# Tensors and their memory


def lazy_clone(x: Tensor) -> Tensor:
    """A clone that copies only when either side is written: scoring a model then copies no weight (torch 2.3)."""
    return torch._lazy_clone(x)


def is_copy_on_write(x: Tensor) -> bool:
    """Whether ``data_ptr`` would copy the tensor because `lazy_clone` shares its memory (torch 2.3)."""
    return bool(_C._is_cow_tensor(x))


def data_address(x: Tensor) -> int:
    """Where the storage of a tensor begins, without the copy that ``data_ptr`` makes of a lazy clone (torch 2.3)."""
    return int(_C._data_address(x))


def storage_id(x: Tensor) -> int:
    """A number that views of one memory share; comparing ``data_ptr`` would copy a lazy clone (torch 2.0)."""
    return int(x.untyped_storage()._cdata)


def version_counter(x: Tensor) -> int:
    """How often a tensor was written in place, which tells whether its values are still the same (torch 2.0)."""
    return x._version


def is_zero_tensor(x: Tensor) -> bool:
    """Whether a tensor stands for zeros without having them in memory, as gradients may; compiled code cannot read it (torch 2.0)."""
    return torch._is_zerotensor(x)


# Transforms that replace or record operations: compiled code and custom operators would escape them


def is_functorch_tensor(x: Tensor) -> bool:
    """Whether `torch.func` wraps a tensor, which then has no memory of its own (torch 2.0)."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def functorch_is_active() -> bool:
    """Whether a transform of `torch.func` is running (torch 2.0)."""
    return bool(_C._are_functorch_transforms_active())


def is_legacy_batched(x: Tensor) -> bool:
    """Whether ``torch.autograd.grad(is_grads_batched=True)`` wraps a tensor; it supports fewer operations than vmap (torch 2.4)."""
    return torch._C._functorch.is_legacy_batchedtensor(x)


def forward_ad_is_active() -> bool:
    """Whether forward-mode differentiation is running (torch 2.0)."""
    return forward_ad._current_level >= 0


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` is recording operations; ``torch.jit.is_tracing`` is not documented either (torch 2.0)."""
    return bool(_C._is_tracing())


def dispatch_mode_is_active() -> bool:
    """Whether a TorchDispatchMode sees all operations, as tracers and counters of operations do (torch 2.0)."""
    return bool(_C._len_torch_dispatch_stack() > 0)


# Modules

FAST_PATH_MODULES = ("torch.nn.modules.transformer", "torch.nn.modules.activation")  # their layers read children's weights (torch 2.0)
RNN_CACHES = ("_flat_weights", "_flat_weight_refs")  # an RNN's lists of its weights; masked weights cannot be copied (torch 2.0)


def rebuild_rnn_caches(rnn: nn.RNNBase) -> None:
    """Make an RNN's `RNN_CACHES` from its present weights (torch 2.0)."""
    rnn._init_flat_weights()


def conv_padding(conv: ConvNd) -> list[int]:
    """A convolution's padding in the order of ``F.pad``, also for padding="same" (torch 2.0)."""
    return list(conv._reversed_padding_repeated_twice)


def parameter_names(module: nn.Module) -> list[str]:
    """The names of a module's own parameters in order, with those that are None, which ``named_parameters`` leaves out (torch 2.0)."""
    return list(module._parameters)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is hooked to a module's call; torch can add and remove hooks, but not list them (torch 2.0)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether ``torch.compile`` returned the module, which then calls another one and names its parameters differently (torch 2.0)."""
    return hasattr(module, "_orig_mod")


def has_one_original(parametrizations: parametrize.ParametrizationList) -> bool:
    """Whether a parametrized parameter is computed from one tensor, ``original``, not from several (torch 2.0)."""
    return parametrizations.is_tensor


def originals(parametrizations: parametrize.ParametrizationList) -> list[Tensor]:
    """All tensors from which a parametrized parameter is computed; their number is not documented (torch 2.0)."""
    if parametrizations.is_tensor:
        return [parametrizations.original]
    return [getattr(parametrizations, f"original{i}") for i in range(parametrizations.ntensors)]


# Kernels


def has_packed_linear() -> bool:
    """Whether this torch can multiply with weights in oneDNN's own layout, the fastest dense product on a CPU (torch 2.0)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def packs_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor (torch 2.1)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linear_weight(weight: Tensor, rows: int) -> Tensor:
    """A weight in oneDNN's layout for inputs of so many rows; no public function packs one (torch 2.1)."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def packed_linear(x: Tensor, packed_weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` with a weight from `pack_linear_weight` (torch 2.0)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed_weight, bias, "none", [], "")
    return product


def compress_two_of_four(weight: Tensor) -> Tensor:
    """A 2:4 weight on a GPU in cuSPARSELt's layout; the public tensor subclass cannot choose an algorithm (torch 2.1)."""
    return torch._cslt_compress(weight)


def search_two_of_four(compressed: Tensor, x: Tensor) -> int:
    """The number of cuSPARSELt's fastest algorithm for `two_of_four_product` of inputs like these (torch 2.11)."""
    return int(_C._cusparselt.mm_search(compressed, x, None, None, None, True)[0])


def two_of_four_product(compressed: Tensor, x: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
    """``(W x)^T + bias`` for ``x [columns, n]`` and ``W [rows, columns]`` from `compress_two_of_four`: ``[n, rows]`` (torch 2.1)."""
    return torch._cslt_sparse_mm(compressed, x, bias, alg_id=algorithm, transpose_result=True)


def gomp_parallel() -> int | None:
    """The address of torch's own OpenMP entry, so that blockprune's loops share torch's threads; None without one (torch 2.0 on Linux)."""
    try:
        torch_cpu = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (StopIteration, OSError, AttributeError):
        return None


def shared_memory_bytes(device: torch.device) -> int:
    """The shared memory that one block of GPU threads may use, for choosing how far a kernel loads ahead (torch 2.5)."""
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 << 10))


# transformers

CACHE_ARGUMENTS = ("past_key_value", "layer_past", "cache_params")  # beginnings of arguments that a layer adds to (transformers 4.57)
EXPERT_ATTRIBUTES = ("_apply_gate", "has_gate", "has_bias", "is_transposed", "is_concatenated")  # of stacked experts (transformers 5.7)


def conv1d_outputs(module: nn.Module) -> int | None:
    """The outputs of a ``Conv1D``, which keeps its weight transposed, and None for any other module (transformers 4.57)."""
    is_conv1d = parametrize.type_before_parametrizations(module).__name__ == "Conv1D"
    return getattr(module, "nf", None) if is_conv1d else None


def experts_are_gated(experts: Any) -> bool:
    """Whether stacked experts have a gate projection beside the up projection (transformers 5.3)."""
    return bool(experts.has_gate)


def experts_are_transposed(experts: Any) -> bool:
    """Whether stacked experts keep their weights as ``[experts, inputs, outputs]`` (transformers 5.0)."""
    return bool(experts.is_transposed)


def experts_are_concatenated(experts: Any) -> bool:
    """Whether the rows of the gate come before those of the up projection; otherwise they alternate (transformers 5.7)."""
    return bool(experts.is_concatenated)


def apply_expert_gate(experts: Any, original_class: Any, gate_and_up: Tensor) -> Tensor:
    """What an expert's down projection is given, by the class that the experts had before they became Linears (transformers 5.0)."""
    gated: Tensor = original_class._apply_gate(experts, gate_and_up)
    return gated


def use_eager_experts(config: Any) -> None:
    """Run stacked experts by their own Python code, since their kernels support only some types and sizes (transformers 5.0)."""
    config._experts_implementation = "eager"


# accelerate


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate holds the parameters of a module on another device or on disk between forwards (accelerate 1.0)."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ())))


# Torch-Pruning's dependency graph


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
