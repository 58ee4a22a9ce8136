"""References: the keys that a text cites, the entry of each key, and that nothing is invented."""

import re
from pathlib import Path

import pytest

from ebbline.analysis.paper.citations import PAPERS, bibliography, cited, library, pin_key
from ebbline.analysis.report.provenance import Build, Pin
from ebbline.tasks.errors import StudyError
from tests.latex import compiled, needs_latex

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = Pin("models.7b.aligned.hub", "meta-llama/Llama-2-7b_chat-hf", True, COMMIT, "0" * 64)
DATA = Pin("data.pool.hub", "some/data_set", True, COMMIT, "1" * 64, "train 1.json")
LOCAL = Pin("data.mix.path", "mine.jsonl", False, None, "2" * 64)


def test_a_text_s_citations_are_found_once_each_in_order() -> None:
    assert cited("As in [@b; @a], and [@c] and [@a]; write to me@example.org [not this].") == [
        "b",
        "a",
        "c",
    ]


def test_the_three_papers_have_their_arxiv_numbers() -> None:
    assert [re.findall(r"arXiv:([\d.]+\d)", library()[key]) for key in PAPERS] == [
        ["2310.20624"],
        ["2311.00117"],
        ["2405.16833"],
    ]


def test_every_entry_that_people_wrote_has_a_title_and_authors() -> None:
    for key, entry in library().items():
        assert (
            entry.startswith("@")
            and f"{{{key}," in entry
            and "title = {" in entry
            and "author = {" in entry
        ), key


def test_hub_content_is_cited_by_name_and_commit_without_an_invented_author() -> None:
    text = bibliography([pin_key(MODEL), pin_key(DATA)], [MODEL, DATA, LOCAL], Build("1.0"))
    assert (
        text.replace("\\allowbreak ", "").count(COMMIT) == 2
        and "author" not in text
        and "year" not in text
    )
    assert (
        "huggingface.co/meta-llama/" in text
        and "huggingface.co/datasets/some/" in text
        and "mine.jsonl" not in text
    )


def test_a_key_without_an_entry_is_an_error() -> None:
    with pytest.raises(StudyError, match="nobody2020"):
        bibliography(["peft", "nobody2020"], [], Build("1.0"))


@pytest.mark.process
@needs_latex
def test_all_entries_compile_without_a_warning(tmp_path: Path) -> None:
    keys = [*library(), "ebbline", pin_key(MODEL), pin_key(DATA)]
    (tmp_path / "references.bib").write_text(
        bibliography(keys, [MODEL, DATA], Build("1.0", COMMIT)), "utf-8"
    )
    cites = "".join(rf"\cite{{{key}}} " for key in keys)
    log = compiled(
        "acl",
        rf"{cites}\bibliographystyle{{plain}}\bibliography{{references}}",
        tmp_path,
        bibliography=True,
    )
    assert "Overfull" not in log and "undefined" not in log
