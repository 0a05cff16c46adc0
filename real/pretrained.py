"""
Pretrained weights in and out: a folder in the layout of the Hugging Face hub <-> a checkpoint.

    python -m real.pretrained gpt2 runs/gpt2                    writes runs/gpt2/ckpt.pt
    python -m real.pretrained owner/name@revision runs/name     any other model on the hub
    python -m real.pretrained my/folder runs/mine               needs no network
    python -m real.pretrained export runs/ppo/ckpt.pt out       transformers, TRL, vLLM load out/

It reads GPT-2, T5, Llama (SmolLM2, TinyLlama), and Qwen2. The tokenizer.json of the model is copied
beside its ckpt.pt. Every stage then starts from it with --init runs/gpt2/ckpt.pt.

huggingface_hub downloads and caches the files. It obeys HF_ENDPOINT (a mirror), HF_HOME (where
the cache is), and HF_HUB_OFFLINE. Only safetensors are read: they hold numbers and no code.
"""

import importlib
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from common import InputError, atomic_write, command_line, write_text
from data import Tokenizer, tokenizer_of
from model import ModelConfig, build_model, load_model, save_model

# Short names, each with the commit that it stands for.
HUB = {
    "gpt2": "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "openai-community/gpt2-medium@6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "t5-small": "google-t5/t5-small@df1b051c49625cf57a3d0d8d3863ed4d13564fe4",
    "google/flan-t5-small": "google/flan-t5-small@0fc9ddf78a1e988dac52e2dac162b0ede4fd74ab",
    "HuggingFaceTB/SmolLM2-135M":
        "HuggingFaceTB/SmolLM2-135M@93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
    "HuggingFaceTB/SmolLM2-135M-Instruct":
        "HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f77366fa6b3b4b768ec3050bf629380bac",
    "Qwen/Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B@060db6499f32faf8b98477b0a26969ef7d8b9987",
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# -----------------------------------------------------------------------------
# how the hub describes our architectures

@dataclass(frozen=True)
class Family:
    """What config.json and the weights of one architecture look like on the hub."""
    model_type: str             # in config.json
    variant: dict               # what our ModelConfig says of this family alone
    class_name: str             # of transformers
    fields: dict                # a field of our ModelConfig: its name in config.json
    defaults: dict              # of fields that config.json may leave out
    fixed: dict                 # fields that give a choice there, and the one that we have
    names: list                 # (pattern, replacement) in this order: our parameter -> theirs
    transposed: str = "$^"      # parameters that they store as (inputs, outputs): a pattern


# To add an architecture, add an entry here. Variants that depend on each other: see t5_fixed() and
# flat_rope().
FAMILIES = {
    "gpt": Family(
        model_type="gpt2",
        variant={"arch": "gpt"},
        class_name="GPT2LMHeadModel",
        fields={"vocab_size": "vocab_size", "eos_token_id": "eos_token_id",
                "block_size": "n_positions", "n_layer": "n_layer", "n_head": "n_head",
                "n_embd": "n_embd", "n_inner": "n_inner"},
        defaults={"eos_token_id": 50256, "n_positions": 1024},
        fixed={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
               "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
               "tie_word_embeddings": True},
        names=[(r"^", "transformer.")],
        transposed=r"c_(attn|proj|fc)\.weight$",
    ),
    "llama": Family(
        model_type="llama",
        variant={"arch": "llama", "qkv_bias": False},
        class_name="LlamaForCausalLM",
        fields={"vocab_size": "vocab_size", "eos_token_id": "eos_token_id",
                "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers",
                "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
                "n_embd": "hidden_size", "head_size": "head_dim", "n_inner": "intermediate_size",
                "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
                "tied": "tie_word_embeddings"},
        defaults={"eos_token_id": 2, "max_position_embeddings": 2048, "rope_theta": 10000.0,
                  "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        names=[
            (r"^wte", "model.embed_tokens"),
            (r"^ln_f", "model.norm"),
            (r"^h\.", "model.layers."),
            (r"\.ln_1", ".input_layernorm"),
            (r"\.attn\.(q|k|v)\.", r".self_attn.\1_proj."),
            (r"\.attn\.c_proj", ".self_attn.o_proj"),
            (r"\.ln_2", ".post_attention_layernorm"),
            (r"\.mlp\.(gate|up)\.", r".mlp.\1_proj."),
            (r"\.mlp\.c_proj", ".mlp.down_proj"),
        ],
    ),
    "t5": Family(
        model_type="t5",
        variant={"arch": "t5"},
        class_name="T5ForConditionalGeneration",
        fields={"vocab_size": "vocab_size", "eos_token_id": "eos_token_id",
                "decoder_start_token_id": "decoder_start_token_id", "block_size": "n_positions",
                "n_layer": "num_layers", "n_head": "num_heads", "n_embd": "d_model",
                "head_size": "d_kv", "n_inner": "d_ff",
                "n_buckets": "relative_attention_num_buckets",
                "max_distance": "relative_attention_max_distance"},
        defaults={"eos_token_id": 1, "decoder_start_token_id": 0, "n_positions": 512},
        fixed={"layer_norm_epsilon": 1e-6, "is_encoder_decoder": True},
        names=[
            (r"^wte", "shared"),
            (r"\.relative\.", ".block.0.layer.0.SelfAttention.relative_attention_bias."),
            (r"\.h\.", ".block."),
            (r"\.ln_f", ".final_layer_norm"),
            (r"\.ln_1", ".layer.0.layer_norm"),
            (r"\.attn", ".layer.0.SelfAttention"),
            (r"\.ln_cross", ".layer.1.layer_norm"),
            (r"\.cross", ".layer.1.EncDecAttention"),
            (r"^(encoder.*)\.ln_2", r"\1.layer.1.layer_norm"),
            (r"^(encoder.*)\.mlp", r"\1.layer.1.DenseReluDense"),
            (r"\.ln_2", ".layer.2.layer_norm"),         # the decoder has cross-attention before
            (r"\.mlp", ".layer.2.DenseReluDense"),
        ],
    ),
}
# Qwen2 is Llama with biases on queries, keys, and values.
FAMILIES["qwen2"] = replace(
    FAMILIES["llama"], model_type="qwen2", class_name="Qwen2ForCausalLM",
    variant={"arch": "llama", "qkv_bias": True},
    defaults={"max_position_embeddings": 32768, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
              "tie_word_embeddings": False},
    fixed={"hidden_act": "silu", "use_sliding_window": False})
FRACTIONS = ("rope_theta", "rms_norm_eps")      # all other numbers of config.json are whole ones
# The parameters with one row for each token.
TOKEN_ROWS = ("wte.weight", "lm_head.weight")


def t5_fixed(theirs, gated):
    """What else config.json must say of a T5: v1.1 is gated, v1.0 is not."""
    # Only v1.0 scales its output. Before this field existed, that went with the tied head.
    theirs.setdefault("scale_decoder_outputs", theirs.get("tie_word_embeddings", True))
    return {"feed_forward_proj": "gated-gelu" if gated else "relu",
            "num_decoder_layers": theirs["num_layers"],
            "scale_decoder_outputs": not gated}


def flat_rope(path, theirs):
    """A Llama's config.json with rope_theta on its first level, where transformers 5 has a dict.

    Raises InputError if rotary positions are stretched, or rotate a part of each head."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"{path}: rope scaling ({kind}) is not supported")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{path}: partial_rotary_factor is not supported")
    return {"rope_theta": rope["rope_theta"]} | theirs if "rope_theta" in rope else theirs


def family_of(config):
    """The Family of a model with this ModelConfig; None if it has none."""
    for family in FAMILIES.values():
        if all(getattr(config, field) == value for field, value in family.variant.items()):
            return family
    return None


def their_name(family, ours):
    for pattern, replacement in family.names:
        ours = re.sub(pattern, replacement, ours)
    return ours


def change_layout(family, ours, weight):
    """Our layout of a weight to theirs, or back: nn.Linear stores (outputs, inputs)."""
    return weight.T if re.search(family.transposed, ours) else weight

# -----------------------------------------------------------------------------
# files

def needs(module):
    """The module, imported. Raises InputError, which says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"pretrained weights need {module.split('.')[0]}: "
                         "pip install huggingface_hub safetensors tokenizers") from None


def fetch(name, file):
    """The path of one file of a model: in its folder, or in the hub's cache, downloaded once.

    Raises InputError if it is in neither and cannot be downloaded."""
    if Path(name).is_dir():
        path = Path(name, file)
        if not path.exists():
            raise InputError(f"{path} does not exist; the folder of a model has config.json, "
                             f"{WEIGHTS}, and tokenizer.json")
        return path
    repo, _, revision = HUB.get(name, name).partition("@")
    if "/" not in repo:
        raise InputError(f"there is no model '{name}': give a folder, owner/name@revision, or "
                         f"one of {', '.join(HUB)}")
    hub = needs("huggingface_hub")
    try:
        return Path(hub.hf_hub_download(repo, file, revision=revision or None))
    except Exception as error:      # of the network, the hub, or the disk: the advice is the same
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        pinned = f" --revision {revision}" if revision else ""
        raise InputError(f"{file} of {repo} is not in the cache and could not be downloaded "
                         f"({type(error).__name__}: {reason}). On a machine with a network run: "
                         f"hf download {repo} {file}{pinned}; or put the files in a folder and "
                         "give its name") from None


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: this file is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: this file is not a JSON object")
    return content


def read_weights(name):
    """All weights of a model, {their name: tensor}, from one file or from several (shards)."""
    try:
        files = [fetch(name, WEIGHTS)]
    except InputError as missing:
        try:
            index = fetch(name, INDEX)
        except InputError:
            raise missing from None
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index}: 'weight_map' is missing") from None
        files = [fetch(name, file) for file in sorted(set(shards.values()))]
    weights = {}
    for file in files:
        try:
            weights |= needs("safetensors.torch").load_file(file)
        except InputError:
            raise
        except Exception as error:      # SafetensorError has no public home
            raise InputError(f"{file}: this file is damaged or no safetensors: {error}") from None
    return weights

# -----------------------------------------------------------------------------
# in

def model_config(name):
    """The ModelConfig of a published model.

    Raises InputError if its architecture, or a variant of it, is none of ours."""
    path = fetch(name, "config.json")
    theirs = read_json(path)
    known = {family.model_type: family for family in FAMILIES.values()}
    family = known.get(theirs.get("model_type"))
    if family is None:
        raise InputError(f"{path}: model_type is '{theirs.get('model_type')}'; only "
                         f"{', '.join(known)} can be loaded")
    arch = family.variant["arch"]
    if arch == "llama":
        theirs = flat_rope(path, theirs)
    theirs = family.defaults | {key: value for key, value in theirs.items() if value is not None}
    ours = dict(family.variant)
    for field, key in family.fields.items():
        if key in theirs:
            kinds = (int, float) if key in FRACTIONS else int
            if not isinstance(theirs[key], kinds):
                raise InputError(f"{path}: {key} is {theirs[key]}; one number is supported")
            ours[field] = theirs[key]
    if "eos_token_id" not in ours:
        raise InputError(f"{path}: eos_token_id is missing: it says which token ends a text")
    fixed = family.fixed
    if arch == "t5":
        ours["gated"] = theirs.get("feed_forward_proj") == "gated-gelu"
        fixed = fixed | t5_fixed(theirs, ours["gated"])
    for key, value in fixed.items():
        if theirs.get(key, value) != value:
            raise InputError(f"{path}: {key} is {theirs[key]}; only {value} is supported")
    # A pad token of its own at the end of the vocabulary is what export() adds: not ours.
    pad = theirs.get("pad_token_id")
    if pad == ours["vocab_size"] - 1 and pad != ours["eos_token_id"]:
        ours["vocab_size"] -= 1
    return ModelConfig(**ours)


def find_weight(weights, family, config, ours):
    """The published weight of our parameter, in our layout, or None."""
    theirs = their_name(family, ours)
    # The original GPT-2's file has no prefix.
    names = [theirs, theirs.removeprefix("transformer.")]
    if ours == "lm_head.weight":
        names.append(their_name(family, "wte.weight"))      # a tied head is not in the file
    for name in names:
        if name in weights:
            weight = change_layout(family, ours, weights[name])
            return weight[:config.vocab_size] if ours in TOKEN_ROWS else weight
    return None


@torch.no_grad()
def load_pretrained(name):
    """A published model, in eval mode and float32, and its tokenizer. name: as for convert().

    Raises InputError if a file is missing or damaged, or is not of an architecture of ours."""
    config = model_config(name)
    family = family_of(config)
    model = build_model(config)
    weights = read_weights(name)
    for ours, parameter in model.state_dict().items():
        weight = find_weight(weights, family, config, ours)
        if weight is None or weight.shape != parameter.shape:
            what = "is missing" if weight is None else f"has the shape {tuple(weight.shape)}"
            raise InputError(f"{name}: the weight {their_name(family, ours)} {what}; config.json "
                             f"asks for the shape {tuple(parameter.shape)}")
        parameter.copy_(weight)
    path = fetch(name, "tokenizer.json")
    return model.eval(), Tokenizer(str(path), config.eos_token_id, config.vocab_size)


def convert(name: tyro.conf.Positional[str], out_dir: tyro.conf.Positional[str]):
    """Writes OUT_DIR/ckpt.pt, a checkpoint that every stage can start from, and its tokenizer.

    NAME: gpt2, gpt2-medium, t5-small, HuggingFaceTB/SmolLM2-135M, Qwen/Qwen2.5-0.5B, any other
    owner/name@revision on the hub, or a folder.

    The other way: python -m real.pretrained export CKPT OUT_DIR."""
    model, tok = load_pretrained(name)
    path = Path(out_dir, "ckpt.pt")
    save_model(path, model, tok, source=HUB.get(name, name))
    n = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{path}: {model.config.arch}, {n:.1f} M parameters, {tok.vocab_size} tokens")

# -----------------------------------------------------------------------------
# out

def byte_characters():
    """The visible character that byte-level BPE writes for each byte: its own, or one above 255."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible}
    for i, byte in enumerate(hidden):
        characters[byte] = chr(256 + i)
    return characters


def from_tiktoken(tok):
    """A tiktoken Encoding as a Tokenizer of the tokenizers library that gives the same ids."""
    tokenizers = needs("tokenizers")
    characters = byte_characters()
    tokens = [tok.encoding.decode_single_token_bytes(i) for i in range(tok.eos_token_id)]
    text_of = {token: "".join(characters[byte] for byte in token) for token in tokens}
    # tiktoken joins any two neighbors that make a token, the token with the lowest id first.
    merges = []
    for token in tokens:
        for i in range(1, len(token)):
            if token[:i] in text_of and token[i:] in text_of:
                merges.append((text_of[token[:i]], text_of[token[i:]]))
    ids = {text: i for i, text in enumerate(text_of.values())}
    out = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, ignore_merges=True))
    pattern = tokenizers.Regex(tok.encoding._pat_str)
    pre = tokenizers.pre_tokenizers
    out.pre_tokenizer = pre.Sequence([pre.Split(pattern, "isolated"),
                                      pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    out.decoder = tokenizers.decoders.ByteLevel()
    out.add_special_tokens([tok.encoding.decode([tok.eos_token_id])])
    return out


def published_tokenizer(tok):
    """Our tokenizer as one of the tokenizers library, and the id of its pad token."""
    if tok.path is None:
        out = from_tiktoken(tok)
    else:
        out = needs("tokenizers").Tokenizer.from_file(str(tok.path))
    pad = "<pad>" if out.token_to_id("<pad>") is not None else "<|pad|>"
    out.add_special_tokens([pad])       # changes nothing if it is there
    return out, out.token_to_id(pad)


def published_config(config, ids, pad_token_id):
    """config.json. ids: the special tokens."""
    family = family_of(config)
    theirs = {"architectures": [family.class_name], "model_type": family.model_type,
              "dtype": "float32"}
    theirs |= {key: getattr(config, field) for field, key in family.fields.items()}
    theirs |= family.fixed | ids
    theirs["vocab_size"] = max(config.vocab_size, pad_token_id + 1)
    if config.arch == "t5":
        theirs["feed_forward_proj"] = "gated-gelu" if config.gated else "relu"
        theirs["tie_word_embeddings"] = not config.gated
    return theirs


def export(ckpt: tyro.conf.Positional[str], out_dir: tyro.conf.Positional[str]):
    """Writes a checkpoint as a folder that transformers, TRL, and vLLM load as it is.

    Our pad id is one past the vocabulary. There it must be a token, so it gets a row of its own:
    the mean of all rows. Its logit is then the mean logit, and its probability is below 1/V,
    since exp is convex. generate() is told never to write it."""
    model = load_model(ckpt)
    config = model.config
    family = family_of(config)
    wide_heads = config.arch == "gpt" and config.n_head * config.head_size != config.n_embd
    if family is None or wide_heads:
        raise InputError(f"{ckpt}: transformers has no class for this {config.arch} model; "
                         f"{', '.join(FAMILIES)} can be exported")
    tok, pad_token_id = published_tokenizer(tokenizer_of(model))
    adds_pad = pad_token_id == config.vocab_size
    weights = {}
    for ours, weight in model.state_dict().items():
        if adds_pad and ours in TOKEN_ROWS:
            weight = torch.cat([weight, weight.mean(dim=0, keepdim=True)])      # (V + 1, C)
        weights[their_name(family, ours)] = change_layout(family, ours, weight).contiguous()
    ids = {"eos_token_id": config.eos_token_id, "pad_token_id": pad_token_id}
    if config.arch == "t5":
        ids["decoder_start_token_id"] = config.decoder_start_token_id
    else:
        ids["bos_token_id"] = config.eos_token_id
    files = {
        "config.json": published_config(config, ids, pad_token_id),
        "generation_config.json": ids | ({"suppress_tokens": [pad_token_id]} if adds_pad else {}),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tok.id_to_token(config.eos_token_id),
            "pad_token": tok.id_to_token(pad_token_id),
            "model_max_length": config.block_size,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        },
    }
    out_dir = Path(out_dir)
    for file, content in files.items():
        write_text(out_dir / file, json.dumps(content, indent=2) + "\n")
    with atomic_write(out_dir / "tokenizer.json") as path:
        tok.save(str(path))
    with atomic_write(out_dir / WEIGHTS) as path:
        needs("safetensors.torch").save_file(weights, path, metadata={"format": "pt"})
    print(f"{out_dir}: {', '.join(sorted(path.name for path in out_dir.iterdir()))}")


def main():
    args = sys.argv[1:]
    if args[:1] == ["export"]:
        tyro.cli(export, prog="python -m real.pretrained export", args=args[1:])
    else:
        tyro.cli(convert, prog="python -m real.pretrained", args=args)


if __name__ == "__main__":
    command_line(main)
