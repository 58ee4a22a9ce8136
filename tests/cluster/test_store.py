"""The store's contract, for a folder and for a bucket on a real S3 server; and what only one of
them guarantees.
"""

import errno
import hashlib
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.cluster.running.runner import Runner
from ebbline.cluster.store import bucket as bucket_module
from ebbline.cluster.store.artifacts import RECORD, Store
from ebbline.cluster.store.places import Folder
from ebbline.cluster.store.retention import Needed, Survey
from ebbline.tasks.errors import DataError, Differs, DiskFull, Incomplete, StoreError
from ebbline.tasks.identity import content_digest, digest
from ebbline.tasks.specs import DataSpec
from ebbline.tasks.stage import key_payload
from tests.cluster.made import rows, settle, source
from tests.s3 import CREDENTIALS

HASHED = key_payload(DataSpec(size=3), {"pool": "p"})
KEY = digest(HASHED)


def file_digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def attempt(store: Store, text: str = "rows", hashed: dict = HASHED, kind: str = "data") -> Path:
    folder = store.begin(kind, digest(hashed))
    (folder / "payload" / "data.jsonl").write_text(text)
    return folder


def commit(store: Store, text: str = "rows"):
    return store.commit(attempt(store, text), HASHED, {"seconds": 1.0})


def commit_in_a_process(location: str, text: str, barrier) -> None:
    store = Store(location)
    folder = attempt(store, text)
    barrier.wait()
    store.commit(folder, HASHED, {"seconds": 1.0})


class StoreContract:
    def test_an_uncommitted_key_is_not_found(self, store):
        assert store.find("data", KEY) is None
        with pytest.raises(Incomplete, match=KEY[:12]):
            store.open("data", KEY)
        assert list(store.all("data")) == []

    def test_any_reader_finds_a_committed_artifact_whole(self, store):
        made = commit(store)
        for reader in (store, Store(store.place.at)):
            found = reader.find("data", KEY)
            assert found == made
        assert (found.path / "data.jsonl").read_text() == "rows"
        assert found.hashed == HASHED and found.provenance == {"seconds": 1.0}
        assert found.content == content_digest(found.path)
        assert found.content_of("data.jsonl") == content_digest(found.path / "data.jsonl")
        with pytest.raises(DataError):
            found.content_of("absent")
        assert list(store.all("data")) == [found]

    def test_an_interrupted_attempt_is_invisible_and_blocks_no_other(self, store):
        cut = attempt(store, "half")
        assert store.find("data", KEY) is None and list(store.all("data")) == []
        assert (commit(store).path / "data.jsonl").read_text() == "rows"
        assert (cut / "payload" / "data.jsonl").exists()  # its worker may still run

    def test_uploaded_files_without_a_record_are_no_artifact(self, store):
        cut = attempt(store, "half")
        store.place.send(
            cut / "payload" / "data.jsonl", f"data/{KEY}/{cut.name}/payload/data.jsonl"
        )
        assert Store(store.place.at).find("data", KEY) is None
        assert commit(store).content == Store(store.place.at).open("data", KEY).content

    def test_the_first_commit_is_valid_and_the_second_returns_its_artifact(self, store):
        one, other = attempt(store, "first"), attempt(store, "second")
        first = store.commit(one, HASHED, {"seconds": 1.0})
        second = store.commit(other, HASHED, {"seconds": 2.0})
        assert first == second == store.find("data", KEY)
        assert (second.path / "data.jsonl").read_text() == "first"

    @pytest.mark.process
    def test_of_concurrent_commits_exactly_one_is_recorded(self, store):
        context = multiprocessing.get_context("spawn")
        barrier = context.Barrier(6)
        workers = [
            context.Process(target=commit_in_a_process, args=(store.place.at, f"text {n}", barrier))
            for n in range(6)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(300)
        assert [worker.exitcode for worker in workers] == [0] * 6
        found = store.find("data", KEY)
        assert found.content == content_digest(found.path)
        assert {entry.name.split("/")[2] for entry in store.place.entries(f"data/{KEY}")} == {
            RECORD,
            found.folder.name,
        }

    def test_a_payload_of_another_key_is_an_error(self, store):
        with pytest.raises(StoreError, match="do not match its key"):
            store.commit(attempt(store), key_payload(DataSpec(size=4), {"pool": "p"}), {})
        assert store.find("data", KEY) is None

    def test_an_empty_payload_is_an_error(self, store):
        with pytest.raises(StoreError, match="produced no files"):
            store.commit(store.begin("data", KEY), HASHED, {})
        assert store.find("data", KEY) is None

    def test_a_record_that_cannot_be_written_as_json_commits_nothing(self, store):
        with pytest.raises(ValueError, match="JSON"):
            store.commit(attempt(store), HASHED, {"seconds": float("nan")})
        assert store.find("data", KEY) is None

    @pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}', "null"])
    def test_a_damaged_record_is_a_store_error_that_names_it(self, store, damage):
        commit(store)
        store.place.write(f"data/{KEY}/{RECORD}", damage.encode())
        reader = Store(store.place.at)
        for read in (lambda: reader.find("data", KEY), lambda: list(reader.all("data"))):
            with pytest.raises(StoreError, match="record.json is damaged"):
                read()

    def test_each_attempt_has_its_own_folder(self, store):
        one, other = store.begin("data", KEY), store.begin("data", KEY)
        assert one != other
        assert {path.name for path in one.iterdir()} == {"payload", "log"}

    def test_logs_are_not_part_of_the_content(self, store):
        folder = attempt(store)
        (folder / "log" / "progress.json").write_text("{}")
        assert set(store.commit(folder, HASHED, {}).files) == {"data.jsonl"}

    def test_create_does_not_change_an_existing_name(self, store):
        assert store.place.create("x/y", b"one") and not store.place.create("x/y", b"two")
        assert store.place.read("x/y") == b"one"

    def test_files_are_listed_moved_hashed_and_removed(self, store):
        for name in ("a/one.txt", "a/b/two #1.txt", "c/three.txt"):
            store.place.write(name, name.encode())
        assert {(entry.name, entry.size) for entry in store.place.entries("a")} == {
            ("a/one.txt", 9),
            ("a/b/two #1.txt", 14),
        }
        assert store.place.below("a") == ["b"] and store.place.below("nothing") == []
        store.place.move("a/b/two #1.txt", "d/two.txt")
        assert store.place.read("a/b/two #1.txt") is None and store.place.sha256(
            "d/two.txt"
        ) == file_digest_of(b"a/b/two #1.txt")
        store.place.delete(["a/one.txt", "never/there"])
        assert store.place.read("a/one.txt") is None and store.place.sha256("a/one.txt") is None

    def test_a_dropped_file_leaves_the_record_and_is_listed_as_dropped(self, store):
        made = commit(store)
        assert store.dropped(made) == frozenset()
        store.drop(made, frozenset({"data.jsonl"}))
        found = Store(store.place.at).open("data", KEY)
        assert found == made and store.dropped(found) == {"data.jsonl"}
        assert store.place.sha256(f"data/{KEY}/{made.folder.name}/payload/data.jsonl") is None

    def test_a_second_drop_adds_to_the_first(self, store):
        folder = attempt(store)
        (folder / "payload" / "curve.csv").write_text("c")
        made = store.commit(folder, HASHED, {"seconds": 1.0})
        store.drop(made, frozenset({"data.jsonl"}))
        store.drop(made, frozenset({"curve.csv"}))
        assert store.dropped(made) == {"data.jsonl", "curve.csv"}

    def test_the_record_is_written_after_all_files(self, store, monkeypatch):
        send, records = store.place.send, []

        def sending(path, name):
            records.append(store.place.read(f"data/{KEY}/{RECORD}"))
            send(path, name)

        monkeypatch.setattr(store.place, "send", sending)
        commit(store)
        assert records == [None] and store.place.read(f"data/{KEY}/{RECORD}") is not None

    def test_a_rerun_with_equal_content_restores_a_dropped_file(self, store):
        made = commit(store)
        store.drop(made, frozenset({"data.jsonl"}))
        assert commit(Store(store.place.at)) == made
        assert store.dropped(made) == frozenset() and made.file("data.jsonl").read_text() == "rows"

    def test_a_rerun_with_other_content_is_an_error_and_changes_nothing(self, store):
        made = store.commit(
            attempt(store), HASHED, {"seconds": 1.0, "device": "cuda", "host": "far"}
        )
        store.drop(made, frozenset({"data.jsonl"}))
        with pytest.raises(Differs, match=r"produced on cuda, far.*ebbline store forget data"):
            commit(store, "other rows")
        assert store.dropped(made) == {"data.jsonl"} and store.find("data", KEY) == made

    def test_a_quarantined_key_can_be_committed_again(self, store):
        made = commit(store)
        to = store.quarantine("data", KEY)
        assert store.find("data", KEY) is None
        assert store.place.read(f"{to}/{RECORD}") is not None
        assert commit(store, "anew").content != made.content


class TestFolder(StoreContract):
    @pytest.fixture
    def store(self, tmp_path):
        return Store(tmp_path / "store")

    def test_a_commit_empties_the_scratch_of_its_key_and_of_no_other(self, store):
        for key in (KEY, "other"):
            store.scratch(key).mkdir(parents=True)
            (store.scratch(key) / "checkpoint.pt").write_text("c")
        commit(store)
        assert not store.scratch(KEY).exists()
        assert (store.scratch("other") / "checkpoint.pt").exists()

    def test_a_commit_moves_and_copies_nothing(self, store):
        folder = attempt(store)
        before = (folder / "payload" / "data.jsonl").stat()
        assert store.commit(folder, HASHED, {}).path == folder / "payload"
        assert (folder / "payload" / "data.jsonl").stat().st_ino == before.st_ino

    def test_a_folder_that_cannot_be_written_is_an_error_with_its_path(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(
            StoreError,
            match=r"the store .*/file/store/data/.* cannot be used|the store .*/file/store "
            r"cannot be used",
        ):
            Store(tmp_path / "file" / "store").begin("data", KEY)


class TestBucket(StoreContract):
    @pytest.fixture
    def store(self, bucket):
        return Store(bucket)

    def test_a_commit_empties_the_scratch_of_its_key_and_of_no_other(self, store):
        for key in (KEY, "other"):
            store.place.write(f"scratch/{key}/id/checkpoint.pt", b"c")
        commit(store)
        assert [entry.name for entry in store.place.entries("scratch")] == [
            "scratch/other/id/checkpoint.pt"
        ]

    def test_another_machine_fetches_only_the_file_that_it_reads(
        self, store, tmp_path, monkeypatch
    ):
        folder = attempt(store)
        (folder / "payload" / "large.bin").write_bytes(b"0" * 1000)
        store.commit(folder, HASHED, {})
        monkeypatch.setenv("EBBLINE_CACHE", str(tmp_path / "elsewhere"))
        found = Store(store.place.at).open("data", KEY)
        assert found.file("data.jsonl").read_text() == "rows"
        assert [path.name for path in found.folder.rglob("*") if path.is_file()] == ["data.jsonl"]
        assert content_digest(found.path) == found.content

    def test_a_file_that_changed_in_the_store_is_an_error(self, store, tmp_path, monkeypatch):
        made = commit(store)
        store.place.write(f"data/{KEY}/{made.folder.name}/payload/data.jsonl", b"rowz")
        monkeypatch.setenv("EBBLINE_CACHE", str(tmp_path / "elsewhere"))
        found = Store(store.place.at).open("data", KEY)
        with pytest.raises(StoreError, match="store verify --mend"):
            found.file("data.jsonl")
        cached = list((tmp_path / "elsewhere").rglob("*"))
        assert cached and not [
            path for path in cached if path.name == "data.jsonl" or path.parent.name == "fetching"
        ]

    def test_an_error_of_this_machines_disk_names_the_cache_and_not_the_store(
        self, store, tmp_path, monkeypatch
    ):
        commit(store)
        with pytest.raises(DiskFull, match=r"s3://.*No space left on device.*EBBLINE_CACHE"):
            store.place.receive(f"data/{KEY}/{RECORD}", Path("/dev/full"))
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("EBBLINE_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(StoreError, match="EBBLINE_CACHE"):
            Store(store.place.at).open("data", KEY).file("data.jsonl")

    def test_no_file_and_no_name_in_the_store_contains_a_secret(self, store, chats):
        runner = Runner(store, InlineExecutor())
        runner.add([rows(3, source(chats))])
        settle(runner)
        found = {entry.name: store.place.read(entry.name) or b"" for entry in store.place.entries()}
        assert {name.rpartition("/")[2] for name in found} >= {RECORD, "request.json"} and all(
            found.values()
        )
        for secret in (CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"]):
            assert not [
                name for name, text in found.items() if secret in name or secret.encode() in text
            ]


@pytest.mark.parametrize(
    "url",
    [
        "gs://bucket/x",
        "file:///tmp/x",
        "s3://",
        "s3://BAD_bucket/x",
        "s3://key:sek-ret@bucket/x",
        "s3://bucket/x?y=sek-ret",
    ],
)
def test_an_invalid_url_is_an_error_that_does_not_repeat_it(url):
    with pytest.raises(StoreError, match="a folder, or s3://BUCKET/PREFIX") as caught:
        Store(url)
    assert "sek-ret" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "there is no such bucket"),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"},
            "does not answer; check the network and AWS_ENDPOINT_URL",
        ),
        (
            {
                "AWS_ACCESS_KEY_ID": "",
                "AWS_SECRET_ACCESS_KEY": "",
                "AWS_METADATA_ENDPOINT": "http://127.0.0.1:1",
            },
            "there are no credentials",
        ),
    ],
)
def test_a_bucket_that_cannot_be_used_is_an_error_with_its_cause(
    bucket, monkeypatch, change, message
):
    monkeypatch.setitem(bucket_module.RETRIES, "max_retries", 1)
    for name, value in change.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    store = Store("s3://ebbline-nobody-made-this/studies")
    for act in (
        lambda: store.find("data", KEY),
        lambda: list(store.place.entries()),
        lambda: store.place.write("x", b""),
    ):
        with pytest.raises(StoreError, match=message) as caught:
            act()
        assert "s3://ebbline-nobody-made-this/studies" in str(caught.value) and "\n" not in str(
            caught.value
        )


def test_records_share_equal_strings(tmp_path):
    store, payloads = (
        Store(tmp_path),
        [key_payload(DataSpec(size=size), {"pool": "p" * 64}) for size in (3, 4)],
    )
    one, other = (
        store.commit(attempt(store, hashed=hashed), hashed, {"seconds": 1.0}) for hashed in payloads
    )
    assert all(
        name is same for name, same in zip(one.hashed["spec"], other.hashed["spec"], strict=True)
    )
    assert one.hashed["inputs"]["pool"] is other.hashed["inputs"]["pool"]


def test_a_record_names_the_attempt_and_its_files(tmp_path):
    made = commit(Store(tmp_path))
    record = json.loads((tmp_path / "data" / KEY / RECORD).read_text())
    assert set(record) == {
        *("key", "kind", "attempt", "content", "files", "hashed", "provenance", "sha256")
    }
    assert record["attempt"] == made.folder.name


def test_a_half_created_name_of_a_home_is_no_home_and_is_removable(tmp_path):
    """obstore was killed between its two steps. The store has no other user then."""
    store, later = Store(tmp_path), time.time() + 60.0
    store.place.create("homes/abc.json", b"{}")
    (tmp_path / "homes" / "abc.json#1").write_text("{}")
    survey = Survey(store)
    assert survey.owners == {"abc"}
    (removal,) = survey.removable(None, later)
    assert removal.names == ("homes/abc.json#1",)


def test_a_full_quota_stops_a_run_as_a_full_disk_does(tmp_path):
    place = Folder(tmp_path)
    for number in (errno.ENOSPC, errno.EDQUOT):
        error = place.explained(OSError(number, os.strerror(number)))
        assert isinstance(error, DiskFull) and os.strerror(number) in str(error)


def test_an_old_unneeded_artifact_is_removable_and_its_record_goes_first(tmp_path):
    store = Store(tmp_path)
    commit(store)
    survey, later = Survey(store), time.time() + 60.0
    (removal,) = survey.removable(Needed(), later)
    assert (removal.what, removal.names[0], len(removal.names)) == (
        "artifact",
        f"data/{KEY}/{RECORD}",
        2,
    )
    assert list(survey.removable(Needed(keys=frozenset({KEY})), later)) == []
    assert list(survey.removable(Needed(), later - 3600.0)) == [], "a run may be about to use it"
