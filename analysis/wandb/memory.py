"""What a study's mirror has shown on W&B so far, in FOLDER/wandb/shown.json.

    {"online": {ID: [STAMP, ROWS]}, "offline": {...},
     "waiting": [[RUN FOLDER, ID, STAMP, ROWS], ...],
     "open": [RUN FOLDER, ...],
     "alerts": [EVENT, ...]}

ROWS is the number of history rows shown. `waiting` lists runs that ended offline and are on no
server yet, in push order. W&B marks a pushed run by a file beside its log (see
ebbline.analysis.wandb.push).

`open` lists the offline runs of trainings at work. A mirror that was killed leaves their folders
without an end; the next one removes them and shows these trainings anew, from their first step.

`alerts` lists the events of which an alert was sent (ebbline.analysis.wandb.alerts).

Invariants: only the mirror writes the file. Other entries are of runs that have ended. A waiting
run is removed once the same run was shown online.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from ebbline.tasks.files import write_whole

Mode = Literal["online", "offline", "disabled"]
LOST = "lost"  # the stamp of a run whose training was lost or has failed
MARKER = "run-{id}.wandb.synced"  # written by W&B when a server has the whole log of a run


class Waiting(NamedTuple):
    """A run that ended offline and waits to be pushed."""

    folder: str
    id: str
    stamp: str
    rows: int


class Memory:
    """`folder` is the study's; W&B writes to its subfolder `wandb`."""

    def __init__(self, folder: Path, mode: Mode) -> None:
        self.folder, self._mode = folder / "wandb", mode
        self._path = self.folder / "shown.json"
        read = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._shown: dict[str, dict[str, list[str | int]]] = {
            name: read.get(name, {}) for name in ("online", "offline")
        }
        self._waiting = [Waiting(*entry) for entry in read.get("waiting", [])]
        self._open: list[str] = []
        self._alerts: list[str] = read.get("alerts", [])
        for name in read.get("open", []):
            shutil.rmtree(self.folder / Path(name).name, ignore_errors=True)
        for entry in [entry for entry in self._waiting if _pushed(self.folder, entry)]:
            self._shown["online"][entry.id] = [entry.stamp, entry.rows]
            self._waiting.remove(entry)

    def was_shown(self, id: str, stamp: str) -> bool:
        """Whether this state of the run was shown. Online, runs shown only offline do not count."""
        return any(shown.get(id, [""])[0] == stamp for shown in self._reached())

    def begun(self, id: str) -> bool:
        """Whether any part of this run was shown before, offline or online."""
        return any(id in shown for shown in self._shown.values())

    def has_ended(self, id: str) -> bool:
        """Whether the run was shown to its end, and not only until its training was lost."""
        return any(shown[id][0] != LOST for shown in self._shown.values() if id in shown)

    def rows(self, id: str) -> int:
        """The number of history rows that the run already has."""
        return max(int(shown.get(id, ["", 0])[1]) for shown in self._reached())

    def remember(self, id: str, stamp: str, rows: int, run_folder: str) -> None:
        """Records that a run has ended with this stamp and number of history rows."""
        self._shown[self._mode][id] = [stamp, rows]
        if self._mode == "online":
            self._waiting = [entry for entry in self._waiting if entry.id != id]
        else:
            self._waiting.append(Waiting(run_folder, id, stamp, rows))
        self._open = [name for name in self._open if name != run_folder]
        self._write()

    def opened(self, run_folder: str) -> None:
        """Records that a run shows a training at work."""
        if self._mode == "offline":
            self._open.append(run_folder)
            self._write()

    @property
    def alerts(self) -> frozenset[str]:
        """The events of which an alert was sent."""
        return frozenset(self._alerts)

    def alert(self, events: Iterable[str]) -> None:
        """Records that an alert of these events is sent now."""
        self._alerts.extend(events)
        self._write()

    def _write(self) -> None:
        content = {
            **self._shown,
            "waiting": self._waiting,
            "open": self._open,
            "alerts": self._alerts,
        }
        text = json.dumps(content, indent=1, sort_keys=True)
        write_whole(self._path, lambda path: path.write_text(text))

    def waiting(self) -> Iterator[Path]:
        """The folders of the runs that wait to be pushed, oldest first."""
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
    """Whether the run was pushed. `wandb clean` removes pushed runs, so a missing folder counts."""
    run = folder / entry.folder
    return not run.exists() or (run / MARKER.format(id=entry.id)).exists()
