"""The Gantt chart: each bar is on a GPU that no other stage holds, and any plan has a figure."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import is_color_like

from ebbline.analysis.figures.drawing import save, save_svg
from ebbline.analysis.figures.gantt import colours, gantt_figure, lanes_of
from ebbline.cluster.executors.executor import Capacity, Host, Needs
from ebbline.cluster.schedule.simulate import Step, Trace, simulate


def trace(gpus: int, stages: int) -> Trace:
    steps = [
        Step(f"k{number}", Needs(number % 3), f"r{number % 4}", 10.0 + number, 10.0 + number)
        for number in range(stages)
    ]
    return simulate(steps, Capacity((Host("a", gpus, 2), Host("b", gpus, 2))))


def kinds(found: Trace) -> dict[str, str]:
    return {span.key: ("train", "generate", "apply")[int(span.key[1:]) % 3] for span in found.spans}


def test_kinds_with_a_colour_have_one_that_is_their_own():
    found = colours()
    assert {"train", "generate"} <= found.keys() and len(set(found.values())) == len(found)
    # Without matplotlib's C0, C1, ...: the live page draws with the same colours
    assert all(is_color_like(each) and not each.startswith("C") for each in found.values())


@given(st.integers(2, 6), st.integers(1, 30))
def test_every_bar_has_as_many_lanes_as_gpus_and_shares_none_with_another(gpus, stages):
    spans = trace(gpus, stages).spans
    lanes = lanes_of(spans)
    held: dict[object, list[tuple[float, float]]] = {}
    for span, own in zip(spans, lanes, strict=True):
        assert len(own) == len(set(own)) == sum(max(1, count) for count in span.hosts.values())
        assert {host for host, _, _ in own} == set(span.hosts)
        for lane in own:
            held.setdefault(lane, []).append((span.start_s, span.end_s))
    for times in held.values():
        times.sort()
        assert all(end <= start + 1e-9 for (_, end), (start, _) in itertools.pairwise(times))
    assert all(number < gpus for _, gpu, number in held if gpu)


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [2, 64])
def test_a_plan_is_bars_or_on_many_gpus_areas_and_reproducible(tmp_path, gpus):
    found = trace(gpus, 200)
    drawn = [gantt_figure(found, kinds(found), "tiny") for _ in range(2)]
    axes = drawn[0].axes[0]
    assert (
        axes.get_ylabel() == ("GPUs at work" if gpus == 64 else "")
        and "from the start, as planned" in axes.get_xlabel()
    )
    paths = [
        [
            *save(figure, tmp_path / str(number), "plan"),
            save_svg(figure, tmp_path / str(number), "plan"),
        ]
        for number, figure in enumerate(drawn)
    ]
    assert [path.suffix for path in paths[0]] == [".png", ".pdf", ".svg"]
    assert [path.read_bytes() for path in paths[0]] == [path.read_bytes() for path in paths[1]]


def test_hosts_are_numbered_in_the_figure_and_not_named(tmp_path):
    steps = [Step(f"k{number}", Needs(1), f"r{number}", 10.0, 10.0) for number in range(4)]
    found = simulate(
        steps,
        Capacity((Host("gpu-12.lab/0123456789ab", 2, 2), Host("gpu-7.lab/0123456789ab", 2, 2))),
    )
    figure = gantt_figure(found, {span.key: "train" for span in found.spans})
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"host {host}, GPU {gpu}" for host in (1, 2) for gpu in (0, 1)]
    text = save_svg(figure, tmp_path, "plan").read_text()
    assert "host 1, GPU 0" in text and "lab" not in text


def test_a_plan_without_stages_has_no_figure():
    assert gantt_figure(Trace(Capacity.one_host(2, 1)), {}) is None
