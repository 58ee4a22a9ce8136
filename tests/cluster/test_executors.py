"""The executors' contract, for this process and for a real Ray cluster on this machine.

The Ray part takes about a minute. It starts one cluster, and one gang of two processes under
DeepSpeed ZeRO-3.
"""

import csv
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from ebbline.cluster.executors.choice import executor_kind
from ebbline.cluster.executors.executor import Executor, run_batch
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.cluster.running.runner import Runner
from ebbline.cluster.store.artifacts import Store, new_attempt
from ebbline.tasks.errors import StudyError
from ebbline.tasks.identity import digest
from ebbline.tasks.kinds import request_payload
from ebbline.tasks.specs import DataSpec, TrainSpec
from ebbline.tasks.stage import FollowUp, key_payload
from tests.cluster.made import rows, settle, source, stored_request, submit, wait_for
from tests.s3 import environment
from tests.tiny import write_chats
from tests.tolerance import alike_under_adamw, apart, losses_alike_under_adamw


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.mark.process
def test_a_cluster_without_gpus_is_an_error_not_an_endless_wait():
    from ebbline.cluster.executors.ray_executor import RayExecutor

    with pytest.raises(StudyError, match="has no GPU"):
        RayExecutor(logical_gpus=0)


class ExecutorContract:
    name: str  # in the table of executors

    def test_its_job_ids_and_its_processes_agree_with_the_table(
        self, executor: Executor, store, chats
    ):
        kind = executor_kind(self.name)
        job = submit(executor, [stored_request(store, DataSpec(size=2), {"pool": chats})], gpus=0)
        wait_for(executor, job)
        assert kind.ran(job.id) and executor.own_processes == kind.own_processes

    def test_it_has_at_least_one_gpu_and_one_slot(self, executor: Executor):
        assert executor.capacity().gpus >= 1 and executor.capacity().cpus >= 1
        assert executor.device in ("cpu", "cuda")

    def test_a_batch_is_committed_stage_by_stage_and_reported(
        self, executor: Executor, store, chats
    ):
        batch = [stored_request(store, DataSpec(size=size), {"pool": chats}) for size in (2, 3)]
        job = submit(executor, batch, gpus=0)
        assert job.keys == tuple(request.key for request in batch) and job.gpus == 0
        (done,) = wait_for(executor, job)
        assert done.job == job and done.lost is None
        assert [(report.key, report.error) for report in done.reports] == [
            (request.key, None) for request in batch
        ]
        for request, size in zip(batch, (2, 3), strict=True):
            artifact = store.open("data", request.key)
            assert len((artifact.path / DataSpec.ROWS).read_text().splitlines()) == size
            assert artifact.provenance["seconds"] >= 0
            assert artifact.hashed == request_payload(request)
        assert job.id not in {later.job.id for later in executor.finished(0.0)}

    def test_a_failed_stage_has_a_report_and_the_rest_of_its_batch_is_committed(
        self, executor: Executor, store, chats
    ):
        batch = [
            stored_request(store, DataSpec(size=size), {"pool": chats}) for size in (2, 999, 3)
        ]
        (done,) = wait_for(executor, submit(executor, batch, gpus=1))
        assert done.lost is None
        assert [report.error_type for report in done.reports] == [None, "DataError", None]
        assert [store.find("data", request.key) is not None for request in batch] == [
            True,
            False,
            True,
        ]

    def test_a_follow_up_is_committed_and_reported_right_after_its_stage(
        self, executor: Executor, store, chats
    ):
        first, other = (
            stored_request(store, DataSpec(size=size), {"pool": chats}) for size in (6, 5)
        )
        follow_up = FollowUp(
            kind="data",
            spec=DataSpec(size=3).model_dump(mode="json"),
            reads={"pool": DataSpec.ROWS},
            inputs={},
            contents={},
            attempt=new_attempt(),
        )
        too_large = replace(follow_up, spec=DataSpec(size=999).model_dump(mode="json"))
        batch = [replace(first, follow_ups=(follow_up, too_large)), other]
        (done,) = wait_for(executor, submit(executor, batch, gpus=1))
        assert done.lost is None and done.job.keys == (first.key, other.key)
        made = store.open("data", first.key)
        contents = {"pool": made.content_of(DataSpec.ROWS)}
        keys = [digest(key_payload(DataSpec(size=size), contents)) for size in (3, 999)]
        assert [(report.key, report.error_type) for report in done.reports] == [
            (first.key, None),
            (keys[0], None),
            (keys[1], "DataError"),
            (other.key, None),
        ]
        follow = store.open("data", keys[0])
        assert follow.folder.name == follow_up.attempt
        assert len((follow.path / DataSpec.ROWS).read_text().splitlines()) == 3
        assert store.find("data", keys[1]) is None

    def test_each_of_several_jobs_finishes_once(self, executor: Executor, store, chats):
        jobs = [
            submit(executor, [stored_request(store, DataSpec(size=n), {"pool": chats})], gpus=n % 2)
            for n in range(1, 6)
        ]
        assert [done.job for done in wait_for(executor, *jobs)] == jobs
        assert len({job.id for job in jobs}) == 5

    def test_a_cancelled_job_commits_nothing_and_blocks_no_other(
        self, executor: Executor, store, chats
    ):
        # It waits behind as many jobs as fit at once, so it has not started.
        first = [
            submit(executor, [stored_request(store, DataSpec(size=n), {"pool": chats})], gpus=1)
            for n in range(1, 3)
        ]
        victim = stored_request(store, DataSpec(size=40), {"pool": chats})
        job = submit(executor, [victim], gpus=1)
        executor.cancel(job)
        last = submit(executor, [stored_request(store, DataSpec(size=7), {"pool": chats})], gpus=1)
        assert all(done.lost is None for done in wait_for(executor, *first, last))
        # Inline forgets it; Ray may still report it as lost. Neither raises or commits.
        assert all(done.lost for done in executor.finished(2.0))
        assert store.find("data", victim.key) is None

    def test_a_runner_runs_a_chain_and_sees_a_failure(self, executor: Executor, store, chats):
        runner = Runner(store, executor)
        good, bad = rows(2, rows(4, source(chats))), rows(2, rows(400, source(chats)))
        runner.add([good, bad])
        settle(runner)
        assert runner.artifact(good) is not None
        assert "data.size=400" in runner.failure(bad).reason


class TestInlineExecutor(ExecutorContract):
    name = "inline"

    @pytest.fixture
    def executor(self):
        return InlineExecutor()

    def test_a_cancelled_job_never_ran(self, executor, store, chats):
        request = stored_request(store, DataSpec(size=2), {"pool": chats})
        executor.cancel(submit(executor, [request], gpus=1))
        assert executor.finished(0.0) == [] and store.find("data", request.key) is None

    def test_the_gpu_type_is_recorded_for_stages_with_a_gpu(self, store, chats):
        for size, gpus in ((2, 1), (3, 0)):
            request = stored_request(store, DataSpec(size=size), {"pool": chats}, gpus=gpus)
            run_batch([request], gpu_type="A100")
            provenance = store.open("data", request.key).provenance
            assert provenance["gpu_type"] == ("A100" if gpus else None)

    def test_closing_drops_waiting_jobs(self, executor, store, chats):
        submit(executor, [stored_request(store, DataSpec(size=2), {"pool": chats})], gpus=1)
        executor.close()
        assert executor.finished(0.0) == []


@pytest.fixture(scope="module")
def ray_cluster(s3_server, tmp_path_factory):
    """A cluster whose workers have the S3 server's credentials and their own cache, like other
    machines.
    """
    from ebbline.cluster.executors.ray_executor import RayExecutor

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            **environment(s3_server),
            "EBBLINE_CACHE": str(tmp_path_factory.mktemp("cache")),
        }.items():
            patch.setenv(name, value)
        executor = RayExecutor(logical_gpus=2)
        yield executor
        executor.close()


TRAIN = TrainSpec(
    rank=4, dtype="float32", learning_rate=2e-2, global_batch=8, epochs=1.0, max_tokens=32
)


def curve(store: Store, key: str) -> list[float]:
    with (store.open("train", key).path / TrainSpec.CURVE).open() as handle:
        return [float(row["loss"]) for row in csv.DictReader(handle)]


class TestRayExecutor(ExecutorContract):
    name = "ray"

    @pytest.fixture
    def executor(self, ray_cluster):
        return ray_cluster

    def test_a_worker_that_dies_is_a_lost_job_not_a_hang(self, executor, store, chats, tmp_path):
        import ray

        from ebbline.cluster.executors.executor import Job
        from ebbline.cluster.executors.job_processes import JobProcesses

        @ray.remote(max_retries=0)
        def dies():
            import os

            os._exit(1)

        # Inserted like a submitted job, to test the executor's own bookkeeping.
        job = Job("dies", ("k",), 0)
        executor._jobs[dies.remote()] = (job, JobProcesses("dies", ()))
        (done,) = wait_for(executor, job)
        assert done.job == job and done.reports == () and "WorkerCrashedError" in done.lost.reason
        assert done.lost.blame == "memory", "Ray does not tell the kernel's kill from other ends"

    @pytest.mark.timeout(300)
    def test_a_gang_of_two_under_zero_3_from_a_bucket_learns_what_one_process_learns(
        self, executor, bucket, pair, chats, tmp_path
    ):
        """Only this test runs a gang and a task on Ray with a bucket. Only here a gang ends at a
        request that does not divide among its members.
        """
        store = Store(bucket)
        (alone_done,) = wait_for(
            executor,
            submit(
                executor,
                [small := stored_request(store, DataSpec(size=5), {"pool": chats})],
                gpus=0,
            ),
        )
        assert [report.error for report in alone_done.reports] == [None] and store.find(
            "data", small.key
        ) is not None
        inputs = {"model": pair.aligned, "data": write_chats(tmp_path / "rows.jsonl", 48)}
        alone = Store(tmp_path / "alone")
        (report,) = run_batch([stored_request(alone, TRAIN, inputs)])
        assert report.error is None
        # The second request does not divide among the members: the gang ends with this reason, and
        # the first request stays committed.
        odd = stored_request(store, TRAIN.model_copy(update={"global_batch": 7}), inputs, gpus=2)
        gang = stored_request(store, TRAIN, inputs, gpus=2, micro_batch=2, checkpoint_every_s=0.0)
        job = submit(executor, [gang, odd], gpus=2)
        (done,) = wait_for(executor, job, timeout_s=240.0)
        (failed,) = (item for item in done.reports if item.error is not None)
        assert (
            failed.key == odd.key
            and "global_batch=7 does not divide among 2 processes" in failed.error
        )
        assert store.find("train", odd.key) is None
        assert store.log(store.local(gang.out).parent, "progress.json") is not None
        assert not list(store.place.entries("scratch"))
        one, two = curve(alone, report.key), curve(store, report.key)
        assert len(one) == len(two) == 6
        adapters = [
            load_file(
                place.open("train", report.key).path / "adapter" / "adapter_model.safetensors"
            )
            for place in (alone, store)
        ]
        assert adapters[0].keys() == adapters[1].keys() and len(adapters[0]) == 28
        assert two == losses_alike_under_adamw(one)
        assert apart(*adapters) < alike_under_adamw()
        assert all(bool(tensor.any()) for tensor in adapters[1].values())
        assert Store(bucket).open("train", report.key).provenance["gpus"] == 2
