"""
Puns that people wrote and rated (SemEval-2017 task 7, ExPUNations): the record, and what can be trained on it.

    completion(pun)            prompt and pun, for supervised fine-tuning
    preferences(puns)          comparisons for the reward model, of three sources:
      rated_pairs(puns)        texts that the same people rated, the funnier one first
      detection_pairs(puns)    a pun and a text of its kind and length that is none
      depun(pun)               the pun without its pun: `I knead dough.` is `I need dough.`

corpora.py loads them. Both sets are for non-commercial use, and so is what was trained on them.
"""

import collections
import itertools
import random
import re
from typing import NamedTuple

from puns import pluralize


class Pun(NamedTuple):
    """A text of SemEval-2017 task 7, with what the raters of ExPUNations said about it if they were asked."""
    id: str
    text: str
    kind: str                     # homographic | heterographic
    is_pun: bool
    pun_word: str = ""            # as the text shows it; '' in a text that is no pun
    alt_word: str = ""            # lemma of the word that is heard instead; '' if it is the same one or nobody knows
    pun_lemma: str = ""
    span: tuple = (0, 0)          # text[start:end] is the pun word
    part: str = ""                # of ExPUNations: full or pilot, whose scales differ; '' if nobody was asked
    raters: tuple = ()            # their numbers, sorted
    ratings: tuple = ()           # funniness 0-5 by each of them; 0 is "no joke", also said of a text not understood or offensive
    is_joke_rate: float | None = None     # share of the raters; the pilot did not ask
    offensive_rate: float | None = None
    keywords: tuple = ()          # named by two raters or more
    explanations: tuple = ()

    @property
    def funniness(self):
        return sum(self.ratings) / len(self.ratings) if self.ratings else None

# -----------------------------------------------------------------------------
# SemEval's tokens and senses

CONTRACTIONS = {"t", "s", "m", "re", "ve", "d", "ll", "all", "er"}
ELISIONS = {"em", "im", "til", "till", "tis", "twas", "n", "cause"}
AFTER_DASH = {"i", "he", "she", "they", "we", "you", "there", "just"}    # a - before these is a dash, no hyphen
PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "...", "\xa0": " "})


def detokenise(tokens):
    """The text that SemEval's tokens make, and where each of them stands in it, [(start, end), ...].

    There `isn't` is isn ' t, a double quote is ' ', and hyphens and dots are tokens of their own: what belongs together follows
    from the neighbors. Letters and digits are never touched."""
    words = [token.translate(PLAIN).strip() for token in tokens]
    text, spans, glue, inside, i = "", [], True, {'"': False, "'": False}, 0
    while i < len(words):
        word, size = words[i], 1
        if word and word in "'-" and words[i + 1:i + 2] == [word]:
            word, size = {"'": '"', "-": "--"}[word], 2
        before = words[i - 1] if i else ""
        after = words[i + size] if i + size < len(words) else ""
        between = before[-1:].isalnum() and after[:1].isalnum()
        left = right = False                    # is there no space on this side?
        if word == "'" and between and (after.lower() in CONTRACTIONS or before.lower() in ("o", "d")):
            left = right = True                 # isn ' t, O ' Brien
        elif word in ("'", '"') and (inside[word] or not after):
            left, inside[word] = True, False
        elif word == "'" and after.lower() in ELISIONS and words[i + 2:i + 3] != ["'"]:
            right = True                        # get ' em
        elif word == "'" and before[-1:].isalnum() and not closes_later(words, i):
            left = True                         # the boys ' room
        elif word in ("'", '"'):
            right = inside[word] = True
        elif word in {".", ",", "?", "!", ":", ";", ")", "]", "%", "..."}:
            left = True
            right = (word in ".,:" and before[-1:].isdigit() and after[:1].isdigit()                        # 12 , 000
                     or word == "." and len(before) == len(after) == 1 and (before + after).isalpha())      # U . S .
        elif word in ("-", "/"):
            left = right = between and after.lower() not in AFTER_DASH
        elif word in {"(", "[", "$", "#", "<"}:
            right = True
        elif word == ">":
            left = True
        text += "" if left or glue or not word else " "
        spans += [(len(text), len(text) + len(word))] * size
        text, glue, i = text + word, right, i + size
    return text, spans


def closes_later(words, i):
    """Is there an apostrophe after i that can close a quotation, so that the one at i may open it?"""
    return any(words[j] == "'" and "'" not in (words[j - 1], *words[j + 1:j + 2])
               and "".join(words[j + 1:j + 2]).lower() not in CONTRACTIONS for j in range(i + 2, len(words)))


def lemmas(pun_word, first, second):
    """(lemma of the pun word, the other lemma or '') from the two meanings of a gold line, such as `knead%2:35:00::`.

    The first is nearly always the pun word's own, but that is not promised: it is the second if this one is the word itself. Of
    several alternatives a single word is better than a phrase, since it is to take the place of one."""
    own, other = ([key.split("%")[0].replace("_", " ") for key in meaning.split(";")] for meaning in (first, second))
    if pun_word.lower() in other and pun_word.lower() not in own or own[0].startswith(other[0] + " "):     # chill out, chill
        own, other = other, own
    return own[0], min((lemma for lemma in other if lemma != own[0]), key=lambda lemma: " " in lemma, default="")

# -----------------------------------------------------------------------------
# completions and preference pairs

PROMPT = "A pun:"    # of a text that comes without a prompt


def completion(pun):
    """Asks for this pun by its word: `A pun on knead (need):`, or `A pun on interest:` where only the one word is known."""
    return {"prompt": f"A pun on {pun.pun_word}" + f" ({pun.alt_word})" * bool(pun.alt_word) + ":", "completion": " " + pun.text}


def preferences(puns, n=20_000, seed=0, min_margin=0.4):
    """About n comparisons of texts, all under one prompt: half of them from raters, if there are any; two fifths of puns over
    non-puns, a tenth of puns over their twins. They carry margin and share for the reward model's loss."""
    rng = random.Random(seed)
    sources = [(0.5, [(a.text, b.text, margin, share) for a, b, margin, share in rated_pairs(puns, min_margin)]),
               (0.4, [(a.text, b.text, 1.0, 1.0) for a, b in detection_pairs(puns)]),
               (0.1, [(pun.text, depun(pun), 1.0, 1.0) for pun in puns if depun(pun) not in ("", pun.text)])]
    picked = [pair for share, pairs in sources for pair in rng.sample(pairs, min(len(pairs), round(share * n)))]
    rng.shuffle(picked)
    return [{"prompt": PROMPT, "chosen": " " + a, "rejected": " " + b, "margin": margin, "share": max(share, 0.5)}
            for a, b, margin, share in picked]


def rated_pairs(puns, min_margin=0.8):
    """Yields (better, worse, margin, share) for all pairs of texts that the same people rated: raters and their teams differ so
    much that other texts cannot be compared. margin: of the mean ratings. share: of the raters who agree, a tie is half a vote."""
    teams = collections.defaultdict(list)
    for pun in puns:
        if pun.ratings:
            teams[pun.part, pun.raters].append(pun)
    for team in teams.values():
        for a, b in itertools.combinations(team, 2):
            lead, n = sum(a.ratings) - sum(b.ratings), len(a.ratings)
            if lead and abs(lead) / n > min_margin - 1e-9:
                a, b = (a, b) if lead > 0 else (b, a)
                votes = sum((x > y) + (x == y) / 2 for x, y in zip(a.ratings, b.ratings, strict=True))
                yield a, b, abs(lead) / n, votes / n


def detection_pairs(puns, max_words_apart=1):
    """Yields (pun, other): each pun with each non-pun of its kind that is as long, give or take: puns are 3.4 words longer, and a
    model that may learn length learns nothing else."""
    others = [(len(other.text.split()), other) for other in puns if not other.is_pun]
    for pun in puns:
        for length, other in others if pun.is_pun else ():
            if other.kind == pun.kind and abs(length - len(pun.text.split())) <= max_words_apart:
                yield pun, other


IRREGULAR = dict(say="said", tell="told", sell="sold", send="sent", lose="lost", make="made", take="took", pay="paid",
                 buy="bought", catch="caught", leave="left", feel="felt", keep="kept", sleep="slept", speak="spoke", wear="wore")


def attach(word, ending):
    """The word with the ending s, ed, ing or est: stare + ing is staring, sin + ed is sinned, and tell + ed is told."""
    if ending == "s":
        return pluralize(word)
    if ending == "ed" and word in IRREGULAR:
        return IRREGULAR[word]
    if ending == "ing" and word.endswith("ie"):
        return word[:-2] + "ying"
    if word.endswith("e") and not (ending == "ing" and word.endswith(("ee", "oe", "ye"))):
        return word[:-1] + ending
    if re.search(r"[^aeiou]y$", word) and ending != "ing":
        return word[:-1] + "i" + ending
    return word + (word[-1] if re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", word) else "") + ending


def inflect(lemma, like, like_lemma):
    """The lemma with the ending that `like` has put to its own lemma: (stare, stairing, stair) gives staring. A word that sounds as
    if it had the ending already stays, as peace does for peas. Rare irregular verbs come out regular."""
    first, _, rest = lemma.partition(" ")
    for ending, sound in {"ing": "ing$", "ed": "[td]$", "est": "est$", "s": "([sxz]|[csz]e)$"}.items():
        if like.endswith(ending) and not re.search(ending + "$", like_lemma):
            if re.search(sound, first) and not re.search(sound, like_lemma):
                return lemma
            return f"{attach(first, ending)} {rest}".strip()
    return lemma


def depun(pun):
    """The text with the alternative in place of the pun word, inflected and capitalized like it, its a or an mended: the same
    text, no longer a pun. '' where no other word is known; in a homographic pun it is the same word in another sense."""
    if not pun.alt_word or pun.kind != "heterographic":
        return ""
    word, (start, end) = inflect(pun.alt_word, pun.pun_word.lower(), pun.pun_lemma), pun.span
    if pun.pun_word.isupper() and len(pun.pun_word) > 1:
        word = word.upper()
    elif pun.pun_word[0].isupper():
        word = word[0].upper() + word[1:]
    head = pun.text[:start]
    if (pun.pun_word[0].lower() in "aeiou") != (word[0].lower() in "aeiou"):
        head = re.sub(r"\b([Aa])n?( ['\"]?)$", r"\1n\2" if word[0].lower() in "aeiou" else r"\1\2", head)
    return head + word + pun.text[end:]
