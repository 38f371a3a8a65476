"""Every code block of the guides runs as printed, and prints what the block of text below it says."""

import contextlib
import doctest
import io
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks" / "guides"
GUIDES = sorted(FOLDER.glob("*.md"))
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def test_there_are_guides() -> None:
    assert {"index", "prune", "repair", "run_fast", "shrink", "adapters", "large_models", "distributed"} <= {path.stem for path in GUIDES}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:0 of .* became block-sparse")  # on a busy machine layers may be faster dense
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(transformers|peft)", "ignore::FutureWarning:(transformers|peft)")
@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_its_code_runs_and_prints_what_the_page_says(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = BLOCK.findall(path.read_text())
    assert blocks, "a guide shows code"
    for code, expected in blocks:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, path.name, "exec"), names)
        assert doctest.OutputChecker().check_output(expected, output.getvalue(), FLAGS), f"{code}\nprinted\n{output.getvalue()}"


def test_the_lines_in_the_table_of_methods_run() -> None:
    page = (FOLDER / "train.md").read_text()
    first, *_ = BLOCK.findall(page)
    table = page.partition("| method |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == 9
    for row in table:
        names: dict[str, object] = {}
        exec(compile(first[0], "train.md", "exec"), names)
        for code in re.findall(r"`([^`]*\([^`]*)`", row):
            if not code.startswith("sparsity="):
                exec(compile(code, row, "exec"), names)
