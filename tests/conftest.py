"""What every folder's tests share: hypothesis settings, a guard over skips, and one tiny model pair on disk."""

import os
import re
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.tiny import Pair

settings.register_profile("ebbline", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("ebbline")


def fail_without_a_package(report: pytest.CollectReport | pytest.TestReport) -> None:
    """The `test` extra has every Python package: a skip for want of one is a failure."""
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if re.search(r"could not import|No module named|ImportError", reason):
            report.outcome, report.longrepr = "failed", f"{reason}: add it to the extra `test`, and do not skip"


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
    """A base and an aligned Llama (2 layers, 64 wide, random) with a word tokenizer and a chat template."""
    from tests.tiny import build_pair  # brings torch, which most tests of the driver's side never load

    return build_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def quickstart_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which `ebbline run quickstart` has ended; whoever asks first pays for the run, and marks its timeout.

    EBBLINE_QUICKSTART_HOME names one to go on with, while tests are being written.
    """
    from tests.quickstart import run_quickstart

    named = os.environ.get("EBBLINE_QUICKSTART_HOME")
    home = Path(named) if named else tmp_path_factory.mktemp("quickstart")
    run_quickstart(home)
    return home


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a real server of the S3 protocol."""
    from tests.s3 import running

    with running(tmp_path_factory.mktemp("s3") / "server.log") as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty store in a bucket of its own; the environment names the server, and a cache of this test's."""
    from tests.s3 import environment, make_bucket

    for name, value in environment(s3_server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EBBLINE_CACHE", str(tmp_path / "cache"))
    name = f"ebbline-{uuid.uuid4().hex[:12]}"
    make_bucket(s3_server, name)
    return f"s3://{name}/studies"


@pytest.fixture
def no_wandb_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in to W&B, and nothing in the environment speaks to it."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """48 short conversations as chat JSONL."""
    from tests.tiny import write_chats

    return write_chats(tmp_path / "chats.jsonl", 48)
