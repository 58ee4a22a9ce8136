"""Progress bars on standard error, for commands that a person waits for. No torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Advance(Protocol):
    """Called with what is done, the total, and what is at work now."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def progress_bar(doing: str, after_s: float = 0.0, quiet: bool = False) -> Iterator[Advance]:
    """A progress bar if standard error is a terminal; otherwise nothing.

    It appears after `after_s` seconds, at the next call, and disappears at the end.
    """
    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    console = Console(stderr=True)
    bar = Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    )
    task, began = bar.add_task("", total=None), monotonic()
    if not after_s:
        bar.start()

    def advance(done: int, total: int, note: str = "") -> None:
        if monotonic() - began >= after_s:
            bar.start()
        bar.update(task, completed=done, total=total, description=note)

    try:
        yield advance
    finally:
        bar.stop()
