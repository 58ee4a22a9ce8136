"""How the hypervolume grew: in the order in which points landed, at what time and cost."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ebbline.analysis.results.growth import growth
from tests.analysis.conftest import REFUSAL, TASK, failed, result

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


def test_points_land_when_the_last_of_their_stages_ended_and_runs_add_up(tmp_path: Path) -> None:
    folder = ledger(
        tmp_path,
        {"driver": "one", "s": 0.0},
        *job("j0", [KEYS[0]], 0.0, 3600.0),
        {"driver": "two", "s": 0.0},
        *job("j0", [KEYS[1], KEYS[2]], 0.0, 1800.0, gpus=2),
    )
    late = replace(
        result(0, refusal=0.5, task=0.5),
        keys={"train[seed=0]": KEYS[0], "refusal[seed=0]": KEYS[2]},
    )
    early = replace(result(1, refusal=0.4, task=0.4), keys={"train[seed=0]": KEYS[0]})
    grown = list(growth([late, early, failed(2)], [REFUSAL, TASK], folder))
    assert [each.number for each in grown] == [1, 0]
    assert [each.hours for each in grown] == pytest.approx([1.0, 1.5])
    assert [each.cost.gpu_s for each in grown] == [{"A100": 3600.0}, {"A100": 7200.0}]
    assert [each.hypervolume for each in grown] == pytest.approx([0.16, 0.25])


def test_a_dominated_point_adds_nothing_and_one_beside_the_frontier_its_part(
    tmp_path: Path,
) -> None:
    results = [
        result(0, refusal=0.5, task=0.5),
        result(1, refusal=0.2, task=0.5),
        result(2, refusal=0.2, task=0.8),
    ]
    assert [
        each.hypervolume for each in growth(results, [REFUSAL, TASK], tmp_path)
    ] == pytest.approx([0.25, 0.25, 0.25 + 0.2 * 0.3])


def test_what_was_found_in_the_store_lands_at_once_and_costs_nothing(tmp_path: Path) -> None:
    (found,) = growth([result(0)], [REFUSAL, TASK], tmp_path)
    assert (found.hours, found.cost.gpu_hours) == (0.0, 0.0)
