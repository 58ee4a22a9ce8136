"""Identity: one text for each value, no unstable values, and a digest that does not depend on the
path.
"""

import enum
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.tasks import identity
from ebbline.tasks.errors import DataError, UnstableValue
from ebbline.tasks.identity import (
    canonical,
    content_digest,
    digest,
    digest_files,
    folder_files,
    part_digest,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)


def reordered(value: object) -> object:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(list(value))}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(json_values)
def test_canonical_text_does_not_depend_on_the_order_of_keys(value):
    assert canonical(reordered(value)) == canonical(value)
    assert digest(reordered(value)) == digest(value)


@given(json_values)
def test_canonical_text_reads_back_as_the_same_value_and_type(value):
    back = json.loads(canonical(value))
    assert back == value
    assert canonical(back) == canonical(value)
    assert canonical(value).isascii()


@given(json_values, json_values)
def test_two_values_share_a_digest_only_if_they_share_their_text(one, other):
    assert (digest(one) == digest(other)) == (canonical(one) == canonical(other))


def test_numbers_that_are_equal_in_python_have_different_digests():
    assert len({digest(value) for value in (1, 1.0, True, "1")}) == 4


def test_a_tuple_and_an_equal_list_have_one_digest_as_in_json():
    assert digest((1, 2)) == digest([1, 2])


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    "unstable",
    [
        {1, 2},
        frozenset({"a"}),
        float("nan"),
        float("inf"),
        Path("/tmp"),
        b"bytes",
        np.float64(0.5),
        np.float32(0.5),
        np.int64(3),
        np.bool_(True),
        Colour.RED,
        Level.ONE,
        object(),
        {1: "a"},
        {None: "a"},
        {Colour.RED: "a"},
        1 + 2j,
    ],
    ids=lambda value: (
        "object" if type(value) is object else repr(value)
    ),  # the same in every process
)
def test_an_unstable_value_is_an_error_at_any_depth(unstable):
    for value in (unstable, [unstable], {"deep": [{"deeper": unstable}]}):
        with pytest.raises(UnstableValue):
            digest(value)


def test_the_error_names_the_place_of_the_unstable_value():
    with pytest.raises(UnstableValue, match=r"value\.train\.ranks\[1\] is a set"):
        digest({"train": {"ranks": [8, {4}]}})


file_trees = st.dictionaries(
    st.lists(st.sampled_from(["a", "b", "c.txt", "d e"]), min_size=1, max_size=3).map("/".join),
    st.binary(max_size=20),
    min_size=1,
    max_size=5,
)


@given(file_trees)
def test_a_folder_and_its_copy_elsewhere_have_the_same_digest(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("tree")
    one = folder / "one"
    for name, data in tree.items():
        # The suffix lets one name be a file and a folder in the same tree.
        path = one / f"{name}.d" / "file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    other = Path(shutil.copytree(one, folder / "deeper" / "other"))
    assert content_digest(one) == content_digest(other) == digest_files(folder_files(one))
    changed_file = next(path for path in sorted(other.rglob("*")) if path.is_file())
    changed_file.write_bytes(changed_file.read_bytes() + b"!")
    assert content_digest(one) != content_digest(other)


def test_renaming_a_file_changes_a_folder_but_not_the_file(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a").write_text("x")
    before, file = content_digest(tmp_path / "one"), content_digest(tmp_path / "one" / "a")
    (tmp_path / "one" / "a").rename(tmp_path / "one" / "b")
    assert content_digest(tmp_path / "one") != before
    assert content_digest(tmp_path / "one" / "b") == file


def test_the_digest_cache_is_used_and_notices_a_changed_file(tmp_path):
    file, cache = tmp_path / "weights", tmp_path / "cache" / "digests.json"
    file.write_text("one")
    first = content_digest(file, cache)
    assert first == content_digest(file)
    # A wrong digest that is put into the cache comes back, so the cache is read.
    cache.write_text(json.dumps(dict.fromkeys(json.loads(cache.read_text()), "0" * 64)))
    assert content_digest(file, cache) == "0" * 64
    file.write_text("two, longer")
    changed = content_digest(file, cache)
    assert changed == content_digest(file) != first


def test_a_file_that_was_hashed_for_a_pin_is_not_hashed_again_by_a_stage(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    monkeypatch.setattr(identity, "READ", identity.FileDigests({}, -(10**18)))
    found = content_digest(file, tmp_path / "digests.json")
    monkeypatch.setattr(identity, "file_digest", lambda path: pytest.fail("was hashed again"))
    assert identity.READ.of(file) == found


def test_the_digest_cache_notices_a_change_that_keeps_the_size(tmp_path):
    file, cache = tmp_path / "weights", tmp_path / "digests.json"
    file.write_text("one")
    first = content_digest(file, cache)
    file.write_text("two")
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1_000_000))
    assert content_digest(file, cache) != first


def test_an_absent_path_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        content_digest(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty"):
        content_digest(tmp_path / "empty")


def test_a_part_has_the_digest_of_the_same_files_alone(tmp_path):
    (tmp_path / "stage" / "adapter").mkdir(parents=True)
    (tmp_path / "stage" / "adapter" / "weights").write_text("w")
    (tmp_path / "stage" / "curve.csv").write_text("c")
    files = folder_files(tmp_path / "stage")
    assert part_digest(files, "adapter") == content_digest(tmp_path / "stage" / "adapter")
    assert part_digest(files, "curve.csv") == content_digest(tmp_path / "stage" / "curve.csv")
    with pytest.raises(DataError, match="no file or folder 'model'"):
        part_digest(files, "model")


def test_a_folder_whose_name_begins_with_a_parts_name_is_not_in_the_part():
    alone = {"adapter/weights": "a" * 64}
    beside = {**alone, "adapter-old/weights": "b" * 64, "adapter.json": "c" * 64}
    assert part_digest(beside, "adapter") == part_digest(alone, "adapter")


def test_processes_of_a_machine_hash_a_large_file_once_until_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "KEPT_BYTES", 1)
    file, kept = tmp_path / "weights", tmp_path / "cache" / "digests.json"
    file.write_text("one")

    def another_process() -> identity.FileDigests:
        return identity.FileDigests({}, 0, lambda: kept)

    first = another_process().of(file)
    with monkeypatch.context() as unread:
        unread.setattr(identity, "file_digest", lambda path: "read again")
        assert another_process().of(file) == first
        stat = file.stat()
        file.write_text("two")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert another_process().of(file) == "read again"
    kept.write_text("{")  # a damaged cache is made again
    assert another_process().of(file) == identity.file_digest(file)
