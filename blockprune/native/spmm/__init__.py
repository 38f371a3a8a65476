"""The product of a dense input with a block-sparse weight, and the convolution, compiled; `export.format` says how the weight is stored.

``BLOCKPRUNE_INSTRUCTIONS`` holds it to an instruction set, such as ``avx2``; see `native.library`.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blockprune.core._compat import gomp_parallel
from blockprune.native.library import INSTRUCTIONS, available_instructions, chosen_instructions, is_numbers, load, runs_eagerly

__all__ = [
    "INSTRUCTIONS",
    "Window",
    "conv2d",
    "input_grad",
    "instructions",
    "linear",
    "linear_int8",
    "memory_format",
    "status",
    "values_grad",
]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_MULTIPLICATIONS = 1 << 33  # of one call of the compiled loops, a part of a second; between calls Python answers signals such as Ctrl-C
_MAX_INT8_COLUMNS = (1 << 31) // 127**2  # whose products an int32 holds
_ROWS_MULTIPLE = 128  # of inputs in one such call, so that they fill the kernels' panels


def _load() -> tuple[ctypes.CDLL | None, str]:
    library, status = load("blockprune.native.spmm.kernels")
    if library is not None:
        count, pointer, choice = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
        library.spmm.argtypes = [*[pointer] * 3, *[count] * 4, choice, pointer, count, pointer, pointer, count, choice]
        library.spmm_int8.argtypes = [*[pointer] * 3, *[count] * 4, choice, pointer, count, *[pointer] * 3, count, choice]
        library.conv2d.argtypes = [*[pointer] * 3, *[count] * 3, choice, *[pointer] * 4, *[count] * 3, choice]
        library.gradient.argtypes = [*[pointer] * 3, *[count] * 4, choice, pointer, count, *[pointer] * 2, choice, count, choice]
        for function in (library.spmm, library.spmm_int8, library.conv2d, library.gradient):
            function.restype = choice
        library.use_openmp.argtypes = [pointer]
        library.use_openmp(gomp_parallel())
    return library, status


_library, status = _load()
_choice = chosen_instructions()


def instructions() -> list[str]:
    """The instruction sets that this processor has and this library was built for, the best one last.

    Example:
        >>> from blockprune.native import spmm
        >>> spmm.instructions()[:1] in (["plain"], [])       # [] where nothing was built
        True
    """
    return available_instructions(_library)


def linear(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, *, shape: tuple[int, int], block: tuple[int, int], bias: Tensor | None = None
) -> Tensor | None:
    """``x W^T + bias`` for ``x [..., cols]`` and a block-sparse ``W [rows, cols]``, as `export.format.BlockSparse` holds it and
    `export.format.validate` checked it; None where this cannot: other types or devices, a gradient to record, no library, no memory.

    Sums are float32 whatever the type. Inputs that meet no kept weight of a row do not reach it, be they NaN: the dense product with zeros
    makes NaN of them.
    """
    return _multiply(x, (values, crow, col), x.dtype, bias, shape=shape, block=block)


def linear_int8(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    scale: Tensor,
    *,
    shape: tuple[int, int],
    block: tuple[int, int],
    bias: Tensor | None = None,
) -> Tensor | None:
    """``x W^T + bias`` for ``x [..., cols]`` and an int8 weight, as `export.format.BlockSparse` holds it; None where this cannot.

    Each row of x is rounded to int8 numbers q with ``s = max|x| / 127`` (`export.quantization.quantize_inputs`); the sums of products are
    exact, and ``y = sum * (s * scale) + bias`` is computed in float32. A row of x that is not finite gives NaN in the whole row of y.

    Args:
        x: of float32 or bfloat16, the type of the result.
        values, crow, col, shape, block: the weight, in the CPU layout; values from -127 to 127.
        scale: of each row of the weight, float32 ``[rows]``.
        bias: ``[rows]``, of float32 or of the type of x.
    """
    if not _readable(scale, torch.float32) or scale.shape != shape[:1] or shape[1] > _MAX_INT8_COLUMNS:
        return None
    if bias is not None:
        if bias.dtype not in (x.dtype, torch.float32):
            return None
        bias = bias if bias.dtype == torch.float32 else bias.float()
    return _multiply(x, (values, crow, col), torch.int8, bias, scale=scale, shape=shape, block=block)


def _multiply(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    bias: Tensor | None,
    *,
    scale: Tensor | None = None,
    shape: tuple[int, int],
    block: tuple[int, int],
) -> Tensor | None:
    """The product of float or, with a scale, of int8 numbers, or None."""
    if _library is None or x.dtype not in _DTYPES or not (runs_eagerly() and _readable(x := x.contiguous(), x.dtype)):
        return None
    values, crow, col = weight
    if not (_readable(values, dtype) and _indices(crow, torch.int64) and _indices(col, torch.int32)):
        return None
    rows, cols = shape
    if x.shape[-1] != cols:
        raise ValueError(f"an input of shape {tuple(x.shape)} does not fit a weight of shape {shape}: its last axis must be {cols}")
    if bias is not None and (not _readable(bias, torch.float32 if dtype == torch.int8 else dtype) or bias.shape != (rows,)):
        return None
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    layer = values.data_ptr(), col.data_ptr(), crow.data_ptr(), rows, cols, *block, _DTYPES[x.dtype]
    bias_address = None if bias is None else bias.data_ptr()
    last = torch.get_num_threads(), _choice
    options, multiply = (last, _library.spmm) if scale is None else ((scale.data_ptr(), *last), _library.spmm_int8)
    x_address, out_address, size = x.data_ptr(), out.data_ptr(), x.element_size()
    n, step = x.numel() // cols, _rows_at_once(values.numel())
    for first in range(0, n, step):
        x_rows, out_rows = x_address + first * cols * size, out_address + first * rows * size
        if multiply(*layer, x_rows, min(step, n - first), bias_address, out_rows, *options):
            return None
    return out


def input_grad(grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, *, shape: tuple[int, int], block: tuple[int, int]) -> Tensor | None:
    """The gradient of x for ``y = x W^T``: ``grad W`` for ``grad [..., rows]``, in the CPU layout; None where this cannot, as in `linear`.

    Sums are float32 whatever the type.
    """
    if not _readable(values, grad.dtype):
        return None
    out = grad.new_empty(*grad.shape[:-1], shape[1])
    return out if _gradient(values, None, grad, out, (crow, col), shape=shape, block=block) else None


def values_grad(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, *, shape: tuple[int, int], block: tuple[int, int], count: int
) -> Tensor | None:
    """The gradient of the ``count`` kept values of W for ``y = x W^T``: ``grad^T x`` where blocks are kept; None where this cannot.

    Sums are float32 whatever the type.

    Args:
        grad: of y, ``[..., rows]``.
        x: ``[..., cols]``, of the type of grad, which the result has too.
        crow, col, shape, block: of the weight, in the CPU layout.
        count: of the values.
    """
    if x.dtype != grad.dtype or not _readable(x := x.contiguous(), x.dtype):
        return None
    is_long = _rows_at_once(count) < grad.numel() // shape[0]  # parts are added up in float32
    out = x.new_empty(count, dtype=torch.float32 if is_long else x.dtype) if grad.numel() else x.new_zeros(count)
    return out.to(x.dtype) if _gradient(None, x, grad, out, (crow, col), shape=shape, block=block) else None


def _gradient(
    values: Tensor | None,
    x: Tensor | None,
    grad: Tensor,
    out: Tensor,
    indices: tuple[Tensor, Tensor],
    *,
    shape: tuple[int, int],
    block: tuple[int, int],
) -> bool:
    """Writes the gradient of the inputs, or with x that of the values, to ``out``; False where this cannot."""
    crow, col = indices
    if _library is None or grad.dtype not in _DTYPES or not (runs_eagerly() and _readable(grad := grad.contiguous(), grad.dtype)):
        return False
    if not (_indices(crow, torch.int64) and _indices(col, torch.int32)):
        return False
    rows, cols = shape
    n, kept = grad.numel() // rows, len(out) if values is None else len(values)
    addresses = None if values is None else values.data_ptr(), col.data_ptr(), crow.data_ptr()
    step = _rows_at_once(kept)
    for first in range(0, n, step):
        grad_address = grad.data_ptr() + first * rows * grad.element_size()
        x_address = None if x is None else x.data_ptr() + first * cols * x.element_size()
        to = out.view(-1)[first * cols :] if x is None else out if first == 0 else torch.empty_like(out)
        layer = *addresses, rows, cols, *block, _DTYPES[grad.dtype]
        if _library.gradient(
            *layer,
            x_address,
            min(step, n - first),
            grad_address,
            to.data_ptr(),
            to.dtype == torch.float32,
            torch.get_num_threads(),
            _choice,
        ):
            return False
        if x is not None and first:
            out += to
    return True


def _rows_at_once(kept: int) -> int:
    """How many rows of inputs one call of a compiled loop multiplies with a weight of so many kept elements."""
    return max(1, _MULTIPLICATIONS // (max(1, kept) * _ROWS_MULTIPLE)) * _ROWS_MULTIPLE


class Window(NamedTuple):
    """What a convolution reads for one output: vertical and horizontal numbers, and zeros around the image as `F.pad` takes them.

    Example:
        >>> from blockprune.native.spmm import Window
        >>> Window(kernel_size=(3, 3), padding=(1, 1, 1, 1)).out_size(torch.ones(1, 2, 8, 9))
        (8, 9)
    """

    kernel_size: Sequence[int]
    stride: Sequence[int] = (1, 1)
    dilation: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0, 0, 0)  # left, right, top, bottom

    def out_size(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the output for an input ``[n, channels, rows, columns]``."""
        (down, right), (dilation_y, dilation_x), (high, wide) = self.stride, self.dilation, self.kernel_size
        rows = x.shape[2] + self.padding[2] + self.padding[3] - dilation_y * (high - 1) - 1
        columns = x.shape[3] + self.padding[0] + self.padding[1] - dilation_x * (wide - 1) - 1
        return rows // down + 1, columns // right + 1


def memory_format(x: Tensor) -> torch.memory_format:
    """How a convolution's output lies in memory, as that of torch: like its input ``[n, channels, rows, columns]``.

    Example:
        >>> from blockprune.native.spmm import memory_format
        >>> memory_format(torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last))
        torch.channels_last
    """
    _, channel, row, column = x.stride()
    return torch.channels_last if channel == 1 and column <= row and not x.is_contiguous() else torch.contiguous_format


def conv2d(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    *,
    shape: tuple[int, int],
    block: tuple[int, int],
    window: Window,
    bias: Tensor | None = None,
) -> Tensor | None:
    """The convolution of ``x [n, channels, rows, columns]`` with a kernel whose matrix ``[filters, channels * taps]`` is block-sparse.

    None where this cannot, as in `linear`, whose sums and whose rule about NaN it has. The output lies in memory as the input does.
    """
    if _library is None or x.dtype not in _DTYPES:
        return None
    layout = memory_format(x)
    memory = (x.permute(0, 2, 3, 1) if layout is torch.channels_last else x).contiguous()  # its axes as they lie in memory
    if not (
        runs_eagerly()
        and _readable(memory, x.dtype)
        and _readable(values, x.dtype)
        and _indices(crow, torch.int64)
        and _indices(col, torch.int32)
    ):
        return None
    rows, cols = shape
    if bias is not None and (not _readable(bias, x.dtype) or bias.shape != (rows,)):
        return None
    channels_last, (left, _, top, _) = layout is torch.channels_last, window.padding
    one_to_one = cols == x.shape[1] and tuple(window.stride) == (1, 1) and not any(window.padding)
    tall_and_wide = block[0] >= 8 and cols >= 256  # else the convolution was measured to be faster than a product, which needs no copies
    if channels_last and one_to_one and tall_and_wide:
        product = linear(memory, values, crow, col, shape=shape, block=block, bias=bias)
        return None if product is None else product.permute(0, 3, 1, 2)
    n, (high, wide), (kernel, stride, dilation) = x.shape[0], window.out_size(x), window[:3]
    out = torch.empty((n, rows, high, wide), dtype=x.dtype, device=x.device, memory_format=layout)
    geometry = (ctypes.c_int64 * 16)(*x.shape, *kernel, *stride, *dilation, top, left, high, wide, channels_last, channels_last)
    layer = values.data_ptr(), col.data_ptr(), crow.data_ptr(), rows, *block, _DTYPES[x.dtype]
    arrays = ctypes.addressof(geometry), memory.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr()
    step = max(1, _MULTIPLICATIONS // (max(1, values.numel()) * max(1, wide)))  # rows of outputs
    for first in range(0, n * high, step):
        last = min(first + step, n * high)
        if _library.conv2d(*layer, *arrays, first, last, torch.get_num_threads(), _choice):
            return None
    return out


def _readable(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor is numbers of a type in CPU memory, and needs no gradient."""
    return x.is_cpu and x.dtype == dtype and is_numbers(x)


def _indices(x: Tensor, dtype: torch.dtype) -> bool:
    return x.is_cpu and x.dtype == dtype and x.is_contiguous()
