"""The cache of an object store's files on one machine: its bound, its locks, and whole files."""

import fcntl
import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest

from ebbline.cluster.store import cache as module
from ebbline.cluster.store.cache import Cache, Receive
from ebbline.tasks.errors import StoreError


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", limit_gb=3000 / 1e9)


def fill(cache: Cache, name: str, size: int = 1000) -> Path:
    data = name[:1].encode() * size
    folder = cache.root / "store" / "data" / name / "attempt"
    with cache.hold(folder):
        cache.fetch(folder, {"f": digest_of(data)}, lambda: {"f": size}, giving(data))
    return folder


def test_the_least_recently_used_entry_is_removed_and_the_bound_holds(cache):
    folders = [fill(cache, name) for name in "abc"]
    for age, folder in zip((30, 10, 20), folders, strict=True):
        os.utime(cache._lock_path(folder), (1e9 - age, 1e9 - age))
    fourth = fill(cache, "d")
    assert [folder.exists() for folder in (*folders, fourth)] == [False, True, True, True]
    assert sum(path.stat().st_size for path in cache.root.rglob("f")) <= cache.limit_bytes


def test_an_entry_in_use_stays(cache):
    first = fill(cache, "a")
    with cache.hold(first):
        for name in "bcd":
            fill(cache, name)
        assert (first / "f").exists()
    assert len(list(cache.root.rglob("f"))) <= 3


@pytest.mark.process
def test_an_entry_in_use_by_another_process_stays(cache, tmp_path):
    first = fill(cache, "a")
    context = multiprocessing.get_context("spawn")
    holding, done = context.Event(), context.Event()
    reader = context.Process(target=hold_in_a_process, args=(cache.root, first, holding, done))
    reader.start()
    assert holding.wait(300)
    for name in "bcd":
        fill(cache, name)
    assert (first / "f").exists()
    done.set()
    reader.join(300)
    fill(cache, "e")
    assert not (first / "f").exists()


def test_a_second_use_of_an_entry_keeps_it_for_longer(cache, monkeypatch):
    monkeypatch.setattr(module, "HELD_FOR_READERS", 2)
    first, second, third = folders = [fill(cache, name) for name in "abc"]
    for folder in (first, second, first, third):
        cache.keep(folder)
    fill(cache, "d")
    assert [folder.exists() for folder in folders] == [True, False, True]


def test_an_interrupted_fetch_leaves_no_file_under_its_final_name(cache):
    folder, data = cache.root / "store" / "data" / "k" / "attempt", b"whole"

    def cut(file, path):
        path.write_bytes(data[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fetch(folder, {"f": digest_of(data)}, lambda: {"f": 5}, cut)
    assert not (folder / "f").exists()
    with pytest.raises(StoreError, match="store verify --mend"):
        cache.fetch(folder, {"f": digest_of(data)}, lambda: {"f": 5}, giving(b"who"))
    assert not (folder / "f").exists()
    cache.fetch(folder, {"f": digest_of(data)}, lambda: {"f": 5}, giving(data))
    assert (folder / "f").read_bytes() == data


def test_files_of_a_killed_fetch_are_removed(cache):
    (cache.root / "fetching").mkdir(parents=True)
    (cache.root / "fetching" / "left").write_bytes(b"0" * 500)
    cache.trim()
    assert list((cache.root / "fetching").iterdir()) == []


@pytest.mark.process
def test_processes_that_need_a_file_at_once_fetch_it_once(cache, tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=fetch_in_a_process, args=(cache.root, tmp_path / "fetched", n))
        for n in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(list((tmp_path / "fetched").iterdir())) == 1


def test_during_a_fetch_no_other_process_gets_the_lock(cache):
    folder, data = cache.root / "store" / "data" / "k" / "attempt", b"data"

    def receive(file: str, path: Path) -> str:
        # Another process would request a shared lock, which must fail.
        with cache._lock_path(folder / "fetch").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return giving(data)(file, path)

    with cache.hold(folder):
        cache.fetch(folder, {"f": digest_of(data)}, lambda: {"f": 4}, receive)


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def giving(data: bytes) -> Receive:
    """The `receive` of a store that contains these bytes."""

    def receive(file: str, path: Path) -> str:
        path.write_bytes(data)
        return digest_of(data)

    return receive


def hold_in_a_process(root: Path, folder: Path, holding, done) -> None:
    with Cache(root, 1.0).hold(folder):
        holding.set()
        done.wait(600)


def fetch_in_a_process(root: Path, fetched: Path, number: int) -> None:
    def receive(file: str, path: Path) -> str:
        fetched.mkdir(exist_ok=True)
        (fetched / str(number)).touch()
        path.write_bytes(b"data")
        return digest_of(b"data")

    folder = root / "store" / "data" / "k" / "attempt"
    cache = Cache(root, 1.0)
    with cache.hold(folder):
        cache.fetch(folder, {"f": digest_of(b"data")}, lambda: {"f": 4}, receive)
        assert (folder / "f").read_bytes() == b"data"


def test_only_its_owner_can_read_a_cache(tmp_path):
    cache = Cache(tmp_path / "cache", 1.0)
    entry = cache.root / "store" / "generate" / "key" / "attempt"
    with cache.hold(entry):
        (entry / "payload").mkdir(parents=True)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in cache.root.iterdir()} == {
        "locks": "0o700",
        "store": "0o700",
    }
