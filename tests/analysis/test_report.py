"""The report: self-contained, complete about failures, and safe against foreign markup."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ebbline.analysis import report
from ebbline.analysis.figures.drawing import COLOURS, looks
from ebbline.analysis.report.findings import Findings, figures_of, findings
from ebbline.analysis.report.provenance import ProvenanceRow
from ebbline.analysis.report.report import summary, write_report
from ebbline.analysis.results.attainment import attainments
from ebbline.analysis.results.before_after import before_after
from ebbline.analysis.results.measurements import NO_EVIDENCE, Baselines, Evidence
from ebbline.analysis.results.statistics import pooled_agreement
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.gate import ModuleRow, ProjectedRows
from ebbline.tasks.measuring.metrics import Metric
from ebbline.tasks.measuring.scorers import agreement
from tests.analysis.conftest import Held, failed, result, share
from tests.analysis.page import Page, contrast

COST: dict[str, object] = {"GPU hours": 1.25, "stages run": 31, "stages reused": "40 of 71"}
PROVENANCE = [
    ProvenanceRow("Study", "study, sha256", "f" * 64),
    ProvenanceRow("Software", "ebbline", "0.1.0, commit 0123abc"),
]


def written(
    study: Study,
    results: list[Result],
    baselines: Baselines,
    folder: Path,
    evidence: Evidence = NO_EVIDENCE,
    **more: Any,
) -> Path:
    """Writes the report without the importance of axes, whose computation takes a second."""
    given = {"cost": COST, "provenance": PROVENANCE, **more}
    lines, attained = (
        before_after(study, results, baselines, evidence),
        attainments(results, study.objectives),
    )
    return write_report(
        Findings(study, results, baselines, evidence, lines, attained, {}), folder, **given
    )


@pytest.mark.slow
def test_the_report_is_one_file_that_loads_nothing(
    study: Study, results: list[Result], baselines: Baselines, tmp_path: Path
) -> None:
    found = findings(study, results, baselines)
    path = write_report(found, tmp_path, COST, PROVENANCE, notes=["Point 3: <x>"])
    assert list(tmp_path.iterdir()) == [path]
    text = path.read_text("utf-8")
    assert "<p>Point 3: &lt;x&gt;</p>" in text
    page = Page(text)
    assert page.open == []
    assert all(source.startswith(("data:image/svg+xml;base64,", "#")) for source in page.links)
    assert len(page.alts) == len(figures_of(found)) == 4 and all(page.alts)
    assert re.search(r"task accuracy: .*threshold \d+\.\d% \(\d+\.\d% to \d+\.\d%\)", page.alts[3])
    assert "url(" not in text and "@import" not in text and "<script" not in text
    for expected in (study.question, study.hypothesis, "40 of 71", "f" * 64):
        assert expected in text


def test_each_section_is_there_with_a_heading_and_a_link_to_it(
    study: Study, results: list[Result], baselines: Baselines, tmp_path: Path
) -> None:
    page = Page(written(study, results, baselines, tmp_path).read_text("utf-8"))
    sections = [
        "answer",
        "frontier",
        "thresholds",
        "states",
        "importance",
        "failed",
        "cost",
        "provenance",
    ]
    assert [name for name in page.ids if name in sections] == sections
    assert {target.removeprefix("#") for target in page.links if target.startswith("#")} == set(
        sections
    )
    assert page.levels[0] == 1 and page.levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(page.levels)), page.levels


@pytest.mark.slow
def test_the_figures_alt_texts_hold_their_numbers(
    study: Study, results: list[Result], baselines: Baselines, tmp_path: Path
) -> None:
    frontier, thresholds, states = Page(
        written(study, results, baselines, tmp_path).read_text("utf-8")
    ).alts
    assert (
        "40 finished points" in frontier
        and "aligned model refusal rate 96.0% and task accuracy 22.0%" in frontier
    )
    assert "small: 20 points, 12 defended; frontier of" in frontier
    assert "small, refusal rate: without 20.0% to 55.0%, at 0.3 20.0% to 55.0%" in thresholds
    assert (
        "refusal rate, higher is better: medium 98.5%, " in states
        and "; small 96.0%, 20.0%, 94.0%." in states
    )


def test_every_table_has_a_caption_and_names_its_rows_and_columns(
    study: Study, results: list[Result], baselines: Baselines, tmp_path: Path
) -> None:
    page = Page(written(study, results, baselines, tmp_path).read_text("utf-8"))
    assert page.tables == page.captions > 4
    assert page.scopes and None not in page.scopes


def test_bands_are_drawn_if_there_are_seeds_and_missing_ones_are_reported(
    study: Study, baselines: Baselines, tmp_path: Path
) -> None:
    once = [result(0), result(1, "medium")]
    assert (
        "Each point rests on one training seed, so there\nis no attainment band"
        in written(study, once, baselines, tmp_path).read_text()
    )
    twice = {name: Metric(name, 100, 400, seeds=(0.2, 0.3)) for name in once[0].metrics}
    text = written(
        study, [replace(once[0], metrics=twice), once[1]], baselines, tmp_path
    ).read_text("utf-8")
    assert "Each point rests on one training seed" not in text
    assert [
        alt
        for alt in Page(text).alts
        if alt.startswith("Attainment bands") and "small, 2 seeds, 1 points" in alt
    ]
    assert (
        "With two seeds the band is only the span between them. No band for medium, whose "
        "points have one seed." in text
    )


def test_the_two_sentences_the_long_answer_and_the_table_agree_on_a_change(
    study: Study, baselines: Baselines, tmp_path: Path
) -> None:
    tuned, shipped = (
        result(0, refusal=0.3, task=0.5),
        result(1, refusal=0.95, task=0.465, share=0.5, threshold=0.5),
    )
    held = Held(
        {
            (0, "task"): {0: share(100)},
            (1, "task"): {0: share(93)},
            ("small", "task"): {0: share(44)},
        }
    )
    text = written(
        study, [tuned, shipped], {"small": baselines["small"]}, tmp_path, held
    ).read_text("utf-8")
    (line,) = [
        line
        for line in before_after(study, [tuned, shipped], {"small": baselines["small"]}, held)
        if line.name.startswith("task")
    ]
    assert line.changes["defence"].move == "lower"
    assert "lower than the 50.0%" in text and "task accuracy is lower (50.0% before" in text
    assert re.search(r"-3\.5 \[-\d\.\d, -\d\.\d\], lower", text)


def test_text_has_enough_contrast_in_light_dark_and_print() -> None:
    """WCAG 2.2, 1.4.3: text has a contrast of at least 4.5 in each of the three colour sets."""
    css = (Path(report.__file__).parent / "page_template.html").read_text("utf-8")
    sets = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})", block))
        for block in re.findall(r":root \{(.*?)\}", css)
    ]
    assert len(sets) == 3
    assert "prefers-color-scheme: dark" in css and "@media print" in css
    for colours in sets:
        for ink in ("ink", "soft", "accent"):
            for page in ("page", "tint"):
                assert contrast(colours[ink], colours[page]) >= 4.5, (ink, page, colours)


def test_figure_colours_contrast_with_their_white_background() -> None:
    """WCAG 2.2, 1.4.11, for the colours of a study's first three models; later models also differ
    by their marker.
    """
    assert all(contrast(colour, "#ffffff") >= 3 for colour in COLOURS[:3])
    assert len(set(looks(f"size {number}" for number in range(7)).values())) == 7


def test_a_failed_point_is_shown_with_its_reason(study: Study, tmp_path: Path) -> None:
    text = written(study, [failed(7, "out of memory")], {}, tmp_path).read_text("utf-8")
    assert "Points without a result" in text
    assert "out of memory" in text
    assert "No point has finished" in text
    assert "could not be made" not in text  # nothing to compare is no fault


def test_a_reason_names_no_folder_and_no_host_that_the_study_ran_on(
    study: Study, tmp_path: Path
) -> None:
    ended = {
        "kind": "train",
        "label": "t",
        "key": "k",
        "host": "gpu-12/0123",
        "gpus": 1,
        "started": 0.0,
        "ended": 1.0,
        "outcome": "lost",
    }
    (tmp_path / "timeline.jsonl").write_text(json.dumps(ended) + "\n")
    text = written(
        study, [failed(7, "gpu-12 has no '/home/alice/secret set/p.csv'")], {}, tmp_path
    ).read_text("utf-8")
    assert "(a host) has no" in text and "p.csv" in text
    assert not [private for private in ("gpu-12", "alice", "secret") if private in text]


def test_markup_in_a_reason_is_escaped(study: Study, tmp_path: Path) -> None:
    text = written(
        study, [failed(0, "<script>alert(1)</script>")], {}, tmp_path, cost={"a": "<b>"}
    ).read_text("utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "<td>&lt;b&gt;</td>" in text


@pytest.mark.slow
def test_the_same_results_give_the_same_report(
    study: Study, results: list[Result], baselines: Baselines, tmp_path: Path
) -> None:
    first, second = (
        written(study, results, baselines, tmp_path / name).read_bytes() for name in ("a", "b")
    )
    assert first == second


@pytest.mark.slow
def test_projections_are_drawn_for_each_model(
    study: Study, results: list[Result], baselines: Baselines, tmp_path: Path
) -> None:
    rows = {f"model.layers.{layer}.mlp.up_proj": ModuleRow(0.1 * layer, 0.5) for layer in range(4)}
    found = ProjectedRows(rows, frozenset(list(rows)[:2]))
    projections = {"small": {"point 2 <b>": found, "point 1": found}, "medium": {"point 9": found}}
    text = written(study, results, baselines, tmp_path, projections=projections).read_text("utf-8")
    alts = Page(text).alts
    drawn = [alt for alt in alts if alt.startswith(("Heat map", "Step curves"))]
    assert [alt.partition(" ")[0] for alt in drawn] == ["Heat", "Step"] * 2
    assert "small, point 2 <b>" in drawn[0]
    assert "4 modules, 2 of them projected. Cosines from 0.00 to 0.30." in drawn[0]
    assert "highest in layer 3 (0.30)" in drawn[0]
    assert "25% from 0.00, 50% from 0.10, 75% from 0.20" in drawn[1]
    assert "small, point 2 &lt;b&gt;: the cosine of" in text
    assert "small, 2 projected adapters: the share of" in text


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [1, 3])
def test_studies_with_one_or_three_objectives_have_a_report(
    study: Study, results: list[Result], tmp_path: Path, objectives: int
) -> None:
    names = ("refusal.refusal_rate", "task.task_accuracy", "harmless.over_refusal_rate")[
        :objectives
    ]
    path = written(study.model_copy(update={"objectives": names}), results, {}, tmp_path)
    assert re.search(r"Hypervolume over all models: 0\.\d{4}", path.read_text("utf-8"))


def test_the_summary_is_json(study: Study, results: list[Result], baselines: Baselines) -> None:
    found = json.loads(json.dumps(summary(study, results, baselines), allow_nan=False))
    assert found["points"] == {
        "done": 40,
        "running": 1,
        "failed": 1,
        "invalid": 0,
        "skipped": 0,
        "outdated": 0,
    }
    assert 0 < found["hypervolume"] < 1
    assert {"number", "model", "metrics", "train.rank"} <= set(found["frontier"][0])


def test_categories_and_agreement_have_tables_when_there_is_evidence(
    study: Study, baselines: Baselines, tmp_path: Path
) -> None:
    results = [result(0, refusal=0.3), result(1, refusal=0.95, share=0.5, threshold=0.5)]
    verdicts = {
        "scorers": {
            "prefix": {"refused": 2, "n": 2},
            "judge": {"refused": 1, "complied": 1, "n": 2},
        }
    }
    pair = {
        "one": "prefix",
        "other": "judge",
        **agreement(["refused"] * 2, ["refused", "complied"]),
    }
    evidence = Held(
        {
            (subject, "refusal"): {0: share(n, 200, ("<b>fire", "frost"))}
            for subject, n in ((0, 60), (1, 190), ("small", 192))
        },
        {
            (subject, "refusal"): pooled_agreement([{**verdicts, "pairs": [pair]}])
            for subject in ("small", 1)
        },
    )
    text = written(study, results, baselines, tmp_path, evidence).read_text("utf-8")
    assert Page(text).open == []
    assert "By category" in text and "Agreement between scorers" in text
    assert "<summary>small, point 1: refusal rate</summary>" in text
    assert "&lt;b&gt;fire" in text
    assert text.count("Cohen&#39;s kappa</th>") == 2
    assert "small, before fine-tuning: refusal" in text and "small, point 1: refusal" in text
    assert "(paired, difference +65.0 points" in text and "+65.0 [" in text
    assert "(paired, difference +65.0 points" in "".join(
        summary(study, results, baselines, evidence)["answer"]
    )


@pytest.mark.slow
def test_without_evidence_there_are_no_category_and_agreement_sections(
    study: Study, results: list[Result], baselines: Baselines, tmp_path: Path
) -> None:
    text = written(study, results, baselines, tmp_path).read_text("utf-8")
    assert (
        "By category" not in text
        and "Agreement between scorers" not in text
        and "(paired" not in text
    )
