"""`ebbline plan` from the command line: what it prints, draws and gives to scripts."""

import json
import subprocess
import sys

import pytest

from ebbline.commands.plan import described_cluster
from ebbline.tasks.errors import StudyError
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
