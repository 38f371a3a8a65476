"""The product with a block-sparse weight on a GPU: what runs there, and how it is launched."""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from blockprune.native.library import plain

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HIGHEST = 32  # rows of a stored block that one tile holds


def status() -> tuple[bool, str]:
    """Whether GPUs of this machine can run the kernel, and on which device or why not.

    Example:
        >>> from blockprune.export import gpu
        >>> gpu.status()[0] <= torch.cuda.is_available()
        True
    """
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return False, 'Triton is not installed: pip install "blockprune[gpu]"'
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (8, 0):
        return False, f"{name} has compute capability {capability[0]}.{capability[1]}; 8.0 is needed"
    return True, f"Triton kernel on {name}"


def linear(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, *, shape: tuple[int, int], block: tuple[int, int], bias: Tensor | None = None
) -> Tensor | None:
    """``x W^T + bias`` as `native.spmm.linear` does it, on a GPU; None where this cannot: another type or device, a gradient to record.

    Sums are float32 whatever the type; float32 is not rounded to TF32. Nothing waits for the device.

    Example:
        >>> from blockprune.export import gpu
        >>> gpu.linear(torch.ones(1, 4), torch.ones(2), torch.tensor([0, 1]), torch.tensor([0]).int(), shape=(2, 4), block=(2, 1))
    """
    device = "cpu" if _interpreted() else "cuda"
    tensors = [x := x.contiguous(), values, *([] if bias is None else [bias])]
    if x.dtype not in _DTYPES or not all(plain(t, device) and t.dtype == x.dtype and t.device == x.device for t in tensors):
        return None
    ready = _interpreted() or _status()[0]
    if not ready or crow.device != x.device or col.device != x.device or block[0] > _HIGHEST:
        return None
    (rows, cols), (height, width), n = shape, block, x.numel() // shape[1]
    if x.shape[-1] != cols:
        raise ValueError(f"an input of shape {tuple(x.shape)} meets a weight of shape {shape}: its last axis must be {cols}")
    out = x.new_empty(*x.shape[:-1], rows)
    if not n:
        return out
    ragged, aligned, columns = cols % width != 0, width & -width, 128 // x.element_size()
    batch = min(128, max(16, 1 << (n - 1).bit_length()))
    flat = x.view(n, cols)
    if aligned < 16:  # a column of x at a time: rows of x are what lies together
        flat = flat.mT.contiguous().mT
    with torch.cuda.device_of(x):
        _kernel()[-(-rows // height) * -(-n // batch),](
            flat,
            values,
            crow,
            col,
            _before(crow, col, cols, width) if ragged else crow,
            bias,
            out,
            n,
            rows,
            *flat.stride(),
            HEIGHT=height,
            WIDTH=width,
            LOWER=rows % height != 0,
            RAGGED=ragged,
            ODD=width == 1 or (ragged and cols % 2 == 1),
            TALL=max(16, 1 << (height - 1).bit_length()),
            BATCH=batch,
            COLUMNS=columns,
            ALIGNED=min(aligned, columns),
            WIDEN=_interpreted(),
            num_warps=4,
            num_stages=8,  # x is fetched after its columns: of 8 stages, 3 steps are under way
        )
    return out


_status = functools.cache(status)


def _interpreted() -> bool:
    """Triton then runs its kernels in NumPy on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernel() -> Any:
    return importlib.import_module("blockprune.export.gpu_kernel").product


def _before(crow: Tensor, col: Tensor, cols: int, width: int) -> Tensor:
    """How many kept columns lie before each band, where the last block of a band may be narrower."""
    if not len(col):
        return crow
    narrow = (crow.diff() > 0) & (col[(crow[1:] - 1).clamp(min=0)] == cols // width)
    before = crow * width
    before[1:] -= narrow.cumsum(0) * (width - cols % width)
    return before
