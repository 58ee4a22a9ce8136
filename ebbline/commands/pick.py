"""`pick`: the operating point that a defender would ship, how sure it is that it holds the floor,
and its adapter, written out.

Invariant: an adapter leaves the store only when its point, and the seed that it was trained with,
hold the study's own refusal floor and every floor that was asked for. No flag lowers the first or
turns a metric round.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ebbline.analysis.results.collect import collect
from ebbline.analysis.results.floors import METHOD, Floor, Pick, of_seed, pick, slack
from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.measurements import usefulness_metric
from ebbline.analysis.results.picked import (
    in_words,
    lines_of,
    missed_by,
    named,
    picked_json,
    too_low,
    values_of_pick,
)
from ebbline.analysis.results.wording import measured, metric_label, natural
from ebbline.shipping import ship
from ebbline.sweeps.search.searcher import limit
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.state.trials import settings_mark
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study, unknown
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError


@dataclass(frozen=True)
class Asked:
    """What was asked for on the command line: NAME=SHARE texts, metric names, sizes, as they were
    written.
    """

    floors: tuple[str, ...] = ()
    maximise: str | None = None
    model: str | None = None
    point: int | None = None
    confidence: float | None = None
    seed: int | None = None


def pick_study(view: StudyView, asked: Asked, to: Path | None, as_json: bool) -> int:
    """Print the pick of each size that was asked for; with `to`, write its adapter there. Returns 1
    when a size has none.

    Raises StudyError for what cannot be
    asked, and before anything is written when the export would be below a floor.
    """
    study, name = view.study, view.name
    view.home.require(study.study)
    floors, maximised = floors_of(study, asked.floors), maximised_of(study, asked.maximise)
    models = _models(study, asked, to)
    results = collect(view)
    done = finished(results)
    by_model = {
        model: [result for result in done if result.point.model == model] for model in models
    }
    found_by_model = {
        model: pick(own, floors, maximised, asked.confidence, asked.point)
        for model, own in by_model.items()
    }
    picks = {model: found for model, found in found_by_model.items() if found is not None}
    if asked.point is not None and not picks:
        raise StudyError(
            f"{study.study} has no finished point {asked.point}; `ebbline report {name}` "
            "lists them, in results.csv"
        )
    exported: dict[str, Any] | None = None
    if to is not None:
        if not picks:
            raise StudyError(
                f"no point of {', '.join(models)} has finished, so there is none to "
                f"export; `ebbline run {name}` goes on"
            )
        _begun_here(view)
        ((model, found),) = picks.items()
        seed, alone = _exportable(study, found, by_model[model], asked)
        exported = {
            "to": str(to),
            **ship(view, found, seed, alone, len(done), to, asked.seed is not None),
        }
    changed = view.changed()
    if as_json:
        progress = {"done": len(done), "asked_for": len(results), "limit": limit(study)}
        said = {
            "study": study.study,
            "points": progress,
            "method": METHOD,
            "changed_since_it_was_begun": changed,
            "picks": [picked_json(study, found) for found in picks.values()],
        }
        print(json.dumps({**said, "exported": exported}, indent=1))
    else:
        so_far = f"{len(done)}{f' of {limit(study)}' if limit(study) else ''} points done"
        _tell(study, name, models, picks, asked, so_far, floors, to is None and not changed)
        if changed:
            print("\nThis file is not as the study was begun, so nothing can be exported with it:")
            print("\n".join(f"  {line}" for line in changed[:10]))
        if exported is not None:
            print(
                f"\nexported to {to}: the adapter of seed {exported['seed']}, with its "
                "model card README.md. Nothing was uploaded."
            )
    asked_models = models if asked.point is None else list(picks)
    return 0 if all(model in picks and picks[model].holds for model in asked_models) else 1


def _begun_here(view: StudyView) -> None:
    """Raises StudyError unless this home began the study with these very settings, and the database
    has its points with the same.

    A floor is the one that a study was begun with, whatever its file says now. Where neither has
    kept it, nothing tells what it was.
    """
    study, home = view.study, view.home
    if not home.has_run(study.study):
        raise StudyError(
            f"{home.root} has not run {study.study!r}, so it has not kept the floor that "
            "the study was begun with; export where it was"
            " begun, or run it here once. Nothing was exported"
        )
    begun, mark = view.begun_as(), settings_mark(view.storage)
    if mark is not None and mark != begun:
        raise StudyError(
            f"the database has the points of {study.study!r} with other settings than "
            f"{home.root} has; export where it was begun."
            " Nothing was exported"
        )


def floors_of(study: Study, asked: Sequence[str]) -> tuple[Floor, ...]:
    """The floors as `NAME=SHARE`, with the study's own refusal floor unless another one was given
    for the same metric.
    """
    found: dict[str, Floor] = {}
    for text in asked:
        name, equals, share = text.partition("=")
        try:
            floor = Floor(study.metric(name.strip()), float(share))
        except ValueError as error:
            hint = (
                f"write it as NAME=SHARE, such as refusal_rate=0.95 ({share!r} is no number)"
                if not equals
                else str(error)
            )
            raise StudyError(f"--floor {text}: {hint}") from None
        if floor.metric in found:
            raise StudyError(
                f"--floor {text}: {floor.metric} has a floor already; give one a metric"
            )
        found[floor.metric] = floor
    refusal = study.refusal_metric
    if refusal is not None and refusal not in found:
        found = {refusal: Floor(refusal, study.refusal_floor), **found}
    if not found:
        raise StudyError(
            f"{study.study} measures no refusal_rate, so it has no floor of its own; give "
            "one, such as --floor acc=0.5"
        )
    return tuple(found.values())


def maximised_of(study: Study, asked: str | None) -> str | None:
    """The full name of the metric to maximise: the first objective that says how useful a model is,
    when none was asked for.
    """
    if asked is None:
        return usefulness_metric(study)
    try:
        return study.metric(asked)
    except ValueError as error:
        raise StudyError(f"--maximise {asked}: {error}") from None


def _models(study: Study, asked: Asked, to: Path | None) -> list[str]:
    models = sorted(study.models, key=natural)
    if asked.model is not None:
        if asked.model not in models:
            raise StudyError(f"--model {asked.model}: {unknown(asked.model, set(models))}")
        return [asked.model]
    if to is not None and len(models) > 1 and asked.point is None:
        raise StudyError(
            f"--export writes one adapter; say of which size with --model: {', '.join(models)}"
        )
    return models


def _exportable(
    study: Study, found: Pick, own: Sequence[Result], asked: Asked
) -> tuple[int, Result]:
    """The seed whose adapter may leave, and its point with that seed's metrics alone. Raises
    StudyError when none may.

    It is the first of the study's seeds that holds every floor by itself, or the one that was asked
    for.
    """
    refusal = study.refusal_metric
    if refusal is None:
        raise StudyError(
            f"{study.study} measures no refusal_rate, so nothing says that an adapter of "
            "it may leave; nothing was exported"
        )
    floors = (*found.floors, Floor(refusal, study.refusal_floor))
    if slack(found.result, floors, found.among, asked.confidence) < 0:
        nearest = pick(own, floors, found.maximised, asked.confidence)
        raise StudyError(_refusal(study, found, floors, nearest, asked.confidence))
    seeds = list(study.seeds[: seeds_of(found.result)])
    if asked.seed is not None and asked.seed not in seeds:
        raise StudyError(
            f"--seed {asked.seed}: point {found.result.number} was trained with {_listed(seeds)}"
        )
    for index, seed in enumerate(seeds):
        alone = replace(
            found.result,
            metrics={name: of_seed(metric, index) for name, metric in found.result.metrics.items()},
        )
        if (
            asked.seed in (None, seed)
            and slack(alone, floors, found.among * len(seeds), asked.confidence) >= 0
        ):
            return seed, alone
    whose = f"seed {asked.seed}" if asked.seed is not None else "each of its seeds"
    raise StudyError(
        f"point {found.result.number} holds {in_words(floors)} over its {len(seeds)} "
        f"seeds, but {whose} by itself does not, and one"
        " adapter is what would be shipped; nothing was exported"
    )


def _refusal(
    study: Study,
    found: Pick,
    floors: Sequence[Floor],
    nearest: Pick | None,
    confidence: float | None,
) -> str:
    by = "" if confidence is None else f" with {confidence:.0%} confidence"
    missed = [
        floor for floor in floors if slack(found.result, [floor], found.among, confidence) < 0
    ]
    values = ", ".join(
        dict.fromkeys(
            f"{metric_label(floor.metric)} {measured(found.result.metrics[floor.metric])}"
            for floor in missed
        )
    )
    owned = (
        "; the study's own refusal floor cannot be lowered for an export"
        if study.refusal_floor in [each.value for each in missed]
        else ""
    )
    text = (
        f"nothing was exported: {named(found.result)} has {values}, which does not hold "
        f"{in_words(missed)}{by}{owned}."
    )
    if nearest is None:
        return text
    said = f"{named(nearest.result)}: {values_of_pick(nearest)}"
    if nearest.holds:
        return f"{text}\nThe nearest that does is {said}."
    return (
        f"{text}\nNo point of {found.result.point.model} does. The nearest is {said}, "
        f"{missed_by(nearest, confidence)}."
    )


def _listed(seeds: Sequence[int]) -> str:
    return ("seed " if len(seeds) == 1 else "the seeds ") + ", ".join(map(str, seeds))


def _tell(
    study: Study,
    name: str,
    models: Sequence[str],
    picks: Mapping[str, Pick],
    asked: Asked,
    done: str,
    floors: Sequence[Floor],
    hint: bool,
) -> None:
    sure = "" if asked.confidence is None else f", with {asked.confidence:.0%} confidence"
    print(f"{study.study}: {done}; to hold: {in_words(floors)}{sure}")
    for model in models:
        if model in picks:
            print(f"\n{model}: {_verdict(picks[model], asked)}")
            for line in lines_of(study, picks[model]):
                print(f"  {line}")
            if hint and picks[model].holds and not too_low(study, picks[model]):
                point = "" if asked.point is None else f" --point {asked.point}"
                print(
                    f"  write its adapter: ebbline pick {name} --model {model}{point} --export DIR"
                )
        elif asked.point is None:
            print(f"\n{model}: no point has finished")


def _verdict(found: Pick, asked: Asked) -> str:
    if found.holds:
        most = (
            f", the one with most {metric_label(found.maximised)}"
            if found.maximised and asked.point is None
            else ""
        )
        return f"{named(found.result)}{most}"
    if asked.point is not None:
        return (
            f"{named(found.result)} does not hold that: it is {missed_by(found, asked.confidence)}"
        )
    near = f"{named(found.result)}, {missed_by(found, asked.confidence)}"
    return f"none of {found.among} different points holds that. The nearest is {near}"
