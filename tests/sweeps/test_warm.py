"""Warm start: another study's results inform the search, are copied once, and are no points."""

import pytest

from ebbline.sweeps.search.searcher import WAIT, StudySearcher, all_points
from ebbline.sweeps.search.warm_start import prior_results
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study_file import parse
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from tests.sweeps.made import Imagined, outcome, study, written
from tests.sweeps.test_search import empty_storage, fresh_url  # noqa: F401

SEARCH = {"sampler": "tpe", "points": 6, "window": 2}


@pytest.fixture
def home(tmp_path, empty_storage):  # noqa: F811
    """A home with a study `small` of six completed points."""
    home = Home(tmp_path / "home")
    small = study(tmp_path, {"study": "small", "search": SEARCH})
    StudyView(small, home).freeze()
    fresh_url(home.folder("small") / "optuna.db", empty_storage)
    fresh_url(home.folder("tiny") / "optuna.db", empty_storage)
    searcher = StudySearcher(small, home.database("small"))
    for _ in range(6):
        number, point = searcher.ask(Imagined())
        searcher.tell(number, outcome(number, point))
    return home


def warmed(tmp_path, changes=None, **search):
    return study(
        tmp_path, {**(changes or {}), "search": {**SEARCH, "warm_start": ["small"], **search}}
    )


@pytest.mark.slow
def test_results_of_another_study_are_copied_once_and_count_as_no_points(tmp_path, home):
    found = warmed(tmp_path)
    finished = [
        point
        for _, point, state, _ in all_points(
            parse(written(tmp_path, {"study": "small"})), home.database("small")
        )
        if state == "done"
    ]
    assert finished
    for _ in range(2):  # a restarted driver copies nothing more
        searcher = StudySearcher(found, home.database("tiny"))
        for name, entries in prior_results(found, home).items():
            searcher.teach(name, entries)
        assert [entry.point for entry in searcher.trials.taught] == finished
        assert (
            searcher.completed() == 0
            and searcher.in_flight() == []
            and all_points(found, home.database("tiny")) == []
        )
    numbers = []
    while (new := searcher.ask(Imagined())) is not None and new is not WAIT:
        numbers.append(new[0])
    assert numbers == list(range(6))


def test_an_interrupted_copy_is_completed_by_the_next_driver(tmp_path, home):
    found = warmed(tmp_path)
    (entries,) = prior_results(found, home).values()
    searcher = StudySearcher(found, home.database("tiny"))
    searcher.trials._optuna.set_user_attr = lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        searcher.teach("small", entries[1:3])  # so their numbers differ between the studies
    searcher = StudySearcher(found, home.database("tiny"))
    searcher.teach("small", entries)
    copied = [*entries[1:3], entries[0], *entries[3:]]
    assert [entry.point for entry in searcher.trials.taught] == [entry.point for entry in copied]
    searcher.teach("small", [])
    assert len(StudySearcher(found, home.database("tiny")).trials.taught) == len(entries)


def test_the_surrogate_of_a_warm_started_search_has_the_other_study_s_results(tmp_path, home):
    observed = {}
    for taught in (False, True):
        found = warmed(tmp_path, {"study": f"taught{taught}"}, sampler="stage_aware")
        searcher = StudySearcher(found, home.database(found.study))
        for name, entries in prior_results(found, home).items():
            if taught:
                searcher.teach(name, entries)
        assert searcher.ask(Imagined())[0] == 0
        observed[taught] = searcher._stage_aware._observations("7b").x_NF
    assert len(observed[True]) > len(observed[False]) == 0


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
def test_an_unsuitable_study_is_an_error_with_its_reason(tmp_path, home, changes, warm, fault):
    with pytest.raises(StudyError, match=fault):
        prior_results(study(tmp_path, {**changes, "search": {**SEARCH, "warm_start": warm}}), home)
