"""A second process that makes parts of a study's outputs while this one makes the others: the end
of a run is the time of one core otherwise.

Invariant: what it makes is what this process would make. If it cannot, this process does.
"""

import os
import pickle
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import Any, ParamSpec, TypeVar

# What it imports before its first call
IMPORTED = ("ebbline.sweeps.search.importance", "ebbline.analysis.figures.drawing")
P = ParamSpec("P")
T = TypeVar("T")


class SecondProcess:
    """Calls functions in the second process, one after another; without one, when their results are
    asked for. Functions and arguments must be picklable.
    """

    def __init__(self, pool: ProcessPoolExecutor | None = None) -> None:
        self._pool = pool

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        """Begin a call; returns a function that waits for its result. It raises what the call
        raises.
        """
        future: Future[T] | None = None
        # Whatever goes wrong in the second process: the call in this one succeeds, or raises it.
        with suppress(Exception):
            if self._pool is not None:
                # At once: the caller may change an argument afterwards
                future = self._pool.submit(_called, pickle.dumps((function, args, kwargs)))

        def result() -> T:
            with suppress(Exception):
                if future is not None:
                    return future.result()
            return function(*args, **kwargs)

        return result


def _called(call: bytes) -> Any:
    function, args, kwargs = pickle.loads(call)
    return function(*args, **kwargs)


def _belong_to_parent() -> None:
    """End with the parent, however it ends. Ctrl-C is for the parent alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        Thread(target=lambda: wait([sentinel]) and os._exit(1), daemon=True).start()


@contextmanager
def second_process() -> Iterator[SecondProcess]:
    """A second process inside a `with`, where the machine has a core for it."""
    if len(os.sched_getaffinity(0)) < 2:
        yield SecondProcess()
        return
    # A process of its own, not a fork: this one has threads of Ray and obstore
    with ProcessPoolExecutor(1, get_context("spawn"), _belong_to_parent) as pool:
        second = SecondProcess(pool)
        for module in IMPORTED:
            second.start(import_module, module)
        yield second
