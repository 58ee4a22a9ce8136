"""The importance of axes as a table and a figure: a reason where there is no number, and cautions
where there are few points.
"""

from ebbline.analysis.figures.importance import (
    importance_cells,
    importance_figure,
    importance_notes,
)
from ebbline.sweeps.search.importance import MODEL, AxisShare, Importance
from tests.analysis.conftest import REFUSAL, TASK

SHARES = {"apply.threshold": AxisShare(0.5, (0.25, 0.75)), MODEL: AxisShare(0.1, (0.0, 0.3))}
FOUND = {
    REFUSAL: Importance(40, SHARES, {"train.rank": "one value"}, uneven=("apply.threshold",)),
    TASK: Importance(
        40, {}, {"train.rank": "one value"}, reason="all 40 points have the same value"
    ),
}


def test_each_axis_has_its_share_with_an_interval_or_the_reason_that_it_has_none() -> None:
    cells = importance_cells(FOUND)
    assert cells["axis"].tolist() == ["threshold", "model", "rank"]
    assert cells["refusal rate %"].tolist() == [
        "50.0 [25.0, 75.0]",
        "10.0 [0.0, 30.0]",
        "one value",
    ]
    assert cells["task accuracy %"].tolist() == ["none", "none", "one value"]


def test_cautions_name_the_objective_and_the_axes() -> None:
    objective, few, uneven = importance_notes(FOUND)
    assert objective == "No numbers for task accuracy: all 40 points have the same value."
    assert few.startswith("40 points are few for this")
    assert "fewer values than others of: threshold" in uneven
    assert importance_notes({REFUSAL: Importance(80, SHARES)}) == []


def test_only_objectives_with_numbers_have_a_panel() -> None:
    figure = importance_figure(FOUND)
    assert figure is not None and [axes.get_title(loc="left") for axes in figure.axes] == [
        "refusal rate"
    ]
    assert importance_figure({TASK: FOUND[TASK]}) is None


def test_a_note_says_that_the_numbers_are_those_of_a_sample() -> None:
    notes = importance_notes({REFUSAL: Importance(500, SHARES, finished=9_000)})
    assert notes == [
        "From 500 of the 9000 finished points, drawn at random with a fixed seed; the intervals "
        "are those of 500 points."
    ]
