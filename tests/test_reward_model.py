"""The reward model: Bradley-Terry by hand, calibration, and what a run learns."""

import math
import random

import conftest
import pytest
import torch
from conftest import close, ids, off, records, refuses, tiny, toy

import reward_model
from common import InputError, check_options, read_jsonl
from data import Batches, complete
from model import RewardModel, load_model, load_reward_model, save_model
from puns import world
from reward_model import chance_warning, ranking_loss, score_texts, spearman

PAIR = ["chosen", "rejected"]

# -----------------------------------------------------------------------------
# the losses

@pytest.mark.parametrize("gap, options, expected", [
    (0.0, {}, math.log(2)),
    (1.5, {}, .20141),                                  # log(1 + e^-1.5)
    (1.5, {"margin": 1.0}, .47408),                     # as with a gap of .5
    (1.5, {"centering": 0.01}, .20141 + .0225),         # .01 (1.5 + 0)^2
    (1.5, {"share": 0.8}, .50141),                      # .8 * .20141 + .2 * (.20141 + 1.5)
    (1.5, {"share": 0.8, "margin": 1.0}, .57408),       # .8 * .47408 + .2 * (.47408 + .5)
    (0.1, {"share": 0.5}, .69440),                      # of a tie: least, ln 2, at a gap of 0
    (-200.0, {}, 200.0)])                               # where log(sigmoid(x)) would be -inf
def test_bradley_terry_by_hand(gap, options, expected):
    scores = torch.tensor([[gap, 0.0]], requires_grad=True)
    loss = ranking_loss(scores, **options)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    loss.backward()
    assert scores.grad.isfinite().all()


def test_a_ranking_of_three_is_the_mean_of_its_three_pairs():
    scores, margin = torch.tensor([[1.0, .2, -.5], [0.0, 2.0, .3]]), torch.tensor([.5, 1.0])
    for options in ({}, {"margin": margin}):
        pairs = [ranking_loss(scores[:, [i, j]], **options) for i, j in ((0, 1), (0, 2), (1, 2))]
        close(ranking_loss(scores, **options), sum(pairs) / 3)

# -----------------------------------------------------------------------------
# scores of texts

def test_texts_are_scored_as_their_ids(tiny_model, tok):
    reward = RewardModel(tiny_model, likelihood=0.3).eval()
    prompts = ["About a banker:", "Hi"] * 200           # more than one batch
    texts = [" no" * (i % 3) + " I lost interest." for i in range(400)]
    scores = score_texts(reward, tok, prompts, texts, off)
    assert scores.shape == (400,)
    for i in (0, 1, 2, 399):
        text = ids(tok.encode(texts[i]) + [tok.eos_token_id])
        close(scores[i], reward(ids(tok.encode(prompts[i])), text)[0])

# -----------------------------------------------------------------------------
# evaluation

class Table(torch.nn.Module):
    """A reward model whose scores stand in a table: at the token of the prompt, and that of the
    response."""

    def __init__(self, *columns):
        super().__init__()
        self.table, self.model = torch.stack(columns, dim=1), toy()

    def forward(self, prompt, response):
        return self.table[prompt[:, -1], response[:, 0]]

    def evaluate(self, fields, **numbers):
        encoded = {"prompt": torch.arange(len(self.table))[:, None]} | numbers
        for i, field in enumerate(fields):
            encoded[field] = torch.full((len(self.table), 1), i)
        return reward_model.evaluate(self, Batches(encoded, 1, 10_000, "cpu", 0), fields, off)


def test_evaluation_is_the_mean_over_all_records():
    """300 records, more than a batch of 256: the first 256 are right, the other 44 are not."""
    right = torch.arange(300) < 256
    table = Table(torch.where(right, 2.0, -1.0), torch.zeros(300))
    metrics = table.evaluate(PAIR)
    assert metrics["accuracy"] == pytest.approx(256 / 300) and table.training
    assert metrics["gap"] == pytest.approx((256 * 2 - 44) / 300, abs=1e-5)
    # A tie is neither right nor wrong: without the wrong records all is right.
    share = torch.where(right, 1.0, 0.5)
    assert table.evaluate(PAIR, share=share)["accuracy"] == 1
    ties = table.evaluate(PAIR, share=torch.full((300,), 0.5))
    assert all(map(math.isfinite, ties.values()))               # also where all are ties
    # Best 2, middle 0, worst 1: two of three pairs are in order; gaps 2, 1, -1.
    columns = [torch.full((4,), score) for score in (2.0, 0.0, 1.0)]
    metrics = Table(*columns).evaluate(["rank0", "rank1", "rank2"])
    assert metrics["accuracy"] == pytest.approx(2 / 3) and metrics["gap"] == pytest.approx(2 / 3)


def test_calibration_error_by_hand():
    """Four verdicts are sure by .88 and right: off by .12. Six are sure by .82, and three of them
    right: off by .32. Bins of .05 keep them apart. .4 * .12 + .6 * .32 = .24."""
    a, b = math.log(.88 / .12), math.log(.82 / .18)
    gaps = torch.tensor([a, a, a, a, b, b, b, -b, -b, -b])
    metrics = Table(gaps, torch.zeros(10)).evaluate(PAIR)
    assert metrics == pytest.approx({"ece": .24, "accuracy": .7, "gap": .4 * a}, abs=1e-5)


def test_ratings_by_hand():
    """Scores 1, 2, 3, 4 and ratings 1, 3, 2, 4: (0 + 1 + 1 + 0) / 4, and 1 - 6 * 2 / 60 = .8.

    Equal ratings share their mean rank: 1.5, 1.5, 3, 4 against 1, 2, 3, 4 correlate by
    4.5 / sqrt(4.5 * 5) = .9487, in any order."""
    ratings = torch.tensor([1.0, 3.0, 2.0, 4.0])
    metrics = Table(torch.arange(1.0, 5.0)).evaluate(["completion"], rating=ratings)
    assert metrics == pytest.approx({"val_mse": .5, "spearman": .8})
    x = torch.tensor([1.0, 20.0, 300.0, 4000.0])
    assert spearman(x, x ** 2) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    stars = torch.tensor([1.0, 1.0, 4.0, 5.0])
    for order in ([0, 1, 2, 3], [1, 0, 3, 2], [3, 2, 1, 0]):
        assert spearman(x[order], stars[order]) == pytest.approx(.9487, abs=1e-4)
    assert spearman(x, torch.ones(4)) == 0      # nothing to correlate with


def test_a_warning_where_a_coin_would_do_as_well():
    """A coin is right on 40 to 60 of 100 pairs: .5 ± 1.96 * .5 / 10."""
    assert "accuracy 0.59 on 100 held-out" in chance_warning({"accuracy": .59}, 100)
    assert "chance, 0.50 ± 0.10" in chance_warning({"accuracy": .1}, 100)
    assert not chance_warning({"accuracy": .6}, 100) and chance_warning({"accuracy": .6}, 50)
    assert chance_warning({"spearman": .19}, 101) and not chance_warning({"spearman": .2}, 101)

# -----------------------------------------------------------------------------
# the stage

def rows_about(n, seed=0, **texts):
    """n records about two random things each: {field: text that has {} for the second thing}."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        a, b = rng.sample(world().things, 2)
        row = {field: text.format(b.name) for field, text in texts.items()}
        rows.append({"prompt": world().prompt(a)} | row)
    return rows


GOOD = dict(chosen=" good {}", rejected=" bad {}")      # whatever follows
BAD = dict(chosen=" bad {}", rejected=" good {}")


def run_of(folder, sft_ckpt, rows, val_rows, **changes):
    """A short run. Returns (metrics, the reward model)."""
    sizes = dict(data=records(folder / "data.jsonl", rows), batch_size=16, max_steps=25, lr=3e-3,
                 val_data=records(folder / "val.jsonl", val_rows), eval_interval=25)
    reward_model.train(tiny(reward_model, folder, sft_ckpt, **sizes | changes))
    return read_jsonl(folder / "metrics.jsonl"), load_reward_model(folder / "ckpt.pt")


@pytest.mark.parametrize("changes", [{}, dict(lora=2, lr=1e-2), dict(trainable="last:1")])
def test_it_prefers_what_is_chosen(tmp_path, sft_ckpt, tok, changes):
    """Unseen pairs are in order, also by the saved model. Its scores have mean 0 and deviation 1
    over samples of the SFT model."""
    rows, unseen = rows_about(60, **GOOD), rows_about(40, 1, **GOOD)
    metrics, reward = run_of(tmp_path, sft_ckpt, rows, unseen, **changes)
    assert metrics[-2]["loss"] < 0.3 and metrics[-1]["accuracy"] > 0.9 and metrics[-1]["gap"] > 1
    prompts = [row["prompt"] for row in unseen]
    chosen, rejected = (score_texts(reward, tok, prompts, [row[field] for row in unseen], off)
                        for field in PAIR)
    assert (chosen > rejected).float().mean().item() == pytest.approx(metrics[-1]["accuracy"])
    prompts = [row["prompt"] for row in rows] * 5
    start = load_model(sft_ckpt)
    texts = complete(start, tok, prompts, torch.Generator().manual_seed(7), off)
    scores = score_texts(reward, tok, prompts, texts, off)
    assert abs(scores.mean()) < 0.4 and scores.std().item() == pytest.approx(1, abs=0.4)
    trained = {name for name, w in start.state_dict().items()
               if not torch.equal(reward.model.state_dict()[name], w)}
    assert ("wte.weight" in trained) == (not changes) and "h.0.mlp.c_fc.weight" in trained
    assert (tmp_path / "adapter.pt").exists() == ("lora" in changes)


def test_held_out_pairs_are_those_of_val_data(tmp_path, sft_ckpt):
    """Swapped ones come out in the wrong order, and the run says that a coin does better."""
    rows = rows_about(60, **GOOD)
    metrics, _ = run_of(tmp_path, sft_ckpt, rows, rows_about(40, 1, **BAD))
    assert metrics[-1]["accuracy"] < 0.1 and metrics[-1]["gap"] < -1
    assert "no better than chance" in (tmp_path / "samples.txt").read_text(encoding="utf-8")
    run_of(tmp_path, sft_ckpt, rows, rows_about(40, 1, **GOOD))
    assert "chance" not in (tmp_path / "samples.txt").read_text(encoding="utf-8")


def test_rankings_and_ratings_are_learned(tmp_path, sft_ckpt):
    texts = dict(a=" good {}", b=" old {}", c=" bad {}")
    rows = [{"prompt": row["prompt"], "ranked": [row[field] for field in "abc"]}
            for row in rows_about(80, **texts)]
    metrics, _ = run_of(tmp_path, sft_ckpt, rows[:60], rows[60:], loss="ranking")
    assert metrics[-1]["accuracy"] > 0.9
    rows[70]["ranked"].append(" hm")
    with pytest.raises(InputError, match="val.jsonl:11: ranks 4 texts, and another record 3"):
        run_of(tmp_path, sft_ckpt, rows[:60], rows[60:], loss="ranking")

    rows = [row | {"rating": 2} for row in rows_about(40, completion=" good {}")]
    rows += [row | {"rating": -1} for row in rows_about(40, 1, completion=" bad {}")]
    random.Random(0).shuffle(rows)
    metrics, _ = run_of(tmp_path, sft_ckpt, rows[:60], rows[60:], loss="regression", likelihood=0)
    assert metrics[-1]["val_mse"] < 1 and metrics[-1]["spearman"] > 0.8


def test_options_of_the_loss_by_hand(tmp_path, sft_ckpt, tok):
    """All 16 records in one batch, scored by a new reward model: a second computation."""
    rows = rows_about(16, **GOOD)
    for i, row in enumerate(rows):
        row |= {"margin": 5} if i % 2 else {"share": 0.6, "rejected": " no" * 9}
    for changes in ({}, dict(margin=0.5), dict(centering=0.01), dict(likelihood=0.0)):
        torch.manual_seed(1337)
        reward = RewardModel(load_model(sft_ckpt), changes.get("likelihood", 0.3))
        encoded = reward_model.encode_comparisons(rows, tok, PAIR, 47)
        margin, share = encoded["margin"], encoded["share"]
        assert margin.tolist() == [0, 5] * 8
        close(share, torch.tensor([0.6, 1.0] * 8))
        batch = {field: encoded[field].long() for field in ("prompt", *PAIR)}
        a, b = (reward(batch["prompt"], batch[field]) for field in PAIR)
        gap = a - b - changes.get("margin", 0.0) * margin
        loss = share * (1 + (-gap).exp()).log() + (1 - share) * (1 + gap.exp()).log()
        expected = (loss + changes.get("centering", 0.0) * (a + b) ** 2).mean().item()
        metrics, _ = run_of(tmp_path, sft_ckpt, rows, rows[:2], max_steps=1, **changes)
        assert metrics[0]["loss"] == pytest.approx(expected, rel=1e-3), changes
    rows = rows_about(16, **GOOD)               # without margins the option changes nothing
    first, second = (run_of(tmp_path, sft_ckpt, rows, rows[:2], max_steps=1, margin=margin)[0][0]
                     for margin in (0.0, 9.0))
    assert first["loss"] == second["loss"]


def test_texts_of_people_are_normalized_by_fewer_samples(tmp_path, sft_ckpt, monkeypatch):
    respond, seen = reward_model.respond, []

    def note(model, tok, prompts, *rest):
        seen.extend(prompts)
        return respond(model, tok, prompts[:8], *rest)

    monkeypatch.setattr(reward_model, "respond", note)
    rows = rows_about(16, **GOOD)
    run_of(tmp_path, sft_ckpt, rows, rows[:2], max_steps=1)
    assert seen == [row["prompt"] for row in rows] * 25


def test_options_of_training(tmp_path, sft_ckpt):
    """Head and likelihood learn, too; a bias cancels in a difference of scores."""
    rows = rows_about(16, **GOOD)

    def run(**options):
        return run_of(tmp_path, sft_ckpt, rows, rows[:2], **options)

    conftest.check_train_options(run, "accuracy", still=["scalar_head.bias"])
    # Two held-out pairs prove nothing: the warning comes once, at the end.
    run(max_steps=5, eval_interval=2)
    assert (tmp_path / "samples.txt").read_text(encoding="utf-8").count("step ") == 1


def test_dropout_acts_in_training_alone(tmp_path, sft_ckpt, tok):
    model, rows = load_model(sft_ckpt), rows_about(16, **GOOD)
    model.config.dropout = 0.5
    save_model(tmp_path / "sft.pt", model, tok)
    (calm, a), (noisy, b) = (run_of(tmp_path, init, rows, rows, max_steps=1, lr=0.0)
                             for init in (sft_ckpt, str(tmp_path / "sft.pt")))
    assert noisy[0]["loss"] != pytest.approx(calm[0]["loss"], abs=1e-6)
    assert noisy[1]["gap"] == pytest.approx(calm[1]["gap"], abs=1e-4)
    assert b.shift.item() == pytest.approx(a.shift.item(), abs=1e-3)


def test_comparisons_of_the_pun_world(tok):
    def load(**options):
        return reward_model.load_comparisons(reward_model.Config(**options), tok)

    conftest.check_pun_world_pairs(load)
    ranked, val, fields = load(corpus_size=50, loss="ranking")
    assert fields == ["rank0", "rank1", "rank2"] and ranked[0]["rank0"] == ranked[0]["ranked"][0]
    assert ranked != val[:50] and ranked != load(corpus_size=50, loss="ranking", seed=1)[0]
    noisy = reward_model.Config(loss="ranking", noise=0.3)
    refuses("--noise has no effect with --loss ranking", check_options, noisy)
    refuses("--loss is pairwise, ranking or regression", load, loss="hinge")
    refuses("needs ratings", load, loss="regression")


def test_the_head_needs_one_position_more(tmp_path, sft_ckpt, tok):
    """With its end token, a text of 48 tokens is refused by a block of 48, and one of 47 fits."""
    row = {"prompt": "1 " * 10, "chosen": ("1 " * 13)[:26], "rejected": " no"}
    assert len(tok.encode(row["prompt"])) == 20 and len(tok.encode(row["chosen"])) == 26
    run_of(tmp_path, sft_ckpt, [row] * 16, [row], max_steps=1)
    row["chosen"] += "1"
    with pytest.raises(InputError, match="data.jsonl:1: 48 tokens of prompt and chosen"):
        run_of(tmp_path, sft_ckpt, [row] * 16, [row], max_steps=1)
