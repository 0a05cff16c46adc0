"""PaLM and T5 through every stage: none asks which architecture it has, so each must work as GPT-2 does."""

import ast
import json
import math

import pytest
import torch
from conftest import CPU, ROOT, TINY_SFT

import discriminator
import dpo
import evaluate
import gan
import ppo
import reward_model
import sft
from common import read_jsonl
from model import load_model

TEXTS = {"sft": dict(completion=" I lost a lot."), "discriminator": dict(completion=" I lost a lot."), "gan": dict(completion=" I lost a lot."),
         "reward_model": dict(chosen=" yes", rejected=" no, no"), "dpo": dict(chosen=" yes", rejected=" no, no"), "ppo": {}}


def config(module, folder, **changes):
    """Two tiny steps on a file of 40 records with prompts of different lengths."""
    sizes = dict(out_dir=str(folder), max_steps=2, warmup_steps=1, batch_size=8, minibatch_size=4, d_batch_size=4, eval_interval=2, log_interval=1,
                 sample_interval=1, max_new_tokens=6, **CPU) | changes
    if "data" not in changes:
        data = folder.parent / f"{module.__name__}.jsonl"
        prompts = ["About a banker:", "Hi", "Why not, dear old friend of mine?", "About a nurse:"] * 10
        data.write_text("".join(json.dumps({"prompt": prompt} | TEXTS[module.__name__]) + "\n" for prompt in prompts))
        sizes["data"] = str(data)
    return module.Config(**{name: value for name, value in sizes.items() if name in module.Config.__dataclass_fields__})


@pytest.fixture(scope="module", params=["palm", "t5"])
def trained(request, tmp_path_factory):
    """The folder of all stages, from a checkpoint of this architecture."""
    root = tmp_path_factory.mktemp(request.param)
    sft.train(config(sft, root / "sft", arch=request.param, data="", **{k: v for k, v in TINY_SFT.items() if k not in CPU}))
    paths = {name: str(root / folder / "ckpt.pt") for name, folder in (("init", "sft"), ("reward", "reward_model"), ("disc", "discriminator"))}
    reward_model.train(config(reward_model, root / "reward_model", **paths, lora=2))
    discriminator.train(config(discriminator, root / "discriminator", **paths))
    dpo.train(config(dpo, root / "dpo", **paths))
    ppo.train(config(ppo, root / "ppo", **paths))
    ppo.train(config(ppo, root / "ppo_lora", **paths, lora=2))
    for estimator in ("reinforce", "gumbel", "hidden"):
        gan.train(config(gan, root / f"gan_{estimator}", **paths, estimator=estimator))
    return request.param, root


def test_each_stage_starts_where_it_must(trained):
    """Ratio 1 and KL 0 before the first step of PPO and the GAN, ln 2 in DPO, and all has moved at the end."""
    arch, root = trained
    start = load_model(root / "sft" / "ckpt.pt").state_dict()
    for name in ("ppo", "ppo_lora", "gan_reinforce", "gan_gumbel", "gan_hidden", "dpo"):
        row = read_jsonl(root / name / "metrics.jsonl")[0]
        if name == "dpo":
            assert row["loss"] == pytest.approx(math.log(2), abs=1e-4)
        else:
            assert row["kl"] == pytest.approx(0, abs=1e-4)
        assert row.get("first_ratio", 0) < 1e-4
        model = load_model(root / name / "ckpt.pt")
        assert model.config.arch == arch and any(not torch.equal(weight, start[key]) for key, weight in model.state_dict().items()), name
    assert (root / "reward_model" / "adapter.pt").exists() and (root / "ppo_lora" / "adapter.pt").exists()


def test_the_report_has_them_all(trained):
    _, root = trained
    report = evaluate.evaluate(evaluate.Config(out_dir=str(root), reference=str(root / "sft/ckpt.pt"), reward=str(root / "reward_model/ckpt.pt"),
                                               samples=8, best_of=(2,), **CPU))
    assert [row["policy"] for row in report["rows"]] == ["sft", "best of 2", "dpo", "gan_gumbel", "gan_hidden", "gan_reinforce", "ppo", "ppo_lora"]


def test_ppo_learns(trained, tmp_path):
    """A reward of our own, words that begin with a, goes up."""
    _, root = trained
    ppo.train(config(ppo, tmp_path / "ppo", init=str(root / "sft/ckpt.pt"), data="", batch_size=64, minibatch_size=32, max_steps=12, max_new_tokens=8,
                     lr=3e-3, end_penalty=0.0, kl_coef=0.01, sample_interval=50), lambda prompts, texts: [float(text.count(" a")) for text in texts])
    scores = [row["score"] for row in read_jsonl(tmp_path / "ppo" / "metrics.jsonl")]
    assert sum(scores[-3:]) / 3 > 1.3 * scores[0] + 0.05


def test_no_stage_asks_which_architecture_it_has():
    """The word arch stands in no stage but sft.py, which makes the model."""
    for name in ("reward_model", "discriminator", "ppo", "dpo", "gan", "evaluate"):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "arch"], name


def test_no_pickle_is_ever_loaded():
    """Every torch.load has weights_only=True, and no module that unpickles is imported."""
    loads = 0
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                loads += 1
                assert "weights_only=True" in [ast.unparse(keyword) for keyword in node.keywords], path
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", "") or "").split(".")[0]}
                assert not names & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
    assert loads >= 4
