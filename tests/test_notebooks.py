"""What a notebook may be: short, executed from top to bottom, small, and without a second copy of anything. `make notebooks` executes them."""

import ast
import re

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DEFINED = {node.name for path in ROOT.glob("*.py") for node in ast.parse(path.read_text(encoding="utf-8")).body
           if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def definitions(source):
    """Names of the functions and classes that a cell defines; IPython's own lines (%cd, !ls) are no Python."""
    python = re.sub(r"(?m)^\s*[%!].*$", "", source)
    return {node.name for node in ast.walk(ast.parse(python)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_there_are_notebooks_to_look_at():
    assert len(NOTEBOOKS) >= 4


def test_is_short(notebook):
    lines = [[line for line in cell.source.splitlines() if line.strip()] for cell in code_cells(notebook)]
    assert len(notebook.cells) <= 30
    assert sum(map(len, lines)) <= 150 and max(map(len, lines)) <= 25
    assert max(len(line) for cell in lines for line in cell) <= 140


def test_copies_nothing_from_the_stage_files(notebook):
    defined = [name for cell in code_cells(notebook) for name in definitions(cell.source)]
    assert not DEFINED & set(defined)
    assert len(defined) <= 3


def test_opens_with_a_question_and_a_file_and_ends_with_a_check(notebook):
    first, last = notebook.cells[0].source, notebook.cells[-1].source
    assert "?" in first and any(f"`{path.name}`" in first for path in ROOT.glob("*.py"))
    assert re.search(r"(?m)^assert ", last)


def test_names_two_things_to_change(notebook):
    text = next(cell.source for cell in notebook.cells if "Two things to change" in cell.source)
    assert len(re.findall(r"(?m)^[*-] ", text.split("Two things to change")[1])) == 2


def test_was_executed_once_from_top_to_bottom(notebook):
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))


def test_outputs_are_small_and_show_neither_errors_nor_machine_paths(notebook):
    for cell in code_cells(notebook):
        assert "execution" not in cell.metadata
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
            assert len(output.get("data", {}).get("image/png", "")) * 3 / 4 < 100_000      # base64: four letters for three bytes
            text = output.get("text", "") + "".join(str(value) for kind, value in output.get("data", {}).items() if kind != "image/png")
            assert not re.search(r"/(home|root|tmp|usr|opt|work|Users|private|var)/|[A-Z]:\\", text)


def test_explains_every_figure_right_below_it(notebook):
    for cell, below in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            assert below is not None and below.cell_type == "markdown"
