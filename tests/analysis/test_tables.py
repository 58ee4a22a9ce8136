"""The tables: every point has a row, a missing value stays missing, and the terminal's table is
golden.
"""

import random
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from ebbline.analysis.paper.latex import frontier_table
from ebbline.analysis.results.measurements import NO_EVIDENCE
from ebbline.analysis.results.statistics import pooled_agreement
from ebbline.analysis.results.tables import (
    ALIGNED,
    MEASURED_COLUMNS,
    agreement_cells,
    categories_frame,
    category_cells,
    frontier_text,
    in_points,
    metric_cell,
    results_frame,
    write_categories,
    write_tables,
)
from ebbline.analysis.results.wording import measured
from ebbline.cluster.profile import GpuType, Profile
from ebbline.cluster.schedule.costs import Cost
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.suites import TaskSuite
from ebbline.tasks.measuring.metrics import Metric
from ebbline.tasks.measuring.scorers import agreement
from tests.analysis.conftest import REFUSAL, TASK, Held, failed, rate, result, share

OBJECTIVES = (REFUSAL, TASK)
GOLDEN = Path(__file__).parent / "golden" / "frontier.txt"


def test_the_terminal_table_is_the_golden_one(results: list[Result]) -> None:
    assert frontier_text(results_frame(results, OBJECTIVES)) + "\n" == GOLDEN.read_text()


@pytest.mark.parametrize("width", [40, 80, 100, 120, 200, None])
def test_a_narrow_terminal_has_the_objectives_and_names_what_it_leaves_out(
    results: list[Result], width: int | None
) -> None:
    frame = results_frame(results, OBJECTIVES)
    lines = frontier_text(frame, OBJECTIVES, width).splitlines()
    table = lines[: lines.index("") - (width in (40, 80, 100))]
    assert lines[0].split("  ")[0] == "point"
    if width is None or width == 200:
        assert "over refusal rate (harmless) %" in lines[0] and "--wide" not in "".join(lines)
    elif width >= 80:
        assert max(map(len, table)) <= width
        assert "refusal rate %" in lines[0] and "task accuracy %" in lines[0]
    if width is not None and width <= 100:
        (left_out,) = (line for line in lines if "--wide shows all" in line)
        assert "over refusal rate (harmless) %" in left_out


def test_the_row_order_is_the_points_order_however_they_finished(results: list[Result]) -> None:
    shuffled = list(results)
    random.Random(0).shuffle(shuffled)
    pd.testing.assert_frame_equal(
        results_frame(shuffled, OBJECTIVES), results_frame(results, OBJECTIVES)
    )


def test_a_failed_point_has_a_row_with_its_reason_and_no_numbers() -> None:
    frame = results_frame([result(0), failed(1, "out of memory")], OBJECTIVES)
    row = frame.iloc[1]
    assert (row["status"], row["reason"]) == ("failed", "out of memory")
    assert row[[REFUSAL, f"{REFUSAL}_low", f"{REFUSAL}_n", "projected_share"]].isna().all()
    assert not row["on_frontier"]


def test_intervals_counts_and_seed_spread_are_columns_beside_the_value() -> None:
    metric = Metric(REFUSAL, 90, 100, undecided=3, seeds=(0.88, 0.92))
    row = results_frame([Result(0, result(0).point, "done", {REFUSAL: metric})], [REFUSAL]).iloc[0]
    assert (row[REFUSAL], row[f"{REFUSAL}_n"], row[f"{REFUSAL}_undecided"]) == (0.9, 100, 3)
    assert row[f"{REFUSAL}_low"] < 0.9 < row[f"{REFUSAL}_high"]
    assert row[f"{REFUSAL}_seed_sd"] == pytest.approx(0.0282842712)
    assert row[f"{REFUSAL}_stderr"] == pytest.approx(metric.stderr)


def test_one_seed_has_no_spread_rather_than_a_spread_of_zero() -> None:
    assert results_frame([result(0)], OBJECTIVES)[f"{REFUSAL}_seed_sd"].isna().all()


def test_an_absent_threshold_stays_missing_and_is_not_zero() -> None:
    frame = results_frame([result(0), result(1, threshold=0.0, share=0.1)], OBJECTIVES)
    assert frame["apply.threshold"].isna().tolist() == [True, False]


def test_only_measured_columns_differ_after_a_resumed_run() -> None:
    undisturbed, resumed = result(0), result(0)
    object.__setattr__(resumed, "seconds", 99.0)
    object.__setattr__(undisturbed, "costs", {"a": Cost({"A100": 60.0})})
    object.__setattr__(resumed, "costs", {"a": Cost({"A100": 99.0})})
    prices = Profile(gpus={"A100": GpuType(usd_per_hour=1.5)})
    before, after = (results_frame([found], OBJECTIVES, prices) for found in (undisturbed, resumed))
    differing = [name for name in before if not before[name].equals(after[name])]
    assert tuple(differing) == MEASURED_COLUMNS


def test_stage_keys_are_columns(results: list[Result]) -> None:
    frame = results_frame(results, OBJECTIVES)
    assert frame.loc[0, "train[seed=0]"] == results[0].keys["train[seed=0]"]


def test_files_read_back_as_they_were_written(results: list[Result], tmp_path: Path) -> None:
    frame = results_frame(results, OBJECTIVES)
    paths = write_tables(frame, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "results.parquet"), frame)
    assert len(pd.read_csv(tmp_path / "results.csv")) == len(results)
    chosen = pd.read_csv(tmp_path / "frontier.csv")
    assert 0 < len(chosen) < len(results)
    assert (chosen["on_frontier"] | chosen["on_model_frontier"]).all()


def test_writing_twice_gives_the_same_bytes(results: list[Result], tmp_path: Path) -> None:
    frame = results_frame(results, OBJECTIVES)
    first = [path.read_bytes() for path in write_tables(frame, tmp_path / "a")]
    assert [path.read_bytes() for path in write_tables(frame, tmp_path / "b")] == first


@pytest.mark.parametrize("results", [[], [failed(0), failed(1)]], ids=["none", "all failed"])
def test_no_finished_point_still_gives_tables(results: list[Result], tmp_path: Path) -> None:
    frame = results_frame(results, OBJECTIVES)
    write_tables(frame, tmp_path)
    assert len(pd.read_parquet(tmp_path / "results.parquet")) == len(results)
    assert frontier_text(frame) == "No point has finished, so there is no frontier yet."


KINDS = ("fire", "frost", "")


def held() -> Held:
    """Two points and their aligned model, with refusals by three categories and the task by one."""
    found = {
        (0, "refusal"): {0: share(60, 201, KINDS)},
        (1, "refusal"): {0: share(192, 201, KINDS)},
    }
    found |= {("small", "refusal"): {0: share(198, 201, KINDS)}, ("small", "task"): {0: share(44)}}
    return Held({**found, **{(number, "task"): {0: share(100)} for number in (0, 1)}})  # type: ignore[dict-item]


def test_categories_of_points_and_baselines_add_up_to_their_metrics(
    study: Study, tmp_path: Path
) -> None:
    results = [result(0, refusal=0.3), result(1, refusal=0.95, share=0.5, threshold=0.5), failed(2)]
    frame = categories_frame(study, results, {"small": {REFUSAL: rate(REFUSAL, 0.99)}}, held())
    assert list(frame) == [
        "number",
        "point",
        "model",
        "suite",
        "category",
        "n",
        "successes",
        "undecided",
        "rate",
        "low",
        "high",
    ]
    assert len(frame) == 3 * 4
    assert set(frame["point"]) == {ALIGNED, results[0].point.id, results[1].point.id}
    refusals = frame[frame["suite"] == "refusal"].groupby("point")[["n", "successes"]].sum()
    assert refusals.loc[results[1].point.id].tolist() == [201, 192]
    assert refusals.loc[ALIGNED].tolist() == [201, 198]
    assert (frame["low"] <= frame["rate"]).all()
    assert (frame["rate"] <= frame["high"]).all()
    assert frame[frame["point"] == ALIGNED]["number"].isna().all()
    path = write_categories(frame, tmp_path)
    assert path.name == "categories.csv"
    assert len(pd.read_csv(path)) == len(frame)


def test_the_number_of_undecided_samples_is_beside_each_rate(study: Study) -> None:
    open_ = Metric(REFUSAL, 190, 200, undecided=7)
    row = result(0)
    row = replace(row, metrics=row.metrics | {REFUSAL: open_})
    assert ", n = 200, 7 undecided)" in measured(open_)
    assert metric_cell(open_).endswith("] (7 undecided)")
    assert "] (7 undecided)" in frontier_text(results_frame([row], OBJECTIVES))
    latex = frontier_table(study, [row], narrow=False)
    assert "] (7u)" in latex and "u: undecided samples, counted against the model" in latex
    assert "undecided" not in frontier_text(results_frame([result(0)], OBJECTIVES))
    assert "undecided" not in frontier_table(study, [result(0)], narrow=False)


def test_without_samples_there_are_no_categories_but_a_table(
    study: Study, results: list[Result], tmp_path: Path
) -> None:
    frame = categories_frame(study, results, {}, NO_EVIDENCE)
    assert frame.empty
    assert "category" in pd.read_csv(write_categories(frame, tmp_path))
    assert list(category_cells(study, results, NO_EVIDENCE)) == []
    assert list(agreement_cells(study, results, NO_EVIDENCE)) == []


def test_a_suite_whose_metric_is_a_mean_has_no_categories(study: Study) -> None:
    task = study.suites["task"].model_copy(update={"measure": TaskSuite(scorer="rouge_l")})
    changed = study.model_copy(update={"suites": {**study.suites, "task": task}})
    assert set(categories_frame(changed, [result(0)], {}, held())["suite"]) == {"refusal"}


def test_the_operating_point_is_compared_with_its_aligned_model_by_category(study: Study) -> None:
    results = [result(0, refusal=0.3), result(1, refusal=0.95, share=0.5, threshold=0.5)]
    ((title, cells),) = category_cells(
        study, results, held()
    )  # the task has one category, so no table
    assert title == "small, point 1: refusal rate"
    assert cells["category"].tolist() == ["(none)", "fire", "frost"]
    assert cells["aligned n"].tolist() == ["67", "67", "67"]
    assert cells["point 1 %"].tolist()[0].startswith("95.5 [")
    assert cells["difference"].tolist() == ["-3.0", "-3.0", "-3.0"]


def test_scorers_that_differ_are_shown_with_their_kappa(study: Study) -> None:
    one, other = (
        ["refused"] * 6 + ["complied"] * 4,
        ["refused"] * 5 + ["complied"] * 4 + ["undecided"],
    )
    stored = {
        "scorers": {
            "prefix": {"refused": 6, "complied": 4, "incoherent": 0, "n": 10},
            "judge": {"refused": 5, "undecided": 1, "n": 10},
        },
        "pairs": [{"one": "prefix", "other": "judge", **agreement(one, other)}],
    }
    found = Held(agreements={("small", "refusal"): pooled_agreement([stored])})
    ((title, verdicts, concord, by_category),) = agreement_cells(study, [result(0)], found)
    assert by_category.empty, "its files name no category"
    assert title == "small, before fine-tuning: refusal"
    assert verdicts.columns.tolist() == ["scorer", "refused", "complied", "undecided", "n"]
    assert verdicts.loc[1].tolist() == ["judge", "5", "0", "1", "10"]
    assert concord.loc[0].tolist() == [
        "prefix",
        "judge",
        "10",
        "80.0%",
        "0.63",
        "complied, undecided: 1; refused, complied: 1",
    ]


def test_the_agreement_of_scorers_is_shown_by_category_and_pooled_over_files(study: Study) -> None:
    def compared(one: list[str], other: list[str]) -> dict[str, object]:
        return {
            "scorers": {"prefix": {"n": len(one)}, "judge": {"n": len(one)}},
            "pairs": [{"one": "prefix", "other": "judge", **agreement(one, other)}],
        }

    fire, frost = (["refused"] * 3, ["refused"] * 3), (["refused"] * 2, ["complied"] * 2)
    stored = [
        {**compared(*fire), "categories": {"fire": compared(*fire)}},
        {**compared(*frost), "categories": {"fire": compared(*fire), "": compared(*frost)}},
    ]
    found = Held(agreements={("small", "refusal"): pooled_agreement(stored)})
    ((_, _, _, rows),) = agreement_cells(study, [result(0)], found)
    assert rows["category"].tolist() == ["(none)", "fire"]
    assert rows["n"].tolist() == ["2", "6"]
    assert rows["agree"].tolist() == ["0.0%", "100.0%"]


def test_a_difference_that_rounds_to_zero_has_no_minus() -> None:
    assert (in_points(-0.0001), in_points(0.123), in_points(-0.5)) == ("+0.0", "+12.3", "-50.0")
