"""wordplay beside its peers: training, generation, PPO. Less than 5 minutes on a CPU or on a GPU.

    python tests/bench.py [NANOGPT]         or: make bench NANOGPT=folder

NANOGPT is the folder with nanoGPT's model.py; the other peers are transformers, and TRL up to 1.12,
the last one with PPO: pip install -e ".[bench]". What is missing is left out and named. All run in
this process and in turn, round by round, since no machine is equally fast at all times: read the
ratios, the medians of the rounds' own ratios.
"""

import contextlib
import importlib.util
import io
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo
from common import Options, make_rng, setup, supports_bf16
from model import ModelConfig, RewardModel, build_model, logprobs
from optim import Muon, adamw, cuda_graph, optimizer_step

# (the model; texts to train on and tokens of each; prompts, tokens in, tokens out)
CPU = [(dict(vocab_size=2048, n_layer=4, n_head=4, n_embd=128), (64, 32), (64, 8, 32)),
       (dict(vocab_size=8192, n_layer=6, n_head=6, n_embd=384), (64, 32), (64, 8, 32))]
GPU = [(dict(vocab_size=4096, n_layer=8, n_head=8, n_embd=512), (512, 16), (1024, 5, 32))]
SECONDS, LEAST, MOST = 25, 3, 15        # of a comparison; how many rounds it has


def load_module(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # torch.compile looks there
    spec.loader.exec_module(module)
    return module


def seconds(function):
    """How long a call takes, with all that it starts on a GPU. What it prints is dropped."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(work, sizes, n, functions):
    """Calls {name: function} round by round, then prints a line for each: its time, n a second,
    and its time over that of wordplay. n: what a call makes, such as tokens."""
    start = time.perf_counter() + sum(seconds(function) for function in functions.values())
    times = {name: [] for name in functions}
    for i in range(MOST):
        if i < LEAST or time.perf_counter() - start < SECONDS:
            for name, function in functions.items():
                times[name].append(seconds(function))
    for name, rounds in times.items():
        ratios = [t / ours for t, ours in zip(rounds, times["wordplay"], strict=True)]
        median = statistics.median(rounds)
        print(f"{work:7}{sizes['n_layer']} x {sizes['n_embd']}  {name:24}{1e3 * median:9.1f} ms"
              f"{n / median:11,.0f} /s{statistics.median(ratios):8.2f}", flush=True)


def ours_of(sizes, device):
    # No response ends by itself: everybody writes as many tokens.
    return build_model(ModelConfig(**sizes, eos_token_id=-1, block_size=64)).to(device).eval()


def theirs_of(hf, kind, sizes, device):
    config = hf.GPT2Config(**sizes, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, num_labels=1,
                           attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return getattr(hf, kind)(config).to(device).eval()


def training(sizes, shape, nano, device, autocast):
    """{name: a step on whole texts}: forward, backward, clip, update."""
    tokens, functions = torch.randint(0, sizes["vocab_size"], shape, device=device), {}

    def our_loss(model):
        return -logprobs(model, tokens[:, :1], tokens[:, 1:]).mean()

    def their_loss(model):
        return model(tokens[:, :-1], tokens[:, 1:].contiguous())[1]

    def step_of(model, make_optimizer, loss_of):
        optimizer = make_optimizer(model, 1e-3)

        def step():
            with autocast():
                loss = loss_of(model)
            return optimizer_step(loss, model, optimizer, 1.0)
        return step

    for suffix in ("", ", compiled") if device.type == "cuda" else ("",):
        ours, theirs = (torch.compile(f) if suffix else f for f in (our_loss, their_loss))
        for name, make_optimizer in (("wordplay", adamw), ("wordplay, Muon", Muon)):
            step = step_of(ours_of(sizes, device), make_optimizer, ours)
            functions[name + suffix] = cuda_graph(step, device)         # as in the stages
        if nano:
            config = nano.GPTConfig(**sizes, block_size=64, dropout=0.0)
            functions["nanoGPT" + suffix] = step_of(nano.GPT(config).to(device), adamw, theirs)
    return functions


def generation(sizes, shape, hf, device):
    """{name: sampling as many tokens for every prompt}"""
    prompt = torch.randint(1, sizes["vocab_size"], shape[:2], device=device)
    ours, rng, R = ours_of(sizes, device), make_rng(device, 0), shape[2]
    functions = {"wordplay": lambda: ours.generate(prompt, R, rng=rng)}
    if hf:
        theirs = theirs_of(hf, "GPT2LMHeadModel", sizes, device)
        how = dict(max_new_tokens=R, min_new_tokens=R, do_sample=True, top_k=0)
        functions["transformers"] = lambda: theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), **how)
    return functions


def our_ppo(sizes, shape, device, autocast):
    """A PPO iteration: a rollout, then 4 epochs of 4 minibatches."""
    B, P, R = shape
    policy, reference, trunk = (ours_of(sizes, device) for _ in range(3))
    reward_model, rng = RewardModel(trunk).to(device), make_rng(device, 0)
    value_head = nn.Linear(sizes["n_embd"], 1, device=device)
    optimizer = adamw(nn.ModuleList([policy, value_head]), 1e-5)
    config = ppo.Config(batch_size=B, minibatch_size=B // 4, ppo_epochs=4, max_new_tokens=R)
    learn = ppo.minibatch_step(policy, value_head, optimizer, config, autocast)

    def iteration():
        prompt = torch.randint(1, sizes["vocab_size"], (B, P), device=device)
        with autocast():
            rollout = ppo.make_rollout(policy, value_head, reference, reward_model, prompt, config,
                                       rng)
        advantages, returns = ppo.compute_advantages(rollout, config, config.kl_coef)
        ppo.update(learn, rollout, advantages, returns, config)
    return iteration


def their_ppo(sizes, shape, trl, hf, device):
    """The same by TRL: train() with as many episodes as one iteration has."""
    import datasets
    from tokenizers import Tokenizer, models
    B, P, R = shape
    words = models.WordLevel({str(i): i for i in range(sizes["vocab_size"])}, unk_token="0")
    tok = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0",
                                     eos_token="0", padding_side="left")
    policy, scorer = "GPT2LMHeadModel", "GPT2ForSequenceClassification"
    model, reference, reward_model, critic = (
        theirs_of(hf, kind, sizes, device) for kind in (policy, policy, scorer, scorer))
    args = trl.PPOConfig(
        output_dir="runs/bench", per_device_train_batch_size=B, gradient_accumulation_steps=1,
        num_mini_batches=4, num_ppo_epochs=4, total_episodes=B, response_length=R,
        local_rollout_forward_batch_size=B, num_sample_generations=0, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=device.type == "cpu",
        bf16=supports_bf16(device))
    prompts = torch.randint(1, sizes["vocab_size"], (B, P)).tolist()
    data = datasets.Dataset.from_dict({"input_ids": prompts})
    return trl.PPOTrainer(args, tok, model, reference, reward_model, data, critic,
                          hf.DataCollatorWithPadding(tok)).train


def main(folder=""):
    device, autocast = setup(Options())
    is_gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name() if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, bfloat16 {supports_bf16(device)}; tokens or "
          "episodes a second; the last column is the time over that of wordplay")
    nano = load_module("nanogpt", f"{folder}/model.py") if folder else None
    peers = {"nanoGPT": nano, "transformers": None, "trl.experimental.ppo": None}
    for name in list(peers)[1:]:
        with contextlib.suppress(ImportError):
            peers[name] = importlib.import_module(name)
    print("left out:", ", ".join(name for name in peers if not peers[name]) or "none")
    hf, trl = peers["transformers"], peers["trl.experimental.ppo"]
    for sizes, texts, shape in GPU if is_gpu else CPU:
        in_turn("train", sizes, texts[0] * texts[1], training(sizes, texts, nano, device, autocast))
        with autocast():
            in_turn("write", sizes, shape[0] * shape[2], generation(sizes, shape, hf, device))
    # the smaller model alone, for TRL takes its time
    sizes, _, shape = GPU[0] if is_gpu else CPU[0]
    functions = {"wordplay": our_ppo(sizes, shape, device, autocast)}
    if hf and trl:
        functions["TRL"] = their_ppo(sizes, shape, trl, hf, device)
    in_turn("ppo", sizes, shape[0], functions)


if __name__ == "__main__":
    main(*sys.argv[1:2])
