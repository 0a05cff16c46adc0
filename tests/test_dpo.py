"""DPO and its relatives: every loss by hand, summed log-probs, and what a run learns."""

import dataclasses
import math

import conftest
import pytest
import torch
from conftest import EOS, PAD, awake, close, ids, off, records, refuses, tiny, toy

import dpo
from common import InputError, read_jsonl
from data import Batches, encode_records, tokenizer, tokenizer_of
from dpo import LOSSES, Labeled, Pair, losses_of
from model import RewardModel, load_model, logprobs, save_model
from puns import world


def config(**options):
    return dpo.Config(**{"beta": 0.1, "device": "cpu"} | options)


# log pi: chosen -10 in 10 tokens, rejected -12 in 8; reference: -11 and -11.5.
# So h = (-10 + 12) - (-11 + 11.5) = 1.5.
PAIR = Pair(*(torch.tensor([float(x)]) for x in (-10, -12, -11, -11.5, 10, 8, 0)))
BATCH = {"prompt": ids([PAD, 1, 2], [3, 4, 5]), "chosen": ids([6, 7, EOS], [8, EOS, PAD]),
         "rejected": ids([9, EOS, PAD, PAD], [1, 2, 3, EOS])}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))

# -----------------------------------------------------------------------------
# the losses

# loss, options, its value for PAIR, and where the policy is the reference: h = 0
BY_HAND = [
    ("dpo", {}, .62096, math.log(2)),           # -log sigmoid(.15)
    ("cdpo", {}, .63596, math.log(2)),          # .9 * .62096 + .1 * .77096
    ("robust", {}, .60221, math.log(2)),        # (.9 * .62096 - .1 * .77096) / .8
    ("hinge", {}, .85, 1),                      # 1 - .15
    ("hinge", {"beta": 1.0}, 0, 1),             # a margin of 1.5 is enough
    ("ipo", {}, 12.25, 25),                     # (1.5 - 5)^2
    ("ipo_mean", {}, 23.4014, 25),              # (-1 + 1.1) - (-1.5 + 1.4375) = .1625, less 5
    ("simpo", {"beta": 2.0}, .47408, None),     # -log sigmoid(2 (-1 + 1.5) - .5)
    ("orpo", {}, 1.04011, None),                # 1 - .1 log sigmoid(.70619)
    ("cpo", {}, math.log1p(math.exp(-.2)) + 1, None),   # -log sigmoid(.1 * 2), and 10 / 10 of SFT
    ("kto", {}, .5 * (1 - sigmoid(.1) + 1 - sigmoid(.05)), .5)]     # kl 0: 1 above, .5 below


@pytest.mark.parametrize("loss, options, expected, at_start", BY_HAND)
def test_every_loss_by_hand(loss, options, expected, at_start):
    """Each wants the chosen up and the rejected down, and has its own value at the start."""
    assert LOSSES[loss](PAIR, config(**options)).item() == pytest.approx(expected, abs=1e-4)
    chosen = torch.tensor([-10.0], requires_grad=True)
    rejected = torch.tensor([-12.0], requires_grad=True)
    pair = PAIR._replace(chosen_logps=chosen, rejected_logps=rejected)
    LOSSES[loss](pair, config()).sum().backward()
    assert chosen.grad < 0 < rejected.grad
    if at_start is not None:
        model = awake(toy())
        pair = dpo.dpo_batch(model, model, BATCH, with_kl=loss == "kto")
        close(LOSSES[loss](pair, config()), torch.full((2,), float(at_start)))


def test_all_losses_are_tested():
    assert {row[0] for row in BY_HAND} == set(LOSSES)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("logps", [(-9000.0, -1e-8), (-1e-8, -9000.0)])
def test_a_text_that_is_impossible_or_known_by_heart(loss, logps):
    """Losses and gradients stay finite, where exp() rounds a probability to 0 or to 1."""
    chosen, rejected = (torch.tensor([logp], requires_grad=True) for logp in logps)
    pair = PAIR._replace(chosen_logps=chosen, rejected_logps=rejected)
    found = LOSSES[loss](pair, config())
    assert all(x.isfinite() for x in (found, *torch.autograd.grad(found, [chosen, rejected])))


def test_kto_by_hand_with_a_kl():
    """kl = mean(2, 4) = 3: the chosen is at 1 - 3 = -2, the rejected at 3 + .5 = 3.5. A mean below
    0 counts as 0, and it has no gradient. With labels each response has its half, times a weight.
    """
    two = Pair(*(torch.cat([x, x]) for x in PAIR))
    pair = two._replace(kl=torch.tensor([2.0, 4.0], requires_grad=True))
    good, bad = 1 - sigmoid(.1 * -2), 1 - sigmoid(.1 * 3.5)
    assert LOSSES["kto"](pair, config()).tolist() == pytest.approx([.5 * (good + bad)] * 2)
    assert not LOSSES["kto"](pair, config()).requires_grad
    below = LOSSES["kto"](pair._replace(kl=torch.tensor([-9.0, 1.0])), config())
    assert below.tolist() == pytest.approx(LOSSES["kto"](two, config()).tolist(), abs=1e-5)
    labeled = Labeled(torch.tensor([1, -.5, 1]), torch.tensor([True, False, True]),
                      torch.tensor([.75, 1.5, .75]), torch.tensor([2.0, 4.0, 3.0]))
    expected = [.75 * good, 1.5 * bad, .75 * good]
    assert losses_of(labeled, config(loss="kto")).tolist() == pytest.approx(expected)


def test_reward_metrics_by_hand():
    """Two pairs with h = 1.5 and h = (-10 + 12) - (-11 + 14) = -1, and beta = .1. With labels every
    good response makes a pair with every bad one: 1 and 2 against -.5 and 1.5."""
    pair = Pair(*(torch.cat([x, x]) for x in PAIR))
    pair = pair._replace(ref_rejected_logps=torch.tensor([-11.5, -14.0]))
    expected = {"rewards/chosen": .1, "rewards/rejected": .1 * (-.5 + 2) / 2,
                "rewards/margins": .1 * .25, "rewards/accuracies": .5}
    assert dpo.reward_metrics(pair, 0.1) == pytest.approx(expected)
    labeled = Labeled(torch.tensor([1, -.5, 2, 1.5]), torch.tensor([True, False, True, False]),
                      torch.ones(4), torch.zeros(4))
    expected = {"rewards/chosen": .15, "rewards/rejected": .05, "rewards/margins": .1,
                "rewards/accuracies": .75}
    assert dpo.reward_metrics(labeled, 0.1) == pytest.approx(expected)
    only_bad = labeled._replace(is_good=torch.zeros(4, dtype=torch.bool))
    assert dpo.reward_metrics(only_bad, 0.1)["rewards/margins"] == 0
    start = pair._replace(chosen_logps=pair.ref_chosen_logps,
                          rejected_logps=pair.ref_rejected_logps)
    assert dpo.reward_metrics(start, 0.1)["rewards/accuracies"] == 0    # prefers neither

# -----------------------------------------------------------------------------
# batches

def test_a_batch_becomes_a_pair():
    """Or, with labels, a Labeled. More padding changes nothing."""
    policy, reference = awake(toy()), awake(toy(seed=1))
    pair = dpo.dpo_batch(policy, reference, BATCH, with_kl=True)

    def summed(model, response):
        return logprobs(model, BATCH["prompt"], response).sum(dim=1)

    other = BATCH["chosen"].flip(0)         # of two records, the neighbor's is the other one's
    expected = Pair(summed(policy, BATCH["chosen"]), summed(policy, BATCH["rejected"]),
                    summed(reference, BATCH["chosen"]), summed(reference, BATCH["rejected"]),
                    torch.tensor([3, 2]), torch.tensor([2, 4]),
                    summed(policy, other) - summed(reference, other))
    wide = {"prompt": torch.cat([torch.full((2, 2), PAD), BATCH["prompt"]], 1),
            "chosen": torch.cat([BATCH["chosen"], torch.full((2, 3), PAD)], 1),
            "rejected": BATCH["rejected"]}
    for batch in (BATCH, wide):
        for a, b in zip(dpo.dpo_batch(policy, reference, batch, True), expected, strict=True):
            close(a, b, atol=1e-4)
    assert pair.chosen_logps.requires_grad
    assert not pair.ref_chosen_logps.requires_grad and not pair.kl.requires_grad

    label, weight = torch.tensor([False, True]), torch.tensor([2.0, .5])
    labeled = dpo.dpo_batch(policy, reference, {"prompt": BATCH["prompt"], "label": label,
                                                "completion": BATCH["chosen"], "weight": weight})
    close(labeled.logratios, pair.chosen_logratios)
    close(labeled.kl, pair.kl)
    assert labeled.is_good is label and labeled.weight is weight
    assert labeled.logratios.requires_grad and not labeled.kl.requires_grad


def test_online_pairs_are_the_best_and_the_worst_of_each_group():
    """The score is the second token, plus 100 for the prompt that ends in 5."""
    def reward(prompt, response):
        return response[:, 1] + 100.0 * (prompt[:, -1] == 5)

    rng = torch.Generator().manual_seed(0)
    options = config(group_size=5, max_new_tokens=4)
    policy = awake(toy())
    batch, scores = dpo.sample_pairs(policy, reward, BATCH["prompt"], options, rng)
    assert batch["prompt"] is BATCH["prompt"] and scores.shape == (2, 5)
    assert (scores[0] < 100).all() and (scores[1] >= 100).all()
    _, again = dpo.sample_pairs(policy, reward, BATCH["prompt"], options, rng.manual_seed(0))
    assert torch.equal(again, scores)
    for field, extreme in (("chosen", scores.amax(dim=1)), ("rejected", scores.amin(dim=1))):
        assert batch[field].size(0) == 2 and batch[field].size(1) <= 4
        close(reward(BATCH["prompt"], batch[field]), extreme)

# -----------------------------------------------------------------------------
# the stage

THINGS = ["banker", "baker", "pilot", "owl", "tailor", "doctor", "farmer", "sailor", "judge"]


def pairs_about(things):
    """About every thing a good word is chosen and a bad one rejected."""
    return [{"prompt": f"About a {thing}:", "chosen": f" The {thing} lost interest.",
             "rejected": f" A bad {thing} moved."} for thing in things]


def thumbs(rows):
    """The same without pairs: twice as many records, each with a label."""
    return [{"prompt": row["prompt"], "completion": row[field], "label": field == "chosen"}
            for row in rows for field in ("chosen", "rejected")]


def run_of(folder, sft_ckpt, shape=list, **changes):
    """A short run on eight pairs; the ninth is held out. Returns the rows of its metrics."""
    data = {"data": records(folder / "pairs.jsonl", shape(pairs_about(THINGS[:8]))),
            "val_data": records(folder / "val.jsonl", shape(pairs_about(THINGS[8:])))}
    sizes = data | dict(batch_size=8, max_steps=12, lr=2e-3, warmup_steps=2, eval_interval=12)
    dpo.train(tiny(dpo, folder, sft_ckpt, **sizes | changes))
    return read_jsonl(folder / "metrics.jsonl")


def pair_of(policy, reference, rows):
    """The Pair of all rows under two models: a second computation."""
    tok = tokenizer_of(policy)
    encoded = encode_records(rows, tok, ["prompt", "chosen", "rejected"], 48)
    batches = Batches(encoded, len(rows), tok.pad_token_id, "cpu", 0)
    return dpo.dpo_batch(policy, reference, batches.next())


@pytest.mark.parametrize("changes", [{}, dict(loss="ipo"), dict(loss="simpo"), dict(lora=4),
                                     dict(loss="kto", shape=thumbs, lr=1e-2)])
def test_it_learns_what_is_chosen(tmp_path, sft_ckpt, changes):
    """It starts at ln 2 (KTO: .5) and ends with the held-out pair in the right order. The reference
    is the start: a second computation of the loss from the two checkpoints agrees."""
    rows, loss = run_of(tmp_path, sft_ckpt, **changes), changes.get("loss", "dpo")
    first, last, held_out = rows[0], rows[-2], rows[-1]
    if loss in ("dpo", "kto"):
        start = {"dpo": math.log(2), "kto": .5}[loss]
        assert first["loss"] == pytest.approx(start, abs=1e-4) and last["loss"] < start - .2
    assert last["loss"] < first["loss"] and last["rewards/margins"] > 0.3
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    margin = last["rewards/chosen"] - last["rewards/rejected"]
    assert last["rewards/margins"] == pytest.approx(margin, abs=1e-3)
    assert last["rewards/accuracies"] == held_out["val_accuracy"] == 1
    samples = read_jsonl(tmp_path / "samples.jsonl")
    assert {row["prompt"] for row in samples} == {"About a judge:"}     # of the held-out pair
    pair = pair_of(load_model(tmp_path / "ckpt.pt"), load_model(sft_ckpt), pairs_about(THINGS[8:]))
    assert pair.logits.item() > 0.6 and held_out["kl"] > 0.1
    if loss != "kto":
        expected = LOSSES[loss](pair, dpo.Config()).item()
        assert held_out["val_loss"] == pytest.approx(expected, rel=1e-2, abs=1e-4)


def test_evaluation_is_over_all_records_at_once():
    """In chunks of one, too, where no good response has a bad one beside it. KTO needs its KL."""
    models = awake(toy()), awake(toy(seed=31))      # without the reference: half of them right
    for loss, size in (("dpo", 1), ("kto", 2)):
        cfg = config(loss=loss, batch_size=size)
        found = dpo.evaluate(*models, Batches(BATCH, 1, PAD, "cpu", 0), cfg, off)
        pair = dpo.dpo_batch(*models, BATCH, with_kl=loss == "kto")
        assert found["val_loss"] == pytest.approx(LOSSES[loss](pair, cfg).mean().item(), abs=1e-5)
        assert found["val_accuracy"] == (pair.logits > 0).float().mean()
    assert pair.kl.mean() > 0.1
    labels = {"prompt": BATCH["prompt"], "completion": BATCH["chosen"],
              "label": torch.tensor([True, False]), "weight": torch.ones(2)}
    found = dpo.evaluate(*models, Batches(labels, 1, PAD, "cpu", 0), config(batch_size=1), off)
    good, bad = dpo.dpo_batch(*models, labels).logratios
    assert found["val_accuracy"] == (good > bad)


@pytest.mark.parametrize("shape", [list, thumbs])
def test_kto_trains_with_its_kl(tmp_path, sft_ckpt, monkeypatch, shape):
    seen = []
    monkeypatch.setattr(dpo, "losses_of", lambda batch, config: seen.append(
        batch.kl.abs().max().item()) or losses_of(batch, config))
    run_of(tmp_path, sft_ckpt, shape, loss="kto", max_steps=3, eval_interval=3)
    assert seen[0] == pytest.approx(0, abs=1e-4) and min(seen[1:3]) > 1e-3


def test_online_dpo_learns_what_the_reward_model_likes(tmp_path, sft_ckpt, monkeypatch, tok):
    """Here: short answers. Prompts are all that it reads."""
    means = []

    def reward(prompt, response):
        lengths = (response != tok.pad_token_id).sum(dim=1).float()
        means.append(lengths.mean().item())
        return -lengths

    monkeypatch.setattr(dpo, "load_frozen_reward_model", lambda *args: reward)
    prompts = [{"prompt": f"About a {thing}:"} for thing in THINGS[:8]]
    rows = run_of(tmp_path, sft_ckpt, data=records(tmp_path / "prompts.jsonl", prompts),
                  online="short.pt", max_new_tokens=12, max_steps=16, eval_interval=16, lr=5e-3)
    samples = read_jsonl(tmp_path / "samples.jsonl")
    assert {row["prompt"] for row in samples} == {"About a judge:"}     # of --val_data
    steps = [row for row in rows if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert steps[-1]["score"] > steps[0]["score"] + 2
    assert steps[0]["score"] == pytest.approx(-means[0], rel=1e-3) and 6 < means[0] <= 12
    assert rows[-1]["length"] == -rows[-1]["score"] < 6 and "val_loss" not in rows[-1]
    assert len(dpo.load_records(config(online="x"), tokenizer())[0]) == len(world().things)


def test_online_dpo_needs_a_reward_model_of_the_same_tokens(tmp_path, sft_ckpt, tok):
    save_model(tmp_path / "reward.pt", RewardModel(load_model(sft_ckpt)), tok)
    other = conftest.with_another_tokenizer(tmp_path / "reward.pt", tmp_path / "other.pt")
    refuses("other.pt has another tokenizer than", run_of, tmp_path, sft_ckpt, online=other)
    refuses("tokens, 44 of them for a response", run_of, tmp_path, sft_ckpt, max_new_tokens=44,
            online=str(tmp_path / "reward.pt"))


def test_options_of_training_and_of_the_losses(tmp_path, sft_ckpt):
    """At the start h = 0: DPO's gradient is beta / 2 that of h, cdpo's 1 - 2 smoothing of it, and
    robust's 1 / (1 - 2 smoothing) of it."""
    def run(**changes):
        return run_of(tmp_path, sft_ckpt, max_steps=1, **changes)[0]

    def rows_and_model(**options):
        return run_of(tmp_path, sft_ckpt, **options), load_model(tmp_path / "ckpt.pt")

    conftest.check_train_options(rows_and_model, "val_loss")
    norm = run()["grad_norm"]
    assert run(beta=1.0)["grad_norm"] == pytest.approx(2 * norm, rel=1e-3)
    smooth = run(loss="cdpo", label_smoothing=0.3)["grad_norm"]
    assert smooth == pytest.approx(0.4 * norm, rel=1e-3)
    robust = run(loss="robust", label_smoothing=0.3)["grad_norm"]
    assert robust == pytest.approx(norm / 0.4, rel=1e-3)
    for loss in ("cdpo", "robust"):
        refuses("--label_smoothing must be below 0.5", run, loss=loss, label_smoothing=0.5)
    assert run(batch_size=4)["grad_norm"] != pytest.approx(norm, rel=1e-2)      # of half the pairs
    start = load_model(sft_ckpt)
    pair = pair_of(start, start, pairs_about(THINGS[:8]))
    expected = LOSSES["simpo"](pair, dpo.Config(simpo_gamma=2.0)).mean().item()
    found = run(loss="simpo", simpo_gamma=2.0)["loss"]
    assert found == pytest.approx(expected, rel=1e-3)
    # The mean of 1 - beta h, as long as all of them are positive.
    _, hinge, *_ = run_of(tmp_path, sft_ckpt, max_steps=2, loss="hinge", beta=0.3)
    assert 0 < hinge["loss"] < 1
    assert hinge["loss"] == pytest.approx(1 - hinge["rewards/margins"], abs=1e-4)


def test_pairs_of_the_pun_world(tok):
    """KTO takes the same pairs."""
    conftest.check_pun_world_pairs(lambda **options: dpo.load_records(config(**options), tok))
    small = config(corpus_size=20)
    kto = dpo.load_records(dataclasses.replace(small, loss="kto"), tok)
    assert kto == dpo.load_records(small, tok)


def test_ties_are_left_out(tmp_path, capsys):
    rows = pairs_about(THINGS)
    for row, share in zip(rows, (.5, .6, 1.0, .5), strict=False):
        row["share"] = share
    path = records(tmp_path / "pairs.jsonl", rows)
    kept, val = dpo.load_pairs(config(data=path, val_data=path), tokenizer())
    assert [row["prompt"] for row in kept] == [rows[i]["prompt"] for i in (1, 2, 4, 5, 6, 7, 8)]
    assert len(val) == 7 and "left out 4 ties" in capsys.readouterr().out


def test_good_and_bad_responses_count_equally(tmp_path, tok):
    """Three thumbs up and one down: 4 / (2 * 3) each, and 4 / 2."""
    rows = [row for row in thumbs(pairs_about(THINGS[:3])) if row["label"]]
    rows += thumbs(pairs_about(THINGS[:1]))[1:]
    encoded = dpo.encode(rows, tok, ["prompt", "completion"], 48, 0)
    assert encoded["label"].tolist() == [True, True, True, False]
    assert encoded["weight"].tolist() == pytest.approx([2 / 3] * 3 + [2])
    refused = {"every label is True": rows[:3],
               "'label' must be true or false": [row | {"label": 1} for row in rows]}
    for message, bad in refused.items():
        with pytest.raises(InputError, match=message):
            dpo.load_records(config(data=records(tmp_path / "a.jsonl", bad), loss="kto"), tok)
    good, alike = records(tmp_path / "good.jsonl", rows), records(tmp_path / "b.jsonl", rows[:3])
    refuses("/b.jsonl: every label is True", dpo.load_records,
            config(data=good, val_data=alike, loss="kto"), tok)
    for text in ("[" * 100_000, "no"):
        (tmp_path / "bad.jsonl").write_text(text, encoding="utf-8")
        refuses("bad.jsonl:1: this line is not JSON", dpo.load_records,
                config(data=str(tmp_path / "bad.jsonl"), loss="kto"), tok)


def test_labels_are_for_kto_alone(tmp_path, sft_ckpt):
    refuses("pairs.jsonl:1: 'chosen' is missing", run_of, tmp_path, sft_ckpt, thumbs, loss="ipo")


def test_samples_of_online_dpo_are_as_long_as_those_it_learns_from(tmp_path, sft_ckpt, monkeypatch):
    monkeypatch.setattr(dpo, "load_frozen_reward_model",
                        lambda *args: lambda prompt, response: response[:, 0].float())
    data = records(tmp_path / "p.jsonl", [{"prompt": f"About a {thing}:"} for thing in THINGS])
    run_of(tmp_path, sft_ckpt, data=data, val_data=data, online="x", max_new_tokens=2, max_steps=1)
    assert max(row["length"] for row in read_jsonl(tmp_path / "samples.jsonl")) <= 2


def test_how_many_samples_are_measured(tmp_path, sft_ckpt):
    """512 of the pun world, for the judge; 64 of other texts."""
    many = pairs_about([f"{thing} {i}" for thing in THINGS for i in range(10)])
    own = records(tmp_path / "many.jsonl", many)
    for path, n in (("", 512), (own, 64)):
        run_of(tmp_path, sft_ckpt, data=path, val_data=path, max_steps=1)
        assert len(read_jsonl(tmp_path / "samples.jsonl")) == n
