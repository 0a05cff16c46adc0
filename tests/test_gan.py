"""The GAN: the path of G's gradient by each estimator, the two players, and who learns what."""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, EOS, PAD, awake, close, ids, off, records, tiny, toy

import discriminator
import gan
from common import InputError, read_jsonl
from data import measure, tokenizer_of
from discriminator import Discriminator, load_discriminator
from model import load_model
from optim import adamw

PROMPT = ids([PAD, 1, 2], [3, 4, 5], [PAD, PAD, 6])
RESPONSE = ids([6, 7, EOS, PAD, PAD], [8, EOS, PAD, PAD, PAD], [9, 9, 9, 9, EOS])
MASK = RESPONSE != PAD


def disc_of(reads="tokens", seed=0):
    """A discriminator whose verdicts differ visibly."""
    torch.manual_seed(seed)
    disc = Discriminator(awake(toy(seed)), reads=reads).eval()
    nn.init.normal_(disc.classifier.weight)
    return disc


def reads_of(estimator):
    return "states" if estimator == "hidden" else "tokens"


def config(**changes):
    sizes = dict(batch_size=8, minibatch_size=4, max_new_tokens=6, warmup_steps=0, **CPU)
    return gan.Config(**(sizes | changes))


def rng_of(seed=0):
    return torch.Generator().manual_seed(seed)


def loss_of(policy, reference, disc, cfg):
    """G's loss by gumbel or hidden, on three responses."""
    return gan.differentiable_loss(policy, reference, disc, PROMPT, RESPONSE, cfg, rng_of())

# -----------------------------------------------------------------------------
# what G wants of D

def test_objectives_by_hand():
    """At logit 2, D = .8808: log D = -.12693, -log(1 - D) = 2.12693. Where D is sure of a fake, at
    logit -5, the slope of the first is near 1; that of the second is sigmoid(-5) = .0067."""
    for objective, value, slope in (
            ("nonsaturating", -.12693, .9933), ("original", 2.12693, .0067)):
        found = gan.generator_objective(torch.tensor([2.0]), objective).item()
        assert found == pytest.approx(value, abs=1e-5)
        logit = torch.tensor([-5.0], requires_grad=True)
        gan.generator_objective(logit, objective).backward()
        assert logit.grad.item() == pytest.approx(slope, abs=1e-4)


def test_exact_kl_is_that_of_torch():
    torch.manual_seed(0)
    a, b = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    pi, ref = (torch.distributions.Categorical(logits=x) for x in (a, b))
    exact = (torch.distributions.kl_divergence(pi, ref) * MASK).sum(dim=1)
    close(gan.exact_kl(a, b, MASK), exact)
    close(gan.exact_kl(a.masked_fill(~MASK[..., None], 3.0), b, MASK), exact)
    assert (gan.exact_kl(a, a, MASK) == 0).all()


def test_gumbel_noise_given_the_sample():
    """Draw a token, then the noise that would have led to it: the token has the largest perturbed
    log-prob, and all in all the noise is Gumbel: CDF exp(-exp(-x)), mean .5772, variance pi^2 / 6,
    coordinates independent. 100,000 draws have standard errors of .0016, .004, .006 and .003."""
    rng = rng_of()
    logp = torch.tensor([.5, .3, .15, .05]).log().expand(100_000, 4)
    token = torch.multinomial(logp.exp(), 1, generator=rng)[:, 0]
    perturbed = gan.gumbel_given_sample(logp, token, rng)
    assert perturbed.isfinite().all() and (perturbed.argmax(-1) == token).all()
    noise = perturbed - logp
    for x in (-1.0, 0.0, .5, 1.0, 3.0):
        cdf = torch.full((4,), math.exp(-math.exp(-x)))
        close((noise <= x).float().mean(0), cdf, atol=.007)
    close(noise.mean(0), torch.full((4,), .5772), atol=.02)
    close(noise.var(0), torch.full((4,), math.pi ** 2 / 6), atol=.05)
    assert (torch.corrcoef(noise.T) - torch.eye(4)).abs().max() < .015


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_straight_through(tau):
    """Forward: one-hot vectors, zeros on pads. Backward: the softmax, d s . w / d z =
    s (w - s . w) / tau, with z the perturbed log-probs; nothing on pads."""
    torch.manual_seed(0)
    logits, weight = torch.randn(3, 5, PAD, requires_grad=True), torch.randn(PAD)
    vectors = gan.straight_through(logits, RESPONSE, PAD, tau, rng_of(1))
    token = RESPONSE.masked_fill(~MASK, 0)
    close(vectors, F.one_hot(token, PAD) * MASK[..., None].float(), atol=1e-6)
    (vectors @ weight).sum().backward()
    z = gan.gumbel_given_sample(logits.detach().log_softmax(-1), token, rng_of(1))
    s = (z / tau).softmax(-1)
    by_hand = s * (weight - (s @ weight)[..., None]) / tau
    close(logits.grad[MASK], by_hand[MASK], atol=1e-4)
    assert (logits.grad[~MASK] == 0).all()


def test_soft_embeddings_have_the_value_of_the_tokens():
    """And the gradient of the one-hot vectors, by way of the embedding."""
    model, one_hot = awake(toy()), torch.rand(3, 5, PAD, requires_grad=True)
    embeddings = gan.soft_embeddings(model, RESPONSE, one_hot)
    close(embeddings, model.embed(RESPONSE))
    embeddings[..., 0].sum().backward()
    close(one_hot.grad, model.wte.weight[:, 0].expand(3, 5, PAD))

# -----------------------------------------------------------------------------
# the path of the gradient

def noted(policy):
    """Keeps the hidden states and logits that the policy computes, with their gradients."""
    seen = {}

    def note(name, function):
        def call(*args):
            seen[name] = function(*args)
            if seen[name].requires_grad:
                seen[name].retain_grad()
            return seen[name]
        return call

    policy.hidden, policy.head = note("hidden", policy.hidden), note("logits", policy.head)
    return seen


@pytest.mark.parametrize("objective", ["nonsaturating", "original"])
def test_gumbel_reaches_the_logits_of_every_token(objective):
    """D's loss -> its input -> logits -> G, without a KL penalty."""
    policy = awake(toy(seed=3))
    seen = noted(policy)
    cfg = config(estimator="gumbel", kl_coef=0.0, objective=objective)
    loss_of(policy, toy(), disc_of(), cfg).backward()
    size = seen["logits"].grad.abs().sum(-1)
    assert (size[MASK] > 1e-8).all() and (size[~MASK] == 0).all()
    assert all(p.grad.abs().sum() > 0 for p in policy.h.parameters())


def test_hidden_reaches_the_states_and_not_the_logits():
    policy = awake(toy(seed=3))
    seen = noted(policy)
    cfg = config(estimator="hidden", kl_coef=0.0)
    loss_of(policy, toy(), disc_of("states"), cfg).backward()
    size = seen["hidden"].grad.abs().sum(-1)
    assert (size[MASK] > 1e-8).all() and (size[~MASK] == 0).all()
    assert seen["logits"].grad is None or (seen["logits"].grad == 0).all()


@pytest.mark.parametrize("estimator", ["gumbel", "hidden"])
def test_the_loss_is_kl_minus_objective(estimator):
    """A second computation, with D reading what the policy wrote, or its states."""
    policy, reference = awake(toy(seed=3)), awake(toy(seed=4))
    disc = disc_of(reads_of(estimator))
    cfg = config(estimator=estimator, kl_coef=0.5)
    loss = loss_of(policy, reference, disc, cfg)
    kl = gan.exact_kl(policy(PROMPT, RESPONSE), reference(PROMPT, RESPONSE), MASK)
    verdict = disc(PROMPT, RESPONSE, policy.hidden(PROMPT, RESPONSE))
    close(loss, (0.5 * kl - F.logsigmoid(verdict)).mean(), atol=1e-4)
    loss.backward()
    assert all(p.grad is None for p in reference.parameters())

# -----------------------------------------------------------------------------
# the two players

@pytest.mark.parametrize("estimator", ["gumbel", "hidden"])
def test_a_step_of_d_and_a_step_of_g_do_not_mix(estimator):
    """G's backward pass leaves a gradient in D, and D's step drops it: it does what it does to a
    D that G never used. It gives G no gradient."""
    policy, fresh = awake(toy(seed=3)), disc_of(reads_of(estimator))
    used, cfg = copy.deepcopy(fresh), config(estimator=estimator)
    loss_of(policy, toy(), used, cfg).backward()
    assert any(p.grad is not None and p.grad.any() for p in used.parameters())
    policy.zero_grad(set_to_none=True)
    before, metrics = copy.deepcopy(policy), []
    for disc in (fresh, used):
        optimizer = adamw(disc, 1e-2, 0.01, betas=(0.5, 0.99))
        real = {"prompt": PROMPT, "completion": RESPONSE}
        metrics.append(gan.discriminator_step(disc, policy, optimizer, real, PROMPT,
                                              RESPONSE.flip(0), cfg, off))
    assert metrics[0] == metrics[1]
    assert all(map(torch.equal, fresh.parameters(), used.parameters()))
    start = disc_of(reads_of(estimator))
    assert not all(map(torch.equal, fresh.parameters(), start.parameters()))
    assert all(p.grad is None for p in policy.parameters())
    assert all(map(torch.equal, policy.parameters(), before.parameters()))


def test_a_step_of_d_is_logged_by_hand():
    """Logits 1, 1, -1 of reals and -2, 2, -2 of fakes: the table says which."""
    class Fixed(nn.Module):
        reads = "tokens"

        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.tensor([0.0, 1.0, -1.0, -2.0, 2.0]))

        def forward(self, prompt, response, states=None):
            return self.table[response[:, 0]]

    disc = Fixed()
    real = {"prompt": PROMPT, "completion": ids([1], [1], [2])}
    cfg = config(label_smoothing=0.0, grad_clip=0.0)
    optimizer = torch.optim.SGD(disc.parameters(), lr=1.0)
    fake = ids([3], [4], [3])
    found = gan.discriminator_step(disc, None, optimizer, real, PROMPT, fake, cfg, off)

    def cost(x):
        return math.log1p(math.exp(-x))

    loss = ((2 * cost(1) + cost(-1)) / 3 + (2 * cost(2) + cost(-2)) / 3) / 2
    expected = {"d_loss": loss, "d_accuracy": 2 / 3, "d_real": 1 / 3, "d_fake": -2 / 3}
    assert found == pytest.approx(expected)
    table = disc.table.tolist()
    assert table[1] > 1 and table[2] > -1 and table[3] < -2 and table[4] < 2


def test_d_sees_the_responses_of_a_round_in_turn():
    cfg = config(batch_size=8, d_batch_size=3)
    rows = [gan.rows_of_step(k, cfg).tolist() for k in range(3)]
    assert rows == [[0, 1, 2], [3, 4, 5], [6, 7, 0]]


# -----------------------------------------------------------------------------
# the stage

REALS = [{"prompt": f"About a {name}:", "completion": " An owl!" + " Oh!" * (i % 3)}
         for i, name in enumerate(["banker", "baker", "pilot", "owl", "tailor", "doctor"] * 6)]


@pytest.fixture(scope="module")
def disc(tmp_path_factory, sft_ckpt):
    """A discriminator that has seen little: it takes short texts for real."""
    folder = tmp_path_factory.mktemp("discriminator")
    discriminator.train(tiny(discriminator, folder, sft_ckpt, lr=3e-3, max_steps=8,
                             data=records(folder / "reals.jsonl", REALS)))
    return str(folder / "ckpt.pt")


def run_of(folder, sft_ckpt, disc, **changes):
    """A short run. Returns {name: its values, step by step}."""
    sizes = dict(data=records(folder / "reals.jsonl", REALS), disc=disc, batch_size=32, lr=3e-3,
                 minibatch_size=16, d_batch_size=16, max_steps=10, sample_interval=50,
                 max_new_tokens=8, kl_coef=0.01, missing_eos_penalty=0.0)
    gan.train(tiny(gan, folder, sft_ckpt, **sizes | changes))
    rows = read_jsonl(folder / "metrics.jsonl")
    return {name: [row[name] for row in rows] for name in rows[0]}


@torch.no_grad()
def measured(policy, start, disc):
    """(mean kl to the start, mean logit of D, or None) of samples of a policy."""
    tok = tokenizer_of(policy)
    rows = measure(policy, start, tok, ["About a banker:"] * 128, rng_of(), off, disc)
    logits = [row["score"] for row in rows if "score" in row]
    return sum(row["kl"] for row in rows) / 128, sum(logits) / max(len(logits), 1)


@pytest.mark.parametrize("estimator", ["reinforce", "gumbel", "hidden"])
def test_g_learns_what_d_takes_for_real(tmp_path, sft_ckpt, disc, estimator):
    """D stands still: what G wants of it rises, and D, loaded again, believes its new texts more.
    The KL is that to the start."""
    found = run_of(tmp_path, sft_ckpt, disc, estimator=estimator, d_steps=0)
    assert found["objective"][-1] > found["objective"][0] + 0.01
    assert found["kl"][0] == pytest.approx(0, abs=1e-4) and found["kl"][-1] > 0.1
    judge = None if estimator == "hidden" else load_discriminator(disc)
    start, policy = load_model(sft_ckpt), load_model(tmp_path / "ckpt.pt")
    (_, before), (kl, after) = (measured(model, start, judge) for model in (start, policy))
    assert kl > 0.3 * found["kl"][-1]
    assert after > before + 0.2 or estimator == "hidden"
    assert "d_loss" not in found
    unchanged = load_discriminator(tmp_path / "discriminator.pt")
    if estimator != "hidden":
        assert all(map(torch.equal, unchanged.parameters(), load_discriminator(disc).parameters()))


@pytest.mark.parametrize("estimator", ["reinforce", "hidden"])
def test_d_goes_on_learning(tmp_path, sft_ckpt, disc, estimator):
    """G stands still: D starts near a coin and ends by telling its texts from reals."""
    found = run_of(tmp_path, sft_ckpt, disc, estimator=estimator, lr=0.0, d_lr=3e-3, max_steps=15)
    assert found["d_accuracy"][-1] > 0.8 and found["d_loss"][-1] < 0.9 * found["d_loss"][0]
    assert found["d_real"][-1] > 0 > found["d_fake"][-1]
    assert found["kl"][-1] == pytest.approx(0, abs=1e-4)
    saved = load_discriminator(tmp_path / "discriminator.pt")
    assert saved.reads == reads_of(estimator)
    if estimator == "reinforce":
        assert not all(map(torch.equal, saved.parameters(), load_discriminator(disc).parameters()))


def test_options_change_what_they_should(tmp_path, sft_ckpt, disc):
    """One round each from the same start. weights: (of G, of D)."""
    def weights(**changes):
        sizes = dict(max_steps=1, batch_size=8, minibatch_size=4, d_batch_size=4) | changes
        run_of(tmp_path, sft_ckpt, disc, **sizes)
        return (load_model(tmp_path / "ckpt.pt").h[0].mlp.c_fc.weight,
                load_discriminator(tmp_path / "discriminator.pt").classifier.weight)

    def moved(a, b):
        return [not torch.equal(x, y) for x, y in zip(a, b, strict=True)]

    base = weights()
    table = [(dict(ppo_epochs=1), [1, 0]), (dict(clip_range=0.01), [1, 0]), (dict(lr=1e-3), [1, 0]),
             (dict(gamma=0.5), [1, 0]), (dict(lam=0.5), [1, 0]), (dict(vf_coef=9.0), [1, 0]),
             (dict(objective="original"), [1, 0]), (dict(missing_eos_penalty=3.0), [1, 0]),
             (dict(baseline="rloo", group_size=2), [1, 1]), (dict(temperature=2.0), [1, 1]),
             (dict(d_lr=1e-3), [0, 1]), (dict(d_steps=1), [0, 1]), (dict(d_batch_size=6), [0, 1]),
             (dict(label_smoothing=0.4), [0, 1]), (dict(grad_clip=1e-6), [1, 1]),
             (dict(max_new_tokens=4), [1, 1]), (dict(seed=1), [1, 1]), (dict(tau=0.5), [0, 0])]
    for changes, expected in table:
        assert moved(weights(**changes), base) == [bool(x) for x in expected], changes
    gumbel = weights(estimator="gumbel")
    for changes in (dict(tau=0.5), dict(objective="original"), dict(minibatch_size=8)):
        assert moved(weights(estimator="gumbel", **changes), gumbel) == [1, 0], changes
    for estimator in ("reinforce", "gumbel"):       # the first round has no KL yet
        two = [weights(estimator=estimator, max_steps=2, kl_coef=kl_coef) for kl_coef in (0.0, 9.0)]
        assert moved(*two)[0], estimator


@pytest.mark.parametrize("changes, message", [
    (dict(estimator="argmax"), "--estimator is"), (dict(objective="wasserstein"), "--objective is"),
    (dict(baseline="none"), "--baseline is"), (dict(batch_size=6), "must be a multiple")])
def test_bad_options_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        gan.train(config(**changes))
