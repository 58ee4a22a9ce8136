"""Where a store's bytes lie: a folder, or a bucket of S3-compatible storage. Both keep one contract.

Names are relative POSIX paths. `create` is the only conditional verb: of all that create one name, at any time and from any
machine, exactly one succeeds. Credentials and the endpoint of a bucket come from the environment (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL and what else obstore reads), and are never written anywhere.
"""

import errno
import hashlib
import os
import re
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, S3Store

from tasks.errors import DiskFull, StoreError
from tasks.identity import file_digest

RETRIES = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
DELETED_AT_ONCE = 1000  # what S3 takes in one request


@dataclass(frozen=True)
class Entry:
    """One file or object: its size in bytes, and when it was written in seconds since the epoch."""

    name: str
    size: int
    modified: float


class Place(ABC):
    """`at` is how people write it: a folder's path, or a URL. All verbs raise StoreError, or DiskFull, and name it."""

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
        """Make `name` hold what a local file holds. A folder takes the file itself when it lies there already, or moves it."""

    @abstractmethod
    def receive(self, name: str, path: Path) -> str:
        """Copy a name into a local file; returns the sha256 of what came. Raises StoreError when it is not there."""

    @abstractmethod
    def sha256(self, name: str) -> str | None:
        """The digest of a name's bytes, read now; None when it is not there."""

    @abstractmethod
    def entries(self, prefix: str = "") -> Iterator[Entry]:
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


def place_at(location: Path | str) -> Place:
    """The place of a folder's path or an `s3://bucket/prefix`. Raises StoreError for any other URL."""
    text = str(location)
    return Bucket(text) if "://" in text else Folder(Path(location))


class Folder(Place):
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
            _to_disk(self.root / name)
        except AlreadyExistsError:
            return False
        except (BaseError, OSError) as error:
            raise self.explained(error) from error
        return True

    def write(self, name: str, data: bytes) -> None:
        target = self.root / name
        fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(data)
            _to_disk(fresh)
            fresh.replace(target)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise self.explained(error) from error

    def send(self, path: Path, name: str) -> None:
        target = self.root / name
        try:
            _to_disk(path)  # a record must never outlive its payload through a power cut
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

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        for folder, _, names in os.walk(self.root / prefix):
            for name in names:
                path = Path(folder, name)
                try:
                    stat = path.lstat()
                except FileNotFoundError:
                    continue  # removed by whoever works there
                yield Entry(path.relative_to(self.root).as_posix(), stat.st_size, stat.st_mtime)

    def below(self, prefix: str) -> list[str]:
        folder = self.root / prefix
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    def delete(self, names: Iterable[str]) -> None:
        folders = set()
        try:
            for name in names:
                path = self.root / name
                path.unlink(missing_ok=True)
                folders |= {parent for parent in path.parents if parent.is_relative_to(self.root) and parent != self.root}
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
        text = _without_source(error)
        if "No space left on device" in text:
            return DiskFull(f"No space left on device for the store {self.at}; free some, and the same command continues")
        if any(word in text for word in ("Permission denied", "Read-only file system")):
            return StoreError(f"the store {self.at} cannot be written ({text}); give this user write access, or name another store")
        return StoreError(f"the store {self.at} cannot be used: {text}")


class Bucket(Place):
    """A prefix of a bucket, by the S3 protocol."""

    REMEDIES: ClassVar[dict[str, str]] = {
        "NoSuchBucket": "there is no such bucket; create it, or mend the URL",
        "AccessDenied": "the credentials do not allow it; ask for read and write access to this prefix",
        "InvalidAccessKeyId": "the credentials are unknown there; look at AWS_ACCESS_KEY_ID",
        "SignatureDoesNotMatch": "the credentials are wrong; look at AWS_SECRET_ACCESS_KEY",
        "latest/api/token": "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment",
        "error sending request": "it does not answer; look at the network and AWS_ENDPOINT_URL",
    }

    def __init__(self, url: str) -> None:
        found = re.fullmatch(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?P<prefix>(/[^/?#]+)*)/?", url)
        if found is None:
            # A URL may carry a secret where it does not belong: say no more of it than its scheme.
            scheme = url.partition("://")[0]
            raise StoreError(f"a store cannot lie at this {scheme}:// URL; give a folder, or s3://BUCKET/PREFIX and nothing more (no keys)")
        self.at = f"s3://{found['bucket']}{found['prefix']}"
        self._open: Any = None

    @property
    def _objects(self) -> Any:
        if self._open is None:
            plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")  # whoever writes http means it
            with self._explaining():
                self._open = S3Store.from_url(self.at, client_options={"allow_http": True} if plain else None, retry_config=RETRIES)
        return self._open

    def read(self, name: str) -> bytes | None:
        with self._explaining():
            try:
                return bytes(obstore.get(self._objects, name).bytes())
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def create(self, name: str, data: bytes) -> bool:
        with self._explaining():
            try:
                obstore.put(self._objects, name, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def write(self, name: str, data: bytes) -> None:
        with self._explaining():
            obstore.put(self._objects, name, data)

    def send(self, path: Path, name: str) -> None:
        with self._explaining():
            obstore.put(self._objects, name, path)

    def receive(self, name: str, path: Path) -> str:
        with self._explaining(), path.open("wb") as handle:
            sha = hashlib.sha256()
            for chunk in obstore.get(self._objects, name).stream():
                sha.update(chunk)
                handle.write(chunk)
            handle.flush()
            os.fsync(handle.fileno())
        return sha.hexdigest()

    def sha256(self, name: str) -> str | None:
        sha = hashlib.sha256()
        with self._explaining():
            try:
                for chunk in obstore.get(self._objects, name).stream():
                    sha.update(chunk)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None
        return sha.hexdigest()

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        with self._explaining():
            for batch in obstore.list(self._objects, prefix or None):
                for item in batch:
                    yield Entry(item["path"], item["size"], item["last_modified"].timestamp())

    def below(self, prefix: str) -> list[str]:
        with self._explaining():
            found = obstore.list_with_delimiter(self._objects, prefix)
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found["common_prefixes"])

    def delete(self, names: Iterable[str]) -> None:
        ordered = list(names)
        with self._explaining():
            for start in range(0, len(ordered), DELETED_AT_ONCE):
                obstore.delete(self._objects, ordered[start : start + DELETED_AT_ONCE])

    def move(self, name: str, to: str) -> None:
        with self._explaining():
            obstore.rename(self._objects, name, to)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of this machine's disk; the library's own have none
                raise unwritable(self.at, error) from error
            raise self.explained(error) from None  # the library's words quote the request at length

    def explained(self, error: Exception) -> StoreError:
        text = str(error)
        remedy = next((said for sign, said in self.REMEDIES.items() if sign in text), None)
        if remedy is None:
            code = re.search(r"<Code>(\w+)</Code>", text)
            remedy = code.group(1) if code else _without_source(error)
        return StoreError(f"the store {self.at} cannot be used: {remedy}")


def unwritable(at: str, error: OSError) -> StoreError:
    """What a fault of this machine's disk means for copies of a bucket's files."""
    kind = DiskFull if error.errno == errno.ENOSPC else StoreError
    return kind(f"what comes from {at} cannot be kept on this machine ({error}); free some space, or name another folder in EBBLINE_CACHE")


def _without_source(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
