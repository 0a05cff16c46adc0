"""
The networks, from scratch: GPT-2, PaLM, Llama, and T5; sampling, log-probs, loading, and saving.

One interface hides the architecture, so no stage ever asks which one it has:

    model(prompt, response)                  -> logits (B, R, V)    predicts response[:, t]
    model.hidden(prompt, response)           -> (B, R, C)           the states behind these logits
    model.generate(prompt, max_new_tokens)   -> response (B, R), logprobs (B, R)
    logprobs(model, prompt, response)        -> (B, R)    the one place that computes log-probs
    reward_model(prompt, response)           -> scores (B,)

Shapes: B batch, P prompt tokens, R response tokens, T new tokens, S all tokens so far,
C = n_embd, nh heads, G of them with keys of their own, hs head size, V vocab_size.

Prompts are padded on the left, responses on the right, after their end token. pad_token_id is V,
one past the last token: no model can ever emit it, and it is never the end token.
"""

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import InputError, atomic_write, progress_bar
from optim import cuda_graph


@dataclass(slots=True)
class ModelConfig:
    arch: str = "gpt"           # gpt, palm, llama or t5
    vocab_size: int = 2560      # V; the pad id is V, too
    eos_token_id: int = 2559    # a response ends with this token
    block_size: int = 64        # longest prompt + response (T5: longest of either)
    n_layer: int = 4            # T5: this many in the encoder and as many in the decoder
    n_head: int = 4             # nh, attention heads
    n_embd: int = 128           # C, width of the residual stream
    head_size: int = 0          # 0: n_embd / n_head
    n_inner: int = 0            # width of the feed-forward layers; 0: 4 n_embd
    dropout: float = 0.0        # while training, after embeddings and sublayers
    # Llama alone
    n_kv_head: int = 0          # key and value heads, each for a group of query heads; 0: n_head
    rope_theta: float = 10000.0     # base of the rotary frequencies
    norm_eps: float = 1e-5      # added to the mean square before its root is taken
    qkv_bias: bool = False      # True is Qwen2
    tied: bool = True           # the head is the embedding
    # T5 alone
    decoder_start_token_id: int = 2559      # the decoder's first input
    gated: bool = True          # v1.1: gated GELU, untied head; False is v1.0: ReLU, tied head
    n_buckets: int = 32         # buckets of relative distance
    max_distance: int = 128     # the last bucket holds all distances beyond this

    def __post_init__(self):
        if self.arch not in ARCHITECTURES:
            raise InputError(f"--arch is {' or '.join(ARCHITECTURES)}, not '{self.arch}'")
        if self.n_embd % self.n_head and not self.head_size:
            raise InputError(f"--n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}")
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise InputError(f"{self.n_head} query heads cannot share {self.n_kv_head} key heads "
                             "equally")
        if self.arch in ("palm", "llama") and self.head_size % 2:
            raise InputError(f"rotary positions rotate pairs: n_embd / n_head = "
                             f"{self.head_size} must be even")

# -----------------------------------------------------------------------------
# what all language models share, and the parts of attention

class LanguageModel(nn.Module):
    """A distribution over responses to a prompt.

    A subclass defines hidden(), head(), and for sampling prefill() and step()."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.pad_token_id = config.vocab_size
        self.tokenizer = ""         # the name of its tokenizer, set by load_model()

    def forward(self, prompt, response):
        """Logits of response[:, t], given the prompt and response[:, :t]. -> (B, R, V)"""
        return self.head(self.hidden(prompt, response))

    def embed(self, tokens):
        """(B, T) ids -> (B, T, C). Pads get row 0: no query attends to them, so any row will do."""
        return self.wte(tokens.masked_fill(tokens == self.pad_token_id, 0))

    def check_length(self, length):
        """Raises InputError if so many tokens do not fit the model."""
        if length > self.config.block_size:
            raise InputError(f"{length} tokens do not fit this model's block of "
                             f"{self.config.block_size} tokens")

    def generate(self, prompt, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, rng=None):
        """Samples a response to each prompt; see sample_responses(). -> (B, R), (B, R)"""
        return sample_responses(self, prompt, max_new_tokens, temperature, top_k, top_p, rng)


def attend(q, k, v, bias, scale):
    """softmax(scale q k^T + bias) v, Eq. 1 of https://arxiv.org/abs/1706.03762. -> (B, nh, T, hs)

    q (B, nh, T, hs); k, v (B, nh, S, hs); bias broadcasts to (B, nh, T, S) and is -inf where a
    query must not look."""
    # The fused kernel is faster than the formula for long texts on a GPU, and for one query, which
    # is how a text is written, in bfloat16 on a CPU.
    if q.device.type == "cpu":
        fused = q.size(2) == 1 and q.dtype == torch.bfloat16
    else:
        fused = k.size(2) > 128
    if fused:
        return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=scale)
    att = (q @ k.transpose(-2, -1)) * scale + bias          # (B, nh, T, S)
    return att.softmax(dim=-1).to(v.dtype) @ v              # (B, nh, T, hs)


def split_heads(x, n_head):
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)    # (B, T, nh * hs) -> (B, nh, T, hs)


def join_heads(x):
    return x.transpose(1, 2).flatten(2)                     # (B, nh, T, hs) -> (B, T, nh * hs)


def mask_bias(mask):
    """0 where the mask is True, -inf where it is False: added to attention's logits."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)


def causal_bias(mask, T):
    """The bias of the last T of S positions: no query sees a later key or a pad.

    mask (B, S), True on real tokens. A position always sees itself: a softmax over nothing, in
    the row of a pad, would be NaN. -> (B, 1, T, S)"""
    S = mask.size(1)                                        # all tokens so far, T of them new
    key = torch.arange(S, device=mask.device)               # (S,)
    query = key[S - T:, None]                               # (T, 1)
    earlier = (key < query) & mask[:, None, None, :]        # (B, 1, T, S)
    return mask_bias(earlier | (key == query))


class DecoderOnly(LanguageModel):
    """Prompt and response share one sequence. A subclass defines run_blocks(), which makes final
    states (B, T, C) of embeddings (B, T, C), the bias of attention, and positions (B, T)."""

    def hidden(self, prompt, response, response_embeddings=None):
        """The states that predict the response: position P - 1 + t predicts response[:, t].

        response_embeddings (B, R, C) are read in place of embed(response), if given.
        Raises InputError if a prompt with its response is longer than block_size. -> (B, R, C)"""
        P = prompt.size(1)
        # Nothing is predicted after the last token, so it is never an input.
        tokens = torch.cat([prompt, response[:, :-1]], dim=1)  # (B, P + R - 1)
        mask = tokens != self.pad_token_id                     # True on real tokens
        if tokens.size(1) > self.config.block_size:            # a wide batch; pads do not count
            self.check_length(mask.sum(dim=1).max().item())
        x = self.embed(tokens)                                          # (B, P + R - 1, C)
        if response_embeddings is not None:
            x = torch.cat([x[:, :P], response_embeddings[:, :-1]], dim=1)
        return self.trunk(x, mask)[:, P - 1:]                               # (B, R, C)

    def trunk(self, x, mask, cache=None):
        """Embeddings (B, T, C), and a mask (B, T) of real tokens -> final states (B, T, C)"""
        return self.run_blocks(x, causal_bias(mask, x.size(1)), token_positions(mask), cache)

    def head(self, x):
        return F.linear(x, self.wte.weight)     # tied to the embedding: (.., C) -> (.., V)

    def prefill(self, prompt, cache, max_new_tokens):
        """Reads the prompt into the cache. Returns the state of its last token, (B, C)."""
        self.check_length(prompt.size(1) + max_new_tokens - 1)
        mask = prompt != self.pad_token_id                  # (B, P)
        x = self.trunk(self.embed(prompt), mask, cache)                 # (B, P, C)
        cache.length = prompt.size(1)
        # For all steps at once: a new token sees all but the prompt's pads, and it counts them out.
        mask = F.pad(mask, (0, max_new_tokens), value=True)             # (B, P + max_new_tokens)
        cache.bias, cache.positions = causal_bias(mask, max_new_tokens), token_positions(mask)
        return x[:, -1]

    def step(self, token, cache):
        """Reads one more token (B,). Returns its state, (B, C)."""
        bias = cache.newest(cache.bias, 2)[..., :cache.end]             # (B, 1, 1, S)
        positions = cache.newest(cache.positions, 1)                    # (B, 1)
        x = self.run_blocks(self.embed(token[:, None]), bias, positions, cache)     # (B, 1, C)
        cache.length += 1
        return x[:, -1]


def token_positions(mask):
    """Pads count for nothing: mask 0 0 1 1 1 -> 0 0 0 1 2. (B, T) -> (B, T)"""
    return mask.cumsum(dim=1) - mask.long()                 # how many real tokens stand before

# -----------------------------------------------------------------------------
# GPT-2: Radford et al. 2019, "Language models are unsupervised multitask learners"

class GPTAttention(nn.Module):
    """Multi-head self-attention, with biases."""

    def __init__(self, config):
        super().__init__()
        inner = config.n_head * config.head_size                        # all heads side by side
        self.n_head = config.n_head
        self.scale = config.head_size ** -0.5
        self.c_attn = nn.Linear(config.n_embd, 3 * inner)   # queries, keys, values in one product
        self.c_proj = nn.Linear(inner, config.n_embd)

    def forward(self, x, bias, cache, layer):
        q, k, v = self.c_attn(x).chunk(3, dim=-1)           # (B, T, nh * hs) each
        q = split_heads(q, self.n_head)                     # (B, nh, T, hs)
        k = split_heads(k, self.n_head)
        v = split_heads(v, self.n_head)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                # (B, nh, S, hs)
        y = attend(q, k, v, bias, self.scale)               # (B, nh, T, hs)
        return self.c_proj(join_heads(y))                   # (B, T, C)


class GPTMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)            # to the wide layer
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)          # and back

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))    # GPT-2's own variant


class GPTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the norms stand before, not after."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = GPTAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = GPTMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, bias, cache=None, layer=0):
        x = x + self.dropout(self.attn(self.ln_1(x), bias, cache, layer))
        return x + self.dropout(self.mlp(self.ln_2(x)))                 # each token by itself


class GPT(DecoderOnly):
    """GPT-2: learned positions, LayerNorm, GELU, and a head tied to the embedding."""

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)       # a vector for each position
        self.h = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)                 # the last norm, before the head
        self.dropout = nn.Dropout(config.dropout)
        init_weights(self, config)

    def run_blocks(self, x, bias, positions, cache=None):
        # Trailing pads may lie beyond the block; what they read does not matter.
        positions = positions.clamp(max=self.config.block_size - 1)
        x = self.dropout(x + self.wpe(positions))           # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, bias, cache, layer)                            # (B, T, C)
        return self.ln_f(x)                                             # (B, T, C)


def init_weights(model, config):
    """GPT-2's: N(0, 0.02) for matrices, 0 for biases. Each block adds to the residual stream
    twice, by projections that start smaller, so that its variance does not grow with depth."""
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
        elif parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)                                   # gains stay at 1

# -----------------------------------------------------------------------------
# PaLM: https://arxiv.org/abs/2204.02311. Its weights start like GPT-2's here. (In the paper the
# embedding starts at N(0, 1), and the logits are divided by sqrt(C).)

def rotary_angles(positions, head_size, theta=10000.0):
    """Cosine and sine of position * theta^(-2i/hs), Eq. 15 of https://arxiv.org/abs/2104.09864.

    positions (B, T) -> (B, 1, T, hs/2) twice: one axis for all heads"""
    frequencies = theta ** (-torch.arange(0, head_size, 2, device=positions.device) / head_size)
    angles = (positions[:, :, None] * frequencies)[:, None]             # (B, 1, T, hs/2)
    return angles.cos(), angles.sin()


def rotate(x, angles):
    """Rotates each pair (x_i, x_{i + hs/2}) by its angle. x (B, nh, T, hs) -> the same shape

    q.k then depends on the distance of two tokens alone, not on where they stand."""
    a, b = x.float().chunk(2, dim=-1)                       # (B, nh, T, hs/2) each
    cos, sin = angles
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return rotated.to(x.dtype)                                          # angles need float32


def attend_in_groups(q, k, v, bias, scale):
    """attend() with k, v (B, G, S, hs): nh / G query heads share each key head and value head."""
    B, n_head, T, head_size = q.shape
    # The heads of a group stand below each other, as if they were more queries of one head.
    q = q.reshape(B, k.size(1), -1, head_size)              # (B, G, nh/G T, hs)
    bias = bias.repeat(1, 1, n_head // k.size(1), 1)        # (B, 1, nh/G T, S)
    return attend(q, k, v, bias, scale).reshape(B, n_head, T, head_size)


class PaLMBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)): in parallel, from one norm and one product.

    Multi-query attention: all query heads share one key head and one value head, so the cache is
    nh times smaller. SwiGLU: silu(gate) * value (https://arxiv.org/abs/2002.05202). No biases."""

    def __init__(self, config):
        super().__init__()
        inner = config.n_head * config.head_size                        # all heads side by side
        self.n_head = config.n_head
        self.scale = config.head_size ** -0.5
        self.sizes = [inner, config.head_size, config.head_size, config.n_inner, config.n_inner]
        self.ln = nn.LayerNorm(config.n_embd, bias=False)
        self.c_fused = nn.Linear(config.n_embd, sum(self.sizes), bias=False)  # q, k, v, and the MLP
        self.attn_proj = nn.Linear(inner, config.n_embd, bias=False)
        self.mlp_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, bias, angles, cache, layer):
        q, k, v, gate, value = self.c_fused(self.ln(x)).split(self.sizes, dim=-1)   # (B, T, ..)
        q = rotate(split_heads(q, self.n_head), angles)                             # (B, nh, T, hs)
        k = rotate(k[:, None], angles)                                              # (B, 1, T, hs)
        v = v[:, None]                                                              # (B, 1, T, hs)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                # (B, 1, S, hs)
        y = attend_in_groups(q, k, v, bias, self.scale)     # (B, nh, T, hs)
        attention = self.attn_proj(join_heads(y))           # (B, T, C)
        mlp = self.mlp_proj(F.silu(gate) * value)           # (B, T, C)
        return x + self.dropout(attention + mlp)


class PaLM(DecoderOnly):
    """PaLM: rotary positions, parallel blocks, and a head tied to the embedding."""

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(PaLMBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        init_weights(self, config)

    def run_blocks(self, x, bias, positions, cache=None):
        angles = rotary_angles(positions, self.config.head_size)        # for all blocks
        x = self.dropout(x)                                             # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, bias, angles, cache, layer)                    # (B, T, C)
        return self.ln_f(x)                                             # (B, T, C)

# -----------------------------------------------------------------------------
# Llama: https://arxiv.org/abs/2302.13971, and what followed it, with grouped-query attention
# (https://arxiv.org/abs/2305.13245). SmolLM2 is one; so is Qwen2, with biases on q, k, and v.

class LlamaAttention(nn.Module):
    """Grouped-query attention: the nh / G query heads of a group share one key head and one value
    head, so the cache is nh / G times smaller. Rotary positions, as PaLM's."""

    def __init__(self, config):
        super().__init__()
        inner, kv_inner = config.n_head * config.head_size, config.n_kv_head * config.head_size
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.scale = config.head_size ** -0.5
        self.q = nn.Linear(config.n_embd, inner, bias=config.qkv_bias)
        self.k = nn.Linear(config.n_embd, kv_inner, bias=config.qkv_bias)
        self.v = nn.Linear(config.n_embd, kv_inner, bias=config.qkv_bias)
        self.c_proj = nn.Linear(inner, config.n_embd, bias=False)

    def forward(self, x, bias, angles, cache, layer):
        q = rotate(split_heads(self.q(x), self.n_head), angles)         # (B, nh, T, hs)
        k = rotate(split_heads(self.k(x), self.n_kv_head), angles)      # (B, G, T, hs)
        v = split_heads(self.v(x), self.n_kv_head)                      # (B, G, T, hs)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                # (B, G, S, hs)
        y = attend_in_groups(q, k, v, bias, self.scale)     # (B, nh, T, hs)
        return self.c_proj(join_heads(y))                   # (B, T, C)


class LlamaMLP(nn.Module):
    """SwiGLU, as PaLM's."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=False)  # what the gate lets through
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.silu(self.gate(x)) * self.up(x))           # (B, T, C)


class LlamaBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), as GPT-2's; the norms only rescale."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = LlamaAttention(config)
        self.ln_2 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = LlamaMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, bias, angles, cache, layer):
        x = x + self.dropout(self.attn(self.ln_1(x), bias, angles, cache, layer))
        return x + self.dropout(self.mlp(self.ln_2(x)))                 # each token by itself


class Llama(DecoderOnly):
    """Llama or Qwen2: RMSNorm, rotary positions, grouped queries, SwiGLU."""

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        init_weights(self, config)

    def run_blocks(self, x, bias, positions, cache=None):
        angles = rotary_angles(positions, self.config.head_size, self.config.rope_theta)
        x = self.dropout(x)                                             # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, bias, angles, cache, layer)                    # (B, T, C)
        return self.ln_f(x)                                             # (B, T, C)

    def head(self, x):
        return super().head(x) if self.lm_head is None else self.lm_head(x)     # (.., V)

# -----------------------------------------------------------------------------
# T5: https://arxiv.org/abs/1910.10683; version 1.1 has the gated GELU of arXiv 2002.05202

def relative_buckets(distance, n_buckets, max_distance, causal):
    """The bucket of each distance, key - query: one for each short distance, then wider and wider.

    From n/2 on they grow logarithmically up to max_distance. The encoder, which is not causal,
    has half of them for keys on the left and half for keys on the right. Any shape -> the same"""
    offset = 0
    if causal:
        distance = (-distance).clamp(min=0)             # a causal query sees keys on its left alone
    else:
        n_buckets //= 2
        offset = n_buckets * (distance > 0)             # the right half is for keys on the right
        distance = distance.abs()
    exact = n_buckets // 2                              # distances with a bucket of their own
    # exact + log(d / exact) / log(max_distance / exact) (n_buckets - exact), rounded down
    fraction = torch.log(distance / exact) / math.log(max_distance / exact)
    far = exact + (fraction * (n_buckets - exact)).clamp(min=0).long()
    far = far.clamp(max=n_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class T5Attention(nn.Module):
    """Attention of x to keys and values that keys_values() made: of x itself, or of a prompt."""

    def __init__(self, config):
        super().__init__()
        inner = config.n_head * config.head_size                        # all heads side by side
        self.n_head = config.n_head
        self.q = nn.Linear(config.n_embd, inner, bias=False)
        self.k = nn.Linear(config.n_embd, inner, bias=False)
        self.v = nn.Linear(config.n_embd, inner, bias=False)
        self.o = nn.Linear(inner, config.n_embd, bias=False)

    def keys_values(self, x):
        """(B, S, C) -> (B, nh, S, hs) twice"""
        return split_heads(self.k(x), self.n_head), split_heads(self.v(x), self.n_head)

    def forward(self, x, keys, values, bias):
        q = split_heads(self.q(x), self.n_head)             # (B, nh, T, hs)
        # Unscaled: T5 starts with small queries instead of dividing by sqrt(hs).
        return self.o(join_heads(attend(q, keys, values, bias, scale=1.0)))


class T5MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.gated
        if self.gated:
            self.wi_0 = nn.Linear(config.n_embd, config.n_inner, bias=False)  # the gate
            self.wi_1 = nn.Linear(config.n_embd, config.n_inner, bias=False)  # what it lets through
        else:
            self.wi = nn.Linear(config.n_embd, config.n_inner, bias=False)  # to the wide layer
        self.wo = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        if self.gated:
            return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return self.wo(F.relu(self.wi(x)))                              # (B, T, C)


class T5Block(nn.Module):
    """Self-attention, in the decoder cross-attention to the prompt, then the MLP."""

    def __init__(self, config, is_decoder):
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.attn = T5Attention(config)
        if is_decoder:
            self.ln_cross = nn.RMSNorm(config.n_embd, eps=1e-6)
            self.cross = T5Attention(config)
        self.ln_2 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.mlp = T5MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, bias, encoded, encoded_bias, cache, layer):
        """x (B, T, C). In the decoder, encoded holds the keys and values of the prompt."""
        normed = self.ln_1(x)                               # (B, T, C)
        k, v = self.attn.keys_values(normed)                # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                # (B, nh, S, hs)
        x = x + self.dropout(self.attn(normed, k, v, bias))
        if encoded is not None:
            x = x + self.dropout(self.cross(self.ln_cross(x), *encoded, encoded_bias))
        return x + self.dropout(self.mlp(self.ln_2(x)))                 # each token by itself


class T5Stack(nn.Module):
    """The encoder or the decoder: its blocks, and the position bias that they share."""

    def __init__(self, config, is_decoder):
        super().__init__()
        self.config, self.is_decoder = config, is_decoder
        self.relative = nn.Embedding(config.n_buckets, config.n_head)
        self.h = nn.ModuleList(T5Block(config, is_decoder) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)

    def position_bias(self, T):
        """One number for each head and distance of two positions. -> (1, nh, T, T)"""
        key = torch.arange(T, device=self.relative.weight.device)
        distance = key - key[:, None]                       # (T, T)
        buckets = relative_buckets(distance, self.config.n_buckets, self.config.max_distance,
                                   causal=self.is_decoder)
        return self.relative(buckets).permute(2, 0, 1)[None]

    def forward(self, x, bias, encoded=None, encoded_bias=None, cache=None):
        """x (B, T, C); bias (B, nh, T, S), the same one for every layer -> (B, T, C)"""
        x = self.dropout(x)                                             # (B, T, C)
        for layer, block in enumerate(self.h):
            keys_values = encoded[layer] if encoded is not None else None   # the encoder has none
            x = block(x, bias, keys_values, encoded_bias, cache, layer)
        return self.dropout(self.ln_f(x))                               # (B, T, C)


class T5(LanguageModel):
    """The encoder reads the prompt, the decoder writes the response."""

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.encoder = T5Stack(config, is_decoder=False)
        self.decoder = T5Stack(config, is_decoder=True)
        self.lm_head = None
        if config.gated:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        init_t5(self, config)

    def encode(self, prompt):
        """What the decoder needs of a prompt (B, P): keys and values (B, nh, P, hs) for each of
        its layers, and the bias (B, 1, 1, P) that hides the prompt's pads."""
        mask = prompt != self.pad_token_id
        # Only an empty prompt ends with a pad; a softmax over nothing would be NaN.
        mask[:, -1] = True
        bias = mask_bias(mask[:, None, None, :])            # (B, 1, 1, P)
        positions = self.encoder.position_bias(prompt.size(1))          # (1, nh, P, P)
        states = self.encoder(self.embed(prompt), bias + positions)     # (B, P, C)
        return [block.cross.keys_values(states) for block in self.decoder.h], bias

    def decoder_bias(self, T):
        """Who sees whom among T of the decoder's inputs, and how far away it is. (1, nh, T, T)"""
        # Pads come last, so hiding the future hides them too.
        everything = torch.ones(1, T, dtype=torch.bool, device=self.wte.weight.device)
        return causal_bias(everything, T) + self.decoder.position_bias(T)

    def hidden(self, prompt, response, response_embeddings=None):
        """As DecoderOnly.hidden(). The decoder reads the start token, then the response."""
        self.check_length(max(prompt.size(1), response.size(1) - 1))
        start = prompt.new_full((len(prompt), 1), self.config.decoder_start_token_id)
        x = self.embed(torch.cat([start, response[:, :-1]], dim=1))         # (B, R, C)
        if response_embeddings is not None:
            x = torch.cat([x[:, :1], response_embeddings[:, :-1]], dim=1)
        return self.decoder(x, self.decoder_bias(x.size(1)), *self.encode(prompt))

    def head(self, x):
        if self.lm_head is not None:
            return self.lm_head(x)                                      # (.., C) -> (.., V)
        # Tied to an embedding whose entries are near 1, not near 0.02: scaled down to fit.
        return F.linear(x * self.config.n_embd ** -0.5, self.wte.weight)

    def prefill(self, prompt, cache, max_new_tokens):
        """Encodes the prompt. Returns the state of the decoder's start token, (B, C)."""
        self.check_length(max(prompt.size(1), max_new_tokens - 1))
        cache.encoded, cache.encoded_bias = self.encode(prompt)
        # The start token and the response; the prompt has keys and values of its own.
        cache.capacity = max_new_tokens + 1
        cache.bias = self.decoder_bias(cache.capacity)          # for all steps at once
        start = prompt.new_full((len(prompt),), self.config.decoder_start_token_id)
        return self.step(start, cache)

    def step(self, token, cache):
        """Reads one more token (B,). Returns its state, (B, C)."""
        bias = cache.newest(cache.bias, 2)[..., :cache.end]                 # (1, nh, 1, S)
        x = self.decoder(self.embed(token[:, None]), bias, cache.encoded, cache.encoded_bias,
                         cache)                                             # (B, 1, C)
        cache.length += 1
        return x[:, -1]


def init_t5(model, config):
    """T5's: N(0, 1) for the embedding, N(0, 1/inputs) for matrices.

    Queries start smaller by sqrt(hs), since attention is not scaled."""
    for name, parameter in model.named_parameters():
        if name == "wte.weight":
            nn.init.normal_(parameter, std=1.0)
        elif "relative" in name:
            nn.init.normal_(parameter, std=config.n_embd ** -0.5)
        elif name.endswith(".q.weight"):
            nn.init.normal_(parameter, std=(config.n_embd * config.head_size) ** -0.5)
        elif parameter.dim() >= 2:
            nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)


ARCHITECTURES = {"gpt": GPT, "palm": PaLM, "llama": Llama, "t5": T5}


def build_model(config):
    """A new language model with random weights."""
    return ARCHITECTURES[config.arch](config)

# -----------------------------------------------------------------------------
# sampling and log-probs

class KVCache:
    """What generation keeps from token to token: keys and values of every layer, and what a model
    makes once for all steps."""

    def __init__(self, capacity):
        self.capacity = capacity
        # Positions filled so far. On a GPU, a tensor (1,) while tokens are written: the recorded
        # kernels of a step (cuda_graph) find there where the next token goes.
        self.length = 0
        self.keys, self.values = {}, {}                     # of each layer, (B, G, capacity, hs)
        self.bias = None            # who sees whom, (B or 1, 1 or nh, T, capacity)
        self.positions = None       # (B, capacity), if the model has them
        self.encoded = []           # of each layer of a decoder: the prompt's keys and values
        self.encoded_bias = None    # hides the prompt's pads, (B, 1, 1, P)

    @property
    def end(self):
        """How many positions a new token looks at. On a GPU all, since the bias hides the rest."""
        return self.capacity if torch.is_tensor(self.length) else self.length + 1

    def newest(self, x, dim):
        """The entry of the next position in x, whose axis `dim` has all of them, or the last T."""
        index = self.length - (self.capacity - x.size(dim))
        return x.index_select(dim, index) if torch.is_tensor(index) else x.narrow(dim, index, 1)

    def extend(self, layer, k, v):
        """Appends new keys and values (B, G, T, hs); returns all to look at, (B, G, S, hs) each."""
        if layer not in self.keys:
            B, n_groups, _, head_size = k.shape
            # Zeros, because even a position that the bias hides must not be NaN.
            self.keys[layer] = k.new_zeros(B, n_groups, self.capacity, head_size)
            self.values[layer] = v.new_zeros(B, n_groups, self.capacity, head_size)
        keys, values = self.keys[layer], self.values[layer]
        if torch.is_tensor(self.length):
            return keys.index_copy_(2, self.length, k), values.index_copy_(2, self.length, v)
        end = self.length + k.size(2)                           # positions filled after this call
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, rows):
        """Forgets all rows of the batch but these (N,)."""
        for tensors in (self.keys, self.values):
            for layer in tensors:
                tensors[layer] = tensors[layer][rows]
        if len(self.bias) > 1:      # or one serves all rows
            self.bias = self.bias[rows]
        if self.positions is not None:
            self.positions = self.positions[rows]
        if self.encoded:
            self.encoded = [(k[rows], v[rows]) for k, v in self.encoded]
            self.encoded_bias = self.encoded_bias[rows]


@torch.no_grad()
def sample_responses(model, prompt, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0,
                     rng=None):
    """Samples one response to each prompt (B, P). On a CPU, rows that have ended are left out as
    we go.

    Returns response (B, R), R as the longest or on a GPU max_new_tokens, and logprobs (B, R) of
    its tokens under the distribution they were drawn from, 0 on pads. rng: a torch.Generator.
    Raises InputError if prompt and response do not fit the model's block."""
    B, device = len(prompt), prompt.device
    cache = KVCache(prompt.size(1) + max_new_tokens)
    x = model.prefill(prompt, cache, max_new_tokens)                        # (B, C)
    # All random numbers at once: no response depends on when those beside it end.
    u = torch.rand(B, max_new_tokens, generator=rng, device=device)
    if device.type == "cuda":
        return sample_on_gpu(model, cache, x, u, temperature, top_k, top_p)
    response = torch.full_like(u, model.pad_token_id, dtype=torch.long)
    chosen = torch.zeros_like(u)                        # pads cost no log-prob
    rows = torch.arange(B, device=device)               # those that are still computed, N of them
    done = torch.zeros_like(rows, dtype=torch.bool)     # those of them that have ended
    for t in progress_bar(range(max_new_tokens), "tokens"):
        logp = sampling_logprobs(model.head(x), temperature, top_k, top_p)  # (N, V)
        token = sample(logp, u[rows, t])                                    # (N,)
        token_logp = logp.take_along_dim(token[:, None], 1).squeeze(1)      # (N,)
        response[rows, t] = token.masked_fill(done, model.pad_token_id)
        chosen[rows, t] = token_logp.masked_fill(done, 0.0)
        done = done | (token == model.config.eos_token_id)
        n_done = done.sum().item()
        if n_done == len(rows) or t + 1 == max_new_tokens:
            break
        if n_done >= len(rows) / 4:     # to copy what is left of the cache pays now
            left = (~done).nonzero().squeeze(1)
            rows, token, done = rows[left], token[left], done[left]
            cache.keep(left)
        x = model.step(token, cache)                                        # (N, C)
    return response[:, :t + 1], chosen[:, :t + 1]


def sample_on_gpu(model, cache, x, u, temperature, top_k, top_p):
    """The loop of sample_responses() with the same kernels for every token and all rows, so that
    they can be recorded. x (B, C), u (B, T) -> response (B, T), logprobs (B, T)"""
    response = torch.full_like(u, model.pad_token_id, dtype=torch.long)     # (B, T)
    chosen = torch.zeros_like(u)                                            # (B, T)
    done = torch.zeros_like(u[:, :1], dtype=torch.bool)                     # (B, 1)
    t = torch.zeros(1, dtype=torch.long, device=u.device)
    cache.length = t + cache.length                     # both count on the GPU from here on

    def write_token():
        logp = sampling_logprobs(model.head(x), temperature, top_k, top_p)      # (B, V)
        token = sample(logp, u.index_select(1, t).squeeze(1))[:, None]          # (B, 1)
        token_logp = logp.take_along_dim(token, 1)                              # (B, 1)
        response.index_copy_(1, t, token.masked_fill(done, model.pad_token_id))
        chosen.index_copy_(1, t, token_logp.masked_fill(done, 0.0))
        done.logical_or_(token == model.config.eos_token_id)
        x.copy_(model.step(token.squeeze(1), cache))                            # (B, C)
        t.add_(1)
        return done.all()

    write_token = cuda_graph(write_token, u.device, n_eager=1)
    for i in range(u.size(1)):
        all_done = write_token()
        if i % 8 == 7 and all_done:                     # asked seldom, since to ask is to wait
            break
    return response, chosen


def sampling_logprobs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The log of the distribution that tokens are drawn from. (.., V) -> (.., V), float32

    temperature divides the logits (0: all mass on the best token); top_k keeps that many tokens
    (0: all); top_p keeps the smallest set of most likely tokens whose probabilities sum to at
    least top_p (1: all; https://arxiv.org/abs/1904.09751)."""
    logits = logits.float()                             # bfloat16 is too coarse for probabilities
    if temperature == 0:
        top_k, temperature = 1, 1.0
    if temperature != 1:
        logits = logits / temperature                                   # (.., V)
    if top_k:
        best = logits.topk(min(top_k, logits.size(-1)), dim=-1)         # (.., k)
        logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
    if top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        p = sorted_logits.softmax(dim=-1)                               # most likely first
        # A token is dropped if the more likely ones before it already have enough mass.
        dropped = p.cumsum(dim=-1) - p >= top_p
        dropped = torch.zeros_like(dropped).scatter(-1, order, dropped)     # in the old order
        logits = logits.masked_fill(dropped, -math.inf)
    return logits.log_softmax(dim=-1)                           # what is left sums to 1 again


def sample(logp, u):
    """Draws one token from each distribution, by a random number from [0, 1). (B, V), (B,) -> (B,)

    Inverts the distribution function: the token is the first whose cdf reaches u."""
    cdf = logp.exp().cumsum(dim=-1)                                         # (B, V)
    # u in (0, sum], not [0, sum): then no token of probability 0 can be the first to reach it.
    u = (1 - u[:, None]) * cdf[:, -1:]                                      # (B, 1)
    token = torch.searchsorted(cdf, u).squeeze(1)                           # (B,)
    return token.clamp(max=logp.size(1) - 1)


def logprobs_from_logits(logits, response, temperature=1.0, top_k=0, top_p=1.0):
    """log pi(response[:, t]), 0 on pads. logits (B, R, V), response (B, R) -> (B, R), float32"""
    if top_k or top_p < 1 or temperature == 0:
        logits = sampling_logprobs(logits, temperature, top_k, top_p)
    elif temperature != 1:
        logits = logits.float() / temperature       # as sampling_logprobs() has it, to the bit
    V = logits.size(-1)         # the id of the pad
    # Cross-entropy is -log_softmax at the target; a target that is ignored costs 0.
    nll = F.cross_entropy(logits.flatten(0, 1).float(), response.flatten(),
                          ignore_index=V, reduction="none")                 # (B * R,)
    return -nll.view_as(response)


def logprobs(model, prompt, response, temperature=1.0, top_k=0, top_p=1.0):
    """log pi(response[:, t] | prompt, response[:, :t]), 0 on pads. (B, P), (B, R) -> (B, R)

    Of the distribution that generate() samples from with the same arguments."""
    return logprobs_from_logits(model(prompt, response), response, temperature, top_k, top_p)

# -----------------------------------------------------------------------------
# the reward model

class RewardModel(nn.Module):
    """A language model with a scalar head: reward_model(prompt, response) -> scores (B,).

    The head reads the state that has seen the whole response. If likelihood is not 0, the
    response's log-prob under the same language model counts too, with a learned weight: a linear
    head cannot compare predicted with actual tokens, but the model's own logits do. This term is
    this project's choice; most reward models have the head alone."""

    def __init__(self, model, likelihood=0.0):
        super().__init__()
        self.model = model                                      # the trunk, which is trained, too
        self.config = model.config
        self.scalar_head = nn.Linear(model.config.n_embd, 1)
        nn.init.normal_(self.scalar_head.weight, std=1 / math.sqrt(model.config.n_embd + 1))
        nn.init.zeros_(self.scalar_head.bias)
        self.likelihood = None
        if likelihood:
            self.likelihood = nn.Parameter(torch.tensor(float(likelihood)))
        # score = gain * raw + shift, set by normalize()
        self.register_buffer("gain", torch.tensor(1.0))
        self.register_buffer("shift", torch.tensor(0.0))

    def forward(self, prompt, response):
        """Scores of whole responses, read at their last token, the end token. -> (B,)"""
        pad = self.model.pad_token_id
        # State t has read response[:, :t]. One more pad adds the state that has read all of it.
        x = self.model.hidden(prompt, F.pad(response, (0, 1), value=pad))   # (B, R + 1, C)
        length = (response != pad).sum(dim=1)                               # (B,)
        last = x[torch.arange(len(x), device=x.device), length]             # (B, C)
        raw = self.scalar_head(last).squeeze(-1).float()                    # (B,)
        if self.likelihood is not None:
            logp = logprobs_from_logits(self.model.head(x[:, :-1]), response)       # (B, R)
            raw = raw + self.likelihood * logp.sum(dim=1)
        return self.gain * raw + self.shift

    @torch.no_grad()
    def normalize(self, scores):
        """Rescales, so that the responses with these scores (N,) get mean 0 and std 1."""
        gain = 1 / scores.std(correction=0).clamp(min=1e-6)             # all scores may be equal
        self.gain.mul_(gain)
        self.shift.sub_(scores.mean()).mul_(gain)                       # (shift - mean) gain

# -----------------------------------------------------------------------------
# load and save

LANGUAGE_MODEL, REWARD_MODEL, DISCRIMINATOR = "language model", "reward model", "discriminator"


def save_checkpoint(path, kind, model, tok, weights=None, **about):
    """Writes one file with all that rebuilds the model: weights, config, tokenizer, and kind.

    A tokenizer that is a file is copied beside it. weights: model.state_dict(), if not given."""
    path = Path(path)
    checkpoint = {"kind": kind, "config": asdict(model.config),
                  "model": model.state_dict() if weights is None else weights,
                  "tokenizer": tok.name, "tokenizer_fingerprint": tok.fingerprint}
    if tok.path is not None:
        checkpoint["tokenizer"] = "tokenizer.json"
        with atomic_write(path.with_name("tokenizer.json")) as temporary:
            shutil.copyfile(tok.path, temporary)
    # torch.save() takes a while: a stop in the middle must not leave half a file.
    with atomic_write(path) as temporary:
        torch.save(checkpoint | about, temporary)


def save_model(path, model, tok, weights=None, **about):
    """Writes the checkpoint of a language model or a reward model."""
    kind = REWARD_MODEL if isinstance(model, RewardModel) else LANGUAGE_MODEL
    save_checkpoint(path, kind, model, tok, weights, **about)


def read_checkpoint(path, kind=""):
    """The content of a checkpoint. kind: the one it must have; '' takes any.

    Raises InputError if it is not there, is no checkpoint of wordplay, or is of another kind."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the checkpoint in it: {path / 'ckpt.pt'}")
    if not path.exists():
        stage = f"{path.parent.name}.py"
        known = Path(__file__).with_name(stage).exists()
        advice = f"make it with: python {stage}" if known else "check the path"
        raise InputError(f"{path} does not exist; {advice}")
    checkpoint = read_tensors(path)
    parts = {"kind", "config", "model", "tokenizer", "tokenizer_fingerprint"}
    if (not isinstance(checkpoint, dict) or not parts <= checkpoint.keys()
            or checkpoint["config"].keys() != set(ModelConfig.__slots__)):
        raise InputError(f"{path} is not a checkpoint of this version of wordplay; train it again")
    if kind and checkpoint["kind"] != kind:
        raise InputError(f"{path} holds a {checkpoint['kind']}; a {kind} is needed here")
    return checkpoint


def read_tensors(path):
    """What torch.save() wrote to a file. Raises InputError if it is damaged or foreign."""
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever foreign or cut bytes make of the unpickling
            raise InputError(f"{path} is damaged or is not a checkpoint of wordplay "
                             f"({type(error).__name__}); train it again") from None


def rebuild(checkpoint, path):
    """A new language model with the config and tokenizer of a checkpoint, its weights random."""
    model = build_model(ModelConfig(**checkpoint["config"]))
    model.tokenizer = checkpoint["tokenizer"]
    if model.tokenizer == "tokenizer.json":
        model.tokenizer = str(Path(path).with_name("tokenizer.json"))
    model.tokenizer_fingerprint = checkpoint["tokenizer_fingerprint"]
    return model


def load_weights(model, weights, path):
    """model.load_state_dict(weights), which are those of a file.

    Raises InputError if a weight is missing, has another shape, or is not one of the model's."""
    own = {name: weight.shape for name, weight in model.state_dict().items()}
    found = {name: getattr(weight, "shape", None) for name, weight in weights.items()}
    wrong = sorted(name for name in own | found if own.get(name) != found.get(name))
    if wrong:
        raise InputError(f"{path}: {len(wrong)} of its weights do not fit its model, such as "
                         f"{wrong[0]}; train it again")
    model.load_state_dict(weights)


def load_model(path, device="cpu"):
    """The language model of a checkpoint, in eval mode.

    Raises what read_checkpoint() and load_weights() raise."""
    checkpoint = read_checkpoint(path, LANGUAGE_MODEL)
    model = rebuild(checkpoint, path)
    load_weights(model, checkpoint["model"], path)
    return model.to(device).eval()


def load_reward_model(path, device="cpu", policy=None):
    """The reward model of a checkpoint, in eval mode. policy: whose texts it will read.

    Raises what load_model() raises, and InputError if the policy's ids mean other tokens."""
    checkpoint = read_checkpoint(path, REWARD_MODEL)
    reward_model = RewardModel(rebuild(checkpoint, path), "likelihood" in checkpoint["model"])
    load_weights(reward_model, checkpoint["model"], path)
    fingerprint = checkpoint["tokenizer_fingerprint"]
    if policy is not None and fingerprint != policy.tokenizer_fingerprint:
        raise InputError(f"{path} has another tokenizer than the language model whose texts it "
                         "would score: train it from the same one")
    return reward_model.to(device).eval()
