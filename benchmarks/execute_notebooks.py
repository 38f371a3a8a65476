"""Execute the notebooks in place, without time stamps, so that only what changed differs."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

FOLDER = Path(__file__).parent.parent / "notebooks"

for path in tqdm(sorted(FOLDER.glob("*.ipynb")), desc="notebooks", disable=None):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(FOLDER)}}, record_timing=False).execute()
    nbformat.write(notebook, path)
