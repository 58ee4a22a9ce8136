"""Where a worker runs one request: in the store's folder, or with a bucket in the local cache.

With a bucket the stage sees only local paths. Inputs are fetched before it starts, its progress and
log are uploaded for the driver, and each checkpoint is uploaded, so that it survives the machine:

    STORE/scratch/KEY/checkpoint.json   the checkpoint's ID, and name -> sha256; written last, so
                                        that it marks a complete checkpoint
    STORE/scratch/KEY/ID/...            the files of one checkpoint
"""

import contextlib
import json
import logging
import shutil
import threading
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ebbline.cluster.store.artifacts import Artifact, Store
from ebbline.cluster.store.sources import fetch_source
from ebbline.tasks.errors import StoreError
from ebbline.tasks.files import is_unfinished
from ebbline.tasks.identity import file_digest, folder_files
from ebbline.tasks.kinds import STAGE_KINDS
from ebbline.tasks.paths import is_inside
from ebbline.tasks.progress import PROGRESS, STEPS
from ebbline.tasks.stage import Report, Request

PROGRESS_EVERY_S = 5.0
CHECKPOINT = "checkpoint.json"
_log = logging.getLogger(__name__)


def request_out(store: Store, attempt: Path) -> str:
    """The `out` of a request: STORE/KIND/KEY/ATTEMPT/payload. `workplace` takes it apart."""
    return store.url(attempt / "payload")


def workplace(request: Request, rank: int = 0, world_size: int = 1) -> "Workplace":
    """The workplace for a request of the runner; its `out` comes from `request_out`."""
    root, kind, key, attempt, _ = request.out.rsplit("/", 4)
    store = Store(root, request.cache_gb)
    cls = Workplace if store.cache is None else BucketWorkplace
    return cls(store, store.root / kind / key / attempt, request, rank, world_size)


class Workplace:
    """A workplace in a folder. The request's paths are valid on every machine that shares it.

    A prepared request has the digests of its inputs' files, with which the worker checks them.
    """

    def __init__(
        self, store: Store, attempt: Path, request: Request, rank: int, world_size: int
    ) -> None:
        self.store, self.attempt, self.request = store, attempt, request
        self.rank, self.world_size = rank, world_size

    def prepare(self) -> Request:
        """Fetch the inputs, and return the request with local paths and the recorded digests."""
        return replace(self.request, recorded=self._recorded(self.request.inputs))

    def _recorded(self, locations: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """Input -> digest of each file, for the inputs that are artifacts of this store."""
        parts = {name: self._parts(location) for name, location in locations.items()}
        return {
            name: self._artifact(where).digests_below("/".join(where[4:]))
            for name, where in parts.items()
            if where
        }

    def _parts(self, location: str) -> tuple[str, ...]:
        """(kind, key, attempt, "payload", part, ...) of an artifact of this store; empty for what
        lies elsewhere.
        """
        below = f"{self.store.place.at}/"
        parts = tuple(location.removeprefix(below).split("/")) if location.startswith(below) else ()
        return parts if len(parts) > 3 and parts[0] in STAGE_KINDS else ()

    def _artifact(self, where: tuple[str, ...]) -> Artifact:
        artifact = self.store.open(where[0], where[1])
        if artifact.folder != self.store.root.joinpath(*where[:3]):
            raise StoreError(
                f"{where[0]} {where[1][:12]} was replaced by another attempt during the run; "
                "run the study again"
            )
        return artifact

    def send_checkpoint(self) -> None:
        """Upload the checkpoint in the scratch folder."""

    def finish(self, report: Report) -> Report:
        """Upload the log and release the inputs. Returns the report with paths of the store."""
        return report


class BucketWorkplace(Workplace):
    """A workplace in the cache of a bucket. The processes of a gang on one machine share its
    folder; only rank 0 uploads the log and checkpoints.
    """

    def __init__(
        self, store: Store, attempt: Path, request: Request, rank: int, world_size: int
    ) -> None:
        self._original = request
        local = replace(
            request,
            out=str(attempt / "payload"),
            log=str(attempt / "log"),
            scratch=str(store.scratch(request.key)),
        )
        super().__init__(store, attempt, local, rank, world_size)
        self._held = ExitStack()
        self._done = threading.Event()
        self._progress_thread: threading.Thread | None = None

    def prepare(self) -> Request:
        assert self.store.cache is not None
        for entry in (self.attempt, self.store.scratch(self.request.key)):
            self._held.enter_context(self.store.cache.hold(entry))
        for folder in ("payload", "log"):
            (self.attempt / folder).mkdir(parents=True, exist_ok=True)
        inputs = {name: self._fetched(place) for name, place in self._original.inputs.items()}
        if self.rank == 0:  # only rank 0 reads and writes a gang's checkpoint
            self._fetch_checkpoint()
            self._progress_thread = threading.Thread(target=self._send_progress, daemon=True)
            self._progress_thread.start()
        recorded = self._recorded(self._original.inputs)
        return replace(self.request, inputs=inputs, recorded=recorded)

    def _fetched(self, location: str) -> str:
        """The local path of an input. A location outside the store (a hub model) is unchanged."""
        if not location.startswith(f"{self.store.place.at}/"):
            return location
        assert self.store.cache is not None
        path = self.store.local(location)
        where = self._parts(location)
        if not where:
            content = path.relative_to(self.store.root).parts[1]
            self._held.enter_context(self.store.cache.hold(self.store.root / "sources" / content))
            return str(fetch_source(self.store, path))
        artifact = self._artifact(where)
        self._held.enter_context(self.store.cache.hold(artifact.folder))
        self.store.fetch(artifact, artifact.below("/".join(where[4:])))
        return str(path)

    def send_checkpoint(self) -> None:
        if self.rank != 0:
            return
        try:
            self._send_checkpoint_files()
        except StoreError as error:  # the training continues; if the error lasts, its commit fails
            _log.warning(
                "the checkpoint of %s %s could not be uploaded: %s",
                self.request.kind,
                self.request.key[:12],
                error,
            )

    def _send_checkpoint_files(self) -> None:
        place, prefix, scratch = (
            self.store.place,
            f"scratch/{self.request.key}",
            self.store.scratch(self.request.key),
        )
        fresh = uuid.uuid4().hex[:12]
        files = {
            name: sha for name, sha in folder_files(scratch).items() if not is_unfinished(name)
        }
        old = [
            entry.name
            for entry in place.entries(prefix)
            if not entry.name.endswith(f"/{CHECKPOINT}")
        ]
        for name in files:
            place.send(scratch / name, f"{prefix}/{fresh}/{name}")
        place.write(f"{prefix}/{CHECKPOINT}", json.dumps({"id": fresh, "files": files}).encode())
        place.delete(old)

    def _fetch_checkpoint(self) -> None:
        assert self.store.cache is not None
        place, prefix, scratch = (
            self.store.place,
            f"scratch/{self.request.key}",
            self.store.scratch(self.request.key),
        )
        text = place.read(f"{prefix}/{CHECKPOINT}")
        if text is None:
            return
        try:
            checkpoint = json.loads(text)
            where, files = f"{prefix}/{checkpoint['id']}", dict(checkpoint["files"])
        except (ValueError, KeyError, TypeError):
            where, files = prefix, {"": ""}
        if not all(is_inside(f"{where}/{name}") for name in files):
            _log.warning(
                "the checkpoint of %s %s is damaged: the stage starts from the beginning",
                self.request.kind,
                self.request.key[:12],
            )
            return
        if not {f"{where}/{name}" for name in files} <= {
            entry.name for entry in place.entries(where)
        }:
            # An earlier attempt that still ran has deleted them as the files of an old checkpoint.
            _log.warning(
                "the checkpoint of %s %s has lost files: the stage starts from the beginning",
                self.request.kind,
                self.request.key[:12],
            )
            return
        with self.store.cache.exclusive(scratch):
            for name, sha in files.items():
                path = scratch / name
                if path.exists() and file_digest(path) != sha:
                    path.unlink()  # of another checkpoint
        self.store.cache.fetch(
            scratch,
            files,
            lambda: self.store.sizes(where),
            lambda name, path: place.receive(f"{where}/{name}", path),
        )

    def _send_progress(self) -> None:
        """Upload the progress and the steps of a training for the driver and the W&B mirror, every
        PROGRESS_EVERY_S seconds while they change.
        """
        sent: dict[str, bytes] = {}
        while not self._done.wait(PROGRESS_EVERY_S):
            for path in (Path(self.request.log) / name for name in (PROGRESS, STEPS)):
                with contextlib.suppress(OSError):  # the file is being replaced
                    if not path.exists() or (now := path.read_bytes()) == sent.get(path.name):
                        continue
                    sent[path.name] = now
                    try:
                        self.store.note(self.attempt, path.name, now)
                    except StoreError as error:  # only a warning: a lasting error fails the commit
                        _log.warning(
                            "the progress of %s %s could not be uploaded: %s",
                            self.request.kind,
                            self.request.key[:12],
                            error,
                        )

    def finish(self, report: Report) -> Report:
        self._done.set()
        if self._progress_thread is not None:
            self._progress_thread.join()
        try:
            if self.rank == 0 or report.error is not None:
                report = self._send_log(report)
        finally:
            self._held.close()
        if self.store.cache is not None:
            self.store.cache.trim()
        return report

    def _send_log(self, report: Report) -> Report:
        """Upload the log, and remove a failed attempt's files. Returns the report with URLs in
        place of local paths.
        """
        log, name = (
            Path(self.request.log),
            f"{self.attempt.relative_to(self.store.root).as_posix()}/log",
        )
        try:
            for path in sorted(log.rglob("*")) if log.exists() else ():
                if path.is_file():
                    self.store.place.send(path, f"{name}/{path.relative_to(log).as_posix()}")
        except StoreError as error:
            _log.warning(
                "the log of %s %s could not be uploaded: %s",
                self.request.kind,
                self.request.key[:12],
                error,
            )
        if report.error is None:
            return report
        if self.rank == 0:  # the other members share this folder, and end with rank 0
            shutil.rmtree(self.attempt, ignore_errors=True)
        folder, url = str(self.attempt), self.store.url(self.attempt)
        return replace(report, error=report.error.replace(folder, url))
