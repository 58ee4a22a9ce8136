"""The charts of a study's run: controls in grey, importance, and tables that stay within bounds."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ebbline.analysis.wandb.charts import frontier_table, importance_table
from ebbline.analysis.wandb.pages import TABLE_ROWS, points_table, trainings_table
from ebbline.analysis.wandb.runs import CHARTS_EVERY, STEPS_A_POINT, Mirror
from ebbline.cluster.profile import Profile
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from tests.analysis.conftest import result
from tests.analysis.test_mirror import EBB, HOME_ID, records, shown


class Recorded:
    """A run that keeps what is logged, as W&B does: no step before the last one."""

    def __init__(self, step: int = 0) -> None:
        self.step, self.rows, self.summary = step, list[tuple[int, Mapping[str, Any]]](), {}
        self.notes = ""

    def log(self, values: Mapping[str, Any], step: int, commit: bool) -> None:
        assert step >= self.step and commit, "W&B would drop this row"
        self.rows.append((step, values))
        self.step = step + 1

    def define_metric(self, *_: object, **__: object) -> None: ...


def status(points: int, hours: float, **more: float) -> dict[str, float]:
    values = {"at_work": 1.0, "points_finished": points, "stages_queued": 3.0, **more}
    return {"hours": hours} | {f"status/{name}": float(value) for name, value in values.items()}


@pytest.fixture
def mirror(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    made = Mirror(study, tmp_path, "offline", HOME_ID)
    monkeypatch.setattr(made, "_chart", lambda: None)
    return made


def test_the_queue_and_the_gpus_are_rows_as_they_change_and_no_more(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now = Recorded(), [0.0]
    monkeypatch.setattr(mirror, "_open", lambda page: run)
    monkeypatch.setattr("ebbline.analysis.wandb.runs.time.monotonic", lambda: now[0])

    def at(seconds: float, state: dict[str, float], points: list[Result]) -> list[Any]:
        now[0], before = seconds, len(run.rows)
        mirror._show_study(points, state)
        return [values for _, values in run.rows[before:]]

    assert at(0, status(0, 0.0, gpus_busy=1), []) == [status(0, 0.0, gpus_busy=1)]
    assert at(5, status(0, 0.1, gpus_busy=1), []) == [], "only the time has passed"
    assert at(10, status(0, 0.2, gpus_busy=2), []) == [status(0, 0.2, gpus_busy=2)]
    assert at(90, status(0, 0.3, gpus_busy=2), []) == [status(0, 0.3, gpus_busy=2)]
    landed = at(95, status(1, 0.4, gpus_busy=1), [result(0)])
    assert [row.get("finished") for row in landed] == [1, None]
    assert landed[1]["status/gpus_busy"] == 1
    stopped = status(1, 0.5, gpus_busy=0) | {"status/at_work": 0.0}
    assert len(at(100, stopped, [result(0)])) == 1
    assert at(1000, stopped, [result(0)]) == []


def test_a_mirror_after_a_killed_one_shows_no_point_twice(
    study: Study, tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killed one has remembered nothing; the server has its rows."""
    first, points = Recorded(), [result(0, refusal=0.2), result(1, refusal=0.4)]
    monkeypatch.setattr(mirror, "_open", lambda page: first)
    mirror._show_study(points, status(2, 1.0))
    second = Recorded(first.step)
    later = Mirror(study, tmp_path, "online", HOME_ID)
    monkeypatch.setattr(later, "_open", lambda page: second)
    monkeypatch.setattr(later, "_chart", lambda: None)
    later._show_study([*points, result(2, refusal=0.6)], status(3, 1.1))
    rows = [*first.rows, *second.rows]
    assert [row["finished"] for _, row in rows if "finished" in row] == [1, 2, 3]
    assert [step for step, _ in rows] == sorted({step for step, _ in rows})
    assert rows[-1][0] > 3 * STEPS_A_POINT - 1


@pytest.mark.slow
def test_tables_stay_within_bounds_at_ten_thousand_points(study: Study) -> None:
    """By count: rows, columns, and how often the charts are drawn until then."""
    values, one = {"train.rank": 8, "data.size": 100, "apply.threshold": None}, result(0)
    many = [
        replace(
            one,
            number=number,
            point=replace(one.point, values=tuple((values | {"train.rank": number + 1}).items())),
            metrics=result(number, refusal=number % 200 / 200, task=number % 97 / 97).metrics,
        )
        for number in range(TABLE_ROWS + 2000)
    ]
    table = points_table(many, Profile(), study.objectives)
    assert len(table.rows) == TABLE_ROWS and len(table.columns) < 40
    assert len(trainings_table(many, [], Profile()).rows) <= TABLE_ROWS
    assert len(frontier_table(study, many).rows) <= 200
    assert len(importance_table(study, many).rows) <= 4 * len(study.objectives)
    assert math.log(TABLE_ROWS, CHARTS_EVERY) < 50, "times that the charts are drawn"


def test_importance_has_a_row_for_each_axis_and_objective(
    study: Study, results: list[Result]
) -> None:
    table = importance_table(study, results)
    assert table.columns == ["axis and objective", "share", "low", "high"]
    assert {row[0] for row in table.rows} >= {"rank: refusal rate", "threshold: task accuracy"}
    assert all(0.0 <= row[1] <= 1.0 for row in table.rows)


@pytest.mark.process
@pytest.mark.usefixtures("no_wandb_login")
def test_the_run_has_importance_and_the_picture_of_the_defences(
    study: Study, results: list[Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture is that of the report, so controls are grey there as here."""
    from matplotlib.figure import Figure

    asked: list[Any] = []

    def drawn(found: Any, controls: Any, names: Any) -> Figure:
        asked.append((controls, names))
        return Figure()

    monkeypatch.setattr("ebbline.analysis.wandb.charts.defences_figure", drawn)
    mirror = Mirror(study, tmp_path, "offline", HOME_ID)
    control: Any = object()
    assert mirror.update(results, [], controls=lambda: [control]).error is None
    mirror.close()
    assert asked[-1] == ([control], list(study.objectives))
    own = shown(tmp_path)[EBB]["summary"]
    assert own["defences"]["_type"] == "image-file"
    (folder,) = (tmp_path / "wandb").glob(f"offline-run-*-{EBB}")
    assert (folder / "files" / own["defences"]["path"]).exists()
    table = json.loads((folder / "files" / own["importance_table"]["path"]).read_text())
    assert table["data"]
    assert str(tmp_path) not in json.dumps(records(tmp_path, EBB))
