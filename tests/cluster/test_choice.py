"""The table of executors, and an executor that is opened on demand."""

from dataclasses import replace

import pytest

from ebbline.cluster.checks import ExecutorCheck
from ebbline.cluster.executors import this_machine
from ebbline.cluster.executors.choice import EXECUTORS, ExecutorOptions, executor_kind
from ebbline.cluster.executors.executor import Capacity
from ebbline.cluster.executors.on_demand import OnDemand
from ebbline.cluster.schedule.simulate import SimulatedExecutor
from ebbline.tasks.errors import StudyError


def test_an_unknown_executor_is_an_error_with_the_known_names():
    with pytest.raises(StudyError, match="'nowhere'; choose one of ray, inline"):
        executor_kind("nowhere")


def test_a_job_id_belongs_to_at_most_one_executor():
    for job_id, ran in (("ray-3", ["ray"]), ("inline-0", ["inline"]), ("rays-1", []), ("ray", [])):
        assert [kind.name for kind in EXECUTORS if kind.ran(job_id)] == ran


def test_inline_jobs_run_one_after_another_without_processes_of_their_own():
    inline, ray = executor_kind("inline"), executor_kind("ray")
    assert (inline.own_processes, inline.serial) == (False, True)
    assert (ray.own_processes, ray.serial) == (True, False)


def test_the_capacity_is_known_in_advance_except_for_a_remote_cluster(monkeypatch):
    monkeypatch.setattr(this_machine, "_own_gpus", lambda: None)  # logical GPUs instead
    for kind in map(executor_kind, ("ray", "inline")):
        assert kind.capacity(ExecutorOptions("local", gang=2, gpus=3)).gpus == 3
        assert kind.capacity(ExecutorOptions("local", gang=64)).gpus == 64
    assert executor_kind("ray").capacity(ExecutorOptions("auto", gang=1)) is None


def test_only_an_executor_with_a_check_has_findings():
    assert executor_kind("inline").check("local") == ExecutorCheck()


def test_on_demand_an_executor_is_opened_at_the_first_call_of_capacity():
    opened = list[ExecutorOptions]()

    def open_simulated(options: ExecutorOptions) -> SimulatedExecutor:
        opened.append(options)
        return SimulatedExecutor(Capacity.one_host(2, 1), lambda key: 1.0)

    kind = replace(executor_kind("inline"), open=open_simulated)
    executor, options = (
        OnDemand(kind, ExecutorOptions("local", gang=1)),
        ExecutorOptions("local", gang=1),
    )
    assert not executor.own_processes and executor.finished(0.0) == []
    executor.close()
    assert opened == []
    assert executor.capacity().gpus == 2 and executor.device == "simulated"
    assert executor.capacity().gpus == 2 and opened == [options]
