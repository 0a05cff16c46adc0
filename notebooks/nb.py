"""
What all notebooks share, so that their cells are about one thing each: a checkpoint to look at,
the source of a function, guesses, and exercises with a check.

    from notebooks.nb import TINY, check, checkpoint, links, reveal, show_source, trained
"""

import importlib.util
import inspect
import os
import textwrap
import zlib
from pathlib import Path

import torch
from IPython.display import Markdown, display

import sft

ROOT = Path(__file__).resolve().parent.parent
TINY = bool(os.environ.get("TINY"))     # a run of seconds that learns nothing
FOLDER = "runs/notebook/tiny" if TINY else "runs/notebook"

# -----------------------------------------------------------------------------
# models

def checkpoint(stage, **options):
    """The path of runs/<stage>/ckpt.pt, or if it is not there, of trained(stage, **options)."""
    path = Path("runs", stage.__name__, "ckpt.pt")
    if TINY or not path.exists():
        return trained(stage, **options)
    print(f"{stage.__name__}: {path.as_posix()}")
    return path.as_posix()


def trained(stage, **options):
    """The path of the checkpoint of a run with these options, which is trained only once.

    stage: a module such as ppo. Its folder is named by the options: others train another one."""
    name = f"{stage.__name__}-{zlib.crc32(repr(sorted(options.items())).encode()):08x}"
    path = Path(FOLDER, name, "ckpt.pt")
    if not path.exists():
        stage.train(stage.Config(out_dir=path.parent.as_posix(), **options))
    print(f"{stage.__name__}: {path.as_posix()}")
    return path.as_posix()


def small_sft():
    """The path of the small SFT model, trained once for all notebooks."""
    return trained(sft, **small_sft_options())


def sft_checkpoint():
    """The path of runs/sft/ckpt.pt, or if it is not there, of the small SFT model."""
    return checkpoint(sft, **small_sft_options())


def small_sft_options():
    if TINY:
        return dict(corpus_size=2000, max_steps=20, n_layer=1, n_embd=32, n_head=2)
    return dict(corpus_size=60_000, max_steps=500, eval_interval=100)

# -----------------------------------------------------------------------------
# sources

def line_of(function):
    """("ppo.py", 123): where a function or a class begins."""
    function = inspect.unwrap(function)                 # without @torch.no_grad()
    path = Path(inspect.getsourcefile(function)).resolve()
    return path.relative_to(ROOT).as_posix(), inspect.getsourcelines(function)[1]


def show_source(*functions):
    """Shows functions as they stand in the repository, each with its file and line."""
    for function in functions:
        name, line = line_of(function)
        source = textwrap.dedent(inspect.getsource(function)).rstrip()
        display(Markdown(f"`{name}`, line {line}:\n\n```python\n{source}\n```"))


def links(*functions):
    """Lists functions as links to their files, each with its line."""
    rows = []
    for function in functions:
        name, line = line_of(function)
        rows.append(f"* `{function.__qualname__}`: [{name}, line {line}](../{name}#L{line})")
    display(Markdown("\n".join(rows)))

# -----------------------------------------------------------------------------
# sliders, guesses and exercises

def slider(draw, **ranges):
    """Calls draw(name=number, ..), again whenever the reader moves one of the sliders.

    ranges: name=(lowest, start, highest). Without ipywidgets it draws once, with the starts, and
    so it does where nobody can move a slider: run_notebooks.py sets STATIC."""
    starts = {name: start for name, (_, start, _) in ranges.items()}
    if importlib.util.find_spec("ipywidgets") is None or os.environ.get("STATIC"):
        draw(**starts)
        return
    import ipywidgets  # an extra

    sliders = {name: ipywidgets.FloatSlider(start, min=low, max=high, step=(high - low) / 100,
                                            continuous_update=False)
               for name, (low, start, high) in ranges.items()}
    ipywidgets.interact(draw, **sliders)


def reveal(guess, truth, unit=""):
    """Prints what was measured beside what the reader has guessed (None: nothing yet)."""
    if guess is None:
        print(f"measured: {truth:.3g}{unit} (set a guess above, and run this again)")
    else:
        print(f"you guessed {guess:.3g}{unit}; measured: {truth:.3g}{unit}")


def check(mine, theirs, *inputs, atol=1e-4, **options):
    """Compares the reader's function with that of the repository, on the same inputs.

    The results must be equal, and so must the gradients of a random weighted sum of them with
    respect to every input that is a tensor of floats. Prints "right", "wrong" with the reason, or
    "to do" as long as mine returns nothing."""
    results, gradients = [], []
    for function in (mine, theirs):
        arguments = [with_gradient(value) for value in inputs]
        torch.manual_seed(0)                            # if the function draws numbers
        result = function(*arguments, **options)
        if result is None or result is ...:
            print(f"to do: {function.__name__} returns nothing yet")
            return
        result = result if isinstance(result, tuple) else (result,)
        results.append([torch.as_tensor(part) for part in result])
        gradients.append(gradients_of(results[-1], arguments))
    wrong = difference(*results, "result", atol) or difference(*gradients, "gradient", atol)
    name = theirs.__name__
    if wrong:
        print(f"wrong: {wrong}")
    elif any(gradient is not None for gradient in gradients[1]):
        print(f"right: the same results and gradients as {name}")
    else:
        print(f"right: the same results as {name}")


def with_gradient(value):
    """A copy of a tensor of floats, whose gradient is recorded; anything else as it is."""
    if torch.is_tensor(value) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    return value


def gradients_of(result, arguments):
    """The gradients of a fixed random weighted sum of all results, one for each argument."""
    leaves = [value for value in arguments if torch.is_tensor(value) and value.requires_grad]
    total = 0.0
    rng = torch.Generator().manual_seed(1)
    for part in result:
        if part.requires_grad:
            total = total + (part * torch.randn(part.shape, generator=rng)).sum()
    if not torch.is_tensor(total):
        return [None] * len(leaves)
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


def difference(mine, theirs, what, atol):
    """A sentence about the first difference of two lists of tensors, or "" if there is none."""
    if len(mine) != len(theirs):
        return f"{len(theirs)} results are expected, not {len(mine)}"
    for a, b in zip(mine, theirs, strict=True):
        if a is None and b is None:
            continue
        if a is None or b is None:
            a, b = ("none" if x is None else "one" for x in (a, b))
            return f"there is {a} where {b} is expected, for a {what}"
        if a.shape != b.shape:
            return f"the {what} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        close = torch.isclose(a.double(), b.double(), atol=atol, rtol=1e-4)
        if not close.all():
            worst = (~close).flatten().nonzero()[0].item()
            x, y = a.flatten()[worst].item(), b.flatten()[worst].item()
            return f"the {what} is {x:.4f} where {y:.4f} is expected (element {worst})"
    return ""
