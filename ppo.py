"""
Stage 3a, PPO: reinforcement learning from a reward model, on a leash to the SFT policy.

    1. rollout: the policy answers a batch of prompts; note log-probs of every token under it and under the frozen SFT policy
    2. score each response with the reward model, once, at its end token
    3. reward of a token = - kl_coef (log pi - log pi_ref), plus the score at the end token      Eq. 2 of arXiv 1909.08593
    4. advantages by GAE over the critic's values (arXiv 1506.02438), whitened; or against the other answers to the same prompt
    5. ppo_epochs passes over the batch in minibatches: clipped policy loss + vf_coef clipped value loss  (arXiv 1707.06347)
    6. again, with fresh answers

The critic is a linear head on the policy's own trunk: one forward pass for both. There is no entropy bonus, and no dropout.
With --lora the reference and the reward model, too, live on that trunk, which is frozen (lora.py).
What to look at: ratio 1.000 in the first minibatch (asserted), score up, kl slowly up, and the texts: a policy that found a hole
in the reward model has a fine score. In the pun world the judge says what it is worth; no loss ever sees that.

    python ppo.py                                  against runs/reward_model
    python ppo.py --baseline rloo --group_size 4   no critic: four answers a prompt are each other's baseline
    python ppo.py --lora 8 --lr 5e-4               adapters on one trunk; before: python reward_model.py --lora 8 --lr 2e-3
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import tyro

from common import InputError, Run, TrainOptions, all_mean, gather, run, sampler, setup, shard
from data import Batches, describe, encode_records, rates, read_records, show, tokenizer
from lora import Adapted, load_adapter, megabytes, prepare, save
from model import Scorer, load_model, logprobs
from optim import adamw, optimizer_step, set_lr
from puns import world


@dataclass(slots=True)
class Config(TrainOptions):
    out_dir: str = "runs/ppo"
    init: str = "runs/sft/ckpt.pt"              # the policy to start from, and the reference it is leashed to
    reward: str = "runs/reward_model/ckpt.pt"   # the reward model
    data: str = ""              # JSONL of prompts; '' is the pun world
    max_steps: int = 80         # rollouts
    batch_size: int = 256       # responses a rollout
    minibatch_size: int = 128   # responses a gradient step
    ppo_epochs: int = 4         # passes over each rollout
    max_new_tokens: int = 32
    temperature: float = 1.0    # of sampling, and of every log-prob
    kl_coef: float = 0.25       # beta: what a nat of distance to the SFT policy costs
    kl_target: float = 0.0      # nats a response; adapts kl_coef to hold this distance; 0 keeps kl_coef fixed
    kl_horizon: int = 10_000    # responses over which it adapts
    end_penalty: float = 1.0    # off the score of a response without an end token
    baseline: str = "critic"    # critic (GAE), rloo or grpo
    group_size: int = 1         # responses a prompt; rloo and grpo need at least 2
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    vf_coef: float = 0.5
    lr: float = 1.7e-4
    warmup_steps: int = 5
    grad_clip: float = 1.0
    ppg_interval: int = 0       # an auxiliary value phase after this many rollouts (PPG, arXiv 2009.04416); 0 is never
    ppg_epochs: int = 2
    sample_interval: int = 20   # print samples and save the state after this many rollouts

# -----------------------------------------------------------------------------
# arithmetic: all (B, R) with a bool mask (B, R), True on real tokens

def masked_mean(x, mask):
    """The mean over the real tokens of all processes, as each one's share of it (common.py)."""
    return (x * mask).sum() / all_mean(mask.sum())


def whiten(x, mask, shift_mean=True):
    """(x - mean) / std over the real tokens, biased variance; shift_mean=False puts the mean back. Pads become 0."""
    assert x.shape == mask.shape and mask.sum() > 1, "whitening needs more than one token"
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return (white if shift_mean else white + mean) * mask


def token_rewards(score, logp, ref_logp, mask, kl_coef):
    """-kl_coef (log pi - log pi_ref) on every token, and the score (B,) on the last real one. A score per token, (B, R), is
    added as it is. The penalty is the k1 estimator: in a reward, its expected gradient is that of KL(pi || pi_ref)."""
    assert logp.shape == ref_logp.shape == mask.shape
    rewards = -kl_coef * (logp - ref_logp) * mask
    if score.dim() == 1:
        rows = torch.arange(len(score), device=score.device)
        rewards[rows, mask.sum(dim=1) - 1] += score
        return rewards
    assert score.shape == mask.shape, "a reward is one number a response (B,) or one a token (B, R)"
    return rewards + score * mask


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation, Eq. 16 of https://arxiv.org/abs/1506.02438. Nothing is worth anything after the end.
    Returns (advantages, returns), both (B, R); returns are taken before any whitening."""
    assert rewards.shape == values.shape == mask.shape
    values = values * mask
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        next_value = values[:, t + 1] if t + 1 < rewards.size(1) else 0.0
        # delta_t = r_t + gamma V_{t+1} - V_t;   A_t = delta_t + gamma lam A_{t+1}
        following = (rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, advantages + values


def group_advantages(rewards, group_size, kind):
    """Advantage of each response over the others of its prompt. rewards (B,), groups of neighbors -> (B,)

    rloo: R_i - mean of the other R (arXiv 2402.14740); grpo: (R_i - mean) / (std + 1e-4), unbiased std (arXiv 2402.03300)."""
    groups = rewards.view(-1, group_size)                                    # (B / G, G)
    mean = groups.mean(dim=1, keepdim=True)
    if kind == "rloo":
        return ((groups - mean) * group_size / (group_size - 1)).flatten()   # = R_i - (sum - R_i) / (G - 1)
    return ((groups - mean) / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()


def policy_loss(logp, old_logp, advantages, mask, clip_range):
    """PPO's clipped objective, Eq. 7 of https://arxiv.org/abs/1707.06347, as a loss. Returns (loss, info)."""
    assert logp.shape == old_logp.shape == advantages.shape == mask.shape
    ratio = (logp - old_logp).exp()                                          # 1 on pads
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    info = {"ratio": masked_mean(ratio, mask), "approx_kl": 0.5 * masked_mean((logp - old_logp) ** 2, mask),
            "clipfrac": masked_mean(((ratio - 1).abs() > clip_range).float(), mask)}
    return masked_mean(losses, mask), info


def value_loss(values, old_values, returns, mask, clip_range):
    """0.5 max((V - R)^2, (clip(V, V_old +- clip_range) - R)^2), mean over real tokens."""
    assert values.shape == old_values.shape == returns.shape == mask.shape
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def kl_estimates(logp, ref_logp):
    """Three estimators of KL(pi || pi_ref) from samples of pi, http://joschu.net/blog/kl-approx.html. All (B, R).

    With r = pi_ref / pi: k1 = -log r (unbiased), k2 = (log r)^2 / 2 (biased), k3 = (r - 1) - log r (unbiased, never negative)."""
    log_r = ref_logp - logp
    return -log_r, 0.5 * log_r ** 2, log_r.expm1() - log_r


def adapt_kl_coef(kl_coef, kl, target, horizon, n):
    """Proportional controller of arXiv 1909.08593, section 2.2: raises kl_coef while kl (nats a response) is above target."""
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * n / horizon)

# -----------------------------------------------------------------------------
# rollout

@dataclass(slots=True)
class Rollout:
    prompt: torch.Tensor        # (B, P) ids
    response: torch.Tensor      # (B, R) ids
    mask: torch.Tensor          # (B, R) True on real response tokens, the end token included
    logp: torch.Tensor          # (B, R) log-probs under the policy that wrote the response
    ref_logp: torch.Tensor      # (B, R) the same under the reference
    values: torch.Tensor        # (B, R) what the critic expected before each token
    score: torch.Tensor         # (B,) of the reward model; or (B, R)
    entropy: float              # nats a token, of the policy


def actor_critic(policy, value_head, prompt, response, temperature, detach=False):
    """(log-probs, values), both (B, R), in one pass. detach=True keeps the value's gradient out of the trunk (PPG)."""
    hidden = policy.hidden(prompt, response)                                 # (B, R, C)
    values = value_head(hidden.detach() if detach else hidden).squeeze(-1).float()
    return logprobs(policy, prompt, response, temperature, hidden=hidden), values


@torch.no_grad()
def make_rollout(policy, value_head, reference, score_fn, prompt, config, generator):
    """Lets the policy answer prompt (B, P) and notes all that the update needs. Log-probs come from the same function, in pieces of the same
    size, as in the update, so that the ratio starts at exactly 1."""
    response, sampled_logp = policy.generate(prompt, config.max_new_tokens, config.temperature, generator=generator)
    mask = response != policy.pad_id                                         # (B, R)
    share, size = (shard(prompt), shard(response)), len(shard(prompt[:config.minibatch_size]))
    pieces = list(zip(*(x.split(size) for x in share), strict=True))
    logp, values = (torch.cat(x) for x in zip(*(actor_critic(policy, value_head, *piece, config.temperature) for piece in pieces),
                                              strict=True))
    ref_logp = torch.cat([logprobs(reference, *piece, config.temperature) for piece in pieces])
    logp, values, ref_logp, score = (gather(x, len(prompt)) for x in (logp, values, ref_logp, score_fn(*share)))
    ended = (response == policy.config.end_id).any(dim=1)
    if score.dim() == 1:
        score = score - config.end_penalty * ~ended
    return Rollout(prompt, response, mask, logp, ref_logp, values, score, -masked_mean(sampled_logp, mask).item())


def advantages_of(rollout, config, kl_coef):
    """(advantages, returns), both (B, R), of a rollout, by the baseline that the config names."""
    rewards = token_rewards(rollout.score, rollout.logp, rollout.ref_logp, rollout.mask, kl_coef)
    if config.baseline == "critic":
        return gae(rewards, rollout.values, rollout.mask, config.gamma, config.lam)
    advantages = group_advantages(rewards.sum(dim=1), config.group_size, config.baseline)
    return advantages[:, None] * rollout.mask, rewards


def auxiliary_phase(policy, value_head, optimizer, rollouts, config, autocast):
    """PPG's second phase, Eq. 4 of https://arxiv.org/abs/2009.04416: the value loss goes through the trunk, while
    KL(pi_old || pi) over the whole vocabulary holds the policy where it was. rollouts: [(Rollout, returns)]. Returns the last loss."""
    old = copy.deepcopy(policy)
    for _ in range(config.ppg_epochs):
        for rollout, returns in rollouts:
            prompt, response, mask = shard(rollout.prompt), shard(rollout.response), shard(rollout.mask)
            with autocast():
                hidden = policy.hidden(prompt, response)
                values, logp = value_head(hidden).squeeze(-1).float(), policy.head(hidden).float().log_softmax(-1)
                with torch.no_grad():
                    old_logp = old.logits(prompt, response).float().log_softmax(-1)                             # (B, R, V)
            clone = masked_mean((old_logp.exp() * (old_logp - logp)).sum(-1), mask)
            loss = clone + 0.5 * masked_mean((values - shard(returns)) ** 2, mask)
            optimizer_step(loss, nn.ModuleList([policy, value_head]), optimizer, config.grad_clip)
    return loss.item()


def update(policy, value_head, optimizer, rollout, advantages, returns, config, autocast, detach=False):
    """ppo_epochs passes of minibatches over one rollout. Returns the metrics, means over all of them; `first_ratio` is the largest
    distance of a ratio from 1 before any step. detach: see actor_critic."""
    if config.baseline == "critic":
        advantages = whiten(advantages, rollout.mask)
    infos, both = [], nn.ModuleList([policy, value_head])
    for _ in range(config.ppo_epochs):
        for rows in map(shard, torch.randperm(len(rollout.prompt)).split(config.minibatch_size)):
            prompt, response, mask = rollout.prompt[rows], rollout.response[rows], rollout.mask[rows]
            with autocast():
                logp, values = actor_critic(policy, value_head, prompt, response, config.temperature, detach)
            loss, info = policy_loss(logp, rollout.logp[rows], advantages[rows], mask, config.clip_range)
            if not infos:
                first_ratio = ((logp - rollout.logp[rows]).exp() - 1).abs().max().item()
            if config.baseline == "critic":
                info["value_loss"] = value_loss(values, rollout.values[rows], returns[rows], mask, config.clip_range)
                loss = loss + config.vf_coef * info["value_loss"]
            info["grad_norm"] = torch.tensor(optimizer_step(loss, both, optimizer, config.grad_clip))
            infos.append(info)
    return {name: torch.stack([info[name].detach().cpu() for info in infos]).mean().item() for name in infos[0]} | {"first_ratio": first_ratio}


def describe_rollout(rollout, tok):
    """(metrics, rows): what a rollout says about the policy, means over the whole batch, and each completion."""
    k1, _, k3 = kl_estimates(rollout.logp, rollout.ref_logp)
    score = rollout.score if rollout.score.dim() == 1 else rollout.score.sum(dim=1)
    rows = describe(tok, rollout.prompt, rollout.response, (k1 * rollout.mask).sum(dim=1), score)
    return rates(rows) | {"k3": (k3 * rollout.mask).sum(dim=1).mean().item(), "entropy": rollout.entropy}, rows


def load_prompts(config, name, block_size, device):
    """Endless batches of prompts: those of a file, or of the pun world."""
    if config.data:
        records = read_records(config.data, "prompt")
    else:
        records = [{"prompt": world().prompt(thing)} for thing in world().things]
    encoded = encode_records(records, name, ["prompt"], block_size, config.data or "the pun world")
    return Batches(encoded, config.batch_size // config.group_size, tokenizer(name).pad_id, device, config.seed)


def load_reward_adapter(policy, config):
    """The reward model that reward_model.py --lora trained, as adapter and head on the policy's trunk."""
    path = Path(config.reward).with_name("adapter.pt")
    if not path.exists():
        raise InputError(f"{path} is not there: with --lora the reward model is an adapter on the policy's trunk; "
                         f"make it with: python reward_model.py --lora {config.lora} --init {config.init}")
    likelihood = torch.load(path, map_location="cpu", weights_only=True)["weights"].get("likelihood", 0)
    scorer = Scorer(policy, likelihood).to(next(policy.parameters()).device)
    return Adapted(scorer, load_adapter(path, scorer))


def check_config(config):
    if config.baseline not in ("critic", "rloo", "grpo"):
        raise InputError(f"--baseline is critic, rloo or grpo, not '{config.baseline}'")
    if config.baseline != "critic" and config.group_size < 2:
        raise InputError(f"--baseline {config.baseline} compares answers to one prompt: it needs --group_size of at least 2")
    if config.batch_size % config.minibatch_size or config.batch_size % config.group_size:
        raise InputError("--batch_size must be a multiple of --minibatch_size and of --group_size")


def train(config, reward_fn=None):
    """reward_fn(prompts, texts) -> floats takes the place of the reward model, if given: your own reward in one function."""
    check_config(config)
    if config.ppg_interval and config.sample_interval % config.ppg_interval:
        raise InputError("--sample_interval must be a multiple of --ppg_interval: a state is saved between phases, not inside one")
    device, autocast = setup(config)
    policy = load_model(config.init, device)            # in eval mode, like the reference: dropout would move the ratio before any update did
    tok = tokenizer(policy.tokenizer)
    prompts = load_prompts(config, tok.name, policy.config.block_size, device)
    if reward_fn is not None:
        def score_fn(prompt, response):
            return torch.tensor(reward_fn([tok.decode(row) for row in prompt], [tok.decode(row) for row in response]), device=device)
    else:
        score_fn = load_reward_adapter(policy, config) if config.lora else load_model(config.reward, device)
    prepare(policy, config, "policy")
    reference = Adapted(policy, None) if config.lora else load_model(config.init, device).requires_grad_(False)
    value_head = nn.Linear(policy.config.n_embd, 1, device=device)
    nn.init.zeros_(value_head.weight)
    nn.init.zeros_(value_head.bias)

    optimizer = adamw(nn.ModuleList([policy, value_head]), config.lr, eps=1e-5)
    generator, kl_coef, replay = sampler(device, config.seed), torch.tensor(config.kl_coef), []
    progress = Run("ppo", config, config.max_steps)
    parts = dict(policy=policy, value_head=value_head, optimizer=optimizer, prompts=prompts, generator=generator, kl_coef=kl_coef)
    for step in progress.steps(config.sample_interval, **parts):
        set_lr(optimizer, config.lr, step, config.max_steps, config.warmup_steps)
        prompt = prompts.next()["prompt"].repeat_interleave(config.group_size, dim=0)                # (B, P)
        with autocast():
            rollout = make_rollout(policy, value_head, reference, score_fn, prompt, config, generator)
        metrics, rows = describe_rollout(rollout, tok)
        advantages, returns = advantages_of(rollout, config, kl_coef.item())
        info = update(policy, value_head, optimizer, rollout, advantages, returns, config, autocast, detach=config.ppg_interval > 0)
        assert info["first_ratio"] < 1e-2, f"the policy of the rollout is not the policy of the update: ratio off by {info['first_ratio']}"
        metrics |= info | {"kl_coef": kl_coef.item()}
        if config.baseline == "critic":
            residual = masked_mean((returns - rollout.values) ** 2, rollout.mask)
            variance = masked_mean((returns - masked_mean(returns, rollout.mask)) ** 2, rollout.mask)
            metrics["explained_var"] = 1 - (residual / variance).item() if variance > 1e-8 else 0.0      # all alike: nothing to explain
        else:
            groups = rollout.score.view(-1, config.group_size)
            metrics["dead_groups"] = (groups.std(dim=1) < 1e-6).float().mean().item()    # all answers alike: nothing to learn
        if config.kl_target:
            kl_coef.fill_(adapt_kl_coef(kl_coef.item(), metrics["kl"], config.kl_target, config.kl_horizon, len(prompt)))
        if config.ppg_interval:
            replay.append((rollout, returns))
            if len(replay) == config.ppg_interval:
                metrics["ppg_loss"] = auxiliary_phase(policy, value_head, optimizer, replay, config, autocast)
                replay = []
        progress.log(**metrics)
        if (step + 1) % config.sample_interval == 0 or step + 1 == config.max_steps:
            progress.write(show(rows))

    save(progress.dir / "ckpt.pt", policy, tokenizer=tok.name, stage="ppo")
    models = [model for model in (policy, value_head, reference, score_fn) if isinstance(model, nn.Module)]
    print(f"ppo: {megabytes(models, optimizer):.1f} MB of weights, gradients and optimizer state")
    progress.finish()


if __name__ == "__main__":
    run(lambda: train(tyro.cli(Config)))
