"""A local Ray that does not start is a lost cluster."""

import os
import time

import pytest
import ray

from ebbline.cluster.executors import ray_start
from ebbline.cluster.executors.ray_start import join
from ebbline.tasks.errors import ClusterLost


def test_a_local_cluster_that_does_not_start_is_lost_and_the_same_command_continues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(**settings: object) -> None:
        # as Ray does
        raise Exception("The node timed out during startup. It may be slow")  # noqa: TRY002

    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(ClusterLost, match=r"\(The node timed out during startup\); run the same"):
        join("local", {})


@pytest.mark.parametrize("gone", [False, None])
def test_a_head_that_ends_as_ray_starts_ends_the_driver_with_the_code_of_a_lost_cluster(
    gone: bool | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    heads = iter([None, True])
    monkeypatch.setattr(ray_start, "LOOK_S", 0.01)
    monkeypatch.setattr(ray_start, "_head_lives", lambda: next(heads, gone))
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(ray, "init", lambda **settings: time.sleep(0.1))
    join("local", {})
    assert codes[0] == 75 and "the same command" in capfd.readouterr().err


def test_an_address_is_joined_without_a_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(**settings: object) -> None:
        raise ConnectionError("no cluster there")

    monkeypatch.setattr(ray, "init", absent)
    with pytest.raises(ConnectionError):
        join("auto", {})
