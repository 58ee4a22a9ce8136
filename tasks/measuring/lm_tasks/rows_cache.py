"""Where the library `datasets` keeps the rows that it has read from a folder of this machine.

Its own cache goes by a file's path and time of modification. A file that was replaced with its time
kept (by tar, rsync or git) would be read as it was before. Invariant: rows are those of the files
that are there now.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import config  # type: ignore[import-untyped]

from ebbline.tasks.identity import digest, stamp_of


def fingerprint(folder: Path) -> str:
    """A text that changes when a file in the folder is written or replaced."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    stamps = [[path.relative_to(folder).as_posix(), stamp_of(path)] for path in files]
    return digest([str(folder.resolve()), stamps])


@contextmanager
def rows_cached(folder: Path) -> Iterator[None]:
    """Let `datasets` keep the rows of a folder by its fingerprint while the block runs."""
    before = {
        name: getattr(config, name) for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH")
    }
    own = Path(before["HF_DATASETS_CACHE"]) / f"ebbline-{fingerprint(folder)[:16]}"
    config.HF_DATASETS_CACHE = own
    config.DOWNLOADED_DATASETS_PATH = own / config.DOWNLOADED_DATASETS_DIR
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
