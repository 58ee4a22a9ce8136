"""What driving a study has taken, over all its runs; and whether its budget affords more.

    HOME/studies/NAME/spending.jsonl     what its drivers say as it happens, a line each; they only
                                         ever append
        {"driver": "process 7 on h ...", "s": 0.0}  a driver began; `s` counts its seconds from here
        {"start": "ray-3", "gpus": [["A100", 1]], "hosts": {"h/1f": 1}, "keys": [...], "s": 12.1}
                                                    a job got its GPUs, if any; its id begins
                                                    with the name of its executor
        {"end": "ray-3", "s": 73.0}                 ... and gave them back
        {"s": 80.0}                                 the driver lives
        {"stopped": "the budget ...", "by": "budget", "rule": "", "points": 7, "s": 81.0}
                                                    why it asked for nothing more

The invariant: every second that a job of this study held a GPU is here, whether its stages came to
anything or not. A driver that is killed is counted to its last line, so a kill leaves out BEAT_S
seconds at most and what its workers took to end. Stages that were found in the store cost nothing.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from ebbline.cluster.executors.executor import ACCELERATOR_TYPE, Job
from ebbline.cluster.profile import Profile
from ebbline.cluster.schedule.costs import Cost, GpuTypes, total
from ebbline.sweeps.ledger import open_to_append, whole_lines
from ebbline.sweeps.study.study import Budget, Study
from ebbline.tasks.errors import StudyError

BEAT_S = 10.0
NAME = "spending.jsonl"


@dataclass(frozen=True)
class Stopped:
    """Why a driver asked for nothing more: in words, by what, under which rule (a digest), and how
    many points there were by then; for `gain`, those that the rule had counted.
    """

    said: str
    by: Literal["budget", "gain"]
    rule: str = ""
    points: int = 0


@dataclass(frozen=True)
class Spent:
    """Seconds of driving, the GPU time of all jobs, and the keys of the stages that they were
    started for.

    `stopped` is what the last driver ended with, while no other drives; `gain` the last time that
    the rule of `search.stop` was met.
    """

    driving_s: float = 0.0
    cost: Cost = field(default_factory=Cost)
    keys: frozenset[str] = frozenset()
    stopped: Stopped | None = None
    gain: Stopped | None = None


def read_spent(folder: Path) -> Spent:
    """What a study's drivers have said so far. Raises StudyError when a line is damaged, other than
    a last one that was cut off.
    """
    path = folder / NAME
    driving_s, costs, keys = 0.0, list[Cost](), set[str]()
    session = _Session()
    stopped: Stopped | None = None
    gain: Stopped | None = None
    for number, line in enumerate(whole_lines(path), 1):
        try:
            said = json.loads(line)
            if "driver" in said:
                driving_s, costs = driving_s + session.last_s, [*costs, session.cost()]
                session, stopped = _Session(), None
            if "stopped" in said:
                stopped = Stopped(
                    str(said["stopped"]), said["by"], str(said["rule"]), int(said["points"])
                )
                gain = stopped if stopped.by == "gain" else gain
            keys |= set(said.get("keys", ()))
            session.take(said)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StudyError(
                f"{path}, line {number} is damaged ({type(error).__name__}); mend or "
                "delete that line. What it said is then not counted"
            ) from error
    return Spent(
        driving_s + session.last_s, total([*costs, session.cost()]), frozenset(keys), stopped, gain
    )


@dataclass
class _Session:
    """One driver's part: jobs that ended, and those that hold GPUs still (until the last line, if
    the driver is gone).
    """

    last_s: float = 0.0
    ended: list[Cost] = field(default_factory=list)
    held: dict[str, tuple[float, GpuTypes]] = field(default_factory=dict)

    def take(self, said: Mapping[str, Any]) -> None:
        self.last_s = float(said["s"])
        if "start" in said:
            self.held[said["start"]] = (
                self.last_s,
                {name: int(count) for name, count in said["gpus"]},
            )
        if "end" in said:
            since, gpus = self.held.pop(
                said["end"], (self.last_s, {})
            )  # its start may be a line that was deleted as damaged
            self.ended.append(Cost.of(gpus, self.last_s - since))

    def cost(self) -> Cost:
        return total(
            [
                *self.ended,
                *(Cost.of(gpus, self.last_s - since) for since, gpus in self.held.values()),
            ]
        )


@dataclass
class _Held:
    """A job that holds GPUs: since when, and how long it was expected to."""

    since_s: float
    gpus: GpuTypes
    expected_s: float


class Spending:
    """The driver's side: writes the ledger, and is the runner's meter. Made by `spending`, by the
    driver that holds the study.
    """

    def __init__(
        self, study: Study, profile: Profile, before: Spent, file: TextIO, driver: str
    ) -> None:
        self.budget, self.profile = study.budget, profile
        self._before, self._file = (
            replace(before, keys=frozenset()),
            file,
        )  # `file` is open for appending
        self._started, self._said_s = time.monotonic(), 0.0
        self._ended, self._held = Cost(), dict[str, _Held]()
        self._say({"driver": driver})

    def spent(self) -> Spent:
        """By all runs of the study, up to now; without the stages' keys, of which there may be
        many: they are in the ledger.
        """
        now_s = self._now_s()
        held = total(Cost.of(job.gpus, now_s - job.since_s) for job in self._held.values())
        return Spent(self._before.driving_s + now_s, self._before.cost + self._ended + held)

    @property
    def before(self) -> Spent:
        """By the runs before this one, without the stages' keys."""
        return self._before

    @property
    def limited(self) -> bool:
        """Whether anything is limited that a stage takes."""
        return self.budget.model_copy(update={"points": None}) != Budget()

    @property
    def gain(self) -> Stopped | None:
        """The last time that the rule of `search.stop` was met, in an earlier run."""
        return self._before.gain

    def stopped(self, why: Stopped) -> None:
        """Say for good why nothing more is asked for."""
        self._say({"stopped": why.said, "by": why.by, "rule": why.rule, "points": why.points})

    def affords(self, gpus: GpuTypes, seconds: float) -> bool:
        if not any(gpus.values()) and self.budget.hours is None:
            return True  # what needs no GPU costs nothing, and may finish what is paid for
        return not self.crossed(Cost.of(gpus, seconds) + self._rest(), seconds)

    def crossed(self, more: Cost, seconds: float) -> str:
        """Which limit `more`, and so many seconds of driving from now, are expected to cross; empty
        when none.

        Raises StudyError when there is a limit in dollars, and no price for a type that was or
        would be used.
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

    def told(self, what: str, more: Cost, seconds: float) -> str:
        """Why nothing more starts: `what` would cross the budget."""
        name = self.crossed(more, seconds)
        if not name:
            return "the budget affords nothing more"
        spent, limit = self.spent(), getattr(self.budget, name)
        words = {
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
        used, wanted, of = words[name]
        if self.crossed(Cost(), 0.0) == name:
            return (
                f"the budget is used up: {used} of {of} spent, as what had started took "
                f"longer than expected; {what} does not start."
                f" Raise budget.{name} in the study file, and the same command goes on"
            )
        return (
            f"the budget ends here: {used} of {of} spent, and {what} is expected to take "
            f"{wanted} more."
            f" Raise budget.{name} in the study file, and the same command goes on"
        )

    def started(self, job: Job, gpus: GpuTypes, seconds: float) -> None:
        self._held[job.id] = _Held(self._now_s(), dict(gpus), seconds)
        held = [[name, count] for name, count in gpus.items()]
        self._say({"start": job.id, "gpus": held, "hosts": dict(job.hosts), "keys": list(job.keys)})

    def settle(self, running: Iterable[str]) -> None:
        """Take in which jobs still run; say that the driver lives."""
        for name in [name for name in self._held if name not in set(running)]:
            job = self._held.pop(name)
            self._say({"end": name})
            self._ended += Cost.of(job.gpus, self._said_s - job.since_s)
        if self._now_s() - self._said_s >= BEAT_S:
            self._say({})

    def _rest(self) -> Cost:
        """What the jobs that run are expected to cost from now on."""
        now_s = self._now_s()
        return total(
            Cost.of(job.gpus, max(0.0, job.expected_s - (now_s - job.since_s)))
            for job in self._held.values()
        )

    def _now_s(self) -> float:
        return time.monotonic() - self._started

    def _say(self, said: Mapping[str, Any]) -> None:
        self._said_s = self._now_s()
        self._file.write(json.dumps({**said, "s": round(self._said_s, 3)}) + "\n")
        self._file.flush()


@contextmanager
def spending(study: Study, profile: Profile, folder: Path, driver: str) -> Iterator[Spending]:
    """The ledger of a study, for the driver that holds it; a last line that was cut off is taken
    away.
    """
    with open_to_append(folder / NAME) as file:
        kept = Spending(study, profile, read_spent(folder), file, driver)
        try:
            yield kept
        finally:
            kept.settle([])
            kept._say({})


def require_prices(study: Study, profile: Profile) -> None:
    """Raise StudyError when a budget in dollars has no price for a type of GPU that the study
    names, or none at all.
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
    asked = (
        "search.stop.per_usd is given" if budget.usd is None else f"budget.usd is {budget.usd:g}"
    )
    return (
        f"{asked}, but cluster.yaml in the home has no price for "
        f"{' and '.join(sorted(set(missing)))};"
        f" add `gpus: {{{written}}}` there, or say it in GPU-hours"
    )
