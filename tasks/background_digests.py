"""Digests of large files, computed beside a stage's work.

The threads have the lowest priority, so they use the processor time that the stage leaves. A caller
that waits takes the hashing over at its own priority, from where they are. Processes of one machine
hash a file one after another, and all but the first find its digest.
"""

import contextlib
import fcntl
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from ebbline.tasks.files import cache_folder
from ebbline.tasks.identity import READ, digest, stamp_of

THREADS = 4
BLOCK = 1 << 22  # few enough blocks that the threads seldom wait for Python's lock
POLL_S = 0.05
TURNS = 64  # lock files on a machine
SLOWEST_BYTES_PER_S = 5e8


class Hash(Protocol):
    """What hashlib returns."""

    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class _PausedError(Exception):
    """The hashing was stopped before the end of its file."""


class _Digesting:
    """The hashing of one file. It goes on from where it was paused."""

    def __init__(self, path: Path, start: Callable[[Path], Hash] | None) -> None:
        self.path, self._start, self._stamp = path, start, stamp_of(path)
        # To hash it takes about as long as the wait for another process may take.
        self.patience_s = path.stat().st_size / SLOWEST_BYTES_PER_S
        self._hash: Hash | None = None
        self._place = 0
        self._turn: int | None = None  # an open lock file

    def run(self, paused: threading.Event, patience_s: float) -> str:
        """The digest. Waits at most `patience_s` for a process that hashes the same file. Raises
        _PausedError if `paused` was set before the end.
        """
        self._wait_for_turn(paused, patience_s)
        try:
            found = self._digest(paused)
        except _PausedError:
            raise  # the turn is kept for the caller that goes on
        except BaseException:
            self.end_turn()
            raise
        self.end_turn()
        return found

    def _digest(self, paused: threading.Event) -> str:
        def hashed(path: Path) -> str:
            return self._hashed(paused)

        return READ.of(self.path, hashed, self._stamp) if self._start is None else hashed(self.path)

    def _hashed(self, paused: threading.Event) -> str:
        if self._hash is None:
            self._hash = hashlib.sha256() if self._start is None else self._start(self.path)
        with memoryview(bytearray(BLOCK)) as block, self.path.open("rb", buffering=0) as file:
            file.seek(self._place)
            while not paused.is_set():
                size = file.readinto(block)
                if not size:
                    return self._hash.hexdigest()
                self._hash.update(block[:size])
                self._place += size
        raise _PausedError

    def _wait_for_turn(self, paused: threading.Event, patience_s: float) -> None:
        # It only saves work: a machine without locks hashes a file once in each process.
        if self._turn is not None:
            return
        with contextlib.suppress(OSError):
            folder = cache_folder() / "hashing"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            name = str(int(digest(self._stamp)[:8], 16) % TURNS)
            self._turn = os.open(folder / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            end = time.monotonic() + patience_s
            while not self._has_turn():
                if time.monotonic() >= end or paused.wait(POLL_S):
                    self.end_turn()
                    return

    def _has_turn(self) -> bool:
        assert self._turn is not None
        try:
            fcntl.flock(self._turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def end_turn(self) -> None:
        """Let another process hash the file."""
        if self._turn is not None:
            os.close(self._turn)
            self._turn = None


class BackgroundDigests:
    """The digests of the files that `add` was called with. A file's digest is a Future, which has
    the error of its thread too.
    """

    def __init__(self) -> None:
        self._waited_for, self._stopped = threading.Event(), threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        self._begun: list[tuple[_Digesting, Future[str]]] = []

    def add(self, path: Path, start: Callable[[Path], Hash] | None = None) -> Future[str]:
        """Begin to hash a file: by sha256, or by the hash that `start` returns."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_threads(), "input-digests", _at_lowest_priority)
        digesting, found = _Digesting(path, start), Future[str]()
        self._begun.append((digesting, found))
        self._pool.submit(self._settle, found, digesting, self._waited_for, float("inf"))
        return found

    def stop(self) -> None:
        """Hash no more. What is not finished has no digest."""
        self._stopped.set()
        self._waited_for.set()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def finish(self) -> None:
        """Return when all files are hashed. The caller has nothing else to do meanwhile."""
        if self._pool is None:
            return
        self._waited_for.set()
        self._pool.shutdown(cancel_futures=True)
        never = threading.Event()
        open_files = [(each, found) for each, found in self._begun if not found.done()]
        with ThreadPoolExecutor(_threads(), "input-digests") as pool:
            for digesting, found in open_files:
                pool.submit(self._settle, found, digesting, never, digesting.patience_s)

    def _settle(
        self,
        found: "Future[str]",
        digesting: _Digesting,
        paused: threading.Event,
        patience_s: float,
    ) -> None:
        try:
            found.set_result(digesting.run(paused, patience_s))
        except _PausedError:
            if self._stopped.is_set():
                digesting.end_turn()
        # Whoever reads the digest gets the error.
        except BaseException as error:  # noqa: BLE001
            found.set_exception(error)


def _threads() -> int:
    return min(THREADS, os.cpu_count() or 1)


def _at_lowest_priority() -> None:
    if sys.platform == "linux":  # elsewhere the call is for the whole process
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
