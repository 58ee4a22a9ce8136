"""Costs of points: alone, by share and by addition, and identities that hold for any sharing. The
growth of the hypervolume: in the order in which points completed, with their time and cost.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.analysis.results.costs import (
    PAPERS,
    cost_columns,
    cost_label,
    cost_rows,
    cost_summary,
    growth,
    point_costs,
    prediction_rows,
    study_cost,
)
from ebbline.cluster.executors.executor import Capacity, Host, Needs
from ebbline.cluster.profile import GpuType, Profile
from ebbline.cluster.schedule.costs import (
    Cost,
    Origin,
    cost_of,
    expected_cost,
    gpu_types,
    total,
)
from ebbline.sweeps.forecast.prediction import Prediction
from ebbline.sweeps.state.spending import Spent
from ebbline.sweeps.study.points import Point, Result
from tests.analysis.conftest import REFUSAL, TASK, failed
from tests.analysis.conftest import result as measured

PRICES = Profile(gpus={"A100": GpuType(usd_per_hour=1.5), "other": GpuType(usd_per_hour=0.5)})
HOUR = 3600.0


def result(number: int, costs: dict[str, Cost]) -> Result:
    return Result(number, Point.of("7b", {"train.rank": number + 1}), "done", costs=costs)


def a100(hours: float, kind: str = "generate") -> Cost:
    return Cost({"A100": hours * HOUR}, Origin(kind, 1, 1, "cuda", "A100", "node-1"))


SHARED = [
    result(0, {"train": a100(2, "train"), "a": a100(1)}),
    result(1, {"train": a100(2, "train"), "b": a100(1)}),
    result(2, {}),
]


def test_a_shared_training_is_paid_once_and_divided_among_its_points():
    points = point_costs(SHARED)
    assert {
        n: tuple(round(part.gpu_hours, 9) for part in (p.alone, p.share, p.added))
        for n, p in points.items()
    } == {
        0: (3.0, 2.0, 3.0),
        1: (3.0, 2.0, 1.0),
    }
    cost = study_cost(
        SHARED, {"aligned": a100(0.5)}, Spent(7200.0, a100(5.0), frozenset({"train", "a", "b"}))
    )
    found = {name: round(part.gpu_hours, 9) for name, part in vars(cost).items()}
    assert found == {
        "points": 4.0,
        "alone": 6.0,
        "saved": 2.0,
        "stages": 4.5,
        "spent": 5.0,
        "lost": 1.0,
    }


@given(
    st.lists(st.dictionaries(st.integers(0, 12), st.none(), max_size=8), min_size=1, max_size=8),
    st.data(),
)
def test_shares_and_additions_add_up_to_what_the_points_cost_together(used, data):
    price = {
        key: Cost(
            {data.draw(st.sampled_from(["A100", "H100", None])): data.draw(st.floats(0, 1e5))}
        )
        for key in range(13)
    }
    results = [
        result(number, {str(key): price[key] for key in keys}) for number, keys in enumerate(used)
    ]
    points = point_costs(results).values()
    together = study_cost(results, {}, Spent())
    for part in ("share", "added"):
        assert total(getattr(point, part) for point in points).gpu_hours == pytest.approx(
            together.points.gpu_hours
        )
    for point in points:
        assert -1e-9 <= point.share.gpu_hours <= point.alone.gpu_hours + 1e-9
    assert together.saved.gpu_hours == pytest.approx(
        together.alone.gpu_hours - together.points.gpu_hours
    )
    assert together.saved.gpu_hours >= -1e-9


def test_dollars_are_none_without_a_price_and_never_a_part_of_the_sum():
    mixed = a100(1) + Cost({"H100": HOUR})
    assert mixed.usd(Profile()) is None and mixed.usd(PRICES) == pytest.approx(2.0)
    partial = Profile(gpus={"A100": GpuType(usd_per_hour=1.5)})
    assert mixed.usd(partial) is None and mixed.unpriced(partial) == ["H100"]
    assert (
        cost_label(mixed, partial) == "2 GPU-hours"
        and cost_label(mixed, PRICES) == "2 GPU-hours, $2.00"
    )
    assert cost_label(Cost({None: HOUR}), Profile()) == "1 logical GPU-hours"


def test_a_record_has_the_cost_of_its_stage():
    assert cost_of({"seconds": 30.0, "gpus": 4, "gpu_type": "A100"}) == Cost({"A100": 120.0})
    assert cost_of({"seconds": 30.0, "gpus": 0, "gpu_type": None}) == Cost()


def test_an_expected_cost_is_of_the_gpu_type_in_the_labels_or_else_of_the_dearest():
    assert expected_cost(Needs(2, {"ray.io/accelerator-type": "L4"}), 10.0, PRICES) == Cost(
        {"L4": 20.0}
    )
    for labels in ({}, {"ray.io/accelerator-type": "in(L4,A100)"}, {"zone": "a"}):
        assert expected_cost(Needs(1, labels), 10.0, PRICES) == Cost({"A100": 10.0})
    hosts = (Host("a", 8, 1, {"ray.io/accelerator-type": "A100"}), Host("b", 8, 1))
    assert gpu_types({"a": 3, "b": 1}, Capacity(hosts)) == {"A100": 3, None: 1}


def test_the_table_has_a_cost_where_something_ran_and_dollars_where_there_is_a_price():
    columns = cost_columns(SHARED, PRICES)
    assert columns["gpu_hours"] == [3.0, 3.0, None] and columns["cost_usd_share"] == [
        3.0,
        3.0,
        None,
    ]
    assert cost_columns(SHARED, Profile())["cost_usd"] == [None] * 3


def test_the_report_has_a_points_price_beside_the_papers_and_reports_missing_prices():
    spent = Spent(HOUR, a100(4.5), frozenset({"train", "a", "b"}))
    rows = cost_rows(SHARED, {}, spent, PRICES)
    assert str(rows["a point alone, if nothing were shared"]).startswith(
        "3 GPU-hours, $4.50 (the middle of 2;"
    )
    assert rows["for comparison"] == PAPERS and rows["saved by sharing"] == "2 GPU-hours, $3.00"
    assert rows["generate, 2 stages"] == "2 GPU-hours, $3.00"
    assert (
        rows["of that, on lost and failed attempts and on starting processes"]
        == "0.5 GPU-hours, $0.75"
    )
    bare = cost_rows(SHARED, {}, spent, Profile())
    assert "$" not in str(
        bare["saved by sharing"]
    ) and "none in cluster.yaml, so GPU-hours only" in str(bare["prices"])
    summary = cost_summary(study_cost(SHARED, {}, spent), spent, Profile())
    assert summary["points"] == {"gpu_hours": 4.0, "usd": None}


def test_the_report_compares_the_latest_completed_run_with_its_prediction():
    spent = [Spent(driving_s) for driving_s in (0.0, 10.0, 500.0)]
    stopped, ended, killed = (
        Prediction(100.0, Cost({None: 3600.0}), 12, 1.0, before) for before in spent
    )
    assert prediction_rows([stopped], Profile()) == {}
    ended = replace(ended, after=Spent(210.0, Cost({None: 1800.0})))
    (text,) = prediction_rows([stopped, ended, killed], Profile()).values()
    assert "wall time 50% too short, GPU-hours 100% too long" in str(text)


KEYS = ["a" * 64, "b" * 64, "c" * 64]


def ledger(folder: Path, *lines: dict[str, Any]) -> Path:
    (folder / "spending.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def job(
    name: str, keys: list[str], start_s: float, end_s: float, gpus: int = 1
) -> list[dict[str, Any]]:
    start = {
        "start": name,
        "gpus": [["A100", gpus]],
        "hosts": {"h": gpus},
        "keys": keys,
        "s": start_s,
    }
    return [start, {"end": name, "s": end_s}]


def test_points_complete_when_their_last_stage_ends_and_runs_add_up(tmp_path: Path) -> None:
    folder = ledger(
        tmp_path,
        {"driver": "one", "s": 0.0},
        *job("j0", [KEYS[0]], 0.0, 3600.0),
        {"driver": "two", "s": 0.0},
        *job("j0", [KEYS[1], KEYS[2]], 0.0, 1800.0, gpus=2),
    )
    late = replace(
        measured(0, refusal=0.5, task=0.5),
        keys={"train[seed=0]": KEYS[0], "refusal[seed=0]": KEYS[2]},
    )
    early = replace(measured(1, refusal=0.4, task=0.4), keys={"train[seed=0]": KEYS[0]})
    grown = list(growth([late, early, failed(2)], [REFUSAL, TASK], folder))
    assert [each.number for each in grown] == [1, 0]
    assert [each.hours for each in grown] == pytest.approx([1.0, 1.5])
    assert [each.cost.gpu_s for each in grown] == [{"A100": 3600.0}, {"A100": 7200.0}]
    assert [each.hypervolume for each in grown] == pytest.approx([0.16, 0.25])


def test_a_dominated_point_adds_no_volume_and_a_new_frontier_point_adds_its_part(
    tmp_path: Path,
) -> None:
    results = [
        measured(0, refusal=0.5, task=0.5),
        measured(1, refusal=0.2, task=0.5),
        measured(2, refusal=0.2, task=0.8),
    ]
    assert [
        each.hypervolume for each in growth(results, [REFUSAL, TASK], tmp_path)
    ] == pytest.approx([0.25, 0.25, 0.25 + 0.2 * 0.3])


def test_a_point_from_the_store_completes_at_zero_hours_and_costs_nothing(tmp_path: Path) -> None:
    (found,) = growth([measured(0)], [REFUSAL, TASK], tmp_path)
    assert (found.hours, found.cost.gpu_hours) == (0.0, 0.0)


def test_growth_is_corrected_for_noise_as_the_stopping_rule_is(tmp_path: Path) -> None:
    """Points whose true hypervolume is 0.36: the frontier of their values goes on to grow past it,
    the corrected one does not.
    """
    rng = np.random.default_rng(0)
    rates = rng.binomial(200, 0.6, size=(80, 2)) / 200
    results = [
        measured(number, refusal=float(refusal), task=float(task))
        for number, (refusal, task) in enumerate(rates)
    ]
    grown = list(growth(results, [REFUSAL, TASK], tmp_path))
    assert 0.44 < grown[39].hypervolume < grown[-1].hypervolume
    assert [grown[at].corrected for at in (39, -1)] == pytest.approx([0.36, 0.36], abs=0.02)
