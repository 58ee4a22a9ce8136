"""The second process of a run's outputs."""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ebbline.analysis.figures.drawing import lay_out, save_pdf, style
from ebbline.analysis.report.second_process import SecondProcess, second_process


def drawn() -> Figure:
    with style():
        figure = Figure(layout="constrained")
        figure.subplots().plot([1, 3, 2], label="threshold")
    return figure


@pytest.mark.process
def test_the_second_process_makes_what_this_one_would(tmp_path: Path) -> None:
    """The file is equal to the byte, although the figure is changed after the call began."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here = save_pdf(drawn(), tmp_path / "here", "one")
    figure = drawn()
    with second_process() as second:
        pid = second.start(os.getpid)
        there = second.start(save_pdf, figure, tmp_path / "there", "one")
        with style():
            lay_out(figure)
        figure.axes[0].set_title("later")
        failing = second.start(int, "no number")
        assert pid() != os.getpid() or len(os.sched_getaffinity(0)) == 1
        assert there().read_bytes() == here.read_bytes()
        with pytest.raises(ValueError, match="no number"):
            failing()
        # A run's output is not for Optuna's notes, and the import takes time
        assert "optuna" not in second.start(eval, "list(__import__('sys').modules)")()
        local = second.start(lambda: 5)  # it cannot be pickled
        dead = second.start(os._exit, 3) if pid() != os.getpid() else None
        after = second.start(len, "abc")
        assert (local(), after()) == (5, 3)
        del dead


def test_without_a_second_process_a_call_is_made_when_its_result_is_asked_for() -> None:
    calls: list[int] = []
    result = SecondProcess().start(calls.append, 1)
    assert calls == []
    result()
    assert calls == [1]


def test_a_process_that_cannot_start_is_replaced_by_this_one() -> None:
    pool = ProcessPoolExecutor(1)
    pool.shutdown()
    assert SecondProcess(pool).start(len, "abc")() == 3
