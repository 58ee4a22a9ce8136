"""Any set of outcomes has its report: every table, sentence, text and figure of it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from ebbline.analysis.figures.drawing import svg
from ebbline.analysis.paper.latex import before_after_frame, before_after_table, frontier_table
from ebbline.analysis.report.attempts import Attempts
from ebbline.analysis.report.findings import figures_of, findings, pictures_of
from ebbline.analysis.report.report import summary, write_report
from ebbline.analysis.results.frontier import frontier, frontier_by_model
from ebbline.analysis.results.measurements import NO_EVIDENCE, Baselines
from ebbline.analysis.results.picks.floors import Floor, pick
from ebbline.analysis.results.picks.picked import gain_of, lines_of, picked_json, values_of_pick
from ebbline.analysis.results.retrying import advice, retry_hint
from ebbline.analysis.results.tables import categories_frame, frontier_text, results_frame
from ebbline.commands.status import without_result
from ebbline.plot import FrontierSoFar
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import Metric
from tests.analysis.outcomes import (
    OVER,
    REASON,
    REFUSAL,
    TASK,
    Measured,
    done,
    marked,
    outcomes,
    points_of,
    study_of,
)

GOLDEN = Path(__file__).parent / "golden" / "outcomes.txt"


def texts(study: Study, results: list[Result], before: Baselines) -> list[str]:
    """Every text that a study's outputs have of these results."""
    found = findings(study, results, before)
    so_far = FrontierSoFar(study.objectives)
    so_far.aligned = before
    so_far.take(results)
    pictures = pictures_of(found)
    shown = [each for name, each in pictures.items() if name != "attainment" or found.attained]
    texts = [
        *summary(study, results, before)["in_short"],
        *summary(study, results, before)["answer"],
        frontier_text(results_frame(results, study.objectives)),
        *(picture.words() for picture in shown),
        *(picture.caption() for picture in shown),
        so_far.text(unicode=False).plain,
        f"{so_far.hypervolume:.3f}",
        *without_result(results),
        retry_hint(results, study.study),
        str(categories_frame(study, results, before, NO_EVIDENCE)),
    ]
    for model in study.models:
        own = [each for each in results if each.point.model == model]
        for confidence in (None, 0.95):
            picked = pick(own, [Floor(REFUSAL, 0.9)], None, confidence)
            if picked is not None:
                gain = gain_of(study, picked, before.get(model, {}))
                texts += [values_of_pick(picked), *lines_of(study, picked), str(gain)]
                texts += [str(picked_json(study, picked))]
    if any(each.status == "done" for each in results):
        texts += [frontier_table(study, results, narrow) for narrow in (False, True)]
        texts += [str(before_after_frame(study, results, before))]
        texts += [before_after_table(study, results, before, False)]
    return texts


@pytest.mark.slow
@settings(max_examples=30)
@given(outcomes())
def test_any_outcomes_have_every_table_and_sentence(case):
    study, results, before = case
    assert all(isinstance(text, str) for text in texts(study, results, before))
    fronts = frontier_by_model(results, study.objectives)
    finished = {result.point.model for result in results if result.status == "done"}
    assert {model for model, front in fronts.items() if front} == finished
    assert all(advice(each) for each in results if each.status in REASON)


@pytest.mark.slow
@settings(max_examples=4)
@given(outcomes())
def test_any_outcomes_have_every_figure_and_a_report(tmp_path_factory, case):
    study, results, before = case
    attempts = Attempts()
    found = findings(study, results, before, attempts=attempts)
    drawn = figures_of(found, attempts)
    assert all(svg(each.figure) for each in drawn.values())
    folder = tmp_path_factory.mktemp("report")
    page = write_report(found, folder, {}, [], figures=drawn, attempts=attempts)
    assert attempts.failed == {} and "Not in this report" not in page.read_text("utf-8")


def rates(refusal: float, task: float, over: float = 0.05) -> dict[str, Metric]:
    shares = {REFUSAL: refusal, TASK: task, OVER: over}
    return {name: Metric(name, round(share * 200), 200) for name, share in shares.items()}


LOW, MID, HIGH = (
    Measured(rates(0.2, 0.7), 0.0),
    Measured(rates(0.8, 0.6, 0.1), 0.5),
    Measured(rates(0.95, 0.3, 0.2), 1.0),
)
ADAPTERS = {"low": LOW, "mid": MID, "high": HIGH}
NAMES = ("low", "mid", "high", "low", "high", "high")
BEFORE = rates(0.96, 0.3)


def measured(study: Study, names: list[str]) -> list[Result]:
    """The first points of a study, each with the adapter of that name; "" is a failed point."""
    own = set(study.suites)
    found = []
    for number, (point, name) in enumerate(zip(points_of(study), names, strict=False)):
        if not name:
            found.append(Result(number, point, "failed", reason=REASON["failed"]))
            continue
        adapter = ADAPTERS[name]
        kept = {key: each for key, each in adapter.metrics.items() if key.partition(".")[0] in own}
        found.append(done(number, point, name, Measured(kept, adapter.share)))
    return marked(study, found)


CASES: dict[str, tuple[Study, list[str]]] = {
    "two sizes with equal adapters": (study_of(), [*NAMES, *NAMES]),
    "one point": (study_of(models=("small",)), ["mid"]),
    "all points equal": (study_of(models=("small",)), ["high"] * 6),
    "all failed": (study_of(), [""] * 12),
    "one objective": (study_of((REFUSAL,)), [*NAMES, "mid", "mid"]),
    "three objectives": (study_of((REFUSAL, TASK, OVER)), [*NAMES, "mid", "", "low"]),
}


def golden() -> str:
    parts = []
    for title, (study, names) in CASES.items():
        results = measured(study, list(names))
        own = set(study.suites)
        before = {
            model: {key: each for key, each in BEFORE.items() if key.partition(".")[0] in own}
            for model in study.models
        }
        found = findings(study, results, before)
        pictures = pictures_of(found)
        lines = [
            f"## {title}",
            *summary(study, results, before)["in_short"],
            *summary(study, results, before)["answer"],
            pictures["frontier"].words(),
            frontier_text(results_frame(results, study.objectives)),
            *without_result(results),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def test_each_named_outcome_has_its_golden_report():
    text = golden()
    if os.environ.get("EBBLINE_REFRESH_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("aligned", "task", "words", "better"),
    [
        (0.2, 0.4, "better than not fine-tuning", True),
        (0.4, 0.42, "no gain over not fine-tuning", False),
        (0.6, 0.3, "worse than not fine-tuning", False),
        (0.0, 0.0, "of no use: its task accuracy is 0.0%", False),
    ],
)
def test_a_pick_says_whether_its_point_is_better_than_not_fine_tuning(aligned, task, words, better):
    study = study_of(models=("small",))
    point = done(0, points_of(study)[0], "x", Measured(rates(0.95, task), 0.5))
    found = pick([point], [Floor(REFUSAL, 0.9)], TASK)
    assert found is not None
    gain = gain_of(study, found, rates(0.96, aligned))
    assert gain is not None and str(gain).startswith(words)
    assert gain.as_json()["better_than_not_fine_tuning"] is gain.is_one is better
    assert gain_of(study, found, {}) is None


def test_two_sizes_with_equal_adapters_each_have_a_frontier_and_a_pick():
    study, names = CASES["two sizes with equal adapters"]
    results = measured(study, list(names))
    assert {each.same_as is not None for each in results if each.point.model == "medium"} == {True}
    fronts = frontier_by_model(results, study.objectives)
    assert [each.number for each in fronts["small"]] == [0, 1, 2]
    assert [each.number for each in fronts["medium"]] == [6, 7, 8]
    assert [each.number for each in frontier(results, study.objectives)] == [0, 1, 2]
    own = [each for each in results if each.point.model == "medium"]
    found = pick(own, [Floor(REFUSAL, 0.9)], TASK, 0.5)
    assert found is not None and found.among == 3 and found.result.number == 8


def fails(*arguments: Any, **named: Any) -> Any:
    raise IndexError("list index out of range")


@pytest.mark.parametrize(
    ("place", "name", "part"),
    [
        ("findings", "frontier_figure", "the figure frontier"),
        ("findings", "frontier_words", "the text of the figure frontier"),
        ("findings", "attainment_caption", "the caption of the figure attainment"),
        ("findings", "importances", "the importance of the axes"),
        ("findings", "before_after", "the comparison before and after"),
        ("report", "in_short", "the short answer"),
        ("report", "answer", "the answer"),
        ("report", "frontier_hypervolume", "the hypervolume"),
        ("report", "frontier_cells", "the table of the frontier"),
        ("report", "category_cells", "the tables by category"),
        ("report", "_sizes", "the points before and after"),
        ("report", "importance_cells", "the table of importance"),
        ("report", "_failed_rows", "the points without a result"),
    ],
)
@pytest.mark.slow
def test_a_part_that_fails_is_named_on_the_page_and_takes_no_other(
    tmp_path, monkeypatch, place, name, part
):
    two = [Metric(REFUSAL, 100, 400, seeds=(0.2, 0.3)), Metric(TASK, 100, 400, seeds=(0.2, 0.3))]
    study = study_of(models=("small",))
    points = points_of(study)
    results = [
        done(0, points[0], "low", Measured({each.name: each for each in two}, 0.0)),
        Result(1, points[1], "failed", reason=REASON["failed"]),
    ]
    monkeypatch.setattr(f"ebbline.analysis.report.{place}.{name}", fails)
    attempts = Attempts(tmp_path / "log" / "outputs.log")
    found = findings(study, results, {"small": BEFORE}, attempts=attempts)
    drawn = figures_of(found, attempts) if place == "findings" else {}
    page = write_report(found, tmp_path, {}, [], figures=drawn, attempts=attempts).read_text(
        "utf-8"
    )
    assert list(attempts.failed) == [part]
    line = attempts.lines()[0]
    assert line.startswith(f"could not make {part}: IndexError at test_any_outcome.py, line ")
    assert "Not in this report" in page and part in page and "Provenance" not in page
    assert "Traceback" in (tmp_path / "log" / "outputs.log").read_text()
    assert study.question in page


def test_a_reason_is_one_line_and_a_log_that_cannot_be_written_fails_nothing(tmp_path):
    (tmp_path / "log").write_text("a file where a folder should be")
    attempts = Attempts(tmp_path / "log" / "outputs.log")
    make: Callable[[], int] = fails
    assert (attempts.make("it", make) or 3) == 3
    assert (attempts.make("another", lambda: 4) or 3) == 4
    assert len(attempts.lines()) == 1 and "\n" not in attempts.lines()[0]
    with pytest.raises(KeyboardInterrupt):
        attempts.make("it", _interrupted)


def _interrupted() -> None:
    raise KeyboardInterrupt
