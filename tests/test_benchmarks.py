"""The benchmarks run, tiny, and print the tables that the README quotes."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    ("script", "said"),
    [("prune.py", "blockprune"), ("masked_forward.py", "A masked Linear(256, 256)"), ("calibration.py", "gate_fisher")],
)
def test_a_benchmark_runs_tiny(script: str, said: str) -> None:
    done = subprocess.run([sys.executable, script, "--tiny"], cwd=FOLDER, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert sum(line.split()[:1] in (["1"], ["float32"], ["(4,"]) for line in done.stdout.splitlines()) >= 2
