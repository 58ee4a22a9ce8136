"""The processes that Ray starts with a cluster on this machine, less those that nothing here reads.

Each imports Python packages while the first stages wait for a core. Ray itself has the switches
(`ray start --no-monitor --include-log-monitor=False`), but `ray.init` does not pass them on.
"""

from collections.abc import Iterator
from contextlib import contextmanager

# The only place where `ray.init` can be told. A Ray that starts them elsewhere starts them all.
from ray._private.node import Node

# The autoscaler, which a local cluster has not; the copies of workers' output on the driver's
# screen; the server of the dashboard and of `ray job`, whose page is switched off anyway.
UNUSED = ("start_monitor", "start_log_monitor", "start_api_server")


def _not_started(node: Node, **options: object) -> None:
    return None


@contextmanager
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
