"""The report: one self-contained HTML file with the question, the answer and the results behind it.

Invariants: the page loads nothing from other addresses. It holds counts, rates, settings and
hashes, never a prompt or completion.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from ebbline.analysis.figures.importance import importance_cells, importance_notes
from ebbline.analysis.figures.projection import Projections, projection_figures
from ebbline.analysis.report.answer import answer
from ebbline.analysis.report.attempts import Attempts
from ebbline.analysis.report.defence_words import (
    against_cells,
    control_sentences,
    norm_note,
    rival_sentences,
)
from ebbline.analysis.report.findings import DrawnFigure, Findings, figures_of
from ebbline.analysis.report.page import (
    Shown,
    embedded,
    shown,
    shown_cosines,
    shown_shares,
    template,
)
from ebbline.analysis.report.provenance import ProvenanceRow
from ebbline.analysis.report.short_answer import BRACKETS, in_short
from ebbline.analysis.report.verdict import NO_CONTROL, answer_cells, shown_effects, verdict
from ebbline.analysis.results.before_after import before_after_cells, trios
from ebbline.analysis.results.claims.family import family
from ebbline.analysis.results.controls.means import control_notes, names_controls
from ebbline.analysis.results.defended.labels import CONTROLS_EXPLAINED
from ebbline.analysis.results.defended.modules import effect_cells
from ebbline.analysis.results.frontier import frontier, frontier_hypervolume
from ebbline.analysis.results.labelled.corrected import (
    SCORER_COLUMNS,
    LabelledSuite,
    rate_columns,
    rate_rows,
    scorer_rows,
    summary_lines,
)
from ebbline.analysis.results.measurements import NO_EVIDENCE, Baselines, Evidence
from ebbline.analysis.results.tables import (
    agreement_cells,
    category_cells,
    frontier_cells,
    frontier_frame,
)
from ebbline.analysis.results.wording import (
    NO_RESULT,
    directed_label,
    percent,
    reason_label,
    settings_label,
    status_label,
    without_paths,
)
from ebbline.sweeps.drive.live import host_names
from ebbline.sweeps.search.importance import METHOD
from ebbline.sweeps.state.controls import ControlResult
from ebbline.sweeps.study.points import STATUSES, Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences import words
from ebbline.tasks.files import write_whole

MOST_ROWS = 200  # of a table of points on the page; CSV files have all
_NO_PROJECTIONS: Projections = MappingProxyType({})


def write_report(
    found: Findings,
    folder: Path,
    cost: Mapping[str, object],
    provenance: Sequence[ProvenanceRow],
    projections: Projections = _NO_PROJECTIONS,
    plan: Path | None = None,
    figures: Mapping[str, DrawnFigure] | None = None,
    notes: Sequence[str] = (),
    attempts: Attempts | None = None,
    labelled: Sequence[LabelledSuite] = (),
) -> Path:
    """Writes FOLDER/report.html.

    `labelled` is what a person's labels say of the scorers. `notes` are sentences to print. `cost`
    maps labels to values. `plan` is the SVG picture of the latest plan. `figures` is the result of
    figures_of; the figures are drawn if it is not given. Without evidence there are no paired
    comparisons, no tables by category and no scorer agreement. A part of the page that fails is
    left out, noted in `attempts`, and named at the top of the page.
    """
    study, results, hosts = found.study, found.results, host_names(folder)
    attempts = Attempts() if attempts is None else attempts
    make = attempts.make
    drawn = figures_of(found, attempts) if figures is None else figures
    embedded_figures = {
        name: make(
            f"the figure {name} of the report",
            partial(shown, each.figure, each.words, each.caption),
        )
        for name, each in drawn.items()
    }
    pictures = {name: each for name, each in embedded_figures.items() if each is not None}
    parts: dict[str, Any] = {"figures": pictures}
    for field, (name, build, missing) in _parts(found, projections, plan, hosts, labelled).items():
        made = make(name, build)
        parts[field] = missing if made is None else made
    page = template("report/report_template.html").render(
        **parts,
        study=study,
        brackets=BRACKETS,
        controls_explained=CONTROLS_EXPLAINED,
        no_control="" if names_controls(study) else NO_CONTROL,
        notes=notes,
        counts={status: sum(result.status == status for result in results) for status in STATUSES},
        objectives=[directed_label(name) for name in study.objectives],
        knobs=[each for name, each in pictures.items() if name.startswith("settings-")],
        means=any(
            metric.squares is not None for result in results for metric in result.metrics.values()
        ),
        importance_method=METHOD,
        most_rows=MOST_ROWS,
        cost=cost,
        provenance=[
            (group, list(rows))
            for group, rows in itertools.groupby(provenance, key=lambda row: row.group)
        ],
        missing=[without_paths(line, hosts) for line in attempts.lines()],
    )
    return write_whole(folder / "report.html", lambda path: path.write_text(page, "utf-8"))


def _parts(
    found: Findings,
    projections: Projections,
    plan: Path | None,
    hosts: Collection[str],
    labelled: Sequence[LabelledSuite],
) -> dict[str, tuple[str, Callable[[], Any], Any]]:
    """Field of the page -> (name of the part, how it is made, what stands there if it fails)."""
    study, results, lines = found.study, found.results, found.lines
    before, evidence, nothing = found.baselines, found.evidence, pd.DataFrame()
    moves = None if found.family is None else found.family.moves
    return {
        "short": (
            "the short answer",
            lambda: in_short(study, results, before, lines, evidence, moves),
            ["The short answer could not be made."],
        ),
        "verdict": (
            "the report's first sentence",
            lambda: verdict(study, results, lines),
            "The first sentence could not be made.",
        ),
        "controlled": (
            "the sentences on controls",
            lambda: control_sentences(study, found.against),
            [],
        ),
        "rivals": (
            "the sentences on several defences",
            lambda: rival_sentences(study, found.against),
            [],
        ),
        "against": (
            "the table of comparisons with controls",
            lambda: against_cells(study, found.against),
            nothing,
        ),
        "effects_table": (
            "the table of modules",
            lambda: effect_cells(found.effects),
            nothing,
        ),
        "norm_note": ("the note on norms", lambda: norm_note(study, found.effects), ""),
        "answers": (
            "the table of answers",
            lambda: answer_cells(study, results, lines),
            nothing,
        ),
        "effects": (
            "what was shown of the hypothesis",
            lambda: shown_effects(study, results, lines),
            [],
        ),
        "paragraphs": (
            "the answer",
            lambda: list(map(_split, answer(study, results, before, evidence, found.family))),
            [],
        ),
        "hypervolume": (
            "the hypervolume",
            lambda: frontier_hypervolume(results, study.objectives),
            None,
        ),
        "states": ("the table before and after", lambda: before_after_cells(lines), []),
        "sizes": ("the points before and after", lambda: _sizes(study, results), []),
        "categories": (
            "the tables by category",
            lambda: list(category_cells(study, results, evidence)),
            [],
        ),
        "agreements": (
            "the agreement of scorers",
            lambda: list(agreement_cells(study, results, evidence)),
            [],
        ),
        "labels": ("what the labels say", lambda: list(map(_labels, labelled)), []),
        "table": (
            "the table of the frontier",
            lambda: frontier_cells(frontier_frame(results, study.objectives), study.objectives),
            nothing,
        ),
        "projections": ("what was projected", lambda: _projection_figures(projections), []),
        "importance": (
            "the table of importance",
            lambda: importance_cells(found.importance),
            nothing,
        ),
        "importance_notes": (
            "the notes on importance",
            lambda: importance_notes(found.importance),
            [],
        ),
        "failed": ("the points without a result", lambda: _failed_rows(results, hosts), []),
        "plan": ("the picture of the plan", lambda: _plan_figure(plan), None),
    }


def _labels(found: LabelledSuite) -> tuple[list[str], pd.DataFrame, pd.DataFrame]:
    """(lines, scorers against the person, corrected rates) of one suite."""
    return (
        summary_lines(found),
        pd.DataFrame(scorer_rows(found), columns=list(SCORER_COLUMNS)),
        pd.DataFrame(rate_rows(found), columns=list(rate_columns(found))),
    )


def summary(
    study: Study,
    results: Sequence[Result],
    baselines: Baselines,
    evidence: Evidence = NO_EVIDENCE,
    controls: Sequence[ControlResult] = (),
) -> dict[str, Any]:
    """The report's content as JSON values, for scripts."""
    of = family(study, results, baselines, evidence, controls)
    lines, against = of.lines, of.against
    return {
        "study": study.study,
        "objectives": list(study.objectives),
        "controls": {
            "sentences": control_sentences(study, against),
            "defences": rival_sentences(study, against),
            "notes": list(control_notes(study, results, controls)),
        },
        "verdict": verdict(study, results, lines),
        "effects": dict(shown_effects(study, results, lines)),
        "in_short": in_short(study, results, baselines, lines, evidence, of.moves),
        "answer": answer(study, results, baselines, evidence, of),
        "tests_in_family": of.size,
        "hypervolume": frontier_hypervolume(results, study.objectives),
        "points": {
            status: sum(result.status == status for result in results) for status in STATUSES
        },
        "frontier": rows_for_scripts(frontier(results, study.objectives)),
    }


def rows_for_scripts(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Points as JSON values: number, model, axis values, and metrics with 95% intervals."""
    return [
        {
            "number": result.number,
            "model": result.point.model,
            **dict(result.point.values),
            "metrics": {
                name: {
                    "value": metric.value,
                    "low": metric.interval[0],
                    "high": metric.interval[1],
                    "n": metric.n,
                    "undecided": metric.undecided,
                }
                for name, metric in sorted(result.metrics.items())
            },
        }
        for result in results
    ]


def _split(paragraph: str) -> tuple[str, str]:
    """A paragraph's heading ("small, defence") and text; general paragraphs have no heading."""
    heading, colon, text = paragraph.partition(": ")
    if not colon or not heading.endswith((", fine-tuning", ", defence", ", operating point")):
        return "", paragraph
    return heading, text[0].upper() + text[1:]


def _failed_rows(
    results: Sequence[Result], hosts: Collection[str]
) -> list[tuple[int, str, str, str, str]]:
    """(number, model, settings, status, reason) of each point without a result, by number."""
    failed = sorted(
        (result for result in results if result.status in NO_RESULT),
        key=lambda result: result.number,
    )
    return [
        (
            each.number,
            each.point.model,
            settings_label(each.point),
            status_label(each.status),
            without_paths(reason_label(each.reason), hosts),
        )
        for each in failed
    ]


def _sizes(study: Study, results: Sequence[Result]) -> list[str]:
    """For each model, a sentence naming its fine-tuned and its defended point."""
    sentences, floor = [], percent(study.refusal_floor)
    for trio in trios(study, results):
        tuned = (
            "no point without a defence"
            if trio.tuned is None
            else f"point {trio.tuned.number} ({settings_label(trio.tuned.point)})"
        )
        if trio.shipped is None:
            sentences.append(f"{trio.model}: fine-tuned is {tuned}; nothing is defended.")
        else:
            how = (
                f"is confirmed to hold the refusal floor of {floor}"
                if trio.holds
                else f"meets the refusal floor of {floor} as a candidate"
                if trio.meets
                else f"comes nearest to the refusal floor of {floor}, below it"
            )
            settings = settings_label(trio.shipped.point)
            sentences.append(
                f"{trio.model}: fine-tuned is {tuned}; defended is point "
                f"{trio.shipped.number} ({settings}), which {how}."
            )
    return sentences


def _plan_figure(plan: Path | None) -> Shown | None:
    if plan is None or not plan.exists():
        return None
    alt = (
        "Gantt chart: stages over time, as planned, a row for each GPU. The totals, predicted "
        "and real, are in the table above."
    )
    return embedded(
        plan.read_bytes(), alt, "The plan of the latest run, predicted before it began."
    )


def _projection_figures(projections: Projections) -> list[Shown]:
    figures = projection_figures(projections)
    found = []
    for model, adapters in projections.items():
        if adapters:
            label, first = next(iter(adapters.items()))
            curves = {name: adapter.rows for name, adapter in adapters.items()}
            found.append(
                shown_cosines(
                    figures[f"{words.MAPS}-{model}"],
                    f"{model}, {label}",
                    first.rows,
                    first.chosen,
                )
            )
            count = f"{len(adapters)} projected adapter{'s' if len(adapters) > 1 else ''}"
            found.append(
                shown_shares(figures[f"{words.SHARES}-{model}"], f"{model}, {count}", curves)
            )
    return found
