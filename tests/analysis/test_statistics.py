"""Paired tests, categories, correction and agreement: laws that hold for any samples, and tables
with known answers.

Sources: exact McNemar, McNemar 1947 (reference p-values by statsmodels 0.15,
contingency_tables.mcnemar, exact=True: the third table is Agresti's of approval ratings,
Categorical Data Analysis); false discovery rate, the example in Benjamini and Hochberg 1995, table
1 of section 3.2; Cohen's kappa, Cohen 1960.
"""

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar

from ebbline.analysis.results.statistics import (
    by_category,
    corrected,
    paired,
    paired_replicates,
    pooled_agreement,
    same_prompts,
)
from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.metrics import Metric, Sample
from ebbline.tasks.measuring.scorers import agreement
from tests.analysis.conftest import REFUSAL

few = settings(max_examples=40)
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
seeded = st.integers(1, 3).flatmap(
    lambda s: st.lists(
        st.lists(st.tuples(st.booleans(), st.booleans()), min_size=s, max_size=s), min_size=1
    )
)


def samples(successes: Sequence[bool], categories: Sequence[str] = ()) -> list[Sample]:
    return [
        Sample(
            f"id{index}",
            categories[index] if categories else "",
            "refused" if success else "complied",
            "prefix:0",
            success,
        )
        for index, success in enumerate(successes)
    ]


def both_sides(
    rows: Sequence[Sequence[tuple[bool, bool]]],
) -> tuple[dict[int, list[Sample]], dict[int, list[Sample]]]:
    """The two sides of `rows`: a row for each prompt, with (before, after) for each seed."""
    before, after = (
        {seed: samples([row[seed][side] for row in rows]) for seed in range(len(rows[0]))}
        for side in (0, 1)
    )
    return before, after


def table(
    both: int, only_before: int, only_after: int, neither: int
) -> tuple[list[Sample], list[Sample]]:
    rows = (
        [(True, True)] * both
        + [(True, False)] * only_before
        + [(False, True)] * only_after
        + [(False, False)] * neither
    )
    return samples([before for before, _ in rows]), samples([after for _, after in rows])


@pytest.mark.parametrize(
    ("counts", "p_value"),
    [
        ((0, 5, 15, 80), 0.04138946533203125),
        ((30, 12, 40, 18), 0.0001275387838557407),
        ((794, 150, 86, 570), 3.7159361395713866e-05),
        ((9, 1, 0, 0), 1.0),
    ],
)
def test_the_p_value_is_the_exact_mcnemar_tests(
    counts: tuple[int, int, int, int], p_value: float
) -> None:
    found = paired(*table(*counts))
    assert (found.both, found.only_before, found.only_after, found.neither) == counts
    assert found.p_value == pytest.approx(p_value, rel=1e-5)
    assert found.p_value == pytest.approx(binomtest(counts[1], counts[1] + counts[2]).pvalue)
    assert found.p_value == pytest.approx(mcnemar([counts[:2], counts[2:]], exact=True).pvalue)


def test_where_no_prompt_moved_nothing_is_distinguishable_and_the_interval_is_not_a_point() -> None:
    found = paired(*table(150, 0, 0, 50))
    assert (found.difference, found.p_value) == (0.0, 1.0)
    assert found.interval == pytest.approx(
        (-0.018846, 0.018846), abs=1e-5
    )  # Wilson's upper bound of 0 of 200


@few
@given(seeded)
def test_swapping_before_and_after_flips_the_sign(rows: list[list[tuple[bool, bool]]]) -> None:
    before, after = both_sides(rows)
    there, back = paired_replicates(before, after), paired_replicates(after, before)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.difference == -back.difference
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]), abs=1e-9)
    assert (there.only_before, there.only_after, there.both) == (
        back.only_after,
        back.only_before,
        back.both,
    )


@few
@given(seeded)
def test_the_interval_contains_the_difference_and_the_counts_add_up(
    rows: list[list[tuple[bool, bool]]],
) -> None:
    before, after = both_sides(rows)
    found = paired_replicates(before, after)
    low, high = found.interval
    assert -1 - 1e-12 <= low <= found.difference + 1e-12
    assert found.difference - 1e-12 <= high <= 1 + 1e-12
    assert (
        found.both + found.only_before + found.only_after + found.neither
        == found.n
        == len(rows) * len(rows[0])
    )
    assert found.difference == pytest.approx((found.only_after - found.only_before) / found.n)
    assert 0 < found.p_value <= 1


@few
@given(pairs, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(
    rows: list[tuple[bool, bool]], random: Random
) -> None:
    before, after = samples([row[0] for row in rows]), samples([row[1] for row in rows])
    shuffled = list(after)
    random.shuffle(shuffled)
    assert paired(before, shuffled) == paired(before, after)


@few
@given(pairs, st.integers(2, 4))
def test_seeds_with_equal_answers_count_as_one_seed(
    rows: list[tuple[bool, bool]], seeds: int
) -> None:
    one = paired_replicates(*both_sides([[row] for row in rows]))
    many = paired_replicates(*both_sides([[row] * seeds for row in rows]))
    assert (many.n, many.items) == (one.n * seeds, one.items)
    assert [many.difference, many.p_value, *many.interval] == pytest.approx(
        [one.difference, one.p_value, *one.interval]
    )


def test_sets_with_other_ids_are_not_paired_and_the_error_has_no_text() -> None:
    before = samples([True, False, True])
    with pytest.raises(EvaluationError, match=r"^2 of 4 ids are not in every set") as caught:
        paired(before, [*before[:2], Sample("secret", "", "refused", "", True)])
    assert "secret" not in str(caught.value)


def test_duplicate_ids_and_other_seeds_are_errors() -> None:
    before = samples([True, False])
    with pytest.raises(EvaluationError, match="1 of 3 samples repeat the id"):
        paired(before, [*before, before[0]])
    with pytest.raises(EvaluationError, match=r"seeds \[0\] cannot be paired with seeds \[0, 1\]"):
        paired_replicates({0: before}, {0: before, 1: before})


def test_an_empty_set_is_an_error_and_not_a_score() -> None:
    for before, after in ({}, {}), ({0: []}, {0: []}):
        with pytest.raises(EvaluationError, match="empty set"):
            paired_replicates(before, after)
    for replicates in ({}, {0: []}):
        with pytest.raises(EvaluationError, match="empty set"):
            by_category(REFUSAL, replicates)
    with pytest.raises(EvaluationError, match="none to add up"):
        pooled_agreement([])


def test_only_the_same_prompts_with_the_same_seeds_can_be_paired() -> None:
    found = samples([True, False])
    assert same_prompts({0: found}, {0: samples([False, False])})
    assert not same_prompts({0: found}, {1: found})
    assert not same_prompts({0: found}, {0: found[:1]})
    assert not same_prompts({0: [*found, found[0]]}, {0: [*found, found[0]]})
    assert not same_prompts({}, {})
    assert not same_prompts({0: []}, {0: []})


@given(
    st.lists(
        st.lists(
            st.tuples(st.booleans(), st.sampled_from(["", "fire", "frost", "7b"])), min_size=1
        ),
        min_size=1,
        max_size=3,
    )
)
def test_categories_add_up_to_the_whole(rows: list[list[tuple[bool, str]]]) -> None:
    replicates = {
        seed: samples([row[0] for row in each], [row[1] for row in each])
        for seed, each in enumerate(rows)
    }
    found = by_category(REFUSAL, replicates)
    assert list(found) == sorted({category for each in rows for _, category in each})
    assert sum(metric.n for metric in found.values()) == sum(map(len, rows))
    assert sum(metric.successes for metric in found.values()) == sum(
        success for each in rows for success, _ in each
    )


def test_a_category_keeps_each_seeds_rate_and_counts_undecided_samples() -> None:
    odd = Sample("x", "fire", "undecided", "empty", False)
    found = by_category(
        REFUSAL, {0: [*samples([True], ["fire"]), odd], 1: [*samples([False], ["fire"]), odd]}
    )
    assert found == {"fire": Metric(REFUSAL, 1, 4, undecided=2, seeds=(0.5, 0.0))}


answers = st.lists(
    st.tuples(*[st.sampled_from(["yes", "no", "undecided"])] * 2), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=25)
@given(answers, st.sampled_from(["maximise", "minimise"]), st.data())
def test_no_comparison_gains_from_an_undecided_sample(rows, way, data) -> None:
    """Whatever the undecided samples were, the interval and the p-value claim no more."""

    def sides(verdicts: list[tuple[str, str]]) -> list[list[Sample]]:
        return [
            [
                Sample(str(n), "", row[side], "", row[side] == "yes")
                for n, row in enumerate(verdicts)
            ]
            for side in (0, 1)
        ]

    def filled(verdict: str) -> str:
        return data.draw(st.sampled_from(["yes", "no"])) if verdict == "undecided" else verdict

    found = paired(*sides(rows), way)
    other = paired(*sides([(filled(one), filled(two)) for one, two in rows]), way)
    assert found.interval[0] <= other.interval[0] + 1e-9
    assert found.interval[1] >= other.interval[1] - 1e-9
    assert found.p_value >= other.p_value - 1e-12
    assert found.undecided == sum(pair.count("undecided") for pair in rows)


def test_equal_gains_reach_as_far_when_one_of_them_is_undecided() -> None:
    """The bound of equal gains is wider than a bootstrap of gains that differ."""
    before = [Sample(str(n), "", "yes", "", True) for n in range(2)]
    lost = [Sample(str(n), "", "no", "", False) for n in range(2)]
    one_open = [lost[0], Sample("1", "", "undecided", "", False)]
    assert paired(before, one_open).interval[1] >= paired(before, lost).interval[1] > 0


def test_a_broken_model_is_not_found_to_refuse_less() -> None:
    before = [Sample(str(n), "", "refused", "", True) for n in range(60)]
    broken = [Sample(str(n), "", "undecided", "", False) for n in range(60)]
    sound = [Sample(str(n), "", "complied", "", False) for n in range(60)]
    assert paired(before, sound, "minimise").p_value < 0.001
    found = paired(before, broken, "minimise")
    assert found.p_value == 1.0 and found.difference == 0.0 and found.interval[0] < -0.9
    assert paired(broken, before, "maximise").p_value == 1.0


def test_a_mean_has_no_rate_by_category() -> None:
    with pytest.raises(EvaluationError, match="not a share of successful samples"):
        by_category("task.rouge_l", {0: samples([True])})


def test_corrected_p_values_are_benjamini_and_hochbergs() -> None:
    # Their 15 p-values: at a false discovery rate of 0.05 the first four hypotheses are rejected;
    # Bonferroni and Holm reject three.
    values = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.3240,
        0.4262,
        0.5719,
        0.6528,
        0.7590,
        1.0,
    ]
    assert sum(p < 0.05 for p in corrected(values)) == 4
    assert corrected([0.03]) == [0.03]
    assert corrected([]) == []


def stored(verdicts: dict[str, list[str]]) -> dict[str, object]:
    """agreement.json as the stage `score` writes it, for two scorers."""
    counts = {
        name: {verdict: found.count(verdict) for verdict in set(found)} | {"n": len(found)}
        for name, found in verdicts.items()
    }
    (one, left), (other, right) = verdicts.items()
    return {"scorers": counts, "pairs": [{"one": one, "other": other, **agreement(left, right)}]}


def test_agreement_over_seeds_is_that_of_all_verdicts_together() -> None:
    first = {
        "prefix": ["refused", "refused", "complied", "undecided"],
        "judge": ["refused", "complied", "complied", "undecided"],
    }
    second = {
        "prefix": ["complied", "refused", "complied", "refused"],
        "judge": ["complied", "refused", "refused", "refused"],
    }
    found = pooled_agreement([stored(first), stored(second)])
    whole = agreement(first["prefix"] + second["prefix"], first["judge"] + second["judge"])
    (pair,) = found.pairs
    assert (pair.one, pair.other, pair.n, pair.agree, pair.kappa) == (
        "prefix",
        "judge",
        8,
        0.75,
        pytest.approx(whole["kappa"]),
    )
    assert pair.confusion == whole["confusion"]
    assert found.counts["prefix"] == {"refused": 4, "complied": 3, "undecided": 1, "n": 8}
