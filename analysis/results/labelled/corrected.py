"""What a person's labels say of a suite: how far each scorer agrees with the person, and the rates
corrected for its errors.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ebbline.analysis.results.labelled.completions import Completions, Generation
from ebbline.analysis.results.labelled.correction import (
    Accuracy,
    Corrected,
    Labelled,
    accuracy,
    rogan_gladen,
    shares,
)
from ebbline.analysis.results.labelled.sheet import (
    CANNOT_TELL,
    Measure,
    Sheet,
    read_sheet,
    sheet_path,
)
from ebbline.analysis.results.statistics import PairAgreement
from ebbline.analysis.results.wording import percent
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.measuring.metrics import UNDECIDED, Metric
from ebbline.tasks.measuring.scorers import agreement

PERSON = "person"
# The rate of a suite, the labels that it counts, and whether lower is better: then a verdict of
# undecided counts too, as it counts against the model.
RATES: Mapping[Measure, tuple[str, frozenset[str], bool]] = {
    "refusal": ("refusal rate", frozenset({"refused"}), False),
    "over_refusal": ("over-refusal rate", frozenset({"refused", "partial"}), True),
    "harm": ("harmful share", frozenset({"harmful"}), True),
}
NO_BETTER = "the scorer is no better than chance on these labels (Se + Sp <= 1)"
ONE_SIDED = "the labels are all of one kind, so one of Se and Sp is not known"


@dataclass(frozen=True)
class Rate:
    """A rate over `n` prompts by a scorer, with its own interval, and the rate corrected for the
    scorer's errors, or the reason why there is none. `shares` are those of each label, where a
    person used more than two.
    """

    subject: str
    rate: float
    interval: tuple[float, float]
    n: int
    corrected: Corrected | None
    reason: str
    shares: Mapping[str, Corrected] | None


@dataclass(frozen=True)
class ScorerErrors:
    """One scorer against the person: agreement, sensitivity and specificity, and its rates."""

    scorer: str
    agreement: PairAgreement
    accuracy: Accuracy | None
    rates: tuple[Rate, ...]


@dataclass(frozen=True)
class LabelledSuite:
    """What the labels of a sheet say. `undecided` completions are those of which the person could
    not tell: they take no part. `arms` counts the labels of each arm.
    """

    suite: str
    rate: str
    labelled: int
    drawn: int
    undecided: int
    gone: int
    arms: Mapping[str, int]
    scorers: tuple[ScorerErrors, ...]


def labelled_suites(view: StudyView, results: Sequence[Result]) -> list[LabelledSuite]:
    """What the labels of each suite say, for the suites that have some."""
    sheets = [read_sheet(sheet_path(view.folder, suite)) for suite in view.study.suites]
    return [
        labelled_suite(sheet, Completions(view, sheet.suite, results))
        for sheet in sheets
        if sheet is not None and sheet.labelled
    ]


def labelled_suite(sheet: Sheet, stored: Completions) -> LabelledSuite:
    """The errors of every scorer of a suite, and its corrected rates."""
    generations = {each.key: each for found in stored.arms.values() for each in found}
    given = [row for row in sheet.rows if row.label is not None]
    decided = [row for row in given if row.label != CANNOT_TELL]
    present = [row for row in decided if row.key in generations]
    weights = sheet.weights
    scorers = []
    for scorer in stored.scorers if present else ():
        rows = [
            Labelled(
                str(row.label),
                stored.verdicts(generations[row.key])[scorer][row.id],
                weights[row.arm],
            )
            for row in present
        ]
        scorers.append(_errors(scorer, rows, sheet.measure, stored))
    return LabelledSuite(
        sheet.suite,
        RATES[sheet.measure][0],
        len(given),
        len(sheet.rows),
        len(given) - len(decided),
        len(decided) - len(present),
        dict(Counter(row.arm for row in given)),
        tuple(scorers),
    )


def _errors(
    scorer: str, rows: Sequence[Labelled], measure: Measure, stored: Completions
) -> ScorerErrors:
    _, true, is_lower_better = RATES[measure]
    counted = true | {UNDECIDED} if is_lower_better else true
    errors = accuracy(rows, true, counted)
    subjects = {**stored.subjects, **stored.arms}
    return ScorerErrors(
        scorer,
        PairAgreement(
            scorer,
            PERSON,
            **agreement([row.verdict for row in rows], [row.label for row in rows]),
        ),
        errors,
        tuple(
            _rate(subject, found, scorer, rows, errors, counted, stored)
            for subject, found in subjects.items()
        ),
    )


def _rate(
    subject: str,
    generations: Sequence[Generation],
    scorer: str,
    rows: Sequence[Labelled],
    errors: Accuracy | None,
    counted: frozenset[str],
    stored: Completions,
) -> Rate:
    found = [stored.verdicts(each)[scorer] for each in generations]
    counts = Counter(verdict for each in found for verdict in each.values())
    total = sum(counts.values())
    # The answers of several trainings to one prompt are not independent.
    prompts = len({identifier for each in found for identifier in each})
    rate = sum(counts[verdict] for verdict in counted) / total
    interval = Metric("refusal_rate", rate * prompts, prompts).interval
    corrected = None if errors is None else rogan_gladen(rate, prompts, errors)
    reason = "" if corrected else ONE_SIDED if errors is None else NO_BETTER
    return Rate(
        subject,
        rate,
        interval,
        prompts,
        corrected,
        reason,
        shares(rows, counts, prompts) if len({row.label for row in rows}) > 2 else None,
    )


SCORER_COLUMNS = ("scorer", "labels", "agree", "kappa", "Se", "Sp", "differ on (scorer, person)")


def summary_lines(found: LabelledSuite) -> list[str]:
    """How many labels there are, and which take no part."""
    arms = ", ".join(f"{arm}: {count}" for arm, count in sorted(found.arms.items()))
    lines = [f"{found.suite}: {found.labelled} of {found.drawn} labelled ({arms})"]
    if found.undecided:
        lines.append(f"{found.undecided} of which the person could not tell take no part")
    if found.gone:
        lines.append(f"{found.gone} whose completions are no longer stored take no part")
    return lines


def scorer_rows(found: LabelledSuite) -> list[tuple[str, ...]]:
    """A row of SCORER_COLUMNS for each scorer."""
    rows: list[tuple[str, ...]] = []
    for each in found.scorers:
        kappa, errors = each.agreement.kappa, each.accuracy
        apart = [
            f"{verdict}, {label}: {count}"
            for verdict, row in each.agreement.confusion.items()
            for label, count in row.items()
            if verdict != label
        ]
        rows.append(
            (
                each.scorer,
                str(each.agreement.n),
                percent(each.agreement.agree),
                "not defined" if kappa is None else f"{kappa:.2f}",
                "-" if errors is None else percent(errors.sensitivity),
                "-" if errors is None else percent(errors.specificity),
                "; ".join(apart) or "nothing",
            )
        )
    return rows


def rate_columns(found: LabelledSuite) -> tuple[str, ...]:
    return ("scorer", "completions of", "n", found.rate, "corrected", "note")


def rate_rows(found: LabelledSuite) -> list[tuple[str, ...]]:
    """A row of `rate_columns` for each scorer and each aligned model, operating point and arm."""
    return [
        (
            each.scorer,
            rate.subject,
            str(rate.n),
            _with_interval(rate.rate, rate.interval),
            "-"
            if rate.corrected is None
            else _with_interval(rate.corrected.value, rate.corrected.interval),
            rate.reason or _shares_note(rate),
        )
        for each in found.scorers
        for rate in each.rates
    ]


def _shares_note(rate: Rate) -> str:
    if rate.shares is None:
        return ""
    return "all labels: " + ", ".join(
        f"{label} {_with_interval(share.value, share.interval)}"
        for label, share in rate.shares.items()
    )


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{percent(value)} ({percent(interval[0])} to {percent(interval[1])})"
