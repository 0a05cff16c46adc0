"""
Byte-pair encoding: how lexicon/puns.tiktoken and lexicon/more/puns.tiktoken are made.

    python -m real.tokenizer                retrains the one of the small pun world
    python -m real.tokenizer puns_large --words 3871 --vocab_size 4095
                                            that of the large one

Merges happen in two rounds: first within words, as in GPT-2, then across the words of a sentence,
so that " I used to be a" can be one token (https://arxiv.org/abs/2503.13423). Only needed after a
change of the lexicon. Models that were trained with the old tokens cannot be used with new ones.
"""

import base64
import collections

import regex
import tiktoken
import tyro

from common import atomic_write, command_line, progress_bar
from data import RANKS, SENTENCES, Tokenizer
from puns import check_tokens, world

# GPT-2's pieces: contractions, words with the space before them, numbers, punctuation, spaces.
WORDS = (r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"""
         r"""|\s++$|\s+(?!\S)|\s""")


def train_bpe(texts, vocab_size, pattern=WORDS, ranks=None):
    """Merges the most frequent pair of neighbors, again and again, up to vocab_size tokens.

    pattern: what it matches is a piece, and no merge crosses the border of two pieces.
    ranks: {token bytes: rank} to start from; the 256 bytes by default.
    Returns {token bytes: rank}, the form that tiktoken takes."""
    if ranks is None:
        ranks = {bytes([i]): i for i in range(256)}
    ranks = dict(ranks)
    start = tiktoken.Encoding("start", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    # Equal pieces are merged once: [(tokens, how often the piece occurs), ...].
    counts = collections.Counter(piece for text in texts for piece in regex.findall(pattern, text))
    pieces = []
    for piece, n in counts.items():
        ids = start.encode_ordinary(piece)
        pieces.append(([start.decode_single_token_bytes(i) for i in ids], n))

    n_merges = vocab_size - len(ranks)
    for _ in progress_bar(range(n_merges), "merges"):
        pairs = collections.Counter()
        for tokens, n in pieces:
            for pair in zip(tokens, tokens[1:], strict=False):
                pairs[pair] += n
        if not pairs:
            break
        # The bytes of the pair break ties, so that the result is always the same.
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(best[0] + best[1], len(ranks))     # another pair may make the same token
        for tokens, _ in pieces:
            merge(tokens, best)
    return ranks


def merge(tokens, pair):
    """Replaces the pair by one token wherever it occurs in the list, from left to right."""
    first, second = pair
    i = 0
    while i < len(tokens) - 1:
        if tokens[i] == first and tokens[i + 1] == second:
            tokens[i:i + 2] = [first + second]
        i += 1


def train_tokenizer(name: tyro.conf.Positional[str] = "puns", words: int = 2335,
                    vocab_size: int = 2559, n: int = 50_000):
    """Retrain the tokenizer of a pun world on its sentences.

    name: puns or puns_large. words: tokens within words. vocab_size: all tokens, those across words
    included; the end token comes on top. n: records of the pun world to train on."""
    texts = [text for record in world(name).corpus(n, seed=0) for text in record.values()]
    ranks = train_bpe(texts, words)
    ranks = train_bpe(texts, vocab_size, SENTENCES, ranks)
    check_tokens(ranks)
    with atomic_write(RANKS[name]) as path:
        lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
        path.write_bytes(b"".join(lines))
    tok = Tokenizer(name)
    lengths = [len(tok.encode(text)) for text in texts[:2000]]
    mean = sum(lengths) / len(lengths)
    print(f"{RANKS[name]}: {len(ranks)} tokens, {mean:.1f} in a text on average")


if __name__ == "__main__":
    command_line(lambda: tyro.cli(train_tokenizer))
