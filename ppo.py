"""
Stage 3a, PPO: reinforcement learning from a reward model, with a KL penalty to the SFT policy.

    1. rollout: the policy answers a batch of prompts; log-probs of every token under the policy
       and under the reference, which is the frozen SFT policy
    2. score: the reward model reads each response once, at its end token
    3. reward of a token = -kl_coef (log pi - log pi_ref), plus the score at the end token
                                                                 Eq. 2 of arXiv 1909.08593
    4. advantages: GAE over the critic's values (arXiv 1506.02438), whitened; or each response
       against the other responses to its prompt (RLOO, GRPO)
    5. ppo_epochs passes over the rollout in minibatches:
       clipped policy loss + vf_coef clipped value loss          Eq. 7, 9 of arXiv 1707.06347
    6. again, with fresh responses

The critic is a linear head on the policy's own trunk, so one forward pass serves both. There is
no entropy bonus, and no dropout. With --lora the policy, the reference, and the reward model are
adapters on one frozen trunk (lora.py).

What to look at: a ratio of 1.000 in the first minibatch (asserted), score up, kl slowly up, and
the samples: reward hacking also raises the score. In the pun world the judge shows it; no loss
ever sees the judge.

    python ppo.py                                  against runs/reward_model
    python ppo.py --baseline rloo --group_size 4   no critic: four responses a prompt
    python ppo.py --lora 8 --lr 5e-4               after reward_model.py --lora 8 --lr 2e-3
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import tyro

from common import InputError, Run, TrainOptions, command_line, make_rng, setup
from data import (
    Batches,
    describe,
    encode_records,
    format_samples,
    means,
    read_records,
    tokenizer_of,
)
from lora import load_policy_and_reference, load_reward_adapter, megabytes, save_trained
from model import load_reward_model, logprobs, logprobs_from_logits
from optim import adamw, optimizer_step, set_lr
from puns import world


@dataclass(slots=True)
class Config(TrainOptions):
    out_dir: str = "runs/ppo"                                           # the folder of this run
    init: str = "runs/sft/ckpt.pt"              # the policy to start from, and the reference
    reward: str = "runs/reward_model/ckpt.pt"   # the reward model
    data: str = ""              # JSONL of prompts; '' is the pun world
    max_steps: int = 80         # rollouts
    batch_size: int = 256       # responses a rollout
    minibatch_size: int = 128   # responses a gradient step
    ppo_epochs: int = 4         # passes over each rollout
    max_new_tokens: int = 32                                            # longest response
    temperature: float = 1.0    # of sampling, and of every log-prob
    kl_coef: float = 0.25       # weight of the KL penalty
    kl_target: float = 0.0      # nats a response; adapts kl_coef to hold this KL; 0 keeps it fixed
    kl_horizon: int = 10_000    # responses over which kl_coef adapts
    missing_eos_penalty: float = 1.0    # subtracted from the score of a response that never ends
    baseline: str = "critic"    # critic (GAE), rloo or grpo
    group_size: int = 1         # responses a prompt; rloo and grpo need at least 2
    gamma: float = 1.0          # discount a token
    lam: float = 0.95           # GAE's lambda
    clip_range: float = 0.2     # of the ratio, and of the change of a value
    vf_coef: float = 0.5        # weight of the value loss
    lr: float = 1.7e-4                                                  # the highest rate
    warmup_steps: int = 5                                       # rollouts until the highest rate
    grad_clip: float = 1.0                      # largest norm of a gradient; 0 does not clip
    ppg_interval: int = 0       # rollouts between two auxiliary phases (PPG); 0 is never
    ppg_epochs: int = 2         # passes of an auxiliary phase
    sample_interval: int = 20   # rollouts between two samples on screen and two saved states

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

    A score for every token, (B, R), is added as it is. The penalty is the k1 estimator: as a
    reward, its expected policy gradient is the gradient of KL(pi || pi_ref). -> (B, R)"""
    assert logp.shape == ref_logp.shape == mask.shape
    rewards = -kl_coef * (logp - ref_logp) * mask                       # (B, R)
    if score.dim() == 2:
        assert score.shape == mask.shape, "a reward is (B,), or (B, R) for one a token"
        return rewards + score * mask
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
    grpo: (R_i - mean) / (std + 1e-4), with the unbiased std (arXiv 2402.03300)."""
    groups = rewards.view(-1, group_size)                   # (B / G, G)
    centered = groups - groups.mean(dim=1, keepdim=True)
    if kind == "rloo":
        # R_i - (sum - R_i) / (G - 1) = (R_i - mean) G / (G - 1)
        return (centered * group_size / (group_size - 1)).flatten()
    return (centered / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()


def policy_loss(logp, old_logp, advantages, mask, clip_range):
    """PPO's clipped objective, Eq. 7 of https://arxiv.org/abs/1707.06347, as a loss.

    The larger of two losses is taken, so the clip removes only the gain of a step too far.
    Returns (loss, metrics): the ratio pi / pi_old, approx_kl (k2), and the fraction clipped."""
    assert logp.shape == old_logp.shape == advantages.shape == mask.shape
    log_ratio = logp - old_logp                             # log(pi / pi_old)
    ratio = log_ratio.exp()                                 # 1 on pads
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.max(-advantages * ratio, -advantages * clipped_ratio)    # (B, R)
    is_clipped = (ratio - 1).abs() > clip_range
    metrics = {"ratio": masked_mean(ratio, mask),
               "approx_kl": 0.5 * masked_mean(log_ratio ** 2, mask),
               "clipfrac": masked_mean(is_clipped.float(), mask)}
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


def adapt_kl_coef(kl_coef, kl, target, horizon, n):
    """Raises kl_coef while kl is above target, and lowers it while it is below.

    The proportional controller of https://arxiv.org/abs/1909.08593, section 2.2. kl, target: nats
    a response; n: responses since the last call; horizon: responses over which it reacts."""
    error = max(-0.2, min(0.2, kl / target - 1))                        # at most 20 % at once
    return kl_coef * (1 + error * n / horizon)


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
    score: torch.Tensor         # (B,) of the reward model; or (B, R)
    entropy: float              # of the policy, in nats a token


def actor_critic(policy, value_head, prompt, response, temperature, detach=False):
    """(log-probs, values) of a response, both (B, R), in one pass.

    detach=True keeps the gradient of the values out of the trunk (PPG)."""
    hidden = policy.hidden(prompt, response)                # (B, R, C)
    logp = logprobs_from_logits(policy.head(hidden), response, temperature)
    values = value_head(hidden.detach() if detach else hidden).squeeze(-1).float()
    return logp, values


@torch.no_grad()
def make_rollout(policy, value_head, reference, score_fn, prompt, config, rng):
    """Lets the policy answer prompts (B, P) and records all that the update needs.

    score_fn(prompt, response) -> (B,) or (B, R). Returns a Rollout."""
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
    score = score_fn(prompt, response)
    if score.dim() == 1:
        ended = (response == policy.config.eos_token_id).any(dim=1)         # (B,)
        score = score - config.missing_eos_penalty * ~ended
    entropy = -masked_mean(sampled_logp, mask).item()       # E[-log pi], from the samples
    return Rollout(prompt, response, mask, torch.cat(logp), torch.cat(ref_logp),
                   torch.cat(values), score, entropy)


def describe_rollout(rollout, tok):
    """(metrics, rows) of a rollout: means over the whole batch, and one row for each response."""
    k1, _, k3 = kl_estimates(rollout.logp, rollout.ref_logp)
    kl = (k1 * rollout.mask).sum(dim=1)                     # (B,) nats a response
    score = rollout.score
    if score.dim() == 2:
        score = score.sum(dim=1)                            # (B,)
    rows = describe(tok, rollout.prompt, rollout.response, kl, score)
    metrics = means(rows)                                       # kl, score, and the judge's rates
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

def update(policy, value_head, optimizer, rollout, advantages, returns, config, autocast,
           detach=False):
    """ppo_epochs passes over one rollout, in minibatches. Returns the means of their metrics.

    first_ratio is the largest |ratio - 1| before the first step: it must be 0, or the policy that
    is updated is not the one that wrote the rollout. detach: see actor_critic()."""
    has_critic = config.baseline == "critic"
    if has_critic:
        advantages = whiten(advantages, rollout.mask)           # a group's are scaled already
    actor_and_critic = nn.ModuleList([policy, value_head])      # one gradient norm for both
    history, first_ratio = {}, None                             # {metric: its value at every step}
    for _ in range(config.ppo_epochs):
        for rows in torch.randperm(len(rollout.prompt)).split(config.minibatch_size):
            old_logp, mask = rollout.logp[rows], rollout.mask[rows]         # (b, R) each
            with autocast():
                logp, values = actor_critic(policy, value_head, rollout.prompt[rows],
                                            rollout.response[rows], config.temperature, detach)
            loss, metrics = policy_loss(logp, old_logp, advantages[rows], mask, config.clip_range)
            if first_ratio is None:
                first_ratio = ((logp - old_logp).exp() - 1).abs().max().item()
            if has_critic:
                metrics["value_loss"] = value_loss(values, rollout.values[rows], returns[rows],
                                                   mask, config.clip_range)
                loss = loss + config.vf_coef * metrics["value_loss"]
            grad_norm = optimizer_step(loss, actor_and_critic, optimizer, config.grad_clip)
            metrics["grad_norm"] = torch.tensor(grad_norm)
            for name, value in metrics.items():
                history.setdefault(name, []).append(value.detach().cpu())
    result = {name: torch.stack(values).mean().item() for name, values in history.items()}
    result["first_ratio"] = first_ratio
    return result


def auxiliary_phase(policy, value_head, optimizer, replay, config, autocast):
    """PPG's second phase, Eq. 4 of https://arxiv.org/abs/2009.04416.

    The value loss is trained through the trunk, while KL(pi_old || pi) over the whole vocabulary
    keeps the policy where it was. replay: [(Rollout, returns)]. Returns the last loss."""
    old_policy = copy.deepcopy(policy)                          # what the phase must not change
    actor_and_critic = nn.ModuleList([policy, value_head])      # one gradient norm for both
    for _ in range(config.ppg_epochs):
        for rollout, returns in replay:
            with autocast():
                hidden = policy.hidden(rollout.prompt, rollout.response)        # (B, R, C)
                values = value_head(hidden).squeeze(-1).float()                 # (B, R)
                logp = policy.head(hidden).float().log_softmax(-1)              # (B, R, V)
                with torch.no_grad():
                    old_logits = old_policy(rollout.prompt, rollout.response)
                    old_logp = old_logits.float().log_softmax(-1)               # (B, R, V)
            policy_kl = (old_logp.exp() * (old_logp - logp)).sum(-1)            # (B, R)
            value_error = (values - returns) ** 2
            loss = masked_mean(policy_kl, rollout.mask)
            loss = loss + 0.5 * masked_mean(value_error, rollout.mask)
            optimizer_step(loss, actor_and_critic, optimizer, config.grad_clip)
    return loss.item()

# -----------------------------------------------------------------------------
# the stage

def check_config(config):
    """Raises InputError for options that contradict each other."""
    if config.baseline not in ("critic", "rloo", "grpo"):
        raise InputError(f"--baseline is critic, rloo or grpo, not '{config.baseline}'")
    if config.baseline != "critic" and config.group_size < 2:
        raise InputError(f"--baseline {config.baseline} compares responses to one prompt: it needs "
                         "--group_size of at least 2")
    if config.batch_size % config.minibatch_size or config.batch_size % config.group_size:
        raise InputError("--batch_size must be a multiple of --minibatch_size and of --group_size")


def load_prompts(config):
    """Records of prompts: those of a file, or all of the pun world."""
    if config.data:
        return read_records(config.data, ["prompt"])
    return [{"prompt": world().prompt(thing)} for thing in world().things]


def prompt_batches(records, config, tok, block_size, device, seed):
    """Endless batches of batch_size / group_size prompts, which repeat if there are too few.

    Raises InputError for a prompt that leaves no room for max_new_tokens."""
    n_prompts = config.batch_size // config.group_size
    copies = -(-n_prompts // len(records))                  # rounded up
    encoded = encode_records(records * copies, tok, ["prompt"], block_size,
                             reserve=config.max_new_tokens)
    return Batches(encoded, n_prompts, tok.pad_token_id, device, seed)


def make_score_fn(config, policy, tok, reward_fn, device):
    """score_fn(prompt, response): the reward model, or the user's reward_fn on strings."""
    if reward_fn is None:
        if config.lora:
            path = Path(config.reward).with_name("adapter.pt")
            return load_reward_adapter(path, policy, config)
        return load_reward_model(config.reward, device)

    def score_fn(prompt, response):
        prompts = [tok.decode(row) for row in prompt]                   # strings
        texts = [tok.decode(row) for row in response]
        return torch.tensor(reward_fn(prompts, texts), device=device)

    return score_fn


def train(config, reward_fn=None):
    """Runs the stage. Writes config.out_dir/ckpt.pt. Raises InputError for unusable input.

    reward_fn(prompts, texts) -> floats takes the place of the reward model, if given: your own
    reward in one function."""
    check_config(config)
    if config.ppg_interval and config.sample_interval % config.ppg_interval:
        raise InputError("--sample_interval must be a multiple of --ppg_interval: a state is saved "
                         "between two auxiliary phases")
    device, autocast = setup(config)
    # In eval mode, like the reference: dropout would move the ratio before any update does.
    policy, reference = load_policy_and_reference(config, device)
    tok = tokenizer_of(policy)
    score_fn = make_score_fn(config, policy, tok, reward_fn, device)
    prompts = prompt_batches(load_prompts(config), config, tok, policy.config.block_size, device,
                             config.seed)
    value_head = nn.Linear(policy.config.n_embd, 1, device=device)
    nn.init.zeros_(value_head.weight)                       # the first values are 0, not noise
    nn.init.zeros_(value_head.bias)
    optimizer = adamw(nn.ModuleList([policy, value_head]), config.lr, eps=1e-5)
    rng = make_rng(device, config.seed)
    kl_coef = torch.tensor(config.kl_coef)                  # a tensor, so that it is saved, too
    replay = []                                             # rollouts since the last PPG phase

    run = Run("ppo", config)
    for step in run.steps(config.sample_interval, policy=policy, value_head=value_head,
                          optimizer=optimizer, prompts=prompts, rng=rng, kl_coef=kl_coef):
        is_last = step + 1 == config.max_steps
        set_lr(optimizer, config.lr, step, config.max_steps, config.warmup_steps)

        # -- sample and score
        prompt = prompts.next()["prompt"].repeat_interleave(config.group_size, dim=0)   # (B, P)
        with autocast():
            rollout = make_rollout(policy, value_head, reference, score_fn, prompt, config, rng)
        metrics, rows = describe_rollout(rollout, tok)

        # -- update
        advantages, returns = compute_advantages(rollout, config, kl_coef.item())
        metrics |= update(policy, value_head, optimizer, rollout, advantages, returns, config,
                          autocast, detach=config.ppg_interval > 0)
        assert metrics["first_ratio"] < 1e-2, "the policy of the rollout is not that of the update"
        if config.ppg_interval:
            replay.append((rollout, returns))
            if len(replay) == config.ppg_interval:
                metrics["ppg_loss"] = auxiliary_phase(policy, value_head, optimizer, replay,
                                                      config, autocast)
                replay = []

        # -- log
        metrics["kl_coef"] = kl_coef.item()
        if config.baseline == "critic":
            metrics["explained_variance"] = explained_variance(rollout.values, returns,
                                                               rollout.mask)
        else:
            # Groups whose responses all score the same teach nothing.
            spread = rollout.score.view(-1, config.group_size).std(dim=1)   # (B / G,)
            metrics["dead_groups"] = (spread < 1e-6).float().mean().item()
        if config.kl_target:
            kl_coef.fill_(adapt_kl_coef(kl_coef.item(), metrics["kl"], config.kl_target,
                                        config.kl_horizon, len(prompt)))
        run.log(**metrics)
        if (step + 1) % config.sample_interval == 0 or is_last:
            run.write(format_samples(rows))

    save_trained(run.folder / "ckpt.pt", policy, tok, stage="ppo")
    models = [model for model in (policy, value_head, reference, score_fn)
              if isinstance(model, nn.Module)]
    print(f"ppo: {megabytes(models, optimizer):.1f} MB of weights, gradients and optimizer state")
    run.finish()


if __name__ == "__main__":
    command_line(lambda: train(tyro.cli(Config)))
