"""The plumbing: errors, options, device, files, and a run that resumes."""

import dataclasses
import errno
import io
import json
import math
import subprocess
import sys
import zlib
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, ROOT, RUN_FILES, STAGES, refuses, steps_with, without_times
from matplotlib.figure import Figure

import common
import evaluate
import sample
from common import InputError, Options, Run, atomic_write, plot_curves, read_jsonl, write_jsonl
from data import Batches
from optim import adamw, optimizer_step

# -----------------------------------------------------------------------------
# programs and options

@pytest.mark.parametrize("error, code, message", [
    (InputError("x.jsonl:3: this is wrong"), 2, "error: x.jsonl:3: this is wrong"),
    (FileNotFoundError(2, "No such file", "x.jsonl"), 2, "error: x.jsonl: No such file"),
    (OSError(errno.ENOSPC, "No space left", "x"), 2, "error: x: No space left: make room, then "
                                                     "give the same command again"),
    (PermissionError(errno.EACCES, "Denied", "x"), 2, "error: x: Denied: change its permissions, "
                                                      "or choose another place"),
    (OSError(errno.EIO, "Broken", "x.tmp", None, "x"), 2, "error: x: Broken"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2,
     "error: the memory is full: lower --batch_size (or --minibatch_size)"),
    (MemoryError(), 2, "error: the memory is full: lower --batch_size (or --minibatch_size)"),
    (KeyboardInterrupt(), 130, "stopped; the same command resumes from the last saved state")])
def test_an_error_is_one_sentence_and_an_exit_code(capsys, error, code, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        common.command_line(main)
    assert stop.value.code == code and capsys.readouterr().err == f"{message}\n"


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="size of tensor"):
        common.command_line(lambda: torch.ones(2) + torch.ones(3))


def test_a_console_without_emoji_stops_no_run(monkeypatch):
    console = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(console, encoding="ascii"))
    common.command_line(lambda: print("an owl 😀", flush=True))
    assert console.getvalue().split() == [b"an", b"owl", b"\\U0001f600"]


@pytest.mark.parametrize("options, message", [
    (dict(device="gpu"), "--device is cuda, mps or cpu, not 'gpu'"),
    (dict(device="cuda"), "--device cuda: torch finds no such device here; leave the option out "
                          r"\(make SIZE=cpu\), or install a driver"),
    (dict(device="cpu:1"), "torch finds no such device here; leave the option out$"),
    (dict(dtype="float16"), "--dtype is float32 or bfloat16, not 'float16'"),
    (dict(seed=99999999999999999), "--seed must be from 0 to 4.29497e.09, not 9999")])
def test_options_that_every_stage_has(monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refuses(message, common.setup, Options(**options))


@pytest.mark.parametrize("module", [*STAGES.values(), evaluate, sample])
def test_every_number_has_a_range_and_is_checked(module):
    """So a new option is not forgotten."""
    ranges = {name: (low, high) for (low, high), names in common.RANGES.items()
              for name in names.split()}
    for field in dataclasses.fields(module.Config):
        if "int" in str(field.type) or "float" in str(field.type):
            low, high = ranges[field.name]
            beyond = [math.nan, math.inf] + [low - 1] * (low > -math.inf)
            beyond += [high + 1] * (high < math.inf)
            for value in beyond:
                value = (1, value) if "tuple" in str(field.type) else value
                with pytest.raises(InputError, match=f"--{field.name} must be "):
                    common.check_options(module.Config(**{field.name: value}))
    common.check_options(module.Config())
    # Nothing can be counted or divided by 0, and a negative rate learns the opposite.
    sizes, rates = "batch_size n_layer n_head samples n max_steps log_interval", "lr d_lr kl_coef"
    for value, names in ((0, sizes), (-1e-9, rates), (-1, "weight_decay warmup_steps")):
        for name in names.split():
            if hasattr(module.Config, name):
                refuses(f"--{name} must be", common.check_options, module.Config(**{name: value}))
    if hasattr(module.Config, "temperature"):
        common.check_options(module.Config(temperature=1e-3))


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

# -----------------------------------------------------------------------------
# files

def test_a_file_is_old_or_new_and_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("old", encoding="utf-8")
        assert not path.exists()
    full = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    for error, raised in ((KeyError(), KeyError), (full, InputError)):
        with pytest.raises(raised), atomic_write(path) as temporary:
            temporary.write_text("ne", encoding="utf-8")
            raise error
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


def test_a_checksum_is_that_of_the_whole_file(tmp_path):
    content = b"first" + bytes(2 ** 24)
    (tmp_path / "x").write_bytes(content)
    assert common.checksum_of_file(tmp_path / "x") == zlib.crc32(content)

# -----------------------------------------------------------------------------
# the folder of a run

@dataclasses.dataclass(slots=True)
class Config(Options):
    out_dir: str = ""
    data: str = ""
    init: str = ""
    max_steps: int = 10
    lr: float = 0.1
    READ_IF: ClassVar = []


def train(folder, stop_at=None, shift=0, **options):
    """A run with a part of every sort: model, optimizer, batches, rng, a tensor, global rng."""
    config = Config(out_dir=str(folder), **CPU | options)
    torch.manual_seed(config.seed)
    model, average = nn.Linear(3, 1), torch.zeros(1)
    optimizer, rng = adamw(model, config.lr), common.make_rng("cpu", config.seed)
    numbers = torch.arange(16)[:, None].repeat(1, 3) + shift    # an epoch ends with a saved state
    batches = Batches({"x": numbers}, 4, 99, "cpu", config.seed)
    run = Run("toy", config)
    for step in run.steps(4, model=model, optimizer=optimizer, batches=batches, rng=rng,
                          average=average):
        x = batches.next()["x"] / 20 + torch.rand(3, generator=rng)
        loss = F.dropout(model(x), 0.5).square().mean()
        optimizer_step(loss, model, optimizer, 1.0)
        average.mul_(0.9).add_(loss.detach())
        run.log(loss=loss.item(), average=average.item())
        run.write(f"sample {loss.item()}", [{"text": "a", "loss": loss.item()}] * 2)
        if step == stop_at:
            raise KeyboardInterrupt
    run.finish()
    return [p.tolist() for p in model.parameters()]


def files_of(folder):
    return {path.name for path in folder.iterdir()}


def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(tmp_path):
    """Bit for bit. Rows that are newer than the state are cut off and written again."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        train(stopped, stop_at=6)
    assert files_of(stopped) == RUN_FILES - {"ckpt.pt", "curves.png"} | {"state.pt"}
    state = torch.load(stopped / "state.pt")
    assert len(without_times(stopped)) == 7 and state["step"] == 4
    torch.save(state | {"seconds": 1000.0}, stopped / "state.pt")
    assert train(stopped) == train(whole) and without_times(stopped) == without_times(whole)
    assert files_of(stopped) == RUN_FILES - {"ckpt.pt"}
    rows = read_jsonl(stopped / "metrics.jsonl")
    assert steps_with(rows, "loss") == [*range(1, 11)]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert all((row["seconds"] >= 1000) == (row["step"] > 4) for row in rows)
    samples = [(folder / "samples.txt").read_text(encoding="utf-8") for folder in (stopped, whole)]
    rows = [read_jsonl(folder / "samples.jsonl") for folder in (stopped, whole)]
    assert rows[0] == rows[1] and steps_with(rows[0], "loss") == sorted([*range(1, 11)] * 2)
    assert samples[0] == samples[1] and samples[0].count("step ") == 10


def test_a_state_of_another_dtype_starts_over(tmp_path, monkeypatch, capsys):
    """Also where the option is left to the machine."""
    for has_bf16 in (False, True):
        monkeypatch.setattr(common, "supports_bf16", lambda device, found=has_bf16: found)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, stop_at=6, dtype="")
    assert "was saved with other options, or on other devices" in capsys.readouterr().out
    assert torch.load(tmp_path / "state.pt")["config"]["processes"] == 1


@pytest.mark.parametrize("n_gpus, has_mps, expected", [
    (2, True, "cuda"), (0, True, "mps"), (0, False, "cpu")])
def test_the_default_is_the_fastest_device(monkeypatch, n_gpus, has_mps, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    assert common.pick_device().type == expected


def test_config_json_says_what_was_used(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "supports_bf16", lambda device: True)
    train(tmp_path, device="cpu", dtype="")
    used = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert Config(**used) == Config(out_dir=str(tmp_path), device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("n_processes", [1, 2])
def test_tokens_per_second(tmp_path, monkeypatch, n_processes):
    """12 tokens in 5 seconds; none in a row without new ones, as of a validation; 12 that were
    read and 20 that were sampled in 4 seconds. In each process."""
    monkeypatch.setattr(common, "world_size", lambda: n_processes)
    monkeypatch.setattr(common.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(common, "wait_for_all", lambda: None)
    monkeypatch.setattr(common, "average_over_processes", lambda x: x)
    now = [100.0]
    monkeypatch.setattr(common.time, "time", lambda: now[0])
    batches = Batches({"x": torch.ones(20, 3)}, 4, 99, "cpu", 0)
    run = Run("toy", Config(out_dir=str(tmp_path), **CPU))
    steps = run.steps(4, batches=batches)
    next(steps)
    for n_batches, n_sampled, seconds in ((1, 0, 5), (0, 0, 7), (1, 20, 4)):
        for _ in range(n_batches):
            batches.next()
        run.sampled_tokens += n_sampled
        now[0] += seconds
        run.log(loss=1.0)
    rates = [row.get("tokens_per_second") for row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert rates == [round(n_processes * 12 / 5), None, n_processes * (12 + 20) / 4]


@pytest.mark.parametrize("changes, what", [
    (dict(lr=9.0), "options, or on other devices"), (dict(shift=1), "data"),
    (dict(data="new"), "data"), (dict(init="new"), "data")])
def test_other_options_or_data_start_over(tmp_path, capsys, changes, what):
    """The data are those of the batches and of all files that the options name."""
    options = {name: str(tmp_path / name) for name in ("data", "init")}
    for path in options.values():
        Path(path).write_text("old", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=6, **options)
    for name in options.keys() & changes.keys():
        Path(options[name]).write_text(changes[name], encoding="utf-8")
    train(tmp_path, **changes | options)
    assert f"was saved with other {what}: starting over" in capsys.readouterr().out
    assert steps_with(without_times(tmp_path), "loss") == [*range(1, 11)]


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", "parts"])
def test_a_damaged_or_foreign_state_is_named_and_kept(tmp_path, content):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=6)
    path = tmp_path / "state.pt"
    if content == "parts":                          # the options of another version of a stage
        torch.save(torch.load(path) | {"parts": {}}, path)
    else:
        path.write_bytes(content)
    before = path.read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    refuses("state.pt is damaged, .*: delete it to start over", train, tmp_path)
    assert (path.read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()) == before


def test_a_state_that_cannot_be_read_now_is_not_called_damaged(tmp_path):
    (tmp_path / "state.pt").mkdir()
    with pytest.raises(OSError):
        train(tmp_path)


def test_no_run_writes_over_what_it_starts_from(tmp_path):
    init = str(tmp_path / "ckpt.pt")
    refuses("ckpt.pt would be written over", train, tmp_path / "a" / "..", init=init)
    train(tmp_path / "a", init=init)


HOLD = "import sys, common; common.hold(sys.argv[1]); print(flush=True); input()"


def test_a_second_run_in_the_folder_is_refused_while_the_first_is_alive(tmp_path):
    """Killed, it lets go. Its files stay as they are."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        refuses("another run is writing to .*: wait for its end", train, tmp_path)
        assert path.read_text(encoding="utf-8") == "{}\n"
        other.kill()
    train(tmp_path)
    assert str(path) not in common.held             # the next one need not wait for a notebook


@pytest.mark.parametrize("name, value, options, advice", [
    ("loss", math.nan, {}, "the steps may be too large: try a lower --lr$"),
    ("loss", math.inf, dict(dtype="bfloat16"), "try a lower --lr, or --dtype float32$"),
    ("loss", math.inf, dict(lr=0.0), "the weights have not moved"),
    ("score", math.nan, {}, "what gives the scores gives numbers that are not finite")])
def test_the_advice_fits_a_number_that_is_not_finite(tmp_path, name, value, options, advice):
    run = Run("toy", Config(out_dir=str(tmp_path), **CPU | options))
    next(run.steps(4))
    with pytest.raises(InputError, match=f"toy: {name} is {value} at step 1: .*{advice}"):
        run.log(grad_norm=0.1, **{name: value})


def test_weights_that_are_not_finite_are_named_before_training(tmp_path):
    model = nn.Linear(2, 2)
    model.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match="toy: the policy has weights that are not finite"):
        next(Run("toy", Config(out_dir=str(tmp_path), **CPU)).steps(4, policy=model))


def test_curves_of_metrics_that_come_at_different_steps(tmp_path, monkeypatch):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: figures.append(figure)
                        or savefig(figure, *args, **options))
    rows = [{"step": i, "seconds": 1.0, "loss": 2.0, f"m{i % 5}": 1.0} for i in range(9)]
    for name, content in (("curves", rows), ("none", [])):
        write_jsonl(tmp_path / "metrics.jsonl", content)
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / f"{name}.png", "toy")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    steps = {axis.get_title(): [*axis.lines[0].get_xdata()] for axis in figures[0].axes[:6]}
    assert steps["loss"] == [*range(9)] and steps["m1"] == [1, 6] and steps["m4"] == [4]
    assert not (tmp_path / "none.png").exists()
