"""Training data: nested sizes, all formats, errors that name file and line, and a mask that covers
exactly the assistant's tokens.
"""

import csv
import json

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from ebbline.tasks.chat.training_rows import encode
from ebbline.tasks.data.conversations import read_conversations, run
from ebbline.tasks.data.reader import read_rows
from ebbline.tasks.errors import DataError
from ebbline.tasks.specs import DataSpec
from tests.tiny import context, fresh, word_tokenizer, write_chats, write_lines

PLANTED = "quixotic-zeppelin"


def written_rows(folder, pool, mix=None, **spec):
    out = fresh(folder)
    inputs = {"pool": pool} if mix is None else {"pool": pool, "mix": mix}
    run(DataSpec(**spec), inputs, out, context(folder.with_name(folder.name + "-ctx")))
    return (out / DataSpec.ROWS).read_text().splitlines()


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools")
    return write_chats(folder / "pool.jsonl", 40, seed=1), write_chats(
        folder / "mix.jsonl", 40, seed=2
    )


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    share=st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 5),
)
def test_a_smaller_set_is_the_beginning_of_a_larger_set(
    tmp_path_factory, pools, sizes, share, seed
):
    small, large = sorted(sizes)
    folder = tmp_path_factory.mktemp("nested")
    one = written_rows(folder / "one", *pools, size=small, mix_share=share, seed=seed)
    other = written_rows(folder / "other", *pools, size=large, mix_share=share, seed=seed)
    assert len(one) == small and len(other) == large
    assert one == other[:small]


@given(size=st.integers(1, 40), share=st.floats(0, 1))
def test_the_share_of_the_mix_is_kept_at_every_size_to_within_one_row(
    tmp_path_factory, pools, size, share
):
    mixed = set(written_rows(tmp_path_factory.mktemp("all") / "m", pools[1], size=40))
    rows = written_rows(tmp_path_factory.mktemp("share") / "s", *pools, size=size, mix_share=share)
    assert abs(sum(row in mixed for row in rows) - share * size) < 1 + 1e-6


def test_a_set_of_the_whole_pool_has_each_row_once_in_the_order_of_the_seed(tmp_path, pools):
    one, other = (
        written_rows(tmp_path / str(seed), pools[0], size=40, seed=seed) for seed in (0, 1)
    )
    assert one != other
    assert sorted(one) == sorted(other) and len(set(one)) == 40


def test_a_size_above_the_number_of_rows_is_an_error_not_a_smaller_set(tmp_path, pools):
    with pytest.raises(DataError, match=r"data\.size=41 .* 40 conversations"):
        written_rows(tmp_path / "more", pools[0], size=41)
    with pytest.raises(DataError, match=r"mix\.jsonl"):
        written_rows(
            tmp_path / "mix",
            write_chats(tmp_path / "large.jsonl", 90),
            pools[1],
            size=90,
            mix_share=0.5,
        )


def test_chat_jsonl_and_alpaca_json_jsonl_csv_and_parquet_are_read_as_the_same_conversations(
    tmp_path,
):
    examples = [
        ("first question", "", "first answer"),
        ("second, with a comma", "and an input", 'an answer with "quotes"\nand a line'),
    ]
    rows = [{"instruction": i, "input": x, "output": o} for i, x, o in examples]
    chat = [
        {
            "messages": [
                {"role": "user", "content": i + (f"\n\n{x}" if x else "")},
                {"role": "assistant", "content": o},
            ]
        }
        for i, x, o in examples
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    with (tmp_path / "alpaca.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "alpaca.parquet")
    files = [
        write_lines(tmp_path / "chat.jsonl", chat),
        write_lines(tmp_path / "alpaca.jsonl", rows),
        tmp_path / "alpaca.json",
        tmp_path / "alpaca.csv",
        tmp_path / "alpaca.parquet",
    ]
    expected = [row["messages"] for row in chat]
    assert [read_conversations(path) for path in files] == [expected] * 5


def test_a_folder_with_one_data_file_is_that_file_and_with_two_is_an_error(tmp_path):
    (tmp_path / "set").mkdir()
    path = write_chats(tmp_path / "set" / "rows.jsonl", 3)
    assert read_conversations(tmp_path / "set") == read_conversations(path)
    write_chats(tmp_path / "set" / "more.jsonl", 3)
    with pytest.raises(DataError, match="holds 2 data files"):
        read_conversations(tmp_path / "set")


GOOD = json.dumps(
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
)
TURN = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "a"}'

BAD_FILES = {
    "truncated line": ("x.jsonl", f"{GOOD}\n{TURN % PLANTED}", r"x\.jsonl:2 is not JSON"),
    "not an object": ("x.jsonl", f'{GOOD}\n["{PLANTED}"]\n', r"x\.jsonl:2 is not a JSON object"),
    "no messages": (
        "x.jsonl",
        f'{GOOD}\n\n{{"text": "{PLANTED}"}}\n',
        r"x\.jsonl:3 has the keys \['text'\]",
    ),
    "messages no list": (
        "x.jsonl",
        f'{{"messages": "{PLANTED}"}}\n',
        r"x\.jsonl:1: `messages` is not a list",
    ),
    "no turns": ("x.jsonl", '{"messages": []}\n', r"x\.jsonl:1: `messages`"),
    "unknown role": (
        "x.jsonl",
        f'{{"messages": [{{"role": "tool", "content": "{PLANTED}"}}]}}',
        r"x\.jsonl:1: turn 1 has the role tool",
    ),
    "empty content": (
        "x.jsonl",
        f'{GOOD}\n{{"messages": [{{"role": "assistant", "content": " "}}]}}',
        r"x\.jsonl:2: a turn needs",
    ),
    "content in parts": (
        "x.jsonl",
        json.dumps(
            {"messages": [{"role": "user", "content": [{"type": "image", "url": PLANTED}]}]}
        ),
        r"x\.jsonl:1: a turn's content has a part that is no text",
    ),
    "last turn the user's": (
        "x.jsonl",
        f'{{"messages": [{{"role": "user", "content": "{PLANTED}"}}]}}',
        r"x\.jsonl:1: the last turn",
    ),
    "alpaca without output": (
        "x.json",
        json.dumps([{"instruction": "i", "output": "o"}, {"instruction": PLANTED, "output": ""}]),
        r"x\.json:1 \(item 2\): `instruction` or `output` is empty",
    ),
    "truncated json": (
        "x.json",
        f'[{{"instruction": "{PLANTED}", "output": "',
        r"x\.json:1 \(item 1\) is not JSON",
    ),
    "alpaca without the key output": (
        "x.json",
        f'{{"instruction": "{PLANTED}"}}',
        r"x\.json:1 has the keys \['instruction'\]",
    ),
    "json text": ("x.json", f'"{PLANTED}"', r"x\.json:1 is not a JSON object; .* list of objects"),
    "truncated csv": ("x.csv", f'instruction,output\ni,o\n{PLANTED},"cut off', r"x\.csv.* CSV"),
    "csv without a header": (
        "x.csv",
        f"{PLANTED} and more,an answer\nb,c,d\n",
        r"x\.csv:2 has 3 fields and the header 2",
    ),
    "csv with an empty output": (
        "x.csv",
        f"instruction,output\na,b\n{PLANTED},\n",
        r"x\.csv:3: `instruction` or `output` is empty",
    ),
    "short csv row": (
        "x.csv",
        f"instruction,output\n{PLANTED}\n",
        r"x\.csv:2 has 1 field and the header 2",
    ),
    "wrong encoding": ("x.jsonl", b'{"messages": "\xff\xfe"}\n', r"x\.jsonl.* UTF-8"),
    "wrong encoding, json": ("x.json", b'[{"a": "\xff"}]', r"x\.json.* UTF-8"),
    "empty jsonl": ("x.jsonl", "\n\n", r"x\.jsonl holds no conversation"),
    "empty json": ("x.json", "[]", r"x\.json holds no conversation"),
    "csv with a header only": ("x.csv", "instruction,output\n", r"x\.csv holds no conversation"),
    "truncated parquet": ("x.parquet", "PAR1", r"x\.parquet cannot be read as Parquet"),
    "another ending": ("x.txt", "a\tb", r"x\.txt has none of the endings"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_a_data_error_that_names_file_and_line_and_quotes_nothing(tmp_path, case):
    name, text, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        read_conversations(tmp_path / name)
    assert PLANTED not in str(caught.value)


def test_a_number_in_alpaca_data_is_read_as_text(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"instruction": 7, "input": 8, "output": 56}])
    assert read_conversations(path) == [
        [{"role": "user", "content": "7\n\n8"}, {"role": "assistant", "content": "56"}]
    ]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no data file at .*absent\.jsonl"):
        list(read_rows(tmp_path / "absent.jsonl"))


words = st.lists(st.integers(0, 39).map("word{}".format), min_size=1, max_size=5).map(" ".join)
exchanges = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@given(exchanges=exchanges, system=st.none() | words)
def test_the_mask_covers_exactly_the_assistants_tokens(exchanges, system):
    tokenizer = word_tokenizer()
    turns = [] if system is None else [{"role": "system", "content": system}]
    expected = ["<s>", *(["<system>", *system.split()] if system else [])]
    learnt = [False] * len(expected)
    for question, answer in exchanges:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for text, by_assistant in (
            (["<user>", *question.split(), "<assistant>"], False),
            ([*answer.split(), "</s>"], True),
        ):
            expected += text
            learnt += [by_assistant] * len(text)
    ids, labels = encode(turns, tokenizer, 512)
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert [label != -100 for label in labels] == learnt
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


MARKS = [("weight", 1, 0), ("train", True, False), ("training", "true", "false")]


@given(
    exchanges=st.lists(st.tuples(words, words, st.booleans()), min_size=1, max_size=4),
    mark=st.sampled_from(MARKS),
    on_users=st.booleans(),
)
def test_an_answer_of_weight_0_is_read_and_not_learnt(tmp_path_factory, exchanges, mark, on_users):
    name, yes, no = mark
    turns: list[dict[str, object]] = []
    for question, answer, learnt in exchanges:
        turns.append({"role": "user", "content": question} | ({name: no} if on_users else {}))
        turns.append({"role": "assistant", "content": answer, name: yes if learnt else no})
    folder = tmp_path_factory.mktemp("weights")
    path = write_lines(folder / "pool.jsonl", [{"messages": turns}])
    if not any(learnt for _, _, learnt in exchanges):
        with pytest.raises(DataError, match=r"pool\.jsonl:1: every answer has `weight` 0"):
            read_conversations(path)
        return
    # As the stage writes the row and the training reads it
    written_rows(folder / "data", path, size=1)
    (row,) = read_conversations(folder / "data" / DataSpec.ROWS)
    (plain,) = read_conversations(
        write_lines(
            folder / "plain.jsonl",
            [{"messages": [{"role": turn["role"], "content": turn["content"]} for turn in turns]}],
        )
    )
    (ids, labels), (plain_ids, plain_labels) = (
        encode(each, word_tokenizer(), 512) for each in (row, plain)
    )
    assert ids == plain_ids
    learnt_at, place = [], 1
    for question, answer, learnt in exchanges:
        place += len(question.split()) + 2
        end = place + len(answer.split()) + 1
        learnt_at += range(place, end) if learnt else []
        place = end
    assert [at for at, label in enumerate(labels) if label != -100] == learnt_at
    assert all(labels[at] == plain_labels[at] for at in learnt_at)


TURN_FAULTS = {
    "weight of a half": ({"weight": 0.5}, r"turn 2 has a `weight` other than 0, 1"),
    "train as text": ({"train": PLANTED}, r"turn 2 has a `train` other than"),
    "tool calls": ({"tool_calls": [{"id": PLANTED}]}, r"turn 2 has `tool_calls`: tools are not"),
    "function call": ({"function_call": {"name": PLANTED}}, r"turn 2 has `function_call`: tools"),
    "name": ({"name": PLANTED}, r"turn 2 has `name`: .* Remove it"),
    "thought": ({"reasoning_content": PLANTED}, r"turn 2 has `reasoning_content`: .*`content`"),
    "parts": ({"train_detail": [{"begin_offset": 0}]}, r"turn 2 has `train_detail`: .*`train`"),
}


@pytest.mark.parametrize("case", TURN_FAULTS)
def test_a_key_that_changes_what_a_turn_teaches_is_an_error_with_line_and_remedy(tmp_path, case):
    keys, message = TURN_FAULTS[case]
    turns = json.loads(GOOD)["messages"]
    path = write_lines(
        tmp_path / "x.jsonl",
        [{"messages": turns}, {"messages": [turns[0], turns[1] | keys]}],
    )
    with pytest.raises(DataError, match=r"x\.jsonl:2: " + message) as caught:
        read_conversations(path)
    assert PLANTED not in str(caught.value)
    empty = dict.fromkeys(keys)
    write_lines(path, [{"messages": [turns[0], turns[1] | empty]}])
    assert read_conversations(path) == [turns]


@pytest.mark.parametrize("role", ["tool", "function", "observation"])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_a_turn_of_another_role_is_an_error_that_names_it_and_the_remedy(tmp_path, role, keys):
    speaker, text = keys
    turns = [{speaker: role, text: PLANTED}, {speaker: "assistant", text: "a"}]
    name = "messages" if speaker == "role" else "conversations"
    path = write_lines(tmp_path / "x.jsonl", [{name: turns}])
    remedy = "Leave conversations with tools out"
    with pytest.raises(DataError, match=rf"x\.jsonl:1: turn 1 has the role {role}: .*{remedy}"):
        read_conversations(path)


def test_a_user_turn_that_is_marked_to_be_learnt_is_an_error(tmp_path):
    turns = json.loads(GOOD)["messages"]
    path = write_lines(tmp_path / "x.jsonl", [{"messages": [turns[0] | {"weight": 1}, turns[1]]}])
    with pytest.raises(DataError, match="turn 1 is the user's and has `weight` 1"):
        read_conversations(path)


def test_tools_beside_messages_are_an_error(tmp_path):
    row = json.loads(GOOD)
    path = write_lines(tmp_path / "x.jsonl", [row | {"tools": []}])
    assert len(read_conversations(path)) == 1
    write_lines(path, [row | {"tools": [{"type": "function"}]}])
    with pytest.raises(DataError, match=r"x\.jsonl:1 has `tools`"):
        read_conversations(path)


def test_a_cut_conversation_keeps_ids_and_labels_of_one_length():
    turns = [
        {"role": "user", "content": "word1 word2"},
        {"role": "assistant", "content": "word3 word4 word5"},
    ]
    whole = encode(turns, word_tokenizer(), 512)
    cut = encode(turns, word_tokenizer(), 7)
    assert cut == (whole[0][:7], whole[1][:7])


def test_a_prompt_that_fills_the_window_is_an_error():
    turns = [
        {"role": "user", "content": "word1 word2 word3"},
        {"role": "assistant", "content": "word4"},
    ]
    with pytest.raises(DataError, match="max_tokens=4"):
        encode(turns, word_tokenizer(), 4)
