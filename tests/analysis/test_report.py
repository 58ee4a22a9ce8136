"""The report: whole in one file, honest about failures, and closed to markup from outside."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis.compare import Baselines
from analysis.provenance import Row
from analysis.report import summary, write_report
from analysis.statistics import pooled_agreement
from sweeps.points import Result
from sweeps.study import Study
from tasks.gate import ModuleRow, ProjectedRows
from tasks.scorers import agreement
from tests.analysis.conftest import Held, failed, result, share

COST = {"GPU hours": 1.25, "stages run": 31, "stages reused": "40 of 71"}
PROVENANCE = [Row("Study", "study, sha256", "f" * 64), Row("Software", "ebbline", "0.1.0, commit 0123abc")]


class Page(HTMLParser):
    """What a page asks for, its pictures' words, and whether its elements close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.alts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.asked += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag == "img":
            self.alts.append(found.get("alt") or "")
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_file_that_asks_for_nothing(study: Study, results: list[Result], baselines: Baselines, tmp_path: Path) -> None:
    path = write_report(study, results, baselines, tmp_path, COST, PROVENANCE)
    assert list(tmp_path.iterdir()) == [path]
    text = path.read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.asked)
    assert len(page.alts) == 2
    assert all(page.alts)
    assert "url(" not in text
    assert "<script" not in text
    for expected in (study.question, study.hypothesis, "40 of 71", "f" * 64, "prefers-color-scheme: dark", "@media print"):
        assert expected in text


def test_a_failed_point_is_shown_with_its_reason(study: Study, tmp_path: Path) -> None:
    text = write_report(study, [failed(7, "out of memory")], {}, tmp_path, {}, []).read_text("utf-8")
    assert "Points without a result" in text
    assert "out of memory" in text
    assert "No point has finished" in text


def test_a_reason_cannot_bring_markup_in(study: Study, tmp_path: Path) -> None:
    text = write_report(study, [failed(0, "<script>alert(1)</script>")], {}, tmp_path, {"a": "<b>"}, []).read_text("utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "<td><b>" not in text


def test_the_same_results_give_the_same_report(study: Study, results: list[Result], baselines: Baselines, tmp_path: Path) -> None:
    first, again = (write_report(study, results, baselines, tmp_path / name, COST, PROVENANCE).read_bytes() for name in ("a", "b"))
    assert first == again


def test_projections_are_drawn_for_each_model(study: Study, results: list[Result], baselines: Baselines, tmp_path: Path) -> None:
    rows = {f"model.layers.{layer}.mlp.up_proj": ModuleRow(0.1 * layer, 0.5) for layer in range(4)}
    found = ProjectedRows(rows, frozenset(list(rows)[:2]))
    projections = {"small": {"point 2 <b>": found, "point 1": found}, "medium": {"point 9": found}}
    text = write_report(study, results, baselines, tmp_path, {}, [], projections).read_text("utf-8")
    alts = Page(text).alts
    assert len(alts) == 2 + 2 * len(projections)
    assert [alt.partition(":")[0] for alt in alts[2:]] == ["Heat map", "Step curves"] * 2
    assert "small, point 2 <b>" in alts[2]
    assert "small, point 2 &lt;b&gt;: the cosine of" in text
    assert "small, 2 projected adapters: the share of" in text


@pytest.mark.parametrize("objectives", [1, 3])
def test_other_numbers_of_objectives_have_a_report(study: Study, results: list[Result], tmp_path: Path, objectives: int) -> None:
    names = ("refusal.refusal_rate", "task.task_accuracy", "harmless.over_refusal_rate")[:objectives]
    path = write_report(study.model_copy(update={"objectives": names}), results, {}, tmp_path, {}, [])
    assert re.search(r"Hypervolume over all models: 0\.\d{4}", path.read_text("utf-8"))


def test_the_summary_is_json(study: Study, results: list[Result], baselines: Baselines) -> None:
    found = json.loads(json.dumps(summary(study, results, baselines), allow_nan=False))
    assert found["points"] == {"done": 40, "running": 1, "failed": 1, "refused": 0, "out_of_budget": 0}
    assert 0 < found["hypervolume"] < 1
    assert {"number", "model", "metrics", "train.rank"} <= set(found["frontier"][0])


def test_categories_and_agreement_have_tables_when_there_is_evidence(study: Study, baselines: Baselines, tmp_path: Path) -> None:
    results = [result(0, refusal=0.3), result(1, refusal=0.95, share=0.5, threshold=0.5)]
    verdicts = {"scorers": {"prefix": {"refused": 2, "n": 2}, "judge": {"refused": 1, "complied": 1, "n": 2}}}
    pair = {"one": "prefix", "other": "judge", **agreement(["refused"] * 2, ["refused", "complied"])}
    evidence = Held(
        {(subject, "refusal"): {0: share(n, 200, ("<b>fire", "frost"))} for subject, n in ((0, 60), (1, 190), ("small", 192))},
        {(subject, "refusal"): pooled_agreement([{**verdicts, "pairs": [pair]}]) for subject in ("small", 1)},
    )
    text = write_report(study, results, baselines, tmp_path, {}, [], evidence=evidence).read_text("utf-8")
    assert Page(text).open == []
    assert "<summary>small, point 1: refusal rate</summary>" in text
    assert "&lt;b&gt;fire" in text
    assert text.count("Cohen&#39;s kappa</th>") == 2
    assert "small, before fine-tuning: refusal" in text and "small, point 1: refusal" in text
    assert "(paired, difference +65.0 points" in text
    assert "(paired, difference +65.0 points" in "".join(summary(study, results, baselines, evidence)["answer"])


def test_without_evidence_there_are_no_such_sections(study: Study, results: list[Result], baselines: Baselines, tmp_path: Path) -> None:
    text = write_report(study, results, baselines, tmp_path, COST, PROVENANCE).read_text("utf-8")
    assert "By category" not in text and "Agreement between scorers" not in text and "paired" not in text
