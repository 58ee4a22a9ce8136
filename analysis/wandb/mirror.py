"""The W&B mirror's process: reads the results every few seconds and shows new ones.

    python -m ebbline.analysis.wandb.mirror STUDY --home DIR

Invariants: nothing waits for the mirror. It runs until its standard input closes, which also
happens when the parent process ends or dies; then it shows the remaining results and exits. With
`</dev/null` it shows everything once. A study has one mirror at a time: the next one waits until
the one before has ended.
"""

import argparse
import fcntl
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ebbline.analysis.results.collect import collect
from ebbline.analysis.results.controls.means import collect_controls
from ebbline.analysis.wandb.alerts import NEED_ONLINE
from ebbline.analysis.wandb.live import drive_status, live_trainings
from ebbline.analysis.wandb.runs import Mirror, Mirrored, chosen_mode
from ebbline.cluster.store.artifacts import Artifact, Store
from ebbline.sweeps.study.home import MIRROR_LOCK
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.view import StudyView

EVERY_S = 5.0
SLOWEST_S = 300.0
POLL_S = 0.2
TURN_S = 600.0  # how long a mirror waits for the one of an earlier run
_log = logging.getLogger("ebbline.analysis.wandb.mirror")


def start(study: str, home: Path, log: Path, *options: str) -> "subprocess.Popen[bytes]":
    """Starts the mirror of a study, given by name or YAML path.

    Ctrl-C in the terminal does not reach the mirror; `stop` ends it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-P",  # ignores a folder `wandb` or `tasks` in the working directory
        "-m",
        "ebbline.analysis.wandb.mirror",
        study,
        "--home",
        str(home),
        *options,
    ]
    with log.open("ab") as handle:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=handle, stderr=handle, start_new_session=True
        )


def stop(process: "subprocess.Popen[bytes]", wait_s: float = 30.0) -> bool:
    """Lets the mirror show the remaining results. False if it was killed after `wait_s` seconds."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        return process.wait(wait_s) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


def let_go(process: "subprocess.Popen[bytes]") -> int | None:
    """Lets the mirror show the remaining results by itself. Its exit code if it has ended before,
    None while it goes on.
    """
    ended = process.poll()
    if process.stdin is not None:
        process.stdin.close()
    return ended


@contextmanager
def alone(folder: Path, wait_s: float = 0.0) -> Iterator[bool]:
    """Holds the study's mirror lock; yields False if another mirror still holds it after `wait_s`
    seconds.
    """
    path, end = folder / MIRROR_LOCK, time.monotonic() + wait_s
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        while not _locked(handle):
            if time.monotonic() >= end:
                yield False
                return
            time.sleep(POLL_S)
        yield True


def _locked(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def trainings_of(results: Sequence[Result], store: Store) -> list[Artifact]:
    """The trainings behind the results, without duplicates, sorted by key."""
    keys = {
        key
        for result in results
        for stage, key in result.keys.items()
        if stage.startswith("train[")
    }
    return [artifact for key in sorted(keys) if (artifact := store.find("train", key)) is not None]


def follow(view: StudyView, mirror: Mirror, every_s: float = EVERY_S) -> bool:
    """Updates until standard input closes, then while updates make progress.

    Returns whether everything was shown. The interval doubles after each failure.
    """
    failures, closed = 0, False
    while True:
        update = _once(view, mirror)
        if update.error is not None:
            failures += 1
            _log.warning("%d shown, %d left: %s", update.shown, update.left, update.error)
        else:
            failures = 0
        if closed and (update.error is None or not update.shown):
            mirror.close()
            return update.error is None
        closed = closed or _closed_within(min(SLOWEST_S, every_s * 2**failures))


def _once(view: StudyView, mirror: Mirror) -> Mirrored:
    try:
        results = collect(view)
        trainings = trainings_of(results, view.home.store)
        live = list(live_trainings(view))
        status = drive_status(view, live)
    # The sweep may be writing; the next update reads it
    except Exception as error:  # noqa: BLE001
        return Mirrored(error=f"{type(error).__name__}: {error}")
    return mirror.update(results, trainings, live, status, lambda: collect_controls(view, results))


def _closed_within(seconds: float) -> bool:
    readable, _, _ = select.select([sys.stdin.fileno()], [], [], seconds)
    return bool(readable) and not os.read(sys.stdin.fileno(), 4096)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ebbline.analysis.wandb.mirror", description="Mirror a study to W&B."
    )
    parser.add_argument("study", help="the name of a shipped study, or a YAML file")
    parser.add_argument(
        "--home", type=Path, required=True, help="the folder that holds the store and the studies"
    )
    parser.add_argument("--every", type=float, default=EVERY_S, help="seconds between updates")
    parser.add_argument(
        "--offline",
        action="store_true",
        help="keep the runs in the study's folder, even when logged in",
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ.setdefault(
        "WANDB_ERROR_REPORTING", "false"
    )  # W&B would send its own crash reports to Sentry
    os.nice(10)
    view = StudyView.begun(given.home, given.study)
    study, home = view.study, view.home
    mode = chosen_mode()
    mode = "offline" if given.offline and mode == "online" else mode
    _log.info("mirroring %s, %s", study.study, mode)
    if mode == "disabled":
        return
    if mode == "offline" and home.profile.wandb_alerts:
        _log.info(NEED_ONLINE)
    with alone(view.folder, TURN_S) as only:
        if not only:
            _log.info("another mirror of this study is running")
        elif not follow(
            view,
            Mirror(study, view.folder, mode, home.id, home.profile),
            given.every,
        ):
            sys.exit(1)


if __name__ == "__main__":
    main()
