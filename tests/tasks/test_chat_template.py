"""What a chat template does is known before anything is trained or measured, and one Spec gives one
text.
"""

import json
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ebbline.tasks.chat.probes import check_chat, probe
from ebbline.tasks.chat.template import (
    bind,
    bound,
    encode_prompts,
    render,
    save_tokenizer,
    tokens_of,
)
from ebbline.tasks.chat.tokenizers import read_tokenizer
from ebbline.tasks.chat.training_rows import encode
from ebbline.tasks.errors import DataError, ModelError
from ebbline.tasks.specs import Chat
from tests.chat_templates import EXPECTED, TRAINABLE, WRONG, byte_level, sentence_piece

TOKENIZERS = {"byte-level": byte_level, "sentence-piece": sentence_piece}


def chat(*contents, system=None):
    turns = [] if system is None else [{"role": "system", "content": system}]
    return turns + [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]


def ready(name, make=byte_level, **changes):
    """A tokenizer with a named template, bound to the default settings."""
    tokenizer = make(EXPECTED[name].template)
    bind(tokenizer, Chat(**changes), "folder")
    return tokenizer


@pytest.mark.parametrize("name", EXPECTED)
def test_the_probes_read_from_a_template_what_its_format_says(name):
    tokenizer, expected = ready(name), EXPECTED[name]
    facts = check_chat(tokenizer, Chat(), "folder")
    end = facts.end_of_turn
    assert (None if end is None else tokenizer.convert_ids_to_tokens(end)) == expected.end
    assert (facts.system, facts.turns) == (expected.system, expected.turns)
    assert (facts.dated, facts.thoughts) == (expected.dated, expected.thoughts)
    assert facts.trainable == expected.trainable


@pytest.mark.parametrize("name", EXPECTED)
def test_the_settings_change_no_text_of_a_template_without_date(name):
    if EXPECTED[name].dated:
        pytest.skip("its text depends on the settings")
    plain = byte_level(EXPECTED[name].template)
    for turns, prompt in ((chat("a"), True), (chat("a"), False), (chat("a", "b"), False)):
        assert render(ready(name), turns, prompt) == render(plain, turns, prompt)


@pytest.mark.parametrize("name", WRONG)
def test_a_template_that_would_measure_something_else_is_an_error_that_names_its_folder(name):
    template, words = WRONG[name]
    tokenizer = byte_level(template)
    with pytest.raises(ModelError, match=words) as raised:
        bind(tokenizer, Chat(), "models/mine")
        check_chat(tokenizer, Chat(), "models/mine")
    assert "models/mine" in str(raised.value)


def test_a_tokenizer_without_a_template_is_an_error_that_names_the_remedy():
    tokenizer = byte_level(None)
    with pytest.raises(ModelError, match=r"models/mine has no chat template.*chat_template.jinja"):
        bind(tokenizer, Chat(), "models/mine")


def test_one_of_several_templates_is_the_default_one_or_the_one_that_is_named():
    short, long = EXPECTED["zephyr"].template, EXPECTED["chatml"].template
    tokenizer = byte_level({"default": short, "tool_use": long})
    bind(tokenizer, Chat(), "folder")
    assert tokenizer.convert_ids_to_tokens(probe(tokenizer).end_of_turn) == "</s>"
    tokenizer = byte_level({"default": short, "tool_use": long})
    bind(tokenizer, Chat(template="tool_use"), "folder")
    assert tokenizer.convert_ids_to_tokens(probe(tokenizer).end_of_turn) == "<|im_end|>"


@pytest.mark.parametrize(
    "own, name", [({"rag": "x", "tool_use": "y"}, None), ({"default": "x"}, "rag"), ("x", "rag")]
)
def test_a_template_name_that_is_not_there_is_an_error_that_lists_the_names(own, name):
    with pytest.raises(ModelError, match="it has \\['"):
        bind(byte_level(own), Chat(template=name), "folder")


def test_a_template_of_the_settings_replaces_the_models_and_moves_no_key_without_one():
    tokenizer = byte_level(None)
    template = EXPECTED["chatml"].template
    bind(tokenizer, Chat(text=template), "folder")
    assert render(tokenizer, chat("a"), True) == render(ready("chatml"), chat("a"), True)
    assert tokenizer.own_chat_template == template
    assert "text" not in Chat().model_dump() and Chat(**Chat().model_dump()) == Chat()
    assert Chat(text=template).model_dump()["text"] == template
    with pytest.raises(ValidationError, match="give one"):
        Chat(text=template, template="rag")


@pytest.mark.parametrize("longest", ["2048", True, 0, -1])
def test_a_longest_text_that_is_no_number_above_0_is_an_error_that_names_the_setting(
    tmp_path, longest
):
    byte_level(EXPECTED["chatml"].template).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": longest}))
    with pytest.raises(ModelError, match=r"`model_max_length` in .*tokenizer_config\.json is"):
        read_tokenizer(tmp_path)


FORMATS = "%d %b %Y|%B %d, %Y|%Y-%m-%d|%A, %-d %B %Y|%d/%m/%y|%c|%H:%M:%S|%j of %Y|%e|%F %T".split(
    "|"
)


@given(day=st.dates(min_value=datetime(1000, 1, 1).date()), form=st.sampled_from(FORMATS))
@settings(deadline=None, max_examples=15)
def test_a_template_writes_the_date_of_its_settings_whatever_the_day(day, form):
    template = EXPECTED["chatml"].template + "{{ strftime_now('" + form + "') }}"
    tokenizer = byte_level(template)
    tokenizer.chat_template = bound(template, Chat(date=day.isoformat()))
    midnight = datetime(day.year, day.month, day.day)
    assert render(tokenizer, chat("a"), False).endswith("\n" + midnight.strftime(form))


def test_the_default_date_is_the_one_that_llama_3_1_writes_by_itself():
    plain = byte_level(EXPECTED["llama 3.1"].template)
    assert render(ready("llama 3.1"), chat("a"), True) == render(plain, chat("a"), True)
    assert "Today Date: 03 Feb 2025" in render(
        ready("llama 3.2", date="2025-02-03"), chat("a"), True
    )


def test_a_date_format_that_is_not_known_is_an_error_and_not_another_text():
    template = EXPECTED["chatml"].template + "{{ strftime_now('%s') }}"
    tokenizer = byte_level(template)
    bind(tokenizer, Chat(), "folder")
    with pytest.raises(ModelError, match="unknown date format"):
        check_chat(tokenizer, Chat(), "folder")


@pytest.mark.parametrize("text", ["2024-13-01", "yesterday", "2024-7-26", ""])
def test_a_text_that_is_no_date_is_rejected(text):
    with pytest.raises(ValidationError, match="date"):
        Chat(date=text)


def test_a_date_without_quotes_in_a_study_file_is_the_same_setting():
    assert Chat.model_validate({"date": datetime(2025, 2, 3).date()}) == Chat(date="2025-02-03")


def test_the_switch_for_thoughts_closes_the_thought_in_the_prompt():
    tokenizer = ready("qwen 3", thinking=False)
    check_chat(tokenizer, Chat(thinking=False), "folder")
    assert render(tokenizer, chat("a"), True).endswith("assistant\n<think>\n\n</think>\n\n")
    _, labels = encode(chat("word", "wort"), tokenizer, 512)
    assert tokenizer.decode([token for token in labels if token != -100]) == "wort<|im_end|>"


def test_a_switch_for_thoughts_that_the_template_lacks_is_an_error():
    with pytest.raises(ModelError, match="no switch for thoughts"):
        check_chat(ready("chatml", thinking=False), Chat(thinking=False), "folder")


def test_a_saved_tokenizer_has_the_models_own_template(tmp_path):
    tokenizer = ready("llama 3.2")
    before = tokenizer.chat_template
    save_tokenizer(tokenizer, tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == EXPECTED["llama 3.2"].template
    assert tokenizer.chat_template == before


words = st.sampled_from(["word", "wet moor", "a", "it is 7", "</think", "ASSISTANT"])
answers = st.tuples(
    st.sampled_from(["", "\n", " ", "\n\n", "  ", "\t", "\n "]),
    words,
    st.sampled_from(["", "\n", " "]),
).map("".join)


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("name", TRAINABLE)
@given(exchanges=st.lists(st.tuples(words, answers), min_size=1, max_size=2))
@settings(deadline=None, max_examples=12)
def test_a_row_begins_with_the_prompt_of_generation_and_teaches_answer_and_end(
    name, make, exchanges
):
    """Whatever white space an answer begins with, the tokens before the first label are exactly
    those that generation gives the model. The end of each turn is learnt, and no header is.
    """
    tokenizer, turns = READY[name, make], chat(*(text for pair in exchanges for text in pair))
    ids, labels = encode(turns, tokenizer, 4096)
    (prompt,) = encode_prompts(tokenizer, [turns[0]["content"]])
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [-100] * len(prompt) and labels[len(prompt)] != -100
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    learnt = tokenizer.decode([label for label in labels if label != -100])
    end = EXPECTED[name].end
    assert learnt.count(end) == len(exchanges) and learnt.endswith(end)
    for part, (_, answer) in zip(learnt.split(end), exchanges, strict=False):
        thought = part.replace("<think>", "").replace("</think>", "")
        assert thought.split() == answer.split()
    whole = render(tokenizer, turns, False)
    assert tokenizer.decode(ids) == tokenizer.decode(tokens_of(tokenizer, whole))


READY = {(name, make): ready(name, make) for name in TRAINABLE for make in TOKENIZERS.values()}


def test_an_answer_that_begins_with_a_newline_is_read_in_chatml():
    """The tokenizer merges the header's newline with the answer's, which generation never sees."""
    tokenizer, turns = ready("chatml"), chat("word", "\nwort")
    whole = tokens_of(tokenizer, render(tokenizer, turns, False))
    ids, labels = encode(turns, tokenizer, 512)
    assert ids != whole and tokenizer.decode(ids) == tokenizer.decode(whole)
    assert tokenizer.decode([label for label in labels if label != -100]) == "\nwort<|im_end|>"


def test_the_end_of_the_turn_is_learnt_when_it_is_the_pad_token_too():
    tokenizer = ready("chatml")
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    _, labels = encode(chat("word", "wort"), tokenizer, 512)
    assert labels[-1] == -100 and labels[-2] == tokenizer.pad_token_id


def test_a_thought_in_an_answer_is_learnt_where_the_template_writes_it():
    tokenizer = ready("qwen 3")
    _, labels = encode(chat("word", "<think>warm</think>wort"), tokenizer, 512)
    learnt = tokenizer.decode([label for label in labels if label != -100])
    assert learnt == "<think>\nwarm\n</think>\n\nwort<|im_end|>"


@pytest.mark.parametrize(
    "name, turns, words",
    [
        ("gemma 2", chat("a", "b", system="c"), "does not support system turns"),
        ("mistral", chat("a", "b", system="c"), "does not support system turns"),
        ("chatml", chat("a", "b")[1:], "the first turn is the assistant's"),
        ("gemma 2", chat("a", "b")[:1] + chat("a", "b"), "raises TemplateError"),
        ("vicuna", [*chat("a"), {"role": "tool", "content": "zebra"}, *chat("a", "b")[1:]], ""),
        ("qwen 3", chat("a", "<think>zebra</think>b", "c", "d"), "leaves out text of turn 2"),
    ],
)
def test_turns_that_a_template_does_not_render_are_an_error_that_quotes_none_of_them(
    name, turns, words
):
    if not words:
        encode(turns, ready(name), 512)  # written as it is, so nothing is lost
        return
    with pytest.raises(DataError, match=words) as raised:
        encode(turns, ready(name), 512)
    assert "zebra" not in str(raised.value)


@pytest.mark.parametrize(
    "name, words", [("r1 distill", "opens a thought"), ("falcon", "no end token after an answer")]
)
def test_a_template_that_serves_generation_only_is_an_error_when_it_trains(name, words):
    check_chat(ready(name), Chat(), "folder")
    with pytest.raises(ModelError, match=words):
        encode(chat("a", "b"), ready(name), 512)


def test_a_template_that_changes_earlier_answers_does_not_support_several_turns():
    """Templates of reasoning models drop the thoughts of all answers but the last."""
    template = EXPECTED["olmo 2"].template.replace(
        "message.content",
        "(message.content | upper if message.role == 'assistant' and not loop.last "
        "else message.content)",
    )
    tokenizer = byte_level(template)
    bind(tokenizer, Chat(), "folder")
    assert not check_chat(tokenizer, Chat(), "folder").turns
    encode(chat("a", "b"), tokenizer, 512)
    with pytest.raises(DataError, match="does not support several turns"):
        encode(chat("a", "b", "c", "d"), tokenizer, 512)


HEADERS = [
    "",
    "A:",
    "A: ",
    "A:\n",
    "<|assistant|>",
    "<|assistant|>\n",
    "A: <think>\n\n</think>\n\n",
]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("prompt", HEADERS)
def test_a_template_is_used_exactly_when_its_prompt_is_where_an_answer_begins(header, prompt):
    """An answer may follow its prompt after white space or an empty thought, never after a header
    or in place of one.
    """
    template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ 'Q: ' + message.content + "
        f"'|' }}}}{{% else %}}{{{{ {header!r} + message.content + eos_token }}}}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {prompt!r} }}}}{{% endif %}}"
    )
    tokenizer = byte_level(template)
    bind(tokenizer, Chat(), "folder")
    rest = header.removeprefix(prompt) if header.startswith(prompt) else "another"
    if rest.replace("<think>", "").replace("</think>", "").strip():
        with pytest.raises(ModelError, match="generation prompt"):
            check_chat(tokenizer, Chat(), "folder")
        return
    check_chat(tokenizer, Chat(), "folder")
    _, labels = encode(chat("word", "wort"), tokenizer, 512)
    learnt = tokenizer.decode([label for label in labels if label != -100])
    assert learnt == rest + "wort</s>"


@pytest.mark.parametrize("change", ["m.content[:30]", "m.content | e", "m.content | lower"])
def test_a_prompt_that_the_template_shortens_or_changes_is_an_error(change):
    tokenizer = byte_level(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    bind(tokenizer, Chat(), "folder")
    asked = ["a short one", "Sedge & reed: which of the two grows in deeper water?"]
    assert len(encode_prompts(tokenizer, asked)) == 2
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", change)
    with pytest.raises(DataError, match="leaves out or changes text of prompt 2") as error:
        encode_prompts(tokenizer, asked)
    assert "reed" not in str(error.value)


def test_the_byte_order_mark_of_a_templates_file_is_no_text():
    tokenizer = byte_level("\ufeff" + EXPECTED["chatml"].template)
    bind(tokenizer, Chat(), "folder")
    assert render(tokenizer, chat("a"), True) == render(ready("chatml"), chat("a"), True)


def test_a_folder_cannot_make_a_templates_tokens_ordinary_text(tmp_path):
    byte_level(EXPECTED["chatml"].template).save_pretrained(tmp_path)
    wanted = encode_prompts(read_tokenizer(tmp_path), ["a"])
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split_special_tokens": True}))
    assert encode_prompts(read_tokenizer(tmp_path), ["a"]) == wanted


def test_a_template_beside_an_adapter_that_is_not_utf8_is_an_error_that_names_it(tmp_path):
    byte_level(EXPECTED["chatml"].template).save_pretrained(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "chat_template.jinja").write_bytes("text".encode("utf-16"))
    with pytest.raises(ModelError, match="chat_template.jinja is not UTF-8"):
        read_tokenizer(tmp_path, tmp_path / "adapter")
