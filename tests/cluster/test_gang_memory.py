"""A gang on Ray that runs out of memory restarts with half the micro-batch, and has the same
result.
"""

import os
import pickle
import signal
from pathlib import Path

import pytest

from ebbline.cluster.executors.executor import run_batch
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.training.micro_batch import learnt
from tests.cluster.made import stored_request
from tests.cluster.test_executors import TRAIN, curve
from tests.tiny import write_chats
from tests.tolerance import losses_alike_under_adamw


def a_member_holds_two_rows_at_most() -> None:
    """Runs at the start of every worker process. Without a GPU no memory can run out, so rank 1
    raises the error for more than two rows.
    """
    import torch

    from ebbline.tasks.training import gang_engine

    token_loss = gang_engine.token_loss

    def short(model, rows, pad, device):
        if torch.distributed.get_rank() == 1 and len(rows) > 2:
            with Path(os.environ["RAN_OUT"]).open("a") as file:
                file.write(f"{len(rows)} ")
            if os.environ["ENDS_BY"] == "kill":  # as the kernel does
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return token_loss(model, rows, pad, device)

    gang_engine.token_loss = short


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ends_by", ["error", "kill"])
def test_a_gang_out_of_memory_continues_with_half_the_micro_batch_until_it_fits(
    tmp_path, pair, ends_by
):
    """Only this test restarts a gang after a member ran out of memory, by an error or by the
    kernel's kill.
    """
    import ray

    variables = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    variables |= {"RAN_OUT": str(tmp_path / "ran-out"), "ENDS_BY": ends_by}
    variables["PYTHONPATH"] = str(Path(__file__).parents[2])  # so that workers can import the hook
    hook = "tests.cluster.test_gang_memory.a_member_holds_two_rows_at_most"
    ray.init(
        address="local",
        num_gpus=2,
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": variables, "worker_process_setup_hook": hook},
    )
    try:
        from ebbline.cluster.executors.gang import run_gang
        from ebbline.cluster.executors.job_processes import JobProcesses

        inputs = {"model": pair.aligned, "data": write_chats(tmp_path / "rows.jsonl", 48)}
        store, alone = Store(tmp_path / "store"), Store(tmp_path / "alone")
        request = stored_request(store, TRAIN, inputs, gpus=2)  # a micro-batch of 4, its share
        node = ray.get_runtime_context().get_node_id()
        (report,) = run_gang([request], JobProcesses.reserve("alone", [node, node]))
    finally:
        ray.shutdown()
    assert (report.key, report.error, report.smaller) == (request.key, None, None)
    assert (tmp_path / "ran-out").read_text() == "4 ", "it ran out of memory exactly once"
    assert learnt(store.scratch(request.key)).most in (2, None)  # None: removed with the scratch
    assert store.open("train", request.key).provenance["predicted_memory_gb"] > 0
    (plain,) = run_batch([stored_request(alone, TRAIN, inputs)])
    assert curve(store, report.key) == losses_alike_under_adamw(curve(alone, plain.key))


@pytest.mark.parametrize(
    ("failure", "memory"),
    [
        ("OutOfMemoryError", True),
        ("Worker exit type: SYSTEM_ERROR Worker exit detail: End of file.", True),
        ("Worker exit type: INTENDED_SYSTEM_EXIT", False),
        ("The actor died because its node has died.", False),
        ("a member raised", False),
    ],
)
def test_a_member_counts_as_killed_for_memory_if_its_process_ended_suddenly(failure, memory):
    from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

    from ebbline.cluster.executors.gang import _failure

    died = ActorDiedError()
    died.error_msg = failure
    cause = (
        OutOfMemoryError("low on memory")
        if failure == "OutOfMemoryError"
        else RayTaskError("run", "a traceback", RuntimeError(failure))
        if failure == "a member raised"
        else died
    )
    raised = RayTaskError("run", "a traceback", ConnectionError("closed by peer"))
    for errors in ([cause], [raised, cause]):
        error = pickle.loads(pickle.dumps(_failure(errors)))
        assert error.killed_for_memory == memory
        assert error.died == (failure != "a member raised")


def test_members_on_two_nodes_know_their_places_and_the_gpus_of_their_node():
    from ebbline.cluster.executors.gang import _Seat, _seated

    seats = _seated(
        [
            _Seat("a", "10.0.0.1", 7000, ("3",)),
            _Seat("b", "10.0.0.2", 7001, ("0",)),
            _Seat("a", "10.0.0.1", 7002, ("1",)),
        ]
    )
    assert [seat.gpus for seat in seats] == [("1", "3"), ("0",), ("1", "3")]
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT")
    assert [tuple(seat.variables[name] for name in names) for seat in seats] == [
        ("0", "0", "2", "0", "3", "7000"),
        ("1", "0", "1", "1", "3", "7000"),
        ("2", "1", "2", "0", "3", "7000"),
    ]
    assert {seat.variables["MASTER_ADDR"] for seat in seats} == {"10.0.0.1"}


def test_a_gang_that_is_killed_again_and_again_halves_down_to_one_row_and_then_gives_up(
    tmp_path, pair, monkeypatch
):
    """Also if no member lives long enough to note its micro-batch."""
    from ebbline.cluster.executors import gang
    from ebbline.cluster.executors.job_processes import JobProcesses

    store, sizes = Store(tmp_path / "store"), []
    inputs = {"model": pair.aligned, "data": write_chats(tmp_path / "rows.jsonl", 4)}
    request = stored_request(store, TRAIN, inputs, gpus=2)

    def killed(requests, processes, work):
        sizes.append(requests[0].micro_batch)
        raise gang.GangFailed("low on memory", died=True, killed_for_memory=True)

    monkeypatch.setattr(gang, "_run_once", killed)
    for _ in range(2):
        with pytest.raises(gang.GangFailed):
            gang.run_gang([request], JobProcesses("job", ("node", "node")))
    assert sizes == [None, 2, 1, 1]  # the second attempt begins where the first has ended
    assert learnt(store.scratch(request.key)).most == 1
