"""
Optimizers and learning-rate schedule: AdamW, Muon, one optimizer step, and how to make it fast.

    optimizer = Muon(model, lr)                                     or adamw(model, lr)
    set_lr(optimizer, lr, step, max_steps, warmup_steps)
    grad_norm = optimizer_step(loss, model, optimizer, grad_clip)
    learn = cuda_graph(learn, device)                   a function that takes a whole step
"""

import collections
import functools
import math
import warnings

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves, tree_map

from common import InputError, average_gradients, supports_bf16, world_size


def adamw(model, lr, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8, without=()):
    """AdamW (https://arxiv.org/abs/1711.05101) over the trainable parameters, except `without`.

    Only matrices decay: a bias or a gain that shrinks toward 0 is no simpler model."""
    excluded = {id(p) for p in without}
    params = [p for p in model.parameters() if p.requires_grad and id(p) not in excluded]
    matrices = [p for p in params if p.dim() >= 2]
    vectors = [p for p in params if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    # On a GPU the rate is a number on the GPU, for a step that is recorded once (cuda_graph).
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    lr = torch.tensor(float(lr), device=device) if on_gpu else lr
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True, capturable=on_gpu)


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the blocks, AdamW for embeddings, heads, gains, and biases.

    Muon (https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum by the nearest
    orthogonal matrix. All directions get steps of one size, so rare ones, such as a fact about a
    single word, learn as fast as common ones."""

    def __init__(self, model, lr, weight_decay=0.0, momentum=0.95):
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

        def is_block_matrix(p):
            is_head = p.size(0) == model.config.vocab_size
            return min(p.shape) > 1 and not is_head and id(p) not in embeddings

        trainable = [p for p in model.parameters() if p.requires_grad and p.dim() == 2]
        self.matrices = [p for p in trainable if is_block_matrix(p)]
        # Matrices of one shape are updated together: a few large products, not many small.
        self.groups = {p.shape: [q for q in self.matrices if q.shape == p.shape]
                       for p in self.matrices}
        self.momenta = {shape: torch.stack(group).detach().zero_()
                        for shape, group in self.groups.items()}        # (N, rows, columns) each
        self.adamw = adamw(model, lr, weight_decay, without=self.matrices)
        group = {"params": self.matrices}           # empty for adapters of rank 1, which is fine
        lr = self.adamw.defaults["lr"]                      # a tensor on a GPU
        super().__init__([group], dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.param_groups += self.adamw.param_groups      # so that set_lr() reaches both

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        lr, momentum = group["lr"], group["momentum"]
        for shape, params in self.groups.items():
            gradients = torch.stack([p.grad for p in params])         # (N, rows, columns)
            buffer = self.momenta[shape].mul_(momentum).add_(gradients)
            updates = orthogonalize(gradients + momentum * buffer)    # Nesterov momentum
            # An orthogonal matrix has entries of size 1/sqrt(max(shape)), so this factor gives
            # entries of size 0.067 lr: a third of Moonlight's 0.2 (arXiv 2502.16982, Eq. 4),
            # because lr is the one of AdamW here.
            scale = 0.067 * max(shape) ** 0.5
            # p <- (1 - lr decay) p - scale lr update, for all of them at once
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_sub_(params, (scale * lr * updates).unbind())
        self.adamw.step()

    def state_dict(self):
        return {"momenta": list(self.momenta.values()), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state):
        for momentum, saved in zip(self.momenta.values(), state["momenta"], strict=True):
            momentum.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])
        self.param_groups[1:] = self.adamw.param_groups


def orthogonalize(matrices, steps=5):
    """Approximately the nearest matrices whose singular values are all near 1. (N, rows, columns)

    Newton-Schulz iteration: X <- aX + (bA + cAA) X with A = X X^T and Jordan's a, b, c."""
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    # The iteration converges from singular values of at most 1, and a norm of 1 ensures that.
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    # The iteration tolerates the rounding of bfloat16, but a CPU without it would emulate it.
    x = x.to(torch.bfloat16 if supports_bf16(x.device) else torch.float32)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)        # bA + cAA
        x = torch.baddbmm(x, b, x, beta=3.4445)                       # aX + (bA + cAA) X
    return (x.mT if tall else x).to(matrices.dtype)


def set_lr(optimizer, lr, step, max_steps, warmup_steps=0):
    """Linear warm-up to lr, then linear decay to zero. Returns the rate of this step.

    rate = lr min((step + 1) / warmup, (max_steps - step) / (max_steps - warmup))"""
    warmup = (step + 1) / max(warmup_steps, 1)
    decay = (max_steps - step) / max(max_steps - warmup_steps, 1)
    rate = lr * min(warmup, decay)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor) and group["params"]:
            # A state that was loaded has it on the CPU.
            group["lr"] = group["lr"].to(group["params"][0].device).fill_(rate)
        else:
            group["lr"] = rate
    return rate


def optimizer_step(loss, model, optimizer, grad_clip):
    """zero_grad, backward, clip, step: in this order. Returns the gradient's norm before the clip,
    a tensor, since to ask a GPU for a number is to wait for it.

    grad_clip: the largest norm of the whole gradient; 0 does not clip."""
    optimizer.zero_grad()
    loss.backward()
    average_gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    optimizer.step()
    return norm


def compile_step(function):
    """torch.compile(function), for batches with few_shapes (data.Batches).

    Shapes are static: with symbolic ones, Inductor cannot order the strides of a prompt and a
    response side by side, P + R - 1 positions, and dies. Raises InputError if it cannot compile."""
    compiled = torch.compile(function, dynamic=False)

    def call(*args):
        try:
            return compiled(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"torch.compile does not work here ({reason}): leave --compile out, "
                             "or install a C++ compiler") from None

    return call

# -----------------------------------------------------------------------------
# a GPU: small models keep it waiting, since Python takes longer to launch a kernel than the GPU
# takes to run it. A CUDA graph launches all kernels of a step at once.

@functools.cache
def place_for_graphs(device):
    """The stream that graphs run on, since nothing can be recorded on the default one, and the
    memory where they compute. All share both, since only one of them runs at a time."""
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        torch.zeros(1, device=device)           # no kernel can be loaded while one is recorded
        graph.capture_begin()
        torch.zeros(1, device=device)
        graph.capture_end()
    return stream, graph            # the memory lasts as long as this first graph


def cuda_graph(function, device, n_eager=2):
    """The function, but on a GPU its kernels are recorded once and replayed from then on.

    function: takes tensors, in lists or dicts if need be, and returns tensors. Whatever else it
    reads or writes, such as weights and an optimizer's state, must stay at its place in memory.
    For each set of shapes the first n_eager calls run as they are, the next one is recorded. A
    function that asks for a number on the GPU, as print() does, is never recorded. Elsewhere than
    on a GPU this is the function itself."""
    if device.type != "cuda" or world_size() > 1:
        return function
    stream, first_graph = place_for_graphs(device)
    n_calls, graphs = collections.Counter(), {}             # of each set of shapes

    def run(arguments):
        """Runs the function as it is. Returns (its outputs, whether it waited for the GPU)."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                outputs = function(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return outputs, any("called a synchronizing" in str(w.message) for w in caught)

    def record(arguments):
        inputs = tree_map(torch.clone, arguments)           # where each replay finds its arguments
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=first_graph.pool())
        try:
            outputs = function(*inputs)
        finally:
            graph.capture_end()     # or nothing could run on this GPU after an error
        return graph, tree_leaves(inputs), outputs

    def call(*arguments):
        shapes = tuple(x.shape for x in tree_leaves(arguments))
        n_calls[shapes] += 1
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            if n_calls[shapes] <= n_eager:
                outputs, waits = run(arguments)
                if waits:
                    n_calls[shapes] = 0                     # the next call is the first one again
            else:
                if shapes not in graphs:
                    graphs[shapes] = record(arguments)
                graph, inputs, outputs = graphs[shapes]
                for mine, x in zip(inputs, tree_leaves(arguments), strict=True):
                    mine.copy_(x)
                graph.replay()
                outputs = tree_map(torch.clone, outputs)    # the next replay overwrites its own
        torch.cuda.current_stream(device).wait_stream(stream)
        return outputs

    return call
