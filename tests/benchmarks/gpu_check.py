"""make gpu-check: what ebbline does on one large GPU, in at most nine minutes.

Each part runs in a process of its own, within its time box, and writes results/gpu.json as it goes:
a kill keeps what was measured. A part that fails is recorded with its error, one that cannot run
with the reason, and the others go on. No weights are downloaded. Needs torch, transformers, peft
and accelerate, and the wheels that `make gpu-wheels` collects.

    python -m tests.benchmarks.gpu_check [--minutes 9] [--parts train-7b pack] [--out FILE] [--json]
    python -m tests.benchmarks.gpu_check --miniature    # tiny models on the CPU, in this process

Exit codes: 0 if no part failed, 1 if a part failed, or without a GPU.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks import record

MARK = "gpu-check: "  # begins each line of a part's process that is meant for this one
END_S = 5.0  # kept for the file and the table
STARTED = time.monotonic()
MACHINE_S = 90.0  # time box of the first process, which reads the libraries from a cold disk


@dataclass(frozen=True)
class Part:
    """One part: its time box, the least time that it is worth starting with, and what it needs."""

    name: str
    box_s: float
    least_s: float
    memory_gb: float
    nf4: bool = True


# The order is that of their worth: what comes last is left out when time runs short.
PARTS = (
    Part("train-7b", 100, 40, 14),
    Part("pack", 150, 60, 24),
    Part("nf4-step", 60, 30, 20),
    Part("evaluate", 120, 50, 20),
    Part("project", 90, 30, 4, nf4=False),
    Part("train-14b", 80, 45, 24),
    Part("train-72b", 150, 75, 80),
)


@dataclass
class Outcome:
    """What became of a part. `status` is measured, skipped or failed."""

    part: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def events(name: str, miniature: bool, memory_gb: float | None) -> Iterator[dict[str, Any]]:
    """Runs a part in this process: {"row": ...} for each figure, and {"error": ...} if it fails."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about their own futures
        try:
            from tests.benchmarks.gpu.parts import PARTS as FUNCTIONS
            from tests.benchmarks.gpu.work import SMALL, Sizes, Work

            work = Work(SMALL if miniature else Sizes(), Path(folder), memory_gb)
            for row in FUNCTIONS[name](work):
                yield {"row": row}
        except Exception as error:  # noqa: BLE001  # whatever it is, the other parts go on
            yield {"error": one_line(error)}


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def in_process(name: str, box_s: float, memory_gb: float | None) -> Outcome:
    """Runs a part in a process of its own and ends it after `box_s`."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu_check", "--part", name]
    command += ["--memory-gb", str(memory_gb)] if memory_gb is not None else []
    return watched(name, command, box_s)


def watched(name: str, command: Sequence[str], box_s: float) -> Outcome:
    """The outcome of a process that prints events. It is killed after `box_s`."""
    late = threading.Event()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(box_s, end)
        timer.start()
        try:
            whole = (line for line in process.stdout if MARK in line and line.endswith("\n"))
            outcome = gathered(name, (json.loads(line.partition(MARK)[2]) for line in whole))
            process.wait()
        finally:
            timer.cancel()
            process.kill()
    if late.is_set():
        outcome.status, outcome.reason = "failed", f"ended after its time box of {box_s:.0f} s"
    elif outcome.status == "measured" and process.returncode:
        outcome.status = "failed"
        outcome.reason = f"its process ended with {process.returncode}; see its messages above"
    return outcome


def gathered(name: str, found: Iterator[dict[str, Any]]) -> Outcome:
    outcome, started = Outcome(name, "measured"), time.monotonic()
    for event in found:
        if "row" in event:
            outcome.rows.append({"part": name, **event["row"]})
        else:
            outcome.status, outcome.reason = "failed", event["error"]
    outcome.seconds = time.monotonic() - started
    return outcome


def why_not(part: Part, machine: Mapping[str, Any], left_s: float) -> str:
    """Why a part cannot run here; empty if it can."""
    if left_s < part.least_s:
        return f"{max(0.0, left_s):.0f} s are left, and it needs {part.least_s:.0f} s"
    if part.nf4 and machine["nf4"]:
        return f"bitsandbytes cannot quantise here: {machine['nf4']}"
    free = machine.get("free_memory_gb")
    if free is not None and free < part.memory_gb:
        return f"it needs {part.memory_gb:g} GB, and {free:.1f} GB of the GPU are free"
    return ""


def check(
    parts: Sequence[Part],
    machine: Mapping[str, Any],
    left_s: Callable[[], float],
    run: Callable[[Part, float], Outcome],
    write: Callable[[Sequence[Outcome]], None],
) -> list[Outcome]:
    """Runs what can run, and writes after each part."""
    outcomes: list[Outcome] = []
    for number, part in enumerate(parts, start=1):
        left = left_s()
        reason = why_not(part, machine, left)
        say(f"{number} of {len(parts)}, {part.name}" + (f": skipped, {reason}" if reason else ""))
        if reason:
            outcomes.append(Outcome(part.name, "skipped", reason))
        else:
            outcomes.append(run(part, min(part.box_s, left)))
            last = outcomes[-1]
            say(", ".join(filter(None, (f"{part.name}: {last.status}", last.reason))))
        write(outcomes)
    return outcomes


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", file=sys.stderr, flush=True)


def result(
    machine: Mapping[str, Any], outcomes: Sequence[Outcome], command: str, commit: str
) -> dict[str, Any]:
    """The content of gpu.json, in the form of the other results."""
    facts = {name: value for name, value in machine.items() if name not in ("versions", "what")}
    rows = [dict(row) for outcome in outcomes for row in outcome.rows]
    ratios = {name: value for row in rows for name, value in row.pop("ratios", {}).items()}
    parts = []
    for outcome in outcomes:
        about = asdict(outcome)
        del about["rows"]
        parts.append(about)
    return {
        "machine": record.host() | facts,
        "versions": {"python": platform.python_version(), **machine["versions"]},
        "commit": commit,
        "command": command,
        "parts": parts,
        "rows": rows,
        "ratios": {name: float(f"{value:.4g}") for name, value in ratios.items()},
    }


def shown(found: Mapping[str, Any]) -> str:
    """The terminal's table."""
    columns: dict[str, Callable[[Any], str]] = {
        "part": str,
        "what": str,
        "tokens_per_s": lambda value: f"{value:,.0f}",
        "seconds": lambda value: f"{value:.3g}",
        "peak_memory_gb": lambda value: f"{value:.1f}",
        "predicted_memory_gb": lambda value: f"{value:.1f}",
        "skipped": str,
    }
    lines = [record.table(found["rows"], columns), ""]
    lines += [f"{name}: {value}" for name, value in found["ratios"].items()]
    lines += [
        f"{part['part']}: {part['status']}, {part['reason']}"
        for part in found["parts"]
        if part["status"] != "measured"
    ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    given = parsed(words)
    if given.part:
        failed = False
        for event in events(given.part, given.miniature, given.memory_gb):
            print(MARK + json.dumps(event), flush=True)
            failed |= "error" in event
        return int(failed)
    parts = [part for part in PARTS if not given.parts or part.name in given.parts]

    def left_s() -> float:
        return 60 * given.minutes - END_S - (time.monotonic() - STARTED)

    def run(name: str, box_s: float, memory_gb: float | None) -> Outcome:
        if given.miniature:
            return gathered(name, events(name, True, memory_gb))
        return in_process(name, box_s, memory_gb)

    first = run("machine", min(MACHINE_S, left_s()), None)
    machine = first.rows[0] if first.rows else {}
    if first.status != "measured" or (not given.miniature and machine.get("gpu") is None):
        reason = first.reason or "torch sees no CUDA device"
        print(f"nothing measured: {reason}. Try the script without one: --miniature")
        return 1
    arguments = " ".join(sys.argv[1:] if words is None else words)
    command = f"make gpu-check ({arguments})" if arguments else "make gpu-check"
    commit = given.commit or record.commit()

    def write(outcomes: Sequence[Outcome]) -> None:
        if given.out is not None:
            found = result(machine, outcomes, command, commit)
            record.write_json(given.out, found)

    outcomes = check(
        parts,
        machine,
        left_s,
        lambda part, box_s: run(part.name, box_s, machine.get("gpu_memory_gb")),
        write,
    )
    found = result(machine, outcomes, command, commit)
    print(json.dumps(found, indent=1) if given.json else shown(found))
    return int(any(outcome.status == "failed" for outcome in outcomes))


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=names, help="only these")
    parser.add_argument("--out", type=Path, help="default: results/gpu.json beside this file")
    parser.add_argument("--json", action="store_true", help="print the file's content, no table")
    parser.add_argument("--commit", default="", help="of a copy without git")
    parser.add_argument(
        "--miniature", action="store_true", help="tiny models on the CPU; writes no file unasked"
    )
    parser.add_argument("--part", choices=["machine", *names], help=argparse.SUPPRESS)
    parser.add_argument("--memory-gb", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.out is None and not given.miniature:
        given.out = record.RESULTS / "gpu.json"
    return given


if __name__ == "__main__":
    sys.exit(main())
