"""
The text: tokenizer, records, batches, and what a model writes.

Records are JSON objects, one a line of a UTF-8 file (JSONL), in the field's standard shapes:

    {"prompt": "About a banker:", "completion": " I used to be a banker, but ..."}    sft, gan
    {"prompt": "About a banker:", "chosen": " ...", "rejected": " ..."}               preferences
    {"prompt": "About a banker:", "ranked": [" best", " ...", " worst"]}              rankings
    {"prompt": "About a banker:", "completion": " ...", "rating": 3.5}                ratings
    {"prompt": "About a banker:", "completion": " ...", "label": true}                thumbs up
    {"prompt": "About a banker:"}                                                     prompts

A preference may have a margin (by how much) and a share (of the raters who agree; 0.5 is a tie).
The space between prompt and completion belongs to the completion. The end token is not in the
file: it is added here. Other formats are converted first: python -m real.corpora.
"""

import base64
import functools
import hashlib
import json
import math
import zlib
from pathlib import Path

import tiktoken
import torch

from common import InputError, progress_bar, rank, world_size
from model import logprobs
from puns import WORLDS, world

# {a pun world's tokenizer: its file of merges}
RANKS = {name: folders[-1] / "puns.tiktoken" for name, folders in WORLDS.items()}
# Tokens of the pun world may span words but not sentences: " I used to be a" is one token
# (https://arxiv.org/abs/2503.13423).
SENTENCES = r"""[^.?!]++[.?!"]*+|[.?!"]++"""

# -----------------------------------------------------------------------------
# tokenizer

class Tokenizer:
    """Text to ids and back, with an end token and a pad id of its own.

    pad_token_id is vocab_size, one past the last token; see model.py. Models with a tokenizer of
    a pun world have learned that world, so it is the one to ask them about."""

    def __init__(self, name="puns", eos_token_id=None, vocab_size=None):
        """name: puns or puns_large (of the pun worlds), gpt2 (fetched once by tiktoken), or the
        path of a tokenizer.json, which does not say its own eos_token_id and vocab_size."""
        self.name = name                                    # what a checkpoint stores
        self.path = None            # of the file that a checkpoint must have beside it
        # A pun world's own: a file of merges that is part of the repo.
        if name in RANKS:
            content = RANKS[name].read_bytes()
            # tiktoken's own loader would keep a copy elsewhere, and not see the file change.
            ranks = {base64.b64decode(token): int(rank)
                     for token, rank in map(bytes.split, content.splitlines())}
            self.encoding = tiktoken.Encoding(name, pat_str=SENTENCES, mergeable_ranks=ranks,
                                              special_tokens={"<|end|>": len(ranks)})
            self.eos_token_id = len(ranks)                  # one past the last merge
            self.vocab_size = self.encoding.n_vocab
        # That of the published GPT-2, which tiktoken fetches and keeps.
        elif name == "gpt2":
            content = b"gpt2"
            try:
                self.encoding = tiktoken.get_encoding("gpt2")
            except Exception as error:   # tiktoken raises whatever its HTTP library does
                raise InputError("tiktoken could not fetch the gpt2 tokenizer, which needs a "
                                 f"network once: {error}") from None
            self.eos_token_id = self.encoding.eot_token
            self.vocab_size = self.encoding.n_vocab
        else:
            self.path = Path(name)
            self.encoding = JSONEncoding(self.path, eos_token_id)
            # The file does not say how many ids the model knows, or which of them ends a text.
            content = self.path.read_bytes()
            self.eos_token_id, self.vocab_size = eos_token_id, vocab_size
        self.pad_token_id = self.vocab_size                 # no model can emit it
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

    @property
    def world(self):
        """The pun world of this tokenizer; of one that has none, the small one."""
        return world(self.name if self.name in WORLDS else "puns")

    def encode(self, text):
        """Text to ids, without an end token. A special token's name in a text is plain text."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Ids to text, up to the end token, without pads."""
        ids = ids.tolist() if torch.is_tensor(ids) else ids
        ids = [i for i in ids if i != self.pad_token_id]    # which no encoding knows
        if self.eos_token_id in ids:
            ids = ids[:ids.index(self.eos_token_id)]        # what comes after it was never said
        return self.encoding.decode(ids)


class JSONEncoding:
    """A tokenizer.json (of the tokenizers library) behind the methods of a tiktoken Encoding."""

    def __init__(self, path, eos_token_id):
        try:
            import tokenizers  # here, since pretrained models alone need it
        except ImportError:
            raise InputError("pretrained models need the tokenizers library: "
                             "pip install tokenizers") from None
        if not path.is_file() or eos_token_id is None:
            raise InputError(f"there is no tokenizer '{path}': use puns, puns_large, gpt2, or a "
                             "checkpoint that has its tokenizer.json beside it")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:      # the library raises nothing more special
            raise InputError(f"{path}: this file is no tokenizer.json: {error}") from None
        self.eos_token_id = eos_token_id
        self.tokenizer.encode_special_tokens = True     # a special token's name is plain text
        self.tokenizer.no_truncation()  # a file may ask for it; our limit is block_size

    def encode_ordinary(self, text):
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i != self.eos_token_id]       # T5 would encode "</s>" as its end

    def decode(self, ids):
        first = self.tokenizer.id_to_token(ids[0]) if ids else None
        space = " " if first and first.startswith("▁") else ""     # SentencePiece drops it
        return space + self.tokenizer.decode(ids)


# Reading the merges takes a moment, and a stage asks for each policy that it loads.
@functools.lru_cache(maxsize=4)
def tokenizer(name="puns", eos_token_id=None, vocab_size=None):
    return Tokenizer(name, eos_token_id, vocab_size)


def tokenizer_of(model):
    """The tokenizer of a loaded model. Raises InputError if it has changed since training."""
    if model.tokenizer in (*RANKS, "gpt2"):
        tok = tokenizer(model.tokenizer)
    else:
        tok = tokenizer(model.tokenizer, model.config.eos_token_id, model.config.vocab_size)
    # With other merges the model would read, and write, other words, and no error would say so.
    if tok.fingerprint != model.tokenizer_fingerprint:
        path = tok.path or RANKS.get(tok.name, tok.name)
        raise InputError(f"the tokenizer {path} is not the one that the model was trained with: "
                         "bring that file back, or train the model again")
    return tok

# -----------------------------------------------------------------------------
# records

def read_records(path, fields):
    """The records of a JSONL file that have these fields, each with "where", its file and line.

    fields: of prompt, completion, chosen, rejected (texts), ranked (a list of texts, best first),
    rating (a number), and label (true or false). A record's margin and share are checked and kept.
    Raises InputError, with file and line, if a line is no such record."""
    records = []                                            # in the order of the file
    for where, line in read_lines(path):
        try:
            row = json.loads(line, parse_constant=not_a_number)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: this line is not JSON ({error}); "
                             "other formats are converted by: python -m real.corpora") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: this line is not a JSON object")
        records.append(check_record(where, row, fields))
    if not records:
        raise InputError(f"{path}: this file has no records")
    return records


def not_a_number(name):
    raise ValueError(f"{name} is not a number")             # NaN, which Python's json accepts


def read_lines(path):
    """Yields ("file:line", text) of each line that is not blank. Raises InputError."""
    try:
        content = Path(path).read_bytes()                   # bytes, so that a bad one can be named
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    for n, line in enumerate(content.splitlines(), 1):
        try:
            # Editors on Windows may begin a file with a byte order mark, which -sig drops.
            text = line.decode("utf-8-sig" if n == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{n}: byte {error.start + 1} is not UTF-8; "
                             "save the file as UTF-8") from None
        if text.strip():                                    # blank lines are nobody's mistake
            yield f"{path}:{n}", text


def check_record(where, row, fields):
    """The fields of a row that a stage reads. Raises InputError if it cannot be used."""
    # Say what is there, too: most mistakes are another name for the same thing.
    if missing := [field for field in fields if field not in row]:
        raise InputError(f"{where}: '{missing[0]}' is missing, only {', '.join(row) or 'nothing'} "
                         f"is there; records of {' + '.join(fields)} are needed here, and "
                         "python -m real.corpora converts other formats")
    record = {"where": where}                               # for the messages of later checks
    for field in fields:
        value = record[field] = row[field]
        if field == "rating":
            check_number(where, row, field)
        elif field == "label":
            if not isinstance(value, bool):
                raise InputError(f"{where}: 'label' must be true or false")
        elif field == "ranked":
            if not isinstance(value, list) or len(value) < 2:
                raise InputError(f"{where}: 'ranked' must be a list of two texts or more")
            for text in value:
                check_text(where, field, text)
        else:
            check_text(where, field, value)
    # Both are optional: a plain preference has neither.
    for field in ("margin", "share"):
        if field in row:
            check_number(where, row, field)
            record[field] = row[field]
    # With less than a half the raters would prefer the other answer.
    if not 0.5 <= row.get("share", 1.0) <= 1:
        raise InputError(f"{where}: 'share' must be from 0.5 (a tie) to 1")
    # A preference between two equal texts teaches nothing, and its loss can only be ln 2.
    answers = row["ranked"] if "ranked" in fields else [row.get(f) for f in fields if f != "prompt"]
    answers = [answer.strip() for answer in answers if isinstance(answer, str)]
    # Spaces around a text do not make it another.
    if len(set(answers)) < len(answers):
        raise InputError(f"{where}: two answers are the same text, so neither is better")
    return record


def check_text(where, field, text):
    if not isinstance(text, str):
        raise InputError(f"{where}: '{field}' must be text")
    if not text.strip():
        raise InputError(f"{where}: '{field}' is empty")


def check_number(where, row, field):
    value = row[field]
    # In Python True is an int, but as a rating it is a mistake.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not -1e9 <= value <= 1e9:           # NaN is not, either
        raise InputError(f"{where}: '{field}' must be a number from -1e9 to 1e9")


def train_and_val(config, fields):
    """(training, validation) records of config.data and config.val_data.

    Without a file of its own, the validation set is a tenth of the data, at most 1,000 records:
    those with the smallest checksums, so that two equal records never part."""
    records = read_records(config.data, fields)
    if config.val_data:
        return records, read_records(config.val_data, fields)
    if len(records) < 2:
        raise InputError(f"{config.data}: one record is too few: a second one is held out to "
                         "validate on, or name another file with --val_data")

    def checksum(record):
        # Not hash(): that of a string is another one in each run of Python.
        return zlib.crc32(repr([record[field] for field in fields]).encode())

    records.sort(key=checksum)                              # whatever the order of the file
    held_out = min(1000, max(1, len(records) // 10))        # a tenth, at least one
    checksums = [checksum(record) for record in records]
    while held_out < len(records) - 1 and checksums[held_out] == checksums[held_out - 1]:
        held_out += 1                       # a copy of the last record that is held out
    return records[held_out:], records[:held_out]

# -----------------------------------------------------------------------------
# token ids

def encode_records(records, tok, fields, block_size, reserve=0):
    """Token ids of the texts in these fields, padded to the longest. -> {field: (N, longest)}

    Prompts are padded on the left. Other texts get an end token and are padded on the right.
    reserve: how many tokens a response to the prompt may get. Raises InputError, naming the
    record, if prompt and text (or reserve) together exceed block_size."""
    if not records:
        raise InputError("there are no records to encode")
    encoded = {}                                            # {field: (N, longest)}
    n_prompt = torch.zeros(len(records), dtype=torch.long)              # (N,) tokens of each prompt
    for field in fields:
        # Each different text is encoded once: prompts come again and again.
        texts = dict.fromkeys(record[field] for record in records)
        ids_of = {text: tok.encode(text) for text in progress_bar(texts, field)}
        rows = [ids_of[record[field]] for record in records]            # N lists of ids
        if field == "prompt":
            encoded[field] = pad_left(rows, tok.pad_token_id)           # (N, P)
            n_prompt = torch.tensor([len(ids) for ids in rows])         # (N,)
            what = f"tokens, {reserve} of them for a response" if reserve else "tokens of prompt"
            check_room(records, n_prompt + reserve, what, block_size)
        else:
            # The end is a token to predict like any other: so a model learns when to stop.
            rows = [ids + [tok.eos_token_id] for ids in rows]
            encoded[field] = pad_right(rows, tok.pad_token_id)          # (N, R)
            lengths = n_prompt + torch.tensor([len(ids) for ids in rows])  # (N,) of both
            check_room(records, lengths, f"tokens of prompt and {field}", block_size)
    return encoded


def longest(encoded):
    """max_new_tokens for samples to compare with these texts: as many as the longest has, or 32."""
    # Ratings, margins, and labels are (N,): they have no width.
    widths = [ids.size(1) for name, ids in encoded.items() if name != "prompt" and ids.dim() == 2]
    return max(32, *widths)


def check_room(records, lengths, what, block_size):
    """Raises InputError for the first record that is longer than the model's block."""
    for record, length in zip(records, lengths.tolist(), strict=True):
        if length > block_size:
            # A prompt that came from no file is named by its beginning.
            where = record.get("where", f"the prompt {record['prompt'][:60]!r}")
            raise InputError(f"{where}: {length} {what}, but the model's block holds "
                             f"{block_size}: shorten the text, or train a model with a larger "
                             "--block_size")


def pad_right(rows, pad_token_id):
    """Lists of ids, each at the left of its row. -> (N, longest), int32"""
    lengths = torch.tensor([len(ids) for ids in rows])      # (N,)
    columns = torch.arange(max(lengths.max().item(), 1))    # (longest,), at least one
    mask = columns < lengths[:, None]                       # (N, longest)
    # int32 halves the memory of a large data set; cut() makes int64 of the columns in use.
    padded = torch.full(mask.shape, pad_token_id, dtype=torch.int32)
    # A mask is filled row by row, left to right: the order in which the ids stand here.
    padded[mask] = torch.tensor([i for ids in rows for i in ids], dtype=torch.int32)
    return padded


def pad_left(rows, pad_token_id):
    """Lists of ids, each at the right of its row. -> (N, longest), int32"""
    # Turned around, it is pad_right().
    return pad_right([ids[::-1] for ids in rows], pad_token_id).flip(1)


def trim(ids, pad_token_id, side):
    """Drops the columns on that side that are pads in every row. (B, longest) -> (B, width)"""
    width = (ids != pad_token_id).sum(dim=1).max().item()   # of the longest row
    return cut(ids, width, side)


def cut(ids, width, side):
    """The outermost `width` columns, at least one, away from the pads of that side."""
    width = min(max(width, 1), ids.size(1))
    kept = ids[:, -width:] if side == "left" else ids[:, :width]
    return kept.long()                                      # what embeddings and losses index with


class Batches:
    """Endless shuffled batches, each epoch in an order of its own.

    Texts of about one length share a batch, for little padding and few different shapes: each
    pool of 32 batches is sorted by length and cut into batches, and these are shuffled again.
    state_dict() is the position, so that a run can resume. Of several processes each gets
    batch_size records of its own at every step."""

    def __init__(self, encoded, batch_size, pad_token_id, device, seed, few_shapes=False):
        """encoded: {field: (N, longest) ids, or (N,) numbers}. few_shapes: widths are powers of
        two, since torch.compile starts anew for each; always so on a GPU, as for cuda_graph(). If
        N is less than one batch, records repeat in it. Raises InputError if N is 0."""
        self.encoded, self.pad_token_id, self.device = encoded, pad_token_id, torch.device(device)
        self.seed, self.few_shapes = seed, few_shapes or self.device.type == "cuda"
        # How wide a batch is follows from lengths on the CPU: a GPU need not be asked, and waited
        # for. There the records themselves are moved once, not batch by batch.
        self.lengths_of = {field: (ids != pad_token_id).sum(dim=1)
                           for field, ids in encoded.items() if ids.dim() == 2}     # (N,) each
        self.lengths = sum(self.lengths_of.values())                                # (N,)
        self.on_device = {field: values.to(device) for field, values in encoded.items()}
        # So that a saved state is not continued with other records.
        self.checksum = 0
        for values in encoded.values():
            self.checksum = zlib.crc32(values.contiguous().numpy(), self.checksum)  # of all of them
        self.n_tokens = 0                               # in all batches that next() has dealt
        self.step_size = batch_size * world_size()      # records of all processes at one step
        if len(self) == 0:
            raise InputError("the data has too few records: none is left to train or validate on")
        if len(self) < self.step_size:
            print(f"a batch of {self.step_size} repeats records: the data has {len(self)}")
        self.copies = math.ceil(self.step_size / len(self))     # of each record an epoch
        self.n_batches = self.copies * len(self) // self.step_size      # the rest waits
        self.epoch, self.position = -1, self.n_batches      # next() starts epoch 0

    def __len__(self):
        return len(self.lengths)

    def shuffle(self, epoch):
        rng = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        orders = [torch.randperm(len(self), generator=rng) for _ in range(self.copies)]
        rows = torch.cat(orders)[:self.n_batches * self.step_size]
        # Within a pool the shortest come first, so that a batch holds texts of about one length.
        pools = [pool[self.lengths[pool].argsort(stable=True)]
                 for pool in rows.split(32 * self.step_size)]
        batches = torch.cat(pools).view(self.n_batches, self.step_size)  # rows of each batch
        # Shuffled again: else every pool would start with its shortest texts.
        order = torch.randperm(self.n_batches, generator=rng)           # (n_batches,)
        self.epoch, self.order = epoch, batches[order]          # (n_batches, step_size)

    def next(self):
        """The next batch, {field: (B, longest of the batch)}."""
        if self.position == self.n_batches:
            self.shuffle(self.epoch + 1)
            self.position = 0
        rows = self.order[self.position][rank()::world_size()]
        self.position += 1
        self.n_tokens += self.lengths[rows].sum().item()
        return self.take(rows)

    def take(self, rows):
        """The records of these rows, as a batch on the device."""
        if self.device.type == "cuda":
            rows = rows.pin_memory()        # then the copy does not wait for the GPU
        where = rows.to(self.device, non_blocking=True)                 # (B,)
        batch = {}
        for field, values in self.on_device.items():
            values = values[where]                                      # (B, longest) or (B,)
            if values.dim() == 2:
                width = self.lengths_of[field][rows].max().item()       # of the longest text
                if self.few_shapes:
                    width = 2 ** math.ceil(math.log2(max(width, 1)))
                # Prompts are padded on the left, so their right end is kept.
                side = "left" if field == "prompt" else "right"
                values = cut(values, width, side)
            batch[field] = values
        return batch

    def in_order(self, batch_size=256):
        """Yields all records once, in their order: what a validation loss is measured on."""
        for rows in progress_bar(torch.arange(len(self)).split(batch_size), "records"):
            yield self.take(rows)

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}         # the seed does the rest

    def load_state_dict(self, state):
        if state["epoch"] >= 0:
            self.shuffle(state["epoch"])                    # gives the same order again
        self.position = state["position"]


def load_prompts(config, tok):
    """Records of prompts: those of a file, or all of the pun world."""
    if config.data:
        return read_records(config.data, ["prompt"])
    return [{"prompt": prompt} for prompt in tok.world.by_prompt]


def prompt_batches(records, config, tok, block_size, device, seed):
    """Endless batches of batch_size / group_size prompts, which repeat if there are too few.

    Raises InputError for a prompt that leaves no room for max_new_tokens."""
    encoded = encode_records(records, tok, ["prompt"], block_size, reserve=config.max_new_tokens)
    # A batch is one of responses: group_size of them answer the same prompt.
    n_prompts = config.batch_size // config.group_size
    return Batches(encoded, n_prompts, tok.pad_token_id, device, seed)

# -----------------------------------------------------------------------------
# what a model writes

@torch.no_grad()
def respond(model, tok, prompts, rng, autocast, max_new_tokens=32, batch_size=None, **sampling):
    """Samples a response to each prompt, given as strings: yields (prompt (B, P), response (B, R)).

    A response has at most max_new_tokens, or the room that its own prompt leaves. sampling:
    temperature, top_k, top_p. Raises InputError if a prompt leaves no room."""
    was_training = model.training                           # restored at the end
    model.eval()                                            # no dropout
    block_size, device = model.config.block_size, next(model.parameters()).device
    records = [{"prompt": prompt} for prompt in prompts]    # without a file to name
    encoded = encode_records(records, tok, ["prompt"], block_size, reserve=1)["prompt"]
    if batch_size is None:
        # A GPU takes many at a time, as long as their logits fill no more than a gigabyte.
        fits = max(1, 2 ** 28 // (model.config.vocab_size * max_new_tokens))
        batch_size = min(1024, fits) if device.type == "cuda" else 256
    for batch in progress_bar(encoded.split(batch_size), "samples"):
        room = block_size - trim(batch, tok.pad_token_id, "left").size(1)
        # A long prompt must not shorten the others' responses: then each is answered by itself.
        # A batch of one has no pads, so that its own prompt is all that takes room.
        for rows in batch.split(1) if room < max_new_tokens else [batch]:
            prompt = trim(rows, tok.pad_token_id, "left").to(device)        # (B, P)
            n_new = min(max_new_tokens, block_size - prompt.size(1))
            with autocast():
                response, _ = model.generate(prompt, n_new, rng=rng, **sampling)    # (B, R)
            yield prompt, response
    model.train(was_training)


def complete(model, tok, prompts, rng, autocast, **sampling):
    """Samples a completion of each prompt: strings in, strings out."""
    completions = []                                        # in the order of the prompts
    for _, response in respond(model, tok, prompts, rng, autocast, **sampling):
        completions += [tok.decode(row) for row in response.cpu()]
    return completions


def describe(tok, prompt, response, kl=None, score=None):
    """One row for each response: prompt, text, length in tokens, whether it ended, kl and score
    (B,) if given, and the verdict of the pun world's judge, if the prompt is one of its own."""
    rows = []
    # Moved as a whole: from a GPU each row would be waited for.
    for i, (p, r) in enumerate(zip(prompt.cpu(), response.cpu(), strict=True)):
        row = {"prompt": tok.decode(p), "text": tok.decode(r)}
        row["length"] = (r != tok.pad_token_id).sum().item()  # in tokens, the end token included
        if kl is not None:
            row["kl"] = kl[i].item()
        if score is not None:
            row["score"] = score[i].item()
        # The judge knows the prompts of its own world alone.
        if row["prompt"] in tok.world.by_prompt:
            verdict = tok.world.judge(row["prompt"], row["text"])       # exact: it parses the text
            row["pun"] = verdict.on_topic and verdict.pun       # a pun on the wrong topic fails
            row["on_topic"] = verdict.on_topic
            row["fluent"] = verdict.fluent
        row["ended"] = tok.eos_token_id in r.tolist()       # or it was cut off at the longest
        rows.append(row)
    return rows


def means(rows):
    """The mean of every number column, over the rows that have it, and `distinct`, the fraction
    of different texts."""
    columns = dict.fromkeys(name for row in rows for name in row)
    result = {}
    for name in columns:
        if name not in ("prompt", "text"):
            values = [row[name] for row in rows if name in row]         # a column may be partial
            result[name] = sum(values) / len(values)
    result["distinct"] = len({row["text"] for row in rows}) / len(rows)  # 1: none twice
    return result


def format_samples(rows, n=3):
    """n lines for the screen: puns first, if there are any, then whatever comes first."""
    lines = []                                              # "pun | prompt and text  score  kl"
    # False sorts before True, and rows that are equal in this keep their order.
    for row in sorted(rows, key=lambda row: not row.get("pun", False))[:n]:
        numbers = [f"  {name} {row[name]:+.2f}" for name in ("score", "kl") if name in row]
        text = f"{row['prompt']}{row['text']}".replace("\n", "⏎")
        lines.append(f"  {verdict_of(row):>3} | {text}{''.join(numbers)}")
    return "\n".join(lines)


def verdict_of(row):
    """pun, ok (on topic, but no pun), or - where the judge says no or does not know the prompt."""
    if row.get("pun"):
        return "pun"
    return "ok" if row.get("on_topic") else "-"


@torch.no_grad()
def measure(policy, reference, tok, prompts, rng, autocast, reward_model=None, temperature=1.0,
            top_k=0, top_p=1.0, max_new_tokens=32):
    """Samples a response to each prompt and describes it, with score and kl where possible.

    kl is log pi - log pi_ref, summed over the response. pi is the distribution that was sampled.
    pi_ref has the same temperature (1 where that is 0) but no filter: a filtered reference gives
    probability 0 to tokens that another policy writes, and every such kl would be infinite."""
    rows = []
    for prompt, response in respond(policy, tok, prompts, rng, autocast, max_new_tokens,
                                    temperature=temperature, top_k=top_k, top_p=top_p):
        kl = score = None                                   # unknown, unless there is a model
        with autocast():
            if reference is not None:
                logp = logprobs(policy, prompt, response, temperature, top_k, top_p)
                if logp.isinf().any():      # rounding has put a token just outside the filter
                    plain_logp = logprobs(policy, prompt, response, temperature or 1.0)
                    logp = torch.where(logp.isinf(), plain_logp, logp)
                ref_logp = logprobs(reference, prompt, response, temperature or 1.0)
                kl = (logp - ref_logp).sum(dim=1)                                   # (B,)
            if reward_model is not None:
                score = reward_model(prompt, response)                              # (B,)
        rows += describe(tok, prompt, response, kl, score)
    return rows
