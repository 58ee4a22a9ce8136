"""The cost of a study over all its runs, and whether its budget affords more.

    HOME/studies/NAME/spending.jsonl     the events of its drivers, a line each, append-only
        {"driver": "process 7 on h ...", "s": 0.0}  a driver began; `s` counts its seconds from here
        {"start": "ray-3", "gpus": [["A100", 1]], "hosts": {"h/1f": 1}, "keys": [...], "s": 12.1}
                                                    a job got its GPUs, if any; its id begins
                                                    with the name of its executor
        {"end": "ray-3", "s": 73.0}                 the job released them
        {"s": 80.0}                                 the driver is alive
        {"stopped": "the budget ...", "by": "budget", "rule": "", "points": 7, "s": 81.0}
                                                    why the driver proposed no further point

Invariant: the ledger has every second that a job of this study held a GPU, also for stages that
failed. A killed driver counts up to its last line. So a kill loses at most BEAT_S seconds and the
time until its workers ended. Stages found in the store cost nothing.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TextIO

from ebbline.cluster.executors.executor import ACCELERATOR_TYPE, Job
from ebbline.cluster.profile import Profile
from ebbline.cluster.schedule.costs import Cost, GpuTypes, total
from ebbline.sweeps.ledger import open_to_append, whole_lines
from ebbline.sweeps.study.policies import Budget
from ebbline.sweeps.study.study import Study
from ebbline.tasks.errors import StudyError

BEAT_S = 10.0
NAME = "spending.jsonl"


@dataclass(frozen=True)
class Stopped:
    """Why a driver proposed no further point. `rule` is a digest; `points` is the number of points
    until then, or for `gain` the number that the rule had counted.
    """

    reason: str
    by: Literal["budget", "gain"]
    rule: str = ""
    points: int = 0


@dataclass(frozen=True)
class Spent:
    """Seconds of driving, the GPU time of all jobs, and the keys of the stages in these jobs.

    `stopped` is how the last driver stopped, until another one begins. `gain` is the last time that
    the rule of `search.stop` was met.
    """

    driving_s: float = 0.0
    cost: Cost = field(default_factory=Cost)
    keys: frozenset[str] = frozenset()
    stopped: Stopped | None = None
    gain: Stopped | None = None


def read_spent(folder: Path) -> Spent:
    """The spending of a study so far. Raises StudyError for a damaged line; an incomplete last line
    is ignored.
    """
    path = folder / NAME
    try:
        found = path.stat()
    except FileNotFoundError:
        return Spent()
    return _read_spent(path, (found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(4)
def _read_spent(path: Path, stamp: tuple[int, int, int]) -> Spent:
    """Commands ask several times, and a study of ten thousand points has as many lines tenfold. A
    changed `stamp` reads the ledger again.
    """
    driving_s, costs, keys = 0.0, list[Cost](), set[str]()
    session = _Session()
    stopped: Stopped | None = None
    gain: Stopped | None = None
    for number, line in enumerate(whole_lines(path), 1):
        try:
            event = json.loads(line)
            if "driver" in event:
                driving_s, costs = driving_s + session.last_s, [*costs, session.cost()]
                session, stopped = _Session(), None
            if "stopped" in event:
                stopped = Stopped(
                    str(event["stopped"]), event["by"], str(event["rule"]), int(event["points"])
                )
                gain = stopped if stopped.by == "gain" else gain
            keys.update(event.get("keys", ()))
            session.add(event)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StudyError(
                f"{path}, line {number} is damaged ({type(error).__name__}); correct or "
                "delete that line. A deleted line is not counted"
            ) from error
    return Spent(
        driving_s + session.last_s, total([*costs, session.cost()]), frozenset(keys), stopped, gain
    )


@dataclass
class _Session:
    """The events of one driver: ended jobs, and jobs that hold GPUs (up to the last line, if the
    driver was killed).
    """

    last_s: float = 0.0
    ended: dict[str | None, float] = field(default_factory=dict)  # GPU-seconds by type
    held: dict[str, tuple[float, GpuTypes]] = field(default_factory=dict)

    def add(self, event: Mapping[str, Any]) -> None:
        self.last_s = float(event["s"])
        if "start" in event:
            self.held[event["start"]] = (
                self.last_s,
                {name: int(count) for name, count in event["gpus"]},
            )
        if "end" in event:
            since, gpus = self.held.pop(
                event["end"], (self.last_s, {})
            )  # the line of its start may have been deleted as damaged
            for name, count in gpus.items():
                if count:
                    more = count * (self.last_s - since)
                    self.ended[name] = self.ended.get(name, 0.0) + more

    def cost(self) -> Cost:
        return total(
            [
                Cost(self.ended),
                *(Cost.of(gpus, self.last_s - since) for since, gpus in self.held.values()),
            ]
        )


@dataclass
class _Held:
    """A job that holds GPUs, with its expected duration."""

    since_s: float
    gpus: GpuTypes
    expected_s: float


class Spending:
    """Writes the ledger and is the runner's meter. The driver that holds the study makes it by
    `spending`.
    """

    def __init__(
        self, study: Study, profile: Profile, before: Spent, file: TextIO, driver: str
    ) -> None:
        self.budget, self.profile = study.budget, profile
        self._before, self._file = (
            replace(before, keys=frozenset()),
            file,
        )  # `file` is open for append
        self._started, self._wrote_s = time.monotonic(), 0.0
        self._ended, self._held = Cost(), dict[str, _Held]()
        self._write({"driver": driver})

    def spent(self) -> Spent:
        """The spending of all runs up to now, without the keys of stages, which may be many."""
        now_s = self._now_s()
        held = total(Cost.of(job.gpus, now_s - job.since_s) for job in self._held.values())
        return Spent(self._before.driving_s + now_s, self._before.cost + self._ended + held)

    @property
    def before(self) -> Spent:
        """The spending of earlier runs, without the keys of stages."""
        return self._before

    @property
    def limited(self) -> bool:
        """Whether the budget limits the hours, GPU-hours or dollars of a stage."""
        return self.budget.model_copy(update={"points": None}) != Budget()

    @property
    def gain(self) -> Stopped | None:
        """The last time that the rule of `search.stop` was met, in an earlier run."""
        return self._before.gain

    def stopped(self, why: Stopped) -> None:
        """Write why no further point is proposed."""
        self._write({"stopped": why.reason, "by": why.by, "rule": why.rule, "points": why.points})

    def affords(self, gpus: GpuTypes, seconds: float) -> bool:
        if not any(gpus.values()) and self.budget.hours is None:
            return True  # a stage without GPUs costs nothing, and may finish a paid point
        return not self.crossed(Cost.of(gpus, seconds) + self._rest(), seconds)

    def crossed(self, more: Cost, seconds: float) -> str:
        """The name of the limit that `more` cost and `seconds` of driving are expected to cross, or
        the empty string.

        Raises StudyError for a limit in dollars without a price for a GPU type in use.
        """
        spent = self.spent()
        after = spent.cost + more
        if self.budget.usd is not None and after.usd(self.profile) is None:
            raise StudyError(_no_price(self.budget, after.unpriced(self.profile)))
        reached = {
            "hours": (spent.driving_s + seconds) / 3600,
            "gpu_hours": after.gpu_hours,
            "usd": after.usd(self.profile),
        }
        for name, value in reached.items():
            limit = getattr(self.budget, name)
            if limit is not None and value is not None and value > limit:
                return name
        return ""

    def over_budget(self, what: str, more: Cost, seconds: float) -> str:
        """The message that the budget stops `what` (a point or a stage)."""
        name = self.crossed(more, seconds)
        if not name:
            return "the budget affords nothing more"
        spent, limit = self.spent(), getattr(self.budget, name)
        amounts = {
            "hours": (f"{spent.driving_s / 3600:.3g}", f"{seconds / 3600:.3g}", f"{limit:g} hours"),
            "gpu_hours": (
                f"{spent.cost.gpu_hours:.3g}",
                f"{more.gpu_hours:.3g}",
                f"{limit:g} GPU-hours",
            ),
            "usd": (
                f"${spent.cost.usd(self.profile) or 0.0:.2f}",
                f"${more.usd(self.profile) or 0.0:.2f}",
                f"${limit:.2f}",
            ),
        }
        used, expected, of = amounts[name]
        if self.crossed(Cost(), 0.0) == name:
            return (
                f"the budget is used up: {used} of {of} spent, because running jobs took "
                f"longer than expected; {what} does not start."
                f" Raise budget.{name} in the study file, and the same command continues"
            )
        return (
            f"the budget ends here: {used} of {of} spent, and {what} is expected to take "
            f"{expected} more."
            f" Raise budget.{name} in the study file, and the same command continues"
        )

    def started(self, job: Job, gpus: GpuTypes, seconds: float) -> None:
        self._held[job.id] = _Held(self._now_s(), dict(gpus), seconds)
        held = [[name, count] for name, count in gpus.items()]
        self._write(
            {"start": job.id, "gpus": held, "hosts": dict(job.hosts), "keys": list(job.keys)}
        )

    def settle(self, running: Iterable[str]) -> None:
        """Write the end of jobs that are not in `running`, and that the driver is alive."""
        for name in [name for name in self._held if name not in set(running)]:
            job = self._held.pop(name)
            self._write({"end": name})
            self._ended += Cost.of(job.gpus, self._wrote_s - job.since_s)
        if self._now_s() - self._wrote_s >= BEAT_S:
            self._write({})

    def _rest(self) -> Cost:
        """The expected cost of the running jobs from now on."""
        now_s = self._now_s()
        return total(
            Cost.of(job.gpus, max(0.0, job.expected_s - (now_s - job.since_s)))
            for job in self._held.values()
        )

    def _now_s(self) -> float:
        return time.monotonic() - self._started

    def _write(self, event: Mapping[str, Any]) -> None:
        self._wrote_s = self._now_s()
        self._file.write(json.dumps({**event, "s": round(self._wrote_s, 3)}) + "\n")
        self._file.flush()


@contextmanager
def spending(study: Study, profile: Profile, folder: Path, driver: str) -> Iterator[Spending]:
    """The ledger of a study, for the driver that holds it. An incomplete last line is removed."""
    with open_to_append(folder / NAME) as file:
        ledger = Spending(study, profile, read_spent(folder), file, driver)
        try:
            yield ledger
        finally:
            ledger.settle([])
            ledger._write({})


def require_prices(study: Study, profile: Profile) -> None:
    """Raise StudyError when the study has a limit in dollars and the profile lacks the price of a
    named GPU type, or any price.
    """
    if study.budget.usd is None and (
        study.search.stop is None or study.search.stop.per_usd is None
    ):
        return
    named = {model.labels.get(ACCELERATOR_TYPE, "") for model in study.models.values()}
    types = sorted(name for name in named if name and not name.startswith(("!", "in(")))
    missing = [name for name in types if profile.price(name) is None] or (
        [] if profile.gpus else ["other"]
    )
    if missing:
        raise StudyError(_no_price(study.budget, missing))


def _no_price(budget: Budget, missing: Iterable[str]) -> str:
    written = ", ".join(f"{name}: {{usd_per_hour: ...}}" for name in sorted(set(missing)))
    setting = (
        "search.stop.per_usd is given" if budget.usd is None else f"budget.usd is {budget.usd:g}"
    )
    return (
        f"{setting}, but cluster.yaml in the home has no price for "
        f"{' and '.join(sorted(set(missing)))};"
        f" add `gpus: {{{written}}}` there, or give the limit in GPU-hours"
    )
