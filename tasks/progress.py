"""How far a stage is: its worker writes progress.json into the attempt's log, the driver reads it.

The numbers are fields. The code that shows them writes the sentence.
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
    """`done` of `total` items; `note` says what they are. The items of a training are steps, with
    the loss and the learning rate of the latest step.
    """

    done: int
    total: int
    note: str = ""
    loss: float | None = None
    learning_rate: float | None = None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "StageProgress":
        """From the content of progress.json. An earlier version wrote no loss field, but had the
        loss in the note.
        """
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in names})


class ProgressFile:
    """Writes the progress of one stage, at most twice a second; without a path it writes nothing. A
    stage in a pack of `packed` stages reports its share of the time since its first step.
    """

    def __init__(self, path: Path | None, packed: int = 1) -> None:
        self._path, self._packed = path, packed
        self._started, self._last = time.monotonic(), 0.0
        # Where this attempt began to count: a resumed attempt does not begin at 0
        self._first: tuple[int, float] | None = None

    def count(self, done: int, total: int, note: str) -> None:
        self._write(done, total, {"note": note})

    def step_done(self, step: int, steps: int, loss: float, learning_rate: float) -> None:
        self._write(step, steps, {"note": "", "loss": loss, "learning_rate": learning_rate})

    def _write(self, done: int, total: int, extra: Mapping[str, Any]) -> None:
        if done > 0 and self._first is None:
            self._first = done - 1, time.monotonic()
        if time.monotonic() - self._last < EVERY_S and done != total:
            return
        self._last = time.monotonic()
        own, since = (done - self._first[0], self._first[1]) if self._first else (0, self._started)
        content = {
            "done": done,
            "total": total,
            **extra,
            "seconds": self._last - self._started,
            "own": own,
            "own_seconds": (self._last - since) / self._packed,
        }
        # Progress is optional: on a full disk, writing the results raises the error. A discarded
        # attempt's folder is not created anew.
        with contextlib.suppress(OSError):
            if self._path is not None and self._path.parent.exists():
                write_whole(self._path, lambda fresh: fresh.write_text(json.dumps(content)))
