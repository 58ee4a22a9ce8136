"""Digests that threads compute beside a stage: right wherever they are taken over, and once on a
machine.
"""

import fcntl
import os
import sys
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbline.tasks import background_digests
from ebbline.tasks.background_digests import BackgroundDigests, _Digesting, _PausedError
from ebbline.tasks.identity import READ, digest, file_digest, stamp_of

DATA = bytes(range(256)) * 3


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EBBLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(READ, "known", {})
    monkeypatch.setattr(background_digests, "POLL_S", 0.001)
    (tmp_path / "weights").write_bytes(DATA)
    return tmp_path


class PausedAfter:
    """An event that is set once it was asked so many times."""

    def __init__(self, times: int) -> None:
        self.left = times

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.integers(1, 300), st.lists(st.integers(0, 5), max_size=5))
def test_a_digest_that_was_paused_anywhere_is_that_of_the_whole_file(folder, block, pauses):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background_digests, "BLOCK", block)
        digesting = _Digesting(folder / "weights", None)
        for times in pauses:
            try:
                found = digesting.run(PausedAfter(times), 0)
            except _PausedError:
                continue
            assert found == file_digest(folder / "weights")
        assert digesting.run(threading.Event(), 0) == file_digest(folder / "weights")


def lock_of(path):
    """The lock of another process that hashes this file."""
    name = str(int(digest(stamp_of(path))[:8], 16) % background_digests.TURNS)
    lock = background_digests.cache_folder() / "hashing" / name
    lock.parent.mkdir(parents=True)
    handle = os.open(lock, os.O_CREAT | os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def test_a_file_that_another_process_hashes_is_not_hashed_again(folder, monkeypatch):
    path = folder / "weights"
    held, background = lock_of(path), BackgroundDigests()
    monkeypatch.setattr(_Digesting, "_hashed", lambda self, paused: pytest.fail("hashed twice"))
    found = background.add(path)
    with pytest.raises(TimeoutError):
        found.result(0.05)
    READ.known[stamp_of(path)] = "the digest of the other process"
    os.close(held)
    assert found.result(10) == "the digest of the other process"


def test_the_end_of_a_stage_does_not_wait_for_ever_for_another_process(folder):
    held, background = lock_of(folder / "weights"), BackgroundDigests()
    found = background.add(folder / "weights")
    background.finish()
    assert found.result(0) == file_digest(folder / "weights")
    os.close(held)


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads")
def test_a_stage_has_priority_over_the_threads_until_it_waits_for_them(folder, monkeypatch):
    priorities, whole, began = [], _Digesting._hashed, threading.Event()

    def hashed(self, paused):
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        began.set()
        paused.wait(0.2)
        return whole(self, paused)

    monkeypatch.setattr(_Digesting, "_hashed", hashed)
    background = BackgroundDigests()
    found = background.add(folder / "weights")
    assert began.wait(10)
    background.finish()
    assert found.result(0) == file_digest(folder / "weights")
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert priorities == [19, own]


def test_digests_that_are_stopped_keep_no_other_process_waiting(folder):
    began = threading.Event()

    def hashed(self, paused):
        began.set()
        paused.wait(10)
        raise _PausedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Digesting, "_hashed", hashed)
        background = BackgroundDigests()
        found = background.add(folder / "weights")
        assert began.wait(10)
        background.stop()
        background._pool.shutdown()
    other = _Digesting(folder / "weights", None)
    assert other._wait_for_turn(threading.Event(), 0) is None and other._turn is not None
    other.end_turn()
    assert not found.done()


def test_an_error_of_a_thread_is_not_lost(folder, monkeypatch):
    def fails(self, paused):
        raise ValueError("from the thread")

    monkeypatch.setattr(_Digesting, "_hashed", fails)
    background = BackgroundDigests()
    found = background.add(folder / "weights")
    background.finish()
    with pytest.raises(ValueError, match="from the thread"):
        found.result(0)
