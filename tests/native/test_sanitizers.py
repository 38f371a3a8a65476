"""Sanitizers find nothing in the compiled loops, also where allocations or threads fail in them."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blockprune import native

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")]

LOOPS = Path(native.__file__).parent
NO_AVX512 = [] if "avx512" in native.instructions() else ["-DWITHOUT_AVX512"]  # could not run, and takes a minute to compile
# Its loops are those of avx2.cpp and plain.cpp for wider vectors; to look for undefined behaviour takes three times as long to compile.
WIDE = {"avx512.cpp"}
ONCE = "-Dalways_inline="  # a function that must be inlined would be compiled, with all its checks, wherever it is called
PLAIN = ["-DWITHOUT_VECTORS"]  # what other compilers get; it is compiled in a few seconds and has the same threads
RUNS = [  # sanitizer, folder of the loops, flags, and the rounds of each program, which shares what was compiled with the others
    ("address,undefined", LOOPS / "spmm", [], {"spmm_check": 300, "conv_check": 200}),
    ("address,undefined", LOOPS / "spmm", PLAIN, {"spmm_check": 300}),
    ("address,undefined", LOOPS, [], {"loops_check": 60}),
    ("address,undefined", LOOPS, PLAIN, {"loops_check": 60}),
    ("thread", LOOPS / "spmm", [*PLAIN, "-O1"], {"spmm_check": 30}),
    ("thread", LOOPS / "spmm", ["-DPLAIN_VECTORS_ALONE"], {"conv_check": 5}),
    ("thread", LOOPS, PLAIN, {"loops_check": 30}),
]


def build(folder: Path, loops: Path, checks: Iterable[str], flags: Sequence[str]) -> list[Path]:
    """Programs of this folder with the loops that they run."""
    programs = [Path(__file__).parent / f"{check}.cpp" for check in checks]
    sources = [*(path for path in loops.glob("*.cpp") if path.name != "module.cpp"), *programs]

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        bare = ["-fno-sanitize=all"] * ("-fsanitize=thread" not in flags)
        checks = ["-O2", *bare] * (source in programs)  # most of their time they compute what the loops should give
        less = ["-fno-sanitize=undefined"] * (source.name in WIDE)
        subprocess.run(["g++", *flags, *checks, *less, "-c", str(source), "-o", str(target)], check=True, capture_output=True, text=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    shared, mains = objects[: -len(programs)], objects[-len(programs) :]
    for main, program in zip(mains, programs, strict=True):
        command = ["g++", *flags, *shared, main, "-o", str(folder / program.stem), "-ldl"]  # what both define is taken from the loops
        subprocess.run(command, check=True, capture_output=True, text=True)
    return [folder / program.stem for program in programs]


@pytest.mark.parametrize(("sanitizer", "loops", "more", "rounds"), RUNS)
def test_sanitizers_find_nothing(sanitizer: str, loops: Path, more: list[str], rounds: dict[str, int], tmp_path: Path) -> None:
    checks = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    flags = ["-std=c++17", "-O0", ONCE, "-DSANITIZED", *checks, "-pthread", *NO_AVX512, *more]
    for program, count in zip(build(tmp_path, loops, rounds, flags), rounds.values(), strict=True):
        done = subprocess.run([str(program), str(count)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "instructions 0" in done.stdout
        ((allocations, threads),) = re.findall(r"(\d+) allocations and (\d+) threads refused", done.stdout)
        assert min(int(allocations), int(threads)) > 0
