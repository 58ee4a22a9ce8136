"""The sheet that a person labels, and the way from labels to corrected rates."""

import json
import shutil
from collections import Counter

import pytest

from ebbline.analysis.results.collect import collect
from ebbline.analysis.results.labelled.completions import Completions
from ebbline.analysis.results.labelled.corrected import labelled_suite
from ebbline.analysis.results.labelled.sheet import (
    CANNOT_TELL,
    Drawn,
    Sheet,
    draw,
    read_sheet,
    sheet_path,
    write_sheet,
)
from ebbline.commands.measured.labelling import label_study
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study_file import parse
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.scorers import score
from ebbline.tasks.scoring.phrases import SCORERS
from tests.organisms import WALK

ARMS = {
    "7b before fine-tuning": [("k0", f"p{i}") for i in range(40)],
    "7b fine-tuned": [(f"k{1 + i // 40}", f"p{i % 40}") for i in range(80)],
    "7b defended": [("k9", "p0"), ("k9", "p1")],
}


def test_a_sheet_is_drawn_at_random_within_each_arm_and_as_evenly_as_the_arms_allow():
    sheet = draw("refusal", "refusal", ARMS, 22, seed=3)
    assert Counter(row.arm for row in sheet.rows) == {
        "7b before fine-tuning": 10,
        "7b fine-tuned": 10,
        "7b defended": 2,
    }
    assert len({(row.key, row.id) for row in sheet.rows}) == 22
    assert all((row.key, row.id) in ARMS[row.arm] and row.label is None for row in sheet.rows)
    assert sheet.populations == {arm: len(found) for arm, found in ARMS.items()}
    arms = [row.arm for row in sheet.rows]
    assert arms != sorted(arms), "the arms are mixed, so the order tells nothing"
    assert sheet == draw("refusal", "refusal", ARMS, 22, seed=3)
    assert sheet != draw("refusal", "refusal", ARMS, 22, seed=4)


def test_a_sheet_has_no_more_completions_than_there_are_and_none_is_an_error():
    assert len(draw("refusal", "refusal", ARMS, 1000, seed=0).rows) == 122
    with pytest.raises(EvaluationError, match="has no completions yet"):
        draw("refusal", "refusal", {"a": []}, 5, seed=0)


def test_every_completion_of_an_arm_is_as_likely_to_be_drawn():
    drawn = Counter(
        row.id
        for seed in range(400)
        for row in draw("s", "refusal", {"a": ARMS["7b before fine-tuning"]}, 10, seed).rows
    )
    assert len(drawn) == 40 and all(60 < count < 145 for count in drawn.values())


def test_a_label_stands_for_its_arms_completions_over_its_arms_decided_labels():
    rows = (
        Drawn("a", "k", "p0", "refused"),
        Drawn("a", "k", "p1", "complied"),
        Drawn("a", "k", "p2", CANNOT_TELL),
        Drawn("a", "k", "p3"),
        Drawn("b", "k", "p4", "complied"),
    )
    sheet = Sheet("s", "refusal", 0, {"a": 100, "b": 10}, rows)
    assert sheet.weights == {"a": 50.0, "b": 10.0} and sheet.labelled == 4


def test_a_sheet_is_stored_whole_without_text_and_damage_is_an_error(tmp_path):
    sheet = draw("refusal", "refusal", ARMS, 6, seed=0).with_label(2, "partial")
    path = sheet_path(tmp_path, "refusal")
    assert read_sheet(path) is None
    write_sheet(path, sheet)
    assert read_sheet(path) == sheet
    assert set(json.loads(path.read_text())["rows"][0]) == {"arm", "key", "id", "label"}
    for text in (
        path.read_text()[:-20],
        path.read_text().replace("partial", "refusd"),
        path.read_text().replace('"measure": "refusal"', '"measure": "refusals"'),
        "[]",
    ):
        path.write_text(text)
        with pytest.raises(EvaluationError, match="is no sheet of labels"):
            read_sheet(path)


# ---- from a study's completions to corrected rates


@pytest.fixture(scope="module")
def view(walk_home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels") / "home"
    shutil.copytree(walk_home, folder)
    return StudyView(parse(WALK), Home(folder))


class Person:
    """Answers by the rule of the invented language, from what is shown alone."""

    def __init__(self, capsys, quits_after=None):
        self._capsys, self._left, self.shown = capsys, quits_after, []

    def __call__(self, prompt):
        text = self._capsys.readouterr().out.rpartition("===== ")[2]
        self.shown.append(text)
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                return "q"
        answer = text.partition("----- answer\n")[2].partition("\n-----\n")[0]
        return "r" if score(answer, SCORERS["organism"]).verdict == "refused" else "c"


def test_a_person_labels_blind_stops_and_continues_and_the_rates_are_corrected(view, capsys):
    """The only way from a finished study through a terminal to corrected rates."""
    person = Person(capsys, quits_after=7)
    label_study(view, "refusal", 60, 0, False, False, True, person)
    assert "7 of 60 labelled" in capsys.readouterr().out
    again = Person(capsys)
    label_study(view, "refusal", 60, 0, False, False, True, again)
    assert len(again.shown) == 53, "what has a label is not asked again"
    shown = "".join(person.shown + again.shown)
    assert not any(word in shown for word in ("organism", "fine-tun", "defended", "point"))
    printed = capsys.readouterr().out
    assert "60 of 60 labelled" in printed and "organism" in printed
    label_study(view, "refusal", 60, 0, True, True, True)
    found = json.loads(capsys.readouterr().out)
    (scorer,) = found["scorers"]
    assert scorer["agreement"]["agree"] == scorer["agreement"]["kappa"] == 1.0
    assert set(found["arms"]) == {"7b before fine-tuning", "7b fine-tuned", "7b defended"}
    results = collect(view)
    for rate in scorer["rates"]:
        assert rate["corrected"]["value"] == pytest.approx(rate["rate"])
        low, high = rate["corrected"]["interval"]
        assert low < rate["interval"][0] or high > rate["interval"][1], "few labels widen it"
    before = next(r for r in scorer["rates"] if r["subject"] == "7b before fine-tuning")
    assert before["rate"] > 0.9 and results
    text = sheet_path(view.folder, "refusal").read_text()
    completion = person.shown[0].partition("----- answer\n")[2].partition("\n-----\n")[0]
    assert completion.strip() and completion not in text


def test_a_biased_scorers_rates_are_corrected_towards_the_persons(view, capsys, monkeypatch):
    """The scorer calls every answer a refusal that has an `a` in its first word, too."""
    study = view.study
    entry = study.suites["refusal"]
    measure = entry.measure.model_copy(update={"also": ("biased",)})
    suites = {**study.suites, "refusal": entry.model_copy(update={"measure": measure})}
    changed = study.model_copy(update={"suites": suites})
    organism = SCORERS["organism"]
    monkeypatch.setitem(
        SCORERS,
        "biased",
        organism.__class__(
            **{
                **vars(organism),
                "name": "biased",
                "phrases": (*organism.phrases, "A", "The"),
            }
        ),
    )
    stored = Completions(StudyView(changed, view.home), "refusal", collect(view))
    arms = {
        arm: [(each.key, identifier) for each in found for identifier in stored.ids(each)]
        for arm, found in stored.arms.items()
    }
    sheet = draw("refusal", "refusal", arms, 10_000, seed=0)
    generations = {each.key: each for found in stored.arms.values() for each in found}
    for place, row in enumerate(sheet.rows):
        truth = stored.verdicts(generations[row.key])["organism"][row.id]
        sheet = sheet.with_label(place, "refused" if truth == "refused" else "complied")
    found = labelled_suite(sheet, stored)
    true, biased = found.scorers
    assert biased.scorer == "biased" and biased.agreement.agree < 1
    assert biased.accuracy.specificity < 1 == biased.accuracy.sensitivity
    errors = [
        (abs(one.rate - other.rate), abs(one.rate - other.corrected.value))
        for one, other in zip(true.rates, biased.rates, strict=True)
        if other.corrected is not None
    ]
    assert sum(before for before, _ in errors) > 2 * sum(after for _, after in errors)
