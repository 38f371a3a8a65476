"""Execute the notebooks in place, without time stamps, so that a difference between two versions is a difference of contents.

python benchmarks/execute_notebooks.py              # all
python benchmarks/execute_notebooks.py 02 04        # those whose names begin so
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

FOLDER = Path(__file__).parent.parent / "notebooks"
os.environ["TQDM_DISABLE"] = "1"  # in the kernels: no progress bars among the outputs

chosen = [path for path in sorted(FOLDER.glob("*.ipynb")) if path.name.startswith(tuple(sys.argv[1:]) or "")]
for path in tqdm(chosen, desc="notebooks", disable=False):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(FOLDER)}}, record_timing=False).execute()
    nbformat.write(notebook, path)
