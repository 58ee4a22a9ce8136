"""W&B's alerts: what they tell, that each event is told once, and that none has what must not leave
the machine.
"""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ebbline.analysis.wandb.alerts import Alert, alerts_due
from ebbline.cluster.profile import AlertEvent, Profile
from ebbline.sweeps.drive.live import LIVE, End, Gpus, Live, PointCounts, SpentNow
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from tests.analysis.conftest import failed, result
from tests.wandb_server import WandbServer, serving

ALL: tuple[AlertEvent, ...] = ("point_failed", "budget", "ended")


def snapshot(ended: End | None, completed: int = 2, **budget: float) -> Live:
    return Live(
        driver="a",
        at=1.0,
        started=0.0,
        ended=ended,
        points=PointCounts(completed=completed, limit=4, in_flight=0),
        stages={},
        gpus=Gpus(total=1, busy=0),
        hosts=(),
        spent=SpentNow(gpu_hours=1.5),
        predicted=None,
        left_s=0.0,
        budget=budget,
        running=(),
        failures=(),
    )


def due(
    study: Study,
    results: list[Result],
    live: Live | None = None,
    sent: frozenset[str] = frozenset(),
    chosen: tuple[AlertEvent, ...] = ALL,
) -> list[Alert]:
    return list(alerts_due(study, results, live, chosen, sent, ["gpu-12"]))


def test_alerts_are_off_by_default_and_an_unknown_event_is_refused() -> None:
    assert Profile().wandb_alerts == ()
    with pytest.raises(ValueError, match="point_failed"):
        Profile.model_validate_json('{"wandb_alerts": ["everything"]}')


def test_points_that_fail_together_share_an_alert_and_each_is_told_once(study: Study) -> None:
    (first,) = due(study, [result(0), failed(1)])
    assert (first.title, first.level) == ("ebb point 1 failed", "WARN")
    assert "rank=64" in first.text and "nan at step 3" in first.text
    both = [result(0), failed(1), *(failed(number) for number in range(2, 10))]
    (later,) = due(study, both, sent=frozenset(first.events))
    assert later.title == "ebb 8 points failed" and "and 3 more" in later.text
    assert due(study, both, sent=frozenset([*first.events, *later.events])) == []


def test_a_reason_is_escaped_and_has_no_path_and_no_host(study: Study, tmp_path: Path) -> None:
    reason = f"<!channel> & <b>no</b> file {tmp_path}/x.json on gpu-12\nPoint 99: invented"
    (alert,) = due(study, [failed(1, reason)])
    assert "&lt;!channel&gt; &amp; &lt;b&gt;" in alert.text
    assert "\n" not in alert.text, "a reason cannot add a line of its own"
    assert str(tmp_path) not in alert.text and "gpu-12" not in alert.text


@pytest.mark.parametrize(
    ("end", "words", "level"),
    [
        ("budget", "was stopped by its budget", "WARN"),
        ("done", "has ended", "INFO"),
        ("gain", "has ended: the frontier grew too slowly", "INFO"),
        ("error", "has ended with an error", "ERROR"),
    ],
)
def test_the_end_of_a_study_is_told_once(study: Study, end: End, words: str, level: str) -> None:
    (alert,) = due(study, [result(0)], snapshot(end, gpu_hours=2.0))
    assert (alert.title, alert.level) == (f"ebb {words}", level)
    assert "2 points finished" in alert.text and "1.5 GPU-hours" in alert.text
    sent = frozenset(alert.events)
    assert due(study, [result(0)], snapshot(end, gpu_hours=2.0), sent) == [], "nothing new"
    assert due(study, [result(0)], snapshot(end, 3, gpu_hours=2.0), sent), "it went on"
    if end == "budget":
        assert due(study, [result(0)], snapshot(end, gpu_hours=4.0), sent), "it was raised"


def test_only_chosen_events_are_told(study: Study) -> None:
    points, live = [failed(1)], snapshot("budget")
    assert [len(due(study, points, live, chosen=(event,))) for event in ALL] == [1, 1, 0]
    assert due(study, points, snapshot("request"), chosen=("ended", "budget")) == []
    assert due(study, points, snapshot(None), chosen=("ended", "budget")) == []


def test_a_long_name_leaves_room_for_what_happened(study: Study) -> None:
    named = study.model_copy(update={"study": "x" * 100})
    (alert,) = due(named, [failed(1)])
    assert len(alert.title) < 64 and alert.title.endswith(" point 1 failed")


MIRROR = """
import pickle, sys
from pathlib import Path
from ebbline.analysis.wandb.runs import Mirror
from ebbline.cluster.profile import Profile
study, results = pickle.load(sys.stdin.buffer)
profile = Profile(wandb_alerts=("point_failed", "budget", "ended"))
mirror = Mirror(study, Path(sys.argv[1]), sys.argv[2], "0123456789abcdef", profile, 121.0, 120.0)
print(mirror.update(results, []).error)
mirror.close()
"""


def mirrored(
    study: Study, results: list[Result], folder: Path, server: WandbServer, mode: str
) -> list[dict[str, Any]]:
    """The alerts on the server after a mirror of its own process."""
    ran = subprocess.run(
        [sys.executable, "-c", MIRROR, str(folder), mode],
        input=pickle.dumps((study, results)),
        env=os.environ | server.environment(),
        capture_output=True,
        timeout=300,
    )
    assert ran.stdout.strip() == b"None", ran.stderr.decode()
    return [alert for run in server.runs.values() for alert in run.alerts]


@pytest.mark.process
@pytest.mark.usefixtures("no_wandb_login")
def test_a_server_gets_each_alert_once_also_from_the_next_mirror(
    study: Study, tmp_path: Path
) -> None:
    """Only here W&B's client sends alerts: four mirrors in turn, one of them offline."""
    points = [result(0), failed(1, f"no such file {tmp_path}/x.json")]
    (tmp_path / LIVE).write_text(snapshot("done").model_dump_json())
    with serving() as server:
        assert mirrored(study, points, tmp_path, server, "offline") == [], "they need a server"
        sent = mirrored(study, points, tmp_path, server, "online")
        assert [alert["title"] for alert in sent] == ["ebb point 1 failed", "ebb has ended"]
        assert [alert["severity"] for alert in sent] == ["WARN", "INFO"]
        assert str(tmp_path) not in json.dumps(sent) and server.unknown == []
        assert mirrored(study, points, tmp_path, server, "online") == sent
        more = [*points, replace(failed(2), reason="out of memory")]
        new = mirrored(study, more, tmp_path, server, "online")[len(sent) :]
        assert [alert["title"] for alert in new] == ["ebb point 2 failed"]
