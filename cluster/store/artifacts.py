"""The artifact store: key -> the files that a stage produced. It is a folder, or a prefix in a
bucket of S3-compatible storage.

    STORE/KIND/KEY/record.json          present if and only if the artifact is complete; written
                                        last, once
    STORE/KIND/KEY/ATTEMPT/payload/     the files, immutable once recorded
    STORE/KIND/KEY/ATTEMPT/log/         the attempt's request.json, progress and errors; not hashed
    STORE/KIND/KEY/dropped.json         the files that retention removed; the record stays
    STORE/scratch/KEY/                  checkpoints of unfinished stages
    STORE/sources/CONTENT/              (in a bucket) models and data from the driver's machine

Each attempt writes into its own folder, and the record names the valid attempt. So a commit is one
conditional put. When two workers finish a key at once, both succeed, and the first record is valid.
A folder without a record is an interrupted attempt, and nothing depends on it.

With a bucket, a worker writes an attempt into the cache on its own disk and uploads it at the end.
"""

import hashlib
import json
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebbline.cluster.store.bucket import Bucket
from ebbline.cluster.store.cache import MEND, Cache, cache_folder
from ebbline.cluster.store.places import Folder, StorePlace, unwritable
from ebbline.tasks.errors import Damaged, Differs, Incomplete, StoreError, UnstableValue
from ebbline.tasks.identity import READ, digest, digest_files, folder_files, part_digest
from ebbline.tasks.paths import is_inside

RECORD = "record.json"
DROPPED = "dropped.json"
QUARANTINE = "aside"  # the name of the folder in existing stores
CHECKSUM = "sha256"  # the field of a record with the digest of all its other fields
CACHE_GB = 100.0
READERS = 16


@dataclass(frozen=True, slots=True)
class Artifact:
    """A complete result. Its key is the digest of `hashed`; `files` maps relative paths to sha256.

    `folder` is its attempt's folder on this machine. With a bucket it has the files fetched so far.
    """

    key: str
    kind: str
    content: str
    files: Mapping[str, str]
    hashed: Mapping[str, Any]
    provenance: Mapping[str, Any]
    folder: Path
    store: "Store" = field(compare=False, repr=False)

    @property
    def path(self) -> Path:
        """The payload's folder with all files."""
        return self.store.fetch(self, tuple(self.files))

    def file(self, name: str) -> Path:
        """The path of one file of the payload. Only this file is fetched, and compared with its
        record: raises Damaged when it differs or is lost, Incomplete when it was dropped.
        """
        path = self.store.fetch(self, (name,)) / name
        self.store.check(self, name)
        return path

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def content_of(self, part: str) -> str:
        return part_digest(self.files, part)

    def digests_below(self, part: str) -> dict[str, str]:
        """Name below a part -> sha256; a part that is one file has its own name."""
        names = {name: name.removeprefix(f"{part}/") for name in self.below(part)}
        return {
            short if short != part else part.rpartition("/")[2]: self.files[name]
            for name, short in names.items()
        }

    def below(self, part: str) -> tuple[str, ...]:
        """The files of a part, which is a file or a folder; all files when `part` is empty."""
        return tuple(
            name for name in self.files if not part or name == part or name.startswith(f"{part}/")
        )


class Store:
    """Artifacts by key. The constructor does no I/O. Only a bucket's store keeps state: the records
    that it has read.
    """

    def __init__(self, location: Path | str, cache_gb: float = CACHE_GB) -> None:
        self.place: StorePlace = (
            Bucket(str(location)) if "://" in str(location) else Folder(Path(location))
        )
        self.cache: Cache | None = None
        self.cache_gb = cache_gb
        if isinstance(self.place, Folder):
            self.root = self.place.root
        else:
            self.cache = Cache(cache_folder(), cache_gb)
            self.root = self.cache.root / digest(self.place.at)[:12]
        self._records: dict[tuple[str, str], Artifact] = {}

    def find(self, kind: str, key: str) -> Artifact | None:
        """The complete artifact of a key, or None. Raises StoreError when its record is damaged."""
        cached = self._records.get((kind, key))
        if cached is not None:
            return cached
        text = self.place.read(f"{kind}/{key}/{RECORD}")
        if text is None:
            return None
        artifact = self._parsed(kind, key, text)
        if self.cache is not None:  # a record never changes, and reads from a bucket are slow
            self._records[kind, key] = artifact
        return artifact

    def _parsed(self, kind: str, key: str, text: bytes) -> Artifact:
        try:
            record = json.loads(text, object_pairs_hook=_sharing_strings)
            _check_record(record, kind, key)
            return Artifact(
                key=record["key"],
                kind=record["kind"],
                content=record["content"],
                files=record["files"],
                hashed=record["hashed"],
                provenance=record["provenance"],
                folder=self.root.joinpath(kind, key, record["attempt"]),
                store=self,
            )
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            UnstableValue,
        ) as error:
            raise Damaged(
                f"the record {self.place.at}/{kind}/{key}/{RECORD} is damaged ({error})."
                " `ebbline store verify --mend` moves it to quarantine; its stage then runs again"
            ) from error

    def open(self, kind: str, key: str) -> Artifact:
        """Like `find`, but raises Incomplete if there is no complete artifact."""
        artifact = self.find(kind, key)
        if artifact is None:
            raise Incomplete(
                f"the {kind} artifact {key[:12]} is not in {self.place.at}; run the study "
                "to create it"
            )
        return artifact

    def all(self, kind: str) -> Iterator[Artifact]:
        """Every complete artifact of a kind, in key order."""
        keys = self.place.below(kind)
        if self.cache is None:
            found: Iterator[Artifact | None] = (self.find(kind, key) for key in keys)
            yield from (artifact for artifact in found if artifact is not None)
            return
        with ThreadPoolExecutor(READERS) as pool:
            yield from (
                artifact
                for artifact in pool.map(lambda key: self.find(kind, key), keys)
                if artifact is not None
            )

    def begin(self, kind: str, key: str, attempt: str = "") -> Path:
        """Create a new folder for one attempt on this machine, with empty `payload` and `log`. Its
        name is `attempt`, by default a new one.
        """
        folder = self.root / kind / key / (attempt or new_attempt())
        if self.cache is not None:
            self.cache.folder(self.root.name)
        try:
            (folder / "payload").mkdir(parents=True)
            (folder / "log").mkdir()
        except OSError as error:
            raise (
                self.place.explained(error)
                if isinstance(self.place, Folder)
                else unwritable(self.place.at, error)
            ) from error
        return folder

    def url(self, *parts: str | Path) -> str:
        """The location of a part of this store on any machine: a path, or a URL in the bucket.

        Parts are names below the store, or local paths below `root`.
        """
        names = [
            part.relative_to(self.root).as_posix() if isinstance(part, Path) else part
            for part in parts
        ]
        return "/".join([self.place.at, *names])

    def local(self, url: str) -> Path:
        """The inverse of `url`: the path on this machine; it may not exist."""
        return self.root / url.removeprefix(self.place.at).lstrip("/")

    def scratch(self, key: str) -> Path:
        """The folder on this machine for the checkpoints of a key. A commit empties it."""
        return self.root / "scratch" / key

    def log(self, attempt: Path, name: str) -> bytes | None:
        """A file of an attempt's log, on whatever machine it runs; None if it does not exist."""
        return self.place.read(f"{attempt.relative_to(self.root).as_posix()}/log/{name}")

    def note(self, attempt: Path, name: str, data: bytes) -> None:
        """Write a file of an attempt's log to the store, where all machines can read it."""
        if isinstance(self.place, Folder):  # a log need not survive a power cut
            try:
                (attempt / "log" / name).write_bytes(data)
            except OSError as error:
                raise self.place.explained(error) from error
        else:
            self.place.write(f"{attempt.relative_to(self.root).as_posix()}/log/{name}", data)

    def commit(
        self, attempt: Path, hashed: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> Artifact:
        """Record an attempt as complete. If the key already has a record, return its artifact, and
        restore the files that retention dropped from it.

        Raises StoreError when the payload is empty or `hashed` does not match the key, Differs when
        a restored file differs from the record.
        """
        key, kind = attempt.parent.name, attempt.parent.parent.name
        if digest(dict(hashed)) != key:
            raise StoreError(
                f"{kind} {key[:12]}: its settings and inputs do not match its key; nothing was "
                "committed"
            )
        files = folder_files(attempt / "payload")
        if not files:
            raise StoreError(f"{kind} {key[:12]} produced no files; nothing was committed")
        record = {
            "key": key,
            "kind": kind,
            "attempt": attempt.name,
            "content": digest_files(files),
            "files": files,
            "hashed": dict(hashed),
            "provenance": dict(provenance),
        }
        record[CHECKSUM] = _checksum(json.loads(json.dumps(record, allow_nan=False)))
        text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False).encode()
        if self.find(kind, key) is None:
            for name in files:
                self.place.send(
                    attempt / "payload" / name, f"{kind}/{key}/{attempt.name}/payload/{name}"
                )
            self.place.create(f"{kind}/{key}/{RECORD}", text)
        recorded = self.open(kind, key)
        # `create` may return False for our own record: after a timeout the library repeats it.
        if recorded.folder != attempt:
            self._restore_dropped(recorded, attempt, files)
            self.discard(attempt)
        self.empty_scratch(key)
        return recorded

    def _restore_dropped(self, recorded: Artifact, attempt: Path, files: Mapping[str, str]) -> None:
        dropped = self.dropped(recorded)
        for name in sorted(dropped):
            if files.get(name) != recorded.files[name]:
                raise Differs(_difference(recorded, name))
        for name in sorted(dropped):
            self.place.send(attempt / "payload" / name, self._name(recorded, name))
        if dropped:
            self.place.delete([f"{recorded.kind}/{recorded.key}/{DROPPED}"])

    def dropped(self, artifact: Artifact) -> frozenset[str]:
        """The files that retention has removed. Any other missing file is damage."""
        name = f"{artifact.kind}/{artifact.key}/{DROPPED}"
        text = self.place.read(name)
        if text is None:
            return frozenset()
        try:
            found = frozenset(json.loads(text)["files"])
        except (ValueError, KeyError, TypeError, RecursionError):
            found = frozenset({""})
        if not found <= artifact.files.keys():
            raise Damaged(f"{self.place.at}/{name} is damaged. {MEND}")
        return found

    def drop(self, artifact: Artifact, names: frozenset[str]) -> None:
        """Remove files of a payload and keep its record. `dropped.json` is written first, so that
        an interrupted drop does not count as damage.
        """
        marker = {"files": sorted(self.dropped(artifact) | names)}
        self.place.write(f"{artifact.kind}/{artifact.key}/{DROPPED}", json.dumps(marker).encode())
        self.place.delete([self._name(artifact, name) for name in sorted(names)])
        if self.cache is not None:
            for name in names:
                (artifact.folder / "payload" / name).unlink(missing_ok=True)

    def quarantine(self, kind: str, key: str) -> str:
        """Move all files of a key to `aside/`, the record first, so that its stage runs again; the
        list of an uploaded source too, so that it is uploaded again. Returns the new place.
        """
        to = f"{QUARANTINE}/{kind}/{key}-{uuid.uuid4().hex[:6]}"
        names = sorted(
            (entry.name for entry in self.place.entries(f"{kind}/{key}")),
            key=lambda name: not name.endswith(f"/{RECORD}"),
        )
        listing = f"{kind}/{key}.json"
        if self.place.read(listing) is not None:
            names.insert(0, listing)
        for name in names:
            self.place.move(name, to + name.removeprefix(f"{kind}/{key}"))
        self._records.pop((kind, key), None)
        shutil.rmtree(self.root / kind / key, ignore_errors=True)
        return to

    def discard(self, attempt: Path) -> None:
        """Remove an attempt that no record names, with its log."""
        self.place.delete(
            [entry.name for entry in self.place.entries(attempt.relative_to(self.root).as_posix())]
        )
        shutil.rmtree(attempt, ignore_errors=True)
        with suppress(OSError):  # it still has other attempts, or the record
            attempt.parent.rmdir()

    def empty_scratch(self, key: str) -> None:
        if self.cache is not None:
            self.place.delete([entry.name for entry in self.place.entries(f"scratch/{key}")])
        shutil.rmtree(self.scratch(key), ignore_errors=True)

    def fetch(self, artifact: Artifact, names: tuple[str, ...]) -> Path:
        """Fetch files of a payload, and return its folder on this machine. Raises StoreError when
        the store has lost one.
        """
        payload = artifact.folder / "payload"
        if self.cache is None:
            return payload
        self.cache.keep(artifact.folder)
        prefix = artifact.folder.relative_to(self.root).as_posix() + "/payload"
        files = {name: artifact.files[name] for name in names if name in artifact.files}
        self.cache.fetch(
            payload,
            files,
            lambda: self.sizes(prefix),
            lambda name, path: self.place.receive(f"{prefix}/{name}", path),
        )
        return payload

    def check(self, artifact: Artifact, name: str) -> None:
        """Compare a file of a payload on this machine with its record, if the record names it."""
        path = artifact.folder / "payload" / name
        if name not in artifact.files:
            return
        if path.is_file():
            found = READ.of(path)
            if found == artifact.files[name]:
                return
            problem = f"its sha256 is {found[:12]}, the record says {artifact.files[name][:12]}"
        elif name in self.dropped(artifact):
            raise Incomplete(
                f"{path} was dropped to save space; run the study to make it again, or `ebbline "
                f"store forget {artifact.kind} {artifact.key}` first"
            )
        else:
            problem = "it is missing"
        raise Damaged(f"{path} is damaged: {problem}. {MEND}")

    def free_bytes(self) -> int | None:
        """The free bytes of the store's disk; None for a bucket, which has no limit."""
        if self.cache is not None:
            return None
        existing = next(folder for folder in (self.root, *self.root.parents) if folder.exists())
        return shutil.disk_usage(existing).free

    def sizes(self, prefix: str) -> dict[str, int]:
        """Name below a folder -> bytes, for all files there."""
        return {
            entry.name.removeprefix(f"{prefix}/"): entry.size
            for entry in self.place.entries(prefix)
        }

    def _name(self, artifact: Artifact, file: str) -> str:
        return f"{artifact.folder.relative_to(self.root).as_posix()}/payload/{file}"


def new_attempt() -> str:
    """The name of a new attempt's folder."""
    return uuid.uuid4().hex[:12]


def _checksum(record: Mapping[str, Any]) -> str:
    """The digest of a record without its own checksum. Values read from JSON have one text, so
    `canonical` with its checks is not needed: a driver reads many records.
    """
    rest = {name: value for name, value in record.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _check_record(record: Mapping[str, Any], kind: str, key: str) -> None:
    """Raises ValueError for a record of another artifact, and for one that is not as it was
    written. The records of earlier versions have no checksum.
    """
    if (record["kind"], record["key"]) != (kind, key):
        raise ValueError("it is of another key")
    if CHECKSUM in record:
        if _checksum(record) != record[CHECKSUM]:
            raise ValueError("it differs from its checksum")
    elif digest(record["hashed"]) != key:
        raise ValueError("its settings and inputs do not match its key")
    elif digest_files(record["files"]) != record["content"]:
        raise ValueError("its content digest does not match its files")
    names = [record["attempt"], *record["files"]]
    foreign = next((name for name in names if not is_inside(name)), None)
    if foreign is not None or "/" in record["attempt"]:
        raise ValueError(f"it names {foreign or record['attempt']!r}, which is no file of its own")


def _sharing_strings(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object with interned strings: a driver holds many records, and they share most
    strings.
    """
    return {
        sys.intern(name): sys.intern(value) if isinstance(value, str) else value
        for name, value in pairs
    }


def _difference(recorded: Artifact, name: str) -> str:
    device, host = (
        recorded.provenance.get(what, f"an unknown {what}") for what in ("device", "host")
    )
    return (
        f"{recorded.kind} {recorded.key[:12]}: {name} was dropped to save space, and the rerun "
        "produced a file that differs from the record"
        f" (which was produced on {device}, {host}). The measurements of the recorded file are "
        "not valid for the new one. Either run the study on the recorded hardware, or remove the "
        f"artifact with `ebbline store forget {recorded.kind} {recorded.key}`: its stage and the "
        "measurements from it then run again"
    )
