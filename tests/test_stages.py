"""What all stages have in common: programs, options, the chain, resuming, and errors."""

import ast
import dataclasses
import errno
import functools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import typing
from pathlib import Path

import conftest
import pytest
import torch
import tyro
from conftest import ROOT, RUN_FILES, STAGES, make, options_of, pairs, records, starts_of, tiny

import common
import data
import discriminator
import dpo
import evaluate
import gan
import ppo
import reward_model
import sample
import sft
from common import InputError, read_jsonl
from data import tokenizer_of
from discriminator import load_discriminator
from model import LanguageModel, load_model, load_reward_model, save_model
from optim import set_lr

PROGRAMS = STAGES | {"evaluate": evaluate, "sample": sample}
MODULES = ["common", "optim", "model", "data", "puns", "lora", *PROGRAMS]

# -----------------------------------------------------------------------------
# programs

IMPORTS = f"""
import importlib, os, sys
for name in {MODULES}:
    importlib.import_module(name)
import matplotlib, torch
assert matplotlib.get_backend() == "svg"
assert not torch.cuda.is_initialized()
assert os.listdir() == []
"""


def test_imports_have_no_effect(tmp_path):
    """No output, no file, and matplotlib keeps its backend."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "svg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=tmp_path, env=env, timeout=300,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_stage_imports_from_real():
    """Not in a function either."""
    for path in ROOT.glob("*.py"):
        code = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) real\b", code, re.MULTILINE), path.name


def test_no_stage_asks_for_its_rank_or_architecture():
    """The word `arch` stands in no stage but sft.py, which makes the model."""
    for name in ("model", *STAGES):
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(tree)}
        assert not names & {"rank", "world_size", "distributed"}, name
        assert "arch" not in names or name in ("model", "sft"), name


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs a stage as a program in an empty folder, without starting another Python.

    call(line) -> (exit code, stdout, stderr)"""
    monkeypatch.chdir(tmp_path)

    def run(line):
        name, *args = line.split()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
        code = 0
        try:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def test_help_names_every_option(call, tmp_path):
    for name, module in PROGRAMS.items():
        code, out, err = call(f"{name} --help")
        assert code == 0 and "usage:" in out and not err
        for name in options_of(module) - {"prompt"}:
            assert re.search(rf"--{name.replace('_', '[-_]')}\b", out), name
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_sentence_and_exit_code_2(call, tmp_path):
    """Before anything is trained or written."""
    rows = '{"prompt": "p", "completion": " c"}\n{"prompt": "p", "completion": 3}\n'
    Path("bad.jsonl").write_text(rows, encoding="utf-8")
    none = "runs/none/ckpt.pt does not exist; check the path"
    sft_missing = "runs/sft/ckpt.pt does not exist; make it with: python sft.py"
    mistakes = [(name, sft_missing) for name in STAGES if name != "sft"]
    mistakes += [("evaluate", sft_missing), ("sample owl", "there is no policy in runs/"),
                 ("sft --init runs/none/ckpt.pt", none), ("gan --init runs/none/ckpt.pt", none),
                 ("sft --data bad.jsonl", "bad.jsonl:2: 'completion' must be text"),
                 ("sft --data none.jsonl", "none.jsonl: cannot be read"),
                 ("sft --arch rnn", "--arch is gpt or palm or llama or t5, not 'rnn'"),
                 ("sft --tokenizer bpe", "there is no tokenizer 'bpe'"),
                 ("sft --init x --n_layer 9", "--n_layer has no effect with --init x: leave one"),
                 ("sft --init x --arch t5", "--arch has no effect with --init x"),
                 ("sft --init x --tokenizer gpt2", "--tokenizer has no effect with --init x"),
                 ("sft --data x --corpus_size 9", "--corpus_size has no effect with --data x"),
                 ("reward_model --data x --noise 0.1", "--noise has no effect with --data x"),
                 ("reward_model --data x --corpus_size 9", "--corpus_size has no effect with --da"),
                 ("reward_model --val_data x", "--val_data has no effect without --data"),
                 ("reward_model --loss regression --margin 1", "--margin has no effect with --"),
                 ("discriminator --data x --corpus_size 9", "--corpus_size has no effect with --d"),
                 ("dpo --data x --noise 0.1", "--noise has no effect with --data x"),
                 ("dpo --online x --noise 0.1", "--noise has no effect with --online x"),
                 ("dpo --online x --corpus_size 9", "--corpus_size has no effect with --online x"),
                 ("dpo --group_size 9", "--group_size has no effect without --online"),
                 ("sft --val_data x", "--val_data has no effect without --data"),
                 ("dpo --simpo_gamma 1", "--simpo_gamma has no effect with --loss dpo"),
                 ("ppo --baseline rloo --group_size 2 --lam 0.5", "--lam has no effect with --ba"),
                 ("gan --tau 0.5", "--tau has no effect with --estimator reinforce"),
                 ("sft --epochs 1 --max_steps 1", "--epochs and --max_steps both say how long"),
                 ("discriminator --reads logits", "--reads is tokens or states, not 'logits'"),
                 ("ppo --baseline gae", "--baseline is critic, rloo, grpo or dr_grpo, not 'gae'"),
                 ("ppo --loss dpo", "--loss is ppo, gspo or cispo"),
                 ("ppo --baseline rloo", "--baseline rloo compares responses to one prompt"),
                 ("ppo --batch_size 10", "--batch_size must be a multiple of --minibatch_size"),
                 ("ppo --group_size 3", "--batch_size must be a multiple of"),
                 ("ppo --temperature 0", "--temperature 0 always writes the same response"),
                 ("dpo --loss ppo", "--loss is one of dpo, cdpo"),
                 ("dpo --online r.pt --group_size 1", "--group_size must be 2 or more"),
                 ("gan --estimator argmax", "--estimator is reinforce, gumbel or hidden"),
                 ("gan --objective wasserstein", "--objective is nonsaturating or original"),
                 ("gan --baseline none", "--baseline is critic"),
                 ("gan --batch_size 6", "--batch_size must be a multiple of --minibatch_size"),
                 ("evaluate --compare .", ". holds no <arch>-<seed>/report.json")]
    mistakes += [(f"{name} --temperature 9e-4", "--temperature must be 0 or at least 0.001, not ")
                 for name, module in PROGRAMS.items() if "temperature" in options_of(module)]
    for line, message in mistakes:
        code, out, err = call(f"{line} --device cpu")
        assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1, line
        assert not out, line
    for name in PROGRAMS:
        code, _, err = call(f"{name} --no_such_option 1")
        assert code == 2 and "no_such_option" in err.replace("-", "_")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]

# -----------------------------------------------------------------------------
# options

def options_read(path):
    """The names x that stand in a file as `config.x`."""
    return {node.attr for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "config"}


def test_every_option_is_read():
    """By its stage or by the modules below it. ppo.py serves gan.py, too."""
    for name, module in PROGRAMS.items():
        files = [name, "common", "data"] + ["lora"] * (name not in ("gan", "discriminator"))
        files += ["ppo", "discriminator"] if name == "gan" else []
        read = set.union(*(options_read(ROOT / f"{file}.py") for file in files))
        assert not options_of(module) - read, name


def test_an_option_means_the_same_everywhere():
    """One name, one type. No default is shared between two configs."""
    types = {}
    for module in PROGRAMS.values():
        for field in dataclasses.fields(module.Config):
            kind = (typing.get_args(field.type) or [field.type])[0]     # without "| None"
            assert types.setdefault(field.name, kind) == kind, field.name
        module.Config().seed = 5
        assert module.Config().seed == 1337



def test_by_default_each_stage_starts_where_another_ends():
    made = dict(init="sft", reference="sft", reward="reward_model", disc="discriminator")
    for name, module in PROGRAMS.items():
        config = module.Config()
        assert name not in STAGES or config.out_dir == f"runs/{name}"
        for option in made.keys() & options_of(module) - ({"init"} if name == "sft" else set()):
            assert getattr(config, option) == f"runs/{made[option]}/ckpt.pt", (name, option)
    assert evaluate.Config().out_dir == sample.Config().runs == "runs"


def test_by_default_models_are_sampled_as_they_are_and_gradients_are_clipped():
    plain = dict(temperature=1.0, top_k=0, top_p=1.0, grad_clip=1.0)
    for name, module in PROGRAMS.items():
        for option in plain.keys() & options_of(module):
            assert getattr(module.Config(), option) == plain[option], (name, option)
    assert discriminator.Config().label_smoothing == 0


def test_an_option_that_would_be_ignored_is_refused():
    group, critic = dict(baseline="rloo", group_size=2), "gamma lam vf_coef"
    for module, options, names in (
            (ppo, group, critic), (gan, group, critic),
            (gan, dict(estimator="hidden"), f"{critic} tau ppo_epochs baseline loss clip_range "
             "clip_range_high target_kl missing_eos_penalty"),
            (dpo, {}, "val_data group_size max_new_tokens simpo_gamma label_smoothing"),
            (dpo, dict(data="x"), "corpus_size noise")):
        for name in names.split():
            value = getattr(module.Config(), name)
            value = "x" if isinstance(value, str) else (value or 0) / 2 or 0.5
            conftest.refuses(f"--{name} has no effect", common.check_options,
                             module.Config(**options | {name: value}))


@pytest.mark.parametrize("module", [sft, reward_model, discriminator])
def test_the_norm_that_is_logged_is_that_of_the_step(sft_ckpt, tmp_path, monkeypatch, module):
    norms, step = [], module.optimizer_step
    monkeypatch.setattr(module, "optimizer_step",
                        lambda *args: norms.append(step(*args)) or norms[-1])
    rows = [row | {"completion": row["chosen"]} for row in read_jsonl(pairs(tmp_path))]
    path = records(tmp_path / "rows.jsonl", rows)
    module.train(tiny(module, tmp_path / "run", sft_ckpt, data=path))
    found = [row["grad_norm"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")
             if "grad_norm" in row]
    assert found == pytest.approx([norm.item() for norm in norms], rel=1e-3) and len(found) == 2

# -----------------------------------------------------------------------------
# the Makefile

def configs_of(*arguments):
    """{stage and out_dir: its Config} of all stages that make would run."""
    lines, _ = make("-B", "PY=python", "all", "gans", "R=runs/x", *arguments)
    lines = [shlex.split(line) for line in lines]
    configs = [tyro.cli(PROGRAMS[words[1].removesuffix(".py")].Config, args=words[2:])
               for words in lines if words[0] == "python" and words[1].endswith(".py")]
    assert len(configs) == 10                   # seven of make, and three of make gans
    return configs


def n_parameters(config):
    return sum(p.numel() for p in sft.make_model(config, "cpu")[0].parameters())


# What TINY=1 may change: how long and how wide. All else is as in the size that it stands for.
TINY_OPTIONS = {"corpus_size", "max_steps", "eval_interval", "sample_interval", "max_new_tokens",
                "n_layer", "n_head", "n_embd", "n_inner", "samples", "best_of"}


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("size, arch", [
    ("cpu", "gpt"), ("gpu", "gpt"), ("cpu", "palm"), ("cpu", "t5")])
def test_make_runs_each_size_with_options_that_fit(size, arch):
    whole = configs_of(f"SIZE={size}", f"ARCH={arch}", "SEED=7")
    short = configs_of(f"SIZE={size}", f"ARCH={arch}", "SEED=7", "TINY=1")
    assert whole[0].arch == arch and (whole[0].n_embd == 512) == (size == "gpu")
    assert whole[0].tokenizer == ("puns_large" if size == "gpu" else "puns")
    stages = [config for config in whole if hasattr(config, "init")]
    assert {config.seed for config in stages} == {7}
    assert [config.init for config in stages] == [""] + ["runs/x/sft/ckpt.pt"] * 8
    assert {config.estimator: Path(config.disc).parts[2] for config in stages
            if hasattr(config, "disc")} == {"reinforce": "discriminator", "gumbel": "discriminator",
                                            "hidden": "discriminator_states"}
    assert sorted(c.reads for c in stages if hasattr(c, "reads")) == ["states", "tokens"]
    assert len({config.out_dir for config in whole}) == 10          # none writes over another
    if size == "cpu":               # architectures that are compared are equally large
        assert n_parameters(whole[0]) == pytest.approx(n_parameters(sft.Config()), rel=0.05)
    for a, b in zip(whole, short, strict=True):
        common.check_options(a)
        a, b = dataclasses.asdict(a), dataclasses.asdict(b)
        assert {name for name in a if a[name] != b[name]} <= TINY_OPTIONS


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_compare_trains_each_architecture_with_each_seed():
    lines, _ = make("-B", "PY=python", "R=x", "SEEDS=7 8", "compare")
    runs = re.findall(r"sft.py --arch (\w+) --seed (\d) --out_dir (\S+)", "\n".join(lines))
    assert sorted(runs) == [(arch, seed, f"x/compare/{arch}-{seed}/sft")
                            for arch in ("gpt", "palm", "t5") for seed in "78"]


@pytest.mark.skipif(os.name == "nt" or not shutil.which("make"), reason="needs make and sh")
def test_make_compare_is_of_one_size_whatever_the_machine(tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho GPU 0: a name\n", encoding="utf-8")
    program.chmod(0o755)
    lines, _ = make("-B", "PY=python", "R=x", "SEEDS=7", "compare", path=str(tmp_path))
    assert not any("--n_embd 512" in line for line in lines)
    assert "python evaluate.py --compare x/compare" in lines


REAL = ["-f", "real/Makefile"]


@pytest.mark.skipif(os.name == "nt" or not shutil.which("make"), reason="needs make and sh")
@pytest.mark.parametrize("arguments", [[], ["TINY=1"], REAL])
@pytest.mark.parametrize("size, has_gpu", [("gpu", True), ("gpu", False), ("cpu", True)])
def test_the_large_model_is_not_trained_on_the_cpu_of_a_gpu_machine(tmp_path, arguments, size,
                                                                    has_gpu):
    """With a driver that is too old torch finds no GPU, though nvidia-smi does."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "echo GPU 0: a name\n" * has_gpu, encoding="utf-8")
    program.chmod(0o755)
    lines, _ = make(*arguments, "-B", "-o", ".venv/ready", "PY=python", f"SIZE={size}",
                    path=str(tmp_path))
    trains = re.compile("python (sft|reward_model|discriminator|ppo|dpo|gan).py")
    found = ["--device cuda" in line for line in lines if trains.match(line)]
    assert found == [size == "gpu" and has_gpu] * (8 if arguments == REAL else 6)


@pytest.mark.skipif(os.name == "nt" or not shutil.which("make"), reason="needs make and sh")
@pytest.mark.parametrize("arguments, has_gpu, first_line", [
    ([], False, "SIZE=cpu ARCH=gpt SEED=1337: into runs/"),
    ([], True, "SIZE=gpu (this machine has a GPU; make SIZE=cpu trains the small model) ARCH=gpt "
               "SEED=1337: into runs/"),
    (["SIZE=cpu"], True, "SIZE=cpu ARCH=gpt SEED=1337: into runs/cpu/"),
    (["SIZE=gpu", "TINY=1"], False, "SIZE=gpu ARCH=gpt SEED=1337: into runs/tiny/gpu/"),
    (["ARCH=t5"], True, "SIZE=cpu ARCH=t5 SEED=1337: into runs/t5-1337/"),
    (["SEED=7"], False, "SIZE=cpu ARCH=gpt SEED=7: into runs/gpt-7/"),
    (["SIZE=big"], False, "SIZE is cpu or gpu, not 'big'"),
    (["SIZE=gpu", "ARCH=t5"], False, "SIZE=gpu has options for ARCH=gpt alone"),
    (REAL, False, "SIZE=cpu SEED=1337: into runs/real/"),
    (REAL, True, "SIZE=gpu SEED=1337: into runs/real/"),
    ([*REAL, "SIZE=cpu"], True, "SIZE=cpu SEED=1337: into runs/real-cpu/"),
    ([*REAL, "SEED=7"], False, "SIZE=cpu SEED=7: into runs/real-7/"),
    ([*REAL, "SIZE=big"], False, "SIZE is cpu or gpu, not 'big'"),
    ([*REAL, "TINY=1"], False, "make real has no TINY=1")])
def test_make_says_what_it_does(tmp_path, arguments, has_gpu, first_line):
    """Another size, architecture, or seed has a folder of its own: nothing is taken for another."""
    program = tmp_path / "nvidia-smi"
    says = "echo GPU 0: a name" if has_gpu else "echo NVIDIA-SMI has failed; exit 9"
    program.write_text(f"#!/bin/sh\n{says}\n", encoding="utf-8")
    program.chmod(0o755)
    lines, error = make(*arguments, path=str(tmp_path))
    assert (lines[0] == first_line) if lines else first_line in error

# -----------------------------------------------------------------------------
# the chain

# {estimator of the GAN: the discriminator that it needs}
READS = {"reinforce": "discriminator", "gumbel": "discriminator", "hidden": "disc_states"}


@pytest.fixture(scope="module")
def chain(tmp_path_factory, sft_ckpt):
    """A folder with all stages, each from the checkpoints of those before it."""
    root = tmp_path_factory.mktemp("chain")
    os.symlink(os.path.dirname(sft_ckpt), root / "sft", target_is_directory=True)
    starts = starts_of(root)
    for name in ("reward_model", "discriminator", "ppo", "dpo"):
        data = pairs(root) if name in ("reward_model", "dpo") else ""
        STAGES[name].train(tiny(STAGES[name], root / name, data=data, lstm=True, **starts))
    discriminator.train(tiny(discriminator, root / "disc_states", reads="states", **starts))
    for estimator, disc in READS.items():
        gan.train(tiny(gan, root / f"gan_{estimator}", estimator=estimator,
                       **starts_of(root, disc)))
    return root


@pytest.mark.parametrize("name", ["sft", "reward_model", "discriminator", "ppo", "dpo",
                                  "gan_reinforce", "gan_gumbel", "gan_hidden"])
def test_a_run_leaves_what_it_promises(chain, name):
    folder, module = chain / name, STAGES[name if name in STAGES else "gan"]
    more = {"discriminator.pt"} if module is gan else set()
    assert {path.name for path in folder.iterdir()} == RUN_FILES | more
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert set(config) == options_of(module)
    rows = read_jsonl(folder / "metrics.jsonl")
    assert rows and all(math.isfinite(value) for row in rows for value in row.values())
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    if name not in ("reward_model", "discriminator"):
        assert "About a" in (folder / "samples.txt").read_text(encoding="utf-8")
    load = {"reward_model": load_reward_model, "discriminator": load_discriminator}
    model, start = load.get(name, load_model)(folder / "ckpt.pt"), load_model(chain / "sft/ckpt.pt")
    assert not model.training
    saved = torch.load(folder / "ckpt.pt", weights_only=True)
    assert saved["tokenizer"] == "puns" and saved["stage"] == module.__name__
    trained = getattr(model, "model", model)
    moved = [not torch.equal(a, b)
             for a, b in zip(trained.parameters(), start.parameters(), strict=True)]
    assert all(moved) or name == "sft"


def test_every_choice_of_an_option_runs(chain, tmp_path):
    """Two steps of each way that no other test takes through train()."""
    losses = [(dpo, dict(loss=loss)) for loss in dpo.LOSSES if loss != "dpo"]
    choices = [*losses, (sft, dict(arch="palm")), (sft, dict(arch="t5")),
               (gan, dict(baseline="grpo", group_size=2)), (ppo, dict(lora=2)),
               (discriminator, dict(dtype="bfloat16", lstm=True)),
               *[(module, dict(dtype="bfloat16")) for module in (ppo, gan)],
               (gan, dict(dtype="bfloat16", estimator="gumbel")),
               *[(module, dict(dtype="bfloat16", lora=2, checkpointing=True))
                 for module in (sft, reward_model, dpo, ppo)]]
    starts = starts_of(chain)
    for i, (module, changes) in enumerate(choices):
        data = pairs(tmp_path) if module is dpo else ""
        arguments = starts | ({"sft_ckpt": "", "n_embd": 48} if "arch" in changes else {})
        module.train(tiny(module, tmp_path / f"{i}", data=data, **arguments, **changes))
        assert read_jsonl(tmp_path / f"{i}" / "metrics.jsonl")[-1]["step"] == 2, changes
        saved = torch.load(tmp_path / f"{i}" / "ckpt.pt", weights_only=True)["model"]
        assert all(weight.dtype == torch.float32 for weight in saved.values())  # also by autocast


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("module, changes", [
    (sft, {}), (sft, dict(checkpointing=True)), (reward_model, {}), (discriminator, {}),
    (discriminator, dict(reads="states", lstm=True)), (dpo, {}), (dpo, dict(loss="kto")),
    (dpo, dict(online="reward_model", group_size=2)), (ppo, {}),
    (ppo, dict(baseline="grpo", group_size=2)), *[(gan, dict(estimator=name)) for name in READS]])
def test_a_gpu_repeats_the_steps_that_it_has_recorded(chain, tmp_path, module, changes):
    """From the third batch of a shape on. Samples and evaluations stand between the steps."""
    starts = starts_of(chain, READS.get(changes.get("estimator"), "discriminator"))
    changes = {"device": "cuda", "dtype": "", "max_steps": 8, "eval_interval": 4} | changes
    if "online" in changes:
        changes["online"] = starts["reward"]
    data = pairs(tmp_path) if module in (reward_model, dpo) and "online" not in changes else ""
    module.train(tiny(module, tmp_path / "run", data=data, **starts, **changes))
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == 8
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize("module", [ppo, gan, dpo])
def test_pads_are_no_sampled_tokens(chain, tmp_path, monkeypatch, module):
    """What is counted for tokens per second."""
    sampled, counted = [], []
    generate, finish = LanguageModel.generate, common.Run.finish

    def spy(model, *args, **options):
        response, *rest = generate(model, *args, **options)
        sampled.append(response != model.pad_token_id)
        return response, *rest

    monkeypatch.setattr(LanguageModel, "generate", spy)
    monkeypatch.setattr(common.Run, "finish",
                        lambda run: counted.append(run.sampled_tokens) or finish(run))
    starts = starts_of(chain)
    online = {"online": starts["reward"], "group_size": 2} if module is dpo else {}
    module.train(tiny(module, tmp_path, max_steps=1, max_new_tokens=16, **starts, **online))
    assert not sampled[0].all() and counted == [sampled[0].sum()]


def test_what_the_optimizers_remember(chain, tmp_path, monkeypatch):
    """PPO's eps is larger (https://arxiv.org/abs/2005.12729), also where it trains a GAN. D, and D
    alone, has a beta1 of .5, and decays. The rate rises and falls again."""
    found, rates = [], []
    spy = functools.partial(lambda adamw, groups, **options: found.append(
        (options["betas"], options["eps"], groups[0]["weight_decay"])) or adamw(groups, **options),
        torch.optim.AdamW)
    monkeypatch.setattr(torch.optim, "AdamW", spy)
    for module in (ppo, gan):
        monkeypatch.setattr(module, "set_lr", lambda *args: rates.append(set_lr(*args)))
        module.train(tiny(module, tmp_path / module.__name__, max_steps=4, warmup_steps=2, lr=1e-3,
                          **starts_of(chain)))
    assert rates == pytest.approx([.5e-3, 1e-3, 1e-3, .5e-3] * 2)
    policy = ((0.9, 0.99), 1e-5, 0.0)
    assert found == [policy, policy, ((0.5, 0.99), 1e-8, 0.01)]


@pytest.mark.parametrize("module", [sft, reward_model, dpo])
def test_compile_changes_no_number(sft_ckpt, tmp_path, monkeypatch, module):
    """The step is traced, but no code is generated, since that takes a minute."""
    compile = functools.partial(torch.compile, backend="eager")
    calls, batches = [], module.Batches
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append(
        {function.__name__: options}) or compile(function, **options))
    monkeypatch.setattr(module, "Batches", lambda *args, **options: calls.append(options)
                        or batches(*args, **options))
    rows, path = [], pairs(tmp_path)
    texts = records(tmp_path / "texts.jsonl", [{"prompt": row["prompt"], "completion":
                                                row["chosen"]} for row in read_jsonl(path)])
    for flag in (False, True):
        config = tiny(module, tmp_path / "run", sft_ckpt, compile=flag,
                      max_steps=1, data=texts if module is sft else path)
        module.train(config)
        rows.append(read_jsonl(tmp_path / "run" / "metrics.jsonl")[0])
    names = {sft: "sft_loss", reward_model: "score_all", dpo: "dpo_batch"}
    # Of a run the training batches come first, then the held-out ones.
    assert calls == [dict(few_shapes=False), {}, dict(few_shapes=True), {},
                     {names[module]: dict(dynamic=False)}]
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], abs=1e-4)
    assert rows[1]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-3)


def test_dropout_is_off_where_log_probs_are_compared(tmp_path, sft_ckpt):
    """A policy that was trained with dropout: PPO's first ratio is 1, and DPO starts at ln 2."""
    model = load_model(sft_ckpt)
    model.config.dropout = 0.5
    save_model(tmp_path / "sft.pt", model, tokenizer_of(model))
    ppo.train(tiny(ppo, tmp_path / "ppo", tmp_path / "sft.pt"),
              lambda prompts, texts: [len(text) / 9 for text in texts])
    rows = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")
    assert all(row["first_ratio"] < 1e-5 for row in rows)
    dpo.train(tiny(dpo, tmp_path / "dpo", tmp_path / "sft.pt", data=pairs(tmp_path)))
    first = read_jsonl(tmp_path / "dpo" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("module", [sft, reward_model, discriminator, dpo])
def test_samples_are_as_long_as_the_longest_text(sft_ckpt, tmp_path, monkeypatch, module):
    """Shorter ones would be told from the texts by their length. 37 tokens with the end token."""
    lengths, respond = [], data.respond

    def note(model, tok, prompts, rng, autocast, max_new_tokens=32, **sampling):
        lengths.append(max_new_tokens)
        return respond(model, tok, prompts, rng, autocast, max_new_tokens, **sampling)

    monkeypatch.setattr(data, "respond", note)
    monkeypatch.setattr(module, "respond", note, raising=False)
    rows = [{"prompt": "Hi", "completion": "1 " * 18, "chosen": "1 " * 18, "rejected": " no"}] * 20
    short = [row | {"completion": " yes", "chosen": " yes"} for row in rows]
    module.train(tiny(module, tmp_path, sft_ckpt, data=records(tmp_path / "a.jsonl", rows),
                      val_data=records(tmp_path / "b.jsonl", short)))
    assert set(lengths) == {37}


@pytest.mark.parametrize("module", STAGES.values())
def test_what_is_random_follows_the_seed(chain, tmp_path, monkeypatch, module):
    """Order of the batches and samples; G's prompts come in an order of their own."""
    seeds, drawn, shuffle, make_rng = set(), [], data.Batches.shuffle, module.make_rng
    monkeypatch.setattr(data.Batches, "shuffle", lambda batches, epoch: seeds.add(
        batches.seed) or shuffle(batches, epoch))
    monkeypatch.setattr(module, "make_rng", lambda device, seed: drawn.append(seed)
                        or make_rng(device, seed))
    own = pairs(tmp_path) if module in (reward_model, dpo) else ""
    module.train(tiny(module, tmp_path / "run", seed=70, max_steps=1, data=own,
                      **starts_of(chain)))
    assert drawn == [70] and seeds == ({70, 71} if module is gan else {70})

# -----------------------------------------------------------------------------
# own files

def test_own_files_go_through_every_stage(chain, tmp_path):
    """Prompts of any language. Each record fits the block of 48, but not the longest prompt with
    the longest answer."""
    prompts = ["About a banker:", "Tell me a joke about naïve cafés 😀:", "1 " * 20]
    texts = [(prompt, " no" * (i % 3 + 1), " yes") for i, prompt in enumerate(prompts * 5)]
    rows = [{"prompt": prompt, "completion": chosen, "chosen": chosen, "rejected": rejected}
            for prompt, chosen, rejected in [*texts, *[("Hi", "1 " * 20, " 2")] * 5]]
    data = records(tmp_path / "mine.jsonl", rows)
    for name, module in STAGES.items():
        module.train(tiny(module, tmp_path / name, data=data, **starts_of(chain)))


def test_a_text_that_does_not_fit_is_named_before_training(chain, tmp_path):
    """In every stage, with file and line, and no folder is left behind with a checkpoint."""
    row = {"prompt": "Hi", "completion": " no", "chosen": " no", "rejected": " yes"}
    long = {field: "1 " * 30 for field in row} | {"rejected": " yes"}
    data = records(tmp_path / "long.jsonl", [row] * 20 + [long])
    for name, module in STAGES.items():
        config = tiny(module, tmp_path / name, data=data, val_data=data, **starts_of(chain))
        with pytest.raises(InputError, match=r"long.jsonl:21: .* block holds 4"):
            module.train(config)
        assert not (tmp_path / name / "ckpt.pt").exists()

# -----------------------------------------------------------------------------
# a run that is stopped

@pytest.mark.parametrize("module, name", [*[(module, "ckpt") for module in STAGES.values()],
                                          (gan, "discriminator")])
def test_what_cannot_be_saved_is_not_lost(chain, tmp_path, monkeypatch, module, name):
    """The disk is full at the end: the state of the last step remains until there is a model."""
    def save(content, path):
        if Path(path).stem == f"{name}.pt":
            raise OSError(errno.ENOSPC, "no space")
        torch_save(content, path)

    torch_save = torch.save
    monkeypatch.setattr(torch, "save", save)
    own = pairs(tmp_path) if module in (reward_model, dpo) else ""
    with pytest.raises(OSError, match="no space"):
        module.train(tiny(module, tmp_path, data=own, **starts_of(chain)))
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2


def train_and_die(module, config):
    """Trains in a child process, which kills itself by the signal that nothing can catch: in step
    6, after the state of step 4 was saved, with newer rows in metrics.jsonl."""
    log = common.Run.log

    def log_and_die(self, **metrics):
        log(self, **metrics)
        if self.step + 1 == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        common.Run.log = log_and_die
        try:
            module.train(config)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")
@pytest.mark.parametrize("module, changes", [
    (sft, dict(init="", n_layer=1, n_head=2, n_embd=32, n_inner=0)),        # with Muon
    (reward_model, {}), (discriminator, {}), (dpo, {}), (ppo, {}), (gan, {}),
    (dpo, dict(online="reward_model/ckpt.pt", lora=2, group_size=2)),
    (gan, dict(estimator="gumbel")),
    (gan, dict(estimator="hidden"))])
def test_a_killed_run_ends_as_if_it_had_not_been_killed(chain, tmp_path, module, changes,
                                                        monkeypatch):
    """Killed and resumed, or run in one go: the same metrics, samples and weights, bit for bit."""
    monkeypatch.chdir(chain)
    data = pairs(tmp_path) if module in (reward_model, dpo) else ""
    sizes = dict(max_steps=7, eval_interval=4, sample_interval=4, lr=1e-3, data=data) | changes
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    config = tiny(module, killed, **starts_of(chain, READS[changes.get("estimator", "gumbel")]),
                  **sizes)
    train_and_die(module, config)
    assert torch.load(killed / "state.pt", weights_only=True)["step"] == 4
    assert read_jsonl(killed / "metrics.jsonl")[-1]["step"] == 6
    assert not (killed / "ckpt.pt").exists()
    module.train(config)
    module.train(dataclasses.replace(config, out_dir=str(whole)))
    assert conftest.without_times(killed) == conftest.without_times(whole)
    assert (killed / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
    a, b = (torch.load(run / "ckpt.pt", weights_only=True)["model"] for run in (killed, whole))
    assert conftest.same(a, b)
    assert not (killed / "state.pt").exists() and not list(killed.glob("*.tmp"))
