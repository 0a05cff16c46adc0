"""Sampling: which policies, which prompt, and what stands beside a sample."""

import io
import os

import pytest
import torch
from conftest import CPU, copies, off, records, refuses, with_another_tokenizer

import sample
from common import InputError, read_jsonl
from data import complete
from model import RewardModel, load_model, load_reward_model, save_model
from reward_model import score_texts


@pytest.fixture
def runs(tmp_path, monkeypatch, sft_ckpt, tok):
    """A folder with runs/ in it: two policies and a reward model."""
    monkeypatch.chdir(tmp_path)
    return copies(tmp_path / "runs", sft_ckpt, "ppo", "sft")


def add_reward_model(sft_ckpt, tok):
    save_model("runs/reward_model/ckpt.pt", RewardModel(load_model(sft_ckpt)), tok)


def output_of(capsys, **options):
    capsys.readouterr()
    sample.main(sample.Config(**(CPU | options)))
    return capsys.readouterr().out


def test_every_policy_writes(runs, capsys, sft_ckpt, tok):
    """The SFT model first; kl beside each sample, and score where there is a reward model."""
    lines = output_of(capsys, prompt="a banker", n=2).splitlines()
    assert lines[1] == "runs/sft/ckpt.pt" and lines[5] == "runs/ppo/ckpt.pt" and len(lines) == 8
    assert all("| About a banker:" in lines[i] for i in (2, 3, 6, 7))
    assert all("kl +0.00" in lines[i] and "score" not in lines[i] for i in (2, 3, 6, 7))
    assert lines[2:4] == lines[6:8]                 # the same model with the same seed
    add_reward_model(sft_ckpt, tok)
    out = output_of(capsys, prompt="a banker", n=2)
    assert out.count("score ") == 4 and "reward_model" not in out       # it is no policy
    alone = output_of(capsys, prompt="a banker", policies=("runs/ppo/ckpt.pt",), runs="none")
    assert "runs/sft" not in alone and "kl" not in alone and alone.count("About a banker:") == 3
    policy = load_model(sft_ckpt)
    policy.wte.weight.data *= 1.5
    save_model("runs/ppo/ckpt.pt", policy, tok)     # another one: kl is that to the SFT model
    lines = output_of(capsys, prompt="a banker", n=2, max_new_tokens=2).splitlines()
    assert ["kl +0.00" in lines[i] for i in (2, 3, 6, 7)] == [True, True, False, False]
    texts = [line.partition("banker:")[2].partition("  score")[0] for line in lines[2:4]]
    assert all(len(tok.encode(text)) <= 2 for text in texts)


def test_options_of_the_sampling(runs, capsys):
    for options in (dict(temperature=0.0), dict(top_k=1), dict(top_p=1e-6)):
        out = output_of(capsys, prompt="a banker", n=3, policies=("runs/ppo/ckpt.pt",),
                        runs="none", **options)
        assert len({line for line in out.splitlines() if "About" in line}) == 1
    seeds = [output_of(capsys, prompt="a banker", seed=seed) for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_the_best_of_n_becomes_records(runs, capsys, sft_ckpt, tok, monkeypatch):
    """Of four samples of the first policy for each prompt the one of the highest score."""
    prompts, how = ["About a banker:", "About an owl:"], dict(temperature=1.2, top_k=99, top_p=.99)
    policy = load_model(sft_ckpt)
    policy.wte.weight.data *= 1.1
    save_model("policy.pt", policy, tok)            # not the one that kl is measured to
    options = dict(best_to="best.jsonl", n=4, policies=("policy.pt",), **how,
                   data=records("prompts.jsonl", [{"prompt": prompt} for prompt in prompts]))
    refuses("reward_model/ckpt.pt, which scores", output_of, capsys, **options)
    add_reward_model(sft_ckpt, tok)
    out = output_of(capsys, **options | dict(policies=("policy.pt", "runs/ppo/ckpt.pt")))
    repeated = [prompt for prompt in prompts for _ in range(4)]
    rng = torch.Generator().manual_seed(sample.Config().seed)
    texts = complete(policy, tok, repeated, rng, off, **how)
    reward = load_reward_model("runs/reward_model/ckpt.pt")
    scores = score_texts(reward, tok, repeated, texts, off).view(2, 4)
    best = [texts[i] for i in (scores[0].argmax(), 4 + scores[1].argmax())]
    expected = [{"prompt": prompt, "completion": text}
                for prompt, text in zip(prompts, best, strict=True) if text.strip()]
    assert read_jsonl("best.jsonl") == expected
    assert expected and f"best.jsonl: {len(expected)} records" in out
    output_of(capsys, **options, max_new_tokens=2)
    assert all(len(tok.encode(row["completion"])) <= 2 for row in read_jsonl("best.jsonl"))
    monkeypatch.setattr(sample, "measure", lambda *args: [dict(text=" ", score=1.0)] * 8)
    assert "best.jsonl: 0 records" in output_of(capsys, **options)      # an empty text is none


def test_a_prompt_is_a_thing_or_any_text():
    for text in ("banker", "a banker", "About a banker:"):
        assert sample.make_prompt(text) == "About a banker:"
    assert sample.make_prompt("elevator") == "About an elevator:"
    assert sample.make_prompt("Tell me a joke.") == "Tell me a joke."


def test_prompts_are_asked_for(runs, capsys, monkeypatch):
    """The same prompt again gets other samples, a bad one an error, and an empty line ends."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"banker\nbanker\n{'1 ' * 40}\n\nowl\n"))
    out = output_of(capsys, policies=("runs/sft/ckpt.pt",))
    texts = [line for line in out.splitlines() if "| About a banker:" in line]
    assert len(texts) == len(set(texts)) == 6
    assert "error: the prompt '1 1" in out and "owl" not in out
    monkeypatch.setattr("sys.stdin", io.StringIO("elevator"))
    assert "About an elevator:" in output_of(capsys, policies=("runs/sft/ckpt.pt",))


def test_another_tokenizer_gets_no_score(runs, capsys, sft_ckpt, tok, monkeypatch):
    """Its ids mean other tokens to the reference and the reward model."""
    add_reward_model(sft_ckpt, tok)
    for path in ("runs/sft/ckpt.pt", "runs/reward_model/ckpt.pt"):
        with_another_tokenizer(path, path)
    out = output_of(capsys, prompt="a banker", policies=("runs/ppo/ckpt.pt",))
    assert "About a banker:" in out and "kl" not in out and "score" not in out
    with pytest.raises(InputError, match="another tokenizer than"):
        output_of(capsys, best_to="best.jsonl", policies=("runs/ppo/ckpt.pt",))
    os.remove("runs/sft/ckpt.pt")                   # nor is there a score without a reference
    out = output_of(capsys, prompt="a banker", policies=("runs/ppo/ckpt.pt",))
    assert "About a banker:" in out and "score" not in out


def test_options_without_an_effect_are_refused(capsys):
    refuses("--data has no effect without --best_to", output_of, capsys, data="x")
    refuses("--prompt has no effect with --best_to x", output_of, capsys, prompt="a", best_to="x")


def test_no_policy_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no policy in runs/; train one with: make"):
        sample.main(sample.Config(prompt="a banker", **CPU))
