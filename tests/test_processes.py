"""Several processes: two of them, joined by gloo, are one process with the same batch size."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import CPU, ROOT, TINY_SFT

import discriminator
import dpo
import gan
import ppo
import reward_model
import sft
from common import read_jsonl
from model import load_model

STAGES = dict(sft=sft, reward_model=reward_model, discriminator=discriminator, dpo=dpo, ppo=ppo, gan=gan)
STEPS = dict(max_steps=3, warmup_steps=1, batch_size=8, eval_interval=2, log_interval=1, **CPU)
ROLLOUTS = dict(max_steps=3, warmup_steps=1, batch_size=8, minibatch_size=4, max_new_tokens=6, sample_interval=2, **CPU)
RUNS = {     # a name: (stage, options, fields of its data)
    "sft": ("sft", TINY_SFT | STEPS, "completion"),
    "reward_model": ("reward_model", STEPS, "chosen rejected"),
    "discriminator": ("discriminator", STEPS, "completion"),
    "dpo": ("dpo", STEPS, "chosen rejected"),
    "ppo": ("ppo", ROLLOUTS | dict(kl_target=1.0, ppg_interval=2, ppg_epochs=1), ""),
    "ppo_rloo": ("ppo", ROLLOUTS | dict(baseline="rloo", group_size=2), ""),
    "gan": ("gan", ROLLOUTS | dict(d_batch_size=4, d_steps=1), "completion"),
    "gan_gumbel": ("gan", ROLLOUTS | dict(d_batch_size=4, estimator="gumbel"), "completion"),
}
TEXTS = dict(completion=" I lost it.", chosen=" yes", rejected=" no")

# What torchrun starts: runs of all stages, one after the other.
RANK = """
import json, sys, torch
torch.set_num_threads(1)
import discriminator, dpo, gan, ppo, reward_model, sft
from common import InputError, Options, all_mean, gather, rank, setup, shard, world_size
setup(Options(device="cpu"))
five = torch.arange(5)
assert world_size() == 2 and shard(five[1:]).tolist() == [rank() + 1, rank() + 3] and all_mean(torch.tensor(rank())) == 0.5
assert torch.equal(gather(shard(five, even=False), 5), five)
try:
    shard(five)
except InputError as error:
    print(error)
for stage, options in json.loads(sys.argv[1]):
    module = {"sft": sft, "reward_model": reward_model, "discriminator": discriminator, "dpo": dpo, "ppo": ppo, "gan": gan}[stage]
    module.train(module.Config(**options))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of all RUNS in one process, and of the same in two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    starts = dict(init=str(one / "sft/ckpt.pt"), reward=str(one / "reward_model/ckpt.pt"), disc=str(one / "discriminator/ckpt.pt"))
    configs = []
    for name, (stage, options, columns) in RUNS.items():
        data = one / f"{name}.jsonl"        # texts of all lengths, 41 of them: not even what is held out is even
        data.write_text("".join(json.dumps({"prompt": "About a banker:"} | {c: TEXTS[c] * (1 + i % 3 + i % 2 * (c == "rejected")) for c in columns.split()}) + "\n"
                                for i in range(41)))
        fields = {field for field in STAGES[stage].Config.__dataclass_fields__ if stage != "sft"}
        options = options | {field: path for field, path in starts.items() if field in fields} | {"data": str(data)}
        STAGES[stage].train(STAGES[stage].Config(out_dir=str(one / name), **options))
        configs.append((stage, options | {"out_dir": str(two / name)}))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python", sys.executable,
                           "-c", RANK, json.dumps(configs)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return one, two, done


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(runs, name):
    """The same metrics, all of them, and the same weights, up to the rounding of sums."""
    one, two, _ = runs
    rows, again = (read_jsonl(folder / name / "metrics.jsonl") for folder in (one, two))
    assert len(rows) == len(again)
    for row, other in zip(rows, again, strict=True):
        del row["seconds"], other["seconds"]
        losses = {name for name in row if "loss" in name or "nats" in name}
        assert {name: other[name] for name in losses} == pytest.approx({name: row[name] for name in losses}, rel=1e-5, abs=1e-5)
        assert other == pytest.approx(row, rel=1e-4, abs=1e-4)
    assert (one / name / "samples.txt").read_text() == (two / name / "samples.txt").read_text()
    a, b = (torch.load(folder / name / "ckpt.pt", weights_only=True)["model"] for folder in (one, two))
    start = load_model(one / "sft" / "ckpt.pt").state_dict()
    for key in a:
        if key in ("gain", "shift"):        # one over how much the scores of this nearly untrained model differ
            assert b[key] == pytest.approx(a[key], rel=1e-2)
        else:
            torch.testing.assert_close(b[key], a[key], rtol=0, atol=2e-4)
    assert name in ("sft", "reward_model", "discriminator") or any((a[key] - start[key]).abs().max() > 1e-4 for key in a)


def test_only_one_of_them_speaks(runs):
    _, two, done = runs
    assert done.stdout.count("a batch of 5 cannot be dealt out to 2 processes") == 1
    assert done.stdout.count("sft: ") == 1 and done.stdout.count("reward_model: ") == 1
    assert not list(two.glob("*/*.tmp")) and not list(two.glob("*/state.pt"))
