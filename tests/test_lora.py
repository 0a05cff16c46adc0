"""Adapters on one trunk: what they change, and what they never change."""

import copy

import conftest
import pytest
import torch
import torch.nn as nn
from conftest import PROMPT, RESPONSE, awake, close, pairs, records, refuses, same, tiny, toy

import dpo
import lora
import sft
from common import InputError, TrainOptions
from lora import AdapterView, adapter, add_adapter, prepare, set_active, train_only
from model import RewardModel, load_model, load_reward_model, logprobs, save_model
from optim import adamw, optimizer_step


def learn(model, name):
    """A few updates of one adapter, and of the head, if there is one."""
    train_only(model, "adapters")
    optimizer = adamw(model, 1e-2)
    for _ in range(3):
        with adapter(model, name):
            optimizer_step(model(PROMPT, RESPONSE).square().mean(), model, optimizer, 0.0)
    return model


def output(model, name=None):
    with adapter(model, name), torch.no_grad():
        return model(PROMPT, RESPONSE)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_an_adapter_starts_as_the_identity_and_leaves_the_trunk_alone(model):
    trunk, logits = copy.deepcopy(model.state_dict()), output(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    add_adapter(model, "policy", rank=4)
    assert {name for name, module in model.named_modules()
            if isinstance(module, lora.LoRALinear)} == linear - {"lm_head"}
    assert torch.equal(output(model, "policy"), logits)
    learn(model, "policy")
    assert torch.equal(output(model), logits)                   # the reference, bit for bit
    assert same({name: model.state_dict()[name] for name in trunk}, trunk)
    assert not torch.allclose(output(model, "policy"), logits, atol=1e-2)


def test_lora_is_its_equation():
    """y = x W + b + alpha / r x A B, with A ~ N(0, 1 / inputs) and B = 0."""
    model = toy()
    add_adapter(model, "policy", rank=4, alpha=10.0)
    layer, x = model.h[0].mlp.c_fc, torch.randn(5, 32)
    a, b = layer.lora_a["policy"], layer.lora_b["policy"]
    assert a.std().item() == pytest.approx(32 ** -0.5, rel=0.2) and not b.any()
    nn.init.normal_(b)
    with adapter(model, "policy"):
        close(layer(x), x @ layer.weight.T + layer.bias + 10 / 4 * x @ a @ b, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 4])
def test_frozen_weights_are_kept_as_autocast_casts_them(model, rank):
    """In bfloat16 linear layers take half the memory, and no output differs in a bit. Adapters
    are trained, in float32, and an adapter fits a trunk of either dtype."""
    plain, frozen = RewardModel(model, 0.5), RewardModel(copy.deepcopy(model), 0.5)
    frozen.load_state_dict(plain.state_dict())
    before = lora.fingerprint(frozen.model)
    for dtype in ("float32", "bfloat16"):
        assert lora.freeze(frozen, TrainOptions(dtype=dtype)) is frozen and not trained(frozen)
    linear = {name for name, module in frozen.named_modules() if isinstance(module, nn.Linear)}
    for name, weight in frozen.named_parameters():
        in_linear = name.rpartition(".")[0] in linear
        assert weight.dtype == (torch.bfloat16 if in_linear else torch.float32), name
    assert lora.fingerprint(frozen.model) == before
    active = "policy" if rank else None
    if rank:
        for reward_model in (plain, frozen):
            torch.manual_seed(0)
            add_adapter(reward_model, "policy", rank)
            for name, weight in reward_model.named_parameters():
                if ".lora_" in name:
                    assert weight.dtype == torch.float32 and weight.requires_grad
                    nn.init.normal_(weight, std=0.1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), \
            adapter(plain, active), adapter(frozen, active):
        assert torch.equal(frozen(PROMPT, RESPONSE), plain(PROMPT, RESPONSE))
        assert torch.equal(frozen.model(PROMPT, RESPONSE), plain.model(PROMPT, RESPONSE))


def test_the_context_restores_what_was_active(model):
    for name in ("a", "b"):
        add_adapter(model, name)
    set_active(model, "a")
    with pytest.raises(RuntimeError), adapter(model, "b"):
        with adapter(model, None):
            assert lora.active_adapter(model) is None
        assert lora.active_adapter(model) == "b"
        raise RuntimeError
    assert lora.active_adapter(model) == "a"
    with pytest.raises(InputError, match="there is no adapter 'c'"), adapter(model, "c"):
        pass
    refuses("there is an adapter 'b' already", add_adapter, RewardModel(model), "b")


def test_a_view_brings_its_adapter(model):
    """For each of its methods, whatever is active outside."""
    add_adapter(model, "policy")
    view, how = AdapterView(learn(model, "policy"), "policy"), dict(max_new_tokens=9, temperature=0)
    with adapter(model, "policy"), torch.no_grad():
        expected = [model(PROMPT, RESPONSE), model.generate(PROMPT, **how)[0]]
    with torch.no_grad():
        assert torch.equal(view(PROMPT, RESPONSE), expected[0])
        assert torch.equal(view.head(view.hidden(PROMPT, RESPONSE)), expected[0])
        assert torch.equal(view.generate(PROMPT, **how)[0], expected[1])
    assert not torch.equal(output(model), expected[0])
    assert set(view.parameters()) == set(model.parameters()) and view.config is model.config

# -----------------------------------------------------------------------------
# which parameters are trained

def test_last_k_is_the_last_k_blocks_and_the_norm_after_them(model):
    reward_model, stack = RewardModel(model), "decoder." if hasattr(model, "decoder") else ""
    trunk = {f"model.{name}" for name, _ in model.named_parameters()}
    top = {name for name in trunk if name.startswith((f"model.{stack}h.1.", f"model.{stack}ln_f."))}
    bottom = {name for name in trunk if name.startswith(f"model.{stack}h.0.")}
    for what, expected in {"last:1": top, "last:2": top | bottom, "adapters": set(),
                           "all": trunk}.items():
        train_only(reward_model, what)
        assert trained(reward_model) == expected | {"scalar_head.weight", "scalar_head.bias"}, what
    for wrong in ("last:0", "last", "last:-1", "some", "last:1 "):
        refuses("--trainable is all or last:k", train_only, reward_model, wrong)
    with pytest.raises(InputError, match="--lora 4 trains an adapter alone: .* --trainable"):
        prepare(model, TrainOptions(dtype="float32", lora=4, trainable="last:1"), "policy")


@pytest.mark.parametrize("rank", [0, 2])
def test_checkpointing_recomputes_and_changes_no_gradient(model, rank):
    """Whichever adapter is active in the backward pass, and for a copy of the model."""
    def gradients(model, name_in_backward):
        model.zero_grad()
        with adapter(model, name):
            loss = model(PROMPT, RESPONSE).square().mean()
        with adapter(model, name_in_backward):
            loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    name, models, calls = "policy" if rank else None, {}, []
    for on in (False, True):
        models[on] = copy.deepcopy(model)
        torch.manual_seed(0)
        prepare(models[on], TrainOptions(dtype="float32", lora=rank, checkpointing=on), "policy")
        awake(models[on])
    expected = gradients(models[False], name)
    norms = [m for key, m in models[True].named_modules() if key.endswith(("h.1.ln_2", "h.1.ln"))]
    norms[0].register_forward_hook(lambda *_: calls.append(1))
    assert all(same(gradients(models[True], inner), expected) for inner in (name, None))
    assert len(calls) == 4                                      # twice in each pass
    copied = copy.deepcopy(models[True])
    awake(models[True])                                         # the original moves on
    assert same(gradients(copied, None), expected)

# -----------------------------------------------------------------------------
# load and save

def test_merged_is_the_active_adapter_as_a_plain_model(model, tmp_path, tok):
    """And the model itself stays as it was: nothing is merged twice."""
    add_adapter(model, "policy", rank=4)
    set_active(learn(model, "policy"), "policy")
    for _ in range(2):
        lora.save_trained(tmp_path / "ckpt.pt", model, tok, stage="dpo")
        close(output(load_model(tmp_path / "ckpt.pt")), output(model, "policy"), atol=1e-4)
    assert (tmp_path / "adapter.pt").exists()
    lora.save_trained(tmp_path / "ckpt.pt", toy(), tok)         # trained without an adapter
    assert not (tmp_path / "adapter.pt").exists()


def test_an_adapter_is_saved_alone_and_fits_its_own_trunk_alone(model, tmp_path, tok):
    save_model(tmp_path / "trunk.pt", model, tok)
    reward_model = RewardModel(model, likelihood=0.5)
    add_adapter(reward_model, "reward", rank=2, alpha=5.0)
    learn(reward_model, "reward").normalize(output(reward_model, "reward"))
    lora.save_adapter(tmp_path / "reward.pt", reward_model, "reward")
    sizes = [(tmp_path / name).stat().st_size for name in ("reward.pt", "trunk.pt")]
    assert sizes[0] < 0.8 * sizes[1]
    again = RewardModel(load_model(tmp_path / "trunk.pt"), likelihood=0.1)
    assert lora.load_adapter(tmp_path / "reward.pt", again) == "reward"
    assert torch.equal(output(again, "reward"), output(reward_model, "reward"))
    assert not any(".lora_" in name or "scalar" in name for name in trained(again))     # frozen
    other = RewardModel(awake(load_model(tmp_path / "trunk.pt")), likelihood=0.1)
    with pytest.raises(InputError, match="this adapter was trained on another model"):
        lora.load_adapter(tmp_path / "reward.pt", other)
    for weight in other.model.state_dict().values():
        before = lora.fingerprint(other.model)
        weight.mul_(1.1)                            # one weight is enough to make another trunk
        assert lora.fingerprint(other.model) != before
    (tmp_path / "cut.pt").write_bytes((tmp_path / "reward.pt").read_bytes()[:-500])
    refuses("cut.pt is damaged", lora.load_adapter, tmp_path / "cut.pt", other)
    with pytest.raises(InputError, match="trunk.pt is not an adapter of this version"):
        lora.load_adapter(tmp_path / "trunk.pt", other)
    whole = torch.load(tmp_path / "reward.pt", weights_only=True)
    for weights in conftest.misfits(whole["weights"]):
        torch.save(whole | {"weights": weights}, tmp_path / "reward.pt")
        fresh = RewardModel(load_model(tmp_path / "trunk.pt"), likelihood=0.1)
        with pytest.raises(InputError, match="reward.pt: 1 of its weights do not fit its model"):
            lora.load_adapter(tmp_path / "reward.pt", fresh)


@pytest.mark.parametrize("rank", [0, 4])
def test_policy_reference_and_reward_model(tmp_path, tok, rank):
    """Three models, or one trunk with two adapters: the policy alone moves."""
    init, path = tmp_path / "sft" / "ckpt.pt", tmp_path / "reward_model" / "adapter.pt"
    save_model(init, awake(toy()), tok)
    reward_model = RewardModel(load_model(init), likelihood=0.5)
    prepare(reward_model, TrainOptions(dtype="float32", lora=2), "reward")
    assert {"scalar_head.weight", "scalar_head.bias", "likelihood"} < trained(reward_model)
    lora.save_trained(path.with_name("ckpt.pt"), learn(reward_model, "reward"), tok)
    reward_model = load_reward_model(path.with_name("ckpt.pt"))         # merged
    config = tiny(dpo, tmp_path, init, lora=rank)
    policy, reference = lora.load_policy_and_reference(config, "cpu")
    if rank:
        hydra = lora.load_frozen_reward_model(path.with_name("ckpt.pt"), policy, config)
        assert isinstance(hydra, lora.AdapterView)          # no second trunk
        assert all(name.endswith(".policy") for name in trained(policy))
    before = output(load_model(init))
    optimizer_step(logprobs(policy, PROMPT, RESPONSE).sum(), policy, adamw(policy, 0.1), 0.0)
    assert torch.equal(reference(PROMPT, RESPONSE), before)
    assert not torch.allclose(policy(PROMPT, RESPONSE), before, atol=1e-3)
    if rank:
        close(hydra(PROMPT, RESPONSE), reward_model(PROMPT, RESPONSE), atol=1e-4)
    else:
        assert not trained(reference)


def test_what_is_not_trained_is_kept_in_the_dtype_of_the_stage(tmp_path, tok):
    init, path = tmp_path / "sft" / "ckpt.pt", tmp_path / "reward_model" / "ckpt.pt"
    save_model(init, toy(), tok)
    save_model(path, RewardModel(toy()), tok)
    for rank in (0, 4):
        config = tiny(dpo, tmp_path, init, lora=rank, dtype="bfloat16")
        policy, reference = lora.load_policy_and_reference(config, "cpu")
        reward_model = lora.load_frozen_reward_model(path, policy, config)
        assert not trained(reward_model)
        dtypes = [m.h[0].mlp.c_fc.weight.dtype
                  for m in (policy, getattr(reference, "model", reference), reward_model.model)]
        half = torch.bfloat16
        assert dtypes == [half if rank else torch.float32, half, half]

# -----------------------------------------------------------------------------
# in the stages

def test_checkpointing_drops_the_same_again():
    gradients = []
    for on in (False, True):
        model = awake(toy(dropout=0.5)).train()
        prepare(model, TrainOptions(dtype="float32", checkpointing=on), "policy")
        torch.manual_seed(1)
        model(PROMPT, RESPONSE).square().mean().backward()
        gradients.append(model.wte.weight.grad)
    close(*gradients)


@pytest.mark.parametrize("options", [dict(lora=2, checkpointing=True), dict(trainable="last:1")])
@pytest.mark.parametrize("stage", [sft, dpo])
def test_a_stage_trains_what_its_options_say(sft_ckpt, tmp_path, stage, options):
    """The embedding lies under the last block and under all adapters: it stays as it was."""
    rows = [{"prompt": "About a banker:", "completion": " I lost it" + "." * i} for i in range(20)]
    data = pairs(tmp_path) if stage is dpo else records(tmp_path / "texts.jsonl", rows)
    stage.train(tiny(stage, tmp_path / "run", sft_ckpt, data=data, lr=1e-2, **options))
    before = load_model(sft_ckpt).state_dict()
    after = load_model(tmp_path / "run" / "ckpt.pt").state_dict()
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert "h.0.mlp.c_fc.weight" in moved and all(name.startswith(("h.", "ln_f")) for name in moved)
    assert (tmp_path / "run" / "adapter.pt").exists() == ("lora" in options)


def test_without_lora_the_reward_model_has_a_trunk_of_its_own(tmp_path, tok):
    """Also if its adapter is beside it."""
    init, path = tmp_path / "sft" / "ckpt.pt", tmp_path / "reward_model" / "ckpt.pt"
    save_model(init, awake(toy()), tok)
    reward_model = RewardModel(load_model(init), likelihood=0.5)
    prepare(reward_model, TrainOptions(dtype="float32", lora=2), "reward")
    lora.save_trained(path, learn(reward_model, "reward"), tok)
    config = tiny(dpo, tmp_path, init)
    policy, _ = lora.load_policy_and_reference(config, "cpu")
    frozen = lora.load_frozen_reward_model(path, policy, config)
    before = frozen(PROMPT, RESPONSE)
    awake(policy)
    assert torch.equal(frozen(PROMPT, RESPONSE), before)
