"""What `ebbline pick` says, on made-up results: floors, confidence, refusals to export, and what cannot be asked."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner
from typer.testing import Result as Said

from ebbline.cli import app
from sweeps.points import Result
from sweeps.study import Study, SuiteEntry
from tests.analysis.conftest import OVER, REFUSAL, rate, result


@pytest.fixture
def made(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """`made(results, arguments...)` is what `pick` says of these results of the study of tests/analysis."""
    monkeypatch.setattr("sweeps.study_file.load", lambda name: study)

    def said(results: Sequence[Result], *arguments: object) -> Said:
        monkeypatch.setattr("ebbline.picking.collect", lambda study, home: list(results))
        return CliRunner().invoke(app, ["pick", "ebb", "--home", str(tmp_path / "home"), *map(str, arguments)])

    return said


ROWS = [
    result(0, refusal=0.6, task=0.9),
    result(1, refusal=0.93, task=0.7, share=0.4, threshold=0.5),
    result(2, refusal=0.98, task=0.6, share=0.8, threshold=0.7),
    result(3, model="medium", refusal=0.7, task=0.9, share=0.4, threshold=0.5),
]


def test_each_size_is_told_with_its_margin_and_its_confidence(made: Callable[..., Said]) -> None:
    said = made(ROWS)
    assert said.exit_code == 1, "medium has no point that holds the floor"
    assert "small: point 1 (threshold=0.5 size=100 rank=8; 40% of modules projected), the one with most task accuracy" in said.output
    assert "refusal rate 93.0% (95% interval 88.6% to 95.8%, n = 200), 3.0 points over the floor of 90.0%" in said.output
    assert "confidence 72.1%, allowing for the pick among 3 points (90.7% for this point by itself)" in said.output
    assert "medium: none of 1 different points holds that. The nearest is point 3" in said.output
    assert made(ROWS, "--model", "small").exit_code == 0


def test_json_has_what_the_terminal_says(made: Callable[..., Said]) -> None:
    said = json.loads(made(ROWS, "--json", "--floor", "refusal_rate=0.95").stdout)
    small = next(each for each in said["picks"] if each["model"] == "small")
    assert (small["number"], small["holds"], small["picked_among"]) == (2, True, 3)
    (floor,) = small["floors"]
    assert floor["margin"] == pytest.approx(0.03) and floor["side"] == "at least"
    assert floor["confidence"]["by_itself"] > floor["confidence"]["allowing_for_the_pick"]
    assert said["exported"] is None and "Clopper-Pearson" in said["method"]


def test_the_studys_own_floor_is_not_lowered_for_an_export(made: Callable[..., Said], tmp_path: Path) -> None:
    low = ("--model", "small", "--floor", "refusal_rate=0.5")
    said = made(ROWS, *low)
    assert said.exit_code == 0 and "below the study's own refusal floor of 90.0%: it cannot be exported" in said.output
    assert "write its adapter" not in said.output
    said = made(ROWS, *low, "--export", tmp_path / "out")
    assert said.exit_code == 1 and not (tmp_path / "out").exists()
    assert "the study's own refusal floor cannot be lowered for an export" in said.output
    assert "The nearest that does is point 1 (" in said.output


def test_a_point_whose_exported_seed_misses_the_floor_by_itself_is_not_exported(made: Callable[..., Said], tmp_path: Path) -> None:
    spread = replace(ROWS[1], metrics={**ROWS[1].metrics, REFUSAL: rate(REFUSAL, 0.93, 200, seeds=(0.88, 0.98))})
    export = ("--model", "small", "--point", 1, "--export", tmp_path / "out")
    several = [replace(spread, metrics={name: replace(m, seeds=m.seeds or (m.value, m.value)) for name, m in spread.metrics.items()})]
    said = made(several, *export, "--seed", 0)
    assert said.exit_code == 1 and "but seed 0 by itself does not, and one adapter is what would be shipped" in said.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--maximise", "acc"), "--maximise acc: 'acc' names no metric; this study measures"),
        (("--floor", "refusal_rate"), "write it as NAME=SHARE, such as refusal_rate=0.95"),
        (("--floor", "refusal_rate=95%"), "could not convert string to float: '95%'"),
        (("--floor", "refusal_rate=95"), "a floor is a share from 0 to 1"),
        (("--floor", "refusal_rate=0.9", "--floor", "refusal.refusal_rate=0.8"), "has a floor already"),
        (("--model", "smal"), "did you mean 'small'?"),
        (("--point", "99"), "has no finished point 99"),
        (("--export", "out"), "say of which size with --model: medium, small"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_error(made: Callable[..., Said], arguments: tuple[str, ...], said: str) -> None:
    found = made(ROWS, *arguments)
    assert found.exit_code == 1 and found.output.count("error:") == 1 and said in found.output


def test_over_refusal_is_bounded_from_above_and_never_maximised(made: Callable[..., Said], study: Study) -> None:
    strict = replace(ROWS[1], metrics={**ROWS[1].metrics, OVER: rate(OVER, 0.4)})
    harmless = SuiteEntry.model_validate({"prompts": {"language": "harmless"}, "measure": {"kind": "over_refusal"}})
    object.__setattr__(study, "suites", {**study.suites, "harmless": harmless})
    found = made([ROWS[0], strict, ROWS[2]], "--model", "small", "--floor", "over_refusal_rate=0.1")
    assert found.exit_code == 0 and "small: point 2" in found.output and "over refusal rate (harmless) at most 10.0%" in found.output
    assert "5.0 points under the ceiling of 10.0%" in found.output
    found = made(ROWS, "--maximise", "over_refusal_rate")
    assert found.exit_code == 1 and "nothing turns a metric round" in found.output
