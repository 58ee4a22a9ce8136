"""Writes the live snapshot of a drive (ebbline.sweeps.drive.live) while it runs.

Invariant: a heartbeat looks only at running and just ended stages, since a study may have very many
points.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebbline.cluster.profile import Profile
from ebbline.cluster.running.nodes import Node, Running
from ebbline.cluster.schedule.costs import Cost
from ebbline.sweeps.drive.live import (
    LIVE,
    STATES,
    TIMELINE,
    AtWork,
    End,
    Ended,
    Expected,
    Failed,
    Gpus,
    HostNow,
    Live,
    Outcome,
    PointCounts,
    SpentNow,
    TrainingNow,
)
from ebbline.sweeps.drive.progress import Progress
from ebbline.sweeps.ledger import open_to_append
from ebbline.sweeps.study.points import StageName, training_of
from ebbline.tasks.files import write_whole
from ebbline.tasks.specs import TrainSpec

EVERY_S = 1.0
FAILURES = 20
_log = logging.getLogger(__name__)


@contextmanager
def mirrored(progress: Progress, folder: Path, driver: str) -> Iterator["Writer"]:
    """Write the snapshots of a drive inside a `with`; an exception is recorded as its end."""
    writer = Writer(progress, folder, driver)
    try:
        yield writer
    except KeyboardInterrupt:
        writer.end("request")
        raise
    except BaseException:
        writer.end("error")
        raise
    writer.end(progress.by or "done")


@dataclass
class _Followed:
    """A running job: its stages that have not ended, in order, and when the first one started."""

    item: Running
    since: float
    ended: set[str] = field(default_factory=set)
    trainings: dict[str, TrainingNow | None] = field(default_factory=dict)  # by key

    @property
    def keys(self) -> list[str]:
        return [key for key in self.item.keys if key not in self.ended]


class Writer:
    """Writes the snapshot of one drive and its timeline, and sets `progress.live`.

    Call it at each heartbeat and after each start of a job.
    """

    def __init__(self, progress: Progress, folder: Path, driver: str) -> None:
        self._progress, self._runner, self._folder, self._driver = (
            progress,
            progress.runner,
            folder,
            driver,
        )
        self._started, self._wrote = time.time(), float("-inf")
        self._followed: dict[str, _Followed] = {}
        self._failures = deque[Failed](maxlen=FAILURES)
        self._invalid: set[int] = set()  # numbers of points in flight with invalid settings
        self._warned = False

    def __call__(self) -> None:
        self._look()
        # A stage in the driver's own process blocks the driver until it ends, so its start is
        # written at once.
        if time.monotonic() - self._wrote >= EVERY_S or (
            self._runner.running and not self._runner.executor.own_processes
        ):
            self._write(None)

    def end(self, ended: End) -> None:
        """Write the last snapshot. Stages that still run count as lost."""
        self._look()
        now = time.time()
        self._append(
            [
                self._ended(job, job.keys[0], now, "lost")
                for job in self._followed.values()
                if job.keys
            ]
        )
        self._followed.clear()
        self._write(ended)

    def _look(self) -> None:
        """Record new jobs, stages that ended, and points with invalid settings."""
        now = time.time()
        for name, item in self._runner.running.items():
            if name not in self._followed:
                self._followed[name] = _Followed(item, now - (time.monotonic() - item.started))
        ended = [line for name in list(self._followed) for line in self._follow(name, now)]
        self._append(ended)
        invalid = {entry.number: entry for entry in self._progress.in_flight if entry.invalid}
        for number in invalid.keys() - self._invalid:
            point, reason = invalid[number].point, invalid[number].invalid
            self._failures.append(
                Failed(kind="point", label=str(point), key="", reason=_line(reason), command="")
            )
        self._invalid = set(invalid)

    def _follow(self, name: str, now: float) -> list[Ended]:
        """The stages of a job that ended since the last heartbeat.

        Only the last one ended just now; the times of the others come from their records.
        """
        job = self._followed[name]
        job_ended = name not in self._runner.running
        states = {key: self._node(key).state for key in job.keys}
        ended_keys = [key for key in job.keys if states[key] in ("done", "failed")]
        found = list[Ended]()
        for key in ended_keys:
            artifact = self._node(key).artifact
            seconds = (
                now - job.since
                if artifact is None or key == ended_keys[-1]
                else float(artifact.provenance["seconds"])
            )
            found.append(
                self._ended(
                    job,
                    key,
                    min(now, job.since + seconds),
                    "done" if states[key] == "done" else "failed",
                )
            )
            job.ended.add(key)
            job.since = found[-1].ended
            failure = self._node(key).failure
            if failure is not None:
                label = self._progress.graph.label(self._node(key).stage)
                failed = Failed(
                    kind=found[-1].kind,
                    label=label,
                    key=key,
                    reason=_line(failure.reason),
                    command=failure.command,
                )
                self._failures.append(failed)
        if job_ended and job.keys:
            found.append(self._ended(job, job.keys[0], now, "lost"))
        if job_ended:
            del self._followed[name]
        return found

    def _node(self, key: str) -> Node:
        return self._runner.first_with(key)

    def _ended(self, job: _Followed, key: str, ended: float, outcome: Outcome) -> Ended:
        return Ended(**self._fields(job, key), ended=ended, outcome=outcome)

    def _fields(self, job: _Followed, key: str) -> dict[str, Any]:
        stage = self._node(key).stage
        label, hosts = self._progress.graph.label(stage), ", ".join(job.item.job.hosts)
        return {
            "kind": stage.kind,
            "label": label,
            "key": key,
            "host": hosts,
            "gpus": job.item.job.gpus,
            "started": job.since,
        }

    def _at_work(self) -> Iterator[AtWork]:
        """The first stage of each job that has not ended, and later ones that report progress.

        The latter are trainings that run together in one job.
        """
        now = time.time()
        for job in self._followed.values():
            for index, key in enumerate(job.keys):
                node = self._node(key)
                progress = self._runner.timing.progress_of(node)
                if index == 0 or progress:
                    expected_s = self._runner.timing.expected_s(node, now - job.since)
                    attempt = node.attempt
                    yield AtWork(
                        **self._fields(job, key),
                        expected_s=expected_s,
                        attempt="" if attempt is None else self._below_store(attempt),
                        training=self._training(job, node),
                        progress=progress,
                    )

    def _training(self, job: _Followed, node: Node) -> TrainingNow | None:
        """What a training trains, from the first point in flight that waits for it; None for
        another stage, and for one that no point waits for.
        """
        if node.stage.kind != TrainSpec.KIND:
            return None
        if node.key not in job.trainings:
            job.trainings[node.key] = next(
                (
                    TrainingNow(
                        model=entry.point.model,
                        settings=dict(training_of(entry.point).values),
                        seed=StageName.parse(name).seed,
                    )
                    for entry in self._progress.in_flight
                    for name, stage in entry.stages.items()
                    if stage.kind == TrainSpec.KIND
                    and stage.lineage == node.stage.lineage
                    and StageName.parse(name).part == TrainSpec.KIND
                ),
                None,
            )
        return job.trainings[node.key]

    def _below_store(self, attempt: Path) -> str:
        return attempt.relative_to(self._runner.store.root).as_posix()

    def _snapshot(self, ended: End | None) -> Live:
        progress, runner = self._progress, self._runner
        spent, before, profile, prediction = (
            progress.spending.spent(),
            progress.spending.before,
            progress.spending.profile,
            progress.prediction,
        )
        hosts = runner.capacity.hosts if runner.capacity is not None else ()
        held = [item.job.hosts for item in runner.running.values()] if ended is None else []
        busy = {host.name: sum(each.get(host.name, 0) for each in held) for host in hosts}
        expected = None
        if prediction is not None:
            cost = prediction.cost
            expected = Expected(
                wall_s=prediction.wall_s, gpu_hours=cost.gpu_hours, usd=cost.usd(profile)
            )
        return Live(
            driver=self._driver,
            at=time.time(),
            started=self._started,
            ended=ended,
            points=PointCounts(
                completed=progress.completed,
                limit=progress.limit,
                in_flight=len(progress.in_flight),
                amended=progress.amended,
            ),
            stages={
                kind: {state: counts[state] for state in STATES}
                for kind, counts in runner.counts.items()
            },
            gpus=Gpus(
                total=sum(host.gpus for host in hosts),
                logical=all(host.gpu_type is None for host in hosts),
                busy=sum(busy.values()),
            ),
            hosts=[HostNow(name=host.name, gpus=host.gpus, busy=busy[host.name]) for host in hosts],
            spent=_spent_now(spent.cost, spent.driving_s, profile),
            spent_by_drive=_spent_now(
                spent.cost + before.cost.times(-1), spent.driving_s - before.driving_s, profile
            ),
            predicted=expected,
            left_s=runner.remaining_s() if ended is None and hosts else 0.0,
            pace=runner.estimates.pace,
            budget=progress.study.budget.model_dump(exclude_none=True),
            running=list(self._at_work()) if ended is None else [],
            failures=list(self._failures),
        )

    def _write(self, ended: End | None) -> None:
        snapshot = self._progress.live = self._snapshot(ended)
        text = snapshot.model_dump_json()
        with self._warn_once():
            write_whole(self._folder / LIVE, lambda fresh: fresh.write_text(text))
        self._wrote = time.monotonic()

    def _append(self, ended: Sequence[Ended]) -> None:
        if ended:
            with self._warn_once(), open_to_append(self._folder / TIMELINE) as file:
                file.write("".join(f"{line.model_dump_json()}\n" for line in ended))

    @contextmanager
    def _warn_once(self) -> Iterator[None]:
        """Turn an OSError into one warning: a full disk must not stop the drive."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                _log.warning(
                    "%s cannot be written (%s): the run goes on, but other processes cannot "
                    "watch it",
                    self._folder / LIVE,
                    error,
                )
            self._warned = True


def _spent_now(cost: Cost, driving_s: float, profile: Profile) -> SpentNow:
    return SpentNow(gpu_hours=cost.gpu_hours, usd=cost.usd(profile), driving_s=driving_s)


def _line(reason: str) -> str:
    return (reason.splitlines() or [""])[0]
