"""The comparison with papers: verdicts come from the settings; tiny models are never compared."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import yaml

from ebbline.analysis.paper.papers import UNKNOWN, PaperRow, beside_papers
from ebbline.analysis.paper.published import PUBLISHED
from ebbline.analysis.results.collect import SuitePrompts
from ebbline.analysis.results.measurements import Baselines
from ebbline.commands.papers import _why
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import shipped
from ebbline.tasks.measuring.metrics import DIRECTIONS, Metric
from tests.analysis.conftest import result

COMMIT, SHA = "a" * 40, "b" * 64
ADVBENCH = {"advbench": SuitePrompts("advbench", 520, 520, SHA)}


@pytest.fixture
def llama() -> Callable[..., Study]:
    """`llama(changes...)` is the study llama2 that ships, with values at dotted paths replaced."""

    def with_changes(**changes: object) -> Study:
        raw = yaml.safe_load(shipped()["llama2"].read_text("utf-8"))
        for size in raw["models"].values():
            for role in ("base", "aligned"):
                size[role]["hub"] |= {"commit": COMMIT, "sha256": SHA}
        for path, value in changes.items():
            *above, last = path.split("__")
            place = raw
            for part in above:
                place = place[part]
            place[last] = value

        def tupled(value: object) -> object:
            if isinstance(value, list):
                return tuple(map(tupled, value))
            return (
                {key: tupled(each) for key, each in value.items()}
                if isinstance(value, dict)
                else value
            )

        return Study.model_validate(tupled(raw), context={"folder": shipped()["llama2"].parent})

    return with_changes


def point(
    number: int, model: str, refused: int, threshold: float | None = None, share: float = 0.0
) -> Result:
    values = {"train.rank": 8, "data.size": 1000, "apply.threshold": threshold}
    metrics = {
        "advbench.refusal_rate": Metric("refusal_rate", refused, 520),
        "task.task_accuracy": Metric("task_accuracy", 90 - int(70 * share), 100),
    }
    return Result(number, Point.of(model, values), "done", metrics, changed_share=share)


def row(
    study: Study,
    results: list[Result],
    baselines: Baselines,
    prompts: dict[str, SuitePrompts],
    **criteria: object,
) -> PaperRow:
    rows = beside_papers(study, results, baselines, prompts)
    (found,) = [
        each
        for each in rows
        if all(getattr(each.published, name) == value for name, value in criteria.items())
    ]
    return found


GADE_BEFORE = {"paper": "arXiv 2311.00117", "state": "before"}


def verdicts(found: PaperRow) -> dict[str, str]:
    return {fact.what: fact.verdict for fact in found.facts}


def test_every_number_has_a_source_and_is_a_share_or_says_its_unit() -> None:
    assert len(PUBLISHED) > 30 and len(set(PUBLISHED)) == len(PUBLISHED)
    for each in PUBLISHED:
        assert each.paper and each.setting and (each.repository or each.metric not in DIRECTIONS)
        assert 0 <= each.value <= 1 or each.note, each


def test_a_study_of_tiny_models_is_compared_with_nothing(study: Study) -> None:
    rows = beside_papers(study, [result(0), result(1, share=0.5, threshold=0.5)], {}, {})
    assert {each.comparable for each in rows} == {"not comparable"}
    assert {each.here for each in rows} == {"not compared: a tiny model"}
    assert all("model" in [fact.what for fact in each.facts_with("differs")] for each in rows)


def test_the_model_of_the_same_name_is_compared_and_its_value_has_an_interval(
    llama: Callable[..., Study],
) -> None:
    before: Baselines = {"13b": {"advbench.refusal_rate": Metric("refusal_rate", 515, 520)}}
    found = row(llama(), [], before, ADVBENCH, **GADE_BEFORE)
    assert (
        found.model == "13b" and found.here == "13b: 99.0% (95% interval 97.8% to 99.6%, n = 520)"
    )
    assert verdicts(found) == {
        "metric": "same",
        "model": "same",
        "quantisation": "differs",
        "prompts": "same",
        "scorer": UNKNOWN,
        "chat template": UNKNOWN,
        "system prompt": UNKNOWN,
        "max tokens": UNKNOWN,
    }
    assert found.comparable == "not comparable"


def test_conditions_that_a_paper_withholds_make_a_number_not_known_to_be_comparable(
    llama: Callable[..., Study],
) -> None:
    found = row(llama(models__13b__quantisation="none"), [], {}, ADVBENCH, **GADE_BEFORE)
    assert (
        verdicts(found)["quantisation"] == "same"
        and found.comparable == "not known to be comparable"
    )
    assert found.here == "not measured yet"


def test_other_prompts_and_a_part_of_the_set_differ(
    llama: Callable[..., Study],
) -> None:
    some = {"advbench": replace(ADVBENCH["advbench"], asked=100)}
    own = {"advbench": replace(ADVBENCH["advbench"], format="plain")}
    for prompts in (some, own):
        assert verdicts(row(llama(), [], {}, prompts, **GADE_BEFORE))["prompts"] == "differs"


def test_a_number_whose_stated_conditions_match_is_comparable_as_far_as_is_known(
    llama: Callable[..., Study],
) -> None:
    """MMLU before fine-tuning matches in weights, quantisation, task and shots.

    The paper does not state the chat template.
    """
    criteria = {"paper": "arXiv 2310.20624", "state": "before", "suite": "mmlu"}
    assert verdicts(row(llama(), [], {}, {}, **criteria))["quantisation"] == "differs"
    alike = {"models__70b__quantisation": "int8", "suites__mmlu__measure__limit": None}
    assert (
        row(
            llama(**alike | {"suites__mmlu__measure__limit": 20}), [], {}, {}, **criteria
        ).comparable
        == "not comparable"
    )
    found = row(llama(**alike), [], {}, {}, **criteria)
    assert found.comparable == "comparable as far as is known"
    assert [fact.what for fact in found.facts_with(UNKNOWN)] == [
        "chat template"
    ] and "not known of the paper: chat template" in _why(found)
    all_same = tuple(replace(fact, verdict="same") for fact in found.facts)
    assert replace(found, facts=all_same).comparable == "comparable"
    fewer = row(
        llama(**alike, suites__mmlu__measure__shots=0),
        [],
        {},
        {},
        **criteria,
    )
    assert verdicts(fewer)["shots"] == "differs"


def test_an_accuracy_that_may_be_either_of_two_is_not_known_to_be_comparable(
    llama: Callable[..., Study],
) -> None:
    criteria = {"paper": "arXiv 2310.20624", "state": "before", "suite": "hellaswag"}
    alike = {"models__70b__quantisation": "int8", "suites__hellaswag__measure__limit": None}
    found = row(llama(**alike), [], {}, {}, **criteria)
    assert verdicts(found)["metric"] == UNKNOWN and found.comparable == "not known to be comparable"
    assert "by likelihood or by normalised likelihood is not stated" in _why(found)


def test_adapter_settings_that_a_paper_does_not_state_count_as_unknown(
    llama: Callable[..., Study],
) -> None:
    found = row(
        llama(),
        [point(0, "7b", 300)],
        {},
        ADVBENCH,
        paper="WaRP",
        state="fine-tuned",
        suite="refusal",
        setting="Llama 2-Chat 7B",
    )
    unknown = {fact.what: fact.here for fact in found.facts_with(UNKNOWN)}
    assert (
        unknown["alpha"] == "16"
        and unknown["max tokens"] == "128"
        and "q_proj" in unknown["target modules"]
    )


def test_fine_tuned_numbers_are_compared_with_unprojected_points_and_projected_with_the_pick(
    llama: Callable[..., Study],
) -> None:
    rows = [point(0, "7b", 300), point(1, "7b", 500, 0.35, 0.11), point(2, "7b", 519, 0.6, 0.8)]
    tuned = row(
        llama(),
        rows,
        {},
        ADVBENCH,
        paper="WaRP",
        state="fine-tuned",
        suite="refusal",
        repository="Llama-2-7b-chat-hf",
    )
    assert tuned.here.startswith("7b: 57.7% (95% interval")
    assert verdicts(tuned)["rank"] == "differs" and verdicts(tuned)["data"] == UNKNOWN
    share = row(
        llama(),
        rows,
        {},
        ADVBENCH,
        paper="arXiv 2405.16833",
        metric="projected_share",
        repository="Llama-2-7b-chat-hf",
    )
    assert share.here == "11.0%", (
        "of the projected points that hold the study's floor, the most useful"
    )


def test_trainings_with_a_defence_of_their_own_stand_beside_no_papers_number(
    llama: Callable[..., Study],
) -> None:
    found = llama()
    plain = point(0, "7b", 400)
    for axis, value in (("lox.factor", 1.25), ("train.ema_decay", 0.9)):
        other = replace(plain, point=Point.of("7b", {**dict(plain.point.values), axis: value}))
        rows = beside_papers(found, [other], {}, ADVBENCH)
        assert rows == beside_papers(found, [], {}, ADVBENCH)
        assert rows != beside_papers(found, [plain], {}, ADVBENCH)


def test_the_exact_projector_of_a_study_with_defences_is_not_the_papers_method(
    llama: Callable[..., Study],
) -> None:
    for projector, verdict in (("approximate", "same"), ("exact", "differs")):
        found = llama(axes={}, defences={"safe_lora": {"threshold": [0.3], "projector": projector}})
        at = point(0, "7b", 400, threshold=0.3, share=0.5)
        at = replace(at, point=Point.of("7b", {**dict(at.point.values), "defence": "safe_lora"}))
        rows = beside_papers(found, [at], {}, ADVBENCH)
        told = {
            fact.verdict
            for each in rows
            if each.published.state == "projected" and each.published.method == "lora"
            for fact in each.facts
            if fact.what == "method"
        }
        assert told == {verdict}
