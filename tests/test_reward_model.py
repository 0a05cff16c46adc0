"""The reward model: Bradley-Terry by hand, where the score is read, calibration, and that it learns."""

import json
import math

import pytest
import torch
from conftest import CPU, END, PAD, awake, ids, off, toy

import reward_model
from common import InputError, read_jsonl
from data import Batches, write
from model import Scorer, load_model, save_model
from optim import adamw, optimizer_step
from puns import world
from reward_model import evaluate, ranking_loss, regression_loss, score_all, score_texts, spearman


def gap(x, **options):
    return ranking_loss(torch.tensor([[x, 0.0]]), **options).item()

# -----------------------------------------------------------------------------
# the losses

def test_bradley_terry_by_hand():
    """-log sigmoid(1.5) = log(1 + e^-1.5) = .20141; with a margin of 1 it is that of a gap of .5."""
    assert gap(1.5) == pytest.approx(.20141, abs=1e-5)
    assert gap(1.5, margin=1.0) == pytest.approx(.47408, abs=1e-5)
    assert gap(0.0) == pytest.approx(math.log(2))
    # centering 0.01 of (r_c + r_r)^2 = 1.5^2: + .0225
    assert gap(1.5, centering=0.01) == pytest.approx(.20141 + .0225, abs=1e-5)
    a = ranking_loss(torch.tensor([[1.5, 0.0], [0.0, 0.0]]), margin=torch.tensor([1.0, 0.0]))    # a margin for each record
    assert a.item() == pytest.approx((.47408 + math.log(2)) / 2, abs=1e-5)


def test_soft_labels_by_hand():
    """Four of five raters agree: .8 * .20141 + .2 * (.20141 + 1.5) = .50141. A tie is least where both are equal, and pulls them there."""
    assert gap(1.5, share=0.8) == pytest.approx(.20141 + .2 * 1.5, abs=1e-5)
    mixed = ranking_loss(torch.tensor([[1.5, 0.0], [1.5, 0.0]]), share=torch.tensor([1.0, 0.5]))
    assert mixed.item() == pytest.approx((.20141 + .20141 + .75) / 2, abs=1e-5)
    scores = torch.tensor([[2.0, -1.0]], requires_grad=True)
    ranking_loss(scores, share=0.5).backward()
    assert scores.grad[0, 0] > 0 > scores.grad[0, 1]
    assert gap(0.0, share=0.5) == pytest.approx(math.log(2)) and gap(0.1, share=0.5) > gap(0.0, share=0.5)


def test_a_ranking_of_three_is_the_mean_of_its_three_pairs():
    scores = torch.tensor([[1.0, .2, -.5], [0.0, 2.0, .3]])
    pairs = [ranking_loss(scores[:, [i, j]]) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(ranking_loss(scores), sum(pairs) / 3)
    margin = torch.tensor([.5, 1.0])
    pairs = [ranking_loss(scores[:, [i, j]], margin) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(ranking_loss(scores, margin), sum(pairs) / 3)


@pytest.mark.parametrize("dtype, far", [(torch.float32, 200.0), (torch.float16, 50.0), (torch.bfloat16, 50.0)])
def test_finite_where_the_gap_is_large(dtype, far):
    """log(sigmoid(x)) is -inf from x = -88.8 on, in fp16 from -18, and its gradient NaN: logsigmoid is not."""
    for x in (far, -far):
        scores = torch.tensor([[x, 0.0]], dtype=dtype, requires_grad=True)
        loss = ranking_loss(scores)
        loss.backward()
        assert loss.isfinite() and scores.grad.isfinite().all()
        assert loss.item() == pytest.approx(max(0.0, -x), abs=1e-3)
        assert scores.grad[0, 0].item() == pytest.approx(0.0 if x > 0 else -1.0, abs=1e-3)


def test_regression_loss():
    assert regression_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])).item() == 2.5       # (1 + 4) / 2
    with pytest.raises(AssertionError):
        regression_loss(torch.zeros(4), torch.zeros(4, 1))

# -----------------------------------------------------------------------------
# the score

PROMPT, RESPONSE = ids([PAD, 1, 2], [3, 4, 5]), ids([6, 7, END, PAD, PAD], [8, END, PAD, PAD, PAD])


def scorer_of(seed=0):
    torch.manual_seed(seed)
    return Scorer(awake(toy(seed))).eval()


def test_padding_changes_no_score():
    """The same two texts alone and together, with more pads on both sides."""
    scorer = scorer_of()
    scores = scorer(PROMPT, RESPONSE)
    assert scores.shape == (2,)
    alone = torch.cat([scorer(ids([1, 2]), ids([6, 7, END])), scorer(ids([3, 4, 5]), ids([8, END]))])
    wide = scorer(torch.cat([torch.full((2, 3), PAD), PROMPT], 1), torch.cat([RESPONSE, torch.full((2, 4), PAD)], 1))
    for other in (alone, wide):
        torch.testing.assert_close(other, scores, atol=1e-5, rtol=0)
    batch = {"prompt": PROMPT, "chosen": RESPONSE[:, :3], "rejected": RESPONSE}          # of different widths
    torch.testing.assert_close(score_all(scorer, batch, ["chosen", "rejected"]), torch.stack([scores, scores], 1), atol=1e-5, rtol=0)


def test_what_is_embedded_in_a_pad_changes_no_score():
    """Pads are looked up as token 0 and masked: another row there, another score nowhere (no text here holds token 0)."""
    scorer = scorer_of()
    before = scorer(PROMPT, RESPONSE)
    with torch.no_grad():
        scorer.model.wte.weight[0] += 5
    torch.testing.assert_close(scorer(PROMPT, RESPONSE), before, atol=1e-5, rtol=0)


def test_the_score_is_read_from_the_state_that_has_read_the_end_token():
    scorer = scorer_of()
    states = scorer.model.trunk(ids([1, 2, 6, 7, END]))
    torch.testing.assert_close(scorer(PROMPT[:1], RESPONSE[:1]), scorer.scalar(states[:, -1])[:, 0], atol=1e-5, rtol=0)
    assert (scorer(ids([1, 2]), ids([6, 7, 9])) - scorer(ids([1, 2]), ids([6, 7, END]))).abs() > 1e-3      # its last token counts
    assert (scorer(ids([1, 3]), ids([6, 7, END])) - scorer(ids([1, 2]), ids([6, 7, END]))).abs() > 1e-3    # and so does the prompt


def test_the_likelihood_of_the_text_counts_and_its_weight_is_learned(tmp_path):
    """A second implementation: the scalar head, and 0.3 times the sum of the log-softmax at each token; pads add nothing; saved and loaded."""
    plain, scorer = scorer_of(), Scorer(awake(toy()), likelihood=0.3)
    scorer.scalar.load_state_dict(plain.scalar.state_dict())
    logp = scorer.model.logits(PROMPT, RESPONSE).log_softmax(-1)
    sums = [sum(logp[i, t, token].item() for t, token in enumerate(row) if token != PAD) for i, row in enumerate(RESPONSE.tolist())]
    torch.testing.assert_close(scorer(PROMPT, RESPONSE) - plain(PROMPT, RESPONSE), 0.3 * torch.tensor(sums), atol=1e-4, rtol=0)
    ranking_loss(scorer(PROMPT, RESPONSE)[None]).backward()
    assert scorer.likelihood.grad.abs() > 0
    save_model(tmp_path / "ckpt.pt", scorer)
    assert torch.equal(load_model(tmp_path / "ckpt.pt")(PROMPT, RESPONSE), scorer(PROMPT, RESPONSE))


def test_two_calls_agree_and_the_head_learns():
    scorer = scorer_of()
    assert torch.equal(scorer(PROMPT, RESPONSE), scorer(PROMPT, RESPONSE))
    ranking_loss(scorer(PROMPT, RESPONSE)[None]).backward()
    assert scorer.scalar.weight.grad.abs().sum() > 0 and all(p.grad is not None for p in scorer.model.parameters())


def test_a_new_head_is_random_and_small():
    """N(0, 1 / (d + 1)) for a width d of 512; bias 0."""
    torch.manual_seed(0)
    model = toy(n_embd=512)
    scorer = Scorer(model)
    assert scorer.scalar.weight.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.15) and scorer.scalar.bias.item() == 0


def test_normalize():
    """Scores of mean 3 and std 2 become mean 0 and std 1, the order stays; a second time on the new scores changes nothing."""
    scorer = scorer_of()
    response = torch.randint(0, END, (64, 5), generator=torch.Generator().manual_seed(0))
    prompt = torch.ones(64, 2, dtype=torch.long)
    with torch.no_grad():
        raw = scorer(prompt, response)
        for _ in range(2):
            scorer.normalize(scorer(prompt, response))
            now = scorer(prompt, response)
            assert now.mean().abs() < 1e-5 and now.std(correction=0).item() == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(now, (raw - raw.mean()) / raw.std(correction=0), atol=1e-4, rtol=0)
    scorer.normalize(torch.full((9,), 5.0))      # all alike: no division by zero
    assert scorer.gain.isfinite() and scorer.shift.isfinite()


def test_score_texts_gives_the_scores_of_token_ids(tiny, tok):
    scorer = Scorer(tiny).eval()
    prompts, texts = ["About a banker:"] * 3, [" no", " I lost interest.", " yes, it did"]
    scores = score_texts(scorer, tok, prompts, texts, off)
    for i in range(3):
        one = scorer(ids(tok.encode(prompts[i])), ids(tok.encode(texts[i]) + [tok.end_id]))
        assert scores[i].item() == pytest.approx(one.item(), abs=1e-5)

# -----------------------------------------------------------------------------
# evaluation

class Fixed(torch.nn.Module):
    """A scorer whose scores stand in the prompts: the prompt's token is the index into a table, chosen and rejected are told by their token."""

    def __init__(self, table):
        super().__init__()
        self.table, self.model = table, toy()

    def forward(self, prompt, response):
        return self.table[prompt[:, -1], (response[:, 0] == 9).long()]


def comparisons(n):
    return Batches({"prompt": torch.arange(n)[:, None], "chosen": torch.full((n, 1), 8), "rejected": torch.full((n, 1), 9)}, 1, 10_000, "cpu", 0)


def test_evaluate_is_the_mean_over_all_records():
    """300 records, which is more than one batch of 256: the first 256 are right, the other 44 are wrong, accuracy 256/300 and not 0 or .5."""
    right = torch.arange(300) < 256
    table = torch.stack([torch.where(right, 2.0, -1.0), torch.zeros(300)], 1)
    metrics = evaluate(Fixed(table), comparisons(300), ["chosen", "rejected"], off)
    assert metrics["accuracy"] == pytest.approx(256 / 300)
    assert metrics["gap"] == pytest.approx((256 * 2 - 44) / 300, abs=1e-5)


def test_calibration_error_by_hand():
    """Four verdicts that are sure by .8 (gap ln 4), three of them right: off by |.8 - .75|. Six by .6 (gap ln 1.5), three right: off by .1.
    Weighted: .4 * .05 + .6 * .1 = .08."""
    sure, half = math.log(4), math.log(1.5)
    gaps = torch.tensor([sure, sure, sure, -sure, half, half, half, -half, -half, -half])
    metrics = evaluate(Fixed(torch.stack([gaps, torch.zeros(10)], 1)), comparisons(10), ["chosen", "rejected"], off)
    assert metrics["ece"] == pytest.approx(.08, abs=1e-5) and metrics["accuracy"] == pytest.approx(.6)


def test_evaluate_of_three_ranks_counts_all_pairs():
    """best 2, middle 0, worst 1: two of three pairs in order."""
    class Three(Fixed):
        def forward(self, prompt, response):
            return torch.tensor([2.0, 0.0, 1.0])[response[:, 0]]
    batches = Batches({"prompt": torch.ones(4, 1)} | {f"rank{k}": torch.full((4, 1), k) for k in range(3)}, 1, 10_000, "cpu", 0)
    assert evaluate(Three(None), batches, ["rank0", "rank1", "rank2"], off)["accuracy"] == pytest.approx(2 / 3)


def test_spearman():
    """1 - 6 sum d^2 / (n (n^2 - 1)): ranks 1 2 3 4 against 1 3 2 4 have d^2 = 2, so 1 - 12/60 = .8."""
    x = torch.tensor([1.0, 20.0, 300.0, 4000.0])
    assert spearman(x, x ** 2) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(.8)


def test_spearman_of_tied_ratings():
    """Stars tie. Equal ratings share their mean rank: 1.5 1.5 3.5 3.5 against 1 2 3 4 correlate by 4 / sqrt(5 * 4) = .8944, in any order."""
    scores, stars = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 1.0, 5.0, 5.0])
    for order in ([0, 1, 2, 3], [1, 0, 3, 2], [3, 2, 1, 0]):
        assert spearman(scores[order], stars[order]) == pytest.approx(.8944, abs=1e-4)
    assert spearman(scores, torch.ones(4)) == 0       # nothing to correlate with

# -----------------------------------------------------------------------------
# learning

def test_it_learns_to_prefer_a_token():
    """Texts with a 3 over texts without: over nine of ten unseen pairs in the right order after forty steps."""
    scorer, generator = Scorer(toy()), torch.Generator().manual_seed(0)

    def batch(n):
        texts = torch.randint(4, END, (2, n, 5), generator=generator)
        texts[0, torch.arange(n), torch.randint(5, (n,), generator=generator)] = 3
        return {"prompt": torch.ones(n, 2, dtype=torch.long), "chosen": texts[0], "rejected": texts[1]}

    first = ranking_loss(score_all(scorer, batch(256), ["chosen", "rejected"])).item()
    assert first == pytest.approx(math.log(2), abs=0.15)
    optimizer = adamw(scorer, 5e-3)
    for _ in range(40):
        optimizer_step(ranking_loss(score_all(scorer, batch(32), ["chosen", "rejected"])), scorer, optimizer, 1.0)
    scores = score_all(scorer, batch(256), ["chosen", "rejected"])
    assert (scores[:, 0] > scores[:, 1]).float().mean() > 0.9


def config(out, init, **changes):
    return reward_model.Config(out_dir=str(out), init=init, **(dict(corpus_size=200, batch_size=8, max_steps=3, eval_interval=3, log_interval=1,
                                                                   warmup_steps=1, **CPU) | changes))


def test_the_stage_writes_scores_of_mean_0_and_deviation_1(tmp_path, sft_ckpt, tok):
    """On what the SFT model writes: other samples than those it was set on, so within a few standard errors."""
    reward_model.train(config(tmp_path, sft_ckpt))
    scorer = load_model(tmp_path / "ckpt.pt")
    prompts = [record["prompt"] for record in world().preferences(200, 1337)] * 2
    texts = write(load_model(sft_ckpt), tok, prompts, torch.Generator().manual_seed(7), off)
    scores = score_texts(scorer, tok, prompts, texts, off)
    assert scores.mean().abs() < 0.25 and scores.std().item() == pytest.approx(1, abs=0.25)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_ratings_and_margins_from_a_file(tmp_path, sft_ckpt):
    ratings = [{"prompt": "About a banker:", "completion": f" {'no ' * (i % 3)}yes", "rating": i % 3} for i in range(40)]
    out = tmp_path / "rating"
    reward_model.train(config(out, sft_ckpt, loss="regression", data=write_jsonl(tmp_path / "r.jsonl", ratings)))
    assert {"val_mse", "spearman"} <= set(read_jsonl(out / "metrics.jsonl")[-1])
    # a margin of 5 in a record that only some have: with its weight the first loss is that much larger
    pairs = [{"prompt": "About a banker:", "chosen": " yes", "rejected": " no"} | ({"margin": 5} if i % 2 else {}) for i in range(20)]
    first = {}
    for weight in (0.0, 1.0):
        out = tmp_path / f"margin{weight}"
        reward_model.train(config(out, sft_ckpt, margin=weight, data=write_jsonl(tmp_path / "m.jsonl", pairs)))
        first[weight] = read_jsonl(out / "metrics.jsonl")[0]["loss"]
    assert first[1.0] > first[0.0] + 0.5


def test_what_cannot_be_learned_from_is_refused(tmp_path, sft_ckpt):
    with pytest.raises(InputError, match="--loss is pairwise, ranking or regression"):
        reward_model.train(config(tmp_path, sft_ckpt, loss="hinge"))
    with pytest.raises(InputError, match="needs ratings"):
        reward_model.train(config(tmp_path, sft_ckpt, loss="regression"))
