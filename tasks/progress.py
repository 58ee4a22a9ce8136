"""How far a stage is, as its worker tells the driver: progress.json in the attempt's log.

The numbers are fields. The sentence for people is made where it is shown.
"""

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ebbline.tasks.files import write_whole

PROGRESS = "progress.json"
EVERY_S = 0.5


@dataclass(frozen=True)
class StageProgress:
    """`done` of `total`, with a `note` on what is counted; of a training, the steps, and the loss
    and the learning rate of the latest.
    """

    done: int
    total: int
    note: str = ""
    loss: float | None = None
    learning_rate: float | None = None

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "StageProgress":
        """From what progress.json holds. An earlier version wrote no loss, and had it in the
        note.
        """
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in told.items() if name in names})


class ProgressFile:
    """Writes the progress of one stage, at most twice a second; without a path nothing is written.
    Of `packed` stages at once each tells its share of the time since its first step.
    """

    def __init__(self, path: Path | None, packed: int = 1) -> None:
        self._path, self._packed = path, packed
        self._started, self._last = time.monotonic(), 0.0
        # Where this attempt began to count: one that was resumed does not begin at 0
        self._first: tuple[int, float] | None = None

    def count(self, done: int, total: int, note: str) -> None:
        self._write(done, total, {"note": note})

    def step_done(self, step: int, steps: int, loss: float, learning_rate: float) -> None:
        self._write(step, steps, {"note": "", "loss": loss, "learning_rate": learning_rate})

    def _write(self, done: int, total: int, what: Mapping[str, Any]) -> None:
        if done > 0 and self._first is None:
            self._first = done - 1, time.monotonic()
        if time.monotonic() - self._last < EVERY_S and done != total:
            return
        self._last = time.monotonic()
        own, since = (done - self._first[0], self._first[1]) if self._first else (0, self._started)
        told = {
            "done": done,
            "total": total,
            **what,
            "seconds": self._last - self._started,
            "own": own,
            "own_seconds": (self._last - since) / self._packed,
        }
        # Progress is a courtesy: a full disk shows up where results are written, not here. An
        # attempt whose folder was removed meanwhile stays away.
        with contextlib.suppress(OSError):
            if self._path is not None and self._path.parent.exists():
                write_whole(self._path, lambda fresh: fresh.write_text(json.dumps(told)))
