"""
Puns that people wrote and rated: SemEval-2017 task 7 and ExPUNations, and what to train on them.

    load_semeval, load_expun   their files -> Puns; people call them through corpora.load()
    records_of(puns, shape)    Puns -> the records that stages read
    rated_pairs(puns, margin)  two texts that the same people rated, the funnier one first
    detection_pairs(puns)      a pun, and a text of its kind and length that is not a pun
    depun(pun)                 a minimal pair: `I knead dough.` without its pun is `I need dough.`
    put_word(pun, word)        any other word in place of the pun word

Both data sets are for non-commercial use, and so are the models trained on them.
"""

import collections
import itertools
import random
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import NamedTuple

from common import InputError
from puns import pluralize
from real.reading import check_fields, read_array, read_lines, read_text

PROMPT = "A pun:"       # of a text that comes without a prompt


class Pun(NamedTuple):
    """A text of SemEval-2017 task 7, with its ratings if it was rated for ExPUNations."""
    id: str
    text: str
    kind: str                   # homographic or heterographic
    is_pun: bool
    pun_word: str = ""          # as it stands in the text; "" if the text is not a pun
    alt_word: str = ""          # lemma of the word that it also evokes; "" if the same or unknown
    pun_lemma: str = ""
    span: tuple = (0, 0)        # text[start:end] is the pun word
    part: str = ""              # of ExPUNations: full or pilot, which used different scales
    raters: tuple = ()          # their numbers, sorted
    ratings: tuple = ()         # funniness by rater, 0 to 5; 0 is "not a joke", which also stands
    #                             for "not understood" and "offensive"
    n_offensive: int = 0        # raters who called it offensive

    @property
    def funniness(self):
        """The mean rating, or None."""
        return sum(self.ratings) / len(self.ratings) if self.ratings else None

# -----------------------------------------------------------------------------
# SemEval's files

def load_semeval(path):
    """(Puns, {reason: places} of the texts that were dropped) of SemEval-2017 task 7.

    path: the folder of its XML and gold files, a folder above it, or one of the files. Where test
    and trial data are both there, only the test data count. Raises InputError with file and line
    if a file is damaged."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    files = sorted(folder.rglob("subtask1-*graphic-*.xml"))
    files = [file for file in files if file.name.endswith("-test.xml")] or files
    if not files:
        raise InputError(f"{path}: there is no subtask1-homographic-test.xml and no "
                         "subtask1-heterographic-test.xml in this folder")
    if len({file.name for file in files}) < len(files):
        raise InputError(f"{path}: there is more than one {files[0].name} below this folder: "
                         "name the folder of one of them")
    puns, dropped = [], collections.defaultdict(list)
    for file in files:
        gold = [read_gold(file, subtask) for subtask in (1, 2, 3)]
        for text_id, words in read_xml(file).items():
            where = f"{file} ({text_id})"
            pun = make_pun(where, text_id, file.name.split("-")[1], words, *gold)
            if pun.is_pun and not pun.pun_word:
                dropped["a pun without a known pun word"].append(where)
            else:
                puns.append(pun)
    return puns, dropped


def read_xml(path):
    """{text id: {word id: word}}"""
    try:
        root = xml.etree.ElementTree.fromstring(read_text(path))
    except xml.etree.ElementTree.ParseError as error:
        raise InputError(f"{path}:{error.position[0]}: this is not XML: {error}") from None
    return {text.get("id"): {word.get("id"): word.text or "" for word in text.iter("word")}
            for text in root.iter("text")}


GOLD_LINES = {1: "hom_1 1", 2: "hom_1 hom_1_7", 3: "hom_1_7 bank%1:14:00:: bank%1:17:01::"}


def read_gold(xml_file, subtask):
    """{first field: the other fields} of the gold file of a subtask.

    Subtask 1: is a text a pun? 2: which word of it? 3: the two senses of that word."""
    name = xml_file.with_suffix(".gold").name.replace("subtask1", f"subtask{subtask}")
    gold = {}
    for where, line in read_lines(xml_file.with_name(name)):
        fields = line.split()
        if (len(fields) != len(GOLD_LINES[subtask].split())
                or subtask == 3 and not all("%" in sense for sense in fields[1:])):
            raise InputError(f"{where}: this is not a gold line of subtask {subtask}, "
                             f"such as {GOLD_LINES[subtask]}")
        gold[fields[0]] = fields[1:]
    return gold


def make_pun(where, text_id, kind, words, is_pun, pun_words, senses):
    """The record of one text, from its words and the gold of the three subtasks."""
    if is_pun.get(text_id) not in (["0"], ["1"]):
        raise InputError(f"{where}: the gold file of subtask 1 has no line with 0 or 1 for it")
    pun = Pun(text_id, detokenize(words.values()), kind, is_pun[text_id] == ["1"])
    if not pun.is_pun or text_id not in pun_words:
        return pun
    word_id = pun_words[text_id][0]
    if word_id not in words:
        raise InputError(f"{where}: {word_id}, its pun word in subtask 2, is not a word of it")
    start, end = span_of(pun.text, list(words.values()), list(words).index(word_id))
    pun = pun._replace(span=(start, end), pun_word=pun.text[start:end])
    if word_id in senses:
        pun_lemma, alt_word = lemmas(pun.pun_word, *senses[word_id])
        pun = pun._replace(pun_lemma=pun_lemma, alt_word=alt_word)
    return pun


def lemmas(pun_word, first, second):
    """(lemma of the pun word, the other lemma or "") from the two senses of a gold line.

    A sense is like `knead%2:35:00::`, or several with `;` between them. The pun word's own sense
    nearly always comes first, but not if only the second one has the word itself as a lemma. Of
    several alternatives, a single word is preferred to a phrase: it will replace one word."""
    own, other = ([key.split("%")[0].replace("_", " ") for key in senses.split(";")]
                  for senses in (first, second))
    word = pun_word.lower()
    is_phrase_of_other = own[0].startswith(other[0] + " ")      # chill out, chill
    if is_phrase_of_other or (word in other and word not in own):
        own, other = other, own
    alternatives = [lemma for lemma in other if lemma != own[0]]
    alternatives.sort(key=lambda lemma: " " in lemma)           # single words first
    return own[0], (alternatives + [""])[0]

# -----------------------------------------------------------------------------
# SemEval's tokens: `isn't` is isn ' t there, a double quote is ' ', hyphens and dots are tokens

PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "—": "--",
                       "…": "...", "\xa0": " "})

# What makes a text of the tokens, which start out with a space around each; in this order.
RULES = [(re.compile(pattern, re.IGNORECASE), new) for pattern, new in (
    (r" ' '(?= )", ' "'),
    (r" - -(?= )", " --"),
    (r"(\w) ' (t|s|m|re|ve|d|ll|all|er)(?= )", r"\1'\2"),           # isn't
    (r" ([od]) ' (\w)", r" \1'\2"),                                 # O'Brien
    (r" ' (em|im|til|till|tis|twas|n|cause)(?= (?!'))", r" '\1"),   # get 'em
    (r' " (.*?) "(?= )', r' "\1"'),
    (r" ' (.*?) '(?= )", r" '\1'"),
    (r"(\w) '(?= )", r"\1'"),                                       # the boys' room
    (r" ([\"']) $", r"\1"),                                         # what closes no quotation
    (r"(\w) ([-/]) (?!(?:i|he|she|they|we|you|there|just)\b)(?=\w)", r"\1\2"),      # Wal-Mart
    (r"(\d) ([.,:]) (?=\d)", r"\1\2"),                              # 1,000
    (r"( [^\W\d]) ?\. (?=[^\W\d] )", r"\1."),                       # U.S.
    (r" (\.\.\.|[.,?!:;)\]%>])", r"\1"),
    (r"([(\[$#<]) ", r"\1"))]


def detokenize(tokens):
    """The text that SemEval's tokens make. Letters and digits are never changed."""
    words = [token.translate(PLAIN).strip() for token in tokens]
    text = f" {' '.join(word for word in words if word)} "
    for pattern, new in RULES:
        text = pattern.sub(new, text)
    return text.strip()


def span_of(text, tokens, i):
    """(start, end) of token i in the text that they make, found by counting letters and digits."""
    places = [place for place, char in enumerate(text) if char.isalnum()]
    n_before, n = (sum(char.isalnum() for char in part)
                   for part in ("".join(tokens[:i]), tokens[i]))
    return places[n_before], places[n_before + n - 1] + 1

# -----------------------------------------------------------------------------
# ExPUNations' files

def load_expun(path, semeval=""):
    """(Puns of SemEval that ExPUNations rated, {reason: places} of the texts that were dropped).

    path: expunations_annotated_full.json, its pilot, or a folder that holds the former.
    semeval: the folder of SemEval's files, which have the texts; "" is a folder semeval* beside
    the file or up to two levels above it."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.rglob("expunations_annotated_full.json"))
        if len(found) != 1:
            raise InputError(f"{path}: {len(found)} files expunations_annotated_full.json are in "
                             "this folder: name the one to read")
        path = found[0]
    near = [place for folder in path.absolute().parents[:3]
            for place in sorted(folder.glob("semeval*")) if place.is_dir()]
    if not semeval and not near:
        raise InputError(f"{path}: it has no texts. They are SemEval's: name their folder with "
                         "--semeval, or get them with python -m real.fetch semeval")
    texts = {pun.id: pun for pun in load_semeval(semeval or near[0])[0]}
    puns, dropped = [], collections.defaultdict(list)
    for where, row in read_array(path):
        try:
            text_id, ratings = ratings_of(row)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if text_id in texts:
            puns.append(texts[text_id]._replace(**ratings))
        else:
            dropped["its text is not in SemEval's files"].append(f"{where} ({text_id})")
    return puns, dropped


def ratings_of(row):
    """(id, what the raters said about the text, as fields of Pun) of a record of ExPUNations."""
    columns = ("Annotator_IDs", "Funniness (1-5)", "Offensive/Inappropriate?")
    check_fields(row, {"ID": str} | {name: list for name in columns})
    raters, ratings, offensive = (row[name] for name in columns)
    if not raters or not len(raters) == len(ratings) == len(offensive):
        raise InputError("'Annotator_IDs', 'Funniness (1-5)' and 'Offensive/Inappropriate?' must "
                         "have an entry for each rater")
    if not all(type(rating) is int and 0 <= rating <= 5 for rating in ratings):
        raise InputError("a funniness must be a whole number from 0 to 5")
    if not all(type(rater) is int for rater in raters):
        raise InputError("a rater must be a whole number")
    by_rater = sorted(zip(raters, ratings, strict=True))
    return row["ID"], dict(
        part="full" if "Is a Joke?" in row else "pilot",
        raters=tuple(rater for rater, _ in by_rater),
        ratings=tuple(rating for _, rating in by_rater),
        n_offensive=sum(str(vote) == "1" for vote in offensive))        # "1" in the pilot

# -----------------------------------------------------------------------------
# what to train on them

def word_prompt(word):
    return f'A pun with the word "{word.lower()}":'


def asked_word(prompt):
    """The word that a prompt of word_prompt() asks for."""
    return re.search(r'"(.*)"', prompt)[1]


def records_of(puns, shape):
    """(records of a shape, {reason: ids} of the puns that were left out).

    completion and prompt: puns, asked for by their word. rating: rated texts. preference: pairs of
    texts that the same people rated, at most 20,000 of them."""
    if shape == "preference":
        pairs = list(rated_pairs(puns, 0.4))
        pairs = random.Random(0).sample(pairs, min(len(pairs), 20_000))
        return [{"id": a.id, "prompt": PROMPT, "chosen": " " + a.text, "rejected": " " + b.text,
                 "margin": margin, "share": max(share, 0.5)} for a, b, margin, share in pairs], {}
    if shape not in ("completion", "prompt", "rating"):
        raise InputError("puns become records of completion, prompt, rating or preference, "
                         f"not of {shape}")
    records, left_out = [], []
    for pun in puns:
        record = {"id": pun.id, "prompt": word_prompt(pun.pun_word), "completion": " " + pun.text}
        if shape == "rating":
            record |= {"prompt": PROMPT, "rating": pun.funniness}
        elif shape == "prompt":
            del record["completion"]
        is_usable = pun.ratings if shape == "rating" else pun.is_pun
        if is_usable:
            records.append(record)
        else:
            left_out.append(pun.id)
    return records, {"nobody rated it" if shape == "rating" else "it is not a pun": left_out}


def rated_pairs(puns, min_margin):
    """Yields (better, worse, margin, share) for pairs of texts that the same people rated.

    Raters differ too much to compare texts that different people rated. margin: difference of the
    mean ratings. share: of the raters who agree; a tie is half a vote."""
    teams = collections.defaultdict(list)
    for pun in puns:
        if pun.ratings:
            teams[pun.part, pun.raters].append(pun)
    for team in teams.values():
        for a, b in itertools.combinations(team, 2):
            margin = (sum(a.ratings) - sum(b.ratings)) / len(a.ratings)
            if margin < 0:
                a, b, margin = b, a, -margin
            if margin == 0 or margin < min_margin - 1e-9:
                continue
            votes = [(x > y) + (x == y) / 2 for x, y in zip(a.ratings, b.ratings, strict=True)]
            yield a, b, margin, sum(votes) / len(votes)


def detection_pairs(puns, max_words_apart=1):
    """Yields (pun, other): each pun with each non-pun of its kind and of about its length.

    The puns of SemEval are longer than its non-puns, and a model that can tell them apart by
    length learns nothing else."""
    sized = [(pun, len(pun.text.split())) for pun in puns]
    others = [(other, n_other) for other, n_other in sized if not other.is_pun]
    for pun, n_words in sized:
        for other, n_other in others:
            same_length = abs(n_other - n_words) <= max_words_apart
            if pun.is_pun and other.kind == pun.kind and same_length:
                yield pun, other

# -----------------------------------------------------------------------------
# minimal pairs: a pun, and the same text with the other word

def depun(pun):
    """The text with the alternative in place of the pun word: the same text, no longer a pun.

    The alternative gets the ending of the pun word. "" where no other word is known; in a
    homographic pun it is the same word."""
    if not pun.alt_word or pun.kind != "heterographic":
        return ""
    return put_word(pun, inflect(pun.alt_word, pun.pun_word.lower(), pun.pun_lemma))


def put_word(pun, word):
    """The text with another word in place of the pun word.

    It gets the capitals of the pun word, and the a or an before it is corrected."""
    start, end = pun.span
    if pun.pun_word.isupper() and len(pun.pun_word) > 1:
        word = word.upper()
    elif pun.pun_word[0].isupper():
        word = word[0].upper() + word[1:]
    head = pun.text[:start]
    has_vowel = word[0].lower() in "aeiou"
    had_vowel = pun.pun_word[0].lower() in "aeiou"
    if has_vowel != had_vowel:
        article = r"\1n\2" if has_vowel else r"\1\2"
        head = re.sub(r"\b([Aa])n?( ['\"]?)$", article, head)
    return head + word + pun.text[end:]


# Endings, and how a word ends that sounds as if it had them already: peace like peas.
ENDINGS = {"ing": r"ing$", "ed": r"[td]$", "est": r"est$", "s": r"([sxz]|[csz]e)$"}
IRREGULAR = dict(say="said", tell="told", sell="sold", send="sent", lose="lost", make="made",
                 take="took", pay="paid", buy="bought", catch="caught", leave="left", feel="felt",
                 keep="kept", sleep="slept", speak="spoke", wear="wore")


def inflect(lemma, like, like_lemma):
    """The lemma with the ending that `like` adds to its own: (stare, stairing, stair) is staring.

    A word that sounds as if it had the ending already stays as it is. Of a phrase, the first word
    is inflected. Rare irregular verbs come out regular."""
    first, _, rest = lemma.partition(" ")
    for ending, sound in ENDINGS.items():
        if like.endswith(ending) and not like_lemma.endswith(ending):
            if re.search(sound, first) and not re.search(sound, like_lemma):
                return lemma
            return f"{attach(first, ending)} {rest}".strip()
    return lemma


def attach(word, ending):
    """The word with the ending s, ed, ing or est: stare + ing is staring, tell + ed is told."""
    if ending == "s":
        return pluralize(word)
    if ending == "ed" and word in IRREGULAR:
        return IRREGULAR[word]
    if ending == "ing" and word.endswith("ie"):
        return word[:-2] + "ying"                       # die, dying
    if ending == "ing" and word.endswith(("ee", "oe", "ye")):
        return word + ending                            # see, seeing
    if word.endswith("e"):
        return word[:-1] + ending
    if re.search(r"[^aeiou]y$", word) and ending != "ing":
        return word[:-1] + "i" + ending                 # carry, carried
    if re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", word):
        return word + word[-1] + ending                 # sin, sinned
    return word + ending
