"""Pushes offline runs to a server, several at once, with W&B's own `wandb sync`.

W&B leaves a marker beside the log of each pushed run (ebbline.analysis.wandb.memory reads it), so
an interrupted push continues with the remaining runs. W&B takes the login and the server from its
environment variables and netrc.

Invariant: a study has one push at a time. The pushing process inherits the lock, so it stays locked
if the parent dies.
"""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

AT_ONCE = 8
CHUNK = 200  # most runs of one process: bounds its memory and its command line
STALLED_S = 300.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Pushed:
    """How many runs were pushed and are left; `why` is the reason, empty if none is left."""

    pushed: int
    left: int
    why: str = ""


def push(
    folder: Path,
    runs: Sequence[Path],
    at_once: int,
    on_progress: Callable[[int], None],
    log: Path,
    stalled_s: float = STALLED_S,
) -> Pushed:
    """Pushes the runs in these folders; calls `on_progress` with the number of pushed runs.

    `folder` is the study's and holds the lock. The push ends if no run finishes in `stalled_s`
    seconds. KeyboardInterrupt ends W&B's process first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with (folder / "wandb" / "push.lock").open("a") as lock, log.open("ab") as output:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Pushed(0, len(runs), "another process is pushing these runs")
        for start in range(0, len(runs), CHUNK):
            chunk, before = runs[start : start + CHUNK], _done(runs)
            command = [
                sys.executable,
                "-m",
                "wandb",
                "sync",
                "--yes",
                "-n",
                str(at_once),
                *map(str, chunk),
            ]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock.fileno(),),
                env={
                    **os.environ,
                    "WANDB_ERROR_REPORTING": "false",
                    "WANDB_DIR": str(folder),
                },  # without it, W&B writes its own log to the working directory
            )
            try:
                stalled = not _followed(process, runs, on_progress, stalled_s)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            if stalled or _done(runs) == before:
                why = (
                    f"no run was pushed for {stalled_s:g} s"
                    if stalled
                    else f"`wandb sync` ended with exit code {process.returncode}"
                )
                return Pushed(_done(runs), len(runs) - _done(runs), why)
    done = _done(runs)
    return Pushed(
        done, len(runs) - done, "" if done == len(runs) else "`wandb sync` did not push all runs"
    )


def _followed(
    process: "subprocess.Popen[bytes]",
    runs: Sequence[Path],
    on_progress: Callable[[int], None],
    stalled_s: float,
) -> bool:
    """Waits for the process; False if no run was pushed for `stalled_s` seconds."""
    done, since = _done(runs), time.monotonic()
    while process.poll() is None:
        time.sleep(_POLL_S)
        now = _done(runs)
        if now != done:
            done, since = now, time.monotonic()
            on_progress(done)
        elif time.monotonic() - since > stalled_s:
            return False
    on_progress(_done(runs))
    return True


def _done(runs: Sequence[Path]) -> int:
    return sum(any(run.glob("*.wandb.synced")) for run in runs)
