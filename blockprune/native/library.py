"""Where the compiled loops are, why they are missing if they are, for which instruction set they run, and which tensors they can read.

``BLOCKPRUNE_NATIVE=0`` switches them off; ``BLOCKPRUNE_INSTRUCTIONS`` holds them to an instruction set, such as ``avx2``.
"""

import ctypes
import importlib
import os
from typing import Any

import torch
from torch import Tensor

from blockprune.core._compat import (
    data_address,
    dispatch_mode_is_active,
    forward_ad_is_active,
    is_copy_on_write,
    is_functorch_tensor,
    is_tracing,
    is_zero_tensor,
)

# as isa.h numbers them; "plain" is what every processor has: SSE2, NEON
INSTRUCTIONS = ("plain", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
BEST = -1  # where no position in INSTRUCTIONS is asked for


def load(name: str) -> tuple[ctypes.CDLL | None, str]:
    """The library of an extension module, or None, and its status in words."""
    if os.environ.get("BLOCKPRUNE_NATIVE") == "0":
        return None, "switched off by BLOCKPRUNE_NATIVE=0"
    try:
        library = ctypes.CDLL(str(importlib.import_module(name).__file__))
    except (ImportError, OSError) as error:
        return None, f"not built ({error}): install a C++ compiler, then reinstall blockprune"
    library.has_isa.argtypes, library.has_isa.restype = [ctypes.c_int32], ctypes.c_int32
    return library, "built"


def chosen_instructions() -> int:
    """The position in `INSTRUCTIONS` that the environment asks for, or `BEST`."""
    name = os.environ.get("BLOCKPRUNE_INSTRUCTIONS")
    if name not in (None, "", *INSTRUCTIONS):
        raise ValueError(f"BLOCKPRUNE_INSTRUCTIONS={name!r} must be one of {', '.join(INSTRUCTIONS)}, or not set for the best there is")
    return INSTRUCTIONS.index(name) if name else BEST


def available_instructions(library: ctypes.CDLL | None) -> list[str]:
    """The instruction sets that this processor has and a library was built for, the best one last."""
    return [] if library is None else [name for i, name in enumerate(INSTRUCTIONS) if library.has_isa(i)]


def address(x: Any) -> int:
    """Where the numbers start; asking a tensor that is shared until written for its `data_ptr` would copy it."""
    if is_copy_on_write(x):
        return data_address(x) + int(x.storage_offset() * x.element_size())
    return int(x.data_ptr())


def runs_eagerly() -> bool:
    """Whether operations run as they are called: nothing compiles, traces, records or differentiates forward."""
    return not (torch.compiler.is_compiling() or is_tracing() or dispatch_mode_is_active() or forward_ad_is_active())


def is_numbers(x: Tensor) -> bool:
    """Whether a tensor is nothing but contiguous numbers in memory, and needs no gradient."""
    if type(x) not in _PLAIN_TYPES or not x.is_contiguous() or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return not (is_functorch_tensor(x) or x.is_neg() or is_zero_tensor(x))


def is_plain_memory(x: Tensor, device: str = "cpu") -> bool:
    """Whether a tensor is nothing but numbers in the memory of a device: no gradient to record, no tracing, no transform."""
    return x.device.type == device and runs_eagerly() and is_numbers(x)
