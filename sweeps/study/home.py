"""Where everything lies: one folder holds the store that all studies share and a folder for each
study.

HOME/store/                  artifacts, by kind and key, unless the profile says they lie elsewhere
HOME/id                      what this home is called in a store or a database that others share
HOME/cluster.yaml            the cluster's profile, if there is one
HOME/studies/NAME/study.json the study, with its latest budget; driver.lock names who drives it now
HOME/studies/NAME/file           the study file it was last run from, so that its name is enough
HOME/studies/NAME/spending.jsonl     what driving it took so far
HOME/studies/NAME/...        the Optuna storage, the result tables, figures, report and W&B mirror
"""

import fcntl
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ebbline.cluster.profile import Profile
from ebbline.cluster.store.artifacts import Store
from ebbline.cluster.store.retention import OWNERS
from ebbline.sweeps.study.storage import MEANWHILE, Hold, Storage, shared_url
from ebbline.sweeps.study.study_file import read_profile
from ebbline.tasks.errors import StudyError, StudyHeld
from ebbline.tasks.files import write_whole
from ebbline.tasks.identity import digest

FILE = "file"


class Home:
    """The root folder of a user's studies. Cheap to make."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.profile = read_profile(self.root / "cluster.yaml")
        self.store = store_of(self.root, self.profile)

    def folder(self, study: str) -> Path:
        path = self.root / "studies" / study
        path.mkdir(parents=True, exist_ok=True)
        return path

    def storage(self, study: str) -> Storage:
        """Where a study's points are kept. Raises StudyError when a shared database is asked for in
        a way that cannot be.
        """
        url = shared_url(self.profile.storage)
        if url is None:
            return Storage(f"sqlite:///{self.folder(study) / 'optuna.db'}", study)
        named = self.profile.store or ""
        return Storage(url, f"{study}@{digest(named if '://' in named else self.id)[:12]}")

    def named(self, name: str) -> str:
        """What ebbline.sweeps.study.study_file.load takes: the name or file as it is, and for a
        study of this home the file it was last run from.
        """
        path = self.root / "studies" / name / FILE
        return path.read_text() if "/" not in name and path.is_file() else name

    def keep_file(self, study: str, source: Path) -> None:
        """Remember the file that a study is run from."""
        (self.folder(study) / FILE).write_text(str(source.resolve()))

    @property
    def digests(self) -> Path:
        """The cache of content digests of local models and data."""
        return self.root / "digests.json"

    def has_run(self, study: str) -> bool:
        """Whether the study was begun in this home, by a driver of its own."""
        return bool(self.kept(study))

    def require(self, study: str) -> None:
        """For who only looks: nothing is made for a name, or a home, that was mistyped.

        Raises StudyError when the study was not begun here and no shared database can have it from
        another home.
        """
        shared = self.root.is_dir() and shared_url(self.profile.storage) is not None
        if not self.has_run(study) and not shared:
            raise StudyError(
                f"no study {study!r} in {self.root}; `ebbline run` begins it there, or "
                "name the --home that has it"
            )

    def kept(self, study: str) -> str:
        """The study as it was kept the last time, as JSON; empty before its first run."""
        path = self.root / "studies" / study / "study.json"
        return path.read_text() if path.exists() else ""

    def keep(self, study: str, text: str) -> None:
        """Keep a study's JSON, whole or not at all (see ebbline.sweeps.study.view)."""
        write_whole(self.folder(study) / "study.json", lambda fresh: fresh.write_text(text))

    @property
    def id(self) -> str:
        """What this home is called in a store or a database that others share. It moves with the
        folder.
        """
        path = self.root / "id"
        if not path.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            fresh = self.root / f".id.{os.getpid()}"
            fresh.write_text(uuid.uuid4().hex)
            with suppress(FileExistsError):  # another driver was first
                os.link(fresh, path)
            fresh.unlink()
        return path.read_text()

    @contextmanager
    def driving(self, study: str) -> Iterator[Hold]:
        """Hold the study for the length of a `with`. Raises StudyHeld, naming the holder, when
        somebody else does.

        The lock is the kernel's, and in a shared database that database's too: it goes with the
        process, however that ends.
        """
        path = self.folder(study) / "driver.lock"
        with path.open("a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                raise StudyHeld(
                    f"study {study!r} is being driven already, by "
                    f"{handle.read().strip() or 'another process'}{MEANWHILE}"
                ) from None
            driver = (
                f"process {os.getpid()} on {platform.node()} since "
                f"{time.strftime('%Y-%m-%d %H:%M:%S')}"
            )
            handle.truncate(0)
            handle.write(driver)
            handle.flush()
            with self.storage(study).driving(study, driver) as hold:
                # Whoever removes what nobody needs must know of all who may need it.
                self.store.place.create(f"{OWNERS}/{self.id}.json", b"{}")
                yield hold
            handle.truncate(0)

    def holder(self, study: str) -> str | None:
        """Who drives a study now, or None."""
        path = self.folder(study) / "driver.lock"
        if path.exists():
            with path.open() as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return handle.read().strip()
        return self.storage(study).holder()


def store_of(root: Path, profile: Profile) -> Store:
    """The profile's store: a bucket by URL, or a folder (a relative one starts at the home);
    HOME/store when it names none.
    """
    named = profile.store or "store"
    return Store(named if "://" in named else root / Path(named).expanduser(), profile.cache_gb)
