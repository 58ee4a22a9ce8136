"""The mirror's memory of what it has shown."""

from pathlib import Path

from ebbline.analysis.wandb.memory import Memory


def kept(folder: Path, id: str, stamp: str) -> Path:
    """Adds an offline run to the memory."""
    run = folder / "wandb" / f"offline-run-{stamp}-{id}"
    run.mkdir(parents=True)
    memory = Memory(folder, "offline")
    memory.remember(id, stamp, 3, run.name)
    return run


def test_runs_wait_that_have_ended_without_a_server_s_marker(tmp_path: Path) -> None:
    first, second = kept(tmp_path, "a", "1"), kept(tmp_path, "b", "2")
    assert list(Memory(tmp_path, "offline").waiting()) == [first, second]
    (first / "run-a.wandb.synced").touch()
    assert list(Memory(tmp_path, "offline").waiting()) == [second]
    online = Memory(tmp_path, "online")
    assert (online.was_shown("a", "1"), online.rows("a")) == (True, 3)
    assert (online.was_shown("b", "2"), online.rows("b")) == (False, 0)


def test_a_run_that_wandb_clean_removed_counts_as_pushed(tmp_path: Path) -> None:
    kept(tmp_path, "a", "1").rmdir()
    assert Memory(tmp_path, "online").was_shown("a", "1")


def test_a_run_that_was_shown_online_later_is_not_pushed(tmp_path: Path) -> None:
    kept(tmp_path, "a", "1")
    Memory(tmp_path, "online").remember("a", "2", 5, "run-2-a")
    offline = Memory(tmp_path, "offline")
    assert list(offline.waiting()) == []
    assert offline.was_shown("a", "2") and offline.rows("a") == 5
