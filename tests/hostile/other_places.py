"""Homes on a full disk, on a read-only one, and of another user: with real mounts and users.

`python -m tests.hostile.other_places FOLDER`, as root, in mounts of its own (`unshare --mount`).
It prints JSON: a case -> what is wrong there. A case is one command, or one operation of
tests.hostile.killed. Each runs in a child, because the parent must have no threads.
"""

import importlib
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import EbblineError
from ebbline.tasks.files import is_unfinished
from tests.hostile.killed import OPERATIONS, effect, faults, prepare
from tests.sweeps.made import written
from tests.sweeps.pretended import Pretended

NOBODY, SHARED = 65534, 54321  # a user without a home, and a group of two users
ROOMS = (0, 4096, 8192, 16384)  # free bytes of a full disk
FILLER = "filler"
SIZE = 4 << 20
COMMANDS = (
    *("status tiny", "report tiny", "run tiny --executor inline --no-wandb", "pick tiny"),
    *("store gc", "store gc --older-than-h 0 --yes", "store du", "store verify", "ls"),
    *("study rm tiny --yes", "study rename tiny other"),
)
LEAVES_S = 10
KEEPS = ("study rm", "study rename")  # not given to a home that may be changed


def in_child(act: Callable[[], Any]) -> Any:
    """What `act` returns in a child process, as JSON."""
    reader, writer = os.pipe()
    number = os.fork()
    if number == 0:
        os.close(reader)
        try:
            os.write(writer, json.dumps(act()).encode())
        except BaseException:  # noqa: BLE001  # the parent shows it
            os.write(writer, json.dumps(traceback.format_exc()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(number, 0)
    return json.loads(text)


def contents(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Name -> (mode, user, text) of all files below a folder."""
    return {
        str(path.relative_to(folder)): (
            stat.S_IMODE(path.stat().st_mode),
            path.stat().st_uid,
            path.read_bytes().hex(),
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


def driven(folder: Path) -> list[str]:
    """Make a home that has run a study. Returns the modules that its commands import."""
    file = written(folder, {"axes": {"train.rank": [2], "apply.threshold": [None, 0.3]}})
    home = Home(folder / "home")
    drive(StudyView.open(home.root, str(file)), lambda: Pretended(home.store))
    home.keep_file("tiny", file)
    copy = folder.parent / "warm"
    shutil.copytree(folder, copy)
    os.chdir(copy)
    for command in COMMANDS:
        CliRunner().invoke(app, [*shlex.split(command), "--home", "home"])
    shutil.rmtree(copy)
    return sorted(sys.modules)


def invoked(command: str, folder: Path, user: int | None) -> tuple[int, str, str]:
    """(exit code, output, exception) of a command, as a user who is in the group SHARED."""
    os.umask(0o007 if user is not None else 0o022)
    if user is not None:
        os.setgroups([SHARED])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    os.chdir("/")
    done = CliRunner().invoke(app, [*shlex.split(command), "--home", str(folder / "home")])
    fault = done.exception
    known = fault is None or isinstance(fault, SystemExit)
    said = " ".join(done.output.split())
    return done.exit_code, said, "" if known else repr(fault)


def wrong_with(found: tuple[int, str, str]) -> list[str]:
    code, said, fault = found
    if os.environ.get("SHOW"):
        print(code, said[-300:], fault, file=sys.stderr)
    if fault or "Traceback" in said or "ebbline has a fault" in said:
        return [f"{fault} {said[-500:]}"]
    return [] if code in (0, 1, 2, 3, 4, 6, 75) else [f"exit code {code}: {said[-500:]}"]


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", *options, str(place)], check=True)
    try:
        yield
    finally:
        # A second process of `report` may end a moment after the command
        until = time.monotonic() + LEAVES_S
        while subprocess.run(["umount", str(place)], capture_output=True).returncode:
            if time.monotonic() > until:
                raise AssertionError(f"a process still uses {place} after {LEAVES_S} s")
            time.sleep(0.1)


def full_disks(folder: Path) -> dict[str, list[str]]:
    """Every operation with so much room: before or after, nothing half there; then with room."""
    template, disk = folder / "template", folder / "disk"
    template.mkdir()
    in_child(lambda: prepare(template))

    def operate(operation: str, work: Path) -> int:
        os.chdir(work)
        try:
            OPERATIONS[operation](work)
        except (EbblineError, OSError):
            return 1
        return 0

    results: dict[str, list[str]] = {}
    for operation in OPERATIONS:
        for room in ROOMS:
            wrong: list[str] = []
            with mounted(disk, "-t", "tmpfs", "-o", f"size={SIZE}", "none"):
                work = disk / "work"
                shutil.copytree(template, work)
                free = shutil.disk_usage(disk).free - room
                (disk / FILLER).write_bytes(b"x" * max(0, free))
                code = in_child(partial(operate, operation, work))
                lost = in_child(partial(faults, work))
                wrong += lost if isinstance(lost, list) else [lost]
                if code == 0 and not in_child(partial(effect, operation, work)):
                    wrong.append("no error was reported, and nothing was done")
                if code not in (0, 1):
                    wrong.append(str(code))
                wrong += [f"{p} stays" for p in work.rglob("*") if is_unfinished(p.name)]
                (disk / FILLER).unlink()
                if code == 1 and (
                    in_child(partial(operate, operation, work))
                    or not in_child(partial(effect, operation, work))
                ):
                    wrong.append("with room, the same operation fails")
            results[f"full disk, {room} bytes free, {operation}"] = wrong
    return results


def full_homes(folder: Path, home: Path) -> dict[str, list[str]]:
    """Every command on a full disk: one sentence, and the study is as it was."""
    disk, results = folder / "disk", {}
    for command in COMMANDS:
        with mounted(disk, "-t", "tmpfs", "-o", f"size={SIZE}", "none"):
            shutil.copytree(home, disk, dirs_exist_ok=True)
            before = contents(disk / "home" / "store")
            (disk / FILLER).write_bytes(b"x" * shutil.disk_usage(disk).free)
            wrong = wrong_with(in_child(partial(invoked, command, disk, None)))
            after = contents(disk / "home" / "store")
            if "gc" not in command and not before.items() <= after.items():
                wrong.append("the store lost something")
            (disk / FILLER).unlink()
            code, said, fault = in_child(partial(invoked, command, disk, None))
            if code == 1 and not command.startswith("pick"):  # no setting holds in so small a study
                wrong.append(f"with room: {said[-300:]} {fault}")
        results[f"full disk, {command}"] = wrong
    return results


def read_only_homes(folder: Path, home: Path) -> dict[str, list[str]]:
    results, place = {}, folder / "read-only"
    with mounted(place, "--bind", str(home)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        before = contents(place)
        for command in COMMANDS:
            wrong = wrong_with(in_child(partial(invoked, command, place, None)))
            if contents(place) != before:
                wrong.append("something changed")
            results[f"read-only disk, {command}"] = wrong
    return results


def homes_of_another(folder: Path, home: Path) -> dict[str, list[str]]:
    """A home that nobody else may read, one that others may read, and one of a group."""
    results = {}
    for kind in ("private", "readable", "shared", "held"):
        for command in COMMANDS:
            if kind in ("shared", "held") and command.startswith(KEEPS):
                continue
            if command.startswith("report"):  # its second process may not read Python's own folder
                continue
            place = folder / "of-another"
            shutil.copytree(home, place)
            for path in (place / "home", *(place / "home").rglob("*")):
                sensitive = "sensitive" in path.name
                if kind in ("shared", "held") and not sensitive:
                    os.chown(path, 0, SHARED)
                    path.chmod(0o2770 if path.is_dir() else 0o660)
                elif kind == "private":
                    path.chmod(0o700 if path.is_dir() else 0o600)
            secret = place / "home" / "studies" / "tiny" / "sensitive.jsonl"
            secret.write_text("a completion")
            secret.chmod(0o600)
            before = contents(place)

            def act(place: Path = place, command: str = command, kind: str = kind) -> Any:
                if kind != "held":
                    return invoked(command, place, NOBODY)
                with Home(place / "home").driving("tiny"):
                    return in_child(lambda: invoked(command, place, NOBODY))

            found = in_child(act)
            wrong = wrong_with(found) if isinstance(found, list) else [found]
            after = contents(place)
            kept = before if kind in ("private", "readable") else _records(before)
            if not kept.items() <= after.items():
                changed = [name for name, value in kept.items() if after.get(name) != value]
                wrong.append(f"changed: {changed}")
            if after.get("home/studies/tiny/sensitive.jsonl", (0,))[0] != 0o600:
                wrong.append("a sensitive file is readable")
            results[f"{kind} home of another user, {command}"] = wrong
            shutil.rmtree(place)
    return results


def _records(found: dict[str, Any]) -> dict[str, Any]:
    """What no command of another user may change in a shared home."""
    return {name: value for name, value in found.items() if "/store/" in name and "log" not in name}


def main(folder: Path) -> None:
    folder.chmod(0o755)
    os.environ["EBBLINE_CACHE"] = str(folder / "cache")
    home = folder / "driven"
    home.mkdir()
    for name in in_child(lambda: driven(home)):  # another user may not read Python's own folder
        if not name.startswith(("tests", "__")) and name.partition(".")[0] not in ("_pytest",):
            try:
                importlib.import_module(name)
            except ImportError:
                continue
    results = {
        **full_disks(folder),
        **full_homes(folder, home),
        **read_only_homes(folder, home),
        **homes_of_another(folder, home),
    }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
