"""`ebbline rescore`: score stored completions anew, without a model."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ebbline.analysis.results.wording import settings_label
from ebbline.sweeps.study.points import keys_of
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.suites import OverRefusalSuite, RefusalSuite
from ebbline.tables import print_table
from ebbline.tasks.data.csv_rows import spreadsheet_cell
from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring import score
from ebbline.tasks.measuring.completions import read_completions
from ebbline.tasks.specs import GenerateSpec, ScoreSpec

if TYPE_CHECKING:
    from ebbline.sweeps.study.view import StudyView  # with a database: the extra `sweep`

VERDICTS = ("refused", "partial", "complied", "undecided")


def rescore(generations: Mapping[str, Sequence[Path]], spec: ScoreSpec) -> list[dict[str, Any]]:
    """Score stored generations without a model. `generations` maps a name to its folders, one for
    each block. Returns a row of counts and rates for each generation and scorer.
    """
    rows = []
    for name, folders in generations.items():
        completions = [row for folder in folders for row in read_completions(folder)]
        verdicts = score.verdicts_of(spec, completions, {})
        compared = score.compared(verdicts)
        for scorer, found in verdicts.items():
            rate = score.refusal_metrics(spec.measure, [each.verdict for each in found])[0]
            low, high = rate.interval
            kappa = next(
                (
                    pair["kappa"]
                    for pair in compared["pairs"]
                    if {pair["one"], pair["other"]} == {spec.scorer, scorer}
                ),
                None,
            )
            counts = {
                verdict: sum(each.verdict == verdict for each in found) for verdict in VERDICTS
            }
            incoherent = sum(each.incoherent for each in found)
            rows.append(
                {
                    "generation": name,
                    "scorer": scorer,
                    "n": rate.n,
                    **counts,
                    "incoherent": incoherent,
                }
                | {
                    rate.name: rate.value,
                    "low": low,
                    "high": high,
                    f"kappa with {spec.scorer}": kappa,
                }
            )
    return rows


def measure_of(study: Study, suite: str) -> Literal["refusal", "over_refusal"]:
    """The measure of a suite that counts refusals. Raises EvaluationError for any other suite."""
    measure = study.suites[suite].measure if suite in study.suites else None
    if not isinstance(measure, RefusalSuite | OverRefusalSuite):
        counting = sorted(
            name
            for name, entry in study.suites.items()
            if isinstance(entry.measure, RefusalSuite | OverRefusalSuite)
        )
        raise EvaluationError(
            f"{study.study} has no suite {suite!r} that counts refusals; it has {counting}"
        )
    return measure.kind


def generations_of(view: "StudyView", suite: str) -> dict[str, list[Path]]:
    """Name -> folders of every finished generation of a suite, over a study's points and seeds.
    Raises EvaluationError when there is none.
    """
    from ebbline.analysis.results.collect import collect  # only a study needs the extra `sweep`

    study, found = view.study, dict[str, list[Path]]()
    for result in collect(view):
        for seed in study.seeds:
            keys = keys_of(result.keys, f"generate:{suite}", seed)
            if keys:
                name = f"point {result.number} ({settings_label(result.point)} seed={seed})"
                found[name] = [
                    view.home.store.open("generate", key).file(GenerateSpec.COMPLETIONS).parent
                    for key in keys
                ]
    if not found:
        raise EvaluationError(
            f"no point of {study.study} has completions for {suite!r} yet; `ebbline run` makes them"
        )
    return found


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        for row in rows:
            cells = {
                name: spreadsheet_cell(cell) if isinstance(cell, str) else cell
                for name, cell in row.items()
            }
            writer.writerow(cells)


def print_rows(rows: Sequence[Mapping[str, Any]], as_json: bool, wide: bool = False) -> None:
    if as_json:
        print(json.dumps(list(rows), indent=1))
        return
    cells = [
        [
            "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
            for value in row.values()
        ]
        for row in rows
    ]
    print_table(list(rows[0]), cells, wide, right=rows[0].keys() - {"generation", "scorer"})
