"""Output files that are whole or absent: a reader never meets half of one."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object], durable: bool = False) -> Path:
    """Let `write` fill a file of a random name beside `path`, then rename it there. The suffix
    stays, so that a writer can go by it. A `durable` file is on the disk before it gets its name.
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


def is_unfinished(name: str) -> bool:
    """Whether a file is one that `write_whole` still fills, or that a killed process left."""
    return Path(name).name.startswith(".")


def to_disk(path: Path) -> None:
    """Return when a file's bytes outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
