"""Files of lines that are only ever appended to. A process killed while it writes leaves a cut-off
last line: nobody reads it, and the next that appends takes it away, so that it spoils no other
line.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO


def whole_lines(path: Path) -> Sequence[str]:
    """The lines that were written to their end; none where there is no file."""
    text = path.read_bytes() if path.exists() else b""
    return text[: text.rfind(b"\n") + 1].decode().split("\n")[:-1]


def open_to_append(path: Path) -> TextIO:
    """Looks at the last byte alone, unless a line was cut off: a ledger may be long, and be opened
    for each line.
    """
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
    return path.open("a")
