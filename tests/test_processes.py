"""Two real processes, joined by gloo on loopback, train as one does with the joint batch.

They run every stage, on a T5, so this also shows that each stage takes another architecture than
GPT-2. What torchrun starts in each process is this file, too: see main()."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import (
    CPU,
    ROOT,
    RUN_FILES,
    STAGES,
    TINY_SFT,
    no_curves,
    records,
    same,
    starts_of,
    tiny,
)

import common
import sft
from data import Batches
from puns import world


def train_and_note(config, patch):
    """Runs a stage. Returns its records, batch by batch, its parameters, and its own losses."""
    batches, weights, losses = [], {}, []
    next_batch, log, finish = Batches.next, common.Run.log, common.Run.finish

    def next_and_note(self):
        batch = next_batch(self)
        batches.append([[i for i in row if i != self.pad_token_id]
                        for row in batch.get("completion", batch["prompt"]).tolist()])
        return batch

    def log_and_note(self, **metrics):
        losses.append(float(metrics["loss"]) if "loss" in metrics else None)
        log(self, **metrics)

    def finish_and_note(self):
        for part, value in self.parts.items():
            if isinstance(value, nn.Module):
                weights.update({f"{part}.{key}": p.data for key, p in value.named_parameters()})
        finish(self)

    patch.setattr(Batches, "next", next_and_note)
    patch.setattr(common.Run, "log", log_and_note)
    patch.setattr(common.Run, "finish", finish_and_note)
    patch.setattr(common, "plot_curves", no_curves)
    sys.modules[type(config).__module__].train(config)
    return batches, weights, losses


def configs(root, name="sft", **changes):
    """{stage: its Config} for all stages, each from the checkpoints of those before it."""
    files = {field: str(root / f"{field}.jsonl") for field in ("data", "val_data")}
    first = TINY_SFT | dict(arch="t5", max_steps=12, eval_interval=12, log_interval=1) | changes
    return {stage: tiny(STAGES[stage], root / stage, **starts_of(root), **files)
            for stage in STAGES} | {name: tiny(sft, root / name, "", **files | first)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(notes of sft in one process, notes of all stages in each of two, folder, output)."""
    root = tmp_path_factory.mktemp("processes")
    texts = {row["completion"]: row["prompt"] for row in world().corpus(160, seed=1)}
    rows = [{"prompt": prompt, "completion": text, "chosen": text, "rejected": text[:-1]}
            for text, prompt in texts.items()]
    records(root / "data.jsonl", rows[16:])
    records(root / "val_data.jsonl", rows[:16])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         __file__, str(root)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    notes = [torch.load(root / f"notes{n}.pt", weights_only=True) for n in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        together = train_and_note(configs(root, "one", batch_size=16)["one"], patch)
    return together, notes, root, done


def metrics(folder, name):
    rows = common.read_jsonl(folder / "metrics.jsonl")
    return [row[name] for row in rows if name in row]


def test_two_processes_share_the_work_of_one(runs):
    """At each step they read, together, the records of the joint batch, none of them twice.

    The loss falls as in one process; what is logged is the mean of both."""
    together, notes, root, _ = runs
    parts = [note["sft"][0] for note in notes]
    for joint, a, b in zip(together[0], *parts, strict=True):
        assert len(a) == len(b) == 8 and sorted(a + b) == sorted(joint)
    one, two = (metrics(root / name, "loss") for name in ("one", "sft"))
    assert len(one) == 12 and two == pytest.approx(one, rel=0.02) and two[-1] < 0.9 * two[0]
    a, b = (note["sft"][2] for note in notes)
    assert two == pytest.approx([(a[i] + b[i]) / 2 for i in range(12)], abs=1e-5) and a != b


@pytest.mark.parametrize("name", STAGES)
def test_both_end_with_the_same_weights(runs, name):
    _, notes, _, _ = runs
    (seen, weights, _), (other_seen, other_weights, _) = notes[0][name], notes[1][name]
    assert weights and same(weights, other_weights)
    assert len(seen) == len(other_seen) and seen != other_seen


def test_only_one_of_them_writes_and_speaks(runs):
    _, _, root, done = runs
    assert done.stdout.count("sft: ") == 1
    for name in STAGES:
        files = {path.name for path in (root / name).iterdir()} - {"discriminator.pt"}
        assert files == RUN_FILES
        steps = metrics(root / name, "step")
        assert steps == sorted(steps) and steps.count(1) == 1


def test_each_goes_on_with_random_numbers_of_its_own(runs):
    """A run that stopped after its second step draws what it would have drawn."""
    _, notes, _, _ = runs
    for note in notes:
        assert note["resumed"] == note["whole"][2:] and len(note["whole"]) == 4
    assert not set(notes[0]["whole"]) & set(notes[1]["whole"])


def draws(folder, n_steps=4):
    """What a run of 4 steps draws that is stopped after n_steps, or goes on."""
    config = sft.Config(out_dir=str(folder), max_steps=4, **CPU)
    rng, numbers = common.make_rng("cpu", config.seed), []
    for step in common.Run("toy", config).steps(1, rng=rng):
        if step == n_steps:
            break
        numbers.append(torch.rand(1, generator=rng).item())
    return numbers


def main(root):
    """What each process does: all stages, one after the other."""
    notes = {}
    for name, config in configs(root, batch_size=8).items():
        with pytest.MonkeyPatch.context() as patch:
            notes[name] = train_and_note(config, patch)
    notes["whole"] = draws(root / "whole")
    with pytest.MonkeyPatch.context() as patch:         # on a slow disk: the others must wait
        patch.setattr(os, "replace", lambda *paths, replace=os.replace: (
            time.sleep(0.2), replace(*paths)))
        draws(root / "stopped", n_steps=2)
    notes["resumed"] = draws(root / "stopped")
    torch.save(notes, root / f"notes{common.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
