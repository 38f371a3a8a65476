"""Sanitizers find nothing in the compiled loops, also where allocations or threads fail in them."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blockprune import native

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")]

LOOPS = Path(native.__file__).parent
CHECKS = {"spmm_check": LOOPS / "spmm", "loops_check": LOOPS}  # a program of this folder, and the loops that it runs
# What other compilers get is loops without vectors. Threads are the same there, and compiled in a few seconds.
SANITIZERS = {"address,undefined": ([], ["-DWITHOUT_VECTORS"]), "thread": (["-DWITHOUT_VECTORS"],)}


def build(folder: Path, check: str, *flags: str) -> Path:
    """The program of a check with its loops."""
    sources = [*(path for path in CHECKS[check].glob("*.cpp") if path.name != "module.cpp"), Path(__file__).parent / f"{check}.cpp"]
    folder.mkdir()

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], check=True, capture_output=True, text=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    program = folder / check
    subprocess.run(["g++", *flags, *map(str, objects), "-o", str(program), "-ldl"], check=True, capture_output=True, text=True)
    return program


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing(sanitizer: str, check: str, tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O0", "-DSANITIZED", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"]
    for i, more in enumerate(SANITIZERS[sanitizer]):
        program = build(tmp_path / str(i), check, *flags, *more)
        rounds = "60" if sanitizer == "thread" else "300"
        done = subprocess.run([str(program), rounds], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "instructions 0" in done.stdout
        ((allocations, threads),) = re.findall(r"(\d+) allocations and (\d+) threads refused", done.stdout)
        assert min(int(allocations), int(threads)) > 0
