"""Which rows and which training a seed draws."""

from pathlib import Path

import pytest

from ebbline.sweeps.drive.confirming import confirming_study
from ebbline.sweeps.study.changes import lasting
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point
from ebbline.sweeps.study.stages import StageGraph
from ebbline.tasks.errors import StudyError
from tests.sweeps.made import study as made_study

POINT = Point.of("7b", {"train.rank": 4, "apply.threshold": None})


def drawn(folder: Path, changes: dict[str, object]) -> list[tuple[int, int]]:
    """(seed of the training, seed of the data) of each seed, as the stages have them."""
    study = made_study(folder, changes)
    stages = StageGraph(study, Home(folder / "home")).stages_for(POINT)
    return [
        (
            int(stages[f"train[seed={seed}]"].spec.model_dump()["seed"]),
            int(stages[f"data[seed={seed}]"].spec.model_dump()["seed"]),
        )
        for seed in study.seeds
    ]


@pytest.mark.parametrize(
    ("subsets", "expected"),
    [
        (None, [(3, 3), (4, 4), (5, 5), (6, 6)]),
        (1, [(3, 0), (4, 0), (5, 0), (6, 0)]),
        (2, [(3, 0), (3, 1), (5, 0), (5, 1)]),
    ],
)
def test_the_training_and_the_rows_of_a_seed_are_separate_settings(
    tmp_path: Path, subsets: int | None, expected: list[tuple[int, int]]
) -> None:
    changes = {"seeds": [3, 4, 5, 6]} | ({} if subsets is None else {"subsets": subsets})
    assert drawn(tmp_path, changes) == expected


def test_seeds_that_do_not_complete_the_crossing_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="seeds must be a multiple of them, not 3"):
        made_study(tmp_path, {"seeds": [0, 1, 2], "subsets": 2})


@pytest.mark.parametrize("seeds", [[7, 8, 9], [7, 8, 9, 10]])
def test_crossed_seeds_cannot_confirm(tmp_path: Path, seeds: list[int]) -> None:
    """With `subsets: 3` the seeds 7, 8 and 9 would be one training, and count as three."""
    confirm = {"suites": {"refusal": {"language": "over_refusal.jsonl"}}, "seeds": seeds}
    crossed = len(seeds) if len(seeds) == 3 else 2
    own = list(range(crossed))
    with pytest.raises(StudyError, match=r"confirm: .*Leave out `subsets` or write `subsets: 1`"):
        made_study(tmp_path, {"seeds": own, "subsets": crossed, "confirm": confirm})


def test_fresh_seeds_train_anew_on_the_one_subset(tmp_path: Path) -> None:
    confirm = {"suites": {"refusal": {"language": "over_refusal.jsonl"}}, "seeds": [7, 8, 9]}
    own = made_study(tmp_path, {"seeds": [0, 1], "subsets": 1, "confirm": confirm})
    again = confirming_study(own, [POINT])
    assert [again.drawn_by(seed) for seed in again.seeds] == [(n, 0) for n in (0, 1, 7, 8, 9)]


def test_a_study_of_an_earlier_version_is_the_one_without_subsets(tmp_path: Path) -> None:
    assert "subsets" not in lasting(made_study(tmp_path).model_dump(mode="json"))
