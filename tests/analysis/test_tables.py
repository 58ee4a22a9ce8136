"""The tables: every point has a row, nothing missing becomes a number, and the terminal's table is golden."""

import random
from pathlib import Path

import pandas as pd
import pytest

from analysis.files import write_whole
from analysis.tables import MEASURED_COLUMNS, frontier_text, results_frame, write_tables
from sweeps.points import Result
from tasks.metrics import Metric
from tests.analysis.conftest import REFUSAL, TASK, failed, result

OBJECTIVES = (REFUSAL, TASK)
GOLDEN = Path(__file__).parent / "golden" / "frontier.txt"


def test_the_terminal_table_is_the_golden_one(results: list[Result]) -> None:
    assert frontier_text(results_frame(results, OBJECTIVES)) + "\n" == GOLDEN.read_text()


def test_the_row_order_is_the_points_order_however_they_finished(results: list[Result]) -> None:
    shuffled = list(results)
    random.Random(0).shuffle(shuffled)
    pd.testing.assert_frame_equal(results_frame(shuffled, OBJECTIVES), results_frame(results, OBJECTIVES))


def test_a_failed_point_has_a_row_with_its_reason_and_no_numbers() -> None:
    frame = results_frame([result(0), failed(1, "out of memory")], OBJECTIVES)
    row = frame.iloc[1]
    assert (row["status"], row["reason"]) == ("failed", "out of memory")
    assert row[[REFUSAL, f"{REFUSAL}_low", f"{REFUSAL}_n", "projected_share"]].isna().all()
    assert not row["on_frontier"]


def test_intervals_counts_and_seed_spread_stand_beside_the_value() -> None:
    metric = Metric(REFUSAL, 90, 100, undecided=3, seeds=(0.88, 0.92))
    row = results_frame([Result(0, result(0).point, "done", {REFUSAL: metric})], [REFUSAL]).iloc[0]
    assert (row[REFUSAL], row[f"{REFUSAL}_n"], row[f"{REFUSAL}_undecided"]) == (0.9, 100, 3)
    assert row[f"{REFUSAL}_low"] < 0.9 < row[f"{REFUSAL}_high"]
    assert row[f"{REFUSAL}_seed_sd"] == pytest.approx(0.0282842712)


def test_one_seed_has_no_spread_rather_than_a_spread_of_zero() -> None:
    assert results_frame([result(0)], OBJECTIVES)[f"{REFUSAL}_seed_sd"].isna().all()


def test_an_absent_threshold_stays_missing_and_is_not_zero() -> None:
    frame = results_frame([result(0), result(1, threshold=0.0, share=0.1)], OBJECTIVES)
    assert frame["apply.threshold"].isna().tolist() == [True, False]


def test_only_measured_columns_differ_after_a_resumed_run() -> None:
    undisturbed, resumed = result(0), result(0)
    object.__setattr__(resumed, "seconds", 99.0)
    before, after = (results_frame([found], OBJECTIVES) for found in (undisturbed, resumed))
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


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("old")

    def breaks(fresh: Path) -> None:
        fresh.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, breaks)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("results.csv", "old")]
