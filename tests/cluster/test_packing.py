"""Packs: which trainings may share a GPU, real packed trainings, and lost packs."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from ebbline.cluster.executors.executor import Finished, Loss
from ebbline.cluster.profile import GpuType, Profile
from ebbline.cluster.running.runner import Runner
from ebbline.cluster.schedule.packing import MOST, Packing
from ebbline.cluster.store.artifacts import Store
from ebbline.cluster.store.retention import Needed, Survey
from ebbline.tasks.models.memory import most_packed
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Request, Source, Stage
from tests.cluster.made import settle, source
from tests.cluster.test_runner import PATIENCE, Counting
from tests.tasks.test_memory import LLAMA_2

SPEC = TrainSpec(
    rank=2, dtype="float32", learning_rate=2e-2, global_batch=16, steps=3, max_tokens=32
)
WIDE = {
    "A100": GpuType(usd_per_hour=1.0, memory_gb=80.0),
    "L4": GpuType(usd_per_hour=1.0, memory_gb=24.0),
}


def trainings(model: Path, data: Path, count: int, **changes: object) -> list[Stage]:
    inputs = {"model": source(model), "data": source(data)}
    return [
        Stage(SPEC.model_copy(update={"rank": 2 * (1 + number), **changes}), inputs)
        for number in range(count)
    ]


class RecordingPacks(Counting):
    """The inline executor; it records (packed, share) of each request in its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.packs: list[list[tuple[bool, float]]] = []

    def submit(self, batch: Sequence[Request], *others):
        self.packs.append([(bool(request.pack), round(request.pack_share, 3)) for request in batch])
        return super().submit(batch, *others)


def ran(root: Path, stages: Sequence[Stage], executor: RecordingPacks, **profile: object) -> Runner:
    runner = Runner(Store(root), executor, profile=PATIENCE.model_copy(update=profile))
    runner.add(stages)
    settle(runner)
    return runner


def test_trainings_of_a_pack_are_separate_stages_in_the_store(tmp_path, pair, chats):
    stages = trainings(pair.aligned, chats, 3)
    together, apart = RecordingPacks(), RecordingPacks()
    packed = ran(tmp_path / "packed", stages, together, pack=3)
    alone = ran(tmp_path / "alone", stages, apart, pack=1)
    assert together.packs == [[(True, 0.333)] * 3] and {
        pack for batch in apart.packs for pack in batch
    } == {(False, 1.0)}
    for stage in stages:
        one, other = packed.artifact(stage), alone.artifact(stage)
        assert one is not None and other is not None, packed.failure(stage)
        assert (one.key, one.hashed, one.files.keys()) == (
            other.key,
            other.hashed,
            other.files.keys(),
        )
        assert (
            one.files["adapter/adapter_config.json"] == other.files["adapter/adapter_config.json"]
        )
        assert one.provenance["packed"] == 3 and "packed" not in other.provenance
    assert json.loads((packed.artifact(stages[0]).log / "request.json").read_text())[
        "pack_share"
    ] == pytest.approx(1 / 3)


def test_shares_follow_from_the_profile_and_from_known_memory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2["7b"]))
    data = Source("d" * 64, "/data")
    spec = TrainSpec(quantisation="nf4", global_batch=2)
    stage = Stage(spec, {"model": Source("m" * 64, str(tmp_path)), "data": data})
    types = frozenset({None, "A100", "L4"})

    def shares(stage: Stage = stage, **profile: object) -> dict[str | None, float]:
        name, found = Packing(Profile(**profile), lambda _: None).of(stage, "key", types)
        assert bool(name) == bool(found)
        return dict(found)

    assert shares() == dict.fromkeys(types, 1.0), "without a known memory each trains alone"
    known = shares(gpus=WIDE)
    assert known[None] == 1.0 and 1 / MOST <= known["A100"] < known["L4"] < 1.0
    assert known["L4"] == 1 / most_packed(LLAMA_2["7b"], spec, 24.0, MOST)
    assert shares(gpus=WIDE, pack=4) == {None: 0.25, "A100": 0.25, "L4": max(0.25, known["L4"])}
    assert shares(gpus=WIDE, pack=1) == {}
    for other in (spec.model_copy(update={"dropout": 0.1}), TrainSpec(method="full")):
        assert shares(Stage(other, stage.inputs), pack=4) == {}


def test_a_larger_rank_takes_a_larger_share_of_the_same_gpu(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2["7b"]))
    packing, shares = Packing(Profile(gpus=WIDE), lambda _: None), {}
    for rank in (8, 256):
        spec = TrainSpec(quantisation="nf4", global_batch=2, rank=rank)
        inputs = {"model": Source("m" * 64, str(tmp_path)), "data": Source("d" * 64, "/data")}
        shares[rank] = packing.of(Stage(spec, inputs), f"rank {rank}", frozenset({"A100"}))[1][
            "A100"
        ]
        memory_gb = WIDE["A100"].memory_gb
        assert shares[rank] == 1 / most_packed(LLAMA_2["7b"], spec, memory_gb, MOST)
    assert shares[8] < shares[256]
    packing.forget(["rank 8", "rank 256", "another"])
    assert not packing._by_key, "a landed training takes memory"


def test_without_a_memory_prediction_for_its_model_a_training_runs_alone(tmp_path, caplog):
    data = Source("d" * 64, "/data")
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_2["7b"], "model_type": "gpt2"}))
    for folder, warnings in ((tmp_path, 0), (tmp_path / "gone", 1)):
        stage = Stage(TrainSpec(), {"model": Source(str(folder), str(folder)), "data": data})
        _, shares = Packing(Profile(gpus=WIDE), lambda _: None).of(
            stage, "key", frozenset({"A100"})
        )
        assert (
            shares == {"A100": 1.0} and caplog.text.count("config.json cannot be read") == warnings
        )


def test_trainings_with_other_data_or_another_length_are_not_packed_together(tmp_path):
    inputs = {"model": Source("m" * 64, "/m"), "data": Source("d" * 64, "/d")}
    packing = Packing(Profile(pack=4), lambda _: None)
    stages = {
        "one": Stage(TrainSpec(rank=4), inputs),
        "same pack": Stage(TrainSpec(rank=64, learning_rate=1e-3, seed=5), inputs),
        "data": Stage(TrainSpec(rank=4), {**inputs, "data": Source("e" * 64, "/e")}),
        "length": Stage(TrainSpec(rank=4, epochs=2.0), inputs),
    }
    names = {what: packing.of(stage, what, frozenset({None}))[0] for what, stage in stages.items()}
    assert names["one"] == names["same pack"] and len(set(names.values())) == 3


def test_members_of_a_lost_pack_are_retried_one_by_one(tmp_path, pair, chats):
    class Losing(RecordingPacks):
        def finished(self, timeout_s: float) -> Sequence[Finished]:
            if len(self.packs) == 1 and self._waiting:
                job, _ = self._waiting.pop(0)
                return [Finished(job, (), lost=Loss("WorkerCrashedError: the worker died"))]
            return super().finished(timeout_s)

    executor, stages = Losing(), trainings(pair.aligned, chats, 2)
    runner = ran(tmp_path / "store", stages, executor, pack=2)
    assert executor.packs[0] == [(True, 0.5)] * 2
    assert {each for batch in executor.packs[1:] for each in batch} == {(False, 1.0)}
    assert all(runner.artifact(stage) is not None for stage in stages)
    assert sorted(
        runner._setup.retry_policy.lost(runner.nodes[stage.lineage].key) for stage in stages
    ) == [
        0,
        1,
    ]


def test_members_that_a_host_lost_may_be_packed_again(tmp_path, pair, chats):
    class Gone(RecordingPacks):
        def finished(self, timeout_s: float) -> Sequence[Finished]:
            if len(self.packs) == 1 and self._waiting:
                job, _ = self._waiting.pop(0)
                return [Finished(job, (), lost=Loss("here is gone", "place"))]
            return super().finished(timeout_s)

    executor = Gone()
    ran(tmp_path / "store", trainings(pair.aligned, chats, 3), executor, pack=3)
    # The member that was charged with the loss avoids its host if it can; the others stay a pack.
    assert sorted(map(len, executor.packs)) == [1, 2, 3] and all(
        packed for batch in executor.packs for packed, _ in batch
    )


def test_an_adapter_from_a_pack_is_never_dropped_because_a_rerun_may_differ(tmp_path, pair, chats):
    stages = trainings(pair.aligned, chats, 2)
    for root, pack, droppable in ((tmp_path / "packed", 2, 0), (tmp_path / "alone", 1, 2)):
        runner = ran(root, stages, RecordingPacks(), pack=pack)
        keys = frozenset(runner.nodes[stage.lineage].key for stage in stages)
        removals = Survey(runner.store).adapters(
            Needed(keys=keys, adapters=keys), before=float("inf")
        )
        assert len(list(removals)) == droppable
