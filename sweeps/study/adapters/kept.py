"""The copies of a study's local adapters in its home: HOME/adapters/SHA256.

A copy holds only the files that are read, so its digest is the adapter's pin. Workers read the
copy: the training that made the adapter may go on writing beside it.
"""

import shutil
import tempfile
from pathlib import Path

from ebbline.tasks.identity import content_digest
from ebbline.tasks.models.brought.folder import adapter_files

FOLDER = "adapters"


def kept_path(home: Path, sha256: str) -> Path:
    return home / FOLDER / sha256


def keep(folder: Path, home: Path, sha256: str) -> Path:
    """The copy of an adapter whose digest is `sha256`; made if it is missing or damaged."""
    copy = kept_path(home, sha256)
    if copy.is_dir():
        if content_digest(copy) == sha256:
            return copy
        shutil.rmtree(copy)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=copy.parent, prefix=".fresh-") as scratch:
        fresh = Path(scratch) / "adapter"
        fresh.mkdir()
        for name, path in adapter_files(folder).items():
            shutil.copyfile(path, fresh / name)
        if not copy.exists():  # another driver may have been first
            fresh.rename(copy)
    return copy
