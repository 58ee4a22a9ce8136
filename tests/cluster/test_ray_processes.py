"""A cluster on this machine starts without the processes that nothing reads."""

import pytest
from ray._private import ray_constants, worker
from ray._private.node import Node

from ebbline.cluster.executors.ray_executor import RayExecutor
from ebbline.cluster.executors.ray_start import UNUSED, without_unused_processes


def test_the_installed_ray_starts_each_of_these_processes_by_a_method_of_its_own() -> None:
    """Else they would all be started again, and nobody would notice."""
    assert set(UNUSED) <= vars(Node).keys()


def test_they_are_not_started_inside_and_are_again_after_an_error() -> None:
    before = {name: vars(Node)[name] for name in UNUSED}
    with pytest.raises(RuntimeError, match="no cluster"), without_unused_processes():
        node = object.__new__(Node)  # not initialised: starting anything would fail
        node.start_monitor()
        node.start_log_monitor()
        node.start_api_server(include_dashboard=False, raise_on_api_server_failure=False)
        raise RuntimeError("no cluster")
    assert {name: vars(Node)[name] for name in UNUSED} == before


@pytest.mark.cluster
def test_a_local_cluster_has_none_of_them() -> None:
    executor = RayExecutor("local", logical_gpus=1)
    try:
        started = set(worker._global_node.all_processes)
        assert executor.capacity().gpus == 1
    finally:
        executor.close()
    assert {ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER} <= started
    assert not started & {
        ray_constants.PROCESS_TYPE_MONITOR,
        ray_constants.PROCESS_TYPE_LOG_MONITOR,
        ray_constants.PROCESS_TYPE_DASHBOARD,
    }
