"""The frontier so far as text for a terminal: the first two objectives, one mark for each model
size.

A study may have very many points. The plot keeps every non-dominated point and the latest KEPT
dominated ones. A result with a further seed replaces the point's earlier result. Kept points that
the earlier result dominated then return to the frontier.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

from rich.text import Text

from ebbline.analysis.results.frontier import frontier, frontier_hypervolume
from ebbline.analysis.results.measurements import Baselines
from ebbline.analysis.results.wording import directed_label, natural
from ebbline.sweeps.study.points import Result
from ebbline.tasks.measuring.metrics import Metric

STYLES = ("bright_blue", "yellow", "green", "magenta", "cyan")
SIGNS = {
    True: ("●■▲◆▼", "·", "★"),
    False: ("o#^%v", ".", "*"),
}  # unicode? -> marks of frontiers, of dominated points, of aligned models
KEPT = 400  # dominated points that are drawn
STEP = 0.05  # axis ends of rates are multiples of this


class FrontierSoFar:
    """Collects results as stages finish; `text` draws them."""

    def __init__(self, objectives: Sequence[str]) -> None:
        self.objectives = objectives
        self.aligned: Baselines = {}
        self.fronts: dict[str, list[Result]] = {}
        self._rest = deque[Result](maxlen=KEPT)
        self._first: dict[tuple[str, int], int] = {}  # of equal points of a size, the first one

    def take(self, results: Sequence[Result]) -> None:
        for result in results:
            first = result.number if result.same_as is None else result.same_as
            of_size = (result.point.model, first)
            if (
                result.status == "done"
                and self._first.setdefault(of_size, result.number) == result.number
            ):
                self._take(result)

    def _take(self, result: Result) -> None:
        model, values = result.point.model, self._values(result)
        before = self.fronts.get(model, [])
        candidates = [each for each in before if each.number != result.number]
        if any(each.number == result.number for each in self._rest):
            self._rest = deque((each for each in self._rest if each.number != result.number), KEPT)
        if len(candidates) < len(before):
            candidates += [each for each in self._rest if each.point.model == model]
            self._rest = deque((each for each in self._rest if each.point.model != model), KEPT)
        if not any(
            self._values(each) == values and each.number < result.number for each in candidates
        ):
            candidates = [*(each for each in candidates if self._values(each) != values), result]
        front = self.fronts[model] = frontier(candidates, self.objectives)
        self._rest += [each for each in candidates if each not in front]

    @property
    def results(self) -> list[Result]:
        """The non-dominated points of every size, by number."""
        return sorted(
            (result for front in self.fronts.values() for result in front),
            key=lambda result: result.number,
        )

    @property
    def hypervolume(self) -> float:
        return frontier_hypervolume(self.results, self.objectives) if self.fronts else 0.0

    def _values(self, result: Result) -> list[float]:
        return [result.metrics[name].value for name in self.objectives]

    def text(self, width: int = 48, height: int = 10, unicode: bool = True) -> Text:
        """A scatter plot of `width` x `height` characters, with axes, a legend and the median
        half-width of the intervals.
        """
        if not self.fronts:
            return Text("no point has finished, so there is no frontier yet", style="dim")
        drawn = self.objectives[:2]
        marks, dominated, star = SIGNS[unicode]
        sizes = sorted({*self.fronts, *self.aligned}, key=natural)
        styles = {
            model: (marks[place % len(marks)], STYLES[place % len(STYLES)])
            for place, model in enumerate(sizes)
        }
        signs = [(self._place(each.metrics, each.number), dominated, "dim") for each in self._rest]
        signs += [
            (self._place(metrics, 0), star, styles[model][1])
            for model, metrics in self.aligned.items()
            if set(drawn) <= set(metrics)
        ]
        signs += [
            (self._place(each.metrics, each.number), *styles[each.point.model])
            for each in self.results
        ]
        xs, ys = (
            _scale([place[0] for place, _, _ in signs], len(drawn) == 2),
            _scale([place[1] for place, _, _ in signs]),
        )
        cells = [[(" ", "")] * width for _ in range(height)]
        for (x, y), sign, style in signs:
            cells[round((ys[1] - y) / (ys[1] - ys[0]) * (height - 1))][
                round((x - xs[0]) / (xs[1] - xs[0]) * (width - 1))
            ] = (sign, style)
        bar, corner, line = ("│", "└", "─") if unicode else ("|", "+", "-")
        text = Text(directed_label(drawn[-1]) + "\n", no_wrap=True)
        for number, row in enumerate(cells):
            label = (
                f"{ys[1] - (ys[1] - ys[0]) * number / (height - 1):.0%}"
                if number in (0, height // 2, height - 1)
                else ""
            )
            text.append(f"{label:>5} {bar}")
            for sign, style in row:
                text.append(sign, style)
            text.append("\n")
        ends = [f"{end:.0%}" if len(drawn) == 2 else f"{end:.0f}" for end in xs]
        name = directed_label(drawn[0]) if len(drawn) == 2 else "point number"
        text.append(
            f"{'':5} {corner}{line * width}\n{'':6} "
            f"{ends[0]}{name:^{width - sum(map(len, ends))}}{ends[1]}\n"
        )
        for model in sizes:
            text.append(f"{styles[model][0]} ", styles[model][1]).append(f"{model}  ")
        text.append(f"{dominated} dominated  " if self._rest else "").append(
            f"{star} before fine-tuning" if self.aligned else ""
        )
        halves = [
            median(
                (high - low) / 2
                for low, high in (each.metrics[name].interval for each in self.results)
            )
            for name in drawn
        ]
        widths = [f"±{half:.1%}" for half in halves]
        return text.append(
            "\nmedian 95% interval: "
            f"{' horizontally, '.join(widths)}{' vertically' if len(drawn) == 2 else ''}",
            "dim",
        )

    def _place(self, metrics: Mapping[str, Metric], number: int) -> tuple[float, float]:
        drawn = self.objectives[:2]
        return metrics[drawn[0]].value if len(drawn) == 2 else float(number), metrics[
            drawn[-1]
        ].value


def _scale(values: Sequence[float], rate: bool = True) -> tuple[float, float]:
    """The two ends of an axis for these values. A rate's ends differ and are multiples of STEP in
    [0, 1].
    """
    low, high = min(values), max(values)
    if not rate:
        return low, max(high, low + 1)
    low, high = max(0.0, math.floor(low / STEP) * STEP), min(1.0, math.ceil(high / STEP) * STEP)
    return (low, high) if high - low >= STEP else (max(0.0, low - STEP), min(1.0, high + STEP))
