"""The table of executors, and an executor that is opened on demand."""

from dataclasses import replace

import pytest

from ebbline.cluster.checks import ExecutorCheck
from ebbline.cluster.executors import this_machine
from ebbline.cluster.executors.choice import EXECUTORS, Wanted, executor_kind
from ebbline.cluster.executors.executor import Capacity
from ebbline.cluster.executors.on_demand import OnDemand
from ebbline.cluster.schedule.simulate import SimulatedExecutor
from ebbline.tasks.errors import StudyError


def test_a_name_that_the_table_lacks_is_an_error_that_names_those_it_has():
    with pytest.raises(StudyError, match="'nowhere'; choose one of ray, inline"):
        executor_kind("nowhere")


def test_a_job_is_of_one_executor_at_most_as_ledgers_name_it():
    for job_id, ran in (("ray-3", ["ray"]), ("inline-0", ["inline"]), ("rays-1", []), ("ray", [])):
        assert [kind.name for kind in EXECUTORS if kind.ran(job_id)] == ran


def test_jobs_of_this_process_have_no_processes_of_their_own_and_run_one_after_another():
    inline, ray = executor_kind("inline"), executor_kind("ray")
    assert (inline.own_processes, inline.serial) == (False, True)
    assert (ray.own_processes, ray.serial) == (True, False)


def test_what_there_will_be_is_known_unless_another_cluster_has_it(monkeypatch):
    monkeypatch.setattr(this_machine, "_own_gpus", lambda: None)  # logical ones stand for them
    for kind in map(executor_kind, ("ray", "inline")):
        assert kind.capacity(Wanted("local", gang=2, gpus=3)).gpus == 3
        assert kind.capacity(Wanted("local", gang=64)).gpus == 64
    assert executor_kind("ray").capacity(Wanted("auto", gang=1)) is None


def test_only_an_executor_with_a_check_has_findings():
    assert executor_kind("inline").check("local") == ExecutorCheck()


def test_on_demand_nothing_is_opened_until_somebody_asks_what_there_is():
    opened = list[Wanted]()

    def open_simulated(wanted: Wanted) -> SimulatedExecutor:
        opened.append(wanted)
        return SimulatedExecutor(Capacity.one_host(2, 1), lambda key: 1.0)

    kind = replace(executor_kind("inline"), open=open_simulated)
    executor, wanted = OnDemand(kind, Wanted("local", gang=1)), Wanted("local", gang=1)
    assert not executor.own_processes and executor.finished(0.0) == []
    executor.close()
    assert opened == []
    assert executor.capacity().gpus == 2 and executor.device == "simulated"
    assert executor.capacity().gpus == 2 and opened == [wanted]
