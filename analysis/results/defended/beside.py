"""A defence beside its controls and beside the other defences of a study.

Invariants: a control is compared only with the settings that it was run for. Draws of a random
control stand together, and never on a frontier of their own. A defence that changed no module is no
adapter of that defence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ebbline.analysis.results.defended.advantage import Advantage, advantage, together_corrected
from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.measurements import (
    Comparison,
    Evidence,
    Measurement,
    compared,
    is_defended,
    measurement,
    refusal_metric,
    usefulness_metric,
)
from ebbline.analysis.results.wording import natural
from ebbline.sweeps.state.controls import ControlResult, is_the_partner, operating_points
from ebbline.sweeps.study.points import Point, Result, defence_of, distinct, training_of
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.in_use import DEFENCES
from ebbline.tasks.measuring.metrics import Metric, pooled


@dataclass(frozen=True)
class Beside:
    """One control of a defence on one model: `partners` are the defence's results, and each draw
    has a result for each of them, in their order.
    """

    model: str
    defence: str
    control: str
    partners: tuple[Result, ...]
    draws: tuple[tuple[Result, ...], ...]


@dataclass(frozen=True)
class Against:
    """A defence against a control, or against another defence.

    `at_point` compares the two at the defence's operating point, by metric: `before` is the
    control, its draws together, and `after` the defence. It is empty for another defence, and where
    the operating point has no such control.
    """

    model: str
    defence: str
    other: str
    is_control: bool
    advantage: Advantage | None
    point: Result | None = None
    at_point: Mapping[str, Comparison] = field(default_factory=dict)


def besides(results: Sequence[Result], controls: Sequence[ControlResult]) -> list[Beside]:
    """Every control beside its defence, by model, defence and control.

    A setting without all draws of a control is left out of it.
    """
    done = {result.number: result for result in finished(results)}
    found: dict[tuple[str, str, str], dict[int, dict[int, Result]]] = {}
    for each in controls:
        partner = done.get(each.of.partner.number)
        if partner is None or is_the_partner(each.of):
            continue
        if each.result.status == "done":
            name = partner.point.model, defence_of(partner.point).name, each.of.control
            own = found.setdefault(name, {}).setdefault(partner.number, {})
            own[each.of.draw or 0] = each.result
    listed = []
    for (model, defence, control), settings in found.items():
        draws = sorted({draw for own in settings.values() for draw in own})
        complete = [done[number] for number, own in settings.items() if sorted(own) == draws]
        partners = [each for own in by_training(complete).values() for each in distinct(own)]
        if partners:
            columns = tuple(
                tuple(settings[partner.number][draw] for partner in partners) for draw in draws
            )
            listed.append(Beside(model, defence, control, tuple(partners), columns))
    return sorted(listed, key=lambda each: (natural(each.model), each.defence, each.control))


def against_controls(
    study: Study,
    results: Sequence[Result],
    controls: Sequence[ControlResult],
    evidence: Evidence,
) -> list[Against]:
    """Each defence against each of its controls.

    All comparisons at operating points are corrected together. Empty without a refusal rate.
    """
    refusal, useful = refusal_metric(study), usefulness_metric(study)
    if refusal is None:
        return []
    names = [name for name in (refusal, useful) if name is not None]
    listed = besides(results, controls)
    points = operating_points(study, results)
    places = [
        (each, name, point)
        for each in listed
        for name in names
        if (point := points.get((each.model, each.defence))) is not None and point in each.partners
    ]
    comparisons = compared([_pair(each, point, name, evidence) for each, name, point in places])
    at_points: dict[tuple[str, str, str], dict[str, Comparison]] = {}
    for (each, name, _), comparison in zip(places, comparisons, strict=True):
        at_points.setdefault((each.model, each.defence, each.control), {})[name] = comparison
    advantages = together_corrected(
        [
            None
            if useful is None
            else advantage(
                by_training(each.partners), _draws_by_training(each), refusal, useful, evidence
            )
            for each in listed
        ]
    )
    return [
        Against(
            each.model,
            each.defence,
            each.control,
            True,
            found,
            points.get((each.model, each.defence)),
            at_points.get((each.model, each.defence, each.control), {}),
        )
        for each, found in zip(listed, advantages, strict=True)
    ]


def against_defences(study: Study, results: Sequence[Result], evidence: Evidence) -> list[Against]:
    """Each pair of defences of a model, over equally many distinct adapters of each training. All
    pairs are corrected together.
    """
    refusal, useful = refusal_metric(study), usefulness_metric(study)
    if refusal is None or useful is None:
        return []
    pairs: list[Against] = []
    for model in sorted({result.point.model for result in finished(results)}, key=natural):
        arms = defended(results, model)
        names = list(arms)
        for index, one in enumerate(names):
            for other in names[index + 1 :]:
                theirs = {training: [own] for training, own in by_training(arms[other]).items()}
                found = advantage(by_training(arms[one]), theirs, refusal, useful, evidence)
                if found is not None:
                    pairs.append(Against(model, one, other, False, found))
    fair = together_corrected([each.advantage for each in pairs])
    return [replace(each, advantage=found) for each, found in zip(pairs, fair, strict=True)]


def defended(results: Sequence[Result], model: str) -> dict[str, list[Result]]:
    """Defence -> its results on a model that it changed, of each training those with distinct
    adapters. The order is that of the list of defences, so that two models compare a pair the same
    way round.

    Two trainings may give one adapter, as where all modules are dropped: it is one of each.
    """
    arms: dict[str, list[Result]] = {}
    for result in finished(results):
        if result.point.model == model and is_defended(result):
            arms.setdefault(defence_of(result.point).name, []).append(result)
    return {
        name: [each for own in by_training(arms[name]).values() for each in distinct(own)]
        for name in DEFENCES
        if name in arms
    }


def by_training(results: Sequence[Result]) -> dict[Point, list[Result]]:
    found: dict[Point, list[Result]] = {}
    for result in results:
        found.setdefault(training_of(result.point), []).append(result)
    return found


def _draws_by_training(each: Beside) -> dict[Point, list[list[Result]]]:
    """Training -> draws -> the results of the control, in the order of the partners."""
    rows = by_training(each.partners)
    place = {partner.number: index for index, partner in enumerate(each.partners)}
    return {
        training: [[draw[place[partner.number]] for partner in own] for draw in each.draws]
        for training, own in rows.items()
    }


def _pair(
    each: Beside, point: Result, name: str, evidence: Evidence
) -> tuple[Measurement, Measurement]:
    """The control's draws together, and the defence, whose samples are repeated for every draw. A
    draw is no training seed: those of one seed count as one.
    """
    place = each.partners.index(point)
    draws = [measurement(draw[place], name, evidence) for draw in each.draws]
    own = measurement(point, name, evidence)
    keys = [(draw, seed) for draw, found in enumerate(draws) for seed in found.replicates]
    before = {number: draws[draw].replicates[seed] for number, (draw, seed) in enumerate(keys)}
    after = {
        number: own.replicates[seed]
        for number, (_, seed) in enumerate(keys)
        if seed in own.replicates
    }
    seeds = max(1, len(own.metric.seeds))
    # Without samples the values of `together` stand in the same order
    seed_of = {number: seed for number, (_, seed) in enumerate(keys)} or {
        number: number % seeds for number in range(len(draws) * seeds)
    }
    return Measurement(
        together([each.metric for each in draws]), before, seed_of=seed_of
    ), Measurement(own.metric, after, seed_of=seed_of if after else {})


def together(draws: Sequence[Metric]) -> Metric:
    """One metric over the draws of a control: sums are added, and the prompts count once."""
    seeds = tuple(value for metric in draws for value in (metric.seeds or (metric.value,)))
    return draws[0] if len(draws) == 1 else replace(pooled(draws), seeds=seeds)
