"""A W&B server that is busy, broken or cut off: nothing is lost, nothing appears twice, and the
mirror says what it could not show.

Each test runs a mirror in a process of its own against the server of tests/wandb_server.py.
"""

from pathlib import Path

import pytest

from ebbline.analysis.wandb.memory import Memory
from ebbline.sweeps.study.study import Study
from tests.analysis.test_mirror import EBB, _online
from tests.wandb_server import Fault, WandbServer, serving

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_wandb_login")]


def growth_of(server: WandbServer) -> list[float]:
    return [row["hypervolume"] for row in server.runs[EBB].history.values() if "hypervolume" in row]


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([429, 429], id="429 with Retry-After"),
        pytest.param([503, 502, 500], id="a burst of 5xx"),
        pytest.param(["dropped", "dropped"], id="dropped connections"),
        pytest.param(["slow body"], id="a slow body"),
    ],
)
def test_a_fault_that_passes_loses_nothing_and_shows_nothing_twice(
    study: Study, tmp_path: Path, faults: list[Fault]
) -> None:
    with serving() as server:
        server.faults.extend(faults)
        found = _online(study, tmp_path, server.server_address[1], call_s=120.0)
    assert found == (2, 0, "None")
    assert server.faulty == faults
    assert growth_of(server) == pytest.approx([0.25, 0.45])
    assert {run.exit_code for run in server.runs.values()} == {0}
    assert list(Memory(tmp_path, "online").waiting()) == []


def test_an_expired_key_is_reported_and_the_next_login_shows_everything(
    study: Study, tmp_path: Path
) -> None:
    with serving() as server:
        server.faults.extend([401] * 50)
        shown, left, error = _online(study, tmp_path, server.server_address[1], call_s=30.0)
        assert (shown, left) == (0, 2) and "401" in error
        assert "0" * 40 not in error, "no key in a message"
        server.faults.clear()
        assert _online(study, tmp_path, server.server_address[1], call_s=120.0) == (2, 0, "None")
        assert growth_of(server) == pytest.approx([0.25, 0.45])
