"""Kills each stage at random moments and gives the same command again: the end must be the same.

    python tests/kill_check.py             20 kills a stage, about ten minutes on two idle cores
    python tests/kill_check.py 3 sft dpo   3 kills of each of these

A child process trains a tiny model and gets SIGKILL, which nothing can catch, after a random
fraction of the time that a whole run takes. The same command then goes on. Weights, metrics (but
for times), and samples are compared with a run in one go, bit for bit; no temporary file may stay.
"""

import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import TINY_SFT, records, tiny, without_times  # noqa: E402

import discriminator  # noqa: E402
import dpo  # noqa: E402
import gan  # noqa: E402
import ppo  # noqa: E402
import reward_model  # noqa: E402
import sft  # noqa: E402

STAGES = {stage.__name__: stage for stage in (sft, reward_model, discriminator, ppo, dpo, gan)}


def run(name, config):
    """What a child process does."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    STAGES[name].train(config)


def start(name, config):
    process = multiprocessing.Process(target=run, args=(name, config))
    process.start()
    return process


def outcome(folder):
    """All that a run leaves, without times."""
    weights = {f"{path.name}.{name}": tensor for path in folder.glob("*.pt")
               for name, tensor in torch.load(path, weights_only=True)["model"].items()}
    return without_times(folder), (folder / "samples.txt").read_bytes(), weights


def same(a, b):
    return (a[:2] == b[:2] and a[2].keys() == b[2].keys()
            and all(torch.equal(a[2][name], b[2][name]) for name in a[2]))


def config_of(name, root, folder):
    starts = dict(sft_ckpt=root / "sft/ckpt.pt", reward=root / "reward_model/ckpt.pt",
                  disc=root / "discriminator/ckpt.pt")
    starts = {key: str(path) for key, path in starts.items()}
    texts = [{"prompt": "About a banker:", "completion": f" yes {i}", "chosen": f" yes {i}",
              "rejected": " no"} for i in range(40)]
    sizes = dict(data=records(root / "texts.jsonl", texts), max_steps=12, eval_interval=3,
                 sample_interval=3, lr=1e-3)
    if name == "sft":
        starts["sft_ckpt"] = ""                 # it starts from random weights
        sizes |= {key: TINY_SFT[key] for key in ("n_layer", "n_inner", "n_head", "n_embd")}
    if name == "dpo":
        del starts["reward"]                    # with which it would sample pairs of its own
    return tiny(STAGES[name], folder, **starts, **sizes)


def main(n_kills=20, *names):
    rng, failures = random.Random(0), 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name in STAGES:
            began = time.time()
            start(name, config_of(name, root, root / name)).join()
            seconds, whole = time.time() - began, outcome(root / name)
            if names and name not in names:
                continue
            equal = resumed = 0
            for i in range(int(n_kills)):
                folder = root / f"{name}-{i}"
                process = start(name, config_of(name, root, folder))
                process.join(rng.uniform(0, seconds))
                process.kill()
                process.join()
                resumed += (folder / "state.pt").exists()
                start(name, config_of(name, root, folder)).join()
                left = [path.name for path in folder.iterdir() if path.suffix == ".tmp"]
                equal += same(outcome(folder), whole) and not left
            failures += int(n_kills) - equal
            print(f"{name:14} {n_kills} kills in runs of {seconds:.1f} s: {equal} ended equal, "
                  f"{resumed} of them from a saved state", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")    # not on Windows; no child imports torch again
    main(*sys.argv[1:])
