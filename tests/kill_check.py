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
from conftest import STAGES, TINY_SFT, records, starts_of, tiny, without_times  # noqa: E402


def run(name, config):
    """What a child process does."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    STAGES[name].train(config)


def start(name, config):
    process = multiprocessing.Process(target=run, args=(name, config))
    process.start()
    return process


def outcome(folder):
    """All that a run leaves, without times: names of files, metrics, samples, weights."""
    weights = {f"{path.name}.{name}": tensor.tolist() for path in folder.glob("*.pt")
               for name, tensor in torch.load(path, weights_only=True)["model"].items()}
    names = {path.name for path in folder.iterdir()}
    return names, without_times(folder), (folder / "samples.txt").read_bytes(), weights


def config_of(name, root, folder):
    texts = [{"prompt": "About a banker:", "completion": f" yes {i}", "chosen": f" yes {i}",
              "rejected": " no"} for i in range(40)]
    sizes = dict(data=records(root / "texts.jsonl", texts), max_steps=12, eval_interval=3,
                 sample_interval=3, lr=1e-3)
    starts = starts_of(root)
    if name == "sft":                           # it starts from random weights
        starts = {"sft_ckpt": ""}
        sizes |= {key: TINY_SFT[key] for key in ("n_layer", "n_inner", "n_head", "n_embd")}
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
                equal += outcome(folder) == whole
            failures += int(n_kills) - equal
            print(f"{name:14} {n_kills} kills in runs of {seconds:.1f} s: {equal} ended equal, "
                  f"{resumed} of them from a saved state", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")    # not on Windows; no child imports torch again
    main(*sys.argv[1:])
