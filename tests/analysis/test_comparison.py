"""Two studies side by side: which points are the same, what is paired, what is only set beside, and
whose frontier reaches further.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ebbline.analysis.figures.comparison import comparison_figure
from ebbline.analysis.figures.drawing import save_as
from ebbline.analysis.results.comparison import Asked, Side, beside, same_settings, volumes
from ebbline.analysis.results.floors import Floor
from ebbline.cli import app
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import Metric
from tests.analysis.conftest import REFUSAL, TASK, Held, rate, result, samples

ASKED: Asked = {
    suite: {"prompts": f"sha of {suite}", "max_new_tokens": 16} for suite in ("refusal", "task")
}
N = 200


def measured(
    number: int, refusal: int, task: int, **more: object
) -> tuple[Result, dict[tuple[int | str, str], object]]:
    """A point with so many of N prompts refused and so many tasks right, and its samples: the first
    ones.
    """
    found = result(number, refusal=refusal / N, task=task / N, **more)  # type: ignore[arg-type]
    kept = {
        (number, suite): {0: samples([index < count for index in range(N)])}
        for suite, count in (("refusal", refusal), ("task", task))
    }
    return found, kept


def side(
    label: str,
    study: Study,
    rows: list[tuple[Result, dict[tuple[int | str, str], object]]],
    asked: Asked = ASKED,
) -> Side:
    held = Held()
    for _, kept in rows:
        held.found.update(kept)  # type: ignore[arg-type]
    return Side(label, study, [found for found, _ in rows], held, asked)


@pytest.fixture
def pair(study: Study) -> tuple[Side, Side]:
    """Twice the same three points; in the second study the projected ones lose less of the task."""
    first = [
        measured(0, 60, 160),
        measured(1, 186, 100, share=0.5, threshold=0.5),
        measured(2, 196, 60, share=0.9, threshold=0.9),
    ]
    second = [
        measured(7, 60, 160),
        measured(8, 186, 130, share=0.5, threshold=0.5),
        measured(9, 196, 90, share=0.9, threshold=0.9),
    ]
    return side("one", study, first), side("two", study, second)


def test_operating_points_on_the_same_prompts_are_tested_in_pairs(pair: tuple[Side, Side]) -> None:
    found = beside(*pair, [Floor(REFUSAL, 0.9)], TASK)
    (size,) = found.sizes
    assert [each.result.number for each in size.picks] == [1, 8]
    task, refusal = size.at_picks[TASK], size.at_picks[REFUSAL]
    assert (
        task.paired is not None
        and task.paired.difference == pytest.approx(0.15)
        and task.move == "higher"
    )
    assert refusal.paired is not None and refusal.move == "not distinguishable"
    assert found.apart == {}


def test_other_prompts_are_flagged_and_their_intervals_decide(pair: tuple[Side, Side]) -> None:
    before, after = pair
    other = replace(
        after, asked={**ASKED, "task": {"prompts": "another sha", "max_new_tokens": 16}}
    )
    found = beside(before, other, [Floor(REFUSAL, 0.9)], TASK)
    assert found.apart == {"task": "other prompts"}
    (size,) = found.sizes
    assert size.at_picks[TASK].paired is None and size.at_picks[REFUSAL].paired is not None
    assert size.volumes is not None and not size.volumes.paired
    otherwise = replace(after, asked={**ASKED, "task": {**ASKED["task"], "max_new_tokens": 64}})
    assert beside(before, otherwise, [], TASK).apart == {
        "task": "the same prompts, measured otherwise: max_new_tokens 16 and 64"
    }
    missing = replace(after, asked={"refusal": ASKED["refusal"]})
    assert beside(before, missing, [], TASK).apart == {
        "task": "only one of the studies has measured it"
    }


def test_the_same_ids_with_other_prompts_are_never_paired(pair: tuple[Side, Side]) -> None:
    before, after = pair
    other = replace(
        after, asked={suite: {**asked, "prompts": "another sha"} for suite, asked in ASKED.items()}
    )
    (size,) = beside(before, other, [Floor(REFUSAL, 0.9)], TASK).sizes
    shared = [one for rows in size.at_shared.values() for one in rows]
    assert (
        size.at_picks
        and shared
        and {one.paired for one in (*size.at_picks.values(), *shared)} == {None}
    )


def test_points_with_the_same_settings_are_matched_over_the_axes_of_both(study: Study) -> None:
    # The second study has no axis for the rank: it is fixed, at 4.
    narrow = study.model_copy(
        update={
            "axes": {"apply.threshold": (None, 0.5)},
            "train": study.train.model_copy(update={"rank": 4}),
            "data": study.data,
        }
    )
    first = [(result(n, rank=rank, threshold=0.5, share=0.5), {}) for n, rank in enumerate((4, 16))]
    second = [(replace(result(5), point=Point.of("small", {"apply.threshold": 0.5})), {})]
    assert study.data.settings.size == 100
    pairs = list(same_settings(side("one", study, first), side("two", narrow, second), "small"))
    assert [(one.number, other.number) for one, other in pairs] == [(0, 5)]


def test_seeds_are_matched_by_their_order(study: Study) -> None:
    found = replace(
        result(0),
        metrics={REFUSAL: Metric(REFUSAL, 300, 2 * N, seeds=(0.75, 0.75)), TASK: rate(TASK, 0.5)},
    )
    kept = [samples([index < 150 for index in range(N)])] * 2
    sides = []
    for label, seeds in (("one", (0, 1)), ("two", (5, 6))):
        sides.append(
            Side(
                label,
                study,
                [found],
                Held({(0, "refusal"): dict(zip(seeds, kept, strict=True))}),
                ASKED,
            )
        )
    (size,) = beside(*sides, [Floor(REFUSAL, 0.5)], TASK).sizes
    assert size.at_picks[REFUSAL].paired is not None


def test_a_frontier_that_dominates_is_told_larger_with_an_interval(pair: tuple[Side, Side]) -> None:
    found = volumes(*pair, "small", (REFUSAL, TASK), {})
    assert found.paired and found.interval is not None
    low, high = found.interval
    assert 0 < low < found.difference < high
    alone = volumes(*pair, "small", (REFUSAL, TASK), {"task": "other prompts"})
    assert not alone.paired and alone.interval is not None
    assert np.ptp(alone.interval) > np.ptp(found.interval), "the same prompts tell apart more"
    assert volumes(*pair, "small", (REFUSAL, TASK), {}) == found, "the same bytes twice"


def test_a_study_against_itself_is_not_distinguishable(pair: tuple[Side, Side]) -> None:
    before, _ = pair
    (size,) = beside(before, replace(before, label="again"), [Floor(REFUSAL, 0.9)], TASK).sizes
    assert size.volumes is not None and size.volumes.interval == (0.0, 0.0)
    assert {one.move for one in size.at_picks.values()} == {"not distinguishable"} and len(
        size.shared
    ) == 3


def test_without_samples_there_is_no_interval_of_the_volume(study: Study) -> None:
    bare = [(result(0), {}), (result(1, refusal=0.95, share=0.5), {})]
    found = volumes(
        side("one", study, bare), side("two", study, bare), "small", (REFUSAL, TASK), {}
    )
    assert found.interval is None and found.difference == 0


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_the_picture_is_the_same_to_the_byte(
    pair: tuple[Side, Side], tmp_path: Path, suffix: str
) -> None:
    drawn = [
        save_as(comparison_figure(pair, (REFUSAL, TASK)), tmp_path / f"{n}{suffix}").read_bytes()
        for n in (1, 2)
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) > 2000


@pytest.fixture
def compare(pair: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setattr("ebbline.commands.compare._sides", lambda names, homes: list(pair))

    def said(*arguments: object, code: int = 0) -> str:
        found = CliRunner().invoke(app, ["compare", "one", "two", *map(str, arguments)])
        assert found.exit_code == code, found.output
        return found.output

    return said


def test_the_command_says_what_is_comparable_and_what_came_out(
    compare: Callable[..., str], tmp_path: Path
) -> None:
    said = compare("--to", tmp_path / "page.html")
    assert "two against one" in said and "their settings are the same" in said
    assert "3 points have the same settings in both" in said and "so larger)" in said
    assert (
        "task accuracy is higher at 2, not distinguishable at 1 of 3 points (paired, "
        "differences +0.0 to +15.0 points)" in said
    )
    assert "Operating points, refusal rate at least 90.0%" in said
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "data:image/svg+xml;base64" in page and "higher (paired, +15.0 points [" in page
    assert "http://" not in page and "https://" not in page
    found = json.loads(compare("--json"))
    (size,) = found["comparisons"][0]["sizes"]
    assert size["at_operating_points"][TASK]["paired"]["difference"] == pytest.approx(0.15)
    assert size["same_settings"] == [[0, 7], [1, 8], [2, 9]]


def test_a_floor_that_nothing_holds_compares_the_nearest_and_says_so(
    compare: Callable[..., str],
) -> None:
    said = compare("--floor", "refusal_rate=0.99")
    assert "the nearest point: short by 1.0 points of refusal rate at least 99.0%" in said


def test_what_cannot_be_compared_is_one_clear_error(
    compare: Callable[..., str], tmp_path: Path
) -> None:
    assert "a page ends in .html, a picture in .png, .pdf, .svg" in compare(
        "--to", tmp_path / "page.docx", code=1
    )
    homes = ("--home", "a", "--home", "b", "--home", "c")
    assert "3 homes for 2 studies: give --home once, or once for each study" in compare(
        *homes, code=1
    )
    alone = CliRunner().invoke(app, ["compare", "one"])
    assert alone.exit_code == 1 and "a comparison needs two studies or more" in alone.output
