"""Rename and remove studies of a home.

Invariant: each is one rename of the study's folder. A process that is killed leaves the study as it
was before, or as it is afterwards. No driver and no W&B mirror can have the study meanwhile.
"""

import fcntl
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pydantic import TypeAdapter, ValidationError

from ebbline.sweeps.study.database import shared_url
from ebbline.sweeps.study.home import MIRROR_LOCK, POINTS_NAME, Home, is_plain
from ebbline.sweeps.study.policies import Name
from ebbline.tasks.errors import StudyError, StudyHeld
from ebbline.tasks.files import write_whole

REMOVED = "removed"  # the folder of a home for removed studies, until their files are deleted


def rename(home: Home, old: str, new: str) -> None:
    """Rename a study. Its points keep their name inside their own database file.

    Raises StudyError when the home has no study `old` or has a study `new`, and when `new` is no
    name for a study. Also when another study starts warm from `old`. Raises StudyHeld when a driver
    or a mirror has the study.
    """
    require_free(home, new)
    require_removable(home, old)
    if shared_url(home.profile.storage) is not None:
        raise StudyError(
            f"the points of {old!r} are in a shared database, where other homes find them by this "
            f"name, so it is not renamed. `ebbline study copy {old} {new}` writes a study file "
            "with the new name"
        )
    with _alone(home, old):
        name = home.database(old).name
        write_whole(home.path(old) / POINTS_NAME, lambda fresh: fresh.write_text(name))
        try:
            home.path(old).rename(home.path(new))
        except OSError as error:
            raise StudyError(f"{home.path(old)} cannot be renamed: {error}") from error
    with suppress(OSError, ValueError):  # cannot be read: the folder has the new name
        # for people who read the file; `kept` has the new name anyway
        home.keep(new, home.kept(new))


def remove(home: Home, name: str) -> None:
    """Remove a study's folder. Its artifacts stay in the store until `ebbline store gc`, and points
    in a shared database stay there.

    Raises StudyError and StudyHeld as `rename` does.
    """
    require_removable(home, name)
    removed = home.root / REMOVED
    with _alone(home, name):
        removed.mkdir(exist_ok=True)
        try:
            home.path(name).rename(removed / f"{name}-{uuid.uuid4().hex[:8]}")
        except OSError as error:
            raise StudyError(f"{home.path(name)} cannot be removed: {error}") from error
    for left in removed.iterdir():  # also what a killed process left
        with suppress(FileNotFoundError):  # another process deletes it, too
            shutil.rmtree(left)
    with suppress(OSError):  # another process has just put a study there
        removed.rmdir()


def require_free(home: Home, name: str) -> None:
    """Raise StudyError when `name` is no name for a study, or when the home has that study."""
    if home.path(name).exists() and is_plain(name):
        raise StudyError(f"{home.root} has a study {name!r}; give another name")
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise StudyError(
            f"{name!r} cannot be the name of a study: a name has letters, digits, `_`, `-` and "
            "`.`, begins with a letter or digit, and has at most 150 characters"
        ) from None


def warmed_by(home: Home, name: str) -> list[str]:
    """The studies of the home whose search starts from the results of this one."""
    found = []
    for other in home.studies():
        with suppress(StudyError):  # damaged: its own commands say so
            study = home.begun(other)
            if study is not None and name in study.search.warm_start:
                found.append(other)
    return found


def require_removable(home: Home, name: str) -> None:
    """Raise StudyError when the home has no such study, or when another one starts warm from it."""
    if not is_plain(name) or not home.has_run(name):
        raise StudyError(
            f"no study {name!r} in {home.root}; `ebbline ls` lists the studies of a home"
        )
    if others := warmed_by(home, name):
        raise StudyError(
            f"`search.warm_start` of {', '.join(map(repr, others))} names {name!r}, and every run "
            f"of {'these studies' if len(others) > 1 else 'that study'} reads it, so it keeps its "
            "name and its place"
        )


@contextmanager
def _alone(home: Home, name: str) -> Iterator[None]:
    """Hold the study, and the lock of its W&B mirror where it had one."""
    with home.driving(name):
        lock = home.path(name) / MIRROR_LOCK
        if not lock.exists():
            yield
            return
        with lock.open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StudyHeld(
                    f"the W&B mirror of {name!r} still runs; repeat the command when it has ended"
                ) from None
            yield
