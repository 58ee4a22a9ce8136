"""The store's contract. Another store would inherit `StoreContract` and give its own `store`."""

import json
import multiprocessing
from pathlib import Path

import pytest

from cluster.costs import GUESS_S, Estimates
from cluster.store import RECORD, Store
from tasks.errors import DataError, Incomplete, StoreError
from tasks.identity import content_digest, digest
from tasks.specs import KINDS, DataSpec, TrainSpec
from tasks.stage import key_payload

HASHED = key_payload(DataSpec(size=3), {"pool": "p"})
KEY = digest(HASHED)


def attempt(store: Store, text: str = "rows", hashed: dict = HASHED, kind: str = "data") -> Path:
    folder = store.begin(kind, digest(hashed))
    (folder / "payload" / "data.jsonl").write_text(text)
    return folder


def commit(store: Store, text: str = "rows"):
    return store.commit(attempt(store, text), HASHED, {"seconds": 1.0})


def commit_in_a_process(root: Path, text: str, barrier) -> None:
    store = Store(root)
    folder = attempt(store, text)
    barrier.wait()
    store.commit(folder, HASHED, {"seconds": 1.0})


class StoreContract:
    def test_what_was_never_made_is_not_there(self, store):
        assert store.find("data", KEY) is None
        with pytest.raises(Incomplete, match=KEY[:12]):
            store.open("data", KEY)
        assert list(store.all("data")) == []

    def test_what_was_committed_is_found_whole_by_whoever_looks(self, store):
        made = commit(store)
        for reader in (store, Store(store.root)):
            found = reader.find("data", KEY)
            assert found == made
        assert (found.path / "data.jsonl").read_text() == "rows"
        assert found.hashed == HASHED and found.provenance == {"seconds": 1.0}
        assert found.content == content_digest(found.path)
        assert found.content_of("data.jsonl") == content_digest(found.path / "data.jsonl")
        with pytest.raises(DataError):
            found.content_of("absent")
        assert list(store.all("data")) == [found]

    def test_an_attempt_that_was_cut_off_is_invisible_and_in_nobodys_way(self, store):
        cut = attempt(store, "half")
        assert store.find("data", KEY) is None and list(store.all("data")) == []
        assert (commit(store).path / "data.jsonl").read_text() == "rows"
        assert (cut / "payload" / "data.jsonl").exists()  # it may still be at work

    def test_the_first_commit_wins_and_the_second_gets_the_firsts_artifact(self, store):
        one, other = attempt(store, "first"), attempt(store, "second")
        first = store.commit(one, HASHED, {"seconds": 1.0})
        second = store.commit(other, HASHED, {"seconds": 2.0})
        assert first == second == store.find("data", KEY)
        assert (second.path / "data.jsonl").read_text() == "first"

    def test_of_many_processes_that_commit_at_once_exactly_one_stands(self, store):
        context = multiprocessing.get_context("spawn")
        barrier = context.Barrier(6)
        workers = [context.Process(target=commit_in_a_process, args=(store.root, f"text {n}", barrier)) for n in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0] * 6
        found = store.find("data", KEY)
        assert found.content == content_digest(found.path)
        assert [path.name for path in (store.root / "data" / KEY).iterdir() if path.is_dir()] == [found.folder.name]

    def test_a_payload_that_was_not_asked_for_is_refused(self, store):
        with pytest.raises(StoreError, match="made from something else"):
            store.commit(attempt(store), key_payload(DataSpec(size=4), {"pool": "p"}), {})
        assert store.find("data", KEY) is None

    def test_an_empty_payload_is_refused(self, store):
        with pytest.raises(StoreError, match="produced no files"):
            store.commit(store.begin("data", KEY), HASHED, {})
        assert store.find("data", KEY) is None

    def test_a_record_that_cannot_be_written_as_json_commits_nothing(self, store):
        with pytest.raises(ValueError, match="JSON"):
            store.commit(attempt(store), HASHED, {"seconds": float("nan")})
        assert store.find("data", KEY) is None

    def test_a_commit_empties_the_scratch_of_its_key_and_of_no_other(self, store):
        for key in (KEY, "other"):
            store.scratch(key).mkdir(parents=True)
            (store.scratch(key) / "checkpoint.pt").write_text("c")
        commit(store)
        assert not store.scratch(KEY).exists()
        assert (store.scratch("other") / "checkpoint.pt").exists()

    @pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}', "null"])
    def test_a_damaged_record_is_a_store_error_that_names_it(self, store, damage):
        commit(store)
        path = store.root / "data" / KEY / RECORD
        path.write_text(damage)
        for look in (lambda: store.find("data", KEY), lambda: list(store.all("data"))):
            with pytest.raises(StoreError, match="record.json is damaged"):
                look()

    def test_each_attempt_has_a_folder_of_its_own(self, store):
        one, other = store.begin("data", KEY), store.begin("data", KEY)
        assert one != other
        assert {path.name for path in one.iterdir()} == {"payload", "log"}

    def test_logs_are_no_content(self, store):
        folder = attempt(store)
        (folder / "log" / "progress.json").write_text("{}")
        assert set(store.commit(folder, HASHED, {}).files) == {"data.jsonl"}


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path):
        return Store(tmp_path / "store")


def test_a_record_names_the_attempt_and_its_files(tmp_path):
    made = commit(Store(tmp_path))
    record = json.loads((tmp_path / "data" / KEY / RECORD).read_text())
    assert set(record) == {"key", "kind", "attempt", "content", "files", "hashed", "provenance"}
    assert record["attempt"] == made.folder.name


def test_an_estimate_is_a_stated_guess_until_the_like_has_run(tmp_path):
    store = Store(tmp_path)
    assert GUESS_S.keys() == KINDS.keys()
    estimates = Estimates(store)
    assert estimates.seconds(TrainSpec()) == GUESS_S["train"]
    for rank, seconds in ((1, 10.0), (2, 30.0), (4, 20.0)):
        hashed = key_payload(TrainSpec(rank=rank), {})
        store.commit(attempt(store, hashed=hashed, kind="train"), hashed, {"seconds": seconds})
    assert Estimates(store).seconds(TrainSpec(rank=64)) == 20.0
    assert Estimates(store).seconds(TrainSpec(method="full")) == 20.0  # nothing like it: the median of its kind
    estimates.learn([next(iter(store.all("train")))])
    assert estimates.seconds(TrainSpec()) in (10.0, 20.0, 30.0)
