"""Data sizes at equal epochs and at equal steps, in one study."""

from pathlib import Path

from ebbline.analysis.report.answer import size_confound
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.space import space
from ebbline.sweeps.study.stages import StageGraph, stages_or_reason
from ebbline.sweeps.study.study import Study
from ebbline.tasks.specs import TrainSpec
from tests.sweeps.made import study as made_study

BOTH = {
    "train": {"epochs": 3, "global_batch": 16},
    "axes": {"data.size": [32, 128], "train.steps": [None, 6]},
}


def training(study: Study, folder: Path, size: int, steps: int | None) -> TrainSpec:
    point = Point.of("7b", {"data.size": size, "train.steps": steps})
    stages, reason = stages_or_reason(StageGraph(study, Home(folder / "home")), point)
    assert not reason
    spec = stages["train[seed=0]"].spec
    assert isinstance(spec, TrainSpec)
    return spec


def test_one_axis_has_the_epochs_of_the_study_and_a_number_of_steps(tmp_path: Path) -> None:
    study = made_study(tmp_path, BOTH)
    by_epochs, by_steps = (training(study, tmp_path, 128, steps) for steps in (None, 6))
    assert (by_epochs.epochs, by_epochs.length(128)) == (3.0, 24)
    assert by_steps.length(128) == training(study, tmp_path, 32, 6).length(32) == 6


def test_the_size_at_which_both_are_equal_is_trained_once(tmp_path: Path) -> None:
    study = made_study(tmp_path, BOTH)
    assert training(study, tmp_path, 32, None) == training(study, tmp_path, 32, 6)
    plain = made_study(tmp_path, {"train": BOTH["train"], "axes": {"data.size": [32]}})
    stages = StageGraph(plain, Home(tmp_path / "home")).stages_for(
        Point.of("7b", {"data.size": 32})
    )
    assert stages["train[seed=0]"].spec == training(study, tmp_path, 32, 6), "no key moves"


def test_the_report_says_which_of_the_two_is_equal(tmp_path: Path) -> None:
    study = made_study(tmp_path, BOTH)
    results = [Result(number, point, "done") for number, point in enumerate(space(study))]
    both = size_confound(study, results)
    assert "in both ways" in both and "at equal steps (6)" in both

    def with_steps(steps: int | None) -> str:
        own = [r for r in results if dict(r.point.values)["train.steps"] == steps]
        return size_confound(study, own)

    assert "compared at equal epochs" in with_steps(None)
    assert "compared at equal steps" in with_steps(6)
