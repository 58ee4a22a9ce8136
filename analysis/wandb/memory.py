"""What a study's mirror has shown on W&B so far: FOLDER/wandb/shown.json, written by the mirror
alone.

    {"online": {ID: [STAMP, ROWS]}, "offline": {...},
     "waiting": [[RUN FOLDER, ID, STAMP, ROWS], ...]}

ROWS is how much of a run's history it has. `waiting` are runs that ended offline and that no server
has. That one was pushed is W&B's own memory: it leaves a marker beside the log (see
ebbline.analysis.wandb.push).

Invariants: only what has ended is in it. What waits is pushed in its order, and is dropped once the
same run was shown online.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from ebbline.tasks.files import write_whole

Mode = Literal["online", "offline", "disabled"]
MARKER = "run-{id}.wandb.synced"  # W&B writes it when a server has taken all of a run's log


class Waiting(NamedTuple):
    """A run that ended offline."""

    folder: str
    id: str
    stamp: str
    rows: int


class Memory:
    """`folder` is the study's; what W&B itself writes is in its subfolder `wandb`."""

    def __init__(self, folder: Path, mode: Mode) -> None:
        self.folder, self._mode = folder / "wandb", mode
        self._path = self.folder / "shown.json"
        read = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._shown: dict[str, dict[str, list[str | int]]] = {
            name: read.get(name, {}) for name in ("online", "offline")
        }
        self._waiting = [Waiting(*entry) for entry in read.get("waiting", [])]
        for entry in [entry for entry in self._waiting if _pushed(self.folder, entry)]:
            self._shown["online"][entry.id] = [entry.stamp, entry.rows]
            self._waiting.remove(entry)

    def knows(self, id: str, stamp: str) -> bool:
        """Whether this was shown. To a server that is reached later, what was only shown offline is
        new.
        """
        return any(shown.get(id, [""])[0] == stamp for shown in self._reached())

    def begun(self, id: str) -> bool:
        """Whether a part of this run was shown before, offline or online."""
        return any(id in shown for shown in self._shown.values())

    def rows(self, id: str) -> int:
        """How many rows of its history a run has already."""
        return max(int(shown.get(id, ["", 0])[1]) for shown in self._reached())

    def remember(self, id: str, stamp: str, rows: int, run_folder: str) -> None:
        """A run has ended with this to show."""
        self._shown[self._mode][id] = [stamp, rows]
        if self._mode == "online":
            self._waiting = [entry for entry in self._waiting if entry.id != id]
        else:
            self._waiting.append(Waiting(run_folder, id, stamp, rows))
        text = json.dumps({**self._shown, "waiting": self._waiting}, indent=1, sort_keys=True)
        write_whole(self._path, lambda path: path.write_text(text))

    def waiting(self) -> Iterator[Path]:
        """The folders of the runs that are still to be pushed, oldest first."""
        yield from (
            self.folder / entry.folder for entry in self._waiting if not _pushed(self.folder, entry)
        )

    def _reached(self) -> list[dict[str, list[str | int]]]:
        return (
            [self._shown["online"]]
            if self._mode == "online"
            else [self._shown["online"], self._shown["offline"]]
        )


def _pushed(folder: Path, entry: Waiting) -> bool:
    """`wandb clean` removes the folders of pushed runs, so a folder that is not there has been
    pushed.
    """
    run = folder / entry.folder
    return not run.exists() or (run / MARKER.format(id=entry.id)).exists()
