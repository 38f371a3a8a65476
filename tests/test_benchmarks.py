"""The benchmarks run, tiny, and print the tables that the README quotes."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("prune.py", "blockprune"),
        ("masked_forward.py", "A masked Linear(256, 256)"),
        ("calibration.py", "gate_fisher"),
        ("obs.py", "billion"),
    ],
)
def test_a_benchmark_runs_tiny(script: str, said: str) -> None:
    done = subprocess.run([sys.executable, script, "--tiny"], cwd=FOLDER, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert sum(line.split()[:1] in (["1"], ["float32"], ["(4,"]) for line in done.stdout.splitlines()) >= 2


def test_the_quality_table_runs_on_one_cell_and_its_masks_are_timed(tmp_path: Path) -> None:
    options = ["--model", "minilm", "--calibration", "8", "--patterns", "32x32", "--sparsities", "0.5", "--save", str(tmp_path)]
    methods = ["magnitude", "SparseGPT", "OBS + budget + cluster"]
    command = [sys.executable, "quality.py", *options, "--methods", *methods]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("32x32")]
    assert [any(method in row and " 50.0%" in row for row in rows) for method in methods] == [True] * 3
    (found,) = tmp_path.glob("*OBS*")
    command = [sys.executable, "speed.py", "models", "--tiny", "--models", "encoder", "--masks", str(found)]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert "minilm, 32x32, 0.5, OBS + budget + cluster" in done.stdout


@pytest.mark.parametrize(("what", "said"), [("layers", "16x16"), ("models", "of the type")])
def test_the_speed_tables_run_tiny(what: str, said: str) -> None:
    command = [sys.executable, "speed.py", what, "--tiny", *["--roofline", "--bsr"][: 2 * (what == "layers")]]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(said) >= 2
