"""The live page's data as JSON values: the drive's state, points, stages, trainings and failures.

Invariants: it only reads. It holds counts, rates, settings, keys and reasons, never a prompt or
completion. A browser sends the revision that it has and gets the changes since, at most MOST rows
at a time. Points are read only while a browser asks, and for at most a fifth of the time, so large
studies are read less often.
"""

import shlex
import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from ebbline.analysis.dashboard.curves import ended_curve, running_curve
from ebbline.analysis.figures.drawing import looks
from ebbline.analysis.figures.gantt import colours, lanes_of
from ebbline.analysis.results.collect import Follower
from ebbline.analysis.results.costs import cost_label, point_costs
from ebbline.analysis.results.frontier import (
    finished,
    frontier,
    frontier_by_model,
    frontier_hypervolume,
)
from ebbline.analysis.results.measurements import is_defended
from ebbline.analysis.results.picks.choices import chosen
from ebbline.analysis.results.wording import (
    NO_RESULT,
    axis_label,
    directed_label,
    metric_label,
    progress_label,
    reason_label,
    settings_label,
    status_label,
    value_label,
)
from ebbline.cluster.schedule.pace import pace_sentence
from ebbline.cluster.schedule.simulate import Span
from ebbline.sweeps.drive.live import TIMELINE, AtWork, Ended, Live, read_live
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.state.spending import read_spent
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import STATUSES, Result, StageName, training_of
from ebbline.sweeps.study.space import limit
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.defences.defence import SHARE_COLUMN
from ebbline.tasks.errors import DatabaseLost, EbblineError, StoreError
from ebbline.tasks.kinds import STAGE_KINDS
from ebbline.tasks.measuring.metrics import Metric

MOST = 1000  # most rows in one answer
SPANS = 2000  # the latest stages, shown in the Gantt chart
FAILURES = 200
WATCHED_S = 15.0  # the page counts as watched for this long after a request
READ_S, IDLE_S = 1.0, 5.0  # pause between reads while the study is driven, and otherwise
SHARE = 5  # reading takes at most 1/SHARE of the time
Row = dict[str, Any]


class Changes:
    """Rows by section and name, each with the revision of its last change.

    Deleted rows are not reported; other rows imply them (`timeline` names the existing stages).
    """

    def __init__(self) -> None:
        self.revision = 0
        self._rows: dict[tuple[str, str], tuple[int, Row]] = {}  # in the order of their revisions
        self._names: dict[str, set[str]] = defaultdict(set)

    def replace(self, section: str, rows: Mapping[str, Row]) -> None:
        """Sets the rows of a section."""
        for name in self._names[section] - rows.keys():
            del self._rows[section, name]
        self._names[section] = set(rows)
        for name, row in rows.items():
            before = self._rows.get((section, name))
            if before is None or before[1] != row:
                self.revision += 1
                self._rows.pop((section, name), None)
                self._rows[section, name] = self.revision, row

    def since(self, revision: int) -> tuple[int, bool, dict[str, dict[str, Row]]]:
        """The revision reached, whether more changes follow, and the oldest changes by section."""
        new: deque[tuple[int, str, str, Row]] = deque(maxlen=MOST)
        for (section, name), (at, row) in reversed(self._rows.items()):
            if at <= revision:
                break
            new.append((at, section, name, row))
        found: dict[str, dict[str, Row]] = defaultdict(dict)
        for _, section, name, row in reversed(new):
            found[section][name] = row
        reached = max((at for at, *_ in new), default=revision)
        return reached, reached < self.revision, found


class LivePage:
    """The current state of one study for any number of browsers. Its methods are thread-safe."""

    def __init__(self, view: StudyView) -> None:
        self.study, self.home, self.folder = view.study, view.home, view.folder
        self._boot = uuid.uuid4().hex[:8]
        self._follower = Follower(view)
        self._changes, self._lock = Changes(), threading.Lock()
        self._results: list[Result] = []
        self._rows: dict[int, tuple[Result, Row]] = {}
        self._error = ""
        self._last_request, self._watched = 0.0, threading.Event()
        self._timeline, self._read_at = Timeline(view.home, view.study.study), 0.0
        self._drive: Row = {}
        self._attempts: dict[str, str] = {}  # of running trainings, by key
        threading.Thread(target=self._read_points_while_watched, daemon=True, name="points").start()

    def about(self) -> Row:
        """The values that do not change while the page is open."""
        return {
            "study": self.study.study,
            "objectives": [
                {"name": name, "label": directed_label(name)} for name in self.study.objectives[:2]
            ],
            "of": len(self.study.objectives),
            "looks": looks(self.study.models),
            "kinds": list(STAGE_KINDS),
            "colours": colours(),
            "limit": limit(self.study),
        }

    def since(self, cursor: str) -> Row:
        """The changes since `cursor`, which comes from the previous answer.

        For any other text everything is sent, in parts.
        """
        boot, _, number = cursor.partition(".")
        revision = int(number) if boot == self._boot and number.isdecimal() else 0
        self._last_request = time.monotonic()
        self._watched.set()
        with self._lock:
            self._read_drive()
            reached, more, changed = self._changes.since(revision)
            cursor = f"{self._boot}.{reached}"
            return {
                "cursor": cursor,
                "fresh": revision == 0,
                "more": more,
                "drive": self._drive,
                "changed": changed,
                "error": self._error,
            }

    def point(self, number: int) -> Row | None:
        """All values of a point; None if there is no point of that number."""
        results = self._results
        if not 0 <= number < len(results):
            return None
        result = results[number]
        return {
            **self._row(result),
            "reason": result.reason,
            SHARE_COLUMN: result.changed_share,
            "all_metrics": {
                metric_label(name): _metric(metric)
                for name, metric in sorted(result.metrics.items())
            },
            "all_keys": dict(sorted(result.keys.items())),
            "story": [
                {
                    "stage": name,
                    "key": key,
                    "cost": cost_label(result.costs[key], self.home.profile)
                    if key in result.costs
                    else "not run yet",
                    "command": self._rerun(name, key),
                }
                for name, key in result.keys.items()
            ],
        }

    def _rerun(self, name: str, key: str) -> str:
        """The command that runs a stage again in one process; empty if its record is gone."""
        own = StageName.parse(name).part.partition(":")[0]
        kinds = (
            [own] if own in STAGE_KINDS else [k.name for k in STAGE_KINDS.values() if k.has_metrics]
        )
        with suppress(StoreError):
            for artifact in filter(None, (self.home.store.find(kind, key) for kind in kinds)):
                request = f"{self.home.store.url(artifact.folder)}/log/request.json"
                return f"ebbline rerun {shlex.quote(request)}"
        return ""

    def curve(self, key: str) -> Row:
        """A training's values by step (ebbline.analysis.dashboard.curves)."""
        artifact = None
        with suppress(StoreError):
            artifact = self.home.store.find("train", key)
        if artifact is not None:
            return ended_curve(artifact)
        with self._lock:
            attempt = self._attempts.get(key, "")
        return running_curve(self.home.store, attempt)

    def _read_drive(self) -> None:
        """Reads the snapshot and the timeline, at most twice a second for all browsers."""
        now = time.monotonic()
        if now - self._read_at < 0.5:
            return
        self._read_at = now
        live, holder = read_live(self.folder), None
        with suppress(DatabaseLost):  # _read_points reports the error
            holder = self.home.holder(self.study.study)
        running = live.running if live is not None and holder else ()
        self._drive = _drive(live, holder)
        if self._timeline.read_new() or self._timeline.running != list(running):
            self._changes.replace("spans", self._timeline.rows(running))
        self._changes.replace("timeline", {"": self._timeline.summary()})
        at_work = {each.key: each for each in running if each.kind == "train"}
        self._changes.replace("at_work", {"": {key: each.label for key, each in at_work.items()}})
        self._attempts = {key: each.attempt for key, each in at_work.items()}

    def _read_points_while_watched(self) -> None:
        while True:
            self._watched.wait()
            if time.monotonic() - self._last_request > WATCHED_S:
                self._watched.clear()
                continue
            began = time.monotonic()
            self._read_points()
            duration_s, driven = time.monotonic() - began, self._drive.get("driver")
            time.sleep(max(READ_S if driven else IDLE_S, (SHARE - 1) * duration_s))

    def _read_points(self) -> None:
        try:
            results, before = self._follower.look(), self._follower.before()
            sections = self._sections(results, before)
        except (
            EbblineError,
            OSError,
            ValueError,
            KeyError,
        ) as error:  # the drive may be writing; the next read will succeed
            self._error = f"the points could not be read: {str(error) or type(error).__name__}"
            return
        with self._lock:
            self._results, self._error = results, ""
            for section, rows in sections.items():
                self._changes.replace(section, rows)

    def _sections(
        self, results: Sequence[Result], before: Mapping[str, Mapping[str, Metric]]
    ) -> dict[str, dict[str, Row]]:
        counts = Counter(result.status for result in results)
        by_model = {
            model: [result.number for result in own]
            for model, own in frontier_by_model(results, self.study.objectives).items()
        }
        over_all = [result.number for result in frontier(results, self.study.objectives)]
        volume = frontier_hypervolume(results, self.study.objectives) if finished(results) else 0.0
        spent = read_spent(self.folder)
        return {
            "points": {
                str(result.number): self._row(result)
                for result in results
                if result.status == "done"
            },
            "frontier": {
                "": {
                    "by_model": by_model,
                    "all": over_all,
                    "hypervolume": volume,
                    "picked": [
                        result.number if result.same_as is None else result.same_as
                        for result in chosen(results, self.folder)
                    ],
                }
            },
            "before": {
                model: {name: _metric(metric) for name, metric in metrics.items()}
                for model, metrics in before.items()
            },
            "trainings": dict(_trainings(results)),
            "failed": {
                "": {
                    "latest": [_failed(result) for result in results if result.status in NO_RESULT][
                        -FAILURES:
                    ]
                }
            },
            "counts": {
                "": {
                    "points": {status_label(status): counts[status] for status in STATUSES},
                    "spent": cost_label(spent.cost, self.home.profile),
                    "stopped": spent.stopped.reason if spent.stopped else "",
                }
            },
        }

    def _row(self, result: Result) -> Row:
        """A point's row for the plots and tables; cached while its result is the same object."""
        cached = self._rows.get(result.number)
        if cached is not None and cached[0] is result:
            return cached[1]
        seeds = seeds_of(result)
        cost = point_costs([result]).get(result.number)
        row = {
            "number": result.number,
            "model": result.point.model,
            "settings": settings_label(result.point),
            "status": status_label(result.status),
            "same_as": result.same_as,
            "defended": is_defended(result),
            "seeds": [str(seed) for seed in self.study.seeds[:seeds]],
            "metrics": {
                name: _metric(result.metrics[name])
                for name in self.study.objectives
                if name in result.metrics
            },
            "cost": "nothing has run"
            if cost is None
            else cost_label(cost.alone, self.home.profile),
            "keys": {
                kind.name: result.keys[name]
                for kind in STAGE_KINDS.values()
                if kind.shows_key
                and (name := f"{kind.name}[seed={self.study.seeds[0]}]") in result.keys
            },
        }
        self._rows[result.number] = result, row
        return row


class Timeline:
    """The stages that ended, read incrementally from the study's timeline, and their GPUs."""

    def __init__(self, home: Home, study: str) -> None:
        self._path = home.path(study) / TIMELINE
        self._offset = 0
        self.total = 0
        self.ended: deque[tuple[int, Ended]] = deque(maxlen=SPANS)
        self.running: list[AtWork] = []

    def read_new(self) -> bool:
        """Reads the lines that were added; returns whether there were any."""
        before = self.total
        with suppress(FileNotFoundError), self._path.open("rb") as handle:
            handle.seek(self._offset)
            text = handle.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offset += len(whole)
            for line in whole.splitlines():
                with suppress(ValidationError):
                    self.ended.append((self.total, Ended.model_validate_json(line)))
                    self.total += 1
        return self.total > before

    def rows(self, running: Sequence[AtWork]) -> dict[str, Row]:
        """A row for each stage, with its GPUs and its times in seconds since 1970.

        `ended` is None while the stage runs.
        """
        self.running = list(running)
        stages: list[tuple[str, Ended | AtWork]] = [
            (str(number), each) for number, each in self.ended
        ]
        stages += zip(self._names(), running, strict=True)
        lanes = lanes_of([_span(each) for _, each in stages])
        return {name: _bar(each, used) for (name, each), used in zip(stages, lanes, strict=True)}

    def summary(self) -> Row:
        """The number of ended stages, the first of them with a row, and the running stages."""
        return {
            "total": self.total,
            "first": self.total - len(self.ended),
            "running": self._names(),
        }

    def _names(self) -> list[str]:
        return [f"{each.key} {each.started}" for each in self.running]


def _span(stage: Ended | AtWork) -> Span:
    """A stage on its hosts; a gang's GPUs are assumed to be spread evenly over its hosts."""
    hosts = stage.host.split(", ")
    ended = stage.ended if isinstance(stage, Ended) else float("inf")
    return Span(
        stage.key,
        stage.started,
        stage.started,
        ended,
        dict.fromkeys(hosts, stage.gpus // len(hosts)),
    )


def _bar(stage: Ended | AtWork, lanes: Iterable[tuple[str, bool, int]]) -> Row:
    return {
        "kind": stage.kind,
        "label": stage.label,
        "key": stage.key,
        "started": stage.started,
        "ended": stage.ended if isinstance(stage, Ended) else None,
        "outcome": stage.outcome if isinstance(stage, Ended) else "running",
        "lanes": [f"{host} {'GPU' if gpu else 'slot'} {number}" for host, gpu, number in lanes],
        "expected_s": stage.expected_s if isinstance(stage, AtWork) else None,
    }


def _drive(live: Live | None, holder: str | None) -> Row:
    """The state of the drive; without a driver, `live` is the last snapshot."""
    snapshot = None if live is None else live.model_dump(mode="json")
    if live is not None and snapshot is not None:
        for row, stage in zip(snapshot["running"], live.running, strict=True):
            row["progress_text"] = progress_label(stage)
        snapshot["pace_text"] = pace_sentence(live.pace)
    if snapshot is not None and not holder:
        snapshot |= {"running": [], "left_s": 0.0}
    return {"driver": holder, "now": time.time(), "live": snapshot}


def _metric(metric: Metric) -> list[float | int | None]:
    """Value, ends of the 95% interval, number of samples, standard deviation between seeds, and
    number of undecided samples.
    """
    low, high = metric.interval
    spread = metric.between_seeds
    return [
        round(metric.value, 6),
        round(low, 6),
        round(high, 6),
        metric.n,
        None if spread is None else round(spread, 6),
        metric.undecided,
    ]


def _failed(result: Result) -> Row:
    reason, _, command = reason_label(result.reason).partition(" (to see it again")
    return {
        "what": f"point {result.number}: {result.point}",
        "status": status_label(result.status),
        "reason": reason,
        "command": command.removeprefix(":").removesuffix(")").strip(),
    }


def _trainings(results: Iterable[Result]) -> Iterator[tuple[str, Row]]:
    """Key, label and settings of each training; the label is of the first point that uses it."""
    yielded = set[str]()
    for result in results:
        for name, key in result.keys.items():
            parsed = StageName.parse(name)
            if parsed.part == "train" and key not in yielded:
                yielded.add(key)
                training = training_of(result.point)
                settings = {axis_label(axis): value_label(value) for axis, value in training.values}
                yield (
                    key,
                    {
                        "label": f"{training} seed={parsed.seed} (point {result.number})",
                        "axes": {"model": training.model, **settings, "seed": str(parsed.seed)},
                    },
                )
