"""Warm start: a search gets the results of other studies of the home before its first proposal.

The results are copied once into the study's own database, marked with the name of their study.
Later changes of that study have no effect.

Invariant: they inform the search only. They are in no table and count as no points.
"""

from dataclasses import replace

from ebbline.sweeps.state.trials import REFUSAL_FLOOR, Entry, read
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.space import within
from ebbline.sweeps.study.study import Study
from ebbline.tasks.errors import StudyError


def prior_results(study: Study, home: Home) -> dict[str, list[Entry]]:
    """The finished points of each study in `search.warm_start` that lie in this study's space.

    Raises StudyError when the home has no such study, or its objectives or the kinds of their
    suites differ. Raises it, too, when none of its points lies in this study's space.
    """
    return {name: _results_of(study, name, home) for name in study.search.warm_start}


def _results_of(study: Study, name: str, home: Home) -> list[Entry]:
    other = home.begun(name)
    if other is None:
        raise StudyError(
            f"search.warm_start: {home.root} has no study {name!r}; it has {home.studies()}. Name "
            "one of these, or run it first"
        )
    if other.objectives != study.objectives:
        raise StudyError(
            f"search.warm_start: {name!r} measures {list(other.objectives)}, and this "
            f"study {list(study.objectives)}."
            " A search can learn only from a study with the same objectives in the same order"
        )
    for objective in study.objectives:
        suite = objective.partition(".")[0]
        ours, theirs = study.suites[suite].measure.kind, other.suites[suite].measure.kind
        if ours != theirs:
            raise StudyError(
                f"search.warm_start: {name!r} has a suite {suite!r} that measures "
                f"{theirs}, and this study's measures {ours}"
            )
    entries, _ = read(other, home.database(name))
    found = [entry for entry in entries if entry.state == "done" and _in_space(entry, study)]
    if not found and any(entry.state == "done" for entry in entries):
        own = {model: sorted(study.axes_of(model)) for model in study.models}
        raise StudyError(
            f"search.warm_start: no point of {name!r} lies in this study's space; this study's "
            f"sizes and axes are {own}"
        )
    return [replace(entry, misses=_misses(entry, study), drawn={}) for entry in found]


def _misses(entry: Entry, study: Study) -> tuple[tuple[str, float], ...]:
    """By how much a point misses this study's refusal floor; empty when that is no objective."""
    if study.search.constraints.refusal_floor and study.refusal_metric in study.objectives:
        return (
            (
                REFUSAL_FLOOR,
                study.refusal_floor - entry.values[study.objectives.index(study.refusal_metric)],
            ),
        )
    return ()


def _in_space(entry: Entry, study: Study) -> bool:
    if entry.point.model not in study.models:
        return False
    values = dict(entry.point.values)
    return any(
        set(branch.axes) == set(values)
        and all(within(value, branch.axes[axis]) for axis, value in values.items())
        for branch in study.branches_of(entry.point.model)
    )
