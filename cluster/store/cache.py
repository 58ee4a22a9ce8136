"""What a machine keeps of an object store: whole files only, up to a bound, the least recently used
going first.

    CACHE/STORE/KIND/KEY/ATTEMPT/payload/    as in the store; one such folder is an entry
    CACHE/STORE/sources/CONTENT/             content from the driver's machine, an entry too
    CACHE/STORE/scratch/KEY/                 checkpoints
    CACHE/locks/  CACHE/fetching/            who uses what; what is on its way

Invariant: a file that stands under its name is whole, because it was compared with its sha256 (or
written by the attempt that was committed) before it got it. Several processes may use one cache: an
entry is held by a lock of the kernel's for as long as somebody reads it, and only entries that
nobody holds are removed. What is held at once may exceed the bound.
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
from ebbline.tasks.identity import digest

MEND = "`ebbline store verify --mend` finds such damage and moves it away, so that it is made again"
HELD_FOR_READERS = 32
WITHIN = {
    "scratch": 2,
    "sources": 2,
}  # how many parts of its path below CACHE/STORE name an entry; a kind's have three
Receive = Callable[[str, Path], str]


def cache_folder() -> Path:
    """EBBLINE_CACHE, or `ebbline` in the user's cache folder."""
    given = os.environ.get("EBBLINE_CACHE")
    return (
        Path(given)
        if given
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ebbline"
    )


class Cache:
    """Cheap to make; the folder and its locks are the only state, but for what this process
    holds.
    """

    def __init__(self, root: Path, limit_gb: float) -> None:
        self.root = root.resolve()
        self.limit_bytes = int(limit_gb * 1e9)
        self._held: OrderedDict[Path, int] = OrderedDict()

    @contextmanager
    def hold(self, entry: Path) -> Iterator[None]:
        """Keep an entry from being removed for the length of a `with`."""
        handle = self._lock(entry, fcntl.LOCK_SH)
        try:
            yield
        finally:
            os.close(handle)

    @contextmanager
    def alone(self, entry: Path) -> Iterator[None]:
        """Keep the other processes that would fetch into an entry waiting for the length of a
        `with`.
        """
        handle = self._lock(entry / "fetch", fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(handle)

    def keep(self, entry: Path) -> None:
        """Hold an entry until this process has asked for many others: for readers that open a path
        and go on.
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
        """Bring `files` (name -> sha256) into an entry that the caller holds. Raises StoreError
        when one is not what it must be.

        `sizes` says what the store has; it and `receive` are asked only for what is missing here.
        """
        if all((folder / name).exists() for name in files):
            return
        with self.alone(folder):
            missing = {name: sha for name, sha in files.items() if not (folder / name).exists()}
            there = sizes() if missing else {}
            gone = sorted(missing.keys() - there.keys())
            if gone:
                raise StoreError(
                    f"{gone[0]} of {folder.relative_to(self.root)} is not in the store any "
                    f"more; {MEND}"
                )
            self.trim(sum(there[name] for name in missing))
            for name, sha in missing.items():
                self._fetch(folder / name, name, sha, there[name], receive)

    def _fetch(self, path: Path, name: str, sha: str, size: int, receive: Receive) -> None:
        fresh = self.folder("fetching") / uuid.uuid4().hex
        trimming = self._lock(self.root / "trim", fcntl.LOCK_EX)
        handle = os.open(fresh, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(
            handle, fcntl.LOCK_EX
        )  # so that `trim` can tell it from what a killed process left
        os.close(trimming)
        try:
            came = receive(name, fresh)
            if came != sha or fresh.stat().st_size != size:
                raise StoreError(
                    f"{name} came from the store as {fresh.stat().st_size} bytes with "
                    f"sha256 {came[:12]}, not {sha[:12]}; {MEND}"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
            os.close(handle)

    def trim(self, need_bytes: int = 0) -> None:
        """Remove entries that nobody holds, the least recently used first, until `need_bytes` more
        fit the bound.
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
            for entry in sorted(entries, key=self._used):
                if excess <= 0:
                    break
                if _unless_locked(self._lock_path(entry), lambda entry=entry: shutil.rmtree(entry)):  # type: ignore[misc]
                    excess -= entries[entry]
        finally:
            os.close(trimming)

    def _entries(self) -> Iterator[Path]:
        for store in self.root.iterdir():
            if store.name in ("locks", "fetching"):
                continue
            for top in store.iterdir():
                depth = WITHIN.get(top.name, 3) - 1
                yield from (path for path in top.glob("/".join("*" * depth)) if path.is_dir())

    def _used(self, entry: Path) -> float:
        lock = self._lock_path(entry)
        return lock.stat().st_mtime if lock.exists() else entry.stat().st_mtime

    def folder(self, name: str) -> Path:
        """A folder directly in the cache, for this user only: completions lie or pass there."""
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
            self.folder(top)  # before anybody makes it on the way to the entry
        handle = os.open(self._lock_path(entry), os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(handle, how)
        os.utime(handle)  # when it was last used
        return handle


def _unless_locked(lock: Path, act: Callable[[], object]) -> bool:
    """Do something while holding a lock, unless somebody else has it."""
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
                continue  # a stage is writing or removing it
    return total
