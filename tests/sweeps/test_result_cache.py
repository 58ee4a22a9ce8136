"""Results kept beside the database: a finished study opens without its records, and whatever has
changed since is noticed.
"""

import shutil
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbline.analysis.results.collect import collect
from ebbline.cluster.store.artifacts import Store
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.state import result_cache
from ebbline.sweeps.state.result_cache import NAME, ResultCache
from ebbline.sweeps.state.trials import read
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.measuring.metrics import METRICS
from tests.sweeps.pretended import Pretended, changes, small


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study of six points, and its results as read from the store."""
    folder = tmp_path_factory.mktemp("finished")
    study, home = small(folder), Home(folder / "home")
    drive(StudyView(study, home), lambda: Pretended(home.store))
    kept = home.path("tiny") / NAME
    text = kept.read_text()
    kept.unlink()
    results = collect(StudyView(study, home))
    kept.write_text(text)
    assert len(results) == 6 and all(result.metrics for result in results)
    return study, home, results


@pytest.fixture(scope="module")
def entries_of_finished(finished):
    study, home, _ = finished
    return read(study, home.database("tiny"))[0]


@pytest.fixture
def own(finished, tmp_path):
    """A copy whose stamps hold: its lines were written for the copied files."""
    study, home, results = finished
    shutil.copytree(home.root, tmp_path / "home")
    copied = Home(tmp_path / "home")
    (copied.path("tiny") / NAME).unlink()
    drive(StudyView(study, copied), lambda: Pretended(copied.store))
    return study, copied, results


def cached(study, home):
    entries, _ = read(study, home.database("tiny"))
    return ResultCache(study, home.store, home.path("tiny")).read(entries)


def artifact_of(home, results, number, part):
    key = results[number].keys[f"{part}[seed=0]"]
    return home.store.open(part.replace("refusal", "score"), key)


def test_a_finished_study_opens_without_a_record_of_its_points(finished, monkeypatch):
    study, home, results = finished
    found, plain = Counter[str](), Store.find

    def find(store, kind, key):
        found[kind] += 1
        return plain(store, kind, key)

    monkeypatch.setattr(Store, "find", find)
    progress = drive(StudyView(study, home), lambda: Pretended(home.store))
    assert progress.history == results and progress.results == []
    assert found["train"] == found["project"] == found["apply"] == 0
    # The two suites of the aligned model, which is measured before fine-tuning
    assert found["score"] == 2 and len(progress.runner.nodes) == 4
    found.clear()
    assert collect(StudyView(study, home)) == results
    assert found["train"] == found["apply"] == found["score"] == 0


def test_the_file_can_be_deleted_at_any_time(own):
    study, home, results = own
    (home.path("tiny") / NAME).unlink()
    assert cached(study, home) == {}
    assert collect(StudyView(study, home)) == results
    progress = drive(StudyView(study, home), lambda: Pretended(home.store))
    assert progress.history == results
    assert cached(study, home) == dict(enumerate(results_without_duplicates(results)))


def results_without_duplicates(results):
    return [replace(result, same_as=None) for result in results]


def remove_record(home, results):
    (artifact_of(home, results, 2, "refusal").folder.parent / "record.json").unlink()


def damage_record(home, results):
    path = artifact_of(home, results, 2, "refusal").folder.parent / "record.json"
    path.write_text(path.read_text().replace('"seconds": 10.0', '"seconds": 11.0'))


def replace_metrics(home, results):
    path = artifact_of(home, results, 2, "refusal").folder / "payload" / METRICS
    text = path.read_text()
    path.unlink()
    path.write_text(text)


def drop_files(home, results):
    artifact = artifact_of(home, results, 2, "apply")
    home.store.drop(artifact, frozenset({"adapter"}))


def quarantine(home, results):
    home.store.quarantine("score", results[2].keys["refusal[seed=0]"])


def damage_line(home, results):
    path = home.path("tiny") / NAME
    header, *lines = path.read_text().splitlines()
    lines[2] = lines[2].replace('"seconds":', '"seconds":1')
    path.write_text("\n".join([header, *lines, ""]))


@pytest.mark.parametrize(
    "change",
    [remove_record, damage_record, replace_metrics, drop_files, quarantine, damage_line],
)
def test_a_change_of_what_a_result_rests_on_is_noticed(own, change):
    study, home, results = own
    assert set(cached(study, home)) == set(range(6))
    change(home, results)
    left = cached(study, home)
    assert (
        2 not in left
        and left.items() <= dict(enumerate(results_without_duplicates(results))).items()
    )


def test_a_removed_measurement_runs_again_and_gives_the_same_table(own):
    study, home, results = own
    quarantine(home, results)
    executor = Pretended(home.store)
    drive(StudyView(study, home), lambda: executor)
    assert [request.kind for request in executor.requests.values()] == ["score"]
    assert [each.metrics for each in collect(StudyView(study, home))] == [
        each.metrics for each in results
    ]


def test_another_study_or_other_code_has_no_cached_results(own, monkeypatch, tmp_path):
    study, home, _ = own
    wider = study.model_copy(update={"search": study.search.model_copy(update={"points": 3})})
    assert len(cached(wider, home)) == 6  # a search chooses points, and changes no result
    changed = study.model_copy(update={"seeds": (1,)})
    assert cached(changed, home) == {}
    monkeypatch.setattr(result_cache, "code_digest", lambda: "another version")
    assert cached(study, home) == {}


def test_a_retried_or_lost_point_is_not_cached(own):
    study, home, _ = own
    entries, _ = read(study, home.database("tiny"))
    cache = ResultCache(study, home.store, home.path("tiny"))
    for change in (
        {"trial": 77},
        {"state": "running"},
        {"state": "failed"},
        {"lost": "its adapter is gone"},
        {"max_seeds": 1},
        {"point": entries[0].point},
    ):
        changed = [*entries[:2], replace(entries[2], **change), *entries[3:]]
        assert set(cache.read(changed)) == {0, 1, 3, 4, 5}


def test_no_line_is_written_below_the_header_of_another_study(own, monkeypatch):
    """The file of an earlier form of the study could not be replaced."""
    study, home, _ = own
    entries, _ = read(study, home.database("tiny"))
    path, changed = home.path("tiny") / NAME, study.model_copy(update={"seeds": (1,)})

    def full(*arguments: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(result_cache, "write_whole", full)
    cache = ResultCache(changed, home.store, home.path("tiny"))
    assert cache.read_to_write(entries) == {} and not path.exists()
    cache.add(entries[0], replace(own[2][0], status="done"))
    cache.close()
    assert not path.exists()


@settings(max_examples=30)
@given(st.data())
def test_a_file_that_is_cut_or_damaged_anywhere_gives_no_wrong_result(
    finished, entries_of_finished, data
):
    study, home, results = finished
    path, entries = home.path("tiny") / NAME, entries_of_finished
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255))
    for text in (whole[:place], whole[:place] + bytes([byte]) + whole[place + 1 :]):
        try:
            path.write_bytes(text)
            found = ResultCache(study, home.store, home.path("tiny")).read(entries)
            written = ResultCache(study, home.store, home.path("tiny")).read_to_write(entries)
            assert written.keys() == found.keys()
        finally:
            path.write_bytes(whole)
        expected = dict(enumerate(results_without_duplicates(results)))
        assert found.items() <= expected.items()


def test_a_study_with_races_keeps_no_results(tmp_path):
    suites = changes(tmp_path)["suites"]
    suites["refusal"]["measure"] |= {"race": {"width": 0.2, "block": 10}, "limit": 20}
    study = small(tmp_path, suites=suites)
    home = Home(tmp_path / "home")
    cache = ResultCache(study, home.store, home.folder("tiny"))
    cache.read_to_write([])
    assert not (home.path("tiny") / NAME).exists()
