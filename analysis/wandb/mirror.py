"""The W&B mirror's process: reads the truth every few seconds and shows what is new; nothing waits
for it.

    python -m ebbline.analysis.wandb.mirror STUDY --home DIR

Invariants: it ends by itself. It goes on until its standard input closes, which also happens when
the process that started it dies; then it shows what is left and exits. With `</dev/null` it shows
everything once. A study has one mirror at a time.
"""

import argparse
import fcntl
import logging
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ebbline.analysis.results.collect import collect
from ebbline.analysis.wandb.runs import Mirror, Mirrored, chosen_mode
from ebbline.cluster.store.artifacts import Artifact, Store
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.view import StudyView

EVERY_S = 5.0
SLOWEST_S = 300.0
_log = logging.getLogger("ebbline.analysis.wandb.mirror")


def start(study: str, home: Path, log: Path, *options: str) -> "subprocess.Popen[bytes]":
    """Begin to mirror a study, by name or YAML path. Ctrl-C at the terminal does not reach it;
    `stop` does.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-P",  # a folder called `wandb` or `tasks` where the user stands is not ours
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
    """Let the mirror show what is left. False when it was not done after `wait_s` and was ended."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        return process.wait(wait_s) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Whether no other mirror shows this study now; none does for the length of the `with`, if
    so.
    """
    path = folder / "wandb" / "mirror.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def trainings_of(results: Sequence[Result], store: Store) -> list[Artifact]:
    """The trainings behind the results, once each, in the order of their keys."""
    keys = {
        key
        for result in results
        for stage, key in result.keys.items()
        if stage.startswith("train[")
    }
    return [artifact for key in sorted(keys) if (artifact := store.find("train", key)) is not None]


def follow(view: StudyView, mirror: Mirror, every_s: float = EVERY_S) -> bool:
    """Update until standard input closes, then as long as that gets on; whether everything was
    shown.

    After failures the updates come less and less often.
    """
    failures, closed = 0, False
    while True:
        done = _once(view, mirror)
        if done.error is not None:
            failures += 1
            _log.warning("%d shown, %d left: %s", done.shown, done.left, done.error)
        else:
            failures = 0
        if closed and (done.error is None or not done.shown):
            mirror.close()
            return done.error is None
        closed = closed or _closed_within(min(SLOWEST_S, every_s * 2**failures))


def _once(view: StudyView, mirror: Mirror) -> Mirrored:
    try:
        results = collect(view)
        trainings = trainings_of(results, view.home.store)
    # The sweep may be writing; what cannot be read now is read next time
    except Exception as error:  # noqa: BLE001
        return Mirrored(error=f"{type(error).__name__}: {error}")
    return mirror.update(results, trainings)


def _closed_within(seconds: float) -> bool:
    readable, _, _ = select.select([sys.stdin.fileno()], [], [], seconds)
    return bool(readable) and not os.read(sys.stdin.fileno(), 4096)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ebbline.analysis.wandb.mirror", description="Mirror a study to W&B."
    )
    parser.add_argument("study", help="the name of a study that ships, or a YAML file")
    parser.add_argument(
        "--home", type=Path, required=True, help="the folder that holds the store and the studies"
    )
    parser.add_argument("--every", type=float, default=EVERY_S, help="seconds between updates")
    parser.add_argument(
        "--offline",
        action="store_true",
        help="keep the runs in the study's folder, whoever is logged in",
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ.setdefault(
        "WANDB_ERROR_REPORTING", "false"
    )  # W&B would send its own crash reports to Sentry
    os.nice(10)
    view = StudyView.open(given.home, given.study)
    study, home = view.study, view.home
    mode = chosen_mode()
    mode = "offline" if given.offline and mode == "online" else mode
    _log.info("mirroring %s, %s", study.study, mode)
    if mode == "disabled":
        return
    with alone(view.folder) as only:
        if not only:
            _log.info("another mirror shows it already")
        elif not follow(
            view,
            Mirror(study, view.folder, mode, home.id, home.profile),
            given.every,
        ):
            sys.exit(1)


if __name__ == "__main__":
    main()
