"""`ebbline papers`: compare a study with published results, and say for each whether and why."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from ebbline.analysis.paper.papers import NOT_KNOWN, UNKNOWN, PaperRow, beside_papers, is_tiny
from ebbline.analysis.paper.published import Published
from ebbline.analysis.results.collect import baselines, collect, prompt_sets
from ebbline.analysis.results.wording import metric_label, percent
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView


def show_papers(view: StudyView, as_json: bool) -> None:
    study = view.study
    view.home.require(study.study)
    rows = beside_papers(study, collect(view), baselines(view), prompt_sets(view))
    if as_json:
        records = [{**asdict(row), "comparable": row.comparable} for row in rows]
        print(
            json.dumps(
                {"study": study.study, "summary": _summary(study, rows), "rows": records}, indent=1
            )
        )
        return
    print(_summary(study, rows))
    paper = ""
    for row in rows:
        if row.published.paper != paper:
            paper = row.published.paper
            print(f"\n{paper}")
        print(f"  {_published_line(row.published)}; here {row.here}")
        print(f"    {row.comparable}: {_why(row)}")
    print(
        "\nPublished numbers are their authors' own. `Same` is judged from the study's settings "
        "and its suites' prompts."
    )


def _summary(study: Study, rows: Sequence[PaperRow]) -> str:
    counts = Counter[str](row.comparable for row in rows)
    if all(is_tiny(model) for model in study.models.values()):
        return (
            f"{study.study}: nothing in these tables is comparable. Its models are tiny and "
            "speak an invented language."
            " No paper measured them or used their data and prompts."
        )
    order = (
        "comparable",
        "comparable as far as is known",
        "not known to be comparable",
        "not comparable",
    )
    return f"{study.study}, of {len(rows)} published numbers: " + ", ".join(
        f"{counts[what]} {what}" for what in order
    )


def _published_line(published: Published) -> str:
    unit = percent(published.value) if published.value <= 1 else f"{published.value:g}"
    note = f" ({published.note})" if published.note else ""
    on = f" on {published.prompts or published.task}" if published.prompts or published.task else ""
    return (
        f"{published.setting}, {published.state}: {metric_label(published.metric)}{on} {unit}{note}"
    )


def _why(row: PaperRow) -> str:
    """The facts that differ, the unknown ones and the equal ones. Facts that a paper does not state
    are listed by name only.
    """
    uncertain = row.facts_with(UNKNOWN)
    unstated = [fact for fact in uncertain if fact.there == NOT_KNOWN]
    unknown = [fact for fact in uncertain if fact.there != NOT_KNOWN]
    both = {"differs": row.facts_with("differs"), UNKNOWN: unknown}
    parts = [
        f"{what}: {', '.join(f'{f.what} ({f.there}; here {f.here})' for f in facts)}"
        for what, facts in both.items()
        if facts
    ]
    names = {"not known of the paper": unstated, "same": row.facts_with("same")}
    parts += [
        f"{what}: {', '.join(fact.what for fact in facts)}"
        for what, facts in names.items()
        if facts
    ]
    return "; ".join(parts)
