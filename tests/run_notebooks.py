"""
Executes notebooks, each in a kernel of its own, and keeps of the outputs what a reader wants: no progress bars, no times, no versions.

    python tests/run_notebooks.py                            all of notebooks/, in place
    python tests/run_notebooks.py notebooks/4_ppo.ipynb      one
    TINY=1 python tests/run_notebooks.py                     all, in seconds: they learn nothing, and the files stay as they are
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"

if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        notebook, started = nbformat.read(path, as_version=4), time.time()
        NotebookClient(notebook, timeout=None, startup_timeout=900, kernel_name="python3", record_timing=False,
                       coalesce_streams=True, resources={"metadata": {"path": FOLDER}}).execute()
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]      # the progress bars
        notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
        if not os.environ.get("TINY"):
            nbformat.write(notebook, path)
        print(f"{path.name:24} {time.time() - started:5.1f} s", flush=True)
