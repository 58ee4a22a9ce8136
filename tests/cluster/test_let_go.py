"""The stages that a runner has let go: kept in little memory, as a dictionary would keep them."""

import hashlib
import random
import tracemalloc
from types import SimpleNamespace

import pytest

from ebbline.cluster.running import let_go
from ebbline.cluster.running.let_go import LetGo
from ebbline.cluster.schedule import digest_set


def sha(number: int, what: str) -> str:
    """A digest; each fourth ends or begins with zeros."""
    found = hashlib.sha256(f"{what} {number}".encode()).hexdigest()
    return (found, f"{found[:-2]}00", f"00{found[2:]}", found)[number % 4]


def node(number, reused=False):
    return SimpleNamespace(
        stage=SimpleNamespace(lineage=sha(number, "lineage")), key=sha(number, "key"), reused=reused
    )


def test_stages_are_found_taken_and_added_again_as_in_a_dictionary(monkeypatch):
    for module in (let_go, digest_set):
        monkeypatch.setattr(module, "PACK_AT", 7)
    rng, found, expected, made = random.Random(0), LetGo(), {}, set()
    for _ in range(2000):
        number = rng.randrange(150)
        each = node(number, reused=number % 3 == 0)
        if number in expected and rng.random() < 0.5:
            assert found.take(each.stage.lineage) == expected.pop(number)
        elif number not in expected:
            found.add(each)
            expected[number] = each.key
            made |= set() if each.reused else {each.key}
        assert (each.stage.lineage in found) == (number in expected)
        assert found.key(each.stage.lineage) == expected.get(number)
    assert dict(found.keys()) == {key: key not in made for key in expected.values()}
    assert all(found.reused(sha(number, "key")) == (number % 3 == 0) for number in range(150))
    assert found.take(sha(999, "lineage")) is None


@pytest.mark.slow
def test_a_stage_that_was_let_go_takes_a_hundred_bytes():
    tracemalloc.start()
    try:
        found, count = LetGo(), 40_000
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            found.add(node(number))
        assert (tracemalloc.get_traced_memory()[0] - before) / count < 130
    finally:
        tracemalloc.stop()
