"""A Ray cluster of several machines (raylets on this machine, with logical GPUs), where hosts and
processes are lost at any time.

The results equal those of one undisturbed process: the same keys, and the same bytes for work on
one GPU. Gangs add in another order, so their results are equal within tests/tolerance.py.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from ebbline.cluster.executors import ray_hosts
from ebbline.cluster.executors.executor import Needs
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.cluster.executors.ray_executor import RayExecutor, bundles
from ebbline.cluster.executors.ray_hosts import RayHosts
from ebbline.cluster.running.runner import Node, Runner
from ebbline.cluster.store.artifacts import Artifact, Store
from ebbline.tasks.errors import ClusterLost
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Stage
from tests.clock import Clock
from tests.cluster.driver import GANG_RANK, PROFILE, gang_of, training
from tests.cluster.made import settle
from tests.tiny import Pair, write_chats
from tests.tolerance import alike_under_adamw, apart, losses_alike_under_adamw

pytestmark = pytest.mark.cluster
PREEMPTION = 2  # Ray's DRAIN_NODE_REASON_PREEMPTION


class Machines:
    """A Ray cluster whose machines come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.ray = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
        )

    def add(self, gpus: int) -> None:
        self.ray.add_node(num_cpus=gpus + 1, num_gpus=gpus)

    def node(self, host: str) -> Any:
        return next(
            node
            for node in self.ray.worker_nodes
            if node.node_id.startswith(host.rsplit("/", 1)[1])
        )

    def kill(self, host: str) -> None:
        self.ray.remove_node(self.node(host), allow_graceful=False)

    def drain(self, host: str) -> None:
        import ray

        client = ray._raylet.GcsClient(address=self.ray.address)
        accepted, why = client.drain_node(
            self.node(host).node_id, PREEMPTION, "spot", int((time.time() + 120) * 1000)
        )
        assert accepted, why


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    machines = Machines()
    for gpus in (4, 4, 1):
        machines.add(gpus)
    yield machines
    machines.ray.shutdown()


@pytest.fixture
def executor(machines: Machines) -> Iterator[RayExecutor]:
    executor = RayExecutor(machines.ray.address)
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("rows") / "rows.jsonl", 48)


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, pair: Pair, rows: Path
) -> dict[int, Artifact]:
    """Rank -> the artifact of its training, run in this process."""
    runner = Runner(Store(tmp_path_factory.mktemp("undisturbed")), InlineExecutor())
    stages = {rank: training(rank, pair.aligned, rows) for rank in (1, 2, GANG_RANK)}
    runner.add(stages.values())
    settle(runner)
    return {rank: artifact_of(runner, stage) for rank, stage in stages.items()}


def artifact_of(runner: Runner, stage: Stage) -> Artifact:
    artifact = runner.artifact(stage)
    assert artifact is not None, runner.failure(stage)
    return artifact


def step_until(runner: Runner, condition: Callable[[], bool], timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, {
            node.stage.spec.rank: node.state for node in runner.nodes.values()
        }  # type: ignore[attr-defined]
        runner.step(0.1)


def steps_of(runner: Runner, node: Node) -> int:
    return int(runner.timing.last_progress(node).get("done", 0)) if node.state == "running" else 0


def began_at(runner: Runner, node: Node) -> int:
    """The step of the checkpoint that an attempt continued from; 0 without a checkpoint."""
    progress = runner.timing.last_progress(node)
    return int(progress["done"] - progress["own"])


def place_of(runner: Runner, node: Node) -> str:
    """The host with most of the GPUs of the job that a stage runs in."""
    job = next(item.job for item in runner.running.values() if node.key in item.job.keys)
    return max(job.hosts, key=lambda host: job.hosts[host])


def assert_same(artifact: Artifact, undisturbed: Artifact, gang: bool) -> None:
    assert artifact.key == undisturbed.key
    if not gang:
        assert artifact.content == undisturbed.content
        return
    one, two = (curve(item) for item in (undisturbed, artifact))
    assert len(one) == len(two)
    assert two == losses_alike_under_adamw(one)
    adapters = [
        load_file(item.path / "adapter" / "adapter_model.safetensors")
        for item in (undisturbed, artifact)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    assert apart(*adapters) < alike_under_adamw()


def curve(artifact: Artifact) -> list[float]:
    with (artifact.path / TrainSpec.CURVE).open() as handle:
        return [float(row["loss"]) for row in csv.DictReader(handle)]


def free_gpus() -> float:
    import ray

    return float(ray.available_resources().get("GPU", 0))


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {timeout_s:.0f} s"
        time.sleep(0.1)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_node_killed_under_a_gang_and_one_drained_change_no_result(
    machines: Machines,
    executor: RayExecutor,
    pair: Pair,
    rows: Path,
    undisturbed: dict[int, Artifact],
    tmp_path: Path,
) -> None:
    """Only in this test a gang loses a machine, moves, and moves a second time after a drain."""
    runner = Runner(Store(tmp_path), executor, lambda stage: gang_of(4, stage), PROFILE)
    gang = training(GANG_RANK, pair.aligned, rows)
    runner.add([gang])
    node = runner.nodes[gang.lineage]
    step_until(runner, lambda: steps_of(runner, node) >= 3)
    first, single = place_of(runner, node), [training(rank, pair.aligned, rows) for rank in (1, 2)]
    assert executor.capacity().gpus == 9
    runner.add(single)
    runner.step(0.1)
    machines.kill(first)
    step_until(runner, lambda: node.state == "running" and place_of(runner, node) != first)
    machines.add(4)
    step_until(runner, lambda: steps_of(runner, node) >= 1)
    assert began_at(runner, node) >= 1, "it must continue from its checkpoint"
    second, reached = place_of(runner, node), steps_of(runner, node)
    machines.drain(second)
    step_until(
        runner, lambda: node.state == "running" and place_of(runner, node) not in (first, second)
    )
    assert not any(host.name == second and not host.draining for host in executor.capacity().hosts)
    step_until(runner, lambda: steps_of(runner, node) >= 1 or node.state == "done")
    assert node.state == "done" or steps_of(runner, node) > reached
    step_until(
        runner, lambda: all(item.state in ("done", "failed") for item in runner.nodes.values())
    )
    assert runner._setup.retry_policy.lost(node.key) == 0, (
        "the loss of a host counts against no stage"
    )
    for stage in (gang, *single):
        assert_same(artifact_of(runner, stage), undisturbed[stage.spec.rank], gang=stage is gang)  # type: ignore[attr-defined]
    machines.kill(second)  # the end of its drain
    wait_until(
        lambda: all(host.name != second for host in executor.capacity().hosts),
        "end of the drained node",
    )


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_hung_gang_and_a_hung_task_are_killed_and_retried(
    machines: Machines,
    executor: RayExecutor,
    pair: Pair,
    rows: Path,
    undisturbed: dict[int, Artifact],
    tmp_path: Path,
) -> None:
    """Only in this test processes hang, and are killed and replaced."""
    runner = Runner(Store(tmp_path), executor, lambda stage: gang_of(2, stage), PROFILE)
    stages = [training(rank, pair.aligned, rows) for rank in (GANG_RANK, 1)]
    stopped: list[int] = []
    for stage in stages:  # the second starts while the first hangs
        runner.add([stage])
        step_until(runner, lambda: len(executor._jobs) == len(stopped) + 1)
        _, processes = list(executor._jobs.values())[-1]
        step_until(runner, processes.complete)
        # Like a process that is stuck in a collective, a stopped process ignores Ray's requests.
        stopped.append(max(processes.signed_on(), key=lambda process: process.started).pid)
        os.kill(stopped[-1], signal.SIGSTOP)
    nodes = [runner.nodes[stage.lineage] for stage in stages]
    running = set(runner.running)
    # The short timeout applies while nothing starts, because a process takes longer to start.
    runner.profile, runner.draining = PROFILE.model_copy(update={"hang_after_s": 5.0}), True
    step_until(runner, lambda: not running & set(runner.running))
    runner.profile, runner.draining = PROFILE, False
    wait_until(lambda: not any(map(psutil.pid_exists, stopped)), "end of the hung processes")
    step_until(runner, lambda: all(node.state in ("done", "failed") for node in nodes))
    assert [runner._setup.retry_policy.lost(node.key) for node in nodes] == [1, 1]
    for stage in stages:
        assert_same(
            artifact_of(runner, stage), undisturbed[stage.spec.rank], gang=stage is stages[0]
        )  # type: ignore[attr-defined]
    wait_until(lambda: free_gpus() == executor.capacity().gpus, "free GPUs")


def driver(machines: Machines, store: Path, pair: Pair, rows: Path) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "tests.cluster.driver",
        machines.ray.address,
        str(store),
        str(pair.aligned),
        str(rows),
    ]
    environment = os.environ | {"RAY_gcs_rpc_server_reconnect_timeout_s": "15"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def reporting_trainings(store: Path) -> int:
    """How many trainings have reported progress."""
    return len(list(store.glob("train/*/*/log/progress.json")))


@pytest.mark.timeout(600)
def test_a_killed_driver_leaves_no_gpu_held_and_the_same_command_continues(
    machines: Machines,
    executor: RayExecutor,
    pair: Pair,
    rows: Path,
    undisturbed: dict[int, Artifact],
    tmp_path: Path,
) -> None:
    """Only in this test a driver is killed while its cluster stays."""
    first = driver(machines, tmp_path, pair, rows)
    wait_until(
        lambda: any(tmp_path.glob("train/*/record.json")) or first.poll() is not None,
        "finished training",
    )
    first.send_signal(signal.SIGKILL)
    first.wait()
    total = executor.capacity().gpus
    wait_until(lambda: free_gpus() == total, "free GPUs")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("train/*/record.json")}
    assert 0 < len(before) < 3, "the kill must come between the first and the last record"
    second = driver(machines, tmp_path, pair, rows)
    output, _ = second.communicate(timeout=240)
    assert second.returncode == 0, output
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items()), (
        "a finished stage was rerun"
    )
    for rank, artifact in undisturbed.items():
        assert_same(Store(tmp_path).open("train", artifact.key), artifact, gang=rank == GANG_RANK)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_lost_head_ends_the_driver_with_a_message_and_a_new_cluster_continues(
    pair: Pair, rows: Path, undisturbed: dict[int, Artifact], tmp_path: Path
) -> None:
    """Only in this test the head of a cluster is lost during a run."""
    lost = Machines()
    lost.add(3)
    try:
        process = driver(lost, tmp_path, pair, rows)
        wait_until(
            lambda: reporting_trainings(tmp_path) >= 1 or process.poll() is not None, "training"
        )
        lost.ray.head_node.kill_gcs_server()
        output, _ = process.communicate(timeout=240)
    finally:
        lost.ray.shutdown()
    assert process.returncode != 0 and "ClusterLost: the head of the Ray cluster" in output, output
    replacement = Machines()
    replacement.add(3)
    try:
        process = driver(replacement, tmp_path, pair, rows)
        output, _ = process.communicate(timeout=240)
    finally:
        replacement.ray.shutdown()
    assert process.returncode == 0, output
    for rank, artifact in undisturbed.items():
        assert_same(Store(tmp_path).open("train", artifact.key), artifact, gang=rank == GANG_RANK)


def test_the_requested_bundles_are_in_proportion_to_the_work():
    one, gang, spread = (
        Needs(1),
        Needs(8, {"ray.io/accelerator-type": "A100"}),
        Needs(4, spread=True),
    )
    requested = bundles(
        [(one, 60.0)] * 100 + [(gang, 3600.0)] * 2 + [(spread, 60.0), (Needs(0), 5.0)]
    )
    assert (
        requested.count(({"CPU": 1, "GPU": 1}, {})) == 10 + 4
    )  # 6000 s of one-GPU work, and a gang of 4 that may spread
    assert requested.count(({"CPU": 8, "GPU": 8}, {"ray.io/accelerator-type": "A100"})) == 2
    assert requested.count(({"CPU": 1}, {})) == 1 and len(requested) == 17
    assert bundles([]) == []


def test_the_request_to_the_autoscaler_is_cancelled_at_the_end(machines: Machines):
    from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
    from ray.experimental.internal_kv import _internal_kv_get

    def requested() -> list[dict[str, int]]:
        return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or b"[]")

    def large() -> int:
        """How many bundles of 8 GPUs are requested."""
        return requested().count({"CPU": 8, "GPU": 8})

    with closing(RayExecutor(machines.ray.address)) as executor:
        assert not executor.capacity().grows
        executor.expect([(Needs(8), 60.0)])
        assert large() == 0
        executor._grows = True  # like on a cluster from `ray up`
        executor.expect([(Needs(8), 60.0), (Needs(8), 700.0), (Needs(1), 700.0), (Needs(1), 700.0)])
        wait_until(lambda: large() == 2 and requested().count({"CPU": 1, "GPU": 1}) >= 2, "request")
    with closing(RayExecutor(machines.ray.address)):
        assert large() == 0


def test_a_head_that_does_not_answer_is_an_error_after_a_stated_time(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "1.5")
    clock = Clock()
    monkeypatch.setattr(ray_hosts, "time", clock)
    with pytest.raises(ClusterLost, match=r"127\.0\.0\.1:9 has not answered for 1 s; restart it"):
        RayHosts("127.0.0.1:9").find()
    assert clock.now == 1.5, "it checks every half second"
