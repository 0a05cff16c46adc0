"""The plumbing: errors, device, files, and a run that resumes."""

import ast
import dataclasses
import io
import json
import math
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, ROOT

import common
from common import InputError, Options, Run, atomic_write, plot_curves, read_jsonl, write_jsonl
from data import Batches
from optim import adamw, optimizer_step

# -----------------------------------------------------------------------------
# programs and options

@pytest.mark.parametrize("error, code, message", [
    (InputError("x.jsonl:3: this is wrong"), 2, "error: x.jsonl:3: this is wrong"),
    (FileNotFoundError(2, "No such file", "x.jsonl"), 2, "error: x.jsonl: No such file"),
    (OSError("the disk is full"), 2, "error: the disk is full"),
    (KeyboardInterrupt(), 130, "stopped; the same command resumes from the last saved state")])
def test_an_error_is_one_sentence_and_an_exit_code(capsys, error, code, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        common.command_line(main)
    assert stop.value.code == code and capsys.readouterr().err == f"{message}\n"


def test_a_console_without_a_character_shows_its_escape(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr(sys, "stdout", console)
    common.command_line(lambda: print("naïve"))
    console.flush()
    assert console.buffer.getvalue() == b"na\\xefve\n"


@pytest.mark.parametrize("options, message", [
    (dict(device="gpu"), "--device is cuda, mps or cpu, not 'gpu'"),
    (dict(device="cuda"), "--device cuda: torch finds no such device here"),
    (dict(dtype="float16"), "--dtype is float32 or bfloat16, not 'float16'")])
def test_a_device_or_dtype_that_is_not_there(monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=message):
        common.setup(Options(**options))


@pytest.mark.parametrize("has_cuda, has_mps, expected", [
    (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_fastest_device_is_the_default(monkeypatch, has_cuda, has_mps, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(has_cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    assert common.pick_device().type == expected and common.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("dtype, has_bf16, expected", [
    ("float32", True, torch.float32), ("bfloat16", False, torch.bfloat16),
    ("", True, torch.bfloat16), ("", False, torch.float32)])
def test_setup_seeds_and_computes_in_the_dtype(monkeypatch, dtype, has_bf16, expected):
    monkeypatch.setattr(common, "supports_bf16", lambda device: has_bf16)
    _, autocast = common.setup(Options(seed=5, device="cpu", dtype=dtype))
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


def test_processes_draw_different_numbers(monkeypatch):
    a, b = (torch.rand(3, generator=common.make_rng("cpu", 7)) for _ in range(2))
    monkeypatch.setattr(common, "rank", lambda: 1)
    c = torch.rand(3, generator=common.make_rng("cpu", 7))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_no_stage_asks_for_its_rank_or_architecture():
    """The word `arch` stands in no stage but sft.py, which makes the model."""
    for name in ("model", "sft", "reward_model", "discriminator", "ppo", "dpo", "gan"):
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(tree)}
        assert not names & {"rank", "world_size", "distributed"}, name
        assert "arch" not in names or name in ("model", "sft"), name

# -----------------------------------------------------------------------------
# files and progress

def test_a_file_is_old_or_new_and_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("old", encoding="utf-8")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("ne", encoding="utf-8")
        raise RuntimeError
    monkeypatch.setattr(common, "rank", lambda: 1)              # which writes nothing
    with atomic_write(path) as temporary:
        temporary.write_text("of another process", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "old" and list(path.parent.iterdir()) == [path]


def test_jsonl_comes_back(tmp_path):
    """One row a line, readable, whatever Unicode thinks a line is."""
    rows = [{"text": "naïve 😀\nline"}, {"text": "a\u2028b\x85c\x0bd"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert read_jsonl(tmp_path / "x.jsonl") == rows
    assert "naïve 😀" in (tmp_path / "x.jsonl").read_text(encoding="utf-8")


def test_a_progress_bar_yields_all_and_hides_where_there_is_little(capsys):
    assert list(common.progress_bar(range(3), "few", 3, at_least=4)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(common.progress_bar(range(4), "enough", 4, at_least=4)) == [0, 1, 2, 3]
    assert "enough" in capsys.readouterr().err

# -----------------------------------------------------------------------------
# the folder of a run

@dataclasses.dataclass(slots=True)
class Config(Options):
    out_dir: str = ""
    max_steps: int = 10
    lr: float = 0.1


def train(folder, stop_at=None):
    """A run with a part of every sort: model, optimizer, batches, rng, a tensor, global rng."""
    config = Config(out_dir=str(folder), **CPU)
    torch.manual_seed(config.seed)
    model, average = nn.Linear(3, 1), torch.zeros(1)
    optimizer, rng = adamw(model, config.lr), common.make_rng("cpu", config.seed)
    batches = Batches({"x": torch.arange(20)[:, None].repeat(1, 3)}, 4, 99, "cpu", config.seed)
    run = Run("toy", config)
    for step in run.steps(4, model=model, optimizer=optimizer, batches=batches, rng=rng,
                          average=average):
        x = batches.next()["x"] / 20 + torch.rand(3, generator=rng)
        loss = F.dropout(model(x), 0.5).square().mean()
        optimizer_step(loss, model, optimizer, 1.0)
        average.mul_(0.9).add_(loss.detach())
        run.log(loss=loss.item(), average=average.item())
        run.write(f"sample {loss.item()}")
        if step == stop_at:
            raise KeyboardInterrupt
    run.finish()
    return [p.tolist() for p in model.parameters()]


def metrics(folder):
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def files_of(folder):
    return {path.name for path in folder.iterdir()}


def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(tmp_path):
    """Bit for bit. Rows that are newer than the state are cut off and written again."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        train(stopped, stop_at=6)
    assert files_of(stopped) == {"config.json", "metrics.jsonl", "samples.txt", "state.pt"}
    assert len(metrics(stopped)) == 7 and torch.load(stopped / "state.pt")["step"] == 4
    assert train(stopped) == train(whole) and metrics(stopped) == metrics(whole)
    assert files_of(stopped) == {"config.json", "metrics.jsonl", "samples.txt", "curves.png"}
    assert [row["step"] for row in metrics(stopped)] == [*range(1, 11)]
    samples = [(folder / "samples.txt").read_text(encoding="utf-8") for folder in (stopped, whole)]
    assert samples[0] == samples[1] and samples[0].count("step ") == 10
    config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    assert Config(**config) == Config(out_dir=str(whole), **CPU)


def test_other_options_start_over(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=6)
    steps = Run("toy", Config(out_dir=str(tmp_path), lr=9.0, **CPU)).steps(4)
    assert next(steps) == 0 and metrics(tmp_path) == []
    assert "was saved with other options: starting over" in capsys.readouterr().out
    steps.close()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_stops_the_run(tmp_path, value):
    run = Run("toy", Config(out_dir=str(tmp_path), **CPU))
    steps = run.steps(4)
    next(steps)
    with pytest.raises(InputError, match=f"toy: loss is {value} at step 1: try a lower --lr"):
        run.log(lr=0.1, loss=value)
    steps.close()


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "rank", lambda: 1)
    train(tmp_path)
    assert not files_of(tmp_path)


def test_curves_of_metrics_that_come_at_different_steps(tmp_path):
    rows = [{"step": i, "seconds": 1.0, "loss": 2.0, f"m{i % 5}": 1.0} for i in range(9)]
    for name, content in (("curves", rows), ("none", [])):
        write_jsonl(tmp_path / "metrics.jsonl", content)
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / f"{name}.png", "toy")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "none.png").exists()
