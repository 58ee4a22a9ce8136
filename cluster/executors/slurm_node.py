"""Ray on the nodes of a Slurm job, for the script that `ebbline slurm` writes.

    python -m ebbline.cluster.executors.slurm_node address JOB        prints HOST:PORT for the head
    python -m ebbline.cluster.executors.slurm_node start JOB ADDRESS  runs Ray on this node (srun)
    python -m ebbline.cluster.executors.slurm_node wait JOB ADDRESS NODES PID

JOB is a folder of this job in the study's folder. It holds Ray's token, so it also shows whether a
node sees the home. `wait` returns when Ray has all nodes, or fails when the process PID (srun) has
ended: srun ends all nodes when one fails.

Invariant: only processes with the token can use the cluster. Ray's ports are open to everybody on
the machine, and would run what they receive.
"""

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from ebbline.cluster.executors.this_machine import VISIBLE, only_visible, visible_gpus
from ebbline.tasks.errors import ClusterLost, EbblineError, StudyError

TOKEN = "token"
TEMPORARY = "/tmp"  # short: the path of a Unix socket has at most 107 bytes
READY_S = 300.0
END_S = 20.0  # less than Slurm's usual KillWait
LOOK_EVERY_S = 0.5


def address(job: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Make the job's folder and token. Return this machine's address, with a free port."""
    job.mkdir(parents=True, exist_ok=True)
    token = job / TOKEN
    token.unlink(missing_ok=True)
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with socket.socket() as free:
        free.bind(("", 0))
        return f"{_own_address(environment)}:{free.getsockname()[1]}"


def _own_address(environment: Mapping[str, str]) -> str:
    """The address under which the other nodes reach this machine."""
    nodes = subprocess.run(
        ["scontrol", "show", "hostnames", environment.get("SLURM_JOB_NODELIST", "")],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    # The last node is another machine, if there is one. Without it any remote address does: a
    # datagram socket sends nothing when it connects.
    for host in (*nodes[1:][-1:], "8.8.8.8"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            try:
                route.connect((host, 9))
            except OSError:  # an unknown name, or no route
                continue
            found = str(route.getsockname()[0])
            if not found.startswith("127."):
                return found
    return socket.gethostbyname(socket.gethostname())


def ray_start(
    job: Path, head: str, asked: int, logical: int, environment: Mapping[str, str] = os.environ
) -> list[str]:
    """The command that runs Ray on this node. Raises StudyError when the node lacks what the job
    was given.
    """
    name = environment.get("SLURMD_NODENAME") or socket.gethostname()
    if not (job / TOKEN).is_file():
        raise StudyError(
            f"node {name} does not see {job}; the home must be on a file system that all nodes "
            "share"
        )
    gpus = visible_gpus()
    if len(gpus) < asked:
        raise StudyError(
            f"node {name} was given {asked} GPU{'s' * (asked != 1)}, but a process there sees "
            f"{len(gpus)} ({VISIBLE} is {environment.get(VISIBLE)!r}); `nvidia-smi -L` on the node "
            "shows what the driver has"
        )
    number, port = environment.get("SLURM_NODEID", "0"), head.rpartition(":")[2]
    cpus = environment.get("SLURM_CPUS_ON_NODE") or str(len(os.sched_getaffinity(0)))
    place = (
        [
            "--head",
            f"--node-ip-address={head.rpartition(':')[0]}",
            f"--port={port}",
            "--include-dashboard=false",
            f"--ray-client-server-port={_free_port()}",
        ]
        if number == "0"
        else [f"--address={head}"]
    )
    return [
        *(sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block"),
        *place,
        f"--num-gpus={len(gpus) if asked else logical}",
        f"--num-cpus={cpus}",
        f"--temp-dir={temporary(environment)}",
        "--disable-usage-stats",
    ]


def temporary(environment: Mapping[str, str] = os.environ) -> Path:
    """Ray's folder on this node: two nodes may be on one machine."""
    root = environment.get("RAY_TMPDIR") or TEMPORARY
    names = (environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_NODEID"))
    return Path(root) / "-".join(("ebbline", *names))


def start(job: Path, head: str, asked: int, logical: int) -> int:
    """Run Ray on this node until the script ends the step with SIGTERM. Returns an exit code."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    wait_for_head(head)
    command = ray_start(job, head, asked, logical)
    folder, ray = temporary(), None
    shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed
    try:
        with only_visible(visible_gpus() if asked else {}), (job / f"{name}.log").open("a") as log:
            ray = subprocess.Popen(command, stdout=log, stderr=log)
        return ray.wait()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if ray is not None:
            _end(ray)
        shutil.rmtree(folder, ignore_errors=True)


def _end(ray: "subprocess.Popen[bytes]") -> None:
    ray.terminate()
    try:
        ray.wait(END_S)
    except subprocess.TimeoutExpired:
        ray.kill()


def wait_for_head(head: str) -> None:
    """On all nodes but the first: wait until the head answers, as Ray gives up early."""
    deadline = time.monotonic() + READY_S
    while os.environ.get("SLURM_NODEID", "0") != "0" and not answers(head):
        if time.monotonic() > deadline:
            raise ClusterLost(f"Ray's head at {head} did not answer for {READY_S:.0f} s")
        time.sleep(LOOK_EVERY_S)


def wait(job: Path, head: str, nodes: int, pid: int) -> None:
    """Return when Ray has all nodes. Raises ClusterLost with the reason when it does not get
    them.
    """
    deadline, found = time.monotonic() + READY_S, 0
    while found < nodes:
        if not psutil.pid_exists(pid):
            raise ClusterLost(
                f"srun ended before Ray had {nodes} nodes; its message is above, and Ray's own are "
                f"in {job}"
            )
        if time.monotonic() > deadline:
            raise ClusterLost(
                f"Ray had {found} of {nodes} nodes after {READY_S:.0f} s; see the logs in {job}"
            )
        time.sleep(LOOK_EVERY_S)
        found = _alive(head) if answers(head) else 0


def _alive(head: str) -> int:
    """The number of Ray's nodes."""
    import ray  # only `wait` needs it, and it takes seconds

    if not ray.is_initialized():
        try:
            ray.init(address=head, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError):  # the head answers, but has no node yet
            return 0
    return sum(node["Alive"] for node in ray.nodes())


def answers(head: str) -> bool:
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2.0).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="slurm_node", description=__doc__)
    parser.add_argument("action", choices=("address", "start", "wait"))
    parser.add_argument("job", type=Path)
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--logical-gpus", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        if given.action == "address":
            sys.stdout.write(address(given.job) + "\n")
        elif given.action == "wait":
            head, nodes, pid = given.rest
            wait(given.job, head, int(nodes), int(pid))
        else:
            (head,) = given.rest
            return start(given.job, head, given.gpus, given.logical_gpus)
    except EbblineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
