"""Every private or undocumented API of torch that blockprune uses.

A new version of these libraries may change any of them without notice. tests/core/test_compat.py has a test for each, which says what
blockprune loses with it, and a test that no other module uses such a name. Each docstring ends with the first version that has the API;
"torch 2.0" also stands for earlier ones. `_compat_dynamo` has those of ``torch.compile``, `_compat_fsdp` those of ``fully_shard``,
`_compat_hf` those of transformers and accelerate, `_compat_pruning` those of Torch-Pruning.

A class can override a private method of torch only in its own body, so these stay where they are:

* ``nn.Module._apply``: model/gates.py, model/parametrization.py, export/sparse_layers.py, export/semi_structured.py
* ``nn.Module._load_from_state_dict``: model/masked_class.py, model/parametrization.py, export/sparse_layers.py, export/semi_structured.py
* ``nn.Module._save_to_state_dict``: model/masked_class.py, export/sparse_layers.py, export/semi_structured.py
* ``nn.Module.__prepare_scriptable__``: model/gates.py, model/parametrization.py, export/semi_structured.py, export/sparse_layers.py

This module imports nothing of blockprune, so that every other module can import it.
"""

import contextlib
import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

try:
    # the base classes tell whether a layer is a convolution or a normalisation, users' subclasses included (torch 2.0)
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.nn.modules.conv import _ConvNd as ConvNd
    from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd

    # only a dispatch mode sees every operation that a model runs, whoever calls it (torch 2.0)
    from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

    # batches and outputs are nested containers, which no public function of torch maps over (torch 2.2)
    from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
except ImportError as error:
    raise ImportError(f"torch {torch.__version__}: {error}; blockprune imports it in blockprune/core/_compat.py") from error

__all__ = [
    "FAST_PATH_MODULES",
    "FORWARD_METHODS",
    "RNN_CACHES",
    "SWAP_CHECK",
    "BatchNorm",
    "ConvNd",
    "ConvTransposeNd",
    "DispatchMode",
    "NormBase",
    "all_buffers",
    "autocast_is_active",
    "compress_two_of_four",
    "conv_padding",
    "convert_tensors",
    "data_address",
    "disable_checkpointing",
    "disabled_torch_function",
    "dispatch_mode_is_active",
    "forward_ad_is_active",
    "functional_call_assigns",
    "functorch_is_active",
    "gomp_parallel",
    "has_hooks",
    "has_one_original",
    "has_packed_linear",
    "is_cast",
    "is_compiled_wrapper",
    "is_copy_on_write",
    "is_functorch_tensor",
    "is_legacy_batched",
    "is_tracing",
    "is_view",
    "is_zero_tensor",
    "lazy_clone",
    "originals",
    "own_parametrizations",
    "pack_linear_weight",
    "packed_linear",
    "packs_bfloat16",
    "parameter_names",
    "pass_by_workers",
    "rebuild_rnn_caches",
    "replace_data",
    "search_two_of_four",
    "shared_memory_bytes",
    "start_workers",
    "state_dict_hooks",
    "storage_id",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "two_of_four_product",
    "version_counter",
    "without_base",
    "without_compiled_prefixes",
    "writes_arguments",
]

_C: Any = torch._C


# Tensors and their memory


SWAP_CHECK = "_use_count"  # the method that ``torch.utils.swap_tensors`` calls of both tensors before it changes them (torch 2.3)
# a subclass of Tensor with this as its `__torch_function__` is treated as nn.Parameter is: operations return plain tensors (torch 2.0)
disabled_torch_function: Any = _C._disabled_torch_function_impl


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


def replace_data(parameter: Tensor, data: Tensor) -> None:
    """Give a parameter other numbers, maybe of another length. Backward through earlier graphs raises (torch 2.1).

    torch keeps the node that accumulates a gradient, and with it the old shape, as long as such a graph lives, unless the type changes.
    """
    if parameter.shape != data.shape:
        parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
    parameter.data = data
    torch.autograd.graph.increment_version(parameter)


def without_base(x: Tensor) -> Tensor:
    """The same tensor in the same memory, but not a view of another tensor; it is differentiable (torch 2.0)."""
    return cast(Tensor, torch.ops.aten._unsafe_view(x, x.shape))


def is_view(x: Tensor) -> bool:
    """Whether torch sees a tensor as a view: writing into it then replaces its place in the graph of gradients (torch 2.0)."""
    return x._is_view()


def is_zero_tensor(x: Tensor) -> bool:
    """Whether a tensor stands for zeros without having them in memory, as gradients may; compiled code cannot read it (torch 2.0)."""
    return torch._is_zerotensor(x)


# Transforms that replace or record operations: compiled code and custom operators would escape them


def is_functorch_tensor(x: Tensor) -> bool:
    """Whether `torch.func` wraps a tensor, which then has no memory of its own (torch 2.0)."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def functional_call_assigns() -> bool:
    """Whether `torch.func.functional_call` sets the attribute whose ``__setattr__`` asks; it then sets the old value again (torch 2.0)."""
    frame = sys._getframe(2)
    while frame.f_code.co_name in ("__setattr__", "_setattr") and frame.f_back is not None:  # of a subclass
        frame = frame.f_back
    return frame.f_globals.get("__name__") == "torch.nn.utils._named_member_accessor"


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


def writes_arguments(operation: Any) -> bool:
    """Whether an operator writes into one of its arguments, by its schema (torch 2.0)."""
    return bool(operation._schema.is_mutable)


def is_cast(operation: Any) -> bool:
    """Whether an operator is the one that copies a tensor to another type or device, as ``Tensor.to`` does (torch 2.0)."""
    return bool(operation is torch.ops.aten._to_copy.default)


def autocast_is_active() -> bool:
    """Whether autocast is on for any type of device; asking for a type takes several times as long (torch 2.4)."""
    return bool(_C._is_any_autocast_enabled())


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


def state_dict_hooks(module: nn.Module) -> list[Any]:
    """The hooks that ``register_state_dict_post_hook`` has added to a module (torch 2.5)."""
    return list(module._state_dict_hooks.values())


def convert_tensors(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Convert all parameters and buffers of a module in place; ``module.to`` has one dtype for all (torch 2.0)."""
    module._apply(convert)


def start_workers(batches: Any) -> Iterator[Any] | None:
    """New worker processes for `pass_by_workers`, beside those that a DataLoader keeps itself; None if it keeps none (torch 2.0)."""
    keeps = isinstance(batches, torch.utils.data.DataLoader) and batches.persistent_workers
    return pass_by_workers(batches, None) if keeps else None


def pass_by_workers(batches: Any, workers: Iterator[Any] | None) -> Iterator[Any]:
    """A pass over a DataLoader that has ``persistent_workers`` by these, or by new ones; it returns them (torch 2.0)."""
    own, batches._iterator = batches._iterator, workers
    try:
        return iter(batches)
    finally:
        batches._iterator = own


def parameter_names(module: nn.Module) -> list[str]:
    """The names of a module's own parameters in order, with those that are None, which ``named_parameters`` leaves out (torch 2.0)."""
    return list(module._parameters.keys())  # a scripted module cannot be iterated


def all_buffers(module: nn.Module) -> dict[str, tuple[Tensor | None, bool]]:
    """A module's own buffers, those of None too, which ``named_buffers`` leaves out, and whether a state dict has them (torch 2.0)."""
    return {name: (buffer, name not in module._non_persistent_buffers_set) for name, buffer in module._buffers.items()}


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is hooked to a module's call; torch can add and remove hooks, but not list them (torch 2.0)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether ``torch.compile`` returned the module, which then calls another one and names its parameters differently (torch 2.0)."""
    return hasattr(module, "_orig_mod")


def own_parametrizations(module: nn.Module) -> nn.ModuleDict | None:
    """The parametrizations of a module's own tensors, or None (torch 2.0).

    ``is_parametrized`` also finds those of the module that ``torch.compile`` has wrapped, and is slow where there are none.
    """
    children = module._modules  # of a scripted module, it has no `get`
    child = children["parametrizations"] if "parametrizations" in children else None  # noqa: SIM401
    return child if isinstance(child, nn.ModuleDict) else None


def without_compiled_prefixes(name: str) -> str:
    """The name in the plain model of a tensor whose module, or a module around it, ``torch.compile`` has wrapped (torch 2.0)."""
    return re.sub(r"(?<![^.])_orig_mod\.", "", name)


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


# Forwards

FORWARD_METHODS = ("forward", "_conv_forward", "__call__")  # the methods that compute a layer's output (torch 2.0)


# Gradient checkpointing


@contextlib.contextmanager
def disable_checkpointing(*, reentrant_only: bool = False) -> Iterator[None]:
    """Keep the activations that `torch.utils.checkpoint` would compute again in the backward (torch 2.1).

    The reentrant form has no gradients for `torch.autograd.grad`, and both forms have none for `torch.func.grad`. Code may have imported
    the function ``checkpoint`` itself, so what it calls is replaced.
    """
    module: Any = torch.utils.checkpoint
    names = ["CheckpointFunction"] if reentrant_only else ["CheckpointFunction", "_checkpoint_without_reentrant_generator"]
    before = [getattr(module, name) for name in names]
    try:
        for name, replacement in zip(names, [_RunDirectly, lambda *args, **kwargs: iter([None])], strict=False):
            setattr(module, name, replacement)  # the caller of the second runs the function itself
        yield
    finally:
        for name, original in zip(names, before, strict=True):
            setattr(module, name, original)


class _RunDirectly:
    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)
