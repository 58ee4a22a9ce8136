"""The live snapshot of a drive, for those who watch it: `ebbline run`, and from other processes
`ebbline status --watch`, the dashboard.

    HOME/studies/NAME/live.json          how the drive stands (Live); replaced whole, at most once a
                                         second
    HOME/studies/NAME/timeline.jsonl     a line for each stage that ended (Ended), of all drives;
                                         only ever appended to

Both are mirrors: no driver reads them back, and one that cannot write them says so once and goes
on. A live.json whose study nobody drives now (ebbline.sweeps.study.home.Home.holder) is the past:
its driver was killed when `ended` is null. ebbline.sweeps.drive.snapshot takes them.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from ebbline.sweeps.ledger import whole_lines
from ebbline.sweeps.study.points import current_reason
from ebbline.tasks.progress import StageProgress

LIVE, TIMELINE = "live.json", "timeline.jsonl"
STATES = ("done", "reused", "running", "waiting", "ready", "failed")

Outcome = Literal["done", "failed", "lost"]
End = Literal["done", "request", "budget", "gain", "error"]


class _Said(BaseModel):
    """Immutable; what a later version says beside it is passed over."""

    model_config = ConfigDict(frozen=True)


class PointCounts(_Said):
    """How many points the search was told of, over all drives, how many there will be at most, and
    how many are under way.

    `amended` counts the times that a point's metrics were worked out again in this drive, with a
    further seed.
    """

    told: int
    limit: int | None
    in_flight: int
    amended: int = 0


class Gpus(_Said):
    """`logical` when none of them is known to be a real one."""

    total: int
    busy: int
    logical: bool = False


class HostNow(_Said):
    name: str
    gpus: int
    busy: int


class SpentNow(_Said):
    """GPU time, dollars (null without a price), and seconds of driving."""

    gpu_hours: float = 0.0
    usd: float | None = None
    driving_s: float = 0.0


class Expected(_Said):
    """What this drive was expected to take."""

    wall_s: float
    gpu_hours: float
    usd: float | None


class AtWork(_Said):
    """A stage at work: `expected_s` is what it is expected to take in all, from `started`.

    `progress` is None while it has told nothing. A snapshot of an earlier version has a sentence,
    `said`, in its place.
    """

    kind: str
    label: str
    key: str
    host: str
    gpus: int
    started: float
    expected_s: float
    progress: StageProgress | None = None
    said: str = ""


class Failed(_Said):
    """A stage that failed, and the command that reproduces it in one process; or a `point` whose
    settings are invalid (no key).
    """

    kind: str
    label: str
    key: str
    reason: Annotated[str, AfterValidator(current_reason)]
    command: str


class Ended(_Said):
    """A stage that ended. `lost` was at work when its job went: it is tried again, here or by the
    next drive.
    """

    kind: str
    label: str
    key: str
    host: str
    gpus: int
    started: float
    ended: float
    outcome: Outcome


class Live(_Said):
    """How a drive stood at `at`. Moments are seconds since 1970; `stages` counts by kind and state
    (STATES).

    `spent` is what all drives of the study took so far, `taken` this one alone, of what was
    `predicted` for it. `left_s` are the seconds expected for what is in flight. `failures` are the
    latest, of this drive, without those that they caused.
    """

    driver: str
    at: float
    started: float
    ended: End | None
    points: PointCounts
    stages: Mapping[str, Mapping[str, int]]
    gpus: Gpus
    hosts: Sequence[HostNow]
    spent: SpentNow
    predicted: Expected | None
    taken: SpentNow = SpentNow()
    left_s: float
    budget: Mapping[str, float]
    running: Sequence[AtWork]
    failures: Sequence[Failed]


def read_live(folder: Path) -> Live | None:
    """The latest snapshot in a study's folder; None when there is none that can be read."""
    try:
        return Live.model_validate_json((folder / LIVE).read_bytes())
    except (OSError, ValidationError):
        return None


def read_timeline(folder: Path) -> list[Ended]:
    """The stages that ended, in that order; one that cannot be read is passed over."""
    found = list[Ended]()
    for line in whole_lines(folder / TIMELINE):
        with suppress(ValidationError):
            found.append(Ended.model_validate_json(line))
    return found


def host_names(folder: Path) -> set[str]:
    """The hosts that a study has run on, as far as its records name them."""
    live = read_live(folder)
    named = {each.name for each in live.hosts} if live is not None else set[str]()
    return named | {each.host for each in read_timeline(folder) if each.host}
