"""The discriminator and the GAN: D's shapes and padding, the path that G's gradient takes by each estimator, and that G learns."""

import copy
import json
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, END, PAD, awake, ids, off, toy

import discriminator
import gan
import ppo
from common import InputError
from data import Batches
from discriminator import Discriminator, discriminator_loss, load_discriminator, save_discriminator
from optim import adamw, optimizer_step

PROMPT = ids([PAD, 1, 2], [3, 4, 5], [PAD, PAD, 6])
RESPONSE = ids([6, 7, END, PAD, PAD], [8, END, PAD, PAD, PAD], [9, 9, 9, 9, END])
MASK = RESPONSE != PAD


def disc_of(lstm=False, reads="tokens", seed=0, classifier=1.0):
    torch.manual_seed(seed)
    disc = Discriminator(awake(toy(seed)), lstm, reads).eval()
    nn.init.normal_(disc.classifier.weight, std=classifier)
    return disc


def config(**changes):
    return gan.Config(**(dict(batch_size=8, minibatch_size=4, max_new_tokens=6, warmup_steps=0, **CPU) | changes))


def one_hot(response):
    return F.one_hot(response.masked_fill(response == PAD, 0), PAD).float() * (response != PAD)[..., None]


def head():
    linear = nn.Linear(32, 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear

# -----------------------------------------------------------------------------
# D

@pytest.mark.parametrize("lstm", [False, True])
@pytest.mark.parametrize("reads", ["tokens", "states"])
def test_one_number_a_response(lstm, reads):
    """(B,) for every B, also where it is not the number of the LSTM's layers (1): h_n would have the layer first."""
    disc, policy = disc_of(lstm, reads), awake(toy(seed=3))
    for B in (1, 2, 3):
        states = policy.hidden(PROMPT[:B], RESPONSE[:B])
        logits = disc(PROMPT[:B], RESPONSE[:B], states)
        assert logits.shape == (B,) and logits.dtype == torch.float32
        torch.testing.assert_close(logits, disc(PROMPT, RESPONSE, policy.hidden(PROMPT, RESPONSE))[:B], atol=1e-5, rtol=0)


@pytest.mark.parametrize("lstm", [False, True])
@pytest.mark.parametrize("reads", ["tokens", "states"])
def test_padding_changes_no_verdict(lstm, reads):
    disc, policy = disc_of(lstm, reads), awake(toy(seed=3))
    states = policy.hidden(PROMPT, RESPONSE)
    logits = disc(PROMPT, RESPONSE, states)
    # more pads on the right, whatever their states hold; more on the left of the prompt
    wide = torch.cat([RESPONSE, torch.full((3, 4), PAD)], 1)
    rubbish = torch.cat([states.masked_fill(~MASK[..., None], 7.0), torch.full((3, 4, 32), -3.0)], 1)
    left = torch.cat([torch.full((3, 2), PAD), PROMPT], 1)
    for prompt, response in ((PROMPT, wide), (left, RESPONSE), (left, wide)):
        other = disc(prompt, response, rubbish[:, :response.size(1)])
        torch.testing.assert_close(other, logits, atol=1e-5, rtol=0)
    alone = torch.cat([disc(ids([1, 2]), ids([6, 7, END]), states[:1, :3]), disc(ids([3, 4, 5]), ids([8, END]), states[1:2, :2])])
    torch.testing.assert_close(alone, logits[:2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("lstm", [False, True])
def test_the_verdict_depends_on_prompt_and_every_token(lstm):
    disc = disc_of(lstm)
    logit = disc(ids([1, 2]), ids([6, 7, END]))
    for prompt, response in (([1, 3], [6, 7, END]), ([1, 2], [5, 7, END]), ([1, 2], [6, 5, END]), ([1, 2], [6, 7, 5])):
        assert (disc(ids(prompt), ids(response)) - logit).abs() > 1e-4, (prompt, response)


@pytest.mark.parametrize("lstm", [False, True])
def test_one_hot_vectors_are_read_as_their_ids(lstm):
    """The same verdict, and a gradient to the vectors of all real tokens, the end token included, and to no pad."""
    disc, vectors = disc_of(lstm), one_hot(RESPONSE).requires_grad_()
    logits = disc(PROMPT, vectors)
    torch.testing.assert_close(logits, disc(PROMPT, RESPONSE), atol=1e-5, rtol=0)
    logits.sum().backward()
    size = vectors.grad.abs().sum(-1)
    assert (size[MASK] > 1e-6).all() and (size[~MASK] == 0).all()


def test_discriminator_loss_by_hand():
    """Half of log(1 + e^-2), log(1 + e^1) on reals and of log(1 + e^0), log(1 + e^-3) on fakes."""
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.0, -3.0])
    expected = .5 * ((math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2 + (math.log(2) + math.log1p(math.exp(-3))) / 2)
    assert discriminator_loss(real, fake).item() == pytest.approx(expected)
    assert discriminator_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(math.log(2))
    # smoothing .1: a real of logit x costs .9 log(1 + e^-x) + .1 log(1 + e^x); a fake what it always costs
    smooth = .5 * ((.9 * math.log1p(math.exp(-2)) + .1 * math.log1p(math.exp(2)) + .9 * math.log1p(math.exp(1)) + .1 * math.log1p(math.exp(-1))) / 2
                   + (math.log(2) + math.log1p(math.exp(-3))) / 2)
    assert discriminator_loss(real, fake, 0.1).item() == pytest.approx(smooth)
    assert discriminator_loss(torch.tensor([300.0]), torch.tensor([300.0])).item() == pytest.approx(150)      # no log of a rounded sigmoid
    with pytest.raises(AssertionError):
        discriminator_loss(torch.zeros(3), torch.zeros(3, 1))


@pytest.mark.parametrize("reads", ["tokens", "states"])
def test_a_new_discriminator_is_a_coin(reads):
    """About ln 2 = .693: its classifier starts small."""
    model = toy()
    disc = Discriminator(model, reads=reads)
    states = model.hidden(PROMPT, RESPONSE)
    loss = discriminator_loss(disc(PROMPT, RESPONSE, states), disc(PROMPT, RESPONSE.roll(1, 0), states.roll(1, 0)))
    assert loss.item() == pytest.approx(math.log(2), abs=0.05)


@pytest.mark.parametrize("lstm, reads", [(False, "tokens"), (True, "tokens"), (False, "states")])
def test_a_discriminator_comes_back_from_its_file(tmp_path, lstm, reads):
    disc = disc_of(lstm, reads)
    save_discriminator(tmp_path / "d.pt", disc)
    again, states = load_discriminator(tmp_path / "d.pt"), torch.randn(3, 5, 32)
    assert torch.equal(again(PROMPT, RESPONSE, states), disc(PROMPT, RESPONSE, states)) and not again.training
    with pytest.raises(InputError, match="make it with: python discriminator.py"):
        load_discriminator(tmp_path / "none.pt")


def test_evaluate_counts_all_records():
    """300 records, more than a batch of 256: all reals are taken for real, 270 fakes for fakes: (1 + .9) / 2."""
    class Fixed(nn.Module):
        def forward(self, prompt, response):
            fake, index = response[:, 0] == 2, prompt[:, 0]
            return torch.where(fake, torch.where(index < 270, -2.0, 4.0), 1.0)

    batches = Batches({"prompt": torch.arange(300)[:, None], "real": torch.ones(300, 1), "fake": torch.full((300, 1), 2)}, 1, 999, "cpu", 0)
    metrics = discriminator.evaluate(Fixed(), batches, off)
    assert metrics == pytest.approx({"accuracy": .95, "real_logit": 1.0, "fake_logit": (-2 * 270 + 4 * 30) / 300})


@pytest.mark.parametrize("lstm", [False, True])
def test_it_learns_to_tell_texts_apart(lstm):
    """Reals hold a 3, fakes do not: over nine of ten right after forty steps."""
    torch.manual_seed(0)
    disc, generator = Discriminator(toy(), lstm), torch.Generator().manual_seed(0)

    def batch(n):
        fake, real = torch.randint(4, END, (2, n, 5), generator=generator)
        real[torch.arange(n), torch.randint(5, (n,), generator=generator)] = 3
        prompt = torch.ones(n, 2, dtype=torch.long)
        return disc(prompt, real), disc(prompt, fake)

    optimizer = adamw(disc, 5e-3)
    for _ in range(40):
        optimizer_step(discriminator_loss(*batch(32)), disc, optimizer, 1.0)
    real, fake = batch(256)
    assert ((real > 0).float().mean() + (fake < 0).float().mean()) / 2 > 0.9

# -----------------------------------------------------------------------------
# what G wants of D

def test_generator_objectives():
    """Logit 2, D = .8808: log D = -.12693, -log(1 - D) = 2.12693. Where D is sure of a fake (logit -5) the slope of the first is nearly 1,
    that of the second has vanished: sigmoid(-5) = .0067."""
    for objective, value in (("nonsaturating", -.12693), ("original", 2.12693)):
        assert gan.generator_objective(torch.tensor([2.0]), objective).item() == pytest.approx(value, abs=1e-5)
    for objective, slope in (("nonsaturating", .9933), ("original", .0067)):
        logit = torch.tensor([-5.0], requires_grad=True)
        gan.generator_objective(logit, objective).backward()
        assert logit.grad.item() == pytest.approx(slope, abs=1e-4)


def test_exact_kl_is_that_of_torch():
    torch.manual_seed(0)
    a, b = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    exact = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b))
    torch.testing.assert_close(gan.exact_kl(a, b, MASK), (exact * MASK).sum(1), atol=1e-5, rtol=0)
    assert (gan.exact_kl(a, a, MASK) == 0).all()
    torch.testing.assert_close(gan.exact_kl(a.masked_fill(~MASK[..., None], 3.0), b, MASK), gan.exact_kl(a, b, MASK))


def test_gumbel_noise_given_the_sample():
    """Token ~ p, then the noise that would have led to it: the token has the largest perturbed log-prob, and all in all the noise is what
    Gumbel noise is: CDF exp(-exp(-x)), mean .5772, variance pi^2 / 6, one coordinate independent of another. 100,000 draws: standard
    errors of .0016 (CDF), .004 (mean), .003 (correlation)."""
    generator = torch.Generator().manual_seed(0)
    logp = torch.tensor([.5, .3, .15, .05]).log().expand(100_000, 4)
    token = torch.multinomial(logp.exp(), 1, generator=generator)[:, 0]
    perturbed = gan.gumbel_given_sample(logp, token, generator)
    assert perturbed.isfinite().all() and (perturbed.argmax(-1) == token).all()
    noise = perturbed - logp
    for x in (-1.0, 0.0, .5, 1.0, 3.0):
        torch.testing.assert_close((noise <= x).float().mean(0), torch.full((4,), math.exp(-math.exp(-x))), atol=0.007, rtol=0)
    torch.testing.assert_close(noise.mean(0), torch.full((4,), .5772), atol=0.02, rtol=0)
    torch.testing.assert_close(noise.var(0), torch.full((4,), math.pi ** 2 / 6), atol=0.05, rtol=0)
    assert (torch.corrcoef(noise.T) - torch.eye(4)).abs().max() < 0.015


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_straight_through(tau):
    """Forward: one-hot vectors, zeros on pads. Backward: the gradient of the softmax, on real tokens; none on pads."""
    torch.manual_seed(0)
    logits = torch.randn(3, 5, PAD, requires_grad=True)
    vectors = gan.straight_through(logits, RESPONSE, PAD, tau, torch.Generator().manual_seed(1))
    torch.testing.assert_close(vectors, one_hot(RESPONSE), atol=1e-6, rtol=0)
    weight = torch.randn(PAD)
    (vectors @ weight).sum().backward()
    size = logits.grad.abs().sum(-1)
    assert (size[MASK] > 1e-4).all() and (size[~MASK] == 0).all()
    # the same by hand: d softmax(z / tau) . w / dz, with z the perturbed log-probs (log_softmax only shifts them)
    logp = logits.detach().log_softmax(-1)
    z = gan.gumbel_given_sample(logp, RESPONSE.masked_fill(~MASK, 0), torch.Generator().manual_seed(1))
    s = (z / tau).softmax(-1)
    by_hand = s * (weight - (s @ weight)[..., None]) / tau
    torch.testing.assert_close(logits.grad[MASK], by_hand[MASK], atol=1e-4, rtol=0)

# -----------------------------------------------------------------------------
# the path of the gradient

def retained(policy):
    """Notes the hidden states and logits that the policy computes, with their gradients."""
    seen = {}
    hidden, lm_head = policy.hidden, policy.head

    def note(name, function):
        def call(*args):
            seen[name] = function(*args)
            if seen[name].requires_grad:
                seen[name].retain_grad()
            return seen[name]
        return call

    policy.hidden, policy.head = note("hidden", hidden), note("logits", lm_head)
    return seen


@pytest.mark.parametrize("objective", ["nonsaturating", "original"])
def test_gumbel_reaches_the_logits(objective):
    """D's loss -> D's input -> the logits of every real token -> G. Without a leash, so that it is D's gradient alone."""
    policy, disc = awake(toy(seed=3)), disc_of()
    seen, cfg = retained(policy), config(estimator="gumbel", kl_coef=0.0, objective=objective)
    gan.differentiable_loss(policy, toy(), disc, PROMPT, RESPONSE, cfg, torch.Generator().manual_seed(0)).backward()
    size = seen["logits"].grad.abs().sum(-1)
    assert (size[MASK] > 1e-8).all() and (size[~MASK] == 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.h.parameters())


def test_hidden_reaches_the_states_and_not_the_logits():
    """D reads the states: they get its gradient, the choice of a token gets none."""
    policy, disc = awake(toy(seed=3)), disc_of(reads="states")
    seen, cfg = retained(policy), config(estimator="hidden", kl_coef=0.0)
    gan.differentiable_loss(policy, toy(), disc, PROMPT, RESPONSE, cfg).backward()
    size = seen["hidden"].grad.abs().sum(-1)
    assert (size[MASK] > 1e-8).all() and (size[~MASK] == 0).all()
    assert seen["logits"].grad is None or (seen["logits"].grad == 0).all()


def test_reinforce_reaches_the_logits_and_leaves_d_alone():
    """D is a number: no parameter of D has a gradient after G's update, G's all have."""
    policy, disc, cfg, value_head = awake(toy(seed=3)), disc_of(), config(), head()
    before = copy.deepcopy(disc.state_dict())
    seen = retained(policy)

    def score_fn(prompt, response):
        return gan.generator_objective(disc(prompt, response), cfg.objective)

    rollout = ppo.make_rollout(policy, value_head, toy(), score_fn, torch.randint(0, END, (8, 3)), cfg, torch.Generator().manual_seed(0))
    assert not rollout.score.requires_grad and rollout.score.std() > 0
    advantages, returns = ppo.advantages_of(rollout, cfg, cfg.kl_coef)
    ppo.update(policy, value_head, adamw(nn.ModuleList([policy, value_head]), 1e-3), rollout, advantages, returns, cfg, off)
    assert (seen["logits"].grad.abs().sum(-1) > 0).any()
    assert all(p.grad is None for p in disc.parameters())
    assert all(torch.equal(x, before[name]) for name, x in disc.state_dict().items())


@pytest.mark.parametrize("estimator", ["gumbel", "hidden"])
def test_the_leash_is_the_exact_kl(estimator):
    policy, reference, disc = awake(toy(seed=3)), awake(toy(seed=4)), disc_of(reads="states" if estimator == "hidden" else "tokens")
    free, held = (gan.differentiable_loss(policy, reference, disc, PROMPT, RESPONSE, config(estimator=estimator, kl_coef=beta),
                                          torch.Generator().manual_seed(0)) for beta in (0.0, 0.5))
    kl = gan.exact_kl(policy.logits(PROMPT, RESPONSE), reference.logits(PROMPT, RESPONSE), MASK).mean()
    torch.testing.assert_close(held - free, 0.5 * kl, atol=1e-4, rtol=1e-4)
    held.backward()
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("reads, estimator", [("tokens", "gumbel"), ("states", "hidden")])
def test_a_step_of_d_and_a_step_of_g_do_not_mix(reads, estimator):
    """G's backward leaves gradient in D. D's step starts from zero all the same: it does exactly what it does to a D that G never used. And it
    gives G no gradient."""
    policy, fresh = awake(toy(seed=3)), disc_of(reads=reads)
    used = copy.deepcopy(fresh)
    gan.differentiable_loss(policy, toy(), used, PROMPT, RESPONSE, config(estimator=estimator), torch.Generator().manual_seed(0)).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in used.parameters())
    policy.zero_grad(set_to_none=True)
    weights = copy.deepcopy(policy.state_dict())
    metrics = []
    for disc in (fresh, used):
        optimizer = adamw(disc, 1e-2, 0.01, betas=(0.5, 0.99))
        metrics.append(gan.discriminator_step(disc, policy, optimizer, {"prompt": PROMPT, "completion": RESPONSE}, (PROMPT, RESPONSE.flip(0)),
                                              config(estimator=estimator), off))
    assert metrics[0] == metrics[1] and set(metrics[0]) == {"d_loss", "d_accuracy", "d_real", "d_fake"}
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), used.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(fresh.parameters(), disc_of(reads=reads).parameters(), strict=True))
    assert all(p.grad is None for p in policy.parameters())
    assert all(torch.equal(x, weights[name]) for name, x in policy.state_dict().items())

# -----------------------------------------------------------------------------
# G learns

class Likes3(nn.Module):
    """A discriminator that takes a text for real the more 3s it holds; its gradient asks for 3s in every place."""
    reads = "tokens"

    def forward(self, prompt, response, states=None):
        return 2 * (response[..., 3].sum(1) if response.dim() == 3 else (response == 3).sum(1).float()) - 2


def share_of_3(policy):
    prompt = torch.randint(0, END, (256, 3), generator=torch.Generator().manual_seed(5))
    response, _ = policy.generate(prompt, 6, generator=torch.Generator().manual_seed(6))
    return ((response == 3).sum() / (response != PAD).sum()).item()


@pytest.mark.parametrize("estimator", ["reinforce", "gumbel"])
def test_what_d_likes_becomes_more_frequent(estimator):
    policy, disc, value_head = toy(), Likes3(), head()
    reference, cfg = copy.deepcopy(policy), config(estimator=estimator, batch_size=64, minibatch_size=64, kl_coef=0.01)
    optimizer, generator = adamw(nn.ModuleList([policy, value_head]), 3e-3), torch.Generator().manual_seed(0)
    before = share_of_3(policy)
    for _ in range(25):
        prompt = torch.randint(0, END, (64, 3), generator=generator)
        rollout = ppo.make_rollout(policy, value_head, reference, lambda p, r: gan.generator_objective(disc(p, r), cfg.objective), prompt, cfg, generator)
        if estimator == "reinforce":
            ppo.update(policy, value_head, optimizer, rollout, *ppo.advantages_of(rollout, cfg, cfg.kl_coef), cfg, off)
        else:
            optimizer_step(gan.differentiable_loss(policy, reference, disc, rollout.prompt, rollout.response, cfg, generator), policy, optimizer, 1.0)
    assert before < 0.15 and share_of_3(policy) > before + 0.3


# -----------------------------------------------------------------------------
# the stages

@pytest.mark.parametrize("changes", [dict(estimator="argmax"), dict(objective="wasserstein"), dict(baseline="none"), dict(batch_size=6)])
def test_bad_configs_are_refused(changes):
    with pytest.raises(InputError):
        gan.train(config(**changes))


def test_fakes_answer_the_prompts_of_the_reals(tmp_path, sft_ckpt, tok, monkeypatch):
    """Same prompts, same end token, same space in front, whatever the corpus is: nothing that tells them apart but the text."""
    seen, real_batches, real_generate, prompts = [], discriminator.Batches, discriminator.generate, []
    monkeypatch.setattr(discriminator, "Batches", lambda encoded, *rest: seen.append(encoded) or real_batches(encoded, *rest))
    monkeypatch.setattr(discriminator, "generate", lambda model, tok, texts, *rest: prompts.extend(texts) or real_generate(model, tok, texts, *rest))
    data = tmp_path / "real.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"About a {x}:", "completion": f" A {x}, it is."}) + "\n" for x in ["owl", "cat", "dog", "cow"] * 8))
    discriminator.train(discriminator.Config(out_dir=str(tmp_path / "d"), init=sft_ckpt, data=str(data), batch_size=4, max_steps=1, lstm=True, **CPU))
    rows = [{field: ids[i] for field, ids in encoded.items()} for encoded in reversed(seen) for i in range(len(encoded["prompt"]))]   # val first
    assert len(rows) == 32 and [tok.decode(row["prompt"]) for row in rows] == prompts
    assert all(tok.decode(row["real"]) == f" A {tok.decode(row['prompt'])[8:-1]}, it is." for row in rows)
    fakes = [tok.decode(row["fake"]) for row in rows]
    assert sum(fake.startswith(" ") for fake in fakes) >= 16 and len(set(fakes)) > 1
    assert all(tok.end_id in row["real"] and (tok.end_id in row["fake"] or tok.pad_id not in row["fake"]) for row in rows)
