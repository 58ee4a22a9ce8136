"""Pushing runs that were kept offline, several at once, by W&B's own `wandb sync`.

What was pushed is remembered run by run: W&B leaves a marker beside the log of each
(ebbline.analysis.wandb.memory reads it). A push that was cut off goes on with the others. Who is
logged in, and at which server, is W&B's own affair: its environment variables and netrc.

Invariant: one push of a study at a time. The lock goes with the process that pushes, also when the
one that started it has died.
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
CHUNK = 200  # runs to a process: what one process holds in memory, and a command line, are bounded
STALLED_S = 300.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Pushed:
    """How many runs the server has taken, how many wait still, and why; `why` is empty when none
    does.
    """

    pushed: int
    left: int
    why: str = ""


def push(
    folder: Path,
    runs: Sequence[Path],
    at_once: int,
    tell: Callable[[int], None],
    log: Path,
    stalled_s: float = STALLED_S,
) -> Pushed:
    """Push the runs in these folders; `tell` is called with how many are done. `folder` is the
    study's, for the lock.

    Ends when no run was done for `stalled_s`. KeyboardInterrupt ends W&B's process first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with (folder / "wandb" / "push.lock").open("a") as lock, log.open("ab") as said:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Pushed(0, len(runs), "another process is pushing them already")
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
                stdout=said,
                stderr=said,
                pass_fds=(lock.fileno(),),
                env={
                    **os.environ,
                    "WANDB_ERROR_REPORTING": "false",
                    "WANDB_DIR": str(folder),
                },  # its own log, or it would lie here
            )
            try:
                stalled = not _followed(process, runs, tell, stalled_s)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            if stalled or _done(runs) == before:
                why = (
                    f"no run was done for {stalled_s:g} s"
                    if stalled
                    else f"`wandb sync` ended with exit code {process.returncode}"
                )
                return Pushed(_done(runs), len(runs) - _done(runs), why)
    done = _done(runs)
    return Pushed(
        done, len(runs) - done, "" if done == len(runs) else "`wandb sync` did not take all of them"
    )


def _followed(
    process: "subprocess.Popen[bytes]",
    runs: Sequence[Path],
    tell: Callable[[int], None],
    stalled_s: float,
) -> bool:
    """Wait for the process; False when it has done nothing for too long."""
    done, since = _done(runs), time.monotonic()
    while process.poll() is None:
        time.sleep(_POLL_S)
        now = _done(runs)
        if now != done:
            done, since = now, time.monotonic()
            tell(done)
        elif time.monotonic() - since > stalled_s:
            return False
    tell(_done(runs))
    return True


def _done(runs: Sequence[Path]) -> int:
    return sum(any(run.glob("*.wandb.synced")) for run in runs)
