"""The results of finished points, kept beside the study's database, so that a study of many points
opens without a look at each record.

    HOME/studies/NAME/results.cache     a line for each point: the sha256 of the rest, then JSON

The file can be deleted at any time: the points' database and the store remain the only truth. A
line counts only while everything that it was computed from is unchanged:

    what changes                              how it is noticed
    the study (not its search and budget),    the digest in the first line
    a stage's VERSION, any code of ebbline
    the point was retried, or lost            the number of its trial, and its state
    a record or a measured file was removed,  the stamp of each (size, inode and times), which are
    replaced, damaged or dropped              taken before they are read for the line
    a damaged line                            its sha256

Invariant: nothing is kept for a study with races, whose results depend on other points, and for a
store in a bucket, whose files have no stamps.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ebbline.cluster.schedule.costs import Origin, stage_cost
from ebbline.cluster.store.artifacts import RECORD, Artifact, Store
from ebbline.sweeps.ledger import open_to_append, whole_lines
from ebbline.sweeps.state.races.racing import ArtifactLookup, races
from ebbline.sweeps.state.trials import Entry
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.in_use import KINDS
from ebbline.tasks.files import write_whole
from ebbline.tasks.identity import digest
from ebbline.tasks.kinds import kind_named
from ebbline.tasks.measuring.metrics import METRICS, Metric
from ebbline.tasks.stage import Stage, closure

NAME = "results.cache"
# A line is written this long after its files were read, if their stamps are still the same. By then
# a change gets other times, also from a clock of the kernel that ticks each 10 ms.
SETTLED_S = 0.02
_SHA = 64
_CODE = ("tasks", "cluster", "sweeps")


@dataclass(frozen=True)
class _Line:
    """A result and the files that it was computed from, with the digest of their stamps."""

    text: str
    result: Result
    files: tuple[str, ...]
    stamp: str


class ResultCache:
    """Reads the results that still hold; `add` notes those of points that have ended."""

    def __init__(self, study: Study, store: Store, folder: Path) -> None:
        self._path, self._root = folder / NAME, str(store.root)
        self._enabled = store.cache is None and not any(races(study).values())
        self._header = _checked(json.dumps({"of": _identity(study)}))
        self._begun: dict[int, tuple[dict[str, Artifact], str]] = {}
        self._pending: list[tuple[float, _Line]] = []

    def read(self, entries: Sequence[Entry]) -> dict[int, Result]:
        """The results of finished points that need not be read from the store, by number."""
        return {number: line.result for number, line in self._lines(entries).items()}

    def read_to_write(self, entries: Sequence[Entry]) -> dict[int, Result]:
        """The same for the driver of the study, which may `add` afterwards. Removes other lines."""
        found = self._lines(entries)
        if self._enabled:
            text = "".join(
                f"{each}\n" for each in (self._header, *(f.text for f in found.values()))
            )
            try:
                if not self._path.exists() or self._path.read_bytes() != text.encode():
                    write_whole(self._path, lambda fresh: fresh.write_bytes(text.encode()))
            except OSError:  # it only saves time; a later line must not stand below an old header
                self._enabled = False
                with contextlib.suppress(OSError):
                    self._path.unlink(missing_ok=True)
        return {number: line.result for number, line in found.items()}

    def begin(self, number: int, stages: Iterable[Stage], lookup: ArtifactLookup) -> None:
        """Take the stamps of what a point's result is computed from, before it is read."""
        if self._enabled:
            found = [lookup.artifact(stage) for stage in closure(stages)]
            artifacts = {each.key: each for each in found if each is not None}
            stamp = self._stamp(_files(artifacts.values()), {})
            self._begun[number] = artifacts, stamp

    def add(self, entry: Entry, result: Result) -> None:
        """Note the result of a point that has ended, after it is in the database."""
        artifacts, stamp = self._begun.pop(result.number, ({}, ""))
        if stamp and result.status == "done" and _lasts(entry):
            text = _text(entry, result, artifacts.values(), stamp)
            line = _Line(text, result, _files(artifacts.values()), stamp)
            self._pending.append((time.monotonic(), line))
        self._write(time.monotonic() - SETTLED_S)

    def close(self) -> None:
        """Write the rest, once its files have settled."""
        if self._pending:
            time.sleep(SETTLED_S)
            self._write(time.monotonic())

    def _write(self, until: float) -> None:
        """Write the lines noted before, unless their files have changed since."""
        due = [line for at, line in self._pending if at <= until]
        if due:
            self._pending = [(at, line) for at, line in self._pending if at > until]
            seen: dict[str, str] = {}
            lines = [line for line in due if self._stamp(line.files, seen) == line.stamp]
            with contextlib.suppress(OSError), open_to_append(self._path) as file:
                file.write("".join(f"{line.text}\n" for line in lines))

    def _lines(self, entries: Sequence[Entry]) -> dict[int, _Line]:
        if not self._enabled:
            return {}
        try:
            header, *texts = whole_lines(self._path)
        except (OSError, ValueError):  # absent, damaged or unreadable: everything is read anew
            return {}
        if header != self._header:
            return {}
        seen: dict[str, str] = {}
        found: dict[int, _Line] = {}
        for text in texts:
            line = _line(text, entries)
            if line is not None and self._stamp(line.files, seen) == line.stamp:
                found[line.result.number] = line
        return dict(sorted(found.items()))

    def _stamp(self, files: Iterable[str], seen: dict[str, str]) -> str:
        """A digest that changes when one of the files is written, replaced or removed. `seen` has
        the stamps that were taken already.
        """
        stamps = []
        for name in files:
            stamp = seen.get(name)
            if stamp is None:
                try:
                    stat = os.stat(f"{self._root}/{name}")  # noqa: PTH116  # a Path takes as long again
                    stamp = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
                except OSError:
                    stamp = ""
                seen[name] = stamp
            stamps.append(stamp)
        return hashlib.sha256("\n".join(stamps).encode()).hexdigest()


def _files(artifacts: Iterable[Artifact]) -> tuple[str, ...]:
    return tuple(
        name
        for each in artifacts
        for name in _names(each.kind, each.key, each.folder.name, _read(each))
    )


def _read(artifact: Artifact) -> list[str]:
    """The files of an artifact that a result is computed from, beside its record."""
    if kind_named(artifact.kind).has_metrics:
        return [METRICS]
    return sorted(artifact.files) if artifact.kind in KINDS else []


def _names(kind: str, key: str, attempt: str, files: Iterable[str]) -> list[str]:
    """The names of an artifact's record and of some files, below the store."""
    below = f"{kind}/{key}/{attempt}/payload"
    return [f"{kind}/{key}/{RECORD}", *(f"{below}/{name}" for name in files)]


def _lasts(entry: Entry) -> bool:
    """Whether the result of a point is that of its first seeds, and can be measured again."""
    return entry.state == "done" and not entry.lost and entry.max_seeds is None


def _text(entry: Entry, result: Result, artifacts: Iterable[Artifact], stamp: str) -> str:
    listed = list(artifacts)
    place = {each.key: index for index, each in enumerate(listed)}
    return _checked(
        json.dumps(
            {
                "number": result.number,
                "trial": entry.trial,
                "model": entry.point.model,
                "values": entry.point.values,
                "metrics": {name: _fields(metric) for name, metric in result.metrics.items()},
                "keys": {name: place[key] for name, key in result.keys.items()},
                "seconds": result.seconds,
                "share": result.changed_share,
                "artifacts": [
                    [
                        each.kind,
                        each.key,
                        each.folder.name,
                        _read(each),
                        list(result.costs[each.key].gpu_s.items()),
                        list(result.costs[each.key].origin or ())[1:],
                    ]
                    for each in listed
                ],
                "stamp": stamp,
            },
            separators=(",", ":"),
            allow_nan=False,
        )
    )


def _fields(metric: Metric) -> list[object]:
    return [
        metric.name,
        metric.successes,
        metric.n,
        metric.undecided,
        metric.seeds,
        metric.squares,
        metric.seeds_undecided,
    ]


def _metric(fields: Sequence[object]) -> Metric:
    name, successes, n, undecided, seeds, squares, seeds_undecided = fields
    return Metric(name, successes, n, undecided, tuple(seeds), squares, tuple(seeds_undecided))  # type: ignore[arg-type]


def _line(text: str, entries: Sequence[Entry]) -> _Line | None:
    """The line of a text; None when it is damaged, or not of a point as the database has it."""
    body = text[_SHA:]
    if hashlib.sha256(body.encode()).hexdigest() != text[:_SHA]:
        return None
    found = json.loads(body)
    number = found["number"]
    entry = entries[number] if number < len(entries) else None
    if (
        entry is None
        or not _lasts(entry)
        or entry.trial != found["trial"]
        or entry.point.model != found["model"]
        or entry.point.values != tuple((axis, value) for axis, value in found["values"])
    ):
        return None
    artifacts = found["artifacts"]
    files = [
        name
        for kind, key, attempt, read, *_ in artifacts
        for name in _names(kind, key, attempt, read)
    ]
    result = Result(
        number,
        entry.point,
        "done",
        {name: _metric(fields) for name, fields in found["metrics"].items()},
        keys={
            sys.intern(name): sys.intern(artifacts[place][1])
            for name, place in found["keys"].items()
        },
        seconds=found["seconds"],
        changed_share=found["share"],
        costs={
            sys.intern(key): stage_cost(Origin(kind, *origin), tuple(map(tuple, gpu_s)))
            for kind, key, _, _, gpu_s, origin in artifacts
        },
    )
    return _Line(text, result, tuple(files), found["stamp"])


def _checked(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest() + text


def _identity(study: Study) -> str:
    """A digest of what the results of all points depend on."""
    dump = study.model_dump(mode="json")
    for name in ("search", "budget", "axes"):  # they choose the points
        dump.pop(name, None)
    return digest({"study": dump, "code": code_digest()})


@lru_cache(1)
def code_digest() -> str:
    """A digest of the program's own code below the analysis: keys, VERSIONs, and how results are
    computed.
    """
    found: Mapping[str, str] = {
        f"{folder}/{path.relative_to(root).as_posix()}": hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for folder in _CODE
        for root in [Path(__file__).parents[2] / folder]
        for path in sorted(root.rglob("*.py"))
    }
    return digest(found)
