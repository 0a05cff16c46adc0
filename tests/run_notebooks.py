"""
Executes notebooks, each in a kernel of its own, and keeps the outputs that a reader wants:
no progress bars, no times, no versions.

    python tests/run_notebooks.py                           all of notebooks/, in place
    python tests/run_notebooks.py notebooks/4_ppo.ipynb     one
    TINY=1 python tests/run_notebooks.py                    all, unchanged, to see that they run
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def execute(notebook):
    """Runs all cells from top to bottom. Raises CellExecutionError where one fails."""
    os.environ["STATIC"] = "1"      # figures in place of sliders, which nobody can move here
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=None,               # training takes as long as it takes
        startup_timeout=900,        # seconds; on a busy machine a kernel starts slowly
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": FOLDER}})
    client.execute()


def clean(notebook):
    """Removes what changes from one execution to the next or from one machine to another."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_kept(output)]
    notebook.metadata = {
        "kernelspec": notebook.metadata.kernelspec,
        "language_info": {"name": "python"},
    }


def is_kept(output):
    """Not progress bars, which go to stderr, and not sliders, which need a kernel."""
    is_widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return output.get("name") != "stderr" and not is_widget


def main(paths):
    in_place = not os.environ.get("TINY")
    for path in paths:
        started = time.time()
        notebook = nbformat.read(path, as_version=4)
        execute(notebook)
        clean(notebook)
        if in_place:
            nbformat.write(notebook, path)
        print(f"{path.name:24} {time.time() - started:5.1f} s", flush=True)


if __name__ == "__main__":
    named = [Path(name) for name in sys.argv[1:]]
    main(named or sorted(FOLDER.glob("*.ipynb")))
