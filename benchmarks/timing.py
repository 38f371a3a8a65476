"""Interleaved median times, the memory of a process, and a description of the machine."""

import platform
import resource
import sys
from pathlib import Path

import torch

from blockprune.export.timing import cold_copies, median_seconds, time_interleaved

__all__ = ["cold_copies", "machine", "median_seconds", "reset_peak", "resident_bytes", "time_interleaved"]


def machine() -> str:
    """The processor, the threads and the versions: the first line of every benchmark's output."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            fields = dict(line.split(":", 1) for line in info if ":" in line)
        names = ("model name", "cpu family", "model")
        processor = " ".join(f"{key.strip()} {value.strip()}" for key, value in fields.items() if key.strip() in names)
    except OSError:
        pass
    if torch.cuda.is_available():
        processor += f"; {torch.cuda.get_device_name()}"
    return f"{processor}; {torch.get_num_threads()} threads by default; torch {torch.__version__}; Python {platform.python_version()}"


def resident_bytes(field: str = "VmHWM") -> int:
    """Resident memory of this process: on Linux ``VmHWM`` is the most since the last reset, ``VmRSS`` the present level.

    On other systems it is always the most since the start, which on Linux would count what the process that started this one had.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
    return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """Let VmHWM begin anew at the present level."""
    Path("/proc/self/clear_refs").write_text("5")
