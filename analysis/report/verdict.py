"""The answer at a glance: one sentence, a table of each model's states, and what was shown of the
hypothesis.

Invariant: an effect counts only where the comparison of ebbline.analysis.results.before_after shows
it. A value alone shows nothing.
"""

from collections.abc import Sequence

import pandas as pd

from ebbline.analysis.results.before_after import Line, State, Step, Trio, trios
from ebbline.analysis.results.defended.labels import defence_of_study
from ebbline.analysis.results.measurements import Move, refusal_metric, usefulness_metric
from ebbline.analysis.results.tables import metric_cell, metric_column
from ebbline.analysis.results.wording import metric_label, percent
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study

STATES: dict[State, str] = {"aligned": "aligned", "tuned": "fine-tuned", "shipped": "defended"}
NO_CONTROL = (
    "No control was measured, so whether a change of the adapters without regard to alignment "
    "would do as much is not known. `controls: true` in the study measures some."
)


def verdict(study: Study, results: Sequence[Result], lines: Sequence[Line]) -> str:
    """One sentence on the points of `answer_cells`; empty when no model has refusals to compare."""
    refusals, useful = _lines(lines, refusal_metric(study)), usefulness_metric(study)
    tuned, raised = _moves(refusals, "fine-tuning"), _moves(refusals, "defence")
    what = defence_of_study(study)
    if not tuned and not raised:
        return ""
    parts = [
        _at(
            tuned,
            "lower",
            "fine-tuning lowered refusals",
            "fine-tuning did not measurably lower refusals",
        )
        or "how far fine-tuning alone moved refusals is not known"
    ]
    defended = [trio for trio in trios(study, results) if trio.shipped is not None]
    if raised:
        parts.append(
            _at(
                raised,
                "higher",
                f"{what} raised them",
                f"{what} did not measurably raise them",
            )
        )
    if defended:
        floor = f"the floor of {percent(study.refusal_floor)}"
        parts.append(_reached(floor, defended))
        if any(trio.meets for trio in defended):
            parts.append(
                _count(
                    sum(trio.holds for trio in defended),
                    len(defended),
                    "it is confirmed to hold",
                    "it is not confirmed to hold",
                )
            )
    cost = _moves(_lines(lines, useful), "defence")
    if useful is not None and cost:
        label = metric_label(useful)
        parts.append(
            _at(
                cost,
                "lower",
                f"{what} lowered {label}",
                f"{what} did not measurably lower {label}",
            )
        )
    text = "; ".join(parts)
    return f"{_capital(text)}."


def _reached(floor: str, defended: Sequence[Trio]) -> str:
    """At how many models a point meets the floor. A value of the search that a confirmation refuted
    does not meet it.
    """
    meeting, refuted, total = (
        sum(trio.meets for trio in defended),
        sum(trio.refuted for trio in defended),
        len(defended),
    )
    if refuted and total == 1:
        return f"{floor} was reached in the search and confirmed not to hold"
    text = _count(meeting, total, f"{floor} has a candidate", f"{floor} was not reached")
    only_in_search = f" (at {refuted} it was reached in the search and confirmed not to hold)"
    return text + (only_in_search if refuted else "")


def answer_cells(study: Study, results: Sequence[Result], lines: Sequence[Line]) -> pd.DataFrame:
    """A row for each model and state: its point, refusals and usefulness with 95% intervals."""
    names = [name for name in (refusal_metric(study), usefulness_metric(study)) if name is not None]
    found = {(line.model, line.name): line for line in lines}
    rows = []
    for trio in trios(study, results):
        numbers = {"tuned": trio.tuned, "shipped": trio.shipped}
        for state, label in STATES.items():
            states = [
                found[trio.model, name].states for name in names if (trio.model, name) in found
            ]
            if not any(state in each for each in states):
                continue
            point = numbers.get(state)
            rows.append(
                [trio.model, label, "" if point is None else str(point.number)]
                + [
                    metric_cell(found[trio.model, name].states[state])
                    if (trio.model, name) in found and state in found[trio.model, name].states
                    else "not measured"
                    for name in names
                ]
            )
    return pd.DataFrame(rows, columns=["model", "state", "point", *map(metric_column, names)])


def shown_effects(
    study: Study, results: Sequence[Result], lines: Sequence[Line]
) -> list[tuple[str, str]]:
    """(effect, how far this study shows it), for the effects that a hypothesis can be about."""
    refusals, useful = _lines(lines, refusal_metric(study)), usefulness_metric(study)
    what = defence_of_study(study)
    found = [
        ("Fine-tuning lowers refusals", _shown(_moves(refusals, "fine-tuning"), "lower")),
        (f"{_capital(what)} brings refusals back", _shown(_moves(refusals, "defence"), "higher")),
    ]
    if useful is not None:
        own, label = _lines(lines, useful), metric_label(useful)
        found += [
            (f"Fine-tuning changes {label}", _shown(_moves(own, "fine-tuning"), None)),
            (f"{_capital(what)} lowers {label}", _shown(_moves(own, "defence"), "lower")),
            (
                f"After {what}, {label} is still above the aligned model's",
                _shown(_moves(own, "both"), "higher"),
            ),
        ]
    holds = [trio.holds for trio in trios(study, results) if trio.shipped is not None]
    floor = percent(study.refusal_floor)
    found.append(
        (f"A defended setting refuses at least {floor}, confirmed", _of(sum(holds), len(holds)))
    )
    return found


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _lines(lines: Sequence[Line], name: str | None) -> list[Line]:
    return [line for line in lines if line.name == name]


def _moves(lines: Sequence[Line], step: Step) -> list[Move]:
    return [line.changes[step].move for line in lines if step in line.changes]


def _shown(moves: Sequence[Move], move: Move | None) -> str:
    """`None` counts moves in both directions."""
    if move is None:
        counts = [sum(each == way for each in moves) for way in ("higher", "lower")]
        ways = [
            f"{way} at {count} of {len(moves)}"
            for way, count in zip(("higher", "lower"), counts, strict=True)
            if count
        ]
        return f"shown: {', '.join(ways)}" if ways else _of(0, len(moves))
    return _of(sum(each == move for each in moves), len(moves))


def _of(count: int, total: int) -> str:
    if not total:
        return "not measured"
    if not count:
        return "not shown" + (f" at any of {total} models" if total > 1 else "")
    return "shown" + ("" if total == 1 else f" at {count} of {total} models")


def _at(moves: Sequence[Move], move: Move, did: str, did_not: str) -> str:
    """Empty without comparisons."""
    if not moves:
        return ""
    return _count(sum(each == move for each in moves), len(moves), did, did_not)


def _count(count: int, total: int, did: str, did_not: str) -> str:
    if total == 1:
        return did if count else did_not
    return f"{did} at {count} of {total} models" if count else f"{did_not} at any of {total} models"
