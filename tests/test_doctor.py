"""`ebbline doctor`, run for real against what is there and what is broken: each fault is found, and
its remedy names the thing.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

from ebbline.cluster import checks
from ebbline.commands import doctor as doctor_module
from ebbline.commands.doctor import examine
from ebbline.sweeps.study.home import Home

UNWRITABLE = Path("/sys/kernel/ebbline")  # nobody makes folders there, not even root


class Findings(dict[str, dict[str, str]]):
    """The findings by check, and the exit code."""

    code: int


def doctor(home: Path, *arguments: str, **environment: str) -> Findings:
    done = subprocess.run(
        [sys.executable, "-m", "ebbline", "doctor", "--home", str(home), "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"WANDB_MODE": "offline"} | environment,
    )
    assert done.stdout, done.stderr
    findings = Findings({finding["check"]: finding for finding in json.loads(done.stdout)})
    findings.code = done.returncode
    return findings


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes; the second says that it has two A100, and what it cost."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    cluster.add_node(
        num_cpus=1,
        num_gpus=2,
        resources={"accelerator_type:A100": 1},
        labels={"ray.io/market-type": "spot"},
    )
    yield cluster
    cluster.shutdown()


@pytest.mark.process
def test_on_a_healthy_home_nothing_is_a_problem_and_nothing_stays_behind(tmp_path: Path) -> None:
    home = tmp_path / "home"
    findings = doctor(home)
    assert findings.code == 0
    assert [
        findings[check]["verdict"]
        for check in ("versions", "compiler", "ray", "wandb", "store", "database")
    ] == ["ok"] * 6
    assert not [path for path in home.rglob("*") if path.is_file()]


@pytest.mark.process
def test_every_finding_that_is_not_ok_has_a_remedy_of_one_line(tmp_path: Path) -> None:
    findings = doctor(tmp_path, HF_HOME=str(tmp_path), WANDB_MODE="online")
    assert {finding["verdict"] for finding in findings.values()} >= {"ok", "warning"}
    for finding in findings.values():
        assert (
            bool(finding["remedy"]) == (finding["verdict"] != "ok")
            and "\n" not in finding["remedy"]
        )


def test_in_a_terminal_a_finding_is_a_line_and_its_remedy_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        doctor_module.Finding("disk", "ok", "fine"),
        doctor_module.Finding("ray", "problem", "gone", "start it"),
    ]
    assert doctor_module.print_findings(found, as_json=False) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok       disk      fine",
        "problem  ray       gone",
        f"{'':18} -> start it",
    ]


@pytest.mark.cluster
def test_a_cluster_is_joined_and_its_nodes_gpus_and_labels_are_printed(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "cluster.yaml").write_text("gpus: {A100: {usd_per_hour: 2.5}}\n")
    findings = doctor(tmp_path, "--address", cluster.address)
    assert findings.code == 0 and findings["ray"]["verdict"] == "ok"
    assert (
        "2 nodes, 2 GPUs" in findings["ray"]["seen"]
        and "ray.io/market-type=spot" in findings["ray"]["seen"]
    )
    assert findings["prices"] == {
        "check": "prices",
        "verdict": "ok",
        "seen": "the profile prices A100",
        "remedy": "",
    }


@pytest.mark.cluster
def test_logical_gpus_are_called_so_and_priced_as_other(tmp_path: Path) -> None:
    logical = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "num_gpus": 2, "include_dashboard": False},
    )
    try:
        (tmp_path / "cluster.yaml").write_text(
            f"address: {logical.address}\ngpus: {{other: {{usd_per_hour: 4}}}}\n"
        )
        findings = doctor(tmp_path)
    finally:
        logical.shutdown()
    assert (
        "1 node, 2 logical GPUs" in findings["ray"]["seen"]
        and "$4, the profile's `other`" in findings["prices"]["seen"]
    )


@pytest.mark.cluster
def test_a_gpu_type_without_a_price_is_named(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(
        f"address: {cluster.address}\ngpus: {{H100: {{usd_per_hour: 4}}}}\n"
    )
    findings = doctor(tmp_path)
    assert (
        findings["prices"]["verdict"] == "warning"
        and "A100" in findings["prices"]["seen"]
        and "cluster.yaml" in findings["prices"]["remedy"]
    )


@pytest.mark.cluster
def test_a_cluster_of_another_version_is_a_problem_that_names_both(
    cluster: Cluster, tmp_path: Path
) -> None:
    gcs = GcsClient(address=cluster.address)
    before = gcs.internal_kv_get(b"CLUSTER_METADATA", b"cluster")
    gcs.internal_kv_put(
        b"CLUSTER_METADATA",
        json.dumps(json.loads(before) | {"ray_version": "2.1.0"}).encode(),
        True,
        b"cluster",
    )
    try:
        findings = doctor(tmp_path, "--address", cluster.address)
    finally:
        gcs.internal_kv_put(b"CLUSTER_METADATA", before, True, b"cluster")
    assert (
        findings.code == 1
        and "Ray: 2.1.0" in findings["ray"]["seen"]
        and "Ray and Python" in findings["ray"]["remedy"]
    )


@pytest.mark.process
def test_an_unreachable_cluster_is_a_problem_within_seconds(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        findings = doctor(tmp_path, "--address", address)
    assert findings.code == 1 and findings["ray"]["verdict"] == "problem"
    assert address in findings["ray"]["seen"] and "ray up" in findings["ray"]["remedy"]


@pytest.mark.process
def test_what_answers_nothing_is_given_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "LONGEST_S", 8.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = {
            finding.check: finding
            for finding in examine(Home(tmp_path), f"127.0.0.1:{silent.getsockname()[1]}")
        }
    assert found["ray"].verdict == "problem" and "--address" in found["ray"].remedy


@pytest.mark.process
def test_a_home_that_cannot_be_written_is_a_problem_three_times() -> None:
    findings = doctor(UNWRITABLE)
    assert findings.code == 1
    assert {check for check, finding in findings.items() if finding["verdict"] == "problem"} == {
        "home",
        "store",
        "database",
    }
    assert (
        "EBBLINE_HOME" in findings["home"]["remedy"] and str(UNWRITABLE) in findings["home"]["seen"]
    )


@pytest.mark.process
@pytest.mark.parametrize(
    ("storage", "says"),
    [
        ("not a url", "not the URL of a database"),
        ("postgresql://nobody:secret@127.0.0.1:1/ebbline", "holds a password"),
        ("postgresql://nobody@127.0.0.1:1/ebbline", "not reachable"),
    ],
)
def test_a_bad_storage_url_is_a_problem_that_keeps_its_password(
    storage: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "cluster.yaml").write_text(f"storage: {storage}\n")
    findings = doctor(tmp_path)
    assert findings.code == 1 and findings["database"]["verdict"] == "problem"
    assert (
        says in findings["database"]["seen"]
        and "`storage:` in HOME/cluster.yaml" in findings["database"]["remedy"]
    )
    assert "secret" not in json.dumps(findings)


@pytest.mark.process
def test_an_object_store_that_does_not_answer_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("store: s3://ebbline-test/runs\n")
    keys = {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "hidden-word",
        "AWS_REGION": "us-east-1",
    }
    findings = doctor(tmp_path, AWS_ENDPOINT_URL="http://127.0.0.1:1", **keys)
    assert (
        findings.code == 1
        and findings["store"]["verdict"] == "problem"
        and "s3://ebbline-test/runs" in findings["store"]["seen"]
    )
    assert "AWS_ENDPOINT_URL" in findings["store"]["remedy"] and "hidden-word" not in json.dumps(
        findings
    )


def test_an_object_store_is_tried_as_a_run_would_use_it(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(f"store: {bucket}\n")
    findings = doctor(tmp_path)
    assert findings["store"] == {
        "check": "store",
        "verdict": "ok",
        "seen": f"{bucket}: created once, read back, deleted",
        "remedy": "",
    }
    assert not list(Home(tmp_path).store.place.entries())


@pytest.mark.process
def test_a_relative_store_is_tried_where_a_run_would_put_it(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("store: artifacts\n")
    assert doctor(tmp_path)["store"]["seen"].startswith(f"{tmp_path / 'artifacts'}: ")


@pytest.mark.process
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_compiler_that_does_not_compile_is_warned_of(compiler: str, tmp_path: Path) -> None:
    found = doctor(tmp_path, CXX=compiler)["compiler"]
    assert found["verdict"] == "warning" and compiler in found["seen"] and "g++" in found["remedy"]


@pytest.mark.process
def test_online_without_a_login_is_a_problem(tmp_path: Path) -> None:
    nobody = {
        "HOME": str(tmp_path),
        "WANDB_API_KEY": "",
        "NETRC": str(tmp_path / "none"),
        "WANDB_CONFIG_DIR": str(tmp_path),
    }
    findings = doctor(tmp_path, WANDB_MODE="online", HF_HOME=str(tmp_path), HF_TOKEN="", **nobody)
    assert (
        findings["wandb"]["verdict"] == "problem" and "wandb login" in findings["wandb"]["remedy"]
    )
    assert findings["hub"]["verdict"] == "warning" and "HF_TOKEN" in findings["hub"]["remedy"]


@pytest.mark.process
def test_a_broken_profile_is_one_error_that_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("storrage: x\n")
    done = subprocess.run(
        [sys.executable, "-m", "ebbline", "doctor", "--home", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "storrage" in done.stderr and "Traceback" not in done.stderr
