"""The product with a block-sparse weight on a GPU: what runs there, and how it is launched."""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from blockprune.native.library import plain

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def status() -> tuple[bool, str]:
    """Whether GPUs of this machine can run the kernels, and on which device or why not.

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
    return True, f"Triton kernels on {name}"


def takes(device: torch.device) -> bool:
    """Whether weights on a device are stored as `linear` wants them, not in pairs.

    Example:
        >>> from blockprune.export import gpu
        >>> gpu.takes(torch.device("cuda"))
        True
    """
    return device.type == "cuda" or _interpreted()


def linear(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, *, shape: tuple[int, int], block: tuple[int, int], bias: Tensor | None = None
) -> Tensor | None:
    """``x W^T + bias`` as `native.spmm.linear` does it, on a GPU, of weights that are not stored in pairs; None where this cannot: another
    type or device, a gradient to record.

    Sums are float32 whatever the type; float32 is not rounded to TF32. Nothing waits for the device.

    Example:
        >>> from blockprune.export import gpu
        >>> gpu.linear(torch.ones(1, 4), torch.ones(2), torch.tensor([0, 1]), torch.tensor([0]).int(), shape=(2, 4), block=(2, 1))
    """
    device = "cpu" if _interpreted() else "cuda"
    tensors = [x := x.contiguous(), values, *([] if bias is None else [bias])]
    if x.dtype not in DTYPES or not all(plain(t, device) and t.dtype == x.dtype and t.device == x.device for t in tensors):
        return None
    if not (_interpreted() or _status()[0]) or crow.device != x.device or col.device != x.device:
        return None
    if bias is not None and bias.shape != shape[:1]:
        return None
    (rows, cols), n = shape, x.numel() // shape[1]
    if x.shape[-1] != cols:
        raise ValueError(f"an input of shape {tuple(x.shape)} meets a weight of shape {shape}: its last axis must be {cols}")
    out = x.new_empty(*x.shape[:-1], rows)
    if n:
        with torch.cuda.device_of(x):
            launch = _boxes if _fit(x, values, n, shape, block) else _gathered
            launch(x.view(n, cols), (values, crow, col), bias, out, shape=shape, block=block)
    return out


def _fit(x: Tensor, values: Tensor, n: int, shape: tuple[int, int], block: tuple[int, int]) -> bool:
    """Whether the copy engine takes blocks, and is worth it."""
    (rows, cols), (height, width) = shape, block
    whole = width in (32, 64) and height in (32, 64, 128) and rows % height == 0 and cols % width == 0
    there = _interpreted() or (torch.version.hip is None and _capability(x.device) >= (9, 0))
    return whole and there and n > 128 and x.element_size() == 2 and len(values) > 0 and (x.data_ptr() | values.data_ptr()) % 16 == 0


def _boxes(
    x: Tensor, weight: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, out: Tensor, *, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    (values, crow, col), (rows, _), (height, width), n = weight, shape, block, len(x)
    batch = 256 if height == 32 or (height == 64 and n > 4096) else 128
    described = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor.from_tensor
    _kernels().boxes[rows // height * -(-n // batch),](
        described(x, [batch, width]),
        described(values.view(-1, height), [width, height]),
        crow,
        col,
        bias,
        out,
        n,
        rows,
        HEIGHT=height,
        WIDTH=width,
        BATCH=batch,
        TURNED=height == 64,
        BANDS_FIRST=x.nbytes > _IN_CACHE,
        WIDEN=_interpreted(),
        num_warps=4,
        num_stages=_stages(7, (batch + height) * width * 2, x.device),
    )


def _gathered(
    x: Tensor, weight: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, out: Tensor, *, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    (values, crow, col), (rows, cols), (height, width), n = weight, shape, block, len(x)
    ragged, aligned, size = cols % width != 0, width & -width, x.element_size()
    if aligned < 16:  # a column of x at a time: rows of x are what lies together
        x = x.mT.contiguous().mT
    tall, batch = max(16, 1 << (height - 1).bit_length()), max(16, 1 << (n - 1).bit_length())
    if n <= 16:  # a weight is read once: as many bands as there are, many columns at a time
        tall, columns, stages = min(tall, 32), 512 // size, 5
    elif n <= 128:
        tall, batch, columns, stages = min(tall, 64), min(batch, 128 if tall < 64 else 64), 256 // size, 5 if aligned < 16 else 7
    else:
        tall, batch, columns, stages = min(tall, 64), 128 if aligned < 16 or tall < 32 else 256, 128 // size, 3 if aligned < 16 else 5
    if size == 4:
        batch = min(batch, 64)
    _kernels().gathered[-(-rows // height) * -(-height // tall) * -(-n // batch),](
        x,
        values,
        crow,
        col,
        _before(crow, col, cols, width) if ragged else crow,
        bias,
        out,
        n,
        rows,
        *x.stride(),
        HEIGHT=height,
        WIDTH=width,
        LOWER=rows % height != 0,
        RAGGED=ragged,
        TALL=tall,
        BATCH=batch,
        COLUMNS=columns,
        ALIGNED=min(aligned, columns),
        TURNED=n <= 16 or (n > 128 and tall == 64) or (n <= 128 and aligned < 16),
        BANDS_FIRST=x.nbytes > _IN_CACHE or aligned < 16,
        FAR=cols * x.stride(1) >= 1 << 31,
        WIDEN=_interpreted(),
        num_warps=8 if batch * tall > 1 << 13 else 4,
        num_stages=_stages(stages, (batch + tall) * columns * size, x.device),
    )


_IN_CACHE = 1 << 25  # bytes of x that the GPU's cache holds beside the weights
_status = functools.cache(status)
_capability = functools.cache(torch.cuda.get_device_capability)


def _stages(most: int, step: int, device: torch.device) -> int:
    """As many as fit. x is fetched after its columns, so of 5 stages 2 steps of so many bytes are under way; a third may be in use."""
    return max(3, min(most, 2 * (_shared(device) // step) - 1))


@functools.cache
def _shared(device: torch.device) -> int:
    """Bytes that one block of threads may use, less some for the compiler."""
    of = None if _interpreted() else torch.cuda.get_device_properties(device)
    return int(getattr(of, "shared_memory_per_block_optin", 64 << 10)) - (4 << 10)


def _interpreted() -> bool:
    """Triton then runs its kernels in NumPy on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("blockprune.export.gpu_kernel")


def _before(crow: Tensor, col: Tensor, cols: int, width: int) -> Tensor:
    """How many kept columns lie before each band, where the last block of a band may be narrower."""
    if not len(col):
        return crow
    narrow = (crow.diff() > 0) & (col[(crow[1:] - 1).clamp(min=0)] == cols // width)
    before = crow * width
    before[1:] -= narrow.cumsum(0) * (width - cols % width)
    return before
