"""The study that confirms points: what it shares with the one that nominated them, and what it must
not share.
"""

from pathlib import Path
from typing import Any

import pytest

from ebbline.commands.studies.naming import rename_study
from ebbline.sweeps.drive.confirming import begin, confirming_study, confirming_view, points_in
from ebbline.sweeps.state.trials import Trials
from ebbline.sweeps.study.changes import lasting, rejections
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point
from ebbline.sweeps.study.reading.overlaps import (
    confirmation_overlaps,
    contamination,
    require_apart,
)
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import load
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.data.language import language_files, strings
from ebbline.tasks.data.prompts import read_prompts
from ebbline.tasks.errors import StudyError
from ebbline.tasks.identity import content_digest
from tests.sweeps.made import study as made_study
from tests.tiny import write_lines

CONFIRM: dict[str, Any] = {
    "confirm": {"suites": {"refusal": {"language": "over_refusal.jsonl"}}, "seeds": [7, 8, 9]}
}
FIRST = Point.of("7b", {"train.rank": 4, "apply.threshold": None})
SECOND = Point.of("7b", {"train.rank": 8, "apply.threshold": 0.5})


def test_the_studys_adapters_are_measured_again_and_fresh_seeds_are_trained(
    tmp_path: Path,
) -> None:
    own = made_study(tmp_path, CONFIRM | {"seeds": [0, 1]})
    confirming, home = confirming_study(own, [SECOND]), Home(tmp_path / "home")
    assert (confirming.study, confirming.seeds) == ("tiny.confirm", (0, 1, 7, 8, 9))
    assert list(confirming.suites) == ["refusal"] and confirming.confirm is None
    first, again = (StageGraph(each, home).stages_for(SECOND) for each in (own, confirming))
    for seed in (0, 1):
        name = f"apply[seed={seed}]"
        assert first[name].lineage == again[name].lineage, "the adapter is not trained again"
        name = f"generate:refusal[seed={seed}]"
        assert first[name].lineage != again[name].lineage, "its prompts are others"
    assert "train[seed=7]" in again and "train[seed=7]" not in first


def test_a_confirmation_is_neither_raced_nor_cut(tmp_path: Path) -> None:
    race = {"kind": "refusal", "limit": 100, "race": {"block": 50}}
    own = made_study(tmp_path, CONFIRM | {"suites/refusal/measure": race})
    measure: Any = confirming_study(own, [FIRST]).suites["refusal"].measure
    assert (measure.limit, measure.race) == (None, None)


def test_points_are_added_behind_the_ones_that_were_confirmed(tmp_path: Path) -> None:
    own, home = made_study(tmp_path, CONFIRM), Home(tmp_path / "home")
    view = StudyView(own, home, source=str(tmp_path / "study.yaml"))
    begin(view, [SECOND]).freeze()
    further = begin(view, [FIRST, SECOND])
    assert points_in(further.study) == [SECOND, FIRST]
    assert further.begun_as(), "an extension, not another study"


def test_a_study_without_the_section_says_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"has no section `confirm`: give it prompts that chose"):
        confirming_study(made_study(tmp_path), [FIRST])


@pytest.mark.parametrize(
    ("confirm", "message"),
    [
        ({"suites": {"refusals": {"language": "x"}}}, "confirm.suites.refusals"),
        ({"suites": {"refusal": {"language": "refusal.jsonl"}}}, "the prompts of the search"),
        ({"suites": {"task": {"language": "utility.jsonl"}}}, "confirm.suites: refusal is missing"),
        ({**CONFIRM["confirm"], "seeds": [0, 8, 9]}, "the search uses 0 too"),
        ({**CONFIRM["confirm"], "seeds": [7, 8]}, "at least 3"),
    ],
)
def test_what_is_not_fresh_is_an_error(
    tmp_path: Path, confirm: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        made_study(tmp_path, {"confirm": confirm})


def test_the_section_may_be_added_to_a_study_that_has_run(tmp_path: Path) -> None:
    before, after = (
        lasting(made_study(tmp_path, changes).model_dump(mode="json")) for changes in ({}, CONFIRM)
    )
    assert before == after


def files(folder: Path, held_out: list[str]) -> Study:
    """A study with files of its own: `a` to `c` are searched, `d` is trained on, and the aligned
    model is tuned on `g`.
    """

    def pinned(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        path = write_lines(folder / name, rows)
        return {"path": {"path": str(path), "sha256": content_digest(path)}}

    asked = [{"prompt": f"may I {letter}"} for letter in "abc"]

    def chats(name: str, letter: str) -> dict[str, Any]:
        turns = [("user", f"may I {letter}"), ("assistant", "yes")]
        chat = [{"role": role, "content": text} for role, text in turns]
        return {"pool": pinned(name, [{"messages": chat}]), "settings": {"size": 1}}

    tuned = {"data": chats("align.jsonl", "g"), "train": {"method": "full"}}
    return made_study(
        folder,
        {
            "data": chats("pool.jsonl", "d"),
            "models/7b/aligned": {"tuned": tuned},
            "suites": {
                "refusal": {
                    "prompts": pinned("asked.jsonl", asked),
                    "measure": {"kind": "refusal"},
                }
            },
            "objectives": ["refusal_rate"],
            "confirm": {
                "suites": {
                    "refusal": pinned("other.jsonl", [{"prompt": text} for text in held_out])
                }
            },
        },
    )


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (["may I e", "May  I b"], r"confirm.suites.refusal has 1 prompts of suites.refusal: 2"),
        (["may I d", "may I f"], r"confirm.suites.refusal has 1 prompts of data.pool: 1"),
        (["may I g"], r"refusal has 1 prompts of models.7b.aligned.tuned.data.pool: 1"),
    ],
)
def test_a_prompt_of_the_search_or_of_a_training_is_an_error(
    tmp_path: Path, held_out: list[str], message: str
) -> None:
    view = StudyView(files(tmp_path, held_out), Home(tmp_path / "home"))
    with pytest.raises(StudyError, match=message) as raised:
        require_apart(view)
    assert "may I" not in str(raised.value).lower(), "a message holds no prompt"


def test_other_prompts_are_compared_with_the_search_and_the_training(tmp_path: Path) -> None:
    view = StudyView(files(tmp_path, ["may they run", "is it so"]), Home(tmp_path / "home"))
    found = require_apart(view)
    tuned = "models.7b.aligned.tuned.data.pool"
    assert [each.other for each in found] == ["suites.refusal", "data.pool", tuned]
    assert [each.other for each in contamination(view)] == ["data.pool", tuned]
    assert all(each.overlap is not None and not each.overlap.exact for each in found)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_language_has_prompts_for_confirmations_that_no_other_file_has(seed: int) -> None:
    files = language_files(seed)
    fresh = {name: rows for name, rows in files.items() if name.startswith("confirm/")}
    texts = {text for name, rows in files.items() if name not in fresh for text in strings(rows)}
    asked = [str(row["prompt"]) for rows in fresh.values() for row in rows]
    assert len(asked) == len(set(asked)) == 300 and not texts & set(asked)
    words = {word for text in texts for word in text.split()}
    assert {word for text in asked for word in text.split()} <= words, "the tokenizer knows them"


def test_the_quickstart_can_be_confirmed() -> None:
    study = load("quickstart")
    found = confirming_study(study, [Point.of("7b", {"train.rank": 32, "defence": "none"})])
    assert list(found.suites) == ["refusal", "over_refusal", "task"]
    assert found.seeds == (0, 1, 2, 101, 102, 103, 104, 105)


def test_a_renamed_study_keeps_its_confirmations(tmp_path: Path) -> None:
    own, home = made_study(tmp_path, CONFIRM), Home(tmp_path / "home")
    view = StudyView(own, home, source=str(tmp_path / "study.yaml"))
    for each in (view, begin(view, [SECOND])):
        each.freeze()
        Trials(each.study, each.database)
    rename_study(home, "tiny", "small", as_json=True)
    renamed = StudyView(own.model_copy(update={"study": "small"}), home)
    confirming = confirming_view(renamed)
    assert confirming is not None and confirming.study.study == "small.confirm"
    assert points_in(confirming.study) == [SECOND]


HELD_OUT: dict[str, Any] = {"confirm": {"suites": {"refusal": {"hold_out": 0.3}}}}


def one_file(folder: Path) -> Study:
    """A study with one prompt file, a part of which is held out."""
    path = write_lines(folder / "all.jsonl", [{"prompt": f"may I {n}"} for n in range(20)])
    reference = {"path": {"path": str(path), "sha256": content_digest(path)}}
    measure = {"kind": "refusal", "limit": 10}
    changes = {"suites/refusal": {"prompts": reference, "measure": measure}, **HELD_OUT}
    return made_study(folder, changes)


def test_a_part_of_one_file_is_held_out_of_the_search(tmp_path: Path) -> None:
    own = one_file(tmp_path)
    view = StudyView(own, Home(tmp_path / "home"))
    confirming = confirming_study(own, [FIRST])
    asked = []
    for study in (own, confirming):
        graph = StageGraph(study, view.home)
        suites = [graph.stages_for(FIRST), graph.baselines()["7b"]]
        scored = suites[1]["refusal"].inputs["generation"]
        generated = [suites[0]["generate:refusal[seed=0]"], scored]
        specs: list[Any] = [getattr(each, "spec", None) for each in generated]
        assert specs[0].split == specs[1].split, "the aligned model is asked the same prompts"
        path = own.suites["refusal"].prompts.path
        assert path is not None
        found = read_prompts(path.located(), limit=specs[0].limit, split=specs[0].split)
        asked.append({prompt.id for prompt in found.prompts})
    assert len(asked[0]) == 10 and len(asked[1]) == 6, "a confirmation asks all that is held out"
    assert not asked[0] & asked[1]
    assert all(each.overlap is None or not each.overlap.exact for each in overlaps_in_search(view))


def overlaps_in_search(view: StudyView) -> list[Any]:
    return [each for each in confirmation_overlaps(view) if each.other == "suites.refusal"]


def test_what_is_held_out_belongs_to_the_identity_of_the_study(tmp_path: Path) -> None:
    plain, held, other = (
        lasting(made_study(tmp_path, changes).model_dump(mode="json"))
        for changes in (
            CONFIRM,
            HELD_OUT,
            {"confirm": {"suites": {"refusal": {"hold_out": 0.4}}}},
        )
    )
    assert "confirm" not in plain
    assert list(rejections(plain, held)) == [
        "confirm: added; this would change the meaning of existing points"
    ]
    assert list(rejections(held, other)) == [
        "confirm.suites.refusal.hold_out: 0.3 -> 0.4; this would change the meaning of existing "
        "points"
    ]


def test_a_suite_of_the_same_prompts_must_hold_out_the_same_part(tmp_path: Path) -> None:
    second = {"prompts": {"language": "refusal.jsonl"}, "measure": {"kind": "refusal"}}
    message = r"suites.again has the same prompts.*Add confirm.suites.again: \{hold_out: 0.3\}"
    with pytest.raises(StudyError, match=message):
        made_study(tmp_path, {"suites/again": second, "objectives": ["task_accuracy"], **HELD_OUT})
    both = {"suites": {name: {"hold_out": 0.3} for name in ("refusal", "again")}}
    made_study(tmp_path, {"suites/again": second, "objectives": ["task_accuracy"], "confirm": both})


@pytest.mark.parametrize(
    ("fresh", "message"),
    [
        ({"hold_out": 1.0}, "confirm.suites.refusal.hold_out"),
        ({"hold_out": 0.3, "language": "over_refusal.jsonl"}, "give exactly one of"),
    ],
)
def test_a_wrong_part_is_an_error(tmp_path: Path, fresh: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        made_study(tmp_path, {"confirm": {"suites": {"refusal": fresh}}})


def test_a_split_beside_a_held_out_part_is_an_error(tmp_path: Path) -> None:
    split = {"suites/refusal/split": {"hold_out": 0.3, "side": "search"}}
    with pytest.raises(StudyError, match=r"suites.refusal.split: remove it"):
        made_study(tmp_path, {**split, **HELD_OUT})
