"""
Near-duplicates among records, and splits that keep them together.

The same joke, retold, must not be in a training and a test set: a model would look better than it
is. split(records) parts whole groups of near-duplicates.
"""

import collections
import heapq
import itertools
import math
import re
import zlib

from common import progress_bar

ANSWERS = ("completion", "chosen", "rejected")      # the fields of a record that hold an answer


def answers_of(record):
    return [record[name] for name in ANSWERS if name in record] + record.get("ranked", [])


def texts_of(record):
    """The texts by which a record is compared: prompt with answer, and a long prompt by itself."""
    if hasattr(record, "text"):         # a Pun
        return [record.text]
    texts = [record["prompt"] + answer for answer in answers_of(record)]
    if len(record["prompt"].split()) >= 8 or not texts:
        texts.append(record["prompt"])
    return texts


def words_of(text):
    """The set of the words of a text, in lower case and without punctuation."""
    return set(re.findall(r"[^\W_]+", text.lower().replace("'", "")))


def group(texts_of_records, threshold=0.45, rarest=6):
    """A number for each record, given as its list of texts; near-duplicates share their number.

    Two texts are near-duplicates if the words that they share weigh at least `threshold` of all
    their words. A word that n of the N texts have weighs log((N + 1) / n), so the same joke told
    twice counts, but two jokes on one template do not. Near-duplicates of near-duplicates share
    the number, too. Nothing is random.

    Not all pairs are compared (prefix filtering): with the words of each text sorted, rarest first,
    two near-duplicates must share a word before the rest is too light to reach the threshold. At
    most `rarest` words of a text are looked up, which is exact for texts of up to about ten words,
    and a good approximation beyond."""
    number = list(range(len(texts_of_records)))
    members = {i: [i] for i in number}

    def join(i, j):
        a, b = sorted((number[i], number[j]))
        if a != b:
            for k in members[b]:
                number[k] = a
            members[a] += members.pop(b)

    owner_of = {}           # text -> the first record that has it
    for i, texts in enumerate(texts_of_records):
        for text in texts:
            join(i, owner_of.setdefault(text, i))
    owner = list(owner_of.values())
    sets = [words_of(text) for text in owner_of]
    count = collections.Counter(itertools.chain.from_iterable(sets))
    weight = {word: math.log((len(sets) + 1) / n) for word, n in count.items()}
    total = [sum(weight[word] for word in words) for words in sets]

    texts_with = collections.defaultdict(list)      # word -> earlier texts with it in their prefix
    for k, words in enumerate(progress_bar(sets, "near-copies")):
        prefix, rest = [], total[k]
        for word in heapq.nsmallest(rarest, words, key=lambda word: (count[word], word)):
            if rest < threshold * total[k] - 1e-9:
                break
            prefix.append(word)
            rest -= weight[word]
        for j in {j for word in prefix for j in texts_with[word]}:
            shared = sum(weight[word] for word in words & sets[j])
            if shared >= threshold * (total[k] + total[j] - shared) - 1e-9:
                join(owner[j], owner[k])
        for word in prefix:
            texts_with[word].append(k)
    return number


def group_records(records):
    """Lists of the indices of records that must stay together."""
    groups = collections.defaultdict(list)
    for i, number in enumerate(group([texts_of(record) for record in records])):
        groups[number].append(i)
    return list(groups.values())


def split(records, test_fraction=0.1, seed=0, groups=None):
    """(train, test): about test_fraction of the records in test, and only whole groups.

    groups: of group_records(records), if they are there already. The groups with the smallest
    checksums go to test, so the split is fixed, and records that are added hardly move it. If none
    is small enough, the smallest one goes; if there is one group only, test is empty."""
    groups = groups or group_records(records)
    size = test_fraction * len(records)

    def checksum(rows):
        return min(zlib.crc32(f"{seed}|{text}".encode(errors="replace"))
                   for i in rows for text in texts_of(records[i]))

    test = set()
    for rows in sorted(groups, key=checksum):
        if len(test) + len(rows) <= size:
            test.update(rows)
    if not test and len(groups) > 1 and size > 0:
        test.update(min(groups, key=lambda rows: (len(rows), checksum(rows))))
    return ([record for i, record in enumerate(records) if i not in test],
            [record for i, record in enumerate(records) if i in test])
