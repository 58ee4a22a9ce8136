"""Expensive folders and servers, made once in a test run and shared by all workers of pytest-xdist.

`once` makes a folder; `server` starts a process. The first caller makes it; later callers wait.
Folders of `kept` stay between runs, in build/tests/DIGEST. The digest covers the code and the
pinned packages, so other code never finds them. `EBBLINE_TESTS_COLD=1` turns this off.
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from ebbline.tasks.identity import digest

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "tests"
CODE = (
    "tasks",
    "cluster",
    "sweeps",
    "tests/shared.py",
    "tests/organisms.py",
    "tests/walk.yaml",
    "constraints.txt",
)
COLD = "EBBLINE_TESTS_COLD"


def once(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """FOLDER/NAME as `make` filled it. A `make` that was interrupted or failed starts over."""
    place, done = folder / name, folder / f"{name}.done"
    with FileLock(folder / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            make(place)
            done.touch()
    return place


def kept(run: Path) -> Path:
    """The folder for `once` that stays between runs. With EBBLINE_TESTS_COLD, `run`, which does not
    stay.
    """
    if os.environ.get(COLD):
        return run
    files = [
        path
        for name in CODE
        for path in (
            [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).rglob("*.py"))
        )
    ]
    folder = (
        KEPT
        / digest([[str(path.relative_to(ROOT)), path.read_text("utf-8")] for path in files])[:16]
    )
    with FileLock(_made(KEPT) / "lock"):
        for other in KEPT.iterdir():
            if other.is_dir() and other != folder:
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(exist_ok=True)
    return folder


def server(run: Path, name: str, start: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The JSON that `start` returned for a server of this run: its `pid` and how to reach it."""
    folder = once(
        run, name, lambda place: (place / "server.json").write_text(json.dumps(start(place)))
    )
    found: dict[str, Any] = json.loads((folder / "server.json").read_text())
    return found


def stop_servers(run: Path) -> None:
    """End every server of a run. Called once, by the process that began the run."""
    for record in run.glob("*/server.json"):
        found = json.loads(record.read_text())
        try:
            process = psutil.Process(found["pid"])
            children = process.children(recursive=True)
            process.send_signal(signal.SIGINT)
            psutil.wait_procs([process], timeout=20)
            for left in [process, *children]:
                if left.is_running():
                    left.kill()
        except psutil.NoSuchProcess:
            pass
        if "folder" in found:
            shutil.rmtree(found["folder"], ignore_errors=True)


def in_background(command: list[str], log: Path, **settings: Any) -> "subprocess.Popen[bytes]":
    """Start a process that outlives its test."""
    with log.open("wb") as handle:
        return subprocess.Popen(
            command,
            stdout=handle,
            stderr=handle,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **settings,
        )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
