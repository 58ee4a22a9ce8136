"""The reader of rows: each format gives the rows that were written, and any other bytes one error
that names file and line.
"""

import csv
import decimal
import gzip
import io
import json
from datetime import datetime

import pyarrow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from ebbline.tasks.data import reader
from ebbline.tasks.data.conversations import read_conversations
from ebbline.tasks.data.csv_rows import LONGEST_CELL
from ebbline.tasks.data.data_file import DEEPEST, EXPANDED_BYTES, LONGEST_TEXT, SPREADSHEET_ERRORS
from ebbline.tasks.data.prompts import read_prompts
from ebbline.tasks.data.reader import read_rows
from ebbline.tasks.errors import DataError

PLANTED = "quixotic-zeppelin"
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".lines.json", ".parquet")
ENDINGS = [ending + packed for ending in TABLES for packed in ("", ".gz")]
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(rows, ending, newline="\n", mark=""):
    """The bytes of a file of rows, as the csv module, json and pyarrow write them."""
    packed = ending.endswith(".gz")
    ending = ending.removesuffix(".gz")
    if ending in (".csv", ".tsv"):
        buffer = io.StringIO(newline="")
        separator = "," if ending == ".csv" else "\t"
        writer = csv.DictWriter(buffer, list(rows[0]), delimiter=separator, lineterminator=newline)
        writer.writeheader()
        writer.writerows(rows)
        data = (mark + buffer.getvalue()).encode()
    elif ending == ".parquet":
        sink = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        data = sink.getvalue()
    elif ending == ".json":
        data = (mark + json.dumps(rows, indent=1).replace("\n", newline)).encode()
    else:
        data = (mark + "".join(json.dumps(row) + newline for row in rows)).encode()
    return gzip.compress(data) if packed else data


def values_of(path):
    return [dict(row.values) for row in read_rows(path)]


# Text that a table in text form can hold: no NUL, no half of a pair, and one kind of line end
letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")
awkward = st.sampled_from(
    '007|1e3|NULL|True|NaN|nan|null||[]|{}|=1+1|-|1,5|"|say "hi"|a\nb|a\u2028b|\ufeffa|sep=;'
    "| a |a;b|a\tb|'|\\n|#".split("|")
)
texts = awkward | st.text(letters, max_size=8) | st.text('ab é紫,"\n;\t', max_size=8)
names = st.text("abcdefgh_", min_size=1, max_size=4)
tables = st.lists(names, min_size=2, max_size=4, unique=True).flatmap(
    lambda columns: st.lists(
        st.fixed_dictionaries(dict.fromkeys(columns, texts)).filter(
            lambda row: list(row.values()) != list(row)
        ),
        min_size=1,
        max_size=5,
    )
)


@pytest.mark.slow
@given(rows=tables, mark=st.sampled_from(["", "\ufeff"]), newline=st.sampled_from(["\n", "\r\n"]))
@SAME_FOLDER
def test_rows_are_the_same_in_every_format(tmp_path, rows, mark, newline):
    for ending in ENDINGS:
        path = tmp_path / f"rows{ending}"
        path.write_bytes(written(rows, ending, newline, mark))
        assert values_of(path) == rows, ending


numbers = st.integers(-(2**63), 2**63 - 1)


@given(rows=st.lists(st.fixed_dictionaries({"a": numbers, "b": numbers}), min_size=1, max_size=4))
@SAME_FOLDER
def test_whole_numbers_are_the_same_text_in_every_format(tmp_path, rows):
    for ending in ENDINGS:
        path = tmp_path / f"rows{ending}"
        path.write_bytes(written(rows, ending))
        assert values_of(path) == [{name: str(n) for name, n in row.items()} for row in rows]


turns = st.lists(
    st.tuples(st.text(letters, min_size=1, max_size=6).filter(str.strip)).map(lambda t: t[0]),
    min_size=1,
    max_size=3,
)


@given(rows=st.lists(turns, min_size=1, max_size=3), key=st.sampled_from(["messages", "from"]))
@SAME_FOLDER
def test_chats_of_the_hub_are_the_same_in_every_format(tmp_path, rows, key):
    expected = [
        [{"role": role, "content": text} for text in row for role in ("user", "assistant")]
        for row in rows
    ]
    if key == "messages":
        chats = [{"messages": turns} for turns in expected]
    else:
        roles = {"user": "human", "assistant": "gpt"}
        chats = [
            {"conversations": [{"from": roles[t["role"]], "value": t["content"]} for t in row]}
            for row in expected
        ]
    for ending in ENDINGS[4:]:
        path = tmp_path / f"rows{ending}"
        path.write_bytes(written(chats, ending))
        assert read_conversations(path) == expected, ending


def read_whole(path):
    """All that reads the rows of a file. An error of another class ends the test."""
    for read in (values_of, read_conversations, read_prompts):
        try:
            read(path)
        except DataError as error:
            assert path.name in str(error)


ASCII = st.text('{}[],:"\\ \n\r\t;=0123456789eE+-.NaInfinitytruefalsenulpromessagd', max_size=60)
JUNK = st.one_of(
    st.binary(max_size=80),
    ASCII.map(str.encode),
    st.binary(max_size=60).map(lambda data: b"PAR1" + data + b"PAR1"),
    st.binary(max_size=60).map(gzip.compress),
    ASCII.map(lambda text: gzip.compress(text.encode())),
    st.text(max_size=30).map(lambda text: text.encode("utf-16")),
)


@given(data=JUNK, ending=st.sampled_from([e for e in ENDINGS if e[:6] != ".lines"]))
@example(data=b"[" * 100_000, ending=".json")
@example(data=b'{"a":' * 100_000, ending=".jsonl")
@example(data=b"9" * 5_000, ending=".json")
@example(data=b'[{"prompt": ' + b"9" * 5_000 + b"}]", ending=".json")
@example(data=b'question_id,category,turns,prompt_style\n1,2,"' + b"['" * 50_000, ending=".csv")
@example(
    data=b"question_id,category,turns,prompt_style\n1,2,\"['" + b"(" * 50_000 + b'",s\n',
    ending=".csv",
)
@example(data=b"prompt\n" + b"a" * 200_000, ending=".csv")
@example(data=b"\xff\xfe", ending=".csv.gz")
@SAME_FOLDER
def test_any_bytes_give_rows_or_one_error_that_names_the_file(tmp_path, data, ending):
    path = tmp_path / f"rows{ending}"
    path.write_bytes(data)
    read_whole(path)


@given(
    ending=st.sampled_from(ENDINGS),
    cut=st.floats(0, 1),
    place=st.floats(0, 0.999),
    byte=st.integers(0, 255),
)
@SAME_FOLDER
def test_a_damaged_file_gives_rows_or_one_error_that_names_the_file(
    tmp_path, ending, cut, place, byte
):
    chats = [{"prompt": f"p{n}", "answer": f"a{n}", "instruction": "i"} for n in range(9)]
    data = bytearray(written(chats, ending))
    data[int(place * len(data))] = byte
    path = tmp_path / f"rows{ending}"
    path.write_bytes(data[: max(1, int(cut * len(data)))])
    read_whole(path)


def in_gzip(text):
    return gzip.compress(text.encode())


GOOD = '{"prompt": "p", "answer": "a"}'
# Each is a file and its message. The planted word stands in each text and in no message.
BAD_FILES = {
    "too few fields": ("x.csv", f"a,b,c\n1,2,3\n{PLANTED},b\n", r"x\.csv:3 has 2 fields and the"),
    "too many fields": ("x.csv", f"a,b\n1,{PLANTED}, and more\n", r"x\.csv:2 has 3 fields and the"),
    "trailing comma": ("x.csv", f"a,b\n1,{PLANTED},\n", r"x\.csv:2 has 3 fields and the header 2"),
    "text without a column": (
        "x.csv",
        f"a,b,\n1,{PLANTED}, cut\n",
        r"x\.csv:2 has text in a column without a name",
    ),
    "ragged tsv": ("x.tsv", f"a\tb\n1\t2\t{PLANTED}\n", r"x\.tsv:2 has 3 fields.*a tab in it"),
    "ragged, below a text of two lines": (
        "x.csv",
        f'a,b\n"1\n2",3\n{PLANTED}\n',
        r"x\.csv:4 has 1 field",
    ),
    "two separators": ("x.csv", f"a;b,c\n1;2,{PLANTED}\n", r"x\.csv:1: a semicolon .* sep=;"),
    "a quoted semicolon": ("x.csv", f'"a;b"\n"{PLANTED}"\n', r"x\.csv:1: a semicolon is in"),
    "a field with its semicolon": ("x.csv", f"a;b\n{PLANTED};x;y\n", r"x\.csv:2 has 3 fields"),
    "two equal columns": ("x.csv", f"a, a\n1,{PLANTED}\n", r"x\.csv:1 names a column twice"),
    "two headers": ("x.csv", f"a,b\n{PLANTED},2\na,b\n3,4\n", r"x\.csv:3 is the header again"),
    "two files with marks": ("x.csv", f"a,b\n{PLANTED},2\n\ufeffa,b\n3,4\n", r"x\.csv:3 is the"),
    "open quote": ("x.csv", f'a,b\n1,2\n3,"{PLANTED}\n4,5\n', r"x\.csv:3 is not CSV.*quote"),
    "text after a quote": ("x.csv", f'a,b\n"1" {PLANTED},2\n', r"x\.csv:2 is not CSV"),
    "long field": ("x.csv", f"a,b\n1,{PLANTED * 9000}\n", r"x\.csv:2 is not CSV.*as JSON lines"),
    "NUL in csv": ("x.csv", f"a,b\n1,2\n{PLANTED}\0,2\n", r"x\.csv:3 holds a NUL"),
    "NUL in jsonl": ("x.jsonl", f'{GOOD}\n{{"a": "{PLANTED}\\u0000"}}', r"x\.jsonl:2 has a NUL"),
    "latin-1": ("x.csv", f"a,b\n1,2\n{PLANTED}é,2\n".encode("latin-1"), r"x\.csv:3 is not UTF-8"),
    "utf-16": ("x.csv", f"a,b\n1,{PLANTED}\n".encode("utf-16"), r"x\.csv is UTF-16"),
    "utf-16 without a mark": (
        "x.csv",
        f"a,b\n1,{PLANTED}\n".encode("utf-16-le"),
        r"x\.csv:1 .*NUL",
    ),
    "surrogates in utf-8": (
        "x.jsonl",
        f'{GOOD}\n{{"a": "{PLANTED}\ud83d"}}'.encode("utf-8", "surrogatepass"),
        r"x\.jsonl:2 is not UTF-8",
    ),
    "Excel workbook": ("x.csv", b"PK\x03\x04" + PLANTED.encode(), r"x\.csv is a zip file or an Ex"),
    "gzip by another name": ("x.jsonl", in_gzip(GOOD + PLANTED), r"x\.jsonl .*end in \.gz"),
    "Parquet by another name": ("x.csv", f"PAR1{PLANTED}", r"x\.csv is Parquet"),
    "Git LFS": ("x.csv", f"version https://git-lfs.x\n{PLANTED}", r"x\.csv is a Git LFS pointer"),
    "no gzip": ("x.csv.gz", f"a,b\n1,{PLANTED}", r"x\.csv\.gz cannot be expanded by gzip"),
    "cut gzip": ("x.csv.gz", in_gzip(f"a,b\n1,{PLANTED}")[:-9], r"x\.csv\.gz cannot be expanded"),
    "NaN": ("x.jsonl", f'{GOOD}\n{{"a": "{PLANTED}", "b": NaN}}', r"x\.jsonl:2 has NaN, which"),
    "NaN in a list": (
        "x.json",
        f'[{GOOD},\n {{"a": "{PLANTED}", "input": NaN}}]',
        r"x\.json:2 \(item 2\) has NaN",
    ),
    "Infinity": ("x.json", f'[{{"a": "{PLANTED}", "b": -Infinity}}]', r"x\.json:1 .*-Infinity"),
    "equal keys": (
        "x.jsonl",
        f'{GOOD}\n{{"a": "{PLANTED}", "a": "b"}}',
        r"x\.jsonl:2 is JSON with one key given twice",
    ),
    "equal keys in a turn": (
        "x.json",
        f'[{GOOD}, {{"a": [{{"b": "{PLANTED}", "b": 1}}]}}]',
        r"x\.json:1 \(item 2\) is JSON with one key given twice",
    ),
    "lone surrogate": ("x.jsonl", f'{{"a": "{PLANTED}\\ud83d"}}', r"x\.jsonl:1 has half of a surr"),
    "lone surrogate in a key": (
        "x.jsonl",
        f'{{"\\udc00": "{PLANTED}"}}',
        r"x\.jsonl:1 has half of",
    ),
    "deep": (
        "x.jsonl",
        f'{GOOD}\n{{"a": {"[" * DEEPEST}"{PLANTED}"{"]" * DEEPEST}}}',
        rf"x\.jsonl:2 has more than {DEEPEST} lists",
    ),
    "trailing comma in a list": (
        "x.json",
        f'[{GOOD},\n{{"a": "{PLANTED}"}},\n]',
        r"x\.json:3 \(item 3\) is not JSON",
    ),
    "no comma": ("x.json", f'[{GOOD}\n{{"a": "{PLANTED}"}}]', r"x\.json:2 is not JSON: the list"),
    "list not ended": ("x.json", f'[{GOOD},\n{{"a": "{PLANTED}"}}\n', r"x\.json:3 is not JSON"),
    "text after the list": ("x.json", f"[{GOOD}]\n{PLANTED}", r"x\.json:2 is not JSON"),
    "two lists": ("x.json", f'[{GOOD}]\n["{PLANTED}"]', r"x\.json:2 is not JSON"),
    "two objects in a line": ("x.json", f'{GOOD} {{"a": "{PLANTED}"}}', r"x\.json:1 is not JSON"),
    "two objects in a line of jsonl": (
        "x.jsonl",
        f'{GOOD}\n{GOOD}{{"a": "{PLANTED}"}}',
        r"x\.jsonl:2 is not JSON lines",
    ),
    "a line of json cut": ("x.json", f'{GOOD}\n{{"a": "{PLANTED}', r"x\.json:2 is not JSON"),
    "no object in lines": ("x.json", f'{GOOD}\n"{PLANTED}"\n', r"x\.json:2 is not a JSON object"),
    "a list in jsonl": ("x.jsonl", f'[{{"a": "{PLANTED}"}}]', r"x\.jsonl:1 is not a JSON object"),
    "single quotes": ("x.json", f"[{GOOD}, {{'a': '{PLANTED}'}}]", r"x\.json:1 \(item 2\) is not"),
    "a tab in json": ("x.jsonl", f'{{"a": "{PLANTED}\t"}}', r"x\.jsonl:1 is not JSON"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_an_error_that_names_the_line_and_quotes_nothing(tmp_path, case):
    name, text, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        values_of(tmp_path / name)
    assert PLANTED not in str(caught.value)


READ_FILES = {
    "sep=": ("x.csv", "sep=;\na;b\n1,5;2\n", [{"a": "1,5", "b": "2"}]),
    "sep= with a mark": ("x.csv", "\ufeffsep=\t\r\na\tb\r\n1\t2\r\n", [{"a": "1", "b": "2"}]),
    "blank lines": ("x.csv", "a,b\n\n1,2\n\n", [{"a": "1", "b": "2"}]),
    "an empty column at the end": ("x.csv", "a,b,\n1,2,\n", [{"a": "1", "b": "2", "": ""}]),
    "the index of pandas": ("x.csv", ",a\n0,1\n", [{"": "0", "a": "1"}]),
    "upper case": ("X.CSV", "a\n1\n", [{"a": "1"}]),
    "old Mac line ends": ("x.csv", "a,b\r1,2\r", [{"a": "1", "b": "2"}]),
    "nothing": ("x.jsonl", "", []),
    "nothing in json": ("x.json", "\n", []),
    "an empty list": ("x.json", " [ ] ", []),
    "numbers as they are written": (
        "x.jsonl",
        '{"a": 1e3, "b": 1.50, "c": -0, "d": 12345678901234567890123}',
        [{"a": "1e3", "b": "1.50", "c": "-0", "d": "12345678901234567890123"}],
    ),
    "rows of several shapes": ("x.json", '{"a": "1"}\n\n{"b": null}', [{"a": "1"}, {"b": None}]),
    "objects over lines": ("x.json", '{\n"a": "1"\n}\n{\n"a": "2"\n}\n', [{"a": "1"}, {"a": "2"}]),
    "a pair of surrogates": ("x.jsonl", '{"a": "\\ud83d\\ude00"}', [{"a": "\U0001f600"}]),
    "as deep as allowed": (
        "x.jsonl",
        '{"a": ' + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1) + "}",
        None,
    ),
}


@pytest.mark.parametrize("case", READ_FILES)
def test_a_file_as_people_save_it_is_read(tmp_path, case):
    name, text, rows = READ_FILES[case]
    (tmp_path / name).write_bytes(text.encode())
    assert rows is None or values_of(tmp_path / name) == rows


def test_an_item_of_a_list_has_its_line_for_messages_and_its_number_for_ids(tmp_path):
    (tmp_path / "x.json").write_text('[\n {"a": 1},\n {"a": 2,\n  "b": 3}, {"a": 4}\n]')
    rows = list(read_rows(tmp_path / "x.json"))
    assert [row.number for row in rows] == [1, 2, 3]
    assert [row.where.partition("x.json:")[2] for row in rows] == [
        "2 (item 1)",
        "3 (item 2)",
        "4 (item 3)",
    ]


def test_a_long_text_is_an_error_in_every_format_that_can_hold_it(tmp_path):
    rows = [{"a": "b"}, {"a": "b" * (LONGEST_TEXT + 1)}]
    for ending in (".jsonl", ".parquet"):
        path = tmp_path / f"x{ending}"
        path.write_bytes(written(rows, ending))
        with pytest.raises(DataError, match=rf"x{ending}:( row)? ?2 has a text of more than"):
            values_of(path)


def test_a_file_that_expands_beyond_any_text_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("ebbline.tasks.data.data_file.EXPANDED_BYTES", EXPANDED_BYTES >> 10)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b" " * (EXPANDED_BYTES >> 4)))
    with pytest.raises(DataError, match=r"x\.jsonl\.gz expands to more than"):
        values_of(tmp_path / "x.jsonl.gz")


def table(*columns):
    return pyarrow.Table.from_arrays([array for _, array in columns], [name for name, _ in columns])


BAD_TEXT = pyarrow.array([b"a", b"\xff" + PLANTED.encode()]).view(pyarrow.string())
BAD_PARQUET = {
    "text that is not UTF-8": (table(("a", BAD_TEXT)), r"x\.parquet: row 2 has a value that"),
    "two equal columns": (
        table(("a", pyarrow.array(["1"])), ("a", pyarrow.array([PLANTED]))),
        r"x\.parquet names a column twice",
    ),
    "NUL": (table(("a", pyarrow.array(["b", f"{PLANTED}\0"]))), r"x\.parquet: row 2 has a NUL"),
    "a date out of range": (
        table(("a", pyarrow.array([1, 2**62], pyarrow.timestamp("us")))),
        r"x\.parquet: row 2 has a value that",
    ),
}


@pytest.mark.parametrize("case", BAD_PARQUET)
def test_bad_parquet_is_an_error_that_names_the_row(tmp_path, case):
    rows, message = BAD_PARQUET[case]
    parquet.write_table(rows, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message) as caught:
        values_of(tmp_path / "x.parquet")
    assert PLANTED not in str(caught.value)


NO_TEXT = {
    "a float, as pandas makes of whole numbers with a gap": 56.0,
    "NaN": float("nan"),
    "a boolean": True,
    "a date": datetime(2026, 1, 1),
    "bytes": PLANTED.encode(),
    "a decimal": decimal.Decimal("1.50"),
    "a list": [PLANTED],
    "an object": {"a": PLANTED},
}


TRAINING, ASKED = ["instruction", "input", "output"], ["prompt", "answer"]
TEXTS_OF = {
    **dict.fromkeys(TRAINING, (read_conversations, TRAINING)),
    **dict.fromkeys(ASKED, (read_prompts, ASKED)),
}


@pytest.mark.parametrize("value", NO_TEXT.values(), ids=NO_TEXT.keys())
@pytest.mark.parametrize("column", TEXTS_OF)
def test_a_value_that_is_no_text_is_an_error_where_text_is_read(tmp_path, value, column):
    read, columns = TEXTS_OF[column]
    row = dict.fromkeys(columns, "x")
    parquet.write_table(pyarrow.Table.from_pylist([row | {column: value}]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=rf"x\.parquet: row 1: the column '{column}' is neither"):
        read(tmp_path / "x.parquet")
    if isinstance(value, bool | list | dict):
        (tmp_path / "x.jsonl").write_text(json.dumps(row | {column: value}))
        with pytest.raises(DataError, match=rf"x\.jsonl:1: the column '{column}' is neither"):
            read(tmp_path / "x.jsonl")


@pytest.mark.parametrize("value", sorted(SPREADSHEET_ERRORS))
@pytest.mark.parametrize("column", TEXTS_OF)
def test_an_error_of_a_spreadsheet_is_an_error_where_text_is_read(tmp_path, value, column):
    read, columns = TEXTS_OF[column]
    row, path = dict.fromkeys([*columns, "unused"], "x"), tmp_path / "x.csv"
    for name, passes in ((column, False), ("unused", True)):
        fields = (row | {name: value}).values()
        path.write_text(f"{','.join(row)}\n{','.join(fields)}\n")
        if passes:
            read(path)
        else:
            with pytest.raises(DataError, match=rf"x\.csv:2: the column '{column}' holds #"):
                read(path)


def test_a_text_that_ends_where_excel_cuts_a_cell_is_an_error(tmp_path):
    (tmp_path / "x.csv").write_text(f"prompt\n{'a' * LONGEST_CELL}\n")
    with pytest.raises(DataError, match=r"x\.csv:2 has a text of exactly 32767"):
        read_prompts(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text(f"prompt\n{'a' * (LONGEST_CELL - 1)}\n")
    assert len(read_prompts(tmp_path / "x.csv").prompts) == 1


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize("text", ["a" * 20_000, "é" * 10_000], ids=["ascii", "accents"])
def test_a_parquet_file_that_expands_hugely_is_an_error_before_it_takes_memory(
    tmp_path, monkeypatch, compression, text
):
    """A dictionary repeats one text in each row for a few bits, without any compression."""
    path = tmp_path / "x.parquet"
    monkeypatch.setattr(reader, "MOST_BYTES", 3_000_000)
    monkeypatch.setattr(reader, "EXPANSION", 1)
    for rows, fits in ((100, True), (200, False)):
        table = pyarrow.table({"prompt": [text] * rows, "n": range(rows)})
        parquet.write_table(table, path, compression=compression, dictionary_pagesize_limit=1 << 20)
        assert path.stat().st_size < 30_000
        if fits:
            assert [row.values["prompt"] for row in read_rows(path)] == [text] * rows
        else:
            monkeypatch.setattr(reader, "_values", lambda *batch: pytest.fail("was decoded"))
            with pytest.raises(DataError, match=r"x\.parquet expands to 4\d{6} bytes or more"):
                list(read_rows(path))


def test_a_parquet_file_whose_pages_expand_hugely_is_an_error_by_its_metadata(
    tmp_path, monkeypatch
):
    table = pyarrow.table({"turns": [["a" * 50_000]] * 20})
    parquet.write_table(table, tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
    monkeypatch.setattr(reader, "MOST_BYTES", 500_000)
    with pytest.raises(DataError, match=r"x\.parquet expands to 1\d{6} bytes or more, .* 500000"):
        list(read_rows(tmp_path / "x.parquet"))


def test_columns_that_are_read_by_no_one_may_hold_any_value(tmp_path):
    row = {"prompt": "p", "score": float("nan"), "at": datetime(2026, 1, 1), "good": True}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "x.parquet")
    assert [prompt.text for prompt in read_prompts(tmp_path / "x.parquet").prompts] == ["p"]


def test_the_first_turn_is_not_joined_from_the_texts_of_a_numpy_array(tmp_path):
    (tmp_path / "x.csv").write_text(
        f"question_id,category,turns,prompt_style\n1,2,\"['{PLANTED}' 'b']\",base\n"
    )
    with pytest.raises(DataError, match=r"x\.csv:2: `turns` is no list") as caught:
        read_prompts(tmp_path / "x.csv")
    assert PLANTED not in str(caught.value)


def test_an_unquoted_comma_in_training_data_is_an_error_and_not_a_cut_answer(tmp_path):
    (tmp_path / "x.csv").write_text(
        "instruction,input,output\nName bird 0.,,Bird 0 is a zorp, a tarn, or a quell.\n"
    )
    with pytest.raises(DataError, match=r"x\.csv:2 has 5 fields and the header 3"):
        read_conversations(tmp_path / "x.csv")


@pytest.mark.parametrize("column", ["functions", "history", "tools"])
def test_a_column_that_is_not_read_whole_is_an_error(tmp_path, column):
    row = {"instruction": "i", "output": "o", column: ""}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    assert len(read_conversations(tmp_path / "x.jsonl")) == 1
    (tmp_path / "x.jsonl").write_text(json.dumps(row | {column: PLANTED}))
    with pytest.raises(DataError, match=rf"x\.jsonl:1.* `{column}`") as caught:
        read_conversations(tmp_path / "x.jsonl")
    assert PLANTED not in str(caught.value)


def test_the_only_object_of_a_json_file_is_a_row_or_a_set_of_categories(tmp_path):
    (tmp_path / "x.json").write_text('{"prompt": "p", "category": "c"}')
    assert [p.text for p in read_prompts(tmp_path / "x.json").prompts] == ["p"]
    (tmp_path / "x.json").write_text('{"gardening": ["p"]}')
    assert [p.category for p in read_prompts(tmp_path / "x.json").prompts] == ["gardening"]
