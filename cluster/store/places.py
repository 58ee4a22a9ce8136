"""The interface to a store's files, and its version for a folder. cluster/store/bucket.py has the
version for a bucket.

Names are relative POSIX paths. Invariant: of all calls of `create` with one name, from any machine,
exactly one succeeds.
"""

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
from ebbline.tasks.files import is_full, to_disk, write_whole
from ebbline.tasks.identity import file_digest


@dataclass(frozen=True)
class StoredFile:
    """One file or object: its size in bytes and its time in seconds since the epoch."""

    name: str
    size: int
    modified: float


class StorePlace(ABC):
    """The files of a store. `at` is the folder's path or the bucket's URL. All methods raise
    StoreError or DiskFull with `at` in the message.
    """

    at: str

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The content of a name, or None if it does not exist."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a name that does not exist yet. Returns False if it exists."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write or replace a name. A reader sees the old or the new content, never a mixture."""

    @abstractmethod
    def send(self, path: Path, name: str) -> None:
        """Store a local file as `name`. A folder moves the file, or keeps it if it is in place."""

    @abstractmethod
    def receive(self, name: str, path: Path) -> str:
        """Copy a name into a local file and return the sha256 of the copy. Raises StoreError when
        the name does not exist.
        """

    @abstractmethod
    def sha256(self, name: str) -> str | None:
        """The sha256 of a name's content, which is read now; None if it does not exist."""

    @abstractmethod
    def entries(self, prefix: str = "") -> Iterator[StoredFile]:
        """All files below a folder, at any depth."""

    @abstractmethod
    def below(self, prefix: str) -> list[str]:
        """The names of the folders directly below a folder, sorted."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Remove names in the given order. A missing name is no error."""

    @abstractmethod
    def move(self, name: str, to: str) -> None:
        """Rename a file."""


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
            to_disk(path)  # after a power cut no record may exist without its payload
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
                    continue  # another process removed it
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
            with suppress(OSError):  # the folder still has other files
                folder.rmdir()

    def move(self, name: str, to: str) -> None:
        try:
            (self.root / to).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).rename(self.root / to)
        except OSError as error:
            raise self.explained(error) from error

    def explained(self, error: Exception) -> StoreError:
        """The error to show for a fault of the folder: what is wrong, and what to do."""
        text = first_line(error)
        if is_full(error):
            quota = "No space left" not in text
            return DiskFull(
                f"{'Disk quota exceeded' if quota else 'No space left on device'} for the store "
                f"{self.at}; free some space, then run the same command to continue"
            )
        if any(word in text for word in ("Permission denied", "Read-only file system")):
            return StoreError(
                f"the store {self.at} cannot be written ({text}); give this user write "
                "access, or name another store"
            )
        return StoreError(f"the store {self.at} cannot be used: {text}")


def unwritable(at: str, error: OSError) -> StoreError:
    """The error to show when this machine's cache cannot be written."""
    kind = DiskFull if is_full(error) else StoreError
    return kind(
        f"files of {at} cannot be written to this machine's cache ({error}); free some space, "
        "or set EBBLINE_CACHE to another folder"
    )


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
