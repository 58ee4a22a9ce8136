"""`ebbline sync` and `ebbline wandb-workspace` as a user types them: offline, refused, and against
a server on the loopback.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ebbline.analysis.wandb.pages import summary_key
from ebbline.cluster.store.artifacts import Store
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study_file import load
from ebbline.tasks.measuring.completions import read_completions
from tests.wandb_server import ENTITY, WandbServer, serving
from tests.whole import RUN_S, whole_study

pytestmark = [pytest.mark.timeout(RUN_S), pytest.mark.usefixtures("no_wandb_login")]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with serving() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def home(whole_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished study's home, as pushing its runs leaves a mark on them."""
    copy = tmp_path_factory.mktemp("copy") / "home"
    shutil.copytree(whole_home, copy, symlinks=True)
    return copy


def ebbline(*command: str) -> tuple[int, str]:
    """The exit code and the standard output, or the standard error if that is empty."""
    ran = subprocess.run(
        [sys.executable, "-m", "ebbline.cli", *command],
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    return ran.returncode, ran.stdout or ran.stderr


def test_sync_without_a_login_says_what_waits_and_what_to_do(home: Path) -> None:
    code, text = ebbline("sync", "whole", "--home", str(home))
    assert code == 0 and "you are not logged in" in text and "wandb login" in text


def test_a_workspace_without_a_login_is_refused(home: Path) -> None:
    code, text = ebbline("wandb-workspace", "whole", "--home", str(home))
    assert code == 1 and "`wandb login`" in text


def test_a_workspace_of_a_project_without_runs_says_to_sync_first(
    home: Path, server: WandbServer
) -> None:
    code, text = ebbline("wandb-workspace", "whole", "--home", str(home))
    assert code == 1 and "ebbline sync whole" in text and "not found" in text
    assert server.views == {}


def test_sync_pushes_everything_and_the_workspace_draws_what_is_there(
    home: Path, server: WandbServer
) -> None:
    """Only here `sync` and `wandb-workspace` work on a finished study."""
    there = ("--home", str(home))
    code, text = ebbline("sync", "whole", *there, "-n", "4", "--json")
    done = json.loads(text)
    assert (code, done["left"]) == (0, 0) and done["pushed"] == done["waiting"] > whole_study()[
        "search"
    ]["points"]
    kinds = [run.fields["jobType"] for run in server.runs.values()]
    assert (kinds.count("point"), kinds.count("study")) == (whole_study()["search"]["points"], 1)
    assert json.loads(ebbline("sync", "whole", *there, "--json")[1])["waiting"] == 0

    sent = b"\n".join(server.bodies)
    rows = [
        row
        for artifact in Store(home / "store").all("generate")
        for row in read_completions(artifact.path)
    ]
    texts = {
        text.strip().encode()
        for row in rows
        for text in (row.prompt, row.completion)
        if len(text.strip()) >= 20
    }
    assert len(texts) > 500 and not [text for text in texts if text in sent]
    assert not [
        path
        for path in (home, Path.home(), Path(sys.executable).parent)
        if str(path).encode() in sent
    ]

    code, text = ebbline("wandb-workspace", "whole", *there, "--json")
    assert code == 0, text
    assert set(json.loads(text)) == {"workspace", "report"} and f"/{ENTITY}/ebbline" in text
    assert ebbline("wandb-workspace", "whole", *there)[0] == 0
    assert server.unknown == [] and len(server.views) == 2  # the second time the same ones
    study, points = (
        load(Home(home).named("whole")),
        [run for run in server.runs.values() if run.fields["jobType"] == "point"],
    )
    trained = [run for run in server.runs.values() if run.fields["jobType"] == "training"]
    own = server.runs[f"whole-{Home(home).id[:6]}"]
    for view in server.views.values():
        panels = list(_panels(view["spec"]))
        drawn = {panel["viewType"] for panel in panels}
        assert drawn == {
            "Vega2",
            "Media Browser",
            "Scatter Plot",
            "Run History Line Plot",
            "Parallel Coordinates Plot",
            "Parameter Importance",
        }
        for panel in panels:
            _check(panel, own, points, trained)
        asked = [
            panel["config"]["targetKey"]
            for panel in panels
            if panel["viewType"] == "Parameter Importance"
        ]
        assert asked == [summary_key(name) for name in study.objectives]


def _panels(spec: Any) -> Iterator[dict[str, Any]]:
    if isinstance(spec, dict):
        if "viewType" in spec and "config" in spec:
            yield spec
        for value in spec.values():
            yield from _panels(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from _panels(value)


def _check(panel: dict[str, Any], own: Any, points: list[Any], trained: list[Any]) -> None:
    """Each thing that a panel asks for is in a run that was pushed."""
    config = panel["config"]
    if panel["viewType"] == "Vega2":
        key = config["userQuery"]["queryFields"][0]["fields"][0]["args"][0]["value"]
        table = json.loads(own.files[own.summary[key]["path"]])
        assert set(config["fieldSettings"].values()) <= set(table["columns"]) and table["data"]
    elif panel["viewType"] == "Media Browser":
        for key in config["mediaKeys"]:  # none in a study that compares nothing
            assert key not in own.summary or own.files[own.summary[key]["path"]]
    elif panel["viewType"] == "Run History Line Plot" and config["xAxis"] == "_step":
        assert any(
            metric in row
            for run in trained
            for row in run.history.values()
            for metric in config["metrics"]
        ), config
    elif panel["viewType"] == "Run History Line Plot" and config["metrics"][0].startswith(
        "status/"
    ):
        assert set(config["metrics"]) <= own.summary.keys(), "a history only while it is driven"
    elif panel["viewType"] == "Run History Line Plot":
        assert [
            row
            for row in own.history.values()
            if config["xAxis"] in row and config["metrics"][0] in row
        ]
    elif panel["viewType"] == "Scatter Plot":
        assert all(
            _reads(config[axis], run) is not None for axis in ("xAxis", "yAxis") for run in points
        )
    elif panel["viewType"] == "Parallel Coordinates Plot":
        for column in config["columns"]:
            assert any(_reads(column["accessor"], run) is not None for run in points), column


def _reads(accessor: str, run: Any) -> Any:
    """`summary:refusal/refusal_rate`, `config:train.value.rank`."""
    section, _, path = accessor.partition(":")
    if section == "summary":
        return run.summary.get(path)
    found: Any = run.config
    for part in path.split("."):
        found = found.get(part, {})
    return found if found != {} else None
