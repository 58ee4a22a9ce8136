"""The controls of a study: which results get them, their stages, and their results.

Every defence with a gate or a projector has controls near its operating point: at
`controls.settings` of its measured settings. These are the operating point, then its neighbours of
the same training along the main knob, the nearest first, alternating between both sides.

A control is no point of the search. It is on no frontier, and no database names it: this module
finds the controls of a study from its results, and their measurements in the store.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ebbline.sweeps.state.outcome import costs_of
from ebbline.sweeps.state.races.racing import ArtifactLookup, standing
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.study.points import Result, adapter_of, defence_of
from ebbline.sweeps.study.stages import StageGraph, of_seeds
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.controls.random_modules import RandomModules
from ebbline.tasks.defences.controls.registry import controls_of
from ebbline.tasks.stage import Stage


@dataclass(frozen=True)
class ControlDraw:
    """A control of a result, its partner; `draw` is the number of a random draw from 0."""

    partner: Result
    control: str
    draw: int | None = None

    def __str__(self) -> str:
        drawn = "" if self.draw is None else f", draw {self.draw}"
        return f"{self.control} of point {self.partner.number}{drawn}"


@dataclass(frozen=True)
class ControlResult:
    """The measurement of a control. `result` has the partner's number and point, and the control's
    own metrics, keys and costs; its status is `running` while a measurement is missing.
    """

    of: ControlDraw
    result: Result


def operating_points(study: Study, results: Sequence[Result]) -> dict[tuple[str, str], Result]:
    """(model, defence) -> the defence's operating point: of its results that change a module, the
    most useful one that holds the refusal floor, else the one nearest to it.
    """
    found: dict[tuple[str, str], Result] = {}
    for result in results:
        if result.status == "done" and result.changed_share:
            own = result.point.model, defence_of(result.point).name
            before = found.get(own)
            if before is None or _worth(study, result) > _worth(study, before):
                found[own] = result
    return found


def _worth(study: Study, result: Result) -> tuple[bool, float, float, int]:
    """A larger value is a better operating point; of equal ones, the one with the lower number."""
    refusal, useful = study.refusal_metric, study.usefulness_metric
    rate = 1.0 if refusal is None else result.metrics[refusal].value
    use = 0.0 if useful is None else result.metrics[useful].value
    holds = refusal is None or rate >= study.refusal_floor
    return holds, use if holds else rate, rate if holds else use, -result.number


def controlled(study: Study, results: Sequence[Result]) -> list[Result]:
    """The results that get controls, each defence's operating point first."""
    found, most = list[Result](), study.used_controls.settings
    for (_, _), operating in operating_points(study, results).items() if most else ():
        method = defence_of(operating.point).method
        if method is not None and controls_of(method):
            found += [operating, *_neighbours(operating, results)][:most]
    return found


def _neighbours(operating: Result, results: Sequence[Result]) -> Iterator[Result]:
    """Results of the same training and defence by their distance from the operating point along
    the knob that the study varies, the two sides in turn. Of equal adapters, only the first one
    counts.
    """
    knob, adapter = _varied_knob(operating), adapter_of(operating.point)
    at: dict[float, Result] = {}
    seen = {_identity(operating)}
    for result in sorted(results, key=lambda result: result.number):
        value = dict(result.point.values).get(knob)
        if (
            result.status == "done"
            and result.changed_share
            and adapter_of(result.point) == adapter
            and isinstance(value, int | float)
            and _identity(result) not in seen
        ):
            seen.add(_identity(result))
            at.setdefault(float(value), result)
    own = dict(operating.point.values).get(knob)
    if not isinstance(own, int | float):
        return
    below = [at[value] for value in sorted(at, reverse=True) if value < own]
    above = [at[value] for value in sorted(at) if value > own]
    for step in range(max(len(below), len(above))):
        yield from (*below[step : step + 1], *above[step : step + 1])


def _varied_knob(result: Result) -> str:
    """The defence's main knob, or the first other one that is an axis and has a number here."""
    defence, values = defence_of(result.point), dict(result.point.values)
    numbers = [
        axis
        for axis, value in values.items()
        if defence.is_knob(axis) and isinstance(value, int | float)
    ]
    return defence.main_knob if defence.main_knob in numbers else next(iter(numbers), "")


def _identity(result: Result) -> int:
    return result.number if result.same_as is None else result.same_as


def is_the_partner(draw: ControlDraw) -> bool:
    """Whether a control can be nothing but its partner: random modules where all were changed."""
    return draw.control == RandomModules.name and draw.partner.changed_share == 1.0


def draws_of(study: Study, results: Sequence[Result]) -> list[ControlDraw]:
    """Every draw of every control of the results that get controls."""
    return draws_of_each(study, controlled(study, results))


def draws_of_each(study: Study, partners: Sequence[Result]) -> list[ControlDraw]:
    """Every draw of every control of each of these results."""
    found = list[ControlDraw]()
    for partner in partners:
        method = defence_of(partner.point).method
        for control in [] if method is None else controls_of(method):
            draws = range(study.used_controls.draws) if control.drawn else [None]
            found += [ControlDraw(partner, control.name, draw) for draw in draws]
    return found


def stages_of_draw(graph: StageGraph, draw: ControlDraw) -> dict[str, Stage]:
    """The stages of a control, by name, for the seeds of its partner."""
    stages = graph.control_stages(draw.partner.point, draw.control, draw.draw)
    return of_seeds(graph.study, stages, seeds_of(draw.partner) or graph.study.first_seeds)


def control_stages(graph: StageGraph, results: Sequence[Result]) -> list[Stage]:
    """The stages of every control of a study with these results."""
    draws = draws_of(graph.study, results)
    return [stage for draw in draws for stage in stages_of_draw(graph, draw).values()]


def control_results(
    study: Study, results: Sequence[Result], graph: StageGraph, lookup: ArtifactLookup
) -> list[ControlResult]:
    """Every control of a study with its metrics, over the seeds of its partner. `results` are those
    of the study, with `same_as`.
    """
    return [
        ControlResult(draw, measured(study, draw, stages_of_draw(graph, draw), lookup))
        for draw in draws_of(study, results)
    ]


def measured(
    study: Study, draw: ControlDraw, stages: Mapping[str, Stage], lookup: ArtifactLookup
) -> Result:
    """The result of a control with these stages."""
    artifacts = {
        name: artifact
        for name, stage in stages.items()
        if (artifact := lookup.artifact(stage)) is not None
    }
    stands = standing(study, stages, lookup, lambda metrics, sizes: False)
    return Result(
        draw.partner.number,
        draw.partner.point,
        "running" if stands.missing else "done",
        {} if stands.missing else stands.metrics,
        keys={name: artifact.key for name, artifact in artifacts.items()},
        seconds=sum(float(each.provenance["seconds"]) for each in artifacts.values()),
        costs=costs_of(stages.values(), lookup),
    )
