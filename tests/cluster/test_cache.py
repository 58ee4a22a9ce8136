"""The cache of an object store's files on one machine: what it may remove, and what it never
does.
"""

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


def test_the_least_recently_used_goes_and_the_bound_holds(cache):
    made = [fill(cache, name) for name in "abc"]
    for age, folder in zip((30, 10, 20), made, strict=True):
        os.utime(cache._lock_path(folder), (1e9 - age, 1e9 - age))
    fourth = fill(cache, "d")
    assert [folder.exists() for folder in (*made, fourth)] == [False, True, True, True]
    assert sum(path.stat().st_size for path in cache.root.rglob("f")) <= cache.limit_bytes


def test_what_somebody_reads_stays(cache):
    first = fill(cache, "a")
    with cache.hold(first):
        for name in "bcd":
            fill(cache, name)
        assert (first / "f").exists()
    assert len(list(cache.root.rglob("f"))) <= 3


@pytest.mark.process
def test_what_another_process_reads_stays(cache, tmp_path):
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


def test_an_entry_that_is_asked_for_again_is_kept_for_longer(cache, monkeypatch):
    monkeypatch.setattr(module, "HELD_FOR_READERS", 2)
    first, second, third = made = [fill(cache, name) for name in "abc"]
    for folder in (first, second, first, third):
        cache.keep(folder)
    fill(cache, "d")
    assert [folder.exists() for folder in made] == [True, False, True]


def test_a_fetch_that_was_cut_off_is_never_taken_for_whole(cache):
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


def test_what_a_killed_fetch_left_is_cleared(cache):
    (cache.root / "fetching").mkdir(parents=True)
    (cache.root / "fetching" / "left").write_bytes(b"0" * 500)
    cache.trim()
    assert list((cache.root / "fetching").iterdir()) == []


@pytest.mark.process
def test_many_processes_that_ask_at_once_fetch_once(cache, tmp_path):
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


def test_while_one_fetches_no_other_can_begin(cache):
    folder, data = cache.root / "store" / "data" / "k" / "attempt", b"data"

    def receive(file: str, path: Path) -> str:
        # What another process would take: the lock must let nobody in beside its holder.
        with cache._lock_path(folder / "fetch").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return giving(data)(file, path)

    with cache.hold(folder):
        cache.fetch(folder, {"f": digest_of(data)}, lambda: {"f": 4}, receive)


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def giving(data: bytes) -> Receive:
    """What a store does that sends these bytes."""

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


def test_only_its_owner_can_look_into_a_cache(tmp_path):
    cache = Cache(tmp_path / "cache", 1.0)
    entry = cache.root / "store" / "generate" / "key" / "attempt"
    with cache.hold(entry):
        (entry / "payload").mkdir(parents=True)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in cache.root.iterdir()} == {
        "locks": "0o700",
        "store": "0o700",
    }
