"""
Stage 3a, PPO: reinforcement learning from a reward model, with a KL penalty to the SFT policy.

    1. rollout: the policy answers a batch of prompts; log-probs of every token under the policy
       and under the reference, which is the frozen SFT policy
    2. score: the reward model reads each response once, at its end token
    3. reward of a token = -kl_coef (log pi - log pi_ref), plus the score at the end token
                                                                 Eq. 2 of arXiv 1909.08593
    4. advantages: GAE over the critic's values (arXiv 1506.02438), whitened; or each response
       against the other responses to its prompt (RLOO, GRPO, Dr. GRPO)
    5. ppo_epochs passes over the rollout in minibatches:
       clipped policy loss + vf_coef clipped value loss          Eq. 7, 9 of arXiv 1707.06347
    6. again, with fresh responses

The critic is a linear head on the policy's own trunk, so one forward pass serves both. There is
no entropy bonus, and no dropout. With --lora the policy, the reference, and the reward model are
adapters on one frozen trunk (lora.py).

What to look at: a ratio of 1.000 in the first minibatch (asserted), score up, kl up and then
slowly down, and the samples: reward hacking also raises the score. In the pun world the judge
shows it; no loss ever sees the judge.

    python ppo.py                                  against runs/reward_model
    python ppo.py --baseline rloo --group_size 4   no critic: four responses a prompt
    python ppo.py --lora 8 --lr 5e-4               after reward_model.py --lora 8 --lr 2e-3
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import tyro

from common import InputError, Run, TrainOptions, agreed, command_line, make_rng, setup
from data import describe, format_samples, load_prompts, means, prompt_batches, tokenizer_of
from lora import load_frozen_reward_model, load_policy_and_reference, save_trained
from model import logprobs, logprobs_from_logits
from optim import adamw, cuda_graph, optimizer_step, set_lr


@dataclass(slots=True)
class Config(TrainOptions):
    out_dir: str = "runs/ppo"                                           # the folder of this run
    init: str = "runs/sft/ckpt.pt"              # the policy to start from, and the reference
    reward: str = "runs/reward_model/ckpt.pt"   # the reward model
    data: str = ""              # JSONL of prompts; '' is the pun world
    max_steps: int = 60         # rollouts
    batch_size: int = 256       # responses a rollout
    minibatch_size: int = 128   # responses a gradient step
    ppo_epochs: int = 4         # passes over each rollout
    max_new_tokens: int = 32                                            # longest response
    temperature: float = 1.0    # of sampling, and of every log-prob
    kl_coef: float = 0.25       # weight of the KL penalty
    missing_eos_penalty: float = 1.0    # subtracted from the score of a response that never ends
    baseline: str = "critic"    # critic (GAE); without a critic: rloo, grpo or dr_grpo
    group_size: int = 1         # responses per prompt; all but critic need at least 2
    gamma: float = 1.0          # discount per token
    lam: float = 0.95           # GAE's lambda
    loss: str = "ppo"           # ppo, gspo or cispo; see policy_loss()
    clip_range: float = 0.2     # of the ratio, and of the change of a value
    clip_range_high: float = 0.0    # of the ratio upward (DAPO has 0.28); 0 is clip_range
    target_kl: float = 0.0      # no further pass over a rollout above this approx_kl; 0 never stops
    vf_coef: float = 0.5        # weight of the value loss
    lr: float = 1.7e-4                                                  # the highest rate
    warmup_steps: int = 5                                       # rollouts until the highest rate
    grad_clip: float = 1.0                      # largest norm of a gradient; 0 does not clip
    sample_interval: int = 20   # rollouts between two samples on screen and two saved states
    READ_IF: ClassVar = [("baseline", ["critic"], "gamma lam vf_coef")]

# -----------------------------------------------------------------------------
# arithmetic: all tensors (B, R), with a bool mask (B, R), True on response tokens

def masked_mean(x, mask):
    """The mean over the response tokens of the whole batch, not a mean of row means."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """(x - mean) / std over the response tokens, with the biased variance. Pads become 0."""
    assert x.shape == mask.shape and mask.sum() > 1, "whitening needs more than one token"
    mean = masked_mean(x, mask)                                 # over all tokens of the batch
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def token_rewards(score, logp, ref_logp, mask, kl_coef):
    """-kl_coef (log pi - log pi_ref) on every token, and the score (B,) on the last one.

    The penalty is the k1 estimator: as a reward, its expected policy gradient is the gradient of
    KL(pi || pi_ref). -> (B, R)"""
    assert logp.shape == ref_logp.shape == mask.shape and score.shape == mask.shape[:1]
    rewards = -kl_coef * (logp - ref_logp) * mask                       # (B, R)
    rows = torch.arange(len(score), device=score.device)
    rewards[rows, mask.sum(dim=1) - 1] += score             # at the end token
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation, Eq. 16 of https://arxiv.org/abs/1506.02438.

    Returns (advantages, returns), both (B, R); the returns are what the critic should predict."""
    assert rewards.shape == values.shape == mask.shape
    R = rewards.size(1)                                     # longest response of the batch
    values = values * mask                                  # V = 0 after the end token
    advantages = torch.zeros_like(rewards)                  # (B, R)
    lastgaelam = torch.zeros_like(rewards[:, 0])            # (B,)
    for t in reversed(range(R)):
        next_value = values[:, t + 1] if t + 1 < R else 0.0
        # delta_t = r_t + gamma V_{t+1} - V_t
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # A_t = delta_t + gamma lam A_{t+1}
        lastgaelam = (delta + gamma * lam * lastgaelam) * mask[:, t]
        advantages[:, t] = lastgaelam
    return advantages, advantages + values


def group_advantages(rewards, group_size, kind):
    """The advantage of each response over the others to its prompt. rewards (B,) -> (B,)

    The responses to a prompt are neighbors. rloo: R_i - mean of the other R (arXiv 2402.14740);
    grpo: (R_i - mean) / (std + 1e-4), with the unbiased std (arXiv 2402.03300); dr_grpo:
    R_i - mean, since to divide by a small std favors prompts that are nearly always, or nearly
    never, answered well (arXiv 2503.20783)."""
    groups = rewards.view(-1, group_size)                   # (B / G, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if kind == "rloo":
        # R_i - (sum - R_i) / (G - 1) = (R_i - mean) G / (G - 1)
        advantages = advantages * group_size / (group_size - 1)
    elif kind == "grpo":
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
    return advantages.flatten()


def policy_loss(logp, old_logp, advantages, mask, clip_range, clip_range_high=0.0, loss="ppo",
                max_length=0):
    """PPO's clipped objective, Eq. 7 of https://arxiv.org/abs/1707.06347, as a loss; or a variant.

    clip_range_high: the upper clip, if it is another ("clip-higher", arXiv 2503.14476).
    loss: gspo has one ratio for a response, and averages over responses (Eq. 5 of arXiv
    2507.18071); cispo clips the weight of a token, never its gradient (Eq. 4 of arXiv 2506.13585).
    max_length: what a response's sum is divided by, if given, whatever its length (Dr. GRPO, arXiv
    2503.20783). Else the loss is the mean over all tokens of the batch.
    Returns (loss, metrics): the ratio pi / pi_old, approx_kl (k2), and the fraction clipped."""
    assert logp.shape == old_logp.shape == advantages.shape == mask.shape
    length = mask.sum(dim=1)                                # (B,)
    log_ratio = logp - old_logp                             # log(pi / pi_old)
    approx_kl = 0.5 * masked_mean(log_ratio ** 2, mask)
    if loss == "gspo":
        # The geometric mean of the ratios of all tokens, Eq. 7.
        log_ratio = ((log_ratio * mask).sum(dim=1) / length)[:, None].expand_as(logp)
    ratio = log_ratio.exp()                                 # 1 on pads
    low = 0.0 if loss == "cispo" else 1 - clip_range        # the paper's runs have no lower clip
    clipped_ratio = ratio.clamp(low, 1 + (clip_range_high or clip_range))
    if loss == "cispo":
        losses = -advantages * clipped_ratio.detach() * logp
    else:
        # The larger of two losses, so the clip removes only the gain of a step too far.
        losses = torch.max(-advantages * ratio, -advantages * clipped_ratio)    # (B, R)
    metrics = {"ratio": masked_mean(ratio, mask), "approx_kl": approx_kl,
               "clipfrac": masked_mean((ratio != clipped_ratio).float(), mask)}
    if loss == "gspo":
        return ((losses * mask).sum(dim=1) / length).mean(), metrics
    if max_length:
        return ((losses * mask).sum(dim=1) / max_length).mean(), metrics
    return masked_mean(losses, mask), metrics


def value_loss(values, old_values, returns, mask, clip_range):
    """0.5 max((V - R)^2, (V_clipped - R)^2), V_clipped within clip_range of V_old. A scalar."""
    assert values.shape == old_values.shape == returns.shape == mask.shape
    # A critic that moves too far at once is held back, like the policy.
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    losses = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * masked_mean(losses, mask)


def kl_estimates(logp, ref_logp):
    """Three estimators of KL(pi || pi_ref) from samples of pi. All (B, R), in nats a token.

    http://joschu.net/blog/kl-approx.html: with r = pi_ref / pi, k1 = -log r is unbiased,
    k2 = (log r)^2 / 2 is biased, and k3 = (r - 1) - log r is unbiased and never negative."""
    log_r = ref_logp - logp
    k1 = -log_r
    k2 = 0.5 * log_r ** 2
    k3 = log_r.expm1() - log_r
    return k1, k2, k3


def explained_variance(values, returns, mask):
    """1 - mean((returns - values)^2) / Var(returns): 1 for a perfect critic, 0 for one that
    knows the mean return and nothing else."""
    residual = masked_mean((returns - values) ** 2, mask)
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    if variance < 1e-8:
        return 0.0                                          # all returns are equal
    return 1 - (residual / variance).item()

# -----------------------------------------------------------------------------
# rollout

@dataclass(slots=True)
class Rollout:
    prompt: torch.Tensor        # (B, P) ids
    response: torch.Tensor      # (B, R) ids
    mask: torch.Tensor          # (B, R) True on response tokens, the end token included
    logp: torch.Tensor          # (B, R) log-probs under the policy that wrote the response
    ref_logp: torch.Tensor      # (B, R) the same under the reference
    values: torch.Tensor        # (B, R) what the critic expected before each token
    score: torch.Tensor         # (B,) of the reward model
    entropy: float              # of the policy, in nats a token


def actor_critic(policy, value_head, prompt, response, temperature):
    """(log-probs, values) of a response, both (B, R), in one pass."""
    hidden = policy.hidden(prompt, response)                # (B, R, C)
    logp = logprobs_from_logits(policy.head(hidden), response, temperature)
    values = value_head(hidden).squeeze(-1).float()
    return logp, values


@torch.no_grad()
def make_rollout(policy, value_head, reference, score_fn, prompt, config, rng):
    """Lets the policy answer prompts (B, P) and records all that the update needs.

    score_fn(prompt, response) -> (B,). Returns a Rollout."""
    response, sampled_logp = policy.generate(prompt, config.max_new_tokens, config.temperature,
                                             rng=rng)
    mask = response != policy.pad_token_id                  # (B, R)
    # The log-probs come from the same function as in the update, on batches of the same size, so
    # that the first ratio is exactly 1. (Sampling with a cache rounds differently.)
    logp, ref_logp, values = [], [], []
    for start in range(0, len(prompt), config.minibatch_size):
        rows = slice(start, start + config.minibatch_size)
        part_logp, part_values = actor_critic(policy, value_head, prompt[rows], response[rows],
                                              config.temperature)
        logp.append(part_logp)
        values.append(part_values)
        ref_logp.append(logprobs(reference, prompt[rows], response[rows], config.temperature))
    ended = (response == policy.config.eos_token_id).any(dim=1)             # (B,)
    score = score_fn(prompt, response) - config.missing_eos_penalty * ~ended
    entropy = -masked_mean(sampled_logp, mask).item()       # E[-log pi], from the samples
    return Rollout(prompt, response, mask, torch.cat(logp), torch.cat(ref_logp),
                   torch.cat(values), score, entropy)


def describe_rollout(rollout, tok):
    """(metrics, rows) of a rollout: means over the whole batch, and one row for each response."""
    k1, _, k3 = kl_estimates(rollout.logp, rollout.ref_logp)
    kl = (k1 * rollout.mask).sum(dim=1)                     # (B,) nats a response
    rows = describe(tok, rollout.prompt, rollout.response, kl, rollout.score)
    metrics = means(rows)                           # kl, score, ended, and the judge's rates
    metrics["k3"] = (k3 * rollout.mask).sum(dim=1).mean().item()
    metrics["entropy"] = rollout.entropy
    return metrics, rows


def compute_advantages(rollout, config, kl_coef):
    """(advantages, returns) of a rollout, both (B, R), by the config's baseline."""
    rewards = token_rewards(rollout.score, rollout.logp, rollout.ref_logp, rollout.mask, kl_coef)
    if config.baseline == "critic":
        return gae(rewards, rollout.values, rollout.mask, config.gamma, config.lam)
    advantages = group_advantages(rewards.sum(dim=1), config.group_size, config.baseline)   # (B,)
    return advantages[:, None] * rollout.mask, rewards

# -----------------------------------------------------------------------------
# update

def minibatch_step(policy, value_head, optimizer, config, autocast):
    """Returns learn(): one gradient step on a minibatch of a rollout."""
    max_length = config.max_new_tokens if config.baseline == "dr_grpo" else 0
    actor_and_critic = nn.ModuleList([policy, value_head])      # one gradient norm for both

    def learn(prompt, response, mask, old_logp, old_values, advantages, returns):
        """prompt (b, P), all others (b, R). Returns {metric: a scalar}."""
        with autocast():
            logp, values = actor_critic(policy, value_head, prompt, response, config.temperature)
        loss, metrics = policy_loss(logp, old_logp, advantages, mask, config.clip_range,
                                    config.clip_range_high, config.loss, max_length)
        metrics["first_ratio"] = ((logp - old_logp).exp() - 1).abs().max()
        if config.baseline == "critic":
            metrics["value_loss"] = value_loss(values, old_values, returns, mask,
                                               config.clip_range)
            loss = loss + config.vf_coef * metrics["value_loss"]
        metrics["grad_norm"] = optimizer_step(loss, actor_and_critic, optimizer, config.grad_clip)
        return {name: value.detach() for name, value in metrics.items()}

    return cuda_graph(learn, value_head.weight.device)      # on a CPU it stays what it is


def update(learn, rollout, advantages, returns, config):
    """Passes over one rollout, in minibatches: ppo_epochs of them, or fewer if approx_kl exceeds
    target_kl. learn: a minibatch_step(). Returns the means of the metrics of all minibatches.

    first_ratio is the largest |ratio - 1| before the first step: it must be 0, or the policy that
    is updated is not the one that wrote the rollout."""
    if config.baseline == "critic":
        advantages = whiten(advantages, rollout.mask)           # a group's are centered already
    columns = [rollout.prompt, rollout.response, rollout.mask, rollout.logp, rollout.values,
               advantages, returns]                         # as learn() takes them
    history = []                                            # the metrics of every step
    for _ in range(config.ppo_epochs):
        order = torch.randperm(len(rollout.prompt)).to(rollout.prompt.device)
        for rows in order.split(config.minibatch_size):
            history.append(learn(*[column[rows] for column in columns]))
        if config.target_kl and agreed(history[-1]["approx_kl"] > config.target_kl):
            break       # the policy is too far from the one that wrote the rollout
    result = {name: torch.stack([metrics[name] for metrics in history]).mean().item()
              for name in history[0]}
    return result | {"first_ratio": history[0]["first_ratio"].item()}

# -----------------------------------------------------------------------------
# the stage

def check_config(config):
    """Raises InputError for options that contradict each other."""
    if config.temperature == 0:
        raise InputError("--temperature 0 always writes the same response, and nothing is learned "
                         "from one: it must be greater than 0")
    if config.baseline not in ("critic", "rloo", "grpo", "dr_grpo"):
        raise InputError(f"--baseline is critic, rloo, grpo or dr_grpo, not '{config.baseline}'")
    if config.loss not in ("ppo", "gspo", "cispo"):
        raise InputError(f"--loss is ppo, gspo or cispo, not '{config.loss}'")
    if config.baseline != "critic" and config.group_size < 2:
        raise InputError(f"--baseline {config.baseline} compares responses to one prompt: it needs "
                         "--group_size of at least 2")
    if config.batch_size % config.minibatch_size or config.batch_size % config.group_size:
        raise InputError("--batch_size must be a multiple of --minibatch_size and of --group_size")


def make_score_fn(config, policy, tok, reward_fn, device):
    """score_fn(prompt, response) -> (B,): the reward model, or the user's reward_fn on strings."""
    if reward_fn is None:
        return load_frozen_reward_model(config.reward, policy, config)

    def score_fn(prompt, response):
        prompts = [tok.decode(row) for row in prompt]                   # strings
        texts = [tok.decode(row) for row in response]
        return check_scores(reward_fn(prompts, texts), texts).to(device)

    return score_fn


def check_scores(scores, texts):
    """What a reward_fn returned for these texts, as a tensor (B,). Raises InputError if it is
    anything else than a finite number for each of them."""
    try:
        tensor = torch.as_tensor(scores, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError("reward_fn must return a list of numbers, and not "
                         f"{str(scores)[:60]!r}") from None
    if tensor.shape != (len(texts),):
        raise InputError(f"reward_fn must return one number for each of the {len(texts)} texts, "
                         f"and not numbers of shape {tuple(tensor.shape)}")
    for text, score in zip(texts, tensor.tolist(), strict=True):
        if not math.isfinite(score):
            raise InputError(f"reward_fn gave {score} to {text!r}: a score must be finite")
    return tensor


def train(config, reward_fn=None):
    """Runs the stage. Writes config.out_dir/ckpt.pt. Raises InputError for unusable input.

    reward_fn(prompts, texts) -> floats takes the place of the reward model, if given: your own
    reward in one function."""
    device, autocast = setup(config)
    check_config(config)
    # In eval mode, like the reference: dropout would move the ratio before any update does.
    policy, reference = load_policy_and_reference(config, device)
    tok = tokenizer_of(policy)
    score_fn = make_score_fn(config, policy, tok, reward_fn, device)
    prompts = prompt_batches(load_prompts(config, tok), config, tok, policy.config.block_size,
                             device, config.seed)
    value_head = nn.Linear(policy.config.n_embd, 1, device=device)
    nn.init.zeros_(value_head.weight)                       # the first values are 0, not noise
    nn.init.zeros_(value_head.bias)
    optimizer = adamw(nn.ModuleList([policy, value_head]), config.lr, eps=1e-5)
    learn = minibatch_step(policy, value_head, optimizer, config, autocast)
    rng = make_rng(device, config.seed)

    run = Run("ppo", config)
    for step in run.steps(config.sample_interval, policy=policy, value_head=value_head,
                          optimizer=optimizer, prompts=prompts, rng=rng):
        is_last = step + 1 == config.max_steps
        set_lr(optimizer, config.lr, step, config.max_steps, config.warmup_steps)

        # -- sample and score
        prompt = prompts.next()["prompt"].repeat_interleave(config.group_size, dim=0)   # (B, P)
        with autocast():
            rollout = make_rollout(policy, value_head, reference, score_fn, prompt, config, rng)
        metrics, rows = describe_rollout(rollout, tok)
        run.sampled_tokens += rollout.mask.sum().item()

        # -- update
        advantages, returns = compute_advantages(rollout, config, config.kl_coef)
        metrics |= update(learn, rollout, advantages, returns, config)
        assert metrics["first_ratio"] < 1e-2, "the policy of the rollout is not that of the update"

        # -- log
        if config.baseline == "critic":
            metrics["explained_variance"] = explained_variance(rollout.values, returns,
                                                               rollout.mask)
        else:
            # Groups whose responses all score the same teach nothing.
            spread = rollout.score.view(-1, config.group_size).std(dim=1)   # (B / G,)
            metrics["dead_groups"] = (spread < 1e-6).float().mean().item()
        run.log(**metrics)
        if (step + 1) % config.sample_interval == 0 or is_last:
            run.write(format_samples(rows), rows)

    save_trained(run.folder / "ckpt.pt", policy, tok, stage="ppo")
    run.finish()


if __name__ == "__main__":
    command_line(lambda: train(tyro.cli(Config)))
