"""The networks and the interface in front of them; test_pretrained.py has parity with others."""

import math
import re

import bench
import conftest
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import EOS, PAD, PROMPT, RESPONSE, VARIANTS, awake, close, ids, off, refuses, toy

import model as net
from common import InputError, make_rng
from discriminator import load_discriminator, save_discriminator
from model import ModelConfig, RewardModel, logprobs

MASK = RESPONSE != PAD


def test_the_fused_kernel_gets_bias_and_scale(monkeypatch):
    """What a GPU takes for long texts."""
    calls = []
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, **options: calls.append((args, options)) or args[0])
    q, k = (torch.empty(1, 2, n, 8, device="meta") for n in (5, 129))
    bias = torch.empty(1, 1, 5, 129, device="meta")
    net.attend(q, k, k, bias, 0.3)
    (args, options), = calls
    assert args[3].shape == bias.shape and options == {"scale": 0.3}


@pytest.mark.parametrize("T, dtype, is_fused", [
    (1, torch.bfloat16, True), (1, torch.float32, False), (2, torch.bfloat16, False)])
def test_a_cpu_takes_it_for_one_query_in_bfloat16(monkeypatch, T, dtype, is_fused):
    """And it is the same function: softmax(scale q k^T + bias) v."""
    calls, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, **options: calls.append(T) or kernel(*args, **options))
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, T, 8, generator=rng).to(dtype)
    k, v = (torch.randn(3, 2, 9, 8, generator=rng).to(dtype)[:, :, :6] for _ in range(2))
    bias = net.mask_bias(torch.rand(3, 1, T, 6, generator=rng) < 0.7)
    bias[..., -1] = 0                                       # the query itself
    found = net.attend(q, k, v, bias, 0.7)
    weights = (0.7 * q.float() @ k.float().mT + bias).softmax(dim=-1)
    assert found.dtype == dtype and calls == [T] * is_fused
    close(found.float(), weights @ v.float(), atol=2e-2)


@pytest.mark.parametrize("options, message", [
    (dict(arch="rnn"), "--arch is gpt or palm or llama or t5, not 'rnn'"),
    (dict(n_embd=30, n_head=4), "--n_embd 30 is not a multiple of --n_head 4"),
    (dict(n_kv_head=3), "4 query heads cannot share 3 key heads equally"),
    (dict(arch="palm", n_embd=12, n_head=4), "must be even"),
    (dict(arch="llama", n_embd=12, n_head=4), "must be even")])
def test_sizes_that_cannot_work_are_refused(options, message):
    refuses(message, ModelConfig, **options)

# -----------------------------------------------------------------------------
# the interface, the same for every architecture (the fixture `model`)

def test_padding_changes_nothing(model):
    """A row of a batch has the numbers that it has alone, and with more padding."""
    reward_model = RewardModel(model, likelihood=0.5)
    logits, scores = model(PROMPT, RESPONSE), reward_model(PROMPT, RESPONSE)
    for i in range(3):
        prompt, response = PROMPT[i][PROMPT[i] != PAD][None], RESPONSE[i][MASK[i]][None]
        R = response.size(1)
        for left, right in ((0, 0), (3, 2)):
            row = F.pad(prompt, (left, 0), value=PAD), F.pad(response, (0, right), value=PAD)
            close(model(*row)[0, :R], logits[i, :R])
            close(reward_model(*row)[0], scores[i])


def test_an_empty_prompt_gives_numbers(model):      # a softmax over nothing would be NaN
    logits = [model(torch.full((1, n), PAD), RESPONSE[:1]) for n in (1, 3)]
    assert logits[0].isfinite().all()
    close(*logits)


def test_a_state_sees_the_prompt_and_the_response_before_it(model):
    logits = model(PROMPT, RESPONSE)
    for t in range(4):
        changed = RESPONSE.clone()
        changed[1, t] = 9
        difference = (model(PROMPT, changed) - logits)[1].abs().amax(dim=-1)
        assert (difference[:t + 1] == 0).all() and (difference[t + 1:] > 1e-3).all()
    for i in range(5):
        changed = PROMPT.clone()
        changed[1, i] = 9
        difference = (model(changed, RESPONSE) - logits)[1].abs().amax(dim=-1)
        assert (difference > 1e-3).all()


def test_response_embeddings_are_read_in_place_of_tokens(model):
    """With a gradient for the tokens that a state has read, and for no other."""
    embeddings = model.embed(RESPONSE).detach().requires_grad_()
    other = torch.where(MASK, 4, PAD)
    x = model.hidden(PROMPT, other, embeddings)
    close(x[MASK], model.hidden(PROMPT, RESPONSE)[MASK])
    x[1, 2].sum().backward()
    read = embeddings.grad.abs().sum(dim=-1) > 0
    assert read.tolist() == [[False] * 4, [True, True, False, False], [False] * 4]


@pytest.mark.parametrize("name, n_calls", [
    ("gpt", 1 + 2 * 2), ("palm", 1 + 2), ("llama", 1 + 2 * 2), ("t5-v1.1", 4 + 2 * 2 + 2 * 3)])
def test_dropout_acts_in_training_alone(name, n_calls):
    """On the embeddings (T5: and on final states), and on each branch of the two blocks."""
    plain = awake(toy(n_layer=2, **VARIANTS[name]))
    model, calls = awake(toy(n_layer=2, dropout=0.5, **VARIANTS[name])), []
    assert torch.equal(model(PROMPT, RESPONSE), plain(PROMPT, RESPONSE))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda m, x, y: calls.append(m.p))
    assert not torch.equal(model.train()(PROMPT, RESPONSE), model(PROMPT, RESPONSE))
    assert calls == [0.5] * n_calls * 2
    if name == "gpt":                       # its positions are dropped along with the embeddings
        model.h, model.ln_f = nn.ModuleList(), nn.Identity()
        embedded = model.run_blocks(torch.zeros(1, 9, 32), None, torch.arange(9)[None])
        assert 0.3 < (embedded == 0).float().mean() < 0.7


def test_texts_up_to_the_block_and_no_longer(model):
    """The last token is never read. T5's block holds a prompt and, beside it, a response."""
    room = 33 if model.config.arch == "t5" else 28
    response = torch.randint(0, 11, (1, room + 1))
    assert model(PROMPT[1:2], response[:, :room]).isfinite().all()
    assert model.generate(PROMPT, room)[0].size(0) == 3
    for too_long in (lambda: model(PROMPT[1:2], response),
                     lambda: model(torch.full((1, 40), 3), RESPONSE[:1]),
                     lambda: model.generate(PROMPT, room + 1)):
        refuses("tokens do not fit this model's block of 32 tokens", too_long)


@pytest.mark.parametrize("arch", ["gpt", "palm", "llama"])
def test_pads_need_no_room_in_the_block(arch):
    """A batch of a long prompt and a long response is wider than the block; its rows are not."""
    model = awake(toy(arch=arch, block_size=9))
    prompt, response = ids([1] * 7, [PAD] * 6 + [2]), ids([3, EOS] + [PAD] * 6, [5] * 7 + [EOS])
    together = logprobs(model, prompt, response)
    close(together[:1, :2], logprobs(model, prompt[:1], response[:1, :2]))
    close(together[1:], logprobs(model, prompt[1:, -1:], response[1:]))
    response[0, :4] = 5                                         # one row of 7 + 4
    refuses("11 tokens do not fit", logprobs, model, prompt, response)


def test_tensors_stay_on_one_device(model):
    """The device `meta` takes the way of a GPU, computes nothing, and refuses to mix."""
    logits = model.to("meta")(PROMPT.to("meta"), RESPONSE.to("meta"))
    assert logits.shape == (3, 4, 12) and logits.device.type == "meta"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_new_model_knows_nothing(name):
    """It costs about ln V a token. T5's logits start with a variance of 1, which costs 1/2 more."""
    torch.manual_seed(0)
    config = ModelConfig(**VARIANTS[name], vocab_size=1000, decoder_start_token_id=0)
    model = net.build_model(config)
    nll = -logprobs(model, *torch.randint(2, 1000, (2, 16, 20))).mean().item()
    assert nll == pytest.approx(math.log(1000) + 0.5 * (name[:2] == "t5"), abs=0.25)
    head = RewardModel(model).scalar_head                   # of 128 inputs
    assert head.weight.std().item() == pytest.approx(129 ** -0.5, rel=0.3) and not head.bias.any()
    assert any("bias" in key for key in model.state_dict()) == (name in ("gpt", "qwen2"))
    stds = {key: p.std().item() for key, p in model.named_parameters() if p.dim() == 2}
    if name == "gpt":       # four layers add to the residual stream twice each
        assert stds["h.0.attn.c_attn.weight"] == pytest.approx(0.02, rel=0.05)
        assert stds["h.0.attn.c_proj.weight"] == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
        assert not model.h[0].mlp.c_fc.bias.any()
    if name == "palm":
        small = [stds["h.0.attn_proj.weight"], stds["h.3.mlp_proj.weight"]]
        assert small == pytest.approx([0.02 / math.sqrt(8)] * 2, rel=0.05)
    if name == "t5-v1.1":
        assert stds["encoder.h.0.attn.q.weight"] == pytest.approx((128 * 32) ** -0.5, rel=0.05)

# -----------------------------------------------------------------------------
# parts, against hand numbers and straight lines

def test_palm_is_its_equations():
    """y = x + MLP(LN(x)) + Attention(LN(x)), one position and one head at a time."""
    model = awake(toy(arch="palm", n_layer=2, n_head=2, head_size=6, n_inner=40))
    tokens = [3, 4, 5, 6, 7]
    x = [model.wte.weight[token] for token in tokens]

    def norm(x, gain):
        return (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5) * gain

    def turn(x, n):         # rotary positions as complex numbers
        z = torch.complex(x[:3], x[3:]) * torch.exp(1j * n * 10000 ** (-2 * torch.arange(3) / 6))
        return torch.cat([z.real, z.imag])

    for block in model.h:
        Wq, Wk, Wv, Wgate, Wvalue = block.c_fused.weight.split([12, 6, 6, 40, 40])
        y = [norm(xn, block.ln.weight) for xn in x]
        keys = [turn(Wk @ yn, n) for n, yn in enumerate(y)]
        values = [Wv @ yn for yn in y]
        for n, yn in enumerate(y):
            heads = []
            for q in (Wq @ yn).split(6):
                att = torch.stack([turn(q, n) @ key / math.sqrt(6) for key in keys[:n + 1]])
                heads.append(att.softmax(dim=0) @ torch.stack(values[:n + 1]))
            gate = Wgate @ yn
            mlp = block.mlp_proj.weight @ (gate * torch.sigmoid(gate) * (Wvalue @ yn))
            x[n] = x[n] + mlp + block.attn_proj.weight @ torch.cat(heads)
    logits = torch.stack([model.wte.weight @ norm(xn, model.ln_f.weight) for xn in x])
    close(model(ids(tokens[:2]), ids([*tokens[2:], 9]))[0], logits[1:], atol=1e-4)

# -----------------------------------------------------------------------------
# sampling and log-probs

def test_cached_generation_is_the_full_pass_and_reads_each_token_once(model, monkeypatch):
    caches, new_cache = [], net.KVCache
    monkeypatch.setattr(net, "KVCache", lambda n: caches.append(new_cache(n)) or caches[0])
    short, _ = model.generate(PROMPT, 12, temperature=0)
    monkeypatch.undo()
    n_groups = {"palm": 1}.get(model.config.arch, model.config.n_kv_head)
    # no copy for each query head; a decoder's prompt has keys of its own
    capacity = 1 + 12 if model.config.arch == "t5" else 5 + 12
    assert caches[0].keys[1].shape[1:] == (n_groups, capacity, 8)
    widths = []     # of all inputs of linear layers
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda module, x, y: widths.append(x[0].size(-2)))
    model.config.eos_token_id = -1                              # no response ends
    long, _ = model.generate(PROMPT, 12, temperature=0)
    n_linear = sum(isinstance(layer, nn.Linear) for layer in model.modules())
    assert set(widths) <= {1, 3, 5}                             # a token, a head's batch, a prompt
    assert widths.count(5) <= n_linear and widths.count(1) <= 12 * n_linear
    slow = PROMPT.new_empty(3, 0)
    for _ in range(12):
        logits = model(PROMPT, F.pad(slow, (0, 1)))[:, -1]
        slow = torch.cat([slow, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(long, slow)
    mask = short != PAD
    assert torch.equal(short[mask], long[:, :short.size(1)][mask])


def test_the_loop_of_a_gpu_writes_what_the_other_one_writes(model):
    """It keeps all rows and all positions; on a CPU nothing of it is recorded."""
    awake(model)
    how = dict(temperature=1.3, top_k=9, top_p=0.95)
    prompt = PROMPT.repeat(8, 1)
    response, chosen = model.generate(prompt, 12, rng=make_rng("cpu", 0), **how)
    cache = net.KVCache(5 + 12)
    with torch.no_grad():
        x = model.prefill(prompt, cache, 12)
        u = torch.rand(24, 12, generator=make_rng("cpu", 0))
        longer, their_chosen = net.sample_on_gpu(model, cache, x, u, *how.values())
    R = response.size(1)
    assert torch.equal(longer[:, :R], response) and (longer[:, R:] == PAD).all()
    close(their_chosen[:, :R], chosen, atol=1e-4)


@pytest.mark.parametrize("how", [{}, dict(temperature=0.7), dict(top_k=5), dict(temperature=0),
                                 dict(temperature=1.3, top_p=0.8)])
def test_generate_returns_the_logprobs_of_what_it_drew(model, monkeypatch, how):
    eos = model.generate(PROMPT[:1], 1, temperature=0)[0].item()        # a frequent token
    model.config.eos_token_id = eos
    prompt, step, sizes = PROMPT.repeat(20, 1), model.step, []
    monkeypatch.setattr(model, "step", lambda x, cache: sizes.append(len(x)) or step(x, cache))
    response, logp = model.generate(prompt, 8, rng=torch.Generator().manual_seed(0), **how)
    # Rows are left out as they end: never more than a third of what is computed has ended.
    going = [(response[:, t] != PAD).sum().item() for t in range(1, response.size(1))]
    assert all(n <= size <= n / 0.75 for n, size in zip(going, sizes[-len(going):], strict=True))
    # A response depends on its prompt and its own random numbers, not on what stands beside it.
    other = prompt.clone()
    other[30:] = PROMPT[0]
    again, _ = model.generate(other, 8, rng=torch.Generator().manual_seed(0), **how)
    width = min(again.size(1), response.size(1))
    assert torch.equal(response[:30, :width], again[:30, :width])
    close(logp, logprobs(model, prompt, response, **how).detach())
    # The end token counts; pads follow it, and nothing else is a pad.
    is_eos = response == eos
    ended = is_eos.cumsum(dim=1) - is_eos.long() > 0
    assert torch.equal(response == PAD, ended) and ended.any()
    assert (logp[ended] == 0).all() and logp.isfinite().all()
    alone, _ = model.generate(PROMPT[:1], 8, temperature=0)
    assert alone.tolist() == [[eos]]                            # stops when all have ended


def test_logprobs_are_the_log_softmax(model):
    logp = model(PROMPT, RESPONSE).log_softmax(dim=-1)
    found, cold = logprobs(model, PROMPT, RESPONSE), logprobs(model, PROMPT, RESPONSE, 0.5)
    assert not found[~MASK].any() and not cold[~MASK].any()
    for i, t in MASK.nonzero().tolist():
        close(found[i, t], logp[i, t, RESPONSE[i, t]])
        close(cold[i, t], (2 * logp[i, t]).log_softmax(dim=-1)[RESPONSE[i, t]])
    half = torch.randn(3, 4, 12).bfloat16()                     # as they come from autocast
    found = net.logprobs_from_logits(half, RESPONSE, 0.7)
    assert found.dtype == torch.float32
    close(found, net.logprobs_from_logits(half.float(), RESPONSE, 0.7), atol=0)


P = torch.tensor([0.15, 0.5, 0.05, 0.3])


@pytest.mark.parametrize("how, expected", [
    (dict(top_p=0.9), torch.tensor([0.15, 0.5, 0, 0.3]) / 0.95),
    (dict(top_p=0.5), torch.tensor([0, 1.0, 0, 0])),
    (dict(top_k=2), torch.tensor([0, 0.5, 0, 0.3]) / 0.8),
    (dict(top_k=9), P),
    (dict(top_k=2, top_p=0.6), torch.tensor([0, 1.0, 0, 0])),       # 0.5 / 0.8 is enough
    (dict(temperature=0.5), P ** 2 / (P ** 2).sum()),
    (dict(temperature=1e-3), torch.tensor([0, 1.0, 0, 0])),         # the smallest of the commands
    (dict(temperature=0.5, top_p=0.9), torch.tensor([0, 0.25, 0, 0.09]) / 0.34),
    (dict(temperature=0), torch.tensor([0, 1.0, 0, 0]))])
def test_sampling_by_hand(how, expected):
    logits = P.log() + 3
    close(net.sampling_logprobs(logits.repeat(2, 1), **how).exp(), expected.repeat(2, 1))
    greedy = net.sampling_logprobs(torch.tensor([0.0, 1e-4]), temperature=0).exp()
    assert greedy.tolist() == [0, 1]


def test_sample_never_draws_a_token_of_probability_0():
    logp = torch.tensor([[-math.inf, 0.5, -math.inf, 0.5, -math.inf]]).log_softmax(dim=-1)
    for u in (0.0, 0.5, 1 - 2 ** -24):      # the smallest and the largest that rand() gives
        assert net.sample(logp, torch.tensor([u])).item() in (1, 3)


def test_generate_draws_from_the_exact_distribution():
    model, n = awake(toy(arch="t5", vocab_size=4, eos_token_id=1)), 20_000
    prompt, rng = ids([2, 3]), torch.Generator().manual_seed(0)
    response, _ = model.generate(prompt.expand(n, -1), 2, rng=rng)
    for a in range(4):
        for b in [4] if a == 1 else range(4):                   # only a pad, 4, follows the end
            p = logprobs(model, prompt, ids([a, b])).sum().exp().item()
            frequency = (response == ids([a, b])).all(dim=1).float().mean().item()
            assert frequency == pytest.approx(p, abs=4 * math.sqrt(p / n))

# -----------------------------------------------------------------------------
# the reward model

def test_a_score_is_read_after_the_end_token_and_adds_the_likelihood(model):
    reward_model = RewardModel(model, likelihood=0.25)
    scores, likelihood = reward_model(PROMPT, RESPONSE), logprobs(model, PROMPT, RESPONSE).sum(1)
    x = model.hidden(PROMPT, F.pad(RESPONSE, (0, 1), value=PAD))        # (3, 5, C)
    for i, length in enumerate([3, 4, 2]):                      # with the end token
        raw = reward_model.scalar_head(x[i, length])[0]
        close(scores[i], raw + 0.25 * likelihood[i])
    scores.sum().backward()                                     # all of it is trained
    close(reward_model.likelihood.grad, likelihood.sum())
    assert reward_model.scalar_head.bias.grad.item() == 3
    assert reward_model.scalar_head.weight.grad.any() and model.wte.weight.grad.any()


def test_normalize_gives_mean_0_and_deviation_1():
    reward_model = RewardModel(awake(toy()))
    reward_model.normalize(torch.tensor([1.0, 4.0]))
    for _ in range(2):                                          # once more changes nothing
        reward_model.normalize(reward_model(PROMPT, RESPONSE))
        scores = reward_model(PROMPT, RESPONSE)
        close(scores.mean(), torch.tensor(0.0))
        close(scores.std(correction=0), torch.tensor(1.0))
    reward_model.normalize(torch.ones(2))           # of a policy that always writes the same
    assert reward_model(PROMPT, RESPONSE).isfinite().all()

# -----------------------------------------------------------------------------
# load and save

@pytest.mark.parametrize("wrap, load", [
    (lambda model: model, net.load_model), (RewardModel, net.load_reward_model),
    (lambda model: RewardModel(model, likelihood=0.5), net.load_reward_model)])
def test_save_and_load(model, wrap, load, tmp_path, tok):
    model = wrap(model).train()
    if isinstance(model, RewardModel):
        model.normalize(torch.tensor([1.0, 4.0]))
    net.save_model(tmp_path / "ckpt.pt", model, tok, accuracy=0.9)
    again = load(tmp_path / "ckpt.pt")
    assert torch.equal(again(PROMPT, RESPONSE), model.eval()(PROMPT, RESPONSE))
    trunk = getattr(again, "model", again)
    assert (trunk.tokenizer, trunk.tokenizer_fingerprint) == ("puns", tok.fingerprint)
    assert again.config == model.config and not trunk.training
    assert net.read_checkpoint(tmp_path / "ckpt.pt")["accuracy"] == 0.9


def test_a_bad_checkpoint_is_one_sentence(tmp_path, tok):
    good = tmp_path / "good.pt"
    net.save_model(good, toy(), tok)
    net.save_model(tmp_path / "reward.pt", RewardModel(toy()), tok)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:-500])
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    torch.save(ModelConfig(), tmp_path / "pickle.pt")           # would run code to be loaded
    saved = torch.load(good, weights_only=True)
    torch.save({"kind": saved["kind"]}, tmp_path / "partial.pt")
    torch.save(saved | {"config": saved["config"] | {"n_wings": 2}}, tmp_path / "newer.pt")
    for name, reason in {"reward.pt": "holds a reward model; a language model is needed here",
                         "cut.pt": "is damaged or is not a checkpoint of wordplay",
                         "pickle.pt": "is damaged or is not a checkpoint of wordplay",
                         "foreign.pt": "is not a checkpoint of this version of wordplay",
                         "partial.pt": "is not a checkpoint of this version of wordplay",
                         "newer.pt": "is not a checkpoint of this version of wordplay",
                         "": "is a folder; name the checkpoint in it: .*ckpt.pt",
                         "runs/sft/ckpt.pt": r"does not exist; make it with: python sft\.py$",
                         "runs/nonsense/ckpt.pt": "does not exist; check the path$"}.items():
        path = tmp_path / name
        refuses(f"^{re.escape(str(path))}.*{reason}", net.load_model, path)
    refuses("holds a language model; a reward model is needed here", net.load_reward_model, good)


@pytest.mark.parametrize("made, save, load", [
    (toy, net.save_model, net.load_model),
    (lambda: RewardModel(toy()), net.save_model, net.load_reward_model),
    (conftest.disc_of, save_discriminator, load_discriminator)])
def test_weights_that_do_not_fit_are_one_sentence(tmp_path, tok, made, save, load):
    path = tmp_path / "ckpt.pt"
    save(path, made(), tok)
    load(path)
    whole = torch.load(path, weights_only=True)
    for weights in conftest.misfits(whole["model"]):
        torch.save(whole | {"model": weights}, path)
        with pytest.raises(InputError, match=r"ckpt.pt: 1 of its weights do not fit its model, "
                                             r"such as [a-z_.]+; train it again$"):
            load(path)


def test_the_comparison_with_peers_runs(monkeypatch, capsys):
    """make bench, with next to nothing to do."""
    tiny = (dict(vocab_size=64, n_layer=1, n_head=2, n_embd=16), (8, 8), (32, 4, 4))
    for name, value in dict(CPU=[tiny], SECONDS=0, LEAST=1).items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "setup", lambda _: (torch.device("cpu"), off))
    bench.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if " 1 x 16 " in line]
    assert [line[:5] for line in lines if "wordplay  " in line] == ["train", "write", "ppo  "]
    assert all(float(line.split()[-1]) == 1 for line in lines if "wordplay  " in line)


def test_no_pickle_is_ever_loaded():
    """Every torch.load has weights_only=True, and no module that unpickles is imported."""
    paths = [*conftest.ROOT.glob("*.py"), *conftest.ROOT.glob("real/*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    loads = re.findall(r"torch\.load\(.*", code)
    assert len(loads) == 2 and all("weights_only=True" in line for line in loads)
    assert not re.search(r"^\s*(import|from) (pickle|dill|joblib|shelve|marshal)", code, re.M)
