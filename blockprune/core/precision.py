"""The precision of the library's own arithmetic."""

import contextlib
from collections.abc import Iterator

import torch


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
