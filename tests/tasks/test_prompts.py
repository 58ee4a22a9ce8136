"""Prompt sets: each public format's exact columns, with invented harmless rows; and files in the
variants that people save.
"""

import csv
import io
import json
import subprocess
import sys
from itertools import pairwise

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from ebbline.tasks.data.prompts import Prompt, read_prompts
from ebbline.tasks.errors import DataError
from ebbline.tasks.measuring.generate import prompts_record

PLANTED = "quixotic-zeppelin"
ZORBLE = "plant a purple zorble by the river"
FUMBLER = 'polish the "brass" fumbler, twice'


def write_csv(path, *rows, newline="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle, lineterminator=newline).writerows(rows)
    return path


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


def advbench(folder):
    return write_csv(
        folder / "harmful_behaviors.csv",
        ["goal", "target"],
        [ZORBLE, "Sure, zorble"],
        [FUMBLER, "Sure, fumbler"],
    )


def harmbench(folder):
    header = [
        "Behavior",
        "FunctionalCategory",
        "SemanticCategory",
        "Tags",
        "ContextString",
        "BehaviorID",
    ]
    rows = [
        [ZORBLE, "standard", "gardening", "", "", "plant_zorble"],
        [
            FUMBLER,
            "contextual",
            "household",
            "context",
            "A fumbler is\nmade of brass.",
            "polish_fumbler",
        ],
    ]
    return write_csv(folder / "harmbench.csv", header, *rows)


def strongreject(folder):
    return write_csv(
        folder / "sr.csv",
        ["category", "source", "forbidden_prompt"],
        ["gardening", "custom", ZORBLE],
        ["household", "AdvBench", FUMBLER],
    )


def xstest(folder):
    header = ["id", "prompt", "type", "label", "focus", "note"]
    rows = [
        ["1", ZORBLE, "homonyms", "safe", "plant", ""],
        ["2", FUMBLER, "contrast_homonyms", "unsafe", "polish", "n/a"],
    ]
    return write_csv(folder / "xstest.csv", header, *rows)


def sorry_bench(folder):
    rows = [
        {"question_id": 1, "category": "7", "turns": [ZORBLE], "prompt_style": "base"},
        {
            "question_id": 2,
            "category": "8",
            "turns": [FUMBLER, "and a second turn"],
            "prompt_style": "slang",
        },
    ]
    path = folder / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hex_phi(folder):
    write_csv(folder / "hex" / "category_10.csv", [FUMBLER])
    write_csv(folder / "hex" / "category_2.csv", [ZORBLE])
    (folder / "hex" / "README.md").write_text("a description")
    return folder / "hex"


def refusalbench(folder):
    return write_json(folder / "refusalbench.json", {"gardening": [ZORBLE], "household": [FUMBLER]})


def jailbreakbench(folder):
    header = ["Index", "Goal", "Target", "Behavior", "Category", "Source"]
    rows = [
        ["0", ZORBLE, "Sure", "Zorbles", "gardening", "Original"],
        ["1", FUMBLER, "Sure", "Fumblers", "household", "AdvBench"],
    ]
    return write_csv(folder / "behaviors.csv", header, *rows)


def plain(folder):
    rows = [
        {
            "id": "a",
            "prompt": ZORBLE,
            "category": "gardening",
            "source": "me",
            "label": "harmless",
            "answer": "no",
        },
        {"prompt": FUMBLER, "id": None},
    ]
    return write_json(folder / "plain.json", rows)


IN_CONTEXT = f"A fumbler is\nmade of brass.\n\n---\n\n{FUMBLER}"
EXPECTED = {
    "advbench": (advbench, [Prompt("2", ZORBLE), Prompt("3", FUMBLER)]),
    "harmbench": (
        harmbench,
        [
            Prompt("plant_zorble", ZORBLE, "gardening"),
            Prompt("polish_fumbler", IN_CONTEXT, "household"),
        ],
    ),
    "strongreject": (
        strongreject,
        [Prompt("2", ZORBLE, "gardening", "custom"), Prompt("3", FUMBLER, "household", "AdvBench")],
    ),
    "xstest": (
        xstest,
        [
            Prompt("1", ZORBLE, "homonyms", label="harmless"),
            Prompt("2", FUMBLER, "contrast_homonyms", label="harmful"),
        ],
    ),
    "sorry-bench": (
        sorry_bench,
        [Prompt("1", ZORBLE, "7", "base"), Prompt("2", FUMBLER, "8", "slang")],
    ),
    "hex-phi": (
        hex_phi,
        [
            Prompt("category_2:1", ZORBLE, "category_2"),
            Prompt("category_10:1", FUMBLER, "category_10"),
        ],
    ),
    "refusalbench": (
        refusalbench,
        [Prompt("gardening:1", ZORBLE, "gardening"), Prompt("household:1", FUMBLER, "household")],
    ),
    "jailbreakbench": (
        jailbreakbench,
        [
            Prompt("0", ZORBLE, "gardening", "Original"),
            Prompt("1", FUMBLER, "household", "AdvBench"),
        ],
    ),
    "plain": (
        plain,
        [Prompt("a", ZORBLE, "gardening", "me", "harmless", "no"), Prompt("2", FUMBLER)],
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_public_set_is_read_the_same_when_recognised_and_when_named(tmp_path, name):
    write, expected = EXPECTED[name]
    path = write(tmp_path)
    recognised = read_prompts(path)
    assert (recognised.format, list(recognised.prompts), recognised.rows, recognised.renamed) == (
        name,
        expected,
        2,
        0,
    )
    assert read_prompts(path, format=name) == recognised


@pytest.mark.parametrize(
    "name", [name for name in EXPECTED if name not in ("hex-phi", "refusalbench")]
)
def test_a_set_has_the_same_prompts_as_jsonl_json_csv_and_parquet(tmp_path, name):
    write, expected = EXPECTED[name]
    path = write(tmp_path)
    if path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
    else:
        rows = (
            json.loads(path.read_text())
            if path.suffix == ".json"
            else [json.loads(line) for line in path.read_text().splitlines()]
        )
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(tmp_path / "x.json", rows)
    columns = list(rows[0])
    write_csv(
        tmp_path / "x.csv", columns, *([row.get(column) for column in columns] for row in rows)
    )
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for other in ("x.jsonl", "x.json", "x.csv", "x.parquet"):
        read = read_prompts(tmp_path / other)
        # Ids are not compared: those that are line numbers differ, as a CSV's header is a line.
        assert read.format == name
        assert [(p.text, p.category, p.source, p.label, p.answer) for p in read.prompts] == [
            (p.text, p.category, p.source, p.label, p.answer) for p in expected
        ]


@pytest.mark.parametrize("column", ["prompt", "goal", "Goal", "Behavior", "forbidden_prompt"])
def test_a_plain_set_has_any_prompt_column_of_the_public_sets(tmp_path, column):
    read = read_prompts(write_csv(tmp_path / "set.csv", [column, "category"], ["word1", "c"]))
    assert read.format == "plain" and read.prompts == (Prompt("2", "word1", "c"),)


def test_an_ambiguous_header_is_read_as_plain_columns(tmp_path):
    header = ["category", "source", "forbidden_prompt", "goal", "target"]
    read = read_prompts(write_csv(tmp_path / "set.csv", header, ["c", "s", ZORBLE, "", "t"]))
    assert read.format == "plain" and read.prompts == (Prompt("2", ZORBLE, "c", "s"),)


def test_a_leading_index_column_of_pandas_is_ignored(tmp_path):
    assert (
        read_prompts(
            write_csv(tmp_path / "set.csv", ["", "goal", "target"], ["0", ZORBLE, "t"])
        ).format
        == "advbench"
    )


def test_missing_columns_of_a_named_format_are_an_error_with_found_and_expected_columns(tmp_path):
    path = write_csv(tmp_path / "set.csv", ["goal", "target"], [PLANTED, "t"])
    with pytest.raises(
        DataError,
        match=r"set\.csv is not strongreject: it lacks .*forbidden_prompt.*Found \['goal', "
        r"'target'\], expected",
    ) as caught:
        read_prompts(path, format="strongreject")
    assert PLANTED not in str(caught.value)
    with pytest.raises(DataError, match=r"is not plain: found \['turns'\]"):
        read_prompts(write_json(tmp_path / "x.json", [{"turns": [PLANTED]}]), format="plain")


def test_an_unknown_header_is_an_error_that_lists_the_accepted_columns(tmp_path):
    with pytest.raises(
        DataError,
        match=r"\[\] and 2 that no format has.*prompt, goal,.*advbench: goal, target; "
        r"harmbench:.*hex-phi",
    ):
        read_prompts(write_csv(tmp_path / "set.csv", ["text", "why"], [PLANTED, "b"]))


ROW = '{"prompt": "word1", "answer": "word2"}'
BAD_FILES = {
    "no prompt in a row": (
        "x.jsonl",
        f'{ROW}\n\n{{"promt": "{PLANTED}"}}\n',
        r"x\.jsonl:3 has no prompt",
    ),
    "white space for a prompt": (
        "x.jsonl",
        f'{ROW}\n{{"prompt": " \\n", "note": "{PLANTED}"}}\n',
        r"x\.jsonl:2 has no prompt",
    ),
    "null for a prompt": (
        "x.json",
        f'[{ROW}, {{"prompt": null, "note": "{PLANTED}"}}]',
        r"x\.json:1 \(item 2\) has no prompt",
    ),
    "a list for a prompt": (
        "x.json",
        f'[{{"prompt": ["{PLANTED}"]}}]',
        r"x\.json:1 \(item 1\): the column 'prompt' is neither text nor",
    ),
    "an empty csv field": (
        "x.csv",
        f'goal,target\n"two\nlines",t\n,{PLANTED}\n',
        r"x\.csv:4 has no prompt; it belongs in goal",
    ),
    "an unquoted comma": (
        "x.csv",
        f"prompt\n{PLANTED}, and more\n",
        r"x\.csv:2 has 2 fields and the header 1",
    ),
    "a column named twice": (
        "x.csv",
        f"prompt,prompt\n{PLANTED},b\n",
        r"x\.csv:1 names a column twice",
    ),
    "csv without a header": (
        "x.csv",
        f"{PLANTED} it,an answer here\nb,c\n",
        r"\[\] and 2 that no format has \(is the header missing",
    ),
    "a header in another script": ("x.csv", "紫色的植物\nb\n", r"\[\] and 1 that no format has"),
    "cut csv": ("x.csv", f'prompt,answer\na,b\n{PLANTED},"cut', r"x\.csv:3 is not CSV"),
    "cut json": ("x.json", f'[{{"prompt": "{PLANTED}', r"x\.json:1 \(item 1\) is not JSON"),
    "cut jsonl": ("x.jsonl", f'{ROW}\n{{"prompt": "{PLANTED}', r"x\.jsonl:2 is not JSON"),
    "not an object": ("x.jsonl", f'["{PLANTED}"]', r"x\.jsonl:1 is not a JSON object"),
    "one key twice": (
        "x.json",
        f'{{"a": ["{PLANTED}"], "a": ["b"]}}',
        r"x\.json:1 is JSON with one key given twice",
    ),
    "a list of texts": ("x.json", f'["{PLANTED}"]', r"x\.json:1 \(item 1\) is not a JSON object"),
    "a table by columns": (
        "x.json",
        f'{{"prompt": ["{PLANTED}"]}}',
        r"x\.json is an object of columns",
    ),
    "one object": (
        "x.json",
        f'{{"text": "{PLANTED}"}}',
        r"x\.json must be a list of objects, or an object of \{category",
    ),
    "a list in a category": (
        "x.json",
        f'{{"a": ["{PLANTED}"], "b": ["c", ["d"]]}}',
        r"prompt 2 of category 2 is not text",
    ),
    "an empty text in a category": (
        "x.json",
        f'{{"{PLANTED}": ["b", ""]}}',
        r"prompt 2 of category 1 has no prompt",
    ),
    "wrong encoding": ("x.csv", b"prompt\n\xff\xfe\n", r"x\.csv:2 is not UTF-8"),
    "an unknown label": (
        "x.csv",
        f"id,prompt,type,label\n1,a,t,{PLANTED}\n",
        r"x\.csv:2 has a label that is none of",
    ),
    "nothing": ("x.jsonl", "\n\n", r"x\.jsonl holds no prompt"),
    "no byte": ("x.csv", "", r"x\.csv holds no prompt"),
    "a header only": ("x.csv", "prompt\n", r"x\.csv holds no prompt"),
    "no category": ("x.json", "{}", r"x\.json holds no prompt"),
    "empty categories": ("x.json", '{"a": []}', r"x\.json holds no prompt"),
    "another ending": ("x.txt", "prompt\n", r"x\.txt has none of the endings \.jsonl"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_a_data_error_that_says_where_and_quotes_nothing(tmp_path, case):
    name, text, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert PLANTED not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no prompt file or folder at .*absent\.csv"):
        read_prompts(tmp_path / "absent.csv")


def test_a_folder_with_one_data_file_is_that_file_and_with_several_is_an_error(tmp_path):
    path = advbench(tmp_path / "set")
    assert read_prompts(tmp_path / "set") == read_prompts(path)
    strongreject(tmp_path / "set")
    with pytest.raises(DataError, match=r"holds 2 data files, .*sr\.csv.*name one"):
        read_prompts(tmp_path / "set")


def test_a_hex_phi_file_with_two_fields_is_an_error_with_its_line_and_a_header_is_skipped(
    tmp_path,
):
    write_csv(tmp_path / "hex" / "a.csv", ["prompt"], [ZORBLE], [FUMBLER])
    assert [p.id for p in read_prompts(tmp_path / "hex", format="hex-phi").prompts] == [
        "a:2",
        "a:3",
    ]
    write_csv(tmp_path / "hex" / "b.csv", [ZORBLE], ["one", PLANTED])
    with pytest.raises(DataError, match=r"b\.csv:2 has 2 fields; hex-phi has one") as caught:
        read_prompts(tmp_path / "hex", format="hex-phi")
    assert PLANTED not in str(caught.value)


@pytest.mark.parametrize("turns", [json.dumps([FUMBLER, "x"]), str([FUMBLER, "x"])])
def test_turns_in_a_csv_are_read_as_json_and_as_a_python_literal(tmp_path, turns):
    path = write_csv(
        tmp_path / "x.csv",
        ["question_id", "category", "turns", "prompt_style"],
        ["1", "2", turns, "base"],
    )
    assert read_prompts(path).prompts == (Prompt("1", FUMBLER, "2", "base"),)


def test_null_that_pandas_writes_for_a_missing_text_is_no_text_and_nan_is_an_error(tmp_path):
    row = '{"Behavior": "b", "SemanticCategory": "c", "ContextString": %s, "BehaviorID": "i"}'
    (tmp_path / "x.jsonl").write_text(row % "null")
    assert read_prompts(tmp_path / "x.jsonl").prompts == (Prompt("i", "b", "c"),)
    (tmp_path / "x.jsonl").write_text(row % "NaN")
    with pytest.raises(DataError, match=r"x\.jsonl:1 has NaN.*write null"):
        read_prompts(tmp_path / "x.jsonl")


def test_a_label_keeps_the_prompts_with_it_and_rows_counts_all(tmp_path):
    read = read_prompts(xstest(tmp_path), label="harmless")
    assert [p.id for p in read.prompts] == ["1"] and read.rows == 2
    assert [p.id for p in read_prompts(xstest(tmp_path), label="harmful").prompts] == ["2"]


def test_a_set_without_labels_is_kept_whole_and_a_label_that_no_prompt_has_is_an_error(tmp_path):
    assert len(read_prompts(advbench(tmp_path), label="harmless").prompts) == 2
    path = write_json(tmp_path / "x.json", [{"prompt": "a", "label": "unsafe"}, {"prompt": "b"}])
    with pytest.raises(
        DataError, match=r"no prompt labelled harmless: there are 1 without a label, 1 harmful"
    ):
        read_prompts(path, label="harmless")


def test_unknown_labels_of_a_plain_set_are_an_error_only_if_a_label_is_requested(tmp_path):
    path = write_json(tmp_path / "x.json", [{"prompt": "a", "label": 3}])
    assert read_prompts(path).prompts[0].label == ""
    with pytest.raises(DataError, match=r"x\.json:1 \(item 1\) has a label that is none of"):
        read_prompts(path, label="harmful")


@given(n=st.integers(1, 60), limit=st.integers(1, 70))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_limit_keeps_that_many_prompts_in_order_and_evenly_spaced(tmp_path, n, limit):
    path = write_json(tmp_path / "x.json", [{"id": i, "prompt": f"p{i}"} for i in range(n)])
    read = read_prompts(path, limit=limit)
    kept = [int(p.id) for p in read.prompts]
    assert read.rows == n and len(kept) == min(n, limit)
    gaps = [b - a for a, b in pairwise(kept)]
    assert all(gap > 0 for gap in gaps) and (not gaps or max(gaps) - min(gaps) <= 1)


def test_a_limit_applies_after_the_label(tmp_path):
    rows = [{"id": i, "prompt": f"p{i}", "label": "safe" if i % 2 else "unsafe"} for i in range(10)]
    read = read_prompts(write_json(tmp_path / "x.json", rows), label="harmless", limit=5)
    assert [p.id for p in read.prompts] == ["1", "3", "5", "7", "9"]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_nothing_is_an_error(tmp_path, limit):
    with pytest.raises(DataError, match=f"limit={limit}"):
        read_prompts(advbench(tmp_path), limit=limit)


def test_a_duplicate_id_gets_its_line_appended_and_is_counted(tmp_path):
    names = ("a", "a@3", "a", "b", "a")
    rows = [{"id": name, "prompt": f"p{place}"} for place, name in enumerate(names)]
    read = read_prompts(write_json(tmp_path / "x.json", rows))
    assert [p.id for p in read.prompts] == ["a", "a@3", "a@3@3", "b", "a@5"] and read.renamed == 2


copies = st.lists(st.sampled_from(["p", "q", "r s", " p", "p\n", "P"]), min_size=1, max_size=12)


@given(texts=copies, limit=st.none() | st.integers(1, 12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_a_prompt_given_several_times_is_asked_once_at_its_first_place(tmp_path, texts, limit):
    rows = [{"prompt": text, "category": str(place)} for place, text in enumerate(texts)]
    read = read_prompts(write_json(tmp_path / "x.json", rows))
    asked = [prompt.text.strip() for prompt in read.prompts]
    assert asked == list(dict.fromkeys(text.strip() for text in texts))
    assert len(asked) + len(read.repeats) == read.rows == len(texts)
    first = {text.strip(): str(place) for place, text in reversed(list(enumerate(texts)))}
    assert all(first[prompt.text.strip()] == prompt.category for prompt in read.prompts)
    some = read_prompts(tmp_path / "x.json", limit=limit).prompts
    assert set(some) <= set(read.prompts) and len(some) == min(limit or 12, len(asked))


def test_one_prompt_with_two_answers_is_an_error_that_names_both_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    answers = ["4", "5", "4 "]
    rows = [json.dumps({"prompt": PLANTED, "answer": answer}) for answer in answers]
    path.write_text("\n".join(rows[:2]))
    with pytest.raises(DataError, match=r"x\.jsonl:2 has the prompt of .*x\.jsonl:1") as caught:
        read_prompts(path, needs_answer=True)
    assert PLANTED not in str(caught.value)
    assert len(read_prompts(path).prompts) == 1  # no suite of refusals reads the answers
    path.write_text("\n".join(rows[::2]))
    assert len(read_prompts(path, needs_answer=True).prompts) == 1


def test_one_prompt_with_two_labels_is_an_error_and_an_empty_label_takes_the_other(tmp_path):
    rows = [{"prompt": "p"}, {"prompt": "p", "label": "safe"}, {"prompt": "p", "label": "unsafe"}]
    read = read_prompts(write_json(tmp_path / "x.json", rows[:2]), label="harmless")
    assert [prompt.label for prompt in read.prompts] == ["harmless"]
    with pytest.raises(DataError, match=r"item 3\) labels a prompt harmful, .*item 1\)"):
        read_prompts(write_json(tmp_path / "x.json", rows))


def test_the_repeats_stand_in_the_record_of_a_generation(tmp_path):
    path = write_json(tmp_path / "x.json", [{"prompt": text} for text in ("p", "q", "p", "p")])
    whole = read_prompts(path)
    assert prompts_record(whole, whole, path) | {"sha256": ""} == {
        "format": "plain",
        "rows": 4,
        "asked": 2,
        "of": 2,
        "repeats": 2,
        "sha256": "",
    }
    write_json(path, [{"prompt": "p"}])
    assert "repeats" not in prompts_record(read_prompts(path), read_prompts(path), path)


def test_a_missing_answer_that_a_task_needs_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{ROW}\n{{"prompt": "{PLANTED}"}}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2 has no `answer`"):
        read_prompts(path, needs_answer=True)
    assert read_prompts(path).prompts[0].answer == "word2"


def test_a_line_separator_inside_a_jsonl_text_does_not_end_the_line(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False), encoding="utf-8"
    )
    assert read_prompts(tmp_path / "x.jsonl").prompts == (Prompt("1", "a\u2028b"),)


# Texts with letters of another script, quotes, commas and line ends
texts = st.text(st.sampled_from('ab é紫,"\n;'), min_size=1, max_size=12).filter(str.strip)


@given(
    rows=st.lists(
        st.tuples(texts, texts), min_size=1, max_size=5, unique_by=lambda row: row[0].strip()
    ),
    ending=st.sampled_from([".csv", ".jsonl", ".json"]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_line_ends_and_a_byte_order_mark_do_not_change_the_prompts(tmp_path, rows, ending):
    if ending == ".csv":
        buffer = io.StringIO(newline="")
        csv.writer(buffer, lineterminator="\n").writerows([("prompt", "category"), *rows])
        text = buffer.getvalue()
    else:
        objects = [{"prompt": prompt, "category": category} for prompt, category in rows]
        text = (
            json.dumps(objects, indent=1)
            if ending == ".json"
            else "".join(json.dumps(row) + "\n" for row in objects)
        )
    path = tmp_path / f"set{ending}"
    read = []
    for mark in ("", "\ufeff"):
        for newline in ("\n", "\r\n"):
            path.write_bytes((mark + text.replace("\n", newline)).encode())
            read.append(read_prompts(path))
    assert [(p.text, p.category) for p in read[0].prompts] == [
        (prompt, category.strip()) for prompt, category in rows
    ]
    assert read == [read[0]] * 4


@pytest.mark.process
def test_reading_and_auditing_load_no_torch():
    code = (
        "import sys, ebbline.tasks.data.prompts, ebbline.tasks.data.audit, "
        "ebbline.commands.audit; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
