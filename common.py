"""
The plumbing that every stage shares: options, errors, progress, processes, and the folder of a run.

A run writes runs/<stage>/ and nothing else:
    config.json      the options it ran with
    metrics.jsonl    one row a log line
    samples.txt      what the model wrote as training went on: a few lines at a time
    samples.jsonl    all of it, with its numbers
    curves.png       the metrics, drawn
    state.pt         while it trains: everything needed to resume after a stop
    ckpt.pt          when it is done: the model
"""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import sys
import time
import zlib
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
        # The second is where a temporary file should go.
        where = f"{error.filename2 or error.filename}: " if error.filename else ""
        advice = ADVICE.get(error.errno, "")
        sys.exit(_report(f"{where}{error.strerror or error}{advice}", 2))
    except (MemoryError, RuntimeError) as error:
        is_full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_full and "can't allocate memory" not in str(error):       # that of a CPU
            raise
        sys.exit(_report("the memory is full: lower --batch_size (or --minibatch_size)", 2))
    except KeyboardInterrupt:
        sys.exit(_report("stopped; the same command resumes from the last saved state", 130))
    finally:
        if world_size() > 1:
            dist.destroy_process_group()


# What to do about an error of the system.
ADVICE = {errno.ENOSPC: ": make room, then give the same command again",
          errno.EACCES: ": change its permissions, or choose another place",
          errno.EPERM: ": change its permissions, or choose another place",
          errno.EROFS: ": choose another place",
          errno.ENOTDIR: ": a file stands where a folder is needed; choose another folder",
          errno.EISDIR: ": a folder stands where a file is needed; choose another name",
          errno.EEXIST: ": a file stands where a folder is needed; choose another folder"}


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

# (smallest, largest) value: the numbers among the options that must be within. A name has one
# meaning, so one table serves all stages.
RANGES = {
    (1, 1e6): "batch_size minibatch_size d_batch_size grad_accum group_size max_new_tokens n_layer "
              "n_head n_embd block_size samples n best_of words comparisons",
    (1, math.inf): "max_steps ppo_epochs eval_interval log_interval sample_interval corpus_size",
    (0, math.inf): "lr d_lr weight_decay grad_clip warmup_steps n_inner lora top_k temperature "
                   "simpo_gamma margin centering kl_coef target_kl vf_coef d_steps "
                   "clip_range_high missing_eos_penalty skip_g_every",
    (1e-6, math.inf): "beta tau clip_range epochs",
    (-math.inf, math.inf): "likelihood",
    (1e-6, 1): "top_p",
    (0, 1): "noise label_smoothing gamma lam",
    (0, 0.99): "dropout",
    (0, 2 ** 32 - 1): "seed"}


def check_options(config):
    """Raises InputError for a number out of its range, and for an option that has no effect.

    A Config may have READ_IF, a list of (option, values, names): the options with these names are
    read only if that option has one of these values; an empty list stands for all but ''. Setting
    them otherwise is a mistake."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    for (low, high), names in RANGES.items():
        for name in names.split():
            if name in fields:
                check_range(name, getattr(config, name), low, high)
    # Logits divided by less than this would be too large for float32 to tell them apart.
    if 0 < getattr(config, "temperature", 0) < 1e-3:
        raise InputError(f"--temperature must be 0 or at least 0.001, not {config.temperature:g}")
    for option, values, names in getattr(config, "READ_IF", []):
        value = getattr(config, option)
        are_read = value in values or (not values and value != "")
        how = f"with --{option} {value}: leave one of them out" if value else f"without --{option}"
        for name in names.split():
            is_set = getattr(config, name) != fields[name].default
            if is_set and not are_read:
                raise InputError(f"--{name} has no effect {how}")


def check_range(name, value, low, high):
    """Raises InputError unless a number, or each of a tuple, is from low to high, or is None."""
    for x in value if isinstance(value, tuple) else (value,):
        if x is not None and not (low <= x <= high and math.isfinite(x)):
            limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise InputError(f"--{name} must be {limits}, not {x}")

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


def gather(x):
    """[the tensor x of each process], by rank."""
    if world_size() == 1:
        return [x]
    gathered = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(gathered, x)
    return gathered


def wait_for_all():
    """Returns when every process is here, and what rank 0 wrote before is on the disk."""
    if world_size() > 1:
        dist.barrier()


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
    n_devices = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()),
                 "cpu": 1}
    if not name:
        return torch.device(next(kind for kind, n in n_devices.items() if n))
    kind, _, index = name.partition(":")                    # "cuda:1" is the second GPU
    if kind not in n_devices or not (index or "0").isdigit():
        raise InputError(f"--device is cuda, mps or cpu, not '{name}'")
    if int(index or 0) >= n_devices[kind]:
        advice = "leave the option out"
        if kind == "cuda":
            advice += " (make SIZE=cpu), or install a driver that is new enough for torch"
        raise InputError(f"--device {name}: torch finds no such device here; {advice}")
    return torch.device(name)


@functools.cache
def supports_bf16(device):
    """True if the hardware multiplies in bfloat16. Others emulate it, far slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return (device.type == "cpu" and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pick_dtype(config, device):
    """The name of the dtype to compute in. Raises InputError."""
    if config.dtype not in ("", "float32", "bfloat16"):
        raise InputError(f"--dtype is float32 or bfloat16, not '{config.dtype}'")
    return config.dtype or ("bfloat16" if supports_bf16(device) else "float32")


def setup(config):
    """Checks the options and seeds torch. Raises InputError.

    Returns (device, autocast): `with autocast():` computes in config.dtype."""
    check_options(config)
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    dtype = pick_dtype(config, device)
    device = join_processes(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        if device.index is not None:
            torch.cuda.set_device(device)
        device = torch.device("cuda", torch.cuda.current_device())      # the first, if not named

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    return device, autocast


def make_rng(device, seed):
    """The random generator that sampling draws from; each process has its own."""
    return torch.Generator(device).manual_seed(seed + rank())

# -----------------------------------------------------------------------------
# files and progress

@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path that replaces `path` when the block ends without an error.

    So a file is either old or new, never half-written. Only rank 0 writes.
    Raises InputError if torch.save() cannot write all of it, OSError if others cannot."""
    if rank() > 0:
        yield Path(os.devnull)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        # torch.save() was cut off, and does not say by what.
        raise InputError(f"{path} could not be written whole; the disk is probably full: make "
                         "room, then give the same command again") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_jsonl(path):
    # Not splitlines(): that also splits at characters that JSON allows inside a text.
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


held = {}       # {path: the open file} of all files that this process holds


def hold(path):
    """Holds a file until release() or the end of this process, however it ends.

    Raises InputError if another process holds it. A file system without locks holds nothing."""
    release(path)                   # this process may start over, as in a notebook
    file = open(path, "a", encoding="utf-8")
    try:
        if os.name == "nt":
            import msvcrt
            file.seek(2 ** 30)      # a byte that nobody reads: Windows keeps others from this one
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            file.close()
            raise InputError(f"another run is writing to {Path(path).parent}: wait for its end, "
                             "or choose another --out_dir") from None
    held[str(path)] = file


def release(path):
    """Lets go of a file, if this process holds it."""
    if file := held.pop(str(path), None):
        file.close()


def checksum_of_file(path):
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2 ** 24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def write_text(path, text):
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_jsonl(path, rows):
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def progress_bar(items, name, total=None):
    """Yields the items behind a progress bar, which is shown if it takes longer than 2 seconds."""
    return tqdm(items, desc=f"{name:13}", total=total, leave=False, dynamic_ncols=True,
                delay=2, mininterval=_interval(), disable=rank() > 0)


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
        device = pick_device(config.device)
        self.dtype = pick_dtype(config, device)
        # config.json says what was used, where an option was left to the machine.
        self.used = {"device": device.type, "dtype": self.dtype}
        self.options = self.config | self.used | {"processes": world_size()}
        self.state_path = self.folder / "state.pt"
        log_folder = self.folder if rank() == 0 else None
        self.metrics_path = log_folder / "metrics.jsonl" if log_folder else Path(os.devnull)
        self.samples_path = log_folder / "samples.txt" if log_folder else Path(os.devnull)
        self.rows_path = log_folder / "samples.jsonl" if log_folder else Path(os.devnull)
        self.step, self.seconds, self.started = 0, 0.0, time.time()
        self.sampled_tokens = 0         # for the stages that learn from samples to add to
        self.counted_tokens, self.row_time = 0, self.started            # at the last row

    def steps(self, save_interval, **parts):
        """Yields step numbers: from the saved state if it has the same options and data, else
        from 0.

        parts: everything that a state consists of (models, optimizers, batches, generators,
        tensors). They are saved every `save_interval` steps. Raises InputError if another process
        writes to the folder, or if there is a state that cannot be read."""
        self.parts = parts
        for name, part in parts.items():
            if isinstance(part, nn.Module) and not all_finite(part):
                raise InputError(f"{self.stage}: the {name} has weights that are not finite "
                                 "before training starts: train what it starts from again")
        if rank() == 0:
            hold(self.metrics_path)
        wait_for_all()                  # or the others would read a state that is older
        self.data = self._checksums()
        self._resume()
        text = json.dumps(self.config | self.used, indent=1)
        write_text(self.folder / "config.json", text + "\n")
        self.started = time.time() - self.seconds
        self.row_time = time.time()
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
        state["config"] = self.options                  # a state of a GPU is of no use elsewhere
        state["data"] = self.data
        state["step"] = self.step
        state["seconds"] = time.time() - self.started
        state["torch_rng"] = torch.get_rng_state()
        # Rows that are newer than the state are cut off on resume: they will be written again.
        state["bytes"] = {path.name: path.stat().st_size for path in self.logs()}
        with atomic_write(self.state_path) as path:
            torch.save(state, path)

    def _checksums(self):
        """Checksums of all that training reads: the files among the options, and the batches."""
        files = [value for value in self.config.values() if isinstance(value, str)]
        sums = {path: checksum_of_file(path) for path in files if Path(path).is_file()}
        return sums | {name: part.checksum for name, part in self.parts.items()
                       if hasattr(part, "checksum")}

    def _resume(self):
        if not self.state_path.exists():
            self._start_over()
            return
        try:
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
            changed = "data" if state["data"] != self.data else ""
            if state["config"] != self.options:
                changed = "options, or on other devices"
            if not changed:
                self._restore(state)
                return
        except OSError:
            raise
        except Exception as error:      # whatever foreign or cut bytes make of the unpickling
            raise InputError(f"{self.state_path} is damaged, or no state of this stage "
                             f"({type(error).__name__}): delete it to start over") from None
        print(f"{self.stage}: the state in {self.folder} was saved with other {changed}: "
              "starting over")
        self._start_over()

    def _start_over(self):
        for path in self.logs():
            path.write_text("", encoding="utf-8")

    def logs(self):
        """The files that grow during a run."""
        return self.metrics_path, self.samples_path, self.rows_path

    def _restore(self, state):
        for name, part in self.parts.items():
            _set_state(part, state["parts"][name])
        torch.set_rng_state(state["torch_rng"])
        self.step, self.seconds = state["step"], state["seconds"]
        if rank() == 0:
            for path in self.logs():
                n_bytes = state["bytes"][path.name]
                if path.exists() and path.stat().st_size >= n_bytes:
                    os.truncate(path, n_bytes)

    def log(self, **metrics):
        """Writes one row of metrics.jsonl, the means over all processes.

        Raises InputError if a number is not finite, since training cannot recover from it.
        tokens_per_second: those that were dealt by Batches or sampled, since the last row."""
        numbers = torch.tensor([float(x) for x in metrics.values()], dtype=torch.float64)
        metrics = dict(zip(metrics, average_over_processes(numbers).tolist(), strict=True))
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise InputError(f"{self.stage}: {name} is {value} at step {self.step + 1}: "
                                 f"{self._advice(name)}")
        row = {"step": self.step + 1}
        row |= {name: round(value, 6) for name, value in metrics.items()}
        row["seconds"] = round(time.time() - self.started, 1)
        row |= self._speed()
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        first_few = list(metrics.items())[:5]
        self.bar.set_postfix_str("  ".join(f"{name} {value:.3g}" for name, value in first_few))

    def _speed(self):
        """{"tokens_per_second": ...} of all processes since the last row that had some."""
        dealt = sum(getattr(part, "n_tokens", 0) for part in self.parts.values())
        new_tokens = dealt + self.sampled_tokens - self.counted_tokens
        seconds, self.row_time = time.time() - self.row_time, time.time()
        self.counted_tokens += new_tokens
        if not new_tokens:                                  # the row of an evaluation
            return {}
        return {"tokens_per_second": round(world_size() * new_tokens / max(seconds, 1e-3))}

    def _advice(self, name):
        """What to do about a metric that is not finite."""
        if name in ("score", "objective"):
            return "what gives the scores gives numbers that are not finite: look at it first"
        if self.config.get("lr") == 0:
            return "the weights have not moved (--lr 0), so look at the data and at --init"
        advice = "the steps may be too large: try a lower --lr"
        return f"{advice}, or --dtype float32" if self.dtype == "bfloat16" else advice

    def write(self, text, rows=()):
        """Prints a few lines above the progress bar and appends them to samples.txt.

        rows: all samples of this step, for samples.jsonl."""
        self.bar.write(text)
        with self.samples_path.open("a", encoding="utf-8") as file:
            file.write(f"step {self.step + 1}\n{text}\n\n")
        with self.rows_path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": self.step + 1} | row, ensure_ascii=False) + "\n")

    def finish(self):
        """Draws the curves and removes the state: the run is done. Save the model first."""
        plot_curves(self.metrics_path, self.folder / "curves.png", self.stage)
        if rank() == 0:
            self.state_path.unlink(missing_ok=True)
            release(self.metrics_path)
        wait_for_all()                  # or the others would go on before the files are there


def _get_state(part):
    if isinstance(part, torch.Tensor):
        return part
    if isinstance(part, torch.Generator):
        return gather(part.get_state())                 # each process has its own: make_rng()
    return part.state_dict()


def _set_state(part, state):
    if isinstance(part, torch.Tensor):
        part.copy_(state)
    elif isinstance(part, torch.Generator):
        part.set_state(state[rank()])
    else:
        part.load_state_dict(state)


def all_finite(model):
    return all(parameter.isfinite().all() for parameter in model.parameters())


def plot_curves(metrics_path, figure_path, title):
    """Draws every metric of metrics.jsonl over the steps, one small panel each."""
    from matplotlib.figure import Figure  # pyplot would change the backend of a notebook

    rows = read_jsonl(metrics_path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if name not in ("step", "seconds", "tokens_per_second")]
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
