"""Where the compiled loops are, why not if they are not, and which tensors they can read."""

import ctypes
import importlib
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def load(name: str) -> tuple[ctypes.CDLL | None, str]:
    """The library of an extension module, or None, and its status in words."""
    if os.environ.get("BLOCKPRUNE_NATIVE") == "0":
        return None, "switched off by BLOCKPRUNE_NATIVE=0"
    try:
        return ctypes.CDLL(str(importlib.import_module(name).__file__)), "built"
    except (ImportError, OSError) as error:
        return None, f"not built ({error}): install a C++ compiler, then reinstall blockprune"


def address(x: Any) -> int:
    """Where the numbers start; asking a tensor that is shared until written for its `data_ptr` would copy it."""
    torch_c: Any = torch._C
    if torch_c._is_cow_tensor(x):
        return int(torch_c._data_address(x)) + int(x.storage_offset() * x.element_size())
    return int(x.data_ptr())


def plain(x: Tensor, device: str = "cpu") -> bool:
    """Whether a tensor is nothing but numbers in the memory of a device: no gradient to record, no tracing, no transform."""
    recording = torch.is_grad_enabled() and x.requires_grad
    wrapped = (
        torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )
    torch_c: Any = torch._C
    traced = torch_c._is_tracing() or torch_c._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0
    numbers = x.is_contiguous() and not x.is_neg() and not torch._is_zerotensor(x)
    return x.device.type == device and numbers and not (recording or wrapped or traced)
