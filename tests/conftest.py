"""Helpers that the tests share: tiny models, tiny data, a tiny trained checkpoint. CPU, float32."""

import contextlib
import dataclasses
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import common
import discriminator
import dpo
import gan
import ppo
import reward_model
import sft
from common import InputError
from data import tokenizer
from discriminator import Discriminator
from model import ModelConfig, build_model
from puns import world

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)    # a second thread costs more than it brings to tiny tensors

CPU = dict(device="cpu", dtype="float32")
PAD, EOS = 12, 11           # of toy(): 12 tokens, 0 to 11, and the last one ends a response

# Three prompts with a response each, of different lengths.
PROMPT = torch.tensor([[PAD, PAD, 7, 8, 9], [2, 3, 4, 5, 6], [PAD, PAD, PAD, PAD, 10]])
RESPONSE = torch.tensor([[10, 1, EOS, PAD], [2, 3, 4, EOS], [5, EOS, PAD, PAD]])

VARIANTS = {"gpt": dict(arch="gpt"), "palm": dict(arch="palm"),
            "llama": dict(arch="llama", n_kv_head=2, rope_theta=500.0, norm_eps=1e-4),
            "qwen2": dict(arch="llama", n_kv_head=2, qkv_bias=True, tied=False),
            "t5-v1.0": dict(arch="t5", gated=False), "t5-v1.1": dict(arch="t5", gated=True)}

# Options of sft.Config. The model knows a little of what a sentence is afterwards.
TINY_SFT = dict(corpus_size=600, batch_size=16, grad_accum=1, max_steps=60, eval_interval=60,
                log_interval=20, n_layer=1, n_inner=0, n_head=2, n_embd=32, lr=1e-2,
                warmup_steps=5, **CPU)

STAGES = {stage.__name__: stage for stage in (sft, reward_model, discriminator, dpo, ppo, gan)}

# What every stage leaves in its folder.
RUN_FILES = {"ckpt.pt", "config.json", "metrics.jsonl", "samples.txt", "samples.jsonl",
             "curves.png"}


def ids(*rows):
    return torch.tensor(rows)


def close(a, b, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def toy(seed=0, **sizes):
    """A model of 12 tokens in eval mode: what an algorithm does with it is seen in milliseconds."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=PAD, eos_token_id=EOS, decoder_start_token_id=0, block_size=24,
                 n_layer=1, n_head=2, n_embd=32) | sizes
    return build_model(ModelConfig(**sizes)).eval()


def same(weights, others):
    """Two {name: tensor} are equal, bit for bit."""
    return weights.keys() == others.keys() and all(
        torch.equal(weights[name], others[name]) for name in weights)


def awake(model):
    """The model with weights large enough that all it does can be seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def disc_of(lstm=False, reads="tokens"):
    """A toy discriminator whose verdicts differ visibly."""
    disc = Discriminator(awake(toy()), lstm, reads).eval()
    torch.nn.init.normal_(disc.classifier.weight)
    return disc


def refuses(message, function, *args, **options):
    """The call raises an InputError: one sentence that matches the message."""
    with pytest.raises(InputError, match=message) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)


def off():
    """Stands in for `autocast`, and does nothing."""
    return contextlib.nullcontext()


def records(path, rows):
    """Writes rows (dicts) as a JSONL file. Returns its path as text, as options have it."""
    common.write_jsonl(path, rows)
    return str(path)


def owls(n, first=0):
    """Records of real texts that no tiny model writes: an owl, a few times, about n things."""
    return [{"prompt": world().prompt(thing), "completion": " An owl!" + " Oh!" * (i % 3)}
            for i, thing in enumerate(world().things[first:first + n])]


def without_times(folder):
    """The rows of a run's metrics.jsonl, without how fast it was."""
    return [{name: value for name, value in row.items()
             if name not in ("seconds", "tokens_per_second")}
            for row in common.read_jsonl(Path(folder) / "metrics.jsonl")]


def pairs(folder, n=20):
    """A file of n preferences: what is held out of it is measured in no time."""
    rows = [{"prompt": "About a banker:", "chosen": " yes" * (i + 1), "rejected": " no"}
            for i in range(n)]
    return records(Path(folder) / "pairs.jsonl", rows)


def options_of(module):
    return {field.name for field in dataclasses.fields(module.Config)}


def tiny(module, folder, sft_ckpt, **changes):
    """The Config of a stage for two tiny steps. Options that it does not read are left out."""
    sizes = dict(out_dir=str(folder), init=str(sft_ckpt), max_steps=2, warmup_steps=1,
                 batch_size=8, minibatch_size=4, d_batch_size=4, corpus_size=60, max_new_tokens=6,
                 eval_interval=2, log_interval=1, sample_interval=1, **CPU) | changes
    sizes = {name: value for name, value in sizes.items() if name in options_of(module)}
    return module.Config(**readable(module, sizes))


def readable(module, options):
    """The options without those that others make useless: a stage would refuse them."""
    defaults = {field.name: field.default for field in dataclasses.fields(module.Config)}
    for option, values, names in getattr(module.Config, "READ_IF", []):
        value = options.get(option, defaults[option])
        if value not in values and (values or value == ""):
            options = {name: value for name, value in options.items() if name not in names.split()}
    return options


def starts_of(root, disc="discriminator"):
    """The arguments of tiny() that name the checkpoints of the stages in a folder."""
    stages = dict(sft_ckpt="sft", reward="reward_model", disc=disc)
    return {name: str(root / stage / "ckpt.pt") for name, stage in stages.items()}


def copies(folder, sft_ckpt, *names):
    """Puts a checkpoint into the folder as if runs of these names had left it. Returns its path."""
    for name in names:
        (folder / name).mkdir(parents=True)
        shutil.copy(sft_ckpt, folder / name / "ckpt.pt")
    return folder


def with_another_tokenizer(ckpt, path):
    """Writes the checkpoint to a path as if its tokenizer had been another one."""
    saved = torch.load(ckpt, weights_only=True)
    torch.save(saved | {"tokenizer_fingerprint": "other"}, path)
    return str(path)


def misfits(weights):
    """Copies of a {name: tensor} with a weight missing, one too many, and one of another shape."""
    name = list(weights)[-1]
    w = weights[name]
    return [{key: weights[key] for key in weights if key != name}, weights | {"wing.weight": w},
            weights | {name: w[None]}]


def steps_with(rows, name):
    return [row["step"] for row in rows if name in row]


TRAIN_OPTIONS = {"lr", "weight_decay", "grad_clip", "warmup_steps", "log_interval", "eval_interval"}


def check_train_options(run, held_out, logged="lr", still=()):
    """What TRAIN_OPTIONS do: when a run logs `logged` and when `held_out`; and what those of AdamW
    do to the weights after one step at the rate 1e-2.

    run(**options) -> (rows of its metrics, model). still: names of weights without a gradient."""
    def weights_after(**options):
        sizes = dict(max_steps=1, warmup_steps=0, lr=1e-2) | options
        return {name: p.detach() for name, p in run(**sizes)[1].named_parameters()}

    rows, _ = run(max_steps=5, log_interval=3, eval_interval=2)
    assert steps_with(rows, logged) == [1, 4, 5] and steps_with(rows, held_out) == [2, 4, 5]
    if logged == "lr":
        rates = [row["lr"] for row in rows if "lr" in row]
        assert rates[2] == pytest.approx(rates[1] / 2, rel=1e-3)   # 0 in a sixth step
    start, plain = weights_after(lr=0.0), weights_after(weight_decay=0.0)
    decayed, warm = weights_after(weight_decay=0.1), weights_after(warmup_steps=4, weight_decay=0.0)
    clipped = weights_after(grad_clip=1e-10, weight_decay=0.0)
    for name, w in start.items():
        step = plain[name] - w
        assert step.abs().max() > 0.9e-2 or name in still     # AdamW's first step is as large as lr
        close(warm[name], w + step / 4, atol=1e-6)
        close(decayed[name], plain[name] - (1e-3 * w if w.dim() == 2 else 0), atol=1e-6)
        # unless the gradient is far below its eps of 1e-8
        assert (clipped[name] - w).abs().max() < 2e-3


def check_pun_world_pairs(load):
    """load(**options) -> (training pairs, held-out pairs, ...). Noise flips training labels alone,
    and the held-out puns are in no training set."""
    clean, val, *_ = load(corpus_size=200)
    noisy, noisy_val, *_ = load(corpus_size=200, noise=1.0)
    assert [row["chosen"] for row in clean] == [row["rejected"] for row in noisy]
    assert len(clean) == 200 and len(val) >= 1000 and val == noisy_val
    assert load(corpus_size=200, seed=1)[0] != clean and not any(row in clean for row in val)
    puns = [set(), set()]
    for seen, rows in zip(puns, (clean, val), strict=True):
        for row in rows:
            _, _, is_pun, parse = world().judge(row["prompt"], row["chosen"])
            if is_pun:
                seen.add((parse.thing.name, parse.phrase.text))
    assert puns[0] and puns[1] and not puns[0] & puns[1]


def make(*arguments, path=""):
    """(the lines that make would run, what it says on stderr), without running them."""
    # make test is a make, too: what it tells its children does not concern this one.
    env = {name: value for name, value in os.environ.items()
           if not name.startswith("MAKE") and name not in ("MFLAGS", "R", "SIZE", "ARCH", "SEED")}
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, text=True, capture_output=True,
                          env=env | {"PATH": f"{path}:{env['PATH']}"})
    return done.stdout.replace("\\\n", " ").splitlines(), done.stderr


def program(module, *arguments, **environment):
    """Runs `python -m module arguments` in the repository. Returns what subprocess.run() does."""
    return subprocess.run([sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT,
                          stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
                          env=os.environ | environment)


@contextlib.contextmanager
def serving(handler, **attributes):
    """A real server on loopback while the block lasts, on a port that the system chooses.

    Handlers find the attributes at self.server; its address is server.url."""
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    vars(server).update(attributes, url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def no_curves(metrics_path, figure_path, title):
    """Stands in for plot_curves(): drawing takes longer than a tiny run."""
    with common.atomic_write(figure_path) as path:
        path.write_bytes(b"\x89PNG")


@pytest.fixture(scope="session", autouse=True)
def quick_runs():
    """Only test_common.py draws curves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "plot_curves", no_curves)
        yield


@pytest.fixture(params=VARIANTS)
def model(request):
    """A tiny model of each architecture, untrained but awake."""
    return awake(toy(n_layer=2, n_head=4, block_size=32, **VARIANTS[request.param]))


@pytest.fixture(scope="session")
def tok():
    return tokenizer("puns")


@pytest.fixture
def tiny_model(tok):
    """A GPT of one layer on the puns tokenizer, untrained."""
    return toy(vocab_size=tok.vocab_size, eos_token_id=tok.eos_token_id, block_size=48)


@pytest.fixture(scope="session")
def sft_ckpt(tmp_path_factory):
    """The checkpoint of a tiny SFT run."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    sft.train(sft.Config(out_dir=str(folder), **TINY_SFT))
    return str(folder / "ckpt.pt")
