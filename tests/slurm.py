"""A real Slurm for tests, from Debian's packages: munge, slurmctld and two slurmd (n1, n2) on the
loopback of this machine, as root, without systemd and cgroups.

Each node has two pretended GPUs, so Slurm sets CUDA_VISIBLE_DEVICES as it does for real ones.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
NODES = ("n1", "n2")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
CPUS = 4  # of each node; more than the machine may have, so that two nodes fit on it
START_S, END_S = 60.0, 20.0
MOST_JOBS = 1000  # of one Slurm here
CONFIG = """
ClusterName=ebbline
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=5
FirstJobId={job}
{nodes}
PartitionName=test Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The Debian packages that a Slurm for tests still needs."""
    return [package for name, package in PACKAGES.items() if shutil.which(name, path=PATH) is None]


def why_not() -> str:
    """Why a Slurm cannot run here; empty if it can."""
    if absent := missing():
        return f"Slurm is not installed; on Debian: apt-get install {' '.join(absent)}"
    return "" if os.getuid() == 0 else "slurmd starts jobs as other users, which only root may"


@dataclass(frozen=True)
class Slurm:
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def call(self, *command: str, timeout_s: float = 60.0) -> str:
        """The standard output of one of Slurm's commands."""
        done = subprocess.run(
            command,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}"
        return done.stdout

    def state(self, job: str) -> str:
        """The state of a job, such as PENDING, RUNNING or COMPLETED."""
        return self.call("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        fields = self.call("scontrol", "show", "job", job, "-o").split()
        return {name: value for name, _, value in (field.partition("=") for field in fields)}


@contextmanager
def running() -> Iterator[Slurm]:
    """A Slurm of its own, with both nodes idle. It ends every process that it started."""
    folder = Path(tempfile.mkdtemp(prefix="ebbline-slurm-", dir="/tmp"))
    slurm = Slurm(folder)
    try:
        _configure(folder)
        _start(slurm)
        yield slurm
    finally:
        _stop(slurm)
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> None:
    folder.chmod(0o755)
    host = socket.gethostname().partition(".")[0]
    ports = _free_ports(len(NODES) + 1)
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    nodes = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} "
        "RealMemory=8000 Gres=gpu:2 State=UNKNOWN"
        for node, port in zip(NODES, ports[1:], strict=True)
    ]
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            host=host,
            port=ports[0],
            folder=folder,
            job=1 + secrets.randbelow(60_000_000),  # two Slurms on one machine share /tmp
            nodes="\n".join(nodes),
            names=",".join(NODES),
        )
    )
    # Slurm wants character devices, and these are on every machine.
    devices = [
        f"NodeName={node} Name=gpu Flags=nvidia_gpu_env File={device}"
        for node in NODES
        for device in ("/dev/null", "/dev/zero")
    ]
    (folder / "gres.conf").write_text("\n".join(["AutoDetect=off", *devices, ""]))
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)


def _start(slurm: Slurm) -> None:
    folder = slurm.folder
    munge = [
        "munged",
        f"--socket={folder}/munge.socket",
        f"--key-file={folder}/munge.key",
        f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munged.seed",
        "--num-threads=2",
    ]
    slurm.call(*munge)
    slurm.call("slurmctld")
    for node in NODES:
        slurm.call("slurmd", "-N", node)
    deadline = time.monotonic() + START_S
    while (states := _states(slurm)) != ["idle"] * len(NODES):
        assert time.monotonic() < deadline, (states, _logs(folder))
        time.sleep(0.2)


def _states(slurm: Slurm) -> list[str]:
    with suppress(AssertionError):  # slurmctld does not answer yet
        return slurm.call("sinfo", "-h", "-N", "-o", "%t").split()
    return []


def _logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))


def _stop(slurm: Slurm) -> None:
    """End the jobs, then the daemons by their pid files."""
    folder, pids = slurm.folder, list[int]()
    with suppress(AssertionError, subprocess.TimeoutExpired):  # slurmctld did not start
        slurm.call("scancel", "--user=root")
        deadline = time.monotonic() + END_S
        while slurm.call("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.2)
    for path in (folder / "slurmctld.pid", *folder.glob("slurmd-*.pid"), folder / "munged.pid"):
        with suppress(OSError, ValueError):
            pids.append(int(path.read_text()))
    daemons = list[psutil.Process]()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            daemons.append(psutil.Process(pid))
    for process in (*_of_jobs(folder), *daemons):
        with suppress(psutil.NoSuchProcess):
            process.terminate() if process in daemons else process.kill()
    for process in psutil.wait_procs(daemons, timeout=END_S)[1]:
        process.kill()


def _of_jobs(folder: Path) -> list[psutil.Process]:
    """The processes of jobs that still run. A slurmstepd shows its job, and no environment."""
    if not (config := folder / "slurm.conf").exists():
        return []
    first = int(config.read_text().partition("FirstJobId=")[2].split()[0])
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        title = " ".join(process.info["cmdline"] or [])
        step = re.match(r"slurmstepd: \[(\d+)\.", title)
        settings = process.info["environ"] or {}
        if (step and first <= int(step[1]) < first + MOST_JOBS) or (
            "SLURM_JOB_ID" in settings and settings.get("SLURM_CONF", "").startswith(f"{folder}/")
        ):
            found.append(process)
    return found


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:  # all are bound before the first is closed, so the ports differ
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
