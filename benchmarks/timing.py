"""Interleaved median times, and a description of the machine."""

import platform

import torch

from blockprune.export.timing import cold_copies, median_seconds, time_interleaved

__all__ = ["cold_copies", "machine", "median_seconds", "time_interleaved"]


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
