"""What a notebook may be: executed from top to bottom, readable on a laptop's screen, without a
second copy of anything, and with exercises whose checks accept the solutions and nothing else.
`make notebooks` executes them."""

import ast
import re
import runpy
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import ROOT

from notebooks import bugs, nb
from reward_model import ranking_loss

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BUGS = ROOT / "notebooks/solutions/7_spot_the_bug.py"
SOLUTIONS = [path for path in sorted(BUGS.parent.glob("*.py")) if path != BUGS]
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


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_lines(cell):
    return [line for line in cell.source.splitlines() if line.strip()]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_code_fits_the_screen(notebook):
    for cell in code_cells(notebook):
        assert len(code_lines(cell)) <= 25
        assert all(len(line) <= 100 for line in code_lines(cell))


def test_all_find_the_repository_in_the_same_way(tmp_path, monkeypatch):
    assert len(NOTEBOOKS) >= 4
    first = {code_cells(nbformat.read(path, as_version=4))[0].source for path in NOTEBOOKS}
    assert len(first) == 1
    source = first.pop()
    monkeypatch.chdir(ROOT / "notebooks/solutions")
    exec(source, {})
    assert Path.cwd() == ROOT
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="open this notebook inside the wordplay folder"):
        exec(source, {})


def test_copies_nothing_from_the_stage_files(notebook):
    ours = set()
    for path in ROOT.glob("*.py"):
        ours |= signatures(ast.parse(path.read_text(encoding="utf-8")).body)
    for cell in code_cells(notebook):
        python = re.sub(r"(?m)^\s*[%!].*$", "", cell.source)     # without IPython's own lines
        assert not signatures(ast.walk(ast.parse(python))) & ours


def test_opens_with_a_question_and_a_file_and_checks_what_it_says(notebook):
    first = notebook.cells[0].source
    assert "?" in first
    assert any(f"`{path.name}`" in first for path in ROOT.glob("*.py"))
    assert any(re.search(r"(?m)^\s*assert ", cell.source) for cell in code_cells(notebook))


def test_was_executed_once_from_top_to_bottom(notebook):
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))


def test_outputs_are_small_and_show_neither_errors_nor_machine_paths(notebook):
    for cell in code_cells(notebook):
        assert "execution" not in cell.metadata
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
            data = dict(output.get("data", {}))
            image = data.pop("image/png", "")
            assert len(image) * 3 / 4 < 100_000         # base64: four letters for three bytes
            text = output.get("text", "") + "".join(str(value) for value in data.values())
            assert not MACHINE_PATH.search(text)


def test_explains_every_figure_right_below_it(notebook):
    below = [*notebook.cells[1:], None]
    for cell, next_cell in zip(notebook.cells, below, strict=True):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            assert next_cell and next_cell.cell_type == "markdown"

# -----------------------------------------------------------------------------
# exercises

@pytest.fixture(params=SOLUTIONS, ids=lambda path: path.stem)
def solution(request):
    """(the notebook, {name: object} of its solutions)"""
    notebook = nbformat.read(ROOT / f"notebooks/{request.param.stem}.ipynb", as_version=4)
    return notebook, runpy.run_path(str(request.param))


def exercises(notebook):
    """The source of each cell that checks a function of the reader."""
    return [cell.source for cell in code_cells(notebook)
            if re.search(r"(?m)^\s*check\(my_", cell.source)]


def run_exercise(source, capsys, monkeypatch, solved=None):
    """What an exercise prints, with its stubs or with the solutions in their place."""
    monkeypatch.chdir(ROOT)
    python = ast.parse(source)
    if solved is not None:      # without the stubs
        python.body = [node for node in python.body if not (
            getattr(node, "name", "") in solved and node.name.startswith("my_"))]
    torch.manual_seed(3)
    capsys.readouterr()
    exec(compile(python, "exercise", "exec"), {"torch": torch, "check": nb.check} | (solved or {}))
    return capsys.readouterr().out.splitlines()


def test_has_all_parts_of_a_lesson(solution):
    notebook, _ = solution
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert len(exercises(notebook)) >= 3
    assert text.count("<summary>Hint</summary>") >= 3
    assert text.count("**Guess") >= 2
    assert "**Time:**" in notebook.cells[0].source
    for part in ("## Summary", "**Papers:**"):
        assert part in notebook.cells[-1].source
    for cell in code_cells(notebook):
        assert all(len(line) <= 88 for line in code_lines(cell))


def test_the_checks_wait_for_the_reader_and_accept_the_solutions(solution, capsys, monkeypatch):
    notebook, solved = solution
    names = {name for name in solved if name.startswith("my_")}
    for source in exercises(notebook):
        lines = run_exercise(source, capsys, monkeypatch)
        assert lines and all(line.startswith("to do: ") for line in lines), lines
        lines = run_exercise(source, capsys, monkeypatch, solved)
        assert lines and all(line.startswith("right: ") for line in lines), lines
        names -= set(re.findall(r"def (my_\w+)", source))
    assert not names, "solutions of no exercise"


def detached(scores):
    return ranking_loss(scores.detach())


def reversed_order(scores):
    return ranking_loss(scores.flip(1))


def not_averaged(scores):
    return ranking_loss(scores) * torch.ones(len(scores))


def another_gradient(scores):
    return ranking_loss(scores.detach()) + scores.sum() - scores.detach().sum()


@pytest.mark.parametrize("mine, reason", [
    (detached, "there is none where one is expected, for a gradient"),
    (reversed_order, "the result is "),
    (not_averaged, "the result has shape (8,), not ()"),
    (another_gradient, "the gradient is "),
])
def test_check_says_what_is_wrong(mine, reason, capsys):
    nb.check(mine, ranking_loss, torch.randn(8, 2, generator=torch.Generator().manual_seed(1)))
    assert capsys.readouterr().out.startswith(f"wrong: {reason}")

# -----------------------------------------------------------------------------
# 7_spot_the_bug

def bug_notebook():
    return nbformat.read(ROOT / "notebooks/7_spot_the_bug.ipynb", as_version=4)


@pytest.mark.parametrize("n", range(1, 21))
def test_the_measurement_finds_the_bug_and_accepts_the_fix(n, capsys):
    fixes = runpy.run_path(str(BUGS))
    names = {name: fixes[name] for name in ("torch", "nn", "F", "ppo", "logprobs",
                                            "discriminator_loss")}
    source, = (cell.source for cell in code_cells(bug_notebook())
               if re.search(rf"(?m)^submit\(bug_{n}\)", cell.source))
    exec(source, names | {"submit": bugs.submit})
    assert capsys.readouterr().out.endswith("not fixed yet\n")
    bugs.submit(fixes[f"bug_{n}"])
    assert capsys.readouterr().out.endswith(": fixed\n")


def test_each_verdict_is_folded_and_says_where_the_bug_was_found():
    text = "\n".join(cell.source for cell in bug_notebook().cells)
    for n in range(1, 21):
        verdict = text.split(f"<details><summary>Verdict on bug {n}</summary>")[1]
        where = verdict.split("</details>")[0].split("*Where it was found:*")[1]
        assert "https://" in where or "invented" in where
