"""A mirror in a process of its own that does what a test says, a line at a time.

    python -m tests.analysis.mirror_process FOLDER < commands

The first line is the study as JSON. Then: `update N` shows the first N points and prints the
outcome, `clock S` moves this process's clock to S seconds beside the right one, `fill` takes all
space that the disk of FOLDER has left and `free` gives it back, `close` ends the mirror.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ebbline.analysis.wandb.runs import Mirror
from ebbline.sweeps.study.study import Study
from tests.analysis.conftest import result
from tests.wandb_server import WandbServer

CALL_S = 15.0
SMALL_DISK = 'mount -t tmpfs -o size=4m none "$0" && exec "$@"'


class MirrorProcess:
    """Ended by `close`. On a `small_disk` the folder is a file system of 4 MB, which no other
    process sees.
    """

    def __init__(
        self, study: Study, folder: Path, server: WandbServer, small_disk: bool = False
    ) -> None:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "tests.analysis.mirror_process", str(folder)]
        if small_disk:
            command = ["unshare", "-Urm", "sh", "-c", SMALL_DISK, str(folder), *command]
        self._process = subprocess.Popen(
            command,
            env=os.environ | server.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.tell(study.model_dump_json())

    def tell(self, line: str) -> Any:
        """What the process answers."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def update(self, points: int) -> str | None:
        """Shows so many points; the error, or None."""
        error: str | None = self.tell(f"update {points}")
        return error

    def close(self) -> None:
        self.tell("close")
        assert self._process.wait(120) == 0


def main() -> None:
    folder, right = Path(sys.argv[1]), time.time
    study = Study.model_validate_json(sys.stdin.readline())
    mirror = Mirror(study, folder, "online", "0123456789abcdef", bound_s=3 * CALL_S, call_s=CALL_S)
    answer: str | None = None
    print("null", flush=True)
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        if word == "update":
            points = [result(n, refusal=0.1 * (n + 1), rank=n + 1) for n in range(int(number))]
            answer = mirror.update(points, []).error
        elif word == "clock":
            offset = float(number)
            time.time = lambda offset=offset: right() + offset  # type: ignore[misc]
        elif word == "fill":
            with (folder / "filler").open("wb", buffering=0) as filler:
                try:
                    while filler.write(b"x" * 4096):
                        pass
                except OSError as error:
                    answer = str(error)
        elif word == "free":
            (folder / "filler").unlink()
        elif word == "close":
            mirror.close()
        print(json.dumps(answer), flush=True)
        if word == "close":
            return


if __name__ == "__main__":
    main()
