"""`ebbline plan` from the command line: what it prints, draws and gives to scripts."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.commands.plan import described_cluster
from ebbline.sweeps.forecast.without_pins import plannable
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.pins import unpinned
from ebbline.sweeps.study.study_file import load
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from ebbline.tasks.models.model_work import model_shape
from tests.sweeps.made import written


def plan(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "ebbline.cli", "plan", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


@pytest.mark.process
def test_a_plan_says_what_a_run_would_take_and_draws_it(tmp_path):
    path, home = written(tmp_path), tmp_path / "home"
    home.mkdir()
    (home / "cluster.yaml").write_text("gpus: {A100: {usd_per_hour: 2.0}}")
    printed = " ".join(plan(str(path), "--home", str(home), "--cluster", "1x2xA100").split())
    assert "9 points are known; the search will choose 0 more." in printed
    assert (
        "on 2 GPUs (A100)" in printed
        and "$" in printed
        and "The store will grow by about" in printed
    )
    assert "the store has no language yet" in printed and "more (--why" in printed
    assert {each.name for each in (home / "studies" / "tiny").iterdir()} >= {
        "plan.png",
        "plan.pdf",
        "plan.svg",
    }
    found = json.loads(
        plan(str(path), "--home", str(home), "--cluster", "1x2xA100", "--json", "--why", "2")
    )
    assert (
        found["stages"] == found["new"]
        and found["missing"] == sum(found["new"].values())
        and len(found["misses"]) == 2
    )
    assert found["expected"]["usd"] == pytest.approx(2.0 * found["expected"]["gpu_hours"], rel=1e-3)
    assert (
        found["wall_s"] > 0
        and found["disk_bytes"] > 0
        and not found["complete"]
        and not found["never"]
    )


def test_a_cluster_is_described_by_hosts_gpus_and_types():
    hosts = described_cluster("2x8xA100-80G, 1x4").hosts
    assert [(host.gpus, host.gpu_type) for host in hosts] == [
        (8, "A100-80G"),
        (8, "A100-80G"),
        (4, None),
    ]
    assert len({host.name for host in hosts}) == 3
    for wrong in ("", "8xA100", "2x0", "2x8xA100;"):
        with pytest.raises(StudyError, match="--cluster: .*such as 2x8xA100"):
            described_cluster(wrong)


HUB = {"hub": {"id": "org/chat-13b", "commit": None, "sha256": None}}


@pytest.mark.slow
def test_a_study_without_pins_is_planned_and_the_plan_says_what_it_assumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unpinned_set = {"path": {"path": "asked.csv", "sha256": None}}
    changes = {
        "models": {"13b": {"base": HUB, "aligned": HUB}},
        "suites/refusal": {"prompts": unpinned_set, "measure": {"kind": "refusal"}},
    }
    path = written(tmp_path, changes)
    arguments = ["plan", str(path), "--cluster", "1x8xA100", "--home", str(tmp_path / "home")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "Assumed: 3 models and files have no pin, so every stage is counted as new" in text
    assert "the sizes of org/chat-13b are taken from their names" in text
    assert "asked.csv are not here: a set has 500 rows of 150 tokens" in text
    (tmp_path / "asked.csv").write_text("prompt\na\n")
    # a run needs the pins as before, and the plan left nothing that a pinned study would meet
    done = CliRunner().invoke(app, ["run", str(path), "--home", str(tmp_path / "home")])
    assert done.exit_code == 1 and "without a pin" in done.output
    assert not Home(tmp_path / "home").has_run("tiny")


def test_stand_ins_give_the_70b_model_its_size_and_change_no_pinned_study(tmp_path):
    view = StudyView(load("llama2"), Home(tmp_path))
    assert len(unpinned(view.study)) == 12
    planned, assumed = plannable(view)
    assert unpinned(planned.study) == [] and len(assumed) == 3
    family = planned.graph.baselines()["70b"]["advbench"].inputs
    model = next(each for name, each in family.items() if name != "prompts")
    shape = model_shape(model.stage.inputs["model"] if hasattr(model, "stage") else model)
    assert shape.layers == 80
    again, nothing = plannable(planned)
    assert again is planned and nothing == ()
    assert load("llama2") == view.study
