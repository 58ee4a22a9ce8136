"""A machine's cache of an object store, of bounded size. The least recently used entries are
removed first.

    CACHE/STORE/KIND/KEY/ATTEMPT/    as in the store; an entry
    CACHE/STORE/sources/CONTENT/     content from the driver's machine; an entry
    CACHE/STORE/scratch/KEY/         checkpoints; an entry
    CACHE/locks/                     one lock file for each entry
    CACHE/fetching/                  downloads in progress
    CACHE/digests.json               digests of large files that this machine has read

Invariant: a file under its final name is whole. It was compared with its sha256 before the rename,
or the committed attempt wrote it. A reader compares it again, because a disk may damage it.
Several processes may share a cache: each reader holds a kernel lock on its entry, and only entries
without a holder are removed. Held entries may exceed the bound.
"""

import fcntl
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ebbline.cluster.store.places import unwritable
from ebbline.tasks.errors import StoreError
from ebbline.tasks.files import cache_folder
from ebbline.tasks.identity import READ, digest
from ebbline.tasks.paths import is_inside

__all__ = ["Cache", "cache_folder"]
MEND = "`ebbline store verify --mend` moves damaged artifacts to quarantine; their stages run again"
HELD_FOR_READERS = 32
# The number of path parts below CACHE/STORE that name an entry; 3 for stage kinds.
ENTRY_DEPTH = {"scratch": 2, "sources": 2}
Receive = Callable[[str, Path], str]


class Cache:
    """The cache in one folder. The constructor does no I/O. All state is in the folder, except the
    locks that this process holds.
    """

    def __init__(self, root: Path, limit_gb: float) -> None:
        self.root = root.resolve()
        self.limit_bytes = int(limit_gb * 1e9)
        self._held: OrderedDict[Path, int] = OrderedDict()

    @contextmanager
    def hold(self, entry: Path) -> Iterator[None]:
        """Protect an entry from removal inside a `with` block."""
        handle = self._lock(entry, fcntl.LOCK_SH)
        try:
            yield
        finally:
            os.close(handle)

    @contextmanager
    def exclusive(self, entry: Path) -> Iterator[None]:
        """Make other processes that fetch into an entry wait for the end of a `with` block."""
        handle = self._lock(entry / "fetch", fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(handle)

    def keep(self, entry: Path) -> None:
        """Protect an entry until this process has used HELD_FOR_READERS others. For readers that
        open a path without a `with` block.
        """
        if entry in self._held:
            self._held.move_to_end(entry)
            return
        self._held[entry] = self._lock(entry, fcntl.LOCK_SH)
        if len(self._held) > HELD_FOR_READERS:
            os.close(self._held.popitem(last=False)[1])

    def fetch(
        self,
        folder: Path,
        files: Mapping[str, str],
        sizes: Callable[[], Mapping[str, int]],
        receive: Receive,
    ) -> None:
        """Fetch `files` (name -> sha256) into an entry that the caller holds. Raises StoreError
        when a file is missing in the store or damaged.

        `sizes` (name -> bytes in the store) and `receive` are called only for missing files.
        """
        foreign = next((name for name in files if not is_inside(name)), None)
        if foreign is not None:
            raise StoreError(
                f"the store names the file {foreign!r}, which is no plain name; {MEND}"
            )
        if all(_is_whole(folder / name, sha) for name, sha in files.items()):
            return
        with self.exclusive(folder):
            missing = {
                name: sha for name, sha in files.items() if not _is_whole(folder / name, sha)
            }
            stored = sizes() if missing else {}
            lost = sorted(missing.keys() - stored.keys())
            if lost:
                raise StoreError(
                    f"{lost[0]} of {folder.relative_to(self.root)} is missing in the store; {MEND}"
                )
            self.trim(sum(stored[name] for name in missing))
            for name, sha in missing.items():
                self._fetch(folder / name, name, sha, stored[name], receive)

    def _fetch(self, path: Path, name: str, sha: str, size: int, receive: Receive) -> None:
        fresh = self.folder("fetching") / uuid.uuid4().hex
        trimming = self._lock(self.root / "trim", fcntl.LOCK_EX)
        handle = os.open(fresh, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)  # `trim` removes unlocked files: their process died
        os.close(trimming)
        try:
            received = receive(name, fresh)
            if received != sha or fresh.stat().st_size != size:
                raise StoreError(
                    f"{name} is damaged in the store: {fresh.stat().st_size} bytes with sha256 "
                    f"{received[:12]}, expected {size} bytes with {sha[:12]}; {MEND}"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
            os.close(handle)

    def trim(self, need_bytes: int = 0) -> None:
        """Remove entries without a holder, the least recently used first, until `need_bytes` more
        fit in.
        """
        trimming = self._lock(self.root / "trim", fcntl.LOCK_EX)
        try:
            for fresh in self.folder("fetching").iterdir():
                _unless_locked(fresh, fresh.unlink)
            entries = {entry: _size(entry) for entry in self._entries()}
            excess = (
                sum(entries.values())
                + _size(self.root / "fetching")
                + need_bytes
                - self.limit_bytes
            )
            for entry in sorted(entries, key=self._last_used):
                if excess <= 0:
                    break
                if _unless_locked(self._lock_path(entry), lambda entry=entry: shutil.rmtree(entry)):  # type: ignore[misc]
                    excess -= entries[entry]
        finally:
            os.close(trimming)

    def _entries(self) -> Iterator[Path]:
        for store in self.root.iterdir():
            if store.name in ("locks", "fetching") or not store.is_dir():
                continue
            for top in store.iterdir():
                depth = ENTRY_DEPTH.get(top.name, 3) - 1
                yield from (path for path in top.glob("/".join("*" * depth)) if path.is_dir())

    def _last_used(self, entry: Path) -> float:
        lock = self._lock_path(entry)
        return lock.stat().st_mtime if lock.exists() else entry.stat().st_mtime

    def folder(self, name: str) -> Path:
        """Create a folder of the cache that only this user can read: it may contain completions."""
        folder = self.root / name
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable("the store", error) from error
        return folder

    def _lock_path(self, entry: Path) -> Path:
        return self.folder("locks") / digest(str(entry.relative_to(self.root)))[:32]

    def _lock(self, entry: Path, how: int) -> int:
        top, *below = entry.relative_to(self.root).parts
        if below:
            self.folder(top)  # sets the access rights, before another call creates the folder
        handle = os.open(self._lock_path(entry), os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(handle, how)
        os.utime(handle)  # for `_last_used`
        return handle


def _is_whole(path: Path, sha: str) -> bool:
    """Whether a fetched file is there as it was fetched. A damaged one is fetched again."""
    return path.is_file() and READ.of(path) == sha


def _unless_locked(lock: Path, act: Callable[[], object]) -> bool:
    """Call `act` with the lock held, unless another process holds it. Returns whether it ran."""
    handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        act()
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _size(folder: Path) -> int:
    total = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(inner, name).lstat().st_size
            except FileNotFoundError:
                continue  # another process removed it
    return total
