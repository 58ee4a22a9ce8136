"""What a report says of defences and controls: numbers decide the words, and gaps are named."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ebbline.analysis.figures.defences import defences_figure, defences_words
from ebbline.analysis.report.defence_words import (
    against_cells,
    control_sentences,
    norm_note,
    rival_sentences,
)
from ebbline.analysis.report.findings import Findings, findings
from ebbline.analysis.report.report import summary, write_report
from ebbline.analysis.results.controls.means import control_notes
from ebbline.analysis.results.defended.advantage import Advantage
from ebbline.analysis.results.defended.beside import Against, against_controls, against_defences
from ebbline.analysis.results.defended.modules import ModuleEffect
from ebbline.sweeps.study.study import Study
from tests.analysis.conftest import REFUSAL, TASK, Held
from tests.analysis.test_defended import Made, control, controls_for


@pytest.fixture
def made() -> Made:
    return Made(Held())


def with_defences(study: Study, **changes: object) -> Study:
    """The study with three defences in place of its threshold."""
    axes = {name: axis for name, axis in study.axes.items() if name != "apply.threshold"}
    content = {
        **study.model_dump(mode="python"),
        "axes": axes,
        "defences": {
            "safe_lora": {"threshold": (0.3, 0.5)},
            "scale": {"factor": (0.2, 0.5)},
            "drop": {"threshold": (0.3, 0.5)},
        },
        **changes,
    }
    return Study.model_validate(content)


def test_a_control_that_does_as_much_is_the_first_thing_that_is_said(made, study: Study):
    results = [made.result(n, [96 - n, 95], [40 + 5 * n, 50], knob=n / 10) for n in range(1, 4)]
    equal = [
        control(each.of.partner, "shrink_matched", None, each.result)
        for each in controls_for(made, results, 0)[::2]
    ]
    (text,) = control_sentences(study, against_controls(study, results, equal, made.held))
    assert re.fullmatch(
        r"At equal task accuracy Safe LoRA keeps not measurably more or fewer refusals than "
        r"shrinking to the same length \(\+0\.0 points, 95% interval -\d\.\d to \+\d\.\d; 6 "
        r"adapters of each\), for the measured adapters; at its operating point refusal rate is "
        r"not distinguishable \(\+0\.0 points, 95% interval -\d\.\d to \+\d\.\d\) and task "
        r"accuracy is not distinguishable \(\+0\.0 points, .*\)\.",
        text,
    )


def test_a_defence_that_does_more_than_random_modules_says_by_how_much_over_the_draws(
    made, study: Study
):
    results = [made.result(n, [96 - n, 95], [40 + 5 * n, 50], knob=n / 10) for n in range(1, 4)]
    against = against_controls(study, results, controls_for(made, results, 20), made.held)
    (text,) = control_sentences(study, against)
    assert "keeps more refusals than random modules (+" in text
    assert "; 2 draws, +" in text
    assert "refusal rate is higher (+20.5 points, 95% interval +" in text


def test_several_models_are_counted(made, study: Study):
    pairs = []
    for model, less in (("small", 20), ("medium", 0)):
        results = [made.result(n, [96 - n, 95], [40 + 5 * n, 50], knob=n / 10) for n in (1, 2)]
        found = against_controls(study, results, controls_for(made, results, less), made.held)
        pairs += [replace(each, model=model) for each in found]
    (text,) = control_sentences(study, pairs)
    assert text.startswith(
        "At equal task accuracy Safe LoRA keeps more refusals than random modules at 1 and fewer "
        "at 0 of 2 models, for the measured adapters; at its operating points refusal rate is "
        "higher at 1, not distinguishable at 1 of 2 models"
    )
    cells = against_cells(study, pairs)
    assert list(cells["model"]) == ["small", "medium"]
    assert cells["refusals at equal task accuracy"][0].startswith("+")


def test_two_defences_are_compared_in_a_sentence_of_their_own(made, study: Study):
    results = [
        made.result(0, [90], [50]),
        made.result(1, [60], [50], "scale"),
    ]
    (text,) = rival_sentences(study, list(against_defences(study, results, made.held)))
    assert text.startswith(
        "At equal task accuracy Safe LoRA keeps more refusals than scale (+30.0 points"
    )


@pytest.mark.parametrize("controls", [True, False])
def test_what_has_no_control_is_named(made, study: Study, controls):
    results = [
        made.result(1, [90], [50]),
        made.result(2, [60], [50], "scale"),
        made.result(3, [60], [50], "drop"),
    ]
    notes = " ".join(control_notes(with_defences(study, controls=controls), results, []))
    assert "scale has no control" in notes
    assert ("drop has no control of equal norm" in notes) is controls
    assert ("No control of Safe LoRA was run" in notes) is not controls
    assert list(control_notes(study, results, [])) == []  # its answer says it once


def test_where_norms_are_known_the_report_says_that_c_is_no_projector(study: Study):
    effects = {
        "small, Safe LoRA, point 1": {"a": ModuleEffect(0.3, 0.03, 0.9)},
        "small, scale, point 2": {"a": ModuleEffect(1.0, 0.5, 1.0)},
    }
    assert "keeps 0.030 to 0.030 of its update's length" in norm_note(study, effects)
    assert norm_note(study, {}) == ""
    safe_lora = {"projector": "exact", "threshold": (0.3, 0.5)}
    exact = with_defences(study, defences={"safe_lora": safe_lora, "scale": {"factor": (0.5,)}})
    assert norm_note(exact, effects) == "", "the exact one is a projector"


def test_a_comparison_without_an_interval_is_no_finding(study: Study):
    known = Advantage(0.0, (-0.1, 0.1), 3, 1, 3, (0.0,))
    unknown = Advantage(0.313, None, 4, 1, 1, (0.313,))

    def said(*found: Advantage) -> str:
        against = [
            Against(f"m{n}", "safe_lora", "scale", False, each) for n, each in enumerate(found)
        ]
        (text,) = rival_sentences(study, against)
        return text

    assert "not measurably" not in said(unknown) and "its interval is not known" in said(unknown)
    assert "at all 1 models that could be tested" in said(known, unknown)
    assert "no model could be tested" in said(unknown, unknown)


def test_the_figure_has_a_panel_for_each_model_and_grey_controls(made):
    results = [
        made.result(1, [90], [50]),
        made.result(2, [60], [60], "scale"),
    ]
    controls = [control(results[0], "shrink_matched", None, made.result(101, [80], [50]))]
    figure = defences_figure(results, controls, (REFUSAL, TASK))
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "small"
    greys = [line for line in axes.lines if line.get_color() == "0.55" and line.get_marker() == "x"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in greys] == [(0.5, 0.8)]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "Safe LoRA and its frontier",
        "scale and its frontier",
        "control: shrink matched",
    ]
    words = defences_words(results, controls, (REFUSAL, TASK))
    assert "scale, 1 adapters" in words and "shrink matched beside 1 settings" in words
    assert defences_figure(results[:1], [], (REFUSAL, TASK)) is None
    assert defences_figure(results, controls, (REFUSAL,)) is None


def test_the_report_begins_with_the_controls_and_names_every_gap(
    made, study: Study, tmp_path: Path
):
    study = with_defences(study)
    results = [made.result(n, [96 - n, 95], [40 + 5 * n, 50], knob=n / 10) for n in range(1, 4)]
    results.append(made.result(4, [60, 60], [60, 60], "scale"))
    controls = controls_for(made, results[:3], 20)
    found = Findings(
        study,
        results,
        {},
        made.held,
        [],
        {},
        {},
        (),
        controls,
        against_controls(study, results, controls, made.held),
        {"small, Safe LoRA, point 3": {"q_proj": ModuleEffect(0.4, 0.06, 0.95)}},
    )
    text = write_report(found, tmp_path, {}, []).read_text("utf-8")
    answer = text[text.index('id="answer"') :]
    assert answer.index("At equal task accuracy Safe LoRA keeps") < 200
    assert "<td>0.95 [0.95, 0.95]</td>" in text and "The approximate C is no projector" in text
    summarised = summary(study, results, {}, made.held, controls)["controls"]
    assert len(summarised["sentences"]) == 1 and summarised["defences"]


def test_findings_compute_the_comparisons_and_the_figure(made, study: Study):
    study = with_defences(study)
    results = [made.result(0, [90], [50]), made.result(1, [60], [50], "scale")]
    found = findings(study, results, {}, made.held, importance=dict)
    assert [each.other for each in found.against] == ["scale"]
