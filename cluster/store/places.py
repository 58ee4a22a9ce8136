"""Where a store's bytes lie: a folder here, or a bucket (cluster/store/bucket.py). Both keep one
contract.

Names are relative POSIX paths. `create` is the only conditional verb: of all that create one name,
at any time and from any machine, exactly one succeeds.
"""

import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from ebbline.tasks.errors import DiskFull, StoreError
from ebbline.tasks.files import to_disk, write_whole
from ebbline.tasks.identity import file_digest


@dataclass(frozen=True)
class StoredFile:
    """One file or object: its size in bytes, and when it was written in seconds since the epoch."""

    name: str
    size: int
    modified: float


class StorePlace(ABC):
    """`at` is how people write it: a folder's path, or a URL. All verbs raise StoreError, or
    DiskFull, and name it.
    """

    at: str

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """What is there, or None."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a name that must not exist yet; False when it does."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write or replace a name; a reader sees the old bytes or the new ones."""

    @abstractmethod
    def send(self, path: Path, name: str) -> None:
        """Make `name` hold what a local file holds. A folder takes the file itself when it lies
        there already, or moves it.
        """

    @abstractmethod
    def receive(self, name: str, path: Path) -> str:
        """Copy a name into a local file; returns the sha256 of what came. Raises StoreError when it
        is not there.
        """

    @abstractmethod
    def sha256(self, name: str) -> str | None:
        """The digest of a name's bytes, read now; None when it is not there."""

    @abstractmethod
    def entries(self, prefix: str = "") -> Iterator[StoredFile]:
        """All that lies below a folder's name."""

    @abstractmethod
    def below(self, prefix: str) -> list[str]:
        """The names of the folders directly below a folder's name, sorted."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Remove names, in their order; one that is gone already is no error."""

    @abstractmethod
    def move(self, name: str, to: str) -> None:
        """Give a file another name."""


class Folder(StorePlace):
    """A local or shared folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.at = str(self.root)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self.explained(error) from error

    def create(self, name: str, data: bytes) -> bool:
        try:
            obstore.put(LocalStore(prefix=self.root, mkdir=True), name, data, mode="create")
            to_disk(self.root / name)
        except AlreadyExistsError:
            return False
        except (BaseError, OSError) as error:
            raise self.explained(error) from error
        return True

    def write(self, name: str, data: bytes) -> None:
        try:
            write_whole(self.root / name, lambda fresh: fresh.write_bytes(data), durable=True)
        except OSError as error:
            raise self.explained(error) from error

    def send(self, path: Path, name: str) -> None:
        target = self.root / name
        try:
            to_disk(path)  # a record must never outlive its payload through a power cut
            if path != target:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path, target)
        except OSError as error:
            raise self.explained(error) from error

    def receive(self, name: str, path: Path) -> str:
        try:
            shutil.copyfile(self.root / name, path)
        except OSError as error:
            raise self.explained(error) from error
        return file_digest(path)

    def sha256(self, name: str) -> str | None:
        try:
            return file_digest(self.root / name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self.explained(error) from error

    def entries(self, prefix: str = "") -> Iterator[StoredFile]:
        for folder, _, names in os.walk(self.root / prefix):
            for name in names:
                path = Path(folder, name)
                try:
                    stat = path.lstat()
                except FileNotFoundError:
                    continue  # removed by whoever works there
                yield StoredFile(
                    path.relative_to(self.root).as_posix(), stat.st_size, stat.st_mtime
                )

    def below(self, prefix: str) -> list[str]:
        folder = self.root / prefix
        return (
            sorted(path.name for path in folder.iterdir() if path.is_dir())
            if folder.is_dir()
            else []
        )

    def delete(self, names: Iterable[str]) -> None:
        folders = set()
        try:
            for name in names:
                path = self.root / name
                path.unlink(missing_ok=True)
                folders |= {
                    parent
                    for parent in path.parents
                    if parent.is_relative_to(self.root) and parent != self.root
                }
        except OSError as error:
            raise self.explained(error) from error
        for folder in sorted(folders, key=lambda path: -len(path.parts)):
            with suppress(OSError):  # something else lies there, or has just been put there
                folder.rmdir()

    def move(self, name: str, to: str) -> None:
        try:
            (self.root / to).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).rename(self.root / to)
        except OSError as error:
            raise self.explained(error) from error

    def explained(self, error: Exception) -> StoreError:
        """What a fault of the folder means to a person, and what to do."""
        text = first_line(error)
        if "No space left on device" in text:
            return DiskFull(
                f"No space left on device for the store {self.at}; free some, and the same "
                "command continues"
            )
        if any(word in text for word in ("Permission denied", "Read-only file system")):
            return StoreError(
                f"the store {self.at} cannot be written ({text}); give this user write "
                "access, or name another store"
            )
        return StoreError(f"the store {self.at} cannot be used: {text}")


def unwritable(at: str, error: OSError) -> StoreError:
    """What a fault of this machine's disk means for copies of a bucket's files."""
    kind = DiskFull if error.errno == errno.ENOSPC else StoreError
    return kind(
        f"what comes from {at} cannot be kept on this machine ({error}); free some space, "
        "or name another folder in EBBLINE_CACHE"
    )


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
