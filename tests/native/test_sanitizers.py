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
CHECKS = {
    "spmm_check": LOOPS / "spmm",
    "conv_check": LOOPS / "spmm",
    "loops_check": LOOPS,
}  # a program of this folder, and the loops that it runs
NO_AVX512 = [] if "avx512" in native.instructions() else ["-DWITHOUT_AVX512"]  # could not run, and takes a minute to compile
PLAIN = ["-DWITHOUT_VECTORS"]  # what other compilers get; it is compiled in a few seconds and has the same threads
RUNS = [  # sanitizer, program, flags, rounds
    ("address,undefined", "spmm_check", [], 300),
    ("address,undefined", "spmm_check", PLAIN, 300),
    ("address,undefined", "conv_check", [], 200),
    ("address,undefined", "loops_check", [], 60),
    ("address,undefined", "loops_check", PLAIN, 60),
    ("thread", "spmm_check", PLAIN, 30),
    ("thread", "conv_check", ["-DPLAIN_VECTORS_ALONE"], 5),
    ("thread", "loops_check", PLAIN, 30),
]


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


@pytest.mark.parametrize(("sanitizer", "check", "more", "rounds"), RUNS)
def test_sanitizers_find_nothing(sanitizer: str, check: str, more: list[str], rounds: int, tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O0", "-DSANITIZED", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread", *NO_AVX512]
    program = build(tmp_path / "build", check, *flags, *more)
    done = subprocess.run([str(program), str(rounds)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "instructions 0" in done.stdout
    ((allocations, threads),) = re.findall(r"(\d+) allocations and (\d+) threads refused", done.stdout)
    assert min(int(allocations), int(threads)) > 0
