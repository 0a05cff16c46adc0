"""Puts faults into the code, one at a time: do the tests notice?

    python tests/mutants.py             320 mutants, roughly an hour on an idle core
    python tests/mutants.py 40 optim    40 mutants of one file

A mutant differs from the code in one place: another operator or number, a negated condition, or
a call, an argument, or a sign left out. It is killed if a test that executes its line fails, or
takes ten times as long as usual. It survives the others, and 100 seconds of tests in any case.
Texts, asserts, figures, defaults of options, and devices stay as they are. A line gets one mutant.

First, each test runs once, to find which lines it executes. Then one process, which has imported
everything, forks for each mutant, and the child changes the functions in place; so this does not
run on Windows. Results go to runs/mutants/; the same command goes on after a stop, and tries
survivors again. Remove the folder if tests have changed that executed other lines before.
"""

import ast
import collections
import contextlib
import inspect
import itertools
import json
import os
import shutil
import signal
import sys
import time
import types
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "mutants"
FILES = ["model", "optim", "lora", "sft", "reward_model", "discriminator", "ppo", "dpo", "gan",
         "evaluate", "sample"]
TESTS = [f"tests/test_{name}.py" for name in [*FILES, "data", "stages", "pretrained"]]
LIMIT = 100                 # seconds of tests for one mutant
OPERATORS = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
             ast.FloorDiv: ("//", "/"), ast.Mod: ("%", "//"), ast.Pow: ("**", "*"),
             ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.And: ("and", "or"),
             ast.Or: ("or", "and"), ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="),
             ast.GtE: (">=", ">"), ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="),
             ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"),
             ast.IsNot: ("is not", "is")}
NUMBERS = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x + 1}
NAMES = {"max": "min", "min": "max", "any": "all", "all": "any", "argmax": "argmin",
         "argmin": "argmax"}
DROPPED = {"detach", "eval", "train", "abs", "clamp", "requires_grad_"}     # x.detach() -> x
SKIPPED = {"Config", "ModelConfig", "FROM_SCRATCH", "FINE_TUNING", "draw_report", "draw_policies",
           "print", "strict", "device", "map_location"}

# -----------------------------------------------------------------------------
# mutants

def edits(source):
    """All mutations of a source (bytes): (its statement, start, end, what stands there then)."""
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]

    def begin(node):
        return starts[node.lineno - 1] + node.col_offset

    def end(node):
        return starts[node.end_lineno - 1] + node.end_col_offset

    def operator(left, op, right):
        old, new = OPERATORS.get(type(op), ("", ""))
        at = source.index(old.encode(), end(left), begin(right))
        return at, at + len(old), new

    def changes(node):
        match node:
            case ast.BinOp():
                yield operator(node.left, node.op, node.right)
            case ast.AugAssign():
                yield operator(node.target, node.op, node.value)
            case ast.BoolOp():
                yield operator(node.values[0], node.op, node.values[1])
            case ast.Compare():
                yield operator(node.left, node.ops[0], node.comparators[0])
            case ast.UnaryOp():
                yield begin(node), begin(node.operand), ""
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                old = source[begin(test):end(test)].decode()
                yield begin(test), end(test), f"not ({old})"
            case ast.Constant(value=bool() | int() | float() as x):
                yield begin(node), end(node), str(NUMBERS[type(x)](x))
            case ast.Return(value=ast.BinOp() as x):
                yield begin(x), end(x), f"-({source[begin(x):end(x)].decode()})"
            case ast.Expr(value=ast.Call()):
                yield begin(node), end(node), "pass"
            case ast.Call(func=func):
                name = getattr(func, "attr", getattr(func, "id", ""))
                if name in NAMES:
                    yield end(func) - len(name), end(func), NAMES[name]
                if name in DROPPED and isinstance(func, ast.Attribute):
                    yield end(func) - len(name) - 1, end(node), ""
                for keyword in [k for k in node.keywords if k.arg not in SKIPPED]:
                    comma = source[end(keyword):end(keyword) + 1] == b","
                    yield begin(keyword), end(keyword) + comma, ""

    def visit(node, statement):
        match node:
            case (ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.AnnAssign()
                  | ast.If(test=ast.Compare(left=ast.Name("__name__")))):
                return
            case (ast.ClassDef(name) | ast.FunctionDef(name) | ast.Assign(targets=[ast.Name(name)])
                  | ast.Expr(value=ast.Call(func=ast.Name(name)))) if name in SKIPPED:
                return
        statement = node if isinstance(node, ast.stmt) else statement
        for start, stop, new in changes(node):
            yield statement, start, stop, new
        for child in ast.iter_child_nodes(node):
            if child not in getattr(node, "decorator_list", []):
                yield from visit(child, statement)

    return visit(ast.parse(source), None)


def lines_of(name, statement, lines):
    """The code that runs if a statement runs: the head of a block, but all of a function."""
    last = statement.end_lineno
    if hasattr(statement, "body") and not isinstance(statement, ast.FunctionDef):
        last = max(statement.lineno, statement.body[0].lineno - 1)
    return {f"{name} {line.strip()}" for line in lines[statement.lineno - 1:last]}


def choose(n, names):
    """The n mutants that a random, but lasting order puts first, at most one for a line."""
    chosen = {}
    for name in names:
        source = (ROOT / f"{name}.py").read_bytes()
        lines = source.decode().splitlines()
        for statement, start, stop, new in edits(source):
            line = source.count(b"\n", 0, start) + 1
            mutant = {"file": name, "code": lines[line - 1].strip(),
                      "old": source[start:stop].decode(), "new": new}
            order = zlib.crc32(json.dumps(mutant).encode())
            mutant["nth"] = lines[:line].count(lines[line - 1])     # of the same lines
            if new != mutant["old"] and order < chosen.get((name, line), [order + 1])[0]:
                changed = source[:start] + new.encode() + source[stop:]
                chosen[name, line] = order, mutant, lines_of(name, statement, lines), changed
    return [entry[1:] for entry in sorted(chosen.values(), key=lambda entry: entry[0])[:n]]


def change_in_place(old, new, name):
    """Gives the functions of a module or class the code of their mutants."""
    for key, value in vars(new).items():
        before = vars(old).get(key)
        if isinstance(before, type) and before.__module__ == name:
            change_in_place(before, value, name)
        before, value = (inspect.unwrap(getattr(x, "fget", x)) for x in (before, value))
        if isinstance(before, types.FunctionType) and before.__module__ == name:
            before.__code__, before.__defaults__ = value.__code__, value.__defaults__
        elif isinstance(before, int | float | tuple | dict) and "0x" not in repr(before):
            setattr(old, key, value)                        # no dict of functions

# -----------------------------------------------------------------------------
# the tests

class Mutants:
    """A pytest plugin that runs the collected tests once for each mutant."""

    def __init__(self, mutants):
        self.mutants = mutants
        self.code = {str(WORK / f"tree/{name}.py"): name for name in FILES}
        self.text = {name: (ROOT / f"{name}.py").read_text("utf-8").splitlines() for name in FILES}
        self.known = {}             # test, or fixture of many tests: (its seconds, its lines)
        self.lines = set()          # that the test of now has executed: (file, number)
        self.is_mutant = False

    def trace(self, frame, event, arg):
        if name := self.code.get(frame.f_code.co_filename):
            self.lines.add((name, frame.f_lineno))
            return self.trace

    def note(self, key, began):
        """Lines are noted as text, which holds when others are inserted above."""
        lines = {f"{name} {self.text[name][number - 1].strip()}" for name, number in self.lines}
        self.known[key] = time.process_time() - began, sorted(lines)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        key = fixturedef.argname
        if self.is_mutant or fixturedef.scope == "function" or key in self.known:
            return (yield)
        before, self.lines, began = self.lines, set(), time.process_time()
        value = yield
        self.note(key, began)
        self.lines |= before
        if key == "sft_ckpt":
            shutil.copytree(Path(value).parent, WORK / "sft", dirs_exist_ok=True)
        return value

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.lines, began = set(), time.process_time()
        if self.is_mutant:                                  # a signal ends it if it hangs
            signal.setitimer(signal.ITIMER_PROF, 20 + 10 * self.cost(item))     # of CPU time
            signal.alarm(int(600 + 100 * self.cost(item)))
        result = yield
        if not self.is_mutant:
            self.note(item.nodeid, began)
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed:
            leave(report.nodeid)

    def parts(self, item):
        """What is known of a test and of its fixtures."""
        return [self.known[key] for key in [item.nodeid, *item.fixturenames] if key in self.known]

    def cost(self, item):
        return sum(seconds for seconds, _ in self.parts(item))

    def run(self, items, lines):
        conftest = sys.modules["conftest"]
        if "sft_ckpt" in self.known and not lines.intersection(self.known["sft_ckpt"][1]):
            # The checkpoint that most tests start from would be the same.
            conftest.sft = types.SimpleNamespace(Config=conftest.sft.Config, train=lambda config:
                                                 shutil.copytree(WORK / "sft", config.out_dir))
        for item, following in itertools.zip_longest(items, items[1:]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def cover(self, items):
        sys.settrace(self.trace)
        self.run(items, set())
        sys.settrace(None)
        leave(self.known)

    def try_mutant(self, items, name, lines, changed):
        self.is_mutant = True
        path = WORK / f"tree/{name}.py"
        path.write_bytes(changed)                           # for tests that start a program
        new = types.ModuleType(name)
        new.__file__ = str(path)
        try:
            exec(compile(changed, path, "exec"), vars(new))
        except Exception as error:
            leave(f"import: {error}")
        change_in_place(sys.modules[name], new, name)
        self.run(items, lines)
        leave("")

    def tests_of(self, items, name, lines):
        """The tests that execute one of these lines: first quick ones, and those that killed."""
        kills = collections.Counter(killers().values())
        own = [item for item in items if item.path.name == f"test_{name}.py"]
        chosen = [item for item in items
                  if any(lines.intersection(found) for _, found in self.parts(item))] or own
        chosen.sort(key=lambda item: ("chain" in item.fixturenames,
                                      self.cost(item) / (1 + 2 * (item in own)
                                                         + kills[item.nodeid])))
        seconds = itertools.accumulate(self.cost(item) for item in chosen)
        enough = [item for item, total in zip(chosen, seconds, strict=True) if total < LIMIT]
        return enough or chosen[:1]

    def pytest_runtestloop(self, session):
        known, log, done = WORK / "known.json", WORK / "log.jsonl", killers()
        if known.exists():
            self.known = json.loads(known.read_text(encoding="utf-8"))
        new = [item for item in session.items if item.nodeid not in self.known]
        for file, items in itertools.groupby(new, key=lambda item: item.path.name):
            print(f"which lines {file} executes", flush=True)
            self.known = in_child(self.cover, list(items))
            if isinstance(self.known, str):
                sys.exit(f"{self.known} fails, without a mutant")
            known.write_text(json.dumps(self.known), encoding="utf-8")
        for mutant, lines, changed in self.mutants:
            if done.get(json.dumps(mutant)):
                continue
            items = self.tests_of(session.items, mutant["file"], lines)
            killer = in_child(self.try_mutant, items, mutant["file"], lines, changed)
            whole = "\n".join([*self.text[mutant["file"]], ""])
            (WORK / f"tree/{mutant['file']}.py").write_text(whole, encoding="utf-8")
            row = json.dumps(dict(mutant=mutant, killer=killer, tests=len(items)))
            print(row, flush=True)
            with open(log, "a", encoding="utf-8") as file:
                file.write(row + "\n")
        return True


def leave(result):
    """The end of a child process: its parent gets the result."""
    (WORK / "result.json").write_text(json.dumps(result), encoding="utf-8")
    os._exit(0)


def in_child(work, *args):
    """Calls a function in a child process, without its output. Returns what it left."""
    (WORK / "result.json").unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            work(*args)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)                    # what a test has started and not ended
    if os.waitstatus_to_exitcode(status) in (-signal.SIGPROF, -signal.SIGALRM):
        return "too slow"
    return json.loads((WORK / "result.json").read_text(encoding="utf-8"))


def killers():
    """{mutant: the test that killed it, '' if none did}, by the last try."""
    log = WORK / "log.jsonl"
    rows = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return {json.dumps(row["mutant"]): row["killer"] for row in map(json.loads, rows)}


def main(n=320, *names):
    mutants = choose(int(n), names or FILES)
    shutil.rmtree(WORK / "tree", ignore_errors=True)
    shutil.copytree(ROOT, WORK / "tree", ignore=shutil.ignore_patterns("runs", ".*", "__pycache__"))
    os.chdir(WORK / "tree")
    sys.path[0], sys.dont_write_bytecode = str(WORK / "tree"), True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"             # equal times and sizes mislead it
    pytest.main(["-s", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:terminal",
                 f"--basetemp={WORK / 'tmp'}", *TESTS], plugins=[Mutants(mutants)])
    done, counts = killers(), collections.Counter()
    for mutant in [mutant for mutant, *_ in mutants if json.dumps(mutant) in done]:
        killer = done[json.dumps(mutant)]
        for name in (mutant["file"], "all"):
            counts[name, bool(killer)] += 1
        if not killer:
            print(f"survives: {mutant['file']}.py: {mutant['code']}\n    "
                  f"{mutant['old']} -> {mutant['new'] or 'nothing'}")
    for name in [*FILES, "all"]:
        print(f"{name:14} {counts[name, True]:3} of {counts[name, True] + counts[name, False]:3} "
              "killed")


if __name__ == "__main__":
    main(*sys.argv[1:])
