"""DPO and its relatives: every loss by hand, summed log-probs, and what a run learns."""

import math

import pytest
import torch
from conftest import (
    CPU,
    EOS,
    PAD,
    awake,
    check_optimizer,
    check_pun_world_pairs,
    close,
    ids,
    records,
    tiny,
    toy,
)

import dpo
from common import InputError, read_jsonl
from data import Batches, encode_records, tokenizer_of
from dpo import LOSSES, Labeled, Pair, losses_of
from model import load_model, logprobs
from puns import world


def config(**options):
    return dpo.Config(**({"beta": 0.1} | options))


# log pi: chosen -10 in 10 tokens, rejected -12 in 8; reference: -11 and -11.5.
# So h = (-10 + 12) - (-11 + 11.5) = 1.5.
PAIR = Pair(*(torch.tensor([float(x)]) for x in (-10, -12, -11, -11.5, 10, 8, 0)))
BATCH = {"prompt": ids([PAD, 1, 2], [3, 4, 5]), "chosen": ids([6, 7, EOS], [8, EOS, PAD]),
         "rejected": ids([9, EOS, PAD, PAD], [1, 2, 3, EOS])}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))

# -----------------------------------------------------------------------------
# the losses

@pytest.mark.parametrize("loss, options, expected", [
    ("dpo", {}, .62096),                    # -log sigmoid(.15)
    ("cdpo", {}, .63596),                   # .9 * .62096 + .1 * .77096
    ("robust", {}, .60221),                 # (.9 * .62096 - .1 * .77096) / .8
    ("hinge", {}, .85),                     # 1 - .15
    ("ipo", {}, 12.25),                     # (1.5 - 5)^2
    ("ipo_mean", {}, 23.4014),              # (-1 + 1.1) - (-1.5 + 1.4375) = .1625; (.1625 - 5)^2
    ("simpo", {"beta": 2.0}, .47408),       # -log sigmoid(2 (-1 + 1.5) - .5)
    ("orpo", {}, 1.04011),                  # 1 - .1 log sigmoid(.70619)
    ("cpo", {}, math.log1p(math.exp(-.2)) + 1),     # -log sigmoid(.1 * 2), and 10 / 10 of SFT
    ("kto", {}, .5 * (1 - sigmoid(.1) + 1 - sigmoid(.05)))])    # kl 0: 1 above, .5 below
def test_every_loss_by_hand(loss, options, expected):
    assert LOSSES[loss](PAIR, config(**options)).item() == pytest.approx(expected, abs=1e-4)


def test_what_the_losses_are_made_of():
    assert PAIR.logits.item() == 1.5 and PAIR.mean_logits.item() == pytest.approx(.1625)
    assert PAIR.chosen_logratios.item() == 1 and PAIR.rejected_logratios.item() == -.5
    # log(e^-1 / (1 - e^-1)) - log(e^-1.5 / (1 - e^-1.5))
    log_odds = dpo.log_odds_of(torch.tensor(-1.0)) - dpo.log_odds_of(torch.tensor(-1.5))
    assert log_odds.item() == pytest.approx(.70619, abs=1e-4)


def test_kto_by_hand_with_a_kl():
    """kl = mean(2, 4) = 3: the chosen is at 1 - 3 = -2, the rejected at 3 + .5 = 3.5.

    A mean below 0 counts as 0, and it has no gradient. With labels in place of pairs, each response
    has its own half, times its weight."""
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
    # The good ones gained 1.5 more than the bad one: two pairs.
    metrics = {"rewards/chosen": .1, "rewards/rejected": -.05, "rewards/margins": .15,
               "rewards/accuracies": 1}
    assert dpo.reward_metrics(labeled, 0.1) == pytest.approx(metrics)
    only_bad = labeled._replace(is_good=torch.zeros(3, dtype=torch.bool))
    assert dpo.reward_metrics(only_bad, 0.1)["rewards/margins"] == 0


@pytest.mark.parametrize("loss, at_start", [
    ("dpo", math.log(2)), ("cdpo", math.log(2)), ("robust", math.log(2)), ("hinge", 1),
    ("kto", .5), ("ipo", 25), ("ipo_mean", 25)])
def test_every_loss_at_the_start(loss, at_start):
    """The policy is the reference: h = 0, whatever the texts."""
    model = awake(toy())
    pair = dpo.dpo_batch(model, model, BATCH, with_kl=loss == "kto")
    assert (pair.logits == 0).all() and (pair.kl == 0).all()
    close(LOSSES[loss](pair, config()), torch.full((2,), float(at_start)))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_wants_the_chosen_up_and_the_rejected_down(loss):
    chosen = torch.tensor([-10.0], requires_grad=True)
    rejected = torch.tensor([-12.0], requires_grad=True)
    pair = PAIR._replace(chosen_logps=chosen, rejected_logps=rejected)
    LOSSES[loss](pair, config()).sum().backward()
    assert chosen.grad < 0 < rejected.grad


def test_reward_metrics_by_hand():
    """Two pairs with h = 1.5 and h = (-10 + 12) - (-11 + 14) = -1, and beta = .1."""
    pair = Pair(*(torch.cat([x, x]) for x in PAIR))
    pair = pair._replace(ref_rejected_logps=torch.tensor([-11.5, -14.0]))
    expected = {"rewards/chosen": .1, "rewards/rejected": .1 * (-.5 + 2) / 2,
                "rewards/margins": .1 * .25, "rewards/accuracies": .5}
    assert dpo.reward_metrics(pair, 0.1) == pytest.approx(expected)

# -----------------------------------------------------------------------------
# log-probs

def test_summed_logprobs_against_a_loop():
    """One token at a time, without padding: the response's tokens alone, end token included."""
    model, fields = awake(toy()), ("chosen", "rejected")
    sums = dpo.sum_logprobs(model, BATCH["prompt"], [BATCH[field] for field in fields])
    for field, summed in zip(fields, sums, strict=True):
        for i in range(2):
            prompt = [x for x in BATCH["prompt"][i].tolist() if x != PAD]
            response = [x for x in BATCH[field][i].tolist() if x != PAD]
            total = 0.0
            for k, token in enumerate(response):
                logits = model(ids(prompt + response[:k]), ids([token]))[0, 0]
                total += logits.log_softmax(-1)[token].item()
            assert summed[i].item() == pytest.approx(total, abs=1e-4)


def test_a_batch_becomes_a_pair():
    """Or, with labels, a Labeled. More padding changes nothing."""
    policy, reference = awake(toy()), awake(toy(seed=1))
    pair = dpo.dpo_batch(policy, reference, BATCH, with_kl=True)

    def summed(model, response):
        return logprobs(model, BATCH["prompt"], response).sum(dim=1)

    close(pair.chosen_logps, summed(policy, BATCH["chosen"]))
    close(pair.rejected_logps, summed(policy, BATCH["rejected"]))
    close(pair.ref_chosen_logps, summed(reference, BATCH["chosen"]))
    close(pair.ref_rejected_logps, summed(reference, BATCH["rejected"]))
    assert pair.chosen_length.tolist() == [3, 2] and pair.rejected_length.tolist() == [2, 4]
    other = BATCH["chosen"].flip(0)         # of two records, the neighbor's is the other one's
    close(pair.kl, summed(policy, other) - summed(reference, other))
    assert pair.chosen_logps.requires_grad
    assert not pair.ref_chosen_logps.requires_grad and not pair.kl.requires_grad

    wide = {"prompt": torch.cat([torch.full((2, 2), PAD), BATCH["prompt"]], 1),
            "chosen": torch.cat([BATCH["chosen"], torch.full((2, 3), PAD)], 1),
            "rejected": BATCH["rejected"]}
    for a, b in zip(pair, dpo.dpo_batch(policy, reference, wide, with_kl=True), strict=True):
        close(a, b, atol=1e-4)

    label, weight = torch.tensor([False, True]), torch.tensor([2.0, .5])
    batch = {"prompt": BATCH["prompt"], "completion": BATCH["chosen"], "label": label,
             "weight": weight}
    labeled = dpo.dpo_batch(policy, reference, batch)
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
    batch, scores = dpo.sample_pairs(awake(toy()), reward, BATCH["prompt"], options, rng)
    assert batch["prompt"] is BATCH["prompt"] and scores.shape == (2, 5)
    assert (scores[0] < 100).all() and (scores[1] >= 100).all()
    for field, extreme in (("chosen", scores.amax(dim=1)), ("rejected", scores.amin(dim=1))):
        assert batch[field].shape[0] == 2 and batch[field].shape[1] <= 4
        close(reward(BATCH["prompt"], batch[field]), extreme)

# -----------------------------------------------------------------------------
# the stage

THINGS = ["banker", "baker", "pilot", "owl", "tailor", "doctor", "farmer", "sailor", "judge"]
FIELDS = ["prompt", "chosen", "rejected"]


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
    """The Pair of all rows, under two models: a second computation."""
    tok = tokenizer_of(policy)
    batches = Batches(encode_records(rows, tok, FIELDS, 48), len(rows), tok.pad_token_id, "cpu", 0)
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

    policy, start = load_model(tmp_path / "ckpt.pt"), load_model(sft_ckpt)
    pair = pair_of(policy, start, pairs_about(THINGS[8:]))
    assert pair.logits.item() > 0.6 and held_out["kl"] > 0.1
    if loss != "kto":
        expected = LOSSES[loss](pair, dpo.Config()).item()
        assert held_out["val_loss"] == pytest.approx(expected, rel=1e-2, abs=1e-4)


def test_held_out_pairs_are_those_of_val_data(tmp_path, sft_ckpt):
    """Swapped ones come out in the wrong order, or thumbs up for what is bad."""
    swapped = [{"prompt": pair["prompt"], "chosen": pair["rejected"], "rejected": pair["chosen"]}
               for pair in pairs_about(THINGS[8:])]
    val_data = records(tmp_path / "swapped.jsonl", swapped)
    assert run_of(tmp_path, sft_ckpt, val_data=val_data)[-1]["val_accuracy"] == 0
    val_data = records(tmp_path / "swapped.jsonl", thumbs(swapped))
    rows = run_of(tmp_path, sft_ckpt, thumbs, loss="kto", val_data=val_data, lr=1e-2)
    assert rows[-1]["val_accuracy"] == 0


@pytest.mark.parametrize("shape", [list, thumbs])
def test_kto_trains_with_its_kl(tmp_path, sft_ckpt, monkeypatch, shape):
    seen, losses_of = [], dpo.losses_of

    def note(batch, config):
        seen.append(batch.kl.abs().max().item())
        return losses_of(batch, config)

    monkeypatch.setattr(dpo, "losses_of", note)
    run_of(tmp_path, sft_ckpt, shape, loss="kto", max_steps=3, eval_interval=3)
    assert seen[0] == pytest.approx(0, abs=1e-4) and min(seen[1:3]) > 1e-3


def test_online_dpo_learns_what_the_reward_model_likes(tmp_path, sft_ckpt, monkeypatch):
    """Here: short answers. Prompts are all that it reads."""
    def reward(prompt, response):
        return -(response != load_model(sft_ckpt).pad_token_id).sum(dim=1).float()

    monkeypatch.setattr(dpo, "load_reward_model", lambda path, device: reward)
    prompts = [{"prompt": f"About a {thing}:"} for thing in THINGS]
    rows = run_of(tmp_path, sft_ckpt, data=records(tmp_path / "prompts.jsonl", prompts),
                  val_data="", reward="short.pt", max_new_tokens=12, max_steps=16,
                  eval_interval=16, lr=5e-3)
    steps = [row for row in rows if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert steps[-1]["score"] > steps[0]["score"] + 2 and steps[0]["score"] < -6
    assert rows[-1]["length"] == -rows[-1]["score"] < 6 and "val_loss" not in rows[-1]
    assert len(dpo.load_records(config(reward="x"))[0]) == len(world().things)


def test_options_of_the_optimizer_and_of_the_losses(tmp_path, sft_ckpt):
    def run(**changes):
        sizes = dict(max_steps=1, warmup_steps=0, lr=1e-2) | changes
        return run_of(tmp_path, sft_ckpt, **sizes)[0]

    def weights_after(**changes):
        run(**changes)
        return load_model(tmp_path / "ckpt.pt").state_dict()

    check_optimizer(weights_after)
    # At the start h = 0: the gradient of DPO is beta / 2 that of h, and cdpo's 1 - 2 smoothing of
    # it.
    norm = run()["grad_norm"]
    assert run(beta=1.0)["grad_norm"] == pytest.approx(2 * norm, rel=1e-3)
    smooth = run(loss="cdpo", label_smoothing=0.3)["grad_norm"]
    assert smooth == pytest.approx(0.4 * norm, rel=1e-3)
    start = load_model(sft_ckpt)
    pair = pair_of(start, start, pairs_about(THINGS[:8]))
    for gamma in (0.5, 2.0):
        found = run(loss="simpo", simpo_gamma=gamma)["loss"]
        options = dpo.Config(simpo_gamma=gamma)
        assert found == pytest.approx(LOSSES["simpo"](pair, options).mean().item(), rel=1e-3)


def test_pairs_of_the_pun_world():
    check_pun_world_pairs(lambda **options: dpo.load_records(config(**options)))


def test_ties_are_left_out(tmp_path, capsys):
    rows = pairs_about(THINGS)
    for row, share in zip(rows, (.5, .6, 1.0, .5), strict=False):
        row["share"] = share
    path = records(tmp_path / "pairs.jsonl", rows)
    kept, val = dpo.load_pairs(config(data=path, val_data=path))
    assert [row["prompt"] for row in kept] == [rows[i]["prompt"] for i in (1, 2, 4, 5, 6, 7, 8)]
    assert len(val) == 7 and "left out 4 ties" in capsys.readouterr().out


def test_good_and_bad_responses_count_equally(tmp_path, tok):
    """Three thumbs up and one down: 4 / (2 * 3) each, and 4 / 2."""
    rows = [row for row in thumbs(pairs_about(THINGS[:3])) if row["label"]]
    rows += thumbs(pairs_about(THINGS[:1]))[1:]
    encoded = dpo.encode(rows, tok, ["prompt", "completion"], 48, 0)
    assert encoded["label"].tolist() == [True, True, True, False]
    assert encoded["weight"].tolist() == pytest.approx([2 / 3] * 3 + [2])
    data = records(tmp_path / "thumbs.jsonl", rows[:3])
    with pytest.raises(InputError, match="thumbs.jsonl: every label is True"):
        dpo.load_records(config(data=data, loss="kto"))
    data = records(tmp_path / "thumbs.jsonl", [row | {"label": 1} for row in rows])
    with pytest.raises(InputError, match="thumbs.jsonl:1: 'label' must be true or false"):
        dpo.load_records(config(data=data, loss="kto"))


def test_an_unknown_loss_is_refused():
    with pytest.raises(InputError, match="--loss is one of dpo, cdpo"):
        dpo.train(config(loss="ppo", **CPU))
