"""Execute the notebooks: each .py here, written as an .ipynb with its outputs beside it.

    python notebooks/execute.py           # after a change of the .py
    python notebooks/execute.py --check   # only execute: as in CI

An error in a cell, a failed `assert` for instance, is the error of this script.
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent

for path in sorted(HERE.glob("*.py")):
    if path == Path(__file__).resolve():
        continue
    notebook = jupytext.read(path)
    client = NotebookClient(
        notebook,
        timeout=300,
        record_timing=False,
        coalesce_streams=True,
        # What C++ libraries log goes to the terminal and not into the notebook.
        extra_arguments=["--IPKernelApp.capture_fd_output=False"],
    )
    client.execute()
    # Nothing that changes from run to run, or that only the .py needs.
    notebook.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(notebook.cells):
        cell["id"], cell["metadata"] = f"cell-{number}", {}
    if "--check" not in sys.argv:
        nbformat.write(notebook, path.with_suffix(".ipynb"))
