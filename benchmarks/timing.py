"""Interleaved medians, and the machine in words."""

import platform

import torch

from blockprune.export.timing import by_turns, copies, medians

__all__ = ["by_turns", "copies", "machine", "medians"]


def machine() -> str:
    """The machine in words, to print above every table."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            fields = dict(line.split(":", 1) for line in info if ":" in line)
        model = " ".join(
            f"{key.strip()} {value.strip()}" for key, value in fields.items() if key.strip() in ("model name", "cpu family", "model")
        )
    except OSError:
        pass
    if torch.cuda.is_available():
        model += f"; {torch.cuda.get_device_name()}"
    return f"{model}; {torch.get_num_threads()} threads by default; torch {torch.__version__}; Python {platform.python_version()}"
