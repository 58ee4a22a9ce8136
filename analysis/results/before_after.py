"""Each model before fine-tuning, fine-tuned and defended: the metrics of every suite and their
changes.

Invariants: the defended point comes from the training of the fine-tuned point, so the two differ
by the defence alone. All comparisons of a study's models, metrics and steps are one family: their
p-values are corrected together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.measurements import (
    NO_EVIDENCE,
    Baselines,
    Comparison,
    Evidence,
    Measurement,
    compared,
    measurement,
    operating_point,
    partners,
    refusal_metric,
    undefended,
)
from ebbline.analysis.results.picks.floors import Standing
from ebbline.analysis.results.statistics import SHARES
from ebbline.analysis.results.tables import in_points, metric_cell
from ebbline.analysis.results.wording import directed_label, natural
from ebbline.sweeps.study.points import Result, without_defence
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.suites import MultipleChoiceSuite
from ebbline.tasks.measuring.metrics import Metric

State = Literal["aligned", "tuned", "shipped"]
STATES: dict[State, str] = {"aligned": "before", "tuned": "fine-tuned", "shipped": "defended"}
Step = Literal["fine-tuning", "defence", "both"]
STEPS: dict[Step, tuple[State, State]] = {
    "fine-tuning": ("aligned", "tuned"),
    "defence": ("tuned", "shipped"),
    "both": ("aligned", "shipped"),
}
LABELS: dict[Step, str] = {
    "fine-tuning": "by fine-tuning",
    "defence": "by the defence",
    "both": "in all",
}


@dataclass(frozen=True)
class Trio:
    """The three states of one model; a state is None where no point has it.

    `tuned` is the training without a defence. `shipped` is the defended point that the answer
    picks, or the one nearest to the refusal floor; `standing` tells how its setting stands to that
    floor, and `among` from how many different points it was chosen. With `refuted` its value in the
    search meets the floor, and the confirmed one does not.
    """

    model: str
    tuned: Result | None
    shipped: Result | None
    standing: Standing
    among: int = 0
    refuted: bool = False

    @property
    def meets(self) -> bool:
        """Whether the values meet the floor: a candidate, or a confirmed point."""
        return self.shipped is not None and self.standing != "missed"

    @property
    def holds(self) -> bool:
        """Whether `ebbline confirm` has shown that the setting holds the floor."""
        return self.shipped is not None and self.standing == "holds"


@dataclass(frozen=True)
class Line:
    """One metric of one model: its value in each measured state, and the changes between states."""

    model: str
    name: str
    states: Mapping[State, Metric]
    changes: Mapping[Step, Comparison]


def trios(study: Study, results: Sequence[Result]) -> list[Trio]:
    """One for each model with a finished point, in natural order.

    Where no point is defended, or the study measures no refusals, `tuned` is the point without
    a defence with the lowest number.
    """
    refusal, done, found = refusal_metric(study), finished(results), []
    for model in sorted({result.point.model for result in done}, key=natural):
        own = [result for result in done if result.point.model == model]
        picked = None if refusal is None else operating_point(study, own, refusal)
        if picked is None:
            plain = undefended(own).values()
            first = min(plain, key=lambda result: result.number, default=None)
            found.append(Trio(model, first, None, "missed"))
        else:
            best = picked.result
            tuned = partners(own).get(without_defence(best.point))
            found.append(
                Trio(model, tuned, best, picked.standing, picked.among, bool(picked.refuted))
            )
    return found


def reported_metrics(study: Study) -> list[str]:
    """The main metric of each suite, and both metrics of a multiple-choice suite.

    They are in the order of the study file.
    """
    names = []
    for suite, entry in study.suites.items():
        own = entry.measure.metrics()
        names += [
            f"{suite}.{metric}"
            for metric in (own if isinstance(entry.measure, MultipleChoiceSuite) else own[:1])
        ]
    return names


def before_after(
    study: Study, results: Sequence[Result], baselines: Baselines, evidence: Evidence = NO_EVIDENCE
) -> list[Line]:
    """A line for each metric and model, in the order of the study's suites.

    A metric without a measurement is omitted.
    """
    sizes = trios(study, results)
    found = [
        (trio.model, name, states)
        for name in reported_metrics(study)
        for trio in sizes
        if (states := _states(trio, name, baselines, evidence))
    ]
    pairs = [
        ((model, name), step, _paired_once(states[before], states[after], before))
        for model, name, states in found
        for step, (before, after) in STEPS.items()
        if before in states and after in states
    ]
    changes: dict[tuple[str, str], dict[Step, Comparison]] = {
        (model, name): {} for model, name, _ in found
    }
    for (place, step, _), comparison in zip(
        pairs, compared([pair for _, _, pair in pairs]), strict=True
    ):
        changes[place][step] = comparison
    return [
        Line(
            model,
            name,
            {state: side.metric for state, side in states.items()},
            changes[model, name],
        )
        for model, name, states in found
    ]


def _states(
    trio: Trio, name: str, baselines: Baselines, evidence: Evidence
) -> dict[State, Measurement]:
    found: dict[State, Measurement] = {}
    suite, _, metric = name.rpartition(".")
    aligned = baselines.get(trio.model, {}).get(name)
    if aligned is not None:
        found["aligned"] = Measurement(
            aligned, evidence.samples(trio.model, suite) if metric in SHARES else {}, fixed=True
        )
    if trio.tuned is not None and name in trio.tuned.metrics:
        found["tuned"] = measurement(trio.tuned, name, evidence)
    if trio.shipped is not None and name in trio.shipped.metrics:
        found["shipped"] = measurement(trio.shipped, name, evidence)
    return found


def _paired_once(
    before: Measurement, after: Measurement, state: State
) -> tuple[Measurement, Measurement]:
    """The pair, with the single measurement of an aligned model repeated for each seed."""
    once = list(before.replicates.values())
    if state == "aligned" and once:
        before = Measurement(before.metric, dict.fromkeys(after.replicates, once[0]), fixed=True)
    return before, after


def before_after_cells(lines: Sequence[Line]) -> list[tuple[str, pd.DataFrame]]:
    """(metric, table as text) with a row for each model.

    Values are in percent. Changes are in percentage points, with the verdict of the comparison.
    """
    found = []
    for name in dict.fromkeys(line.name for line in lines):
        own = [line for line in lines if line.name == name]
        cells = pd.DataFrame({"model": [line.model for line in own]})
        for state, label in STATES.items():
            metrics = [line.states.get(state) for line in own]
            cells[f"{label} %"] = [
                "not measured" if metric is None else metric_cell(metric) for metric in metrics
            ]
        for step, label in LABELS.items():
            cells[label] = [
                "" if (change := line.changes.get(step)) is None else change_label(change)
                for line in own
            ]
        found.append((directed_label(name), cells))
    return found


def change_label(change: Comparison) -> str:
    """`-86.0 [-90.1, -81.2], lower`; ends in "(unpaired)" where no prompts could be paired, and in
    "(setting, 3 seeds)" where the verdict is about the setting.
    """
    low, high = change.interval
    unpaired = "" if change.paired is not None else " (unpaired)"
    between = change.between
    about = "" if between is None else f" (setting, {between.seeds} seeds)"
    return (
        f"{in_points(change.difference)} [{in_points(low)}, {in_points(high)}], "
        f"{change.move}{unpaired}{about}"
    )
