"""
LoRA, https://arxiv.org/abs/2106.09685: W stays as it is, and a small product A B beside it learns.

Several adapters live on one frozen trunk ("hydra", https://arxiv.org/abs/2309.00754): policy, critic and reward model each have
their own, and with none of them active the trunk is the reference.

    add_adapter(model, "policy", rank=8)
    train_only(model, "adapters")
    with adapter(model, "policy"):
        logp = logprobs(model, prompt, response)
    ref_logp = logprobs(model, prompt, response)

A model here is a language model or one with heads on it (Scorer); whatever is not the trunk counts as a head.

The stages: --lora R trains an adapter of rank R alone, --trainable last:k the last k blocks. ckpt.pt then holds the merged model, for whoever
comes next, and adapter.pt the adapter and the heads alone.
"""

import contextlib
import re
import zlib

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import InputError, replacing
from model import GPTBlock, LanguageModel, PaLMBlock, T5Block, save_model

ATTENTION = ("c_attn", "attn.c_proj", "c_fused", "attn_proj", ".q", ".k", ".v", ".o")    # in all three architectures


class LoRALinear(nn.Linear):
    """y = x W + b + alpha / r x A B. W and b are the trunk's, A (inputs, r) and B (r, outputs) the active adapter's."""

    def __init__(self, linear, adapters):
        nn.Module.__init__(self)        # not nn.Linear's: the weights are there already
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.adapters, self.lora_a, self.lora_b = adapters, nn.ParameterDict(), nn.ParameterDict()

    def scale(self, name):
        return self.adapters.settings[name]["alpha"] / self.adapters.settings[name]["rank"]

    def forward(self, x):
        y, name = F.linear(x, self.weight, self.bias), self.adapters.active
        return y + self.scale(name) * (x @ self.lora_a[name] @ self.lora_b[name]) if name in self.lora_a else y


def trunk_of(model):
    """The language model in a model, and what the names of its parameters start with."""
    return next((m, f"{name}." if name else "") for name, m in model.named_modules() if isinstance(m, LanguageModel))


def add_adapter(model, name, rank=8, alpha=16.0, targets="all"):
    """A new adapter, A ~ N(0, 1/inputs) and B = 0, so that it changes nothing yet.
    targets: all linear layers, or attention, or how the names of the layers end, with commas between: "c_attn,.q"."""
    trunk, _ = trunk_of(model)
    ends = {"all": ("",), "attention": ATTENTION}.get(targets) or tuple(targets.split(","))
    layers = [(n, m) for n, m in trunk.named_modules() if isinstance(m, nn.Linear) and n != "lm_head" and n.endswith(ends)]
    if not layers or name in trunk.adapters.settings:
        raise InputError(f"adapter '{name}': " + ("it is there already" if layers else f"no layer's name ends with '{targets}'"))
    trunk.adapters.settings[name] = {"rank": rank, "alpha": alpha, "targets": targets}
    for path, layer in layers:
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer, trunk.adapters)
            trunk.set_submodule(path, layer)
        a, b = layer.weight.new_empty(layer.in_features, rank), layer.weight.new_zeros(rank, layer.out_features)
        layer.lora_a[name], layer.lora_b[name] = nn.Parameter(nn.init.normal_(a, std=layer.in_features ** -0.5)), nn.Parameter(b)


@contextlib.contextmanager
def adapter(model, name):
    """In this block the model computes with the adapter of that name; None is the trunk alone."""
    adapters = trunk_of(model)[0].adapters
    if name is not None and name not in adapters.settings:
        raise InputError(f"there is no adapter '{name}', only {', '.join(adapters.settings) or 'the trunk'}")
    if adapters.merged:
        raise InputError(f"adapter '{adapters.merged}' is part of the weights now: there is no other until the block ends")
    before, adapters.active = adapters.active, name
    try:
        yield model
    finally:
        adapters.active = before


@contextlib.contextmanager
def merged(model, name):
    """In this block the adapter is part of the weights, W + alpha / r A B, to generate or to save; then the old ones are back,
    bit for bit."""
    trunk, _ = trunk_of(model)
    with adapter(model, name):
        layers = [m for m in trunk.modules() if isinstance(m, LoRALinear) and name in m.lora_a]
        kept = [layer.weight.detach().clone() for layer in layers]
        trunk.adapters.active, trunk.adapters.merged = None, name
        try:
            for layer in layers:
                layer.weight.data += layer.scale(name) * (layer.lora_a[name] @ layer.lora_b[name]).detach().T
            yield model
        finally:
            trunk.adapters.merged = None
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight.data.copy_(weight)


def train_only(model, what):
    """what: all, adapters, or last:k (the last k blocks and the norm behind them). Heads always learn."""
    match = re.fullmatch(r"all|adapters|last:([1-9]\d*)", what)
    if not match:
        raise InputError(f"what can be trained is all, adapters or last:k, not '{what}'")
    trunk, _ = trunk_of(model)
    blocks = [f"{name}." for name, m in trunk.named_modules() if isinstance(m, (GPTBlock, PaLMBlock, T5Block))]
    last = (*blocks[-int(match[1] or 1):], "ln_f.", "decoder.ln_f.")
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_(what == "all" or (".lora_" in name if what == "adapters" else name.startswith(last)))


class Adapted:
    """The model as it is with one adapter, or with none: the reference. All that share a trunk hold its weights once."""

    def __init__(self, model, name):
        self.model, self.name, self.config, self.pad_id = model, name, model.config, trunk_of(model)[0].pad_id

    def hidden(self, prompt, response):
        with adapter(self.model, self.name):
            return self.model.hidden(prompt, response)

    def head(self, x):
        return self.model.head(x)       # no adapter is on it

    def __call__(self, prompt, response):
        with adapter(self.model, self.name):
            return self.model(prompt, response)


def prepare(model, config, name):
    """What of a stage's model learns, by its options: all weights, the last blocks, or an adapter of that name alone, active from here on."""
    trunk, _ = trunk_of(model)
    trunk.checkpointing = config.checkpointing
    if config.lora and config.trainable != "all":
        raise InputError(f"--lora {config.lora} trains an adapter alone: leave --trainable {config.trainable} out")
    if not config.lora:
        return train_only(model, config.trainable)
    trunk.requires_grad_(False)         # the weights, and other adapters on them
    add_adapter(model, name, config.lora)
    trunk.adapters.active = name


def save(path, model, **about):
    """save_model(), with the active adapter, if there is one, merged into the weights; it goes to adapter.pt beside them, too."""
    if name := trunk_of(model)[0].adapters.active:
        save_adapter(path.with_name("adapter.pt"), model, name)
        with merged(model, name):
            save_model(path, model, **about)
    else:
        path.with_name("adapter.pt").unlink(missing_ok=True)        # of an earlier run
        save_model(path, model, **about)


def megabytes(models, optimizer):
    """What these hold between two steps: weights, gradients and the optimizer's state, shared tensors once."""
    tensors = [x for model in models for x in model.state_dict().values()] + [p.grad for model in models for p in model.parameters()]
    tensors += [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    return sum({x.data_ptr(): x.nbytes for x in tensors if x is not None}.values()) / 1e6


def fingerprint(trunk):
    """A number that tells trunks apart: the CRC-32 of all weights that are no adapter's."""
    crc = 0
    for name, weight in trunk.state_dict().items():
        crc = crc if ".lora_" in name else zlib.crc32(weight.cpu().contiguous().numpy().tobytes(), crc)
    return crc


def save_adapter(path, model, name):
    """Writes an adapter and the model's heads, without the trunk: kilobytes."""
    trunk, start = trunk_of(model)
    ends = (f".lora_a.{name}", f".lora_b.{name}")
    weights = {n: w for n, w in model.state_dict().items() if n.endswith(ends) or not n.startswith(start)}
    with replacing(path) as temporary:
        torch.save({"name": name, "settings": trunk.adapters.settings[name], "trunk": fingerprint(trunk), "weights": weights}, temporary)


def load_adapter(path, model):
    """Puts a saved adapter, and its heads, on a model with the trunk that it was trained on. Returns the adapter's name."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    name, (trunk, _) = saved["name"], trunk_of(model)
    if saved["trunk"] != fingerprint(trunk):
        raise InputError(f"{path}: this adapter belongs to another model than the one that it is put on; train it again from this one")
    if trunk.adapters.settings.get(name) != saved["settings"]:
        add_adapter(model, name, **saved["settings"])
    expected = {n: w.shape for n, w in model.state_dict().items()}
    if wrong := [n for n, w in saved["weights"].items() if expected.get(n) != w.shape]:
        raise InputError(f"{path}: this adapter belongs to another model: {wrong[0]} does not fit")
    model.load_state_dict(saved["weights"], strict=False)
    return name
