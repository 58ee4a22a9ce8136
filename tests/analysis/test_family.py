"""All comparisons of a report are one family: each p-value is corrected for all of them, once."""

from dataclasses import replace

import pytest

from ebbline.analysis.report.answer import answer, meaning
from ebbline.analysis.report.report import summary
from ebbline.analysis.report.short_answer import in_short
from ebbline.analysis.results.before_after import Line
from ebbline.analysis.results.claims.family import family, one_family
from ebbline.analysis.results.claims.refusal_moves import RefusalMoves
from ebbline.analysis.results.defended.advantage import Advantage
from ebbline.analysis.results.defended.beside import Against
from ebbline.analysis.results.measurements import Comparison
from ebbline.analysis.results.statistics import Paired
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import Metric
from tests.analysis.conftest import REFUSAL, result

BEFORE, AFTER = Metric("refusal_rate", 190, 200), Metric("refusal_rate", 100, 200)


def compared(p_value: float | None) -> Comparison:
    """A drop of 45 points whose intervals are apart."""
    return Comparison(BEFORE, AFTER, "lower", p_value=p_value)


def advantage(p_value: float) -> Advantage:
    return Advantage(0.2, (0.1, 0.3), 3, 1, 3, (0.2,), p_value)


def test_each_p_value_is_corrected_for_those_of_all_tables() -> None:
    line = Line("7b", REFUSAL, {}, {"fine-tuning": compared(0.04), "both": compared(None)})
    moves = {"7b": RefusalMoves([compared(0.9)], [compared(0.8), compared(0.001)], 1, 2)}
    against = [Against("7b", "safe_lora", "scale", True, advantage(0.04), None, {})]
    alone = one_family([line], {}, [])
    assert alone.size == 1 and alone.lines[0].changes["fine-tuning"].move == "lower"
    found = one_family([line], moves, against)
    assert found.size == 5
    assert found.lines[0].changes["fine-tuning"].move == "not distinguishable"
    assert found.lines[0].changes["both"].move == "lower", "its intervals decide, without a test"
    assert [each.move for each in found.moves["7b"].by_defence] == [
        "not distinguishable",
        "lower",
    ]
    (pair,) = found.against
    assert pair.advantage is not None and pair.advantage.move == "not distinguishable"
    assert pair.advantage.corrected_p == pytest.approx(0.04 * 5 / 3)
    assert pair.advantage.p_value == 0.04


def test_correcting_twice_changes_nothing() -> None:
    line = Line("7b", REFUSAL, {}, {"fine-tuning": compared(0.04)})
    against = [Against("7b", "safe_lora", "scale", True, advantage(0.03), None, {})]
    once = one_family([line], {}, against)
    assert one_family(once.lines, once.moves, once.against) == once


def test_the_size_of_the_family_is_stated() -> None:
    paired = replace(
        compared(0.01), paired=Paired(200, 200, 100, 90, 0, 10, -0.45, (-0.5, -0.4), 0.001)
    )
    assert "for the whole family: all 7 tests of this report" in meaning([paired], 7)
    assert "all models of the same sentences" in meaning([paired])


def test_every_text_of_a_report_has_the_verdicts_of_the_family(study: Study) -> None:
    rows = [result(0, refusal=0.5), result(1, refusal=0.9, share=0.5, threshold=0.5)]
    aligned = {"small": {REFUSAL: Metric("refusal_rate", 190, 200)}}
    of = family(study, rows, aligned)
    found = summary(study, rows, aligned)
    assert found["tests_in_family"] == of.size
    assert found["answer"] == answer(study, rows, aligned, of=of)
    assert found["in_short"] == in_short(study, rows, aligned, of.lines, moves=of.moves)
