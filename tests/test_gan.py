"""The GAN: the path of G's gradient by each estimator, the two players, and who learns what."""

import copy
import math

import conftest
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    PAD,
    PROMPT,
    RESPONSE,
    awake,
    close,
    disc_of,
    off,
    owls,
    records,
    refuses,
    tiny,
    toy,
)

import discriminator
import gan
from common import InputError, read_jsonl
from data import respond, tokenizer_of
from discriminator import Discriminator, load_discriminator, save_discriminator, states_for
from model import load_model, logprobs, save_model
from optim import adamw

MASK = RESPONSE != PAD


def reads_of(estimator):
    return "states" if estimator == "hidden" else "tokens"


def config(**changes):
    sizes = dict(batch_size=8, minibatch_size=4, max_new_tokens=6)
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
    assert gan.generator_objective(torch.tensor([-99.0, 0]), "nonsaturating")[0] == -99
    assert gan.generator_objective(torch.tensor([99.0, 0]), "original")[0] == 99    # and not inf


def test_exact_kl_is_that_of_torch():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4, 7)
    pi, ref = (torch.distributions.Categorical(logits=x) for x in (a, b))
    exact = (torch.distributions.kl_divergence(pi, ref) * MASK).sum(dim=1)
    close(gan.exact_kl(a, b, MASK), exact)
    close(gan.exact_kl(a.masked_fill(~MASK[..., None], 3.0), b, MASK), exact)


def test_gumbel_noise_given_the_sample(monkeypatch):
    """Draw a token, then the noise that would have led to it: the token has the largest perturbed
    log-prob, and all in all the noise is Gumbel: CDF exp(-exp(-x)), coordinates independent.
    100,000 draws have standard errors of .0016 and .003."""
    rng = rng_of()
    logp = torch.tensor([.5, .3, .15, .05]).log().expand(100_000, 4)
    token = torch.multinomial(logp.exp(), 1, generator=rng)[:, 0]
    perturbed = gan.gumbel_given_sample(logp, token, rng)
    assert perturbed.isfinite().all() and (perturbed.argmax(-1) == token).all()
    noise = perturbed - logp
    for x in (-1.0, 0.0, .5, 1.0, 3.0):
        cdf = torch.full((4,), math.exp(-math.exp(-x)))
        close((noise <= x).float().mean(0), cdf, atol=.007)
    assert (torch.corrcoef(noise.T) - torch.eye(4)).abs().max() < .015
    rounded_to_0 = torch.tensor([0.0, -300.0])
    assert gan.gumbel_given_sample(rounded_to_0, torch.tensor(0), rng).isfinite().all()
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape))     # it may be
    assert gan.gumbel_given_sample(logp[0], token[0]).isfinite().all()


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_straight_through(tau):
    """Forward: one-hot vectors, zeros on pads. Backward: the softmax, d s . w / d z =
    s (w - s . w) / tau, with z the perturbed log-probs; nothing on pads."""
    torch.manual_seed(0)
    logits, weight = torch.randn(3, 4, PAD, requires_grad=True), torch.randn(PAD)
    vectors = gan.straight_through(logits, RESPONSE, PAD, tau, rng_of(1))
    token = RESPONSE.masked_fill(~MASK, 0)
    close(vectors, F.one_hot(token, PAD) * MASK[..., None].float(), atol=1e-6)
    (vectors @ weight).sum().backward()
    z = gan.gumbel_given_sample(logits.detach().log_softmax(-1), token, rng_of(1))
    s = (z / tau).softmax(-1)
    by_hand = s * (weight - (s @ weight)[..., None]) / tau
    close(logits.grad, by_hand * MASK[..., None], atol=1e-4)


def test_soft_embeddings_have_the_value_of_the_tokens():
    """And the gradient of the one-hot vectors, by way of the embedding."""
    model, one_hot = toy(), torch.rand(3, 4, PAD, requires_grad=True)
    embeddings = gan.soft_embeddings(model, RESPONSE, one_hot)
    close(embeddings, model.embed(RESPONSE))
    embeddings[..., 0].sum().backward()
    close(one_hot.grad, model.wte.weight[:, 0].expand(3, 4, PAD))

@pytest.mark.parametrize("estimator", ["gumbel", "hidden"])
def test_the_loss_is_kl_minus_objective(estimator):
    """A second computation. D reads what the policy wrote, with a gradient to its logits; or the
    states with which it reads that. The reference gets no gradient."""
    policy, reference, disc = awake(toy(3)), awake(toy(4)), disc_of(reads=reads_of(estimator))
    logits = policy(PROMPT, RESPONSE) / 0.7
    if estimator == "gumbel":
        one_hot = gan.straight_through(logits, RESPONSE, PAD, 2.0, rng_of())
        embeddings = gan.soft_embeddings(disc.model, RESPONSE, one_hot)
        verdict = disc(PROMPT, RESPONSE, embeddings=embeddings)
    else:
        verdict = disc(PROMPT, RESPONSE, states_for(disc, policy, PROMPT, RESPONSE))
    kl = gan.exact_kl(logits, reference(PROMPT, RESPONSE) / 0.7, MASK)
    cfg = config(estimator=estimator, kl_coef=0.5, tau=2.0, temperature=0.7)
    loss = loss_of(policy, reference, disc, cfg)
    expected = (0.5 * kl - F.logsigmoid(verdict)).mean()
    close(loss, expected)
    gradients = (torch.autograd.grad(x, policy.h.parameters(), retain_graph=True)
                 for x in (loss, expected, verdict.sum()))
    for found, second, of_verdict in zip(*gradients, strict=True):
        close(found, second)
        assert of_verdict.abs().sum() > 0
    loss.backward()
    assert all(p.grad is None for p in reference.parameters())

# -----------------------------------------------------------------------------
# the two players

@pytest.mark.parametrize("estimator", ["gumbel", "hidden"])
def test_a_step_of_d_and_a_step_of_g_do_not_mix(estimator):
    """G's backward pass leaves a gradient in D, and D's step drops it: it does what it does to a
    D that G never used. It gives G no gradient. What is logged is of before the step."""
    policy, fresh = awake(toy(3)), disc_of(reads=reads_of(estimator))
    used, cfg = copy.deepcopy(fresh), config(estimator=estimator, label_smoothing=0.2)
    loss_of(policy, toy(), used, cfg).backward()
    assert any(p.grad is not None and p.grad.any() for p in used.parameters())
    policy.zero_grad(set_to_none=True)
    real_texts, fake_texts = (PROMPT, RESPONSE), (PROMPT.roll(1, dims=0), RESPONSE.flip(0))

    def verdicts():
        return [fresh(*texts, states_for(fresh, policy, *texts)).detach()
                for texts in (real_texts, fake_texts)]

    real, fake = verdicts()
    expected = dict(d_loss=discriminator.discriminator_loss(real, fake, 0.2), d_real=real.mean(),
                    d_accuracy=discriminator.accuracy_of(real, fake), d_fake=fake.mean())
    for disc in (fresh, used):
        optimizer = adamw(disc, 1e-4, 0.01, betas=(0.5, 0.99))
        metrics = gan.discriminator_step(disc, policy, optimizer,
                                         {"prompt": PROMPT, "completion": RESPONSE},
                                         *fake_texts, cfg, off)
        metrics = {name: x.item() for name, x in metrics.items()}
        assert metrics == pytest.approx({name: x.item() for name, x in expected.items()}, abs=1e-5)
    assert all(map(torch.equal, fresh.parameters(), used.parameters()))
    assert all(p.grad is None for p in policy.parameters())
    after = discriminator.discriminator_loss(*verdicts())
    assert after < discriminator.discriminator_loss(real, fake)


def test_both_learn_from_all_responses_of_a_round(tmp_path, sft_ckpt, discs, monkeypatch):
    """Where D is differentiated: each response is in one minibatch of G, and here in one of D, with
    its prompt. The norm that is clipped is that of G's gradient alone, the reference is frozen."""
    seen, norms, loss = [], [], gan.differentiable_loss
    fakes, step = [], gan.discriminator_step

    def note(policy, reference, disc, prompt, response, *rest):
        assert not reference.wte.weight.requires_grad
        seen.append(torch.cat([prompt, response], dim=1))
        value = loss(policy, reference, disc, prompt, response, *rest)
        gradients = torch.autograd.grad(value, [*policy.parameters()], retain_graph=True)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        return value

    monkeypatch.setattr(gan, "differentiable_loss", note)
    monkeypatch.setattr(gan, "discriminator_step", lambda *args: fakes.append(
        torch.cat(args[4:6], dim=1)) or step(*args))
    found = run_of(tmp_path, sft_ckpt, discs, "gumbel", max_steps=1, sample_interval=1,
                   group_size=2)
    assert found["grad_norm"] == [pytest.approx(norms[1], rel=1e-3)]
    assert [len(texts) for texts in seen] == [16, 16]
    texts = [tokenizer_of(load_model(sft_ckpt)).decode(row) for row in torch.cat(seen)]
    rows = read_jsonl(tmp_path / "samples.jsonl")
    assert texts == [row["prompt"] + row["text"] for row in rows]
    assert torch.equal(torch.cat(fakes), torch.cat(seen))
    prompts = [row["prompt"] for row in rows]
    assert prompts[::2] == prompts[1::2] and set(prompts) <= {row["prompt"] for row in owls(36)}


def test_d_sees_the_responses_of_a_round_in_turn():
    cfg = config(batch_size=8, d_batch_size=3)
    rows = [gan.rows_of_step(k, cfg).tolist() for k in range(3)]
    assert rows == [[0, 1, 2], [3, 4, 5], [6, 7, 0]]

# -----------------------------------------------------------------------------
# the stage

@pytest.fixture(scope="module")
def discs(tmp_path_factory, sft_ckpt):
    """{what it reads: a discriminator that has seen little, and takes short texts for real}."""
    paths = {}
    for reads in ("tokens", "states"):
        folder = tmp_path_factory.mktemp(reads)
        reals = records(folder / "reals.jsonl", owls(36))
        discriminator.train(tiny(discriminator, folder, sft_ckpt, lr=3e-3, max_steps=16,
                                 reads=reads, lstm=reads == "states", data=reals))
        paths[reads] = str(folder / "ckpt.pt")
    return paths


def run_of(folder, sft_ckpt, discs, estimator="reinforce", **changes):
    """A short run. Returns {name: its values, step by step}."""
    sizes = dict(data=records(folder / "reals.jsonl", owls(36)), disc=discs[reads_of(estimator)],
                 batch_size=32, lr=3e-3, minibatch_size=16, d_batch_size=16, max_steps=10,
                 sample_interval=50, max_new_tokens=8, kl_coef=0.01, missing_eos_penalty=0.0,
                 estimator=estimator)
    gan.train(tiny(gan, folder, sft_ckpt, **sizes | changes))
    rows = read_jsonl(folder / "metrics.jsonl")
    return {name: [row[name] for row in rows if name in row] for name in rows[0]}


@torch.no_grad()
def measured(policy, start, disc):
    """(mean kl to the start, mean logit of D) of samples of a policy."""
    prompts = ["About a banker:"] * 128
    for prompt, response in respond(policy, tokenizer_of(policy), prompts, rng_of(), off):
        logp, ref_logp = (logprobs(model, prompt, response) for model in (policy, start))
        logits = disc(prompt, response, states_for(disc, policy, prompt, response))
    return (logp - ref_logp).sum(dim=1).mean().item(), logits.mean().item()


@pytest.mark.parametrize("estimator", ["reinforce", "gumbel", "hidden"])
def test_g_learns_what_d_takes_for_real(tmp_path, sft_ckpt, discs, estimator):
    """D stands still: what G wants of it rises, and D, loaded again, believes its new texts more.
    The KL is that to the start."""
    found = run_of(tmp_path, sft_ckpt, discs, estimator, d_steps=0)
    assert found["objective"][-1] > found["objective"][0] + 0.01
    assert found["kl"][0] == pytest.approx(0, abs=1e-4) and found["kl"][-1] > 0.1
    judge = load_discriminator(discs[reads_of(estimator)])
    start, policy = load_model(sft_ckpt), load_model(tmp_path / "ckpt.pt")
    (_, before), (kl, after) = (measured(model, start, judge) for model in (start, policy))
    assert kl > 0.3 * found["kl"][-1] and after > before + 0.2 and "d_loss" not in found
    unchanged = load_discriminator(tmp_path / "discriminator.pt")
    assert all(map(torch.equal, unchanged.parameters(), judge.parameters()))


def test_only_reinforce_pays_for_a_missing_end(tmp_path, sft_ckpt, discs):
    """What is logged of the same texts differs by the penalty: D's verdict, or a reward."""
    first = {name: run_of(tmp_path, sft_ckpt, discs, name, max_steps=1, **changes)
             for name, changes in (("gumbel", {}), ("reinforce", dict(missing_eos_penalty=1.0)))}
    missing = 1 - first["gumbel"]["ended"][0]
    assert missing > 0 and first["gumbel"]["objective"][0] == pytest.approx(
        first["reinforce"]["objective"][0] + missing)


def test_dropout_is_off_in_g_and_in_the_reference(tmp_path, sft_ckpt, discs):
    """G was trained with dropout: its first ratio is 1 nonetheless, and its first KL is 0."""
    model = load_model(sft_ckpt)
    model.config.dropout = 0.5
    save_model(tmp_path / "sft.pt", model, tokenizer_of(model))
    found = run_of(tmp_path, tmp_path / "sft.pt", discs, max_steps=1)
    assert found["first_ratio"][0] < 1e-5 and found["kl"][0] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("estimator", ["reinforce", "hidden"])
def test_d_goes_on_learning(tmp_path, sft_ckpt, discs, estimator):
    """G stands still: D, from where it was, ends by telling its texts from reals."""
    found = run_of(tmp_path, sft_ckpt, discs, estimator, lr=0.0, d_lr=3e-3, max_steps=20)
    assert sum(found["d_accuracy"][-5:]) / 5 > 0.8
    assert found["d_loss"][-1] < 0.9 * found["d_loss"][0]
    assert found["d_real"][-1] > 0 > found["d_fake"][-1]
    assert found["kl"][-1] == pytest.approx(0, abs=1e-4)
    saved = load_discriminator(tmp_path / "discriminator.pt")
    start = load_discriminator(discs[reads_of(estimator)])
    assert saved.reads == reads_of(estimator)
    assert not any(map(torch.equal, saved.parameters(), start.parameters()))


def test_every_option_changes_what_it_should(tmp_path, sft_ckpt, discs):
    """One round each from the same start: whether it moves the weights of G, and those of D."""
    def weights(**changes):
        sizes = dict(max_steps=1, batch_size=8, minibatch_size=4, d_batch_size=4) | changes
        run_of(tmp_path, sft_ckpt, discs, **sizes)
        return (load_model(tmp_path / "ckpt.pt").h[0].mlp.c_fc.weight,
                load_discriminator(tmp_path / "discriminator.pt").classifier.weight)

    def check(changes, expected, base):
        moved = [not torch.equal(x, y) for x, y in zip(weights(**changes), base, strict=True)]
        assert moved == expected, changes

    base, G, D, both = weights(), [True, False], [False, True], [True, True]
    table = [(dict(ppo_epochs=1), G), (dict(clip_range=0.01), G), (dict(clip_range_high=0.01), G),
             (dict(loss="cispo"), G), (dict(target_kl=1e-9), G), (dict(lr=1e-3), G),
             (dict(gamma=0.5), G), (dict(lam=0.5), G), (dict(vf_coef=9.0), G),
             (dict(objective="original"), G), (dict(missing_eos_penalty=3.0), G),
             (dict(warmup_steps=9), G), (dict(skip_g_every=1), G), (dict(minibatch_size=8), G),
             (dict(d_lr=1e-3), D), (dict(d_steps=1), D), (dict(d_batch_size=6), D),
             (dict(label_smoothing=0.4), D), (dict(baseline="rloo", group_size=2), both),
             (dict(temperature=2.0), both), (dict(grad_clip=1e-6), both), (dict(seed=1), both),
             (dict(max_new_tokens=4), both), (dict(batch_size=16), both)]
    for changes, expected in table:
        check(changes, expected, base)
    gumbel = weights(estimator="gumbel")
    for changes in (dict(tau=0.5), dict(objective="original"), dict(minibatch_size=8)):
        check(changes | dict(estimator="gumbel"), G, gumbel)
    # A gradient far below Adam's eps moves nothing: D only decays, by .01 of its rate in 2 steps.
    start = weights(lr=0.0, d_lr=0.0)
    clipped = weights(estimator="gumbel", grad_clip=1e-14, d_lr=1.0)
    for w, expected in zip(clipped, (start[0], 0.99 ** 2 * start[1]), strict=True):
        close(w, expected)
    for estimator in ("reinforce", "gumbel"):       # the first round has no KL yet
        two = dict(estimator=estimator, max_steps=2)
        base = weights(**two, kl_coef=0.0)
        assert not torch.equal(weights(**two, kl_coef=9.0)[0], base[0])
    elsewhere = {"out_dir", "init", "disc", "data", "corpus_size", "estimator", "sample_interval",
                 "max_steps", "kl_coef", "device", "dtype", "tau"}
    assert set().union(*(changes for changes, _ in table)) | elsewhere == conftest.options_of(gan)


@pytest.mark.parametrize("estimator", ["reinforce", "hidden"])
def test_g_skips_rounds(tmp_path, sft_ckpt, discs, estimator, monkeypatch):
    """Every second one: there is no norm of its gradient, and its texts stay the same. What D
    reads of a text are the states of G itself, not those of the frozen reference. The critic says
    0 at first, and learns."""
    learns, values, update = set(), [], gan.ppo.update

    def check_and_update(learn, rollout, advantages, returns, cfg):
        close(returns, advantages + rollout.values * rollout.mask)
        values.append(rollout.values.abs().max())
        return update(learn, rollout, advantages, returns, cfg)

    monkeypatch.setattr(gan.ppo, "update", check_and_update)
    monkeypatch.setattr(gan, "states_for", lambda disc, model, *texts: learns.add(
        model.wte.weight.requires_grad) or states_for(disc, model, *texts))
    run_of(tmp_path, sft_ckpt, discs, estimator, disc=discs["states"], skip_g_every=2, max_steps=4,
           sample_interval=3)
    assert learns == {True} and (estimator == "hidden" or values[0] == 0 < values[1])
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert ["grad_norm" in row for row in rows] == [True, False, True, False]
    assert all("d_loss" in row for row in rows)
    assert rows[1]["kl"] > 0
    lines = (tmp_path / "samples.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("step ")] == ["step 3", "step 4"]


def test_a_discriminator_that_cannot_read_this_g_is_refused(tmp_path, sft_ckpt, discs, tok):
    """One that can comes in training mode: its dropout, if it has any, is on. Tokens may be read by
    one of another width, G's states may not."""
    able = config(init=sft_ckpt, disc=discs["tokens"])
    assert gan.load_opponent(able, load_model(sft_ckpt), "cpu").training
    for estimator, reads in (("hidden", "tokens"), ("gumbel", "states")):
        with pytest.raises(InputError, match=(
                f"reads {reads}, but --estimator {estimator} needs .* "
                f"discriminator.py --reads {'states' if reads == 'tokens' else 'tokens'},")):
            run_of(tmp_path, sft_ckpt, discs, estimator, disc=discs[reads])
    narrow = toy(vocab_size=tok.vocab_size, eos_token_id=tok.eos_token_id, n_embd=16)
    for reads, estimator in (("tokens", "gumbel"), ("states", "hidden")):
        other = conftest.with_another_tokenizer(discs[reads], tmp_path / "other.pt")
        refuses("was trained on texts of another model", run_of, tmp_path, sft_ckpt, discs,
                estimator, disc=other)
        save_discriminator(tmp_path / f"{reads}.pt", Discriminator(narrow, reads=reads), tok)
    run_of(tmp_path, sft_ckpt, discs, "gumbel", disc=str(tmp_path / "tokens.pt"), max_steps=1)
    refuses("its tokens, or its width, are different", run_of, tmp_path, sft_ckpt, discs, "hidden",
            disc=str(tmp_path / "states.pt"))
