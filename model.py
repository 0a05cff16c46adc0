"""
The networks, from scratch: GPT-2, PaLM and T5, their heads, the key-value cache, sampling, load and save.

One interface hides the architecture, so that no stage ever asks which one it has:

    model.hidden(prompt, response)                      -> (B, R, C)  states that predict response[:, t], ids or one-hot (B, R, V)
    model.logits(prompt, response)                      -> (B, R, V)
    model.generate(prompt, max_new_tokens, ...)         -> response (B, R), logprobs (B, R)
    logprobs(model, prompt, response, temperature)      -> (B, R)     the one place where log-probs are computed
    scorer(prompt, response)                            -> (B,)       reward model

Shapes: B batch, P prompt tokens, R response tokens, T = P + R, S keys, C = n_embd, nh heads, hs head size, V vocab_size.
Prompts are padded on the left, responses on the right, after their end token. The pad id is V: one past the last token, so
no model can ever emit it, and it is never the end id.

    python model.py export runs/ppo/ckpt.pt out/     config.json, model.safetensors and tokenizer.json for transformers, TRL, vLLM
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.checkpoint import checkpoint

from common import InputError, all_mean, gather, replacing, run, shard


@dataclass(slots=True)
class ModelConfig:
    arch: str = "gpt"           # gpt, palm or t5
    vocab_size: int = 4096      # the pad id is vocab_size itself
    end_id: int = 4095          # a response ends with this token
    start_id: int = 4095        # what T5's decoder starts with
    block_size: int = 64        # longest prompt + response (T5: longest of either)
    n_layer: int = 4            # T5: this many in the encoder and as many in the decoder
    n_head: int = 4
    n_embd: int = 128
    head_size: int = 0          # 0: n_embd / n_head
    n_inner: int = 0            # width of the feed-forward layers; 0: 4 n_embd
    dropout: float = 0.0
    xpos: bool = False          # PaLM: let rotary attention decay with distance (arXiv 2212.10554)
    qk_norm: bool = False       # PaLM: normalize queries and keys (arXiv 2302.05442)
    gated: bool = True          # T5 v1.1: gated GELU and an untied head; False is v1.0: ReLU and a tied head
    n_buckets: int = 32         # T5: buckets of relative distance
    max_distance: int = 128     # T5: the last bucket holds all distances beyond this

    def __post_init__(self):
        if self.arch not in ("gpt", "palm", "t5"):
            raise InputError(f"--arch is gpt, palm or t5, not '{self.arch}'")
        if self.n_embd % self.n_head and not self.head_size:
            raise InputError(f"--n_embd {self.n_embd} does not divide into --n_head {self.n_head} heads")
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd
        if self.arch == "palm" and self.head_size % 2:
            raise InputError(f"PaLM's rotary positions need an even head size, not {self.head_size} = n_embd / n_head")

# -----------------------------------------------------------------------------
# attention

def attend(q, k, v, bias, scale):
    """softmax(scale q k^T + bias) v, Eq. 1 of https://arxiv.org/abs/1706.03762.

    q (B, nh, T, hs); k, v (B, nh, S, hs), or (B, 1, S, hs) for multi-query; bias broadcasts to (B, nh, T, S), -inf where a query
    may not look. Written out on a CPU, where that is several times faster than SDPA for short texts; SDPA elsewhere."""
    if q.device.type != "cpu":
        k, v = (x.expand(-1, q.size(1), -1, -1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)
    att = (q @ k.transpose(-2, -1)) * scale + bias   # (B, nh, T, S)
    return att.softmax(dim=-1).to(v.dtype) @ v       # (B, nh, T, hs)


def split_heads(x, n_head):
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)   # (B, T, nh * hs) -> (B, nh, T, hs)


def join_heads(x):
    return x.transpose(1, 2).flatten(2)                    # (B, nh, T, hs) -> (B, T, nh * hs)


def causal_bias(real, T):
    """0 where a query may look, -inf where not. real (B, S): which keys are no padding; the queries are the last T positions.
    A position always sees itself, so that no row is empty (the softmax of nothing is NaN). -> (B, 1, T, S)"""
    S = real.size(1)
    query, key = torch.arange(S - T, S, device=real.device)[:, None], torch.arange(S, device=real.device)
    return mask_bias((key < query) & real[:, None, None, :] | (key == query))


def mask_bias(mask):
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)   # added to attention's logits


class Cache:
    """What generation keeps between tokens: keys and values of each layer, written in place, and which positions are real."""

    def __init__(self, capacity):
        self.capacity, self.length, self.layers, self.real, self.encoded = capacity, 0, {}, None, None

    def extend(self, layer, k, v):
        """Appends the new keys and values (B, nh, T, hs) of a layer; returns all of that layer so far, (B, nh, S, hs)."""
        if layer not in self.layers:
            shape = (*k.shape[:2], self.capacity, k.size(3))
            self.layers[layer] = k.new_empty(shape), v.new_empty(shape)
        end = self.length + k.size(2)
        for kept, new in zip(self.layers[layer], (k, v), strict=True):
            kept[:, :, self.length:end] = new
        return tuple(kept[:, :, :end] for kept in self.layers[layer])

    def once(self, layer, make):
        """Keys and values that do not grow, those of T5's encoded prompt: made at the first token, then kept."""
        if layer not in self.layers:
            self.layers[layer] = make()
        return self.layers[layer]

# -----------------------------------------------------------------------------
# GPT-2: https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf

class GPTAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.scale, inner = config.n_head, config.head_size ** -0.5, config.n_head * config.head_size
        self.c_attn = nn.Linear(config.n_embd, 3 * inner)
        self.c_proj = nn.Linear(inner, config.n_embd)

    def forward(self, x, bias, cache, layer):
        q, k, v = (split_heads(y, self.n_head) for y in self.c_attn(x).chunk(3, dim=-1))   # (B, nh, T, hs) each
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        return self.c_proj(join_heads(attend(q, k, v, bias, self.scale)))


class GPTMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))   # GPT-2's GELU is the tanh approximation


class GPTBlock(nn.Module):
    """x + attn(ln(x)), then x + mlp(ln(x))."""

    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), GPTAttention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), GPTMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, bias, rotary, cache, layer):
        x = x + self.dropout(self.attn(self.ln_1(x), bias, cache, layer))
        return x + self.dropout(self.mlp(self.ln_2(x)))

# -----------------------------------------------------------------------------
# PaLM: https://arxiv.org/abs/2204.02311. Here its weights start like GPT-2's, at N(0, .02); the paper's embedding starts at
# N(0, 1), and its logits are divided by sqrt(C).

def rotary_angles(positions, head_size):
    """Angles position * 10000^(-2i/hs) of https://arxiv.org/abs/2104.09864, Eq. 15. positions (B, T) -> (B, 1, T, hs/2)"""
    frequencies = 10000 ** (-torch.arange(0, head_size, 2, device=positions.device) / head_size)
    return (positions[:, :, None] * frequencies)[:, None]


def rotate(x, angles, decay=1.0):
    """Rotates each pair (x_i, x_{i + hs/2}) by its angle, so that q.k depends on the distance alone. x (B, nh, T, hs)"""
    a, b = x.float().chunk(2, dim=-1)                      # (B, nh, T, hs/2) each
    cos, sin = angles.cos() * decay, angles.sin() * decay
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class PaLMBlock(nn.Module):
    """x + attn(ln(x)) + mlp(ln(x)) in parallel; multi-query attention (one key and value head for all queries), SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.scale = config.n_head, config.head_size ** -0.5
        self.sizes = [config.n_head * config.head_size, config.head_size, config.head_size, config.n_inner, config.n_inner]
        self.ln = nn.LayerNorm(config.n_embd, bias=False)
        self.c_fused = nn.Linear(config.n_embd, sum(self.sizes), bias=False)   # q, k, v, gate and value of SwiGLU in one product
        self.attn_proj = nn.Linear(self.sizes[0], config.n_embd, bias=False)
        self.mlp_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.LayerNorm(config.head_size, bias=False) for _ in range(2))
        self.xpos, self.dropout = config.xpos, nn.Dropout(config.dropout)

    def forward(self, x, bias, rotary, cache, layer):
        positions, angles = rotary
        q, k, v, gate, value = self.c_fused(self.ln(x)).split(self.sizes, dim=-1)
        q, k, v = self.q_norm(split_heads(q, self.n_head)), self.k_norm(k[:, None]), v[:, None]   # k, v (B, 1, T, hs)
        decay = torch.ones_like(angles)
        if self.xpos:   # zeta_i^(n/512) with zeta_i = (2i/hs + .4) / 1.4, up in q and down in k: q.k decays with distance
            zeta = (torch.arange(angles.size(-1), device=x.device) / angles.size(-1) + 0.4) / 1.4
            decay = zeta ** (positions[:, None, :, None] / 512)
        q, k = rotate(q, angles, decay), rotate(k, angles, 1 / decay)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        attention = self.attn_proj(join_heads(attend(q, k, v, bias, self.scale)))
        return x + self.dropout(attention + self.mlp_proj(F.silu(gate) * value))

# -----------------------------------------------------------------------------
# T5: https://arxiv.org/abs/1910.10683; version 1.1 has the gated GELU of https://arxiv.org/abs/2002.05202

def relative_buckets(distance, n_buckets, max_distance, causal):
    """The bucket of each distance key - query: one for each short distance, then ever wider ones, logarithmically, up to
    max_distance. The encoder splits them: half for keys on the left, half for keys on the right. Any shape -> the same."""
    side = 0
    if causal:
        distance = (-distance).clamp(min=0)
    else:
        n_buckets //= 2
        side, distance = n_buckets * (distance > 0), distance.abs()
    exact = n_buckets // 2
    # exact + log(d / exact) / log(max_distance / exact) (n_buckets - exact), rounded down
    far = exact + (torch.log(distance / exact) / math.log(max_distance / exact) * (n_buckets - exact)).clamp(min=0).long()
    return side + torch.where(distance < exact, distance, far.clamp(max=n_buckets - 1))


class T5Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, inner = config.n_head, config.n_head * config.head_size
        self.q, self.k, self.v = (nn.Linear(config.n_embd, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.n_embd, bias=False)

    def forward(self, x, bias, cache, encoded=None):
        """Self-attention, or with the encoder's states (B, P, C) cross-attention to these."""
        def keys_values():
            return [split_heads(f(x if encoded is None else encoded), self.n_head) for f in (self.k, self.v)]
        q = split_heads(self.q(x), self.n_head)                    # (B, nh, T, hs)
        if cache is None:
            k, v = keys_values()                                   # (B, nh, S, hs) each
        else:
            k, v = cache.extend(self, *keys_values()) if encoded is None else cache.once(self, keys_values)
        return self.o(join_heads(attend(q, k, v, bias, 1.0)))      # unscaled: small initial queries stand in for 1 / sqrt(hs)


class T5MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        for name in ("wi_0", "wi_1") if config.gated else ("wi",):
            self.add_module(name, nn.Linear(config.n_embd, config.n_inner, bias=False))
        self.wo, self.gated = nn.Linear(config.n_inner, config.n_embd, bias=False), config.gated

    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x) if self.gated else F.relu(self.wi(x)))


class T5Block(nn.Module):
    """x + attn(ln(x)), in the decoder x + cross(ln(x)) to the prompt, then x + mlp(ln(x))."""

    def __init__(self, config, decoder):
        super().__init__()
        self.ln_1, self.attn = nn.RMSNorm(config.n_embd, eps=1e-6), T5Attention(config)
        if decoder:
            self.ln_cross, self.cross = nn.RMSNorm(config.n_embd, eps=1e-6), T5Attention(config)
        self.ln_2, self.mlp = nn.RMSNorm(config.n_embd, eps=1e-6), T5MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, bias, cache, encoded=None, encoded_bias=None):
        x = x + self.dropout(self.attn(self.ln_1(x), bias, cache))
        if encoded is not None:
            x = x + self.dropout(self.cross(self.ln_cross(x), encoded_bias, cache, encoded))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class T5Stack(nn.Module):
    """The encoder or the decoder: its blocks, and the bias of each relative position, which they share."""

    def __init__(self, config, decoder):
        super().__init__()
        self.buckets, self.decoder = (config.n_buckets, config.max_distance), decoder
        self.relative = nn.Embedding(config.n_buckets, config.n_head)
        self.h = nn.ModuleList(T5Block(config, decoder) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)

    def bias(self, T, S):
        """For the last T of S positions -> (1, nh, T, S)"""
        key = torch.arange(S, device=self.relative.weight.device)
        buckets = relative_buckets(key - key[S - T:, None], *self.buckets, causal=self.decoder)   # (T, S)
        return self.relative(buckets).permute(2, 0, 1)[None]

# -----------------------------------------------------------------------------
# the language models

class LanguageModel(nn.Module):
    """What GPT-2, PaLM and T5 have in common. A subclass has hidden(), head(), prefill() and step()."""

    def __init__(self, config):
        super().__init__()
        self.config, self.pad_id = config, config.vocab_size
        self.checkpointing = False      # recompute activations in the backward pass: less memory, more time, same numbers
        self.adapters = SimpleNamespace(active=None, merged=None, settings={})     # one switch for all layers, see lora.py

    def real(self, tokens):
        """Which are no pads -> (B, T)"""
        return tokens != self.pad_id if tokens.dim() == 2 else tokens.detach().sum(dim=-1) > 0.5

    def embed(self, tokens):
        """tokens (B, T) -> (B, T, C). One-hot vectors (B, T, V), zeros on pads, are read as their ids, and get a gradient."""
        if tokens.dim() == 3:
            return self.embed(tokens.argmax(dim=-1)) + (tokens - tokens.detach()) @ self.wte.weight
        return self.wte(tokens.masked_fill(tokens == self.pad_id, 0))   # pads are masked in attention: any row will do

    def join(self, tokens, response):
        """tokens (B, T) and then the response without its last token, of which nothing is asked -> (B, T + R - 1) or one-hot"""
        if response.dim() == 3:
            tokens = F.one_hot(tokens, self.pad_id + 1)[..., :-1].to(response.dtype)
        return torch.cat([tokens, response[:, :-1]], dim=1)

    def block(self, block, *args):
        if not (self.checkpointing and torch.is_grad_enabled()):
            return block(*args)
        if self.adapters.settings:      # the backward pass may run when another adapter is active, or none
            return checkpoint(self.under, self.adapters.active, block, *args, use_reentrant=False)
        return checkpoint(block, *args, use_reentrant=False)

    def under(self, adapter, function, *args):
        """function(*args) with this adapter active."""
        before, self.adapters.active = self.adapters.active, adapter
        try:
            return function(*args)
        finally:
            self.adapters.active = before

    def logits(self, prompt, response):
        """Scores of every next token at each response position: [:, t] sees the prompt and response[:, :t]. -> (B, R, V)"""
        return self.head(self.hidden(prompt, response))

    def check_length(self, length):
        if length > self.config.block_size:
            raise InputError(f"{length} tokens do not fit this model's block of {self.config.block_size}")

    @torch.no_grad()
    def generate(self, prompt, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """Samples responses. prompt (B, P), left-padded -> response (B, R), right-padded after its end token; logprobs (B, R) of
        the sampled tokens under the distribution that they were drawn from, 0 on pads. R <= max_new_tokens.
        Several processes share the work: each writes its rows, and all get all of them."""
        B, prompt = len(prompt), shard(prompt, even=False)
        cache = Cache(prompt.size(1) + max_new_tokens)
        x = self.prefill(prompt, cache, max_new_tokens)                                   # (B, C)
        done = torch.zeros(prompt.size(0), dtype=torch.bool, device=prompt.device)
        response, chosen = [], []
        while True:
            logp = sampling_logprobs(self.head(x), temperature, top_k, top_p)             # (B, V)
            token = sample(logp, generator, B)                                            # (B,)
            chosen.append(logp.gather(1, token[:, None]).squeeze(1).masked_fill(done, 0))
            response.append(token.masked_fill(done, self.pad_id))
            done = done | (token == self.config.end_id)
            if len(response) == max_new_tokens or all_mean(done.all().float()) == 1:
                return gather(torch.stack(response, 1), B), gather(torch.stack(chosen, 1), B)
            x = self.step(response[-1], cache)


class DecoderLM(LanguageModel):
    """GPT-2 or PaLM: prompt and response share one sequence."""

    def __init__(self, config):
        super().__init__(config)
        gpt = config.arch == "gpt"
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if gpt else None    # PaLM's positions are rotary
        self.h = nn.ModuleList((GPTBlock if gpt else PaLMBlock)(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=gpt)
        self.dropout = nn.Dropout(config.dropout)
        init_weights(self, config)

    def trunk(self, tokens, cache=None):
        """tokens (B, T) -> states after the last norm (B, T, C). Pads are invisible and do not count as positions."""
        T, real = tokens.size(1), self.real(tokens)
        if cache is not None:
            real = cache.real = real if cache.real is None else torch.cat([cache.real, real], dim=1)   # (B, S)
        positions = (real.cumsum(1) - real.long())[:, -T:]          # exclusive: 0 0 1 1 1 -> 0 0 0 1 2
        bias = causal_bias(real, T)                                 # (B, 1, T, S)
        x, rotary = self.embed(tokens), None                        # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(positions.clamp(max=self.config.block_size - 1))       # a pad behind a text that fills the block
        else:
            rotary = positions, rotary_angles(positions, self.config.head_size)
        x = self.dropout(x)
        for layer, block in enumerate(self.h):
            x = self.block(block, x, bias, rotary, cache, layer)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def hidden(self, prompt, response):
        """The states that predict the response: position P - 1 + t predicts response[:, t]. -> (B, R, C)"""
        tokens = self.join(prompt, response)
        if tokens.size(1) > self.config.block_size:     # a long prompt beside a long response: pads count as no position
            self.check_length(self.real(tokens).sum(dim=1).max().item())
        return self.trunk(tokens)[:, prompt.size(1) - 1:]

    def head(self, x):
        return F.linear(x, self.wte.weight)                         # tied to the embedding

    def prefill(self, prompt, cache, max_new_tokens):
        self.check_length(prompt.size(1) + max_new_tokens - 1)
        return self.trunk(prompt, cache)[:, -1]

    def step(self, token, cache):
        return self.trunk(token[:, None], cache)[:, -1]


class T5(LanguageModel):
    """The encoder reads the prompt, the decoder writes the response; what it reads first is start_id."""

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.encoder, self.decoder = T5Stack(config, decoder=False), T5Stack(config, decoder=True)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False) if config.gated else None
        init_t5(self, config)

    def run(self, stack, tokens, mask, *rest):
        """tokens (B, T) through all blocks of a stack -> (B, T, C)"""
        x = stack.dropout(self.embed(tokens))
        bias = mask + stack.bias(tokens.size(1), mask.size(-1))     # (B, nh, T, S)
        for block in stack.h:
            x = self.block(block, x, bias, *rest)
        return stack.dropout(stack.ln_f(x))

    def encode(self, prompt):
        """The states of the prompt (B, P, C), and the bias (B, 1, 1, P) that hides its pads from whoever looks at them."""
        real = self.real(prompt)
        real[:, -1] = True              # only an empty prompt ends with a pad; the softmax of nothing would be NaN
        bias = mask_bias(real[:, None, None])
        return self.run(self.encoder, prompt, bias, None), bias

    def decode(self, tokens, encoded, encoded_bias, cache=None):
        """tokens (B, T), behind those in the cache -> (B, T, C). Pads come last, so that hiding the future hides them too."""
        S = tokens.size(1) + (cache.length if cache else 0)
        bias = causal_bias(torch.ones(1, S, dtype=torch.bool, device=tokens.device), tokens.size(1))
        x = self.run(self.decoder, tokens, bias, cache, encoded, encoded_bias)
        if cache is not None:
            cache.length = S
        return x

    def hidden(self, prompt, response):
        self.check_length(max(prompt.size(1), response.size(1) - 1))
        start = prompt.new_full((len(prompt), 1), self.config.start_id)
        return self.decode(self.join(start, response), *self.encode(prompt))

    def head(self, x):
        if self.lm_head is not None:
            return self.lm_head(x)
        return F.linear(x * self.config.n_embd ** -0.5, self.wte.weight)   # tied, to an embedding whose entries are near 1

    def prefill(self, prompt, cache, max_new_tokens):
        self.check_length(max(prompt.size(1), max_new_tokens - 1))
        cache.encoded = self.encode(prompt)
        return self.step(prompt.new_full((len(prompt),), self.config.start_id), cache)

    def step(self, token, cache):
        return self.decode(token[:, None], *cache.encoded, cache)[:, -1]


def init_weights(model, config):
    """N(0, .02) for matrices, 0 for biases; projections back into the residual stream are smaller by sqrt(2 n_layer)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("proj.weight") else 0.02
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def init_t5(model, config):
    """N(0, 1) for the embedding, N(0, 1/inputs) for matrices, and queries smaller by sqrt(hs), since attention is not scaled."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            std = 1.0 if name == "wte.weight" else (config.n_embd if "relative" in name else parameter.size(1)) ** -0.5
            nn.init.normal_(parameter, std=std * (config.head_size ** -0.5 if name.endswith(".q.weight") else 1))


def build_model(config):
    return T5(config) if config.arch == "t5" else DecoderLM(config)

# -----------------------------------------------------------------------------
# log-probs and sampling

def sampling_logprobs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The log of the distribution that tokens are drawn from. logits (..., V) -> (..., V), float32.

    temperature divides the logits (0: all mass on the best token); top_k keeps that many tokens (0: all); top_p keeps the
    smallest set of most likely tokens whose probabilities sum to at least top_p (1: all)."""
    logits = logits.float()
    if temperature == 0:
        top_k, temperature = 1, 1.0
    logits = logits / temperature
    if top_k:
        best = logits.topk(min(top_k, logits.size(-1)), dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
    if top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        p = sorted_logits.softmax(dim=-1)
        beyond = p.cumsum(dim=-1) - p >= top_p             # the mass before this token is enough already
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -math.inf)
    return logits.log_softmax(dim=-1)


def sample(logp, generator=None, rows=0):
    """Draws a token by inverting the distribution function, faster than torch.multinomial. logp (B, V) -> (B,)
    rows: of how many logp is this process's share; the noise is drawn for all of them."""
    cdf = logp.exp().cumsum(dim=-1)
    # u in (0, sum]: the first token whose cdf reaches u has a probability above 0, whatever the rounding
    u = torch.rand(rows or len(cdf), 1, generator=generator, device=cdf.device)
    u = (1 - (shard(u, even=False) if rows else u)) * cdf[:, -1:]
    return torch.searchsorted(cdf, u).squeeze(1).clamp(max=logp.size(1) - 1)


def logprobs(model, prompt, response, temperature=1.0, top_k=0, top_p=1.0, hidden=None):
    """log pi(response[:, t] | prompt, response[:, :t]) of the distribution that generate() samples from with the same
    arguments; 0 on pads. prompt (B, P), response (B, R) -> (B, R) float32. hidden: model.hidden(prompt, response), if known."""
    logits = model.head(model.hidden(prompt, response) if hidden is None else hidden)          # (B, R, V)
    if top_k or top_p < 1 or temperature == 0:
        logits = sampling_logprobs(logits, temperature, top_k, top_p)
    elif temperature != 1:
        logits = logits / temperature
    # cross_entropy is -log_softmax at the target, and 0 where the target is a pad
    return -F.cross_entropy(logits.flatten(0, 1).float(), response.flatten(), ignore_index=model.pad_id,
                            reduction="none").view_as(response)


# -----------------------------------------------------------------------------
# heads

class Scorer(nn.Module):
    """A language model with a scalar head on the state that has read a text: scorer(prompt, response) -> (B,), a reward model.

    With a likelihood, the text's log-prob under that same language model counts too, with a weight that is learned. A linear head cannot
    compare what was foreseen with what came; the model's own logits do, and so tell broken text from good at once (DPO's view of a reward)."""

    def __init__(self, model, likelihood=0.0):
        super().__init__()
        self.model, self.config = model, model.config
        self.scalar = nn.Linear(model.config.n_embd, 1)
        nn.init.normal_(self.scalar.weight, std=1 / math.sqrt(model.config.n_embd + 1))
        nn.init.zeros_(self.scalar.bias)
        self.likelihood = nn.Parameter(torch.tensor(float(likelihood))) if likelihood else None
        self.register_buffer("gain", torch.tensor(1.0))    # score = gain * raw + shift, set by normalize()
        self.register_buffer("shift", torch.tensor(0.0))

    def forward(self, prompt, response):
        """The score of whole responses, read from the state that has seen the last real token (the end token). -> (B,)"""
        # one more pad, so that there is a state behind the last token: state t has read response[:, :t]
        x = self.model.hidden(prompt, F.pad(response, (0, 1), value=self.model.pad_id))      # (B, R + 1, C)
        last = (response != self.model.pad_id).sum(dim=1)                                     # (B,)
        raw = self.scalar(x[torch.arange(len(x), device=x.device), last]).squeeze(-1).float() # (B,)
        if self.likelihood is not None:
            raw = raw + self.likelihood * logprobs(self.model, prompt, response, hidden=x[:, :-1]).sum(dim=1)
        return self.gain * raw + self.shift

    @torch.no_grad()
    def normalize(self, scores):
        """Rescales, so that responses whose scores are `scores` now have mean 0 and standard deviation 1."""
        gain = 1 / scores.std(correction=0).clamp(min=1e-6)
        self.gain.mul_(gain)
        self.shift.sub_(scores.mean()).mul_(gain)

# -----------------------------------------------------------------------------
# load and save

def save_model(path, model, **about):
    """Writes one checkpoint: the weights without adapters, all that rebuilds the model, and what the stage says about it."""
    weights = {name: w for name, w in model.state_dict().items() if ".lora_" not in name}
    with replacing(path) as temporary:
        torch.save({"model": weights, "config": asdict(model.config), "scorer": isinstance(model, Scorer)} | about,
                   temporary)


def load_model(path, device="cpu"):
    """The model of a checkpoint, in eval mode; or pretrained weights, if path is a folder or a name such as gpt2 (pretrained.py).
    Raises InputError if it is not there, naming the command that makes it."""
    name, path = str(path), Path(path)
    if path.is_dir() or not path.exists() and path.suffix != ".pt":
        from pretrained import load_pretrained
        return load_pretrained(name, device)
    if not path.exists():
        raise InputError(f"{path} is not there; make it with: python {path.parent.name}.py")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = build_model(ModelConfig(**saved["config"]))
    if saved["scorer"]:
        model = Scorer(model, saved["model"].get("likelihood", 0))
    model.load_state_dict(saved["model"])
    model.tokenizer = saved.get("tokenizer", "")
    return model.to(device).eval()


if __name__ == "__main__":
    from pretrained import export
    run(lambda: tyro.extras.subcommand_cli_from_dict({"export": export}))
