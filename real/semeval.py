"""
Puns that people wrote and rated: SemEval-2017 task 7 and ExPUNations, and what to train on them.

    load_semeval, load_expun   their files -> Pun records; people call them through corpora.load()
    completion(pun)            prompt and pun, for supervised fine-tuning
    preferences(puns)          comparisons for the reward model, from three sources:
      rated_pairs(puns)        two texts that the same people rated, the funnier one first
      detection_pairs(puns)    a pun, and a text of its kind and length that is not a pun
      depun(pun)               a minimal pair: `I knead dough.` without its pun is `I need dough.`

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
from real.reading import Sieve, check_fields, read_array, read_lines

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
    is_joke_rate: float | None = None       # fraction of the raters; the pilot did not ask
    offensive_rate: float | None = None
    keywords: tuple = ()        # that two or more raters named
    explanations: tuple = ()

    @property
    def funniness(self):
        """The mean rating, or None."""
        return sum(self.ratings) / len(self.ratings) if self.ratings else None

# -----------------------------------------------------------------------------
# SemEval's files

def load_semeval(path, sieve):
    """Yields a Pun for each text of SemEval-2017 task 7.

    path: the folder of its XML and gold files, a folder above it, or one of the files. Where test
    and trial data are both there, only the test data count. Raises InputError with file and line
    if a file is damaged."""
    for xml_file in semeval_files(Path(path)):
        kind = xml_file.name.split("-")[1]
        gold = [gold_of_subtask(xml_file, subtask) for subtask in (1, 2, 3)]
        for text_id, words in parse_xml(xml_file).items():
            where = f"{xml_file} ({text_id})"
            pun = pun_of(where, text_id, kind, words, *gold)
            if pun.is_pun and not pun.pun_word:
                sieve.drop(where, "a pun without a known pun word")
            elif sieve.keep(where, PROMPT, pun.text):
                yield pun


def semeval_files(path):
    """The XML files of subtask 1, which have all texts."""
    folder = path if path.is_dir() else path.parent
    found = sorted(folder.rglob("subtask1-*graphic-*.xml"))
    tests = [file for file in found if file.name.endswith("-test.xml")]
    found = tests or found
    if not found:
        raise InputError(f"{path}: there is no subtask1-homographic-test.xml and no "
                         "subtask1-heterographic-test.xml in this folder")
    if len({file.name for file in found}) < len(found):
        raise InputError(f"{path}: there is more than one {found[0].name} below this folder: "
                         "name the folder of one of them")
    return found


def parse_xml(path):
    """{text id: [(word id, word), ...]}"""
    try:
        root = xml.etree.ElementTree.parse(path).getroot()
    except xml.etree.ElementTree.ParseError as error:
        raise InputError(f"{path}:{error.position[0]}: this is not XML: {error}") from None
    except (OSError, ValueError, LookupError) as error:
        raise InputError(f"{path}:1: cannot be read: {error}") from None
    return {text.get("id"): [(word.get("id"), word.text or "") for word in text.iter("word")]
            for text in root.iter("text")}


GOLD_EXAMPLES = {1: "hom_1 1", 2: "hom_1 hom_1_7",
                 3: "hom_1_7 bank%1:14:00:: bank%1:17:01::"}


def gold_of_subtask(xml_file, subtask):
    """{first field: the other fields} of the gold file of a subtask.

    Subtask 1: is a text a pun? 2: which word of it? 3: the two senses of that word."""
    name = xml_file.with_suffix(".gold").name.replace("subtask1", f"subtask{subtask}")
    gold = {}
    for where, line in read_lines(xml_file.with_name(name)):
        fields = line.split()
        good = len(fields) == len(GOLD_EXAMPLES[subtask].split())
        if subtask == 3:
            keys = ";".join(fields[1:]).split(";")
            good = good and all("%" in key for key in keys)
        if not good:
            raise InputError(f"{where}: this is not a gold line of subtask {subtask}, "
                             f"such as {GOLD_EXAMPLES[subtask]}")
        gold[fields[0]] = fields[1:]
    return gold


def pun_of(where, text_id, kind, words, is_pun, pun_words, senses):
    """The record of one text, from its words and the gold of the three subtasks."""
    verdict = is_pun.get(text_id, ["missing"])[0]
    if verdict not in ("0", "1"):
        raise InputError(f"{where}: the gold file of subtask 1 has no line with 0 or 1 for it")
    text, spans = detokenize([word for _, word in words])
    pun = Pun(text_id, text, kind, verdict == "1")
    if not pun.is_pun or text_id not in pun_words:
        return pun
    word_id = pun_words[text_id][0]
    word_ids = [each for each, _ in words]
    if word_id not in word_ids:
        raise InputError(f"{where}: {word_id}, its pun word in subtask 2, is not a word of it")
    start, end = spans[word_ids.index(word_id)]
    pun = pun._replace(span=(start, end), pun_word=text[start:end])
    if word_id in senses:
        pun_lemma, alt_word = lemmas(pun.pun_word, *senses[word_id])
        pun = pun._replace(pun_lemma=pun_lemma, alt_word=alt_word)
    return pun


def lemmas(pun_word, first, second):
    """(lemma of the pun word, the other lemma or "") from the two senses of a gold line.

    A sense is like `knead%2:35:00::`, or several with `;` between them. The pun word's own sense
    nearly always comes first, but not if only the second one has the word itself as a lemma. Of
    several alternatives, a single word is preferred to a phrase: it will replace one word."""
    own = sense_lemmas(first)
    other = sense_lemmas(second)
    word = pun_word.lower()
    is_phrase_of_other = own[0].startswith(other[0] + " ")      # chill out, chill
    if is_phrase_of_other or (word in other and word not in own):
        own, other = other, own
    alternatives = [lemma for lemma in other if lemma != own[0]]
    single_words = [lemma for lemma in alternatives if " " not in lemma]
    return own[0], (single_words + alternatives + [""])[0]


def sense_lemmas(senses):
    return [key.split("%")[0].replace("_", " ") for key in senses.split(";")]

# -----------------------------------------------------------------------------
# SemEval's tokens

CONTRACTIONS = {"t", "s", "m", "re", "ve", "d", "ll", "all", "er"}      # isn ' t
ELISIONS = {"em", "im", "til", "till", "tis", "twas", "n", "cause"}     # get ' em
AFTER_DASH = {"i", "he", "she", "they", "we", "you", "there", "just"}   # no hyphen before these
PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "—": "--",
                       "…": "...", "\xa0": " "})
NO_SPACE_BEFORE = {".", ",", "?", "!", ":", ";", ")", "]", "%", "...", ">"}
NO_SPACE_AFTER = {"(", "[", "$", "#", "<"}


def detokenize(tokens):
    """The text that SemEval's tokens make, and the [(start, end), ...] of each token in it.

    `isn't` is isn ' t there, a double quote is ' ', and hyphens and dots are tokens, so the
    neighbors have to say where the spaces go. Letters and digits are never changed."""
    words = [token.translate(PLAIN).strip() for token in tokens]
    text, spans = "", []
    needs_space = False
    open_quotes = set()
    i = 0
    while i < len(words):
        word, size = words[i], 1
        if word in ("'", "-") and words[i + 1:i + 2] == [word]:
            word, size = ('"' if word == "'" else "--"), 2
        before = words[i - 1] if i > 0 else ""
        after = words[i + size] if i + size < len(words) else ""
        if word in ("'", '"'):
            left, right = quote_sides(words, i, word, before, after, open_quotes)
        else:
            left, right = mark_sides(word, before, after)
        if needs_space and word and not left:
            text += " "
        spans += [(len(text), len(text) + len(word))] * size
        text += word
        needs_space = not right
        i += size
    return text, spans


def quote_sides(words, i, word, before, after, open_quotes):
    """(left, right): does the apostrophe or quote, words[i], touch the word on that side?

    open_quotes: the quotes that are open; updated."""
    touches_left = before[-1:].isalnum()
    touches_right = after[:1].isalnum()
    if word == "'" and touches_left and touches_right:
        if after.lower() in CONTRACTIONS or before.lower() in ("o", "d"):
            return True, True                           # isn't, O'Brien
    if word in open_quotes or not after:
        open_quotes.discard(word)
        return True, False                              # the closing quote
    if word == "'" and after.lower() in ELISIONS and words[i + 2:i + 3] != ["'"]:
        return False, True                              # get 'em
    if word == "'" and touches_left and not closes_later(words, i):
        return True, False                              # the boys' room
    open_quotes.add(word)
    return False, True                                  # the opening quote


def closes_later(words, i):
    """True if a later apostrophe can close the quotation that the one at i would open."""
    for j in range(i + 2, len(words)):
        before, after = words[j - 1], "".join(words[j + 1:j + 2])
        if words[j] == "'" and "'" not in (before, after) and after.lower() not in CONTRACTIONS:
            return True
    return False


def mark_sides(word, before, after):
    """(left, right): does any other word or mark touch the word on that side?"""
    if word in ("-", "/"):
        joins = before[-1:].isalnum() and after[:1].isalnum() and after.lower() not in AFTER_DASH
        return joins, joins                             # Wal-Mart
    if word in (".", ",", ":"):
        between_digits = before[-1:].isdigit() and after[:1].isdigit()          # 1,000
        initials = len(before) == len(after) == 1 and (before + after).isalpha()
        return True, between_digits or (word == "." and initials)               # U.S.
    return word in NO_SPACE_BEFORE, word in NO_SPACE_AFTER

# -----------------------------------------------------------------------------
# ExPUNations' files

def load_expun(path, sieve, semeval=""):
    """Yields the Puns of SemEval that ExPUNations rated, with their ratings.

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
    folder = Path(semeval) if semeval else semeval_near(path)
    if folder is None or not folder.exists():
        raise InputError(f"{path}: it has no texts. They are SemEval's: name their folder with "
                         "--semeval, or get them with python -m real.fetch semeval")
    puns = {pun.id: pun for pun in load_semeval(folder, Sieve())}
    for where, row in read_array(path):
        text_id = check_fields(where, row, {"ID": str})["ID"]
        where = f"{where} ({text_id})"
        ratings = ratings_of(where, row)
        if text_id in puns:
            yield puns[text_id]._replace(**ratings)
        else:
            sieve.drop(where, "its text is not in SemEval's files")


def semeval_near(path):
    """A folder semeval* beside the path or up to two levels above it, or None."""
    for folder in path.absolute().parents[:3]:
        for place in sorted(folder.glob("semeval*")):
            if place.is_dir():
                return place
    return None


def ratings_of(where, row):
    """What the raters said about one text, as fields of Pun."""
    is_pilot = "Is a Joke?" not in row
    columns = ["Annotator_IDs", "Funniness (1-5)", "Offensive/Inappropriate?", "Joke keywords",
               "Natural language explanation"]
    if not is_pilot:
        columns.append("Is a Joke?")
    check_fields(where, row, {name: list for name in columns})
    raters = row["Annotator_IDs"]
    for name in columns:
        if not raters or len(row[name]) != len(raters):
            raise InputError(f"{where}: '{name}' has {len(row[name])} entries for "
                             f"{len(raters)} raters")
    for rating in row["Funniness (1-5)"]:
        if type(rating) is not int or not 0 <= rating <= 5:
            raise InputError(f"{where}: a funniness must be a whole number from 0 to 5")
    for rater in raters:
        if type(rater) is not int:
            raise InputError(f"{where}: a rater must be a whole number")
    by_rater = sorted(zip(raters, row["Funniness (1-5)"], strict=True))
    offensive = [str(vote) for vote in row["Offensive/Inappropriate?"]]
    offensive = [vote for vote in offensive if vote in ("0", "1")]          # "" is no answer
    explanations = [str(text).strip() for text in row["Natural language explanation"]]
    return dict(
        part="pilot" if is_pilot else "full",
        raters=tuple(rater for rater, _ in by_rater),
        ratings=tuple(rating for _, rating in by_rater),
        is_joke_rate=None if is_pilot else row["Is a Joke?"].count(1) / len(raters),
        offensive_rate=offensive.count("1") / max(len(offensive), 1),
        keywords=tuple(shared_keywords(row["Joke keywords"])),
        explanations=tuple(text for text in explanations if text))


def shared_keywords(keywords_of_raters):
    """The keywords that two or more raters named, in lower case."""
    count = collections.Counter()
    for keywords in keywords_of_raters:
        if isinstance(keywords, str):       # in the pilot sometimes a plain word
            keywords = [keywords]
        different = {str(keyword).strip().lower() for keyword in keywords}
        count.update(sorted(different - {""}))
    return [keyword for keyword, n in count.items() if n > 1]

# -----------------------------------------------------------------------------
# what to train on them

def records_of(puns, shape, n_pairs=20_000, seed=0):
    """The puns as records of a shape, and those left out: (records, {reason: [ids]}).

    completion and prompt: puns with prompts made of their words. rating: rated texts.
    preference: see preferences()."""
    if shape == "preference":
        return preferences(puns, n_pairs, seed), {}
    if shape == "ranking":
        raise InputError("puns are not ranked: use --as completion, preference, rating or prompt")
    reason = "nobody rated it" if shape == "rating" else "it is not a pun"
    records, left_out = [], collections.defaultdict(list)
    for pun in puns:
        usable = pun.ratings if shape == "rating" else pun.is_pun
        if not usable:
            left_out[reason].append(pun.id)
            continue
        record = {"id": pun.id} | completion(pun)
        if shape == "rating":
            record |= {"prompt": PROMPT, "rating": pun.funniness}
        elif shape == "prompt":
            del record["completion"]
        records.append(record)
    return records, left_out


def completion(pun):
    """Asks for this pun by its words: `A pun on knead (need):`, or `A pun on interest:` where only
    the pun word is known."""
    prompt = f"A pun on {pun.pun_word} ({pun.alt_word}):"
    if not pun.alt_word:
        prompt = f"A pun on {pun.pun_word}:"
    return {"prompt": prompt, "completion": " " + pun.text}


def preferences(puns, n=20_000, seed=0, min_margin=0.4):
    """About n comparisons of texts, all with the prompt PROMPT, and with margin and share.

    At most half of them compare ratings, two fifths puns with non-puns, and a tenth are minimal
    pairs. If a source has too few, the result is shorter."""
    rated = [(a, b.text, margin, share) for a, b, margin, share in rated_pairs(puns, min_margin)]
    detected = [(a, b.text, 1.0, 1.0) for a, b in detection_pairs(puns)]
    minimal = [(pun, depun(pun), 1.0, 1.0) for pun in puns if depun(pun) not in ("", pun.text)]
    rng = random.Random(seed)
    picked = []
    for fraction, pairs in ((0.5, rated), (0.4, detected), (0.1, minimal)):
        picked += rng.sample(pairs, min(len(pairs), round(fraction * n)))
    rng.shuffle(picked)
    return [{"id": pun.id, "prompt": PROMPT, "chosen": " " + pun.text, "rejected": " " + other,
             "margin": margin, "share": max(share, 0.5)} for pun, other, margin, share in picked]


def rated_pairs(puns, min_margin=0.8):
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
            votes = 0.0
            for rating_a, rating_b in zip(a.ratings, b.ratings, strict=True):
                if rating_a > rating_b:
                    votes += 1
                elif rating_a == rating_b:
                    votes += 0.5
            yield a, b, margin, votes / len(a.ratings)


def detection_pairs(puns, max_words_apart=1):
    """Yields (pun, other): each pun with each non-pun of its kind and of about its length.

    The puns of SemEval are longer than its non-puns, and a model that can tell them apart by
    length learns nothing else."""
    others = [(other, len(other.text.split())) for other in puns if not other.is_pun]
    for pun in puns:
        if pun.is_pun:
            n_words = len(pun.text.split())
            for other, n_other in others:
                if other.kind == pun.kind and abs(n_other - n_words) <= max_words_apart:
                    yield pun, other

# -----------------------------------------------------------------------------
# minimal pairs: a pun, and the same text with the other word

def depun(pun):
    """The text with the alternative in place of the pun word: the same text, no longer a pun.

    The alternative gets the ending and the capitals of the pun word, and the a or an before it is
    corrected. "" where no other word is known; in a homographic pun it is the same word."""
    if not pun.alt_word or pun.kind != "heterographic":
        return ""
    start, end = pun.span
    word = inflect(pun.alt_word, pun.pun_word.lower(), pun.pun_lemma)
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


IRREGULAR = dict(say="said", tell="told", sell="sold", send="sent", lose="lost", make="made",
                 take="took", pay="paid", buy="bought", catch="caught", leave="left", feel="felt",
                 keep="kept", sleep="slept", speak="spoke", wear="wore")


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
