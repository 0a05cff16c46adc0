"""All stages as programs: imports, options, errors, the chain from SFT to the report, and going on after a kill."""

import ast
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from conftest import CPU, ROOT, TINY_SFT, awake, off, toy

import common
import discriminator
import dpo
import evaluate
import gan
import ppo
import reward_model
import sft
from common import InputError, read_jsonl
from data import Batches
from model import Scorer, load_model, logprobs, save_model
from optim import adamw, optimizer_step, set_lr

MODULES = ["common", "optim", "data", "puns", "model", "sft", "reward_model", "discriminator", "ppo", "dpo", "gan", "evaluate"]
STAGES = {"sft": sft, "reward_model": reward_model, "discriminator": discriminator, "ppo": ppo, "dpo": dpo, "gan": gan, "evaluate": evaluate}
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def python(code, cwd, *args):
    return subprocess.run([sys.executable, "-c", code, *args], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300)

# -----------------------------------------------------------------------------
# programs

PROBE = """
import contextlib, importlib, io, json, os, sys
for name in {modules}:
    importlib.import_module(name)
import matplotlib
assert matplotlib.get_backend() == "svg", "an import changed matplotlib's backend"
assert os.listdir() == [], os.listdir()

def call(name, *args):        # as `python name.py args`, without starting another Python
    import runpy
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = [name + ".py", *args]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path({root!r} + "/" + name + ".py", run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    return code or 0, out.getvalue(), err.getvalue()

calls = json.loads(sys.argv[1])
print(json.dumps([call(*args) for args in calls]))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """What each of these commands said: {command: (exit code, stdout, stderr)}, all in one process."""
    folder = tmp_path_factory.mktemp("empty")
    bad = folder.parent / "bad.jsonl"
    bad.write_text('{"prompt": "p", "completion": " c"}\n{"prompt": "p", "completion": 3}\n')
    calls = [[name, "--help"] for name in [*STAGES, "puns", "data"]] + [[name, "--no_such_option", "1"] for name in STAGES]
    calls += [[name] for name in STAGES if name != "sft"] + [["gan", "--init", "runs/none/ckpt.pt"], ["sft", "--data", str(bad)],
              ["sft", "--data", "none.jsonl"], ["sft", "--init", "runs/sft/ckpt.pt"], ["sft", "--arch", "rnn"], ["sft", "--tokenizer", "bpe"],
              ["puns", "sample", "--n", "3"], ["puns", "sample", "--kind", "limerick"],
              ["puns", "judge", "About a banker:", " It is none."]]
    env = ENV | {"MPLBACKEND": "svg"}
    done = subprocess.run([sys.executable, "-c", PROBE.format(modules=MODULES, root=str(ROOT)), json.dumps(calls)], cwd=folder, env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and not done.stderr, done.stdout[:500] + done.stderr       # the imports said nothing
    assert not list(folder.iterdir()), "an error, an import or --help wrote a file"
    return dict(zip([" ".join(call) for call in calls], json.loads(done.stdout), strict=True)) | {"bad": str(bad)}


def test_imports_have_no_effect(programs):
    """No output, no file, no changed backend: asserted where the modules are imported."""
    assert len(programs) > 20


@pytest.mark.parametrize("name", [*STAGES, "puns", "data"])
def test_help(programs, name):
    code, out, _ = programs[f"{name} --help"]
    assert code == 0 and "usage:" in out
    if name in STAGES:
        for field in dataclasses.fields(STAGES[name].Config):
            assert re.search(rf"--(\S+-)?{field.name}".replace("_", "[-_]"), out), field.name


@pytest.mark.parametrize("name", STAGES)
def test_an_unknown_option_is_exit_code_2(programs, name):
    code, _, err = programs[f"{name} --no_such_option 1"]
    assert code == 2 and "no_such_option" in err.replace("-", "_")


@pytest.mark.parametrize("command, missing", [
    ("reward_model", "sft"), ("discriminator", "sft"), ("ppo", "sft"), ("dpo", "sft"), ("gan", "sft"), ("evaluate", "sft"),
    ("sft --init runs/sft/ckpt.pt", "sft"), ("gan --init runs/none/ckpt.pt", "none")])
def test_a_missing_checkpoint_names_the_command_that_makes_it(programs, command, missing):
    code, _, err = programs[command]
    assert code == 2 and err == f"error: runs/{missing}/ckpt.pt is not there; make it with: python {missing}.py\n"


def test_a_malformed_line_stops_before_any_training(programs):
    code, out, err = programs[f"sft --data {programs['bad']}"]
    assert code == 2 and err.startswith(f"error: {programs['bad']}:2: 'completion' is not text") and err.count("\n") == 1 and not out


@pytest.mark.parametrize("command, reason", [("sft --data none.jsonl", "none.jsonl: cannot be read"), ("sft --arch rnn", "--arch is"),
                                             ("sft --tokenizer bpe", "bpe"), ("puns sample --kind limerick", "--kind is one of")])
def test_other_mistakes_are_one_line(programs, command, reason):
    code, _, err = programs[command]
    assert code == 2 and err.startswith("error: ") and reason in err and err.count("\n") == 1


def test_the_commands_of_the_pun_world(programs):
    code, out, _ = programs["puns sample --n 3"]
    assert code == 0 and out.count("\n") == 3 and all("[" in line for line in out.splitlines())
    assert programs["puns judge About a banker:  It is none."][1].startswith("fluent False")


def attributes_of_config(path):
    """Names x read as `config.x`, `k.x` (dpo's losses) or by dataclasses.replace in a file."""
    return {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id in ("config", "k")}


@pytest.mark.parametrize("name, field", [(name, field.name) for name, module in STAGES.items() for field in dataclasses.fields(module.Config)])
def test_every_option_is_read(name, field):
    """In its own file, in the plumbing, or by ppo's functions that gan calls. (All file options of ppo apply to gan alike.)"""
    files = [name, "common", "lora"] + ["ppo", "discriminator"] * (name == "gan")
    assert any(field in attributes_of_config(ROOT / f"{file}.py") for file in files)


def test_names_mean_the_same_everywhere():
    """A field that two stages share has one type; --lr is no string in one of them."""
    types = {}
    for module in STAGES.values():
        for field in dataclasses.fields(module.Config):
            assert types.setdefault(field.name, field.type) == field.type, field.name


def test_config_has_no_shared_state():
    for module in STAGES.values():
        a, b = module.Config(), module.Config()
        a.seed = 5
        assert b.seed == 1337 and module.Config().seed == 1337

# -----------------------------------------------------------------------------
# the plumbing

def test_a_step_clips_what_backward_made():
    """The gradient of 1000 w is 1000: the step sees a norm of at most .5, the log the norm before the clip. What an earlier backward left is
    dropped first. With grad_clip 0 nothing is clipped."""
    model = nn.Linear(1, 1, bias=False)
    for grad_clip, expected in ((0.5, 0.5), (0.0, 1000.0), (5000.0, 1000.0)):
        seen = []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append(model.weight.grad.norm().item()))
        (7 * model.weight.sum()).backward()
        assert optimizer_step(1000 * model.weight.sum(), model, optimizer, grad_clip) == pytest.approx(1000)
        assert seen == [pytest.approx(expected, rel=1e-4)]


def test_adamw_is_what_the_config_asks_for():
    model = toy()
    optimizer = adamw(model, 1e-3, 0.1, betas=(0.5, 0.95), eps=1e-5)
    assert optimizer.defaults["betas"] == (0.5, 0.95) and optimizer.defaults["eps"] == 1e-5
    decay, plain = optimizer.param_groups
    assert decay["weight_decay"] == 0.1 and plain["weight_decay"] == 0 and decay["lr"] == plain["lr"] == 1e-3
    assert all(p.dim() >= 2 for p in decay["params"]) and all(p.dim() == 1 for p in plain["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    model.wte.requires_grad_(False)
    assert sum(len(group["params"]) for group in adamw(model, 1e-3).param_groups) == len(list(model.parameters())) - 1


def test_learning_rate():
    """Up to the top in 4 steps, then down to zero over the other 16: .25 .5 .75 1, then (20 - t) / 16."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0)
    rates = []
    for step in range(20):
        assert set_lr(optimizer, 2.0, step, 20, 4) == optimizer.param_groups[0]["lr"]
        rates.append(optimizer.param_groups[0]["lr"] / 2)
    assert rates == pytest.approx([.25, .5, .75, 1.0] + [(20 - t) / 16 for t in range(4, 20)])
    assert [set_lr(optimizer, 1.0, step, 4) for step in range(4)] == [1, .75, .5, .25]       # lr0 (1 - (t - 1) / N)


def test_accumulated_losses_are_no_mean_of_means():
    """sft.evaluate: 300 records, in two chunks of 256 and 44: the mean over records, not over chunks."""
    model, generator = awake(toy()), torch.Generator().manual_seed(0)
    completion = torch.randint(0, 11, (300, 4), generator=generator)
    completion[256:, 1:] = 12                  # the last 44 are short, and so cheap
    encoded = {"prompt": torch.ones(300, 2, dtype=torch.long), "completion": completion}
    batches = Batches(encoded, 1, 12, "cpu", 0)
    nats = torch.cat([sft.loss_of(model, batches.take(torch.tensor([i])))[1] for i in range(300)])
    assert sft.evaluate(model, batches, off) == pytest.approx(nats.mean().item(), abs=1e-4)
    assert model.training


def test_a_new_model_costs_ln_v():
    """3 tokens at ln 12 = 2.4849 each, with the prompt's tokens not counted."""
    model = toy()
    batch = {"prompt": torch.randint(0, 11, (64, 5)), "completion": torch.tensor([[1, 2, 11, 12]]).repeat(64, 1)}
    loss, nats = sft.loss_of(model, batch)
    assert loss.item() == pytest.approx(math.log(12), abs=0.1) and nats.mean().item() == pytest.approx(3 * math.log(12), abs=0.3)


def test_the_loss_counts_tokens_and_not_pads():
    model = awake(toy())
    prompt, short, long = torch.ones(1, 2, dtype=torch.long), torch.tensor([[3, 11, 12, 12]]), torch.tensor([[4, 5, 6, 11]])
    both = {"prompt": prompt.repeat(2, 1), "completion": torch.cat([short, long])}
    a, b = (sft.loss_of(model, {"prompt": prompt, "completion": x})[0].item() for x in (short, long))
    assert sft.loss_of(model, both)[0].item() == pytest.approx((2 * a + 4 * b) / 6, abs=1e-5)
    wide = both | {"completion": nn.functional.pad(both["completion"], (0, 5), value=12)}
    assert sft.loss_of(model, wide)[0].item() == pytest.approx(sft.loss_of(model, both)[0].item(), abs=1e-5)
    parts = [{"prompt": prompt, "completion": x} for x in (short, long)]      # --grad_accum: the mean over all tokens, not a mean of means
    tokens = sft.count_tokens(model, parts)
    assert sum(sft.loss_of(model, part, tokens)[0] for part in parts).item() == pytest.approx((2 * a + 4 * b) / 6, abs=1e-5)

# -----------------------------------------------------------------------------
# the chain

def tiny(module, folder, sft_ckpt, **changes):
    """The Config of a stage for one or two tiny steps."""
    sizes = dict(out_dir=str(folder), init=sft_ckpt, max_steps=2, batch_size=8, eval_interval=2, log_interval=1, sample_interval=1, corpus_size=60,
                 minibatch_size=4, d_batch_size=4, max_new_tokens=6, warmup_steps=1, **CPU) | changes
    names = {field.name for field in dataclasses.fields(module.Config)}
    return module.Config(**{name: value for name, value in sizes.items() if name in names})


@pytest.fixture(scope="module")
def chain(tmp_path_factory, sft_ckpt):
    """All stages, each from the checkpoints of those before it; what is left is {stage: its folder}."""
    root = tmp_path_factory.mktemp("chain")
    (root / "sft").symlink_to(os.path.dirname(sft_ckpt), target_is_directory=True)
    init, reward, disc = (str(root / stage / "ckpt.pt") for stage in ("sft", "reward_model", "discriminator"))
    reward_model.train(tiny(reward_model, root / "reward_model", init))
    discriminator.train(tiny(discriminator, root / "discriminator", init))
    ppo.train(tiny(ppo, root / "ppo", init, reward=reward))
    dpo.train(tiny(dpo, root / "dpo", init))
    for estimator in ("reinforce", "gumbel", "hidden"):
        gan.train(tiny(gan, root / f"gan_{estimator}", init, disc=disc, estimator=estimator))
    evaluate.main(evaluate.Config(out_dir=str(root), reference=init, reward=reward, samples=10, best_of=(2,), **CPU))
    return root


TRAINED = ["sft", "reward_model", "discriminator", "ppo", "dpo", "gan_reinforce", "gan_gumbel", "gan_hidden"]


@pytest.mark.parametrize("stage", TRAINED)
def test_a_run_leaves_what_it_promises(chain, stage):
    folder = chain / stage
    files = {path.name for path in folder.iterdir()}
    assert files == {"ckpt.pt", "config.json", "metrics.jsonl", "samples.txt", "curves.png"} | ({"discriminator.pt"} if "gan" in stage else set())
    config = json.loads((folder / "config.json").read_text())
    module = STAGES[stage.split("_")[0] if stage.startswith("gan") else stage]
    assert set(config) == {field.name for field in dataclasses.fields(module.Config)}
    rows = read_jsonl(folder / "metrics.jsonl")
    assert rows and all(math.isfinite(value) for row in rows for value in row.values())
    assert all("step" in row and "seconds" in row for row in rows) and [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    if stage not in ("reward_model", "discriminator"):
        assert "About a" in (folder / "samples.txt").read_text()
    saved = torch.load(folder / "ckpt.pt", weights_only=True)
    assert saved["tokenizer"] == "puns" and saved["stage"] == module.__name__
    if stage != "discriminator":
        model = load_model(folder / "ckpt.pt")
        assert not model.training and isinstance(model, Scorer) == (stage == "reward_model")


def test_the_report_has_every_policy(chain):
    report = json.loads((chain / "report.json").read_text())
    assert [row["policy"] for row in report["rows"]] == ["sft", "best of 2", "dpo", "gan_gumbel", "gan_hidden", "gan_reinforce", "ppo"]
    assert (chain / "report.md").exists() and (chain / "report.png").exists()


def test_every_policy_has_moved_and_the_sft_model_has_not(chain, sft_ckpt):
    start = load_model(sft_ckpt).state_dict()
    for stage in ("ppo", "dpo", "gan_reinforce", "gan_gumbel", "gan_hidden"):
        weights = load_model(chain / stage / "ckpt.pt").state_dict()
        assert any(not torch.equal(weights[name], start[name]) for name in start), stage


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pairs(folder):
    """A file of twenty pairs: its held-out tenth is measured in no time."""
    return write_jsonl(folder / "pairs.jsonl", [{"prompt": "About a banker:", "chosen": f" yes{' yes' * i}", "rejected": " no"} for i in range(20)])


# every value of every option that names a way of doing things, two steps each
OPTIONS = [(reward_model, dict(loss="ranking")), (reward_model, dict(centering=0.01, noise=0.2)),
           (discriminator, dict(lstm=True, label_smoothing=0.1)),
           *[(dpo, dict(loss=loss)) for loss in dpo.LOSSES if loss != "dpo"], (dpo, dict(noise=0.2)),
           (ppo, dict(baseline="rloo", group_size=2)), (ppo, dict(baseline="grpo", group_size=4)), (ppo, dict(temperature=0.7)),
           (ppo, dict(ppg_interval=1, ppg_epochs=1)), (ppo, dict(kl_target=2.0)),
           (gan, dict(objective="original")), (gan, dict(estimator="gumbel", objective="original", tau=0.5)),
           (gan, dict(estimator="hidden", objective="original")), (gan, dict(baseline="rloo", group_size=2)), (gan, dict(d_steps=0))]


@pytest.mark.parametrize("module, changes", OPTIONS, ids=lambda x: x.__name__ if hasattr(x, "__name__") else "-".join(map(str, x.values())))
def test_every_option_runs(chain, tmp_path, module, changes):
    config = tiny(module, tmp_path, str(chain / "sft" / "ckpt.pt"), reward=str(chain / "reward_model" / "ckpt.pt"),
                  disc=str(chain / "discriminator" / "ckpt.pt"), data=pairs(tmp_path) if "loss" in changes and module is dpo else "", **changes)
    module.train(config)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert (tmp_path / "ckpt.pt").exists() and rows[-1]["step"] == 2


def test_a_discriminator_with_an_lstm_serves_gumbel(chain, tmp_path):
    init = str(chain / "sft" / "ckpt.pt")
    discriminator.train(tiny(discriminator, tmp_path / "d", init, lstm=True))
    gan.train(tiny(gan, tmp_path / "g", init, disc=str(tmp_path / "d" / "ckpt.pt"), estimator="gumbel"))
    assert discriminator.load_discriminator(tmp_path / "g" / "discriminator.pt").lstm is not None


def test_bfloat16_keeps_float32_weights(sft_ckpt, tmp_path):
    """autocast computes in bfloat16; the weights that AdamW moves stay float32, or small steps would round to nothing."""
    ppo.train(tiny(ppo, tmp_path, sft_ckpt, dtype="bfloat16"), reward_fn=lambda prompts, texts: [len(text) / 9 for text in texts])
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    assert all(x.dtype == torch.float32 for x in saved.values())


def test_own_files_go_through_every_stage(chain, tmp_path):
    """--data of each stage, and prompts of any length."""
    init, reward, disc = (str(chain / stage / "ckpt.pt") for stage in ("sft", "reward_model", "discriminator"))
    prompts = ["About a banker:", "Hi", "Tell me a joke about naïve cafés 😀:", "Why?"] * 5
    texts = write_jsonl(tmp_path / "t.jsonl", [{"prompt": p, "completion": f" {'yes ' * (i % 3)}no"} for i, p in enumerate(prompts)])
    compared = write_jsonl(tmp_path / "p.jsonl", [{"prompt": p, "chosen": " yes", "rejected": " no" * (1 + i % 5)} for i, p in enumerate(prompts)])
    ranks = write_jsonl(tmp_path / "r.jsonl", [{"prompt": p, "ranked": [" yes", " no", " maybe", " hm"]} for p in prompts])
    alone = write_jsonl(tmp_path / "a.jsonl", [{"prompt": p} for p in prompts])
    for module, data, changes in ((sft, texts, {}), (reward_model, compared, {}), (reward_model, ranks, dict(loss="ranking")), (discriminator, texts, {}),
                                  (ppo, alone, {}), (dpo, compared, {}), (gan, texts, {})):
        module.train(tiny(module, tmp_path / module.__name__, init, data=data, reward=reward, disc=disc, **changes))
    report = evaluate.evaluate(evaluate.Config(out_dir=str(tmp_path), reference=init, reward=reward, data=alone, samples=8, best_of=(), **CPU))
    assert [row["policy"] for row in report["rows"]] == ["sft", "dpo", "gan", "ppo"]


def test_a_file_of_one_record_is_an_error_and_no_traceback(tmp_path, sft_ckpt):
    one = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "p", "completion": " c"}])
    with pytest.raises(InputError):
        sft.train(tiny(sft, tmp_path / "sft", sft_ckpt, data=one))


def test_a_long_prompt_beside_a_long_response(tmp_path, sft_ckpt, tok):
    """Both records fit the block of 48, but a batch of both is wider than 48: it pads the one's prompt and the other's response. The positions
    are counted without pads, so it can be trained on."""
    def letters(n):
        return "1 " * (n // 2)          # a token each

    records = [{"prompt": letters(44), "completion": " no"}, {"prompt": "Hi", "completion": letters(40)}]
    compared = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " 2"} for r in records]
    assert len(tok.encode(letters(44))) >= 44
    for module, data in ((sft, records), (dpo, compared), (reward_model, compared)):
        data = write_jsonl(tmp_path / "long.jsonl", data * 10)
        module.train(tiny(module, tmp_path / module.__name__, sft_ckpt, data=data))
    model = awake(toy(block_size=9))      # with a text that fills the block to the last place: the same numbers as alone
    prompt, response = torch.tensor([[1] * 7, [12] * 6 + [2]]), torch.tensor([[3, 11] + [12] * 6, [5] * 7 + [11]])
    together = logprobs(model, prompt, response)
    torch.testing.assert_close(together[:1, :2], logprobs(model, prompt[:1], response[:1, :2]))
    torch.testing.assert_close(together[1:], logprobs(model, prompt[1:, -1:], response[1:]))
    with pytest.raises(InputError, match="block of 9"):
        model.hidden(torch.ones(1, 7, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))


# discriminator.train() reads the fakes' text again and adds an end token to those that had no room for one, so that they no longer fit. To fix
# it, leave room for it: write(..., max_new_tokens=min(32, block_size - 1 - longest prompt)), and encode with block_size, not block_size - 1.
def test_fakes_that_fill_the_block_fit(tmp_path, sft_ckpt):
    data = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "1 " * 20, "completion": " no"}] * 20)
    discriminator.train(tiny(discriminator, tmp_path / "d", sft_ckpt, data=data))


def test_dropout_is_off_where_it_must_be(tmp_path, sft_ckpt):
    """A policy trained with dropout: PPO's first ratio is 1 all the same, DPO starts at ln 2."""
    model = load_model(sft_ckpt)
    model.config.dropout = 0.5
    save_model(tmp_path / "ckpt.pt", model, tokenizer="puns")
    init = str(tmp_path / "ckpt.pt")
    ppo.train(tiny(ppo, tmp_path / "ppo", init), reward_fn=lambda prompts, texts: [len(text) / 9 for text in texts])
    assert all(row["first_ratio"] < 1e-5 for row in read_jsonl(tmp_path / "ppo" / "metrics.jsonl"))
    dpo.train(tiny(dpo, tmp_path / "dpo", init, data=pairs(tmp_path)))
    assert read_jsonl(tmp_path / "dpo" / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)

@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler on a CPU")
def test_compile_changes_no_number():
    """The training step that --compile compiles: the same loss and the same gradients, for two shapes of batch."""
    for prompt, completion in ((3, 5), (4, 7)):
        found = []
        for forward in (sft.loss_of, torch.compile(sft.loss_of, dynamic=True)):
            model, generator = awake(toy()), torch.Generator().manual_seed(0)
            batch = {"prompt": torch.randint(0, 11, (4, prompt), generator=generator), "completion": torch.randint(0, 11, (4, completion), generator=generator)}
            batch["completion"][0, 2:] = 12
            loss, nats = forward(model, batch)
            loss.backward()
            found.append([loss.detach(), nats.detach(), *(p.grad for p in model.parameters())])
        for plain, compiled in zip(*found, strict=True):
            torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)

# -----------------------------------------------------------------------------
# going on after a stop

# Trains a stage and kills itself, with the signal that nothing can catch, in the middle of step 5: behind the state of step 4, with rows
# in metrics.jsonl that are newer than it.
KILLED = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
import common, ppo, sft
log = common.Run.log
def log_and_die(self, **metrics):
    log(self, **metrics)
    if self.step + 1 == 6:
        os.kill(os.getpid(), signal.SIGKILL)
common.Run.log = log_and_die
stage, options = sys.argv[1], json.loads(sys.argv[2])
module = {"sft": sft, "ppo": ppo}[stage]
reward = {"reward_fn": lambda prompts, texts: [text.count("e") / 4 for text in texts]} if stage == "ppo" else {}
module.train(module.Config(**options), **reward)
"""


def without_seconds(folder):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.parametrize("stage, changes", [
    ("sft", dict(max_steps=9, eval_interval=4, log_interval=1, corpus_size=200)),
    ("ppo", dict(max_steps=9, sample_interval=4, kl_target=1.0, lr=1e-3)),
    ("ppo", dict(max_steps=9, sample_interval=4, ppg_interval=2, ppg_epochs=1, lr=1e-3))])
def test_a_killed_run_goes_on_to_the_same_end(tmp_path, sft_ckpt, stage, changes):
    """Killed, resumed, and run in one go: the same metrics, samples and weights, bit for bit."""
    module, killed, whole = STAGES[stage], tmp_path / "killed", tmp_path / "whole"
    reward = {"reward_fn": lambda prompts, texts: [text.count("e") / 4 for text in texts]} if stage == "ppo" else {}
    init = "" if stage == "sft" else sft_ckpt
    sizes = {name: TINY_SFT[name] for name in ("n_layer", "n_head", "n_embd")} if stage == "sft" else {}
    config = tiny(module, killed, init, **sizes, **changes)
    dead = python(KILLED, ROOT, stage, json.dumps(dataclasses.asdict(config)))
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert (killed / "state.pt").exists() and not (killed / "ckpt.pt").exists()
    assert read_jsonl(killed / "metrics.jsonl")[-1]["step"] == 6 and torch.load(killed / "state.pt", weights_only=True)["step"] == 4
    module.train(config, **reward)
    module.train(dataclasses.replace(config, out_dir=str(whole)), **reward)
    assert without_seconds(killed) == without_seconds(whole)
    assert (killed / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    a, b = (load_model(folder / "ckpt.pt").state_dict() for folder in (killed, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (killed / "state.pt").exists() and not list(killed.glob("*.tmp"))


@pytest.mark.parametrize("stage", ["reward_model", "discriminator", "dpo", "gan"])
def test_an_interrupted_run_goes_on_to_the_same_end(chain, tmp_path, monkeypatch, stage):
    """The same for the other stages, stopped by an exception in step 4, which leaves the same files behind."""
    module = STAGES[stage]
    config = tiny(module, tmp_path / "stopped", str(chain / "sft" / "ckpt.pt"), disc=str(chain / "discriminator" / "ckpt.pt"), max_steps=5,
                  eval_interval=3, sample_interval=3, data=pairs(tmp_path) if stage == "dpo" else "")
    log = common.Run.log

    def log_and_stop(self, **metrics):
        log(self, **metrics)
        if self.step + 1 == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "log", log_and_stop)
        module.train(config)
    assert (tmp_path / "stopped" / "state.pt").exists()
    module.train(config)
    module.train(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))
    assert without_seconds(tmp_path / "stopped") == without_seconds(tmp_path / "whole")
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"] for name in ("stopped", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_other_options_start_anew(tmp_path, sft_ckpt, capsys):
    config = tiny(dpo, tmp_path, sft_ckpt)
    run = common.Run("dpo", config, 4)
    for step in run.steps(2, model=toy()):
        run.log(loss=1.0)
        if step == 2:
            break
    run = common.Run("dpo", dataclasses.replace(config, lr=9.0), 4)
    assert next(run.steps(2, model=toy())) == 0 and "made with other options" in capsys.readouterr().out
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_a_number_that_is_not_finite_stops_the_run(tmp_path, sft_ckpt):
    run = common.Run("dpo", tiny(dpo, tmp_path, sft_ckpt), 4)
    next(run.steps(2))
    with pytest.raises(InputError, match="dpo: loss is nan at step 1"):
        run.log(loss=math.nan)


def test_no_file_is_half_written(tmp_path):
    path = tmp_path / "a" / "ckpt.pt"
    with common.replacing(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), common.replacing(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old"
