"""The live snapshot of a drive. `ebbline run`, `ebbline status --watch` and the dashboard show it.

    HOME/studies/NAME/live.json          the state of the drive (Live); replaced whole, at most
                                         once a second
    HOME/studies/NAME/timeline.jsonl     one line for each stage that ended (Ended), of all
                                         drives; append-only

Invariant: both files are for watchers only. No driver reads them, and a driver that cannot write
them logs one warning and continues. When no driver holds the study
(ebbline.sweeps.study.home.Home.holder), live.json describes the last drive; if its `ended` is
null, that driver was killed. ebbline.sweeps.drive.snapshot writes both files.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from ebbline.sweeps.ledger import whole_lines
from ebbline.sweeps.study.points import Value, current_command, current_reason
from ebbline.tasks.progress import StageProgress

LIVE, TIMELINE = "live.json", "timeline.jsonl"
STATES = ("done", "reused", "running", "waiting", "ready", "failed")

Outcome = Literal["done", "failed", "lost"]
End = Literal["done", "request", "budget", "gain", "error"]


# Fields with another name in the files
JSON_NAMES = {"completed": "told", "sentence": "said", "spent_by_drive": "taken"}


class _Snapshot(BaseModel):
    """Immutable. Fields of later versions are ignored."""

    model_config = ConfigDict(
        frozen=True,
        alias_generator=lambda name: JSON_NAMES.get(name, name),
        validate_by_name=True,
        serialize_by_alias=True,
    )


class PointCounts(_Snapshot):
    """Number of completed points over all drives, their maximum, and the number in flight.

    `amended` counts how often a further seed changed the metrics of a point in this drive.
    """

    completed: int
    limit: int | None
    in_flight: int
    amended: int = 0


class Gpus(_Snapshot):
    """GPUs of the cluster. `logical` is true when the type of every GPU is unknown."""

    total: int
    busy: int
    logical: bool = False


class HostNow(_Snapshot):
    name: str
    gpus: int
    busy: int


class SpentNow(_Snapshot):
    """GPU-hours, dollars (null without a price), and seconds of driving."""

    gpu_hours: float = 0.0
    usd: float | None = None
    driving_s: float = 0.0


class Expected(_Snapshot):
    """The predicted wall time and cost of this drive."""

    wall_s: float
    gpu_hours: float
    usd: float | None


class TrainingNow(_Snapshot):
    """The settings that a training depends on, and its seed."""

    model: str
    settings: Mapping[str, Value]
    seed: int


class AtWork(_Snapshot):
    """A stage at work. `expected_s` is its expected total time in seconds, from `started`.

    `attempt` is its attempt's folder below the store. `training` says what a training trains.
    `progress` is None until the stage reports some. Earlier versions wrote a `sentence` instead.
    """

    kind: str
    label: str
    key: str
    host: str
    gpus: int
    started: float
    expected_s: float
    attempt: str = ""
    training: TrainingNow | None = None
    progress: StageProgress | None = None
    sentence: str = ""


class Failed(_Snapshot):
    """A stage that failed, and the command that reproduces it in one process.

    For a point with invalid settings, `kind` is "point"; `key` and `command` are empty.
    """

    kind: str
    label: str
    key: str
    reason: Annotated[str, AfterValidator(current_reason)]
    command: Annotated[str, AfterValidator(current_command)]


class Ended(_Snapshot):
    """A stage that ended. A `lost` one was at work when its job ended; this drive or the next one
    retries it.
    """

    kind: str
    label: str
    key: str
    host: str
    gpus: int
    started: float
    ended: float
    outcome: Outcome


class Live(_Snapshot):
    """The state of a drive at the time `at`. Times are seconds since 1970. `stages` counts stages
    by kind and state (STATES).

    `spent` is the total of all drives of the study. `spent_by_drive` is the part of this drive, to
    compare with `predicted`. `left_s` is the expected time in seconds of all that is in flight.
    `pace` is how long stages take, relative to earlier runs (ebbline.cluster.schedule.pace).
    `failures` are the latest ones of this drive, without the failures that they caused.
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
    spent_by_drive: SpentNow = SpentNow()
    left_s: float
    pace: float = 1.0
    budget: Mapping[str, float]
    running: Sequence[AtWork]
    failures: Sequence[Failed]


def read_live(folder: Path) -> Live | None:
    """The latest snapshot in a study's folder; None when there is no readable one."""
    try:
        return Live.model_validate_json((folder / LIVE).read_bytes())
    except (OSError, ValidationError):
        return None


def read_timeline(folder: Path) -> list[Ended]:
    """The stages that ended, in that order. Unreadable lines are skipped."""
    found = list[Ended]()
    for line in whole_lines(folder / TIMELINE):
        with suppress(ValidationError):
            found.append(Ended.model_validate_json(line))
    return found


def host_names(folder: Path) -> set[str]:
    """The names of the hosts that a study has run on, from live.json and timeline.jsonl."""
    live = read_live(folder)
    names = {each.name for each in live.hosts} if live is not None else set[str]()
    for line in whole_lines(folder / TIMELINE):  # a long one; of each line only the host
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and isinstance(found.get("host"), str):
                names.add(found["host"])
    return names - {""}
