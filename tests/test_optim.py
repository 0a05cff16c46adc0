"""Optimizers, the schedule, and one step."""

import copy

import pytest
import torch
import torch.nn as nn
from conftest import EOS, PROMPT, RESPONSE, awake, close, toy

import common
import optim
from common import InputError, TrainOptions
from lora import prepare
from model import RewardModel, logprobs
from optim import (
    Muon,
    adamw,
    compile_step,
    cuda_graph,
    optimizer_step,
    orthogonalize,
    set_lr,
)


def test_adamw_decays_matrices_alone():
    model = toy()
    model.wte.requires_grad_(False)                 # is not trained, and so in no group
    optimizer = adamw(model, 1e-3, 0.1, betas=(0.5, 0.95), eps=1e-5, without=[model.ln_f.weight])
    assert optimizer.defaults["betas"] == (0.5, 0.95) and optimizer.defaults["eps"] == 1e-5
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups
             for p in group["params"]}
    for name, p in model.named_parameters():
        expected = None if name in ("wte.weight", "ln_f.weight") else 0.1 * (p.dim() == 2)
        assert decay.get(id(p)) == expected, name


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else(model):
    """Embeddings, T5's position bias, and the heads are AdamW's, though they are matrices."""
    optimizer = Muon(RewardModel(model), 1e-2)
    name_of = {id(p): name for name, p in RewardModel(model).named_parameters()}
    muon, *rest = [[name_of.get(id(p), "scalar_head") for p in group["params"]]
                   for group in optimizer.param_groups]
    heads = ("wte", "wpe", "relative", "lm_head")
    assert set(muon) == {f"model.{name}" for name, p in model.named_parameters()
                         if p.dim() == 2 and not any(head in name for head in heads)}
    assert len(muon + sum(rest, [])) == len(name_of)
    assert not any(group["weight_decay"] for group in optimizer.param_groups)       # by default


def newton_schulz(matrix):
    """What orthogonalize() does, by singular values: U S V^T -> U f(S) V^T, f(S) near 1."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    return (u * s) @ v


@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-4), (True, 0.05)])
@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32)])
def test_orthogonalize_is_newton_schulz(monkeypatch, shape, bf16, tolerance):
    """In bfloat16 where the hardware has it, else in float32."""
    dtypes, baddbmm = set(), torch.baddbmm

    def baddbmm_and_note(x, *args, **options):
        dtypes.add(x.dtype)
        return baddbmm(x, *args, **options)

    monkeypatch.setattr(optim, "supports_bf16", lambda device: bf16)
    monkeypatch.setattr(torch, "baddbmm", baddbmm_and_note)
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([7, 1, 1e-3])[:, None, None]
    result = orthogonalize(matrices)
    assert dtypes == {torch.bfloat16 if bf16 else torch.float32}
    assert result.dtype == torch.float32
    for matrix, found in zip(matrices, result, strict=True):        # each on its own
        close(found, newton_schulz(matrix), atol=tolerance, rtol=0)
        assert 0.3 < torch.linalg.svdvals(found).min() < torch.linalg.svdvals(found).max() < 1.3


def test_muon_is_its_equations(monkeypatch):
    """m <- 0.95 m + g; W <- (1 - lr wd) W - 0.067 lr sqrt(max(shape)) O(g + 0.95 m)."""
    monkeypatch.setattr(optim, "supports_bf16", lambda device: False)
    model = awake(toy(arch="palm"))
    slow, lr, decay = copy.deepcopy(model), 0.1, 0.2
    inside = {name: p for name, p in slow.named_parameters() if name[0] == "h" and p.dim() == 2}
    optimizer, momenta = Muon(model, lr, decay), dict.fromkeys(inside, 0)
    rest = adamw(slow, lr, decay, without=inside.values())
    for _ in range(3):
        for m in (model, slow):
            m.zero_grad()
            logprobs(m, PROMPT, RESPONSE).sum().backward()
        optimizer.step()
        rest.step()
        for name, p in inside.items():
            momenta[name] = 0.95 * momenta[name] + p.grad
            update = newton_schulz(p.grad + 0.95 * momenta[name]) * 0.067 * max(p.shape) ** 0.5
            p.data = (1 - lr * decay) * p.data - lr * update
    for p, expected in zip(model.parameters(), slow.parameters(), strict=True):
        close(p, expected, atol=1e-4)


def test_adapters_of_any_rank_train_with_muon():
    for rank, n_matrices in ((2, 8), (1, 0)):       # those of rank 1 are vectors: AdamW's
        model = awake(toy())
        prepare(model, TrainOptions(dtype="float32", lora=rank), "policy")
        optimizer = Muon(model, 0.1)
        assert len(optimizer.matrices) == n_matrices
        optimizer_step(logprobs(model, PROMPT, RESPONSE).sum(), model, optimizer, 1.0)


def test_learning_rate_by_hand():
    """Up to the top in 4 steps, then down to zero over the other 16."""
    optimizer = Muon(toy(), 0.0)
    rates = []
    for step in range(20):
        rates.append(set_lr(optimizer, 2.0, step, 20, 4))
        groups = optimizer.param_groups + optimizer.adamw.param_groups
        assert {group["lr"] for group in groups} == {rates[-1]}
    up, down = [0.5, 1.0, 1.5, 2.0], [2 * (20 - step) / 16 for step in range(4, 20)]
    assert rates == pytest.approx(up + down)
    assert [set_lr(optimizer, 1.0, step, 4) for step in range(4)] == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("grad_clip, expected", [(0.5, 0.5), (0.0, 1000.0), (5000.0, 1000.0)])
def test_a_step_clips_the_gradient_of_this_loss(grad_clip, expected):
    """The gradient of 1000 w is 1000, whatever an earlier backward pass has left."""
    model = nn.Linear(1, 1, bias=False)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), model.weight.item()
    (7 * model.weight.sum()).backward()
    norm = optimizer_step(1000 * model.weight.sum(), model, optimizer, grad_clip)
    assert norm == pytest.approx(1000)              # before the clip
    assert before - model.weight.item() == pytest.approx(expected, rel=1e-4)


def test_the_gradients_of_two_processes_are_averaged_before_the_clip(monkeypatch):
    """1000 here and -400 in the other process: 300."""
    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(common.dist, "all_reduce", lambda x: x.sub_(400))
    model = nn.Linear(1, 1, bias=False)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), model.weight.item()
    assert optimizer_step(1000 * model.weight.sum(), model, optimizer, 500.0) == pytest.approx(300)
    assert before - model.weight.item() == pytest.approx(300, rel=1e-4)

# -----------------------------------------------------------------------------
# recorded steps, on a GPU alone

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make_optimizer", [adamw, Muon])
def test_recorded_steps_are_the_steps(make_optimizer):
    """Batches of two shapes, a rate that changes, and samples between two steps."""
    def train(record):
        model = awake(toy()).cuda().train()
        optimizer = make_optimizer(model, 1e-3)

        def learn(prompt, response):
            loss = -logprobs(model, prompt, response).mean()
            return loss.detach(), optimizer_step(loss, model, optimizer, 1.0)

        learn, losses = record(learn), []
        rng = torch.Generator().manual_seed(0)
        for step in range(14):
            set_lr(optimizer, 1e-2, step, 14, 3)
            prompt = torch.randint(0, EOS, (8, 4), generator=rng).cuda()
            response = torch.randint(0, EOS, (8, 6 if step % 3 else 9), generator=rng).cuda()
            losses.append(learn(prompt, response)[0].item())
            model.generate(prompt, 5)
        return losses, model.cpu().state_dict()

    losses, weights = train(lambda learn: cuda_graph(learn, torch.device("cuda")))
    expected_losses, expected_weights = train(lambda learn: learn)
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    for name in weights:
        close(weights[name], expected_weights[name], atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_asks_for_a_number_is_never_recorded():
    seen = []
    function = cuda_graph(lambda x: (seen.append(x.sum().item()), x + 1)[1], torch.device("cuda"))
    results = [function(torch.full((2,), float(i), device="cuda")).sum().item() for i in range(6)]
    assert seen == [0, 2, 4, 6, 8, 10] and results == [2, 4, 6, 8, 10, 12]

# -----------------------------------------------------------------------------
# compiled steps

@pytest.mark.slow
def test_a_compiled_step_is_the_same_step(tmp_path, monkeypatch):
    """By the real compiler, forward and backward, in bfloat16, as it is used on a GPU."""
    # A cache of its own: a compilation that was killed leaves half a file in the common one.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def step(function):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logp = function(model, PROMPT, RESPONSE)
        (-logp.sum()).backward()
        return logp, model.wte.weight.grad.clone()

    model = awake(toy(n_head=1, n_embd=8))
    for plain, compiled in zip(step(logprobs), step(compile_step(logprobs)), strict=True):
        close(compiled, plain, atol=0.1, rtol=0.1)


@pytest.mark.slow
def test_no_compiler_is_one_sentence(monkeypatch):
    from torch._inductor import config
    monkeypatch.setattr(config.cpp, "cxx", ("/nowhere/c++",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    with pytest.raises(InputError, match="torch.compile does not work here .*: leave --compile"):
        compile_step(torch.sin)(torch.ones(3))
