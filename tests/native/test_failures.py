"""What ends a compiled loop early ends in Python: no memory, no threads, Ctrl-C. The process goes on."""

import _thread
import ctypes
import signal
import subprocess
import sys
import threading
import time
from typing import Any
from unittest import mock

import pytest
import torch
from strategies import integers

from blockprune import native
from blockprune.core.grid import BlockGrid
from blockprune.export.format import pack
from blockprune.native import spmm

BUILT = pytest.mark.skipif(native._library is None or spmm._library is None, reason=native.status)

LIMITED = """
import resource
import torch
import blockprune as bp
from blockprune import export, native

torch.set_num_threads(16)  # more than there is memory for
k, grid = 1024, bp.BlockGrid((1024, 1024), (16, 16))
rows, inverse, group = torch.randn(16, 4, k), torch.eye(k)[None], torch.zeros(16, dtype=torch.long)
masks = {"weight": bp.BlockMask(torch.rand(grid.size) < 0.5, grid)}
layer = export.block_sparse(bp.apply_masks(torch.nn.Linear(1024, 1024), masks), backend="native")
x = torch.randn(512, 1024)
filters = {"weight": bp.BlockMask(torch.rand(8, 4, 1, 1) < 0.5, bp.BlockGrid((128, 64, 3, 3), (16, 16)))}
conv = export.block_sparse(bp.apply_masks(torch.nn.Conv2d(64, 128, 3, padding=1), filters), backend="native")
image = torch.randn(8, 64, 56, 56)
calls = {
    "obs": lambda: native.obs_sweep(rows, inverse, group, 4, 20),
    "pool": lambda: native.pool_sum(inverse[0].repeat(8, 1), (8 * k, k), (4, 4), torch.abs),
    "product": lambda: layer(x),
    "convolution": lambda: conv(image),
}
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
with torch.no_grad():
    for mebibytes in (1, 4, 8, 16, 24, 40, 60, 100, 300):
        resource.setrlimit(resource.RLIMIT_AS, (used + (mebibytes << 20), resource.RLIM_INFINITY))
        for name, call in calls.items():
            try:
                call()
            except RuntimeError as error:
                assert "can't allocate memory" in str(error), error
print("still there")
"""


@BUILT
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
def test_without_memory_or_threads_the_process_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert done.stdout == "still there\n", done.stderr


@BUILT
@pytest.mark.parametrize("code", [2, 1])
def test_where_the_loops_have_no_memory_torch_computes(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        return code

    def refuse_sweep(*_: Any) -> int:
        return -code

    monkeypatch.setattr(native, "_library", mock.Mock(pool_sum=refuse, obs_sweep=refuse_sweep))
    monkeypatch.setattr(spmm, "_library", mock.Mock(spmm=refuse))
    assert native.pool_sum(torch.ones(4, 4), (4, 4), (2, 2), None) is None
    assert native.obs_sweep(torch.ones(1, 2, 4), torch.eye(4)[None], torch.tensor([0]), 2, 2) is None
    sparse = pack(torch.ones(4, 4), torch.ones(2, 2).bool(), BlockGrid((4, 4), (2, 2)))
    assert spmm.linear(torch.ones(1, 4), sparse.values, sparse.crow, sparse.col, shape=(4, 4), block=sparse.block) is None


def test_ctrl_c_sets_the_flag_of_a_long_call_and_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, waiting, wait = [], threading.Event(), native.wait

    def wait_and_say_so(*arguments: Any, **options: Any) -> Any:
        waiting.set()
        return wait(*arguments, **options)

    monkeypatch.setattr(native, "wait", wait_and_say_so)

    def call(interrupted: ctypes.c_int32) -> int:
        waiting.wait()
        _thread.interrupt_main()
        for _ in range(6000):  # a minute at most
            if interrupted.value:
                ended.append(True)
                break
            time.sleep(0.01)
        return -3

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background ignores
    try:
        with pytest.raises(KeyboardInterrupt):
            native._interruptible(call)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended


def test_a_long_call_returns_its_result_also_where_no_thread_can_start() -> None:
    assert native._interruptible(lambda _: 7) == 7
    with mock.patch("threading.Thread.start", side_effect=RuntimeError("can't start new thread")):
        assert native._interruptible(lambda _: 7) == 7

    def fail(_: ctypes.c_int32) -> int:
        raise ValueError("of the call")

    with pytest.raises(ValueError, match="of the call"):
        native._interruptible(fail)


@BUILT
def test_an_interrupted_sweep_writes_nothing_beyond_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(call: Any) -> int:
        return int(call(ctypes.c_int32(1)))

    rows, inverse, group = integers((3, 2, 40), 0, top=4).float(), torch.eye(40)[None], torch.zeros(3, dtype=torch.long)
    expected = native.obs_sweep(rows, inverse, group, 2, 20)
    assert expected is not None
    monkeypatch.setattr(native, "_LONG_SWEEP", 0)
    through_thread = native.obs_sweep(rows, inverse, group, 2, 20)
    assert through_thread is not None
    assert all(torch.equal(*pair) for pair in zip(expected, through_thread, strict=True))
    monkeypatch.setattr(native, "_interruptible", interrupted)
    assert native.obs_sweep(rows, inverse, group, 2, 20) is None


@BUILT
@pytest.mark.parametrize("n", [1, 127, 128, 129, 400])
def test_a_long_product_is_computed_in_parts(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = BlockGrid((24, 40), (4, 4))
    weight, x, bias = integers(grid.shape, 0).float(), integers((n, 40), 1, top=4).float(), integers((24,), 2).float()
    sparse = pack(weight, torch.ones(grid.size).bool(), grid)
    monkeypatch.setattr(spmm, "_MULTIPLICATIONS", 1)
    got = spmm.linear(x, sparse.values, sparse.crow, sparse.col, shape=sparse.shape, block=sparse.block, bias=bias)
    assert got is not None
    assert torch.equal(got, x @ weight.mT + bias)
