"""
The plumbing that every stage shares: options, errors, progress, processes, and the folder of a run.

A run writes runs/<stage>/ and nothing else:
    config.json      the options it ran with
    metrics.jsonl    one row a log line
    samples.txt      what the model wrote as training went on
    curves.png       the metrics, drawn
    state.pt         while it trains: everything needed to resume after a stop
    ckpt.pt          when it is done: the model
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm


class InputError(ValueError):
    """Something in the user's input is wrong. The message says what, where, and what to do."""


def command_line(main):
    """Calls main() as a program: bad input prints one sentence and exits with code 2.

    Ctrl-C exits without a traceback, and the same command resumes from the last saved state."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A console that cannot show a character shows its escape instead of stopping the run.
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except InputError as error:
        sys.exit(_report(error, 2))
    except BrokenPipeError:
        # The reader of a pipe (head, less) has left. Nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_report(f"{where}{error.strerror or error}", 2))
    except KeyboardInterrupt:
        sys.exit(_report("stopped; the same command resumes from the last saved state", 130))
    finally:
        if world_size() > 1:
            dist.destroy_process_group()


def _report(message, code):
    print(f"{'error: ' if code == 2 else ''}{message}", file=sys.stderr)
    return code


@dataclasses.dataclass
class Options:
    """The options that every stage has."""
    seed: int = 1337            # of everything random
    device: str = ""            # cuda, mps or cpu; '' is cuda, else mps, else cpu
    dtype: str = ""             # float32 or bfloat16 (autocast); '' is bfloat16 where supported


@dataclasses.dataclass
class TrainOptions(Options):
    """Which parameters of a language model are trained, and how; see lora.py."""
    lora: int = 0               # rank of the adapters to train; 0 trains the weights themselves
    trainable: str = "all"      # all weights, or last:k for those of the last k blocks
    checkpointing: bool = False     # recompute activations in the backward pass to save memory

# -----------------------------------------------------------------------------
# several processes: torchrun --nproc_per_node=2 sft.py
#
# Every process starts from the same weights and trains on records of its own (data.Batches),
# batch_size of them a step. The gradients are averaged before each step (optim.optimizer_step),
# so the weights stay equal. Logged numbers are means over the processes; only rank 0 writes.

def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world_size() > 1 else 0


def join_processes(device):
    """Joins the other processes if torchrun started this one. Returns the device to use."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"this machine has {torch.cuda.device_count()} GPUs: "
                             "start at most as many processes (--nproc_per_node)")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group()       # nccl for tensors on a GPU, gloo for those on the CPU
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def average_over_processes(x):
    """The mean of a tensor over all processes. Any shape -> the same shape."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world_size()


def agreed(flag):
    """True if the flag is True in any process: all of them must take the same steps."""
    return average_over_processes(torch.tensor(float(flag))).item() > 0


def average_gradients(model):
    """Replaces each gradient by its mean over the processes, all of them in one message."""
    if world_size() > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        together = nn.utils.parameters_to_vector(gradients)
        nn.utils.vector_to_parameters(average_over_processes(together), gradients)

# -----------------------------------------------------------------------------
# device and seed

def pick_device(name=""):
    """The device of that name; '' is cuda, else mps, else cpu. Raises InputError."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if not name:
        name = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    kind = name.partition(":")[0]
    if kind not in ("cuda", "mps", "cpu"):
        raise InputError(f"--device is cuda, mps or cpu, not '{name}'")
    if (kind == "cuda" and not has_cuda) or (kind == "mps" and not has_mps):
        raise InputError(f"--device {name}: torch finds no such device here; leave the option out")
    return torch.device(name)


@functools.cache
def supports_bf16(device):
    """True if the hardware multiplies in bfloat16. Others emulate it, far slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return (device.type == "cpu" and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def setup(config):
    """Seeds torch. Returns (device, autocast): `with autocast():` computes in config.dtype."""
    if config.dtype not in ("", "float32", "bfloat16"):
        raise InputError(f"--dtype is float32 or bfloat16, not '{config.dtype}'")
    torch.manual_seed(config.seed)
    device = join_processes(pick_device(config.device))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    bf16 = config.dtype == "bfloat16" or (config.dtype == "" and supports_bf16(device))

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    return device, autocast


def make_rng(device, seed):
    """The random generator that sampling draws from; each process has its own."""
    return torch.Generator(device).manual_seed(seed + rank())

# -----------------------------------------------------------------------------
# files and progress

@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path that replaces `path` when the block ends without an error.

    So a file is either old or new, never half-written. Only rank 0 writes."""
    if rank() > 0:
        yield Path(os.devnull)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_jsonl(path):
    # Not splitlines(): that also splits at characters that JSON allows inside a text.
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def write_jsonl(path, rows):
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def progress_bar(items, name, total=None, at_least=0):
    """Yields the items behind a progress bar, which is shown from `at_least` items on."""
    few = total is not None and total < at_least
    return tqdm(items, desc=f"{name:13}", total=total, leave=False, dynamic_ncols=True,
                mininterval=_interval(), disable=few or rank() > 0)


def _interval():
    """Seconds between two updates of a progress bar: rare where each is a line of a log file."""
    return 0.5 if sys.stderr.isatty() else 30

# -----------------------------------------------------------------------------
# the folder of a run

class Run:
    """One training run: its folder, its progress bar, its metrics, and how it resumes.

        run = Run("ppo", config)
        for step in run.steps(config.sample_interval, policy=policy, optimizer=optimizer):
            ...
            run.log(loss=..., kl=...)
        save_model(run.folder / "ckpt.pt", ...)
        run.finish()
    """

    def __init__(self, stage, config):
        self.stage = stage
        self.max_steps = config.max_steps
        self.folder = Path(config.out_dir)
        init = getattr(config, "init", "")
        if init and Path(init).resolve() == (self.folder / "ckpt.pt").resolve():
            raise InputError(f"{init} would be written over by what starts from it: "
                             "choose another --out_dir")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = json.loads(json.dumps(dataclasses.asdict(config)))
        self.state_path = self.folder / "state.pt"
        log_folder = self.folder if rank() == 0 else None
        self.metrics_path = log_folder / "metrics.jsonl" if log_folder else Path(os.devnull)
        self.samples_path = log_folder / "samples.txt" if log_folder else Path(os.devnull)
        self.step, self.seconds, self.started = 0, 0.0, time.time()

    def steps(self, save_interval, **parts):
        """Yields step numbers: from the saved state if it has the same options, else from 0.

        parts: everything that a state consists of (models, optimizers, batches, generators,
        tensors). They are saved every `save_interval` steps."""
        self.parts = parts
        self._resume()
        with atomic_write(self.folder / "config.json") as path:
            path.write_text(json.dumps(self.config, indent=1) + "\n", encoding="utf-8")
        self.started = time.time() - self.seconds
        self.bar = tqdm(total=self.max_steps, initial=self.step, desc=f"{self.stage:13}",
                        unit="step", dynamic_ncols=True, mininterval=_interval(),
                        smoothing=0.1, disable=rank() > 0)
        with self.bar:
            while self.step < self.max_steps:
                yield self.step
                self.step += 1
                self.bar.update()
                if self.step % save_interval == 0:
                    self._save()

    def _save(self):
        state = {"parts": {name: _get_state(part) for name, part in self.parts.items()}}
        state["config"] = self.config
        state["step"] = self.step
        state["seconds"] = time.time() - self.started
        state["torch_rng"] = torch.get_rng_state()
        # Rows that are newer than the state are cut off on resume: they will be written again.
        state["metrics_bytes"] = self.metrics_path.stat().st_size
        state["samples_bytes"] = self.samples_path.stat().st_size
        with atomic_write(self.state_path) as path:
            torch.save(state, path)

    def _resume(self):
        state = None
        if self.state_path.exists():
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
            if state["config"] != self.config:
                print(f"{self.stage}: the state in {self.folder} was saved with other options: "
                      "starting over")
                state = None
        if state is None:
            self.metrics_path.write_text("", encoding="utf-8")
            self.samples_path.write_text("", encoding="utf-8")
            return
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["torch_rng"])
        for name, part in self.parts.items():
            _set_state(part, state["parts"][name])
        if rank() == 0:
            os.truncate(self.metrics_path, state["metrics_bytes"])
            os.truncate(self.samples_path, state["samples_bytes"])

    def log(self, **metrics):
        """Writes one row of metrics.jsonl, the means over all processes.

        Raises InputError if a number is not finite, since training cannot recover from it."""
        numbers = torch.tensor(list(metrics.values()), dtype=torch.float64)
        metrics = dict(zip(metrics, average_over_processes(numbers).tolist(), strict=True))
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise InputError(f"{self.stage}: {name} is {value} at step {self.step + 1}: "
                                 "try a lower --lr, or --dtype float32")
        row = {"step": self.step + 1}
        row |= {name: round(value, 6) for name, value in metrics.items()}
        row["seconds"] = round(time.time() - self.started, 1)
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        first_few = list(metrics.items())[:5]
        self.bar.set_postfix_str("  ".join(f"{name} {value:.3g}" for name, value in first_few))

    def write(self, text):
        """Prints a few lines above the progress bar and appends them to samples.txt."""
        self.bar.write(text)
        with self.samples_path.open("a", encoding="utf-8") as file:
            file.write(f"step {self.step + 1}\n{text}\n\n")

    def finish(self):
        """Draws the curves and removes the state: the run is done. Save the model first."""
        plot_curves(self.metrics_path, self.folder / "curves.png", self.stage)
        if rank() == 0:
            self.state_path.unlink(missing_ok=True)
        if world_size() > 1:
            dist.barrier()              # the others wait until rank 0 has written its files


def _get_state(part):
    if isinstance(part, torch.Tensor):
        return part
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _set_state(part, state):
    if isinstance(part, torch.Tensor):
        part.copy_(state)
    elif isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        part.load_state_dict(state)


def plot_curves(metrics_path, figure_path, title):
    """Draws every metric of metrics.jsonl over the steps, one small panel each."""
    from matplotlib.figure import Figure  # pyplot would change the backend of a notebook

    rows = read_jsonl(metrics_path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if name not in ("step", "seconds")]
    if not names:
        return
    n_columns = min(4, len(names))
    n_rows = math.ceil(len(names) / n_columns)
    figure = Figure(figsize=(3.2 * n_columns, 2.3 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        points = [row for row in rows if name in row]
        axis.plot([row["step"] for row in points], [row[name] for row in points],
                  linewidth=1.2, marker="." if len(points) < 40 else None)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    for axis in axes[len(names):]:
        axis.set_visible(False)
    figure.supxlabel("step", fontsize=9)
    figure.suptitle(title)
    with atomic_write(figure_path) as path:
        figure.savefig(path, format="png", dpi=90)
