"""The documentation: it builds, its links work, it loads nothing from the network, and its commands
and pictures match the code.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.sweeps.study.study_file import parse
from tests.pages import DOCS, blocks, change, commands
from tests.pictures import FOLDER, PICTURES
from tests.site import ROOT, build, faults, page

PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md")])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("site"))


def test_every_link_and_anchor_is_there_every_page_is_found_and_nothing_is_fetched_from_elsewhere(
    site: Path,
) -> None:
    assert faults(site) == []


def test_a_lost_page_a_lost_anchor_and_a_foreign_script_are_faults(
    site: Path, tmp_path: Path
) -> None:
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(
        '<a href="nowhere.html">a</a><a href="#lost">b</a><script '
        'src="https://example.org/x.js"></script><p id="there">'
    )
    found = [fault for fault in faults(tmp_path) if fault.startswith("spoilt.html")]
    assert [fault.partition(": ")[2] for fault in found] == [
        "nowhere.html is no file",
        "#lost is no anchor",
        "https://example.org/x.js would be fetched from elsewhere",
    ]


def test_no_page_asks_for_what_the_theme_would_fetch_for_it(site: Path) -> None:
    """The theme's script brings diagrams, galleries and editors from elsewhere, but only to pages
    that have one.
    """
    built = list(site.rglob("*.html"))
    assert len(built) >= len(list(DOCS.glob("*.md")))
    for path in built:
        text = path.read_text("utf-8")
        assert not re.search(
            r'class="[^"]*\b(mermaid|glightbox|pyodide|tabbed-set__ace)\b', text
        ), path.name
        assert page(path).anchors, path.name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_ebbline_command_line_is_one_that_ebbline_takes(path: Path) -> None:
    wrong = [
        f"{line}: {fault}"
        for line in command_lines(path.read_text("utf-8"))
        if (fault := usage_error(line))
    ]
    assert not wrong, wrong


def test_an_unknown_command_or_option_is_found() -> None:
    assert "No such command" in usage_error("runn quickstart")
    assert "No such option" in usage_error("run quickstart --fast")
    assert usage_error("store gc --keep-adapters frontier --yes") == ""
    fenced = (
        "ray submit x ebbline/__main__.py -- run '~/a' --home '~/b'",
        "ebbline plan a # why",
        "ebbline run a 2> b | c -d",
    )
    found = list(command_lines("\n".join(["```", *fenced, "```", "`ebbline pin a --to b`"])))
    assert found == ["run '~/a' --home '~/b'", "plan a", "run a", "pin a --to b"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_shows_what_the_code_does_now(name: str) -> None:
    assert (FOLDER / name).read_text("utf-8") == PICTURES[name](), (
        "python -m tests.pictures draws it again"
    )


def test_the_studies_of_the_paper_page_are_studies(tmp_path: Path) -> None:
    studies = [block for block in blocks(DOCS / "reproducing.md") if block.title.endswith(".yaml")]
    assert len(studies) == 2
    for number, block in enumerate(studies):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block.text)
        assert parse(path).seeds == (0, 1, 2)


def test_a_difference_that_does_not_fit_or_fits_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("a\nb\na\n")
    for diff, places in (("-c\n+d\n", 0), (" a\n+d\n", 2)):
        with pytest.raises(AssertionError, match=f"has {places} places"):
            change(path, diff)
    change(path, " a\n+new\n b\n")
    assert path.read_text() == "a\nnew\nb\na\n"


def test_console_blocks_are_commands_with_their_expected_lines() -> None:
    assert list(commands("$ ebbline a\nline\n...\n$ ebbline b\n")) == [
        ("ebbline a", ["line"]),
        ("ebbline b", []),
    ]


def command_lines(text: str) -> Iterator[str]:
    """What follows `ebbline` in each command of fenced blocks and of code in a sentence, without
    comments.
    """
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [code for code in re.findall(r"`([^`]+)`", rest) if code.startswith("ebbline ")]
    for line in [line for block in fenced for line in block.splitlines()] + inline:
        found = re.search(
            r"(?:^|^\$ |\.venv/bin/|-- |')ebbline(?:/__main__\.py --)? ([a-z].*)", line
        ) or re.search(r"ebbline/__main__\.py -- ([a-z].*)", line)
        if found:
            command = re.sub(r"\s(?:#|\||&|;|\d?>).*", "", found[1])
            yield (command.removesuffix("'") if command.count("'") % 2 else command).strip()


def usage_error(line: str) -> str:
    """The usage error of a command line; empty without one. Ignores the brackets and dots of a
    synopsis.
    """
    words = [
        word for word in shlex.split(line.replace("[", "").replace("]", "")) if word.strip(".")
    ]
    done = CliRunner().invoke(
        app, [*words, "--help"]
    )  # with --help, a command parses its line and does nothing
    return "" if done.exit_code == 0 else done.output
