"""The optional compiled loops: what they are, whether this machine has them, and why not.

Set ``BLOCKPRUNE_NATIVE=0`` to do without them, or ``BLOCKPRUNE_INSTRUCTIONS`` to hold them to an instruction set; see `library`.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

from blockprune.native.library import address, available_instructions, chosen_instructions, is_plain_memory, load

_PER_THREAD = 1 << 20  # elements that pay for starting a thread beside those of torch, which wait for work on the same cores
_LONG_SWEEP = 1 << 28  # multiplications of a sweep that takes a part of a second, so that it must be interruptible
_TERMS = {None: 0, torch.abs: 1, torch.square: 2}


def _load() -> tuple[ctypes.CDLL | None, str]:
    library, status = load("blockprune.native.kernels")
    if library is not None:
        count, pointer, choice = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
        library.pool_sum.argtypes = [pointer, choice, choice, count, count, count, count, pointer, count, choice]
        library.pool_sum.restype = choice
        library.obs_sweep.argtypes = [pointer, pointer, pointer, choice, *[count] * 5, pointer, pointer, count, choice, pointer]
        library.obs_sweep.restype = count
    return library, status


_library, status = _load()
_choice = chosen_instructions()


def instructions() -> list[str]:
    """The instruction sets that this processor has and these loops were built for, the best one last.

    Example:
        >>> from blockprune import native
        >>> native.instructions()[:1] in (["plain"], [])       # [] where nothing was built
        True
    """
    return available_instructions(_library)


def pool_sum(x: Tensor, shape: tuple[int, int], block: tuple[int, int], term: object) -> Tensor | None:
    """Block sums of ``term(x)``, ``x`` seen as a matrix of this shape: float32 ``[rows / block, cols / block]``; None where it cannot, such
    as without memory.
    """
    if _library is None or term not in _TERMS or x.dtype not in (torch.float32, torch.bfloat16) or not is_plain_memory(x):
        return None
    (rows, cols), (r, c) = shape, block
    out = torch.empty(-(-rows // r), -(-cols // c), dtype=torch.float32, device="cpu")
    threads = min(torch.get_num_threads(), 1 + x.numel() // _PER_THREAD)
    is_bf16 = x.dtype == torch.bfloat16
    failed = _library.pool_sum(address(x), is_bf16, _TERMS[term], rows, cols, r, c, out.data_ptr(), threads, _choice)
    return None if failed else out


def obs_sweep(rows: Tensor, inverse: Tensor, group: Tensor, width: int, stop: int) -> tuple[Tensor, Tensor] | None:
    """Optimal Brain Surgeon over blocks of some columns: of ``rows [bands, M, k]`` with ``inverse [groups, k, k]`` the error that each
    removal adds and its block, ``[bands, k / width]`` in the order of removal; None where it cannot, such as without memory.

    Raises:
        torch.linalg.LinAlgError: an inverse that lost positive definiteness.
    """
    if _library is None or rows.dtype not in (torch.float32, torch.float64) or not (is_plain_memory(inverse) and rows.device.type == "cpu"):
        return None
    bands, height, k = rows.shape
    transposed, group = rows.mT.contiguous(), group.contiguous()
    errors, order = rows.new_empty(bands, k // width), rows.new_empty(bands, k // width, dtype=torch.long)
    sizes, threads, sweep = (bands, k, height, width, stop), torch.get_num_threads(), _library.obs_sweep

    def call(interrupted: ctypes.c_int32) -> int:  # holds the tensors as long as it runs
        pointers = (transposed.data_ptr(), inverse.data_ptr(), group.data_ptr(), rows.dtype == torch.float64)
        outputs = errors.data_ptr(), order.data_ptr()
        return int(sweep(*pointers, *sizes, *outputs, threads, _choice, ctypes.addressof(interrupted)))

    is_long = bands * min(stop * width, k) * k * k > _LONG_SWEEP
    failed = _interruptible(call) if is_long else call(ctypes.c_int32(0))
    if failed > 0:
        message = f"band {failed - 1}: the inverse lost positive definiteness in {rows.dtype}"
        raise torch.linalg.LinAlgError(message)  # type: ignore[attr-defined]  # public, though torch does not say so to mypy
    return None if failed else (errors, order)


def _interruptible(call: Callable[[ctypes.c_int32], int]) -> int:
    """The result of a call on a thread of its own, so that this thread answers signals such as Ctrl-C. An exception here sets the flag that
    the call is given, and is raised when the call has ended.
    """
    interrupted = ctypes.c_int32(0)
    with ThreadPoolExecutor(1) as pool:
        try:
            try:
                future = pool.submit(call, interrupted)
            except RuntimeError:  # the system refuses another thread
                return call(interrupted)
            while not future.done():
                wait([future], timeout=0.1)
        finally:
            interrupted.value = 1
    return future.result()
