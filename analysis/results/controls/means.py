"""The controls that a study ran, as means over draws with their spread, and as a table.

Invariant: a draw is never pooled with another one or with its partner. A mean counts draws that are
measured, and says how many.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ebbline.analysis.results.wording import defence_label
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.state.controls import (
    ControlResult,
    control_results,
    draws_of,
    is_the_partner,
)
from ebbline.sweeps.study.points import Result, defence_of
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.defences.controls.registry import controls_of
from ebbline.tasks.files import write_whole


@dataclass(frozen=True)
class ControlMean:
    """One control of one result. `draws` are its measured draws; one for a control without chance.
    `planned` is the number of draws that the study asks for.
    """

    partner: Result
    control: str
    draws: tuple[Result, ...]
    planned: int

    def value(self, metric: str) -> float | None:
        """The mean of a metric over draws; None before a draw is measured."""
        values = [draw.metrics[metric].value for draw in self.draws]
        return statistics.fmean(values) if values else None

    def spread(self, metric: str) -> float | None:
        """The standard deviation of a metric between draws; None for fewer than two."""
        values = [draw.metrics[metric].value for draw in self.draws]
        return statistics.stdev(values) if len(values) > 1 else None


def collect_controls(view: StudyView, results: Sequence[Result]) -> list[ControlResult]:
    """Every control of a study, read from the store. `results` are those of `collect`."""
    return control_results(view.study, results, view.graph, Resolver(view.home.store))


def control_means(controls: Sequence[ControlResult]) -> list[ControlMean]:
    """The controls with their draws together, in the order of their partners."""
    found: dict[tuple[int, str], list[ControlResult]] = {}
    for each in controls:
        found.setdefault((each.of.partner.number, each.of.control), []).append(each)
    return [
        ControlMean(
            own[0].of.partner,
            control,
            tuple(each.result for each in own if each.result.status == "done"),
            len(own),
        )
        for (_, control), own in found.items()
    ]


def controls_frame(study: Study, controls: Sequence[ControlResult]) -> pd.DataFrame:
    """A row for each draw: its partner's number and defence, and each metric of both."""
    names = sorted({name for each in controls for name in each.result.metrics})
    frame = pd.DataFrame([_row(each, names) for each in controls])
    return frame.astype({"draw": "Int64"}) if len(frame) else frame


def _row(each: ControlResult, names: Sequence[str]) -> dict[str, object]:
    partner, own = each.of.partner, each.result
    row: dict[str, object] = {
        "partner": partner.number,
        "model": partner.point.model,
        "defence": defence_of(partner.point).name,
        "setting": defence_label(partner.point),
        "control": each.of.control,
        "draw": each.of.draw,
        "status": own.status,
    }
    for name in names:
        metric = own.metrics.get(name)
        low, high = (None, None) if metric is None else metric.interval
        row |= {
            name: None if metric is None else metric.value,
            f"{name}_low": low,
            f"{name}_high": high,
            f"{name}_n": None if metric is None else metric.n,
            f"{name}_of_partner": partner.metrics[name].value,
        }
    return row


def write_controls(frame: pd.DataFrame, folder: Path) -> Path:
    """controls.csv."""
    return write_whole(
        folder / "controls.csv", lambda path: frame.to_csv(path, index=False, lineterminator="\n")
    )


def names_controls(study: Study) -> bool:
    """Whether a study says which controls it wants, or names the defences that have some."""
    return bool(study.defences) or study.controls is not None


def control_notes(
    study: Study, results: Sequence[Result], controls: Sequence[ControlResult]
) -> Iterator[str]:
    """What a reader must know of the controls: which defences have none, and what was not run."""
    for defence in study.used_defences:
        method = defence.method
        ran = any(defence_of(r.point) is defence and r.changed_share for r in results)
        if method is None or not ran:
            continue
        if not controls_of(method):
            yield f"{defence.words.name} has no control: it has neither a gate nor a projector."
        elif not names_controls(study):
            continue  # the answer says that no control was measured
        elif not study.used_controls.settings:
            yield (
                f"No control of {defence.words.name} was run, so nothing here says whether it does "
                "more than shrinking, or than changing other modules. `controls: true` in the "
                "study runs them."
            )
        elif not any(norm in method.controls for norm in ("shrink_matched", "random_subspace")):
            yield f"{defence.words.name} has no control of equal norm."
    whole = sorted({each.of.partner.number for each in controls if is_the_partner(each.of)})
    if whole:
        yield (
            f"Every module was changed at {_points(whole)}, so random modules are the same adapter "
            "there and do not test the choice of modules."
        )
    missing = sum(each.result.status != "done" for each in controls)
    if missing:
        yield f"{missing} of {len(draws_of(study, results))} draws of controls are not measured."


def _points(numbers: Sequence[int]) -> str:
    return f"point{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
