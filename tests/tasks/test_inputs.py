"""The check of a stage's inputs: no byte, file or link of them may differ from the record, whenever
it came to differ.
"""

import hashlib
import os
import shutil
import threading
from concurrent.futures import wait
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbline.tasks import inputs as inputs_module
from ebbline.tasks.background_digests import BackgroundDigests
from ebbline.tasks.errors import Damaged
from ebbline.tasks.identity import content_digest, folder_files
from ebbline.tasks.inputs import ExpectedInput, InputCheck

FILES = {"config.json": b"{}", "adapter/weights": b"0123456789" * 50, "template.jinja": b"hello"}


@pytest.fixture(params=[0, 32_000_000], ids=["hashed in threads", "hashed at once"])
def folder(request, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs_module, "LARGE_BYTES", request.param)
    for name, data in FILES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    return tmp_path / "in"


def recorded(folder: Path) -> ExpectedInput:
    return ExpectedInput(folder, content_digest(folder), "record", folder_files(folder))


def pinned(folder: Path) -> ExpectedInput:
    return ExpectedInput(folder, content_digest(folder))


def read(expected: ExpectedInput) -> None:
    """A stage that reads one input."""
    check = InputCheck({"model": expected})
    check.finish()
    check.check_unchanged()


def flip(path: Path, place: int = 0) -> None:
    """Change one bit, and keep the size and the time of modification."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[place % len(data)] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.sampled_from(sorted(FILES)), st.integers(0, 10_000), st.booleans())
def test_a_flipped_bit_anywhere_is_an_error_that_names_the_file(folder, name, place, by_record):
    expected = recorded(folder) if by_record else pinned(folder)
    read(expected)
    flip(folder / name, place)
    with pytest.raises(Damaged, match="verify --mend" if by_record else "ebbline pin") as caught:
        read(expected)
    assert str(folder / name if by_record else folder) in str(caught.value)
    flip(folder / name, place)
    read(expected)


def truncate(folder: Path) -> None:
    os.truncate(folder / "adapter" / "weights", 5)


def swap(folder: Path) -> None:
    other = folder.parent / "other"
    shutil.copy2(folder / "adapter" / "weights", other)
    flip(other)
    other.replace(folder / "adapter" / "weights")


CHANGES = {
    "truncated": truncate,
    "swapped": swap,
    "removed": lambda folder: (folder / "config.json").unlink(),
    "renamed": lambda folder: (folder / "config.json").rename(folder / "config2.json"),
    "added": lambda folder: (folder / "generation_config.json").write_text("{}"),
    "emptied": shutil.rmtree,
}


@pytest.mark.parametrize("source", [recorded, pinned])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_an_error(folder, change, source):
    expected = source(folder)
    CHANGES[change](folder)
    with pytest.raises(Damaged):
        read(expected)


@pytest.mark.parametrize("change", [flip, lambda path: path.unlink(), lambda path: path.touch()])
def test_a_file_that_changes_between_check_and_read_is_an_error(folder, change):
    check = InputCheck({"model": recorded(folder)})
    check.finish()
    change(folder / "adapter" / "weights")
    with pytest.raises(Damaged, match="weights was changed while a stage read it"):
        check.check_unchanged()


def test_a_hard_link_or_new_access_rights_change_nothing(folder):
    check = InputCheck({"model": recorded(folder)})
    check.finish()
    os.link(folder / "config.json", folder.parent / "backup")
    (folder / "template.jinja").chmod(0o400)
    check.check_unchanged()


def test_damage_ends_a_running_stage_at_its_next_progress(folder, monkeypatch):
    expected, hashed = recorded(folder), threading.Event()
    monkeypatch.setattr(inputs_module, "LARGE_BYTES", 0)
    flip(folder / "config.json")
    whole = inputs_module.READ.of

    def slowly(path, *rest):
        hashed.wait(60)
        return whole(path, *rest)

    monkeypatch.setattr(inputs_module.READ, "of", slowly)
    shown = []
    check = InputCheck({"model": expected})
    report = check.before(lambda done, total, note: shown.append(done))
    report(1, 3, "")
    hashed.set()
    wait(check._digests.values(), 60)
    with pytest.raises(Damaged, match=r"config\.json"):
        report(2, 3, "")
    assert shown == [1]


def test_a_large_file_that_is_removed_while_it_is_hashed_is_named(folder, monkeypatch):
    expected = recorded(folder)
    monkeypatch.setattr(inputs_module, "LARGE_BYTES", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BackgroundDigests, "_settle", lambda *args: None)
        check = InputCheck({"model": expected})
    (folder / "template.jinja").unlink()
    with pytest.raises(Damaged, match=r"template\.jinja was removed while a stage read it"):
        check.finish()


def test_an_error_of_a_thread_that_hashes_is_an_error_of_the_check(folder, monkeypatch):
    def fails(path, *rest):
        raise OSError("input/output error")

    expected = recorded(folder)
    monkeypatch.setattr(inputs_module, "LARGE_BYTES", 0)
    monkeypatch.setattr(inputs_module.READ, "of", fails)
    with pytest.raises(OSError, match="input/output error"):
        read(expected)


def test_a_damaged_file_of_the_hubs_cache_is_an_error_that_says_to_delete_it(tmp_path):
    blobs, snapshot = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / ("c" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    config, weights = b'{"a": 1}', b"weights"
    names = {
        "config.json": hashlib.sha1(b"blob 8\0" + config, usedforsecurity=False).hexdigest(),
        "model.safetensors": hashlib.sha256(weights).hexdigest(),
    }
    for (name, blob), data in zip(names.items(), (config, weights), strict=True):
        (blobs / blob).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    read(ExpectedInput.of_hub(snapshot))
    read(ExpectedInput.of_hub(snapshot / "config.json"))
    for name, blob in names.items():
        flip(blobs / blob)
        with pytest.raises(Damaged, match=rf"{name} .*Delete it from the hub's cache"):
            read(ExpectedInput.of_hub(snapshot))
        flip(blobs / blob)
    (snapshot / ".DS_Store").write_bytes(b"")
    read(ExpectedInput.of_hub(snapshot))
    (snapshot / "config.json").unlink()  # as `sed -i` edits it
    (snapshot / "config.json").write_bytes(config)
    with pytest.raises(Damaged, match=r"config\.json is no link to a blob"):
        read(ExpectedInput.of_hub(snapshot))
    (snapshot / "model.safetensors").unlink()
    read(ExpectedInput.of_hub(snapshot))  # a cache without links
