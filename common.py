"""
The plumbing that every stage shares: options, errors, several processes, device, and the folder of a run.

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
import torch.distributed as dist
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
    finally:
        if world_size() > 1:
            dist.destroy_process_group()


@dataclasses.dataclass
class Options:
    """The options that all stages have."""
    seed: int = 1337            # of everything random
    device: str = ""            # cuda, mps or cpu; '' takes the best that is there
    dtype: str = ""             # float32 or bfloat16 (autocast, weights stay float32); '' is bfloat16 where the hardware has it


@dataclasses.dataclass
class TrainOptions(Options):
    """What of a language model learns, and how: see lora.prepare()."""
    lora: int = 0               # train adapters of this rank alone (lora.py); 0 trains the weights themselves
    trainable: str = "all"      # all weights, or last:k, those of the last k blocks
    checkpointing: bool = False     # compute activations again in the backward pass: less memory, more time, same numbers

# -----------------------------------------------------------------------------
# several processes: torchrun --nproc_per_node=2 sft.py
#
# All ranks start from the same weights, draw the same batches and the same noise, and so hold the same numbers; only what is expensive is
# dealt out: each rank computes the loss of its rows of a batch, and samples and scores its rows of a rollout. The curves are those of one
# process with the same --batch_size (dropout aside). Only rank 0 prints and writes.
#
# There is no DistributedDataParallel around the model: it hooks into forward() alone, and a model here is entered by hidden(), head() and
# generate(). Averaging the gradients after the backward pass is one line, and costs what DDP would hide: it does not overlap with that pass.

def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world_size() > 1 else 0


def join_processes(device):
    """Meets the other processes that torchrun started, if it did. Returns the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--nproc_per_node is the number of GPUs, and this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group()       # nccl for tensors on a GPU, gloo for those on the CPU
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def shard(x, even=True):
    """This rank's rows of a tensor or of a batch {field: tensor}: every n-th. even: equally many on each rank, as a mean of means needs."""
    if isinstance(x, dict):
        return {field: shard(rows, even) for field, rows in x.items()}
    if even and len(x) % world_size():
        raise InputError(f"a batch of {len(x)} cannot be dealt out to {world_size()} processes: choose a multiple")
    return x[rank()::world_size()]


def gather(rows, n):
    """The n rows of all ranks, in the order that they were in before shard()."""
    if world_size() == 1:
        return rows
    together = rows.new_zeros(n, *rows.shape[1:])
    together[rank()::world_size()] = rows
    dist.all_reduce(together)
    return together


def all_mean(x):
    """The mean of a tensor over the ranks. A sum over all rows by a count over all rows is all_mean(sum / all_mean(count))."""
    if world_size() == 1:
        return x
    x = x.detach().clone() if x.is_floating_point() else x.float()
    dist.all_reduce(x)
    return x / world_size()


def average_gradients(model):
    if world_size() > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        nn.utils.vector_to_parameters(all_mean(nn.utils.parameters_to_vector(gradients)), gradients)      # all in one message

# -----------------------------------------------------------------------------
# device and seed

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
    device = join_processes(pick_device(config.device))
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

# -----------------------------------------------------------------------------
# files

@contextlib.contextmanager
def replacing(path):
    """Gives a temporary path; when the block ends well, it takes the place of `path`. So no file is ever half-written."""
    if rank() > 0:      # rank 0 writes the same
        yield Path(os.devnull)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)


def bar(items, what, total=None, least=0):
    """The items behind a progress bar, if there are at least `least` of them: whatever takes longer than two seconds shows one."""
    return tqdm(items, desc=f"{what:13}", total=total, leave=False, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30,
                disable=rank() > 0 or (total is not None and total < least))


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
        self.state_path = self.dir / "state.pt"
        self.metrics_path, self.samples_path = (self.dir / name if rank() == 0 else Path(os.devnull) for name in ("metrics.jsonl", "samples.txt"))
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
                  mininterval=0.5 if sys.stderr.isatty() else 30, smoothing=0.1, disable=rank() > 0) as self.bar:
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
        if rank() == 0:
            os.truncate(path, size)

    def log(self, **metrics):
        """One row of metrics.jsonl, means over the ranks; numbers that are not finite stop the run, since nothing good follows them."""
        if world_size() > 1:
            metrics = dict(zip(metrics, all_mean(torch.tensor(list(metrics.values()), dtype=torch.float64)).tolist(), strict=True))
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
        if rank() == 0:
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
