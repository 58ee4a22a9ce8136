"""The formats that people have: each is read as the conversations or items that it means, and what
cannot be read whole is an error that quotes nothing.
"""

import csv
import io

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from ebbline.tasks.data.conversations import read_conversations
from ebbline.tasks.data.formats.chats import chat_format
from ebbline.tasks.data.prompts import read_prompts
from ebbline.tasks.data.reader import read_rows
from ebbline.tasks.errors import DataError
from tests.tiny import write_lines

PLANTED = "quixotic-zeppelin"


def turns(*texts):
    """Turns of the user and the assistant in turn; a first text in a list is a system turn."""
    system = [{"role": "system", "content": texts[0][0]}] if isinstance(texts[0], list) else []
    rest = texts[1:] if system else texts
    roles = ("user", "assistant") * len(rest)
    return system + [
        {"role": role, "content": text} for role, text in zip(roles, rest, strict=False)
    ]


def sharegpt(*texts):
    return [
        {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)
    ]


PART = {"type": "text", "text": "q"}
ROWS = {
    "ShareGPT": ({"conversations": sharegpt("q", "a", "r", "b")}, turns("q", "a", "r", "b")),
    "ShareGPT that ends with a question": (
        {"id": "x1", "conversations": sharegpt("q", "a", "r")},
        turns("q", "a"),
    ),
    "ShareGPT that begins with an answer": (
        {"conversations": [{"from": "gpt", "value": "hello"}, *sharegpt("q", "a")]},
        turns("q", "a"),
    ),
    "ShareGPT with a system prompt": (
        {"system": "s", "conversations": sharegpt("q", "a"), "tools": ""},
        turns(["s"], "q", "a"),
    ),
    "chat with a system turn": ({"messages": turns(["s"], "q", "a")}, turns(["s"], "q", "a")),
    "OpenAI with a developer turn": (
        {"messages": [{"role": "developer", "content": "s"}, *turns("q", "a")]},
        turns(["s"], "q", "a"),
    ),
    "OpenAI with weights": (
        {"messages": [turns("q")[0], turns("q", "a")[1] | {"weight": 1}]},
        turns("q", "a"),
    ),
    "content parts": (
        {"messages": [{"role": "user", "content": [PART, PART]}, turns("q", "a")[1]]},
        turns("qq", "a"),
    ),
    "Alpaca": (
        {"instruction": "i", "input": "x", "output": "a", "text": "rendered"},
        turns("i\n\nx", "a"),
    ),
    "Alpaca of LLaMA-Factory": (
        {"instruction": "r", "input": "", "output": "b", "system": "s", "history": [["q", "a"]]},
        turns(["s"], "q", "a", "r", "b"),
    ),
    "prompt and completion": ({"prompt": "q", "completion": " a"}, turns("q", " a")),
    "TRL's conversations": (
        {"prompt": turns(["s"], "q"), "completion": turns("q", "a")[1:]},
        turns(["s"], "q", "a"),
    ),
    "Dolly": (
        {"instruction": "i", "context": "c", "response": "a", "category": "open"},
        turns("i\n\nc", "a"),
    ),
    "question and answer": ({"question": "q", "answer": "a"}, turns("q", "a")),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_is_the_conversation_that_it_means_in_each_kind_of_file(case, tmp_path):
    row, expected = ROWS[case]
    write_lines(tmp_path / "x.jsonl", [row, row])
    assert read_conversations(tmp_path / "x.jsonl") == [expected] * 2
    if case != "content parts":  # Arrow has no column of text and lists
        parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "x.parquet")
        assert read_conversations(tmp_path / "x.parquet") == [expected] * 2
    assert chat_format(row)


NOT_READ = {
    "preference data": ({"prompt": PLANTED, "chosen": "a", "rejected": "b"}, "preference data"),
    "an answer to avoid": (
        {"prompt": "p", "completion": PLANTED, "label": False},
        "preference data .KTO",
    ),
    "an answer to avoid beside the pair": (
        {"prompt": "p", "completion": "a", "rejected": PLANTED},
        "preference data",
    ),
    "two answers": (
        {"instruction": "i", "output": "o", "response": PLANTED},
        "two answers, `output` and `response`",
    ),
    "a tool call": (
        {"messages": [*turns("q"), {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "turn 2 has `tool_calls`",
    ),
    "an answer that is not learnt": (
        {"messages": [*turns(PLANTED), turns("q", "a")[1] | {"weight": 0}]},
        "`weight` 0",
    ),
    "a tool's turn": (
        {"conversations": [*sharegpt("q"), {"from": "observation", "value": PLANTED}]},
        "turn 2 has the role observation",
    ),
    "two system prompts": (
        {
            "system": PLANTED,
            "conversations": [{"from": "system", "value": "s"}, *sharegpt("q", "a")],
        },
        "has a system turn and text in `system`",
    ),
    "only a greeting": ({"conversations": [{"from": "gpt", "value": PLANTED}]}, "first turn"),
    "a chat that begins with an answer": (
        {"messages": turns(PLANTED, "q", "a")[1:]},
        "first turn is the assistant's",
    ),
    "an earlier turn without an answer": (
        {"instruction": "i", "output": "o", "history": [["q"]]},
        r"`history` is not a list of \[question, answer\]",
    ),
    "an item of a test": (
        {"question": PLANTED, "choices": ["x", "y"], "answer": 0},
        "has text in `choices`",
    ),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_a_row_that_is_not_read_whole_is_an_error(case, tmp_path):
    row, message = NOT_READ[case]
    with pytest.raises(DataError, match=message) as caught:
        read_conversations(write_lines(tmp_path / "x.jsonl", [row]))
    assert "x.jsonl:1" in str(caught.value) and PLANTED not in str(caught.value)


cells = st.text('ab ",;|\n\té紫', max_size=6)
columns = st.lists(st.sampled_from("prompt goal id c d".split()), min_size=2, unique=True)


@settings(max_examples=60)
@given(
    names=columns,
    data=st.data(),
    separator=st.sampled_from(",;\t"),
    ending=st.sampled_from([".csv", ".tsv"]),
    quoted=st.booleans(),
)
def test_a_table_is_read_alike_with_each_separator(
    names, data, separator, ending, quoted, tmp_path_factory
):
    rows = data.draw(
        st.lists(st.lists(cells, min_size=len(names), max_size=len(names)), max_size=4)
    )
    rows = [row for row in rows if row != names]
    buffer = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
    writer = csv.writer(buffer, delimiter=separator, quoting=quoting, lineterminator="\r\n")
    writer.writerows([names, *rows])
    path = tmp_path_factory.mktemp("t") / f"x{ending}"
    path.write_text("\ufeff" + buffer.getvalue(), "utf-8", newline="")
    assert [list(row.values.values()) for row in read_rows(path)] == rows


def test_the_prompt_csv_of_a_german_excel_is_advbench(tmp_path):
    (tmp_path / "x.csv").write_text('\ufeffgoal;target\r\n"Where, then?";Here\r\n', "utf-8")
    found = read_prompts(tmp_path / "x.csv")
    assert (found.format, found.prompts[0].text) == ("advbench", "Where, then?")


CHOICES = ["a zorp", "a tarn", "a quell"]
ITEMS = {
    "MMLU": {"choices": CHOICES, "answer": 1},
    "ARC": {"choices": {"text": CHOICES, "label": ["1", "2", "3"]}, "answerKey": "2"},
    "letters": {"options": {"A": CHOICES[0], "B": CHOICES[1], "C": CHOICES[2]}, "answer": "b"},
    "text": {"options": CHOICES, "answer": CHOICES[1]},
    "columns": {"A": CHOICES[0], "B": CHOICES[1], "C": CHOICES[2], "answer": "B"},
    "a list in a CSV": {"choices": str(CHOICES), "answer": "1"},
}


@pytest.mark.parametrize("case", ITEMS)
def test_an_item_with_choices_asks_for_its_letter(case, tmp_path):
    rows = [{"question": "Which bird?", **ITEMS[case]}]
    if str(rows[0].get("answer")) == "1":  # another row shows that places are counted from 0
        rows.append(rows[0] | {"question": "Which other?", "answer": 0})
    found = read_prompts(write_lines(tmp_path / "x.jsonl", rows), needs_answer=True)
    item = found.prompts[0]
    assert item.text == (
        "Which bird?\n\nA. a zorp\nB. a tarn\nC. a quell\n\n"
        "Answer with the letter of the right choice."
    )
    assert item.answer == "B"


def test_places_that_may_be_counted_from_0_or_from_1_are_an_error(tmp_path):
    """Read from 0, each answer of a file that counts from 1 would be the next choice."""
    rows = [{"question": f"q{n}", "choices": list("wxyz"), "answer": n} for n in (1, 2, 3)]
    path = write_lines(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=r"x\.jsonl:1: .*place from 0 or its place from 1"):
        read_prompts(path)
    for last, letters in ((0, "BCDA"), (4, "ABCD")):
        more = {"question": "last", "choices": list("wxyz"), "answer": last}
        write_lines(path, [*rows, more])
        assert "".join(prompt.answer for prompt in read_prompts(path).prompts) == letters


def test_how_answers_are_written_is_decided_over_the_whole_set(tmp_path):
    numbers = {"question": "How many?", "choices": ["0", "4", "1"]}
    more = numbers | {"question": "How many more?"}
    first = numbers | {"question": "How many less?", "answer": 0}
    write_lines(tmp_path / "x.jsonl", [numbers | {"answer": 1}, more | {"answer": 2}, first])
    assert [p.answer for p in read_prompts(tmp_path / "x.jsonl").prompts] == ["B", "C", "A"]
    write_lines(tmp_path / "x.jsonl", [numbers | {"answer": 1}, more | {"answer": 4}])
    assert [p.answer for p in read_prompts(tmp_path / "x.jsonl").prompts] == ["C", "B"]
    write_lines(tmp_path / "x.jsonl", [numbers | {"answer": 1}])
    with pytest.raises(DataError, match=r"x\.jsonl:1: the answer may be .* write the letter"):
        read_prompts(tmp_path / "x.jsonl")
    write_lines(tmp_path / "x.jsonl", [numbers | {"answer": "C"}, numbers | {"answer": PLANTED}])
    with pytest.raises(DataError, match=r"x\.jsonl:2: the answer is none of the 3") as caught:
        read_prompts(tmp_path / "x.jsonl")
    assert PLANTED not in str(caught.value)


def test_a_prompt_beside_choices_stays_the_prompt(tmp_path):
    row = {"prompt": "p", "question": "q", "choices": CHOICES, "answer": "x"}
    assert read_prompts(write_lines(tmp_path / "x.jsonl", [row])).prompts[0].text == "p"


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: data/part-*
  - split: test
    path: data/held.parquet
---
# A set
"""


def snapshot(folder, names, card=""):
    """A data set as the hub keeps it: a file of one row for each name."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"prompt": f"q{number}", "completion": "a"}
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    if card:
        (folder / "README.md").write_text(card)
    (folder / "dataset_infos.json").write_text("{}")
    return folder


def asked(folder):
    return [row[0]["content"] for row in read_conversations(folder)]


def test_a_folder_of_the_hub_is_its_training_split_or_its_test_split(tmp_path):
    shards = [f"data/train-0000{n}-of-00002.parquet" for n in range(2)]
    folder = snapshot(tmp_path / "a", [*shards, "data/test-00000-of-00001.parquet"])
    assert asked(folder) == ["q0", "q1"]
    found = read_prompts(folder).prompts
    assert [prompt.text for prompt in found] == ["q2"]
    named = snapshot(
        tmp_path / "b", ["data/part-1.parquet", "data/part-2.parquet", "data/held.parquet"], CARD
    )
    assert asked(named) == ["q0", "q1"]
    assert [prompt.text for prompt in read_prompts(named).prompts] == ["q2"]
    only = snapshot(tmp_path / "c", [shard.replace("/", "/sub/") for shard in shards])
    assert [(prompt.id, prompt.text) for prompt in read_prompts(only).prompts] == [
        ("1", "q0"),
        ("2", "q1"),
    ]


def test_a_folder_whose_split_is_not_certain_is_an_error_that_names_them(tmp_path):
    folder = snapshot(tmp_path / "a", ["train_sft.parquet", "train_gen.parquet"])
    with pytest.raises(DataError, match=r"holds 2 data files.*train_gen\.parquet.*name one"):
        read_conversations(folder)
    subsets = CARD.replace("configs:\n", "configs:\n- config_name: other\n  data_files: x\n")
    subsets = subsets.replace("config_name: default", "config_name: one")
    with pytest.raises(DataError, match=r"README\.md describes 2 subsets \(other, one\)"):
        read_conversations(snapshot(tmp_path / "b", ["data/x.parquet", "data/y.parquet"], subsets))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "data-00000-of-00001.arrow").write_bytes(b"x")
    with pytest.raises(DataError, match="save_to_disk"):
        read_conversations(tmp_path / "c")
