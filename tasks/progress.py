"""How far a stage is: its worker writes progress.json into the attempt's log, the driver reads it.

The numbers are fields. The code that shows them writes the sentence. A training also writes a line
for each step into steps.jsonl, as soon as the step has ended:

    {"step": 3, "steps": 40, "loss": 1.2, "learning_rate": 1e-4, "tokens": 512, "seconds": 0.4, ...}

Invariant: the file of an attempt has every step from the first one. An attempt that continues from
a checkpoint begins with the steps of that checkpoint, without the fields that were not kept.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ebbline.tasks.files import write_whole

PROGRESS, STEPS = "progress.json", "steps.jsonl"
EVERY_S = 0.5


@dataclass(frozen=True)
class TrainedStep:
    """One optimiser step of a training. `step` counts from 1, `steps` is the number of all.

    `loss` is the mean over the `tokens` with a label, `gradient_norm` the length of the gradient
    before it is clipped. `seconds` is the time of the step on this process; `slowest_s` that of the
    slowest member of a gang, and `fastest_s` of the fastest. `micro_batch` is the rows of one pass
    on a device. `peak_memory_gb` is the most that was allocated on the device since the training
    began; on a CPU, of the process. None: not known, as of a step that an earlier attempt did.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens: int
    seconds: float | None = None
    gradient_norm: float | None = None
    micro_batch: int | None = None
    peak_memory_gb: float | None = None
    fastest_s: float | None = None
    slowest_s: float | None = None
    usage: Mapping[str, float] | None = None  # of the machine, as ebbline.tasks.usage reads it

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens with a label, for each second of the step."""
        return self.tokens / self.seconds if self.seconds else None


def read_steps(text: bytes) -> Iterator[TrainedStep]:
    """The steps in the content of steps.jsonl. A last line that is being written is left out, and
    so are unknown fields.
    """
    names = {field.name for field in fields(TrainedStep)}
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        content = json.loads(line)
        yield TrainedStep(**{name: value for name, value in content.items() if name in names})


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
    stage in a pack of `packed` stages reports its share of the time since its first step. `usage`
    is what the machine is doing, or None if it was read a moment ago.
    """

    def __init__(
        self,
        path: Path | None,
        packed: int = 1,
        usage: Callable[[], Mapping[str, float] | None] = lambda: None,
    ) -> None:
        self._path, self._packed, self._usage = path, packed, usage
        self._steps = 0  # the last step in steps.jsonl
        self._started, self._last = time.monotonic(), 0.0
        # Where this attempt began to count: a resumed attempt does not begin at 0
        self._first: tuple[int, float] | None = None

    def count(self, done: int, total: int, note: str) -> None:
        self._write(done, total, {"note": note})

    def step_done(self, step: TrainedStep) -> None:
        """Adds a step that was done now."""
        self._append([replace(step, usage=self._usage())])
        about = {"note": "", "loss": step.loss, "learning_rate": step.learning_rate}
        self._write(step.step, step.steps, about)

    def resumed(self, steps: Sequence[TrainedStep]) -> None:
        """Adds the steps that an earlier attempt did, which a checkpoint has kept."""
        self._append(steps)

    def _append(self, steps: Sequence[TrainedStep]) -> None:
        new = [step for step in steps if step.step > self._steps]
        if not new or self._path is None or not self._path.parent.exists():
            return
        self._steps = new[-1].step
        lines = [
            json.dumps({name: value for name, value in asdict(step).items() if value is not None})
            for step in new
        ]
        with contextlib.suppress(OSError), (self._path.parent / STEPS).open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))

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
