"""What the mirror remembers of what it has shown."""

from pathlib import Path

from ebbline.analysis.wandb.memory import Memory


def kept(folder: Path, id: str, stamp: str) -> Path:
    """A run that was kept offline, remembered."""
    run = folder / "wandb" / f"offline-run-{stamp}-{id}"
    run.mkdir(parents=True)
    memory = Memory(folder, "offline")
    memory.remember(id, stamp, 3, run.name)
    return run


def test_what_waits_is_what_ended_and_has_no_mark_of_a_server(tmp_path: Path) -> None:
    first, second = kept(tmp_path, "a", "1"), kept(tmp_path, "b", "2")
    assert list(Memory(tmp_path, "offline").waiting()) == [first, second]
    (first / "run-a.wandb.synced").touch()
    assert list(Memory(tmp_path, "offline").waiting()) == [second]
    online = Memory(tmp_path, "online")
    assert (online.knows("a", "1"), online.rows("a")) == (True, 3)
    assert (online.knows("b", "2"), online.rows("b")) == (False, 0)


def test_what_wandb_clean_removed_counts_as_pushed(tmp_path: Path) -> None:
    kept(tmp_path, "a", "1").rmdir()
    assert Memory(tmp_path, "online").knows("a", "1")


def test_what_was_shown_online_since_is_not_pushed_any_more(tmp_path: Path) -> None:
    kept(tmp_path, "a", "1")
    Memory(tmp_path, "online").remember("a", "2", 5, "run-2-a")
    offline = Memory(tmp_path, "offline")
    assert list(offline.waiting()) == []
    assert offline.knows("a", "2") and offline.rows("a") == 5
