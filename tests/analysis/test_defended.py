"""Defences against their controls and each other: equal numbers of adapters, pairs, and draws."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.analysis.results.defended.advantage import (
    advantage,
    area_R,
    together_corrected,
    without_spread,
)
from ebbline.analysis.results.defended.beside import (
    against_controls,
    against_defences,
    besides,
    defended,
)
from ebbline.analysis.results.defended.modules import (
    ModuleEffect,
    effect_cells,
    explained_by_scaling,
    of_file,
    of_projection,
    ratio_range,
)
from ebbline.analysis.results.picks.floors import Floor, pick
from ebbline.analysis.results.picks.picked import preferred
from ebbline.sweeps.dominance import hypervolume
from ebbline.sweeps.state.controls import ControlDraw, ControlResult
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.gate import ModuleRow, ProjectedRows
from ebbline.tasks.measuring.metrics import Metric, Sample
from tests.analysis.conftest import REFUSAL, TASK, Held

N = 100
AXES = {
    "safe_lora": "apply.threshold",
    "scale": "scale.factor",
    "drop": "drop.threshold",
}


def control(partner: Result, name: str, draw: int | None, result: Result) -> ControlResult:
    return ControlResult(ControlDraw(partner, name, draw), result)


@dataclass
class Made:
    """Made-up results whose samples are the first of N prompts."""

    held: Held

    def result(
        self,
        number: int,
        refusals: Sequence[int],
        tasks: Sequence[int],
        defence: str = "safe_lora",
        knob: float = 0.5,
        rank: int = 8,
        undecided: int = 0,
        same_as: int | None = None,
    ) -> Result:
        """A point with a number of refusals and of right answers for each seed; `undecided` of the
        refusals that it lacks were not judged.
        """
        found = {}
        for suite, name, counts in (("refusal", REFUSAL, refusals), ("task", TASK, tasks)):
            open_ = undecided if suite == "refusal" else 0
            self.held.found[number, suite] = {
                seed: [
                    Sample(
                        f"id{index}",
                        "",
                        "undecided" if count <= index < count + open_ else "decided",
                        "",
                        index < count,
                    )
                    for index in range(N)
                ]
                for seed, count in enumerate(counts)
            }
            seeds = tuple(count / N for count in counts) if len(counts) > 1 else ()
            found[name] = Metric(
                name, sum(counts), N * len(counts), open_ * len(counts), seeds=seeds
            )
        values = {"defence": defence, "train.rank": rank, AXES[defence]: knob}
        point = Point.of("small", values)
        return Result(number, point, "done", found, changed_share=0.5, same_as=same_as)


@pytest.fixture
def made() -> Made:
    return Made(Held())


@given(rows=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_the_mean_refusal_rate_at_equal_usefulness_is_the_hypervolume(rows):
    values = np.array(rows)
    found = area_R(values[:, :1], values[:, 1:])
    assert found[0] == pytest.approx(hypervolume(values), abs=1e-12)


def test_an_advantage_is_in_points_of_refusal_rate_at_equal_usefulness(made):
    one = made.result(1, [80], [50])
    other = made.result(2, [60], [50])
    training = Point.of("small", {"train.rank": 8})
    found = advantage({training: [one]}, {training: [[other]]}, REFUSAL, TASK, made.held)
    assert found.difference == pytest.approx(0.2)
    assert (found.adapters, found.trainings, found.seeds) == (1, 1, 1)
    assert found.interval[0] < found.difference < found.interval[1]
    assert found.move == "higher"
    back = advantage({training: [other]}, {training: [[one]]}, REFUSAL, TASK, made.held)
    assert back.difference == pytest.approx(-found.difference) and back.move == "lower"


def test_equal_sets_do_not_differ_and_the_prompts_bound_what_others_could_show(made):
    own = [made.result(number, [50 + number, 60], [70 - 9 * number, 50]) for number in range(3)]
    training = Point.of("small", {"train.rank": 8})
    found = advantage({training: own}, {training: [own]}, REFUSAL, TASK, made.held)
    assert found.interval == without_spread(0.0, N) and found.difference == 0.0
    assert found.interval[0] < 0 < found.interval[1]
    assert found.move == "not distinguishable" and found.adapters == 3 * 2


def test_a_set_does_not_win_by_having_more_adapters(made):
    """The best of many equal noisy adapters is compared as the best of equally many."""
    few = [made.result(number, [60 + number], [50]) for number in range(2)]
    many = [made.result(10 + number, [60 + number % 2], [50]) for number in range(8)]
    training = Point.of("small", {"train.rank": 8})
    found = advantage({training: many}, {training: [few]}, REFUSAL, TASK, made.held)
    # the mean over pairs of the eight is below the best of all
    assert found.difference < 0 and found.adapters == 2
    assert found.interval[0] < 0 < found.interval[1] + 1e-9


def test_undecided_samples_widen_both_ends(made):
    training = Point.of("small", {"train.rank": 8})

    def interval(undecided: int) -> tuple[float, float]:
        one = made.result(1, [70], [50], undecided=undecided)
        other = made.result(2, [60], [50], undecided=undecided)
        found = advantage({training: [one]}, {training: [[other]]}, REFUSAL, TASK, made.held)
        return found.interval

    sure, unsure = interval(0), interval(10)
    assert unsure[0] < sure[0] and sure[1] < unsure[1]


def test_without_samples_there_is_a_difference_and_no_interval_and_nothing_is_shown(made):
    one, other = made.result(1, [90], [50]), made.result(2, [10], [50])
    training = Point.of("small", {"train.rank": 8})
    found = advantage({training: [one]}, {training: [[other]]}, REFUSAL, TASK, Held())
    assert found.difference == pytest.approx(0.8) and found.interval is None
    assert found.move == "not distinguishable"
    assert advantage({training: [one]}, {}, REFUSAL, TASK, made.held) is None


def controls_for(made: Made, partners: Sequence[Result], less: int) -> list[ControlResult]:
    """Two draws of a control beside each partner, with fewer refusals."""
    found = []
    for partner in partners:
        refusals = [round(N * value) for value in partner.metrics[REFUSAL].seeds]
        tasks = [round(N * value) for value in partner.metrics[TASK].seeds]
        for draw in (0, 1):
            result = made.result(
                100 * (draw + 1) + partner.number,
                [count - less - draw for count in refusals],
                tasks,
            )
            found.append(control(partner, "random_modules", draw, result))
    return found


def test_a_control_stands_beside_the_settings_that_it_was_run_for_with_all_its_draws(made):
    results = [made.result(n, [90 - n, 90], [50 + n, 50], knob=n / 10) for n in range(1, 4)]
    controls = controls_for(made, results[:2], 20)
    (found,) = besides(results, controls)
    assert (found.defence, found.control) == ("safe_lora", "random_modules")
    assert [partner.number for partner in found.partners] == [1, 2]
    assert [[each.number for each in draw] for draw in found.draws] == [[101, 102], [201, 202]]
    (incomplete,) = besides(results, controls[:-1])  # the second setting lacks a draw
    assert [partner.number for partner in incomplete.partners] == [1]


def test_a_defence_is_compared_with_its_control_on_the_frontier_and_at_its_operating_point(
    made, study: Study
):
    results = [made.result(n, [96 - n, 95], [40 + 5 * n, 50], knob=n / 10) for n in range(1, 4)]
    (found,) = against_controls(study, results, controls_for(made, results, 20), made.held)
    assert found.advantage.move == "higher" and len(found.advantage.by_draw) == 2
    assert found.advantage.difference == pytest.approx(np.mean(found.advantage.by_draw))
    assert found.advantage.by_draw[0] < found.advantage.by_draw[1]
    assert found.point.number == 3  # the most useful that holds the floor of 90%
    refusal, task = found.at_point[REFUSAL], found.at_point[TASK]
    assert refusal.move == "higher" and refusal.difference == pytest.approx(0.205)
    assert refusal.paired is not None and refusal.paired.items == N
    assert task.move == "not distinguishable" and task.difference == 0
    same = against_controls(study, results, controls_for(made, results, 0)[::2], made.held)
    assert same[0].advantage.difference == 0 and same[0].at_point[REFUSAL].difference == 0


def test_a_study_without_controls_has_nothing_beside_its_defences(made, study: Study):
    assert against_controls(study, [made.result(1, [95], [50])], [], made.held) == []


def test_defences_are_compared_over_the_trainings_that_both_have(made, study: Study):
    results = [
        made.result(0, [90], [50], "safe_lora", 0.4),
        made.result(1, [92], [50], "safe_lora", 0.5, rank=16),
        made.result(2, [70], [50], "scale", 0.5),
        made.result(3, [70], [50], "scale", 0.5001, same_as=2),
    ]
    (found,) = against_defences(study, results, made.held)
    assert (found.defence, found.other, found.is_control) == ("safe_lora", "scale", False)
    assert found.advantage.trainings == 1 and found.advantage.adapters == 1
    assert found.advantage.difference == pytest.approx(0.2)
    assert [each.number for each in defended(results, "small")["scale"]] == [2]


def test_an_adapter_that_two_trainings_give_is_one_of_each(made, study: Study):
    """All modules dropped, or a factor of 0: the aligned model, whatever the training was."""
    results = [
        made.result(0, [95], [20], "drop"),
        made.result(1, [60], [50], "scale"),
        made.result(2, [95], [20], "drop", rank=16, same_as=0),
        made.result(3, [60], [50], "scale", rank=16),
    ]
    assert [each.number for each in defended(results, "small")["drop"]] == [0, 2]
    (found,) = against_defences(study, results, made.held)
    assert found.advantage.trainings == 2 and found.advantage.adapters == 2


def test_a_pair_of_defences_is_compared_the_same_way_round_whichever_was_tried_first(
    made, study: Study
):
    results = [
        made.result(0, [70], [50], "scale", 0.5),
        made.result(1, [90], [50], "safe_lora", 0.4),
    ]
    (found,) = against_defences(study, results, made.held)
    assert (found.defence, found.other) == ("safe_lora", "scale")
    assert found.advantage.difference == pytest.approx(0.2)


def test_usefulness_that_only_one_set_reaches_says_nothing_of_its_refusals(made):
    training = Point.of("small", {"train.rank": 8})
    one, other = made.result(1, [60], [90]), made.result(2, [60], [40])
    found = advantage({training: [one]}, {training: [[other]]}, REFUSAL, TASK, made.held)
    assert found.difference == 0.0 and found.move == "not distinguishable"
    useless = made.result(3, [60], [0])
    assert advantage({training: [one]}, {training: [[useless]]}, REFUSAL, TASK, made.held) is None


def test_draws_of_a_control_are_no_training_seeds(made, study: Study):
    """Three draws with the numbers of one control say what that control says."""
    partner = made.result(1, [95, 75, 88], [50, 50, 50])
    once = [control(partner, "shrink_matched", None, made.result(2, [75, 70, 86], [50, 50, 50]))]
    drawn = [
        control(partner, "random_subspace", draw, made.result(10 + draw, [75, 70, 86], [50] * 3))
        for draw in range(3)
    ]
    first, second = against_controls(study, [partner], [*once, *drawn], made.held)
    assert {first.other, second.other} == {"shrink_matched", "random_subspace"}
    for each in (first, second):
        found = each.at_point[REFUSAL]
        assert found.between.seeds == 3 and found.between.freedom == 2
        assert found.move == each.advantage.move == "not distinguishable"
        assert each.advantage.is_about_setting
    assert first.at_point[REFUSAL].interval == pytest.approx(second.at_point[REFUSAL].interval)
    without = against_controls(study, [partner], [*once, *drawn], Held())
    assert {each.at_point[REFUSAL].between.seeds for each in without} == {3}


def test_one_seed_with_three_draws_is_about_the_measured_adapters(made, study: Study):
    partner = made.result(1, [95], [50])
    drawn = [
        control(partner, "random_subspace", draw, made.result(10 + draw, [75 - draw], [50]))
        for draw in range(3)
    ]
    (found,) = against_controls(study, [partner], drawn, made.held)
    assert not found.at_point[REFUSAL].is_about_setting and not found.advantage.is_about_setting


def test_settings_that_do_not_differ_are_called_different_in_few_studies(made, study: Study):
    """Refusals vary by 12 points between seeds; a defence and its control are drawn alike."""
    rng, called, studies = np.random.default_rng(0), 0, 60
    for _ in range(studies):
        rates = np.clip(rng.normal(0.7, 0.12, (2, 3)), 0, 1)
        refusals = (rates * N).round().astype(int)
        mine = made.result(1, refusals[0].tolist(), [50] * 3)
        theirs = made.result(2, refusals[1].tolist(), [50] * 3)
        training = Point.of("small", {"train.rank": 8})
        found = advantage({training: [mine]}, {training: [[theirs]]}, REFUSAL, TASK, made.held)
        called += found.move != "not distinguishable"
    assert called <= 6  # 60 draws at 5% exceed 6 in 3 of 100


def test_equal_draws_have_an_interval_that_other_prompts_allow(made):
    own = made.result(1, [70, 60, 65], [50, 40, 45])
    training = Point.of("small", {"train.rank": 8})
    found = advantage({training: [own]}, {training: [[own]] * 3}, REFUSAL, TASK, made.held)
    assert found.interval == pytest.approx(without_spread(0.0, N))


def test_random_modules_of_an_adapter_that_was_changed_whole_are_no_control(made):
    partner = replace(made.result(1, [95], [50]), changed_share=1.0)
    drawn = [control(partner, "random_modules", 0, made.result(10, [95], [50]))]
    assert besides([partner], drawn) == []


def test_comparisons_that_are_reported_together_are_corrected_together(made):
    training = Point.of("small", {"train.rank": 8})
    one, other = made.result(1, [68], [50]), made.result(2, [60], [50])
    found = advantage({training: [one]}, {training: [[other]]}, REFUSAL, TASK, made.held)
    assert found.move == "higher" and found.p_value is not None
    weak = replace(found, p_value=0.03)
    fair = together_corrected([weak, None, *[replace(found, p_value=0.9)] * 4])
    assert fair[0].corrected_p == pytest.approx(0.15) and fair[0].move == "not distinguishable"


def test_what_scaling_explains_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(5, 4)), 0.3 * rng.normal(size=(5, 4))
    cosine = float((old * new).sum() / np.linalg.norm(old) / np.linalg.norm(new))
    ratio = float(np.linalg.norm(new) / np.linalg.norm(old))
    change = new - old
    best = (change * old).sum() / (old * old).sum()
    unexplained = ((change - best * old) ** 2).sum() / (change**2).sum()
    assert explained_by_scaling(cosine, ratio) == pytest.approx(1 - unexplained)
    assert explained_by_scaling(1.0, 1.0) is None
    assert explained_by_scaling(1.0, 0.2) == pytest.approx(1.0)


def test_the_table_of_modules_has_the_changed_ones_by_type(tmp_path):
    rows = {
        "layers.0.q_proj": ModuleRow(0.3, 0.05),
        "layers.1.q_proj": ModuleRow(0.5, 0.15),
        "layers.1.v_proj": ModuleRow(0.9, 0.2),
    }
    chosen = frozenset({"layers.0.q_proj", "layers.1.q_proj"})
    effects = {"point 3": of_projection(ProjectedRows(rows, chosen))}
    (row,) = effect_cells(effects).to_dict("records")
    assert (row["module type"], row["changed"]) == ("q_proj", "2")
    assert row["cosine"] == "0.40 [0.30, 0.50]" and row["norm ratio"] == "0.100 [0.050, 0.150]"
    assert ratio_range(effects) == (0.05, 0.15)
    effect = {"cosine": 0.1, "norm_ratio": 0.5, "change_explained": 0.9, "norm_before": 1.0}
    (tmp_path / "effects.json").write_text(
        json.dumps(
            {"a": {"changed": True, "effect": effect}, "b": {"changed": False, "effect": effect}}
        )
    )
    assert of_file(tmp_path / "effects.json") == {"a": ModuleEffect(0.1, 0.5, 0.9)}


def test_a_pick_prefers_the_simplest_defence_within_the_margin_and_says_instead_of_what(made):
    results = [
        made.result(1, [95], [60]),
        made.result(2, [95], [59], "scale"),
        made.result(3, [95], [60], "drop"),
        made.result(4, [80], [90], "scale", 0.9),  # it misses the floor
    ]
    floors = [Floor(REFUSAL, 0.9)]
    found = pick(results, floors, TASK, margin=0.02)
    assert found.result.number == 2 and found.instead_of.number == 1
    assert preferred(found) == (
        "preferred to point 1 (rank=8 safe_lora 0.5; 50% of modules projected), "
        "whose task accuracy is 1.0 points higher: scale is simpler than Safe LoRA, and the margin "
        "is 2.0 points"
    )
    closer = pick(results, floors, TASK, margin=0.005)
    assert closer.result.number == 3  # drop is simpler than Safe LoRA, and as useful
    without = pick(results, floors, TASK)
    assert without.result.number == 1 and without.instead_of is None and preferred(without) is None
    best = pick(results[1:2], floors, TASK, margin=0.02)
    assert best.instead_of is None
