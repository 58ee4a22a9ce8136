"""The trainings that run now, with every step that they have reported.

A worker writes each step as it ends (ebbline.tasks.progress). This module finds the attempts of the
stages at work in the study's live snapshot and reads their steps from the store, which may be a
bucket. A training that continues from a checkpoint has all steps from the first.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebbline.sweeps.drive.curves import steps_so_far
from ebbline.sweeps.drive.live import TrainingNow, read_live
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.progress import TrainedStep

# What changes all the time; other values of `drive_status` change with an event
STEADY = frozenset({"hours", "status/spent_gpu_hours", "status/spent_usd", "status/hours_left"})
REQUEST = "request.json"  # in an attempt's log, as the runner writes it


@dataclass
class LiveRun:
    """An open W&B run, the key of its training, and the last step in its history: a row each.

    `absent` counts the updates since the training was last seen at work.
    """

    run: Any
    key: str
    rows: int = 0
    absent: int = 0

    def show(self, history: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Shows the steps after the last one that was shown."""
        for step, values in history:
            if step > self.rows:
                # W&B's client keeps a row without `commit` until the next step
                self.run.log(dict(values), step=step, commit=True)
                self.rows = step


@dataclass(frozen=True)
class LiveTraining:
    """A training at work. `attempt` is its attempt's folder below the store."""

    key: str
    trained: TrainingNow
    attempt: str
    spec: Mapping[str, Any]
    steps: tuple[TrainedStep, ...]


def live_trainings(view: StudyView) -> Iterator[LiveTraining]:
    """The points' trainings at work, with the steps so far. Empty while nobody drives the study.
    Alignments are left out: no page shows one once it has ended.
    """
    live = read_live(view.folder)
    if live is None or live.ended is not None or view.home.holder(view.study.study) is None:
        return
    store = view.home.store
    for stage in live.running:
        if stage.training is None or not stage.attempt:
            continue
        folder = store.root / stage.attempt
        request = store.log(folder, REQUEST)
        if request is None:  # it has ended since the snapshot
            continue
        yield LiveTraining(
            stage.key,
            stage.training,
            stage.attempt,
            json.loads(request)["spec"],
            tuple(steps_so_far(store, stage.attempt)),
        )


def drive_status(view: StudyView, trainings: Sequence[LiveTraining]) -> dict[str, float]:
    """What the study's run shows of the drive, in the sections `status` and `machine`: points,
    stages, GPUs, what is spent and left, and the sums over the machines that train (of utilisation,
    the mean over their GPUs). `hours` are those of driving. Empty before the first drive.
    """
    live = read_live(view.folder)
    if live is None:
        return {}
    states = Counter[str]()
    for counts in live.stages.values():
        states.update(counts)
    at_work = live.ended is None and view.home.holder(view.study.study) is not None
    status: dict[str, float | None] = {
        "at_work": float(at_work),
        "points_finished": live.points.completed,
        "points_in_flight": live.points.in_flight,
        "stages_running": states["running"],
        "stages_queued": states["waiting"] + states["ready"],
        "stages_failed": states["failed"],
        "gpus": live.gpus.total,
        "gpus_busy": live.gpus.busy,
        "spent_gpu_hours": live.spent.gpu_hours,
        "spent_usd": live.spent.usd,
        "hours_left": live.left_s / 3600,
    }
    latest = [
        next((step.usage for step in reversed(training.steps) if step.usage), {})
        for training in trainings
    ]
    gpus = [usage for usage in latest if any(name.startswith("gpu") for name in usage)]
    sums: dict[str, float | None] = {
        f"gpu_{what}": sum(
            value
            for usage in gpus
            for name, value in usage.items()
            if name.startswith("gpu") and name.endswith(what)
        )
        for what in ("memory_gb", "power_w")
        if gpus
    }
    used = [
        value
        for usage in gpus
        for name, value in usage.items()
        if name.startswith("gpu") and name.endswith("percent")
    ]
    if used:
        sums["gpu_percent"] = sum(used) / len(used)
    return {"hours": live.spent.driving_s / 3600} | {
        f"{section}/{name}": float(value)
        for section, values in (("status", status), ("machine", sums))
        for name, value in values.items()
        if value is not None
    }


def step_values(step: TrainedStep) -> dict[str, float]:
    """What W&B shows of a step. What the machine does is in the section `machine`."""
    named = {
        "loss": step.loss,
        "learning_rate": step.learning_rate,
        "tokens": float(step.tokens),
        "tokens_per_s": step.tokens_per_s,
        "gradient_norm": step.gradient_norm,
        "micro_batch": step.micro_batch,
        "peak_memory_gb": step.peak_memory_gb,
        "step_s": step.seconds,
        "fastest_member_s": step.fastest_s,
        "slowest_member_s": step.slowest_s,
    }
    values = {name: float(value) for name, value in named.items() if value is not None}
    return values | {f"machine/{name}": value for name, value in (step.usage or {}).items()}
