"""Output files that are whole or absent: no reader sees half of one. And the cache's folder."""

import errno
import os
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
STALE_S = 3600.0  # no write of one file takes so long
FULL = (errno.ENOSPC, errno.EDQUOT)


def write_whole(path: Path, write: Callable[[Path], object], durable: bool = False) -> Path:
    """Call `write` with a temporary file beside `path`, then rename that file to `path`. The
    temporary name keeps the suffix, because some writers choose the format by it. With `durable`,
    the bytes are on the disk before the rename. What a killed process left of earlier writes of
    `path` is removed when it is over an hour old.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    fresh = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        write(fresh)
        if durable:
            to_disk(fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def remove_stale(path: Path) -> None:
    """Remove what killed processes left of their writes of `path`, when it is over an hour old."""
    name = re.compile(rf"\.{re.escape(path.stem)}\.[0-9a-f]{{8}}{re.escape(path.suffix)}")
    oldest = time.time() - STALE_S
    with suppress(OSError):  # another user's folder, or another process removes it
        for left in path.parent.iterdir():
            if name.fullmatch(left.name) and left.lstat().st_mtime < oldest:
                left.unlink()


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


def is_full(error: BaseException) -> bool:
    """Whether a disk, or this user's share of it, has no space left. Libraries give the system's
    words, but not always its number.
    """
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(os.strerror(number) in str(error) for number in FULL)


def to_disk(path: Path) -> None:
    """Return when a file's bytes outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
