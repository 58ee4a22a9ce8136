"""How many seeded faults the tests find: `python -m tests.mutations`, by tests/faults.yaml.

Each fault is put into a copy of the tree, never into the checkout itself, and the tests that are
near it run until one fails:

    1. files named after the changed module (tests/**/test_store.py for cluster/store/artifacts.py)
    2. files that import the module, and files named after a module of the fault's `also`
    3. files that import a helper of tests/ that imports it, or a module of `also`

Only file names and import statements count, so one table judges any layout of the tests, and two
trees are judged by the same rule: `--tree PATH` takes the code and the tests of another checkout.

Left out are the files that start Ray clusters, gangs of processes, browsers or the whole
quickstart (EXPENSIVE), and tests with `ray_cluster` in their names.

A fault is killed when a test fails or a test module cannot be imported; it has survived when
nothing failed, or not within `--limit` seconds. At the end the tests that killed run once more
without any fault: one that fails there too proves nothing, and its faults become errors.
Hypothesis draws the same examples in every run.
"""

import argparse
import ast
import fnmatch
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

import yaml

TABLE = Path(__file__).with_name("faults.yaml")
EXPENSIVE = (  # names, as these hold in every layout
    "test_*quickstart",
    "test_continues",
    "test_walk*",
    "test_ray_*",
    "test_cluster",
    "test_executors",
    "test_gang*",
    "test_*browser",
    "test_wandb_commands",
    "test_doctor",
)
# What takes most of a test's start is loaded once: each run of pytest is a fork of this process.
SERVER = """
import importlib, json, os, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import pytest
for line in sys.stdin:
    order, process = json.loads(line), os.fork()
    if process == 0:
        os.setsid()
        output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(output, 1), os.dup2(output, 2)
        sys.exit(pytest.main(order["arguments"]))
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
LIBRARIES = ("hypothesis", "optuna", "pandas", "peft", "scipy.stats", "transformers")
TEST_TIMEOUT_S = 120  # a test that hangs because of the fault has found it
PYTEST = [
    *("-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"),
    *("-k", "not ray_cluster", "-o", f"timeout={TEST_TIMEOUT_S}"),
]
KILLER = re.compile(r"^(?:FAILED|ERROR) (\S+?(?:\[.*?\])?)(?: - .*)?$", re.MULTILINE)
PASSED, FAILED, INTERRUPTED, LOST = 0, 1, 2, -1  # pytest's exit codes, and one of ours


@dataclass(frozen=True)
class Fault:
    """A wrong edit: `before` occurs once in `file` and becomes `after`.

    `also` names modules whose tests reach this one without importing it, or such tests themselves.
    """

    room: str
    name: str
    file: str
    before: str
    after: str
    also: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        name = self.file.removesuffix(".py").replace("/", ".")
        return name if name.startswith("ebbline.") else f"ebbline.{name}", *self.also


@dataclass(frozen=True)
class Verdict:
    """What became of a fault: killed `by` a test, survived, or error (of the table, or in here)."""

    room: str
    name: str
    outcome: str
    by: str = ""
    seconds: float = 0.0
    files: int = 0

    @property
    def settled(self) -> bool:
        """False for errors, and for what had more tests than fitted the limit."""
        return self.outcome == "killed" or (self.outcome == "survived" and not self.by)

    def __str__(self) -> str:
        took = f"{self.seconds:.0f} s, {self.files} files"
        return f"{self.outcome}  {self.room}: {self.name}  {self.by}  ({took})"


def main() -> int:
    options = _options()
    # What a shell starts in the background ignores interrupts, and so would each pytest.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tree = options.tree.resolve()
    faults = [fault for fault in read_faults() if _wanted(fault, options)]
    problems = [problem for fault in faults for problem in problems_of(fault, tree)]
    if problems or not faults:
        print(*(problems or ["no such fault"]), sep="\n")
        return 2
    found = read_verdicts(options.json) if options.resume and options.json else {}
    settled = {name for name, verdict in found.items() if verdict.settled}
    todo = sorted(  # what was tried before and not settled comes last
        (fault for fault in faults if fault.name not in settled),
        key=lambda fault: fault.name in found,
    )
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        imports, copies = Imports(tree), SimpleQueue[Copy]()
        trees = [Copy(tree, Path(folder) / f"tree{number}") for number in range(options.jobs)]
        for copy in trees:
            copies.put(copy)

        def judged(fault: Fault) -> Verdict:
            copy = copies.get()
            try:
                return judge(fault, copy, imports.near(fault, options.tests), options.limit)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(options.jobs) as pool:
            for done, verdict in enumerate(pool.map(judged, todo), 1):
                print(f"{done}/{len(todo)}  {verdict}", flush=True)
                found[verdict.name] = verdict
                write_verdicts(found, options.json)
        for verdict in unproven([found[fault.name] for fault in faults], trees[0]):
            found[verdict.name] = verdict
        for copy in trees:
            copy.close()
    write_verdicts(found, options.json)
    return report([found[fault.name] for fault in faults])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations")
    add, here = parser.add_argument, Path(__file__).parents[1]
    add("--only", metavar="NAME", help="the one fault with this name")
    add("--select", metavar="GLOB", default="*", help="rooms, such as 'stat*' (default: all)")
    add("--tree", type=Path, default=here, help="the checkout to judge (default: this one)")
    add("--tests", metavar="FOLDER", default="tests", help="only test files below, as tests/fast")
    add("--jobs", type=int, default=1, help="faults judged at once, each in its own copy")
    add("--limit", type=float, default=180.0, help="seconds of testing for a fault (default: 180)")
    add("--json", type=Path, help="where the verdicts go, after each fault")
    add("--resume", action="store_true", help="go on with what the JSON file has")
    return parser.parse_args()


def _wanted(fault: Fault, options: argparse.Namespace) -> bool:
    return fnmatch.fnmatch(fault.room, options.select) and options.only in (None, fault.name)


def read_faults() -> list[Fault]:
    faults = []
    for room, rows in yaml.safe_load(TABLE.read_text()).items():
        faults += [Fault(room, **{**row, "also": tuple(row.get("also", ()))}) for row in rows]
    names = [fault.name for fault in faults]
    if len(set(names)) < len(names):
        raise SystemExit(f"duplicate names: {[name for name in names if names.count(name) > 1]}")
    return faults


def problems_of(fault: Fault, tree: Path) -> Iterator[str]:
    """Why a fault cannot be put into this tree: not one place, or no Python afterwards."""
    path = tree / fault.file
    text = path.read_text() if path.exists() else ""
    count = text.count(fault.before)
    if count != 1:
        yield f"{fault.name}: `before` occurs {count} times in {path}, not once: {fault.before!r}"
        return
    try:
        compile(text.replace(fault.before, fault.after), str(path), "exec")
    except SyntaxError as error:
        yield f"{fault.name}: {fault.file} does not compile ({error})"


class Copy:
    """A copy of the tree, with a process that runs its tests: see SERVER."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.folder, self._output = folder, folder.with_suffix(".out")
        listing = ["git", "ls-files", "-co", "--exclude-standard"]  # committed or not
        listed = subprocess.run(listing, cwd=tree, capture_output=True, text=True, check=True)
        for name in listed.stdout.splitlines():
            if (tree / name).is_symlink() or (tree / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(tree / name, folder / name, follow_symlinks=False)
        self._server = self._started()

    def _started(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-c", SERVER, *LIBRARIES],
            cwd=self.folder,
            # The tree comes before the checkout that is installed. A slow test is no fault that was
            # found.
            env={**os.environ, "PYTHONPATH": str(self.folder), "EBBLINE_FAST_S": "inf"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def pytest(self, what: Sequence[str], limit_s: float) -> tuple[int | None, str]:
        """pytest's exit code (None: it ran out of time) and what it printed."""
        # Examples that hypothesis kept from another fault are no part of the tests.
        shutil.rmtree(self.folder / ".hypothesis", ignore_errors=True)
        order = {"output": str(self._output), "arguments": [*PYTEST, *what]}
        orders, replies = self._server.stdin, self._server.stdout
        assert orders is not None and replies is not None
        try:
            orders.write(json.dumps(order).encode() + b"\n")
            orders.flush()
            process, code = int(replies.readline()), None
            if select.select([replies], [], [], max(1.0, limit_s))[0]:
                code = int(replies.readline())
            else:
                os.kill(process, signal.SIGINT)  # so that fixtures stop the servers they started
                if not select.select([replies], [], [], 10.0)[0]:
                    os.killpg(process, signal.SIGKILL)
                replies.readline()
        except (ValueError, BrokenPipeError):  # it ended, or a test killed it
            self._server.kill()
            self._server = self._started()
            return LOST, "the process that runs the tests is gone"
        return code, self._output.read_text(errors="replace")

    def close(self) -> None:
        self._server.communicate()


class Imports:
    """Which modules each test file of a tree imports, itself and by way of a helper of tests/."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._own = {path: _imported(path) for path in sorted((tree / "tests").rglob("*.py"))}
        self._helpers = {_dotted(path, tree): names for path, names in self._own.items()}

    def near(self, fault: Fault, folder: str) -> list[list[str]]:
        """The files that reach a fault: the nearest group first, small files first in each."""
        groups: list[list[tuple[int, str]]] = [[], [], []]
        for path in self._own:
            name = path.relative_to(self._tree).as_posix()
            wanted = name.startswith(f"{folder.rstrip('/')}/") and path.name.startswith("test_")
            rank = self._rank(path, fault.modules)
            dear = any(fnmatch.fnmatch(path.stem, pattern) for pattern in EXPENSIVE)
            if wanted and rank is not None and not dear:
                groups[rank].append((path.stat().st_size, name))
        return [[name for _, name in sorted(group)] for group in groups if group]

    def _rank(self, path: Path, modules: Sequence[str]) -> int | None:
        own = self._own[path]
        if _dotted(path, self._tree) in modules:
            return 0
        through = own.union(*(self._helpers.get(name, set()) for name in own))
        if through.isdisjoint(modules):
            return None
        named = [path.stem == f"test_{module.rpartition('.')[2]}" for module in modules]
        return 0 if named[0] else 1 if any(named) or modules[0] in own else 2


def _dotted(path: Path, tree: Path) -> str:
    return ".".join(path.relative_to(tree).with_suffix("").parts)


def _imported(path: Path) -> set[str]:
    """Dotted names imported anywhere; `from ebbline.tasks import worker` gives
    ebbline.tasks.worker too.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def judge(fault: Fault, copy: Copy, groups: Sequence[Sequence[str]], limit_s: float) -> Verdict:
    """Put a fault into a copy, run the tests near it until one fails, and take it out again."""
    path, began = copy.folder / fault.file, time.monotonic()
    sound = path.read_text()
    outcome, by = ("survived", "") if groups else ("error", "no test file reaches it")
    try:
        _write(path, sound.replace(fault.before, fault.after))
        for group in groups:
            left_s = limit_s - (time.monotonic() - began)
            code, output = copy.pytest(["-x", *group], left_s)
            killer = KILLER.search(output)
            if code is None:
                by = f"within {limit_s:.0f} s"
            elif code in (FAILED, INTERRUPTED) and killer is not None:
                outcome, by = "killed", killer.group(1)
            elif code != PASSED:
                outcome, by = "error", f"pytest exited with {code}: {output[-300:]!r}"
            if code != PASSED:
                break
    finally:
        _write(path, sound)
    took_s = round(time.monotonic() - began, 1)
    return Verdict(fault.room, fault.name, outcome, by, took_s, sum(map(len, groups)))


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    # Bytecode counts as fresh by size and whole seconds: a fault that comes and goes could stay.
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def unproven(verdicts: Sequence[Verdict], copy: Copy) -> Iterator[Verdict]:
    """Those that were killed by a test that fails, or is not there, without any fault."""
    killers = sorted({verdict.by for verdict in verdicts if verdict.outcome == "killed"})
    code, output = copy.pytest(killers, 3600.0) if killers else (PASSED, "")
    failing = set(KILLER.findall(output))
    if code not in (PASSED, FAILED):
        failing, _ = set(killers), print(f"without faults, pytest exited with {code}:\n{output}")
    for verdict in verdicts:
        if verdict.outcome == "killed" and verdict.by in failing:
            by = f"{verdict.by} fails without the fault too"
            yield Verdict(verdict.room, verdict.name, "error", by)


def read_verdicts(path: Path) -> dict[str, Verdict]:
    rows = json.loads(path.read_text()) if path.exists() else []
    return {row["name"]: Verdict(**row) for row in rows}


def write_verdicts(found: dict[str, Verdict], path: Path | None) -> None:
    if path is not None:
        fresh = path.with_suffix(".tmp")
        fresh.write_text(json.dumps([asdict(verdict) for verdict in found.values()], indent=1))
        fresh.replace(path)


def report(verdicts: Sequence[Verdict]) -> int:
    """Print the table by room, then what survived. The exit status is 2 after an error, else 0."""
    print(f"\n{'room':<12}{'faults':>8}{'killed':>8}{'share':>8}")
    for room in [*dict.fromkeys(verdict.room for verdict in verdicts), "all"]:
        own = [verdict for verdict in verdicts if room in (verdict.room, "all")]
        killed = sum(verdict.outcome == "killed" for verdict in own)
        print(f"{room:<12}{len(own):>8}{killed:>8}{killed / len(own):>8.0%}")
    for outcome in ("survived", "error"):
        left = [f"  {verdict}" for verdict in verdicts if verdict.outcome == outcome]
        if left:
            print(f"\n{outcome}:", *left, sep="\n")
    return 2 if any(verdict.outcome == "error" for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
