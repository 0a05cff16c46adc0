"""
LoRA, https://arxiv.org/abs/2106.09685: W stays frozen; a small product A B beside it is trained.

Several adapters live on one frozen trunk ("hydra", https://arxiv.org/abs/2309.00754): policy and
reward model have one each, and with none of them active the trunk is the reference.

    add_adapter(model, "policy", rank=8)
    train_only(model, "adapters")
    with adapter(model, "policy"):
        logp = logprobs(model, prompt, response)
    with adapter(model, None):
        ref_logp = logprobs(model, prompt, response)

A model here is a language model, or one with heads on it (RewardModel); the language model in it is
the trunk. In the stages, --lora R trains an adapter of rank R alone, and --trainable last:k the
last k blocks. ckpt.pt then holds the merged model, and adapter.pt the adapter and heads alone.
"""

import contextlib
import functools
import re
import zlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import InputError, atomic_write, pick_dtype
from model import (
    GPTBlock,
    LanguageModel,
    LlamaBlock,
    PaLMBlock,
    RewardModel,
    T5Block,
    load_model,
    load_reward_model,
    load_weights,
    read_tensors,
    save_model,
)

BLOCKS = (GPTBlock, PaLMBlock, LlamaBlock, T5Block)


class LoRALinear(nn.Linear):
    """y = x W + b + alpha / r x A B, Eq. 3 of the paper.

    W and b are the trunk's; A (inputs, r) and B (r, outputs) are those of the active adapter."""

    def __init__(self, linear):
        # Skips nn.Linear's own constructor, which would draw new weights.
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a, self.lora_b = nn.ParameterDict(), nn.ParameterDict()     # of each adapter
        self.scale = {}             # alpha / r of each adapter
        self.active = None          # the adapter that forward() uses, or None

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.active not in self.lora_a:
            return y
        update = x @ self.lora_a[self.active] @ self.lora_b[self.active]      # (.., outputs)
        return y + self.scale[self.active] * update


def trunk_of(model):
    """The language model in a model, and what the names of its parameters start with."""
    for name, module in model.named_modules():
        if isinstance(module, LanguageModel):
            return module, f"{name}." if name else ""
    raise ValueError("there is no language model in this model")


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def active_adapter(model):
    """The name of the active adapter, or None."""
    return next((layer.active for layer in lora_layers(model)), None)


def set_active(model, name):
    for layer in lora_layers(model):
        layer.active = name


def add_adapter(model, name, rank=8, alpha=16.0):
    """A new adapter on all linear layers of the trunk but the output layer.

    A ~ N(0, 1/inputs) and B = 0, so it changes nothing yet. Raises InputError if the name is
    taken."""
    trunk, _ = trunk_of(model)
    if any(name in layer.lora_a for layer in lora_layers(trunk)):
        raise InputError(f"there is an adapter '{name}' already")
    for path, layer in list(trunk.named_modules()):
        if not isinstance(layer, nn.Linear) or path == "lm_head":
            continue
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer)
            trunk.set_submodule(path, layer)
        like = {"device": layer.weight.device, "dtype": torch.float32}      # it is trained
        a = torch.empty(layer.in_features, rank, **like)
        b = torch.zeros(rank, layer.out_features, **like)
        layer.lora_a[name] = nn.Parameter(nn.init.normal_(a, std=layer.in_features ** -0.5))
        layer.lora_b[name] = nn.Parameter(b)
        layer.scale[name] = alpha / rank


@contextlib.contextmanager
def adapter(model, name):
    """In this block the model computes with that adapter; None is the trunk alone.

    Raises InputError if there is no such adapter."""
    layers = lora_layers(model)
    if name is not None and not any(name in layer.lora_a for layer in layers):
        raise InputError(f"there is no adapter '{name}' on this model")
    before = [layer.active for layer in layers]
    set_active(model, name)
    try:
        yield model
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


class AdapterView(nn.Module):
    """A model that computes with one adapter whenever it is called; None is the trunk alone.

    All views of a trunk share its weights."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name
        self.config = model.config
        self.pad_token_id = trunk_of(model)[0].pad_token_id

    def forward(self, prompt, response):
        with adapter(self.model, self.name):
            return self.model(prompt, response)

    def hidden(self, prompt, response):
        with adapter(self.model, self.name):
            return self.model.hidden(prompt, response)

    def head(self, x):
        return self.model.head(x)           # no adapter is on it

    def generate(self, *args, **options):
        with adapter(self.model, self.name):
            return self.model.generate(*args, **options)

# -----------------------------------------------------------------------------
# which parameters are trained

def train_only(model, what):
    """Freezes all of the trunk but `what`: all, adapters, or last:k, the last k blocks and the
    norm after them. Heads are always trained. Raises InputError if `what` is none of these."""
    match = re.fullmatch(r"all|adapters|last:([1-9]\d*)", what)
    if not match:
        raise InputError(f"--trainable is all or last:k, such as last:2, not '{what}'")
    trunk, _ = trunk_of(model)
    blocks = [f"{path}." for path, module in trunk.named_modules() if isinstance(module, BLOCKS)]
    last = (*blocks[-int(match[1] or 1):], "ln_f.", "decoder.ln_f.")
    for name, parameter in trunk.named_parameters():
        if what == "all":
            trained = True
        elif what == "adapters":
            trained = ".lora_" in name
        else:
            trained = name.startswith(last)
        parameter.requires_grad_(trained)


def freeze(model, config):
    """A model that is not trained: sets that, and returns the model.

    Its linear layers get the dtype that the stage computes in, which is half the memory if that
    is bfloat16. Autocast casts them to it at each use anyway, to the same numbers; embeddings and
    norms it leaves in float32."""
    model.requires_grad_(False)
    dtype = getattr(torch, pick_dtype(config, next(model.parameters()).device))
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.to(dtype)
            if layer.bias is not None:
                layer.bias.data = layer.bias.to(dtype)
    return model


class Recomputed:
    """The forward() of a block that keeps only its inputs and runs again in the backward pass."""

    def __init__(self, block):
        self.block = block

    def __call__(self, *args):
        forward = functools.partial(type(self.block).forward, self.block)
        if not torch.is_grad_enabled():
            return forward(*args)
        active = active_adapter(self.block)

        def contexts():     # the backward pass may run when another adapter is active
            return contextlib.nullcontext(), adapter(self.block, active)

        # Dropout alone is random, and must drop the same again.
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts,
                          preserve_rng_state=self.block.dropout.p > 0)


def prepare(model, config, name):
    """Applies the TrainOptions of a stage to its model. name: of the adapter, with --lora."""
    if config.lora and config.trainable != "all":
        raise InputError(f"--lora {config.lora} trains an adapter alone: leave out --trainable")
    trunk, _ = trunk_of(model)
    if config.lora:
        freeze(trunk, config)
        add_adapter(model, name, config.lora)
        set_active(model, name)
    else:
        train_only(model, config.trainable)
    if config.checkpointing:
        for module in trunk.modules():
            if isinstance(module, BLOCKS):
                module.forward = Recomputed(module)


def load_policy_and_reference(config, device):
    """The policy to train, and the frozen model that it starts from.

    With --lora both share one trunk: the reference is the policy with no adapter active."""
    policy = load_model(config.init, device)
    prepare(policy, config, "policy")
    if config.lora:
        return policy, AdapterView(policy, None)
    return policy, freeze(load_model(config.init, device), config)

# -----------------------------------------------------------------------------
# load and save

def merged_weights(model, name):
    """The model's state_dict() with that adapter added to the weights, W + alpha / r A B, and
    without the adapters themselves. All in float32."""
    weights = {key: w.float() for key, w in model.state_dict().items() if ".lora_" not in key}
    for path, layer in model.named_modules():
        if isinstance(layer, LoRALinear) and name in layer.lora_a:
            update = layer.lora_a[name].detach() @ layer.lora_b[name].detach()
            weights[f"{path}.weight"] = layer.weight.detach() + layer.scale[name] * update.T
    return weights


def save_trained(path, model, tok, **about):
    """save_model() for what prepare() made trainable: an active adapter is merged into the
    weights of ckpt.pt, and goes to adapter.pt beside it, too."""
    name, adapter_path = active_adapter(model), Path(path).with_name("adapter.pt")
    if name is not None:
        save_adapter(adapter_path, model, name)
    else:
        adapter_path.unlink(missing_ok=True)        # that of an earlier run
    save_model(path, model, tok, merged_weights(model, name), **about)


def fingerprint(trunk):
    """A number that tells trunks apart: the CRC-32 of all weights that are no adapter's, rounded
    as in a trunk that freeze() keeps in bfloat16."""
    crc = 0
    for name, weight in trunk.state_dict().items():
        if ".lora_" not in name:
            rounded = weight.to("cpu", torch.bfloat16).contiguous()
            crc = zlib.crc32(rounded.view(torch.int16).numpy(), crc)
    return crc


def adapter_weights(model, name):
    """The part of model.state_dict() that is an adapter's or the heads'."""
    _, prefix = trunk_of(model)
    adapter_keys = (f".lora_a.{name}", f".lora_b.{name}")
    return {key: w for key, w in model.state_dict().items()
            if key.endswith(adapter_keys) or not key.startswith(prefix)}


def save_adapter(path, model, name):
    """Writes an adapter and the model's heads, without the trunk: kilobytes."""
    trunk, _ = trunk_of(model)
    layer = lora_layers(trunk)[0]
    rank = layer.lora_a[name].size(1)
    content = {"name": name, "rank": rank, "alpha": layer.scale[name] * rank,
               "trunk": fingerprint(trunk), "weights": adapter_weights(model, name)}
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def read_adapter(path):
    """What save_adapter() wrote. Raises InputError if it is damaged or foreign."""
    saved = read_tensors(path)
    if not isinstance(saved, dict) or not {"name", "rank", "alpha", "trunk",
                                           "weights"} <= saved.keys():
        raise InputError(f"{path} is not an adapter of this version of wordplay; train it again")
    return saved


def load_adapter(path, model):
    """Puts a saved adapter and its heads, frozen, on a model with the trunk that they were
    trained on. Returns the adapter's name. Raises InputError if it is another trunk, or if the
    weights do not fit."""
    saved = read_adapter(path)
    name, (trunk, _) = saved["name"], trunk_of(model)
    if saved["trunk"] != fingerprint(trunk):
        raise InputError(f"{path}: this adapter was trained on another model than {name}'s is put "
                         "on; train it again from this one")
    add_adapter(model, name, saved["rank"], saved["alpha"])
    # All else keeps its weights, and no weight of the adapter or a head is left at random.
    own = adapter_weights(model, name)
    others = {key: w for key, w in model.state_dict().items() if key not in own}
    load_weights(model, others | saved["weights"], path)
    for key, parameter in model.named_parameters():
        if key in saved["weights"]:
            parameter.requires_grad_(False)
    return name


def load_frozen_reward_model(path, policy, config):
    """The reward model of a checkpoint, frozen, to score what the policy writes.

    With --lora, if it was trained with --lora as well, it is an adapter on the policy's own trunk.
    Raises what load_reward_model() raises, and InputError if that is not the trunk it was trained
    on."""
    adapter_path, device = Path(path).with_name("adapter.pt"), next(policy.parameters()).device
    if not (config.lora and adapter_path.exists()):
        return freeze(load_reward_model(path, device, policy), config)
    weights = read_adapter(adapter_path)["weights"]
    reward_model = RewardModel(policy, "likelihood" in weights).to(device)
    return AdapterView(reward_model, load_adapter(adapter_path, reward_model))
