"""What `ebbline pick` says, on made-up results: floors, confidence, refusals to export, and what
cannot be asked.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from typer.testing import CliRunner
from typer.testing import Result as Said

from ebbline.cli import app
from ebbline.sweeps.state.trials import SETTINGS, Trials
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study, SuiteEntry
from ebbline.sweeps.study.view import StudyView
from tests.analysis.conftest import OVER, REFUSAL, TASK, rate, result


@pytest.fixture
def made(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """`made(results, arguments...)` is what `pick` says of these results of the study of
    tests/analysis.
    """
    monkeypatch.setattr("ebbline.sweeps.study.view.load", lambda name: study)
    StudyView(study, Home(tmp_path / "home")).freeze()

    def said(results: Sequence[Result], *arguments: object) -> Said:
        monkeypatch.setattr("ebbline.commands.pick.collect", lambda view: list(results))
        return CliRunner().invoke(
            app, ["pick", "ebb", "--home", str(tmp_path / "home"), *map(str, arguments)]
        )

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
    assert (
        "small: point 1 (threshold=0.5 size=100 rank=8; 40% of modules projected), the one "
        "with most task accuracy" in said.output
    )
    assert (
        "refusal rate 93.0% (95% interval 88.6% to 95.8%, n = 200), 3.0 points over the "
        "floor of 90.0%" in said.output
    )
    assert (
        "confidence 72.1%, allowing for the pick among 3 points (90.7% for this point by itself)"
        in said.output
    )
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


def test_the_studys_own_floor_is_not_lowered_for_an_export(
    made: Callable[..., Said], tmp_path: Path
) -> None:
    low = ("--model", "small", "--floor", "refusal_rate=0.5")
    said = made(ROWS, *low)
    assert (
        said.exit_code == 0
        and "below the study's own refusal floor of 90.0%: it cannot be exported" in said.output
    )
    assert "write its adapter" not in said.output
    said = made(ROWS, *low, "--export", tmp_path / "out")
    assert said.exit_code == 1 and not (tmp_path / "out").exists()
    assert "the study's own refusal floor cannot be lowered for an export" in said.output
    assert "The nearest that does is point 1 (" in said.output


def test_a_point_whose_exported_seed_misses_the_floor_by_itself_is_not_exported(
    made: Callable[..., Said], tmp_path: Path
) -> None:
    spread = replace(
        ROWS[1], metrics={**ROWS[1].metrics, REFUSAL: rate(REFUSAL, 0.93, 200, seeds=(0.88, 0.98))}
    )
    export = ("--model", "small", "--point", 1, "--export", tmp_path / "out")
    several = [
        replace(
            spread,
            metrics={
                name: replace(m, seeds=m.seeds or (m.value, m.value))
                for name, m in spread.metrics.items()
            },
        )
    ]
    said = made(several, *export, "--seed", 0)
    assert (
        said.exit_code == 1
        and "but seed 0 does not hold them alone, and --export writes one seed's adapter"
        in said.output
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--maximise", "acc"), "--maximise acc: 'acc' names no metric; this study measures"),
        (("--floor", "refusal_rate"), "write it as NAME=SHARE, such as refusal_rate=0.95"),
        (("--floor", "refusal_rate=95%"), "could not convert string to float: '95%'"),
        (("--floor", "refusal_rate=95"), "a floor is a share from 0 to 1"),
        (
            ("--floor", "refusal_rate=0.9", "--floor", "refusal.refusal_rate=0.8"),
            "has a floor already",
        ),
        (("--model", "smal"), "did you mean 'small'?"),
        (("--point", "99"), "has no finished point 99"),
        (("--export", "out"), "choose its size with --model: medium, small"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_error(
    made: Callable[..., Said], arguments: tuple[str, ...], said: str
) -> None:
    found = made(ROWS, *arguments)
    assert found.exit_code == 1 and found.output.count("error:") == 1 and said in found.output


def test_over_refusal_is_bounded_from_above_and_never_maximised(
    made: Callable[..., Said], study: Study
) -> None:
    strict = replace(ROWS[1], metrics={**ROWS[1].metrics, OVER: rate(OVER, 0.4)})
    harmless = SuiteEntry.model_validate(
        {"prompts": {"language": "harmless"}, "measure": {"kind": "over_refusal"}}
    )
    object.__setattr__(study, "suites", {**study.suites, "harmless": harmless})
    found = made([ROWS[0], strict, ROWS[2]], "--model", "small", "--floor", "over_refusal_rate=0.1")
    assert (
        found.exit_code == 0
        and "small: point 2" in found.output
        and "over refusal rate (harmless) at most 10.0%" in found.output
    )
    assert "5.0 points under the ceiling of 10.0%" in found.output
    found = made(ROWS, "--maximise", "over_refusal_rate")
    assert found.exit_code == 1 and "nothing turns a metric round" in found.output


def test_a_file_with_another_floor_than_was_begun_is_told_apart(
    made: Callable[..., Said], study: Study
) -> None:
    assert json.loads(made(ROWS, "--json").stdout)["changed_since_it_was_begun"] == []
    object.__setattr__(study, "refusal_floor", 0.5)
    said = made(ROWS, "--model", "small")
    assert (
        said.exit_code == 0
        and "This file differs from the one that the study began with, so it cannot export:"
        in said.output
    )
    assert "refusal_floor" in said.output and "write its adapter" not in said.output
    (line,) = json.loads(made(ROWS, "--json").stdout)["changed_since_it_was_begun"]
    assert "0.9" in line and "0.5" in line


def test_nothing_is_exported_where_the_study_was_not_begun(
    made: Callable[..., Said], study: Study, tmp_path: Path
) -> None:
    # Another home of a shared database: the points are there, and what they were begun with is not.
    (tmp_path / "home" / "studies" / "ebb" / "study.json").unlink()
    (tmp_path / "home" / "cluster.yaml").write_text("storage: postgresql://me@127.0.0.1:9/none\n")
    object.__setattr__(study, "refusal_floor", 0.5)
    said = made(ROWS, "--model", "small", "--export", tmp_path / "out")
    assert (
        said.exit_code == 1
        and "export from the home that ran it, or run it here once. Nothing was exported"
        in " ".join(said.output.split())
    )
    assert not (tmp_path / "out").exists()


def test_nothing_is_exported_when_the_database_has_the_study_with_another_floor(
    made: Callable[..., Said], study: Study, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    Trials(study, home.storage("ebb"))
    marked = optuna.load_study(study_name="ebb", storage=home.storage("ebb").url)
    for mark, told in (
        (StudyView(study, home).begun_as(), "KeyError"),
        ("another", "the points of 'ebb' in the database have other settings"),
    ):
        marked.set_user_attr(SETTINGS, mark)
        said = made(ROWS, "--model", "small", "--export", tmp_path / "out")
        assert told in f"{type(said.exception).__name__} {' '.join(said.output.split())}", (
            "made-up rows have no adapter to write"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("pick", "ebb"),
        ("compare", "ebb", "ebb"),
        ("papers", "ebb"),
        ("export", "ebb", "--to", "out"),
    ],
)
def test_looking_at_a_study_in_a_mistyped_home_makes_nothing(
    made: Callable[..., Said], tmp_path: Path, command: tuple[str, ...]
) -> None:
    for home in (tmp_path / "typo", tmp_path / "there"):
        if home.name == "there":
            home.mkdir()
        found = CliRunner().invoke(app, [*command, "--home", str(home)])
        assert (
            found.exit_code == 1
            and found.output.count("error:") == 1
            and str(home) in found.output.replace("\n", "")
        )
        assert "ebb" in found.output and not list(tmp_path.glob("t*/*"))
    assert not (tmp_path / "typo").exists()


def test_a_point_that_was_named_by_hand_is_not_called_the_best(made: Callable[..., Said]) -> None:
    (picked,) = json.loads(made(ROWS, "--json", "--model", "small").stdout)["picks"]
    assert (picked["maximised"], picked["named_by_hand"]) == (TASK, False)
    (named,) = json.loads(made(ROWS, "--json", "--point", "2").stdout)["picks"]
    assert (named["maximised"], named["named_by_hand"]) == (None, True)
