"""
Pun metrics that need no judge: how ambiguous a text is, how distinct the support of its two meanings, how surprising its pun word.

    ambiguity, distinctiveness    Kao, Levy, Goodman 2016, "A computational model of linguistic humor in puns", section 2,
                                  doi.org/10.1111/cogs.12269; for two different meaning words
    surprise                      He, Peng, Liang 2019, "Pun generation with surprise", section 2, arxiv.org/abs/1904.06828; with
                                  any language model; for heterographic puns only: with one word for both meanings it is 0

Kao et al. let each content word w of the text come either from the meaning m (its focus f is 1) or from noise (f is 0):

    P(m, f | w)  ~  P(m) prod_i P(w_i | m, f_i) P(f_i)        P(w | m, 1) = p(w | m),  P(w | m, 0) = p(w)
    P(m | w)     ~  P(m) prod_i [P(1) p(w_i | m) + P(0) p(w_i)]                                                  f summed out
"""

import collections
import itertools
import math
import re

STOP_WORDS = frozenset("""
a an the and or but if so as at by for from in into of off on out over to up with than then that this these those i me my you
your he him his she her it its we us our they them their who what which when where why how is are was were be been am do does
did have has had not no never just only will would can could should there here s t m d re ve ll said
""".split())


def content_words(text):
    """The words that can support a meaning: lower case, without stop words, each as often as it occurs."""
    return [word for word in re.findall(r"[^\W\d_]+", text.lower()) if word not in STOP_WORDS]


def cooccurrence(texts, k=1.0):
    """(p, p_given) from how often words stand in one text: p(w) and p(w | m), with k imagined texts of unigram noise beside each m.

        p(w) = (n(w) + 1) / (sum_v n(v) + V + 1)            p(w | m) = (n(w, m) + k p(w)) / (sum_v n(v, m) + k)

    n counts texts, v runs over the V words; a word that never occurred counts as one more."""
    single, pairs, beside = collections.Counter(), collections.Counter(), collections.Counter()
    for text in texts:
        words = sorted(set(content_words(text)))
        single.update(words)
        pairs.update(itertools.permutations(words, 2))
        beside.update({word: len(words) - 1 for word in words})
    total = sum(single.values()) + len(single) + 1

    def p(w):
        return (single[w] + 1) / total

    def p_given(w, m):
        return (pairs[w, m] + k * p(w)) / (beside[m] + k)

    return p, p_given


def posterior(words, meanings, p, p_given, p_focus=0.5):
    """P(m | w) for each of the meanings, as a list; P(m) is p(m), normalized. Underflow-safe.

    Raises ValueError unless there are two different meanings."""
    if len(set(meanings)) != len(meanings) or len(meanings) < 2:
        raise ValueError(f"needs different meaning words, not {meanings}")
    # log P(m) + sum_i log [P(1) p(w_i | m) + P(0) p(w_i)], up to the constant log P(w)
    logs = [math.log(p(m)) + sum(math.log(p_focus * p_given(w, m) + (1 - p_focus) * p(w)) for w in words) for m in meanings]
    scaled = [math.exp(log - max(logs)) for log in logs]
    return [weight / sum(scaled) for weight in scaled]


def ambiguity(words, meanings, p, p_given, p_focus=0.5):
    """The entropy of P(m | w) in nats: 0 if one meaning has it all, log 2 if two are equally likely."""
    return -sum(q * math.log(q) for q in posterior(words, meanings, p, p_given, p_focus) if q > 0)


def distinctiveness(words, meanings, p, p_given, p_focus=0.5):
    """KL(F_a || F_b) + KL(F_b || F_a) in nats, F_m = P(f | m, w): do different words support the two meanings?

    Given m the focus of each word is independent of the others', so that both divergences are sums over the words."""
    a, b = meanings
    total = 0.0
    for w in words:
        q, r = (p_focus * p_given(w, m) / (p_focus * p_given(w, m) + (1 - p_focus) * p(w)) for m in (a, b))    # P(f_i = 1 | m, w_i)
        # KL(q || r) + KL(r || q) of two coins = (q - r) (logit q - logit r)
        total += (q - r) * (math.log(q / (1 - q)) - math.log(r / (1 - r)))
    return total


def surprise(words, i, alternative, logprob, window=2):
    """(local, global, ratio) surprise of the pun word words[i], where `alternative` is the word expected in its place.

        S(c)    = log p(alternative | c) - log p(pun word | c)           = log p(text with alternative) - log p(text)
        S_local   sees `window` words on either side                     S_global sees the whole text
        ratio   = S_local / S_global if both are positive, else -1

    logprob(text) -> float: log-probability of a text under any language model. A good pun surprises nearby (the alternative is the
    idiom) but less so in the whole, where the pun word has its support: a large ratio."""
    def s(start, end):
        swapped = [*words[start:i], alternative, *words[i + 1:end]]
        return logprob(" ".join(swapped)) - logprob(" ".join(words[start:end]))

    nearby, whole = s(max(i - window, 0), i + window + 1), s(0, len(words))
    return nearby, whole, nearby / whole if nearby > 0 and whole > 0 else -1.0


def auc(positives, negatives):
    """The share of (positive, negative) pairs in which the positive has the higher score; a tie is half."""
    if not positives or not negatives:
        raise ValueError("AUC needs scores of both classes")
    wins, below, n = 0.0, 0, 0
    counts = collections.Counter(negatives), collections.Counter(positives)
    for score in sorted({*positives, *negatives}):
        wins += counts[1][score] * (below + counts[0][score] / 2)
        below += counts[0][score]
        n += counts[1][score]
    return wins / (n * below)

# -----------------------------------------------------------------------------
# are these metrics any good? Puns against non-puns

def sound_alikes(puns):
    """{word: {(another word, id of the pun that plays on the two)}}, both ways, from the pun words that people marked."""
    found = collections.defaultdict(set)
    for pun in puns:
        if pun.kind == "heterographic" and pun.alt_word and " " not in pun.alt_word + pun.pun_word:
            found[pun.pun_word.lower()].add((pun.alt_word.lower(), pun.id))
            found[pun.alt_word.lower()].add((pun.pun_word.lower(), pun.id))
    return found


def evaluate(puns, known, test, lm, device=""):
    """{metric: AUC} of the heterographic puns of `test` against its non-puns. Co-occurrence is counted in the texts of `known`, and
    lm is a checkpoint that was trained on these alone.

    No one has marked a word in a text that is no pun. So in every text, pun or not, the last word is taken that sounds like another
    one by what is marked in *other* texts of `puns`; texts without such a word are left out."""
    import torch  # here, so that the formulas above need none of this

    from common import setup
    from data import encode_records
    from model import load_model, logprobs
    from realpuns import PROMPT
    from reward_model import Config

    device, autocast = setup(Config(device=device))
    model, alike = load_model(lm, device), sound_alikes(puns)
    p, p_given = cooccurrence([pun.text for pun in known])

    def logprob(text):
        records = [{"prompt": PROMPT, "completion": " " + text}]
        ids = encode_records(records, model.tokenizer, ["prompt", "completion"], model.config.block_size)
        with torch.no_grad(), autocast():                               # of all tokens but the end
            return logprobs(model, ids["prompt"].long().to(device), ids["completion"].long().to(device))[0, :-1].sum().item()

    names = "ambiguity", "distinctiveness", "local surprise", "global surprise", "surprise ratio"
    columns = {name: {True: [], False: []} for name in names}
    for pun in test:
        words = re.findall(r"\w+(?:'\w+)?", pun.text)
        marked = [(i, sorted(other for other, owner in alike[word.lower()] if owner != pun.id and other != word.lower()))
                  for i, word in enumerate(words) if word.lower() in alike]
        marked = [(i, others[0]) for i, others in marked if others]
        if not marked or pun.kind != "heterographic":
            continue
        i, other = marked[-1]
        rest = content_words(" ".join(words[:i] + words[i + 1:]))
        meanings = [words[i].lower(), other]
        values = (ambiguity(rest, meanings, p, p_given), distinctiveness(rest, meanings, p, p_given), *surprise(words, i, other, logprob))
        for column, value in zip(columns.values(), values, strict=True):
            column[pun.is_pun].append(value)
    n = {is_pun: len(columns["ambiguity"][is_pun]) for is_pun in (True, False)}
    found = {name: auc(column[True], column[False]) if all(n.values()) else math.nan for name, column in columns.items()}
    return found | {"puns": n[True], "non-puns": n[False]}
