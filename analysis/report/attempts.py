"""Parts of a study's output that are made one by one: a part that fails takes no other with it.

Invariant: an exception in a part becomes one line with its name and its reason. The traceback goes
to a log, since an exception that is no EbblineError is a bug.
"""

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ebbline.tasks.errors import EbblineError

T = TypeVar("T")
LOG = "log/outputs.log"  # in a study's folder
MOST = 300  # characters of a reason


class Attempts:
    """`failed` maps the name of each part that could not be made to the reason."""

    def __init__(self, log: Path | None = None) -> None:
        self.failed: dict[str, str] = {}
        self.log = log

    def make(self, name: str, make: Callable[[], T]) -> T | None:
        """What `make` returns, or None when it raises."""
        try:
            return make()
        except Exception as error:  # noqa: BLE001  # any fault of a part must leave the others
            self.note(name, error)
            return None

    def note(self, name: str, error: Exception) -> None:
        """Record that a part failed."""
        self.failed.setdefault(name, reason_of(error))
        if self.log is not None:
            try:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                with self.log.open("a") as file:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {name}\n")
                    file.write("".join(traceback.format_exception(error)) + "\n")
            except OSError:  # a full disk is the reason that the part failed, too
                self.log = None

    def lines(self) -> list[str]:
        """A line for each part that could not be made."""
        return [f"could not make {name}: {reason}" for name, reason in self.failed.items()]


def reason_of(error: Exception) -> str:
    """An exception in one line. A bug has the name of its type and the line that raised it."""
    text = " ".join(str(error).split())[:MOST]
    if isinstance(error, EbblineError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{at}{f': {text}' if text else ''}"
