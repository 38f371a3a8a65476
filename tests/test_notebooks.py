"""Every notebook runs from top to bottom on small models, and is committed as executed on the full ones."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def _code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


@pytest.fixture(scope="module")
def kernel() -> Iterator[AsyncKernelManager]:
    """One kernel for all notebooks, because importing torch and transformers takes longer than most of them run."""
    manager = AsyncKernelManager(kernel_name="python3")
    yield manager
    if manager.has_kernel:
        asyncio.run(manager.shutdown_kernel(now=True))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, kernel: AsyncKernelManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKPRUNE_SMALL", "1")  # small models; `make notebooks` runs the full ones
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))  # no variable of the notebook before
    client = NotebookClient(notebook, km=kernel, timeout=None, resources={"metadata": {"path": str(FOLDER)}})
    client.execute(cleanup_kc=False)
    client.kc.stop_channels()
    errors = [o.text for cell in _code(notebook) for o in cell.outputs if o.output_type == "stream" and o.name == "stderr"]
    assert not any("Warning" in text for text in errors), errors


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_as_executed_with_something_to_see(path: Path) -> None:
    cells = _code(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom: make notebooks"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = [output.data for output in outputs if "data" in output]
    assert any("image/png" in data or "<table" in data.get("text/html", "") for data in shown), "no picture and no table"
