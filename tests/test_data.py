"""Tokenizer, records, batches."""

import base64
import json
import random

import pytest
import regex
import torch
from conftest import END, PAD, ids, off, toy

import data
from common import InputError
from data import Batches, encode_records, rates, read_records, tokenizer, trim
from model import logprobs
from puns import world
from sft import loss_of

# -----------------------------------------------------------------------------
# tokenizer

TEXTS = ["", " ", "About a banker:", " I lost interest.", "  two  spaces \n\n\t", "naïve café, Straße", "日本語のダジャレ", "😀👩‍🚀🏳️‍🌈", "\x00\x01\x7f\x1b[0m",
         "é vs e\u0301", "<|end|>", "a<|end|>b <|endoftext|>", "\u202eright to left", "\ufeffBOM", "don't, we'll, I'd", "1234 5,6.7", "\U0010ffff"]


def test_round_trip_of_any_text(tok):
    rng = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]       # all of Unicode but the surrogates, which are no characters
    for text in TEXTS + ["".join(map(chr, rng.choices(points, k=20))) for _ in range(200)]:
        ids = tok.encode(text)
        assert tok.decode(ids) == text and all(0 <= i < tok.end_id for i in ids), text


def test_special_ids(tok):
    """The end token's name in a text is text; pad is not end, and one past the last token that a model can emit."""
    assert tok.end_id not in tok.encode("the <|end|> is near") and len(tok.encode("<|end|>")) > 1
    assert tok.pad_id != tok.end_id and tok.pad_id == tok.vocab_size == tok.end_id + 1


def test_decode_stops_at_the_end_and_skips_pads(tok):
    a, b = tok.encode(" interest"), tok.encode(" junk")
    assert tok.decode([tok.pad_id, tok.pad_id, *a, tok.end_id, *b, tok.pad_id]) == " interest"
    assert tok.decode(torch.tensor([*a, tok.pad_id])) == " interest"
    assert tok.decode([0, *a]) == tok.decode([0]) + " interest"      # token 0 is a token


def test_one_text_has_few_tokens(tok):
    """The ranks are made of this corpus: a completion is shorter than a third of its letters."""
    texts = [record["completion"] for record in world().corpus(200, seed=0)]
    assert sum(len(tok.encode(text)) for text in texts) < sum(map(len, texts)) / 3


def test_unknown_tokenizer():
    with pytest.raises(InputError, match="--tokenizer is puns or gpt2, not 'nope'|nope"):
        tokenizer("nope")


def test_rebuilt_ranks_are_seen(tmp_path, monkeypatch):
    """tiktoken's own loader keeps a copy of each path it read, and would go on with the old ranks."""
    monkeypatch.setattr(data, "RANKS", tmp_path / "puns.tiktoken")
    for merge in (b"ab", b"ba"):
        lines = [base64.b64encode(token).decode() for token in [bytes([i]) for i in range(256)] + [merge]]
        data.RANKS.write_text("".join(f"{line} {rank}\n" for rank, line in enumerate(lines)))
        assert data.Tokenizer("puns").encode(merge.decode()) == [256]


def test_bpe_by_hand():
    """Words: "ab" and " ab" x 2 in "ab ab ab", "abc" once -> a-b four times, then " "-ab twice, then ab-c once.
    Ties go to the pair with the larger bytes."""
    ranks = data.train_bpe(["ab ab ab", "abc"], 259)
    assert list(ranks)[:256] == [bytes([i]) for i in range(256)] and list(ranks.values()) == list(range(259))
    assert list(ranks)[256:] == [b"ab", b" ab", b"abc"]
    assert len(data.train_bpe(["ab"], 1000)) == 257                      # no pair is left to join
    assert b"aa" in data.train_bpe(["aaaa"], 258) and b"aaaa" in data.train_bpe(["aaaa"], 258)


def test_bpe_across_words_by_hand():
    """Pieces "ab ab.", " ab ab." and "ab ab", once each: "ab"-" ab" stands twice (as " ab"-"." does: the larger bytes go first),
    then all is there once. Nothing is joined across the full stop."""
    words = {bytes([i]): i for i in range(256)} | {b"ab": 256, b" ab": 257}
    ranks = data.train_bpe(["ab ab. ab ab.", "ab ab"], 300, data.SENTENCES, words)
    assert list(ranks)[256:] == [b"ab", b" ab", b"ab ab", b"ab ab.", b" ab.", b" ab ab."] and list(ranks.values()) == list(range(262))
    # a pair that makes a token which is there already gets no second rank: all ranks stay different
    ranks = data.train_bpe(["x y x y"], 259, data.SENTENCES, {bytes([i]): i for i in range(256)} | {b"x y": 256})
    assert list(ranks.values()) == list(range(len(ranks))) and list(ranks)[256:] == [b"x y", b"x "]


def test_bpe_brute_force():
    """The next merge is the pair that is most frequent among neighbors, counted anew over the whole text each time."""
    texts = [record["completion"] for record in world().corpus(30, seed=1)]
    words = [[bytes([b]) for b in word.encode()] for text in texts for word in regex.findall(data.WORDS, text)]
    for token in list(data.train_bpe(texts, 256 + 15))[256:]:
        pairs = [pair for parts in words for pair in zip(parts, parts[1:], strict=False)]
        best = max(set(pairs), key=lambda pair: (pairs.count(pair), pair))
        assert token == best[0] + best[1]
        for parts in words:
            for i in range(len(parts) - 1):
                if tuple(parts[i:i + 2]) == best:
                    parts[i:i + 2] = [token, b""]       # the empty one goes, so that nothing is joined twice
            parts[:] = filter(None, parts)

# -----------------------------------------------------------------------------
# records

GOOD = {"completion": {"prompt": "p", "completion": " c"}, "preference": {"prompt": "p", "chosen": " a", "rejected": " b"},
        "ranking": {"prompt": "p", "ranked": [" a", " b", " c"]}, "rating": {"prompt": "p", "completion": " c", "rating": 3.5},
        "prompt": {"prompt": "p"}}


@pytest.mark.parametrize("shape, more", [*((shape, {}) for shape in GOOD), ("preference", {"margin": 2, "share": 0.5})])
def test_good_records_are_read_as_they_are(tmp_path, shape, more):
    path = tmp_path / "good.jsonl"
    path.write_text("\n" + (json.dumps(GOOD[shape] | more) + "\r\n") * 2 + "\n", encoding="utf-8")
    assert read_records(path, shape) == [GOOD[shape] | more] * 2


@pytest.mark.parametrize("shape, line, reason", [
    ("completion", b'{"prompt": "p", "completion": " c"', "delimiter"),                       # cut off: JSON's own words
    ("completion", b'not json', "Expecting value"),
    ("completion", b'["p", "c"]', "not a JSON object"),
    ("preference", b'{"prompt": "p", "chosen": " a", "rejected": " b", "share": 0.4}', "'share' is from .5 (a tie) to 1"),
    ("completion", b'{"prompt": "p", "completion": "\xff\xfe"}', "not UTF-8"),
    ("completion", b'{"prompt": "p"}', "this line has prompt, the file began with completion + prompt"),
    ("completion", b'{"prompt": "", "completion": " c"}', "the prompt is empty"),
    ("completion", b'{"prompt": "p", "completion": "  "}', "an answer is empty"),
    ("completion", b'{"prompt": "p", "completion": 7}', "'completion' is not text"),
    ("completion", b'{"prompt": "p", "completion": null}', "'completion'"),
    ("completion", b'{"prompt": "p", "completion": " c", "label": 1}', "this line has completion + label + prompt"),
    ("preference", b'{"prompt": "p", "chosen": " a", "rejected": " a"}', "chosen and rejected are the same"),
    ("preference", b'{"prompt": "p", "chosen": " a"}', "chosen + prompt is no shape of a record"),
    ("preference", b'{"prompt": "p", "chosen": " a", "rejected": " b", "margin": "big"}', "'margin' is not a number"),
    ("ranking", b'{"prompt": "p", "ranked": [" a"]}', "'ranked'"),
    ("ranking", b'{"prompt": "p", "ranked": [" a", " b", " a"]}', "two of the ranked answers are the same text"),
    ("ranking", b'{"prompt": "p", "ranked": [" a", 3, " b"]}', "'ranked'"),
    ("rating", b'{"prompt": "p", "completion": " c", "rating": "5"}', "'rating' is not a number"),
    ("rating", b'{"prompt": "p", "completion": " c", "rating": NaN}', "not JSON: "),
    ("rating", b'{"prompt": "p", "completion": " c", "rating": true}', "'rating' is not a number"),
    ("prompt", b'{"prompt": "p", "completion": " c"}', "this line has completion + prompt, the file began with prompt"),
])
def test_a_bad_line_is_named_with_file_line_and_reason(tmp_path, shape, line, reason):
    path = tmp_path / "bad.jsonl"
    good = json.dumps(GOOD[shape]).encode()
    path.write_bytes(good + b"\n\n" + good + b"\n" + line + b"\n" + good + b"\n")       # line 4, the blank one counts
    with pytest.raises(InputError) as error:
        read_records(path, shape)
    assert str(error.value).startswith(f"{path}:4: ") and reason in str(error.value)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
UNEQUAL = '{"prompt": "p", "ranked": ["a", "b"]}\n{"prompt": "p", "ranked": ["a", "b", "c"]}\n'


@pytest.mark.parametrize("text, reason", [(None, "cannot be read"), ("\n \n", "no records"), (LFS, "git lfs pull"), (UNEQUAL, "equally many")])
def test_a_bad_file_is_named(tmp_path, text, reason):
    path = tmp_path / "bad.jsonl"
    if text:
        path.write_text(text)
    with pytest.raises(InputError, match=reason) as error:
        read_records(path, "ranking")
    assert str(path) in str(error.value)

# -----------------------------------------------------------------------------
# token ids

def test_prompts_are_padded_left_and_responses_right_behind_the_end(tok):
    records = [{"prompt": "About a banker:", "completion": " no"}, {"prompt": "Hi", "completion": " I used to be a banker, but no."}]
    encoded = encode_records(records, "puns", ["prompt", "completion"], 48)
    for i, record in enumerate(records):
        prompt, completion = tok.encode(record["prompt"]), tok.encode(record["completion"]) + [tok.end_id]
        row = encoded["prompt"][i].tolist()
        assert row == [tok.pad_id] * (len(row) - len(prompt)) + prompt
        row = encoded["completion"][i].tolist()
        assert row == completion + [tok.pad_id] * (len(row) - len(completion))
    assert encoded["prompt"].shape == (2, max(len(tok.encode(r["prompt"])) for r in records))


def test_too_long_or_nothing_is_said(tok):
    short, long = {"prompt": "About a banker:", "completion": " no"}, {"prompt": "About a banker:", "completion": " no" * 50}
    size = len(tok.encode(long["prompt"])) + len(tok.encode(long["completion"])) + 1      # + 1: the end token
    encode_records([short, long], "puns", ["prompt", "completion"], size)
    for records, reason in (([short, long], f"here: record 2 has {size} tokens.*holds {size - 1}"), ([], "here: no records")):
        with pytest.raises(InputError, match=reason):
            encode_records(records, "puns", ["prompt", "completion"], size - 1, "here")


def test_trim():
    rows = ids([PAD, PAD, 1], [PAD, 2, 3])
    assert trim(rows.int(), PAD, "left").tolist() == [[PAD, 1], [2, 3]] and trim(rows.int(), PAD, "left").dtype == torch.int64
    assert trim(ids([1, PAD, PAD], [2, 3, PAD]), PAD, "right").tolist() == [[1, PAD], [2, 3]]
    assert trim(ids([0, PAD], [0, PAD]), PAD, "right").tolist() == [[0], [0]]              # token 0 is no pad


def test_token_zero_counts():
    """Id 0 is a token like any other: in the loss, and finite where nothing else is there."""
    model = toy()
    prompt, completion = ids([0, 0]), ids([0, 0, END])
    loss, nats = loss_of(model, {"prompt": prompt, "completion": completion})
    logp = model.logits(prompt, completion).log_softmax(-1)
    assert nats.item() == pytest.approx(-sum(logp[0, t, completion[0, t]].item() for t in range(3)), abs=1e-4)
    assert loss.item() == pytest.approx(nats.item() / 3, abs=1e-5)

# -----------------------------------------------------------------------------
# batches

def some_rows(n=23, seed=0):
    """n rows, the first token of each response is the row's number."""
    generator = torch.Generator().manual_seed(seed)
    response = torch.full((n, 6), 99)
    for i in range(n):
        response[i, :1 + torch.randint(5, (1,), generator=generator).item()] = i
    return {"prompt": torch.arange(n)[:, None].repeat(1, 2), "completion": response, "margin": torch.arange(n) / 10}


def make_batches(seed=3, batch_size=4):
    return Batches(some_rows(), batch_size, 99, torch.device("cpu"), seed)


def test_each_record_at_most_once_an_epoch():
    batches = make_batches()
    assert batches.n == 5                                           # 23 // 4
    epochs = []
    for _ in range(12):
        rows = [batches.next()["prompt"][:, 0].tolist() for _ in range(5)]
        flat = [i for row in rows for i in row]
        assert len(set(flat)) == 20 and all(len(row) == 4 for row in rows)
        epochs.append(flat)
    assert len({tuple(epoch) for epoch in epochs}) == 12            # each in an order of its own
    assert {i for epoch in epochs for i in epoch} == set(range(23))  # what one epoch leaves out another one has


def test_fields_stay_together_and_columns_of_pads_are_dropped():
    batches = make_batches()
    for _ in range(10):
        batch = batches.next()
        rows = batch["prompt"][:, 0]
        assert (batch["completion"][:, 0] == rows).all()
        torch.testing.assert_close(batch["margin"], rows / 10)
        assert (batch["completion"] != 99).any(0).all()             # no column that is all pads


def test_a_state_goes_on_where_it_stood():
    for steps in (0, 1, 5, 8):
        first = make_batches()
        for _ in range(steps):
            first.next()
        second = make_batches()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for _ in range(12):
            a, b = first.next(), second.next()
            assert all(torch.equal(a[field], b[field]) for field in a)


def test_seeds_of_batches_and_too_few_records():
    a, b, c = (make_batches(seed=seed).next()["prompt"].tolist() for seed in (3, 3, 4))
    assert a == b != c
    with pytest.raises(InputError, match="lower --batch_size"):
        make_batches(batch_size=24)

# -----------------------------------------------------------------------------
# what a model writes

def test_write_gives_a_text_a_prompt_and_leaves_the_mode(tiny, tok):
    prompts = [world().prompt(thing) for thing in world().things[:7]]
    for mode in (True, False):
        tiny.train(mode)
        texts = [data.write(tiny, tok, prompts, torch.Generator().manual_seed(0), off, batch_size=3, max_new_tokens=5) for _ in range(2)]
        assert texts[0] == texts[1] and len(texts[0]) == 7 and all(isinstance(text, str) for text in texts[0]) and tiny.training == mode


def test_a_prompt_that_fills_the_block_is_said(tiny, tok):
    """It leaves no room for a response (defect 10: a NaN, or junk)."""
    prompt = " no" * 60
    while len(tok.encode(prompt)) > tiny.config.block_size:
        prompt = prompt[:-1]
    with pytest.raises(InputError):
        list(data.generate(tiny, tok, [prompt], None, off))


def test_measure_of_a_policy_against_itself_and_another(tiny, tok):
    """kl is log pi - log pi_ref summed over the response: 0 against itself, and the same as by hand against another model."""
    prompts = ["About a banker:", "Hi"]
    rows = data.measure(tiny, tiny, tok, prompts, torch.Generator().manual_seed(0), off, max_new_tokens=6)
    assert rates(rows)["kl"] == 0 and [row["prompt"] for row in rows] == prompts
    other = toy(seed=5, vocab_size=tok.vocab_size, end_id=tok.end_id, block_size=48)
    scores = iter([torch.tensor([3.0, 5.0])])
    rows = data.measure(tiny, other, tok, prompts, torch.Generator().manual_seed(0), off, scorer=lambda p, r: next(scores), max_new_tokens=6)
    (prompt, response), = data.generate(tiny, tok, prompts, torch.Generator().manual_seed(0), off, max_new_tokens=6)
    kl = (logprobs(tiny, prompt, response) - logprobs(other, prompt, response)).sum(1)
    assert [row["kl"] for row in rows] == pytest.approx(kl.tolist()) and rates(rows)["kl"] == pytest.approx(kl.mean().item())
    assert rates(rows)["score"] == 4 and rates(rows)["length"] == sum((row != tok.pad_id).sum().item() for row in response) / 2


def test_rates_count_a_pun_only_where_it_is_on_topic(tok):
    """And the judge is asked only about prompts of the pun world; distinct is the share of different texts."""
    w = world()
    thing, other = w.things[0], next(t for t in w.things if t.topic != w.things[0].topic)
    text = " " + w.write(random.Random(0), thing, "pun")
    texts = [(w.prompt(thing), text), (w.prompt(other), text), (w.prompt(thing), " no"), ("Hello:", text)]
    encoded = encode_records([{"prompt": p, "completion": c} for p, c in texts], "puns", ["prompt", "completion"], 64)
    rows = data.describe(tok, encoded["prompt"], encoded["completion"], torch.arange(4.0))
    assert "pun" not in rows.pop() and rates(rows) | {"novel": 0, "length": 0} == {
        "fluent": 2 / 3, "on_topic": 1 / 3, "pun": 1 / 3, "distinct": 2 / 3, "kl": 1.0, "novel": 0, "length": 0}
    assert data.show(rows).splitlines()[0].startswith("  pun |") and len(data.show(rows, 2).splitlines()) == 2
