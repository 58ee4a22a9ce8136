"""Random names and texts: no code runs, no path leaves its folder, and nothing but plain values and
one kind of error comes out. `make fuzz` tries more of them.

A planted marker file would appear if a name or a text were run or taken for a path.
"""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbline.analysis.results.wording import plain_markdown, without_marks
from ebbline.boundary.answers import printable
from ebbline.sweeps.study.home import Home, is_plain
from ebbline.sweeps.study.reading.yaml_text import values_in
from ebbline.sweeps.study.study_file import parse
from ebbline.tasks.data.csv_rows import FORMULA_STARTS, spreadsheet_cell
from ebbline.tasks.errors import EbblineError, ModelError, StudyError
from ebbline.tasks.paths import inside, is_inside
from tests.hostile.cases import STUDY

EXAMPLES = int(os.environ.get("EBBLINE_FUZZ", "30"))
fuzzed = settings(max_examples=EXAMPLES)

PIECES = st.sampled_from(
    [
        *("a", "b: 1", "- ", ": ", "\n", "  ", "[", "]", "{", "}", ",", "&a ", "*a", "<<: ", "? "),
        *("!!", "!", "!!python/object/apply:os.system ", "!!python/name:os.system", "!function f"),
        *("!!binary ", "!!set ", "!!timestamp ", "|", ">", "'", '"', "#", "%YAML 1.1\n", "---\n"),
        *(
            "...\n",
            "~",
            "null",
            "1e9",
            "0x1f",
            "0o7",
            "1:30",
            ".inf",
            ".nan",
            "2024-99-99",
            "=",
            "\t",
        ),
        *("\ud800", "\x00", "\x1b[31m", "\ufeff", "\u2028", "9" * 200, "true", "on"),
        "__import__('pathlib').Path('marker').touch()",
    ]
)
YAML = st.lists(PIECES | st.text(max_size=5), max_size=25).map("".join)
PARTS = st.sampled_from(
    [
        "..",
        ".",
        "",
        "a",
        "/",
        "\\",
        "~",
        "C:",
        "\x00",
        "\n",
        "...",
        " ",
        "a.",
        "%2e%2e",
        "．．",
        "‥",
    ]
)
NAMES = st.lists(PARTS | st.text(max_size=4), max_size=6).map("/".join) | st.text(max_size=30)
DANGER = st.sampled_from(
    [
        *("{{ ", " }}", "{% ", " %}", "cycler", "lipsum", "self", "x", "().__class__", "|attr('"),
        *("__globals__", "__init__", "__builtins__", "__subclasses__()", "mro()", "')", "['", "']"),
        *(
            ".os",
            ".popen('touch marker')",
            ".read()",
            "import 'a'",
            "include 'b'",
            "for x in x",
            "set",
        ),
        *("format", "'{0.__class__}'.format(x)", "range(9)", "*", "**", "9", "joiner", "namespace"),
    ]
)
PLAIN = (str, int, float, bool, type(None), bytes, list, dict, set, tuple)


@pytest.fixture(autouse=True)
def _no_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "utils.py").write_text("import pathlib\npathlib.Path('marker').touch()\nf = 1\n")
    yield
    assert not (tmp_path / "marker").exists()


def is_plain_value(value: Any) -> bool:
    if isinstance(value, dict):
        return all(is_plain_value(each) for pair in value.items() for each in pair)
    if isinstance(value, list | tuple | set):
        return all(map(is_plain_value, value))
    return isinstance(value, PLAIN) or type(value).__module__ == "datetime"


@fuzzed
@given(YAML)
def test_any_yaml_is_plain_values_or_one_error(text: str) -> None:
    try:
        found = values_in(text, Path("study.yaml"))
    except StudyError as error:
        assert str(error).startswith("study.yaml")
    else:
        assert is_plain_value(found)


@fuzzed
@given(YAML, st.integers(0, len(STUDY)))
def test_any_text_inside_a_study_is_a_study_or_one_error(text: str, place: int) -> None:
    try:
        parse(Path("study.yaml"), STUDY[:place] + text + STUDY[place:])
    except EbblineError as error:
        assert "study.yaml" in str(error)


@fuzzed
@given(NAMES)
def test_a_name_from_data_is_a_path_below_its_folder_or_an_error(name: str) -> None:
    folder = Path.cwd().resolve()
    try:
        path = inside(folder, name, Path("model.safetensors.index.json"))
    except ModelError:
        assert not is_inside(name)
        return
    assert Path(os.path.normpath(path)).is_relative_to(folder) and path != folder


@fuzzed
@given(NAMES)
def test_a_study_name_is_one_folder_of_its_home_or_an_error(name: str) -> None:
    home = Home(Path("home"))
    if is_plain(name):
        assert home.path(name).parent == home.root / "studies" and home.path(name).name == name
    study = STUDY.replace("study: mine", f"study: {name!r}")
    try:
        found = parse(Path("study.yaml"), study).study
    except EbblineError:
        return
    assert is_plain(found)


@fuzzed
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=20) | NAMES)
def test_no_cell_of_a_table_begins_like_a_formula(text: str) -> None:
    cell = spreadsheet_cell(text)
    assert cell in (text, f"'{text}")
    if cell.startswith(FORMULA_STARTS):
        assert isinstance(float(cell), float)


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "＝1"])
def test_a_formula_is_written_as_text(text: str) -> None:
    assert spreadsheet_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["-0.3", "+5", "1e-4", "-", "plain", "a=b"])
def test_numbers_and_other_texts_stay_as_they_are(text: str) -> None:
    assert spreadsheet_cell(text) == (text if text != "-" else "'-")


@fuzzed
@given(st.text(max_size=60))
def test_a_message_holds_no_control_character(text: str) -> None:
    shown = printable(text)
    assert not [
        letter
        for letter in shown
        if letter not in "\n\t" and unicodedata.category(letter) in ("Cc", "Cf", "Cs")
    ]
    assert len(shown.encode()) >= 0


@fuzzed
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_a_users_text_means_itself_in_markdown(text: str) -> None:
    one_line = " ".join(text.split())
    assert without_marks(plain_markdown(text)) == one_line
    assert "[@" not in plain_markdown(text) and "\n" not in plain_markdown(text)


@pytest.fixture(scope="module")
def sandbox() -> Any:
    from lm_eval import utils

    from ebbline.tasks.measuring.lm_tasks.definitions import use_sandbox

    use_sandbox()
    return utils


@fuzzed
@given(st.lists(DANGER | st.text(max_size=3), max_size=12).map("".join))
def test_no_template_of_a_task_reaches_python(sandbox: Any, text: str) -> None:
    from jinja2.exceptions import TemplateError

    try:
        found = sandbox.apply_template(text, {"x": "value"})
    except (TemplateError, TypeError, ValueError, OverflowError, AttributeError, LookupError):
        return
    assert "<module" not in str(found) and "built-in" not in str(found)
