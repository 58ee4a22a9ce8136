"""A study of many points, driven to its end on a virtual clock: `python -m
tests.benchmarks.bench_scale`, part of `make bench-search`.

The driver, the search, the runner, the scheduler and the store are the real ones; only the stages
do not run. What would have run writes a few bytes that depend on the point, and commits them. So
what is measured is what ebbline itself takes: asking and telling, a turn of the driver's loop,
memory, opening the finished study again, and its plan. Each part is a process of its own.

Each row is written as soon as it is measured, and scale.json after each part and when the benchmark
is cut off. `--keep FOLDER` keeps the study there; started again with the same folder, it goes on
where it was.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import yaml

from ebbline.cluster.executors.executor import Capacity, Finished, Host
from ebbline.cluster.store.artifacts import Store
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.drive.progress import Progress
from ebbline.sweeps.forecast.forecast import forecast
from ebbline.sweeps.search.searcher import WAIT, StudySearcher
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study_file import parse, source_of
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.measuring.metrics import Sample, write_samples
from tests.sweeps.made import ORGANISM, TUNED
from tests.sweeps.pretended import Pretended

WIDE = 64  # points in flight
CAPACITY = Capacity(tuple(Host(f"host{number}", 8, 2) for number in range(8)))
ROWS = "rows.jsonl"
Row = Mapping[str, Any]
PARTS = ("search", "drive", "resume", "look", "plan")
# Virtual seconds, about those of a 7B model.
SECONDS = {
    "language": 5.0,
    "organism": 1800.0,
    "data": 5.0,
    "train": 1800.0,
    "project": 60.0,
    "apply": 5.0,
    "generate": 120.0,
    "score": 5.0,
}


class Timed(Pretended):
    """Knows how long pretending took, which no study does, and forgets what has ended, as a cluster
    does.
    """

    own_processes = True  # so the snapshot is written once a second, as for a cluster

    def __init__(self, store: Store) -> None:
        super().__init__(store, seconds=lambda request: SECONDS[request.kind])
        self._capacity = CAPACITY
        self.took_s = 0.0
        self.turns = 0

    def finished(self, timeout_s: float) -> Sequence[Finished]:
        self.turns += 1
        return super().finished(timeout_s)

    def _end(self, finished: Finished) -> Finished:
        began, before = time.monotonic(), set(self.requests)
        ended = super()._end(finished)
        for key in {*finished.job.keys, *(self.requests.keys() - before)}:
            del self.requests[key]
        self.took_s += time.monotonic() - began
        return ended


def study_file(folder: Path, points: int, sampler: str | None) -> Path:
    """One size, two suites, and a space far larger than the points asked of it. Models, data and
    prompts are made by stages, which every point's stages read from.
    """
    study = {
        "study": "scale",
        "question": "What does a study of this many points take of its driver?",
        "models": {"small": {"base": ORGANISM, "aligned": {"tuned": TUNED}}},
        "data": {"pool": {"language": "benign.jsonl"}, "settings": {"size": 64}},
        "train": {},
        "axes": {
            "train.rank": {"low": 1, "high": 64, "step": 1},
            "data.size": {"low": 64, "high": 4096, "step": 64},
            "apply.threshold": {"low": 0.0, "high": 1.0},
        },
        "suites": {
            name: {"prompts": {"language": f"{name}.jsonl"}, "measure": {"kind": name}}
            for name in ("refusal", "task")
        },
        "objectives": ["refusal_rate", "task_accuracy"],
        "search": {"points": points, "window": WIDE, **({"sampler": sampler} if sampler else {})},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def memory_mb() -> float:
    return psutil.Process().memory_info().rss / 1024**2


class Watch:
    """Times of ask and tell, of a turn of the loop beside these, and memory as points complete."""

    def __init__(self, part: str, every: int, write: Callable[[Row], None]) -> None:
        self._part, self._write = part, write
        self.times: dict[str, list[float]] = {"ask": [], "tell": [], "turn": []}
        self.rows: list[dict[str, Any]] = []
        self.began = self._turned = time.monotonic()
        self._every = self._due = every
        self.executor: Timed | None = None
        self._pretended_s = self.searched_s = 0.0
        self._turns = 0

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.monotonic()
            try:
                return function(*arguments, **named)
            finally:
                self.times[name].append(time.monotonic() - began)
                self.searched_s += self.times[name][-1]

        return timed

    def __call__(self, progress: Progress) -> None:
        now, pretended_s = time.monotonic(), self.executor.took_s if self.executor else 0.0
        # Of one turn the driver calls its watcher twice when stages have started
        if self.executor is None or self.executor.turns > self._turns:
            other_s = pretended_s - self._pretended_s + self.searched_s
            self.times["turn"].append(now - self._turned - other_s)
            self._turned, self._pretended_s, self.searched_s = now, pretended_s, 0.0
            self._turns = 0 if self.executor is None else self.executor.turns
        if progress.completed >= self._due:
            self.record(progress.completed, len(progress.runner.nodes))
            self._due = self._every * (progress.completed // self._every + 1)

    def record(self, completed: int, nodes: int) -> None:
        row: dict[str, Any] = {
            "part": self._part,
            "points": completed,
            "stages": nodes,
            "memory_mb": memory_mb(),
        }
        row["ebbline_s"] = time.monotonic() - self.began - self._pretended_s
        for name, times in self.times.items():
            if times:  # at the end nothing is asked any more
                row |= {
                    f"{name}_ms": 1e3 * statistics.mean(times),
                    f"{name}_worst_ms": 1e3 * max(times),
                }
            times.clear()
        self.rows.append(row)
        self._write(row)


def driven(study_path: Path, home: Home, every: int, write: Callable[[Row], None]) -> None:
    """The study from its first point to its last."""
    watch = Watch("drive", every, write)

    def make() -> Timed:
        home.keep_file("scale", source_of(str(study_path)))
        watch.executor = Timed(home.store)
        return watch.executor

    with ExitStack() as stack:
        stack.enter_context(patch("tests.sweeps.pretended.write_samples", few_samples))
        for name in ("ask", "tell"):
            stack.enter_context(
                patch.object(StudySearcher, name, watch.timed(name, getattr(StudySearcher, name)))
            )
        progress = drive(StudyView(parse(study_path), home), make, watch)
    if not watch.rows or watch.rows[-1]["points"] < progress.completed:
        watch.record(progress.completed, len(progress.runner.nodes))
    done = sum(result.status == "done" for result in progress.results)
    trained = sum(progress.runner.counts["train"][state] for state in ("done", "reused"))
    write({"part": "all", "points": progress.completed, "done": done, "trainings": trained})


def few_samples(out: Path, samples: Sequence[Sample]) -> None:
    """A report reads samples, of which a pretended score has none."""
    kinds = ("even", "odd")
    write_samples(out, [Sample(str(n), kinds[n % 2], "refused", "", n % 3 > 0) for n in range(20)])


def searched(study_path: Path, home: Home, every: int, write: Callable[[Row], None]) -> None:
    """Only the search: every adapter's cosines are known once one of its points has ended, and
    nothing has stages.
    """
    from tests.sweeps.made import Imagined, outcome  # the same for the same point

    study, watch, known = parse(study_path), Watch("search", every, write), Imagined(modules=224)
    searcher = StudySearcher(study, home.database(study.study))
    ask, tell = watch.timed("ask", searcher.ask), watch.timed("tell", searcher.tell)
    in_flight, completed, left = [], 0, True
    while left or in_flight:
        asked = ask(known) if left and len(in_flight) < WIDE else WAIT
        left = asked is not None
        if isinstance(asked, tuple):
            in_flight.append(asked)
        elif in_flight:
            number, point = in_flight.pop(0)
            tell(number, outcome(number, point))
            completed += 1
            if completed % every == 0:
                watch.record(completed, 0)


def resumed(study_path: Path, home: Home, write: Callable[[Row], None]) -> None:
    """A driver of a finished study: it reads every point from the store, and has nothing to run."""
    began, cpu_s = time.monotonic(), time.process_time()
    progress = drive(StudyView(parse(study_path), home), lambda: Timed(home.store))
    row = {
        "part": "resume",
        "points": progress.completed,
        "stages": len(progress.runner.nodes),
        "seconds": time.monotonic() - began,
        "cpu_s": time.process_time() - cpu_s,
    }
    write({**row, "memory_mb": memory_mb()})


def planned(study_path: Path, home: Home, write: Callable[[Row], None]) -> None:
    """The plan of the study before it has run, and again when all is there."""
    study = parse(study_path)
    with tempfile.TemporaryDirectory() as empty:
        for name, where in (("before", Home(Path(empty))), ("after", home)):
            began, cpu_s = time.monotonic(), time.process_time()
            found = forecast(StudyView(study, where), CAPACITY)
            points = len(found.points.completed) + len(found.points.to_come)
            row: dict[str, Any] = {
                "part": f"plan {name}",
                "points": points,
                "stages": len(found.todo.missing) + found.todo.there.total(),
            }
            row |= {"seconds": time.monotonic() - began, "cpu_s": time.process_time() - cpu_s}
            write({**row, "memory_mb": memory_mb()})


def looked_at(study_path: Path, root: Path, write: Callable[[Row], None]) -> None:
    """The commands that show a finished study, as a user runs them: whole processes. The second
    report finds that nothing has changed. The dashboard is measured from its start until its page
    has every point.
    """
    for name, arguments in (
        ("status", ["ebbline", "status", "scale", "--home", str(root)]),
        ("report", ["ebbline", "report", "scale", "--home", str(root)]),
        ("report again", ["ebbline", "report", "scale", "--home", str(root)]),
        ("dashboard", [__spec__.name, "--part", "page", str(study_path), str(root), "1"]),
    ):
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        write(
            {
                "part": name,
                "seconds": time.monotonic() - began,
                "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            }
        )


def page_loaded(root: Path, write: Callable[[Row], None]) -> None:
    """What a browser asks of the dashboard until it has all points."""
    from ebbline.analysis.dashboard.server import Site

    page = Site(StudyView.begun(root, "scale")).page
    answer, points = page.since(""), 0
    while not points or answer["more"]:
        points += len(answer["changed"].get("points", ()))
        if not answer["more"]:
            time.sleep(0.05)
        answer = page.since(answer["cursor"])
    points += len(answer["changed"].get("points", ()))
    write({"part": "page", "points": points})


def one_part(part: str, study_path: Path, root: Path, every: int) -> None:
    """Each row of the part is a line of rows.jsonl, beside the home."""
    home = Home(root)

    def write(row: Row) -> None:
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        shown = {
            name: round(value, 2) if isinstance(value, float) else value
            for name, value in row.items()
        }
        print(json.dumps(shown), file=sys.stderr)
        with (root.parent / ROWS).open("a") as file:
            file.write(json.dumps({**row, "peak_mb": peak_mb}) + "\n")

    match part:
        case "drive":
            driven(study_path, home, every, write)
        case "search":
            searched(study_path, Home(root.with_name("search")), every, write)
        case "resume":
            resumed(study_path, home, write)
        case "look":
            looked_at(study_path, root, write)
        case "page":
            page_loaded(root, write)
        case _:
            planned(study_path, home, write)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--sampler", help="the study's own default, unless given")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the study lies meanwhile; a memory disk keeps the disk out of it",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        help="keep the study in this folder, and go on with what is there",
    )
    parser.add_argument("--dry", action="store_true", help="write no record")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with ExitStack() as stack:
        if given.keep is None:
            here = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="bench-scale-", dir=given.folder)
            )
        else:
            given.keep.mkdir(parents=True, exist_ok=True)
            here = str(given.keep)
        study_path = study_file(Path(here), given.points, given.sampler)
        for part in given.parts:
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.bench_scale",
                "--part",
                part,
                str(study_path),
                f"{here}/home",
            ]
            try:
                subprocess.run(
                    [*command, str(max(1, given.points // 10))],
                    check=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
            finally:  # also when it is cut off
                rows = Path(here) / ROWS
                lines = rows.read_text().splitlines() if rows.exists() else []
                written([json.loads(line) for line in lines], given.dry)


def written(rows: Sequence[Mapping[str, Any]], dry: bool) -> None:
    from tests.benchmarks import record  # brings torch, whose memory is not the driver's

    names = list(dict.fromkeys(name for row in rows for name in row))
    print(
        record.table(
            rows,
            {
                name: (lambda value: f"{value:.1f}" if isinstance(value, float) else str(value))
                for name in names
            },
        )
    )
    ratios: dict[str, float] = {}
    for part in ("search", "drive"):
        own = [row for row in rows if row["part"] == part]
        asked = [row for row in own if "ask_ms" in row and "tell_ms" in row]
        if asked:
            ratios[f"{part}: ask and tell / 50 ms, after {asked[-1]['points']} points"] = (
                asked[-1]["ask_ms"] + asked[-1]["tell_ms"]
            ) / 50
        if own:
            ratios[f"{part}: memory at the end / after a tenth"] = (
                own[-1]["memory_mb"] / own[0]["memory_mb"]
            )
        if own and "turn_ms" in own[-1]:
            ratios[f"{part}: turn / 10 ms"] = own[-1]["turn_ms"] / 10
    aims_s = {"resume": 3.0, "status": 5.0, "report": 5.0, "report again": 5.0, "dashboard": 5.0}
    aims_s |= {"plan before": 2.0, "plan after": 2.0}
    ratios |= {
        f"{row['part']} / {aims_s[row['part']]:g} s": row["seconds"] / aims_s[row["part"]]
        for row in rows
        if row["part"] in aims_s
    }
    print("\n".join(f"{name}: {value:.3g}" for name, value in ratios.items()))
    if not dry:
        command = " ".join(["python -m tests.benchmarks.bench_scale", *sys.argv[1:]])
        path = record.write("scale", command, ("optuna", "sqlalchemy"), rows, ratios)
        print(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        one_part(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
