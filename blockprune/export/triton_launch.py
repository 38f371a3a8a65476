"""The product with a block-sparse weight on a GPU: which Triton kernel runs, and with which settings."""

import functools
import importlib
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blockprune.core._compat import shared_memory_bytes
from blockprune.native.library import is_plain_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def status() -> tuple[bool, str]:
    """Whether a GPU of this machine can run the kernels; and which GPU, or the reason why not.

    Example:
        >>> from blockprune.export import triton_launch
        >>> triton_launch.status()[0] <= torch.cuda.is_available()
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


def uses_gpu_layout(device: torch.device) -> bool:
    """Whether weights on this device are stored in the GPU layout, which the Triton kernels read.

    Example:
        >>> from blockprune.export import triton_launch
        >>> triton_launch.uses_gpu_layout(torch.device("cuda"))
        True
    """
    return device.type == "cuda" or _is_interpreted()


def linear(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, *, shape: tuple[int, int], block: tuple[int, int], bias: Tensor | None = None
) -> Tensor | None:
    """``x W^T + bias`` of ``x [..., columns]`` and a block-sparse ``W [rows, columns]`` in the GPU layout: ``[..., rows]``.

    None if the kernels do not support the type or the device, or if a gradient must be recorded. Sums are float32 whatever the type, and
    float32 inputs are not rounded to TF32. The call does not wait for the device.

    Raises:
        ValueError: an x whose last axis is not the weight's columns.

    Example:
        >>> from blockprune.export import triton_launch
        >>> values, crow, col = torch.ones(2), torch.tensor([0, 1]), torch.tensor([0]).int()
        >>> triton_launch.linear(torch.ones(1, 4), values, crow, col, shape=(2, 4), block=(2, 1))
    """
    device = "cpu" if _is_interpreted() else "cuda"
    tensors = [x := x.contiguous(), values, *([] if bias is None else [bias])]
    if x.dtype not in DTYPES or not all(is_plain_memory(t, device) and t.dtype == x.dtype and t.device == x.device for t in tensors):
        return None
    if not (_is_interpreted() or _status()[0]) or crow.device != x.device or col.device != x.device:
        return None
    if bias is not None and bias.shape != shape[:1]:
        return None
    (rows, columns), n = shape, x.numel() // shape[1]
    if x.shape[-1] != columns:
        raise ValueError(f"an input of shape {tuple(x.shape)} does not fit a weight of shape {shape}: its last axis must be {columns}")
    out = x.new_empty(*x.shape[:-1], rows)
    if n:
        with torch.cuda.device_of(x):
            launch = _launch_tma if _supports_tma(x, values, n, shape, block) else _launch_gather
            launch(x.view(n, columns), (values, crow, col), bias, out, shape=shape, block=block)
    return out


def _supports_tma(x: Tensor, values: Tensor, n: int, shape: tuple[int, int], block: tuple[int, int]) -> bool:
    """Whether the tensor memory accelerator can fetch the blocks, and is faster than gathering columns."""
    (rows, columns), (height, width) = shape, block
    fits = width in (32, 64) and height in (32, 64, 128) and rows % height == 0 and columns % width == 0
    available = _is_interpreted() or (torch.version.hip is None and _capability(x.device) >= (9, 0))
    aligned = len(values) > 0 and (x.data_ptr() | values.data_ptr()) % 16 == 0
    return fits and available and n > 128 and x.element_size() == 2 and aligned


def _launch_tma(
    x: Tensor, weight: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, out: Tensor, *, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    (values, crow, col), (rows, _), (height, width), n = weight, shape, block, len(x)
    tile_batch = 256 if height == 32 or (height == 64 and n > 4096) else 128
    descriptor = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor.from_tensor
    _kernels().tma_kernel[rows // height * -(-n // tile_batch),](
        descriptor(x, [tile_batch, width]),
        descriptor(values.view(-1, height), [width, height]),
        crow,
        col,
        bias,
        out,
        n,
        rows,
        HEIGHT=height,
        WIDTH=width,
        TILE_BATCH=tile_batch,
        TRANSPOSED=height == 64,
        BLOCK_ROWS_FIRST=x.nbytes > _L2_CACHE_BYTES,
        UPCAST=_is_interpreted(),
        num_warps=4,
        num_stages=_pipeline_stages(7, (tile_batch + height) * width * 2, x.device),
    )


class _GatherTiles(NamedTuple):
    rows: int
    batch: int
    step_columns: int
    max_stages: int


def _gather_tiles(n: int, height: int, contiguous: int, element_size: int) -> _GatherTiles:
    """The settings that were fastest on an H200, among about 1,200 that were measured."""
    rows, batch = max(16, 1 << (height - 1).bit_length()), max(16, 1 << (n - 1).bit_length())
    if n <= 16:  # each weight is read once, so use as many programs as there are block rows, and many columns at a time
        tiles = _GatherTiles(min(rows, 32), batch, 512 // element_size, 5)
    elif n <= 128:
        rows = min(rows, 64)
        tiles = _GatherTiles(rows, min(batch, 128 if rows < 64 else 64), 256 // element_size, 5 if contiguous < 16 else 7)
    else:
        rows = min(rows, 64)
        tiles = _GatherTiles(rows, 128 if contiguous < 16 or rows < 32 else 256, 128 // element_size, 3 if contiguous < 16 else 5)
    return tiles._replace(batch=min(tiles.batch, 64)) if element_size == 4 else tiles


def _launch_gather(
    x: Tensor, weight: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, out: Tensor, *, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    (values, crow, col), (rows, columns), (height, width), n = weight, shape, block, len(x)
    ragged = columns % width != 0
    contiguous = width & -width  # the largest power of two that divides the width
    if contiguous < 16:  # single columns of x are gathered, so each must be contiguous
        x = x.mT.contiguous().mT
    tiles = _gather_tiles(n, height, contiguous, x.element_size())
    _kernels().gather_kernel[-(-rows // height) * -(-height // tiles.rows) * -(-n // tiles.batch),](
        x,
        values,
        crow,
        col,
        _columns_before(crow, col, columns, width) if ragged else crow,
        bias,
        out,
        n,
        rows,
        *x.stride(),
        HEIGHT=height,
        WIDTH=width,
        SHORT_LAST_ROW=rows % height != 0,
        RAGGED_COLUMNS=ragged,
        TILE_ROWS=tiles.rows,
        TILE_BATCH=tiles.batch,
        STEP_COLUMNS=tiles.step_columns,
        CONTIGUOUS=min(contiguous, tiles.step_columns),
        TRANSPOSED=n <= 16 or (n > 128 and tiles.rows == 64) or (n <= 128 and contiguous < 16),
        BLOCK_ROWS_FIRST=x.nbytes > _L2_CACHE_BYTES or contiguous < 16,
        INT64_OFFSETS=columns * x.stride(1) >= 1 << 31,
        UPCAST=_is_interpreted(),
        num_warps=8 if tiles.batch * tiles.rows > 1 << 13 else 4,
        num_stages=_pipeline_stages(tiles.max_stages, (tiles.batch + tiles.rows) * tiles.step_columns * x.element_size(), x.device),
    )


_L2_CACHE_BYTES = 1 << 25  # bytes of x that the GPU's cache holds besides the weights
_status = functools.cache(status)
_capability = functools.cache(torch.cuda.get_device_capability)


def _pipeline_stages(limit: int, step_bytes: int, device: torch.device) -> int:
    """As many stages as shared memory holds, at least 3.

    x is fetched after its column numbers. So with 5 stages, the data of 2 steps (``step_bytes`` each) are in flight, and those of a third
    may be in use.
    """
    return max(3, min(limit, 2 * (_shared_memory_bytes(device) // step_bytes) - 1))


@functools.cache
def _shared_memory_bytes(device: torch.device) -> int:
    """Shared memory that a thread block may use, less a reserve for the compiler."""
    return (64 << 10 if _is_interpreted() else shared_memory_bytes(device)) - (4 << 10)


def _is_interpreted() -> bool:
    """Whether Triton runs its kernels in NumPy on the CPU, as tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("blockprune.export.triton_kernels")


def _columns_before(crow: Tensor, col: Tensor, columns: int, width: int) -> Tensor:
    """How many kept columns come before each block row, where the last block of a row may be narrower: ``[block rows + 1]``."""
    if not len(col):
        return crow
    ends_narrow = (crow.diff() > 0) & (col[(crow[1:] - 1).clamp(min=0)] == columns // width)
    before = crow * width
    before[1:] -= ends_narrow.cumsum(0) * (width - columns % width)
    return before
