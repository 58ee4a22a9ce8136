"""`ebbline compare`: compare studies with the first one; as text, JSON, a page or a picture."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ebbline.analysis.figures.comparison import comparison_figure
from ebbline.analysis.figures.drawing import save_as
from ebbline.analysis.report.answer import meaning, tally
from ebbline.analysis.report.page import shown, template
from ebbline.analysis.results.collect import StoredEvidence, collect
from ebbline.analysis.results.comparison import (
    ModelComparison,
    Side,
    StudyComparison,
    Volumes,
    study_comparison,
)
from ebbline.analysis.results.measurements import Comparison
from ebbline.analysis.results.picks.floors import Floor
from ebbline.analysis.results.picks.picked import in_words, missed_by, named
from ebbline.analysis.results.tables import in_points
from ebbline.analysis.results.wording import directed_label, metric_label, percent, undecided_label
from ebbline.cluster.store.resolver import Resolver
from ebbline.commands.pick import floors_of, maximised_of
from ebbline.sweeps.study.changes import differences, lasting
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from ebbline.tasks.files import write_whole
from ebbline.tasks.measuring.metrics import Metric
from ebbline.tasks.stage import Stage

PICTURES = (".png", ".pdf", ".svg")
MODEL_FIELDS = ("quantisation", "dtype")  # of a suite's specs; they do not change its prompts
UNCOMPARED = ("study", "question", "hypothesis")


def compare_studies(
    names: Sequence[str],
    homes: Sequence[Path],
    floors: Sequence[str],
    to: Path | None,
    as_json: bool,
) -> None:
    """Print the comparison of studies. `homes` has one home for all, or one for each study. `to` is
    a file for its page or picture.

    Raises StudyError for studies that cannot be compared and for a `to` that cannot be written.
    """
    if len(names) < 2:
        raise StudyError("a comparison needs two studies or more")
    if len(homes) not in (1, len(names)):
        raise StudyError(
            f"{len(homes)} homes for {len(names)} studies: give --home once, or once for "
            "each study in their order"
        )
    if to is not None and to.suffix not in (".html", *PICTURES):
        raise StudyError(f"--to {to}: a page ends in .html, a picture in {', '.join(PICTURES)}")
    sides = _sides(names, list(homes) * (len(names) if len(homes) == 1 else 1))
    for side in sides:
        if not any(side.of(model) for model in side.study.models):
            raise StudyError(f"{side.label} has no finished point; `ebbline run` continues it")
    first = sides[0]
    bounds = _floors(sides, floors)
    maximised = maximised_of(first.study, None)
    found = [study_comparison(first, other, bounds, maximised) for other in sides[1:]]
    drawn = [name for name in first.study.objectives if all(name in each.metrics for each in found)]
    if to is not None:
        if not drawn:
            raise StudyError(
                f"the studies share none of {', '.join(first.study.objectives)}, so --to has "
                "nothing to draw"
            )
        _write(to, sides, found, bounds, drawn)
    if as_json:
        print(
            json.dumps(
                {
                    "floors": list(map(str, bounds)),
                    "comparisons": [_json(each) for each in found],
                    "to": to and str(to),
                },
                indent=1,
            )
        )
        return
    for each in found:
        for title, notes, tables in _sections(each, bounds):
            print("\n".join([title, *(f"  {note}" for note in notes)]))
            for caption, table in tables:
                print(f"  {caption}")
                for metric, one, other, move in table.itertuples(index=False, name=None):
                    print(f"    {metric}: {one}; {other}; {move}")
            print()
    print(meaning(_comparisons(found)))
    if to is not None:
        print(f"wrote {to}")


def _sides(names: Sequence[str], homes: Sequence[Path]) -> list[Side]:
    views = []
    for name, home in zip(names, homes, strict=True):
        view = StudyView.begun(home, name)
        view.home.require(view.study.study)
        views.append(view)
    titles = [view.study.study for view in views]
    labels = [
        title if titles.count(title) == 1 else f"{title} in {view.home.root.name}"
        for title, view in zip(titles, views, strict=True)
    ]
    if len(set(labels)) < len(labels):
        raise StudyError(
            f"two studies have the same name and home folder ({', '.join(labels)}); "
            "give each its own home"
        )
    return [
        Side(label, view.study, collect(view), StoredEvidence(view), _suite_settings(view))
        for label, view in zip(labels, views, strict=True)
    ]


def _suite_settings(view: StudyView) -> dict[str, dict[str, object]]:
    """Suite -> the settings that decide what it measures, for suites whose prompts are in the
    store. A judge's settings are part of them.
    """
    resolver, found = Resolver(view.home.store), dict[str, dict[str, object]]()
    for suites in view.graph.baselines().values():
        for suite, stage in suites.items():
            generation = stage.inputs.get("generation")
            prompted = generation if isinstance(generation, Stage) else stage
            hashed: Any = resolver.hashed(prompted)
            if hashed is None:
                continue
            own = {
                name: value for name, value in hashed["spec"].items() if name not in MODEL_FIELDS
            }
            judges = {
                name: str(item.spec.model_dump())
                for name, item in stage.inputs.items()
                if isinstance(item, Stage) and item is not generation
            }
            scored = {} if prompted is stage else dict(stage.spec.model_dump())
            race = str(getattr(view.study.suites[suite].measure, "race", None))
            found.setdefault(
                suite,
                {"prompts": hashed["inputs"]["prompts"], **own, **scored, **judges, "race": race},
            )
    return found


def _floors(sides: Sequence[Side], texts: Sequence[str]) -> tuple[Floor, ...]:
    """One set of floors for all studies: `pick`'s floors of the first study, with the strictest
    refusal floor of all studies.
    """
    found = floors_of(sides[0].study, texts)
    refusal = sides[0].study.refusal_metric
    strictest = max(side.study.refusal_floor for side in sides)
    given = {floors_of(sides[0].study, [text])[-1].metric for text in texts}
    floors = tuple(
        Floor(refusal, strictest) if each.metric == refusal and refusal not in given else each
        for each in found
    )
    for side in sides[1:]:
        for floor in floors:
            try:
                side.study.metric(floor.metric)
            except ValueError as error:
                raise StudyError(
                    f"{side.label} has no operating point at the floor of {floor.metric}: {error}"
                ) from None
    return floors


def _sections(
    found: StudyComparison, floors: Sequence[Floor]
) -> Iterator[tuple[str, list[str], list[tuple[str, pd.DataFrame]]]]:
    """(title, notes, (caption, table)...): first what is comparable, then each size."""
    notes = [
        f"not comparable, {suite}: {reason}; intervals only"
        for suite, reason in found.apart.items()
    ]
    one, other = found.before.study, found.after.study
    before, after = (
        {k: v for k, v in lasting(s.model_dump(mode="json")).items() if k not in UNCOMPARED}
        for s in (one, other)
    )
    differ = [
        line
        for line in differences(before, after)
        if not line.startswith(("search.", "refusal_floor"))
    ]
    for label, end in ((found.before.label, ": removed"), (found.after.label, ": added")):
        only = [line.removesuffix(end) for line in differ if line.endswith(end)]
        notes += [f"only in {label}: {', '.join(only)}"] if only else []
    notes += [
        f"other settings: {line}" for line in differ if not line.endswith((": removed", ": added"))
    ]
    notes += [] if differ else ["their settings are the same"]
    if not found.sizes:
        notes.append("no size has finished points in both")
    yield f"{found.after.label} against {found.before.label}", notes, []
    for size in found.sizes:
        yield (
            f"{found.after.label} against {found.before.label}: {size.model}",
            list(_notes(size)),
            list(_tables(size, found, floors)),
        )


def _notes(size: ModelComparison) -> Iterator[str]:
    if size.volumes is not None:
        yield f"hypervolume of the frontier {_volumes(size.volumes)}"
        if not size.volumes.comparable:
            before, after = size.volumes.points
            yield (
                f"no verdict on the hypervolume: the frontiers come from {before} and {after} "
                "different points, and a frontier of more points reaches further by chance alone"
            )
    if not size.shared:
        yield "no point has the same settings in both"
        return
    yield (
        f"{len(size.shared)} {'point has' if len(size.shared) == 1 else 'points have'} the "
        "same settings in both:"
    )
    for name, comparisons in size.at_shared.items():
        yield f"  {metric_label(name)} is {tally(comparisons, 'point')}"


def _volumes(found: Volumes) -> str:
    text = f"{found.before:.3f} before, {found.after:.3f} after, difference {found.difference:+.3f}"
    if found.interval is None:
        return (
            f"{text} (no interval: an objective's samples are missing, or it is not a share of "
            "them)"
        )
    low, high = found.interval
    if low == high == 0:
        return f"{text} (both studies' points have the same outcome on every prompt)"
    how = (
        "over the prompts of both"
        if found.paired
        else "over each study's own prompts, which differ"
    )
    seeds, sure = "", f", so {found.move}" if found.move else ""
    if found.over_seeds is not None:
        low_S, high_S = found.over_seeds.interval
        seeds = f"; over {found.over_seeds.seeds} training seeds {low_S:+.3f} to {high_S:+.3f}"
    elif sure:
        sure += " with these adapters"
    return f"{text} (95% bootstrap {how}: {low:+.3f} to {high:+.3f}{seeds}{sure})"


def _tables(
    size: ModelComparison, found: StudyComparison, floors: Sequence[Floor]
) -> Iterator[tuple[str, pd.DataFrame]]:
    caption = (
        f"Operating points, {in_words(floors)}; they were picked by these numbers, which the "
        "p-values do not allow for"
    )
    for side, own in zip((found.before, found.after), size.picks, strict=True):
        lacking = "" if own.meets else f", the nearest point: {missed_by(own, None)}"
        caption += f"; {side.label}: {named(own.result)}{lacking}"
    rows = [
        (directed_label(name), short_label(one.before), short_label(one.after), moved_label(one))
        for name, one in size.at_picks.items()
    ]
    yield (
        caption,
        pd.DataFrame(
            rows,
            columns=["metric", found.before.label, found.after.label, f"{found.after.label} is"],
        ),
    )


def short_label(metric: Metric) -> str:
    low, high = metric.interval
    return (
        f"{percent(metric.value)} [{100 * low:.1f}, {100 * high:.1f}], n = {metric.n}"
        f"{undecided_label(metric.undecided, ', ')}"
    )


def moved_label(found: Comparison) -> str:
    between = found.between
    about = "" if between is None else f", setting, {between.seeds} seeds"
    if found.paired is None:
        return f"{found.move} (by intervals{about})"
    low, high = found.interval
    return (
        f"{found.move} (paired, {in_points(found.paired.difference)} points [{in_points(low)}, "
        f"{in_points(high)}]{about})"
    )


def _comparisons(found: Sequence[StudyComparison]) -> list[Comparison]:
    sizes = [size for each in found for size in each.sizes]
    return [
        one
        for size in sizes
        for one in [
            *size.at_picks.values(),
            *(one for rows in size.at_shared.values() for one in rows),
        ]
    ]


def _write(
    to: Path,
    sides: Sequence[Side],
    found: Sequence[StudyComparison],
    floors: Sequence[Floor],
    drawn: Sequence[str],
) -> None:
    figure = comparison_figure(sides, drawn)
    try:
        if to.suffix != ".html":
            save_as(figure, to)
            return
        axes = " against ".join(directed_label(name) for name in reversed(drawn[:2]))
        caption = (
            "Every finished point with its 95% intervals. Filled: defended; hollow: not. "
            "The steps are each study's frontier."
        )
        page = template("report/comparison_template.html").render(
            labels=[side.label for side in sides],
            drawn=axes,
            figure=shown(figure, _alt(axes, sides, found), caption),
            compared=[section for each in found for section in _sections(each, floors)],
            meaning=meaning(_comparisons(found)),
        )
        write_whole(to, lambda path: path.write_text(page, "utf-8"))
    except OSError as error:
        raise StudyError(f"{to} cannot be written: {error}; give another path with --to") from error


def _alt(axes: str, sides: Sequence[Side], found: Sequence[StudyComparison]) -> str:
    counts = "; ".join(
        f"{side.label}, {sum(len(side.of(model)) for model in side.study.models)} points"
        for side in sides
    )
    volumes = [
        f"{each.after.label}, {size.model}: hypervolume {size.volumes.after:.3f} where "
        f"{each.before.label} has {size.volumes.before:.3f}"
        for each in found
        for size in each.sizes
        if size.volumes is not None
    ]
    return f"Scatter plots, one for each size: {axes}. " + ". ".join([counts, *volumes]) + "."


def _json(found: StudyComparison) -> dict[str, Any]:
    return {
        "before": found.before.label,
        "after": found.after.label,
        "not_comparable": dict(found.apart),
        "sizes": [
            {
                "model": size.model,
                "operating_points": [
                    {
                        "number": each.result.number,
                        "meets": each.meets,
                        "holds": each.holds,
                        "standing": each.standing,
                    }
                    for each in size.picks
                ],
                "at_operating_points": {
                    name: comparison_json(each) for name, each in size.at_picks.items()
                },
                "same_settings": [[one.number, other.number] for one, other in size.shared],
                "at_same_settings": {
                    name: [comparison_json(each) for each in rows]
                    for name, rows in size.at_shared.items()
                },
                "hypervolume": None
                if size.volumes is None
                else {
                    "before": size.volumes.before,
                    "after": size.volumes.after,
                    "difference": size.volumes.difference,
                    "interval": size.volumes.interval,
                    "paired": size.volumes.paired,
                    "points": list(size.volumes.points),
                    "over_seeds": None
                    if size.volumes.over_seeds is None
                    else {
                        "seeds": size.volumes.over_seeds.seeds,
                        "interval": size.volumes.over_seeds.interval,
                    },
                    "move": size.volumes.move,
                    "comparable": size.volumes.comparable,
                },
            }
            for size in found.sizes
        ],
    }


def comparison_json(found: Comparison) -> Mapping[str, Any]:
    sides = {
        what: {
            "value": metric.value,
            "low": metric.interval[0],
            "high": metric.interval[1],
            "n": metric.n,
            "undecided": metric.undecided,
        }
        for what, metric in (("before", found.before), ("after", found.after))
    }
    paired = None
    if found.paired is not None:
        test = found.paired
        paired = {
            "difference": test.difference,
            "interval": test.interval,
            "p_value_uncorrected": test.p_value,
            "prompts": test.items,
        }
    between = None
    if found.between is not None:
        over = found.between
        between = {
            "difference": over.difference,
            "interval": over.interval,
            "p_value_uncorrected": over.p_value,
            "degrees_of_freedom": over.freedom,
            "seeds": over.seeds,
            "paired": over.paired,
        }
    return {
        **sides,
        "move": found.move,
        "about": "setting" if found.is_about_setting else "adapter",
        "paired": paired,
        "over_seeds": between,
    }
