"""The output of `ebbline pick` on synthetic results: floors, confidence, rejected exports, and
invalid arguments.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from typer.testing import CliRunner
from typer.testing import Result as CliResult

from ebbline.cli import app
from ebbline.sweeps.state.trials import SETTINGS, Trials
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Confirmed, Result
from ebbline.sweeps.study.policies import Confirm
from ebbline.sweeps.study.study import Study, SuiteEntry
from ebbline.sweeps.study.view import StudyView
from tests.analysis.conftest import OVER, REFUSAL, TASK, Held, rate, result, samples, share


@pytest.fixture
def pick(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CliResult]:
    """`pick(results, arguments...)` runs the command on these results of conftest's study."""
    monkeypatch.setattr("ebbline.sweeps.study.view.load", lambda name: study)
    monkeypatch.setattr("ebbline.commands.pick.StoredEvidence", lambda view: Held())
    StudyView(study, Home(tmp_path / "home")).freeze()

    def invoke(results: Sequence[Result], *arguments: object) -> CliResult:
        monkeypatch.setattr("ebbline.commands.pick.collect", lambda view: list(results))
        return CliRunner().invoke(
            app, ["pick", "ebb", "--home", str(tmp_path / "home"), *map(str, arguments)]
        )

    return invoke


ROWS = [
    result(0, refusal=0.6, task=0.9),
    result(1, refusal=0.93, task=0.7, share=0.4, threshold=0.5),
    result(2, refusal=0.98, task=0.6, share=0.8, threshold=0.7),
    result(3, model="medium", refusal=0.7, task=0.9, share=0.4, threshold=0.5),
]


def test_each_model_has_its_pick_with_margin_and_confidence(pick: Callable[..., CliResult]) -> None:
    found = pick(ROWS)
    assert found.exit_code == 1, "medium has no point that holds the floor"
    assert (
        "small: point 1 (threshold=0.5 size=100 rank=8; 40% of modules projected), the one "
        "with most task accuracy" in found.output
    )
    assert (
        "refusal rate 93.0% (95% interval 88.6% to 95.8%, n = 200), 3.0 points over the "
        "floor of 90.0%" in found.output
    )
    assert (
        "confidence 72.1%, allowing for the pick among 3 points (90.7% for this point by itself)"
        in found.output
    )
    assert "medium: none of 1 different points holds that. The nearest is point 3" in found.output
    assert "of 3 different points; a candidate, not confirmed" in found.output
    assert pick(ROWS, "--model", "small").exit_code == 1, "a candidate does not hold"
    assert pick(ROWS, "--model", "small", "--accept-unsure").exit_code == 0


def test_json_has_the_values_of_the_text(pick: Callable[..., CliResult]) -> None:
    found = json.loads(pick(ROWS, "--json", "--floor", "refusal_rate=0.95").stdout)
    small = next(each for each in found["picks"] if each["model"] == "small")
    assert (small["number"], small["meets"], small["picked_among"]) == (2, True, 3)
    assert (small["holds"], small["standing"], small["confirmed"]) == (False, "candidate", None)
    (floor,) = small["floors"]
    assert floor["margin"] == pytest.approx(0.03) and floor["side"] == "at least"
    assert floor["confidence"]["by_itself"] > floor["confidence"]["allowing_for_the_pick"]
    assert found["exported"] is None and "Clopper-Pearson" in found["method"]


def test_the_studys_own_floor_is_not_lowered_for_an_export(
    pick: Callable[..., CliResult], tmp_path: Path
) -> None:
    low = ("--model", "small", "--floor", "refusal_rate=0.5", "--accept-unsure")
    found = pick(ROWS, *low)
    assert (
        found.exit_code == 0
        and "below the study's own refusal floor of 90.0%: it cannot be exported" in found.output
    )
    assert "write its adapter" not in found.output
    found = pick(ROWS, *low, "--export", tmp_path / "out")
    assert found.exit_code == 1 and not (tmp_path / "out").exists()
    assert "the study's own refusal floor cannot be lowered for an export" in found.output
    assert "The nearest that does is point 1 (" in found.output


def test_a_point_whose_exported_seed_misses_the_floor_by_itself_is_not_exported(
    pick: Callable[..., CliResult], tmp_path: Path
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
    found = pick(several, *export, "--seed", 0)
    assert (
        found.exit_code == 1
        and "but seed 0 does not hold them alone, and --export writes one seed's adapter"
        in found.output
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_invalid_arguments_are_one_clear_error(
    pick: Callable[..., CliResult], arguments: tuple[str, ...], message: str
) -> None:
    found = pick(ROWS, *arguments)
    assert found.exit_code == 1 and found.output.count("error:") == 1 and message in found.output


def test_over_refusal_is_bounded_from_above_and_never_maximised(
    pick: Callable[..., CliResult], study: Study
) -> None:
    strict = replace(ROWS[1], metrics={**ROWS[1].metrics, OVER: rate(OVER, 0.4)})
    harmless = SuiteEntry.model_validate(
        {"prompts": {"language": "harmless"}, "measure": {"kind": "over_refusal"}}
    )
    object.__setattr__(study, "suites", {**study.suites, "harmless": harmless})
    found = pick(
        [ROWS[0], strict, ROWS[2]],
        "--model",
        "small",
        "--floor",
        "over_refusal_rate=0.1",
        "--accept-unsure",
    )
    assert (
        found.exit_code == 0
        and "small: point 2" in found.output
        and "over refusal rate (harmless) at most 10.0%" in found.output
    )
    assert "5.0 points under the ceiling of 10.0%" in found.output
    found = pick(ROWS, "--maximise", "over_refusal_rate")
    assert found.exit_code == 1 and "cannot be maximised" in found.output


def test_a_file_with_another_floor_than_the_study_began_with_is_reported(
    pick: Callable[..., CliResult], study: Study
) -> None:
    assert json.loads(pick(ROWS, "--json").stdout)["changed_since_it_was_begun"] == []
    object.__setattr__(study, "refusal_floor", 0.5)
    found = pick(ROWS, "--model", "small", "--accept-unsure")
    assert (
        found.exit_code == 0
        and "This file differs from the one that the study began with, so it cannot export:"
        in found.output
    )
    assert "refusal_floor" in found.output and "write its adapter" not in found.output
    (line,) = json.loads(pick(ROWS, "--json").stdout)["changed_since_it_was_begun"]
    assert "0.9" in line and "0.5" in line


def test_nothing_is_exported_from_a_home_where_the_study_did_not_begin(
    pick: Callable[..., CliResult], study: Study, tmp_path: Path
) -> None:
    # Another home of a shared database has the points, but not the settings they began with.
    (tmp_path / "home" / "studies" / "ebb" / "study.json").unlink()
    (tmp_path / "home" / "cluster.yaml").write_text("storage: postgresql://me@127.0.0.1:9/none\n")
    object.__setattr__(study, "refusal_floor", 0.5)
    found = pick(ROWS, "--model", "small", "--export", tmp_path / "out")
    assert (
        found.exit_code == 1
        and "export from the home that ran it, or run it here once. Nothing was exported"
        in " ".join(found.output.split())
    )
    assert not (tmp_path / "out").exists()


def test_nothing_is_exported_when_the_database_has_the_study_with_another_floor(
    pick: Callable[..., CliResult], study: Study, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    Trials(study, home.database("ebb"))
    marked = optuna.load_study(study_name="ebb", storage=home.database("ebb").url)
    for mark, message in (
        (StudyView(study, home).begun_as(), "KeyError"),
        ("another", "the points of 'ebb' in the database have other settings"),
    ):
        marked.set_user_attr(SETTINGS, mark)
        found = pick(ROWS, "--model", "small", "--accept-unsure", "--export", tmp_path / "out")
        assert message in f"{type(found.exception).__name__} {' '.join(found.output.split())}", (
            "synthetic rows have no adapter to write"
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
def test_a_command_on_a_mistyped_home_creates_no_file(
    pick: Callable[..., CliResult], tmp_path: Path, command: tuple[str, ...]
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


def test_a_candidate_is_exported_only_when_the_user_accepts_that(
    pick: Callable[..., CliResult], tmp_path: Path
) -> None:
    found = pick(ROWS, "--model", "small", "--export", tmp_path / "out")
    assert found.exit_code == 1 and not (tmp_path / "out").exists()
    text = " ".join(found.output.split())
    assert "is not confirmed to hold refusal rate at least 90.0%" in text
    assert "`ebbline confirm ebb` measures it on other prompts" in text
    assert "--accept-unsure exports it as it is" in text


def test_an_adapter_that_is_confirmed_to_miss_is_not_exported_for_that_reason(
    pick: Callable[..., CliResult], tmp_path: Path
) -> None:
    adapters = {0: {REFUSAL: rate(REFUSAL, 0.5)}}
    refuted = replace(ROWS[1], confirmed=Confirmed("ebb.confirm", 0, 1, adapters))
    options = ("--model", "small", "--point", 1, "--accept-unsure", "--export", tmp_path / "out")
    found = pick([refuted], *options)
    assert found.exit_code == 1 and not (tmp_path / "out").exists()
    text = " ".join(found.output.split())
    assert "is confirmed not to hold refusal rate at least 90.0%: seed 0 has refusal rate" in text
    assert "50.0%" in text and "holds them alone" not in text


def test_the_hint_confirms_the_point_that_was_picked(
    pick: Callable[..., CliResult], study: Study
) -> None:
    confirm = Confirm.model_validate({"suites": {"refusal": {"language": "other"}}})
    object.__setattr__(study, "confirm", confirm)
    found = pick(ROWS, "--model", "small", "--floor", "refusal_rate=0.95")
    assert "confirm it: ebbline confirm ebb --point 2" in found.output


def test_a_point_without_a_gain_over_not_fine_tuning_is_not_ranked_first(
    pick: Callable[..., CliResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {"small": {TASK: rate(TASK, 0.7), REFUSAL: rate(REFUSAL, 0.99)}}
    monkeypatch.setattr("ebbline.commands.pick.baselines", lambda view: before)
    found = pick(ROWS, "--model", "small")
    assert found.exit_code == 1
    assert "small: no point that meets the floors gains over not fine-tuning." in found.output
    assert "no gain over not fine-tuning: before it, the model's task accuracy" in found.output


def test_a_category_below_the_floor_is_named_and_can_be_required(
    pick: Callable[..., CliResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One category refuses 72% under a mean of 93%."""
    answers = {
        1: [*samples([True] * 150), *samples([index < 36 for index in range(50)], ["weapons"])],
        2: share(196, 200, ["theft", "weapons"]),
    }
    held = Held(
        {
            (number, "refusal"): {
                0: [replace(sample, id=str(place)) for place, sample in enumerate(found)]
            }
            for number, found in answers.items()
        }
    )
    monkeypatch.setattr("ebbline.commands.pick.StoredEvidence", lambda view: held)
    found = pick(ROWS, "--model", "small")
    assert "small: point 1" in found.output
    assert "small, point 1: a floor is about all prompts together" in found.output
    assert "category weapons: 72.0% (95% interval" in found.output
    assert "18.0 points below refusal rate at least 90.0%" in found.output
    assert "small: point 2" in pick(ROWS, "--model", "small", "--each-category").output


def test_a_point_named_by_hand_is_not_reported_as_the_best(pick: Callable[..., CliResult]) -> None:
    (picked,) = json.loads(pick(ROWS, "--json", "--model", "small").stdout)["picks"]
    assert (picked["maximised"], picked["named_by_hand"]) == (TASK, False)
    (named,) = json.loads(pick(ROWS, "--json", "--point", "2").stdout)["picks"]
    assert (named["maximised"], named["named_by_hand"]) == (None, True)
