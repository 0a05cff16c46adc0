"""
Pun metrics without a judge: how ambiguous is a text, how distinct is the support of its two
meanings, and how surprising is its pun word?

    ambiguity, distinctiveness    Kao, Levy, Goodman 2016, "A computational model of linguistic
                                  humor in puns", section 2, https://doi.org/10.1111/cogs.12269
    surprise                      He, Peng, Liang 2019, "Pun generation with surprise", section 2,
                                  https://arxiv.org/abs/1904.06828, with any language model

Both need two different meaning words, so they are for heterographic puns (knead, need) only.

In Kao et al. each content word w_i of a text comes either from the meaning m (its focus f_i is 1)
or from noise (f_i is 0), so that

    P(m, f | w)  ~  P(m) prod_i P(w_i | m, f_i) P(f_i),  P(w | m, 1) = p(w | m),  P(w | m, 0) = p(w)
    P(m | w)     ~  P(m) prod_i [P(1) p(w_i | m) + P(0) p(w_i)]                 with f summed out

Everywhere below, p(w) and p_given(w, m) are functions, such as those of cooccurrence().
"""

import collections
import itertools
import math
import re

import torch

from common import Options, setup
from data import encode_records, tokenizer_of
from model import load_model, logprobs
from real.semeval import PROMPT

STOP_WORDS = frozenset("""
a an the and or but if so as at by for from in into of off on out over to up with than then that
this these those i me my you your he him his she her it its we us our they them their who what
which when where why how is are was were be been am do does did have has had not no never just only
will would can could should there here s t m d re ve ll said
""".split())


def content_words(text):
    """The words that can support a meaning, in lower case, each as often as it occurs."""
    return [word for word in re.findall(r"[^\W\d_]+", text.lower()) if word not in STOP_WORDS]


def cooccurrence(texts, k=1.0):
    """(p, p_given), estimated from how often words stand in one text:

        p(w)        = (n(w) + 1) / (sum_v n(v) + V + 1)
        p_given(w, m) = (n(w, m) + k p(w)) / (sum_v n(v, m) + k)

    n counts texts, v runs over the V words. k is how many texts of noise are imagined beside each
    m. A word that never occurred counts as one more."""
    single, pairs, beside = collections.Counter(), collections.Counter(), collections.Counter()
    for text in texts:
        words = sorted(set(content_words(text)))
        single.update(words)
        pairs.update(itertools.permutations(words, 2))
        for word in words:
            beside[word] += len(words) - 1
    total = sum(single.values()) + len(single) + 1

    def p(w):
        return (single[w] + 1) / total

    def p_given(w, m):
        return (pairs[w, m] + k * p(w)) / (beside[m] + k)

    return p, p_given

# -----------------------------------------------------------------------------
# two meanings

def posterior(words, meanings, p, p_given, p_focus=0.5):
    """P(m | w) of each meaning, a list that sums to 1. The prior P(m) is p(m), normalized.

    Raises ValueError unless there are two different meanings or more."""
    if len(set(meanings)) < len(meanings) or len(meanings) < 2:
        raise ValueError(f"needs different meaning words, not {meanings}")
    logs = []                   # log P(m) + sum_i log [P(1) p(w_i | m) + P(0) p(w_i)]
    for m in meanings:
        log = math.log(p(m))
        for w in words:
            log += math.log(p_focus * p_given(w, m) + (1 - p_focus) * p(w))
        logs.append(log)
    # The largest becomes exp(0), so that a long text does not underflow.
    weights = [math.exp(log - max(logs)) for log in logs]
    return [weight / sum(weights) for weight in weights]


def ambiguity(words, meanings, p, p_given, p_focus=0.5):
    """The entropy of P(m | w) in nats: 0 if one meaning has it all, log 2 if both are as likely."""
    probabilities = posterior(words, meanings, p, p_given, p_focus)
    return -sum(q * math.log(q) for q in probabilities if q > 0)


def focus(w, m, p, p_given, p_focus=0.5):
    """P(f = 1 | m, w): how likely the word w supports the meaning m."""
    supports = p_focus * p_given(w, m)
    return supports / (supports + (1 - p_focus) * p(w))


def distinctiveness(words, meanings, p, p_given, p_focus=0.5):
    """KL(F_a || F_b) + KL(F_b || F_a) in nats, with F_m = P(f | m, w): do different words support
    the two meanings?

    Given m, the focus of each word is independent of the others, so the divergences are sums."""
    a, b = meanings
    total = 0.0
    for w in words:
        q = focus(w, a, p, p_given, p_focus)
        r = focus(w, b, p, p_given, p_focus)
        # KL(q || r) + KL(r || q) of two coins = (q - r) (logit q - logit r)
        total += (q - r) * (math.log(q / (1 - q)) - math.log(r / (1 - r)))
    return total


def surprise(words, i, alternative, logprob, window=2):
    """(local, global, ratio) surprise of the pun word words[i]. alternative: the word that is
    expected in its place.

        S(c)  = log p(alternative | c) - log p(pun word | c)
              = log p(text with alternative) - log p(text)
        S_local sees `window` words on either side, S_global the whole text
        ratio = S_local / S_global if both are positive, else -1

    logprob(text) is the log-prob of a text under any language model. A good pun surprises nearby,
    where the alternative is the idiom, and less in the whole text, where the pun word has its
    support: its ratio is large."""
    def s(start, end):
        text = " ".join(words[start:end])
        expected = " ".join([*words[start:i], alternative, *words[i + 1:end]])
        return logprob(expected) - logprob(text)

    nearby = s(max(i - window, 0), i + window + 1)
    whole = s(0, len(words))
    ratio = nearby / whole if nearby > 0 and whole > 0 else -1.0
    return nearby, whole, ratio


def auc(positives, negatives):
    """The fraction of (positive, negative) pairs in which the positive has the higher score; a tie
    counts half. Raises ValueError without scores of both classes."""
    if not positives or not negatives:
        raise ValueError("AUC needs scores of both classes")
    of_score = {True: collections.Counter(positives), False: collections.Counter(negatives)}
    wins, n_below = 0.0, 0      # n_below: negatives with a lower score
    for score in sorted({*positives, *negatives}):
        wins += of_score[True][score] * (n_below + of_score[False][score] / 2)
        n_below += of_score[False][score]
    return wins / (len(positives) * len(negatives))

# -----------------------------------------------------------------------------
# are these metrics any good? Puns against non-puns

METRICS = ("ambiguity", "distinctiveness", "local surprise", "global surprise", "surprise ratio")


def sound_alikes(puns):
    """{word: {(the other word, id of the pun)}}, both ways, from the words that people marked."""
    found = collections.defaultdict(set)
    for pun in puns:
        if pun.kind == "heterographic" and pun.alt_word and " " not in pun.alt_word + pun.pun_word:
            found[pun.pun_word.lower()].add((pun.alt_word.lower(), pun.id))
            found[pun.alt_word.lower()].add((pun.pun_word.lower(), pun.id))
    return found


def last_sound_alike(pun, words, alike):
    """(i, other): the last of the words that sounds like another word by what is marked in *other*
    puns; None if there is none. So puns and non-puns are treated alike: nobody has marked a word
    in a text that is no pun."""
    for i in reversed(range(len(words))):
        word = words[i].lower()
        others = [other for other, owner in alike.get(word, ())
                  if owner != pun.id and other != word]
        if others:
            return i, min(others)
    return None


def evaluate(puns, train, test, lm, device=""):
    """{metric: AUC} of the heterographic puns in `test` against the non-puns; NaN without both.

    Co-occurrence is counted in the texts of `train`. lm: a checkpoint that has seen only these.
    puns: all texts, for their sound-alikes; a text without any is left out."""
    device, autocast = setup(Options(device=device))
    model = load_model(lm, device)
    tok = tokenizer_of(model)
    p, p_given = cooccurrence([pun.text for pun in train])
    alike = sound_alikes(puns)

    @torch.no_grad()
    def logprob(text):
        """Of all tokens but the end token."""
        record = {"prompt": PROMPT, "completion": " " + text}
        ids = encode_records([record], tok, list(record), model.config.block_size)
        prompt, response = ids["prompt"].long().to(device), ids["completion"].long().to(device)
        with autocast():
            return logprobs(model, prompt, response)[0, :-1].sum().item()

    rows = {True: [], False: []}        # of puns, of non-puns
    for pun in test:
        words = re.findall(r"\w+(?:'\w+)?", pun.text)
        marked = last_sound_alike(pun, words, alike)
        if marked is None or pun.kind != "heterographic":
            continue
        i, other = marked
        rest = content_words(" ".join(words[:i] + words[i + 1:]))
        meanings = [words[i].lower(), other]
        values = (ambiguity(rest, meanings, p, p_given),
                  distinctiveness(rest, meanings, p, p_given),
                  *surprise(words, i, other, logprob))
        rows[pun.is_pun].append(dict(zip(METRICS, values, strict=True)))
    result = {"puns": len(rows[True]), "non-puns": len(rows[False])}
    for name in METRICS:
        positives, negatives = ([row[name] for row in rows[is_pun]] for is_pun in (True, False))
        result[name] = auc(positives, negatives) if positives and negatives else math.nan
    return result
