"""Runs every notebook of this folder and keeps its outputs."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> nbformat.NotebookNode:
    """Returns the notebook at `path` with fresh outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return notebook


if __name__ == "__main__":
    for found in sorted(Path(__file__).parent.glob("*.ipynb")):
        nbformat.write(execute(found), found)
        print(f"executed {found.name}")
