"""A waiting process imports what it will need; a job that comes meanwhile waits for that."""

import threading

import pytest

from ebbline.cluster.executors import preparation


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event, list[str]]:
    """(set when importing has begun, to be set so that it ends, what happened)."""
    begun, may_end, log = threading.Event(), threading.Event(), list[str]()

    def slow() -> None:
        begun.set()
        assert may_end.wait(10)
        log.append("imported")

    monkeypatch.setattr(preparation, "import_kinds_without_gpu", slow)
    monkeypatch.setattr(preparation, "IDLE_S", 0.05)
    monkeypatch.setattr(preparation, "_prepared", False)
    monkeypatch.setattr(preparation, "_timer", None)
    return begun, may_end, log


def test_jobs_that_follow_each_other_wait_for_no_import(imports, monkeypatch) -> None:
    begun, _, log = imports
    monkeypatch.setattr(preparation, "IDLE_S", 60.0)
    for _ in range(3):
        preparation.before_a_job()
        preparation.after_a_job()
    preparation.before_a_job()
    assert not begun.is_set() and not log


def test_a_job_waits_for_an_import_that_has_begun_and_it_happens_once(imports) -> None:
    begun, may_end, log = imports
    preparation.after_a_job()
    assert begun.wait(10)
    threading.Timer(0.1, may_end.set).start()
    preparation.before_a_job()
    assert log == ["imported"]
    preparation.after_a_job()
    preparation.before_a_job()
    assert log == ["imported"]
