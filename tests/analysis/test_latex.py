"""The LaTeX tables: their content, that any name compiles, and that they fit their column."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ebbline.analysis.paper.latex import (
    ROWS,
    before_after_table,
    conditions,
    escaped,
    frontier_table,
    headlines,
    in_latex,
)
from ebbline.analysis.results.measurements import Baselines
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.study import Study
from tests.analysis.conftest import REFUSAL, TASK, failed, result
from tests.latex import compiled, needs_latex

AWKWARD = r"100%_&#$^~{}\<|>"


def rows(table: str) -> list[list[str]]:
    """The cells of a table's body."""
    body = table.partition(r"\midrule")[2].partition(r"\bottomrule")[0]
    return [
        line.removesuffix(r" \\").split(" & ")
        for line in body.strip().split("\n")
        if line != r"\addlinespace"
    ]


def test_the_frontier_table_has_each_model_s_frontier_with_intervals(study: Study) -> None:
    found = [
        result(0, refusal=0.2, task=0.8),
        result(1, refusal=0.9, task=0.6, share=0.25, threshold=0.5),
        result(2, refusal=0.1, task=0.5),
    ]
    assert rows(frontier_table(study, found, narrow=False)) == [
        ["small", "none", "none", "20.0 [15.0, 26.1]", "80.0 [73.9, 85.0]", r"$\ast$"],
        ["", "0.5", r"25\%", "90.0 [85.1, 93.4]", "60.0 [53.1, 66.5]", r"$\ast$"],
    ]
    assert "All rows: size = 100, rank = 8." in frontier_table(study, found, narrow=False)


def test_the_narrow_table_has_the_same_numbers_in_less_space(study: Study) -> None:
    assert (
        rows(frontier_table(study, [result(0, refusal=0.2)], narrow=True))[0][-2]
        == "$50.0_{43.1}^{56.9}$"
    )


def test_before_and_after_compares_the_point_to_ship_with_its_own_training(
    study: Study, results: list[Result], baselines: Baselines
) -> None:
    found = [
        (row.model, row.what, row.result and row.result.number)
        for row in conditions(study, results, baselines)
    ]
    by_model = {
        model: [(what, number) for name, what, number in found if name == model]
        for model in ("small", "medium")
    }
    assert [what for what, _ in by_model["small"]] == ["before", "fine-tuned", "defended"]
    tuned, projected = (
        dict(results[by_model["small"][index][1] or 0].point.values) for index in (1, 2)
    )
    assert (
        tuned.pop("apply.threshold") is None
        and projected.pop("apply.threshold") is not None
        and tuned == projected
    )


def test_a_missing_value_is_a_dash_and_never_a_zero(
    study: Study, results: list[Result], baselines: Baselines
) -> None:
    wider = study.model_copy(
        update={
            "suites": {
                **study.suites,
                "mmlu": _multiple_choice("mmlu"),
                "hella": _multiple_choice("hellaswag"),
            }
        }
    )
    assert headlines(wider) == [REFUSAL, TASK, "mmlu.acc", "hella.acc_norm"]
    assert all(
        row[-2:] == ["--", "--"]
        for row in rows(before_after_table(wider, results, baselines, narrow=False))
    )
    assert rows(before_after_table(study, results, {}, narrow=False))[0][1] == "fine-tuned"


def _multiple_choice(task: str):  # type: ignore[no-untyped-def]
    from ebbline.sweeps.study.study import SuiteEntry

    return SuiteEntry.model_validate(
        {"prompts": {"language": task}, "measure": {"kind": "multiple_choice", "task": task}}
    )


def test_failed_points_are_in_no_table(
    study: Study, results: list[Result], baselines: Baselines
) -> None:
    without = [found for found in results if found.status == "done"]
    assert frontier_table(study, results, True) == frontier_table(study, without, True)
    assert "64" not in frontier_table(study, [result(0), failed(1)], True)


@pytest.mark.process
@needs_latex
@pytest.mark.parametrize("style", ["neurips", "acl"])
def test_any_name_compiles_and_the_tables_fit(
    style: str, study: Study, results: list[Result], baselines: Baselines, tmp_path: Path
) -> None:
    awkward = study.model_copy(update={"study": AWKWARD})
    odd = [
        replace(
            found,
            point=Point.of(
                found.point.model, {**dict(found.point.values), "train.odd_&_%": AWKWARD}
            ),
        )
        for found in results[:12]
    ]
    body = frontier_table(awkward, odd, style == "acl") + before_after_table(
        awkward, results, baselines, style == "acl"
    )
    labels = re.sub(
        r"\\label\{.*\}", "", body
    )  # a study's name may hold no such letters: ebbline.sweeps.study.study.Name
    assert "Overfull" not in compiled(style, labels, tmp_path)


@pytest.mark.process
@needs_latex
def test_a_table_that_is_too_wide_is_shrunk_to_its_column(study: Study, tmp_path: Path) -> None:
    values = {f"train.setting{index}": f"a rather long value {index}" for index in range(12)}
    other = {**values, **{axis: f"{value}, changed" for axis, value in values.items()}}
    wide = [
        replace(result(0, refusal=0.2, task=0.8), point=Point.of("small", values)),
        replace(result(1, refusal=0.8, task=0.2), point=Point.of("small", other)),
    ]
    assert "Overfull" not in compiled("acl", frontier_table(study, wide, True), tmp_path)


def test_a_continued_float_begins_with_its_model_s_name(study: Study) -> None:
    many = [result(n, refusal=n / 200, task=1 - n / 200, rank=n + 1) for n in range(ROWS + 5)]
    floats = frontier_table(study, many, True).split(r"\begin{table}")[1:]
    assert [[row[0] for row in rows(part)[:2]] for part in floats] == 2 * [["small", ""]]


@pytest.mark.process
@needs_latex
def test_a_long_frontier_continues_in_another_float(study: Study, tmp_path: Path) -> None:
    many = [result(n, refusal=n / 200, task=1 - n / 200, rank=n + 1) for n in range(2 * ROWS + 5)]
    table = frontier_table(study, many, True)
    assert [len(rows(part)) for part in table.split(r"\begin{table}")[1:]] == [ROWS, ROWS, 5]
    log = compiled("acl", table, tmp_path)
    assert "Overfull" not in log and "too large for page" not in log and "multiply" not in log


def test_special_characters_are_escaped_for_latex() -> None:
    assert escaped("50%_a&b") == r"50\%\_a\&b" and escaped("\\{") == r"\textbackslash{}\{"


def test_text_becomes_latex_with_its_titles_and_citations() -> None:
    breaks = r"\allowbreak ".join(["abababab"] * 5)
    text = (
        f"# Title\n\nPlain [@one] and 5% of it.\n\n**Bold.** With [@one; @two_b] and {'ab' * 20}.\n"
    )
    assert in_latex(text).split("\n\n") == [
        r"{\sloppy",
        "% Title",
        r"Plain~\cite{one} and 5\% of it.",
        rf"\paragraph{{Bold.}} With~\cite{{one,two_b}} and {breaks}.",
        "\\par}\n",
    ]


def test_the_caption_describes_only_rows_of_the_table(
    study: Study, results: list[Result], baselines: Baselines
) -> None:
    def caption(of: Study, rows: list[Result], before: Baselines = baselines) -> str:
        return before_after_table(of, rows, before, narrow=False)

    only_task = study.model_copy(
        update={"objectives": (TASK,), "suites": {"task": study.suites["task"]}}
    )
    shown = caption(study, results)
    assert "refusal floor of 90" in shown and "These points were picked" in shown
    without = caption(only_task, results)
    assert (
        "floor" not in without
        and "These points were picked" not in without
        and "Projected:" not in without
    )
    assert (
        "Fine-tuned: each model's first point without a defence. No defended "
        "point was picked, as no refusal" in without
    )
    assert "No point was defended." in caption(study, [result(0)]) and "floor" not in caption(
        study, [result(0)]
    )
    assert "Fine-tuned:" not in caption(study, []) and " ." not in caption(study, [])
