"""Warm start: another study's results are evidence, copied once, and no points."""

import pytest

from ebbline.sweeps.search.searcher import WAIT, OptunaSearcher, asked
from ebbline.sweeps.search.warm_start import lessons
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study_file import parse
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from tests.sweeps.made import Imagined, outcome, study, written
from tests.sweeps.test_search import empty_storage, fresh_url  # noqa: F401

SEARCH = {"sampler": "tpe", "points": 6, "window": 2}


@pytest.fixture
def home(tmp_path, empty_storage):  # noqa: F811
    """A home with a study `small` of six points, all told."""
    home = Home(tmp_path / "home")
    small = study(tmp_path, {"study": "small", "search": SEARCH})
    StudyView(small, home).freeze()
    fresh_url(home.folder("small") / "optuna.db", empty_storage)
    fresh_url(home.folder("tiny") / "optuna.db", empty_storage)
    searcher = OptunaSearcher(small, home.storage("small"))
    for _ in range(6):
        number, point = searcher.ask(Imagined())
        searcher.tell(number, outcome(number, point))
    return home


def warmed(tmp_path, changes=None, **search):
    return study(
        tmp_path, {**(changes or {}), "search": {**SEARCH, "warm_start": ["small"], **search}}
    )


@pytest.mark.slow
def test_what_another_study_measured_is_known_and_costs_no_points(tmp_path, home):
    found = warmed(tmp_path)
    finished = [
        point
        for _, point, state, _ in asked(
            parse(written(tmp_path, {"study": "small"})), home.storage("small")
        )
        if state == "done"
    ]
    assert finished
    for _ in range(2):  # a driver that starts again has learned it already
        searcher = OptunaSearcher(found, home.storage("tiny"))
        for name, entries in lessons(found, home).items():
            searcher.teach(name, entries)
        assert [entry.point for entry in searcher.trials.taught] == finished
        assert (
            searcher.told() == 0
            and searcher.in_flight() == []
            and asked(found, home.storage("tiny")) == []
        )
    numbers = []
    while (new := searcher.ask(Imagined())) is not None and new is not WAIT:
        numbers.append(new[0])
    assert numbers == list(range(6))


def test_a_lesson_that_was_cut_off_is_learned_to_its_end(tmp_path, home):
    found = warmed(tmp_path)
    (entries,) = lessons(found, home).values()
    searcher = OptunaSearcher(found, home.storage("tiny"))
    searcher.trials._optuna.set_user_attr = lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        searcher.teach("small", entries[1:3])  # their numbers here are other than there
    searcher = OptunaSearcher(found, home.storage("tiny"))
    searcher.teach("small", entries)
    learned = [*entries[1:3], entries[0], *entries[3:]]
    assert [entry.point for entry in searcher.trials.taught] == [entry.point for entry in learned]
    searcher.teach("small", [])
    assert len(OptunaSearcher(found, home.storage("tiny")).trials.taught) == len(entries)


def test_a_warm_search_begins_where_the_other_one_ended(tmp_path, home):
    learned = {}
    for taught in (False, True):
        found = warmed(tmp_path, {"study": f"taught{taught}"}, sampler="stage_aware")
        searcher = OptunaSearcher(found, home.storage(found.study))
        for name, entries in lessons(found, home).items():
            if taught:
                searcher.teach(name, entries)
        assert searcher.ask(Imagined())[0] == 0
        learned[taught] = searcher._stage_aware._observations("7b").x_NF
    assert len(learned[True]) > len(learned[False]) == 0


@pytest.mark.parametrize(
    ("changes", "warm", "fault"),
    [
        ({}, ["nobody"], r"has no study 'nobody'; it has \['small'\]"),
        ({}, ["tiny"], r"'tiny' is this study"),
        (
            {"objectives": ["task_accuracy", "refusal_rate"]},
            ["small"],
            r"measures \['refusal.refusal_rate', 'task.task_accuracy'\]",
        ),
        (
            {"axes": {"train.rank": [2, 4], "data.size": [8]}},
            ["small"],
            r"no point of 'small' lies in this study's space",
        ),
    ],
)
def test_a_study_that_cannot_teach_is_an_error_that_says_why(tmp_path, home, changes, warm, fault):
    with pytest.raises(StudyError, match=fault):
        lessons(study(tmp_path, {**changes, "search": {**SEARCH, "warm_start": warm}}), home)
