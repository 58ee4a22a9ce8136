"""A study through real `ray up`, `ray submit` and `ray down`, over sshd, on a machine within this
machine.

That machine is a set of Linux namespaces: its processes, its network (a loopback of its own) and
/run, /tmp/ray are apart. So Ray's own `ray stop` finds no other cluster's processes, every port is
free, nothing is changed outside, and all of it ends when the pipe to its first process closes,
which the kernel does even if this process is killed.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from ebbline.cluster.store.artifacts import Store
from tests.organisms import copied

REPOSITORY = Path(__file__).parents[1]
CLUSTER = REPOSITORY / "ray_cluster.yaml"
NEEDED = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "unshare", "nsenter")
INSTALL = (
    "as root on Debian: apt-get install openssh-server openssh-client rsync iproute2 util-linux"
)


def why_not() -> str:
    """Why this machine cannot run these tests; empty when it can."""
    missing = [name for name in NEEDED if shutil.which(name, path=SEARCHED) is None]
    if missing:
        return f"no {', '.join(missing)} here; {INSTALL}"
    tried = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "--net", "true"],
        capture_output=True,
        text=True,
    )
    return (
        ""
        if tried.returncode == 0
        else f"no namespaces for this user ({tried.stderr.strip()}); run the tests as root"
    )


SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NOT_HERE = why_not()
over_ssh = pytest.mark.skipif(bool(NOT_HERE), reason=f"`ray up` over sshd: {NOT_HERE}")

# The first process of the machine within: it waits for the end of its input, and everything goes
# with it.
INSIDE = """
set -e
ip link set lo up
mount -t tmpfs none /run
mkdir -p /run/sshd /tmp/ray
mount -t tmpfs none /tmp/ray
$(command -v sshd) -D -e -f "$1" &
cat
"""

SSHD = """
ListenAddress 127.0.0.1:22
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
SetEnv HOME={folder}/home
"""


@dataclass(frozen=True)
class Machine:
    """The machine within, and the cluster's file for it."""

    first: int
    folder: Path
    cluster: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def __call__(self, *command: str, timeout_s: float = 300) -> str:
        """Run a command on it, in the repository's root, as somebody at its terminal would. Its
        output; it must succeed.
        """
        inside = [
            "nsenter",
            "--target",
            str(self.first),
            "--pid",
            "--mount",
            "--net",
            f"--wd={REPOSITORY}",
        ]
        # No terminal: `ray up` runs over `ssh -tt` all the same. PYTHONPATH goes: what runs is what
        # Ray copied.
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "PYTHON"))
        }
        done = subprocess.run(
            [*inside, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            env=environment
            | {
                "TMPDIR": str(self.folder / "tmp"),
                "PATH": f"{Path(sys.executable).parent}:{SEARCHED}",
            },
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def processes(self) -> list[str]:
        return self("ps", "-A", "-o", "args=").splitlines()


def local_variant(folder: Path) -> dict[str, Any]:
    """ray_cluster.yaml for one machine without GPUs: the same files, the same Ray commands, and
    this environment's Python.
    """
    config: dict[str, Any] = yaml.safe_load(CLUSTER.read_text())
    for key in (
        "available_node_types",
        "head_node_type",
        "max_workers",
        "upscaling_speed",
        "head_setup_commands",
    ):
        del config[key]
    config["cluster_name"] = (
        f"ebbline-{os.getpid()}"  # in the name of ssh's control socket, which lies outside
    )
    config["provider"] = {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
    config["file_mounts"]["~/runs/cluster.yaml"] = str(folder / "profile.yaml")
    python = Path(sys.executable).parent
    config["setup_commands"] = [
        f"echo 'export PATH={python}:$PATH PYTHONPATH=~/ebbline-source WANDB_MODE=offline' "
        "> ~/.bashrc"
    ]
    start = config["head_start_ray_commands"]
    config["head_start_ray_commands"] = [
        command.replace("--head", "--head --num-gpus=2 --num-cpus=8") for command in start
    ]
    return config


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    for name in ("host", "key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "home" / ".bashrc").touch()
    config = local_variant(folder)
    (folder / "profile.yaml").write_text("address: auto\n")
    (folder / "cluster.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with (folder / "sshd.log").open("wb") as log:
        outer = subprocess.Popen(
            [
                "unshare",
                "--pid",
                "--fork",
                "--mount-proc",
                "--net",
                "sh",
                "-c",
                INSIDE,
                "sh",
                str(folder / "sshd_config"),
            ],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | {"PATH": SEARCHED},
        )
    try:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        while not (first := children.read_text().strip()):
            assert outer.poll() is None, (folder / "sshd.log").read_text()
        yield Machine(int(first), folder, folder / "cluster.yaml")
    finally:
        assert outer.stdin is not None
        outer.stdin.close()
        outer.wait(120)
        for control in Path("/tmp").glob(
            f"ray_ssh_*/{hashlib.sha256(config['cluster_name'].encode()).hexdigest()[:10]}"
        ):
            shutil.rmtree(control)


def test_the_file_for_aws_is_valid_to_ray_and_names_no_account() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert {name: kind["resources"].get("GPU", 0) for name, kind in types.items()} == {
        "head": 0, "one_gpu": 1, "eight_gpus_spot": 8, "eight_gpus": 8,
    }  # fmt: skip
    for kind in types.values():
        spot = kind["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
        assert kind["labels"]["ray.io/market-type"] == ("spot" if spot else "on-demand")
    assert "constraints.txt" in " ".join(prepared["setup_commands"])
    assert not [
        word for word in ("arn:", "AKIA", "KeyName:", "ami-0") if word in CLUSTER.read_text()
    ]


def test_every_part_that_the_package_needs_is_mounted() -> None:
    mounts = yaml.safe_load(CLUSTER.read_text())["file_mounts"]
    assert all(
        (REPOSITORY / local).exists() and remote == f"~/ebbline-source/{local}"
        for remote, local in mounts.items()
    )
    packages = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} - {"tests"}
    assert set(mounts.values()) == packages | {
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
    }


@over_ssh
@pytest.mark.cluster
@pytest.mark.timeout(1500)
def test_a_study_with_a_gang_runs_from_ray_up_to_ray_down(
    machine: Machine, walk_home: Path
) -> None:
    """Only here a study goes through `ray up`, `ray submit` and `ray down`, over sshd."""
    copied(walk_home, machine.home / "runs")
    study = yaml.safe_load((REPOSITORY / "tests" / "walk.yaml").read_text())
    study |= {"study": "submitted", "axes": {"train.rank": [8, 4], "apply.threshold": [None, 0.35]}}
    study["models"]["70b"] = study["models"]["7b"] | {"gpus": 2, "axes": {"train.rank": [4]}}
    study["models"]["7b"] = study["models"]["7b"] | {"axes": {"train.rank": [8]}}
    study["train"]["steps"] = 20  # it is the way there that is tested
    study["search"] = {"sampler": "grid", "points": 4, "window": 4}
    (machine.folder / "study.yaml").write_text(yaml.safe_dump(study))
    cluster = str(machine.cluster)
    command = ["run", "~/study.yaml", "--home", "~/runs", "--no-wandb"]

    machine("ray", "up", "--yes", cluster)
    submit = ("ray", "submit", cluster, "ebbline/__main__.py", "--")
    assert "auto: ray" in machine(*submit, "doctor", "--home", "~/runs")
    machine("ray", "rsync-up", cluster, str(machine.folder / "study.yaml"), "~/study.yaml")
    printed = machine(*submit, *command, timeout_s=900)
    assert "4 points in this run" in printed
    again = machine(*submit, *command)
    assert " 0 stages run" in again

    frame = pd.read_parquet(machine.home / "runs" / "studies" / "submitted" / "results.parquet")
    assert set(frame["status"]) == {"done"} and set(frame["model"]) == {"7b", "70b"}
    own_steps = study["train"]["steps"]  # the walk's training is in the store too
    trained = [
        artifact
        for artifact in Store(machine.home / "runs" / "store").all("train")
        if artifact.hashed["spec"]["steps"] == own_steps
    ]
    assert sorted(artifact.provenance["gpus"] for artifact in trained) == [1, 2]
    assert any("raylet" in line for line in machine.processes())

    machine("ray", "down", "--yes", cluster)
    assert not [line for line in machine.processes() if "raylet" in line or "gcs_server" in line]
