"""
The plumbing that every stage shares: options, errors, device, optimizer, schedule, and the folder of a run.

A run writes runs/<stage>/ and nothing else:
    config.json      the options it ran with
    metrics.jsonl    one row a log line
    samples.txt      what the model wrote, as training went on
    curves.png       the metrics, drawn
    state.pt         while it trains: all that is needed to go on after a stop
    ckpt.pt          when it is done: the model
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import tyro
from tqdm import tqdm


class InputError(ValueError):
    """Something in the user's input is wrong. The message says what, where, and what to do."""


def run(main, **subcommands):
    """Call main() as a program: bad input is one clear sentence and exit code 2, Ctrl-C is no traceback either.

    subcommands: `python file.py NAME ...` calls the one of that name instead, its arguments are the options."""
    try:
        name = sys.argv[1] if len(sys.argv) > 1 else ""
        if name in subcommands:
            tyro.cli(subcommands[name], prog=f"{Path(sys.argv[0]).name} {name}", args=sys.argv[2:])
        else:
            main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last saved state", file=sys.stderr)
        sys.exit(130)


@dataclasses.dataclass
class Options:
    """The options that all stages have."""
    seed: int = 1337            # of everything random
    device: str = ""            # cuda, mps or cpu; '' takes the best that is there
    dtype: str = ""             # float32 or bfloat16 (autocast, weights stay float32); '' is bfloat16 where the hardware has it

# -----------------------------------------------------------------------------
# device, seed, optimizer, schedule

def pick_device(name=""):
    """'' is cuda, else mps, else cpu."""
    if name:
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def setup(config):
    """Seeds torch and returns (device, autocast): `with autocast():` computes in the dtype that the config asks for."""
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    if config.dtype not in ("", "float32", "bfloat16"):
        raise InputError(f"--dtype is float32 or bfloat16, not '{config.dtype}'")
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    bf16 = config.dtype == "bfloat16" or (not config.dtype and has_bf16)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def sampler(device, seed):
    """The random generator that sampling draws from, apart from torch's own."""
    return torch.Generator(device).manual_seed(seed)


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
    """zero_grad > backward > clip > step, in the only order that works. Returns the gradient's norm before the clip."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    optimizer.step()
    return norm.item()

# -----------------------------------------------------------------------------
# files

@contextlib.contextmanager
def replacing(path):
    """Gives a temporary path; when the block ends well, it takes the place of `path`. So no file is ever half-written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)


def bar(items, what, total=None, least=0):
    """The items behind a progress bar, if there are at least `least` of them: whatever takes longer than two seconds shows one."""
    return tqdm(items, desc=f"{what:13}", total=total, leave=False, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30,
                disable=total is not None and total < least)


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


class Run:
    """One training run: its folder, its progress bar, and how it goes on after a stop.

        run = Run("ppo", config, config.out_dir, config.max_steps)
        for step in run.steps(model=model, optimizer=optimizer, generator=generator):
            ...
            run.log(loss=..., kl=...)
        run.finish()
    """

    def __init__(self, stage, config, steps):
        self.stage, self.total, self.dir = stage, steps, Path(config.out_dir)
        self.config = json.loads(json.dumps(dataclasses.asdict(config)))
        self.dir.mkdir(parents=True, exist_ok=True)
        self.state_path, self.metrics_path, self.samples_path = (
            self.dir / name for name in ("state.pt", "metrics.jsonl", "samples.txt"))
        self.step, self.seconds, self.started = 0, 0.0, time.time()

    def steps(self, save_interval, **parts):
        """Yields step numbers, from the saved state if one with the same options lies in the folder, else from 0.

        parts: what a state consists of, everything with a state_dict(), tensors, and random generators. Saved every `save_interval`."""
        self.parts, state = parts, None
        if self.state_path.exists():
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
            if state["config"] != self.config:
                print(f"{self.stage}: the state in {self.dir} was made with other options: starting anew")
                state = None
        if state:
            self.step, self.seconds = state["step"], state["seconds"]
            torch.set_rng_state(state["rng"])
            for name, part in parts.items():
                if isinstance(part, torch.Tensor):
                    part.copy_(state[name])
                else:
                    part.set_state(state[name]) if isinstance(part, torch.Generator) else part.load_state_dict(state[name])
            self._cut(self.metrics_path, state["metrics_bytes"])
            self._cut(self.samples_path, state["samples_bytes"])
        else:
            self.metrics_path.write_text("")
            self.samples_path.write_text("")
        with replacing(self.dir / "config.json") as path:
            path.write_text(json.dumps(self.config, indent=1) + "\n")
        self.started = time.time() - self.seconds
        with tqdm(total=self.total, initial=self.step, desc=f"{self.stage:13}", unit="step", dynamic_ncols=True,
                  mininterval=0.5 if sys.stderr.isatty() else 30, smoothing=0.1) as self.bar:
            while self.step < self.total:
                yield self.step
                self.step += 1
                self.bar.update()
                if self.step % save_interval == 0:
                    self._save()

    def _save(self):
        state = {name: part if isinstance(part, torch.Tensor) else part.get_state() if isinstance(part, torch.Generator)
                 else part.state_dict() for name, part in self.parts.items()}
        state |= dict(config=self.config, step=self.step, seconds=time.time() - self.started, rng=torch.get_rng_state(),
                      metrics_bytes=self.metrics_path.stat().st_size, samples_bytes=self.samples_path.stat().st_size)
        with replacing(self.state_path) as path:
            torch.save(state, path)

    @staticmethod
    def _cut(path, size):
        with path.open("r+b") as file:
            file.truncate(size)

    def log(self, **metrics):
        """One row of metrics.jsonl; numbers that are not finite stop the run, since nothing good follows them."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise InputError(f"{self.stage}: {name} is {value} at step {self.step + 1}: try a lower --lr, or --dtype float32")
        row = {"step": self.step + 1} | {name: round(value, 6) for name, value in metrics.items()}
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(row | {"seconds": round(time.time() - self.started, 1)}) + "\n")
        self.bar.set_postfix_str("  ".join(f"{name} {value:.3g}" for name, value in list(metrics.items())[:5]))

    def write(self, text):
        """Prints a few lines above the progress bar and keeps them in samples.txt."""
        self.bar.write(text)
        with self.samples_path.open("a") as file:
            file.write(f"step {self.step + 1}\n{text}\n\n")

    def finish(self):
        """Draws the curves and removes the state: the run is done. Save the model before."""
        plot_curves(self.metrics_path, self.dir / "curves.png", self.stage)
        self.state_path.unlink(missing_ok=True)


def plot_curves(metrics_path, figure_path, title):
    """Every metric of metrics.jsonl over the steps, a small panel each."""
    from matplotlib.figure import Figure  # not pyplot's: that would change the backend of a notebook
    rows = read_jsonl(metrics_path)
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "seconds")))
    if not names:
        return
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(names):]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) < 40 else None)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    figure.supxlabel("step", fontsize=9)
    figure.suptitle(title)
    with replacing(figure_path) as path:
        figure.savefig(path, format="png", dpi=90)
