"""Every notebook runs from top to bottom on small models, and is committed as executed on the full ones."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import start_new_kernel

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" and cell.source.strip()]


@pytest.fixture(scope="module")
def kernel() -> Iterator[BlockingKernelClient]:
    """One kernel for all notebooks, because importing torch and transformers takes longer than most of them run."""
    environment = {**os.environ, "BLOCKPRUNE_SMALL": "1"}  # small models; `make notebooks` runs the full ones
    manager, client = start_new_kernel(startup_timeout=3600, cwd=str(FOLDER), env=environment)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, kernel: BlockingKernelClient) -> None:
    messages: list[dict[str, Any]] = []
    for source in ["%reset -f", *(cell.source for cell in code_cells(path))]:  # without the variables of the notebook before
        reply = kernel.execute_interactive(source, output_hook=messages.append, allow_stdin=False)["content"]
        assert reply["status"] == "ok", "\n".join([source, *reply["traceback"]])
    errors = [m["content"]["text"] for m in messages if m["msg_type"] == "stream" and m["content"]["name"] == "stderr"]
    assert not any("Warning" in text for text in errors), errors
    assert any("image/png" in m["content"]["data"] for m in messages if m["msg_type"] == "display_data"), "no picture"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_as_executed_with_something_to_see(path: Path) -> None:
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom: make notebooks"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = [output.data for output in outputs if "data" in output]
    assert any("image/png" in data or "<table" in data.get("text/html", "") for data in shown), "no picture and no table"
