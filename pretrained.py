"""
Weights in and out, in the format that the field exchanges: a folder with config.json, model.safetensors and tokenizer.json.

    load_pretrained("gpt2")                         gpt2, gpt2-medium, t5-small, google/flan-t5-small: at a pinned revision
    load_pretrained("owner/name@revision")          any other GPT-2 or T5 on the Hugging Face hub
    load_pretrained("my/folder")                    no network needed
    export("runs/ppo/ckpt.pt", "out")               transformers, TRL and vLLM load out/ as it is

huggingface_hub fetches and keeps the files; it obeys HF_ENDPOINT (a mirror), HF_HOME (where they are kept) and HF_HUB_OFFLINE.
Only safetensors are read, which hold numbers and nothing that could run.
"""

import importlib
import json
import re
from pathlib import Path

import torch
import tyro

from common import InputError, replacing
from model import ModelConfig, Scorer, build_model, load_model

HUB = {
    "gpt2": "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "openai-community/gpt2-medium@6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "t5-small": "google-t5/t5-small@df1b051c49625cf57a3d0d8d3863ed4d13564fe4",
    "google/flan-t5-small": "google/flan-t5-small@0fc9ddf78a1e988dac52e2dac162b0ede4fd74ab",
}
TYPES = {"gpt": "gpt2", "t5": "t5"}

# ours: theirs, in config.json
FIELDS = {
    "gpt": {"vocab_size": "vocab_size", "end_id": "eos_token_id", "block_size": "n_positions", "n_layer": "n_layer",
            "n_head": "n_head", "n_embd": "n_embd", "n_inner": "n_inner"},
    "t5": {"vocab_size": "vocab_size", "end_id": "eos_token_id", "start_id": "decoder_start_token_id", "block_size": "n_positions",
           "n_layer": "num_layers", "n_head": "num_heads", "n_embd": "d_model", "head_size": "d_kv", "n_inner": "d_ff",
           "n_buckets": "relative_attention_num_buckets", "max_distance": "relative_attention_max_distance"},
}
DEFAULTS = {"gpt": {"eos_token_id": 50256, "n_positions": 1024},
            "t5": {"eos_token_id": 1, "decoder_start_token_id": 0, "n_positions": 512}}

# what they could choose and we have one of
FIXED = {
    "gpt": {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True},
    "t5": {"layer_norm_epsilon": 1e-6, "is_encoder_decoder": True},
}

# our parameter's name becomes theirs by these substitutions, in this order
NAMES = {
    "gpt": [(r"^", "transformer.")],
    "t5": [(r"^wte", "shared"), (r"\.relative\.", ".block.0.layer.0.SelfAttention.relative_attention_bias."), (r"\.h\.", ".block."),
           (r"\.ln_f", ".final_layer_norm"), (r"\.ln_1", ".layer.0.layer_norm"), (r"\.attn", ".layer.0.SelfAttention"),
           (r"\.ln_cross", ".layer.1.layer_norm"), (r"\.cross", ".layer.1.EncDecAttention"),
           (r"^(encoder.*)\.ln_2", r"\1.layer.1.layer_norm"), (r"^(encoder.*)\.mlp", r"\1.layer.1.DenseReluDense"),
           (r"\.ln_2", ".layer.2.layer_norm"), (r"\.mlp", ".layer.2.DenseReluDense")],
}


def their_name(arch, name):
    for pattern, replacement in NAMES[arch]:
        name = re.sub(pattern, replacement, name)
    return name


def is_transposed(arch, name):
    """GPT-2's published layers store (inputs, outputs), nn.Linear stores (outputs, inputs)."""
    return arch == "gpt" and re.search(r"c_(attn|proj|fc)\.weight$", name)

# -----------------------------------------------------------------------------
# in

def needs(module):
    """The module, or an InputError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{module.split('.')[0]} is missing, which pretrained weights need: "
                         "pip install huggingface_hub safetensors tokenizers") from None


def fetch(name, file):
    """The path of a model's file: in a folder, or in the hub's cache, downloaded if it is not there yet."""
    if Path(name).is_dir():
        if not (path := Path(name, file)).exists():
            raise InputError(f"{path} is not there; a model's folder holds config.json, model.safetensors and tokenizer.json")
        return path
    repo, _, revision = HUB.get(name, name).partition("@")
    if "/" not in repo:
        raise InputError(f"there is no model or tokenizer '{name}': neither a folder, nor owner/name on the hub, nor "
                         f"one of {', '.join(HUB)}")
    try:
        return Path(needs("huggingface_hub").hf_hub_download(repo, file, revision=revision or None))
    except InputError:
        raise
    except Exception as error:      # the network's, the hub's and the disk's: whatever it was, the reader needs the same help
        raise InputError(f"{file} of {repo} is not in the cache and could not be fetched ({type(error).__name__}: "
                         f"{str(error).strip().splitlines()[0]}). Where there is a network: hf download {repo} {file}"
                         f"{' --revision ' + revision if revision else ''}; or put config.json, model.safetensors and "
                         "tokenizer.json into a folder and give its name instead") from None


def read_config(name):
    """config.json of a GPT-2 or T5 -> (our arch, its fields). A pad token at the end of the vocabulary is ours, see export()."""
    path = fetch(name, "config.json")
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    arch = next((arch for arch, kind in TYPES.items() if kind == theirs.get("model_type")), None)
    if arch is None:
        raise InputError(f"{path}: model_type is '{theirs.get('model_type')}', and only gpt2 and t5 can be loaded")
    theirs = DEFAULTS[arch] | {field: value for field, value in theirs.items() if value is not None}
    if theirs.get("pad_token_id") == theirs["vocab_size"] - 1:
        theirs["vocab_size"] -= 1
    return arch, theirs


def model_config(name):
    """The ModelConfig of a folder or a name on the hub. Raises InputError for variants that our networks do not have."""
    arch, theirs = read_config(name)
    fixed, gated = FIXED[arch], arch != "t5" or theirs.get("feed_forward_proj") == "gated-gelu"
    if arch == "t5":    # v1.0 scales its output and v1.1 does not; before it had a field, that went with the tied head
        theirs.setdefault("scale_decoder_outputs", theirs.get("tie_word_embeddings", True))
        fixed = fixed | {"feed_forward_proj": "gated-gelu" if gated else "relu", "num_decoder_layers": theirs["num_layers"],
                         "scale_decoder_outputs": not gated}
    for field, value in fixed.items():
        if theirs.get(field, value) != value:
            raise InputError(f"{name}: config.json has {field} = {theirs[field]}, and only {value} is supported")
    return ModelConfig(arch=arch, gated=gated, **{o: theirs[t] for o, t in FIELDS[arch].items() if t in theirs})


@torch.no_grad()
def load_pretrained(name, device="cpu"):
    """A published model, in eval mode; model.tokenizer is the name of its tokenizer. name: see the top of this file."""
    name = HUB.get(name, name)
    load_file = needs("safetensors.torch").load_file
    config, path = model_config(name), fetch(name, "model.safetensors")
    model, weights = build_model(config), load_file(path)
    for ours, weight in model.state_dict().items():
        theirs = their_name(config.arch, ours)
        # the file of the original GPT-2 has no prefix; a head that is tied after all is not in the file
        found = next((weights[n] for n in (theirs, theirs.removeprefix("transformer."), "shared.weight" if ours == "lm_head.weight"
                                           else None) if n in weights), None)
        if found is not None and ours in ("wte.weight", "lm_head.weight"):
            found = found[:config.vocab_size]
        if found is None or (found := found.T if is_transposed(config.arch, ours) else found).shape != weight.shape:
            raise InputError(f"{path}: {theirs} is {'missing' if found is None else f'of shape {tuple(found.shape)}'}, "
                             f"config.json asks for {tuple(weight.shape)}")
        weight.copy_(found)
    model.tokenizer = name
    return model.to(device).eval()


class JSONEncoding:
    """A tokenizer.json behind the methods of a tiktoken Encoding that data.py uses."""

    def __init__(self, name):
        _, config = read_config(name)
        self.n_vocab, self.end_id, self.path = config["vocab_size"], config["eos_token_id"], str(fetch(name, "tokenizer.json"))
        self.tokenizer = needs("tokenizers").Tokenizer.from_file(self.path)
        self.tokenizer.encode_special_tokens = True         # the name of a special token in a text is text
        self.tokenizer.no_truncation()

    def encode_ordinary(self, text):
        # T5's pieces include its end token: left out, since where a text ends is not for its words to say
        return [i for i in self.tokenizer.encode(text, add_special_tokens=False).ids if i != self.end_id]

    def decode(self, ids):
        first = self.tokenizer.id_to_token(ids[0]) if ids else None
        space = " " if first and first.startswith("▁") else ""      # which SentencePiece drops
        return space + self.tokenizer.decode(ids)

# -----------------------------------------------------------------------------
# out

def tokenizer_json(tok):
    """The tokenizer (of data.py) as one of the tokenizers library, which gives the same ids, and the id of its pad token."""
    tokenizers = needs("tokenizers")
    if isinstance(tok.encoding, JSONEncoding):
        out = tokenizers.Tokenizer.from_file(tok.encoding.path)
    else:
        # byte-level BPE writes each byte as a visible character: itself, or one from 256 on
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [b for b in range(256) if b not in visible]
        char = {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(hidden)}
        tokens = [tok.encoding.decode_single_token_bytes(i) for i in range(tok.end_id)]
        text = {token: "".join(char[b] for b in token) for token in tokens}
        # tiktoken joins any two neighbors that make up a token, the token with the lowest id first
        merges = [(text[t[:i]], text[t[i:]]) for t in tokens for i in range(1, len(t)) if t[:i] in text and t[i:] in text]
        ids = {string: i for i, string in enumerate(text.values())}
        out = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, ignore_merges=True))
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(tok.encoding._pat_str), "isolated")
        out.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [split, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        out.decoder = tokenizers.decoders.ByteLevel()
        out.add_special_tokens([tok.encoding.decode([tok.end_id])])
    pad = next((s for s in ("<|pad|>", "<pad>") if out.token_to_id(s) is not None), "<|pad|>")
    out.add_special_tokens([pad])
    return out, out.token_to_id(pad)


def export(ckpt: tyro.conf.Positional[str], out_dir: tyro.conf.Positional[str]):
    """Write a checkpoint as a folder that transformers, TRL and vLLM load (AutoModelForCausalLM or AutoModelForSeq2SeqLM).

    Our pad id is one past the vocabulary. There it must be a token: it gets a row of its own, the mean of all rows, which makes
    its logit the mean logit and its probability less than 1/V (exp is convex), and generate() is told never to write it."""
    from data import tokenizer
    model, out_dir = load_model(ckpt), Path(out_dir)
    c, arch = model.config, model.config.arch
    if isinstance(model, Scorer):
        raise InputError(f"{ckpt} is a reward model; transformers has classes for language models only")
    if arch not in TYPES or (arch == "gpt" and c.n_head * c.head_size != c.n_embd):
        raise InputError(f"{ckpt}: transformers has no class for this {arch} model; gpt and t5 can be exported")
    tok, pad_id = tokenizer_json(tokenizer(model.tokenizer))
    weights = {}
    for ours, weight in model.state_dict().items():
        if ours in ("wte.weight", "lm_head.weight") and pad_id == c.vocab_size:
            weight = torch.cat([weight, weight.mean(dim=0, keepdim=True)])
        weights[their_name(arch, ours)] = (weight.T if is_transposed(arch, ours) else weight).contiguous()
    first = {"gpt": {"bos_token_id": c.end_id}, "t5": {"decoder_start_token_id": c.start_id}}[arch]
    ids = first | {"eos_token_id": c.end_id, "pad_token_id": pad_id}
    config = {"architectures": ["GPT2LMHeadModel" if arch == "gpt" else "T5ForConditionalGeneration"], "model_type": TYPES[arch],
              "dtype": "float32", **{theirs: getattr(c, ours) for ours, theirs in FIELDS[arch].items()}, **FIXED[arch], **ids}
    config["vocab_size"] = max(c.vocab_size, pad_id + 1)
    if arch == "t5":
        config |= {"feed_forward_proj": "gated-gelu" if c.gated else "relu", "tie_word_embeddings": not c.gated}
    files = {"config.json": config,
             "generation_config.json": ids | ({"suppress_tokens": [pad_id]} if pad_id == c.vocab_size else {}),
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tok.id_to_token(c.end_id),
                                       "pad_token": tok.id_to_token(pad_id), "model_max_length": c.block_size,
                                       "padding_side": "left", "clean_up_tokenization_spaces": False}}
    for name, content in files.items():
        with replacing(out_dir / name) as path:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with replacing(out_dir / "tokenizer.json") as path:
        tok.save(str(path))
    with replacing(out_dir / "model.safetensors") as path:
        needs("safetensors.torch").save_file(weights, path, metadata={"format": "pt"})
    print(f"{out_dir}: {', '.join(sorted(path.name for path in out_dir.iterdir()))}")
