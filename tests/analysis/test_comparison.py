"""Two studies compared: points with equal settings, paired and unpaired tests, and hypervolumes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ebbline.analysis.figures.comparison import comparison_figure
from ebbline.analysis.figures.drawing import save_as
from ebbline.analysis.results.comparison import (
    Side,
    SuiteSettings,
    same_settings,
    study_comparison,
    volumes,
)
from ebbline.analysis.results.picks.floors import Floor
from ebbline.cli import app
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import Metric
from tests.analysis.conftest import REFUSAL, TASK, Held, rate, result, samples

SETTINGS: SuiteSettings = {
    suite: {"prompts": f"sha of {suite}", "max_new_tokens": 16} for suite in ("refusal", "task")
}
N = 200


def measured(
    number: int, refusal: int, task: int, **more: object
) -> tuple[Result, dict[tuple[int | str, str], object]]:
    """A point with `refusal` of N refusals and `task` of N correct tasks, and its samples."""
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
    suite_settings: SuiteSettings = SETTINGS,
) -> Side:
    held = Held()
    for _, kept in rows:
        held.found.update(kept)  # type: ignore[arg-type]
    return Side(label, study, [found for found, _ in rows], held, suite_settings)


@pytest.fixture
def pair(study: Study) -> tuple[Side, Side]:
    """Three points in two studies; the projected ones of the second keep more task accuracy."""
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
    found = study_comparison(*pair, [Floor(REFUSAL, 0.9)], TASK)
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


def test_frontiers_of_unequal_numbers_of_points_get_no_verdict(
    pair: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = replace(pair[0], results=pair[0].results[:2]), pair[1]
    (size,) = study_comparison(*fewer, [Floor(REFUSAL, 0.9)], TASK).sizes
    assert size.volumes is not None and size.volumes.points == (2, 3)
    assert not size.volumes.comparable
    monkeypatch.setattr("ebbline.commands.compare._sides", lambda names, homes: list(fewer))
    printed = CliRunner().invoke(app, ["compare", "one", "two"]).output
    assert "no verdict on the hypervolume: the frontiers come from 2 and 3" in printed
    assert "so larger" not in printed


def test_other_prompts_are_flagged_and_their_intervals_decide(pair: tuple[Side, Side]) -> None:
    before, after = pair
    other = replace(
        after, suite_settings={**SETTINGS, "task": {"prompts": "another sha", "max_new_tokens": 16}}
    )
    found = study_comparison(before, other, [Floor(REFUSAL, 0.9)], TASK)
    assert found.apart == {"task": "different prompts"}
    (size,) = found.sizes
    assert size.at_picks[TASK].paired is None and size.at_picks[REFUSAL].paired is not None
    assert size.volumes is not None and not size.volumes.paired
    otherwise = replace(
        after, suite_settings={**SETTINGS, "task": {**SETTINGS["task"], "max_new_tokens": 64}}
    )
    assert study_comparison(before, otherwise, [], TASK).apart == {
        "task": "the same prompts, measured with other settings: max_new_tokens 16 and 64"
    }
    missing = replace(after, suite_settings={"refusal": SETTINGS["refusal"]})
    assert study_comparison(before, missing, [], TASK).apart == {
        "task": "only one of the studies has measured it"
    }


def test_the_same_ids_with_other_prompts_are_never_paired(pair: tuple[Side, Side]) -> None:
    before, after = pair
    other = replace(
        after,
        suite_settings={
            suite: {**settings, "prompts": "another sha"} for suite, settings in SETTINGS.items()
        },
    )
    (size,) = study_comparison(before, other, [Floor(REFUSAL, 0.9)], TASK).sizes
    shared = [one for rows in size.at_shared.values() for one in rows]
    assert (
        size.at_picks
        and shared
        and {one.paired for one in (*size.at_picks.values(), *shared)} == {None}
    )


def test_points_with_the_same_settings_are_matched_over_the_axes_of_both(study: Study) -> None:
    # The second study has no axis for the rank; its rank is fixed at 4.
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


@pytest.mark.parametrize(
    ("seeds", "is_paired", "move"),
    [((0, 1, 2), True, "higher"), ((2, 0, 1), True, "higher"), ((5, 6, 7), False, "not")],
)
def test_only_equal_seeds_are_pairs(
    study: Study, seeds: tuple[int, ...], is_paired: bool, move: str
) -> None:
    """Every seed of the second study has 20 refusals more than the same seed of the first. Other
    seeds are no pairs: their spread hides the difference.
    """
    counts = {0: 80, 1: 100, 2: 120}

    def one(label: str, of: dict[int, int]) -> Side:
        values = tuple(count / N for count in of.values())
        metric = Metric(REFUSAL, sum(of.values()), len(of) * N, seeds=values)
        found = replace(result(0), metrics={REFUSAL: metric, TASK: rate(TASK, 0.5)})
        kept = {seed: samples([i < count for i in range(N)]) for seed, count in of.items()}
        return Side(label, study, [found], Held({(0, "refusal"): kept}), SETTINGS)

    after = {seed: counts[seed if is_paired else seed - 5] + 20 for seed in seeds}
    sides = one("one", counts), one("two", after)
    (size,) = study_comparison(*sides, [Floor(REFUSAL, 0.3)], TASK).sizes
    found = size.at_picks[REFUSAL]
    assert found.paired is not None and found.paired.p_value < 0.05, "prompts are pairs in any case"
    assert found.between is not None and found.between.paired == is_paired
    assert found.move.startswith(move)


def test_a_frontier_that_dominates_has_an_interval_above_zero(pair: tuple[Side, Side]) -> None:
    found = volumes(*pair, "small", (REFUSAL, TASK), {})
    assert found.paired and found.interval is not None
    low, high = found.interval
    assert 0 < low < found.difference < high
    alone = volumes(*pair, "small", (REFUSAL, TASK), {"task": "different prompts"})
    assert not alone.paired and alone.interval is not None
    assert np.ptp(alone.interval) > np.ptp(found.interval), (
        "paired prompts give a narrower interval"
    )
    assert volumes(*pair, "small", (REFUSAL, TASK), {}) == found, "the bootstrap has a fixed seed"


@pytest.mark.parametrize(
    ("spread", "seeds", "move"),
    [(0.01, (5, 6, 7), "larger"), (0.3, (5, 6, 7), None), (0.3, (0, 1, 2), "larger")],
)
def test_a_frontier_is_larger_only_if_its_training_seeds_agree(
    pair: tuple[Side, Side], spread: float, seeds: tuple[int, ...], move: str | None
) -> None:
    """The bootstrap over prompts alone would call all three larger. Equal seeds are pairs, whose
    common spread cancels.
    """

    def retrained(one: Side, own: tuple[int, ...]) -> Side:
        def over(metric: Metric) -> Metric:
            return replace(metric, seeds=tuple(metric.value + spread * by for by in (-1, 0, 1)))

        return replace(
            one,
            study=one.study.model_copy(update={"seeds": own}),
            results=[
                replace(each, metrics={name: over(found) for name, found in each.metrics.items()})
                for each in one.results
            ],
        )

    sides = retrained(pair[0], (0, 1, 2)), retrained(pair[1], seeds)
    found = volumes(*sides, "small", (REFUSAL, TASK), {})
    assert found.interval is not None and found.interval[0] > 0
    assert found.over_seeds is not None and found.over_seeds.paired == (seeds == (0, 1, 2))
    assert found.move == move
    assert volumes(*pair, "small", (REFUSAL, TASK), {}).move == "larger", "of these adapters"


def test_undecided_samples_widen_the_interval_of_the_volume(pair: tuple[Side, Side]) -> None:
    def some_undecided(one: Side) -> Side:
        return replace(
            one,
            evidence=Held(
                {
                    place: {
                        seed: [
                            replace(sample, verdict="undecided", success=False)
                            if index % 4 == 0
                            else sample
                            for index, sample in enumerate(samples)
                        ]
                        for seed, samples in seeds.items()
                    }
                    for place, seeds in one.evidence.found.items()
                }
            ),
        )

    found = volumes(*pair, "small", (REFUSAL, TASK), {})
    for sides in ((some_undecided(pair[0]), pair[1]), (pair[0], some_undecided(pair[1]))):
        wider = volumes(*sides, "small", (REFUSAL, TASK), {})
        assert wider.interval is not None and found.interval is not None
        assert wider.interval[0] < found.interval[0] or wider.interval[1] > found.interval[1]
        assert np.ptp(wider.interval) > np.ptp(found.interval)


def test_a_study_against_itself_is_not_distinguishable(pair: tuple[Side, Side]) -> None:
    before, _ = pair
    (size,) = study_comparison(
        before, replace(before, label="copy"), [Floor(REFUSAL, 0.9)], TASK
    ).sizes
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
def test_the_figure_is_reproducible_to_the_byte(
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

    def invoke(*arguments: object, code: int = 0) -> str:
        found = CliRunner().invoke(app, ["compare", "one", "two", *map(str, arguments)])
        assert found.exit_code == code, found.output
        return found.output

    return invoke


def test_the_command_prints_what_is_comparable_and_the_comparisons(
    compare: Callable[..., str], tmp_path: Path
) -> None:
    printed = compare("--to", tmp_path / "page.html")
    assert "two against one" in printed and "their settings are the same" in printed
    assert (
        "3 points have the same settings in both" in printed
        and "so larger with these adapters)" in printed
    )
    assert (
        "task accuracy is higher at 2, not distinguishable at 1 of 3 points (paired, "
        "differences +0.0 to +15.0 points)" in printed
    )
    assert "Operating points, refusal rate at least 90.0%" in printed
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "data:image/svg+xml;base64" in page and "higher (paired, +15.0 points [" in page
    assert "http://" not in page and "https://" not in page
    found = json.loads(compare("--json"))
    (size,) = found["comparisons"][0]["sizes"]
    assert size["at_operating_points"][TASK]["paired"]["difference"] == pytest.approx(0.15)
    assert size["same_settings"] == [[0, 7], [1, 8], [2, 9]]


def test_a_floor_that_no_point_holds_compares_the_nearest_points_and_reports_it(
    compare: Callable[..., str],
) -> None:
    printed = compare("--floor", "refusal_rate=0.99")
    assert "the nearest point: short by 1.0 points of refusal rate at least 99.0%" in printed


def test_invalid_arguments_are_one_clear_error(compare: Callable[..., str], tmp_path: Path) -> None:
    assert "a page ends in .html, a picture in .png, .pdf, .svg" in compare(
        "--to", tmp_path / "page.docx", code=1
    )
    homes = ("--home", "a", "--home", "b", "--home", "c")
    assert "3 homes for 2 studies: give --home once, or once for each study" in compare(
        *homes, code=1
    )
    alone = CliRunner().invoke(app, ["compare", "one"])
    assert alone.exit_code == 1 and "a comparison needs two studies or more" in alone.output
