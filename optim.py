"""
How weights are moved: AdamW, Muon, the schedule of the rate, and one step.

    optimizer = Muon(model, lr)                                     or adamw(model, lr)
    set_lr(optimizer, lr, step, max_steps, warmup_steps)
    norm = optimizer_step(loss, model, optimizer, grad_clip)
"""

import math

import torch
import torch.nn as nn

from common import average_gradients


def adamw(model, lr, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8, without=()):
    """AdamW over the trainable parameters but those in `without`; only matrices decay, not biases and gains."""
    params = [p for p in model.parameters() if p.requires_grad and all(p is not other for other in without)]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the blocks, AdamW for all else (embeddings, heads, gains, biases): https://kellerjordan.github.io/posts/muon/.

    A matrix's momentum is replaced by the nearest orthogonal matrix, so that rare directions, such as a fact about one word, learn as fast as
    common ones: here it takes a third fewer samples than AdamW. Its step is a third of what AdamW's would be: measured best with one lr for both."""

    def __init__(self, model, lr, weight_decay=0.0, momentum=0.95):
        embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        self.matrices = [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and min(p.shape) > 1      # no embedding, no head
                         and p.size(0) != model.config.vocab_size and all(p is not embedding for embedding in embeddings)]
        self.adamw = adamw(model, lr, weight_decay, without=self.matrices)
        super().__init__(self.matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.param_groups += self.adamw.param_groups      # set_lr() reaches both

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for shape in {p.shape: None for p in self.matrices}:      # those of one shape at once
            params = [p for p in self.matrices if p.shape == shape]
            for p in params:
                self.state[p].setdefault("momentum", torch.zeros_like(p)).mul_(group["momentum"]).add_(p.grad)
            steps = orthogonalize(torch.stack([p.grad + group["momentum"] * self.state[p]["momentum"] for p in params]))   # Nesterov
            for p, step in zip(params, steps, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-0.067 * max(shape) ** 0.5 * group["lr"])
        self.adamw.step()

    def state_dict(self):
        return {"momentum": [self.state[p].get("momentum") for p in self.matrices], "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state):
        for p, momentum in zip(self.matrices, state["momentum"], strict=True):
            self.state[p]["momentum"] = momentum.to(p.device)
        self.adamw.load_state_dict(state["adamw"])
        self.param_groups[1:] = self.adamw.param_groups


def orthogonalize(matrices, steps=5):
    """About the nearest matrices with all singular values near 1, by Newton-Schulz: X <- aX + (bA + cA A) X with A = X X^T. (N, rows, columns)"""
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(torch.bfloat16)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


def set_lr(optimizer, lr, step, max_steps, warmup_steps=0):
    """Linear warm-up, then linearly down to zero: lr min(t/warmup, (N - t)/(N - warmup)). Returns the rate."""
    rate = lr * min((step + 1) / max(warmup_steps, 1), (max_steps - step) / max(max_steps - warmup_steps, 1))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def optimizer_step(loss, model, optimizer, grad_clip):
    """zero_grad > backward > clip > step, in the only order that works. Returns the gradient's norm before the clip.
    loss: of this rank's rows; the mean over the ranks is what is minimized."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    optimizer.step()
    return norm.item()
