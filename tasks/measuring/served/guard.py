"""Runs a command and ends it, with all that it started, when the process that started this one is
gone. It is run as a file, and imports nothing of ebbline:

    python guard.py COMMAND...

Its standard input is a pipe that its parent holds open. The pipe closes when the parent ends in
whatever way, also by a kill that it cannot see.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

GRACE_S = 10.0
REAP_S = 5.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)


def main(command: list[str]) -> int:
    """The command's exit code."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what the command leaves behind becomes a child of this one
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_parent
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: child.terminate())
    threading.Thread(target=_end_with_input, args=[child], daemon=True).start()
    code = child.wait()
    _kill_group(child.pid)
    _reap()
    return code


def _end_with_input(child: "subprocess.Popen[bytes]") -> None:
    while os.read(0, 1024):
        pass
    child.terminate()
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        _kill_group(child.pid)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _reap() -> None:
    """Wait for killed processes: not every process 1 of a container does."""
    deadline = time.monotonic() + REAP_S
    with contextlib.suppress(ChildProcessError):  # there is none left
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.05)


def _end_with_parent() -> None:
    """For the case that this guard itself is killed."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
