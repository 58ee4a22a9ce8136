"""Files of lines that are only ever appended to. A process killed while it writes leaves a cut-off last line: nobody reads it, and the
next that appends takes it away, so that it spoils no other line."""

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO


def whole_lines(path: Path) -> Sequence[str]:
    """The lines that were written to their end; none where there is no file."""
    text = path.read_text() if path.exists() else ""
    return _whole(text).splitlines()


def open_to_append(path: Path) -> TextIO:
    file = path.open("a+")
    file.seek(0)
    text = file.read()
    if not text.endswith("\n"):
        file.truncate(len(_whole(text).encode()))
    return file


def _whole(text: str) -> str:
    return text[: text.rfind("\n") + 1]
