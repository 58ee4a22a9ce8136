"""What the live page shows, as JSON values: how the drive stands, every point, the stages that ran,
trainings, failures.

Invariants: it reads and never writes; it holds counts, rates, settings, keys and reasons, never a
prompt or completion. A browser says which revision it has and gets what has changed since, at most
MOST rows at a time. The points are looked at only while somebody watches, and for at most a fifth
of the time: of a study with very many points less often than of a small one.
"""

import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pandas as pd
from pydantic import ValidationError

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
from ebbline.analysis.results.measurements import is_projected
from ebbline.analysis.results.wording import (
    NO_RESULT,
    directed_label,
    metric_label,
    progress_label,
    settings_label,
    status_label,
)
from ebbline.cluster.schedule.simulate import Span
from ebbline.cluster.store.artifacts import Artifact
from ebbline.sweeps.drive.live import TIMELINE, AtWork, Ended, Live, read_live
from ebbline.sweeps.search.searcher import limit
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.state.spending import read_spent
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import STATUSES, Result, StageName, adapter_of
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.defences.in_use import DEFENCE
from ebbline.tasks.errors import DatabaseLost, EbblineError, StoreError
from ebbline.tasks.kinds import STAGE_KINDS
from ebbline.tasks.measuring.metrics import Metric
from ebbline.tasks.specs import TrainSpec

MOST = 1000  # rows in one answer
SPANS = 2000  # stages that the Gantt chart has, the latest
FAILURES = 200
STEPS = 1000  # of a training's curve
WATCHED_S = 15.0  # how long somebody who asked still watches
LOOK_S, IDLE_S, SHARE = 1.0, 5.0, 5
Row = dict[str, Any]


class Changes:
    """Rows by section and name, each with the revision at which it last changed. That a row has
    gone is not told: the page sees it from what a section's own rows say (`timeline` names the
    stages that there are).
    """

    def __init__(self) -> None:
        self.revision = 0
        self._rows: dict[tuple[str, str], tuple[int, Row]] = {}  # in the order of their revisions
        self._names: dict[str, set[str]] = defaultdict(set)

    def replace(self, section: str, rows: Mapping[str, Row]) -> None:
        """From now on a section has these rows."""
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
        """The revision that this brings a reader to, whether there is more, and the oldest changes
        by section.
        """
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
    """One study as it stands, for any number of browsers. Its methods may be called from several
    threads.
    """

    def __init__(self, view: StudyView) -> None:
        self.study, self.home, self.folder = view.study, view.home, view.folder
        self._boot = uuid.uuid4().hex[:8]
        self._follower = Follower(view)
        self._changes, self._lock = Changes(), threading.Lock()
        self._results: list[Result] = []
        self._rows: dict[int, tuple[Result, Row]] = {}
        self._error = ""
        self._asked, self._wanted = 0.0, threading.Event()
        self._timeline, self._looked = Timeline(view.home, view.study.study), 0.0
        self._drive: Row = {}
        self._seen: dict[str, dict[int, float]] = defaultdict(
            dict
        )  # losses of trainings that run, by step
        threading.Thread(target=self._keep_looking, daemon=True, name="points").start()

    def about(self) -> Row:
        """What does not change while the page is open."""
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
        """What has changed since `cursor`, which is what the answer before this one gave;
        everything, in parts, for any other text.
        """
        boot, _, number = cursor.partition(".")
        known = int(number) if boot == self._boot and number.isdigit() else 0
        self._asked = time.monotonic()
        self._wanted.set()
        with self._lock:
            self._look_at_drive()
            reached, more, changed = self._changes.since(known)
            cursor = f"{self._boot}.{reached}"
            return {
                "cursor": cursor,
                "fresh": known == 0,
                "more": more,
                "drive": self._drive,
                "changed": changed,
                "error": self._error,
            }

    def point(self, number: int) -> Row | None:
        """All there is to say of a point; None when there is none of that number."""
        results = self._results
        if not 0 <= number < len(results):
            return None
        result = results[number]
        return {
            **self._row(result),
            "reason": result.reason,
            DEFENCE.words.share: result.changed_share,
            "all_metrics": {
                metric_label(name): _metric(metric)
                for name, metric in sorted(result.metrics.items())
            },
            "all_keys": dict(sorted(result.keys.items())),
        }

    def curve(self, key: str) -> Row:
        """A training's losses by step: of one that has ended all, of one that runs those that were
        seen since the page was opened.
        """
        artifact = None
        with suppress(StoreError):
            artifact = self.home.store.find("train", key)
        if artifact is None:
            with self._lock:
                seen = dict(self._seen.get(key, {}))
            said = (
                "runs; its losses so far, as seen since this page was opened"
                if seen
                else "has said nothing yet"
            )
            return {
                "steps": list(seen),
                "losses": list(seen.values()),
                "said": said,
                "ended": False,
            }
        return _curve(artifact)

    def _look_at_drive(self) -> None:
        """Take in the snapshot, and what has ended since; at most twice a second, however many
        browsers ask.
        """
        now = time.monotonic()
        if now - self._looked < 0.5:
            return
        self._looked = now
        live, holder = read_live(self.folder), None
        with suppress(DatabaseLost):  # the points cannot be read either, and that is said
            holder = self.home.holder(self.study.study)
        running = live.running if live is not None and holder else ()
        self._drive = _drive(live, holder)
        if self._timeline.look() or self._timeline.running != list(running):
            self._changes.replace("spans", self._timeline.rows(running))
        self._changes.replace("timeline", {"": self._timeline.told()})
        at_work = {each.key: each for each in running if each.kind == "train"}
        self._changes.replace("at_work", {"": {key: each.label for key, each in at_work.items()}})
        for key in self._seen.keys() - at_work.keys():
            del self._seen[key]
        for key, each in at_work.items():
            if each.progress is not None and each.progress.loss is not None:
                self._seen[key][each.progress.done] = each.progress.loss

    def _keep_looking(self) -> None:
        while True:
            self._wanted.wait()
            if time.monotonic() - self._asked > WATCHED_S:
                self._wanted.clear()
                continue
            began = time.monotonic()
            self._look_at_points()
            took, driven = time.monotonic() - began, self._drive.get("driver")
            time.sleep(max(LOOK_S if driven else IDLE_S, (SHARE - 1) * took))

    def _look_at_points(self) -> None:
        try:
            results, before = self._follower.look(), self._follower.before()
            sections = self._sections(results, before)
        except (
            EbblineError,
            OSError,
            ValueError,
            KeyError,
        ) as error:  # the drive may be writing; the next look will find it whole
            self._error = (
                f"the points could not be read just now: {str(error) or type(error).__name__}"
            )
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
            "frontier": {"": {"by_model": by_model, "all": over_all, "hypervolume": volume}},
            "before": {
                model: {name: _metric(metric) for name, metric in metrics.items()}
                for model, metrics in before.items()
            },
            "trainings": {key: {"label": label} for key, label in _trainings(results)},
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
        """A point as the plots and tables have it; made once for as long as the result is the
        same.
        """
        known = self._rows.get(result.number)
        if known is not None and known[0] is result:
            return known[1]
        seeds = seeds_of(result)
        cost = point_costs([result]).get(result.number)
        row = {
            "number": result.number,
            "model": result.point.model,
            "settings": settings_label(result.point),
            "status": status_label(result.status),
            "same_as": result.same_as,
            "projected": is_projected(result),
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
    """The stages that ended, from the study's timeline, of which only what is new is read; and the
    lanes of GPUs that they had.
    """

    def __init__(self, home: Home, study: str) -> None:
        self._path = home.folder(study) / TIMELINE
        self._offset = 0
        self.total = 0
        self.ended: deque[tuple[int, Ended]] = deque(maxlen=SPANS)
        self.running: list[AtWork] = []

    def look(self) -> bool:
        """Take in the lines that were added; whether there were any."""
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
        """A row for each stage and each lane that it had, with its moments in seconds since 1970;
        `ended` is None while it runs.
        """
        self.running = list(running)
        stages: list[tuple[str, Ended | AtWork]] = [
            (str(number), each) for number, each in self.ended
        ]
        stages += zip(self._names(), running, strict=True)
        lanes = lanes_of([_span(each) for _, each in stages])
        return {name: _bar(each, taken) for (name, each), taken in zip(stages, lanes, strict=True)}

    def told(self) -> Row:
        """How many stages there are, and which of them have a row: those from `first` on, and those
        that run.
        """
        return {
            "total": self.total,
            "first": self.total - len(self.ended),
            "running": self._names(),
        }

    def _names(self) -> list[str]:
        return [f"{each.key} {each.started}" for each in self.running]


def _span(stage: Ended | AtWork) -> Span:
    """A stage on the hosts that it had; of a gang on several each is taken to have lent as many
    GPUs.
    """
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
    """How the drive stands; `live` is the past when nobody drives the study now."""
    snapshot = None if live is None else live.model_dump(mode="json")
    if live is not None and snapshot is not None:
        for row, stage in zip(snapshot["running"], live.running, strict=True):
            row["said"] = progress_label(stage)
    if snapshot is not None and not holder:
        snapshot |= {"running": [], "left_s": 0.0}
    return {"driver": holder, "now": time.time(), "live": snapshot}


def _metric(metric: Metric) -> list[float | int | None]:
    """Value, both ends of the 95% interval, how many samples, and the standard deviation between
    seeds.
    """
    low, high = metric.interval
    spread = metric.between_seeds
    return [
        round(metric.value, 6),
        round(low, 6),
        round(high, 6),
        metric.n,
        None if spread is None else round(spread, 6),
    ]


def _failed(result: Result) -> Row:
    reason, _, command = result.reason.partition(" (to see it again")
    return {
        "what": f"point {result.number}: {result.point}",
        "status": status_label(result.status),
        "reason": reason,
        "command": command.removeprefix(":").removesuffix(")").strip(),
    }


def _trainings(results: Iterable[Result]) -> Iterator[tuple[str, str]]:
    """Key and label of each training that a point has, of the first point that has it."""
    seen = set[str]()
    for result in results:
        for name, key in result.keys.items():
            parsed = StageName.parse(name)
            if parsed.part == "train" and key not in seen:
                seen.add(key)
                yield key, f"{adapter_of(result.point)} seed={parsed.seed} (point {result.number})"


def _curve(artifact: Artifact) -> Row:
    try:
        frame = pd.read_csv(artifact.file(TrainSpec.CURVE))
    except (OSError, ValueError, StoreError) as error:
        return {
            "steps": [],
            "losses": [],
            "said": f"has ended, and its curve cannot be read ({type(error).__name__})",
            "ended": True,
        }
    every = max(1, -(-len(frame) // STEPS))
    shown = frame[(frame.index % every == 0) | (frame.index == len(frame) - 1)]
    provenance = artifact.provenance
    where = (
        f"{provenance.get('device', 'an unknown device')}, "
        f"{float(provenance.get('seconds', 0)):.0f} s"
    )
    said = f"{len(frame)} steps on {where}" + (f"; every {every}th is drawn" if every > 1 else "")
    return {
        "steps": shown["step"].tolist(),
        "losses": shown["loss"].tolist(),
        "said": said,
        "ended": True,
    }
