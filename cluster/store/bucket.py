"""A store in a bucket of S3-compatible storage.

Credentials and the endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_REGION, AWS_ENDPOINT_URL and obstore's other variables), and are never written to a file. The
storage must support conditional puts (If-None-Match: *).
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import SplitResult, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from ebbline.cluster.store.places import StoredFile, StorePlace, first_line, unwritable
from ebbline.tasks.errors import StoreError
from ebbline.tasks.paths import is_inside

RETRIES = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
DELETED_AT_ONCE = 1000  # the limit of S3 for one request


class Bucket(StorePlace):
    """A prefix in a bucket, accessed by the S3 protocol."""

    REMEDIES: ClassVar[dict[str, str]] = {
        "NoSuchBucket": "there is no such bucket; create it, or correct the URL",
        "AccessDenied": "the credentials do not allow it; ask for read and write access to this "
        "prefix",
        "InvalidAccessKeyId": "the access key is unknown there; check AWS_ACCESS_KEY_ID",
        "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
        "latest/api/token": "there are no credentials; set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY in the environment",
        "error sending request": "it does not answer; check the network and AWS_ENDPOINT_URL",
    }

    def __init__(self, url: str, retries: Mapping[str, Any] = RETRIES) -> None:
        bucket, prefix = _parts(url)
        self._bucket, self._prefix = bucket, prefix
        self.at = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._retries, self._open = dict(retries), None

    @property
    def _objects(self) -> Any:
        if self._open is None:
            # obstore allows http only on request; a URL with http is one.
            plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
            with self._explaining():
                self._open = S3Store(
                    self._bucket,
                    prefix=self._prefix or None,
                    client_options={"allow_http": True} if plain else None,
                    retry_config=self._retries,
                )
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

    def entries(self, prefix: str = "") -> Iterator[StoredFile]:
        with self._explaining():
            for batch in obstore.list(self._objects, prefix or None):
                for item in batch:
                    yield StoredFile(item["path"], item["size"], item["last_modified"].timestamp())

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
            # Only errors of this machine's disk have an errno; obstore's own have none.
            if isinstance(error, OSError) and error.errno is not None:
                raise unwritable(self.at, error) from error
            raise self.explained(error) from None  # obstore's text quotes the whole request

    def explained(self, error: Exception) -> StoreError:
        text = str(error)
        remedy = next((remedy for part, remedy in self.REMEDIES.items() if part in text), None)
        if remedy is None:
            code = re.search(r"<Code>(\w+)</Code>", text)
            remedy = code.group(1) if code else first_line(error)
        return StoreError(f"the store {self.at} cannot be used: {remedy}")


def _parts(url: str) -> tuple[str, str]:
    """The bucket and the prefix of a URL. Raises StoreError that does not show the URL, which may
    contain a secret.
    """
    try:
        split = urlsplit(url)
        names = split.path.strip("/")
        plain = SplitResult("s3", split.netloc, split.path, "", "").geturl() == url
    except ValueError:
        plain, names = False, ""
    if (
        not plain
        or re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", split.netloc) is None
        or (names and not is_inside(names))
    ):
        raise StoreError(
            f"this {url.partition('://')[0]}:// URL is no valid place for a store; give a folder, "
            "or s3://BUCKET/PREFIX without keys or other parts"
        )
    return split.netloc, names
