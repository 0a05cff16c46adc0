"""
The text: tokenizer, records and batches.

Records are dictionaries in the field's standard JSONL, one object a line:

    {"prompt": "About a banker:", "completion": " I used to be a banker, but then I lost interest."}          sft
    {"prompt": "About a banker:", "chosen": " ...", "rejected": " ...", "margin": 1.0}                        preferences
    {"prompt": "About a banker:", "ranked": [" best", " ...", " worst"]}                                      the same for K texts
    {"prompt": "About a banker:", "completion": " ...", "rating": 3.5}                                     ratings
    {"prompt": "About a banker:"}                                                                             prompts alone

The space between prompt and completion belongs to the completion. The end token is not in the file: it is added here.
A preference may have a margin (by how much) and a share (how many of those asked agree; .5 is a tie). By default the records come
from the pun world (puns.py); with --data FILE from a file of these shapes or of any other format that corpora.py knows.

    python data.py train-tokenizer      rebuilds lexicon/puns.tiktoken from the pun world
    python data.py show FILE            what corpora.py makes of a file: counts, lengths, duplicates, what it drops and why
    python data.py fetch semeval        real puns from their public home, after you saw the licence
"""

import base64
import collections
import functools

import regex
import tiktoken
import torch
import tyro

from common import InputError, bar, replacing, run
from corpora import read_records as read_records  # the stages read files through this one door
from corpora import show as show_file
from fetch import fetch
from model import logprobs
from puns import LEXICON, world

RANKS = LEXICON / "puns.tiktoken"
# What may merge, first: within a word, GPT-2's rule (contractions, words with the space before them, numbers, punctuation, space) ...
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# ... and then within a sentence, so that " I used to be a" is one token: https://arxiv.org/abs/2503.13423
SENTENCES = r"""[^.?!]++[.?!"]*+|[.?!"]++"""

# -----------------------------------------------------------------------------
# tokenizer

class Tokenizer:
    """A tiktoken Encoding with an end id and a pad id. The pad id is vocab_size, one past the last token; see model.py."""

    def __init__(self, name="puns"):
        """name: puns (the ranks in lexicon/puns.tiktoken), gpt2 (fetched by tiktoken once), or a model that has a tokenizer.json:
        a folder, or a name on the hub such as google/flan-t5-small."""
        self.name = name
        if name == "puns":
            # not tiktoken's own loader: it keeps a copy elsewhere and would not see the file change
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, RANKS.read_text().splitlines())}
            self.encoding = tiktoken.Encoding("puns", pat_str=SENTENCES, mergeable_ranks=ranks,
                                              special_tokens={"<|end|>": len(ranks)})
            self.end_id = len(ranks)
        elif name == "gpt2":
            try:
                self.encoding = tiktoken.get_encoding("gpt2")
            except Exception as error:   # tiktoken raises whatever its HTTP library does
                raise InputError(f"tiktoken could not fetch the gpt2 tokenizer, which needs a network once: {error}") from None
            self.end_id = self.encoding.eot_token
        else:
            from pretrained import JSONEncoding
            self.encoding = JSONEncoding(name)
            self.end_id = self.encoding.end_id
        self.vocab_size = self.pad_id = self.encoding.n_vocab

    def encode(self, text):
        """Text to ids. A special token's name inside a text is text."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Ids to text, up to the end token, without pads."""
        ids = [i for i in (ids.tolist() if torch.is_tensor(ids) else ids) if i != self.pad_id]
        return self.encoding.decode(ids[:ids.index(self.end_id)] if self.end_id in ids else ids)


@functools.lru_cache(maxsize=4)
def tokenizer(name="puns"):
    return Tokenizer(name)


def train_bpe(texts, vocab_size, pattern=WORDS, ranks=None):
    """Byte-pair encoding: starts from the 256 bytes, or from the tokens in `ranks`, and joins the most frequent neighbors within a piece
    of the pattern, again and again, up to vocab_size tokens. Returns {token bytes: rank}, as tiktoken wants it."""
    ranks = dict(ranks or {bytes([i]): i for i in range(256)})
    start = tiktoken.Encoding("start", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    counts = collections.Counter(piece for text in texts for piece in regex.findall(pattern, text))
    pieces = [([start.decode_single_token_bytes(i) for i in start.encode_ordinary(piece)], n) for piece, n in counts.items()]
    for _ in bar(range(vocab_size - len(ranks)), "tokens", vocab_size - len(ranks), least=100):
        pairs = collections.Counter()
        for parts, n in pieces:
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(best[0] + best[1], len(ranks))       # others may have made the same token
        for parts, _ in pieces:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i:i + 2] = [best[0] + best[1]]
                i += 1
    return ranks


def train_tokenizer(words: int = 3871, vocab_size: int = 4095, n: int = 50_000):
    """Rebuild lexicon/puns.tiktoken on n sentences of the pun world: `words` tokens within words, then up to vocab_size whatever words
    stand together most often; the end token comes on top."""
    texts = [text for record in world().corpus(n, seed=0) for text in record.values()]
    ranks = train_bpe(texts, vocab_size, SENTENCES, train_bpe(texts, words))
    with replacing(RANKS) as path:
        path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    lengths = [len(tokenizer("puns").encode(text)) for text in texts[:2000]]
    print(f"{RANKS}: {len(ranks)} tokens, {sum(lengths) / len(lengths):.1f} a text")

# -----------------------------------------------------------------------------
# token ids

def encode_records(records, name, fields, block_size, where="the data"):
    """Token ids of the texts in the given fields, padded to the longest: {field: (N, longest)}. Prompts are padded on the left; the
    others end with the end token and are padded on the right. Raises InputError if prompt and response exceed block_size."""
    tok, encoded = tokenizer(name), {}
    if not records:
        raise InputError(f"{where}: no records are left to encode, it needs more of them")
    for field in fields:
        texts = dict.fromkeys(record[field] for record in records)       # each text once: prompts come again and again
        known = {text: tok.encode(text) for text in bar(texts, field, len(texts), least=100_000)}
        lists = [known[record[field]] for record in records]
        ends = [] if field == "prompt" else [tok.end_id]
        lengths = torch.tensor([len(ids) + len(ends) for ids in lists])
        columns = torch.arange(lengths.max())
        real = (columns < lengths[:, None]) if ends else (columns >= lengths.max() - lengths[:, None])     # (N, longest)
        encoded[field] = torch.full(real.shape, tok.pad_id, dtype=torch.int32)
        encoded[field][real] = torch.tensor([i for ids in lists for i in ids + ends], dtype=torch.int32)
        total = lengths + (encoded["prompt"] != tok.pad_id).sum(1) * bool(ends)
        if (too_long := total > block_size).any():
            i = too_long.nonzero()[0].item()
            what = f"tokens, prompt and {field} together" if ends else "tokens in its prompt"
            raise InputError(f"{where}: record {i + 1} has {total[i]} {what}, and the model's block "
                             f"holds {block_size}: shorten it, or train a model with a larger --block_size")
    return encoded


def trim(ids, pad_id, side):
    """Drops the columns that are pads in every row of the batch. (B, longest) -> (B, as few as will do), int64"""
    width = (ids != pad_id).sum(1).max().item()
    return (ids[:, ids.size(1) - width:] if side == "left" else ids[:, :width]).long()


class Batches:
    """Endless shuffled batches, each epoch in an order of its own; a state_dict() of the position, so that a run can resume.

    Texts of about one length share a batch (little padding, few different shapes): each pool of 32 batches is sorted by length,
    cut into batches, and these are shuffled again."""

    def __init__(self, encoded, batch_size, pad_id, device, seed):
        self.encoded, self.batch_size, self.pad_id, self.device, self.seed = encoded, batch_size, pad_id, device, seed
        self.lengths = sum((ids != pad_id).sum(1) for ids in encoded.values() if ids.dim() == 2)
        self.n = len(self.lengths) // batch_size     # batches an epoch; what is left over waits for another epoch's order
        if not self.n:
            raise InputError(f"a batch of {batch_size} needs as many records, the data has {len(self.lengths)}: lower --batch_size")
        self.epoch, self.position = -1, self.n

    def shuffle(self, epoch):
        generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        rows = torch.randperm(len(self.lengths), generator=generator)[:self.n * self.batch_size]
        pools = [pool[self.lengths[pool].argsort(stable=True)] for pool in rows.split(32 * self.batch_size)]
        batches = torch.cat(pools).view(self.n, self.batch_size)
        self.epoch, self.order = epoch, batches[torch.randperm(self.n, generator=generator)]

    def take(self, rows):
        """{field: (B, longest)} of the given rows, on the device. A field of one number a record, such as a margin, stays (B,)."""
        return {field: (trim(ids[rows], self.pad_id, "left" if field == "prompt" else "right") if ids.dim() == 2
                        else ids[rows]).to(self.device) for field, ids in self.encoded.items()}

    def next(self):
        if self.position == self.n:
            self.shuffle(self.epoch + 1)
            self.position = 0
        self.position += 1
        return self.take(self.order[self.position - 1])

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        if state["epoch"] >= 0:
            self.shuffle(state["epoch"])
        self.position = state["position"]

# -----------------------------------------------------------------------------
# what a model writes

@torch.no_grad()
def generate(model, tok, prompts, generator, autocast, max_new_tokens=32, batch_size=256, **sampling):
    """Completions of prompts given as strings, in batches: yields (prompt (B, P), response (B, R)), on the model's device."""
    was_training = model.training
    model.eval()
    encoded = encode_records([{"prompt": prompt} for prompt in prompts], tok.name, ["prompt"], model.config.block_size)["prompt"]
    max_new_tokens = min(max_new_tokens, model.config.block_size - encoded.size(1))
    if max_new_tokens < 1:
        raise InputError(f"a prompt of {encoded.size(1)} tokens leaves no room for a response in the model's block")
    for rows in encoded.split(batch_size):
        prompt = trim(rows, tok.pad_id, "left").to(next(model.parameters()).device)
        with autocast():
            response, _ = model.generate(prompt, max_new_tokens, generator=generator, **sampling)
        yield prompt, response
    model.train(was_training)


def write(model, tok, prompts, generator, autocast, **sampling):
    """A completion of each prompt, strings in, strings out."""
    return [tok.decode(row) for _, response in generate(model, tok, prompts, generator, autocast, **sampling) for row in response.cpu()]


def describe(tok, prompt, response, kl=None, score=None):
    """A dictionary for each completion: prompt, text, length in tokens, kl and score (B,) if given, and the judge's verdict where the
    prompt is one of the pun world: fluent, on_topic, pun (on topic, too), novel (and a pair held out of all training)."""
    rows = []
    for i, (p, r) in enumerate(zip(prompt.cpu(), response.cpu(), strict=True)):
        row = {"prompt": tok.decode(p), "text": tok.decode(r), "length": (r != tok.pad_id).sum().item()}
        row |= {name: values[i].item() for name, values in (("kl", kl), ("score", score)) if values is not None}
        if row["prompt"] in world().by_prompt:
            verdict = world().judge(row["prompt"], row["text"])
            row |= {"pun": verdict.on_topic and verdict.pun, "on_topic": verdict.on_topic, "fluent": verdict.fluent,
                    "novel": verdict.on_topic and verdict.novel}
        rows.append(row)
    return rows


def rates(rows):
    """The means of all number columns, over the rows that have them, and `distinct`, the share of different texts."""
    columns = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "text"))
    present = {name: [row[name] for row in rows if name in row] for name in columns}
    return {name: sum(values) / len(values) for name, values in present.items()} | {"distinct": len({row["text"] for row in rows}) / len(rows)}


def show(rows, n=3):
    """n lines for the screen: puns first, if there are any, then whatever comes first."""
    lines = []
    for row in sorted(rows, key=lambda row: not row.get("pun", False))[:n]:
        mark = "pun" if row.get("pun") else "ok" if row.get("on_topic") else ""
        numbers = "".join(f"  {name} {row[name]:+.2f}" for name in ("score", "kl") if name in row)
        lines.append(f"  {mark:>3} | {row['prompt']}{row['text']}".replace("\n", "⏎") + numbers)
    return "\n".join(lines)


@torch.no_grad()
def measure(policy, reference, tok, prompts, generator, autocast, scorer=None, **sampling):
    """Samples a completion of each prompt and describes it; kl = log pi - log pi_ref summed over its tokens, if there is a reference."""
    rows = []
    batches = generate(policy, tok, prompts, generator, autocast, **sampling)
    for prompt, response in bar(batches, "samples", -(-len(prompts) // 256), least=8):
        kl = score = None
        with autocast():
            if reference is not None:
                kl = (logprobs(policy, prompt, response) - logprobs(reference, prompt, response)).sum(dim=1)      # (B,)
            if scorer is not None:
                score = scorer(prompt, response)
        rows += describe(tok, prompt, response, kl, score)
    return rows


if __name__ == "__main__":
    run(lambda: tyro.extras.subcommand_cli_from_dict({"train-tokenizer": train_tokenizer, "show": show_file, "fetch": fetch}))
