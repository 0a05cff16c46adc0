"""Byte-pair encoding, against hand-made merges."""

import base64

import data
from data import SENTENCES
from puns import world
from real import tokenizer
from real.tokenizer import train_bpe

BYTES = {bytes([i]): i for i in range(256)}


def test_bpe_by_hand():
    """The pieces are `ab`, ` ab` twice, and `abc`: a-b occurs 4 times, then ` `-ab twice, and then
    ab-c once. Of equally frequent pairs, the one with the larger bytes goes first."""
    ranks = train_bpe(["ab ab ab", "abc"], 259)
    assert list(ranks)[:256] == list(BYTES) and list(ranks.values()) == list(range(259))
    assert list(ranks)[256:] == [b"ab", b" ab", b"abc"]
    assert len(train_bpe(["ab"], 1000)) == 257                  # then there is no pair left
    assert list(train_bpe(["aaaa"], 258))[256:] == [b"aa", b"aaaa"]


def test_bpe_across_words_by_hand():
    """The pieces are `ab ab.`, ` ab ab.` and `ab ab`. No merge crosses the end of a sentence."""
    words = BYTES | {b"ab": 256, b" ab": 257}
    ranks = train_bpe(["ab ab. ab ab.", "ab ab"], 300, SENTENCES, words)
    assert list(ranks)[256:] == [b"ab", b" ab", b"ab ab", b"ab ab.", b" ab.", b" ab ab."]
    assert list(ranks.values()) == list(range(262))


def test_a_token_that_is_made_twice_has_one_rank():
    ranks = train_bpe(["x y x y"], 259, SENTENCES, BYTES | {b"x y": 256})
    assert list(ranks)[256:] == [b"x y", b"x "]
    assert list(ranks.values()) == list(range(len(ranks)))


def test_train_tokenizer_writes_ranks_that_data_reads(tmp_path, monkeypatch):
    path = tmp_path / "puns_large.tiktoken"
    monkeypatch.setitem(data.RANKS, "puns_large", path)
    monkeypatch.setattr(tokenizer, "world", {"puns_large": world()}.get)        # and no other
    tokenizer.train_tokenizer("puns_large", words=300, vocab_size=320, n=50)
    lines = path.read_bytes().splitlines()
    assert len(lines) == 320 and lines[0] == base64.b64encode(b"\0") + b" 0"
    tokens = [base64.b64decode(line.split()[0]) for line in lines]
    assert not any(b" " in token[1:] for token in tokens[:300])
    assert any(b" " in token[1:] for token in tokens[300:])     # across words
    tok = data.Tokenizer("puns_large")
    text = world().corpus(1, seed=0)[0]["completion"]
    assert tok.decode(tok.encode(text)) == text and tok.eos_token_id == 320
