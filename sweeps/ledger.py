"""Append-only files of lines.

Invariant: a process that is killed during a write leaves an incomplete last line. Readers ignore
that line, and the next writer removes it before it appends.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO


def whole_lines(path: Path) -> Sequence[str]:
    """The complete lines; empty when the file does not exist."""
    text = path.read_bytes() if path.exists() else b""
    return text[: text.rfind(b"\n") + 1].decode().split("\n")[:-1]


def open_to_append(path: Path) -> TextIO:
    """Open for append, after removing an incomplete last line.

    Reads only the last byte when the last line is complete: a ledger may be long and opened for
    each line.
    """
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
    return path.open("a")
