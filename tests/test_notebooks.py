"""What a notebook may be: executed from top to bottom, readable on a laptop's screen, small, and
without a second copy of anything. `make notebooks` executes them."""

import ast
import re

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"/(home|root|tmp|usr|opt|work|Users|private|var)/|[A-Z]:\\")


def signatures(nodes):
    """(name, parameters) of each function among these nodes, and (name, bases) of each class.

    The names alone would not do: a notebook may use one of them for something else."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            found.add((node.name, ast.unparse(node.args)))
        elif isinstance(node, ast.ClassDef):
            found.add((node.name, ", ".join(map(ast.unparse, node.bases))))
    return found


def signatures_in_repository():
    found = set()
    for path in ROOT.glob("*.py"):
        found |= signatures(ast.parse(path.read_text(encoding="utf-8")).body)
    return found


def signatures_in_notebook(notebook):
    found = set()
    for cell in code_cells(notebook):
        python = re.sub(r"(?m)^\s*[%!].*$", "", cell.source)     # without IPython's own lines
        found |= signatures(ast.walk(ast.parse(python)))
    return found


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_lines(cell):
    return [line for line in cell.source.splitlines() if line.strip()]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_there_are_notebooks_to_look_at():
    assert len(NOTEBOOKS) >= 4


def test_is_short(notebook):
    lines = [code_lines(cell) for cell in code_cells(notebook)]
    assert len(notebook.cells) <= 30
    assert sum(map(len, lines)) <= 260
    assert max(map(len, lines)) <= 35


def test_code_fits_the_screen(notebook):
    for cell in code_cells(notebook):
        for line in code_lines(cell):
            assert len(line) <= 100, line


def test_all_find_the_repository_in_the_same_way():
    first = {code_cells(nbformat.read(path, as_version=4))[0].source for path in NOTEBOOKS}
    assert len(first) == 1
    assert "while" not in first.pop()       # a loop would not end outside the repository


def test_copies_nothing_from_the_stage_files(notebook):
    defined = signatures_in_notebook(notebook)
    assert not defined & signatures_in_repository()
    assert len(defined) <= 4


def test_opens_with_a_question_and_a_file_and_ends_with_a_check(notebook):
    first, last = notebook.cells[0].source, notebook.cells[-1].source
    assert "?" in first
    assert any(f"`{path.name}`" in first for path in ROOT.glob("*.py"))
    assert re.search(r"(?m)^assert ", last)


def test_names_two_things_to_change(notebook):
    texts = [cell.source for cell in notebook.cells if "Two things to change" in cell.source]
    assert len(texts) == 1
    exercises = texts[0].split("Two things to change")[1]
    assert len(re.findall(r"(?m)^[*-] ", exercises)) == 2


def test_was_executed_once_from_top_to_bottom(notebook):
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))


def test_outputs_are_small_and_show_neither_errors_nor_machine_paths(notebook):
    for cell in code_cells(notebook):
        assert "execution" not in cell.metadata
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            data = dict(output.get("data", {}))
            image = data.pop("image/png", "")
            assert len(image) * 3 / 4 < 100_000         # base64: four letters for three bytes
            text = output.get("text", "") + "".join(str(value) for value in data.values())
            assert not MACHINE_PATH.search(text)


def test_explains_every_figure_right_below_it(notebook):
    below = [*notebook.cells[1:], None]
    for cell, next_cell in zip(notebook.cells, below, strict=True):
        has_figure = any("image/png" in output.get("data", {})
                         for output in cell.get("outputs", []))
        if has_figure:
            assert next_cell is not None
            assert next_cell.cell_type == "markdown"
