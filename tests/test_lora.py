"""Adapters on one trunk: what they may change, and what never."""

import json

import pytest
import torch
from conftest import CPU
from test_model import PROMPT, RESPONSE, close, make

import dpo
import ppo
import reward_model
import sft
from common import InputError, read_jsonl
from lora import Adapted, adapter, add_adapter, load_adapter, megabytes, merged, prepare, save_adapter, train_only
from model import Scorer, load_model, logprobs, save_model
from optim import adamw, optimizer_step


@pytest.fixture(params=["gpt", "palm", "t5-v1.0", "t5-v1.1"])
def model(request):
    return make(request.param)


def learn(model, name, steps=3):
    """A few updates of one adapter (and of the head, if there is one)."""
    train_only(model, "adapters")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        with adapter(model, name):
            loss = model(PROMPT, RESPONSE).sum() if isinstance(model, Scorer) else logprobs(model, PROMPT, RESPONSE).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_new_adapter_changes_nothing_and_learning_leaves_the_trunk_alone(model):
    trunk = {name: p.clone() for name, p in model.named_parameters()}
    logits = model.logits(PROMPT, RESPONSE)
    add_adapter(model, "policy", rank=4)
    assert not any("lm_head.lora" in name for name, _ in model.named_parameters())
    with adapter(model, "policy"):
        assert torch.equal(model.logits(PROMPT, RESPONSE), logits)
    learn(model, "policy")
    assert torch.equal(model.logits(PROMPT, RESPONSE), logits)             # no adapter: the reference, bit for bit
    assert all(torch.equal(p, trunk[name]) for name, p in model.named_parameters() if name in trunk)
    with adapter(model, "policy"):
        with adapter(model, None):
            assert torch.equal(model.logits(PROMPT, RESPONSE), logits)
        assert not torch.allclose(model.logits(PROMPT, RESPONSE), logits, atol=1e-2)


def test_adapters_do_not_touch_each_other(model):
    critic = Scorer(model)
    add_adapter(critic, "policy")
    add_adapter(critic, "value", rank=2, targets="attention")
    train_only(critic, "adapters")
    with adapter(critic, "value"):
        critic(PROMPT, RESPONSE).sum().backward()
    got = {name for name, p in critic.named_parameters() if p.grad is not None}
    assert got == {name for name, p in critic.named_parameters() if name.endswith(".value") or name.startswith("scalar")}


def test_merged_is_unmerged_and_comes_back(model, tmp_path):
    add_adapter(model, "policy")
    learn(model, "policy")
    reference, weights = model.logits(PROMPT, RESPONSE), {n: p.clone() for n, p in model.state_dict().items()}
    with adapter(model, "policy"):
        logits = model.logits(PROMPT, RESPONSE)
    with merged(model, "policy"):
        close(model.logits(PROMPT, RESPONSE), logits, atol=1e-4)
        save_model(tmp_path / "ckpt.pt", model)
        with pytest.raises(InputError, match="part of the weights"), adapter(model, "policy"):
            pass
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
    assert torch.equal(model.logits(PROMPT, RESPONSE), reference)
    close(load_model(tmp_path / "ckpt.pt").logits(PROMPT, RESPONSE), logits, atol=1e-4)      # a plain model, merged once


def test_saved_alone(model, tmp_path):
    save_model(tmp_path / "trunk.pt", model)
    scorer = Scorer(model)
    add_adapter(scorer, "reward", rank=2, targets="attention")
    learn(scorer, "reward")
    scorer.normalize(scorer(PROMPT, RESPONSE))
    save_adapter(tmp_path / "reward.pt", scorer, "reward")
    assert (tmp_path / "reward.pt").stat().st_size < 0.8 * (tmp_path / "trunk.pt").stat().st_size
    again = Scorer(load_model(tmp_path / "trunk.pt"))
    assert load_adapter(tmp_path / "reward.pt", again) == "reward"
    with adapter(scorer, "reward"), adapter(again, "reward"):
        assert torch.equal(scorer(PROMPT, RESPONSE), again(PROMPT, RESPONSE))
    with pytest.raises(InputError, match="another model"):
        load_adapter(tmp_path / "reward.pt", Scorer(make("gpt", n_embd=16)))


def test_checkpointing_remembers_the_adapter(model):
    add_adapter(model, "policy")
    learn(model, "policy")
    grads = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        with adapter(model, "policy"):
            loss = logprobs(model, PROMPT, RESPONSE).sum()
        loss.backward()                                     # outside: no adapter is active when blocks are computed again
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_train_only(model):
    scorer = Scorer(model)
    add_adapter(scorer, "policy")

    def learning():
        return {name.removeprefix("model.") for name, p in scorer.named_parameters() if p.requires_grad}
    train_only(scorer, "all")
    assert len(learning()) == len(list(scorer.parameters()))
    train_only(scorer, "last:1")
    stack = "decoder." if model.config.arch == "t5" else ""
    assert {name for name in learning() if not name.startswith(f"{stack}h.1.")} <= {
        f"{stack}ln_f.weight", f"{stack}ln_f.bias", "scalar.weight", "scalar.bias"}
    assert f"{stack}ln_f.weight" in learning() and any(name.startswith(f"{stack}h.1.") for name in learning())
    for wrong in ("last:0", "some"):
        with pytest.raises(InputError, match="last:k"):
            train_only(scorer, wrong)
    with pytest.raises(InputError, match="no adapter 'polcy'"), adapter(scorer, "polcy"):
        pass
    with pytest.raises(InputError, match="there already"):
        add_adapter(scorer, "policy")

# -----------------------------------------------------------------------------
# in the stages

def test_a_view_is_the_model_with_that_adapter(model):
    scorer = Scorer(model)
    add_adapter(scorer, "reward")
    learn(scorer, "reward")
    reference = logprobs(model, PROMPT, RESPONSE)
    with adapter(model, "reward"):
        assert torch.equal(logprobs(Adapted(model, None), PROMPT, RESPONSE), reference)          # whatever is active outside
        score = scorer(PROMPT, RESPONSE)
    assert torch.equal(Adapted(scorer, "reward")(PROMPT, RESPONSE), score)
    assert not torch.allclose(scorer(PROMPT, RESPONSE), score, atol=1e-3) and Adapted(scorer, "reward").pad_id == model.pad_id


def small(module, folder, init, **changes):
    """The Config of a stage for a few tiny steps, on data of its own where it takes records: a small held-out part is measured quickly."""
    fields, data = module.Config.__dataclass_fields__, folder.parent / f"{module.__name__}.jsonl"
    texts = {"sft": dict(completion=" I lost it."), "dpo": dict(chosen=" yes", rejected=" no")}.get(module.__name__)
    if texts:
        data.write_text((json.dumps({"prompt": "About a banker:"} | texts) + "\n") * 20)
        changes = changes | dict(data=str(data))
    sizes = dict(out_dir=str(folder), init=init, max_steps=3, batch_size=8, minibatch_size=4, max_new_tokens=6, eval_interval=3, log_interval=1,
                 corpus_size=60, warmup_steps=1, **CPU) | changes
    return module.Config(**{name: value for name, value in sizes.items() if name in fields})


@pytest.fixture(scope="module")
def hydra(tmp_path_factory, sft_ckpt):
    """A reward model and a policy, both as adapters on the SFT model."""
    folder = tmp_path_factory.mktemp("hydra")
    reward_model.train(small(reward_model, folder / "reward_model", sft_ckpt, lora=2, lr=0.05))
    ppo.train(small(ppo, folder / "ppo", sft_ckpt, reward=str(folder / "reward_model" / "ckpt.pt"), lora=4, lr=1e-2))
    return folder


def test_one_trunk_for_all(hydra, sft_ckpt, capsys):
    """What ppo.py --lora computes with one trunk is what four models say: the merged reward model's score, the SFT model's log-probs."""
    policy = load_model(sft_ckpt)
    score_fn = ppo.load_reward_adapter(policy, small(ppo, hydra, sft_ckpt, reward=str(hydra / "reward_model" / "ckpt.pt"), lora=4))
    assert load_adapter(hydra / "ppo" / "adapter.pt", policy) == "policy"
    whole, reference, merged_policy = (load_model(path) for path in (hydra / "reward_model" / "ckpt.pt", sft_ckpt, hydra / "ppo" / "ckpt.pt"))
    policy.adapters.active = "policy"
    close(score_fn(PROMPT, RESPONSE), whole(PROMPT, RESPONSE), atol=1e-4)
    close(logprobs(Adapted(policy, None), PROMPT, RESPONSE), logprobs(reference, PROMPT, RESPONSE), atol=0)
    close(logprobs(policy, PROMPT, RESPONSE), logprobs(merged_policy, PROMPT, RESPONSE), atol=1e-4)
    assert (logprobs(policy, PROMPT, RESPONSE) - logprobs(reference, PROMPT, RESPONSE)).abs().max() > 1e-3
    rows = read_jsonl(hydra / "ppo" / "metrics.jsonl")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl"] != pytest.approx(0, abs=1e-5)
    assert rows[0]["first_ratio"] < 1e-5
    assert (hydra / "ppo" / "adapter.pt").stat().st_size < 0.2 * (hydra / "ppo" / "ckpt.pt").stat().st_size


def test_only_the_adapter_is_in_the_optimizer(sft_ckpt, tmp_path):
    """Of what the hydra holds, the policy's adapter alone has gradients: not the trunk, not the reward model's adapter nor its head."""
    model = load_model(sft_ckpt)
    add_adapter(Scorer(model), "reward", 2)
    prepare(model, small(ppo, tmp_path, sft_ckpt, lora=4), "policy")
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learning and all(name.endswith(".policy") for name in learning) and model.adapters.active == "policy"
    few, all_of_it = (load_model(sft_ckpt) for _ in range(2))
    prepare(few, small(ppo, tmp_path, sft_ckpt, lora=1), "policy")
    bytes_ = []
    for m in (few, all_of_it):
        optimizer = adamw(m, 1e-3)
        optimizer_step(logprobs(m, PROMPT, RESPONSE).sum(), m, optimizer, 1.0)
        bytes_.append(megabytes([m], optimizer))
    weights = sum(p.nbytes for p in all_of_it.parameters()) / 1e6
    assert bytes_[1] == pytest.approx(4 * weights, rel=1e-3)            # weights, gradients and two moments
    assert weights < bytes_[0] < 1.3 * weights


def test_a_rewarded_token_becomes_likelier(sft_ckpt, tmp_path):
    """PPO with adapters learns a reward of our own: how many words begin with a."""
    ppo.train(small(ppo, tmp_path, sft_ckpt, batch_size=64, minibatch_size=32, max_steps=12, max_new_tokens=8, lr=1e-2, end_penalty=0.0, kl_coef=0.01,
                    lora=4), lambda prompts, texts: [float(text.count(" a")) for text in texts])
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert sum(row["score"] for row in rows[-4:]) / 4 > 1.3 * rows[0]["score"] and rows[-1]["kl"] > 0.1


@pytest.mark.parametrize("module, changes", [(sft, dict(lora=2)), (dpo, dict(lora=2)), (sft, dict(trainable="last:1")), (dpo, dict(trainable="last:1"))])
def test_what_learns_in_other_stages(sft_ckpt, tmp_path, module, changes):
    """The embedding, which lies under the last block and under all adapters, stays as it was; the blocks' matrices move."""
    module.train(small(module, tmp_path, sft_ckpt, **changes))
    before, after = (load_model(path).state_dict() for path in (sft_ckpt, tmp_path / "ckpt.pt"))
    assert torch.equal(before["wte.weight"], after["wte.weight"]) and not torch.equal(before["h.0.mlp.c_fc.weight"], after["h.0.mlp.c_fc.weight"])
    assert (tmp_path / "adapter.pt").exists() == ("lora" in changes)


def test_mistakes_with_adapters_are_said(hydra, sft_ckpt, tmp_path):
    save_model(tmp_path / "full.pt", Scorer(load_model(sft_ckpt)), tokenizer="puns")
    with pytest.raises(InputError, match=r"python reward_model.py --lora 4 --init .*sft/ckpt.pt"):
        ppo.train(small(ppo, tmp_path, sft_ckpt, reward=str(tmp_path / "full.pt"), lora=4))
    with pytest.raises(InputError, match="belongs to another model"):       # the shapes fit, the trunk is another
        ppo.train(small(ppo, tmp_path, str(hydra / "ppo" / "ckpt.pt"), reward=str(hydra / "reward_model" / "ckpt.pt"), lora=4))
    with pytest.raises(InputError, match="leave --trainable last:1 out"):
        prepare(load_model(sft_ckpt), small(ppo, tmp_path, sft_ckpt, lora=4, trainable="last:1"), "policy")


@pytest.mark.parametrize("changes", [dict(checkpointing=True), dict(checkpointing=True, lora=2)])
def test_checkpointing_changes_no_number_of_a_run(sft_ckpt, tmp_path, changes):
    for name, options in (("with", changes), ("without", changes | dict(checkpointing=False))):
        dpo.train(small(dpo, tmp_path / name, sft_ckpt, **options))
    a, b = ([{k: v for k, v in row.items() if k != "seconds"} for row in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("with", "without"))
    assert a == b
