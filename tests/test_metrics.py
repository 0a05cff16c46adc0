"""Pun metrics without a judge, by hand."""

import math

import pytest

from real import metrics
from real.metrics import ambiguity, auc, distinctiveness, posterior, surprise

MEANINGS = ["hare", "hair"]
WORDS = ["magician", "pulled"]
P = {"hare": 0.01, "hair": 0.03, "magician": 0.1, "pulled": 0.2}.get
GIVEN = {("magician", "hare"): 0.5, ("magician", "hair"): 0.1,
         ("pulled", "hare"): 0.2, ("pulled", "hair"): 0.6}


def given(w, m):
    return GIVEN[w, m]


def test_posterior_by_hand():
    # hare: .25 * (.5 + .1)/2 * (.2 + .2)/2 = .015
    # hair: .75 * (.1 + .1)/2 * (.6 + .2)/2 = .03
    assert posterior(WORDS, MEANINGS, P, given) == pytest.approx([1 / 3, 2 / 3])
    assert posterior([], MEANINGS, P, given) == pytest.approx([0.25, 0.75])
    with pytest.raises(ValueError):
        posterior(WORDS, ["hare", "hare"], P, given)


def test_posterior_sums_over_all_focus_vectors():
    weights = []
    for m, prior in (("hare", 0.25), ("hair", 0.75)):
        weight = 0.0
        for f in (0, 1):
            for g in (0, 1):
                first = given(WORDS[0], m) * 0.3 if f else P(WORDS[0]) * 0.7
                second = given(WORDS[1], m) * 0.3 if g else P(WORDS[1]) * 0.7
                weight += prior * first * second
        weights.append(weight)
    expected = [weight / sum(weights) for weight in weights]
    assert posterior(WORDS, MEANINGS, P, given, p_focus=0.3) == pytest.approx(expected)


def test_a_long_text_does_not_underflow():
    assert sum(posterior(["magician"] * 5000, MEANINGS, P, given)) == pytest.approx(1)
    assert ambiguity(["magician"] * 5000, MEANINGS, P, given) == pytest.approx(0, abs=1e-9)


def test_ambiguity_by_hand():
    # H(1/3, 2/3) = log 3 - 2/3 log 2
    expected = math.log(3) - 2 / 3 * math.log(2)
    assert ambiguity(WORDS, MEANINGS, P, given) == pytest.approx(expected)


def test_distinctiveness_by_hand():
    # magician: q = .5/.6 = 5/6, r = .1/.2 = 1/2: (5/6 - 1/2) (log 5 - log 1) = log(5) / 3
    # pulled:   q = .2/.4 = 1/2, r = .6/.8 = 3/4: (1/2 - 3/4) (log 1 - log 3) = log(3) / 4
    expected = math.log(5) / 3 + math.log(3) / 4
    assert distinctiveness(WORDS, MEANINGS, P, given) == pytest.approx(expected)


def test_distinctiveness_is_the_kl_of_the_joint_focus():
    def joint(m):       # P(f | m, w) of both words together
        on = [given(w, m) / (given(w, m) + P(w)) for w in WORDS]
        return [(on[0] if f else 1 - on[0]) * (on[1] if g else 1 - on[1])
                for f in (0, 1) for g in (0, 1)]

    both = sum((x - y) * math.log(x / y)
               for x, y in zip(joint("hare"), joint("hair"), strict=True))
    assert distinctiveness(WORDS, MEANINGS, P, given) == pytest.approx(both)


def test_cooccurrence_by_hand():
    texts = ["The baker kneads dough.", "A baker needs money!", "dough"]
    p, p_given = metrics.cooccurrence(texts, k=2)
    # Texts with baker 2, dough 2, kneads 1, needs 1, money 1: total 7 + 5 words + 1 = 13
    assert p("baker") == pytest.approx(3 / 13)
    assert p("money") == pytest.approx(2 / 13)
    assert p("unheard") == pytest.approx(1 / 13)
    # Beside baker stand kneads, dough, needs, money: (1 + 2 * 3/13) / (4 + 2)
    assert p_given("dough", "baker") == pytest.approx((1 + 2 * 3 / 13) / 6)
    words = ("baker", "dough", "kneads", "needs", "money", "unheard")
    assert sum(p_given(w, "baker") for w in words) == pytest.approx(1)
    assert metrics.content_words("I'm the baker's 2nd.") == ["baker", "nd"]


def test_surprise_by_hand():
    logprob = {"I have dyed a little": -14.0, "I have died a little": -8.0,
               "I have dyed a little inside": -24.0,
               "I have died a little inside": -20.0}.__getitem__
    words = "I have dyed a little inside".split()
    # -8 + 14, -20 + 24, 6 / 4
    assert surprise(words, 2, "died", logprob) == pytest.approx((6.0, 4.0, 1.5))


@pytest.mark.parametrize("nearby, whole", [(-1.0, 2.0), (1.0, -2.0), (-1.0, -2.0), (1.0, 0.0)])
def test_the_ratio_needs_both_surprises(nearby, whole):
    logprob = {"b x c": 0.0, "b y c": nearby, "a b x c d": 0.0, "a b y c d": whole}.get
    assert surprise("a b x c d".split(), 2, "y", logprob, window=1) == (nearby, whole, -1.0)
    assert surprise("a b".split(), 0, "a", lambda text: -len(text)) == (0, 0, -1)


def test_auc_by_hand():
    assert auc([3, 1], [2, 0]) == 0.75      # 3 > 2, 3 > 0, 1 > 0, not 1 > 2
    assert auc([1, 1], [1]) == 0.5
    positives, negatives = [0.1, 0.4, 0.4, 0.9], [0.4, 0.2, 0.9]
    wins = sum((a > b) + (a == b) / 2 for a in positives for b in negatives)
    assert auc(positives, negatives) == pytest.approx(wins / 12)
    with pytest.raises(ValueError):
        auc([], [1])
