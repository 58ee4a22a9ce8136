"""A waiting process imports what it will need; a job that comes meanwhile waits for that."""

import subprocess
import sys
import threading

import pytest

from ebbline.cluster.executors import preparation
from ebbline.tasks.kinds import import_kinds_without_gpu
from ebbline.tasks.stage_kind import StageKind


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


def test_a_waiting_process_imports_what_each_adapter_or_point_needs(monkeypatch) -> None:
    """`convert` and `adapter` import transformers: three seconds of a core in each process."""
    loaded = list[str]()
    monkeypatch.setattr(StageKind, "load_function", lambda kind: loaded.append(kind.name))
    import_kinds_without_gpu()
    assert set(loaded) == {"project", "apply", "measure", "defend", "score"}


@pytest.mark.process
def test_a_waiting_process_imports_torch_but_not_transformers() -> None:
    code = (
        "import sys; from ebbline.tasks.kinds import import_kinds_without_gpu as prepare;"
        " prepare(); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "False"]
