"""Mutilates inputs at random: each must be refused in one sentence, or give a right result.

    python tests/mutilate_check.py          500 inputs, about half an hour on two slow cores
    python tests/mutilate_check.py 100

Inputs are records (JSONL), checkpoints, saved states, the lexicon, and options; a change is bytes
cut off, flipped, doubled, or replaced, or another number. Counted are: refused (InputError, or
exit code 2 of the command line), run (all numbers finite), and failures: any other exception,
results that are not finite, a temporary file, or an input that is not what it was.
"""

import collections
import contextlib
import io
import math
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from conftest import TINY_SFT, pairs, tiny  # noqa: E402

import common  # noqa: E402
import dpo  # noqa: E402
import sft  # noqa: E402
from puns import World  # noqa: E402

OPTIONS = ["batch_size", "max_steps", "lr", "warmup_steps", "beta", "grad_clip", "eval_interval",
           "log_interval", "seed", "label_smoothing", "weight_decay", "device", "dtype", "loss",
           "lora", "trainable"]
VALUES = ["0", "-1", "1", "2", "1e9", "nan", "inf", "-inf", "", "x", "1e-9", "99999999999999999999",
          "0.5", "last:1", "last:99", "cuda", "cpu:7", "bfloat16", "ipo", "\u00e9", "1,5"]


def mutilate(rng, content):
    """Bytes with one to three random injuries."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(content) + 1)
        j = min(len(content), i + rng.choice([1, 1, 2, 10, 1000]))
        noise = bytes(rng.choice(b'{}[]":,\\\n\r\t\0\xff\xef\xbb\xbfaN0e- ') for _ in range(j - i))
        content[i:j] = rng.choice([b"", noise, content[i:j] * 2, bytes(reversed(content[i:j]))])
        if rng.random() < 0.1:
            del content[i:]
    return bytes(content)


def attempt(rng, kind, root):
    """Mutilates one input and runs what reads it. Returns what must be there, as it was."""
    folder, args = root / "run", []
    shutil.rmtree(folder, ignore_errors=True)
    paths = {"records": root / "pairs.jsonl", "checkpoint": root / "sft/ckpt.pt"}
    if kind == "state":
        shutil.copytree(root / "stopped", folder)
        paths["state"] = folder / "state.pt"
    if kind == "lexicon":
        paths["lexicon"] = rng.choice(sorted((root / "lexicon").glob("*.txt")))
    if kind == "options":
        args = [word for _ in range(rng.randint(1, 2))
                for word in (f"--{rng.choice(OPTIONS)}", rng.choice(VALUES))]
    else:
        whole = paths[kind].read_bytes()
        paths[kind].write_bytes(mutilate(rng, whole))
    before = {path: path.read_bytes() for path in paths.values()}
    try:
        if kind == "lexicon":
            World(root / "lexicon").corpus(20, seed=0)
        else:
            default = tiny(dpo, folder, root / "sft/ckpt.pt", data=str(root / "pairs.jsonl"))
            config = tyro.cli(dpo.Config, args=args, default=default)
            config.max_steps = min(config.max_steps, 3)         # 1e9 steps are a right option
            dpo.train(config)
            rows = common.read_jsonl(folder / "metrics.jsonl")
            assert all(math.isfinite(x) for row in rows for x in row.values()), rows
            before.pop(paths.get("state"), None)                # a run that is done needs none
        return "run"
    except (common.InputError, SystemExit) as error:
        assert str(error) not in ("0", ""), "it stopped without a word"
        return "refused"
    finally:
        assert all(path.read_bytes() == content for path, content in before.items()), "lost"
        assert not list(root.rglob("*.tmp")), "a temporary file is left"
        if kind != "options":
            paths[kind].parent.mkdir(exist_ok=True)
            paths[kind].write_bytes(whole)


def main(n=500):
    rng, counts, failures = random.Random(0), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        sft.train(sft.Config(out_dir=str(root / "sft"), **TINY_SFT | dict(max_steps=2)))
        shutil.copytree(ROOT / "lexicon", root / "lexicon")
        config = tiny(dpo, root / "run", root / "sft/ckpt.pt", data=pairs(root))
        finish, common.Run.finish = common.Run.finish, lambda run: None
        dpo.train(config)                                       # as if it were killed at its end
        common.Run.finish = finish
        shutil.copytree(root / "run", root / "stopped")
        for i in range(int(n)):
            kind = ["records", "checkpoint", "state", "lexicon", "options"][i % 5]
            try:
                with contextlib.redirect_stderr(io.StringIO()), \
                        contextlib.redirect_stdout(io.StringIO()):
                    result = attempt(rng, kind, root)
                counts[kind, result] += 1
            except Exception:
                failures += 1
                print(f"input {i}, {kind}:\n{traceback.format_exc()}", flush=True)
    for (kind, result), count in sorted(counts.items()):
        print(f"{kind:10} {result:8} {count}")
    print(f"{n} inputs, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
