"""Files that `write_whole` writes are whole or absent."""

import errno
import os
from pathlib import Path

import pytest

from ebbline.tasks import files
from ebbline.tasks.files import is_full, is_unfinished, write_whole


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("old")

    def fails(fresh: Path) -> None:
        fresh.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fails)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [
        ("results.csv", "old")
    ]


def test_two_writers_of_one_file_have_different_temporary_names_with_its_suffix(
    tmp_path: Path,
) -> None:
    path, seen = tmp_path / "new" / "curve.csv", list[Path]()

    def write(fresh: Path) -> None:
        seen.append(fresh)
        fresh.write_text("inner")

    def write_twice(fresh: Path) -> None:
        write(fresh)
        write_whole(path, write)

    write_whole(path, write_twice)
    assert len(set(seen)) == 2 and {(fresh.parent, fresh.suffix) for fresh in seen} == {
        (path.parent, ".csv")
    }
    assert all(is_unfinished(f"folder/{fresh.name}") for fresh in seen)
    assert not is_unfinished(".hidden/curve.csv") and list(path.parent.iterdir()) == [path]


def test_a_durable_file_is_on_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "record.json", list[str]()

    def to_disk(fresh: Path) -> None:
        assert not path.exists()
        synced.append(fresh.read_text())

    monkeypatch.setattr(files, "to_disk", to_disk)
    write_whole(path, lambda fresh: fresh.write_text("record"), durable=True)
    assert synced == ["record"] and path.read_text() == "record"


def test_what_a_killed_writer_left_is_removed_by_the_next_write_when_it_is_old(
    tmp_path: Path,
) -> None:
    names = (".table.0123abcd.csv", ".table.89abcdef.csv", ".other.0123abcd.csv", ".table.mine.csv")
    for name in names:
        (tmp_path / name).write_text("half")
    for name in names[:1] + names[2:]:
        os.utime(tmp_path / name, (0, 0))
    write_whole(tmp_path / "table.csv", lambda fresh: fresh.write_text("whole"))
    assert {path.name for path in tmp_path.iterdir()} == {"table.csv", *names[1:]}


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "a library's own words"), True),
        (OSError(errno.EDQUOT, "a library's own words"), True),
        (RuntimeError("cannot write: Disk quota exceeded (os error 122)"), True),
        (RuntimeError("cannot write: No space left on device"), True),
        (OSError(errno.EIO, "Input/output error"), False),
    ],
)
def test_a_full_disk_and_a_full_quota_are_known_by_number_or_by_words(
    error: Exception, full: bool
) -> None:
    assert is_full(error) == full
