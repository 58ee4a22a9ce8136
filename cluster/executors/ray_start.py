"""Connects a driver to Ray.

Invariant: a local cluster that does not start, or that loses its head meanwhile, is a lost cluster:
the same command continues. Ray's core would end the process by itself, with code 1 and without a
word of ours.

A local cluster starts without the processes that nothing here reads. Each imports Python packages
while the first stages wait for a core. Ray itself has the switches (`ray start --no-monitor
--include-log-monitor=False`), but `ray.init` does not pass them on.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import ray

# `ray.init` has no setting for these processes, so the methods that start them are replaced. If a
# later Ray starts them by other methods, they run again, and a test fails.
from ray._private.node import Node

from ebbline.tasks.errors import ClusterLost

# The autoscaler, which a local cluster has not; the copies of workers' output on the driver's
# screen; the server of the dashboard and of `ray job`, whose page is switched off anyway.
UNUSED = ("start_monitor", "start_log_monitor", "start_api_server")
HEAD = "gcs_server"
LOOK_S = 1.0
AGAIN = "run the same command to start it again and continue"


def join(address: str, settings: dict[str, Any]) -> None:
    """Start a cluster on this machine (`local`), or join the one at an address. Raises ClusterLost
    when a local one does not start.
    """
    connect = {"address": address, "log_to_driver": False, "logging_level": "ERROR", **settings}
    if address != "local":
        ray.init(**connect)
        return
    try:
        with _leaving_with_the_head(), without_unused_processes():
            ray.init(**connect)
    except Exception as error:  # Ray raises its own, the system's and plain ones
        ray.shutdown()
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ClusterLost(f"Ray did not start on this machine ({reason}); {AGAIN}") from error


@contextlib.contextmanager
def _leaving_with_the_head() -> Iterator[None]:
    """End this process as after a lost cluster, if the head ends inside the `with`. The main thread
    is inside Ray's core then, which no exception reaches.
    """
    joined = threading.Event()

    def watch() -> None:
        seen = False
        while not joined.wait(LOOK_S):
            lives = _head_lives()
            if (lives is False or (seen and lives is None)) and not joined.is_set():
                sys.stderr.write(f"error: Ray on this machine ended as it started; {AGAIN}\n")
                sys.stderr.flush()
                os._exit(os.EX_TEMPFAIL)
            seen = seen or lives is not None

    thread = threading.Thread(target=watch, name="ebbline-ray-start", daemon=True)
    thread.start()
    try:
        yield
    finally:
        joined.set()
        thread.join()


def _head_lives() -> bool | None:
    """Whether the head that this process started runs; None when there is none. A head that was
    killed stays a child of this process, as a zombie.
    """
    found = None
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if HEAD in child.name():
                found = child.status() != psutil.STATUS_ZOMBIE
    return found


@contextlib.contextmanager
def without_unused_processes() -> Iterator[None]:
    """A cluster that `ray.init` starts inside a `with` lacks the processes of UNUSED."""
    before = {name: vars(Node)[name] for name in UNUSED if name in vars(Node)}
    for name in before:
        setattr(Node, name, _not_started)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


def _not_started(node: Node, **options: object) -> None:
    return None
