"""What all tests share: the tiers and their guard, hypothesis settings, and fixtures that are made
once in a run.

A test without a mark gets the mark `fast`. A fast test fails if it loads a model, starts a process
or takes over 2 seconds, more on a slower machine. `model`, `process`, `cluster`, `browser` and
`slow` name what a test needs. Some fixtures mark the tests that use them. Only `make test-long`
runs `long` tests. pyproject.toml lists the marks, and docs/contributing.md explains them.
"""

import importlib
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Generator, Iterator
from functools import cached_property
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# One thread each: xdist's workers and their processes share few cores, and waiting threads spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.shared import kept, once, server, stop_servers

if TYPE_CHECKING:
    from tests.postgres import Postgres
    from tests.tiny import Pair

settings.register_profile(
    "ebbline",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("ebbline")

LOOP_S = 0.065  # what `_slowness`'s loop takes on the machine on which the 2 seconds were chosen
SLOW_S = 20.0
GROUPS = "groups.json"
NEEDS = ("model", "process", "cluster", "browser", "slow", "long")
FIXTURE_MARKS = {  # fixture -> the mark of the tests that use it
    "pair": "model",
    "walk_home": "model",
    "s3_server": "process",
    "postgres": "process",
    "own_postgres": "process",
    "whole_home": "cluster",
    "quickstart_home": "long",
    "ray_cluster": "cluster",
    "machines": "cluster",
    "browser": "browser",
}
HOW = f"Mark it with one of {', '.join(NEEDS)} (docs/contributing.md)."
PROCESSES = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec"}


@given(st.text())
def _draw_any_text(text: str) -> None:
    """Hypothesis makes its tables of Unicode at the first text, which takes over a second."""


def _slowness() -> float:
    """How many times longer than on the reference machine Python computes here, at least 1."""
    taken_s = []
    for _ in range(3):
        began = time.process_time()
        sum(i * i % 7 for i in range(1_000_000))
        taken_s.append(time.process_time() - began)
    return max(1.0, min(taken_s) / LOOP_S)


def _fast_s() -> float:
    """The limit of a fast test in seconds on this machine."""
    given_s = os.environ.get("EBBLINE_FAST_S")
    return float(given_s) if given_s else 2.0 * _slowness()


FAST_S = _fast_s()


@pytest.hookimpl(wrapper=True)  # before the marks are selected by -m
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    """Mark by fixtures, and put long work first."""
    _draw_any_text()
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in FIXTURE_MARKS:
                item.add_marker(FIXTURE_MARKS[fixture])
        if not any(item.get_closest_marker(name) for name in NEEDS):
            item.add_marker("fast")
        if not getattr(getattr(item, "function", None), "__doc__", None):
            item.user_properties.append(("docstring", False))
    order = {"cluster": 0, "browser": 1, "process": 2, "model": 3, "slow": 4}
    items.sort(
        key=lambda item: min(
            (order[mark.name] for mark in item.iter_markers() if mark.name in order), default=5
        )
    )
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw0":
        groups = {
            item.nodeid: name
            for item in items
            for name in ("cluster", "browser")
            if item.get_closest_marker(name)
        }
        (_run_folder(config) / GROUPS).write_text(json.dumps(groups))
    return (yield)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker of xdist for all tests with a cluster, one for all with a browser, and one for
    each other file.

    `--dist loadgroup` does that by the mark `xdist_group`, but xdist 3.8 does not see it under
    pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        @cached_property
        def groups(self) -> dict[str, str]:
            found: dict[str, str] = json.loads((_run_folder(config) / GROUPS).read_text())
            return found

        def _split_scope(self, nodeid: str) -> str:
            return self.groups.get(nodeid, nodeid.partition("::")[0])

    config.option.loadscopereorder = False  # the order is that of the collection
    return Groups(config, log)


class _Guard:
    """Fails a fast test at the call that the fast tier forbids."""

    def __init__(self) -> None:
        self.active, self.broken = False, ""

    def forbid(self, what: str) -> None:
        if self.active:
            self.broken = self.broken or f"a test of the fast tier {what}. {HOW}"
            pytest.fail(self.broken)


_guard = _Guard()
_start = BaseProcess.start


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event in PROCESSES:
        _guard.forbid(f"started a process: {event} {arguments[0] if arguments else ''}"[:160])


def _on_start(process: BaseProcess) -> None:
    """The audit hook does not see processes that multiprocessing starts."""
    _guard.forbid(f"started a process: multiprocessing {process.name}")
    _start(process)


def _watch_modules() -> None:
    """Watch the constructor of torch modules, since every model is one."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "nn") or hasattr(torch.nn.Module, "_watched"):
        return
    begin = torch.nn.Module.__init__

    def watched(self: Any, *arguments: Any, **named: Any) -> None:
        _guard.forbid(f"made a model: {type(self).__name__}")
        begin(self, *arguments, **named)

    torch.nn.Module.__init__ = watched
    torch.nn.Module._watched = True


sys.addaudithook(_on_event)
BaseProcess.start = _on_start  # type: ignore[method-assign]


def _clocks() -> tuple[float, float]:
    """Seconds that this process computed, and seconds that this thread did not wait for a core.

    Other work on the machine increases neither.
    """
    try:
        waited_ns = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except OSError:
        return time.process_time(), time.process_time()
    return time.process_time(), time.perf_counter() - waited_ns / 1e9


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a fast test that starts a process, makes a model, or takes over FAST_S."""
    if not item.get_closest_marker("fast"):
        return (yield)
    _watch_modules()
    _guard.active, _guard.broken, since = True, "", _clocks()
    try:
        result = yield
    finally:
        _guard.active = False
        computed_s, own_s = (now - then for now, then in zip(_clocks(), since, strict=True))
    if _guard.broken:  # even if the test caught the failure, or a thread caused it
        pytest.fail(_guard.broken, pytrace=False)
    waited_s = own_s - computed_s  # more on a busy disk, so its limit is wider
    for what, taken_s, limit_s in (
        ("computed", computed_s, FAST_S),
        ("waited", waited_s, 3 * FAST_S),
    ):
        if taken_s > limit_s:
            # Other work on the machine's cores slows this one: how fast is Python just now?
            limit_s = max(limit_s, limit_s / FAST_S * _fast_s())
        if taken_s > limit_s:
            pytest.fail(
                f"a test of the fast tier {what} for {taken_s:.1f} s, which is over {limit_s:g} "
                f"s. {HOW}",
                pytrace=False,
            )
    return result


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the tests over SLOW_S that have no docstring."""
    reports = [
        report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])
    ]
    silent = [
        report
        for report in reports
        if report.duration > SLOW_S and ("docstring", False) in report.user_properties
    ]
    if silent:
        terminalreporter.section(
            f"over {SLOW_S:.0f} s, with no docstring that says what only this test proves"
        )
        for report in sorted(silent, key=lambda report: -report.duration):
            terminalreporter.write_line(f"{report.duration:.1f} s {report.when} {report.nodeid}")


@pytest.fixture(scope="session", autouse=True)
def _imported() -> None:
    """Import what most tests import before all of them, so that no test's time includes it."""
    for name in (
        "matplotlib.backends.backend_agg",
        "optuna",
        "pandas",
        "plotly.graph_objects",
        "scipy.stats",
        "sklearn.ensemble",
    ):
        importlib.import_module(name)


# --- fixtures that are made once in a run
# -------------------------------------------------------------------------------------------------


def _run_folder(config: pytest.Config) -> Path:
    """The folder of this run that all workers of xdist share."""
    base: Path = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not os.environ.get("PYTEST_XDIST_WORKER"):
        stop_servers(_run_folder(session.config))


@pytest.fixture(scope="session")
def run_folder(request: pytest.FixtureRequest) -> Path:
    return _run_folder(request.config)


def fail_without_a_package(report: pytest.CollectReport | pytest.TestReport) -> None:
    """The `test` extra has every Python package: a skip for a missing one is a failure."""
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if re.search(r"could not import|No module named|ImportError", reason):
            report.outcome, report.longrepr = (
                "failed",
                f"{reason}: add it to the extra `test`, and do not skip",
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    fail_without_a_package(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    fail_without_a_package(report)
    return report


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> "Pair":
    """A base and an aligned Llama (2 layers, 64 wide, random) with a word tokenizer and a chat
    template.
    """
    from tests.tiny import (
        build_pair,  # imports torch, which most tests of the driver never load
    )

    return build_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def walk_home(run_folder: Path) -> Path:
    """The home of the finished walk study: a base, an aligned model and an adapter, all really
    trained.
    """
    from tests.organisms import walked

    return once(kept(run_folder), "walk", walked)


@pytest.fixture(scope="session")
def whole_home(run_folder: Path, walk_home: Path) -> Path:
    """A home in which `ebbline run` has finished a small study with all the quickstart's parts:
    Ray, a gang, lm-eval, W&B, the report.
    """
    from tests.whole import run_whole

    return once(run_folder, "whole", lambda home: run_whole(home, walk_home))


@pytest.fixture(scope="session")
def quickstart_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which `ebbline run quickstart` has finished. EBBLINE_QUICKSTART_HOME names one to
    continue.
    """
    from tests.whole import run_quickstart

    named = os.environ.get("EBBLINE_QUICKSTART_HOME")
    home = Path(named) if named else tmp_path_factory.mktemp("quickstart")
    run_quickstart(home)
    return home


@pytest.fixture(scope="session")
def s3_server(run_folder: Path) -> str:
    """The endpoint of a real S3 server."""
    from tests.s3 import start

    return str(server(run_folder, "s3", start)["endpoint"])


@pytest.fixture
def bucket(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty store in a new bucket. Sets the environment: the server, and a cache for
    this test.
    """
    from tests.s3 import environment, make_bucket

    for name, value in environment(s3_server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EBBLINE_CACHE", str(tmp_path / "cache"))
    name = f"ebbline-{uuid.uuid4().hex[:12]}"
    make_bucket(s3_server, name)
    return f"s3://{name}/studies"


@pytest.fixture
def postgres(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> "Postgres":
    """An empty database on the run's PostgreSQL, for this test. Sets PGPASSWORD."""
    from tests.postgres import MISSING, PASSWORD, Postgres, binaries, start

    if binaries() is None:
        pytest.skip(MISSING)
    found = server(run_folder, "postgres", start)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    return Postgres(Path(found["folder"]), Path(found["bin"]), found["port"]).with_database(
        f"test_{uuid.uuid4().hex[:12]}"
    )


@pytest.fixture
def no_wandb_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Removes every W&B login and setting from the environment."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """48 short conversations as chat JSONL."""
    from tests.tiny import write_chats

    return write_chats(tmp_path / "chats.jsonl", 48)
