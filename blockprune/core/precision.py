"""The precision of the library's own arithmetic."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

SMALLEST = 1e-30  # smaller numbers lose digits in float32, whose normal numbers end at 1e-38
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # of x86, and of ARM


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Compute in the dtypes of the operands: under `torch.autocast` products of float32 statistics would be rounded to half precision.

    Example:
        >>> from blockprune.core.precision import no_autocast
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), no_autocast():
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def forget_casts() -> None:
    """Let `torch.autocast`, if it is on, cast parameters anew that were changed in place: it keeps its casts until its outermost end.

    Example:
        >>> from blockprune.core.precision import forget_casts
        >>> layer, x = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     before = layer(x)
        ...     _ = nn.init.ones_(layer.weight)
        ...     forget_casts()
        ...     layer(x).item()
        1.0
    """
    torch.clear_autocast_cache()


def multiplies_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether a device has instructions that multiply bfloat16; a CPU without them is slower in bfloat16 than in float32.

    Example:
        >>> from blockprune.core.precision import multiplies_bfloat16
        >>> multiplies_bfloat16("cuda")
        True
    """
    return torch.device(device).type != "cpu" or any(map(torch.cpu.get_capabilities().get, BFLOAT16_INSTRUCTIONS))


def double(x: Tensor) -> Tensor:
    """A tensor in float64, or in float32 on a device that has no float64."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def at_least_float32(x: Tensor) -> Tensor:
    """A tensor of a half-precision type in float32; any other as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_in_range(x: Tensor) -> bool:
    """Whether all numbers are finite, and none but 0 is so small that float32 loses its digits."""
    size = x.abs()
    return bool(size.isfinite().all()) and not bool(((size < SMALLEST) & (size > 0)).any())


def float32_if_in_range(x: Tensor) -> Tensor:
    """A float64 tensor in float32 if that neither overflows nor loses small numbers; otherwise the same tensor.

    Example:
        >>> from blockprune.core.precision import float32_if_in_range
        >>> float32_if_in_range(torch.tensor([1.0, 1e-44]).double()).dtype, float32_if_in_range(torch.ones(1).double()).dtype
        (torch.float64, torch.float32)
    """
    in_range = is_in_range(x) and bool((x.abs() <= torch.finfo(torch.float32).max).all())
    return x.float() if in_range else x
