"""Tokenizer, records, batches, and what a model writes."""

import base64
import dataclasses
import json
import math
import random
import re
import types

import pytest
import tiktoken
import torch
from conftest import PAD, awake, close, ids, off, records, refuses, toy

import data
from common import InputError
from data import Batches, encode_records, measure, read_records, tokenizer, tokenizer_of
from model import RewardModel, logprobs
from puns import world

# -----------------------------------------------------------------------------
# tokenizer

TEXTS = ["", " ", "About a banker:", "  two  spaces \n\n\t", "naïve café", "日本語", "👩‍🚀🏳️‍🌈",
         "\x00\x01\x7f\x1b[0m", "é vs e\u0301", "a<|end|>b <|endoftext|>", "\ufeffBOM",
         "\u202eright to left", "don't, we'll, I'd", "1234 5,6.7", "\U0010ffff"]


def test_any_text_comes_back(tok):
    rng = random.Random(0)
    characters = [*range(0xD800), *range(0xE000, 0x110000)]     # all of Unicode but surrogates
    random_texts = ["".join(map(chr, rng.choices(characters, k=20))) for _ in range(100)]
    for text in TEXTS + random_texts:
        tokens = tok.encode(text)
        assert tok.decode(tokens) == text
        assert all(0 <= i < tok.eos_token_id for i in tokens)   # the end token's name is plain text


def test_decode_stops_at_the_end_and_skips_pads(tok):
    pad, eos = tok.pad_token_id, tok.eos_token_id
    assert pad == tok.vocab_size == eos + 1
    a, b = tok.encode(" interest"), tok.encode(" junk")
    assert tok.decode([pad, pad, *a, eos, *b, pad]) == " interest"
    assert tok.decode(torch.tensor([*a, pad])) == " interest"
    assert tok.decode([0, *a]) == tok.decode([0]) + " interest"         # token 0 is a token
    assert len(tok.encode(" I used to be a banker.")) <= 4              # tokens may span words


def test_rebuilt_ranks_are_seen_and_models_of_the_old_ones_refused(tmp_path, monkeypatch, tok):
    model = toy()
    model.tokenizer, model.tokenizer_fingerprint = "puns", tok.fingerprint
    assert tokenizer_of(model).fingerprint == tok.fingerprint
    monkeypatch.setitem(data.RANKS, "puns", tmp_path / "puns.tiktoken")
    for merge in (b"ab", b"ba"):
        tokens = [bytes([i]) for i in range(256)] + [merge]
        lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
        data.RANKS["puns"].write_text("".join(lines), encoding="utf-8")
        assert data.Tokenizer("puns").encode(merge.decode()) == [256]
    model.tokenizer_fingerprint = data.Tokenizer("puns").fingerprint
    refuses("is not the one that the model was trained with", tokenizer_of, model)


def test_a_tokenizer_that_is_not_there(monkeypatch, tmp_path):
    refuses("there is no tokenizer 'nope'", tokenizer, "nope")
    with pytest.raises(InputError, match="records.jsonl: this file is no tokenizer.json: "):
        tokenizer(records(tmp_path / "records.jsonl", [{"prompt": "p"}]), 1, 2)

    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    refuses("could not fetch the gpt2 tokenizer.*no route", data.Tokenizer, "gpt2")


def test_of_a_tokenizer_json_the_tokens_of_the_text_are_taken(tmp_path):
    """No begin token, and no truncation, whatever the file asks for. Another file is noticed."""
    tokenizers, path = pytest.importorskip("tokenizers"), tmp_path / "tokenizer.json"
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, "a"))
    theirs.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 0)])
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fingerprints = set()
    for longest in (2, 3):
        theirs.enable_truncation(longest)
        theirs.save(str(path))
        tok = data.Tokenizer(str(path), eos_token_id=1, vocab_size=3)
        assert tok.encode("a a a a") == [2, 2, 2, 2]
        fingerprints.add(tok.fingerprint)
    assert len(fingerprints) == 2

# -----------------------------------------------------------------------------
# records

COMPLETION = ["prompt", "completion"]
PREFERENCE = ["prompt", "chosen", "rejected"]
GOOD = {"prompt": "p", "completion": " c", "chosen": " a", "rejected": " b",
        "ranked": [" a", " b", " c"], "rating": 3.5}


@pytest.mark.parametrize("fields", [
    COMPLETION, PREFERENCE, ["prompt", "ranked"], [*COMPLETION, "rating"], ["prompt"]])
def test_good_records_are_read_as_they_are(tmp_path, fields):
    """Blank lines, CRLF and a byte order mark do no harm; fields that nobody asked for are left."""
    path, extra = tmp_path / "good.jsonl", {"margin": 2, "share": 0.5}
    path.write_bytes(b"\xef\xbb\xbf\r\n" + (json.dumps(GOOD | extra) + "\r\n").encode() * 2)
    expected = {field: GOOD[field] for field in fields} | extra
    assert read_records(path, fields) == [expected | {"where": f"{path}:{n}"} for n in (2, 3)]


@pytest.mark.parametrize("fields, line, reason", [
    (COMPLETION, '{"prompt": "p", "completion": " c"', "is not JSON .*python -m real.corpora"),
    (COMPLETION, '["p", "c"]', "is not a JSON object"),
    (COMPLETION, "[" * 100_000, "this line is not JSON"),
    (COMPLETION, b'{"prompt": "p", "completion": "\xff"}', "byte 32 is not UTF-8"),
    (COMPLETION, '{"prompt": "p"}', "'completion' is missing, only prompt is there; records of "
                                    r"prompt \+ completion are needed"),
    (COMPLETION, {"prompt": ""}, "'prompt' is empty"),
    (COMPLETION, {"completion": " \n"}, "'completion' is empty"),
    (COMPLETION, {"completion": None}, "'completion' must be text"),
    (PREFERENCE, {"rejected": " a "}, "two answers are the same text"),
    (PREFERENCE, {"share": 0.4}, "'share' must be from 0.5"),
    (PREFERENCE, {"share": 1.1}, "'share' must be from 0.5"),
    (PREFERENCE, {"margin": "big"}, "'margin' must be a number"),
    (["ranked"], {"ranked": [" a"]}, "'ranked' must be a list of two texts or more"),
    (["ranked"], {"ranked": " ab"}, "'ranked' must be a list of two texts or more"),
    (["ranked"], {"ranked": [" a", " b", " a"]}, "two answers are the same text"),
    (["ranked"], {"ranked": [" a", 3]}, "'ranked' must be text"),
    (["rating"], {"rating": "5"}, "'rating' must be a number"),
    (["rating"], {"rating": True}, "'rating' must be a number"),
    (["rating"], '{"rating": NaN}', "NaN is not a number"),
    (["rating"], '{"rating": 1e999}', "'rating' must be a number from -1e9 to 1e9"),
    (["rating"], {"rating": 10 ** 400}, "'rating' must be a number from -1e9 to 1e9")])
def test_a_bad_line_is_named_with_file_line_and_reason(tmp_path, fields, line, reason):
    path, good = tmp_path / "bad.jsonl", json.dumps(GOOD).encode()
    if isinstance(line, dict):
        line = json.dumps(GOOD | line)
    line = line.encode() if isinstance(line, str) else line
    path.write_bytes(good + b"\n\n" + good + b"\n" + line + b"\n" + good)       # line 4
    refuses(f"^{re.escape(str(path))}:4: .*{reason}", read_records, path, fields)


def test_a_bad_file_is_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n", encoding="utf-8")
    for name, reason in (("empty.jsonl", "has no records"), ("none.jsonl", "cannot be read: No")):
        refuses(f"{name}: .*{reason}", read_records, tmp_path / name, COMPLETION)


def test_a_tenth_is_held_out_and_nothing_of_it_is_trained_on(tmp_path):
    """The same tenth whatever the order of the file, and in each run of Python, where hash() gives
    other numbers; equal records are on one side."""
    def split(rows, val_data=""):
        path = records(tmp_path / "data.jsonl", rows)
        config = types.SimpleNamespace(data=path, val_data=val_data)
        return [sorted(row["prompt"] for row in part)
                for part in data.train_and_val(config, COMPLETION)]

    rows = [{"prompt": f"p{i % 26}", "completion": f" c{i % 26}"} for i in range(130)]
    train, val = split(rows)
    assert len(train + val) == 130 and len(val) in (10, 13, 15) and not set(train) & set(val)
    assert split(rows[::-1]) == [train, val]
    assert split(rows[:26])[1] == ["p15", "p19"]
    assert [len(part) for part in split(rows[:3])] == [2, 1]    # of few records one
    two = records(tmp_path / "val.jsonl", rows[:2])
    assert [len(part) for part in split(rows, two)] == [130, 2]
    many = [{"prompt": "p", "completion": f" c{i}"} for i in range(10_050)]
    assert [len(part) for part in split(many)] == [9050, 1000]  # of many at most 1,000
    refuses("one record is too few: .*--val_data", split, rows[:1])

# -----------------------------------------------------------------------------
# token ids

def test_prompts_are_padded_left_and_responses_right_after_their_end(tok):
    rows = [{"prompt": "About a banker:", "completion": " no"},
            {"prompt": "Hi", "completion": " I used to be a banker, but no."}]
    encoded = encode_records(rows, tok, COMPLETION, 48)
    pad, eos = tok.pad_token_id, tok.eos_token_id
    for i, row in enumerate(rows):
        prompt, completion = tok.encode(row["prompt"]), [*tok.encode(row["completion"]), eos]
        found = encoded["prompt"][i].tolist()
        assert found == [pad] * (len(found) - len(prompt)) + prompt
        found = encoded["completion"][i].tolist()
        assert found == completion + [pad] * (len(found) - len(completion))
    assert all((tokens != pad).any(dim=0).all() for tokens in encoded.values())     # no wider
    assert data.trim(ids([PAD, PAD]), PAD, "left").tolist() == [[PAD]]              # never empty
    assert data.trim(ids([0, 0, PAD]), PAD, "right").tolist() == [[0, 0]]           # 0 is no pad
    widths = {"prompt": torch.zeros(1, 50), "chosen": torch.zeros(1, 40), "rejected": ids([0])}
    assert data.longest(widths | {"margin": torch.zeros(1)}) == 40


def test_a_record_without_room_is_named(tok):
    rows = [{"where": f"f:{i + 1}", "prompt": "About a banker:", "completion": " no" * n}
            for i, n in enumerate([1, 50])]
    n_prompt = len(tok.encode("About a banker:"))
    length = n_prompt + len(tok.encode(" no" * 50)) + 1         # the end token
    encode_records(rows, tok, COMPLETION, length)
    reason = f"f:2: {length} tokens of prompt and completion, .* block holds {length - 1}"
    refuses(reason, encode_records, rows, tok, COMPLETION, length - 1)
    prompt = [{"prompt": "About a banker:"}]
    encode_records(prompt, tok, ["prompt"], n_prompt + 3, reserve=3)
    with pytest.raises(InputError, match="the prompt 'About a banker:': .* a response, .* block"):
        encode_records(prompt, tok, ["prompt"], n_prompt + 2, reserve=3)
    refuses("no records", encode_records, [], tok, COMPLETION, 48)

# -----------------------------------------------------------------------------
# batches

def batches_of(n=23, batch_size=4, seed=3):
    """Records that consist of their own number, 1 to 6 times in prompt and completion each."""
    n_tokens = 1 + torch.randint(6, (n, 1), generator=torch.Generator().manual_seed(0))
    completion = torch.where(torch.arange(6) < n_tokens, torch.arange(n)[:, None], 9999)
    encoded = {"prompt": completion.flip(1), "completion": completion,
               "margin": torch.arange(n) / 10}
    return Batches(encoded, batch_size, 9999, torch.device("cpu"), seed)


def numbers(batch):
    return batch["prompt"][:, -1].tolist()


def test_few_shapes_are_powers_of_two():
    encoded = batches_of().encoded
    batches = Batches(encoded, 1, 9999, "cpu", 0, few_shapes=True)
    for i, batch in enumerate(batches.in_order(1)):
        n_tokens = batches.lengths[i].item() // 2               # of each field, at most 6
        width = min(2 ** math.ceil(math.log2(n_tokens)), 6)
        assert [batch[field].size(1) for field in COMPLETION] == [width] * 2
        assert numbers(batch) == [i]


def test_the_checksum_is_of_all_fields():
    sums = {Batches({"prompt": ids([a]), "completion": ids([b])}, 1, PAD, "cpu", 0).checksum
            for a, b in ((1, 2), (3, 2), (1, 4))}
    assert len(sums) == 3


def test_each_record_comes_at_most_once_an_epoch():
    batches, epochs = batches_of(), []
    for _ in range(12):
        rows = [numbers(batches.next()) for _ in range(23 // 4)]
        assert [len(row) for row in rows] == [4] * 5
        epochs.append(tuple(sum(rows, [])))
        assert len(set(epochs[-1])) == 20
    assert len(set(epochs)) == 12                               # each in an order of its own
    assert set(sum(epochs, ())) == set(range(23))               # the rest has its turn later
    assert numbers(batches_of().next()) != numbers(batches_of(seed=4).next())


def test_few_records_repeat_in_a_batch(capsys):
    """Each of 3 records comes twice or three times in a batch of 8, and two of them in one of 2."""
    batches, seen = batches_of(n=3, batch_size=8), []
    for _ in range(9):
        rows = numbers(batches.next())
        assert len(rows) == 8 and sorted(map(rows.count, range(3))) == [2, 3, 3]
        seen.append(rows)
    assert len(set(map(tuple, seen))) > 1
    assert capsys.readouterr().out == "a batch of 8 repeats records: the data has 3\n"
    assert len(set(numbers(batches_of(n=3, batch_size=2).next()))) == 2
    assert not capsys.readouterr().out
    refuses("too few records", batches_of, n=0)


def test_fields_travel_together_and_columns_of_pads_are_dropped():
    batches = batches_of()
    for batch in [*(batches.next() for _ in range(10)), *batches.in_order(10)]:
        assert batch["completion"][:, 0].tolist() == numbers(batch)
        close(batch["margin"], batch["completion"][:, 0] / 10)
        assert all((batch[field] != 9999).any(dim=0).all() for field in ("prompt", "completion"))
    assert sum(map(numbers, batches.in_order(10)), []) == [*range(23)]


def test_texts_of_one_length_share_a_batch():
    """One pool of 32 batches: sorted and cut, so that no two of them overlap; then shuffled."""
    batches, ranges = batches_of(n=32 * 4), []
    for _ in range(32):
        lengths = batches.lengths[numbers(batches.next())]
        ranges.append((lengths.min().item(), lengths.max().item()))
    assert ranges != sorted(ranges)
    ranges.sort()
    assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False))

# -----------------------------------------------------------------------------
# what a model writes

PROMPTS = ["About a banker:", "Hi", "Why not, dear old friend of mine?", "No?", "About a nurse:"]


@pytest.mark.parametrize("training", [True, False])
def test_each_prompt_gets_a_completion_in_eval_mode(tiny_model, tok, training):
    sizes = dataclasses.asdict(tiny_model.config) | {"dropout": 0.5}
    model, how = awake(toy(**sizes)).train(training), dict(temperature=0, max_new_tokens=5)
    written = [*data.respond(model, tok, PROMPTS, None, off, batch_size=2, **how)]
    assert [response.size(0) for _, response in written] == [2, 2, 1]
    assert [tok.decode(row) for prompt, _ in written for row in prompt] == PROMPTS
    texts = data.complete(model, tok, PROMPTS, None, off, **how)
    assert texts == [tok.decode(row) for _, response in written for row in response]
    assert model.training == training


def test_a_response_gets_the_room_that_its_own_prompt_leaves(tiny_model, tok):
    """A long prompt shortens no other response, and nothing is shortened without need."""
    sizes, n = dataclasses.asdict(tiny_model.config), len(tok.encode(PROMPTS[2]))
    model = toy(**sizes | {"block_size": n + 2})
    rooms = [response.size(1) for _, response in data.respond(model, tok, PROMPTS, None, off)]
    assert rooms == [n + 2 - len(tok.encode(prompt)) for prompt in PROMPTS] and rooms[2] == 2
    (_, together), = data.respond(model, tok, PROMPTS, None, off, max_new_tokens=2)
    assert together.shape == (5, 2)
    with pytest.raises(InputError, match="the prompt 'Why not, .* block holds"):
        [*data.respond(toy(**sizes | {"block_size": n}), tok, PROMPTS, None, off)]


def test_measure_by_hand(tiny_model, tok, monkeypatch):
    """kl is that of the sampled distribution; the reference has its temperature but no filter."""
    torch.manual_seed(0)
    policy, reference = awake(tiny_model), awake(toy(5, **dataclasses.asdict(tiny_model.config)))
    reward_model, how = RewardModel(reference), dict(temperature=0.7, top_k=50, top_p=0.9)

    def rng():
        return torch.Generator().manual_seed(0)

    rows = measure(policy, reference, tok, PROMPTS, rng(), off, reward_model, **how)
    (prompt, response), = data.respond(policy, tok, PROMPTS, rng(), off, **how)
    kl = logprobs(policy, prompt, response, **how) - logprobs(reference, prompt, response, 0.7)
    scores = reward_model(prompt, response)
    for i, row in enumerate(rows):
        assert (row["prompt"], row["text"]) == (PROMPTS[i], tok.decode(response[i]))
        assert row["kl"] == pytest.approx(kl[i].sum().item(), abs=1e-4)
        assert row["score"] == pytest.approx(scores[i].item(), abs=1e-5)
        assert row["length"] == (response[i] != tok.pad_token_id).sum().item()
    def off_by_rounding(model, prompt, response, temperature=1.0, top_k=0, top_p=1.0):
        logp = logprobs(model, prompt, response, temperature)
        return torch.full_like(logp, -math.inf) if top_k else logp

    monkeypatch.setattr(data, "logprobs", off_by_rounding)      # outside the filter, it seems
    edge = measure(policy, reference, tok, PROMPTS, rng(), off, reward_model, **how)
    monkeypatch.undo()
    plain = logprobs(policy, prompt, response, 0.7) - logprobs(reference, prompt, response, 0.7)
    assert [row["kl"] for row in edge] == pytest.approx(plain.sum(dim=1).tolist(), abs=1e-4)
    greedy = measure(policy, reference, tok, PROMPTS, None, off, temperature=0)
    assert all(0 < row["kl"] < 1e4 for row in greedy)           # the reference is not greedy
    assert measure(policy, policy, tok, PROMPTS, None, off)[0]["kl"] == 0
    assert "kl" not in measure(policy, None, tok, PROMPTS, None, off)[0]


def test_a_pun_counts_only_where_it_is_on_topic(tok):
    """And the judge is asked only about prompts of the pun world."""
    thing = world().things[0]
    other = next(t for t in world().things if t.topic != thing.topic)
    pun = " " + world().write(random.Random(0), thing, "pun")
    plain = " " + world().write(random.Random(0), thing, "literal")
    texts = [(world().prompt(other), pun), (world().prompt(thing), pun),
             (world().prompt(thing), " no"), ("Hello:\n", pun), (world().prompt(thing), plain)]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    encoded = encode_records(rows, tok, COMPLETION, 64)
    rows = data.describe(tok, encoded["prompt"], encoded["completion"], kl=torch.arange(5.0))
    assert [data.verdict_of(row) for row in rows] == ["-", "pun", "-", "-", "ok"]
    found = data.means(rows)
    n_tokens = (encoded["completion"] != tok.pad_token_id).sum().item()
    assert found.pop("length") == n_tokens / 5
    assert found == {"kl": 2, "pun": 1 / 4, "on_topic": 2 / 4, "fluent": 3 / 4, "ended": 1,
                     "distinct": 3 / 5}
    cut = data.describe(tok, encoded["prompt"], encoded["completion"][:, :1])
    assert [row["ended"] for row in cut] == [False] * 5
    lines = data.format_samples(rows, n=4).splitlines()         # the pun comes first
    assert lines[0] == f"  pun | {world().prompt(thing)}{pun}  kl +1.00"
    assert len(lines) == 4 and lines[3].startswith("    - | Hello:⏎")


def test_a_model_of_the_large_world_is_asked_and_judged_about_that():
    tok, large = tokenizer("puns_large"), world("puns_large")
    prompts = data.load_prompts(types.SimpleNamespace(data=""), tok)
    assert [row["prompt"] for row in prompts] == list(large.by_prompt)
    encoded = encode_records(large.corpus(50, seed=1), tok, COMPLETION, 64)
    rows = data.describe(tok, encoded["prompt"], encoded["completion"])
    assert all(row["fluent"] and row["on_topic"] for row in rows)
