"""Output files that are whole or absent: no reader sees half of one. And the cache's folder."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700


def write_whole(path: Path, write: Callable[[Path], object], durable: bool = False) -> Path:
    """Call `write` with a temporary file beside `path`, then rename that file to `path`. The
    temporary name keeps the suffix, because some writers choose the format by it. With `durable`,
    the bytes are on the disk before the rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        write(fresh)
        if durable:
            to_disk(fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def open_private(path: Path) -> TextIO:
    """Open a text file for writing that only this user can read: its mode is 600."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, PRIVATE_FILE)
    os.fchmod(descriptor, PRIVATE_FILE)  # also of a file that was there
    return os.fdopen(descriptor, "w", encoding="utf-8")


def cache_folder() -> Path:
    """EBBLINE_CACHE, or `ebbline` in the user's cache folder."""
    folder = os.environ.get("EBBLINE_CACHE")
    return (
        Path(folder)
        if folder
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ebbline"
    )


def is_unfinished(name: str) -> bool:
    """Whether `write_whole` is still writing this file, or a killed process left it."""
    return Path(name).name.startswith(".")


def to_disk(path: Path) -> None:
    """Return when a file's bytes outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
